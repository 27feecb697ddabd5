"""Passes that fit into a GPU's memory: half as many windows at once, as often as memory runs out.

What a window draws is addressed by its place in the step (`data.Draws`), so a step or a validation made in more passes
is the same up to rounding.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


def that_fits(run: Callable[[int], T], windows: int, alone: bool) -> tuple[T, int]:
    """What `run(windows)` returns, and how many windows a pass it was given when memory sufficed.

    Args:
        run: called with the windows of a pass, and again with half of them after it ran out of memory.
        windows: to begin with.
        alone: False where other processes would have to follow; then nothing is tried again.

    Raises:
        MemoryError: one window is too many, or with `alone` False the first try failed; the message says what to do.
    """
    while True:
        try:
            return run(windows), windows
        except torch.OutOfMemoryError as error:
            if windows == 1:
                raise MemoryError(
                    "one window does not fit into the GPU's memory: choose a GPU with more of it, or a smaller width "
                    "or fewer blocks in the recipe's [network]"
                ) from error
            if not alone:
                raise MemoryError(
                    f"{windows} windows a pass do not fit into the GPU's memory: set micro_batch = {windows // 2} in "
                    "the recipe's [training], or in the stage where that has its own, of a copy if the recipe is a "
                    "shipped one (the result is the same up to rounding)"
                ) from error
        windows = -(-windows // 2)  # outside the except block, which would keep the failed tensors alive
        gc.collect()
        torch.cuda.empty_cache()
