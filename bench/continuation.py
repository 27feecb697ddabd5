"""What follows a prompt: a row with a pinned prefix is measured on its continuation alone.

A judge reads prompt and continuation together, so the NLLs are those of the continuation given its prompt; the units of
the prompt are then left out. A judge's units are its own, and it does not say where they end: how many belong to the
prompt is found by letting it read the prompt by itself. The units both readings begin with are the prompt's; one that
reaches across the end of the prompt counts for the continuation, with all its bytes. Features are those of the whole
text.

Places given for an infilling are scattered: `infilling` tells what is measured there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tsdfm_bench.api import ScoreBatch
from tsdfm_bench.infilling import bytes_of
from tsdfm_bench.results.store import Samples

if TYPE_CHECKING:
    from tsdfm_bench.api import Task

Known = dict[bytes, tuple[np.ndarray, int]]  # a prompt -> its units and bytes


def prompt_length(setting: str, task: Task) -> int:
    """Leading tokens that are pinned in every sequence; 0 under an infilling or if nothing is pinned.

    Args:
        setting: a pinning, see `conditioning`.
        task: for the length of a text.
    """
    what, _, argument = setting.partition(" ")
    if what == "held-out":
        return int(argument)
    return len(task.encode(argument)) if is_typed(setting) else 0


def is_typed(setting: str) -> bool:
    """Whether what is pinned is a text of the user's, the same in every sequence."""
    return setting.partition(" ")[0] == "text"


def prompts_of(samples: Samples, given: int) -> Samples:
    """The first `given` tokens of every sequence."""
    return Samples(samples.tokens[:, :given], np.minimum(samples.lengths, given), {})


def cut(
    whole: ScoreBatch, prompts: Sequence[Any], known: Known, score: Callable[[list[Any]], ScoreBatch]
) -> ScoreBatch:
    """Scores of the continuations.

    Args:
        whole: of n texts, prompts included.
        prompts: n texts, or n id arrays (length,).
        known: prompts that were read before; extended.
        score: reads prompts.
    """
    keys = [_key(prompt) for prompt in prompts]
    new = {key: prompt for key, prompt in zip(keys, prompts, strict=True) if key not in known}
    if new and not isinstance(prompts[0], str):  # ids are units as they are
        known.update({key: (np.asarray(prompt), 0) for key, prompt in new.items()})
    elif new:
        read = score(list(new.values()))
        known.update(zip(new, zip(read.units, map(int, read.bytes), strict=True), strict=True))
    begins = [_common(units, known[key][0]) for units, key in zip(whole.units, keys, strict=True)]
    given = [known[key][1] for key in keys]
    if whole.spans is not None and isinstance(prompts[0], str):
        rows = zip(prompts, whole.spans, whole.special, begins, strict=True)
        given = [bytes_of(prompt, spans[:begin], np.asarray(ends)[:begin]) for prompt, spans, ends, begin in rows]
    left = [int(count) - before for count, before in zip(whole.bytes, given, strict=True)]
    return ScoreBatch(
        [row[begin:] for row, begin in zip(whole.nll, begins, strict=True)],
        [row[begin:] for row, begin in zip(whole.units, begins, strict=True)],
        [row[begin:] for row, begin in zip(whole.special, begins, strict=True)],
        np.maximum(np.asarray(left, dtype=np.int64), 0),
        whole.features,
    )


def _key(prompt: Any) -> bytes:
    return prompt.encode("utf-8", "surrogatepass") if isinstance(prompt, str) else np.asarray(prompt).tobytes()


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """How many units two sequences begin with in common."""
    size = min(len(a), len(b))
    different = np.flatnonzero(np.asarray(a[:size]) != np.asarray(b[:size]))
    return int(different[0]) if len(different) else size
