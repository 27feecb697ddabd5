"""Rows that were filled in between given tokens are measured on what was filled in, and on nothing else."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from tsdfm_bench.api import CellData, ScoreBatch, ScorerInfo
from tsdfm_bench.cli import app
from tsdfm_bench.contract import check_scores
from tsdfm_bench.errors import PluginError
from tsdfm_bench.infilling import Filled, token_spans
from tsdfm_bench.results.schema import read_summary
from tsdfm_bench.results.store import read_scores, write_scores
from tsdfm_bench.rng import Streams, derive_key
from tsdfm_bench.tasks.metrics.entropy import Entropy
from tsdfm_bench.tasks.metrics.gen_ppl import BitsPerByte, GenPPL
from tsdfm_bench.tasks.metrics.repetition import Repetition

if TYPE_CHECKING:
    from conftest import Here


class Bytes:
    """A task whose tokens are pairs of UTF-8 bytes: é lies in one token, or in two."""

    def decode(self, tokens: np.ndarray, lengths: np.ndarray) -> list[str]:
        rows = [np.stack(np.divmod(row[:n], 256), axis=1).ravel() for row, n in zip(tokens, lengths, strict=True)]
        return [bytes(row.tolist()).decode("utf-8", "replace") for row in rows]

    def encode(self, text: str) -> np.ndarray:
        data = np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64)
        return data[::2] * 256 + data[1::2]


class Numbers:
    """A task whose tokens are written with a blank between them."""

    def decode(self, tokens: np.ndarray, lengths: np.ndarray) -> list[str]:
        return [" ".join(map(str, row[:n].tolist())) for row, n in zip(tokens, lengths, strict=True)]


class Letters:
    """A task whose tokens are the letters a, b, c, ..."""

    def decode(self, tokens: np.ndarray, lengths: np.ndarray) -> list[str]:
        return ["".join(chr(97 + token) for token in row[:n]) for row, n in zip(tokens, lengths, strict=True)]


class Parts:
    """A task of four tokens."""

    def decode(self, tokens: np.ndarray, lengths: np.ndarray) -> list[str]:
        parts = ("é", "€", "<|endoftext|>", "z")
        return ["".join(parts[i] for i in row[:n]) for row, n in zip(tokens, lengths, strict=True)]


@pytest.mark.parametrize(
    ("task", "tokens", "text", "spans"),
    [
        (Bytes(), Bytes().encode("abé"), "abé", [[0, 2], [2, 3]]),
        (Bytes(), Bytes().encode("aébc!"), "aébc!", [[0, 2], [1, 3], [3, 5]]),
        (Numbers(), np.array([1, 17, 3]), "1 17 3", [[0, 1], [1, 4], [4, 6]]),
        (Letters(), np.array([2, 0]), "ca", [[0, 1], [1, 2]]),
        (Letters(), np.array([], dtype=np.int64), "", []),
    ],
)
def test_where_tokens_stand(task: Any, tokens: np.ndarray, text: str, spans: list[list[int]]) -> None:
    """A character that lies in two tokens belongs to both."""
    (found,) = token_spans(tokens[None], np.array([len(tokens)]), [text], task)
    assert found.tolist() == spans


def test_a_text_of_other_tokens_is_refused() -> None:
    with pytest.raises(PluginError, match="not what its tokens decode to"):
        token_spans(np.array([[1, 17]]), np.array([2]), ["1 18"], Numbers())  # type: ignore[arg-type]


def pairs(texts: list[str]) -> ScoreBatch:
    """Two characters are a unit; its NLL is 2 to the power of its number in the text."""
    spans = [np.array([[i, min(i + 2, len(text))] for i in range(0, len(text), 2)]) for text in texts]
    nll = [2.0 ** np.arange(len(row)) for row in spans]
    marks = [np.zeros(len(row), dtype=bool) for row in spans]
    return ScoreBatch(nll, [np.arange(len(row)) for row in spans], marks, np.zeros(len(texts)), spans=spans)


def cell_data(tokens: np.ndarray, filled: np.ndarray) -> CellData:
    """What a metric sees of sequences of letters, scored by pairs."""
    lengths = np.full(len(tokens), tokens.shape[1])
    texts = Letters().decode(tokens, lengths)
    part = Filled(tokens, lengths, texts, filled, Letters())  # type: ignore[arg-type]
    together, counts, infilling = part.moved_together()
    info = ScorerInfo("pairs", "pairs of letters", "1", "pair", "float64", 0, 0)
    scores = {"pairs": part.scores(pairs(texts), False)}
    return CellData(together, counts, [], 26, scores, {"pairs": info}, infilling=infilling)


def test_measures_in_closed_form() -> None:
    """abcabaabab with the places 2 to 5 and 9 filled in: c a b a and b, in two pieces; the pairs ca, ba and ab."""
    tokens = np.array([[0, 1, 2, 0, 1, 0, 0, 1, 0, 1]])
    filled = np.isin(np.arange(10), (2, 3, 4, 5, 9))[None]
    cell = cell_data(tokens, filled)
    assert [piece.tolist() for piece in cell.pieces()[0]] == [[2, 0, 1, 0], [1]]
    found = {m.metric: m for metric in (GenPPL(), BitsPerByte(), Entropy(), Repetition()) for m in metric.compute(cell)}
    value = {name: float(m.statistic(*m.columns)) for name, m in found.items() if m.statistic is not None}
    assert value["gen_ppl"] == pytest.approx(math.exp((2 + 4 + 16) / 3))  # the last pair has one given letter
    assert value["bits_per_byte"] == pytest.approx((2 + 4 + 16) / math.log(2) / 6)
    assert value["entropy_nats"] == pytest.approx(-(0.4 * math.log(0.4) * 2 + 0.2 * math.log(0.2)))
    assert value["distinct_1"] == pytest.approx(3 / 5)
    assert value["distinct_2"] == 1.0  # ca, ab, ba: no pair reaches over the gap
    assert value["longest_repeat"] == 1.0
    assert value["mean_length"] == 5.0


def test_given_tokens_do_not_matter_to_measures_on_tokens() -> None:
    rng = np.random.default_rng(0)
    filled = rng.random((3, 12)) < 0.5
    tokens, others = rng.integers(0, 4, (2, 3, 12))
    both = [cell_data(rows, filled) for rows in (tokens, np.where(filled, tokens, others))]
    for metric in (Entropy(), Repetition()):
        ours, theirs = ([m.columns for m in metric.compute(cell)] for cell in both)
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(a, b)


def test_bytes_are_those_of_the_counted_units() -> None:
    """é has two bytes, € three, and an end-of-text unit counts as one whatever is written for it."""
    text = "é€<|endoftext|>z"
    spans = [np.array([[0, 1], [1, 2], [2, 15], [15, 16]])]
    special = [np.array([False, False, True, False])]
    whole = ScoreBatch([np.ones(4)], [np.arange(4)], special, np.array([7]), spans=spans)
    for filled, size in (([0, 1, 1, 0], 4), ([1, 0, 0, 1], 3), ([0, 0, 0, 0], 0)):
        part = Filled(np.arange(4)[None], np.array([4]), [text], np.array([filled], dtype=bool), Parts())  # type: ignore[arg-type]
        assert part.scores(whole, False).bytes.tolist() == [size]


def test_a_run_measures_what_was_filled_in(here: Here) -> None:
    """The fake scorer gives a letter 1 + its rank / 8; the same places are free in every row."""
    assert here.run(infill="0.5", metrics="gen-ppl,entropy").exit_code == 0
    rows = here.summary().set_index(["method", "metric"])
    key = derive_key(0, "prompts", "tiny", rows["data_hash"].iloc[0])
    free = (Streams(key, 2 * torch.arange(24)).uniform("infill", 0, 12) >= 0.5).numpy()
    assert set(rows.index.get_level_values(0)) == {"counter", "real", "unigram", "loop"}
    for method in ("counter", "real", "unigram", "loop"):
        mine = rows.loc[method]
        tokens = here.tokens(mine.loc["gen_ppl", "cell"])
        assert mine.loc["gen_ppl", "value"] == pytest.approx(np.exp((1 + tokens[free] / 8).mean()))
        share = [np.unique(row[at], return_counts=True)[1] / at.sum() for row, at in zip(tokens, free, strict=True)]
        entropy = np.mean([-(p * np.log(p)).sum() for p in share])
        assert mine.loc["entropy_nats", "value"] == pytest.approx(entropy)
        assert "what was filled in alone" in str(mine.loc["gen_ppl", "definition"])


def test_a_scorer_that_does_not_say_where_its_units_lie_has_a_reason(here: Here) -> None:
    assert here.run(infill="0.5", metrics="gen-ppl,entropy", scorers="blind").exit_code == 0
    rows = here.summary().query("kind == 'method'").set_index("metric")
    assert "does not say where its units lie" in str(rows.loc["scores", "reason"])
    assert "gen_ppl" not in rows.index
    assert rows.loc["entropy_nats", "value"] > 0
    here.events()
    assert here.run(infill="0.5", metrics="gen-ppl,entropy", scorers="blind").exit_code == 0
    assert not [event for event in here.events() if event.startswith("score")]  # it is not asked again


def test_scores_from_before_places_were_stored_are_made_again(here: Here) -> None:
    assert here.run(infill="0.5", metrics="gen-ppl").exit_code == 0
    (cell,) = here.cells(kind="method")
    path = here.out.scores_path("toy", cell)
    s = read_scores(path)
    assert s.spans is not None
    meta = {key: value for key, value in s.meta.items() if key != "spans"}
    write_scores(path, s.nll, s.units, s.special, s.bytes, s.features, meta)
    assert here.run(infill="0.5", metrics="gen-ppl").exit_code == 0
    assert read_scores(path).spans is not None


@pytest.mark.parametrize(
    ("spans", "said"),
    [
        ([[[0, 1]]], r"spans of int64 \(1, 2\) for the 2 units of text 0"),
        ([[[0, 1], [1, 4]]], "does not lie in text 0, which is 3 long"),
        ([[[0, 1], [2, 1]]], "does not lie in text 0"),
        ([], "0 spans for 1 texts"),
    ],
)
def test_spans_are_checked(spans: list[Any], said: str) -> None:
    two = [np.zeros(2)], [np.zeros(2, dtype=int)], [np.zeros(2, dtype=bool)], np.array([3])
    with pytest.raises(PluginError, match=said):
        check_scores(ScoreBatch(*two, spans=[np.array(row) for row in spans]), ["abc"])


def test_exact_infillings_have_no_excess(tmp_path: Path) -> None:
    """First-hitting steps with the exact posterior are exact draws; all free places at once are not."""
    words = (
        "run --task markov[vocab=8;length=16] --methods mdlm --checkpoint oracle --steps 1,32 --infill 0.4 --samples 96"
    )
    options = ["--threads", "1", "--metrics", "exact,gen-ppl", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, [*words.split(), *options])
    assert done.exit_code == 0, done.output
    rows = read_summary(tmp_path / "out")
    excess = rows.query("metric == 'excess_nll'").set_index("steps", append=False)
    assert excess.loc[1, "low"] > 0.3
    exact = excess.loc[32]
    assert exact["low"] < 0.1
    assert exact["high"] > -0.1
    assert exact["high"] < excess.loc[1, "low"]
    assert rows.query("metric == 'gen_ppl' and scorer == 'oracle'")["value"].notna().all()
