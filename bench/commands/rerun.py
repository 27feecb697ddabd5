"""`tsdfm-bench rerun`: make rows of a run again, from nothing but its plan, and say whether they are the same.

The rows are sampled, scored and measured in a folder of their own. Tokens are compared where both folders have them,
numbers where they do not depend on the clock. On the machine of the run everything must be equal; on another one the
networks round differently, some draws fall on the other side, and what can be asked is that no number is told apart.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tsdfm_bench.commands.folders import run_folder
from tsdfm_bench.commands.live import noted, terminable
from tsdfm_bench.config import make_config
from tsdfm_bench.console import Reporter, stdout_console
from tsdfm_bench.errors import StorageError, UsageError, unknown_name
from tsdfm_bench.guard import stdout_to_stderr
from tsdfm_bench.reproduce import sweep_keys
from tsdfm_bench.results.files import CorruptFile
from tsdfm_bench.results.store import RunFolder, read_samples
from tsdfm_bench.spec import parse_spec, split_list

if TYPE_CHECKING:
    from tsdfm_bench.results.compare import Change, Comparison
    from tsdfm_bench.results.table_model import Table

FAILED, INTERRUPTED = 1, 130
ROUNDING = 1e-6
_CLOCK = ("s", "1/s", "bytes")
_APART = ("better", "worse", "higher", "lower", "changed")


@dataclass(frozen=True)
class Again:
    """One row made again.

    Args:
        name: of the cell.
        equal, stored: sequences with the same tokens, of so many that the first run still has.
        same, numbers: numbers that are equal, of so many compared.
        apart: numbers that are told apart.
        missing: why it was not made again, or "".
    """

    name: str
    equal: int = 0
    stored: int = 0
    same: int = 0
    numbers: int = 0
    apart: tuple[str, ...] = ()
    missing: str = ""

    @property
    def verdict(self) -> str:
        """In words."""
        if self.missing:
            return f"not made again: {self.missing}"
        if self.apart:
            return f"differs: {', '.join(self.apart)}"
        if self.equal < self.stored or self.same < self.numbers:
            return "not the same, not told apart"
        return "the same tokens and numbers" if self.stored else "the same numbers"


def rerun_command(
    folder: Path | None, filters: Mapping[str, str | None], given: Mapping[str, Any], as_json: bool
) -> int:
    """Make rows again and compare.

    Args:
        folder: a run folder, "reference", or None for the newest run.
        filters: "methods", "steps", "sources": only these generators, separated by commas; None = all. Generators
            without steps or sources stay.
        given: keys of the request that say where and how it runs (out, threads, device, plugins, checkpoint).
        as_json: print JSON and nothing else.
    """
    from tsdfm_bench.results.compare import comparison_json, comparison_table
    from tsdfm_bench.results.render import to_rich
    from tsdfm_bench.sweep import prepare
    from tsdfm_bench.sweep import run as run_sweep

    first = run_folder(folder)
    plan = first.read_plan()
    wanted = select(plan, filters)
    keys = {**request_of(plan, wanted), **{key: value for key, value in given.items() if value is not None}}
    keys.setdefault("out", Path("runs") / f"rerun-{first.root.resolve().name}")
    if Path(keys["out"]).resolve() == first.root.resolve():
        raise UsageError(f"{first.root} is the run itself: name another folder with --out")
    reporter = Reporter()
    with terminable(), stdout_to_stderr():
        sweep = prepare(make_config(keys))
        try:
            with noted(sweep.folder, sweep.config.launcher.name):
                result = run_sweep(sweep, reporter)
        except KeyboardInterrupt:
            reporter.note(f"Interrupted; what is done is kept in {sweep.folder.root}, the same command goes on.")
            return INTERRUPTED
    reasons = {**result.outcome.failed, **result.outcome.skipped}
    comparison = _compared(first, sweep.folder, {str(cell["id"]) for cell in wanted})
    rows = [_again(cell, first, sweep.folder, comparison, reasons) for cell in wanted]
    if as_json:
        content = {"rows": [{**vars(row), "verdict": row.verdict} for row in rows], **comparison_json(comparison)}
        print(json.dumps(content, indent=2, allow_nan=False))
    else:
        console = stdout_console()
        console.print(to_rich(_table(first, rows), console.width))
        if any(row.apart for row in rows):
            console.print(to_rich(comparison_table(comparison), console.width))
    return FAILED if any(row.apart or row.missing for row in rows) else 0


def select(plan: Mapping[str, Any], filters: Mapping[str, str | None]) -> list[dict[str, Any]]:
    """The generators' cells of a plan that the filters leave.

    Raises:
        UsageError: a name, step count or source that the plan has not, or nothing is left.
    """
    everything = cells = [cell for cell in plan["cells"] if cell["kind"] == "method"]
    fields = {"methods": ("method", "label"), "steps": ("steps",), "sources": ("source",)}
    for key, text in filters.items():
        if text is None:
            continue
        names, known = split_list(text), dict.fromkeys(v for cell in everything for v in _values(cell, fields[key]))
        for name in names:
            if name not in known:
                raise unknown_name(key.rstrip("s"), name, list(known))
        cells = [cell for cell in cells if not (own := _values(cell, fields[key])) or own & set(names)]
    if not cells:
        raise UsageError("no generator of this run is left by these filters: tsdfm-bench status RUN lists its cells")
    return cells


def _values(cell: Mapping[str, Any], fields: Sequence[str]) -> set[str]:
    """What a cell may be called in a filter; nothing where it has no such setting."""
    return {str(cell[field]) for field in fields if cell[field] is not None}


def request_of(plan: Mapping[str, Any], cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The keys of a request for some cells of a plan: the plan's own, narrowed to their methods, steps and sources."""
    keys = sweep_keys(plan)
    made = [(cell["method"], str(cell.get("argument") or ""), dict(cell["options"])) for cell in cells]
    keys["methods"] = [text for text in keys["methods"] if _identity(str(text)) in made]
    for key, field in (("steps", "steps"), ("sources", "source")):
        needed = {cell[field] for cell in cells if cell[field] is not None}
        if keys.get(key) and needed:
            keys[key] = [value for value in keys[key] if value in needed]
    keys["batch_size"] = plan["request"]["batch_size"]
    return keys


def _identity(text: str) -> tuple[str, str, dict[str, Any]]:
    spec = parse_spec(text)
    return spec.name, str(spec.argument or ""), {key: v for key, v in spec.options.items() if key != "checkpoint"}


def _compared(first: RunFolder, second: RunFolder, wanted: set[str]) -> Comparison:
    """Everything both runs measured of the wanted cells."""
    from tsdfm_bench.results.compare import compare_runs
    from tsdfm_bench.results.schema import SchemaError, read_summary

    try:
        a, b = read_summary(first.root), read_summary(second.root)
    except SchemaError as error:
        raise StorageError(str(error)) from error
    a, b = a[a["cell"].isin(wanted)], b[b["kind"] == "method"]
    names = (str(first.root), str(second.root))
    return compare_runs(a, b, roots=(first.root, second.root), names=names, metrics=("all",))


def _again(
    cell: Mapping[str, Any], first: RunFolder, second: RunFolder, comparison: Comparison, reasons: Mapping[str, str]
) -> Again:
    key = str(cell["id"])
    found = [change for change in comparison.changes if change.a["cell"] == key and not change.reason]
    name = found[0].name if found else str(cell["label"])
    if not found:
        return Again(name, missing=reasons.get(key, "it is not in the new run (other weights or another text)"))
    equal, stored = _tokens(first, second, key, found[0].b["cell"])
    timeless = [change for change in found if change.unit not in _CLOCK]
    same = sum(change.verdict == "identical" or _rounded(change) for change in timeless)
    apart = tuple(
        dict.fromkeys(
            f"{change.metric}{f' ({change.scorer})' if change.scorer else ''}"
            for change in timeless
            if change.verdict in _APART and not _rounded(change)
        )
    )
    return Again(name, equal, stored, same, len(timeless), apart)


def _rounded(change: Change) -> bool:
    """Whether the two numbers are equal but for rounding."""
    return abs(change.b["value"] - change.a["value"]) <= ROUNDING * abs(change.a["value"])


def _tokens(first: RunFolder, second: RunFolder, ours: str, theirs: str) -> tuple[int, int]:
    """Sequences with equal tokens, and how many the first run still has."""
    equal = stored = 0
    for batch in first.completed_batches(ours):
        try:
            a, b = read_samples(first.samples_path(ours, batch)), read_samples(second.samples_path(theirs, batch))
        except (CorruptFile, FileNotFoundError):
            continue
        n = min(len(a.tokens), len(b.tokens))
        stored += n
        equal += int((np.asarray(a.tokens[:n]) == np.asarray(b.tokens[:n])).all(axis=1).sum())
    return equal, stored


def _table(first: RunFolder, rows: Sequence[Again]) -> Table:
    from tsdfm_bench.results.table_model import Table, TableColumn, TableRow, Value

    columns = [
        TableColumn("cell", "row", align="left"),
        TableColumn("tokens", "sequences", "equal / stored"),
        TableColumn("numbers", "numbers", "equal / all"),
        TableColumn("verdict", "", align="left"),
    ]
    made = [
        TableRow(
            "method",
            {
                "cell": Value(row.name, row.name),
                "tokens": Value(f"{row.equal}/{row.stored}" if row.stored else "not stored", row.equal),
                "numbers": Value(f"{row.same}/{row.numbers}", row.same),
                "verdict": Value(row.verdict, row.verdict),
            },
        )
        for row in rows
    ]
    counts = [
        f"{sum(row.verdict == verdict for row in rows)} {verdict}" for verdict in dict.fromkeys(r.verdict for r in rows)
    ]
    notes = [f"{'; '.join(counts)}. Times and calls per second are left out."]
    return Table(f"{first.root}, made again", columns, made, notes)
