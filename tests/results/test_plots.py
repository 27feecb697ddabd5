"""Figures: drawn from what is there, refused where nothing is, files that say which rows they show."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from tsdfm_bench.cli import app
from tsdfm_bench.results import schema, style
from tsdfm_bench.results.axes import thinned
from tsdfm_bench.results.evidence import MixedEvidence, refuse_mixed
from tsdfm_bench.results.files import CorruptFile, StoreError, check_name
from tsdfm_bench.results.plots import KINDS, NothingToDraw, draw
from tsdfm_bench.results.replicates import Replicates
from tsdfm_bench.results.store import write_table

Make = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def swept(cell: Make) -> list[dict[str, Any]]:
    """Two generators over temperatures and steps, real text, and a cell that failed."""
    rows: list[dict[str, Any]] = []
    for k, temperature in enumerate((0.7, 1.0)):
        for steps in (8, 64):
            for name, source in (("mdlm", "mask"), ("tsdfm", "uniform")):
                settings: dict[str, Any] = {
                    "source": source,
                    "steps": steps,
                    "temperature": temperature,
                    "calls": steps,
                }
                ppl = {"s": 40.0 * 1.3**k - steps / 8, "t": 9.0 + k}
                rows += cell(name, ppl, 3.6 + k / 5, cell=f"{name}{k}{steps}", **settings)
    rows += cell("ar", {"s": 20.0, "t": 5.0}, 3.7, steps=None, calls=64)
    rows += cell("real", {"s": 25.0, "t": 6.0}, 3.7, kind="reference")
    undone = {"task": "sotu", "kind": "method", "length": 64, "checkpoint": "none", "cell": "f", "label": "sedd"}
    return [*rows, undone | {"method": "sedd", "state": "failed", "reason": "RuntimeError: boom"}]


def trajectories(path: Path) -> None:
    steps = pd.DataFrame({"step": np.tile(np.arange(4), 20), "sequence": np.repeat(np.arange(20), 4)})
    arms = [steps.assign(arm=arm, nll_nats=6.0 - steps["step"] * k) for arm, k in (("blind", 0.5), ("shaped", 1.0))]
    frame = pd.concat(arms).assign(source="mask", t=lambda d: d["step"] / 3, energy=0.0, flips=0.2, committed=0.1)
    write_table(path, frame.assign(entropy_nats=3.0))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_drawn_and_saved(kind: str, swept: list[dict[str, Any]], tmp_path: Path) -> None:
    trajectories(tmp_path / "trajectories.parquet")
    summary = schema.from_rows(swept)
    drawings = draw(kind, summary, replicates=Replicates(summary, tmp_path))
    assert drawings
    for drawing in drawings:
        paths = style.save_figure(
            drawing.figure, tmp_path, drawing.name, drawing.rows, title=drawing.title, notes=drawing.notes
        )
        assert [path.suffix for path in paths] == [".pdf", ".svg", ".png"]
        for path in paths:
            about = style.figure_metadata(path)
            assert (about["title"], about["notes"]) == (drawing.title, drawing.notes)
            assert about["rows"] == style.rows_used(drawing.rows)["rows"] != []
            assert about["digest"] == style.rows_used(drawing.rows)["digest"]
        root = ElementTree.fromstring(paths[1].read_text())
        assert root.get("role") == "img"
        assert root[0].text == drawing.title
        assert drawing.figure.get_figwidth() == style.COLUMN_IN
        if kind != "trajectory":
            assert any("sedd (failed)" in note for note in drawing.notes)
            assert "partial: 1 cell not done" in all_text(drawing.figure)
            assert any(row["method"] == "real" for row in drawing.rows) or kind == "cost"


def all_text(figure: Any) -> str:
    from matplotlib.text import Text

    return "\n".join(text.get_text() for text in figure.findobj(Text))


def test_frontier_shows_points_labels_and_the_reading(swept: list[dict[str, Any]]) -> None:
    first, second = draw("frontier", schema.from_rows(swept))
    assert (first.name, second.name) == ("frontier-s", "frontier-t")
    (axes,) = first.figure.axes
    assert axes.get_yscale() == "log"
    drawn = [line for line in axes.lines if len(line.get_xdata()) == 2 and line.get_label() == "mdlm mask, 8 steps"]
    assert drawn[0].get_xdata().tolist() == pytest.approx([3.6, 3.8])
    assert "mdlm mask\n8 steps" in all_text(first.figure)
    readings = [note for note in first.notes if "at the entropy of real text" in note]
    assert any(note.startswith("mdlm mask, 8 steps: gen-PPL") and "(3.700 nats)" in note for note in readings)
    assert any(note.startswith("ar: entropy") or "one point at" in note for note in first.notes)
    areas = [re.search(r"^(.*?), \d+ steps.* Dominated area [\d.]+±[\d.]+\.$", note) for note in first.notes]
    assert sorted(found[1] for found in areas if found) == ["mdlm mask"] * 2 + ["tsdfm uniform"] * 2
    assert sum(note.startswith("Dominated area: ") and "the corner at" in note for note in first.notes) == 1


def test_a_dollar_sign_in_a_label_is_one(cell: Make, tmp_path: Path) -> None:
    """It begins no formula: one that is none would be an error, another would change the label."""
    rows = [
        row
        for name in ("file:a$_$.jsonl", "file:b$x^2$.jsonl")
        for k in range(2)
        for row in cell(name, {"s": 40.0 + k}, 3.6 + k, cell=f"{name[5]}{k}", steps=8, temperature=0.7 + k)
    ]
    (drawing,) = draw("frontier", schema.from_rows(rows))
    style.save_figure(drawing.figure, tmp_path, drawing.name, drawing.rows, formats=("png",))
    assert "file:a$_$.jsonl" in all_text(drawing.figure)


def test_many_curves_are_split_by_steps(cell: Make) -> None:
    rows = [
        row
        for name in ("mdlm", "sedd", "dfm", "duo", "tsdfm")
        for steps in (8, 64)
        for k, t in enumerate((0.7, 1.0))
        for row in cell(name, {"s": 40.0 + k}, 3.6 + k, cell=f"{name}{steps}{t}", steps=steps, temperature=t)
    ]
    rows += cell("ar", {"s": 20.0}, 3.7, steps=None)
    drawings = draw("frontier", schema.from_rows(rows))
    assert [d.name for d in drawings] == ["frontier-s-8-steps", "frontier-s-64-steps"]
    assert drawings[0].figure.axes[0].get_xlabel() == "entropy (nats), 8 steps"
    assert "ar" in all_text(drawings[1].figure).split("\n")
    assert len(draw("frontier", schema.from_rows(rows[:40]))) == 1


def test_the_largest_step_count_is_labelled_however_many_there_are(cell: Make) -> None:
    for most in (8, 10, 11, 12, 18):
        counts = [2**k for k in range(1, most + 1)]
        rows = [row for s in counts for row in cell("mdlm", {"s": 90.0 / s**0.1}, 3.7, cell=str(s), steps=s)]
        (drawing,) = draw("steps", schema.from_rows(rows))
        ticks = drawing.figure.axes[1].get_xticks().tolist()
        assert ticks[-1] == counts[-1]
        assert 4 < len(ticks) <= 8


def test_labels_neither_overlap_nor_leave_the_figure(swept: list[dict[str, Any]]) -> None:
    from matplotlib.text import Text

    for kind in ("frontier", "steps", "cost"):
        figure = draw(kind, schema.from_rows(swept))[0].figure
        figure.draw_without_rendering()
        width, height = figure.get_size_inches() * figure.dpi
        boxes = [Text.get_window_extent(t) for axes in figure.axes for t in axes.texts if t.get_text()]
        boxes += [t.get_window_extent() for t in figure.texts]
        assert boxes
        for i, box in enumerate(boxes):
            assert box.x1 <= width + 1
            assert -1 <= box.y0 <= box.y1 <= height + 1
            assert not any(box.overlaps(other) for other in boxes[i + 1 :])


def test_equal_results_give_equal_bytes(swept: list[dict[str, Any]], tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (drawing,) = draw("frontier", schema.from_rows(swept), scorer="s")
        style.save_figure(drawing.figure, tmp_path / folder, "f", drawing.rows)
    for suffix in style.FORMATS:
        assert (tmp_path / "a" / f"f.{suffix}").read_bytes() == (tmp_path / "b" / f"f.{suffix}").read_bytes()


def test_missing_rows_are_told_with_what_to_run(summary: pd.DataFrame, cell: Make, tmp_path: Path) -> None:
    for kind, words in (("frontier", "--temperatures"), ("trajectory", "trajectories.parquet")):
        with pytest.raises(NothingToDraw, match=words):
            draw(kind, summary)
    lone = schema.from_rows(cell("mdlm", {"s": 9.0}, 3.7, steps=8))
    for kind, words in (("steps", "--steps"), ("cost", "cost")):
        with pytest.raises(NothingToDraw, match=words):
            draw(kind, lone[lone["metric"] != "sequences_per_second"])
    with pytest.raises(NothingToDraw, match="--metrics mauve"):
        draw("mauve", lone[lone["metric"] != "mauve"])
    with pytest.raises(NothingToDraw, match="scorers with results: char-rnn, smollm2"):
        draw("steps", summary, scorer="gpt2")
    with pytest.raises(ValueError, match="unknown kind"):
        draw("pie", summary)
    for kind in KINDS:
        with pytest.raises(NothingToDraw):
            draw(kind, schema.empty())


def test_values_that_are_not_finite_are_left_out(swept: list[dict[str, Any]]) -> None:
    for row in swept:
        if row.get("cell") == "mdlm164" and row["metric"].startswith("gen_ppl"):
            row |= {"value": float("inf") if row["scorer"] == "s" else None, "low": None, "high": None, "reason": "nan"}
    for kind in ("frontier", "steps", "cost"):
        for drawing in draw(kind, schema.from_rows(swept)):
            used = [row for row in drawing.rows if row["metric"].startswith("gen_ppl")]
            assert not any(row["cell"] == "mdlm164" for row in used)


def test_drawings_of_scorers_with_options_have_file_names(swept: list[dict[str, Any]]) -> None:
    named = [row | {"scorer": "hf:gpt2[window=64]"} if row.get("scorer") == "s" else row for row in swept]
    for kind in ("frontier", "steps", "cost"):
        names = [drawing.name for drawing in draw(kind, schema.from_rows(named))]
        assert [check_name(name) for name in names] == names
        assert names[1] == f"{kind}-t"


def test_texts_and_lengths_never_share_a_panel(swept: list[dict[str, Any]]) -> None:
    longer = [row | {"length": 128, "cell": row["cell"] + "L"} for row in swept if row.get("state") != "failed"]
    drawings = draw("frontier", schema.from_rows([*swept, *longer]), scorer="s")
    assert [d.name for d in drawings] == ["frontier-s-1", "frontier-s-2"]
    for drawing in drawings:
        assert len({row["length"] for row in drawing.rows}) == 1


# -------------------------------------------------------------------------------------------------- training seeds

LEVELS = (36.0, 40.0, 47.0)


def seeded(cell: Make) -> list[dict[str, Any]]:
    """Three networks of one recipe over temperatures and steps, each known to a hundredth, and real text."""
    rows: list[dict[str, Any]] = []
    for seed, level in enumerate(LEVELS):
        suffix = f"-s{seed}" if seed else ""
        about = {"weights": f"sha256:{seed}", "checkpoint": f"runs/x{suffix}"}
        for steps in (8, 64):
            for k, t in enumerate((0.7, 1.0)):
                settings: dict[str, Any] = {"steps": steps, "temperature": t, "calls": steps, "source": "mask"}
                ppl, entropy = (level + 9 * k - steps / 8), 3.6 + k / 5 + seed / 50
                rows += cell("mdlm", {"s": ppl}, entropy, width=0.005, cell=f"{seed}{steps}{t}", **settings, **about)
    return rows + cell("real", {"s": 25.0}, 3.75, kind="reference", weights="none")


@pytest.mark.parametrize("kind", ["frontier", "steps", "cost", "mauve"])
def test_networks_of_several_seeds_are_one_point_with_their_interval_and_small_marks(kind: str, cell: Make) -> None:
    summary = schema.from_rows(seeded(cell))
    (drawing,) = draw(kind, summary)
    assert any("Where a recipe has 3 training seeds" in note and "Small marks" in note for note in drawing.notes)
    assert all("+" not in row["cell"] for row in drawing.rows)  # every network is named, not their mean
    drawn = {row["cell"] for row in drawing.rows if row["kind"] == "method"}
    assert {name[0] for name in drawn} == {"0", "1", "2"}
    marks = [line for axes in drawing.figure.axes for line in axes.lines if line.get_color() == style.FAINT]
    assert any(len(line.get_xdata()) == 3 and line.get_linestyle() == "None" for line in marks)
    one = schema.from_rows([row for row in seeded(cell) if row["cell"][0] not in "12"])
    assert not any("seeds:" in note for note in draw(kind, one)[0].notes)


def test_bars_and_readings_over_seeds_are_as_wide_as_the_seeds_say(cell: Make) -> None:
    from scipy import stats

    summary = schema.from_rows(seeded(cell))
    (drawing,) = draw("steps", summary)
    top = drawing.figure.axes[0]
    logs = np.log(np.array(LEVELS) + 9 - 1)  # temperature 1, 8 steps
    ends = np.exp(stats.t.interval(0.95, 2, logs.mean(), stats.sem(logs)))
    bars = [line.get_ydata() for line in top.lines if list(line.get_xdata()) == [8, 8]]
    assert any(np.allclose(bar, ends) for bar in bars)
    (frontier,) = draw("frontier", summary)
    (reading,) = (note for note in frontier.notes if note.startswith("mdlm mask, 8 steps: gen-PPL"))
    value, half = map(float, re.findall(r"gen-PPL ([\d.]+)±([\d.]+)", reading)[0])
    assert 36 < value < 47
    assert half > 8  # t over three seeds; over sequences alone it would be 0.2


@pytest.mark.parametrize("kind", ["frontier", "steps", "cost"])
@pytest.mark.parametrize("seed", "012")
def test_a_partial_sweep_is_one_line_and_says_which_points_lack_a_network(kind: str, seed: str, cell: Make) -> None:
    rows = [row for row in seeded(cell) if row["cell"] != f"{seed}81.0"]
    (drawing,) = draw(kind, schema.from_rows(rows))
    assert "Networks are missing from mdlm mask, 8 steps (2 of 3)." in drawing.notes
    whole = draw(kind, schema.from_rows(seeded(cell)))[0]
    assert not any("are missing from" in note for note in whole.notes)
    count = {len([line for line in d.figure.axes[0].lines if line.get_linestyle() == "-"]) for d in (drawing, whole)}
    assert len(count) == 1


def test_lines_of_different_networks_are_lines_of_their_own(cell: Make) -> None:
    """One label for two recipes: neither joined up nor named alike."""
    rows = [row | {"checkpoint": row["checkpoint"].replace("x-s1", "y")} for row in seeded(cell)]
    (drawing,) = draw("steps", schema.from_rows([row for row in rows if row["cell"][0] != "2"]))
    words = all_text(drawing.figure)
    assert "mdlm mask, x\n" in words
    assert "mdlm mask, y" in words


# ------------------------------------------------------------------------------------------------------- style


def test_two_conventions_never_share_an_axis(swept: list[dict[str, Any]], tmp_path: Path) -> None:
    """`plot` refuses a summary in which one scorer's name stands for two sets of weights."""
    summary = schema.from_rows(swept)
    refuse_mixed(summary)
    row = next(row for row in swept if row.get("scorer") == "s")
    row["scorer_revision"] = "another"
    mixed = schema.from_rows(swept)
    with pytest.raises(MixedEvidence, match="scorer 's' means two things here"):
        refuse_mixed(mixed)
    schema.write_summary(tmp_path, mixed)
    done = CliRunner().invoke(app, ["plot", str(tmp_path / "summary.parquet"), "--out", str(tmp_path / "out")])
    assert done.exit_code == 1
    assert "means two things here" in done.stderr
    assert not (tmp_path / "out").exists()


def test_methods_keep_their_colour() -> None:
    one = style.looks(["tsdfm uniform", "mdlm mask", "mine"])
    two = style.looks(["mdlm mask", "tsdfm mask, 8 steps", "tsdfm uniform"])
    assert one["tsdfm uniform"]["color"] == two["tsdfm uniform"]["color"] == two["tsdfm mask, 8 steps"]["color"]
    assert two["tsdfm uniform"]["linestyle"] != two["tsdfm mask, 8 steps"]["linestyle"]
    assert len({look["color"] for look in one.values()}) == 3


def test_label_text_is_readable_on_white() -> None:
    for color in style.PALETTE:
        dark = style.text_colour(color)
        rgb = [int(dark[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        assert 1.05 / (style._luminance(*rgb) + 0.05) >= 4.4


def test_colours_differ_under_colour_blindness() -> None:
    """Deuteranopia and protanopia (Machado et al. 2009, severity 1): every two colours stay apart."""
    matrices = {
        "protanopia": [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ],
        "deuteranopia": [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.01182, 0.04294, 0.968881],
        ],
    }
    rgb = np.array([[int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)] for c in style.PALETTE])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    for matrix in matrices.values():
        seen = np.clip(linear @ np.array(matrix).T, 0, 1) ** (1 / 2.2)
        for i in range(len(seen)):
            for j in range(i):
                assert np.linalg.norm(seen[i] - seen[j]) > 0.12


def test_spreading_keeps_order_and_room() -> None:
    placed = style.spread([1.0, 1.5, 1.6, 9.0], [2.0] * 4, 0.0, 20.0)
    assert np.diff(placed).min() >= 2.0 - 1e-9
    assert placed[3] == 9.0
    assert min(style.spread([0.0, 0.1], [2.0, 2.0], 0.0, 9.0)) >= 1.0
    top = style.spread([8.9, 9.0], [2.0, 2.0], 0.0, 10.0)
    assert max(top) <= 9.0
    assert style.spread([], [], 0, 1) == []


def test_metadata_of_foreign_and_damaged_files(tmp_path: Path) -> None:
    for name in ("x.png", "x.svg", "x.pdf", "x.txt"):
        (tmp_path / name).write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(40))
        with pytest.raises(CorruptFile, match="says nothing about the rows"):
            style.figure_metadata(tmp_path / name)
    with pytest.raises(StoreError, match="no such file"):
        style.figure_metadata(tmp_path / "none.png")


def test_hostile_titles_stay_text(tmp_path: Path) -> None:
    with style.styled():
        figure, axes = style.new_figure()
        axes.plot([1, 2], [1, 2])
        title = '</title><script>alert(1)</script> (a\\) "q" \u202e é'
        row = {"cell": "c", "metric": "m", "scorer": title, "value": float("nan"), "low": None, "high": None, "n": 3}
        paths = style.save_figure(figure, tmp_path, "f", [row], title=title, notes=[title])
    for path in paths:
        assert style.figure_metadata(path)["notes"] == [title]
    assert not re.search(r"<script", paths[1].read_text())
    with pytest.raises(StoreError):
        style.save_figure(figure, tmp_path, "../f", [row])


def test_unwritable_output_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with style.styled():
        figure, _ = style.new_figure()
        with pytest.raises(StoreError, match="cannot"):
            style.save_figure(figure, tmp_path / "file", "f", [])


def test_global_style_is_untouched() -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    with style.styled():
        assert matplotlib.rcParams["font.size"] == 7.0
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize("count", [1, 8, 9, 10, 11, 12, 40])
def test_thinned_step_counts_keep_the_largest(count: int) -> None:
    steps = [2**power for power in range(count)]
    kept = thinned([*steps, 1], 9)
    assert kept[-1] == steps[-1]
    assert len(kept) == min(count, 9) if count <= 9 else 4 < len(kept) <= 9
    assert kept == sorted(set(kept))
