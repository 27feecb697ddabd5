"""The tables of a recipe as they may be: every key with its type and what it allows, checked before any work.

Names and defaults are those of the classes that the tables are for (`TrainingConfig`, `ShapingConfig`, the objectives);
only what a value may be is said here. A wrong value is told in one line: table, key, what is allowed, what was given.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from tsdfm_bench.errors import UsageError, unknown_name
from tsdfm_bench.methods.fsdfm import MOST_CANDIDATES
from tsdfm_bench.methods.train import compass, shaping, shortcut
from tsdfm_bench.methods.train.objectives import LOSSES, PARAMETERISATIONS, DFMObjective, SEDDObjective
from tsdfm_bench.methods.train.optim import OPTIMIZERS
from tsdfm_bench.methods.train.trainer import TrainingConfig

COMPASS_SEES = ("see_origin", "changed_only")
"""Options of a compass stage that belong to its network."""


class Table(BaseModel):
    """A table of a recipe: nothing is converted, and no number is infinite or NaN."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def whole(low: int, high: int | None = None) -> Any:
    """Whole numbers from `low` to `high`."""
    what = f"a whole number of at least {low}" if high is None else f"a whole number from {low} to {high}"
    return Annotated[int, Field(ge=low, le=high, description=what)]


def number(low: float, high: float | None = None, without_low: bool = False, without_high: bool = False) -> Any:
    """Numbers from `low` to `high`, these included or not."""
    what = f"a number {'above' if without_low else 'of at least' if high is None else 'from'} {low:g}"
    if high is not None:
        what += f" {'and' if without_low else 'to'}{' below' if without_high else ''} {high:g}"
    ge, gt = (None, low) if without_low else (low, None)
    le, lt = (None, high) if without_high else (high, None)
    return Annotated[float, Field(ge=ge, gt=gt, le=le, lt=lt, description=what)]


def choice(values: Collection[str]) -> Any:
    """One of some words."""
    return Annotated[Literal[tuple(values)], Field(description=f"one of {', '.join(values)}")]


SWITCH = Annotated[bool, Field(description="true or false")]


def _of(what: Any, allowed: Mapping[str, Any], without: Collection[str] = (), **more: Any) -> type[Table]:
    """The table of a dataclass's fields: its names and defaults; types are its own where `allowed` says nothing.

    Args:
        what: the dataclass.
        allowed: field -> what it may be.
        without: fields that a recipe does not set.
        more: keys that the class does not have, with their defaults; switches.
    """
    hints = get_type_hints(what)
    fields: dict[str, Any] = {
        field.name: (
            allowed.get(field.name, hints[field.name]),
            ... if field.default is dataclasses.MISSING else field.default,
        )
        for field in dataclasses.fields(what)
        if field.name not in without
    }
    fields |= {key: (SWITCH, default) for key, default in more.items()}
    return create_model(what.__name__, __base__=Table, **fields)


_BELOW_ONE = number(0, 1, without_high=True)
_TWO: Any = tuple.__class_getitem__((_BELOW_ONE, _BELOW_ONE))
TRAINING = _of(
    TrainingConfig,
    {
        "steps": whole(1),
        "batch": whole(1),
        "lr": number(0, without_low=True),
        "warmup": whole(0),
        "final_lr": number(0, 1),
        "optimizer": choice(OPTIMIZERS),
        "embedding_lr": number(0),
        "betas": Annotated[_TWO, Field(description="two numbers from 0 to below 1")],
        "weight_decay": number(0),
        "clip": number(0, without_low=True),
        "ema": _BELOW_ONE,
        "seed": whole(0, 2**63 - 1),
        "validate_every": whole(1),
        "save_every_s": number(0),
        "micro_batch": whole(0),
        "compile": SWITCH,
    },
)
SHAPING = _of(
    shaping.ShapingConfig,
    {
        "candidates": whole(1, MOST_CANDIDATES),
        "tau": Annotated[
            float, Field(ge=0, le=1, description="a number from 0 to 1 (a student without shaping is of kind fsdfm)")
        ],
        "gate_on": choice(shaping.GATES),
        "rule": choice(shaping.RULES),
        "selection_temperature": number(0, without_low=True),
        "policy": choice(shaping.POLICIES),
        "switch": choice(shaping.SWITCHES),
        "switch_time": number(0, 1),
        "token_guard": SWITCH,
    },
)
_SIZES = ("vocab_size", "outputs")
_SHORTCUT = _of(
    shortcut.ShortcutObjective,
    {name: choice(values) for name, values in shortcut.OPTIONS.items()},
    (*_SIZES, "ema", "frozen", "choose"),
)
OPTIONS: Mapping[str, type[Table]] = {
    "ar": create_model("NoOptions", __base__=Table),
    "mdlm": create_model("NoOptions", __base__=Table),
    "sedd": _of(SEDDObjective, {"parameterisation": choice(PARAMETERISATIONS)}, _SIZES),
    "dfm": _of(DFMObjective, {"loss_name": choice(LOSSES)}, _SIZES),
    "compass": _of(
        compass.CompassObjective,
        {
            "positives": choice(compass.POSITIVES),
            "level": choice(compass.LEVELS),
            "largest": whole(0, shortcut.HALVINGS),
            "smallest": whole(0, shortcut.HALVINGS),
        },
        (*_SIZES, "builder", "step_aware"),
        **dict.fromkeys(COMPASS_SEES, False),
    ),
    "fsdfm": _SHORTCUT,
    "tsdfm": _SHORTCUT,
}
"""Kind of a stage -> its options."""


def check_table(where: str, name: str, given: Mapping[str, Any], allowed: type[Table], partial: bool = False) -> None:
    """Refuse a table with a wrong or unknown key.

    Args:
        where: the stage, for the message; "" = the recipe.
        name: of the table.
        given: its contents.
        allowed: what it may be.
        partial: keys without a default may be missing: another table has them.

    Raises:
        UsageError: one line.
    """
    prefix = f"{where}: " if where else ""
    for key in given:
        if key not in allowed.model_fields:
            if not allowed.model_fields:
                raise UsageError(f"{prefix}{name}.{key} is set, but there are no {name} for this kind of network")
            raise UsageError(prefix + str(unknown_name(f"key of {name}", key, list(allowed.model_fields))))
    try:
        allowed.model_validate({k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})
    except ValidationError as error:
        for problem in error.errors():
            key = str(problem["loc"][0])
            if key in given:
                raise UsageError(_must_be(f"{prefix}{name}.{key}", allowed, key, given[key])) from None
            if not partial:
                raise UsageError(f"{prefix}{name}.{key} is missing") from None


def explain(error: ValidationError, keys: Mapping[str, Collection[str]], names: Sequence[str]) -> str:
    """The first problem of a whole recipe in one line.

    Args:
        error: what is wrong with it.
        keys: of the recipe ("") and of its tables.
        names: of its stages, in their order.
    """
    problem = error.errors()[0]
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"])
    where, table, place = "", "", list(problem["loc"])
    if len(place) > 1 and place[0] == "stage":
        where, table, place = f"stage {names[int(place[1])]}: ", "stage", place[2:]
    elif len(place) > 1 and place[0] in keys:
        table = str(place[0])
    key = ".".join(str(part) for part in place) or "it"
    if problem["type"] == "missing":
        return f"{where}{key} is missing"
    if problem["type"] == "extra_forbidden":
        of = f"key of [{table}]" if table in ("network", "start") else "key"
        return where + str(unknown_name(of, str(place[-1]), keys[table]))
    said = str(problem["msg"]).replace("Input should be", "must be").replace("String should", "must")
    return f"{where}{key} {said}, not {shown(problem['input'])}"


def shown(value: object) -> str:
    """A value as a recipe writes it."""
    return repr(value) if isinstance(value, float) else json.dumps(value, default=str, ensure_ascii=False)


def _must_be(place: str, model: type[BaseModel], key: str, given: object) -> str:
    field = model.model_fields[key]
    return f"{place} must be {field.description or field.annotation}, not {shown(given)}"
