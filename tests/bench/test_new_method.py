"""`tsdfm-bench new-method`: names and licences; that the package works is shown by tests/methods/test_tutorial.py."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from tsdfm_bench.cli import app


def new(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["new-method", *arguments])


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("../evil", "cannot name a method"),
        ("/tmp/evil", "cannot name a method"),
        ("a/b", "cannot name a method"),
        ("My Method", "for example 'my-method'"),
        ("my_method", "for example 'my-method'"),
        ("2fast", "for example 'fast'"),
        ("a--b", "for example 'a-b'"),
        ("", "cannot name a method"),
        ("x" * 41, "at most 40"),
        ("class", "'class-method'"),
        ("mdlm", "exists already, in tsdfm-bench"),
    ],
)
def test_names_that_cannot_be(tmp_path: Path, name: str, said: str) -> None:
    result = new("--out", str(tmp_path / "inside"), "--", name)
    assert result.exit_code == 2
    assert said in result.stderr
    assert not list(tmp_path.rglob("*"))


def test_nothing_is_written_over(tmp_path: Path) -> None:
    assert new("demo", "--out", str(tmp_path)).exit_code == 0
    changed = tmp_path / "tsdfm-bench-demo" / "README.md"
    changed.write_text("mine")
    result = new("demo", "--out", str(tmp_path))
    assert result.exit_code == 2
    assert "exists already" in result.stderr
    assert changed.read_text() == "mine"


@pytest.mark.parametrize("licence", ["Apache-2.0", "MIT", "BSD-3-Clause", "none"])
def test_licence_headers(tmp_path: Path, licence: str) -> None:
    assert new("demo", "--out", str(tmp_path), "--licence", licence, "--holder", "Ada").exit_code == 0
    package = tmp_path / "tsdfm-bench-demo"
    project = tomllib.loads((package / "pyproject.toml").read_text())["project"]
    assert project.get("license", "none") == licence
    method = (package / "src" / "tsdfm_bench_demo" / "method.py").read_text()
    assert method.startswith("# SPDX-FileCopyrightText: Ada\n") == (licence != "none")
    assert "@" not in method.replace("@classmethod", "")


def test_an_unknown_licence(tmp_path: Path) -> None:
    result = new("demo", "--out", str(tmp_path), "--licence", "mit")
    assert result.exit_code == 2
    assert "MIT" in result.stderr
