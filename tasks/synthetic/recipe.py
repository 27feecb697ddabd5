"""How the parameters of the built-in laws are made: deterministically, from integers.

A row of n probabilities is n counts 1 + floor(scale (-log u)^sharp), divided by their sum. The uniforms u are those of
`tsdfm_bench.rng` (Philox4x32-10) under the key of seed 0 and the law's name and sizes, so the numbers are the same on
every machine, and every probability is positive. sharp = 1 gives rows that are uniform on the simplex; the built-in
laws use 3: a few likely followers and a long tail, so that a token at its unconditional frequency costs about a nat
more than one in its context.

    product    one row of V
    markov     a V x V matrix of rows; sequences start in its stationary law
    hmm        a machine of K states: state s writes v with row s and goes to next(s, v), a uniform draw; sequences
               start in state 0. No finite window of tokens shows the state: the text has no finite order
    grammar    rules in `grammar.brackets`, with the probabilities written there
"""

from __future__ import annotations

import numpy as np
import torch

from tsdfm_bench.rng import Streams, derive_key
from tsdfm_bench.tasks.synthetic.chain import HiddenMarkov

SHARP = 3.0
SCALE = 1000.0


def uniforms(name: str, rows: int, columns: int, site: str) -> np.ndarray:
    """(rows, columns) fp64 uniforms that belong to a law."""
    streams = Streams(derive_key(0, "law", name), torch.arange(rows))
    return np.asarray(streams.uniform(site, 0, columns).numpy())


def counts(name: str, rows: int, columns: int) -> np.ndarray:
    """(rows, columns) positive integers."""
    u = uniforms(name, rows, columns, "counts")
    return 1 + np.floor(SCALE * (-np.log(u)) ** SHARP).astype(np.int64)


def shares(integers: np.ndarray) -> np.ndarray:
    """Rows of counts as probabilities."""
    return np.asarray(integers / integers.sum(axis=-1, keepdims=True))


def product_law(vocab_size: int) -> HiddenMarkov:
    """Independent tokens."""
    row = counts(f"product {vocab_size}", 1, vocab_size)
    about = {"vocab": vocab_size, "counts": row.tolist()}
    return HiddenMarkov("product", np.ones(1), np.ones((1, 1)), shares(row), about)


def stationary(transition: np.ndarray) -> np.ndarray:
    """The law that a positive transition matrix (S, S) leaves as it is."""
    size = len(transition)
    system = np.vstack([transition.T - np.eye(size), np.ones(size)])
    law = np.linalg.lstsq(system, np.append(np.zeros(size), 1.0), rcond=None)[0]
    return np.asarray(law / law.sum())


def markov_chain(vocab_size: int) -> HiddenMarkov:
    """A stationary first-order chain."""
    rows = counts(f"markov {vocab_size}", vocab_size, vocab_size)
    transition = shares(rows)
    return HiddenMarkov(
        "markov", stationary(transition), transition, about={"vocab": vocab_size, "counts": rows.tolist()}
    )


def machine(vocab_size: int, states: int) -> HiddenMarkov:
    """A hidden Markov model whose hidden states are pairs (state of the machine, token it writes)."""
    name = f"hmm {vocab_size} {states}"
    rows = counts(name, states, vocab_size)
    onward = np.floor(uniforms(name, states, vocab_size, "next") * states).astype(np.int64)
    writes = shares(rows)
    initial = np.zeros((states, vocab_size))
    initial[0] = writes[0]
    transition = np.zeros((states, vocab_size, states, vocab_size))
    for state, token in np.ndindex(states, vocab_size):
        transition[state, token, onward[state, token]] = writes[onward[state, token]]
    size = states * vocab_size
    emission = np.tile(np.eye(vocab_size), (states, 1))
    about = {"vocab": vocab_size, "states": states, "counts": rows.tolist(), "next": onward.tolist()}
    return HiddenMarkov("hmm", initial.reshape(size), transition.reshape(size, size), emission, about)
