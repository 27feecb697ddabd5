"""One-step laws of dfm and fsdfm, multiplied out on tiny vocabularies, and what the last step and the mask id do.

The formulas below are written from the papers' equations, independently of the kernels: for each position of a state z
with posterior p at time t, the probability of every next token.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tsdfm_bench.errors import UsageError
from tsdfm_bench.methods.core import Grid, Polynomial, Posterior, draw
from tsdfm_bench.methods.dfm import DFM, RedrawKernel
from tsdfm_bench.methods.fsdfm import FSDFM, CumulativeKernel
from tsdfm_bench.methods.tsdfm import TSDFM
from tsdfm_bench.rng import Streams

T, H = 0.35, 0.25
LENGTH = 2


def expected(law: str, p: np.ndarray, z: int, t: float, h: float, exponent: float = 1.0) -> np.ndarray:
    """P(. | z) of one step, from the spec."""
    kappa, kappa_next = t**exponent, (t + h) ** exponent
    result = np.zeros_like(p)
    if law in ("euler", "exact"):
        rate = exponent * t ** (exponent - 1) / (1 - kappa)
        a = 1 - math.exp(-h * rate) if law == "euler" else (kappa_next - kappa) / (1 - kappa)
        for y in range(len(p)):
            result[y] = a * p[y] + (1 - a) * (y == z)
        return result
    mean_rate = math.log((1 - kappa) / (1 - kappa_next)) / h
    leave = 1 - math.exp(-h * mean_rate * (1 - p[z]))
    for y in range(len(p)):
        result[y] = 1 - leave if y == z else leave * p[y] / (1 - p[z])
    return result


def without(p: np.ndarray, token: int) -> np.ndarray:
    p = p.copy()
    p[token] = 0
    return p / p.sum()


def kernel_of(law: str, posterior: Posterior, unmask_change: str = "reference"):
    if law == "cumulative":
        return CumulativeKernel(posterior, unmask_change)
    return RedrawKernel(posterior, law == "exact", unmask_change)


@pytest.mark.parametrize("source", ["uniform", "mask"])
@pytest.mark.parametrize("law", ["euler", "exact", "cumulative"])
def test_one_step_law_as_a_matrix_and_by_frequency(lab, law, source):
    vocab, outputs = (3, 3) if source == "uniform" else (2, 3)
    denoiser = lab.TableDenoiser(vocab, outputs, seed=1)
    posterior = Posterior(denoiser, Polynomial(), mask_id=2 if source == "mask" else None)
    kernel = kernel_of(law, posterior)
    grid = Grid.pairs([(T, T + H), (T + H, 1.0)])
    for z in lab.states(outputs, LENGTH):
        p = denoiser.probabilities(z, T)
        rows = [expected(law, p[i], z[i], T, H) for i in range(LENGTH)]
        matrix = kernel.transition(torch.from_numpy(p), torch.tensor(z), T, T + H)
        assert np.allclose(matrix.numpy(), rows, atol=1e-12)
        lab.agrees(lab.first_step(kernel, z, grid, 6000, seed=7), lab.product_law(rows, outputs))


@pytest.mark.parametrize("law", ["euler", "exact", "cumulative"])
def test_quadratic_schedule(lab, law):
    denoiser = lab.TableDenoiser(4, 4, seed=2)
    kernel = kernel_of(law, Posterior(denoiser, Polynomial(2.0)))
    z = (0, 3)
    p = denoiser.probabilities(z, T)
    rows = [expected(law, p[i], z[i], T, H, 2.0) for i in range(LENGTH)]
    assert np.allclose(kernel.transition(torch.from_numpy(p), torch.tensor(z), T, T + H).numpy(), rows, atol=1e-12)
    samples = lab.first_step(kernel, z, Grid.pairs([(T, T + H), (T + H, 1.0)]), 8000, seed=8)
    lab.agrees(samples, lab.product_law(rows, 4))


def test_first_euler_step_of_a_convex_schedule_does_nothing(lab):
    kernel = RedrawKernel(Posterior(lab.TableDenoiser(4, 4), Polynomial(2.0)), exact=False)
    samples = lab.first_step(kernel, (1, 2), Grid.uniform(4), 200, seed=0)
    assert (samples == torch.tensor([1, 2])).all()


def test_spec_values():
    """n = 1, t = .5, h = .25: Euler .393, bridge .5; cumulative against bridge at R = .5, p(z) = .9: .067 and .05."""
    euler = RedrawKernel(Posterior(None, Polynomial()), exact=False)  # type: ignore[arg-type]
    exact = RedrawKernel(Posterior(None, Polynomial()), exact=True)  # type: ignore[arg-type]
    start, end = torch.tensor([0.5], dtype=torch.float64), torch.tensor([0.75], dtype=torch.float64)
    assert euler.redraw_probability(start, end).item() == pytest.approx(0.3935, abs=1e-4)
    assert exact.redraw_probability(start, end).item() == pytest.approx(0.5)
    cumulative = CumulativeKernel(Posterior(None, Polynomial()))  # type: ignore[arg-type]
    p, z = torch.tensor([[0.9, 0.1]], dtype=torch.float64), torch.tensor([0])
    assert cumulative.transition(p, z, 0.5, 0.75)[0, 1].item() == pytest.approx(0.067, abs=5e-4)
    assert exact.transition(p, z, 0.5, 0.75)[0, 1].item() == pytest.approx(0.05)


@pytest.mark.parametrize("unmask_change", ["reference", "always", "never"])
@pytest.mark.parametrize("law", ["euler", "exact", "cumulative"])
def test_mask_source_middle_and_last_steps(lab, law, unmask_change):
    """Which positions move, where the mask id may be a destination, and that none is left."""
    mask = 2
    denoiser = lab.TableDenoiser(2, 3, seed=3)
    kernel = kernel_of(law, Posterior(denoiser, Polynomial(), mask_id=mask), unmask_change)
    middle, last = Grid.pairs([(T, T + H), (T + H, 1.0)]), Grid.pairs([(T, 1.0)])
    for z in [(mask, mask), (mask, 0), (1, mask), (0, 1)]:
        p = denoiser.probabilities(z, T)
        here = np.eye(3)
        rows, last_rows = [], []
        for i in range(LENGTH):
            clean = without(p[i], mask)
            if unmask_change == "never":
                rows.append(expected(law, clean, mask, T, H) if z[i] == mask else here[z[i]])
            else:
                rows.append(expected(law, p[i], z[i], T, H))
            keeps = unmask_change == "never" or (unmask_change == "reference" and law == "cumulative")
            stays = keeps and z[i] != mask
            last_rows.append(here[z[i]] if stays else clean)
        matrix = kernel.transition(torch.from_numpy(p), torch.tensor(z), T, T + H)
        assert np.allclose(matrix.numpy(), rows, atol=1e-12)
        matrix = kernel.transition(torch.from_numpy(p), torch.tensor(z), T, 1.0, last=True)
        assert np.allclose(matrix.numpy(), last_rows, atol=1e-12)
        if unmask_change != "never" or z == (mask, mask):  # "never" plans its walk from a state that is all mask
            lab.agrees(lab.first_step(kernel, z, middle, 4000, seed=9), lab.product_law(rows, 3))
            lab.agrees(lab.first_step(kernel, z, last, 4000, seed=10), lab.product_law(last_rows, 3))


@pytest.mark.parametrize("source", ["uniform", "mask"])
@pytest.mark.parametrize("law", ["euler", "exact", "cumulative"])
def test_whole_run_has_the_law_of_multiplied_steps(lab, law, source):
    """Three steps from the source, L = 2, by multiplying the full (Vn^L x Vn^L) matrices."""
    vocab, outputs = (2, 2) if source == "uniform" else (2, 3)
    denoiser = lab.TableDenoiser(vocab, outputs, seed=4)
    method = DFM(denoiser, source, solver=law)
    kernel = kernel_of(law, Posterior(denoiser, Polynomial(), mask_id=2 if source == "mask" else None))
    space = lab.states(outputs, LENGTH)
    p_0 = method.source.law().numpy()
    current = np.array([math.prod(p_0[y] for y in z) for z in space])
    times = [(0.0, 1 / 3), (1 / 3, 2 / 3), (2 / 3, 1.0)]
    for k, (t, t_next) in enumerate(times):
        matrix = np.zeros((len(space), len(space)))
        for i, z in enumerate(space):
            p = torch.from_numpy(denoiser.probabilities(z, t))
            rows = kernel.transition(p, torch.tensor(z), t, t_next, last=k == 2).numpy()
            matrix[i] = list(lab.product_law(list(rows), outputs).values())
        current = current @ matrix
    batch = method.sample(lab.request(12000, LENGTH, 3, source=source))
    lab.agrees(batch.tokens, dict(zip(space, current.tolist(), strict=True)))


def test_sequence_calls_do_not_grow_with_the_steps_that_do_nothing(lab):
    """At 512 steps a sequence of 8 tokens is visited only where a candidate falls, and at the end."""
    steps, length = 512, 8
    for method_class in (DFM, FSDFM):
        denoiser = lab.TableDenoiser(16, 16)
        method_class(denoiser, "uniform").sample(lab.request(32, length, steps))
        # chance of at least one of 8 candidates in step i: 1 - (1 - 1 / (512 - i))^8 at most
        expected_calls = sum(1 - (1 - 1 / k) ** length for k in range(1, steps + 1))
        assert denoiser.row_calls / 32 == pytest.approx(expected_calls, rel=0.15)
        assert denoiser.calls < 2 * expected_calls


def test_network_sees_the_step_it_takes(lab):
    """Few steps, all rows in step: times and step sizes of the calls are those of the grid."""
    seen = []

    class Recorder(lab.TableDenoiser):
        def predict(self, tokens, condition, rows, positions):
            seen.append((condition.t.clone(), condition.step_size.clone(), condition.kappa.clone()))
            return super().predict(tokens, condition, rows, positions)

    FSDFM(Recorder(16, 16), "uniform").sample(lab.request(4, 64, 4))
    assert len(seen) == 4
    for i, (t, h, kappa) in enumerate(seen):
        assert t.tolist() == [i / 4] * 4
        assert h.tolist() == [0.25] * 4
        assert torch.equal(kappa, t)


def test_gkl_checkpoints_walk_the_published_grid(lab):
    denoiser = lab.TableDenoiser(4, 4)
    trace = DFM(denoiser, time_eps=1e-3).sample(lab.request(1, 1, 1024, trace=True)).trace
    assert trace.shape[1] == 1023


def test_options_and_sources(lab):
    with pytest.raises(UsageError, match="did you mean 'exact'"):
        DFM(lab.TableDenoiser(4, 4), solver="exakt")
    with pytest.raises(UsageError, match="needs a denoiser of 5 outputs"):
        DFM(lab.TableDenoiser(4, 4), "mask")
    never = FSDFM(lab.TableDenoiser(4, 4), unmask_change="never")
    assert "concerns the mask source" in str(never.refuse(lab.request()))
    assert "start from source 'uniform'" in str(DFM(lab.TableDenoiser(4, 4)).refuse(lab.request(source="mask")))
    assert DFM(lab.TableDenoiser(4, 4)).refuse(lab.request()) is None


def test_tsdfm_samples_as_fsdfm(lab):
    a = FSDFM(lab.TableDenoiser(9, 9)).sample(lab.request(8, 12, 6))
    b = TSDFM(lab.TableDenoiser(9, 9)).sample(lab.request(8, 12, 6))
    assert torch.equal(a.tokens, b.tokens)
    assert TSDFM.info.name == "tsdfm"


@pytest.mark.parametrize("last", [False, True])
def test_candidates_go_where_exact_weights_send_them(lab, last, monkeypatch):
    """Rough fp32 weights change no decision, at and around every threshold: of leaving, and of a token's interval."""
    rows, size = 600, 300
    generator = torch.Generator().manual_seed(5)
    logits = 3 * torch.randn(rows, size, generator=generator)
    current = torch.randint(size, (rows,), generator=generator)
    logits[:80, :] -= 20.0 * (torch.arange(size) != current[:80, None])  # others have e^-17 of the weight, or less
    logits[80:90] = torch.where(torch.arange(size) == current[80:90, None], 0.0, -torch.inf)  # or none
    log_ratio = -3 * torch.rand(rows, generator=generator, dtype=torch.float64) - 0.1
    p = torch.softmax(logits.double(), dim=1)
    others = 1 - p.gather(1, current[:, None])[:, 0]
    leave = -torch.expm1(log_ratio * others)
    kernel = CumulativeKernel(Posterior(lab.TableDenoiser(2, 2), Polynomial()))
    lasts = torch.full((rows,), last)
    assert kernel.posterior.policy.roughly(logits, kernel.posterior.sharpen)
    found = []
    for few in (1 << 15, 1 << 30):  # the second makes every weight exact
        monkeypatch.setattr(draw, "FEW_ELEMENTS", few)
        for shift in (-1e-6, -1e-9, 1e-9, 1e-6):
            u_leave = (leave + shift).clamp(2.0**-53, 1 - 2.0**-53)
            for seed in range(3):
                u_token = Streams.of(seed, "token", rows).uniform("token", 0, 1)[:, 0]
                found.append(kernel._drawn(logits, current, log_ratio, u_leave, u_token, lasts, any_last=last))
    half = len(found) // 2
    assert all(torch.equal(rough, exact) for rough, exact in zip(found[:half], found[half:], strict=True))
    moved = torch.stack(found) != current
    assert moved.any()
    assert not moved.all()
    kernel.posterior.policy.check()
