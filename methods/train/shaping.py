"""TS-DFM's navigation shaping: the compass chooses among the candidates of each jump (arXiv 2605.07924).

At every jump of the shortcut chain K candidates are drawn from the same logits (no extra denoiser call). Where the gate
time is at least tau, the candidate of lowest energy is taken:

    seq           C[argmin_k E(C_k, s)]
    token         mix_i = C[k_i]_i with k_i = argmin_k e_i(C_k, s); kept only if E(mix, s) <= min_k E(C_k, s)
    seq_to_token  seq first, token after; `switch` says when: from the state's time s >= t_sw on ("time"), at every
                  midpoint but the first of a chain ("midpoint_index"), or when t_sw of the training's steps are over
                  ("curriculum")

The paper's full text was not available; every choice is a named option with this project's default
(K 4, tau 0.5 on the midpoint's time, argmin, seq_to_token). `softmax` draws k with probability proportional to
exp(-E / T), and k_i to exp(-e_i / T), where argmin takes the lowest.

Controls: `argmax` is the same code path with the opposite sign; `random` and `shuffled` (energies permuted among the
candidates) know nothing of the states. These two pick whole candidates under every policy: positions jump
independently, so tokens mixed blindly have the law of one candidate, and the guard, which looks at true energies, must
not choose.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tsdfm_bench.errors import UsageError
from tsdfm_bench.methods.train.data import Draws

Energy = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(rows, length) candidates, (rows,) times, (rows, length) origins -> (rows, length) token energies."""

POLICIES = ("seq", "token", "seq_to_token")
RULES = ("argmin", "softmax", "argmax", "random", "shuffled")
INFORMED = ("argmin", "softmax", "argmax")
GATES = ("midpoint_time", "row_start_time")
SWITCHES = ("time", "midpoint_index", "curriculum")


@dataclass(frozen=True)
class ShapingConfig:
    """Options of navigation shaping; defaults are this project's reading of the paper.

    Args:
        candidates: K, jumps drawn per midpoint.
        tau: shape only where the gate time is >= tau; above 1 shaping is off.
        gate_on: "midpoint_time" (time of the state being judged) or "row_start_time".
        rule: selection rule.
        selection_temperature: T of the softmax rule.
        policy: "seq", "token" or "seq_to_token".
        switch: what seq_to_token switches on, see above.
        switch_time: t_sw of seq_to_token, a time or, with "curriculum", a fraction of the training.
        token_guard: keep a token-wise mixture only if its energy is no higher than the best candidate's.
    """

    candidates: int = 4
    tau: float = 0.5
    gate_on: str = "midpoint_time"
    rule: str = "argmin"
    selection_temperature: float = 1.0
    policy: str = "seq_to_token"
    switch: str = "time"
    switch_time: float = 0.75
    token_guard: bool = True

    def __post_init__(self) -> None:
        if self.candidates < 1:
            raise UsageError(f"shaping: candidates (K) must be at least 1, not {self.candidates}")
        if not self.tau >= 0:
            raise UsageError(f"shaping: tau must be in [0, 1] (above 1 switches shaping off), not {self.tau}")
        if self.selection_temperature <= 0:
            raise UsageError(f"shaping: selection_temperature must be positive, not {self.selection_temperature}")
        for name, value, known in (
            ("policy", self.policy, POLICIES),
            ("rule", self.rule, RULES),
            ("gate_on", self.gate_on, GATES),
            ("switch", self.switch, SWITCHES),
        ):
            if value not in known:
                raise UsageError(f"shaping: {name} '{value}' is not one of {', '.join(known)}")


class ShapingChooser:
    """Chooses by energy.

    Args:
        config: options.
        energy: token energies of states; called once per midpoint on all gated candidates that differ, once more for
            the guard.
        steps: of the whole training, for the switch "curriculum".
    """

    def __init__(self, config: ShapingConfig, energy: Energy, steps: int = 1) -> None:
        self.config = config
        self.energy = energy
        self.steps = steps
        self.candidates = config.candidates
        self.gated_rows = 0
        self.seen_rows = 0

    def gate(self, row_time: Tensor, state_time: Tensor) -> Tensor:
        """(rows,) bool, rows whose gate time has reached tau."""
        return (state_time if self.config.gate_on == "midpoint_time" else row_time) >= self.config.tau

    def __call__(
        self, states: Tensor, origin: Tensor, row_time: Tensor, state_time: Tensor, index: int, draws: Draws
    ) -> Tensor:
        """(K, rows, length) -> (rows, length); see the module's text."""
        config = self.config
        allowed = self.gate(row_time, state_time)
        gated = allowed.nonzero().squeeze(1)
        self.seen_rows += allowed.numel()
        self.gated_rows += gated.numel()
        result = states[0].clone()
        differs = (states != states[0]).any(dim=2)  # after a small step candidates are often equal
        gated = gated[differs[:, gated].any(dim=0)]
        if gated.numel() == 0:
            return result
        pool, source, time = states[:, gated], origin[gated], state_time[gated]
        rows = pool.shape[1]
        token_energy = self._energies(pool, differs[:, gated], time, source)
        _require_finite(token_energy, gated, allowed, draws, index)
        best = self._sequence_picks(token_energy, gated, draws, index)
        chosen = pool[best, torch.arange(rows, device=pool.device)]
        token_wise = {
            "seq": torch.zeros(rows, dtype=torch.bool, device=pool.device),
            "token": torch.ones(rows, dtype=torch.bool, device=pool.device),
            "seq_to_token": self._switched(time, index, draws),
        }[config.policy]
        if config.rule in INFORMED and token_wise.any():
            picks = self._token_picks(token_energy, gated, draws, index)
            mixture = pool.gather(0, picks[None]).squeeze(0)
            accept = token_wise.clone()
            if config.token_guard:
                asked = token_wise.nonzero().squeeze(1)
                energy = self.energy(mixture[asked], time[asked], source[asked])
                _require_finite(energy[None], gated[asked], allowed, draws, index)
                accept[asked] = self._passes(energy, token_energy[:, asked])
            chosen = torch.where(accept[:, None], mixture, chosen)
        result[gated] = chosen
        return result

    def _energies(self, pool: Tensor, differs: Tensor, time: Tensor, source: Tensor) -> Tensor:
        """Token energies (K, rows, length) in one call; candidates equal to the first one are not judged again."""
        differs[0] = True
        which, row = differs.nonzero(as_tuple=True)
        judged = self.energy(pool[which, row], time[row], source[row])
        energy = judged.new_empty(pool.shape)
        energy[:] = judged[: pool.shape[1]]  # candidate 0 comes first
        energy[which, row] = judged
        return energy

    def _switched(self, time: Tensor, index: int, draws: Draws) -> Tensor:
        """Whether seq_to_token is token-wise by now, (rows,) bool."""
        if self.config.switch == "time":
            return time >= self.config.switch_time
        over = (
            index > 0 if self.config.switch == "midpoint_index" else draws.step >= self.config.switch_time * self.steps
        )
        return torch.full_like(time, over, dtype=torch.bool)

    def _sequence_picks(self, energy: Tensor, gated: Tensor, draws: Draws, index: int) -> Tensor:
        """The candidate of each row under the selection rule, (rows,) int64, from token energies (K, rows, length)."""
        rule, whole = self.config.rule, energy.mean(dim=-1)
        if rule == "argmin":
            return whole.argmin(dim=0)
        if rule == "argmax":
            return whole.argmax(dim=0)
        uniform = draws.uniform(f"select{index}", energy.shape[0])[gated].T  # (K, rows)
        if rule == "shuffled":
            return whole.gather(0, uniform.argsort(dim=0)).argmin(dim=0)
        gumbel = -torch.log(-torch.log(uniform))
        if rule == "random":
            return gumbel.argmax(dim=0)
        return (gumbel - whole.double() / self.config.selection_temperature).argmax(dim=0)

    def _token_picks(self, energy: Tensor, gated: Tensor, draws: Draws, index: int) -> Tensor:
        """The candidate of each position under an informed rule, (rows, length) int64."""
        rule = self.config.rule
        if rule == "argmin":
            return energy.argmin(dim=0)
        if rule == "argmax":
            return energy.argmax(dim=0)
        candidates, rows, length = energy.shape
        uniform = draws.uniform(f"select{index}/token", candidates * length)[gated]
        gumbel = -torch.log(-torch.log(uniform)).view(rows, candidates, length).transpose(0, 1)
        return (gumbel - energy.double() / self.config.selection_temperature).argmax(dim=0)

    def _passes(self, mixture: Tensor, candidates: Tensor) -> Tensor:
        """Whether a mixture's energy is no higher than any candidate's (no lower, under argmax), (rows,) bool.

        Args:
            mixture: token energies (rows, length).
            candidates: token energies (K, rows, length).
        """
        sign = -1.0 if self.config.rule == "argmax" else 1.0
        return sign * mixture.mean(dim=-1) <= (sign * candidates.mean(dim=-1)).min(dim=0).values


def _require_finite(energy: Tensor, rows: Tensor, allowed: Tensor, draws: Draws, index: int) -> None:
    """Refuse energies (K, n, length) of some rows (n,) of a batch with NaN or infinity; `allowed` is (batch,)."""
    finite = torch.isfinite(energy)
    if finite.all():
        return
    bad = torch.zeros_like(allowed)
    bad[rows] = ~finite.all(dim=2).all(dim=0)
    raise FloatingPointError(
        f"the compass gave an energy that is not finite at jump {index + 1} in {draws.describe(bad)}"
    )
