"""Sequences a second of the oracle on one core: the exact posterior of every position, batch of 64.

    OMP_NUM_THREADS=1 python tests/benchmarks/oracle_throughput.py

Median and range of some repeats, in CPU seconds, so that other work on the machine counts little. Not a test.
"""

from __future__ import annotations

import time

import torch

from tsdfm_bench.rng import Streams
from tsdfm_bench.tasks.synthetic.grammar import brackets
from tsdfm_bench.tasks.synthetic.law import Evidence, Law
from tsdfm_bench.tasks.synthetic.recipe import machine, markov_chain

BATCH, SECONDS, REPEATS = 64, 0.5, 5


def rate(law: Law, length: int, source: str) -> float:
    """Sequences per CPU second."""
    tokens = law.sample(Streams.of(0, "benchmark", BATCH), length, "real")
    kappa = torch.full((BATCH,), 0.5, dtype=torch.float64)
    rows, positions = torch.ones(BATCH, length).nonzero(as_tuple=True)
    hidden = torch.rand(BATCH, length, generator=torch.Generator().manual_seed(0)) < 0.5
    size = law.vocab_size
    if source == "mask":
        evidence = Evidence.masked(torch.where(hidden, size, tokens), size)
    else:
        evidence = Evidence.uniform(tokens, kappa, size)
    law.posterior(evidence, rows, positions)
    started, rounds = time.process_time(), 0
    while time.process_time() - started < SECONDS:
        law.posterior(evidence, rows, positions)
        rounds += 1
    return rounds * BATCH / (time.process_time() - started)


def main() -> None:
    """One line per law and noise."""
    torch.set_num_threads(1)
    cases = (("markov, 64 symbols", markov_chain(64), 64), ("hmm, 64 symbols, 4 states", machine(64, 4), 64))
    cases += (("hmm, 16 symbols, 4 states", machine(16, 4), 64), ("grammar, 10 symbols", brackets(3, 4), 24))
    for name, law, length in cases:
        for source in ("mask", "uniform"):
            rates = sorted(rate(law, length, source) for _ in range(REPEATS))
            told = f"{rates[REPEATS // 2]:,.0f} sequences/s ({rates[0]:,.0f} to {rates[-1]:,.0f})"
            print(f"{name}, length {length}, {source}: {told}", flush=True)


if __name__ == "__main__":
    main()
