"""The rows of one cell, and which metric plays which part.

Metrics are plug-ins and name themselves ("gen_ppl/pooled", "entropy_nats"); tables and flags ask for a role. The
preferred name comes first; otherwise the first name, in alphabetical order, that the role's pattern matches.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

Row = Mapping[str, Any]

_ROLES: dict[str, tuple[tuple[str, ...], str]] = {
    "perplexity": (("gen_ppl/pooled", "gen_ppl"), r"gen[-_]ppl\b.*"),
    "bits per byte": (("bits_per_byte",), r"bits[-_]per[-_]byte\b.*"),
    "entropy": (("entropy_nats", "entropy/nats", "entropy"), r"entropy.*nats"),
    "distinct": (("distinct_2", "distinct/2", "distinct-2"), r"distinct.*"),
    "repetition": (("repetition_4", "repetition/4", "rep_4", "repetition"), r"(seq[-_])?rep(?!eat).*|repetition.*"),
    "mauve": (("mauve",), r"mauve(?!.*(ceiling|real|std|sd)).*"),
    "mauve ceiling": (("mauve_ceiling", "mauve/ceiling"), r"mauve.*(ceiling|real).*"),
    "excess": (("excess_nll",), r"excess[-_]nll\b.*"),
    "total variation": (("tv_2",), r"tv_\d+"),
    "valid": (("valid",), r"valid"),
    "speed": (("sequences_per_second", "cost/sequences_per_second"), r".*sequences[-_]per[-_]s(econd)?"),
}


_OURS = re.compile(
    r"(gen_ppl|bits_per_byte|(sequence_)?calls|distinct|entropy|longest_(copy|repeat)|mauve|mean_length|memorised"
    r"|near_copies|peak_memory_bytes|repetition|seconds|sequences_per_second|excess_nll|kl|tv|valid)([/_].*)?"
)


def added(metrics: Iterable[str]) -> list[str]:
    """The metrics that plug-ins measured: those that are none of this project's, in order."""
    return sorted(name for name in set(metrics) if name and _OURS.fullmatch(name) is None)


def pick(metrics: Iterable[str], role: str) -> str | None:
    """The metric that plays a role among those present, or None.

    Args:
        metrics: names that occur.
        role: "perplexity", "bits per byte", "entropy", "distinct", "repetition", "mauve", "mauve ceiling",
            "excess", "total variation", "valid" or "speed".
    """
    present = sorted(set(metrics))
    preferred, pattern = _ROLES[role]
    for name in preferred:
        if name in present:
            return name
    return next((name for name in present if re.fullmatch(pattern, name)), None)


def finite(value: Any) -> bool:
    """Whether a value of the summary is a finite number (nulls are not)."""
    return isinstance(value, int | float) and math.isfinite(value)


COST_UNITS = ("calls", "s", "1/s", "bytes")


class CellRows:
    """The rows of one cell of a summary.

    Args:
        rows: at least one row, with nulls as None.
    """

    def __init__(self, rows: list[Row]) -> None:
        self.first = rows[0]
        self.id: str = rows[0]["cell"]
        self.rows = {(row["metric"], row["scorer"]): row for row in rows}

    def of(self, metric: str | None, scorer: str = "") -> Row | None:
        """The row of a metric (and scorer) if its value is finite, else None."""
        row = self.rows.get((metric or "", scorer))
        return row if row is not None and finite(row["value"]) else None

    def judges(self, metric: str | None) -> list[str]:
        """The scorers (or "") for which a metric has a finite value, in order: MAUVE has one per feature network."""
        return [scorer for (name, scorer), row in self.rows.items() if name == metric and finite(row["value"])]

    @property
    def is_real(self) -> bool:
        """Whether this is held-out real text."""
        return bool(self.first["kind"] == "reference" and self.first["method"] == "real")

    @property
    def is_oracle(self) -> bool:
        """Whether a sampler made it that was fed the task's exact predictions: no network, no generator."""
        return bool(self.first["checkpoint"] == "oracle")

    @property
    def n(self) -> int | None:
        """The largest number of sequences behind any of its values, costs last: those count every batch ever made."""
        counted = [row for row in self.rows.values() if row["n"] is not None]
        of_samples = [row for row in counted if row["unit"] not in COST_UNITS]
        return max((row["n"] for row in of_samples or counted), default=None)

    @property
    def scorers(self) -> set[str]:
        """Scorers with at least one finite value."""
        return {scorer for (_, scorer), row in self.rows.items() if scorer and finite(row["value"])}


def cells_of(summary: pd.DataFrame) -> list[CellRows]:
    """The cells of a summary in order of first appearance."""
    cells: dict[str, list[Row]] = {}
    for row in summary.astype(object).where(summary.notna(), None).to_dict("records"):
        cells.setdefault(row["cell"], []).append({str(key): value for key, value in row.items()})
    return [CellRows(rows) for rows in cells.values()]
