"""`file:samples.jsonl`: samples made elsewhere are scored as they are, and wrong lines are named before any work."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from tsdfm_bench.api import SampleBatch, SampleRequest
from tsdfm_bench.cli import app
from tsdfm_bench.conformance import Target, conform
from tsdfm_bench.errors import PluginError, UsageError
from tsdfm_bench.methods.file import File, read_samples
from tsdfm_bench.results.schema import read_summary
from tsdfm_bench.results.store import RunFolder, Samples, read_scores
from tsdfm_bench.rng import Streams
from tsdfm_bench.tasks.text import Sotu
from tsdfm_bench.texts import encode, pack, unpack

V = 2048


def written(folder: Path, *lines: object, name: str = "samples.jsonl") -> Path:
    path = folder / name
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines), "utf-8")
    return path


def asked(path: Path, batch: int = 4, length: int = 5, first: int = 0, **settings: object):
    method = File.load({"name": str(path), "vocab_size": V, "length": length}, "cpu")
    return method, SampleRequest(Streams.of(0, "cell", batch, first), length, None, **settings)  # type: ignore[arg-type]


def test_ids_are_cut_padded_and_counted(tmp_path: Path) -> None:
    path = written(tmp_path, [1, 2, 3], {"ids": [4, 5, 6, 7, 8, 9]}, {"ids": [10, 0, 0], "length": 1})
    method, request = asked(path)
    batch = method.sample(request)
    assert batch.tokens.tolist() == [[1, 2, 3, 0, 0], [4, 5, 6, 7, 8], [10, 0, 0, 0, 0], [1, 2, 3, 0, 0]]
    assert batch.lengths.tolist() == [3, 5, 1, 3]
    assert method.sample(asked(path, 1, first=1)[1]).tokens.tolist() == [[4, 5, 6, 7, 8]]


def test_texts_are_handed_over_as_they_are(tmp_path: Path) -> None:
    texts = ['"Quoted", naïve\u2028 text', "two\nlines "]
    method, request = asked(written(tmp_path, {"text": texts[0]}, json.dumps(texts[1])), 2)
    assert method.sample(request).texts == tuple(texts)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (['"fine"', "{oops"], "line 2: not JSON"),
        (['"fine"', "", '"fine"'], "line 2: it is empty"),
        (['"fine"', "[1, 2]"], "line 2: token ids, but line 1 holds a text"),
        (["[1, 2]", "[1, 2048]"], "line 2: the id 2048 is not in [0, 2048)"),
        (["[1, -1]"], "line 1: the id -1"),
        (["[1, 2.5]"], "line 1: 2.5 is no token id"),
        (["[true]"], "line 1: true is no token id"),
        (["[]"], "line 1: there are no ids"),
        (['" "'], "line 1: the text is empty"),
        (["3"], "line 1: a line is a text"),
        (['{"txt": "a"}'], "line 1: it needs 'text' or 'ids'"),
        (['{"text": 3}'], "line 1: a line is a text"),
        (['{"ids": [1], "length": 2}'], "line 1: 'length' must be a number from 1 to 1"),
        (['"\\ud800"'], "line 1: the text has half a surrogate pair"),
        (["[" * 100_000], "line 1: not JSON"),
        ([], "holds no samples"),
    ],
)
def test_wrong_lines_are_named(tmp_path: Path, lines: list[str], said: str) -> None:
    with pytest.raises(UsageError) as error:
        read_samples(written(tmp_path, *lines), V)
    assert said in str(error.value)


def test_bytes_that_are_no_text_are_named(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    path.write_bytes(b'"fine"\n"\xff"\n')
    with pytest.raises(UsageError, match="line 2: not UTF-8"):
        read_samples(path, V)


def test_identity_is_the_content(tmp_path: Path) -> None:
    one, two = written(tmp_path, [1], name="one"), written(tmp_path, [1], name="two")
    names = [File.identify({"name": str(path), "vocab_size": V}).weights for path in (one, two)]
    assert names[0] == names[1]
    written(tmp_path, [1, 2], name="two")
    assert File.identify({"name": str(two), "vocab_size": V}).weights != names[0]


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.5},
        {"top_p": 0.9},
        {"draw": "legacy-fp32"},
        {"source": "mask"},
        {"prefix": torch.zeros(4, 5, dtype=torch.int64), "pinned": torch.ones(4, 5, dtype=torch.bool)},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_what_is_made_cannot_be_made_otherwise(tmp_path: Path, settings: dict[str, object]) -> None:
    method, request = asked(written(tmp_path, [1]), **settings)
    assert method.refuse(request)


def test_a_text_is_cut_where_its_tokens_are() -> None:
    """What fits stays as it is; what is cut is the beginning of the text, without half a character at its end."""
    task = Sotu.load({})
    whole, long = "We shall  prevail.", "The state of the Union is ☃☃☃☃"
    empty = SampleBatch(torch.zeros(2, 12, dtype=torch.int64), torch.zeros(2, dtype=torch.int64), texts=(whole, long))
    found, texts = encode(empty, task, 12)
    assert texts is not None
    assert texts[0] == whole
    assert long.startswith(texts[1])
    assert len(texts[1]) < len(long)
    assert found.lengths.tolist() == [len(task.encode(whole)), 12]
    kept = unpack(Samples(np.zeros((2, 1), np.int32), np.zeros(2, np.int64), pack(texts)))
    assert kept == texts
    with pytest.raises(PluginError, match="a text for each"):
        encode(SampleBatch(found.tokens, found.lengths, texts=("one",)), task, 12)
    for tokens in (None, torch.tensor(0)):
        with pytest.raises(PluginError, match=r"a tensor of tokens \(1, 12\) also with texts.*zeros will do"):
            encode(SampleBatch(tokens, found.lengths, texts=("one",)), task, 12)


def test_it_keeps_the_contract(tmp_path: Path) -> None:
    for lines in ([[i, i + 1, i + 2] for i in range(40)], [f"text {i}" for i in range(40)]):
        path = written(tmp_path, *map(json.dumps, lines))
        report = conform(Target("file", str(path)), isolated=False)
        assert {row.check: row.seen for row in report.rows if row.verdict == "fail"} == {}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)

    def command(methods: str, *more: str):
        fixed = ["--scorers", "char-rnn", "--metrics", "gen-ppl,entropy,cost", "--out", "out", "--threads", "1"]
        return CliRunner().invoke(app, ["run", "--methods", methods, "--samples", "4", *fixed, *more])

    return command


def test_a_run_scores_the_texts_themselves(tmp_path: Path, run) -> None:
    """Two spaces and a snowman: a decoded copy would do, but the numbers must be of exactly these characters."""
    (tmp_path / "sub").mkdir()
    texts = [f"My  fellow citizens, number {i}." for i in range(5)]
    written(tmp_path, *[{"text": text} for text in texts], name="a.jsonl")
    written(tmp_path, *[[i + 1, i + 2, i + 3] for i in range(5)], name="sub/a.jsonl")
    result = run("file:a.jsonl,file:sub/a.jsonl", "--temperatures", "0.5,1")
    assert result.exit_code == 0, result.stderr
    rows = read_summary(tmp_path / "out").query("kind == 'method'")
    assert set(rows["label"]) == {"file:a.jsonl", "file:sub/a.jsonl"}
    assert rows["cell"].nunique() == 2  # temperatures make no further rows
    assert rows["seconds"].isna().all()
    cell = rows.query("label == 'file:a.jsonl'")["cell"].iloc[0]
    scores = read_scores(RunFolder(tmp_path / "out").scores_path("char-rnn", cell))
    assert scores.bytes[:4].tolist() == [len(text.encode()) for text in texts[:4]]


def test_too_few_lines_are_a_reason(tmp_path: Path, run) -> None:
    written(tmp_path, "[1]", "[2]", "[3]")
    result = run("file:samples.jsonl")
    assert "holds 3 samples, asked for 4: type --samples 3" in result.stdout.replace("\n", " ")


@pytest.mark.parametrize(
    ("methods", "said"),
    [
        ("file:bad.jsonl,mdlm", "bad.jsonl, line 2: not JSON"),
        ("file:none.jsonl", "cannot read the samples none.jsonl"),
        ("file", "file:samples.jsonl"),
        ("mdlm:bad.jsonl", "takes nothing after a colon"),
    ],
)
def test_wrong_requests_end_before_any_work(tmp_path: Path, run, methods: str, said: str) -> None:
    written(tmp_path, "[1]", "{", name="bad.jsonl")
    result = run(methods)
    assert result.exit_code == 2
    assert said in result.stderr
    assert not (tmp_path / "out").exists()
