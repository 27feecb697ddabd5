"""`cite` names what a run rests on; `rerun` makes rows again and notices what is not the same."""

from __future__ import annotations

import json
import re
import shlex
import shutil

import numpy as np
import pytest
from typer.testing import CliRunner

from tsdfm_bench.cli import app
from tsdfm_bench.results.store import RunFolder, read_samples, write_samples

EXACT = (
    "run --task product[vocab=8;length=6] --methods dfm,mdlm[sampler=first-hitting],ar --checkpoint oracle --steps 2,3 "
    "--sources uniform,mask --samples 8 --batch-size 4 --scorers oracle --metrics entropy,gen-ppl,cost --threads 1"
)


def cli(*words: object):
    return CliRunner().invoke(app, [str(word) for word in words], prog_name="tsdfm-bench")


@pytest.fixture(scope="module")
def exact(tmp_path_factory) -> RunFolder:
    folder = tmp_path_factory.mktemp("exact") / "out"
    result = cli(*shlex.split(EXACT), "--out", folder)
    assert (folder / "summary.parquet").exists(), result.output
    return RunFolder(folder)


def rerun(exact: RunFolder, out, *words: object):
    result = cli("rerun", exact.root, "--out", out, "--threads", 1, "--json", *words)
    assert result.stdout.startswith("{"), result.output
    return result.exit_code, json.loads(result.stdout)


def test_rows_made_again_are_the_same(exact, tmp_path) -> None:
    code, said = rerun(exact, tmp_path / "again", "--methods", "dfm,ar")
    assert code == 0
    rows = said["rows"]
    assert len(rows) == 5  # dfm: two sources at two step counts; ar: one cell
    assert {row["verdict"] for row in rows} == {"the same tokens and numbers"}
    assert all((row["equal"], row["stored"]) == (8, 8) for row in rows)
    assert all(row["same"] == row["numbers"] > 3 for row in rows)


def test_only_what_is_asked_for_is_made(exact, tmp_path) -> None:
    _, said = rerun(exact, tmp_path / "one", "--methods", "dfm", "--steps", "3", "--sources", "mask")
    assert [row["name"] for row in said["rows"]] == ["dfm mask, 3 steps"]
    made = [cell for cell in RunFolder(tmp_path / "one").read_plan()["cells"] if cell["kind"] == "method"]
    stored = {cell["id"]: cell for cell in exact.read_plan()["cells"]}
    assert [(cell["method"], cell["steps"]) for cell in made] == [("dfm", 3)]
    assert made[0]["id"] in stored


def test_a_changed_token_is_noticed(exact, tmp_path) -> None:
    """One token of the first run is another: the tokens differ, the stored numbers do not."""
    import shutil

    shutil.copytree(exact.root, tmp_path / "run")
    first = RunFolder(tmp_path / "run")
    cell = next(c["id"] for c in first.read_plan()["cells"] if c["method"] == "ar")
    path = first.samples_path(cell, 1)
    samples = read_samples(path)
    tokens = np.array(samples.tokens)
    tokens[2, 0] = (tokens[2, 0] + 1) % 8
    path.unlink()
    write_samples(path, tokens, samples.lengths, **samples.extra)
    _, said = rerun(first, tmp_path / "again", "--methods", "ar")
    assert [(row["equal"], row["stored"]) for row in said["rows"]] == [(7, 8)]
    assert said["rows"][0]["verdict"] == "not the same, not told apart"


def test_other_weights_are_no_rerun(exact, tmp_path) -> None:
    """A row whose number is far off fails, with the number's name."""
    import shutil

    from tsdfm_bench.results.store import read_table, write_table

    shutil.copytree(exact.root, tmp_path / "run")
    path = tmp_path / "run" / "summary.parquet"
    summary = read_table(path)
    rows = (summary["method"] == "ar") & (summary["metric"] == "entropy_nats")
    assert rows.sum() == 1
    for name in ("value", "low", "high"):
        summary.loc[rows, name] = summary.loc[rows, name] * 3
    shutil.rmtree(tmp_path / "run" / "columns")  # then the summary's intervals are all there is
    write_table(path, summary)
    code, said = rerun(RunFolder(tmp_path / "run"), tmp_path / "again", "--methods", "ar")
    assert code == 1
    assert said["rows"][0]["verdict"] == "differs: entropy_nats"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--methods", "dmf"), "unknown method 'dmf'"),
        (("--steps", "7"), "unknown step '7'"),
        (("--sources", "uniforn"), "unknown source 'uniforn'"),
        (("--methods", "mdlm", "--sources", "uniform"), "no generator of this run is left"),
    ],
)
def test_rows_that_do_not_exist_are_refused(exact, tmp_path, words, message) -> None:
    result = cli("rerun", exact.root, "--out", tmp_path / "x", *words)
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (tmp_path / "x").exists()


def test_a_run_is_not_made_again_over_itself(exact) -> None:
    result = cli("rerun", exact.root, "--out", exact.root, "--methods", "ar")
    assert result.exit_code == 2
    assert "is the run itself" in result.stderr


def test_every_source_of_a_run_is_cited_once(exact) -> None:
    result = cli("cite", exact.root)
    assert result.exit_code == 0, result.output
    keys = re.findall(r"^@\w+\{([^,]+),$", result.stdout, flags=re.MULTILINE)
    assert len(keys) == len(set(keys))
    assert {"tsdfm-bench", "arxiv.2407.15595", "arxiv.2406.07524", "arxiv.1706.03762"} <= set(keys)
    assert "arxiv.2605.07924" not in keys  # tsdfm is not in this run
    assert result.stdout.count("{") == result.stdout.count("}")
    assert "% scorer oracle: revision" in result.stdout


def test_generators_are_cited_by_name() -> None:
    said = json.loads(cli("cite", "--methods", "tsdfm,sedd", "--json").stdout)
    assert [entry["uses"] for entry in said] == [["harness"], ["method tsdfm"], ["method sedd"]]
    assert "2605.07924" in said[1]["bibtex"]
    assert cli("cite", "--methods", "tsdmf").exit_code == 2


def test_a_run_without_a_summary_is_cited_without_its_scorers(exact, tmp_path) -> None:
    """It is not finished yet, or was interrupted."""
    shutil.copytree(exact.root, tmp_path / "begun")
    (tmp_path / "begun" / "summary.parquet").unlink()
    result = cli("cite", tmp_path / "begun")
    assert result.exit_code == 0, result.stderr
    whole = cli("cite", exact.root).stdout
    assert result.stdout
    assert whole.startswith(result.stdout.rstrip())
