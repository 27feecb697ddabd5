"""A language model in the compass's place: what shaping could gain on text, where no exact law is known.

The oracle compass needs the law of the text. On real text the next best judge is a model that reads whole sequences, so
a student's stage may name one instead of a compass:

    network:NAME   an earlier autoregressive stage of the same recipe; a token's energy is its NLL
    scorer:SPEC    a scorer of the harness, on the decoded text; every token of a sequence has the sequence's mean NLL
                   as its energy, so that the policies "token" and "seq" choose alike

Neither reads noise. A state is completed first: the frozen teacher puts its most probable token at every position it is
asked for (masked ones from the mask source, all from the uniform source). What is judged is thus where the state leads,
and costs a call of the teacher and one of the judge per candidate.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tsdfm_bench.errors import CheckpointError, UsageError
from tsdfm_bench.methods.nets.causal import CausalTransformer
from tsdfm_bench.methods.nets.dit import DiT
from tsdfm_bench.methods.train.data import TrainingText
from tsdfm_bench.methods.train.objectives import ARObjective
from tsdfm_bench.methods.train.recipe import NETWORK, SCORER
from tsdfm_bench.methods.train.shortcut import without_mask

ROWS = 64
"""Sequences completed and judged at once: their logits are the memory it needs."""


class CompletedEnergy:
    """Token energies of states under a judge of finished sequences; see the module's text.

    Args:
        teacher: completes states.
        vocab_size: V; ids from V on are the mask.
        network: autoregressive judge, or None.
        judge: (n, length) int64 -> (n,) nats per unit, where there is no network.
    """

    def __init__(
        self,
        teacher: DiT,
        vocab_size: int,
        network: CausalTransformer | None = None,
        judge: Callable[[np.ndarray], np.ndarray] | None = None,
    ) -> None:
        self.teacher, self.vocab_size, self.network, self.judge = teacher, vocab_size, network, judge

    def completed(self, states: Tensor, time: Tensor) -> Tensor:
        """States (rows, length) at times (rows,) with the teacher's most probable tokens, (rows, length)."""
        likely = without_mask(self.teacher(states, time.float()), self.vocab_size).argmax(dim=-1)
        masked = self.teacher.config.outputs > self.vocab_size
        return torch.where(states == self.vocab_size, likely, states) if masked else likely

    @torch.no_grad()
    def __call__(self, states: Tensor, time: Tensor, origin: Tensor) -> Tensor:
        """(rows, length) fp32; `origin` plays no role."""
        parts = zip(states.split(ROWS), time.split(ROWS), strict=True)
        return torch.cat([self._judged(self.completed(part, at)) for part, at in parts])

    def _judged(self, whole: Tensor) -> Tensor:
        if self.network is not None:
            return ARObjective(self.vocab_size, self.network.config.bos_id).nll(self.network, whole)
        assert self.judge is not None
        means = torch.from_numpy(self.judge(whole.cpu().numpy()))
        return means.to(whole.device, torch.float32)[:, None].expand(whole.shape)


def judged_by_model(named: str, text: TrainingText, teacher: DiT, folder: Path, device: str) -> CompletedEnergy:
    """The energy of `network:NAME` or `scorer:SPEC`.

    Raises:
        CheckpointError: the network does not fit the text.
        UsageError: the text comes without scorers.
    """
    if named.startswith(SCORER):
        if text.judges is None:
            raise UsageError(f"compass '{named}': no scorers are at hand for text '{text.name}'")
        return CompletedEnergy(teacher, text.vocab_size, judge=text.judges(named.removeprefix(SCORER)))
    path = folder / named.removeprefix(NETWORK)
    network = CausalTransformer.from_pretrained(path, device).requires_grad_(False)
    for name, theirs, ours in (
        ("vocab_size", network.config.vocab_size, text.vocab_size),
        ("length", network.config.length, text.length),
    ):
        if theirs != ours:
            raise CheckpointError(f"compass {path} has {name} {theirs}, the text '{text.name}' {ours}")
    return CompletedEnergy(teacher, text.vocab_size, network)
