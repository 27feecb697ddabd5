"""Floating-point operations of a training, by formula, and what share of the hardware's they are (MFU).

Matrix products only, as `torch.utils.flop_counter` counts them (a test compares the two): a product of (a, b) and
(b, c) is 2abc; attention is two products of length x length x width, the causal mask not subtracted. For one forward
pass of n sequences of L tokens through B blocks of width D, conditioning width C and Vn outputs at p places:

    blocks       n L B (24 D^2 + 4 L D)
    modulation   n C (12 B D + 4 D)            adaLN, transformers with conditioning only
    conditions   n (512 C + 2 C^2), once more for the step size, with 8 C^2 + 4 C^2 (B + 1) for the fusion
    head         2 p D Vn

A backward pass costs twice the forward pass. `FlopMeter` adds up what was run, student and teachers alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from tsdfm_bench.methods.nets.causal import CausalTransformer
from tsdfm_bench.methods.nets.compass import Compass
from tsdfm_bench.methods.nets.dit import DiT
from tsdfm_bench.methods.nets.pretrained import PretrainedNetwork

# bf16 dense matrix products per second, from the makers' data sheets; found by the name the driver gives.
PEAK_FLOPS = {"H100 PCIe": 756e12, "H200": 989e12, "H100": 989e12, "GH200": 989e12, "B200": 2250e12, "A100": 312e12}
PEAK_FLOPS |= {"L40S": 362e12, "A40": 150e12, "V100": 125e12, "4090": 165e12, "3090": 71e12}


def forward_flops(network: nn.Module, sequences: int, length: int, places: int | None = None) -> float:
    """Operations of one forward pass.

    Args:
        network: a DiT, CausalTransformer or Compass.
        sequences, length: shape of its input.
        places: positions the head runs at; None = all. The last block counts whole, though on a CPU a network that does
            not learn runs it at few places only.
    """
    config: Any = network.config
    width, blocks = config.width, config.blocks
    total = sequences * length * blocks * (24 * width**2 + 4 * length * width)
    places = sequences * length if places is None else places
    if isinstance(network, CausalTransformer):
        return float(total + 2 * places * width * config.vocab_size)
    condition = config.condition
    total += sequences * 12 * condition * width * blocks
    embedding = sequences * (512 * condition + 2 * condition**2)
    total += embedding
    if isinstance(network, Compass):
        merged = 4 * width**2 if config.see_origin else 0
        return float(total + sequences * length * (2 * width + merged))
    total += sequences * 4 * condition * width
    if config.step_aware:
        total += embedding + sequences * (8 * condition**2 + 4 * condition**2 * (blocks + 1))
    return float(total + 2 * places * width * config.outputs)


def peak_flops(device: torch.device) -> float | None:
    """Peak bf16 operations per second of a device, or None if it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


def networks_in(holder: object, depth: int = 3) -> Iterator[PretrainedNetwork]:
    """The networks an objective holds: frozen teachers, the semi-teacher, a chooser's compass or judge."""
    for value in vars(holder).values() if hasattr(holder, "__dict__") else ():
        if isinstance(value, DiT | CausalTransformer | Compass):
            yield value
        elif depth > 1 and not isinstance(value, nn.Module) and hasattr(value, "__dict__"):
            yield from networks_in(value, depth - 1)


class FlopMeter:
    """Counts the operations of every forward pass of some networks, and of the backward passes that follow.

    Args:
        networks: each is counted once, however often it is named.
    """

    def __init__(self, *networks: nn.Module) -> None:
        self.total = 0.0
        distinct = {id(network): network for network in networks}
        self._handles = [network.register_forward_hook(self._count, with_kwargs=True) for network in distinct.values()]

    def _count(self, network: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], _result: object) -> None:
        tokens = inputs[0] if inputs else named["tokens"]
        at = named.get("at")
        sequences, length = tokens.shape
        flops = forward_flops(network, sequences, length, None if at is None else at[0].numel())
        learns = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in network.parameters())
        self.total += flops * (3 if learns else 1)

    def close(self) -> None:
        """Stop counting."""
        for handle in self._handles:
            handle.remove()
