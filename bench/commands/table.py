"""`tsdfm-bench table`: the table of stored results."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsdfm_bench.commands.folders import run_folder
from tsdfm_bench.console import stdout_console
from tsdfm_bench.errors import StorageError, unknown_name
from tsdfm_bench.spec import split_list
from tsdfm_bench.summary import missing_scorers

if TYPE_CHECKING:
    import pandas as pd

    from tsdfm_bench.results.table_model import Table


def table_command(
    folder: Path | None,
    format: str,
    methods: str | None = None,
    steps: str | None = None,
    sources: str | None = None,
) -> int:
    """Print the main table of a run folder or summary file.

    Args:
        folder: a run folder, a summary file, or None for the newest run.
        format: "rich" or one of `results.render.FORMATS`.
        methods, steps, sources: only these generators, separated by commas; reference rows always stay, and so do
            generators without steps.
    """
    from tsdfm_bench.results.render import FORMATS, render, to_rich
    from tsdfm_bench.results.schema import SchemaError, read_summary
    from tsdfm_bench.results.tables import MixedColumn, main_tables

    format = {"md": "markdown", "tex": "latex"}.get(format, format)
    if format != "rich" and format not in FORMATS:
        raise unknown_name("format", format, ["rich", *FORMATS])
    path = folder if folder is not None and folder.is_file() else run_folder(folder).root
    try:
        summary = read_summary(path)
    except SchemaError as error:
        raise StorageError(str(error)) from error
    summary = _only(summary, {"method": methods, "steps": steps, "source": sources})
    try:
        tables: list[Table] = main_tables(summary, notes=missing_scorers(summary), root=path if path.is_dir() else None)
    except MixedColumn as error:
        raise StorageError(str(error)) from error
    if format == "rich":
        console = stdout_console()
        for table in tables:
            console.print(to_rich(table, console.width))
    elif format == "json":
        contents = [json.loads(render(table, "json")) for table in tables]
        print(json.dumps(contents[0] if len(contents) == 1 else contents, indent=2))
    else:
        sys.stdout.write("\n".join(render(table, format) for table in tables))
    return 0


def _only(summary: pd.DataFrame, wanted: Mapping[str, str | None]) -> pd.DataFrame:
    """The rows of the generators asked for, and of the references.

    Raises:
        UsageError: a name that no row has.
    """
    generators = summary["kind"] == "method"
    keep = generators | ~generators
    for column, text in wanted.items():
        if text is None:
            continue
        values = summary[column].map(_plain)
        known = list(dict.fromkeys(values[generators & (values != "")]))
        names = split_list(text)
        for name in names:
            if name not in known:
                raise unknown_name(column, name, known)
        keep &= ~generators | values.isin([*names, ""])
    return summary[keep]


def _plain(value: Any) -> str:
    """A value of the summary as it is typed; nothing for a missing one."""
    import pandas as pd

    if pd.isna(value):
        return ""
    return f"{value:g}" if isinstance(value, float) else str(value)
