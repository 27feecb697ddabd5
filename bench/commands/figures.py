"""`tsdfm-bench figures`: the paper's tables and figures, from stored results alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsdfm_bench.console import say, stdout_console
from tsdfm_bench.errors import BenchError, PluginError, StorageError
from tsdfm_bench.guard import shielded
from tsdfm_bench.registry import Registry, one_line
from tsdfm_bench.results.store import RECORDED

if TYPE_CHECKING:
    from tsdfm_bench.paper_figures.base import Made, PaperFigure
    from tsdfm_bench.results.evidence import Evidence

SWEEPS = "paper_figures/sweeps"


def figures_command(
    results: Path | None, only: str | None, out: Path | None, plugins: list[Path], listed: bool, as_json: bool
) -> int:
    """Draw the figures that the results allow, or list them with their state.

    Args:
        results: run folder, folder of run folders, or summary file; None = the recorded results.
        only: names, separated by commas; None = all.
        out: folder for the files; None = figures/ of the run folder, or figures/ here for other results.
        plugins: local plug-in files.
        listed: say what is current, stale or not drawn, without drawing anything.
        as_json: print JSON and nothing else.

    Returns:
        0; 1 if a figure failed, or none of those asked for could be drawn.
    """
    from tsdfm_bench.results.evidence import MixedEvidence, load_evidence
    from tsdfm_bench.results.schema import SchemaError

    registry = Registry(plugins)
    wanted = registry.names("figures") if only is None else [name.strip() for name in only.split(",") if name.strip()]
    for name in wanted:
        registry.entry("figures", name)
    root = results if results is not None else RECORDED
    folder = out if out is not None else _folder(results)
    try:
        evidence = load_evidence(root)
    except (SchemaError, MixedEvidence) as error:
        raise StorageError(str(error)) from error
    reports = [report for name in wanted for report in _work(registry, name, evidence, folder, listed)]
    for problem in [*evidence.problems, *evidence.damaged]:
        say(f"note: {problem}")
    if as_json:
        print(json.dumps({"folder": str(folder), "figures": reports}, indent=2, ensure_ascii=False))
    else:
        _print(reports, folder, listed)
    failed = any(report["state"] == "failed" for report in reports)
    nothing = all(report["state"] in ("nothing to draw", "failed") for report in reports)
    return 1 if failed or (nothing and not listed) else 0


def _folder(results: Path | None) -> Path:
    here = Path("figures")
    if results is None:
        return here
    return results / "figures" if (results / "plan.json").exists() else here


def _work(registry: Registry, name: str, evidence: Evidence, folder: Path, listed: bool) -> list[dict[str, Any]]:
    """Reports of one registered figure; what goes wrong in it never stops the others."""
    report: dict[str, Any] = {"figure": name, "name": name, "title": "", "notes": [], "missing": [], "files": []}
    try:
        return _draw(registry, report, evidence, folder, listed)
    except (Exception, SystemExit) as error:
        return [_failed(report, error)]


def _draw(
    registry: Registry, report: dict[str, Any], evidence: Evidence, folder: Path, listed: bool
) -> list[dict[str, Any]]:
    """Reports of what one figure made, each written or compared with what is stored; one may fail alone."""
    from tsdfm_bench.paper_figures.base import NothingToDraw
    from tsdfm_bench.paper_figures.save import mark_stale

    entry = report["figure"]
    cls = registry.load("figures", entry)
    try:
        with shielded(f"figure '{entry}'", cls):
            figure: PaperFigure = cls()
            report["title"] = str(figure.title)
            made: list[Made] = figure.make(evidence)
    except NothingToDraw as error:
        stale = [] if listed else mark_stale(folder, entry, str(error))
        reason = f"{error}. {_remedy(getattr(figure, 'sweep', ''))}".replace("..", ".")
        reason += f" Marked as stale: {', '.join(stale)}." if stale else ""
        return [{**report, "state": "nothing to draw", "reason": reason}]
    reports = []
    for one in made:
        about = {**report, "name": one.name, "title": one.title, "notes": one.notes, "missing": one.missing}
        try:
            reports.append(about | _state(one, folder, entry, listed))
        except Exception as error:
            reports.append(_failed(about, error))
    if not listed:
        mark_stale(folder, entry, "these results no longer make it", [one.name for one in made])
    return reports


def _state(one: Made, folder: Path, entry: str, listed: bool) -> dict[str, Any]:
    """What one table or figure adds to its report; it is written unless it is only listed."""
    from tsdfm_bench.paper_figures.save import save, state

    if listed:
        return {"state": state(one, folder), "reason": ""}
    paths = save(one, folder, entry)
    return {
        "state": "incomplete" if one.missing else "drawn",
        "reason": f"no row for: {'; '.join(one.missing)}" if one.missing else "",
        "rows": len(one.rows),
        "files": [str(path) for path in paths],
    }


def _failed(report: dict[str, Any], error: BaseException) -> dict[str, Any]:
    from tsdfm_bench.results.store import StoreError

    known = isinstance(error, BenchError | StoreError)
    reason = str(error if known else PluginError(f"figure '{report['figure']}' failed: {one_line(error)}"))
    return {**report, "state": "failed", "reason": reason}


def _remedy(sweep: str) -> str:
    name = sweep if sweep.endswith(".toml") else f"{sweep}-sotu.toml"
    return f"Make the rows: tsdfm-bench run --config {SWEEPS}/{name}" if sweep else ""


def _print(reports: list[dict[str, Any]], folder: Path, listed: bool) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from tsdfm_bench.results.render import clean

    console = stdout_console()
    grid = Table(box=box.SIMPLE_HEAD, title=Text("Tables and figures", style="bold"), title_justify="left")
    grid.padding, grid.pad_edge = (0, 1, 0, 0), False
    grid.add_column("name", no_wrap=True)
    grid.add_column("state", no_wrap=not listed)
    grid.add_column("what")
    styles = {"drawn": "green", "current": "green", "failed": "red", "nothing to draw": "dim"}
    for report in reports:
        what = Text(clean(report["title"]))
        if report["reason"]:
            what.append(f"\n{clean(_short(report['reason']))}", style="dim")
        grid.add_row(Text(report["name"]), Text(report["state"], style=styles.get(report["state"], "yellow")), what)
    console.print(grid)
    count = sum(bool(report["files"]) for report in reports)
    if not listed:
        console.print(f"{count} of {len(reports)} written to {folder}/", highlight=False, soft_wrap=True)


def _short(text: str, limit: int = 400) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."
