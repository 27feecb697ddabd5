"""Canaries: texts that no model wrote, to see what a measure rewards.

Held-out windows are the reference; four zero-parameter generators on the task's own tokens stand beside it:

* `unigram`: tokens drawn independently with their frequencies in the training text;
* `bigram`: the first token from those frequencies, each further token from the frequencies of what follows its
  predecessor in the training text (the text read as a ring);
* `shuffled`: a held-out window whose words are put in random order. A word is a token that starts with white space
  (or is end-of-text) with the tokens up to the next such token. Tokens and entropy stay, order goes;
* `loop`: a phrase of eight tokens of a held-out window, from its first word on, repeated to the full length.

A generator worth its parameters beats the first three; perplexity alone prefers the last to real text. All draws come
from the sequence's own stream: what sequence i is depends on nothing else.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tsdfm_bench.errors import UsageError
from tsdfm_bench.rng import Streams

LOOP_TOKENS = 8


class HeldOut:
    """Windows of a token stream, read as a ring.

    Windows of one round do not overlap: sequence i of a key gets the window at place i of a random order of all
    `size // length` windows. Sequences beyond them come from a further round with another order and another offset, and
    overlap those of the rounds before it.

    Args:
        stream: (size,) int64 held-out tokens.
    """

    def __init__(self, stream: np.ndarray) -> None:
        self.stream = torch.from_numpy(np.array(stream, dtype=np.int64))

    def windows(self, streams: Streams, length: int) -> Tensor:
        """(batch, length) int64 windows; raises UsageError if the text is shorter than one."""
        size = self.stream.numel()
        count = size // length
        if length < 1 or count == 0:
            raise UsageError(
                f"the held-out text has {size} tokens: no sequence of length {length} can be taken from it"
            )
        sequences = streams.sequences.cpu()
        starts = torch.empty_like(sequences)
        for turn in torch.unique(sequences // count).tolist():
            rows = sequences // count == turn
            places = Streams.of(0, f"{streams.key}", count)
            order = places.uniform("window order", turn, 1)[:, 0].argsort(stable=True)
            offset = 0 if turn == 0 else int(places.select(torch.tensor([0])).uniform("offset", turn, 1) * length)
            starts[rows] = order[sequences[rows] % count] * length + offset
        at = (starts[:, None] + torch.arange(length)) % size
        return self.stream[at].to(streams.device)


class NgramCanaries:
    """`unigram` and `bigram` of a training stream; a draw picks a place of the stream and copies what stands there.

    Args:
        stream: (size,) int64 tokens.
        vocab_size: number of tokens V.
    """

    def __init__(self, stream: np.ndarray, vocab_size: int) -> None:
        ids = np.asarray(stream, dtype=np.int64)
        places = np.argsort(ids, kind="stable")
        self.stream = torch.from_numpy(ids.copy())
        self.followers = torch.from_numpy(ids[(places + 1) % len(ids)])  # grouped by predecessor
        self.counts = torch.from_numpy(np.bincount(ids, minlength=vocab_size))
        self.first = torch.cumsum(self.counts, 0) - self.counts

    def unigram(self, streams: Streams, length: int) -> Tensor:
        """(batch, length) int64."""
        places = streams.uniform("unigram", 0, length).cpu() * self.stream.numel()
        return self.stream[places.long().clamp(max=self.stream.numel() - 1)].to(streams.device)

    def bigram(self, streams: Streams, length: int) -> Tensor:
        """(batch, length) int64."""
        uniforms = streams.uniform("bigram", 0, length).cpu()
        size = self.stream.numel()
        tokens = torch.empty(uniforms.shape, dtype=torch.int64)
        tokens[:, 0] = self.stream[(uniforms[:, 0] * size).long().clamp(max=size - 1)]
        for i in range(1, length):
            before = tokens[:, i - 1]
            rank = (uniforms[:, i] * self.counts[before]).long().minimum(self.counts[before] - 1)
            tokens[:, i] = self.followers[self.first[before] + rank]
        return tokens.to(streams.device)


def shuffle_words(tokens: Tensor, starts_word: Tensor, streams: Streams) -> Tensor:
    """The words of each row in random order.

    Args:
        tokens: (batch, length) int64.
        starts_word: (V,) bool, True for tokens that start a word. The first token of a row starts one in any case.
        streams: (batch,).
    """
    length = tokens.shape[1]
    position = torch.arange(length, device=tokens.device).expand_as(tokens)
    starts = starts_word.to(tokens.device)[tokens] | (position == 0)
    word_start = torch.where(starts, position, 0).cummax(dim=1).values
    keys = streams.uniform("shuffle", 0, length).to(tokens.device).gather(1, word_start)
    return tokens.gather(1, keys.argsort(dim=1, stable=True))


def loop_phrase(tokens: Tensor, starts_word: Tensor) -> Tensor:
    """Eight tokens of each row, from its first word start that leaves room for them, repeated to the row's length.

    Args:
        tokens: (batch, length) int64.
        starts_word: (V,) bool.
    """
    length = tokens.shape[1]
    size = min(LOOP_TOKENS, length)
    candidates = starts_word.to(tokens.device)[tokens[:, : length - size + 1]]
    first = candidates.int().argmax(dim=1)  # 0 if there is none
    at = first[:, None] + torch.arange(length, device=tokens.device) % size
    return tokens.gather(1, at)
