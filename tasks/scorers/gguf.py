"""A GGUF model as a safetensors folder in the cache, converted once and keyed by the GGUF's sha256.

Reading a GGUF through transformers takes many seconds, because every tensor is de-quantised; the copy loads in under a
second. It is float32, so nothing is rounded: scores are those of the GGUF. A copy counts only with its manifest, which
is written last and holds the sha256 of the weights; it is checked at every load.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from tsdfm_bench.errors import AssetError
from tsdfm_bench.tasks.assets import Asset, file_sha256, obtain, staging_folder

MANIFEST = "converted.json"
WEIGHTS = "model.safetensors"
LAYOUT = 1


def converted_folder(asset: Asset) -> Path:
    """Where the safetensors copy of an asset lies."""
    return asset.cached.parent / f"safetensors-{LAYOUT}"


def is_converted(asset: Asset) -> bool:
    """Whether a complete copy exists (its hash is checked when it is loaded)."""
    return (converted_folder(asset) / MANIFEST).is_file()


def obtain_converted(asset: Asset, path: str | None = None) -> Path:
    """The folder with config, tokenizer and float32 safetensors of a GGUF asset, made if it does not exist.

    Raises:
        AssetError: if the GGUF cannot be obtained, or the cache cannot be written.
    """
    folder = converted_folder(asset)
    if path is None and _intact(asset, folder):
        return folder
    gguf = obtain(asset, path)
    if _intact(asset, folder):
        return folder
    try:
        with staging_folder() as staging:
            fresh = staging / "safetensors"
            print(f"converting {asset.title} to safetensors, once ...", file=sys.stderr, flush=True)
            _convert(gguf, fresh, asset)
            folder.parent.mkdir(parents=True, exist_ok=True)
            try:
                fresh.rename(folder)
            except OSError:  # another process was first, or an incomplete copy is in the way
                if not _intact(asset, folder):
                    shutil.rmtree(folder)
                    fresh.rename(folder)
    except OSError as error:
        raise AssetError(
            f"{asset.title} was obtained but could not be converted into {folder}: {error}. It needs about "
            f"{6 * asset.bytes / 1e9:.1f} GB; set TSDFM_BENCH_CACHE to a folder with room."
        ) from error
    return folder


def _intact(asset: Asset, folder: Path) -> bool:
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return bool(
            manifest["gguf_sha256"] == asset.sha256 and manifest["weights_sha256"] == file_sha256(folder / WEIGHTS)
        )
    except (OSError, ValueError, KeyError):
        return False


def _convert(gguf: Path, folder: Path, asset: Asset) -> None:
    import torch
    import transformers
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    read = {"gguf_file": gguf.name, "local_files_only": True}
    with _read_once(), quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), **read)
        model = AutoModelForCausalLM.from_pretrained(str(gguf.parent), dtype=torch.float32, **read)
    # A model read from GGUF refuses to be saved (its configuration still says that it is quantised), so its parts are.
    tensors, seen = {}, set()
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen:  # tied weights are stored once, under the first name: the input embedding
            seen.add(tensor.data_ptr())
            tensors[name] = tensor.contiguous()
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.architectures = [type(model).__name__]
    folder.mkdir(parents=True)
    config.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    manifest = {
        "gguf_sha256": asset.sha256,
        "gguf": asset.file,
        "weights_sha256": file_sha256(folder / WEIGHTS),
        "dtype": "float32",
        "transformers": transformers.__version__,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and load reports of transformers inside; what we show and refuse says more."""
    from transformers.utils import logging

    shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()


@contextmanager
def _read_once() -> Iterator[None]:
    """transformers parses the header (a vocabulary, one value at a time) once each for configuration, tokenizer and
    weights, and builds the same table of tensor names for every submodule: several times the cost of the tensors.
    Inside, both are remembered and its progress bar is off; results are the same."""
    import gguf
    import numpy as np
    from transformers import modeling_gguf_pytorch_utils as reading

    class Reader(gguf.GGUFReader):
        """The reader with its memory map seen as a plain array, whose slices are far cheaper."""

        def __setattr__(self, name: str, value: object) -> None:
            super().__setattr__(name, np.asarray(value) if name == "data" else value)

    replacements = [
        (gguf, "GGUFReader", lru_cache(maxsize=1)(Reader)),
        (gguf, "get_tensor_name_map", lru_cache(gguf.get_tensor_name_map)),
        (reading, "tqdm", lambda iterable, **_: iterable),
    ]
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in replacements if hasattr(owner, name)]
    for owner, name, replacement in replacements:
        setattr(owner, name, replacement)
    try:
        yield
    finally:
        for owner, name, value in originals:
            setattr(owner, name, value)
