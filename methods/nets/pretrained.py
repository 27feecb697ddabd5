"""Networks as folders: `config.json` beside `model.safetensors` and its sha256, each written whole or not at all.

`config.json` holds `architecture`, the network's own geometry under `network`, and whatever the trainer wants to say
about the weights (`method`, `source`, `schedule`, `data_hash`, `tokens_seen`, ...). Loading is strict: a missing,
unexpected or mis-shaped tensor, a truncated file or a foreign configuration is an error that names it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import nn

from tsdfm_bench.errors import CheckpointError
from tsdfm_bench.methods.nets.folder import CONFIG_FILE, SUM_FILE, WEIGHTS_FILE, check_sum, read_config, sha256_of

__all__ = ["CONFIG_FILE", "WEIGHTS_FILE", "PretrainedNetwork", "read_config", "replace_file"]


def replace_file(path: Path, write: Any) -> None:
    """Call `write(temporary path)`, flush to disk, then rename over `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # safetensors makes files only their owner can read
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


class PretrainedNetwork(nn.Module):
    """Base of our networks: a frozen dataclass `config` and folder-wise saving and loading."""

    architecture: ClassVar[str]
    config_class: ClassVar[type]
    config: Any

    def save_pretrained(
        self, folder: Path, about: Mapping[str, Any] | None = None, dtype: torch.dtype | None = None
    ) -> None:
        """Write `config.json` and `model.safetensors`.

        Args:
            folder: made if it does not exist.
            about: what else `config.json` should say (recipe, data hash, tokens seen, validation number, ...).
            dtype: storage type of floating-point weights; None keeps them as they are.
        """
        from safetensors.torch import save_file

        tensors = {
            name: tensor.detach().cpu().to(dtype if dtype and tensor.is_floating_point() else tensor.dtype).contiguous()
            for name, tensor in self.state_dict().items()
        }
        config = {"architecture": self.architecture, "network": asdict(self.config), **(about or {})}
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        folder = Path(folder)
        (folder / SUM_FILE).unlink(missing_ok=True)
        replace_file(folder / WEIGHTS_FILE, lambda path: save_file(tensors, str(path)))
        line = f"{sha256_of(folder / WEIGHTS_FILE)}  {WEIGHTS_FILE}\n"
        replace_file(folder / SUM_FILE, lambda path: path.write_text(line, encoding="utf-8"))
        replace_file(folder / CONFIG_FILE, lambda path: path.write_text(text, encoding="utf-8"))

    @classmethod
    def from_pretrained(cls, folder: Path, device: str = "cpu") -> Self:
        """Read a folder written by `save_pretrained`; weights become fp32, the network is in eval mode.

        Raises:
            CheckpointError: files missing or damaged, another architecture, or tensors that do not fit.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        config = read_config(folder)
        if config.get("architecture") != cls.architecture:
            raise CheckpointError(
                f"{folder} holds architecture '{config.get('architecture')}', asked for '{cls.architecture}'"
            )
        known = {field.name for field in fields(cls.config_class)}
        unknown = sorted(set(config["network"]) - known)
        if unknown:
            raise CheckpointError(f"{folder}/{CONFIG_FILE}: unknown network settings {unknown}; known: {sorted(known)}")
        try:
            network = cls(cls.config_class(**config["network"]))
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{folder}/{CONFIG_FILE} is not a valid network configuration: {error}") from error
        path = Path(folder) / WEIGHTS_FILE
        if not path.is_file():
            raise CheckpointError(f"no {WEIGHTS_FILE} in {folder}")
        try:
            tensors = load_file(str(path))
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{path} is truncated or damaged ({error}); restore it or train again") from error
        wanted = network.state_dict()
        problems = [f"missing {name}" for name in wanted if name not in tensors]
        problems += [f"unexpected {name}" for name in tensors if name not in wanted]
        problems += [
            f"{name} has shape {tuple(tensors[name].shape)}, the configuration says {tuple(wanted[name].shape)}"
            for name in wanted
            if name in tensors and tensors[name].shape != wanted[name].shape
        ]
        if problems:
            shown = "; ".join(problems[:6]) + (f"; and {len(problems) - 6} more" if len(problems) > 6 else "")
            raise CheckpointError(f"{path} does not fit its configuration: {shown}")
        check_sum(Path(folder))
        network.load_state_dict({name: tensor.to(wanted[name].dtype) for name, tensor in tensors.items()})
        return network.to(device).eval()
