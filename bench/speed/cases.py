"""What `bench-speed` compares: samplers with their plain loops, and the sizes they run at."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tsdfm_bench.api import Method
from tsdfm_bench.errors import UsageError
from tsdfm_bench.registry import Registry
from tsdfm_bench.speed import plain
from tsdfm_bench.speed.plain import Problem


@dataclass(frozen=True)
class Size:
    """Geometry of the networks.

    Args:
        name: as typed.
        vocab_size, length: V and L.
        network: width, blocks, heads, condition.
        task: whose shipped weights are used; None = random weights, whose calls cost the same.
    """

    name: str
    vocab_size: int
    length: int
    network: Mapping[str, int]
    task: str | None = None


SMALL_NETWORK = {"width": 128, "blocks": 4, "heads": 4, "condition": 64}
SIZES = {
    "sotu": Size("sotu", 2048, 64, SMALL_NETWORK, "sotu"),
    "base": Size("base", 50_257, 1024, {"width": 768, "blocks": 12, "heads": 12, "condition": 128}),
}


@dataclass(frozen=True)
class Case:
    """A sampler and what it is compared with.

    Args:
        method, params: as in `--methods`; `source` among the params.
        plain: the loop of equal law, run in fp64; None = none is written.
        published: the loop as published, if it differs, and its arithmetic: fp32 has another law.
    """

    method: str
    params: Mapping[str, str] = field(default_factory=dict)
    plain: Callable[[Problem], Tensor] | None = None
    published: tuple[Callable[[Problem], Tensor], torch.dtype] | None = None

    @property
    def source(self) -> str | None:
        """Source distribution, None for methods without one."""
        return self.params.get("source")

    @property
    def label(self) -> str:
        """Method and the values of its options."""
        return " ".join([self.method, *self.params.values()])


CASES = (
    Case("dfm", {"source": "uniform", "solver": "euler"}, plain.dfm),
    Case("dfm", {"source": "uniform", "solver": "exact"}),
    Case("dfm", {"source": "uniform", "solver": "cumulative"}),
    Case("fsdfm", {"source": "uniform"}, plain.fsdfm),
    Case("tsdfm", {"source": "uniform"}, plain.fsdfm),
    Case("mdlm", {"source": "mask", "sampler": "cached"}, plain.mdlm, (plain.mdlm_cache, torch.float32)),
    Case("mdlm", {"source": "mask", "sampler": "ancestral"}, plain.mdlm, (plain.mdlm, torch.float32)),
    Case("sedd", {"source": "mask"}, plain.sedd, (plain.sedd, torch.float32)),
    Case("ar"),
)


def load_method(registry: Registry, case: Case, size: Size, device: str) -> Method:
    """The sampler at a size: with shipped weights where the size has a task, else with random ones.

    Raises:
        UsageError: random weights are needed and the method cannot make them.
    """
    cls = registry.load("methods", case.method)
    if size.task is not None:
        given = {"task": size.task, "vocab_size": size.vocab_size, "length": size.length, "checkpoint": None}
        method: Method = cls.load({**given, **case.params}, device)
        return method
    if not hasattr(cls, "untrained"):
        raise UsageError(f"method '{case.method}' has no `untrained`: it can be measured at the size sotu only")
    geometry = {"vocab_size": size.vocab_size, "length": size.length, **size.network}
    torch.manual_seed(0)
    made: Method = cls.untrained(case.params, geometry, device)
    return made
