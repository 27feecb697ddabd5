"""The plain loops have the laws of our samplers, so their seconds may be divided."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from tsdfm_bench.api import SampleRequest
from tsdfm_bench.methods.core.denoiser import NetworkDenoiser
from tsdfm_bench.methods.dfm import DFM
from tsdfm_bench.methods.fsdfm import FSDFM
from tsdfm_bench.methods.mdlm import MDLM
from tsdfm_bench.methods.sedd import SEDD, ScaledScoreDenoiser
from tsdfm_bench.rng import Streams
from tsdfm_bench.speed import plain

V, LENGTH, ROWS, STEPS = 3, 2, 20_000, 3


class Toy(nn.Module):
    """Logits that depend on all tokens, on the position and a little on the time."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.table = 2 * torch.randn(5**LENGTH, LENGTH, outputs, generator=torch.Generator().manual_seed(1))

    def forward(self, tokens: Tensor, time: Tensor, step_size: Tensor | None = None, at=None) -> Tensor:
        index = (tokens * 5 ** torch.arange(LENGTH)).sum(dim=1)
        logits = self.table[index] * (1 + 0.1 * time[:, None, None].clamp_max(1))
        return logits if at is None else logits[at]


def ours(method, steps: int = STEPS, source: str = "mask") -> np.ndarray:
    request = SampleRequest(Streams.of(0, "plain", ROWS), LENGTH, steps, source=source)
    return histogram(method.sample(request).tokens)


def histogram(tokens: Tensor) -> np.ndarray:
    assert tokens.max() < V
    return np.bincount((tokens * V ** torch.arange(LENGTH)).sum(dim=1).numpy(), minlength=V**LENGTH)


def theirs(loop, masked: bool, steps: int = STEPS) -> np.ndarray:
    torch.manual_seed(0)
    problem = plain.Problem(Toy(V + masked), ROWS, LENGTH, steps, V, masked)
    with torch.no_grad():
        return histogram(loop(problem))


def p_value(a: np.ndarray, b: np.ndarray) -> float:
    return float(stats.chi2_contingency(np.stack([a, b]) + 1).pvalue)


def network_denoiser(masked: bool, **settings) -> NetworkDenoiser:
    return NetworkDenoiser(Toy(V + masked), V, V + masked, **settings)


CASES = {
    "dfm-uniform": (lambda: DFM(network_denoiser(False)), "uniform", plain.dfm),
    "dfm-mask": (lambda: DFM(network_denoiser(True), "mask"), "mask", plain.dfm),
    "fsdfm-uniform": (lambda: FSDFM(network_denoiser(False, step_aware=True)), "uniform", plain.fsdfm),
    "fsdfm-mask": (lambda: FSDFM(network_denoiser(True, step_aware=True), "mask"), "mask", plain.fsdfm),
    "mdlm": (lambda: MDLM(network_denoiser(True, conditioning="none")), "mask", plain.mdlm),
    "mdlm-cache": (lambda: MDLM(network_denoiser(True, conditioning="none")), "mask", plain.mdlm_cache),
    "sedd": (
        lambda: SEDD(ScaledScoreDenoiser(Toy(V + 1), V, V + 1, kind="log_score", conditioning="sigma")),
        "mask",
        plain.sedd,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_plain_loop_has_the_law_of_our_sampler(name: str) -> None:
    build, source, loop = CASES[name]
    assert p_value(ours(build(), source=source), theirs(loop, source == "mask")) > 1e-3


def test_another_law_would_be_seen() -> None:
    """Euler and cumulative steps differ at three steps, and so do three steps and one."""
    euler = ours(DFM(network_denoiser(False)), source="uniform")
    assert p_value(euler, theirs(plain.fsdfm, False)) < 1e-4
    assert p_value(euler, theirs(plain.dfm, False, steps=1)) < 1e-4


@pytest.mark.parametrize("loop", [plain.dfm, plain.fsdfm, plain.mdlm, plain.mdlm_cache, plain.sedd])
def test_a_limit_ends_a_loop_after_as_many_calls(loop) -> None:
    network = Toy(V + 1)
    calls = []
    network.register_forward_hook(lambda *_: calls.append(1))
    loop(plain.Problem(network, 2000, LENGTH, 50, V, True, limit=4))
    assert len(calls) == 4  # with 2,000 rows something changes in every step
