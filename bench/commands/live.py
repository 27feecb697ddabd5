"""What is going on with a run right now: launchers and workers by their files, and what Slurm adds if it can be asked.

Files come first: leases say who works on what, progress files how far they are. Slurm is asked once, and only if the
run has jobs there; without an answer the rest is shown all the same.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tsdfm_bench.commands.state import CellReport
from tsdfm_bench.console import duration
from tsdfm_bench.launch.leases import process_start, this_host, working
from tsdfm_bench.launch.slurm_jobs import job_name, records
from tsdfm_bench.launch.slurm_queue import HELD, SlurmError, Task, available, tasks
from tsdfm_bench.launch.work import launches, unit_name
from tsdfm_bench.results.files import CorruptFile, StoreError, make_folder, read_json, remove, write_json

if TYPE_CHECKING:
    from types import FrameType

    from tsdfm_bench.launch.slurm_watch import Queue
    from tsdfm_bench.results.store import RunFolder


@dataclass(frozen=True)
class LauncherProcess:
    """A process that runs or watches a sweep.

    Args:
        pid, started, host, machine: which process of which machine; see `Holder`.
        launcher: "inline", "local" or "slurm".
    """

    pid: int
    started: str
    host: str
    machine: str
    launcher: str

    @property
    def here(self) -> bool:
        """Whether it belongs to this machine."""
        return self.host == this_host()

    @property
    def gone(self) -> bool:
        """Whether it is known to have ended."""
        return self.here and process_start(self.pid) != self.started

    def stop(self) -> bool:
        """Ask it politely to end; False if it is not (any more) a process of this machine."""
        if not self.here or self.gone:
            return False
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(self.pid, signal.SIGTERM)
            return True
        return False


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Take a polite kill (SIGTERM) like Ctrl-C while the block runs."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def launchers_folder(folder: RunFolder) -> Path:
    """Where running launchers are noted."""
    return folder.jobs_folder / "launchers"


@contextlib.contextmanager
def noted(folder: RunFolder, launcher: str) -> Iterator[None]:
    """Note in the run folder that this process runs it, while the block lasts."""
    about = {
        "pid": os.getpid(),
        "started": process_start(os.getpid()),
        "host": this_host(),
        "machine": socket.gethostname(),
        "launcher": launcher,
    }
    path = launchers_folder(folder) / f"{os.getpid()}-{secrets.token_hex(4)}.json"
    with contextlib.suppress(StoreError):  # a run must not fail for this
        make_folder(path.parent)
        write_json(path, about, checksum=False, durable=False)
    try:
        yield
    finally:
        with contextlib.suppress(StoreError):
            remove(path)


def launcher_processes(folder: RunFolder) -> list[LauncherProcess]:
    """Launchers that run, or may run on another machine."""
    found = []
    for path in sorted(launchers_folder(folder).glob("*.json")):
        try:
            process = LauncherProcess(**dict(read_json(path, checksum=False)))  # type: ignore[arg-type]
        except (CorruptFile, TypeError, StoreError):
            continue
        if process.gone:  # it was killed: its note is stale
            with contextlib.suppress(StoreError):
                remove(path)
            continue
        found.append(process)
    return found


# --------------------------------------------------------------------------------------------------------- live


@dataclass(frozen=True)
class Live:
    """What goes on.

    Args:
        working: cell -> what its worker says: the batch rate in seconds, and how far it is.
        queue: the Slurm jobs, or None if there are none or Slurm does not answer.
        note: about Slurm, one line, or "".
        launchers: running.
    """

    working: dict[str, tuple[int, int]]
    queue: Queue | None = None
    note: str = ""
    launchers: list[LauncherProcess] = field(default_factory=list)

    @property
    def busy(self) -> bool:
        """Whether anything is under way or queued."""
        return bool(self.working or (self.queue is not None and self.queue.alive) or self.launchers)

    def refreshed(self, folder: RunFolder) -> Live:
        """What files say now, and what Slurm said before."""
        fresh = look(folder, slurm=False)
        return replace(self, working=fresh.working, launchers=fresh.launchers)


def submitted(folder: RunFolder) -> bool:
    """Whether anything of the run was handed to Slurm."""
    return any(records(launch) for launch in launches(folder))


def look(folder: RunFolder, *, slurm: bool = True) -> Live:
    """Look at a run folder, and at the queue if it has jobs there.

    Args:
        folder: the run.
        slurm: ask Slurm, if it has jobs of this run.
    """
    held = {
        cell: (int(holder.about.get("done", 0)), int(holder.about.get("of", 0)))
        for cell, holder in working(folder.leases_folder).items()
    }
    found = Live(held, launchers=launcher_processes(folder))
    if not slurm or not submitted(folder):
        return found
    if not available():
        return replace(found, note="Slurm cannot be asked from this machine; jobs were submitted")
    from tsdfm_bench.launch.slurm_watch import Queue

    try:
        queue = Queue.read(folder, tasks(job_name(folder.root)))
    except SlurmError as error:
        return replace(found, note=str(error))
    return replace(
        found, queue=queue, note=f"Slurm: {queue.counts()}" if queue.alive else "Slurm: no jobs in the queue"
    )


def with_live(report: CellReport, live: Live, folder: RunFolder) -> CellReport:
    """A cell's state with what goes on about it: queued, requeued and waiting, or running with the time left."""
    if report.state in ("done", "refused", "skipped"):
        return report
    if report.id in live.working:
        return replace(report, state="running", reason=_time_left(report, folder))
    task = _task(live, report.id)
    if task is None:
        return report
    if not task.waiting:
        doing = "ends" if task.state == "COMPLETING" else f"on {task.node or 'a node'}"
        return replace(report, state="running", reason=f"job {task.id} {doing}")
    return replace(report, state=waiting_state(task, report.completed > 0), reason=f"job {task.id}{why_waiting(task)}")


def waiting_state(task: Task, begun: bool) -> str:
    """ "queued", or "requeued and waiting" if the job was already running once."""
    again = task.state in ("REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED") or task.reason == "BeginTime"
    return "requeued and waiting" if again or begun else "queued"


def why_waiting(task: Task) -> str:
    """What there is to say about a task that waits, from a comma on; "" if it is nothing special."""
    if task.reason.startswith(HELD):
        return f", held: scontrol release {task.job}"
    start = f", expected {task.start.replace('T', ' ')}" if task.start else ""
    usual = ("", "JobArrayTaskLimit", "Priority", "Resources", "BeginTime", "Dependency")
    return ("" if task.reason in usual else f", {task.reason}") + start


def _task(live: Live, cell: str, scorer: str = "") -> Task | None:
    """The living task of a cell's samples (any shard of them) or of its scores."""
    if live.queue is None:
        return None
    if scorer:
        return live.queue.alive.get(unit_name(cell, 0, scorer))
    shards = [task for key, task in live.queue.alive.items() if key == cell or key.startswith(f"{cell}-0")]
    return min(shards, key=lambda task: task.waiting, default=None)


def scoring_state(live: Live, cell: str, scorer: str) -> str:
    """What a job is about to do for the scores of a cell, or ""."""
    task = _task(live, cell, scorer)
    return "" if task is None else "queued" if task.waiting else "running"


def _time_left(report: CellReport, folder: RunFolder) -> str:
    """From the seconds of the batches that are there."""
    from tsdfm_bench.launch.batches import read_costs

    with contextlib.suppress(StoreError):
        costs = read_costs(folder, report.id).values()
        seconds = [cost.seconds for cost in costs]
        if seconds:
            return f"{duration(sum(seconds) / len(seconds) * max(0, report.batches - report.completed))} left"
    return ""
