"""What is recorded about training: variants of a method, their cost, and trajectories.

Three files, each beside the summary it explains or alone in a folder; all are optional.

`variants.json` says what distinguishes networks that share a method's name, so that an ablation can be tabulated.
Summary rows find their variant through the hash of the weights:

    {"format": 1, "variants": [{"name": "tau 0.25", "weights": "sha256:...", "method": "tsdfm", "training_seed": 0,
      "settings": {"K": 4, "tau": 0.25, "policy": "seq_to_token", "rule": "argmin", "control": "none"}}]}

`training_cost.json` holds one entry per measured recipe:

    {"format": 1, "costs": [{"name": "tsdfm K=4", "method": "tsdfm", "settings": {"K": 4}, "scale": "sotu",
      "source": "uniform", "seconds_per_step": [1.31, 1.28, ...], "flops_per_step": 2.1e11, "batch": 32,
      "peak_memory_bytes": 9.1e8, "device": "cpu", "threads": 2}]}

`trajectories.parquet` (written with `results.store.write_table`) has one row per arm, sequence and step; its columns
are `TRAJECTORY_COLUMNS`, and `commits`, the positions that took their final token in this step (older files lack it).
Sequences of the two arms that share `sequence` share their start.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tsdfm_bench.results.files import StoreError, read_json

if TYPE_CHECKING:
    import pandas as pd

VARIANTS, COSTS, TRAJECTORIES = "variants.json", "training_cost.json", "trajectories.parquet"

TRAJECTORY_COLUMNS: Mapping[str, str] = {
    "arm": "blind or shaped",
    "source": "source distribution",
    "sequence": "index of the sequence; equal in both arms for the same start",
    "step": "0 = the start, then 1, 2, ... after each jump",
    "t": "time of the state, 0 = noise, 1 = data",
    "nll_nats": "NLL per token of the sequence completed from this state, in nats (exact law, or one scorer)",
    "energy": "compass energy of the state",
    "flips": "share of positions that changed in this step",
    "committed": "share of positions that already hold their final token",
    "entropy_nats": "unigram entropy of the state's tokens, in nats",
}

Setting = str | int | float | bool


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Variant(_Entry):
    """One trained network.

    Args:
        name: short, for axes and tables.
        weights: hash of its weights, as in the summary.
        method: registered name.
        training_seed: seed of its training.
        settings: what distinguishes it: K, tau, policy, rule, control, ...
        default: whether it stands for the method in the main tables.
        alike: whether it is trained like that one, as long and in the same batches: a claim compares no others.
    """

    name: str
    weights: str = Field(pattern=r"^sha256:[0-9a-f]{8,64}$")
    method: str
    training_seed: int = 0
    settings: dict[str, Setting] = {}
    default: bool = False
    alike: bool = True

    def values(self) -> dict[str, Any]:
        """Its settings, name and seed in one mapping."""
        return {
            "name": self.name,
            "training_seed": self.training_seed,
            "default": self.default,
            "alike": self.alike,
            **self.settings,
        }


class Variants(_Entry):
    """The content of variants.json."""

    format: Literal[1] = 1
    variants: list[Variant] = []

    def of(self, weights: str) -> dict[str, Any]:
        """What is known of these weights; {} if nothing."""
        return next((variant.values() for variant in self.variants if variant.weights == weights), {})

    def plus(self, other: Variants) -> Variants:
        """Both, the first entry for a hash counting."""
        return Variants(variants=[*self.variants, *other.variants])


class Cost(_Entry):
    """What one training step costs.

    Args:
        name: short, for axes and tables.
        method: registered name; "fsdfm" is the unshaped student.
        seconds_per_step: wall-clock seconds of measured steps, warm-up left out.
        flops_per_step: floating-point operations of one step, forward and backward; None if not counted.
        batch: sequences per step.
        weights: hash of the network that these steps trained; "" if it is not kept.
        settings, scale, source, device, threads, peak_memory_bytes, steps: circumstances.
    """

    name: str
    method: str
    scale: str
    source: str = ""
    weights: str = ""
    seconds_per_step: list[float] = Field(min_length=1)
    flops_per_step: float | None = Field(default=None, gt=0)
    batch: int = Field(ge=1)
    steps: int | None = Field(default=None, ge=1)
    settings: dict[str, Setting] = {}
    peak_memory_bytes: float | None = Field(default=None, ge=0)
    device: str = ""
    threads: int | None = None


class Costs(_Entry):
    """The content of training_cost.json."""

    format: Literal[1] = 1
    costs: list[Cost] = []

    def plus(self, other: Costs) -> Costs:
        """Both."""
        return Costs(costs=[*self.costs, *other.costs])


def _read(path: Path, model: type[BaseModel]) -> Any:
    content = read_json(path, checksum=False)
    try:
        return model.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise StoreError(f"{path}: {where}: {first['msg']} (see tsdfm_bench.results.training).", path) from error


def read_variants(path: str | os.PathLike[str]) -> Variants:
    """Read variants.json; `StoreError` names the file and the key that is wrong."""
    result: Variants = _read(Path(path), Variants)
    return result


def read_costs(path: str | os.PathLike[str]) -> Costs:
    """Read training_cost.json; `StoreError` names the file and the key that is wrong."""
    result: Costs = _read(Path(path), Costs)
    return result


def read_trajectories(path: str | os.PathLike[str]) -> pd.DataFrame:
    """Read trajectories.parquet.

    Raises:
        StoreError: columns are missing, an arm is neither blind nor shaped, or the file is damaged.
    """
    from tsdfm_bench.results.arrays import read_table

    frame = read_table(path)
    if missing := [name for name in TRAJECTORY_COLUMNS if name not in frame.columns]:
        raise StoreError(f"{path} lacks the columns {', '.join(missing)} (see tsdfm_bench.results.training).", path)
    if unknown := sorted(set(frame["arm"]) - {"blind", "shaped"}):
        raise StoreError(f"{path}: an arm is blind or shaped, not {unknown[0]!r}.", path)
    return frame
