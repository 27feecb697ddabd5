"""`tsdfm-bench train SCALE`: trains every network of a recipe in dependency order and resumes where it stopped.

Each stage leaves a checkpoint folder (`config.json`, `model.safetensors` in bf16, `README.md`) in the output folder; a
stage whose folder is complete is not trained again. While a stage runs, its state is kept under `.state/<stage>/`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from tsdfm_bench.api import Task
from tsdfm_bench.errors import CheckpointError, UsageError
from tsdfm_bench.methods.nets.pretrained import CONFIG_FILE, PretrainedNetwork, read_config
from tsdfm_bench.methods.train.build import build_network, build_objective
from tsdfm_bench.methods.train.card import about_weights, write_card
from tsdfm_bench.methods.train.data import TrainingText
from tsdfm_bench.methods.train.recipe import Recipe, Stage
from tsdfm_bench.methods.train.trainer import Progress, Trainer

STATE_FOLDER = ".state"


def training_text(task: Task) -> TrainingText:
    """The training text of a task; raises UsageError if it offers none."""
    offer = getattr(task, "training_streams", None)
    info = task.info
    if offer is None:
        raise UsageError(
            f"task '{info.name}' offers no training text; choose another task or add `training_streams` to it"
        )
    streams = offer()
    return TrainingText(
        info.name,
        {"train": streams.train, "validation": streams.validation},
        info.vocab_size,
        info.length,
        info.tokenizer,
        streams.data_hash,
        end_of_text=streams.end_of_text,
        block=streams.block,
    )


def is_trained(stage: Stage, recipe: Recipe, text: TrainingText, folder: Path) -> bool:
    """True if the stage's checkpoint exists and was made by this recipe from this text."""
    if not (folder / stage.name / CONFIG_FILE).is_file():
        return False
    config = read_config(folder / stage.name)
    if config.get("data_hash") != text.data_hash or config.get("tokenizer") != text.tokenizer:
        raise CheckpointError(
            f"{folder / stage.name} was trained on another text or tokenizer; choose another output folder"
        )
    return True


def missing_needs(stage: Stage, folder: Path) -> list[str]:
    """Earlier stages whose checkpoints do not exist yet."""
    return [name for name in stage.needs if not (folder / name / CONFIG_FILE).is_file()]


def train_stage(
    stage: Stage,
    recipe: Recipe,
    text: TrainingText,
    folder: Path,
    report: Callable[[Progress], None] | None = None,
) -> Path:
    """Train one stage (resuming a saved state) and write its checkpoint folder.

    Raises:
        CheckpointError: a needed stage is missing or damaged.
        FloatingPointError: the training diverged; the last good state stays.
    """
    missing = missing_needs(stage, folder)
    if missing:
        raise CheckpointError(
            f"stage '{stage.name}' needs {', '.join(missing)} in {folder}; train them first: "
            f"tsdfm-bench train {recipe.scale} --only {','.join(missing)}"
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    state = folder / STATE_FOLDER / stage.name
    trainer = Trainer(
        stage.name,
        build_network(stage, recipe, text, folder),
        build_objective(stage, recipe, text, folder, device),
        text,
        recipe.training_of(stage),
        state,
        report,
    )
    trainer.resume()
    result = trainer.train()
    network = result.network
    assert isinstance(network, PretrainedNetwork)
    if trainer.accelerator.is_main_process:
        about = about_weights(stage, recipe, text, result, folder)
        network.save_pretrained(folder / stage.name, about, torch.bfloat16)
        write_card(folder / stage.name)
        history = json.dumps(result.history, indent=1) + "\n"
        (folder / stage.name / "history.json").write_text(history, encoding="utf-8")
        shutil.rmtree(state, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    return folder / stage.name


def train_recipe(
    recipe: Recipe,
    text: TrainingText,
    folder: Path,
    only: list[str] | None = None,
    report: Callable[[Progress], None] | None = None,
    announce: Callable[[str], None] = print,
) -> None:
    """Train the stages asked for, in dependency order; what is already trained is skipped."""
    for stage in recipe.select(only):
        if is_trained(stage, recipe, text, folder):
            announce(f"{stage.name}: trained already")
            continue
        announce(f"{stage.name}: {recipe.training_of(stage).steps:,} steps")
        train_stage(stage, recipe, text, folder, report)
