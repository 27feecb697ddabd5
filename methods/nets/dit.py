"""The diffusion transformer of DFM, FS-DFM, MDLM and SEDD (arXiv 2407.15595, 2509.20624, 2406.07524, 2310.16834).

Bidirectional blocks with rotary positions; a scalar (flow time t, or sigma) modulates every layer norm (adaLN) through
zero-initialised linear maps, and the output map starts at zero, so the first logits are 0. With `step_aware` the
network is also conditioned on the step size h (FS-DFM, section 2.1 of the paper's appendix): the two embeddings are
fused once for the network and once per layer.

The head (final norm, modulation, vocabulary map) can be run at chosen positions only: at many steps hardly any
position changes, and the vocabulary map is a large share of the cost of a small network. On a CPU the last block then
runs there only, too: of the other positions no more than keys and values are needed.

Input and output: tokens (batch, length) int64 -> logits (batch, length, outputs) fp32, or (n, outputs) at n positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tsdfm_bench.api import plain
from tsdfm_bench.methods.nets.layers import (
    GELU,
    LayerNorm,
    Rotary,
    SinusoidalEmbedding,
    attend_at,
    dot_product_attention,
    merge_heads,
    split_heads,
)
from tsdfm_bench.methods.nets.pretrained import PretrainedNetwork

Positions = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class DiTConfig:
    """Geometry of a DiT.

    Args:
        vocab_size: real tokens V.
        outputs: embedding rows and outputs Vn: V, or V + 1 with a mask id appended.
        length: training length (rotary tables grow if a longer input comes).
        width, blocks, heads, condition: D, number of blocks, heads, conditioning width C.
        dropout: in the blocks, training only.
        step_aware: condition on the step size h too.
        time_scale: factor on the conditioning scalars before their sinusoids (1 = published).
        fuser_init: "torch_default" (released code) or "identity_preserving" (the student starts equal to the teacher).
    """

    vocab_size: int
    outputs: int
    length: int
    width: int = 768
    blocks: int = 12
    heads: int = 12
    condition: int = 128
    dropout: float = 0.0
    step_aware: bool = False
    time_scale: float = 1.0
    fuser_init: str = "torch_default"

    def __post_init__(self) -> None:
        if self.outputs not in (self.vocab_size, self.vocab_size + 1):
            raise ValueError(f"outputs must be vocab_size or vocab_size + 1, not {self.outputs} with {self.vocab_size}")
        if self.width % self.heads or (self.width // self.heads) % 2:
            raise ValueError(f"width {self.width} must split into {self.heads} heads of even size")
        if self.fuser_init not in ("torch_default", "identity_preserving"):
            raise ValueError(f"fuser_init '{self.fuser_init}' is neither 'torch_default' nor 'identity_preserving'")


class Block(nn.Module):
    """Attention and MLP, each gated and modulated by the condition."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.dropout = config.dropout
        self.norm1 = LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.attn_out = nn.Linear(width, width, bias=False)
        self.norm2 = LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), GELU(), nn.Linear(4 * width, width))
        self.adaln = nn.Linear(config.condition, 6 * width)

    def forward(self, x: Tensor, condition: Tensor, rotary: Rotary, at: Positions | None = None) -> Tensor:
        """(batch, length, width), (batch, condition) -> (batch, length, width), or (n, width) at n places."""
        modulation = self.adaln(condition)
        shift, scale = modulation[:, None, : 2 * x.shape[-1]].chunk(2, dim=-1)
        normed = torch.addcmul(shift, self.norm1(x), 1 + scale)
        if at is None:
            modulation = modulation[:, None]
            mixed = merge_heads(dot_product_attention(*split_heads(self.qkv(normed), self.heads, rotary)))
        else:
            x, modulation = x[at], modulation[at[0]]
            mixed = attend_at(normed, self.qkv.weight, self.heads, rotary, at)
        _, _, gate_a, shift_m, scale_m, gate_m = modulation.chunk(6, dim=-1)
        x = torch.addcmul(x, gate_a, F.dropout(self.attn_out(mixed), self.dropout, self.training))
        mixed = self.mlp(torch.addcmul(shift_m, self.norm2(x), 1 + scale_m))
        return torch.addcmul(x, gate_m, F.dropout(mixed, self.dropout, self.training))


class OutputLayer(nn.Module):
    """Modulated layer norm and the map to the vocabulary."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.norm = LayerNorm(config.width)
        self.adaln = nn.Linear(config.condition, 2 * config.width)
        self.linear = nn.Linear(config.width, config.outputs)

    def forward(self, x: Tensor, condition: Tensor, at: Positions | None) -> Tensor:
        """(batch, length, width) -> logits everywhere, or at n places only; x may be that of the places, (n, width)."""
        shift, scale = self.adaln(condition).chunk(2, dim=-1)
        if at is None:
            shift, scale = shift[:, None, :], scale[:, None, :]
        else:
            x, shift, scale = x if x.dim() == 2 else x[at], shift[at[0]], scale[at[0]]
        logits: Tensor = self.linear(torch.addcmul(shift, self.norm(x), 1 + scale))
        return logits.float()


class StepSizeFusion(nn.Module):
    """Step-size conditioning of FS-DFM: one condition per layer from the embeddings of t and h.

        c2  = SiLU(Linear([e_t, e_h])),    c_i = fuse_i(c2)                      published ("torch_default")
        c_i = SiLU(e_t) + fuse_i(c2),      fuse_i = 0 at the start               "identity_preserving"

    With the published form the student does not start equal to the network it was copied from; with the second it does.
    The published form also applies a last SiLU to c_i.
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        width = config.condition
        self.residual = config.fuser_init == "identity_preserving"
        self.embedding = SinusoidalEmbedding(width, config.time_scale)
        self.fuser = nn.Linear(2 * width, 2 * width)
        self.layers = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(config.blocks + 1))
        if self.residual:
            for parameter in self.layers.parameters():
                nn.init.zeros_(parameter)

    def forward(self, time_embedding: Tensor, step_size: Tensor) -> list[Tensor]:
        """(batch, C), (batch,) -> blocks + 1 conditions of shape (batch, C), the last for the output layer."""
        joint = F.silu(self.fuser(torch.cat([time_embedding, self.embedding(step_size)], dim=-1)))
        if self.residual:
            base = F.silu(time_embedding)
            return [base + layer(joint) for layer in self.layers]
        return [F.silu(layer(joint)) for layer in self.layers]


class DiT(PretrainedNetwork):
    """The diffusion transformer.

    Args:
        config: geometry; `config.outputs` is the number of logits per position.
    """

    architecture = "dit"
    config_class = DiTConfig

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.outputs, config.width)
        self.time = SinusoidalEmbedding(config.condition, config.time_scale)
        self.fusion = StepSizeFusion(config) if config.step_aware else None
        self.rotary = Rotary(config.width // config.heads, config.length)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.blocks))
        self.output = OutputLayer(config)
        for name, parameter in self.named_parameters():  # every block starts as the identity, the first logits are 0
            if ".adaln." in name or name.startswith("output.linear."):
                nn.init.zeros_(parameter)

    def conditions(self, time: Tensor, step_size: Tensor | None) -> list[Tensor]:
        """Conditions of the blocks and, last, of the output layer: blocks + 1 tensors (batch, C)."""
        embedded = self.time(time)
        if self.fusion is None:
            return [F.silu(embedded)] * (self.config.blocks + 1)
        if step_size is None:
            raise ValueError("this network is conditioned on the step size: step_size is required")
        return self.fusion(embedded, step_size)

    def forward(
        self, tokens: Tensor, time: Tensor, step_size: Tensor | None = None, at: Positions | None = None
    ) -> Tensor:
        """Clean-token logits (or log scores).

        Args:
            tokens: (batch, length) int64 in [0, outputs).
            time: (batch,) conditioning scalar.
            step_size: (batch,) h in (0, 1], for step-aware networks.
            at: rows (n,) and positions (n,) to run the head at; None = everywhere.

        Returns:
            (batch, length, outputs) or (n, outputs), fp32.
        """
        conditions = self.conditions(time, step_size)
        x = self.embedding(tokens)
        narrow = self.blocks[-1] if self._narrow(tokens, at) else None
        for block, condition in zip(self.blocks, conditions, strict=False):
            x = block(x, condition, self.rotary, at if block is narrow else None)
        logits: Tensor = self.output(x, conditions[-1], at)
        return logits

    def _narrow(self, tokens: Tensor, at: Positions | None) -> bool:
        """Whether the last block is run at the places only: on a CPU, for few (an accelerator would have to wait)."""
        if at is None or self.training or tokens.device.type != "cpu" or plain() or torch.compiler.is_compiling():
            return False
        if not self.blocks or not 0 < at[0].numel() <= tokens.numel() // 2:
            return False
        qkv = self.blocks[-1].qkv  # what stands in its place, or listens to it, has to be called
        return type(qkv) is nn.Linear and not (qkv._forward_hooks or qkv._forward_pre_hooks)
