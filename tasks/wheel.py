"""Fetch the wheel of a pinned requirement, going on where an earlier transfer broke off.

Run as a script, in a process of its own, by `tsdfm_bench.tasks.download`:

    python -P wheel.py NAME==VERSION FOLDER RESUMES TIMEOUT_S

pip finds the file and brings its session, so that the user's index, mirrors, proxies, certificates and credentials
hold; only the transfer is ours, because most versions of pip begin again where one breaks off. A transfer that is not
complete stays in FOLDER as FILE.part. Exit codes: 0 the wheel is in FOLDER; 1 the transfer broke off, the last line of
stderr says why; 3 pip itself has to be asked (`pip download`): it finds no such wheel and knows best why, or it has
other insides than those known here.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Any

ASK_PIP = 3
CHUNK = 1 << 18


class Broken(Exception):
    """A transfer broke off."""


def transfer(session: Any, url: str, part: Path, timeout_s: float) -> None:
    """Append what is missing to a file; from its start if the server does not know of parts.

    Raises:
        Broken: it is not complete.
    """
    have = part.stat().st_size if part.exists() else 0
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    try:
        with session.get(url, headers=headers, stream=True, timeout=timeout_s) as answer:
            if have and answer.status_code == 416:  # nothing is missing, or the file is another one: the hash knows
                return
            answer.raise_for_status()
            if answer.status_code != 206:
                have = 0
            length = answer.headers.get("Content-Length")
            with part.open("ab" if have else "wb") as file:
                for chunk in answer.iter_content(CHUNK):
                    file.write(chunk)
    except OSError as error:  # what requests raises is one, and so is a disk that is full
        raise Broken(f"{type(error).__name__}: {error}") from error
    got = part.stat().st_size
    if length is not None and got != have + int(length):
        raise Broken(f"it ended after {got} of {have + int(length)} bytes")


def fetch(requirement: str, folder: Path, resumes: int, timeout_s: float) -> None:
    """Fetch the wheel of "name==version" into a folder.

    Raises:
        Broken: not complete after so many resumptions, or not what the index announced.
        LookupError: pip finds no such wheel.
    """
    from pip._internal.commands import create_command
    from pip._vendor.packaging.specifiers import SpecifierSet  # of pip's own, as its finder wants it

    name, _, version = requirement.partition("==")
    command: Any = create_command("download")
    asked = ["--only-binary", ":all:", "--no-input", "--no-deps", "--timeout", f"{timeout_s:g}", "--retries", "1"]
    options, _ = command.parse_args([*asked, requirement])
    with command.main_context():
        session = command.get_default_session(options)
        finder = command._build_package_finder(options, session)
        found = finder.find_best_candidate(name, SpecifierSet(f"=={version}")).best_candidate
        if found is None or not found.link.is_wheel:
            raise LookupError(f"no matching distribution found for {requirement}")
        link = found.link
        part = folder / f"{link.filename}.part"
        for attempt in range(resumes + 1):
            try:
                transfer(session, link.url_without_fragment, part, timeout_s)
                break
            except Broken:
                if attempt == resumes:
                    raise
        if link.hash_name in hashlib.algorithms_guaranteed and not _matches(part, link.hash_name, link.hash):
            part.unlink()
            raise Broken(f"{link.filename} is not what the index announced: its {link.hash_name} differs")
        part.replace(folder / link.filename)


def _matches(file: Path, algorithm: str, wanted: str) -> bool:
    with file.open("rb") as content:
        return hashlib.file_digest(content, algorithm).hexdigest() == wanted


def main(arguments: list[str]) -> int:
    """The script; returns its exit code."""
    requirement, folder, resumes, timeout_s = arguments
    try:
        fetch(requirement, Path(folder), int(resumes), float(timeout_s))
    except Broken as error:
        print(f"ERROR: {error}", file=sys.stderr)
        return 1
    except Exception as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return ASK_PIP
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
