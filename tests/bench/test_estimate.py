"""What a sweep will cost, and a limit on it. No test looks at how long anything really took."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from tsdfm_bench.budget import about, parse_budget
from tsdfm_bench.errors import UsageError
from tsdfm_bench.estimate import Estimate, Estimator
from tsdfm_bench.plan import Cell, PlannedCell
from tsdfm_bench.results.files import write_json
from tsdfm_bench.results.store import RunFolder

if TYPE_CHECKING:
    from conftest import Here


def plan(here: Here, *flags: str, **given: str | None) -> dict[str, Any]:
    found = here.cli(*here.arguments("plan", **given), "--json", *flags)
    assert found.exit_code == 0, found.stderr
    content: dict[str, Any] = json.loads(found.stdout)
    return content


def known_rates(patch: pytest.MonkeyPatch, **seconds: float) -> None:
    """Give methods and scorers these seconds per call and per text, as if they had been measured."""
    from tsdfm_bench.estimate import Rate

    def method(self: Estimator, planned: Any, group: Any) -> Rate:
        return Rate(seconds[planned.cell.method])

    def scorer(self: Estimator, judge: Any) -> Rate:
        return Rate(seconds[judge.name], units=12.0)

    patch.setattr(Estimator, "_time_method", method)
    patch.setattr(Estimator, "_time_scorer", scorer)


def test_seconds_are_calls_times_seconds_of_a_call(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches x steps x seconds, texts x seconds; references cost nothing to draw, but to score."""
    known_rates(monkeypatch, counter=0.5, toy=0.01)
    estimate = plan(here, steps="2,6")["estimate"]
    sampling = sorted(s for s in estimate["sampling_s"].values() if s)
    assert sampling == [3 * 2 * 0.5, 3 * 6 * 0.5]  # 24 sequences in batches of 8
    rows = 2 + 3  # of the method and references; without features nobody scores the other half of real text
    assert estimate["scoring_s"]["toy"] == pytest.approx(rows * 24 * 0.01)
    assert estimate["seconds"] == pytest.approx(sum(sampling) + rows * 24 * 0.01)
    assert estimate["complete"]
    assert estimate["gpu_hours"] is None  # there is none here


def test_gpu_hours_are_seconds_on_a_gpu() -> None:
    found = Estimate({"a": 1800.0, "b": None}, {"toy": 900.0}, 0, "cuda", 2)
    assert found.gpu_hours == 0.75
    assert not found.complete
    assert replace(found, device="cpu").gpu_hours is None


def test_disk_is_about_what_the_run_takes(here: Here) -> None:
    """Within a factor of three of what is there afterwards: compression is not foreseen."""
    told = plan(here, samples="400")["estimate"]["bytes"]
    here.run(samples="400")
    folders = (here.out.root / name for name in ("cells", "scores"))
    used = sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file())
    assert used / 3 < told < 3 * used


def test_a_network_is_timed_once(here: Here) -> None:
    """The second plan takes what the first one measured; the timing itself makes few calls."""
    first = plan(here)
    assert [event for event in here.events() if event.startswith("sample")] == [
        "sample 0 x2 steps 2",
        "sample 0 x8 steps 2",
    ]
    second = plan(here)
    assert not [event for event in here.events() if event.startswith(("sample", "score", "load"))]
    assert first["estimate"]["sampling_s"] == second["estimate"]["sampling_s"]
    assert all(seconds is not None for seconds in second["estimate"]["sampling_s"].values())


def test_other_threads_are_another_measurement(here: Here) -> None:
    """What was measured holds for one number of threads."""
    plan(here)
    here.events()
    plan(here, threads="2")
    assert any(event.startswith("sample") for event in here.events())


def test_costs_of_the_run_itself_come_first(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """When a cell is sampled, its measured seconds decide what the rest will take."""
    here.run(steps="2")
    (cell,) = here.cells(steps=2)
    costs = json.loads(here.out.cost_path(cell).read_text())["batches"]
    for cost in costs.values():
        cost |= {"seconds": 10.0, "calls": {"denoiser": 2}}
    write_json(here.out.cost_path(cell), {"batches": costs})
    estimate = plan(here, samples="40", steps="2")["estimate"]
    assert estimate["sampling_s"][cell] == pytest.approx(2 * 10.0)  # two more batches, ten seconds each


def test_nothing_left_costs_nothing(here: Here) -> None:
    """A finished run is estimated at zero, and nothing is loaded for that."""
    here.run()
    here.events()
    found = plan(here)["estimate"]
    assert found["seconds"] == 0
    assert found["bytes"] == 0
    assert not here.events()


def test_without_timing_the_unknown_is_said(here: Here) -> None:
    """`--no-timing` loads nothing; what nobody measured is None, and the table shows a question mark."""
    estimate = plan(here, "--no-timing")["estimate"]
    assert not estimate["complete"]
    assert None in estimate["sampling_s"].values()
    assert not [event for event in here.events() if event.startswith(("load", "sample"))]
    shown = here.cli(*here.arguments("plan"), "--no-timing").stdout
    assert "?" in shown
    assert "at least" in shown


def test_a_method_that_fails_is_named(here: Here) -> None:
    """Timing never stops a plan."""
    content = plan(here, methods="counter[spoil=raise],counter")
    assert any("boom in sample" in note for note in content["estimate"]["notes"])
    assert len(content["cells"]) == 2 + 4


def test_a_scorer_is_never_fetched_for_a_plan(here: Here) -> None:
    """A scorer whose files are not here is not timed; the note says why."""
    content = plan(here, scorers="absent")
    assert content["estimate"]["scoring_s"] == {"absent": None}
    assert any("could not obtain Absent" in note for note in content["estimate"]["notes"])


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("30m", 1800), ("2h", 7200), ("1h30m", 5400), ("1.5 h", 5400), ("1d", 86400)]
)
def test_budgets(text: str, seconds: float) -> None:
    """A number and its unit, or several."""
    assert parse_budget(text) == seconds


@pytest.mark.parametrize("text", ["", "2", "two hours", "h", "-1h", "0s", "1h x"])
def test_budgets_that_are_none(text: str) -> None:
    """A bare number has no unit, so it is not guessed."""
    with pytest.raises(UsageError, match="--budget"):
        parse_budget(text)


def test_rough_times() -> None:
    """As many digits as an estimate deserves."""
    assert [about(s) for s in (0.2, 40, 720, 12600, 200000)] == ["under 1 s", "40 s", "12 min", "3.5 h", "2.3 days"]


def test_a_sweep_beyond_its_budget_is_refused(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is written, with the dearest cells and what would fit."""
    known_rates(monkeypatch, counter=10.0, toy=0.0)
    found = here.run("--budget", "3m", steps="2,40")
    assert found.exit_code == 2
    assert "would take about 21 min" in found.stderr  # 3 batches x 42 calls x 10 s
    assert "40 steps: 20 min" in found.stderr
    assert "1 cheapest of 2 cells" in found.stderr
    assert not here.out.plan_path.exists()
    assert here.cli(*here.arguments("plan", steps="2,40"), "--budget", "3m").exit_code == 2


def test_within_its_budget_nothing_changes(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan with a budget that suffices is the plan without."""
    known_rates(monkeypatch, counter=0.001, toy=0.0)
    assert here.run("--budget", "1h").exit_code == 0
    assert not here.summary().empty


def test_trimming_leaves_out_the_dearest_and_says_so(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left out is a row with its reason; without the budget the same folder is completed."""
    known_rates(monkeypatch, counter=10.0, toy=0.0)
    assert here.run("--budget", "3m", "--trim", steps="2,40").exit_code == 0
    rows = json.loads(here.out.plan_path.read_text())
    assert [cell["steps"] for cell in rows["cells"] if cell["kind"] == "method"] == [2]
    (left,) = rows["not_run"]
    assert left["steps"] == 40
    assert "beyond the budget of 3 min" in left["reason"]
    assert here.run(steps="2,40").exit_code == 0
    assert len(here.cells(kind="method")) == 2


def test_nothing_fits(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty sweep is not a sweep."""
    known_rates(monkeypatch, counter=100.0, toy=0.0)
    found = here.run("--budget", "1m", "--trim")
    assert found.exit_code == 2
    assert "not one cell fits" in found.stderr


def test_an_unknown_cost_is_no_promise(here: Here) -> None:
    """A method that cannot be timed cannot be held to a budget."""
    found = here.run("--budget", "1h", methods="counter[spoil=raise]")
    assert found.exit_code == 2
    assert "not known" in found.stderr
    assert "boom" in found.stderr


def test_memory_is_the_largest_peak_that_is_known(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of methods and scorers apart; where nothing was measured, nothing is said."""
    from tsdfm_bench.estimate import Rate

    monkeypatch.setattr(Estimator, "_time_method", lambda self, planned, group: Rate(0.1, peak_bytes=3_000_000_000))
    monkeypatch.setattr(Estimator, "_time_scorer", lambda self, judge: Rate(0.1, peak_bytes=2_000_000))
    estimate = plan(here)["estimate"]
    assert estimate["sampling_peak_bytes"] == 3_000_000_000
    assert estimate["scoring_peak_bytes"] == 2_000_000
    shown = here.cli(*here.arguments("plan")).stdout
    assert "sampling about 3.0 GB, scoring about 2.0 MB" in shown


def test_memory_of_the_run_itself_comes_first(here: Here) -> None:
    """A cell that was sampled says how much memory it needed."""
    here.run(steps="2")
    (cell,) = here.cells(steps=2)
    costs = json.loads(here.out.cost_path(cell).read_text())["batches"]
    for cost in costs.values():
        cost |= {"peak_memory_bytes": 7_000_000_000, "calls": {"denoiser": 2}}
    write_json(here.out.cost_path(cell), {"batches": costs})
    assert plan(here, samples="40", steps="2")["estimate"]["sampling_peak_bytes"] == 7_000_000_000


def test_memory_of_other_steps_is_measured(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a cell of many steps needed says little of one with few; its seconds of a call still count."""
    from tsdfm_bench.estimate import Rate

    here.run(steps="2,6")
    cell = stored_peak(here, 6, 1_000_000)
    here.out.cost_path(*here.cells(steps=2)).unlink()
    measured = Rate(99.0, peak_bytes=8_000_000, extent=1 / 2, more_peak_bytes=5_000_000, more_extent=1 / 6)
    monkeypatch.setattr(Estimator, "_time_method", lambda self, planned, group: measured)
    estimate = plan(here, samples="40", steps="2,6")["estimate"]
    assert estimate["sampling_peak_bytes"] == 8_000_000
    assert estimate["sampling_s"][cell] == pytest.approx(2 * 6 * 0.5)  # not 99 s a call


def test_memory_between_two_cells_of_the_run_is_known(here: Here) -> None:
    """Linear in one over the steps: 2 and 6 steps tell of 3, and nothing is sampled for that."""
    here.run(steps="2,3,6")
    stored_peak(here, 2, 6_000_000)
    stored_peak(here, 6, 2_000_000)
    here.out.cost_path(*here.cells(steps=3)).unlink()
    here.events()
    told = plan(here, samples="40", steps="2,3,6")["estimate"]
    assert told["sampling_peak_bytes"] == 6_000_000
    assert not [event for event in here.events() if event.startswith("sample")]


def stored_peak(here: Here, steps: int, peak: int) -> str:
    """Write into the costs of a cell's batches that they took this much memory, and half a second a call."""
    (cell,) = here.cells(steps=steps)
    costs = json.loads(here.out.cost_path(cell).read_text())["batches"]
    for cost in costs.values():
        cost |= {"peak_memory_bytes": peak, "calls": {"denoiser": steps}, "seconds": 0.5 * steps}
    write_json(here.out.cost_path(cell), {"batches": costs})
    return str(cell)


def test_a_measurement_at_one_number_of_steps_is_made_again_for_others(here: Here) -> None:
    plan(here, steps="2")
    here.events()
    plan(here, steps="2,8")
    assert [event for event in here.events() if event.startswith("sample")] == [
        "sample 0 x2 steps 2",
        "sample 0 x8 steps 2",
        "sample 0 x8 steps 8",
    ]


def test_memory_is_linear_between_two_measurements(here: Here) -> None:
    """In one over the steps, because a call then draws so many positions; without steps, in the tokens kept."""
    from tsdfm_bench.estimate import Rate

    def at(steps: int | None, length: int = 64) -> Any:
        return SimpleNamespace(steps=steps, length=length)

    rate = Rate(1.0, peak_bytes=500, extent=1 / 4, more_peak_bytes=200, more_extent=1 / 16)
    assert [rate.peak_at(at(steps)) for steps in (4, 16, 8, 1024)] == [500, 200, 300, 102]
    assert rate.peak_at(at(1)) == 1700
    assert Rate(1.0, peak_bytes=500, extent=1 / 4).peak_at(at(1024)) == 500
    tokens = Rate(1.0, peak_bytes=112, extent=12, more_peak_bytes=148, more_extent=48)
    assert tokens.peak_at(at(None, 1024)) == 1124
    falling = Rate(1.0, peak_bytes=900, extent=1 / 4, more_peak_bytes=210, more_extent=1 / 16)
    assert falling.peak_at(at(4096)) == 105  # extrapolation stops at half of what was seen


def test_memory_is_measured_twice_where_cells_have_more_steps(here: Here) -> None:
    plan(here, steps="2,40")
    assert [event for event in here.events() if event.startswith("sample")] == [
        "sample 0 x2 steps 2",
        "sample 0 x8 steps 2",
        "sample 0 x8 steps 16",
    ]


@pytest.mark.parametrize(("length", "measured"), [(1024, [12, 12, 256]), (64, [12, 12, 48]), (8, [8, 8])])
def test_memory_without_steps_is_measured_on_a_quarter_of_the_tokens(
    length: int, measured: list[int], tmp_path: Path
) -> None:
    """Else 20 MB that a process takes in between 12 and 48 tokens count as half a gigabyte at 1,024."""
    lengths = []

    class OneByOne:
        @classmethod
        def load(cls, params: dict[str, Any], device: str) -> OneByOne:
            return cls()

        def networks(self) -> dict[str, Any]:
            return {}

        def sample(self, request: Any) -> None:
            lengths.append(request.length)

    registry = SimpleNamespace(load=lambda kind, name: OneByOne)
    job: Any = SimpleNamespace(registry=registry, folder=RunFolder(tmp_path), device="cpu", threads=1, batch_size=4)
    about: dict[str, Any] = {"weights": "none", "task": "toy", "tokenizer": "none", "data_hash": "none"}
    planned = PlannedCell(Cell("method", "one_by_one", {}, **about, length=length, steps=None, source=None))
    assert Estimator(job, cache=tmp_path).rate(planned, [planned]) is not None
    assert lengths == measured
