"""Texts side by side, and the steps of a sequence, cut so that the page stays small.

Sequence i of every row is shown beside sequence i of the others. Rows share prompts where the run pins held-out text;
otherwise equal numbers are independent draws, and the page says so. Each text is compared, word by word, with that of
its teacher: the row of dfm with the most steps and the same source, unless another label is asked for.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tsdfm_bench.results.report.text import differences, visible
from tsdfm_bench.results.rows import finite

if TYPE_CHECKING:
    from tsdfm_bench.results.report.model import Material, Trace
    from tsdfm_bench.results.report.rows import RowView

TEXT_BUDGET = 1_200_000  # characters of all texts together
LONGEST, SHORTEST = 6000, 300  # characters of one text
FEWEST = 2  # sequences that are shown before texts are cut
CHANGES_BUDGET = 250_000  # changed tokens of all traces together
MOST_STATES, STATIC_STATES, STATIC_TOKENS = 200, 8, 400
MASKED = "░"


@dataclass(frozen=True)
class Card:
    """The text of one row at one sequence number.

    Args:
        row: id of its row.
        name: of the row.
        role: "teacher", "real", "" ...
        pieces: (differs from the teacher, text).
        teacher: name of the teacher, or "".
        shared: share of its words that the teacher's text has in the same order; None without a teacher.
    """

    row: str
    name: str
    role: str
    pieces: list[tuple[bool, str]]
    teacher: str = ""
    shared: float | None = None


@dataclass(frozen=True)
class SampleView:
    """Texts by sequence number.

    Args:
        sequences: (number, cards) in order.
        rows: (id, name) of the rows that have texts.
        paired: whether equal numbers share a prompt.
        cut: characters a text was cut to, or None.
        stored: sequences of the row with most.
        left: id of the row that is shown first beside the others.
        right: the row beside it.
    """

    sequences: list[tuple[int, list[Card]]]
    rows: list[tuple[str, str]]
    paired: bool
    cut: int | None
    stored: int
    left: str
    right: str


def sample_view(material: Material, views: Mapping[str, RowView]) -> SampleView | None:
    """The texts of a run as the page shows them, or None if there are none."""
    texts = {cell: found for cell, found in material.texts.items() if cell in views and found.texts}
    if not texts:
        return None
    taught = teachers([views[cell] for cell in texts], material.teacher)
    longest = max(len(text) for found in texts.values() for text in found.texts)
    asked = max(len(found.texts) for found in texts.values())
    each = min(longest, LONGEST)
    number = min(asked, max(FEWEST, TEXT_BUDGET // max(1, len(texts) * each)))
    limit = min(each, max(SHORTEST, TEXT_BUDGET // (len(texts) * number)))
    shown = {cell: [_bounded(text, limit) for text in found.texts[:number]] for cell, found in texts.items()}
    order = sorted(texts, key=lambda cell: (cell not in taught.values(), not views[cell].cell.is_real))
    sequences = []
    for i in range(number):
        cards = [
            _card(views, cell, shown[cell][i], taught.get(cell), shown, i) for cell in order if i < len(shown[cell])
        ]
        sequences.append((i, cards))
    generators = [views[cell] for cell in texts if views[cell].section == "method"]
    left = views[order[0]].id
    right = next((view.id for view in generators if view.id != left), left)
    return SampleView(
        sequences=sequences,
        rows=[(views[cell].id, views[cell].name) for cell in order],
        paired=any(views[cell].first["prefix"] for cell in texts),
        cut=limit if longest > limit else None,
        stored=max(found.stored for found in texts.values()),
        left=left,
        right=right,
    )


def _bounded(text: str, limit: int) -> str:
    """A text as shown, cut before it is looked at: one line may be a megabyte."""
    head = visible(text[:limit])
    if len(text) <= limit and len(head) <= limit:
        return head
    return f"{head[:limit]} … (cut here; {len(text):,} characters in all)"


def teachers(views: Sequence[RowView], label: str | None) -> dict[str, str]:
    """Cell id -> id of the cell its texts are compared with, for generators of one text setting."""

    def setting(view: RowView) -> tuple[Any, ...]:
        return tuple(view.first[name] for name in ("task", "tokenizer", "data_hash", "length", "prefix"))

    wanted = label or "dfm"
    candidates = [view for view in views if view.section == "method" and view.first["label"] == wanted]
    candidates += [view for view in views if label is not None and view.name == label and view not in candidates]
    found = {}
    for view in views:
        fitting = [other for other in candidates if setting(other) == setting(view)]
        if view.section != "method" or not fitting:
            continue
        best = max(fitting, key=lambda other: (other.first["source"] == view.first["source"], _steps(other)))
        if best is not view:
            found[view.cell.id] = best.cell.id
    return found


def _steps(view: RowView) -> tuple[float, bool]:
    first = view.first
    return (float(first["steps"]) if finite(first["steps"]) else 0.0, first["temperature"] in (None, 1.0))


def _card(
    views: Mapping[str, RowView],
    cell: str,
    text: str,
    teacher: str | None,
    shown: Mapping[str, Sequence[str]],
    i: int,
) -> Card:
    view = views[cell]
    role = "real text" if view.cell.is_real else "canary" if view.section == "reference" else ""
    if teacher is None or i >= len(shown[teacher]):
        return Card(view.id, view.name, role, [(False, text)])
    pieces = differences(text, shown[teacher][i])
    words = len(text.split())
    other = sum(len(piece.split()) for differs, piece in pieces if differs)
    share = 1.0 - other / words if words else None
    return Card(view.id, view.name, role, pieces, views[teacher].name, share)


# ----------------------------------------------------------------------------------------------------- trajectories


@dataclass(frozen=True)
class TraceView:
    """One sequence through its steps.

    Args:
        row: id of its row.
        name: of the row.
        sequence: its number.
        states: (step, share of positions changed, [(changed, text)]) of a few states, to be read without a script.
        data: JSON of all states for the script: pieces, first state, changes per state.
        count: states in `data`.
        note: what was left out.
    """

    row: str
    name: str
    sequence: int
    states: list[tuple[int, float, list[tuple[bool, str]]]]
    data: str
    count: int
    note: str = ""


def trace_views(material: Material, views: Mapping[str, RowView]) -> list[TraceView]:
    """The recorded sequences whose row is on the page."""
    traces = [trace for trace in material.traces if trace.cell in views and len(trace.states)]
    budget = CHANGES_BUDGET // max(1, len(traces))
    return [_trace(trace, views[trace.cell], budget) for trace in traces]


def _trace(trace: Trace, view: RowView, budget: int) -> TraceView:
    states, steps = np.asarray(trace.states), list(trace.steps)
    kept = _even(len(states), MOST_STATES)
    while len(kept) > 2 and _changes(states[kept]) > budget:
        kept = _even(len(states), len(kept) // 2)
    states, steps = states[kept], [steps[k] for k in kept]
    pieces = {int(i): visible(trace.pieces.get(int(i), MASKED)) for i in np.unique(states)}
    index = {token: k for k, token in enumerate(pieces)}
    changes = []
    for before, after in itertools.pairwise(states):
        places = np.flatnonzero(before != after)
        changes.append([[int(p), index[int(after[p])]] for p in places])
    data = {
        "pieces": list(pieces.values()),
        "first": [index[int(token)] for token in states[0]],
        "steps": [int(step) for step in steps],
        "changes": changes,
    }
    note = f"{len(kept)} of {len(trace.states)} recorded states" if len(kept) < len(trace.states) else ""
    few = _even(len(states), STATIC_STATES)
    shown = []
    for place, k in enumerate(few):
        before = states[few[place - 1]] if place else states[k]
        changed = states[k] != before
        segments = _segments([pieces[int(token)] for token in states[k]][:STATIC_TOKENS], changed[:STATIC_TOKENS])
        shown.append((int(steps[k]), float(changed.mean()), segments))
    packed = json.dumps(data, ensure_ascii=True, separators=(",", ":"))
    return TraceView(view.id, view.name, trace.sequence, shown, packed, len(kept), note)


def _even(count: int, most: int) -> list[int]:
    """At most `most` of the numbers 0 .. count - 1, evenly, with both ends."""
    if count <= most:
        return list(range(count))
    return sorted({round(k * (count - 1) / (max(most, 2) - 1)) for k in range(max(most, 2))})


def _changes(states: np.ndarray) -> int:
    return int((states[1:] != states[:-1]).sum())


def _segments(pieces: Sequence[str], changed: np.ndarray) -> list[tuple[bool, str]]:
    found: list[tuple[bool, str]] = []
    for piece, new in zip(pieces, changed.tolist(), strict=True):
        if found and found[-1][0] == new:
            found[-1] = (new, found[-1][1] + piece)
        else:
            found.append((new, piece))
    return found
