"""Long texts as overlapping windows, and windows as batches without waste.

A text of n tokens is read as context token + tokens. The first window scores up to `window` tokens; each further window
moves on by `stride` tokens, scores only those, and starts with the context token again, followed by as many earlier
tokens as fit. Padding is on the right: under a causal mask no real token sees it, so no attention mask is needed and a
text's scores do not depend on its neighbours. Windows are sorted by length so that little padding is computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Window:
    """One row of a forward pass.

    Args:
        text: index of the text.
        inputs: (l,) int64, context token first.
        targets: (k,) int64, the tokens that follow the last k inputs.
        first: index within the text of the first target.
    """

    text: int
    inputs: np.ndarray
    targets: np.ndarray
    first: int


def windows_of(text: int, tokens: Sequence[int], context: int, window: int, stride: int) -> list[Window]:
    """The windows of one text; every token is a target exactly once.

    Args:
        text: index of the text.
        tokens: its n tokens, without context token.
        context: the context token.
        window: most inputs of a row, at least 2.
        stride: new targets of each window after the first, 1 <= stride < window.
    """
    ids = np.asarray(tokens, dtype=np.int64)
    result: list[Window] = []
    done = 0
    while done < len(ids):
        end = min(window if done == 0 else done + stride, len(ids))
        begin = max(end - window, 0)  # inputs: the context token, then tokens begin .. end - 2
        inputs = np.concatenate([[context], ids[begin : end - 1]])
        result.append(Window(text, inputs, ids[done:end], done))
        done = end
    return result


def batches_of(windows: Sequence[Window], token_budget: int) -> Iterator[list[Window]]:
    """Windows in batches of at most `token_budget` inputs including padding (a longer window stands alone)."""
    batch: list[Window] = []
    for window in sorted(windows, key=lambda w: (-len(w.inputs), w.text, w.first)):
        longest = len(batch[0].inputs) if batch else 0
        if batch and longest * (len(batch) + 1) > token_budget:
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch
