"""Which row of a column is the best, if that can be said.

The best of a column is marked only when it can be told apart from every other row: its difference from each of them is
tested (paired where sequences belong together, see `resampling.separation`), the p-values of the column are adjusted by
Holm's method, and all must be below 0.05. Rows that flags say are not to be believed do not compete: a collapsed or
repeating text has a low perplexity, and what a canary beats is not the best of anything.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from tsdfm_bench.results.replicates import Replicates, own_spread, stream
from tsdfm_bench.results.resampling import separation
from tsdfm_bench.results.rows import CellRows, Row, finite
from tsdfm_bench.results.stats import holm

LEVEL = 0.05
BARRED = ("entropy-low", "rep-high", "canary", "legacy-fp32")


def best_cell(cells: Sequence[CellRows], metric: str, scorer: str, replicates: Replicates) -> str | None:
    """The id of the cell that is best and separable from all others, or None.

    Args:
        cells: the competitors.
        metric, scorer: the column; its rows must say which direction is better and have intervals over sequences.
        replicates: of the summary, for per-sequence columns.
    """
    rows = [(cell, row) for cell in cells if (row := cell.of(metric, scorer)) is not None]
    directions = {row["better"] for _, row in rows}
    if len(rows) < 2 or len(directions) != 1 or not directions <= {"lower", "higher"}:
        return None
    sign = 1.0 if directions == {"lower"} else -1.0
    (winner, first), *others = sorted(rows, key=lambda pair: sign * pair[1]["value"])
    pvalues = []
    for _, row in others:  # nearest first: one that is not separable by itself is not after Holm's correction either
        pvalues.append(pvalue(first, row, replicates))
        if not pvalues[-1] < LEVEL:
            return None
    return winner.id if all(p < LEVEL for p in holm(pvalues)) else None


def pvalue(a: Row, b: Row, replicates: Replicates) -> float:
    """Two-sided p-value of "same value" of two rows: from columns, else from intervals; NaN if neither is there."""
    from scipy import stats

    one, two = (replicates.terms(row["cell"], row["metric"], row["scorer"]) for row in (a, b))
    if one is not None and two is not None and min(one.n, two.n) > 1:
        paired = stream(a) == stream(b) and a["cell"] != b["cell"] and one.n == two.n
        clusters = replicates.clusters(a["cell"]) if paired else None
        if not paired:
            one, two = (
                t if (c := replicates.clusters(row["cell"])) is None else t.summed(c[: t.n])
                for t, row in ((one, a), (two, b))
            )
        return separation(one, two, paired=paired, clusters=None if clusters is None else clusters[: one.n])
    ends = [a["low"], a["high"], b["low"], b["high"]]
    if own_spread(a) or not all(finite(end) for end in ends):
        return math.nan  # MAUVE's ends are those of its k-means seeds, not of an interval
    if min(ends[0], ends[2]) > 0:
        gap = math.log(a["value"] / b["value"])
        widths = [math.log(ends[1] / ends[0]), math.log(ends[3] / ends[2])]
    else:
        gap = a["value"] - b["value"]
        widths = [ends[1] - ends[0], ends[3] - ends[2]]
    error = math.hypot(*widths) / (2 * 1.959963984540054)
    return float(2 * stats.norm.sf(abs(gap) / error)) if error > 0 else math.nan


def competitors(cells: Iterable[CellRows], flags: Iterable[tuple[str, str, str]], scorer: str) -> list[CellRows]:
    """Cells without a flag that bars them, for one scorer.

    Args:
        cells: of the table.
        flags: (cell, code, scorer) raised.
        scorer: of the column; a flag of another scorer does not bar.
    """
    barred = {cell for cell, code, of in flags if code in BARRED and of in ("", scorer)}
    return [cell for cell in cells if cell.id not in barred]
