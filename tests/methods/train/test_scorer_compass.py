"""A language model in the compass's place: what it judges, that it is counted, and that a student learns from it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from tsdfm_bench.errors import CheckpointError, UsageError
from tsdfm_bench.methods.nets.causal import CausalConfig, CausalTransformer
from tsdfm_bench.methods.nets.dit import DiT, DiTConfig
from tsdfm_bench.methods.nets.pretrained import read_config
from tsdfm_bench.methods.train.build import build_objective, energy_of
from tsdfm_bench.methods.train.command import train_recipe
from tsdfm_bench.methods.train.data import Draws, TrainingText
from tsdfm_bench.methods.train.flops import networks_in
from tsdfm_bench.methods.train.recipe import Recipe
from tsdfm_bench.methods.train.records import settings_of
from tsdfm_bench.methods.train.scorer_compass import ROWS, CompletedEnergy
from tsdfm_bench.methods.train.shaping import ShapingChooser, ShapingConfig

V, LENGTH = 6, 8
STREAM = np.tile(np.arange(V), 300)
TEXT = TrainingText("cycle", {"train": STREAM, "validation": STREAM}, V, LENGTH, "cycle@1", "sha256:cycle")


def shaken(network: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.4 * torch.randn_like(parameter))
    return network.eval()


def teacher(source: str) -> DiT:
    torch.manual_seed(0)
    outputs = V + (source == "mask")
    found = shaken(DiT(DiTConfig(V, outputs, LENGTH, width=16, blocks=2, heads=2, condition=8)))
    assert isinstance(found, DiT)
    return found


def reader() -> CausalTransformer:
    torch.manual_seed(1)
    found = shaken(CausalTransformer(CausalConfig(V, LENGTH, width=16, blocks=1, heads=2)))
    assert isinstance(found, CausalTransformer)
    return found


def states_of(source: str, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    states = torch.randint(0, V + (source == "mask"), (rows, LENGTH), generator=generator)
    return states, torch.rand(rows, generator=generator, dtype=torch.float64)


def wrong_steps(tokens: np.ndarray) -> np.ndarray:
    """Share of tokens that do not go on in the cycle."""
    return (tokens[:, 1:] != (tokens[:, :-1] + 1) % V).mean(axis=1)


@pytest.mark.parametrize("source", ["uniform", "mask"])
def test_the_energy_is_the_nll_of_the_completed_state(source: str) -> None:
    """Written out for every row alone: the teacher's likeliest tokens, then next-token NLLs behind the first id."""
    model, judge = teacher(source), reader()
    states, time = states_of(source, ROWS + 7)
    found = CompletedEnergy(model, V, judge)(states, time, states)
    assert found.shape == states.shape
    for row in (0, 1, ROWS - 1, ROWS, ROWS + 6):
        with torch.no_grad():
            likely = model(states[row : row + 1], time[row : row + 1].float())[0, :, :V].argmax(dim=-1)
            whole = torch.where(states[row] == V, likely, states[row]) if source == "mask" else likely
            logits = judge(torch.cat([torch.zeros(1, dtype=torch.int64), whole[:-1]])[None])[0]
        expected = -logits.log_softmax(dim=-1)[torch.arange(LENGTH), whole]
        torch.testing.assert_close(found[row], expected, rtol=1e-4, atol=1e-5)


def test_a_scorer_gives_every_token_the_sequences_mean() -> None:
    energy = CompletedEnergy(teacher("mask"), V, judge=wrong_steps)
    states, time = states_of("mask", 5)
    found = energy(states, time, states)
    expected = wrong_steps(energy.completed(states, time).numpy())
    torch.testing.assert_close(found, torch.from_numpy(expected).float()[:, None].expand(5, LENGTH))


def test_with_a_scorer_tokens_and_sequences_are_chosen_alike() -> None:
    """Energies that are constant in a sequence leave nothing to mix."""
    energy = CompletedEnergy(teacher("mask"), V, judge=wrong_steps)
    pool = torch.stack([states_of("mask", 6)[0].roll(k, dims=0) for k in range(3)])
    late = torch.full((6,), 0.9, dtype=torch.float64)
    picks = []
    for policy in ("seq", "token"):
        chooser = ShapingChooser(ShapingConfig(candidates=3, policy=policy), energy)
        picks.append(chooser(pool, pool[0], late, late, 0, Draws(0, "x", 0, 6, "cpu")))
    assert torch.equal(picks[0], picks[1])
    assert not torch.equal(picks[0], pool[0])


def recipe(compass: str, **student: object) -> Recipe:
    stages = [
        {"name": "ar", "kind": "ar"},
        {"name": "dfm", "kind": "dfm", "source": "uniform"},
        {"name": "student", "kind": "tsdfm", "source": "uniform", "teacher": "dfm", "compass": compass, **student},
    ]
    return Recipe(
        scale="tiny",
        task="cycle",
        network={"width": 16, "blocks": 1, "heads": 2, "condition": 8},
        training={"batch": 4, "steps": 2, "lr": 1e-3, "warmup": 1, "validate_every": 2},
        stage=stages,
    )


def test_a_judge_that_is_no_language_model_is_refused() -> None:
    with pytest.raises(ValueError, match="names no stage of kind ar"):
        recipe("network:dfm")
    with pytest.raises(ValueError, match="needs 'nobody', which is not an earlier stage"):
        recipe("network:nobody")
    with pytest.raises(ValueError, match="scorer:SPEC"):
        recipe("dfm")


@pytest.mark.parametrize(("compass", "needs"), [("network:ar", ["dfm", "ar"]), ("scorer:any[window=5]", ["dfm"])])
def test_it_is_a_control_of_its_own(compass: str, needs: list[str]) -> None:
    stage = recipe(compass).stage[2]
    assert stage.control == "scorer"
    assert stage.needs == needs
    assert settings_of(stage, 2)["compass"] == compass
    assert recipe(compass, shaping={"rule": "random"}).stage[2].control == "random_pick"


def test_text_without_scorers_or_of_another_size_is_refused(tmp_path) -> None:
    with pytest.raises(UsageError, match="no scorers are at hand for text 'cycle'"):
        energy_of(recipe("scorer:any").stage[2], TEXT, teacher("uniform"), tmp_path, "cpu")
    CausalTransformer(CausalConfig(V + 1, LENGTH, width=16, blocks=1, heads=2)).save_pretrained(tmp_path / "ar", {})
    with pytest.raises(CheckpointError, match="has vocab_size 7, the text 'cycle' 6"):
        energy_of(recipe("network:ar").stage[2], TEXT, teacher("uniform"), tmp_path, "cpu")


def test_students_are_trained_with_either(tmp_path) -> None:
    asked: list[str] = []

    def judges(spec: str):
        asked.append(spec)
        return wrong_steps

    text = replace(TEXT, judges=judges)
    for compass in ("network:ar", "scorer:toy[window=5]"):
        plan = recipe(compass, shaping={"tau": 0.0})
        assert train_recipe(plan, text, tmp_path, announce=lambda line: None) == []
        config = read_config(tmp_path / "student")
        assert config["recipe"]["stage"]["compass"] == compass
        made = build_objective(plan.stage[2], plan, text, tmp_path, "cpu")(teacher("uniform"))
        # the operations of the judge, and of the teacher that completes for it, are counted
        kinds = [type(network).__name__ for network in networks_in(made)]
        assert kinds.count("CausalTransformer") == (compass == "network:ar")
        for path in sorted((tmp_path / "student").iterdir()):
            path.unlink()
    assert set(asked) == {"toy[window=5]"}
