"""Rows with a prompt are measured on what follows it; scorers read the prompt, and its units are left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from typer.testing import CliRunner

from tsdfm_bench.api import ScoreBatch
from tsdfm_bench.cli import app
from tsdfm_bench.continuation import cut
from tsdfm_bench.results.schema import read_summary
from tsdfm_bench.results.store import read_scores

if TYPE_CHECKING:
    from conftest import Here


class Pairs:
    """Reads two characters as one unit, from the left; the NLL of a unit is its number in the text."""

    def __init__(self) -> None:
        self.read: list[str] = []

    def __call__(self, texts: Sequence[str]) -> ScoreBatch:
        self.read += texts
        parts = [[text[i : i + 2] for i in range(0, len(text), 2)] for text in texts]
        return ScoreBatch(
            [np.arange(len(row), dtype=float) for row in parts],
            [np.array([sum(map(ord, unit)) + 1000 * len(unit) for unit in row]) for row in parts],
            [np.zeros(len(row), dtype=bool) for row in parts],
            np.array([len(text) for text in texts]),
            np.zeros((len(texts), 2), dtype=np.float32),
        )


def test_units_of_the_prompt_are_left_out_and_one_across_its_end_is_kept() -> None:
    pairs, known = Pairs(), {}
    whole = pairs(["abcdefg", "abcdefg", "xy"])
    found = cut(whole, ["abcd", "abc", "xy"], known, pairs)
    assert [row.tolist() for row in found.nll] == [[2, 3], [1, 2, 3], []]
    assert [len(row) for row in found.units] == [2, 3, 0]
    assert [len(row) for row in found.special] == [2, 3, 0]
    assert found.bytes.tolist() == [3, 4, 0]
    assert found.features is whole.features
    assert pairs.read[3:] == ["abcd", "abc", "xy"]
    cut(whole, ["abcd", "abcd", "new"], known, pairs)
    assert pairs.read[6:] == ["new"]  # nothing is read twice


def test_a_unit_across_the_end_of_the_prompt_counts_with_all_its_bytes() -> None:
    """As its whole NLL counts: a judge that says where its units lie gives the bytes of those that are kept."""
    pairs = Pairs()
    whole = replace(
        pairs(["abcdefg", "äbcdefg"]), bytes=np.array([7, 8]), spans=[np.array([[0, 2], [2, 4], [4, 6], [6, 7]])] * 2
    )
    assert cut(whole, ["abc", "äbc"], {}, pairs).bytes.tolist() == [5, 5]
    assert cut(whole, ["abcd", "äbcd"], {}, pairs).bytes.tolist() == [3, 3]


def test_a_text_that_has_no_units_loses_none() -> None:
    """The oracle gives an impossible sequence none."""
    pairs = Pairs()
    empty = ScoreBatch([np.empty(0)], [np.empty(0, int)], [np.empty(0, bool)], np.zeros(1, int))
    assert [len(row) for row in cut(empty, ["ab"], {}, pairs).nll] == [0]


def test_a_run_measures_the_continuation(here: Here) -> None:
    """Letters are units of the fake scorer: four of twelve are given, eight are scored."""
    assert here.run(prefix="4").exit_code == 0
    (cell,) = here.cells(kind="method")
    scores = read_scores(here.out.scores_path("toy", cell))
    tokens = here.tokens(cell)[:, 4:]
    assert [units.tolist() for units in scores.units] == tokens.tolist()
    assert scores.bytes.tolist() == [8] * 24
    rows = here.summary().query("kind == 'method'").set_index("metric")
    assert rows.loc["gen_ppl/pooled", "value"] == pytest.approx(np.exp((1 + tokens / 8).mean()))
    share = [np.unique(row, return_counts=True)[1] / 8 for row in tokens]
    assert rows.loc["entropy_nats", "value"] == pytest.approx(np.mean([-(p * np.log(p)).sum() for p in share]))
    assert str(rows.loc["entropy_nats", "definition"]).endswith("; after a prompt of 4 tokens, the continuation alone")
    real = here.summary().query("method == 'real' and metric == 'gen_ppl/pooled'").iloc[0]
    (held_out,) = here.cells(method="real", options={})
    assert real["value"] == pytest.approx(np.exp((1 + here.tokens(held_out)[:, 4:] / 8).mean()))


def test_a_text_as_prompt_is_cut_too(here: Here) -> None:
    assert here.run(prefix="the").exit_code == 0
    (cell,) = here.cells(kind="method")
    assert {len(units) for units in read_scores(here.out.scores_path("toy", cell)).units} == {9}


@pytest.mark.parametrize(
    ("task", "methods", "samples"), [("markov[vocab=8;length=16]", "ar,mdlm", 96), ("grammar", "ar", 32)]
)
def test_exact_continuations_have_no_excess(tmp_path: Path, task: str, methods: str, samples: int) -> None:
    """With the exact next-token law `ar` continues without error; drawing all places at once (one step) does not."""
    words = f"run --task {task} --methods {methods} --checkpoint oracle --steps 1 --prefix 6 --threads 1"
    done = CliRunner().invoke(
        app, [*words.split(), "--samples", str(samples), "--metrics", "exact", "--out", str(tmp_path / "out")]
    )
    assert done.exit_code == 0, done.output
    rows = read_summary(tmp_path / "out").query("metric == 'excess_nll'").set_index("method")
    for exact in ("ar", "real"):
        assert rows.loc[exact, "low"] < 0.1
        assert rows.loc[exact, "high"] > -0.1
    if task.startswith("markov"):
        assert rows.loc["mdlm", "low"] > 0.5
