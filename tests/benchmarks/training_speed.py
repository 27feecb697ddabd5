"""Speed of a training at full size on random tokens: tokens a second, operations a second, their share of the peak.

    python tests/benchmarks/training_speed.py base dfm-uniform --steps 12
    python tests/benchmarks/training_speed.py base dfm-uniform --eager

Only a stage that needs no other can be measured. Prints one line of JSON; the first steps are left out.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from tsdfm_bench.methods.train.build import build_network, build_objective
from tsdfm_bench.methods.train.data import TrainingText
from tsdfm_bench.methods.train.recipe import load_recipe
from tsdfm_bench.methods.train.trainer import Trainer

TOKENS = 1 << 20


def main() -> None:
    """Train some steps and print what they cost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("stage")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--eager", action="store_true", help="do not compile")
    given = parser.parse_args()

    recipe = load_recipe(given.recipe)
    stage = recipe.select([given.stage])[0]
    if stage.needs:
        parser.error(f"stage '{stage.name}' needs {', '.join(stage.needs)}: it cannot be measured alone")
    stream = np.random.default_rng(0).integers(0, recipe.vocab_size, TOKENS)
    streams = {"train": stream, "validation": stream}
    text = TrainingText("random tokens", streams, recipe.vocab_size, recipe.length, "none", "sha256:none")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = recipe.training_of(stage)
    config = replace(config, compile=config.compile and not given.eager)
    network = build_network(stage, recipe, text, Path())
    trainer = Trainer(stage.name, network, build_objective(stage, recipe, text, Path(), device), text, config)
    result = trainer.train(until=given.steps)
    seconds = statistics.median(result.step_seconds)
    per_second = result.flops / result.steps / seconds
    record = {
        "recipe": recipe.scale,
        "stage": stage.name,
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "compiled": config.compile and device == "cuda",
        "batch": config.batch,
        "pass": config.micro_batch or config.batch,
        "length": recipe.length,
        "steps": result.steps,
        "seconds_per_step": seconds,
        "tokens_per_s": config.batch * recipe.length / seconds,
        "tflops_per_s": per_second / 1e12,
        "mfu": None if trainer.peak is None else per_second / trainer.peak,
        "peak_memory_gb": torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else None,
    }
    print(json.dumps({key: float(f"{v:.4g}") if isinstance(v, float) else v for key, v in record.items()}))


if __name__ == "__main__":
    main()
