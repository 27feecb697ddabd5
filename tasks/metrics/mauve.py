"""MAUVE: how close the distribution of generated texts is to that of real text, 0 to 1 (arXiv 2102.01454).

Computed by the package `mauve-text` (GPL-3.0: called as a dependency, imported here and nowhere else) on features of
ours, mean-pooled hidden states of the largest scorer that has them, over equally many tokens of each text. The
published numbers for one model reach from 0.04 to 0.89, because the value depends on features, lengths, sample count
and the seed of k-means. So here:

* both sides have the same number of sequences and the same length, or there is no value;
* k-means is run from several seeds; the value is their mean, and `low` and `high` are their minimum and maximum: the
  spread of the estimator, not a confidence interval;
* the definition carries a hash of every setting: compare values only where it is equal;
* the row of real text is measured against other real text of the same n: the ceiling of every row beside it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
from collections.abc import Iterator, Mapping
from typing import ClassVar
from unittest import mock

import numpy as np

from tsdfm_bench.api import CellData, Measurement, MetricInfo
from tsdfm_bench.errors import UsageError
from tsdfm_bench.tasks.options import read_options

FIRST_SEED = 25
MIN_SEEDS = 3
MIN_SEQUENCES = 50
DEFAULTS = {"seeds": 5, "scaling": 5.0, "redo": 5, "iterations": 500}


class Mauve:
    """The metric `mauve`. Options: `seeds` (of k-means, at least 3), `scaling`, `redo`, `iterations`.

    Args:
        seeds: number of k-means seeds, 25, 26, ...
        scaling: the constant c of the paper.
        redo: restarts of k-means per seed.
        iterations: most iterations of k-means.
    """

    info: ClassVar[MetricInfo] = MetricInfo(
        name="mauve",
        description="MAUVE against held-out real text on features of the largest scorer, several k-means seeds",
        needs=frozenset({"scores", "reference", "features"}),
        citation="arXiv:2102.01454",
    )

    def __init__(self, seeds: int = 5, scaling: float = 5.0, redo: int = 5, iterations: int = 500) -> None:
        if seeds < MIN_SEEDS:
            raise UsageError(f"metric 'mauve' needs at least {MIN_SEEDS} k-means seeds, not {seeds}")
        self.seeds = tuple(range(FIRST_SEED, FIRST_SEED + seeds))
        self.scaling, self.redo, self.iterations = scaling, redo, iterations

    @classmethod
    def load(cls, params: Mapping[str, object]) -> Mauve:
        """Make the metric; raises UsageError for a wrong option."""
        return cls(**read_options("metric 'mauve'", params, DEFAULTS))

    def compute(self, cell: CellData) -> list[Measurement]:
        """One measurement, on the largest scorer with features; none if there are no features or no reference.

        If the two sides cannot be compared, or the package fails, the value is NaN, with the reason.
        """
        reference, against = _other_side(cell)
        if reference is None:
            return []
        scorer = _featurizer(cell, reference)
        if scorer is None:
            return []
        samples, real = cell.scores[scorer].features, reference.scores[scorer].features
        assert samples is not None
        assert real is not None
        reason = _refusal(cell, reference, samples, real)
        if reason is None:
            try:
                values = self.values(samples, real)
            except Exception as error:  # whatever the package or a library below it does: the row says so
                reason = f"mauve-text failed: {type(error).__name__}: {error}"
        if reason is not None:
            about = f"MAUVE against {against}, not computed"
            return [Measurement("mauve", "1", about, scorer, value=float("nan"), n=len(samples), reason=reason)]
        info = cell.scorer_info[scorer]
        settings = {
            "features": info.features,
            "scorer": info.revision,
            "dtype": info.dtype,
            "n": len(samples),
            "length": int(cell.tokens.shape[1]),
            "seeds": self.seeds,
            "scaling": self.scaling,
            "buckets": _buckets(len(samples)),
            "redo": self.redo,
            "iterations": self.iterations,
            "package": _package_version(),
        }
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
        definition = (
            f"MAUVE (mauve-text {settings['package']}) against {against}, n = {len(samples)} each, scaling "
            f"{self.scaling:g}, {settings['buckets']} buckets; features: {info.title}, {info.features}; mean over "
            f"{len(self.seeds)} k-means seeds, low and high are their minimum and maximum; settings {digest}"
        )
        return [
            Measurement(
                metric="mauve",
                unit="1",
                definition=definition,
                scorer=scorer,
                value=float(np.mean(values)),
                low=float(np.min(values)),
                high=float(np.max(values)),
                n=len(samples),
                better="higher",
            )
        ]

    def values(self, samples: np.ndarray, real: np.ndarray) -> list[float]:
        """MAUVE of (n, d) against (n, d) features, one value per k-means seed."""
        with _quiet():
            from mauve import compute_mauve

            return [
                float(
                    compute_mauve(
                        p_features=np.asarray(samples, dtype=np.float32),
                        q_features=np.asarray(real, dtype=np.float32),
                        num_buckets=_buckets(len(samples)),
                        kmeans_num_redo=self.redo,
                        kmeans_max_iter=self.iterations,
                        mauve_scaling_factor=self.scaling,
                        seed=seed,
                        verbose=False,
                    ).mauve
                )
                for seed in self.seeds
            ]


def _other_side(cell: CellData) -> tuple[CellData | None, str]:
    """What a cell is compared with: held-out real text, or for real text itself, other real text."""
    real = cell.reference
    if real is not None and not _same_tokens(cell, real):
        return real, "held-out real text"
    return cell.reference_other, "other held-out real text"


def _same_tokens(cell: CellData, other: CellData) -> bool:
    return cell.tokens.shape == other.tokens.shape and bool(np.array_equal(cell.tokens, other.tokens))


def _featurizer(cell: CellData, reference: CellData) -> str | None:
    """The scorer with most parameters among those with features on both sides."""
    names = [
        name
        for name, scores in cell.scores.items()
        if scores.features is not None and name in reference.scores and reference.scores[name].features is not None
    ]
    return max(names, key=lambda name: cell.scorer_info[name].parameters, default=None)


def _refusal(cell: CellData, reference: CellData, samples: np.ndarray, real: np.ndarray) -> str | None:
    if cell.prompt is not None or cell.infilling is not None:
        return "its features would be those of what was given too, which generated and real text share"
    if len(samples) != len(real):
        return f"{len(samples)} samples against {len(real)} real texts; equal numbers are needed"
    if cell.tokens.shape[1] != reference.tokens.shape[1]:
        return f"samples of {cell.tokens.shape[1]} tokens against real text of {reference.tokens.shape[1]}"
    if len(samples) < MIN_SEQUENCES:
        return f"{len(samples)} sequences are too few, at least {MIN_SEQUENCES} are needed; type --samples 128 or more"
    if not (np.isfinite(samples).all() and np.isfinite(real).all()):
        return "a feature is not finite"
    return None


def _buckets(n: int) -> int:
    return max(2, round(n / 10))


def _package_version() -> str:
    from importlib.metadata import version

    return version("mauve-text")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Neither prints of the package, nor faiss's advice to have 39 points per centroid: MAUVE has 20 by design."""
    with contextlib.redirect_stdout(io.StringIO()):
        import faiss

        quiet = functools.partial(faiss.Kmeans, min_points_per_centroid=1)
        with mock.patch.object(faiss, "Kmeans", quiet):
            yield
