"""The rounds of the slurm launcher: look, submit what nobody is going to do, wait.

Each round reads what the run folder still lacks, asks Slurm once which jobs may still come back (`squeue`, one call for
the whole run), and submits what nobody is going to do. So there is no difference between a first start, a second `run`
on a sweep that is already submitted, and a round after jobs were preempted, killed, cancelled or lost with their node:
units that a living job covers are never submitted again, all others are, until they made no progress `tries` times.

Scores wait for the samples of their cells by a dependency (`afterany`: one lost job does not hold up the others), the
stages of a training for those they need (`afterok`).
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsdfm_bench.launch import Cancelled, Detached
from tsdfm_bench.launch.leases import Lease, Leases
from tsdfm_bench.launch.slurm_jobs import ARRAY_AT_MOST, Record, job_name, records, submit
from tsdfm_bench.launch.slurm_queue import SlurmError, array_limit, cancel, tasks
from tsdfm_bench.launch.slurm_settings import SlurmSettings
from tsdfm_bench.launch.slurm_watch import Queue
from tsdfm_bench.launch.work import Launch, Piece, Work, launches
from tsdfm_bench.results.files import canonical_json

if TYPE_CHECKING:
    from tsdfm_bench.console import Phase, Reporter
    from tsdfm_bench.results.store import RunFolder

FIRST_POLL_S = 1.0
SLOWER = 1.3  # each quiet round waits that much longer, up to `poll`
ASKED_AT_MOST = 12  # times in a row without an answer, about a minute, while no job was submitted that could go on
SUBMIT_LEASE = "slurm-submit"
CANCELLED = "cancelled"
# What sbatch says when a user or an account has too many jobs.
_LIMITED = re.compile(r"limit|policy|too many|max", re.IGNORECASE)


@dataclass(frozen=True)
class Part:
    """A unit that is still to be done.

    Args:
        key: its name in leases and records.
        stage: "sample", "score" or "train".
        piece: for the job file; its weight is in seconds.
        kind, name: whose parameters hold: "methods", "scorers" or "stages", and the name.
        progress: changes when something of it was done.
        needs: keys of parts that must have ended before.
    """

    key: str
    stage: str
    piece: Piece
    kind: str
    name: str
    progress: float
    needs: tuple[str, ...] = ()


class Parts:
    """What a dispatcher works on: a sweep (`SweepParts`) or a training (`TrainParts`).

    Args of the class:
        dependency: "afterany" if a part may begin when what it needs has ended somehow, else "afterok".
        final: states of a job's result after which its units are not tried again.
    """

    dependency = "afterany"
    final: Collection[str] = ("refused",)

    def farewell(self, name: str) -> str:
        """How to follow, come back to, and cancel what goes on without this process."""
        raise NotImplementedError

    def left(self) -> list[Part]:
        """Units that are not done and have not failed, those that others need before these."""
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
        self.unanswered = 0  # looks in a row

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
        """One look at the queue, and what is missing there submitted; None if Slurm does not answer.

        Raises:
            SlurmError: it does not answer, and no job was submitted that could go on; or it refused the first ones.
        """
        if cancel_mark(self.folder).exists():
            raise Cancelled(
                f"This run was cancelled with tsdfm-bench cancel; finished batches are in {self.folder.root}."
            )
        try:
            queue = Queue.read(self.folder, tasks(self.name))
            self.silent, self.unanswered = False, 0
        except SlurmError as error:
            self.unanswered += 1
            submitted = self._submitted()
            if not submitted and (self.settings.detach or self.unanswered >= ASKED_AT_MOST):
                raise SlurmError(
                    f"{error}. No job was submitted; run the same command again when Slurm answers (try: squeue --me)"
                ) from error
            if not self.silent:
                goes_on = "Jobs go on" if submitted else "No job was submitted yet"
                reporter.note(f"{error}. {goes_on}; asking again.", style="yellow")
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
        lacking: list[Part] = []
        ended: Counter[str] = Counter()
        unfinished = {part.key for part in left}
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
            if self.parts.dependency == "afterok" and part.needs:
                if need := next(filter(self._is_lost, part.needs), None):
                    self._give_up(part, f"{need} is needed, and failed")
                    continue
                ahead = {*queue.alive, *(other.key for other in lacking)}
                if not unfinished.intersection(part.needs) <= ahead:
                    continue  # what it needs is being done elsewhere
            count, progress = self.tried.get(part.key, (0, part.progress))
            if progress != part.progress:
                count = 0
            state = queue.fate(part.key)
            if result.get("state") in self.parts.final:
                self._give_up(part, str(result.get("error") or state))
                continue
            if count >= self.settings.tries:
                said = f": {result['error']}" if result.get("error") else ""
                tries = f"{count} jobs" if count > 1 else "its job"
                self._give_up(part, f"Slurm: {tries} ended without any progress ({state}){said}")
                continue
            if count or part.key in self.tried:
                ended[state] += 1
            self.tried[part.key] = (count, part.progress)
            lacking.append(part)
        for state, number in ended.items():
            what = "1 part" if number == 1 else f"{number} parts"
            reporter.note(f"Jobs ended early ({state}); submitting what is left of {what}.", style="yellow")
        return lacking

    def _give_up(self, part: Part, reason: str) -> None:
        self.parts.give_up(part, reason)
        self.tried[part.key] = (-1, part.progress)

    def _given_up(self, part: Part) -> bool:
        return self._is_lost(part.key)

    def _is_lost(self, key: str) -> bool:
        return self.tried.get(key, (0, 0.0))[0] < 0

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
        count, jobs, rest = 0, 0, list(parts)
        ahead = {*queue.alive, *(part.key for part in parts)}
        while rest:
            keys = {part.key for part in rest}
            now = [part for part in rest if not keys.intersection(part.needs)] or rest
            rest = [part for part in rest if part not in now] if len(now) < len(rest) else []
            for after, some in self._groups(now, makers):
                parameters = self.settings.of(some[0].kind, some[0].name)
                works = self.parts.works(some, parameters, count)
                count += len(works)
                paths = launch.write([work for work, _ in works])
                before = [record for token in after for record in _records(makers, token)]
                for first in range(0, len(works), self.array_limit):
                    chunk = slice(first, first + self.array_limit)
                    units = [[part.key for part in done] for _, done in works[chunk]]
                    asked = self._asked(works, parameters)
                    record = submit(
                        launch, some[0].stage, self.name, paths[chunk], units, asked, before, self.parts.dependency
                    )
                    self.ours.add(record.token)
                    jobs += len(units)
                    for part in (part for _, done in works[chunk] for part in done):
                        makers.setdefault(part.key, []).append(record)
                        tries, progress = self.tried.get(part.key, (0, 0.0))
                        follows = bool(ahead.intersection(part.needs))  # if those are lost, it is not to blame
                        self.tried[part.key] = (tries + (not follows), progress)
        reporter.note(f"Submitted {jobs} job{'s' * (jobs != 1)} to Slurm as {self.name}.")

    def _groups(
        self, parts: Iterable[Part], makers: Mapping[str, Sequence[Record]]
    ) -> list[tuple[tuple[str, ...], list[Part]]]:
        """Parts that may share an array, with the submissions that they have to wait for.

        They are of one stage, with equal parameters. A part whose success others wait for stays alone: a dependency on
        an array is one on all of its elements.
        """
        asked: dict[tuple[str, str], str] = {}
        groups: dict[tuple[str, str, tuple[str, ...], str], list[Part]] = {}
        for part in parts:
            who = (part.kind, part.name)
            if who not in asked:
                asked[who] = canonical_json(self.settings.of(*who))
            after = sorted({record.token for key in part.needs for record in makers.get(key, ())})
            alone = part.key if self.parts.dependency == "afterok" else ""
            groups.setdefault((part.stage, asked[who], tuple(after), alone), []).append(part)
        return [(after, some) for (_, _, after, _), some in groups.items()]

    @staticmethod
    def _asked(works: Sequence[tuple[Work, list[Part]]], parameters: Mapping[str, Any]) -> dict[str, Any]:
        """The parameters with what the works need and nobody has said."""
        needs = works[0][0].resources if works else {}
        return {"cpus_per_task": max(1, int(needs.get("cpus", 1))), **parameters}

    def _submitted(self) -> bool:
        """Whether this folder has ever had a job."""
        return any(record.job for launch in launches(self.folder) for record in records(launch))

    def _farewell(self, queue: Queue | None) -> str:
        """How to follow, come back and cancel."""
        if not self._submitted():
            return "No job was submitted."
        running = f" ({queue.counts()})" if queue is not None and queue.alive else ""
        return f"The jobs go on without this process{running}.\n{self.parts.farewell(self.name)}"


def _records(makers: Mapping[str, Sequence[Record]], token: str) -> list[Record]:
    return list({r.token: r for found in makers.values() for r in found if r.token == token}.values())


def cancel_mark(folder: RunFolder) -> Path:
    """A file that tells a waiting launcher that the run was cancelled."""
    return folder.jobs_folder / CANCELLED


def _show(phase: Phase, work: float, left: Sequence[Part]) -> None:
    """Progress from what is left."""
    done = work - sum(part.piece.weight for part in left)
    phase.advance(max(0.0, done - phase.work_done), max(0, phase.count - len(left) - phase.count_done))
