"""Faults one by one: memory, damaged files, half-scored cells, versions, results that no pickle could carry."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tsdfm_bench import scoring
from tsdfm_bench.launch import work as work_module
from tsdfm_bench.launch.worker import work as do_work
from tsdfm_bench.results.files import read_json, write_json
from tsdfm_bench.results.store import read_scores
from tsdfm_bench.rng import Streams

if TYPE_CHECKING:
    from conftest import Here


def mended(here: Here, folder: Path, old: str, new: str, name: str = "mine.py") -> str:
    """A plug-in file: the fakes with one change."""
    source = here.fakes.read_text()
    assert old in source
    path = folder / name
    path.write_text(source.replace(old, new))
    return str(path)


# --------------------------------------------------------------------------------------------------------- memory


def test_a_batch_that_does_not_fit_is_halved_and_draws_the_same(here: Here, tmp_path: Path) -> None:
    """Memory for three sequences: 8 become 4, then 2; tokens are those of the streams, and the row says it."""
    full = 'log(f"sample'
    plugin = mended(
        here, tmp_path, full, f'if request.batch > 3: raise RuntimeError("CUDA out of memory")\n        {full}'
    )
    result = here.run(plugin=plugin)
    assert result.exit_code == 0, result.stderr
    (cell,) = here.cells(kind="method")
    u = Streams.of(0, cell, 24).uniform("token", 0, 12)
    assert np.array_equal(here.tokens(cell), (u * 16).floor().numpy())
    assert "goes on with 4 sequences at a time" in result.stderr
    assert "goes on with 2 sequences at a time" in result.stderr
    samples = [event for event in here.events() if event.startswith("sample")]
    assert samples == [f"sample {first} x2 steps 2" for first in range(0, 24, 2)]  # found once, then remembered
    row = here.summary().query("kind == 'method'").iloc[0]
    assert row["device"] == "cpu (2 of 8 sequences at a time: memory)"
    assert row["calls"] == 2  # a sequence sees as many calls as before
    assert "memory held 2 of 8 sequences at a time" in " ".join(result.stdout.split())
    costs = read_json(here.out.cost_path(cell))["batches"]
    assert isinstance(costs, dict)
    assert [cost["pieces"] for cost in costs.values()] == [4, 4, 4]


def test_texts_that_do_not_fit_are_halved(here: Here, tmp_path: Path) -> None:
    full = 'log(f"score'
    plugin = mended(here, tmp_path, full, f"if len(texts) > 3: raise MemoryError\n        {full}")
    assert here.run(out="whole").exit_code == 0
    here.events()
    assert here.run(plugin=plugin).exit_code == 0
    assert {event for event in here.events() if event.startswith("score")} == {"score 2"}
    (cell,) = here.cells(kind="method")
    whole = read_scores(here.folder / "out" / here.out.scores_path("toy", cell).relative_to(here.out.root))
    assert all(
        np.array_equal(a, b) for a, b in zip(whole.nll, read_scores(here.out.scores_path("toy", cell)).nll, strict=True)
    )


# --------------------------------------------------------------------------------------------------------- damage


def flip(path: Path) -> None:
    """One bit of the content (a quarter in: the middle of an NPZ is a header that says the same twice)."""
    data = bytearray(path.read_bytes())
    data[len(data) // 4] ^= 4
    path.write_bytes(bytes(data))


def cut(path: Path) -> None:
    """The end is missing."""
    path.write_bytes(path.read_bytes()[: -len(path.read_bytes()) // 3])


@pytest.mark.parametrize("damage", [flip, cut])
def test_damaged_files_are_quarantined_made_again_and_reported(here: Here, damage: Callable[[Path], None]) -> None:
    assert here.run().exit_code == 0
    (cell,) = here.cells(kind="method")
    out = here.out
    summary = out.summary_csv_path.read_text()
    scores = [row.tolist() for row in read_scores(out.scores_path("toy", cell)).nll]
    files = [
        out.plan_path,
        out.done_path(cell),
        out.cost_path(cell),
        out.samples_path(cell, 2),
        out.scores_path("toy", cell),
        out.measurement_path("letters", cell),
        out.summary_path,
    ]
    tokens = here.tokens(cell)
    for path in files:
        damage(path)
    result = here.run()
    assert result.exit_code == 0, result.stderr
    assert set(out.quarantined()) == {"__".join(path.relative_to(out.root).parts) for path in files}
    for path in files:
        assert f"{path.relative_to(out.root)} is damaged (" in result.stderr
        assert path.exists()
    assert np.array_equal(here.tokens(cell), tokens)
    assert [row.tolist() for row in read_scores(out.scores_path("toy", cell)).nll] == scores
    now = out.summary_csv_path.read_text()
    assert [line.split(",")[:20] for line in now.splitlines()] == [
        line.split(",")[:20] for line in summary.splitlines()
    ]
    costs = read_json(out.cost_path(cell))["batches"]
    assert isinstance(costs, dict)
    assert list(costs) == ["0", "1", "2"]  # lost costs can only be had by sampling again
    here.events()
    assert here.run().exit_code == 0
    assert here.events() == []


def test_a_damaged_cell_file_is_replaced_when_its_cell_is_worked_on(here: Here) -> None:
    here.run(samples="8")
    (cell,) = here.cells(kind="method")
    flip(here.out.cell_path(cell))
    result = here.run(samples="16")
    assert result.exit_code == 0
    assert "cell.json is damaged" in result.stderr
    assert read_json(here.out.cell_path(cell))["batches"] == 2


def test_a_batch_that_is_damaged_while_it_is_partial_is_made_again(here: Here) -> None:
    """Samples that turn out to be damaged only when they are scored."""
    here.run(samples="16")
    (cell,) = here.cells(kind="method")
    flip(here.out.samples_path(cell, 0))
    here.out.scores_path("toy", cell).unlink()
    assert here.run().exit_code == 0
    u = Streams.of(0, cell, 24).uniform("token", 0, 12)
    assert np.array_equal(here.tokens(cell), (u * 16).floor().numpy())


# -------------------------------------------------------------------------------------------------------- scoring


def test_scoring_goes_on_at_the_last_chunk(here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "SAVE_EVERY_S", -1.0)
    monkeypatch.setattr(scoring, "CPU_TEXTS", 4)
    stop = 'log(f"score {len(texts)}")'
    plugin = mended(
        here,
        tmp_path,
        stop,
        f"{stop}\n        Toy.n = getattr(Toy, 'n', 0) + 1\n        if Toy.n == 4: raise KeyboardInterrupt",
    )
    assert here.run(plugin=plugin).exit_code == 130
    assert here.events().count("score 4") == 4  # three chunks of four texts are stored
    assert here.run().exit_code == 0
    assert here.events().count("score 4") == 4 * 24 // 4 - 3


# ------------------------------------------------------------------------------------------------------ job files


def job_file(here: Here, methods: str = "counter", **settings: Any) -> Path:
    """The job file of a planned sweep."""
    from tsdfm_bench.config import make_config
    from tsdfm_bench.launch.orders import sample_pieces, sample_works
    from tsdfm_bench.sweep import freeze, make_job, prepare

    given = {
        "plugins": [here.fakes],
        "task": "tiny",
        "methods": methods,
        "steps": "2",
        "scorers": "toy",
        "metrics": "letters",
        "samples": 24,
        "batch_size": 8,
        "out": here.out.root,
        "threads": 1,
    }
    sweep = prepare(make_config(given))
    job = make_job(sweep)
    freeze(sweep, job)
    launch = work_module.Launch.new(here.out.jobs_folder, "test")
    (path,) = launch.write(sample_works(sweep, job, [sample_pieces(sweep, job)]))
    return path


def test_a_job_file_is_all_a_worker_needs(here: Here) -> None:
    path = job_file(here)
    assert "pickle" not in path.read_text()
    result = do_work(str(path))
    assert result == {**result, "state": "done", "units": 4, "done": 4, "failed": {}, "busy": [], "error": ""}
    assert json.loads(json.dumps(result)) == result
    assert read_json(work_module.result_path(path)) == result
    (cell,) = here.cells(kind="method")
    assert here.out.completed_batches(cell) == [0, 1, 2]
    here.events()
    assert do_work(str(path))["state"] == "done"  # twice is once
    assert not [event for event in here.events() if event.startswith("sample")]


@pytest.mark.parametrize("package", ["tsdfm-bench", "python", "torch"])
def test_a_worker_of_another_version_refuses_and_names_both(here: Here, package: str) -> None:
    path = job_file(here)
    content = dict(read_json(path))
    there = dict(content["versions"])  # type: ignore[call-overload]
    mine, there[package] = there[package], "0.0.7"
    write_json(path, {**content, "versions": there})
    result = do_work(str(path))
    assert result["state"] == "refused"
    assert f"submitted with {package} 0.0.7, but this worker has {package} {mine}" in result["error"]
    assert not here.out.cells()


def test_a_job_of_another_format_or_a_damaged_one_is_an_error_and_no_work(here: Here) -> None:
    path = job_file(here)
    content = dict(read_json(path))
    write_json(path, {**content, "format": 99})
    assert "format 99" in do_work(str(path))["error"]
    flip(path)
    result = do_work(str(path))
    assert result["state"] == "error"
    assert "damaged" in result["error"] or "no checksum" in result["error"]
    assert not here.out.cells()


def test_weights_that_changed_after_the_submission_are_a_failure_of_their_cell(here: Here) -> None:
    weights = here.folder / "w.bin"
    weights.write_bytes(b"one")
    path = job_file(here, f"counter[checkpoint={weights}],stepless")
    weights.write_bytes(b"two")
    result = do_work(str(path))
    assert result["state"] == "failed"
    assert result["done"] == 4
    assert ["weights of counter" in reason for reason in result["failed"].values()] == [True]


def test_an_exception_that_no_pickle_could_carry_is_text(here: Here, tmp_path: Path) -> None:
    plugin = tmp_path / "mine.py"
    source = here.fakes.read_text().replace(
        'raise RuntimeError("boom in sample")',
        'error = RuntimeError("boom"); error.lock = __import__("threading").Lock(); error.f = lambda: 1; raise error',
    )
    plugin.write_text(source)
    here.fakes = plugin
    result = do_work(str(job_file(here, "counter[spoil=raise],stepless")))
    assert result["state"] == "failed"
    assert result["done"] == 4
    assert ["RuntimeError: boom" in reason for reason in result["failed"].values()] == [True]
    assert json.loads(json.dumps(result)) == result
