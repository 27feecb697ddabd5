"""Each flag is raised where it should be, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest

from tsdfm_bench.results import flags, schema
from tsdfm_bench.results.rows import pick

Rows = list[dict[str, Any]]
Cell = Callable[..., Rows]
REF: dict[str, Any] = {"kind": "reference"}


def raised(rows: Rows) -> dict[str, set[str]]:
    """Codes by method."""
    summary = schema.from_rows(rows)
    names = dict(zip(summary["cell"], summary["method"], strict=True))
    out: dict[str, set[str]] = {}
    for flag in flags.find_flags(summary):
        assert flag.code in flags.FLAGS
        out.setdefault(names[flag.cell], set()).add(flag.code)
    return out


def without(found: dict[str, set[str]], *codes: str) -> dict[str, set[str]]:
    return {name: rest for name, seen in found.items() if (rest := seen - set(codes))}


def test_a_clean_summary_has_no_flags(cell: Cell) -> None:
    rows = cell("ar", {"s": 40.0}, 3.81, n=5000) + cell("real", {"s": 30.0}, 3.8, n=5000, **REF)
    rows += cell("bigram", {"s": 120.0}, 3.82, n=5000, **REF)
    assert raised(rows) == {}


def test_batches_that_only_costs_know_of_are_no_sequences_of_the_row(cell: Cell) -> None:
    """A folder that once held more samples has measured more batches than the row now has sequences."""
    rows = cell("ar", {"s": 40.0}, 3.81, n=5000) + cell("real", {"s": 30.0}, 3.8, n=5000, **REF)
    rows += cell("bigram", {"s": 120.0}, 3.82, n=5000, **REF)
    cost = next(row for row in rows if row["method"] == "ar")
    rows.append({**cost, "metric": "seconds", "unit": "s", "value": 3.0, "scorer": "", "n": 10_000})
    assert raised(rows) == {}


@pytest.mark.parametrize(("entropy", "code"), [(3.6, "entropy-low"), (4.0, "entropy-high"), (3.84, None), (3.76, None)])
def test_entropy_out_of_range(cell: Cell, entropy: float, code: str | None) -> None:
    rows = cell("ar", {"s": 40.0}, entropy, n=5000) + cell("real", {"s": 30.0}, 3.8, n=5000, **REF)
    assert raised(rows).get("ar", set()) == ({code} if code else set())


def test_entropy_that_is_uncertain_is_not_out_of_range(cell: Cell) -> None:
    """A gap of 0.2 nats whose interval reaches real text's proves nothing."""
    rows = cell("ar", {"s": 40.0}, 3.6, n=5000) + cell("real", {"s": 30.0}, 3.8, n=5000, **REF)
    for row in rows:
        if row["metric"] == "entropy_nats" and row["method"] == "ar":
            row["low"], row["high"] = 3.4, 3.8
    assert raised(rows) == {}


@pytest.mark.parametrize(
    ("metric", "value", "code"),
    [
        ("repetition_4", 0.05, "rep-high"),
        ("repetition_4", 0.001, "rep-low"),
        ("distinct_2", 0.6, "rep-high"),
        ("distinct_2", 1.2, "rep-low"),
        ("repetition_4", 0.0205, None),
    ],
)
def test_repetition_out_of_range(cell: Cell, metric: str, value: float, code: str | None) -> None:
    rows = cell("ar", {"s": 40.0}, 3.8, n=5000) + cell("real", {"s": 30.0}, 3.8, n=5000, **REF)
    for row in rows:
        if row["metric"] == metric and row["method"] == "ar":
            row["value"], row["low"], row["high"] = value, value * 0.99, value * 1.01
    assert raised(rows).get("ar", set()) == ({code} if code else set())


def test_canaries(cell: Cell) -> None:
    """bigram keeps the entropy of text and is a floor; loop does not and shows that perplexity can be had cheaply."""
    rows = [
        *cell("good", {"s": 50.0, "t": 5.0}, 3.8, n=5000),
        *cell("bad", {"s": 130.0, "t": 5.0}, 3.8, n=5000),
        *cell("real", {"s": 30.0, "t": 4.0}, 3.8, n=5000, **REF),
        *cell("bigram", {"s": 120.0, "t": 9.0}, 3.8, n=5000, **REF),
        *cell("loop", {"s": 3.0, "t": 20.0}, 1.2, n=5000, **REF),
    ]
    found = raised(rows)
    assert found == {
        "good": {"ppl-gamed"},
        "bad": {"canary", "ppl-gamed"},
        "real": {"ppl-gamed"},
        "loop": {"entropy-low"},
    }
    details = {(f.code, f.scorer): f.detail for f in flags.find_flags(schema.from_rows(rows)) if "bad" in f.cell}
    assert details["canary", "s"] == "s: 130 against bigram 120"
    assert ("canary", "t") not in details


def test_equal_to_a_canary_is_not_better(cell: Cell) -> None:
    rows = cell("ar", {"s": 120.0}, 3.8, n=5000) + cell("real", {"s": 30.0}, 3.8, n=5000, **REF)
    rows += cell("unigram", {"s": 120.0}, 3.8, n=5000, **REF)
    assert raised(rows) == {"ar": {"canary"}}


def test_without_real_text_no_canary_is_called_one_with_its_entropy(cell: Cell) -> None:
    """A loop has the best perplexity of all: beside nothing to compare it with it would bar every row."""
    rows = [*cell("good", {"s": 50.0}, 3.8, n=5000), *cell("loop", {"s": 2.0}, 1.2, n=5000, **REF)]
    assert raised(rows) == {"good": {"no-real"}, "loop": {"no-real"}}


def test_counts_draws_and_scorers(cell: Cell) -> None:
    rows = [
        *cell("a", {"s": 50.0, "t": 5.0}, 3.8, n=256),
        *cell("b", {"s": 50.0}, 3.8, n=256, draw="legacy-fp32"),
        *cell("c", {"s": 50.0, "t": 5.0}, 3.8, n=16),
        *cell("real", {"s": 30.0, "t": 4.0}, 3.8, n=256, **REF),
    ]
    found = raised(rows)
    assert without(found, "mauve-n") == {"b": {"legacy-fp32", "scorer-missing"}, "c": {"mixed-n", "few"}}
    assert all("mauve-n" in codes for codes in found.values())


def test_a_scorer_that_nobody_could_use_is_missing_everywhere(cell: Cell) -> None:
    """A row without a value says that the scorer was asked for."""
    rows = cell("ar", {"s": 50.0}, 3.8, n=5000) + cell("real", {"s": 30.0}, 3.8, n=5000, **REF)
    gap = {key: rows[0][key] for key in ("task", "tokenizer", "data_hash", "method", "kind", "state", "length", "cell")}
    rows.append({**gap, "metric": "scores", "scorer": "t", "reason": "no network"})
    assert raised(rows) == {"ar": {"scorer-missing"}, "real": {"scorer-missing"}}


def test_lengths_are_not_compared(cell: Cell) -> None:
    """Entropy at length 128 is held against real text of length 128 only."""
    rows = [
        *cell("ar", {"s": 50.0}, 3.8, n=5000, length=64),
        *cell("real", {"s": 30.0}, 3.8, n=5000, length=64, **REF),
        *cell("ar", {"s": 45.0}, 4.3, n=5000, length=128),
    ]
    found = raised(rows)
    assert found["ar"] == {"mixed-length", "no-real"}
    assert found["real"] == {"mixed-length"}


def test_rows_that_are_not_done_are_left_alone(summary: pd.DataFrame) -> None:
    assert {flag.cell for flag in flags.find_flags(summary)}.isdisjoint({"f", "s"})
    assert flags.find_flags(schema.empty()) == []
    assert flags.find_flags(summary[summary["state"] != "done"]) == []


def test_values_that_are_missing_raise_nothing(cell: Cell) -> None:
    rows = cell("ar", {"s": 40.0}, 3.0, n=5000) + cell("real", {"s": 30.0}, 3.8, n=5000, **REF)
    for row in rows:
        if row["metric"] == "entropy_nats" and row["method"] == "real":
            row["value"] = row["low"] = row["high"] = None
    assert raised(rows) == {}


def test_flags_are_written_to_the_rows_they_concern(summary: pd.DataFrame) -> None:
    before = summary.copy()
    out = flags.with_flags(summary)
    pd.testing.assert_frame_equal(summary, before)
    mdlm = out[(out["method"] == "mdlm") & (out["steps"] == 8)].set_index(["metric", "scorer"])["flags"]
    assert "canary" in mdlm["gen_ppl/pooled", "smollm2"].split()
    assert "canary" not in mdlm["gen_ppl/pooled", "char-rnn"].split()
    assert "canary" not in mdlm["entropy_nats", ""].split()
    assert "entropy-high" in mdlm["entropy_nats", ""].split()
    assert (out.loc[out["state"] != "done", "flags"] == "").all()
    pd.testing.assert_frame_equal(flags.with_flags(out), out)


@pytest.mark.parametrize(
    ("names", "role", "expected"),
    [
        (["gen_ppl/sedd", "gen_ppl/pooled"], "perplexity", "gen_ppl/pooled"),
        (["gen_ppl/sedd", "gen_ppl/bd3"], "perplexity", "gen_ppl/bd3"),
        (["entropy_bits", "entropy_nats"], "entropy", "entropy_nats"),
        (["entropy_bits"], "entropy", None),
        (["mauve", "mauve_ceiling"], "mauve", "mauve"),
        (["mauve_ceiling"], "mauve", None),
        (["mauve", "mauve_ceiling"], "mauve ceiling", "mauve_ceiling"),
        (["longest_repeat"], "repetition", None),
        ([], "speed", None),
    ],
)
def test_roles(names: list[str], role: str, expected: str | None) -> None:
    assert pick(names, role) == expected


@pytest.mark.parametrize(("share", "code"), [(0.2, "memorised"), (0.012, None)])
def test_text_that_stands_in_the_training_text_is_flagged(cell: Cell, share: float, code: str | None) -> None:
    rows = cell("ar", {"s": 40.0}, 3.81, n=5000) + cell("real", {"s": 30.0}, 3.8, n=5000, **REF)
    for base in [row for row in rows if row["metric"] == "entropy_nats"]:
        value = share if base["method"] == "ar" else 0.01
        rows.append({**base, "metric": "memorised_13", "value": value, "low": value - 0.001, "high": value + 0.001})
    assert raised(rows).get("ar", set()) == ({code} if code else set())


def test_a_scorer_that_has_seen_the_text_is_flagged_at_the_real_row(cell: Cell) -> None:
    rows = cell("ar", {"s": 40.0}, 3.81, n=5000) + cell("real", {"s": 30.0}, 3.8, n=5000, **REF)
    assert raised(rows) == {}
    told = [{**row, "scorer_seen": "its corpus holds these speeches"} if row["scorer"] else row for row in rows]
    assert raised(told) == {"real": {"scorer-seen"}}
