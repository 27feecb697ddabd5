"""Verdicts: bounds, guards, instances, and a formula language that evaluates nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tsdfm_bench.results import schema
from tsdfm_bench.results.claim_file import Bound, ClaimFileError, line_of, parse_claims
from tsdfm_bench.results.claims import Verdict, verify
from tsdfm_bench.results.evidence import Evidence, MixedEvidence, load_evidence
from tsdfm_bench.results.formula import FormulaError, NotOne, parse
from tsdfm_bench.results.store import StoreError

FILE = """format = 1
[rows.student]
method = "tsdfm"
steps = 8
[rows.teacher]
method = "dfm"
steps = 1024
[rows.any]
method = ["tsdfm", "dfm"]
steps = "any"

[[claims]]
id = "lower"
title = "lower"
value = "100 * (1 - ppl(student) / ppl(teacher))"
unit = "% lower"
holds = ">= 32"
"""


def cell(method: str, ppl: float, entropy: float = 3.9, *, half: float = 0.02, **settings: Any) -> list[dict[str, Any]]:
    """Rows of a cell; the interval of gen-PPL has a relative half-width `half`."""
    steps, source = settings.pop("steps", 8), settings.pop("source", "uniform")
    scorers = settings.pop("scorers", ("a",))
    extra = {"temperature": 1.0, "seed": 0, "flags": ""} | settings
    common = {
        "task": "t",
        "tokenizer": "k",
        "data_hash": "d",
        "method": method,
        "label": method,
        "kind": "method",
        "state": "done",
        "checkpoint": method,
        "weights": f"sha256:{method}",
        "source": source,
        "length": 64,
        "steps": steps,
        "draw": "fp64",
        "cell": f"{method}-{source}-{steps}-{extra['temperature']}-{extra['seed']}",
        "n": 128,
        "calls": float(steps),
        "interval": "95 %",
    } | extra
    rows = [
        common
        | {"metric": "gen_ppl", "scorer": scorer, "value": ppl, "low": ppl * (1 - half), "high": ppl * (1 + half)}
        | {"unit": "perplexity", "definition": "pooled", "scorer_revision": "r", "scorer_dtype": "float32"}
        for scorer in scorers
    ]
    ends = {"value": entropy, "low": entropy - 0.01, "high": entropy + 0.01}
    return [*rows, common | ends | {"metric": "entropy_nats", "unit": "nats", "definition": "entropy"}]


def evidence(tmp_path: Path, *cells: list[dict[str, Any]]) -> Evidence:
    schema.write_summary(tmp_path, schema.from_rows([row for rows in cells for row in rows]))
    return load_evidence(tmp_path)


def one(found: Evidence, extra: str = "") -> Verdict:
    return verify(found, parse_claims(FILE + extra))[0]


@pytest.mark.parametrize(
    ("ppl", "status"), [(50.0, "reproduced"), (90.0, "contradicted"), (67.9, "not separable"), (69.0, "not separable")]
)
def test_verdict_follows_the_interval(tmp_path: Path, ppl: float, status: str) -> None:
    verdict = one(evidence(tmp_path, cell("tsdfm", ppl), cell("dfm", 100.0, steps=1024)))
    assert verdict.status == status
    assert verdict.instances[0].value == pytest.approx(100 - ppl)
    assert (verdict.instances[0].n_needed is not None) == (status == "not separable")


def test_collapsed_rows_are_never_reproduced_at_face_value(tmp_path: Path) -> None:
    found = evidence(tmp_path, cell("tsdfm", 10.0, 2.0, flags="entropy-low"), cell("dfm", 100.0, steps=1024))
    verdict = one(found)
    assert verdict.status == "not testable"
    assert "entropy-low" in verdict.reason
    assert "at face value it would hold" in verdict.reason
    assert one(found, "collapse = []\n").status == "reproduced"


def test_a_failed_guard_does_not_hide_a_contradiction(tmp_path: Path) -> None:
    found = evidence(tmp_path, cell("tsdfm", 120.0, 2.0, flags="entropy-low"), cell("dfm", 100.0, steps=1024))
    assert one(found, 'guards = ["entropy(student) >= entropy(teacher)"]\n').status == "contradicted"


def test_guard_of_equal_entropy(tmp_path: Path) -> None:
    found = evidence(tmp_path, cell("tsdfm", 50.0, 3.0), cell("dfm", 100.0, 3.9, steps=1024))
    verdict = one(
        found, 'guards = [{ formula = "entropy(student) >= entropy(teacher) - 0.05", otherwise = "too low" }]\n'
    )
    assert verdict.status == "not testable"
    assert "too low (entropy of student 3.000, entropy of teacher 3.900)" in verdict.reason


def test_a_guard_also_holds_where_the_correction_takes_a_contradiction_back(tmp_path: Path) -> None:
    """29.8 % in four sources: contradicted alone, not so at the corrected level, and the guard fails either way."""
    sources = ("uniform", "mask", "c", "d")
    cells = [[cell("tsdfm", 70.2, 2.0, source=s), cell("dfm", 100.0, steps=1024, source=s)] for s in sources]
    found = evidence(tmp_path, *(rows for pair in cells for rows in pair))
    each = 'for_each = ["source"]\n'
    free = one(found, each)
    assert {instance.status for instance in free.instances} == {"not separable"}
    assert "not so at 98.75 %, corrected for 4 instances" in free.instances[0].reason
    guards = 'guards = [{ formula = "entropy(student) >= entropy(teacher)", otherwise = "too low" }]\n'
    guarded = one(found, each + guards)
    assert {instance.status for instance in guarded.instances} == {"not testable"}
    assert guarded.instances[0].reason.startswith("too low")
    assert "corrected for 4 instances" in guarded.instances[0].reason


def test_a_sampler_fed_the_true_law_is_no_generator(tmp_path: Path) -> None:
    """Unless a selection asks for it by its checkpoint."""
    found = evidence(
        tmp_path, cell("tsdfm", 50.0), cell("dfm", 10.0, steps=1024, checkpoint="oracle", weights="sha256:law")
    )
    assert "no finished row for 'teacher'" in one(found).reason
    asked = parse_claims(FILE.replace("steps = 1024", 'steps = 1024\ncheckpoint = "oracle"'))
    assert verify(found, asked)[0].status == "contradicted"


@pytest.mark.parametrize(("weights", "value"), [("sha256:tsdfm", 2.0), ("", None)])
def test_what_a_training_cost_is_known_by_its_weights(tmp_path: Path, weights: str, value: float | None) -> None:
    """A recipe's scale is not the name of the task that its network is judged on, but its weights are the row's."""
    about = {"scale": "base", "source": "uniform", "batch": 8, "settings": {}}
    costs = [
        {**about, "name": name, "method": name, "weights": weights and f"sha256:{name}", "seconds_per_step": [seconds]}
        for name, seconds in (("tsdfm", 2.0), ("dfm", 1.0))
    ]
    (tmp_path / "training_cost.json").write_text(json.dumps({"format": 1, "costs": costs}))
    found = evidence(tmp_path, cell("tsdfm", 50.0), cell("dfm", 100.0, steps=1024))
    text = FILE.replace(
        "100 * (1 - ppl(student) / ppl(teacher))", "training_seconds(student) / training_seconds(teacher)"
    )
    verdict = verify(found, parse_claims(text))[0]
    assert verdict.instances[0].value == value
    assert ("no training cost" in verdict.reason) == (value is None)


def test_every_source_must_hold_and_there_must_be_enough(tmp_path: Path) -> None:
    uniform = [cell("tsdfm", 50.0), cell("dfm", 100.0, steps=1024)]
    extra = 'for_each = ["source"]\nat_least = { source = 2 }\n'
    assert one(evidence(tmp_path / "a", *uniform), extra).status == "not testable"
    mask = [cell("tsdfm", 50.0, source="mask"), cell("dfm", 100.0, steps=1024, source="mask")]
    both = one(evidence(tmp_path / "b", *uniform, *mask), extra)
    assert (both.status, len(both.instances)) == ("reproduced", 2)
    bad = [cell("tsdfm", 99.0, source="mask"), cell("dfm", 100.0, steps=1024, source="mask")]
    assert one(evidence(tmp_path / "c", *uniform, *bad), extra).status == "contradicted"


def test_scorers_are_told_apart(tmp_path: Path) -> None:
    found = evidence(
        tmp_path, cell("tsdfm", 50.0, scorers=("a", "b")), cell("dfm", 100.0, steps=1024, scorers=("a", "b"))
    )
    verdict = one(found, "at_least = { scorer = 3 }\n")
    assert [instance.where["scorer"] for instance in verdict.instances] == ["a", "b"]
    assert "at least 3 scorers of one text, here are 2 (a, b)" in verdict.reason


def test_scorers_of_other_texts_do_not_add_up(tmp_path: Path) -> None:
    """One scorer on one text and two on another are no three evaluators."""
    found = evidence(
        tmp_path,
        cell("tsdfm", 50.0, scorers=("a",)),
        cell("dfm", 100.0, steps=1024, scorers=("a",)),
        cell("tsdfm", 50.0, scorers=("b", "c"), task="u", cell="u1"),
        cell("dfm", 100.0, steps=1024, scorers=("b", "c"), task="u", cell="u2"),
    )
    assert one(found, "at_least = { scorer = 3 }\n").status == "not testable"
    assert one(found, "at_least = { scorer = 2 }\n").status == "reproduced"


def test_a_guard_that_cannot_be_evaluated_stops_no_contradiction(tmp_path: Path) -> None:
    guard = 'guards = ["distinct(student) >= distinct(teacher)"]\n'
    for ppl, status in ((120.0, "contradicted"), (50.0, "not testable")):
        found = evidence(tmp_path, cell("tsdfm", ppl), cell("dfm", 100.0, steps=1024))
        verdict = one(found, guard)
        assert verdict.status == status
    assert "has no" in verdict.reason


def test_what_is_missing_beside_what_holds_is_said(tmp_path: Path) -> None:
    found = evidence(
        tmp_path,
        cell("tsdfm", 50.0),
        cell("tsdfm", 90.0, source="mask"),
        cell("dfm", 100.0, steps=1024),
    )
    verdict = one(found, 'for_each = ["source"]\n')
    assert verdict.status == "reproduced"
    assert "not judged: no finished row for 'teacher'" in verdict.reason
    assert "source mask" in verdict.reason


def test_seconds_of_different_machines_are_not_divided(tmp_path: Path) -> None:
    def rate(rows: list[dict[str, Any]], value: float) -> list[dict[str, Any]]:
        speed = {
            "metric": "sequences_per_second",
            "scorer": "",
            "value": value,
            "low": None,
            "high": None,
            "unit": "1/s",
        }
        speed |= {"scorer_revision": "", "scorer_dtype": "", "definition": "sequences per second"}
        return [*rows, {**rows[0], **speed}]

    text = FILE.replace("100 * (1 - ppl(student) / ppl(teacher))", "seconds(teacher) / seconds(student)")
    for device, status in (("cpu", "reproduced"), ("cuda", "not testable")):
        student = rate(cell("tsdfm", 50.0, device="cpu"), 1000.0)
        found = evidence(tmp_path, student, rate(cell("dfm", 100.0, steps=1024, device=device), 1.0))
        verdict = verify(found, parse_claims(text))[0]
        assert verdict.status == status, verdict.reason
    assert "different circumstances: cpu and cuda" in verdict.reason


def test_missing_rows_name_the_sweep(tmp_path: Path) -> None:
    verdict = one(evidence(tmp_path, cell("tsdfm", 50.0)), 'sweep = "x.toml"\n')
    assert verdict.status == "not testable"
    assert "'teacher' (method dfm, steps 1024)" in verdict.reason
    assert "run --config x.toml" in verdict.reason


def test_equal_entropy_is_read_off_the_curve_and_never_extrapolated(tmp_path: Path) -> None:
    points = [
        cell("tsdfm", math, h, temperature=t) for t, math, h in ((0.8, 20.0, 3.0), (1.0, 40.0, 3.6), (1.2, 80.0, 4.2))
    ]
    text = FILE.replace("[rows.any]\n", '[rows.curve]\nmethod = "tsdfm"\nsteps = 8\ntemperature = "any"\n[rows.any]\n')
    text = text.replace("ppl(student) / ppl", "ppl_at_entropy(curve, entropy(teacher)) / ppl")
    inside = evidence(tmp_path / "in", *points, cell("dfm", 100.0, 3.6, steps=1024))
    verdict = verify(inside, parse_claims(text))[0]
    assert verdict.instances[0].value == pytest.approx(60.0)
    outside = evidence(tmp_path / "out", *points, cell("dfm", 100.0, 4.5, steps=1024))
    verdict = verify(outside, parse_claims(text))[0]
    assert verdict.status == "not testable"
    assert "only 3.000 to 4.200 were measured" in verdict.reason


def test_several_rows_need_a_reduction(tmp_path: Path) -> None:
    found = evidence(tmp_path, cell("tsdfm", 50.0), cell("tsdfm", 52.0, seed=1), cell("dfm", 100.0, steps=1024))
    assert "use min, max, mean" in one(found).reason


def test_counts_are_exact(tmp_path: Path) -> None:
    found = evidence(tmp_path, cell("tsdfm", 50.0), cell("dfm", 100.0, steps=1024))
    text = FILE.replace("100 * (1 - ppl(student) / ppl(teacher))", "steps(teacher) / steps(student)")
    assert verify(found, parse_claims(text.replace(">= 32", ">= 128")))[0].status == "reproduced"
    assert verify(found, parse_claims(text.replace(">= 32", "> 128")))[0].status == "contradicted"
    assert verify(found, parse_claims(text.replace(">= 32", "between 128 and 128")))[0].status == "reproduced"


@pytest.mark.parametrize(("rate", "status"), [(1000.0, "reproduced"), (150.0, "not separable"), (20.0, "contradicted")])
def test_a_single_timing_needs_a_factor_of_two(tmp_path: Path, rate: float, status: str) -> None:
    def timed(rows: list[dict[str, Any]], speed: float) -> list[dict[str, Any]]:
        row = {**rows[0], "metric": "sequences_per_second", "scorer": "", "value": speed, "unit": "1/s"}
        row |= {"scorer_revision": "", "scorer_dtype": ""}
        return [*rows, {**row, "low": None, "high": None, "interval": "no interval", "definition": "speed"}]

    slow = timed(cell("dfm", 100.0, steps=1024), 1.0)
    found = evidence(tmp_path, timed(cell("tsdfm", 50.0), rate), slow)
    text = FILE.replace("100 * (1 - ppl(student) / ppl(teacher))", "seconds(teacher) / seconds(student)")
    verdict = verify(found, parse_claims(text.replace(">= 32", ">= 128")))[0]
    assert verdict.status == status
    assert "measured once" in verdict.reason


def test_the_range_of_mauve_over_its_k_means_seeds_is_no_interval(tmp_path: Path) -> None:
    def measured(rows: list[dict[str, Any]], value: float) -> list[dict[str, Any]]:
        ends = {"value": value, "low": value - 0.01, "high": value + 0.01, "interval": "the metric's own"}
        return [*rows, {**rows[0], **ends, "metric": "mauve", "unit": "1", "definition": "MAUVE", "better": "higher"}]

    found = evidence(tmp_path, measured(cell("tsdfm", 50.0), 0.9), measured(cell("dfm", 100.0, steps=1024), 0.5))
    for formula in ("mauve(student)", "mauve(student) / mauve(teacher)"):
        text = FILE.replace("100 * (1 - ppl(student) / ppl(teacher))", formula).replace(">= 32", "> 0.1")
        (instance,) = verify(found, parse_claims(text))[0].instances
        assert instance.status == "not testable"
        assert "without an interval: a value that it rests on has no interval" in instance.reason
        assert (instance.low, instance.high) == (None, None)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_not_tested(tmp_path: Path, value: float) -> None:
    rows = cell("tsdfm", 50.0)
    rows[0] |= {"value": value, "low": None, "high": None}
    verdict = one(evidence(tmp_path, rows, cell("dfm", 100.0, steps=1024)))
    assert verdict.status == "not testable"


def test_mixed_scorers_and_conventions_are_refused(tmp_path: Path) -> None:
    for i, change in enumerate(({"scorer_revision": "other"}, {"definition": "mean of sequences"})):
        rows = cell("dfm", 100.0, steps=1024)
        rows[0] |= change
        with pytest.raises(MixedEvidence, match="means two things"):
            evidence(tmp_path / str(i), cell("tsdfm", 50.0), rows)


def test_run_folders_are_put_together_and_emptiness_is_said(tmp_path: Path) -> None:
    for name, rows in (("a", cell("tsdfm", 50.0)), ("b", cell("dfm", 100.0, steps=1024))):
        schema.write_summary(tmp_path / name, schema.from_rows(rows))
    assert one(load_evidence(tmp_path)).status == "reproduced"
    (tmp_path / "empty").mkdir()
    with pytest.raises(StoreError, match=r"no summary\.parquet"):
        load_evidence(tmp_path / "empty")


# -------------------------------------------------------------------------------------------------- formulas


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')", "ppl.__class__", "ppl(student).real", "[1]", "lambda: 1", "1 if 1 else 2",
        "2 ** 9", "ppl(student) and 1", "f'{1}'", "student", "ppl(1)", "pppl(student)", "1 < 2 < 3", "metric(student)",
        "'a'", "True", "1" * 700, "-" * 100 + "1", "ppl(student, 3)", "min(1, 2)",
    ],
)  # fmt: skip
def test_nothing_but_the_language_is_read(text: str) -> None:
    with pytest.raises(FormulaError):
        parse(text, {"student": 1}, comparison=False)


def test_arithmetic_is_that_of_numbers() -> None:
    def none(*_: Any) -> np.ndarray:
        raise AssertionError

    assert parse("-(1 + 2) * 3 / 4 + sqrt(16) - abs(-2)").evaluate(none, none) == pytest.approx(-0.25)


def test_lists_are_reduced_on_purpose() -> None:
    def listed(*_: Any) -> np.ndarray:
        return np.array([[1.0, 1.5], [3.0, 3.5]])

    assert parse("max(ppl(a)) - count(ppl(a))").evaluate(listed, listed) == pytest.approx([1.0, 1.5])
    with pytest.raises(NotOne):
        parse("ppl(a) + 1").evaluate(listed, listed)


# -------------------------------------------------------------------------------------------------- the file


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        ("ppl(student)", "pppl(student)", 15, "did you mean ppl"),
        ("ppl(teacher)", "ppl(teachr)", 15, "did you mean teacher"),
        ('holds = ">= 32"', 'holds = "about 32"', 17, "is no bound"),
        ('holds = ">= 32"', 'hold = ">= 32"', 17, "did you mean holds"),
        ("steps = 1024", "step = 1024", 5, "did you mean steps"),
        ('title = "lower"', 'for_each = ["sources"]\ntitle = "lower"', 14, "did you mean source"),
        ("format = 1", "format = 2", 1, "1"),
    ],
)
def test_errors_name_line_and_key(old: str, new: str, line: int, message: str) -> None:
    with pytest.raises(ClaimFileError) as caught:
        parse_claims(FILE.replace(old, new, 1), "mine.toml")
    text = str(caught.value)
    assert "mine.toml, line" in text
    assert message in text
    if "hold = " not in new and "step = " not in new:
        assert f"line {line}," in text


def test_lines_of_keys() -> None:
    assert line_of(FILE, ("claims", 0, "holds")) == 17
    assert line_of(FILE, ("rows", "teacher", "steps")) == 7


@pytest.mark.parametrize("text", [">= x", "=> 3", "between 3 and 2", ">= inf", ""])
def test_bounds_that_are_none(text: str) -> None:
    with pytest.raises(ValueError):
        Bound(text)
