"""Energy from what the device tells: RAPL's counters of a processor's packages, NVML's of a GPU. Else it is not told.

Both count all that the processor or GPU does, other programs' work too. Memory outside the package, fans and power supply
are in neither.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RAPL = Path("/sys/class/powercap")


@dataclass(frozen=True)
class Meter:
    """Counters that ``read`` gives in joules; each starts again at 0 beyond its ``wraps`` (0: never). ``basis``: whose."""

    read: Callable[[], tuple[float, ...]]
    wraps: tuple[float, ...]
    basis: str

    def between(self, before: tuple[float, ...], after: tuple[float, ...]) -> float:
        """Joules from one reading to another, if no counter went round twice."""
        rounds = zip(before, after, self.wraps, strict=True)
        return sum(end - begin if end >= begin else end - begin + wrap for begin, end, wrap in rounds)


def meter(device: str, *, rapl: Path = RAPL) -> Meter | None:
    """The meter of ``cpu``, or of torch's current GPU for ``cuda``; None if the device does not tell."""
    return _nvml() if device == "cuda" else _rapl(rapl)


def _rapl(root: Path) -> Meter | None:
    """The packages, intel-rapl:N (AMD's go by that name too); their parts, intel-rapl:N:M, are in them already."""
    packages = [path for path in sorted(root.glob("intel-rapl:*")) if path.name.count(":") == 1]
    try:
        wraps = tuple(_joules(path / "max_energy_range_uj") for path in packages)
        [_joules(path / "energy_uj") for path in packages]  # often for root only
    except (OSError, ValueError):
        return None
    if not packages:
        return None
    return Meter(lambda: tuple(_joules(path / "energy_uj") for path in packages), wraps, "RAPL, whole packages")


def _joules(path: Path) -> float:
    return int(path.read_text()) / 1e6


def _nvml() -> Meter | None:
    with contextlib.suppress(Exception):  # no such package, no such counter (before Volta), or no permission
        import pynvml
        import torch

        pynvml.nvmlInit()
        handle: Any = torch.cuda._get_pynvml_handler()  # of torch's device, whatever CUDA_VISIBLE_DEVICES hides
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        return Meter(lambda: (pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3,), (0.0,), "NVML, the whole GPU")
    return None
