"""Two runs: equal ones are identical, real differences are found and named, what cannot be compared is not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from tsdfm_bench.cli import app
from tsdfm_bench.results import schema
from tsdfm_bench.results.columns import columns_path, terms, write_columns
from tsdfm_bench.results.compare import Change, compare_runs, comparison_json, comparison_table

Make = Callable[..., list[dict[str, Any]]]


def changes(a: list[dict[str, Any]], b: list[dict[str, Any]], **given: Any) -> dict[tuple[str, str], Change]:
    found = compare_runs(schema.from_rows(a), schema.from_rows(b), **given)
    return {(change.name, change.metric): change for change in found.changes}


def test_a_run_against_itself_is_identical_in_every_number(summary: pd.DataFrame) -> None:
    found = compare_runs(summary, summary)
    assert set(found.counts()) == {"identical"}
    assert found.only_a == found.only_b == []
    table = comparison_table(found)
    assert len(table.rows) == len(found.changes)


def test_recorded_results_against_themselves_by_command() -> None:
    result = CliRunner().invoke(app, ["compare", "reference", "reference", "--json"])
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert {change["verdict"] for change in said["changes"]} == {"identical"}


def test_direction_decides_between_better_and_worse(cell: Make) -> None:
    a = cell("dfm", {"s": 50.0}, 3.80, steps=8)
    better, worse = (cell("dfm", {"s": ppl}, 3.70, steps=8) for ppl in (30.0, 80.0))
    found = changes(a, better)
    ppl = found["dfm, 8 steps", "gen_ppl/pooled"]
    assert ppl.verdict in ("better", "lower")
    assert ppl.percent is not None
    assert ppl.percent.low < -40 < ppl.percent.high
    assert found["dfm, 8 steps", "entropy_nats"].verdict == "lower"
    assert changes(a, worse)["dfm, 8 steps", "gen_ppl/pooled"].verdict in ("worse", "higher")


def test_sequences_of_one_cell_are_paired(cell: Make, tmp_path: Path) -> None:
    """A shift far below the spread over sequences is found when the same sequences are compared, and only then."""
    rng = np.random.default_rng(0)
    nll, count = rng.normal(200.0, 20.0, 64), np.full(64, 64.0)
    runs = []
    for name, shift in (("a", 0.0), ("b", 1.0)):
        values = nll + shift + rng.normal(0.0, 0.5, 64)
        rows = cell("dfm", {"s": float(np.exp(values.sum() / count.sum()))}, 3.8, steps=8, n=64)
        (tmp_path / name).mkdir()
        found = terms("exp-ratio", (values, count))
        write_columns(columns_path(tmp_path / name, "gen-ppl", rows[0]["cell"]), [("gen_ppl/pooled", "s", found)])
        runs.append(rows)
    paired = changes(*runs, roots=(tmp_path / "a", tmp_path / "b"))["dfm, 8 steps", "gen_ppl/pooled"]
    assert paired.paired
    assert paired.verdict in ("worse", "higher")
    apart = changes(*runs)["dfm, 8 steps", "gen_ppl/pooled"]
    assert not apart.paired
    assert apart.verdict == "not separable"
    assert apart.needed is not None
    assert apart.needed > 64


@pytest.mark.parametrize("column", ["scorer_revision", "scorer_dtype", "definition", "unit"])
def test_numbers_of_different_meaning_are_listed_not_subtracted(cell: Make, column: str) -> None:
    a, b = (cell("dfm", {"s": 50.0}, 3.8, steps=8) for _ in range(2))
    for row in b:
        if row["metric"] == "gen_ppl/pooled":
            row[column] = "another"
    change = changes(a, b)["dfm, 8 steps", "gen_ppl/pooled"]
    assert change.verdict == "not compared"
    assert "differ" in change.reason
    assert change.difference is None


def test_other_weights_are_matched_by_their_settings_and_said(cell: Make) -> None:
    a = cell("dfm", {"s": 50.0}, 3.8, steps=8, cell="one", weights="sha256:1")
    b = cell("dfm", {"s": 50.0}, 3.8, steps=8, cell="two", weights="sha256:2")
    found = compare_runs(schema.from_rows(a), schema.from_rows(b))
    assert found.changes
    assert "other weights in the second run" in " ".join(found.notes)
    assert {change.verdict for change in found.changes if change.metric == "gen_ppl/pooled"} == {"not separable"}


def test_cells_of_one_run_alone_are_named(cell: Make) -> None:
    both = cell("dfm", {"s": 50.0}, 3.8, steps=8)
    found = compare_runs(
        schema.from_rows(both + cell("mdlm", {"s": 5.0}, 3.8, steps=8)),
        schema.from_rows(both + cell("sedd", {"s": 5.0}, 3.8, steps=8)),
        names=("first", "second"),
    )
    assert (found.only_a, found.only_b) == (["mdlm, 8 steps"], ["sedd, 8 steps"])
    notes = " ".join(comparison_table(found).footnotes)
    assert "Only in first: mdlm, 8 steps." in notes
    assert "Only in second: sedd, 8 steps." in notes


def test_values_that_are_missing_or_not_finite_are_not_compared(cell: Make) -> None:
    a, b = (cell("dfm", {"s": 50.0}, 3.8, steps=8) for _ in range(2))
    for row in b:
        if row["metric"] == "gen_ppl/pooled":
            row |= {"value": float("inf"), "low": None, "high": None}
    found = compare_runs(schema.from_rows(a), schema.from_rows(b))
    change = next(change for change in found.changes if change.metric == "gen_ppl/pooled")
    assert change.verdict == "not compared"
    assert "no value in the second run" in change.reason
    json.dumps(comparison_json(found), allow_nan=False)
