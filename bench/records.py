"""Whether the records of a plug-in (`MethodInfo`, `Identity`, ...) hold what the contract says they hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from dataclasses import fields
from numbers import Integral
from typing import Any

from tsdfm_bench.errors import PluginError


def _strings(value: object) -> bool:
    return isinstance(value, tuple | list | Set) and all(isinstance(item, str) for item in value)


def _options(value: object) -> bool:
    return (
        isinstance(value, Mapping)
        and _strings(list(value))
        and all(isinstance(allowed, str) or _strings(allowed) for allowed in value.values())
    )


# As `tsdfm_bench.api` annotates it -> in words, and whether a value is that.
_FORMS: Mapping[str, tuple[str, Callable[[object], bool]]] = {
    "str": ("a string", lambda value: isinstance(value, str)),
    "bool": ("True or False", lambda value: isinstance(value, bool)),
    "int": ("a whole number", lambda value: isinstance(value, Integral)),
    "int | None": ("a whole number or None", lambda value: value is None or isinstance(value, Integral)),
    "tuple[str, ...]": ("a tuple of strings", _strings),
    "frozenset[str]": ("a set of strings", _strings),
    "Mapping[str, tuple[str, ...] | str]": ("a mapping of names to a tuple of strings or a string", _options),
}


def check_fields(who: str, kind: type[Any], record: object, what: str = "info") -> None:
    """Check every field that a record of the contract has.

    Args:
        who: whose record it is.
        kind: the class in `tsdfm_bench.api`.
        record: an instance of it.
        what: how the message calls the record.

    Raises:
        PluginError: names the first field that holds something else.
    """
    for field in fields(kind):
        words, holds = _FORMS[str(field.type)]
        value = getattr(record, field.name)
        if not holds(value):
            raise PluginError(f"{who}: {field.name} of its {what} is {value!r}, not {words}")
