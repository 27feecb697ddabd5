"""Repetition and diversity within a sequence, on the task's tokens.

* distinct-n: different n-grams of a sequence / its n-grams, mean over sequences. 1 = nothing occurs twice.
* repetition rate rep-4: 1 - distinct-4 (Welleck et al., arXiv 1908.04319, seq-rep-4).
* longest repeat: tokens of the longest n-gram that occurs at two places of a sequence; the two may overlap.
* mean length: tokens before the sequence's own end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np

from tsdfm_bench.api import CellData, Measurement, MetricInfo
from tsdfm_bench.tasks.metrics.entropy import mean
from tsdfm_bench.tasks.options import read_options

ORDERS = (1, 2, 3, 4)


def ngrams(pieces: Sequence[np.ndarray], n: int) -> np.ndarray:
    """The n-grams (count, n) of a sequence given in pieces, (length,) each; none reaches from one piece to another."""
    parts = [np.lib.stride_tricks.sliding_window_view(piece, n) for piece in pieces if len(piece) >= n]
    return np.concatenate(parts) if parts else np.empty((0, n), dtype=np.int64)


def distinct_n(pieces: Sequence[np.ndarray], n: int) -> float:
    """Different n-grams / n-grams of a sequence given in pieces; 1 if it has none."""
    grams = ngrams(pieces, n)
    return len(np.unique(grams, axis=0)) / len(grams) if len(grams) else 1.0


def longest_repeat(pieces: Sequence[np.ndarray]) -> int:
    """Length of the longest n-gram at two places of a sequence given in pieces, 0 if every token is different.

    If an n-gram occurs twice, so do its parts: the length is found by bisection.
    """
    # an n-gram of `low` occurs twice, none longer than `high` can
    low, high = 0, max((len(piece) for piece in pieces), default=0)
    while low < high:
        middle = (low + high + 1) // 2
        if _has_repeat(pieces, middle):
            low = middle
        else:
            high = middle - 1
    return low


def _has_repeat(pieces: Sequence[np.ndarray], n: int) -> bool:
    seen: set[bytes] = set()
    for piece in pieces:
        data = np.ascontiguousarray(piece, dtype=np.int64)
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
        rows = cell.pieces()
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
