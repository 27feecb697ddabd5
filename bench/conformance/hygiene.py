"""Manners: a method changes nothing but its own memory.

It shares a process, a working folder and a terminal with the harness and with every other method of the run. What it
prints would end up in tables and JSON, what it seeds would make others repeat themselves, what it writes would survive
the run. Files and pickles are watched through Python's audit events (PEP 578), which see every `open`, however it is
reached.
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from tsdfm_bench.conformance.report import Failed
from tsdfm_bench.conformance.subject import Broke, Refused, Subject, require, stir

_WRITES = {
    "os.remove": (0,),
    "os.rename": (0, 1),
    "os.mkdir": (0,),
    "os.rmdir": (0,),
    "os.truncate": (0,),
    "os.symlink": (1,),
    "os.link": (1,),
    "shutil.move": (1,),
    "shutil.copyfile": (1,),
}
_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

_listeners: list[Callable[[str, tuple[Any, ...]], None]] = []
_installed = False


@contextmanager
def audited(listener: Callable[[str, tuple[Any, ...]], None]) -> Iterator[None]:
    """Hear every audit event inside the block; one hook is installed once, since it cannot be removed."""
    global _installed
    if not _installed:
        sys.addaudithook(_dispatch)
        _installed = True
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def _dispatch(event: str, args: tuple[Any, ...]) -> None:
    for listener in _listeners:
        listener(event, args)


# ------------------------------------------------------------------------------------------------ global state


def state(subject: Subject) -> str:
    """Random generators and settings of torch, numpy and Python are as before."""
    import torch

    stir()
    seed, before = torch.initial_seed(), settings()
    method = subject.load()
    require(torch.initial_seed() == seed, "load() seeds torch's global generator (torch.manual_seed)")
    _unchanged(before, settings(), "load()")
    before = settings() | generators()
    subject.serve(subject.request(), method)
    _unchanged(before, settings() | generators(), "sample()")
    return "random generators, precision, threads and grad mode are as before"


def settings() -> dict[str, object]:
    """Global settings of torch that a method could change for everybody."""
    import torch

    return {
        "the default dtype": torch.get_default_dtype(),
        "the number of threads": torch.get_num_threads(),
        "grad mode": torch.is_grad_enabled(),
        "deterministic mode": torch.are_deterministic_algorithms_enabled(),
        "the fp32 matmul precision": torch.get_float32_matmul_precision(),
        "the default device": str(torch.get_default_device()),
        "anomaly detection": torch.is_anomaly_enabled(),
    }


def generators() -> dict[str, object]:
    """States of the global random generators."""
    import numpy as np
    import torch

    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "torch's global generator": torch.get_rng_state().numpy().tobytes(),
        "numpy's global generator": (name, np.asarray(keys).tobytes(), *rest),
        "Python's global generator": random.getstate(),
    }


def _unchanged(before: dict[str, object], after: dict[str, object], who: str) -> None:
    changed = [name for name, value in before.items() if after[name] != value]
    require(not changed, f"{who} changes {', '.join(changed)}; draw from request.streams, leave settings alone")


# ------------------------------------------------------------------------------------------------------- files


def files(subject: Subject) -> str:
    """Nothing is written outside the run folder; `load` may fill the usual caches."""
    run_folder = Path.cwd()
    allowed = [run_folder, Path(tempfile.gettempdir())]
    written: list[Path] = []

    def listen(event: str, args: tuple[Any, ...]) -> None:
        written.extend(_touched(event, args))

    with audited(listen):
        method = subject.load()
    loaded, written = written, []
    with audited(listen):
        try:
            subject.serve(subject.request(), method)
        except (Refused, Broke) as error:
            raise Failed(str(error)) from None
    for who, paths, also in (("load()", loaded, _caches()), ("sample()", written, [])):
        for path in paths:
            inside = any(path.is_relative_to(folder.resolve()) for folder in [*allowed, *also])
            require(inside or "__pycache__" in path.parts, f"{who} writes {path}, outside the run folder")
    return "nothing is written outside the run folder"


def _touched(event: str, args: tuple[Any, ...]) -> Iterator[Path]:
    """What an audit event writes."""
    if event == "open":
        path, mode, flags = args
        writes = isinstance(mode, str) and any(letter in mode for letter in "wax+")
        if writes or (mode is None and isinstance(flags, int) and flags & _FLAGS):
            yield from _resolved(path)
    elif event in _WRITES:
        for place in _WRITES[event]:
            yield from _resolved(args[place])


def _resolved(path: object) -> Iterator[Path]:
    if isinstance(path, bytes):
        path = os.fsdecode(path)
    if isinstance(path, str | os.PathLike) and not str(path).startswith(("/dev/", "/proc/", "/sys/")):
        yield Path(path).resolve()


def _caches() -> list[Path]:
    """Folders in which libraries keep what they have fetched or compiled."""
    named = ("XDG_CACHE_HOME", "HF_HOME", "HF_HUB_CACHE", "TORCH_HOME", "TSDFM_BENCH_CACHE", "MPLCONFIGDIR")
    found = [Path(os.environ[name]) for name in named if os.environ.get(name)]
    return [*found, Path.home() / ".cache", Path.home() / "Library" / "Caches"]


# ----------------------------------------------------------------------------------------------------- process


def process(subject: Subject) -> str:
    """It prints nothing, and working folder and environment stay as they are."""
    cwd, environment = Path.cwd(), dict(os.environ)
    with _captured() as captured:
        try:
            method = subject.load()
            after_load = (Path.cwd(), dict(os.environ))
            subject.serve(subject.request(), method)
        finally:
            after = (Path.cwd(), dict(os.environ))
            os.chdir(cwd)
    for who, (folder, _) in (("load()", after_load), ("sample()", after)):
        require(folder == cwd, f"{who} changes the working folder, to {folder}")
    changed = sorted(key for key in {**after_load[1], **after[1]} if after_load[1].get(key) != after[1].get(key))
    require(not changed, f"sample() changes the environment: {', '.join(changed)}")
    told = sorted(key for key in environment if environment[key] != after_load[1].get(key))
    require(not told, f"load() changes environment variables that were set: {', '.join(told)}")
    printed = captured[0].strip()
    first = printed.splitlines()[0][:80] if printed else ""
    require(not printed, f"it prints to stdout, where tables and JSON go: {first!r}")
    return "prints nothing to stdout, working folder and environment are as before"


@contextmanager
def _captured() -> Iterator[list[str]]:
    """What is printed to stdout inside the block, by Python or below it."""
    out: list[str] = []
    sys.stdout.flush()
    kept = os.dup(1)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 1)
        python = open(os.dup(file.fileno()), "w", encoding="utf-8", errors="replace")  # noqa: PTH123, SIM115 - an fd
        try:
            with python, redirect_stdout(python):
                yield out
        finally:
            os.dup2(kept, 1)
            os.close(kept)
            file.seek(0)
            out.append(file.read().decode("utf-8", "replace"))


# ------------------------------------------------------------------------------------------------------ pickle


def pickles(subject: Subject) -> str:
    """Nothing is unpickled: a pickle can run any code when it is read."""
    found: list[str] = []

    def listen(event: str, args: tuple[Any, ...]) -> None:
        if event == "pickle.find_class":
            found.append(".".join(map(str, args)))

    with audited(listen):
        method = subject.load()
        subject.serve(subject.request(), method)
    what = f"it reads a pickle (which asks for {found[0]}); keep weights in safetensors, arrays in NPZ" if found else ""
    require(not found, what)
    return "nothing is unpickled while loading and sampling"
