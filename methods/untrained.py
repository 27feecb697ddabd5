"""Networks with random weights: what a call costs, and what it needs of memory, does not depend on training.

Parameters that start at zero (the modulation and the output map) get small random values, so that predictions differ
from place to place as those of a trained network do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from tsdfm_bench.methods.nets.causal import CausalConfig, CausalTransformer
from tsdfm_bench.methods.nets.dit import DiT, DiTConfig
from tsdfm_bench.methods.nets.pretrained import PretrainedNetwork

STEP_AWARE = ("fsdfm", "tsdfm")


def untrained_network(
    method: str, source: str | None, geometry: Mapping[str, int]
) -> tuple[PretrainedNetwork, dict[str, Any]]:
    """The network a method would be trained with, in eval mode on the CPU, and its configuration.

    Args:
        method: name; decides on the architecture.
        source: "mask" adds an output for the mask.
        geometry: vocab_size, length, width, blocks, heads and condition.
    """
    vocab_size, length = geometry["vocab_size"], geometry["length"]
    width, blocks, heads = geometry["width"], geometry["blocks"], geometry["heads"]
    network: PretrainedNetwork
    if method == "ar":
        network = CausalTransformer(CausalConfig(vocab_size, length, width=width, blocks=blocks, heads=heads))
    else:
        network = DiT(
            DiTConfig(
                vocab_size,
                vocab_size + (source == "mask"),
                length,
                width=width,
                blocks=blocks,
                heads=heads,
                condition=geometry["condition"],
                step_aware=method in STEP_AWARE,
            )
        )
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)
    return network.eval(), {"network": asdict(network.config)}
