"""The faster GELU is torch's."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from tsdfm_bench.activation import PIECE, TanhGELU
from tsdfm_bench.api import PLAIN_VARIABLE


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-6), (torch.bfloat16, 2.0**-8)])
@pytest.mark.parametrize("size", [10, PIECE, 2 * PIECE + 3])
def test_gelu_is_torchs(dtype, error, size):
    x = torch.cat([torch.tensor([-torch.inf, -1e4, -0.0, 0.0, 1e4, torch.inf]), 3 * torch.randn(size - 6)]).to(dtype)
    exact = F.gelu(x.double(), approximate="tanh")
    fast = TanhGELU()(x)
    assert fast.dtype == dtype
    assert fast.isnan().equal(F.gelu(x, approximate="tanh").isnan())
    torch.testing.assert_close(fast.double(), exact, rtol=error, atol=1e-6, equal_nan=True)


def test_gelu_leaves_its_input_and_the_way_of_gradients_alone(monkeypatch):
    x = torch.randn(2 * PIECE)
    before = x.clone()
    fast = TanhGELU()(x)
    assert torch.equal(x, before)
    monkeypatch.setenv(PLAIN_VARIABLE, "1")
    assert torch.equal(TanhGELU()(x), F.gelu(x, approximate="tanh"))
    assert not torch.equal(TanhGELU()(x), fast)
    monkeypatch.setenv(PLAIN_VARIABLE, "0")
    x.requires_grad_()
    TanhGELU()(x).sum().backward()
    assert x.grad is not None
