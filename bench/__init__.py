"""tsdfm-bench: compare discrete text generators honestly.

The public contract lives in `tsdfm_bench.api`; importing this package imports nothing heavy.
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("tsdfm-bench")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+unknown"

__all__ = ["__version__"]
