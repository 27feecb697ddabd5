"""The package list of pyproject.toml is the folders' own, and nothing of ours is importable under a bare name."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from importlib.metadata import entry_points
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
FOLDERS = {"bench": "tsdfm_bench"} | {f: f"tsdfm_bench.{f}" for f in ("methods", "tasks", "results", "paper_figures")}


def test_package_list_matches_the_folders() -> None:
    found = set()
    for folder, name in FOLDERS.items():
        for marker in (ROOT / folder).rglob("__init__.py"):
            parts = marker.parent.relative_to(ROOT / folder).parts
            found.add(".".join((name, *parts)))
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == found


def test_top_level_folders_are_the_agreed_ones() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    folders = {line.split("/")[0] for line in tracked.stdout.splitlines() if "/" in line}
    assert folders <= {"bench", "methods", "tasks", "results", "tests", "paper_figures", ".ci", ".github"}


@pytest.mark.parametrize("name", ["bench", "methods", "tasks", "results", "paper_figures"])
def test_bare_folder_names_are_not_importable(name: str, tmp_path: Path) -> None:
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec('{name}') is not None)"
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=False).returncode == 0


@pytest.mark.parametrize("kind", ["methods", "tasks", "scorers", "metrics", "figures"])
def test_every_entry_point_loads(kind: str) -> None:
    ours = [e for e in entry_points(group=f"tsdfm_bench.{kind}") if e.dist is not None and e.dist.name == "tsdfm-bench"]
    declared = PROJECT["project"]["entry-points"][f"tsdfm_bench.{kind}"]
    assert {e.name for e in ours} == set(declared)
    for entry in ours:
        assert entry.load() is not None
