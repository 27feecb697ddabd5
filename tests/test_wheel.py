"""An installed wheel works without the checkout: its data is in it, and its commands draw, judge and report."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = {"bench": "tsdfm_bench"} | {f: f"tsdfm_bench/{f}" for f in ("methods", "tasks", "results", "paper_figures")}
RUN = """
import json, sys
from pathlib import Path
from typer.testing import CliRunner
import tsdfm_bench
from tsdfm_bench.cli import app
from tsdfm_bench.paper_figures.published import published
from tsdfm_bench.results.store import RECORDED

small, out = RECORDED / "convergence", Path(sys.argv[1])
commands = {
    "figures": ["figures", "--results", str(small), "--only", "convergence", "--out", str(out / "figures")],
    "verify": ["verify", str(small / "summary.parquet"), "--json"],
    "report": ["report", str(small / "summary.parquet"), "--out", str(out / "report.html")],
    "new-method": ["new-method", "mine", "--out", str(out)],
}
done = {name: CliRunner().invoke(app, words) for name, words in commands.items()}
print(json.dumps({
    "home": tsdfm_bench.__file__,
    "codes": {name: [one.exit_code, one.output[-2000:]] for name, one in done.items()},
    "published": len(published().numbers),
}))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of the tracked files, built once."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    source, out = (tmp_path_factory.mktemp(name) for name in ("source", "wheel"))
    kept = (*FOLDERS, "pyproject.toml", "README.md", "LICENSE")
    for line in listed.stdout.splitlines():
        if line.split("/")[0] in kept and (ROOT / line).is_file():
            (source / line).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / line, source / line)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(out), str(source)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    if built.returncode and any(word in built.stderr for word in ("Connection", "No matching distribution")):
        pytest.skip("setuptools cannot be fetched to build a wheel: no network")
    assert built.returncode == 0, built.stderr
    return next(out.glob("*.whl"))


def test_every_data_file_of_the_packages_is_in_the_wheel(wheel: Path) -> None:
    held = set(zipfile.ZipFile(wheel).namelist())
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    wanted = []
    for line in listed.stdout.splitlines():
        folder, _, rest = line.partition("/")
        if folder in FOLDERS and not line.endswith(".md") and (ROOT / line).is_file():
            wanted.append(f"{FOLDERS[folder]}/{rest}")
    assert len(wanted) > 300
    assert [name for name in wanted if name not in held] == []
    assert not [name for name in held if name.split("/")[0] in (*(set(FOLDERS) - {"tsdfm_bench"}), "tests")]


def test_figures_verdicts_and_report_come_from_the_wheel_alone(wheel: Path, tmp_path: Path) -> None:
    home = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(home)
    environment = os.environ | {"PYTHONPATH": str(home), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", RUN, str(tmp_path)]
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    told = json.loads(ran.stdout.splitlines()[-1])
    assert Path(told["home"]).is_relative_to(home)
    assert {name: code for name, (code, _) in told["codes"].items() if code} == {}, told["codes"]
    assert told["published"] > 10
    assert (tmp_path / "figures" / "convergence.pdf").exists()
    assert "</script>" in (tmp_path / "report.html").read_text(encoding="utf-8")
