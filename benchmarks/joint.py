"""How far to scale, and by which law: the paper's rule, a fitted step, the law that knows its FLOPs.

    python benchmarks/joint.py [--replicates 100] [--coverage 500] [--runs runs] [--out benchmarks/joint.md]

Two synthetic truths at the size of the paper: one in which images seen and each size leave an error of their own
("FLOPs"), and the separable law of the paper (Eq. 3, "separable"). Each is measured by the shipped star and grid
(sweeps/star.yaml, sweeps/grid.yaml) and by a diagonal along the star's exponents with the steps and compute of
sweeps/diagonal.yaml; the rules then name a shape for 10, 100 and 1,000 times the compute of the origin. Compute regret
is the share of compute wasted: 1 - T'/T, T' the smallest compute at which the true optimum reaches the error that the
named shape has at T. With --runs, the same rules on real sweeps, by held-out budget. About five minutes on one core.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq

from sovit.analysis.diagnostics import unusable, vectors
from sovit.analysis.forecast.diagonal import HELD_OUT, DiagonalFit, fit_diagonal
from sovit.analysis.forecast.joint import (
    NEAR,
    FlopsFit,
    FlopsLaw,
    Form,
    Geometry,
    excess,
    fit_flops,
    fit_points,
    read_geometry,
    wald,
)
from sovit.analysis.grid import fit_grid
from sovit.analysis.intervals import fit_with_runs
from sovit.analysis.law import Law
from sovit.analysis.points import DIMENSIONS, Point, dimensions, load_points
from sovit.analysis.star import HEADLINE, find_center, fit_star
from sovit.launch.plan import plan
from sovit.launch.sweep import load_sweep

Array = NDArray[np.float64]
Design = list[tuple[Sequence[float], float]]
SWEEPS = Path(__file__).parents[1] / "sweeps"
GEOMETRY = Geometry(image_size=224, patch_size=14, num_heads=16, pool="map", num_classes=256)
ORIGIN = np.array([608.0, 10.0, 928.0])
CENTER = np.array([1968.0, 40.0, 6144.0])
T0 = 600e6 * float(GEOMETRY.forward_gflops(ORIGIN))
FACTORS = (10, 100, 1000)
STEPS = (0.3, 0.55, 1.0, 1.8, 3.3, 6.0, 11.0)
BUDGETS = (4e9, 8e9, 16e9, 32e9)


class Truth(Protocol):
    def error(self, x: Array, t: Array | float) -> Array: ...
    def optimum(self, t: float) -> Array: ...
    def frontier(self, t: float) -> float: ...


def flops_truth() -> FlopsLaw:
    """Optimal at the origin for T0; its star shows s = 0.22, 0.45, 0.40."""
    a, c, beta, eps = np.array([1.0, 0.42, 0.07]), 0.35, 0.07, 0.10
    log_f, slope, _ = GEOMETRY.log_cost(np.log(ORIGIN))
    center = np.append(np.log(ORIGIN), math.log(T0) - log_f)
    return FlopsLaw(Form(), np.r_[beta * c * slope / a, beta, eps], np.r_[a, c], center, GEOMETRY)


@dataclass(frozen=True)
class Separable:
    """Eq. 3: sum_k alpha_k x_k^-a_k + t^-c (sum_k beta_k x_k^b_k + xi) + eps; its optimum grows as t^s_k exactly."""

    a: tuple[float, ...] = (1.10, 0.45, 0.30)
    b: tuple[float, ...] = (0.49, 0.328, 0.283)
    c: float = 0.35
    beta: float = 0.025
    xi: float = 0.02
    eps: float = 0.12

    def error(self, x: Array, t: Array | float) -> Array:
        u, decay = np.log(np.asarray(x, float) / ORIGIN), (np.asarray(t, float) / T0) ** -self.c
        a, b = np.array(self.a), np.array(self.b)
        gain = (self.beta * b / a * np.exp(-a * u)).sum(-1)
        return np.asarray(gain + decay * ((self.beta * np.exp(b * u)).sum(-1) + self.xi) + self.eps)

    def optimum(self, t: float) -> Array:
        return np.asarray(ORIGIN * (t / T0) ** (self.c / (np.array(self.a) + self.b)))

    def frontier(self, t: float) -> float:
        return float(self.error(self.optimum(t), t))


def regret(truth: Truth, x: Array, t: float) -> float:
    """Share of the compute t that a shape wastes; 1 if even 1e-9 of it would do."""
    error = float(truth.error(x, t))
    if truth.frontier(t) >= error * (1 - 1e-12):
        return 0.0
    if truth.frontier(1e-9 * t) <= error:
        return 1.0
    log_t = math.log(t)
    return 1 - math.exp(brentq(lambda u: truth.frontier(math.exp(u)) - error, log_t - math.log(1e9), log_t) - log_t)


@dataclass(frozen=True)
class Points:
    """Sizes (n, 3), compute (n,), errors (n,) and runs (n,)."""

    x: Array
    t: Array
    error: Array
    run: NDArray[np.str_]

    def take(self, keep: NDArray[np.bool_]) -> Points:
        return Points(self.x[keep], self.t[keep], self.error[keep], self.run[keep])

    def __add__(self, other: Points) -> Points:
        return Points(*(np.concatenate(pair) for pair in zip(self.fields, other.fields, strict=True)))

    @property
    def fields(self) -> tuple[Array, Array, Array, NDArray[np.str_]]:
        return self.x, self.t, self.error, self.run


@dataclass(frozen=True)
class Noise:
    """Relative spread of an evaluation and of a run's offset, and how often every run is repeated."""

    sigma: float = 0.0
    tau: float = 0.0
    seeds: int = 1

    def __str__(self) -> str:
        return f"{self.sigma:.2%}, {self.tau:.2%}, {self.seeds} seed{'s'[: self.seeds > 1]}" if self.sigma else "none"


def measure(truth: Truth, design: Design, noise: Noise, rng: np.random.Generator) -> Points:
    """The errors of a design."""
    x, t = (np.array(column * noise.seeds, float) for column in map(list, zip(*design, strict=True)))
    seed = np.repeat(np.arange(noise.seeds), len(design))
    run = np.array([f"{row}-{number}" for row, number in zip(map(str, x), seed, strict=True)])
    index = np.unique(run, return_inverse=True)[1]
    offset = noise.tau * rng.normal(size=index.max() + 1)[index]
    return Points(x, t, truth.error(x, t) * np.exp(offset + noise.sigma * rng.normal(size=len(t))), run)


def shipped(name: str) -> Design:
    """(shape, t) of every evaluation of a shipped sweep."""
    cells = plan(load_sweep(SWEEPS / f"{name}.yaml")).cells
    return [
        ((cell.shape.width, cell.shape.depth, cell.shape.mlp_dim), 128 * step * cell.forward_gflops)
        for cell in cells
        for step in cell.evaluations
    ]


def diagonal(direction: Array) -> Design:
    """The origin scaled along a direction, rounded as shapes are, at each budget."""
    shapes = [ORIGIN * step**direction for step in STEPS]
    rounded = [(16 * max(round(w / 16), 1), max(round(d), 1), 16 * max(round(m / 16), 1)) for w, d, m in shapes]
    return list(itertools.product(rounded, BUDGETS))


def wide_star() -> Design:
    """The center, and each dimension in six steps down to a sixteenth of it, at six budgets."""
    shapes = [tuple(CENTER)]
    for k in range(3):
        sizes = np.geomspace(CENTER[k] / 16, CENTER[k], 7)[:-1]
        rounded = [float(round(size)) if k == 1 else 16.0 * round(size / 16) for size in sizes]
        shapes += [tuple(np.where(np.arange(3) == k, size, CENTER)) for size in rounded]
    return list(itertools.product(shapes, T0 * 2.0 ** np.arange(-1, 5)))


def arms(star: Points) -> list[tuple[int, Points]]:
    """The star's arms, without the center."""
    off = star.x != CENTER
    return [(k, star.take(off[:, k] & (off.sum(1) == 1))) for k in range(3)]


def exponents(star: Points) -> Array:
    fits = (fit_with_runs(arm.x[:, k], arm.t, arm.error, arm.run).fit.law for k, arm in arms(star))
    return np.array([law.exponent for law in fits])


def flops(points: Points) -> FlopsFit:
    """The FLOPs law of the points near the frontier, as `fit_joint` fits it."""
    near = points.take(excess(points.t, points.error) <= NEAR)
    return fit_flops(near.x, near.t, near.error, near.run, GEOMETRY)


PAPER, FULL, STEP = "t^(s/3), the paper's", "t^s", "direction s, fitted step"
LAW, LAW_STEP = "FLOPs law", "direction of the FLOPs law, fitted step"
RULES = (PAPER, FULL, STEP, LAW_STEP, LAW)


@dataclass(frozen=True)
class Fitted:
    """What one draw of all sweeps says: a diagonal along the star's exponents, one along the FLOPs law's growth."""

    s: Array
    by_star: tuple[Array, Law]
    by_law: tuple[Array, Law] | None
    flops: FlopsLaw

    def shape(self, rule: str, t: float) -> Array | None:
        """The shape a rule names for t GFLOPs; None where the law has no best shape."""
        if rule in (PAPER, FULL):
            return np.asarray(ORIGIN * (t / T0) ** (self.s / 3 if rule == PAPER else self.s))
        if rule == LAW:
            return self.flops.optimum(t) if self.flops.has_optimum() else None
        found = self.by_star if rule == STEP else self.by_law
        return np.asarray(ORIGIN * float(found[1].optimum(t)) ** found[0]) if found else None


def fit_all(truth: Truth, designs: dict[str, Design], noise: Noise, rng: np.random.Generator) -> Fitted:
    star, grid = (measure(truth, designs[name], noise, rng) for name in ("star", "grid"))
    # An exponent that the star leaves open makes no diagonal; nobody would build on one beyond these.
    s = np.clip(exponents(star), 0.05, 1.5)

    def step(direction: Array) -> tuple[Array, Law]:
        line = measure(truth, diagonal(direction), noise, rng)
        g = np.exp(np.log(line.x / ORIGIN) @ direction / (direction @ direction))
        return direction, fit_with_runs(g, line.t, line.error, line.run).fit.law

    both = star + grid
    law = flops(both).law
    growth = None
    if law.has_optimum():
        growth = law.growth(T0)
        growth = step(growth * s.sum() / growth.sum())
    return Fitted(s, step(s), growth, law)


TRUTHS: dict[str, Truth] = {"FLOPs": flops_truth(), "separable": Separable()}
Say = Callable[[str], None]


def regrets(designs: dict[str, Design], replicates: int, say: Say) -> None:
    say("## Compute wasted by the shape each rule names\n")
    say(
        "Share of the compute at 10, 100 and 1,000 times that of the origin; under noise the median and, in brackets, the"
    )
    say(
        "95th percentile of replicates. Noise: spread of an evaluation, of a run's offset, seeds of every sweep. Stars: the"
    )
    say("shipped one (6 sizes over a factor 3, 3 durations), and a wide one (6 sizes over a factor 16, 6 durations).\n")
    wide = designs | {"star": wide_star()}
    cases = [
        ("shipped", designs, Noise()),
        ("shipped", designs, Noise(0.0025, 0.0025)),
        ("shipped", designs, Noise(0.005, 0.005)),
        ("shipped", designs, Noise(0.005, 0.005, 3)),
        ("wide", wide, Noise(0.005, 0.005)),
    ]
    for name, truth in TRUTHS.items():
        say(f"### The {name} truth\n")
        say("| star, noise | rule | x10 | x100 | x1000 |")
        say("|---|---|---|---|---|")
        for star, sweeps, noise in cases:
            rng = np.random.default_rng(0)
            wasted: dict[str, list[list[float]]] = {}
            steps, silent = [], 0
            for _ in range(replicates if noise.sigma else 1):
                found = fit_all(truth, sweeps, noise, rng)
                steps.append(found.by_star[1].exponent)
                silent += not found.flops.has_optimum()
                for rule in RULES:
                    shapes = [(k * T0, found.shape(rule, k * T0)) for k in FACTORS]
                    values = [regret(truth, x, t) if x is not None else 1.0 for t, x in shapes]
                    wasted.setdefault(rule, []).append(values)
            for number, (rule, values) in enumerate(wasted.items()):
                middle, high = np.median(values, axis=0), np.percentile(values, 95, axis=0)
                cells = [f"{m:.1%}" + (f" ({h:.0%})" if noise.sigma else "") for m, h in zip(middle, high, strict=True)]
                label = rule + (f", g = {np.median(steps):.2f}" if rule == STEP else "")
                label += f", no best shape in {silent} of {len(values)} draws" if rule == LAW and silent else ""
                say(f"| {f'{star}, {noise}' if number == 0 else ''} | {label} | {' | '.join(cells)} |")
        say("")


def held_out_errors(designs: dict[str, Design], replicates: int, say: Say) -> None:
    """Both laws fitted to the budgets below the largest (a factor 1.9) of each truth's star, and asked for the rest."""
    say("## Error of the largest budgets, predicted from the smaller ones\n")
    say("Root mean square of the log of predicted over true error, on the star's held-out points; noise 0.5%, 0.5%.\n")
    say("| truth | Eq. 2, an arm each (21 parameters) | FLOPs law, star (9) | FLOPs law, star and grid (9) |")
    say("|---|---|---|---|")
    for name, truth in TRUTHS.items():
        rng, rows = np.random.default_rng(0), []
        for _ in range(replicates):
            star, grid = (measure(truth, designs[key], Noise(0.005, 0.005), rng) for key in ("star", "grid"))
            limit = star.t.max() / HELD_OUT
            off = [star.take((star.x != CENTER).sum(1) == 1), grid]
            early = [points.take(points.t <= limit) for points in off]
            late = off[0].take(off[0].t > limit)
            whole = early[0] + early[1]
            one = np.concatenate(
                [
                    fit_with_runs(arm.x[:, k], arm.t, arm.error, arm.run).fit.law.error(rest.x[:, k], rest.t)
                    / truth.error(rest.x, rest.t)
                    for (k, arm), (_, rest) in zip(arms(early[0]), arms(late), strict=True)
                ]
            )
            two, three = (flops(p).law.error(late.x, late.t) / truth.error(late.x, late.t) for p in (early[0], whole))
            rows.append([np.sqrt(np.mean(np.log(ratio) ** 2)) for ratio in (one, two, three)])
        say(f"| {name} | {' | '.join(f'{value:.2%}' for value in np.median(rows, axis=0))} |")
    say("")


def coverage(designs: dict[str, Design], replicates: int, say: Say) -> None:
    """Do the 95% intervals of the best shape at 100 x T0 hold, under the law's own truth?"""
    say("## Coverage of the FLOPs law's 95% intervals\n")
    say(
        "Share of replicates whose interval of the best width, depth and MLP dimension at 100 times the origin's compute"
    )
    say("holds the true one, and of the local growth exponents there; half-width: median, as a factor.\n")
    say("| sweeps | runs | noise | width | depth | MLP | growth of width | depth | MLP | half-widths |")
    say("|---|---|---|---|---|---|---|---|---|---|")
    truth, t = flops_truth(), 100 * T0
    goal, growth = np.log(truth.optimum(t)), np.log(truth.growth(t))
    for names in (("star",), ("star", "grid")):
        design = [point for name in names for point in designs[name]]
        for noise in (Noise(0.005, 0.0), Noise(0.005, 0.0025), Noise(0.005, 0.005), Noise(0.005, 0.01)):
            rng = np.random.default_rng(0)
            hits, halves, runs = [], [], 0
            for _ in range(replicates):
                points = measure(truth, design, noise, rng)
                fit = flops(points)
                runs = fit.num_runs
                if not fit.law.has_optimum():  # no interval is given
                    continue
                row = []
                for (values, spreads), true in (
                    (fit.estimate.log_shape(t), goal),
                    (fit.estimate.log_growth(t), growth),
                ):
                    for value, se, wanted in zip(values, spreads, true, strict=True):
                        found = wald(value, se, fit.estimate.degrees, 0.95)
                        row.append(found.lo <= math.exp(wanted) <= found.hi)
                        halves.append(found.hi / found.estimate)
                hits.append(row)
            shares = " | ".join(f"{share:.1%}" for share in np.mean(hits, axis=0))
            widths = " ".join(f"{value:.2f}" for value in np.median(np.reshape(halves, (-1, 6)), axis=0)[:3])
            say(f"| {' + '.join(names)} | {runs} | {noise} | {shares} | {widths} |")
            if len(hits) < replicates:
                say(f"| | | {replicates - len(hits)} of {replicates} without a best shape | | | | | | | |")
    say("")


def real(runs: Path, say: Say) -> None:
    """The same questions to the embedded data: held-out budgets of the tiny star, grid and diagonal."""
    directories = [runs / name for name in ("star_tiny", "grid_tiny", "diagonal_tiny")]
    star, grid, line = (load_points(directory, "fractals", 10)[0] for directory in directories)
    usable = [
        [p for p in found if (p.run_id, p.duration) not in unusable(found) and p.error <= HEADLINE]
        for found in (star, grid, line)
    ]
    held_out_real(*usable, read_geometry(directories), say)
    arms = fit_star(star, cutoffs=(HEADLINE,)).arms
    direction = {name: arm.law.exponent for name, arm in arms.items() if arm.law}
    start = fit_grid(grid).origin
    if start is None:
        raise SystemExit("the tiny grid names no origin; extend it.")
    rules_real(fit_diagonal(line, direction=direction, origin=start), start.t0_gflops, say)


def held_out_real(star: list[Point], grid: list[Point], line: list[Point], geometry: Geometry, say: Say) -> None:
    # A shape and seed trained in two sweeps is one run: the first counts.
    together = list({(*dimensions(p), p.seed, p.duration): p for p in (*line, *grid, *star)}.values())
    far = excess([p.t_gflops for p in together], [p.error for p in together])
    near = {(dimensions(p), p.duration) for p, factor in zip(together, far, strict=True) if factor <= NEAR}
    limit = max(p.t_gflops for p in star) / HELD_OUT
    center = find_center(star)
    arms = {name: [p for p in star if dimensions(p).differs(center) == [name]] for name in DIMENSIONS}
    held = [
        [p for group in arms.values() for p in group if p.t_gflops > limit],
        [p for p in line if p.t_gflops > limit],
    ]

    def close(points: Iterable[Point]) -> list[Point]:
        return [p for p in points if (dimensions(p), p.duration) in near]

    def score(law: Callable[[Point], float], points: list[Point]) -> str:
        residuals = np.array([math.log(p.error / law(p)) for p in points])
        return f"{np.sqrt(np.mean(residuals**2)):.1%} ({residuals.mean():+.1%})"

    def row(label: str, law: Callable[[Point], float], tau: float, groups: Sequence[list[Point]]) -> None:
        scores = [score(law, points) for group in groups for points in (close(group), group)]
        say(f"| {label} | {tau:.1%} | {' | '.join([*scores, '', ''][:4])} |")

    say("## The embedded data: largest budgets (181 and 256 GFLOPs) predicted from those up to 128\n")
    say(
        "Root mean square (and mean) of log measured over predicted error on held-out points, all of them and those within"
    )
    say(
        "1.5 times the best of their compute. tau: how far whole runs lie off the law; seeds of one shape differ by 2%.\n"
    )
    say("| law, fitted to | tau | star, near | star, all | diagonal, near | diagonal, all |")
    say("|---|---|---|---|---|---|")
    fits = {
        name: fit_with_runs(*vectors(name, [p for p in group if p.t_gflops <= limit])) for name, group in arms.items()
    }

    def eq2(p: Point) -> float:
        [name] = dimensions(p).differs(center)
        return float(fits[name].fit.law.error(getattr(p, name), p.t_gflops))

    row("Eq. 2, an arm each, star", eq2, max(fit.tau for fit in fits.values()), held[:1])
    for kind in ("near", "all"):
        for label, points in (("star", star), ("star, grid", [*star, *grid]), ("star, grid, diagonal", together)):
            chosen = [p for p in together if p in points and p.t_gflops <= limit]
            fit = fit_points(close(chosen) if kind == "near" else chosen, geometry)
            row(
                f"FLOPs law, {label}, {kind} points",
                lambda p, law=fit.law: float(law.error(dimensions(p), p.t_gflops)),
                fit.tau,
                held,
            )
            if (label, kind) == ("star, grid", "near"):
                named = fit.law.optimum(256.0)
    best = sorted((p.error, dimensions(p)) for p in held[0] + held[1] if p.duration == "256 gflops")[:3]
    say(
        f"\nFor 256 GFLOPs the law of star and grid's near points names {named[0]:.0f}x{named[1]:.1f}x{named[2]:.0f}; the"
    )
    say(f"best measured there are {', '.join(f'{shape} ({error:.3f})' for error, shape in best)}.\n")


def rules_real(whole: DiagonalFit, t0: float, say: Say) -> None:
    say("## The embedded data: how far along the star's direction, by held-out budget\n")
    direction, step = ", ".join(f"{name} {value:.2f}" for name, value in whole.direction.items()), whole.step
    say(
        f"Direction {direction} (tiny star), origin {'x'.join(map(str, whole.origin.values()))}, t0 = {t0:g} GFLOPs (tiny"
    )
    say(f"grid). Step: {whole.why or f'{step.estimate:.2f} [{step.lo:.2f}, {step.hi:.2f}]'}; the paper's is 0.33.\n")
    say(
        "G for each budget by the paper's rule and by a step fitted to the smaller budgets; in brackets the share of compute"
    )
    say(
        "each wastes by the law of all budgets; then that law's own G, and the minimum of a parabola through the slice.\n"
    )
    say(
        "| budget, GFLOPs | paper, (t / t0)^(1/3) | step, budgets to 91 | step, smaller budgets | all budgets | parabola |"
    )
    say("|---|---|---|---|---|---|")
    used = [row for row in whole.points if row["used"]]

    def fitted(below: float, t: float) -> float:
        """G for t by the law of the budgets below."""
        early = [row for row in used if row["t_gflops"] < below]
        x, time, error = (np.array([row[key] for row in early], float) for key in ("g", "t_gflops", "error"))
        return float(fit_with_runs(x, time, error, [row["run_id"] for row in early]).fit.law.optimum(t))

    for piece in whole.minima[3:]:
        t = piece.t_gflops
        named = ((t / t0) ** (1 / 3), fitted(100, t), fitted(0.9 * t, t))
        cells = [f"{g:.2f} ({regret(whole.law, np.array(g), t):.0%})" if math.isfinite(g) else "none" for g in named]
        parabola = f"{piece.parabola_x:.2f}" if piece.parabola_x else "at an edge"
        say(f"| {t:.0f} | {' | '.join(cells)} | {float(whole.law.optimum(t)):.2f} | {parabola} |")
    say("")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--replicates", type=int, default=100)
    parser.add_argument("--coverage", type=int, default=500, metavar="REPLICATES")
    parser.add_argument("--runs", type=Path, help="directory with star_tiny, grid_tiny and diagonal_tiny")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    lines: list[str] = []

    def say(line: str) -> None:
        print(line, flush=True)
        lines.append(line)

    designs = {name: shipped(name) for name in ("star", "grid")}
    say("# How far to scale, and by which law\n")
    say("    python benchmarks/joint.py --runs runs --out benchmarks/joint.md\n")
    regrets(designs, options.replicates, say)
    held_out_errors(designs, options.replicates, say)
    coverage(designs, options.coverage, say)
    if options.runs:
        real(options.runs, say)
    if options.out:
        options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
