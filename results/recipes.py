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

from tsdfm_bench.results.evidence import EvidenceCell, Joined, plain_label, run_cells
from tsdfm_bench.results.replicates import Replicates
from tsdfm_bench.results.rows import Row, finite
from tsdfm_bench.results.schema import empty, from_rows
from tsdfm_bench.results.seeds import (
    by_recipe,
    over_seeds,
    place_of,
    recipe_of,
    seed_of,
    t_interval,
    t_over_normal,
    without_seed,
)

if TYPE_CHECKING:
    import pandas as pd

    from tsdfm_bench.results.training import Variants


_IDENTITY = ("label", "checkpoint", "weights")


class Recipe(EvidenceCell):
    """Cells that differ in the training seed alone, as one.

    Args:
        networks: their cells; the first gives the settings and the variant. A single one keeps its values: what is left
            of a recipe where the others failed.
        like: a cell that gives label, checkpoint and weights, the same at all settings of a recipe; None: the first.
    """

    def __init__(self, networks: Sequence[EvidenceCell], like: EvidenceCell | None = None) -> None:
        first = networks[0]
        called = {name: (like or first).first[name] for name in _IDENTITY}
        called["checkpoint"] = without_seed(called["checkpoint"])
        if len(networks) > 1:
            name = "+".join(cell.id for cell in networks)
            rows = [_row(name, [cell.rows.get(key) for cell in networks]) for key in first.rows]
            replicates: Replicates = _OverSeeds(rows, networks)
        else:
            rows, replicates = list(first.rows.values()), first.replicates
        super().__init__([{**row, **called} for row in rows], first.folder, (like or first).variant, replicates)
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
    found = t_interval([row["value"] for row in known], first["unit"], n=0 if None in sizes else sum(sizes))
    flags = dict.fromkeys(code for row in known for code in row["flags"].split())
    ends = {"low": found.low, "high": found.high, "interval": found.description}
    counted = found.method == "constant" and all(row["low"] is None for row in known)  # calls, steps: no estimates
    return first | ({} if counted else ends) | {"value": found.value, "n": found.n or None, "flags": " ".join(flags)}


class _OverSeeds(Replicates):
    """Replicates of the rows of a recipe: of the mean over seeds, equal draws for all its quantities."""

    def __init__(self, rows: Sequence[Row], networks: Sequence[EvidenceCell]) -> None:
        kind = networks[0].replicates
        super().__init__(_nothing(), resamples=kind.resamples, seed=kind.seed)
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
        factor = t_over_normal(len(values) - 1)
        return over_seeds(values, hashes, self.resamples, factor, row["unit"])[1:], "training seeds"


@lru_cache(maxsize=1)
def _nothing() -> pd.DataFrame:
    return empty()


def recipes(cells: Iterable[EvidenceCell]) -> list[EvidenceCell]:
    """Finished cells with one for each recipe of several training seeds, in the place of its first seed; no repeats.

    A recipe is called after its first network in all of these cells, also where that one is missing: its points are one
    curve.
    """
    cells = list(cells)
    position = {cell.id: i for i, cell in enumerate(cells)}
    groups = sorted(by_recipe(cells), key=lambda group: position[group[0].id])
    known: dict[tuple[Any, ...], dict[str, EvidenceCell]] = {}
    for group in groups:
        if len(group) > 1:
            known.setdefault(_whose(group[0]), {}).update((cell.first["weights"], cell) for cell in group)
    first = {key: min(networks.values(), key=seed_of) for key, networks in known.items()}

    def one(group: list[EvidenceCell]) -> EvidenceCell:
        key = _whose(group[0])
        return Recipe(group, first[key]) if group[0].first["weights"] in known.get(key, {}) else group[0]

    return [one(group) for group in groups]


def _whose(cell: EvidenceCell) -> tuple[Any, ...]:
    """What all settings of a recipe share."""
    return cell.group, plain_label(cell.first["label"]), cell.first["method"], cell.first["source"], recipe_of(cell)


def without_some(cells: Iterable[EvidenceCell], undone: Iterable[EvidenceCell] = ()) -> list[str]:
    """Sentences on those recipes that lack some of their networks at a setting, and why if that is known.

    Args:
        cells: from `recipes`.
        undone: cells that were skipped or failed.
    """
    cells, undone = list(cells), list(undone)
    every: dict[tuple[Any, ...], dict[str, EvidenceCell]] = {}
    for one in [network for cell in cells for network in cell.networks] + undone:
        every.setdefault(_whose(one), {}).setdefault(one.first["weights"], one)
    gone = {(place_of(one), one.first["weights"]): one for one in undone}
    found = []
    for cell in cells:
        network = cell.networks[0]
        held = {seed_of(one) for one in cell.networks}
        lost = sorted((one for one in every[_whose(network)].values() if seed_of(one) not in held), key=seed_of)
        if lost:
            ends = [gone.get((place_of(network), one.first["weights"])) for one in lost]
            why = ", ".join(
                f"{seed_of(one)}" + (f" ({end.first['state']}: {end.first['reason']})" if end is not None else "")
                for one, end in zip(lost, ends, strict=True)
            )
            count = len(cell.networks)
            found.append(f"{cell.name}: {count} of {count + len(lost)} networks, without training seed {why}.")
    return found


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
