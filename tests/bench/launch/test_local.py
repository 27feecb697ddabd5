"""The launcher `local`: the same bits as `inline`, whoever dies, whoever else is at it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import pytest

from tsdfm_bench.config import make_config
from tsdfm_bench.errors import UsageError
from tsdfm_bench.launch import LAUNCHERS, find_launcher, local
from tsdfm_bench.launch.leases import process_start
from tsdfm_bench.launch.local import default_jobs, environments, packed
from tsdfm_bench.launch.settings import LauncherSettings
from tsdfm_bench.launch.work import Piece, pack
from tsdfm_bench.results.store import RunFolder, read_scores

if TYPE_CHECKING:
    from conftest import Here

SLOW = "counter[slow_s=0.15]"


def start(here: Here, processes: SimpleNamespace, jobs: int, methods: str = SLOW) -> int:
    """`run --launcher local` in a forked process; its number. What it says goes to said.txt."""
    from tsdfm_bench.commands.run import run_command

    given = {
        "plugins": [here.fakes],
        "task": "tiny",
        "methods": methods,
        "steps": "2,4",
        "scorers": "toy",
        "metrics": "letters",
        "samples": 48,
        "batch_size": 8,
        "out": Path("out"),
        "threads": 1,
        "launcher": "local",
        "jobs": jobs,
    }
    return int(processes.fork(lambda: run_command(given, None, False), here.folder / "said.txt"))


def until(condition: Callable[[], object], pid: int, timeout_s: float = 90.0) -> None:
    """Wait for a condition while a process runs."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert process_start(pid), "the process has ended"
        assert time.monotonic() < end
        time.sleep(0.02)


def workers_of(pid: int) -> list[int]:
    """The child processes of a process."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children]


def samples(folder: RunFolder) -> dict[str, bytes]:
    """All stored batches."""
    return {str(path.relative_to(folder.root)): path.read_bytes() for path in sorted(folder.root.rglob("*.npz"))}


@pytest.fixture(scope="module")
def whole(shared: Here) -> RunFolder:
    """An uninterrupted run in one process."""
    assert shared.run(methods=SLOW, steps="2,4", samples="48", metrics="letters", out="whole").exit_code == 0
    return RunFolder(shared.folder / "whole")


def same(mine: RunFolder, whole: RunFolder) -> None:
    """One folder holds all samples and scores of the other, bit for bit."""
    assert samples(mine).items() >= samples(whole).items()
    for cell in whole.scored("toy"):
        a, b = (read_scores(folder.scores_path("toy", cell)) for folder in (mine, whole))
        assert all(np.array_equal(x, y) for x, y in zip(a.nll, b.nll, strict=True))


def test_killed_workers_are_replaced_and_the_result_is_that_of_one_process(
    here: Here, whole: RunFolder, processes: SimpleNamespace
) -> None:
    """A cell that fails in a worker costs nothing but itself."""
    pid = start(here, processes, 2, f"{SLOW},counter[spoil=raise]")
    until(lambda: len(samples(here.out)) >= 3, pid)
    os.kill(workers_of(pid)[0], signal.SIGKILL)
    code = processes.wait(pid)
    said = (here.folder / "said.txt").read_text()
    assert code == 1, said
    assert "was killed by SIGKILL (out of memory?); another one goes on where it was." in said
    assert (
        "2 failed:\n  counter[spoil=raise] · uniform · 2 steps, counter[spoil=raise] · uniform · 4 steps: Runtime"
        in said
    )
    assert "--retry-failed" in said
    assert "Results: out" in said
    same(here.out, whole)
    here.events()
    again = here.run(methods=f"{SLOW},counter[spoil=raise]", steps="2,4", samples="48", metrics="letters")
    assert again.exit_code == 1
    assert "the same code failed before: 2 cells" in again.stderr
    assert here.events() == []


def test_a_large_cell_is_divided_over_workers_and_the_result_is_that_of_one_process(here: Here, steady: Path) -> None:
    """70 batches are three shards (of 32): two workers share the cell, and nothing tells afterwards."""
    given = ("--plugin", str(steady), "--task", "tiny", "--methods", "counter[slow_s=0.02]", "--steps", "2")
    given += ("--scorers", "toy", "--metrics", "letters", "--samples", "280", "--batch-size", "4", "--threads", "1")
    assert here.cli("run", *given, "--out", "whole").exit_code == 0
    here.log_path.unlink()
    (here.folder / "queue.py").write_text("raise ImportError('this is not the queue that was meant')\n")
    result = here.cli("run", *given, "--out", "out", "--launcher", "local", "--jobs", "2")
    assert result.exit_code == 0, result.stderr
    same(here.out, RunFolder(here.folder / "whole"))
    (cell,) = here.cells(method="counter")
    assert len(here.out.completed_batches(cell)) == 70
    begun = [line.split() for line in here.log_path.read_text().splitlines() if line.startswith("begin ")]
    batches = [(first, pid) for _, _, first, rows, pid, _ in begun if rows == "x4"]
    assert len({pid for _, pid in batches}) == 2
    later = [first for first, _ in batches if first != "0"]  # the first one is also a worker's warm-up
    assert len(later) == len(set(later)) == 69


@pytest.mark.parametrize(("jobs", "both"), [(1, False), (2, True)])
def test_a_killed_launcher_leaves_no_processes_and_the_next_one_goes_on(
    here: Here, whole: RunFolder, processes: SimpleNamespace, jobs: int, both: bool
) -> None:
    """Killed alone its workers end by themselves; or all of them are killed at once."""
    pid = start(here, processes, jobs)
    until(lambda: len(samples(here.out)) >= 2, pid)
    workers = workers_of(pid)
    assert len(workers) == jobs
    for victim in [pid, *workers] if both else [pid]:
        os.kill(victim, signal.SIGKILL)
    processes.wait(pid)
    end = time.monotonic() + 30.0
    while any(process_start(worker) for worker in workers):
        assert time.monotonic() < end
        time.sleep(0.05)
    kept = samples(here.out)
    assert 2 <= len(kept) < len(samples(whole))
    result = here.run(methods=SLOW, steps="2,4", samples="48", metrics="letters")  # in one process, for a change
    assert result.exit_code == 0
    assert all(samples(here.out)[name] == content for name, content in kept.items())
    same(here.out, whole)


def test_an_interrupt_stops_the_workers_in_order(here: Here, processes: SimpleNamespace) -> None:
    pid = start(here, processes, 1)
    until(lambda: len(samples(here.out)) >= 2, pid)
    (worker,) = workers_of(pid)
    os.kill(pid, signal.SIGINT)
    assert processes.wait(pid) == 130
    assert "finished batches are kept in out" in (here.folder / "said.txt").read_text()
    assert not process_start(worker)
    assert not list(here.out.leases_folder.glob("[!.]*"))  # given back, not left to die


def test_retry_failed_tries_what_failed_before(here: Here) -> None:
    given = {"methods": "counter[spoil=raise],counter", "samples": "16"}
    assert here.run(**given).exit_code == 1
    here.events()
    assert here.run(**given).exit_code == 1
    assert here.events() == []
    again = here.run("--retry-failed", **given)
    assert "the same code failed before" not in again.stderr
    assert "sample 0 x8 steps 2" in here.events()


@pytest.mark.parametrize(("spoil", "tried"), [("memory", True), ("load", True), ("shape", False)])
def test_failures_of_circumstance_are_tried_again_by_the_same_command(here: Here, spoil: str, tried: bool) -> None:
    given = {"methods": f"counter[spoil={spoil}],stepless", "samples": "8"}
    assert here.run(**given).exit_code == 1
    here.events()
    assert here.run(**given).exit_code == 1
    assert bool([event for event in here.events() if event.startswith("load uniform")]) == tried


def test_a_failure_is_forgotten_when_the_code_changes(here: Here, tmp_path: Path) -> None:
    plugin = tmp_path / "mine.py"
    plugin.write_text(here.fakes.read_text().replace("time.sleep(slow)", "pass").replace('"boom', '"BOOM'))
    given = {"methods": "counter[spoil=raise],stepless", "samples": "8", "plugin": str(plugin)}
    assert here.run(**given).exit_code == 1
    here.events()
    plugin.write_text(plugin.read_text() + "\n# mended\n")
    assert here.run(**given).exit_code == 1
    assert "sample 0 x8 steps 2" in here.events()


# ------------------------------------------------------------------------------------------------------- settings


def test_settings_come_from_a_name_a_table_and_the_command_line(tmp_path: Path) -> None:
    assert str(make_config({}).launcher) == "inline"
    assert make_config({"launcher": "local", "jobs": "3"}).launcher == LauncherSettings(name="local", jobs=3)
    file = tmp_path / "sweep.toml"
    file.write_text('[launcher]\nname = "local"\njobs = 2\nlease_s = 5\n')
    assert make_config({}, file).launcher == LauncherSettings(name="local", jobs=2, lease_s=5.0)
    assert make_config({"launcher": "inline", "lease": "7"}, file).launcher == LauncherSettings(
        name="inline", jobs=2, lease_s=7.0
    )
    for wrong, said in [
        ({"launcher": "lokal"}, "did you mean 'local'"),
        ({"jobs": "0"}, "at least 1"),
        ({"jobs": "many"}, "not a whole number"),
        ({"lease": "0.01"}, "at least 0.2 s"),
        ({"lease": "1e300"}, "at most 31622400 s"),
    ]:
        with pytest.raises(UsageError, match=said):
            make_config(wrong)
    with pytest.raises(UsageError):
        make_config({"launcher": {"name": "local", "jbos": 2}})


def test_every_launcher_can_be_found() -> None:
    assert {find_launcher(LauncherSettings(name=name)).name for name in LAUNCHERS} == set(LAUNCHERS)


def test_gpus_go_round() -> None:
    found = environments(5, 2, ["0", "3"])
    assert [own["CUDA_VISIBLE_DEVICES"] for own in found] == ["0", "3", "0", "3", "0"]
    assert {own["OMP_NUM_THREADS"] for own in found} == {"2"}
    assert environments(2, 1, []) == [{"OMP_NUM_THREADS": "1"}] * 2
    assert default_jobs(["0", "1", "2"]) == 3


@pytest.mark.parametrize(("cores", "free", "jobs"), [(8, 64e9, 8), (8, 5e9, 2), (8, 1e9, 1), (3, None, 3)])
def test_workers_by_cores_and_memory(
    monkeypatch: pytest.MonkeyPatch, cores: int, free: float | None, jobs: int
) -> None:
    """Two gigabytes a worker."""
    monkeypatch.setattr(local, "available_threads", lambda: cores)
    monkeypatch.setattr(local, "free_bytes", lambda: None if free is None else int(free))
    assert default_jobs([]) == jobs


def test_packing_keeps_groups_together_and_jobs_near_the_target() -> None:
    pieces = [Piece({"k": k}, f"g{k % 3}", float(1 + k % 5), str(k)) for k in range(100)]
    jobs = pack(pieces, 20.0)
    assert sorted(piece.title for job in jobs for piece in job) == sorted(piece.title for piece in pieces)
    assert all(sum(piece.weight for piece in job) <= 20.0 for job in jobs)
    assert len(jobs) <= 1.3 * sum(piece.weight for piece in pieces) / 20.0
    order = [piece.group for job in jobs for piece in job]
    assert order == sorted(order)  # no group is loaded, left and loaded again
    assert [len(job) for job in pack(pieces[:2], 0.5)] == [1, 1]  # a piece is never divided
    weights = [sum(piece.weight for piece in job) for job in packed(pieces, 4)]
    assert weights == sorted(weights, reverse=True)
    assert len(weights) >= 4 * 4
