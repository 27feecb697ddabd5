"""The compass: token-wise contrast, refresh, its report, and that one which fails its checks stops the student."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tsdfm_bench.errors import CheckpointError, CompassError, UsageError
from tsdfm_bench.methods.nets.compass import Compass
from tsdfm_bench.methods.nets.dit import DiT, DiTConfig
from tsdfm_bench.methods.train.build import energy_of, forget_time
from tsdfm_bench.methods.train.card import weights_hash
from tsdfm_bench.methods.train.command import NamedJudge, require_trust, train_recipe
from tsdfm_bench.methods.train.compass import CompassObjective, Pair
from tsdfm_bench.methods.train.compass_report import auc, examine
from tsdfm_bench.methods.train.data import Draws, TrainingText
from tsdfm_bench.methods.train.recipe import Recipe

V, LENGTH = 6, 8
STREAM = np.tile(np.arange(V), 500)
TEXT = TrainingText("cycle", {"train": STREAM, "validation": STREAM}, V, LENGTH, "cycle@1", "sha256:cycle")


class Guess(nn.Module):
    """A teacher that knows nothing: every token is equally likely."""

    def forward(self, x: Tensor, time: Tensor, step_size: Tensor | None = None) -> Tensor:
        return torch.zeros(*x.shape, V)


class Voter(nn.Module):
    """A teacher that lets the tokens vote where the cycle begins, and believes the majority a little."""

    def forward(self, x: Tensor, time: Tensor, step_size: Tensor | None = None) -> Tensor:
        place = torch.arange(x.shape[1])
        votes = nn.functional.one_hot((x - place) % V, V).sum(dim=1).float()
        return 0.8 * votes[:, (torch.arange(V) - place[:, None]) % V]


class Broken(nn.Module):
    """The ideal compass of a cycle: a token that does not follow its left neighbour costs 1."""

    def __init__(self, sign: float = 1.0) -> None:
        super().__init__()
        self.sign = nn.Parameter(torch.tensor(sign))

    def forward(self, x: Tensor, time: Tensor, origin: Tensor) -> Tensor:
        wrong = (x[:, 1:] != (x[:, :-1] + 1) % V).float()
        return self.sign * nn.functional.pad(wrong, (1, 0))


def judge(tokens: np.ndarray) -> np.ndarray:
    return (tokens[:, 1:] != (tokens[:, :-1] + 1) % V).mean(axis=1)


def network(step_aware: bool = False) -> DiT:
    torch.manual_seed(0)
    made = DiT(DiTConfig(V, V, LENGTH, width=16, blocks=2, heads=2, condition=8, step_aware=step_aware))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return made.eval()


def test_token_level_contrast_is_the_mean_over_changed_positions() -> None:
    """Constant energies a at changed positions of both states: softplus(a) + softplus(-a), whatever is elsewhere."""
    origin = torch.zeros(3, 5, dtype=torch.int64)
    positive, negative = origin.clone(), origin.clone()
    positive[0, :2], positive[1, 4], negative[:, 1] = 1, 2, 3
    pair = Pair(positive, negative, torch.ones(3), origin, torch.ones(3))
    value = 0.7

    def energy(x: Tensor, time: Tensor, start: Tensor) -> Tensor:
        return torch.where(x != start, value, 100.0)

    objective = CompassObjective(V, V, Guess(), level="token")
    expected = math.log1p(math.exp(value)) + math.log1p(math.exp(-value))
    assert objective._per_pair(energy, pair)[0].mean().item() == pytest.approx(expected, rel=1e-6)  # type: ignore[arg-type]


def test_energy_counts_changed_positions_only_if_asked() -> None:
    compass = Compass.from_teacher(network(), 1, see_origin=True, changed_only=True)
    nn.init.ones_(compass.head.bias)
    x = torch.randint(0, V, (4, LENGTH))
    origin = x.clone()
    origin[:, :3] = (origin[:, :3] + 1) % V
    energy = compass(x, torch.full((4,), 0.5), origin)
    assert (energy[:, 3:] == 0).all()
    assert (energy[:, :3] != 0).all()
    with pytest.raises(ValueError, match="origin"):
        compass(x, torch.full((4,), 0.5))


@pytest.mark.parametrize("options", [{"positives": "best"}, {"level": "word"}])
def test_unknown_compass_options_are_refused(options: dict[str, str]) -> None:
    with pytest.raises(UsageError, match=next(iter(options.values()))):
        CompassObjective(V, V, Guess(), **options)  # type: ignore[arg-type]


def test_a_student_can_make_the_negatives() -> None:
    """The refreshed compass sees the student's jumps: the builder is asked with half the step."""
    asked: list[Tensor] = []

    class Student(nn.Module):
        def forward(self, x: Tensor, time: Tensor, step_size: Tensor) -> Tensor:
            asked.append(step_size)
            return torch.zeros(*x.shape, V)

    objective = CompassObjective(V, V, Student(), step_aware=True)
    pair = objective.pair(torch.randint(0, V, (32, LENGTH)), Draws(0, "student", 0, 32))
    assert torch.allclose(asked[0].double(), pair.step_size / 2)


def test_auc_is_the_chance_that_a_negative_scores_higher() -> None:
    positive, negative = np.array([0.0, 1.0]), np.array([1.0, 2.0])
    assert auc(positive, negative) == pytest.approx((1 + 1 + 0.5 + 1) / 4)
    assert math.isnan(auc(positive, negative[:0]))


def test_the_ideal_compass_passes_and_its_opposite_fails_every_check() -> None:
    objective = CompassObjective(V, V, Voter())
    good = examine(Broken(), objective, TEXT, 0.5, judge, "cycle", pairs=256)
    assert good.passed
    assert good.auc > 0.7
    assert good.choice is not None
    assert good.choice.argmin < good.choice.random < good.choice.argmax
    assert good.choice.rho > 0
    bad = examine(Broken(-1.0), objective, TEXT, 0.5, judge, "cycle", pairs=256)
    for reason, expected in zip(bad.failures, ("prefers the data", "not worse", "does not go with"), strict=True):
        assert expected in reason


@pytest.mark.parametrize("tau", [0.9, 1.0])
def test_a_compass_that_is_used_late_only_is_examined_late(tau: float) -> None:
    found = examine(Broken(), CompassObjective(V, V, Voter()), TEXT, tau, judge, "cycle", pairs=256)
    assert found.choice is not None
    assert found.choice.argmin < found.choice.random < found.choice.argmax


def test_a_compass_that_counts_changes_is_found_out() -> None:
    """With nominal bridges the chain's second state has changed more positions: counting them is enough to win."""

    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor, time: Tensor, origin: Tensor) -> Tensor:
            return self.scale * (x != origin).float()

    objective = CompassObjective(V, V, Guess(), positives="nominal")
    report = examine(Counter(), objective, TEXT, 0.0, pairs=512)
    assert report.auc > 0.55
    assert any("counting changed positions" in reason for reason in report.failures)


def test_a_network_that_forgot_time_answers_as_at_that_time() -> None:
    made = network()
    x = torch.randint(0, V, (3, LENGTH))
    with torch.no_grad():
        wanted = made(x, torch.full((3,), 0.5))
        forget_time(made, 0.5)
        for time in (0.0, 0.5, 4.0):
            assert torch.allclose(made(x, torch.full((3,), time)), wanted, atol=1e-5)
    made(x, torch.tensor([0.0, 1.0, 2.0])).sum().backward()
    inner = made.time.mlp[0]
    assert isinstance(inner, nn.Linear)
    assert inner.weight.grad is not None
    assert inner.weight.grad.abs().sum() > 0  # what was forgotten can be learned


TRAINING = {"batch": 4, "steps": 2, "lr": 1e-3, "warmup": 1, "validate_every": 5, "optimizer": "adamw"}


def recipe(**student: object) -> Recipe:
    return Recipe.model_validate(
        {
            "scale": "toy",
            "task": "cycle",
            "network": {"width": 16, "blocks": 2, "heads": 2, "condition": 8},
            "training": TRAINING,
            "stage": [
                {"name": "dfm", "kind": "dfm", "source": "uniform"},
                {"name": "compass", "kind": "compass", "source": "uniform", "teacher": "dfm", "blocks": 1},
                {
                    "name": "tsdfm",
                    "kind": "tsdfm",
                    "source": "uniform",
                    "teacher": "dfm",
                    "compass": "compass",
                    **student,
                },
                {"name": "after", "kind": "fsdfm", "source": "uniform", "teacher": "dfm"},
            ],
        }
    )


def test_an_untrained_compass_stops_its_student_and_nothing_else(tmp_path) -> None:
    lines: list[str] = []
    refused = train_recipe(recipe(), TEXT, tmp_path, announce=lines.append, judge=NamedJudge("cycle", judge))
    assert len(refused) == 1
    assert "'tsdfm' is not trained: its compass 'compass' failed its checks" in refused[0]
    assert "despite_checks" in refused[0]
    assert not (tmp_path / "tsdfm").exists()
    assert (tmp_path / "after" / "model.safetensors").is_file()
    assert (tmp_path / "compass" / "report.json").is_file()
    assert any("AUC" in line for line in lines)
    assert train_recipe(recipe(despite_checks=True), TEXT, tmp_path, announce=lines.append) == []
    assert (tmp_path / "tsdfm" / "model.safetensors").is_file()
    with pytest.raises(CompassError):
        require_trust(recipe().stage[2], recipe(), TEXT, tmp_path, None)


def test_a_compass_of_another_teacher_is_refused(tmp_path) -> None:
    stages = recipe(despite_checks=True)
    train_recipe(stages, TEXT, tmp_path, ["dfm", "compass"], announce=lambda line: None)
    teacher = DiT.from_pretrained(tmp_path / "dfm")
    energy_of(stages.stage[2], TEXT, teacher, tmp_path, "cpu")
    before = weights_hash(tmp_path / "dfm")
    with torch.no_grad():
        next(teacher.parameters()).add_(1.0)
    teacher.save_pretrained(tmp_path / "dfm", {"source": "uniform"})
    assert weights_hash(tmp_path / "dfm") != before
    with pytest.raises(CheckpointError, match="other weights of 'dfm'"):
        energy_of(stages.stage[2], TEXT, teacher, tmp_path, "cpu")
    longer = DiT(DiTConfig(V, V, 2 * LENGTH, width=16, blocks=2, heads=2, condition=8))
    with pytest.raises(CheckpointError, match="has length 8"):
        energy_of(stages.stage[2], TEXT, longer, tmp_path, "cpu")


def test_the_oracle_compass_needs_a_known_law(tmp_path) -> None:
    stages = recipe(compass="oracle")
    with pytest.raises(UsageError, match="no exact law"):
        energy_of(stages.stage[2], TEXT, network(), tmp_path, "cpu")


def test_tau_above_one_is_refused_in_a_recipe() -> None:
    with pytest.raises(UsageError, match="tau must be a number from 0 to 1 "):
        recipe(shaping={"tau": 1.5})
