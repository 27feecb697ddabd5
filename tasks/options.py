"""Options of scorers and metrics: names checked, text from a command line turned into the type of the default."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tsdfm_bench.errors import UsageError, unknown_name

_TRUE, _FALSE = {"1", "true", "yes", "on"}, {"0", "false", "no", "off"}


def read_options(owner: str, params: Mapping[str, object], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The options of `owner`, defaults filled in.

    Args:
        owner: what the options belong to, for messages: "scorer 'smollm2'".
        params: what the user gave; values may be text.
        defaults: every option with its default. The type of a default is the type of the option; an option whose
            default is None is text.

    Raises:
        UsageError: an unknown option, or a value that is not of the option's type.
    """
    for name in params:
        if name not in defaults:
            raise unknown_name(f"option of {owner}", name, defaults)
    return {name: _read(owner, name, params.get(name, default), default) for name, default in defaults.items()}


def _read(owner: str, name: str, value: object, default: object) -> object:
    if value is None or default is None:
        return None if value is None else str(value)
    kind = type(default)
    try:
        if kind is bool:
            return _boolean(value)
        if kind is int:
            return _integer(value)
        if kind is tuple:
            parts = value.split("+") if isinstance(value, str) else value
            return tuple(str(part).strip() for part in parts)  # type: ignore[attr-defined]
        return kind(value)  # type: ignore[call-arg]
    except (TypeError, ValueError):
        wanted = {bool: "true or false", int: "a whole number", float: "a number", tuple: "names joined by '+'"}
        raise UsageError(f"option '{name}' of {owner} is {wanted.get(kind, 'text')}, not {value!r}") from None


def _boolean(value: object) -> bool:
    text = str(value).strip().lower()
    if text not in _TRUE | _FALSE:
        raise ValueError
    return text in _TRUE


def _integer(value: object) -> int:
    if isinstance(value, bool) or (isinstance(value, float) and value != int(value)):
        raise ValueError
    return int(value)  # type: ignore[call-overload]
