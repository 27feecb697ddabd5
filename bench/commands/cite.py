"""`tsdfm-bench cite`: what a table made here rests on, as BibTeX that can be pasted.

Entries come from what plug-ins say of themselves: an arXiv id becomes an entry with that id (BibTeX managers and
publishers complete it), BibTeX is passed on as it is, and anything else is a comment.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tsdfm_bench import __version__
from tsdfm_bench.commands.folders import run_folder
from tsdfm_bench.console import printable
from tsdfm_bench.errors import BenchError
from tsdfm_bench.registry import Registry, one_line
from tsdfm_bench.spec import parse_spec, split_list

_ARXIV = re.compile(r"(?:arXiv:)?(\d{4}\.\d{4,5})(?:v\d+)?", re.IGNORECASE)


@dataclass(frozen=True)
class Source:
    """Something a table rests on.

    Args:
        uses: what it is here: "method dfm", "scorer smollm2", ...
        text: an arXiv id, BibTeX, or words.
    """

    uses: tuple[str, ...]
    text: str

    @property
    def bibtex(self) -> str:
        """An entry, or a comment where there is only text."""
        used = ", ".join(self.uses)
        if self.text.lstrip().startswith("@"):
            return self.text.strip()
        if (found := _ARXIV.fullmatch(self.text.strip())) is None:
            words = " ".join((self.text or "says nothing about where it comes from").split())
            return f"% {used}: {words}"
        number = found[1]
        return "\n".join(
            [
                f"@misc{{arxiv.{number},",
                f"  eprint        = {{{number}}},",
                "  archiveprefix = {arXiv},",
                f"  url           = {{https://arxiv.org/abs/{number}}},",
                f"  note          = {{{used} of tsdfm-bench {__version__}}},",
                "}",
            ]
        )


HARNESS = f"""@software{{tsdfm-bench,
  title   = {{tsdfm-bench: comparing discrete text generators}},
  version = {{{__version__}}},
  license = {{Apache-2.0}},
}}"""


def cite_command(folder: Path | None, methods: str | None, plugins: Sequence[Path], as_json: bool) -> int:
    """Print the sources of a run, or of some generators.

    Args:
        folder: a run folder, "reference", or None for the newest run; not read if `methods` are given.
        methods: names, separated by commas, or None.
        plugins: local plug-in files.
        as_json: print JSON and nothing else.
    """
    registry = Registry(plugins)
    if methods is not None:
        asked = {"methods": split_list(methods)}
        scorers: dict[str, str] = {}
    else:
        found = run_folder(folder)
        plan = found.read_plan()
        cells = [cell for cell in plan["cells"] if cell["kind"] == "method"]
        asked = {
            "methods": list(dict.fromkeys(str(cell["method"]) for cell in cells)),
            "metrics": [str(name) for name in plan.get("metrics", [])],
            "tasks": [str(plan["request"]["task"])],
        }
        scorers = _scorers(found.root)
    sources = [Source(("harness",), HARNESS), *_merged(_declared(registry, asked))]
    sources += [Source((f"scorer {name}",), text) for name, text in scorers.items()]
    if as_json:
        print(json.dumps([{**asdict(source), "bibtex": source.bibtex} for source in sources], indent=2))
    else:
        print(printable("\n\n".join(source.bibtex for source in sources)))
    return 0


def _declared(registry: Registry, asked: Mapping[str, Sequence[str]]) -> Iterator[Source]:
    """What plug-ins say of themselves; one that cannot be loaded says so."""
    from tsdfm_bench.sweep import load_task

    for kind, names in asked.items():
        for name in names:
            spec = parse_spec(name)
            registry.entry(kind, spec.name)  # an unknown name is an error
            try:
                info: Any = load_task(spec, registry).info if kind == "tasks" else registry.load(kind, spec.name).info
                text = str(getattr(info, "citation", ""))
            except (BenchError, AttributeError) as error:
                text = f"cannot be read: {one_line(error)}"
            if text or kind == "methods":  # a measure of our own needs no source, a method has one
                yield Source((f"{kind.rstrip('s')} {spec.name}",), text)


def _merged(sources: Iterator[Source]) -> list[Source]:
    """One entry for each text."""
    found: dict[str, list[str]] = {}
    for source in sources:
        found.setdefault(source.text, []).extend(source.uses)
    return [Source(tuple(dict.fromkeys(uses)), text) for text, uses in found.items()]


def _scorers(root: Path) -> dict[str, str]:
    """Scorer -> revision and arithmetic, from a run's summary; nothing where there is none yet."""
    from tsdfm_bench.results.schema import SchemaError, read_summary

    try:
        summary = read_summary(root)
    except (SchemaError, FileNotFoundError):
        return {}
    rows = summary[(summary["scorer"] != "") & summary["scorer_revision"].fillna("").astype(bool)]
    return {
        str(row["scorer"]): f"revision {row['scorer_revision']}, {row['scorer_dtype']}"
        for _, row in rows.drop_duplicates("scorer").iterrows()
    }
