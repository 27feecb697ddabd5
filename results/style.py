"""One look for every figure: sizes, fonts, colours, direct labels, and files that say which rows they show.

Figures are made for a column of 3.3 inches and are readable there at their own size: 7 and 8 point type, thin axes, no
frame, labels at the lines instead of a legend. Colours are those of Okabe and Ito, distinguishable with every common
form of colour blindness; marker and line style repeat what colour says. Nothing here touches matplotlib's global state
or needs a display. The three files of a figure (PDF, SVG, PNG) carry the rows they were drawn from in their metadata,
so that a figure can be checked against results, and equal input gives equal bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import html
import io
import json
import os
import re
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsdfm_bench.results.files import CorruptFile, canonical_json, check_name, read_bytes, write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.typing import RcKeyType

COLUMN_IN = 3.3
PAGE_IN = 6.9
PNG_DPI = 300
FORMATS = ("pdf", "svg", "png")

INK = "#222222"
FAINT = "#8a8a8a"
GRID = "#e6e6e6"
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "h", "p")
DASHES = ("-", (0, (4, 1.5)), (0, (1, 1)), (0, (5, 1, 1, 1)))
# Methods keep their colour from figure to figure; names not listed take what is left, in order of appearance.
_USUAL = {"tsdfm": 1, "fsdfm": 2, "dfm": 0, "mdlm": 3, "sedd": 4, "ar": 6, "duo": 5}

_RC: dict[RcKeyType, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 7.0,
    "axes.titlesize": 8.0,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 7.5,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#666666",
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.5,
    "xtick.labelsize": 6.5,
    "ytick.labelsize": 6.5,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.minor.width": 0.4,
    "ytick.minor.width": 0.4,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "xtick.minor.size": 1.5,
    "ytick.minor.size": 1.5,
    "lines.linewidth": 1.2,
    "lines.markersize": 3.6,
    "legend.frameon": False,
    "legend.fontsize": 6.5,
    "text.color": INK,
    "text.parse_math": False,  # a "$" in a label is a dollar sign
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "pdf.fonttype": 42,
    "svg.fonttype": "path",
    "svg.hashsalt": "tsdfm-bench",
}
_KEY = "tsdfm-bench"
_LABEL_PT = 6.5
_LINE_PT = 8.6


@dataclass(frozen=True)
class Label:
    """A text at a point, in data coordinates; the text may have several lines."""

    x: float
    y: float
    text: str
    color: str = INK


@contextlib.contextmanager
def styled() -> Iterator[None]:
    """Within the block matplotlib draws in this style; afterwards everything is as it was."""
    import matplotlib

    with matplotlib.rc_context(_RC):
        yield


def new_figure(
    width_in: float = COLUMN_IN, height_in: float = 2.5, rows: int = 1, columns: int = 1, **options: Any
) -> tuple[Figure, Any]:
    """A figure and its axes (one, or an array of them), to be made and saved inside `styled()`.

    Args:
        width_in, height_in: size in inches; `COLUMN_IN` and `PAGE_IN` are the usual widths.
        rows, columns: of panels.
        options: of `Figure.subplots` (sharex, sharey, squeeze, ...).
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width_in, height_in), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.03)  # type: ignore[union-attr, call-arg]
    return figure, figure.subplots(rows, columns, **options)


# ---------------------------------------------------------------------------------------------------- colours


def looks(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Colour, marker and line style by name, as keyword arguments of `Axes.plot`.

    A method (the part of a name before "[", " " or "/") has one colour in all figures; further names of the same
    method keep it and take another line style and an open marker.
    """
    names = list(dict.fromkeys(names))
    roots = list(dict.fromkeys(_root(name) for name in names))
    taken = {_USUAL[root] for root in roots if root in _USUAL}
    free = [i for i in range(len(PALETTE)) if i not in taken] or list(range(len(PALETTE)))
    index: dict[str, int] = {}
    for root in roots:
        others = sum(1 for known in index if known not in _USUAL)
        index[root] = _USUAL[root] if root in _USUAL else free[others % len(free)]
    seen: dict[str, int] = {}
    result = {}
    for name in names:
        root = _root(name)
        count = seen[root] = seen.get(root, -1) + 1
        color = PALETTE[index[root]]
        result[name] = {
            "color": color,
            "marker": MARKERS[index[root]],
            "linestyle": DASHES[count % len(DASHES)],
            "markerfacecolor": color if count == 0 else "white",
            "markeredgewidth": 0.8,
        }
    return result


def _root(name: str) -> str:
    return re.split(r"[\[ /(,]", name, maxsplit=1)[0]


def text_colour(color: str) -> str:
    """A colour dark enough to be read as small text on white (contrast at least 4.5 to 1)."""
    red, green, blue = (int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
    while 1.05 / (_luminance(red, green, blue) + 0.05) < 4.5:
        red, green, blue = 0.95 * red, 0.95 * green, 0.95 * blue
    return "#" + "".join(f"{round(255 * part):02x}" for part in (red, green, blue))


def _luminance(*rgb: float) -> float:
    """Relative luminance (WCAG 2)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


# ----------------------------------------------------------------------------------------------------- labels


def finish(figure: Figure, panels: Mapping[Axes, Sequence[Label]]) -> None:
    """Lay the figure out with room at the right for labels, and write them there.

    Args:
        figure: complete but for its labels; nothing may be added to its axes afterwards.
        panels: the labels of each of its axes.
    """
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    texts = [line for labels in panels.values() for label in labels for line in label.text.split("\n")]
    room = max((_text_width(figure, text) for text in texts), default=0.0) + 12.0
    width = figure.get_figwidth() * 72.0
    share = min(0.5, room / width) if texts else 0.0
    engine = figure.get_layout_engine()
    if isinstance(engine, ConstrainedLayoutEngine):
        engine.set(rect=(0.0, 0.0, 1.0 - share, 1.0))
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for axes, labels in panels.items():
        direct_labels(axes, labels)


def _text_width(figure: Figure, text: str) -> float:
    """Width in points of one line of label text."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath

    font = FontProperties(family=["DejaVu Sans"], size=_LABEL_PT)
    return float(TextPath((0, 0), text, prop=font).get_extents().width) if text.strip() else 0.0


def direct_labels(axes: Axes, labels: Sequence[Label]) -> None:
    """Write labels in the right margin, level with the points they belong to as far as they do not overlap.

    A label away from its point gets a thin line to it. Call after the layout is final (`finish` does).
    """
    figure = axes.figure
    points = [axes.transData.transform((label.x, label.y)) * 72.0 / figure.dpi for label in labels]
    order = sorted(range(len(labels)), key=lambda i: float(points[i][1]))
    sizes = [_LINE_PT * (labels[i].text.count("\n") + 1) + 1.5 for i in order]
    (_, bottom), (right, top) = axes.transAxes.transform([(0.0, 0.0), (1.0, 1.0)]) * 72.0 / figure.dpi
    placed = spread([float(points[i][1]) for i in order], sizes, float(bottom) - 2, float(top) + 4)
    for i, centre in zip(order, placed, strict=True):
        label, (x, y) = labels[i], points[i]
        gap = (float(right) + 7.0 - float(x), centre - float(y))
        far = gap[0] > 12 or abs(gap[1]) > 3
        line = {"arrowstyle": "-", "color": label.color, "linewidth": 0.4, "alpha": 0.7, "shrinkA": 0, "shrinkB": 3}
        axes.annotate(
            label.text,
            (label.x, label.y),
            xytext=gap,
            textcoords="offset points",
            va="center",
            ha="left",
            fontsize=_LABEL_PT,
            linespacing=1.1,
            color=text_colour(label.color),
            annotation_clip=False,
            arrowprops={**line, "relpos": (0.0, 0.5)} if far else None,
        )


def spread(wanted: Sequence[float], sizes: Sequence[float], low: float, high: float) -> list[float]:
    """Centres near those wanted so that intervals of the given sizes do not overlap, within [low, high] if they fit.

    Least squares with order kept: overlapping neighbours are merged into blocks that sit at their mean.

    Args:
        wanted: centres, increasing.
        sizes: heights of the intervals.
        low, high: where they should stay.
    """
    blocks: list[list[float]] = []  # [sum of wanted starts minus offsets, count, size, start]
    for centre, size in zip(wanted, sizes, strict=True):
        blocks.append([centre - size / 2, 1, size, centre - size / 2])
        while len(blocks) > 1 and blocks[-2][3] + blocks[-2][2] > blocks[-1][3]:
            last = blocks.pop()
            block = blocks[-1]
            block[0] += last[0] - last[1] * block[2]
            block[1] += last[1]
            block[2] += last[2]
            block[3] = block[0] / block[1]
    starts: list[float] = []
    floor = low
    for k, block in enumerate(blocks):
        above = sum(other[2] for other in blocks[k:])
        start = max(floor, min(block[3], high - above))
        starts.append(start)
        floor = start + block[2]
    centres: list[float] = []
    members = iter(sizes)
    for block, start in zip(blocks, starts, strict=True):
        for _ in range(int(block[1])):
            size = next(members)
            centres.append(start + size / 2)
            start += size
    return centres


# ------------------------------------------------------------------------------------------------------ files


def rows_used(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """What a figure says about its rows: which they are, and a digest of their numbers.

    Args:
        rows: rows of a summary (mappings with cell, metric, scorer, value, low, high, n).

    Returns:
        {"rows": sorted list of "cell metric scorer", "digest": sha256 over these with their numbers}; equal results
        give equal digests, whatever the order.
    """
    numbers = {}
    for row in rows:
        key = " ".join(str(row[name]) for name in ("cell", "metric", "scorer")).strip()
        numbers[key] = [_plain(row.get(name)) for name in ("value", "low", "high", "n")]
    digest = hashlib.sha256(canonical_json(numbers).encode()).hexdigest()
    return {"rows": sorted(numbers), "digest": f"sha256:{digest}"}


def _plain(value: Any) -> Any:
    if value is None or type(value).__name__ == "NAType" or value != value:
        return None
    if isinstance(value, float) and value in (float("inf"), float("-inf")):
        return str(value)
    return value.item() if hasattr(value, "item") else value


def save_figure(
    figure: Figure,
    folder: str | os.PathLike[str],
    name: str,
    rows: Iterable[Mapping[str, Any]],
    *,
    title: str = "",
    notes: Sequence[str] = (),
    formats: Sequence[str] = FORMATS,
) -> list[Path]:
    """Write a figure as PDF, SVG and PNG (300 dpi), atomically, with the rows it shows in the metadata.

    Args:
        figure: made inside `styled()`; call this inside it as well.
        folder, name: files are folder/name.pdf, .svg and .png.
        rows: every row of the summary that the figure shows, see `rows_used`.
        title: one line; also the SVG's accessible name.
        notes: what a caption should say (scorer, convention, n, what is missing); kept in the metadata.
        formats: of `FORMATS`.

    Raises:
        UnsafeName, StoreError: the name is no file name; the folder cannot be written.
    """
    check_name(name, "figure name")
    about = json.dumps({"figure": name, "title": title, "notes": list(notes), **rows_used(rows)}, ensure_ascii=True)
    metadata: dict[str, dict[str, Any]] = {
        "pdf": {"Title": title or name, "Subject": _KEY, "Keywords": about, "CreationDate": None, "ModDate": None},
        "svg": {"Title": title or name, "Description": about, "Creator": _KEY, "Date": None},
        "png": {"Title": title or name, "Software": _KEY, _KEY: about},
    }
    paths = []
    with styled():
        for format in formats:
            buffer = io.BytesIO()
            figure.savefig(buffer, format=format, dpi=PNG_DPI, metadata=metadata[format])
            data = buffer.getvalue()
            if format == "svg":
                data = _accessible(data, title or name, notes)
            path = Path(folder) / f"{name}.{format}"
            write_bytes(path, data)
            paths.append(path)
    return paths


def _accessible(data: bytes, title: str, notes: Sequence[str]) -> bytes:
    """An SVG with a name and a description that a screen reader says."""
    text = f"<title>{html.escape(title)}</title>"
    text += f"<desc>{html.escape(' '.join(notes))}</desc>" if notes else ""
    start = data.index(b"<svg")
    end = data.index(b">", start)
    return data[:end] + b' role="img">' + text.encode() + data[end + 1 :]


def figure_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What `save_figure` wrote about a figure: figure, title, notes, rows, digest.

    Raises:
        CorruptFile: a file that this package did not write, or a damaged one.
        StoreError: it cannot be read.
    """
    data = read_bytes(path)
    suffix = Path(path).suffix
    try:
        text = {".png": _png_text, ".svg": _svg_text, ".pdf": _pdf_text}[suffix](data)
        content = json.loads(text)
        if not isinstance(content, dict) or "digest" not in content:
            raise ValueError("no digest")
    except (KeyError, ValueError, IndexError, struct.error, zlib.error) as error:
        raise CorruptFile.of(path, f"it says nothing about the rows it shows ({error})") from error
    return content


def _png_text(data: bytes) -> str:
    at = 8
    while at < len(data):
        (size,) = struct.unpack(">I", data[at : at + 4])
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + size]
        if kind == b"tEXt" and body.startswith(_KEY.encode() + b"\0"):
            return body.split(b"\0", 1)[1].decode("latin-1")
        at += 12 + size
    raise ValueError("no text chunk")


def _svg_text(data: bytes) -> str:
    found = re.search(rb"<dc:description>(.*?)</dc:description>", data, re.DOTALL)
    if found is None:
        raise ValueError("no description")
    return html.unescape(found[1].decode())


def _pdf_text(data: bytes) -> str:
    start = data.index(b"/Keywords (") + len(b"/Keywords (")
    out = bytearray()
    at = start
    depth = 1
    while True:
        char = data[at : at + 1]
        if char == b"\\":
            out += data[at + 1 : at + 2]
            at += 2
            continue
        depth += {b"(": 1, b")": -1}.get(char, 0)
        if depth == 0 or not char:
            return out.decode("latin-1")
        out += char
        at += 1
