"""Training seeds as a second level: found by variant or by name, t intervals over seeds, recipes as cells, verdicts."""

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
from tsdfm_bench.results.evidence import Evidence, EvidenceCell, Joined, load_evidence
from tsdfm_bench.results.recipes import Recipe, recipes, with_recipes, without_some
from tsdfm_bench.results.replicates import Replicates
from tsdfm_bench.results.seeds import (
    about_seeds,
    by_recipe,
    defaults,
    over_seeds,
    over_what,
    same_seeds,
    t_change,
    t_interval,
    widening,
)

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


def folder(root: Path, seeds: int, variants: bool = True, labelled: bool = False) -> Evidence:
    """Students and random picks of several training seeds, each a checkpoint of its own, and one teacher."""
    rows = cell("dfm", 80.0, "fff", steps=1024, calls=300.0)
    known = []
    for name, control, values in (("tsdfm-uniform", "none", STUDENTS), ("random", "random_pick", RANDOM)):
        for seed, ppl in enumerate(values[:seeds]):
            stem = name + (f"-s{seed}" if seed else "")
            weights = f"{'abc' if control == 'none' else 'def'}{seed}"
            label = f"tsdfm[checkpoint=runs/{stem}]" if labelled else "tsdfm"
            rows += cell("tsdfm", ppl, weights, checkpoint=f"runs/{stem}", label=label)
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


def test_controls_of_equal_cost_are_one_recipe_whatever_their_steps(tmp_path: Path) -> None:
    """How many steps a seed takes follows from what it is to equal; of other networks the steps are a setting."""
    found = folder(tmp_path, 3).cells
    for control, sizes in (("flop_matched", [1, 3, 3]), ("unshaped", [1, 1, 2, 3])):
        for cell, steps in zip((c for c in found if c.id.startswith("abc")), (396, 393, 396), strict=True):
            cell.variant |= {"control": control, "training_steps": steps}
        assert sorted(map(len, by_recipe(found))) == sizes


def test_controls_that_were_trained_for_another_time_control_nothing(tmp_path: Path) -> None:
    assert verdicts(folder(tmp_path, 3))["choice"].status != "not testable"
    known = json.loads((tmp_path / "variants.json").read_text())
    for variant in known["variants"]:
        variant["alike"] = variant["settings"]["control"] == "none"
    (tmp_path / "variants.json").write_text(json.dumps(known))
    verdict = verdicts(load_evidence(tmp_path))["choice"]
    assert verdict.status == "not testable"
    assert "no finished row for 'random'" in verdict.reason


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


@pytest.mark.parametrize("labelled", [False, True])
def test_variants_are_found_by_their_settings_though_labels_name_checkpoints(tmp_path: Path, labelled: bool) -> None:
    choice = verdicts(folder(tmp_path, 3, labelled=labelled))["choice"].instances[0]
    assert choice.value == pytest.approx(100 * (1 - math.prod(STUDENTS) ** (1 / 3) / math.prod(RANDOM) ** (1 / 3)))
    assert sorted(choice.cells["random"]) == ["def0", "def1", "def2"]


TIMES = """[[claims]]
id = "times"
title = "times"
value = "seconds(student)"
holds = "< 0.8"
[[claims]]
id = "counts"
title = "counts"
value = "calls(teacher) / calls(student)"
holds = ">= 10"
"""


def test_times_over_seeds_are_means_of_logarithms_with_an_interval(tmp_path: Path) -> None:
    """1, 1 and 4 sequences a second: what figures show, and not the mean of 1, 1 and 0.25 seconds."""
    rates = (1.0, 1.0, 4.0)
    rows: list[dict[str, Any]] = cell("dfm", 80.0, "fff", steps=1024, calls=300.0)
    for seed, rate in enumerate(rates):
        made = cell("tsdfm", 40.0, f"abc{seed}", checkpoint="x" + (f"-s{seed}" if seed else ""))
        speed = {"metric": "sequences_per_second", "scorer": "", "scorer_revision": "", "unit": "1/s", "value": rate}
        rows += [*made, {**made[0], **speed, "low": None, "high": None, "definition": "speed"}]
    schema.write_summary(tmp_path, schema.from_rows(rows))
    claims = CLAIMS.partition("[[claims]]")[0] + TIMES
    times, counts = (v.instances[0] for v in verify(load_evidence(tmp_path), parse_claims(claims)))
    expected = t_interval([1 / rate for rate in rates], "s")
    assert times.value == pytest.approx(expected.value) == pytest.approx(0.63, abs=0.001)
    assert times.low is not None
    assert times.high is not None
    assert times.low < 0.2
    assert times.high > 2.0
    assert times.status == "not separable"
    assert counts.status == "reproduced"
    for instance in (times, counts):
        assert "over 3 training seeds" in instance.reason
        assert "measured once" not in instance.reason


@pytest.mark.parametrize(("bound", "status"), [("< 12", "not separable"), ("< 25", "reproduced")])
def test_a_time_measured_once_may_be_off_by_two_beside_one_of_several_seeds(
    tmp_path: Path, bound: str, status: str
) -> None:
    """The teacher's 10 s were timed once; the students' three times, nearly equal, say nothing of that."""
    rows: list[dict[str, Any]] = []
    timed = [(cell("dfm", 80.0, "fff", steps=1024, calls=300.0), 0.1)]
    timed += [(cell("tsdfm", 40.0, f"abc{i}", checkpoint=f"x-s{i}"), r) for i, r in enumerate((1.0, 1.001, 0.999))]
    for made, rate in timed:
        speed = {"metric": "sequences_per_second", "scorer": "", "scorer_revision": "", "unit": "1/s", "value": rate}
        rows += [*made, {**made[0], **speed, "low": None, "high": None, "definition": "speed"}]
    schema.write_summary(tmp_path, schema.from_rows(rows))
    times = TIMES.replace("seconds(student)", "seconds(teacher) / seconds(student)").replace("< 0.8", bound)
    claims = parse_claims(CLAIMS.partition("[[claims]]")[0] + times)
    assert verify(load_evidence(tmp_path), claims, ["times"])[0].status == status


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


def test_names_tell_seeds_apart_in_one_folder_and_a_network_trained_again_is_no_second_seed(tmp_path: Path) -> None:
    cells = folder(tmp_path, 3, variants=False).cells

    def renamed(name: str, weights: str) -> EvidenceCell:
        about = {"checkpoint": name, "weights": weights, "cell": weights}
        return EvidenceCell([{**row, **about} for row in cells[1].rows.values()], None, {}, cells[1].replicates)

    elsewhere = renamed("other/tsdfm-uniform-s4", "w4")
    assert [[c.id for c in group] for group in by_recipe([*cells[1:4], elsewhere])] == [
        ["abc0", "abc1", "abc2"],
        ["w4"],
    ]
    again = renamed("runs/tsdfm-uniform", "w0")
    assert sorted(len(group) for group in by_recipe([*cells[1:4], again])) == [1, 1, 1, 1]
    many = [renamed(f"runs/tsdfm-uniform-s{seed}", f"w{seed}") for seed in (10, 2, 1)]
    assert [c.id for c in by_recipe([*many, cells[1]])[0]] == ["abc0", "w1", "w2", "w10"]


def test_one_network_under_two_names_counts_once_and_arguments_stay_apart(tmp_path: Path) -> None:
    evidence = folder(tmp_path, 3)

    def also(network: EvidenceCell, **about: Any) -> EvidenceCell:
        return EvidenceCell(
            [{**row, **about} for row in network.rows.values()], None, network.variant, evidence.replicates
        )

    twice = also(evidence.cells[2], cell="twice", label="tsdfm[checkpoint=runs/mine]", n=256)
    found = recipes([*evidence.cells, twice])
    assert [[c.id for c in cell.networks] for cell in found[1:]] == [
        ["abc0", "twice", "abc2"],
        ["def0", "def1", "def2"],
    ]
    assert [cell.id for cell in recipes([evidence.cells[0], also(evidence.cells[0], cell="x")])] == ["fff"]
    dice = [also(evidence.cells[0], method="dice", label=f"dice:{n}", weights="none", cell=f"d{n}") for n in (6, 20)]
    assert [[c.id for c in group] for group in by_recipe(dice)] == [["d6"], ["d20"]]


# ----------------------------------------------------------------------------------------------- the t interval itself


def test_only_perplexities_times_and_speeds_are_averaged_as_logarithms() -> None:
    entropies = (3.9, 3.7, 2.1)
    found = t_interval(entropies, "nats")
    assert found.value == pytest.approx(np.mean(entropies))
    assert (found.low, found.high) == pytest.approx(stats.t.interval(0.95, 2, found.value, stats.sem(entropies)))
    for unit in ("perplexity", "1/s", "s"):
        assert t_interval((1.0, 4.0), unit).value == pytest.approx(2.0)
    assert t_interval((0.0, 0.02), "1").value == pytest.approx(0.01)  # a zero changes no scale
    assert t_interval((0.0001, 0.02), "1").value == pytest.approx(0.01005)
    other = (3.8, 3.9, 3.85)
    difference, percent, p = t_change(entropies, other, "nats", paired=False)
    test = stats.ttest_ind(other, entropies, equal_var=False)
    assert (difference.low, difference.high) == pytest.approx(tuple(test.confidence_interval()))
    assert p == pytest.approx(test.pvalue)
    assert percent is not None
    assert percent.high == pytest.approx(100 * difference.high / np.mean(entropies))
    assert over_seeds(entropies, ("x", "y", "z"), 10, unit="nats")[0] == pytest.approx(np.mean(entropies))


@pytest.mark.filterwarnings("error")
def test_a_change_from_equal_values_warns_of_nothing_and_rounding_is_no_change() -> None:
    for one in ((4.0, 4.0, 4.0), (0.1, 0.1, 0.1)):
        difference, _, p = t_change(one, (4.1, 4.2, 4.5), "nats", paired=False)
        assert difference.low < difference.value < difference.high
        assert 0 < p < 1
    difference, percent, p = t_change((0.1, 0.1, 0.1), (0.1, 0.1), "1", paired=False)
    assert percent is not None
    assert (difference.value, percent.value, math.isnan(p)) == (0.0, 0.0, True)


def test_the_mean_over_seeds_has_the_t_interval_of_logarithms() -> None:
    found = t_interval(STUDENTS, "perplexity", n=384)
    logs = np.log(STUDENTS)
    assert found.value == pytest.approx(np.exp(logs.mean()))
    assert (found.low, found.high) == pytest.approx(np.exp(stats.t.interval(0.95, 2, logs.mean(), stats.sem(logs))))
    assert found.description == "95 % t over 3 training seeds (384 sequences)"
    signed = t_interval((-1.0, 0.5, 2.0), "nats")
    assert (signed.low, signed.high) == pytest.approx(stats.t.interval(0.95, 2, 0.5, stats.sem([-1.0, 0.5, 2.0])))
    assert t_interval((8.0, 8.0), "1").method == "constant"
    assert t_interval((1.0, 1e100), "perplexity").high == math.inf


@pytest.mark.parametrize("paired", [True, False])
def test_a_change_is_the_t_test_over_seeds_and_agrees_with_replicates(paired: bool) -> None:
    difference, percent, p = t_change(STUDENTS, RANDOM, "perplexity", paired=paired)
    one, two = np.log(STUDENTS), np.log(RANDOM)
    test = stats.ttest_rel(two, one) if paired else stats.ttest_ind(two, one, equal_var=False)
    assert p == pytest.approx(test.pvalue)
    assert percent is not None
    assert (percent.low, percent.high) == pytest.approx([100 * np.expm1(end) for end in test.confidence_interval()])
    means = [math.prod(values) ** (1 / 3) for values in (STUDENTS, RANDOM)]
    assert difference.value == pytest.approx(means[1] - means[0])
    assert (difference.low < 0 < difference.high) is (percent.low < 0 < percent.high) is (p > 0.05)
    names = (("a", "b", "c"), ("a", "b", "c") if paired else ("d", "e", "f"))

    def change(factor: float) -> np.ndarray:
        below, above = (over_seeds(v, n, 2000, factor) for v, n in zip((STUDENTS, RANDOM), names, strict=True))
        return np.log(above[1:] / below[1:])

    drawn = change(widening(change(1.0), dict.fromkeys(names)))
    ends = np.log1p(np.array([percent.low, percent.high]) / 100)
    assert np.quantile(drawn, [0.025, 0.975]) == pytest.approx(ends, abs=0.12 * np.ptp(ends))


def test_a_change_without_spread_or_of_any_sign() -> None:
    difference, percent, p = t_change((8.0, 8.0), (4.0, 4.0), "1", paired=False)
    assert (difference.value, difference.method) == (pytest.approx(-4.0), "constant")
    assert percent is not None
    assert percent.value == pytest.approx(-50.0)
    assert math.isnan(p)
    difference, percent, p = t_change((-1.0, 0.5, 2.0), (0.0, 2.0, 3.0), "nats", paired=True)
    assert percent is None
    assert difference.value == pytest.approx(7 / 6)
    assert p == pytest.approx(stats.ttest_rel((0.0, 2.0, 3.0), (-1.0, 0.5, 2.0)).pvalue)


@pytest.mark.parametrize("paired", [True, False])
def test_changes_over_three_seeds_cover_what_sequences_alone_miss(paired: bool) -> None:
    """Of 400 made-up pairs of runs, 95 % of the intervals over seeds hold the true change (here 12 % lower)."""
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(400):
        shared = rng.normal(0.0, 0.3, 3) if paired else 0.0
        a, b = (np.exp(level + shared + rng.normal(0.0, 0.1, 3)) for level in (4.0, 4.0 + math.log(0.88)))
        percent = t_change(a, b, "perplexity", paired=paired)[1]
        assert percent is not None
        hits += percent.low <= -12.0 <= percent.high
    assert 0.92 <= hits / 400 <= 0.99  # Welch's test of 3 and 3 is a little cautious


def test_networks_are_paired_by_weights_then_by_seed_or_not_at_all(tmp_path: Path) -> None:
    students, others = by_recipe(folder(tmp_path, 3).cells)[1:]
    assert [(a.id, b.id) for a, b in same_seeds(students, students[1:])] == [("abc1", "abc1"), ("abc2", "abc2")]
    assert [(a.id, b.id) for a, b in same_seeds(students, others)] == [(f"abc{i}", f"def{i}") for i in range(3)]
    assert same_seeds(students[:2], others[1:]) == []


def test_a_recipe_stands_for_its_own_method_and_text_only(tmp_path: Path) -> None:
    """Equal settings of another method, or of another text, where they are no default."""
    students = by_recipe(folder(tmp_path, 3).cells)[1]
    assert defaults(students) == students
    for name in ("method", "task"):
        other = EvidenceCell(
            [{**row, name: "other"} for row in students[1].rows.values()],
            None, {**students[1].variant, "default": False}, students[1].replicates,
        )  # fmt: skip
        assert other not in defaults([*students, other])


# ------------------------------------------------------------------------------------------------- a recipe as a cell


@pytest.mark.parametrize("variants", [True, False])
def test_a_recipe_is_one_cell_with_the_interval_over_seeds(tmp_path: Path, variants: bool) -> None:
    evidence = folder(tmp_path, 3, variants)
    teacher, students, random = recipes(evidence.cells)
    assert isinstance(students, Recipe)
    assert not isinstance(teacher, Recipe)
    row = students.rows["gen_ppl", "a"]
    expected = t_interval(STUDENTS, "perplexity")
    assert (row["value"], row["low"], row["high"]) == pytest.approx((expected.value, expected.low, expected.high))
    assert row["high"] / row["low"] > 3  # each network alone is known to half a percent
    assert (row["n"], row["interval"]) == (384, "95 % t over 3 training seeds (384 sequences)")
    assert [behind["cell"] for behind in students.behind("gen_ppl", "a")] == ["abc0", "abc1", "abc2"]
    value, replicates, how = students.value("gen_ppl", "a")
    assert (value, how) == (row["value"], "training seeds")
    assert np.quantile(replicates, [0.025, 0.975]) == pytest.approx((row["low"], row["high"]), rel=0.25)
    assert about_seeds(cell.networks for cell in (teacher, random))[0].startswith("Where a recipe has 3 training seeds")
    assert about_seeds([teacher.networks]) == []
    assert over_what([students.networks, random.networks]) == "over training seeds"
    assert over_what([teacher.networks]) == "over sequences"
    assert over_what([teacher.networks, students.networks]).endswith("training seeds where there are several")


def test_what_a_network_lacks_its_recipe_lacks_and_counts_stay_counts(tmp_path: Path) -> None:
    evidence = folder(tmp_path, 3)
    summary = evidence.summary()
    summary.loc[(summary["cell"] == "abc1") & (summary["metric"] == "gen_ppl"), ["value", "low", "high"]] = np.nan
    made, replicates = with_recipes(summary, Replicates(summary), evidence.variants)
    assert list(made["cell"].unique()) == ["fff", "abc0+abc1+abc2", "def0+def1+def2"]
    (ppl,) = made[(made["cell"] == "abc0+abc1+abc2") & (made["metric"] == "gen_ppl")].to_dict("records")
    assert math.isnan(ppl["value"])
    assert ppl["reason"] == "1 of 3 networks lack it"
    assert np.isnan(replicates.of("abc0+abc1+abc2", "gen_ppl", "a")).all()
    assert set(made["calls"]) == {300.0, 8.0}


def test_a_recipe_is_called_alike_at_every_setting_though_a_network_is_missing(tmp_path: Path) -> None:
    evidence = folder(tmp_path, 3)
    cells = [*evidence.cells]
    for steps, seeds in ((4, (1, 2)), (2, (2,))):
        for cell in evidence.cells[1:4]:
            if int(cell.id[-1]) in seeds:
                about = {"steps": steps, "cell": f"{cell.id}/{steps}"}
                rows = [{**row, **about} for row in cell.rows.values()]
                cells.append(EvidenceCell(rows, None, cell.variant, Replicates(schema.from_rows(rows))))
    found = [cell for cell in recipes(cells) if cell.first["checkpoint"] == "runs/tsdfm-uniform"]
    assert [len(cell.networks) for cell in found] == [3, 2, 1]
    assert len({tuple(cell.first[name] for name in ("label", "weights", "checkpoint")) for cell in found}) == 1
    assert found[2].rows["gen_ppl", "a"]["low"] == cells[3].rows["gen_ppl", "a"]["low"]
    assert found[2].value("gen_ppl", "a")[0] == STUDENTS[2]
    (made, replicates) = with_recipes(
        schema.from_rows(row for cell in cells for row in cell.rows.values()), Joined(cells), evidence.variants
    )
    assert len(set(made[made["checkpoint"] == "runs/tsdfm-uniform"]["weights"])) == 1
    assert replicates.behind("abc2/2", "gen_ppl", "a")[0]["checkpoint"] == "runs/tsdfm-uniform-s2"
    assert without_some(found) == [
        "tsdfm uniform 4 steps: 2 of 3 networks, without training seed 0.",
        "tsdfm uniform 2 steps: 1 of 3 networks, without training seed 0, 1.",
    ]


def test_a_recipe_has_as_many_replicates_as_its_networks(tmp_path: Path) -> None:
    evidence = folder(tmp_path, 3)
    summary = evidence.summary()
    _, made = with_recipes(summary, Replicates(summary, resamples=500, seed=7), evidence.variants)
    assert (made.resamples, made.seed) == (500, 7)
    assert made.of("abc0+abc1+abc2", "gen_ppl", "a").shape == made.of("fff", "gen_ppl", "a").shape == (500,)


def test_one_seed_of_each_leaves_a_summary_as_it_is(tmp_path: Path) -> None:
    evidence = folder(tmp_path, 1)
    summary, replicates = evidence.summary(), evidence.replicates
    made, same = with_recipes(summary, replicates, evidence.variants)
    assert made is summary
    assert same is replicates
