"""Every example keeps the contract, imports only what a plug-in may, and is a package of its own."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

import pytest

from tsdfm_bench.conformance import Target, conform
from tsdfm_bench.conformance.catalogue import check_ids

HERE = Path(__file__).parent
EXAMPLES = sorted(path.parent.name for path in HERE.glob("*/pyproject.toml"))
PUBLIC = {"tsdfm_bench.api", "tsdfm_bench.rng", "tsdfm_bench.errors", "tsdfm_bench.methods.toolkit"}
# one setting each: the others are the business of the examples' own tests
SETTING = {"remdm": {"strategy": "conf"}, "edlm": {}, "duo": {"tail": "greedy"}}
SAMPLED = ("law", "draw", "repeatable", "cost")  # the laws are enumerated in the examples' own tests


def module_of(example: str) -> Path:
    return HERE / example / f"tsdfm_bench_{example}.py"


def test_the_four_are_there() -> None:
    assert EXAMPLES == ["duo", "edlm", "generate", "remdm"]


@pytest.mark.parametrize("example", EXAMPLES)
def test_they_use_the_public_contract_alone(example: str) -> None:
    imported = set()
    for node in ast.walk(ast.parse(module_of(example).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            imported.add(node.module)
        elif isinstance(node, ast.Import):
            imported.update(alias.name for alias in node.names)
    assert {name for name in imported if name.startswith("tsdfm_bench")} <= PUBLIC


@pytest.mark.parametrize("example", EXAMPLES)
def test_they_are_packages_with_an_entry_point(example: str) -> None:
    project = tomllib.loads((HERE / example / "pyproject.toml").read_text(encoding="utf-8"))
    (point,) = project["project"]["entry-points"]["tsdfm_bench.methods"].values()
    module, _, name = point.partition(":")
    assert project["tool"]["setuptools"]["py-modules"] == [module]
    assert f"class {name}" in module_of(example).read_text(encoding="utf-8")


@pytest.mark.parametrize("example", list(SETTING))
def test_they_keep_the_contract(example: str) -> None:
    quick = [check for check in check_ids() if check not in SAMPLED]
    report = conform(Target(example, "", SETTING[example], (str(module_of(example)),)), quick, isolated=False)
    assert {row.check: row.seen for row in report.rows if row.verdict == "fail"} == {}
    assert {row.check for row in report.rows if row.verdict == "skipped"} == set()
