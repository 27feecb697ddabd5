"""A table as data: columns, rows and footnotes, without a word on how it is printed.

Each number keeps its value and interval beside its text. Perplexity never stands alone: a table with a perplexity
column but no entropy column cannot be made, nor a row that shows the one without the other.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Section = Literal["seeds", "method", "reference", "not done"]


class LonePerplexity(ValueError):
    """A perplexity without an entropy beside it."""


class MixedColumn(ValueError):
    """Numbers of different conventions or scorers under one heading."""


@dataclass(frozen=True)
class TableColumn:
    """One column.

    Args:
        key: identifies it within the table.
        title: first line of its heading.
        detail: second line (the scorer, the unit), or "".
        align: "left" for text, "right" for numbers.
        role: what it measures ("perplexity", "entropy", ...), or "".
        wrap: may take several lines on a narrow terminal, down to this many characters; 0 = never.
        give_way: columns with larger numbers are left out first where a terminal is too narrow; 0 = always shown.
    """

    key: str
    title: str
    detail: str = ""
    align: Literal["left", "right"] = "right"
    role: str = ""
    give_way: int = 0
    wrap: int = 0

    @property
    def heading(self) -> str:
        """The heading on one line."""
        return f"{self.title} ({self.detail})" if self.detail else self.title


@dataclass(frozen=True)
class Value:
    """One cell of a table: what is printed, the number and interval behind it, whether it is the column's best."""

    text: str = ""
    value: float | int | str | None = None
    low: float | None = None
    high: float | None = None
    best: bool = False


@dataclass(frozen=True)
class TableRow:
    """One line: its section, its cells by column key, and the id of the cell of the run that it is about, if any."""

    section: Section
    cells: dict[str, Value]
    cell: str = ""

    def text(self, key: str) -> str:
        """What is printed in a column."""
        return self.cells.get(key, Value()).text

    def best(self, key: str) -> bool:
        """Whether it is to be printed in bold."""
        return self.cells.get(key, Value()).best


@dataclass(frozen=True)
class Table:
    """A table to be rendered.

    Args:
        title: one line.
        columns: in order.
        rows: in order; sections follow each other.
        footnotes: sentences below it.

    Raises:
        LonePerplexity: a perplexity without an entropy beside it.
    """

    title: str
    columns: list[TableColumn]
    rows: list[TableRow]
    footnotes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        perplexity = [column.key for column in self.columns if column.role == "perplexity"]
        entropy = [column.key for column in self.columns if column.role == "entropy"]
        if perplexity and not entropy:
            raise LonePerplexity(f"table {self.title!r} shows perplexity without entropy")
        for row in self.rows:
            if any(_has_number(row, key) for key in perplexity) and not any(_has_number(row, key) for key in entropy):
                raise LonePerplexity(f"a row of table {self.title!r} shows perplexity without entropy")

    def keys(self) -> list[str]:
        """Column keys in order."""
        return [column.key for column in self.columns]


def _has_number(row: TableRow, key: str) -> bool:
    return isinstance(row.cells.get(key, Value()).value, int | float)
