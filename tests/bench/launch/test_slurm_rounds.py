"""The rounds of the slurm launcher on a simulated cluster (`simulate`): what is submitted, when, and how often."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import pytest

from tsdfm_bench.console import Reporter
from tsdfm_bench.launch import Cancelled, Detached, slurm_rounds
from tsdfm_bench.launch.leases import Lease, Leases
from tsdfm_bench.launch.slurm_jobs import Record, record_path, records
from tsdfm_bench.launch.slurm_queue import SlurmError, Task
from tsdfm_bench.launch.slurm_rounds import Dispatcher, cancel_mark
from tsdfm_bench.launch.slurm_settings import SlurmSettings, slurm_settings
from tsdfm_bench.launch.work import Launch, launches
from tsdfm_bench.results.files import write_json

if TYPE_CHECKING:
    from conftest import Simulation


def run(simulation: Simulation, settings: SlurmSettings | None = None, lease_s: float = 60.0) -> None:
    dispatcher = Dispatcher(settings or SlurmSettings(), simulation.folder, simulation, lease_s, simulation.step)
    dispatcher.run(Reporter(quiet=True))


def units_of(simulation: Simulation) -> list[str]:
    return [key for record in simulation.submitted for keys in record.units for key in keys]


def test_ten_thousand_cells_go_out_in_chunks(simulate: Callable[..., Simulation]) -> None:
    """Each cell once, no array above the limit, one look at the queue a round."""
    cells = [f"{n:016x}" for n in range(10_000)]
    simulation = simulate(sample=cells, limit=201, together=10)
    begun = time.process_time()
    run(simulation)
    assert time.process_time() - begun < 60  # seconds; it takes a few
    assert sorted(units_of(simulation)) == cells
    assert [len(record.files) for record in simulation.submitted] == [201, 201, 201, 201, 196]
    rounds = simulation.left_looks - 1
    assert rounds == 1
    assert simulation.looks == rounds + 2  # and one before and after submitting


def test_files_per_folder_are_bounded(simulate: Callable[..., Simulation]) -> None:
    """A hundred jobs a folder, whatever their number."""
    simulation = simulate(sample=[f"{n:016x}" for n in range(250)])
    run(simulation)
    for launch in launches(simulation.folder):
        for folder in launch.folder.iterdir():
            assert len(list(folder.iterdir())) <= 100


def test_a_small_limit_is_kept(simulate: Callable[..., Simulation]) -> None:
    """What the cluster says counts."""
    simulation = simulate(sample=list("abcdefg"), limit=3)
    run(simulation)
    assert [len(record.files) for record in simulation.submitted] == [3, 3, 1]


def test_scores_wait_for_the_samples_of_their_cells(simulate: Callable[..., Simulation]) -> None:
    """A score job depends on the arrays that make its cells, and on no others; sampled cells need not wait."""
    simulation = simulate(sample=["a", "b", "c"], score=["a-by-toy", "c-by-toy", "z-by-toy"], limit=2)
    run(simulation)
    after = {record.units[0][0]: list(record.after) for record in simulation.submitted if record.stage == "score"}
    assert after == {"a-by-toy": ["sample-000"], "c-by-toy": ["sample-001"], "z-by-toy": []}


def test_methods_with_parameters_of_their_own_have_jobs_of_their_own(simulate: Callable[..., Simulation]) -> None:
    """Equal parameters share an array."""
    simulation = simulate(sample=["a", "b", "c"], names={"a": "ar", "b": "mdlm", "c": "dfm"})
    run(simulation, slurm_settings({"partition": "gpu", "methods": {"ar": {"time": "8:00:00"}}}))
    asked = {tuple(key for keys in r.units for key in keys): r.parameters.get("time") for r in simulation.submitted}
    assert asked == {("a",): 480, ("b", "c"): None}


def test_lost_jobs_are_submitted_again(simulate: Callable[..., Simulation]) -> None:
    """Only what is left of them."""
    lost = ["b"]
    simulation = simulate(sample=["a", "b", "c"], fate=lambda key: "lost" if key in lost and lost.pop() else "done")
    run(simulation)
    assert units_of(simulation) == ["a", "b", "c", "b"]


def test_jobs_without_progress_are_given_up(simulate: Callable[..., Simulation]) -> None:
    """After as many tries as the settings allow, with what Slurm said; the others are done."""
    simulation = simulate(sample=["a", "b"], fate=lambda key: "lost" if key == "a" else "done")
    run(simulation, SlurmSettings(tries=3))
    assert units_of(simulation).count("a") == 3
    assert "3 jobs ended without any progress (node fail)" in simulation.given_up["a"]
    assert simulation.sample == ["a"]


def test_progress_starts_the_count_again(simulate: Callable[..., Simulation]) -> None:
    """A long cell that is preempted many times, but gets on, is never given up."""
    simulation = simulate(sample=["a"])

    def fate(key: str) -> str:
        simulation.progress[key] = simulation.progress.get(key, 0.0) + 1
        return "lost" if simulation.progress[key] < 12 else "done"

    simulation.fate = fate
    run(simulation, SlurmSettings(tries=2))
    assert units_of(simulation) == ["a"] * 12
    assert not simulation.given_up


def test_a_cell_that_fails_is_not_tried_again(simulate: Callable[..., Simulation]) -> None:
    """Its failure is in the files; the launcher ends."""
    simulation = simulate(
        sample=["a", "b"], fate=lambda key: {"state": "failed", "failed": {"a": "boom"}} if key == "a" else "done"
    )
    run(simulation)
    assert units_of(simulation) == ["a", "b"]
    assert not simulation.given_up


def test_another_version_on_the_nodes_is_said_once(simulate: Callable[..., Simulation]) -> None:
    """A refused job would be refused again."""
    refused = {"state": "refused", "error": "sample-00000 was submitted with torch 2.9, but this worker has torch 2.8"}
    simulation = simulate(sample=["a"], fate=lambda key: refused)
    run(simulation)
    assert units_of(simulation) == ["a"]
    assert "torch 2.8" in simulation.given_up["a"]


def test_what_another_process_works_on_is_left_to_it(simulate: Callable[..., Simulation]) -> None:
    """A lease of a living process that is no job of this launcher keeps the cell from being submitted."""
    simulation = simulate(sample=["a", "b"])
    leases = Leases(simulation.folder.leases_folder, 60.0)
    lease = leases.take("a")
    assert isinstance(lease, Lease)
    rounds = []

    def step(seconds: float) -> None:
        simulation.step(seconds)
        rounds.append(seconds)
        if len(rounds) == 3:  # the other process has finished
            simulation.sample = []
            lease.release()

    Dispatcher(SlurmSettings(), simulation.folder, simulation, 60.0, step).run(Reporter(quiet=True))
    leases.close()
    assert units_of(simulation) == ["b"]


def test_a_second_launcher_submits_nothing_twice(simulate: Callable[..., Simulation]) -> None:
    """It finds the records of the first, and waits for its jobs."""
    simulation = simulate(sample=["a", "b"], fate=lambda key: "stays")
    with pytest.raises(Detached, match="come back to"):
        run(simulation, SlurmSettings(detach=True))
    with pytest.raises(Detached):
        run(simulation, SlurmSettings(detach=True))
    assert len(simulation.submitted) == 1
    simulation.fate = lambda key: "done"
    run(simulation)
    assert units_of(simulation) == ["a", "b"]


def test_killed_while_submitting(simulate: Callable[..., Simulation]) -> None:
    """The record has no id yet, but the jobs have its comment: they are found and waited for."""
    simulation = simulate(sample=["a"], fate=lambda key: "stays")
    with pytest.raises(Detached):
        run(simulation, SlurmSettings(detach=True))
    (launch,) = launches(simulation.folder)
    (record,) = records(launch)
    write_json(record_path(launch, record.token), asdict(replace(record, job="")))
    simulation.fate = lambda key: "done"
    run(simulation)
    assert units_of(simulation) == ["a"]


def test_a_silent_controller_is_waited_for(
    simulate: Callable[..., Simulation], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is submitted on a guess, and files are still watched."""
    simulation = simulate(sample=["a"])
    answers = iter([SlurmError("squeue did not answer"), SlurmError("squeue did not answer")])

    def ask(name: str) -> list[Task]:
        for error in answers:
            raise error
        return simulation.tasks(name)

    monkeypatch.setattr(slurm_rounds, "tasks", ask)
    run(simulation)
    assert units_of(simulation) == ["a"]


@pytest.mark.parametrize("detach", [False, True])
def test_a_controller_that_never_answers_is_given_up_if_no_job_was_submitted(
    simulate: Callable[..., Simulation], monkeypatch: pytest.MonkeyPatch, detach: bool
) -> None:
    """Nothing goes on that would be worth waiting for, and nobody is told that something does."""
    simulation, asked, said = simulate(sample=["a"]), [], []

    def ask(name: str) -> list[Task]:
        asked.append(name)
        assert len(asked) < 100
        raise SlurmError("squeue failed: Unable to contact slurm controller")

    reporter = Reporter(quiet=True)
    monkeypatch.setattr(reporter, "note", lambda text, style="": said.append(text))
    monkeypatch.setattr(slurm_rounds, "tasks", ask)
    dispatcher = Dispatcher(SlurmSettings(detach=detach), simulation.folder, simulation, 60.0, lambda seconds: None)
    with pytest.raises(SlurmError, match=r"Unable to contact slurm controller\. No job was submitted; run the same"):
        dispatcher.run(reporter)
    assert len(asked) == (1 if detach else slurm_rounds.ASKED_AT_MOST)
    assert said == (
        [] if detach else ["squeue failed: Unable to contact slurm controller. No job was submitted yet; asking again."]
    )


def test_a_controller_that_falls_silent_is_waited_for_while_jobs_go_on(
    simulate: Callable[..., Simulation], monkeypatch: pytest.MonkeyPatch
) -> None:
    simulation = simulate(sample=["a"], fate=lambda key: "stays")
    looks, said = [0], []

    def ask(name: str) -> list[Task]:
        looks[0] += 1
        if 3 < looks[0] < 3 * slurm_rounds.ASKED_AT_MOST:
            raise SlurmError("squeue did not answer")
        if looks[0] >= 3 * slurm_rounds.ASKED_AT_MOST:
            raise KeyboardInterrupt
        return simulation.tasks(name)

    reporter = Reporter(quiet=True)
    monkeypatch.setattr(reporter, "note", lambda text, style="": said.append(text))
    monkeypatch.setattr(slurm_rounds, "tasks", ask)
    with pytest.raises(KeyboardInterrupt):
        Dispatcher(SlurmSettings(), simulation.folder, simulation, 60.0, lambda seconds: None).run(reporter)
    assert said[1] == "squeue did not answer. Jobs go on; asking again."
    assert "The jobs go on without this process" in said[-1]


def test_a_limit_on_submitted_jobs(simulate: Callable[..., Simulation], monkeypatch: pytest.MonkeyPatch) -> None:
    """What the cluster does not take now is submitted when something has ended."""
    simulation = simulate(sample=["a", "b", "c"], limit=1)
    submit, refused = simulation.submit, []

    def limited(launch: Launch, stage: str, name: str, files: Any, units: Any, *more: Any) -> Record:
        if sum(task.alive for task in simulation.found.values()) >= 2:
            refused.append(units)
            raise SlurmError("sbatch refused: QOSMaxSubmitJobPerUserLimit")
        return submit(launch, stage, name, files, units, *more)

    monkeypatch.setattr(slurm_rounds, "submit", limited)
    run(simulation)
    assert units_of(simulation) == ["a", "b", "c"]
    assert refused


def test_arrays_shrink_until_the_cluster_takes_them(
    simulate: Callable[..., Simulation], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A limit below the size of an array would refuse it for ever."""
    simulation = simulate(sample=[f"{n:02d}" for n in range(20)], limit=16)

    def limited(launch: Launch, stage: str, name: str, files: Any, *more: Any) -> Record:
        if len(files) > 5:
            raise SlurmError("sbatch refused: Job violates accounting/QOS policy (job submit limit)")
        return simulation.submit(launch, stage, name, files, *more)

    monkeypatch.setattr(slurm_rounds, "submit", limited)
    run(simulation)
    assert [len(record.files) for record in simulation.submitted] == [4] * 5


def test_a_first_submission_that_is_refused_is_an_error(simulate: Callable[..., Simulation]) -> None:
    """A wrong partition is not waited for."""
    simulation = simulate(sample=["a"], refuses=1)
    with pytest.raises(SlurmError, match="refused"):
        run(simulation)


def test_a_cancelled_run_is_left(simulate: Callable[..., Simulation]) -> None:
    """A waiting launcher that finds the mark does not submit what was just cancelled; the next run starts anew."""
    simulation = simulate(sample=["a"], fate=lambda key: "stays")

    def step(seconds: float) -> None:
        simulation.found = {id: replace(task, state="CANCELLED") for id, task in simulation.found.items()}
        cancel_mark(simulation.folder).write_text("")

    with pytest.raises(Cancelled):
        Dispatcher(SlurmSettings(), simulation.folder, simulation, 60.0, step).run(Reporter(quiet=True))
    assert units_of(simulation) == ["a"]
    simulation.fate = lambda key: "done"
    run(simulation)
    assert units_of(simulation) == ["a", "a"]


def test_jobs_that_wait_for_what_will_not_happen_are_replaced(
    simulate: Callable[..., Simulation], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slurm leaves them in the queue for ever; they are cancelled."""
    simulation = simulate(sample=["a"])
    cancelled: list[str] = []
    monkeypatch.setattr(slurm_rounds, "cancel", cancelled.extend)

    def step(seconds: float) -> None:
        if len(simulation.submitted) == 1:
            reason = "DependencyNeverSatisfied"
            simulation.found = {id: replace(task, reason=reason) for id, task in simulation.found.items()}
        else:
            simulation.step(seconds)

    Dispatcher(SlurmSettings(), simulation.folder, simulation, 60.0, step).run(Reporter(quiet=True))
    assert units_of(simulation) == ["a", "a"]
    assert "1000_0" in cancelled


def test_interrupted_while_waiting(simulate: Callable[..., Simulation], capsys: pytest.CaptureFixture[str]) -> None:
    """Jobs stay where they are, and the way back is shown."""
    simulation = simulate(sample=["a"], fate=lambda key: "stays")

    def step(seconds: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Dispatcher(SlurmSettings(), simulation.folder, simulation, 60.0, step).run(Reporter())
    said = capsys.readouterr().err
    assert "The jobs go on without this process" in said
    assert "come back to tsdfm-bench-" in said
    assert all(task.alive for task in simulation.found.values())


def test_it_polls_gently(simulate: Callable[..., Simulation]) -> None:
    """A long wait asks less and less often, up to the interval of the settings."""
    simulation = simulate(sample=["a"])
    waits: list[float] = []

    def step(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 30:
            simulation.step(seconds)

    Dispatcher(SlurmSettings(poll=20.0), simulation.folder, simulation, 60.0, step).run(Reporter(quiet=True))
    assert waits[-1] == 20.0
    assert waits[1:] == sorted(waits[1:])
    assert json.loads((record_path(launches(simulation.folder)[0], "sample-000")).read_text())["job"] == "1000"
