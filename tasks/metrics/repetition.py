"""Repetition and diversity within a sequence, on the task's tokens.

* distinct-n: different n-grams of a sequence / its n-grams, mean over sequences. 1 = nothing occurs twice.
* repetition rate rep-4: 1 - distinct-4 (Welleck et al., arXiv 1908.04319, seq-rep-4).
* longest repeat: tokens of the longest n-gram that occurs at two places of a sequence; the two may overlap.
* mean length: tokens before the sequence's own end.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from tsdfm_bench.api import CellData, Measurement, MetricInfo
from tsdfm_bench.tasks.metrics.entropy import mean
from tsdfm_bench.tasks.options import read_options

ORDERS = (1, 2, 3, 4)


def distinct_ngrams(tokens: np.ndarray, n: int) -> int:
    """Number of different n-grams of a sequence (length,); 0 if it is shorter than n."""
    if len(tokens) < n:
        return 0
    return len(np.unique(np.lib.stride_tricks.sliding_window_view(tokens, n), axis=0))


def distinct_n(tokens: np.ndarray, n: int) -> float:
    """Different n-grams / n-grams of a sequence (length,); 1 if it is shorter than n."""
    total = len(tokens) - n + 1
    return distinct_ngrams(tokens, n) / total if total > 0 else 1.0


def longest_repeat(tokens: np.ndarray) -> int:
    """Length of the longest n-gram at two places of a sequence (length,), 0 if every token is different.

    If an n-gram occurs twice, so do its parts: the length is found by bisection.
    """
    low, high = 0, max(len(tokens) - 1, 0)  # an n-gram of `low` occurs twice, none longer than `high` can
    while low < high:
        middle = (low + high + 1) // 2
        if _has_repeat(tokens, middle):
            low = middle
        else:
            high = middle - 1
    return low


def _has_repeat(tokens: np.ndarray, n: int) -> bool:
    data = np.ascontiguousarray(tokens, dtype=np.int64)
    seen: set[bytes] = set()
    for start in range(len(data) - n + 1):
        gram = data[start : start + n].tobytes()
        if gram in seen:
            return True
        seen.add(gram)
    return False


class Repetition:
    """The metric `repetition`: `distinct_1` to `distinct_4`, `repetition_4`, `longest_repeat`, `mean_length`."""

    info: ClassVar[MetricInfo] = MetricInfo(
        name="repetition",
        description="distinct-1 to distinct-4, repetition rate, longest repeated n-gram, mean length",
        citation="arXiv:1908.04319",
    )

    @classmethod
    def load(cls, params: Mapping[str, object]) -> Repetition:
        """Make the metric; it has no options."""
        read_options("metric 'repetition'", params, {})
        return cls()

    def compute(self, cell: CellData) -> list[Measurement]:
        """Seven measurements."""
        rows = [np.asarray(row[:length]) for row, length in zip(cell.tokens, cell.lengths, strict=True)]
        distinct = {n: np.asarray([distinct_n(row, n) for row in rows]) for n in ORDERS}
        repeats = np.asarray([longest_repeat(row) for row in rows], dtype=np.float64)
        lengths = np.asarray(cell.lengths, dtype=np.float64)
        over = "mean over sequences; interval over sequences"
        return [
            *(
                Measurement(
                    f"distinct_{n}",
                    "1",
                    f"different {n}-grams / {n}-grams of a sequence's task tokens, {over}",
                    columns=(distinct[n],),
                    statistic=mean,
                    form="mean",
                )
                for n in ORDERS
            ),
            Measurement(
                "repetition_4",
                "1",
                f"1 - distinct-4 of a sequence's task tokens, {over}",
                columns=(1.0 - distinct[4],),
                statistic=mean,
                form="mean",
            ),
            Measurement(
                "longest_repeat",
                "tokens",
                f"longest n-gram of task tokens at two places of a sequence, {over}",
                columns=(repeats,),
                statistic=mean,
                form="mean",
            ),
            Measurement(
                "mean_length",
                "tokens",
                f"task tokens of a sequence before its end, {over}",
                columns=(lengths,),
                statistic=mean,
                form="mean",
            ),
        ]
