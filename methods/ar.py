"""Autoregressive baseline: a causal transformer sampled left to right with a key-value cache.

    x_1 ~ p(. | begin),    x_l ~ p(. | begin, x_1, ..., x_{l-1}),    l = 2 .. length

p is the network's next-token distribution after temperature, then nucleus (both top-p rules). The network is called
once per token: `length` calls, each on one new token, the earlier ones being in the cache. A prefix common to the batch
is read in the first call, so a pinned prefix of P tokens leaves length - P calls. Tokens can only be pinned at the left
end: a causal model has no conditional law given tokens to the right, so infilling is refused.

References: the baseline of arXiv 2406.07524 and 2310.16834; a cache is what any comparison of speed needs (arXiv
2410.21035).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from tsdfm_bench.api import MethodInfo, OracleSource, SampleBatch, SampleRequest
from tsdfm_bench.errors import UsageError
from tsdfm_bench.methods.builtin import Weighted, finished, parse_options
from tsdfm_bench.methods.core.denoiser import CausalDenoiser, CausalNetworkDenoiser
from tsdfm_bench.methods.core.draw import DrawPolicy
from tsdfm_bench.methods.core.request import refusal
from tsdfm_bench.methods.core.sharpen import Sharpen

INFILL = "ar writes from left to right: tokens can be pinned at the left end only, not in the middle or at the end"


class AR(Weighted):
    """Autoregressive sampling.

    Args:
        denoiser: next-token predictions.
        device: where sampling runs.
    """

    info = MethodInfo(name="ar", family="autoregressive", sources=(), citation="arXiv:1706.03762", uses_steps=False)

    def __init__(self, denoiser: CausalDenoiser, device: str = "cpu") -> None:
        self.denoiser = denoiser
        self.device = device

    @classmethod
    def from_network(
        cls,
        network: nn.Module,
        config: Mapping[str, Any],
        source: str | None,
        device: str,
        options: Mapping[str, str],
    ) -> Self:
        """Around a causal transformer; its configuration names the id that stands before the first token."""
        geometry = config["network"]
        return cls(CausalNetworkDenoiser(network, geometry["vocab_size"], int(geometry.get("bos_id", 0))), device)

    @classmethod
    def from_oracle(cls, oracle: OracleSource, params: Mapping[str, object], device: str) -> Self:
        """The sampler around a task's exact next-token law; see `tsdfm_bench.api.FromOracleHook`."""
        parse_options(cls.info, params)
        return cls(oracle("causal", None), device)

    def networks(self) -> Mapping[str, nn.Module]:
        """The networks whose calls are counted."""
        return self.denoiser.networks()

    def refuse(self, request: SampleRequest) -> str | None:
        """A reason not to serve the request, or None."""
        reason = refusal(request, self.info, self.denoiser.vocab_size, None)
        if reason is None and request.pinned is not None:
            pinned = request.pinned.bool()
            if bool((pinned[:, 1:] & ~pinned[:, :-1]).any()):
                return INFILL
        return reason

    def sample(self, request: SampleRequest) -> SampleBatch:
        """Sample one batch; see `tsdfm_bench.api.Method.sample`.

        A trace holds one state per token; tokens not yet written are shown as the vocabulary size.

        Raises:
            UsageError: the request is one that `refuse` gives a reason for.
        """
        reason = self.refuse(request)
        if reason is not None:
            raise UsageError(reason)
        with torch.no_grad():
            tokens = self._write(request)
        return finished(request, tokens, self._trace(request, tokens) if request.trace else None)

    def _write(self, request: SampleRequest) -> Tensor:
        streams = request.streams.to(self.device)
        tokens = torch.zeros(request.batch, request.length, dtype=torch.int64, device=self.device)
        kept = self._pinned(request)
        begin = 0
        if request.prefix is not None and kept is not None:
            tokens = torch.where(kept, request.prefix.to(self.device), tokens)
            begin = int(kept.sum(dim=1).min())
        if begin == request.length:
            return tokens
        sharpen = Sharpen(request.temperature, request.top_p, request.top_p_rule)
        policy = DrawPolicy(request.draw)
        spare = isinstance(self.denoiser, CausalNetworkDenoiser)  # an exact law may show a table of its own
        uniforms = streams.uniform("token", 0, request.length).split(1, dim=1)  # one per token
        written = [tokens[:, :begin]]
        memory = self.denoiser.begin(request.batch, request.length)
        logits = self.denoiser.next_logits(memory, tokens[:, :begin])
        for place in range(begin, request.length):
            token = policy.from_logits(logits, sharpen, uniforms[place], spare)
            if kept is not None:
                token = torch.where(kept[:, place, None], tokens[:, place, None], token)
            written.append(token)
            if place + 1 < request.length:
                logits = self.denoiser.next_logits(memory, token)
        policy.check()
        return torch.cat(written, dim=1)

    def _pinned(self, request: SampleRequest) -> Tensor | None:
        return None if request.pinned is None else request.pinned.bool().to(self.device)

    def _trace(self, request: SampleRequest, tokens: Tensor) -> Tensor:
        """(batch, length, length): after step l the first l + 1 tokens are there, and what is pinned."""
        length = request.length
        written = torch.ones(length, length, dtype=torch.bool, device=tokens.device).tril()[None]
        kept = self._pinned(request)
        if kept is not None:
            written = written | kept[:, None, :]
        return torch.where(written, tokens[:, None, :], self.denoiser.vocab_size)
