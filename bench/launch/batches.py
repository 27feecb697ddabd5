"""The batches of one cell: asked for, sampled, checked, stored; and what they cost.

Batch NNNN of a cell always holds the sequences NNNN x batch_size onwards, and each sequence draws from its own stream,
so what is stored does not depend on who made it when. If memory runs out, a batch is sampled in halves, quarters, ...:
the draws stay the same, the network sees fewer sequences at once, and the cost says so. A batch is written once; a
process that comes second finds it there.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsdfm_bench.api import Method, SampleRequest
from tsdfm_bench.conditioning import pinned_tokens, reference_batch
from tsdfm_bench.contract import check_batch
from tsdfm_bench.errors import PluginError
from tsdfm_bench.guard import contained, guarded, seed
from tsdfm_bench.launch.cost import batch_work, expected_calls
from tsdfm_bench.launch.failures import memory_ran_out
from tsdfm_bench.launch.work import SHARD_BATCHES
from tsdfm_bench.meter import BatchCost, Meter
from tsdfm_bench.results.store import CorruptFile, RunFolder, read_json, write_json, write_samples
from tsdfm_bench.texts import encode, pack

if TYPE_CHECKING:
    import numpy as np

    from tsdfm_bench.console import Phase
    from tsdfm_bench.job import Job
    from tsdfm_bench.launch.leases import Lease
    from tsdfm_bench.plan import Cell

WARM_UP_STEPS = 2
WARM_UP_ROWS = 2

Damaged = Callable[[CorruptFile], None]


@dataclass
class Ready:
    """A loaded method.

    Args:
        method: loaded.
        meter: on its networks.
        rows: sequences that fit into memory at once, as far as is known.
    """

    method: Method
    meter: Meter
    rows: int


def describe(job: Job, cell: Cell) -> None:
    """Write cell.json unless it already says this."""
    about = {"batches": job.batches, "batch_size": job.batch_size}
    content = {**cell.identity(), "id": cell.id, "label": cell.label, **about}
    try:
        if read_json(job.folder.cell_path(cell.id)) == content:
            return
    except FileNotFoundError:
        pass
    except CorruptFile as error:
        job.damaged(error)
    job.folder.write_cell(cell.id, content)


def sample_batches(job: Job, cell: Cell, missing: list[int], phase: Phase, lease: Lease, *, ready: Ready) -> None:
    """Sample some batches of a cell.

    Raises:
        LeaseLost: another process has taken over.
        Exception: the method's own; batches before it are kept.
    """
    describe(job, cell)
    job.folder.clear_error(cell.id)
    with contained():
        reason = ready.method.refuse(request_of(job, cell, missing[0]))
    if reason is not None:
        job.folder.write_done(cell.id, {"refused": str(reason), "version": job.version(cell)})
        return
    calls: float = expected_calls(cell)
    for done, batch in enumerate(missing):
        lease.tell(doing=cell.describe(), done=done, of=len(missing), job=job.name)
        tokens, lengths, texts, cost = _in_memory(job, cell, batch, ready, phase, calls)
        calls = next(iter(cost.calls.values()), calls)
        lease.check()
        _add_cost(job, cell, batch, cost)
        _store(job, cell, batch, tokens, lengths, texts)
        phase.advance(batch_work(cell), job.batch_size)
    job.missing(cell)  # marks the cell as done if nothing is


def draw_reference(job: Job, cell: Cell, missing: list[int], phase: Phase, lease: Lease) -> None:
    """Draw some batches of a reference row."""
    from tsdfm_bench.api import SampleBatch

    describe(job, cell)
    job.folder.clear_error(cell.id)
    for done, batch in enumerate(missing):
        lease.tell(doing=cell.describe(), done=done, of=len(missing), job=job.name)
        drawn = SampleBatch(*reference_batch(cell, job.task, batch * job.batch_size, job.batch_size))
        shape = (job.batch_size, cell.length)
        tokens, lengths = check_batch(drawn, shape, job.task.info.vocab_size, who=f"reference '{cell.method}'")
        lease.check()
        _store(job, cell, batch, tokens, lengths)
        phase.advance(batch_work(cell), job.batch_size)
    job.missing(cell)


def _store(
    job: Job, cell: Cell, batch: int, tokens: np.ndarray, lengths: np.ndarray, texts: list[str] | None = None
) -> None:
    with contextlib.suppress(FileExistsError):  # made by a process that was thought dead: the same bits
        write_samples(job.folder.samples_path(cell.id, batch), tokens, lengths, exclusive=True, **pack(texts))


# ---------------------------------------------------------------------------------------------------- sampling


def _in_memory(
    job: Job, cell: Cell, batch: int, ready: Ready, phase: Phase, calls: float
) -> tuple[np.ndarray, np.ndarray, list[str] | None, BatchCost]:
    """Tokens, lengths, texts and cost of a batch, in as many pieces as memory asks for."""
    while True:
        try:
            return _pieces(job, cell, batch, ready, phase, calls)
        except (Exception, SystemExit) as error:
            if ready.rows <= 1 or not memory_ran_out(error):
                raise
        ready.rows = -(-ready.rows // 2)  # outside the except block, which would keep the failed tensors alive
        free(job.device, all=True)
        job.say(
            f"Memory ran out: {cell.describe()} goes on with {ready.rows} sequences at a time, with the same draws."
        )


def _pieces(
    job: Job, cell: Cell, batch: int, ready: Ready, phase: Phase, calls: float
) -> tuple[np.ndarray, np.ndarray, list[str] | None, BatchCost]:
    import numpy as np
    import torch

    rows: list[tuple[np.ndarray, np.ndarray]] = []
    costs: list[BatchCost] = []
    texts: list[str] = []
    pieces = -(-job.batch_size // ready.rows)
    tick = _ticker(cell, phase, calls * pieces)
    for first in range(0, job.batch_size, ready.rows):
        size = min(ready.rows, job.batch_size - first)
        request = request_of(job, cell, batch, rows=size, first=first)
        pinned = None  # copied before the method could write into its request
        if request.prefix is not None and request.pinned is not None:
            pinned = (request.prefix.clone(), request.pinned.clone())
        seed(request.streams.key + batch + (first << 32))
        with contained(), ready.meter.measure(size, tick) as cost, torch.no_grad():
            result = ready.method.sample(request)
        result, given = encode(result, job.task, cell.length)
        texts += given or []
        rows.append(check_batch(result, (size, cell.length), job.task.info.vocab_size, pinned))
        costs.append(cost)
    tokens, lengths = (np.concatenate(arrays) for arrays in zip(*rows, strict=True))
    return tokens, lengths, texts or None, joined(costs)


def joined(costs: list[BatchCost]) -> BatchCost:
    """The cost of a batch from those of its pieces."""
    if len(costs) == 1:
        return costs[0]
    first = costs[0]
    return BatchCost(
        sequences=sum(cost.sequences for cost in costs),
        calls={role: sum(cost.calls[role] for cost in costs) for role in first.calls},
        rows={role: sum(cost.rows[role] for cost in costs) for role in first.rows},
        seconds=sum(cost.seconds for cost in costs),
        peak_memory_bytes=max(cost.peak_memory_bytes for cost in costs),
        device=first.device,
        threads=first.threads,
        pieces=len(costs),
    )


def _ticker(cell: Cell, phase: Phase, calls: float) -> Callable[[], None]:
    """Progress inside a batch that takes about so many network calls; the last tenth waits for the end."""
    work, made = batch_work(cell), count(1)
    return lambda: phase.progress(work * min(0.9, next(made) / max(calls, 1)))


def request_of(
    job: Job, cell: Cell, batch: int, rows: int | None = None, steps: int | None = None, first: int = 0
) -> SampleRequest:
    """The request of one batch, or of `rows` of its sequences from `first` on, possibly with other steps."""
    from tsdfm_bench.rng import Streams

    start, rows = batch * job.batch_size + first, rows or job.batch_size
    pinned = pinned_tokens(cell, job.task, start, rows)
    return SampleRequest(
        streams=Streams.of(cell.seed, cell.id, rows, start, job.device),
        length=cell.length,
        steps=cell.steps if steps is None else steps,
        temperature=1.0 if cell.temperature is None else cell.temperature,
        top_p=cell.top_p,
        top_p_rule="exclusive" if cell.top_p_rule == "exclusive" else "inclusive",
        source=cell.source,
        draw="legacy-fp32" if cell.draw == "legacy-fp32" else "fp64",
        prefix=None if pinned is None else pinned[0].to(job.device),
        pinned=None if pinned is None else pinned[1].to(job.device),
    )


def warm_up(method: Method, job: Job, cell: Cell, shard: int = 0) -> None:
    """A few steps (or, without steps, a few sequences) of the first batch; its faults will show in the real one."""
    import torch

    try:
        with guarded(job.folder, cell.id, job.cell_timeout_s, counted=False, shard=shard), torch.no_grad():
            if cell.steps is None:
                request = request_of(job, cell, 0, rows=min(WARM_UP_ROWS, job.batch_size))
            else:
                request = request_of(job, cell, 0, steps=min(WARM_UP_STEPS, cell.steps))
            if method.refuse(request) is None:
                method.sample(request)
    except KeyboardInterrupt:
        raise
    except BaseException:  # whatever a plug-in raises
        pass


def free(device: str, all: bool = False) -> None:
    """Give back what was held on a GPU, or with `all` whatever can be given back."""
    if all or device.startswith("cuda"):
        gc.collect()
    if device.startswith("cuda"):
        import torch

        torch.cuda.empty_cache()


# -------------------------------------------------------------------------------------------------------- cost


def read_costs(folder: RunFolder, cell: str, damaged: Damaged | None = None) -> dict[int, BatchCost]:
    """Measured cost by batch; empty if none was stored.

    Args:
        folder: the run folder.
        cell: its id.
        damaged: what to do with a damaged file (which then counts as none); None = raise.

    Raises:
        CorruptFile: a damaged file.
    """
    costs: dict[int, BatchCost] = {}
    for path in folder.cost_paths(cell):
        try:
            costs |= _costs_in(path)
        except CorruptFile as error:
            if damaged is None:
                raise
            damaged(error)
    return costs


def _costs_in(path: Path) -> dict[int, BatchCost]:
    stored: Any = read_json(path).get("batches")
    if not isinstance(stored, dict):
        raise CorruptFile.of(path, "it holds no costs")
    try:
        return {int(batch): BatchCost(**cost) for batch, cost in stored.items()}
    except (TypeError, ValueError) as error:
        raise CorruptFile.of(path, str(error)) from error


def _add_cost(job: Job, cell: Cell, batch: int, cost: BatchCost) -> None:
    """Store a batch's cost before its samples: a kill in between makes the batch again and replaces the cost."""
    if not all(isinstance(calls, int) for calls in cost.calls.values()):
        raise PluginError("the counted calls are no whole numbers")
    path = job.folder.cost_path(cell.id, batch // SHARD_BATCHES)
    costs: dict[int, BatchCost] = {}
    if path.exists():
        try:
            costs = _costs_in(path)
        except CorruptFile as error:
            job.damaged(error)
    costs[batch] = cost
    write_json(path, {"batches": {str(k): costs[k].to_json() for k in sorted(costs)}})


Sampler = Callable[["Job", "Cell", list[int], "Phase", "Lease"], None]


def sampler_of(ready: Ready) -> Sampler:
    """`sample_batches` with a loaded method."""
    return partial(sample_batches, ready=ready)
