"""What the built-in methods share: options, weights, refusals, and the frame of a sampling run.

A method is a denoiser plus a way of walking from noise to data. `load` makes the denoiser from a checkpoint; the
constructor takes any object of the denoiser protocol, so an exact posterior can be sampled with the same code:

    DFM(denoiser=oracle, source="uniform", solver="exact").sample(request)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from tsdfm_bench.api import Identity, MethodInfo, OracleForm, OracleSource, SampleBatch, SampleRequest
from tsdfm_bench.errors import CheckpointError, UsageError, unknown_name
from tsdfm_bench.methods import checkpoints
from tsdfm_bench.methods.core.denoiser import Denoiser
from tsdfm_bench.methods.core.request import refusal
from tsdfm_bench.methods.core.schedule import Schedule, make_schedule
from tsdfm_bench.methods.core.source import Source, make_source
from tsdfm_bench.methods.core.state import State

RESERVED = ("task", "vocab_size", "checkpoint", "source", "length", "trust_pickle")


def parse_options(info: MethodInfo, params: Mapping[str, object]) -> dict[str, str]:
    """The method's own options among `params`, checked against `info.options`.

    Raises:
        UsageError: unknown option or value, with the nearest known ones.
    """
    options: dict[str, str] = {}
    for name, value in params.items():
        if name in RESERVED or (name == "name" and info.argument):
            continue
        if name not in info.options:
            raise unknown_name(f"option of {info.name}", name, info.options)
        options[name] = one_of(info, name, str(value))
    return options


def one_of(info: MethodInfo, name: str, value: str) -> str:
    """`value`, if option `name` of a method allows it; else UsageError."""
    allowed = info.options[name]
    if isinstance(allowed, tuple) and value not in allowed:
        raise unknown_name(f"{name} of {info.name}", value, allowed)
    return value


class Weighted(ABC):
    """A method whose networks come from a checkpoint folder.

    `lender` names the method whose weights it is sampled from, if they are not its own: another sampler for the same
    network (ReMDM on MDLM's weights) needs no training.
    """

    info: ClassVar[MethodInfo]
    lender: ClassVar[type[Weighted] | None] = None
    device: str

    @classmethod
    def load(cls, params: Mapping[str, object], device: str) -> Self:
        """Read weights and options; see `tsdfm_bench.api.Method.load`.

        Raises:
            UsageError: unknown option, value or source.
            CheckpointError: weights missing, damaged, or of something else.
        """
        options = parse_options(cls.info, params)
        checkpoint = cls._checkpoint(params)
        vocab_size = params.get("vocab_size")
        network, config = checkpoints.load_network(
            checkpoint, device, None if vocab_size is None else int(str(vocab_size))
        )
        try:
            return cls.from_network(network, config, checkpoint.source, device, options)
        except UsageError as error:
            raise CheckpointError(f"{checkpoint.folder}: {error}") from error

    @classmethod
    def untrained(cls, params: Mapping[str, object], geometry: Mapping[str, int], device: str) -> Self:
        """The method around a network with random weights, to measure what it costs.

        Args:
            params: options and `source`, as for `load`.
            geometry: vocab_size, length, width, blocks, heads and condition of the network.
            device: where it runs.
        """
        from tsdfm_bench.methods.untrained import untrained_network

        sources = cls.info.sources
        source = str(params.get("source") or sources[0]) if sources else None
        network, config = untrained_network((cls.lender or cls).info.name, source, geometry)
        return cls.from_network(network.to(device), config, source, device, parse_options(cls.info, params))

    @classmethod
    def identify(cls, params: Mapping[str, object]) -> Identity:
        """Name and hash of the weights `load(params)` would read."""
        return checkpoints.identify(cls._checkpoint(params))

    @classmethod
    def _checkpoint(cls, params: Mapping[str, object]) -> checkpoints.Checkpoint:
        source = params.get("source")
        sources = cls.info.sources
        if source is not None and source not in sources:
            raise unknown_name(f"source of {cls.info.name}", str(source), sources)
        chosen = str(source) if source is not None else (sources[0] if sources else None)
        given, task = params.get("checkpoint"), params.get("task")
        trained = (cls.lender or cls).info
        return checkpoints.find(
            trained.name,
            chosen,
            trained.sources,
            None if given is None else str(given),
            None if task is None else str(task),
            trust_pickle=bool(params.get("trust_pickle", False)),
            sampler=cls.info.name,
        )

    @classmethod
    @abstractmethod
    def from_network(
        cls,
        network: nn.Module,
        config: Mapping[str, Any],
        source: str | None,
        device: str,
        options: Mapping[str, str],
    ) -> Self:
        """The method around a loaded network.

        Args:
            network: on `device`, in eval mode.
            config: the checkpoint's config.json.
            source: the source the weights are for, or None.
            device: torch device string.
            options: checked options.
        """


class Walker(ABC):
    """A method that walks a state from a source to data, around any denoiser.

    Args:
        denoiser: predicts the clean sequence.
        source: a Source, or the name of one over the denoiser's vocabulary.
        schedule: kappa.
        device: where sampling runs.
    """

    info: ClassVar[MethodInfo]
    oracle_form: ClassVar[OracleForm] = "posterior"  # which exact predictions `from_oracle` asks for

    def __init__(self, denoiser: Denoiser, source: Source | str, schedule: Schedule, device: str) -> None:
        self.denoiser = denoiser
        self.source = make_source(source, denoiser.vocab_size) if isinstance(source, str) else source
        if self.source.outputs != denoiser.outputs:
            raise UsageError(
                f"source '{self.source.name}' needs a denoiser of {self.source.outputs} outputs, this one has"
                f" {denoiser.outputs}"
            )
        self.schedule = schedule
        self.device = device

    @classmethod
    def from_oracle(cls, oracle: OracleSource, params: Mapping[str, object], device: str) -> Self:
        """The sampler around a task's exact predictions; see `tsdfm_bench.api.FromOracleHook`."""
        options: dict[str, Any] = dict(parse_options(cls.info, params))
        source = str(params.get("source") or cls.info.sources[0])
        if len(cls.info.sources) > 1:
            options["source"] = source
        return cls(oracle(cls.oracle_form, source), device=device, **options)

    def networks(self) -> Mapping[str, nn.Module]:
        """The networks whose calls are counted."""
        return self.denoiser.networks()

    def refuse(self, request: SampleRequest) -> str | None:
        """A reason not to serve the request, or None."""
        return refusal(request, self.info, self.denoiser.vocab_size, self.source.name)

    def sample(self, request: SampleRequest) -> SampleBatch:
        """Sample one batch; see `tsdfm_bench.api.Method.sample`.

        Raises:
            UsageError: the request is one that `refuse` gives a reason for.
        """
        reason = self.refuse(request)
        if reason is not None:
            raise UsageError(reason)
        with torch.no_grad():
            state = State.start(
                self.source, request.streams.to(self.device), request.length, request.prefix, request.pinned
            )
            trace = self.walk(state, request)
        return finished(request, state.tokens, trace)

    @abstractmethod
    def walk(self, state: State, request: SampleRequest) -> Tensor | None:
        """Take the state to data, in place; returns the trace if one was asked for."""


class Diffusion(Walker, Weighted):
    """A walker whose denoiser comes from one checkpoint folder."""


def finished(request: SampleRequest, tokens: Tensor, trace: Tensor | None) -> SampleBatch:
    """The batch, on the device of the request's streams, every token counted."""
    device = request.streams.device
    lengths = torch.full((request.batch,), request.length, dtype=torch.int64, device=device)
    return SampleBatch(tokens.to(device), lengths, None if trace is None else trace.to(device))


def schedule_of(config: Mapping[str, Any], default: Schedule) -> Schedule:
    """The schedule a checkpoint names under "schedule", or the method's default."""
    return make_schedule(config.get("schedule"), default)
