"""`tsdfm-bench run` over the fakes: what is stored, what is done twice (nothing), and what a failure leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from tsdfm_bench.results.store import RunFolder, read_json, read_scores, write_scores
from tsdfm_bench.rng import Streams

if TYPE_CHECKING:
    from conftest import Here


def expected_tokens(cell: str, n: int) -> np.ndarray:
    """What the fake method draws: floor(16 u)."""
    u = Streams.of(0, cell, n).uniform("token", 0, 12)
    return (u * 16).floor().numpy()


def test_a_run_stores_exactly_what_the_streams_say(here: Here) -> None:
    result = here.run()
    assert result.exit_code == 0, result.stderr
    (cell,) = here.cells(kind="method")
    assert here.out.completed_batches(cell) == [0, 1, 2]
    assert np.array_equal(here.tokens(cell), expected_tokens(cell, 24))
    assert here.out.state(cell, 3).state == "done"
    for name in ("summary.csv", "summary.parquet", "plan.json", "provenance.json"):
        assert (here.out.root / name).is_file()
    assert {path.suffix for path in here.out.tables_folder.iterdir()} == {".md", ".csv", ".tex", ".json"}
    assert "Results: out" in result.stdout


def test_the_summary_has_what_a_reader_needs(here: Here) -> None:
    here.run(methods="counter,stepless", steps="2,4")
    summary = here.summary()
    rows = summary[(summary["kind"] == "method") & (summary["metric"] == "gen_ppl/pooled")]
    assert list(rows["steps"].fillna(0)) == [2, 4, 0]
    assert (rows["n"] == 24).all()
    assert (rows["low"] <= rows["value"]).all()
    assert (rows["value"] <= rows["high"]).all()
    assert set(rows["scorer_title"]) == {"Toy scorer"}
    assert set(summary[summary["kind"] == "reference"]["method"]) == {"real", "unigram", "loop"}
    assert not (summary["label"] == "real (other half)").any()


def test_calls_are_counted_and_the_warm_up_is_not(here: Here) -> None:
    """The fake calls its network once per step, with half of the batch in every second step."""
    here.run(steps="5")
    assert [event for event in here.events() if event.startswith(("load u", "sample"))] == [
        "load uniform",
        "sample 0 x8 steps 2",  # warm-up
        "sample 0 x8 steps 5",
        "sample 8 x8 steps 5",
        "sample 16 x8 steps 5",
    ]
    row = here.summary().query("kind == 'method'").iloc[0]
    assert row["calls"] == 5
    assert row["sequence_calls"] == pytest.approx(3 * 1 + 2 * 0.5)
    (cell,) = here.cells(kind="method")
    costs = read_json(here.out.cost_path(cell))["batches"]
    assert isinstance(costs, dict)
    assert list(costs) == ["0", "1", "2"]
    assert all(cost["seconds"] > 0 and cost["peak_memory_bytes"] > 0 for cost in costs.values())


def test_the_same_command_again_computes_nothing(here: Here) -> None:
    first = here.run(methods="counter,stepless", steps="2,13", sources="uniform,mask,unigram")
    assert first.exit_code == 0
    assert here.events()
    stored = {path: path.read_bytes() for path in here.out.root.rglob("*.npz")}
    summary = here.out.summary_csv_path.read_bytes()
    again = here.run(methods="counter,stepless", steps="2,13", sources="uniform,mask,unigram")
    assert again.exit_code == 0
    assert here.events() == []
    assert {path: path.read_bytes() for path in here.out.root.rglob("*.npz")} == stored
    assert here.out.summary_csv_path.read_bytes() == summary
    assert again.stdout == first.stdout


def test_more_samples_extend_every_cell(here: Here) -> None:
    here.run(samples="16")
    (cell,) = here.cells(kind="method")
    before = here.tokens(cell)
    here.events()
    assert here.run(samples="40").exit_code == 0
    events = here.events()
    assert [event for event in events if event.startswith("sample")] == [
        "sample 0 x8 steps 2",  # warm-up
        "sample 16 x8 steps 2",
        "sample 24 x8 steps 2",
        "sample 32 x8 steps 2",
    ]
    assert events.count("score 8") == 3 * 4  # new batches only; without features the hidden half is not scored
    assert np.array_equal(here.tokens(cell)[:16], before)
    assert np.array_equal(here.tokens(cell), expected_tokens(cell, 40))
    assert set(here.summary()["n"].dropna()) == {40}
    for scored in here.out.scored("toy"):
        assert len(read_scores(here.out.scores_path("toy", scored)).nll) == 40


def test_fewer_samples_use_the_first_ones(here: Here) -> None:
    here.run(samples="24")
    here.events()
    assert here.run(samples="10").exit_code == 0
    assert set(here.events()) == {"compute letters"}
    assert set(here.summary()["n"].dropna()) == {10}


def test_a_folder_keeps_its_batch_size(here: Here) -> None:
    here.run(samples="4", batch_size=None)
    (cell,) = here.cells(kind="method")
    assert here.run(samples="8", batch_size=None).exit_code == 0
    assert here.out.completed_batches(cell) == [0, 1]
    refused = here.run(samples="8", batch_size="8")
    assert refused.exit_code == 2
    assert "batch-size: there 4, asked for 8" in refused.stderr


def test_another_scorer_never_samples_again(here: Here) -> None:
    here.run()
    here.events()
    assert here.run(scorers="toy,toy[revision=2]").exit_code == 0
    events = here.events()
    assert not [event for event in events if event.startswith(("sample", "load uniform"))]
    assert events.count("load toy") == 1
    assert set(here.summary()["scorer"]) == {"", "toy", "toy[revision=2]"}


def test_scores_of_another_revision_are_made_again(here: Here, tmp_path: Path) -> None:
    here.run()
    newer = tmp_path / "newer.py"
    newer.write_text(Path(__file__).with_name("fakes.py").read_text().replace('"revision", "1"', '"revision", "9"'))
    here.events()
    assert here.run(plugin=str(newer)).exit_code == 0
    assert here.events().count("score 8") == 3 * 4
    assert set(here.summary()["scorer_revision"]) == {"", "9"}


def test_recorded_scores_of_references_are_taken_over(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only those of equal texts by an equal scorer, never a generator's; the table says so; they can be refused."""
    here.run()
    monkeypatch.setattr("tsdfm_bench.scoring.RECORDED", here.folder / "out")
    here.events()
    assert here.run(out="second", samples="32").exit_code == 0
    assert here.events().count("score 8") == 4 + 3  # the generator's four batches, and one new batch of each reference
    second = RunFolder(here.folder / "second")
    judged = [cell for cell in here.cells(kind="reference") if here.out.scores_path("toy", cell).exists()]
    assert len(judged) == 3
    for cell in judged:
        ours, theirs = (read_scores(out.scores_path("toy", cell)) for out in (second, here.out))
        assert all(np.array_equal(a, b) for a, b in zip(ours.nll[:24], theirs.nll, strict=True))
    here.run(out="third")
    assert "Scores by toy of reference rows are the recorded ones" in (
        here.folder / "third" / "tables" / "main.md"
    ).read_text(encoding="utf-8")
    here.events()
    here.run(out="fourth", scorers="toy[revision=2]")
    assert here.events().count("score 8") == 4 * 3
    monkeypatch.setenv("TSDFM_BENCH_RECORDED", "")
    here.run(out="fifth")
    assert here.events().count("score 8") == 4 * 3


def test_recorded_scores_of_other_texts_are_not_taken_over(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cell of the same name whose stored scores are of other texts is scored again."""
    here.run()
    for cell in here.cells(kind="reference"):
        path = here.out.scores_path("toy", cell)
        if not path.exists():  # the hidden half is for features only
            continue
        s = read_scores(path)
        write_scores(path, s.nll, s.units, s.special, s.bytes, s.features, {**s.meta, "texts": "0" * 64})
    monkeypatch.setattr("tsdfm_bench.scoring.RECORDED", here.folder / "out")
    here.events()
    here.run(out="second")
    assert here.events().count("score 8") == 4 * 3


def test_another_metric_measures_only_itself(here: Here) -> None:
    here.run(metrics="letters")
    here.events()
    assert here.run(metrics="letters,speed").exit_code == 0
    assert here.events() == []
    assert "sequences_per_second" in set(here.summary()["metric"])


def test_damaged_files_are_noticed_and_made_again(here: Here) -> None:
    here.run()
    (cell,) = here.cells(kind="method")
    scores, samples = here.out.scores_path("toy", cell), here.out.samples_path(cell, 1)
    kept = samples.read_bytes()
    scores.write_bytes(scores.read_bytes()[:-20])
    samples.write_bytes(kept[:100])
    result = here.run()
    assert result.exit_code == 0
    assert samples.read_bytes() == kept
    assert np.array_equal(here.tokens(cell), expected_tokens(cell, 24))
    assert len(here.out.quarantined()) == 2
    assert result.stderr.count("moved to quarantine/, made again") == 2


def test_a_refusal_is_a_row_and_is_not_asked_again(here: Here) -> None:
    result = here.run(steps="2,13")
    assert result.exit_code == 0
    rows = here.summary().query("state == 'skipped'")
    assert list(rows["reason"]) == ["counter cannot count to 13"]
    here.events()
    here.run(steps="2,13")
    assert here.events() == []


def test_a_scorer_that_cannot_be_had_is_left_out_and_said(here: Here) -> None:
    result = here.run(scorers="toy,absent")
    assert result.exit_code == 0
    assert "Scorer absent is missing: could not obtain Absent (1 MB)" in result.stdout
    assert "What to type: nothing helps" in result.stderr
    rows = here.summary().query("scorer == 'absent'")
    assert set(rows["reason"]) == {"could not obtain Absent (1 MB)"}
    assert rows["value"].isna().all()


def test_if_no_scorer_that_was_named_can_be_had_the_exit_code_says_so(here: Here, monkeypatch) -> None:
    """After everything else is done; without a name, none was promised."""
    result = here.run(scorers="absent")
    assert result.exit_code == 1
    assert "1 failed:\n  Scorer absent is missing: could not obtain Absent (1 MB)\n" in result.stderr
    monkeypatch.setattr("tsdfm_bench.sweep.DEFAULT_SCORERS", ("absent",))
    result = here.run(scorers=None)
    assert result.exit_code == 0, result.stderr
    assert "Scorer absent is missing: could not obtain Absent (1 MB)" in result.stdout


def test_a_scorer_that_cannot_judge_is_refused_before_sampling(here: Here) -> None:
    result = here.run(scorers="toy,unfit")
    assert result.exit_code == 2
    assert "does not give a text back" in result.stderr
    assert not [event for event in here.events() if event.startswith(("sample", "load"))]
    assert not here.out.plan_path.exists()


@pytest.mark.parametrize("launcher", ["inline", "local"])
def test_a_scorer_that_is_refused_when_it_is_loaded_costs_its_own_numbers_only(here: Here, launcher: str) -> None:
    result = here.run("--launcher", launcher, scorers="late,toy", metrics="letters")
    assert result.exit_code == 1
    assert "Scorer late failed: Late is not causal" in result.stdout
    assert "1 failed:\n  Late is not causal" in result.stderr
    summary = here.summary()
    assert set(summary.query("scorer == 'late'")["reason"]) == {"Late is not causal"}
    assert summary.query("metric == 'gen_ppl/pooled' and scorer == 'toy'")["value"].notna().all()


def test_a_scorer_that_is_gone_keeps_its_scores(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    here.run(scorers="toy,absent[revision=3]", metrics="letters")
    first = here.summary()
    assert "gen_ppl/pooled" in set(first["metric"])
    absent = here.out.root / "scores" / "absent"
    (here.out.root / "scores" / "toy").rename(absent)  # scores of the same info, under the name of the absent one
    assert here.run(scorers="absent", metrics="letters").exit_code == 0
    rows = here.summary().query("scorer == 'absent' and metric == 'gen_ppl/pooled'")
    assert len(rows) == 4


@pytest.mark.parametrize(
    ("kind", "name", "said"), [("scorers", "broken", "no opinion"), ("metrics", "failing", "division")]
)
def test_a_judge_that_raises_is_said_and_the_rest_is_done(here: Here, kind: str, name: str, said: str) -> None:
    given = {"scorers": "toy", "metrics": "letters"}
    given[kind] += f",{name}"
    result = here.run(**given)
    assert result.exit_code == 1
    assert said in result.stderr
    summary = here.summary()
    assert said in " ".join(summary["reason"])
    assert summary.query("metric == 'gen_ppl/pooled' and scorer == 'toy'")["value"].notna().all()


def test_json_is_all_that_stands_on_stdout(here: Here) -> None:
    result = here.run("--json", steps="2,13", sources="uniform,unigram")
    content = json.loads(result.stdout)
    assert content["exit_code"] == 0
    assert content["folder"] == "out"
    assert content["tables"][0]["rows"]
    assert content["skipped"] == {
        "counter · uniform · 13 steps": "counter cannot count to 13",
        "counter · unigram": "counter has no source 'unigram'; it has: uniform, mask",
    }


def test_the_default_folder_is_found_again(here: Here) -> None:
    here.run(out=None)
    (folder,) = (here.folder / "runs").iterdir()
    assert folder.name.startswith("tiny-")
    here.events()
    assert here.run(out=None, samples="8").exit_code == 0
    assert "sample" not in " ".join(here.events())
    here.run(out=None, seed="1")
    assert len(list((here.folder / "runs").iterdir())) == 2


def test_a_prefix_is_kept_and_part_of_the_row(here: Here) -> None:
    assert here.run(prefix="4").exit_code == 0
    method, real = here.cells(kind="method"), here.cells(method="real", options={})
    assert np.array_equal(here.tokens(method[0])[:, :4], here.tokens(real[0])[:, :4])
    assert set(here.summary()["prefix"]) == {"held-out 4"}
    assert here.run(out="text", prefix="the ").exit_code == 0


def test_cells_with_equal_weights_share_one_loaded_method(here: Here) -> None:
    here.run(steps="2,4,8", temperatures="1,0.5", sources="uniform,mask")
    assert sorted(event for event in here.events() if event.startswith("load")) == [
        "load mask",
        "load toy",
        "load uniform",
    ]


def test_where_results_come_from_is_recorded_without_folders(here: Here) -> None:
    here.run(out=str(here.folder / "deep" / "out"))
    content = read_json(here.folder / "deep" / "out" / "provenance.json")
    (run,) = content["runs"]  # type: ignore[misc]
    assert run["versions"]["torch"]
    assert run["threads"] == 1
    assert run["plugins"] == ["fakes.py"]
    assert str(here.folder) not in json.dumps(content)
