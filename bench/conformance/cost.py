"""Cost: eight times the sequences may cost eight times as much, not sixty-four times.

Reported for every method; a verdict needs a clear case, since a shared machine is a poor clock: the check fails only if
time, or memory above that of the loaded method, grows by more than four times the growth of the batch.
"""

from __future__ import annotations

from tsdfm_bench.conformance.subject import Subject, require
from tsdfm_bench.meter import Meter

SMALL, LARGE = 4, 32
SLACK = 4
MEASURABLE_S = 0.002
MEASURABLE_BYTES = 64 << 20


def cost(subject: Subject) -> str:
    """Time and memory of a batch against one eight times as large."""
    growth = LARGE // SMALL
    (few_s, few_bytes), (many_s, many_bytes) = (_measure(subject, batch) for batch in (SMALL, LARGE))
    ratio = many_s / max(few_s, MEASURABLE_S)
    seen = f"{few_s * 1e3:.0f} ms for {SMALL} sequences, {many_s * 1e3:.0f} ms for {LARGE} ({ratio:.1f} times)"
    require(
        ratio <= SLACK * growth, f"{seen}: {growth} times the batch may cost at most {SLACK * growth} times as much"
    )
    extra = max(0, many_bytes - few_bytes)
    seen += f", {extra / 2**20:.0f} MiB more"
    heavy = extra > MEASURABLE_BYTES and _doubling(subject, many_bytes - few_bytes)
    require(not heavy, f"{seen}: memory grows faster than the batch")
    return seen


def _measure(subject: Subject, batch: int) -> tuple[float, int]:
    """Seconds (the best of three) and peak bytes of a batch."""
    best, peak = float("inf"), 0
    meter = Meter(subject.method.networks())
    subject.serve(subject.request(batch))
    for _ in range(3):
        with meter.measure(batch) as measured:
            subject.serve(subject.request(batch))
        best, peak = min(best, measured.seconds), max(peak, measured.peak_memory_bytes)
    return best, peak


def _doubling(subject: Subject, extra: int) -> bool:
    """Whether twice the large batch needs far more than twice what the large one needed beyond the small one."""
    _, large = _measure(subject, LARGE)
    _, twice = _measure(subject, 2 * LARGE)
    return twice - large > 2 * max(extra, MEASURABLE_BYTES)
