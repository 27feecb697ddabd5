"""Times that can be divided: alternating repeats, and the median of their ratios.

On a CPU with one thread a clock counts the processor's seconds for this process, which other programs on the machine
disturb much less than they disturb the wall's; otherwise it counts wall-clock seconds with the device synchronised.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Work = Callable[[], object]


@dataclass(frozen=True)
class Ratio:
    """A ratio of seconds.

    Args:
        median, low, high: over the repeats.
        repeats: how many.
    """

    median: float
    low: float
    high: float
    repeats: int

    @classmethod
    def of(cls, above: Sequence[float], below: Sequence[float]) -> Ratio:
        """above / below, repeat by repeat."""
        ratios = sorted(a / b for a, b in zip(above, below, strict=True))
        return cls(statistics.median(ratios), ratios[0], ratios[-1], len(ratios))

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.low:.3g}-{self.high:.3g})"


class Clock:
    """Seconds of some work.

    Args:
        device: torch device string the work runs on.
        threads: CPU threads it may use.
    """

    def __init__(self, device: str, threads: int) -> None:
        self.device = device
        self.processor = device == "cpu" and threads == 1

    @property
    def counts(self) -> str:
        """What its seconds are, for a footnote."""
        return "CPU seconds of one thread" if self.processor else "wall-clock seconds"

    def seconds(self, work: Work) -> float:
        """Of one execution."""
        if self.processor:
            begun = time.process_time()
            work()
            return time.process_time() - begun
        self._synchronise()
        begun = time.perf_counter()
        work()
        self._synchronise()
        return time.perf_counter() - begun

    def alternate(self, works: Sequence[Work], repeats: int) -> list[list[float]]:
        """Seconds of every work in every repeat; each repeat does all of them, one after the other."""
        taken: list[list[float]] = [[] for _ in works]
        for _ in range(repeats):
            for seconds, work in zip(taken, works, strict=True):
                seconds.append(self.seconds(work))
        return taken

    def _synchronise(self) -> None:
        import torch

        if self.device.startswith("cuda"):
            torch.cuda.synchronize(self.device)
        elif self.device.startswith("mps"):
            torch.mps.synchronize()
