"""SIGKILL at random moments, of one or several processes on one run folder: nothing is lost, nothing is done twice."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tsdfm_bench.results.store import RunFolder, read_scores

if TYPE_CHECKING:
    from conftest import Here

KILLS = 50
SAMPLES, BATCH, STEPS = 40, 4, (2, 3, 4, 5, 6, 7)


def request(plugin: Path, out: str, **more: Any) -> dict[str, Any]:
    """A sweep of six cells of ten batches."""
    return {
        "plugins": [plugin],
        "task": "tiny",
        "methods": "counter[slow_s=0.01]",
        "steps": list(STEPS),
        "scorers": "toy",
        "metrics": "letters",
        "samples": SAMPLES,
        "batch_size": BATCH,
        "out": Path(out),
        "threads": 1,
        "lease": 5,
        **more,
    }


def run(given: dict[str, Any]) -> int:
    """`tsdfm-bench run` in this process."""
    from tsdfm_bench.commands.run import run_command

    return run_command(given, None, False)


def files(folder: RunFolder) -> dict[str, bytes]:
    """Every batch of samples, by its path in the folder."""
    return {str(path.relative_to(folder.root)): path.read_bytes() for path in sorted(folder.root.rglob("*.npz"))}


def overlaps(log: Path, killed: dict[int, float]) -> list[str]:
    """Batches of one cell that two living processes were at, or that were made twice to the end."""
    begun: dict[tuple[str, str], list[tuple[float, float, int]]] = defaultdict(list)
    open_: dict[tuple[str, str, int], float] = {}
    ended: dict[tuple[str, str], int] = defaultdict(int)
    for line in log.read_text().splitlines():
        if not line.startswith(("begin ", "end ")):
            continue
        what, key, first, rows, pid, at = line.split()
        who = (key, first, int(pid))
        if rows != f"x{BATCH}":
            continue
        if what == "begin":
            open_[who] = float(at)
        else:
            begun[key, first].append((open_.pop(who), float(at), int(pid)))
            ended[key, first] += 1
    for (key, first, pid), at in open_.items():
        begun[key, first].append((at, killed.get(pid, at), pid))
    faults = []
    by_cell: dict[str, list[tuple[float, float, int]]] = defaultdict(list)
    for (key, _), spans in begun.items():
        by_cell[key] += spans
    for key, spans in by_cell.items():
        spans.sort()
        faults += [
            f"{key}: {a} and {b}"
            for i, a in enumerate(spans)
            for b in spans[i + 1 :]
            if a[2] != b[2] and b[0] < min(a[1], killed.get(a[2], a[1]))
        ]
    return faults


def at_work(log: Path) -> set[int]:
    """Processes that have begun a batch and not ended it, dead ones among them."""
    found: set[int] = set()
    for line in log.read_text().splitlines() if log.exists() else ():
        if line.startswith(("begin ", "end ")):
            what, *_, pid, _ = line.split()
            (found.add if what == "begin" else found.discard)(int(pid))
    return found


def interrupted(log: Path, killed: dict[int, float]) -> int:
    """Kills that hit a process in the middle of a batch."""
    return len(at_work(log) & killed.keys())


def one_at_work(log: Path, running: list[int], wait_s: float = 2.0) -> list[int]:
    """A running process in the middle of a batch, as soon as there is one: on a busy machine chance finds few."""
    until = time.monotonic() + wait_s
    while time.monotonic() < until:
        if found := at_work(log) & {*running}:
            return [min(found)]
        time.sleep(0.002)
    return []


def test_fifty_kills_lose_nothing_and_double_nothing(here: Here, steady: Path, processes: SimpleNamespace) -> None:
    torch.set_num_threads(1)
    assert run(request(steady, "whole")) == 0
    whole = RunFolder(here.folder / "whole")
    expected = files(whole)
    assert len(expected) == 10 * (len(STEPS) + 3)
    here.events()

    dice = random.Random(7)
    given = request(steady, "out")
    folder = RunFolder(here.folder / "out")
    killed: dict[int, float] = {}
    running: list[int] = []
    kept: dict[str, bytes] = {}
    # fifty at least, and more until a fifth of fifty has hit in the middle of a batch: where a kill hits is chance
    while len(killed) < KILLS or (len(killed) < 4 * KILLS and interrupted(here.log_path, killed) < KILLS // 5):
        while len(running) < 3:
            running.append(processes.fork(lambda given=given: run(given)))
        time.sleep(dice.uniform(0.0, 0.12))
        victims = running[:] if dice.random() < 0.15 else [dice.choice(running)]
        if len(killed) % 4 == 3:
            victims = one_at_work(here.log_path, running) or victims
        for pid in victims:
            running.remove(pid)
            os.kill(pid, signal.SIGKILL)
            at, code = time.monotonic(), processes.wait(pid)
            assert code in (-signal.SIGKILL, 0, 1)
            if code == -signal.SIGKILL:  # others had ended by themselves
                killed[pid] = at
        now = files(folder)
        assert all(now[name] == content for name, content in kept.items())  # what was stored stays as it is
        kept = now
        if len(now) == len(expected):  # another sweep, so that the next kills hit something
            assert now == expected
            given = request(steady, f"out{len(killed)}")
            folder, kept = RunFolder(here.folder / f"out{len(killed)}"), {}
    for pid in running:
        processes.wait(pid)
    for _ in range(5):  # a cell in which processes died again and again is tried again by the next command
        if run(given) == 0:
            break
    assert run(given) == 0
    assert files(folder) == expected
    for cell in whole.scored("toy"):
        mine, theirs = (read_scores(f.scores_path("toy", cell)).nll for f in (folder, whole))
        assert all(np.array_equal(a, b) for a, b in zip(mine, theirs, strict=True))
    assert folder.summary_csv_path.exists()
    assert overlaps(here.log_path, killed) == []
    assert interrupted(here.log_path, killed) >= KILLS // 5
    assert not list(folder.leases_folder.glob("[!.]*"))  # unfinished writes start with a dot: no listing sees them
    assert folder.quarantined() == {}
