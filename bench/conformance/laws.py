"""Small exact laws in place of a network, for methods that take one (`FromOracleHook`): is what they sample right?

Two laws. The first is a random law on all 27 sequences of three tokens over three symbols; the posterior of a noised
sequence follows by summing over all of them, so the denoiser is exact and every sampler has a known target: with more
steps the sampled law must approach it. The sum over sequences is written out here and owes nothing to the samplers.

The second is one very likely token and thousands of rare ones of equal weight, which shows in which arithmetic a token
is drawn. An exponential race gives each token y the time E_y = -log u_y / w_y, the first one wins; this is exact for
real uniforms. In fp32 the usual u_y are multiples of 2^-24, so the smallest times of a token of weight w, beside a
competitor of weight 1, are k 2^-24 / w, k = 1, 2, ..., each with probability 2^-24, and it wins if the competitor,
exponential with mean 1, has not come before:

    P(win) = 2^-24 sum_k exp(-k 2^-24 / w) = 2^-24 / (e^(1/c) - 1),      c = w 2^24

instead of w = c 2^-24 (to first order in w). The share of its probability that is left is

    f(c) = 1 / (c (e^(1/c) - 1)),      f -> 1 - 1/(2c) for large c;   f(1) = 0.58, f(0.3) = 0.12, f(0.1) = 0.0005

so a token below about 2^-26 of the largest is as good as never drawn (Zheng et al., arXiv 2409.02908, found the effect;
the closed form is ours). At c = 0.3 exact draws give eight times as many rare tokens as the race, and a sequential
probability ratio test (Wald) tells the two apart after some ten million weights.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from tsdfm_bench.conformance.report import Failed, Skipped
from tsdfm_bench.conformance.subject import SEED, Broke, Refused, Subject, require
from tsdfm_bench.errors import UsageError
from tsdfm_bench.registry import one_line

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tsdfm_bench.api import Method, OracleForm

SYMBOLS, PLACES = 3, 3
SEQUENCES = 8000
FEW, MANY = 2, 64

RARE_C = 0.3
WIDTH = 4096
PARTS = 4  # requests in a round, so that a denoiser's answer stays small
QUANTUM = 2.0**-24
# Evidence at which the probe believes a claim, or rejects it; the race is slow, and its name promises less.
AGREES_NATS = {"fp64": 3.0, "legacy-fp32": 2.0}
CONTRADICTS_NATS = 6.0
MOST_ROUNDS = 40


# ------------------------------------------------------------------------------------------------- enumeration


@lru_cache(maxsize=1)
def space() -> Tensor:
    """(27, 3) all sequences."""
    import torch

    return torch.tensor(list(itertools.product(range(SYMBOLS), repeat=PLACES)))


@lru_cache(maxsize=1)
def law() -> Tensor:
    """(27,) fp64 probabilities: a fixed draw from a sparse Dirichlet law."""
    import numpy as np
    import torch

    return torch.tensor(np.random.default_rng(4).dirichlet(np.full(SYMBOLS**PLACES, 0.3)))


class Enumerated:
    """Exact predictions of the first law: clean-token logits, log scores, or next-token logits.

    Args:
        form: "posterior", "score" or "causal".
        source: "mask" or "uniform"; not read for "causal".
    """

    vocab_size = SYMBOLS

    def __init__(self, form: OracleForm, source: str | None) -> None:
        if form == "energy":
            raise UsageError("choosing by an energy changes the law on purpose: there is no exact law to compare with")
        self.masked = source == "mask"
        self.outputs = SYMBOLS + self.masked
        self.kind = "log_score" if form == "score" else "x0_logits"

    def predict(self, tokens: Tensor, condition: Any, rows: Tensor, positions: Tensor) -> Tensor:
        """See `methods.core.Denoiser`: sums over all sequences, fp64."""
        import torch

        kappa = condition.kappa.double()[:, None, None]
        match = (tokens[:, None, :] == space()).double()  # (rows, 27, places)
        if self.masked:
            likelihood = torch.where(tokens[:, None, :] == SYMBOLS, 1 - kappa, kappa * match)
        else:
            likelihood = kappa * match + (1 - kappa) / SYMBOLS
        one_hot = torch.nn.functional.one_hot(space(), SYMBOLS).double()  # (27, places, symbols)
        if self.kind == "x0_logits":
            joint = likelihood.prod(dim=2) * law()
            p = torch.einsum("bs,slv->blv", joint, one_hot)[rows, positions]
            p = p / p.sum(dim=1, keepdim=True)
            missing = p.new_zeros(p.shape[0], 1 if self.masked else 0)
            return torch.cat([p, missing], dim=1).log()
        return self._scores(likelihood, kappa, one_hot, rows, positions)

    def _scores(self, likelihood: Tensor, kappa: Tensor, one_hot: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
        """log p_t(x with y here) / p_t(x); the mask's own ratio counts as 1."""
        import torch

        left_out = [[place for place in range(PLACES) if place != here] for here in range(PLACES)]
        others = torch.stack([likelihood[:, :, places].prod(dim=2) for places in left_out], dim=2)
        others = others * law()[:, None]  # (rows, 27, places): the place itself left out
        ratios = kappa * torch.einsum("bsl,slv->blv", others, one_hot)
        if not self.masked:
            ratios = ratios + (1 - kappa) / SYMBOLS * others.sum(dim=1)[:, :, None]
        now = (likelihood.prod(dim=2) * law()).sum(dim=1)
        ratios = (ratios / now[:, None, None])[rows, positions]
        own = ratios.new_ones(ratios.shape[0], 1 if self.masked else 0)
        return torch.cat([ratios, own], dim=1).log()

    def begin(self, batch: int, length: int) -> dict[str, Tensor]:
        """See `methods.core.CausalDenoiser`."""
        import torch

        return {"tokens": torch.zeros(batch, 0, dtype=torch.int64)}

    def next_logits(self, memory: dict[str, Tensor], tokens: Tensor) -> Tensor:
        """Exact conditionals of the next token."""
        import torch

        memory["tokens"] = torch.cat([memory["tokens"], tokens], dim=1)
        place = memory["tokens"].shape[1]
        joint = (memory["tokens"][:, None, :] == space()[:, :place]).all(dim=2) * law()
        return (joint @ torch.nn.functional.one_hot(space()[:, place], SYMBOLS).double()).log()

    def networks(self) -> Mapping[str, nn.Module]:
        """None."""
        return {}


def noise() -> float:
    """Mean total variation of that many exact samples: half the sum of mean absolute errors."""
    return 0.5 * float((2 / math.pi * law() / SEQUENCES).sqrt().sum())


def convergence(subject: Subject) -> str:
    """With exact predictions the sampled law approaches the true one."""
    method = with_denoiser(subject, Enumerated, SYMBOLS, PLACES)
    floor = noise()
    limit = 2.5 * floor + 0.02
    if not subject.info.uses_steps:
        found = _distance(subject, method, None)
        require(found < limit, f"total variation to the true law {found:.3f}, exact samples give {floor:.3f}")
        return f"total variation to the true law {found:.3f} (exact samples: {floor:.3f})"
    few, many = (_distance(subject, method, steps) for steps in (FEW, MANY))
    seen = f"total variation to the true law {few:.3f} at {FEW} steps, {many:.3f} at {MANY}"
    require(many < limit, f"{seen}; exact samples give {floor:.3f}: it does not converge to the law of its denoiser")
    return f"{seen} (exact samples: {floor:.3f})"


def _distance(subject: Subject, method: Method, steps: int | None) -> float:
    import torch

    tokens = _serve(subject, method, SEQUENCES, PLACES, steps=steps)
    codes = (tokens * torch.tensor([SYMBOLS * SYMBOLS, SYMBOLS, 1])).sum(dim=1)
    outside = (tokens < 0) | (tokens >= SYMBOLS)
    require(not bool(outside.any()), "with exact predictions it returns ids outside the vocabulary")
    counts = torch.bincount(codes, minlength=len(law())).double() / SEQUENCES
    return 0.5 * float((counts - law()).abs().sum())


def with_denoiser(subject: Subject, denoiser: Any, vocab_size: int, length: int) -> Method:
    """The method around a denoiser of the kit, in the setting under test.

    Raises:
        Skipped: it takes none, or not for this source or setting.
        Failed: it breaks.
    """
    if not hasattr(subject.cls, "from_oracle"):
        raise Skipped("it has no from_oracle (see tsdfm_bench.api.FromOracleHook), so no exact denoiser can be put in")
    if subject.setting.source not in (None, "mask", "uniform"):
        raise Skipped(f"the kit has no exact denoiser for source '{subject.setting.source}'")
    params = subject.params(length) | {"vocab_size": vocab_size, "checkpoint": "oracle"}
    try:
        method: Method = subject.cls.from_oracle(denoiser, params, "cpu")
    except UsageError as error:
        raise Skipped(str(error)) from None
    except Exception as error:
        raise Failed(f"from_oracle() failed: {one_line(error)}") from None
    return method


def _serve(subject: Subject, method: Method, batch: int, length: int, **settings: Any) -> Tensor:
    try:
        return subject.serve(subject.request(batch, length, **settings), method).tokens
    except Refused as error:
        raise Skipped(f"refused: {error}") from None
    except Broke as error:
        raise Failed(f"with exact predictions sample() failed: {error}") from None


# -------------------------------------------------------------------------------------------------- arithmetic


def kept_share(c: float) -> float:
    """f(c): what a race on multiples of 2^-24 leaves of the probability of a token of weight c 2^-24."""
    return 1.0 / (c * math.expm1(1.0 / c))


class Rare:
    """Independent places; token 0 has weight 1, every other token `RARE_C` 2^-24.

    Clean-token logits are these weights whatever is asked, so that one step draws from them. The score is the exact one
    of that law, with which a single place is sampled without error in any number of steps.

    Args:
        form, source: as for `Enumerated`.
    """

    vocab_size = WIDTH

    def __init__(self, form: OracleForm, source: str | None) -> None:
        import torch

        self.masked = source == "mask" and form != "causal"
        self.outputs = WIDTH + self.masked
        self.kind = "log_score" if form == "score" else "x0_logits"
        self.logits = torch.full((1, self.outputs), math.log(RARE_C * QUANTUM), dtype=torch.float32)
        self.logits[0, 0] = 0.0
        self.logits[0, WIDTH:] = -torch.inf

    def predict(self, tokens: Tensor, condition: Any, rows: Tensor, positions: Tensor) -> Tensor:
        """See `methods.core.Denoiser`; logits are a view, so that nothing of that width is stored."""
        if self.kind == "x0_logits":
            return self.logits.expand(rows.numel(), -1)
        kappa = condition.kappa.double()[rows, None]
        if self.masked:
            return (self.logits.double() - self.logits.exp().sum().log() + (kappa / (1 - kappa)).log()).float()
        p = self.logits.double().softmax(dim=1)
        shares = kappa * p + (1 - kappa) / WIDTH
        return (shares / shares.gather(1, tokens[rows, positions, None])).log().float()

    def begin(self, batch: int, length: int) -> int:
        """See `methods.core.CausalDenoiser`."""
        return batch

    def next_logits(self, memory: int, tokens: Tensor) -> Tensor:
        """The same everywhere."""
        return self.logits.expand(memory, -1)

    def networks(self) -> Mapping[str, nn.Module]:
        """None."""
        return {}


def arithmetic(subject: Subject) -> str:
    """Rare tokens are drawn as often as the arithmetic that was asked for says."""
    method = with_denoiser(subject, Rare, WIDTH, 1)
    seen = []
    for draw, wanted in (("fp64", "exact"), ("legacy-fp32", "fp32")):
        request = subject.request(1, 1, draw=draw, steps=1 if subject.info.uses_steps else None)
        reason = method.refuse(request)
        if reason is not None:
            seen.append(f"{draw} refused: {reason}")
            continue
        found, numbers = _probe(subject, method, draw)
        if found == "undecided":
            seen.append(f"{draw}: undecided, {numbers}")
            continue
        require(
            found == wanted,
            f"asked for draw {draw}, it draws like {_NAMES[found]}: {numbers}. "
            + ("Draw in fp64." if draw == "fp64" else "Refuse that draw, or make it the published race."),
        )
        seen.append(f"{draw} draws like {_NAMES[found]}: {numbers}")
    return "; ".join(seen)


_NAMES = {
    "exact": "exact arithmetic",
    "fp32": "an fp32 race on multiples of 2^-24",
    "neither": "neither exact arithmetic nor an fp32 race",
}


def _probe(subject: Subject, method: Method, draw: str) -> tuple[str, str]:
    """Which of the two laws the counts of rare tokens follow, and the counts."""
    from scipy import stats

    sign = 1.0 if draw == "fp64" else -1.0  # of evidence for what the draw claims to be
    rate = _rare_mass() * WIDTH  # expected rare tokens in a round of WIDTH sequences
    f = kept_share(RARE_C)
    count = rounds = 0
    evidence = 0.0  # log likelihood ratio of Poisson counts, exact over race
    while rounds < MOST_ROUNDS and -CONTRADICTS_NATS < sign * evidence < AGREES_NATS[draw]:
        for part in range(PARTS):
            seed = SEED + PARTS * rounds + part
            tokens = _serve(subject, method, WIDTH // PARTS, 1, draw=draw, steps=_steps(subject), seed=seed)
            count += int((tokens != 0).sum())
        rounds += 1
        evidence = count * -math.log(f) - rounds * rate * (1 - f)
    exact, race = rounds * rate, rounds * rate * f
    numbers = f"{count} rare tokens, exact {exact:.1f}, f(c) {race:.1f} (c = {RARE_C:g}, {rounds} rounds)"
    if -CONTRADICTS_NATS < sign * evidence < AGREES_NATS[draw]:
        return "undecided", numbers
    mean = exact if evidence > 0 else race
    tail = min(float(stats.poisson.cdf(count, mean)), float(stats.poisson.sf(count - 1, mean)))
    if tail < 1e-5:
        return "neither", numbers
    return ("exact" if evidence > 0 else "fp32"), numbers


def _rare_mass() -> float:
    weight = (WIDTH - 1) * RARE_C * QUANTUM
    return weight / (1 + weight)


def _steps(subject: Subject) -> int | None:
    return 1 if subject.info.uses_steps else None
