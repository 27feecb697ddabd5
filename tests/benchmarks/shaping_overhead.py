"""What shaping costs a training step: TS-DFM against FS-DFM, measured in one process in turns.

    OMP_NUM_THREADS=1 python tests/benchmarks/shaping_overhead.py [--scale sotu] [--source uniform] [--steps 20]
                                                                  [--candidates 1,4,16] [--tau 0.5] [--profile]

Networks of the recipe's size with random weights, its batch, laws and precision; a step is loss, backward pass and
update. Seconds are CPU seconds of the process, so that other work on the machine counts little; the ratio is that of
medians over steps made in turns on the same windows. `--profile` lists the operations a shaped step spends its time in.
Not a test; the promise is a ratio of at most 1.4 at K = 4 with the recipe's compass.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from tsdfm_bench.methods.nets.compass import Compass
from tsdfm_bench.methods.nets.dit import DiT
from tsdfm_bench.methods.train.build import COMPASS_SEES, outputs_of
from tsdfm_bench.methods.train.data import Draws, TrainingText
from tsdfm_bench.methods.train.dryrun import full_network
from tsdfm_bench.methods.train.optim import make_optimizers
from tsdfm_bench.methods.train.recipe import Recipe, load_recipe
from tsdfm_bench.methods.train.shaping import ShapingChooser, ShapingConfig
from tsdfm_bench.methods.train.shortcut import BlindChooser, Chooser, ShortcutObjective
from tsdfm_bench.methods.train.trainer import mixed_precision

WARM_UP = 3


def network(recipe: Recipe, name: str) -> nn.Module:
    """The network of a stage at full size, random weights."""
    stage = next(stage for stage in recipe.stage if stage.name == name)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = full_network(stage, recipe, recipe.vocab_size, recipe.length).to_empty(device="cpu")
        for parameter in made.parameters():
            nn.init.normal_(parameter, std=0.05)
        for buffered in made.modules():
            for key, buffer in buffered.named_buffers(recurse=False):
                setattr(buffered, key, torch.rand_like(buffer))
    return made


def step_of(
    recipe: Recipe, source: str, student: nn.Module, frozen: nn.Module, choose: Chooser
) -> Callable[[int], None]:
    """A function that makes training step `number`."""
    stage = next(stage for stage in recipe.stage if stage.name == f"tsdfm-{source}")
    training = recipe.training_of(stage)
    learner = copy.deepcopy(student)
    average = copy.deepcopy(student).eval().requires_grad_(False)
    objective = ShortcutObjective(
        recipe.vocab_size, outputs_of(stage, recipe.vocab_size), average, frozen, choose=choose, **stage.options
    )
    optimizers = make_optimizers(learner, training.optimizer, training.lr, training.betas, training.weight_decay)
    stream = np.random.default_rng(0).integers(0, recipe.vocab_size, 50_000)
    text = TrainingText("random", {"train": stream}, recipe.vocab_size, recipe.length, "none", "sha256:none")
    low = mixed_precision(torch.device("cpu")) == "bf16"

    def step(number: int) -> None:
        draws = Draws(0, "benchmark", number, training.batch)
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            loss = objective.loss(learner, text.windows("train", draws), draws).loss
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step


def main() -> None:
    """Print a line per K."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--scale", default="sotu")
    parser.add_argument("--source", default="uniform", choices=("uniform", "mask"))
    parser.add_argument("--candidates", default="1,4,16")
    parser.add_argument("--tau", type=float, default=0.5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--profile", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    recipe = load_recipe(asked.scale)
    if not recipe.vocab_size:
        recipe = recipe.model_copy(update={"vocab_size": 2048, "length": 64})  # of the task sotu
    student = network(recipe, f"tsdfm-{asked.source}")
    frozen = network(recipe, f"dfm-{asked.source}").eval().requires_grad_(False)
    assert isinstance(frozen, DiT)
    compass_stage = next(stage for stage in recipe.stage if stage.name == f"compass-{asked.source}")
    sees = {key: bool(compass_stage.options.get(key)) for key in COMPASS_SEES}
    compass = Compass.from_teacher(frozen, compass_stage.blocks, **sees).eval().requires_grad_(False)
    nn.init.normal_(compass.head.weight, std=0.1)
    steps = {0: step_of(recipe, asked.source, student, frozen, BlindChooser())}
    for count in map(int, asked.candidates.split(",")):
        chooser = ShapingChooser(ShapingConfig(candidates=count, tau=asked.tau), compass)
        steps[count] = step_of(recipe, asked.source, student, frozen, chooser)
    seconds: dict[int, list[float]] = {count: [] for count in steps}
    for number in range(asked.steps + WARM_UP):
        for count, step in steps.items():
            begun = time.process_time()
            step(number)
            seconds[count].append(time.process_time() - begun)
    plain = statistics.median(seconds[0][WARM_UP:])
    print(f"fsdfm: {1000 * plain:.0f} ms CPU a step")
    for count in list(steps)[1:]:
        shaped = statistics.median(seconds[count][WARM_UP:])
        print(
            f"tsdfm, K = {count}, tau = {asked.tau:g}: {1000 * shaped:.0f} ms CPU a step, {shaped / plain:.2f} x fsdfm"
        )
    if asked.profile:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            for number in range(5):
                steps[max(steps)](number)
        print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=18, max_name_column_width=40))


if __name__ == "__main__":
    main()
