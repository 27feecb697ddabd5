"""Training seeds as a second level: found by variant or by name, t intervals over seeds, verdicts that say so."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from tsdfm_bench.results import schema
from tsdfm_bench.results.claim_file import parse_claims
from tsdfm_bench.results.claim_table import claims_table
from tsdfm_bench.results.claims import Verdict, verify
from tsdfm_bench.results.evidence import Evidence, load_evidence
from tsdfm_bench.results.seeds import by_recipe, over_seeds, widening

CLAIMS = """format = 1
[rows.student]
method = "tsdfm"
steps = 8
[rows.random]
method = "tsdfm"
steps = 8
variant = { control = "random_pick" }
[rows.teacher]
method = "dfm"
steps = 1024

[[claims]]
id = "level"
title = "level"
statement = "Below one hundred."
value = "ppl(student)"
holds = "< 100"
published = 50
[[claims]]
id = "lower"
title = "lower"
value = "100 * (1 - ppl(student) / ppl(teacher))"
unit = "% lower"
holds = "> 0"
[[claims]]
id = "choice"
title = "choice"
value = "100 * (1 - ppl(student) / mean(ppl(random)))"
holds = "> 0"
"""
STUDENTS, RANDOM = (40.0, 50.0, 62.5), (60.0, 66.0, 70.0)


def cell(method: str, ppl: float, weights: str, **settings: Any) -> list[dict[str, Any]]:
    """Rows of a cell whose own interval is narrow: seeds differ by far more."""
    common: dict[str, Any] = {
        "task": "t", "tokenizer": "k", "data_hash": "d", "method": method, "label": method, "kind": "method",
        "state": "done", "checkpoint": method, "weights": f"sha256:{weights:0>8}", "source": "uniform", "length": 64,
        "steps": 8, "draw": "fp64", "temperature": 1.0, "seed": 0, "cell": weights, "n": 128, "calls": 8.0,
        "interval": "95 %",
    }  # fmt: skip
    common |= settings
    numbers = (("gen_ppl", "a", ppl, 0.005 * ppl, "perplexity"), ("entropy_nats", "", 3.9, 0.01, "nats"))
    return [
        common | {"metric": metric, "scorer": scorer, "value": value, "low": value - half, "high": value + half}
        | {"unit": unit, "definition": metric, "scorer_revision": "r" if scorer else ""}
        for metric, scorer, value, half, unit in numbers
    ]  # fmt: skip


def folder(root: Path, seeds: int, variants: bool = True) -> Evidence:
    """Students and random picks of several training seeds, each a checkpoint of its own, and one teacher."""
    rows = cell("dfm", 80.0, "fff", steps=1024, calls=300.0)
    known = []
    for name, control, values in (("tsdfm-uniform", "none", STUDENTS), ("random", "random_pick", RANDOM)):
        for seed, ppl in enumerate(values[:seeds]):
            stem = name + (f"-s{seed}" if seed else "")
            weights = f"{'abc' if control == 'none' else 'def'}{seed}"
            rows += cell("tsdfm", ppl, weights, label=f"tsdfm[checkpoint=runs/{stem}]")
            known.append(
                {"name": stem, "weights": f"sha256:{weights:0>8}", "method": "tsdfm", "training_seed": seed}
                | {"settings": {"control": control, "K": 4}, "default": stem == "tsdfm-uniform"}
            )
    schema.write_summary(root, schema.from_rows(rows))
    if variants:
        (root / "variants.json").write_text(json.dumps({"format": 1, "variants": known}))
    return load_evidence(root)


def verdicts(evidence: Evidence) -> dict[str, Verdict]:
    return {verdict.id: verdict for verdict in verify(evidence, parse_claims(CLAIMS))}


@pytest.mark.parametrize("variants", [True, False])
def test_networks_of_one_recipe_are_one_row(tmp_path: Path, variants: bool) -> None:
    groups = by_recipe(folder(tmp_path, 3, variants).cells)
    assert sorted(len(group) for group in groups) == [1, 3, 3]
    assert [cell.id for cell in groups[1]] == ["abc0", "abc1", "abc2"]


def test_one_quantity_gets_the_t_interval_over_seeds(tmp_path: Path) -> None:
    (instance,) = verdicts(folder(tmp_path, 3))["level"].instances
    logs = np.log(STUDENTS)
    low, high = np.exp(stats.t.interval(0.95, 2, logs.mean(), stats.sem(logs)))
    assert instance.value == pytest.approx(np.exp(logs.mean()))
    assert instance.low == pytest.approx(low, rel=0.08)  # 2,000 replicates of a quantile
    assert instance.high == pytest.approx(high, rel=0.08)
    assert "3 training seeds" in instance.reason


def test_seeds_that_scatter_leave_a_claim_open_that_one_seed_would_settle(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "three").mkdir()
    assert verdicts(folder(tmp_path / "one", 1))["lower"].status == "reproduced"
    open_ = verdicts(folder(tmp_path / "three", 3))["lower"]
    assert open_.status == "not separable"
    assert open_.instances[0].n_needed is None
    assert "more training seeds would tell" in open_.reason


def test_variants_are_found_by_their_settings_though_labels_name_checkpoints(tmp_path: Path) -> None:
    choice = verdicts(folder(tmp_path, 3))["choice"].instances[0]
    assert choice.value == pytest.approx(100 * (1 - math.prod(STUDENTS) ** (1 / 3) / math.prod(RANDOM) ** (1 / 3)))
    assert sorted(choice.cells["random"]) == ["def0", "def1", "def2"]


def test_equal_networks_move_together() -> None:
    a, b = (over_seeds(values, ("x", "y", "z"), 500) for values in ((1.0, 2.0, 4.0), (2.0, 4.0, 8.0)))
    assert b / a == pytest.approx(np.full(501, 2.0))
    other = over_seeds((1.0, 2.0, 4.0), ("u", "v", "w"), 500)
    assert abs(np.corrcoef(np.log(a[1:]), np.log(other[1:]))[0, 1]) < 0.2
    assert widening(np.log(a[1:]), [("x", "y", "z")]) == pytest.approx(stats.t.ppf(0.975, 2) / 1.96, rel=0.02)
    assert widening(np.random.default_rng(0).normal(size=500), [("x", "y", "z")]) < 1.05


def test_the_table_of_claims_says_what_was_measured_published_and_at_which_entropy(tmp_path: Path) -> None:
    evidence, claims = folder(tmp_path, 3), parse_claims(CLAIMS)
    table = claims_table(verify(evidence, claims), claims, evidence)
    first, second = table.rows[:2]
    assert first.text("published") == "50"
    assert first.text("measured").startswith("50.0 [")
    assert second.text("entropy") == "student 3.90, teacher 3.90"
    assert second.text("verdict") == second.text("here") == "not separable"
    assert any("“Below one hundred”" in note and "ppl(student) < 100" in note for note in table.footnotes)
    nothing = claims_table(verify(evidence, claims, ["choice"]), claims, evidence)
    assert [row.text("claim") for row in nothing.rows] == ["choice"]
