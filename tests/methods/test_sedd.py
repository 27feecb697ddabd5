"""SEDD: one-step laws from matrix exponentials, exactness with a true score, the closing draw, and the race.

Forward process in total noise sigma: d p / d sigma = Q p, with Q[m, i] = 1, Q[i, i] = -1 (absorb) or Q = 1 1^T / V - I
(uniform). The analytic reverse weights are w(y) = (e^{-D Q} S)(y) (e^{D Q})[z, y], the Euler ones 1[y = z] + f R(y)."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.linalg import expm
from torch import nn

from tsdfm_bench.errors import UsageError
from tsdfm_bench.methods.core import (
    Condition,
    DrawPolicy,
    Finaliser,
    Geometric,
    Grid,
    LogLinear,
    Posterior,
    Sharpen,
    State,
    every_step,
    run,
)
from tsdfm_bench.methods.mdlm import MaskedKernel
from tsdfm_bench.methods.sedd import SEDD, AbsorbKernel, ScaledScoreDenoiser
from tsdfm_bench.methods.sedd_uniform import UniformKernel
from tsdfm_bench.rng import Streams

T, H = 0.4, 0.3
SCHEDULES = [LogLinear(), Geometric()]


def generator(graph: str, vocab: int) -> np.ndarray:
    if graph == "uniform":
        return np.full((vocab, vocab), 1 / vocab) - np.eye(vocab)
    q = -np.eye(vocab + 1)
    q[vocab] = 1
    q[:, vocab] = 0
    return q


def at(schedule, t: float) -> dict[str, float]:
    time = torch.tensor([t], dtype=torch.float64)
    return {"sigma": schedule.sigma(time).item(), "rate": schedule.sigma_rate(time).item()}


def expected(graph: str, law: str, s: np.ndarray, z: int, schedule, t: float, t_next: float) -> np.ndarray:
    """P(. | z) of one step: max(w, 0) / sum."""
    q = generator(graph, len(s) - (graph == "mask"))
    if law == "euler":
        step = (t_next - t) * at(schedule, t)["rate"]
        edge = q[z].copy()  # rate y -> z of the forward process
        edge[z] = 0
        w = step * s * edge
        w[z] = 1 - w.sum()
    else:
        delta = at(schedule, t)["sigma"] - at(schedule, t_next)["sigma"]
        w = (expm(-delta * q) @ s) * expm(delta * q)[z]
    w = np.maximum(w, 0)
    return w / w.sum()


def exact_scores(graph: str, p: np.ndarray, z: int, sigma: float) -> np.ndarray:
    """S(y) = sum_x p(x) q(y | x) / q(z | x) of a clean-token posterior p, by Bayes."""
    forward = expm(sigma * generator(graph, len(p)))  # [y, x]
    if graph == "mask":  # at a masked position p is the posterior given the mask, q(m | x) the same for all x
        return np.append(p * forward[0, 0] / forward[len(p), 0], 1.0)
    return np.array([sum(p[x] * forward[y, x] / forward[z, x] for x in range(len(p))) for y in range(len(p))])


def scores(denoiser, graph: str, z, i: int, schedule, t: float) -> np.ndarray:
    """S at position i of state z that the denoiser stands for."""
    p = denoiser.probabilities(z, t)[i]
    if denoiser.kind == "log_score":
        raw = denoiser.table_logits(z, t)[i]
        s = np.exp(raw)
        s[z[i]] = 1
        return s
    if graph == "mask":
        p = p[:-1] / p[:-1].sum()
    return exact_scores(graph, p, z[i], at(schedule, t)["sigma"])


def make(lab, kind: str, vocab: int, outputs: int, seed: int = 0, spread: float = 1.0):
    class WithLogits(lab.TableDenoiser):
        def table_logits(self, z, t):
            p = torch.tensor([z])
            rows, positions = torch.zeros(len(z), dtype=torch.int64), torch.arange(len(z))
            condition = Condition(torch.tensor([t], dtype=torch.float64), torch.tensor([1.0]), LogLinear())
            return self.predict(p, condition, rows, positions).double().numpy()

    return WithLogits(vocab, outputs, kind, seed, spread)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s.name)
@pytest.mark.parametrize("kind", ["log_score", "x0_logits"])
@pytest.mark.parametrize("law", ["analytic", "euler"])
@pytest.mark.parametrize("graph", ["uniform", "mask"])
def test_one_step_law(lab, graph, law, kind, schedule):
    vocab, outputs = (3, 3) if graph == "uniform" else (2, 3)
    denoiser = make(lab, kind, vocab, outputs, seed=3)
    posterior = Posterior(denoiser, schedule, mask_id=2 if graph == "mask" else None)
    kernel = (UniformKernel if graph == "uniform" else AbsorbKernel)(posterior, law == "euler")
    grid = Grid.pairs([(T, T + H), (T + H, 1 - 1e-5)])
    for z in lab.states(outputs, 2):
        s = [scores(denoiser, graph, z, i, schedule, T) for i in range(2)]
        rows = []
        for i in range(2):
            if graph == "mask" and z[i] != 2:
                rows.append(np.eye(3)[z[i]])
            else:
                rows.append(expected(graph, law, s[i], z[i], schedule, T, T + H))
        matrix = kernel.transition(torch.tensor(np.array(s)), torch.tensor(z), T, T + H).numpy()
        assert np.allclose(matrix, rows, atol=1e-9)
        lab.agrees(lab.first_step(kernel, z, grid, 1500, seed=5), lab.product_law(rows, outputs))


@pytest.mark.parametrize("kind", ["log_score", "x0_logits"])
@pytest.mark.parametrize("graph", ["uniform", "mask"])
def test_closing_draw(lab, graph, kind):
    """From nu = 0.3 the closing call draws the analytic law with D = sigma, masks excluded."""
    vocab, outputs = (3, 3) if graph == "uniform" else (2, 3)
    schedule = LogLinear()
    denoiser = make(lab, kind, vocab, outputs, seed=4)
    z = (0, 2)
    t = 0.7
    s = [scores(denoiser, graph, z, i, schedule, t) for i in range(2)]
    idle = Grid.pairs([(t, t)])  # a step of size 0 changes nothing
    if graph == "uniform":
        kernel = UniformKernel(Posterior(denoiser, schedule), euler=True)
        rows = [expected(graph, "analytic", s[i], z[i], schedule, t, 1.0) for i in range(2)]
        samples = lab.first_step(kernel, z, idle, 6000, seed=6, step=1)
        assert (lab.first_step(kernel, z, idle, 50, seed=6) == torch.tensor(z)).all()
    else:
        posterior = Posterior(denoiser, schedule, mask_id=2)
        kernel = AbsorbKernel(posterior, euler=False)
        rows = [np.eye(3)[0], np.append(s[1][:2] / s[1][:2].sum(), 0)]
        state = State(torch.tensor([z]).repeat(6000, 1), Streams.of(6, "closing", 6000))
        run(kernel, state, idle, Finaliser("sample"), posterior)
        samples = state.tokens
    matrix = kernel.transition(torch.tensor(np.array(s)), torch.tensor(z), t, 1.0, last=True).numpy()
    assert np.allclose(matrix, rows, atol=1e-9)
    lab.agrees(samples, lab.product_law(rows, 3))


def test_analytic_absorb_with_clean_token_logits_is_the_masked_law(lab):
    """The score implied by p makes the Tweedie step the ancestral step of masked diffusion, exactly."""
    schedule = LogLinear()
    denoiser = make(lab, "x0_logits", 3, 4, seed=5)
    posterior = Posterior(denoiser, schedule, mask_id=3)
    for z in lab.states(4, 1):
        p = torch.from_numpy(denoiser.probabilities(z, T))
        clean = p[0, :3] / p[0, :3].sum()
        s = torch.cat([clean / math.expm1(at(schedule, T)["sigma"]), torch.ones(1)])[None]
        tweedie = AbsorbKernel(posterior, euler=False).transition(s, torch.tensor(z), T, T + H)
        ancestral = MaskedKernel(posterior).transition(p, torch.tensor(z), T, T + H)
        assert torch.allclose(tweedie, ancestral, atol=1e-12)


def test_analytic_uniform_with_the_true_posterior_is_the_exact_bridge(lab):
    """P(y | z) = sum_x p(x) q(y at t + h | z, x), the bridge of the noising process."""
    schedule, vocab = LogLinear(), 4
    q = generator("uniform", vocab)
    sigma, sigma_next = at(schedule, T)["sigma"], at(schedule, T + H)["sigma"]
    early, late = expm(sigma_next * q), expm((sigma - sigma_next) * q)  # x -> y, y -> z
    p = np.array([0.6, 0.25, 0.1, 0.05])
    kernel = UniformKernel(Posterior(make(lab, "x0_logits", 4, 4), schedule), euler=False)
    for z in range(vocab):
        bridge = np.zeros(vocab)
        for x, y in itertools.product(range(vocab), repeat=2):
            bridge[y] += p[x] * early[y, x] * late[z, y] / (late @ early)[z, x]
        s = torch.tensor(exact_scores("uniform", p, z, sigma))[None]
        assert np.allclose(kernel.transition(s, torch.tensor([z]), T, T + H).numpy(), bridge, atol=1e-12)


@pytest.mark.parametrize("kind", ["log_score", "x0_logits"])
@pytest.mark.parametrize("law", ["analytic", "euler"])
def test_the_bound_of_moving_is_a_bound(lab, law, kind):
    """What preselects positions never falls below the exact fp64 probability of moving."""
    vocab, rows = 500, 400
    denoiser = make(lab, kind, vocab, vocab)
    generator_ = torch.Generator().manual_seed(1)
    logits = 4 * torch.randn(rows, vocab, generator=generator_)
    z = torch.randint(vocab, (rows,), generator=generator_)
    logits[:200].scatter_add_(1, z[:200, None], torch.full((200, 1), 25.0))  # nearly certain of the current token
    logits[0].scatter_(0, z[:1], -torch.inf)  # certain of another one
    for schedule in SCHEDULES:
        kernel = UniformKernel(Posterior(denoiser, schedule), law == "euler")
        steps = [(0.0, 0.001), (0.0, 0.5), (0.5, 0.501), (0.998, 0.9999), (0.999, 0.99999), (0.99999, 1.0)]
        for t, t_next in steps:
            start, end = (torch.full((rows,), x, dtype=torch.float64) for x in (t, t_next))
            closing = torch.full((rows,), t_next == 1.0)
            kappa, scale = schedule.kappa(start), kernel.scale(start, end, closing)
            weights = kernel.weights(logits, z, kappa, scale, closing)
            exact = 1 - weights.gather(1, z[:, None])[:, 0] / weights.sum(dim=1)
            if kind == "log_score":
                bound = kernel._leave_bound(logits, z, scale, kernel.analytic(closing))
                assert (exact <= bound * (1 + 1e-4) + 1e-9).all()
            else:
                bound = kernel.most_leaving(start, end, closing)
                assert (exact - bound).max() < 1e-7  # fp64 rounding where kappa is nearly 1
                assert exact[0].item() == pytest.approx(bound[0].item(), rel=1e-6, abs=1e-9)  # attained at p(z) = 0


@pytest.mark.parametrize("graph", ["uniform", "mask"])
def test_temperature_acts_on_the_clean_token_distribution(lab, graph):
    """A log-score denoiser that stands for p at temperature T steps like one that stands for p^(1/T)."""
    schedule, vocab = LogLinear(), 4
    denoiser = make(lab, "log_score", vocab, vocab)
    kernel = UniformKernel(Posterior(denoiser, schedule, Sharpen(0.5)), euler=False)
    p = np.array([0.5, 0.2, 0.2, 0.1])
    sharp = p**2 / (p**2).sum()
    for z in range(vocab):
        sigma = at(schedule, T)["sigma"]
        kappa = torch.tensor([math.exp(-sigma)], dtype=torch.float64)
        logits = torch.tensor(exact_scores("uniform", p, z, sigma))[None].log()
        ratios = kernel.ratios(logits, torch.tensor([z]), kappa)[0].numpy()
        assert np.allclose(ratios, exact_scores("uniform", sharp, z, sigma), rtol=1e-9)
    if graph == "mask":  # the probability of a reveal stays, the revealed token follows p at temperature T
        denoiser = make(lab, "log_score", 3, 4, seed=8)
        absorb = AbsorbKernel(Posterior(denoiser, schedule, Sharpen(0.5), mask_id=3), euler=False)
        s = scores(denoiser, "mask", (3,), 0, schedule, T)
        row = expected("mask", "analytic", s, 3, schedule, T, T + H)
        reveal = 1 - row[3]
        tempered = np.append(reveal * s[:3] ** 2 / (s[:3] ** 2).sum(), row[3])
        grid = Grid.pairs([(T, T + H), (T + H, 1 - 1e-5)])
        lab.agrees(lab.first_step(absorb, (3,), grid, 8000, seed=2), lab.product_law([tempered], 4))


@pytest.mark.parametrize("graph", ["uniform", "mask"])
def test_race_has_the_law_where_fp32_is_good_enough(lab, graph):
    vocab, outputs = (3, 3) if graph == "uniform" else (2, 3)
    denoiser = make(lab, "log_score", vocab, outputs, seed=3)
    posterior = Posterior(
        denoiser, LogLinear(), policy=DrawPolicy("legacy-fp32"), mask_id=2 if graph == "mask" else None
    )
    kernel = (UniformKernel if graph == "uniform" else AbsorbKernel)(posterior, False)
    z = (2, 2)
    rows = [
        expected(graph, "analytic", scores(denoiser, graph, z, i, LogLinear(), T), 2, LogLinear(), T, T + H)
        for i in range(2)
    ]
    grid = Grid.pairs([(T, T + H), (T + H, 1 - 1e-5)])
    lab.agrees(lab.first_step(kernel, z, grid, 4000, seed=5), lab.product_law(rows, outputs))


def test_calls(lab):
    """Absorb: until no mask is left. Uniform: every step and the closing one, or where a candidate falls."""
    denoiser = lab.TableDenoiser(4, 4, "log_score")
    SEDD(denoiser, "uniform").sample(lab.request(5, 6, 9))
    assert (denoiser.calls, denoiser.row_calls) == (10, 50)
    denoiser = lab.TableDenoiser(4, 4, "x0_logits")
    SEDD(denoiser, "uniform").sample(lab.request(5, 6, 1000))
    assert denoiser.row_calls < 5 * 150
    denoiser = lab.TableDenoiser(4, 5, "x0_logits")
    trace = SEDD(denoiser, "mask").sample(lab.request(5, 6, 9, trace=True)).trace
    assert trace.shape == (5, 10, 6)
    masked_before = torch.cat([torch.ones(5, 1, dtype=torch.bool), (trace[:, :9] == 4).any(dim=2)], dim=1)
    assert denoiser.row_calls == int(masked_before.sum())


def test_published_scaling_of_the_absorb_network():
    """log score = output - log(e^sigma - 1) - log V: a network that outputs log(V p) stands for the true score."""
    p = torch.tensor([0.7, 0.2, 0.1])

    class Net(nn.Module):
        def forward(self, tokens, time, at):
            self.time = time
            return torch.cat([(3 * p).log(), torch.zeros(1)]).expand(at[0].numel(), 4)

    net = Net()
    denoiser = ScaledScoreDenoiser(net, 3, 4, "log_score", "sigma")
    condition = Condition(torch.tensor([T], dtype=torch.float64), torch.tensor([T + H]), LogLinear())
    places = torch.zeros(1, dtype=torch.int64)
    s = denoiser.predict(torch.tensor([[3]]), condition, places, places).exp()[0, :3]
    sigma = at(LogLinear(), T)["sigma"]
    assert torch.allclose(s, p / math.expm1(sigma), rtol=1e-5)
    assert net.time.item() == pytest.approx(sigma, rel=1e-6)


def test_sources_and_options(lab):
    with pytest.raises(UsageError, match="did you mean 'analytic'"):
        SEDD(lab.TableDenoiser(4, 5), sampler="analytical")
    with pytest.raises(UsageError, match="needs a denoiser of 5 outputs"):
        SEDD(lab.TableDenoiser(4, 4), "mask")


def test_a_visit_made_elsewhere_is_served_as_the_kernels_own(lab):
    """A walk of a plug-in's own brings no factors of the grid."""
    posterior = Posterior(make(lab, "log_score", 2, 3, seed=4), LogLinear(), mask_id=2)
    kernel = AbsorbKernel(posterior, euler=False)
    grid = Grid.pairs([(T, T + H)])
    found = []
    for own in (True, False):
        state = State(torch.full((500, 2), 2), Streams.of(8, "elsewhere", 500))
        (visit,) = list(kernel.visits(state, grid)) if own else list(every_step(state, grid))
        assert ("factor" in visit.of_steps) is own
        kernel.step(state, visit)
        found.append(state.tokens)
    assert (found[0] != 2).any()
    assert torch.equal(*found)
