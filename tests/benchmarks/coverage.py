"""How often intervals hold the truth: every kind that is read off replicates, on laws whose truth is known.

    OMP_NUM_THREADS=1 python tests/benchmarks/coverage.py [NAME ...]

2,000 data sets per law and 2,000 resamples, as in use; a share of 95 % has a Monte-Carlo error of 0.5 points. Values of
one row, differences, clusters and training seeds are checked in tests/results/test_coverage.py; that suite runs the
laws below too, with fewer resamples. Prints a Markdown table. Not a test.

Each law makes `repeats` data sets of n sequences a point and returns the intervals that the library makes of them, with
the truth of each.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator

import numpy as np

from tsdfm_bench.results.formula import Quantity, parse
from tsdfm_bench.results.frontier import area, read_cost, read_curve, rounded_corner
from tsdfm_bench.results.replicates import interval, weights
from tsdfm_bench.results.seeds import over_seeds, widening
from tsdfm_bench.results.stats import Interval, bootstrap

Found = Iterator[tuple[Interval, float]]
Law = Callable[[np.random.Generator, int, int], Found]

BLOCK = 50  # data sets at once
ENTROPY = np.array([3.5, 3.65, 3.8, 3.95])  # of the points of a curve, nats
LEVEL, SLOPE = 4.0, 1.5  # log perplexity at 3.8 nats, and its rise per nat


def losses(rng: np.random.Generator, centre: np.ndarray | float, shape: tuple[int, ...]) -> np.ndarray:
    """Mean token losses of sequences: skewed, as gamma variables are; their exponentials are perplexities."""
    return np.asarray(centre + rng.gamma(4.0, 0.15, shape) - 0.6)


def entropies(rng: np.random.Generator, centre: np.ndarray | float, shape: tuple[int, ...]) -> np.ndarray:
    """Entropies of sequences: bounded above, skewed to the left."""
    return np.asarray(centre + 0.2 - rng.gamma(2.0, 0.1, shape))


def with_replicates(data: np.ndarray, resamples: int, streams: int) -> np.ndarray:
    """Means of data and of resampled data, value first.

    Args:
        data: (..., points, data sets, n).
        resamples: of each point, the same for all quantities of one point (the leading axes).
        streams: a number that tells these points' resamples from those of other curves.

    Returns:
        (..., points, data sets, 1 + resamples).
    """
    n = data.shape[-1]
    drawn = []
    for k in range(data.shape[-3]):
        shares = weights(n, resamples, 1000 * streams + k).T / n
        part = data[..., k, :, :]
        drawn.append(np.concatenate([part.mean(axis=-1, keepdims=True), part @ shares], axis=-1))
    return np.stack(drawn, axis=-3)


def curve(rng: np.random.Generator, shift: float, sets: int, resamples: int, n: int, streams: int) -> np.ndarray:
    """(2, points, data sets, 1 + resamples): entropy and log perplexity of a temperature sweep."""
    h = entropies(rng, ENTROPY[:, None, None], (len(ENTROPY), sets, n))
    loss = losses(rng, (LEVEL + shift + SLOPE * (ENTROPY - 3.8))[:, None, None], (len(ENTROPY), sets, n))
    return with_replicates(np.stack([h, loss]), resamples, streams)


def truth_at(entropy: float) -> float:
    """Perplexity of the law's own curve."""
    return float(read_curve(ENTROPY, np.exp(LEVEL + SLOPE * (ENTROPY - 3.8)), entropy))


def blocks(repeats: int) -> Iterator[int]:
    """Sizes of the blocks that data sets are made in."""
    for start in range(0, repeats, BLOCK):
        yield min(BLOCK, repeats - start)


def at_entropy(rng: np.random.Generator, repeats: int, resamples: int, n: int = 96, target: int = 0) -> Found:
    """gen-PPL at 3.7 nats; with `target` sequences of real text, whose entropy of 3.7 nats is measured too."""
    for sets in blocks(repeats):
        h, loss = curve(rng, 0.0, sets, resamples, n, 0)
        at = np.full((sets, 1 + resamples), 3.7)
        if target:
            (at,) = with_replicates(entropies(rng, 3.7, (1, sets, target)), resamples, 9)
        for i in range(sets):
            read = read_curve(h[:, i], np.exp(loss[:, i]), at[i])
            yield interval(float(read[0]), read[1:], n=min(n, target or n)), truth_at(3.7)


def dominated(rng: np.random.Generator, repeats: int, resamples: int, n: int = 96, fixed: bool = True) -> Found:
    """Dominated area up to a corner: a given one, or the one that the data choose (truth: the law's area up to it)."""
    true = np.exp(LEVEL + SLOPE * (ENTROPY - 3.8))
    for sets in blocks(repeats):
        h, loss = curve(rng, 0.0, sets, resamples, n, 0)
        for i in range(sets):
            worst = (
                (3.4, math.exp(5.0))
                if fixed
                else rounded_corner(float(h[:, i, 0].min()), float(np.exp(loss[:, i, 0].max())))
            )
            found = area(h[:, i], np.exp(loss[:, i]), worst)
            yield interval(float(found[0]), found[1:], n=n), float(area(ENTROPY, true, worst))


def at_cost(rng: np.random.Generator, repeats: int, resamples: int, n: int = 96) -> Found:
    """gen-PPL at 20 calls, between points at 8, 16, 32 and 64."""
    costs = np.array([8.0, 16.0, 32.0, 64.0])
    true = 6.0 / np.log2(costs) + 2.5
    for sets in blocks(repeats):
        loss = with_replicates(losses(rng, true[:, None, None], (4, sets, n)), resamples, 0)
        for i in range(sets):
            read = read_cost(costs, np.exp(loss[:, i]), 20.0)
            yield interval(float(read[0]), read[1:], n=n), float(read_cost(costs, np.exp(true)[:, None], 20.0)[0])


def formula(
    rng: np.random.Generator, repeats: int, resamples: int, text: str, rows: dict[str, tuple[float, ...]], n: int = 96
) -> Found:
    """A claim's formula over rows of given mean losses."""
    parsed = parse(text, comparison=False)

    def read(name: str, at: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def value(held: dict[str, np.ndarray]) -> np.ndarray:
        return parsed.evaluate(lambda q: held[q.rows], read)

    true = float(value({name: np.exp(np.array(means))[:, None] for name, means in rows.items()})[0])
    for sets in blocks(repeats):
        drawn = {}
        for k, (name, means) in enumerate(rows.items()):
            loss = losses(rng, np.array(means)[:, None, None], (len(means), sets, n))
            drawn[name] = np.exp(with_replicates(loss, resamples, k))
        for i in range(sets):
            found = value({name: ppl[:, i] for name, ppl in drawn.items()})
            yield interval(float(found[0]), found[1:], n=n), true


def reduction_at_entropy(rng: np.random.Generator, repeats: int, resamples: int, n: int = 96) -> Found:
    """100 (1 - ppl_at_entropy(curve, entropy(other)) / ppl(other)), the other row at 3.7 nats."""
    parsed = parse("100 * (1 - ppl_at_entropy(curve, entropy(other)) / ppl(other))", comparison=False)
    true = 100 * (1 - truth_at(3.7) / math.exp(4.2))
    for sets in blocks(repeats):
        h, loss = curve(rng, 0.0, sets, resamples, n, 0)
        other = np.stack([entropies(rng, 3.7, (1, sets, n)), losses(rng, 4.2, (1, sets, n))])
        entropy, ppl = with_replicates(other, resamples, 9)
        for i in range(sets):

            def held(q: Quantity, i: int = i, entropy: np.ndarray = entropy, ppl: np.ndarray = ppl) -> np.ndarray:
                return entropy[:, i] if q.function == "entropy" else np.exp(ppl[:, i])

            def read(name: str, at: np.ndarray, i: int = i, h: np.ndarray = h, loss: np.ndarray = loss) -> np.ndarray:
                return read_curve(h[:, i], np.exp(loss[:, i]), at)

            found = parsed.evaluate(held, read)
            yield interval(float(found[0]), found[1:], n=n), true


def seeds(rng: np.random.Generator, repeats: int, resamples: int, a: int, b: int, n: int = 96) -> Found:
    """100 (1 - ppl(a) / ppl(b)) of methods that were trained with several seeds, whose networks differ."""
    true = 100 * (1 - math.exp(4.0 - 4.4))
    for _ in range(repeats):
        networks, perplexities = [], []
        for name, count, centre, between in (("a", a, 4.0, 0.15), ("b", b, 4.4, 0.1)):
            loss = losses(rng, (centre + rng.normal(0, between, count))[:, None], (count, n))
            networks.append([f"{name}{k}" for k in range(count)])
            perplexities.append([float(x) for x in np.exp(loss.mean(axis=1))])

        def value(factor: float, of: list[list[float]] = perplexities, by: list[list[str]] = networks) -> np.ndarray:
            one, two = (over_seeds(v, names, resamples, factor) for v, names in zip(of, by, strict=True))
            return 100 * (1 - one / two)

        found = value(widening(value(1.0)[1:], networks))
        yield interval(float(found[0]), found[1:], n=n), true


def bca(rng: np.random.Generator, repeats: int, resamples: int, n: int = 48) -> Found:
    """BCa of a metric without a known form: a ratio of means as a function."""
    for _ in range(repeats):
        a, b = rng.gamma(4.0, 0.5, n), rng.gamma(9.0, 0.2, n)
        yield bootstrap((a, b), lambda x, y: x.mean(-1) / y.mean(-1), resamples=resamples), 2.0 / 1.8


REDUCTION = "100 * (1 - ppl(a) / ppl(b))"
LAWS: dict[str, Law] = {
    "gen-PPL at a given entropy, n = 32": lambda *a: at_entropy(*a, n=32),
    "gen-PPL at a given entropy, n = 96": at_entropy,
    "gen-PPL at the entropy of 96 real texts, n = 96": lambda *a: at_entropy(*a, target=96),
    "gen-PPL at the entropy of 32 real texts, n = 96": lambda *a: at_entropy(*a, target=32),
    "dominated area, given corner, n = 32": lambda *a: dominated(*a, n=32),
    "dominated area, corner from the data, n = 32": lambda *a: dominated(*a, n=32, fixed=False),
    "dominated area, given corner, n = 96": dominated,
    "dominated area, corner from the data, n = 96": lambda *a: dominated(*a, fixed=False),
    "gen-PPL at equal calls or seconds, n = 32": lambda *a: at_cost(*a, n=32),
    "gen-PPL at equal calls or seconds, n = 96": at_cost,
    "percentage reduction, n = 32": lambda *a: formula(*a, REDUCTION, {"a": (4.0,), "b": (4.4,)}, n=32),
    "percentage reduction, n = 96": lambda *a: formula(*a, REDUCTION, {"a": (4.0,), "b": (4.4,)}),
    "ratio to the best of three, apart, n = 96": lambda *a: formula(
        *a, "ppl(a) / min(ppl(b))", {"a": (4.0,), "b": (4.2, 4.4, 4.6)}
    ),
    "ratio to the best of three, equal, n = 96": lambda *a: formula(
        *a, "ppl(a) / min(ppl(b))", {"a": (4.0,), "b": (4.2, 4.2, 4.2)}
    ),
    "percentage reduction at equal entropy, n = 96": reduction_at_entropy,
    "percentage reduction, 3 training seeds each": lambda *x: seeds(*x, 3, 3),
    "percentage reduction, 5 training seeds each": lambda *x: seeds(*x, 5, 5),
    "BCa of an unknown statistic, n = 48": bca,
}


def coverage(law: Law, repeats: int, resamples: int, seed: int = 0) -> float:
    """Share of data sets whose interval holds the truth; a missing interval does not."""
    hits = [found.low <= truth <= found.high for found, truth in law(np.random.default_rng(seed), repeats, resamples)]
    return float(np.mean(hits))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="parts of names; default: all")
    parser.add_argument("--repeats", type=int, default=2000)
    parser.add_argument("--resamples", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    print("| interval | covers |\n|:---|---:|")
    for name, law in LAWS.items():
        if not given.names or any(part in name for part in given.names):
            print(f"| {name} | {100 * coverage(law, given.repeats, given.resamples, given.seed):.1f} % |", flush=True)


if __name__ == "__main__":
    main()
