"""Pieces of the networks: rotary positions, layer norm without bias, sinusoidal features, attention."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tsdfm_bench.activation import TanhGELU
from tsdfm_bench.api import plain

SMALL_HEAD = 32  # and smaller: rotated along whole rows on a CPU


class LayerNorm(nn.Module):
    """Layer norm with a weight and no bias, computed in fp32, eps 1e-5."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> (..., width) fp32."""
        return F.layer_norm(x.float(), (x.shape[-1],), self.weight, None, 1e-5)


class GELU(TanhGELU):
    """Of the networks' MLPs: in fp32 torch's own, so that recorded samples can be made again bit for bit."""

    def __init__(self) -> None:
        super().__init__((torch.bfloat16,))


class Rotary(nn.Module):
    """Rotary position embedding (arXiv 2104.09864), base 10000, half-split, over the full head dimension, fp32."""

    frequency: Tensor
    cos: Tensor
    sin: Tensor

    def __init__(self, head: int, length: int) -> None:
        super().__init__()
        frequency = 10000.0 ** (-torch.arange(0, head, 2, dtype=torch.float32) / head)
        self.register_buffer("frequency", frequency, persistent=False)
        self.rows: dict[tuple[int, torch.dtype], tuple[Tensor, Tensor, Tensor]] = {}
        self._extend(length)

    def _extend(self, length: int) -> None:
        angle = torch.arange(length, dtype=torch.float32, device=self.frequency.device)[:, None] * self.frequency
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)
        self.rows.clear()

    def forward(self, x: Tensor, start: int = 0) -> Tensor:
        """Rotate (..., length, head) by its positions start .. start + length - 1."""
        end = start + x.shape[-2]
        if end > self.cos.shape[0]:
            self._extend(end)
        return _turned(x, self.cos[start:end], self.sin[start:end])

    def along_rows(self, x: Tensor, start: int = 0) -> Tensor:
        """`forward` of projections (batch, length, heads * head) that are not split yet, on a CPU; the bits are equal.

        With small heads a CPU spends its time on the ends of loops over half a head. Here the halves change places by a
        product with a signed permutation, which is exact, and everything else runs along whole rows.
        """
        end, head = start + x.shape[1], 2 * self.cos.shape[1]
        if end > self.cos.shape[0]:
            self._extend(end)
        key = (x.shape[2] // head, x.dtype)
        if key not in self.rows:
            self.rows[key] = self._along_rows(*key)
        cos, sin, exchange = self.rows[key]
        exchanged = (x.reshape(-1, head) @ exchange).view(x.shape)
        return torch.addcmul(x * cos[start:end], exchanged, sin[start:end])

    def at(self, x: Tensor, positions: Tensor) -> Tensor:
        """`forward` of (n, heads, head) at n positions, all of them below the length seen so far."""
        return _turned(x, self.cos[positions, None], self.sin[positions, None])

    @torch.inference_mode(False)  # what is kept may be needed with gradients later
    def _along_rows(self, heads: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Cosines and sines of whole rows, (length, heads * head), and the map of (a, b) to (-b, a), (head, head)."""
        half = self.cos.shape[1]
        exchange = torch.zeros(2 * half, 2 * half, dtype=dtype)
        exchange[half:, :half] = -torch.eye(half)
        exchange[:half, half:] = torch.eye(half)
        return self.cos.to(dtype).repeat(1, 2 * heads), self.sin.to(dtype).repeat(1, 2 * heads), exchange


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(a, b) -> (a cos - b sin, b cos + a sin), a and b the halves of the last dimension."""
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    turned = torch.addcmul(first * cos, second, sin, value=-1), torch.addcmul(second * cos, first, sin)
    return torch.cat(turned, dim=-1)


class SinusoidalEmbedding(nn.Module):
    """A scalar -> 256 features [cos(s f_k), sin(s f_k)], f_k = 10000^(-k/128), then Linear, SiLU, Linear.

    `scale` multiplies the scalar first: with times in [0, 1] most of the 256 published features are constant
    (facebookresearch/flow_matching#17); scale 1 keeps the published behaviour.
    """

    frequency: Tensor

    def __init__(self, width: int, scale: float = 1.0, features: int = 256) -> None:
        super().__init__()
        half = features // 2
        frequency = torch.exp(-math.log(10000.0) * torch.arange(half, dtype=torch.float32) / half)
        self.register_buffer("frequency", frequency * scale, persistent=False)
        self.mlp = nn.Sequential(nn.Linear(features, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, scalar: Tensor) -> Tensor:
        """(batch,) -> (batch, width) fp32."""
        angle = scalar.float()[:, None] * self.frequency
        result: Tensor = self.mlp(torch.cat([angle.cos(), angle.sin()], dim=-1))
        return result


def dot_product_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """Softmax attention of (batch, heads, length, head) tensors.

    In training on a CPU it is computed in fp32: torch's backward pass of the bf16 kernel takes six times as long.
    """
    if q.requires_grad and q.device.type == "cpu":
        with torch.autocast("cpu", enabled=False):
            return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), mask, is_causal=causal)
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)


def split_heads(qkv: Tensor, heads: int, rotary: Rotary, start: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys with rotary positions, and values, of joint projections.

    Args:
        qkv: (batch, length, 3 width).
        heads: H.
        rotary: the rotation.
        start: position of the first token.

    Returns:
        three (batch, heads, length, head).
    """
    head = qkv.shape[2] // (3 * heads)

    def split(x: Tensor) -> Tensor:
        return x.unflatten(2, (-1, heads, head)).permute(2, 0, 3, 1, 4)

    if qkv.device.type == "cpu" and head <= SMALL_HEAD and not plain():
        both, values = qkv.split([2 * heads * head, heads * head], dim=2)
        q, k = split(rotary.along_rows(both, start))
        return q, k, split(values)[0]
    parts = split(qkv)
    q, k = rotary(parts[:2], start)
    return q, k, parts[2]


def attend_at(x: Tensor, weight: Tensor, heads: int, rotary: Rotary, at: tuple[Tensor, Tensor]) -> Tensor:
    """Attention of n places to all positions of their rows, before its output map.

    Args:
        x: (batch, length, width) what is projected.
        weight: (3 width, width) joint projection to queries, keys and values.
        heads: H.
        rotary: the rotation.
        at: rows (n,) and positions (n,) of the places, in any order.

    Returns:
        (n, width).
    """
    batch, _, width = x.shape
    head = width // heads
    rows, positions = at
    keys, values = F.linear(x, weight[width:]).split(width, dim=2)
    if head <= SMALL_HEAD and x.device.type == "cpu":
        keys = split_one(rotary.along_rows(keys), heads)
    else:
        keys = rotary(split_one(keys, heads))
    queries = rotary.at(F.linear(x[at], weight[:width]).unflatten(1, (heads, head)), positions)
    if batch == 1:
        mixed = dot_product_attention(queries.transpose(0, 1)[None], keys, split_one(values, heads))
        return merge_heads(mixed)[0]
    # rows have different numbers of places: each row's queries are put side by side and filled up with zeros
    counts = rows.bincount(minlength=batch)
    order = rows.argsort(stable=True)
    column = torch.empty_like(rows)
    column[order] = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows[order]]
    padded = queries.new_zeros(batch, int(counts.max()), heads, head)
    padded[rows, column] = queries
    mixed = dot_product_attention(padded.transpose(1, 2), keys, split_one(values, heads))
    return merge_heads(mixed)[rows, column]


def split_one(x: Tensor, heads: int) -> Tensor:
    """(batch, length, width) -> (batch, heads, length, head)."""
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


def merge_heads(mixed: Tensor) -> Tensor:
    """(batch, heads, length, head) -> (batch, length, width)."""
    return mixed.transpose(1, 2).flatten(2)
