"""The report: one file that needs nothing else, says what is missing, and shows hostile text as text."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from importlib.resources import files
from typing import Any

import numpy as np
import pandas as pd
import pytest

from tsdfm_bench.results import schema
from tsdfm_bench.results.report import Material, Pending, Texts, Trace, render_report
from tsdfm_bench.results.report.samples import TEXT_BUDGET
from tsdfm_bench.results.report.text import differences, visible

Make = Callable[..., list[dict[str, Any]]]

HOSTILE = [
    "<script>window.hacked = 1</script>",
    "</p></article></main><img src=x onerror='window.hacked = 2'>",
    '" onmouseover="window.hacked = 3" x="',
    "</script><script>window.hacked = 4</script>",
    "{{ 7 * 7 }} {% for i in x %}",
    "a\x00b\x07\x1b[31mred\x7f\x85",
    "user\u202etxt.exe\u2066 \u200f\u061c\u200b\ufeff",
    "half \ud800 a pair, \ufdd0, \U000e0041, \ue000",
    "<!-- <style> body { display: none } </style>",
    "&lt;b&gt; &#60;i&#62; javascript:window.hacked=5",
]
ACTING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u200e\u200f\u061c\u202a-\u202e\u2060-\u206f\ufeff\ud800-\udfff]"
)
VOID = {"meta", "link", "br", "img", "input", "hr"}
ALLOWED = {
    "id",
    "class",
    "href",
    "title",
    "lang",
    "name",
    "content",
    "charset",
    "rel",
    "http-equiv",
    "scope",
    "colspan",
}
ALLOWED |= {"open", "hidden", "tabindex", "role", "type", "value", "selected", "checked", "min", "max", "step", "dir"}
ALLOWED |= {"placeholder", "autocomplete", "spellcheck"}
DRAWN = {"viewbox", "preserveaspectratio", "d", "x", "y", "cx", "cy", "r", "points", "transform", "text-anchor"}
DRAWN |= {"stroke-dasharray"}


class Page(HTMLParser):
    """What a page consists of, and whether its elements nest."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.open: list[str] = []
        self.faults: list[str] = []
        self.texts: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.faults.append(tag)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def values(self, name: str) -> list[str]:
        return [value for _, key, value in self.attributes if key == name]

    @property
    def text(self) -> str:
        return "".join(self.texts)


def verdict(**given: Any) -> dict[str, Any]:
    found = {"id": "v", "title": "a claim", "status": "contradicted", "reason": "12 % [10, 14], claimed >= 32"}
    found |= {"statement": "32 % lower", "source": "abstract", "confidence": "high", "formula": "reduction(a, b)"}
    found |= {"holds": ">= 32", "unit": "%", "published": 32.0, "note": ""}
    instance = {"where": {"scorer": "s", "source": None}, "status": "contradicted", "reason": "why", "value": 12.0}
    instance |= {"low": 10.0, "high": 14.0, "n": 64, "n_needed": None, "cells": {}}
    return {**found, "instances": [instance], **given}


def trace_of(cell: str, pieces: dict[int, str] | None = None) -> Trace:
    states = np.array([[9, 9, 9, 9], [9, 1, 9, 9], [2, 1, 9, 0], [2, 1, 3, 0]])
    return Trace(cell, 0, [1, 2, 5, 8], states, pieces or {0: " zero", 1: " one", 2: " two", 3: " three"}, 8)


@pytest.fixture
def material(summary: pd.DataFrame) -> Material:
    """A run with everything: texts, a trace, verdicts, a pending cell."""
    cells = list(dict.fromkeys(summary[summary["state"] == "done"]["cell"]))
    texts = {cell: Texts([f"{cell} says hello world {i}" for i in range(3)], 256) for cell in cells}
    return Material(
        name="a run",
        summary=summary,
        verdicts=[verdict(), verdict(id="w", title="another", status="not testable", instances=[])],
        claims_title="a paper",
        texts=texts,
        traces=[trace_of(cells[0])],
        teacher="mdlm",
        commands={cell: f"tsdfm-bench run --methods {cell}" for cell in cells},
        pending=[Pending("p", "dfm · uniform · 4 steps", "partial", "1 of 2 batches")],
        provenance=[{"command": "tsdfm-bench run", "time": "2026-01-01", "versions": {"python": "3.11"}}],
        notes=["Scorer x is missing: no network"],
    )


def test_page_is_one_file_of_its_own_and_every_link_in_it_leads_somewhere(material: Material) -> None:
    html = render_report(material)
    page = Page(html)
    assert page.faults == []
    assert page.open == []
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    links = page.values("href")
    assert all(link.startswith("#") or link == "data:," for link in links)
    assert {link[1:] for link in links if link.startswith("#")} <= set(ids)
    assert page.tags.count("script") == page.tags.count("style") == 1
    assert not [name for tag, name, _ in page.attributes if name in ("src", "srcset", "style") or name.startswith("on")]
    assert not re.search(r"url\(|@import|https?://", html)
    assert re.search(r"default-src 'none'.*script-src 'sha256-[A-Za-z0-9+/=]+'", html)


def test_summary_and_verdicts_come_first_and_every_part_is_there(material: Material) -> None:
    html = render_report(material)
    order = ["summary", "verdicts", "table", "plots", "texts", "trajectories", "cost", "flags", "rows", "provenance"]
    places = [html.index(f'<section id="{name}"') for name in order]
    assert places == sorted(places)
    text = Page(html).text
    for wanted in (
        "1 contradicted, 1 not testable",
        "Partial run: 1 planned cell without results yet",
        "12 % [10, 14], claimed",
        "1 of 2",
    ):
        assert wanted in text
    for wanted in ("RuntimeError: boom", "no source [mask]", "Scorer x is missing", "tsdfm-bench run --methods mdlm"):
        assert wanted in text


def test_every_number_of_the_summary_is_on_the_page_with_its_row(material: Material) -> None:
    page = Page(render_report(material))
    done = material.summary[material.summary["state"] == "done"]
    for metric in set(done["metric"]):
        assert page.text.count(metric) >= (done["metric"] == metric).sum()
    rows = {value for tag, name, value in page.attributes if tag == "tr" and name == "data-row"}
    assert len(rows) == material.summary["cell"].nunique()


def test_rendering_is_a_pure_function(material: Material) -> None:
    assert render_report(material) == render_report(material)


def test_hostile_text_stays_text_wherever_it_stands(material: Material, cell: Make) -> None:
    harmless = Page(render_report(material))
    for text in HOSTILE:
        text = text.encode("utf-8", "surrogatepass").decode("utf-8", "surrogatepass")
        rows = cell(f"m{text}", {f"s{text}": 20.0}, 3.8, source=text, steps=8, calls=8, checkpoint=text, device=text)
        rows += cell("dfm", {f"s{text}": 30.0}, 3.9, source="uniform", steps=8, calls=8)
        rows += cell("real", {f"s{text}": 10.0}, 3.8, kind="reference")
        failed = {"state": "failed", "reason": text, "cell": f"failed {text}", "metric": "", "scorer": ""}
        rows.append({**rows[0], **failed, "value": None, "low": None, "high": None, "unit": "", "definition": ""})
        cells = list(dict.fromkeys(row["cell"] for row in rows))
        page_of = replace(
            material,
            name=text,
            summary=schema.from_rows(rows),
            verdicts=[verdict(title=text, reason=text, statement=text, formula=text, unit=text, note=text)],
            claims_title=text,
            texts={name: Texts([text, text], 2) for name in cells},
            traces=[trace_of(schema.from_rows(rows)["cell"][0], dict.fromkeys(range(4), text))],
            commands={schema.from_rows(rows)["cell"][0]: text},
            pending=[Pending("p", text, "failed", text)],
            provenance=[{"command": text, "device": text, "versions": {text: text}, "plugins": [text]}],
            notes=[text],
            made_by=text,
            command=text,
        )
        html = render_report(page_of)
        page = Page(html)
        assert not ACTING.search(html)
        assert page.faults == []
        assert page.open == []
        assert set(page.tags) <= set(harmless.tags), text
        assert page.tags.count("script") == 1
        names = {name for _, name, _ in page.attributes}
        assert {n for n in names if not n.startswith(("data-", "aria-"))} <= ALLOWED | DRAWN, text
        assert not [v for _, n, v in page.attributes if n == "href" and not v.startswith(("#", "data:,"))]
        assert visible(text) in page.text


def test_invisible_characters_are_spelt_out() -> None:
    assert visible("a\x00\x1b\x7f") == "a\u2400\u241b\u2421"
    assert visible("x\u202ey\u2066\ufeff\x85") == "x‹U+202E›y‹U+2066›‹U+FEFF›‹U+0085›"
    assert visible("\ud800\ue000\U000e0041\u2028") == "‹U+D800›‹U+E000›‹U+E0041›‹U+2028›"
    plain = "Grüße,\n\t日本語 עברית العربية 👩\u200d🔬 नमस्\u200dते"
    assert visible(plain) == plain
    assert visible(visible("\x00\u202e")) == visible("\x00\u202e")


@pytest.mark.parametrize(
    ("text", "other", "marked"),
    [
        ("the cat sat", "the dog sat", ["cat"]),
        ("a b c d", "a b c d", []),
        ("a  b\n c", "a b c", []),
        ("one two three four", "one four", ["two three"]),
        ("", "x", []),
        ("x y", "", ["x y"]),
        ("  lead", "other", ["lead"]),
    ],
)
def test_words_that_differ_are_those_outside_the_longest_common_order(text: str, other: str, marked: list[str]) -> None:
    pieces = differences(text, other)
    assert "".join(piece for _, piece in pieces) == text
    assert [piece for differs, piece in pieces if differs] == marked


def test_texts_are_compared_with_the_teacher_of_the_same_number(material: Material, cell: Make) -> None:
    rows = [
        *cell("dfm", {"s": 30.0}, 3.9, source="uniform", steps=8),
        *cell("dfm", {"s": 9.0}, 3.9, source="uniform", steps=64),
    ]
    rows += cell("tsdfm", {"s": 20.0}, 3.8, source="uniform", steps=8)
    names = list(dict.fromkeys(row["cell"] for row in rows))
    said = [["few a", "few b"], ["the first", "the second"], ["the third", "the second"]]
    texts = {name: Texts(lines, 2) for name, lines in zip(names, said, strict=True)}
    html = render_report(replace(material, summary=schema.from_rows(rows), texts=texts, teacher=None, traces=[]))
    cards = re.findall(r'<article class="card".*?</article>', html, re.DOTALL)
    assert len(cards) == 6
    first, second = ([c for c in cards if "tsdfm" in c][i] for i in (0, 1))
    assert '<mark class="d">third</mark>' in first
    assert "50 % of its words also in dfm uniform, 64 steps" in first
    assert "<mark" not in second
    assert "100 %" in second
    teacher = next(c for c in cards if "dfm uniform, 64 steps</bdi>" in c)
    assert "<mark" not in teacher
    assert "its words" not in teacher


def test_trace_marks_what_changed_and_shows_masks(material: Material) -> None:
    html = render_report(material)
    states = re.search(r'<ol class="states">(.*?)</ol>', html, re.DOTALL)
    assert states is not None
    lines = re.findall(r'<p class="text"[^>]*>(.*?)</p>', states[1])
    assert lines == [
        "░░░░",
        '░<mark class="new"> one</mark>░░',
        '<mark class="new"> two</mark> one░<mark class="new"> zero</mark>',
        ' two one<mark class="new"> three</mark> zero',
    ]
    assert "after step 5, 50 % changed" in re.sub(r"\s+", " ", states[1])


def test_a_run_without_samples_traces_or_claims_says_so(summary: pd.DataFrame) -> None:
    told = {"texts_note": "No samples are stored", "traces_note": "No trace is stored", "claims_note": "None tested"}
    text = Page(render_report(Material("bare", summary, **told))).text
    assert all(sentence in text for sentence in told.values())
    assert "No provenance is recorded" in text


def test_an_unfinished_run_lists_what_is_planned() -> None:
    pending = [Pending(f"c{i}", f"dfm {i} steps", "missing") for i in range(3)]
    text = Page(render_report(Material("young", schema.empty(), pending=pending))).text
    assert "3 planned cells without results yet" in text
    assert "Nothing has been measured yet" in text
    assert "dfm 2 steps" in text


def test_values_that_are_not_finite_are_counted_not_drawn(material: Material, cell: Make) -> None:
    rows = cell("a", {"s": 5.0}, 3.0, steps=8) + cell("b", {"s": 7.0}, 3.5, steps=64)
    rows += cell("c", {"s": 6.0}, 3.2, steps=4) + cell("d", {"s": 6.0}, 3.2, steps=2)
    for row in rows:
        if row["method"] in "cd" and row["metric"] == "gen_ppl/pooled":
            row |= {"value": float("inf") if row["method"] == "c" else float("nan"), "low": None, "high": None}
    html = render_report(replace(material, summary=schema.from_rows(rows), texts={}, traces=[], pending=[]))
    drawn = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    assert drawn
    assert not re.search(r'="[^"]*\b(nan|inf)\b', "".join(drawn))
    assert "2 rows are not drawn" in html
    assert '<th scope="row">gen_ppl/pooled</th><td>s</td><td class="num">inf</td>' in html


def test_a_point_lies_where_its_number_says(material: Material, cell: Make) -> None:
    rows = [row for p, s in ((10.0, 8), (20.0, 64), (40.0, 512)) for row in cell("m", {"s": p}, 3.0, steps=s, calls=s)]
    html = render_report(replace(material, summary=schema.from_rows(rows), texts={}, traces=[]))
    figure = next(f for f in re.findall(r"<figure.*?</figure>", html, re.DOTALL) if 'data-kind="steps"' in f)
    places = [(float(x), float(y)) for x, y in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', figure)]
    assert len(places) == 3
    (x0, y0), (x1, y1), (x2, y2) = places
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)  # both axes are logarithmic
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.2)
    assert y0 > y1


def test_hundred_rows_of_long_text_stay_below_ten_megabytes(cell: Make) -> None:
    rows = [
        row for i in range(100) for row in cell("m", {"a": 20.0 + i, "b": 9.0}, 3.0 + i / 100, steps=i + 1, calls=i)
    ]
    summary = schema.from_rows(rows)
    cells = list(dict.fromkeys(summary["cell"]))
    word = '"<&> \u202e'
    texts = {name: Texts([word * 200_000, "long line " * 500, *["word " * 1000] * 6], 1024) for name in cells}
    states = np.arange(1024)[None, :] + np.arange(1024)[:, None]
    traces = [Trace(name, 0, range(1, 1025), states % 97, {i: f" w{i}" for i in range(97)}) for name in cells[:24]]
    html = render_report(
        Material("large", summary, texts=texts, traces=traces, commands=dict.fromkeys(cells, "x" * 400))
    )
    assert len(html.encode()) < 10_000_000
    assert f"{len(word) * 200_000:,} characters in all" in html
    assert sum(map(len, re.findall(r'<p class="text" dir="auto">(.*?)</p>', html, re.DOTALL))) < 8 * TEXT_BUDGET


def _luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_every_pair_of_text_and_ground_can_be_read(scheme: int) -> None:
    style = (files("tsdfm_bench.results.report") / "page" / "style.css").read_text(encoding="utf-8")
    blocks = re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", blocks[scheme]))
    grounds = ("ground", "panel", "head", "note-bg")
    pairs = [(ink, ground) for ink in ("ink", "soft", "link") for ground in grounds]
    pairs += [(kind, f"{kind}-bg") for kind in ("good", "bad", "warn")]
    pairs += [("ink", mark) for mark in ("mark", "new", "row", "good-bg", "bad-bg", "warn-bg")]
    pairs += [(f"c{i}", "panel") for i in range(7)]
    for ink, ground in pairs:
        light, dark = sorted((_luminance(colours[ink]), _luminance(colours[ground])), reverse=True)
        least = 3.5 if re.fullmatch(r"c\d", ink) else 4.5
        assert (light + 0.05) / (dark + 0.05) >= least, (ink, ground)
