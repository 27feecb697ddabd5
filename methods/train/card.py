"""What a checkpoint says about itself: the facts in `config.json` and the model card made from them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tsdfm_bench.methods.nets.folder import sha256_of
from tsdfm_bench.methods.nets.pretrained import WEIGHTS_FILE, read_config, replace_file
from tsdfm_bench.methods.train.data import TrainingText
from tsdfm_bench.methods.train.objectives import TIME_EPS
from tsdfm_bench.methods.train.recipe import Recipe, Stage
from tsdfm_bench.methods.train.trainer import NO_INFLUENCE, TrainingResult

CARD_FILE = "README.md"
_BOUND = {
    "ar": "exact NLL",
    "mdlm": "NELBO (upper bound)",
    "sedd": "score-entropy bound (upper bound)",
    "dfm": "generalised-KL bound (upper bound)",
    "fsdfm": "generalised-KL bound at h = 1/1024 (upper bound)",
    "tsdfm": "generalised-KL bound at h = 1/1024 (upper bound)",
    "compass": "NCE loss (chance is 1.386)",
}


def about_weights(
    stage: Stage, recipe: Recipe, text: TrainingText, result: TrainingResult, folder: Path
) -> dict[str, Any]:
    """Everything `config.json` records beside the network's geometry."""
    about: dict[str, Any] = {
        "method": stage.kind,
        "source": stage.source,
        "task": text.name,
        "scale": recipe.scale,
        "tokenizer": text.tokenizer,
        "data_hash": text.data_hash,
        "weights": "ema",
        "recipe": recipe_facts(stage, recipe),
        "steps": result.steps,
        "tokens_seen": result.tokens_seen,
        "training_seconds": round(result.seconds, 1),
        **({"training_flops": float(f"{result.flops:.4g}")} if math.isfinite(result.flops) else {}),
        "validation": {
            "what": _BOUND[stage.kind],
            "unit": "nats" if stage.kind == "compass" else "nats per token",
            "value": round(result.bound, 4),
            "standard_error": round(result.bound_error, 4),
        },
    }
    if text.citation:
        about["text"] = text.citation
    if stage.kind == "sedd":
        about["parameterisation"] = stage.options.get("parameterisation", "score")
        about["schedule"] = "log-linear"
    if stage.options.get("loss_name") == "generalised_kl":
        about["time_eps"] = TIME_EPS  # it saw no later times, so it is sampled at none
    about["needed"] = needed_weights(stage, folder)
    if stage.kind == "compass":
        about["teacher_hash"] = about["needed"][stage.teacher]
    start = stage.start_from or stage.teacher
    if start:
        about["tokens_seen_before"] = total_tokens(folder / start)
    return about


def needed_weights(stage: Stage, folder: Path) -> dict[str, str]:
    """The networks a stage is made from, by hash: stage name -> "sha256:..."."""
    return {name: weights_hash(folder / name) for name in stage.needs}


def recipe_facts(stage: Stage, recipe: Recipe) -> dict[str, Any]:
    """The settings a network is trained with."""
    return {
        "stage": stage.model_dump(exclude_defaults=True),
        "training": asdict(recipe.training_of(stage)),
        "start": recipe.start.model_dump(),
    }


def changed_settings(config: Mapping[str, Any], stage: Stage, recipe: Recipe) -> list[str]:
    """Settings of a stage that are not those its checkpoint was trained with, "training.steps 100, now 200".

    Args:
        config: of the checkpoint; without a record of its settings nothing is known to differ.
        stage, recipe: what would be trained now.
    """
    if stage.match or "recipe" not in config:
        return []
    used, now = _flat(config["recipe"]), _flat(json.loads(json.dumps(recipe_facts(stage, recipe))))
    ignored = {f"training.{key}" for key in NO_INFLUENCE} | {"stage.training", "stage.despite_checks", "stage.variant"}
    if stage.cost_of:
        ignored.add("training.steps")
    keys = sorted(key for key in {*used, *now} - ignored if used.get(key) != now.get(key))
    return [f"{key} {used.get(key)}, now {now.get(key)}" for key in keys]


def _flat(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{table}.{key}": value for table, entries in facts.items() for key, value in entries.items()}


def weights_hash(folder: Path) -> str:
    """ "sha256:..." of a checkpoint's weights."""
    return "sha256:" + sha256_of(folder / WEIGHTS_FILE)


def total_tokens(folder: Path) -> int:
    """Tokens a checkpoint saw, those of the weights it started from included."""
    config = read_config(folder)
    return int(config.get("tokens_seen", 0)) + int(config.get("tokens_seen_before", 0))


def complete_card(folder: Path) -> None:
    """Write the `README.md` that an end between it and `config.json` has left out."""
    if not (folder / CARD_FILE).is_file():
        write_card(folder)


def write_card(folder: Path) -> None:
    """Write `README.md` of a checkpoint folder from its `config.json`."""
    config = read_config(folder)
    network, recipe, validation = config["network"], config["recipe"], config["validation"]
    stage = recipe["stage"]
    from safetensors import safe_open

    with safe_open(str(folder / WEIGHTS_FILE), framework="pt") as handle:
        parameters = sum(int(handle.get_tensor(key).numel()) for key in handle.keys())  # noqa: SIM118 - not a mapping
    training = recipe["training"]
    source = f", source `{config['source']}`" if config["source"] else ""
    geometry = (
        f"{network['blocks']} blocks, width {network['width']}, {network['heads']} heads, length {network['length']}"
    )
    schedule = f"learning rate {training['lr']:g}, EMA {training['ema']:g}, seed {training['seed']}"
    before = config.get("tokens_seen_before", 0)
    bound = f"{validation['value']:.4f} ± {validation['standard_error']:.4f} {validation['unit']}"
    facts = {
        "network": f"{geometry}, vocabulary {network['vocab_size']:,}",
        "text": f"task `{config['task']}`, training split, {config['data_hash'][:19]}",
        **({"source of the text": " ".join(config["text"].split()).replace("|", "\\|")} if "text" in config else {}),
        "tokenizer": f"`{config['tokenizer']}`",
        "started from": stage.get("start_from") or stage.get("teacher") or "nothing",
        "training": f"{config['steps']:,} steps of {training['batch']} windows, {training['optimizer']}, {schedule}",
        "tokens seen": f"{config['tokens_seen']:,} (+ {before:,} by the weights it started from)",
        "training time": f"{config['training_seconds']:,.0f} s",
        "validation": f"{bound}: {validation['what']}, held-out documents",
    }
    lines = [
        f"# {config['task']} / {folder.name}",
        "",
        f"Method `{config['method']}`{source}; {parameters:,} parameters, bf16.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in facts.items()),
        "",
        f"Made by `tsdfm-bench train {config['scale']} --only {folder.name}`.",
        "",
    ]
    replace_file(folder / CARD_FILE, lambda path: path.write_text("\n".join(lines), encoding="utf-8"))
