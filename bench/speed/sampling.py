"""Overhead of a sampling run, and its ratio to plain loops."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from tsdfm_bench.api import Method, SampleRequest
from tsdfm_bench.launch.failures import memory_ran_out
from tsdfm_bench.rng import Streams
from tsdfm_bench.speed.cases import Case, Size
from tsdfm_bench.speed.clock import Clock, Ratio
from tsdfm_bench.speed.plain import Problem


@dataclass(frozen=True)
class SpeedRow:
    """One sampler at one size, batch and number of steps.

    Args:
        size, method: names.
        batch, length, vocab_size: of the run.
        steps: asked for; None for methods without steps.
        calls: network calls of the batch.
        sequence_calls: calls per sequence: rows that leave the batch early do not count.
        seconds: of the run, median.
        overhead: run / its network calls alone, made again on the same inputs.
        ratio_plain: plain loop of equal law (fp64) / run.
        ratio_published: loop as published (fp32 race, MDLM with its cache) / run, where that is another loop.
        plain_steps: how many steps of the plain loops were timed; the rest was computed from them.
        note: why a ratio is missing.
    """

    size: str
    method: str
    batch: int
    length: int
    vocab_size: int
    steps: int | None
    calls: int
    sequence_calls: float
    seconds: float
    overhead: Ratio
    ratio_plain: Ratio | None = None
    ratio_published: Ratio | None = None
    plain_steps: int | None = None
    note: str = ""


class Recorded:
    """The network calls of a run, to be made again.

    Args:
        network: whose calls.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Remember the calls made inside."""
        handle = self.network.register_forward_pre_hook(
            lambda _, args, kwargs: self.calls.append((args, kwargs)), with_kwargs=True
        )
        try:
            yield
        finally:
            handle.remove()

    @property
    def rows(self) -> int:
        """Sequences that went through the network, over all calls."""
        return sum(int(args[0].shape[0]) for args, _ in self.calls)

    def again(self) -> None:
        """Make the calls, and nothing else."""
        for value in self._memories():
            value.length = 0  # a key-value cache is filled again from its start
        with torch.no_grad():
            for args, kwargs in self.calls:
                self.network(*args, **kwargs)

    def _memories(self) -> Iterable[Any]:
        found = {id(value): value for args, _ in self.calls for value in args[1:] if hasattr(value, "length")}
        return found.values()


def measure(
    case: Case,
    method: Method,
    size: Size,
    batch: int,
    steps: int | None,
    clock: Clock,
    repeats: int,
    plain_steps: int,
) -> SpeedRow:
    """Time one run against its calls and against its plain loops.

    Args:
        case, method, size: what is measured.
        batch, steps: of the run.
        clock, repeats: how it is timed.
        plain_steps: at most so many steps of the plain loops are made in each repeat.
    """
    request = SampleRequest(Streams.of(0, "speed", batch, 0, clock.device), size.length, steps, source=case.source)
    network = next(iter(method.networks().values()))
    recorded = Recorded(network)
    with recorded.recording():
        method.sample(request)  # the warm-up too
    seconds, bare = clock.alternate([lambda: method.sample(request), recorded.again], repeats)
    row = SpeedRow(
        size.name,
        case.label,
        batch,
        size.length,
        size.vocab_size,
        steps,
        len(recorded.calls),
        recorded.rows / batch,
        statistics.median(seconds),
        Ratio.of(seconds, bare),
    )
    del recorded
    if case.plain is None or steps is None:
        return row
    problem = partial(
        Problem,
        network,
        batch,
        size.length,
        steps,
        size.vocab_size,
        case.source == "mask",
        clock.device,
        limit=min(steps, plain_steps),
    )
    loops = [(case.plain, torch.float64), *([case.published] if case.published else [])]
    try:
        found = [_against(method, request, loop, problem(dtype=dtype), clock, repeats) for loop, dtype in loops]
    except (RuntimeError, MemoryError) as error:
        if not memory_ran_out(error):
            raise
        return replace(row, note="plain loop: out of memory")
    published = found[1] if case.published else None
    return replace(row, ratio_plain=found[0], ratio_published=published, plain_steps=min(steps, plain_steps))


def _against(method: Method, request: SampleRequest, loop: Any, problem: Problem, clock: Clock, repeats: int) -> Ratio:
    @torch.no_grad()
    def plainly() -> None:
        loop(problem)

    own, theirs = clock.alternate([lambda: method.sample(request), plainly], repeats)
    share = problem.steps / (problem.limit or problem.steps)
    return Ratio.of([seconds * share for seconds in theirs], own)
