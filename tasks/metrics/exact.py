"""Measures against an exact law: what generated text costs under the true law, and how its n-grams differ from it.

* excess NLL: mean of -log p(x) / length under the true law minus the exact entropy of the law per token. 0 for exact
  draws; above 0 a sampler writes what the law finds unlikely. It may fall below 0 (low temperature: likely text that
  is too uniform), so n-gram distances stand beside it.
* tv_n: total variation between the n-gram frequencies of the rows and the exact n-gram law, n = 1, 2;
  kl_n: the Kullback-Leibler divergence of the same. Both are biased upwards by the finite number of n-grams counted;
  the row of exact draws, measured in the same way, is the floor.
* valid: share of sequences that are possible under the law. The others have an infinite NLL and are left out of the
  excess.

After a prompt, or of an infilling, the law is that of whole sequences: what was given has the entropy of the given on
average, since it is part of exact draws, so what is in excess is that of the tokens that were written, and is divided
by their number. After a typed prompt, which is no draw from the law, only `valid` has a value. N-grams of an infilling
are those whose tokens were all filled in: which places are free does not depend on the text, so their law is that of
all n-grams.

They apply to tasks with an exact law only (`CellData.law`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import chain
from typing import Any, ClassVar

import numpy as np

from tsdfm_bench.api import CellData, ExactLaw, Measurement, MetricInfo
from tsdfm_bench.tasks.options import read_options

ORDERS = (1, 2)
_UNKNOWN: Mapping[str, Any] = {
    "value": float("nan"),
    "columns": (),
    "statistic": None,
    "form": "",
    "reason": "a typed prompt is no draw from the law, whose entropy and n-grams are those of whole sequences",
}


def mean(column: np.ndarray) -> np.ndarray:
    """Mean over sequences."""
    return np.asarray(column.mean(-1))


def ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Sum / sum over (..., n) columns; nan if there is nothing below."""
    size = below.sum(-1)
    return np.where(size > 0, above.sum(-1) / np.where(size > 0, size, 1.0), np.nan)


def ngram_frequencies(pieces: Iterable[np.ndarray], n: int, vocab_size: int) -> tuple[np.ndarray, int]:
    """Pooled n-gram frequencies of pieces of text (length,), (V,) * n, and how many n-grams they come from."""
    parts = []
    for piece in pieces:
        ids = np.asarray(piece, dtype=np.int64)
        if len(ids) >= n:
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
        written = np.asarray(cell.lengths)
        if cell.prompt is not None:
            whole = np.concatenate([cell.prompt, cell.tokens], axis=1)
            cell = replace(cell, tokens=whole, lengths=written + cell.prompt.shape[1])
        whole_cell = cell
        if cell.infilling is not None:
            whole_cell = replace(cell, tokens=cell.infilling.sequences, lengths=cell.infilling.lengths)
        found = [*_nll(whole_cell, law, written), *_ngrams(cell, law)]
        return [m if m.metric == "valid" else replace(m, **_UNKNOWN) for m in found] if cell.typed else found


def _nll(cell: CellData, law: ExactLaw, written: np.ndarray) -> list[Measurement]:
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
    share = "" if np.array_equal(written, lengths) else "of whole sequences, per token that was not given; "
    found = [
        Measurement(
            metric="excess_nll",
            unit="nats",
            definition=f"mean of -log p per token under the exact law of task {law.name}, minus its entropy of "
            f"{rate:.4f} nats per token at length {usual}; {share}impossible sequences left out; interval over "
            "sequences",
            columns=((nll - entropy) * counted, (written * counted).astype(np.float64)),
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
    whole = cell.lengths if cell.infilling is None else cell.infilling.lengths
    length = int(whole.max(initial=0))
    pieces = list(chain.from_iterable(cell.pieces()))
    for n in ORDERS:
        if length < n:
            continue
        p, count = ngram_frequencies(pieces, n, cell.vocab_size)
        q = law.ngrams(n, length)
        text = f"the frequencies of {count} {n}-grams and their exact law; the row of exact draws is the floor"
        tv = f"total variation between {text}"
        kl = f"Kullback-Leibler divergence of the frequencies from the law, nats: {text}"
        found += [
            Measurement(f"tv_{n}", "1", tv, value=total_variation(p, q), better="lower"),
            Measurement(f"kl_{n}", "nats", kl, value=divergence(p, q), better="lower"),
        ]
    return found
