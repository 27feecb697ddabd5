"""Causal language models as judges: tiny random networks, scored by us and directly through transformers."""

from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForCausalLM,
    RobertaForMaskedLM,
)

from tsdfm_bench.activation import TanhGELU
from tsdfm_bench.errors import AssetError, UsageError
from tsdfm_bench.summary import first_line
from tsdfm_bench.tasks.scorers import transformer
from tsdfm_bench.tasks.scorers.causal_lm import CausalLM, Gemma3, SmolLM2
from tsdfm_bench.tasks.scorers.fast import log_total
from tsdfm_bench.tasks.scorers.transformer import CPU_TOKENS
from tsdfm_bench.tasks.scorers.windows import batches_of, windows_of

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.4,  # large, so that predictions differ from uniform
}
TEXTS = ["the state of the union", "a", "", "é is two bytes<|endoftext|>and more", "the state of the union", "x" * 50]


def save_model(folder: Path, kind: type, config: object) -> None:
    """A tiny random model with a byte tokenizer: id 0 is end-of-text, id 1 the begin-of-sequence token."""
    torch.manual_seed(0)
    kind(config).save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    table = {"<|endoftext|>": 0, "<bos>": 1, **{symbol: i + 2 for i, symbol in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocab=table, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<|endoftext|>")
    fast.save_pretrained(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    save_model(path, LlamaForCausalLM, LlamaConfig(vocab_size=258, **SIZES))
    return path


@pytest.fixture(scope="module")
def scorer(folder) -> CausalLM:
    return CausalLM.load({"name": str(folder)}, "cpu")


def direct_nll(folder: Path, tokens: list[int], context: int = 1) -> np.ndarray:
    """NLLs of one text from a whole forward pass of transformers, in float64 after the logits."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[context, *tokens]])).logits[0, :-1].double()
    return -torch.log_softmax(logits, dim=-1)[torch.arange(len(tokens)), torch.tensor(tokens)].numpy()


def test_scores_equal_a_direct_pass_of_each_text(folder, scorer):
    scores = scorer.score(TEXTS)
    for index, text in enumerate(TEXTS):
        units = scores.units[index].tolist()
        assert len(units) == len(scores.nll[index])
        if units:
            np.testing.assert_allclose(scores.nll[index], direct_nll(folder, units), rtol=2e-5, atol=2e-5)
        assert text.encode() == scorer.tokenizer.decode(units).encode()


@pytest.mark.parametrize("switch", ["0", "1"])
def test_gpt2_is_scored_as_transformers_scores_it(tmp_path, monkeypatch, switch):
    """With the faster activation and partial logits, and with every optimisation switched off."""
    monkeypatch.setenv("TSDFM_BENCH_PLAIN", switch)
    config = GPT2Config(vocab_size=258, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.4)
    save_model(tmp_path, GPT2LMHeadModel, config)
    scorer = CausalLM.load({"name": str(tmp_path)}, "cpu")
    shapes = []
    scorer.body.register_forward_hook(lambda _module, _args, output: shapes.append(output.last_hidden_state.shape))
    scores = scorer.score(TEXTS)
    for index in (0, 3, 5):
        expected = direct_nll(tmp_path, scores.units[index].tolist())
        np.testing.assert_allclose(scores.nll[index], expected, rtol=2e-5, atol=2e-5)
    fused = [module for module in scorer.model.modules() if isinstance(module, TanhGELU)]
    assert (len(fused), scorer.split_head, len(shapes)) == ((2, True, 1) if switch == "0" else (0, False, 4))


@pytest.mark.parametrize("shift", [0.0, 59.0, 200.0, -59.0, -95.0, -2000.0])
def test_logits_of_any_size_have_their_total(shift):
    """Where exponentials would overflow, or lose their small terms, the largest entry is taken out first."""
    logits = 3 * torch.randn(70, 3000, generator=torch.Generator().manual_seed(0)) + shift
    logits[:, 0] = -torch.inf
    exact = torch.logsumexp(logits.double(), dim=-1)
    torch.testing.assert_close(log_total(logits).double(), exact, atol=2e-5, rtol=1e-6)
    logits[3, 4] = torch.nan
    assert log_total(logits).isnan().tolist() == [row == 3 for row in range(70)]


def test_spans_are_the_characters_of_each_token(scorer):
    """Tokens are bytes: the two of a character have its span, and the end-of-text marker is one unit."""
    scores = scorer.score(TEXTS)
    for index, text in enumerate(TEXTS):
        spans, special = scores.spans[index], scores.special[index]
        assert spans.shape == (len(scores.nll[index]), 2)
        for (begin, end), unit, mark in zip(spans, scores.units[index], special, strict=True):
            part = text[begin:end]
            assert part == "<|endoftext|>" if mark else scorer.tokenizer.decode([unit]) in (part, "\ufffd")
        assert spans[~special].tolist() == sorted(spans[~special].tolist())
    assert scores.spans[3][:3].tolist() == [[0, 1], [0, 1], [1, 2]]


def test_spans_have_the_space_that_some_tokenizers_leave_out(folder, tmp_path):
    """Those whose post-processor trims offsets: without it a word's bytes would lack the space before it."""
    copy = tmp_path / "trimming"
    shutil.copytree(folder, copy)
    table = Tokenizer.from_file(str(copy / "tokenizer.json"))
    table.post_processor = processors.ByteLevel(trim_offsets=True)
    table.save(str(copy / "tokenizer.json"))
    texts = ["The State of  the\nUnion"]
    trimmed, plain = (CausalLM.load({"name": str(path)}, "cpu").score(texts).spans for path in (copy, folder))
    assert [row.tolist() for row in trimmed] == [row.tolist() for row in plain]


def test_a_tokenizer_without_offsets_gives_no_spans(scorer, monkeypatch):
    class Slow:
        is_fast = False

        def __call__(self, text, return_offsets_mapping=False, **_):
            assert not return_offsets_mapping
            return {"input_ids": [3] * len(text)}

    monkeypatch.setattr(scorer, "tokenizer", Slow())
    monkeypatch.setattr(scorer, "unproven", 0)
    monkeypatch.setattr(scorer, "fingerprint", "")
    assert scorer.score(["abc<|endoftext|>de"]).spans is None


def test_units_special_and_bytes(scorer):
    scores = scorer.score(TEXTS)
    assert scores.units[3].tolist().count(0) == 1
    np.testing.assert_array_equal(scores.special[3], scores.units[3] == 0)
    assert not any(special.any() for i, special in enumerate(scores.special) if i != 3)
    assert scores.bytes.tolist() == [22, 1, 0, 15 + 1 + 8, 22, 50]
    assert len(scores.nll[2]) == 0


def test_scores_do_not_depend_on_the_batch(scorer, folder):
    """Order, neighbours and the size of a forward pass change nothing beyond rounding; order is restored."""
    together = scorer.score(TEXTS)
    other = CausalLM.load({"name": str(folder), "batch_tokens": 7}, "cpu").score(TEXTS[::-1])
    for index in range(len(TEXTS)):
        np.testing.assert_allclose(together.nll[index], other.nll[len(TEXTS) - 1 - index], atol=2e-5)
        np.testing.assert_allclose(together.features[index], other.features[len(TEXTS) - 1 - index], atol=2e-5)


def test_equal_texts_are_scored_once(scorer):
    rows = 0

    def count(_module, args, kwargs, _output):
        nonlocal rows
        rows += kwargs["input_ids"].shape[0]

    handle = scorer.networks()["scorer"].register_forward_hook(count, with_kwargs=True)
    try:
        scores = scorer.score(["same", "same", "other", "same"])
    finally:
        handle.remove()
    assert rows == 2
    np.testing.assert_array_equal(scores.nll[0], scores.nll[3])


def test_features_are_the_mean_state_after_the_first_tokens(folder, scorer):
    from transformers import AutoModel

    short = CausalLM.load({"name": str(folder), "feature_tokens": 5}, "cpu")
    body = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    text = TEXTS[0]
    with torch.no_grad():
        states = body(input_ids=torch.tensor([[1, *scorer.encode(text)]])).last_hidden_state[0]
    np.testing.assert_allclose(short.score([text]).features[0], states[1:6].mean(0), atol=1e-5)
    # a text shorter than that: all its tokens but the last, whose state predicts nothing
    with torch.no_grad():
        states = body(input_ids=torch.tensor([[1, *scorer.encode("abc")]])).last_hidden_state[0]
    np.testing.assert_allclose(short.score(["abc"]).features[0], states[1:3].mean(0), atol=1e-5)
    assert "first 5 tokens" in short.info.features


def test_long_texts_are_read_in_windows(folder):
    """Window 16, stride 6: after the first 16 tokens, six at a time after the context token and those that fit."""
    scorer = CausalLM.load({"name": str(folder), "window": 16, "stride": 6}, "cpu")
    text = "".join(chr(97 + i % 7) for i in range(40))
    ids = scorer.encode(text)
    nll = scorer.score([text]).nll[0]
    np.testing.assert_allclose(nll[:16], direct_nll(folder, ids[:16]), atol=2e-5)
    for first in range(16, 40, 6):
        end = min(first + 6, 40)
        expected = direct_nll(folder, ids[end - 16 : end])[first - end :]
        np.testing.assert_allclose(nll[first:end], expected, atol=2e-5)


@pytest.mark.parametrize(
    ("count", "window", "stride"), [(0, 4, 2), (1, 4, 2), (4, 4, 2), (5, 4, 1), (31, 8, 3), (9, 2, 1)]
)
def test_windows_score_every_token_once_and_fit(count, window, stride):
    ids = list(range(100, 100 + count))
    windows = windows_of(0, ids, 7, window, stride)
    assert [int(t) for w in windows for t in w.targets] == ids
    for w in windows:
        assert len(w.inputs) <= window
        assert w.inputs[0] == 7
        assert len(w.targets) <= len(w.inputs)
        follows = [*w.inputs[1:].tolist(), int(w.targets[-1])]
        assert follows[-len(w.targets) :] == w.targets.tolist()


def test_batches_hold_every_window_once_within_the_budget():
    windows = [w for i, n in enumerate([5, 1, 9, 3, 3, 12]) for w in windows_of(i, list(range(n)), 0, 8, 4)]
    batches = list(batches_of(windows, 16))
    assert sorted((w.text, w.first) for b in batches for w in b) == sorted((w.text, w.first) for w in windows)
    assert all(len(b) * max(len(w.inputs) for w in b) <= 16 for b in batches)


def test_a_model_that_scales_its_logits_is_run_whole(tmp_path):
    """Granite divides the logits: its output layer alone would give other scores."""
    config = GraniteConfig(vocab_size=258, logits_scaling=3.0, **SIZES)
    save_model(tmp_path, GraniteForCausalLM, config)
    scorer = CausalLM.load({"name": str(tmp_path)}, "cpu")
    assert not scorer.split_head
    scores = scorer.score(TEXTS[:2])
    for index in range(2):
        expected = direct_nll(tmp_path, scores.units[index].tolist())
        np.testing.assert_allclose(scores.nll[index], expected, rtol=2e-5, atol=2e-5)


def test_bfloat16_is_an_option_and_recorded(folder, scorer):
    rough = CausalLM.load({"name": str(folder), "dtype": "bfloat16"}, "cpu")
    assert rough.info.dtype == "bfloat16"
    assert next(rough.model.parameters()).dtype == torch.bfloat16
    exact, close = scorer.score(TEXTS[:1]).nll[0], rough.score(TEXTS[:1]).nll[0]
    assert close.dtype == np.float32
    assert 0 < np.abs(close.mean() - exact.mean()) < 0.1


def test_a_gpu_without_bfloat16_says_what_to_choose(folder, monkeypatch):
    """Before the model is read: torch would emulate it, at a fraction of the speed."""
    first_is_new = {"cuda:0": SimpleNamespace(major=9), "cuda:1": SimpleNamespace(major=7)}  # an H100 and a T4
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: first_is_new[str(device)])
    monkeypatch.setattr(transformer, "read_model", lambda *_: pytest.fail("read"))
    transformer._require_dtype(CausalLM.describe({"name": str(folder), "dtype": "bfloat16"}), "cuda:0")
    with pytest.raises(UsageError, match=r"cuda:1 does not compute in bfloat16.*dtype=float16 or float32"):
        CausalLM.load({"name": str(folder), "dtype": "bfloat16"}, "cuda:1")


def test_a_device_map_places_the_model_instead_of_the_device(folder, scorer, monkeypatch):
    """`auto` leaves the places to accelerate: the model is not moved afterwards, its inputs follow its embedding."""
    asked = []
    read = transformer.read_model

    def remember(where, dtype, device_map):
        asked.append(device_map)
        return read(where, dtype, device_map)

    monkeypatch.setattr(transformer, "read_model", remember)
    spread = CausalLM.load({"name": str(folder), "device_map": "auto"}, "meta")  # where no score could be computed
    assert asked == ["auto"]
    assert spread.device == spread.model.get_input_embeddings().weight.device != torch.device("meta")
    for ours, theirs in zip(spread.score(TEXTS).nll, scorer.score(TEXTS).nll, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)
    assert spread.info == scorer.info  # where it runs is no part of what it is


def test_a_wrong_device_map_is_one_clear_error(folder):
    with pytest.raises(AssetError, match=r"cannot be read as a causal language model.*device_map"):
        CausalLM.load({"name": str(folder), "device_map": "nowhere"}, "cpu")


def test_description_needs_no_weights_in_memory(folder, scorer):
    info = CausalLM.describe({"name": str(folder)})
    assert info == scorer.info
    assert (info.window, info.stride) == (64, 63)  # the configuration allows 64
    assert info.context == "<bos>"
    assert info.parameters == sum(p.numel() for p in scorer.model.parameters())
    assert info.revision.startswith("sha256:")


def test_revision_follows_the_weights(folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    assert CausalLM.describe({"name": str(copy)}).revision == CausalLM.describe({"name": str(folder)}).revision
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-3] ^= 1
    (copy / "model.safetensors").write_bytes(data)
    assert CausalLM.describe({"name": str(copy)}).revision != CausalLM.describe({"name": str(folder)}).revision


def test_revision_follows_the_vocabulary(folder, tmp_path):
    """Another tokenizer makes another judge of the same weights."""
    copy = with_tokenizer(folder, tmp_path / "copy", normalizers.NFC())
    assert CausalLM.describe({"name": str(copy)}).revision != CausalLM.describe({"name": str(folder)}).revision


def test_folder_without_safetensors_is_refused(folder, tmp_path):
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(AssetError, match="pickled"):
        CausalLM.load({"name": str(tmp_path)}, "cpu")
    assert "pickled" in CausalLM.available({"name": str(tmp_path)})


@pytest.mark.parametrize("settings", [[], ["tokenizer_config.json"]])
def test_a_folder_without_a_tokenizer_says_so(folder, tmp_path, settings):
    for file in ("config.json", "model.safetensors", *settings):
        shutil.copy(folder / file, tmp_path)
    for use in (CausalLM.check, lambda params: CausalLM.load({**params, "context": "<bos>"}, "cpu")):
        with pytest.raises(AssetError, match=r"has no tokenizer files \(tokenizer\.json"):
            use({"name": str(tmp_path)})


def test_a_model_that_cannot_judge_is_told_before_its_weights_are_read(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(transformer, "read_model", lambda *_: pytest.fail("read"))
    CausalLM.check({"name": str(folder)})
    with pytest.raises(UsageError, match=r"context token '<nothing>' .* set option 'context'"):
        CausalLM.check({"name": str(folder), "context": "<nothing>"})
    lossy = str(with_tokenizer(folder, tmp_path / "lossy", normalizers.Lowercase()))
    with pytest.raises(UsageError, match="does not give a text back"):
        CausalLM.check({"name": lossy})
    CausalLM.check({"name": lossy, "lossy": "true"})
    sizes = {name: size for name, size in SIZES.items() if name != "num_key_value_heads"}
    save_model(tmp_path / "encoder", BertForMaskedLM, BertConfig(vocab_size=258, pad_token_id=0, **sizes))
    with pytest.raises(UsageError, match=r"is not causal: BertForMaskedLM sees the tokens"):
        CausalLM.check({"name": str(tmp_path / "encoder")})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]},
            r"it is a T5, which is not one\. Choose",
        ),
        (
            {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}},
            r"code of others is not run\. Choose a model whose architecture is part of transformers",
        ),
    ],
)
def test_models_of_other_kinds_are_named(folder, tmp_path, changes, message):
    copy = edited(folder, tmp_path / "copy", **changes)
    (copy / "own.py").write_text("raise SystemExit")
    for use in (CausalLM.check, lambda params: CausalLM.load(params, "cpu")):
        with pytest.raises(AssetError, match=f"cannot be read as a causal language model: .*{message}"):
            use({"name": str(copy)})


@pytest.mark.parametrize("device_map", [None, "auto"])
@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, MemoryError, OSError])
def test_memory_that_runs_out_while_a_model_is_read_says_what_to_choose(folder, monkeypatch, kind, device_map):
    def no_memory(*_args, **_settings):
        raise kind("out of memory")

    owner, name = (LlamaForCausalLM, "from_pretrained") if device_map else (torch.nn.Module, "to")
    monkeypatch.setattr(owner, name, no_memory)
    with pytest.raises(AssetError, match=r"memory ran out while .* dtype=bfloat16, device_map=auto or another --d"):
        CausalLM.load({"name": str(folder), "device_map": device_map or None}, "cpu")


def test_a_revision_of_a_folder_is_refused(folder):
    for params in ({"name": f"{folder}@deadbeef"}, {"name": str(folder), "revision": "main"}):
        with pytest.raises(UsageError, match=r"is a folder and has no revision '(deadbeef|main)'"):
            CausalLM.describe(params)


def test_a_window_beyond_the_positions_of_a_model_is_refused(folder, tmp_path):
    nested = edited(folder, tmp_path / "nested", max_position_embeddings=None, text_config=SIZES)
    for path in (folder, nested):
        assert CausalLM.describe({"name": str(path)}).window == 64
        assert CausalLM.describe({"name": str(path), "window": 64, "stride": 32}).window == 64
        with pytest.raises(UsageError, match=r"'window' .* at most the 64 positions of .*, not 4096"):
            CausalLM.describe({"name": str(path), "window": "4096"})


def test_truncated_weights_are_one_clear_error(folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    data = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(AssetError, match="cannot be read"):
        CausalLM.load({"name": str(copy)}, "cpu")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("config", "masked", "causal"),
    [(BertConfig, BertForMaskedLM, BertLMHeadModel), (RobertaConfig, RobertaForMaskedLM, RobertaForCausalLM)],
)
def test_an_encoder_is_no_judge(tmp_path, config, masked, causal, dtype):
    """The same network with a causal mask is one."""
    sizes = {name: size for name, size in SIZES.items() if name != "num_key_value_heads"}
    save_model(tmp_path / "encoder", masked, config(vocab_size=258, pad_token_id=0, **sizes))
    with pytest.raises(UsageError, match=r"is not causal: .* sees the tokens that it is to predict.*hf:gpt2-large"):
        CausalLM.load({"name": str(tmp_path / "encoder"), "dtype": dtype}, "cpu")
    save_model(tmp_path / "decoder", causal, config(vocab_size=258, pad_token_id=0, is_decoder=True, **sizes))
    CausalLM.load({"name": str(tmp_path / "decoder"), "dtype": dtype}, "cpu")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_models_of_other_kinds_are_causal(tmp_path, dtype):
    """Experts, whose rounding depends on the tokens that share them, and a state-space model."""
    experts = MixtralConfig(vocab_size=258, num_local_experts=4, num_experts_per_tok=2, **SIZES)
    states = MambaConfig(vocab_size=258, hidden_size=32, num_hidden_layers=2, state_size=4, initializer_range=0.4)
    for kind, config in ((MixtralForCausalLM, experts), (MambaForCausalLM, states)):
        save_model(tmp_path / kind.__name__, kind, config)
        CausalLM.load({"name": str(tmp_path / kind.__name__), "dtype": dtype}, "cpu")


def edited(folder: Path, copy: Path, file: str = "config.json", **changes: object) -> Path:
    """A copy of a model's folder with other settings in a JSON file."""
    shutil.copytree(folder, copy)
    settings = json.loads((copy / file).read_text())
    (copy / file).write_text(json.dumps(settings | changes))
    return copy


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 3}, r"LlamaForCausalLM .*missing: model\.layers\.2\..*and 6 more"),
        ({"num_hidden_layers": 1}, r"not of this model: model\.layers\.1\."),
        ({"vocab_size": 100}, r"of another shape: .*embed_tokens\.weight \(258, 32\), not \(100, 32\)"),
    ],
)
def test_weights_of_another_configuration_are_refused(folder, tmp_path, changes, message, caplog):
    """transformers would fill what is missing with random numbers, others at every start; only our message is seen."""
    library = logging.getLogger("transformers")
    library.addHandler(caplog.handler)  # its records do not propagate
    try:
        with pytest.raises(AssetError, match=message):
            CausalLM.load({"name": str(edited(folder, tmp_path / "copy", **changes))}, "cpu")
    finally:
        library.removeHandler(caplog.handler)
    assert not caplog.records


def test_weights_of_a_model_with_another_head_are_refused(tmp_path):
    save_model(tmp_path, LlamaForSequenceClassification, LlamaConfig(vocab_size=258, **SIZES))
    with pytest.raises(AssetError, match=r"missing: lm_head\.weight; not of this model: score\.weight"):
        CausalLM.load({"name": str(tmp_path)}, "cpu")


def test_tied_weights_and_tables_that_older_versions_stored_may_be_there_or_not(tmp_path):
    """The hub's GPT-2 and GPT-Neo have causal masks among their weights, and no output layer."""
    config = GPTNeoConfig(
        vocab_size=258,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        max_position_embeddings=64,
        attention_types=[[["global", "local"], 1]],
        initializer_range=0.4,
    )
    save_model(tmp_path, GPTNeoForCausalLM, config)
    weights = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in weights
    before = CausalLM.load({"name": str(tmp_path)}, "cpu").score(TEXTS[:1]).nll[0]
    weights["transformer.h.0.attn.attention.bias"] = torch.ones(1, 1, 64, 64, dtype=torch.bool).tril()
    weights["transformer.h.0.attn.attention.masked_bias"] = torch.tensor(-1e9)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    np.testing.assert_array_equal(CausalLM.load({"name": str(tmp_path)}, "cpu").score(TEXTS[:1]).nll[0], before)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", "[1]", r"config\.json is damaged: it holds a list"),
        ("config.json", "{", r"config\.json is not JSON"),
        ("tokenizer_config.json", "[]", r"tokenizer_config\.json is damaged: it holds a list"),
        ("tokenizer_config.json", "{", r"tokenizer_config\.json is not JSON"),
        ("model.safetensors.index.json", "{", r"index\.json is not JSON"),
        ("model.safetensors.index.json", "{}", r"index\.json is damaged: it has no table 'weight_map'"),
        ("model.safetensors.index.json", '{"weight_map": {"a": 1}}', r"index\.json is damaged"),
        ("model.safetensors", "\x02\0\0\0\0\0\0\0[]", r"model\.safetensors is not a complete safetensors file"),
        ("model.safetensors", '\x08\0\0\0\0\0\0\0{"a":[]}', r"model\.safetensors is not a complete safetensors"),
    ],
)
def test_damaged_files_of_a_model_are_named(folder, tmp_path, file, content, message):
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / file).write_text(content)
    with pytest.raises(AssetError, match=message):
        CausalLM.describe({"name": str(tmp_path / "copy")})


def test_a_damaged_tokenizer_is_named(folder, tmp_path):
    copy = edited(folder, tmp_path / "copy", "tokenizer_config.json", bos_token=None, eos_token=None)
    (copy / "tokenizer.json").write_text("{")
    with pytest.raises(AssetError, match=r"the tokenizer in .*copy cannot be read"):
        CausalLM.describe({"name": str(copy)})
    with pytest.raises(AssetError, match=r"copy cannot be read"):
        CausalLM.load({"name": str(copy), "context": "<bos>"}, "cpu")


def test_a_token_without_an_embedding_is_named_when_it_is_read(tmp_path):
    """Tokenizers with tokens that their model never reads are common, so only those that texts have count."""
    save_model(tmp_path, LlamaForCausalLM, LlamaConfig(vocab_size=200, **SIZES))
    scorer = CausalLM.load({"name": str(tmp_path)}, "cpu")
    scorer.score(["all"])
    with pytest.raises(AssetError, match=r"token 2\d\d \('.'\) is beyond the model's 200 embeddings"):
        scorer.score(["one", "one two"])


def test_unknown_model_offline_lists_what_was_tried():
    with pytest.raises(AssetError) as error:
        CausalLM.fetch({"name": "nobody/no-such-model"})
    for part in ("folder nobody/no-such-model: does not exist", "local hub cache", "TSDFM_BENCH_OFFLINE", "smollm2"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({}, "hf:NAME"),
        ({"name": "x", "dtype": "int8"}, "dtype"),
        ({"name": "x", "window": 8, "stride": 8}, "stride"),
        ({"name": "x", "windw": 8}, "window"),
        ({"name": "x", "feature_tokens": 0}, "feature_tokens"),
    ],
)
def test_wrong_options_are_refused(params, message):
    with pytest.raises(UsageError, match=message):
        CausalLM.load(params, "cpu")


def test_a_revision_may_stand_behind_the_name(folder, tmp_path):
    asked = {name: CausalLM.settings_of({"name": name})["revision"] for name in ("org/x@v1", "org/x")}
    assert asked == {"org/x@v1": "v1", "org/x": None}
    assert CausalLM.settings_of({"name": "org/x@v1"}) == CausalLM.settings_of({"name": "org/x", "revision": "v1"})
    for params in ({"name": "org/x@"}, {"name": "org/x@v1", "revision": "v2"}):
        with pytest.raises(UsageError, match=r"one revision, hf:org/x@REVISION"):
            CausalLM.settings_of(params)
    shutil.copytree(folder, tmp_path / "x@v1")  # a folder's name is its own
    assert CausalLM.describe({"name": str(tmp_path / "x@v1")}).title.endswith("x@v1")


def test_wrong_context_token_is_refused(folder):
    with pytest.raises(UsageError, match="context"):
        CausalLM.load({"name": str(folder), "context": "<nothing>"}, "cpu")


def test_pinned_judges_describe_themselves_without_files():
    info = SmolLM2.describe({"dtype": "bfloat16"})
    assert (info.name, info.dtype, info.context) == ("smollm2", "bfloat16", "<|endoftext|>")
    assert "SmolLM2-135M-Instruct, Q4_1" in info.title
    assert not SmolLM2.is_cached()


def test_gemma_shows_its_terms_until_they_are_accepted(monkeypatch):
    monkeypatch.delenv("TSDFM_BENCH_ACCEPT_GEMMA_TERMS", raising=False)
    for attempt in (Gemma3.fetch, lambda params: Gemma3.load(params, "cpu")):
        with pytest.raises(AssetError, match="Gemma Terms of Use") as error:
            attempt({})
        assert first_line(str(error.value)).endswith("before you agree to the Gemma Terms of Use")
        assert "TSDFM_BENCH_ACCEPT_GEMMA_TERMS=1" in str(error.value)
    monkeypatch.setenv("TSDFM_BENCH_ACCEPT_GEMMA_TERMS", "1")
    with pytest.raises(AssetError, match="could not obtain Gemma"):  # accepted, but this session has no network
        Gemma3.fetch({})
    monkeypatch.delenv("TSDFM_BENCH_ACCEPT_GEMMA_TERMS")
    with pytest.raises(AssetError, match="could not obtain Gemma"):
        Gemma3.fetch({"accept_terms": "true"})


def test_forward_passes_are_halved_when_memory_is_short(folder, monkeypatch):
    """Rows that fit differ from device to device; the scores do not, and the smaller size is kept."""
    expected = CausalLM.load({"name": str(folder)}, "cpu").score(TEXTS)
    scorer = CausalLM.load({"name": str(folder)}, "cpu")
    whole = scorer._score_batch
    rows = []

    def short_of_memory(batch):
        rows.append(len(batch))
        if len(batch) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return whole(batch)

    monkeypatch.setattr(scorer, "_score_batch", short_of_memory)
    scores = scorer.score(TEXTS)
    assert max(rows) > 2
    assert scorer.budget < CPU_TOKENS
    for ours, theirs in zip(scores.nll, expected.nll, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)
    np.testing.assert_allclose(scores.features, expected.features, atol=2e-5)


def test_memory_that_holds_half_is_found_with_one_failure(folder, monkeypatch):
    """512 tokens a pass do not fit, 256 do: the second of many batches is made smaller before it fails."""
    scorer = CausalLM.load({"name": str(folder), "window": 16, "stride": 15}, "cpu")
    whole, sizes = scorer._score_batch, []

    def half(batch):
        sizes.append(len(batch) * len(batch[0].inputs))
        if sizes[-1] > CPU_TOKENS // 2:
            raise torch.OutOfMemoryError("out of memory")
        return whole(batch)

    monkeypatch.setattr(scorer, "_score_batch", half)
    texts = [f"{number:016}" for number in range(160)]  # a window of 16 tokens each
    scores = scorer.score(texts)
    assert [len(nll) for nll in scores.nll] == [16] * 160
    assert sizes == [512] + [256] * 10
    assert scorer.budget == 256
    scorer.score(texts[:32])
    assert sizes[11:] == [256] * 2


def test_a_window_that_does_not_fit_alone_says_what_to_choose(folder, monkeypatch):
    scorer = CausalLM.load({"name": str(folder)}, "cpu")

    def no_memory(_batch):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(scorer, "_score_batch", no_memory)
    with pytest.raises(AssetError, match=r"one window of .* does not fit.*smaller window, dtype=bfloat16"):
        scorer.score(["some text"])


def test_judges_with_equal_tokenizers_share_one_tokenisation(folder, tmp_path, monkeypatch):
    from tsdfm_bench.tasks.scorers.tokens import TokenMemory

    monkeypatch.setattr(transformer, "SHARED", TokenMemory())
    save_model(tmp_path, LlamaForCausalLM, LlamaConfig(vocab_size=258, **{**SIZES, "num_hidden_layers": 1}))
    first, second = (CausalLM.load({"name": str(path)}, "cpu") for path in (folder, tmp_path))
    assert first.fingerprint == second.fingerprint
    before = first.score(TEXTS)
    monkeypatch.setattr(second, "_encode", lambda _: pytest.fail("tokenised twice"))
    after = second.score(TEXTS)
    for ours, theirs in zip(before.units, after.units, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_the_memory_of_tokens_is_bounded():
    from tsdfm_bench.tasks.scorers.tokens import TokenMemory

    memory = TokenMemory(most_bytes=20)
    calls = []

    def encode(text: str) -> list[int]:
        calls.append(text)
        return [50_256] * 4

    for _judge in range(2):  # which read the same texts, more than are kept
        for text in ("a", "b", "c", "d"):
            assert memory.numbers("t", text, encode) == [50_256] * 4
            assert memory.kept["t"] <= 20
    assert calls == ["a", "b", "c", "d", "c", "d"]
    memory.numbers("u", "a", encode)  # another tokenizer has a memory of its own
    memory.numbers("u", "a", encode)
    assert calls[6:] == ["a"]
    memory.numbers("", "a", encode)  # a tokenizer that cannot be described shares nothing
    memory.numbers("", "a", encode)
    assert calls[-2:] == ["a", "a"]


def with_tokenizer(folder: Path, copy: Path, normalizer: object = None, model: object = None) -> Path:
    """A copy of a model's folder whose tokenizer has another normaliser, or is another one."""
    shutil.copytree(folder, copy)
    table = Tokenizer.from_file(str(copy / "tokenizer.json"))
    if model is not None:
        table.model, table.pre_tokenizer = model, None
        table.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    table.normalizer = normalizer
    table.save(str(copy / "tokenizer.json"))
    return copy


@pytest.mark.parametrize(
    ("normalizer", "changed"),
    [
        (normalizers.Lowercase(), r"'The State.*' became 'the state"),
        (normalizers.Replace(Regex(r"\s+"), " "), r"' 1,234.* became '1,234"),
        (normalizers.Replace("\n", " "), r"'\\n\\n.* became '  "),
        (normalizers.NFKC(), r"'ﬁve.* became 'five"),
        (normalizers.Strip(), r"'\\n' became ''"),
        (normalizers.StripAccents(), r"'é.* became 'e"),
    ],
)
def test_a_tokenizer_that_changes_texts_is_refused(folder, tmp_path, normalizer, changed):
    copy = with_tokenizer(folder, tmp_path / "copy", normalizers.Sequence([normalizers.NFD(), normalizer]))
    with pytest.raises(UsageError, match=rf"does not give a text back \({changed}.*lossy=true"):
        CausalLM.load({"name": str(copy)}, "cpu")
    assert CausalLM.load({"name": str(copy), "lossy": "true"}, "cpu").score(["A"]).units[0].size == 1


def sentencepiece(fallback: bool = True) -> models.BPE:
    """Pieces for letters, and bytes or the unknown token for other characters."""
    pieces = ["<|endoftext|>", "<bos>", "<unk>", "▁", *"Theoldgray"]
    pieces += [f"<0x{byte:02X}>" for byte in range(256 - len(pieces) + 2)] if fallback else list("SUint:,.1234?“”–'s½")
    table = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    return models.BPE(vocab=table, merges=[], byte_fallback=fallback, unk_token="<unk>")


def test_tokenizers_that_keep_texts_are_accepted(folder, tmp_path):
    """SentencePiece's space before a text, bytes for rare characters, and canonical composition."""
    spaces = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    llama = with_tokenizer(folder, tmp_path / "llama", spaces, sentencepiece())
    assert CausalLM.load({"name": str(llama)}, "cpu").score(["The old", " dog\n"]).units[0].size == 8
    gemma = with_tokenizer(folder, tmp_path / "gemma", normalizers.Replace(" ", "▁"), sentencepiece())
    assert CausalLM.load({"name": str(gemma)}, "cpu").score(["The old", " dog\n"]).units[0].size == 7
    qwen = with_tokenizer(folder, tmp_path / "qwen", normalizers.NFC())
    assert CausalLM.load({"name": str(qwen)}, "cpu").score(["e\u0301"]).units[0].size == 2


def test_a_tokenizer_that_changes_the_texts_scored_is_refused_with_the_first_of_them(folder, tmp_path):
    """What no probe has: here one letter; of later texts nothing more is read back."""
    copy = with_tokenizer(folder, tmp_path / "copy", normalizers.Replace("ø", "o"))
    scorer = CausalLM.load({"name": str(copy)}, "cpu")
    scorer.score(["one<|endoftext|>two"])
    with pytest.raises(UsageError, match=r"'ø end' became 'o end'"):
        scorer.score(["one<|endoftext|>twø end"])
    unknown = with_tokenizer(folder, tmp_path / "unknown", normalizers.Replace(" ", "▁"), sentencepiece(False))
    with pytest.raises(UsageError, match=r"became '<unk>"):
        CausalLM.load({"name": str(unknown)}, "cpu")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("GatedRepoError", "is gated: accept its licence.*log in"),
        ("RepositoryNotFoundError", "there is no meta/model, or it is private"),
        ("RevisionNotFoundError", "has no revision 'v9'"),
    ],
)
def test_what_the_hub_refuses_is_explained(monkeypatch, kind, message):
    from huggingface_hub import errors

    from tsdfm_bench.tasks.scorers import hub

    def refuse(*_args, **_settings):
        cls = getattr(errors, kind)
        raise cls.__new__(cls, "refused")

    monkeypatch.setattr(hub, "_snapshot", refuse)
    monkeypatch.setattr(hub, "hub_refusal", lambda: None)
    with pytest.raises(AssetError, match=message) as caught:
        CausalLM.describe({"name": "meta/model", "revision": "v9"})
    assert re.search(message, first_line(str(caught.value)))  # as tables show it
