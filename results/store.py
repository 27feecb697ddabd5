"""The run folder: where a sweep keeps its plan, samples, scores and summary, and what is already done.

    plan.json                           frozen: the whole request, written once
    cells/<ab>/<id>/cell.json           what this cell is; <ab> = the first two digits of the id
    cells/<ab>/<id>/samples-NNNN.npz    batch NNNN, always the same sequences however the work was split
    cells/<ab>/<id>/cost.json           what sampling cost (cost-NNNN.json: further blocks of batches)
    cells/<ab>/<id>/done.json           exists when every batch does; or error.txt, the last failure
    scores/<scorer>/<ab>/<id>.parquet   token NLLs, one row a sequence
    features/<name>/<ab>/<id>.npz       feature vectors, one row a sequence
    traces/<ab>/<id>.npz                states of a few sequences, step by step
    measurements/<metric>/<ab>/<id>.json
    summary.parquet, summary.csv        one row a cell x metric x scorer
    leases/                             who works on what now
    quarantine/                         damaged files, each with the reason
    tables/ figures/ jobs/ report.html verdicts.json

The two digits keep folders small, because parallel file systems are slow on large ones: with 10,000 cells `cells/` has
256 entries and each of them about 40. Folders written before had no <ab>; they are read and continued as they are.

State is derived from which files exist, never stored twice: a killed process leaves nothing to repair. Listing looks at
names only (one folder scan per cell); contents are verified when they are read, and what is damaged is moved to
quarantine/, so that it is missing and will be made again.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tsdfm_bench.results.arrays import (
    Samples,
    Scores,
    read_arrays,
    read_arrow,
    read_samples,
    read_scores,
    read_table,
    write_arrays,
    write_samples,
    write_scores,
    write_table,
)
from tsdfm_bench.results.files import (
    CorruptFile,
    StoreError,
    UnsafeName,
    canonical_json,
    check_name,
    is_temporary,
    json_hash,
    make_folder,
    read_bytes,
    read_json,
    remove,
    slug,
    write_bytes,
    write_json,
    write_text,
)

__all__ = [
    "RECORDED",
    "CellState",
    "CorruptFile",
    "PlanConflict",
    "RunFolder",
    "Samples",
    "Scores",
    "StoreError",
    "UnsafeName",
    "batches_in",
    "canonical_json",
    "check_name",
    "is_temporary",
    "json_hash",
    "make_folder",
    "plan_hash",
    "read_arrays",
    "read_arrow",
    "read_bytes",
    "read_json",
    "read_samples",
    "read_scores",
    "read_table",
    "remove",
    "slug",
    "write_arrays",
    "write_bytes",
    "write_json",
    "write_samples",
    "write_scores",
    "write_table",
    "write_text",
]

RECORDED = Path(__file__).parent / "reference"
"""The run this repository stands behind."""

_SAMPLES = re.compile(r"samples-(\d{4,})\.npz")
_COST = re.compile(r"cost(-\d{4,})?\.json")
_DIGITS = 2


class PlanConflict(StoreError):
    """The folder was made for another plan."""


@dataclass(frozen=True)
class CellState:
    """How far a cell is.

    Args:
        cell: its id.
        state: "done", "partial" (some batches), "failed" (the last try ended in an error) or "missing" (nothing yet).
        completed: batches that exist.
        batches: batches asked for, if known.
        error: last lines of the last error, if it failed.
    """

    cell: str
    state: Literal["done", "partial", "failed", "missing"]
    completed: int = 0
    batches: int | None = None
    error: str = ""

    def __str__(self) -> str:
        of = f"{self.completed} of {self.batches if self.batches is not None else '?'} batches"
        return self.state if self.state in ("done", "missing") else f"{self.state} ({of})"


def plan_hash(plan: Mapping[str, Any], extendable: Iterable[str] = ()) -> str:
    """Identity of a plan: the first 16 hex digits of the hash of its canonical JSON without the `extendable` fields."""
    extendable = set(extendable)
    return json_hash({key: value for key, value in plan.items() if key not in extendable})[:16]


class RunFolder:
    """Paths and state of one run folder; making the object touches no file.

    Args:
        root: the folder; it need not exist yet.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)
        self._flat: bool | None = None

    def __repr__(self) -> str:
        return f"RunFolder({str(self.root)!r})"

    # ------------------------------------------------------------------------------------------------ the plan

    @property
    def plan_path(self) -> Path:
        """plan.json."""
        return self.root / "plan.json"

    def freeze(self, plan: Mapping[str, Any], extendable: Iterable[str] = ()) -> str:
        """Write the plan if the folder has none, else check that it is the same one.

        Args:
            plan: JSON values.
            extendable: top-level fields that may differ from the stored plan (the number of samples, the scorers): they
                are not part of the plan's identity, and the stored plan takes their new values.

        Returns:
            the plan's hash.

        Raises:
            PlanConflict: the folder has another plan.
            CorruptFile, StoreError: the stored plan cannot be read, or this one not be written.
        """
        extendable = set(extendable)
        wanted = plan_hash(plan, extendable)
        if not self.plan_path.exists():
            try:
                write_json(self.plan_path, plan, exclusive=True)
                return wanted
            except FileExistsError:  # another process was faster: then it must be the same plan
                pass
        stored = self.read_plan()
        found = plan_hash(stored, extendable)
        if found != wanted:
            empty = object()
            keys = sorted({*stored, *plan} - extendable)
            differing = [key for key in keys if _differ(stored.get(key, empty), plan.get(key, empty))]
            raise PlanConflict(
                f"{self.root} belongs to another plan: it holds plan {found}, you asked for plan {wanted}; "
                f"they differ in {', '.join(differing)}. Give this request another folder (--out), or repeat the "
                f"stored one (see {self.plan_path}) to continue it.",
                self.root,
            )
        if any(_differ(stored.get(key), plan.get(key)) for key in extendable):
            write_json(self.plan_path, plan)
        return wanted

    def read_plan(self) -> dict[str, Any]:
        """The frozen plan; `StoreError` if this is no run folder."""
        if not self.plan_path.exists():
            raise StoreError(f"{self.root} is not a run folder: it has no plan.json.", self.root)
        return read_json(self.plan_path)

    # --------------------------------------------------------------------------------------------------- paths

    @property
    def flat(self) -> bool:
        """Whether the cells lie side by side, as in folders of an older version."""
        if self._flat is None:  # looked at once: a folder does not change its layout
            self._flat = any(len(name) > _DIGITS for name in _names(self.root / "cells"))
        return self._flat

    def _beside(self, top: Path, cell: str, suffix: str = "") -> Path:
        """The path of something of a cell below `top`."""
        name = check_name(cell, "cell id")
        return (top if self.flat else top / name[:_DIGITS]) / f"{name}{suffix}"

    def cell_folder(self, cell: str) -> Path:
        """cells/<ab>/<id>."""
        return self._beside(self.root / "cells", cell)

    def cell_path(self, cell: str) -> Path:
        """cells/<ab>/<id>/cell.json."""
        return self.cell_folder(cell) / "cell.json"

    def samples_path(self, cell: str, batch: int) -> Path:
        """cells/<ab>/<id>/samples-NNNN.npz."""
        if batch < 0:
            raise ValueError(f"batch numbers start at 0, not {batch}")
        return self.cell_folder(cell) / f"samples-{batch:04d}.npz"

    def cost_path(self, cell: str, block: int = 0) -> Path:
        """cells/<ab>/<id>/cost.json, or cost-NNNN.json of a further block of batches."""
        return self.cell_folder(cell) / (f"cost-{block:04d}.json" if block else "cost.json")

    def cost_paths(self, cell: str) -> list[Path]:
        """The cost files that exist, in order."""
        folder = self.cell_folder(cell)
        return [folder / name for name in sorted(_names(folder)) if _COST.fullmatch(name)]

    def done_path(self, cell: str) -> Path:
        """cells/<ab>/<id>/done.json."""
        return self.cell_folder(cell) / "done.json"

    def error_path(self, cell: str) -> Path:
        """cells/<ab>/<id>/error.txt."""
        return self.cell_folder(cell) / "error.txt"

    def failure_path(self, cell: str) -> Path:
        """cells/<ab>/<id>/failure.json, what the last failure depends on."""
        return self.cell_folder(cell) / "failure.json"

    def scores_path(self, scorer: str, cell: str) -> Path:
        """scores/<scorer>/<ab>/<id>.parquet; a scorer name like "hf:org/model" is made a file name by `slug`."""
        return self._beside(self.scorer_folder(scorer), cell, ".parquet")

    def scorer_folder(self, scorer: str) -> Path:
        """scores/<scorer>."""
        return self.root / "scores" / slug(scorer)

    def features_path(self, name: str, cell: str) -> Path:
        """features/<name>/<ab>/<id>.npz."""
        return self._beside(self.root / "features" / slug(name), cell, ".npz")

    def trace_path(self, cell: str) -> Path:
        """traces/<ab>/<id>.npz."""
        return self._beside(self.root / "traces", cell, ".npz")

    def measurement_path(self, metric: str, cell: str) -> Path:
        """measurements/<metric>/<ab>/<id>.json."""
        return self._beside(self.root / "measurements" / slug(metric), cell, ".json")

    @property
    def summary_path(self) -> Path:
        """summary.parquet."""
        return self.root / "summary.parquet"

    @property
    def summary_csv_path(self) -> Path:
        """summary.csv."""
        return self.root / "summary.csv"

    @property
    def tables_folder(self) -> Path:
        """tables/."""
        return self.root / "tables"

    @property
    def figures_folder(self) -> Path:
        """figures/."""
        return self.root / "figures"

    @property
    def jobs_folder(self) -> Path:
        """jobs/."""
        return self.root / "jobs"

    @property
    def leases_folder(self) -> Path:
        """leases/."""
        return self.root / "leases"

    @property
    def quarantine_folder(self) -> Path:
        """quarantine/."""
        return self.root / "quarantine"

    @property
    def report_path(self) -> Path:
        """report.html."""
        return self.root / "report.html"

    @property
    def verdicts_path(self) -> Path:
        """verdicts.json."""
        return self.root / "verdicts.json"

    # ------------------------------------------------------------------------------------------- cells, written

    def write_cell(self, cell: str, content: Mapping[str, Any]) -> None:
        """Write cell.json; a field `batches` there tells `state` how many are asked for."""
        write_json(self.cell_path(cell), content)

    def write_error(self, cell: str, text: str) -> None:
        """Record why a cell failed."""
        write_text(self.error_path(cell), text)

    def clear_error(self, cell: str) -> None:
        """Forget a failure before a new try."""
        remove(self.error_path(cell))
        remove(self.failure_path(cell))

    def write_done(self, cell: str, content: Mapping[str, Any]) -> None:
        """Mark a cell as done and forget an earlier failure."""
        write_json(self.done_path(cell), content)
        self.clear_error(cell)

    # ---------------------------------------------------------------------------------------------- cells, read

    def cells(self) -> list[str]:
        """Ids of all cells that have a folder, sorted."""
        top = self.root / "cells"
        names = _names(top)
        return sorted(names if self.flat else [cell for part in names for cell in _names(top / part)])

    def contents(self, cell: str) -> set[str]:
        """Names of the files of a cell, in one scan; empty if it has no folder."""
        return set(_names(self.cell_folder(cell)))

    def completed_batches(self, cell: str, *, verify: bool = False) -> list[int]:
        """Numbers of the batches that exist, sorted.

        Args:
            cell: its id.
            verify: read every file and leave damaged ones out (slow).
        """
        found = batches_in(_names(self.cell_folder(cell)))
        if not verify:
            return found
        good = []
        for batch in found:
            try:
                read_samples(self.samples_path(cell, batch))
            except CorruptFile:
                continue
            good.append(batch)
        return good

    def state(self, cell: str, batches: int | None = None) -> CellState:
        """How far a cell is.

        Args:
            cell: its id.
            batches: how many batches are asked for now; a finished cell with fewer is "partial" again. None: the number
                in cell.json.
        """
        names = set(_names(self.cell_folder(cell)))
        completed = sum(1 for name in names if _SAMPLES.fullmatch(name))
        if "done.json" in names and (batches is None or completed >= batches):
            return CellState(cell, "done", completed, batches if batches is not None else completed)
        if batches is None and "cell.json" in names:
            with contextlib.suppress(CorruptFile):  # found by whoever needs it; a listing goes on
                stored = read_json(self.cell_path(cell)).get("batches")
                batches = stored if isinstance(stored, int) else None
        if "error.txt" in names:
            return CellState(cell, "failed", completed, batches, self.read_error(cell))
        return CellState(cell, "partial" if completed else "missing", completed, batches)

    def states(
        self, cells: Sequence[str] | None = None, batches: int | Mapping[str, int] | None = None
    ) -> dict[str, CellState]:
        """State of several cells (default: all that have a folder); `batches` for all or by id."""
        cells = self.cells() if cells is None else cells
        if isinstance(batches, Mapping):
            return {cell: self.state(cell, batches.get(cell)) for cell in cells}
        return {cell: self.state(cell, batches) for cell in cells}

    def read_error(self, cell: str, lines: int = 3) -> str:
        """The last non-empty lines of a cell's error, or "" if it has none."""
        try:
            text = self.error_path(cell).read_text("utf-8", "replace")
        except FileNotFoundError:
            return ""
        return "\n".join([line.rstrip() for line in text.splitlines() if line.strip()][-lines:])

    def scored(self, scorer: str) -> set[str]:
        """Ids of the cells this scorer has scored."""
        top = self.scorer_folder(scorer)
        names = _names(top)
        if not self.flat:
            names = [name for part in names for name in _names(top / part)]
        return {name.removesuffix(".parquet") for name in names if name.endswith(".parquet")}

    # ---------------------------------------------------------------------------------------------- quarantine

    def quarantine(self, damage: CorruptFile, read: Callable[[Path], object] | None = None) -> str:
        """Move a damaged file out of the way, with the reason beside it, so that it counts as missing.

        Args:
            damage: as raised by whoever read the file.
            read: reads the file again; if that works now (another process has replaced it), nothing is moved.

        Returns:
            one sentence for the user; "" if there was nothing to move.

        Raises:
            CorruptFile: `damage` itself, if the file lies elsewhere or cannot be moved.
        """
        path = Path(damage.path)
        if not path.exists():
            return ""
        if read is not None:
            try:
                read(path)
                return ""
            except FileNotFoundError:  # another process moved it
                return ""
            except CorruptFile:
                pass
        try:
            relative = path.resolve().relative_to(self.root.resolve())
            make_folder(self.quarantine_folder)
            target = _free_name(self.quarantine_folder, "__".join(relative.parts))
            path.rename(target)
            write_text(target.with_name(f"{target.name}.reason.txt"), f"{damage.reason}\n")
        except FileNotFoundError:  # another process moved it
            return ""
        except (ValueError, OSError):
            raise damage from None
        return f"{relative} is damaged ({damage.reason}): moved to {self.quarantine_folder.name}/, made again"

    def quarantined(self) -> dict[str, str]:
        """Names of the files in quarantine/ with the reasons."""
        found = {}
        for name in _names(self.quarantine_folder):
            if name.endswith(".reason.txt"):
                text = (self.quarantine_folder / name).read_text("utf-8", "replace")
                found[name.removesuffix(".reason.txt")] = text.strip()
        return dict(sorted(found.items()))


def batches_in(names: Iterable[str]) -> list[int]:
    """Numbers of the batches among file names, sorted."""
    return sorted(int(m[1]) for name in names if (m := _SAMPLES.fullmatch(name)))


def _names(folder: Path) -> list[str]:
    """File and folder names in a folder, unfinished writes left out; none if it does not exist."""
    try:
        with os.scandir(folder) as entries:
            return [entry.name for entry in entries if not entry.name.startswith(".")]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise StoreError(f"cannot list {folder}: {error.strerror}.", folder, error.errno) from error


def _free_name(folder: Path, name: str) -> Path:
    """A name that nothing in a folder has yet, close to the one asked for."""
    taken = set(_names(folder))
    numbered = (f"{name}.{k}" for k in range(1, len(taken) + 2))
    return folder / next(found for found in (name, *numbered) if found not in taken)


def _differ(a: object, b: object) -> bool:
    try:
        return canonical_json(a) != canonical_json(b)
    except TypeError:  # one side has no such field
        return True
