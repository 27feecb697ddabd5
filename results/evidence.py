"""Evidence: the finished cells of one or several run folders, as figures and claims need them.

A results folder is a run folder, or holds run folders one or two levels down (the recorded results do). Their summaries
are put together: a cell that occurs twice counts once, with the larger number of sequences. What cannot be compared is
refused here, before it shares an axis or a formula: one scorer name that stands for two networks, one metric name that
stands for two conventions.

Cells can be asked for by the columns of the summary, by their options (`dfm[solver=exact]`), and by what is known of
their training (`variants.json`, see `results.training`), which is joined through the hash of the weights.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsdfm_bench.results.flags import GROUP
from tsdfm_bench.results.replicates import Replicates
from tsdfm_bench.results.rows import CellRows, Row, cells_of, pick
from tsdfm_bench.results.schema import empty, from_rows, read_summary
from tsdfm_bench.results.store import RunFolder, StoreError
from tsdfm_bench.results.training import COSTS, TRAJECTORIES, VARIANTS, Costs, Variants, read_costs, read_variants

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

    from tsdfm_bench.results.columns import Terms

_INSIDE = ("cells", "scores", "columns", "features", "tables", "figures", "jobs", "measurements", "traces")
_IDENTITY = ("scorer_revision", "scorer_dtype", "definition")
SETTINGS = ("temperature", "top_p", "draw", "seed")


class MixedEvidence(ValueError):
    """Rows that do not belong in one column or one formula."""


class EvidenceCell(CellRows):
    """One finished cell: its rows, its folder, its options and its training variant.

    Args:
        rows: as for `CellRows`.
        folder: the run folder it came from, or None if only a summary file is at hand.
        variant: what is known of the training of its weights; {} if nothing.
        replicates: bootstrap replicates of the values of its run.
    """

    def __init__(
        self, rows: list[Row], folder: RunFolder | None, variant: Mapping[str, Any], replicates: Replicates
    ) -> None:
        super().__init__(rows)
        self.folder, self.variant = folder, dict(variant)
        self.options = label_options(self.first["label"])
        self.replicates = replicates

    @property
    def group(self) -> tuple[Any, ...]:
        """Task, tokenizer, data, length and prefix: only cells that share them are compared."""
        return tuple(self.first[name] for name in GROUP)

    @property
    def name(self) -> str:
        """How a message refers to it: label, source, steps, temperature."""
        first = self.first
        parts = [first["label"], first["source"], f"{first['steps']} steps" if first["steps"] is not None else ""]
        if first["temperature"] not in (None, 1.0):
            parts.append(f"temperature {first['temperature']:g}")
        return " ".join(part for part in parts if part)

    @property
    def networks(self) -> list[EvidenceCell]:
        """The cell of every network behind it: itself, or those of several training seeds (`results.recipes`)."""
        return [self]

    @property
    def flags(self) -> set[str]:
        """Codes of `results.flags` on any of its rows."""
        return {code for row in self.rows.values() for code in row["flags"].split()}

    def value(self, metric: str, scorer: str = "") -> tuple[float, np.ndarray, str]:
        """A value, (resamples,) replicates of it, and how they were made; see `results.replicates`."""
        return (
            self.replicates.value(self.id, metric, scorer),
            self.replicates.of(self.id, metric, scorer),
            self.replicates.how(self.id, metric, scorer),
        )

    def behind(self, metric: str | None, scorer: str = "") -> list[Row]:
        """The row of each network with a finite value, if the cell itself has one."""
        held = self.of(metric, scorer) is not None
        return [row for cell in self.networks if (row := cell.of(metric, scorer)) is not None] if held else []


def label_options(label: str) -> dict[str, str]:
    """Options in a label: "dfm[solver=exact;k=2]" -> {"solver": "exact", "k": "2"}."""
    _, bracket, rest = label.partition("[")
    if not bracket or not rest.endswith("]"):
        return {}
    pairs = (part.partition("=") for part in rest[:-1].replace(",", ";").split(";") if "=" in part)
    return {key.strip(): value.strip() for key, _, value in pairs}


def plain_label(label: str) -> str:
    """A label without its checkpoint: "dfm[solver=exact;checkpoint=x]" -> "dfm[solver=exact]"."""
    name, bracket, rest = label.partition("[")
    if not bracket or not rest.endswith("]"):
        return label
    kept = [part for part in rest[:-1].replace(",", ";").split(";") if part.partition("=")[0].strip() != "checkpoint"]
    return f"{name}[{';'.join(kept)}]" if kept else name


@dataclass(frozen=True)
class Evidence:
    """What a results folder holds.

    Args:
        root: the folder (or summary file) that was read.
        cells: finished cells, generators and references, in order.
        undone: cells that were skipped or failed, with their reason.
        costs: training costs, see `results.training`.
        variants: training variants.
        trajectories: files with recorded trajectories.
        runs: run folders that were read.
        problems: sentences about what could not be read.
    """

    root: Path
    cells: list[EvidenceCell]
    undone: list[EvidenceCell] = field(default_factory=list)
    costs: Costs = field(default_factory=Costs)
    variants: Variants = field(default_factory=Variants)
    trajectories: list[Path] = field(default_factory=list)
    runs: list[Path] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @cached_property
    def metrics(self) -> set[str]:
        """Names of all metrics."""
        return {metric for cell in self.cells for metric, _ in cell.rows}

    def metric(self, role: str) -> str | None:
        """The metric that plays a role, see `results.rows.pick`."""
        return pick(self.metrics, role)

    @cached_property
    def groups(self) -> list[tuple[Any, ...]]:
        """Sets of cells that may be compared, those with most generators first."""
        counts: dict[tuple[Any, ...], int] = defaultdict(int)
        for cell in self.cells:
            counts[cell.group] += cell.first["kind"] == "method"
        return sorted((group for group, n in counts.items() if n), key=lambda group: -counts[group])

    def find(self, where: Mapping[str, Any], group: tuple[Any, ...] | None = None) -> list[EvidenceCell]:
        """Finished cells that fit; see `fits`."""
        return [cell for cell in self.cells if (group is None or cell.group == group) and fits(cell, where)]

    @cached_property
    def replicates(self) -> Replicates:
        """Replicates of the values of all cells, each from its own run."""
        return Joined(self.cells)

    @property
    def damaged(self) -> list[str]:
        """Sentences about damaged files that were asked for so far."""
        found = (cell.replicates.damaged.get(cell.id) for cell in self.cells)
        return [sentence for sentence in found if sentence is not None]

    def summary(self, cells: Iterable[EvidenceCell] | None = None) -> pd.DataFrame:
        """A summary of these cells (default: all that are finished), from whichever runs they come."""
        chosen = self.cells if cells is None else cells
        return from_rows([{k: v for k, v in row.items() if v is not None} for c in chosen for row in c.rows.values()])

    def scorers(self, cells: Iterable[CellRows], metric: str | None) -> list[str]:
        """Scorers under which all of these cells have a finite value of a metric, in order of first appearance."""
        cells = list(cells)
        every = list(dict.fromkeys(scorer for cell in cells for scorer in cell.judges(metric)))
        return [scorer for scorer in every if all(cell.of(metric, scorer) for cell in cells)]


class Joined(Replicates):
    """Replicates of several runs, each asked for its own cells.

    Args:
        cells: of these.
        root: the run folder of all of them, if it is one.
    """

    def __init__(self, cells: Iterable[EvidenceCell], root: Path | None = None) -> None:
        self._homes = {cell.id: cell.replicates for cell in cells}
        kind = next(iter(self._homes.values()), None)
        sizes = {} if kind is None else {"resamples": kind.resamples, "seed": kind.seed}
        super().__init__(empty(), root, **sizes)

    def row(self, cell: str, metric: str, scorer: str = "") -> dict[str, Any]:
        return self._homes[cell].row(cell, metric, scorer)

    def of(self, cell: str, metric: str, scorer: str = "") -> np.ndarray:
        return self._homes[cell].of(cell, metric, scorer)

    def how(self, cell: str, metric: str, scorer: str = "") -> str:
        return self._homes[cell].how(cell, metric, scorer)

    def terms(self, cell: str, metric: str, scorer: str = "") -> Terms | None:
        return self._homes[cell].terms(cell, metric, scorer)

    def clusters(self, cell: str) -> np.ndarray | None:
        return self._homes[cell].clusters(cell)

    def behind(self, cell: str, metric: str, scorer: str = "") -> list[dict[str, Any]]:
        return self._homes[cell].behind(cell, metric, scorer)


def fits(cell: EvidenceCell, where: Mapping[str, Any]) -> bool:
    """Whether a cell has these values: columns of the summary, `options`, `variant`; a list means any of its members.

    `options` and `variant` hold further keys; a cell may have more than those asked for. The text "none" stands for a
    missing value (top_p = "none").
    """
    for key, wanted in where.items():
        if key in ("options", "variant"):
            held = cell.options if key == "options" else cell.variant
            if any(not _equal(held.get(name), value) for name, value in wanted.items()):
                return False
        elif not _equal(cell.first.get(key), wanted):
            return False
    return True


def _equal(value: Any, wanted: Any) -> bool:
    if isinstance(wanted, list | tuple):
        return any(_equal(value, one) for one in wanted)
    if wanted == "none":
        return value in (None, "", "none")
    if isinstance(wanted, bool) or isinstance(value, bool):
        return str(value).lower() == str(wanted).lower()
    try:
        return float(value) == float(wanted)
    except (TypeError, ValueError):
        return str(value) == str(wanted)


# -------------------------------------------------------------------------------------------------------- reading


def load_evidence(root: Path) -> Evidence:
    """Read a results folder, run folder or summary file.

    Raises:
        StoreError: nothing there, or a file is damaged.
        SchemaError: a summary of another schema.
        MixedEvidence: see the module's text.
    """
    if root.is_file():
        return _evidence(root, [(None, read_summary(root))], [])
    if not root.is_dir():
        raise StoreError(f"there are no results at {root}: no such folder.", root)
    folders = _folders(root)
    runs = [folder for folder in folders if (folder / "summary.parquet").exists()]
    unfinished = [f for f in folders if f not in runs and (f / "plan.json").exists()]
    problems = [f"{f} has a plan but no summary: tsdfm-bench status {f}" for f in unfinished]
    extra = [f for f in folders if any((f / name).exists() for name in (COSTS, VARIANTS, TRAJECTORIES))]
    if not runs and not extra:
        raise StoreError(
            f"there are no results in {root}: no summary.parquet, here or one or two folders down. "
            + (" ".join(problems) if problems else "Make some with tsdfm-bench run."),
            root,
        )
    return _evidence(root, [(RunFolder(run), read_summary(run)) for run in runs], extra, problems)


def _folders(root: Path, depth: int = 2) -> list[Path]:
    """The folder and those below it, without the inner folders of runs."""
    below = sorted(p for p in root.iterdir() if p.is_dir() and p.name not in _INSIDE and not p.name.startswith("."))
    return [root, *(folder for path in below for folder in (_folders(path, depth - 1) if depth else []))]


def _evidence(
    root: Path,
    summaries: Sequence[tuple[RunFolder | None, pd.DataFrame]],
    extra: Sequence[Path],
    problems: Sequence[str] = (),
) -> Evidence:
    costs, variants = Costs(), Variants()
    for folder in extra:
        costs = costs.plus(read_costs(folder / COSTS)) if (folder / COSTS).exists() else costs
        variants = variants.plus(recorded_variants(folder))
    done: dict[str, EvidenceCell] = {}
    undone: list[EvidenceCell] = []
    for run, summary in summaries:
        replicates = Replicates(summary, run.root if run is not None else None)
        for cell in cells_of(summary):
            rows = list(cell.rows.values())
            found = EvidenceCell(rows, run, variants.of(cell.first["weights"]), replicates)
            if all(row["state"] != "done" for row in rows):
                undone.append(found)
            elif found.id not in done or (found.n or 0) > (done[found.id].n or 0):
                done[found.id] = found
    cells = list(done.values())
    _check(cells)
    return Evidence(
        root=root,
        cells=cells,
        undone=undone,
        costs=costs,
        variants=variants,
        trajectories=[folder / TRAJECTORIES for folder in extra if (folder / TRAJECTORIES).exists()],
        runs=[run.root for run, _ in summaries if run is not None],
        problems=list(problems),
    )


def refuse_mixed(summary: pd.DataFrame) -> None:
    """Raise MixedEvidence if a name means two things in a summary; see the module's text."""
    _check(run_cells(summary, Replicates(summary)))


def recorded_variants(root: str | Path | None) -> Variants:
    """The variants that a run folder records; none without a folder."""
    path = Path(root) / VARIANTS if root is not None else None
    return read_variants(path) if path is not None and path.exists() else Variants()


def run_cells(summary: pd.DataFrame, replicates: Replicates, variants: Variants | None = None) -> list[EvidenceCell]:
    """Every cell of one summary, finished or not, with what is known of its training.

    Args:
        summary: of one run.
        replicates: of it.
        variants: None: those recorded in the run folder of the replicates.
    """
    variants = recorded_variants(replicates.root) if variants is None else variants
    folder = RunFolder(replicates.root) if replicates.root is not None else None
    return [
        EvidenceCell(list(cell.rows.values()), folder, variants.of(cell.first["weights"]), replicates)
        for cell in cells_of(summary)
    ]


def _check(cells: Sequence[EvidenceCell]) -> None:
    """Refuse one scorer name with two meanings, and one metric name with two conventions."""
    seen: dict[tuple[Any, ...], tuple[str, EvidenceCell]] = {}
    for cell in cells:
        for (metric, scorer), row in cell.rows.items():
            if row["value"] is None:
                continue
            for column in _IDENTITY:
                if column == "definition" and not scorer:
                    continue  # definitions without a scorer tell of length or device, which may differ between cells
                if column == "definition" and metric.startswith("mauve"):
                    continue  # its definition holds n, and that of real text another reference
                key = (cell.group, metric if column == "definition" else "", scorer, column)
                before, other = seen.setdefault(key, (row[column], cell))
                if before != row[column]:
                    what = f"scorer '{scorer}'" if column != "definition" else f"{metric} under scorer '{scorer}'"
                    raise MixedEvidence(
                        f"{what} means two things here: {column} is '{_short(before)}' for {other.name} "
                        f"({_where(other)}) and '{_short(row[column])}' for {cell.name} ({_where(cell)}). Such numbers "
                        "do not belong in one column: score both runs with the same one (tsdfm-bench run), or name a "
                        "single run folder."
                    )


def _where(cell: EvidenceCell) -> str:
    return str(cell.folder.root) if cell.folder is not None else f"cell {cell.id}"


def _short(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."


def row_digest(rows: Iterable[Sequence[Any]]) -> str:
    """A short digest of rows, to notice later that they changed."""
    digest = hashlib.sha256()
    for row in sorted(map(repr, rows)):
        digest.update(row.encode("utf-8", "backslashreplace") + b"\n")
    return digest.hexdigest()[:16]
