"""A made-up summary with every kind of row: generators, references, a skipped and a failed cell."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest

from tsdfm_bench.results import schema

SCORERS = {"char-rnn": "char-RNN, 0.46 M parameters", "smollm2": "SmolLM2-135M-Instruct, Q4_1 GGUF"}
DEFINITIONS = {
    "gen_ppl/pooled": ("perplexity", "exp of summed NLL over summed units, text re-scored"),
    "bits_per_byte": ("bits/byte", "summed NLL in bits over UTF-8 bytes"),
    "entropy_nats": ("nats", "unigram entropy of each sequence's own tokens, averaged"),
    "distinct_2": ("1", "distinct bigrams over bigrams, per sequence, averaged"),
    "repetition_4": ("1", "share of 4-grams seen before in the sequence, averaged"),
    "mauve": ("1", "MAUVE on mean-pooled smollm2 features, mean of 3 k-means seeds"),
    "sequences_per_second": ("1/s", "sequences over seconds of sampling"),
}


def make_cell(
    name: str, ppl: dict[str, float], entropy: float, *, n: int = 256, width: float = 0.03, **settings: Any
) -> list[dict[str, Any]]:
    """Rows of one finished cell; `ppl` by scorer, intervals of relative half-width `width`."""
    common = {
        "task": "sotu",
        "tokenizer": "bpe@1",
        "data_hash": "sha256:d",
        "method": name,
        "label": name,
        "kind": "method",
        "state": "done",
        "length": 64,
        "seed": 0,
        "cell": "-".join([name, *(str(settings.get(k, "")) for k in ("source", "steps", "length", "draw"))]),
        "draw": "fp64",
        "temperature": 1.0,
        "checkpoint": f"sotu/{name}",
        "n": n,
    } | settings
    if common["kind"] == "reference":
        common |= {"draw": "", "temperature": None, "checkpoint": "none"}
    common["label"] = settings.get("label", common["method"])
    values = {("entropy_nats", ""): entropy, ("distinct_2", ""): 0.95, ("repetition_4", ""): 0.02, ("mauve", ""): 0.7}
    if common["kind"] == "method":
        values["sequences_per_second", ""] = 41.3
    for scorer, value in ppl.items():
        values["gen_ppl/pooled", scorer] = value
        values["bits_per_byte", scorer] = value / 20
    rows = []
    for (metric, scorer), value in values.items():
        unit, definition = DEFINITIONS[metric]
        half = {"entropy_nats": 0.01, "mauve": 0.05}.get(metric, width * value)
        rows.append(
            common
            | {"metric": metric, "scorer": scorer, "value": value, "unit": unit, "definition": definition}
            | {"low": value - half, "high": value + half, "scorer_title": SCORERS.get(scorer, ""), "interval": "95 %"}
            | {"scorer_dtype": "float32" if scorer else ""}
        )
    return rows


def make_rows() -> list[dict[str, Any]]:
    """Rows of the whole summary."""
    reference: dict[str, Any] = {"kind": "reference"}
    undone = {"task": "sotu", "kind": "method", "length": 64, "source": "mask", "steps": 8, "checkpoint": "none"}
    out = [
        *make_cell(
            "tsdfm", {"char-rnn": 4.87, "smollm2": 61.3}, 3.81, source="uniform", steps=8, calls=8, sequence_calls=8
        ),
        *make_cell("mdlm", {"char-rnn": 5.9, "smollm2": 154.2}, 3.9, source="mask", steps=8, calls=8, sequence_calls=8),
        *make_cell(
            "mdlm", {"char-rnn": 4.7, "smollm2": 74.1}, 3.83, source="mask", steps=1024, calls=64, sequence_calls=61.2
        ),
        *make_cell("ar", {"char-rnn": 4.4, "smollm2": 22.9}, 3.4, steps=None, calls=64, sequence_calls=64),
        *make_cell("bigram", {"char-rnn": 6.6, "smollm2": 131.0}, 3.84, **reference),
        *make_cell("real", {"char-rnn": 4.1, "smollm2": 31.7}, 3.82, **reference),
        *make_cell("loop", {"char-rnn": 2.2, "smollm2": 2.9}, 1.1, **reference),
    ]
    out.append(
        undone | {"method": "sedd", "label": "sedd", "state": "failed", "cell": "f", "reason": "RuntimeError: boom"}
    )
    out.append(undone | {"method": "ar", "label": "ar", "state": "skipped", "cell": "s", "reason": "no source [mask]"})
    return out


@pytest.fixture(scope="session")
def cell() -> Callable[..., list[dict[str, Any]]]:
    """Makes the rows of one finished cell."""
    return make_cell


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    """Rows of a whole summary."""
    return make_rows()


@pytest.fixture
def summary(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """The validated summary."""
    return schema.from_rows(rows)
