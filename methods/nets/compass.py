"""The energy compass of TS-DFM: the first blocks of the frozen teacher with one scalar per token on top.

The energy of a sequence is the mean of its token energies; low means coherent (arXiv 2605.07924; the architecture is
this project's reading, see the method's page). One network serves both the sequence-wise and the token-wise policy.
With `see_origin` the compass also sees the state x_t that the candidate was proposed from: the two embeddings are
concatenated and projected.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tsdfm_bench.methods.nets.dit import Block, DiT, DiTConfig
from tsdfm_bench.methods.nets.layers import LayerNorm, Rotary, SinusoidalEmbedding
from tsdfm_bench.methods.nets.pretrained import PretrainedNetwork


@dataclass(frozen=True)
class CompassConfig(DiTConfig):
    """Geometry of a compass: the teacher's, with fewer blocks.

    Args:
        see_origin: condition on the state the candidate was proposed from.
        changed_only: token energies count only where the candidate differs from that state: elsewhere bridge and
            builder agree, and what a noisy token looks like says nothing about the candidate.
    """

    see_origin: bool = False
    changed_only: bool = False


class Compass(PretrainedNetwork):
    """Energy of candidate sequences.

    Args:
        config: geometry.
    """

    architecture = "compass"
    config_class = CompassConfig

    def __init__(self, config: CompassConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.outputs, config.width)
        self.merge = nn.Linear(2 * config.width, config.width) if config.see_origin else None
        if self.merge is not None:  # start from the candidate alone
            with torch.no_grad():
                self.merge.weight.copy_(torch.eye(config.width, 2 * config.width))
                self.merge.bias.zero_()
        self.time = SinusoidalEmbedding(config.condition, config.time_scale)
        self.rotary = Rotary(config.width // config.heads, config.length)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.blocks))
        self.norm = LayerNorm(config.width)
        self.head = nn.Linear(config.width, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    @classmethod
    def from_teacher(cls, teacher: DiT, blocks: int, see_origin: bool = False, changed_only: bool = False) -> Compass:
        """A compass whose embedding, time map and first blocks are copies of the teacher's."""
        source = teacher.config
        if not 1 <= blocks <= source.blocks:
            raise ValueError(f"a compass of {blocks} blocks cannot start from a teacher of {source.blocks}")
        config = CompassConfig(
            vocab_size=source.vocab_size,
            outputs=source.outputs,
            length=source.length,
            width=source.width,
            blocks=blocks,
            heads=source.heads,
            condition=source.condition,
            time_scale=source.time_scale,
            see_origin=see_origin,
            changed_only=changed_only,
        )
        compass = cls(config)
        compass.embedding.load_state_dict(teacher.embedding.state_dict())
        compass.time.load_state_dict(teacher.time.state_dict())
        for own, theirs in zip(compass.blocks, teacher.blocks, strict=False):
            own.load_state_dict(theirs.state_dict())
        return compass

    def forward(self, tokens: Tensor, time: Tensor, origin: Tensor | None = None) -> Tensor:
        """Token energies.

        Args:
            tokens: (batch, length) int64 candidate states at `time`.
            time: (batch,) time of the state being judged.
            origin: (batch, length) int64 state it was proposed from, if `see_origin` or `changed_only`.

        Returns:
            (batch, length) fp32; the sequence energy is the mean over length.
        """
        condition = F.silu(self.time(time))
        x = self.embedding(tokens)
        if origin is None and (self.config.see_origin or self.config.changed_only):
            raise ValueError("this compass is conditioned on the origin state: origin is required")
        if self.merge is not None:
            x = self.merge(torch.cat([x, self.embedding(origin)], dim=-1))
        for block in self.blocks:
            x = block(x, condition, self.rotary)
        energy: Tensor = self.head(self.norm(x)).squeeze(-1).float()
        return energy * (tokens != origin) if self.config.changed_only else energy
