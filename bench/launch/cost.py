"""What a batch is expected to cost, in units of one network call: for progress and for packing, never for results."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tsdfm_bench.plan import Cell


def expected_calls(cell: Cell) -> int:
    """About how many network calls a batch takes.

    Samplers may skip steps in which nothing changes: from the mask source each position changes once, from others a few
    times (four are about right at 1,024 steps).
    """
    if cell.steps is None:
        return cell.length
    return min(cell.steps, cell.length if cell.source == "mask" else 4 * cell.length)


def batch_work(cell: Cell) -> float:
    """Expected cost of a batch in units of one network call on whole sequences."""
    if cell.kind == "reference":
        return 0.5
    calls = expected_calls(cell)
    return 1.0 + (calls if cell.steps is not None else calls / 8)  # without steps: one token a call
