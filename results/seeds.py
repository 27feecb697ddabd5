"""Training seeds as a second level: networks trained alike with other seeds stand for one method.

Sequences of one network say how well that network is known; networks of several seeds say how well the recipe is. Where
a selection holds both, the value is the mean over seeds (of logarithms where all are positive: for perplexity the mean
NLL), and its uncertainty is that of the seeds alone, since each seed's value brings its own sampling noise along.
Its replicates are

    mean + k sum_s g_s (v_s - mean) / sqrt(S (S - 1)),      g_s normal,

with equal g for all quantities and temperatures of the same networks, so that what moves together stays together. The
factor k makes up for how little few seeds say of their spread: the quantile of Student's t over the normal one, with
Satterthwaite's degrees of freedom, the share of the formula's variance that each set of seeds explains being read off
its replicates. One quantity alone gets the t interval over its S values.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from tsdfm_bench.results.evidence import EvidenceCell
from tsdfm_bench.results.stats import CONFIDENCE

_SUFFIX = re.compile(r"^(.*)-s(\d+)$")  # how `train` names the checkpoints of further seeds
_NOT_SETTINGS = ("name", "training_seed", "default")
_PLACE = ("method", "source", "steps", "temperature", "top_p", "top_p_rule", "draw", "seed")


def recipe_of(cell: EvidenceCell) -> tuple[Any, ...]:
    """What a cell's network shares with those of other training seeds, and only with them."""
    if cell.variant:
        return tuple(sorted((k, str(v)) for k, v in cell.variant.items() if k not in _NOT_SETTINGS))
    checkpoint = cell.options.get("checkpoint", "")
    match = _SUFFIX.match(checkpoint)
    return (match[1] if match else checkpoint or cell.first["weights"],)


def seed_of(cell: EvidenceCell) -> int:
    """The training seed of a cell's network; 0 if nothing says otherwise."""
    if cell.variant:
        return int(cell.variant["training_seed"])
    match = _SUFFIX.match(cell.options.get("checkpoint", ""))
    return int(match[2]) if match else 0


def by_recipe(cells: Iterable[EvidenceCell]) -> list[list[EvidenceCell]]:
    """Cells that differ in the training seed alone, together, in order of seeds; others by themselves."""
    groups: dict[tuple[Any, ...], dict[Any, EvidenceCell]] = {}
    for cell in cells:
        options = tuple(sorted((k, v) for k, v in cell.options.items() if k != "checkpoint"))
        key = (cell.group, *(cell.first[name] for name in _PLACE), options, recipe_of(cell))
        members = groups.setdefault(key, {})
        seed = seed_of(cell)
        same = seed in members and members[seed].first["weights"] == cell.first["weights"]
        members[seed if seed not in members or same else (seed, cell.id)] = cell
    found = []
    for members in groups.values():
        if len({cell.first["weights"] for cell in members.values()}) == len(members) > 1:
            found.append([members[seed] for seed in sorted(members, key=str)])
        else:
            found += [[cell] for cell in members.values()]
    return found


def over_seeds(values: Sequence[float], networks: Sequence[str], resamples: int, factor: float = 1.0) -> np.ndarray:
    """Mean over seeds and its replicates, (1 + resamples,); see the module's text.

    Args:
        values: one per network, finite.
        networks: hashes of their weights, in the same order; equal ones get equal g in all quantities.
        resamples: replicates wanted.
        factor: k, see `widening`.
    """
    numbers = np.asarray(values, dtype=np.float64)
    log = bool((numbers > 0).all())
    scaled = np.log(numbers) if log else numbers
    mean, count = scaled.mean(), len(numbers)
    drawn = mean + _normal(tuple(networks), resamples) @ (scaled - mean) * (factor / math.sqrt(count * (count - 1)))
    both = np.concatenate([[mean], drawn])
    with np.errstate(over="ignore"):
        return np.exp(both) if log else both


def widening(replicates: np.ndarray, sets: Iterable[Sequence[str]], confidence: float = CONFIDENCE) -> float:
    """The factor k for a formula.

    Args:
        replicates: (resamples,) of the formula, made with k = 1.
        sets: the networks of each set of seeds that it uses.
        confidence: of the interval wanted.
    """
    from scipy import stats

    values = np.asarray(replicates, dtype=np.float64)
    good = np.isfinite(values)
    if good.sum() < 2 or np.ptp(values[good]) == 0:
        return 1.0
    values = stats.zscore(values[good])
    inverse = 0.0
    for networks in sets:
        normal = stats.zscore(_normal(tuple(networks), len(good))[good])
        fitted = normal @ np.linalg.lstsq(normal, values, rcond=None)[0]
        share = float(np.mean(fitted**2))  # of the variance, 1
        inverse += share**2 / (len(networks) - 1)
    if inverse == 0:
        return 1.0
    tail = 0.5 + confidence / 2
    return float(stats.t.ppf(tail, 1 / inverse) / stats.norm.ppf(tail))


@lru_cache(maxsize=64)
def _normal(networks: tuple[str, ...], resamples: int) -> np.ndarray:
    """(resamples, seeds): the g_s of the module's text."""
    digest = hashlib.sha256("\x1f".join(networks).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "big")).standard_normal((resamples, len(networks)))


def fewest(groups: Iterable[Sequence[EvidenceCell]]) -> int:
    """The smallest number of seeds where there are several; 0 if there is one of each."""
    found = min((len(group) for group in groups if len(group) > 1), default=math.inf)
    return 0 if math.isinf(found) else int(found)
