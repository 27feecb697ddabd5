"""A published checkpoint as one of our networks, with the configuration that our own checkpoints carry."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tsdfm_bench.methods.nets.causal import CausalConfig, CausalTransformer
from tsdfm_bench.methods.nets.dit import DiT, DiTConfig
from tsdfm_bench.methods.public import names
from tsdfm_bench.methods.public.containers import read_weights, tensor_names
from tsdfm_bench.methods.public.conventions import check_sizes, check_vocabulary, describe, family_of, heads_of
from tsdfm_bench.methods.public.files import PICKLES, PublicFiles, refuse_pickle


def check_method(files: PublicFiles, method: str) -> None:
    """Refuse what can be refused without loading: weights of another family, and a pickle that is not trusted.

    A safetensors file lists the names of its tensors; of a pickle nothing is known before it is read.

    Raises:
        CheckpointError: weights that `method` cannot sample, or a damaged file.
    """
    if files.weights[0].suffix in PICKLES:
        if not files.trust_pickle:
            raise refuse_pickle(files.weights[0])
        return
    layout, step_aware = names.layout_of(tensor_names(files.weights), files.name)
    family_of(files.name, files.published(), layout, step_aware, method)


def read(
    files: PublicFiles, method: str, source: str | None, vocab_size: int | None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and state dict, every published tensor accounted for.

    Args:
        files: from `files`.
        method, source: what the weights must be of.
        vocab_size: V of the task, or None if unknown.

    Raises:
        CheckpointError: damaged, incomplete, or of another architecture, method, source or vocabulary.
    """
    published = files.published()
    weights = read_weights(files.weights, files.choice, files.trust_pickle)
    geometry = names.geometry_of(weights.tensors, files.name, heads_of(published))
    names.check(weights.tensors, geometry, files.name)
    check_sizes(files.name, published, geometry)
    config = describe(files.name, published, geometry, method, source, weights.choice)
    check_vocabulary(files.name, config, vocab_size)
    config["parameters"] = sum(weights.tensors[name].numel() for name in names.expected(geometry))
    rows = config["network"]["vocab_size"] if geometry.layout == "causal" else geometry.rows
    return config, names.translate(weights.tensors, geometry, rows)


def load(
    files: PublicFiles, method: str, source: str | None, vocab_size: int | None, device: str
) -> tuple[nn.Module, dict[str, Any]]:
    """The network in eval mode on `device`, weights in fp32, and its configuration; raises as `read`."""
    config, state = read(files, method, source, vocab_size)
    geometry = config["network"]
    network: nn.Module = (
        CausalTransformer(CausalConfig(**geometry))
        if config["architecture"] == "causal"
        else DiT(DiTConfig(**geometry))
    )
    network.load_state_dict(state)  # strict, and converts to fp32
    return network.to(device).eval(), config
