"""Draw policies: inverse CDF against cumulative sums and frequencies, the legacy race against its closed form."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from tsdfm_bench.errors import PluginError, UsageError
from tsdfm_bench.methods.core import DrawPolicy, Sharpen, draw, sharpen
from tsdfm_bench.rng import Streams


def uniforms(n: int, name: str = "u") -> torch.Tensor:
    return Streams.of(5, name, n).uniform("draw", 0, 1)[:, 0]


@pytest.mark.parametrize("size", [1, 2, 63, 64, 65, 300, 2049])
def test_inverse_cdf_is_the_first_token_that_reaches_the_level(size):
    generator = torch.Generator().manual_seed(size)
    weights = torch.rand(500, size, generator=generator, dtype=torch.float64)
    weights[weights < 0.3] = 0
    weights[:, -1] += 0.1
    u = uniforms(500)
    chosen, total = draw.inverse_cdf(weights, u)
    assert torch.allclose(total, weights.sum(dim=1))
    cdf = weights.cumsum(dim=1) / weights.sum(dim=1, keepdim=True)
    assert torch.equal(chosen, torch.searchsorted(cdf, u[:, None], right=True)[:, 0])
    assert (weights.gather(1, chosen[:, None]) > 0).all()


def test_inverse_cdf_at_the_edges_never_returns_weight_zero(monkeypatch):
    weights = torch.zeros(4, 130, dtype=torch.float64)
    weights[0, 100] = 1.0
    weights[1, [3, 129]] = torch.tensor([1e-300, 1.0], dtype=torch.float64)
    weights[2, 64] = 5e-324
    weights[3, [0, 128]] = torch.tensor([1.0, 1e-18], dtype=torch.float64)
    for u in (2.0**-53, 0.5, 1 - 2.0**-53):
        for flat in (0, 1 << 15):
            monkeypatch.setattr(draw, "FEW_ELEMENTS", flat)
            chosen, _ = draw.inverse_cdf(weights, torch.full((4,), u, dtype=torch.float64))
            assert (weights.gather(1, chosen[:, None]) > 0).all()
    nothing, _ = draw.inverse_cdf(torch.zeros(1, 130, dtype=torch.float64), torch.tensor([0.5], dtype=torch.float64))
    assert 0 <= int(nothing) < 130


@pytest.mark.parametrize("policy", ["fp64", "legacy-fp32"])
def test_frequencies(policy):
    weights = torch.tensor([0.4, 0.1, 0.0, 0.3, 0.2], dtype=torch.float64)
    chosen = DrawPolicy(policy).categorical(weights.expand(40000, 5), uniforms(40000, policy))
    counts = torch.bincount(chosen, minlength=5).numpy()
    assert counts[2] == 0
    keep = weights.numpy() > 0
    assert stats.chisquare(counts[keep], 40000 * weights.numpy()[keep]).pvalue > 1e-4


def test_fp64_reaches_tokens_that_the_race_cannot():
    rare = 1e-9  # below (smallest noise) / (largest noise) = 6e-8 / 23
    weights = torch.tensor([[1.0, rare]], dtype=torch.float64)
    u = torch.tensor([1 - rare / 2], dtype=torch.float64)
    assert DrawPolicy("fp64").categorical(weights, u).item() == 1
    best_case = torch.tensor([[0.0, 1 - 2.0**-24]])  # the uniforms most favourable to the rare token
    noise = 1e-10 - (best_case + 1e-10).log()
    assert (weights.float() / noise).argmax() == 0


@pytest.mark.parametrize("rows", [1, 64])
def test_a_rare_token_is_drawn_from_logits(rows):
    """Its weight is below the rounding of an fp32 sum, behind a token that has nearly all of the mass."""
    rare = math.exp(-25)
    logits = torch.full((rows, 2048), -60.0)
    logits[:, 64] = 0
    logits[:, 127] = -25
    for u, token in ((1 - rare / 2, 127), (1 - 2 * rare, 64)):
        chosen = DrawPolicy().from_logits(logits, Sharpen(), torch.full((rows, 1), u, dtype=torch.float64))
        assert chosen.tolist() == [[token]] * rows


def many_logits(rows=40):
    """So many that sums of 64 are searched; whole blocks and single tokens are impossible."""
    logits = 4 * torch.randn(rows, 2048, generator=torch.Generator().manual_seed(1))
    logits[:, :130] = -torch.inf
    logits[:, 300:900:7] = -torch.inf
    logits[:, -64:] = -torch.inf
    assert logits.numel() > draw._SEARCHED_AT_ONCE
    return logits


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_many_logits_are_drawn_by_their_own_intervals(temperature):
    """u in the middle of the interval of a token, by fp64 sums of all: that token is drawn."""
    logits = many_logits()
    p = (logits[:1].double() / temperature).softmax(dim=1)
    middle = (p.cumsum(dim=1) - p / 2)[0]
    tokens = (p[0] > 1e-6).nonzero()[:, 0]
    assert len(tokens) > 100
    for some in tokens.split(len(logits)):
        rows = logits[:1].expand(len(logits), -1).clone()
        u = middle[some].new_full((len(logits),), 0.5)
        u[: len(some)] = middle[some]
        drawn = DrawPolicy().from_logits(rows, Sharpen(temperature), u[:, None])
        assert drawn[: len(some), 0].tolist() == some.tolist()


@pytest.mark.parametrize("u", [2.0**-53, 1e-9, 0.5, 1 - 1e-9, 1 - 2.0**-53])
def test_what_is_impossible_is_never_drawn_of_many_logits(u):
    logits = many_logits()
    drawn = DrawPolicy().from_logits(logits, Sharpen(), torch.full((len(logits), 1), u, dtype=torch.float64))
    assert torch.isfinite(logits.gather(1, drawn)).all()


def test_spare_logits_are_written_over_and_others_are_not():
    logits, u = many_logits(), torch.full((40, 1), 0.3, dtype=torch.float64)
    before = logits.clone()
    kept = DrawPolicy().from_logits(logits, Sharpen(), u)
    assert torch.equal(logits, before)
    assert torch.equal(DrawPolicy().from_logits(logits, Sharpen(), u, spare=True), kept)
    assert not torch.equal(logits, before)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_many_logits_that_are_not_finite_are_refused(value):
    logits, policy = many_logits(), DrawPolicy()
    logits[3, 1000] = value
    policy.from_logits(logits, Sharpen(), torch.full((40, 1), 0.3, dtype=torch.float64))
    with pytest.raises(PluginError, match="not finite"):
        policy.check()


def test_race_has_the_bias_of_its_closed_form(monkeypatch):
    """P(rare token wins | u_1 among the 64 largest values) for a weight ratio q of a few grid steps.

    The rare token wins iff E_1 < q E_0, E = 1e-10 - log(u + 1e-10). With u_0 continuous that has probability
    exp(-E_1 / q) for each of the 64 values of u_1; the sum over values falls short of the fp64 probability.
    """
    q, top, points = 2.0**-22, 64, 4096
    u_1 = 1 - torch.arange(1, top + 1) * 2.0**-24
    u_0 = ((torch.arange(points) + 0.5) / points * 2**24).floor() * 2.0**-24
    grid = torch.cartesian_prod(u_0, u_1).float()
    monkeypatch.setattr(draw, "race_uniforms", lambda seed, size: grid[seed])
    monkeypatch.setattr(draw, "_RACE_ELEMENTS", 2 * grid.shape[0])
    seeds = torch.arange(grid.shape[0]).double() * 2.0**-52
    weights = torch.tensor([1.0, q]).expand(grid.shape[0], 2)
    wins = draw.race(weights, seeds).view(points, top).float().mean(dim=0).numpy()
    noise = -np.log(1 - np.arange(1, top + 1) * 2.0**-24) + 1e-10
    assert wins == pytest.approx(np.exp(-noise / q), abs=2 / points)
    share = wins.sum() * 2.0**-24
    closed = 2.0**-24 / math.expm1(2.0**-24 / q)
    assert share == pytest.approx(closed, rel=0.01)
    assert share < 0.9 * q / (1 + q)  # the exact probability: the race is too cold


def test_race_uniforms_are_multiples_of_2_to_minus_24_and_uniform():
    u = draw.race_uniforms((uniforms(2000) * 2.0**52).long(), 50)
    assert u.dtype == torch.float32
    assert torch.equal(u * 2**24, (u * 2**24).floor())
    assert u.min() >= 0
    assert u.max() < 1
    assert stats.kstest(u.flatten().numpy(), "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(u[:, 0].numpy(), u[:, 1].numpy())[0, 1]) < 0.08
    assert abs(np.corrcoef(u[:-1, 0].numpy(), u[1:, 0].numpy())[0, 1]) < 0.08


def test_race_in_pieces_is_the_same(monkeypatch):
    weights = torch.rand(100, 33, generator=torch.Generator().manual_seed(0))
    whole = draw.race(weights, uniforms(100))
    monkeypatch.setattr(draw, "_RACE_ELEMENTS", 33 * 7)
    assert torch.equal(whole, draw.race(weights, uniforms(100)))


def test_unknown_policy_and_damaged_weights():
    with pytest.raises(UsageError, match="unknown draw 'fp32'"):
        DrawPolicy("fp32")  # type: ignore[arg-type]
    policy = DrawPolicy()
    policy.categorical(torch.ones(2, 3), uniforms(2))
    policy.check()
    policy.categorical(torch.tensor([[1.0, float("nan")]]), uniforms(1))
    with pytest.raises(PluginError, match="not finite"):
        policy.check()


def test_temperature():
    logits = torch.tensor([[0.3, -1.0, 2.0], [5.0, 5.0, -2.0]])
    for temperature in (0.5, 1.0, 2.0):
        w = Sharpen(temperature).weights(logits)
        assert w.dtype == torch.float64
        assert torch.allclose(w / w.sum(1, keepdim=True), torch.softmax(logits.double() / temperature, 1))
    assert Sharpen(0.0).weights(logits).tolist() == [[0, 0, 1], [1, 0, 0]]  # first of equal maxima


@pytest.mark.parametrize(
    ("rule", "top_p", "kept"),
    [
        ("inclusive", 0.7, [0, 1]),  # .5, then .5 + .3 crosses .7: kept
        ("exclusive", 0.7, [0]),  # the crossing token is dropped
        ("inclusive", 0.81, [0, 1, 2]),
        ("exclusive", 0.81, [0, 1]),
        ("inclusive", 0.3, [0]),
        ("exclusive", 0.3, [0]),  # the first token always stays
        ("inclusive", 1.0, [0, 1, 2, 3]),
        ("exclusive", 0.96, [0, 1, 2]),
    ],
)
def test_nucleus_rules(rule, top_p, kept):
    p = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    order = torch.tensor([2, 0, 3, 1])  # the rules must not depend on how tokens are numbered
    w = Sharpen(1.0, top_p, rule).weights(p[order].log()[None])[0]
    expected = torch.zeros(4, dtype=torch.float64)
    expected[kept] = p[kept] / p[kept].sum()
    assert torch.allclose(w / w.sum(), expected[order])


def test_temperature_acts_before_the_nucleus():
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    w = Sharpen(0.5, 0.6, "inclusive").weights(p.log()[None])[0]  # p^2: .25 .09 .04 -> .658 .237 .105
    assert (w > 0).tolist() == [True, False, False]
    w = Sharpen(1.0, 0.6, "inclusive").weights(p.log()[None])[0]
    assert (w > 0).tolist() == [True, True, False]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_tail_of_half_precision_logits_is_kept(dtype):
    """Weights in the logits' own precision would be 0 where fp64 promises a share of 1e-4."""
    logits = torch.full((1, 4096), -17.5, dtype=dtype)
    logits[0, 0] = 0.0
    u = torch.tensor([[1 - 1e-5]], dtype=torch.float64)
    drawn = DrawPolicy().from_logits(logits, Sharpen(), u)
    assert drawn.item() == DrawPolicy().categorical(Sharpen().weights(logits), u[:, 0]).item() > 3000


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_few_logits_have_the_probabilities_of_many(dtype, monkeypatch):
    """Few go through a softmax, many through powers of 2: both are the exponentials, to the last bits of fp64."""
    logits = 4 * torch.randn(6, 500, generator=torch.Generator().manual_seed(2)).to(dtype)
    logits[0, :7] = -torch.inf
    exact = torch.softmax(logits.double(), dim=1)
    for few in (0, 1 << 15):
        monkeypatch.setattr(sharpen, "FEW_ELEMENTS", few)
        w = Sharpen().weights(logits)
        torch.testing.assert_close(w / w.sum(dim=1, keepdim=True), exact, rtol=1e-13, atol=0)
        assert (w[0, :7] == 0).all()


def test_what_is_watched_keeps_no_sums_alive():
    """Of small draws only their totals are kept until the check, not the cumulative sums these are a column of."""
    policy = DrawPolicy()
    for _ in range(20):
        policy.categorical(torch.rand(2, 3000, dtype=torch.float64), uniforms(2))
        policy.from_logits(torch.randn(2, 3000), Sharpen(), uniforms(2)[:, None])
    assert sum(kept.untyped_storage().nbytes() for kept in policy._few) <= 40 * 64
    for _ in range(200):
        policy.categorical(torch.ones(2, 5, dtype=torch.float64), uniforms(2))
    assert len(policy._few) <= draw._KEPT
    policy.check()
    assert policy._few == []


@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize(("size", "top_p"), [(11, 0.5), (11, 0.9), (13, 0.9), (130, 0.5)])
def test_a_nucleus_does_not_depend_on_the_other_rows(size, top_p, temperature):
    """Which of several equal tokens are kept goes by their number, wherever a row lies in memory."""
    generator = torch.Generator().manual_seed(size)
    logits = torch.randn(400, 4, generator=generator).gather(1, torch.randint(4, (400, size), generator=generator))
    nucleus = Sharpen(temperature, top_p)
    together = nucleus.weights(logits)
    alone = torch.cat([nucleus.weights(row[None]) for row in logits])
    assert torch.equal(together > 0, alone > 0)
    for row, kept in zip(logits, together > 0, strict=True):
        tied = row == row[kept].amin()  # the value at the cut: the first ones of it are kept
        assert kept[tied].tolist() == sorted(kept[tied].tolist(), reverse=True)


@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
@pytest.mark.parametrize(("rows", "size"), [(64, 2048), (300, 129), (9, 50_257), (4000, 9)])
def test_rough_weights_give_the_tokens_of_exact_ones(rows, size, scale):
    """Also where the level is so near to a boundary that fp32 takes the wrong side: there it is looked at again."""
    generator = torch.Generator().manual_seed(size)
    logits = scale * torch.randn(rows, size, generator=generator)
    logits[0, 2:] = -torch.inf
    logits[1] -= 1000.0  # only differences count
    before = logits.clone()
    cdf = torch.softmax(logits.double(), dim=1).cumsum(dim=1)
    ends = cdf.gather(1, torch.randint(size, (rows, 1), generator=generator))[:, 0]
    policy = DrawPolicy()
    assert policy.roughly(logits, Sharpen())
    wrong = 0
    for shift in (-1e-6, -1e-8, -1e-10, 1e-10, 1e-8, 1e-6, None):
        u = uniforms(rows) if shift is None else (ends + shift).clamp(1e-9, 1 - 1e-9)
        exact = torch.searchsorted(cdf, u[:, None] * cdf[:, -1:])[:, 0]
        assert torch.equal(policy.exactly(logits, Sharpen(), u), exact)
        rough, total, unsure = draw.rough_search(draw.rough_weights(logits), u)
        assert torch.equal(rough[~unsure], exact[~unsure])
        wrong += int((rough != exact).sum())
        sums = torch.exp(logits.double() - logits.amax(dim=1, keepdim=True)).sum(dim=1)
        torch.testing.assert_close(total, sums, rtol=1e-5, atol=0)
    assert wrong > 0
    assert torch.equal(logits, before)
    policy.check()


def test_rough_weights_of_no_number_are_found_out():
    logits = torch.zeros(200, 2048)
    for value in (float("nan"), float("inf")):
        logits[7, 3] = value
        policy = DrawPolicy()
        assert (policy.exactly(logits, Sharpen(), uniforms(200)) < 2048).all()
        with pytest.raises(PluginError, match="not finite"):
            policy.check()


@pytest.mark.parametrize(
    ("logits", "sharpened", "name"),
    [
        (torch.zeros(200, 2048, dtype=torch.float64), Sharpen(), "fp64"),
        (torch.zeros(200, 2048), Sharpen(0.5), "fp64"),
        (torch.zeros(200, 2048), Sharpen(top_p=0.9), "fp64"),
        (torch.zeros(200, 2048), Sharpen(), "legacy-fp32"),
        (torch.zeros(3, 2048), Sharpen(), "fp64"),
        (torch.zeros(200, 2048, requires_grad=True), Sharpen(), "fp64"),
    ],
)
def test_other_draws_are_not_rough(logits, sharpened, name):
    assert not DrawPolicy(name).roughly(logits, sharpened)
