"""The verdicts on claims as a table: what was claimed, what was measured, and the entropy beside it.

One row per claim and setting. The measured value has its 95 % interval; the published one stands beside it, never in
its column. For what a scorer judged, the entropies of the rows compared are shown, since a lower perplexity with a
lower entropy is no gain. Footnotes say what each claim's sentence is, where it stands and how it was tested.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tsdfm_bench.results.claim_file import SCORED, Claims
from tsdfm_bench.results.claims import Instance, Verdict
from tsdfm_bench.results.evidence import Evidence, EvidenceCell
from tsdfm_bench.results.numbers import MISSING, plain
from tsdfm_bench.results.rows import pick
from tsdfm_bench.results.table_model import Table, TableColumn, TableRow, Value

COLUMNS = (
    ("claim", "claim", "left"),
    ("verdict", "verdict", "left"),
    ("setting", "setting", "left"),
    ("measured", "measured", "right"),
    ("published", "published", "right"),
    ("unit", "", "left"),
    ("entropy", "entropy, nats", "left"),
    ("here", "in this setting", "left"),
)


def claims_table(verdicts: Sequence[Verdict], claims: Claims, evidence: Evidence) -> Table:
    """See the module's text.

    Args:
        verdicts: from `results.claims.verify`.
        claims: the file that they were made from.
        evidence: the results that they are about.
    """
    cells = {cell.id: cell for cell in evidence.cells}
    scored = {claim.id: _judged(claim) for claim in claims.claims}
    several = len({instance.where.get("task") for verdict in verdicts for instance in verdict.instances}) > 1
    rows = []
    for verdict in verdicts:
        lines = verdict.instances or [Instance({}, verdict.status, verdict.reason)]
        for k, instance in enumerate(lines):
            shown = _row(verdict, instance, several, _entropies(instance, scored[verdict.id], cells))
            if k:
                shown |= {key: replace(shown[key], text="") for key in ("claim", "verdict", "published")}
            rows.append(TableRow("method", shown))
    title = " ".join(part for part in (claims.title, f"({claims.citation})" if claims.citation else "") if part)
    columns = [TableColumn(key, name, align=align) for key, name, align in COLUMNS]  # type: ignore[arg-type]
    return Table(f"Claims of {title}" if title else "Claims", columns, rows, [_footnote(v) for v in verdicts])


def _judged(claim: Any) -> list[str]:
    """The rows whose scored quantities the claim's value compares."""
    return list(dict.fromkeys(q.rows for q in claim.value.quantities if q.function in SCORED))


def _row(verdict: Verdict, instance: Instance, with_task: bool, entropy: str) -> dict[str, Value]:
    left_out = ("length",) if with_task else ("task", "length")
    where = {key: value for key, value in instance.where.items() if key not in left_out and value is not None}
    ends = (instance.low, instance.high)
    measured = plain(instance.value) if instance.value is not None else MISSING
    if None not in ends and ends[0] != ends[1]:
        measured += f" [{plain(ends[0])}, {plain(ends[1])}]"
    return {
        "claim": Value(verdict.title, verdict.id),
        "verdict": Value(verdict.status, verdict.status),
        "setting": Value(", ".join(map(str, where.values())) or MISSING),
        "measured": Value(measured, instance.value, *ends),
        "published": Value(MISSING if verdict.published is None else f"{verdict.published:g}", verdict.published),
        "unit": Value(verdict.unit, verdict.unit),
        "entropy": Value(entropy, entropy),
        "here": Value(instance.status, instance.status),
    }


def _entropies(instance: Instance, names: Sequence[str], cells: dict[str, EvidenceCell]) -> str:
    """Mean or range of entropies of each selection that was judged."""
    parts = []
    for name in names:
        values = []
        for cell in (cells[key] for key in instance.cells.get(name, ()) if key in cells):
            row = cell.of(pick({metric for metric, _ in cell.rows}, "entropy"))
            values += [row["value"]] if row is not None else []
        if values:
            low, high = min(values), max(values)
            text = f"{low:.2f}" if high - low < 0.005 else f"{low:.2f} to {high:.2f}"
            parts.append(f"{name.replace('_', ' ')} {text}")
    return ", ".join(parts)


def _footnote(verdict: Verdict) -> str:
    said = f"“{verdict.statement.rstrip('.')}”" if verdict.statement else verdict.title
    where = f" ({verdict.source}; {verdict.confidence})" if verdict.source and verdict.confidence else ""
    unit = f" {verdict.unit}" if verdict.unit else ""
    return f"{verdict.title}: {said}{where}. Tested as {verdict.formula} {verdict.holds}{unit}."
