"""The shortcut teacher and navigation shaping: laws, times, and the equality of K = 1 with FS-DFM."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tsdfm_bench.errors import UsageError
from tsdfm_bench.methods.nets.dit import DiT, DiTConfig
from tsdfm_bench.methods.train import shortcut
from tsdfm_bench.methods.train.compass import CompassObjective
from tsdfm_bench.methods.train.compass_report import finish
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


class Fixed(Draws):
    """Every uniform is the same number."""

    def __init__(self, value: float, batch: int) -> None:
        super().__init__(0, "fixed", 0, batch)
        self.value = value

    def uniform(self, site: str, size: int) -> Tensor:
        return torch.full((self.batch, size), 0.0 if site.endswith("leave") else self.value, dtype=torch.float64)

    def at(self, site: str, rows: Tensor, positions: Tensor) -> Tensor:
        return torch.full(rows.shape, self.value, dtype=torch.float64)


@pytest.mark.parametrize("value", [1 - 2.0**-26, 1 - 2.0**-53, 0.0])
def test_a_token_of_weight_zero_is_not_drawn_by_a_uniform_next_to_an_end(value: float) -> None:
    """In fp32 the first two are 1, and 1 times the total lies above every real token."""
    logits = torch.randn(1, 300, 6, generator=torch.Generator().manual_seed(0))
    logits[..., 0] = float("-inf")
    x = torch.full((1, 300), 5)
    result = jump(x, without_mask(logits, 5), torch.zeros(1), torch.ones(1), Fixed(value, 1), "j")
    assert ((result > 0) & (result < 5)).all()


def test_logits_that_are_not_finite_are_not_drawn_from() -> None:
    logits = torch.zeros(3, 4, 5)
    logits[1, 2, 3] = float("nan")
    with pytest.raises(FloatingPointError, match=r"'j' is drawn from are not finite in 1 of 3 windows \(numbers 1 of"):
        jump(torch.zeros(3, 4, dtype=torch.int64), logits, torch.zeros(3), torch.ones(3), Draws(0, "n", 0, 3), "j")


@pytest.mark.parametrize("outputs", [6, 7])
def test_finished_sequences_hold_real_tokens_even_where_no_jump_left_the_mask(outputs: int) -> None:
    class Stay(Draws):
        def uniform(self, site: str, size: int) -> Tensor:
            return torch.ones(self.batch, size, dtype=torch.float64)

    objective = CompassObjective(6, outputs, network(outputs))
    states = torch.full((2, 8, 5), outputs - 1)
    finished = finish(objective, states, torch.full((8,), 0.5, dtype=torch.float64), Stay(0, "stay", 0, 8))
    assert finished.shape == (2, 8, 5)
    if outputs == 6:
        assert torch.equal(finished, states)
    else:
        assert (finished < 6).all()
        assert finished.unique().numel() > 2


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


@pytest.mark.parametrize(
    ("switch", "token_wise"),
    [("time", (0, 0)), ("midpoint_index", (0, 1)), ("curriculum", (1, 1))],
)
def test_the_switch_looks_at_what_it_is_told_to(switch: str, token_wise: tuple[int, int]) -> None:
    """At time 0.5, after 8 of 10 steps, at the first and the second midpoint; t_sw 0.75."""
    config = ShapingConfig(candidates=3, tau=0.0, switch=switch)
    chooser, when = ShapingChooser(config, energy, steps=10), torch.tensor([0.5])
    for index, expected in enumerate(token_wise):
        picked = chooser(STATES, STATES[0], when, when, index, Draws(0, "switch", 8, 1)).tolist()
        assert picked == ([[0, 1, 0]] if expected else [[0, 4, 0]])
    early = chooser(STATES, STATES[0], when, when, 0, Draws(0, "switch", 7, 1)).tolist()
    assert early == [[0, 4, 0]]


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


def fixed_step(monkeypatch, h: float) -> None:
    def law(draws: Draws, name: str) -> tuple[Tensor, Tensor]:
        return torch.full((draws.batch,), 0.25).double(), torch.full((draws.batch,), h).double()

    monkeypatch.setattr(shortcut, "step_size_and_time", law)


@pytest.mark.parametrize(("h", "chain"), [(1 / 512, True), (1 / 1024, False)])
@pytest.mark.parametrize("target", ["kl_frozen_teacher", "path_loss"])
def test_only_steps_below_a_513th_learn_from_the_frozen_teacher_or_data(monkeypatch, h, chain, target) -> None:
    fixed_step(monkeypatch, h)
    teacher, frozen, calls = network(6, True, 1), network(6, False, 2), []
    teacher.register_forward_hook(lambda *_: calls.append("chain"))
    frozen.register_forward_hook(lambda *_: calls.append("frozen"))
    objective = ShortcutObjective(6, 6, teacher, frozen, small_h_target=target)
    objective.loss(network(6, True), torch.randint(0, 6, (4, 5)), Draws(0, "split", 0, 4))
    assert calls == (["chain"] * 4 if chain else ["frozen"] * (target == "kl_frozen_teacher"))


@pytest.mark.parametrize("candidates", [1, 4])
def test_candidates_cost_no_call_of_the_teacher_and_one_of_the_compass_per_midpoint(monkeypatch, candidates) -> None:
    """And one more for the guard."""
    fixed_step(monkeypatch, 0.5)
    teacher, calls = network(6, True, 1), []
    teacher.register_forward_hook(lambda *_: calls.append("teacher"))

    def judge(states: Tensor, time: Tensor, origin: Tensor) -> Tensor:
        calls.append("compass")
        return states.float()

    chooser = ShapingChooser(ShapingConfig(candidates=candidates, tau=0.0, policy="token"), judge)
    objective = ShortcutObjective(6, 6, teacher, teacher, choose=chooser)
    objective.loss(network(6, True), torch.randint(0, 6, (64, 5)), Draws(0, "calls", 0, 64))
    assert calls.count("teacher") == 4
    assert calls.count("compass") == (6 if candidates > 1 else 0)


def test_a_shaped_step_makes_no_logits_in_double_precision(monkeypatch) -> None:
    """Nothing of (batch x K, length, vocabulary), nor of one candidate."""
    fixed_step(monkeypatch, 0.5)
    wide: list[torch.Size] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            made = [one for one in tree_leaves(result) if isinstance(one, Tensor) and one.dtype == torch.float64]
            wide.extend(one.shape for one in made if one.numel() >= 16 * 5 * 6)
            return result

    chooser = ShapingChooser(ShapingConfig(candidates=2, tau=0.0), energy)
    objective = ShortcutObjective(6, 6, network(6, True, 1), network(6, False, 2), choose=chooser)
    with Watch():
        objective.loss(network(6, True), torch.randint(0, 6, (16, 5)), Draws(0, "wide", 0, 16))
    assert wide == []


def test_a_live_semi_teacher_answers_without_dropout(monkeypatch) -> None:
    fixed_step(monkeypatch, 0.5)
    student, modes = network(6, True).train(), []
    student.register_forward_hook(lambda module, *_: modes.append(module.training))
    objective = ShortcutObjective(6, 6, network(6, True, 1), network(6), semi_teacher="live")
    objective.loss(student, torch.randint(0, 6, (4, 5)), Draws(0, "live", 0, 4))
    assert modes == [True] + 4 * [False]
    assert student.training
