"""What a remembered failure depends on: a plug-in whose code has changed is tried again, under the same version too."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tsdfm_bench.api import MetricInfo
from tsdfm_bench.job import Job
from tsdfm_bench.launch.failures import read_failure, score_failure_path
from tsdfm_bench.measuring import find_gauges
from tsdfm_bench.registry import Entry
from tsdfm_bench.results.store import CorruptFile, RunFolder, read_json
from tsdfm_bench.spec import Spec


def mark(entry: Entry) -> str:
    asked = SimpleNamespace(entry=lambda kind, name: entry)
    job = Job(None, asked, None, 1, 1, "cpu", 1)  # type: ignore[arg-type]
    return job.mark("methods", entry.name)


def installed(target: str) -> Entry:
    return Entry("methods", "mine", target, "tsdfm-bench-mine", "0.1.0")


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package in editable form, as far as Python can tell."""
    folder = tmp_path / "marked_package"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    (folder / "method.py").write_text("a = 1")
    monkeypatch.syspath_prepend(tmp_path)
    return folder


@pytest.mark.parametrize("changed", ["method.py", "helper.py"])
def test_a_changed_package_is_tried_again(package: Path, changed: str) -> None:
    entry = installed("marked_package.method:Mine")
    before = mark(entry)
    assert mark(entry) == before
    (package / changed).write_text("a = 2")
    assert mark(entry) != before
    assert "marked_package" not in sys.modules


def test_a_changed_module_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "marked_module.py"
    file.write_text("a = 1")
    monkeypatch.syspath_prepend(tmp_path)
    before = mark(installed("marked_module:Mine"))
    file.write_text("a = 2")
    assert mark(installed("marked_module:Mine")) != before


def test_a_changed_file_is_tried_again(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("a = 1")
    entry = Entry("methods", "mine", str(file), "mine.py", "")
    before = mark(entry)
    file.write_text("a = 2")
    assert mark(entry) != before


class Letters:
    """A metric, as far as measurements are kept for it."""

    info = MetricInfo("mine", "none")

    @classmethod
    def load(cls, params: Mapping[str, object]) -> Letters:
        return cls()


def test_a_metric_whose_helper_has_changed_measures_again(package: Path) -> None:
    entry = Entry("metrics", "mine", "marked_package.metric:Mine", "tsdfm-bench-mine", "0.1.0")
    registry = SimpleNamespace(entry=lambda kind, name: entry, load=lambda kind, name: Letters)

    def code() -> str:
        (gauge,) = find_gauges([Spec("mine")], registry)  # type: ignore[arg-type]
        assert not gauge.broken
        return gauge.code

    before = code()
    assert code() == before
    (package / "helper.py").write_text("a = 2")
    assert code() != before


@pytest.mark.parametrize("target", ["no_such_module_at_all:Mine", "", "a/b:c"])
def test_code_that_cannot_be_found_is_no_error(target: str) -> None:
    assert mark(installed(target)) == mark(installed(target))


def test_what_another_process_deletes_between_two_looks_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "exists", lambda path: True)  # the first look
    entry = installed("marked_module:Mine")
    asked = SimpleNamespace(entry=lambda kind, name: entry)
    job = Job(RunFolder(tmp_path), asked, None, 1, 1, "cpu", 1)  # type: ignore[arg-type]
    cell: Any = SimpleNamespace(id="abcd", kind="method", method="mine")
    assert not job.remembers_failure(cell)
    assert job.refusal(cell) == ""
    assert read_failure(score_failure_path(job.folder, "toy", cell.id)) == {}
    damage = CorruptFile.of(tmp_path / "lost.json", "cut")
    assert job.folder.quarantine(damage, read_json) == ""
