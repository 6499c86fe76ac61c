"""Shares of a count, and the interval that the count alone leaves: the luck of the images, not of the training."""

from __future__ import annotations

from typing import Any

from scipy.stats import binomtest


def wilson(count: int, total: int) -> tuple[float, float] | tuple[None, None]:
    """The 95 % interval of a share (Wilson 1927); (None, None) of nothing."""
    if not total:
        return None, None
    interval = binomtest(count, total).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


def rate(count: int, total: int) -> dict[str, Any]:
    """{"value", "lo", "hi", "num"} of a share, ready for JSON."""
    lo, hi = wilson(count, total)
    return {"value": count / total if total else None, "lo": lo, "hi": hi, "num": total}


def shown(found: dict[str, Any]) -> str:
    """Such as ``0.312 [0.286, 0.339]``."""
    if found["value"] is None:
        return "none"
    return f"{found['value']:.3f} [{found['lo']:.3f}, {found['hi']:.3f}]"
