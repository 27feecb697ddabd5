"""From what a user types after `--checkpoint` to a folder of weights, its identity, and a network.

A checkpoint is a folder with `config.json` and `model.safetensors`. It can be named as

    nothing, or a set of shipped weights ("sotu")     methods/weights/<set>/<method>[-<source>]
    nothing, and none are shipped for the task         runs/train-<task>/..., where `tsdfm-bench train` puts them
    a folder with these two files                      that folder
    a folder of such folders (a training run)          its subfolder <method>[-<source>]
    a path to its model.safetensors                    the folder it lies in
    hf:OWNER/NAME, or a file or folder of other names  weights that the methods' authors published (`methods.public`)

Finding and hashing weights of our own need no torch; `load_network` imports it, and the network classes, when called.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsdfm_bench.api import Identity
from tsdfm_bench.errors import CheckpointError, UsageError, nearest
from tsdfm_bench.methods.nets.folder import CONFIG_FILE, WEIGHTS_FILE
from tsdfm_bench.methods.nets.folder import read_config as read_folder

if TYPE_CHECKING:
    from torch import nn

    from tsdfm_bench.methods.public.files import PublicFiles

WEIGHTS_ROOT = Path(__file__).parent / "weights"
TRAINED = Path("runs")
ARCHITECTURES = {
    "dit": ("tsdfm_bench.methods.nets.dit", "DiT"),
    "causal": ("tsdfm_bench.methods.nets.causal", "CausalTransformer"),
}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Checkpoint:
    """A folder of weights and how to call it.

    Args:
        folder: holds config.json and model.safetensors.
        name: readable, "sotu/mdlm" for shipped weights, else the path as typed.
        method, source: what it must be weights of; source None for methods without one.
        public: published weights of another layout, or None; they are read by `methods.public`.
    """

    folder: Path
    name: str
    method: str
    source: str | None
    public: PublicFiles | None = None


def weights_name(method: str, source: str | None, sources: tuple[str, ...]) -> str:
    """Folder name of a method's weights: `method-source` if the method has several sources, else `method`."""
    return f"{method}-{source}" if source and len(sources) > 1 else method


def shipped(root: Path | None = None) -> dict[str, list[str]]:
    """Shipped weights, set name -> names of the checkpoints in it."""
    root = root or WEIGHTS_ROOT
    if not root.is_dir():
        return {}
    found = {
        folder.name: sorted(child.name for child in folder.iterdir() if (child / CONFIG_FILE).is_file())
        for folder in sorted(root.iterdir())
        if folder.is_dir()
    }
    return {name: names for name, names in found.items() if names}


def find(
    method: str,
    source: str | None,
    sources: tuple[str, ...],
    checkpoint: str | None,
    task: str | None,
    root: Path | None = None,
    trust_pickle: bool = False,
    sampler: str | None = None,
) -> Checkpoint:
    """The folder a request for weights means.

    Args:
        method: name of the method.
        source: the source it starts from, or None.
        sources: all sources the method has.
        checkpoint: what the user typed, or None for the task's shipped weights.
        task: name of the task.
        root: where shipped sets lie; None = the package's own.
        trust_pickle: the user allows published weights to be pickles.
        sampler: the method that samples, if it is not `method`; some published weights are its own (`public`).

    Raises:
        UsageError: a name that cannot be a name.
        CheckpointError: nothing there; the message says what exists and what to type.
    """
    name = weights_name(method, source, sources)
    if checkpoint is None:
        own = TRAINED / f"train-{task}" / name
        if task is not None and _is_set_name(task) and task not in shipped(root) and _is_checkpoint(own):
            return Checkpoint(own, str(own), method, source)
        return _from_set(task or "sotu", name, method, source, root or WEIGHTS_ROOT, asked=None)
    if not checkpoint.strip() or "\0" in checkpoint:
        raise UsageError("an empty checkpoint name; leave --checkpoint out for the shipped weights")
    if checkpoint.startswith("hf:") or _is_public(checkpoint):
        return _find_public(checkpoint, _published_as(method, sampler), source, trust_pickle)
    path = Path(checkpoint).expanduser()
    if _is_set_name(checkpoint) and not path.exists():
        return _from_set(checkpoint, name, method, source, root or WEIGHTS_ROOT, asked=checkpoint)
    if _is_set_name(checkpoint) and checkpoint in shipped(root) and not _is_checkpoint(path / name):
        return _from_set(checkpoint, name, method, source, root or WEIGHTS_ROOT, asked=checkpoint)
    return Checkpoint(_folder_of(path, name, method), str(checkpoint), method, source)


def _is_public(checkpoint: str) -> bool:
    from tsdfm_bench.methods.public import files

    return files.is_public(Path(files.split_choice(checkpoint)[0]).expanduser())


def _published_as(method: str, sampler: str | None) -> str:
    from tsdfm_bench.methods.public.conventions import METHODS

    return sampler if sampler is not None and any(sampler in names for names in METHODS.values()) else method


def _find_public(checkpoint: str, method: str, source: str | None, trust_pickle: bool) -> Checkpoint:
    from tsdfm_bench.methods.public import files

    typed, choice = files.split_choice(checkpoint)
    if typed.startswith("hf:"):
        found = files.from_hub(typed, choice, method, trust_pickle)
    else:
        found = files.local(Path(typed).expanduser(), choice, method, trust_pickle)
    name = f"{found.name}#{choice}" if choice else found.name
    return Checkpoint(found.weights[0].parent, name, method, source, found)


def identify(checkpoint: Checkpoint) -> Identity:
    """Name and sha256 of a checkpoint's files; the hash of a file is remembered until the file changes.

    Published weights: the files' hashes, and which network of them is taken.

    Raises:
        CheckpointError: a file cannot be read; or published weights that are known to be another method's.
    """
    digest = hashlib.sha256()
    public = checkpoint.public
    paths = [checkpoint.folder / CONFIG_FILE, checkpoint.folder / WEIGHTS_FILE]
    if public is not None:
        from tsdfm_bench.methods.public import loader

        loader.check_method(public, checkpoint.method)
        digest.update(f"public {public.choice}\n".encode())
        paths = [*([public.config] if public.config else []), *public.weights]
    for path in paths:
        try:
            stat = path.stat()
            digest.update(f"{path.name} {_file_hash(str(path), stat.st_mtime_ns, stat.st_size)}\n".encode())
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    return Identity(checkpoint.name, f"sha256:{digest.hexdigest()}")


def read_config(checkpoint: Checkpoint, vocab_size: int | None = None) -> dict[str, Any]:
    """`config.json`, checked against what it is wanted for.

    Args:
        checkpoint: from `find`.
        vocab_size: V of the task, or None if unknown.

    Raises:
        CheckpointError: damaged, of another method or source, or for another vocabulary.
    """
    if checkpoint.public is not None:
        from tsdfm_bench.methods.public import loader

        return loader.read(checkpoint.public, checkpoint.method, checkpoint.source, vocab_size)[0]
    path = checkpoint.folder / CONFIG_FILE
    config = read_folder(checkpoint.folder)
    if config.get("architecture") not in ARCHITECTURES:
        raise CheckpointError(
            f"{path}: unknown architecture '{config.get('architecture')}'; known: {', '.join(ARCHITECTURES)}"
        )
    for key, wanted in (("method", checkpoint.method), ("source", checkpoint.source)):
        written = config.get(key)
        if written is not None and wanted is not None and written != wanted:
            raise CheckpointError(
                f"{checkpoint.folder} holds weights of {key} '{written}', asked for '{wanted}';"
                f" choose --{key}s {written}, or other weights"
            )
    _check_vocabulary(path, config["network"], checkpoint.source, vocab_size)
    return config


def load_network(
    checkpoint: Checkpoint, device: str, vocab_size: int | None = None
) -> tuple[nn.Module, dict[str, Any]]:
    """The network of a checkpoint, in eval mode on `device`, and its configuration.

    Raises:
        CheckpointError: as `read_config`, or tensors that are missing, damaged or do not fit.
    """
    if checkpoint.public is not None:
        from tsdfm_bench.methods.public import loader

        return loader.load(checkpoint.public, checkpoint.method, checkpoint.source, vocab_size, device)
    config = read_config(checkpoint, vocab_size)
    module, name = ARCHITECTURES[config["architecture"]]
    network: nn.Module = getattr(import_module(module), name).from_pretrained(checkpoint.folder, device)
    return network, config


def _is_set_name(text: str) -> bool:
    return _NAME.fullmatch(text) is not None and not text.endswith(".safetensors")


def _is_checkpoint(folder: Path) -> bool:
    return (folder / CONFIG_FILE).is_file()


def _from_set(set_name: str, name: str, method: str, source: str | None, root: Path, asked: str | None) -> Checkpoint:
    if not _is_set_name(set_name):
        raise UsageError(f"'{set_name}' cannot be the name of a set of weights: letters, digits, . _ - only")
    folder = root / set_name / name
    if _is_checkpoint(folder):
        return Checkpoint(folder, f"{set_name}/{name}", method, source)
    sets = shipped(root)
    if set_name in sets:
        message = f"the shipped weights '{set_name}' have no '{name}'; they have: {', '.join(sets[set_name])}."
    elif asked is None:
        message = f"no weights are shipped for task '{set_name}' ({_listed(sets)})."
    else:
        close = nearest(set_name, sets)
        message = f"no checkpoint '{asked}': neither a file or folder nor a shipped set ({_listed(sets)})."
        if close:
            message += f" Did you mean '{close[0]}'?"
    raise CheckpointError(f"{message} Train them (tsdfm-bench train {set_name}) or give --checkpoint FOLDER.")


def _listed(sets: Mapping[str, list[str]]) -> str:
    return f"shipped: {', '.join(sets)}" if sets else "none is shipped"


def _folder_of(path: Path, name: str, method: str) -> Path:
    if not path.exists():
        raise CheckpointError(
            f"no such checkpoint: {path}. Give a folder with {CONFIG_FILE} and {WEIGHTS_FILE}, or leave"
            f" --checkpoint out for the shipped weights ({_listed(shipped())})"
        )
    if path.is_file():
        if path.suffix != ".safetensors":
            raise CheckpointError(f"{path} is not a weight file: .safetensors, or published .bin, .pt, .pth, .ckpt")
        if path.name != WEIGHTS_FILE:
            raise CheckpointError(
                f"{path}: the weight file must be called {WEIGHTS_FILE}, with its {CONFIG_FILE} beside it"
            )
        path = path.parent
    for folder in (path, path / name):
        if _is_checkpoint(folder):
            if not (folder / WEIGHTS_FILE).is_file():
                raise CheckpointError(f"no {WEIGHTS_FILE} in {folder}; restore it or train {method} again")
            return folder
    inside = sorted(child.name for child in path.iterdir() if _is_checkpoint(child))
    has = f"it has: {', '.join(inside)}" if inside else f"it has no {CONFIG_FILE}"
    raise CheckpointError(
        f"{path} holds no weights called '{name}' ({has}); a checkpoint is {CONFIG_FILE} and {WEIGHTS_FILE}"
    )


def _check_vocabulary(path: Path, network: Mapping[str, Any], source: str | None, vocab_size: int | None) -> None:
    written = network.get("vocab_size")
    if not isinstance(written, int):
        raise CheckpointError(f"{path}: network.vocab_size is missing")
    if vocab_size is not None and written != vocab_size:
        raise CheckpointError(
            f"{path}: these weights know {written} tokens, the task has {vocab_size}; train on this task, or choose the"
            " task they were trained on"
        )
    outputs = network.get("outputs", written)
    wanted = written + 1 if source == "mask" else written
    if outputs != wanted:
        raise CheckpointError(
            f"{path}: the network has {outputs} outputs; with source '{source}' and {written} tokens it must have"
            f" {wanted}"
        )


@lru_cache(maxsize=256)
def _file_hash(path: str, mtime_ns: int, size: int) -> str:
    digest = hashlib.sha256()
    with Path(path).open("rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
