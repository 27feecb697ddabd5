"""Published weights from file to table: SDTT's by MDLM's sampler, DUO's by its plug-in; wrong files fail by name.

The files are synthetic, of the published names and shapes at reduced width, where a hub's cache would have them.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from typer.testing import CliRunner

from tsdfm_bench.cli import app
from tsdfm_bench.methods.public import names
from tsdfm_bench.results.schema import read_summary

V, LENGTH = 8, 16
REVISION = "baselines_kld_step_70000"
DUO = Path(__file__).parents[1] / "plugins" / "duo" / "tsdfm_bench_duo.py"
SDTT_CONFIG = {"parameterization": "subs", "time_conditioning": False, "model": {"length": LENGTH, "n_heads": 2}}
DUO_CONFIG = {"model_type": "DUO", "model_length": LENGTH, "n_heads": 2}


def tensors(rows: int, prefix: str, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = names.expected(names.Geometry("dit", rows, 16, 8, 1, 2))
    return {prefix + name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.fixture
def publish(tmp_path, monkeypatch):
    """Put weights into a hub cache; no network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("TSDFM_BENCH_OFFLINE", "1")

    def put(name: str, revision: str, weights: dict[str, torch.Tensor], config: dict) -> None:
        repository = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        commit = "c" * 40
        folder = repository / "snapshots" / commit
        folder.mkdir(parents=True)
        save_file(weights, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(config))
        (repository / "refs").mkdir()
        (repository / "refs" / revision).write_text(commit)

    return put


def run(out: Path, method: str, checkpoint: str):
    words = ["run", "--task", f"markov[vocab={V};length={LENGTH}]", "--methods", method, "--checkpoint", checkpoint]
    words += ["--plugin", str(DUO), "--steps", "4", "--samples", "16", "--scorers", "oracle", "--threads", "1"]
    return CliRunner().invoke(app, [*words, "--out", str(out)], prog_name="tsdfm-bench")


@pytest.mark.parametrize(
    ("method", "name", "revision", "rows", "prefix", "config"),
    [
        ("mdlm", "jdeschena/sdtt", REVISION, V + 1, "backbone.backbone.", SDTT_CONFIG),
        ("duo", "s-sahoo/duo", "main", V, "backbone.", DUO_CONFIG),
    ],
    ids=["sdtt", "duo"],
)
def test_from_file_to_table(tmp_path, publish, method, name, revision, rows, prefix, config):
    publish(name, revision, tensors(rows, prefix, 0), config)
    result = run(tmp_path / "out", method, f"hf:{name}@{revision}")
    assert result.exit_code == 0, result.output
    summary = read_summary(tmp_path / "out")
    row = summary[(summary["method"] == method) & (summary["metric"] == "excess_nll")].iloc[0]
    assert row["checkpoint"].startswith(f"hf:{name}@")
    assert row["n"] == 16
    assert 0 < row["value"] < 100  # random weights
    assert row["calls"] >= 1


@pytest.mark.parametrize("fault", ["missing", "extra", "wrong"])
@pytest.mark.parametrize("method", ["mdlm", "duo"])
def test_every_tensor_is_accounted_for(tmp_path, publish, method, fault):
    """One missing, one too many, one of another shape: named, and nothing is sampled from the rest."""
    name, rows, prefix, config = {
        "mdlm": ("jdeschena/sdtt", V + 1, "backbone.backbone.", SDTT_CONFIG),
        "duo": ("s-sahoo/duo", V, "backbone.", DUO_CONFIG),
    }[method]
    weights = tensors(rows, prefix, 0)
    key = f"{prefix}blocks.0.mlp.2.weight"
    if fault == "missing":
        del weights[key]
    elif fault == "extra":
        key = f"{prefix}blocks.0.mlp.4.weight"
        weights[key] = torch.zeros(3)
    else:
        weights[key] = torch.zeros(5, 7)
    publish(name, "main", weights, config)
    result = run(tmp_path / "out", method, f"hf:{name}")
    assert result.exit_code == 1
    assert key.removeprefix(prefix) in " ".join(result.output.split())
    (error,) = (tmp_path / "out").glob("cells/*/*/error.txt")
    assert key.removeprefix(prefix) in error.read_text()
    assert not list(error.parent.glob("samples-*.npz"))


def test_a_method_that_the_weights_are_not_of_is_told_before_any_work(tmp_path, publish):
    publish("jdeschena/sdtt", "main", tensors(V + 1, "backbone.backbone.", 0), SDTT_CONFIG)
    result = run(tmp_path / "out", "sedd", "hf:jdeschena/sdtt")
    assert result.exit_code == 2
    assert "holds weights of sdtt, asked for as sedd; choose --methods mdlm" in " ".join(result.output.split())
    assert not (tmp_path / "out").exists()
