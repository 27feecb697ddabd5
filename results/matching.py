"""Which cells of two runs belong together.

One id, or else the same settings (label, source, steps, temperature, nucleus, draw, text, length, prefix) where no
other cell of either run has them: then the weights or the seed differ, and a note says so. Recipes with several
training seeds in both runs belong together if all but the training seed is the same (`seeds.place_of`); the sampling
seed may differ where that leaves no choice, and a note says so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from typing import Any

from tsdfm_bench.results.evidence import EvidenceCell
from tsdfm_bench.results.frontier import generator
from tsdfm_bench.results.recipes import Recipe
from tsdfm_bench.results.rows import CellRows, finite
from tsdfm_bench.results.seeds import by_recipe, place_of, same_seeds, without_seed

_SETTINGS = (
    "task", "tokenizer", "data_hash", "kind", "label", "source", "length", "steps", "temperature", "top_p",
    "top_p_rule", "draw", "prefix",
)  # fmt: skip


def describe(cell: CellRows) -> str:
    """A cell's settings on one line."""
    first = cell.first
    parts = [" ".join([first["label"] or first["method"], first["source"] or ""]).strip()]
    parts += [f"{int(first['steps'])} steps"] if finite(first["steps"]) else []
    parts += [f"temp. {first['temperature']:g}"] if finite(first["temperature"]) and first["temperature"] != 1 else []
    parts += [f"top-p {first['top_p']:g}"] if finite(first["top_p"]) else []
    parts += [first["draw"]] if first["draw"] not in ("", "fp64") else []
    return ", ".join(parts)


def matched(
    a: Iterable[EvidenceCell], b: Iterable[EvidenceCell], together: Collection[str] = ()
) -> tuple[list[tuple[EvidenceCell, EvidenceCell, bool]], list[str], list[str], list[str]]:
    """Cells two by two, and whether they have one id; names of those that only one run has, of either; notes.

    Args:
        a, b: cells of the two runs.
        together: ids of cells that are compared as a recipe, and so not missing if they have no partner.
    """
    ours, theirs = ({cell.id: cell for cell in cells} for cells in (a, b))
    pairs = [(cell, theirs[key], True) for key, cell in ours.items() if key in theirs]
    left = [cell for key, cell in ours.items() if key not in theirs]
    right = [cell for key, cell in theirs.items() if key not in ours]

    def settings(cells: Iterable[EvidenceCell]) -> dict[tuple[Any, ...], list[EvidenceCell]]:
        groups: dict[tuple[Any, ...], list[EvidenceCell]] = {}
        for cell in cells:
            groups.setdefault(tuple(cell.first[name] for name in _SETTINGS), []).append(cell)
        return groups

    other = settings(right)
    done: set[str] = set()
    told: dict[str, list[str]] = {}
    alike = [settings(cells.values()) for cells in (ours, theirs)]  # those that are compared by their ids too
    for key, members in settings(left).items():
        if len(members) == 1 and len(other.get(key, [])) == 1 and all(len(cells[key]) == 1 for cells in alike):
            first, second = members[0], other[key][0]
            done |= {first.id, second.id}
            differing = [name for name in ("weights", "seed") if first.first[name] != second.first[name]]
            if first.first["kind"] == "reference":  # other sequences of the same text: nothing to find out
                told.setdefault("not compared, they are other sequences of the same text", []).append(describe(first))
                continue
            pairs.append((first, second, False))
            told.setdefault(f"other {' and '.join(differing) or 'options'} in the second run", []).append(
                describe(first)
            )
    notes = [f"{'; '.join(cells)}: {what}." for what, cells in told.items()]
    return (
        pairs,
        _named(cell for cell in left if cell.id not in done and cell.id not in together),
        _named(cell for cell in right if cell.id not in done and cell.id not in together),
        notes,
    )


def _named(cells: Iterable[EvidenceCell]) -> list[str]:
    """Descriptions, each once, with their number where several cells share one."""
    counts = Counter(describe(cell) for cell in cells)
    return [name if count == 1 else f"{name} ({count} cells)" for name, count in counts.items()]


def matched_recipes(
    a: Iterable[EvidenceCell], b: Iterable[EvidenceCell]
) -> tuple[list[tuple[Recipe, Recipe, bool]], list[str]]:
    """Recipes two by two, and whether their networks are paired; notes on other sampling seeds and single networks.

    Paired ones hold the seeds that both runs have, in one order.
    """
    ours, theirs = ({place_of(group[0]): group for group in by_recipe(cells)} for cells in (a, b))
    both = [(group, theirs[place]) for place, group in ours.items() if place in theirs]
    redrawn = _alike(
        *([g for place, g in one.items() if place not in other] for one, other in ((ours, theirs), (theirs, ours)))
    )
    pairs: list[tuple[Recipe, Recipe, bool]] = []
    alone: dict[tuple[int, int], list[EvidenceCell]] = {}
    for group, other in both + redrawn:
        if min(len(group), len(other)) > 1:
            partners = same_seeds(group, other)
            first, second = zip(*partners, strict=True) if partners else (group, other)
            pairs.append((Recipe(first), Recipe(second), bool(partners)))
        elif len(group) + len(other) > 2:
            alone.setdefault((len(group), len(other)), []).append(group[0])
    told = [f"{_folded(cells)} ({one} and {two})" for (one, two), cells in alone.items()]
    other_draws = [group[0] for group, other in redrawn if min(len(group), len(other)) > 1]
    return pairs, [
        *[f"Compared over training seeds though the sampling seed differs: {_folded(other_draws)}."]
        * bool(other_draws),
        *[f"Not compared over training seeds, a run has one network only: {'; '.join(told)}."] * bool(told),
    ]


def _alike(
    ours: Iterable[list[EvidenceCell]], theirs: Iterable[list[EvidenceCell]]
) -> list[tuple[list[EvidenceCell], list[EvidenceCell]]]:
    """Recipes that differ in the sampling seed alone, two by two, where neither run has a second one."""
    sides: list[dict[Any, list[list[EvidenceCell]]]] = [{}, {}]
    for side, groups in zip(sides, (ours, theirs), strict=True):
        for group in groups:
            side.setdefault(place_of(group[0], drawn=False), []).append(group)
    first, second = sides
    return [
        (groups[0], second[place][0])
        for place, groups in first.items()
        if len(groups) == 1 and len(second.get(place, [])) == 1 and len(groups[0]) + len(second[place][0]) > 2
    ]


def _folded(cells: Iterable[EvidenceCell]) -> str:
    """Recipes by the name of their network, each once, with its settings."""
    settings: dict[str, list[str]] = {}
    for cell in cells:
        whole = describe(cell)
        head = generator(cell.first)
        name = without_seed(str(cell.variant.get("name", "")) or cell.first["checkpoint"].rpartition("/")[2])
        called = head if name.replace("-", " ") in ("", "none", head) else f"{head} ({name})"
        settings.setdefault(called, []).append(whole.removeprefix(head).removeprefix(", "))
    return "; ".join(
        name + (f", {' and '.join(filter(None, many))}" if any(many) else "") for name, many in settings.items()
    )
