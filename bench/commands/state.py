"""How far the cells of a plan are, read from the run folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tsdfm_bench.launch.leases import working
from tsdfm_bench.results.store import RunFolder, StoreError, read_json
from tsdfm_bench.summary import reason_of


@dataclass(frozen=True)
class CellReport:
    """One cell of a plan and how far it is.

    Args:
        id, kind, label, source, steps, length: what it is.
        settings: temperature, nucleus, draw and pinning where they are not the usual ones.
        state: "done", "running", "partial", "missing", "failed", "refused", or "skipped" and "failed" for rows without
            work.
        completed, batches: stored and wanted.
        reason: why it failed or was refused.
    """

    id: str
    kind: str
    label: str
    source: str | None
    steps: int | None
    length: int
    settings: str
    state: str
    completed: int
    batches: int
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


def report_cells(plan: Mapping[str, Any], folder: RunFolder) -> list[CellReport]:
    """Reports of every cell of a plan (the content of plan.json), rows without work last."""
    batches = -(-int(plan["samples"]) // int(plan["request"]["batch_size"]))
    reports = []
    held = working(folder.leases_folder)
    for cell in plan["cells"]:
        state, completed, reason = _state(folder, str(cell["id"]), batches, str(cell["id"]) in held)
        reports.append(_report(cell, state, completed, batches, reason))
    reports += [_report(row, str(row["state"]), 0, 0, str(row["reason"])) for row in plan["not_run"]]
    return reports


def _state(folder: RunFolder, cell: str, batches: int, held: bool) -> tuple[str, int, str]:
    found = folder.state(cell, batches)
    if found.state == "done":
        return "done", min(found.completed, batches), ""
    if found.completed == 0 and folder.done_path(cell).exists():
        try:
            refused = read_json(folder.done_path(cell)).get("refused")
        except StoreError as error:
            return "failed", 0, str(error)
        if refused:
            return "refused", 0, str(refused)
    if held:
        return "running", found.completed, ""
    if found.state == "failed":
        return "failed", found.completed, reason_of(folder.read_error(cell, lines=1000))
    return found.state, found.completed, ""


def _report(cell: Mapping[str, Any], state: str, completed: int, batches: int, reason: str) -> CellReport:
    label = str(cell.get("label") or cell["method"])
    return CellReport(
        id=str(cell["id"]),
        kind=str(cell["kind"]),
        label=label,
        source=cell["source"],
        steps=cell["steps"],
        length=int(cell["length"]),
        settings=_settings(cell),
        state=state,
        completed=completed,
        batches=batches,
        reason=reason,
    )


def _settings(cell: Mapping[str, Any]) -> str:
    parts = []
    if cell["temperature"] not in (None, 1, 1.0):
        parts.append(f"temperature {cell['temperature']:g}")
    if cell["top_p"] is not None:
        parts.append(f"top-p {cell['top_p']:g} {cell['top_p_rule']}")
    if cell["draw"] not in (None, "fp64"):
        parts.append(str(cell["draw"]))
    if cell["prefix"]:
        parts.append(f"pinned: {cell['prefix']}")
    return ", ".join(parts)
