"""Training seeds as a second level: networks trained alike with other seeds stand for one method.

Sequences of one network say how well that network is known; networks of several seeds say how well the recipe is. Where
a selection holds both, the value is the mean over seeds (of logarithms for perplexities, times and speeds, see
`on_logarithms`: for perplexity the mean NLL), and its uncertainty is that of the seeds alone, since each seed's value
brings its own sampling noise along. Its replicates are

    mean + k sum_s g_s (v_s - mean) / sqrt(S (S - 1)),      g_s normal,

with equal g for all quantities and temperatures of the same networks, so that what moves together stays together. The
factor k makes up for how little few seeds say of their spread: the quantile of Student's t over the normal one, with
Satterthwaite's degrees of freedom, the share of the formula's variance that each set of seeds explains being read off
its replicates. One quantity alone, and the change of one between two sets of networks, need no replicates: they get the
t interval over seeds itself, `t_interval` and `t_change`. `results.recipes` makes one cell of such networks.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from tsdfm_bench.results.evidence import EvidenceCell, plain_label
from tsdfm_bench.results.stats import CONFIDENCE, Interval

OVER = "training seeds"
_SUFFIX = re.compile(r"^(.*)-s(\d+)$")  # how `train` names the checkpoints of further seeds
_NOT_SETTINGS = ("name", "training_seed", "default", "alike")
_PLACE = ("method", "source", "steps", "temperature", "top_p", "top_p_rule", "draw")


def recipe_of(cell: EvidenceCell) -> tuple[Any, ...]:
    """What a cell's network shares with those of other training seeds, and only with them.

    Its settings where variants.json knows it, else the name of its checkpoint, folder included.
    """
    if cell.variant:
        return tuple(sorted((k, str(v)) for k, v in settings_of(cell).items()))
    return (without_seed(cell.first["checkpoint"]),)


def settings_of(cell: EvidenceCell) -> dict[str, Any]:
    """What distinguishes a network of `variants.json` from others, but for its training seed.

    How many steps a control of equal cost takes follows from what it is to equal: it is not the same in every seed.
    """
    found = {key: value for key, value in cell.variant.items() if key not in _NOT_SETTINGS}
    if found.get("control") == "flop_matched":
        found.pop("training_steps", None)
    return found


def without_seed(checkpoint: str) -> str:
    """The name of a checkpoint without the suffix of its training seed."""
    match = _SUFFIX.match(checkpoint)
    return match[1] if match else checkpoint


def seed_of(cell: EvidenceCell) -> int:
    """The training seed of a cell's network; 0 if nothing says otherwise."""
    if cell.variant:
        return int(cell.variant["training_seed"])
    match = _SUFFIX.match(cell.first["checkpoint"])
    return int(match[2]) if match else 0


def place_of(cell: EvidenceCell, *, drawn: bool = True) -> tuple[Any, ...]:
    """What a cell shares with those that differ from it in the training seed alone: text, settings and recipe.

    Args:
        cell: the cell.
        drawn: with the seed of the sampling.
    """
    return (*_settings(cell), *([cell.first["seed"]] if drawn else []), recipe_of(cell))


def _settings(cell: EvidenceCell) -> tuple[Any, ...]:
    return (cell.group, plain_label(cell.first["label"]), *(cell.first[name] for name in _PLACE))


def distinct(cells: Iterable[EvidenceCell]) -> list[EvidenceCell]:
    """Cells without repeats: of one network in one setting under two names, the one with more sequences."""
    found: dict[Any, EvidenceCell] = {}
    for cell in cells:
        weights = cell.first["weights"]
        key = (_settings(cell), cell.first["seed"], cell.id if weights in ("", "none") else weights)
        if key not in found or (cell.n or 0) > (found[key].n or 0):
            found[key] = cell
    return list(found.values())


def by_recipe(cells: Iterable[EvidenceCell]) -> list[list[EvidenceCell]]:
    """Cells that differ in the training seed alone, together, in order of seeds; others by themselves; no repeats.

    Names tell seeds apart only where each seed occurs once: a network that was trained again under its old name is no
    second seed.
    """
    groups: dict[tuple[Any, ...], list[EvidenceCell]] = {}
    for cell in distinct(cells):
        groups.setdefault(place_of(cell), []).append(cell)
    found = []
    for members in groups.values():
        seeds, weights = {seed_of(cell) for cell in members}, {cell.first["weights"] for cell in members}
        known = bool(members[0].variant) or len(seeds) == len(members)
        if known and len(weights) == len(members) > 1:
            found.append(sorted(members, key=seed_of))
        else:
            found += [[cell] for cell in members]
    return found


def defaults(cells: Iterable[EvidenceCell]) -> list[EvidenceCell]:
    """The networks that stand for their method: unknown ones, default variants, and these with other seeds."""
    cells = list(cells)

    def key(cell: EvidenceCell) -> tuple[Any, ...]:
        return cell.first["task"], cell.first["method"], recipe_of(cell)

    wanted = {key(cell) for cell in cells if cell.variant and cell.variant["default"]}
    return [cell for cell in cells if not cell.variant or key(cell) in wanted]


def same_seeds(a: Sequence[EvidenceCell], b: Sequence[EvidenceCell]) -> list[tuple[EvidenceCell, EvidenceCell]]:
    """Networks of two sets, two by two: of the same weights, else of the same training seed.

    Empty if some network of the smaller set has no partner: then the sets are taken as independent.
    """
    keys: tuple[Callable[[EvidenceCell], Any], ...] = (lambda cell: cell.first["weights"], seed_of)
    for key in keys:
        ours, theirs = ({key(cell): cell for cell in cells} for cells in (a, b))
        common = [seed for seed in ours if seed in theirs]
        if len(ours) == len(a) and len(theirs) == len(b) and len(common) == min(len(a), len(b)):
            return [(ours[seed], theirs[seed]) for seed in common]
    return []


# ---------------------------------------------------------------------------------------------------- one quantity


def on_logarithms(unit: str) -> bool:
    """Whether values of a unit are averaged on the log scale: perplexities, times and speeds; all else as it is."""
    return unit in ("perplexity", "s", "1/s")


def t_interval(values: Sequence[float], unit: str, *, n: int = 0, confidence: float = CONFIDENCE) -> Interval:
    """Mean over seeds with its t interval, both of logarithms where the unit asks for it (`on_logarithms`).

    Args:
        values: one per network, finite, at least two.
        unit: of the values.
        n: sequences behind all of them.
        confidence: coverage asked for.
    """
    scaled, log = _scaled(values, unit)
    count = len(scaled)
    common: dict[str, Any] = {"confidence": confidence, "resamples": 0, "over": OVER, "units": count}
    if np.ptp(scaled) == 0:
        value = float(values[0])
        return Interval(value, value, value, n, "constant", "equal for all seeds", 0.0, **common)
    mean, error = float(scaled.mean()), float(scaled.std(ddof=1)) / math.sqrt(count)
    half = _quantile(count - 1, confidence) * error
    value, low, high = (_back(end, log) for end in (mean, mean - half, mean + half))
    return Interval(value, low, high, n, "t", "", value * error if log else error, **common)


def t_change(
    a: Sequence[float], b: Sequence[float], unit: str, *, paired: bool, n: int = 0, confidence: float = CONFIDENCE
) -> tuple[Interval, Interval | None, float]:
    """What changes from the mean over one set of seeds to that over another.

    Args:
        a, b: one value per network, finite; at least two of each.
        unit: of the values; it says whether logarithms are tested (`on_logarithms`).
        paired: value s of both belongs to one seed: t of their differences, else Welch's t of two independent sets.
        n: sequences behind the smaller set.
        confidence: coverage asked for.

    Returns:
        the difference b - a of the means; the same in percent of the mean of a as it is (None unless all
        values are positive); the p-value of "no change", NaN where the seeds have no spread.
    """
    from scipy import stats

    both, log = _scaled([*a, *b], unit)
    one, two = both[: len(a)], both[len(a) :]
    tiny = 1e-12 * max(float(log), float(np.abs(both).max()))  # rounding
    gap = float(two.mean() - one.mean())
    gap = gap if abs(gap) > tiny else 0.0
    parts = [two - one] if paired else [one, two]
    common: dict[str, Any] = {"confidence": confidence, "resamples": 0, "over": OVER, "units": min(len(a), len(b))}
    if max(float(np.ptp(part)) for part in parts) <= tiny:
        low, high, p, error = gap, gap, math.nan, 0.0
        method, reason = "constant", "equal for all seeds"
    else:
        squares = [float(part.var(ddof=1)) / len(part) for part in parts]
        error = math.sqrt(sum(squares))
        freedom = sum(squares) ** 2 / sum(
            square**2 / (len(part) - 1) for square, part in zip(squares, parts, strict=True)
        )
        half = _quantile(freedom, confidence) * error
        low, high, p = gap - half, gap + half, float(2 * stats.t.sf(abs(gap) / error, freedom))
        method, reason = "t", "paired by seed" if paired else f"{len(a)} and {len(b)} independent networks, Welch"
    first, ratio = _back(float(one.mean()), log), _back(gap, log) if log else 1.0
    ends = [first * (_back(end, log) - 1.0) if log else end for end in (gap, low, high)]

    def times(unit: float) -> Interval:
        value, low, high = (unit * end for end in ends)
        return Interval(value, low, high, n, method, reason, unit * error * (first * ratio if log else 1.0), **common)

    return times(1.0), times(100.0 / first) if log or both.min() > 0 else None, p


def _scaled(values: Sequence[float], unit: str) -> tuple[np.ndarray, bool]:
    """Logarithms, and True, if the unit asks for them and all values have one; else the values, and False."""
    numbers = np.asarray(values, dtype=np.float64)
    log = on_logarithms(unit) and bool((numbers > 0).all())
    return np.log(numbers) if log else numbers, log


def _back(value: float, log: bool) -> float:
    with np.errstate(over="ignore"):  # two seeds that are worlds apart: no upper end
        return float(np.exp(value)) if log else value


# ------------------------------------------------------------------------------------------------------- replicates


def over_seeds(
    values: Sequence[float], networks: Sequence[str], resamples: int, factor: float = 1.0, unit: str = "perplexity"
) -> np.ndarray:
    """Mean over seeds and its replicates, (1 + resamples,); see the module's text.

    Args:
        values: one per network, finite.
        networks: hashes of their weights, in the same order; equal ones get equal g in all quantities.
        resamples: replicates wanted.
        factor: k, see `widening`.
        unit: of the values; it says whether the mean is of logarithms (`on_logarithms`).
    """
    scaled, log = _scaled(values, unit)
    mean, count = scaled.mean(), len(scaled)
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
    return t_over_normal(1 / inverse, confidence) if inverse else 1.0


def t_over_normal(freedom: float, confidence: float = CONFIDENCE) -> float:
    """The factor k for given degrees of freedom: S - 1 for a formula of one set of S seeds."""
    from scipy import stats

    return _quantile(freedom, confidence) / float(stats.norm.ppf(0.5 + confidence / 2))


@lru_cache(maxsize=64)
def _quantile(freedom: float, confidence: float) -> float:
    """Half of a two-sided t interval, in standard errors."""
    from scipy import stats

    return float(stats.t.ppf(0.5 + confidence / 2, freedom))


@lru_cache(maxsize=64)
def _normal(networks: tuple[str, ...], resamples: int) -> np.ndarray:
    """(resamples, seeds): the g_s of the module's text."""
    digest = hashlib.sha256("\x1f".join(networks).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "big")).standard_normal((resamples, len(networks)))


def about_seeds(points: Iterable[Sequence[Any]]) -> list[str]:
    """What a caption says of values over several training seeds: a sentence, or nothing if there are none.

    Args:
        points: what is behind each value shown, one member per network.
    """
    counts = sorted({len(networks) for networks in points if len(networks) > 1})
    if not counts:
        return []
    many = " or ".join(map(str, counts))
    return [
        f"Where a recipe has {many} {OVER}: the mean over seeds (of logarithms for perplexities, times and speeds) and "
        "its 95 % t interval over seeds."
    ]


def over_what(points: Iterable[Sequence[Any]]) -> str:
    """What the intervals of these values are over, for a caption; arguments as for `about_seeds`."""
    several = {len(networks) > 1 for networks in points if networks}
    if several == {True}:
        return f"over {OVER}"
    return "over sequences" + (f", over {OVER} where there are several" if True in several else "")


def fewest(groups: Iterable[Sequence[EvidenceCell]]) -> int:
    """The smallest number of seeds where there are several; 0 if there is one of each."""
    found = min((len(group) for group in groups if len(group) > 1), default=math.inf)
    return 0 if math.isinf(found) else int(found)
