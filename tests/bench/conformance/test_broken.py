"""Each deliberately broken plug-in fails the check meant for it and no other; the unbroken one passes them all."""

from __future__ import annotations

import runpy
from collections.abc import Sequence
from pathlib import Path

import pytest

from tsdfm_bench.conformance import Report, Target, conform, streams
from tsdfm_bench.conformance.catalogue import check_ids

FILE = Path(__file__).parent / "broken.py"
NAMES = [name for name in runpy.run_path(str(FILE))["METHODS"] if name != "good"]
OUTSIDE = ("runs-dies", "runs-hangs")  # they would take the test process down
SLOW = ("law", "draw", "cost")  # seconds each; run for the unbroken one, and where they are meant to fail


def report_of(name: str, only: Sequence[str] | None) -> Report:
    isolated = name in OUTSIDE
    return conform(Target(name, files=(str(FILE),)), only, limit_s=12.0, isolated=isolated)


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BROKEN_FOLDER", str(tmp_path))


def test_the_unbroken_one_passes() -> None:
    report = report_of("good", None)
    assert {row.check: row.seen for row in report.rows if row.verdict != "pass"} == {}


@pytest.mark.parametrize("name", NAMES)
def test_one_fault_one_failure(name: str) -> None:
    meant = name.split("-")[0]
    report = report_of(name, [check for check in check_ids() if check not in SLOW or check == meant])
    assert report.failed == [meant], {row.check: row.seen for row in report.rows if row.verdict == "fail"}


def test_only_exact_predictions_show_a_fault_as_small_as_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """One sequence of eight: the comparison with a network spares it, the one without a network does not."""
    (found,) = (row for row in report_of("repeatable-one", ["repeatable"]).rows if row.check == "repeatable")
    assert "with exact predictions in place of the network" in found.seen
    monkeypatch.setattr(streams, "strictly_repeatable", lambda subject: "")
    assert report_of("repeatable-one", ["repeatable"]).passed


def test_every_check_has_a_fault_of_its_own() -> None:
    assert {name.split("-")[0] for name in NAMES} == set(check_ids())
