"""Measures against an exact law: what generated text costs under the true law, and how its n-grams differ from it.

* excess NLL: mean of -log p(x) / length under the true law minus the exact entropy of the law per token. 0 for exact
  draws; above 0 a sampler writes what the law finds unlikely. It may fall below 0 (low temperature: likely text that
  is too uniform), so n-gram distances stand beside it.
* tv_n: total variation between the n-gram frequencies of the rows and the exact n-gram law, n = 1, 2;
  kl_n: the Kullback-Leibler divergence of the same. Both are biased upwards by the finite number of n-grams counted;
  the row of exact draws, measured in the same way, is the floor.
* valid: share of sequences that are possible under the law. The others have an infinite NLL and are left out of the
  excess.

After a prompt the law is that of whole sequences: its share of -log p is the entropy of prompts on average, since
prompts are exact draws, so what is in excess is the continuation's and is divided by the continuation's tokens.

They apply to tasks with an exact law only (`CellData.law`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

import numpy as np

from tsdfm_bench.api import CellData, ExactLaw, Measurement, MetricInfo
from tsdfm_bench.tasks.options import read_options

ORDERS = (1, 2)


def mean(column: np.ndarray) -> np.ndarray:
    """Mean over sequences."""
    return np.asarray(column.mean(-1))


def ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Sum / sum over (..., n) columns; nan if there is nothing below."""
    size = below.sum(-1)
    return np.where(size > 0, above.sum(-1) / np.where(size > 0, size, 1.0), np.nan)


def ngram_frequencies(tokens: np.ndarray, lengths: np.ndarray, n: int, vocab_size: int) -> tuple[np.ndarray, int]:
    """Pooled n-gram frequencies of the rows, (V,) * n, and how many n-grams they come from."""
    parts = []
    for row, length in zip(tokens, lengths, strict=True):
        ids = np.asarray(row[:length], dtype=np.int64)
        if length >= n:
            parts.append(sum(ids[k : len(ids) - n + 1 + k] * vocab_size ** (n - 1 - k) for k in range(n)))
    codes = np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)
    counts = np.bincount(codes, minlength=vocab_size**n).reshape((vocab_size,) * n)
    return counts / max(1, len(codes)), len(codes)


def total_variation(p: np.ndarray, q: np.ndarray) -> float:
    """Half the L1 distance."""
    return float(0.5 * np.abs(p - q).sum())


def divergence(p: np.ndarray, q: np.ndarray) -> float:
    """KL(p || q) in nats; inf where p has mass that q has not."""
    some = p > 0
    if np.any(q[some] <= 0):
        return float("inf")
    return float(np.sum(p[some] * np.log(p[some] / q[some])))


class Exact:
    """The metric `exact`: `excess_nll`, `tv_1`, `tv_2`, `kl_1`, `kl_2` and `valid`."""

    info: ClassVar[MetricInfo] = MetricInfo(
        name="exact",
        description="distance from a synthetic task's exact law: excess NLL, n-gram distances, valid share",
    )

    @classmethod
    def load(cls, params: Mapping[str, object]) -> Exact:
        """Make the metric; it has no options."""
        read_options("metric 'exact'", params, {})
        return cls()

    def compute(self, cell: CellData) -> list[Measurement]:
        """Six measurements, or none if the task has no exact law."""
        law = cell.law
        if law is None:
            return []
        given = 0 if cell.prompt is None else cell.prompt.shape[1]
        if cell.prompt is not None:
            whole = np.concatenate([cell.prompt, cell.tokens], axis=1)
            cell = replace(cell, tokens=whole, lengths=np.asarray(cell.lengths) + given)
        return [*_nll(cell, law, given), *_ngrams(cell, law)]


def _nll(cell: CellData, law: ExactLaw, given: int) -> list[Measurement]:
    lengths = np.asarray(cell.lengths, dtype=np.int64)
    nll, valid = np.zeros(len(lengths)), np.ones(len(lengths), dtype=bool)
    entropy = np.zeros(len(lengths))
    for length in np.unique(lengths[lengths > 0]):
        rows = np.flatnonzero(lengths == length)
        total = law.token_nll(cell.tokens[rows, :length]).sum(axis=1)
        valid[rows] = np.isfinite(total)
        nll[rows] = np.where(valid[rows], total, 0.0)
        entropy[rows] = law.entropy_nats(int(length))
    counted = valid & (lengths > 0)
    usual = int(lengths.max(initial=1))
    rate = law.entropy_nats(usual) / usual
    found = [
        Measurement(
            metric="excess_nll",
            unit="nats",
            definition=f"mean of -log p per token under the exact law of task {law.name}, minus its entropy of "
            f"{rate:.4f} nats per token at length {usual}; impossible sequences left out; interval over sequences",
            columns=((nll - entropy) * counted, ((lengths - given) * counted).astype(np.float64)),
            statistic=ratio,
            better="lower",
            n=int(counted.sum()) or None,
        ),
        Measurement(
            metric="valid",
            unit="1",
            definition=f"share of sequences possible under the law of task {law.name}; interval over sequences",
            columns=(valid.astype(np.float64),),
            statistic=mean,
            better="higher",
        ),
    ]
    return found


def _ngrams(cell: CellData, law: ExactLaw) -> list[Measurement]:
    found = []
    length = int(cell.lengths.max(initial=0))
    for n in ORDERS:
        if length < n:
            continue
        p, count = ngram_frequencies(cell.tokens, cell.lengths, n, cell.vocab_size)
        q = law.ngrams(n, length)
        text = f"the frequencies of {count} {n}-grams and their exact law; the row of exact draws is the floor"
        tv = f"total variation between {text}"
        kl = f"Kullback-Leibler divergence of the frequencies from the law, nats: {text}"
        found += [
            Measurement(f"tv_{n}", "1", tv, value=total_variation(p, q), better="lower"),
            Measurement(f"kl_{n}", "nats", kl, value=divergence(p, q), better="lower"),
        ]
    return found
