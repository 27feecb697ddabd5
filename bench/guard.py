"""What a plug-in may not do to the rest of a run while one of its cells is worked on, and what is done about it.

    hang            a time limit per cell, by SIGALRM in the main thread; a call that never returns to Python cannot be
                    interrupted and ends the process after a grace period (the next item)
    end the process sys.exit and os._exit become a failure of the cell. A process that dies all the same (a crash in
                    native code, the system's out-of-memory killer, a power cut) leaves its mark in the cell's folder;
                    the same command tries the cell again, and if the process dies there a third time without having
                    finished a batch, the command after that records a failure and does the other cells
    print           what it prints goes to cells/<ab>/<id>/printed.txt, so that stdout is the run's own
    ask             its stdin is at its end: `input()` fails instead of waiting for an answer to a question nobody saw
    change state    working directory, environment, default dtype and device, threads, grad mode, seeds of torch, numpy
                    and random, signal handlers are put back, and the change is noted

Notes are kept in the cell's folder and shown under the table. Where plug-in code runs for no cell (its import, the
identity of its weights, timing, scoring, metrics) the same holds but for the time limit, and stderr takes what is
printed and noted: `shielded`.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import random
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from tsdfm_bench.errors import PluginError
from tsdfm_bench.launch.leases import process_start, this_host
from tsdfm_bench.results.store import CorruptFile, RunFolder, read_json, remove, write_json

MOST_DEATHS = 3
GRACE_S = 30.0
PRINTED, NOTES, ATTEMPT = "printed.txt", "notes.json", "attempt.json"


class TimeLimit(BaseException):
    """The cell's time is over; no Exception, so that a plug-in's `except Exception` does not catch it."""


class ProcessDied(PluginError):
    """The process died in this cell again and again; not a verdict for ever, so the next command tries again."""

    passing = True


@contextlib.contextmanager
def guarded(
    folder: RunFolder, cell: str, limit_s: float | None = None, counted: bool = True, shard: int = 0
) -> Iterator[None]:
    """Run a plug-in's code for one cell.

    Args:
        folder: the run folder.
        cell: its id.
        limit_s: seconds it may take, or None.
        counted: it is the sampling itself; False for loading and warming up, whose mark the first cell takes over.
        shard: which part of the cell; another process may be at another one.

    Raises:
        PluginError: the time is over, or the process died here before, again and again.
    """
    home = folder.cell_folder(cell)
    home.mkdir(parents=True, exist_ok=True)
    mark = home / (ATTEMPT if shard == 0 else f"attempt-{shard:04d}.json")
    if counted:
        for name in (NOTES, PRINTED):
            remove(home / name)
    _begin(folder, cell, mark)
    notes: list[str] = []
    outer = _notes[:]
    _notes.clear()
    try:
        with _printed_to(home / PRINTED), _no_input(), contained(), _no_exit(), _limited(limit_s):
            yield
    except TimeLimit:
        remove(mark)
        raise PluginError(
            f"it took longer than the {limit_s:g} seconds a cell may take (--cell-timeout); finished batches are kept"
        ) from None
    except BaseException:
        remove(mark)
        raise
    else:
        if counted:
            remove(mark)
    finally:
        with contextlib.suppress(OSError):
            if (home / PRINTED).exists() and (home / PRINTED).stat().st_size == 0:
                remove(home / PRINTED)
            elif (home / PRINTED).exists():
                notes.append(f"printed while it was sampled: see {PRINTED} in {home.relative_to(folder.root)}")
        notes += _notes
        _notes[:] = outer
        if notes:
            write_json(home / NOTES, {"notes": sorted(set(notes))}, checksum=False)


def read_notes(folder: RunFolder, cell: str) -> list[str]:
    """What was noted about a cell; empty if nothing was."""
    with contextlib.suppress(FileNotFoundError, CorruptFile):
        notes = read_json(folder.cell_folder(cell) / NOTES, checksum=False).get("notes")
        return [str(note) for note in notes] if isinstance(notes, list) else []
    return []


_seeds: list[int] = []  # those of torch that are the harness's own
_notes: list[str] = []  # of the cell that is worked on
_told: set[str] = set()  # notes that belong to no cell


def seed(value: int) -> None:
    """Seed torch for a batch: a method that draws outside its streams is at least repeatable."""
    import torch

    torch.manual_seed(value)
    _seeds.append(torch.initial_seed())


@contextlib.contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """Whatever is printed inside, by Python or below it, goes to stderr: stdout is for tables and JSON."""
    with contextlib.redirect_stdout(sys.stderr), _descriptor_to(2):
        yield


def is_own(code: object) -> bool:
    """Whether a class, or what is made of one, is this program's own."""
    return str(getattr(code, "__module__", "")).startswith("tsdfm_bench.")


@contextlib.contextmanager
def shielded(who: str, code: object = None) -> Iterator[None]:
    """Run a plug-in's code that belongs to no cell.

    Args:
        who: whose it is, for the note on what was put back.
        code: the class or object whose code it is; if it is one of this program's own, nothing is done.
    """
    if is_own(code):
        yield
        return
    before = len(_notes)
    try:
        with stdout_to_stderr(), _no_input(), contained(""), _no_exit():
            yield
    finally:
        new = {f"{who} {note}." for note in _notes[before:]} - _told
        del _notes[before:]
        _told.update(new)
        for note in sorted(new):
            print(note, file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------------------- deaths


def _begin(folder: RunFolder, cell: str, path: Path) -> None:
    """Leave a mark that only an orderly end removes; ProcessDied if such marks were found too often."""
    completed = len(folder.completed_batches(cell))
    deaths = 0
    with contextlib.suppress(CorruptFile):
        before = read_json(path, checksum=False) if path.exists() else {}
        same = before.get("completed") == completed
        counted = before.get("deaths", 0)
        deaths = counted if same and isinstance(counted, int) else 0
        if before and not _alive(before):
            deaths += 1
    if deaths >= MOST_DEATHS:
        remove(path)
        raise ProcessDied(
            f"the process died {deaths} times while it sampled this cell, with {completed} batches finished: killed "
            "(out of memory?), crashed, or ended by the plug-in; a smaller --batch-size (and another --out) may help"
        )
    here = {"pid": os.getpid(), "started": process_start(os.getpid()), "host": this_host()}
    write_json(path, {**here, "completed": completed, "deaths": deaths}, checksum=False)


def _alive(mark: dict[str, Any]) -> bool:
    """Whether the process of a mark still runs; of another machine nobody knows, and leases keep two workers apart.

    Not one that has its number: the first process of a container has the same one at every start.
    """
    pid, started = mark.get("pid"), mark.get("started")
    return mark.get("host") == this_host() and isinstance(pid, int) and bool(started) and process_start(pid) == started


@contextlib.contextmanager
def _no_exit() -> Iterator[None]:
    """`os._exit` of this process raises SystemExit instead; forked children leave as they must."""
    real, here = os._exit, os.getpid()

    def refuse(status: int) -> NoReturn:
        if os.getpid() != here:
            real(status)
        raise SystemExit(f"os._exit({status}) was called")

    os._exit = refuse
    try:
        yield
    finally:
        os._exit = real


# --------------------------------------------------------------------------------------------------------- time


@contextlib.contextmanager
def _limited(limit_s: float | None) -> Iterator[None]:
    """TimeLimit after so many seconds, again every second in case it is swallowed."""
    main = threading.current_thread() is threading.main_thread()
    if limit_s is None or not hasattr(signal, "SIGALRM") or not main:
        yield
        return

    def ring(number: int, frame: FrameType | None) -> None:
        raise TimeLimit

    before = signal.signal(signal.SIGALRM, ring)
    with contextlib.suppress(ValueError, RuntimeError, OSError):  # a stderr without a descriptor
        faulthandler.dump_traceback_later(limit_s + max(GRACE_S, limit_s), exit=True, file=2)
    signal.setitimer(signal.ITIMER_REAL, limit_s, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, before)


# ---------------------------------------------------------------------------------------------- prints and input


@contextlib.contextmanager
def _printed_to(path: Path) -> Iterator[None]:
    with path.open("a", encoding="utf-8", errors="replace") as file:
        with contextlib.redirect_stdout(file), _descriptor_to(file.fileno()):
            yield
        file.flush()


@contextlib.contextmanager
def _no_input() -> Iterator[None]:
    """stdin is empty, for Python and below it."""
    before = sys.stdin
    with Path(os.devnull).open(encoding="utf-8") as nothing, _descriptor_to(nothing.fileno(), 0):
        sys.stdin = nothing
        try:
            yield
        finally:
            sys.stdin = before


@contextlib.contextmanager
def _descriptor_to(target: int, number: int = 1) -> Iterator[None]:
    """A file descriptor points to another one: for native code, subprocesses and saved references to stdout."""
    stream = sys.__stdout__
    try:
        kept = os.dup(number)
    except OSError:  # the process was started without a stdout, or stdin
        yield
        return
    try:
        if stream is not None:
            stream.flush()
        os.dup2(target, number)
        yield
    finally:
        with contextlib.suppress(OSError, ValueError):
            if stream is not None:
                stream.flush()
        os.dup2(kept, number)
        os.close(kept)


# -------------------------------------------------------------------------------------------------------- state


def _environment() -> dict[str, str]:
    return dict(os.environ)


def _set_environment(wanted: dict[str, str]) -> None:
    for name in set(os.environ) - set(wanted):
        del os.environ[name]
    os.environ.update({name: value for name, value in wanted.items() if os.environ.get(name) != value})


def _handlers() -> dict[int, Any]:
    return {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}


def _set_handlers(wanted: dict[int, Any]) -> None:
    with contextlib.suppress(ValueError, TypeError):  # not the main thread, or a handler of native code
        for number, handler in wanted.items():
            signal.signal(number, handler)


def _working_folder() -> str:
    try:
        return os.getcwd()  # noqa: PTH109 - compared as text
    except FileNotFoundError:
        return ""


def _states() -> dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]]:
    """What is watched: how it is read and how it is put back."""
    import numpy as np
    import torch

    return {
        "working directory": (_working_folder, os.chdir),
        "environment": (_environment, _set_environment),
        "default dtype of torch": (torch.get_default_dtype, torch.set_default_dtype),
        "default device of torch": (
            lambda: str(torch.get_default_device()),
            lambda device: torch.set_default_device(None if device == "cpu" else device),
        ),
        "number of torch threads": (torch.get_num_threads, torch.set_num_threads),
        "grad mode of torch": (torch.is_grad_enabled, torch.set_grad_enabled),
        "fp32 matmul precision of torch": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
        "cuDNN settings of torch": (_cudnn, _set_cudnn),
        "deterministic mode of torch": (_deterministic, lambda wanted: torch.use_deterministic_algorithms(**wanted)),
        "seed of numpy": (lambda: _plain(np.random.get_state()), lambda state: np.random.set_state(_array(state))),
        "seed of random": (random.getstate, random.setstate),
        "signal handlers": (_handlers, _set_handlers),
    }


_CUDNN = ("allow_tf32", "benchmark", "deterministic", "enabled")


def _cudnn() -> dict[str, bool]:
    import torch

    return {name: getattr(torch.backends.cudnn, name) for name in _CUDNN}


def _set_cudnn(wanted: dict[str, bool]) -> None:
    import torch

    for name, value in wanted.items():
        setattr(torch.backends.cudnn, name, value)


def _deterministic() -> dict[str, bool]:
    import torch

    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    return {"mode": torch.are_deterministic_algorithms_enabled(), "warn_only": warns}


def _plain(state: Any) -> tuple[Any, ...]:
    """numpy's generator state as values that can be compared."""
    return (state[0], tuple(state[1].tolist()), *state[2:])


def _array(state: tuple[Any, ...]) -> tuple[Any, ...]:
    import numpy as np

    return (state[0], np.asarray(state[1], dtype=np.uint32), *state[2:])


@contextlib.contextmanager
def contained(when: str = " while it was sampled") -> Iterator[None]:
    """Put back what is watched, and note what was changed: around a whole cell, and around each call of a method."""
    import torch

    watched = _states()
    before = {name: read() for name, (read, _) in watched.items()}
    state, outer = torch.get_rng_state(), _seeds[:]
    _seeds.append(torch.initial_seed())
    try:
        yield
    finally:
        if torch.initial_seed() not in _seeds:
            _notes.append(f"changed the seed of torch{when}; it was put back")
        torch.set_rng_state(state)
        _seeds[:] = outer
        for name, (read, write) in watched.items():
            if read() != before[name]:
                _notes.append(f"changed the {name}{when}; it was put back")
                with contextlib.suppress(OSError):
                    write(before[name])
