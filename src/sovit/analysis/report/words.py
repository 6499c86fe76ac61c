"""Numbers, intervals and other people's text as a report prints them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from sovit.metric import value_name

ARMS = {"width": "width", "depth": "depth", "mlp_dim": "MLP dimension"}
MIXER_ARMS = {
    "width": "width",
    "depth": "depth",
    "token_dim": "token MLP dimension",
    "mlp_dim": "channel MLP dimension",
}


def arms_of_star(fit: dict[str, Any]) -> dict[str, str]:
    """Dimension -> its name, of the family that a star is of."""
    return MIXER_ARMS if "token_dim" in (fit.get("center") or ()) else ARMS


def value_of(fit: dict[str, Any]) -> str:
    """What a fit's values are called: error, or log-perplexity."""
    metric = fit.get("metric") or {}
    shots = metric.get("shots")
    return value_name(str(metric.get("dataset", "")), shots if isinstance(shots, int) else -1)


def number(value: float | None, digits: int = 3) -> str:
    """A plain number of so many significant digits, never in scientific notation: 0.251, 267, 1,234; '-' for None."""
    if value is None or not math.isfinite(value):
        return "-"
    if value == 0:
        return "0"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}"


def count(value: float | None) -> str:
    """A whole number in full, with thousands separators; '-' for None."""
    return "-" if value is None else f"{value:,.0f}"


def exponent(value: float | None) -> str:
    """An exponent with two decimals, or one digit where those would all be zeros."""
    return "-" if value is None else number(value, 1) if 0 < abs(value) < 0.005 else f"{value:.2f}"


def interval(found: dict[str, Any] | None) -> str:
    """[lo, hi] of a dict with these keys; a side that the data leave open (0 or None) is said to be open."""
    if not found:
        return "-"
    lo, hi = found.get("lo"), found.get("hi")
    if not lo and hi is None:
        return "unbounded"
    if hi is None:
        return f"above {exponent(lo)}"
    return f"[{exponent(lo)}, {exponent(hi)}]" if lo else f"below {exponent(hi)}"


def span(ends: Sequence[float | None] | None) -> str:
    return f"{exponent(ends[0])} to {exponent(ends[1])}" if ends else "-"


def percent(share: float | None, sign: bool = True) -> str:
    """A share of 1 in percent with one decimal, with its sign unless told; '-' for None."""
    if share is None or not math.isfinite(share):
        return "-"
    value = round(100 * share, 1) + 0.0  # no -0.0
    return f"{value:+.1f}%" if sign else f"{value:.1f}%"


def growth(s: float | None) -> str:
    """What ten times the compute does to a size that grows as t^s: 2.2x."""
    if s is None or not math.isfinite(s):
        return "-"
    return f"{number(10**s, 2)}x" if s < 6 else "over 1,000,000x"


def time(seconds: float | None) -> str:
    """3 h 05 min, 2 min 13 s, 47 s."""
    if seconds is None:
        return "-"
    hours, rest = divmod(round(seconds), 3600)
    if hours:
        return f"{hours} h {rest // 60:02d} min"
    return f"{rest // 60} min {rest % 60:02d} s" if rest >= 60 else f"{rest} s"


def shape(sizes: dict[str, Any] | None) -> str:
    """width x depth x MLP dimension of a dict with these keys, as 32x4x128, a Mixer's as 32x4x16x128; '-' for None."""
    if not sizes:
        return "-"
    return "x".join(str(sizes.get(arm, "?")) for arm in (MIXER_ARMS if "token_dim" in sizes else ARMS))


def listed(names: Sequence[str]) -> str:
    """a; a and b; a, b and c."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}" if names else "none"


def counted(how_many: int, noun: str) -> str:
    """1 run, 2 runs."""
    return f"{how_many} {noun}{'' if how_many == 1 else 's'}"


def visible(text: str) -> str:
    """Text from a file with nothing hidden in it: line ends and tabs as spaces, every other character that shows
    nothing or changes what stands around it (controls, bidi overrides, lone surrogates) by number, as [U+202E]."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else " " if one in "\n\r\t\xa0" else f"[U+{ord(one):04X}]" for one in text)
