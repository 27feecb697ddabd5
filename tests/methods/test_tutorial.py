"""methods/README.md is the tutorial: its files are written and its commands typed, in the order of the page."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tsdfm_bench.cli import app
from tsdfm_bench.results.schema import read_summary

ROOT = Path(__file__).parent.parent.parent
README = (ROOT / "methods" / "README.md").read_text(encoding="utf-8")
SECTIONS = {part.splitlines()[0]: part for part in README.split("\n## ")[1:]}
# A name in backquotes and a colon, then a fenced block: a file. Four spaces: a command.
PIECE = re.compile(
    r"`(?P<file>[\w.]+)`[^`]*:\n\n```\w+\n(?P<text>[\s\S]*?)```|^    (?P<command>\S.*)$",
    re.MULTILINE,
)
PIP = ["--no-deps", "--no-build-isolation", "--no-index", "-q"]  # what this environment has already


@dataclass
class Shell:
    """An empty folder with the program, pip and pytest, and a place for what is installed."""

    folder: Path
    patch: pytest.MonkeyPatch

    @property
    def site(self) -> Path:
        return self.folder.parent / "site"

    def type(self, command: str) -> str:
        """What a command prints; it must succeed."""
        program, *words = shlex.split(command)
        if "hf:" in command:
            return self.type_without_network(words)
        if program == "tsdfm-bench":
            done = CliRunner().invoke(app, words, catch_exceptions=False)
            assert done.exit_code == 0, f"{command}\n{done.output}"
            return str(done.output)
        assert program in ("pip", "pytest"), command
        options = [words[0], *PIP, "--target", str(self.site), *words[1:]] if program == "pip" else words
        finished = subprocess.run(
            [sys.executable, "-m", program, *options], capture_output=True, text=True, check=False, timeout=900
        )
        assert finished.returncode == 0, f"{command}\n{finished.stdout}{finished.stderr}"
        if program == "pip":
            self.find_installed()
        return finished.stdout

    def type_without_network(self, words: list[str]) -> str:
        """A command that needs the hub: everything in it is known, and the network alone is missing."""
        with self.patch.context() as patch:
            patch.setenv("TSDFM_BENCH_OFFLINE", "1")
            patch.setenv("TSDFM_BENCH_CACHE", str(self.folder / "nothing"))
            done = CliRunner().invoke(app, words, catch_exceptions=False)
        assert done.exit_code in (1, 2), done.output
        assert "TSDFM_BENCH_OFFLINE is set" in done.output
        return f"{shlex.join(words)}\n{done.output}"

    def find_installed(self) -> None:
        """Make what is installed importable here and in processes started from here."""
        linked = [line for file in self.site.glob("*.pth") for line in file.read_text().splitlines()]
        paths = [str(self.site), *linked]
        self.patch.setenv("PYTHONPATH", os.pathsep.join(paths))
        for path in reversed(paths):
            self.patch.syspath_prepend(path)


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shell]:
    folder = tmp_path / "empty"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.delenv("TSDFM_BENCH_PLUGINS")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("COLUMNS", "160")
    before = set(sys.modules)
    yield Shell(folder, monkeypatch)
    for name in set(sys.modules) - before:
        if name.startswith("tsdfm_bench_"):
            del sys.modules[name]


def checkout(shell: Shell) -> None:
    """The examples where a checkout has them, without what only tests need."""
    leave_out = shutil.ignore_patterns("test_*", "conftest.py", "__pycache__", "build", "*.egg-info")
    shutil.copytree(ROOT / "tests" / "plugins", shell.folder / "tests" / "plugins", ignore=leave_out)


def commands(text: str) -> list[str]:
    return [piece["command"] for piece in PIECE.finditer(text) if piece["command"]]


@pytest.mark.parametrize("section", [name for name, text in SECTIONS.items() if commands(text)])
def test_every_command_works_as_typed(shell: Shell, section: str) -> None:
    if "In a checkout" in SECTIONS[section]:
        checkout(shell)
    for piece in PIECE.finditer(SECTIONS[section]):
        if piece["file"]:
            (shell.folder / piece["file"]).write_text(piece["text"], encoding="utf-8")
            continue
        command = piece["command"]
        printed = shell.type(command)
        if " run " in command:
            for method in named(command):
                assert method in printed, f"{command}\n{printed}"
        if "--metrics length" in command:
            counted = read_summary(shell.folder / "counted").query("metric == 'length' and method == 'ar'")
            assert list(counted["value"]) == list(counted["low"]) == [64.0]
        if " conform " in command:
            assert "0 failed" in printed
        if command.startswith("pytest"):
            assert " passed" in printed
        SAID.setdefault(section, {})[command] = printed


SAID: dict[str, dict[str, str]] = {}


def named(command: str) -> list[str]:
    """Methods that a run asks for, without options."""
    words = shlex.split(command)
    listed = words[words.index("--methods") + 1]
    return re.sub(r"\[[^\]]*\]", "", listed).split(",")


def test_what_the_tutorial_says_of_its_commands() -> None:
    """After the commands: the reason of ar, a law that is proven, and excess that falls."""
    tutorial = SAID.get("From an empty folder to a row in the table")
    if tutorial is None:
        pytest.skip("needs the test before it")
    (infilled,) = (printed for command, printed in tutorial.items() if "--infill" in command)
    assert "from left to right" in infilled
    assert "total variation to the true law" in " ".join(tutorial["tsdfm-bench conform demo"].split())
    (exact,) = (printed for command, printed in tutorial.items() if "oracle" in command)
    excess = [float(value) for value in re.findall(r"^ demo .*?([\d.]+)±", exact, re.MULTILINE)]
    assert len(excess) == 3
    assert excess[0] > 2 * excess[1] > 4 * excess[2]


def test_every_name_of_the_page_exists() -> None:
    """Files of this folder in the first table, and what the toolkit is said to have."""
    from tsdfm_bench.methods import toolkit

    first = README.split("\n## ")[0]
    for name in re.findall(r"`([\w]+\.py)`", first):
        assert (ROOT / "methods" / name).is_file(), name
    table = SECTIONS["The toolkit"].split("Four packages")[0]
    for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE):
        for name in re.findall(r"`(\w+)`", row):
            assert hasattr(toolkit, name), name


def test_every_file_of_the_page_is_used() -> None:
    fenced = README.count("\n```") // 2
    files = [piece["file"] for part in SECTIONS.values() for piece in PIECE.finditer(part) if piece["file"]]
    assert len(files) == fenced
