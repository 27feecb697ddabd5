"""Ten thousand cells: planned and packed without opening a file for each, in folders that stay small."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tsdfm_bench import launch as launchers
from tsdfm_bench.commands.state import report_cells
from tsdfm_bench.config import make_config
from tsdfm_bench.job import Job
from tsdfm_bench.launch.leases import Leases
from tsdfm_bench.launch.orders import sample_pieces, sample_works, score_pieces, score_works, unit_names
from tsdfm_bench.launch.settings import LauncherSettings
from tsdfm_bench.launch.work import JOBS_PER_FOLDER, Launch, Work, pack, read_work, result_path
from tsdfm_bench.sweep import Sweep, freeze, make_job, plan_json, prepare

if TYPE_CHECKING:
    from conftest import Here

SIDE = 100  # SIDE x SIDE cells
MOST_ENTRIES = 4 * JOBS_PER_FOLDER  # of any folder: a job has at most four files


def planned(here: Here, side: int, **more: Any) -> tuple[Sweep, Job]:
    """A sweep of side x side cells over the fakes, and its job."""
    given = {
        "plugins": [here.fakes],
        "task": "tiny",
        "methods": "counter",
        "steps": list(range(14, 14 + side)),
        "temperatures": [round(0.01 * (k + 1), 2) for k in range(side)],
        "scorers": "toy",
        "metrics": "letters",
        "samples": 16,
        "batch_size": 8,
        "out": here.out.root,
        "threads": 1,
        **more,
    }
    sweep = prepare(make_config(given))
    return sweep, make_job(sweep)


class Touched:
    """Counts what is listed and opened."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.counts: Counter[str] = Counter()
        for name in ("scandir", "open"):
            real = getattr(os, name)

            def counting(path: Any = ".", *args: Any, real: Any = real, name: str = name, **kwargs: Any) -> Any:
                self.counts[name] += 1
                return real(path, *args, **kwargs)

            patch.setattr(os, name, counting)


def largest_folder(top: Path) -> int:
    """The most entries that any folder below has."""
    return max(len(names) + len(files) for _, names, files in os.walk(top))


def test_ten_thousand_cells_are_planned_packed_and_reported(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep, job = planned(here, SIDE)
    freeze(sweep, job)
    with monkeypatch.context() as patch:
        touched = Touched(patch)
        pieces = sample_pieces(sweep, job)
        assert len(pieces) == SIDE * SIDE + 3
        assert touched.counts["open"] == 0
        assert touched.counts["scandir"] <= 2 * len(pieces) + 10  # a folder of a cell is looked at once or twice

    total = sum(piece.weight for piece in pieces)
    works = sample_works(sweep, job, pack(pieces, total / 1000))
    assert 900 <= len(works) <= 1200
    names = [name for work in works for name in unit_names(work)]
    assert len(names) == len(set(names)) == len(pieces)
    heaviest = max(piece.weight for piece in pieces)
    assert max(work.weight for work in works) <= max(heaviest, total / 1000)

    scores = score_works(sweep, job, sweep.judges[0], pack(score_pieces(sweep, job, sweep.judges[0]), 2000.0), works)
    makers = {name: work.name for work in works for name in unit_names(work)}
    for work in scores:
        assert set(work.needs) == {makers[str(unit["id"])] for unit in work.units}

    launch = Launch.new(here.out.jobs_folder, "stub")
    files = launch.write(works)
    assert largest_folder(here.out.root) <= MOST_ENTRIES
    assert read_work(files[-1]).units == list(works[-1].units)

    for planned_cell in sweep.plan.cells[:2000]:  # as if these were under way
        folder = here.out.cell_folder(planned_cell.cell.id)
        folder.mkdir(parents=True)
        (folder / "samples-0000.npz").touch()
    assert largest_folder(here.out.root / "cells") <= 256
    with monkeypatch.context() as patch:
        touched = Touched(patch)
        reports = report_cells(plan_json(sweep), here.out)
        assert {report.state for report in reports} == {"partial", "missing"}
        assert touched.counts["scandir"] <= len(reports) + 10
        assert touched.counts["open"] == 0


def test_a_thousand_cells_are_looked_at_without_opening_them(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep, job = planned(here, 32)
    freeze(sweep, job)
    for planned_cell in sweep.plan.cells:
        folder = here.out.cell_folder(planned_cell.cell.id)
        folder.mkdir(parents=True)
        for batch in range(2):
            (folder / f"samples-{batch:04d}.npz").touch()
        (folder / "done.json").touch()
    taken = [Leases(here.out.leases_folder, 60.0, beat=False).take(p.cell.id) for p in sweep.plan.cells[:3]]
    assert len(taken) == 3
    with monkeypatch.context() as patch:
        touched = Touched(patch)
        assert here.cli("status", "out").exit_code == 0
        assert touched.counts["scandir"] <= len(sweep.plan.cells) + 20
        assert touched.counts["open"] <= 10  # the plan and who works: not one file a cell


class Stub:
    """A launcher that does a few jobs a round, like a queue: half of them end with every look."""

    name = "stub"
    chunks: list[int] = []  # noqa: RUF012 - what the test looks at
    looks = 0

    def __init__(self, settings: LauncherSettings) -> None:
        self.settings = settings

    def sweep(self, sweep: Sweep, job: Job, reporter: Any) -> None:
        """Sample in two chunks through job files; scoring is done here."""
        from tsdfm_bench.launch.inline import Inline
        from tsdfm_bench.launch.worker import work as do

        pieces = sample_pieces(sweep, job)
        works = sample_works(sweep, job, pack(pieces, 6.0))
        launch = Launch.new(sweep.folder.jobs_folder, self.name)
        files = launch.write(works)
        for chunk in (files[: len(files) // 2], files[len(files) // 2 :]):
            Stub.chunks.append(len(chunk))
            waiting: Sequence[Path] = chunk
            while waiting:
                for file in waiting[: len(waiting) // 2 + 1]:
                    assert do(str(file))["state"] == "done"
                Stub.looks += 1
                waiting = [file for file in waiting if not result_path(file).exists()]
        Inline(self.settings).sweep(sweep, job, reporter)

    def train(self, works: Sequence[Work], folder: Path, reporter: Any) -> list[dict[str, Any]]:
        """Not asked for."""
        raise AssertionError


def test_a_launcher_of_job_files_gives_what_inline_gives(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(launchers.LAUNCHERS, "stub", f"{__name__}:Stub")
    monkeypatch.setattr("tsdfm_bench.launch.import_module", lambda name: __import__("sys").modules[name])
    given = {"steps": "2,3,4,5", "temperatures": "1,0.5", "samples": "16"}
    assert here.run(out="whole", **given).exit_code == 0
    result = here.run("--launcher", "stub", **given)
    assert result.exit_code == 0, result.stderr
    assert len(Stub.chunks) == 2
    assert sum(Stub.chunks) >= 4
    whole = here.folder / "whole"
    for path in sorted(whole.rglob("*.npz")):
        assert (here.out.root / path.relative_to(whole)).read_bytes() == path.read_bytes()
