"""The trainer: exact resume, foreign or damaged states refused, divergence, recipes, the whole chain in miniature."""

from __future__ import annotations

import json
from dataclasses import replace

import accelerate
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tsdfm_bench.api import SampleRequest
from tsdfm_bench.errors import CheckpointError, UsageError
from tsdfm_bench.methods.dfm import DFM
from tsdfm_bench.methods.nets.causal import CausalConfig, CausalTransformer
from tsdfm_bench.methods.train import command
from tsdfm_bench.methods.train.data import TrainingText
from tsdfm_bench.methods.train.objectives import ARObjective, StepResult
from tsdfm_bench.methods.train.optim import learning_rate, orthogonalise
from tsdfm_bench.methods.train.recipe import Recipe, load_recipe
from tsdfm_bench.methods.train.trainer import STATE_FILE, Trainer, TrainingConfig, digest_of
from tsdfm_bench.rng import Streams

STREAM = np.random.default_rng(0).integers(0, 12, 4000)
TEXT = TrainingText("toy", {"train": STREAM, "validation": STREAM[:1500]}, 12, 8, "toy@1", "sha256:toy")
CONFIG = TrainingConfig(steps=8, batch=4, lr=1e-2, warmup=2, optimizer="muon", validate_every=4, save_every_s=1e9)


def trainer(folder=None, config: TrainingConfig = CONFIG, objective=None) -> Trainer:
    torch.manual_seed(0)
    network = CausalTransformer(CausalConfig(12, 8, width=16, blocks=2, heads=2))
    return Trainer("toy", network, lambda ema: objective or ARObjective(12), TEXT, config, folder)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resumed_training_is_bit_identical(tmp_path, optimizer: str) -> None:
    config = TrainingConfig(**{**vars(CONFIG), "optimizer": optimizer})
    whole = trainer(config=config)
    whole.train()
    first = trainer(tmp_path, config)
    first.train(until=3)
    second = trainer(tmp_path, config)
    assert second.resume()
    assert second.step == 3
    second.train()
    for a, b in ((whole.plain, second.plain), (whole.ema, second.ema)):
        for name, tensor in a.state_dict().items():
            assert torch.equal(tensor, b.state_dict()[name]), name
    assert [h["bound"] for h in whole.history] == [h["bound"] for h in second.history]


def test_training_reaches_the_entropy_of_a_cycle() -> None:
    """Only the first of eight tokens is uncertain: the exact NLL per token is log(12) / 8."""
    pattern = np.tile(np.arange(12), 300)
    text = TrainingText("cycle", {"train": pattern, "validation": pattern[:600]}, 12, 8, "toy@1", "sha256:cycle")
    config = TrainingConfig(steps=60, batch=16, lr=1e-2, warmup=5, optimizer="adamw", ema=0.9, validate_every=20)
    torch.manual_seed(0)
    network = CausalTransformer(CausalConfig(12, 8, width=32, blocks=1, heads=2))
    result = Trainer("cycle", network, lambda ema: ARObjective(12), text, config).train()
    assert np.log(12) / 8 - 0.01 < result.bound < 1.2 * np.log(12) / 8


def test_state_of_another_recipe_is_refused(tmp_path) -> None:
    trainer(tmp_path).train(until=2)
    with pytest.raises(CheckpointError, match="another recipe"):
        trainer(tmp_path, TrainingConfig(**{**vars(CONFIG), "lr": 2e-2})).resume()


@pytest.mark.parametrize("damage", ["cut", "flip", "step"])
def test_a_damaged_state_is_put_aside_and_the_training_begins_again(tmp_path, damage) -> None:
    trainer(tmp_path).train(until=2)
    path = tmp_path / STATE_FILE
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[-40] ^= 4  # inside a tensor: the file is still valid safetensors
    if damage == "step":
        assert b'\\"step\\": 2,' in content
        content = content.replace(b'\\"step\\": 2,', b'\\"step\\": 6,')
    path.write_bytes(content[:-50] if damage == "cut" else content)
    again = trainer(tmp_path)
    with pytest.warns(UserWarning, match="moved to damaged-state.safetensors, and 'toy' is trained from the start"):
        assert not again.resume()
    assert again.step == 0
    assert not path.exists()
    assert (tmp_path / f"damaged-{STATE_FILE}").read_bytes() == (content[:-50] if damage == "cut" else bytes(content))


def test_a_state_of_an_older_version_is_read(tmp_path) -> None:
    """Its digest is of the tensors alone."""
    trainer(tmp_path).train(until=2)
    path = tmp_path / STATE_FILE
    with safe_open(str(path), framework="pt") as handle:
        about = handle.metadata()["about"]
    tensors = load_file(str(path))
    save_file(tensors, str(path), {"about": about, "sha256": digest_of(tensors)})
    again = trainer(tmp_path)
    assert again.resume()
    assert again.step == 2


class Exploding(ARObjective):
    """Finite for two steps."""

    def loss(self, network, x_1, draws) -> StepResult:
        result = super().loss(network, x_1, draws)
        return StepResult(result.loss * (float("nan") if draws.step > 2 else 1.0), {})


def test_divergence_stops_with_its_step_and_keeps_the_last_state(tmp_path) -> None:
    config = TrainingConfig(**{**vars(CONFIG), "save_every_s": 0.0})
    with pytest.raises(FloatingPointError, match=r"'toy'.* at step 3"):
        trainer(tmp_path, config, Exploding(12)).train()
    again = trainer(tmp_path, config)
    assert again.resume()
    assert again.step == 2


class Steep(ARObjective):
    """From step 3 on a finite loss whose gradient is not: sqrt at 0."""

    def loss(self, network, x_1, draws) -> StepResult:
        value = super().loss(network, x_1, draws).loss
        return StepResult(value + ((value - value.detach()).sqrt() if draws.step > 2 else 0.0), {})


class Sick(ARObjective):
    """The loss of window 2 has no value from the third step on."""

    def loss(self, network, x_1, draws) -> StepResult:
        sick = (draws.streams.sequences == 2).any() and draws.step > 2
        return StepResult(super().loss(network, x_1, draws).loss * (float("nan") if sick else 1.0), {})


def test_a_loss_that_is_not_finite_names_its_windows(tmp_path) -> None:
    said = r"'toy' stopped at step 3 of 8: the loss is nan in 1 of 4 windows \(numbers 2 of the step's 4\); the state"
    with pytest.raises(FloatingPointError, match=said):
        trainer(tmp_path, CONFIG, Sick(12)).train()


@pytest.mark.parametrize("steps", [3, 8])
def test_a_gradient_that_is_not_finite_changes_no_weights(tmp_path, steps: int) -> None:
    """Also in the last step, whose weights would be delivered; the loss itself is finite."""
    config = TrainingConfig(**{**vars(CONFIG), "steps": steps})
    said = (
        rf"'toy' stopped at step 3 of {steps}: the norm of the gradient is (inf|nan), at a loss of \d.*after step 2 is"
    )
    with pytest.raises(FloatingPointError, match=said):
        trainer(tmp_path, config, Steep(12)).train()
    again, whole = trainer(tmp_path, config), trainer(config=config)
    assert again.resume()
    whole.train(until=2)
    for name, tensor in whole.ema.state_dict().items():
        assert torch.equal(tensor, again.ema.state_dict()[name]), name


@pytest.mark.parametrize("save_every_s", [0.0, 1e9])
def test_weights_that_are_not_finite_are_neither_saved_nor_returned(tmp_path, monkeypatch, save_every_s: float) -> None:
    """Loss and gradient of the only step are finite, its update is not."""
    training = trainer(tmp_path, TrainingConfig(**{**vars(CONFIG), "steps": 1, "save_every_s": save_every_s}))
    (weight, *_) = training.plain.parameters()
    monkeypatch.setattr(training.optimizers[0], "step", lambda: weight.data.fill_(float("inf")))
    with pytest.raises(FloatingPointError, match=r"step 1 of 1: the weights are not finite.*nothing was saved yet"):
        training.train()
    assert not (tmp_path / STATE_FILE).exists()


class Unbounded(ARObjective):
    """A validation without a finite value."""

    def bound(self, network, x_1, draws) -> torch.Tensor:
        return torch.full((x_1.shape[0],), float("inf"))


@pytest.mark.parametrize("steps", [4, 8])
def test_a_validation_that_is_not_finite_is_an_error(tmp_path, steps: int) -> None:
    config = TrainingConfig(**{**vars(CONFIG), "steps": steps})
    training = trainer(tmp_path, config, Unbounded(12))
    with pytest.raises(FloatingPointError, match=rf"stopped at step 4 of {steps}: the validation is inf"):
        training.train()
    assert training.history == []


def test_a_state_whose_weights_are_not_finite_is_put_aside(tmp_path) -> None:
    broken = trainer(tmp_path)
    with torch.no_grad():
        next(broken.plain.parameters())[0, 0] = float("nan")
    broken.save()
    with pytest.warns(UserWarning, match="its weights are not finite"):
        assert not trainer(tmp_path).resume()


class Large(ARObjective):
    """Training and validation that run out of memory with more than `most` windows at once."""

    most = 1

    def _check(self, x_1: torch.Tensor) -> None:
        if x_1.shape[0] > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def loss(self, network, x_1, draws) -> StepResult:
        self._check(x_1)
        return super().loss(network, x_1, draws)

    def bound(self, network, x_1, draws) -> torch.Tensor:
        self._check(x_1)
        return super().bound(network, x_1, draws)


@pytest.mark.usefixtures("in_fp32")
def test_a_training_out_of_memory_goes_on_with_smaller_passes_and_reaches_the_same_network(monkeypatch) -> None:
    whole = trainer()
    whole.train()
    monkeypatch.setattr(Large, "most", 2)
    parts = trainer(objective=Large(12))
    with pytest.warns(UserWarning, match="do not fit into the GPU's memory") as caught:
        parts.train()
    said = [str(warning.message) for warning in caught if "do not fit" in str(warning.message)]
    assert len(said) == 2  # one for the steps, one for the validations
    assert "'toy': 4 windows a pass" in said[0]
    assert "goes on with 2, with the same random numbers" in said[0]
    assert parts.flops == whole.flops  # what failed is not counted
    assert parts.history[-1]["bound"] == pytest.approx(whole.history[-1]["bound"], rel=1e-5)
    for name, tensor in whole.ema.state_dict().items():
        torch.testing.assert_close(parts.ema.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)


def test_a_window_that_does_not_fit_into_memory_ends_the_training_with_what_to_set(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(Large, "most", 0)
    with pytest.raises(MemoryError, match=r"'toy' stopped at step 1 of 8: one window does not fit.*\[network\]; the"):
        trainer(tmp_path, objective=Large(12)).train()
    assert trainer(tmp_path).resume()


def test_several_processes_do_not_try_again_alone(monkeypatch) -> None:
    training = trainer(objective=Large(12))
    monkeypatch.setattr("accelerate.Accelerator.num_processes", property(lambda _: 2))
    training.pass_windows = 2
    with pytest.raises(MemoryError, match=r"2 windows a pass do not fit.*set micro_batch = 1"):
        training.train()


@pytest.mark.parametrize(("gpu", "asked", "compiled"), [(True, None, True), (True, False, False), (False, None, False)])
def test_blocks_are_compiled_on_a_gpu_unless_asked_not_to(monkeypatch, in_fp32, gpu, asked, compiled) -> None:
    """Those of the network and of its average; the training takes the CPU for a GPU."""
    made, real = [], accelerate.Accelerator

    def on_the_cpu(**settings):
        assert settings["cpu"] is not gpu
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        return real(**settings | {"cpu": True})

    monkeypatch.setattr(accelerate, "Accelerator", on_the_cpu)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: int(gpu))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a GPU")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(torch, "compile", lambda call, **_: made.append(call.__self__))
    training = trainer(config=CONFIG if asked is None else replace(CONFIG, compile=asked))
    blocks = [*training.plain.blocks, *training.ema.blocks]
    assert made == (blocks if compiled else [])


def test_learning_rate_warms_up_and_decays() -> None:
    rates = [learning_rate(step, 100, 10, 1.0) for step in range(1, 101)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(0.1)
    assert rates[9:] == sorted(rates[9:], reverse=True)


@pytest.mark.parametrize("shape", [(8, 8), (24, 8), (8, 24)])
def test_orthogonalise_brings_singular_values_near_one(shape: tuple[int, int]) -> None:
    torch.manual_seed(1)
    values = torch.linalg.svdvals(orthogonalise(torch.randn(shape)))
    assert values.min() > 0.5
    assert values.max() < 1.3


def miniature() -> Recipe:
    stages = [
        {"name": "dfm-uniform", "kind": "dfm", "source": "uniform"},
        {"name": "dfm-mask", "kind": "dfm", "source": "mask", "options": {"loss_name": "generalised_kl"}},
        {"name": "ar", "kind": "ar"},
        {"name": "mdlm", "kind": "mdlm", "source": "mask", "start_from": "dfm-mask"},
        {"name": "sedd-mask", "kind": "sedd", "source": "mask", "start_from": "dfm-mask"},
        {"name": "sedd-uniform", "kind": "sedd", "source": "uniform", "options": {"parameterisation": "posterior"}},
        {
            "name": "fsdfm-mask",
            "kind": "fsdfm",
            "source": "mask",
            "teacher": "dfm-mask",
            "options": {"path_weight": "gbar"},
        },
    ]
    for source in ("uniform", "mask"):
        stages.append(
            {"name": f"compass-{source}", "kind": "compass", "source": source, "teacher": f"dfm-{source}", "blocks": 1}
        )
        stages.append(
            {
                "name": f"tsdfm-{source}",
                "kind": "tsdfm",
                "source": source,
                "teacher": f"dfm-{source}",
                "compass": f"compass-{source}",
                "options": {"h_law": "uniform", "small_h_target": "kl_frozen_teacher"},
                "shaping": {"tau": 0.25, "candidates": 2},
                "despite_checks": True,  # two steps make no compass
            }
        )
    network = {"width": 16, "blocks": 2, "heads": 2, "condition": 8, "fuser_init": "identity_preserving"}
    start = {"unigram_bias": True, "gate": 1.0, "spectral": True, "spectral_head": 0.05}
    training = {"steps": 2, "batch": 4, "lr": 1e-3, "warmup": 1, "optimizer": "muon"}
    return Recipe(scale="toy", task="toy", network=network, start=start, training=training, stage=stages)


def test_every_kind_of_network_trains_in_dependency_order_and_is_not_trained_twice(tmp_path) -> None:
    recipe = miniature()
    said: list[str] = []
    command.train_recipe(recipe, TEXT, tmp_path, announce=said.append)
    for stage in recipe.stage:
        config = json.loads((tmp_path / stage.name / "config.json").read_text())
        assert np.isfinite(config["validation"]["value"])
        assert config["tokens_seen"] == 2 * 4 * 8
        card = (tmp_path / stage.name / "README.md").read_text()
        assert f"{config['validation']['value']:.4f}" in card
    assert not any((tmp_path / command.STATE_FOLDER).glob("*"))
    said.clear()
    (tmp_path / "ar" / "README.md").unlink()  # as an end between its files leaves them
    command.train_recipe(recipe, TEXT, tmp_path, announce=said.append)
    assert all("trained already" in line for line in said)
    assert len(said) == len(recipe.stage)
    assert (tmp_path / "ar" / "README.md").is_file()


def test_a_card_cites_the_text_as_its_task_does(tmp_path) -> None:
    """And says nothing of licences by itself: the text may be anybody's."""
    text = replace(TEXT, citation="A corpus | CC BY-SA")
    command.train_recipe(miniature(), text, tmp_path, only=["ar"])
    card = (tmp_path / "ar" / "README.md").read_text()
    assert "| source of the text | A corpus \\| CC BY-SA |" in card
    assert "public domain" not in card
    assert "Apache" not in card


def test_what_the_generalised_kl_trains_is_sampled_at_the_times_it_saw(tmp_path) -> None:
    """1,023 steps of 1,024, by what the checkpoint says of itself; after cross entropy all of them."""
    command.train_recipe(miniature(), TEXT, tmp_path, only=["dfm-uniform", "dfm-mask"])
    for source, states in (("uniform", 1024), ("mask", 1023)):
        params = {"checkpoint": str(tmp_path), "task": "toy", "vocab_size": 12, "source": source, "length": 8}
        request = SampleRequest(Streams.of(0, "x", 1), 8, 1024, source=source, trace=True)
        assert DFM.load(params, "cpu").sample(request).trace.shape[1] == states


def test_a_stage_without_its_teacher_says_what_to_train(tmp_path) -> None:
    recipe = miniature()
    with pytest.raises(CheckpointError, match=r"needs dfm-mask.*--only dfm-mask"):
        command.train_recipe(recipe, TEXT, tmp_path, only=["fsdfm-mask"])


def test_recipes_refuse_what_cannot_work() -> None:
    base = miniature().model_dump()
    for change, words in [
        ({"source": "mask"}, "its teacher has"),
        ({"teacher": "nobody"}, "not an earlier stage"),
        ({"training": {"stepz": 3}}, "unknown key of training 'stepz'"),
        ({"shaping": {"candidates": 0}}, "candidates must be a whole number from 1 to 64, not 0"),
    ]:
        broken = json.loads(json.dumps(base))
        broken["stage"][-3].update(change)
        with pytest.raises((ValueError, UsageError), match=words):
            Recipe(**broken)


def test_unknown_scale_names_the_known_ones(tmp_path) -> None:
    with pytest.raises(UsageError, match="did you mean 'sotu'"):
        load_recipe("sotuu")
    (tmp_path / "bad.toml").write_text("scale = ")
    with pytest.raises(UsageError, match="not valid TOML"):
        load_recipe(str(tmp_path / "bad.toml"))
    assert len(load_recipe("sotu").stage) >= 12
