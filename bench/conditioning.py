"""What is pinned in a sequence, and the reference rows that belong to it.

A pinning is one line of text, part of a cell's identity:

    ""              nothing
    held-out 16     the first 16 tokens of held-out sequences; sequence i has the same prompt in every cell
    infill 0.5      each position of held-out sequences with probability 0.5
    text My fellow  the tokens of a text, at the start

Under a held-out pinning the `real` row is the held-out sequences themselves, so it shows what a perfect continuation
scores; canaries get the pinned tokens written into them. Real text is split by parity: rows use the even places of one
order, the set that distances are compared with the odd ones. The two share no text as long as the held-out text has 2n
windows; beyond that it is cut anew at other offsets, and they overlap (`tasks.canaries.HeldOut`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tsdfm_bench.errors import UsageError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from tsdfm_bench.api import Task
    from tsdfm_bench.config import SweepConfig
    from tsdfm_bench.plan import Cell
    from tsdfm_bench.rng import Streams


def pinning(config: SweepConfig) -> str:
    """The pinning a request asks for."""
    if config.infill is not None:
        return f"infill {config.infill:g}"
    if config.prefix is None or not config.prefix.strip():
        return ""
    text = config.prefix.strip()
    return f"held-out {int(text)}" if text.isdecimal() else f"text {config.prefix}"


def check_pinning(setting: str, length: int, task: Task | None = None) -> None:
    """Raise `UsageError` unless at least one position is left free.

    Args:
        setting: a pinning.
        length: tokens per sequence.
        task: for the length of a text; without it texts are not checked.
    """
    what, _, argument = setting.partition(" ")
    if what == "held-out":
        count = int(argument)
    elif what == "text" and task is not None:
        count = len(task.encode(argument))
    else:
        return
    if not 1 <= count < length:
        raise UsageError(f"a prefix of {count} tokens does not fit sequences of {length}: 1 to {length - 1} do")


def _halved(cell: Cell, name: str, first: int, batch: int, odd: bool) -> Streams:
    """Streams of the even or odd places of an order that all cells of a sweep share."""
    import torch

    from tsdfm_bench.rng import Streams, derive_key

    key = derive_key(cell.seed, name, cell.task, cell.data_hash)
    return Streams(key, 2 * torch.arange(first, first + batch) + int(odd))


def pinned_tokens(cell: Cell, task: Task, first: int, batch: int, odd: bool = False) -> tuple[Tensor, Tensor] | None:
    """Prefix and mask of the sequences first .. first + batch - 1, or None if nothing is pinned.

    Returns:
        tokens (batch, length) int64 and pinned (batch, length) bool, on the CPU.
    """
    import torch

    what, _, argument = cell.prefix.partition(" ")
    if not what:
        return None
    pinned = torch.zeros(batch, cell.length, dtype=torch.bool)
    if what == "text":
        ids = torch.tensor(task.encode(argument), dtype=torch.int64)
        tokens = torch.zeros(batch, cell.length, dtype=torch.int64)
        tokens[:, : ids.numel()] = ids
        pinned[:, : ids.numel()] = True
        return tokens, pinned
    streams = _halved(cell, "prompts", first, batch, odd)
    tokens = task.prompts(streams, cell.length).cpu()
    if what == "held-out":
        pinned[:, : int(argument)] = True
    else:
        pinned = streams.uniform("infill", 0, cell.length) < float(argument)
    return tokens, pinned


def reference_batch(cell: Cell, task: Task, first: int, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences first .. first + batch - 1 of a reference row: tokens (batch, length) int64 and lengths (batch,)."""
    import torch

    from tsdfm_bench.rng import Streams

    held_out = cell.prefix.startswith(("held-out", "infill"))
    if cell.method == "real":
        if held_out:
            pinned = pinned_tokens(cell, task, first, batch, odd=cell.hidden)
            assert pinned is not None
            return pinned[0], torch.full((batch,), cell.length, dtype=torch.int64)
        result = task.reference("real", _halved(cell, "real", first, batch, odd=cell.hidden), cell.length)
        return result.tokens, result.lengths
    result = task.reference(cell.method, Streams.of(cell.seed, cell.id, batch, first), cell.length)
    pinned = pinned_tokens(cell, task, first, batch)
    tokens = result.tokens if pinned is None else torch.where(pinned[1], pinned[0], result.tokens)
    return tokens, result.lengths
