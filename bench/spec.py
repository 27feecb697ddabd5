"""How a user names one thing with its options: `dfm[solver=exact;checkpoint=runs/a]`, `hf:gpt2-large`, `mauve`.

    NAME                    a registered name
    NAME:ARGUMENT           with what follows the first colon handed over as it is (a hub name or a folder)
    NAME[key=value;...]     with options, separated by `;` or `,`

In TOML the same may be a table: {name = "dfm", solver = "exact"}.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from tsdfm_bench.errors import UsageError

_SPEC = re.compile(r"(?P<name>[^:\[\]\s]+)(?::(?P<argument>[^\[\]]+))?(?:\[(?P<options>[^\[\]]*)\])?")


@dataclass(frozen=True)
class Spec:
    """One name with its options.

    Args:
        name: registered name.
        argument: what followed the colon, or "".
        options: option name -> text.
    """

    name: str
    argument: str = ""
    options: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        text = f"{self.name}:{self.argument}" if self.argument else self.name
        options = ";".join(f"{key}={value}" for key, value in sorted(self.options.items()))
        return f"{text}[{options}]" if options else text

    def __hash__(self) -> int:
        return hash(str(self))

    def params(self) -> dict[str, object]:
        """What `load` of a scorer, metric or task gets: the options, and `name` = the argument if there is one."""
        return {**self.options, **({"name": self.argument} if self.argument else {})}


def parse_spec(text: str) -> Spec:
    """The `Spec` of one piece of text; `UsageError` says what is wrong with it."""
    match = _SPEC.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"cannot read '{text}': write NAME, NAME:ARGUMENT or NAME[option=value;option=value]")
    options: dict[str, str] = {}
    for part in re.split(r"[;,]", match["options"] or ""):
        if not part.strip():
            continue
        key, equals, value = part.partition("=")
        key = key.strip()
        if not equals or not key:
            raise UsageError(f"cannot read the option '{part.strip()}' in '{text}': write option=value")
        if key in options:
            raise UsageError(f"option '{key}' is given twice in '{text}'")
        options[key] = value.strip()
    return Spec(match["name"], (match["argument"] or "").strip(), options)


def spec_of(value: object) -> Spec:
    """The `Spec` of a text or of a table with `name`."""
    if isinstance(value, Spec):
        return value
    if isinstance(value, str):
        return parse_spec(value)
    if isinstance(value, Mapping):
        table = {str(key): item for key, item in value.items()}
        if "name" not in table:
            raise UsageError(f"a table needs the key 'name': {table}")
        spec = parse_spec(str(table.pop("name")))
        return Spec(spec.name, spec.argument, {**spec.options, **{key: _text(item) for key, item in table.items()}})
    raise UsageError(f"cannot read {value!r}: write a name, or a table with the key 'name'")


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def split_list(text: str) -> list[str]:
    """Parts of a list separated by commas that are not inside brackets; blank parts are dropped."""
    parts, depth, current = [], 0, ""
    for character in text:
        depth += {"[": 1, "]": -1}.get(character, 0)
        if character == "," and depth <= 0:
            parts.append(current)
            current = ""
        else:
            current += character
    return [part.strip() for part in [*parts, current] if part.strip()]


def unique(items: Iterable[Spec]) -> list[Spec]:
    """Without repetitions, in order."""
    return list({str(item): item for item in items}.values())
