"""The page: everything of a run put into the template, as one file without references to anything outside it."""

from __future__ import annotations

import base64
import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from tsdfm_bench.results.claims import STATUSES
from tsdfm_bench.results.numbers import plain, with_interval
from tsdfm_bench.results.replicates import Replicates
from tsdfm_bench.results.report.charts import charts
from tsdfm_bench.results.report.model import Material
from tsdfm_bench.results.report.rows import (
    RowView,
    TableView,
    cost_columns,
    counts,
    flag_views,
    row_views,
    table_views,
)
from tsdfm_bench.results.report.samples import sample_view, trace_views
from tsdfm_bench.results.report.text import finalize
from tsdfm_bench.results.tables import MixedColumn

MARKS = {"reproduced": "✔", "contradicted": "✘", "not separable": "≈", "not testable": "–"}


def _asset(name: str) -> str:
    return (files("tsdfm_bench.results.report") / "page" / name).read_text(encoding="utf-8")


def environment() -> Environment:
    """Jinja with autoescape, in which every text that is written was made visible first."""
    made = Environment(
        loader=FunctionLoader(_asset),
        autoescape=True,
        finalize=finalize,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["percent"] = lambda share: f"{100 * share:.0f} %"
    return made


def render_report(material: Material) -> str:
    """The HTML of a report.

    Args:
        material: see `model.Material`.

    Raises:
        MixedColumn: rows of one column were scored or counted in different ways.
    """
    views = row_views(material)
    tables = table_views(material, views)
    script, style = _asset("script.js"), _asset("style.css")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    rows = {cell: view.id for cell, view in views.items()}
    generators = [view for view in views.values() if view.section == "method"]
    costly = [view for view in generators if view.cost]
    context: dict[str, Any] = {
        "material": material,
        "script": Markup(script),
        "style": Markup(style),
        "script_hash": digest,
        "views": list(views.values()),
        "by_id": {view.id: view for view in views.values()},
        "tables": tables,
        "charts": charts(material.summary, Replicates(material.summary, material.root), rows),
        "facts": _facts(material, views),
        "findings": _findings(material, views, tables),
        "verdicts": [_verdict(verdict) for verdict in material.verdicts],
        "verdict_counts": _verdict_counts(material.verdicts),
        "marks": MARKS,
        "flags": flag_views(views),
        "samples": sample_view(material, views),
        "traces": trace_views(material, views),
        "cost_columns": cost_columns(costly),
        "costly": costly,
        "kinds": {"frontier": "Quality and diversity", "steps": "Steps", "cost": "Network calls"},
        "tokens": _identities(views),
    }
    html = environment().get_template("report.html").render(context)
    return html.encode("utf-8", "backslashreplace").decode()


# -------------------------------------------------------------------------------------------------------- summary


def _facts(material: Material, views: Mapping[str, RowView]) -> list[tuple[str, str]]:
    """Number and what it counts, for the head of the page."""
    number = counts(views)
    sizes = sorted({view.cell.n for view in views.values() if view.cell.n is not None})
    scorers = sorted({scorer for view in views.values() for scorer in view.cell.scorers})
    facts = [(str(number["method"]), "generator rows" if number["method"] != 1 else "generator row")]
    facts.append((str(number["reference"]), "reference rows"))
    if sizes:
        facts.append((" – ".join(dict.fromkeys((f"{sizes[0]:,}", f"{sizes[-1]:,}"))), "sequences per row"))
    facts.append((str(len(scorers)), f"scorer{'s' * (len(scorers) != 1)}: {', '.join(scorers) or 'none'}"))
    left = number["not done"] + len(material.pending)
    if left:
        facts.append((str(left), "cells not done"))
    return facts


def _findings(material: Material, views: Mapping[str, RowView], tables: Sequence[TableView]) -> list[tuple[str, str]]:
    """(kind, sentence) in the order of what matters most; kinds: "good", "bad", "warn", "note"."""
    found: list[tuple[str, str]] = []
    pending, number = len(material.pending), counts(views)
    if pending or number["not done"]:
        parts = [f"{pending} planned cell{'s' * (pending != 1)} without results yet"] if pending else []
        parts += [f"{number['not done']} skipped or failed"] if number["not done"] else []
        found.append(("warn", f"Partial run: {' and '.join(parts)}. Everything below shows what is there."))
    tally = _verdict_counts(material.verdicts)
    if tally:
        told = ", ".join(f"{count} {status}" for status, count in tally)
        kind = "bad" if any(status == "contradicted" for status, _ in tally) else "note"
        found.append((kind, f"Claims of {material.claims_title or 'the paper'}: {told}."))
    generators = [view for view in views.values() if view.section == "method"]
    serious = [view for view in generators if any(chip.serious for chip in view.chips)]
    if serious:
        codes = Counter(code for view in serious for code in {chip.code for chip in view.chips if chip.serious})
        told = ", ".join(f"{code} on {count}" for code, count in codes.most_common())
        found.append(("warn", f"{len(serious)} of {len(generators)} generator rows carry a serious flag: {told}."))
    elif generators:
        found.append(("good", "No generator row carries a serious flag."))
    for table in tables:
        found += _best(table, views)
    return found


def _best(table: TableView, views: Mapping[str, RowView]) -> list[tuple[str, str]]:
    """Per perplexity column: the generator that is best and can be told apart, or that there is none."""
    by_id = {view.id: view for view in views.values()}
    found = []
    for k, column in enumerate(table.columns):
        if column.role != "perplexity":
            continue
        rows = [(row, cells[k]) for section, members in table.sections if section == "method" for row, cells in members]
        best = next((row for row, (_, _, marked) in rows if marked), None)
        if best is not None:
            text = {row: cell[0] for row, cell in rows}[best]
            found.append(("good", f"Lowest {column.heading} on {table.title}: {by_id[best].name}, {text}."))
        elif len(rows) > 1:
            found.append(("note", f"No generator is best in {column.heading} on {table.title} beyond sampling noise."))
    return found


# ------------------------------------------------------------------------------------------------------- verdicts


def _verdict_counts(verdicts: Sequence[Mapping[str, Any]]) -> list[tuple[str, int]]:
    tally = Counter(verdict["status"] for verdict in verdicts)
    return [(status, tally[status]) for status in STATUSES if tally[status]]


def _verdict(verdict: Mapping[str, Any]) -> dict[str, Any]:
    """A verdict with its instances as texts."""
    instances = []
    for instance in verdict["instances"]:
        where = ", ".join(f"{key} {value}" for key, value in instance["where"].items() if value is not None)
        value, low, high = instance["value"], instance["low"], instance["high"]
        ends = f"{plain(low)} to {plain(high)}" if low is not None and high is not None and low != high else ""
        shown = with_interval(value, low, high, show=False) if value is not None else ""
        instances.append({**instance, "where": where, "shown": shown, "ends": ends})
    published = verdict.get("published")
    return {
        **verdict,
        "instances": instances,
        "slug": verdict["status"].replace(" ", "-"),
        "published": plain(published) if published is not None else "",
    }


# ----------------------------------------------------------------------------------------------------- provenance


def _identities(views: Mapping[str, RowView]) -> list[tuple[str, str, str]]:
    """(kind, name, hash or revision) of text, tokenizer, weights and scorers."""
    found: dict[tuple[str, str, str], None] = {}
    for view in views.values():
        first = view.first
        found["text", str(first["task"]), str(first["data_hash"])] = None
        found["tokenizer", str(first["tokenizer"]), ""] = None
        if first["weights"] not in ("", "none"):
            found["weights", str(first["checkpoint"]), str(first["weights"])] = None
        for row in view.cell.rows.values():
            if row["scorer"] and row["scorer_revision"]:
                title = f"{row['scorer']}: {row['scorer_title']}, {row['scorer_dtype']}"
                found["scorer", title, str(row["scorer_revision"])] = None
    return sorted(
        (key for key in found if any(key[1:])), key=lambda key: ("text", "tokenizer", "weights", "scorer").index(key[0])
    )


__all__ = ["MixedColumn", "environment", "render_report"]
