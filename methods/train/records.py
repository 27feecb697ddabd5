"""What trainings are compared by: which settings a network has, and what its steps cost.

After every training two files in the folder of the checkpoints are written anew from the stages that are trained:

    variants.json        name, hash of the weights, seed and settings of every student
    training_cost.json   seconds and operations of a step of every student

Their format is that of `tsdfm_bench.results.training`, which tables and figures read. The cost of one training is kept
beside its weights (`cost.json`): measured steps, on the machine that trained it.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from tsdfm_bench.errors import CheckpointError
from tsdfm_bench.methods import checkpoints
from tsdfm_bench.methods.nets.pretrained import CONFIG_FILE, read_config, replace_file
from tsdfm_bench.methods.train.recipe import ORACLE, Recipe, Stage
from tsdfm_bench.methods.train.shaping import ShapingConfig
from tsdfm_bench.methods.train.shortcut import DEFAULTS
from tsdfm_bench.methods.train.trainer import TrainingResult

COST_FILE, VARIANTS_FILE, COSTS_FILE = "cost.json", "variants.json", "training_cost.json"
STUDENTS = ("fsdfm", "tsdfm")


def settings_of(stage: Stage, steps: int) -> dict[str, Any]:
    """What distinguishes a student of so many training steps: control, objective, and shaping if there is any."""
    settings = {"control": stage.control, **DEFAULTS, **{k: v for k, v in stage.options.items() if k in DEFAULTS}}
    settings["training_steps"] = steps
    settings["teacher"] = settings.pop("rule")
    if stage.kind == "tsdfm":
        shaping = ShapingConfig(**stage.shaping)
        settings |= {
            "K": shaping.candidates,
            "tau": shaping.tau,
            "policy": shaping.policy,
            "rule": shaping.rule,
            "gate_on": shaping.gate_on,
            "switch": shaping.switch,
            "switch_time": shaping.switch_time,
            "token_guard": shaping.token_guard,
            "compass": "exact" if stage.compass == ORACLE else stage.compass.removesuffix(f"-{stage.source}"),
        }
        if shaping.rule == "softmax":
            settings["selection_temperature"] = shaping.selection_temperature
    return settings


def trained_as(stage: Stage, recipe: Recipe) -> tuple[int, int]:
    """Sequences a batch and steps that make a student, with those of the student it starts from.

    A control of equal cost changes its steps afterwards; one of equal entropy is not trained.
    """
    training = recipe.training_of(stage)
    start = next((other for other in recipe.stage if other.name == stage.start_from), None)
    before = trained_as(start, recipe)[1] if start is not None and start.kind in STUDENTS else 0
    return training.batch, before + (0 if stage.match else training.steps)


def write_cost(stage: Stage, recipe: Recipe, result: TrainingResult, folder: Path) -> None:
    """Keep what the steps of a training cost, beside its weights."""
    if not result.step_seconds:
        return
    cuda = torch.cuda.is_available()
    memory = float(torch.cuda.max_memory_allocated()) if cuda else _peak_memory()
    cost = {
        "seconds_per_step": [float(f"{seconds:.4g}") for seconds in result.step_seconds],
        "flops_per_step": result.flops / result.steps if result.flops > 0 else None,
        "batch": recipe.training_of(stage).batch,
        "steps": result.steps,
        "peak_memory_bytes": memory,
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "threads": torch.get_num_threads(),
    }
    _write(folder / stage.name / COST_FILE, cost)


def _peak_memory() -> float | None:
    """Largest resident size of this process so far, in bytes; None where the system does not say."""
    try:
        import resource
    except ImportError:
        return None
    peak = float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return peak if sys.platform == "darwin" else peak * 1024


def write_records(recipe: Recipe, folder: Path) -> None:
    """Write `variants.json` and `training_cost.json` of the students that are trained.

    Once more where another process has finished a network meanwhile: whoever writes last has seen all.
    """
    seen: set[Path] | None = None
    while seen != (found := _finished(recipe, folder)):
        seen = found
        _write_records(recipe, folder)


def _finished(recipe: Recipe, folder: Path) -> set[Path]:
    """What the records are made of."""
    names = (CONFIG_FILE, COST_FILE)
    return {path for stage in recipe.stage for name in names if (path := folder / stage.name / name).is_file()}


def _write_records(recipe: Recipe, folder: Path) -> None:
    variants, costs = [], []
    trained = {stage.name: trained_as(stage, recipe) for stage in recipe.stage if stage.kind in STUDENTS}
    for stage in recipe.stage:
        if stage.kind not in STUDENTS or not (folder / stage.name / CONFIG_FILE).is_file():
            continue
        found = checkpoints.Checkpoint(folder / stage.name, stage.name, stage.kind, stage.source or None)
        steps = int(read_config(found.folder).get("steps", recipe.training_of(stage).steps))
        settings, weights = settings_of(stage, steps), checkpoints.identify(found).weights
        default = checkpoints.weights_name(stage.kind, stage.source, ("uniform", "mask"))
        variants.append(
            {
                "name": stage.variant or stage.name,
                "weights": weights,
                "method": stage.kind,
                "training_seed": recipe.training_of(stage).seed,
                "settings": settings,
                "default": stage.name == default,
                "alike": trained.get(default, trained[stage.name]) == trained[stage.name],
            }
        )
        if stage.control == "unshaped":
            variants += _reranked(variants[-1], found)
        if cost := _cost(folder / stage.name / COST_FILE):
            named = {"name": stage.name, "method": stage.kind, "scale": recipe.scale, "source": stage.source}
            named["weights"] = weights
            costs.append({**named, "settings": settings, **cost})
    if variants:
        _write(folder / VARIANTS_FILE, {"format": 1, "variants": variants})
    if costs:
        _write(folder / COSTS_FILE, {"format": 1, "costs": costs})


def _cost(path: Path) -> dict[str, Any]:
    """What `write_cost` left; {} where it left nothing, or a file that is damaged."""
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        warnings.warn(f"{path} is damaged ({error}); {COSTS_FILE} does without it", stacklevel=2)
        return {}


def _reranked(student: dict[str, Any], weights: checkpoints.Checkpoint) -> list[dict[str, Any]]:
    """The unshaped student with the compass at inference, if there is a compass; see `methods.rerank`."""
    from tsdfm_bench.methods.rerank import compass_beside, identity_with

    try:
        identity = identity_with(checkpoints.identify(weights), compass_beside(weights.folder, weights.source))
    except CheckpointError:
        return []
    settings = {**student["settings"], "control": "compass_at_inference"}
    name = f"{student['name']}, compass at inference"
    return [{**student, "name": name, "weights": identity.weights, "settings": settings, "default": False}]


def _write(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=1) + "\n"
    replace_file(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def flops_of(folder: Path) -> float:
    """Operations a checkpoint's training took; KeyError if its configuration does not say."""
    return float(read_config(folder)["training_flops"])
