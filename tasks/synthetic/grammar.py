"""Texts of a probabilistic context-free grammar, by the inside algorithm.

In Chomsky normal form a rule is A -> B C or A -> v. With lambda_i the likelihoods of what is seen (`law.Evidence`),

    inside(A, i, i + 1) = sum_v P(A -> v) lambda_i(v)
    inside(A, i, j)     = sum over A -> B C and i < k < j of P(A -> B C) inside(B, i, k) inside(C, k, j)

and Z = inside(S, 0, L) is the probability of what is seen. A law of sequences of a fixed length L is the grammar given
that length. Z is linear in each lambda_i, so the cavity distribution is its derivative, c_i(v) proportional to
dZ / d lambda_i(v): the outside algorithm, the same sums backwards. One pass gives every place under any noise.

The built-in grammar writes well-nested brackets of several kinds between letters: a bracket must be closed by its own
kind however far away, so a token revealed out of turn can make a text impossible.

    S -> item S | item        item -> letter | open_k S close_k | open_k close_k

It is unambiguous (every text has one derivation), so the entropy of texts of length n is that of derivations, exact by
recursion over symbols and lengths. Reference: Lari and Young, "The estimation of stochastic context-free grammars using
the inside-outside algorithm", 1990.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from tsdfm_bench.errors import UsageError
from tsdfm_bench.tasks.synthetic.law import Evidence, Law

if TYPE_CHECKING:
    from tsdfm_bench.rng import Streams

OPEN, CLOSE, LETTERS = "([{<", ")]}>", "abcdefghijklmnopqrstuvwxyz"
MORE, LETTER, NESTED = 0.7, 0.4, 0.4  # S -> item S; item -> letter; item -> open S close; the rest open close
_ROWS = 4096  # sequences worked on at a time


class Grammar(Law):
    """The law of a grammar's texts of each length.

    Args:
        name: what it is called.
        binary: (A, B, C) -> P(A -> B C), symbols counted from 0, the start symbol.
        terminal: (N, V) P(A -> v). The rules of every symbol sum to 1.
    """

    def __init__(self, name: str, binary: Mapping[tuple[int, int, int], float], terminal: np.ndarray) -> None:
        super().__init__(name, terminal.shape[1])
        self.binary = dict(binary)
        self.terminal = torch.tensor(terminal, dtype=torch.float64)
        pairs = list(dict.fromkeys((b, c) for _, b, c in self.binary))
        self._left, self._right = (torch.tensor([pair[side] for pair in pairs]) for side in (0, 1))
        self._rules = torch.zeros(len(pairs), len(self.terminal), dtype=torch.float64)
        for (a, b, c), p in self.binary.items():
            self._rules[pairs.index((b, c)), a] += p
        self._plans: dict[int, list[tuple[range, Tensor, Tensor, Tensor]]] = {}
        total = self._rules.sum(dim=0) + self.terminal.sum(dim=1)
        if not bool(torch.isclose(total, torch.ones_like(total), atol=1e-12).all()):
            raise ValueError(f"{name}: the probabilities of a symbol's rules must sum to 1")

    def parameters(self) -> Mapping[str, object]:
        """Rules and their probabilities."""
        rules = sorted([*key, float(p).hex()] for key, p in self.binary.items())
        return {"binary": rules, "terminal": [[float(p).hex() for p in row] for row in self.terminal]}

    # ------------------------------------------------------------------------------------------------ inference

    def inside(self, leaves: Tensor) -> dict[int, Tensor]:
        """The chart over leaves (b, length, N), span -> (b, starts, N); Z = chart[length][:, 0, 0]."""
        length = leaves.shape[1]
        chart = {1: leaves}
        for span in range(2, length + 1):
            starts = length - span + 1
            pairs = leaves.new_zeros(leaves.shape[0], starts, len(self._rules))
            for splits, here, left, right in self._splits(span):
                for k in splits:
                    before = chart[k][:, :starts].index_select(2, left)
                    after = chart[span - k][:, k : k + starts].index_select(2, right)
                    pairs.index_add_(2, here, before.mul_(after))
            chart[span] = pairs @ self._rules
        return chart

    def outside(self, chart: dict[int, Tensor]) -> Tensor:
        """dZ / d inside(A, i, i + 1), (b, length, N), from the widest span down."""
        length = len(chart)
        slope = {span: torch.zeros_like(values) for span, values in chart.items()}
        slope[length][:, 0, 0] = 1.0
        for span in range(length, 1, -1):
            starts = length - span + 1
            pairs = slope[span] @ self._rules.T
            for splits, here, left, right in self._splits(span):
                outer = pairs.index_select(2, here)
                for k in splits:
                    first, second = slice(None, starts), slice(k, k + starts)
                    after = chart[span - k][:, second].index_select(2, right)
                    before = chart[k][:, first].index_select(2, left)
                    slope[k][:, first].index_add_(2, left, after.mul_(outer))
                    slope[span - k][:, second].index_add_(2, right, before.mul_(outer))
        return slope[1]

    def _splits(self, span: int) -> list[tuple[range, Tensor, Tensor, Tensor]]:
        """Where a text of `span` tokens can be split: (places, which pairs, their B, their C)."""
        if span not in self._plans:
            possible = self.lengths(span) > 0
            groups: dict[tuple[int, int], list[int]] = {}
            for pair, (left, right) in enumerate(zip(self._left.tolist(), self._right.tolist(), strict=True)):
                places = [k for k in range(1, span) if possible[k, left] and possible[span - k, right]]
                if places:
                    groups.setdefault((places[0], places[-1]), []).append(pair)
            self._plans[span] = [
                (range(first, last + 1), torch.tensor(pairs), self._left[pairs], self._right[pairs])
                for (first, last), pairs in groups.items()
            ]
        return self._plans[span]

    def weigh(self, evidence: Evidence, rows: Tensor, positions: Tensor) -> Tensor:
        """See `Law.weigh`: the derivative of Z."""
        self._check(evidence.tokens.shape[1])
        outside = torch.cat([self.outside(self.inside(self._leaves(part))) for part in _parts(evidence)])
        return outside[rows, positions] @ self.terminal

    def _leaves(self, evidence: Evidence) -> Tensor:
        return evidence.hit[..., None] * self.terminal.T[evidence.tokens] + (
            evidence.miss[..., None] * self.terminal.sum(dim=1)
        )

    def probability(self, evidence: Evidence) -> Tensor:
        """P(what is seen and the length), (b,)."""
        length = evidence.tokens.shape[1]
        return torch.cat([self.inside(self._leaves(part))[length][:, 0, 0] for part in _parts(evidence)])

    def token_nll(self, tokens: np.ndarray) -> np.ndarray:
        """See `Law.token_nll`: one inside pass for every prefix, the tokens after it unknown."""
        ids = torch.as_tensor(np.asarray(tokens, dtype=np.int64))
        n, length = ids.shape
        self._check(length)
        prefix = torch.arange(length) <= torch.arange(length)[:, None]  # (which prefix, place)
        shown = torch.where(prefix[None], ids[:, None, :], self.vocab_size).view(n * length, length)
        seen = self.probability(Evidence.masked(shown, self.vocab_size)).view(n, length).numpy()
        before = np.concatenate([np.full((n, 1), self.lengths(length)[length, 0]), seen[:, :-1]], axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            nll = np.log(before) - np.log(seen)
        return np.where(seen > 0, nll, np.inf)

    # -------------------------------------------------------------------------------------------- exact numbers

    def lengths(self, longest: int) -> np.ndarray:
        """P(a text of A has n tokens), (longest + 1, N)."""
        table = np.zeros((longest + 1, len(self.terminal)))
        if longest:
            table[1] = self.terminal.sum(dim=1).numpy()
        for n in range(2, longest + 1):
            for (a, b, c), p in self.binary.items():
                table[n, a] += p * float(table[1:n, b] @ table[n - 1 : 0 : -1, c])
        return table

    def _check(self, length: int) -> None:
        if not self.lengths(length)[length, 0] > 0:
            raise UsageError(f"the grammar {self.name} has no text of {length} tokens")

    def entropy_nats(self, length: int) -> float:
        """See `Law.entropy_nats`: entropy of the derivations of this length (of the texts, if unambiguous)."""
        self._check(length)
        table, entropy = self.lengths(length), np.zeros((length + 1, len(self.terminal)))
        for n in range(1, length + 1):
            for symbol in range(len(self.terminal)):
                for weight, inner in self._choices(symbol, n, table, entropy):
                    share = weight / table[n, symbol] if table[n, symbol] > 0 else 0.0
                    if share > 0:
                        entropy[n, symbol] += share * (inner - np.log(share))
        return float(entropy[length, 0])

    def _choices(self, symbol: int, n: int, table: np.ndarray, entropy: np.ndarray) -> list[tuple[float, float]]:
        """Weight of every first step of a derivation of n tokens, and the entropy of what follows it."""
        if n == 1:
            return [(float(p), 0.0) for p in self.terminal[symbol]]
        return [
            (p * table[k, b] * table[n - k, c], entropy[k, b] + entropy[n - k, c])
            for (a, b, c), p in self.binary.items()
            if a == symbol
            for k in range(1, n)
        ]

    def sample(self, streams: Streams, length: int, site: str) -> Tensor:
        """See `Law.sample`: derivations from the top, one uniform a node."""
        self._check(length)
        steps = _Steps(self, length)
        uniforms = streams.uniform(f"{site}/node", 0, 2 * length).cpu().numpy()
        return torch.tensor([_derive(steps, row, length) for row in uniforms], device=streams.device)

    def ngrams(self, n: int, length: int) -> np.ndarray:
        """See `Law.ngrams`: from posteriors with nothing, or one token, seen."""
        size, blank = self.vocab_size, self.vocab_size
        if n == 1:
            nothing = Evidence.masked(torch.full((1, length), blank), size)
            every = torch.arange(length)
            return np.asarray(self.cavity(nothing, torch.zeros_like(every), every).mean(dim=0).numpy())
        places, first = (
            x.flatten() for x in torch.meshgrid(torch.arange(length - 1), torch.arange(size), indexing="ij")
        )
        shown = torch.full((len(places), length), blank).scatter_(1, places[:, None], first[:, None])
        evidence = Evidence.masked(shown, size)
        share = self.probability(evidence) / float(self.lengths(length)[length, 0])
        some = (share > 0).nonzero().squeeze(1)
        next_law = torch.zeros(len(places), size, dtype=torch.float64)
        kept = Evidence(evidence.tokens[some], evidence.hit[some], evidence.miss[some])
        next_law[some] = self.cavity(kept, torch.arange(len(some)), places[some] + 1)
        return np.asarray((share[:, None] * next_law).view(length - 1, size, size).mean(dim=0).numpy())


class _Steps:
    """The first steps of derivations of every symbol and length, with their cumulative probabilities."""

    def __init__(self, grammar: Grammar, longest: int) -> None:
        self.grammar, self.table = grammar, grammar.lengths(longest)
        self.of = lru_cache(maxsize=None)(self._of)

    def _of(self, symbol: int, n: int) -> tuple[np.ndarray, list[tuple[int, int, int]]]:
        if n == 1:
            row = self.grammar.terminal[symbol].numpy()
            return row.cumsum(), [(token, 0, 0) for token in range(len(row))]
        weights, steps = [], []
        for (a, b, c), p in self.grammar.binary.items():
            for k in range(1, n) if a == symbol else ():
                weights.append(p * self.table[k, b] * self.table[n - k, c])
                steps.append((b, c, k))
        return np.cumsum(weights), steps


def _derive(steps: _Steps, uniforms: np.ndarray, length: int) -> list[int]:
    """One text of a start symbol."""
    text: list[int] = []
    todo, used = [(0, length)], 0
    while todo:
        symbol, n = todo.pop()
        cdf, choices = steps.of(symbol, n)
        level = min(uniforms[used] * cdf[-1], np.nextafter(cdf[-1], 0.0))
        chosen, used = choices[int(np.searchsorted(cdf, level, side="right"))], used + 1
        if n == 1:
            text.append(chosen[0])
        else:
            b, c, k = chosen
            todo += [(c, n - k), (b, k)]
    return text


def _parts(evidence: Evidence) -> list[Evidence]:
    """Pieces of at most `_ROWS` sequences."""
    parts = zip(*(x.split(_ROWS) for x in (evidence.tokens, evidence.hit, evidence.miss)), strict=True)
    return [Evidence(*part) for part in parts]


def brackets(kinds: int, letters: int) -> Grammar:
    """The built-in grammar; symbols S, item, then rest_k (= S close_k), open_k, close_k.

    Kinds and letters have the probabilities (1/2, 1/4, ..., the last two equal).

    Args:
        kinds: of brackets, at most 4.
        letters: at most 26.
    """
    size = 2 * kinds + letters
    start, item = 0, 1
    rest, opening, closing = (range(2 + part * kinds, 2 + (part + 1) * kinds) for part in range(3))
    terminal = np.zeros((2 + 3 * kinds, size))
    binary: dict[tuple[int, int, int], float] = {(start, item, start): MORE}
    for symbol, share in ((start, 1 - MORE), (item, 1.0)):
        terminal[symbol, 2 * kinds :] = share * LETTER * _halving(letters)
        for k, weight in enumerate(_halving(kinds)):
            binary[symbol, opening[k], rest[k]] = share * NESTED * weight
            binary[symbol, opening[k], closing[k]] = share * (1 - LETTER - NESTED) * weight
    for k in range(kinds):
        binary[rest[k], start, closing[k]] = 1.0
        terminal[opening[k], 2 * k] = terminal[closing[k], 2 * k + 1] = 1.0
    return Grammar("grammar", binary, terminal)


def symbols(kinds: int, letters: int) -> list[str]:
    """How the tokens of `brackets` are written."""
    return [mark for pair in zip(OPEN[:kinds], CLOSE[:kinds], strict=True) for mark in pair] + list(LETTERS[:letters])


def _halving(n: int) -> np.ndarray:
    p = 0.5 ** np.arange(1, n + 1)
    p[-1] = p[-2] if n > 1 else 1.0
    return p
