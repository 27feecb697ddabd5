"""Public checkpoints: every published name and shape, container, average and convention, at reduced width.

The files are synthetic; their names and shapes are those of the published ones. That the networks are the published
ones is tested against a second implementation of the published forward pass, written here with the published names.
"""

from __future__ import annotations

import json
import math
import os
import sys
from argparse import Namespace
from collections import OrderedDict, defaultdict
from functools import partial
from pathlib import Path
from subprocess import Popen
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from tsdfm_bench.errors import CheckpointError, UsageError
from tsdfm_bench.methods import checkpoints
from tsdfm_bench.methods.dfm import DFM
from tsdfm_bench.methods.fsdfm import FSDFM
from tsdfm_bench.methods.mdlm import MDLM
from tsdfm_bench.methods.nets.causal import CausalConfig, CausalTransformer
from tsdfm_bench.methods.nets.dit import DiT, DiTConfig
from tsdfm_bench.methods.public import names
from tsdfm_bench.methods.public.containers import read_weights
from tsdfm_bench.methods.sedd import SEDD

V, D, C, BLOCKS, HEAD, LENGTH = 11, 16, 6, 2, 4, 7
DIT = names.Geometry("dit", V + 1, D, C, BLOCKS, D // HEAD)
CAUSAL = names.Geometry("causal", V + 1, D, 0, BLOCKS, D // HEAD)
DFM_NET = names.Geometry("flow", V, D, C, BLOCKS, D // HEAD)
STUDENT = names.Geometry("flow", V, D, C, BLOCKS, D // HEAD, step_aware=True)


def make(g: names.Geometry, seed: int = 0) -> OrderedDict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = OrderedDict(
        (name, torch.randn(shape, generator=generator) * 0.3) for name, shape in names.expected(g).items()
    )
    tensors[names.ROTARY] = 10000.0 ** (-torch.arange(0, HEAD, 2) / HEAD)
    return tensors


def prefixed(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def folder_of(path: Path, tensors: dict[str, torch.Tensor], config: dict | None = None, file="model.safetensors"):
    path.mkdir(parents=True, exist_ok=True)
    if file.endswith(".safetensors"):
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / file)
    else:
        torch.save(tensors, path / file)
    if config is not None:
        (path / "config.json").write_text(json.dumps(config))
    return path


def load(where: Path | str, method: str, source: str | None, vocab: int | None = V, trust: bool = False):
    found = checkpoints.find(method, source, (source,) if source else (), str(where), "text", None, trust)
    return checkpoints.load_network(found, "cpu", vocab)


# ------------------------------------------------------------------- the published forward pass, by published names


def norm(x, weight):
    return F.layer_norm(x, x.shape[-1:], weight, None, 1e-5)


def linear(p, name, x):
    return F.linear(x, p[name + ".weight"], p.get(name + ".bias"))


def embed_scalar(p, name, s):
    f = torch.exp(-math.log(10000.0) * torch.arange(128) / 128)
    features = torch.cat([torch.cos(s[:, None] * f), torch.sin(s[:, None] * f)], dim=-1)
    return linear(p, name + ".mlp.2", F.silu(linear(p, name + ".mlp.0", features)))


def rotate(x):
    """(batch, heads, length, head): half-split rotary embedding, written pair by pair."""
    half = x.shape[-1] // 2
    out = torch.empty_like(x)
    for position in range(x.shape[2]):
        for j in range(half):
            angle = torch.tensor(position * 10000.0 ** (-2 * j / x.shape[-1]))
            a, b = x[:, :, position, j], x[:, :, position, j + half]
            out[:, :, position, j] = a * angle.cos() - b * angle.sin()
            out[:, :, position, j + half] = b * angle.cos() + a * angle.sin()
    return out


def attend(q, k, v, heads, causal=False):
    b, n, d = q.shape
    q, k, v = (x.view(b, n, heads, d // heads).permute(0, 2, 1, 3) for x in (q, k, v))
    scores = rotate(q) @ rotate(k).transpose(-1, -2) / (d // heads) ** 0.5
    if causal:
        scores = scores.masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf)
    return (scores.softmax(-1) @ v).permute(0, 2, 1, 3).reshape(b, n, d)


def modulated(p, name, x, condition, weight, chunks):
    return [part[:, None] for part in linear(p, name + ".adaLN_modulation", condition).chunk(chunks, -1)]


def published_forward(p, g, tokens, conditions):
    """Logits of a modulated network; one condition per block and one for the output layer."""
    embedding = p["vocab_embed.weight" if g.layout == "flow" else "vocab_embed.embedding"]
    x = embedding[tokens]
    for k, c in enumerate(conditions[:-1]):
        b = f"blocks.{k}"
        parts = [part[:, None] for part in linear(p, b + ".adaLN_modulation", c).chunk(6, -1)]
        a = norm(x, p[b + ".norm1.weight"]) * (1 + parts[1]) + parts[0]
        if g.layout == "flow":
            q, key, v = (linear(p, f"{b}.{n}", a) for n in ("qw", "kw", "vw"))
        else:
            q, key, v = linear(p, b + ".attn_qkv", a).chunk(3, -1)
        x = x + parts[2] * linear(p, b + ".attn_out", attend(q, key, v, g.heads))
        m = norm(x, p[b + ".norm2.weight"]) * (1 + parts[4]) + parts[3]
        x = x + parts[5] * linear(p, b + ".mlp.2", F.gelu(linear(p, b + ".mlp.0", m), approximate="tanh"))
    shift, scale = (part[:, None] for part in linear(p, "output_layer.adaLN_modulation", conditions[-1]).chunk(2, -1))
    return linear(p, "output_layer.linear", norm(x, p["output_layer.norm_final.weight"]) * (1 + scale) + shift)


TOKENS = torch.arange(2 * LENGTH).view(2, LENGTH) * 5 % V
SCALAR = torch.tensor([0.3, 0.8])


def test_the_dit_layout_is_the_published_network(tmp_path):
    p = make(DIT)
    network, config = load(folder_of(tmp_path / "m", prefixed(p, "backbone."), {"model_type": "mdlm"}), "mdlm", "mask")
    condition = F.silu(embed_scalar(p, "sigma_map", SCALAR))
    expected = published_forward(p, DIT, TOKENS, [condition] * (BLOCKS + 1))
    with torch.no_grad():
        torch.testing.assert_close(network(TOKENS, SCALAR), expected, rtol=1e-4, atol=1e-4)
    assert config["parameters"] == sum(p[name].numel() for name in names.expected(DIT))
    assert not network.training


def test_the_step_aware_layout_is_the_published_network(tmp_path):
    p = make(STUDENT)
    network, config = load(folder_of(tmp_path / "s", p), "fsdfm", "uniform")
    h = torch.tensor([0.25, 0.5])
    joint = torch.cat([embed_scalar(p, "time_embedding", SCALAR), embed_scalar(p, "dt_embedding", h)], -1)
    joint = F.silu(linear(p, "time_condition_fuser", joint))
    layers = [f"blocks.{k}.condition_fuser" for k in range(BLOCKS)] + ["output_layer.condition_fuser"]
    expected = published_forward(p, STUDENT, TOKENS, [F.silu(linear(p, name, joint)) for name in layers])
    with torch.no_grad():
        torch.testing.assert_close(network(TOKENS, SCALAR, h), expected, rtol=1e-4, atol=1e-4)
    assert config["network"]["step_aware"]


def test_the_flow_layout_without_steps_is_the_published_network(tmp_path):
    p = make(DFM_NET)
    network, _ = load(folder_of(tmp_path / "d", p), "dfm", "uniform")
    expected = published_forward(p, DFM_NET, TOKENS, [F.silu(embed_scalar(p, "time_embedding", SCALAR))] * (BLOCKS + 1))
    with torch.no_grad():
        torch.testing.assert_close(network(TOKENS, SCALAR), expected, rtol=1e-4, atol=1e-4)


def test_the_autoregressive_layout_is_the_published_network_without_its_mask_row(tmp_path):
    p = make(CAUSAL)
    network, config = load(folder_of(tmp_path / "a", prefixed(p, "backbone.")), "ar", None)
    x = p["vocab_embed.embedding"][TOKENS]
    for k in range(BLOCKS):
        b = f"blocks.{k}"
        q, key, v = linear(p, b + ".attn_qkv", norm(x, p[b + ".norm1.weight"])).chunk(3, -1)
        x = x + linear(p, b + ".attn_out", attend(q, key, v, CAUSAL.heads, causal=True))
        m = F.gelu(linear(p, b + ".mlp.0", norm(x, p[b + ".norm2.weight"])), approximate="tanh")
        x = x + linear(p, b + ".mlp.2", m)
    expected = linear(p, "output_layer.linear", norm(x, p["output_layer.norm_final.weight"]))[..., :V]
    with torch.no_grad():
        torch.testing.assert_close(network(TOKENS), expected, rtol=1e-4, atol=1e-4)
    assert config["network"]["bos_id"] == V - 1  # end-of-text is the last real token, as in GPT-2


# ------------------------------------------------------------------------------------------------- published sizes


@pytest.mark.parametrize(
    ("geometry", "parameters", "tensors"),
    [
        (names.Geometry("dit", 50258, 768, 128, 12, 12), 169_627_218, None),
        (names.Geometry("dit", 50258, 512, 128, 8, 8), 80_061_266, None),
        (names.Geometry("dit", 50258, 1024, 128, 24, 16), 424_477_010, None),
        (names.Geometry("causal", 50258, 768, 0, 12, 12), 162_246_482, None),
        (names.Geometry("flow", 50257, 768, 128, 12, 12), 169_625_681, None),
        (names.Geometry("flow", 50257, 768, 128, 12, 12, True), 170_168_529, None),
        (names.Geometry("flow", 50257, 2048, 256, 21, 32), 1_330_673_233, 263),
        (names.Geometry("flow", 50257, 2048, 256, 21, 32, True), 1_333_956_689, 313),
        (names.Geometry("flow", 50257, 2048, 256, 28, 32, True), 1_709_403_985, None),
    ],
)
def test_published_sizes(geometry, parameters, tensors):
    """The counts the papers' code gives, for the published names and for the network each becomes."""
    shapes = names.expected(geometry)
    assert sum(math.prod(shape) for shape in shapes.values()) == parameters
    if tensors:  # of the file, which has the rotary table too
        assert len(shapes) + 1 == tensors
    with torch.device("meta"):
        network = (
            CausalTransformer(CausalConfig(geometry.rows, 1024, width=geometry.width, blocks=geometry.blocks))
            if geometry.layout == "causal"
            else DiT(
                DiTConfig(
                    geometry.rows,
                    geometry.rows,
                    1024,
                    width=geometry.width,
                    blocks=geometry.blocks,
                    heads=geometry.heads,
                    condition=geometry.condition,
                    step_aware=geometry.step_aware,
                )
            )
        )
    assert sum(p.numel() for p in network.parameters()) == parameters


# --------------------------------------------------------------------------------------------- every tensor counts


@pytest.mark.parametrize("geometry", [DIT, CAUSAL, DFM_NET, STUDENT], ids=lambda g: f"{g.layout}{g.step_aware}")
def test_missing_extra_and_mis_shaped_tensors_are_named(geometry):
    for name in names.expected(geometry):
        tensors = make(geometry)
        tensors["blocks.0.stranger"] = torch.zeros(1)
        shape = tensors[name].shape
        del tensors[name]
        with pytest.raises(CheckpointError, match=r"f: .*is not a complete|not a complete") as caught:
            names.check(tensors, geometry, "f")
        assert f"missing {name}" in str(caught.value)
        assert "unexpected blocks.0.stranger" in str(caught.value)
        tensors = make(geometry)
        tensors[name] = torch.zeros(*shape[:-1], shape[-1] + 1)
        with pytest.raises(CheckpointError) as caught:
            names.check(tensors, geometry, "f")
        assert f"{name} has shape" in str(caught.value)


def test_incomplete_files_are_refused_through_the_loader(tmp_path):
    tensors = make(STUDENT)
    del tensors["blocks.1.condition_fuser.bias"]
    with pytest.raises(CheckpointError, match=r"missing blocks\.1\.condition_fuser\.bias"):
        load(folder_of(tmp_path / "a", tensors), "fsdfm", "uniform")
    tensors = {name: t for name, t in make(DIT).items() if "embed" not in name and "linear" not in name}
    with pytest.raises(CheckpointError, match="incomplete"):
        load(folder_of(tmp_path / "b", tensors), "mdlm", "mask")
    tensors = {name: t for name, t in make(DIT).items() if not name.startswith("blocks.0")}
    with pytest.raises(CheckpointError, match=r"missing blocks\.0\."):
        load(folder_of(tmp_path / "c", tensors), "mdlm", "mask")


@pytest.mark.parametrize(
    ("geometry", "name", "tensor", "message"),
    [
        (DIT, "blocks.3000000.norm1.weight", torch.zeros(D), r"missing blocks\.2\.\*, and it has blocks\.3000000"),
        (
            DIT,
            "sigma_map.mlp.0.weight",
            torch.tensor(1.0),
            r"sigma_map\.mlp\.0\.weight has shape \(\), expected a matrix",
        ),
        (DIT, "blocks.0.adaLN_modulation.weight", torch.tensor(1.0), r"has shape \(\), expected a matrix"),
        (DIT, "vocab_embed.embedding", torch.zeros(3), r"vocab_embed\.embedding has shape \(3,\), expected a matrix"),
        (STUDENT, "blocks.0.qw.weight", None, r"missing blocks\.0\.qw\.weight$"),
        (STUDENT, "vocab_embed.weight", None, r"missing vocab_embed\.weight$"),
        (DIT, "blocks.1.mlp.0.weight", torch.ones(4 * D, D).char(), r"blocks\.1\.mlp\.0\.weight is int8 \(quantised"),
        (DIT, "blocks.1.mlp.0.weight", torch.ones(4 * D, D).to(torch.float8_e4m3fn), "is float8_e4m3fn"),
    ],
)
def test_one_odd_tensor_is_named(tmp_path, geometry, name, tensor, message):
    tensors = make(geometry) | ({name: tensor} if tensor is not None else {})
    if tensor is None:
        del tensors[name]
    flow = geometry is STUDENT
    folder = folder_of(tmp_path / "m", tensors, None if flow else {"model_type": "mdlm", "n_heads": 4})
    with pytest.raises(CheckpointError, match=message) as caught:
        load(folder, *(("fsdfm", "uniform") if flow else ("mdlm", "mask")))
    assert str(folder) in str(caught.value)


def test_files_with_next_to_nothing_in_them_are_explained(tmp_path):
    embedding = {"vocab_embed.embedding": torch.zeros(V + 1, D)}
    with pytest.raises(CheckpointError, match=r"missing blocks\.0\.\*"):
        load(folder_of(tmp_path / "a", embedding, {"model_type": "mdlm"}), "mdlm", "mask")
    shadow = {"model": embedding, "ema": {"shadow_params": [torch.zeros(V + 1, D)]}}
    with pytest.raises(CheckpointError, match=r"x\.pth is not a complete network: missing blocks\.0\.\*"):
        load(folder_of(tmp_path / "b", shadow, None, "x.pth"), "mdlm", "mask", trust=True)
    for content in ({0: torch.zeros(2)}, {"model": {0: torch.zeros(2)}}):
        with pytest.raises(CheckpointError, match=r"x\.pth holds tensors without names: one is filed under 0"):
            load(folder_of(tmp_path / "c", content, None, "x.pth"), "mdlm", "mask", trust=True)


def test_a_rotary_table_may_be_absent_but_not_another_one(tmp_path):
    tensors = make(DIT)
    del tensors[names.ROTARY]
    network, _ = load(folder_of(tmp_path / "a", tensors, {"model_type": "mdlm", "n_heads": 4}), "mdlm", "mask")
    assert network.config.heads == 4
    tensors[names.ROTARY] = 500000.0 ** (-torch.arange(0, HEAD, 2) / HEAD)
    with pytest.raises(CheckpointError, match="rotary table of base 10000"):
        load(folder_of(tmp_path / "b", tensors), "mdlm", "mask")


def test_another_architecture_is_refused_by_name(tmp_path):
    stranger = {"model.layers.0.self_attn.q_proj.weight": torch.zeros(4, 4)}
    with pytest.raises(CheckpointError, match=r"not known here; it has model\.layers\.0.*Known: .*MDLM"):
        load(folder_of(tmp_path / "a", stranger), "mdlm", "mask")


@pytest.mark.parametrize(
    ("geometry", "config", "method", "source", "message"),
    [
        (DIT, {"model_type": "mdlm", "vocab_size": V}, "mdlm", "mask", "vocab_size 11, its tensors say 12"),
        (DIT, {"model_type": "mdlm", "hidden_dim": 32}, "mdlm", "mask", "hidden_dim 32, its tensors say 16"),
        (DIT, {"model_type": "mdlm", "n_blocks": 3}, "mdlm", "mask", "n_blocks 3, its tensors say 2"),
        (DIT, {"parameterization": "subs", "model": {"n_blocks": 3}}, "mdlm", "mask", "n_blocks 3, its tensors say 2"),
        (DIT, {"graph": {"type": "absorb"}, "tokens": V + 1}, "sedd", "mask", "tokens 12, its tensors say 11"),
        (DIT, {"graph": {"type": "uniform"}, "tokens": V}, "sedd", "uniform", "tokens 11, its tensors say 12"),
        (
            DIT,
            {"graph": {"type": "absorb"}, "model": {"hidden_size": 8}},
            "sedd",
            "mask",
            "hidden_size 8, its tensors.*",
        ),
        (DFM_NET, {"model_type": "dfm", "hidden_size": 8}, "dfm", "uniform", "hidden_size 8, its tensors say 16"),
    ],
)
def test_sizes_in_a_configuration_are_those_of_the_tensors(tmp_path, geometry, config, method, source, message):
    """A file that lost its last block is a complete network by its tensors alone."""
    folder = folder_of(tmp_path / "m", make(geometry), config)
    with pytest.raises(
        CheckpointError, match=rf"config\.json says (model\.)?{message}; they are not of one model"
    ) as caught:
        load(folder, method, source, None)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("config", "method", "source"),
    [
        ({"model_type": "mdlm", "vocab_size": V + 1, "hidden_dim": D, "n_blocks": BLOCKS}, "mdlm", "mask"),
        ({"graph": {"type": "absorb"}, "tokens": V, "model": {"hidden_size": D, "n_blocks": BLOCKS}}, "sedd", "mask"),
    ],
)
def test_published_configurations_fit_their_tensors(tmp_path, config, method, source):
    assert load(folder_of(tmp_path / "m", make(DIT), config), method, source)[1]["network"]["width"] == D


# -------------------------------------------------------------------------------------------- containers, averages


@pytest.mark.parametrize(
    "prefix", ["", "backbone.", "backbone.backbone.", "module.", "_orig_mod.", "backbone._orig_mod."]
)
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin", "weights.pt"])
def test_prefixes_and_plain_files(tmp_path, prefix, file):
    tensors = make(DIT)
    folder = folder_of(tmp_path / "m", prefixed(tensors, prefix), {"model_type": "mdlm"}, file)
    network, config = load(folder, "mdlm", "mask", trust=True)
    torch.testing.assert_close(network.embedding.weight, tensors["vocab_embed.embedding"])
    assert config["weights"] == "model"


def test_two_tensors_of_one_name_are_refused(tmp_path):
    tensors = make(DIT) | prefixed(make(DIT), "module.")
    with pytest.raises(CheckpointError, match="two tensors called"):
        load(folder_of(tmp_path / "m", tensors), "mdlm", "mask")


PARAMETER_ORDER = [
    "vocab_embed.embedding",
    *(f"sigma_map.mlp.{part}" for part in ("0.weight", "0.bias", "2.weight", "2.bias")),
    *(
        f"blocks.{k}.{part}"
        for k in range(BLOCKS)
        for part in (
            "norm1.weight", "attn_qkv.weight", "attn_out.weight", "norm2.weight", "mlp.0.weight", "mlp.0.bias",
            "mlp.2.weight", "mlp.2.bias", "adaLN_modulation.weight", "adaLN_modulation.bias",
        )
    ),
    *(
        f"output_layer.{part}"
        for part in (
            "norm_final.weight", "linear.weight", "linear.bias", "adaLN_modulation.weight", "adaLN_modulation.bias",
        )
    ),
]  # fmt: skip


def shadow_of(average: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Averages without their names, in the order that MDLM's and SEDD's networks list their parameters in."""
    return [average[name] for name in PARAMETER_ORDER if name in average]


@pytest.mark.parametrize(("geometry", "method", "source"), [(DIT, "mdlm", "mask"), (CAUSAL, "ar", None)])
def test_averages_are_listed_in_the_published_order(tmp_path, geometry, method, source):
    average = make(geometry, seed=1)
    named, _ = load(folder_of(tmp_path / "a", average), method, source)
    content = {"state_dict": make(geometry), "ema": {"shadow_params": shadow_of(average)}}
    listed, _ = load(folder_of(tmp_path / "b", content, None, "best.ckpt"), method, source, trust=True)
    for name, tensor in named.state_dict().items():
        assert torch.equal(listed.state_dict()[name], tensor), name


def test_lightning_files_give_the_average(tmp_path):
    """Settings of other programs beside the tensors do not stop the reading, and nothing of them is run."""
    tensors, average = make(DIT), make(DIT, seed=1)
    shadow = shadow_of(average)
    content = {
        "state_dict": prefixed(tensors, "backbone._orig_mod."),
        "ema": {"decay": 0.9999, "num_updates": 3, "shadow_params": shadow},
        "hyper_parameters": {"config": Calling(Path, "a")},
        "optimizer_states": [],
    }
    folder = folder_of(tmp_path / "m", content, None, "best.ckpt")
    for choice, expected in (("", average), ("#ema", average), ("#model", tensors)):
        network, config = load(f"{folder}{choice}", "mdlm", "mask", trust=True)
        torch.testing.assert_close(network.embedding.weight, expected["vocab_embed.embedding"])
        torch.testing.assert_close(network.output.adaln.bias, expected["output_layer.adaLN_modulation.bias"])
        assert config["weights"] == (choice.removeprefix("#") or "ema")
    content["ema"]["shadow_params"] = shadow[:-1]
    with pytest.raises(CheckpointError, match=r"\d+ averaged tensors for \d+ parameters"):
        load(folder_of(tmp_path / "n", content, None, "best.ckpt"), "mdlm", "mask", trust=True)
    content["ema"]["shadow_params"] = [shadow[1], shadow[0], *shadow[2:]]
    with pytest.raises(CheckpointError, match=r"the average of vocab_embed\.embedding has shape"):
        load(folder_of(tmp_path / "o", content, None, "best.ckpt"), "mdlm", "mask", trust=True)


def foreign(module: str, name: str, base: type = object) -> type:
    """A class as another program has it, which says so when anything of it runs."""

    def run(self, *_state):
        raise AssertionError(f"{module}.{name} ran")

    return type(name, (base,), {"__module__": module, "__qualname__": name, "__setstate__": run})


@pytest.fixture
def lightning_settings(monkeypatch):
    """What MDLM's Lightning module keeps beside its tensors, in the classes' own modules."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    classes = {}
    for module, name, base in (
        ("omegaconf.dictconfig", "DictConfig", object),
        ("omegaconf.listconfig", "ListConfig", object),
        ("omegaconf.base", "ContainerMetadata", object),
        ("omegaconf.nodes", "AnyNode", object),
        ("lightning.fabric.utilities.data", "AttributeDict", dict),
    ):
        found = sys.modules.get(module) or ModuleType(module)
        monkeypatch.setitem(sys.modules, module, found)
        top = module.partition(".")[0]
        monkeypatch.setitem(sys.modules, top, sys.modules.get(top) or ModuleType(top))
        classes[name] = foreign(module, name, base)
        monkeypatch.setattr(found, name, classes[name], raising=False)

    def made(name: str, **state: object) -> object:
        thing = classes[name]()
        thing.__dict__.update(state)
        return thing

    cache = defaultdict(dict)
    cache["oc.env"]["HOME"] = "/"
    about = made("ContainerMetadata", ref_type=Any, object_type=dict, key_type=Any, flags={"struct": True})
    about.resolver_cache = cache
    values = made("ListConfig", _content=[made("AnyNode", _val=1)], _metadata=made("ContainerMetadata", key_type=int))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab={"a": 0}, merges=[])))
    return {
        "hparams_type": classes["DictConfig"],
        "hyper_parameters": classes["AttributeDict"](
            config=made("DictConfig", _metadata=about, _content={"sizes": values}), tokenizer=tokenizer
        ),
        "arguments": Namespace(steps=(1, 2)),
        "path": Path("a"),
        "score": np.float64(1.0),
    }


def test_settings_of_lightning_files_are_passed_over(tmp_path, lightning_settings):
    """A configuration, a tokenizer and command-line arguments: stand-ins take their place, none of their code runs."""
    average = make(DIT, seed=1)
    shadow = shadow_of(average)
    content = {"state_dict": prefixed(make(DIT), "backbone."), "ema": {"shadow_params": shadow}, **lightning_settings}
    folder = folder_of(tmp_path / "m", content, None, "best.ckpt")
    network, _ = load(folder, "mdlm", "mask", trust=True)
    torch.testing.assert_close(network.embedding.weight, average["vocab_embed.embedding"])
    with pytest.raises(CheckpointError, match="--trust-pickle"):
        load(folder, "mdlm", "mask")


@pytest.mark.parametrize("called", [os.system, eval, exec, getattr, setattr, open, __import__, partial, Popen])
def test_whatever_could_act_is_refused_among_settings(tmp_path, lightning_settings, called):
    content = {"state_dict": make(DIT), **lightning_settings, "x": Calling(called, "touch/a/file")}
    folder = folder_of(tmp_path / "m", content, None, "best.ckpt")
    with pytest.raises(CheckpointError, match=rf"asks for \w+\.{called.__name__}, which is neither a tensor nor"):
        load(folder, "mdlm", "mask", trust=True)


class Calling:
    """Pickled as a call."""

    def __init__(self, called, *arguments):
        self.call = called, arguments

    def __reduce__(self):
        return self.call


def test_pickles_need_trust_and_run_nothing_even_then(tmp_path, capsys):
    folder = folder_of(
        tmp_path / "m",
        {"model": make(DFM_NET), "x": Calling(print, "a program ran while a checkpoint was read")},
        None,
        "checkpoint.pth",
    )
    with pytest.raises(CheckpointError, match="--trust-pickle"):
        load(folder, "dfm", "uniform")
    with pytest.raises(CheckpointError, match=r"asks for builtins\.print"):
        load(folder, "dfm", "uniform", trust=True)
    assert "a program ran" not in capsys.readouterr().out
    (folder / "checkpoint.pth").write_bytes((folder / "checkpoint.pth").read_bytes()[:200])
    with pytest.raises(CheckpointError, match="weights_only=True"):
        load(folder, "dfm", "uniform", trust=True)


def test_score_entropy_training_files(tmp_path):
    """SEDD keeps {optimizer, model, ema, step}; its noise module has an empty parameter that shows up in both."""
    tensors, average = make(DIT), make(DIT, seed=1)
    shadow = [*shadow_of(average), torch.zeros(1)]
    content = {"model": tensors | {"noise.empty": torch.zeros(1)}, "ema": {"shadow_params": shadow}, "step": 7}
    folder = folder_of(tmp_path / "m", content, {"graph": {"type": "absorb"}, "tokens": V}, "checkpoint.pth")
    network, config = load(folder, "sedd", "mask", trust=True)
    torch.testing.assert_close(network.embedding.weight, average["vocab_embed.embedding"])
    assert config["parameterisation"] == "score"
    assert config["scale_by_sigma"] is True


@pytest.mark.parametrize(
    ("student_file", "dfm_file"),
    [("FS_DFM_checkpoint.pth", "DFM_checkpoint.pth"), ("checkpoint_step_190000.pth", "checkpoint.pth")],
)
def test_fsdfm_files_offer_student_average_and_teacher(tmp_path, student_file, dfm_file):
    nets = {"student": make(STUDENT), "ema": make(STUDENT, 1)}
    content = {
        "student_model": nets["student"],
        "student_ema_model": nets["ema"],
        "teacher_model": prefixed(make(DFM_NET, 2), "_orig_mod."),
        "student_optimizer": {"state": {}, "param_groups": []},
        "step": 190000,
    }
    folder = folder_of(tmp_path / "m", content, None, student_file)
    torch.save({"model": make(DFM_NET, 3), "step": 1}, folder / dfm_file)
    identities = set()
    for choice, seed in (("", "student"), ("#student", "student"), ("#ema", "ema")):
        network, config = load(f"{folder}{choice}", "fsdfm", "uniform", trust=True)
        torch.testing.assert_close(network.embedding.weight, nets[seed]["vocab_embed.weight"])
        assert config["weights"] == seed
        found = checkpoints.find("fsdfm", "uniform", ("uniform",), f"{folder}{choice}", None, None, True)
        identities.add(checkpoints.identify(found).weights)
    assert len(identities) == 3  # which network was taken is part of a cell's identity
    teacher, _ = load(f"{folder / student_file}#teacher", "dfm", "uniform", trust=True)
    torch.testing.assert_close(teacher.embedding.weight, make(DFM_NET, 2)["vocab_embed.weight"])
    dfm, _ = load(folder, "dfm", "uniform", trust=True)  # each method finds its own file of the repository
    torch.testing.assert_close(dfm.embedding.weight, make(DFM_NET, 3)["vocab_embed.weight"])
    with pytest.raises(CheckpointError, match="has no 'model' weights; it has: #student, #ema, #teacher"):
        load(f"{folder}#model", "fsdfm", "uniform", trust=True)
    with pytest.raises(UsageError, match="known: #model, #student"):
        load(f"{folder}#average", "fsdfm", "uniform", trust=True)


def test_sharded_safetensors(tmp_path):
    tensors = make(DIT)
    parts = {"a.safetensors": dict(list(tensors.items())[:9]), "b.safetensors": dict(list(tensors.items())[9:])}
    for name, part in parts.items():
        folder_of(tmp_path / "m", part, {"model_type": "mdlm"}, name)
    index = {"weight_map": {key: name for name, part in parts.items() for key in part}}
    (tmp_path / "m" / "model.safetensors.index.json").write_text(json.dumps(index))
    network, _ = load(tmp_path / "m", "mdlm", "mask")
    torch.testing.assert_close(network.embedding.weight, tensors["vocab_embed.embedding"])
    (tmp_path / "m" / "b.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"incomplete: b\.safetensors missing"):
        load(tmp_path / "m", "mdlm", "mask")
    index["weight_map"]["x"] = "../../secret.safetensors"
    (tmp_path / "m" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="outside of its folder"):
        load(tmp_path / "m", "mdlm", "mask")


def test_several_files_must_be_told_apart(tmp_path):
    folder_of(tmp_path / "m", make(DIT), {"model_type": "mdlm"}, "a.safetensors")
    folder_of(tmp_path / "m", make(DIT), None, "b.safetensors")
    with pytest.raises(CheckpointError, match=r"several weight files \(a\.safetensors, b\.safetensors\)"):
        load(tmp_path / "m", "mdlm", "mask")
    load(tmp_path / "m" / "a.safetensors", "mdlm", "mask")


# --------------------------------------------------------------------------------------------------- conventions


def test_conventions_of_each_family(tmp_path):
    mdlm = folder_of(tmp_path / "mdlm", make(DIT), {"model_type": "mdlm", "time_conditioning": False})
    _, config = load(mdlm, "mdlm", "mask")
    assert not config["time_conditioning"]
    assert config["network"]["vocab_size"] == V
    assert MDLM.from_network(DiT(DiTConfig(**config["network"])), config, "mask", "cpu", {}).denoiser.outputs == V + 1
    published = {
        "graph": {"type": "absorb"},
        "noise": {"type": "loglinear"},
        "model": {"scale_by_sigma": True, "length": 5},
    }
    sedd = folder_of(tmp_path / "sedd", make(DIT), published)
    _, config = load(sedd, "sedd", "mask")
    assert config["network"]["length"] == 5
    assert (
        SEDD.from_network(DiT(DiTConfig(**config["network"])), config, "mask", "cpu", {}).denoiser.kind == "log_score"
    )
    uniform = {"graph": {"type": "uniform"}, "noise": {"type": "geometric", "sigma_min": 1e-3, "sigma_max": 9}}
    _, config = load(folder_of(tmp_path / "u", make(DIT), uniform | {"model": {}}), "sedd", "uniform", V + 1)
    assert config["schedule"] == {"name": "geometric", "sigma_min": 1e-3, "sigma_max": 9.0}
    assert config["scale_by_sigma"] is False
    stated = {"model_type": "mdlm", "noise": {"type": "log-linear", "eps": 0.01}, "time_conditioning": True}
    _, config = load(folder_of(tmp_path / "subs", make(DIT), stated), "mdlm", "mask")
    assert config["schedule"] == {"name": "log-linear", "eps": 0.01}
    assert config["time_conditioning"] is True
    cosine = {"graph": {"type": "absorb"}, "noise": {"type": "cosine"}}
    assert load(folder_of(tmp_path / "cos", make(DIT), cosine), "sedd", "mask")[1]["schedule"] == "cosine"
    _, config = load(folder_of(tmp_path / "duo", make(DIT), {"model_type": "duo"}), "duo", "uniform", V + 1)
    assert config["time_conditioning"] is True
    assert config["network"]["outputs"] == config["network"]["vocab_size"] == V + 1  # the added token is sampled


@pytest.mark.parametrize(
    ("config", "method", "source", "vocab", "message"),
    [
        ({"model_type": "mdlm"}, "sedd", "mask", V, "holds weights of mdlm, asked for as sedd; choose --methods mdlm"),
        ({"model_type": "duo"}, "mdlm", "mask", V, "choose --methods duo, a plug-in: pip install tests/plugins/duo in"),
        ({"model_type": "bd3lm"}, "mdlm", "mask", V, "block diffusion"),
        ({"graph": {"type": "absorb"}}, "sedd", "uniform", V, "choose --sources mask"),
        ({"model_type": "mdlm"}, "mdlm", "mask", 99, r"know 11 tokens, the task has 99"),
        ({"model_type": "mdlm", "parameterization": "d3pm"}, "mdlm", "mask", V, "as D3PM does"),
        (
            {"model_type": "mdlm", "noise": {"type": "polylinear"}},
            "mdlm",
            "mask",
            V,
            "noise 'polylinear'.*known: loglinear, geometric, cosine",
        ),
        ({"auto_map": {}}, "dfm", "mask", V, "nothing beside it says which.*duo, a plug-in: pip install"),
    ],
)
def test_wrong_requests_say_what_fits(tmp_path, config, method, source, vocab, message):
    with pytest.raises(CheckpointError, match=message):
        load(folder_of(tmp_path / "m", make(DIT), config), method, source, vocab)


def test_weights_of_another_family_are_refused_before_they_are_loaded(tmp_path):
    """By the names of the tensors and what lies beside them: when a run is planned, not in its first cell."""
    mdlm = folder_of(tmp_path / "m", prefixed(make(DIT), "backbone."), {"model_type": "mdlm"})
    student = folder_of(tmp_path / "s", make(STUDENT))
    average = folder_of(tmp_path / "p", {"model": make(DFM_NET)}, None, "checkpoint.pth")

    def identify(folder: Path, method: str, source: str, trust: bool = False) -> str:
        found = checkpoints.find(method, source, (source,), str(folder), "text", None, trust)
        return checkpoints.identify(found).weights

    assert identify(mdlm, "mdlm", "mask").startswith("sha256:")
    assert identify(student, "tsdfm", "uniform").startswith("sha256:")
    assert identify(average, "dfm", "uniform", trust=True).startswith("sha256:")
    with pytest.raises(CheckpointError, match="holds weights of mdlm, asked for as sedd; choose --methods mdlm"):
        identify(mdlm, "sedd", "mask")
    with pytest.raises(CheckpointError, match="holds weights of fsdfm, asked for as dfm; choose --methods fsdfm"):
        identify(student, "dfm", "uniform")
    with pytest.raises(CheckpointError, match="--trust-pickle"):
        identify(average, "dfm", "uniform")
    (mdlm / "model.safetensors").write_bytes((mdlm / "model.safetensors").read_bytes()[:-9])
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        identify(mdlm, "mdlm", "mask")


def test_a_path_may_have_the_mark_of_a_choice_in_it(tmp_path):
    folder = folder_of(tmp_path / "run#1", make(DIT), {"model_type": "mdlm"})
    for typed in (folder, folder / "model.safetensors", f"{folder}#model"):
        assert load(typed, "mdlm", "mask")[1]["published"] == "mdlm"
    with pytest.raises(UsageError, match="'#2' chooses no network"):
        load(tmp_path / "run#2", "mdlm", "mask")


def test_flow_weights_say_their_source_and_step_size(tmp_path):
    plain = folder_of(tmp_path / "d", make(DFM_NET))
    with pytest.raises(CheckpointError, match="holds weights of dfm, asked for as fsdfm"):
        load(plain, "fsdfm", "uniform")
    with pytest.raises(CheckpointError, match="choose --sources uniform"):
        load(plain, "dfm", "mask")
    masked = names.Geometry("flow", V + 1, D, C, BLOCKS, D // HEAD)
    with pytest.raises(CheckpointError, match="choose --sources mask"):
        load(folder_of(tmp_path / "e", make(masked)), "dfm", "uniform")
    assert load(tmp_path / "e", "dfm", "mask")[1]["network"]["outputs"] == V + 1
    assert load(folder_of(tmp_path / "s", make(STUDENT)), "tsdfm", "uniform")[1]["method"] == "tsdfm"


def test_methods_load_and_sample_from_public_weights(tmp_path):
    """The whole way of a plan and a worker: identity without torch arrays, then samples."""
    from tsdfm_bench.api import SampleRequest
    from tsdfm_bench.rng import Streams

    request = SimpleNamespace(streams=Streams.of(0, "x", 3), length=LENGTH, steps=4)
    cases = [
        (MDLM, "mask", make(DIT), {"model_type": "mdlm"}),
        (SEDD, "mask", make(DIT), {"graph": {"type": "absorb"}}),
        (DFM, "uniform", make(DFM_NET), None),
        (FSDFM, "uniform", make(STUDENT), None),
    ]
    for method, source, tensors, config in cases:
        folder = folder_of(tmp_path / method.info.name, tensors, config)
        params = {"checkpoint": str(folder), "task": "text", "vocab_size": V, "source": source, "length": LENGTH}
        identity = method.identify(params)
        assert identity.weights.startswith("sha256:")
        batch = method.load(params, "cpu").sample(SampleRequest(request.streams, LENGTH, 4, source=source))
        assert batch.tokens.shape == (3, LENGTH)
        assert int(batch.tokens.max()) < V


def test_published_weights_are_sampled_at_the_times_they_were_trained_at(tmp_path):
    """DFM's generalised KL ends at 1 - 1e-3: the step of 1,024 that would begin later is not made."""
    from tsdfm_bench.api import SampleRequest
    from tsdfm_bench.rng import Streams

    request = SampleRequest(Streams.of(0, "x", 1), LENGTH, 1024, source="uniform", trace=True)
    for method, tensors, states in ((DFM, make(DFM_NET), 1023), (FSDFM, make(STUDENT), 1024)):
        folder = folder_of(tmp_path / method.info.name, tensors)
        params = {"checkpoint": str(folder), "task": "text", "vocab_size": V, "source": "uniform", "length": LENGTH}
        assert method.load(params, "cpu").sample(request).trace.shape[1] == states


# -------------------------------------------------------------------------------------------------------- the hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A local hub cache that stands in for the hub, and no network."""
    from huggingface_hub import constants

    root = tmp_path / "hub"
    root.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(root))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("TSDFM_BENCH_OFFLINE", "1")

    def add(name: str, commit: str, refs: list[str], tensors, config=None, file="model.safetensors"):
        repository = root / f"models--{name.replace('/', '--')}"
        folder_of(repository / "snapshots" / commit, tensors, config, file)
        for ref in refs:
            (repository / "refs").mkdir(exist_ok=True)
            (repository / "refs" / ref).write_text(commit)

    return add


def test_hub_names_and_revisions_from_the_local_cache(hub, tmp_path):
    hub("kuleshov-group/mdlm-owt", "1" * 40, ["main"], prefixed(make(DIT), "backbone."), {"model_type": "mdlm"})
    network, config = load("hf:kuleshov-group/mdlm-owt", "mdlm", "mask")
    assert config["published"] == "mdlm"
    torch.testing.assert_close(network.embedding.weight, make(DIT)["vocab_embed.embedding"])
    name = checkpoints.find("mdlm", "mask", ("mask",), "hf:kuleshov-group/mdlm-owt", None).name
    assert name == "hf:kuleshov-group/mdlm-owt@111111111111"  # the row names the commit
    for step, seed in (("a", 1), ("b", 2)):  # one revision per model
        tensors = prefixed(make(DIT, seed), "backbone.backbone.")
        hub("jdeschena/sdtt", step * 40, [f"baselines_kld_step_{seed}"], tensors, {"parameterization": "subs"})
    network, config = load("hf:jdeschena/sdtt@baselines_kld_step_2", "mdlm", "mask")
    assert config["published"] == "sdtt"
    torch.testing.assert_close(network.embedding.weight, make(DIT, 2)["vocab_embed.embedding"])
    hub("s-sahoo/duo", "2" * 40, ["main"], make(DIT), {"model_type": "DUO"})
    with pytest.raises(CheckpointError, match=r"know 12 tokens, the task has 11"):
        load("hf:s-sahoo/duo", "duo", "uniform")


def test_hub_pickles_by_file_and_network(hub):
    content = {"student_model": make(STUDENT), "student_ema_model": make(STUDENT, 1)}
    hub("aminr8/FS-DFM", "3" * 40, ["main"], content, None, "FS_DFM_checkpoint.pth")
    hub("aminr8/FS-DFM", "3" * 40, ["main"], {"model": make(DFM_NET)}, None, "DFM_checkpoint.pth")
    network, _ = load("hf:aminr8/FS-DFM#ema", "fsdfm", "uniform", trust=True)
    torch.testing.assert_close(network.embedding.weight, make(STUDENT, 1)["vocab_embed.weight"])
    load("hf:aminr8/FS-DFM:DFM_checkpoint.pth", "dfm", "uniform", trust=True)
    with pytest.raises(CheckpointError, match="--trust-pickle"):
        load("hf:aminr8/FS-DFM", "fsdfm", "uniform")


@pytest.mark.parametrize(("first", "second"), [("dfm", "fsdfm"), ("fsdfm", "dfm"), ("fsdfm", "tsdfm")])
def test_a_cached_file_of_another_method_is_not_taken(hub, monkeypatch, first, second):
    """One repository, one file per method: the cache may hold the other's alone, and then the hub is asked."""
    import huggingface_hub

    files = {"dfm": ("DFM_checkpoint.pth", {"model": make(DFM_NET)})}
    files["fsdfm"] = files["tsdfm"] = ("FS_DFM_checkpoint.pth", {"student_model": make(STUDENT)})
    hub("aminr8/FS-DFM", "3" * 40, ["main"], files[first][1], None, files[first][0])
    load("hf:aminr8/FS-DFM", first, "uniform", trust=True)
    if files[first] != files[second]:
        with pytest.raises(CheckpointError, match=f"has no file of '{second}', only {files[first][0]}"):
            load("hf:aminr8/FS-DFM", second, "uniform", trust=True)
    load(f"hf:aminr8/FS-DFM:{files[first][0]}", first, "uniform", trust=True)
    cached = huggingface_hub.snapshot_download

    def fetch(name, *, revision=None, local_files_only=False, allow_patterns=None):
        if not local_files_only:
            assert files[second][0] in allow_patterns
            hub(name, "3" * 40, [], files[second][1], None, files[second][0])
        return cached(name, revision=revision, local_files_only=True)

    listed = sorted({name for name, _ in files.values()})
    monkeypatch.delenv("TSDFM_BENCH_OFFLINE")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda *_args, **_settings: listed)
    assert load("hf:aminr8/FS-DFM", second, "uniform", trust=True)[1]["method"] == second


def test_what_the_hub_does_not_give_is_said_with_what_to_type(hub):
    with pytest.raises(CheckpointError) as caught:
        load("hf:nobody/nothing@v1", "mdlm", "mask")
    assert "local hub cache" in str(caught.value)
    assert "TSDFM_BENCH_OFFLINE is set" in str(caught.value)
    assert "hf download nobody/nothing --revision v1" in str(caught.value)
    for typed in ("hf:nothing", "hf:a/b/c/d", "hf:../etc", "hf:a/b:../../x", "hf:"):
        with pytest.raises(UsageError, match="cannot read"):
            load(typed, "mdlm", "mask")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("GatedRepoError", "gated: accept its licence"),
        ("RepositoryNotFoundError", "there is no a/b, or it is private"),
        ("RevisionNotFoundError", "has no revision 'main'"),
    ],
)
def test_refusals_of_the_hub_are_explained(monkeypatch, kind, message):
    import huggingface_hub
    from huggingface_hub import errors

    def refuse(*_args, **_settings):
        cls = getattr(errors, kind)
        raise cls.__new__(cls, "refused")  # without the response that its constructor wants

    monkeypatch.delenv("TSDFM_BENCH_OFFLINE", raising=False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", refuse)
    with pytest.raises(CheckpointError, match=message):
        load("hf:a/b@main", "mdlm", "mask")


def test_half_precision_files_become_full_precision(tmp_path):
    tensors = {name: tensor.bfloat16() for name, tensor in make(DIT).items()}
    network, _ = load(folder_of(tmp_path / "m", tensors, {"model_type": "mdlm"}), "mdlm", "mask")
    assert {p.dtype for p in network.parameters()} == {torch.float32}


def test_reading_keeps_no_optimizer(tmp_path):
    content = {"model": make(DFM_NET), "optimizer": {"state": {0: {"exp_avg": torch.zeros(5)}}, "param_groups": []}}
    folder = folder_of(tmp_path / "m", content, None, "x.pth")
    weights = read_weights([folder / "x.pth"], "", True)
    assert set(weights.tensors) == {*names.expected(DFM_NET), names.ROTARY}
