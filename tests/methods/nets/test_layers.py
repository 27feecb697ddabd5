"""What the layers compute faster on a CPU is what the plain ones compute."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from tsdfm_bench.activation import PIECE, TanhGELU
from tsdfm_bench.api import PLAIN_VARIABLE
from tsdfm_bench.methods.nets.layers import GELU, Rotary, split_heads


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("head", "length", "start"), [(2, 7, 0), (16, 64, 0), (32, 1, 50), (32, 5, 90), (64, 9, 3)])
def test_rotation_along_rows_has_the_bits_of_the_rotation_of_heads(monkeypatch, dtype, head, length, start):
    """Also beyond the length of the tables, 64."""
    generator = torch.Generator().manual_seed(head)
    rotary, found = Rotary(head, 64), []
    joint = torch.randn(3, length, 3 * 4 * head, generator=generator).to(dtype)
    for value in ("1", "0", "0"):
        monkeypatch.setenv(PLAIN_VARIABLE, value)
        found.append(split_heads(joint, 4, rotary, start))
    for mine, again, reference in zip(found[1], found[2], found[0], strict=True):
        assert mine.shape == reference.shape == (3, 4, length, head)
        assert torch.equal(mine, reference)
        assert torch.equal(again, reference)


def test_rotation_along_rows_has_the_gradient_of_the_rotation_of_heads(monkeypatch):
    gradients = []
    for value in ("1", "0"):
        monkeypatch.setenv(PLAIN_VARIABLE, value)
        joint, rotary = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(0)), Rotary(8, 8)
        with torch.inference_mode():  # sampled with first
            split_heads(joint, 2, rotary)
        joint.requires_grad_()
        sum(part.square().sin().sum() for part in split_heads(joint, 2, rotary)).backward()
        gradients.append(joint.grad)
    torch.testing.assert_close(gradients[1], gradients[0])


def test_gelu_of_the_networks_has_torchs_bits_in_fp32():
    x = torch.randn(2 * PIECE)
    assert torch.equal(GELU()(x), F.gelu(x, approximate="tanh"))
    assert torch.equal(GELU()(x.bfloat16()), TanhGELU()(x.bfloat16()))
    assert not torch.equal(GELU()(x.bfloat16()), F.gelu(x.bfloat16(), approximate="tanh"))
