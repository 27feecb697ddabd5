"""Canaries: their laws, and that a sequence depends on its own stream only."""

from __future__ import annotations

import itertools
import os

import numpy as np
import pytest
import torch
from scipy import stats

from tsdfm_bench.errors import UsageError
from tsdfm_bench.rng import Streams
from tsdfm_bench.tasks import text
from tsdfm_bench.tasks.canaries import LOOP_TOKENS, HeldOut, NgramCanaries, loop_phrase, shuffle_words

VOCABULARY = 5
SIGNIFICANCE = 1e-4  # of each chi-square test below; seeds are fixed


@pytest.fixture(scope="module")
def stream() -> np.ndarray:
    """A stream of five tokens with uneven frequencies and transitions."""
    generator = np.random.default_rng(3)
    table = generator.dirichlet([0.5] * VOCABULARY, size=VOCABULARY) + 0.02
    table /= table.sum(1, keepdims=True)
    tokens = [0]
    for _ in range(4000):
        tokens.append(int(generator.choice(VOCABULARY, p=table[tokens[-1]])))
    return np.asarray(tokens)


def transitions(tokens: np.ndarray) -> np.ndarray:
    counts = np.zeros((VOCABULARY, VOCABULARY))
    np.add.at(counts, (tokens[..., :-1].ravel(), tokens[..., 1:].ravel()), 1)
    return counts


def test_unigram_draws_the_frequencies_of_the_stream(stream):
    drawn = NgramCanaries(stream, VOCABULARY).unigram(Streams.of(0, "u", 400), 50).numpy()
    expected = np.bincount(stream, minlength=VOCABULARY) / len(stream)
    assert (
        stats.chisquare(np.bincount(drawn.ravel(), minlength=VOCABULARY), expected * drawn.size).pvalue > SIGNIFICANCE
    )
    assert stats.chisquare(np.bincount(drawn[:, 7], minlength=VOCABULARY), expected * len(drawn)).pvalue > SIGNIFICANCE


def test_unigram_positions_are_independent(stream):
    drawn = NgramCanaries(stream, VOCABULARY).unigram(Streams.of(1, "u", 400), 50).numpy()
    assert stats.chi2_contingency(transitions(drawn)).pvalue > SIGNIFICANCE


def test_bigram_draws_the_transitions_of_the_stream(stream):
    drawn = NgramCanaries(stream, VOCABULARY).bigram(Streams.of(0, "b", 400), 50).numpy()
    law = transitions(np.append(stream, stream[0]))  # a ring
    counts = transitions(drawn)
    for row in range(VOCABULARY):
        possible = law[row] > 0
        assert counts[row][~possible].sum() == 0
        expected = law[row][possible] / law[row].sum() * counts[row].sum()
        assert stats.chisquare(counts[row][possible], expected).pvalue > SIGNIFICANCE


def test_bigram_starts_with_the_frequencies_of_the_stream(stream):
    first = NgramCanaries(stream, VOCABULARY).bigram(Streams.of(2, "b", 2000), 2)[:, 0].numpy()
    expected = np.bincount(stream, minlength=VOCABULARY) / len(stream)
    assert stats.chisquare(np.bincount(first, minlength=VOCABULARY), expected * len(first)).pvalue > SIGNIFICANCE


@pytest.mark.parametrize("name", text.REFERENCES)
def test_a_sequence_depends_on_its_own_stream_only(name, references):
    """The same sequences, drawn together, one by one, and in another order."""
    streams = Streams.of(7, name, 6)
    together = references.reference(name, streams, 24).tokens
    order = torch.tensor([5, 0, 3])
    assert torch.equal(references.reference(name, streams.select(order), 24).tokens, together[order])
    for row in range(6):
        assert torch.equal(references.reference(name, streams.select(torch.tensor([row])), 24).tokens[0], together[row])


def test_windows_of_a_round_cover_the_stream_without_overlap():
    held_out = HeldOut(np.arange(103))
    windows = held_out.windows(Streams.of(0, "w", 10), 10)
    assert sorted(windows.ravel().tolist()) == list(range(100))
    other_key = held_out.windows(Streams.of(1, "w", 10), 10)
    assert not torch.equal(windows, other_key)


def test_windows_beyond_a_round_are_other_windows_of_the_ring():
    windows = HeldOut(np.arange(103)).windows(Streams.of(0, "w", 40), 10)
    steps = (windows[:, 1:] - windows[:, :-1]) % 103
    assert bool((steps == 1).all())
    assert len(torch.unique(windows[:, 0])) > 20
    for turn in range(4):
        assert len(torch.unique(windows[10 * turn : 10 * turn + 10])) == 100


def test_too_short_held_out_text_is_refused():
    with pytest.raises(UsageError, match="9 tokens"):
        HeldOut(np.arange(9)).windows(Streams.of(0, "w", 1), 10)


def test_shuffle_permutes_whole_words():
    starts = torch.tensor([False, True])
    row = torch.tensor([[0, 0, 1, 1, 0, 0, 1, 0]])  # words: 00 | 1 | 100 | 10
    seen = {tuple(shuffle_words(row, starts, Streams.of(seed, "s", 1))[0].tolist()) for seed in range(200)}
    words = [(0, 0), (1,), (1, 0, 0), (1, 0)]
    assert seen == {sum(order, ()) for order in itertools.permutations(words)}


def test_loop_repeats_one_phrase_from_a_word_start():
    starts = torch.zeros(40, dtype=torch.bool)
    starts[[3, 10, 30]] = True
    row = torch.arange(40)[None]
    looped = loop_phrase(row, starts)[0]
    assert looped.tolist() == [3 + i % LOOP_TOKENS for i in range(40)]
    late = loop_phrase(row, torch.arange(40) == 39)[0]  # no word start leaves room for the phrase
    assert late.tolist() == [i % LOOP_TOKENS for i in range(40)]


@pytest.fixture(scope="module")
def references() -> text.Sotu:
    """The task with its n-grams fitted on the validation split, which is quicker to tokenise."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "_ngrams", lambda: NgramCanaries(text.token_stream("validation"), text.VOCAB_SIZE))
        yield text.Sotu.load({})


def test_reference_rows_of_the_task(references):
    assert references.info.references[0] == "real"
    streams = Streams.of(0, "rows", 5)
    real = references.reference("real", streams, 32)
    shuffled = references.reference("shuffled", streams, 32).tokens
    assert real.tokens.shape == (5, 32)
    assert real.lengths.tolist() == [32] * 5
    assert torch.equal(shuffled.sort(1).values, real.tokens.sort(1).values)
    assert not torch.equal(shuffled, real.tokens)
    assert torch.equal(references.prompts(streams, 32), real.tokens)
    held_out = set(map(tuple, np.lib.stride_tricks.sliding_window_view(text.token_stream("test"), 32).tolist()))
    assert all(tuple(row) in held_out for row in real.tokens.tolist())


def test_unknown_reference_names_the_nearest(references):
    with pytest.raises(UsageError, match="'bigram'"):
        references.reference("bigrams", Streams.of(0, "x", 1), 8)


def test_decoding_is_the_inverse_of_encoding(references):
    written = [
        "The people of the United States.\nWe—the people—say: “yes”.",
        "One year<|endoftext|>My fellow:",
    ]
    rows = [references.encode(line) for line in written]
    lengths = np.asarray([len(row) for row in rows])
    tokens = np.zeros((2, lengths.max()), dtype=np.int32)
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = ids
    assert references.decode(tokens, lengths) == written
    assert text.END_OF_TEXT_ID in rows[1]


def test_the_kept_token_stream_is_the_tokenised_one(private_cache):
    """Written by the first call with an empty cache, read here."""
    text.token_stream.cache_clear()
    expected = text.token_stream("test")
    (path,) = (private_cache / "tokens").glob("sotu-test-*.npz")
    np.testing.assert_array_equal(text._read_stream(path), expected)
    content = path.read_bytes()
    for damaged in (content[:-100], b""):  # cut short, and what a power cut leaves
        path.write_bytes(damaged)
        assert text._read_stream(path) is None
        text.token_stream.cache_clear()
        np.testing.assert_array_equal(text.token_stream("test"), expected)
        np.testing.assert_array_equal(text._read_stream(path), expected)


def test_a_kept_token_stream_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    there = []
    monkeypatch.setattr(os, "fsync", lambda handle: there.append((tmp_path / "kept.npz").exists()))
    text._keep_stream(tmp_path / "kept.npz", np.arange(5))
    assert there == [False]
    assert text._read_stream(tmp_path / "kept.npz").tolist() == [0, 1, 2, 3, 4]


def test_training_streams_are_train_and_validation(references, monkeypatch):
    monkeypatch.setattr(text, "token_stream", lambda split: np.asarray([len(split)]))
    streams = references.training_streams()
    assert (streams.train.tolist(), streams.validation.tolist()) == ([5], [10])
    assert streams.data_hash == text.split_hash("train") != references.info.data_hash
