"""What a forecast rests on, read from fit.json files: exponents with their uncertainty, an origin, the compute measured.

Only what a fit identified is taken. Everything else is refused with the command that mends it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as t_distribution

from sovit.analysis.points import DIMENSIONS

SCHEMA = 1
MAX_EXTRAPOLATION = 1000.0
_OPTIONS = {"star": "--fit", "grid": "--grid", "diagonal": "--diagonal", "joint": "--joint"}
_NEEDED = {
    "star": ("sweep", "metric", "level", "arms", "points"),
    "grid": ("sweep", "metric", "origin", "why", "extend", "points"),
    "diagonal": ("sweep", "metric", "level", "direction", "origin", "step", "why", "num_runs", "anchor", "points"),
    "joint": ("sweeps", "metric", "level", "exponents", "why", "flags", "geometry", "estimate", "points"),
}
Array = NDArray[np.float64]
Sizes = tuple[float, float, float]  # width, depth, mlp_dim; not rounded


def read_fit(path: str | Path, kind: str) -> tuple[Path, dict[str, Any]]:
    """The fit.json of one kind (star, grid, diagonal, joint) and its path; a directory stands for the file in it.

    Raises ValueError if there is none, or it is of another kind or schema.
    """
    path = Path(path)
    file = path / "fit.json" if path.is_dir() else path
    try:
        fit = json.loads(file.read_text())
    except FileNotFoundError:
        mend = f"run sovit fit {path}" if path.is_dir() else "give a fit.json or the directory that holds one"
        raise ValueError(f"{file} does not exist; {mend}.") from None
    except (OSError, ValueError):
        raise ValueError(f"{file} is not valid JSON; make it again with sovit fit.") from None
    if not isinstance(fit, dict) or fit.get("kind") not in _OPTIONS:
        raise ValueError(f"{file} is no fit of a sweep; give the fit.json that sovit fit writes.")
    if fit["kind"] != kind:
        raise ValueError(f"{file} is the fit of a {fit['kind']}; give it as {_OPTIONS[fit['kind']]}.")
    if fit.get("schema") != SCHEMA:
        raise ValueError(f"{file} has schema {fit.get('schema')!r}, not {SCHEMA}; make it again with sovit fit.")
    if "family" in fit:
        raise ValueError(
            f"{file} is a fit of family {fit['family']}: there is no prediction for it yet, only for ViTs."
        )
    missing = [key for key in _NEEDED[kind] if key not in fit]
    if missing:
        raise ValueError(f"{file} lacks {', '.join(missing)}; make it again with sovit fit.")
    return file, fit


@dataclass(frozen=True)
class Exponent:
    """An exponent with the ends of its interval at ``level``: lo 0 or hi inf where the data leave that side open.

    ``degrees``: of freedom of its t distribution on the logarithm. ``source``: the sweep, or "given", in which case
    there is no interval (lo = hi = estimate).
    """

    estimate: float
    lo: float
    hi: float
    level: float
    degrees: float
    source: str

    def __post_init__(self) -> None:
        if not 0 < self.estimate < math.inf or not 0 <= self.lo <= self.estimate <= self.hi:
            raise ValueError(
                f"exponent {self.estimate} with interval [{self.lo}, {self.hi}] is not positive and ordered."
            )

    @property
    def is_given(self) -> bool:
        return self.source == "given"

    def scaled_to(self, estimate: float) -> Exponent:
        """The same relative interval about another estimate."""
        ratio = estimate / self.estimate
        return replace(self, estimate=estimate, lo=self.lo * ratio, hi=self.hi * ratio)

    def scales(self) -> tuple[float, float]:
        """Spread of log s below and above the estimate; inf on an open side, 0 for a given exponent."""
        if self.is_given:
            return 0.0, 0.0
        quantile = float(t_distribution.ppf((1 + self.level) / 2, self.degrees))
        below = math.log(self.estimate / self.lo) / quantile if self.lo > 0 else math.inf
        return below, math.log(self.hi / self.estimate) / quantile

    def draw(self, num: int, rng: np.random.Generator) -> Array:
        """Draws of s; 0 below and inf above the estimate on an open side."""
        return np.full(num, self.estimate) if self.is_given else self.at(rng.standard_t(self.degrees, num))

    def at(self, deviates: Array) -> Array:
        """s at so many standard errors of log s from the estimate; 0 or inf on an open side."""
        below, above = self.scales()
        with np.errstate(over="ignore", invalid="ignore"):
            lower = 0.0 if math.isinf(below) else self.estimate * np.exp(deviates * below)
            upper = math.inf if math.isinf(above) else self.estimate * np.exp(deviates * above)
        return np.asarray(np.where(deviates < 0, lower, upper))


def given(value: float) -> Exponent:
    """An exponent taken as it is."""
    return Exponent(value, value, value, 0.95, math.inf, "given")


def star_exponents(fit: Mapping[str, Any], overrides: Mapping[str, float] | None = None) -> dict[str, Exponent]:
    """The exponents of a star's fit.json, single ones replaced. Raises ValueError for an arm that is not identified."""
    overrides = overrides or {}
    found = {}
    for name in DIMENSIONS:
        arm = fit["arms"].get(name)
        if name in overrides:
            found[name] = given(overrides[name])
        elif arm is None:
            raise ValueError(
                f"{fit['sweep']} has no arm of {name}; run its cells, or set the exponent with --exponents {name}=VALUE."
            )
        elif not arm["identified"] or not arm["s"]:
            why = (arm.get("why") or "no reason was recorded").removeprefix("not identified: ")
            raise ValueError(
                f"{name} is not identified in {fit['sweep']} ({why}); widen its arm or its durations and fit again, or "
                f"set the exponent with --exponents {name}=VALUE."
            )
        else:
            degrees = max(1, arm["num_runs"] - 3)
            found[name] = exponent_of(arm["s"], fit["level"], degrees, fit["sweep"])
    return found


def exponent_of(found: Mapping[str, Any], level: float, degrees: float, source: str) -> Exponent:
    high = math.inf if found["hi"] is None else found["hi"]
    return Exponent(found["estimate"], found["lo"] or 0.0, high, level, degrees, source)


@dataclass(frozen=True)
class Start:
    """Where the rule starts: sizes x that are best at t0 GFLOPs (None if not known).

    ``draws``: (sizes, t0, share) that the bootstrap of a grid elects, empty where there is none. ``source``: the sweep.
    """

    x: Sizes
    t0: float | None
    draws: tuple[tuple[Sizes, float, float], ...] = ()
    source: str = "given"


def grid_origin(fit: Mapping[str, Any]) -> Start:
    """The origin of a grid's fit.json. Raises ValueError if the grid has none, saying what to do."""
    origin = fit["origin"]
    if origin is None:
        extend = "; ".join(fit["extend"])
        drawn = fit.get("origins") or []
        mend = "or choose one with --origin WIDTHxDEPTHxMLP --t0 GFLOPS"
        if drawn:
            shape = "x".join(str(drawn[0][name]) for name in DIMENSIONS)
            mend += f" (most draws that find one elect {shape} at {drawn[0]['t0_gflops']:.4g}: {drawn[0]['share']:.0%})"
        raise ValueError(f"{fit['sweep']} has no origin, for {fit['why']}; {extend or 'extend the grid'}; {mend}.")
    rows = [(sizes_of(row), float(row["t0_gflops"]), float(row["share"])) for row in fit.get("origins") or ()]
    return Start(sizes_of(origin), float(origin["t0_gflops"]), tuple(rows), fit["sweep"])


def sizes_of(row: Mapping[str, Any]) -> Sizes:
    return float(row["width"]), float(row["depth"]), float(row["mlp_dim"])


def check_extrapolation(target: float, largest: float, limit: float, force: bool) -> float:
    """T over the largest compute of the fit. Raises ValueError beyond ``limit`` unless forced."""
    factor = target / largest
    if factor > limit and not force:
        many = f"{factor:,.0f}" if factor < 1e6 else f"{factor:.2g}"
        raise ValueError(
            f"{target:.4g} GFLOPs are {many} times the largest compute of the fit ({largest:.4g} GFLOPs), beyond "
            f"the limit of {limit:g}; fit a larger sweep, or force it with --force or --max-extrapolation."
        )
    return factor


def largest_compute(fit: Mapping[str, Any]) -> float:
    """Largest t in GFLOPs among the points that a fit.json used. Raises ValueError if it used none."""
    used = [row["t_gflops"] for row in fit["points"] if row.get("used", True)]
    if not used:
        raise ValueError(f"{fit.get('sweep') or 'the fit'} used no point; fit a sweep with finished runs.")
    return max(used)
