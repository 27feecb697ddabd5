"""Calls are counted where they happen, on every network, however it is called."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tsdfm_bench.errors import PluginError, UsageError
from tsdfm_bench.meter import BatchCost, Meter, choose_device, total


class Twice(nn.Module):
    """Calls its part twice per call."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Linear(2, 2)

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        return self.part(self.part(x)) * scale


def test_calls_and_rows_are_counted_per_role() -> None:
    net, energy = Twice(), nn.Linear(2, 1)
    meter = Meter({"denoiser": net, "part": net.part, "energy": energy})
    with meter.measure(4) as cost:
        net(torch.zeros(4, 2))
        net(x=torch.zeros(3, 2), scale=2.0)
        net(torch.zeros(1, 2))
    assert cost.calls == {"denoiser": 3, "part": 6, "energy": 0}
    assert cost.rows == {"denoiser": 8, "part": 16, "energy": 0}
    assert cost.seconds > 0
    assert cost.peak_memory_bytes > 0


def test_nothing_is_counted_outside_and_no_hook_stays() -> None:
    net = nn.Linear(2, 2)
    meter = Meter({"denoiser": net})
    net(torch.zeros(1, 2))
    with pytest.raises(RuntimeError, match="boom"), meter.measure(1):
        raise RuntimeError("boom")
    with meter.measure(1) as cost:
        pass
    net(torch.zeros(1, 2))
    assert cost.calls == {"denoiser": 0}
    assert not net._forward_hooks


def test_a_cell_adds_up_its_batches() -> None:
    batches = [
        BatchCost(8, {"a": 10}, {"a": 60}, 2.0, 100, "cpu", 2),
        BatchCost(8, {"a": 12, "b": 4}, {"a": 68, "b": 32}, 1.0, 300, "cpu", 2),
    ]
    cost = total(batches, 8)
    assert cost is not None
    assert cost.calls == {"a": 11, "b": 2}
    assert cost.sequence_calls == {"a": 8, "b": 2}
    assert (cost.sequences, cost.seconds, cost.peak_memory_bytes) == (16, 3.0, 300)
    assert total([], 8) is None


@pytest.mark.parametrize("networks", [None, [nn.Linear(1, 1)], {"denoiser": "net"}])
def test_networks_must_be_modules_by_role(networks: object) -> None:
    with pytest.raises(PluginError, match="role"):
        Meter(networks)  # type: ignore[arg-type]


def test_an_unknown_device_is_wrong_use() -> None:
    with pytest.raises(UsageError, match="device 'quantum' cannot be used"):
        choose_device("quantum")
    assert choose_device("cpu") == "cpu"


def test_a_cell_made_on_two_kinds_of_device_says_both() -> None:
    """Its batches were shared out over a cluster: the seconds are of both, and so is the name."""
    costs = [BatchCost(4, {"net": 2}, {"net": 8}, 1.0, 10, device) for device in ("NVIDIA A100", "NVIDIA H100")]
    cell = total([*costs, costs[0]], 4)
    assert cell is not None
    assert cell.device == "NVIDIA A100, NVIDIA H100"
    assert cell.seconds == 3.0


def test_seconds_without_optimisations_belong_to_another_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are not compared with others unseen, nor taken for an estimate of others."""
    monkeypatch.setenv("TSDFM_BENCH_PLAIN", "1")
    with Meter({}).measure(1) as cost:
        pass
    assert cost.device == "cpu (optimisations off)"
