"""The bundled judge `char-rnn`: textgenrnn's character model (0.46M parameters, MIT), which needs no download.

Network: embedding of 465 characters (100), LSTM (128), LSTM (128); the three are concatenated (356), averaged over the
window with attention weights softmax(h w), and projected to 465 logits. Trained on headlines and forum posts, it
predicts a character from a window of 40; shorter contexts are padded on the left with character 0, and a text starts
with `<s>`. It ranks real text before shuffled words, and cannot tell Markov trigram text from prose.

Windows. One window per character is the original's way (`stride=1`) and costs 40 LSTM steps a character. Letting the
LSTM simply run on is no way out: it was trained on 40 steps and drifts (2.28 bits per character become 6.27 on held-out
text of this repository's task). So windows start every `stride` characters: stride // 2 pads, whose state is a
constant, then 40 characters, of which the last `stride` are scored, each with attention over its own last 40 steps.
Every prediction then lies within stride / 2 steps of the length the network was trained for. At the default stride of
10 the mean over the same text is the same to 0.0002 bits per character, the correlation over texts 0.995.

What a character is: line breaks and tabs count as spaces (the vocabulary has no others), the end-of-text marker as
`<s>`, and an unknown character as class 0, to which the network gives almost no probability.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from tsdfm_bench.api import ScoreBatch, ScorerInfo
from tsdfm_bench.errors import AssetError, UsageError
from tsdfm_bench.tasks.options import read_options
from tsdfm_bench.tasks.scorers.units import END_OF_TEXT, byte_count, piece_starts, split_at_end_of_text

FOLDER = Path(__file__).parent.parent / "assets" / "char_rnn"
WEIGHTS_SHA256 = "d16b9baa296510fa3f9e06ca3b5fa3685fa201f1dfac281ecd6a8b8a9ca7501b"
WINDOW = 40
MAX_STRIDE = 20
BATCH = 256
PAD = 0
OPTIONS = {"stride": 10}

_SPACES = str.maketrans("\n\r\t\u00a0", "    ")


class CharRNNNetwork(nn.Module):
    """The network; `forward` gives the NLLs of the last characters of each window.

    Args:
        characters: number of output classes.
        embedding: width of the embedding.
        hidden: units of each LSTM.
    """

    def __init__(self, characters: int = 465, embedding: int = 100, hidden: int = 128) -> None:
        super().__init__()
        width = embedding + 2 * hidden
        self.embedding = nn.Embedding(characters, embedding)
        self.lstm_1 = nn.LSTM(embedding, hidden, batch_first=True)
        self.lstm_2 = nn.LSTM(hidden, hidden, batch_first=True)
        self.attention = nn.Linear(width, 1, bias=False)
        self.output = nn.Linear(width, characters)

    def states(self, inputs: Tensor, pads: int) -> Tensor:
        """Concatenated layer outputs (batch, pads + steps, width) of `pads` pads followed by inputs (batch, steps)."""
        batch = inputs.shape[0]
        lead = torch.full((1, pads), PAD, dtype=inputs.dtype, device=inputs.device)
        layers = [(self.embedding(lead).expand(batch, -1, -1), self.embedding(inputs))]
        for lstm in (self.lstm_1, self.lstm_2):
            before, after = layers[-1]
            if pads == 0:
                layers.append((before.new_zeros(batch, 0, lstm.hidden_size), lstm(after)[0]))
                continue
            start, state = lstm(before[:1])
            carried = (state[0].expand(-1, batch, -1).contiguous(), state[1].expand(-1, batch, -1).contiguous())
            layers.append((start.expand(batch, -1, -1), lstm(after, carried)[0]))
        return torch.cat([torch.cat(pair, dim=1) for pair in layers], dim=2)

    def forward(self, inputs: Tensor, targets: Tensor, pads: int = 0) -> Tensor:
        """NLLs in nats.

        Args:
            inputs: (batch, 40) int64 characters.
            targets: (batch, k) int64; target j follows input 40 - k + j.
            pads: pads put before the inputs.

        Returns:
            (batch, k) float32.
        """
        hidden = self.states(inputs, pads)
        steps, scored = hidden.shape[1], targets.shape[1]
        ends = torch.arange(steps - scored, steps, device=inputs.device)[:, None]
        step = torch.arange(steps, device=inputs.device)[None, :]
        inside = (step <= ends) & (step > ends - WINDOW)  # (k, steps): the last 40 steps before each target
        scores = self.attention(hidden).transpose(1, 2).masked_fill(~inside, float("-inf"))
        pooled = torch.softmax(scores, dim=2) @ hidden
        log_probabilities = torch.log_softmax(self.output(pooled), dim=2)
        return -log_probabilities.gather(2, targets[..., None])[..., 0]


@lru_cache(maxsize=1)
def vocabulary() -> Mapping[str, int]:
    """Character -> class; class 0 is padding and any unknown character, `<s>` starts a text."""
    path = FOLDER / "vocab.json"
    if not path.is_file():
        raise AssetError(f"the vocabulary {path} of scorer 'char-rnn' is missing; reinstall tsdfm-bench")
    loaded: dict[str, int] = json.loads(path.read_text(encoding="utf-8"))
    return loaded


def encode(text: str) -> list[int]:
    """Classes of a text, without the leading `<s>`."""
    table = vocabulary()
    classes: list[int] = []
    for index, piece in enumerate(split_at_end_of_text(text)):
        if index:
            classes.append(table["<s>"])
        classes.extend(table.get(character, PAD) for character in piece.translate(_SPACES))
    return classes


def spans_of(text: str) -> np.ndarray:
    """(units, 2) begin and end of every unit of `encode`: a character, or an end-of-text marker."""
    spans: list[tuple[int, int]] = []
    for piece, start in zip(split_at_end_of_text(text), piece_starts(text), strict=True):
        if start:
            spans.append((start - len(END_OF_TEXT), start))
        spans += [(i, i + 1) for i in range(start, start + len(piece))]
    return np.asarray(spans, dtype=np.int64).reshape(-1, 2)


class CharRNN:
    """The scorer `char-rnn`; option `stride` (1 to 20, default 10; 1 is the original model exactly).

    Args:
        network: the network in evaluation mode.
        stride: characters scored per window.
    """

    def __init__(self, network: CharRNNNetwork, stride: int) -> None:
        self.network = network
        self.stride = stride
        self.info = self.describe({"stride": stride})

    @classmethod
    def describe(cls, params: Mapping[str, object]) -> ScorerInfo:
        """What `load(params)` would be, without loading it; raises UsageError for a wrong option."""
        stride = int(read_options("scorer 'char-rnn'", params, OPTIONS)["stride"])
        if not 1 <= stride <= MAX_STRIDE:
            raise UsageError(f"option 'stride' of scorer 'char-rnn' is from 1 to {MAX_STRIDE}, not {stride}")
        return ScorerInfo(
            name="char-rnn",
            title="textgenrnn 2.0.0 character RNN (0.46M)",
            revision=f"sha256:{WEIGHTS_SHA256}",
            unit="character",
            dtype="float32",
            window=WINDOW,
            stride=stride,
            context="<s>",
            parameters=461_693,
            licence="MIT",
        )

    @classmethod
    def available(cls, params: Mapping[str, object]) -> str | None:
        """Why the scorer cannot be used, or None."""
        if not (FOLDER / "model.safetensors").is_file():
            return f"{FOLDER / 'model.safetensors'} is missing; reinstall tsdfm-bench"
        return None

    @classmethod
    def load(cls, params: Mapping[str, object], device: str) -> CharRNN:
        """Read the bundled weights; raises AssetError if they are missing or altered."""
        info = cls.describe(params)
        path = FOLDER / "model.safetensors"
        reason = cls.available(params)
        if reason is not None:
            raise AssetError(f"scorer 'char-rnn': {reason}")
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != WEIGHTS_SHA256:
            raise AssetError(f"scorer 'char-rnn': {path} is not the file that was shipped; reinstall tsdfm-bench")
        from safetensors.torch import load as load_tensors

        network = CharRNNNetwork()
        network.load_state_dict(load_tensors(data))
        return cls(network.eval().to(device), info.stride)

    def networks(self) -> Mapping[str, nn.Module]:
        """The network, under the role "scorer"."""
        return {"scorer": self.network}

    def score(self, texts: Sequence[str]) -> ScoreBatch:
        """NLLs in nats of every character of each text, `<s>` before the first."""
        start, stride = vocabulary()["<s>"], self.stride
        units = [np.asarray(encode(text), dtype=np.int64) for text in texts]
        counts = [len(ids) for ids in units]
        windows = [_windows(ids, start, stride) for ids in units]
        scored = self._score_windows(np.concatenate(windows, axis=0)) if windows else None
        nll: list[np.ndarray] = []
        first = 0
        for count, window in zip(counts, windows, strict=True):
            assert scored is not None
            nll.append(scored[first : first + len(window)].reshape(-1)[:count])
            first += len(window)
        return ScoreBatch(
            nll=nll,
            units=units,
            special=[ids == start for ids in units],
            bytes=np.asarray([byte_count(text) for text in texts], dtype=np.int64),
            spans=[spans_of(text) for text in texts],
        )

    def _score_windows(self, windows: np.ndarray) -> np.ndarray:
        """(n, stride) NLLs of (n, 40 + 1) windows: inputs, with the targets one to the right."""
        device = self.network.output.weight.device
        result = np.zeros((len(windows), self.stride), dtype=np.float32)
        with torch.inference_mode():
            for first in range(0, len(windows), BATCH):
                ids = torch.from_numpy(windows[first : first + BATCH]).to(device)
                nll = self.network(ids[:, :-1], ids[:, -self.stride :], self.stride // 2)
                result[first : first + BATCH] = nll.cpu().numpy()
        return result


def _windows(ids: np.ndarray, start: int, stride: int) -> np.ndarray:
    """(ceil(n / stride), 41) windows of n characters; window k has the targets k stride .. (k + 1) stride - 1 last."""
    count = -(-len(ids) // stride)
    padded = np.full(WINDOW - stride + 1 + count * stride, PAD, dtype=np.int64)
    padded[WINDOW - stride] = start
    padded[WINDOW - stride + 1 : WINDOW - stride + 1 + len(ids)] = ids
    if count == 0:
        return np.empty((0, WINDOW + 1), dtype=np.int64)
    return np.lib.stride_tricks.sliding_window_view(padded, WINDOW + 1)[::stride].copy()
