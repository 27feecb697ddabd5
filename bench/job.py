"""What the work on a run's cells needs to know, and what is left of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tsdfm_bench import __version__
from tsdfm_bench.results.store import RunFolder, read_json

if TYPE_CHECKING:
    from tsdfm_bench.api import Task
    from tsdfm_bench.plan import Cell
    from tsdfm_bench.registry import Registry


@dataclass(frozen=True)
class Job:
    """What sampling needs to know beside the cells.

    Args:
        folder: where results go.
        registry: where methods are looked up.
        task: loaded.
        batches: batches per cell.
        batch_size: sequences per batch.
        device: torch device string.
        threads: CPU threads.
        cell_timeout_s: seconds the sampling of a cell may take, or None.
    """

    folder: RunFolder
    registry: Registry
    task: Task
    batches: int
    batch_size: int
    device: str
    threads: int
    cell_timeout_s: float | None = None

    def version(self, cell: Cell) -> str:
        """Versions that a refusal depends on."""
        if cell.kind == "reference":
            return __version__
        entry = self.registry.entry("methods", cell.method)
        return f"{__version__} {entry.owner}"

    def refusal(self, cell: Cell) -> str:
        """The stored reason why the method refuses this cell, or ""."""
        path = self.folder.done_path(cell.id)
        if not path.exists():
            return ""
        done = read_json(path)
        return str(done["refused"]) if done.get("refused") and done.get("version") == self.version(cell) else ""

    def missing(self, cell: Cell) -> list[int]:
        """Batches that are still to be made; none for a cell that was refused."""
        if self.refusal(cell):
            return []
        have = set(self.folder.completed_batches(cell.id))
        missing = [batch for batch in range(self.batches) if batch not in have]
        if not missing and not self.folder.done_path(cell.id).exists():
            self.folder.write_done(cell.id, self.done_mark())  # killed between the last batch and this mark
        return missing

    def done_mark(self) -> dict[str, Any]:
        """What done.json says of a finished cell."""
        return {"batches": self.batches, "batch_size": self.batch_size, "version": __version__}
