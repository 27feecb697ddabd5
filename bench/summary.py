"""From measurements to summary.parquet, summary.csv and tables/: one row per cell and number, and rows with reasons.

A cell that was refused or failed is one row that says why. A scorer that could not be obtained leaves a row without a
value in every cell, so that its absence is seen by whoever reads the file alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tsdfm_bench.results.files import write_text
from tsdfm_bench.results.store import RunFolder

if TYPE_CHECKING:
    import pandas as pd

    from tsdfm_bench.api import ScorerInfo, TaskInfo
    from tsdfm_bench.measuring import Measured
    from tsdfm_bench.plan import Cell, Plan
    from tsdfm_bench.results.table_model import Table
    from tsdfm_bench.scoring import Judge

NO_SCORES = "scores"  # the metric name of a row that says why a scorer gave none
MEMORY_HINT = "Memory ran out"
TABLE_FORMATS = ("markdown", "csv", "latex", "json")


@dataclass
class Outcome:
    """What became of a sweep.

    Args:
        skipped: cell id -> reason.
        failed: cell id -> last lines of the error.
        notes: sentences for the table.
        broken: scorers and metrics that failed, and missing ones if no named one is left, each with its reason.
    """

    skipped: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """0 if everything that was possible was done, else 1."""
        return 1 if self.failed or self.broken else 0


def first_line(text: str) -> str:
    """The first line of a message, without the announcement of a list that follows it."""
    line = text.strip().splitlines()[0] if text.strip() else ""
    return line.removesuffix("Tried:").rstrip(" .:")


def reason_of(error: str, limit: int = 300) -> str:
    """The reason in an error.txt on one line: of a traceback the exception with all lines of its message, else all.

    Args:
        error: its text, or the last lines of one.
        limit: characters of a traceback's exception, beyond which it is cut.
    """
    lines = [line for line in error.splitlines() if line.strip()]
    frames = [place for place, line in enumerate(lines) if line.startswith(("Traceback", '  File "'))]
    if not frames:
        return " ".join(error.split())
    hint = lines.pop().strip() if lines[-1].startswith(MEMORY_HINT) else ""
    # below the last frame its source is indented, and the exception is not
    begin = next((i for i in range(frames[-1] + 1, len(lines)) if not lines[i].startswith(" ")), len(lines) - 1)
    text = " ".join(" ".join(lines[begin:]).split())
    text = text if len(text) <= limit else text[: limit - 3] + "..."
    return f"{text} {hint}".strip()


def _cell_fields(cell: Cell, checkpoint: str) -> dict[str, Any]:
    """The columns that say which cell a row is about."""
    return {
        "task": cell.task,
        "tokenizer": cell.tokenizer,
        "data_hash": cell.data_hash,
        "method": cell.method,
        "label": cell.label,
        "kind": cell.kind,
        "checkpoint": checkpoint,
        "weights": cell.weights,
        "source": cell.source or "",
        "length": cell.length,
        "steps": cell.steps,
        "temperature": cell.temperature,
        "top_p": cell.top_p,
        "top_p_rule": cell.top_p_rule or "",
        "draw": cell.draw or "",
        "prefix": cell.prefix,
        "seed": cell.seed,
        "cell": cell.id,
    }


def build_summary(
    plan: Plan, measured: Mapping[str, Measured], judges: Sequence[Judge], outcome: Outcome
) -> pd.DataFrame:
    """The summary of a sweep, flags included.

    Args:
        plan: what was asked.
        measured: numbers by cell id.
        judges: the scorers, with what went wrong.
        outcome: cells without numbers.
    """
    from tsdfm_bench.results.flags import with_flags
    from tsdfm_bench.results.schema import from_rows

    rows: list[dict[str, Any]] = []
    for planned in plan.cells:
        cell = planned.cell
        if cell.hidden:
            continue
        fields = _cell_fields(cell, planned.checkpoint)
        if cell.id in measured:
            rows += _done_rows(fields, measured[cell.id], judges, cell.id, plan.task)
        elif cell.id in outcome.skipped:
            rows.append({**fields, "state": "skipped", "reason": outcome.skipped[cell.id]})
        elif cell.id in outcome.failed:
            rows.append({**fields, "state": "failed", "reason": outcome.failed[cell.id]})
    for rejected in plan.rejected:
        fields = _cell_fields(rejected.cell, "none")
        rows.append({**fields, "state": rejected.state, "reason": rejected.reason})
    return with_flags(from_rows(rows))


def may_have_seen(scorer: ScorerInfo, task: TaskInfo) -> str:
    """Why a scorer may have been trained on a task's text; "" if there is no reason to think so."""
    if not (scorer.trained_on and task.public):
        return ""
    return f"{scorer.title} was trained on {scorer.trained_on}; the text of {task.name} is {task.public}"


def _done_rows(
    fields: Mapping[str, Any], measured: Measured, judges: Sequence[Judge], cell: str, task: TaskInfo
) -> list[dict[str, Any]]:
    common: dict[str, Any] = {**fields, "state": "done"}
    if measured.cost is not None:
        common |= {
            "calls": sum(measured.cost.calls.values()),
            "sequence_calls": sum(measured.cost.sequence_calls.values()),
            "seconds": measured.cost.seconds,
            "device": measured.cost.device,
        }
    about = {judge.name: judge for judge in judges}
    rows = []
    for row in measured.rows:
        judge = about.get(row["scorer"])
        info = judge.info if judge is not None else None
        scorer = (
            {}
            if info is None
            else {
                "scorer_title": info.title,
                "scorer_revision": info.revision,
                "scorer_dtype": info.dtype,
                "scorer_seen": may_have_seen(info, task),
            }
        )
        rows.append({**common, **scorer, **row})
    for judge in judges:
        reason = judge.problem or judge.failures.get(cell) or measured.without.get(judge.name, "")
        if reason:
            rows.append({**common, "metric": NO_SCORES, "scorer": judge.name, "reason": first_line(reason)})
    for metric, reason in measured.failures.items():
        rows.append({**common, "metric": metric, "reason": first_line(reason)})
    if not rows:
        rows.append({**common, "metric": "none", "reason": "no metric applies to it"})
    return rows


def missing_scorers(summary: pd.DataFrame) -> list[str]:
    """Sentences about scorers that gave no scores, from the rows that say so."""
    rows = summary[summary["metric"] == NO_SCORES]
    pairs = dict.fromkeys(zip(rows["scorer"], rows["reason"], strict=True))
    return [f"Scorer {scorer} is missing: {reason}" for scorer, reason in pairs]


def write_results(folder: RunFolder, summary: pd.DataFrame, notes: Sequence[str]) -> list[Table]:
    """Write summary.parquet, summary.csv and tables/, and return the tables.

    Raises:
        StoreError: a file cannot be written.
    """
    from tsdfm_bench.results.render import FORMATS, render
    from tsdfm_bench.results.schema import write_summary
    from tsdfm_bench.results.tables import main_tables

    write_summary(folder.root, summary)
    tables = main_tables(summary, notes=notes, root=folder.root)
    for i, table in enumerate(tables):
        name = "main" if len(tables) == 1 else f"main-{i + 1}"
        for format in TABLE_FORMATS:
            write_text(folder.tables_folder / f"{name}{FORMATS[format][0]}", render(table, format))
    return tables
