"""A training on a simulated cluster: stages are jobs that wait for the success of those they need."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tsdfm_bench.console import Reporter
from tsdfm_bench.launch import Detached
from tsdfm_bench.launch.leases import Lease, Leases
from tsdfm_bench.launch.slurm_rounds import Dispatcher
from tsdfm_bench.launch.slurm_settings import SlurmSettings, slurm_settings
from tsdfm_bench.launch.slurm_train import TrainParts
from tsdfm_bench.launch.training import CHECKPOINT, STATE, STATE_FILE, TrainFolder
from tsdfm_bench.launch.work import Work, read_work

if TYPE_CHECKING:
    from conftest import Simulation

NEEDS = {"teacher": (), "compass": ("teacher",), "one": ("compass",), "two": ("compass",), "alone": ()}


def works(folder: Path) -> list[Work]:
    """A teacher, a compass taught with it, two students of both, and a network that needs nobody."""
    return [
        Work(
            "train",
            f"train-{stage}",
            stage,
            str(folder),
            {"threads": None},
            stage={"stage": stage},
            needs=[f"train-{need}" for need in needs],
            weight=100.0,
            resources={"gpus": 0, "cpus": 1},
        )
        for stage, needs in NEEDS.items()
    ]


class Training:
    """A folder of checkpoints on the simulated cluster.

    Args:
        simulate: see conftest.
        folder: of the checkpoints.
        fate: of a stage, as in `Simulation`.
    """

    def __init__(self, simulate: Callable[..., Simulation], folder: Path, fate: Callable[[str], Any]) -> None:
        self.folder = folder
        self.cluster = simulate(sample=[], fate=lambda key: fate(key.removeprefix("train-")), gone=self.trained)

    def trained(self, keys: Collection[str]) -> None:
        """Jobs have done their work."""
        for key in keys:
            place = self.folder / key.removeprefix("train-")
            place.mkdir(parents=True)
            (place / CHECKPOINT).write_text("{}")

    def saved(self, stage: str, time_s: float) -> None:
        """The state of a stage was saved."""
        path = self.folder / STATE / stage / STATE_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        os.utime(path, (time_s, time_s))

    def run(self, settings: SlurmSettings | None = None) -> dict[str, str]:
        """Train; stage -> "" or why it failed."""
        parts = TrainParts(works(self.folder), self.folder)
        folder = TrainFolder(self.folder)
        Dispatcher(settings or SlurmSettings(), folder, parts, 60.0, self.cluster.step).run(Reporter(quiet=True))
        return {result["name"].removeprefix("train-"): result["error"] for result in parts.results()}

    def submitted(self) -> list[str]:
        """Stages in the order of their submission."""
        return [key.removeprefix("train-") for r in self.cluster.submitted for keys in r.units for key in keys]


@pytest.fixture
def training(simulate: Callable[..., Simulation], tmp_path: Path) -> Callable[..., Training]:
    """Makes a training."""
    return lambda fate=lambda stage: "done": Training(simulate, tmp_path / "trained", fate)


def test_all_stages_go_out_at_once_each_after_those_it_needs(training: Callable[..., Training]) -> None:
    """Nobody has to be there when a teacher is ready; with nothing left nothing is submitted."""
    run = training()
    with pytest.raises(Detached):
        run.run(replace(SlurmSettings(), detach=True))
    assert sorted(run.submitted()) == sorted(NEEDS)
    of_job = {record.job: key for record in run.cluster.submitted for ((key,),) in [record.units]}
    for job, key in of_job.items():
        before = {of_job[earlier] for earlier in run.cluster.after[job]}
        assert before == {f"train-{need}" for need in NEEDS[key.removeprefix("train-")]}
    assert set(run.run().values()) == {""}
    assert set(run.run().values()) == {""}
    assert len(run.submitted()) == len(NEEDS)


def test_a_lost_teacher_is_replaced_and_so_are_those_that_waited(training: Callable[..., Training]) -> None:
    """However often: as long as something is trained each time, neither it nor its students are given up."""
    lost = []

    def fate(stage: str) -> str:
        if stage == "teacher" and len(lost) < 5:
            lost.append(stage)
            run.saved("teacher", 1000.0 + len(lost))
            return "lost"
        return "done"

    run = training(fate)
    assert set(run.run().values()) == {""}
    assert run.submitted().count("teacher") == 6
    assert run.submitted().count("alone") == 1


@pytest.mark.parametrize("begun", [False, True])
def test_a_text_that_is_tokenised_further_each_time_is_progress(
    training: Callable[..., Training], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begun: bool
) -> None:
    """As long as a stage waits for its text; once it is begun, only its own state counts."""
    monkeypatch.setenv("TSDFM_BENCH_CACHE", str(tmp_path / "cache"))
    manifest = tmp_path / "cache" / "corpora" / "text-train-0" / "manifest.json"
    manifest.parent.mkdir(parents=True)
    lost = []

    def fate(stage: str) -> str:
        if stage == "teacher" and len(lost) < 5:
            lost.append(stage)
            manifest.touch()
            os.utime(manifest, (1000.0 + len(lost),) * 2)
            return "lost"
        return "done"

    run = training(fate)
    if begun:
        run.saved("teacher", 1.0)
    error = run.run()["teacher"]
    assert error == ("Slurm: 3 jobs ended without any progress (node fail)" if begun else "")
    assert run.submitted().count("teacher") == (3 if begun else 6)


def test_a_teacher_without_progress_is_given_up_and_its_students_are_not_tried(
    training: Callable[..., Training],
) -> None:
    """The others are trained all the same; each failure has its reason."""
    run = training(lambda stage: "lost" if stage == "teacher" else "done")
    errors = run.run()
    assert "3 jobs ended without any progress (node fail)" in errors["teacher"]
    assert errors["compass"] == "train-teacher is needed, and failed"
    assert errors["one"] == errors["two"] == "train-compass is needed, and failed"
    assert errors["alone"] == ""


def test_an_error_of_a_stages_own_is_not_tried_again(training: Callable[..., Training]) -> None:
    """A loss that is not finite would not be finite again; the next command tries."""
    said = "training 'compass': the loss is nan at step 7"
    run = training(lambda stage: {"state": "error", "error": said} if stage == "compass" else "done")
    errors = run.run()
    assert errors["compass"] == said
    assert run.submitted().count("compass") == 1
    assert errors["one"] == "train-compass is needed, and failed"
    assert errors["teacher"] == errors["alone"] == ""
    run.cluster.fate = lambda key: "done"
    assert set(run.run().values()) == {""}


def test_students_wait_for_a_teacher_that_another_process_trains(training: Callable[..., Training]) -> None:
    """It is not trained twice, and those that need it are not sent out to fail without it."""
    run = training()
    lease = Leases(TrainFolder(run.folder).leases_folder, 60.0).take("train-teacher")
    assert isinstance(lease, Lease)
    rounds = []
    step = run.cluster.step

    def later(seconds: float) -> None:
        rounds.append(run.submitted())
        if len(rounds) == 3:
            run.trained(["train-teacher"])
            lease.release()
        step(seconds)

    run.cluster.step = later  # type: ignore[method-assign]
    assert set(run.run().values()) == {""}
    assert rounds[2] == ["alone"]
    assert sorted(run.submitted()) == ["alone", "compass", "one", "two"]


def test_stages_with_parameters_of_their_own(training: Callable[..., Training]) -> None:
    """Nodes, GPUs and cores that are asked for are those that the job file has the worker use."""
    run = training()
    teacher = {"stages.teacher.nodes": 4, "stages.teacher.gpus_per_node": 8, "stages.teacher.cpus_per_task": 64}
    run.run(slurm_settings({"cpus_per_task": 3, **teacher}))
    found = {record.units[0][0]: (record.parameters, read_work(record.files[0])) for record in run.cluster.submitted}
    parameters, work = found["train-teacher"]
    assert (parameters["nodes"], parameters["gpus_per_node"]) == (4, 8)
    assert work.resources == {"gpus": 8, "nodes": 4, "cpus": 64}
    assert work.settings["threads"] == 64
    parameters, work = found["train-compass"]
    assert "gpus_per_node" not in parameters
    assert work.resources == {"gpus": 0, "nodes": 1, "cpus": 3}


def test_cores_that_nobody_asked_for_are_two_for_each_gpu(training: Callable[..., Training]) -> None:
    run = training()
    run.run(slurm_settings({"stages.teacher.gpus_per_node": 8}))
    found = {record.units[0][0]: (record.parameters, read_work(record.files[0])) for record in run.cluster.submitted}
    for name, cores in (("train-teacher", 16), ("train-compass", 2)):
        parameters, work = found[name]
        assert parameters["cpus_per_task"] == work.settings["threads"] == cores


def test_a_checkpoint_that_is_still_examined_is_not_done(training: Callable[..., Training]) -> None:
    """The launcher ends when the worker does, and submits nothing meanwhile."""
    run = training()
    run.trained([f"train-{stage}" for stage in NEEDS])
    lease = Leases(TrainFolder(run.folder).leases_folder, 60.0).take("train-compass")
    assert isinstance(lease, Lease)
    rounds: list[float] = []

    def later(seconds: float) -> None:
        rounds.append(seconds)
        if len(rounds) == 3:
            lease.release()

    run.cluster.step = later  # type: ignore[method-assign]
    assert set(run.run().values()) == {""}
    assert len(rounds) == 3
    assert run.submitted() == []
