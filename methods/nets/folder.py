"""The files of a checkpoint folder of ours; needs no torch.

`config.json`, `model.safetensors`, and `model.safetensors.sha256` in the format of `sha256sum`: weights that changed on
disk are refused. A folder without the last file is read unchecked.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from tsdfm_bench.errors import CheckpointError

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
SUM_FILE = f"{WEIGHTS_FILE}.sha256"


def sha256_of(path: Path) -> str:
    """Hexadecimal sha256 of a file."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def check_sum(folder: Path) -> None:
    """Raise CheckpointError if the weights of a folder are not those that were saved."""
    path = folder / SUM_FILE
    if not path.is_file():
        return
    try:
        expected = path.read_text(encoding="utf-8").split()[0]
        found = sha256_of(folder / WEIGHTS_FILE)
    except (OSError, UnicodeDecodeError, IndexError) as error:
        raise CheckpointError(f"cannot check {folder / WEIGHTS_FILE} against {path}: {error}") from error
    if found != expected:
        raise CheckpointError(
            f"{folder / WEIGHTS_FILE} is damaged or was altered: its sha256 is {found[:12]}..., {SUM_FILE} says "
            f"{expected[:12]}...; restore it or train again (or delete {SUM_FILE} if the change was meant)"
        )


def read_config(folder: Path) -> dict[str, Any]:
    """The `config.json` of a checkpoint folder; raises CheckpointError if it is absent or damaged."""
    path = Path(folder) / CONFIG_FILE
    if not path.is_file():
        raise CheckpointError(
            f"no {CONFIG_FILE} in {folder}: a checkpoint is a folder with {CONFIG_FILE} and {WEIGHTS_FILE}"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); restore the checkpoint or train it again") from error
    if not isinstance(config, dict) or not isinstance(config.get("network"), dict):
        raise CheckpointError(f"{path} does not describe a network: the key 'network' is missing")
    return config
