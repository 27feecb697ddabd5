"""Ablations: trained variants that differ from the default in one setting, over several training seeds.

The variants come from `variants.json` (see `results.training`); each is joined to its cells through the hash of its
weights. One setting is looked at at a time: the variants that equal the default in all others. With several training
seeds a value is their mean, with a t interval over seeds (a second level above the sequences); with one seed it is the
cell's own value with its interval over sequences.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tsdfm_bench.paper_figures.base import SHORT, NothingToDraw, plain_draws
from tsdfm_bench.results.evidence import Evidence, EvidenceCell
from tsdfm_bench.results.rows import Row, pick
from tsdfm_bench.results.seeds import settings_of, t_interval

CONTROL = "control"
NONE = "none"


@dataclass(frozen=True)
class Level:
    """One value of a setting.

    Args:
        name: as shown.
        value: of the setting.
        cells: one per training seed.
        is_default: whether it is the default's own value.
    """

    name: str
    value: Any
    cells: list[EvidenceCell]
    is_default: bool

    def estimate(self, metric: str, scorer: str = "") -> tuple[float, float, float] | None:
        """Mean over seeds with the ends of its 95 % interval (NaN if there is none); None without a value.

        As everywhere, of perplexities it is the mean of their logarithms.
        """
        rows = self.rows(metric, scorer)
        if not rows:
            return None
        if len(rows) == 1:
            low, high = rows[0]["low"], rows[0]["high"]
            return rows[0]["value"], *(math.nan if end is None else float(end) for end in (low, high))
        found = t_interval([row["value"] for row in rows], rows[0]["unit"])
        return found.value, found.low, found.high

    def rows(self, metric: str, scorer: str = "") -> list[Row]:
        """The row of every seed that has a finite value."""
        return [row for cell in self.cells if (row := cell.of(metric, scorer)) is not None]


def lacking(levels: Sequence[Level], measures: Sequence[tuple[str, str]]) -> list[str]:
    """Sentences on means that hold fewer networks than the level has.

    Args:
        levels: that are shown.
        measures: (metric, scorer) pairs that are shown.
    """
    return [
        f"{level.name}: {metric}{f' ({scorer})' if scorer else ''} of {count} of {len(level.cells)} networks, the "
        "others have none."
        for level in levels
        for metric, scorer in measures
        if (count := len(level.rows(metric, scorer))) < len(level.cells)
    ]


@dataclass(frozen=True)
class Ablation:
    """All ablated cells of one text setting and source at 8 steps.

    Args:
        task, length, source: where.
        cells: of the variants.
        base: settings of the default.
        quality: (metric, scorer) pairs that judge quality, best known first.
        entropy: the entropy metric.
        distinct: the distinct-n metric, or None.
        distance: the total variation from the exact law, or None.
    """

    task: str
    length: int
    source: str
    cells: list[EvidenceCell]
    base: dict[str, Any]
    quality: list[tuple[str, str]]
    entropy: str
    distinct: str | None
    distance: str | None = None

    @property
    def name(self) -> str:
        """Where it was made, and how long its networks were trained if that is not as long as the default ones."""
        trained = self.base.get("training_steps")
        apart = f", {trained} training steps" if trained and not self.cells[0].variant.get("alike", True) else ""
        return f"{self.task}, {self.length} tokens, {self.source} source, {SHORT} steps{apart}"

    def levels(self, key: str) -> list[Level]:
        """The values of one setting, the others as in the default; in order of the values."""
        found: dict[str, list[EvidenceCell]] = {}
        values: dict[str, Any] = {}
        for cell in self.cells:
            settings = _settings(cell)
            others = {name: value for name, value in settings.items() if name != key}
            wanted = {name: value for name, value in self.base.items() if name != key}
            if key == CONTROL:  # a control may differ in what it controls
                if settings.get(CONTROL, NONE) == NONE and others != wanted:
                    continue
            elif others != wanted:
                continue
            value = settings.get(key, self.base.get(key))
            if value is not None:
                found.setdefault(str(value), []).append(cell)
                values[str(value)] = value
        order = sorted(found, key=lambda text: _order(values[text]))
        return [Level(text, values[text], found[text], str(self.base.get(key)) == text) for text in order]

    def variants(self) -> list[Level]:
        """Networks of equal settings, by name: the default first, then by the number of settings that differ."""
        found: dict[str, list[EvidenceCell]] = {}
        for cell in self.cells:
            found.setdefault(json.dumps(_settings(cell), sort_keys=True), []).append(cell)
        levels = [
            Level(str(cells[0].variant["name"]), None, cells, not self.differences(cells[0]))
            for cells in found.values()
        ]
        return sorted(levels, key=lambda level: len(self.differences(level.cells[0])))

    def differences(self, cell: EvidenceCell) -> list[str]:
        """What distinguishes a variant from the default, "K 8"; settings that only one of the two has are left out."""
        settings = _settings(cell)
        return [f"{key} {settings[key]}" for key in settings if key in self.base and settings[key] != self.base[key]]


def _settings(cell: EvidenceCell) -> dict[str, Any]:
    return {CONTROL: NONE, **settings_of(cell)}


def _order(value: Any) -> tuple[int, float, str]:
    """Numbers by size; "none" before other words."""
    if isinstance(value, int | float):
        return (0, float(value), "")
    return (1, 0.0 if value == NONE else 1.0, str(value))


def ablations(evidence: Evidence) -> list[Ablation]:
    """The ablations in these results, largest first.

    Raises:
        NothingToDraw: no variants, or none with a finished cell at 8 steps and an entropy.
    """
    if not evidence.variants.variants:
        raise NothingToDraw("no variants.json: nothing says what distinguishes the trained networks")
    groups: dict[tuple[Any, ...], list[EvidenceCell]] = {}
    seen: set[tuple[Any, ...]] = set()
    for cell in evidence.cells:
        as_trained = set(cell.options) <= {"checkpoint", "rerank"}  # a variant's training is what is looked at
        if not (cell.variant and cell.first["steps"] == SHORT and plain_draws(cell) and as_trained):
            continue
        # networks that were trained otherwise than the default, for another time, are an ablation of their own
        key = (*cell.group, cell.first["source"], cell.variant.get("alike", True))
        if (*key, cell.first["weights"]) not in seen:  # other sequences of a network are no other training seed
            seen.add((*key, cell.first["weights"]))
            groups.setdefault(key, []).append(cell)
    found = [ablation for cells in groups.values() if (ablation := _ablation(cells)) is not None]
    if not found:
        raise NothingToDraw(
            f"no finished cell of a variant at {SHORT} steps (variants.json names them by weights hash)"
        )
    return sorted(found, key=lambda ablation: -len(ablation.cells))


def _ablation(cells: Sequence[EvidenceCell]) -> Ablation | None:
    metrics = {metric for cell in cells for metric, _ in cell.rows}
    entropy = pick(metrics, "entropy")
    ppl = pick(metrics, "perplexity")
    quality = [(ppl, judge) for judge in dict.fromkeys(j for c in cells for j in c.judges(ppl))] if ppl else []
    if "excess_nll" in metrics:
        quality.insert(0, ("excess_nll", ""))
    if not quality or entropy is None:
        return None
    return Ablation(
        task=cells[0].first["task"],
        length=cells[0].first["length"],
        source=cells[0].first["source"],
        cells=list(cells),
        base=_base(cells),
        quality=[(metric, scorer) for metric, scorer in quality],
        entropy=entropy,
        distinct=pick(metrics, "distinct"),
        distance=pick(metrics, "total variation"),
    )


def _base(cells: Sequence[EvidenceCell]) -> dict[str, Any]:
    """The default variant's settings; without one, the most common value of each setting."""
    defaults = [_settings(cell) for cell in cells if cell.variant["default"]]  # one of each method
    if defaults:
        return min(defaults, key=lambda settings: settings[CONTROL] != NONE)  # what is ablated, not a control
    names = dict.fromkeys(name for cell in cells for name in _settings(cell))
    counts = {name: Counter(str(_settings(cell).get(name)) for cell in cells) for name in names}
    plain = {name: {str(_settings(cell).get(name)): _settings(cell).get(name) for cell in cells} for name in names}
    return {name: plain[name][counts[name].most_common(1)[0][0]] for name in names}
