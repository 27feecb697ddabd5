"""The contract itself: what a method must have, what it returns, and that it works at every small length."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tsdfm_bench.api import Method, MethodInfo, SampleBatch
from tsdfm_bench.conformance.report import Failed, Skipped
from tsdfm_bench.conformance.subject import BATCH, LENGTH, Broke, Refused, Subject, require
from tsdfm_bench.contract import check_batch
from tsdfm_bench.errors import AssetError, BenchError, CheckpointError, PluginError, UsageError
from tsdfm_bench.meter import Meter
from tsdfm_bench.registry import one_line

ODD_LENGTHS = (1, 2, 5)


def contract(subject: Subject) -> str:
    """Attributes, their types, and the answer to an option that does not exist."""
    info = subject.info
    _check_info(info, subject.target.method)
    try:
        method = subject.method
    except (CheckpointError, AssetError) as error:
        raise Failed(f"it cannot be loaded: {error}") from None
    require(isinstance(method, Method), "load() must return an object with info, load, networks, refuse and sample")
    try:
        Meter(method.networks())
    except PluginError as error:
        raise Failed(str(error)) from None
    _check_unknown_option(subject)
    return f"API version {info.api_version}, family '{info.family}', networks: {', '.join(method.networks()) or 'none'}"


def _check_info(info: MethodInfo, registered: str) -> None:
    require(info.name == registered, f"info.name is '{info.name}', but it is registered as '{registered}'")
    require(bool(info.family) and isinstance(info.family, str), "info.family must be a word or two, such as 'flow'")
    require(_strings(info.sources), "info.sources must be a tuple of names")
    require(
        info.vocab_size is None or (isinstance(info.vocab_size, int) and info.vocab_size > 0),
        f"info.vocab_size must be a positive number or None, not {info.vocab_size!r}",
    )
    require(isinstance(info.options, Mapping), "info.options must be a mapping of option -> values or description")
    for name, values in info.options.items():
        good = isinstance(values, str) or (_strings(values) and len(values) > 0)
        require(good, f"info.options['{name}'] must be a tuple of allowed values or a line of description")


def _strings(value: object) -> bool:
    return isinstance(value, tuple) and all(isinstance(item, str) for item in value)


def _check_unknown_option(subject: Subject) -> None:
    """The contract says: an unknown option is a UsageError."""
    try:
        subject.cls.load(subject.params(no_such_option="1"), "cpu")
    except UsageError:
        return
    except Exception as error:
        raise Failed(f"load() with an unknown option must raise UsageError, not {one_line(error)}") from None
    raise Failed("load() accepts an option that does not exist; it must raise tsdfm_bench.errors.UsageError")


def runs(subject: Subject) -> str:
    """It loads, accepts the plainest request and returns something."""
    try:
        subject.serve(subject.request())
    except Refused as error:
        if not subject.setting.default:
            raise Skipped(f"refused: {error}") from None
        raise Failed(f"it refuses the plainest request: {error}") from None
    except Broke as error:
        raise Failed(f"sample() failed: {error}") from None
    except (CheckpointError, AssetError) as error:
        if not subject.setting.default:
            raise Skipped(str(error)) from None
        raise Failed(f"it cannot be loaded: {error}") from None
    except BenchError as error:
        raise Failed(f"it cannot be loaded: {error}") from None
    steps = "no steps" if not subject.info.uses_steps else f"{subject.request().steps} steps"
    return f"{BATCH} sequences of {LENGTH} tokens in {steps}"


def shapes(subject: Subject) -> str:
    """Type, shape and dtype of tokens, lengths and trace."""
    import torch

    batch = subject.serve(subject.request())
    _well_formed(batch, BATCH, LENGTH)
    try:
        traced = subject.maybe(subject.request(trace=True))
    except Broke:
        traced = None
    trace = getattr(traced, "trace", None)
    if trace is not None:
        shape = tuple(trace.shape)
        good = len(shape) == 3 and (shape[0], shape[2]) == (BATCH, LENGTH) and shape[1] > 0
        require(good, f"the trace has shape {shape}, the contract says ({BATCH}, recorded steps, {LENGTH})")
        require(not torch.is_floating_point(trace), f"the trace has dtype {trace.dtype}, it must be integer")
    kept = "no trace" if trace is None else f"trace of {trace.shape[1]} states"
    return f"tokens int64 ({BATCH}, {LENGTH}), lengths ({BATCH},), {kept}"


def _well_formed(batch: SampleBatch, rows: int, length: int) -> None:
    """Everything about a batch but the ids."""
    import torch

    probe = batch
    if isinstance(getattr(batch, "tokens", None), torch.Tensor):
        probe = replace(batch, tokens=torch.zeros_like(batch.tokens))
    try:
        check_batch(probe, (rows, length), 1)
    except PluginError as error:
        raise Failed(str(error)) from None


def ids(subject: Subject) -> str:
    """Ids lie in the vocabulary, for every kind of request that is served."""
    requests: list[tuple[str, dict[str, Any]]] = [("the plain request", {}), *subject.variations()]
    if subject.info.uses_steps:
        requests.append(("a single step", {"steps": 1}))
    served = []
    for name, settings in requests:
        batch = subject.maybe(subject.request(4 * BATCH, **settings))
        if batch is None:
            continue
        served.append(name)
        low, high = int(batch.tokens.min()), int(batch.tokens.max())
        outside = (batch.tokens < 0) | (batch.tokens >= subject.vocab_size)
        mask = " (a mask id: positions were left undecided)" if high == subject.vocab_size else ""
        require(
            not bool(outside.any()),
            f"{name}: {int(outside.sum())} of {batch.tokens.numel()} ids lie outside [0, {subject.vocab_size}): "
            f"{low if low < 0 else high}{mask}",
        )
    return f"all ids in [0, {subject.vocab_size}), {len(served)} kinds of request"


def lengths(subject: Subject) -> str:
    """Lengths 1, 2 and an odd one."""
    seen = []
    for length in ODD_LENGTHS:
        try:
            batch = subject.serve(subject.request(length=length), subject.load(length))
        except Refused as error:
            seen.append(f"{length} refused ({error})")
            continue
        except Broke as error:
            raise Failed(f"length {length}: {error}") from None
        _well_formed(batch, BATCH, length)
        seen.append(str(length))
    return f"lengths {', '.join(seen)}"
