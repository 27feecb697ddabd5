"""generate: any model of `transformers` that has `generate`, as a method: `--methods generate:FOLDER` or a hub name.

The loop is the library's own: `model.generate` feeds the model, keeps its cache and stops at its end token. Only the
draw is ours. The last logits processor takes the logits of the next token, applies temperature and nucleus as every
other method does, draws with the sequence's own stream,

    x_l = first y with  w_1 + ... + w_y > u_l (w_1 + ... + w_V),      u_l = uniform of (sequence, place l),

and leaves x_l as the only possible token, so that greedy decoding must choose it. Torch's global generator is never
used, and what a sequence becomes depends neither on its batch nor on a resume. The sampling settings that a model
ships with (top-k 50, temperature 0.6, penalties, ...) are dropped: they would be hidden ones in a comparison.

    vocabulary=own    (default) texts: the model's tokenizer decodes; the harness encodes them for measures on tokens
    vocabulary=task   token ids: the model was trained on the task's tokens, and can continue prompts, too

Causal and encoder-decoder models both work; the encoder of the latter reads `prompt`, its call is counted by itself.
Nothing of a folder but configuration, tokenizer and safetensors files is read, and no code of it is run.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutput

from tsdfm_bench.api import Identity, MethodInfo, OracleSource, SampleBatch, SampleRequest
from tsdfm_bench.errors import CheckpointError, UsageError, hub_reason
from tsdfm_bench.methods.toolkit import DrawPolicy, Sharpen, parse_options, refusal

if TYPE_CHECKING:
    from tsdfm_bench.methods.toolkit import CausalDenoiser

FILES = ["*.json", "*.safetensors", "*.model", "*.txt"]
DTYPES = ("float32", "bfloat16", "float16")


def folder_of(name: str) -> tuple[Path, str]:
    """Folder of a model, and what says which weights these are.

    Args:
        name: a folder, or a hub name; what the local hub cache holds is not fetched again.

    Raises:
        CheckpointError: neither there nor to be had.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        weights = sorted(folder.glob("*.safetensors"))
        if not weights:
            raise CheckpointError(f"{folder} holds no *.safetensors; write some with model.save_pretrained('{name}')")
        digest = hashlib.sha256()
        for path in [*weights, *sorted(folder.glob("*.json"))]:
            with path.open("rb") as file:
                digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
        return folder, f"sha256:{digest.hexdigest()}"
    from huggingface_hub import snapshot_download

    reason = ""
    for local in (True,) if os.environ.get("TSDFM_BENCH_OFFLINE") else (True, False):
        try:
            folder = Path(
                snapshot_download(name, allow_patterns=FILES, ignore_patterns=["*/*"], local_files_only=local)
            )
        except Exception as error:  # unknown, gated, offline, ...
            reason = hub_reason(error, name)
            continue
        if list(folder.glob("*.safetensors")):
            return folder, folder.name
        reason = "it has no *.safetensors"
    raise CheckpointError(
        f"no folder {name}, and not from the model hub: {reason}. Type generate:FOLDER or generate:NAME"
    )


class ExactModel(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """A task's exact next-token law where `generate` expects a model; id V stands before the first token.

    Args:
        oracle: predicts V tokens.
    """

    config_class = PretrainedConfig

    def __init__(self, oracle: CausalDenoiser) -> None:
        size = oracle.vocab_size
        config = PretrainedConfig(vocab_size=size + 1, bos_token_id=size, pad_token_id=size, num_hidden_layers=1)
        super().__init__(config)
        self.oracle, self.length = oracle, 0
        self.anchor = nn.Parameter(torch.zeros(()))  # generate asks where the parameters are

    def forward(self, input_ids: Tensor, **ignored: Any) -> CausalLMOutput:
        """Logits (batch, 1, V) after the last of input_ids (batch, l) int64."""
        memory = self.oracle.begin(len(input_ids), self.length)
        return CausalLMOutput(logits=self.oracle.next_logits(memory, input_ids[:, 1:])[:, None])


class Draw(LogitsProcessor):  # type: ignore[misc]
    """Draws the next token from each sequence's own stream and leaves nothing else possible.

    Args:
        request: temperature, nucleus, draw, streams and pinned tokens.
        places: tokens of a sequence.
        begun: tokens that the model's input holds before the first of them.
        size: V; ids from V on are never drawn.
        ends: ids that end a sequence; they are never drawn first, nor at all if `endless`.
    """

    def __init__(
        self, request: SampleRequest, places: int, begun: int, size: int, ends: list[int], endless: bool, device: str
    ) -> None:
        self.sharpen = Sharpen(request.temperature, request.top_p, request.top_p_rule)
        self.policy = DrawPolicy(request.draw)
        self.uniforms = request.streams.to(device).uniform("token", 0, places)
        self.begun, self.size, self.endless = begun, size, endless
        self.ends = [token for token in ends if token < size]
        self.prefix = None if request.prefix is None else request.prefix.to(device)
        self.pinned = None if request.pinned is None else request.pinned.bool().to(device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (batch, vocabulary) that are 0 for the drawn token and -inf elsewhere."""
        place = input_ids.shape[1] - self.begun
        logits = scores[:, : self.size].float()
        if self.ends and (self.endless or place == 0):
            logits = logits.index_fill(1, torch.tensor(self.ends, device=logits.device), -torch.inf)
        token = self.policy.categorical(self.sharpen.weights(logits), self.uniforms[:, place])
        if self.prefix is not None and self.pinned is not None:
            token = torch.where(self.pinned[:, place], self.prefix[:, place], token)
        return torch.full_like(scores, -torch.inf).scatter(1, token[:, None], 0.0)


class Generate:
    """A `transformers` model.

    Args:
        model: has `generate`.
        tokenizer: makes texts of its ids; None = its ids are the task's.
        vocab_size: V of the task.
        options: checked options.
        device: where sampling runs.
        name: for messages.
    """

    info = MethodInfo(
        name="generate",
        family="autoregressive",
        uses_steps=False,
        citation="arXiv:1910.03771",
        argument="a folder or a hub name of a transformers model",
        options={
            "vocabulary": ("own", "task"),
            "end": ("stop", "never"),
            "tokens": "tokens written per text (default: the run's length)",
            "prompt": "text that the model reads first; it is no part of the sample",
            "dtype": "float32 (default), bfloat16 or float16",
        },
    )

    def __init__(
        self, model: Any, tokenizer: Any, vocab_size: int, options: Mapping[str, str], device: str, name: str
    ) -> None:
        self.model, self.tokenizer, self.device, self.name = model, tokenizer, device, name
        config = model.config.get_text_config(decoder=True)
        self.size = vocab_size if tokenizer is None else int(config.vocab_size)
        if config.vocab_size < self.size:
            raise CheckpointError(
                f"{name} knows {config.vocab_size} tokens, the task {vocab_size}: it was trained with another "
                "tokenizer; type vocabulary=own"
            )
        self.endless = options.get("end", "stop") == "never"
        self.tokens = _number(options["tokens"]) if "tokens" in options else None
        self.longest = getattr(config, "max_position_embeddings", None)
        self.ends = _ids(model, "eos_token_id")
        self.start, self.read = self._beginning(options.get("prompt", ""))
        pad = (_ids(model, "pad_token_id") or self.ends or self.start)[0]
        # replaces the settings the model came with: whatever is not said here is neutral
        model.generation_config = GenerationConfig(
            do_sample=False,
            pad_token_id=pad,
            bos_token_id=self.start[0],
            decoder_start_token_id=self.start[0] if model.config.is_encoder_decoder else None,
        )

    def _beginning(self, prompt: str) -> tuple[list[int], list[int]]:
        """Ids before the first token, and what an encoder reads."""
        config = self.model.config
        first = _ids(self.model, "bos_token_id")[:1] or self.ends[:1]
        if prompt and self.tokenizer is None:
            raise UsageError("prompt is a text: the model needs its own tokenizer (leave out vocabulary=task)")
        text = self.tokenizer.encode(prompt, add_special_tokens=False) if prompt else []
        if config.is_encoder_decoder:
            begin = _ids(self.model, "decoder_start_token_id") or first
            start, read = begin[:1], [*text, *(self.ends[:1] or first)]
        else:
            start, read = [*first, *text], []
        if not start or (config.is_encoder_decoder and not read):
            raise CheckpointError(f"{self.name} names no token to begin with (bos_token_id, eos_token_id)")
        return start, read

    # ---------------------------------------------------------------------------------------------- the contract

    @classmethod
    def load(cls, params: Mapping[str, object], device: str) -> Generate:
        """Read the model.

        Raises:
            UsageError: unknown option or value, or no model named.
            CheckpointError: it cannot be had or read.
        """
        options = parse_options(cls.info, params)
        dtype = options.get("dtype", "float32")
        if dtype not in DTYPES:
            raise UsageError(f"dtype of generate is {', '.join(DTYPES[:2])} or {DTYPES[2]}, not '{dtype}'")
        folder, _ = folder_of(_name(params))
        reading: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        own = options.get("vocabulary", "own") == "own"
        try:
            config = AutoConfig.from_pretrained(folder, **reading)
            auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
            model = auto.from_pretrained(folder, dtype=getattr(torch, dtype), use_safetensors=True, **reading)
            tokenizer = AutoTokenizer.from_pretrained(folder, **reading) if own else None
        except Exception as error:  # whatever is wrong with a folder, in the library's words
            first = str(error).strip().splitlines() or [type(error).__name__]
            raise CheckpointError(f"{params['name']} cannot be read as a text generator: {first[0][:200]}") from error
        size = int(str(params["vocab_size"]))
        return cls(model.to(device).eval(), tokenizer, size, options, device, str(params["name"]))

    @classmethod
    def from_oracle(cls, oracle: OracleSource, params: Mapping[str, object], device: str) -> Generate:
        """`generate` around a task's exact next-token law: it shows that the draw above is right."""
        options = {**parse_options(cls.info, params), "vocabulary": "task", "end": "never"}
        exact = oracle("causal", None)
        return cls(ExactModel(exact).to(device).eval(), None, exact.vocab_size, options, device, "the oracle")

    @classmethod
    def identify(cls, params: Mapping[str, object]) -> Identity:
        """Name and hash of the model; a hub model's commit."""
        name = _name(params)
        return Identity(name, folder_of(name)[1])

    def networks(self) -> Mapping[str, nn.Module]:
        """The model; an encoder is called once, by itself."""
        encoder = {"encoder": self.model.get_encoder()} if self.model.config.is_encoder_decoder else {}
        return {"denoiser": self.model, **encoder}

    def refuse(self, request: SampleRequest) -> str | None:
        """A reason not to serve the request, or None."""
        reason = refusal(request, self.info, self.size, None)
        if reason is not None:
            return reason
        places = self._places(request)
        if self.longest is not None and len(self.start) + places > self.longest:
            return f"{self.name} reads at most {self.longest} tokens, asked for {len(self.start)} + {places}"
        if request.pinned is None:
            return None
        if self.tokenizer is not None:
            return f"prompts are ids of the task, and {self.name} has a vocabulary of its own"
        pinned = request.pinned.bool()
        if bool((pinned[:, 1:] & ~pinned[:, :-1]).any()):
            return "generate writes from left to right: only the beginning can be pinned"
        return None

    def sample(self, request: SampleRequest) -> SampleBatch:
        """One batch, by `model.generate`; see `tsdfm_bench.api.Method.sample`."""
        places, begin = self._places(request), 0
        start = torch.tensor(self.start, device=self.device).repeat(request.batch, 1)
        if request.prefix is not None and request.pinned is not None:
            begin = int(request.pinned.sum(dim=1).min())
            start = torch.cat([start, request.prefix[:, :begin].to(self.device)], dim=1)
        written = start[:, len(self.start) :]
        if begin < places:
            written = self._generate(request, start, places, begin)
        if self.tokenizer is None:
            return self._ids(request, written, places)
        texts = [
            self.tokenizer.decode(row[:count], skip_special_tokens=True, clean_up_tokenization_spaces=False)
            for row, count in zip(written.tolist(), self._lengths(written, None).tolist(), strict=True)
        ]
        nothing = torch.zeros(request.batch, request.length, dtype=torch.int64)
        return SampleBatch(nothing, nothing[:, 0].clone(), texts=tuple(texts))

    # -------------------------------------------------------------------------------------------------- its work

    def _places(self, request: SampleRequest) -> int:
        return request.length if self.tokenizer is None or self.tokens is None else self.tokens

    def _generate(self, request: SampleRequest, start: Tensor, places: int, begin: int) -> Tensor:
        """(batch, up to places) int64 ids, those of the prefix among them."""
        draw = Draw(request, places, len(self.start), self.size, self.ends, self.endless, self.device)
        inputs = {"input_ids": start}
        if self.read:
            read = torch.tensor(self.read, device=self.device).repeat(request.batch, 1)
            inputs = {"input_ids": read, "decoder_input_ids": start}
        if isinstance(self.model, ExactModel):
            self.model.length = places
        uneven = request.pinned is not None and bool(request.pinned[:, begin:].any())  # its tokens may be end tokens
        with torch.no_grad():
            found = self.model.generate(
                **inputs,
                attention_mask=torch.ones_like(inputs["input_ids"]),
                logits_processor=LogitsProcessorList([draw]),
                use_cache=not isinstance(self.model, ExactModel),
                max_new_tokens=places - begin,
                eos_token_id=None if self.endless or uneven else self.ends or None,
            )
        draw.policy.check()
        written: Tensor = found[:, len(self.start) :]
        return written

    def _lengths(self, written: Tensor, pinned: Tensor | None) -> Tensor:
        """(batch,) int64: tokens before the first end token that was drawn."""
        if self.endless or not self.ends:
            return torch.full((len(written),), written.shape[1], device=written.device)
        ended = torch.isin(written, torch.tensor(self.ends, device=written.device))
        if pinned is not None:
            ended &= ~pinned.bool()[:, : written.shape[1]].to(written.device)
        return (ended.cumsum(dim=1) == 0).sum(dim=1)

    def _ids(self, request: SampleRequest, written: Tensor, places: int) -> SampleBatch:
        lengths = self._lengths(written, request.pinned)
        tokens = torch.zeros(request.batch, places, dtype=torch.int64, device=written.device)
        kept = torch.arange(written.shape[1], device=written.device) < lengths[:, None]
        tokens[:, : written.shape[1]] = torch.where(kept, written, 0)
        device = request.streams.device
        return SampleBatch(tokens.to(device), lengths.to(device))


def _name(params: Mapping[str, object]) -> str:
    if not params.get("name"):
        raise UsageError("method 'generate' needs a model: generate:FOLDER, or generate:NAME of the model hub")
    if params.get("checkpoint") is not None:
        raise UsageError("the model of 'generate' comes after the colon, generate:FOLDER, not with --checkpoint")
    return str(params["name"])


def _number(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(f"tokens of generate is a number from 1 on, not '{text}'")
    return int(text)


def _ids(model: Any, name: str) -> list[int]:
    """Ids of a special token, from the settings for generation or else the configuration; empty if there are none."""
    for holder in (model.generation_config, model.config.get_text_config(decoder=True), model.config):
        value = getattr(holder, name, None)
        if value is not None:
            return [int(token) for token in (value if isinstance(value, list | tuple) else [value])]
    return []


METHODS = {"generate": Generate}  # for `--plugin tsdfm_bench_generate.py`, without installing
