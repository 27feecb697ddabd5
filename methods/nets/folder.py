"""The two files of a checkpoint folder of ours; needs no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tsdfm_bench.errors import CheckpointError

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"


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
