"""`tsdfm-bench train SCALE`: trains every network of a recipe in dependency order and resumes where it stopped.

Each stage leaves a checkpoint folder (`config.json`, `model.safetensors` in bf16, `README.md`) in the output folder; a
stage whose folder is complete is not trained again. While a stage runs, its state is kept under `.state/<stage>/`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tsdfm_bench.api import Task
from tsdfm_bench.errors import CheckpointError, CompassError, MatchError, UsageError
from tsdfm_bench.methods.nets.causal import CausalTransformer
from tsdfm_bench.methods.nets.compass import Compass
from tsdfm_bench.methods.nets.pretrained import CONFIG_FILE, PretrainedNetwork, read_config, replace_file
from tsdfm_bench.methods.train.build import build_network, build_objective
from tsdfm_bench.methods.train.card import about_weights, changed_settings, complete_card, weights_hash, write_card
from tsdfm_bench.methods.train.compass import CompassObjective
from tsdfm_bench.methods.train.compass_report import CompassReport, Judge, examine
from tsdfm_bench.methods.train.data import Draws, TrainingText
from tsdfm_bench.methods.train.flops import FlopMeter, networks_in
from tsdfm_bench.methods.train.matching import match_entropy
from tsdfm_bench.methods.train.objectives import ARObjective
from tsdfm_bench.methods.train.recipe import Recipe, Stage
from tsdfm_bench.methods.train.records import flops_of, write_cost, write_records
from tsdfm_bench.methods.train.shaping import ShapingConfig
from tsdfm_bench.methods.train.trainer import Progress, Trainer
from tsdfm_bench.methods.train.trajectories import record

STATE_FOLDER = ".state"
REPORT_FILE = "report.json"
COUNTED_STEPS = 8


def training_text(task: Task, judges: Callable[[str], Judge] | None = None) -> TrainingText:
    """The training text of a task; raises UsageError if it offers none.

    Args:
        task: loaded.
        judges: of its finished sequences, by the spec of a scorer.
    """
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
        judges=judges,
        citation=info.citation,
    )


def is_trained(stage: Stage, recipe: Recipe, text: TrainingText, folder: Path) -> bool:
    """True if the stage's checkpoint exists.

    Raises:
        CheckpointError: it was made from another text, by other settings than the recipe now has, or from other
            networks than are there now.
    """
    path = folder / stage.name
    if not (path / CONFIG_FILE).is_file():
        return False
    config = read_config(path)
    if config.get("data_hash") != text.data_hash or config.get("tokenizer") != text.tokenizer:
        raise CheckpointError(f"{path} was trained on another text or tokenizer; choose another output folder")
    if changed := changed_settings(config, stage, recipe):
        raise CheckpointError(
            f"{path} was trained with other settings than recipe '{recipe.scale}' now has ({'; '.join(changed)}); "
            "choose another output folder, or delete it to train it again"
        )
    made_from = config.get("needed", {})
    for name in stage.needs:
        there = (folder / name / CONFIG_FILE).is_file()
        if there and name in made_from and weights_hash(folder / name) != made_from[name]:
            raise CheckpointError(
                f"{path} was made from another '{name}' than is there now; delete it to make it again, or choose "
                "another output folder"
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


def ar_judge(recipe: Recipe, folder: Path) -> NamedJudge | None:
    """The recipe's autoregressive network as a judge, exact NLL under it; None if it is not trained."""
    stage = next((stage for stage in recipe.stage if stage.kind == "ar"), None)
    if stage is None or not (folder / stage.name / CONFIG_FILE).is_file():
        return None
    path = folder / stage.name

    @torch.inference_mode()
    def judge(tokens: np.ndarray) -> np.ndarray:
        network = CausalTransformer.from_pretrained(path)
        objective = ARObjective(network.config.vocab_size, network.config.bos_id)
        parts = torch.from_numpy(tokens).split(64)
        return torch.cat([objective.nll(network, part).mean(dim=1) for part in parts]).double().numpy()

    return NamedJudge(f"the network '{stage.name}'", judge)


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
    tau = shaping_under(stage, recipe).tau
    judged, name = (judge.judge, judge.name) if judge is not None else (None, "")
    found = examine(compass, objective, text, tau, judged, name)
    about = {**found.to_json(), "weights": weights_hash(folder / stage.name)}
    path = folder / stage.name / REPORT_FILE
    replace_file(path, lambda partial: partial.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8"))
    return found


def failures_of(
    compass: Stage, recipe: Recipe, text: TrainingText, folder: Path, judge: NamedJudge | None
) -> list[str]:
    """Why a compass is not to be trusted: from its report, or a new one (damaged, or of other weights or tau)."""
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        report = json.loads((folder / compass.name / REPORT_FILE).read_text(encoding="utf-8"))
        weights = report.get("weights", weights_hash(folder / compass.name))  # older reports do not say
        if weights == weights_hash(folder / compass.name) and report["tau"] == shaping_under(compass, recipe).tau:
            return [str(reason) for reason in report["failures"]]
    return examine_compass(compass, recipe, text, folder, judge).failures


def shaping_under(compass: Stage, recipe: Recipe) -> ShapingConfig:
    """How the first student that a compass teaches is shaped: its variants try what the compass was not meant for."""
    student = next((stage for stage in recipe.stage if stage.compass == compass.name), None)
    return ShapingConfig(**(student.shaping if student is not None else {}))


def record_trajectories(
    compass: Stage, recipe: Recipe, text: TrainingText, folder: Path, judge: NamedJudge
) -> list[dict[str, Any]]:
    """Blind and shaped trajectories under a compass and the shaping of the first student it teaches; see `record`."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    energy = Compass.from_pretrained(folder / compass.name, device).requires_grad_(False)
    builder = build_objective(compass, recipe, text, folder, device)(energy)
    assert isinstance(builder, CompassObjective)
    return record(builder, energy, shaping_under(compass, recipe), judge.judge, text.length, compass.source)


def require_trust(stage: Stage, recipe: Recipe, text: TrainingText, folder: Path, judge: NamedJudge | None) -> None:
    """Refuse to teach a student with a compass that failed its checks.

    Raises:
        CompassError: it failed, with every reason.
    """
    compass = next(s for s in recipe.stage if s.name == stage.compass)
    failures = failures_of(compass, recipe, text, folder, judge)
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
        MatchError: no temperature gives the stage the entropy it is to have.
        FloatingPointError: the training diverged; the last good state stays.
    """
    missing = missing_needs(stage, folder)
    if missing:
        raise CheckpointError(
            f"stage '{stage.name}' needs {', '.join(missing)} in {folder}; train them first: "
            f"tsdfm-bench train {recipe.scale} --only {','.join(missing)}"
        )
    if stage.kind == "tsdfm" and stage.compass_stage:
        require_trust(stage, recipe, text, folder, judge)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if stage.match:
        match_entropy(stage, text, folder, device)
        write_card(folder / stage.name)
        return folder / stage.name
    if stage.cost_of:
        stage = of_equal_cost(stage, recipe, text, folder, device)
    state = folder / STATE_FOLDER / stage.name
    trainer = Trainer(
        stage.name,
        build_network(stage, recipe, text, folder),
        build_objective(stage, recipe, text, folder, device),
        text,
        recipe.training_of(stage),
        state,
        report,
        stage.draws,
    )
    trainer.resume()
    result = trainer.train()
    network = result.network
    assert isinstance(network, PretrainedNetwork)
    if trainer.accelerator.is_main_process:
        about = about_weights(stage, recipe, text, result, folder)
        history = json.dumps(result.history, indent=1) + "\n"
        replace_file(folder / stage.name / "history.json", lambda path: path.write_text(history, encoding="utf-8"))
        write_cost(stage, recipe, result, folder)
        network.save_pretrained(folder / stage.name, about, torch.bfloat16)  # its last file marks the stage as trained
        write_card(folder / stage.name)
        shutil.rmtree(state, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    return folder / stage.name


def of_equal_cost(stage: Stage, recipe: Recipe, text: TrainingText, folder: Path, device: str) -> Stage:
    """The stage, with as many steps as cost the operations of the training it is to equal (mean of its first steps)."""
    network = build_network(stage, recipe, text, folder).to(device)
    objective = build_objective(stage, recipe, text, folder, device)(network)
    training = recipe.training_of(stage)
    meter = FlopMeter(network, *networks_in(objective))
    for step in range(1, COUNTED_STEPS + 1):
        # one copy is learner and average here: calls under no_grad count once, the learner's three times
        draws = Draws(training.seed, stage.draws or stage.name, step, training.batch, device)
        objective.loss(network, text.windows("train", draws), draws)
    meter.close()
    steps = max(1, round(flops_of(folder / stage.cost_of) / (meter.total / COUNTED_STEPS)))
    return stage.model_copy(update={"training": {**stage.training, "steps": steps}})


def train_recipe(
    recipe: Recipe,
    text: TrainingText,
    folder: Path,
    only: list[str] | None = None,
    report: Callable[[Progress], None] | None = None,
    announce: Callable[[str], None] = print,
    judge: NamedJudge | None = None,
    alone: Callable[[str], AbstractContextManager[object]] = nullcontext,
) -> list[str]:
    """Train the stages asked for, in dependency order; what is already trained is skipped.

    Args:
        recipe, text, folder, report, judge: see `train_stage`.
        only: names of stages; None = all.
        announce: told what happens, a line a stage.
        alone: makes the block in which a stage is trained, and keeps other processes from it.

    Returns:
        why stages were not trained; the others are not held up by them.
    """
    refused: dict[str, str] = {}
    for stage in recipe.select(only):
        if is_trained(stage, recipe, text, folder):
            complete_card(folder / stage.name)
            announce(f"{stage.name}: trained already")
            continue
        if held := [need for need in stage.needs if need in refused]:
            refused[stage.name] = f"stage '{stage.name}' is not trained: it needs '{held[0]}'"
            continue
        with alone(stage.name):
            if is_trained(stage, recipe, text, folder):  # by another process, which this one waited for
                announce(f"{stage.name}: trained already")
                continue
            if stage.match:
                announce(f"{stage.name}: '{stage.start_from}' at the temperature of equal entropy to '{stage.match}'")
            elif stage.cost_of:
                announce(f"{stage.name}: as many steps as cost what '{stage.cost_of}' cost")
            else:
                announce(f"{stage.name}: {recipe.training_of(stage).steps:,} steps")
            try:
                train_stage(stage, recipe, text, folder, report, judge)
            except (CompassError, MatchError) as error:
                refused[stage.name] = str(error)
                continue
            if stage.kind == "compass":
                found = examine_compass(stage, recipe, text, folder, judge)
                announce(f"{stage.name}: {found.summary()}")
            write_records(recipe, folder)
    write_records(recipe, folder)
    return list(refused.values())
