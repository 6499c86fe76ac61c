"""What a sweep will do before it does it: every cell with its steps, its compute and the time to expect.

Composes every cell, so a sweep that plans is a sweep whose cells all start. Measures nothing (`launch.throughput` does)
and loads no torch.
"""

from __future__ import annotations

import heapq
import math
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sovit import records
from sovit.config import ConfigError, RunConfig, compose
from sovit.derived import eval_steps, fewshot_name, model_geometry, model_options, shape_of, text_results
from sovit.families import TEXT, activations, blocks, shape_of_record
from sovit.flops import forward_gflops, num_params
from sovit.launch.devices import cores, visible_gpus
from sovit.launch.processes import devices_of
from sovit.launch.sweep import Sweep, SweepError, metric_of
from sovit.metric import LOG_PERPLEXITY, key, kind_of
from sovit.schedule import segments, steps_trained
from sovit.shape import AnyShape
from sovit.strict import nearest


@dataclass(frozen=True)
class TimeModel:
    """What a run costs on one worker while the others work too, in seconds.

    ``step_s`` and ``block_s`` are the overhead of an update and of each encoder block in it, most of the time of a small
    model; ``gflops_per_s`` is the speed of the matrix products, ``activation_s`` the time of a billion activations, which
    norms, GELU and residuals pass over. The same four for an evaluation. ``start_s`` is what a cell takes beside,
    ``startup_s`` what passes before the first cell of a sweep starts. ``basis``: where all this is from.
    """

    accelerator: str
    start_s: float
    step_s: float
    block_s: float
    gflops_per_s: float
    eval_s: float
    basis: str
    activation_s: float = 0.0
    eval_block_s: float = 0.0
    eval_gflops_per_s: float | None = None  # None: as in training
    eval_activation_s: float = 0.0
    startup_s: float = 0.0

    def seconds(
        self,
        depth: int,
        steps: int,
        batch_size: int,
        evaluations: int,
        forward_gflops: float,
        gactivations: float = 0.0,
        devices: int = 1,
    ) -> float:
        """Expected seconds of a run of ``steps`` updates; ``forward_gflops`` and ``gactivations`` (1e9): per image.

        Of several ``devices`` each has its share of the batch, and `EFFICIENCY` of its time is not spent on exchange.
        """
        step_s = self.step_s + depth * self.block_s
        step_s += batch_size / devices * (3 * forward_gflops / self.gflops_per_s + gactivations * self.activation_s)
        step_s /= EFFICIENCY if devices > 1 else 1.0
        eval_s = self.eval_s + depth * self.eval_block_s
        eval_gflops_per_s = self.eval_gflops_per_s or self.gflops_per_s
        eval_s += EVAL_IMAGES / devices * (forward_gflops / eval_gflops_per_s + gactivations * self.eval_activation_s)
        return self.start_s + steps * step_s + evaluations * eval_s


EVAL_IMAGES = 64 * (100 + 64) + 1797  # embedded few-shot sets: fractals (support pool and test set) and digits
# Least squares over 16 short runs of seven tiny shapes, one thread of a busy 2-core server, float32: within 20% of each.
CPU = TimeModel(
    "cpu",
    start_s=2.5,
    step_s=2.1e-3,
    block_s=2.8e-3,
    gflops_per_s=35.0,
    eval_s=0.2,
    basis="estimated for a server core",
)
# No measurement but an assumption: half a millisecond to launch the kernels of a block, forward and backward.
GPU = TimeModel("gpu", start_s=20.0, step_s=2e-3, block_s=0.5e-3, gflops_per_s=1e5, eval_s=2.0, basis="")
GPU_UTILISATION = 0.4
EFFICIENCY = 0.9  # of several devices, an assumption: the gradients' way between them, partly hidden behind the rest
DISAGREEMENT = 1.25  # between finished runs and a measurement, from which on it is said
DECODER_TOKENS = 24  # of a decoder's text, padding included, on average over the tasks of the embedded scenes
PEAK_TFLOPS = 312.0  # bfloat16 without sparsity, NVIDIA A100 data sheet


@dataclass(frozen=True)
class Cell:
    """One training run of a sweep. ``steps`` counts the updates of trunk and branches; compute is in GFLOPs.

    ``evaluations`` maps the step within the trunk to the nominal duration; ``train_gflops`` is 3 x forward x images.
    It trains in ``devices`` processes on each of ``nodes`` nodes, one device each.
    """

    overrides: list[str]
    config: RunConfig
    run_id: str
    run_dir: Path
    config_hash: str
    shape: AnyShape
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
    devices: int = 1
    nodes: int = 1

    @property
    def world(self) -> int:
        return self.devices * self.nodes


@dataclass(frozen=True)
class Plan:
    """The cells of a sweep in its order. ``basis`` says where the expected seconds come from, ``notes`` what to know of
    them; ``startup_s`` passes before the first cell starts."""

    name: str
    runs_dir: Path
    cells: list[Cell]
    workers: int
    basis: str
    startup_s: float = 0.0
    notes: tuple[str, ...] = ()
    cells_per_gpu: int = 1

    @property
    def train_gflops(self) -> float:
        return sum(cell.train_gflops for cell in self.cells)

    @property
    def device_hours(self) -> float:
        """Core hours on a CPU, GPU hours on a GPU."""
        return sum(cell.seconds * cell.world * self._share(cell) for cell in self.cells) / 3600

    def _share(self, cell: Cell) -> float:
        return 1 / self.cells_per_gpu if cell.accelerator == "gpu" else cell.num_threads

    @property
    def wall_seconds(self) -> float:
        """From the start of the sweep to the end of its last cell; 0 if there is none."""
        if not self.cells:
            return 0.0
        return self.startup_s + makespan([cell.seconds for cell in self.cells], [0.0] * self.workers)


def plan(
    sweep: Sweep, *, workers: int | None = None, cells_per_gpu: int | None = None, peak_tflops: float = PEAK_TFLOPS
) -> Plan:
    """Plan every cell. ``peak_tflops``: of one GPU, of which 40% are assumed to be reached; not read on a CPU.

    ``workers``: cells at once, by default as many as there are GPUs for (``cells_per_gpu`` of them on each) or cores.
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
    _check_metric(sweep, configs[0])
    model = time_model({cfg.trainer.accelerator for cfg in configs}, peak_tflops)
    runs_dir = Path(configs[0].runs_dir)
    scale, num_runs = calibration(runs_dir, model)
    cells = [_cell(overrides, cfg, model.accelerator) for overrides, cfg in zip(sweep.cells, configs, strict=True)]
    cells = [replace(cell, seconds=scale * _seconds(model, cell)) for cell in cells]
    _check_unique(sweep, cells)
    basis = model.basis
    if num_runs:
        basis += f", corrected by {num_runs} finished {'run' if num_runs == 1 else 'runs'} in {runs_dir}/"
    if cells_per_gpu is not None and model.accelerator != "gpu":
        raise SweepError(f"--cells-per-gpu {cells_per_gpu}, but the cells train on a CPU; give --workers.")
    shared = cells_per_gpu or 1
    most = max(cell.world for cell in cells)
    notes: tuple[str, ...] = ()
    if most > 1:
        notes = (
            f"A cell takes {most if len({cell.world for cell in cells}) == 1 else f'up to {most}'} "
            f"{'GPUs' if model.accelerator == 'gpu' else 'processes'}, assumed to train {EFFICIENCY:.0%} as fast as so many "
            "that exchange nothing.",
        )
    count = workers or default_workers(cells, shared)
    return Plan(configs[0].name, runs_dir, cells, count, basis, notes=notes, cells_per_gpu=shared)


def timed(made: Plan, model: TimeModel) -> Plan:
    """The same plan with the seconds of a model that was measured on this machine.

    Finished runs do not correct it: they may come from another machine, another number of workers or a busy hour, and
    what they say of this machine the measurement has said already. Where they differ much a note says so.
    """
    cells = [replace(cell, seconds=_seconds(model, cell)) for cell in made.cells]
    ratio, num_runs = calibration(made.runs_dir, model)
    notes = made.notes
    if abs(math.log(ratio)) > math.log(DISAGREEMENT):
        runs = "The finished run" if num_runs == 1 else f"Half of the {num_runs} finished runs"
        more = "or more" if num_runs > 1 else ""
        notes += (
            f"{runs} in {made.runs_dir}/ took {ratio:.2g} times {f'{more} ' if ratio > 1 and more else ''}as long as this "
            "predicts; they may come from another machine or a busy one.",
        )
    return replace(made, cells=cells, basis=model.basis, startup_s=model.startup_s, notes=notes)


def _seconds(model: TimeModel, cell: Cell) -> float:
    batch_size = cell.config.trainer.global_batch_size
    evaluations = len(cell.evaluations) + 1  # 1: at step 0
    known = (blocks(cell.shape), cell.steps, batch_size, evaluations, cell.forward_gflops, cell_gactivations(cell))
    return model.seconds(*known, devices=cell.world) + evaluations * decoders_s(model, vars(cell.config.eval))


def decoders_s(model: TimeModel, asked: Mapping[str, Any]) -> float:
    """Expected seconds of the decoders of one evaluation; ``asked``: the keys of ``eval``. Never measured.

    Updates of the decoder's blocks, which have three branches where the encoder's have two. The image tokens they look at
    and the vocabulary are left out: within half of what decoders of width 32 and 64 took.
    """
    if not asked.get("multitask"):
        return 0.0
    width, depth = asked["decoder_width"], asked["decoder_depth"]
    gflops = asked["decoder_batch_size"] * DECODER_TOKENS * depth * 24 * width**2 / 1e9
    step_s = model.step_s + 1.5 * depth * model.block_s + 3 * gflops / model.gflops_per_s
    return float(asked["decoder_draws"] * asked["decoder_steps"] * step_s)


def cell_gactivations(cell: Cell) -> float:
    """Billions of activations an image of this cell passes through."""
    return activations(cell.shape, cell.config.model.image_size) / 1e9


def _cell(overrides: list[str], cfg: RunConfig, accelerator: str) -> Cell:
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
        num_params=sum(num_params(shape, **geometry, **model_options(cfg)).values()),
        forward_gflops=gflops,
        evaluations=evaluations,
        steps=steps,
        images=steps * batch,
        train_gflops=3 * gflops * steps * batch,
        seconds=0.0,
        accelerator=accelerator,
        num_threads=cfg.trainer.num_threads,
        devices=devices_of(cfg),
        nodes=cfg.parallel.nodes,
    )


def time_model(accelerators: Collection[str], peak_tflops: float = PEAK_TFLOPS) -> TimeModel:
    """The time model of what the cells ask for (cpu, gpu, auto); ``auto`` takes a GPU where one is visible."""
    if "gpu" not in accelerators and ("auto" not in accelerators or not visible_gpus()):
        return CPU
    return replace(
        GPU,
        gflops_per_s=peak_tflops * 1e3 * GPU_UTILISATION,
        basis=f"for GPUs at {GPU_UTILISATION:.0%} of {peak_tflops:g} TFLOP/s, an assumption (--tflops)",
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
            shape = shape_of_record({**run, "num_heads": 1})  # heads take no time here, and not every record has them
            modelled = model.seconds(
                blocks(shape),
                run["steps_trained"],
                trainer["global_batch_size"],
                evaluations,
                run["forward_gflops"],
                activations(shape, run["config"]["model"]["image_size"]) / 1e9,
                devices=world_of(run),
            )
            modelled += evaluations * decoders_s(model, run["config"].get("eval") or {})
            ratios.append(run["wall_s"] / modelled)
    return (statistics.median(ratios), len(ratios)) if ratios else (1.0, 0)


def world_of(run: Mapping[str, Any]) -> int:
    """Processes that a run was trained by, as its record says; one in an older record."""
    parallel = run["config"].get("parallel") or {}
    return (parallel.get("devices") or 1) * (parallel.get("nodes") or 1)


def makespan(tasks: Iterable[float], free_at: Sequence[float]) -> float:
    """When the last task ends if each worker, free from ``free_at`` on, always takes the longest one left."""
    workers = list(free_at)
    heapq.heapify(workers)
    for task in sorted(tasks, reverse=True):
        heapq.heappush(workers, heapq.heappop(workers) + task)
    return max(workers)


def default_workers(cells: Sequence[Cell], cells_per_gpu: int = 1) -> int:
    """As many cells as have their GPUs, or ``num_threads`` cores for each of their processes."""
    if cells[0].accelerator == "gpu":
        return max(1, cells_per_gpu * len(visible_gpus()) // min(cell.devices for cell in cells))
    return max(1, len(cores()) // max(cell.num_threads * cell.devices for cell in cells))


def _check_metric(sweep: Sweep, cfg: RunConfig) -> None:
    """The metric that W&B and the display follow is one that the cells evaluate."""
    (dataset, shots), known = metric_of(sweep.metric["name"]), [fewshot_name(name) for name in cfg.eval.datasets]
    if kind_of(dataset, shots) == LOG_PERPLEXITY:
        if not cfg.eval.multitask:
            raise SweepError(
                f"{sweep.path}: metric {sweep.metric['name']!a}, but no decoder is trained; write "
                "metric: {value: multitask} among the parameters."
            )
        return
    if cfg.model.family == TEXT:
        if dataset not in (known := text_results(cfg)) or shots != 0:
            raise SweepError(
                f"{sweep.path}: metric {sweep.metric['name']!a} is none of a text tower; write "
                f"{' or '.join(key(name, 0) for name in known[:2])}."
            )
        return
    if dataset not in known:
        raise SweepError(
            f"{sweep.path}: metric {sweep.metric['name']!a} is of no data set of the evaluation{nearest(dataset, known)}"
        )
    if shots not in cfg.eval.shots:
        listed = ", ".join(map(str, cfg.eval.shots))
        raise SweepError(f"{sweep.path}: metric {sweep.metric['name']!a}, but eval.shots are {listed}.")


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
