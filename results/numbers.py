"""Numbers as text: as many digits as the interval supports, no more.

The half-width of the interval is rounded to one significant digit, or two if the first is 1, and the value to the same
decimal place: 54.63 [52.41, 56.72] reads 55±2, 54.63 [53.31, 55.94] reads 54.6±1.3. A value below a hundredth of the
half-width reads 0; one above keeps its first digit: 28.1 [-472, 528] reads 30±500. A number without an interval gets a
fixed number of significant digits.
"""

from __future__ import annotations

import math

MISSING = "–"


def plain(value: float | None, digits: int = 3) -> str:
    """A number with `digits` significant digits, never in scientific notation below 1e7; "–" for NaN or None."""
    if value is None or math.isnan(value):
        return MISSING
    if math.isinf(value):
        return "inf" if value > 0 else "-inf"
    if value == 0:
        return "0"
    magnitude = math.floor(math.log10(abs(value)))
    if abs(magnitude) >= 7:
        return f"{value:.{digits - 1}e}"
    decimals = digits - 1 - magnitude
    rounded = round(value, decimals)
    if math.floor(math.log10(abs(rounded))) > magnitude:  # 9.996 -> 10.0
        decimals -= 1
    return f"{rounded:.{max(0, decimals)}f}"


def whole(value: float | None) -> str:
    """A count: without decimals if it is whole, with one if not; "–" for NaN or None."""
    if value is None or math.isnan(value):
        return MISSING
    return f"{value:.0f}" if float(value).is_integer() else f"{value:.1f}"


def with_interval(value: float | None, low: float | None, high: float | None, *, show: bool = True) -> str:
    """A value rounded as its interval allows, with "±" and the interval's half-width; no "±" if there is no interval.

    Args:
        value, low, high: the number and the ends of its interval. The half-width of an interval that is not symmetric
            is half its width; files carry both ends.
        show: False leaves the "±" part out and keeps the rounding.
    """
    if value is None or not math.isfinite(value):
        return plain(value)
    if low is None or high is None or not (math.isfinite(low) and math.isfinite(high)):
        return plain(value)
    half = (high - low) / 2
    if half <= 0 or half < 1e-9 * abs(value):
        return plain(value, 4)
    decimals = -math.floor(math.log10(half))  # of the first significant digit
    if round(half, decimals) >= 10 ** (1 - decimals):  # 0.096 -> 0.10
        decimals -= 1
    if half * 10**decimals < 2:  # the first digit is 1 (or was rounded up to it)
        decimals += 1
    if half / 100 < abs(value) < half:
        decimals = max(decimals, -math.floor(math.log10(abs(value))))
    if max(abs(value), half) >= 1e7 or decimals > 7:
        text, spread = plain(value), plain(half, 2)
    else:
        shown = max(0, decimals)
        text, spread = f"{round(value, decimals):.{shown}f}", f"{round(half, decimals):.{shown}f}"
        if not text.strip("-0."):
            text = text.lstrip("-")
    return f"{text}±{spread}" if show else text
