"""Frontier and speed-quality: the two figures that the paper lacks, drawn by `results.plots` from all runs together.

A perplexity at one temperature says little without its entropy (arXiv 2604.02718), and a step count says little about
time. The frontier shows gen-PPL against entropy over temperatures; the other figure shows it against network calls and
measured seconds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar

from tsdfm_bench.paper_figures.base import Made, NothingToDraw, own_names, without_options
from tsdfm_bench.results import plots
from tsdfm_bench.results.evidence import Evidence, EvidenceCell
from tsdfm_bench.results.seeds import defaults


class Frontier:
    """gen-PPL against entropy over temperatures."""

    title: ClassVar[str] = "gen-PPL against entropy"
    sweep: ClassVar[str] = "frontier"

    def make(self, evidence: Evidence) -> list[Made]:
        """One figure per text setting and scorer."""
        return _drawn("frontier", evidence, _swept)


class Speed:
    """gen-PPL against calls and seconds."""

    title: ClassVar[str] = "gen-PPL against calls and seconds"
    sweep: ClassVar[str] = "table1"

    def make(self, evidence: Evidence) -> list[Made]:
        """One figure per text setting and scorer."""
        return _drawn("cost", evidence, _without_options)


def _swept(cells: list[EvidenceCell]) -> list[EvidenceCell]:
    """Generators at several temperatures or nucleus masses, and references: a single point is no frontier."""

    def key(cell: EvidenceCell) -> tuple[Any, ...]:
        return (*cell.group, *(cell.first[name] for name in ("label", "weights", "source", "steps", "draw", "seed")))

    counts = Counter(key(cell) for cell in cells)
    return [cell for cell in cells if cell.first["kind"] == "reference" or counts[key(cell)] > 1]


def _without_options(cells: list[EvidenceCell]) -> list[EvidenceCell]:
    """Methods as they are by default: variants of a solver would be a line each."""
    return [cell for cell in cells if without_options(cell)]


def _drawn(
    kind: str, evidence: Evidence, choose: Callable[[list[EvidenceCell]], list[EvidenceCell]] = list
) -> list[Made]:
    chosen = choose([cell for cell in defaults(evidence.cells) if not cell.is_oracle])
    if not any(cell.first["kind"] == "method" for cell in chosen):
        raise NothingToDraw("no finished generator" + (" at several temperatures" if kind == "frontier" else ""))
    name = {"cost": "speed-quality"}.get(kind, kind)
    drawings = plots.draw(kind, evidence.summary(chosen), replicates=evidence.replicates, variants=evidence.variants)
    return own_names(
        Made(
            name=drawing.name.replace(kind, name, 1),
            title=drawing.title,
            rows=drawing.rows,
            figure=drawing.figure,
            notes=drawing.notes,
        )
        for drawing in drawings
    )
