"""The tables of speed in methods/README.md are those of the recorded measurements."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]
RECORDED = ROOT / "results" / "reference" / "speed"
STEPS = (8, 64, 1024)
NAMES = {
    "dfm uniform euler": "`dfm` `euler`",
    "dfm uniform exact": "`dfm` `exact`",
    "dfm uniform cumulative": "`dfm` `cumulative`",
    "fsdfm uniform": "`fsdfm`",
    "tsdfm uniform": "`tsdfm`",
    "mdlm mask cached": "`mdlm` `cached`",
    "mdlm mask ancestral": "`mdlm` `ancestral`",
    "sedd mask": "`sedd`, mask source",
    "ar": "`ar`",
}


def recorded(folder: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RECORDED / folder / "speed.json").read_text())
    return found


def rows() -> dict[tuple[str, int, int | None], dict[str, Any]]:
    both = [row for folder in ("batch-1-8", "batch-32") for row in recorded(folder)["sampling"]]
    return {(row["method"], row["batch"], row["steps"]): row for row in both}


def short(ratio: float) -> str:
    return f"{ratio:.1f}" if ratio < 9.95 else f"{ratio:.0f}"


@pytest.mark.parametrize("method", NAMES)
def test_ratios_are_the_recorded_ones(method: str) -> None:
    measured, text = rows(), (ROOT / "methods" / "README.md").read_text()
    steps = [None] if method == "ar" else STEPS

    def cells(value: str, form: Any) -> str:
        of_batches = [[measured[method, batch, n][value]["median"] for n in steps] for batch in (1, 8, 32)]
        return " | ".join(" / ".join(form(x) for x in ratios) for ratios in of_batches)

    assert f"| {NAMES[method]} | {cells('overhead', '{:.2f}'.format)} |" in text
    if measured[method, 8, steps[0]]["ratio_plain"]:
        assert f"| {NAMES[method]} | {cells('ratio_plain', short)} |" in text


def test_powers_are_the_recorded_ones() -> None:
    text = (ROOT / "methods" / "README.md").read_text()
    powers: dict[str, list[str]] = {}
    for growth in recorded("others")["scaling"]:
        letter = {"length": "L", "vocabulary": "V", "batch": "B", "steps": "N"}[growth["axis"]]
        powers.setdefault(growth["method"], []).append(f"{letter}^{growth['exponent']:.2f}")
    for method, found in powers.items():
        assert f"| {NAMES[method]} | {' | '.join(found)} |" in text
