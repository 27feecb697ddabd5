"""Events drawn by skipping ahead have the law of independent Bernoulli trials; visits hold them in order."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from tsdfm_bench.methods.core import Grid, MaskSource, State, bernoulli_events, every_step, plan, visits
from tsdfm_bench.methods.core.visits import Events, places_visit
from tsdfm_bench.rng import Streams

PROBABILITY = torch.tensor([0.0, 0.3, 0.05, 1.0, 0.6, 0.2, 1.0], dtype=torch.float64)


def test_events_are_independent_bernoulli_trials():
    rows, length = 3000, 4
    streams = Streams.of(3, "events", rows)
    events = bernoulli_events(streams, torch.ones(rows, length, dtype=torch.bool), PROBABILITY)
    hits = torch.zeros(rows, length, 7)
    hits[events.rows, events.positions, events.steps] += 1
    assert hits.max() == 1
    trials = rows * length
    for i, p in enumerate(PROBABILITY.tolist()):
        count = hits[..., i].sum().item()
        if p in (0.0, 1.0):
            assert count == p * trials
        else:
            assert stats.binomtest(int(count), trials, p).pvalue > 1e-4
    # joint law of all uncertain steps of one position: the product
    uncertain = [1, 2, 4, 5]
    code = (hits[..., uncertain] * torch.tensor([1, 2, 4, 8])).sum(-1).long().flatten()
    p = PROBABILITY[uncertain].numpy()
    law = [np.prod([p[j] if c >> j & 1 else 1 - p[j] for j in range(4)]) for c in range(16)]
    counts = torch.bincount(code, minlength=16).numpy()
    assert stats.chisquare(counts, np.array(law) * trials).pvalue > 1e-4
    # positions of a row are independent
    assert abs(np.corrcoef(hits[:, 0, 1].numpy(), hits[:, 1, 1].numpy())[0, 1]) < 0.06


def test_once_keeps_the_first_event_and_survival_is_exact():
    p = torch.tensor([0.2, 0.5, 0.1], dtype=torch.float64)
    streams = Streams.of(4, "once", 4000)
    events = bernoulli_events(streams, torch.ones(4000, 3, dtype=torch.bool), p, once=True)
    counts = torch.bincount(events.steps, minlength=3).tolist()
    trials = 12000
    law = [0.2, 0.8 * 0.5, 0.8 * 0.5 * 0.1]
    observed = [*counts, trials - sum(counts)]
    assert stats.chisquare(observed, [trials * x for x in [*law, 1 - sum(law)]]).pvalue > 1e-4


def test_pinned_positions_have_no_events():
    free = torch.tensor([[True, False, True], [False, False, False]])
    events = bernoulli_events(Streams.of(0, "p", 2), free, PROBABILITY)
    assert set(zip(events.rows.tolist(), events.positions.tolist(), strict=True)) == {(0, 0), (0, 2)}
    nothing = bernoulli_events(Streams.of(0, "p", 2), torch.zeros(2, 3, dtype=torch.bool), PROBABILITY)
    assert nothing.rows.numel() == 0
    grid = Grid.uniform(7)
    assert list(plan(nothing, grid.start, grid.end, Streams.of(0, "p", 2))) == []


def test_events_do_not_depend_on_the_batch():
    free = torch.ones(6, 5, dtype=torch.bool)
    whole = bernoulli_events(Streams.of(9, "b", 6), free, PROBABILITY)
    alone = bernoulli_events(Streams.of(9, "b", 1, first=4), free[:1], PROBABILITY)
    mine = whole.rows == 4
    assert sorted(zip(whole.positions[mine].tolist(), whole.steps[mine].tolist(), strict=True)) == sorted(
        zip(alone.positions.tolist(), alone.steps.tolist(), strict=True)
    )


def test_uniforms_of_all_steps_drawn_at_once_give_the_same_events(monkeypatch):
    free = torch.rand(3, 7, generator=torch.Generator().manual_seed(1)) < 0.8
    found = []
    for few in (0, 1 << 12):
        monkeypatch.setattr(visits, "_FEW_UNIFORMS", few)
        events = bernoulli_events(Streams.of(4, "few", 3), free, PROBABILITY)
        found.append((events.rows, events.positions, events.steps))
        none = bernoulli_events(Streams.of(4, "few", 3), free, PROBABILITY[:0])
        assert none.rows.numel() == 0
    assert len(found[0][0]) > 7
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("extra", [False, True])
def test_plan_holds_every_event_once_in_order(extra):
    streams = Streams.of(2, "plan", 5)
    grid = Grid.uniform(40)
    probability = torch.full((40,), 0.04, dtype=torch.float64)
    events = bernoulli_events(streams, torch.ones(5, 6, dtype=torch.bool), probability)
    also = (torch.tensor([0, 0, 3]), torch.tensor([0, 39, 17])) if extra else None
    visits = list(plan(events, grid.start, grid.end, streams, ("token",), also))
    seen = []
    before = torch.full((5,), -1)
    for k, visit in enumerate(visits):
        assert (visit.rows.diff() > 0).all()
        assert (visit.index > before[visit.rows]).all()  # each row walks forward
        before[visit.rows] = visit.index
        assert torch.equal(visit.t, grid.start[visit.index])
        assert torch.equal(visit.t_next, grid.end[visit.index])
        steps = visit.index[visit.at_rows]
        assert torch.equal(visit.last, steps == 39)
        assert visit.any_last == bool(visit.last.any())
        drawn = visit.uniforms["token"]
        assert torch.equal(drawn, streams.uniform_at("token", steps, visit.state_rows, visit.at_positions))
        seen += list(zip(visit.state_rows.tolist(), visit.at_positions.tolist(), steps.tolist(), strict=True))
        if not extra:
            assert set(visit.at_rows.tolist()) == set(range(visit.rows.numel())), k
    expected = list(zip(events.rows.tolist(), events.positions.tolist(), events.steps.tolist(), strict=True))
    assert sorted(seen) == sorted(expected)
    busy = {(row, step) for row, _, step in expected} | (set() if not extra else {(0, 0), (0, 39), (3, 17)})
    assert sum(v.rows.numel() for v in visits) == len(busy)
    assert len(visits) == max(sum(row == r for r, _ in busy) for row in range(5))


def test_keep_drops_places_and_empty_rows():
    events = Events(torch.tensor([0, 0, 1, 2]), torch.tensor([1, 2, 0, 3]), torch.tensor([0, 0, 0, 0]))
    grid = Grid.uniform(2)
    streams = Streams.of(0, "k", 3)
    (visit,) = plan(events, grid.start, grid.end, streams, ("a",))
    kept = visit.keep(torch.tensor([True, False, False, True]))
    assert kept.rows.tolist() == [0, 2]
    assert kept.state_rows.tolist() == [0, 2]
    assert kept.at_positions.tolist() == [1, 3]
    assert torch.equal(kept.uniform("a", streams), visit.uniforms["a"][[0, 3]])
    assert torch.equal(kept.uniform("b", streams), streams.uniform_at("b", 0, kept.state_rows, kept.at_positions))


def test_every_step_skips_finished_rows():
    state = State.start(MaskSource(4), Streams.of(0, "e", 3), 2)
    walked = []
    for visit in every_step(state, Grid.uniform(3), active=True):
        walked.append(visit.rows.tolist())
        assert visit.at_rows.numel() == 2 * visit.rows.numel()
        state.done[len(walked) - 1] = True
    assert walked == [[0, 1, 2], [1, 2], [2]]
    assert list(every_step(state, Grid.uniform(3), active=True)) == []


def test_places_visit():
    places = torch.tensor([[False, False], [True, True], [False, True]])
    visit = places_visit(places, 7, 0.25, 0.5)
    assert visit is not None
    assert visit.rows.tolist() == [1, 2]
    assert visit.state_rows.tolist() == [1, 1, 2]
    assert visit.index.tolist() == [7, 7]
    assert places_visit(torch.zeros(2, 2, dtype=torch.bool), 0, 0.0, 1.0) is None
