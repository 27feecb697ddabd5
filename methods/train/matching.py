"""The control "entropy-matched": FS-DFM made as certain as TS-DFM by temperature alone (arXiv 2605.07924).

Choosing the candidate of lowest energy may do nothing but lower the entropy. So the unshaped student is given the
temperature T at which its predictions are, on the average, as certain as the shaped student's on the same states:

    mean over windows, positions and steps of H(softmax(l_F(x_t; t, h) / T)) = the same of H(softmax(l_S(x_t; t, h)))

with h = 1 / 8, t = 0, 1/8, .., 7/8 and x_t noised from held-out text. No sampled text takes part, so T is not chosen on
the result. H rises with T; it is found by bisection. Logits are a linear map of the last layer, so the tempered student
is a checkpoint of its own: that map divided by T.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from tsdfm_bench.errors import CheckpointError
from tsdfm_bench.methods.nets.dit import DiT
from tsdfm_bench.methods.nets.pretrained import read_config
from tsdfm_bench.methods.train.data import Draws, TrainingText
from tsdfm_bench.methods.train.objectives import noise
from tsdfm_bench.methods.train.recipe import Stage
from tsdfm_bench.methods.train.shortcut import without_mask

STEPS = 8
WINDOWS = 32
LOWEST, HIGHEST, HALVINGS = 0.2, 5.0, 20


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


def matching_temperature(logits: Tensor, entropy: float) -> float:
    """T at which `mean_entropy` is `entropy`, within [0.2, 5] (an end of it if none is inside)."""
    low, high = LOWEST, HIGHEST
    for _ in range(HALVINGS):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if mean_entropy(logits, middle) < entropy else (low, middle)
    return (low * high) ** 0.5


def match_entropy(stage: Stage, text: TrainingText, folder: Path, device: str) -> float:
    """Write the checkpoint of an entropy-matched stage; returns its temperature.

    Raises:
        CheckpointError: no temperature in [0.2, 5] gives the entropy.
    """
    student = DiT.from_pretrained(folder / stage.start_from, device)
    shaped = DiT.from_pretrained(folder / stage.match, device)
    logits, wanted = held_out_logits(student, text), mean_entropy(held_out_logits(shaped, text))
    temperature = matching_temperature(logits, wanted)
    reached = mean_entropy(logits, temperature)
    if abs(reached - wanted) > 0.01 * max(wanted, 0.1):
        raise CheckpointError(
            f"stage '{stage.name}': no temperature from {LOWEST:g} to {HIGHEST:g} gives '{stage.start_from}' the "
            f"entropy of '{stage.match}' ({wanted:.3f} nats; {reached:.3f} at {temperature:.3g})"
        )
    with torch.no_grad():
        for parameter in student.output.linear.parameters():
            parameter.div_(temperature)
    config = read_config(folder / stage.start_from)
    about = {key: value for key, value in config.items() if key not in ("architecture", "network")}
    about["recipe"] = {**about["recipe"], "stage": stage.model_dump(exclude_defaults=True)}
    about["matched"] = {
        "temperature": round(temperature, 5),
        "entropy_nats": round(wanted, 5),
        "entropy_before_nats": round(mean_entropy(logits), 5),
        "what": f"mean entropy of the predictions on {STEPS * WINDOWS} noised held-out windows at h = 1/{STEPS}",
        "of": stage.match,
    }
    student.save_pretrained(folder / stage.name, about, torch.bfloat16)
    history = folder / stage.start_from / "history.json"
    copied = history.read_text(encoding="utf-8") if history.is_file() else json.dumps([])
    (folder / stage.name / "history.json").write_text(copied, encoding="utf-8")
    return temperature
