"""Every trained variant of an ablation in one table: what differs from the default, quality, entropy, over all seeds.

Figure 3 and Table 2 look at one setting at a time; here also stand variants that differ in several, and controls.
"""

from __future__ import annotations

from typing import ClassVar

from tsdfm_bench.paper_figures.ablation import Ablation, Level, ablations, lacking
from tsdfm_bench.paper_figures.base import Made, NothingToDraw, own_names, unique_rows
from tsdfm_bench.paper_figures.table2 import level_value, quality_title
from tsdfm_bench.results.evidence import Evidence
from tsdfm_bench.results.rows import Row
from tsdfm_bench.results.table_model import Table, TableColumn, TableRow, Value


class EveryVariant:
    """See the module's text."""

    title: ClassVar[str] = "every variant of the ablations"
    sweep: ClassVar[str] = "ablation"

    def make(self, evidence: Evidence) -> list[Made]:
        """One table per text setting and source with more than one variant."""
        found = [(a, levels) for a in ablations(evidence) if len(levels := a.variants()) > 1]
        if not found:
            raise NothingToDraw("fewer than two variants of one text setting")
        return own_names(_table(a, levels, f"ablation-{a.task}-{a.source}") for a, levels in found)


def _table(ablation: Ablation, levels: list[Level], name: str) -> Made:
    measures = [*ablation.quality, *([(ablation.distance, "")] if ablation.distance else []), (ablation.entropy, "")]
    columns = [TableColumn("variant", "variant", align="left"), TableColumn("differs", "differs in", align="left")]
    columns.append(TableColumn("seeds", "seeds"))
    for metric, scorer in measures:
        key = f"{metric} {scorer}"
        if metric == ablation.entropy:
            columns.append(TableColumn(key, "entropy", "nats", role="entropy"))
        elif metric == ablation.distance:
            columns.append(TableColumn(key, "TV of 2-grams"))
        else:
            role = "perplexity" if metric != "excess_nll" else ""
            columns.append(TableColumn(key, *quality_title(metric, scorer), role=role))
    rows: list[Row | None] = []
    lines = []
    for level in levels:
        differs = "the default" if level.is_default else ", ".join(ablation.differences(level.cells[0]))
        values = {
            "variant": Value(level.name, level.name),
            "differs": Value(differs, differs),
            "seeds": Value(str(len(level.cells)), len(level.cells)),
        }
        for metric, scorer in measures:
            values[f"{metric} {scorer}"] = level_value(level, metric, scorer, ablation.entropy)
            rows += level.rows(metric, scorer)
        lines.append(TableRow("method", values))
    shown = unique_rows(rows)
    notes = [
        "± is half the width of a 95 % interval: over training seeds (t) where there are several, else over sequences.",
        *lacking(levels, measures),
        *(f"{text}." for text in dict.fromkeys(r["definition"] for r in shown if r["definition"])),
    ]
    title = f"Every variant of the ablation; {ablation.name}"
    return Made(name, title, shown, table=Table(title, columns, lines, notes), notes=notes)
