"""Two controls: FS-DFM made like TS-DFM by temperature alone (arXiv 2605.07924).

Choosing the candidate of lowest energy may do nothing but lower the entropy. So the unshaped student is given one
temperature T, at which

    samples        the mean entropy of its 8-step samples is the shaped student's: "entropy-matched". The samples are
                   development samples, from streams that no reported row draws from, and no scorer reads them
    predictions    its predictions are, on the average, as certain as the shaped student's on the same states, held-out
                   text noised to t = 0, 1/8, .., 7/8, at h = 1/8: "certainty-matched"

The second needs no samples, but it does not give the samples the same entropy: what narrows is the student's own
trajectory, which held-out states do not show. Logits are a linear map of the last layer, so the tempered student is a
checkpoint of its own: that map divided by T, found by bisection.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from tsdfm_bench.api import SampleRequest
from tsdfm_bench.errors import MatchError
from tsdfm_bench.methods.fsdfm import FSDFM
from tsdfm_bench.methods.nets.dit import DiT
from tsdfm_bench.methods.nets.pretrained import read_config
from tsdfm_bench.methods.train.card import needed_weights
from tsdfm_bench.methods.train.data import Draws, TrainingText
from tsdfm_bench.methods.train.objectives import noise
from tsdfm_bench.methods.train.recipe import Stage
from tsdfm_bench.methods.train.shortcut import without_mask
from tsdfm_bench.methods.train.trajectories import unigram_entropy
from tsdfm_bench.rng import Streams

STEPS = 8
WINDOWS = 32
SAMPLES, TOGETHER = 512, 64
LOWEST, HIGHEST = 0.2, 5.0
HALVINGS = 12  # T to a thousandth
TOLERANCE_NATS = 0.02


@torch.no_grad()
def sampled_entropy(network: DiT, source: str, length: int, temperature: float = 1.0) -> float:
    """Mean entropy in nats of the tokens of each of 512 development samples of a student at 8 steps.

    Args:
        network: step-aware.
        source: "uniform" or "mask".
        length: tokens per sample.
        temperature: of sampling.
    """
    device = next(network.parameters()).device
    sampler = FSDFM.from_network(network, {"network": asdict(network.config)}, source, str(device), {})
    total = 0.0
    for first in range(0, SAMPLES, TOGETHER):
        streams = Streams.of(0, "entropy-matching", TOGETHER, first, device)
        batch = sampler.sample(SampleRequest(streams, length, STEPS, temperature, source=source))
        total += float(unigram_entropy(batch.tokens).sum())
    return total / SAMPLES


@torch.inference_mode()
def held_out_logits(network: DiT, text: TrainingText) -> Tensor:
    """Logits of a student on noised held-out text at every time of the 8-step grid, (n, V) fp32."""
    device = next(network.parameters()).device
    found = []
    for step in range(STEPS):
        draws = Draws(0, "entropy-matching", step, WINDOWS, device)
        x_1 = text.windows("validation", draws)
        t = torch.full((WINDOWS,), step / STEPS, dtype=torch.float64, device=device)
        x_t = noise(x_1, t, draws, network.config.outputs, text.vocab_size)
        logits = without_mask(network(x_t, t.float(), torch.full_like(t, 1 / STEPS).float()), text.vocab_size)
        found.append(logits[..., : text.vocab_size].flatten(0, 1).float())
    return torch.cat(found)


def mean_entropy(logits: Tensor, temperature: float = 1.0) -> float:
    """Mean entropy of softmax(logits / T) in nats, (n, V) logits."""
    total = 0.0
    for part in logits.split(4096):
        log_p = torch.log_softmax(part / temperature, dim=-1)
        total -= float((log_p.exp() * log_p).sum(dim=-1).double().sum())
    return total / logits.shape[0]


def matching_temperature(entropy: Callable[[float], float], wanted: float) -> tuple[float, float]:
    """T in [0.2, 5] at which an entropy that grows with T comes nearest to a value, and what it is there.

    Bisection from 1 up or down; the entropy of samples is a little rough, so the nearest of all that were tried counts.
    """
    tried = {1.0: entropy(1.0)}
    low, high = (1.0, HIGHEST) if tried[1.0] < wanted else (LOWEST, 1.0)
    for _ in range(HALVINGS):
        middle = (low * high) ** 0.5
        tried[middle] = entropy(middle)
        low, high = (middle, high) if tried[middle] < wanted else (low, middle)
    return min(tried.items(), key=lambda item: abs(item[1] - wanted))


def match_entropy(stage: Stage, text: TrainingText, folder: Path, device: str) -> float:
    """Write the checkpoint of a stage with `match`; returns its temperature.

    Raises:
        MatchError: no temperature in [0.2, 5] gives the entropy.
    """
    student = DiT.from_pretrained(folder / stage.start_from, device)
    shaped = DiT.from_pretrained(folder / stage.match, device)
    if stage.match_on == "samples":
        what = f"mean entropy of the tokens of each of {SAMPLES} development samples at {STEPS} steps"
        entropy = partial(sampled_entropy, student, stage.source, text.length)
        wanted = sampled_entropy(shaped, stage.source, text.length)
    else:
        what = f"mean entropy of the predictions on {STEPS * WINDOWS} noised held-out windows at h = 1/{STEPS}"
        entropy = partial(mean_entropy, held_out_logits(student, text))
        wanted = mean_entropy(held_out_logits(shaped, text))
    before = entropy(1.0)
    temperature, reached = matching_temperature(entropy, wanted)
    if abs(reached - wanted) > TOLERANCE_NATS:
        raise MatchError(
            f"stage '{stage.name}': no temperature from {LOWEST:g} to {HIGHEST:g} gives '{stage.start_from}' the "
            f"entropy of '{stage.match}' ({wanted:.3f} nats; {before:.3f} at 1, {reached:.3f} at {temperature:.3g}): "
            f"{what}"
        )
    with torch.no_grad():
        for parameter in student.output.linear.parameters():
            parameter.div_(temperature)
    config = read_config(folder / stage.start_from)
    about = {key: value for key, value in config.items() if key not in ("architecture", "network")}
    about["recipe"] = {**about["recipe"], "stage": stage.model_dump(exclude_defaults=True)}
    about["needed"] = needed_weights(stage, folder)
    about["matched"] = {
        "temperature": round(temperature, 5),
        "wanted_nats": round(wanted, 5),
        "reached_nats": round(reached, 5),
        "before_nats": round(before, 5),
        "what": what,
        "of": stage.match,
    }
    student.save_pretrained(folder / stage.name, about, torch.bfloat16)
    history = folder / stage.start_from / "history.json"
    copied = history.read_text(encoding="utf-8") if history.is_file() else json.dumps([])
    (folder / stage.name / "history.json").write_text(copied, encoding="utf-8")
    return temperature
