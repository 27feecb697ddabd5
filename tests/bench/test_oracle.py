"""`--checkpoint oracle` and `--scorers oracle` end to end, and `tsdfm-bench orders`."""

from __future__ import annotations

import json

import pandas as pd
import pytest
from typer.testing import CliRunner

from tsdfm_bench.cli import app
from tsdfm_bench.results.schema import read_summary


def cli(*words: str):
    return CliRunner().invoke(app, list(words), prog_name="tsdfm-bench")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The command of the documentation, small."""
    folder = tmp_path_factory.mktemp("oracle") / "out"
    words = "run --task markov[vocab=8;length=16] --methods dfm,mdlm,sedd,ar --checkpoint oracle --steps 1,4,16"
    result = cli(*words.split(), "--samples", "256", "--threads", "1", "--out", str(folder))
    return result, folder


def values(summary: pd.DataFrame, method: str, metric: str) -> list[float]:
    rows = summary[(summary["method"] == method) & (summary["metric"] == metric)].sort_values("steps")
    return [float(value) for value in rows["value"]]


def test_excess_falls_and_exact_rows_have_none(run):
    result, folder = run
    assert result.exit_code == 0, result.output
    summary = read_summary(folder)
    for method in ("dfm", "mdlm", "sedd"):
        one, four, sixteen = values(summary, method, "excess_nll")
        assert one > 2 * four > 4 * sixteen  # first order: a quarter each time
        variation = values(summary, method, "tv_2")
        assert variation == sorted(variation, reverse=True)
    for exact in ("ar", "real"):
        row = summary[(summary["method"] == exact) & (summary["metric"] == "excess_nll")].iloc[0]
        assert row["low"] < 0.05
        assert row["high"] > -0.05
    weights = summary[summary["kind"] == "method"]
    assert set(weights["checkpoint"]) == {"oracle"}
    assert set(weights["weights"]) == set(summary["data_hash"])
    calls = weights[(weights["method"] == "sedd") & (weights["steps"] == 4)]["calls"].iloc[0]
    assert 4 <= calls <= 5
    assert set(summary["scorer"]) == {"", "oracle"}


def test_table_names_its_numbers(run):
    result, _ = run
    for words in ("excess NLL", "TV 2-grams", "Checkpoint oracle", "the row of exact draws is the floor"):
        assert words in " ".join(result.stdout.split())
    assert "bits_per_byte" not in result.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--task sotu --checkpoint oracle", "has no exact law"),
        ("--task sotu --scorers oracle", "has no exact law"),
        ("--task markov[vocab=0] --checkpoint oracle", "at least 1"),
    ],
)
def test_wrong_use(words, said, tmp_path):
    result = cli("run", *words.split(), "--methods", "mdlm", "--samples", "8", "--out", str(tmp_path / "out"))
    assert result.exit_code == 2
    assert said in result.output


def test_orders():
    shown = cli("orders", "--json")
    assert shown.exit_code == 0
    rows = json.loads(shown.stdout)
    assert {row["method"] for row in rows} == {"dfm", "fsdfm", "mdlm", "sedd", "ar"}
    table = cli("orders").stdout
    assert "exact" in table
    assert "1.00" in table
