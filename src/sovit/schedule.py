"""Learning-rate schedule and the segments of a run.

The schedule is the one of "Scaling Vision Transformers" (arXiv 2106.04560, Sec. 3.5): a linear warm-up, a decay without
a horizon, and a linear cooldown to zero. Before its cooldown a reciprocal square root (or constant) schedule does not
know how long the run will be, so one trunk serves every duration: a cooldown branch leaves it for each of them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["rsqrt", "constant", "cosine"]
Weights = Literal["ema", "trunk", "cooled"]


def learning_rate_scale(
    step: int,
    *,
    kind: Kind = "rsqrt",
    total_steps: int,
    warmup_steps: int,
    timescale: int,
    cooldown_steps: int,
    shift: int = 0,
) -> float:
    """Multiplier in [0, 1] of the base learning rate at ``step``, which counts from 0 at the first update.

    ``step`` W = warmup_steps, T = timescale, C = cooldown_steps, all in updates:

    * rsqrt: ``1 / sqrt(1 + (max(step, W) + shift - W) / T)``; ``shift`` delays it (zero unless a run is continued)
    * constant: 1
    * cosine: ``(1 + cos(pi p)) / 2`` with ``p`` from 0 at W to 1 at total_steps. It depends on total_steps from the
      start, so it cannot be the trunk of several durations

    times ``min(1, step / W)`` and ``min(1, (total_steps - step) / C)``, each if its length is positive. With a warm-up
    the first update has multiplier 0; a cooldown reaches 0 exactly at total_steps and stays there.

    Raises ValueError for an unknown kind, a negative length, a non-positive timescale or a cooldown longer than the run.
    """
    lengths = {
        "step": step,
        "total_steps": total_steps,
        "warmup_steps": warmup_steps,
        "cooldown_steps": cooldown_steps,
        "shift": shift,
    }
    for name, value in lengths.items():
        if value < 0:
            raise ValueError(f"{name}={value} is negative; give a number of steps of at least 0.")
    if cooldown_steps > total_steps:
        raise ValueError(
            f"cooldown_steps={cooldown_steps} is more than total_steps={total_steps}; "
            "shorten the cooldown or train longer."
        )

    if kind == "rsqrt":
        if timescale <= 0:
            raise ValueError(f"timescale={timescale} is not positive; the published value is 10000 steps.")
        scale = 1 / math.sqrt(1 + (max(step, warmup_steps) + shift - warmup_steps) / timescale)
    elif kind == "constant":
        scale = 1.0
    elif kind == "cosine":
        decay_steps = max(1, total_steps - warmup_steps)
        progress = min(1.0, max(0, step - warmup_steps) / decay_steps)
        scale = 0.5 * (1 + math.cos(math.pi * progress))
    else:
        raise ValueError(f"Schedule kind {kind!r} is unknown; use rsqrt, constant or cosine.")

    if warmup_steps:
        scale *= min(1.0, step / warmup_steps)
    if cooldown_steps:
        scale *= min(1.0, max(0, total_steps - step) / cooldown_steps)
    return scale


@dataclass(frozen=True)
class Segment:
    """One uninterrupted stretch of training, from the state after ``start`` updates to the state after ``stop``.

    ``total_steps`` and ``cooldown_steps`` are the schedule's. A branch and the trunk segment after it have the same
    ``start``: both continue the trunk's state there. ``evaluate_at`` holds steps in (start, stop].
    """

    kind: Literal["trunk", "branch"]
    start: int
    stop: int
    total_steps: int
    cooldown_steps: int
    evaluate_at: tuple[int, ...]


def segments(eval_steps: Sequence[int], weights: Weights, cooldown: float = 0) -> list[Segment]:
    """The segments of a run that is evaluated after each of ``eval_steps`` updates, in the order they are trained.

    * ema, trunk: one trunk to the last step, without cooldown (``cooldown`` is not read), evaluated on its way
    * cooled: for every duration T a branch over ``T - C .. T`` with the learning rate going to zero, evaluated at T,
      and between the branches the trunk. C is ``cooldown`` steps, or ``round(cooldown * T)`` but at least 1 if it is a
      fraction below 1. The trunk ends where the last branch leaves it; a trunk segment of length zero is left out

    Raises ValueError for no steps, a step below 1, repeated steps, and for cooled a cooldown that is neither a whole
    number of steps nor a fraction, or is longer than a duration.
    """
    steps = sorted(eval_steps)
    if not steps:
        raise ValueError("A run needs at least one evaluation step, got none.")
    if steps[0] < 1:
        raise ValueError(
            f"Evaluation step {steps[0]} is below 1; step 0, the random initialisation, needs no training."
        )
    for step, following in itertools.pairwise(steps):
        if step == following:
            raise ValueError(
                f"Evaluation step {step} is given twice; durations of one run must differ by a step or more."
            )
    total_steps = steps[-1]

    if weights in ("ema", "trunk"):
        return [Segment("trunk", 0, total_steps, total_steps, 0, tuple(steps))]
    if weights != "cooled":
        raise ValueError(f"weights={weights!r} is unknown; use ema, trunk or cooled.")

    plan: list[Segment] = []
    position = 0
    for step in steps:
        cooldown_steps = _cooldown_steps(cooldown, step)
        start = step - cooldown_steps
        assert start >= position, "branches of ascending durations leave the trunk in ascending order"
        if start > position:
            plan.append(Segment("trunk", position, start, total_steps, 0, ()))
            position = start
        plan.append(Segment("branch", start, step, step, cooldown_steps, (step,)))
    return plan


def _cooldown_steps(cooldown: float, total_steps: int) -> int:
    if 0 < cooldown < 1:
        return max(1, round(cooldown * total_steps))
    if cooldown < 1 or cooldown != int(cooldown):
        raise ValueError(
            f"cooldown={cooldown} is neither a whole number of steps nor a fraction between 0 and 1; "
            "for no cooldown use weights ema or trunk."
        )
    if cooldown > total_steps:
        raise ValueError(
            f"cooldown={cooldown:g} steps is longer than the duration of {total_steps} steps; "
            "use a shorter cooldown or a fraction."
        )
    return int(cooldown)


def steps_trained(plan: Iterable[Segment]) -> int:
    """Updates done over all segments; runs of their own for every duration would do ``sum(eval_steps)``."""
    return sum(segment.stop - segment.start for segment in plan)
