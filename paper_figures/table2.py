"""Table 2: tau against perplexity and diversity.

tau is the time from which on the compass chooses. The paper's table compares it with diversity (second hand: a smaller
tau lowers both perplexity and diversity); its values are unknown, so there is no published column.
"""

from __future__ import annotations

from typing import ClassVar

from tsdfm_bench.paper_figures.ablation import Ablation, Level, ablations, lacking
from tsdfm_bench.paper_figures.base import Made, NothingToDraw, own_names, unique_rows
from tsdfm_bench.results.evidence import Evidence
from tsdfm_bench.results.numbers import with_interval
from tsdfm_bench.results.rows import Row, pick
from tsdfm_bench.results.table_model import Table, TableColumn, TableRow, Value

TAUS = (0.0, 0.25, 0.5, 0.75)


class Table2:
    """See the module's text."""

    title: ClassVar[str] = "tau against diversity"
    sweep: ClassVar[str] = "table2"

    def make(self, evidence: Evidence) -> list[Made]:
        """One table per text setting and source."""
        found = [a for a in ablations(evidence) if len(a.levels("tau")) > 1]
        if not found:
            raise NothingToDraw("no two variants that differ in tau alone")
        return own_names(_table(a, "table2" if a is found[0] else f"table2-{a.task}-{a.source}") for a in found)


def quality_title(metric: str, scorer: str) -> tuple[str, str]:
    """Two lines of a heading."""
    return ("excess NLL", "nats/token") if metric == "excess_nll" else ("gen-PPL", scorer)


def _table(ablation: Ablation, name: str) -> Made:
    columns = [TableColumn("tau", "tau"), TableColumn("seeds", "seeds")]
    columns += [
        TableColumn(f"{m} {s}", *quality_title(m, s), role="perplexity" if m != "excess_nll" else "")
        for m, s in ablation.quality
    ]
    columns.append(TableColumn("entropy", "entropy", "nats", role="entropy"))
    columns += [TableColumn("distinct", "distinct-2")] if ablation.distinct else []
    rows: list[Row | None] = []
    lines = []
    levels = ablation.levels("tau")
    for level in levels:
        mark = " *" if level.is_default else ""
        values = {
            "tau": Value(f"{level.name}{mark}", level.name),
            "seeds": Value(str(len(level.cells)), len(level.cells)),
        }
        pairs = [(f"{m} {s}", m, s) for m, s in ablation.quality] + [("entropy", ablation.entropy, "")]
        pairs += [("distinct", ablation.distinct, "")] if ablation.distinct else []
        for key, metric, scorer in pairs:
            values[key] = level_value(level, metric, scorer, ablation.entropy)
            rows += level.rows(metric, scorer)
        lines.append(TableRow("method", values))
    missing = [f"tau {tau:g}" for tau in TAUS if not any(_same(level, tau) for level in levels)]
    shown = unique_rows(rows)
    notes = [
        "* the default.",
        "± is half the width of a 95 % interval: over training seeds (t) where there are several, else over sequences.",
    ]
    measures = [*ablation.quality, (ablation.entropy, ""), *([(ablation.distinct, "")] if ablation.distinct else [])]
    notes += [f"tau {text}" for text in lacking(levels, measures)]
    notes += [f"{text}." for text in dict.fromkeys(r["definition"] for r in shown if r["definition"])]
    notes.append("The paper's own values are unknown.")
    notes += [f"Incomplete, no row for: {', '.join(missing)}."] if missing else []
    title = f"Table 2. tau against perplexity and diversity; {ablation.name}"
    return Made(name, title, shown, table=Table(title, columns, lines, notes), notes=notes, missing=missing)


def _same(level: Level, tau: float) -> bool:
    return isinstance(level.value, int | float) and float(level.value) == tau


def level_value(level: Level, metric: str, scorer: str, entropy: str = "") -> Value:
    """A mean with half the width of its interval; no perplexity of a level that lacks the entropy beside it."""
    found = level.estimate(metric, scorer)
    if found is None or (entropy and pick({metric}, "perplexity") and level.estimate(entropy) is None):
        return Value("–")
    value, low, high = found
    return Value(with_interval(value, low, high), value, low, high)
