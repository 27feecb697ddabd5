"""`tsdfm-bench plot`: figures of any run, as PDF, SVG and PNG."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from tsdfm_bench.commands.folders import run_folder
from tsdfm_bench.console import say, stdout_console
from tsdfm_bench.errors import StorageError, UsageError, unknown_name

if TYPE_CHECKING:
    from tsdfm_bench.results.plots import Drawing


def plot_command(
    folder: Path | None, kinds: str | None, out: Path | None, scorer: str | None, metric: str | None, as_json: bool
) -> int:
    """Draw and write figures of a run, and say what they show.

    Args:
        folder: a run folder, a summary file, or None for the newest run.
        kinds: names, separated by commas; None = every kind that the results allow.
        out: where the files go; None = figures/ of the run folder.
        scorer: only this one.
        metric: a perplexity convention, for example "sedd".
        as_json: print JSON and nothing else.

    Returns:
        0; 1 if none of the figures could be drawn.
    """
    from tsdfm_bench.results.evidence import MixedEvidence, refuse_mixed
    from tsdfm_bench.results.plots import KINDS, NothingToDraw, draw
    from tsdfm_bench.results.replicates import Replicates
    from tsdfm_bench.results.schema import SchemaError, read_summary
    from tsdfm_bench.results.style import save_figure

    wanted = list(KINDS) if kinds is None else [name.strip() for name in kinds.split(",") if name.strip()]
    for name in wanted:
        if name not in KINDS:
            raise unknown_name("kind of figure", name, KINDS)
    path = folder if folder is not None and folder.is_file() else run_folder(folder).root
    try:
        summary = read_summary(path)
        refuse_mixed(summary)
    except (SchemaError, MixedEvidence) as error:
        raise StorageError(str(error)) from error
    root = path if path.is_dir() else None
    target = out if out is not None else (root if root is not None else Path()) / "figures"
    replicates = Replicates(summary, root)
    convention = None if metric is None else metric if metric in set(summary["metric"]) else f"gen_ppl/{metric}"
    if convention is not None and convention not in set(summary["metric"]):
        known = sorted({name for name in summary["metric"] if name.startswith("gen_ppl")})
        raise UsageError(f"no perplexity '{metric}' here. There are: {', '.join(known) or 'none'}.")
    reports, missing = [], {}
    for kind in wanted:
        try:
            drawings = draw(kind, summary, scorer=scorer, metric=convention, replicates=replicates)
        except NothingToDraw as error:
            missing[kind] = str(error)
            continue
        for drawing in drawings:
            paths = save_figure(
                drawing.figure, target, drawing.name, drawing.rows, title=drawing.title, notes=drawing.notes
            )
            reports.append((kind, drawing, paths))
    for sentence in replicates.damaged.values():
        say(f"note: {sentence}")
    if as_json:
        figures = [
            {
                "kind": kind,
                "title": drawing.title,
                "files": [str(path) for path in paths],
                "notes": drawing.notes,
                "rows": len(drawing.rows),
            }
            for kind, drawing, paths in reports
        ]
        print(json.dumps({"figures": figures, "not_drawn": missing}, indent=2, ensure_ascii=False))
    else:
        for _, drawing, paths in reports:
            _say(drawing, paths)
        for kind, reason in missing.items():
            say(f"{kind}: not drawn; {reason}")
    return 0 if reports else 1


def _say(drawing: Drawing, paths: list[Path]) -> None:
    from rich.padding import Padding
    from rich.text import Text

    console = stdout_console()
    cells = len({row["cell"] for row in drawing.rows})
    console.print(Text(drawing.title, style="bold"))
    console.print(Text(f"  {paths[0].with_suffix('')}.{{{','.join(p.suffix[1:] for p in paths)}}}", style="cyan"))
    console.print(Padding(Text(f"{len(drawing.rows)} rows of {cells} cells", style="dim"), (0, 0, 0, 2)))
    for note in drawing.notes:
        console.print(Padding(Text(note, style="dim"), (0, 0, 0, 2)))
    console.print()
