"""What a recipe would train, and one optimiser step of every stage, without its text and on a CPU.

Parameters are counted on networks without storage. Each stage is then built at full width with two blocks, on random
tokens of the recipe's vocabulary, and makes one step with its own objective, so that a missing teacher, a wrong option
or a loss that is not finite shows in a minute and not on a cluster. Later stages start from the earlier ones' networks,
as in a training. Maps that start at zero get small random values, or a student would agree with its teacher at once.
Where a recipe asks for the exact energy of its task's text, a rehearsal takes that of its own random tokens.

Estimates, named as such: operations by formula (`flops`), from the calls that the step made; memory per process

    16 bytes x parameters (fp32 weights, gradients, two Adam moments) + 4 x (average and frozen networks)
    + windows x length x (60 bytes x width x blocks + 12 bytes x outputs)           bf16 activations, logits in fp32
"""

from __future__ import annotations

import copy
import math
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tsdfm_bench.errors import UsageError
from tsdfm_bench.methods.nets.compass import Compass, CompassConfig
from tsdfm_bench.methods.nets.pretrained import PretrainedNetwork
from tsdfm_bench.methods.train.build import build_network, build_objective, new_network, outputs_of
from tsdfm_bench.methods.train.data import Draws, TrainingText
from tsdfm_bench.methods.train.flops import FlopMeter, forward_flops, networks_in
from tsdfm_bench.methods.train.options import COMPASS_SEES
from tsdfm_bench.methods.train.recipe import Recipe, Stage

BLOCKS, WINDOWS, LENGTH = 2, 8, 16
STREAM_TOKENS = 4096
ADAM_BYTES, FROZEN_BYTES = 16, 4
ACTIVATION_BYTES, LOGIT_BYTES = 60, 12


@dataclass(frozen=True)
class Rehearsal:
    """What one stage would be, and what its step did.

    Args:
        name, kind: of the stage.
        parameters: of the network at full depth.
        windows, length, steps: of its training.
        tokens: windows x length x steps.
        flops: operations of the whole training, estimated.
        memory_bytes: of one process, estimated.
        micro_batch: windows of one pass per process in that estimate.
        loss: of the step; the reduced network's.
        seconds: the step took.
    """

    name: str
    kind: str
    parameters: int
    windows: int
    length: int
    steps: int
    tokens: int
    flops: float
    memory_bytes: int
    micro_batch: int
    loss: float
    seconds: float


class RandomTokensEnergy(nn.Module):
    """The exact energy of noised random tokens: independent, all V equally likely, kappa(t) = t.

    A place that shows a token is one of V under uniform noise, and under mask noise with probability t / V; a mask is
    seen with probability 1 - t. It stands for `ExactHook.oracle("energy", source)`.

    Args:
        vocab_size: V.
        source: "mask" or "uniform".
    """

    def __init__(self, vocab_size: int, source: str) -> None:
        super().__init__()
        self.vocab_size, self.masked = vocab_size, source == "mask"

    def forward(self, tokens: Tensor, time: Tensor, origin: Tensor | None = None) -> Tensor:
        """(b, length) states at times (b,) -> (b, length) fp32 token energies; `origin` plays no role."""
        known = tokens < self.vocab_size
        chance = torch.where(known, time[:, None], 1 - time[:, None]) if self.masked else torch.ones(tokens.shape)
        share = torch.where(known, 1 / self.vocab_size, 1.0)
        return -(chance.double() * share).clamp_min(1e-300).log().float()


def full_network(stage: Stage, recipe: Recipe, vocab_size: int, length: int) -> PretrainedNetwork:
    """The stage's network without storage (device "meta"): for counting."""
    net = recipe.network
    with torch.device("meta"):
        if stage.kind != "compass":
            return new_network(stage, recipe, vocab_size, length)
        see_origin, changed_only = (bool(stage.options.get(key)) for key in COMPASS_SEES)
        return Compass(
            CompassConfig(
                vocab_size,
                outputs_of(stage, vocab_size),
                length,
                width=net.width,
                blocks=stage.blocks,
                heads=net.heads,
                condition=net.condition,
                dropout=net.dropout,
                time_scale=net.time_scale,
                see_origin=see_origin,
                changed_only=changed_only,
            )
        )


def parameter_count(stage: Stage, recipe: Recipe, vocab_size: int, length: int) -> int:
    """Trainable parameters of the stage's network at full size."""
    return sum(parameter.numel() for parameter in full_network(stage, recipe, vocab_size, length).parameters())


def rehearse(
    recipe: Recipe,
    only: list[str] | None = None,
    done: Callable[[Rehearsal], None] | None = None,
    exact: bool = True,
) -> None:
    """Rehearse every stage in order, and the stages they need.

    Args:
        recipe: states `vocab_size` and `length`.
        only: report these stages; None = all.
        done: called after each stage.
        exact: the law of the task's text is known, so that a stage may have the compass "oracle".

    Raises:
        UsageError: the recipe does not state its vocabulary and length, or asks for an exact energy that is not known.
        FloatingPointError: a loss is not finite.
    """
    if not recipe.vocab_size or not recipe.length:
        raise UsageError(f"recipe '{recipe.scale}' cannot be rehearsed: it does not state vocab_size and length")
    asked = [stage.name for stage in recipe.select(only)]
    reduced = _reduced(recipe)
    stream = np.random.default_rng(0).integers(0, recipe.vocab_size, STREAM_TOKENS)
    length = min(LENGTH, recipe.length)
    text = TrainingText(
        recipe.task,
        {"train": stream, "validation": stream},
        recipe.vocab_size,
        length,
        "none",
        "sha256:none",
        energy=partial(RandomTokensEnergy, recipe.vocab_size) if exact else None,
    )
    needed = _with_needs(recipe, asked)
    lends = {name for stage in recipe.stage if stage.name in needed for name in stage.needs}
    made: dict[str, Rehearsal] = {}
    with tempfile.TemporaryDirectory(prefix="tsdfm-bench-rehearsal-") as folder:
        for full, small in zip(recipe.stage, reduced.stage, strict=True):
            if full.name not in needed:
                continue
            result = _one_step(full, small, recipe, reduced, text, Path(folder), full.name in lends)
            result = made[full.name] = _as_trained(result, full, made)
            if done is not None and full.name in asked:
                done(result)


def _as_trained(result: Rehearsal, stage: Stage, made: Mapping[str, Rehearsal]) -> Rehearsal:
    """The steps a control really makes: none where a temperature is matched, those of equal operations."""
    if not stage.match and not stage.cost_of:
        return result
    share = 0.0 if stage.match else made[stage.cost_of].flops / result.flops
    steps = round(result.steps * share)
    flops, tokens = result.flops * steps / result.steps, result.tokens // result.steps * steps
    return replace(result, steps=steps, tokens=tokens, flops=flops)


def _with_needs(recipe: Recipe, names: list[str]) -> set[str]:
    needed = set(names)
    for stage in reversed(recipe.stage):
        if stage.name in needed:
            needed |= set(stage.needs)
    return needed


def _reduced(recipe: Recipe) -> Recipe:
    blocks = min(BLOCKS, recipe.network.blocks)
    stages = [stage.model_copy(update={"blocks": min(stage.blocks, blocks)}) for stage in recipe.stage]
    network = recipe.network.model_copy(update={"blocks": blocks, "dropout": 0.0})
    return recipe.model_copy(update={"network": network, "stage": stages})


def _one_step(
    full: Stage, small: Stage, recipe: Recipe, reduced: Recipe, text: TrainingText, folder: Path, lends: bool
) -> Rehearsal:
    training = recipe.training_of(full)
    begun = time.monotonic()
    network = build_network(small, reduced, text, folder)
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)
    average = copy.deepcopy(network).eval().requires_grad_(False)
    objective = build_objective(small, reduced, text, folder, "cpu")(average)
    others = [net for net in networks_in(objective) if net is not network]
    meters = {id(net): FlopMeter(net) for net in [network, *others]}
    optimizer = torch.optim.AdamW(network.parameters(), training.lr)
    draws = Draws(training.seed, f"rehearsal/{full.name}", 1, WINDOWS)
    loss = objective.loss(network.train(), text.windows("train", draws), draws).loss
    if not math.isfinite(loss.item()):
        raise FloatingPointError(f"stage '{full.name}': the loss of the first step is {loss.item()}")
    loss.backward()
    optimizer.step()
    seconds = time.monotonic() - begun
    if lends:
        network.save_pretrained(folder / full.name, {"method": full.kind, "source": full.source}, torch.bfloat16)
    whole = full_network(full, recipe, text.vocab_size, recipe.length)
    flops = 0.0
    for net in {id(net): net for net in [network, *others]}.values():
        passes = meters[id(net)].total / forward_flops(net, WINDOWS, text.length)
        at_full = whole if net is network or net is average else _at_full(net, recipe)
        flops += passes * forward_flops(at_full, training.batch, recipe.length) * training.steps
    parameters = sum(p.numel() for p in whole.parameters())
    frozen = {id(net): net for net in others if net is not average}.values()
    micro = min(training.micro_batch or training.batch, training.batch)
    outputs = getattr(whole.config, "outputs", whole.config.vocab_size) if full.kind != "compass" else 1
    memory = ADAM_BYTES * parameters + FROZEN_BYTES * (
        parameters + sum(_parameters(_at_full(n, recipe)) for n in frozen)
    )
    per_token = ACTIVATION_BYTES * whole.config.width * whole.config.blocks + LOGIT_BYTES * outputs
    return Rehearsal(
        full.name,
        full.kind,
        parameters,
        training.batch,
        recipe.length,
        training.steps,
        training.batch * recipe.length * training.steps,
        flops,
        memory + micro * recipe.length * per_token,
        micro,
        loss.item(),
        seconds,
    )


def _at_full(net: PretrainedNetwork, recipe: Recipe) -> PretrainedNetwork:
    """A reduced frozen network at the depth it has in a training, without storage."""
    blocks = recipe.network.blocks
    if isinstance(net, Compass):
        blocks = max((stage.blocks for stage in recipe.stage if stage.kind == "compass"), default=blocks)
    kind: Any = type(net)
    return _without_storage(kind, replace(net.config, blocks=blocks, length=recipe.length))


@lru_cache(maxsize=16)
def _without_storage(kind: Any, config: Any) -> PretrainedNetwork:
    with torch.device("meta"):
        network: PretrainedNetwork = kind(config)
    return network


def _parameters(net: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())
