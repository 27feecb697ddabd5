"""How the cost of a run grows with length, vocabulary, batch and steps: seconds ~ x^exponent.

One of the four is varied, the others stay at the base point; networks have random weights. The exponent is the slope of
least squares in logarithms.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from tsdfm_bench.api import SampleRequest
from tsdfm_bench.registry import Registry
from tsdfm_bench.rng import Streams
from tsdfm_bench.speed.cases import SMALL_NETWORK, Case, Size, load_method
from tsdfm_bench.speed.clock import Clock

AXES = ("length", "vocabulary", "batch", "steps")
BASE = Size("scaling", 2048, 64, SMALL_NETWORK)
BASE_BATCH, BASE_STEPS = 8, 64
POINTS = {
    "length": (32, 64, 128, 256),
    "vocabulary": (1024, 4096, 16_384),
    "batch": (2, 8, 32),
    "steps": (8, 64, 512),
}
CASES = (
    Case("dfm", {"source": "uniform", "solver": "euler"}),
    Case("mdlm", {"source": "mask", "sampler": "cached"}),
    Case("sedd", {"source": "mask"}),
    Case("ar"),
)


@dataclass(frozen=True)
class Growth:
    """Cost of a method along one axis.

    Args:
        method, axis: names.
        points: (value, seconds of a run) pairs.
        calls: network calls of those runs.
        exponent: fitted.
    """

    method: str
    axis: str
    points: Sequence[tuple[int, float]]
    calls: Sequence[int]
    exponent: float


def fit_exponent(points: Sequence[tuple[float, float]]) -> float:
    """Slope of log(seconds) over log(value); needs two different values."""
    x, y = np.log(np.asarray(points, dtype=np.float64)).T
    return float(np.polyfit(x, y, 1)[0])


def measure_growth(registry: Registry, case: Case, axis: str, clock: Clock, repeats: int) -> Growth:
    """Seconds of a method at the points of an axis."""
    points: list[tuple[int, float]] = []
    calls: list[int] = []
    for value, size, batch, steps in settings(axis):
        method = load_method(registry, case, size, clock.device)
        counted = [0]
        network = next(iter(method.networks().values()))
        request = SampleRequest(
            Streams.of(0, "scaling", batch, 0, clock.device),
            size.length,
            None if case.source is None else steps,
            source=case.source,
        )

        def count(*_: object, counted: list[int] = counted) -> None:
            counted[0] += 1

        handle = network.register_forward_hook(count)
        method.sample(request)
        handle.remove()
        (seconds,) = clock.alternate([lambda m=method, r=request: m.sample(r)], repeats)  # type: ignore[misc]
        points.append((value, statistics.median(seconds)))
        calls.append(counted[0])
    return Growth(case.label, axis, points, calls, fit_exponent(points))


def settings(axis: str) -> Iterator[tuple[int, Size, int, int]]:
    """(value, size, batch, steps) along an axis."""
    for value in POINTS[axis]:
        size, batch, steps = BASE, BASE_BATCH, BASE_STEPS
        if axis == "length":
            size = replace(BASE, length=value)
        elif axis == "vocabulary":
            size = replace(BASE, vocab_size=value)
        elif axis == "batch":
            batch = value
        else:
            steps = value
        yield value, size, batch, steps
