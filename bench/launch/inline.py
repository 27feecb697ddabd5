"""Sampling in this process: cells one after another, batch by batch, each batch stored as soon as it is made.

Batch NNNN of a cell always holds the sequences NNNN x batch_size onwards, sampled together, so a run that was killed
and one that was not leave the same tokens; whatever is stored is never made again. Cells that need the same loaded
method follow each other, and a method with nothing left to do is not loaded. Before the first batch of a loaded method
a short warm-up runs and is thrown away: it is neither timed nor counted, and streams that are addressed by counters
are not advanced by it.

A failure belongs to its cell: it leaves error.txt, and the other cells go on. Only a file that cannot be written ends
the sweep, because the next cell could not be written either.
"""

from __future__ import annotations

import contextlib
import gc
import traceback
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, cast

from tsdfm_bench.api import Method, SampleRequest
from tsdfm_bench.conditioning import pinned_tokens, reference_batch
from tsdfm_bench.contract import check_batch
from tsdfm_bench.errors import BenchError, PluginError
from tsdfm_bench.guard import contained, guarded, seed
from tsdfm_bench.job import Job
from tsdfm_bench.meter import BatchCost, Meter
from tsdfm_bench.plan import ORACLE
from tsdfm_bench.results.store import CorruptFile, RunFolder, StoreError, read_json, write_json, write_samples
from tsdfm_bench.summary import MEMORY_HINT

if TYPE_CHECKING:
    from tsdfm_bench.api import ExactHook
    from tsdfm_bench.console import Phase, Reporter
    from tsdfm_bench.plan import Cell, PlannedCell

Run = Callable[["Job", "Cell", list[int], "Phase"], None]

WARM_UP_STEPS = 2
WARM_UP_ROWS = 2


def expected_calls(cell: Cell) -> int:
    """About how many network calls a batch takes, for progress only.

    Samplers may skip steps in which nothing changes: from the mask source each position changes once, from others a few
    times (four are about right at 1,024 steps).
    """
    if cell.steps is None:
        return cell.length
    return min(cell.steps, cell.length if cell.source == "mask" else 4 * cell.length)


def batch_work(cell: Cell) -> float:
    """Expected cost of a batch in units of one network call on whole sequences, for progress only."""
    if cell.kind == "reference":
        return 0.5
    calls = expected_calls(cell)
    return 1.0 + (calls if cell.steps is not None else calls / 8)  # without steps: one token a call


def sample_cells(cells: Iterable[PlannedCell], job: Job, reporter: Reporter) -> None:
    """Make every missing batch; failures are left in the cells' error.txt.

    Raises:
        StoreError: a file cannot be written.
        KeyboardInterrupt: finished batches are kept.
    """
    todo = {planned.cell.id: (planned, missing) for planned in cells if (missing := job.missing(planned.cell))}
    if not todo:
        return
    groups: dict[str, list[tuple[PlannedCell, list[int]]]] = {}
    for planned, missing in todo.values():
        groups.setdefault(planned.group if planned.cell.kind == "method" else "references", []).append(
            (planned, missing)
        )
    work = sum(len(missing) * batch_work(planned.cell) for planned, missing in todo.values())
    sequences = job.batch_size * sum(len(missing) for _, missing in todo.values())
    with reporter.phase("sampling", work, sequences, "seq") as phase:
        for name, group in groups.items():
            if name == "references":
                for planned, missing in group:
                    _attempt(job, planned.cell, missing, phase, _reference)
            else:
                _run_group(job, group, phase)
                _free(job.device)


def _run_group(job: Job, group: list[tuple[PlannedCell, list[int]]], phase: Phase) -> None:
    """Load a method once and run its cells."""
    first = group[0][0]
    phase.doing(f"loading {first.cell.method}")
    try:
        with guarded(job.folder, first.cell.id, job.cell_timeout_s, counted=False):
            method = _load(job, first)
            meter = Meter(method.networks(), job.device)
    except (Exception, SystemExit) as error:
        for planned, missing in group:
            left = phase.expect(len(missing) * batch_work(planned.cell), len(missing) * job.batch_size)
            record_failure(job.folder, planned.cell, error, job.batches)
            left.drop()
        return
    phase.doing(f"warming up {first.cell.method}")
    _warm_up(method, job, first.cell)
    phase.begin()
    for planned, missing in group:
        _attempt(job, planned.cell, missing, phase, partial(_method, method=method, meter=meter))


def _load(job: Job, planned: PlannedCell) -> Method:
    """The method of a cell, around its weights or around the task's exact predictions."""
    cls = job.registry.load("methods", planned.cell.method)
    params = dict(planned.params)
    if params.get("checkpoint") == ORACLE:
        made: Method = cls.from_oracle(cast("ExactHook", job.task).oracle, params, job.device)
        return made
    loaded: Method = cls.load(params, job.device)
    return loaded


def _free(device: str) -> None:
    """Give back what the last method held on a GPU."""
    if device.startswith("cuda"):
        import torch

        gc.collect()
        torch.cuda.empty_cache()


def _attempt(job: Job, cell: Cell, missing: list[int], phase: Phase, run: Run) -> None:
    """Run one cell; a failure is recorded and what it leaves undone is taken off the progress."""
    phase.doing(cell.describe())
    left = phase.expect(len(missing) * batch_work(cell), len(missing) * job.batch_size)
    try:
        with _heartbeat(job.folder, cell), guarded(job.folder, cell.id, job.cell_timeout_s):
            run(job, cell, missing, phase)
    except CorruptFile as error:
        record_failure(job.folder, cell, error, job.batches)
    except StoreError:
        raise
    except (Exception, SystemExit) as error:
        record_failure(job.folder, cell, error, job.batches)
    left.drop()


@contextlib.contextmanager
def _heartbeat(folder: RunFolder, cell: Cell) -> Iterator[None]:
    folder.beat(cell.id)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            folder.heartbeat_path(cell.id).unlink(missing_ok=True)


def record_failure(folder: RunFolder, cell: Cell, error: BaseException, batches: int) -> None:
    """Write error.txt: the message of our own errors, else the traceback and, if memory ran out, what to type."""
    _describe(folder, cell, batches)
    if isinstance(error, BenchError | StoreError):
        text = str(error)
    else:
        text = "".join(traceback.format_exception(error)).rstrip()
        if isinstance(error, MemoryError) or "out of memory" in str(error).lower():
            text += f"\n{MEMORY_HINT}: choose a smaller --batch-size (and another --out folder)."
    folder.write_error(cell.id, text + "\n")


def _describe(folder: RunFolder, cell: Cell, batches: int) -> None:
    """Write cell.json unless it already says this."""
    content = {**cell.identity(), "id": cell.id, "label": cell.label, "batches": batches}
    path = folder.cell_path(cell.id)
    if path.exists():
        with contextlib.suppress(CorruptFile):
            if read_json(path) == content:
                return
    folder.write_cell(cell.id, content)


# ------------------------------------------------------------------------------------------------------- cells


def _method(job: Job, cell: Cell, missing: list[int], phase: Phase, *, method: Method, meter: Meter) -> None:
    """Sample the missing batches of one cell."""
    import torch

    _describe(job.folder, cell, job.batches)
    job.folder.clear_error(cell.id)
    reason = method.refuse(_request(job, cell, missing[0]))
    if reason is not None:
        job.folder.write_done(cell.id, {"refused": str(reason), "version": job.version(cell)})
        return
    calls: float = expected_calls(cell)
    for batch in missing:
        request = _request(job, cell, batch)
        seed(request.streams.key + batch)
        with contained(), meter.measure(job.batch_size, _ticker(cell, phase, calls)) as cost, torch.no_grad():
            result = method.sample(request)
        pinned = None if request.prefix is None or request.pinned is None else (request.prefix, request.pinned)
        tokens, lengths = check_batch(result, (job.batch_size, cell.length), job.task.info.vocab_size, pinned)
        calls = next(iter(cost.calls.values()), calls)
        _add_cost(job.folder, cell, batch, cost)
        write_samples(job.folder.samples_path(cell.id, batch), tokens, lengths)
        job.folder.beat(cell.id)
        phase.advance(batch_work(cell), job.batch_size)
    job.folder.write_done(cell.id, job.done_mark())


def _ticker(cell: Cell, phase: Phase, calls: float) -> Callable[[], None]:
    """Progress inside a batch that takes about so many network calls; the last tenth waits for the end."""
    work, made = batch_work(cell), count(1)
    return lambda: phase.progress(work * min(0.9, next(made) / max(calls, 1)))


def _reference(job: Job, cell: Cell, missing: list[int], phase: Phase) -> None:
    """Draw the missing batches of one reference row."""
    from tsdfm_bench.api import SampleBatch

    _describe(job.folder, cell, job.batches)
    job.folder.clear_error(cell.id)
    for batch in missing:
        drawn = SampleBatch(*reference_batch(cell, job.task, batch * job.batch_size, job.batch_size))
        shape = (job.batch_size, cell.length)
        tokens, lengths = check_batch(drawn, shape, job.task.info.vocab_size, who=f"reference '{cell.method}'")
        write_samples(job.folder.samples_path(cell.id, batch), tokens, lengths)
        phase.advance(batch_work(cell), job.batch_size)
    job.folder.write_done(cell.id, job.done_mark())


def _request(job: Job, cell: Cell, batch: int, rows: int | None = None, steps: int | None = None) -> SampleRequest:
    """The request of one batch, or of its first rows with other steps (the warm-up)."""
    from tsdfm_bench.rng import Streams

    first, rows = batch * job.batch_size, rows or job.batch_size
    pinned = pinned_tokens(cell, job.task, first, rows)
    assert cell.temperature is not None
    return SampleRequest(
        streams=Streams.of(cell.seed, cell.id, rows, first, job.device),
        length=cell.length,
        steps=cell.steps if steps is None else steps,
        temperature=cell.temperature,
        top_p=cell.top_p,
        top_p_rule="exclusive" if cell.top_p_rule == "exclusive" else "inclusive",
        source=cell.source,
        draw="legacy-fp32" if cell.draw == "legacy-fp32" else "fp64",
        prefix=None if pinned is None else pinned[0].to(job.device),
        pinned=None if pinned is None else pinned[1].to(job.device),
    )


def _warm_up(method: Method, job: Job, cell: Cell) -> None:
    """A few steps (or, without steps, a few sequences) of the first batch; its faults will show in the real one."""
    import torch

    with (
        contextlib.suppress(Exception, SystemExit),
        guarded(job.folder, cell.id, job.cell_timeout_s, counted=False),
        torch.no_grad(),
    ):
        if cell.steps is None:
            request = _request(job, cell, 0, rows=min(WARM_UP_ROWS, job.batch_size))
        else:
            request = _request(job, cell, 0, steps=min(WARM_UP_STEPS, cell.steps))
        if method.refuse(request) is None:
            method.sample(request)


# -------------------------------------------------------------------------------------------------------- cost


def read_costs(folder: RunFolder, cell: str) -> dict[int, BatchCost]:
    """Measured cost by batch; empty if none was stored."""
    path = folder.cost_path(cell)
    if not path.exists():
        return {}
    stored = read_json(path).get("batches")
    if not isinstance(stored, dict):
        raise CorruptFile.of(path, "it holds no costs")
    try:
        return {int(batch): BatchCost(**cost) for batch, cost in stored.items()}
    except (TypeError, ValueError) as error:
        raise CorruptFile.of(path, str(error)) from error


def _add_cost(folder: RunFolder, cell: Cell, batch: int, cost: BatchCost) -> None:
    """Store a batch's cost before its samples: a kill in between makes the batch again and replaces the cost."""
    if not all(isinstance(count, int) for count in cost.calls.values()):
        raise PluginError("the counted calls are no whole numbers")
    costs = {**read_costs(folder, cell.id), batch: cost}
    write_json(folder.cost_path(cell.id), {"batches": {str(k): costs[k].to_json() for k in sorted(costs)}})
