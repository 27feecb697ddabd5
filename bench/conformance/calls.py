"""Network calls: what the harness counts through `networks()` is all there is.

Every call of any `torch.nn.Module` is seen through torch's global forward hooks. A call that does not happen inside
another one belongs to a network; it must be one of those that `networks()` shows, or the reported cost is too low. The
same hooks notice a network whose parts are called one by one: then the hooks of the whole never fire, and it counts 0.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tsdfm_bench.conformance.report import Failed
from tsdfm_bench.conformance.subject import BATCH, Subject, require
from tsdfm_bench.meter import Meter

if TYPE_CHECKING:
    from torch import nn


@dataclass
class Seen:
    """Calls of modules.

    Args:
        outermost: id of a module -> how often it was called outside every other one.
        all: id of a module -> how often it was called.
        modules: id -> module; keeps them alive, so that ids stay unique.
    """

    outermost: Counter[int] = field(default_factory=Counter)
    all: Counter[int] = field(default_factory=Counter)
    modules: dict[int, nn.Module] = field(default_factory=dict)


@contextmanager
def watched() -> Iterator[Seen]:
    """See every module call inside the block."""
    from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

    seen, inside = Seen(), [0]

    def before(module: nn.Module, args: Any) -> None:
        seen.modules[id(module)] = module
        seen.all[id(module)] += 1
        if not inside[0]:
            seen.outermost[id(module)] += 1
        inside[0] += 1

    def after(module: nn.Module, args: Any, output: Any) -> None:
        inside[0] -= 1

    handles = [
        register_module_forward_pre_hook(before),
        register_module_forward_hook(after, always_call=True),
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def calls(subject: Subject) -> str:
    """Calls counted through `networks()` are all the calls that were made."""
    import torch

    declared = dict(subject.method.networks())
    require(subject.method.refuse(subject.request()) is None, "it refuses the plain request")
    with watched() as seen, Meter(declared).measure(BATCH) as cost, torch.no_grad():
        subject.method.sample(subject.request())
    ours = {id(module) for network in declared.values() for module in network.modules()}
    tops = {id(network): role for role, network in declared.items()}
    for key, count in seen.outermost.items():
        module = seen.modules[key]
        if key in tops or not _weighs(module):
            continue
        name = type(module).__name__
        if key in ours:
            role = next(role for role, network in declared.items() if module in set(network.modules()))
            raise Failed(
                f"a part of the network '{role}' ({name}) was called {count} times by itself, which is not counted: "
                "call the network, not its parts or its forward()"
            )
        if not any(id(inner) in tops for inner in module.modules()):
            raise Failed(
                f"a network that networks() does not show was called {count} times: {name}, "
                f"{_size(module):,} parameters; add it under a role of its own"
            )
    for role, network in declared.items():
        require(
            cost.calls[role] == seen.all[id(network)],
            f"network '{role}': {cost.calls[role]} calls counted, {seen.all[id(network)]} made",
        )
    counted = ", ".join(f"{role} {count}" for role, count in cost.calls.items())
    return f"calls in a batch: {counted}" if counted else "it has no networks, and none was called"


def _weighs(module: nn.Module) -> bool:
    return any(True for _ in module.parameters()) or any(True for _ in module.buffers())


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
