"""Which runs of a star to make, so that the predicted shape at a target compute is as sure as the compute allows.

The candidates are integer sizes that hardware likes, around the assumed optimum. More runs mean shorter ones, so several
numbers of runs are tried, each with the longest durations that the budget allows, and for each the sizes and seeds are
searched (`planning.exchange`). A run costs its longest duration times 3, whatever it is evaluated at on the way,
plus its cooldown branches if it has any. The search is deterministic. It proposes; it starts nothing and reads no records.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sovit.analysis.intervals import index_runs
from sovit.analysis.law import Law
from sovit.analysis.planning.exchange import MAX_SEEDS, MIN_SIZES, Pool, Run, make_pool, search
from sovit.analysis.planning.information import Arm, Array, Expected, Spread, arm, expect, summary, together
from sovit.analysis.points import AnyDimensions
from sovit.analysis.star import HEADLINE
from sovit.config import RunConfig
from sovit.derived import eval_steps, model_geometry, shape_of
from sovit.duration import Duration
from sovit.flops import forward_gflops
from sovit.schedule import segments, steps_trained
from sovit.schema import DurationsConfig

LEAST_STEPS = 100  # at the first duration; the tiny star's wide end, with 33, does not follow the law
_SPANS = (32.0, 16.0, 10.0)  # longest over shortest duration; more than 32 adds next to nothing
_NUM_RUNS = (16, 19, 23, 27, 32, 38, 45, 54, 64, 76, 91)
_REFERENCE_RUNS, _REFERENCE_SPAN = 22, 16.0  # seven sizes an arm and the center
_NUM_SIZES = 13  # candidates an arm
_FINEST = 128  # multiples of larger powers of two make no product faster


def planned_run(cfg: RunConfig, shape: AnyDimensions) -> Run:
    """What a run of this configuration at another shape is evaluated at and costs. Raises ValueError if it cannot be."""
    model = dataclasses.replace(cfg.model, width=None, depth=None, mlp_dim=None, token_dim=None)
    cell = dataclasses.replace(cfg, shape=str(shape), model=model)
    gflops, batch = forward_gflops(shape_of(cell), **model_geometry(cell)), cell.trainer.global_batch_size
    steps = list(eval_steps(cell))
    trained = steps_trained(segments(steps, cell.eval.weights, cell.schedule.cooldown))  # type: ignore[arg-type]
    return Run(tuple(step * batch * gflops for step in steps), 3 * gflops * batch * trained, steps[0])


def friendly_sizes(name: str, low: float, high: float, cfg: RunConfig, num: int = _NUM_SIZES) -> list[int]:
    """Up to ``num`` sizes from ``low`` to ``high``, evenly spread in log, each a multiple that hardware likes.

    Widths and MLP dimensions are multiples of 8, larger ones of 16 to 128, about an eighth of the size; widths also of
    the heads.
    """
    base = 1 if name == "depth" else 8
    if name == "width":
        base = math.lcm(base, cfg.model.num_heads or cfg.model.head_dim or 1)
    found = set()
    for value in np.geomspace(low, high, num):
        step = base
        while name != "depth" and 2 * step <= min(value / 8, _FINEST):
            step *= 2
        found.add(max(step, round(value / step) * step))
    return sorted(found)


def geometric_durations(last: float, span: float, num: int) -> DurationsConfig:
    """``num`` durations up to ``last`` GFLOPs, the first ``span`` times shorter; both to three digits, downwards."""

    def text(value: float) -> str:
        unit = 10.0 ** (math.floor(math.log10(value)) - 2)
        return str(Duration(float(f"{math.floor(value / unit + 1e-9) * unit:.3g}"), "gflops"))

    return DurationsConfig(first=text(last / span), last=text(last), num=num)


@dataclass(frozen=True)
class Design:
    """A star: for each arm, how many seeds each size is trained with; the center is trained once and held out.

    ``error``: root mean square over the dimensions of the standard error of log x*(T). ``wasted``: share of the
    target's compute lost to it, on average. ``cfg`` holds the durations.
    """

    center: AnyDimensions
    seeds: dict[str, dict[int, int]]
    cfg: RunConfig
    arms: dict[str, Arm]
    expected: dict[str, Expected]
    train_gflops: float

    @property
    def num_runs(self) -> int:
        return 1 + sum(sum(sizes.values()) for sizes in self.seeds.values())

    @property
    def error(self) -> float:
        return together(self.expected.values())[0]

    @property
    def wasted(self) -> float:
        return together(self.expected.values())[1]

    def shapes(self, seed: int) -> list[AnyDimensions]:
        """The shapes trained with seed number ``seed``, the center first."""
        rows = [
            self.center._replace(**{name: size})
            for name, sizes in self.seeds.items()
            for size, count in sizes.items()
            if count > seed
        ]
        return [self.center, *rows] if seed == 0 else rows


@dataclass(frozen=True)
class Task:
    """What a design is for: compute in GFLOPs, ``budget`` to train all runs, ``target`` that of the predicted shape.

    ``cfg``: everything the cells share. ``laws`` and ``spreads`` are assumed, by arm. ``size_range``: largest over
    smallest size of an arm. ``num_durations``: unless the configuration lists its durations. ``middle``: compute at which
    the candidate sizes lie around the assumed optimum.
    """

    center: AnyDimensions
    cfg: RunConfig
    laws: Mapping[str, Law]
    spreads: Mapping[str, Spread]
    budget: float
    target: float
    middle: float
    size_range: float = 16.0
    num_durations: int = 12
    least_steps: int = LEAST_STEPS

    def sizes(self, name: str) -> list[int]:
        """Candidate sizes of an arm, the center's left out."""
        middle, reach = float(self.laws[name].optimum(self.middle)), math.sqrt(self.size_range)
        found = friendly_sizes(name, middle / reach, middle * reach, self.cfg)
        return [size for size in found if size != getattr(self.center, name)]


def middle_compute(cfg: RunConfig, center: AnyDimensions, budget: float) -> float:
    """The compute (GFLOPs) that a star's durations lie around: those listed, else of 22 equal runs for the budget."""
    if cfg.durations.values:
        run = planned_run(cfg, center)
        return math.sqrt(run.t[0] * run.t[-1])
    return budget / 3 / _REFERENCE_RUNS / math.sqrt(_REFERENCE_SPAN)


def best_design(task: Task) -> Design:
    """The design of least expected error. Raises ValueError if the budget cannot pay five sizes an arm."""
    trials: list[tuple[float, int, RunConfig, list[Pool], list[Array]]] = []
    for cfg, max_runs in _duration_choices(task):
        pools = _pools(task, cfg)
        if pools is None:
            continue
        counts = search(pools, task.budget - planned_run(cfg, task.center).train_gflops, max_runs - 1)
        if counts is None:
            continue
        error = sum(float(pool.errors(pool.total(count))) for pool, count in zip(pools, counts, strict=True))
        trials.append((error, len(trials), cfg, pools, counts))
    if not trials:
        listed = (
            f" at the durations that the configuration lists (a run of the center costs "
            f"{planned_run(task.cfg, task.center).train_gflops:.3g})"
            if task.cfg.durations.values
            else f" for at least {task.least_steps} steps before the first evaluation"
        )
        raise ValueError(
            f"--budget {task.budget:g} trains no {MIN_SIZES} sizes an arm{listed} and to errors below the cut-off; "
            "give more, or a smaller center."
        )
    _, _, cfg, pools, counts = min(trials, key=lambda trial: trial[:2])
    seeds = {
        pool.name: {size: int(count) for size, count in zip(pool.sizes, row, strict=True) if count}
        for pool, row in zip(pools, counts, strict=True)
    }
    return evaluate(task, cfg, seeds)


def _duration_choices(task: Task) -> list[tuple[RunConfig, int]]:
    """Configurations with the durations to try, and the most runs to make with each."""
    if task.cfg.durations.values:
        return [(task.cfg, max(_NUM_RUNS))]
    choices = []
    for span in _SPANS:
        for num_runs in _NUM_RUNS:
            choices.append((_with_durations(task, num_runs, span), num_runs))
    return choices


def _with_durations(task: Task, num_runs: int, span: float) -> RunConfig:
    """The longest durations for which so many runs keep within the budget (every run costs about the same)."""
    last = task.budget / 3 / num_runs
    cfg = task.cfg
    for _ in range(4):  # cooldown branches cost steps beyond the longest duration
        cfg = dataclasses.replace(task.cfg, durations=geometric_durations(last, span, task.num_durations))
        try:
            cost = num_runs * planned_run(cfg, task.center).train_gflops
        except ValueError:
            break
        if cost <= task.budget:
            break
        last *= 0.999 * task.budget / cost
    return cfg


def _pools(task: Task, cfg: RunConfig) -> list[Pool] | None:
    """The pools of all arms, or None if the center or five sizes of an arm cannot be trained so."""
    pools = []
    try:
        planned_run(cfg, task.center)
    except ValueError:  # the first duration is shorter than its cooldown
        return None
    for name, law in task.laws.items():
        runs = {}
        for size in task.sizes(name):
            try:
                run = planned_run(cfg, task.center._replace(**{name: size}))
            except ValueError:
                continue
            if run.first_steps >= task.least_steps and law.error(float(size), run.t[-1]) <= HEADLINE:
                runs[size] = run
        if len(runs) < MIN_SIZES:
            return None
        pools.append(make_pool(name, law, task.spreads[name], [*runs], [*runs.values()], task.target))
    return pools


def evaluate(task: Task, cfg: RunConfig, seeds: Mapping[str, Mapping[int, int]]) -> Design:
    """What a star of these sizes and seeds costs and is expected to tell."""
    arms, expected = {}, {}
    cost = planned_run(cfg, task.center).train_gflops
    for name, sizes in seeds.items():
        rows: list[tuple[float, float, int]] = []
        number = 0
        for size, count in sizes.items():
            run = planned_run(cfg, task.center._replace(**{name: size}))
            for _ in range(count):
                rows += [(float(size), t, number) for t in run.t]
                number += 1
                cost += run.train_gflops
        x, t, index = np.array(rows).T
        arms[name] = arm(name, task.laws[name], task.spreads[name], x, t, index)
        expected[name] = expect(arms[name], task.target)
    return Design(task.center, {name: dict(sizes) for name, sizes in seeds.items()}, cfg, arms, expected, cost)


def uniform_designs(task: Task, design: Design) -> dict[str, Design]:
    """Plain stars for the same budget and under the same limits: evenly spread sizes, the same seeds for each."""
    run = planned_run(design.cfg, task.center)
    found = {}
    for num_sizes, num_seeds in itertools.product((5, 7, 9), range(1, MAX_SEEDS + 1)):
        num_runs = 1 + len(task.laws) * num_sizes * num_seeds
        cfg = design.cfg if task.cfg.durations.values else _with_durations(task, num_runs, run.t[-1] / run.t[0])
        pools = _pools(task, cfg)
        if pools is None or min(len(pool.sizes) for pool in pools) < num_sizes:
            continue
        seeds = {}
        for pool in pools:
            chosen = np.linspace(0, len(pool.sizes) - 1, num_sizes).round().astype(int)
            seeds[pool.name] = dict.fromkeys((pool.sizes[index] for index in chosen), num_seeds)
        trial = evaluate(task, cfg, seeds)
        if trial.train_gflops <= 1.01 * task.budget and math.isfinite(trial.error):
            found[f"{num_sizes} sizes x {num_seeds} {'seed' if num_seeds == 1 else 'seeds'}"] = trial
    return found


@dataclass(frozen=True)
class Step:
    """A cell to add to a measured star, the best after those before it.

    ``error``: root mean square over dimensions of the standard error of log x*(T) once it is there; ``wasted`` the share
    of the target's compute lost to it.
    """

    arm: str
    size: int
    seed: int
    train_gflops: float
    error: float
    wasted: float


def measured_arms(fit: Mapping[str, Any], spreads: Mapping[str, Spread]) -> tuple[dict[str, Arm], list[str]]:
    """The arms of a star's fit.json with the points it used, and a remark for each arm that says little or nothing.

    Raises ValueError if no arm has a law with an optimum.
    """
    arms, remarks = {}, []
    for name, row in fit["arms"].items():
        law = Law(**row["law"]) if row["law"] else None
        if row["why"]:
            remarks.append(f"{name}: {row['why']}")
        if law is None or not (law.alpha > 0 and law.beta > 0):
            missing = "there is no law" if law is None else "its law has no optimum"
            if law is not None:
                missing += f"; add sizes {'below the smallest' if law.beta > 0 else 'above the largest'} first"
            remarks.append(f"{name} is left out of what follows: {missing}")
            continue
        used = [point for point in fit["points"] if point["used"] and point["arm"] == name]
        x, t = np.array([point[name] for point in used], float), np.array([point["t_gflops"] for point in used])
        arms[name] = Arm(name, law, spreads[name], x, t, index_runs([point["run_id"] for point in used]))
    if not arms:
        raise ValueError("no arm of this star has a law with an optimum, so nothing can be weighed; widen its arms.")
    return arms, remarks


def next_steps(
    arms: Mapping[str, Arm],
    candidates: Mapping[str, Mapping[int, Run]],
    seeds: Mapping[tuple[str, int], int],
    target: float,
    budget: float,
    max_steps: int,
) -> list[Step]:
    """Cells to add one after the other, each the one that lowers the summed variance of log x*(T) most for its compute.

    ``candidates``: arm -> size -> run. ``seeds``: (arm, size) -> the first seed not yet used. ``budget`` in training
    GFLOPs.
    """
    steps: list[Step] = []
    current, used = dict(arms), dict(seeds)
    while len(steps) < max_steps:
        found = _best_run(current, candidates, target, budget - sum(step.train_gflops for step in steps))
        if found is None:
            break
        _, name, size, run = found
        current[name] = _with_run(current[name], size, run)
        seed = used.get((name, size), 0)
        used[name, size] = seed + 1
        steps.append(Step(name, size, seed, run.train_gflops, *summary(current, target)))
    return steps


def longer_pays(arms: Mapping[str, Arm], candidates: Mapping[str, Mapping[int, Run]], target: float) -> float:
    """How much more the best run twice as long tells for its compute than the best of the candidates; nan if none does."""
    longer = {
        name: {size: Run((*run.t, 2 * run.t[-1]), 2 * run.train_gflops, run.first_steps) for size, run in group.items()}
        for name, group in candidates.items()
    }
    found, rival = _best_run(arms, candidates, target, math.inf), _best_run(arms, longer, target, math.inf)
    return rival[0] / found[0] if found and rival else math.nan


def _best_run(
    arms: Mapping[str, Arm], candidates: Mapping[str, Mapping[int, Run]], target: float, left: float
) -> tuple[float, str, int, Run] | None:
    """The run that lowers the summed variance most for its compute, with that gain; None if none within ``left`` does."""
    best = None
    for name, group in candidates.items():
        before = expect(arms[name], target).log_se_best ** 2
        for size, run in group.items():
            if run.train_gflops <= left:
                after = expect(_with_run(arms[name], size, run), target).log_se_best ** 2
                gain = (before - after) / run.train_gflops
                if gain > (best[0] if best else 0.0):
                    best = gain, name, size, run
    return best


def worth_running(steps: Sequence[Step], lost: float, target: float, enough: float) -> int:
    """How many of the steps to run: until they save most at the target beyond their own cost, or little enough is lost.

    ``lost``: share of the target's compute lost without them; a share of 3 T training GFLOPs is what they can save.
    """
    best, count, spent = 0.0, 0, 0.0
    for number, step in enumerate(steps, start=1):
        if lost <= enough:
            return 0
        spent += step.train_gflops
        net = 3 * target * (lost - step.wasted) - spent
        if net > best:
            best, count = net, number
        if step.wasted <= enough:
            break
    return count


def _with_run(points: Arm, size: float, run: Run) -> Arm:
    """An arm with one run more, without its points above the cut-off."""
    t = np.array(run.t)
    t = t[points.law.error(float(size), t) <= HEADLINE]
    new = np.full(len(t), points.num_runs, dtype=np.intp)
    x = np.append(points.x, np.full(len(t), float(size)))
    return Arm(points.name, points.law, points.spread, x, np.append(points.t, t), np.append(points.run, new))
