"""The rows of a report: what each cell is, its numbers, flags and command; and the main tables with these rows.

Rows get ids of the page's own ("r0", "r1", ...), since cell ids are text like any other.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tsdfm_bench.results.compare import describe
from tsdfm_bench.results.flags import FLAGS, Flag, find_flags
from tsdfm_bench.results.numbers import MISSING, plain, whole, with_interval
from tsdfm_bench.results.report.text import cut
from tsdfm_bench.results.rows import CellRows, Row, cells_of, finite, pick
from tsdfm_bench.results.table_model import Table, TableColumn, Value
from tsdfm_bench.results.tables import main_tables

if TYPE_CHECKING:
    from tsdfm_bench.results.report.model import Material

# Flags that say a row is not what it seems; the others tell of the measurement.
SERIOUS = frozenset(("entropy-low", "entropy-high", "rep-high", "canary", "memorised", "legacy-fp32"))
LONGEST_REASON = 1500
_LETTER_NOTE = re.compile(r"(?:[a-z]|a\d+|\d+)  \S")
_BYTES = ("bytes", "KB", "MB", "GB", "TB")


@dataclass(frozen=True)
class Chip:
    """A flag on a row: its code, the numbers behind it, and whether it is a serious one."""

    code: str
    detail: str
    serious: bool


@dataclass(frozen=True)
class RowView:
    """One cell as the page shows it.

    Args:
        id: of the page's own.
        cell: rows of the summary.
        name: label, source and settings on one line.
        section: "method", "reference" or "not done".
        chips: its flags.
        settings: (name, value) of what it is.
        numbers: (metric, scorer, value, interval, n, unit, definition) of everything measured.
        cost: (name, value) of what it cost; empty if unknown.
        command: what makes it; "" if unknown.
        reason: why it is not done, or "".
    """

    id: str
    cell: CellRows
    name: str
    section: str
    chips: list[Chip]
    settings: list[tuple[str, str]]
    numbers: list[tuple[str, str, str, str, str, str, str]]
    cost: dict[str, str]
    command: str = ""
    reason: str = ""

    @property
    def first(self) -> Row:
        """Its settings."""
        return self.cell.first

    @property
    def words(self) -> str:
        """What the search of the page looks at."""
        flags = " ".join(chip.code for chip in self.chips)
        return f"{self.name} {self.first['checkpoint']} {self.section} {self.first['state']} {flags}".lower()


@dataclass(frozen=True)
class TableView:
    """A main table: columns, and per row its id and cells (text, sort key, best)."""

    title: str
    columns: list[TableColumn]
    sections: list[tuple[str, list[tuple[str, list[tuple[str, str, bool]]]]]]
    notes: list[str] = field(default_factory=list)


def row_views(material: Material) -> dict[str, RowView]:
    """Every cell of the summary, by its id, in order."""
    summary = material.summary
    flags: dict[str, list[Flag]] = defaultdict(list)
    for flag in find_flags(summary):
        flags[flag.cell].append(flag)
    views = {}
    for i, cell in enumerate(cells_of(summary)):
        first = cell.first
        done = first["state"] == "done"
        section = first["kind"] if done else "not done"
        chips = _chips(flags.get(cell.id, []))
        views[cell.id] = RowView(
            id=f"r{i}",
            cell=cell,
            name=describe(cell),
            section=section,
            chips=chips,
            settings=_settings(cell),
            numbers=[_number(row) for row in cell.rows.values() if row["metric"]] if done else [],
            cost=_cost(cell) if section == "method" else {},
            command=material.commands.get(cell.id, ""),
            reason="" if done else cut(str(first["reason"]), LONGEST_REASON),
        )
    return views


def _chips(flags: Sequence[Flag]) -> list[Chip]:
    """One chip per code, serious ones first; several scorers share it."""
    details: dict[str, list[str]] = defaultdict(list)
    for flag in flags:
        details[flag.code].append(_detail(flag))
    chips = [Chip(code, "; ".join(filter(None, found)), code in SERIOUS) for code, found in details.items()]
    return sorted(chips, key=lambda chip: not chip.serious)


def _detail(flag: Flag) -> str:
    return f"{flag.scorer}: {flag.detail}" if flag.scorer and flag.scorer not in flag.detail else flag.detail


def _settings(cell: CellRows) -> list[tuple[str, str]]:
    first = cell.first
    top_p = f"{first['top_p']:g} {first['top_p_rule']}".rstrip() if finite(first["top_p"]) else ""
    temperature = f"{first['temperature']:g}" if finite(first["temperature"]) else ""
    found = [
        ("cell", cell.id),
        ("task", f"{first['task']}, {whole(first['length'])} tokens"),
        ("tokenizer", first["tokenizer"]),
        ("text", first["data_hash"]),
        ("pinned", first["prefix"]),
        ("checkpoint", "" if first["checkpoint"] == "none" else first["checkpoint"]),
        ("weights", "" if first["weights"] == "none" else first["weights"]),
        ("source", first["source"]),
        ("steps", whole(first["steps"]) if finite(first["steps"]) else ""),
        ("temperature", temperature),
        ("nucleus", top_p),
        ("draw", first["draw"]),
        ("seed", whole(first["seed"]) if finite(first["seed"]) else ""),
        ("sequences", whole(cell.n) if cell.n is not None else ""),
        ("device", first["device"]),
    ]
    return [(name, str(value)) for name, value in found if value]


def _number(row: Row) -> tuple[str, str, str, str, str, str, str]:
    value, low, high = row["value"], row["low"], row["high"]
    text = with_interval(value, low, high, show=False) if value is not None else MISSING
    ends = f"{plain(low, 4)} to {plain(high, 4)}" if finite(low) and finite(high) else ""
    n = whole(row["n"]) if row["n"] is not None else ""
    told = row["definition"] if row["value"] is not None else row["reason"] or row["definition"]
    return row["metric"], row["scorer"], text, ends, n, row["unit"], cut(str(told), LONGEST_REASON)


def _cost(cell: CellRows) -> dict[str, str]:
    first = cell.first
    names = {name for name, _ in cell.rows}
    found = {"calls per batch": first["calls"], "calls per sequence": first["sequence_calls"]}
    told = {name: whole(value) for name, value in found.items() if finite(value)}
    for name in sorted(names):
        role = name.removeprefix("calls/")
        row = cell.of(name)
        if role != name and row is not None and len([n for n in names if n.startswith("calls/")]) > 1:
            told[f"calls of {role}"] = whole(row["value"])
    speed, memory = cell.of(pick(names, "speed")), cell.of("peak_memory_bytes")
    if finite(first["seconds"]):
        told["seconds"] = plain(first["seconds"])
    if speed is not None:
        told["sequences per second"] = plain(speed["value"])
        if speed["value"] > 0:
            told["seconds per sequence"] = plain(1.0 / speed["value"])
    if memory is not None:
        told["peak memory"] = size(memory["value"])
    if told and first["device"]:
        told["device"] = str(first["device"])
    return told


def size(count: float) -> str:
    """A number of bytes in readable units."""
    for unit in _BYTES:
        if count < 1000 or unit == _BYTES[-1]:
            break
        count /= 1000
    return f"{plain(count)} {unit}"


# --------------------------------------------------------------------------------------------------------- tables


def table_views(material: Material, views: Mapping[str, RowView]) -> list[TableView]:
    """The main tables, one per task, length and prefix, with flags left to the rows' chips.

    Raises:
        MixedColumn: rows of one column were scored or counted in different ways.
    """
    if material.summary.empty:
        return []
    return [_table(table, views) for table in main_tables(material.summary, notes=material.notes, root=material.root)]


def _table(table: Table, views: Mapping[str, RowView]) -> TableView:
    columns = [column for column in table.columns if column.key != "flags"]
    sections: dict[str, list[tuple[str, list[tuple[str, str, bool]]]]] = {}
    for row in table.rows:
        cells = [row.cells.get(column.key, Value(MISSING)) for column in columns]
        shown = [(value.text or MISSING, _sort_key(value), value.best) for value in cells]
        sections.setdefault(row.section, []).append((views[row.cell].id, shown))
    notes = [note for note in table.footnotes if not _LETTER_NOTE.match(note)]
    return TableView(table.title, columns, list(sections.items()), notes)


def _sort_key(value: Value) -> str:
    """What a column is sorted by: the number in full, or the text; "" sorts last."""
    if isinstance(value.value, bool) or value.value is None:
        return "" if value.text in ("", MISSING) else value.text
    return repr(float(value.value)) if finite(value.value) else str(value.value)


@dataclass(frozen=True)
class FlagView:
    """One flag explained: its sentence and the rows that carry it, with the numbers behind each."""

    code: str
    meaning: str
    serious: bool
    rows: list[tuple[str, str, str]]


def flag_views(views: Mapping[str, RowView]) -> list[FlagView]:
    """Every flag that some row carries, in the order of `results.flags.FLAGS`."""
    carried: dict[str, list[tuple[str, str, str]]] = defaultdict(list)
    for view in views.values():
        for chip in view.chips:
            carried[chip.code].append((view.id, view.name, chip.detail))
    return [FlagView(code, FLAGS[code], code in SERIOUS, carried[code]) for code in FLAGS if code in carried]


def cost_columns(views: Sequence[RowView]) -> list[str]:
    """Names of everything known about cost, in order of first appearance."""
    return list(dict.fromkeys(name for view in views for name in view.cost))


def counts(views: Mapping[str, RowView]) -> dict[str, Any]:
    """How many rows of each kind."""
    sections = [view.section for view in views.values()]
    return {name: sections.count(name) for name in ("method", "reference", "not done")}
