"""`status --watch` and `cancel`: what is shown while something goes on, and how it is ended."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tsdfm_bench.commands import watching
from tsdfm_bench.commands.live import Live, launchers_folder, noted, scoring_state, with_live
from tsdfm_bench.commands.state import CellReport
from tsdfm_bench.commands.training import training_of
from tsdfm_bench.commands.watching import watch
from tsdfm_bench.launch.leases import Lease, Leases
from tsdfm_bench.launch.slurm_queue import Task
from tsdfm_bench.launch.slurm_watch import Queue
from tsdfm_bench.launch.training import CHECKPOINT, TrainFolder
from tsdfm_bench.launch.work import Launch, Work, result_path, unit_name
from tsdfm_bench.results.files import write_json

if TYPE_CHECKING:
    from conftest import Here


@dataclass(frozen=True)
class Shown:
    """A look at something that counts to five."""

    number: int

    @property
    def busy(self) -> bool:
        return self.number < 5

    def screen(self, height: int) -> str:
        return f"{self.number} on {height} lines"

    def line(self) -> str:
        return f"{min(self.number, 5) // 2}"


class Clock:
    """Only sleeping takes time."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_watching_shows_changes_asks_slurm_rarely_and_ends(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not on a terminal a line stands for all looks that gave the same; it ends after some looks at nothing."""
    clock = Clock()
    monkeypatch.setattr(watching, "time", clock)
    asked: list[bool] = []

    def look(ask: bool) -> Shown:
        asked.append(ask)
        return Shown(len(asked) - 1)

    watch(look)
    assert capsys.readouterr().out.split() == ["0", "1", "2"]
    assert len(asked) == 5 + watching.IDLE_LOOKS
    assert asked == [True] + [False] * (len(asked) - 1)
    assert clock.now < watching.SLURM_EVERY_S


def fork_run(here: Here, *flags: str) -> int:
    """`tsdfm-bench run` in a forked process."""
    pid = os.fork()
    if pid == 0:
        os._exit(here.run(*flags).exit_code)
    return pid


def ended(pid: int) -> int:
    """The exit code of a child, waited for."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_run_is_shown_cancelled_and_goes_on(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cancelling ends the process that was noted in the run folder; its batches are kept."""
    monkeypatch.setenv("FAKES_SLOW_S", "1")
    monkeypatch.setattr(watching, "EVERY_S", 0.01)
    more = ("--samples", "80")
    pid = fork_run(here, *more)
    while not here.out.plan_path.exists() or not here.out.completed_batches(here.cells(kind="method")[0]):
        assert os.waitpid(pid, os.WNOHANG) == (0, 0)
        time.sleep(0.05)
    states = json.loads(here.cli("status", "out", "--json").stdout)
    assert [launcher["pid"] for launcher in states["launchers"]] == [pid]
    assert states["states"]["running"] == 1
    done = here.cli("cancel", "out")
    assert done.exit_code == 0, done.stderr
    assert f"Told to end: inline launcher, process {pid}" in done.stderr
    assert ended(pid) == 130
    (cell,) = here.cells(kind="method")
    kept = here.out.completed_batches(cell)
    assert 0 < len(kept) < 10
    assert "Nobody works on what is left" in here.cli("status", "out", "--watch").stdout
    assert "Nothing goes on with out" in here.cli("cancel", "out").stderr
    monkeypatch.setenv("FAKES_SLOW_S", "0")
    here.events()
    assert here.run(*more).exit_code == 0
    made = {event for event in here.events() if event.startswith("sample ") and "x8" in event}
    warm_up = "sample 0 x8 steps 2"
    assert made - {warm_up} == {f"sample {8 * batch} x8 steps 2" for batch in range(10) if batch not in kept}
    assert here.cli("status", "out", "--watch").stdout.startswith("50/50 batches; 5 done; summary.csv")


def test_a_launcher_of_another_machine_is_not_ended_from_here(here: Here) -> None:
    """Process numbers mean something on their own machine only."""
    assert here.run().exit_code == 0
    with noted(here.out, "local"):
        (path,) = launchers_folder(here.out).glob("*.json")
        about = json.loads(path.read_text())
        write_json(path, {**about, "host": "elsewhere", "machine": "far"}, checksum=False)
        done = here.cli("cancel", "out")
    assert done.exit_code == 1
    assert f"Not ended from here: local launcher, process {os.getpid()} on far" in done.stderr


@pytest.mark.parametrize(
    ("task", "completed", "state", "reason"),
    [
        (Task("7", 3, "PENDING", "Resources"), 0, "queued", "job 7_3"),
        (Task("7", 3, "PENDING", "Licenses", "2026-01-02T03:04"), 0, "queued", "job 7_3, Licenses, expected"),
        (Task("7", 3, "PENDING", "BeginTime"), 0, "requeued and waiting", "job 7_3"),
        (Task("7", 3, "PENDING", "Priority"), 2, "requeued and waiting", "job 7_3"),
        (Task("7", None, "PENDING", "JobHeldUser"), 0, "queued", "job 7, held: scontrol release 7"),
        (Task("7", 3, "RUNNING", node="n5"), 2, "running", "job 7_3 on n5"),
        (Task("7", 3, "COMPLETING"), 2, "running", "job 7_3 ends"),
    ],
)
def test_what_slurm_knows_of_a_cell(here: Here, task: Task, completed: int, state: str, reason: str) -> None:
    cell = "0123456789abcdef"
    report = CellReport(cell, "method", "dfm", "mask", 8, 64, "", "partial", completed, 4)
    found = with_live(report, Live({}, Queue(alive={cell: task})), here.out)
    assert (found.state, found.reason.startswith(reason)) == (state, True), found
    assert with_live(replace(report, state="done"), Live({}, Queue(alive={cell: task})), here.out).state == "done"
    assert with_live(report, Live({}, Queue(alive={"another": task})), here.out) == report
    scores = Live({}, Queue(alive={unit_name(cell, 0, "toy"): task}))
    assert scoring_state(scores, cell, "toy") == ("queued" if task.state == "PENDING" else "running")


def test_a_cell_that_a_worker_is_at_says_what_is_left(here: Here) -> None:
    """Two batches of half a minute each are to come."""
    assert here.run(samples="16", steps="2", methods="counter").exit_code == 0
    (cell,) = here.cells(method="counter")
    costs = json.loads(here.out.cost_path(cell).read_text())["batches"]
    write_json(here.out.cost_path(cell), {"batches": {key: {**cost, "seconds": 30.0} for key, cost in costs.items()}})
    report = CellReport(cell, "method", "counter", "uniform", 2, 4, "", "partial", 2, 4)
    found = with_live(report, Live({cell: (2, 4)}), here.out)
    assert (found.state, found.reason) == ("running", "1:00 left")


STAGES = {"teacher": (), "compass": ("teacher",), "student": ("teacher", "compass"), "other": (), "last": ()}


def training(folder: Path) -> tuple[TrainFolder, dict[str, Path]]:
    """A folder with the job files of a training; name of a work -> its file."""
    found = TrainFolder(folder)
    works = [
        Work(
            "train",
            f"train-{stage}",
            stage,
            str(folder),
            {},
            stage={"stage": stage},
            needs=[f"train-{need}" for need in needs],
            weight=400.0,
        )
        for stage, needs in STAGES.items()
    ]
    paths = Launch.new(found.jobs_folder, "slurm").write(works)
    return found, dict(zip((work.name for work in works), paths, strict=True))


def test_a_training_is_shown_by_stages(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """Done, running, waiting, failed: from checkpoints, leases, results, and what Slurm adds."""
    folder, files = training(here.folder / "trained")
    (folder.root / "teacher").mkdir()
    (folder.root / "teacher" / CHECKPOINT).write_text("{}")
    write_json(result_path(files["train-other"]), {"state": "error", "error": "Traceback\nCheckpointError: no weights"})
    leases = Leases(folder.leases_folder, 60.0, beat=False)
    lease = leases.take("train-compass")
    assert isinstance(lease, Lease)
    lease.tell(done=120, speed="9,000 tokens/s  MFU % 41")
    lease.renew()
    queue = Queue(alive={"train-student": Task("7", None, "PENDING", "Dependency")})
    found = {report.stage: report for report in training_of(folder, Live({}, queue)).stages}
    assert {stage: report.state for stage, report in found.items()} == {
        "teacher": "done",
        "compass": "running",
        "student": "queued",
        "other": "failed",
        "last": "missing",
    }
    assert found["compass"].done == 120
    assert found["compass"].reason.endswith(": 9,000 tokens/s  MFU % 41")
    assert "compass 120/400 steps on " in training_of(folder, Live({}, queue)).line()
    assert found["student"].needs == ("teacher", "compass")
    assert found["other"].reason == "CheckpointError: no weights"
    shown = here.cli("status", "trained")
    assert shown.exit_code == 0, shown.stderr
    for said in ("120/400", "running: on ", "failed: CheckpointError: no weights", "1 done"):
        assert said in shown.stdout
    lease.release()
    monkeypatch.setattr(watching, "EVERY_S", 0.01)
    again = here.cli("status", "trained", "--watch")
    assert "Nobody works on what is left" in again.stdout
    states = {
        row["stage"]: row["state"] for row in json.loads(here.cli("status", "trained", "--json").stdout)["stages"]
    }
    assert states["compass"] == "missing"
    assert "Nothing goes on with trained" in here.cli("cancel", "trained").stderr


def test_a_requeued_stage_is_said_to_wait(here: Here) -> None:
    """A stage with a saved state, or one that Slurm holds back for a moment, ran once already."""
    folder, _ = training(here.folder / "trained")
    queue = Queue(alive={"train-last": Task("7", None, "PENDING", "BeginTime")})
    reports = {report.stage: report for report in training_of(folder, Live({}, queue)).stages}
    assert reports["last"].state == "requeued and waiting"
    running = replace(queue, alive={"train-last": Task("7", None, "RUNNING", node="n3")})
    reports = {report.stage: report for report in training_of(folder, Live({}, running)).stages}
    assert reports["last"].reason == "job 7 on n3"
