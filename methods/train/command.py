"""`tsdfm-bench train SCALE`: trains every network of a recipe in dependency order and resumes where it stopped.

Each stage leaves a checkpoint folder (`config.json`, `model.safetensors` in bf16, `README.md`) in the output folder; a
stage whose folder is complete is not trained again. While a stage runs, its state is kept under `.state/<stage>/`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from tsdfm_bench.api import Task
from tsdfm_bench.errors import CheckpointError, CompassError, UsageError
from tsdfm_bench.methods.nets.compass import Compass
from tsdfm_bench.methods.nets.pretrained import CONFIG_FILE, PretrainedNetwork, read_config, replace_file
from tsdfm_bench.methods.train.build import build_network, build_objective
from tsdfm_bench.methods.train.card import about_weights, write_card
from tsdfm_bench.methods.train.compass import CompassObjective
from tsdfm_bench.methods.train.compass_report import CompassReport, Judge, examine
from tsdfm_bench.methods.train.data import TrainingText
from tsdfm_bench.methods.train.recipe import ORACLE, Recipe, Stage
from tsdfm_bench.methods.train.shaping import ShapingConfig
from tsdfm_bench.methods.train.trainer import Progress, Trainer

STATE_FOLDER = ".state"
REPORT_FILE = "report.json"


def training_text(task: Task) -> TrainingText:
    """The training text of a task; raises UsageError if it offers none."""
    offer = getattr(task, "training_streams", None)
    info = task.info
    if offer is None:
        raise UsageError(
            f"task '{info.name}' offers no training text; choose another task or add `training_streams` to it"
        )
    streams = offer()
    exact = getattr(task, "oracle", None)
    return TrainingText(
        info.name,
        {"train": streams.train, "validation": streams.validation},
        info.vocab_size,
        info.length,
        info.tokenizer,
        streams.data_hash,
        end_of_text=streams.end_of_text,
        block=streams.block,
        energy=None if exact is None else lambda source: exact("energy", source),
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


@dataclass(frozen=True)
class NamedJudge:
    """What finished sequences are judged by when a compass is examined.

    Args:
        name: for the report.
        judge: (n, length) int64 -> (n,) nats per token.
    """

    name: str
    judge: Judge


def examine_compass(
    stage: Stage, recipe: Recipe, text: TrainingText, folder: Path, judge: NamedJudge | None
) -> CompassReport:
    """Try a trained compass on held-out text and keep the report beside its weights.

    Raises:
        CheckpointError: it, or its teacher, is missing or damaged.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    compass = Compass.from_pretrained(folder / stage.name, device).requires_grad_(False)
    objective = build_objective(stage, recipe, text, folder, device)(compass)
    assert isinstance(objective, CompassObjective)
    tau = min([ShapingConfig(**s.shaping).tau for s in recipe.stage if s.compass == stage.name], default=0.5)
    judged, name = (judge.judge, judge.name) if judge is not None else (None, "")
    found = examine(compass, objective, text, tau, judged, name)
    path = folder / stage.name / REPORT_FILE
    replace_file(
        path, lambda partial: partial.write_text(json.dumps(found.to_json(), indent=1) + "\n", encoding="utf-8")
    )
    return found


def require_trust(stage: Stage, recipe: Recipe, text: TrainingText, folder: Path, judge: NamedJudge | None) -> None:
    """Refuse to teach a student with a compass that failed its checks.

    Raises:
        CompassError: it failed, with every reason.
    """
    compass = next(s for s in recipe.stage if s.name == stage.compass)
    path = folder / compass.name / REPORT_FILE
    if path.is_file():
        failures = json.loads(path.read_text(encoding="utf-8"))["failures"]
    else:
        failures = examine_compass(compass, recipe, text, folder, judge).failures
    if failures and not stage.despite_checks:
        raise CompassError(
            f"stage '{stage.name}' is not trained: its compass '{compass.name}' failed its checks:\n"
            + "\n".join(f"  - {reason}" for reason in failures)
            + f"\nTrain the compass longer (stage '{compass.name}' of the recipe), or set `despite_checks = true` in "
            "the student's stage to see what such a compass does."
        )


def train_stage(
    stage: Stage,
    recipe: Recipe,
    text: TrainingText,
    folder: Path,
    report: Callable[[Progress], None] | None = None,
    judge: NamedJudge | None = None,
) -> Path:
    """Train one stage (resuming a saved state) and write its checkpoint folder.

    Raises:
        CheckpointError: a needed stage is missing or damaged.
        CompassError: the stage's compass failed its checks.
        FloatingPointError: the training diverged; the last good state stays.
    """
    missing = missing_needs(stage, folder)
    if missing:
        raise CheckpointError(
            f"stage '{stage.name}' needs {', '.join(missing)} in {folder}; train them first: "
            f"tsdfm-bench train {recipe.scale} --only {','.join(missing)}"
        )
    if stage.kind == "tsdfm" and stage.compass != ORACLE:
        require_trust(stage, recipe, text, folder, judge)
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
    judge: NamedJudge | None = None,
) -> list[str]:
    """Train the stages asked for, in dependency order; what is already trained is skipped.

    Returns:
        why stages were not trained; the others are not held up by them.
    """
    refused: dict[str, str] = {}
    for stage in recipe.select(only):
        if is_trained(stage, recipe, text, folder):
            announce(f"{stage.name}: trained already")
            continue
        if held := [need for need in stage.needs if need in refused]:
            refused[stage.name] = f"stage '{stage.name}' is not trained: it needs '{held[0]}'"
            continue
        announce(f"{stage.name}: {recipe.training_of(stage).steps:,} steps")
        try:
            train_stage(stage, recipe, text, folder, report, judge)
        except CompassError as error:
            refused[stage.name] = str(error)
            continue
        if stage.kind == "compass":
            found = examine_compass(stage, recipe, text, folder, judge)
            announce(f"{stage.name}: {found.summary()}")
    return list(refused.values())
