"""The loop keeps pinned tokens, records states, and a finaliser leaves no mask."""

from __future__ import annotations

import pytest
import torch

from tsdfm_bench.errors import PluginError, UsageError
from tsdfm_bench.methods import core
from tsdfm_bench.methods.core import (
    Finaliser,
    Grid,
    Kernel,
    MaskSource,
    Polynomial,
    Posterior,
    State,
    Visit,
    plan,
    run,
)
from tsdfm_bench.methods.core.visits import Events
from tsdfm_bench.rng import Streams


class Overwrite(Kernel):
    """Writes the step number everywhere, pinned or not."""

    def step(self, state: State, visit: Visit) -> None:
        state.tokens[visit.rows] = visit.index[:, None]


class Sparse(Kernel):
    """Row 0 changes position 1 in step 2; row 1 changes position 0 in steps 0 and 3."""

    def visits(self, state: State, grid: Grid):
        events = Events(torch.tensor([0, 1, 1]), torch.tensor([1, 0, 0]), torch.tensor([2, 0, 3]))
        return plan(events, grid.start, grid.end, state.streams)

    def step(self, state: State, visit: Visit) -> None:
        state.write(visit.state_rows, visit.at_positions, 10 + visit.index[visit.at_rows])


def start(batch: int = 2, length: int = 3, **pins: torch.Tensor) -> State:
    return State.start(MaskSource(9), Streams.of(0, "loop", batch), length, **pins)


def test_pinned_tokens_survive_any_kernel():
    pinned = torch.tensor([[True, False, True], [False, False, False]])
    state = start(prefix=torch.tensor([[5, 0, 6], [7, 7, 7]]), pinned=pinned)
    assert state.tokens.tolist() == [[5, 9, 6], [9, 9, 9]]
    trace = run(Overwrite(), state, Grid.uniform(4), trace=True)
    assert state.tokens.tolist() == [[5, 3, 6], [3, 3, 3]]
    assert trace is not None
    assert trace[:, 1].tolist() == [[5, 1, 6], [1, 1, 1]]


def test_trace_repeats_states_of_steps_without_a_visit():
    state = start()
    trace = run(Sparse(), state, Grid.uniform(4), trace=True)
    assert trace is not None
    assert trace[0].tolist() == [[9, 9, 9], [9, 9, 9], [9, 12, 9], [9, 12, 9]]
    assert trace[1].tolist() == [[10, 9, 9], [10, 9, 9], [10, 9, 9], [13, 9, 9]]
    assert run(Sparse(), start(), Grid.uniform(4)) is None


def test_finalisers(lab):
    denoiser = lab.TableDenoiser(4, 5)
    for rule in ("argmax", "sample"):
        streams = Streams.of(0, "final", 500)
        state = State(torch.tensor([[4, 1, 4]]).repeat(500, 1), streams)
        posterior = Posterior(denoiser, Polynomial(), mask_id=4)
        trace = run(Sparse(), start(), Grid.uniform(4), trace=True)
        Finaliser(rule).finish(state, Grid.masked(4), posterior)
        assert (state.tokens < 4).all()
        assert (state.tokens[:, 1] == 1).all()
        p = torch.from_numpy(denoiser.probabilities((4, 1, 4), 1 - 1e-5))[:, :4]
        p = p / p.sum(dim=1, keepdim=True)
        if rule == "argmax":
            assert (state.tokens[:, 0] == p[0].argmax()).all()
        else:
            for position in (0, 2):
                law = {(y,): p[position, y].item() for y in range(4)}
                lab.agrees(state.tokens[:, position : position + 1], law)
        assert trace is not None
    state = State(torch.tensor([[4, 1]]), Streams.of(0, "final", 1))
    with pytest.raises(PluginError, match="1 positions were still masked"):
        Finaliser("none").finish(state, Grid.masked(4), Posterior(denoiser, Polynomial(), mask_id=4))
    with pytest.raises(UsageError, match="unknown finaliser"):
        Finaliser("greedy")  # type: ignore[arg-type]
    pinned = torch.ones(1, 2, dtype=torch.bool)
    untouched = State(torch.tensor([[4, 1]]), Streams.of(0, "final", 1), pinned, torch.tensor([[4, 1]]))
    assert Finaliser("none").finish(untouched, Grid.masked(4), Posterior(denoiser, Polynomial(), mask_id=4)) is None


def test_finaliser_is_a_recorded_step(lab):
    posterior = Posterior(lab.TableDenoiser(9, 10), Polynomial(), mask_id=9)
    state = start()
    trace = run(Sparse(), state, Grid.uniform(4), Finaliser("argmax"), posterior, trace=True)
    assert trace is not None
    assert trace.shape == (2, 5, 3)
    assert torch.equal(trace[:, -1], state.tokens)


def test_posterior_excludes_the_mask_where_asked(lab):
    posterior = Posterior(lab.TableDenoiser(3, 4), Polynomial(), mask_id=3)
    logits = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    kept = logits.clone()
    p = torch.softmax(logits.double(), dim=1)
    assert torch.allclose(posterior.probabilities(logits), p)
    without = p[:, :3] / p[:, :3].sum(dim=1, keepdim=True)
    assert torch.allclose(posterior.probabilities(logits, True)[:, :3], without)
    assert (posterior.probabilities(logits, True)[:, 3] == 0).all()
    some = posterior.probabilities(logits, torch.tensor([True, False, True]))
    assert some[:, 3].tolist() == [0, p[1, 3].item(), 0]
    assert torch.equal(logits, kept)


def test_public_names_resolve():
    for name in core.__all__:
        assert getattr(core, name) is not None
    assert set(core.__all__) == set(core._HOME)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        core.Nothing  # noqa: B018
