"""Memorisation: planted copies are found, exactly and nearly; other text is not accused."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from tsdfm_bench.api import CellData, Infilling, TrainingStreams
from tsdfm_bench.tasks.metrics import memorisation
from tsdfm_bench.tasks.metrics.memorisation import GRAM, Memorisation, TrainingIndex, gram_hashes

RNG = np.random.default_rng(0)
TEXT = RNG.integers(0, 500, 20_000)


@pytest.fixture(scope="module")
def index() -> TrainingIndex:
    return TrainingIndex(TEXT)


def brute(sequence: np.ndarray, text: np.ndarray) -> tuple[float, int]:
    """Share of known 13-grams and longest known span, by search in byte strings."""
    hay, n = text.astype(np.int32).tobytes(), len(sequence)

    def known(start: int, stop: int) -> bool:
        needle, at = sequence[start:stop].astype(np.int32).tobytes(), -1
        while (at := hay.find(needle, at + 1)) >= 0:
            if at % 4 == 0:
                return True
        return False

    share = np.mean([known(i, i + GRAM) for i in range(n - GRAM + 1)]) if n >= GRAM else 0.0
    longest = max((j - i for i in range(n) for j in range(i + 6, n + 1) if known(i, j)), default=0)
    return float(share), longest


@pytest.mark.parametrize("start", [0, 777, 20_000 - 24])
def test_planted_spans_are_measured_exactly(index: TrainingIndex, start: int) -> None:
    sequence = RNG.integers(0, 500, 48)
    sequence[10:34] = TEXT[start : start + 24]
    share, longest = brute(sequence, TEXT)
    assert index.memorised(sequence) == pytest.approx(share)
    assert index.copies(sequence)[0] == longest >= 24


def test_foreign_text_is_not_accused(index: TrainingIndex) -> None:
    for sequence in RNG.integers(0, 500, (50, 64)):
        assert index.memorised(sequence) == 0.0
        assert index.copies(sequence)[1] < 0.5


def test_changed_tokens_do_not_hide_a_copy(index: TrainingIndex) -> None:
    sequence = TEXT[4000:4064].copy()
    sequence[::7] = 999  # ten of 64
    assert index.memorised(sequence) == 0.0
    assert index.copies(sequence) == (6, pytest.approx(54 / 64))


def test_order_is_part_of_an_ngram() -> None:
    forward = gram_hashes(np.arange(13), 13)
    assert forward != gram_hashes(np.arange(13)[::-1], 13)
    assert len(np.unique(gram_hashes(TEXT, 6))) == len(TEXT) - 5
    assert len(gram_hashes(TEXT[:5], 6)) == 0


def test_short_and_empty_sequences(index: TrainingIndex) -> None:
    for length in (0, 3, 12):
        assert index.memorised(TEXT[:length]) == 0.0
    assert index.copies(TEXT[:0]) == (0, 0.0)
    assert index.copies(TEXT[:5]) == (0, 0.0)


def cell(training: Callable[[], TrainingStreams] | None) -> CellData:
    tokens = np.stack([TEXT[:64], RNG.integers(0, 500, 64)])
    return CellData(tokens, np.array([64, 64]), [], 500, {}, {}, training=training)


def test_metric(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def training() -> TrainingStreams:
        asked.append(1)
        return TrainingStreams(TEXT, TEXT[:0], "sha256:x")

    found = {m.metric: m for m in Memorisation().compute(cell(training))}
    assert found["memorised_13"].columns[0].tolist() == [1.0, 0.0]
    assert found["longest_copy"].columns[0][0] == 64
    assert found["near_copies"].columns[0].tolist() == [1.0, 0.0]
    assert "20,000 tokens" in found["near_copies"].definition
    assert Memorisation().compute(cell(None)) == []
    monkeypatch.setattr(memorisation, "MOST_TOKENS", 100)
    (refused,) = Memorisation().compute(cell(training))
    assert refused.value is not None
    assert math.isnan(refused.value)
    assert "up to 100 are indexed" in refused.reason


def test_of_an_infilling_pieces_are_looked_up_and_not_what_they_make_together() -> None:
    """20 tokens of the text with the middle one given: two pieces of known text, too short for a 13-gram."""
    places = np.array([[*range(9), *range(10, 20), 9]])
    sequence = TEXT[None, :20]
    together = np.take_along_axis(sequence, places, axis=1)
    infilling = Infilling(sequence, np.array([20]), places)
    streams = TrainingStreams(np.concatenate([TEXT, together[0, :19]]), TEXT[:0], "sha256:y")
    data = CellData(together, np.array([19]), [], 500, {}, {}, training=lambda: streams, infilling=infilling)
    found = {m.metric: m.columns[0].tolist() for m in Memorisation().compute(data)}
    assert found == {"memorised_13": [0.0], "longest_copy": [10.0], "near_copies": [0.0]}
