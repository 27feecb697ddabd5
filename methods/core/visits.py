"""Visits: which rows of the batch take which step, and which of their positions may change.

Sequences are independent, so they need not walk in step. Where a step's law lets the positions that change be
chosen without the network (masked diffusion, flow matching's Euler and exact laws, and the candidates of the
cumulative law by thinning), all changes of a whole run are drawn first, and the k-th visit of the batch holds the
k-th step in which each sequence has anything to do: other steps cost nothing. Every sequence still sees exactly
the law of the grid.

Events are drawn by skipping ahead. If position l changes in step i with probability r_i, independently, the next
change after step i - 1 happens at the first j >= i with

    sum_{m=i}^{j} log(1 - r_m) <= log u,      u uniform,

one uniform per change, addressed by (sequence, i, position) and therefore independent of the batch.

All of this happens before the first call and on the host, in NumPy: with the few numbers of one sequence its operations
cost a fraction of torch's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from tsdfm_bench.api import plain
from tsdfm_bench.methods.core.grid import Grid
from tsdfm_bench.methods.core.state import State
from tsdfm_bench.rng import Streams

_UNIFORMS = 1 << 17  # drawn at once
_FEW_UNIFORMS = 1 << 12  # so many cost about as much as one
_CERTAIN = 64.0  # the hazard of r = 1: -log u of a uniform of 52 bits never reaches it


@dataclass(frozen=True)
class Visit:
    """One network call's worth of work: each of `rows` takes its own step.

    Args:
        rows: (k,) int64 rows of the state, ascending.
        index: (k,) int64 step number of each row in the grid.
        t, t_next: (k,) fp64 times of that step.
        at_rows, at_positions: (n,) int64 places that may change; `at_rows` counts within `rows`.
        last: (n,) bool, the step is the grid's last.
        any_last: whether `last` has any True entry, known without looking at the device.
        uniforms: random numbers drawn ahead, site -> (n,).
        of_steps: numbers that belong to the step, name -> (n,).
    """

    rows: Tensor
    index: Tensor
    t: Tensor
    t_next: Tensor
    at_rows: Tensor
    at_positions: Tensor
    last: Tensor
    any_last: bool
    uniforms: dict[str, Tensor] = field(default_factory=dict)
    of_steps: dict[str, Tensor] = field(default_factory=dict)

    @property
    def state_rows(self) -> Tensor:
        """(n,) rows of the state the places belong to."""
        return self.rows[self.at_rows]

    def uniform(self, site: str, streams: Streams) -> Tensor:
        """(n,) uniforms, one per place; the same numbers whether they were drawn ahead or not."""
        if site in self.uniforms:
            return self.uniforms[site]
        return streams.uniform_at(site, self.index[self.at_rows], self.state_rows, self.at_positions)

    def keep(self, kept: Tensor) -> Visit:
        """The visit without the places where `kept` (n,) is False, and without rows that have no place left."""
        at_rows = self.at_rows[kept]
        used, local = at_rows.unique(return_inverse=True)
        return Visit(
            self.rows[used],
            self.index[used],
            self.t[used],
            self.t_next[used],
            local,
            self.at_positions[kept],
            self.last[kept],
            self.any_last,
            {site: u[kept] for site, u in self.uniforms.items()},
            {name: x[kept] for name, x in self.of_steps.items()},
        )


def uniforms_of_steps(site: str, state: State, steps: int) -> Iterator[Tensor]:
    """The uniforms of every step, (batch, length) each, equal to `Streams.uniform`; many steps are drawn at once."""
    together = 1 if plain() else max(1, _UNIFORMS // state.tokens.numel())
    for first in range(0, steps, together):
        yield from state.streams.uniform_steps(site, first, min(together, steps - first), state.length)


def every_step(state: State, grid: Grid, active: bool = False, sites: Sequence[str] = ()) -> Iterator[Visit]:
    """The plain walk: all rows that have free positions, all of these, one visit per grid step.

    Args:
        state: read before every step, so rows finished meanwhile can be left out.
        grid: the steps.
        active: leave out rows marked `done` (costs one host synchronisation per step on an accelerator).
        sites: decisions that take one uniform at every place, drawn ahead.
    """
    device = state.tokens.device
    start, end = grid.start.to(device), grid.end.to(device)
    open_rows = state.free.any(dim=1)
    rows = open_rows.nonzero().squeeze(1)
    at_rows, at_positions = state.free[rows].nonzero(as_tuple=True)
    ahead = [uniforms_of_steps(site, state, len(grid)) for site in sites]
    for i in range(len(grid)):
        drawn = [next(uniforms) for uniforms in ahead]
        if active:
            remaining = (open_rows & ~state.done).nonzero().squeeze(1)
            if remaining.numel() != rows.numel():
                rows = remaining
                at_rows, at_positions = state.free[rows].nonzero(as_tuple=True)
        if rows.numel() == 0:
            return
        index = torch.full_like(rows, i)
        last = torch.full_like(at_rows, i == len(grid) - 1, dtype=torch.bool)
        places = rows[at_rows], at_positions
        uniforms = {site: u[places] for site, u in zip(sites, drawn, strict=True)}
        yield Visit(rows, index, start[index], end[index], at_rows, at_positions, last, i == len(grid) - 1, uniforms)


def places_visit(places: Tensor, index: int, t: float, t_next: float, **drawn: Tensor) -> Visit | None:
    """A visit of the places where `places` (batch, length) is True, all in one step; None if there are none.

    `drawn` are random numbers drawn ahead, site -> (batch, length).
    """
    rows, positions = places.nonzero(as_tuple=True)
    if rows.numel() == 0:
        return None
    used, local = (rows[:1].clone(), rows) if len(places) == 1 else rows.unique_consecutive(return_inverse=True)
    start, end = (torch.full(used.shape, x, dtype=torch.float64, device=used.device) for x in (t, t_next))
    last = torch.zeros_like(local, dtype=torch.bool)
    uniforms = {site: u[rows, positions] for site, u in drawn.items()}
    return Visit(used, torch.full_like(used, index), start, end, local, positions, last, False, uniforms)


@dataclass(frozen=True)
class Events:
    """Places that may change and the steps in which they do, all (n,) int64 on the CPU."""

    rows: Tensor
    positions: Tensor
    steps: Tensor


def bernoulli_events(
    streams: Streams, free: Tensor, probability: Tensor, once: bool = False, site: str = "event"
) -> Events:
    """Independent Bernoulli events of every free position over all steps of a grid.

    Args:
        streams: (batch,).
        free: (batch, length) bool.
        probability: (steps,) fp64 r_i in [0, 1].
        once: only the first event of each position (a masked position is revealed once).
        site: name of the decision.
    """
    streams = streams.to("cpu")
    steps = probability.numel()
    hazard = (-torch.log1p(-probability.detach().double().cpu())).clamp_max(_CERTAIN).numpy()
    spent = np.concatenate([[0.0], hazard.cumsum()])
    rows, positions = free.cpu().numpy().nonzero()
    start = np.zeros_like(rows)
    ahead = None
    if not once and 0 < steps * free.numel() <= _FEW_UNIFORMS and not plain():
        ahead = streams.uniform_steps(site, 0, steps, free.shape[1]).numpy()
    found = [(rows[:0], positions[:0], start[:0])]
    while rows.size:
        if ahead is None:
            u = streams.uniform_at(site, *(torch.from_numpy(x) for x in (start, rows, positions))).numpy()
        else:
            u = ahead[start, rows, positions]
        step = np.searchsorted(spent, spent[start] - np.log(u)) - 1
        step = np.maximum(step, start)  # rounding of the sum must not step backwards
        happens = step < steps
        rows, positions, step = rows[happens], positions[happens], step[happens]
        found.append((rows, positions, step))
        if once:
            break
        more = step + 1 < steps
        rows, positions, start = rows[more], positions[more], step[more] + 1
    return Events(*(torch.from_numpy(np.concatenate(parts)) for parts in zip(*found, strict=True)))


def plan(
    events: Events,
    start: Tensor,
    end: Tensor,
    streams: Streams,
    sites: Sequence[str] = (),
    also: tuple[Tensor, Tensor] | None = None,
    tables: Mapping[str, Tensor] | None = None,
) -> Iterator[Visit]:
    """Group events into visits: the k-th visit holds the k-th busy step of every row.

    Args:
        events: what happens when.
        start, end: times of the steps, (steps,) or per row (batch, steps), fp64.
        streams: (batch,), on the device the sampling runs on.
        sites: decisions for which one uniform per event is drawn ahead.
        also: further (rows, steps) that must be visited although nothing changes in them.
        tables: numbers of the steps, name -> (steps,), handed to the visits as `of_steps`.

    Yields:
        visits whose index tensors are views of arrays made once: nothing in the loop waits for an accelerator.
    """
    device, streams = streams.device, streams.to("cpu")
    steps, batch = start.shape[-1], len(streams)
    rows, positions, happening = (x.numpy() for x in (events.rows, events.positions, events.steps))
    if plain() and also is None:  # a call in every step of every row that has any event
        busy = events.rows.unique()
        also = busy.repeat_interleave(steps), torch.arange(steps).repeat(busy.numel())
    key = rows * steps + happening
    wanted = key if also is None else np.concatenate([key, (also[0].cpu() * steps + also[1].cpu()).numpy()])
    pairs = np.unique(wanted)  # sorted: by row, then by step
    if pairs.size == 0:
        return
    pair_row, pair_step = pairs // steps, pairs % steps
    place = np.arange(pairs.size)
    rank = place - np.searchsorted(pair_row, np.arange(batch))[pair_row]
    order = rank.argsort(kind="stable")
    counts = np.bincount(rank)
    offset = counts.cumsum() - counts
    local = np.empty_like(place)
    local[order] = place - offset[rank[order]]

    pair_of_event = np.searchsorted(pairs, key)
    event_rank = rank[pair_of_event]
    event_order = event_rank.argsort(kind="stable")
    event_counts = np.bincount(event_rank, minlength=counts.size)

    row, step = pair_row[order], pair_step[order]
    times = [x[step] if x.ndim == 1 else x[row, step] for x in (t.detach().cpu().numpy() for t in (start, end))]
    rows, positions, happening = (x[event_order] for x in (rows, positions, happening))
    last = happening == steps - 1
    any_last = np.zeros(counts.size, dtype=bool)
    any_last[event_rank[event_order][last]] = True
    addresses = [torch.from_numpy(x) for x in (happening, rows, positions)]
    drawn = [streams.uniform_at(site, *addresses) for site in sites]
    drawn += [table.detach().cpu()[addresses[0]] for table in (tables or {}).values()]

    def pieces(x: np.ndarray | Tensor, sizes: np.ndarray) -> tuple[Tensor, ...]:
        return torch.as_tensor(x).to(device).split(sizes.tolist())

    by_pair = [pieces(x, counts) for x in (row, step, *times)]
    by_event = [pieces(x, event_counts) for x in (local[pair_of_event[event_order]], positions, last, *drawn)]
    for k, has_last in enumerate(any_last.tolist()):
        uniforms = {site: by_event[3 + j][k] for j, site in enumerate(sites)}
        of_steps = {name: by_event[3 + len(sites) + j][k] for j, name in enumerate(tables or ())}
        yield Visit(
            by_pair[0][k],
            by_pair[1][k],
            by_pair[2][k],
            by_pair[3][k],
            by_event[0][k],
            by_event[1][k],
            by_event[2][k],
            has_last,
            uniforms,
            of_steps,
        )
