"""How fast each sampler approaches the true law: exact n-step laws on a tiny space, by multiplying transition matrices.

x_1 has a random law on all V^L sequences (V = L = 3). The exact posterior of a noised sequence is a sum over them, and
every published step is an explicit law per position given that posterior; the product over positions is a row of the
transition matrix of a step. The law after N steps is a product of matrices: no sampling, no network and none of the
samplers' code, so that it can be held against what they draw (tests/methods/laws). With kappa = kappa(t), kappa' =
kappa(t + h), posterior p and current token z,

    flow matching     P(y | z) = a p(y) + (1 - a) 1[y = z]                                     kappa = t
        euler             a = 1 - exp(-h / (1 - t))
        exact             a = (kappa' - kappa) / (1 - kappa)
        cumulative        P(leave) = 1 - R^(1 - p(z)),  to y with p(y) / (1 - p(z)),  R = (1 - kappa') / (1 - kappa)
        the last step draws from p
    masked diffusion  a masked position becomes y with (kappa' - kappa) / (1 - kappa) p(y)      log-linear kappa
        cached, ancestral     the grid ends at nu = 1e-5; what is masked then becomes the most likely token
        first-hitting         one position at a time, in a random order
    score entropy     w(y) proportional to the next token, S(y) = p_t(x with y) / p_t(x), forward rates Q, log-linear
        analytic          w = (e^{-D Q} S)(y) (e^{D Q})[z, y],  D = sigma(t) - sigma(t + h)
        euler             w = 1[y = z] + h sigma' R(y),  R(y) = S(y) Q[z, y], R(z) = -sum of the others
        the closing draw is analytic with D = sigma, the mask left out
    autoregressive    exact

The order is that of the total variation, the slope of -log2 TV over log2 N: 1 means that it halves when steps double.

References: arXiv 2407.15595, 2509.20624 (eq. 4.3), 2406.07524, 2409.02908, 2310.16834 (eq. 16, 19); measured orders
as diffrax gives them for solvers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

SYMBOLS, PLACES = 3, 3
STEPS = (1, 2, 4, 8, 16, 32, 64, 128)
FIT_FROM = 16  # steps from which the order is fitted
NU_END, EPS = 1e-5, 1e-3
EXACT = 1e-12

Rows = np.ndarray
Rule = Callable[["Space", float, float], Rows]


class Space:
    """All states of L places over V symbols, with or without a mask, under a law of the clean sequences.

    Args:
        law: (V^L,) law of the clean sequences, in the order of `itertools.product`.
        size, places: V and L.
        masked: whether the mask V is a symbol of the states.
    """

    def __init__(self, law: np.ndarray, size: int, places: int, masked: bool) -> None:
        self.law, self.size, self.places, self.masked = law, size, places, masked
        self.outputs = size + masked
        self.clean = np.array(list(itertools.product(range(size), repeat=places)))
        self.states = np.array(list(itertools.product(range(self.outputs), repeat=places)))
        self.match = self.states[:, None, :] == self.clean[None]
        self.is_mask = self.states == size

    def likelihood(self, kappa: float, without: int | None = None) -> np.ndarray:
        """P(state | clean sequence), (states, V^L), up to a factor; without one place if asked for."""
        if self.masked:
            each = np.where(self.is_mask[:, None, :], 1.0, self.match * 1.0)
        else:
            each = kappa * self.match + (1 - kappa) / self.size
        if without is not None:
            each = np.delete(each, without, axis=2)
        return np.asarray(each.prod(axis=2))

    def posterior(self, kappa: float) -> np.ndarray:
        """P(x_1 at a place | state), (states, L, V); 0 where the state is impossible."""
        joint = self.likelihood(kappa) * self.law
        marginals = np.stack([joint @ (self.clean[:, i, None] == np.arange(self.size)) for i in range(self.places)], 1)
        return _normalised(marginals)

    def scores(self, kappa: float) -> np.ndarray:
        """p_t(state with y at a place) / p_t(state), (states, L, outputs)."""
        found = np.zeros((len(self.states), self.places, self.outputs))
        for i in range(self.places):
            cavity = (self.likelihood(kappa, i) * self.law) @ (self.clean[:, i, None] == np.arange(self.size))
            if self.masked:
                seen = np.concatenate([kappa * cavity, (1 - kappa) * cavity.sum(axis=1, keepdims=True)], axis=1)
            else:
                seen = kappa * cavity + (1 - kappa) / self.size * cavity.sum(axis=1, keepdims=True)
            own = np.take_along_axis(seen, self.states[:, i, None], axis=1)
            found[:, i] = np.divide(seen, own, out=np.zeros_like(seen), where=own > 0)
        return found

    @property
    def here(self) -> np.ndarray:
        """1[y = z], (states, L, outputs)."""
        return np.asarray(self.states[..., None] == np.arange(self.outputs), dtype=float)

    def start(self) -> np.ndarray:
        """Law of the state at t = 0, (states,)."""
        if self.masked:
            return np.asarray(self.is_mask.all(axis=1), dtype=float)
        return np.full(len(self.states), 1.0 / len(self.states))

    def step(self, law: np.ndarray, rows: Rows) -> np.ndarray:
        """The law (states,) after independent places have moved by rows (states, L, outputs)."""
        matrix = law[:, None]
        for i in range(self.places):
            matrix = (matrix[:, :, None] * rows[:, i, None, :]).reshape(len(self.states), -1)
        return np.asarray(matrix.sum(axis=0))

    def final(self, law: np.ndarray) -> np.ndarray:
        """A law on states without mask as one on the clean sequences, (V^L,)."""
        return np.asarray(law[~self.is_mask.any(axis=1)])


def _normalised(weights: np.ndarray) -> np.ndarray:
    total = weights.sum(axis=-1, keepdims=True)
    return np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)


# --------------------------------------------------------------------------------------------------- step rules


def _flow_posterior(space: Space, t: float) -> np.ndarray:
    p = space.posterior(t)
    return np.concatenate([p, np.zeros((*p.shape[:2], 1))], axis=2) if space.masked else p


def _redraw(space: Space, t: float, share: float) -> Rows:
    p = _flow_posterior(space, t)
    return share * p + (1 - share) * space.here


def flow_euler(space: Space, t: float, s: float) -> Rows:
    """Flow matching's mixture Euler step from t to s."""
    return _redraw(space, t, 1 - math.exp(-(s - t) / (1 - t)))


def flow_exact(space: Space, t: float, s: float) -> Rows:
    """The exact bridge with the posterior frozen."""
    return _redraw(space, t, (s - t) / (1 - t))


def flow_cumulative(space: Space, t: float, s: float) -> Rows:
    """FS-DFM's step with the cumulative scalar."""
    p, here = _flow_posterior(space, t), space.here
    own = (p * here).sum(axis=2, keepdims=True)
    leave = 1 - ((1 - s) / (1 - t)) ** (1 - own)
    return (1 - leave) * here + leave * _normalised(p * (1 - here))


def flow_last(space: Space, t: float, s: float) -> Rows:
    """The last step: a draw from p everywhere."""
    return _flow_posterior(space, t)


def _log_linear(t: float) -> float:
    return 1 - (1 - EPS) * (1 - t)


def masked_step(space: Space, t: float, s: float) -> Rows:
    """Masked diffusion: q(y | m) = p(y) (move_t - move_s) / move_t, q(m | m) = move_s / move_t."""
    move, move_s = 1 - _log_linear(t), 1 - _log_linear(s)
    p = _flow_posterior(space, t)
    rows = p * (move - move_s) / move + space.here * move_s / move
    return np.where(space.is_mask[..., None], rows, space.here)


def masked_argmax(space: Space, t: float, s: float) -> Rows:
    """MDLM's closing call: the most likely token at every mask."""
    p = _flow_posterior(space, t)
    best = np.eye(space.outputs)[p.argmax(axis=2)]
    return np.where(space.is_mask[..., None], best, space.here)


def _rates(space: Space) -> np.ndarray:
    """Q of d p / d sigma = Q p, (outputs, outputs)."""
    if not space.masked:
        return np.full((space.size, space.size), 1 / space.size) - np.eye(space.size)
    q = -np.eye(space.outputs)
    q[space.size], q[:, space.size] = 1.0, 0.0
    return q


def _score_rows(space: Space, weights: np.ndarray) -> Rows:
    return _normalised(np.maximum(weights, 0.0))


def score_analytic(space: Space, t: float, s: float) -> Rows:
    """SEDD's Tweedie step."""
    from scipy.linalg import expm

    delta = math.log(_log_linear(s) / _log_linear(t))
    q = _rates(space)
    back, forth = expm(-delta * q), expm(delta * q)
    weights = np.einsum("yx,nlx->nly", back, space.scores(_log_linear(t))) * forth[space.states]
    return _score_rows(space, weights)


def score_euler(space: Space, t: float, s: float) -> Rows:
    """SEDD's Euler step; sigma'(nu) = kappa' / kappa."""
    size = (s - t) * (1 - EPS) / _log_linear(t)
    edges = np.where(space.here > 0, 0.0, _rates(space)[space.states])
    weights = size * space.scores(_log_linear(t)) * edges
    stay = 1 - weights.sum(axis=2, keepdims=True)
    return _score_rows(space, weights + space.here * stay)


def score_closing(space: Space, t: float, s: float) -> Rows:
    """SEDD's closing draw: analytic with D = sigma(t), masks left out."""
    if not space.masked:
        return score_analytic(space, t, 1.0)
    p = _flow_posterior(space, t)
    return np.where(space.is_mask[..., None], p, space.here)


# ------------------------------------------------------------------------------------------------------ samplers


@dataclass(frozen=True)
class Sampler:
    """A published sampler as step rules.

    Args:
        method, option: as typed: dfm with "solver=exact".
        source: "mask", "uniform" or "".
        rule: of every step but the closing one; None = one position at a time (exact).
        closing: of the last step (`replaces`) or of the one after it.
        replaces: the closing rule takes the place of the last step.
    """

    method: str
    option: str
    source: str
    rule: Rule | None
    closing: Rule = flow_last
    replaces: bool = True

    @property
    def label(self) -> str:
        """Method and option, as in tables."""
        return f"{self.method}[{self.option}]" if self.option else self.method

    def grid(self, steps: int) -> Iterator[tuple[float, float]]:
        """The times of its steps."""
        end = 1.0 if self.replaces else 1 - NU_END
        for i in range(steps):
            yield end * i / steps, end * (i + 1) / steps


SAMPLERS = (
    *(
        Sampler("dfm", f"solver={name}", source, rule)
        for source in ("uniform", "mask")
        for name, rule in (("euler", flow_euler), ("exact", flow_exact), ("cumulative", flow_cumulative))
    ),
    *(Sampler("fsdfm", "", source, flow_cumulative) for source in ("uniform", "mask")),
    *(
        Sampler("mdlm", f"sampler={name}", "mask", masked_step, masked_argmax, replaces=False)
        for name in ("cached", "ancestral")
    ),
    Sampler("mdlm", "sampler=first-hitting", "mask", None),
    *(
        Sampler("sedd", f"sampler={name}", source, rule, score_closing, replaces=False)
        for source in ("mask", "uniform")
        for name, rule in (("analytic", score_analytic), ("euler", score_euler))
    ),
    Sampler("ar", "", "", None),
)


def output_law(sampler: Sampler, steps: int, law: np.ndarray, size: int = SYMBOLS, places: int = PLACES) -> np.ndarray:
    """Exact law (V^L,) of what a sampler writes in so many steps with the exact posterior of `law` (V^L,)."""
    space = Space(law, size, places, masked=sampler.source != "uniform")
    current = space.start()
    if sampler.rule is None:
        return _one_by_one(space, current, ordered=sampler.method == "ar")
    grid = list(sampler.grid(steps))
    for t, s in grid[: -1 if sampler.replaces else None]:
        current = space.step(current, sampler.rule(space, t, s))
    t = grid[-1][0] if sampler.replaces else grid[-1][1]
    return space.final(space.step(current, sampler.closing(space, t, 1.0)))


def _one_by_one(space: Space, current: np.ndarray, ordered: bool) -> np.ndarray:
    """The law when one masked position at a time is drawn from its posterior: the first one, or one at random."""
    rows = _flow_posterior(space, 0.0)
    for _ in range(space.places):
        left = np.asarray(space.is_mask, dtype=float)
        if ordered:
            left = left * (left.cumsum(axis=1) == 1)
        chance = left / left.sum(axis=1, keepdims=True).clip(min=1)
        following = current * (left.sum(axis=1) == 0)
        for i in range(space.places):
            only = np.where((np.arange(space.places) == i)[None, :, None], rows, space.here)
            following = following + space.step(current * chance[:, i], only)
        current = following
    return space.final(current)


@lru_cache(maxsize=1)
def example_law() -> np.ndarray:
    """The random law on 27 sequences that the table is about, (27,)."""
    law = np.random.default_rng(4).dirichlet(np.full(SYMBOLS**PLACES, 0.3))
    law.setflags(write=False)
    return law


@dataclass(frozen=True)
class Convergence:
    """Total variation to the true law by steps.

    Args:
        method, option, source: which sampler.
        label: method and option, as in tables.
        steps: step counts.
        total_variation: one per step count.
        order: fitted slope of -log2 TV over log2 steps from `FIT_FROM` on; None for an exact sampler.
    """

    method: str
    option: str
    source: str
    label: str
    steps: tuple[int, ...]
    total_variation: tuple[float, ...]
    order: float | None


def convergence_orders(steps: Sequence[int] = STEPS) -> list[Convergence]:
    """The measured order of every built-in sampler, computed without sampling."""
    law, found = example_law(), []
    for sampler in SAMPLERS:
        distances = tuple(float(0.5 * np.abs(output_law(sampler, n, law) - law).sum()) for n in steps)
        tail = [(n, tv) for n, tv in zip(steps, distances, strict=True) if n >= FIT_FROM and tv > EXACT]
        order = None
        if len(tail) > 1:
            order = -float(np.polyfit(np.log2([n for n, _ in tail]), np.log2([tv for _, tv in tail]), 1)[0])
        found.append(
            Convergence(sampler.method, sampler.option, sampler.source, sampler.label, tuple(steps), distances, order)
        )
    return found
