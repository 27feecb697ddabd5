"""Checks of a sampling request that every method shares: a reason to refuse it, or None."""

from __future__ import annotations

import math

from tsdfm_bench.api import MethodInfo, SampleRequest
from tsdfm_bench.methods.core.draw import DRAWS

TOP_P_RULES = ("inclusive", "exclusive")


def refusal(request: SampleRequest, info: MethodInfo, vocab_size: int, source: str | None) -> str | None:
    """Why a request cannot be served, in words for a table row, or None.

    Args:
        request: what is asked.
        info: of the method; `uses_steps` decides whether a step count is needed.
        vocab_size: V, for the pinned tokens.
        source: what the loaded method starts from, or None if it has no source.
    """
    return _numbers(request, info) or _source(request, info, source) or _prefix(request, vocab_size)


def _numbers(request: SampleRequest, info: MethodInfo) -> str | None:
    if info.uses_steps:
        if request.steps is None:
            return f"{info.name} needs a number of steps, for example --steps 8"
        if request.steps < 1:
            return f"steps must be at least 1, not {request.steps}"
    if request.length < 1:
        return f"length must be at least 1, not {request.length}"
    if not (math.isfinite(request.temperature) and request.temperature >= 0):
        return f"temperature must be a finite number >= 0 (0 means argmax), not {request.temperature}"
    if request.top_p is not None and not 0 < request.top_p <= 1:
        return f"top_p must lie in (0, 1], not {request.top_p}"
    if request.top_p_rule not in TOP_P_RULES:
        return f"unknown top-p rule '{request.top_p_rule}'; known: {', '.join(TOP_P_RULES)}"
    if request.draw not in DRAWS:
        return f"unknown draw '{request.draw}'; known: {', '.join(DRAWS)}"
    return None


def _source(request: SampleRequest, info: MethodInfo, source: str | None) -> str | None:
    if request.source is None or request.source == source:
        return None
    if not info.sources:
        return f"{info.name} has no source distribution, asked for '{request.source}'"
    if request.source not in info.sources:
        return f"{info.name} has no source '{request.source}'; it has: {', '.join(info.sources)}"
    return f"these weights of {info.name} start from source '{source}', asked for '{request.source}'"


def _prefix(request: SampleRequest, vocab_size: int) -> str | None:
    prefix, pinned = request.prefix, request.pinned
    if prefix is None and pinned is None:
        return None
    if prefix is None or pinned is None:
        return "prefix and pinned belong together: give both or neither"
    shape = (request.batch, request.length)
    for name, tensor in (("prefix", prefix), ("pinned", pinned)):
        if tuple(tensor.shape) != shape:
            return f"{name} has shape {tuple(tensor.shape)}, the request is {shape}"
    kept = prefix[pinned.bool()]
    if kept.numel() and (int(kept.min()) < 0 or int(kept.max()) >= vocab_size):
        return f"pinned tokens must lie in [0, {vocab_size})"
    return None
