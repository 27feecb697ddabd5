"""Figure 2: blind against shaped trajectories, step by step.

What the thesis is about: along a chain of jumps that nobody judges, one bad early decision stays. For each arm the mean
over sequences of the completed sequence's NLL, the compass energy, the positions that changed, those that already hold
their final token, and the entropy, with 95 % bands over sequences. From `trajectories.parquet`, see `results.training`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from tsdfm_bench.paper_figures.base import Made, NothingToDraw, mark_incomplete, own_names
from tsdfm_bench.results.evidence import Evidence
from tsdfm_bench.results.rows import Row
from tsdfm_bench.results.style import COLUMN_IN, Label, finish, looks, new_figure, styled
from tsdfm_bench.results.training import read_trajectories

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

PANELS = {
    "nll_nats": "NLL, completed\n(nats/token)",
    "energy": "energy",
    "flips": "changed\n(share)",
    "committed": "committed\n(share)",
    "entropy_nats": "entropy\n(nats)",
}
_STYLE = {"blind": "fsdfm", "shaped": "tsdfm"}


class Figure2:
    """See the module's text."""

    title: ClassVar[str] = "blind against shaped trajectories"
    sweep: ClassVar[str] = "figure2"

    def make(self, evidence: Evidence) -> list[Made]:
        """One figure per file and source."""
        if not evidence.trajectories:
            raise NothingToDraw("no trajectories.parquet")
        found: list[Made] = []
        for path in evidence.trajectories:
            frame = read_trajectories(path)
            for key, part in frame.groupby("source", sort=False):
                source = str(key)
                name = f"figure2-{source}" if found and source else "figure2"
                found.append(_one(part, source, name))
        return own_names(found)


def _one(frame: pd.DataFrame, source: str, name: str) -> Made:
    arms = [arm for arm in ("blind", "shaped") if arm in set(frame["arm"])]
    shown = {key: title for key, title in PANELS.items() if frame[key].notna().any()}
    rows: list[Row] = []
    from matplotlib.ticker import MaxNLocator

    with styled():
        figure, grid = new_figure(COLUMN_IN, 0.3 + 1.0 * len(shown), rows=len(shown), sharex=True, squeeze=False)
        look = looks(_STYLE.values())
        panels: dict[Axes, list[Label]] = {}
        for axes, (key, title) in zip(grid[:, 0], shown.items(), strict=True):
            panels[axes] = []
            for arm in arms:
                style = look[_STYLE[arm]]
                means = _means(frame[frame["arm"] == arm], key)
                axes.plot(means["t"], means["mean"], **{**style, "markersize": 2.6})
                axes.fill_between(
                    means["t"], means["low"], means["high"], color=style["color"], alpha=0.18, linewidth=0
                )
                panels[axes].append(Label(means["t"].iloc[-1], means["mean"].iloc[-1], arm, style["color"]))
                rows += _rows(means, arm, key, source)
            axes.set_ylabel(title)
            axes.yaxis.set_major_locator(MaxNLocator(4))
        grid[-1, 0].set_xlabel("time t (0 = noise, 1 = data)")
        missing = [f"{arm} arm" for arm in ("blind", "shaped") if arm not in arms]
        mark_incomplete(figure, missing)
        figure.draw_without_rendering()  # tick labels first: the room for axis labels depends on their width
        finish(figure, panels)
    count = int(frame["sequence"].nunique())
    notes = [f"Means over {count} sequences, bands are 95 % intervals (normal); the arms share their starts."]
    title = f"Blind and shaped trajectories, {source} source" if source else "Blind and shaped trajectories"
    return Made(name, title, rows, figure=figure, notes=notes, missing=missing)


def _means(frame: pd.DataFrame, key: str) -> pd.DataFrame:
    """Mean and 95 % ends of a column by step."""
    table = frame.groupby("step").agg(t=("t", "mean"), mean=(key, "mean"), sd=(key, "std"), n=(key, "count"))
    table = table[table["n"] > 0].reset_index()
    half = 1.959964 * table["sd"].fillna(0.0) / table["n"] ** 0.5
    return table.assign(low=table["mean"] - half, high=table["mean"] + half)


def _rows(means: pd.DataFrame, arm: str, key: str, source: str) -> list[Row]:
    """Means as rows, so that changes of them are noticed."""
    return [
        {
            "cell": f"trajectory {source} {arm} step {int(row['step'])}",
            "metric": key,
            "scorer": "",
            "value": float(row["mean"]),
            "low": float(row["low"]),
            "high": float(row["high"]),
            "n": int(row["n"]),
        }
        for row in means.to_dict("records")
    ]
