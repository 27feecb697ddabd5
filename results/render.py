"""A table as rich text, Markdown, CSV, LaTeX, JSON or HTML.

Every text is user input somewhere (labels, error messages): control characters become spaces and each format's own
special characters are escaped. CSV and JSON carry the numbers and both ends of their intervals, not only the text.
"""

from __future__ import annotations

import csv
import html
import io
import json
import math
from collections.abc import Callable
from itertools import groupby
from typing import TYPE_CHECKING, Any

from tsdfm_bench.results.numbers import MISSING
from tsdfm_bench.results.table_model import Table, TableColumn, TableRow, Value

if TYPE_CHECKING:
    from rich.console import RenderableType

_SECTIONS = {
    "seeds": "over training seeds", "method": "generators", "reference": "references", "not done": "not done",
}  # fmt: skip


def clean(text: str) -> str:
    """One printable line: control characters, line breaks and lone surrogates become single spaces."""
    return " ".join("".join(ch if ch.isprintable() else " " for ch in text).split())


def _sections(table: Table) -> list[tuple[str, list[TableRow]]]:
    return [(section, list(rows)) for section, rows in groupby(table.rows, key=lambda row: row.section)]


# -------------------------------------------------------------------------------------------------- the console


def fitting_columns(table: Table, width: int) -> tuple[list[TableColumn], list[TableColumn]]:
    """The columns that fit into `width` characters and those left out (never one with `give_way` 0)."""
    columns, left_out = list(table.columns), list[TableColumn]()

    def needed() -> int:
        return 2 + sum(2 + _narrowest(table, column) for column in columns)

    while needed() > width:
        optional = [column for column in columns if column.give_way]
        if not optional:
            break
        last = max(optional, key=lambda column: column.give_way)
        dropped = [column for column in columns if column.give_way == last.give_way]
        columns = [column for column in columns if column not in dropped]
        left_out += dropped
    return columns, left_out


def _widths(table: Table, column: TableColumn) -> list[int]:
    return [len(column.title), len(column.detail), *(len(clean(row.text(column.key))) for row in table.rows)]


def _narrowest(table: Table, column: TableColumn) -> int:
    widest = max(_widths(table, column))
    return min(widest, column.wrap) if column.wrap else widest


def to_rich(table: Table, width: int | None = None) -> RenderableType:
    """A renderable for `rich.console.Console.print`.

    Args:
        table: the table.
        width: characters available; optional columns that do not fit are left out and named below. None: all columns.
    """
    from rich import box
    from rich.console import Group
    from rich.table import Table as RichTable
    from rich.text import Text

    columns, left_out = (table.columns, []) if width is None else fitting_columns(table, width)
    grid = RichTable(title=Text(clean(table.title), style="bold"), title_justify="left", box=box.SIMPLE_HEAD)
    grid.padding, grid.pad_edge = (0, 1, 0, 0), False
    for column in columns:
        heading = Text(column.title)
        if column.detail:
            heading.append(f"\n{clean(column.detail)}", style="dim")
        grid.add_column(
            heading,
            justify=column.align,
            no_wrap=not column.wrap,
            overflow="fold",
            min_width=_narrowest(table, column),
        )
    styles = {"seeds": "", "method": "", "reference": "italic", "not done": "dim"}
    for section, rows in _sections(table):
        for i, row in enumerate(rows):
            cells = [Text(clean(row.text(c.key)), style="bold" if row.best(c.key) else "") for c in columns]
            grid.add_row(*cells, style=styles[section], end_section=i == len(rows) - 1)
    notes = list(table.footnotes)
    if left_out:
        names = ", ".join(column.heading for column in left_out)
        notes.append(f"Left out at this width: {names}; the other formats have them.")
    return Group(grid, *(_note(note) for note in notes))


def _note(note: str) -> RenderableType:
    from rich.padding import Padding
    from rich.text import Text

    return Padding(Text(clean(note), style="dim"), (0, 0, 0, 1))


# ------------------------------------------------------------------------------------------------ text formats


def escape_markdown(text: str) -> str:
    """Text that GitHub's Markdown shows as it is, inside a table too."""
    return "".join(f"\\{ch}" if ch in r"\`*_[]|~$#" else html.escape(ch, quote=False) for ch in clean(text))


def to_markdown(table: Table) -> str:
    """A GitHub table with its footnotes; a line names each section, but for generators at the top."""
    lines = [f"**{escape_markdown(table.title)}**", ""]
    lines.append("| " + " | ".join(escape_markdown(column.heading) for column in table.columns) + " |")
    lines.append("|" + "|".join("---:" if column.align == "right" else ":---" for column in table.columns) + "|")
    for i, (section, rows) in enumerate(_sections(table)):
        if section != "method" or i:
            lines.append("| *" + _SECTIONS[section] + "* |" + " |" * (len(table.columns) - 1))
        for row in rows:
            texts = [(escape_markdown(row.text(column.key)), row.best(column.key)) for column in table.columns]
            lines.append("| " + " | ".join(f"**{text}**" if best else text for text, best in texts) + " |")
    lines += ["", *(f"- {escape_markdown(note)}" for note in table.footnotes)]
    return "\n".join(lines).rstrip() + "\n"


_LATEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "%": r"\%",
    "#": r"\#",
    "_": r"\_",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "±": r"$\pm$",
    "–": "--",
}


def escape_latex(text: str) -> str:
    """Text that LaTeX typesets as it is (T1 or Unicode fonts)."""
    return "".join(_LATEX.get(ch, ch) for ch in clean(text)).replace("--", "-{}-")  # else a dash, as of an option


def to_latex(table: Table) -> str:
    """A booktabs `table` environment; needs \\usepackage{booktabs}."""
    columns = table.columns
    aligns = "".join("r" if column.align == "right" else "l" for column in columns)

    def line(texts: list[str]) -> str:
        # A line must not start with a bracket: LaTeX would read it as an argument of the \\ before it.
        return " & ".join("{}" + text if text.startswith("[") else text for text in texts) + r" \\"

    body = [r"\begin{table}", r"\centering", rf"\caption{{{escape_latex(table.title)}}}"]
    body += [rf"\begin{{tabular}}{{{aligns}}}", r"\toprule", line([escape_latex(c.title) for c in columns])]
    if any(column.detail for column in columns):
        body.append(line([escape_latex(column.detail) for column in columns]))
    for _, rows in _sections(table):
        body.append(r"\midrule")
        for row in rows:
            texts = [(escape_latex(row.text(column.key)), row.best(column.key)) for column in columns]
            body.append(line([rf"\textbf{{{text}}}" if best else text for text, best in texts]))
    body += [r"\bottomrule", r"\end{tabular}"]
    if table.footnotes:
        body += ["", r"\medskip", r"\begin{minipage}{\linewidth}\footnotesize"]
        body += [escape_latex(note) + r"\par" for note in table.footnotes]
        body.append(r"\end{minipage}")
    return "\n".join([*body, r"\end{table}"]) + "\n"


def to_csv(table: Table) -> str:
    """Numbers in full, with columns "... low" and "... high" where there are intervals; no footnotes."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    header = ["section"]
    bounded = {key for row in table.rows for key, value in row.cells.items() if value.low is not None}
    for column in table.columns:
        header.append(clean(column.heading))
        if column.key in bounded:
            header += [f"{clean(column.heading)} low", f"{clean(column.heading)} high"]
    writer.writerow(header)
    for row in table.rows:
        line: list[Any] = [row.section]
        for column in table.columns:
            value = row.cells.get(column.key, Value())
            told = value.value
            if told is None and value.text not in ("", MISSING):  # a text that stands for no number
                told = value.text
            line.append(clean(told) if isinstance(told, str) else told)
            if column.key in bounded:
                line += [value.low, value.high]
        writer.writerow(line)
    return out.getvalue()


def to_json(table: Table) -> str:
    """Everything: columns, rows with text, value, low and high (null if not finite), footnotes."""
    rows = []
    for row in table.rows:
        cells: dict[str, dict[str, Any]] = {}
        for column in table.columns:
            value = row.cells.get(column.key, Value())
            numbers = {"value": value.value, "low": value.low, "high": value.high}
            cells[column.key] = {"text": value.text} | {
                name: None if isinstance(number, float) and not math.isfinite(number) else number
                for name, number in numbers.items()
            }
            if value.best:
                cells[column.key]["best"] = True
        rows.append({"section": row.section, "cells": cells})
    columns = [{"key": c.key, "title": c.title, "detail": c.detail, "role": c.role} for c in table.columns]
    content = {"title": table.title, "columns": columns, "rows": rows, "footnotes": table.footnotes}
    return json.dumps(content, indent=2, allow_nan=False) + "\n"


def to_html(table: Table) -> str:
    """A `<table>` with its footnotes, to be placed in a page."""

    def cells(tag: str, texts: list[str], best: list[bool] | None = None) -> str:
        marked = best or [False] * len(texts)
        shown = [
            f"<strong>{html.escape(clean(t))}</strong>" if b else html.escape(clean(t))
            for t, b in zip(texts, marked, strict=True)
        ]
        styled = zip(table.columns, shown, strict=True)
        return "".join(f'<{tag} style="text-align:{c.align}">{text}</{tag}>' for c, text in styled)

    keys = table.keys()
    lines = [f"<table><caption>{html.escape(clean(table.title))}</caption>"]
    lines.append(f"<thead><tr>{cells('th', [column.heading for column in table.columns])}</tr></thead>")
    for section, rows in _sections(table):
        lines.append(f'<tbody class="{section.replace(" ", "-")}">')
        for row in rows:
            best = [row.best(key) for key in keys]
            lines.append(f"<tr>{cells('td', [row.text(key) for key in keys], best)}</tr>")
        lines.append("</tbody>")
    lines.append("</table>")
    if table.footnotes:
        lines.append("<ul>" + "".join(f"<li>{html.escape(clean(note))}</li>" for note in table.footnotes) + "</ul>")
    return "\n".join(lines) + "\n"


FORMATS: dict[str, tuple[str, Callable[[Table], str]]] = {
    "markdown": (".md", to_markdown),
    "csv": (".csv", to_csv),
    "latex": (".tex", to_latex),
    "json": (".json", to_json),
    "html": (".html", to_html),
}


def render(table: Table, format: str) -> str:
    """A table in one of `FORMATS`; `ValueError` names them for another one."""
    if format not in FORMATS:
        raise ValueError(f"unknown table format {format!r}: choose {', '.join(FORMATS)} (rich: see to_rich)")
    return FORMATS[format][1](table)
