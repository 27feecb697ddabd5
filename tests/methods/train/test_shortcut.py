"""The shortcut teacher and navigation shaping: laws, times, and the equality of K = 1 with FS-DFM."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from tsdfm_bench.errors import UsageError
from tsdfm_bench.methods.nets.dit import DiT, DiTConfig
from tsdfm_bench.methods.train.compass import CompassObjective
from tsdfm_bench.methods.train.data import Draws
from tsdfm_bench.methods.train.shaping import ShapingChooser, ShapingConfig
from tsdfm_bench.methods.train.shortcut import (
    BlindChooser,
    ShortcutObjective,
    jump,
    shortcut_target,
    step_size_and_time,
    without_mask,
)


def test_jump_follows_the_cumulative_law() -> None:
    """P(leave z) = 1 - R^(1 - p(z)), destination proportional to p(y): chi-square at 0.1 %."""
    count, t, h = 20_000, 0.2, 0.3
    logits = torch.tensor([0.3, -0.5, 1.0, -1.2])
    p = logits.softmax(-1).double()
    ratio = (1 - t - h) / (1 - t)
    for z in range(4):
        x = torch.full((count, 1), z)
        draws = Draws(3, f"law{z}", 0, count)
        result = jump(x, logits.expand(count, 1, 4), torch.full((count,), t), torch.full((count,), h), draws, "j")[0]
        leave = 1 - ratio ** (1 - p[z])
        law = leave * p / (1 - p[z])
        law[z] = 1 - leave
        observed = torch.bincount(result[:, 0], minlength=4)
        assert stats.chisquare(observed, law.numpy() * count).pvalue > 1e-3


def test_candidates_are_independent_and_the_first_is_the_blind_draw() -> None:
    logits = torch.randn(64, 5, 6)
    x = torch.randint(0, 6, (64, 5))
    t, h = torch.full((64,), 0.1), torch.full((64,), 0.5)
    draws = Draws(0, "candidates", 7, 64)
    blind = jump(x, logits, t, h, draws, "j")
    several = jump(x, logits, t, h, draws, "j", candidates=4)
    assert several.shape == (4, 64, 5)
    assert torch.equal(several[0], blind[0])
    assert all(not torch.equal(a, b) for a, b in pairwise(several))


def test_the_mask_id_is_never_a_destination() -> None:
    logits = torch.zeros(500, 3, 5)
    logits[..., 4] = 9.0
    x = torch.full((500, 3), 4)
    result = jump(x, without_mask(logits, 4), torch.zeros(500), torch.ones(500), Draws(0, "mask", 0, 500), "j")
    assert (result < 4).all()


class Recorder(nn.Module):
    """A teacher that remembers when it was called and answers with a constant per call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[float, float]] = []

    def forward(self, x: Tensor, time: Tensor, step_size: Tensor) -> Tensor:
        self.calls.append((time[0].item(), step_size[0].item()))
        return torch.full((*x.shape, 3), float(len(self.calls)))


@pytest.mark.parametrize(
    ("rule", "times", "mean"),
    [("rk4", [0.25, 0.5, 0.5, 0.75], (1 + 4 + 6 + 4) / 6), ("heun", [0.25, 0.5], 1.5)],
)
def test_teacher_is_called_at_the_published_times_with_half_the_step(
    rule: str, times: list[float], mean: float
) -> None:
    teacher = Recorder()
    x = torch.zeros(2, 4, dtype=torch.int64)
    target = shortcut_target(
        teacher, x, torch.full((2,), 0.25), torch.full((2,), 0.5), Draws(0, "t", 0, 2), 3, rule, BlindChooser()
    )
    assert [call[0] for call in teacher.calls] == times
    assert {call[1] for call in teacher.calls} == {0.25}
    assert torch.equal(target, torch.full((2, 4, 3), mean))


@pytest.mark.parametrize(("law", "weight"), [("uniform", lambda j: 1.0), ("inverse_h", lambda j: 2.0**j)])
def test_step_sizes_follow_their_law_and_times_stay_on_the_grid(law: str, weight) -> None:
    t, h = step_size_and_time(Draws(1, "law", 0, 20_000), law)
    exponent = (-h.log2()).round().long()
    expected = torch.tensor([weight(j) for j in range(11)], dtype=torch.float64)
    expected = expected / expected.sum() * 20_000
    observed = torch.bincount(exponent, minlength=11).double()
    keep = expected >= 5
    if not keep.all():  # pool the rare sizes
        observed = torch.cat([observed[keep], observed[~keep].sum()[None]])
        expected = torch.cat([expected[keep], expected[~keep].sum()[None]])
    assert stats.chisquare(observed, expected.numpy()).pvalue > 1e-3
    assert ((t * 1024) % 1 == 0).all()
    assert ((t >= 0) & (t + h <= 1)).all()


def network(outputs: int, step_aware: bool = False, seed: int = 0) -> DiT:
    torch.manual_seed(seed)
    made = DiT(DiTConfig(6, outputs, 5, width=16, blocks=2, heads=2, condition=8, step_aware=step_aware))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return made.eval()


def energy(states: Tensor, time: Tensor, origin: Tensor) -> Tensor:
    return states.float()


@pytest.mark.parametrize("outputs", [6, 7])
def test_one_candidate_is_fsdfm_bit_for_bit_and_tau_above_one_too(outputs: int) -> None:
    student, teacher, frozen = network(outputs, True), network(outputs, True, 1), network(outputs, False, 2)
    x_1 = torch.randint(0, 6, (16, 5))

    def loss(config: ShapingConfig | None) -> Tensor:
        choose = BlindChooser() if config is None else ShapingChooser(config, energy)
        objective = ShortcutObjective(6, outputs, teacher, frozen, h_law="uniform", choose=choose)
        return objective.loss(student, x_1, Draws(5, "equal", 3, 16)).loss

    blind = loss(None)
    assert torch.equal(loss(ShapingConfig(candidates=1, tau=0)), blind)
    assert torch.equal(loss(ShapingConfig(candidates=4, tau=1.5)), blind)
    assert not torch.equal(loss(ShapingConfig(candidates=4, tau=0)), blind)


def choose(states: Tensor, time: float, **options: object) -> Tensor:
    chooser = ShapingChooser(ShapingConfig(candidates=states.shape[0], tau=0.0, **options), energy)  # type: ignore[arg-type]
    rows = states.shape[1]
    origin, when = torch.zeros_like(states[0]), torch.full((rows,), time)
    return chooser(states, origin, when, when, 0, Draws(0, "choose", 0, rows))


STATES = torch.tensor([[[5, 1, 1]], [[0, 4, 0]], [[3, 3, 3]]])  # energies (means) 7/3, 4/3, 3


def test_policies_pick_what_they_say() -> None:
    assert choose(STATES, 0.5, policy="seq").tolist() == [[0, 4, 0]]
    assert choose(STATES, 0.5, policy="token").tolist() == [[0, 1, 0]]
    assert choose(STATES, 0.5, policy="seq", rule="argmax").tolist() == [[3, 3, 3]]
    assert choose(STATES, 0.5, policy="seq_to_token", switch_time=0.75).tolist() == [[0, 4, 0]]
    assert choose(STATES, 0.8, policy="seq_to_token", switch_time=0.75).tolist() == [[0, 1, 0]]


def test_guard_refuses_a_mixture_of_higher_energy() -> None:
    """The mixture [0, 1, 0] was proposed by nobody; an energy that punishes it makes the guard fall back."""

    def suspicious(states: Tensor, time: Tensor, origin: Tensor) -> Tensor:
        mixed = (states == torch.tensor([0, 1, 0])).all(dim=1, keepdim=True)
        return states.float() + 100.0 * mixed

    def run(guard: bool) -> list[list[int]]:
        chooser = ShapingChooser(ShapingConfig(candidates=3, tau=0.0, policy="token", token_guard=guard), suspicious)
        when = torch.tensor([0.5])
        return chooser(STATES, STATES[0], when, when, 0, Draws(0, "guard", 0, 1)).tolist()

    assert run(True) == [[0, 4, 0]]
    assert run(False) == [[0, 1, 0]]


def test_gate_looks_at_the_time_it_is_told_to() -> None:
    for gate_on, row_time, state_time, shaped in [
        ("midpoint_time", 0.0, 0.5, True),
        ("row_start_time", 0.0, 0.5, False),
        ("row_start_time", 0.5, 0.6, True),
    ]:
        chooser = ShapingChooser(ShapingConfig(candidates=3, tau=0.5, gate_on=gate_on, policy="seq"), energy)
        result = chooser(
            STATES, STATES[0], torch.tensor([row_time]), torch.tensor([state_time]), 0, Draws(0, "g", 0, 1)
        )
        assert result.tolist() == ([[0, 4, 0]] if shaped else STATES[0].tolist())


@pytest.mark.parametrize("policy", ["seq", "token", "seq_to_token"])
@pytest.mark.parametrize("rule", ["random", "shuffled"])
def test_uninformed_rules_pick_every_candidate_equally_often(rule: str, policy: str) -> None:
    """At time 0.9 seq_to_token is token-wise, and the guard would let through what has a low energy."""
    rows = 3000
    states = STATES.expand(3, rows, 3)
    picked = choose(states, 0.9, policy=policy, rule=rule)
    counts = [(picked == STATES[k]).all(dim=1).sum().item() for k in range(3)]
    assert sum(counts) == rows
    assert stats.chisquare(counts).pvalue > 1e-3


def test_softmax_rule_has_its_law() -> None:
    rows = 6000
    picked = choose(STATES.expand(3, rows, 3), 0.5, policy="seq", rule="softmax", selection_temperature=0.7)
    counts = [(picked == STATES[k]).all(dim=1).sum().item() for k in range(3)]
    law = torch.softmax(-STATES.double().mean(-1)[:, 0] / 0.7, 0)
    assert stats.chisquare(counts, (law * rows).numpy()).pvalue > 1e-3


def test_softmax_rule_draws_every_position_by_its_own_energy() -> None:
    rows = 6000
    options = {"policy": "token", "rule": "softmax", "selection_temperature": 2.0, "token_guard": False}
    picked = choose(STATES.expand(3, rows, 3), 0.5, **options)
    weights = torch.softmax(-STATES[:, 0].double() / 2, dim=0)
    for position in range(3):
        law: dict[int, float] = {}
        for token, p in zip(STATES[:, 0, position].tolist(), weights[:, position].tolist(), strict=True):
            law[token] = law.get(token, 0.0) + p
        counts = [(picked[:, position] == token).sum().item() for token in law]
        assert stats.chisquare(counts, [p * rows for p in law.values()]).pvalue > 1e-3
    pairs = torch.stack([picked[:, 0], picked[:, 1]]).double()
    assert abs(torch.corrcoef(pairs)[0, 1]) < 0.05


def test_softmax_rule_keeps_a_drawn_candidate_where_the_guard_refuses() -> None:
    picked = choose(STATES.expand(3, 500, 3), 0.5, policy="token", rule="softmax", selection_temperature=2.0)
    candidate = (picked[None] == STATES).all(dim=2).any(dim=0)
    assert (picked[~candidate].double().mean(dim=1) <= 4 / 3).all()
    assert candidate.any()
    assert not candidate.all()


@pytest.mark.parametrize(
    "options",
    [
        {"candidates": 0},
        {"tau": -0.1},
        {"policy": "both"},
        {"rule": "best"},
        {"gate_on": "now"},
        {"selection_temperature": 0},
    ],
)
def test_impossible_shaping_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=next(iter(options)).split("_")[0]):
        ShapingConfig(**options)  # type: ignore[arg-type]


def test_a_mixture_of_non_finite_energy_is_an_error() -> None:
    def sick(states: Tensor, time: Tensor, origin: Tensor) -> Tensor:
        mixed = (states == torch.tensor([0, 1, 0])).all(dim=1, keepdim=True)
        return torch.where(mixed, float("nan"), states.float())

    chooser = ShapingChooser(ShapingConfig(tau=0.0, candidates=3, policy="token"), sick)
    with pytest.raises(FloatingPointError, match=r"not finite at jump 2 in 1 of 1 windows"):
        chooser(STATES, STATES[0], torch.ones(1), torch.ones(1), 1, Draws(0, "n", 0, 1))


def test_non_finite_energy_is_an_error() -> None:
    chooser = ShapingChooser(ShapingConfig(tau=0.0, candidates=3), lambda s, t, o: torch.full(s.shape, float("nan")))
    with pytest.raises(FloatingPointError, match="energy"):
        chooser(STATES, STATES[0], torch.ones(1), torch.ones(1), 1, Draws(0, "n", 0, 1))


@pytest.mark.parametrize("outputs", [6, 7])
def test_compass_pairs_share_origin_and_time_and_hold_no_foreign_token(outputs: int) -> None:
    objective = CompassObjective(6, outputs, network(outputs))
    x_1 = torch.randint(0, 6, (64, 5))
    pair = objective.pair(x_1, Draws(0, "pair", 0, 64))
    assert ((pair.positive == pair.origin) | (pair.positive == x_1)).all()
    assert ((pair.time > 0) & (pair.time <= 1)).all()
    moved = pair.negative != pair.origin
    assert moved.any()
    assert (pair.negative[moved] < 6).all()
