"""`tsdfm-bench table`: the table of stored results."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tsdfm_bench.commands.folders import run_folder
from tsdfm_bench.console import stdout_console
from tsdfm_bench.errors import StorageError, unknown_name
from tsdfm_bench.summary import missing_scorers

if TYPE_CHECKING:
    from tsdfm_bench.results.table_model import Table


def table_command(folder: Path | None, format: str) -> int:
    """Print the main table of a run folder or summary file.

    Args:
        folder: a run folder, a summary file, or None for the newest run.
        format: "rich" or one of `results.render.FORMATS`.
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
