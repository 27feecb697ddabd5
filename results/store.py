"""The run folder: where a sweep keeps its plan, samples, scores and summary, and what is already done.

    plan.json                       frozen: the whole request, written once
    cells/<id>/cell.json            what this cell is
    cells/<id>/samples-NNNN.npz     batch NNNN, always the same sequences however the work was split
    cells/<id>/cost.json            what sampling cost
    cells/<id>/done.json            exists when every batch does; or error.txt, the last failure
    cells/<id>/heartbeat            who works on it and when it was last seen
    scores/<scorer>/<id>.parquet    token NLLs, one row a sequence
    features/<name>/<id>.npz        feature vectors, one row a sequence
    summary.parquet, summary.csv    one row a cell x metric x scorer
    tables/ figures/ jobs/ report.html verdicts.json

State is derived from which files exist, never stored twice: a killed process leaves nothing to repair. Listing looks at
names only (one folder scan per cell); contents are verified when they are read.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
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
    "CellState",
    "CorruptFile",
    "PlanConflict",
    "RunFolder",
    "Samples",
    "Scores",
    "StoreError",
    "UnsafeName",
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

_SAMPLES = re.compile(r"samples-(\d{4,})\.npz")


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

    def cell_folder(self, cell: str) -> Path:
        """cells/<id>."""
        return self.root / "cells" / check_name(cell, "cell id")

    def cell_path(self, cell: str) -> Path:
        """cells/<id>/cell.json."""
        return self.cell_folder(cell) / "cell.json"

    def samples_path(self, cell: str, batch: int) -> Path:
        """cells/<id>/samples-NNNN.npz."""
        if batch < 0:
            raise ValueError(f"batch numbers start at 0, not {batch}")
        return self.cell_folder(cell) / f"samples-{batch:04d}.npz"

    def cost_path(self, cell: str) -> Path:
        """cells/<id>/cost.json."""
        return self.cell_folder(cell) / "cost.json"

    def done_path(self, cell: str) -> Path:
        """cells/<id>/done.json."""
        return self.cell_folder(cell) / "done.json"

    def error_path(self, cell: str) -> Path:
        """cells/<id>/error.txt."""
        return self.cell_folder(cell) / "error.txt"

    def heartbeat_path(self, cell: str) -> Path:
        """cells/<id>/heartbeat."""
        return self.cell_folder(cell) / "heartbeat"

    def scores_path(self, scorer: str, cell: str) -> Path:
        """scores/<scorer>/<id>.parquet; a scorer name like "hf:org/model" is made a file name by `slug`."""
        return self.root / "scores" / slug(scorer) / f"{check_name(cell, 'cell id')}.parquet"

    def features_path(self, name: str, cell: str) -> Path:
        """features/<name>/<id>.npz."""
        return self.root / "features" / slug(name) / f"{check_name(cell, 'cell id')}.npz"

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

    def write_done(self, cell: str, content: Mapping[str, Any]) -> None:
        """Mark a cell as done and forget an earlier failure."""
        write_json(self.done_path(cell), content)
        self.clear_error(cell)

    def beat(self, cell: str) -> None:
        """Say that this process is working on a cell now."""
        content = {"time": time.time(), "host": socket.gethostname(), "pid": os.getpid()}
        write_json(self.heartbeat_path(cell), content, checksum=False)

    def heartbeat_age_s(self, cell: str) -> float | None:
        """Seconds since the last heartbeat, or None if there is none."""
        try:
            return max(0.0, time.time() - self.heartbeat_path(cell).stat().st_mtime)
        except FileNotFoundError:
            return None

    # ---------------------------------------------------------------------------------------------- cells, read

    def cells(self) -> list[str]:
        """Ids of all cells that have a folder, sorted."""
        return sorted(_names(self.root / "cells"))

    def completed_batches(self, cell: str, *, verify: bool = False) -> list[int]:
        """Numbers of the batches that exist, sorted.

        Args:
            cell: its id.
            verify: read every file and leave damaged ones out (slow).
        """
        found = sorted(int(m[1]) for name in _names(self.cell_folder(cell)) if (m := _SAMPLES.fullmatch(name)))
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
        names = _names(self.root / "scores" / slug(scorer))
        return {name.removesuffix(".parquet") for name in names if name.endswith(".parquet")}


def _names(folder: Path) -> list[str]:
    """File and folder names in a folder, unfinished writes left out; none if it does not exist."""
    try:
        with os.scandir(folder) as entries:
            return [entry.name for entry in entries if not entry.name.startswith(".")]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise StoreError(f"cannot list {folder}: {error.strerror}.", folder, error.errno) from error


def _differ(a: object, b: object) -> bool:
    try:
        return canonical_json(a) != canonical_json(b)
    except TypeError:  # one side has no such field
        return True
