"""generate: what `transformers` writes has the law of its network, and nothing of what the model ships with gets in."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)
from tsdfm_bench_generate import Generate
from typer.testing import CliRunner

from tsdfm_bench.cli import app
from tsdfm_bench.conformance import Target, conform
from tsdfm_bench.errors import CheckpointError, UsageError
from tsdfm_bench.meter import Meter
from tsdfm_bench.results.schema import read_summary

FILE = Path(__file__).parent / "tsdfm_bench_generate.py"
BYTES = 257  # the byte-level alphabet and an end token
V, END = 3, 2
SMALL = {"bos_token_id": END, "eos_token_id": END, "pad_token_id": None}


def llama(folder: Path, vocabulary: int, end: int, spread: float = 1.0, positions: int = 64) -> Path:
    """A causal model with random weights."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        initializer_range=spread,
        **{**SMALL, "bos_token_id": end, "eos_token_id": end},
    )
    return _written(LlamaForCausalLM, config, folder)


def t5(folder: Path) -> Path:
    """An encoder-decoder model with random weights."""
    config = T5Config(
        vocab_size=BYTES, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0,
        eos_token_id=256, pad_token_id=0,
    )  # fmt: skip
    return _written(T5ForConditionalGeneration, config, folder)


def _written(cls: Any, config: Any, folder: Path) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        cls(config).save_pretrained(folder)
    return folder


def tokenizer_in(folder: Path) -> Path:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={s: i for i, s in enumerate([*alphabet, "<|end|>"])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    marks = {"bos_token": "<|end|>", "eos_token": "<|end|>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **marks).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tokens of which one ends the text."""
    return llama(tmp_path_factory.mktemp("tiny"), V, END, spread=1.0)


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bytes, with a tokenizer of its own."""
    return tokenizer_in(llama(tmp_path_factory.mktemp("writer"), BYTES, 256))


def load(folder: Path, vocab_size: int = V, **options: str) -> Generate:
    return Generate.load({**options, "name": str(folder), "vocab_size": vocab_size}, "cpu")


def next_law(model: Any, before: tuple[int, ...], temperature: float = 1.0) -> np.ndarray:
    """The network's own next-token law, one plain forward call without a cache."""
    with torch.no_grad():
        logits = model(torch.tensor([[END, *before]])).logits[0, -1].double()
    return torch.softmax(logits / temperature, dim=0).numpy()


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.6}, {"draw": "legacy-fp32"}], ids=str)
def test_the_law_of_what_is_written(lab, tiny: Path, settings: dict[str, Any]) -> None:
    method = load(tiny, vocabulary="task", end="never")
    temperature = settings.get("temperature", 1.0)
    law = {}
    for x in itertools.product(range(V), repeat=3):
        chances = []
        for place in range(3):
            p = next_law(method.model, x[:place], temperature)
            p[END] = 0.0  # never ends
            chances.append(p[x[place]] / p.sum())
        law[x] = float(np.prod(chances))
    lab.agrees(method.sample(lab.request(8000, 3, None, seed=5, **settings)).tokens, law)


def test_the_law_of_the_lengths(lab, tiny: Path) -> None:
    """A text ends with the probability of the end token, and has one token at least."""
    batch = load(tiny, vocabulary="task").sample(lab.request(8000, 3, None, seed=6))
    model = load(tiny, vocabulary="task").model
    law = dict.fromkeys(itertools.product(range(1, 4)), 0.0)
    for a in range(2):
        first = next_law(model, ())
        first[END] = 0.0
        one = first[a] / first.sum()
        second = next_law(model, (a,))
        law[1,] += one * second[END]
        for b in range(2):
            third = next_law(model, (a, b))[END]
            law[2,] += one * second[b] * third
            law[3,] += one * second[b] * (1 - third)
    lab.agrees(batch.lengths[:, None], law)
    after = torch.arange(3) >= batch.lengths[:, None]
    assert int(batch.tokens[after].abs().sum()) == 0
    assert not bool((batch.tokens == END).any())


def test_a_prompt_is_continued(lab, tiny: Path) -> None:
    """Pinned tokens are kept, read, and cost no call of their own; an end token among them ends nothing."""
    method = load(tiny, vocabulary="task", end="never")
    prefix = torch.tensor([[0, END, 1]]).repeat(6000, 1)
    pinned = torch.tensor([[True, True, False]]).repeat(6000, 1)
    request = lab.request(6000, 3, None, prefix=prefix, pinned=pinned)
    with Meter(method.networks()).measure(6000) as cost:
        tokens = method.sample(request).tokens
    assert cost.calls == {"denoiser": 1}
    assert cost.rows == {"denoiser": 6000}
    p = next_law(method.model, (0, END))
    lab.agrees(tokens, {(0, END, y): p[y] / (p[0] + p[1]) for y in range(2)})


def test_prompts_of_different_length(lab, tiny: Path) -> None:
    prefix = torch.tensor([[0, END, 1, 1], [1, 0, 0, 0]])
    pinned = torch.tensor([[True, True, True, False], [True, False, False, False]])
    for end in ("stop", "never"):
        batch = load(tiny, vocabulary="task", end=end).sample(lab.request(2, 4, None, prefix=prefix, pinned=pinned))
        assert torch.equal(batch.tokens[pinned], prefix[pinned])
        assert int(batch.lengths[0]) >= 3


def test_settings_that_the_model_ships_with_are_dropped(lab, tiny: Path, tmp_path: Path) -> None:
    """top_k 1 and a repetition penalty in generation_config.json would change every sample."""
    shutil_copy(tiny, tmp_path)
    path = tmp_path / "generation_config.json"
    shipped = json.loads(path.read_text())
    path.write_text(json.dumps(shipped | {"do_sample": True, "top_k": 1, "repetition_penalty": 5.0, "max_length": 2}))
    request = lab.request(50, 4, None)
    one, other = (load(folder, vocabulary="task", end="never").sample(request).tokens for folder in (tiny, tmp_path))
    assert torch.equal(one, other)
    assert len({tuple(row) for row in one.tolist()}) > 3


def shutil_copy(source: Path, target: Path) -> None:
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())


def test_texts_are_what_the_tokenizer_makes_of_the_tokens(lab, writer: Path) -> None:
    """The same streams: texts in the model's own vocabulary, ids in a task that has the same one."""
    request = lab.request(6, 12, None)
    texts = load(writer, end="never").sample(request).texts
    tokens = load(writer, BYTES, vocabulary="task", end="never").sample(request).tokens
    tokenizer = load(writer).tokenizer
    assert texts == tuple(tokenizer.decode(row, clean_up_tokenization_spaces=False) for row in tokens.tolist())
    longer = load(writer, end="never", tokens="20").sample(request).texts
    assert longer is not None
    assert all(len(b) > len(a) and b.startswith(a.rstrip("\ufffd")) for a, b in zip(texts or (), longer, strict=True))


def test_what_it_reads_first_is_no_part_of_the_text(lab, writer: Path) -> None:
    request = lab.request(6, 12, None)
    plain, told = (load(writer, end="never", **more).sample(request).texts for more in ({}, {"prompt": "Say: "}))
    assert plain != told
    assert told is not None
    assert not any("Say" in text for text in told)


def test_an_encoder_is_called_once_and_counted(lab, tmp_path: Path) -> None:
    method = load(tokenizer_in(t5(tmp_path)), end="never", prompt="a story")
    with Meter(method.networks()).measure(3) as cost:
        texts = method.sample(lab.request(3, 7, None)).texts
    assert len(set(texts or ())) == 3
    assert cost.calls == {"denoiser": 7, "encoder": 1}
    assert cost.rows == {"denoiser": 21, "encoder": 3}


def test_learned_positions_work_too(lab, tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=V, n_positions=8, n_embd=8, n_layer=1, n_head=2, **SMALL)
    method = load(_written(GPT2LMHeadModel, config, tmp_path), vocabulary="task", end="never")
    assert method.sample(lab.request(4, 7, None)).tokens.shape == (4, 7)
    assert "at most 8 tokens" in str(method.refuse(lab.request(4, 8, None)))


# ------------------------------------------------------------------------------------------------- the contract


QUICK = ("contract", "runs", "shapes", "ids", "lengths", "repeatable", "independent", "pinned", "refusals",
         "temperature", "calls", "law", "state", "files", "process", "pickle")  # fmt: skip


def failures(folder: Path, *checks: str, **options: str) -> tuple[dict[str, str], set[str]]:
    report = conform(Target("generate", str(folder), options, (str(FILE),)), checks, isolated=False)
    failed = {row.check: row.seen for row in report.rows if row.verdict == "fail"}
    return failed, {row.check for row in report.rows if row.verdict == "pass"}


def test_it_keeps_the_contract_with_texts(writer: Path) -> None:
    failed, passed = failures(writer, *QUICK, end="never")
    assert failed == {}
    assert set(QUICK) - passed == {"pinned"}  # refused: another vocabulary


def test_it_keeps_the_contract_with_ids_of_the_task(tmp_path: Path) -> None:
    failed, passed = failures(llama(tmp_path, 2049, 2048), *QUICK, vocabulary="task")
    assert failed == {}
    assert set(QUICK) <= passed


def test_an_encoder_keeps_the_contract(tmp_path: Path) -> None:
    failed, _ = failures(tokenizer_in(t5(tmp_path)), "calls", "repeatable", end="never")
    assert failed == {}


def test_a_run_scores_the_texts(writer: Path, tmp_path: Path) -> None:
    """From the command line to a row: texts in a vocabulary of their own, on a task that has another."""
    words = f"run --plugin {FILE} --methods generate:{writer}[end=never] --length 16 --samples 8"
    result = CliRunner().invoke(
        app, [*words.split(), "--scorers", "char-rnn", "--metrics", "gen-ppl,cost", "--out", str(tmp_path / "out")]
    )
    assert result.exit_code == 0, result.output
    rows = read_summary(tmp_path / "out")
    ours = rows[(rows["method"] == "generate") & (rows["metric"] == "gen_ppl")]
    assert len(ours) == 1
    assert float(ours["value"].iloc[0]) > 1
    assert str(ours["weights"].iloc[0]).startswith("sha256:")


# ------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"vocabulary": "task", "prompt": "once"}, "needs its own tokenizer"),
        ({"tokens": "many"}, "a number from 1 on"),
        ({"dtype": "int8"}, "not 'int8'"),
        ({"end": "sometime"}, "end of generate"),
        ({"checkpoint": "x"}, "after the colon"),
    ],
)
def test_wrong_options(writer: Path, options: dict[str, str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        load(writer, **options)


def test_no_model_is_named() -> None:
    with pytest.raises(UsageError, match="generate:FOLDER"):
        Generate.load({"vocab_size": V}, "cpu")


def test_models_that_cannot_be_read(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="not from the model hub"):
        load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"holds no \*.safetensors"):
        load(tmp_path)
    with pytest.raises(CheckpointError, match="type vocabulary=own"):
        load(tiny, V + 1, vocabulary="task")
    shutil_copy(tiny, tmp_path)
    with pytest.raises(CheckpointError, match="cannot be read as a text generator"):
        load(tmp_path)  # it has no tokenizer
    (tmp_path / "model.safetensors").write_bytes(b"short")
    with pytest.raises(CheckpointError, match="cannot be read as a text generator"):
        load(tmp_path, vocabulary="task")


def test_identity_is_the_content(tiny: Path, tmp_path: Path) -> None:
    shutil_copy(tiny, tmp_path)
    one, other = (Generate.identify({"name": str(folder)}).weights for folder in (tiny, tmp_path))
    assert one == other
    (tmp_path / "config.json").write_text((tmp_path / "config.json").read_text().replace("silu", "relu"))
    assert Generate.identify({"name": str(tmp_path)}).weights != one


def test_what_it_refuses(lab, tiny: Path, writer: Path) -> None:
    prefix, pinned = torch.zeros(2, 4, dtype=torch.int64), torch.tensor([[False, True, False, True]] * 2)
    told = load(tiny, vocabulary="task").refuse(lab.request(2, 4, None, prefix=prefix, pinned=pinned))
    assert "only the beginning" in str(told)
    told = load(writer).refuse(lab.request(2, 4, None, prefix=prefix, pinned=pinned.flip(1)))
    assert "a vocabulary of its own" in str(told)
    assert "at most 64 tokens" in str(load(writer).refuse(lab.request(2, 64, None)))
