"""From a stored plan back to a request: the sweep of a run folder, and the command that makes one of its rows.

A cell's identity is what is sampled, so a request for that cell alone gives the same cell id and, from the same
weights, the same samples. Absolute paths are stored with their last two parts only (results carry no user's folders):
where a checkpoint was one, the command names it as it is known.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from tsdfm_bench.errors import UsageError
from tsdfm_bench.spec import Spec, parse_spec

_SWEPT = ("methods", "steps", "sources", "temperatures", "top_p", "draw")
_SAME = ("task", "length", "checkpoint", "seed")


def pinning_keys(setting: str) -> dict[str, Any]:
    """The keys of a request that pin tokens, from a pinning (see `tsdfm_bench.conditioning`)."""
    what, _, argument = setting.partition(" ")
    if what == "infill":
        return {"infill": float(argument)}
    return {"prefix": argument} if what else {}


def sweep_keys(plan: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of `SweepConfig` that a plan.json came from."""
    request = plan["request"]
    given = {key: request[key] for key in (*_SWEPT, *_SAME) if request.get(key) not in (None, [])}
    given |= {"top_p_rule": request.get("top_p_rule", "inclusive"), **pinning_keys(request.get("prefix", ""))}
    given |= {key: plan[key] for key in ("samples", "scorers", "metrics") if plan.get(key) is not None}
    return given


def row_keys(cell: Mapping[str, Any], plan: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a request for one cell of a plan alone; a reference comes with the plan's first method.

    Args:
        cell: an entry of `cells` or `not_run` in plan.json.
        plan: plan.json.
    """
    request = plan["request"]
    given: dict[str, Any] = {"task": cell["task"], "length": cell["length"], "seed": cell["seed"]}
    if cell["kind"] == "method":
        given["methods"] = [_method(cell, request)]
        swept = (("steps", "steps"), ("sources", "source"), ("temperatures", "temperature"), ("draw", "draw"))
        given |= {key: [cell[name]] for key, name in swept if cell[name] is not None}
        if cell["top_p"] is not None:
            given |= {"top_p": [cell["top_p"]], "top_p_rule": cell["top_p_rule"]}
    else:
        given["methods"] = list(request["methods"][:1])
        given |= {key: request[key][:1] for key in ("steps", "temperatures", "draw") if request.get(key)}
    if request.get("checkpoint"):
        given["checkpoint"] = request["checkpoint"]
    given |= pinning_keys(cell["prefix"])
    return given | {key: plan[key] for key in ("samples", "scorers") if plan.get(key)}


def _method(cell: Mapping[str, Any], request: Mapping[str, Any]) -> str:
    """The method as it was asked for: with its checkpoint, where the request names one for it alone."""
    for text in request.get("methods", ()):
        try:
            spec = parse_spec(str(text))
        except UsageError:
            continue
        options = {key: value for key, value in spec.options.items() if key != "checkpoint"}
        if spec.name == cell["method"] and options == dict(cell["options"]):
            return str(text)
    return str(Spec(cell["method"], str(cell.get("argument") or ""), dict(cell["options"])))


def command_of(given: Mapping[str, Any]) -> str:
    """The `tsdfm-bench run` of a request, ready to be pasted; what is the default anyway is left out."""
    words = ["tsdfm-bench", "run"]
    for key, value in given.items():
        if (key, value) in (("temperatures", [1.0]), ("draw", ["fp64"]), ("seed", 0), ("top_p_rule", "inclusive")):
            continue
        words += [f"--{key.replace('_', '-')}", _text(value)]
    return shlex.join(words)


def _text(value: object) -> str:
    if isinstance(value, list | tuple):
        return ",".join(_text(item) for item in value)
    return f"{value:g}" if isinstance(value, float) else str(value)
