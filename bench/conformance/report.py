"""What the conformance kit finds: one result per check and setting, put together into one row per check.

A check ends in one of three ways. It passes and says what was seen; it fails and says what is wrong; or it does not
apply and says why. A skipped check is no failure: a method that refuses a request with a reason keeps the contract.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Verdict = Literal["pass", "fail", "skipped"]


class Failed(Exception):
    """A check found something wrong; the message says what."""


class Skipped(Exception):
    """A check does not apply; the message says why."""


@dataclass(frozen=True)
class Result:
    """One check of one setting.

    Args:
        check: id of the check.
        setting: which source and options, as text.
        verdict: how it ended.
        seen: what was seen, what is wrong, or why it does not apply.
        seconds: how long it took.
    """

    check: str
    setting: str
    verdict: Verdict
    seen: str
    seconds: float = 0.0


@dataclass(frozen=True)
class Row:
    """One check over all settings it ran on.

    Args:
        check, title, explanation: of the check.
        verdict: "fail" if one setting fails, else "pass" if one passes, else "skipped".
        seen: what was seen.
        results: one per setting.
        seconds: of all settings together.
    """

    check: str
    title: str
    explanation: str
    verdict: Verdict
    seen: str
    results: tuple[Result, ...]

    @property
    def seconds(self) -> float:
        """Time of all its settings."""
        return sum(result.seconds for result in self.results)


@dataclass(frozen=True)
class Report:
    """Everything found about one method.

    Args:
        method: as asked for.
        settings: what was tried: sources and options.
        rows: one per check, in the order of the kit.
    """

    method: str
    settings: tuple[str, ...]
    rows: tuple[Row, ...]

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return all(row.verdict != "fail" for row in self.rows)

    @property
    def failed(self) -> list[str]:
        """Ids of the checks that failed."""
        return [row.check for row in self.rows if row.verdict == "fail"]

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        rows = [asdict(row) | {"seconds": round(row.seconds, 3)} for row in self.rows]
        return {
            "method": self.method,
            "passed": self.passed,
            "settings": list(self.settings),
            "checks": rows,
        }


def summarise(check: str, title: str, explanation: str, results: Sequence[Result]) -> Row:
    """One row from the results of all settings."""
    kinds = {result.verdict for result in results}
    verdict: Verdict = "fail" if "fail" in kinds else "pass" if "pass" in kinds else "skipped"
    shown = [result for result in results if result.verdict == verdict]
    if verdict == "fail":
        seen = "\n".join(dict.fromkeys(f"{result.setting}: {result.seen}" for result in shown[:3]))
        seen += f"\nand {len(shown) - 3} more settings" if len(shown) > 3 else ""
    else:
        seen = shown[0].seen if shown else "nothing to check"
    return Row(check, title, explanation, verdict, seen, tuple(results))
