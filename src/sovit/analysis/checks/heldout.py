"""What a fit says about budgets it has not seen: the largest are held out, predicted, and compared with what came.

The smaller budgets are fitted; the error at the larger ones and the best size there are predicted. The same runs are on
both sides, so a run's own luck cancels in part, and the standard errors know that. Not tested here: a change of the law
beyond the largest budget measured, which no data at hand can show.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as t_distribution

from sovit.analysis import diagnostics as check
from sovit.analysis.checks.stability import Function, covariance, response, shift, spreads
from sovit.analysis.fit import law_logs
from sovit.analysis.intervals import MIN_RUNS, RunFit, fit_with_runs, index_runs
from sovit.analysis.planning.information import log_jacobian, optimum_gradient
from sovit.analysis.points import Point
from sovit.analysis.varpro import Noise, refit

Array = NDArray[np.float64]
DRAWS = 400
_MIN_DURATIONS = 3  # fitted, at least
_SHARE = 0.25  # of the durations held out unless a number is asked for


@dataclass(frozen=True)
class HeldOut:
    """The largest budgets, predicted from the smaller ones.

    ``factor``: the largest compute over the largest fitted. ``signed``: measured over predicted error - 1, the mean over
    cells; ``z``: that over its standard error, ``p`` of one as large if the law holds. ``covered``: cells inside their
    own 95% prediction interval. ``optimum``: the best size at the largest compute as predicted, with its 95% interval;
    ``optimum_after``: by a fit of all points, ``optimum_p`` of such a difference; ``optimum_slice``: by a parabola through
    the errors measured there. ``regret``: relative excess error of the predicted size, by the fit of all points. The
    fields of the optimum are None where a fit has none.
    """

    num_held: int
    num_durations: int
    fitted_up_to: float
    t_gflops: float
    factor: float
    num_cells: int
    covered: int
    signed: float
    signed_se: float
    rms: float
    z: float
    p: float
    detectable: float
    optimum: float | None
    optimum_lo: float | None
    optimum_hi: float | None
    optimum_after: float | None
    optimum_p: float | None
    optimum_slice: float | None
    regret: float | None


def split(points: Sequence[Point], num_held: int | None = None) -> tuple[NDArray[np.bool_], int, int]:
    """(which points are fitted (n,), durations held out, durations).

    A duration is a slice of equal compute. Where compute differs between sizes at one duration, the points above the
    compute that separates as large a share of them are held out. Raises ValueError if too few durations are left.
    """
    by_duration: dict[str, list[float]] = {}
    for point in points:
        by_duration.setdefault(point.duration, []).append(point.t_gflops)
    count = len(by_duration)
    held = max(1, round(_SHARE * count)) if num_held is None else num_held
    if not 1 <= held <= count - _MIN_DURATIONS:
        raise ValueError(
            f"{held} of {count} durations cannot be held out; hold out at least 1 and leave at least {_MIN_DURATIONS}."
        )
    t = np.array([point.t_gflops for point in points])
    if all(max(ts) <= check.ALIGNED * min(ts) for ts in by_duration.values()):
        ends = sorted(max(ts) for ts in by_duration.values())
        return t <= ends[-held - 1], held, count
    return t <= np.quantile(t, 1 - held / count), held, count


def held_out(
    points: Sequence[Point], name: str, num_held: int | None = None, *, draws: int = DRAWS, seed: int = 0
) -> HeldOut | str:
    """Fit the smaller budgets of an arm, predict the ``num_held`` largest (a quarter of them if not said).

    ``points``: the usable ones of the arm. In words why it cannot be done. The p-values come from sweeps drawn from the
    fits and refitted, each with a standard error by its own REML.
    """
    try:
        early, held, count = split(points, num_held)
    except ValueError as refusal:
        return str(refusal).split(";")[0]
    first = [point for point, kept in zip(points, early, strict=True) if kept]
    if check.too_few(name, first):
        return f"the {count - held} smaller budgets hold too few points or sizes to fit the law"
    x, t, measured, run_id = check.vectors(name, points)
    run = index_runs(run_id)
    before = fit_with_runs(x[early], t[early], measured[early], run[early])
    if before.num_runs < MIN_RUNS:
        return f"{before.num_runs} runs are too few; at least {MIN_RUNS} are needed"
    error = _Errors.of(x, t, run, early, before)
    if error is None:
        return "the smaller budgets do not determine the law"
    off = np.log(measured[~early]) - np.log(before.fit.law.error(x[~early], t[~early]))
    cov = error.covariance(before.noise.ratio, before.sigma)
    signed_se = max(math.sqrt(float(cov.mean())), 1e-12)
    z = float(off.mean()) / signed_se
    by_chance, by_cell = error.by_chance(draws, seed)
    top = float(t[~early].max())
    optimum = _optimum(x, t, measured, run, early, before, top, draws, seed)
    late = [point for point, kept in zip(points, early, strict=True) if not kept]
    slices = check.isocompute(late, check.size_along(name))
    limit, typical = np.quantile(np.abs(by_chance), (0.95, 0.6))
    return HeldOut(
        num_held=held,
        num_durations=count,
        fitted_up_to=float(t[early].max()),
        t_gflops=top,
        factor=top / float(t[early].max()),
        num_cells=len(off),
        covered=int(np.sum(np.abs(off) / np.sqrt(np.diag(cov)) <= by_cell)),
        signed=math.expm1(float(off.mean())),
        signed_se=signed_se,
        rms=float(np.sqrt(np.mean(off**2))),
        z=z,
        p=float((1 + np.sum(np.abs(by_chance) >= abs(z))) / (1 + len(by_chance))),
        detectable=float(limit + typical) * signed_se,
        optimum_slice=check.parabola_minimum(slices[-1]) if slices else None,
        **optimum,
    )


def held_out_rows(points: Sequence[Point], name: str, *, draws: int = DRAWS, seed: int = 0) -> list[HeldOut]:
    """`held_out` for one, two, ... durations held out, up to half of them; those that cannot be done are left out."""
    count = len({point.duration for point in points})
    rows = [held_out(points, name, held, draws=draws, seed=seed) for held in range(1, max(1, count // 2) + 1)]
    return [row for row in rows if isinstance(row, HeldOut)]


@dataclass(frozen=True)
class _Errors:
    """Prediction errors (m,) of held-out points as a linear function of all log errors: ``rows`` (m, n)."""

    x: Array
    t: Array
    early: NDArray[np.bool_]
    run: NDArray[np.intp]
    scale: Array
    rows: Array
    before: RunFit

    @classmethod
    def of(cls, x: Array, t: Array, run: NDArray[np.intp], early: NDArray[np.bool_], before: RunFit) -> _Errors | None:
        units = math.exp(np.log(x[early]).mean()), math.exp(np.log(t[early]).mean())
        at_late = log_jacobian(before.fit.law, x[~early], t[~early], *units)
        predicted = response(log_jacobian(before.fit.law, x[early], t[early], *units), before.noise, at_late)
        if predicted is None:
            return None
        rows = np.zeros((len(at_late), len(x)))
        rows[:, early] = -predicted
        rows[:, ~early] = np.eye(len(at_late))
        scale = np.ones(len(x))
        scale[early] = before.noise.scale
        return cls(x, t, early, run, scale, rows, before)

    def covariance(self, ratio: float, sigma: float) -> Array:
        return covariance(self.rows, Noise(self.run, ratio, self.scale), sigma)

    def by_chance(self, draws: int, seed: int) -> tuple[Array, float]:
        """Mean prediction error over its standard error (draws,) in sweeps drawn from the fit, each refitted; and the
        95% quantile of the same of single cells."""
        law, early = self.before.fit.law, self.early
        whole = Noise(self.run, self.before.noise.ratio, self.scale)
        rng = np.random.default_rng(seed)
        offsets = whole.ratio * rng.normal(size=(int(self.run.max()) + 1, draws))
        noise = self.before.sigma * (self.scale[:, None] * rng.normal(size=(len(self.x), draws)) + offsets[self.run])
        data = np.log(law.error(self.x, self.t))[:, None] + noise
        log_x, log_t = np.log(self.x), np.log(self.t)
        logs = law_logs(log_x - log_x[early].mean(), log_t - log_t[early].mean())
        _, exponents, amounts = refit(
            logs[:, :, early], data[early].T.copy(), self.before.noise, self.before.fit.exponents
        )
        terms = np.exp(np.einsum("jkn,bk->bjn", logs[:, :, ~early], exponents))
        off = data[~early].T - np.log(np.einsum("bj,bjn->bn", amounts, terms))
        ratios, sigmas = spreads(self.before.fit.jacobian, self.before.noise, noise[early])
        alone, shared = self.covariance(0.0, 1.0), self.covariance(1.0, 1.0)
        slope = shared - alone
        mean = off.mean(1) / (sigmas * np.sqrt(alone.mean() + ratios**2 * slope.mean()))
        cells = off / (sigmas[:, None] * np.sqrt(np.diag(alone) + ratios[:, None] ** 2 * np.diag(slope)))
        return mean, float(np.quantile(np.abs(cells), 0.95))


def _optimum(
    x: Array,
    t: Array,
    measured: Array,
    run: NDArray[np.intp],
    early: NDArray[np.bool_],
    before: RunFit,
    top: float,
    draws: int,
    seed: int,
) -> dict[str, float | None]:
    """The fields of `HeldOut` about the optimum at compute ``top``."""
    fields = ("optimum", "optimum_lo", "optimum_hi", "optimum_after", "optimum_p", "regret")
    found: dict[str, float | None] = dict.fromkeys(fields)
    if check.optimal_exponent(before.fit) is None:
        return found
    best = float(before.fit.law.optimum(top))
    units = math.exp(np.log(x[early]).mean()), math.exp(np.log(t[early]).mean())
    rows = response(before.fit.jacobian, before.noise, optimum_gradient(before.fit.law, top, units))
    found["optimum"] = best
    if rows is not None:
        half = float(t_distribution.ppf(0.975, before.num_runs - 3))
        half *= math.sqrt(covariance(rows, before.noise, before.sigma)[0, 0])
        found |= {"optimum_lo": best * math.exp(-half), "optimum_hi": best * math.exp(half) if half < 700 else math.inf}
    after = fit_with_runs(x, t, measured, run)
    if check.optimal_exponent(after.fit) is None:
        return found
    law = after.fit.law
    tested = shift(x, t, measured, after, early, optimum_at(top, x, t), draws, seed)
    later = float(law.optimum(top))
    return found | {
        "optimum_after": later,
        "optimum_p": None if isinstance(tested, str) else tested.p,
        "regret": float(law.error(best, top) / law.error(later, top)) - 1,
    }


def optimum_at(target: float, x: Array, t: Array) -> Function:
    """log of the best size at ``target`` GFLOPs, for fits of points (x, t)."""
    units = math.exp(np.log(x).mean()), math.exp(np.log(t).mean())
    log_t = math.log(target / units[1])

    def of_fits(exponents: Array, coefficients: Array) -> Array:
        a, b, c = exponents.T
        alpha, beta = coefficients[:, 0], coefficients[:, 1]
        with np.errstate(divide="ignore", invalid="ignore"):
            best = (np.log(alpha * a) - np.log(beta * b) + c * log_t) / (a + b)
        return np.where((alpha > 0) & (beta > 0), best + math.log(units[0]), np.nan)

    return Function(
        lambda law: math.log(float(law.optimum(target))), lambda law: optimum_gradient(law, target, units), of_fits
    )
