"""The causal transformer of the autoregressive baseline: the DiT's blocks without conditioning, with a KV cache.

Row l of the logits is the distribution of token l given the tokens before it: the input is the sequence shifted by one,
with the end-of-text id first. With a cache, a call appends its tokens and attends to all earlier ones, so that sampling
L tokens costs L calls of length 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tsdfm_bench.methods.nets.layers import GELU, LayerNorm, Rotary, dot_product_attention, merge_heads, split_heads
from tsdfm_bench.methods.nets.pretrained import PretrainedNetwork


@dataclass(frozen=True)
class CausalConfig:
    """Geometry of a causal transformer.

    Args:
        vocab_size: tokens V, also the number of outputs.
        length: training length.
        bos_id: id that stands before the first token (end-of-text).
        width, blocks, heads: D, number of blocks, heads.
        dropout: in the blocks, training only.
    """

    vocab_size: int
    length: int
    bos_id: int = 0
    width: int = 768
    blocks: int = 12
    heads: int = 12
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.width % self.heads or (self.width // self.heads) % 2:
            raise ValueError(f"width {self.width} must split into {self.heads} heads of even size")
        if not 0 <= self.bos_id < self.vocab_size:
            raise ValueError(f"bos_id {self.bos_id} is outside the vocabulary of {self.vocab_size}")


class KVCache:
    """Keys and values of the tokens seen so far, (batch, heads, capacity, head) per block.

    `length` places are filled; the others hold whatever was in memory and are never read.
    """

    def __init__(self, blocks: int, shape: tuple[int, int, int, int], device: torch.device) -> None:
        self.keys = [torch.empty(shape, device=device) for _ in range(blocks)]
        self.values = [torch.empty(shape, device=device) for _ in range(blocks)]
        self.length = 0

    def append(self, block: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store (batch, heads, l, head) at the end and return all keys and values up to it."""
        end = self.length + key.shape[2]
        self.keys[block][:, :, self.length : end] = key
        self.values[block][:, :, self.length : end] = value
        return self.keys[block][:, :, :end], self.values[block][:, :, :end]


class CausalBlock(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, config: CausalConfig) -> None:
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.dropout = config.dropout
        self.norm1 = LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.attn_out = nn.Linear(width, width, bias=False)
        self.norm2 = LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, rotary: Rotary, cache: KVCache | None, index: int) -> Tensor:
        """(batch, l, width) -> (batch, l, width), attending to the cache and to earlier tokens."""
        length = x.shape[1]
        start = cache.length if cache is not None else 0
        q, k, v = split_heads(self.qkv(self.norm1(x)), self.heads, rotary, start)
        if cache is None or start == 0:
            if cache is not None:
                cache.append(index, k, v)
            mixed = dot_product_attention(q, k, v, causal=True)
        else:
            k, v = cache.append(index, k, v)
            mask = (
                torch.ones(length, start + length, dtype=torch.bool, device=x.device).tril(start)
                if length > 1
                else None
            )
            mixed = dot_product_attention(q, k, v, mask)
        mixed = self.attn_out(merge_heads(mixed))
        x = x + F.dropout(mixed, self.dropout, self.training)
        return x + F.dropout(self.mlp(self.norm2(x)), self.dropout, self.training)


class CausalTransformer(PretrainedNetwork):
    """The autoregressive network.

    Args:
        config: geometry.
    """

    architecture = "causal"
    config_class = CausalConfig

    def __init__(self, config: CausalConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.rotary = Rotary(config.width // config.heads, config.length)
        self.blocks = nn.ModuleList(CausalBlock(config) for _ in range(config.blocks))
        self.norm = LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.vocab_size)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def new_cache(self, batch: int, length: int) -> KVCache:
        """An empty cache for `length` tokens of `batch` sequences."""
        head = self.config.width // self.config.heads
        return KVCache(self.config.blocks, (batch, self.config.heads, length, head), self.embedding.weight.device)

    def forward(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """Next-token logits.

        Args:
            tokens: (batch, l) int64.
            cache: if given, `tokens` continue what it holds, and it is extended.

        Returns:
            (batch, l, vocab_size) fp32; row l belongs to the token after `tokens[:, l]`.
        """
        x = self.embedding(tokens)
        for index, block in enumerate(self.blocks):
            x = block(x, self.rotary, cache, index)
        if cache is not None:
            cache.length += tokens.shape[1]
        logits: Tensor = self.head(self.norm(x))
        return logits.float()
