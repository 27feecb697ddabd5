"""Laws with a hidden chain: product law, Markov chain and hidden Markov model, by forward-backward.

A hidden state h_1 ~ initial, h_{i+1} ~ A[h_i], emits the token x_i ~ B[h_i]. The product law has one state, in a Markov
chain the state is the token. Given what is seen (`law.Evidence`), with e_i(h) = sum_v B[h, v] lambda_i(v),

    forward       a_1 = initial,    a_{i+1} = (a_i e_i) A          everything seen before place i
    backward      b_L = 1,          b_{i-1} = A (b_i e_i)          everything seen after it
    cavity        c_i(v) proportional to sum_h a_i(h) b_i(h) B[h, v]

each normalised at every place, in fp64; the cost is two (b, S) x (S, S) products a place.

If the text determines the hidden path (one state a token: a Markov chain; or from each state a token leads to one
state only: a unifilar machine), text and path are one-to-one and the entropy is exact at every length:

    H(x_1 .. x_L) = H(initial) + sum_{i<L} sum_h mu_i(h) H(A[h]) + sum_i sum_h mu_i(h) H(B[h]),     mu_{i+1} = mu_i A

Reference: Rabiner, "A tutorial on hidden Markov models", 1989; unifilar machines: Crutchfield and Young, 1989.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from tsdfm_bench.errors import UsageError
from tsdfm_bench.tasks.synthetic.law import Evidence, Law, categorical, entropy_of

if TYPE_CHECKING:
    from tsdfm_bench.rng import Streams

_ENUMERABLE = 1 << 16
_RESCALE = 8  # places between two rescalings: even factors of 1e-15 a place stay far from the smallest fp64


class HiddenMarkov(Law):
    """A hidden Markov model of S states.

    Args:
        name: what it is called.
        initial: (S,) law of the first state.
        transition: (S, S), rows sum to 1.
        emission: (S, V), rows sum to 1; None = the state is the token (a Markov chain).
        about: what its identity is hashed from; None = the numbers.
    """

    def __init__(
        self,
        name: str,
        initial: np.ndarray,
        transition: np.ndarray,
        emission: np.ndarray | None = None,
        about: Mapping[str, object] | None = None,
    ) -> None:
        self.visible = emission is None
        self.initial = torch.tensor(initial, dtype=torch.float64)
        self.transition = torch.tensor(transition, dtype=torch.float64)
        self.emission = torch.eye(len(initial)).double() if emission is None else torch.tensor(emission).double()
        super().__init__(name, self.emission.shape[1])
        self.states = self.initial.numel()
        self.about = about
        for rows in (self.initial[None], self.transition, self.emission):
            if not bool(torch.isclose(rows.sum(dim=1), torch.ones(()).double(), atol=1e-12).all()) or rows.min() < 0:
                raise ValueError(f"{name}: a law's probabilities must be non-negative and sum to 1")
        self._by_token = self.emission.T.contiguous()  # (V, S)
        self._backward = self.transition.T.contiguous()

    def parameters(self) -> Mapping[str, object]:
        """What the recipe says, or the numbers."""
        if self.about is not None:
            return self.about
        numbers = {"initial": self.initial, "transition": self.transition, "emission": self.emission}
        return {key: [float(x).hex() for x in value.flatten()] for key, value in numbers.items()}

    # ------------------------------------------------------------------------------------------------ inference

    def weigh(self, evidence: Evidence, rows: Tensor, positions: Tensor) -> Tensor:
        """See `Law.weigh`: forward-backward."""
        batch, length = evidence.tokens.shape
        seen = self._by_token[evidence.tokens.T]  # (length, b, S): one contiguous slice a place
        seen = seen.mul_(evidence.hit.T[..., None]).add_(evidence.miss.T[..., None])
        inner = torch.empty(length, batch, self.states, dtype=torch.float64)
        inner[0] = self.initial
        scratch = torch.empty_like(inner[0])
        for i in range(1, length):
            torch.mm(torch.mul(inner[i - 1], seen[i - 1], out=scratch), self.transition, out=inner[i])
            if i % _RESCALE == 0:
                _normalise(inner[i])
        behind = torch.ones_like(inner[0])
        for i in range(length - 2, -1, -1):
            torch.mm(torch.mul(behind, seen[i + 1], out=scratch), self._backward, out=behind)
            if i % _RESCALE == 0:
                _normalise(behind)
            inner[i] *= behind
        states = inner[positions, rows]
        return states if self.visible else states @ self.emission

    def surprise(self, evidence: Evidence) -> Tensor:
        """See `Law.surprise`: the normalisers of the forward pass."""
        seen = self._by_token[evidence.tokens.T].mul_(evidence.hit.T[..., None]).add_(evidence.miss.T[..., None])
        ahead = self.initial.expand(len(evidence.tokens), -1)
        terms = []
        for place in seen:
            likely = ahead * place
            total = likely.sum(dim=1, keepdim=True).clamp_min(1e-300)
            terms.append(-total.log())
            ahead = (likely / total) @ self.transition
        return torch.cat(terms, dim=1)

    def begin(self, batch: int, length: int) -> dict[str, Any]:
        """See `Law.begin`: the law of the next state."""
        return {"ahead": self.initial.expand(batch, self.states)}

    def advance(self, memory: dict[str, Any], tokens: Tensor) -> Tensor:
        """See `Law.advance`: forward only."""
        for i in range(tokens.shape[1]):
            likely = memory["ahead"] * self._by_token[tokens[:, i]]
            total = likely.sum(dim=1, keepdim=True)
            likely = torch.where(total > 0, likely, memory["ahead"])  # an impossible token tells nothing
            memory["ahead"] = _normalise(likely @ self.transition)
        law: Tensor = memory["ahead"]
        return law if self.visible else law @ self.emission

    def token_nll(self, tokens: np.ndarray) -> np.ndarray:
        """See `Law.token_nll`: forward only."""
        ids = torch.as_tensor(np.asarray(tokens, dtype=np.int64))
        memory = self.begin(ids.shape[0], ids.shape[1])
        nll = torch.empty(ids.shape, dtype=torch.float64)
        law = self.advance(memory, ids[:, :0])
        for i in range(ids.shape[1]):
            nll[:, i] = -law.gather(1, ids[:, i, None])[:, 0].log()
            if i + 1 < ids.shape[1]:
                law = self.advance(memory, ids[:, i, None])
        return nll.numpy()

    # -------------------------------------------------------------------------------------------- exact numbers

    def sample(self, streams: Streams, length: int, site: str) -> Tensor:
        """See `Law.sample`: one uniform a state, one a token."""
        first, further, emitted = self.initial.cumsum(0), self.transition.cumsum(1), self.emission.cumsum(1)
        u = streams.uniform(f"{site}/state", 0, length).cpu()
        states = torch.empty(u.shape, dtype=torch.int64)
        states[:, 0] = categorical(first.expand(len(streams), -1), u[:, 0])
        for i in range(1, length):
            states[:, i] = categorical(further[states[:, i - 1]], u[:, i])
        if self.visible:
            return states.to(streams.device)
        u = streams.uniform(f"{site}/token", 0, length).cpu()
        return categorical(emitted[states.flatten()], u.flatten()).view(u.shape).to(streams.device)

    def occupancy(self, length: int) -> np.ndarray:
        """Law of the state at every place, (length, S)."""
        laws, law = [], self.initial.numpy()
        for _ in range(length):
            laws.append(law)
            law = law @ self.transition.numpy()
        return np.stack(laws)

    @property
    def determined(self) -> bool:
        """Whether the text determines the hidden path."""
        emits = (self.emission > 0).double()
        onward = torch.cat([(self.initial > 0).double()[None], (self.transition > 0).double()]) @ emits
        return bool((onward <= 1).all())

    def entropy_nats(self, length: int) -> float:
        """See `Law.entropy_nats` and the module; otherwise by enumeration.

        Raises:
            UsageError: the text does not determine the path, and there are too many texts to enumerate.
        """
        if not self.determined:
            return self._enumerated_entropy(length)
        occupancy = self.occupancy(length)
        moves, tokens = entropy_of(self.transition.numpy()), entropy_of(self.emission.numpy())
        first = float(entropy_of(self.initial.numpy()))
        return first + float((occupancy[:-1] @ moves).sum() + (occupancy @ tokens).sum())

    def _enumerated_entropy(self, length: int) -> float:
        if self.vocab_size**length > _ENUMERABLE:
            raise UsageError(f"the entropy of {self.name} at length {length} has no closed form and no short sum")
        texts = np.array(list(itertools.product(range(self.vocab_size), repeat=length)))
        return float(entropy_of(np.exp(-self.token_nll(texts).sum(axis=1))))

    def entropy_rate_nats(self) -> float:
        """Limit of entropy / length in nats a token; the chain must have one stationary law and determined paths."""
        values, vectors = np.linalg.eig(self.transition.numpy().T)
        stationary = np.real(vectors[:, np.argmax(np.real(values))])
        stationary = stationary / stationary.sum()
        return float(stationary @ (entropy_of(self.transition.numpy()) + entropy_of(self.emission.numpy())))

    def ngrams(self, n: int, length: int) -> np.ndarray:
        """See `Law.ngrams`."""
        occupancy, emission = self.occupancy(length), self.emission.numpy()
        if n == 1:
            return np.asarray(occupancy.mean(axis=0) @ emission)
        before = occupancy[:-1].mean(axis=0)[:, None] * self.transition.numpy()
        return np.asarray(emission.T @ before @ emission)


def _normalise(x: Tensor) -> Tensor:
    """Make rows sum to 1, in place; rows of zeros stay."""
    return x.div_(x.sum(dim=1, keepdim=True).clamp_min_(1e-300))
