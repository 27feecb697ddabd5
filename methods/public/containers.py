"""Files that hold published weights, and which of the networks inside is taken.

    .safetensors              tensors by name
    .bin .pt .pth .ckpt       pickles, read only if the user says so, and then with torch's restricted reader
                              (`weights_only=True`): no code of the file runs. Settings of other programs beside the
                              tensors (hyper-parameters of Lightning files: an OmegaConf configuration, a tokenizer)
                              are replaced by inert stand-ins, and those programs are not imported. A file that asks
                              for anything else (`os.system`, `builtins.getattr`) is refused.

A pickle may hold several networks. What is asked for after a `#` decides; without it

    {"student_model", "student_ema_model", "teacher_model", ...}   FS-DFM: the student, as the released evaluation loads
    {"state_dict", "ema": {"shadow_params"}}                        MDLM family (Lightning): the average
    {"model", "ema": {"shadow_params"}}                             SEDD: the average
    {"model", ...}                                                  DFM: the model
    names of tensors                                                itself

`shadow_params` is a list without names, in parameter order (`names.expected`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tsdfm_bench.errors import CheckpointError
from tsdfm_bench.methods.public.files import refuse_pickle
from tsdfm_bench.methods.public.names import PASSENGERS, expected, geometry_of

_PREFIXES = ("module.", "_orig_mod.", "backbone.")
# What settings beside the tensors are made of. Nothing of it is imported or called: these are names of stand-ins.
_SETTINGS_MODULES = (
    "omegaconf.", "antlr4.", "pytorch_lightning.", "lightning.", "lightning_fabric.", "transformers.", "tokenizers.",
    "pathlib.", "typing.", "numpy.",
)  # fmt: skip
_SETTINGS_CLASSES = frozenset(
    {
        "argparse.Namespace", "collections.defaultdict", "builtins.bool", "builtins.bytes", "builtins.dict",
        "builtins.float", "builtins.frozenset", "builtins.int", "builtins.list", "builtins.object", "builtins.str",
        "builtins.tuple",
    }
)  # fmt: skip
_NAMED = {"student": "student_model", "ema": "student_ema_model", "teacher": "teacher_model", "model": "model"}


@dataclass(frozen=True)
class Weights:
    """Tensors of one network.

    Args:
        tensors: by published name, prefixes removed.
        choice: which network of the file: "model", "student", "ema" or "teacher".
    """

    tensors: dict[str, Tensor]
    choice: str


def read_weights(files: Sequence[Path], choice: str, trust_pickle: bool) -> Weights:
    """The network asked for.

    Args:
        files: one file, or the parts of a sharded safetensors file.
        choice: "model", "student", "ema", "teacher", or "" for the default above.
        trust_pickle: the user allows pickles.

    Raises:
        CheckpointError: damaged, not trusted, or without the network asked for.
    """
    where = files[0].name
    if files[0].suffix == ".safetensors":
        if choice not in ("", "model"):
            raise CheckpointError(f"{where} holds one network, not '{choice}'; leave '#{choice}' out")
        merged: dict[str, Tensor] = {}
        for file in files:
            merged |= _read_safetensors(file)
        return Weights(strip_prefixes(merged, where), "model")
    return choose(_read_pickle(files[0], trust_pickle), choice, where)


def tensor_names(files: Sequence[Path]) -> set[str]:
    """Names of the tensors in the parts of a safetensors file, prefixes removed; no tensor is read.

    Raises:
        CheckpointError: damaged.
    """
    from safetensors import SafetensorError, safe_open

    names: set[str] = set()
    for file in files:
        try:
            with safe_open(str(file), "pt") as opened:
                names.update(map(_bare, opened.keys()))
        except (SafetensorError, OSError, ValueError) as error:
            raise _damaged(file, error) from error
    return names


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(str(file))
    except (SafetensorError, OSError, ValueError) as error:
        raise _damaged(file, error) from error


def _damaged(file: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{file} is truncated or damaged ({error}); fetch it again")


def _read_pickle(file: Path, trusted: bool) -> object:
    if not trusted:
        raise refuse_pickle(file)
    try:
        with torch.serialization.safe_globals(_stand_ins(file)):
            try:
                return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError as error:
                if "mmap" not in str(error):
                    raise
                return torch.load(file, map_location="cpu", weights_only=True)  # written by an old torch
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle can fail in any way
        lines = str(error).strip().splitlines()
        reason = (lines[0] if lines else type(error).__name__)[:300]
        raise CheckpointError(
            f"{file} cannot be read with weights_only=True: {reason}. It is damaged, or holds more than tensors; where "
            "you trust it, load it once and save its tensors with safetensors.torch.save_file"
        ) from error


class _Inert:
    """Stands for a class or function of another program, and for what it makes; keeps nothing and does nothing."""

    def __new__(cls, *_args: object, **_settings: object) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *_args: object, **_settings: object) -> None:
        pass

    def __setstate__(self, _state: object) -> None:
        pass


class _InertDictionary:
    """Stands for a kind of dictionary; makes a plain one, because torch fills no other item by item."""

    def __new__(cls, *_args: object, **_settings: object) -> dict[Any, Any]:  # type: ignore[misc]
        return {}


def _stand_ins(file: Path) -> list[Any]:
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    except Exception:  # not a zip file of torch: the reader itself says what is wrong
        return []
    foreign = sorted(n for n in names if not n.startswith(_SETTINGS_MODULES) and n not in _SETTINGS_CLASSES)
    if foreign:
        raise CheckpointError(
            f"{file.name} asks for {', '.join(foreign[:3])}, which is neither a tensor nor a known setting: it is not "
            "read, whatever is trusted"
        )
    return [(type("Inert", (_InertDictionary if _is_dictionary(name) else _Inert,), {}), name) for name in names]


def _is_dictionary(name: str) -> bool:
    return name == "collections.defaultdict" or name.endswith(".AttributeDict")


def choose(content: object, choice: str, where: str) -> Weights:
    """One network of an unpickled file; see the module."""
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(f"{where} holds no weights but {type(content).__name__}")
    if all(isinstance(value, Tensor) for value in content.values()):
        if choice not in ("", "model"):
            raise CheckpointError(f"{where} holds one network, not '{choice}'; leave '#{choice}' out")
        return Weights(strip_prefixes(content, where), "model")
    named = {name: content[key] for name, key in _NAMED.items() if _is_state(content.get(key))}
    if "model" not in named and _is_state(content.get("state_dict")):
        named["model"] = content["state_dict"]
    average = content.get("ema")
    shadow = average.get("shadow_params") if isinstance(average, Mapping) else None
    has = [*named, *(["ema"] if shadow is not None and "ema" not in named else [])]
    if not has:
        keys = ", ".join(map(str, list(content)[:6]))
        raise CheckpointError(f"{where} holds no network under a known name; it has: {keys}")
    choice = choice or ("student" if "student" in named else "ema" if shadow is not None else has[0])
    if choice not in has:
        raise CheckpointError(f"{where} has no '{choice}' weights; it has: {', '.join(f'#{name}' for name in has)}")
    if choice in named:
        return Weights(strip_prefixes(named[choice], where), choice)
    if "model" not in named:
        raise CheckpointError(
            f"{where}: the averaged weights have no names, and the model that would give them is missing"
        )
    return Weights(apply_shadow(strip_prefixes(named["model"], where), shadow, where), "ema")


def _is_state(value: object) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(isinstance(item, Tensor) for item in value.values())


def strip_prefixes(tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Names without the wrappers they were saved under; tensors that are no weights are left out.

    Raises:
        CheckpointError: two tensors get one name, or one has none.
    """
    bare: dict[str, Tensor] = {}
    for full, tensor in tensors.items():
        if not isinstance(full, str):
            raise CheckpointError(f"{where} holds tensors without names: one is filed under {full!r}")
        name = _bare(full)
        if name in PASSENGERS and tensor.numel() <= 1:
            continue
        if name in bare:
            raise CheckpointError(f"{where} holds two tensors called {name} (one of them as {full})")
        bare[name] = tensor
    return bare


def _bare(name: str) -> str:
    while prefix := next((p for p in _PREFIXES if name.startswith(p)), None):
        name = name[len(prefix) :]
    return name


def apply_shadow(tensors: Mapping[str, Tensor], shadow: object, where: str) -> dict[str, Tensor]:
    """Replace the parameters by their averages, which are listed in parameter order.

    Raises:
        CheckpointError: not as many as there are parameters, or of other shapes.
    """
    names = list(expected(geometry_of(tensors, where)))
    if not isinstance(shadow, Sequence) or not all(isinstance(item, Tensor) for item in shadow):
        raise CheckpointError(f"{where}: the averaged weights are not a list of tensors")
    extra = shadow[len(names) :]
    if len(shadow) < len(names) or any(item.numel() > 1 for item in extra):
        raise CheckpointError(f"{where}: {len(shadow)} averaged tensors for {len(names)} parameters")
    averaged = dict(tensors)
    for name, average in zip(names, shadow, strict=False):
        if name in tensors and average.shape != tensors[name].shape:
            raise CheckpointError(
                f"{where}: the average of {name} has shape {tuple(average.shape)}, the model's tensor "
                f"{tuple(tensors[name].shape)}"
            )
        averaged[name] = average
    return averaged
