"""The generators: one file per method, on the toolkit of `methods.core`. Names are resolved on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tsdfm_bench.methods.ar import AR
    from tsdfm_bench.methods.dfm import DFM
    from tsdfm_bench.methods.fsdfm import FSDFM
    from tsdfm_bench.methods.mdlm import MDLM
    from tsdfm_bench.methods.sedd import SEDD
    from tsdfm_bench.methods.tsdfm import TSDFM

__all__ = ["AR", "DFM", "FSDFM", "MDLM", "SEDD", "TSDFM"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module(f"{__name__}.{name.lower()}"), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


def __dir__() -> list[str]:
    return __all__
