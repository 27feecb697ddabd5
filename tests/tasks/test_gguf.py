"""A GGUF made here, converted as the pinned ones are: same scores, converted once, never half."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from tsdfm_bench.errors import AssetError
from tsdfm_bench.tasks.assets import Asset, file_sha256
from tsdfm_bench.tasks.scorers import causal_lm
from tsdfm_bench.tasks.scorers import gguf as conversion
from tsdfm_bench.tasks.scorers.causal_lm import SmolLM2

WIDTH, FEED, HEADS, HEADS_KV, LAYERS = 32, 64, 4, 2, 2


def write_gguf(path: Path) -> None:
    """A tiny Llama with tied embeddings and a byte-level tokenizer; matrices quantised to 8 bits."""
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<|endoftext|>", "<|im_start|>", *alphabet, "th", "the"]
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("tiny")
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(FEED)
    writer.add_block_count(LAYERS)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS_KV)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, *([1] * (len(tokens) - 2))])
    writer.add_token_merges(["t h", "th e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    writer.add_unk_token_id(0)
    generator = np.random.default_rng(0)

    def matrix(name: str, rows: int, columns: int) -> None:
        data = (0.3 * generator.standard_normal((rows, columns))).astype(np.float32)
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(name, gguf.quants.quantize(data, kind), raw_dtype=kind)

    matrix("token_embd.weight", len(tokens), WIDTH)
    writer.add_tensor("output_norm.weight", np.ones(WIDTH, dtype=np.float32))
    for layer in range(LAYERS):
        for norm in ("attn_norm", "ffn_norm"):
            scale = 1 + 0.1 * generator.standard_normal(WIDTH)
            writer.add_tensor(f"blk.{layer}.{norm}.weight", scale.astype(np.float32))
        matrix(f"blk.{layer}.attn_q.weight", WIDTH, WIDTH)
        matrix(f"blk.{layer}.attn_k.weight", WIDTH * HEADS_KV // HEADS, WIDTH)
        matrix(f"blk.{layer}.attn_v.weight", WIDTH * HEADS_KV // HEADS, WIDTH)
        matrix(f"blk.{layer}.attn_output.weight", WIDTH, WIDTH)
        matrix(f"blk.{layer}.ffn_gate.weight", FEED, WIDTH)
        matrix(f"blk.{layer}.ffn_up.weight", FEED, WIDTH)
        matrix(f"blk.{layer}.ffn_down.weight", WIDTH, FEED)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path)
    return path


@pytest.fixture
def asset(file, tmp_path, monkeypatch) -> Asset:
    """The tiny model in place of SmolLM2, with a cache of its own."""
    monkeypatch.setenv("TSDFM_BENCH_CACHE", str(tmp_path / "cache"))
    tiny = replace(
        causal_lm.SMOLLM2, file=file.name, sha256=file_sha256(file), bytes=file.stat().st_size, hub=None, packages=()
    )
    monkeypatch.setattr(SmolLM2, "asset", tiny)
    return tiny


def test_converted_scores_are_those_of_the_gguf(asset, file, capfd):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    scorer = SmolLM2.load({"path": str(file)}, "cpu")
    text = "the state of the union: é 1945"
    scores = scorer.score([text])
    assert "it/s" not in capfd.readouterr().err  # bars of the libraries stay silent

    tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    model = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=torch.float32).eval()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert scores.units[0].tolist() == ids
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[0, *ids]])).logits[0, :-1].double()
    expected = -torch.log_softmax(logits, -1)[torch.arange(len(ids)), torch.tensor(ids)]
    np.testing.assert_allclose(scores.nll[0], expected, rtol=1e-5, atol=1e-5)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, scorer.model.state_dict()[name]), name


def test_conversion_happens_once(asset, file, monkeypatch):
    folder = conversion.obtain_converted(asset, str(file))
    assert SmolLM2.is_cached()
    monkeypatch.setattr(conversion, "_convert", lambda *_: pytest.fail("converted again"))
    assert conversion.obtain_converted(asset) == folder  # needs neither the file nor a network
    assert conversion.obtain_converted(asset, str(file)) == folder


@pytest.mark.parametrize("fault", ["altered", "truncated", "no manifest", "no weights", "another gguf"])
def test_a_damaged_copy_is_made_again(asset, file, fault):
    folder = conversion.obtain_converted(asset, str(file))
    weights, manifest = folder / conversion.WEIGHTS, folder / conversion.MANIFEST
    data = weights.read_bytes()
    if fault == "altered":
        weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif fault == "truncated":
        weights.write_bytes(data[:-10])
    elif fault == "no manifest":
        manifest.unlink()
    elif fault == "no weights":
        weights.unlink()
    else:
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "gguf_sha256": "0"}))
    with pytest.raises(AssetError, match="could not obtain"):
        conversion.obtain_converted(asset)  # without the file it cannot be made
    assert conversion.obtain_converted(asset, str(file)) == folder
    assert weights.read_bytes() == data


def test_an_interrupted_conversion_leaves_nothing(asset, file, monkeypatch):
    def interrupted(gguf_file, folder, what):
        folder.mkdir()
        (folder / conversion.WEIGHTS).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(conversion, "_convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        conversion.obtain_converted(asset, str(file))
    assert not conversion.is_converted(asset)
    assert not conversion.converted_folder(asset).exists()
