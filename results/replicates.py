"""Bootstrap replicates of summary values, from which any formula over rows gets its interval.

A replicate is what a value would have been with other sequences. `Replicates` draws `RESAMPLES` of them for any value
of a summary, jointly: all values of one cell come from the same resampled sequences, and cells whose sequences belong
together (the same held-out prompts) are resampled together. A formula is applied replicate by replicate, and
`interval` reads its interval off the result. So ratios, percentage reductions, interpolations and verdicts are all
treated alike.

Where the run folder holds per-sequence columns (or, for perplexity and bits per byte, scores), sequences are resampled.
Where only a summary is at hand, replicates are drawn from the value's own interval, on the log scale for positive
values, independently of all others: right for a single row, cautious for differences of paired rows. `how` says which.
The same is done for a cell with a damaged file of columns, and `damaged` says so.
What has no interval, such as MAUVE, has no replicates.
"""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tsdfm_bench.results.columns import CellColumns, Terms, cell_columns
from tsdfm_bench.results.files import CorruptFile, StoreError
from tsdfm_bench.results.rows import Row, finite
from tsdfm_bench.results.stats import CONFIDENCE, RESAMPLES, Interval
from tsdfm_bench.results.store import RunFolder

if TYPE_CHECKING:
    import pandas as pd

_CACHE = 4  # weight matrices kept: 2,000 resamples x 1,024 sequences are 16 MiB


class Replicates:
    """Replicates of the values of a summary.

    Args:
        summary: see `tsdfm_bench.results.schema`.
        root: the run folder it belongs to; None: only the summary is known.
        resamples, seed: equal ones give equal replicates.

    Attributes:
        damaged: cell -> a sentence about files of it that were asked for and are damaged.
    """

    def __init__(
        self, summary: pd.DataFrame, root: str | Path | None = None, *, resamples: int = RESAMPLES, seed: int = 0
    ) -> None:
        self.root = Path(root) if root is not None else None
        self.resamples, self.seed = resamples, seed
        self._rows: dict[tuple[str, str, str], dict[str, Any]] = {}
        clean = summary.astype(object).where(summary.notna(), None) if len(summary) else summary
        for row in clean.to_dict("records"):
            self._rows[row["cell"], row["metric"], row["scorer"]] = {str(k): v for k, v in row.items()}
        self.damaged: dict[str, str] = {}
        self._columns: dict[str, CellColumns] = {}
        self._weights: OrderedDict[tuple[str, int], np.ndarray] = OrderedDict()
        self._values: dict[tuple[str, str, str], tuple[np.ndarray, str]] = {}

    def row(self, cell: str, metric: str, scorer: str = "") -> dict[str, Any]:
        """The row of a value; KeyError if the summary has none."""
        return self._rows[cell, metric, scorer]

    def value(self, cell: str, metric: str, scorer: str = "") -> float:
        """The value itself; NaN if it could not be had."""
        value = self.row(cell, metric, scorer)["value"]
        return float(value) if finite(value) else math.nan

    def of(self, cell: str, metric: str, scorer: str = "") -> np.ndarray:
        """(resamples,) replicates of a value; NaN if the value is missing or has no interval to draw from."""
        return self._made(cell, metric, scorer)[0]

    def how(self, cell: str, metric: str, scorer: str = "") -> str:
        """ "sequences", "interval" (drawn from the row's own interval), "constant" or "none"."""
        return self._made(cell, metric, scorer)[1]

    def terms(self, cell: str, metric: str, scorer: str = "") -> Terms | None:
        """The per-sequence terms behind a value, if they are stored and reproduce it."""
        row = self.row(cell, metric, scorer)
        if self.root is None or not finite(row["value"]):
            return None
        found = self._stored(self.root, cell).terms.get((metric, scorer))
        if found is None and cell not in self.damaged:
            found = self._from_scores(cell, metric, scorer)
        if found is None:
            return None
        found = found.head(int(row["n"])) if row["n"] is not None else found
        return found if math.isclose(float(found.value()), row["value"], rel_tol=1e-6, abs_tol=1e-12) else None

    def behind(self, cell: str, metric: str, scorer: str = "") -> list[dict[str, Any]]:
        """The rows behind a value: its own, or one per network where it stands for several (`results.recipes`)."""
        return [self.row(cell, metric, scorer)]

    def clusters(self, cell: str) -> np.ndarray | None:
        """Prompt numbers of a cell's sequences, or None if they are independent."""
        return None if self.root is None else self._stored(self.root, cell).clusters

    def _stored(self, root: Path, cell: str) -> CellColumns:
        if cell not in self._columns:
            damage: list[CorruptFile] = []
            self._columns[cell] = cell_columns(root, cell, damage.append)
            if damage:
                names = ", ".join(Path(error.path).relative_to(root).as_posix() for error in damage)
                self.damaged[cell] = (
                    f"{names} cannot be read ({damage[0].reason}): intervals of the summary stand in for it; the "
                    "command of the run makes it again"
                )
        return self._columns[cell]

    def _made(self, cell: str, metric: str, scorer: str) -> tuple[np.ndarray, str]:
        key = (cell, metric, scorer)
        if key not in self._values:
            self._values[key] = self._make(*key)
        return self._values[key]

    def _make(self, cell: str, metric: str, scorer: str) -> tuple[np.ndarray, str]:
        row = self.row(cell, metric, scorer)
        if not finite(row["value"]):
            return np.full(self.resamples, np.nan), "none"
        terms = self.terms(cell, metric, scorer)
        if terms is not None and terms.n > 1:
            clusters = self.clusters(cell)
            if clusters is not None:
                terms = terms.summed(clusters[: terms.n])
            return terms.value(self._weight(stream(row), terms.n)), "sequences"
        value, low, high = row["value"], row["low"], row["high"]
        if own_spread(row) or not (finite(low) and finite(high)):
            exact = row["unit"] in ("calls", "s", "1/s", "bytes")  # measured once, not estimated from sequences
            return np.full(self.resamples, value if exact else np.nan), "constant" if exact else "none"
        rng = np.random.default_rng(_number(self.seed, cell, metric, scorer))
        noise = rng.standard_normal(self.resamples)
        if low > 0:
            width = math.log(high / low) / (2 * 1.959963984540054)
            return value * np.exp(noise * width), "interval"
        return value + noise * (high - low) / (2 * 1.959963984540054), "interval"

    def _weight(self, key: str, n: int) -> np.ndarray:
        """(resamples, n) multiplicities: the same for everything that shares a key."""
        if (key, n) not in self._weights:
            self._weights[key, n] = weights(n, self.resamples, _number(self.seed, key))
            while len(self._weights) > _CACHE:
                self._weights.popitem(last=False)
        self._weights.move_to_end((key, n))
        return self._weights[key, n]

    def _from_scores(self, cell: str, metric: str, scorer: str) -> Terms | None:
        """Terms of pooled perplexity and bits per byte from the scores, for folders without columns."""
        if self.root is None or not scorer or metric not in ("gen_ppl", "gen_ppl/pooled", "bits_per_byte"):
            return None
        from tsdfm_bench.results.arrays import read_arrow

        path = RunFolder(self.root).scores_path(scorer, cell)
        if not path.exists():
            return None
        try:
            table = read_arrow(path, columns=["nll", "bytes"])[0]
        except StoreError:
            return None
        column = table["nll"].combine_chunks()
        bounds = column.offsets.to_numpy()
        total = np.concatenate([[0.0], np.cumsum(column.values.to_numpy(zero_copy_only=False), dtype=np.float64)])
        nll = total[bounds[1:]] - total[bounds[:-1]]
        if metric == "bits_per_byte":
            return Terms(nll / math.log(2.0), table["bytes"].to_numpy().astype(np.float64))
        return Terms(nll, np.diff(bounds).astype(np.float64), exp=True)


def own_spread(row: Row) -> bool:
    """Whether low and high of a row are no interval: those of MAUVE are the lowest and highest k-means seed."""
    return bool(row["metric"].startswith("mauve"))


def stream(row: Any) -> str:
    """Rows with equal streams have sequences that belong together, number by number, and are resampled together."""
    prefix = row["prefix"]
    if prefix.startswith(("held-out", "infill")):
        return f"{row['task']} {row['data_hash']} {row['length']} {prefix} {row['seed']}"
    return str(row["cell"])


def _number(seed: int, *parts: str) -> int:
    return int.from_bytes(hashlib.sha256("\x1f".join([str(seed), *parts]).encode()).digest()[:8], "big")


def weights(n: int, resamples: int, seed: int) -> np.ndarray:
    """(resamples, n) float64 multiplicities of n units drawn n times with replacement."""
    index = np.random.default_rng(seed).integers(0, n, (resamples, n))
    index += np.arange(resamples)[:, None] * n
    return np.bincount(index.ravel(), minlength=resamples * n).reshape(resamples, n).astype(np.float64)


def interval(value: float, replicates: np.ndarray, *, n: int = 0, confidence: float = CONFIDENCE) -> Interval:
    """The interval of a value from replicates of it: bias-corrected percentiles, widened for few sequences.

    Args:
        value: of the data.
        replicates: (resamples,), of the same formula.
        n: sequences behind it, the smallest number of any row that it uses; 0 = unknown, no widening.
        confidence: coverage asked for.

    Returns:
        no interval, with the reason, if the value or more than one replicate in a hundred is not finite.
    """
    from scipy import stats

    replicates = np.asarray(replicates, dtype=np.float64)
    good = replicates[np.isfinite(replicates)]
    size = len(replicates)

    def none(reason: str) -> Interval:
        return Interval(value, math.nan, math.nan, n, "none", reason, math.nan, confidence, size, 0)

    if not math.isfinite(value):
        return none(f"the value is {value}")
    if not len(good):
        return none("a value that it rests on has no interval")
    if len(good) < 0.99 * size or size < 100:
        return none(f"{size - len(good)} of {size} resamples are not finite")
    if np.ptp(good) <= 1e-12 * abs(value):
        return Interval(value, value, value, n, "constant", "no spread", 0.0, confidence, size, 0)
    below = (np.sum(good < value) + 0.5 * np.sum(good == value)) / len(good)
    if not 0 < below < 1:
        return none("every resample lies on the same side of the value")
    z = stats.norm.ppf(0.5 + confidence / 2)
    if n > 1:
        z = math.sqrt(n / (n - 1)) * stats.t.ppf(0.5 + confidence / 2, n - 1)
    shift = 2 * stats.norm.ppf(below)
    low, high = np.quantile(good, stats.norm.cdf([shift - z, shift + z]))
    error = float(np.std(good, ddof=1))
    return Interval(value, float(low), float(high), n, "bias-corrected", "", error, confidence, size, 0)
