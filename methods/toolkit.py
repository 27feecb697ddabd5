"""The toolkit that method plug-ins may build on: everything the built-in methods are made of, in one place.

A method needs only the contract (`tsdfm_bench.api`, `.rng`, `.errors`); this module is an offer. It has the parts of
`methods.core` (State, Source, Grid, Schedule, Denoiser, Posterior, Kernel, Finaliser, DrawPolicy), the frame they are
put into (`Diffusion`: options, weights, refusals, pinned tokens), and the built-in methods themselves, whose weights
another sampler can borrow (`lender`) and whose networks it can use beside its own. `methods/README.md` is the map.

What is named here is stable within one version of the contract; what is not is private. Names are resolved on first
use, so importing the module costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tsdfm_bench import methods
from tsdfm_bench.methods import core

if TYPE_CHECKING:
    from tsdfm_bench.methods import AR, DFM, FSDFM, MDLM, SEDD, TSDFM
    from tsdfm_bench.methods.builtin import Diffusion, Walker, Weighted, finished, one_of, parse_options, schedule_of
    from tsdfm_bench.methods.core import (
        CausalDenoiser,
        CausalNetworkDenoiser,
        Condition,
        Cosine,
        Denoiser,
        DrawPolicy,
        Events,
        Finaliser,
        Geometric,
        Grid,
        Kernel,
        LogLinear,
        MaskSource,
        NetworkDenoiser,
        Polynomial,
        Posterior,
        Schedule,
        Sharpen,
        Source,
        State,
        UniformSource,
        UnigramSource,
        Visit,
        bernoulli_events,
        every_step,
        make_schedule,
        make_source,
        pieces,
        places_visit,
        plan,
        refusal,
        run,
        sequence_logits,
    )

_FRAME = ("Diffusion", "Walker", "Weighted", "finished", "one_of", "parse_options", "schedule_of")

__all__ = [
    "AR",
    "DFM",
    "FSDFM",
    "MDLM",
    "SEDD",
    "TSDFM",
    "CausalDenoiser",
    "CausalNetworkDenoiser",
    "Condition",
    "Cosine",
    "Denoiser",
    "Diffusion",
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
    "Walker",
    "Weighted",
    "bernoulli_events",
    "every_step",
    "finished",
    "make_schedule",
    "make_source",
    "one_of",
    "parse_options",
    "pieces",
    "places_visit",
    "plan",
    "refusal",
    "run",
    "schedule_of",
    "sequence_logits",
]


def __getattr__(name: str) -> Any:
    if name in _FRAME:
        return getattr(import_module("tsdfm_bench.methods.builtin"), name)
    for home in (methods, core):
        if name in home.__all__:
            return getattr(home, name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


def __dir__() -> list[str]:
    return __all__
