"""Run folders as commands name them."""

from __future__ import annotations

from pathlib import Path

from tsdfm_bench.errors import UsageError
from tsdfm_bench.results.store import RECORDED, RunFolder

RUNS = Path("runs")
RECORDED_NAME = "reference"
"""Names the recorded results, wherever they are installed, unless something here has that name."""


def run_folder(folder: Path | None) -> RunFolder:
    """The folder asked for ("reference" = the recorded results), or the one in runs/ whose plan was written last.

    Raises:
        UsageError: there is none.
    """
    if folder is not None:
        found = RunFolder(RECORDED if str(folder) == RECORDED_NAME and not folder.exists() else folder)
        if not found.plan_path.exists():
            raise UsageError(f"{folder} is no run folder: it has no plan.json. {_others()}")
        return found
    known = _known()
    if not known:
        raise UsageError(f"there is no run in {RUNS}/ here: name a run folder, or start with tsdfm-bench run")
    return RunFolder(known[0])


def _known() -> list[Path]:
    plans = list(RUNS.glob("*/plan.json"))
    return [path.parent for path in sorted(plans, key=lambda path: path.stat().st_mtime, reverse=True)]


def _others() -> str:
    known = _known()
    return f"Run folders here: {', '.join(map(str, known[:5]))}." if known else ""
