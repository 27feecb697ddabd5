"""The bundled character model: the network against its formulas, the windows against one window per character."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch

from tsdfm_bench.errors import AssetError, UsageError
from tsdfm_bench.tasks.scorers import char_rnn
from tsdfm_bench.tasks.scorers.char_rnn import PAD, WINDOW, CharRNN, encode, vocabulary

REAL = [
    "It is a great honor to be with you tonight, and to report that the state of our Union is strong.",
    "My administration has created millions of new jobs, and wages are rising for the first time in years.",
    "We must work together to protect the health and the safety of every American family.",
    "The Congress is asked to make an appropriation for the repair of public buildings in this city.",
]


@pytest.fixture(scope="module")
def scorer() -> CharRNN:
    return CharRNN.load({}, "cpu")


@pytest.fixture(scope="module")
def exact() -> CharRNN:
    return CharRNN.load({"stride": 1}, "cpu")


def shuffled(text: str, seed: int) -> str:
    words = text.split(" ")
    return " ".join(words[i] for i in np.random.default_rng(seed).permutation(len(words)))


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def lstm(x: np.ndarray, tensors: dict[str, np.ndarray], name: str) -> np.ndarray:
    """The textbook recurrence, gates in the order input, forget, cell, output."""
    units = tensors[f"{name}.weight_hh_l0"].shape[1]
    h, c, states = np.zeros(units), np.zeros(units), []
    for step in x:
        gates = tensors[f"{name}.weight_ih_l0"] @ step + tensors[f"{name}.weight_hh_l0"] @ h
        i, f, g, o = np.split(gates + tensors[f"{name}.bias_ih_l0"] + tensors[f"{name}.bias_hh_l0"], 4)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        states.append(h)
    return np.stack(states)


def window_nll(tensors: dict[str, np.ndarray], window: list[int], target: int) -> float:
    """NLL of the character after a window of 40, in float64 from the formulas."""
    embedded = tensors["embedding.weight"][window]
    first = lstm(embedded, tensors, "lstm_1")
    hidden = np.concatenate([embedded, first, lstm(first, tensors, "lstm_2")], axis=1)
    scores = hidden @ tensors["attention.weight"][0]
    weights = np.exp(scores - scores.max())
    logits = tensors["output.weight"] @ (weights @ hidden / weights.sum()) + tensors["output.bias"]
    return float(np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[target])


def test_stride_one_is_the_original_model(exact):
    """Each character from the 40 before it, padded on the left, `<s>` before the text."""
    tensors = {name: tensor.double().numpy() for name, tensor in exact.network.state_dict().items()}
    text = REAL[0]
    line = [PAD] * (WINDOW - 1) + [vocabulary()["<s>"], *encode(text)]
    nll = exact.score([text]).nll[0]
    for i in (0, 1, 5, 38, 39, 40, 60, len(text) - 1):
        assert nll[i] == pytest.approx(window_nll(tensors, line[i : i + WINDOW], line[i + WINDOW]), abs=1e-4)


def test_probabilities_of_all_classes_sum_to_one(exact):
    window = torch.tensor([[PAD] * 39 + [vocabulary()["<s>"]]]).expand(465, -1)
    with torch.inference_mode():
        nll = exact.network(window, torch.arange(465)[:, None])
    assert torch.exp(-nll).sum().item() == pytest.approx(1.0, abs=1e-5)


def test_default_stride_stays_close_to_the_original_model(scorer, exact):
    """Means over a text differ by a few hundredths of a nat; a free-running LSTM is off by more than two."""
    close, original = scorer.score(REAL), exact.score(REAL)
    differences = [a.mean() - b.mean() for a, b in zip(close.nll, original.nll, strict=True)]
    assert np.max(np.abs(differences)) < 0.1


def test_scores_are_causal(scorer):
    """The scores of a prefix are those of its characters in the whole text."""
    text = REAL[1]
    whole = scorer.score([text]).nll[0]
    for length in (1, 9, 10, 11, 45, 80):
        np.testing.assert_allclose(scorer.score([text[:length]]).nll[0], whole[:length], atol=1e-4)


def test_scores_do_not_depend_on_the_batch(scorer):
    together = scorer.score(REAL)
    for index, text in enumerate(REAL):
        np.testing.assert_allclose(scorer.score([text]).nll[0], together.nll[index], atol=1e-4)


def test_real_text_is_ranked_before_shuffled_words(scorer):
    def bits(texts: list[str]) -> float:
        scores = scorer.score(texts)
        return sum(float(nll.sum()) for nll in scores.nll) / scores.bytes.sum() / np.log(2)

    assert bits(REAL) < bits([shuffled(text, seed) for seed, text in enumerate(REAL)]) - 0.2


def test_repetition_beats_real_text(scorer):
    """Why perplexity alone is not to be trusted, and what the canary `loop` shows."""
    loop = "the people of the United States and " * 4
    assert scorer.score([loop]).nll[0][40:].mean() < min(nll.mean() for nll in scorer.score(REAL).nll)


def test_units_bytes_and_end_of_text(scorer):
    scores = scorer.score(["é\nx<|endoftext|>y", ""])
    np.testing.assert_array_equal(scores.units[0], [vocabulary()[c] for c in ("é", " ", "x", "<s>", "y")])
    np.testing.assert_array_equal(scores.special[0], [False, False, False, True, False])
    np.testing.assert_array_equal(scores.bytes, [2 + 1 + 1 + 1 + 1, 0])
    assert len(scores.nll[1]) == 0


def test_unknown_characters_are_scored_as_class_zero(scorer):
    scores = scorer.score(["a龘b"])
    assert scores.units[0][1] == PAD
    assert np.isfinite(scores.nll[0]).all()


def test_no_texts(scorer):
    assert scorer.score([]).nll == []


@pytest.mark.parametrize("stride", [0, 21, "x"])
def test_wrong_stride_is_refused(stride):
    with pytest.raises(UsageError, match="stride"):
        CharRNN.describe({"stride": stride})


def test_description_matches_the_network(scorer):
    bias = sum(parameter.numel() for name, parameter in scorer.network.named_parameters() if "bias_hh" in name)
    count = sum(parameter.numel() for parameter in scorer.network.parameters()) - bias  # always zero: not a parameter
    assert CharRNN.describe({}).parameters == count
    assert scorer.info == CharRNN.describe({})
    assert CharRNN.available({}) is None


def test_altered_or_missing_weights_are_named(tmp_path, monkeypatch):
    copy = tmp_path / "char_rnn"
    shutil.copytree(char_rnn.FOLDER, copy)
    monkeypatch.setattr(char_rnn, "FOLDER", copy)
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "model.safetensors").write_bytes(data)
    with pytest.raises(AssetError, match="not the file that was shipped"):
        CharRNN.load({}, "cpu")
    (copy / "model.safetensors").unlink()
    with pytest.raises(AssetError, match="missing"):
        CharRNN.load({}, "cpu")


def test_spans_are_the_characters_that_were_scored(scorer: CharRNN) -> None:
    texts = ["ab<|endoftext|>\u00e9", "", "<|endoftext|><|endoftext|>x"]
    scores = scorer.score(texts)
    assert scores.spans is not None
    parts = [[text[begin:end] for begin, end in row] for text, row in zip(texts, scores.spans, strict=True)]
    assert parts == [["a", "b", "<|endoftext|>", "\u00e9"], [], ["<|endoftext|>", "<|endoftext|>", "x"]]
    for row, marks in zip(parts, scores.special, strict=True):
        assert marks.tolist() == [part == "<|endoftext|>" for part in row]
