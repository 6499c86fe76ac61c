"""What a sweep will do before it does it: every cell with its steps, its compute and the time to expect.

Composes every cell, so a sweep that plans is a sweep whose cells all start. Loads no torch.
"""

from __future__ import annotations

import heapq
import os
import shutil
import statistics
import subprocess
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sovit import records
from sovit.config import ConfigError, RunConfig, compose, eval_steps, model_geometry, shape_of
from sovit.flops import forward_gflops, num_params
from sovit.launch.sweep import Sweep, SweepError
from sovit.schedule import segments, steps_trained
from sovit.shape import Shape


@dataclass(frozen=True)
class TimeModel:
    """What a run costs on one worker. ``step_s`` and ``block_s`` are the overhead of an update and of each encoder block
    in it, most of the time of a small model; ``gflops_per_s`` is the speed of the matrix products.
    """

    accelerator: str
    start_s: float
    step_s: float
    block_s: float
    gflops_per_s: float
    eval_s: float
    basis: str

    def seconds(self, depth: int, steps: int, batch_size: int, evaluations: int, forward_gflops: float) -> float:
        """Expected seconds of a run of ``steps`` updates; ``forward_gflops``: per image."""
        step_s = self.step_s + depth * self.block_s + 3 * forward_gflops * batch_size / self.gflops_per_s
        eval_s = self.eval_s + forward_gflops * EVAL_IMAGES / self.gflops_per_s
        return self.start_s + steps * step_s + evaluations * eval_s


EVAL_IMAGES = 64 * (100 + 64) + 1797  # embedded few-shot sets: fractals (support pool and test set) and digits
# Least squares over 16 short runs of seven tiny shapes, one thread of a busy 2-core server, float32: within 20% of each.
CPU = TimeModel("cpu", start_s=2.5, step_s=2.1e-3, block_s=2.8e-3, gflops_per_s=35.0, eval_s=0.2, basis="a server core")
# No measurement but an assumption: half a millisecond to launch the kernels of a block, forward and backward.
GPU = TimeModel("gpu", start_s=20.0, step_s=2e-3, block_s=0.5e-3, gflops_per_s=1e5, eval_s=2.0, basis="")
GPU_UTILISATION = 0.4
PEAK_TFLOPS = 312.0  # bfloat16 without sparsity, NVIDIA A100 data sheet


@dataclass(frozen=True)
class Cell:
    """One training run of a sweep. ``steps`` counts the updates of trunk and branches; compute is in GFLOPs.

    ``evaluations`` maps the step within the trunk to the nominal duration; ``train_gflops`` is 3 x forward x images.
    """

    overrides: list[str]
    config: RunConfig
    run_id: str
    run_dir: Path
    config_hash: str
    shape: Shape
    seed: int
    num_params: int
    forward_gflops: float
    evaluations: dict[int, str]
    steps: int
    images: int
    train_gflops: float
    seconds: float
    accelerator: str
    num_threads: int


@dataclass(frozen=True)
class Plan:
    """The cells of a sweep in its order, and where the expected seconds come from."""

    name: str
    runs_dir: Path
    cells: list[Cell]
    workers: int
    basis: str

    @property
    def train_gflops(self) -> float:
        return sum(cell.train_gflops for cell in self.cells)

    @property
    def device_hours(self) -> float:
        """Core hours on a CPU, GPU hours on a GPU."""
        return sum(cell.seconds * (1 if cell.accelerator == "gpu" else cell.num_threads) for cell in self.cells) / 3600

    @property
    def wall_seconds(self) -> float:
        return makespan([cell.seconds for cell in self.cells], [0.0] * self.workers)


def plan(sweep: Sweep, *, workers: int | None = None, peak_tflops: float = PEAK_TFLOPS) -> Plan:
    """Plan every cell. ``peak_tflops``: of one GPU, of which 40% are assumed to be reached; not read on a CPU.

    Raises ConfigError for a cell that does not compose, SweepError for two cells with one run id.
    """
    configs = []
    for overrides in sweep.cells:
        try:
            configs.append(compose(overrides))
        except ConfigError as error:
            raise ConfigError(f"{sweep.path}, cell {' '.join(overrides)}: {error}") from None
    if len({(cfg.runs_dir, cfg.name) for cfg in configs}) > 1:
        raise SweepError(f"{sweep.path}: name and runs_dir must be the same for all cells; give each one value.")
    model = time_model({cfg.trainer.accelerator for cfg in configs}, peak_tflops)
    runs_dir = Path(configs[0].runs_dir)
    scale, num_runs = calibration(runs_dir, model)
    cells = [_cell(overrides, cfg, model, scale) for overrides, cfg in zip(sweep.cells, configs, strict=True)]
    _check_unique(sweep, cells)
    basis = model.basis
    if num_runs:
        basis += f", corrected by {num_runs} finished {'run' if num_runs == 1 else 'runs'} in {runs_dir}/"
    return Plan(configs[0].name, runs_dir, cells, workers or default_workers(cells), basis)


def _cell(overrides: list[str], cfg: RunConfig, model: TimeModel, scale: float) -> Cell:
    shape, geometry, batch = shape_of(cfg), model_geometry(cfg), cfg.trainer.global_batch_size
    gflops = forward_gflops(shape, **geometry)
    evaluations = eval_steps(cfg)
    parts = segments(list(evaluations), cfg.eval.weights, cfg.schedule.cooldown)  # type: ignore[arg-type]
    steps = steps_trained(parts)
    return Cell(
        overrides=list(overrides),
        config=cfg,
        run_id=records.run_id(cfg),
        run_dir=records.run_dir(cfg),
        config_hash=records.config_hash(cfg),
        shape=shape,
        seed=cfg.seed,
        num_params=sum(num_params(shape, **geometry, pos_embed=cfg.model.pos_embed).values()),
        forward_gflops=gflops,
        evaluations=evaluations,
        steps=steps,
        images=steps * batch,
        train_gflops=3 * gflops * steps * batch,
        seconds=scale * model.seconds(shape.depth, steps, batch, len(evaluations) + 1, gflops),  # 1: at step 0
        accelerator=model.accelerator,
        num_threads=cfg.trainer.num_threads,
    )


def time_model(accelerators: Collection[str], peak_tflops: float = PEAK_TFLOPS) -> TimeModel:
    """The time model of what the cells ask for (cpu, gpu, auto); ``auto`` takes a GPU where one is visible."""
    if "gpu" not in accelerators and ("auto" not in accelerators or not visible_gpus()):
        return CPU
    return replace(
        GPU,
        gflops_per_s=peak_tflops * 1e3 * GPU_UTILISATION,
        basis=f"GPUs at {GPU_UTILISATION:.0%} of {peak_tflops:g} TFLOP/s, an assumption (--tflops)",
    )


def calibration(runs_dir: Path, model: TimeModel) -> tuple[float, int]:
    """Median of measured over modelled seconds of the finished runs below ``runs_dir``, and how many there are."""
    ratios = []
    for path in sorted(runs_dir.glob(f"*/*/{records.RUN}")):
        run = records.read_run(path.parent)
        if run is None or run["schema"] != records.SCHEMA or run["status"] != records.DONE or "simulated" in run:
            continue
        trainer, durations = run["config"]["trainer"], run["config"]["durations"]
        if time_model({trainer["accelerator"]}).accelerator == model.accelerator:
            evaluations = 1 + (len(durations["values"] or []) or durations["num"])
            modelled = model.seconds(
                run["depth"], run["steps_trained"], trainer["global_batch_size"], evaluations, run["forward_gflops"]
            )
            ratios.append(run["wall_s"] / modelled)
    return (statistics.median(ratios), len(ratios)) if ratios else (1.0, 0)


def makespan(tasks: Iterable[float], free_at: Sequence[float]) -> float:
    """When the last task ends if each worker, free from ``free_at`` on, always takes the longest one left."""
    workers = list(free_at)
    heapq.heapify(workers)
    for task in sorted(tasks, reverse=True):
        heapq.heappush(workers, heapq.heappop(workers) + task)
    return max(workers)


def visible_gpus() -> list[str]:
    """Names for CUDA_VISIBLE_DEVICES of the GPUs this process may use; asks nvidia-smi, not torch."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [name.strip() for name in chosen.split(",") if name.strip() not in ("", "-1")]
    if not shutil.which("nvidia-smi"):
        return []
    command = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    return answer.stdout.split() if answer.returncode == 0 else []


def default_workers(cells: Sequence[Cell]) -> int:
    """One worker a GPU, or as many as have ``num_threads`` cores each."""
    if cells[0].accelerator == "gpu":
        return max(1, len(visible_gpus()))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # not on macOS
    return max(1, cores // max(cell.num_threads for cell in cells))


def _check_unique(sweep: Sweep, cells: Sequence[Cell]) -> None:
    seen: dict[str, Cell] = {}
    for cell in cells:
        if other := seen.get(cell.run_id):
            differing = sorted(set(cell.overrides) - set(other.overrides))
            raise SweepError(
                f"{sweep.path}: two cells have the run id {cell.run_id}; they differ in {' '.join(differing)}, "
                "which a run id does not show, so give each a tag."
            )
        seen[cell.run_id] = cell
