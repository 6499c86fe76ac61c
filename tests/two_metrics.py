"""A star scored by two metrics, drawn from laws that are known, as points and as the records of a sweep."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from sovit import records
from sovit.analysis.points import Dimensions, Point

CENTER = Dimensions(32, 4, 128)
SIZES = {
    "width": (10, 14, 20, 28, 40, 56, 80),
    "depth": (1, 2, 3, 6, 8, 12),
    "mlp_dim": (16, 32, 64, 192, 320, 512),
}
GROWTH = {"width": 0.22, "depth": 0.45, "mlp_dim": 0.60}
COMPUTE = tuple(float(t) for t in np.geomspace(8, 128, 5))
DECAY, MIDDLE = 0.65, 32.0
BLIND = 1.6
Change = dict[str, float]


def value(shape: Dimensions, t: float, *, faster: Change, larger: Change) -> float:
    """SoViT's joint law with exponents GROWTH x ``faster`` and best sizes at the middle compute of CENTER x ``larger``."""
    found = 0.12
    for name, middle in CENTER._asdict().items():
        s = GROWTH[name] * faster.get(name, 1.0)
        a, b = 0.6 * DECAY / s, 0.4 * DECAY / s
        x = getattr(shape, name) / (middle * larger.get(name, 1.0))
        found += 0.05 * (b / a * x**-a + x**b * (t / MIDDLE) ** -DECAY)
    return found


def draw(
    seed: int,
    *,
    noise: float = 0.004,
    alike: float = 0.6,
    faster: Change | None = None,
    larger: Change | None = None,
) -> tuple[list[Point], list[Point]]:
    """Points by an error and by a log-perplexity of the same runs.

    ``noise``: relative, of a run and again of an evaluation; ``alike``: how it correlates between the metrics. ``faster``,
    ``larger``: what is different by the second.
    """
    rng = np.random.default_rng(seed)
    found: tuple[list[Point], list[Point]] = ([], [])
    shapes = [CENTER, *(CENTER._replace(**{name: size}) for name, sizes in SIZES.items() for size in sizes)]
    for shape in dict.fromkeys(shapes):
        luck = _pair(rng, alike)
        run = f"two-w{shape.width:04d}-d{shape.depth:02d}-m{shape.mlp_dim:04d}-h04-p08-s0"
        for t in COMPUTE:
            grain = _pair(rng, alike)
            for k, (times, change) in enumerate(((1.0, ({}, {})), (2.5, (faster or {}, larger or {})))):
                error = times * value(shape, t, faster=change[0], larger=change[1])
                error *= math.exp(noise * (luck[k] + grain[k]))
                found[k].append(Point(run, *shape, 0, t, f"{t:.4g} gflops", error, 0.004, 1))
    return found


def _pair(rng: np.random.Generator, alike: float) -> tuple[float, float]:
    one, other = rng.normal(size=2)
    return one, alike * one + math.sqrt(1 - alike**2) * other


def write(directory: Path, seed: int = 0, **how: Any) -> Path:
    """Records of such a star: fractals at 10 shots, and multitask. One run is worse than without an image once."""
    by_run: dict[str, list[dict[str, Any]]] = {}
    for points, about in zip(
        draw(seed, **how),
        ({"dataset": "fractals", "shots": 10}, {"dataset": "multitask", "shots": 0, "metric": "log_perplexity"}),
        strict=True,
    ):
        for point in points:
            row = {
                "schema": 1, "run_id": point.run_id, "sweep": directory.name, "width": point.width, "depth": point.depth,
                "mlp_dim": point.mlp_dim, "seed": 0, "step": round(10 * point.t_gflops), "t_gflops": point.t_gflops,
                "duration": point.duration, "weights": "ema", "draw": 0, "l2_reg": None, "error": point.error,
                "stderr": point.stderr, **about,
            }  # fmt: skip
            by_run.setdefault(point.run_id, []).append(row)
    first = min(by_run)
    early = next(row for row in by_run[first] if row["dataset"] == "multitask")
    early["error"] = 1.01 * BLIND
    for run, rows in by_run.items():
        (directory / run).mkdir(parents=True)
        (directory / run / records.EVALS).write_text(records.as_lines(rows))
        baselines = {"fractals": {"chance": 0.98, "pixels": {"10": 0.8}}}
        baselines |= {"multitask": {"chance": BLIND, "pixels": {"0": 1.5}}}
        record = {"schema": 1, "run_id": run, "status": "done", "sweep": directory.name, "seed": 0, "config": {},
                  "baselines": baselines, **{key: rows[0][key] for key in SIZES}}  # fmt: skip
        (directory / run / records.RUN).write_text(json.dumps(record))
    return directory
