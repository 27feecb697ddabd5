"""The command line: what can be typed. The work is in `tsdfm_bench.commands`, imported only when a command runs.

Exit codes: 0 done; 1 some cells failed, or something that was needed is missing; 2 the request is wrong; 130
interrupted. Tables and JSON go to stdout, everything else to stderr.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn, Optional

import typer

from tsdfm_bench import __version__
from tsdfm_bench.console import say
from tsdfm_bench.errors import BenchError, UsageError
from tsdfm_bench.options import (
    WHERE,
    BatchSize,
    Budget,
    CellTimeout,
    Checkpoint,
    Config,
    Conventions,
    Detach,
    Device,
    Draw,
    Folder,
    Infill,
    Jobs,
    Json,
    Launcher,
    Lease,
    Length,
    Methods,
    Metrics,
    Out,
    Plugin,
    Prefix,
    Samples,
    Scorers,
    Seed,
    SlurmKeys,
    Sources,
    Steps,
    Task,
    Temperatures,
    Text,
    Threads,
    TopP,
    TopPRule,
    Trim,
    TrustPickle,
)

app = typer.Typer(
    name="tsdfm-bench",
    help="Compare discrete text generators honestly: one table with perplexity, entropy, MAUVE, cost and intervals.",
    epilog="Start with:  tsdfm-bench run --methods tsdfm,mdlm --steps 8,1024",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)

EXIT_FAILED, EXIT_WRONG_USE, EXIT_INTERRUPTED = 1, 2, 130


def _leave(work: Callable[[], int]) -> NoReturn:
    """Run a command's work and leave with its exit code; errors are one message, without a traceback."""
    from tsdfm_bench.results.files import StoreError

    try:
        code = work()
    except UsageError as error:
        say(f"error: {error}")
        code = EXIT_WRONG_USE
    except (BenchError, StoreError) as error:
        say(f"error: {error}")
        code = EXIT_FAILED
    except KeyboardInterrupt:
        say("interrupted")
        code = EXIT_INTERRUPTED
    raise typer.Exit(code)


def _given(values: dict[str, Any]) -> dict[str, Any]:
    """The sweep's keys among a command's parameters, those that were typed."""
    given = {key: value for key, value in values.items() if value is not None}
    given["plugins"] = given.pop("plugin", None) or None
    for switch in ("retry_failed", "detach"):
        given[switch] = given.pop(switch, None) or None
    for other in ("config", "json", "budget", "trim", "timing", "recipe"):
        given.pop(other, None)
    return given


def _version(asked: bool) -> None:
    if asked:
        print(f"tsdfm-bench {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and leave.")
    ] = False,
) -> None:
    pass


@app.command()
def run(
    task: Task = None,
    methods: Methods = None,
    steps: Steps = None,
    sources: Sources = None,
    temperatures: Temperatures = None,
    top_p: TopP = None,
    top_p_rule: TopPRule = None,
    draw: Draw = None,
    samples: Samples = None,
    length: Length = None,
    checkpoint: Checkpoint = None,
    trust_pickle: TrustPickle = None,
    prefix: Prefix = None,
    infill: Infill = None,
    seed: Seed = None,
    scorers: Scorers = None,
    metrics: Metrics = None,
    conventions: Conventions = None,
    config: Config = None,
    out: Out = None,
    launcher: Launcher = None,
    jobs: Jobs = None,
    lease: Lease = None,
    slurm: SlurmKeys = None,
    detach: Detach = False,
    batch_size: BatchSize = None,
    device: Device = None,
    threads: Threads = None,
    cell_timeout: CellTimeout = None,
    plugin: Plugin = None,
    budget: Budget = None,
    trim: Trim = False,
    retry_failed: Annotated[
        bool,
        typer.Option("--retry-failed", help="Also try what failed before with the same code.", rich_help_panel=WHERE),
    ] = False,
    json: Json = False,
) -> None:
    """Sample, score and tabulate a sweep; what is already done is not done again."""
    given = _given(locals())
    from tsdfm_bench.commands.run import run_command

    _leave(lambda: run_command(given, config, json, budget, trim))


@app.command()
def plan(
    task: Task = None,
    methods: Methods = None,
    steps: Steps = None,
    sources: Sources = None,
    temperatures: Temperatures = None,
    top_p: TopP = None,
    top_p_rule: TopPRule = None,
    draw: Draw = None,
    samples: Samples = None,
    length: Length = None,
    checkpoint: Checkpoint = None,
    trust_pickle: TrustPickle = None,
    prefix: Prefix = None,
    infill: Infill = None,
    seed: Seed = None,
    scorers: Scorers = None,
    metrics: Metrics = None,
    conventions: Conventions = None,
    config: Config = None,
    out: Out = None,
    launcher: Launcher = None,
    jobs: Jobs = None,
    lease: Lease = None,
    slurm: SlurmKeys = None,
    batch_size: BatchSize = None,
    device: Device = None,
    threads: Threads = None,
    cell_timeout: CellTimeout = None,
    plugin: Plugin = None,
    budget: Budget = None,
    trim: Trim = False,
    recipe: Annotated[
        Text,
        typer.Option("--recipe", metavar="SCALE", help="Plan a training instead: what `train SCALE` needs."),
    ] = None,
    timing: Annotated[
        bool, typer.Option("--timing/--no-timing", help="Time a few calls of networks that were never timed.")
    ] = True,
    json: Json = False,
) -> None:
    """Show what `run` with the same options would do: cells, work, time, memory, disk, what is already there."""
    given = _given(locals())
    from tsdfm_bench.commands.plan import plan_command, plan_training

    if recipe is not None:
        _leave(lambda: plan_training(recipe, {**given, "config": config, "budget": budget}, json))
    _leave(lambda: plan_command(given, config, json, budget, trim, timing))


@app.command()
def score(
    target: Annotated[str, typer.Argument(help="A run folder, or a file of samples.", metavar="RUN|FILE")],
    scorers: Scorers = None,
    metrics: Metrics = None,
    conventions: Conventions = None,
    task: Task = None,
    length: Length = None,
    samples: Samples = None,
    out: Out = None,
    device: Device = None,
    threads: Threads = None,
    plugin: Plugin = None,
    json: Json = False,
) -> None:
    """Judge samples that exist already by more scorers and metrics; nothing is sampled."""
    given = _given(locals())
    from tsdfm_bench.commands.score import score_command

    _leave(lambda: score_command(given.pop("target"), given, json))


@app.command()
def status(
    folder: Folder = None,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Show it until nothing goes on any more.")] = False,
    json: Json = False,
) -> None:
    """Show how far each cell of a run folder is, and what goes on: files first, then Slurm's queue."""
    from tsdfm_bench.commands.status import status_command

    _leave(lambda: status_command(folder, json, watch))


@app.command()
def cancel(folder: Folder = None, json: Json = False) -> None:
    """End the jobs and processes of a run; what is finished is kept."""
    from tsdfm_bench.commands.cancel import cancel_command

    _leave(lambda: cancel_command(folder, json))


@app.command()
def table(
    folder: Folder = None,
    format: Annotated[
        str, typer.Option("--format", "-f", help="rich, markdown, csv, latex, json or html.", metavar="FORMAT")
    ] = "rich",
    methods: Annotated[Text, typer.Option("--methods", metavar="LIST", help="Only these generators.")] = None,
    steps: Annotated[Text, typer.Option("--steps", metavar="LIST", help="Only these step counts.")] = None,
    sources: Annotated[Text, typer.Option("--sources", metavar="LIST", help="Only these sources.")] = None,
    json: Json = False,
) -> None:
    """Print the table of a run folder or of a summary file."""
    from tsdfm_bench.commands.table import table_command

    _leave(lambda: table_command(folder, "json" if json else format, methods, steps, sources))


@app.command()
def plot(
    folder: Folder = None,
    kind: Annotated[
        Text,
        typer.Option("--kind", "-k", metavar="LIST", help="frontier, steps, cost, mauve, trajectory (default: all)."),
    ] = None,
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--out", "-o", metavar="FOLDER", help="Where files go (default: figures/ of the run folder)."),
    ] = None,
    scorer: Annotated[Text, typer.Option("--scorer", metavar="NAME", help="Only this scorer.")] = None,
    convention: Annotated[
        Text, typer.Option("--convention", metavar="NAME", help="Of perplexity, e.g. sedd (default: pooled).")
    ] = None,
    json: Json = False,
) -> None:
    """Draw a run: PDF, SVG and PNG, with what each figure shows."""
    from tsdfm_bench.commands.plot import plot_command

    _leave(lambda: plot_command(folder, kind, out, scorer, convention, json))


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(help="Run folder or summary file; reference = the recorded results.")],
    second: Annotated[Path, typer.Argument(help="The same, compared with the first.")],
    metrics: Annotated[
        Text, typer.Option("--metrics", metavar="LIST", help="Numbers to compare, or all (default: the main ones).")
    ] = None,
    json: Json = False,
) -> None:
    """Say what got better or worse from one run to another, cell by cell, with intervals."""
    from tsdfm_bench.commands.compare import compare_command

    _leave(lambda: compare_command(first, second, metrics, json))


@app.command()
def rerun(
    folder: Folder = None,
    methods: Annotated[Text, typer.Option("--methods", metavar="LIST", help="Only these generators.")] = None,
    steps: Annotated[Text, typer.Option("--steps", metavar="LIST", help="Only these step counts.")] = None,
    sources: Annotated[Text, typer.Option("--sources", metavar="LIST", help="Only these sources.")] = None,
    out: Out = None,
    checkpoint: Checkpoint = None,
    launcher: Launcher = None,
    jobs: Jobs = None,
    device: Device = None,
    threads: Threads = None,
    plugin: Plugin = None,
    json: Json = False,
) -> None:
    """Make rows of a run again from its plan alone, and say whether tokens and numbers are the same."""
    from tsdfm_bench.commands.rerun import rerun_command

    filters = {"methods": methods, "steps": steps, "sources": sources}
    given: dict[str, Any] = {"out": out, "checkpoint": checkpoint, "launcher": launcher, "jobs": jobs}
    given |= {"device": device, "threads": threads, "plugins": plugin or None}
    _leave(lambda: rerun_command(folder, filters, given, json))


@app.command()
def cite(
    folder: Folder = None,
    methods: Annotated[
        Text, typer.Option("--methods", metavar="LIST", help="Of these generators instead of a run's.")
    ] = None,
    plugin: Plugin = None,
    json: Json = False,
) -> None:
    """Print what to cite for a run: this harness, and its methods, measures, scorers and text, as BibTeX."""
    from tsdfm_bench.commands.cite import cite_command

    _leave(lambda: cite_command(folder, methods, plugin or [], json))


@app.command()
def verify(
    folder: Folder = None,
    claims: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--claims", metavar="FILE", help="Claims file in TOML (default: the TS-DFM paper's claims)."),
    ] = None,
    only: Annotated[Text, typer.Option("--only", metavar="LIST", help="Claims by id (default: all).")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 if a claim is contradicted.")] = False,
    format: Annotated[
        Text, typer.Option("--format", metavar="FORMAT", help="A table: markdown, csv, latex, json or html.")
    ] = None,
    json: Json = False,
) -> None:
    """Say which claims of a paper these results reproduce, contradict or cannot tell."""
    from tsdfm_bench.commands.verify import verify_command

    _leave(lambda: verify_command(folder, claims, only, format, json, strict))


@app.command()
def report(
    folder: Folder = None,
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--out", "-o", metavar="FILE", help="HTML file (default: report.html of the run folder)."),
    ] = None,
    texts: Annotated[int, typer.Option("--texts", metavar="N", help="Texts per row to show.", min=0)] = 8,
    traces: Annotated[
        int,
        typer.Option(
            "--traces", metavar="N", help="Sample N sequences per row again, keeping every step (default: none).", min=0
        ),
    ] = 0,
    teacher: Annotated[
        Text, typer.Option("--teacher", metavar="LABEL", help="Row that texts are compared with (default: dfm).")
    ] = None,
    claims: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--claims", metavar="FILE", help="Claims file in TOML (default: the TS-DFM paper's claims)."),
    ] = None,
    plugin: Plugin = None,
    json: Json = False,
) -> None:
    """Write one HTML file about a run: verdicts, table, plots, texts, steps, cost, provenance."""
    from tsdfm_bench.commands.report import Asked, report_command

    asked = Asked(folder, out, texts, traces, teacher, claims, tuple(plugin or ()), json)
    _leave(lambda: report_command(asked))


@app.command()
def figures(
    results: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            "--results", metavar="FOLDER", help="Run folder, or a folder of them (default: the recorded results)."
        ),
    ] = None,
    only: Annotated[Text, typer.Option("--only", metavar="LIST", help="Names, e.g. figure1,table1.")] = None,
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--out", "-o", metavar="FOLDER", help="Where to (default: figures/ of the run folder, or here)."),
    ] = None,
    list: Annotated[
        bool, typer.Option("--list", help="Say what is current, stale or not drawn; draw nothing.")
    ] = False,
    plugin: Plugin = None,
    json: Json = False,
) -> None:
    """Draw the paper's tables and figures from stored results."""
    from tsdfm_bench.commands.figures import figures_command

    _leave(lambda: figures_command(results, only, out, plugin or [], list, json))


Name = Annotated[Text, typer.Argument(help="Show everything about this one.", show_default=False)]


@app.command()
def methods(name: Name = None, plugin: Plugin = None, json: Json = False) -> None:
    """List the generators, or describe one."""
    from tsdfm_bench.commands.listing import listing_command

    _leave(lambda: listing_command("methods", name, plugin or [], json))


@app.command()
def tasks(name: Name = None, plugin: Plugin = None, json: Json = False) -> None:
    """List the tasks, or describe one."""
    from tsdfm_bench.commands.listing import listing_command

    _leave(lambda: listing_command("tasks", name, plugin or [], json))


@app.command()
def scorers(name: Name = None, plugin: Plugin = None, json: Json = False) -> None:
    """List the scorers, or describe one."""
    from tsdfm_bench.commands.listing import listing_command

    _leave(lambda: listing_command("scorers", name, plugin or [], json))


@app.command()
def train(
    scale: Annotated[str, typer.Argument(help="Which recipe: sotu, ... or a TOML file.", show_default=False)],
    only: Annotated[Text, typer.Option("--only", metavar="LIST", help="Stages, e.g. mdlm,ar (default: all).")] = None,
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--out", "-o", metavar="FOLDER", help="Folder of the checkpoints (default: runs/train-SCALE)."),
    ] = None,
    minutes: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option("--minutes", metavar="N", help="Stop after this time; the same command goes on.", min=0.0),
    ] = None,
    threads: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--threads", metavar="N", help="CPU threads (default: all available).", min=1),
    ] = None,
    task: Annotated[
        Text, typer.Option("--task", metavar="NAME", help="Another text, e.g. text:FOLDER (default: the recipe's).")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Count parameters and make one step of each stage on random tokens.")
    ] = False,
    report: Annotated[
        bool, typer.Option("--report", help="Train nothing: examine the trained compasses and record trajectories.")
    ] = False,
    tokenize: Annotated[
        bool, typer.Option("--tokenize", help="Train nothing: read and tokenise the text, for trainings to come.")
    ] = False,
    launcher: Annotated[
        Text,
        typer.Option("--launcher", metavar="NAME", help="How stages are run: inline, local, slurm (default: inline)."),
    ] = None,
    jobs: Annotated[Text, typer.Option("--jobs", metavar="N", help="Stages at once, where one needs no other.")] = None,
    lease: Annotated[
        Text, typer.Option("--lease", metavar="S", help="Seconds without a sign of life until a stage is taken over.")
    ] = None,
    slurm: Annotated[
        Text, typer.Option("--slurm", metavar="K=V,...", help="As for run; for one stage: stages.NAME.time=8:00:00.")
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Submit to Slurm and leave.")] = False,
    json: Json = False,
) -> None:
    """Train the networks of a scale in dependency order; a stopped training goes on where it was."""
    from tsdfm_bench.commands.train import train_command

    settings = {"name": launcher, "jobs": jobs, "lease_s": lease, "slurm": slurm, "detach": detach or None}
    _leave(lambda: train_command(scale, only, out, minutes, threads, task, dry_run, json, settings, report, tokenize))


@app.command()
def conform(
    name: Annotated[str, typer.Argument(metavar="NAME|FILE", help="A method, or a .py file with METHODS.")],
    only: Annotated[
        Text, typer.Option("--only", metavar="LIST", help="Checks, e.g. pinned,draw (default: all).")
    ] = None,
    task: Annotated[
        Text, typer.Option("--task", metavar="NAME", help="Whose vocabulary is used (default: sotu).")
    ] = None,
    checkpoint: Annotated[
        Text, typer.Option("--checkpoint", metavar="FOLDER", help="Weights (default: the method's own).")
    ] = None,
    plugin: Plugin = None,
    limit: Annotated[
        float, typer.Option("--limit", metavar="S", help="Seconds a check of one setting may take.", min=1.0)
    ] = 120.0,
    json: Json = False,
) -> None:
    """Test whether a method keeps the contract and samples what it claims."""
    from tsdfm_bench.commands.conform import conform_command

    _leave(lambda: conform_command(name, only, task, checkpoint, plugin or [], limit, json))


@app.command()
def orders(json: Json = False) -> None:
    """Show how fast every sampler approaches the true law, computed exactly on a tiny space."""
    from tsdfm_bench.commands.orders import orders_command

    _leave(lambda: orders_command(json))


@app.command("bench-speed")
def bench_speed(
    quick: Annotated[bool, typer.Option("--quick", help="The size sotu, batches of 8, few repeats.")] = False,
    sizes: Annotated[
        Text, typer.Option("--sizes", metavar="LIST", help="sotu,base (default: sotu; on an accelerator both).")
    ] = None,
    methods: Annotated[Text, typer.Option("--methods", metavar="LIST", help="Generators (default: all).")] = None,
    parts: Annotated[
        Text, typer.Option("--parts", metavar="LIST", help="sampling,generate,scoring,scaling (default: all).")
    ] = None,
    batches: Annotated[Text, typer.Option("--batches", metavar="LIST", help="Batch sizes (default: 1,8,32).")] = None,
    steps: Annotated[Text, typer.Option("--steps", metavar="LIST", help="Step counts (default: 8,64,1024).")] = None,
    repeats: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--repeats", metavar="N", help="Of every measurement (default: 5, quick 3).", min=1),
    ] = None,
    threads: Annotated[int, typer.Option("--threads", metavar="N", help="CPU threads.", min=1)] = 1,
    device: Annotated[str, typer.Option("--device", metavar="NAME", help="cpu, cuda, ...")] = "auto",
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            "--out", "-o", metavar="FOLDER", help="Write speed.json, its provenance and the figure of the growth there."
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Measure the overhead of sampling, and its speed against plain loops and transformers, as ratios."""
    from tsdfm_bench.commands.bench_speed import bench_speed_command

    _leave(
        lambda: bench_speed_command(quick, sizes, methods, parts, batches, steps, repeats, threads, device, out, json)
    )


@app.command("new-method")
def new_method(
    name: Annotated[str, typer.Argument(help="Small letters, digits and hyphens, e.g. my-sampler.")],
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--out", "-o", metavar="DIR", help="Folder to make the package in (default: this one)."),
    ] = None,
    licence: Annotated[
        str, typer.Option("--licence", metavar="SPDX", help="Apache-2.0, MIT, BSD-3-Clause or none.")
    ] = "Apache-2.0",
    holder: Annotated[str, typer.Option("--holder", metavar="NAME", help="Who holds the copyright.")] = "",
) -> None:
    """Write an installable package with a working method, its test and a README."""
    from tsdfm_bench.commands.new_method import new_method_command

    _leave(lambda: new_method_command(name, out, licence, holder))


@app.command()
def doctor(plugin: Plugin = None, json: Json = False) -> None:
    """Check this installation and say how to repair what is wrong."""
    from tsdfm_bench.commands.doctor import doctor_command

    _leave(lambda: doctor_command(plugin or [], json))


def main() -> None:
    """Entry point of the console script."""
    app()
