"""What a formula's quantities are in a given setting: values with replicates, looked up in cells.

Each quantity of k rows is an array (k, 1 + resamples): the value in the first column, its replicates after it, so that
formulas are computed on both at once. Networks trained alike with several seeds are one row (see `results.seeds`).
What was counted or measured once (calls, steps, seconds) has constant replicates, unless such networks differ in it.
A value that does not exist raises `Missing` with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from zlib import crc32

import numpy as np

from tsdfm_bench.results.evidence import Evidence, EvidenceCell
from tsdfm_bench.results.formula import Quantity
from tsdfm_bench.results.frontier import OutOfRange, read_curve
from tsdfm_bench.results.numbers import plain
from tsdfm_bench.results.rows import finite, pick
from tsdfm_bench.results.seeds import by_recipe, fewest, over_seeds, widening
from tsdfm_bench.results.stats import RESAMPLES

_ROLES: Mapping[str, tuple[str, bool]] = {
    "ppl": ("perplexity", True),
    "bits_per_byte": ("bits per byte", True),
    "entropy": ("entropy", False),
    "mauve": ("mauve", True),
    "distinct": ("distinct", False),
    "repetition": ("repetition", False),
    "seconds": ("speed", False),
}
_ONCE = ("calls", "sequence_calls", "seconds")
_COLUMNS = {"calls": "calls", "sequence_calls": "sequence_calls", "steps": "steps", "length": "length"}


class Missing(ValueError):
    """A value that a formula needs does not exist."""


def _networks(group: list[EvidenceCell]) -> list[str]:
    return [cell.first["weights"] for cell in group]


class Rows:
    """The rows of one setting, as formulas see them.

    Args:
        evidence: where metrics and training costs are known.
        cells: by name of the selection.
        scorer: of scored quantities; "" if the claim has none.

    What was read so far says whether calls or times of single networks are all that there is (`constant`), and whether
    a time that was measured once is among them (`timed`).
    """

    def __init__(self, evidence: Evidence, cells: Mapping[str, list[EvidenceCell]], scorer: str) -> None:
        self.evidence, self.cells, self.scorer = evidence, cells, scorer
        self.n = min((cell.n for members in cells.values() for cell in members if cell.n), default=0)
        self.groups = {name: by_recipe(members) for name, members in cells.items()}
        self.seeds = fewest(group for groups in self.groups.values() for group in groups)
        self.constant = self.timed = False
        self._timed_on: set[tuple[str, ...]] = set()
        self._trained_on: set[tuple[str, ...]] = set()
        self._known: dict[Quantity, np.ndarray] = {}
        self._factor = 1.0

    def quantity(self, wanted: Quantity) -> np.ndarray:
        """(k, 1 + resamples), see the module's text."""
        if wanted not in self._known:
            self._known[wanted] = np.stack([self._together(group, wanted) for group in self.groups[wanted.rows]])
        return self._known[wanted]

    def _together(self, group: list[EvidenceCell], wanted: Quantity) -> np.ndarray:
        """One row: a network's own value, or that of networks that differ in the training seed."""
        values = [self._of(cell, wanted) for cell in group]
        self.constant = self.constant or (wanted.function in _ONCE and not self.seeds)
        self.timed = self.timed or (wanted.function == "seconds" and len(group) == 1)
        if len(values) == 1 or all(np.array_equal(each, values[0]) for each in values):
            return values[0]  # of one network, or what seeds do not change, such as calls
        means = [float(each[0]) for each in values]
        return over_seeds(means, _networks(group), RESAMPLES, self._factor, self._unit(group[0], wanted))

    def _unit(self, cell: EvidenceCell, wanted: Quantity) -> str:
        """The unit of what `_of` reads of a cell's rows, or of its training."""
        name = wanted.function
        if name not in _ROLES and name != "metric":
            return "s" if name == "training_seconds" else ""
        metric = wanted.argument or pick({metric for metric, _ in cell.rows}, _ROLES[name][0])
        row = cell.of(metric, self.scorer) or cell.of(metric)
        return str(row["unit"]) if row is not None else ""

    def widened(self, replicates: np.ndarray, confidence: float) -> Rows:
        """These rows with what training seeds add for a formula with these replicates; see `results.seeds`."""
        sets = [_networks(group) for groups in self.groups.values() for group in groups if len(group) > 1]
        made = Rows(self.evidence, self.cells, self.scorer)
        made._factor = widening(replicates, dict.fromkeys(map(tuple, sets)), confidence)
        return made

    def shown(self, wanted: Quantity) -> str:
        """A quantity with its values, for messages."""
        try:
            values = ", ".join(plain(float(row[0]), 4) for row in self.quantity(wanted))
        except Missing:
            values = "unknown"
        return f"{wanted.function} of {wanted.rows} {values}"

    def _of(self, cell: EvidenceCell, wanted: Quantity) -> np.ndarray:
        name = wanted.function
        if name == "n":
            return self._fixed(cell.n, cell, name)
        if name in _COLUMNS:
            return self._fixed(cell.first[_COLUMNS[name]], cell, name)
        if name in ("training_seconds", "training_flops"):
            return self._training(cell, name)
        if name == "metric":
            return self._metric(cell, wanted.argument)
        role, scored = _ROLES[name]
        metric = wanted.argument or pick({metric for metric, _ in cell.rows}, role)
        if metric is None:
            raise Missing(f"{cell.name} has no {role}")
        values = self._read(cell, metric, self.scorer if scored else "")
        if name != "seconds":
            return values
        _on_one(self._timed_on, cell.first["device"])
        return 1.0 / values

    def _metric(self, cell: EvidenceCell, metric: str) -> np.ndarray:
        for scorer in (self.scorer, ""):
            if (metric, scorer) in cell.rows:
                return self._read(cell, metric, scorer)
        held = ", ".join(sorted({name for name, _ in cell.rows if name}))
        raise Missing(f"{cell.name} has no metric '{metric}'; it has {held}")

    def _read(self, cell: EvidenceCell, metric: str, scorer: str) -> np.ndarray:
        if cell.of(metric, scorer) is None:
            row = cell.rows.get((metric, scorer))
            why = f": {row['reason']}" if row is not None and row["reason"] else ""
            under = f" under scorer {scorer}" if scorer else ""
            wrong = "" if row is None or row["value"] is None else f" that is finite ({row['value']})"
            raise Missing(f"{cell.name} has no {metric}{wrong}{under}{why}")
        value, replicates, _ = cell.value(metric, scorer)
        return np.concatenate([[value], replicates])

    def _fixed(self, value: object, cell: EvidenceCell, name: str) -> np.ndarray:
        if not finite(value):
            raise Missing(f"{cell.name} has no {name}")
        return np.full(1 + RESAMPLES, float(value))  # type: ignore[arg-type]

    def _training(self, cell: EvidenceCell, name: str) -> np.ndarray:
        costs = self.evidence.costs.costs
        fitting = [cost for cost in costs if cost.weights and cost.weights == cell.first["weights"]] or [
            cost
            for cost in costs
            if cost.method == cell.first["method"]
            and cost.source in ("", cell.first["source"])
            and cost.scale in ("", cell.first["task"])
            and all(str(cell.variant.get(key, value)) == str(value) for key, value in cost.settings.items())
        ]
        if not fitting:
            raise Missing(f"no training cost of {cell.name} is recorded (training_cost.json)")
        cost = fitting[0]
        if name == "training_seconds":
            _on_one(self._trained_on, cost.device, f"batches of {cost.batch}", f"{cost.threads} threads")
        if name == "training_flops":
            if cost.flops_per_step is None:
                raise Missing(f"the floating-point operations of a step of {cost.name} are not recorded")
            return np.full(1 + RESAMPLES, cost.flops_per_step)
        seconds = np.asarray(cost.seconds_per_step)
        own = crc32((cost.weights or cost.name).encode())  # trainings are independent of each other
        drawn = np.random.default_rng(own).choice(seconds, (RESAMPLES, len(seconds)))
        return np.concatenate([[np.median(seconds)], np.median(drawn, axis=1)])

    def curve(self, rows: str, at: np.ndarray) -> np.ndarray:
        """Perplexity of rows at entropies (1 + resamples,), replicate by replicate; see `frontier.read_curve`.

        Raises:
            OutOfRange: the entropy was not bracketed by what was measured.
        """
        ppl, entropy = self.quantity(Quantity("ppl", rows)), self.quantity(Quantity("entropy", rows))
        at = np.broadcast_to(at, ppl.shape[1:])
        low, high = float(entropy[:, 0].min()), float(entropy[:, 0].max())
        if len(ppl) < 2 or not low <= at[0] <= high:
            measured = (
                f"only {low:.3f} to {high:.3f} were measured" if len(ppl) > 1 else f"one point at {low:.3f} exists"
            )
            raise OutOfRange(
                f"perplexity of '{rows}' at entropy {at[0]:.3f} nats cannot be read off: {measured}; "
                "add temperatures (--temperatures 0.7,0.8,0.9,1,1.1,1.2)",
                low,
                high,
            )
        return read_curve(entropy, ppl, at)


def _on_one(seen: set[tuple[str, ...]], *circumstances: str) -> None:
    """Raise Missing if seconds were measured under other circumstances than those before them."""
    seen.add(circumstances)
    if len(seen) > 1:
        told = " and ".join(sorted(", ".join(filter(None, each)) or "unknown" for each in seen))
        raise Missing(f"seconds were measured under different circumstances: {told}")
