"""`tsdfm-bench verify`: is what a paper claims true of these results?

Verdicts are results, not errors: the exit code is 0 whatever they are, unless `--strict` asks for 1 when a claim is
contradicted. "Not separable" and "not testable" never fail, since they say that nothing was learned.
"""

from __future__ import annotations

import json
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsdfm_bench.commands.folders import run_folder
from tsdfm_bench.console import say, stdout_console
from tsdfm_bench.errors import StorageError, UsageError, unknown_name

if TYPE_CHECKING:
    from tsdfm_bench.results.claim_file import Claims
    from tsdfm_bench.results.claims import Verdict

FORMAT = 1
_MARKS = {
    "reproduced": ("✔", "green"),
    "contradicted": ("✘", "red"),
    "not separable": ("≈", "yellow"),
    "not testable": ("–", "dim"),
}


def verify_command(
    folder: Path | None, claims: Path | None, only: str | None, format: str | None, as_json: bool, strict: bool
) -> int:
    """Print the verdicts on a claims file and write them to the run folder's verdicts.json.

    Args:
        folder: run folder, a folder of run folders, or a summary file; None = the newest run.
        claims: a claims file; None = the paper's.
        only: ids, separated by commas; None = all.
        format: print a table in one of the table formats instead; None = for the terminal.
        as_json: print JSON and nothing else.
        strict: exit code 1 if a claim is contradicted.
    """
    from tsdfm_bench.results.claim_table import claims_table
    from tsdfm_bench.results.claims import verify
    from tsdfm_bench.results.evidence import MixedEvidence, load_evidence
    from tsdfm_bench.results.render import FORMATS, render
    from tsdfm_bench.results.schema import SchemaError

    if format is not None and format not in FORMATS:
        raise unknown_name("format", format, sorted(FORMATS))
    root = folder if folder is not None else run_folder(None).root
    read = read_claims_file(claims)
    known = [claim.id for claim in read.claims]
    wanted = None if only is None else [name.strip() for name in only.split(",") if name.strip()]
    for name in wanted or []:
        if name not in known:
            raise unknown_name("claim", name, known)
    try:
        evidence = load_evidence(root)
    except (SchemaError, MixedEvidence) as error:
        raise StorageError(str(error)) from error
    verdicts = verify(evidence, read, wanted)
    for problem in [*evidence.problems, *evidence.damaged]:
        say(f"note: {problem}")
    content = verdicts_json(verdicts, read.title, read.citation, claims.name if claims is not None else "claims.toml")
    if wanted is None:
        _keep(root, content)
    if as_json:
        print(json.dumps(content, indent=2, ensure_ascii=False))
    elif format is not None:
        print(render(claims_table(verdicts, read, evidence), format), end="")
    else:
        _print(verdicts, " ".join(part for part in (read.title, f"({read.citation})" if read.citation else "") if part))
    return 1 if strict and any(verdict.status == "contradicted" for verdict in verdicts) else 0


def read_claims_file(path: Path | None) -> Claims:
    """A claims file, or the paper's; `UsageError` says what is wrong with it."""
    from tsdfm_bench.results.claim_file import ClaimFileError, parse_claims, read_claims

    try:
        if path is not None:
            return read_claims(path)
        with as_file(files("tsdfm_bench.paper_figures") / "claims.toml") as default:
            return parse_claims(default.read_text(encoding="utf-8"), default.name)
    except ClaimFileError as error:
        raise UsageError(str(error)) from error


def verdicts_json(verdicts: list[Verdict], title: str, citation: str, name: str) -> dict[str, Any]:
    """The content of verdicts.json."""
    from tsdfm_bench.results.claims import STATUSES

    return {
        "format": FORMAT,
        "title": title,
        "citation": citation,
        "claims_file": name,
        "counts": {status: sum(verdict.status == status for verdict in verdicts) for status in STATUSES},
        "verdicts": [verdict.to_json() for verdict in verdicts],
    }


def _keep(root: Path, content: dict[str, Any]) -> None:
    """Write verdicts.json if this is a run folder; a folder that cannot be written is no reason to fail."""
    from tsdfm_bench.results.store import RunFolder, StoreError, write_json

    run = RunFolder(root)
    if not root.is_dir() or not run.plan_path.exists():
        return
    try:
        write_json(run.verdicts_path, content)
    except StoreError as error:
        say(f"note: the verdicts are not kept: {error}")


def _print(verdicts: list[Verdict], title: str) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from tsdfm_bench.results.render import clean

    console = stdout_console()
    grid = Table(box=box.SIMPLE_HEAD, title=Text(f"Claims of {clean(title)}", style="bold"), title_justify="left")
    grid.padding, grid.pad_edge = (0, 1, 0, 0), False
    grid.add_column("verdict", no_wrap=True)
    grid.add_column("claim", ratio=2, min_width=22)
    grid.add_column("what these results say", ratio=5)
    for verdict in verdicts:
        mark, style = _MARKS[verdict.status]
        claim = Text(clean(verdict.title))
        claim.append(f"\n{verdict.id}", style="dim")
        grid.add_row(
            Text(f"{mark} {verdict.status}", style=style), claim, Text(clean(verdict.reason)), end_section=True
        )
    console.print(grid)
    counts = {status: sum(verdict.status == status for verdict in verdicts) for status in _MARKS}
    told = ", ".join(f"{number} {status}" for status, number in counts.items() if number)
    console.print(Text(f"{len(verdicts)} claims: {told}"), soft_wrap=True)
