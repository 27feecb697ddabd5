"""What the intervals are made from: the per-sequence numbers behind each value, stored beside the scores.

Every statistic of this harness is f(sum of a_i / sum of b_i) over sequences i, with f the identity or exp: a mean has
b_i = 1; pooled perplexity is exp(sum NLL / sum count); SEDD's is the mean of exp(NLL_i / count_i). So two numbers per
sequence and value are enough to resample it, to pair two rows sequence by sequence, to cluster by prompt and to carry
its uncertainty through any formula, long after the run and without knowing the metric. A metric says which form its
statistic has; one that says nothing is reported with its interval as usual and has no columns.

    mean                 sum x / n                            columns (x,)
    ratio                sum a / sum b                        columns (a, b)
    exp-ratio            exp(sum a / sum b)                   columns (a, b)       pooled perplexity
    mean-exp-ratio       mean over b_i > 0 of exp(a_i / b_i)  columns (a, b)       mean of perplexities
    exp-mean-ratio       exp(mean over b_i > 0 of a_i / b_i)  columns (a, b)       SDTT's perplexity
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tsdfm_bench.results.arrays import read_arrays, write_arrays
from tsdfm_bench.results.files import CorruptFile, check_name, slug

_INDEX = "index"
_CLUSTERS = "clusters"


@dataclass(frozen=True)
class Terms:
    """Per-sequence terms of one value: f(sum a / sum b).

    Args:
        a, b: (n,) float64.
        exp: whether f is exp.
    """

    a: np.ndarray
    b: np.ndarray
    exp: bool = False

    @property
    def n(self) -> int:
        """Number of sequences."""
        return len(self.a)

    def value(self, weights: np.ndarray | None = None) -> np.ndarray:
        """The value, or one per row of weights (..., n)."""
        with np.errstate(all="ignore"):
            sums = (self.a.sum(), self.b.sum()) if weights is None else (weights @ self.a, weights @ self.b)
            return self.finish(np.asarray(sums[0]), np.asarray(sums[1]))

    def finish(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """f(a / b) of sums."""
        with np.errstate(all="ignore"):
            ratio = np.divide(a, b)
            return np.exp(ratio) if self.exp else ratio

    def head(self, n: int) -> Terms:
        """The first n sequences."""
        return self if n >= self.n else Terms(self.a[:n], self.b[:n], self.exp)

    def summed(self, clusters: np.ndarray) -> Terms:
        """One term per cluster: sums over its sequences."""
        names, index = np.unique(clusters, return_inverse=True)
        return Terms(np.bincount(index, self.a, len(names)), np.bincount(index, self.b, len(names)), self.exp)


def _mean(x: np.ndarray) -> Terms:
    return Terms(x, np.ones_like(x))


def _ratio(a: np.ndarray, b: np.ndarray) -> Terms:
    return Terms(a, b)


def _exp_ratio(a: np.ndarray, b: np.ndarray) -> Terms:
    return Terms(a, b, exp=True)


def _each(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.where(b > 0, a / np.maximum(b, 1), 0.0), (b > 0).astype(np.float64)


def _mean_exp_ratio(a: np.ndarray, b: np.ndarray) -> Terms:
    each, counted = _each(a, b)
    with np.errstate(over="ignore"):
        return Terms(np.where(counted > 0, np.exp(each), 0.0), counted)


def _exp_mean_ratio(a: np.ndarray, b: np.ndarray) -> Terms:
    return Terms(*_each(a, b), exp=True)


FORMS: dict[str, tuple[int, Callable[..., Terms]]] = {
    "mean": (1, _mean),
    "ratio": (2, _ratio),
    "exp-ratio": (2, _exp_ratio),
    "mean-exp-ratio": (2, _mean_exp_ratio),
    "exp-mean-ratio": (2, _exp_mean_ratio),
}


def terms(form: str, columns: Sequence[np.ndarray]) -> Terms:
    """The terms of a statistic from its columns.

    Args:
        form: a key of `FORMS`.
        columns: as many (n,) arrays as the form takes.

    Raises:
        ValueError: unknown form, wrong number of columns, or shapes that differ.
    """
    if form not in FORMS:
        raise ValueError(f"unknown form {form!r}: known are {', '.join(FORMS)}")
    count, make = FORMS[form]
    arrays = [np.asarray(column, dtype=np.float64) for column in columns]
    if len(arrays) != count or len({array.shape for array in arrays}) != 1 or arrays[0].ndim != 1:
        raise ValueError(f"form {form!r} takes {count} columns of one shape (n,), not {[a.shape for a in arrays]}")
    return make(*arrays)


@dataclass(frozen=True)
class CellColumns:
    """The stored terms of one cell.

    Args:
        terms: by (metric, scorer).
        clusters: (n,) int64, equal numbers for sequences that share a prompt; None = all independent.
    """

    terms: dict[tuple[str, str], Terms]
    clusters: np.ndarray | None = None


def columns_path(root: str | os.PathLike[str], metric: str, cell: str) -> Path:
    """columns/<metric>/<cell>.npz of a run folder; `metric` is the registered metric that made them."""
    return Path(root) / "columns" / slug(metric) / f"{check_name(cell, 'cell id')}.npz"


def write_columns(
    path: str | os.PathLike[str], found: Iterable[tuple[str, str, Terms]], clusters: np.ndarray | None = None
) -> None:
    """Write the terms of one cell, equal arrays once.

    Args:
        path: see `columns_path`.
        found: (metric, scorer, terms).
        clusters: (n,) integers, or None.

    Raises:
        StoreError: the file cannot be written.
    """
    arrays: dict[str, np.ndarray] = {}
    names: dict[bytes, str] = {}

    def keep(array: np.ndarray) -> str:
        content = array.tobytes()
        name = names.setdefault(content, f"c{len(names)}")
        arrays[name] = array
        return name

    index = [[metric, scorer, keep(t.a), keep(t.b), t.exp] for metric, scorer, t in found]
    if clusters is not None:
        arrays[_CLUSTERS] = np.asarray(clusters, dtype=np.int64)
    arrays[_INDEX] = np.array(json.dumps(index))
    write_arrays(path, exclusive=False, **arrays)


def read_columns(path: str | os.PathLike[str]) -> CellColumns:
    """Read what `write_columns` wrote; `CorruptFile` if it is not that."""
    arrays = read_arrays(path)
    try:
        index = json.loads(str(arrays[_INDEX]))
        found = {(metric, scorer): Terms(arrays[a], arrays[b], bool(exp)) for metric, scorer, a, b, exp in index}
    except (KeyError, ValueError, TypeError) as error:
        raise CorruptFile.of(path, f"it holds no per-sequence columns ({error})") from error
    return CellColumns(found, arrays.get(_CLUSTERS))


def cell_columns(
    root: str | os.PathLike[str], cell: str, damaged: Callable[[CorruptFile], None] | None = None
) -> CellColumns:
    """All stored terms of a cell of a run folder; empty if there are none.

    Args:
        root: the run folder.
        cell: its id.
        damaged: told of damaged files, which then count as none; None = raise.

    Raises:
        CorruptFile: a damaged file.
    """
    check_name(cell, "cell id")
    found: dict[tuple[str, str], Terms] = {}
    clusters = None
    folder = Path(root) / "columns"
    if folder.is_dir():
        for path in sorted(folder.glob(f"*/{cell}.npz")):
            try:
                stored = read_columns(path)
            except CorruptFile as error:
                if damaged is None:
                    raise
                damaged(error)
                continue
            found = {**stored.terms, **found}
            clusters = clusters if clusters is not None else stored.clusters
    return CellColumns(found, clusters)
