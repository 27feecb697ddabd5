"""The summary: typed columns, clear refusals, the same content from Parquet and CSV."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from tsdfm_bench.results import schema
from tsdfm_bench.results.arrays import write_table
from tsdfm_bench.results.files import CorruptFile, StoreError

Rows = list[dict[str, Any]]


def test_every_column_says_what_it_holds() -> None:
    names = [column.name for column in schema.COLUMNS]
    assert len(set(names)) == len(names)
    assert all(len(column.comment) > 5 for column in schema.COLUMNS)
    assert {
        *("task", "method", "source", "steps", "temperature", "scorer", "metric", "value", "low", "high", "n"),
        *("unit", "definition", "calls", "flags"),
    } <= set(names)


def test_an_empty_summary_is_valid(tmp_path: Path) -> None:
    pd.testing.assert_frame_equal(schema.validate(schema.empty()), schema.empty())
    pd.testing.assert_frame_equal(schema.from_rows([]), schema.empty())
    schema.write_summary(tmp_path, schema.empty())
    for path in (tmp_path, tmp_path / "summary.csv"):
        pd.testing.assert_frame_equal(schema.read_summary(path), schema.empty())


def test_parquet_and_csv_say_the_same(tmp_path: Path, rows: Rows) -> None:
    rows[-1]["reason"] = 'line 1\nline "2", NA\r\n=1+1'
    rows[-2]["label"] = "NA"
    rows[0]["value"], rows[0]["low"], rows[0]["high"] = 0.1 + 0.2, 1e-300, 1e300
    summary = schema.from_rows(rows)
    paths = schema.write_summary(tmp_path, summary)
    for path in (tmp_path, *paths):
        back = schema.read_summary(path)
        expected = summary
        if path == paths[1]:  # csv readers fold line ends
            expected = summary.assign(reason=summary["reason"].str.replace("\r\n", "\n"))
            back = back.assign(reason=back["reason"].str.replace("\r\n", "\n"))
        pd.testing.assert_frame_equal(back, expected)
    assert summary["steps"].dtype == "Int64"
    assert summary["steps"].isna().any()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "generator"}, "'kind' may hold 'method', 'reference'; not 'generator'"),
        ({"state": "ok"}, "'state'"),
        ({"draw": "fp16"}, "'draw'"),
        ({"steps": "eight"}, "column 'steps' should hold integer"),
        ({"steps": 8.5}, "column 'steps' should hold integer"),
        ({"value": "much"}, "column 'value' should hold float"),
        ({"metric": 3}, "column 'metric' should hold text"),
        ({"metric": ""}, "needs a metric"),
        ({"unit": ""}, "needs a unit"),
        ({"definition": ""}, "needs a definition"),
        ({"low": 9.0, "high": 1.0}, "upside down"),
        ({"low": None}, "both ends"),
        ({"n": 0}, "at least 1"),
        ({"state": "failed", "value": None, "low": None, "high": None}, "needs a reason"),
        ({"state": "failed", "reason": "x"}, "cannot have a value"),
        ({"schema_version": 99}, "schema_version must be"),
    ],
)
def test_wrong_values_are_named(rows: Rows, change: dict[str, Any], words: str) -> None:
    broken = schema.row(**rows[0])
    broken.update(change)
    with pytest.raises(schema.SchemaError, match=words):
        schema.validate(pd.DataFrame([broken]))


def test_one_row_per_cell_metric_and_scorer(rows: Rows) -> None:
    with pytest.raises(schema.SchemaError, match="second row"):
        schema.from_rows([rows[0], rows[0]])


def test_wrong_columns_are_named_with_the_nearest(summary: pd.DataFrame) -> None:
    with pytest.raises(schema.SchemaError, match="lacks the columns: value"):
        schema.validate(summary.drop(columns="value"))
    with pytest.raises(schema.SchemaError, match=r"unknown columns: temprature; did you mean 'temperature'\?"):
        schema.validate(summary.assign(temprature=1))
    with pytest.raises(schema.SchemaError, match="no column 'valeu'; did you mean 'value'"):
        schema.row(valeu=1)


def test_versions(tmp_path: Path, summary: pd.DataFrame, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "summary.parquet"
    write_table(path, summary.assign(schema_version=schema.SCHEMA_VERSION + 1))
    with pytest.raises(schema.SchemaError, match="upgrade tsdfm-bench"):
        schema.read_summary(path)
    write_table(path, summary.rename(columns={"method": "model"}).assign(schema_version=0))
    with pytest.raises(schema.SchemaError, match=r"cannot convert.*without sampling.*--out"):
        schema.read_summary(path)
    first = schema.MIGRATIONS[1]
    monkeypatch.setitem(schema.MIGRATIONS, 0, lambda df: df.rename(columns={"model": "method"}))
    monkeypatch.setitem(schema.MIGRATIONS, 1, lambda df: first(df.drop(columns="scorer_seen")))
    pd.testing.assert_frame_equal(schema.read_summary(path), summary)
    mixed = summary.copy()
    mixed.loc[0, "schema_version"] = 0
    write_table(path, mixed)
    with pytest.raises(schema.SchemaError, match="mixes"):
        schema.read_summary(path)
    write_table(path, pd.DataFrame({"x": [1]}))
    with pytest.raises(schema.SchemaError, match="not a summary"):
        schema.read_summary(path)


def test_version_one_knew_nothing_of_scorers_that_saw_the_text(tmp_path: Path, summary: pd.DataFrame) -> None:
    path = tmp_path / "summary.parquet"
    write_table(path, summary.drop(columns="scorer_seen").assign(schema_version=1))
    read = schema.read_summary(path)
    assert set(read["scorer_seen"]) == {""}
    pd.testing.assert_frame_equal(read, summary)


@pytest.mark.parametrize("version", ["x", "inf"])
def test_a_version_that_is_no_number_is_said(tmp_path: Path, summary: pd.DataFrame, version: str) -> None:
    summary.astype({"schema_version": object}).assign(schema_version=version).to_csv(tmp_path / "x.csv", index=False)
    with pytest.raises(schema.SchemaError, match=r"x\.csv is not a summary: its schema_version is no whole number"):
        schema.read_summary(tmp_path / "x.csv")


def test_missing_and_damaged_summaries(tmp_path: Path, summary: pd.DataFrame) -> None:
    with pytest.raises(StoreError, match="no summary"):
        schema.read_summary(tmp_path)
    parquet, csv = schema.write_summary(tmp_path, summary)
    parquet.write_bytes(parquet.read_bytes()[:-7])
    with pytest.raises(CorruptFile):
        schema.read_summary(tmp_path)
    csv.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(schema.SchemaError):
        schema.read_summary(csv)
