"""Sampling in this process: cells one after another, batch by batch, each batch stored as soon as it is made.

Cells that need the same loaded method follow each other, and a method with nothing left to do is not loaded. Before the
first batch of a loaded method a short warm-up runs and is thrown away: it is neither timed nor counted, and streams
that are addressed by counters are not advanced by it.

Each unit (a cell, or a shard of a large one) is done under its lease, and what is missing is looked up after the lease
was taken: several processes may run this at once on one folder, and each batch is made once. What another process
works on is left to the end; then this one waits for it (`Job.patient`), or leaves it alone once that process has
shown that it lives. What a dead process held is taken over.

A failure belongs to its cell: it leaves error.txt, and the other cells go on. Only a file that cannot be written ends
the sweep, because the next cell could not be written either.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsdfm_bench.guard import guarded
from tsdfm_bench.job import Job
from tsdfm_bench.launch.batches import Ready, Sampler, draw_reference, free, read_costs, sampler_of, warm_up
from tsdfm_bench.launch.cost import batch_work, expected_calls
from tsdfm_bench.launch.failures import record_failure
from tsdfm_bench.launch.leases import Holder, Lease, LeaseLost
from tsdfm_bench.launch.work import shard_batches, unit_name
from tsdfm_bench.meter import Meter
from tsdfm_bench.results.store import CorruptFile, StoreError

if TYPE_CHECKING:
    from tsdfm_bench.console import Phase, Reporter
    from tsdfm_bench.launch.settings import LauncherSettings
    from tsdfm_bench.launch.work import Work
    from tsdfm_bench.plan import PlannedCell
    from tsdfm_bench.sweep import Sweep

__all__ = ["Inline", "Waiting", "batch_work", "expected_calls", "read_costs", "sample_cells"]

POLL_S = 0.5


class Inline:
    """The launcher `inline`: everything in this process.

    Args:
        settings: the `[launcher]` table.
    """

    name = "inline"

    def __init__(self, settings: LauncherSettings) -> None:
        self.settings = settings

    def sweep(self, sweep: Sweep, job: Job, reporter: Reporter) -> None:
        """See `Launcher.sweep`."""
        from tsdfm_bench.scoring import score_cells
        from tsdfm_bench.sweep import scorable

        sample_cells(sweep.plan.cells, job, reporter)
        cells = scorable(sweep, job)
        score_cells(cells, sweep.judges, job, reporter, hidden=sweep.hidden)

    def train(self, works: Sequence[Work], folder: Path, reporter: Reporter) -> list[dict[str, Any]]:
        """See `Launcher.train`."""
        from tsdfm_bench.launch.training import train_stage_of

        return [train_stage_of(work, reporter) for work in works]


@dataclass(frozen=True)
class Unit:
    """What is done under one lease: the missing batches of a shard of a cell."""

    planned: PlannedCell
    shard: int
    missing: int
    batch_size: int

    @property
    def name(self) -> str:
        """Of its lease."""
        return unit_name(self.planned.cell.id, self.shard)

    @property
    def group(self) -> str:
        """Units of equal groups share one loaded method."""
        return self.planned.group if self.planned.cell.kind == "method" else "references"

    @property
    def work(self) -> float:
        """What it is expected to cost."""
        return self.missing * batch_work(self.planned.cell)

    @property
    def sequences(self) -> int:
        """How many it makes."""
        return self.missing * self.batch_size


def sample_cells(
    cells: Iterable[PlannedCell],
    job: Job,
    reporter: Reporter,
    shards: Mapping[str, AbstractSet[int]] | None = None,
) -> list[str]:
    """Make every missing batch; failures are left in the cells' error.txt.

    Args:
        cells: the cells.
        job: of the run.
        reporter: progress.
        shards: cell id -> shards of it that are this process's business; None = all of every cell.

    Returns:
        names of the units that are left to other living processes; none if the job is patient.

    Raises:
        StoreError: a file cannot be written.
        KeyboardInterrupt: finished batches are kept.
    """
    todo = _todo(cells, job, shards)
    if not todo:
        return []
    with reporter.phase("sampling", sum(u.work for u in todo), sum(u.sequences for u in todo), "seq") as phase:
        waiting = Waiting(job)
        while todo:
            groups: dict[str, list[Unit]] = {}
            for unit in todo:
                groups.setdefault(unit.group, []).append(unit)
            todo = [unit for group in groups.values() for unit in _run_group(job, group, phase, waiting)]
            if not waiting.again({unit.name for unit in todo}, phase):
                break
    return [unit.name for unit in todo]


def _todo(cells: Iterable[PlannedCell], job: Job, shards: Mapping[str, AbstractSet[int]] | None) -> list[Unit]:
    """What is missing; failures that are remembered are left out, and counted aloud."""
    units, remembered = [], 0
    for planned in {planned.cell.id: planned for planned in cells}.values():
        missing = job.missing(planned.cell)
        if missing and job.remembers_failure(planned.cell):
            remembered += 1
            continue
        for shard, batches in shard_batches(job.batches):
            count = sum(batch in batches for batch in missing)
            if count and (shards is None or shard in shards.get(planned.cell.id, ())):
                units.append(Unit(planned, shard, count, job.batch_size))
    if remembered and not job.name:
        many = "1 cell" if remembered == 1 else f"{remembered} cells"
        job.say(f"Not tried again, because the same code failed before: {many} (--retry-failed tries again).")
    return units


class Waiting:
    """What other processes hold, and when to look again.

    Args:
        job: of the run.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.holders: dict[str, Holder] = {}
        self.told: set[str] = set()

    def held(self, unit: str, holder: Holder) -> None:
        """A unit could not be taken."""
        self.holders[unit] = holder

    def again(self, units: AbstractSet[str], phase: Phase) -> bool:
        """Sleep a little before the next look at units that others hold; False if they are to be left alone."""
        if not units:
            return False
        holders = [self.holders[unit] for unit in sorted(units) if unit in self.holders]
        leases = self.job.leases
        if not self.job.patient and holders and all(leases.alive(holder) for holder in holders):
            return False
        for who in sorted({str(holder) for holder in holders} - self.told):
            self.told.add(who)
            count = sum(str(holder) == who for holder in holders)
            self.job.say(f"Waiting for {who}, which works on {count} of the cells that are left.")
        phase.doing(f"waiting for {holders[0]}" if holders else "waiting")
        time.sleep(min(POLL_S, leases.lease_s / 4))
        return True


@dataclass
class _Loader:
    """Loads a method when its first cell is there, and not before."""

    job: Job
    phase: Phase
    ready: Ready | None = None
    error: BaseException | None = None
    tried: bool = field(default=False)

    def sampler(self, planned: PlannedCell, shard: int) -> Sampler:
        """How a cell is sampled.

        Raises:
            BaseException: the method cannot be loaded; the same for every cell of the group.
        """
        if planned.cell.kind == "reference":
            return draw_reference
        if not self.tried:
            self.tried = True
            try:
                self.ready = self._load(planned, shard)
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # whatever a plug-in raises
                self.error = error
        if self.ready is None:
            assert self.error is not None
            raise self.error
        return sampler_of(self.ready)

    def _load(self, planned: PlannedCell, shard: int) -> Ready:
        job, cell = self.job, planned.cell
        self.phase.doing(f"loading {cell.method}")
        with guarded(job.folder, cell.id, job.cell_timeout_s, counted=False, shard=shard):
            method = job.load(planned)
            meter = Meter(method.networks(), job.device)
        self.phase.doing(f"warming up {cell.method}")
        warm_up(method, job, cell, shard)
        self.phase.begin()
        return Ready(method, meter, job.batch_size)


def _run_group(job: Job, group: Sequence[Unit], phase: Phase, waiting: Waiting) -> list[Unit]:
    """Run units that share a loaded method; returns those that other processes hold."""
    loader = _Loader(job, phase)
    busy = []
    for unit in group:
        cell = unit.planned.cell
        left = phase.expect(unit.work, unit.sequences)
        if not job.missing(cell, unit.shard):  # another process was faster
            left.drop()
            continue
        lease = job.leases.take(unit.name, doing=cell.describe(), job=job.name)
        if isinstance(lease, Holder):
            waiting.held(unit.name, lease)
            busy.append(unit)
            continue
        with lease:
            missing = job.missing(cell, unit.shard)
            if lease.taken_over is not None and missing:
                job.say(_taken_over(lease, unit, missing, job))
            try:
                if missing:
                    _attempt(job, unit, missing, phase, lease, loader)
            except LeaseLost as error:
                job.say(f"{cell.describe()}: {error}.")
                busy.append(unit)
                continue
        left.drop()
    if loader.ready is not None:
        loader.ready = None
        free(job.device)
    return busy


def _taken_over(lease: Lease, unit: Unit, missing: Sequence[int], job: Job) -> str:
    holder = lease.taken_over
    assert holder is not None
    why = "which has ended" if holder.gone else f"silent for {holder.lease_s:g} s"
    of = len(dict(shard_batches(job.batches))[unit.shard])
    return (
        f"Took over {unit.planned.cell.describe()} from {holder} ({why}); {of - len(missing)} of {of} batches are kept."
    )


def _attempt(job: Job, unit: Unit, missing: list[int], phase: Phase, lease: Lease, loader: _Loader) -> None:
    """Run one unit; a failure is recorded.

    Raises:
        LeaseLost: another process has taken over.
        StoreError: a file cannot be written.
        KeyboardInterrupt: finished batches are kept.
    """
    cell = unit.planned.cell
    try:
        sample = loader.sampler(unit.planned, unit.shard)
        phase.doing(cell.describe())
        with guarded(job.folder, cell.id, job.cell_timeout_s, shard=unit.shard):
            sample(job, cell, missing, phase, lease)
    except (LeaseLost, KeyboardInterrupt):
        raise
    except CorruptFile as error:
        record_failure(job, cell, error)
    except StoreError:
        raise
    except BaseException as error:  # whatever a plug-in raises, asyncio's CancelledError as well
        record_failure(job, cell, error)
