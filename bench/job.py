"""What the work on a run's cells needs to know, and what is left of it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from tsdfm_bench import __version__, console
from tsdfm_bench.launch.leases import Leases
from tsdfm_bench.launch.settings import DEFAULT_LEASE_S
from tsdfm_bench.launch.work import SHARD_BATCHES
from tsdfm_bench.plan import ORACLE
from tsdfm_bench.registry import code_of
from tsdfm_bench.results.files import json_hash
from tsdfm_bench.results.store import CorruptFile, RunFolder, batches_in, read_arrow, read_json, read_samples, remove

if TYPE_CHECKING:
    from tsdfm_bench.api import ExactHook, Method, Task
    from tsdfm_bench.plan import Cell, PlannedCell
    from tsdfm_bench.registry import Registry


_READERS: Mapping[str, Callable[[Path], object]] = {
    ".json": read_json,
    ".npz": read_samples,
    ".parquet": read_arrow,
}


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
        lease_s: seconds without a sign of life after which a worker counts as dead.
        retry_failed: try again what failed before, also where nothing has changed since.
        patient: wait for what other living processes work on; else leave it to them.
        name: of the job this process works on; "" = of none.
        say: tells a person something in passing.
    """

    folder: RunFolder
    registry: Registry
    task: Task
    batches: int
    batch_size: int
    device: str
    threads: int
    cell_timeout_s: float | None = None
    lease_s: float = DEFAULT_LEASE_S
    retry_failed: bool = False
    patient: bool = True
    name: str = ""
    say: Callable[[str], None] = console.say

    @cached_property
    def leases(self) -> Leases:
        """The leases of the run folder."""
        return Leases(self.folder.leases_folder, self.lease_s)

    def load(self, planned: PlannedCell) -> Method:
        """The method of a cell, around its weights or around the task's exact predictions."""
        cls = self.registry.load("methods", planned.cell.method)
        params = dict(planned.params)
        if params.get("checkpoint") == ORACLE:
            made: Method = cls.from_oracle(cast("ExactHook", self.task).oracle, params, self.device)
            return made
        loaded: Method = cls.load(params, self.device)
        return loaded

    # -------------------------------------------------------------------------------------------- what is left

    def version(self, cell: Cell) -> str:
        """Versions, and the code of a plug-in, that a refusal depends on."""
        if cell.kind == "reference":
            return __version__
        entry = self.registry.entry("methods", cell.method)
        return " ".join([__version__, entry.owner, *([json_hash(code)[:16]] if (code := code_of(entry)) else [])])

    def refusal(self, cell: Cell) -> str:
        """The stored reason why the method refuses this cell, or ""."""
        done = self._done(cell) or {}
        return str(done["refused"]) if done.get("refused") and done.get("version") == self.version(cell) else ""

    def _done(self, cell: Cell) -> dict[str, Any] | None:
        try:
            return read_json(self.folder.done_path(cell.id))
        except FileNotFoundError:
            return None
        except CorruptFile as error:
            self.damaged(error)
            return None

    def missing(self, cell: Cell, shard: int | None = None) -> list[int]:
        """Batches that are still to be made; none for a cell that was refused.

        Args:
            cell: which.
            shard: only its batches; None = all.
        """
        names = self.folder.contents(cell.id)
        done = self._done(cell) if "done.json" in names else None
        if done is not None and done.get("refused") and done.get("version") == self.version(cell):
            return []
        have = set(batches_in(names))
        missing = [batch for batch in range(self.batches) if batch not in have]
        if not missing and done is None:  # killed between the last batch and this mark, or a file went to quarantine
            missing = self._uncosted(cell)
            if not missing:
                self.folder.write_done(cell.id, self.done_mark())
        if shard is not None:
            missing = [batch for batch in missing if batch // SHARD_BATCHES == shard]
        return missing

    def _uncosted(self, cell: Cell) -> list[int]:
        """Batches without a cost; a cost is stored before its samples, so there are none unless a file was damaged."""
        from tsdfm_bench.launch.batches import read_costs

        if cell.kind == "reference":
            return []
        costs = read_costs(self.folder, cell.id, self.damaged)
        return [batch for batch in range(self.batches) if batch not in costs]

    def done_mark(self) -> dict[str, Any]:
        """What done.json says of a finished cell."""
        return {"batches": self.batches, "batch_size": self.batch_size, "version": __version__}

    # ------------------------------------------------------------------------------------------------ failures

    def mark(self, kind: str, name: str) -> str:
        """Hash of what a failure of a plug-in depends on: its code, the harness, the device and the time limit.

        Args:
            kind: "methods" or "scorers".
            name: registered.
        """
        entry = self.registry.entry(kind, name)
        return json_hash([__version__, entry.owner, code_of(entry), self.device, self.cell_timeout_s])

    def remembers_failure(self, cell: Cell) -> bool:
        """Whether the last try of a cell failed for a reason that still holds, so that it is not tried again."""
        if self.retry_failed or cell.kind != "method":
            return False
        with contextlib.suppress(FileNotFoundError, CorruptFile):
            return read_json(self.folder.failure_path(cell.id)).get("mark") == self.mark("methods", cell.method)
        return False

    # -------------------------------------------------------------------------------------------------- damage

    def damaged(self, error: CorruptFile) -> None:
        """Move a damaged file to quarantine/, and say so; see `RunFolder.quarantine`.

        Lost costs can only be had by sampling again, so their cell is not done any more.
        """
        path = Path(error.path)
        if path.name.startswith("cost") and path.exists():
            remove(path.with_name("done.json"))
        if said := self.folder.quarantine(error, _READERS.get(path.suffix)):
            self.say(f"{said}.")
