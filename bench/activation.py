"""The activation that trained networks and judges share, fast on a CPU."""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tsdfm_bench.api import plain

PIECE = 1 << 16  # elements at a time: what stays in a core's cache
_SLOPE = math.sqrt(8 / math.pi)


class TanhGELU(nn.Module):
    """GELU in its tanh form (arXiv 1606.08415), x sigmoid(sqrt(8/pi) (x + 0.044715 x^3)).

    On a CPU torch computes it in one slow loop, and GPT-2's module of transformers in eight passes. Without gradients
    it is made here of four fast operations, over pieces that stay in the cache; equal to torch's up to rounding. Small
    tensors, gradients, other precisions and devices are left to torch.

    Args:
        precisions: in which it is made here, of float32 and bfloat16.
    """

    def __init__(self, precisions: Collection[torch.dtype] = (torch.float32, torch.bfloat16)) -> None:
        super().__init__()
        self.precisions = precisions

    def forward(self, x: Tensor) -> Tensor:
        """Any shape and floating dtype, element by element."""
        fast = x.dtype in self.precisions and x.numel() >= PIECE and x.device.type == "cpu"
        if x.requires_grad or not fast or plain():
            return F.gelu(x, approximate="tanh")
        result, slope = torch.empty(x.shape, dtype=x.dtype), torch.tensor(_SLOPE)
        for values, out in zip(x.flatten().split(PIECE), result.view(-1).split(PIECE), strict=True):
            values = values.float()
            gate = torch.addcmul(slope, values, values, value=0.044715 * _SLOPE).mul_(values).sigmoid_()
            torch.mul(gate, values, out=out) if out.dtype == gate.dtype else out.copy_(gate.mul_(values))
        return result
