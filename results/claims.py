"""Verdicts: is a published claim true of these results?

A claim (see `results.claim_file`) is tested once per instance: per text setting, per scorer, and per value of what its
`for_each` names. An instance has a value with a 95 % interval, from stored per-sequence numbers where they exist
(`results.replicates`), and one of four verdicts:

    reproduced       the whole interval satisfies the bound, and no guard fails
    contradicted     the whole interval violates the bound
    not separable    the interval holds the bound; the number of sequences that would separate them is given
    not testable     rows or conditions are missing, or a guard fails: the claim would hold for the wrong reason

Over its instances a claim is reproduced only if every one of them is: an intersection-union test, which needs no
correction. It is contradicted if one of k instances is at confidence 1 - 0.05 / k (Bonferroni). A failed guard, above
all collapsed entropy (a lower perplexity follows from that alone), prevents "reproduced", never "contradicted".
Seconds that were measured once decide only where they clear the bound by a factor of two. Where networks of several
training seeds fit a selection, they are one row whose interval is over seeds (`results.seeds`).

A minimum over rows that are all but equal is known less well than its interval says: of three equal ones a 95 %
interval covers in 92 % (tests/benchmarks/coverage.py).
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np

from tsdfm_bench.results.claim_file import SCORED, Bound, Claim, Claims, Condition, Selection
from tsdfm_bench.results.evidence import Evidence, EvidenceCell
from tsdfm_bench.results.formula import CURVES, NotOne
from tsdfm_bench.results.frontier import OutOfRange
from tsdfm_bench.results.numbers import plain, with_interval
from tsdfm_bench.results.quantities import Missing, Rows
from tsdfm_bench.results.replicates import interval
from tsdfm_bench.results.seeds import defaults, place_of, recipe_of
from tsdfm_bench.results.stats import CONFIDENCE, Interval, n_to_separate

Status = Literal["reproduced", "contradicted", "not separable", "not testable"]
STATUSES: tuple[Status, ...] = ("reproduced", "contradicted", "not separable", "not testable")
TIMING = 2.0  # by what factor one timing may be off: it has no interval, and machines are shared
COLLAPSE = ("entropy-low", "rep-high", "legacy-fp32")
_DEFAULTS: Mapping[str, Any] = {
    "temperature": [1.0, "none"],
    "top_p": "none",
    "draw": ["fp64", "none"],
    "prefix": "none",
}


@dataclass(frozen=True)
class Instance:
    """A claim in one setting.

    Args:
        where: scorer, source, task, length, ... that it was tested under.
        status: the verdict.
        reason: one sentence.
        value, low, high: of the claim's formula, with its interval; None if it could not be had.
        n: sequences behind it.
        n_needed: sequences per row that would separate value and bound, if it is not separable.
        cells: ids of the cells used, by name of the selection.
    """

    where: dict[str, Any]
    status: Status
    reason: str
    value: float | None = None
    low: float | None = None
    high: float | None = None
    n: int | None = None
    n_needed: int | None = None
    cells: dict[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """What became of a claim.

    Args:
        id, title, statement, source, confidence, unit, note, published: of the claim.
        formula, holds: as written.
        status: see the module's text.
        reason: one or two sentences.
        instances: all that were looked at.
    """

    id: str
    title: str
    status: Status
    reason: str
    statement: str
    source: str
    confidence: str
    formula: str
    holds: str
    unit: str
    published: float | None
    note: str
    instances: list[Instance]

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


def verify(evidence: Evidence, claims: Claims, only: Sequence[str] | None = None) -> list[Verdict]:
    """The verdicts on claims, in their order.

    Args:
        evidence: from `results.evidence.load_evidence`.
        claims: from `results.claim_file.read_claims`.
        only: ids; None = all.
    """
    chosen = [claim for claim in claims.claims if only is None or claim.id in only]
    return [_Test(evidence, claims.rows, claim).verdict() for claim in chosen]


class _Test:
    """One claim on one set of results."""

    def __init__(self, evidence: Evidence, rows: Mapping[str, Selection], claim: Claim) -> None:
        self.evidence, self.claim = evidence, claim
        self.selections = {name: rows[name] for name in claim.rows}

    # ----------------------------------------------------------------------------------------------- instances

    def settings(self) -> tuple[list[tuple[dict[str, Any], dict[str, list[EvidenceCell]]]], list[str]]:
        """Every complete setting with its cells, and sentences about what is missing."""
        found, missing = [], list[str]()
        groups: list[tuple[Any, ...] | None] = [*self.evidence.groups]
        for group in groups or [None]:
            matched = {name: self._cells(selection, group) for name, selection in self.selections.items()}
            place = {} if group is None else {"task": group[0], "length": group[3]}
            for values in itertools.product(*(self._values(d, matched) for d in self.claim.dimensions)):
                where = dict(zip(self.claim.dimensions, values, strict=True))
                cells = {name: self._bound(name, members, where) for name, members in matched.items()}
                empty = [name for name, members in cells.items() if not members]
                if empty:
                    missing += [self._wanted(name, where, place) for name in empty]
                else:
                    shown = {k: v.name if isinstance(v, EvidenceCell) else v for k, v in where.items()}
                    found.append(({**place, **shown}, cells))
        return found, list(dict.fromkeys(missing))

    def _cells(self, selection: Selection, group: tuple[Any, ...] | None) -> list[EvidenceCell]:
        where: dict[str, Any] = {k: v for k, v in {**_DEFAULTS, **selection.where}.items() if v != "any"}
        if group is not None and group[-1]:
            where["prefix"] = selection.where.get("prefix", group[-1])
        found = self.evidence.find({**where, "options": selection.options or {}}, group)
        if "checkpoint" not in selection.where:  # a sampler that is fed the true law is no generator
            found = [cell for cell in found if not cell.is_oracle]
        if selection.options is None and "label" not in selection.where:
            # A checkpoint whose training is known is no option: what it is, its variant says.
            plain = [cell for cell in found if not cell.options]
            known = [cell for cell in found if set(cell.options) == {"checkpoint"} and cell.variant]
            found = plain + known if selection.variant is not None else _standing(plain, known)
        elif selection.variant is None:
            found = defaults(found)
        wanted = selection.variant or {}
        if wanted:  # a control that was trained for another time controls nothing
            found = [cell for cell in found if cell.variant.get("alike", True)]
        return [c for c in found if all(_same(c.variant.get(k), v) for k, v in wanted.items())]

    def _values(self, dimension: str, matched: Mapping[str, list[EvidenceCell]]) -> list[Any]:
        """What a dimension runs over; [None] if nothing, so that what is missing is found."""
        if dimension in matched:
            return matched[dimension] or [None]
        cells = [cell for name, members in matched.items() if not self._free(name, dimension) for cell in members]
        if dimension == "scorer":
            values = [scorer for cell in cells for scorer in sorted(cell.scorers)]
        else:
            values = [cell.first[dimension] for cell in cells if cell.first[dimension] not in (None, "")]
        return list(dict.fromkeys(values)) or [None]

    def _free(self, name: str, dimension: str) -> bool:
        selection = self.selections[name]
        return dimension in selection.unbound or dimension in selection.where

    def _bound(self, name: str, cells: list[EvidenceCell], where: Mapping[str, Any]) -> list[EvidenceCell]:
        for dimension, value in where.items():
            if dimension == name:
                cells = [cell for cell in cells if cell is value]
            elif dimension in ("source", "steps", "length", "task") and not self._free(name, dimension):
                cells = [c for c in cells if c.first[dimension] in (None, "", value) or value is None]
        return cells

    def _wanted(self, name: str, where: Mapping[str, Any], place: Mapping[str, Any]) -> str:
        selection = self.selections[name]
        wanted = {**selection.where, **(selection.options or {}), **(selection.variant or {})}
        wanted |= {
            d: v for d, v in where.items() if d in ("source", "steps") and v is not None and not self._free(name, d)
        }
        text = ", ".join(f"{key} {_listed(value)}" for key, value in wanted.items())
        on = f" for {place['task']}, {place['length']} tokens" if place else ""
        return f"no finished row for '{name}' ({text}){on}"

    # ------------------------------------------------------------------------------------------------- verdicts

    def verdict(self) -> Verdict:
        settings, missing = self.settings()
        instances = [self._instance(where, cells, CONFIDENCE) for where, cells in settings]
        count = len(instances)
        if count > 1:  # contradictions are confirmed at the corrected level
            level = 1 - (1 - CONFIDENCE) / count
            for i, (where, cells) in enumerate(settings):
                if instances[i].status == "contradicted":
                    again = self._instance(where, cells, level)
                    if again.status != "contradicted":
                        corrected = f"not so at {100 * level:.4g} %, corrected for {count} instances"
                        because = again.reason if again.status == "not testable" else instances[i].reason
                        instances[i] = replace(instances[i], status=again.status, reason=f"{because}; {corrected}")
        status, reason = self._together(instances, missing)
        claim = self.claim
        return Verdict(
            id=claim.id,
            title=claim.title,
            status=status,
            reason=reason,
            statement=claim.statement,
            source=claim.source,
            confidence=claim.confidence,
            formula=claim.value.text,
            holds=claim.holds.text,
            unit=claim.unit,
            published=claim.published,
            note=claim.note,
            instances=instances,
        )

    def _instance(self, where: dict[str, Any], cells: dict[str, list[EvidenceCell]], confidence: float) -> Instance:
        scorer = self.claim.scorer or str(where.get("scorer") or "")
        rows = Rows(self.evidence, cells, scorer)
        used = {name: [cell.id for cell in members] for name, members in cells.items()}
        try:
            for condition in self.claim.needs:
                if reason := self._fails(condition, rows):
                    return Instance(where, "not testable", reason, cells=used)
            values = self.claim.value.evaluate(rows.quantity, rows.curve)
            if rows.seeds:
                rows = rows.widened(values[1:], confidence)
                values = self.claim.value.evaluate(rows.quantity, rows.curve)
            found = _interval(values, rows.n, confidence)
            status, reason, needed = self._judge(found, values, rows, confidence)
            try:
                guarded = self._guarded(rows, cells)
            except (Missing, NotOne, OutOfRange) as error:  # what cannot be excluded stops no contradiction either
                guarded = str(error)
        except (Missing, NotOne, OutOfRange) as error:
            return Instance(where, "not testable", str(error), cells=used)
        if guarded and status != "contradicted":
            held = "would hold" if status == "reproduced" else "would not be separable"
            reason = f"{guarded}; at face value it {held}: {reason}"
            status, needed = "not testable", None
        return Instance(
            where=where,
            status=status,
            reason=reason,
            value=_number(found.value),
            low=_number(found.low),
            high=_number(found.high),
            n=found.n or None,
            n_needed=needed,
            cells=used,
        )

    def _judge(
        self, found: Interval, values: np.ndarray, rows: Rows, confidence: float
    ) -> tuple[Status, str, int | None]:
        bound, unit = self.claim.holds, self.claim.unit
        text = _text(found, unit)
        if not math.isfinite(found.value):
            raise Missing(f"the value is {found.value}")
        if found.method == "none":
            return "not testable", f"{text}, without an interval: {found.reason}", None
        low, high = found.low, found.high
        if rows.timed and any(quantity.function == "seconds" for quantity in self.claim.value.quantities):
            low, high = min(low / TIMING, low * TIMING), max(high / TIMING, high * TIMING)
        ends = [bound.margins(end) for end in (low, high)]
        sides = [tuple(sorted(pair)) for pair in zip(*ends, strict=True)]  # per side: worst and best margin
        over = f" (over {rows.seeds} training seeds)" if rows.seeds else ""
        once = " (measured once, no interval)" if rows.constant and found.method == "constant" else ""
        if all(low > 0 or (low == 0 and not bound.strict) for low, _ in sides):
            return "reproduced", f"{text}{once}{over}, claimed {bound.text}", None
        if any(high < 0 or (high == 0 and bound.strict) for _, high in sides):
            return "contradicted", f"{text}{once}{over}, claimed {bound.text}", None
        if once:
            return "not separable", f"{text}{once}; a single timing needs a factor of {TIMING:g} to tell", None
        if rows.seeds:
            return "not separable", f"{text}{over} holds the bound {bound.text}; more training seeds would tell", None
        needed = self._needed(values, rows)
        more = f"; about {needed:,} sequences per row would tell" if needed else "; no number of sequences would tell"
        return "not separable", f"{text} holds the bound {bound.text}{more}", needed

    def _needed(self, values: np.ndarray, rows: Rows) -> int | None:
        """Sequences that would separate the value from the nearest side of the bound."""
        margins = [_interval(np.asarray(m), rows.n, CONFIDENCE) for m in self.claim.holds.margins(values)]
        nearest = min(margins, key=lambda margin: abs(margin.value))
        return n_to_separate(nearest) if nearest.n else None

    def _fails(self, condition: Condition, rows: Rows) -> str:
        """Why a condition does not hold (at its point estimate), or ""."""
        values = np.atleast_1d(condition.formula.evaluate(rows.quantity, rows.curve))
        margin = float(values[0]) if condition.formula.relation.startswith(">") else -float(values[0])
        if math.isfinite(margin) and (margin > 0 or (margin == 0 and "=" in condition.formula.relation)):
            return ""
        shown = ", ".join(rows.shown(quantity) for quantity in condition.formula.quantities)
        why = condition.otherwise or f"it needs {condition.formula.text}"
        return f"{why} ({shown})"

    def _guarded(self, rows: Rows, cells: Mapping[str, list[EvidenceCell]]) -> str:
        """Why the claim may not be called reproduced, or ""."""
        for condition in self.claim.guards:
            if reason := self._fails(condition, rows):
                return reason
        quantities = [q for q in self.claim.value.quantities if q.function in SCORED]
        names = [q.rows for q in quantities if q.function not in CURVES]
        for name in dict.fromkeys(names if self.claim.collapse is None else self.claim.collapse):
            for cell in cells[name]:
                if flags := [flag for flag in COLLAPSE if flag in cell.flags]:
                    return f"'{name}' ({cell.name}) is flagged {' and '.join(flags)}: {_FLAGGED[flags[0]]}"
        return ""

    def _together(self, instances: list[Instance], missing: list[str]) -> tuple[Status, str]:
        counts = Counter(instance.status for instance in instances)
        what = _listed_counts(counts)
        first = {status: next((i for i in instances if i.status == status), None) for status in STATUSES}
        single = len(instances) == 1

        def of(status: Status) -> str:
            instance = first[status]
            assert instance is not None
            return instance.reason if single else f"{what}; {_place(instance.where)}: {instance.reason}"

        if not instances:
            hint = f" Make the rows: tsdfm-bench run --config {self.claim.sweep}" if self.claim.sweep else ""
            return "not testable", f"{'; '.join(missing[:3])}.{hint}"
        if counts["contradicted"]:
            return "contradicted", of("contradicted")
        too_few = self._too_few(instances)
        if counts["not separable"]:
            return "not separable", of("not separable")
        if counts["not testable"]:
            return "not testable", of("not testable")
        if too_few:
            return "not testable", f"{too_few}; {what}: {instances[0].reason}"
        reason = instances[0].reason if single else f"{what}; {_place(instances[0].where)}: {instances[0].reason}"
        return "reproduced", f"{reason}; not judged: {'; '.join(missing[:3])}" if missing else reason

    def _too_few(self, instances: list[Instance]) -> str:
        """Why no one text has as many scorers or sources as the claim speaks of, or ""."""
        for dimension, number in self.claim.at_least.items():
            by_text: dict[tuple[Any, ...], dict[str, None]] = {}
            for instance in instances:
                text = tuple(v for k, v in instance.where.items() if k not in self.claim.dimensions)
                by_text.setdefault(text, {})[str(instance.where[dimension])] = None
            most = max(by_text.values(), key=len)
            if len(most) < number:
                here = f"here {'is' if len(most) == 1 else 'are'} {len(most)} ({', '.join(most)})"
                return f"it speaks of at least {number} {dimension}s of one text, {here}"
        return ""


def _standing(plain: list[EvidenceCell], known: list[EvidenceCell]) -> list[EvidenceCell]:
    """The networks that stand for their method: those without options, and those of them with other training seeds."""
    standing = defaults(plain)
    if not standing:
        return defaults(known)
    recipes = {recipe_of(cell) for cell in standing if cell.variant}
    there = {(cell.first["weights"], *place_of(cell)) for cell in standing}
    more = [cell for cell in defaults(known) if recipe_of(cell) in recipes]
    return standing + [cell for cell in more if (cell.first["weights"], *place_of(cell)) not in there]


_FLAGGED = {
    "entropy-low": "a lower perplexity follows from that alone",
    "rep-high": "repeated text has a low perplexity whatever it says",
    "legacy-fp32": "an fp32 draw acts like a lower temperature",
}


def _interval(values: np.ndarray, n: int, confidence: float) -> Interval:
    values = np.atleast_1d(values)
    if len(values) == 1:
        value = float(values[0])
        return Interval(value, value, value, n, "constant", "no rows", 0.0, confidence, 0, 0)
    return interval(float(values[0]), values[1:], n=n, confidence=confidence)


def _text(found: Interval, unit: str) -> str:
    number = with_interval(found.value, found.low, found.high, show=False)
    ends = f" [{plain(found.low)}, {plain(found.high)}]" if found.method not in ("none", "constant") else ""
    return f"{number}{ends} {unit}".strip()


def _place(where: Mapping[str, Any]) -> str:
    return ", ".join(str(value) for key, value in where.items() if value is not None and key != "length")


def _listed(value: Any) -> str:
    return " or ".join(map(str, value)) if isinstance(value, list) else str(value)


def _listed_counts(counts: Counter[Status]) -> str:
    parts = [f"{counts[status]} {status}" for status in STATUSES if counts[status]]
    return f"of {sum(counts.values())} instances " + ", ".join(parts)


def _same(held: Any, wanted: Any) -> bool:
    return held is not None and (str(held) == str(wanted) or held == wanted)


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


__all__ = ["COLLAPSE", "STATUSES", "Bound", "Instance", "Verdict", "verify"]
