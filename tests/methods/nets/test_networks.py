"""The networks: parameter counts of the published sizes, the head at chosen positions, the KV cache, strict loading."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tsdfm_bench.errors import CheckpointError
from tsdfm_bench.methods.nets.causal import CausalConfig, CausalTransformer
from tsdfm_bench.methods.nets.compass import Compass
from tsdfm_bench.methods.nets.dit import DiT, DiTConfig


def small(**changes: object) -> DiT:
    torch.manual_seed(0)
    network = DiT(
        DiTConfig(
            **{
                "vocab_size": 11,
                "outputs": 12,
                "length": 8,
                "width": 16,
                "blocks": 2,
                "heads": 2,
                "condition": 8,
                **changes,
            }
        )
    )  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in network.parameters():  # leave the zero initialisation, so that every path matters
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network.eval()


@pytest.mark.parametrize(
    ("outputs", "step_aware", "count"),
    [(50257, False, 169_625_681), (50257, True, 170_168_529), (50258, False, 169_627_218)],
)
def test_published_parameter_counts(outputs: int, step_aware: bool, count: int) -> None:
    with torch.device("meta"):
        network = DiT(DiTConfig(50257, outputs, 1024, step_aware=step_aware))
    assert sum(p.numel() for p in network.parameters()) == count


def test_published_parameter_count_of_the_autoregressive_network() -> None:
    with torch.device("meta"):
        network = CausalTransformer(CausalConfig(50258, 1024))
    assert sum(p.numel() for p in network.parameters()) == 162_246_482


def test_first_logits_are_zero_and_blocks_start_as_the_identity() -> None:
    network = DiT(DiTConfig(11, 11, 8, width=16, blocks=2, heads=2, condition=8))
    assert network(torch.randint(0, 11, (3, 8)), torch.rand(3)).abs().max() == 0


@pytest.mark.parametrize("step_aware", [False, True])
@pytest.mark.parametrize("geometry", [{}, {"width": 80, "heads": 2}], ids=["small heads", "heads of 40"])
@pytest.mark.parametrize(
    ("batch", "places"),
    [
        (1, [(0, 7)]),
        (1, [(0, 3), (0, 0), (0, 7)]),
        (3, [(0, 7), (2, 0), (2, 3)]),  # a row without places
        (3, [(2, 3), (0, 1), (2, 0), (1, 6), (2, 7)]),  # rows in any order
        (2, [(row, place) for row in range(2) for place in range(8)]),  # all: the last block is run whole
        (2, []),
    ],
)
def test_logits_at_places_are_those_of_the_whole(
    step_aware: bool, geometry: dict[str, int], batch: int, places: list[tuple[int, int]], monkeypatch
) -> None:
    network = small(step_aware=step_aware, **geometry)
    tokens, time = torch.randint(0, 12, (batch, 8)), torch.rand(batch)
    step = torch.rand(batch) if step_aware else None
    rows, positions = torch.tensor(places, dtype=torch.int64).reshape(-1, 2).T
    whole = network(tokens, time, step)[rows, positions]
    widths: list[int] = []  # how many vectors the last block's MLP sees
    network.blocks[-1].mlp.register_forward_pre_hook(lambda _, inputs: widths.append(inputs[0][..., 0].numel()))
    for plain in ("0", "1"):
        monkeypatch.setenv("TSDFM_BENCH_PLAIN", plain)
        torch.testing.assert_close(network(tokens, time, step, at=(rows, positions)), whole)
    assert widths == [len(places) if 0 < len(places) <= batch * 4 else batch * 8, batch * 8]


class _Adapted(torch.nn.Linear):
    """A projection that adds something of its own, as adapters do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + x.sum(dim=-1, keepdim=True)


@pytest.mark.parametrize("why", ["training", "adapter", "hook", "compiled"])
def test_the_last_block_runs_whole_where_more_than_logits_is_asked_for(why: str, monkeypatch) -> None:
    network = small()
    block = network.blocks[-1]
    heard: list[int] = []
    if why == "training":
        network.train()
    elif why == "adapter":
        adapted = _Adapted(16, 48, bias=False)
        adapted.load_state_dict(block.qkv.state_dict())
        block.qkv = adapted
    elif why == "hook":
        block.qkv.register_forward_hook(lambda *_: heard.append(1))
    else:
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    widths: list[int] = []
    block.mlp.register_forward_pre_hook(lambda _, inputs: widths.append(inputs[0][..., 0].numel()))
    tokens, time, places = torch.randint(0, 12, (1, 8)), torch.rand(1), (torch.tensor([0]), torch.tensor([3]))
    torch.testing.assert_close(network(tokens, time, at=places), network(tokens, time)[places])
    assert widths == [8, 8]
    assert len(heard) == (2 if why == "hook" else 0)


def test_step_aware_network_needs_a_step_size() -> None:
    with pytest.raises(ValueError, match="step_size is required"):
        small(step_aware=True)(torch.zeros(1, 8, dtype=torch.int64), torch.zeros(1))


def test_identity_preserving_student_starts_equal_to_its_teacher() -> None:
    teacher = small()
    student = DiT(
        DiTConfig(
            11, 12, 8, width=16, blocks=2, heads=2, condition=8, step_aware=True, fuser_init="identity_preserving"
        )
    )
    student.load_state_dict({**student.state_dict(), **teacher.state_dict()})
    tokens, time = torch.randint(0, 12, (4, 8)), torch.rand(4)
    torch.testing.assert_close(student.eval()(tokens, time, torch.rand(4)), teacher(tokens, time))


def test_attention_is_bidirectional_and_time_matters() -> None:
    network = small()
    tokens = torch.zeros(1, 8, dtype=torch.int64)
    changed = tokens.clone()
    changed[0, 7] = 5
    time = torch.tensor([0.3])
    assert (network(tokens, time)[0, 0] - network(changed, time)[0, 0]).abs().max() > 1e-4
    assert (network(tokens, time) - network(tokens, time + 0.5)).abs().max() > 1e-4


def causal() -> CausalTransformer:
    torch.manual_seed(0)
    network = CausalTransformer(CausalConfig(11, 8, width=16, blocks=2, heads=2))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network.eval()


@pytest.mark.parametrize("pieces", [[1] * 8, [3, 1, 4], [8]])
def test_kv_cache_equals_the_full_pass(pieces: list[int]) -> None:
    network = causal()
    tokens = torch.randint(0, 11, (3, 8))
    cache = network.new_cache(3, 8)
    parts = [network(part, cache) for part in tokens.split(pieces, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), network(tokens))


def test_causal_network_does_not_see_the_future() -> None:
    network = causal()
    tokens = torch.randint(0, 11, (1, 8))
    changed = tokens.clone()
    changed[0, 5] = (changed[0, 5] + 1) % 11
    first, second = network(tokens), network(changed)
    torch.testing.assert_close(first[:, :5], second[:, :5])
    assert (first[:, 5:] - second[:, 5:]).abs().max() > 1e-4


@pytest.mark.parametrize("network", [small(), small(step_aware=True), causal(), Compass.from_teacher(small(), 1)])
def test_saved_and_loaded_networks_are_equal(network: DiT, tmp_path) -> None:
    network.save_pretrained(tmp_path, {"method": "test"})
    loaded = type(network).from_pretrained(tmp_path)
    assert loaded.config == network.config
    for name, tensor in network.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], tensor, rtol=0, atol=0)
    files = ["config.json", "model.safetensors", "model.safetensors.sha256"]
    assert sorted(p.name for p in tmp_path.iterdir()) == files


def test_missing_unexpected_and_misshapen_tensors_are_named(tmp_path) -> None:
    small().save_pretrained(tmp_path)
    tensors = load_file(str(tmp_path / "model.safetensors"))
    del tensors["blocks.0.attn_out.weight"]
    tensors["stranger"] = torch.zeros(1)
    tensors["output.linear.bias"] = torch.zeros(5)
    save_file(tensors, str(tmp_path / "model.safetensors"))
    with pytest.raises(CheckpointError) as error:
        DiT.from_pretrained(tmp_path)
    for words in ("missing blocks.0.attn_out.weight", "unexpected stranger", "output.linear.bias has shape (5,)"):
        assert words in str(error.value)


def test_truncated_weights_are_an_error(tmp_path) -> None:
    small().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        DiT.from_pretrained(tmp_path)


def test_foreign_or_damaged_configuration_is_an_error(tmp_path) -> None:
    small().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="architecture 'dit'"):
        CausalTransformer.from_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["network"]["depth"] = 3
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"unknown network settings \['depth'\]"):
        DiT.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="damaged"):
        DiT.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        DiT.from_pretrained(tmp_path / "nowhere")


def test_compass_starts_from_the_teacher_and_gives_token_energies() -> None:
    teacher = small()
    compass = Compass.from_teacher(teacher, 1, see_origin=True)
    tokens = torch.randint(0, 12, (3, 8))
    assert compass(tokens, torch.rand(3), tokens).shape == (3, 8)
    torch.testing.assert_close(compass.blocks[0].state_dict(), teacher.blocks[0].state_dict())
    with pytest.raises(ValueError, match="origin is required"):
        compass(tokens, torch.rand(3))
