"""What a sweep is asked to do: one pydantic model, filled from a TOML file and the command line (which wins).

Keys are the same in both, `--top-p` being `top_p`. An unknown key, an impossible number or a wrong type is a
`UsageError` before any work: it names the key, what was given, what is possible, and the nearest known key.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, ValidationError, field_validator

from tsdfm_bench.api import Draw, TopPRule
from tsdfm_bench.errors import UsageError, nearest, unknown_name
from tsdfm_bench.launch.settings import LONGEST_S, LauncherSettings, launcher_table
from tsdfm_bench.launch.slurm_settings import check_launcher, parse_option
from tsdfm_bench.spec import Spec, spec_of, split_list, unique

DEFAULT_METHODS = ("tsdfm", "fsdfm", "dfm", "mdlm", "sedd", "ar")
DEFAULT_STEPS = (8, 64)
DEFAULT_SAMPLES = 128
LARGEST_SEED = 2**63 - 1  # what a column of a summary holds
LAUNCHER_OPTIONS = {"jobs": "jobs", "lease": "lease_s"}  # typed -> key of the [launcher] table
DEFAULT_SCORERS = ("char-rnn", "smollm2")


def _listed(value: object) -> object:
    """A list from a list, one value, or text with commas."""
    if isinstance(value, str):
        return split_list(value)
    return list(value) if isinstance(value, list | tuple) else [value]


def _specs(value: object) -> object:
    try:
        return unique(spec_of(item) for item in _listed(value))  # type: ignore[attr-defined]
    except UsageError as error:
        raise ValueError(str(error)) from error


def _whole(value: object) -> int:
    """A whole number from a number or text; True and 1.5 are none."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    try:
        return int(str(value).strip().replace("_", ""))
    except ValueError:
        raise ValueError(f"{value!r} is not a whole number") from None


def _real(value: object) -> float:
    try:
        if isinstance(value, bool):
            raise ValueError
        number = float(str(value).strip())
    except ValueError:
        raise ValueError(f"{value!r} is not a number") from None
    if not math.isfinite(number):
        raise ValueError(f"{value!r} is not a finite number")
    return number


def _steps(value: object) -> int:
    steps = _whole(value)
    if steps < 1:
        raise ValueError(f"{steps} steps cannot be sampled: a step count is at least 1, for example 8,64,1024")
    return steps


def _seed(value: object) -> int:
    seed = _whole(value)
    if not 0 <= seed <= LARGEST_SEED:
        raise ValueError(f"a root seed is a whole number from 0 to {LARGEST_SEED}, not {seed}")
    return seed


def _temperature(value: object) -> float:
    temperature = _real(value)
    if temperature < 0:
        raise ValueError(f"a temperature is at least 0 (0 takes the most likely token), not {temperature:g}")
    return temperature


def _seconds(value: object) -> float | None:
    if value is None:
        return None
    seconds = _real(value)
    if seconds <= 0:
        raise ValueError(f"a time limit is above 0 seconds, not {seconds:g}")
    if seconds > LONGEST_S:
        raise ValueError(f"a time limit is at most {LONGEST_S:.0f} seconds (a year), not {seconds:g}; leave it out")
    return seconds


def _nucleus(value: object) -> float | None:
    if value is None or (isinstance(value, str) and value.strip().lower() in ("none", "off")):
        return None
    mass = _real(value)
    if not 0 < mass <= 1:
        raise ValueError(f"a nucleus mass is above 0 and at most 1 ('none' for no nucleus), not {mass:g}")
    return mass


def _one_of(allowed: tuple[str, ...], what: str) -> Any:
    def check(value: object) -> str:
        if value not in allowed:
            raise ValueError(str(unknown_name(what, str(value), allowed)))
        return str(value)

    return BeforeValidator(check)


def _at_least_one(value: object) -> int:
    number = _whole(value)
    if number < 1:
        raise ValueError(f"at least 1 is needed, not {number}")
    return number


_text_of_specs = PlainSerializer(lambda specs: [str(spec) for spec in specs], return_type=list[str])
Specs = Annotated[list[Spec], BeforeValidator(_specs), _text_of_specs]
Names = Annotated[list[str], BeforeValidator(_listed)]
Positive = Annotated[int, BeforeValidator(_at_least_one)]


class SweepConfig(BaseModel):
    """One sweep: the product of methods, steps, sources, temperatures, nuclei and draws, and how it is judged.

    Args:
        task: what text is imitated.
        methods: generators with their options.
        steps: step counts; methods without steps take part once.
        sources: source distributions; empty = each method's first.
        temperatures: divide the logits; 0 = argmax.
        top_p: nucleus masses, None = no nucleus; top_p_rule says how the boundary token is treated.
        draw: arithmetic of the draw.
        samples: sequences per cell.
        batch_size: sequences per batch; None = chosen from the length (or what the run folder already has).
        length: tokens per sequence; None = the task's.
        scorers: the judges; None = those the task names, else `DEFAULT_SCORERS`.
        metrics: the measures; None = all that are installed.
        conventions: conventions of generative perplexity to report; None = the metric's own choice.
        checkpoint: weights for all methods; None = the shipped ones; "oracle" = the task's exact predictions.
        trust_pickle: published weights may be pickles.
        prefix: pinned at the start of every sequence: a number of tokens of held-out text, or a text; None = nothing.
        infill: share of positions of held-out text that are pinned, at random; None = nothing.
        seed: root seed.
        launcher: how the cells are run: a name, or a table (`LauncherSettings`).
        retry_failed: try again what failed before, also where nothing has changed since.
        cell_timeout: seconds the sampling of one cell may take before it counts as failed; None = no limit.
        out: run folder; None = runs/<task>-<plan>.
        plugins: local plug-in files.
        device: "auto", "cpu", "cuda", ...
        threads: CPU threads; None = all that this process may use.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True, validate_default=True)

    task: Annotated[Spec, BeforeValidator(lambda value: _specs([value])[0]), PlainSerializer(str)] = Spec("sotu")
    methods: Specs = Field(default_factory=lambda: [Spec(name) for name in DEFAULT_METHODS])
    steps: Annotated[list[Annotated[int, BeforeValidator(_steps)]], BeforeValidator(_listed)] = list(DEFAULT_STEPS)
    sources: Names = []
    temperatures: Annotated[list[Annotated[float, BeforeValidator(_temperature)]], BeforeValidator(_listed)] = [1.0]
    top_p: Annotated[list[Annotated[float | None, BeforeValidator(_nucleus)]], BeforeValidator(_listed)] = [None]
    top_p_rule: Annotated[TopPRule, _one_of(("inclusive", "exclusive"), "top-p rule")] = "inclusive"
    draw: Annotated[list[Annotated[Draw, _one_of(("fp64", "legacy-fp32"), "draw")]], BeforeValidator(_listed)] = [
        "fp64"
    ]
    samples: Positive = DEFAULT_SAMPLES
    batch_size: Positive | None = None
    length: Positive | None = None
    scorers: Specs | None = None
    metrics: Specs | None = None
    conventions: Names | None = None
    checkpoint: str | None = None
    trust_pickle: bool = False
    prefix: Annotated[str | None, BeforeValidator(lambda value: value if value is None else str(value))] = None
    infill: float | None = None
    seed: Annotated[int, BeforeValidator(_seed)] = 0
    launcher: Annotated[LauncherSettings, BeforeValidator(launcher_table), PlainSerializer(str)] = LauncherSettings()
    retry_failed: bool = False
    cell_timeout: Annotated[float | None, BeforeValidator(_seconds)] = None
    out: Path | None = None
    plugins: list[Path] = []
    device: str = "auto"
    threads: Positive | None = None

    @field_validator("methods", "steps", "temperatures", "top_p", "draw")
    @classmethod
    def _not_empty(cls, value: list[Any]) -> list[Any]:
        if not value:
            raise ValueError("at least one is needed")
        return list(dict.fromkeys(value))

    @field_validator("sources")
    @classmethod
    def _once(cls, value: list[str]) -> list[str]:
        return list(dict.fromkeys(value))

    @field_validator("infill")
    @classmethod
    def _share(cls, value: float | None) -> float | None:
        if value is not None and not 0 < value < 1:
            raise ValueError(f"the share of pinned positions lies between 0 and 1, not {value:g}")
        return value

    def model_post_init(self, context: Any, /) -> None:
        """Checks of several keys together."""
        if self.prefix is not None and self.infill is not None:
            raise UsageError("--prefix and --infill both pin tokens: give one of them")


def read_toml(path: Path) -> dict[str, Any]:
    """The keys of a sweep file; paths in it are relative to it.

    Raises:
        UsageError: missing, not TOML, or with unknown keys.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"no such sweep file: {path}") from None
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not TOML: {error}") from None
    content = {key.replace("-", "_"): value for key, value in content.items()}
    _check_keys(content, str(path))
    for key in ("plugins",):
        if key in content:
            content[key] = [path.parent / str(item) for item in _listed(content[key])]  # type: ignore[attr-defined]
    return content


def make_config(given: Mapping[str, Any], file: Path | None = None) -> SweepConfig:
    """The configuration of a sweep.

    Args:
        given: keys from the command line; those that are None were not given.
        file: a TOML sweep file, or None.

    Raises:
        UsageError: see `SweepConfig`; every problem is one line.
    """
    merged = read_toml(file) if file is not None else {}
    typed = {key: value for key, value in given.items() if value is not None}
    table = launcher_table(merged.pop("launcher", {})) | launcher_table(typed.pop("launcher", {}))
    merged |= typed
    for option, key in LAUNCHER_OPTIONS.items():
        if option in merged:
            table[key] = merged.pop(option)
    slurm = parse_option(str(merged.pop("slurm"))) if "slurm" in merged else {}
    if merged.pop("detach", None):
        slurm["detach"] = "true"
    if slurm:
        check_launcher(table.get("name"))
        table["slurm"] = {**dict(table.get("slurm", {})), **slurm}
    if table:
        merged["launcher"] = table
    _check_keys(merged, "the request")
    try:
        return SweepConfig(**merged)
    except ValidationError as error:
        lines = [_explain(problem) for problem in error.errors()]
        raise UsageError("\n".join(dict.fromkeys(lines))) from None


def _check_keys(content: Mapping[str, Any], where: str) -> None:
    known = list(SweepConfig.model_fields)
    for key in content:
        if key not in known:
            close = nearest(key, known)
            hint = f"; did you mean {' or '.join(repr(name) for name in close)}?" if close else "."
            raise UsageError(f"unknown key '{key}' in {where}{hint} Known keys: {', '.join(known)}.")


def _explain(problem: Mapping[str, Any]) -> str:
    key = str(problem["loc"][0]) if problem["loc"] else "request"
    message = str(problem["msg"]).removeprefix("Value error, ")
    return f"{key.replace('_', '-')}: {message}"
