"""The slurm launcher: job arrays for what is missing, watched by its files, submitted again when jobs are lost.

Each round reads what the run folder still lacks, asks Slurm once which jobs may still come back (`squeue`, one call for
the whole run), and submits what nobody is going to do. So there is no difference between a first start, a second `run`
on a sweep that is already submitted, and a round after jobs were preempted, killed, cancelled or lost with their node:
units that a living job covers are never submitted again, all others are, until they made no progress `tries` times.

Scores wait for the samples of their cells by a dependency (`afterany`: one lost job does not hold up the others).
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsdfm_bench.errors import UsageError
from tsdfm_bench.launch import Cancelled, Detached
from tsdfm_bench.launch.leases import Lease, Leases
from tsdfm_bench.launch.slurm_jobs import ARRAY_AT_MOST, Record, adopt, job_name, records, submit
from tsdfm_bench.launch.slurm_queue import HELD, SlurmError, Task, array_limit, available, cancel, tasks
from tsdfm_bench.launch.slurm_settings import SlurmSettings, slurm_settings
from tsdfm_bench.launch.work import Launch, Piece, Work, launches, result_path
from tsdfm_bench.results.files import StoreError, canonical_json, read_json

if TYPE_CHECKING:
    from tsdfm_bench.console import Phase, Reporter
    from tsdfm_bench.job import Job
    from tsdfm_bench.launch.settings import LauncherSettings
    from tsdfm_bench.results.store import RunFolder
    from tsdfm_bench.sweep import Sweep

FIRST_POLL_S = 1.0
SLOWER = 1.3  # each quiet round waits that much longer, up to `poll`
SUBMIT_LEASE = "slurm-submit"
CANCELLED = "cancelled"
# What sbatch says when a user or an account has too many jobs.
_LIMITED = re.compile(r"limit|policy|too many|max", re.IGNORECASE)


@dataclass(frozen=True)
class Part:
    """A unit that is still to be done.

    Args:
        key: its name in leases and records.
        stage: "sample" or "score".
        piece: for the job file; its weight is in seconds.
        kind, name: whose parameters hold: "methods" or "scorers", and the name.
        progress: changes when something of it was done.
    """

    key: str
    stage: str
    piece: Piece
    kind: str
    name: str
    progress: float


@dataclass
class Queue:
    """The jobs of a run folder, as its records and one squeue tell.

    Args:
        known: records by token.
        alive: unit key -> the living task that covers it.
        last: unit key -> the task that was the last to cover it.
        covers: unit key -> tokens of the records with a living task for it.
        files: unit key -> token and job file of its last submission.
        lost: ids of tasks that wait for what will not happen.
    """

    known: dict[str, Record] = field(default_factory=dict)
    alive: dict[str, Task] = field(default_factory=dict)
    last: dict[str, Task] = field(default_factory=dict)
    covers: dict[str, list[str]] = field(default_factory=dict)
    files: dict[str, tuple[str, str]] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, folder: RunFolder, found: Sequence[Task]) -> Queue:
        """Join the records of a run folder with the tasks of its job name."""
        queue = cls()
        by_job: dict[str, list[Task]] = {}
        for task in found:
            by_job.setdefault(task.job, []).append(task)
        for launch in launches(folder):
            for record in records(launch):
                record = adopt(launch, record, found)
                queue.known[record.token] = record
                queue.files |= {
                    key: (record.token, file)
                    for file, keys in zip(record.files, record.units, strict=True)
                    for key in keys
                }
                for task in by_job.get(record.job, ()) if record.job else ():
                    queue._add(record, task)
        return queue

    def _add(self, record: Record, task: Task) -> None:
        index = record.index_of(task)
        if index >= len(record.units):
            return
        if task.never:
            self.lost.append(task.id)
        for key in record.units[index]:
            self.last[key] = task
            if task.alive and not task.never:
                self.alive[key] = task
                self.covers.setdefault(key, []).append(record.token)

    def result(self, key: str, tokens: Collection[str]) -> dict[str, Any]:
        """What the last job of a unit left, if that was one of these submissions; {} if it left nothing."""
        found = self.files.get(key)
        if found is None or found[0] not in tokens:
            return {}
        try:
            return dict(read_json(result_path(found[1])))
        except StoreError:
            return {}

    def fate(self, key: str) -> str:
        """What became of the last job of a unit, in plain words."""
        task = self.last.get(key)
        return "no trace in the queue" if task is None else task.state.lower().replace("_", " ")

    def counts(self) -> str:
        """How many jobs run and wait, and for what."""
        seen = {task.id: task for task in self.alive.values()}.values()
        waiting = Counter(reason_of(task) for task in seen if task.waiting)
        parts = [f"{sum(1 for task in seen if not task.waiting)} running"]
        parts += [f"{count} {reason}" for reason, count in waiting.most_common()]
        return ", ".join(parts)


def reason_of(task: Task) -> str:
    """Why a task waits, in plain words."""
    if task.reason.startswith(HELD):
        return "held (scontrol release)"
    plain = {
        "Dependency": "waiting for samples",
        "JobArrayTaskLimit": "queued (array_parallelism)",
        "BeginTime": "requeued and waiting",
        "Priority": "queued",
        "Resources": "queued",
        "": "queued",
    }
    return plain.get(task.reason, f"queued ({task.reason})")


class Slurm:
    """See the module.

    Args:
        settings: the `[launcher]` table.

    Raises:
        UsageError: a wrong key in its slurm table, or no Slurm here.
    """

    name = "slurm"

    def __init__(self, settings: LauncherSettings) -> None:
        self.settings = settings
        self.slurm: SlurmSettings = slurm_settings(settings.slurm)
        if not available():
            raise UsageError(
                "--launcher slurm: there is no sbatch, squeue and srun here. Run this where jobs are submitted, or use "
                "--launcher local"
            )

    def sweep(self, sweep: Sweep, job: Job, reporter: Reporter) -> None:
        """See `Launcher.sweep`."""
        from tsdfm_bench.launch.slurm_parts import SweepParts

        Dispatcher(self.slurm, sweep.folder, SweepParts(sweep, job, self.slurm), self.settings.lease_s).run(reporter)

    def train(self, works: Sequence[Work], folder: Path, reporter: Reporter) -> list[dict[str, Any]]:
        """See `Launcher.train`."""
        from tsdfm_bench.launch.slurm_train import train

        return train(self.slurm, works, folder, reporter)


class Parts:
    """What a dispatcher works on; `SweepParts` is the real one."""

    def left(self) -> list[Part]:
        """Units that are not done and have not failed."""
        raise NotImplementedError

    def works(self, parts: Sequence[Part], parameters: Mapping[str, Any], first: int) -> list[tuple[Work, list[Part]]]:
        """Jobs for parts of one stage with one set of parameters, numbered from `first`."""
        raise NotImplementedError

    def give_up(self, part: Part, reason: str) -> None:
        """Leave a failure."""
        raise NotImplementedError


class Dispatcher:
    """The rounds of the launcher.

    Args:
        settings: of the slurm launcher.
        folder: the run folder.
        parts: what is to be done.
        lease_s: of the submission: two launchers never submit at once.
        sleep: waits so many seconds.
    """

    def __init__(
        self,
        settings: SlurmSettings,
        folder: RunFolder,
        parts: Parts,
        lease_s: float = 60.0,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.settings, self.folder, self.parts, self.sleep = settings, folder, parts, sleep
        self.name = job_name(folder.root)
        self.leases = Leases(folder.leases_folder, lease_s)
        self.tried: dict[str, tuple[int, float]] = {}  # submissions without progress, -1 = given up
        self.ours: set[str] = set()  # tokens of submissions that lived while this process watched
        self.array_limit = 0
        self.silent = False

    def run(self, reporter: Reporter) -> None:
        """Rounds until nothing is left that could be done; see `Launcher.sweep` for what is raised."""
        left = self.parts.left()
        if not left:
            return
        cancel_mark(self.folder).unlink(missing_ok=True)
        work = sum(part.piece.weight for part in left)
        wait, before = FIRST_POLL_S, ""
        try:
            with reporter.phase("slurm", work, len(left), "parts") as phase:
                while left:
                    queue = self._round(left, reporter)
                    if self.settings.detach:
                        raise Detached(self._farewell(queue))
                    if queue is not None and not queue.alive:
                        left = self.parts.left()
                        if not left or all(self._given_up(part) for part in left):
                            break
                    shown = "Slurm does not answer" if queue is None else queue.counts()
                    now = f"{len(left)} {shown}"
                    wait = FIRST_POLL_S if now != before else min(self.settings.poll, wait * SLOWER)
                    before = now
                    phase.doing(shown)
                    self.sleep(min(wait, self.settings.poll))
                    left = self.parts.left()
                    _show(phase, work, left)
        except KeyboardInterrupt:
            reporter.note(self._farewell(None), style="yellow")
            raise
        finally:
            self.leases.close()

    def _round(self, left: Sequence[Part], reporter: Reporter) -> Queue | None:
        """One look at the queue, and what is missing there submitted; None if Slurm does not answer."""
        if cancel_mark(self.folder).exists():
            raise Cancelled(
                f"This run was cancelled with tsdfm-bench cancel; finished batches are in {self.folder.root}."
            )
        try:
            queue = Queue.read(self.folder, tasks(self.name))
            self.silent = False
        except SlurmError as error:
            if not self.silent:
                reporter.note(f"{error}. Jobs go on; asking again.", style="yellow")
            self.silent = True
            return None
        if queue.lost:
            cancel(queue.lost)
        lacking = self._lacking(left, queue, reporter)
        if not lacking:
            return queue
        lease = self.leases.take(SUBMIT_LEASE)
        if not isinstance(lease, Lease):
            return queue  # another launcher is submitting; the next look will show what
        with lease:
            try:
                # Between the look and the lease another launcher may have submitted.
                queue = Queue.read(self.folder, tasks(self.name))
                self._submit([part for part in lacking if part.key not in queue.alive], queue, reporter)
                return Queue.read(self.folder, tasks(self.name))
            except SlurmError as error:
                queue = Queue.read(self.folder, tasks(self.name))
                limit, self.array_limit = self.array_limit, max(1, self.array_limit // 2)
                if not queue.alive and not (_LIMITED.search(str(error)) and limit > 1):
                    raise
                if not self.silent:
                    reporter.note(f"{error}. Trying again in smaller arrays when jobs have ended.", style="yellow")
                self.silent = True
                return queue

    def _lacking(self, left: Sequence[Part], queue: Queue, reporter: Reporter) -> list[Part]:
        """Parts that no living job covers, whose last job did not find them to fail, and that are worth another try."""
        self.ours |= {token for tokens in queue.covers.values() for token in tokens}
        lacking, ended = [], Counter[str]()
        for part in left:
            if part.key in queue.alive or self._given_up(part):
                continue
            result = queue.result(part.key, self.ours)
            if part.key in result.get("failed", ()):  # it is in the files, with its reason
                self.tried[part.key] = (-1, part.progress)
                continue
            if (not result and part.key not in self.tried) or part.key in result.get("busy", ()):
                holder = self.leases.holder(part.key)
                if holder is not None and not self.leases.dead(holder):
                    continue  # a process that is no job of ours works on it
            count, progress = self.tried.get(part.key, (0, part.progress))
            if progress != part.progress:
                count = 0
            state = queue.fate(part.key)
            if count >= self.settings.tries or result.get("state") == "refused":
                said = f": {result['error']}" if result.get("error") else ""
                tries = f"{count} jobs" if count > 1 else "its job"
                self.parts.give_up(part, f"Slurm: {tries} ended without any progress ({state}){said}")
                self.tried[part.key] = (-1, part.progress)
                continue
            if count or part.key in self.tried:
                ended[state] += 1
            self.tried[part.key] = (count, part.progress)
            lacking.append(part)
        for state, number in ended.items():
            what = "1 part" if number == 1 else f"{number} parts"
            reporter.note(f"Jobs ended early ({state}); submitting what is left of {what}.", style="yellow")
        return lacking

    def _given_up(self, part: Part) -> bool:
        return self.tried.get(part.key, (0, 0.0))[0] < 0

    # -------------------------------------------------------------------------------------------------- submitting

    def _submit(self, parts: Sequence[Part], queue: Queue, reporter: Reporter) -> None:
        """Write job files and submit them, samples first."""
        if not parts:
            return
        self.array_limit = self.array_limit or min(array_limit(), ARRAY_AT_MOST)
        launch = Launch.new(self.folder.jobs_folder, "slurm")
        makers: dict[str, list[Record]] = {}
        for key, tokens in queue.covers.items():
            makers[key] = [queue.known[token] for token in tokens]
        count, jobs = 0, 0
        for stage in ("sample", "score"):
            for (_, after), some in self._groups([p for p in parts if p.stage == stage], makers).items():
                parameters = self.settings.of(some[0].kind, some[0].name)
                works = self.parts.works(some, parameters, count)
                count += len(works)
                paths = launch.write([work for work, _ in works])
                before = [record for token in after for record in _records(makers, token)]
                for first in range(0, len(works), self.array_limit):
                    chunk = slice(first, first + self.array_limit)
                    units = [[part.key for part in done] for _, done in works[chunk]]
                    record = submit(
                        launch, stage, self.name, paths[chunk], units, self._asked(works, parameters), before
                    )
                    self.ours.add(record.token)
                    jobs += len(units)
                    for key in (key for keys in units for key in keys):
                        makers.setdefault(key, []).append(record)
                        tries, progress = self.tried.get(key, (0, 0.0))
                        self.tried[key] = (tries + 1, progress)
        reporter.note(f"Submitted {jobs} job{'s' * (jobs != 1)} to Slurm as {self.name}.")

    def _groups(
        self, parts: Iterable[Part], makers: Mapping[str, Sequence[Record]]
    ) -> dict[tuple[str, tuple[str, ...]], list[Part]]:
        """Parts by their parameters and by the submissions that they have to wait for."""
        of_cell: dict[str, set[str]] = {}
        for key, found in makers.items():
            for record in found:
                if record.stage == "sample":
                    of_cell.setdefault(cell_of(key), set()).add(record.token)
        asked: dict[tuple[str, str], str] = {}
        groups: dict[tuple[str, tuple[str, ...]], list[Part]] = {}
        for part in parts:
            who = (part.kind, part.name)
            if who not in asked:
                asked[who] = canonical_json(self.settings.of(*who))
            after = sorted(of_cell.get(cell_of(part.key), ())) if part.stage == "score" else ()
            groups.setdefault((asked[who], tuple(after)), []).append(part)
        return groups

    @staticmethod
    def _asked(works: Sequence[tuple[Work, list[Part]]], parameters: Mapping[str, Any]) -> dict[str, Any]:
        """The parameters with what the works need and nobody has said."""
        needs = works[0][0].resources if works else {}
        return {"cpus_per_task": max(1, int(needs.get("cpus", 1))), **parameters}

    def _farewell(self, queue: Queue | None) -> str:
        """How to follow, come back and cancel."""
        running = f" ({queue.counts()})" if queue is not None and queue.alive else ""
        root = self.folder.root
        return (
            f"The jobs go on without this process{running}.\n"
            f"  follow:     tsdfm-bench status {root} --watch\n"
            "  come back:  the same command again; it submits nothing twice\n"
            f"  cancel:     tsdfm-bench cancel {root}"
        )


def _records(makers: Mapping[str, Sequence[Record]], token: str) -> list[Record]:
    return list({r.token: r for found in makers.values() for r in found if r.token == token}.values())


def cell_of(key: str) -> str:
    """The cell of a unit's name (`unit_name`)."""
    return key.partition("-")[0]


def cancel_mark(folder: RunFolder) -> Path:
    """A file that tells a waiting launcher that the run was cancelled."""
    return folder.jobs_folder / CANCELLED


def _show(phase: Phase, work: float, left: Sequence[Part]) -> None:
    """Progress from what is left."""
    done = work - sum(part.piece.weight for part in left)
    phase.advance(max(0.0, done - phase.work_done), max(0, phase.count - len(left) - phase.count_done))
