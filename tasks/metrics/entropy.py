"""Unigram entropy: how varied the tokens of a sample are.

The entropy of each sequence's own token histogram, averaged over sequences, on the task's tokens: it needs no scorer.
A generator can buy a low perplexity with fewer distinct tokens, and this number shows it. It is at most the logarithm
of the length, so rows of different lengths cannot be compared. The literature prints nats (DUO, ReMDM, SDTT) or bits
(flow_matching, FS-DFM, EDLM); both are given.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from tsdfm_bench.api import CellData, Measurement, MetricInfo
from tsdfm_bench.tasks.options import read_options


def sequence_entropy(tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Entropy in nats of each row's token histogram.

    Args:
        tokens: (n, length) integer.
        lengths: (n,) how many leading tokens count.

    Returns:
        (n,) float64; 0 for an empty row.
    """
    result = np.zeros(len(tokens), dtype=np.float64)
    for row, length in enumerate(lengths):
        counts = np.unique(tokens[row, :length], return_counts=True)[1]
        if length > 0:
            share = counts / length
            result[row] = -np.sum(share * np.log(share))
    return result


def mean(column: np.ndarray) -> np.ndarray:
    """Mean over sequences."""
    return column.mean(-1)


class Entropy:
    """The metric `entropy`: `entropy_nats` and `entropy_bits`."""

    info: ClassVar[MetricInfo] = MetricInfo(
        name="entropy",
        description="unigram entropy of each sequence's own tokens, in nats and bits",
        citation="arXiv:2409.02908",
    )

    @classmethod
    def load(cls, params: Mapping[str, object]) -> Entropy:
        """Make the metric; it has no options."""
        read_options("metric 'entropy'", params, {})
        return cls()

    def compute(self, cell: CellData) -> list[Measurement]:
        """Two measurements."""
        nats = sequence_entropy(cell.tokens, cell.lengths)
        size = "" if cell.infilling is not None else f" of {cell.tokens.shape[1]} tokens"
        text = f"entropy of each sequence's own histogram of task tokens, mean over sequences{size}"
        return [
            Measurement(
                f"entropy_{unit}",
                unit,
                f"{text}; interval over sequences",
                columns=(column,),
                statistic=mean,
                form="mean",
            )
            for unit, column in (("nats", nats), ("bits", nats / np.log(2.0)))
        ]
