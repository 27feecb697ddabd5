"""The run folder: state follows from which files exist."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tsdfm_bench.results.files import CorruptFile, StoreError, UnsafeName, read_json, write_json
from tsdfm_bench.results.store import PlanConflict, RunFolder, plan_hash, read_samples, write_samples


def _batch(run: RunFolder, cell: str, batch: int) -> None:
    write_samples(run.samples_path(cell, batch), np.zeros((2, 4), int), np.array([4, 4]))


def test_a_plan_is_written_once(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    plan = {"methods": ["mdlm"], "steps": [8, 1024], "temperature": 1.0}
    first = run.freeze(plan)
    assert run.freeze({**plan, "temperature": 1}) == first == plan_hash(plan)
    assert RunFolder(tmp_path / "run").read_plan() == plan
    with pytest.raises(PlanConflict) as caught:
        run.freeze({**plan, "steps": [8], "seed": 1})
    message = str(caught.value)
    assert first in message
    assert plan_hash({**plan, "steps": [8], "seed": 1}) in message
    assert "they differ in seed, steps" in message
    assert "--out" in message
    assert run.read_plan() == plan


def test_some_fields_of_a_plan_may_grow(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    first = run.freeze({"methods": ["ar"], "samples": 128}, extendable=["samples"])
    assert run.freeze({"methods": ["ar"], "samples": 256}, extendable=["samples"]) == first
    assert run.read_plan()["samples"] == 256
    with pytest.raises(PlanConflict, match="they differ in methods"):
        run.freeze({"methods": ["sedd"], "samples": 256}, extendable=["samples"])


def _freeze(root: str, seed: int, queue: multiprocessing.Queue) -> None:
    try:
        RunFolder(root).freeze({"seed": seed})
        queue.put("written")
    except PlanConflict:
        queue.put("refused")


def test_two_processes_with_two_plans_cannot_both_win(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    workers = [context.Process(target=_freeze, args=(str(tmp_path), seed, queue)) for seed in range(4)]
    for worker in workers:
        worker.start()
    outcomes = sorted(queue.get(timeout=60) for _ in workers)
    for worker in workers:
        worker.join()
    assert outcomes == ["refused"] * 3 + ["written"]


def test_not_a_run_folder_and_a_damaged_plan(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    with pytest.raises(StoreError, match="not a run folder"):
        run.read_plan()
    run.freeze({"a": 1})
    run.plan_path.write_text(run.plan_path.read_text().replace("1", "2", 1))
    with pytest.raises(CorruptFile):
        run.freeze({"a": 1})


@pytest.mark.parametrize("name", ["../../etc", "a/b", "..", "", "/x"])
def test_no_cell_leaves_the_folder(tmp_path: Path, name: str) -> None:
    run = RunFolder(tmp_path)
    for path in (run.cell_folder, run.done_path, run.state, run.completed_batches, lambda c: run.scores_path("x", c)):
        with pytest.raises(UnsafeName):
            path(name)
    assert run.scores_path(name, "abc").is_relative_to(tmp_path / "scores")
    assert run.scores_path(name, "abc").parent.parent.parent == tmp_path / "scores"


def test_the_life_of_a_cell(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert run.cells() == []
    assert run.state("abc").state == "missing"
    assert run.completed_batches("abc") == []
    run.write_cell("abc", {"method": "ar", "batches": 3})
    assert str(run.state("abc")) == "missing"
    for batch in (0, 2):
        _batch(run, "abc", batch)
    (run.cell_folder("abc") / ".samples-0001.npz.1.ab.tmp").write_bytes(b"half")
    state = run.state("abc")
    assert (state.state, state.completed, state.batches) == ("partial", 2, 3)
    assert str(state) == "partial (2 of 3 batches)"
    assert run.completed_batches("abc") == [0, 2]
    run.write_error("abc", "Traceback ...\n\n  line 1\nValueError: no\n\n")
    state = run.state("abc")
    assert (state.state, state.error) == ("failed", "Traceback ...\n  line 1\nValueError: no")
    assert run.read_error("abc", lines=1) == "ValueError: no"
    _batch(run, "abc", 1)
    run.write_done("abc", {"batches": 3})
    assert run.state("abc").state == "done"
    assert run.read_error("abc") == ""
    assert run.state("abc", batches=4).state == "partial"
    assert run.state("abc", batches=2).state == "done"
    assert run.cells() == ["abc"]


def test_a_damaged_cell_file_does_not_break_a_listing(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.write_cell("a", {"batches": 2})
    run.write_cell("b", {"batches": 2})
    run.cell_path("a").write_text("{")
    assert {cell: state.batches for cell, state in run.states().items()} == {"a": None, "b": 2}


def test_damaged_batches_can_be_left_out(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for batch in range(3):
        _batch(run, "c", batch)
    run.samples_path("c", 1).write_bytes(b"broken")
    assert run.completed_batches("c") == [0, 1, 2]
    assert run.completed_batches("c", verify=True) == [0, 2]


def test_scored_cells(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert run.scored("hf:org/model") == set()
    for cell in ("a1", "b2"):
        path = run.scores_path("hf:org/model", cell)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    (path.parent / ".c3.parquet.9.ff.tmp").write_bytes(b"")
    assert run.scored("hf:org/model") == {"a1", "b2"}


def test_a_thousand_cells_are_listed_by_name_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Listing is one scan per folder: no batch and no done.json is opened; no folder holds more than 256 entries."""
    run = RunFolder(tmp_path)
    for i in range(1000):
        folder = run.cell_folder(f"{i % 256:02x}{i:014x}")
        folder.mkdir(parents=True)
        for batch in range(1 + i % 3):
            (folder / f"samples-{batch:04d}.npz").touch()
        if i % 3 == 2:
            (folder / "done.json").touch()
    opened: list[str] = []
    scans: list[str] = []
    real_open, real_scandir = os.open, os.scandir

    def watched_open(path: str, *args: Any, **kwargs: Any) -> int:
        opened.append(str(path))
        return real_open(path, *args, **kwargs)

    def watched_scandir(path: str) -> Any:
        scans.append(str(path))
        return real_scandir(path)

    monkeypatch.setattr(os, "open", watched_open)
    monkeypatch.setattr(os, "scandir", watched_scandir)
    states = run.states(batches=3)
    assert len(states) == 1000
    assert sum(s.state == "done" for s in states.values()) == 333
    assert sum(s.state == "partial" for s in states.values()) == 667
    assert len(scans) == 1 + 256 + 1000
    assert opened == []
    assert max(len(list(folder.iterdir())) for folder in [tmp_path / "cells", *(tmp_path / "cells").iterdir()]) <= 256
    mixed = run.states(list(states)[:2], batches={next(iter(states)): 1})
    assert [s.batches for s in mixed.values()] == [1, None]


def test_a_folder_of_the_older_layout_is_read_and_continued_as_it_is(tmp_path: Path) -> None:
    old = RunFolder(tmp_path)
    for cell in ("00aa", "00bb"):
        (tmp_path / "cells" / cell).mkdir(parents=True)
        (tmp_path / "cells" / cell / "samples-0000.npz").touch()
    (tmp_path / "scores" / "toy").mkdir(parents=True)
    (tmp_path / "scores" / "toy" / "00aa.parquet").touch()
    assert old.cells() == ["00aa", "00bb"]
    assert old.scored("toy") == {"00aa"}
    _batch(old, "00cc", 0)
    assert (tmp_path / "cells" / "00cc" / "samples-0000.npz").is_file()
    assert RunFolder(tmp_path).completed_batches("00cc") == [0]


def test_a_damaged_file_moves_to_quarantine_with_its_reason(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for _ in range(2):
        _batch(run, "abcd", 0)
        path = run.samples_path("abcd", 0)
        path.write_bytes(path.read_bytes()[:-7])
        with pytest.raises(CorruptFile) as caught:
            read_samples(path)
        said = run.quarantine(caught.value, read_samples)
        assert said.startswith("cells/ab/abcd/samples-0000.npz is damaged (")
        assert run.completed_batches("abcd") == []
    kept = run.quarantined()
    assert list(kept) == ["cells__ab__abcd__samples-0000.npz", "cells__ab__abcd__samples-0000.npz.1"]
    assert all("not a complete NPZ file" in reason for reason in kept.values())


def test_a_file_that_was_replaced_meanwhile_is_not_moved(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    _batch(run, "abcd", 0)
    assert run.quarantine(CorruptFile.of(run.samples_path("abcd", 0), "it was"), read_samples) == ""
    assert run.quarantine(CorruptFile.of(run.samples_path("abcd", 1), "it was"), read_samples) == ""
    outside = tmp_path.parent / "elsewhere.json"
    outside.write_text("{")
    with pytest.raises(CorruptFile):
        run.quarantine(CorruptFile.of(outside, "it lies elsewhere"))
    assert outside.exists()


def test_paths_of_the_whole_run(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert {p.name for p in (run.tables_folder, run.figures_folder, run.jobs_folder)} == {"tables", "figures", "jobs"}
    assert run.summary_path.name == "summary.parquet"
    assert run.features_path("smollm2", "a").name == "a.npz"
    with pytest.raises(ValueError):
        run.samples_path("a", -1)
    assert run.samples_path("a", 12345).name == "samples-12345.npz"
    _batch(run, "a", 12345)
    assert run.completed_batches("a") == [12345]
    write_json(run.cost_path("a"), {"seconds": 1.5})
    assert read_json(run.cost_path("a")) == {"seconds": 1.5}
