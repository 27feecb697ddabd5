"""The toolkit samplers are assembled from.

State and Source say what a sequence is before and while it is sampled; Grid and Schedule say when; a Denoiser
predicts, a Posterior turns the prediction into the distribution a step acts on; a Kernel is one step as an exact
transition law; `run` drives it over visits; a Finaliser removes what is left of the noise; a DrawPolicy says in
which arithmetic tokens are drawn. Names are resolved on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tsdfm_bench.methods.core.denoiser import (
        CausalDenoiser,
        CausalNetworkDenoiser,
        Condition,
        Denoiser,
        NetworkDenoiser,
        sequence_logits,
    )
    from tsdfm_bench.methods.core.draw import DrawPolicy
    from tsdfm_bench.methods.core.finaliser import Finaliser
    from tsdfm_bench.methods.core.grid import Grid
    from tsdfm_bench.methods.core.kernel import Kernel, Posterior, pieces
    from tsdfm_bench.methods.core.loop import run
    from tsdfm_bench.methods.core.request import refusal
    from tsdfm_bench.methods.core.schedule import (
        Cosine,
        Geometric,
        LogLinear,
        Polynomial,
        Schedule,
        make_schedule,
    )
    from tsdfm_bench.methods.core.sharpen import Sharpen
    from tsdfm_bench.methods.core.source import (
        MaskSource,
        Source,
        UniformSource,
        UnigramSource,
        make_source,
    )
    from tsdfm_bench.methods.core.state import State
    from tsdfm_bench.methods.core.visits import Events, Visit, bernoulli_events, every_step, places_visit, plan

_MODULES = {
    "denoiser": (
        "CausalDenoiser",
        "CausalNetworkDenoiser",
        "Condition",
        "Denoiser",
        "NetworkDenoiser",
        "sequence_logits",
    ),
    "draw": ("DrawPolicy",),
    "finaliser": ("Finaliser",),
    "grid": ("Grid",),
    "kernel": ("Kernel", "Posterior", "pieces"),
    "loop": ("run",),
    "request": ("refusal",),
    "schedule": ("Cosine", "Geometric", "LogLinear", "Polynomial", "Schedule", "make_schedule"),
    "sharpen": ("Sharpen",),
    "source": ("MaskSource", "Source", "UniformSource", "UnigramSource", "make_source"),
    "state": ("State",),
    "visits": ("Events", "Visit", "bernoulli_events", "every_step", "places_visit", "plan"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "CausalDenoiser",
    "CausalNetworkDenoiser",
    "Condition",
    "Cosine",
    "Denoiser",
    "DrawPolicy",
    "Events",
    "Finaliser",
    "Geometric",
    "Grid",
    "Kernel",
    "LogLinear",
    "MaskSource",
    "NetworkDenoiser",
    "Polynomial",
    "Posterior",
    "Schedule",
    "Sharpen",
    "Source",
    "State",
    "UniformSource",
    "UnigramSource",
    "Visit",
    "bernoulli_events",
    "every_step",
    "make_schedule",
    "make_source",
    "pieces",
    "places_visit",
    "plan",
    "refusal",
    "run",
    "sequence_logits",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


def __dir__() -> list[str]:
    return __all__
