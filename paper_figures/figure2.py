"""Figure 2: blind against shaped trajectories, step by step.

What the thesis is about: along a chain of jumps that nobody judges, one bad early decision stays. For each arm the mean
over sequences of the completed sequence's NLL, the compass energy, the positions that changed, those that already hold
their final token, and the entropy, with 95 % bands over sequences. The last panel follows the sequences whose completed
NLL was in the worst and in the best quarter of their arm after an early jump, and the caption has the rank correlation
of that NLL with the final one: where a bad early jump goes. From `trajectories.parquet`, see `results.training`.
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
EARLY = 0.25
"""The first state at this time or later is the early one."""
_STYLE = {"blind": "fsdfm", "shaped": "tsdfm"}
_QUARTERS = {"worst": "-", "best": ":"}


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
            where = path.parent.name if len(evidence.trajectories) > 1 else ""
            for key, part in frame.groupby("source", sort=False):
                source = str(key)
                name = "-".join(word for word in ("figure2", where, source) if word) if found else "figure2"
                found.append(_one(part, source, name, where))
        return own_names(found)


def _one(frame: pd.DataFrame, source: str, name: str, where: str) -> Made:
    arms = [arm for arm in ("blind", "shaped") if arm in set(frame["arm"])]
    shown = {key: title for key, title in PANELS.items() if frame[key].notna().any()}
    rows: list[Row] = []
    from matplotlib.ticker import MaxNLocator

    with styled():
        count = len(shown) + 1
        figure, grid = new_figure(COLUMN_IN, 0.3 + 1.0 * count, rows=count, sharex=True, squeeze=False)
        look = looks(_STYLE.values())
        panels: dict[Axes, list[Label]] = {}
        for axes, (key, title) in zip(grid[:-1, 0], shown.items(), strict=True):
            panels[axes] = []
            for arm in arms:
                style = look[_STYLE[arm]]
                means = _means(frame[frame["arm"] == arm], key)
                if means.empty:
                    continue
                axes.plot(means["t"], means["mean"], **{**style, "markersize": 2.6})
                axes.fill_between(
                    means["t"], means["low"], means["high"], color=style["color"], alpha=0.18, linewidth=0
                )
                panels[axes].append(Label(means["t"].iloc[-1], means["mean"].iloc[-1], arm, style["color"]))
                rows += _rows(means, arm, key, source)
            axes.set_ylabel(title)
            axes.yaxis.set_major_locator(MaxNLocator(4))
        panels[grid[-1, 0]] = []
        for arm in arms:
            colour = look[_STYLE[arm]]["color"]
            for quarter, line in _QUARTERS.items():
                means = _means(_quarter(frame[frame["arm"] == arm], quarter), "nll_nats")
                if means.empty:
                    continue
                grid[-1, 0].plot(means["t"], means["mean"], color=colour, linestyle=line, linewidth=1.0)
                end = Label(means["t"].iloc[-1], means["mean"].iloc[-1], f"{arm}, {quarter}", colour)
                panels[grid[-1, 0]].append(end)
                rows += _rows(means, f"{arm} {quarter} quarter", "nll_nats", source)
        grid[-1, 0].set_ylabel("NLL, by an\nearly jump")
        grid[-1, 0].yaxis.set_major_locator(MaxNLocator(4))
        grid[-1, 0].set_xlabel("time t (0 = noise, 1 = data)")
        missing = [f"{arm} arm" for arm in ("blind", "shaped") if arm not in arms]
        mark_incomplete(figure, missing)
        figure.draw_without_rendering()  # tick labels first: the room for axis labels depends on their width
        finish(figure, panels)
    count = int(frame["sequence"].nunique())
    notes = [
        f"Means over {count} sequences, bands are 95 % intervals (normal); the arms share their starts.",
        "Last panel: the quarters of worst (solid) and best (dotted) completed NLL at the first state from "
        f"t = {EARLY:g} on.",
        *(_persistence(frame[frame["arm"] == arm], arm) for arm in arms),
    ]
    title = ", ".join(
        ["Blind and shaped trajectories", *([f"{source} source"] if source else []), *([where] if where else [])]
    )
    return Made(name, title, rows, figure=figure, notes=notes, missing=missing)


def _early(frame: pd.DataFrame) -> pd.Series:
    """Completed NLL of each sequence of one arm at its early state."""
    late = frame[frame["t"] >= EARLY]
    return late[late["step"] == late["step"].min()].set_index("sequence")["nll_nats"]


def _quarter(frame: pd.DataFrame, quarter: str) -> pd.DataFrame:
    """The sequences of one arm in the "worst" or "best" quarter by their early NLL; at least one."""
    early = _early(frame).sort_values(ascending=quarter == "best", kind="stable")
    return frame[frame["sequence"].isin(early.index[: max(1, len(early) // 4)])]


def _persistence(frame: pd.DataFrame, arm: str) -> str:
    """A sentence: how the early NLL of one arm goes with the final one (Spearman, 95 % by Fisher's z)."""
    import numpy as np
    from scipy import stats

    early, last = _early(frame), frame[frame["step"] == frame["step"].max()].set_index("sequence")["nll_nats"]
    if len(early) < 4 or early.nunique() < 2 or last.nunique() < 2:
        return f"{arm.capitalize()}: too few different sequences for a rank correlation of early and final NLL."
    rho = float(stats.spearmanr(early, last.loc[early.index]).statistic)
    half = 1.959964 * ((1 + rho**2 / 2) / (len(early) - 3)) ** 0.5  # Bonett and Wright, Psychometrika 2000
    low, high = np.tanh(np.arctanh(np.clip(rho, -0.999999, 0.999999)) + np.array([-half, half]))
    return f"{arm.capitalize()}: rank correlation of early and final NLL {rho:.2f} [{low:.2f}, {high:.2f}]."


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
