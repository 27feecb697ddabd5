"""The main table: every generator on one line, with what is needed to believe the line.

Settings that all rows share stand once under the table, the others become columns; every measured column is defined by
a footnote. Entropy stands beside every perplexity: a row that has none does not show its perplexity, and says so. Rows
of different tasks or lengths never share a table. `results.render` prints it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tsdfm_bench.results.best import best_cell, competitors
from tsdfm_bench.results.flags import FLAGS, GROUP, Flag, find_flags
from tsdfm_bench.results.numbers import MISSING, plain, whole, with_interval
from tsdfm_bench.results.replicates import Replicates
from tsdfm_bench.results.rows import CellRows, added, cells_of, finite, pick
from tsdfm_bench.results.table_model import LonePerplexity, MixedColumn, Section, Table, TableColumn, TableRow, Value

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["LonePerplexity", "MixedColumn", "Table", "TableColumn", "TableRow", "Value", "main_table", "main_tables"]

BOLD = (
    "Bold: the best generator of the column, where it can be told apart from every other one (Holm over the column, "
    "p < 0.05); rows whose entropy or repetition has collapsed, or that a canary beats, do not compete."
)

# ----------------------------------------------------------------------------------------------------- choice


def main_tables(summary: pd.DataFrame, *, notes: Sequence[str] = (), root: str | Path | None = None) -> list[Table]:
    """One main table per task, length and prefix, in the order of the summary; see `main_table`."""
    replicates = Replicates(summary, root)
    return [_build(part, notes, replicates) for part in _groups(summary)]


def main_table(
    summary: pd.DataFrame,
    *,
    task: str | None = None,
    length: int | None = None,
    notes: Sequence[str] = (),
    root: str | Path | None = None,
) -> Table:
    """The main table of one task and length.

    Args:
        summary: see `tsdfm_bench.results.schema`.
        task, length: which, if the summary holds several.
        notes: further footnotes (a scorer that could not be fetched, for example).
        root: the run folder, whose per-sequence columns say which rows can be told apart; None: intervals do.

    Raises:
        MixedColumn: rows of one column were scored or counted in different ways.
        ValueError: the summary holds no row, or rows of several tasks or lengths, that fit.
    """
    if task is not None:
        summary = summary[summary["task"] == task]
    if length is not None:
        summary = summary[summary["length"].eq(length).fillna(False).astype(bool)]
    parts = _groups(summary)
    if not parts:
        raise ValueError(f"the summary holds no row of task {task or 'any'}, length {length or 'any'}")
    if len(parts) > 1:
        names = ", ".join(_name(part.iloc[0]) for part in parts)
        raise ValueError(f"rows of different tasks or lengths cannot share a table: choose one of {names}")
    return _build(parts[0], notes, Replicates(summary, root))


def _groups(summary: pd.DataFrame) -> list[pd.DataFrame]:
    """Parts that share task, tokenizer, data, length and prefix. A row that is not done may lack some of these."""
    rows = summary[list(GROUP)].astype(object).where(summary[list(GROUP)].notna(), None)
    keys = list(rows.itertuples(index=False, name=None))
    done = list(dict.fromkeys(key for key, state in zip(keys, summary["state"], strict=True) if state == "done"))

    def home(key: tuple[Any, ...]) -> tuple[Any, ...]:
        fits = (k for k in done if all(a in (None, "", b) for a, b in zip(key, k, strict=True)))
        return key if key in done else next(fits, key)

    homes = [home(key) for key in keys]
    return [summary[[h == group for h in homes]] for group in dict.fromkeys(homes)]


def _name(row: Any) -> str:
    length = "" if _null(row["length"]) else f", {int(row['length'])} tokens"
    return f"{row['task']}{length}" + (f", prefix {row['prefix']}" if row["prefix"] else "")


def _null(value: Any) -> bool:
    return value is None or type(value).__name__ == "NAType" or value != value


# ------------------------------------------------------------------------------------------------------ build


def _build(summary: pd.DataFrame, notes: Sequence[str], replicates: Replicates) -> Table:
    cells = cells_of(summary)
    methods = [c for c in cells if c.first["state"] == "done" and c.first["kind"] == "method"]
    references = [c for c in cells if c.first["state"] == "done" and c.first["kind"] == "reference"]
    undone = [c for c in cells if c.first["state"] != "done"]
    builder = _Builder(methods, references)
    builder.check()
    flags = find_flags(summary)
    letters, flag_notes = _flag_letters(flags, methods, references)
    best = builder.best([(flag.cell, flag.code, flag.scorer) for flag in flags], replicates)
    numbers, reasons = _reasons(undone)
    sections: tuple[tuple[Section, list[CellRows]], ...] = (
        ("method", methods),
        ("reference", sorted(references, key=lambda cell: not cell.is_real)),
        ("not done", undone),
    )
    rows = []
    for section, members in sections:
        for cell in members:
            values = builder.values(cell) if section != "not done" else builder.identity(cell)
            marks = letters.get(cell.id, "") if section != "not done" else f"{cell.first['state']} {numbers[cell.id]}"
            values["flags"] = Value(marks, marks)
            for key in best.get(cell.id, ()):
                values[key] = replace(values[key], best=True)
            rows.append(TableRow(section, values, cell.id))
    columns = [*builder.columns, TableColumn("flags", "flags", align="left")]
    bold = [BOLD] if best else []
    damaged = [replicates.damaged[cell.id] for cell in builder.done if cell.id in replicates.damaged]
    footnotes = [*flag_notes, *reasons, *notes, *damaged, *builder.gaps(notes), *bold, *builder.definitions()]
    return Table(_name(summary.iloc[0]), columns, rows, footnotes)


class _Builder:
    """Chooses the columns of a table from what its cells hold, and fills them."""

    def __init__(self, methods: list[CellRows], references: list[CellRows]) -> None:
        self.done = [*methods, *references]
        self.methods = methods
        self.metrics = {metric for cell in self.done for metric, _ in cell.rows}
        self.measured: list[tuple[TableColumn, str, str]] = []  # column, metric, scorer
        self.columns = [TableColumn("method", "method", align="left", wrap=20)]
        if any(cell.first["source"] for cell in self.done):
            self.columns.append(TableColumn("source", "source", align="left"))
        self.columns.append(TableColumn("steps", "steps"))
        self._settings()
        if any(finite(cell.first["calls"]) for cell in self.done):
            self.columns.append(TableColumn("calls", "calls", self._calls_detail()))
        self._measures()

    # Settings that differ between rows become columns; the rest is said once.
    def _settings(self) -> None:
        self.shared: list[str] = []
        told: tuple[tuple[str, str, Callable[[CellRows], str], str], ...] = (
            ("temperature", "temp.", lambda c: _short(c.first["temperature"]), "temperature {}"),
            ("top_p", "top-p", _nucleus, "nucleus {}"),
            ("draw", "draw", lambda c: c.first["draw"] or MISSING, "{} draw"),
            ("seed", "seed", lambda c: whole(c.first["seed"]), "seed {}"),
        )
        self.settings: dict[str, Callable[[CellRows], str]] = {}
        for key, title, text, sentence in told:
            values = {text(cell) for cell in self.methods}
            if len(values) > 1:
                self._setting(key, title, text)
            elif values and values != {MISSING}:
                self.shared.append(sentence.format(values.pop()))
        counts = {cell.n for cell in self.done if cell.n is not None}
        if len(counts) > 1:
            self._setting("n", "n", lambda cell: whole(cell.n))
        elif counts:
            self.shared.insert(0, f"{counts.pop()} sequences per row")
        # Seconds of different devices stand in one column only with the devices beside them.
        if len({cell.first["device"] for cell in self.methods if cell.first["device"]}) > 1:
            self._setting("device", "device", lambda cell: cell.first["device"] or MISSING, align="left")
        # Rows that would read the same are told apart by their weights.
        shown = [tuple(value.text for value in self.identity(cell).values()) for cell in self.methods]
        if len(set(shown)) < len(shown):
            self._setting("checkpoint", "checkpoint", lambda cell: cell.first["checkpoint"] or MISSING, align="left")

    def _setting(
        self, key: str, title: str, text: Callable[[CellRows], str], align: Literal["left", "right"] = "right"
    ) -> None:
        self.settings[key] = text
        self.columns.append(TableColumn(key, title, align=align, wrap=20 if key in ("checkpoint", "device") else 0))

    def _calls_detail(self) -> str:
        return "per seq." if any(_calls_differ(cell) for cell in self.methods) else ""

    def _measures(self) -> None:
        def add(
            role: str, title: str, detail: str = "", scorer: str = "", give_way: int = 0, metric: str | None = None
        ) -> None:
            metric = metric or pick(self.metrics, role)
            if metric is None or not any(cell.of(metric, scorer) for cell in self.done):
                return
            key = f"{metric}@{scorer}" if scorer else metric
            column = TableColumn(key, title, detail, role=role, give_way=give_way)
            self.columns.append(column)
            self.measured.append((column, metric, scorer))

        used = set().union(*(cell.scorers for cell in self.done))
        self.scorers = list(dict.fromkeys(name for cell in self.done for _, name in cell.rows if name in used))
        entropy, perplexity = pick(self.metrics, "entropy"), pick(self.metrics, "perplexity")
        scored = [cell for cell in self.done if any(cell.of(perplexity, scorer) for scorer in self.scorers)]
        self.withheld = sum(1 for cell in scored if cell.of(entropy) is None)
        add("excess", "excess NLL", "nats/token")
        variation = pick(self.metrics, "total variation")
        add("total variation", f"TV {variation.removeprefix('tv_')}-grams" if variation else "")
        if any((row := cell.of(pick(self.metrics, "valid"))) and row["value"] < 1 for cell in self.done):
            add("valid", "valid")
        if self.withheld < len(scored):
            for scorer in self.scorers:  # the last one, the largest, stays on the narrowest terminal
                add("perplexity", "gen-PPL", scorer, scorer, give_way=int(scorer != self.scorers[-1]))
        add("entropy", "entropy", "nats")
        for scorer in self.scorers:
            add("bits per byte", "bits/byte", scorer, scorer, give_way=3)
        distinct, repetition = pick(self.metrics, "distinct"), pick(self.metrics, "repetition")
        add("distinct", _ngram(distinct, "distinct"), give_way=4)
        add("repetition", _ngram(repetition, "rep"), give_way=5)
        mauve = pick(self.metrics, "mauve")
        for scorer in dict.fromkeys(scorer for cell in self.done for scorer in cell.judges(mauve)):
            add("mauve", "MAUVE", scorer, scorer, give_way=2)
        for metric in added(self.metrics):
            for scorer in dict.fromkeys(scorer for cell in self.done for scorer in ("", *cell.judges(metric))):
                add("added", metric, scorer, scorer, metric=metric)
        add("speed", "seq/s", give_way=6)
        if pick(self.metrics, "speed") is None and any(finite(cell.first["seconds"]) for cell in self.done):
            self.columns.append(TableColumn("seconds", "seconds", give_way=6))

    def identity(self, cell: CellRows) -> dict[str, Value]:
        """The cells that say which row this is."""
        row = cell.first
        values = {
            "method": Value(row["label"] or row["method"], row["label"] or row["method"]),
            "source": Value(row["source"] or MISSING, row["source"]),
            "steps": Value(whole(row["steps"]), row["steps"]),
        }
        for key, text in self.settings.items():
            shown = text(cell)
            values[key] = Value(shown, row.get(key, shown) if key != "n" else cell.n)
        return values

    def values(self, cell: CellRows) -> dict[str, Value]:
        """All cells of one row."""
        row = cell.first
        values = self.identity(cell)
        values["calls"] = Value(_calls_text(cell), _number(row["calls"]))
        values["seconds"] = Value(plain(row["seconds"]), _number(row["seconds"]))
        entropy = cell.of(pick(self.metrics, "entropy"))
        for column, metric, scorer in self.measured:
            found = cell.of(metric, scorer)
            if column.role == "perplexity" and found is not None and entropy is None:
                found = None
            values[column.key] = Value(MISSING) if found is None else _measured(found, column.role)
        return values

    def check(self) -> None:
        """Refuse a column whose numbers were scored or counted in different ways.

        Raises:
            MixedColumn: with the two ways, and the rows that need another table.
        """
        for column, metric, scorer in self.measured:
            if not scorer or column.role == "mauve":  # these tell of n and of the other side, which may differ
                continue
            rows = [(cell, row) for cell in self.done if (row := cell.of(metric, scorer)) is not None]
            for name, what in (("scorer_revision", "weights"), ("scorer_dtype", "arithmetic"), ("definition", "way")):
                ways: dict[str, list[str]] = {}
                for cell, row in rows:
                    ways.setdefault(row[name], []).append(cell.first["label"] or cell.first["method"])
                if len(ways) > 1:
                    (one, first), (two, second), *_ = ways.items()
                    raise MixedColumn(
                        f"{column.heading} mixes numbers that were scored in a different {what}: {', '.join(first)} "
                        f"({one}) and {', '.join(second)} ({two}). Score all rows with one scorer and convention "
                        "(tsdfm-bench run with the same --scorers), or print them as separate tables."
                    )

    def best(self, flags: Sequence[tuple[str, str, str]], replicates: Replicates) -> dict[str, list[str]]:
        """Cell -> keys of the columns in which it is the best generator, and separable from all others."""
        found: dict[str, list[str]] = {}
        for column, metric, scorer in self.measured:
            if column.role not in ("perplexity", "bits per byte"):
                continue
            cells = competitors(
                (cell for cell in self.methods if cell.of(pick(self.metrics, "entropy"))), flags, scorer
            )
            cell = best_cell(cells, metric, scorer, replicates)
            if cell is not None:
                found.setdefault(cell, []).append(column.key)
        return found

    def definitions(self) -> list[str]:
        """Footnotes: what each number is, then what all rows share."""
        notes = []
        if any("±" in value.text for cell in self.done for value in self.values(cell).values()):
            mauve = any(column.role == "mauve" for column, _, _ in self.measured)
            notes.append(
                "± is half the width of the 95 % interval over sequences"
                + (" (of MAUVE: of its range over k-means seeds)" if mauve else "")
                + "; the CSV and JSON forms have both ends."
            )
        said: dict[str, list[str]] = {}
        for column, metric, scorer in self.measured:
            rows = [row for cell in self.done if (row := cell.of(metric, scorer)) is not None]
            said.setdefault("; ".join(_unique(row["definition"] for row in rows)), []).append(column.heading)
        notes += [f"{', '.join(headings)}: {definition}." for definition, headings in said.items()]
        for scorer in self.scorers:
            rows = [row for cell in self.done for (_, name), row in cell.rows.items() if name == scorer]
            titles, dtypes = _unique(r["scorer_title"] for r in rows), _unique(r["scorer_dtype"] for r in rows)
            if titles or dtypes:
                notes.append(f"Scorer {scorer}: {', '.join([*titles, *dtypes])}.")
        if ceiling := self._ceiling():
            notes.append(ceiling)
        if any(column.key == "calls" for column in self.columns):
            notes.append(
                "Calls: network forward passes per batch, counted; in brackets per sequence, where sequences that need "
                "none in a step leave the batch."
                if self._calls_detail()
                else "Calls: network forward passes per batch, counted (as many per sequence)."
            )
        if self.shared:
            notes.append(f"All rows: {', '.join(self.shared)}.")
        if self.withheld:
            notes.append(
                f"Perplexity of {self.withheld} rows is withheld: it is not shown without entropy beside it. "
                "Add the entropy metric."
            )
        return notes

    def gaps(self, notes: Sequence[str]) -> list[str]:
        """Numbers that could not be had, equal reasons together; not those whose reason stands in `notes` already."""
        gaps: dict[tuple[str, str, str], int] = {}
        for cell in self.done:
            for (metric, scorer), row in cell.rows.items():
                if row["reason"] and not finite(row["value"]) and not any(row["reason"] in note for note in notes):
                    gaps[metric, scorer, row["reason"]] = gaps.get((metric, scorer, row["reason"]), 0) + 1
        return [
            f"No {metric}{f' ({scorer})' if scorer else ''} in {count} of {len(self.done)} rows: {reason}"
            for (metric, scorer, reason), count in gaps.items()
        ]

    def _ceiling(self) -> str:
        mauve, ceiling = pick(self.metrics, "mauve"), pick(self.metrics, "mauve ceiling")
        rows = [row for cell in self.done for scorer in cell.judges(ceiling) if (row := cell.of(ceiling, scorer))]
        if not rows:  # the real row's own MAUVE is the same thing
            real = [cell for cell in self.done if cell.is_real]
            rows = [row for cell in real for scorer in cell.judges(mauve) if (row := cell.of(mauve, scorer))]
        if not rows:
            return ""
        texts = _unique(f"{_measured(row, 'mauve').text} (n = {row['n']})" for row in rows)
        return f"MAUVE of real text against other real text, the ceiling at this n: {', '.join(texts)}."


# Roles whose half-width is printed; all have it in files.
_SPREAD = ("perplexity", "entropy", "mauve", "mauve ceiling", "excess")


def _measured(row: Any, role: str) -> Value:
    text = with_interval(row["value"], row["low"], row["high"], show=role in _SPREAD)
    return Value(text, float(row["value"]), _number(row["low"]), _number(row["high"]))


def _number(value: Any) -> float | None:
    return float(value) if finite(value) else None


def _unique(texts: Iterable[str]) -> list[str]:
    return [text.rstrip(".") for text in dict.fromkeys(texts) if text]


def _ngram(metric: str | None, word: str) -> str:
    digits = "".join(ch for ch in metric or "" if ch.isdigit())
    return f"{word}-{digits}" if digits else word


def _short(value: Any) -> str:
    return f"{value:g}" if finite(value) else MISSING


def _nucleus(cell: CellRows) -> str:
    if not finite(cell.first["top_p"]):
        return "off" if cell.first["kind"] == "method" else MISSING
    return f"{cell.first['top_p']:g} {cell.first['top_p_rule']}".rstrip()


def _calls_differ(cell: CellRows) -> bool:
    calls, each = cell.first["calls"], cell.first["sequence_calls"]
    return finite(calls) and finite(each) and not math.isclose(calls, each, rel_tol=5e-3)


def _calls_text(cell: CellRows) -> str:
    text = whole(_number(cell.first["calls"]))
    return f"{text} ({whole(cell.first['sequence_calls'])})" if _calls_differ(cell) else text


# ------------------------------------------------------------------------------------------------- footnotes


def _flag_letters(
    flags: Sequence[Flag], methods: list[CellRows], references: list[CellRows]
) -> tuple[dict[str, str], list[str]]:
    """Letters per cell and their footnotes; a flag that every method row carries is said once, without letters."""
    raised: dict[tuple[str, str], set[str]] = {}  # (code, scorer) -> cells
    for flag in flags:
        raised.setdefault((flag.code, flag.scorer), set()).add(flag.cell)
    shown = {cell.id for cell in [*methods, *references]}
    order = sorted((key for key in raised if raised[key] & shown), key=lambda key: (list(FLAGS).index(key[0]), key[1]))
    everywhere = [key for key in order if methods and all(cell.id in raised[key] for cell in methods)]
    notes = []
    for code in dict.fromkeys(code for code, _ in everywhere):
        scorers = [scorer for other, scorer in everywhere if other == code and scorer]
        notes.append(f"All generators{_bracket(scorers)}: {FLAGS[code]}.")
    letters: dict[str, list[str]] = {}
    for i, (code, scorer) in enumerate(key for key in order if key not in everywhere):
        mark = chr(ord("a") + i) if i < 26 else f"a{i}"
        for cell in raised[code, scorer]:
            letters.setdefault(cell, []).append(mark)
        notes.append(f"{mark}  {code}{_bracket([scorer] if scorer else [])}: {FLAGS[code]}.")
    return {cell: " ".join(marks) for cell, marks in letters.items()}, notes


def _bracket(names: list[str]) -> str:
    return f" ({', '.join(names)})" if names else ""


def _reasons(undone: list[CellRows]) -> tuple[dict[str, int], list[str]]:
    """A number per cell that was skipped or failed, equal reasons sharing one, and their footnotes."""
    numbers: dict[str, int] = {}
    reasons: dict[tuple[str, str], int] = {}
    for cell in undone:
        key = (cell.first["state"], cell.first["reason"])
        numbers[cell.id] = reasons.setdefault(key, len(reasons) + 1)
    return numbers, [f"{number}  {state}: {reason}" for (state, reason), number in reasons.items()]
