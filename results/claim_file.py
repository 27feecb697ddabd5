"""Claims files: statements about results as formulas, in TOML.

    format = 1
    title = "My paper"

    [rows.student]                      # selections of cells, by columns of the summary
    method = "tsdfm"
    steps = 8
    [rows.teacher]
    method = "dfm"
    steps = 1024

    [[claims]]
    id = "beats-teacher"
    title = "8 steps beat 1,024"
    value = "100 * (1 - ppl(student) / ppl(teacher))"      # see results.formula
    unit = "% lower"
    holds = ">= 32"
    for_each = ["source"]               # one instance per source; scorers are always told apart
    at_least = { source = 2 }
    needs = ["calls(student) < calls(teacher)"]
    guards = ["entropy(student) >= entropy(teacher) - 0.05"]

`needs` must hold for the claim to be testable at all. `guards` protect against a claim that holds for the wrong reason:
where one fails the claim cannot be reproduced, but it can still be contradicted. Everything is checked when the file is
read; an error names the file, the line and the key.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator

from tsdfm_bench.results.formula import CURVES, QUANTITIES, Formula, FormulaError, parse
from tsdfm_bench.results.schema import COLUMNS

DIMENSIONS = ("scorer", "source", "steps", "length", "task")
SELECTABLE = [
    "method",
    "label",
    "kind",
    "checkpoint",
    "weights",
    "source",
    "length",
    "steps",
    "temperature",
    "top_p",
    "draw",
    "prefix",
    "seed",
    "task",
    "cell",
]
SCORED = ("ppl", "bits_per_byte", "mauve", *CURVES)
_HOLDS = re.compile(r"(>=|<=|>|<)\s*(\S+)|between\s+(\S+)\s+and\s+(\S+)")


class ClaimFileError(ValueError):
    """A claims file that cannot be used; the message names file, line and key."""


class Bound:
    """What a value must satisfy: ">= 32", "< 1", "between 0.9 and 1.1".

    Args:
        text: as written.

    Raises:
        ValueError: none of these.
    """

    def __init__(self, text: str) -> None:
        match = _HOLDS.fullmatch(text.strip())
        if match is None:
            raise ValueError(f"'{text}' is no bound: write '>= 32', '< 1' or 'between 0.9 and 1.1'")
        self.text = text.strip()
        try:
            numbers = [float(part) for part in match.groups()[1:] if part is not None]
        except ValueError:
            raise ValueError(f"'{text}': the bound must be a number") from None
        if any(number != number or abs(number) == float("inf") for number in numbers):
            raise ValueError(f"'{text}': the bound must be a finite number")
        self.relation: str = match[1] or "between"
        self.numbers = tuple(numbers)
        if self.relation == "between" and not numbers[0] <= numbers[1]:
            raise ValueError(f"'{text}': the first number must not be larger than the second")

    def margins(self, value: Any) -> list[Any]:
        """By how much a value (or array) satisfies each side of the bound; negative where it does not."""
        if self.relation == "between":
            return [value - self.numbers[0], self.numbers[1] - value]
        return [value - self.numbers[0]] if self.relation.startswith(">") else [self.numbers[0] - value]

    @property
    def strict(self) -> bool:
        """Whether equality does not satisfy it."""
        return self.relation in (">", "<")


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True, allow_inf_nan=False)


Scalar = str | int | float | bool
Wanted = Scalar | list[Scalar]


class Selection(_Entry):
    """A selection of cells.

    Args:
        where: columns of the summary and the values wanted; temperature 1, no nucleus, fp64 draw and no prefix unless
            something else is asked for ("any" takes all).
        options: options of the method, as in its label; without them only rows without options fit.
        variant: settings of its training, from variants.json; without them default variants only.
        unbound: dimensions of `for_each` that do not apply to it.
    """

    where: dict[str, Wanted]
    options: dict[str, Scalar] | None = None
    variant: dict[str, Scalar] | None = None
    unbound: list[Literal["source", "steps", "length", "task"]] = []


class Condition(_Entry):
    """A comparison that must hold, and what to say if it does not."""

    formula: Formula
    otherwise: str = ""


def _condition(value: object) -> object:
    if isinstance(value, str):
        value = {"formula": value}
    if isinstance(value, dict) and isinstance(value.get("formula"), str):
        value = {**value, "formula": parse(value["formula"], comparison=True)}
    return value


def _conditions(value: object) -> object:
    return [_condition(item) for item in (value if isinstance(value, list) else [value])]


Conditions = Annotated[list[Condition], BeforeValidator(_conditions)]


class Claim(_Entry):
    """One statement. See the module's text; further keys:

    Args:
        id: short name, letters, digits, "-".
        title: one line for tables.
        statement: the sentence as published.
        source: where it stands; confidence: how sure it is that it stands there.
        scorer: only under this scorer; default: under each.
        at_least: how many values of a dimension there must be.
        collapse: row selections whose rows must carry no collapse flag (entropy-low, rep-high, legacy-fp32) for a
            perplexity claim to be reproduced; default: all that it uses, except in formulas at equal entropy.
        published: the published value of `value`.
        sweep: file name of the sweep that makes the rows, for messages.
        note: what a reader should know.
    """

    id: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9-]{0,60}$")
    title: str
    statement: str = ""
    source: str = ""
    confidence: str = ""
    value: Annotated[Formula, BeforeValidator(lambda v: parse(v, comparison=False) if isinstance(v, str) else v)]
    unit: str = ""
    holds: Annotated[Bound, BeforeValidator(lambda v: Bound(v) if isinstance(v, str) else v)]
    for_each: list[str] = []
    scorer: str | None = None
    at_least: dict[str, Annotated[int, Field(ge=1)]] = {}
    needs: Conditions = []
    guards: Conditions = []
    collapse: list[str] | None = None
    published: float | None = None
    sweep: str = ""
    note: str = ""

    @property
    def formulas(self) -> list[Formula]:
        """Its value and its conditions."""
        return [self.value, *(condition.formula for condition in (*self.needs, *self.guards))]

    @property
    def scored(self) -> bool:
        """Whether it depends on a scorer."""
        return any(q.function in SCORED for formula in self.formulas for q in formula.quantities)

    @property
    def dimensions(self) -> list[str]:
        """What it is instantiated over, the scorer included."""
        scorer = ["scorer"] if self.scored and self.scorer is None else []
        return list(dict.fromkeys([*scorer, *self.for_each]))

    @property
    def rows(self) -> list[str]:
        """Selections it uses."""
        return list(dict.fromkeys(name for formula in self.formulas for name in formula.rows))


class Claims(_Entry):
    """A claims file."""

    format: Literal[1]
    title: str = ""
    citation: str = ""
    rows: dict[str, Selection] = {}
    claims: list[Claim] = Field(min_length=1)

    @field_validator("rows", mode="before")
    @classmethod
    def _selections(cls, value: object) -> object:
        if not isinstance(value, dict):
            return value
        inner = ("options", "variant", "unbound")
        made: dict[str, Any] = {}
        for name, keys in value.items():
            if not isinstance(keys, dict):
                raise ValueError(f"[rows.{name}] must be a table of columns and values")
            if not str(name).isidentifier() or name in (*QUANTITIES, *CURVES, *DIMENSIONS):
                raise ValueError(f"'{name}' cannot name rows: use letters, digits and _, and no word of the language")
            for key in keys:
                if key not in (*SELECTABLE, *inner):
                    known = [*SELECTABLE, *inner]
                    raise ValueError(
                        f"[rows.{name}]: unknown key '{key}'{_near(key, known)} Known: {', '.join(sorted(known))}."
                    )
            made[name] = {key: keys[key] for key in inner if key in keys}
            made[name]["where"] = {key: item for key, item in keys.items() if key not in inner}
        return made


assert {column.name for column in COLUMNS} >= set(SELECTABLE)


def _near(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=2, cutoff=0.6)
    return f"; did you mean {' or '.join(near)}?" if near else "."


def read_claims(path: Path) -> Claims:
    """Read and check a claims file.

    Raises:
        ClaimFileError: it cannot be read or used.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ClaimFileError(f"no such claims file: {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ClaimFileError(f"cannot read {path}: {error}") from None
    return parse_claims(text, str(path))


def parse_claims(text: str, name: str = "claims") -> Claims:
    """Read and check the text of a claims file; `name` stands in messages."""
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ClaimFileError(f"{name} is not TOML: {error}") from None
    try:
        claims = Claims.model_validate(content)
    except ValidationError as error:
        raise ClaimFileError("\n".join(_explain(problem, text, name) for problem in error.errors()[:5])) from None
    _check(claims, text, name)
    return claims


def _check(claims: Claims, text: str, name: str) -> None:
    """What needs the whole file: unique ids, known rows and dimensions."""
    seen: dict[str, int] = {}
    for i, claim in enumerate(claims.claims):

        def fail(key: str, message: str, i: int = i) -> ClaimFileError:
            line = line_of(text, ("claims", i, key))
            return ClaimFileError(f"{name}, line {line}, claim '{claims.claims[i].id}', {key}: {message}")

        if claim.id in seen:
            raise fail("id", f"claim {seen[claim.id] + 1} has this id too")
        seen[claim.id] = i
        for key, formulas in (
            ("value", [claim.value]),
            ("needs", [condition.formula for condition in claim.needs]),
            ("guards", [condition.formula for condition in claim.guards]),
        ):
            for formula in formulas:
                try:
                    parse(formula.text, claims.rows)
                except FormulaError as error:
                    raise fail(key, str(error)) from None
        allowed = [*DIMENSIONS, *claim.rows]
        for key, names in (("for_each", claim.for_each), ("at_least", list(claim.at_least))):
            for dimension in names:
                if dimension not in allowed:
                    raise fail(key, f"unknown dimension '{dimension}'{_near(dimension, allowed)} Known: {allowed}")
        for dimension in claim.at_least:
            if dimension not in claim.dimensions:
                raise fail("at_least", f"'{dimension}' is not among for_each")
        for rows in claim.collapse or []:
            if rows not in claim.rows:
                raise fail("collapse", f"the claim uses no rows called '{rows}'{_near(rows, claim.rows)}")


def _explain(problem: Any, text: str, name: str) -> str:
    location = tuple(problem["loc"])
    message = str(problem["msg"]).removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        known = list(Claim.model_fields) if location[0] == "claims" else list(Claims.model_fields)
        message = f"unknown key '{location[-1]}'{_near(str(location[-1]), known)} Known: {', '.join(known)}."
    key = ".".join(str(part + 1) if isinstance(part, int) else part for part in location if part != "where")
    return f"{name}, line {line_of(text, location)}, {key}: {message}"


def line_of(text: str, location: Sequence[str | int]) -> int:
    """The line of a key in the text of a TOML file of tables and arrays of tables; that of its table if it has none.

    Args:
        text: of the file.
        location: for example ("claims", 1, "holds") or ("rows", "student", "steps").
    """
    lines = text.splitlines()
    start, keys = 0, [part for part in location if isinstance(part, str)]
    if len(location) > 1 and isinstance(location[1], int):
        heads = [
            i for i, line in enumerate(lines) if re.match(rf"\s*\[\[\s*{re.escape(str(location[0]))}\s*\]\]", line)
        ]
        start = heads[location[1]] if location[1] < len(heads) else 0
        keys = keys[1:]
    elif len(keys) > 1:
        head = re.compile(rf"\s*\[\s*{re.escape(keys[0])}\s*\.\s*\"?{re.escape(keys[1])}\"?\s*[\].]")
        start = next((i for i, line in enumerate(lines) if head.match(line)), 0)
        keys = keys[2:]
    for key in keys:
        for i in range(start, len(lines)):
            if i > start and re.match(r"\s*\[", lines[i]) and "=" not in lines[i].split("]")[0]:
                break
            if re.match(rf"\s*\"?{re.escape(key)}\"?\s*=", lines[i]):
                return i + 1
    return start + 1
