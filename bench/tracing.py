"""Traces: what a few sequences looked like after every step.

A run stores what its samplers return, not how they got there. Since every sequence draws from a stream of its own, its
first sequences can be sampled again with their states kept, one method at a time and long after the run; that they end
in the stored samples is checked, so a trace is of the very text beside it. Only states that differ from the one before
are stored, with their step numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from tsdfm_bench.errors import BenchError, PluginError
from tsdfm_bench.guard import shielded
from tsdfm_bench.registry import one_line
from tsdfm_bench.results.store import CorruptFile, RunFolder, read_arrays, read_samples, write_arrays

if TYPE_CHECKING:
    from pathlib import Path

    from tsdfm_bench.api import Method
    from tsdfm_bench.job import Job
    from tsdfm_bench.plan import Cell


@dataclass(frozen=True)
class StoredTrace:
    """One sequence: its number, the (k,) steps and (k, length) states that differ from the one before."""

    sequence: int
    steps: np.ndarray
    states: np.ndarray


def record_traces(folder: RunFolder, count: int, plugins: list[Path], device: str = "auto") -> list[str]:
    """Sample the first sequences of every generator of a run again, and store their states in traces/.

    Args:
        folder: the run folder; cells whose traces are long enough are left alone.
        count: sequences per cell.
        plugins: local plug-in files, as for the run.
        device: "auto", "cpu", "cuda", ...

    Returns:
        sentences about cells that have no trace now.

    Raises:
        BenchError, StoreError: the plan cannot be made again, or a file not be written.
    """
    from tsdfm_bench.config import make_config
    from tsdfm_bench.job import Job
    from tsdfm_bench.meter import choose_device
    from tsdfm_bench.reproduce import sweep_keys
    from tsdfm_bench.sweep import prepare

    keys = {**sweep_keys(folder.read_plan()), "out": folder.root, "plugins": plugins}
    sweep = prepare(make_config(keys))
    job = Job(
        folder=folder,
        registry=sweep.registry,
        task=sweep.task,
        batches=sweep.plan.batches,
        batch_size=sweep.plan.batch_size,
        device=choose_device(device),
        threads=1,
    )
    notes: dict[str, list[str]] = {}
    loaded: tuple[str, Method] | None = None
    for planned in sorted(sweep.plan.cells, key=lambda planned: planned.group):
        cell = planned.cell
        if cell.kind != "method" or len(read_traces(folder, cell.id)) >= min(count, job.batch_size):
            continue
        try:
            if loaded is None or loaded[0] != planned.group:
                with shielded(f"method '{cell.label}'", job.registry.load("methods", cell.method)):
                    loaded = (planned.group, job.load(planned))
            _record(loaded[1], cell, job, min(count, job.batch_size))
        except BenchError as error:
            notes.setdefault(str(error), []).append(cell.describe())
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # whatever a plug-in raises
            notes.setdefault(one_line(error), []).append(cell.describe())
    return [f"No trace of {', '.join(names)}: {reason}." for reason, names in notes.items()]


def _record(method: Method, cell: Cell, job: Job, count: int) -> None:
    import torch

    from tsdfm_bench.guard import seed
    from tsdfm_bench.launch.batches import request_of

    request = replace(request_of(job, cell, 0, rows=count), trace=True)
    with shielded(f"method '{cell.label}'", method), torch.no_grad():
        if (reason := method.refuse(request)) is not None:
            raise PluginError(reason)
        seed(request.streams.key)
        batch = method.sample(request)
    if batch.trace is None:
        raise PluginError("the method keeps no trace")
    tokens = batch.tokens.cpu().numpy()
    path = job.folder.samples_path(cell.id, 0)
    if path.exists():
        stored = read_samples(path).tokens[:count]
        if not np.array_equal(stored, tokens[: len(stored)]):
            raise PluginError("sampled again, it ends in other tokens than those stored (another machine or version)")
    arrays: dict[str, np.ndarray] = {}
    for i, states in enumerate(batch.trace.cpu().numpy().astype(np.int32)):
        new = np.concatenate([[True], (states[1:] != states[:-1]).any(axis=1)])
        arrays[f"steps-{i}"] = (np.flatnonzero(new) + 1).astype(np.int32)
        arrays[f"states-{i}"] = states[new]
    write_arrays(job.folder.trace_path(cell.id), exclusive=False, **arrays)


def read_traces(folder: RunFolder, cell: str) -> list[StoredTrace]:
    """The stored traces of a cell; none if there is no file, or a damaged one."""
    path = folder.trace_path(cell)
    if not path.exists():
        return []
    try:
        return list(_traces(read_arrays(path)))
    except (CorruptFile, KeyError):
        return []


def _traces(arrays: dict[str, np.ndarray]) -> Iterator[StoredTrace]:
    for i in range(sum(1 for name in arrays if name.startswith("steps-"))):
        yield StoredTrace(i, arrays[f"steps-{i}"], arrays[f"states-{i}"])
