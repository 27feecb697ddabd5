"""From a hub to a table: text, tokenizer, published weights and judge by hub name, a local cache standing in for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tsdfm_bench.methods.public import names

V, LENGTH = 257, 16


def repository(cache: Path, name: str) -> Path:
    """The snapshot folder of a repository in a hub cache."""
    root = cache / f"models--{name.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text("c" * 40)
    folder = root / "snapshots" / ("c" * 40)
    folder.mkdir(parents=True)
    return folder


def tokenizer_in(folder: Path) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    table = {symbol: i for i, symbol in enumerate(alphabet)} | {"<|endoftext|>": len(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=table, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    ).save_pretrained(folder)


@pytest.fixture
def hub(tmp_path) -> Path:
    """A hub cache with an MDLM checkpoint as published, a judge with its tokenizer, and a folder of text."""
    cache = tmp_path / "hub"
    generator = torch.Generator().manual_seed(0)
    shapes = names.expected(names.Geometry("dit", V + 1, 16, 8, 1, 2))
    weights = {f"backbone.{name}": 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    mdlm = repository(cache, "kuleshov-group/mdlm-owt")
    save_file(weights, mdlm / "model.safetensors")
    (mdlm / "config.json").write_text(json.dumps({"model_type": "mdlm", "n_heads": 2, "time_conditioning": False}))
    judge = repository(cache, "org/judge")
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=V,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=32,
        )
    ).save_pretrained(judge)
    tokenizer_in(judge)
    (tmp_path / "corpus").mkdir()
    lines = [json.dumps({"text": f"line {i} of a text that everybody knows by heart"}) for i in range(400)]
    (tmp_path / "corpus" / "a.jsonl").write_text("\n".join(lines))
    return cache


def run(tmp_path: Path, hub: Path, *more: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "HF_HUB_CACHE": str(hub),
        "HF_HUB_OFFLINE": "1",
        "TSDFM_BENCH_OFFLINE": "1",
        "TSDFM_BENCH_CACHE": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    task = f"text:{tmp_path / 'corpus'}[tokenizer=org/judge;length={LENGTH}]"
    command = [sys.executable, "-m", "tsdfm_bench", "run", "--task", task, "--methods", "mdlm", "--steps", "4"]
    command += ["--samples", "16", "--scorers", "hf:org/judge", "--metrics", "gen-ppl,entropy", "--threads", "1", *more]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)


def test_a_run_from_hub_names_to_a_table(tmp_path, hub):
    done = run(tmp_path, hub, "--checkpoint", "hf:kuleshov-group/mdlm-owt", "--out", "out")
    assert done.returncode == 0, done.stderr
    assert "mdlm" in done.stdout
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert next(cell["checkpoint"] for cell in plan["cells"]) == "hf:kuleshov-group/mdlm-owt@" + "c" * 12
    summary = pq.read_table(tmp_path / "out" / "summary.parquet").to_pandas()
    judged = summary[(summary["scorer"] == "hf:org/judge") & (summary["metric"] == "gen_ppl")]
    assert {"mdlm", "real", "bigram"} <= set(judged["method"])
    assert judged["value"].between(1, 1e4).all()


def test_a_checkpoint_that_is_not_there_ends_before_any_work(tmp_path, hub):
    done = run(tmp_path, hub, "--checkpoint", "hf:nobody/nothing", "--out", "out")
    assert done.returncode == 2
    assert "hf download nobody/nothing" in done.stderr
    assert not (tmp_path / "out").exists()
