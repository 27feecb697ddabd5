"""`tsdfm-bench report` on run folders: what it gathers, what it says is missing, commands that make the same rows."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from tsdfm_bench.cli import app
from tsdfm_bench.results.store import RunFolder, read_samples, write_json, write_samples
from tsdfm_bench.tracing import read_traces

EXACT = (
    "run --task product[vocab=8;length=6] --methods dfm,mdlm[sampler=first-hitting],ar --checkpoint oracle --steps 2,3 "
    "--sources uniform,mask --temperatures 1,0.5 --top-p none,0.9 --samples 4 --scorers oracle "
    "--metrics entropy,gen-ppl,cost"
)


def cli(*words: object):
    return CliRunner().invoke(app, [str(word) for word in words], prog_name="tsdfm-bench")


@pytest.fixture(scope="module")
def exact(tmp_path_factory) -> RunFolder:
    """A run over an exact law, with rows that are not done among the others."""
    folder = tmp_path_factory.mktemp("exact") / "out"
    result = cli(*shlex.split(EXACT), "--threads", 1, "--out", folder)
    assert (folder / "summary.parquet").exists(), result.output
    return RunFolder(folder)


def test_report_lands_in_the_run_folder_with_texts_and_commands(exact):
    result = cli("report", exact.root, "--json")
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert said["file"] == str(exact.report_path)
    html = exact.report_path.read_text(encoding="utf-8")
    assert said["bytes"] == len(html.encode())
    cell = next(c for c in exact.read_plan()["cells"] if c["method"] == "ar")
    assert html.count('<article class="card"') == 4 * sum(
        bool(exact.completed_batches(c["id"])) for c in exact.read_plan()["cells"] if "set" not in c["options"]
    )
    assert cell["id"] in html
    assert str(exact.root.parent) not in html  # a report can be passed on: no folders of this machine


def test_every_command_makes_its_own_row(exact, monkeypatch, tmp_path):
    from tsdfm_bench.config import make_config
    from tsdfm_bench.reproduce import command_of, row_keys
    from tsdfm_bench.sweep import prepare

    plan = exact.read_plan()
    entries = [*plan["cells"], *plan["not_run"]]
    assert {entry["kind"] for entry in entries} == {"method", "reference"}
    assert plan["not_run"]
    monkeypatch.chdir(tmp_path)
    for entry in entries:
        made = prepare(make_config(row_keys(entry, plan))).plan
        ids = [planned.cell.id for planned in made.cells] + [row.cell.id for row in made.rejected]
        assert entry["id"] in ids, command_of(row_keys(entry, plan))
        methods = [planned for planned in made.cells if planned.cell.kind == "method"]
        assert len(methods) + len(made.rejected) == 1
    picked = next(e for e in entries if e["top_p"] == 0.9)
    words = shlex.split(command_of(row_keys(picked, plan)))
    shown = cli("plan", *words[2:], "--no-timing", "--json")
    assert shown.exit_code == 0, shown.output
    assert picked["id"] in shown.stdout


def test_traces_end_in_the_stored_samples(exact):
    result = cli("report", exact.root, "--traces", 2)
    assert result.exit_code == 0, result.output
    checked = 0
    for cell in exact.read_plan()["cells"]:
        for trace in read_traces(exact, cell["id"]):
            tokens = read_samples(exact.samples_path(cell["id"], 0)).tokens[trace.sequence]
            assert np.array_equal(trace.states[-1], tokens)
            assert (np.diff(trace.steps) > 0).all()
            assert (trace.states[1:] != trace.states[:-1]).any(axis=1).all()
            checked += 1
    methods = [c for c in exact.read_plan()["cells"] if c["kind"] == "method" and exact.completed_batches(c["id"])]
    assert checked == 2 * len(methods)
    assert '<details class="trace"' in exact.report_path.read_text(encoding="utf-8")


def test_samples_of_another_origin_get_no_trace(exact, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(exact.root, copy, ignore=shutil.ignore_patterns("traces"))
    folder = RunFolder(copy)
    cell = next(c["id"] for c in folder.read_plan()["cells"] if c["method"] == "dfm" and c["top_p"] is None)
    path = folder.samples_path(cell, 0)
    samples = read_samples(path)
    write_samples(path, (samples.tokens + 1) % 8, samples.lengths)
    result = cli("report", copy, "--traces", 1)
    assert result.exit_code == 0, result.output
    assert read_traces(folder, cell) == []
    assert "it ends in other tokens than those stored" in folder.report_path.read_text(encoding="utf-8")


def test_a_run_that_was_not_measured_is_reported_as_far_as_it_is(exact, tmp_path):
    plan = {key: value for key, value in exact.read_plan().items() if key != "checksum"}
    write_json(tmp_path / "young" / "plan.json", plan)
    result = cli("report", tmp_path / "young")
    assert result.exit_code == 0, result.output
    html = (tmp_path / "young" / "report.html").read_text(encoding="utf-8")
    assert "Nothing has been measured yet" in html
    assert len(re.findall(r'<span class="status missing">', html)) == len(
        [c for c in plan["cells"] if "set" not in c["options"]]
    )


def test_recorded_results_make_a_report_that_says_there_are_no_samples(tmp_path):
    reference = Path(__file__).parents[2] / "results" / "reference"
    before = sorted(reference.rglob("*"))
    result = cli("report", reference, "--out", tmp_path / "report.html")
    assert result.exit_code == 0, result.output
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "No samples are stored in this run folder" in html
    assert sorted(reference.rglob("*")) == before


def test_a_summary_file_is_enough(exact, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = cli("report", exact.summary_csv_path)
    assert result.exit_code == 0, result.output
    assert "A summary file holds no samples" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_what_is_wrong_is_one_message(exact, tmp_path):
    (tmp_path / "file").write_text("")
    unwritable = cli("report", exact.root, "--out", tmp_path / "file" / "report.html")
    assert unwritable.exit_code == 1
    assert "cannot" in unwritable.stderr
    assert "Traceback" not in unwritable.stderr
    assert cli("report", tmp_path / "none").exit_code == 2
    assert cli("report", exact.root, "--claims", tmp_path / "none.toml").exit_code == 2
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "summary.csv").write_text("schema_version,cell\n99,a\n")
    old = cli("report", tmp_path / "old" / "summary.csv")
    assert old.exit_code == 1
    assert "schema version 99" in old.stderr
