"""`tsdfm-bench compare`: two runs cell by cell, with intervals and a correction for looking often."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from tsdfm_bench.commands.folders import run_folder
from tsdfm_bench.console import stdout_console
from tsdfm_bench.errors import StorageError, UsageError

if TYPE_CHECKING:
    import pandas as pd


def compare_command(first: Path, second: Path, metrics: str | None, as_json: bool) -> int:
    """Print what got better and worse from the first run to the second, by network and over training seeds.

    Args:
        first, second: run folders or summary files; "reference" = the recorded results.
        metrics: names, separated by commas, or "all"; None = those of the main table.
        as_json: print JSON and nothing else.
    """
    from tsdfm_bench.results.compare import compare_runs, comparison_json, comparison_table
    from tsdfm_bench.results.render import to_rich

    (a, root_a), (b, root_b) = _read(first), _read(second)
    wanted = None if metrics is None else [name.strip() for name in metrics.split(",") if name.strip()]
    known = sorted({name for name in [*a["metric"], *b["metric"]] if name})
    for name in wanted or []:
        if name != "all" and name not in known:
            raise UsageError(f"neither run has the metric '{name}'. They have: {', '.join(known)}, or all.")
    found = compare_runs(a, b, roots=(root_a, root_b), names=(str(first), str(second)), metrics=wanted)
    if not found.changes:
        raise UsageError(
            f"{first} and {second} have no cell in common: same task, length, method and settings are needed. "
            f"First: {'; '.join(found.only_a) or 'nothing done'}. Second: {'; '.join(found.only_b) or 'nothing done'}."
        )
    if as_json:
        print(json.dumps(comparison_json(found), indent=2, allow_nan=False))
    else:
        console = stdout_console()
        console.print(to_rich(comparison_table(found), console.width))
    return 0


def _read(path: Path) -> tuple[pd.DataFrame, Path | None]:
    """A summary and the run folder it belongs to."""
    from tsdfm_bench.results.schema import SchemaError, read_summary

    if not path.is_file():
        path = run_folder(path).root
    try:
        return read_summary(path), path if path.is_dir() else None
    except SchemaError as error:
        raise StorageError(str(error)) from error
