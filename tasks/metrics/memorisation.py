"""Memorisation: how much of a text stands in the training text, word for word.

A generator that copies its training text has a good perplexity, normal entropy and no repetition: only a look into the
training text shows it. Three numbers, on the task's tokens, to be read beside those of held-out real text (which shares
formulas with the training text too):

* memorised_13: share of a sequence's 13-grams that occur in the training text (13: arXiv 2005.14165);
* longest_copy: tokens of the longest span that occurs there;
* near_copies: share of sequences that agree with some stretch of training text in at least four fifths of their
  positions, so that a few changed tokens do not hide a copy.

The training text is indexed by hashes of its n-grams, sorted: 13-grams to look up, 6-grams to find places from which a
copy is followed in both directions. Copies are found exactly down to six tokens, except that only the first
`MOST_PLACES` places of a very frequent 6-gram are followed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from tsdfm_bench.api import CellData, Measurement, MetricInfo
from tsdfm_bench.tasks.metrics.entropy import mean
from tsdfm_bench.tasks.options import read_options

GRAM = 13
SEED_GRAM = 6
NEAR = 0.8
MOST_PLACES = 64
MOST_TOKENS = 100_000_000  # of training text: its index takes about 24 bytes a token
_FACTOR = np.uint64(0x9E3779B97F4A7C15)


def gram_hashes(tokens: np.ndarray, n: int) -> np.ndarray:
    """(len - n + 1,) uint64 hashes of the n-grams of a token sequence; empty if it is shorter than n."""
    count = len(tokens) - n + 1
    if count < 1:
        return np.empty(0, dtype=np.uint64)
    values = tokens.astype(np.uint64) + np.uint64(1)
    with np.errstate(over="ignore"):
        total = np.zeros(count, dtype=np.uint64)
        for place in range(n):
            total = (total ^ (values[place : place + count] * _FACTOR)) * np.uint64(0xBF58476D1CE4E5B9)
            total ^= total >> np.uint64(29)
    return total


class TrainingIndex:
    """The training text, ready to be searched.

    Args:
        tokens: (n,) integers, documents joined.
    """

    def __init__(self, tokens: np.ndarray) -> None:
        self.tokens = np.ascontiguousarray(tokens, dtype=np.int32)
        self.long = np.sort(gram_hashes(self.tokens, GRAM))
        seeds = gram_hashes(self.tokens, SEED_GRAM)
        self.places = np.argsort(seeds, kind="stable")
        self.seeds = seeds[self.places]

    def memorised(self, *pieces: np.ndarray) -> float:
        """Share of a sequence's 13-grams that occur in the text, the sequence in pieces; 0 if it has none."""
        grams = np.concatenate([gram_hashes(piece, GRAM) for piece in pieces])
        if not len(grams) or not len(self.long):
            return 0.0
        at = np.minimum(np.searchsorted(self.long, grams), len(self.long) - 1)
        return float(np.mean(self.long[at] == grams))

    def copies(self, sequence: np.ndarray) -> tuple[int, float]:
        """Length of the longest span that occurs in the text (0 if under six tokens), and the largest share of
        positions that agree with one stretch of it."""
        grams = gram_hashes(sequence, SEED_GRAM)
        first = np.searchsorted(self.seeds, grams, side="left")
        last = np.minimum(np.searchsorted(self.seeds, grams, side="right"), first + MOST_PLACES)
        counts = last - first
        if not counts.sum():
            return 0, 0.0
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        places = self.places[np.repeat(first, counts) + within]
        shifts = np.unique(places - np.repeat(np.arange(len(grams)), counts))
        longest, best = 0, 0.0
        for start in range(0, len(shifts), 4096):
            index = shifts[start : start + 4096, None] + np.arange(len(sequence))
            inside = (index >= 0) & (index < len(self.tokens))
            same = inside & (self.tokens[np.clip(index, 0, len(self.tokens) - 1)] == sequence)
            best = max(best, float(same.mean(axis=1).max()))
            longest = max(longest, _longest_run(same))
        return (longest if longest >= SEED_GRAM else 0), best


def _longest_run(same: np.ndarray) -> int:
    """Longest run of True in any row of (rows, length)."""
    run, longest = np.zeros(len(same), dtype=np.int64), 0
    for column in same.T:
        run = np.where(column, run + 1, 0)
        longest = max(longest, int(run.max(initial=0)))
    return longest


class Memorisation:
    """The metric `memorisation`: `memorised_13`, `longest_copy`, `near_copies`."""

    info: ClassVar[MetricInfo] = MetricInfo(
        name="memorisation",
        description="13-grams, longest span and near copies shared with the training text",
        citation="arXiv:2005.14165",
    )

    def __init__(self) -> None:
        self._index: tuple[str, TrainingIndex] | None = None

    @classmethod
    def load(cls, params: Mapping[str, object]) -> Memorisation:
        """Make the metric; it has no options."""
        read_options("metric 'memorisation'", params, {})
        return cls()

    def compute(self, cell: CellData) -> list[Measurement]:
        """Three measurements; an empty list if the task offers no training text."""
        if cell.training is None:
            return []
        streams = cell.training()
        over = f"training text of {len(streams.train):,} tokens"
        if len(streams.train) > MOST_TOKENS:
            reason = f"the training text has {len(streams.train):,} tokens; up to {MOST_TOKENS:,} are indexed"
            about = f"share of 13-grams of task tokens that occur in the {over}"
            return [Measurement("memorised_13", "1", about, value=float("nan"), n=len(cell.tokens), reason=reason)]
        if self._index is None or self._index[0] != streams.data_hash:
            self._index = (streams.data_hash, TrainingIndex(streams.train))
        index = self._index[1]
        rows = cell.pieces()
        memorised = np.array([index.memorised(*row) for row in rows])
        found = [[(*index.copies(piece), len(piece)) for piece in row] for row in rows]
        longest = np.array([float(max(span for span, _, _ in row)) for row in found])
        near = np.array([float(any(share >= NEAR and size >= GRAM for _, share, size in row)) for row in found])
        end = "mean over sequences; interval over sequences"
        told = (
            ("memorised_13", "1", f"share of a sequence's 13-grams of task tokens that occur in the {over}", memorised),
            ("longest_copy", "tokens", f"longest span of at least 6 task tokens that occurs in the {over}", longest),
            ("near_copies", "1", f"share of sequences that agree with a stretch of the {over} in 80 % of tokens", near),
        )
        return [
            Measurement(metric, unit, f"{about}, {end}", columns=(column,), statistic=mean, form="mean", better="lower")
            for metric, unit, about, column in told
        ]
