"""`tsdfm-bench train`: stops when the time is over, and goes on from there."""

from __future__ import annotations

import json
import os
import re
import shutil
from typing import TYPE_CHECKING, Any

import pytest

from tsdfm_bench.launch.leases import Lease, Leases

if TYPE_CHECKING:
    from conftest import Here

RECIPE = """
scale = "toy"
task = "sotu"
network = {{width = 16, blocks = 1, heads = 1, condition = 8}}
training = {{steps = {steps}, batch = 2, lr = 1e-3, warmup = 2, validate_every = 100000}}
[[stage]]
name = "mdlm"
kind = "mdlm"
source = "mask"
"""
GIVEN = ("train", "toy.toml", "--out", "trained", "--threads", "1")


class FastClock:
    """Half a second passes at every look."""

    now = 0.0

    def monotonic(self) -> float:
        self.now += 0.5
        return self.now


def test_a_small_recipe_is_trained_once(here: Here) -> None:
    (here.folder / "toy.toml").write_text(RECIPE.format(steps=6))
    result = here.cli(*GIVEN)
    assert result.exit_code == 0, result.stderr
    assert (here.folder / "trained" / "mdlm" / "model.safetensors").is_file()
    assert "Use them: tsdfm-bench run --checkpoint trained" in result.stderr
    assert "mdlm: trained already" in here.cli(*GIVEN).stderr


def test_where_trained_networks_come_from_is_kept_beside_them(here: Here) -> None:
    """As beside the results of a run; the same command again is no second record."""
    (here.folder / "toy.toml").write_text(RECIPE.format(steps=6))
    for launcher in ((), ("--launcher", "local", "--jobs", "1"), ()):
        assert here.cli(*GIVEN, *launcher).exit_code == 0
        (made,) = json.loads((here.folder / "trained" / "provenance.json").read_text())["runs"]
        assert made["versions"].keys() >= {"python", "tsdfm-bench", "torch"}
        assert made["device"] in ("cpu", "cuda")
        assert made["threads"] == 1
        assert str(here.folder) not in json.dumps(made)


def test_a_training_is_planned(here: Here) -> None:
    """What it needs of memory and operations, as `train --dry-run` says it; nothing is trained."""
    (here.folder / "toy.toml").write_text(RECIPE.format(steps=6))
    shown = here.cli("plan", "--recipe", "toy.toml", "--json")
    assert shown.exit_code == 0, shown.stderr
    (stage,) = json.loads(shown.stdout)
    assert (stage["name"], stage["steps"]) == ("mdlm", 6)
    assert stage["memory_bytes"] > 16 * stage["parameters"]
    assert stage["flops"] > 0
    assert not (here.folder / "runs").exists()
    refused = here.cli("plan", "--recipe", "toy.toml", "--steps", "8")
    assert refused.exit_code == 2
    assert "--steps belongs to a run" in refused.stderr


def test_what_was_trained_by_other_settings_is_not_taken_for_the_recipes(here: Here) -> None:
    recipe = here.folder / "toy.toml"
    recipe.write_text(RECIPE.format(steps=6))
    assert here.cli(*GIVEN).exit_code == 0
    recipe.write_text(RECIPE.format(steps=6).replace("validate_every = 100000", "validate_every = 3"))
    assert "mdlm: trained already" in here.cli(*GIVEN).stderr  # it has no influence on the weights
    recipe.write_text(RECIPE.format(steps=7))
    refused = here.cli(*GIVEN)
    assert refused.exit_code == 1
    said = " ".join(refused.stderr.split())
    assert "was trained with other settings than recipe 'toy' now has (training.steps 6, now 7)" in said
    assert "delete it to train it again" in said


def test_training_stops_when_the_time_is_over_and_goes_on(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    (here.folder / "toy.toml").write_text(RECIPE.format(steps=10_000))
    monkeypatch.setattr("tsdfm_bench.methods.train.trainer.time", FastClock())
    done = []
    for _ in range(2):
        result = here.cli(*GIVEN, "--minutes", "1e-9")
        assert result.exit_code == 0, result.stderr
        assert "The time is over; what was trained is kept in trained" in result.stderr
        done.append(int(re.search(r"mdlm: (\d+) steps done", result.stderr)[1]))  # type: ignore[index]
    assert 0 < done[0] < done[1] < 100
    assert not (here.folder / "trained" / "mdlm" / "config.json").exists()


def test_a_training_that_does_not_fit_into_memory_ends_with_one_line(
    here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from tsdfm_bench.methods.train.objectives import MDLMObjective

    def full(*given: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(MDLMObjective, "loss", full)
    (here.folder / "toy.toml").write_text(RECIPE.format(steps=6))
    result = here.cli(*GIVEN)
    assert result.exit_code == 1
    said = " ".join(result.stderr.split())
    assert "error: training 'mdlm' stopped at step 1 of 6: one window does not fit into the GPU's memory" in said
    assert "Traceback" not in said


def test_two_processes_do_not_train_one_stage(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even if they were started by hand; processes of a job whose first one holds the lease do train it."""
    (here.folder / "toy.toml").write_text(RECIPE.format(steps=6))
    other = Leases(here.folder / "trained" / ".leases", 60.0)
    lease = other.take("train-mdlm")
    assert isinstance(lease, Lease)
    refused = here.cli(*GIVEN)
    assert refused.exit_code == 1
    said = " ".join(refused.stderr.split())
    assert f"error: another process trains 'mdlm' in trained: process {os.getpid()} on" in said
    assert not (here.folder / "trained" / "mdlm").exists()
    with monkeypatch.context() as patch:
        patch.setenv("TSDFM_BENCH_LEASED", "1")
        assert here.cli(*GIVEN).exit_code == 0
    lease.release()
    other.close()
    shutil.rmtree(here.folder / "trained" / "mdlm")
    assert here.cli(*GIVEN).exit_code == 0
    assert not list((here.folder / "trained" / ".leases").iterdir())  # given back


def test_a_training_that_was_taken_over_stops(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was asleep for longer than its lease, and another process has gone on with it."""
    from tsdfm_bench.methods.train.objectives import MDLMObjective

    loss = MDLMObjective.loss

    def asleep(*given: Any) -> Any:
        for path in (here.folder / "trained" / ".leases").iterdir():
            path.unlink()
        return loss(*given)

    monkeypatch.setattr(MDLMObjective, "loss", asleep)
    (here.folder / "toy.toml").write_text(RECIPE.format(steps=6))
    result = here.cli(*GIVEN)
    assert result.exit_code == 1
    assert "error: train-mdlm was taken over by another process" in " ".join(result.stderr.split())
    assert not (here.folder / "trained" / "mdlm").exists()


def test_a_file_is_no_folder_for_checkpoints(here: Here) -> None:
    """Said before any work: the task of the recipe is never looked for."""
    (here.folder / "toy.toml").write_text(RECIPE.format(steps=6).replace('"sotu"', '"none"'))
    (here.folder / "trained").write_text("x")
    result = here.cli(*GIVEN)
    assert result.exit_code == 2
    assert "--out trained is a file" in result.stderr


TWO = """
[[stage]]
name = "second"
kind = "mdlm"
source = "mask"
start_from = "mdlm"
training = {{steps = 3}}
"""


def test_stages_are_jobs_of_a_launcher_each_after_those_it_needs(here: Here) -> None:
    """The same recipe in one process and as dependent jobs of a worker gives the same weights, bit for bit."""
    (here.folder / "toy.toml").write_text(RECIPE.format(steps=4) + TWO.format())
    inline = here.cli("train", "toy.toml", "--out", "inline", "--threads", "1")
    assert inline.exit_code == 0, inline.stderr
    local = here.cli(*GIVEN, "--launcher", "local", "--jobs", "2")
    assert local.exit_code == 0, local.stderr
    assert "training: 2 networks done" in local.stderr
    for stage in ("mdlm", "second"):
        files = [here.folder / folder / stage / "model.safetensors" for folder in ("inline", "trained")]
        assert files[0].read_bytes() == files[1].read_bytes()
    only = here.cli("train", "toy.toml", "--out", "empty", "--only", "second", "--launcher", "local")
    assert only.exit_code == 1
    assert "second: needs mdlm in " in only.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--launcher", "lokal"), "did you mean 'local'"),
        (("--launcher", "local", "--minutes", "1"), "--minutes is for"),
    ],
)
def test_a_wrong_launcher_of_a_training_is_said(here: Here, options: tuple[str, ...], said: str) -> None:
    (here.folder / "toy.toml").write_text(RECIPE.format(steps=4))
    result = here.cli(*GIVEN, *options)
    assert result.exit_code == 2
    assert said in result.stderr


SHAPED = """
scale = "toy"
task = "markov[vocab=4;length=8]"
network = {width = 16, blocks = 1, heads = 1, condition = 8}
training = {steps = 3, batch = 2, lr = 1e-3, warmup = 2, validate_every = 100000}
[[stage]]
name = "dfm-uniform"
kind = "dfm"
source = "uniform"
[[stage]]
name = "compass-uniform"
kind = "compass"
source = "uniform"
teacher = "dfm-uniform"
blocks = 1
[[stage]]
name = "tsdfm-uniform"
kind = "tsdfm"
source = "uniform"
teacher = "dfm-uniform"
compass = "compass-uniform"
[[stage]]
name = "other"
kind = "tsdfm"
source = "uniform"
teacher = "dfm-uniform"
compass = "compass-uniform"
"""


def test_an_untrained_compass_is_reported_and_its_student_refused(here: Here) -> None:
    (here.folder / "toy.toml").write_text(SHAPED)
    nothing = here.cli(*GIVEN, "--report")
    assert nothing.exit_code == 2
    assert "no compass of recipe 'toy' is trained in trained (compasses: compass-uniform)" in nothing.stderr
    result = here.cli(*GIVEN)
    assert result.exit_code == 1
    assert "stage 'tsdfm-uniform' is not trained: its compass 'compass-uniform' failed its checks" in result.stderr
    launched = here.cli(*GIVEN, "--launcher", "local")
    assert launched.exit_code == 1
    assert (
        "tsdfm-uniform, other: is not trained: its compass 'compass-uniform' failed its checks:\n  - "
        in launched.stderr
    )
    report = here.cli(*GIVEN, "--report")
    assert report.exit_code == 1
    assert "repeated tokens" in report.stdout
    assert "Failed: " in report.stdout
    assert "the exact law gives nats per token" in report.stdout
    found = json.loads(here.cli(*GIVEN, "--report", "--json").stdout)
    assert found["compass-uniform"]["passed"] is False
    assert found["compass-uniform"]["choice"]["judge"] == "the exact law"
    assert (here.folder / "trained" / "trajectories.parquet").is_file()
    assert here.cli(*GIVEN, "--report", "--dry-run").exit_code == 2
