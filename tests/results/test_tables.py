"""Tables: every number defined, no lone perplexity, every text escaped in every format."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from rich.console import Console

from tsdfm_bench.results import render, schema
from tsdfm_bench.results.columns import columns_path
from tsdfm_bench.results.numbers import plain, whole, with_interval
from tsdfm_bench.results.tables import (
    LonePerplexity,
    MixedColumn,
    Table,
    TableColumn,
    TableRow,
    Value,
    main_table,
    main_tables,
)

Rows = list[dict[str, Any]]
NASTY = 'a|b [red]x[/red] \\ $y_1 & 50% #1 {z} ~^ <b>"q"</b> `c` *d*\x1b[31m\nnew\x07 \ud800'


def show(table: Table, width: int) -> str:
    """What a terminal of this width shows."""
    console = Console(width=width, record=True, file=io.StringIO(), force_terminal=False)
    console.print(render.to_rich(table, width))
    return console.export_text()


def test_rows_sections_and_order(summary: pd.DataFrame) -> None:
    table = main_table(summary)
    assert [(row.section, row.text("method")) for row in table.rows] == [
        ("method", "tsdfm"),
        ("method", "mdlm"),
        ("method", "mdlm"),
        ("method", "ar"),
        ("reference", "real"),
        ("reference", "bigram"),
        ("reference", "loop"),
        ("not done", "sedd"),
        ("not done", "ar"),
    ]
    first = {key: value.text for key, value in table.rows[0].cells.items()}
    assert first["source"] == "uniform"
    assert first["steps"] == "8"
    assert first["gen_ppl/pooled@smollm2"] == "61.3±1.8"
    assert first["entropy_nats"] == "3.810±0.010"
    assert table.rows[2].text("calls") == "64 (61.2)"
    assert table.rows[3].text("steps") == "–"


def test_every_number_is_defined_below(summary: pd.DataFrame) -> None:
    notes = "\n".join(main_table(summary, notes=["Scorer x could not be fetched."]).footnotes)
    for words in (
        "gen-PPL (char-rnn), gen-PPL (smollm2): exp of summed NLL",
        "entropy (nats): unigram entropy",
        "Scorer smollm2: SmolLM2-135M-Instruct, Q4_1 GGUF, float32.",
        "± is half the width of the 95 % interval",
        "All rows: 256 sequences per row, temperature 1, nucleus off, fp64 draw, seed 0.",
        "MAUVE of real text against other real text, the ceiling at this n: 0.70±0.05 (n = 256).",
        "entropy-low: ",
        "All generators (char-rnn, smollm2): a canary that only repeats itself",
        "1  failed: RuntimeError: boom",
        "2  skipped: no source [mask]",
        "Scorer x could not be fetched.",
    ):
        assert words in notes
    table = main_table(summary)
    for column in table.columns:
        if column.role:
            assert any(note.split(":")[0].find(column.heading) >= 0 for note in table.footnotes), column.heading


def test_mauve_may_belong_to_a_scorer_and_may_have_its_own_ceiling(rows: Rows) -> None:
    for row in [row for row in rows if row.get("metric") == "mauve"]:
        row["scorer"] = "smollm2"
        rows.append({**row, "metric": "mauve_ceiling", "value": 0.96, "low": 0.94, "high": 0.98})
    table = main_table(schema.from_rows(rows))
    assert next(column.heading for column in table.columns if column.role == "mauve") == "MAUVE (smollm2)"
    assert table.rows[0].text("mauve@smollm2") == "0.70±0.05"
    assert any("the ceiling at this n: 0.96±0.02 (n = 256)" in note for note in table.footnotes)
    assert any(note.startswith("All generators: MAUVE from fewer than") for note in table.footnotes)


def test_a_metric_of_a_plug_in_has_its_column_and_its_definition(rows: Rows) -> None:
    counted = [
        {**row, "metric": "words", "scorer": "", "definition": "words of a sample"}
        for row in rows
        if row.get("metric", "").startswith("entropy")
    ]
    table = main_table(schema.from_rows([*rows, *counted]))
    assert [column.title for column in table.columns if column.role == "added"] == ["words"]
    assert any("words: words of a sample" in note for note in table.footnotes)
    assert not any(column.role == "added" for column in main_table(schema.from_rows(rows)).columns)


def test_a_lone_perplexity_cannot_be_made() -> None:
    ppl, entropy = TableColumn("p", "gen-PPL", role="perplexity"), TableColumn("h", "entropy", role="entropy")
    with pytest.raises(LonePerplexity, match="without entropy"):
        Table("t", [ppl], [])
    with pytest.raises(LonePerplexity, match="a row"):
        Table("t", [ppl, entropy], [TableRow("method", {"p": Value("5", 5.0), "h": Value("–")})])
    Table("t", [ppl, entropy], [TableRow("method", {"p": Value("5", 5.0), "h": Value("3", 3.0)})])
    Table("t", [entropy], [])


def test_perplexity_without_entropy_is_withheld_and_said(rows: Rows) -> None:
    kept = [row for row in rows if not (row.get("metric") == "entropy_nats" and row["method"] == "ar")]
    table = main_table(schema.from_rows(kept))
    ar = next(row for row in table.rows if row.text("method") == "ar" and row.section == "method")
    assert ar.text("gen_ppl/pooled@smollm2") == "–"
    assert any(note.startswith("Perplexity of 1 rows is withheld") for note in table.footnotes)
    none = [row for row in rows if row.get("metric") != "entropy_nats"]
    table = main_table(schema.from_rows(none))
    assert not any(column.role == "perplexity" for column in table.columns)
    assert any(note.startswith("Perplexity of 7 rows is withheld") for note in table.footnotes)


@pytest.mark.parametrize("width", [60, 80, 100, 120, 160])
def test_a_terminal_of_any_width_shows_entropy_beside_perplexity(summary: pd.DataFrame, width: int) -> None:
    text = show(main_table(summary), width)
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    header = next(line for line in lines if "gen-PPL" in line)
    assert "entropy" in header
    if width >= 80:
        row = next(line for line in lines if line.split()[:3] == ["mdlm", "mask", "1024"])
        assert "74±2" in row
        assert "3.830±0.010" in row
    if width < 160:
        assert "Left out at this width" in text
    else:
        assert "Left out" not in text
        assert "seq/s" in text


def test_long_labels_wrap_and_keep_their_text(cell: Callable[..., Rows]) -> None:
    label = "tsdfm[solver=exact,temperature-schedule=linear,finaliser=argmax]"
    rows = cell("tsdfm", {"s": 60.0}, 3.8, label=label) + cell("real", {"s": 30.0}, 3.8, kind="reference")
    text = show(main_table(schema.from_rows(rows)), 100)
    body = text[text.index("tsdfm[") : text.index("real")]
    assert label in "".join(re.split(r"\s{2,}", line.strip())[0] for line in body.splitlines())
    assert "60.0±1.8" in text


def test_settings_that_differ_become_columns(cell: Callable[..., Rows]) -> None:
    rows = [
        *cell("a", {"s": 50.0}, 3.8, temperature=0.8, steps=8),
        *cell("b", {"s": 50.0}, 3.8, draw="legacy-fp32", top_p=0.9, top_p_rule="inclusive", n=128),
        *cell("c", {"s": 50.0}, 3.8, cell="c1", checkpoint="one"),
        *cell("c", {"s": 51.0}, 3.8, cell="c2", checkpoint="two"),
        *cell("real", {"s": 30.0}, 3.8, kind="reference"),
    ]
    table = main_table(schema.from_rows(rows))
    assert {"temperature", "draw", "top_p", "n", "checkpoint"} <= set(table.keys())
    assert "seed" not in table.keys()  # noqa: SIM118 - a method of the table, not of a dict
    b = table.rows[1]
    assert [b.text(key) for key in ("temperature", "draw", "top_p", "n")] == [
        "1",
        "legacy-fp32",
        "0.9 inclusive",
        "128",
    ]
    assert table.rows[0].text("top_p") == "off"
    assert [row.text("checkpoint") for row in table.rows[2:4]] == ["one", "two"]


def test_tasks_and_lengths_never_share_a_table(cell: Callable[..., Rows], rows: Rows) -> None:
    both = schema.from_rows(
        [*rows, *cell("ar", {"s": 20.0}, 4.4, length=128), *cell("ar", {"s": 2.0}, 1.4, task="markov")]
    )
    with pytest.raises(ValueError, match="sotu, 64 tokens, sotu, 128 tokens, markov, 64 tokens"):
        main_table(both)
    assert main_table(both, task="sotu", length=128).title == "sotu, 128 tokens"
    assert [len(table.rows) for table in main_tables(both)] == [9, 1, 1]
    with pytest.raises(ValueError, match="no row of task x"):
        main_table(both, task="x")
    assert main_tables(schema.empty()) == []


def test_a_number_that_could_not_be_had_says_why(rows: Rows) -> None:
    gap = {key: rows[0][key] for key in ("task", "tokenizer", "data_hash", "method", "kind", "state", "length", "cell")}
    rows.append({**gap, "metric": "scores", "scorer": "gpt2", "reason": "no network"})
    table = main_table(schema.from_rows(rows))
    assert "No scores (gpt2) in 1 of 7 rows: no network" in table.footnotes
    told = main_table(schema.from_rows(rows), notes=["Scorer gpt2 is missing: no network"])
    assert sum("no network" in note for note in told.footnotes) == 1
    assert not any("gpt2" in column.heading for column in table.columns)
    assert any("scorer-missing" in note or note.startswith("All generators (gpt2)") for note in table.footnotes)


def test_a_summary_of_failures_only() -> None:
    bad = {"task": "sotu", "method": "m", "label": "m", "kind": "method", "state": "failed"}
    summary = schema.from_rows([{**bad, "cell": f"c{i}", "reason": "disk full", "steps": 2**i} for i in range(3)])
    table = main_table(summary)
    assert [row.text("flags") for row in table.rows] == ["failed 1"] * 3
    assert table.footnotes == ["1  failed: disk full"]
    assert "failed 1" in show(table, 80)
    for name in render.FORMATS:
        assert "disk full" in render.render(table, name) or name == "csv"


def test_failed_rows_without_data_hash_stay_with_their_task(rows: Rows) -> None:
    for row in rows[-2:]:
        assert "data_hash" not in row
    assert len(main_tables(schema.from_rows(rows))) == 1


# ------------------------------------------------------------------------------------------------------ formats


@pytest.fixture
def nasty(rows: Rows) -> Table:
    """A table whose label, reason and note hold every special character."""
    rows[-1]["label"] = rows[-1]["reason"] = NASTY
    return main_table(schema.from_rows(rows), notes=[NASTY])


def test_rich_shows_markup_as_text(nasty: Table) -> None:
    text = show(nasty, 200)
    assert "[red]x[/red]" in text
    assert "\x1b" not in text
    assert "\x07" not in text
    text.encode()


def test_markdown_has_one_cell_per_column(nasty: Table) -> None:
    text = render.to_markdown(nasty)
    body = [line for line in text.splitlines() if line.startswith("|")]
    columns = len(nasty.columns)
    assert len(body) == 2 + len(nasty.rows) + 2  # header, rule, rows, two section lines
    for line in body:
        assert len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) == columns + 1
    assert "<b>" not in text
    assert r"a\|b \[red\]x" in text
    text.encode()


def test_latex_escapes_every_special_character(nasty: Table) -> None:
    text = render.to_latex(nasty)
    assert r"\toprule" in text
    row = next(line for line in text.splitlines() if "textbar" in line)
    assert (
        r"a\textbar{}b [red]x[/red] \textbackslash{} \$y\_1 \& 50\% \#1 \{z\} \textasciitilde{}\textasciicircum{}"
        in row
    )
    lines = text[text.index(r"\toprule") : text.index(r"\bottomrule")].splitlines()
    widths = {len(re.findall(r"(?<!\\)&", line)) for line in lines if line.endswith(r"\\")}
    assert widths == {len(nasty.columns) - 1}
    assert render.escape_latex("--out") == "-{}-out"  # two hyphens would be a dash
    stripped = re.sub(r"-\{\}-|\\[A-Za-z]+\{\}|\\[{}$&%#_]|\$\\pm\$", "", "\n".join(lines))
    assert not re.search(r"[$%#_^~{}]", stripped)
    text.encode()


def test_csv_and_json_carry_the_numbers(nasty: Table, summary: pd.DataFrame) -> None:
    records = list(csv.DictReader(io.StringIO(render.to_csv(nasty))))
    assert len(records) == len(nasty.rows)
    assert float(records[0]["gen-PPL (smollm2)"]) == 61.3
    assert float(records[0]["gen-PPL (smollm2) low"]) < 61.3 < float(records[0]["gen-PPL (smollm2) high"])
    assert records[-1]["method"].startswith("a|b [red]x[/red]")
    content = json.loads(render.to_json(main_table(summary)))
    entropy = content["rows"][0]["cells"]["entropy_nats"]
    assert entropy == {"text": "3.810±0.010", "value": 3.81, "low": pytest.approx(3.8), "high": pytest.approx(3.82)}
    assert content["rows"][3]["cells"]["steps"]["value"] is None
    assert content["footnotes"] == main_table(summary).footnotes
    json.loads(render.to_json(nasty))
    wide = Table("t", [TableColumn("x", "x")], [TableRow("method", {"x": Value("1", 1.0, 0.0, float("inf"))})])
    assert json.loads(render.to_json(wide))["rows"][0]["cells"]["x"]["high"] is None


def test_csv_has_texts_that_stand_for_no_number() -> None:
    cells = {"a": Value("one, two"), "b": Value("–"), "c": Value("1.0", 1.0)}
    table = Table("t", [TableColumn(key, key) for key in cells], [TableRow("method", cells)])
    (record,) = csv.DictReader(io.StringIO(render.to_csv(table)))
    assert record == {"section": "method", "a": "one, two", "b": "", "c": "1.0"}


def test_html_is_text_only(nasty: Table) -> None:
    tags: set[str] = set()
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attrs: tags.add(tag)  # type: ignore[method-assign]
    parser.feed(render.to_html(nasty))
    assert tags == {"table", "caption", "thead", "tbody", "tr", "th", "td", "ul", "li"}


def test_unknown_format_names_the_known() -> None:
    with pytest.raises(ValueError, match="choose markdown, csv, latex, json, html"):
        render.render(Table("t", [], []), "pdf")


# ------------------------------------------------------------------------------------------------------ numbers


@pytest.mark.parametrize(
    ("value", "low", "high", "text"),
    [
        (54.63, 52.41, 56.72, "55±2"),
        (54.63, 53.31, 55.94, "54.6±1.3"),
        (3.8123, 3.8023, 3.8223, "3.812±0.010"),
        (3.8123, 3.8027, 3.8219, "3.812±0.010"),  # half-width 0.0096 rounds up to a first digit 1
        (12345.0, 11700.0, 13000.0, "12300±600"),
        (12345.0, 11000.0, 13700.0, "12300±1400"),  # half-width 1350, to the even hundred
        (0.0004, -0.0396, 0.0404, "0.00±0.04"),
        (-0.0004, -0.0404, 0.0396, "0.00±0.04"),
        (-1.26, -1.56, -0.96, "-1.3±0.3"),
        (28.1, -472.0, 528.0, "30±500"),  # wide, but no zero
        (0.04, -0.46, 0.54, "0.04±0.50"),
        (5.0, 5.0, 5.0, "5.000"),
        (5.0, None, None, "5.00"),
        (5.0, float("nan"), float("nan"), "5.00"),
        (float("inf"), 1.0, 2.0, "inf"),
        (float("nan"), 1.0, 2.0, "–"),
        (None, None, None, "–"),
        (3e9, 2e9, 4e9, "3.00e+09±1.0e+09"),
    ],
)
def test_digits_follow_the_interval(value: float, low: float, high: float, text: str) -> None:
    assert with_interval(value, low, high) == text
    assert with_interval(value, low, high, show=False) == text.split("±")[0]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (1234567.0, "1230000"),
        (9.996, "10.0"),
        (0.00012345, "0.000123"),
        (1e-9, "1.00e-09"),
        (99.95, "100"),
        (-2.5, "-2.50"),
    ],
)
def test_plain_numbers(value: float, text: str) -> None:
    assert plain(value) == text


def test_counts() -> None:
    assert [whole(v) for v in (8.0, 61.23, None, float("nan"))] == ["8", "61.2", "–", "–"]


@pytest.mark.parametrize(
    ("key", "other", "what"),
    [
        ("scorer_revision", "r2", "weights"),
        ("scorer_dtype", "bfloat16", "arithmetic"),
        ("definition", "per word", "way"),
    ],
)
def test_a_column_of_two_scorers_or_conventions_is_refused(rows: Rows, key: str, other: str, what: str) -> None:
    main_table(schema.from_rows(rows))
    row = next(row for row in rows if row.get("metric") == "gen_ppl/pooled" and row["method"] == "ar")
    row[key] = other
    with pytest.raises(MixedColumn, match=f"gen-PPL.*different {what}: .*ar") as refused:
        main_table(schema.from_rows(rows))
    assert "Score all rows with one scorer" in str(refused.value)


def lower(rows: Rows) -> pd.DataFrame:
    """A summary whose perplexities say which direction is better."""
    return schema.from_rows([{**r, "better": "lower"} if r.get("metric") == "gen_ppl/pooled" else r for r in rows])


def test_only_a_best_row_that_can_be_told_apart_is_bold(cell: Callable[..., Rows]) -> None:
    real = cell("real", {"s": 30.0}, 3.8, kind="reference")

    def bold(first: float, second: float, entropy: float = 3.8) -> list[str]:
        rows = [*cell("a", {"s": first}, entropy), *cell("b", {"s": second}, 3.8), *real]
        table = main_table(lower(rows))
        assert any(note.startswith("Bold:") for note in table.footnotes) == any(
            row.best("gen_ppl/pooled@s") for row in table.rows
        )
        return [row.text("method") for row in table.rows if row.best("gen_ppl/pooled@s")]

    assert bold(50.0, 60.0) == ["a"]  # intervals of 3 % on either side
    assert bold(60.0, 50.0) == ["b"]
    assert bold(50.0, 51.0) == []
    assert bold(50.0, 60.0, entropy=2.0) == []  # collapsed: it does not compete, and alone nobody is the best


def test_a_table_with_damaged_columns_says_so(cell: Callable[..., Rows], tmp_path: Path) -> None:
    rows = [*cell("a", {"s": 50.0}, 3.8), *cell("b", {"s": 60.0}, 3.8)]
    path = columns_path(tmp_path, "gen-ppl", rows[0]["cell"])
    path.parent.mkdir(parents=True)
    path.write_bytes(b"PK damaged")
    summary = lower(rows)
    table, alone = main_table(summary, root=tmp_path), main_table(summary)
    assert table.rows == alone.rows
    (note,) = (note for note in table.footnotes if note not in alone.footnotes)
    assert note.startswith(f"columns/gen-ppl/{path.name} cannot be read")


def test_many_rows_are_compared_with_the_best_together(cell: Callable[..., Rows]) -> None:
    """One difference at p = 0.03 is told apart alone, not among twenty (Holm)."""
    near = 50 * 1.047  # 3 % on either side twice: 2.17 standard errors
    few = [*cell("best", {"s": 50.0}, 3.8), *cell("near", {"s": near}, 3.8)]
    assert [row.best("gen_ppl/pooled@s") for row in main_table(lower(few)).rows] == [True, False]
    many = [row for i in range(19) for row in cell(f"near{i}", {"s": near}, 3.8)]
    assert not any(row.best("gen_ppl/pooled@s") for row in main_table(lower([*few, *many])).rows)


def test_seconds_of_different_devices_stand_beside_their_devices(cell: Callable[..., Rows]) -> None:
    """One GPU for all: nothing is said in the rows. Two kinds, also within one row: each row says its own."""
    same = [row for name in "ab" for row in cell(name, {"s": 9.0}, 3.8, device="NVIDIA H100")]
    assert "device" not in [column.key for column in main_table(schema.from_rows(same)).columns]
    mixed = same + cell("c", {"s": 9.0}, 3.8, device="NVIDIA A100, NVIDIA H100") + cell("d", {"s": 9.0}, 3.8)
    table = main_table(schema.from_rows(mixed))
    shown = {row.text("method"): row.text("device") for row in table.rows}
    assert shown == {"a": "NVIDIA H100", "b": "NVIDIA H100", "c": "NVIDIA A100, NVIDIA H100", "d": "–"}
    assert "NVIDIA A100" in show(table, 200)
