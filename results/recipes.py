"""A recipe as one cell: networks of several training seeds, where tables and figures show one row.

Each value is the mean over seeds and its interval is over seeds (`results.seeds.t_interval`); its replicates are those
of `over_seeds`, widened for one set of seeds, so that what is read off a curve gets its interval in the same way. What
one of the networks lacks the recipe lacks too: a mean of those that have a value would hide the others. Flags are those
of any network. The cells of the single networks stay at hand, for small marks and for what a figure says it shows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from tsdfm_bench.results.evidence import EvidenceCell, Joined, run_cells
from tsdfm_bench.results.replicates import Replicates
from tsdfm_bench.results.rows import Row, finite
from tsdfm_bench.results.schema import empty, from_rows
from tsdfm_bench.results.seeds import by_recipe, over_seeds, t_interval, t_over_normal

if TYPE_CHECKING:
    import pandas as pd

    from tsdfm_bench.results.training import Variants


class Recipe(EvidenceCell):
    """Cells that differ in the training seed alone, as one.

    Args:
        networks: their cells, at least two; the first gives the settings and the variant.
    """

    def __init__(self, networks: Sequence[EvidenceCell]) -> None:
        first = networks[0]
        name = "+".join(cell.id for cell in networks)
        rows = [_row(name, [cell.rows.get(key) for cell in networks]) for key in first.rows]
        super().__init__(rows, first.folder, first.variant, _OverSeeds(rows, networks))
        self._networks = list(networks)

    @property
    def networks(self) -> list[EvidenceCell]:
        """The cells of the single networks, in order of seeds."""
        return self._networks


def _row(name: str, rows: Sequence[Row | None]) -> Row:
    """One row of several networks; the first is given."""
    known = [row for row in rows if row is not None and finite(row["value"])]
    first = {**(rows[0] or {}), "cell": name, "low": None, "high": None, "interval": ""}
    if len(known) < len(rows):
        return first | {"value": None, "n": None, "reason": f"{len(rows) - len(known)} of {len(rows)} networks lack it"}
    sizes = [row["n"] for row in known]
    found = t_interval([row["value"] for row in known], n=0 if None in sizes else sum(sizes))
    flags = dict.fromkeys(code for row in known for code in row["flags"].split())
    ends = {"low": found.low, "high": found.high, "interval": found.description}
    counted = found.method == "constant" and all(row["low"] is None for row in known)  # calls, steps: no estimates
    return first | ({} if counted else ends) | {"value": found.value, "n": found.n or None, "flags": " ".join(flags)}


class _OverSeeds(Replicates):
    """Replicates of the rows of a recipe: of the mean over seeds, equal draws for all its quantities."""

    def __init__(self, rows: Sequence[Row], networks: Sequence[EvidenceCell]) -> None:
        super().__init__(_nothing())
        self._rows = {(row["cell"], row["metric"], row["scorer"]): dict(row) for row in rows}
        self._networks = networks

    def behind(self, cell: str, metric: str, scorer: str = "") -> list[dict[str, Any]]:
        return [dict(row) for network in self._networks if (row := network.of(metric, scorer)) is not None]

    def _make(self, cell: str, metric: str, scorer: str) -> tuple[np.ndarray, str]:
        row = self.row(cell, metric, scorer)
        if row["value"] is None:
            return np.full(self.resamples, np.nan), "none"
        if row["low"] is None or row["low"] == row["high"]:
            return np.full(self.resamples, row["value"]), "constant"
        values = [float(network.rows[metric, scorer]["value"]) for network in self._networks]
        hashes = [network.first["weights"] for network in self._networks]
        return over_seeds(values, hashes, self.resamples, t_over_normal(len(values) - 1))[1:], "training seeds"


@lru_cache(maxsize=1)
def _nothing() -> pd.DataFrame:
    return empty()


def recipes(cells: Iterable[EvidenceCell]) -> list[EvidenceCell]:
    """Finished cells with one for each recipe of several training seeds, in the place of its first seed."""
    cells = list(cells)
    places: dict[str, EvidenceCell | None] = {}
    for group in by_recipe(cells):
        if len(group) > 1:
            places |= {cell.id: None for cell in group} | {group[0].id: Recipe(group)}
    return [found for cell in cells if (found := places.get(cell.id, cell)) is not None]


def with_recipes(
    summary: pd.DataFrame, replicates: Replicates, variants: Variants | None = None
) -> tuple[pd.DataFrame, Replicates]:
    """A summary with one cell for each recipe of several training seeds, and its replicates; unchanged without any.

    Args:
        summary: of one or several runs.
        replicates: of it.
        variants: see `run_cells`.
    """
    cells = run_cells(summary, replicates, variants)
    done = [cell for cell in cells if cell.first["state"] == "done"]
    found = recipes(done)
    if len(found) == len(done):
        return summary, replicates
    found += [cell for cell in cells if cell.first["state"] != "done"]
    return from_rows(row for cell in found for row in cell.rows.values()), Joined(found, replicates.root)
