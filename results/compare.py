"""Two runs, cell by cell: what got better, what got worse, and what cannot be told apart.

Cells belong together as `matching` says. A number is compared only with one of the same definition, scorer revision and
arithmetic; what differs is listed, not subtracted. Sequences are paired where they belong together: the same cell drawn
from the same streams, or the same held-out prompts. Intervals and p-values come from the stored columns (`columns`);
where a run has none, from the two rows' own intervals, unpaired. MAUVE has neither, for its low and high are those of
its k-means seeds: two networks are subtracted without a test, and only at equal n and settings, which shift its value.

Where both runs hold several training seeds of a recipe, a row of its own compares the means over seeds, with the t
interval and the t test over seeds (`seeds.t_change`), paired by seed where both have the same ones. It says whether the
recipe changed; the rows of its networks say whether these networks differ.

p-values are adjusted by Holm's method, and "better" or "worse" is said only below 0.05. Rows of networks are one
family, rows over seeds another: they answer different questions with the same numbers, and neither should pay for the
size of the other.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from tsdfm_bench.results.evidence import EvidenceCell, recorded_variants, run_cells
from tsdfm_bench.results.frontier import told_apart
from tsdfm_bench.results.matching import describe, matched, matched_recipes
from tsdfm_bench.results.numbers import MISSING, plain, with_interval
from tsdfm_bench.results.replicates import Replicates, own_spread, stream
from tsdfm_bench.results.resampling import compare_terms, permutation_terms, separation
from tsdfm_bench.results.rows import COST_UNITS, Row, finite, pick
from tsdfm_bench.results.seeds import OVER, t_change
from tsdfm_bench.results.stats import CONFIDENCE, Interval, holm, n_to_separate
from tsdfm_bench.results.table_model import Section, Table, TableColumn, TableRow, Value
from tsdfm_bench.results.training import Variants

if TYPE_CHECKING:
    import pandas as pd

Verdict = Literal["better", "worse", "higher", "lower", "not separable", "identical", "changed", "not compared"]

LEVEL = 0.05
ROLES = ("perplexity", "bits per byte", "entropy", "distinct", "repetition", "mauve", "speed")
_SETTINGS = re.compile(r"\bsettings ([0-9a-f]{8})\b")
_MOST_RESAMPLES = 9999


@dataclass(frozen=True)
class Change:
    """One number in both runs.

    Args:
        name: of the cell.
        metric, scorer, unit, better: of the number.
        a, b: the rows.
        difference: b - a, with its interval where there is one.
        percent: 100 (b / a - 1), with its interval; None where a is not positive.
        paired: whether sequences were paired.
        pvalue, adjusted: of "no difference", before and after Holm's correction; NaN if there is no test.
        verdict: what follows.
        needed: sequences per row that would separate the two at this effect and at the level that Holm's correction
            asks for, if they are not separable; None if that is no more than there are.
        reason: why it was not compared, or "".
        seeds: training seeds behind a and b, if the row is over seeds; else None.
    """

    name: str
    metric: str
    scorer: str
    unit: str
    better: str
    a: Row
    b: Row
    difference: Interval | None = None
    percent: Interval | None = None
    paired: bool = False
    pvalue: float = math.nan
    adjusted: float = math.nan
    verdict: Verdict = "not compared"
    needed: int | None = None
    reason: str = ""
    seeds: tuple[int, int] | None = None


@dataclass(frozen=True)
class Comparison:
    """All that two runs have in common.

    Args:
        a, b: names of the runs.
        changes: by cell and metric, those over training seeds last.
        only_a, only_b: cells that the other run lacks.
        notes: matches by settings, and what else a reader must know.
    """

    a: str
    b: str
    changes: list[Change]
    only_a: list[str] = field(default_factory=list)
    only_b: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def counts(self, *, seeds: bool = False) -> Counter[str]:
        """How often each verdict was reached, by single networks or over training seeds."""
        return Counter(change.verdict for change in self.changes if (change.seeds is not None) is seeds)


def compare_runs(
    a: pd.DataFrame,
    b: pd.DataFrame,
    *,
    roots: tuple[str | Path | None, str | Path | None] = (None, None),
    names: tuple[str, str] = ("A", "B"),
    metrics: Sequence[str] | None = None,
) -> Comparison:
    """Compare two summaries, from the first to the second.

    Args:
        a, b: see `tsdfm_bench.results.schema`.
        roots: their run folders, for per-sequence columns; None: the summaries' intervals only.
        names: of the runs, for the reader.
        metrics: only these; None = the numbers of the main table, ("all",) = every one.
    """
    sides = (Replicates(a, roots[0]), Replicates(b, roots[1]))
    variants = reduce(Variants.plus, map(recorded_variants, roots))
    ours, theirs = (
        run_cells(summary[summary["state"] == "done"], side, variants)
        for summary, side in zip((a, b), sides, strict=True)
    )
    together, alone = matched_recipes(ours, theirs)
    covered = {cell.id for pair in together for recipe in pair[:2] for cell in recipe.networks}
    pairs, only_a, only_b, notes = matched(ours, theirs, covered)
    names_of = told_apart([describe(first) for first, _, _ in pairs], [first.first for first, _, _ in pairs])
    networks = [
        _change(name, first, second, same, key, sides)
        for name, (first, second, same) in zip(names_of, pairs, strict=True)
        for key in _metrics(first, second, metrics)
    ]
    names_of = told_apart([describe(first) for first, _, _ in together], [first.first for first, _, _ in together])
    seeds = [
        _over_seeds(name, first, second, paired, key)
        for name, (first, second, paired) in zip(names_of, together, strict=True)
        for key in _metrics(first, second, metrics)
    ]
    judged = [change for family in (networks, seeds) for change in _adjusted(family)]
    apart = sum(1 for change in judged if math.isfinite(change.pvalue) and not change.paired)
    if apart and any(change.paired for change in judged):
        notes.append(f"{apart} comparisons are of independent sequences or networks, the others are paired.")
    damaged = [f"{name}: {said}" for name, side in zip(names, sides, strict=True) for said in side.damaged.values()]
    return Comparison(*names, judged, only_a, only_b, [*notes, *alone, *_refusals(judged), *damaged])


def _adjusted(family: Sequence[Change]) -> list[Change]:
    """Changes that answer one question, with p-values adjusted together, judged."""
    adjusted = holm([change.pvalue for change in family])
    # The smallest p of those not separable is multiplied by their number: each would have to fall below this level.
    level = LEVEL / max(1, int(np.sum(adjusted >= LEVEL)))
    return [_judged(change, float(p), level) for change, p in zip(family, adjusted, strict=True)]


def _metrics(a: EvidenceCell, b: EvidenceCell, wanted: Sequence[str] | None) -> list[tuple[str, str]]:
    common = [key for key in a.rows if key in b.rows and key[0]]
    if wanted is not None and "all" in wanted:
        return common
    names = {name for name, _ in common}
    if wanted is not None:
        return [key for key in common if key[0] in wanted]
    order = [pick(names, role) for role in ROLES]
    return sorted((key for key in common if key[0] in order), key=lambda key: order.index(key[0]))


# -------------------------------------------------------------------------------------------------- comparing


def _change(
    name: str,
    first: EvidenceCell,
    second: EvidenceCell,
    same: bool,
    key: tuple[str, str],
    sides: tuple[Replicates, Replicates],
) -> Change:
    a, b = first.rows[key], second.rows[key]
    found = _about(name, a, b)
    if reason := _incomparable(a, b) or _unlike([a, b]):
        return Change(**found, reason=reason)
    if a["unit"] in COST_UNITS:
        return _points(found, a, b, "measured once")
    if same and all(a[name] == b[name] for name in ("value", "low", "high", "n")):
        zero = Interval(0.0, 0.0, 0.0, int(a["n"] or 0), "constant", "the same cell and the same numbers")
        return Change(**found, difference=zero, percent=zero, paired=True, verdict="identical")
    one, two = (side.terms(cell.id, *key) for side, cell in zip(sides, (first, second), strict=True))
    if one is None or two is None or min(one.n, two.n) < 2:
        return _from_intervals(found, a, b)
    paired = stream(a) == stream(b) if not same else True
    clusters = [side.clusters(cell.id) for side, cell in zip(sides, (first, second), strict=True)]
    if paired:
        n = min(one.n, two.n)
        one, two = one.head(n), two.head(n)
        if _same(one.a, two.a) and _same(one.b, two.b):
            zero = Interval(0.0, 0.0, 0.0, n, "constant", "the same sequences")
            return Change(**found, difference=zero, percent=zero, paired=True, verdict="identical")
    options: dict[str, Any] = {
        "paired": paired,
        "clusters": None if clusters[0] is None else clusters[0][: one.n],
        "clusters_b": None if clusters[1] is None else clusters[1][: two.n],
    }
    positive = a["value"] > 0 and b["value"] > 0
    reduction = compare_terms(two, one, "reduction", **options) if positive else None
    return Change(
        **found,
        difference=compare_terms(two, one, "difference", **options),
        percent=_negated(reduction) if reduction is not None else None,
        paired=paired,
        pvalue=_pvalue(two, one, options),
    )


def _over_seeds(name: str, first: EvidenceCell, second: EvidenceCell, paired: bool, key: tuple[str, str]) -> Change:
    """The same of two recipes: from the mean over seeds to the mean over seeds."""
    a, b = first.rows[key], second.rows[key]
    seeds = (len(first.networks), len(second.networks))
    found = {**_about(name, a, b), "paired": paired, "seeds": seeds}
    if reason := _incomparable(a, b) or _unlike([*first.behind(*key), *second.behind(*key)]):
        return Change(**found, reason=reason)
    if a["unit"] in COST_UNITS:
        return _points(found, a, b, "measured once")
    ours, theirs = ([float(row["value"]) for row in cell.behind(*key)] for cell in (first, second))
    n = min((int(row["n"]) for row in (a, b) if row["n"] is not None), default=0)
    if paired and _same(np.array(ours), np.array(theirs)):
        over: dict[str, Any] = {"resamples": 0, "over": OVER, "units": min(seeds)}
        zero = Interval(0.0, 0.0, 0.0, n, "constant", "the same numbers for every seed", **over)
        return Change(**found, difference=zero, percent=zero, verdict="identical")
    difference, percent, p = t_change(ours, theirs, a["unit"], paired=paired, n=n)
    return Change(**found, difference=difference, percent=percent, pvalue=p)


def _about(name: str, a: Row, b: Row) -> dict[str, Any]:
    """What every change says of the rows it compares."""
    found: dict[str, Any] = {"name": name, "metric": a["metric"], "scorer": a["scorer"], "a": a, "b": b}
    return found | {"unit": a["unit"] or b["unit"], "better": a["better"] or b["better"]}


def _incomparable(a: Row, b: Row) -> str:
    """Why two rows cannot be compared, or ""."""
    for row, which in ((a, "first"), (b, "second")):
        if not finite(row["value"]):
            return f"no value in the {which} run" + (f": {row['reason']}" if row["reason"] else "")
    for name in ("unit", "scorer_revision", "scorer_dtype"):
        if a[name] != b[name]:
            return f"{name.replace('_', ' ')} differs: {a[name]} and {b[name]}"
    alike = own_spread(a) or a["definition"] == b["definition"]  # that of MAUVE: `_unlike`
    return "" if alike else "the two runs define this number differently"


def _unlike(rows: Sequence[Row]) -> str:
    """Why rows of networks cannot be compared because of n or settings, which shift MAUVE, or ""."""
    if not own_spread(rows[0]):
        return ""
    settings = [_SETTINGS.search(row["definition"]) for row in rows]
    given = [found[1] if found else row["definition"] for found, row in zip(settings, rows, strict=True)]
    for what, values in (("n differs", [str(row["n"]) for row in rows]), ("settings differ", given)):
        if len(different := dict.fromkeys(values)) > 1:
            return f"{what}: {' and '.join(different)}"
    return ""


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal up to the rounding of another machine."""
    return bool(np.allclose(a, b, rtol=1e-6, atol=1e-9))


def _pvalue(two: Any, one: Any, options: dict[str, Any]) -> float:
    """A permutation p-value; small ones are found with more permutations, since Holm's factor multiplies them."""
    p = permutation_terms(two, one, resamples=1999, **options)
    if p >= 0.01:
        return p
    p = permutation_terms(two, one, resamples=_MOST_RESAMPLES, **options)
    if p > 1 / (1 + _MOST_RESAMPLES) or options["clusters"] is not None or options["clusters_b"] is not None:
        return p
    # no permutation reached the difference: how much smaller p is than 1 in so many, Student's t says
    rarest = 2.0 ** (1 - one.n) if options["paired"] else 0.0  # of all changes of signs
    return min(p, max(separation(two, one, paired=options["paired"]), rarest))


def _points(found: dict[str, Any], a: Row, b: Row, why: str) -> Change:
    """Two numbers without a test."""

    def point(value: float) -> Interval:
        return Interval(value, math.nan, math.nan, 0, "none", why, resamples=0)

    percent = point(100.0 * (b["value"] / a["value"] - 1.0)) if a["value"] > 0 else None
    return Change(**found, difference=point(b["value"] - a["value"]), percent=percent)


def _negated(reduction: Interval) -> Interval:
    """From "by how many percent lower" to "by how many percent it changed"."""
    return replace(reduction, value=-reduction.value, low=-reduction.high, high=-reduction.low)


def _from_intervals(found: dict[str, Any], a: Row, b: Row) -> Change:
    """Two independent rows with only their intervals: normal approximation."""
    from scipy import stats

    z = 1.959963984540054
    ends = [a["low"], a["high"], b["low"], b["high"]]
    gap = b["value"] - a["value"]
    n = min((int(row["n"]) for row in (a, b) if row["n"] is not None), default=0)
    if own_spread(a):
        return _points(found, a, b, "low and high of a row are the spread of its estimator")
    if not all(finite(end) for end in ends):
        return _points(found, a, b, "a row has no interval")
    errors = [(row["high"] - row["low"]) / (2 * z) for row in (a, b)]
    error = math.hypot(*errors)
    if error <= 0:
        return _points(found, a, b, "the rows' own intervals have no width")
    why = "from the rows' own intervals, unpaired"
    difference = Interval(gap, gap - z * error, gap + z * error, n, "normal", why, error, CONFIDENCE, 0)
    percent = None
    if a["value"] > 0 and b["value"] > 0:
        relative = math.hypot(errors[0] / a["value"], errors[1] / b["value"])
        ratio = b["value"] / a["value"]
        low, high = (100.0 * (ratio * math.exp(side * z * relative) - 1.0) for side in (-1, 1))
        percent = Interval(100.0 * (ratio - 1.0), low, high, n, "normal", why, 100 * ratio * relative, CONFIDENCE, 0)
    return Change(**found, difference=difference, percent=percent, pvalue=float(2 * stats.norm.sf(abs(gap) / error)))


def _judged(change: Change, adjusted: float, level: float) -> Change:
    """A change with its verdict; `level` is the one that its p-value would have to fall below."""
    verdict: Verdict = change.verdict
    needed = None
    gap = change.difference.value if change.difference is not None else math.nan
    if verdict == "identical" or change.reason:
        pass
    elif math.isnan(change.pvalue):
        verdict = "identical" if gap == 0 else "changed"
    elif adjusted < LEVEL:
        if change.better:
            verdict = "better" if (gap < 0) == (change.better == "lower") else "worse"
        else:
            verdict = "higher" if gap > 0 else "lower"
    else:
        verdict = "not separable"
        if change.difference is not None and change.seeds is None:
            needed = n_to_separate(change.difference, confidence=1 - level)
            needed = needed if needed is not None and needed > change.difference.n else None
    return replace(change, adjusted=adjusted, verdict=verdict, needed=needed)


def _refusals(changes: Iterable[Change]) -> list[str]:
    counted = Counter((c.metric, c.scorer, c.reason) for c in changes if c.reason)
    return [
        f"{metric}{f' ({scorer})' if scorer else ''} not compared in {count} rows: {reason}."
        for (metric, scorer, reason), count in counted.items()
    ]


# --------------------------------------------------------------------------------------------------- printing


def comparison_table(comparison: Comparison) -> Table:
    """The comparison as a table: what is over training seeds, then single networks, then references."""
    columns = [
        TableColumn("cell", "row", align="left", wrap=14),
        TableColumn("metric", "number", align="left", wrap=14),
        TableColumn("a", "first"),
        TableColumn("b", "second"),
        TableColumn("percent", "change", "%"),
        TableColumn("p", "p", "Holm", give_way=1),
        TableColumn("verdict", "", align="left"),
        TableColumn("needed", "n needed", give_way=2),
    ]
    rows = []
    before = ""
    for change in comparison.changes:
        if change.reason:
            continue
        title = _title(change.metric) + (f" ({change.scorer})" if change.scorer else "")
        name = change.name + (f", {_seeds(change.seeds)}" if change.seeds is not None else "")
        percent = change.percent
        shown = _percent(percent) if percent is not None else MISSING
        cells = {
            "cell": Value(name if name != before else "", name),
            "metric": Value(title, title),
            "a": _value(change.a),
            "b": _value(change.b),
            "percent": Value(shown, *_numbers(percent)),
            "p": Value(_p(change.adjusted), change.adjusted if math.isfinite(change.adjusted) else None),
            "verdict": Value(change.verdict, change.verdict),
            "needed": Value(f"{change.needed:,}" if change.needed else "", change.needed),
        }
        before = name
        single: Section = "method" if change.a["kind"] == "method" else "reference"
        rows.append(TableRow(single if change.seeds is None else "seeds", cells))
    rows.sort(key=lambda row: ("seeds", "method", "reference").index(row.section))
    said = _counted(comparison.counts())
    notes = [f"From {comparison.a} (first) to {comparison.b} (second): {said or 'nothing in common'}."]
    if over := _counted(comparison.counts(seeds=True)):
        notes.append(
            f"Over training seeds: {over}. These rows compare means over the networks of a recipe (of logarithms "
            "for perplexities), with t intervals and t tests over seeds, paired where both runs have the same seeds."
        )
    tested = [change for change in comparison.changes if math.isfinite(change.pvalue)]
    if any(change.seeds is None for change in tested):
        notes.append(
            "Change: percent with its 95 % interval, of the sequences both have if paired. p: permutation "
            f"test of no difference, adjusted by Holm over {'all single networks' if over else 'the whole table'}; "
            f"a verdict needs p < {LEVEL:g}. n needed: sequences per row to separate the two at this effect and Holm's "
            "level with 80 % power."
        )
    if any(change.seeds is not None for change in tested):
        notes.append(
            "p of rows over training seeds: t test, adjusted by Holm among these rows, for they answer another "
            f"question; a verdict needs p < {LEVEL:g}."
        )
    if any(own_spread(c.a) and c.seeds is None and c.verdict == "changed" for c in comparison.changes):
        notes.append("MAUVE of single networks has no test: its low and high are those of its k-means seeds.")
    if any(c.verdict == "identical" and c.paired and c.a["n"] != c.b["n"] for c in comparison.changes):
        notes.append("Identical: the sequences that both rows have are the same; one row has more of them.")
    for name, only in ((comparison.a, comparison.only_a), (comparison.b, comparison.only_b)):
        if only:
            notes.append(f"Only in {name}: {'; '.join(only)}.")
    return Table(f"{comparison.a} → {comparison.b}", columns, rows, [*notes, *comparison.notes])


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{counts[verdict]} {verdict}" for verdict in get_args(Verdict) if counts[verdict])


def _seeds(counts: tuple[int, int]) -> str:
    return f"{counts[0]} seeds" if counts[0] == counts[1] else f"{counts[0]} and {counts[1]} seeds"


_TITLES = {
    "perplexity": "gen-PPL",
    "bits per byte": "bits/byte",
    "entropy": "entropy, nats",
    "distinct": "distinct-2",
    "repetition": "rep-4",
    "mauve": "MAUVE",
    "speed": "seq/s",
}


def _title(metric: str) -> str:
    """The short name of a usual metric, else its own."""
    usual = ("gen_ppl", "gen_ppl/pooled", "bits_per_byte", "entropy_nats", "distinct_2", "repetition_4", "mauve")
    if metric not in (*usual, "sequences_per_second"):
        return metric
    return next(title for role, title in _TITLES.items() if pick([metric], role))


def _value(row: Row) -> Value:
    value, low, high = (_number(row[key]) for key in ("value", "low", "high"))
    return Value(with_interval(row["value"], row["low"], row["high"], show=False), value, low, high)


def _number(value: Any) -> float | None:
    return float(value) if finite(value) else None


def _numbers(interval: Interval | None) -> tuple[float | None, float | None, float | None]:
    if interval is None:
        return None, None, None
    return _number(interval.value), _number(interval.low), _number(interval.high)


def _percent(found: Interval) -> str:
    text = with_interval(found.value, found.low, found.high) if math.isfinite(found.low) else plain(found.value)
    return text if text.startswith("-") or found.value == 0 else f"+{text}"


def _p(value: float) -> str:
    if not math.isfinite(value):
        return MISSING
    return f"{value:.2f}" if value >= 0.1 else f"{value:.3f}" if value >= 0.001 else "<0.001"


def comparison_json(comparison: Comparison) -> dict[str, Any]:
    """Everything as JSON values."""

    def ends(interval: Interval | None) -> dict[str, Any] | None:
        if interval is None:
            return None
        value, low, high = _numbers(interval)
        return {"value": value, "low": low, "high": high, "how": interval.description}

    changes = [
        {
            "row": c.name,
            "cells": [c.a["cell"], c.b["cell"]],  # over seeds: those of the networks, joined by "+"
            "metric": c.metric,
            "scorer": c.scorer,
            "unit": c.unit,
            "first": {k: _number(c.a[k]) for k in ("value", "low", "high")} | {"n": c.a["n"]},
            "second": {k: _number(c.b[k]) for k in ("value", "low", "high")} | {"n": c.b["n"]},
            "difference": ends(c.difference),
            "percent": ends(c.percent),
            "paired": c.paired,
            "p": _number(c.pvalue),
            "p_holm": _number(c.adjusted),
            "verdict": c.verdict,
            "n_needed": c.needed,
            "reason": c.reason,
            "training_seeds": None if c.seeds is None else list(c.seeds),
        }
        for c in comparison.changes
    ]
    return {
        "first": comparison.a,
        "second": comparison.b,
        "verdicts": dict(comparison.counts()),
        "verdicts_over_seeds": dict(comparison.counts(seeds=True)),
        "changes": changes,
        "only_first": comparison.only_a,
        "only_second": comparison.only_b,
        "notes": comparison.notes,
    }
