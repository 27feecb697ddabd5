"""Where published weights are: a file, a folder, the local hub cache, the hub.

    hf:OWNER/NAME                   the newest revision (the cached one, if there is one)
    hf:OWNER/NAME@REVISION          a branch, tag or commit; SDTT keeps one model per revision
    hf:OWNER/NAME:FILE              one file of several
    FILE or FOLDER                  a local one
    ...#ema                         which network of the file: model, student, ema, teacher (`containers`)

safetensors are preferred; a pickle is fetched only if the user allows pickles. `TSDFM_BENCH_OFFLINE=1` and
`HF_HUB_OFFLINE=1` forbid the network.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from tsdfm_bench.errors import CheckpointError, UsageError, hub_reason

PICKLES = (".bin", ".pt", ".pth", ".ckpt")
SUFFIXES = (".safetensors", *PICKLES)
CHOICES = ("model", "student", "ema", "teacher")
CONFIG_FILE = "config.json"
INDEX_FILE = "model.safetensors.index.json"
# Files of FS-DFM's repository: one per method, under changing names.
_FILE_OF_METHOD = {
    "dfm": ("DFM_checkpoint.pth", "checkpoint.pth"),
    "fsdfm": ("FS_DFM_checkpoint.pth", "checkpoint_step_*.pth"),
}
_FILE_OF_METHOD["tsdfm"] = _FILE_OF_METHOD["fsdfm"]
_HUB = re.compile(
    r"hf:(?P<name>[\w-][\w.-]*/[\w-][\w.-]*)(?:@(?P<revision>[\w-][\w./-]*))?(?::(?P<file>[\w-][\w./-]*))?"
)
_HUB_SETTINGS = ("*.json", "*.yaml")


@dataclass(frozen=True)
class PublicFiles:
    """Published weights, found.

    Args:
        name: as typed, with the hub's commit.
        weights: one file, or the parts of a sharded one.
        config: the configuration beside it, or None.
        choice: which network of the file, "" for the default.
        trust_pickle: the user allows pickles.
    """

    name: str
    weights: tuple[Path, ...]
    config: Path | None
    choice: str = ""
    trust_pickle: bool = False

    def published(self) -> Mapping[str, Any]:
        """The configuration file, or {}; raises CheckpointError if it is damaged."""
        if self.config is None:
            return {}
        try:
            loaded = json.loads(self.config.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise CheckpointError(f"{self.config} is damaged ({error}); fetch it again") from error
        return loaded if isinstance(loaded, Mapping) else {}


def refuse_pickle(file: Path) -> CheckpointError:
    """What to say about a pickle that the user has not allowed."""
    return CheckpointError(
        f"{file.name} is a pickle, and a pickle can hold a program. If you trust where it comes from, add "
        "--trust-pickle (it is then read with torch's restricted reader, weights_only=True); better, give a "
        ".safetensors file"
    )


def is_public(path: Path) -> bool:
    """Whether a path is published weights: a weight file, or a folder of some, without a configuration of ours."""
    if path.is_file():
        return path.suffix in SUFFIXES and not _is_ours(path.parent / CONFIG_FILE)
    return path.is_dir() and not _is_ours(path / CONFIG_FILE) and bool(weight_files(path))


def _is_ours(config: Path) -> bool:
    """Whether a configuration is one of ours: damaged ones count as ours, so that they are reported as damaged."""
    if not config.is_file():
        return False
    try:
        loaded = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return True
    foreign = ("model_type", "architectures", "auto_map", "model", "graph", "algo", "backbone")
    return not isinstance(loaded, dict) or "network" in loaded or not any(key in loaded for key in foreign)


def split_choice(typed: str) -> tuple[str, str]:
    """`FILE#ema` as ("FILE", "ema"), a path that exists as it is; raises UsageError for an unknown choice."""
    name, mark, choice = typed.rpartition("#")
    if not mark or (not typed.startswith("hf:") and Path(typed).expanduser().exists()):
        return typed, ""
    if choice not in CHOICES:
        raise UsageError(
            f"'#{choice}' chooses no network of a checkpoint; known: {', '.join('#' + c for c in CHOICES)}"
        )
    return name, choice


def local(path: Path, choice: str, method: str, trust_pickle: bool) -> PublicFiles:
    """Published weights on this machine.

    Raises:
        CheckpointError: several files and none chosen.
    """
    folder = path if path.is_dir() else path.parent
    files = _chosen(weight_files(path), method, str(path)) if path.is_dir() else (path,)
    config = folder / CONFIG_FILE
    return PublicFiles(str(path), files, config if config.is_file() else None, choice, trust_pickle)


def weight_files(folder: Path) -> list[Path]:
    """Weight files directly in a folder, by name."""
    return sorted(file for file in folder.iterdir() if file.suffix in SUFFIXES and file.is_file())


def _chosen(files: Sequence[Path], method: str, where: str) -> tuple[Path, ...]:
    safe = [file for file in files if file.suffix == ".safetensors"]
    if safe and (safe[0].parent / INDEX_FILE).is_file():
        return tuple(_shards(safe[0].parent / INDEX_FILE))
    for candidates in (safe, list(files)):
        if len(candidates) == 1:
            return (candidates[0],)
        named = [file for file in candidates if _is_one_of(file, _FILE_OF_METHOD.get(method, ()))]
        if len(named) == 1:
            return (named[0],)
        if candidates:
            names = ", ".join(file.name for file in candidates)
            raise CheckpointError(f"{where} has several weight files ({names}); name one of them")
    raise CheckpointError(f"{where} has no weight file ({', '.join(SUFFIXES)})")


def _is_one_of(file: Path, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(file.name, pattern) for pattern in patterns)


def _is_of_another(file: Path, method: str) -> bool:
    """Whether a file's name is that of another method in a repository with one file per method."""
    own = _FILE_OF_METHOD.get(method)
    return own is not None and any(_is_one_of(file, names) for names in _FILE_OF_METHOD.values() if names != own)


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is damaged ({error}); fetch it again") from error
    if any(Path(name).name != name for name in names):
        raise CheckpointError(f"{index} names files outside of its folder")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise CheckpointError(f"{index.parent} is incomplete: {', '.join(missing[:3])} missing")
    return [index.parent / name for name in names]


# ------------------------------------------------------------------------------------------------------- the hub


def from_hub(typed: str, choice: str, method: str, trust_pickle: bool) -> PublicFiles:
    """Published weights of a hub repository, fetched if they are not in the local hub cache.

    Raises:
        UsageError: the name cannot be read.
        CheckpointError: listing what was tried and what to type.
    """
    match = _HUB.fullmatch(typed)
    if match is None or ".." in typed:
        raise UsageError(f"cannot read '{typed}': write hf:OWNER/NAME, hf:OWNER/NAME@REVISION or hf:OWNER/NAME:FILE")
    name, revision, file = match["name"], match["revision"], match["file"]
    tried = []
    for place, fetch in (("local hub cache", False), ("model hub", True)):
        try:
            folder = _snapshot(name, revision, file, method, trust_pickle, fetch)
            files = (folder / file,) if file else _chosen(weight_files(folder), method, typed)
            if not files[0].is_file():
                raise FileNotFoundError(f"has no {file}")
            if not fetch and not file and _is_of_another(files[0], method):
                raise FileNotFoundError(f"has no file of '{method}', only {files[0].name}")
            config = folder / CONFIG_FILE
            found = f"hf:{name}@{folder.name[:12]}" + (f":{file}" if file else "")
            return PublicFiles(found, files, config if config.is_file() else None, choice, trust_pickle)
        except CheckpointError as error:
            if fetch:
                raise
            tried.append(f"  {place}: {error}")
        except Exception as error:  # every kind of "not from there", whatever the version of the client
            tried.append(f"  {place}: {hub_reason(error, name, revision)}")
    advice = "Fetch it where there is a network (hf download " + name + (f" --revision {revision}" if revision else "")
    advice += " --local-dir FOLDER) and give --checkpoint FOLDER"
    raise CheckpointError(f"could not obtain the checkpoint '{typed}'. Tried:\n" + "\n".join(tried) + f"\n{advice}")


def _snapshot(name: str, revision: str | None, file: str | None, method: str, trust_pickle: bool, fetch: bool) -> Path:
    """The folder of a repository's snapshot with its weights."""
    from huggingface_hub import HfApi, snapshot_download

    if not fetch:
        return Path(snapshot_download(name, revision=revision, local_files_only=True))
    if os.environ.get("TSDFM_BENCH_OFFLINE", "").strip().lower() in {"1", "true", "yes", "on"}:
        raise ConnectionError("TSDFM_BENCH_OFFLINE is set")
    names = HfApi().list_repo_files(name, revision=revision)
    if file is not None and file not in names:
        raise FileNotFoundError(f"has no {file}; it has: {', '.join(n for n in names if n.endswith(SUFFIXES))}")
    top = [Path(n) for n in names if "/" not in n and n.endswith(SUFFIXES)]
    safe = [path.name for path in top if path.suffix == ".safetensors"]
    wanted = [file] if file else safe or [path.name for path in _chosen(top, method, name)]
    if wanted[0].endswith(PICKLES) and not trust_pickle:
        raise refuse_pickle(Path(wanted[0]))
    return Path(snapshot_download(name, revision=revision, allow_patterns=[*wanted, *_HUB_SETTINGS]))
