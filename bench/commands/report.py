"""`tsdfm-bench report`: one HTML file about a run, readable without network and without JavaScript."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tsdfm_bench import __version__, provenance
from tsdfm_bench.commands.folders import run_folder
from tsdfm_bench.console import say, stdout_console
from tsdfm_bench.errors import BenchError, StorageError
from tsdfm_bench.registry import Registry
from tsdfm_bench.results.store import CorruptFile, RunFolder, StoreError, read_json, read_samples, write_text

if TYPE_CHECKING:
    import pandas as pd

    from tsdfm_bench.api import Task
    from tsdfm_bench.results.report.model import Material, Pending, Texts, Trace

TEXTS = 8
MOST_TRACED = 24


@dataclass(frozen=True)
class Asked:
    """What `tsdfm-bench report` was asked for.

    Args:
        folder: run folder or summary file; None = the newest run.
        out: the file; None = report.html of the run folder (of the working folder for a summary file).
        texts: sequences per row to show.
        traces: sequences per generator to record now, by sampling them again; 0 = show what is stored.
        teacher: label of the row that texts are compared with.
        claims: claims file; None = the paper's.
        plugins: local plug-in files.
        as_json: print JSON and nothing else.
    """

    folder: Path | None = None
    out: Path | None = None
    texts: int = TEXTS
    traces: int = 0
    teacher: str | None = None
    claims: Path | None = None
    plugins: tuple[Path, ...] = ()
    as_json: bool = False


def report_command(asked: Asked) -> int:
    """Write the report and say where it is."""
    from tsdfm_bench.results.report import render_report
    from tsdfm_bench.results.tables import MixedColumn

    material, target = gather(asked)
    try:
        html = render_report(material)
    except MixedColumn as error:
        raise StorageError(str(error)) from error
    write_text(target, html)
    size = len(html.encode("utf-8"))
    notes = [*material.notes, *(note for note in (material.claims_note, material.texts_note) if note)]
    if asked.as_json:
        content = {"file": str(target), "bytes": size, "rows": int(material.summary["cell"].nunique()), "notes": notes}
        print(json.dumps(content, indent=2, ensure_ascii=False))
    else:
        for note in notes:
            say(f"note: {note}")
        stdout_console().print(f"Report: {target}  ({size / 1e6:.2f} MB)", highlight=False, soft_wrap=True)
    return 0


def gather(asked: Asked) -> tuple[Material, Path]:
    """Everything that the page shows, and the file it goes to.

    Raises:
        UsageError: no such run.
        StorageError: the summary is of another schema.
    """
    from tsdfm_bench.results.report.model import Material
    from tsdfm_bench.summary import missing_scorers

    single = asked.folder is not None and asked.folder.is_file()
    path = asked.folder if single and asked.folder is not None else run_folder(asked.folder).root
    folder = None if single else RunFolder(path)
    summary = _summary(path)
    notes = missing_scorers(summary)
    plan = _plan(folder, notes)
    traces_note = ""
    if folder is not None and asked.traces and plan:
        traces_note = " ".join(_record(folder, asked))
    texts, traces, texts_note = _decoded(folder, plan, summary, asked)
    verdicts, title, claims_note = _verdicts(path, summary, asked.claims)
    material = Material(
        name=path.resolve().name if folder is not None else path.name,
        summary=summary,
        root=folder.root if folder is not None else None,
        verdicts=verdicts,
        claims_title=title,
        claims_note=claims_note,
        texts=texts,
        texts_note=texts_note,
        traces=traces,
        traces_note=traces_note or ("" if traces else _no_traces(folder)),
        teacher=asked.teacher,
        commands=_commands(plan),
        pending=_pending(folder, plan, summary),
        provenance=_provenance(folder),
        notes=notes,
        made_by=f"tsdfm-bench {__version__}",
        command=shlex.join(["tsdfm-bench", "report", path.name]),
    )
    default = folder.report_path if folder is not None else Path("report.html")
    return material, asked.out if asked.out is not None else default


def _summary(path: Path) -> pd.DataFrame:
    from tsdfm_bench.results.schema import SchemaError, empty, read_summary

    if path.is_dir() and not (path / "summary.parquet").exists():
        return empty()
    try:
        return read_summary(path)
    except SchemaError as error:
        raise StorageError(str(error)) from error


def _plan(folder: RunFolder | None, notes: list[str]) -> dict[str, Any]:
    """plan.json, or {} (with a note if it is damaged)."""
    if folder is None:
        return {}
    try:
        return folder.read_plan()
    except StoreError as error:
        notes.append(f"The plan cannot be read, so commands and what is missing are not shown: {error}")
        return {}


def _record(folder: RunFolder, asked: Asked) -> list[str]:
    from tsdfm_bench.tracing import record_traces

    try:
        return record_traces(folder, asked.traces, list(asked.plugins))
    except BenchError as error:
        return [f"Nothing was recorded: {error}"]


def _no_traces(folder: RunFolder | None) -> str:
    if folder is None:
        return "A summary file holds no traces; name the run folder."
    return (
        "No trace is stored in this run folder. tsdfm-bench report RUN --traces 2 samples two sequences of each row "
        "again, keeping every step."
    )


# ---------------------------------------------------------------------------------------------- texts and traces


def _decoded(
    folder: RunFolder | None, plan: Mapping[str, Any], summary: pd.DataFrame, asked: Asked
) -> tuple[dict[str, Texts], list[Trace], str]:
    """Texts and traces of the cells of the summary, and why there are none."""
    from tsdfm_bench.results.store import batches_in

    if folder is None:
        return {}, [], "A summary file holds no samples; name the run folder."
    cells = list(dict.fromkeys(summary["cell"]))
    stored = {cell: batches for cell in cells if (batches := batches_in(folder.contents(cell)))}
    traced = [cell for cell in cells if folder.trace_path(cell).exists()]
    if not stored and not traced:
        return (
            {},
            [],
            (
                "No samples are stored in this run folder, only numbers (as in the recorded results). "
                "The command of a row, below, makes them again."
            ),
        )
    try:
        task = _task(plan, asked)
    except BenchError as error:
        return {}, [], f"The samples cannot be decoded: {error}"
    texts: dict[str, Texts] = {}
    damaged: list[str] = []
    for cell, batches in stored.items():
        try:
            texts[cell] = _texts(folder, cell, batches, task, asked.texts)
        except CorruptFile as error:
            damaged.append(str(error))
    note = " ".join(damaged)
    if not texts and not damaged:
        note = "No samples are stored in this run folder, only traces."
    return texts, _traces(folder, traced, task, summary), note


def _task(plan: Mapping[str, Any], asked: Asked) -> Task:
    from tsdfm_bench.spec import parse_spec
    from tsdfm_bench.sweep import load_task

    request = plan.get("request")
    if not isinstance(request, dict) or not request.get("task"):
        raise StorageError("the plan does not say which task they are of")
    return load_task(parse_spec(str(request["task"])), Registry(list(asked.plugins)))


def _texts(folder: RunFolder, cell: str, batches: list[int], task: Task, count: int) -> Texts:
    from tsdfm_bench.results.report.model import Texts
    from tsdfm_bench.texts import texts_of

    found: list[str] = []
    size = 0
    for batch in batches:
        if len(found) >= count:
            break
        samples = read_samples(folder.samples_path(cell, batch))
        size = len(samples.tokens)
        found += texts_of(samples, task)
    return Texts(found[:count], size * len(batches))


def _traces(folder: RunFolder, cells: list[str], task: Task, summary: pd.DataFrame) -> list[Trace]:
    from tsdfm_bench.results.report.model import Trace
    from tsdfm_bench.tracing import read_traces

    known = summary[summary["steps"].notna()]
    steps = {str(cell): int(count) for cell, count in zip(known["cell"], known["steps"], strict=True)}
    found = []
    for number in range(MOST_TRACED):  # the first sequence of every row, then the second, ...
        for cell in cells:
            for trace in read_traces(folder, cell)[number : number + 1]:
                pieces = _pieces(task, trace.states)
                recorded = trace.steps.tolist()
                found.append(Trace(cell, trace.sequence, recorded, trace.states, pieces, steps.get(cell)))
        if len(found) >= MOST_TRACED:
            break
    return found[:MOST_TRACED]


def _pieces(task: Task, states: np.ndarray) -> dict[int, str]:
    """Token id -> its text, for real tokens; what is outside the vocabulary is a mask."""
    ids = [int(i) for i in np.unique(states) if 0 <= i < task.info.vocab_size]
    texts = task.decode(np.asarray(ids, dtype=np.int64)[:, None], np.ones(len(ids), dtype=np.int64)) if ids else []
    apart = task.decode(np.asarray([ids[:1] * 2]), np.asarray([2]))[0] if ids else ""
    gap = " " if ids and apart != texts[0] * 2 else ""  # tokens that the task writes with blanks between them
    return {i: text + gap for i, text in zip(ids, texts, strict=True)}


# ------------------------------------------------------------------------------------------------ the other parts


def _verdicts(path: Path, summary: pd.DataFrame, claims: Path | None) -> tuple[list[dict[str, Any]], str, str]:
    """Verdicts as JSON, the title of the claims, and why there are none."""
    from tsdfm_bench.commands.verify import read_claims_file
    from tsdfm_bench.results.claims import verify
    from tsdfm_bench.results.evidence import MixedEvidence, load_evidence

    read = read_claims_file(claims)
    title = " ".join(part for part in (read.title, f"({read.citation})" if read.citation else "") if part)
    if summary.empty:
        return [], title, "No claim was tested: nothing has been measured yet."
    try:
        verdicts = verify(load_evidence(path), read)
    except (MixedEvidence, StoreError) as error:
        return [], title, f"No claim was tested: {error}"
    return [verdict.to_json() for verdict in verdicts], title, ""


def _commands(plan: Mapping[str, Any]) -> dict[str, str]:
    from tsdfm_bench.reproduce import command_of, row_keys

    entries = [*plan.get("cells", ()), *plan.get("not_run", ())]
    return {entry["id"]: command_of(row_keys(entry, plan)) for entry in entries}


def _pending(folder: RunFolder | None, plan: Mapping[str, Any], summary: pd.DataFrame) -> list[Pending]:
    """Planned cells that the summary does not know."""
    from tsdfm_bench.plan import Cell
    from tsdfm_bench.results.report.model import Pending

    if folder is None:
        return []
    known = set(summary["cell"])
    fields = set(Cell.__dataclass_fields__)
    found = []
    for entry in plan.get("cells", ()):
        cell = Cell(**{key: value for key, value in entry.items() if key in fields})
        if entry["id"] in known or cell.hidden:
            continue
        state = folder.state(entry["id"])
        told = "sampled" if state.state == "done" else state.state
        reason = {"done": "not measured yet", "partial": str(state)}.get(state.state, state.error)
        found.append(Pending(entry["id"], cell.describe(), told, reason))
    return found


def _provenance(folder: RunFolder | None) -> list[dict[str, Any]]:
    if folder is None or not (folder.root / provenance.FILE).exists():
        return []
    try:
        runs = read_json(folder.root / provenance.FILE).get("runs")
    except StoreError:
        return []
    return [run for run in runs if isinstance(run, dict)] if isinstance(runs, list) else []
