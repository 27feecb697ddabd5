"""What was filled in: a row whose free places lie between given ones is measured on those places alone.

Measures on tokens see the tokens that were filled in, moved together, and where they stand (`api.Infilling`). A judge
reads the whole text, so its NLLs are those of a unit given all text before it; of its units, those count that have at
least one character that was filled in, as a unit across the end of a prompt counts for the continuation. So every
filled-in character is counted once, and a unit across a border brings some given ones with it: bits per byte divide by
the bytes of the counted units. A judge that does not say where its units lie gives such a row no number.

Where a task's token stands in its text is found by decoding. If a text is its tokens' texts put together, that settles
it. Otherwise (bytes of one character in several tokens, blanks between tokens) a token begins where the text of the
tokens before it ends, and includes a character that it completes or only begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from tsdfm_bench.api import Infilling, ScoreBatch
from tsdfm_bench.conditioning import pinned_tokens
from tsdfm_bench.errors import PluginError

if TYPE_CHECKING:
    from tsdfm_bench.api import Task
    from tsdfm_bench.plan import Cell

NO_SPANS = "it does not say where its units lie in a text (ScoreBatch.spans): what was filled in cannot be told apart"
ABOUT = "; of an infilling, what was filled in alone"
ABOUT_UNITS = f"{ABOUT}: a scorer's unit counts if any of its characters was filled in"
ABOUT_TOKENS = f"{ABOUT}: an n-gram counts if all its tokens were filled in"
ABOUT_FEATURES = "; of an infilling, given and filled in together"


def is_infilling(setting: str) -> bool:
    """Whether a pinning leaves scattered places free; see `conditioning`."""
    return setting.startswith("infill ")


def filled_places(cell: Cell, task: Task, lengths: np.ndarray) -> np.ndarray:
    """(n, length) bool, the places of the first n sequences of a cell that were not given."""
    pinned = pinned_tokens(cell, task, 0, len(lengths), odd=cell.hidden)
    assert pinned is not None
    return ~pinned[1].numpy() & (np.arange(cell.length) < np.asarray(lengths)[:, None])


@dataclass(frozen=True)
class Filled:
    """Sequences with given and filled-in places.

    Args:
        tokens: (n, length) integers.
        lengths: (n,) how many of a row count.
        texts: n texts.
        places: (n, length) bool, what was filled in.
        task: decodes tokens.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    texts: Sequence[str]
    places: np.ndarray
    task: Task

    def moved_together(self) -> tuple[np.ndarray, np.ndarray, Infilling]:
        """The filled-in tokens (n, length) to the left, 0 behind them; their number (n,) int64; what they are of."""
        places = np.argsort(~self.places, axis=1, kind="stable")
        counts = self.places.sum(axis=1, dtype=np.int64)
        found = np.take_along_axis(self.tokens, places, axis=1)
        found[np.arange(found.shape[1]) >= counts[:, None]] = 0
        return found, counts, Infilling(self.tokens, np.asarray(self.lengths, dtype=np.int64), places)

    def scores(self, whole: ScoreBatch, in_tokens: bool) -> ScoreBatch:
        """Scores of the units that have a filled-in part, and their bytes.

        Args:
            whole: of the n texts, with spans.
            in_tokens: the spans are in tokens, not in characters; there are then no bytes.

        Raises:
            PluginError: a text is not what its tokens decode to.
        """
        assert whole.spans is not None
        inside = list(self.places) if in_tokens else self.characters
        before = [np.concatenate([[0], np.cumsum(row)]) for row in inside]
        kept = [at[units[:, 1]] > at[units[:, 0]] for at, units in zip(before, whole.spans, strict=True)]
        sizes = np.zeros(len(kept), dtype=np.int64)
        if not in_tokens:
            rows = zip(self.texts, whole.spans, whole.special, kept, strict=True)
            sizes[:] = [bytes_of(text, units[some], np.asarray(special)[some]) for text, units, special, some in rows]
        columns = (whole.nll, whole.units, whole.special)
        nll, units, special = ([row[some] for row, some in zip(rows, kept, strict=True)] for rows in columns)
        return ScoreBatch(nll, units, special, sizes, whole.features)

    @cached_property
    def characters(self) -> list[np.ndarray]:
        """Which characters of each text belong to a filled-in token, n bool arrays."""
        spans = token_spans(self.tokens, self.lengths, self.texts, self.task)
        rows = zip(self.texts, spans, self.places, strict=True)
        return [_covered(text, at[places[: len(at)]]) for text, at, places in rows]


def token_spans(tokens: np.ndarray, lengths: np.ndarray, texts: Sequence[str], task: Task) -> list[np.ndarray]:
    """Where tokens stand in their texts: n arrays (tokens, 2), begin and end of each.

    Args:
        tokens: (n, length) integers.
        lengths: (n,) how many of a row count.
        texts: n texts.
        task: decodes them.

    Raises:
        PluginError: a text is not what its tokens decode to.
    """
    ids = np.unique(tokens)
    alone = dict(zip(ids.tolist(), task.decode(ids[:, None], np.ones(len(ids), dtype=np.int64)), strict=True))
    found = []
    for row, length, text in zip(tokens, np.asarray(lengths).tolist(), texts, strict=True):
        parts = [alone[token] for token in row[:length].tolist()]
        if "".join(parts) == text:
            ends = np.cumsum([0, *map(len, parts)], dtype=np.int64)
            found.append(np.stack([ends[:-1], ends[1:]], axis=1))
        else:
            found.append(_by_prefixes(row[:length], text, task))
    return found


def _by_prefixes(row: np.ndarray, text: str, task: Task) -> np.ndarray:
    length = len(row)
    prefixes = task.decode(np.tile(row, (length, 1)), np.arange(1, length + 1)) if length else [""]
    if prefixes[-1] != text:
        raise PluginError(f"the text {text[:40]!r} is not what its tokens decode to: where they stand is not known")
    shared = [_in_common(prefix, text) for prefix in prefixes]
    ends = [count + (count < len(prefix)) for count, prefix in zip(shared, prefixes, strict=True)]
    return np.stack([np.asarray([0, *shared[:-1]]), np.minimum(ends, len(text))], axis=1).astype(np.int64)


def _in_common(a: str, b: str) -> int:
    """How many characters two texts begin with in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _covered(text: str, spans: np.ndarray) -> np.ndarray:
    covered = np.zeros(len(text), dtype=bool)
    for begin, end in spans.tolist():
        covered[begin:end] = True
    return covered


def bytes_of(text: str, units: np.ndarray, special: np.ndarray) -> int:
    """UTF-8 bytes of the characters of some units; an end-of-text marker is one."""
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)[_covered(text, units[~special])]
    return int(len(codes) + sum(int((codes >= least).sum()) for least in (0x80, 0x800, 0x10000)) + special.sum())
