"""Sweeps that were never trained: errors drawn from a known law, for tests, tutorials and power studies.

A `Cell` says what is evaluated, a `truth.Truth` what the error is, a `Disturbance` what the world adds:
an error of its own to every evaluation and to every run, test sets of finite size, outliers, runs that fail. Nothing
here touches the disk; ``sovit simulate`` writes records.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sovit import records
from sovit.analysis.forecast.joint import Geometry
from sovit.analysis.points import Dimensions, Point
from sovit.analysis.simulation.truth import Array, Truth, default_truth

TINY = Geometry(image_size=16, patch_size=8, num_heads=4, channels=1, pool="avg", num_classes=256)  # conf/model/tiny
_ENDS = ((records.FAILED, "RuntimeError: simulated failure"), (records.DIVERGED, "simulated: training loss is nan"))


@dataclass(frozen=True)
class Cell:
    """A run to simulate. ``evaluations``: (nominal duration, t in GFLOPs) of each; ``forward_gflops``: per image."""

    run_id: str
    shape: Dimensions
    seed: int
    forward_gflops: float
    evaluations: tuple[tuple[str, float], ...]


def cells_at(
    shapes: Iterable[Dimensions],
    compute: Sequence[float],
    *,
    seeds: Sequence[int] = (0,),
    geometry: Geometry = TINY,
    name: str = "simulated",
) -> list[Cell]:
    """Every shape and seed, evaluated at the same ``compute`` (t in GFLOPs); shapes given twice count once."""
    measured = tuple((f"{t:g} gflops", float(t)) for t in compute)
    distinct = list(dict.fromkeys(shapes))
    return [
        Cell(
            f"{name}-w{shape.width:04d}-d{shape.depth:02d}-m{shape.mlp_dim:04d}"
            f"-h{geometry.num_heads:02d}-p{geometry.patch_size:02d}-s{seed}",
            shape,
            seed,
            float(geometry.forward_gflops(shape)),
            measured,
        )
        for seed in seeds
        for shape in distinct
    ]


def star_shapes(center: Dimensions, arms: Mapping[str, Sequence[int]]) -> list[Dimensions]:
    """The center and the shapes that differ from it in one dimension; ``arms``: sizes by dimension."""
    return [center, *(center._replace(**{name: size}) for name, sizes in arms.items() for size in sizes)]


def evaluations(cells: Sequence[Cell]) -> tuple[Array, Array, Array, NDArray[np.intp]]:
    """Sizes (n, 3), t (n,), forward GFLOPs (n,) and the cell (n,) of every evaluation."""
    run = np.repeat(np.arange(len(cells)), [len(cell.evaluations) for cell in cells])
    sizes = np.array([cell.shape for cell in cells], float)
    t = np.array([t for cell in cells for _, t in cell.evaluations])
    return sizes[run], t, np.array([cell.forward_gflops for cell in cells])[run], run


def truth_for(law: str, cells: Sequence[Cell], geometry: Geometry = TINY) -> Truth:
    """The built-in truth ("separable" or "flops") made for these cells; see `truth.default_truth`."""
    if not cells:
        raise ValueError("a sweep without cells has no truth; give at least one cell.")
    sizes, t, forward_gflops, _ = evaluations(cells)
    return default_truth(law, sizes, t, forward_gflops, geometry)


@dataclass(frozen=True)
class Disturbance:
    """What comes on top of the truth. Spreads are relative (0.01 is 1%) and normal in the log of the error.

    ``sigma``: of one evaluation (the mean over its draws), ``tau``: of a run, shared by all its evaluations,
    ``tau_slope``: of a run's slope in log t, zero at the middle compute. ``test_images``: size of the test set, whose
    errors are binomial; None for none. ``outlier_points``: (share, size), ``outlier_runs``: (number, size), errors
    multiplied by 1 + size. ``fail``: share of the runs that do not finish, failed and diverged in turn. A share above 0
    is at least one.
    """

    sigma: float = 0.0
    tau: float = 0.0
    tau_slope: float = 0.0
    test_images: int | None = None
    outlier_points: tuple[float, float] | None = None
    outlier_runs: tuple[int, float] | None = None
    fail: float = 0.0

    def __post_init__(self) -> None:
        for name in ("sigma", "tau", "tau_slope"):
            if not 0 <= getattr(self, name) < 0.5:
                raise ValueError(
                    f"{name}={getattr(self, name)} is not a relative spread from 0 up to 0.5; write 0.01 for 1%."
                )
        if self.test_images is not None and self.test_images < 1:
            raise ValueError(f"test_images={self.test_images} is no test set; give at least 1 image, or none at all.")
        if not 0 <= self.fail < 1:
            raise ValueError(f"fail={self.fail} is not a share from 0 up to 1; write 0.1 for a tenth of the runs.")
        if self.outlier_points is not None and not 0 < self.outlier_points[0] <= 1:
            raise ValueError(
                f"outlier_points: {self.outlier_points[0]} is not a share of the points above 0 and up to 1."
            )
        if self.outlier_runs is not None and self.outlier_runs[0] < 1:
            raise ValueError(f"outlier_runs: {self.outlier_runs[0]} is not a number of runs of at least 1.")
        for name in ("outlier_points", "outlier_runs"):
            found = getattr(self, name)
            if found is not None and (not math.isfinite(found[1]) or found[1] <= -1 or found[1] == 0):
                raise ValueError(
                    f"{name}: an error cannot change by {found[1]:+g}; write 0.1 for 10% more, -0.1 for less."
                )


@dataclass(frozen=True)
class End:
    """How a run that does not finish ends, after so many of its evaluations."""

    status: str
    reason: str
    num_evaluations: int


@dataclass(frozen=True)
class Drawn:
    """A simulated sweep. ``errors`` (n, draws): a row for each evaluation of each cell in turn; ``run`` (n,): its cell.

    ``ends``: cells (by position) that do not finish; ``outlier_runs``: run ids; ``num_clipped``: errors above 1, set to 1.
    """

    errors: Array
    run: NDArray[np.intp]
    ends: dict[int, End]
    outlier_runs: tuple[str, ...]
    num_clipped: int


def _some(rng: np.random.Generator, share: float, num: int) -> NDArray[np.intp]:
    """A share of 0..num-1 without repetition: at least one if the share is above 0."""
    return rng.permutation(num)[: max(1, round(share * num)) if share else 0]


def draw_errors(
    truth: Truth, cells: Sequence[Cell], noise: Disturbance, rng: np.random.Generator, *, num_draws: int = 1
) -> Drawn:
    """Draw the errors of a sweep, ``num_draws`` support draws an evaluation.

    Raises ValueError if the truth has an error outside (0, 1) on a cell, or if there are too few runs for the outliers.
    """
    sizes, t, cost, run = evaluations(cells)
    exact = truth.error(sizes, t, cost)
    if not np.all((exact > 0) & (exact < 1)):
        worst = int(np.argmax(np.abs(exact - 0.5)))
        raise ValueError(
            f"the truth has error {exact[worst]:.3g} for {cells[run[worst]].shape} at {t[worst]:.4g} GFLOPs, which is not "
            "between 0 and 1; give it other coefficients."
        )
    failing = [int(cell) for cell in _some(rng, noise.fail, len(cells))]
    ends = {}
    for cell, (status, reason) in zip(failing, itertools.cycle(_ENDS), strict=False):
        ends[cell] = End(status, reason, int(rng.integers(len(cells[cell].evaluations))))
    finished = [cell for cell in range(len(cells)) if cell not in ends]
    offset = noise.tau * rng.normal(size=len(cells))
    slope = noise.tau_slope * rng.normal(size=len(cells))
    moved: NDArray[np.intp] = np.zeros(0, dtype=np.intp)
    if noise.outlier_runs is not None:
        number, size = noise.outlier_runs
        if number > len(finished):
            raise ValueError(
                f"outlier_runs: {number} runs cannot be outliers, only {len(finished)} of the sweep finish."
            )
        moved = np.sort(rng.permutation(finished)[:number])
        offset[moved] += math.log1p(size)
    log_t = np.log(t)
    level = np.log(exact) + offset[run] + slope[run] * (log_t - log_t.mean())
    if noise.outlier_points is not None:
        share, size = noise.outlier_points
        level[_some(rng, share, len(t))] += math.log1p(size)
    # Each draw has sigma sqrt(draws) of its own, so that their mean, which is the point, has sigma.
    spread = noise.sigma * math.sqrt(num_draws)
    errors = np.exp(level[:, None] + spread * rng.normal(size=(len(t), num_draws)))
    if noise.test_images is not None:  # one test set for all draws: their mean is a count over the images
        mean = np.minimum(errors.mean(1), 1.0)
        errors *= (rng.binomial(noise.test_images, mean) / noise.test_images / mean)[:, None]
    names = tuple(cells[cell].run_id for cell in moved)
    return Drawn(np.minimum(errors, 1.0), run, ends, names, int(np.sum(errors > 1)))


def standard_errors(errors: Array, noise: Disturbance) -> Array:
    """(n, draws) what a record says about each error: the binomial one of the test set.

    Without a test set it is 0, and the spread of the draws is all a fit can know; of a single draw it is sigma's.
    """
    if noise.test_images is not None:
        return np.sqrt(errors * (1 - errors) / noise.test_images)
    return noise.sigma * errors if errors.shape[1] == 1 else np.zeros_like(errors)


def draw(
    truth: Truth, cells: Sequence[Cell], noise: Disturbance, rng: np.random.Generator, *, num_draws: int = 1
) -> list[Point]:
    """The points of the runs that finish, as `sovit.analysis.points.load_points` reads them from records.

    In the order of the cells, and of the evaluations within a cell. Raises what `draw_errors` raises.
    """
    drawn = draw_errors(truth, cells, noise, rng, num_draws=num_draws)
    mean = drawn.errors.mean(1)
    stderr = standard_errors(drawn.errors, noise).mean(1)
    if num_draws > 1:
        stderr = np.hypot(stderr, drawn.errors.std(1, ddof=1) / math.sqrt(num_draws))
    values = iter(zip(mean.tolist(), stderr.tolist(), strict=True))
    points = []
    for position, cell in enumerate(cells):
        for duration, t in cell.evaluations:
            error, spread = next(values)
            if position not in drawn.ends:
                points.append(Point(cell.run_id, *cell.shape, cell.seed, t, duration, error, spread, num_draws))
    return points
