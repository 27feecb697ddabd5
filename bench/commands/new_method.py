"""`tsdfm-bench new-method`: a package with a working method, to be changed into one's own.

What it writes installs with pip, passes `tsdfm-bench conform`, and carries its own test and README. Names are checked
before anything is written: a method has to be a distribution name (PEP 503), a module and a class at once.
"""

from __future__ import annotations

import keyword
import re
from importlib.resources import files
from pathlib import Path

from tsdfm_bench.errors import UsageError, nearest
from tsdfm_bench.registry import Registry

LICENCES = ("Apache-2.0", "MIT", "BSD-3-Clause", "none")
PREFIX = "tsdfm-bench-"
_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
_LONGEST = 40


def new_method_command(name: str, out: Path | None, licence: str, holder: str) -> int:
    """Write the package and say what to type next.

    Args:
        name: of the method.
        out: folder to make it in; None = the working folder.
        licence: SPDX name, or "none".
        holder: who holds the copyright; "" = "the authors of NAME".

    Raises:
        UsageError: a name or licence that cannot be, or a folder that exists.
    """
    check_name(name)
    if licence not in LICENCES:
        close = nearest(licence, LICENCES)
        hint = f"; did you mean '{close[0]}'?" if close else ""
        raise UsageError(f"no licence '{licence}' here{hint} Known: {', '.join(LICENCES)}.")
    if "\n" in holder or '"' in holder:
        raise UsageError("the copyright holder is one line without quotes")
    folder = (out or Path()) / f"{PREFIX}{name}"
    if folder.exists() or folder.is_symlink():
        raise UsageError(f"{folder} exists already: choose another name or --out folder")
    try:
        for path, text in package_files(name, licence, holder or f"the authors of {name}").items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write {error.filename or folder}: {error.strerror}") from None
    print(f"{folder}: an installable package whose method '{name}' samples (noise, until it has a network)\n")
    print("Next:")
    for line in (
        f"pip install -e {folder}",
        f"tsdfm-bench conform {name}",
        f"tsdfm-bench run --methods {name} --steps 8",
    ):
        print(f"  {line}")
    print(f"\nThe sampler and the network to replace: {folder / 'src' / module_of(name) / 'method.py'}")
    return 0


def check_name(name: str) -> None:
    """Raise `UsageError` unless the name can be a method, a distribution and a module."""
    if not _NAME.fullmatch(name) or len(name) > _LONGEST:
        tidy = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-0123456789")[:_LONGEST].strip("-")
        hint = f", for example '{tidy}'" if _NAME.fullmatch(tidy) else ""
        raise UsageError(
            f"'{name[:60]}' cannot name a method: small letters, digits and single hyphens, a letter first, at most "
            f"{_LONGEST}{hint}"
        )
    if keyword.iskeyword(name):
        raise UsageError(f"'{name}' is a word of Python's own and cannot name a method; try '{name}-method'")
    taken = [entry for entry in Registry().entries("methods") if entry.name == name]
    if taken:
        raise UsageError(
            f"method '{name}' exists already, in {taken[0].owner}: two of one name cannot be used together"
        )


def module_of(name: str) -> str:
    """Name of the import package."""
    return f"tsdfm_bench_{name.replace('-', '_')}"


def package_files(name: str, licence: str, holder: str) -> dict[str, str]:
    """Path inside the package -> text."""
    module = module_of(name)
    free = licence == "none"
    words = {
        "NAME": name,
        "DISTRIBUTION": f"{PREFIX}{name}",
        "MODULE": module,
        "CLASS": "".join(part.capitalize() for part in name.split("-")),
        "LICENCE_FIELD": "" if free else f'license = "{licence}"\n',
        "LICENCE_NOTE": "" if free else f"\n## Licence\n\n{licence}, {holder}. Put its text into a file `LICENSE`.",
        "HEADER": "" if free else f"# SPDX-FileCopyrightText: {holder}\n# SPDX-License-Identifier: {licence}\n",
    }
    places = {
        "pyproject.toml": "pyproject.toml.in",
        "README.md": "README.md.in",
        f"src/{module}/method.py": "method.py.in",
        f"tests/test_{module}.py": "test_method.py.in",
    }
    templates = files("tsdfm_bench") / "template"
    written = {path: _filled((templates / source).read_text("utf-8"), words) for path, source in places.items()}
    about = f'{words["HEADER"]}"""The method `{name}` for tsdfm-bench."""\n'
    return written | {f"src/{module}/__init__.py": about, f"src/{module}/py.typed": ""}


def _filled(text: str, words: dict[str, str]) -> str:
    return re.sub(r"@([A-Z_]+)@", lambda match: words[match[1]], text).rstrip() + "\n"
