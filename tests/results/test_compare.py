"""Two runs: equal ones are identical, real differences are found and named, what cannot be compared is not."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from typer.testing import CliRunner

from tsdfm_bench.cli import app
from tsdfm_bench.results import schema
from tsdfm_bench.results.columns import columns_path, terms, write_columns
from tsdfm_bench.results.compare import Change, compare_runs, comparison_json, comparison_table
from tsdfm_bench.results.evidence import run_cells
from tsdfm_bench.results.matching import matched, matched_recipes
from tsdfm_bench.results.render import to_csv, to_markdown
from tsdfm_bench.results.replicates import Replicates
from tsdfm_bench.results.stats import n_to_separate
from tsdfm_bench.results.training import Variant, Variants

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


def test_damaged_columns_are_said_and_the_intervals_of_the_summary_used(cell: Make, tmp_path: Path) -> None:
    a, b = (schema.from_rows(cell("dfm", {"s": ppl}, 3.8, steps=8)) for ppl in (50.0, 30.0))
    path = columns_path(tmp_path, "gen-ppl", a["cell"][0])
    path.parent.mkdir(parents=True)
    path.write_bytes(b"PK damaged")
    found = compare_runs(a, b, roots=(tmp_path, None), names=("a", "b"))
    alone = compare_runs(a, b, names=("a", "b"))
    assert repr(found.changes) == repr(alone.changes)
    (note,) = (note for note in found.notes if "cannot be read" in note)
    assert note.startswith(f"a: columns/gen-ppl/{path.name}")


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


MAUVE = "MAUVE against held-out real text, n = {n} each, scaling 5; settings {settings}"


def with_mauve(
    rows: list[dict[str, Any]], value: float, n: int = 256, settings: str = "fc4c673f"
) -> list[dict[str, Any]]:
    """The same with another MAUVE, which all seeds of k-means agree on."""
    about = {"value": value, "low": value - 0.001, "high": value + 0.001, "n": n, "better": "higher"}
    about["definition"] = MAUVE.format(n=n, settings=settings)
    return [row | (about if row["metric"] == "mauve" else {}) for row in rows]


def test_mauve_is_not_tested_by_the_range_of_its_k_means_seeds(cell: Make) -> None:
    rows = cell("dfm", {"s": 50.0}, 3.8, steps=8)
    found = compare_runs(*(schema.from_rows(with_mauve(rows, value)) for value in (0.6, 0.9)))
    (change,) = (change for change in found.changes if change.metric == "mauve")
    assert (change.verdict, math.isnan(change.pvalue), math.isnan(change.adjusted)) == ("changed", True, True)
    assert change.difference is not None
    assert change.percent is not None
    assert (change.difference.method, change.difference.value) == ("none", pytest.approx(0.3))
    assert change.percent.value == pytest.approx(50.0)
    assert "MAUVE of single networks has no test" in " ".join(comparison_table(found).footnotes)
    same = changes(with_mauve(rows, 0.6), with_mauve(rows, 0.6))
    assert same["dfm, 8 steps", "mauve"].verdict == "identical"


@pytest.mark.parametrize(
    ("other", "reason"),
    [({"n": 512}, "n differs: 256 and 512"), ({"settings": "0a1b2c3d"}, "settings differ: fc4c673f and 0a1b2c3d")],
)
def test_mauves_of_other_n_or_settings_are_listed_not_subtracted(
    cell: Make, other: dict[str, Any], reason: str
) -> None:
    rows = cell("dfm", {"s": 50.0}, 3.8, steps=8)
    change = changes(with_mauve(rows, 0.6), with_mauve(rows, 0.9, **other))["dfm, 8 steps", "mauve"]
    assert (change.verdict, change.reason, change.difference) == ("not compared", reason, None)


def test_mauve_over_training_seeds_is_tested_at_equal_n_and_settings(cell: Make) -> None:
    def trained(run: str, values: Sequence[float], **last: Any) -> list[dict[str, Any]]:
        made = [networks(cell, SEEDS[: len(values)], run)[7 * i : 7 * i + 7] for i in range(len(values))]
        given = [{}] * (len(values) - 1) + [last]
        return [
            row
            for rows, value, about in zip(made, values, given, strict=True)
            for row in with_mauve(rows, value, **about)
        ]

    def over(b: list[dict[str, Any]]) -> Change:
        found = compare_runs(schema.from_rows(trained("a", (0.5, 0.52, 0.54))), schema.from_rows(b)).changes
        (change,) = (change for change in found if change.seeds is not None and change.metric == "mauve")
        return change

    assert over(trained("b", (0.7, 0.73))).verdict == "better"  # 3 x 256 and 2 x 256 sequences: n is that of a network
    assert over(trained("b", (0.7, 0.73, 0.74), n=512)).reason == "n differs: 256 and 512"


def test_sequences_needed_are_those_for_the_level_that_holm_asks_for(cell: Make) -> None:
    """z = 2.95 among 20: too little for Holm, though it would do for one comparison alone."""
    a, b = [], []
    for i in range(20):
        about = {"steps": i + 1, "n": 128}
        a += cell("dfm", {"s": 50.0}, 3.8, **about)
        b += cell("dfm", {"s": 50.01 if i else 53.3}, 3.8, **about)
    change = changes(a, b, metrics=["gen_ppl/pooled"])["dfm, 1 steps", "gen_ppl/pooled"]
    assert change.pvalue < 0.005
    assert change.verdict == "not separable"
    assert change.difference is not None
    assert n_to_separate(change.difference) in range(128)
    assert change.needed == n_to_separate(change.difference, confidence=1 - 0.05 / 20)
    assert change.needed > 128


def stored(root: Path, cell: Make, shift: Sequence[float], **settings: Any) -> list[dict[str, Any]]:
    """Rows with per-sequence columns: one loss a sequence, moved by `shift`; two in a row share a prompt."""
    n = len(shift)
    values = terms("mean", (np.random.default_rng(0).gamma(4.0, 1.0, n) + np.asarray(shift),))
    rows = cell("dfm", {"s": float(values.value())}, 3.8, steps=8, n=n, **settings)
    clusters = np.arange(n) // 2 if settings.get("prefix") else None
    root.mkdir()
    write_columns(columns_path(root, "gen-ppl", rows[0]["cell"]), [("gen_ppl/pooled", "s", values)], clusters)
    return rows


def test_no_number_of_sequences_is_called_needed_that_is_there_already(cell: Make, tmp_path: Path) -> None:
    """Four pairs that all moved alike: no permutation of so few can be rare, whatever a normal law says."""
    roots = (tmp_path / "a", tmp_path / "b")
    runs = [stored(root, cell, shift) for root, shift in zip(roots, ([0.0] * 4, [1.0, 1.01, 0.99, 1.0]), strict=True)]
    change = changes(*runs, roots=roots)["dfm, 8 steps", "gen_ppl/pooled"]
    assert (change.verdict, change.needed) == ("not separable", None)


def test_a_large_difference_is_told_among_any_number_of_others(cell: Make, tmp_path: Path) -> None:
    """Ten thousand permutations alone could not: Holm's factor times 1 in 10,000 is over 0.05 from 500 numbers on."""
    roots = tmp_path / "a", tmp_path / "b"
    rows = [stored(root, cell, shift) for root, shift in zip(roots, ([0.0] * 40, [5.0] * 40), strict=True)]
    frames = [schema.from_rows(each) for each in rows]
    found = compare_runs(*frames, roots=roots)
    (change,) = [change for change in found.changes if math.isfinite(change.pvalue)]
    assert change.pvalue < 1e-6


def test_difference_and_percent_say_alike_what_they_are_over(cell: Make, tmp_path: Path) -> None:
    roots = (tmp_path / "a", tmp_path / "b")
    shifts = (np.zeros(64), np.random.default_rng(1).normal(0.5, 0.1, 64))
    runs = [stored(root, cell, shift, prefix="held-out 8") for root, shift in zip(roots, shifts, strict=True)]
    change = changes(*runs, roots=roots)["dfm, 8 steps", "gen_ppl/pooled"]
    assert change.difference is not None
    assert change.percent is not None
    for found in (change.difference, change.percent):
        assert "over 32 prompts (64 sequences)" in found.description
    assert change.percent.low < change.percent.value < change.percent.high


def test_other_weights_are_matched_by_their_settings_and_said(cell: Make) -> None:
    a = cell("dfm", {"s": 50.0}, 3.8, steps=8, cell="one", weights="sha256:1")
    b = cell("dfm", {"s": 50.0}, 3.8, steps=8, cell="two", weights="sha256:2")
    found = compare_runs(schema.from_rows(a), schema.from_rows(b))
    assert found.changes
    assert "other weights in the second run" in " ".join(found.notes)
    assert {change.verdict for change in found.changes if change.metric == "gen_ppl/pooled"} == {"not separable"}


def test_cells_are_not_matched_by_settings_that_another_pair_has_too(cell: Make) -> None:
    """Sampling seeds 0 and 1 against 0 and 2: seed 1 is not what the second run has as seed 2."""
    shared = cell("dfm", {"s": 50.0}, 3.8, steps=8, cell="zero")
    one, two = (cell("dfm", {"s": 50.0}, 3.8, steps=8, cell=name, seed=seed) for name, seed in (("one", 1), ("two", 2)))
    found = compare_runs(schema.from_rows([*shared, *one]), schema.from_rows([*shared, *two]))
    assert len(found.only_a) == len(found.only_b) == 1
    assert not any("in the second run" in note for note in found.notes)


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


# ------------------------------------------------------------------------------------------------- over training seeds

SEEDS = (40.0, 50.0, 62.5)


def networks(cell: Make, values: Sequence[float], run: str = "", **settings: Any) -> list[dict[str, Any]]:
    """One recipe with a training seed per value, each known to a hundredth."""
    made: list[dict[str, Any]] = []
    for seed, ppl in enumerate(values):
        name = "runs/x" + (f"-s{seed}" if seed else "")
        about = {"checkpoint": name, "cell": f"{run}{seed}", "weights": f"sha256:{run}{seed}"}
        made += cell("dfm", {"s": ppl}, 3.8, steps=8, width=0.005, **{**about, **settings})
    return made


def labelled(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same with labels that tell the networks apart, so that each has a row of its own."""
    return [row | {"label": f"dfm[checkpoint={row['checkpoint']}]"} for row in rows]


def over_seeds(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> Change:
    """The row over seeds of perplexity."""
    found = compare_runs(schema.from_rows(a), schema.from_rows(b)).changes
    (change,) = (change for change in found if change.seeds is not None and change.metric == "gen_ppl/pooled")
    return change


def test_seeds_that_scatter_do_not_separate_recipes_whose_networks_are_apart(cell: Make) -> None:
    a, b = networks(cell, SEEDS, "a"), networks(cell, (46.0, 42.0, 60.0), "b")
    single = [c for c in changes(labelled(a), labelled(b)).values() if c.seeds is None and c.metric == "gen_ppl/pooled"]
    assert len(single) == 2  # the row over seeds has the name of the first
    assert {change.verdict for change in single} <= {"better", "worse", "lower", "higher"}
    change = over_seeds(a, b)
    assert (change.seeds, change.paired, change.verdict) == ((3, 3), True, "not separable")
    assert change.needed is None  # sequences would not tell
    ratio = np.log([46.0, 42.0, 60.0]) - np.log(SEEDS)
    low, high = stats.t.interval(0.95, 2, ratio.mean(), stats.sem(ratio))
    assert change.percent is not None
    assert (change.percent.low, change.percent.high) == pytest.approx((100 * np.expm1(low), 100 * np.expm1(high)))
    assert (change.a["value"], change.b["value"]) == pytest.approx((50.0, (46 * 42 * 60) ** (1 / 3)))


def test_a_change_that_every_seed_makes_is_found_by_pairing_them(cell: Make) -> None:
    after = tuple(value * factor for value, factor in zip(SEEDS, (0.899, 0.9, 0.901), strict=True))
    assert over_seeds(networks(cell, SEEDS, "a"), networks(cell, after, "b")).verdict in ("better", "lower")
    other = [row | {"checkpoint": row["checkpoint"].replace("-s2", "-s7")} for row in networks(cell, after, "b")]
    apart = over_seeds(networks(cell, SEEDS, "a"), other)  # seeds 0, 1 and 7: two independent sets
    assert (apart.paired, apart.verdict) == (False, "not separable")


def test_rows_over_seeds_are_a_family_of_their_own(cell: Make) -> None:
    a, b = networks(cell, SEEDS, "a"), networks(cell, (46.0, 42.0, 60.0), "b")
    a, b = labelled(a), labelled(b)
    with_seeds = compare_runs(schema.from_rows(a), schema.from_rows(b)).changes
    unnamed = [[row | {"label": f"dfm[x={row['cell'][-1]}]"} for row in rows] for rows in (a, b)]
    without = compare_runs(*map(schema.from_rows, unnamed)).changes
    assert not any(change.seeds for change in without)
    family = [change for change in with_seeds if change.seeds is None]
    assert [c.adjusted for c in family] == pytest.approx([c.adjusted for c in without], nan_ok=True)


def test_the_same_networks_in_both_runs_are_identical_over_seeds_too(cell: Make) -> None:
    change = over_seeds(networks(cell, SEEDS), networks(cell, SEEDS[:2]))
    assert (change.seeds, change.paired, change.verdict) == ((2, 2), True, "identical")
    assert change.difference is not None
    assert change.difference.description.startswith("95 % constant over 2 training seeds")


def test_retrained_networks_are_compared_as_recipes_and_not_called_missing(cell: Make) -> None:
    a, b = (networks(cell, SEEDS, run, label="dfm") for run in "ab")
    variants = Variants(
        variants=[
            Variant(name="dfm", weights=f"sha256:{run}{seed:0>7}", method="dfm", training_seed=seed)
            for run in "ab" for seed in range(3)
        ]
    )  # fmt: skip
    for row in (*a, *b):
        row["weights"] = f"sha256:{row['weights'][7]}{row['weights'][8:]:0>7}"
    first, second = (run_cells(schema.from_rows(rows), Replicates(schema.from_rows(rows)), variants) for rows in (a, b))
    pairs, notes = matched_recipes(first, second)
    ((one, two, paired),) = pairs
    assert (len(one.networks), len(two.networks), paired, notes) == (3, 3, True, [])
    covered = {cell.id for recipe in (one, two) for cell in recipe.networks}
    assert matched(first, second, covered) == ([], [], [], [])
    assert matched(first, second) == ([], ["dfm, 8 steps (3 cells)"], ["dfm, 8 steps (3 cells)"], [])
    assert "one network only: dfm, 8 steps (3 and 1)" in matched_recipes(first, second[:1])[1][0]


def test_recipes_are_compared_over_other_sampling_seeds_where_that_leaves_no_choice(cell: Make) -> None:
    a, b = networks(cell, SEEDS, "a"), networks(cell, (46.0, 42.0, 60.0), "b", seed=1)
    found = compare_runs(schema.from_rows(a), schema.from_rows(b))
    assert [change.seeds for change in found.changes if change.metric == "gen_ppl/pooled"] == [(3, 3)]
    assert (found.only_a, found.only_b) == ([], [])
    assert "Compared over training seeds though the sampling seed differs: dfm (x), 8 steps." in found.notes
    more = [*b, *networks(cell, SEEDS, "c", seed=2)]
    assert not any(c.seeds for c in compare_runs(schema.from_rows(a), schema.from_rows(more)).changes)


def test_recipes_with_one_network_only_are_told_apart_and_their_settings_folded(cell: Make) -> None:
    rows: list[dict[str, Any]] = []
    for name in ("x", "random"):
        for steps in (4, 8):
            made = [row | {"steps": steps} for row in networks(cell, SEEDS, f"{name}{steps}")]
            rows += [
                row | {"checkpoint": row["checkpoint"].replace("x", name), "weights": name + row["weights"][-1]}
                for row in made
            ]
    one = [row for row in rows if not row["checkpoint"].endswith(("-s1", "-s2"))]
    (note,) = (n for n in compare_runs(schema.from_rows(rows), schema.from_rows(one)).notes if "one network" in n)
    assert note.endswith(": dfm (x), 4 steps and 8 steps; dfm (random), 4 steps and 8 steps (3 and 1).")


def test_every_form_of_a_comparison_marks_rows_over_seeds(cell: Make) -> None:
    a, b = (labelled(networks(cell, v, run)) for v, run in ((SEEDS, "a"), ((46.0, 42.0, 60.0), "b")))
    found = compare_runs(schema.from_rows(a), schema.from_rows(b))
    said = comparison_json(found)
    json.dumps(said, allow_nan=False)
    rows = [change for change in said["changes"] if change["training_seeds"]]
    assert rows[0]["cells"] == ["a0+a1+a2", "b0+b1+b2"]
    assert rows[0]["training_seeds"] == [3, 3]
    assert "t over 3 training seeds" in rows[0]["difference"]["how"]
    assert sum(said["verdicts_over_seeds"].values()) == len(rows)
    table = comparison_table(found)
    assert table.rows[0].section == "seeds"
    assert table.rows[0].text("cell") == "dfm[checkpoint=runs/x], 8 steps, 3 seeds"
    assert to_csv(table).splitlines()[1].startswith('seeds,"dfm[checkpoint=runs/x], 8 steps, 3 seeds"')
    assert "\n| *over training seeds* |" in to_markdown(table)
    assert "\n| *generators* |" in to_markdown(table)
    assert any(note.startswith("Over training seeds: ") for note in table.footnotes)
