"""Causal language models by name: a folder, the local hub cache, or the model hub, in this order.

Only configuration, tokenizer and safetensors files are fetched. What the files say about the model (longest input,
context token, size) is read without loading it.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from math import prod
from pathlib import Path
from typing import Any

from tsdfm_bench.errors import AssetError, UsageError, hub_reason
from tsdfm_bench.tasks.assets import file_sha256, hub_refusal

PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
IGNORED = ["*/*"]
MAX_HEADER_BYTES = 100_000_000

_VOCABULARY = (
    *("tokenizer*.json", "vocab*", "merges.txt", "*.model", "*.spm", "*.tiktoken", "tekken.json"),
    *("special_tokens_map.json", "added_tokens.json"),
)
_ABOUT_VOCABULARY = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")  # no tokenizer alone


def obtain_model(name: str, revision: str | None = None) -> tuple[Path, str]:
    """Folder and revision of a model.

    Args:
        name: a folder, or a hub name.
        revision: hub revision, or None for the newest (the one in the cache, if there is one).

    Returns:
        the folder, and "sha256:..." of a local folder's weights and vocabulary or the hub's commit.

    Raises:
        AssetError: listing what was tried and what to type.
        UsageError: a revision of a folder.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise UsageError(
                f"{folder} is a folder and has no revision '{revision}': leave it out, or give a hub name, "
                "hf:OWNER/NAME@REVISION"
            )
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
    raise AssetError(f"could not obtain the model '{name}': {refusal}. Tried:\n" + "\n".join(tried) + "\n" + advice)


def longest_input(folder: Path) -> int | None:
    """Longest input the configuration allows, or None if it does not say."""
    config = _object(folder / "config.json")
    for part in (config, config.get("text_config")):
        for key in ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length"):
            if isinstance(part, dict) and isinstance(part.get(key), int):
                return int(part[key])
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
    tokenizer = read_tokenizer(folder)
    token = tokenizer.bos_token or tokenizer.eos_token
    if not token:
        raise AssetError(f"model '{name}' has no begin- or end-of-sequence token; set its option 'context'")
    return str(token)


def read_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder; no code of the folder is run.

    Raises:
        AssetError: its files are missing, damaged, or of another format.
    """
    from transformers import AutoTokenizer

    if all(file.name in _ABOUT_VOCABULARY for file in _vocabulary_files(folder)):
        raise AssetError(
            f"{folder} has no tokenizer files (tokenizer.json, tokenizer.model, or vocab.json and merges.txt): put the "
            "model's there, as save_pretrained of its tokenizer writes them"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the library raises what it meets, down to bare exceptions
        raise AssetError(f"the tokenizer in {folder} cannot be read: {_why(error)}") from error
    if len(tokenizer) == 0:
        raise AssetError(f"the tokenizer in {folder} is empty; its vocabulary files are missing or of another format")
    return tokenizer


def require_causal_kind(folder: Path, name: str) -> None:
    """Raise unless the configuration may be that of a causal language model; no weights are read.

    Raises:
        AssetError: transformers has no causal language model of this configuration, or it needs code of the folder.
        UsageError: an encoder, which sees the tokens that it is to predict.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # as for tokenizers
        raise AssetError(f"{folder} cannot be read as a causal language model: {_why(error)}") from error
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise AssetError(f"{folder} cannot be read as a causal language model: {_other_kind(type(config).__name__)}")
    kinds = config.architectures or []
    if kinds and all(kind.endswith("ForMaskedLM") for kind in kinds) and not getattr(config, "is_decoder", False):
        raise not_causal(name, kinds[0])


def not_causal(name: str, kind: str) -> UsageError:
    """The error of a judge whose states depend on later tokens."""
    return UsageError(
        f"scorer '{name}' is not causal: {kind} sees the tokens that it is to predict (its states change with later "
        "ones). Choose one trained to predict the next token, such as hf:gpt2-large"
    )


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
        Exception: memory ran out; as torch, safetensors or the system says it.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    from tsdfm_bench.launch.failures import memory_ran_out
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
            tokenizer = read_tokenizer(folder)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        if memory_ran_out(error):
            raise
        raise AssetError(f"{folder} cannot be read as a causal language model: {_why(error)}") from error
    model, loaded = read
    _require_all_weights(folder, model, loaded)
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
    for file in [folder / "config.json", *_weight_files(folder), *_vocabulary_files(folder)]:
        digest.update(f"{file.name}\x1f{file_sha256(file)}\x1e".encode())
    return "sha256:" + digest.hexdigest()


def _vocabulary_files(folder: Path) -> list[Path]:
    return sorted({file for pattern in _VOCABULARY for file in folder.glob(pattern) if file.is_file()})


def _object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; raises AssetError if there is none."""
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AssetError(f"{path} is not JSON: {error}") from error
    if not isinstance(loaded, dict):
        raise AssetError(f"{path} is damaged: it holds a {type(loaded).__name__}, not an object with settings")
    return loaded


def _why(error: BaseException) -> str:
    """What transformers refuses, in one line."""
    text = str(error).strip()
    line = text.splitlines()[0] if text else type(error).__name__
    if "contains custom code" in line:
        return (
            "it needs Python code of its own repository, and code of others is not run. Choose a model whose "
            "architecture is part of transformers, such as hf:gpt2-large"
        )
    if unknown := re.match(r"Unrecognized configuration class <class '(?:.*\.)?(\w+)'>", line):
        return _other_kind(unknown[1])
    return line


def _other_kind(config: str) -> str:
    kind = config.removesuffix("Config")
    return f"it is a {kind}, which is not one. Choose a model trained to predict the next token, such as hf:gpt2-large"
