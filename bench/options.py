"""Options that several commands share. Lists are text here: the configuration reads and checks them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

Text = Optional[str]  # noqa: UP045 - typer reads the annotation at run time
WHAT, HOW, WHERE = "What is sampled", "How it is judged", "Where and how it runs"
Task = Annotated[
    Text, typer.Option("--task", metavar="NAME", help="What text is imitated (default: sotu).", rich_help_panel=WHAT)
]
Methods = Annotated[
    Text,
    typer.Option(
        "--methods",
        metavar="LIST",
        help="Generators, e.g. tsdfm,mdlm or 'dfm\\[solver=exact],mdlm' (default: tsdfm,fsdfm,dfm,mdlm,sedd,ar).",
        rich_help_panel=WHAT,
    ),
]
Steps = Annotated[
    Text, typer.Option("--steps", metavar="LIST", help="Step counts (default: 8,64).", rich_help_panel=WHAT)
]
Sources = Annotated[
    Text,
    typer.Option(
        "--sources",
        metavar="LIST",
        help="Source distributions: mask,uniform,... (default: each method's first).",
        rich_help_panel=WHAT,
    ),
]
Temperatures = Annotated[
    Text,
    typer.Option(
        "--temperatures",
        metavar="LIST",
        help="Temperatures; 0 = most likely token (default: 1).",
        rich_help_panel=WHAT,
    ),
]
TopP = Annotated[
    Text,
    typer.Option(
        "--top-p", metavar="LIST", help="Nucleus masses, e.g. none,0.9 (default: none).", rich_help_panel=WHAT
    ),
]
TopPRule = Annotated[
    Text,
    typer.Option(
        "--top-p-rule",
        metavar="RULE",
        help="inclusive keeps the token that crosses the mass; exclusive drops it.",
        rich_help_panel=WHAT,
    ),
]
Draw = Annotated[
    Text,
    typer.Option(
        "--draw",
        metavar="LIST",
        help="Arithmetic of the draw: fp64,legacy-fp32 (default: fp64).",
        rich_help_panel=WHAT,
    ),
]
Samples = Annotated[
    Text, typer.Option("--samples", help="Sequences per row (default: 128).", metavar="N", rich_help_panel=WHAT)
]
Length = Annotated[
    Text,
    typer.Option("--length", help="Tokens per sequence (default: the task's).", metavar="N", rich_help_panel=WHAT),
]
Checkpoint = Annotated[
    Text,
    typer.Option(
        "--checkpoint",
        metavar="FOLDER",
        help="Weights: a folder, a shipped set, hf:OWNER/NAME, or oracle (default: shipped).",
        rich_help_panel=WHAT,
    ),
]
TrustPickle = Annotated[
    Optional[bool],  # noqa: UP045
    typer.Option("--trust-pickle", metavar="", help="Read published weights that are pickles.", rich_help_panel=WHAT),
]
Prefix = Annotated[
    Text,
    typer.Option(
        "--prefix",
        metavar="N|TEXT",
        help="Pinned start: a number of tokens of held-out text, or a text.",
        rich_help_panel=WHAT,
    ),
]
Infill = Annotated[
    Text,
    typer.Option("--infill", help="Share of positions pinned to held-out text.", metavar="P", rich_help_panel=WHAT),
]
Seed = Annotated[Text, typer.Option("--seed", help="Root seed (default: 0).", metavar="N", rich_help_panel=WHAT)]
Scorers = Annotated[
    Text,
    typer.Option(
        "--scorers",
        metavar="LIST",
        help="Judges, e.g. smollm2,hf:gpt2-large (default: the task's; for text char-rnn,smollm2).",
        rich_help_panel=HOW,
    ),
]
Metrics = Annotated[
    Text, typer.Option("--metrics", metavar="LIST", help="Measures (default: all).", rich_help_panel=HOW)
]
Conventions = Annotated[
    Text,
    typer.Option(
        "--conventions",
        metavar="LIST",
        help="Conventions of generative perplexity, e.g. pooled,mdlm.",
        rich_help_panel=HOW,
    ),
]
Config = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(
        "--config", "-c", metavar="FILE", help="Sweep file in TOML; the command line wins.", rich_help_panel=WHERE
    ),
]
Out = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--out", "-o", metavar="FOLDER", help="Run folder (default: runs/TASK-PLAN).", rich_help_panel=WHERE),
]
Launcher = Annotated[
    Text,
    typer.Option(
        "--launcher",
        metavar="NAME",
        help="How cells are run: inline, local, ... (default: inline).",
        rich_help_panel=WHERE,
    ),
]
Jobs = Annotated[
    Text,
    typer.Option(
        "--jobs", metavar="N", help="Worker processes at once (default: by cores and memory).", rich_help_panel=WHERE
    ),
]
Lease = Annotated[
    Text,
    typer.Option(
        "--lease",
        metavar="S",
        help="Seconds without a sign of life until a worker's cell is taken over (default: 60).",
        rich_help_panel=WHERE,
    ),
]
SlurmKeys = Annotated[
    Text,
    typer.Option(
        "--slurm",
        metavar="K=V,...",
        help="What jobs ask of Slurm: partition=gpu,time=2:00:00,gpus_per_node=1 ...",
        rich_help_panel=WHERE,
    ),
]
Detach = Annotated[
    bool,
    typer.Option("--detach", help="Submit to Slurm and leave; the same command comes back.", rich_help_panel=WHERE),
]
BatchSize = Annotated[
    Text, typer.Option("--batch-size", help="Sequences per batch.", metavar="N", rich_help_panel=WHERE)
]
Device = Annotated[
    Text, typer.Option("--device", metavar="NAME", help="cpu, cuda, ... (default: auto).", rich_help_panel=WHERE)
]
CellTimeout = Annotated[
    Text,
    typer.Option(
        "--cell-timeout",
        metavar="S",
        help="Seconds the sampling of one cell may take (default: no limit).",
        rich_help_panel=WHERE,
    ),
]
Threads = Annotated[
    Text, typer.Option("--threads", help="CPU threads (default: all available).", metavar="N", rich_help_panel=WHERE)
]
Plugin = Annotated[
    Optional[list[Path]],  # noqa: UP045
    typer.Option("--plugin", metavar="FILE", help="Local plug-in file (.py); may be repeated.", rich_help_panel=WHERE),
]
Budget = Annotated[
    Text,
    typer.Option(
        "--budget",
        metavar="TIME",
        help="Refuse what would take longer, e.g. 30m or 2h.",
        rich_help_panel=WHERE,
    ),
]
Trim = Annotated[
    bool,
    typer.Option("--trim", help="Leave out what exceeds the budget instead.", rich_help_panel=WHERE),
]
Json = Annotated[bool, typer.Option("--json", metavar="", help="Print JSON, and nothing else, on stdout.")]
Folder = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Argument(help="Run folder (default: the newest in runs/).", show_default=False),
]
