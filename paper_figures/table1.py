"""Table 1: every method by source and steps under every scorer, with entropy, calls and the published value beside it.

The published column holds gen-PPL of the same method, source and step count from the literature, under gpt2-large on
other text with larger networks: it shows what the field reports, and never belongs in the same column as ours. Networks
of several training seeds are one row, with their number.
"""

from __future__ import annotations

from typing import ClassVar

from tsdfm_bench.paper_figures.base import (
    LONG,
    SHORT,
    SOURCES,
    Made,
    NothingToDraw,
    Scene,
    named,
    own_names,
    scenes,
    unique_rows,
)
from tsdfm_bench.paper_figures.figure1 import ORDER
from tsdfm_bench.paper_figures.published import Number, published
from tsdfm_bench.results.evidence import Evidence, EvidenceCell
from tsdfm_bench.results.flags import FLAGS
from tsdfm_bench.results.numbers import plain, whole, with_interval
from tsdfm_bench.results.rows import Row
from tsdfm_bench.results.seeds import about_seeds, over_what
from tsdfm_bench.results.table_model import Section, Table, TableColumn, TableRow, Value

_TOLD = ("entropy-low", "entropy-high", "rep-high", "canary", "ppl-gamed", "few", "mixed-n")


class Table1:
    """See the module's text."""

    title: ClassVar[str] = "sources, steps, scorers and methods"
    sweep: ClassVar[str] = "table1"

    def make(self, evidence: Evidence) -> list[Made]:
        """One table per text setting."""
        places = [scene for scene in scenes(evidence) if scene.cells and scene.metric("entropy")]
        if not places:
            raise NothingToDraw("no finished generator with an entropy")
        return own_names(_table(scene, named("table1", scene, places)) for scene in places)


def _table(scene: Scene, name: str) -> Made:
    ppl, entropy, mauve = scene.metric("perplexity"), scene.metric("entropy"), scene.metric("mauve")
    judges, features = scene.scorers(ppl), scene.scorers(mauve)
    order = {method: i for i, method in enumerate(ORDER)}
    cells = sorted(
        scene.cells,
        key=lambda c: (
            {"uniform": 0, "mask": 1}.get(c.first["source"], 2),
            order.get(c.first["method"], 9),
            c.first["method"],
            c.first["steps"] or 0,
        ),
    )
    several = any(len(cell.networks) > 1 for cell in cells)
    columns = [
        TableColumn("source", "source", align="left"),
        TableColumn("method", "method", align="left"),
        TableColumn("steps", "steps"),
        *([TableColumn("seeds", "seeds")] if several else []),
        TableColumn("calls", "calls", give_way=1),
        *(TableColumn(f"ppl {judge}", "gen-PPL", judge, role="perplexity") for judge in judges),
        TableColumn("entropy", "entropy", "nats", role="entropy"),
        *(TableColumn(f"mauve {judge}", "MAUVE", judge, give_way=2) for judge in features),
        TableColumn("published", "published", "gpt2-large"),
        TableColumn("flags", "flags", align="left"),
    ]
    used: list[Number] = []
    rows: list[Row | None] = []
    lines = []
    sections: list[tuple[Section, list[EvidenceCell]]] = [("method", cells), ("reference", scene.references)]
    for section, members in sections:
        for cell in members:
            first, has_entropy = cell.first, cell.of(entropy) is not None
            values = {
                "source": Value(first["source"] or "–", first["source"]),
                "method": Value(first["method"], first["method"]),
                "steps": Value(whole(first["steps"]), first["steps"]),
                "seeds": Value(str(len(cell.networks)), len(cell.networks)) if section == "method" else Value("–"),
                "calls": Value(whole(first["calls"]), first["calls"]),
                "flags": Value(" ".join(code for code in _TOLD if code in cell.flags)),
                "published": _published(cell, used),
                "entropy": _value(cell.of(entropy)),
            }
            rows += cell.behind(entropy)
            for judge in judges if has_entropy else []:
                values[f"ppl {judge}"] = _value(cell.of(ppl, judge))
                rows += cell.behind(ppl, judge)
            for judge in features:
                values[f"mauve {judge}"] = _value(cell.of(mauve, judge))
                rows += cell.behind(mauve, judge)
            lines.append(TableRow(section, values))
    shown = unique_rows(rows)
    steps = {cell.first["steps"] for cell in scene.cells}
    wanted = [(m, s, n) for m, sources in SOURCES.items() for s in sources for n in (SHORT, LONG)]
    missing = scene.absent([w for w in wanted if w[2] in steps or w[2] == SHORT or w[0] == "dfm"])
    notes = _notes(scene, shown, used, missing)
    title = f"Table 1. Generative perplexity by source, method and steps; {scene.name}"
    return Made(
        name, title, shown, table=Table(title, columns, lines, notes), notes=notes, missing=missing, published=used
    )


def _value(row: Row | None) -> Value:
    if row is None:
        return Value("–")
    return Value(with_interval(row["value"], row["low"], row["high"]), row["value"], row["low"], row["high"])


def _published(cell: EvidenceCell, used: list[Number]) -> Value:
    """The surest published gen-PPL of this row, numbered by its origin; entropy beside it where it was given."""
    first = cell.first
    if first["prefix"]:  # what is published was generated without a prompt
        return Value("–")
    found = published().find(first["method"], first["source"], first["steps"])
    if not found:
        return Value("–")
    number = found[0]
    if number.origin not in [other.origin for other in used]:
        used.append(number)
    index = [other.origin for other in used].index(number.origin) + 1
    beside = f" at {number.entropy_nats:.2f} nats" if number.entropy_nats is not None else ""
    return Value(f"{number.gen_ppl:g}{beside} [{index}]", f"{number.gen_ppl:g}")


def _notes(scene: Scene, rows: list[Row], used: list[Number], missing: list[str]) -> list[str]:
    notes = [f"[{i + 1}] {number.origin}." for i, number in enumerate(used)]
    if used:
        notes.insert(0, "Published values were measured on other text, with larger networks and another scorer.")
    counts = sorted({int(row["n"]) for row in rows if row["n"] is not None})
    notes.append(
        f"n = {plain(counts[0]) if len(counts) == 1 else ', '.join(map(str, counts))} sequences; ± is half the "
        f"width of the 95 % interval {over_what(c.networks for c in (*scene.cells, *scene.references))}."
    ) if counts else None
    notes += [f"{text} Flags are those of any seed." for text in about_seeds(cell.networks for cell in scene.cells)]
    notes += scene.without_some + scene.left_out
    codes = dict.fromkeys(code for row in rows for code in row["flags"].split() if code in _TOLD)
    notes += [f"{code}: {FLAGS[code]}." for code in codes]
    notes += [f"{text}." for text in dict.fromkeys(r["definition"] for r in rows if r["scorer"] and r["definition"])]
    if missing:
        notes.append(f"Incomplete, no row for: {'; '.join(missing)}.")
    return notes
