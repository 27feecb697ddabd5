"""Causal language models by name: a folder, the local hub cache, or the model hub, in this order.

Only configuration, tokenizer and safetensors files are fetched. What the files say about the model (longest input,
context token, size) is read without loading it.
"""

from __future__ import annotations

import hashlib
import json
import struct
from math import prod
from pathlib import Path
from typing import Any

from tsdfm_bench.errors import AssetError, hub_reason
from tsdfm_bench.tasks.assets import file_sha256, hub_refusal

PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
IGNORED = ["*/*"]
MAX_HEADER_BYTES = 100_000_000

_VOCABULARY = ("tokenizer*.json", "vocab*", "merges.txt", "*.model", "special_tokens_map.json", "added_tokens.json")


def obtain_model(name: str, revision: str | None = None) -> tuple[Path, str]:
    """Folder and revision of a model.

    Args:
        name: a folder, or a hub name.
        revision: hub revision, or None for the newest (the one in the cache, if there is one).

    Returns:
        the folder, and "sha256:..." of a local folder's weights and vocabulary or the hub's commit.

    Raises:
        AssetError: listing what was tried and what to type.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        _require_weights(folder, name)
        return folder, _weights_hash(folder)
    tried = [f"  folder {name}: does not exist"]
    try:
        cached = _snapshot(name, revision, local=True)
        if _weight_files(cached):
            return cached, cached.name
        tried.append("  local hub cache: incomplete")
    except Exception as error:  # every kind of "not in the cache", whatever the version of the client
        tried.append(f"  local hub cache: {hub_reason(error, name, revision)}")
    refusal = hub_refusal()
    if refusal is None:
        try:
            fetched = _snapshot(name, revision, local=False)
            _require_weights(fetched, name)
            return fetched, fetched.name
        except AssetError:
            raise
        except Exception as error:  # every kind of "not from the hub": unknown name, gated, network
            refusal = hub_reason(error, name, revision)
    tried.append(f"  model hub: {refusal}")
    advice = "Give a folder with config.json, tokenizer files and *.safetensors: --scorers hf:/path/to/folder; "
    advice += "or use the judges that need no hub: --scorers char-rnn,smollm2"
    raise AssetError(f"could not obtain the model '{name}'. Tried:\n" + "\n".join(tried) + "\n" + advice)


def longest_input(folder: Path) -> int | None:
    """Longest input the configuration allows, or None if it does not say."""
    config = _object(folder / "config.json")
    for key in ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length"):
        if isinstance(config.get(key), int):
            return int(config[key])
    return None


def context_token(folder: Path, name: str) -> str:
    """The token put before a text: the tokenizer's begin-of-sequence token, else its end-of-sequence token."""
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        path = folder / file
        known = _object(path) if path.is_file() else {}
        for key in ("bos_token", "eos_token"):
            token = known.get(key)
            if isinstance(token, dict):
                token = token.get("content")
            if token:
                return str(token)
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the library raises what it meets, down to bare exceptions
        raise AssetError(f"the tokenizer in {folder} cannot be read: {_line(error)}") from error
    token = tokenizer.bos_token or tokenizer.eos_token
    if not token:
        raise AssetError(f"model '{name}' has no begin- or end-of-sequence token; set its option 'context'")
    return str(token)


def parameter_count(folder: Path) -> int:
    """Number of stored parameters, from the headers of the safetensors files."""
    total = 0
    for path in _weight_files(folder):
        try:
            with path.open("rb") as file:
                (size,) = struct.unpack("<Q", file.read(8))
                header = json.loads(file.read(min(size, MAX_HEADER_BYTES)))
            total += sum(prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
        except (struct.error, ValueError, TypeError, KeyError, AttributeError) as error:
            raise AssetError(f"{path} is not a complete safetensors file") from error
    return total


def read_model(folder: Path, dtype: str, device_map: str | None = None) -> tuple[Any, Any]:
    """Model and tokenizer of a folder with safetensors; nothing is fetched and no code of the folder is run.

    Raises:
        AssetError: files that are damaged, of no causal language model, or whose weights are not those of the
            configuration (transformers itself would fill gaps with random numbers).
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tsdfm_bench.tasks.scorers.gguf import quiet_transformers

    try:
        with quiet_transformers():
            read: Any = AutoModelForCausalLM.from_pretrained(
                str(folder),
                dtype=getattr(torch, dtype),
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # `_require_all_weights` names them
                **({"device_map": device_map} if device_map else {}),
            )
            tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise AssetError(f"{folder} cannot be read as a causal language model: {_line(error)}") from error
    model, loaded = read
    _require_all_weights(folder, model, loaded)
    if len(tokenizer) == 0:
        raise AssetError(f"the tokenizer in {folder} is empty; its vocabulary files are missing or of another format")
    return model, tokenizer


def _require_all_weights(folder: Path, model: Any, loaded: dict[str, Any]) -> None:
    """Raise AssetError unless the files hold exactly the model's weights.

    transformers has left out tied weights and what the model's class ignores. Tables that a model computes itself
    (its buffers, and the `masked_bias` of older versions) may be stored or not.
    """
    computed = {name for name, _ in model.named_buffers()}
    unexpected = [
        name for name in loaded["unexpected_keys"] if name not in computed and not name.endswith(".masked_bias")
    ]
    shapes = [f"{name} {tuple(stored)}, not {tuple(own)}" for name, stored, own in loaded["mismatched_keys"]]
    faults = [
        f"{what}: {', '.join(sorted(names)[:3])}" + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        for what, names in (
            ("missing", loaded["missing_keys"]),
            ("of another shape", shapes),
            ("not of this model", unexpected),
        )
        if names
    ]
    if faults:
        raise AssetError(
            f"{folder}: the weights are not those of the {type(model).__name__} that config.json describes: "
            f"{'; '.join(faults)}. Give a folder that save_pretrained of that class has written"
        )


def _snapshot(name: str, revision: str | None, local: bool) -> Path:
    from huggingface_hub import snapshot_download

    found = snapshot_download(
        name, revision=revision, local_files_only=local, allow_patterns=PATTERNS, ignore_patterns=IGNORED
    )
    return Path(str(found))


def _weight_files(folder: Path) -> list[Path]:
    """Every safetensors file the model needs, or [] if one is missing."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        places = _object(index).get("weight_map")
        if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
            raise AssetError(f"{index} is damaged: it has no table 'weight_map' of weights and their files")
        files = [folder / name for name in sorted(set(places.values()))]
        return files if all(file.is_file() for file in files) else []
    single = folder / "model.safetensors"
    return [single] if single.is_file() else []


def _require_weights(folder: Path, name: str) -> None:
    if not (folder / "config.json").is_file():
        raise AssetError(f"model '{name}': {folder} has no config.json")
    if not _weight_files(folder):
        raise AssetError(
            f"model '{name}': {folder} has no complete model.safetensors (pickled weights such as pytorch_model.bin "
            "are not read). Load and save it with transformers' save_pretrained, and give that folder."
        )


def _weights_hash(folder: Path) -> str:
    digest = hashlib.sha256()
    vocabulary = sorted({file for pattern in _VOCABULARY for file in folder.glob(pattern) if file.is_file()})
    for file in [folder / "config.json", *_weight_files(folder), *vocabulary]:
        digest.update(f"{file.name}\x1f{file_sha256(file)}\x1e".encode())
    return "sha256:" + digest.hexdigest()


def _object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; raises AssetError if there is none."""
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AssetError(f"{path} is not JSON: {error}") from error
    if not isinstance(loaded, dict):
        raise AssetError(f"{path} is damaged: it holds a {type(loaded).__name__}, not an object with settings")
    return loaded


def _line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
