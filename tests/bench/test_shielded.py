"""Plug-in code that runs for no cell (import, identity, scorer, metric, timing) is contained as a sampler is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from typer.testing import CliRunner

from tsdfm_bench.cli import app
from tsdfm_bench.results.evidence import load_evidence

if TYPE_CHECKING:
    from conftest import Here

LEAVE = "os._exit(7)"


def changed(here: Here, folder: Path, *pairs: tuple[str, str]) -> str:
    """The fakes as a plug-in file with other lines."""
    source = here.fakes.read_text()
    for old, new in pairs:
        assert old in source
        source = source.replace(old, new)
    plugin = folder / "mine.py"
    plugin.write_text(source)
    return str(plugin)


def test_what_an_import_changes_is_put_back_and_said(here: Here, tmp_path: Path) -> None:
    """A default dtype that stayed would make every later network of the run another one under the same name."""
    plugin = tmp_path / "loud.py"
    deeds = "import os, torch\nos.chdir('/')\ntorch.set_default_dtype(torch.float64)\nos.environ['LOUD'] = '1'\n"
    plugin.write_text(f"{deeds}METHODS = {{}}\n")
    before = dict(os.environ)
    result = here.run("--plugin", str(plugin))
    assert (torch.get_default_dtype(), Path.cwd(), dict(os.environ)) == (torch.float32, here.folder, before)
    assert result.exit_code == 0, result.stderr
    for what in ("default dtype of torch", "working directory", "environment"):
        assert f"plug-in file {plugin} changed the {what}; it was put back." in result.stderr


def test_nobody_ends_the_process(here: Here, tmp_path: Path) -> None:
    """`os._exit` in an import, an identity, a scorer and a metric, in one run: each is told, the others finish."""
    gone = tmp_path / "gone.py"
    gone.write_text(f"import os\n{LEAVE}\n")
    plugin = changed(
        here,
        tmp_path,
        ('return Identity("none", "none")', LEAVE),
        ('raise ValueError("no opinion")', LEAVE),
        ('raise ZeroDivisionError("division by zero")', LEAVE),
    )
    given = {"methods": "counter,stepless", "scorers": "toy,broken", "metrics": "letters,failing"}
    real = os._exit
    result = here.run("--plugin", str(gone), plugin=plugin, **given)
    assert os._exit is real
    assert result.exit_code == 1
    for who in (
        "stepless: ",
        "scorer broken: ",
        "metric 'failing' failed: ",
        f"plug-in file {gone} cannot be imported: ",
    ):
        assert f"{who}SystemExit: {LEAVE} was called" in result.stderr
    rows = here.summary()
    assert (rows.query("method == 'counter'")["state"] == "done").all()
    assert rows.query("metric == 'gen_ppl/pooled' and scorer == 'toy'")["value"].notna().all()


def test_a_plan_prints_json_and_nothing_else(here: Here, tmp_path: Path) -> None:
    """Timing calls samplers and scorers."""
    loud = [(f'log(f"{what}', f'print("look at me"); log(f"{what}') for what in ("sample", "score")]
    plugin = changed(here, tmp_path, *loud)
    result = here.cli(*here.arguments("plan", plugin=plugin), "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["estimate"]["complete"]
    assert "look at me" in result.stderr


def test_nobody_is_asked(here: Here, tmp_path: Path) -> None:
    """A question that goes to printed.txt would wait for ever."""
    plugin = changed(here, tmp_path, ('log(f"sample', 'input("Go on? "); log(f"sample'))
    typed = 99 * "yes\n"
    result = CliRunner().invoke(app, here.arguments("run", plugin=plugin), prog_name="tsdfm-bench", input=typed)
    assert result.exit_code == 1
    assert "EOFError" in result.stderr


WORKER = """
import os
from tsdfm_bench.launch import worker

def work(job):
    print(job, os.fstat(0).st_rdev == os.stat(os.devnull).st_rdev, flush=True)

worker.work = work
worker.serve()
"""


def test_a_worker_keeps_its_orders_to_itself() -> None:
    """What a job runs finds an empty stdin, and the names of the jobs still arrive."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", WORKER], text=True, **pipes) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("a\nb\n")
        process.stdin.flush()
        assert [process.stdout.readline() for _ in range(2)] == ["a True\n", "b True\n"]


def test_a_task_that_leaves_is_a_failure_of_its_scores(here: Here, tmp_path: Path) -> None:
    line = '        return ["".join(LETTERS[t]'
    plugin = changed(here, tmp_path, (line, f"        {LEAVE}\n{line}"))
    result = here.run(plugin=plugin, metrics="letters")
    assert result.exit_code == 1
    assert f"scorer toy: SystemExit: {LEAVE} was called" in result.stderr
    assert f"metric 'letters' failed: SystemExit: {LEAVE} was called" in result.stderr


# -------------------------------------------------------------------------------------------------- other people's data

WRITER = """

class Writer(Speed):
    info = MetricInfo(name="writer", description="writes", needs=frozenset({"scores", "reference"}))

    def compute(self, cell):
        cell.texts.clear()
        cell.scores.clear()
        cell.reference.scores["toy"].nll.clear()
        WRITE
        return []


METRICS["writer"] = Writer
"""
WRITES = {
    "reference": 'cell.reference.scores["toy"].bytes[:] -= 1',
    "tokens": "cell.tokens.sort()",
    "torch": "torch.from_numpy(cell.reference.tokens).zero_()",
    "other": "np.add(cell.reference_other.tokens, 1, out=cell.reference_other.tokens)",
}


@pytest.fixture(scope="module")
def clean(shared: Here) -> dict[str, float]:
    """Numbers of a run without a metric that writes."""
    assert shared.run(metrics="letters,distance").exit_code == 0
    return values(shared)


def values(here: Here) -> dict[str, float]:
    rows = here.summary().query("metric != 'writer'")
    return {f"{row.cell} {row.metric} {row.scorer}": row.value for row in rows.itertuples()}


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
@pytest.mark.parametrize("what", WRITES)
def test_a_metric_cannot_write_into_what_others_are_given(
    clean: dict[str, float], here: Here, tmp_path: Path, what: str
) -> None:
    plugin = tmp_path / "mine.py"
    plugin.write_text(here.fakes.read_text() + WRITER.replace("WRITE", WRITES[what]))
    result = here.run(plugin=str(plugin), metrics="writer,letters,distance")
    assert values(here) == clean
    if what == "torch":  # it does not know read-only arrays, and gets a copy
        return
    assert result.exit_code == 1
    assert "metric 'writer' failed: it writes into what all metrics are given" in result.stderr


def test_pinned_tokens_are_those_that_were_asked_for(here: Here, tmp_path: Path) -> None:
    """Not those that the method has written into its request."""
    line = "        if request.prefix is not None and request.pinned is not None and"
    own = "        if request.prefix is not None: request.prefix.add_(1).remainder_(VOCAB)\n"
    result = here.run(plugin=changed(here, tmp_path, (line, own + line)), prefix="4")
    assert result.exit_code == 1
    assert "sample changed 32 pinned tokens" in result.stderr


def test_a_refusal_that_leaves_the_folder_costs_nothing(here: Here, tmp_path: Path) -> None:
    """The run folder was named relative to it."""
    plugin = changed(here, tmp_path, ('return "counter cannot', 'os.chdir("/")\n        return "counter cannot'))
    result = here.run(plugin=plugin)
    assert result.exit_code == 0, result.stderr
    assert "changed the working directory while it was sampled; it was put back" in result.stdout
    assert Path.cwd() == here.folder


def test_a_refusal_holds_as_long_as_the_code_that_gave_it(here: Here, tmp_path: Path) -> None:
    plugin = changed(here, tmp_path, ("if request.steps == 13 else None", 'if request.steps == 13 else "not today"'))
    assert here.run(plugin=plugin).exit_code == 0
    assert set(here.summary().query("method == 'counter'")["state"]) == {"skipped"}
    here.events()
    assert here.run(plugin=plugin).exit_code == 0
    assert not any(event.startswith("load") for event in here.events())
    assert here.run(plugin=changed(here, tmp_path)).exit_code == 0
    assert set(here.summary().query("method == 'counter'")["state"]) == {"done"}


def test_damaged_columns_are_made_again(here: Here, tmp_path: Path) -> None:
    """Until then the intervals of the summary stand in for them, and that is said."""
    plugin = changed(here, tmp_path, ("statistic=lambda e: e.mean(axis=-1)", 'form="mean"'))
    assert here.run(plugin=plugin).exit_code == 0
    (cell,) = here.cells(method="counter")
    path = here.out.root / "columns" / "letters" / f"{cell}.npz"
    before = path.read_bytes()
    path.write_bytes(before[:-9])
    evidence = load_evidence(here.out.root)
    (row,) = (found for found in evidence.cells if found.id == cell)
    assert row.value("entropy_nats")[2] == "interval"
    (said,) = evidence.damaged
    assert said.startswith(f"columns/letters/{cell}.npz cannot be read")
    again = here.run(plugin=plugin)
    assert again.exit_code == 0, again.stderr
    assert path.read_bytes() == before
    assert f"columns__letters__{cell}.npz" in here.out.quarantined()


DESCRIPTIONS = {
    "scorers": "class Mine:\n    load = networks = score = None\n    def describe(params): raise KeyError('lost')\n",
    "tasks": "class Mine:\n    def load(params): return Mine()\n    decode = encode = reference = prompts = None\n",
}


@pytest.mark.parametrize("kind", DESCRIPTIONS)
def test_what_cannot_describe_itself_is_said_in_one_line(here: Here, tmp_path: Path, kind: str) -> None:
    plugin = tmp_path / "mine.py"
    plugin.write_text(f"{DESCRIPTIONS[kind]}{kind.upper()} = {{'mine': Mine}}\n")
    result = here.cli(kind, "mine", "--plugin", str(plugin))
    assert result.exit_code == 1
    said = {"scorers": "KeyError: 'lost'", "tasks": "its info is a NoneType, not a TaskInfo"}[kind]
    assert said in " ".join((result.stdout + result.stderr).split())
    assert "Traceback" not in result.stderr
    assert result.exception is None or isinstance(result.exception, SystemExit)
