"""What a figure of the paper is: a class with a title, the sweep that makes its rows, and `make`, pure in its results.

A third-party figure is the same, registered under the entry point group `tsdfm_bench.figures` (or in a local file,
FIGURES = {"name": Class}, given with --plugin):

    class Mine:
        title = "gen-PPL by length"
        sweep = "my-sweep.toml"                       # named when rows are missing
        def make(self, evidence: Evidence) -> list[Made]: ...

`make` returns one `Made` per file name, with everything that is needed to check it later: the rows it shows, what is
missing, and the published numbers beside them. It raises `NothingToDraw` if no row is there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from tsdfm_bench.paper_figures.published import Number
from tsdfm_bench.results.evidence import Evidence, EvidenceCell
from tsdfm_bench.results.plots import NothingToDraw, file_names
from tsdfm_bench.results.recipes import recipes, without_some
from tsdfm_bench.results.rows import Row
from tsdfm_bench.results.seeds import by_recipe, defaults
from tsdfm_bench.results.style import FAINT, text_colour
from tsdfm_bench.results.table_model import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Made", "NothingToDraw", "PaperFigure", "Scene", "scenes", "unique_rows"]

SOURCES = {
    "tsdfm": ("uniform", "mask"),
    "fsdfm": ("uniform", "mask"),
    "dfm": ("uniform", "mask"),
    "mdlm": ("mask",),
    "sedd": ("mask", "uniform"),
}
SHORT, LONG = 8, 1024


@dataclass(frozen=True)
class Made:
    """One table or figure, ready to be saved.

    Args:
        name: file name without ending.
        title: one line.
        rows: rows of the summary it shows (mappings with cell, metric, scorer, value, low, high, n).
        figure: a matplotlib figure made inside `results.style.styled()`, or None.
        table: a table, or None; one of the two is given.
        notes: sentences for the caption.
        missing: what should be there and is not; the figure is marked.
        published: numbers from the literature that it shows.
    """

    name: str
    title: str
    rows: list[Row]
    figure: Figure | None = None
    table: Table | None = None
    notes: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    published: list[Number] = field(default_factory=list)


class PaperFigure(Protocol):
    """See the module's text."""

    title: ClassVar[str]
    sweep: ClassVar[str]

    def make(self, evidence: Evidence) -> list[Made]:
        """The tables or figures that these results allow.

        Raises:
            NothingToDraw: none; the message says what is missing.
        """
        ...


class Scene:
    """The comparable cells of one text setting, at temperature 1, without nucleus and options.

    Networks of one recipe with several training seeds are one cell (`results.recipes`).

    Args:
        evidence: where they come from.
        group: task, tokenizer, data, length and prefix.
    """

    def __init__(self, evidence: Evidence, group: tuple[Any, ...]) -> None:
        self.evidence, self.group = evidence, group
        self.task, self.length = str(group[0]), group[3]
        self.everything = [cell for cell in evidence.cells if cell.group == group]
        standing = recipes(_standing([cell for cell in self.everything if cell.first["kind"] == "method"]))
        self._by_key: dict[tuple[Any, ...], EvidenceCell] = {}
        for cell in standing:
            key = (cell.first["method"], cell.first["source"], cell.first["steps"])
            if key not in self._by_key or (cell.n or 0) > (self._by_key[key].n or 0):
                self._by_key[key] = cell
        self.cells = list(self._by_key.values())
        self._left_out = len(standing) - len(self.cells)
        metrics = {metric for cell in self.everything for metric, _ in cell.rows}
        self.metrics = metrics
        self.undone = [cell for cell in evidence.undone if cell.first["task"] in ("", self.task)]
        self.without_some = without_some(self.cells, self.undone)

    @property
    def name(self) -> str:
        """Task and length."""
        return f"{self.task}, {self.length} tokens" + (f", prefix {self.group[4]}" if self.group[4] else "")

    @property
    def real(self) -> EvidenceCell | None:
        """Held-out real text."""
        return next((cell for cell in self.everything if cell.is_real), None)

    @property
    def left_out(self) -> list[str]:
        """A sentence on cells that share method, source and steps with one that is shown; nothing without any."""
        if not self._left_out:
            return []
        cells = f"{self._left_out} further cells" if self._left_out > 1 else "1 further cell"
        return [f"{cells} with other weights or seeds not shown."]

    @property
    def references(self) -> list[EvidenceCell]:
        """Real text first, then canaries."""
        found = [cell for cell in self.everything if cell.first["kind"] == "reference"]
        return sorted(found, key=lambda cell: not cell.is_real)

    def cell(self, method: str, source: str | None, steps: int | None) -> EvidenceCell | None:
        """One generator's cell."""
        return self._by_key.get((method, source or "", steps))

    def metric(self, role: str) -> str | None:
        """The metric of this text that plays a role, see `results.rows.pick`."""
        from tsdfm_bench.results.rows import pick

        return pick(self.metrics, role)

    def scorers(self, metric: str | None) -> list[str]:
        """Scorers with any value of a metric here, in order of first appearance."""
        return list(dict.fromkeys(scorer for cell in self.everything for scorer in cell.judges(metric)))

    def absent(self, wanted: list[tuple[str, str, int]]) -> list[str]:
        """Names of wanted cells (method, source, steps) that are not finished, and why if that is known."""
        reasons = {
            (c.first["method"], c.first["source"], c.first["steps"]): f" ({c.first['state']}: {c.first['reason']})"
            for c in self.undone
            if _plain(c)
        }
        return [
            f"{method} {source} {steps} steps{reasons.get((method, source, steps), '')}"
            for method, source, steps in wanted
            if self.cell(method, source, steps) is None
        ]


def plain_draws(cell: EvidenceCell) -> bool:
    """Whether a cell was sampled as trained: temperature 1, no nucleus, fp64."""
    first = cell.first
    return first["temperature"] in (None, 1.0) and first["top_p"] is None and first["draw"] in ("", "fp64")


def without_options(cell: EvidenceCell) -> bool:
    """Whether a method was run as it is by default, from whatever checkpoint."""
    return not {*cell.options} - {"checkpoint"}


def _plain(cell: EvidenceCell) -> bool:
    return plain_draws(cell) and not cell.is_oracle and without_options(cell)


def _standing(cells: list[EvidenceCell]) -> list[EvidenceCell]:
    """Cells that stand for their method: without options, or known to be one of several seeds of a default recipe."""
    drawn = [cell for cell in cells if _plain(cell)]
    plain = {(cell.first["method"], cell.first["weights"]) for cell in drawn if not cell.options}
    found = []
    for group in by_recipe(defaults(drawn)):
        several = len(group) > 1 and group[0].variant
        standing = [c for c in group if (c.first["method"], c.first["weights"]) in plain and _default(c)]
        found += group if several else standing
    return found


def _default(cell: EvidenceCell) -> bool:
    return not cell.variant or bool(cell.variant["default"])


def scenes(evidence: Evidence) -> list[Scene]:
    """One scene per text setting with generators: those that compare most methods first, then those with most rows."""
    found = [Scene(evidence, group) for group in evidence.groups]
    return sorted(found, key=lambda scene: -len({cell.first["method"] for cell in scene.cells}))


def named(name: str, scene: Scene, others: list[Scene]) -> str:
    """A name: the plain one for the first scene, with task and length for the others; see `own_names`."""
    return name if scene is others[0] else f"{name}-{scene.task}-{scene.length}"


def own_names(made: Iterable[Made]) -> list[Made]:
    """The same under names that are file names, no two alike, see `results.plots.file_names`."""
    made = list(made)
    return [replace(one, name=name) for one, name in zip(made, file_names(one.name for one in made), strict=True)]


def unique_rows(rows: list[Row | None]) -> list[Row]:
    """Rows without None, each once."""
    found = {(row["cell"], row["metric"], row["scorer"]): row for row in rows if row is not None}
    return list(found.values())


def mark_incomplete(figure: Figure, missing: Sequence[str]) -> None:
    """Say at the lower edge of a figure that rows are missing; call it before the figure is laid out."""
    if missing:
        shown = "; ".join(missing[:2]) + (f"; and {len(missing) - 2} more" if len(missing) > 2 else "")
        shown = shown if len(shown) < 90 else shown[:87] + "..."
        text = f"incomplete, no row for: {shown}"
        figure.supxlabel(text, x=0.01, ha="left", fontsize=5, color=text_colour(FAINT))
