"""Networks and objectives of a recipe's stages: from nothing, from an earlier stage, or from a frozen teacher."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from tsdfm_bench.errors import CheckpointError, UsageError
from tsdfm_bench.methods.nets.causal import CausalConfig, CausalTransformer
from tsdfm_bench.methods.nets.compass import Compass
from tsdfm_bench.methods.nets.dit import Block, DiT, DiTConfig
from tsdfm_bench.methods.nets.pretrained import PretrainedNetwork, read_config
from tsdfm_bench.methods.train.card import weights_hash
from tsdfm_bench.methods.train.compass import CompassObjective
from tsdfm_bench.methods.train.data import TrainingText
from tsdfm_bench.methods.train.objectives import (
    ARObjective,
    DFMObjective,
    MDLMObjective,
    Objective,
    SEDDObjective,
)
from tsdfm_bench.methods.train.options import COMPASS_SEES
from tsdfm_bench.methods.train.recipe import ORACLE, Recipe, Stage
from tsdfm_bench.methods.train.scorer_compass import judged_by_model
from tsdfm_bench.methods.train.shaping import Energy, ShapingChooser, ShapingConfig
from tsdfm_bench.methods.train.shortcut import BlindChooser, ShortcutObjective

MakeObjective = Callable[[nn.Module], Objective]


def outputs_of(stage: Stage, vocab_size: int) -> int:
    """Embedding rows and logits: one more than V with the mask source."""
    return vocab_size + 1 if stage.source == "mask" or stage.kind == "mdlm" else vocab_size


def spectral_embedding(stream: np.ndarray, vocab_size: int, width: int) -> Tensor:
    """Token vectors from the neighbours' positive pointwise mutual information (Levy and Goldberg, NeurIPS 2014).

    Half of the width holds a token's left singular vector (what follows it), half its right one (what precedes it),
    scaled to unit variance per token; a vocabulary of fewer than width / 2 tokens leaves the rest of each half 0.
    (V, width) fp32.
    """
    counts = np.zeros((vocab_size, vocab_size))
    np.add.at(counts, (stream[:-1], stream[1:]), 1)
    expected = (counts.sum(1, keepdims=True) + 1) * (counts.sum(0, keepdims=True) + 1) / counts.sum()
    pmi = torch.from_numpy(np.log(np.maximum(counts / expected, 1.0))).float()
    left, values, right = torch.linalg.svd(pmi)
    half = width // 2
    rank = min(half, vocab_size)
    scale = values[:rank].sqrt()
    halves = (side[:, :rank] * scale for side in (left, right.T))
    vectors = torch.cat([nn.functional.pad(side, (0, half - rank)) for side in halves], dim=1)
    vectors = vectors - vectors.mean(dim=0)
    return vectors / vectors.norm(dim=1, keepdim=True).clamp_min(1e-3) * vectors.shape[1] ** 0.5


def initialise(network: DiT | CausalTransformer, recipe: Recipe, text: TrainingText) -> None:
    """Apply the recipe's `[start]` table to a fresh network."""
    start = recipe.start
    size = text.vocab_size
    with torch.no_grad():
        head = network.output.linear if isinstance(network, DiT) else network.head
        if start.spectral:
            vectors = spectral_embedding(text.streams["train"], size, network.config.width)
            network.embedding.weight[:size] = vectors
            head.weight[:size] = start.spectral_head * vectors.roll(vectors.shape[1] // 2, dims=1)
        if start.unigram_bias:
            head.bias[:size] = text.unigram()
            head.bias[size:] = -20.0  # a mask id is never a clean token
        if isinstance(network, DiT) and start.gate:
            width = network.config.width
            for block in network.blocks:
                assert isinstance(block, Block)
                for part in (2, 5):  # gate_a and gate_m of the six chunks
                    block.adaln.bias[part * width : (part + 1) * width] = start.gate


def copy_weights(network: DiT, donor: DiT) -> None:
    """Start from an earlier network: tensors of equal name; rows beyond the shorter vocabulary stay as they are."""
    own = network.state_dict()
    for name, theirs in donor.state_dict().items():
        if name not in own:
            raise CheckpointError(f"cannot start from these weights: {name} has no counterpart")
        if own[name].shape == theirs.shape:
            own[name].copy_(theirs)
        elif own[name].shape[1:] == theirs.shape[1:]:
            rows = min(own[name].shape[0], theirs.shape[0])
            own[name][:rows] = theirs[:rows]
        else:
            raise CheckpointError(
                f"cannot start from these weights: {name} is {tuple(theirs.shape)}, needed {tuple(own[name].shape)}"
            )
    network.load_state_dict(own)


def forget_time(network: DiT, time: float) -> None:
    """Make a network answer as it did at one time, whatever scalar it is given; training may undo it.

    Needed where a network starts from one that was conditioned on another scalar (t against 0 or sigma). With the mask
    source little is lost: the exact posterior does not depend on time.
    """
    inner, outer = network.time.mlp[0], network.time.mlp[-1]
    assert isinstance(inner, nn.Linear)
    assert isinstance(outer, nn.Linear)
    with torch.no_grad():
        wanted = network.time(torch.tensor([time]))[0]
        inner.weight.zero_()
        outer.bias.add_(wanted - network.time(torch.tensor([time]))[0])


def new_network(stage: Stage, recipe: Recipe, vocab_size: int, length: int, bos_id: int = 0) -> DiT | CausalTransformer:
    """The network of a generator's stage, as its architecture initialises it; not for compasses.

    Args:
        stage, recipe: geometry and kind.
        vocab_size, length: of the text.
        bos_id: end-of-text id, which stands before the first token (AR).
    """
    net = recipe.network
    if stage.kind == "ar":
        size = {"width": net.width, "blocks": net.blocks, "heads": net.heads}
        return CausalTransformer(CausalConfig(vocab_size, length, bos_id=bos_id, **size, dropout=net.dropout))
    return DiT(
        DiTConfig(
            vocab_size,
            outputs_of(stage, vocab_size),
            length,
            width=net.width,
            blocks=net.blocks,
            heads=net.heads,
            condition=net.condition,
            dropout=net.dropout,
            step_aware=stage.kind in ("fsdfm", "tsdfm"),
            time_scale=net.time_scale,
            fuser_init=net.fuser_init,
        )
    )


def teacher_of(stage: Stage, text: TrainingText, folder: Path, device: str = "cpu") -> DiT:
    """The frozen teacher of a stage.

    Raises:
        CheckpointError: it was trained from another source, or on another vocabulary, length or tokenizer.
    """
    path = folder / stage.teacher
    teacher, about = DiT.from_pretrained(path, device).requires_grad_(False), read_config(path)
    outputs = outputs_of(stage, text.vocab_size)
    for what, theirs, needed in (
        ("source", about.get("source", stage.source), stage.source),
        ("tokenizer", about.get("tokenizer", text.tokenizer), text.tokenizer),
        ("vocab_size", teacher.config.vocab_size, text.vocab_size),
        ("outputs", teacher.config.outputs, outputs),
        ("length", teacher.config.length, text.length),
    ):
        if theirs != needed:
            raise CheckpointError(
                f"teacher {path} has {what} {theirs}, stage '{stage.name}' needs {needed}; train it again: delete "
                f"{path}, or choose another output folder"
            )
    return teacher


def build_network(stage: Stage, recipe: Recipe, text: TrainingText, folder: Path) -> PretrainedNetwork:
    """The network of a stage before its first step; earlier stages are read from `folder`."""
    torch.manual_seed(recipe.training_of(stage).seed)
    if stage.kind == "compass" and stage.start_from:
        return Compass.from_pretrained(folder / stage.start_from)
    if stage.kind == "compass":
        teacher = teacher_of(stage, text, folder)
        return Compass.from_teacher(
            teacher, stage.blocks, **{key: bool(stage.options.get(key)) for key in COMPASS_SEES}
        )
    network = new_network(stage, recipe, text.vocab_size, text.length, text.end_of_text)
    initialise(network, recipe, text)
    if isinstance(network, CausalTransformer):
        return network
    if stage.start_from:
        copy_weights(network, DiT.from_pretrained(folder / stage.start_from))
    elif stage.teacher:
        copy_weights(network, teacher_of(stage, text, folder))
    if stage.forget_time is not None:
        forget_time(network, stage.forget_time)
    return network


def energy_of(stage: Stage, text: TrainingText, teacher: DiT, folder: Path, device: str) -> Energy:
    """The compass of a student.

    Raises:
        UsageError: the oracle is asked for and the task's law is not known.
        CheckpointError: the compass does not fit: another vocabulary, length or teacher.
    """
    if stage.compass == ORACLE:
        if text.energy is None:
            raise UsageError(f"stage '{stage.name}': task '{text.name}' has no exact law; name a compass stage instead")
        return cast("Energy", text.energy(stage.source))
    if not stage.compass_stage:
        return judged_by_model(stage.compass, text, teacher, folder, device)
    path = folder / stage.compass
    compass = Compass.from_pretrained(path, device).requires_grad_(False)
    for name in ("vocab_size", "outputs", "length"):
        theirs, ours = getattr(compass.config, name), getattr(teacher.config, name)
        if theirs != ours:
            raise CheckpointError(f"compass {path} has {name} {theirs}, the teacher '{stage.teacher}' {ours}")
    made_with = read_config(path).get("teacher_hash")
    if made_with is not None and made_with != weights_hash(folder / stage.teacher):
        raise CheckpointError(
            f"compass {path} was trained with other weights of '{stage.teacher}' than {folder / stage.teacher} now "
            f"has; train it again: delete {path}"
        )
    return compass


def build_objective(stage: Stage, recipe: Recipe, text: TrainingText, folder: Path, device: str) -> MakeObjective:
    """How to make the stage's objective once the trainer has its EMA copy."""
    size, outputs = text.vocab_size, outputs_of(stage, text.vocab_size)
    options: Mapping[str, Any] = {k: v for k, v in stage.options.items() if k not in COMPASS_SEES}
    if stage.kind == "ar":
        return lambda ema: ARObjective(size, text.end_of_text)
    if stage.kind == "mdlm":
        return lambda ema: MDLMObjective(size)
    if stage.kind == "sedd":
        return lambda ema: SEDDObjective(size, outputs, **options)
    if stage.kind == "dfm":
        return lambda ema: DFMObjective(size, outputs, **options)
    frozen = teacher_of(stage, text, folder, device)
    if stage.kind == "compass":
        builder = DiT.from_pretrained(folder / stage.builder, device).requires_grad_(False) if stage.builder else frozen
        aware = builder.config.step_aware
        return lambda ema: CompassObjective(size, outputs, builder, aware, **options)
    if stage.kind == "fsdfm":
        return lambda ema: ShortcutObjective(size, outputs, ema, frozen, choose=BlindChooser(), **options)
    compass = energy_of(stage, text, frozen, folder, device)
    chooser = ShapingChooser(ShapingConfig(**stage.shaping), compass, recipe.training_of(stage).steps)
    return lambda ema: ShortcutObjective(size, outputs, ema, frozen, choose=chooser, **options)
