"""Tables and figures on disk, with a sidecar that says what they were made from, and whether that still holds.

`NAME.json` beside the files holds the rows used with a digest of their numbers, the sentences of the caption, what was
missing, and the published numbers shown. `state` compares it with results: a figure is stale when its rows changed,
were joined by others, or are gone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tsdfm_bench.paper_figures.base import Made
from tsdfm_bench.results.render import FORMATS, render
from tsdfm_bench.results.store import CorruptFile, check_name, read_json, write_json, write_text
from tsdfm_bench.results.style import rows_used, save_figure

FORMAT = 1
TABLE_FORMATS = ("markdown", "latex", "csv", "html", "json")


def sidecar_path(folder: Path, name: str) -> Path:
    """NAME.made.json: of its own ending, since a table is also written as NAME.json."""
    return folder / f"{check_name(name, 'figure name')}.made.json"


def save(made: Made, folder: Path, entry: str) -> list[Path]:
    """Write one table or figure and its sidecar.

    Args:
        made: from `PaperFigure.make`.
        folder: where; it is made if need be.
        entry: registered name of the figure.

    Returns:
        the files, the sidecar last.

    Raises:
        UnsafeName, StoreError: the name is no file name; the folder cannot be written.
    """
    check_name(made.name, "figure name")
    paths: list[Path] = []
    if made.table is not None:
        for format in TABLE_FORMATS:
            path = folder / f"{made.name}{FORMATS[format][0]}"
            write_text(path, render(made.table, format))
            paths.append(path)
    if made.figure is not None:
        marked = [*made.notes, *([f"Incomplete, no row for: {'; '.join(made.missing)}."] if made.missing else [])]
        paths += save_figure(made.figure, folder, made.name, made.rows, title=made.title, notes=marked)
    content = {
        "format": FORMAT,
        "name": made.name,
        "figure": entry,
        "title": made.title,
        "state": "incomplete" if made.missing else "complete",
        **rows_used(made.rows),
        "notes": made.notes,
        "missing": made.missing,
        "published": [number.model_dump(exclude_none=True) for number in made.published],
        "files": [path.name for path in paths],
    }
    write_json(sidecar_path(folder, made.name), content)
    return [*paths, sidecar_path(folder, made.name)]


def read_sidecar(folder: Path, name: str) -> dict[str, Any] | None:
    """The sidecar of a figure, or None if there is none that can be read."""
    path = sidecar_path(folder, name)
    if not path.exists():
        return None
    try:
        return read_json(path)
    except CorruptFile:
        return None


def state(made: Made, folder: Path) -> str:
    """ "not drawn", "current", "incomplete" (current, but rows are missing), or "stale: why"."""
    stored = read_sidecar(folder, made.name)
    if stored is None:
        return "not drawn"
    gone = [str(name) for name in stored.get("files", []) if not (folder / str(name)).exists()]
    if gone:
        return f"stale: {', '.join(gone)} is gone"
    now = rows_used(made.rows)
    if stored.get("digest") != now["digest"]:
        before, after = set(stored.get("rows", [])), set(now["rows"])
        return f"stale: {_change(before, after)}"
    return "incomplete" if made.missing else "current"


def _change(before: set[str], after: set[str]) -> str:
    parts = []
    if new := len(after - before):
        parts.append(f"{new} new rows")
    if old := len(before - after):
        parts.append(f"{old} rows are gone")
    return ", ".join(parts) or "the numbers of its rows changed"


def mark_stale(folder: Path, entry: str, reason: str, made: Sequence[str] = ()) -> list[str]:
    """Mark the stored files of a figure that these results no longer make as stale.

    Args:
        folder: with sidecars.
        entry: registered name of the figure.
        reason: why.
        made: names that were made now, which are left alone.

    Returns:
        the names that were marked.
    """
    marked = []
    for path in sorted(folder.glob("*.made.json")):
        name = path.name.removesuffix(".made.json")
        stored = read_sidecar(folder, name)
        if stored is not None and stored.get("figure") == entry and name not in made:
            write_json(path, {**stored, "state": f"stale: {reason}"})
            marked.append(name)
    return marked
