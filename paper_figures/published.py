"""Numbers from the literature, as printed beside ours: `published.toml`, read and checked.

A published number belongs to its protocol (data, scorer, draw, convention) and is never mixed with measured ones: it
stands in its own column, with its source. `find` gives the numbers of a method, source and step count, the one of the
highest confidence first.
"""

from __future__ import annotations

import tomllib
from functools import cache
from importlib.resources import files
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Confidence = Literal["stated", "stated second hand"]
_VALUES = ("gen_ppl", "entropy_nats", "entropy_bits", "mauve", "value")
_COLUMNS = ("id", "method", "source", "steps", "quantity", "unit", "note", *_VALUES)


class Number(BaseModel):
    """One published number or row.

    Args:
        method, source, steps: what it was measured of; "" or None where it does not apply.
        gen_ppl, entropy_nats, entropy_bits, mauve: values that were given.
        id, quantity, value, unit: of a claim such as "32 % lower".
        note: what distinguishes it.
        origin: paper and place, for a footnote.
        confidence, draw, prefix: of its table.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    id: str = ""
    method: str
    source: str = ""
    steps: int | None = Field(default=None, ge=1)
    quantity: str = ""
    unit: str = ""
    note: str = ""
    gen_ppl: float | None = Field(default=None, gt=0)
    entropy_nats: float | None = Field(default=None, ge=0)
    entropy_bits: float | None = Field(default=None, ge=0)
    mauve: float | None = Field(default=None, ge=0, le=1)
    value: float | None = None
    origin: str = ""
    confidence: Confidence = "stated"
    draw: Literal["fp64", "legacy-fp32"] = "fp64"
    prefix: bool = False


class Table(BaseModel):
    """Rows of one source under one protocol; see published.toml."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str = Field(pattern=r"^[a-z0-9-]+$")
    paper: str = Field(min_length=1)
    arxiv: str = Field(pattern=r"^(\d{4}\.\d{5})?$")
    where: str
    data: str
    scorer: str
    protocol: str
    confidence: Confidence
    draw: Literal["fp64", "legacy-fp32"] = "fp64"
    prefix: bool = False
    columns: list[Literal[_COLUMNS]]  # type: ignore[valid-type]
    rows: list[list[Any]] = Field(min_length=1)

    @model_validator(mode="after")
    def _rows_fit(self) -> Table:
        for i, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ValueError(
                    f"row {i + 1} of table {self.id} has {len(row)} values for {len(self.columns)} columns"
                )
        if not set(self.columns) & set(_VALUES):
            raise ValueError(f"table {self.id} has no column with values ({', '.join(_VALUES)})")
        self.numbers()
        return self

    def numbers(self) -> list[Number]:
        """Its rows."""
        arxiv = f" (arXiv {self.arxiv})" if self.arxiv else ""
        second = ", quoted second hand" if self.confidence != "stated" else ""
        found = []
        for row in self.rows:
            values = {key: value for key, value in zip(self.columns, row, strict=True) if value != ""}
            note = f", {values['note']}" if "note" in values else ""
            about: dict[str, Any] = {"confidence": self.confidence, "draw": self.draw, "prefix": self.prefix}
            found.append(Number(**values, **about, origin=f"{self.paper}{arxiv}, {self.where}{note}{second}"))
        return found


class Published(BaseModel):
    """The content of published.toml."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1]
    tables: list[Table]

    @model_validator(mode="after")
    def _ids(self) -> Published:
        ids = [table.id for table in self.tables]
        if len(set(ids)) != len(ids):
            raise ValueError("two tables have one id")
        return self

    @property
    def numbers(self) -> list[Number]:
        """All rows of all tables."""
        return [number for table in self.tables for number in table.numbers()]

    def find(self, method: str, source: str, steps: int | None, *, draw: str = "fp64") -> list[Number]:
        """Unconditional gen-PPL rows of a method, source and step count, surest first."""
        fitting = [
            number
            for number in self.numbers
            if number.gen_ppl is not None
            and (number.method, number.source, number.steps) == (method, source, steps)
            and not number.prefix
            and number.draw == draw
        ]
        return sorted(fitting, key=lambda number: number.confidence != "stated")

    def claim(self, id: str) -> Number:
        """A claim such as "32-percent"; KeyError if there is none."""
        return next(number for number in self.numbers if number.id == id)


@cache
def published() -> Published:
    """The numbers that ship with this package."""
    text = (files("tsdfm_bench.paper_figures") / "published.toml").read_text(encoding="utf-8")
    return Published.model_validate(tomllib.loads(text))
