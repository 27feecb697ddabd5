"""A plug-in can fail in every way it likes: its cells say so, the others finish, the exit code is 1."""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tsdfm_bench import guard
from tsdfm_bench.results.store import RunFolder, read_json, write_json
from tsdfm_bench.summary import reason_of

if TYPE_CHECKING:
    from click.testing import Result
    from conftest import Here

SPOILS = {
    "load": "the weights do not fit: missing keys blocks.0.weight",
    "raise": "RuntimeError: boom in sample",
    "exit": "SystemExit: 3",
    "nothing": "must return a SampleBatch with a tensor of tokens, not nothing",
    "shape": "tokens of shape (8, 11), asked for (8, 12)",
    "dtype": "tokens of dtype torch.int32, the contract says torch.int64",
    "mask": "the token id 16 (a mask: positions were left undecided)",
    "negative": "the token id -1",
    "lengths": "lengths outside [0, 12]",
    "memory": "even for one sequence at a time: choose a smaller --length or a larger --device",
}


@pytest.fixture(scope="module")
def spoiled(shared: Here) -> tuple[Here, Result]:
    """One run with every fault at once, beside a method without any."""
    methods = ",".join(f"counter[spoil={spoil}]" for spoil in SPOILS)
    return shared, shared.run(methods=f"{methods},stepless", steps="2,4")


@pytest.mark.parametrize("spoil", SPOILS)
def test_a_method_that_fails_costs_its_own_cells_only(spoiled: tuple[Here, Result], spoil: str) -> None:
    here, _ = spoiled
    rows = here.summary().query(f"label == 'counter[spoil={spoil}]'")
    assert list(rows["state"]) == ["failed", "failed"]
    assert list(rows["steps"]) == [2, 4]
    assert all(SPOILS[spoil] in reason for reason in rows["reason"])
    for cell in here.cells(method="counter", options={"spoil": spoil}):
        assert SPOILS[spoil] in here.out.error_path(cell).read_text()
        assert not here.out.completed_batches(cell)


def test_the_others_finish_and_the_exit_code_says_that_something_failed(spoiled: tuple[Here, Result]) -> None:
    here, result = spoiled
    assert result.exit_code == 1
    assert "Traceback" not in result.stderr
    assert f"{2 * len(SPOILS)} failed" in result.stderr
    assert (here.summary().query("method == 'stepless'")["state"] == "done").all()
    assert (here.summary().query("kind == 'reference'")["state"] == "done").all()


def test_the_traceback_is_kept_for_its_author(spoiled: tuple[Here, Result]) -> None:
    here, _ = spoiled
    cell = here.cells(options={"spoil": "raise"})[0]
    assert "fakes.py" in here.out.error_path(cell).read_text()


def test_changed_prompts_are_noticed(here: Here) -> None:
    result = here.run(methods="counter[spoil=pinned]", prefix="4")
    assert result.exit_code == 1
    assert "pinned tokens" in result.stderr


def test_batches_before_a_failure_are_kept_and_the_cell_is_tried_again(here: Here, tmp_path: Path) -> None:
    plugin = tmp_path / "mine.py"
    source = here.fakes.read_text()
    plugin.write_text(source.replace('self.spoil = str(params.get("spoil", ""))', 'self.spoil = "late raise"'))
    assert here.run(plugin=str(plugin)).exit_code == 1
    (cell,) = here.cells(kind="method")
    assert here.out.completed_batches(cell) == [0]
    assert here.out.state(cell, 3).state == "failed"
    here.events()
    assert here.run().exit_code == 0
    assert [e for e in here.events() if e.startswith("sample")][1:] == ["sample 8 x8 steps 2", "sample 16 x8 steps 2"]
    assert here.out.state(cell, 3).state == "done"
    assert not here.out.error_path(cell).exists()


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("raise ValueError('oh no')", "ValueError: oh no"),
        ("class M: pass\nMETHODS = {'mine': M}", "lacks info, load, networks, refuse, sample"),
        (
            "from tsdfm_bench.api import MethodInfo\nclass M:\n    info = MethodInfo('mine', 'x', api_version=7)\n"
            "    load = networks = refuse = sample = None\nMETHODS = {'mine': M}",
            "API version 7",
        ),
        (
            "from tsdfm_bench.api import MethodInfo\nclass M:\n    info = MethodInfo('mine', 'x')\n"
            "    load = networks = refuse = sample = None\nMETHODS = {'mine': M}",
            "TypeError",
        ),
    ],
    ids=["import", "attributes", "version", "load"],
)
def test_a_plugin_file_that_is_broken_is_a_row(here: Here, tmp_path: Path, source: str, said: str) -> None:
    plugin = tmp_path / "mine.py"
    plugin.write_text(source)
    result = here.run("--plugin", str(plugin), methods="mine,counter")
    assert result.exit_code == 1
    assert said in result.stderr
    summary = here.summary()
    assert (summary.query("method == 'counter'")["state"] == "done").all()
    assert (summary.query("method == 'mine'")["state"] == "failed").all()
    listing = here.cli("methods", "--plugin", str(plugin))
    assert "mdlm" in listing.stdout


@pytest.mark.parametrize("error", ["KeyError", "GeneratorExit"])
def test_an_identity_that_raises_is_a_row(here: Here, tmp_path: Path, error: str) -> None:
    plugin = tmp_path / "mine.py"
    body = here.fakes.read_text().replace(
        "if checkpoint is None:", f'raise {error}("lost")\n        if checkpoint is None:'
    )
    plugin.write_text(body)
    result = here.run(plugin=str(plugin), methods="counter,stepless")
    assert result.exit_code == 1
    assert error in result.stderr
    assert "Traceback" not in result.stderr


ESCAPES = ("asyncio.CancelledError", "GeneratorExit", "Own")


@pytest.mark.parametrize("where", ["load", "sample"])
def test_whatever_a_method_raises_is_a_failure_of_its_cell(here: Here, tmp_path: Path, where: str) -> None:
    """Exceptions that are no `Exception`: the other cells are made, and the table says why these are not."""
    deeds = [f"{'load ' if where == 'load' else ''}raise {what}" for what in ESCAPES]
    plugin = Path(hostile(tmp_path, {deed: deed for deed in deeds}))
    plugin.write_text(f"import asyncio\nclass Own(BaseException): pass\n{plugin.read_text()}")
    methods = ",".join(f"hostile[deed={deed}]" for deed in deeds)
    result = here.run("--plugin", str(plugin), methods=f"{methods},stepless")
    assert result.exit_code == 1
    assert "Traceback" not in result.stderr
    rows = here.summary()
    assert set(rows.query("method == 'stepless'")["state"]) == {"done"}
    failed = rows.query("method == 'hostile'")
    assert set(failed["state"]) == {"failed"}
    told = {reason.split(".")[-1] for reason in failed["reason"]}
    assert told == {"CancelledError", "GeneratorExit", "Own"}


JUDGES = {
    "scorer's load": ('log("load toy")', "scorers", "mine"),
    "scorer's score": ('raise ValueError("no opinion")', "scorers", "odd"),
    "metric's compute": ('raise ZeroDivisionError("division by zero")', "metrics", "wrong"),
}


@pytest.mark.parametrize("where", JUDGES)
def test_whatever_a_judge_raises_costs_its_own_numbers_only(here: Here, tmp_path: Path, where: str) -> None:
    """As above: the other judge's numbers are there, and the command says what is missing and why."""
    line, kind, name = JUDGES[where]
    plugin = tmp_path / "mine.py"
    body = here.fakes.read_text().split("METHODS = {")[0].replace(line, 'raise GeneratorExit("odd")')
    body = body.replace('"toy"', '"mine"').replace('"failing"', '"wrong"')
    plugin.write_text(f'{body}SCORERS = {{"mine": Toy, "odd": Broken}}\nMETRICS = {{"wrong": Failing}}\n')
    given = {"scorers": "toy", "metrics": "letters"}
    given[kind] += f",{name}"
    result = here.run("--plugin", str(plugin), **given)
    assert result.exit_code == 1
    assert "GeneratorExit: odd" in result.stderr
    assert "Traceback" not in result.stderr
    assert here.summary().query("metric == 'gen_ppl/pooled' and scorer == 'toy'")["value"].notna().all()


def test_of_a_message_of_several_lines_all_are_told() -> None:
    """As torch words what does not fit: a first line that says little, then what is wrong."""
    try:
        raise RuntimeError("Error(s) in loading:\n\tMissing key(s): a.\n    Unexpected key(s): b.")
    except RuntimeError as error:
        text = "".join(traceback.format_exception(error)).rstrip()
    said = "RuntimeError: Error(s) in loading: Missing key(s): a. Unexpected key(s): b."
    assert reason_of(text) == said
    assert reason_of("\n".join(text.splitlines()[1:])) == said  # the last lines of a longer one
    assert reason_of(f"{text}\nMemory ran out: x") == f"{said} Memory ran out: x"
    assert reason_of(text + 400 * "x") == f"{said}{'x' * 400}"[:297] + "..."
    assert reason_of("two\n  lines") == "two lines"


def test_if_every_method_fails_nothing_is_scored(here: Here) -> None:
    result = here.run(methods="counter[spoil=raise]", steps="2,4")
    assert result.exit_code == 1
    assert "2 failed:\n  counter[spoil=raise] · uniform · 2 steps, " in result.stderr
    assert result.stderr.count("boom in sample") == 1
    assert "load toy" not in here.events()
    assert set(here.summary()["state"]) == {"failed"}


# ------------------------------------------------------------------------------------- what goes beyond the contract

DEEDS = {
    "printed": "print('look at me'); os.system('echo me too')",
    "working directory": "os.chdir('/')",
    "environment": "os.environ['HOSTILE'] = '1'; os.environ.pop('TSDFM_BENCH_PLUGINS', None)",
    "default dtype of torch": "torch.set_default_dtype(torch.float64)",
    "default device of torch": "torch.set_default_device('meta')",
    "number of torch threads": "torch.set_num_threads(torch.get_num_threads() + 1)",
    "fp32 matmul precision of torch": "torch.set_float32_matmul_precision('medium')",
    "cuDNN settings of torch": "torch.backends.cudnn.benchmark = not torch.backends.cudnn.benchmark",
    "deterministic mode of torch": "torch.use_deterministic_algorithms(True, warn_only=True)",
    "seed of torch": "torch.manual_seed(1)",
    "seed of numpy": "np.random.seed(1)",
    "seed of random": "random.seed(1)",
    "signal handlers": "signal.signal(signal.SIGINT, lambda *_: None)",  # SIG_IGN is what a background job may have
}
HOSTILE = """
import os, random, signal, sys, time
import numpy as np
import torch
from tsdfm_bench.api import MethodInfo, SampleBatch

class Hostile:
    info = MethodInfo("hostile", "fake", uses_steps=False, options={"deed": "what it does"})
    def __init__(self, deed): self.deed = deed
    @classmethod
    def load(cls, params, device):
        if params["deed"].startswith("load "):
            exec(params["deed"][5:].replace("|", ";"))
        return cls(params["deed"])
    def networks(self): return {}
    def refuse(self, request): return None
    def sample(self, request):
        tokens = (request.streams.uniform("token", 0, request.length) * 16).long()
        lengths = torch.full((request.batch,), request.length)
        if not self.deed.startswith("load "):
            exec(DEEDS[self.deed])
        return SampleBatch(tokens, lengths)

METHODS = {"hostile": Hostile}
"""


def hostile(folder: Path, deeds: dict[str, str]) -> str:
    """A plug-in file whose method does one of these deeds."""
    plugin = folder / "hostile.py"
    plugin.write_text(f"{HOSTILE}\nDEEDS = {deeds!r}\n")
    return str(plugin)


def state_of_the_process() -> dict[str, object]:
    import numpy as np
    import torch

    return {
        "cwd": os.getcwd(),  # noqa: PTH109
        "environ": dict(os.environ),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "threads": torch.get_num_threads(),
        "grad": torch.is_grad_enabled(),
        "torch": torch.get_rng_state().tolist(),
        "numpy": np.random.get_state()[1].tolist(),  # type: ignore[index]
        "sigint": signal.getsignal(signal.SIGINT),
        "stdout": sys.stdout,
    }


def test_what_a_method_changes_is_put_back_and_noted(here: Here, tmp_path: Path) -> None:
    """Every deed in one run, beside a method without any: the samples count, the process is as before."""
    import torch

    plugin = hostile(tmp_path, DEEDS)
    methods = ",".join(f"hostile[deed={deed}]" for deed in DEEDS)
    torch.set_num_threads(1)
    before = state_of_the_process()
    result = here.run("--plugin", plugin, "--json", methods=f"{methods},counter")
    assert state_of_the_process() == before
    assert result.exit_code == 0, result.stderr
    notes = json.loads(result.stdout)["notes"]  # stdout is JSON and nothing else
    for deed in DEEDS:
        said = "printed while" if deed == "printed" else f"changed the {deed} while it was sampled; it was put back"
        assert any(note.startswith(f"hostile[deed={deed}] {said}") for note in notes), deed
    assert not any("counter" in note for note in notes)
    (cell,) = here.cells(options={"deed": "printed"})
    printed = (here.out.cell_folder(cell) / "printed.txt").read_text()
    assert "look at me" in printed
    assert "me too" in printed


def test_what_is_printed_at_import_and_while_loading_is_not_on_stdout(here: Here, tmp_path: Path) -> None:
    plugin = tmp_path / "loud.py"
    plugin.write_text("print('imported')\n" + HOSTILE)
    result = here.run("--plugin", str(plugin), "--json", methods="hostile[deed=load print('loaded')]")
    assert result.exit_code == 0, result.stderr
    json.loads(result.stdout)
    listing = here.cli("methods", "--plugin", str(plugin), "--json")
    json.loads(listing.stdout)


@pytest.mark.parametrize(
    "hang",
    ["time.sleep(600)", "while True: pass", "while True:\n    try: time.sleep(1)\n    except Exception: pass"],
    ids=["sleeps", "loops", "swallows"],
)
def test_a_cell_has_a_time_limit(here: Here, tmp_path: Path, hang: str) -> None:
    plugin = hostile(tmp_path, {"hang": hang})
    result = here.run("--plugin", plugin, "--cell-timeout", "0.5", methods="hostile[deed=hang],counter")
    assert result.exit_code == 1
    states = here.summary().set_index("method")
    assert set(states.loc["hostile", ["state"]]) == {"failed"}
    assert "0.5 seconds a cell may take (--cell-timeout)" in states.loc["hostile", "reason"]
    assert (here.summary().query("method == 'counter'")["state"] == "done").all()


def test_a_method_that_hangs_while_it_is_loaded_is_stopped_too(here: Here, tmp_path: Path) -> None:
    plugin = hostile(tmp_path, {})
    result = here.run("--plugin", plugin, "--cell-timeout", "0.5", methods="hostile[deed=load time.sleep(600)],counter")
    assert result.exit_code == 1
    assert "0.5 seconds" in result.stderr
    assert (here.summary().query("method == 'counter'")["state"] == "done").all()


@pytest.mark.parametrize("given", ["0", "-1", "soon"])
def test_an_impossible_time_limit_is_refused(here: Here, given: str) -> None:
    assert here.run("--cell-timeout", given).exit_code == 2


def test_os_exit_is_a_failure_of_the_cell(here: Here, tmp_path: Path) -> None:
    real = os._exit
    plugin = hostile(tmp_path, {"exit": "os._exit(3)"})
    result = here.run("--plugin", plugin, methods="hostile[deed=exit],counter")
    assert os._exit is real
    assert result.exit_code == 1
    assert "os._exit(3) was called" in result.stderr
    assert (here.summary().query("method == 'counter'")["state"] == "done").all()


def test_a_mark_of_an_earlier_process_with_this_number_is_one_of_the_dead(tmp_path: Path) -> None:
    """The first process of a container has the same number whenever it is started again."""
    folder, mark = RunFolder(tmp_path), tmp_path / "attempt.json"
    guard._begin(folder, "cell", mark)
    guard._begin(folder, "cell", mark)
    assert read_json(mark, checksum=False)["deaths"] == 0  # this process is alive
    for _ in range(3):
        write_json(mark, {**read_json(mark, checksum=False), "started": "1"}, checksum=False)
        with suppress(guard.ProcessDied):
            guard._begin(folder, "cell", mark)
    assert not mark.exists()


def test_a_process_that_dies_in_a_cell_is_tried_again_and_then_recorded(here: Here, tmp_path: Path) -> None:
    """Nothing in the process survives a kill; the mark it leaves tells the commands that follow."""
    plugin = hostile(tmp_path, {"die": "os.kill(os.getpid(), signal.SIGKILL)"})
    arguments = ("--plugin", plugin)
    for _ in range(3):
        process = here.start(*arguments, methods="hostile[deed=die],counter")
        process.communicate(timeout=120)
        assert process.returncode == -signal.SIGKILL
    result = here.run(*arguments, methods="hostile[deed=die],counter")
    assert result.exit_code == 1
    assert "the process died 3 times while it sampled this cell, with 0 batches finished" in result.stderr
    assert (here.summary().query("method == 'counter'")["state"] == "done").all()
    assert (here.summary().query("method == 'hostile'")["state"] == "failed").all()
