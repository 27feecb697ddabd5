"""Judges that are pre-trained causal language models: any by hub name or folder, with token NLLs in nats.

What is scored: a text is tokenised without special tokens; the context token stands before its first token, so that
every token of the text is scored and nothing else. Long texts are read in windows (`windows.py`). The network's body
runs once over each window, the output layer only on positions that predict a token, a few hundred at a time, and
log-softmax is taken in float32: no (batch, length, vocabulary) array exists. Equal texts are scored once. With
`TSDFM_BENCH_PLAIN=1` each window is a forward pass of the whole model instead; scores are the same to rounding.

Features for MAUVE come from the same pass: the mean of the last hidden states after the first `feature_tokens` tokens
(all but the last, where a text is shorter), so that all texts are pooled over equally many tokens.

If the device runs out of memory, this forward pass and those to come are halved; the scores are the same. Judges with
equal tokenizers share one tokenisation (`tokens.py`).

Only safetensors are read and no code of a repository is run.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tsdfm_bench.api import ScoreBatch, ScorerInfo, plain
from tsdfm_bench.errors import AssetError, UsageError
from tsdfm_bench.tasks.options import read_options
from tsdfm_bench.tasks.scorers.fast import fuse_activations, log_total
from tsdfm_bench.tasks.scorers.hub import not_causal, read_model, read_tokenizer
from tsdfm_bench.tasks.scorers.tokens import SHARED, end_of_text_id, fingerprint, require_round_trip, token_id
from tsdfm_bench.tasks.scorers.units import END_OF_TEXT, byte_count, piece_starts, split_at_end_of_text
from tsdfm_bench.tasks.scorers.windows import Window, batches_of, windows_of

DTYPES = ("float32", "bfloat16", "float16")
HEAD_POSITIONS = 256
CAUSAL_TOLERANCE, ROUGH_CAUSAL_TOLERANCE = 1e-3, 3e-2  # relative change of the states, float32 and 16 bits
ROUND_TRIPS, ROUND_TRIP_CHARACTERS = 8, 2000
CPU_TOKENS, DEVICE_TOKENS = 512, 8192  # more does not fit into the cache of a CPU core
OPTIONS: dict[str, Any] = {
    "name": "",
    "path": None,
    "revision": None,
    "dtype": "float32",
    "window": 1024,
    "stride": 512,
    "context": None,
    "feature_tokens": 32,
    "batch_tokens": 0,
    "device_map": None,
    "lossy": False,
}


class CausalLM:
    """The scorer `hf:NAME`, NAME a folder or a hub name (or NAME@REVISION); base of the judges with a pinned file.

    Options: `dtype` (float32 by default everywhere, so that rows compare; bfloat16, float16), `window`, `stride`,
    `context` (the context token's text), `feature_tokens`, `batch_tokens` (inputs of one forward pass, 0 = 512 on a CPU
    and 8,192 elsewhere; no influence on the scores), `path` (folder or file), `revision` (of the hub), `device_map`
    (auto: spread over all GPUs), `lossy` (accept a tokenizer that does not give texts back).
    """

    registered = "hf"
    options: Mapping[str, Any] = OPTIONS

    def __init__(self, model: Any, tokenizer: Any, info: ScorerInfo, settings: Mapping[str, Any]) -> None:
        self.model: Any = fuse_activations(model)
        self.tokenizer = tokenizer
        self.settings = settings
        self.body: nn.Module = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model
        self.head: nn.Module = model.get_output_embeddings()
        self.device: torch.device = model.get_input_embeddings().weight.device
        self.budget: int = settings["batch_tokens"] or (CPU_TOKENS if self.device.type == "cpu" else DEVICE_TOKENS)
        self.context_id = token_id(tokenizer, info.context, info.name)
        self.end_id = end_of_text_id(tokenizer)
        self.fingerprint = fingerprint(tokenizer, self.end_id)
        self._require_embedded([self.context_id, self.end_id], info.name)
        self.split_head = not plain() and self._output_layer_is_last()
        self.info = info
        self.unproven = (
            0 if settings.get("lossy", True) else ROUND_TRIPS
        )  # judges with a pinned file have no such option

    # ------------------------------------------------------------------------------------------- what it is

    @classmethod
    def settings_of(cls, params: Mapping[str, object]) -> dict[str, Any]:
        """The options, checked; raises UsageError."""
        owner = f"scorer '{cls.registered}'"
        settings = read_options(owner, params, cls.options)
        name, at, revision = str(settings.get("name", "")).partition("@")
        if at and not Path(settings["name"]).expanduser().exists():
            if not revision or settings["revision"] not in (None, revision):
                raise UsageError(f"{owner}: give one revision, hf:{name}@REVISION or hf:{name}[revision=REVISION]")
            settings |= {"name": name, "revision": revision}
        if settings["dtype"] not in DTYPES:
            raise UsageError(f"option 'dtype' of {owner} is one of {', '.join(DTYPES)}, not {settings['dtype']!r}")
        if not 1 <= settings["stride"] < settings["window"]:
            raise UsageError(
                f"options of {owner}: 1 <= stride < window is needed, not stride {settings['stride']} and window "
                f"{settings['window']}"
            )
        for name, least in (("feature_tokens", 1), ("batch_tokens", 0)):
            if settings[name] < least:
                raise UsageError(f"option '{name}' of {owner} is at least {least}, not {settings[name]}")
        return settings

    @classmethod
    def describe(cls, params: Mapping[str, object]) -> ScorerInfo:
        """What `load(params)` would be, from its configuration and tokenizer alone; fetches them if need be."""
        from tsdfm_bench.tasks.scorers import hub

        settings = cls.settings_of(params)
        folder, revision = hub.obtain_model(_named(settings), settings["revision"])
        longest = hub.longest_input(folder)
        if longest and "window" in params and settings["window"] > longest:
            raise UsageError(
                f"option 'window' of scorer 'hf' is at most the {longest} positions of {_named(settings)}, not "
                f"{settings['window']}"
            )
        return cls._describe(settings, folder, revision)

    @classmethod
    def _describe(cls, settings: Mapping[str, Any], folder: Path, revision: str) -> ScorerInfo:
        from tsdfm_bench.tasks.scorers import hub

        longest = hub.longest_input(folder)
        window = min(settings["window"], longest) if longest else settings["window"]
        name = _named(settings)
        return ScorerInfo(
            name="hf:" + name,
            title=name if revision.startswith("sha256:") else f"{name}@{revision[:12]}",
            revision=revision,
            unit="token",
            dtype=settings["dtype"],
            window=window,
            stride=min(settings["stride"], window - 1),
            context=settings["context"] or hub.context_token(folder, name),
            parameters=hub.parameter_count(folder),
            features=features_text(settings),
            trained_on="text of the web, as most models of the hub",
        )

    @classmethod
    def fetch(cls, params: Mapping[str, object]) -> Path:
        """Obtain the files, with a progress bar, and return their folder; raises AssetError."""
        from tsdfm_bench.tasks.scorers import hub

        settings = cls.settings_of(params)
        return hub.obtain_model(_named(settings), settings["revision"])[0]

    @classmethod
    def check(cls, params: Mapping[str, object]) -> None:
        """Obtain the files, and see what can be seen of a model that cannot judge without reading its weights.

        Raises:
            AssetError: files that cannot be obtained or read, or are of no causal language model.
            UsageError: a tokenizer that changes texts or lacks the context token, or an encoder.
        """
        from tsdfm_bench.tasks.scorers import hub

        settings = cls.settings_of(params)
        folder, name = cls.fetch(params), f"hf:{_named(settings)}"
        hub.require_causal_kind(folder, name)
        tokenizer = read_tokenizer(folder)
        token_id(tokenizer, settings["context"] or hub.context_token(folder, name), name)
        if not settings["lossy"]:
            require_round_trip(tokenizer, name)

    @classmethod
    def available(cls, params: Mapping[str, object]) -> str | None:
        """Why the scorer cannot be used here, or None. Obtains the files if they are not here yet."""
        try:
            cls.fetch(params)
        except AssetError as error:
            return str(error)
        return None

    @classmethod
    def load(cls, params: Mapping[str, object], device: str) -> CausalLM:
        """Read the model.

        Raises:
            AssetError: its files cannot be obtained, are damaged, or hold other weights than it has, or memory ran out.
            UsageError: a wrong option, a model that is not causal, or a tokenizer that changes texts.
        """
        settings = cls.settings_of(params)
        folder = cls.fetch(params)
        info = cls.describe(params)
        _require_dtype(info, device)
        with memory_for(info, device):
            model, tokenizer = read_model(folder, info.dtype, settings["device_map"])
            if not settings["lossy"]:
                require_round_trip(tokenizer, info.name)
            scorer = cls((model if settings["device_map"] else model.to(device)).eval(), tokenizer, info, settings)
            scorer.require_causal()
        return scorer

    def require_causal(self) -> None:
        """Raise UsageError if states depend on later tokens, as an encoder's do: it would see what it predicts.

        Four rows differ in their last token only. Up to rounding (and experts may round by what shares a batch), the
        states before it have to be the same.
        """
        last = torch.linspace(0, self.model.get_input_embeddings().weight.shape[0] - 1, 4).long()
        before = torch.tensor([self.context_id, self.end_id, self.context_id]).expand(4, 3)
        inputs = torch.cat([before, last[:, None]], dim=1).to(self.device)
        first = torch.zeros(1, dtype=torch.int64, device=self.device)
        with torch.inference_mode():
            hidden = self._hidden_and_nll(inputs, (first, first), first)[0][:, :3].float()
        moved = float((hidden - hidden[:1]).norm() / hidden.norm())
        if moved > (CAUSAL_TOLERANCE if self.info.dtype == "float32" else ROUGH_CAUSAL_TOLERANCE):
            raise not_causal(self.info.name, type(self.model).__name__)

    def networks(self) -> Mapping[str, nn.Module]:
        """The body (everything but the output layer), under the role "scorer"."""
        return {"scorer": self.body}

    # ---------------------------------------------------------------------------------------------- scoring

    def score(self, texts: Sequence[str]) -> ScoreBatch:
        """NLLs in nats of every token of each text.

        Raises:
            UsageError: the tokenizer changes one of the first texts.
            AssetError: a token without an embedding, or one window that does not fit into memory.
        """
        distinct = {text: index for index, text in enumerate(dict.fromkeys(texts))}
        self._require_round_trips(list(distinct))
        placed = [np.asarray(self._placed(text), dtype=np.int64).reshape(-1, 3) for text in distinct]
        tokens = [rows[:, 0].tolist() for rows in placed]
        self._require_embedded((max(ids) for ids in tokens if ids), self.info.name)
        nll, pooled = self._score_tokens(tokens)
        order = [distinct[text] for text in texts]
        units = [rows[:, 0] for rows in placed]
        return ScoreBatch(
            nll=[nll[i] for i in order],
            units=[units[i] for i in order],
            special=[units[i] == self.end_id for i in order],
            bytes=np.asarray([byte_count(text) for text in texts], dtype=np.int64),
            features=pooled[order],
            spans=[placed[i][:, 1:] for i in order] if getattr(self.tokenizer, "is_fast", False) else None,
        )

    def _require_round_trips(self, texts: Sequence[str]) -> None:
        some = [
            piece[:ROUND_TRIP_CHARACTERS] for text in texts[: self.unproven] for piece in split_at_end_of_text(text)
        ]
        self.unproven -= min(len(texts), self.unproven)
        require_round_trip(self.tokenizer, self.info.name, some)

    def _require_embedded(self, ids: Iterable[int], name: str) -> None:
        """Raise AssetError for a token that the model has no embedding for (tokenizers may have more than it reads)."""
        size, largest = self.model.get_input_embeddings().weight.shape[0], max(ids, default=0)
        if largest >= size:
            raise AssetError(
                f"scorer '{name}': token {largest} ({self.tokenizer.convert_ids_to_tokens(largest)!r}) is beyond the "
                f"model's {size} embeddings: tokenizer and weights are not of one model"
            )

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without context token; end-of-text markers become the scorer's own end-of-text."""
        return self._placed(text)[::3]

    def _placed(self, text: str) -> list[int]:
        """Id, begin and end of every token of a text, one after the other; where a tokenizer cannot say, 0 and 0."""
        return SHARED.numbers(self.fingerprint, text, self._encode)

    def _encode(self, text: str) -> list[int]:
        fast = bool(getattr(self.tokenizer, "is_fast", False))
        found: list[int] = []
        for piece, start in zip(split_at_end_of_text(text), piece_starts(text), strict=True):
            if start:
                found += (self.end_id, start - len(END_OF_TEXT), start)
            if not piece:
                continue
            read = self.tokenizer(piece, add_special_tokens=False, verbose=False, return_offsets_mapping=fast)
            ids = read["input_ids"]
            if not fast:
                found += (number for token in ids for number in (token, 0, 0))
                continue
            before = 0
            for token, (begin, end) in zip(ids, read["offset_mapping"], strict=True):
                if piece[before:begin].isspace():  # some tokenizers leave the space before a word out of its place
                    begin = before
                before = max(before, end)
                found += (token, start + begin, start + end)
        return found

    def _score_tokens(self, tokens: Sequence[Sequence[int]]) -> tuple[list[np.ndarray], np.ndarray]:
        info = self.info
        nll = [np.zeros(len(ids), dtype=np.float32) for ids in tokens]
        features = np.zeros((len(tokens), self.model.config.get_text_config().hidden_size), dtype=np.float32)
        windows = [
            window
            for index, ids in enumerate(tokens)
            for window in windows_of(index, ids, self.context_id, info.window, info.stride)
        ]
        waiting = deque([w] for w in windows) if plain() else deque(batches_of(windows, self.budget))
        with torch.inference_mode():
            while waiting:
                scored = self._score_if_it_fits(waiting[0])
                if scored is None:
                    waiting = deque(batches_of([window for batch in waiting for window in batch], self.budget))
                    continue
                for window, score, feature in zip(waiting.popleft(), *scored, strict=True):
                    nll[window.text][window.first : window.first + len(score)] = score
                    if window.first == 0:
                        features[window.text] = feature
        return nll, features

    def _score_if_it_fits(self, batch: Sequence[Window]) -> tuple[list[np.ndarray], np.ndarray] | None:
        """Scores and features of a batch; None if the device has too little memory, with a budget of half as much."""
        try:
            return self._score_batch(batch)
        except torch.OutOfMemoryError as error:
            if len(batch) == 1:
                raise AssetError(
                    f"scorer '{self.info.name}': one window of {len(batch[0].inputs)} tokens does not fit into "
                    f"the memory of {self.device}. Choose a smaller window, dtype=bfloat16, device_map=auto or "
                    "--device cpu"
                ) from error
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.budget = len(batch) * len(batch[0].inputs) // 2  # the longest comes first
        return None

    def _score_batch(self, batch: Sequence[Window]) -> tuple[list[np.ndarray], np.ndarray]:
        device = self.device
        lengths = [len(window.inputs) for window in batch]
        inputs = np.zeros((len(batch), max(lengths)), dtype=np.int64)
        for row, window in enumerate(batch):
            inputs[row, : lengths[row]] = window.inputs
        rows = np.repeat(np.arange(len(batch)), [len(window.targets) for window in batch])
        positions = np.concatenate([np.arange(len(w.inputs) - len(w.targets), len(w.inputs)) for w in batch])
        targets = torch.from_numpy(np.concatenate([window.targets for window in batch])).to(device)
        at = torch.from_numpy(rows).to(device), torch.from_numpy(positions).to(device)

        hidden, nll = self._hidden_and_nll(torch.from_numpy(inputs).to(device), at, targets)
        pooled = _pool(hidden, torch.tensor(lengths, device=hidden.device), self.settings["feature_tokens"])
        ends = np.cumsum([len(window.targets) for window in batch])[:-1]
        return np.split(nll.cpu().numpy(), ends), pooled.cpu().numpy()

    def _hidden_and_nll(self, inputs: Tensor, at: tuple[Tensor, Tensor], targets: Tensor) -> tuple[Tensor, Tensor]:
        """Last hidden states (b, l, d) and the NLLs (n,) of targets (n,) predicted at n (row, position) pairs."""
        if not self.split_head:
            outputs = self.model(input_ids=inputs, use_cache=False, output_hidden_states=True)
            nll = [
                _nll(outputs.logits[rows, positions], wanted)
                for rows, positions, wanted in zip(
                    *(part.split(HEAD_POSITIONS) for part in (*at, targets)), strict=True
                )
            ]
            return outputs.hidden_states[-1], torch.cat(nll)
        hidden = self.body(input_ids=inputs, use_cache=False).last_hidden_state
        at = at[0].to(hidden.device), at[1].to(hidden.device)  # the last of several devices
        chunks = zip(hidden[at].split(HEAD_POSITIONS), targets.split(HEAD_POSITIONS), strict=True)
        return hidden, torch.cat([_nll(self._logits(states), wanted) for states, wanted in chunks])

    def _logits(self, states: Tensor) -> Tensor:
        """The output layer, in its own precision: the states of some models (Mamba) are float32 in any."""
        logits: Tensor = self.head(states.to(next(self.head.parameters()).dtype))
        return logits

    def _output_layer_is_last(self) -> bool:
        """Whether logits are exactly head(body(x)): some models scale or cap them, and are then run whole."""
        probe = torch.tensor([[self.context_id, self.end_id, self.context_id]], device=self.device)
        with torch.inference_mode():
            whole = self.model(input_ids=probe, use_cache=False).logits
            parts = self._logits(self.body(input_ids=probe, use_cache=False).last_hidden_state)
        return whole.shape == parts.shape and torch.allclose(
            whole.cpu().float(), parts.cpu().float(), rtol=1e-3, atol=1e-3
        )


@contextmanager
def memory_for(info: ScorerInfo, device: str) -> Iterator[None]:
    """Raise AssetError that says what to choose if memory runs out in the block, where a judge is read."""
    from tsdfm_bench.launch.failures import memory_ran_out

    try:
        yield
    except Exception as error:  # torch, safetensors and the system have one each
        if not memory_ran_out(error):
            raise
        smaller = "" if info.dtype in ("bfloat16", "float16") else "dtype=bfloat16, "
        raise AssetError(
            f"scorer '{info.name}': memory ran out while its {info.parameters:,} parameters were read in {info.dtype} "
            f"(device {device}). Choose {smaller}device_map=auto or another --device"
        ) from error


def _require_dtype(info: ScorerInfo, device: str) -> None:
    if info.dtype != "bfloat16" or not device.startswith("cuda") or torch.version.hip:
        return
    if torch.cuda.get_device_properties(device).major < 8:  # `is_bf16_supported` counts emulation, and another device
        raise UsageError(f"{device} does not compute in bfloat16: scorer '{info.name}' needs dtype=float16 or float32")


def _nll(logits: Tensor, targets: Tensor) -> Tensor:
    logits, targets = logits.float(), targets.to(logits.device)
    return log_total(logits) - logits.gather(1, targets[:, None])[:, 0]


def _pool(hidden: Tensor, lengths: Tensor, feature_tokens: int) -> Tensor:
    """Mean of the states after tokens 1 .. min(k, n - 1), (b, d) float32; position 0 is the context token."""
    last = torch.clamp(lengths - 1, max=feature_tokens)[:, None]
    position = torch.arange(hidden.shape[1], device=hidden.device)[None, :]
    chosen = (position >= 1) & (position <= last)
    total = torch.einsum("bl,bld->bd", chosen.float(), hidden.float())
    return total / chosen.sum(1, keepdim=True).clamp(min=1)


def _named(settings: Mapping[str, Any]) -> str:
    name = settings["path"] or settings["name"]
    if not name:
        raise UsageError("scorer 'hf' needs a model: hf:NAME with a hub name such as hf:gpt2-large, or a folder")
    return str(name)


def features_text(settings: Mapping[str, Any]) -> str:
    """What the features are, for `ScorerInfo.features`."""
    return f"mean of the last hidden states after the first {settings['feature_tokens']} tokens"
