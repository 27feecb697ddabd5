"""Losses against closed forms: values, gradients, and zeros at the true law."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tsdfm_bench.methods.train import losses
from tsdfm_bench.methods.train.objectives import uniform_log_score

torch.manual_seed(0)


def test_generalised_kl_is_the_published_formula_with_its_gradient() -> None:
    logits = torch.randn(2, 3, 5, dtype=torch.float32, requires_grad=True)
    x_1, x_t = torch.tensor([[0, 1, 2], [3, 4, 0]]), torch.tensor([[0, 2, 2], [1, 4, 3]])
    rate = torch.tensor([1.5, 4.0])
    value = losses.generalised_kl(logits, x_1, x_t, rate)
    p = logits.detach().softmax(-1)
    expected = torch.zeros(2, 3)
    gradient = torch.zeros_like(p)
    for b in range(2):
        for i in range(3):
            current, target, g = x_t[b, i], x_1[b, i], rate[b]
            same = current == target
            expected[b, i] = -g * (p[b, i, current] - float(same) + (0 if same else p[b, i, target].log()))
            onehot = torch.nn.functional.one_hot
            gradient[b, i] = -g * (
                p[b, i, current] * (onehot(current, 5) - p[b, i])
                + (0.0 if same else 1.0) * (onehot(target, 5) - p[b, i])
            )
    torch.testing.assert_close(value, expected)
    value.sum().backward()
    torch.testing.assert_close(logits.grad, gradient)


def test_masked_nelbo_ignores_revealed_positions_and_the_mask_logit() -> None:
    logits = torch.randn(1, 3, 4)
    x_1, x_t = torch.tensor([[0, 1, 2]]), torch.tensor([[3, 1, 3]])
    value = losses.masked_nelbo(logits, x_1, x_t, torch.tensor([2.0]), mask_id=3)
    log_p = logits[..., :3].log_softmax(-1)
    torch.testing.assert_close(value, torch.tensor([[-2 * log_p[0, 0, 0], 0.0, -2 * log_p[0, 2, 2]]]))
    shifted = logits.clone()
    shifted[..., 3] += 7
    torch.testing.assert_close(losses.masked_nelbo(shifted, x_1, x_t, torch.tensor([2.0]), mask_id=3), value)


def expected_absorb(log_score: Tensor, posterior: Tensor, sigma: Tensor) -> Tensor:
    return sum(  # type: ignore[return-value]
        posterior[y] * losses.score_entropy_absorb(log_score[None], torch.tensor([y]), sigma, torch.ones(1))
        for y in range(len(posterior))
    )


def test_absorb_score_entropy_is_least_at_the_true_score() -> None:
    sigma, posterior = torch.tensor([0.7]), torch.tensor([0.5, 0.2, 0.3])
    true = (posterior / math.expm1(0.7)).log().requires_grad_()
    value = expected_absorb(true, posterior, sigma)
    (gradient,) = torch.autograd.grad(value, true)
    torch.testing.assert_close(gradient, torch.zeros(3), atol=1e-6, rtol=0)
    certain = torch.tensor([1 / math.expm1(0.7), 0.0, 0.0]).log()
    assert (
        losses.score_entropy_absorb(certain[None].clamp_min(-60), torch.tensor([0]), sigma, torch.ones(1)).abs() < 1e-5
    )
    assert expected_absorb(true + 0.3, posterior, sigma) > value


@pytest.mark.parametrize("moved", [True, False])
def test_uniform_score_entropy_equals_its_definition_and_vanishes_at_the_true_score(moved: bool) -> None:
    size, alpha = 4, 0.6
    x_1, x_t = torch.tensor([[1]]), torch.tensor([[2 if moved else 1]])
    q = torch.full((size,), (1 - alpha) / size)
    q[1] += alpha
    ratio = q / q[x_t[0, 0]]
    log_score = torch.randn(1, 1, size)
    others = [y for y in range(size) if y != x_t[0, 0]]
    expected = (
        sum(log_score[0, 0, y].exp() - ratio[y] * log_score[0, 0, y] + ratio[y] * (ratio[y].log() - 1) for y in others)
        / size
    )
    value = losses.score_entropy_uniform(log_score, x_1, x_t, torch.tensor([alpha]), torch.tensor([3.0]))
    torch.testing.assert_close(value[0, 0], 3 * expected)
    true = losses.score_entropy_uniform(ratio.log()[None, None], x_1, x_t, torch.tensor([alpha]), torch.tensor([3.0]))
    assert true.abs() < 1e-5


def test_score_implied_by_a_posterior_is_the_expected_ratio() -> None:
    size, alpha, current = 5, 0.35, 3
    logits = torch.randn(1, 1, size)
    p = logits.softmax(-1)[0, 0].double()
    kernel = torch.full((size, size), (1 - alpha) / size, dtype=torch.float64) + alpha * torch.eye(
        size, dtype=torch.float64
    )
    expected = ((p[:, None] * kernel / kernel[:, current : current + 1]).sum(0)).log()  # rows x_1, columns y
    value = uniform_log_score(logits, torch.tensor([[current]]), torch.tensor([alpha]))[0, 0].double()
    others = [y for y in range(size) if y != current]
    torch.testing.assert_close(value[others], expected[others], rtol=1e-5, atol=1e-5)
    assert value[current] == 0


def test_forward_kl_is_zero_for_equal_logits_and_scales_with_temperature() -> None:
    a, b = torch.randn(2, 6), torch.randn(2, 6)
    torch.testing.assert_close(losses.forward_kl(a, a + 1.0), torch.zeros(2), atol=1e-6, rtol=0)
    p, q = (a / 2).softmax(-1), (b / 2).softmax(-1)
    torch.testing.assert_close(losses.forward_kl(a, b, 2.0), 4 * (p * (p / q).log()).sum(-1))


def test_nce_is_least_at_minus_the_log_density_ratio() -> None:
    positive, negative = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.2, 0.3, 0.5])
    energy = (-(positive / negative).log()).requires_grad_()
    zero = torch.zeros(3)
    value = (positive * losses.nce(energy, zero) + negative * losses.nce(zero, energy)).sum() - 2 * math.log(2)
    (gradient,) = torch.autograd.grad(value, energy)
    torch.testing.assert_close(gradient, torch.zeros(3), atol=1e-6, rtol=0)
