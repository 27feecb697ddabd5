"""Checks of what a plug-in returns, before anything of it is stored: one `PluginError` that names the first fault."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tsdfm_bench.errors import PluginError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from tsdfm_bench.api import ScoreBatch


def check_batch(
    batch: Any,
    shape: tuple[int, int],
    vocab_size: int,
    pinned: tuple[Tensor, Tensor] | None = None,
    who: str = "sample",
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and lengths of a sampled batch, on the CPU.

    Args:
        batch: what `sample` returned.
        shape: (batch, length) asked for.
        vocab_size: number of real tokens V; a mask id is not one.
        pinned: prefix (batch, length) int64 and its mask (batch, length) bool, or None.
        who: the function that returned it, for messages.

    Returns:
        tokens (batch, length) int64 and lengths (batch,) int64.

    Raises:
        PluginError: wrong type, shape, dtype, id or length, or a pinned token that was changed.
    """
    import torch

    tokens = _tensor(batch, "tokens", shape, who)
    lengths = _tensor(batch, "lengths", shape[:1], who)
    if int(tokens.min()) < 0 or int(tokens.max()) >= vocab_size:
        bad = tokens[(tokens < 0) | (tokens >= vocab_size)]
        mask = " (a mask: positions were left undecided)" if int(bad[0]) == vocab_size else ""
        raise PluginError(
            f"{who} returned the token id {int(bad[0])}{mask}, {bad.numel()} of {tokens.numel()} ids are outside "
            f"[0, {vocab_size})"
        )
    if int(lengths.min()) < 0 or int(lengths.max()) > shape[1]:
        raise PluginError(f"{who} returned lengths outside [0, {shape[1]}]")
    if pinned is not None:
        kept = (tokens == pinned[0].cpu()) | ~pinned[1].cpu()
        if not bool(torch.all(kept)):
            raise PluginError(f"{who} changed {int((~kept).sum())} pinned tokens")
    return tokens.numpy(), lengths.numpy()


def _tensor(batch: Any, name: str, shape: tuple[int, ...], who: str) -> Any:
    import torch

    value = getattr(batch, name, None)
    if not isinstance(value, torch.Tensor):
        got = "nothing" if value is None else f"a {type(value).__name__}"
        raise PluginError(f"{who} must return a SampleBatch with a tensor of {name}, not {got}")
    if tuple(value.shape) != shape:
        raise PluginError(f"{who} returned {name} of shape {tuple(value.shape)}, asked for {shape}")
    if value.dtype != torch.int64:
        raise PluginError(f"{who} returned {name} of dtype {value.dtype}, the contract says torch.int64")
    if value.device.type == "meta":
        raise PluginError(f"{who} returned {name} on the meta device, which holds no values")
    return value.detach().cpu()


def check_scores(batch: Any, inputs: Sequence[Any]) -> ScoreBatch:
    """The scores of n texts, or n id sequences, as they are, or `PluginError` for the first fault."""
    import numpy as np

    from tsdfm_bench.api import ScoreBatch

    if not isinstance(batch, ScoreBatch):
        raise PluginError(f"score must return a ScoreBatch, not a {type(batch).__name__}")
    texts = len(inputs)
    for name in ("nll", "units", "special", "bytes"):
        if len(getattr(batch, name)) != texts:
            raise PluginError(f"score returned {len(getattr(batch, name))} {name} for {texts} texts")
    for i, (nll, units, special) in enumerate(zip(batch.nll, batch.units, batch.special, strict=True)):
        if not len(nll) == len(units) == len(special):
            raise PluginError(
                f"score returned {len(nll)} nll, {len(units)} units and {len(special)} special marks for text {i}"
            )
        if not np.all(np.isfinite(nll)):
            raise PluginError(f"score returned an NLL that is not finite for text {i}")
    if batch.features is not None and (np.ndim(batch.features) != 2 or len(batch.features) != texts):
        raise PluginError(f"score returned features of shape {np.shape(batch.features)} for {texts} texts")
    if batch.spans is not None:
        _check_spans(batch.spans, batch.nll, inputs)
    return batch


def _check_spans(spans: Any, nll: Sequence[np.ndarray], inputs: Sequence[Any]) -> None:
    import numpy as np

    if len(spans) != len(inputs):
        raise PluginError(f"score returned {len(spans)} spans for {len(inputs)} texts")
    for i, (row, units, text) in enumerate(zip(spans, nll, inputs, strict=True)):
        found = np.asarray(row)
        if found.shape != (len(units), 2) or not np.issubdtype(found.dtype, np.integer):
            raise PluginError(
                f"score returned spans of {found.dtype} {found.shape} for the {len(units)} units of text {i}: whole "
                f"numbers of shape ({len(units)}, 2) are needed"
            )
        if np.any(found[:, 0] < 0) or np.any(found[:, 0] > found[:, 1]) or np.any(found[:, 1] > len(text)):
            raise PluginError(f"score returned a span that does not lie in text {i}, which is {len(text)} long")
