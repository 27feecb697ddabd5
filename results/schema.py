"""The summary: one row per cell x metric (x scorer), every number with what is needed to read it.

A number without its convention, scorer, n, interval and draw cannot be compared with another one; so they are columns
of the same row. Text columns are never null ("" means none); numeric ones are null where they do not apply. A cell that
was skipped or failed is one row with its reason and no metric. The schema is versioned: `read_summary` migrates older
files or says why it cannot.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tsdfm_bench.results.arrays import read_table, write_table
from tsdfm_bench.results.files import MissingFile, write_bytes

if TYPE_CHECKING:
    import pandas as pd

SCHEMA_VERSION = 2

KINDS = ("method", "reference")
STATES = ("done", "skipped", "failed")
BETTER = ("", "lower", "higher")
DRAWS = ("", "fp64", "legacy-fp32")


class SchemaError(ValueError):
    """A table is not a summary: columns, types or values are wrong."""


@dataclass(frozen=True)
class Column:
    """One column of the summary.

    Args:
        name: its name.
        type: "text" (never null), "float" or "integer" (null where they do not apply).
        comment: what it holds.
        allowed: the only values it may take; empty = any.
    """

    name: str
    type: Literal["text", "float", "integer"]
    comment: str
    allowed: tuple[str, ...] = ()


COLUMNS: tuple[Column, ...] = (
    Column("task", "text", "task the text is compared on, for example sotu"),
    Column("tokenizer", "text", "tokenizer of the samples, with a hash"),
    Column("data_hash", "text", "sha256 of the data split that references are drawn from"),
    Column(
        "method", "text", "registered name of the method, or of the reference (real, unigram, bigram, shuffled, loop)"
    ),
    Column("label", "text", "method plus the options that distinguish it, as shown in tables"),
    Column("kind", "text", "method = a generator; reference = held-out text or a zero-parameter canary", KINDS),
    Column("state", "text", "done; skipped = refused with a reason; failed = ended in an error", STATES),
    Column("reason", "text", "why it was skipped, or the last lines of the error"),
    Column("checkpoint", "text", "readable name of the weights; none for a method without"),
    Column("weights", "text", "sha256 of the weight files; none for a method without"),
    Column("source", "text", "source distribution at t = 0: mask, uniform, unigram; empty if it has none"),
    Column("length", "integer", "tokens per sequence"),
    Column("steps", "integer", "sampling steps asked for; null for methods without steps"),
    Column("temperature", "float", "divides the logits; 0 = argmax; null for references"),
    Column("top_p", "float", "nucleus mass; null = no nucleus"),
    Column(
        "top_p_rule", "text", "inclusive keeps the token that crosses the mass, exclusive drops it; empty = no nucleus"
    ),
    Column("draw", "text", "arithmetic of the draw; empty for references", DRAWS),
    Column("prefix", "text", "what was pinned; empty = unconditional"),
    Column("seed", "integer", "root seed"),
    Column("cell", "text", "id of the cell"),
    Column("scorer", "text", "short name of the scorer; empty if none is involved"),
    Column("scorer_title", "text", "full name of the scorer"),
    Column("scorer_revision", "text", "sha256 or hub revision of the scorer's weights"),
    Column("scorer_dtype", "text", "arithmetic of the scorer"),
    Column("scorer_seen", "text", "why the scorer may have been trained on the task's text; empty = no reason known"),
    Column("metric", "text", "what is measured, with its convention after a slash: gen_ppl/pooled; empty if not done"),
    Column("value", "float", "the number; null if it could not be had (reason says why)"),
    Column("low", "float", "lower end of the 95 % interval; null if there is none"),
    Column("high", "float", "upper end of the 95 % interval"),
    Column("n", "integer", "sequences behind the value"),
    Column("unit", "text", "perplexity, nats, bits, bits/byte, s, calls, bytes, 1, ..."),
    Column("definition", "text", "one line: convention, what is counted"),
    Column("interval", "text", "how the interval was made: method, resamples, seed; or why there is none"),
    Column("better", "text", "which direction is better; empty = neither", BETTER),
    Column("calls", "float", "forward calls per batch, summed over the networks"),
    Column("sequence_calls", "float", "forward calls per sequence, summed over the networks"),
    Column("seconds", "float", "wall-clock seconds of sampling, warm-up excluded, device synchronised"),
    Column("device", "text", "device the samples were made on"),
    Column("flags", "text", "codes of results.flags, separated by spaces"),
    Column("schema_version", "integer", "version of this schema"),
)

_BY_NAME: Mapping[str, Column] = {column.name: column for column in COLUMNS}
_DTYPES: Mapping[str, Any] = {"text": "str", "float": "float64", "integer": "Int64"}
_DEFAULTS: Mapping[str, Any] = {"text": "", "float": float("nan"), "integer": None}

# What a file of version k needs to become one of version k + 1.
MIGRATIONS: dict[int, Callable[[Any], Any]] = {
    1: lambda df: df.assign(scorer_seen=""),  # version 1 did not ask whether a scorer knew the text
}


def row(**values: Any) -> dict[str, Any]:
    """One row with every column: the given values, defaults (empty or null) for the rest.

    Raises:
        SchemaError: a name that is no column.
    """
    for name in values:
        if name not in _BY_NAME:
            raise SchemaError(f"the summary has no column {name!r}{_close(name)}")
    filled = {column.name: _DEFAULTS[column.type] for column in COLUMNS}
    filled["schema_version"] = SCHEMA_VERSION
    filled.update((name, _encodable(value)) for name, value in values.items() if value is not None)
    return filled


def _encodable(value: Any) -> Any:
    """Text without lone surrogates (undecodable bytes in file names and error messages), which no file can hold."""
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value


def from_rows(rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """A validated summary from rows (see `row`)."""
    import pandas as pd

    rows = [row(**values) for values in rows]
    return validate(pd.DataFrame(rows, columns=list(_BY_NAME))) if rows else empty()


def empty() -> pd.DataFrame:
    """A summary without rows, with the right columns and types."""
    import pandas as pd

    return pd.DataFrame(
        {c.name: pd.Series([], dtype=_text() if c.type == "text" else _DTYPES[c.type]) for c in COLUMNS}
    )


def _text() -> Any:
    """The text dtype: `str` of pandas 3 (missing values are NaN), `object` before it."""
    import pandas as pd

    return "str" if int(pd.__version__.split(".")[0]) >= 3 else object


def _close(name: str) -> str:
    near = get_close_matches(name, _BY_NAME, n=2, cutoff=0.6)
    return f"; did you mean {' or '.join(repr(n) for n in near)}?" if near else ""


def validate(df: pd.DataFrame) -> pd.DataFrame:
    """The same table with columns in order and of the right types.

    Raises:
        SchemaError: a missing or unknown column, a value of the wrong type or outside what is allowed, an interval
            upside down, two rows for one cell, metric and scorer, a row that is not done without a reason.
    """
    import pandas as pd

    if missing := [name for name in _BY_NAME if name not in df.columns]:
        raise SchemaError(f"the summary lacks the columns: {', '.join(missing)}")
    if unknown := [str(name) for name in df.columns if name not in _BY_NAME]:
        raise SchemaError(f"unknown columns: {', '.join(name + _close(name) for name in unknown)}")
    columns: dict[str, Any] = {}
    for column in COLUMNS:
        values = df[column.name]
        try:
            if column.type == "text":
                values = values.fillna("")
                if bad := [v for v in values if not isinstance(v, str)]:
                    raise TypeError(f"{bad[0]!r} is not text")
                columns[column.name] = values.astype(_text())
            else:
                columns[column.name] = pd.to_numeric(values).astype(_DTYPES[column.type])
        except (TypeError, ValueError) as error:
            raise SchemaError(f"column {column.name!r} should hold {column.type}: {error}") from error
        if column.allowed and (bad := sorted(set(columns[column.name]) - set(column.allowed))):
            raise SchemaError(f"column {column.name!r} may hold {', '.join(map(repr, column.allowed))}; not {bad[0]!r}")
    result = pd.DataFrame(columns).reset_index(drop=True)
    _check_rows(result)
    return result


def _check_rows(df: pd.DataFrame) -> None:
    def first(where: Any, message: str) -> None:
        if where.any():
            at = int(where.to_numpy().argmax())
            bad = df.iloc[at]
            raise SchemaError(f"row {at} ({bad['label'] or bad['method']}, {bad['metric'] or bad['state']}): {message}")

    done = df["state"] == "done"
    first(done & (df["metric"] == ""), "a done row needs a metric")
    first(~done & (df["reason"] == ""), "a row that is not done needs a reason")
    first(~done & df["value"].notna(), "a row that is not done cannot have a value")
    first(done & df["value"].notna() & (df["unit"] == ""), "a value needs a unit")
    first(done & df["value"].notna() & (df["definition"] == ""), "a value needs a definition")
    first(df["low"] > df["high"], "the interval is upside down (low > high)")
    first(df["low"].isna() != df["high"].isna(), "an interval needs both ends")
    first((df["n"] < 1).fillna(False).astype(bool), "n must be at least 1")
    first(df.duplicated(["cell", "metric", "scorer"]), "a second row for the same cell, metric and scorer")
    first(df["schema_version"].ne(SCHEMA_VERSION).fillna(True).astype(bool), f"schema_version must be {SCHEMA_VERSION}")


def write_summary(folder: str | os.PathLike[str], df: pd.DataFrame) -> tuple[Path, Path]:
    """Validate and write summary.parquet and summary.csv; returns both paths.

    Raises:
        SchemaError: see `validate`.
        StoreError: the files cannot be written.
    """
    df = validate(df)
    parquet, csv = Path(folder) / "summary.parquet", Path(folder) / "summary.csv"
    write_table(parquet, df, meta={"schema_version": SCHEMA_VERSION})
    write_bytes(csv, df.to_csv(index=False, lineterminator="\n").encode("utf-8", "backslashreplace"))
    return parquet, csv


def read_summary(path: str | os.PathLike[str]) -> pd.DataFrame:
    """Read a summary from a run folder, a .parquet or a .csv file; older versions are migrated.

    Raises:
        SchemaError: not a summary, or of a version that cannot be read (both versions are named).
        CorruptFile, StoreError: the file is damaged or cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "summary.parquet"
    if not path.exists():
        raise MissingFile(f"there is no summary at {path}: finish the run first.", path)
    df = _read_csv(path) if path.suffix == ".csv" else read_table(path)
    return validate(_migrate(df, path))


def _read_csv(path: Path) -> pd.DataFrame:
    import pandas as pd

    text = {column.name: str for column in COLUMNS if column.type == "text"}
    try:
        df = pd.read_csv(
            path, dtype=text, keep_default_na=False, na_values={c.name: [""] for c in COLUMNS if c.type != "text"}
        )
    except (ValueError, UnicodeDecodeError) as error:
        raise SchemaError(f"{path} is not a summary: {error}") from error
    return df


def _migrate(df: pd.DataFrame, path: Path) -> pd.DataFrame:
    if "schema_version" not in df.columns:
        raise SchemaError(f"{path} is not a summary: it has no column schema_version")
    try:
        versions = sorted({int(v) for v in df["schema_version"].dropna()}) or [SCHEMA_VERSION]
    except (ValueError, OverflowError) as error:
        raise SchemaError(f"{path} is not a summary: its schema_version is no whole number ({error})") from error
    version = versions[0]
    if len(versions) > 1:
        raise SchemaError(f"{path} mixes schema versions {versions}: write each run's summary again")
    if version > SCHEMA_VERSION:
        raise SchemaError(
            f"{path} has schema version {version}; this package reads up to {SCHEMA_VERSION}: upgrade tsdfm-bench"
        )
    while version < SCHEMA_VERSION:
        if version not in MIGRATIONS:
            raise SchemaError(
                f"{path} has schema version {version}, which this package (version {SCHEMA_VERSION}) cannot convert: "
                f"make the summary again from what is stored, without sampling: repeat the run's own command with "
                f"--out {path.parent} (its request stands in plan.json)"
            )
        df = MIGRATIONS[version](df).assign(schema_version=version + 1)
        version += 1
    return df
