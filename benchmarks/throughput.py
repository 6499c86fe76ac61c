"""How fast a step is: against timm's own training step and the peak of the machine, with the time of each phase.

    python benchmarks/throughput.py [--device cpu] [--shapes S/16,32x4x128] [--threads 1] [--seconds 20] [--json FILE]
    python benchmarks/throughput.py --device cuda                      # everything, within ten minutes

For every shape four contestants take turns in one process, a few steps each, on the same batch:

    timm    the loop of timm's training script: timm's optimiser factory, autocast, clipping to the global norm, AdamW as
            the factory makes it, and once more with its fused kernel
    update  LitClassifier.update on the same kind of model, without a trainer
    run     sovit.lit.fit.fit as a sweep runs it, with its stream of images, averaged weights, the watch for divergence,
            the claim, the records and the display's progress file
    peak    a product of two square matrices in the same precision, on the same threads

Figures are medians over the turns, ratios medians of the ratios within a turn, with their middle half. The utilisation is
3 x the closed-form forward FLOPs (`sovit.flops`) over the peak. The phases of a run are exclusive: what is nested in
another phase does not count there. "rest" is Lightning. On a GPU the clock is read after it has caught up.
Each shape has a process of its own. Peak memory is that of the bare update: on a GPU of the tensors, on a CPU of the
process, Python and its libraries included.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.plugins.precision import Precision
from timm.models.vision_transformer import VisionTransformer
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3, dispatch_clip_grad
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data.dataloader import _BaseDataLoaderIter

from sovit import claims, memory, records
from sovit.config import RunConfig, model_geometry, shape_of
from sovit.data.stream import StepSampler, make_loader
from sovit.flops import train_gflops
from sovit.launch.pay.hardware import hardware
from sovit.lit import callbacks, fit
from sovit.lit.data import train_stream
from sovit.lit.layout import Layout
from sovit.lit.module import LitClassifier
from sovit.lit.ranks import Ranks
from sovit.schedule import Segment
from sovit.schema import DataConfig, EvalConfig, ModelConfig, OptimConfig, ParallelConfig, ScheduleConfig, TrainerConfig

TINY = (
    "32x4x128",
    "16x4x128",
    "256x4x128",
    "32x1x128",
    "32x16x128",
    "32x4x16",
    "32x4x512",
)  # star_tiny's center and ends
LARGE = {"So400m/14": 1, "g/14": 1, "B/16": 2, "L/16": 1, "S/16": 4}  # and the batch that a CPU takes
MICRO_BATCH = {"S/16": 512, "B/16": 256, "L/16": 128, "So400m/14": 128, "g/14": 64}  # on a GPU
DATASHEET = {"H200": 989.4e12, "H100": 989.4e12, "A100": 311.9e12}  # bf16 FLOP/s of the SXM cards, dense
LEAST_TURNS, LOG_EVERY = 5, 50


clock = time.perf_counter  # or of the processor, see --clock


class Enough(Exception):
    """All turns are taken."""


@dataclass
class Phases:
    """Exclusive seconds of every phase, while ``on``."""

    wait: Callable[[], None]
    on: bool = False
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    _stack: list[str] = field(default_factory=list)
    _mark: float = 0.0

    def turn(self, name: str | None) -> None:
        """Enter a phase, or leave the innermost one."""
        if not self.on:
            return
        self.wait()
        now = clock()
        self.seconds[self._stack[-1] if self._stack else "rest"] += now - self._mark
        self._mark = now
        if name is None:
            self._stack.pop()
        else:
            self._stack.append(name)

    def begin(self) -> None:
        self.on, self._stack, self._mark = True, [], clock()

    def end(self) -> None:
        while self._stack:
            self.turn(None)
        self.seconds["rest"] += clock() - self._mark
        self.on = False

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            depth = len(self._stack)
            self.turn(name)
            try:
                return function(*args, **kwargs)
            finally:
                while len(self._stack) > depth:  # fewer if a turn ended in here
                    self.turn(None)

        return timed


PARTS: list[tuple[Any, str, str]] = [
    (_BaseDataLoaderIter, "__next__", "data"),
    (fit.TrainData, "on_after_batch_transfer", "data"),
    (LitClassifier, "loss_of", "forward"),
    (Tensor, "backward", "backward"),
    (LitClassifier, "update", "glue"),
    (LightningOptimizer, "step", "rest"),
    (Precision, "_wrap_closure", "rest"),  # nested in AdamW.step
    (torch.optim.Optimizer, "zero_grad", "optimiser"),
    (torch.optim.AdamW, "step", "optimiser"),
    (LitClassifier, "on_before_optimizer_step", "optimiser"),
    (callbacks.Ema, "on_train_batch_end", "average"),
    (callbacks.Watch, "on_train_batch_end", "records"),
    (callbacks.Log, "on_train_batch_end", "records"),
    (callbacks.Evaluate, "on_train_batch_end", "records"),
    (callbacks.Resume, "on_train_batch_start", "records"),
    (callbacks.Resume, "on_train_batch_end", "records"),
]


@contextlib.contextmanager
def taken_apart(phases: Phases) -> Iterator[None]:
    """The phases of a run are noted in here."""
    with contextlib.ExitStack() as stack:
        for owner, name, phase in PARTS:
            stack.enter_context(patch.object(owner, name, phases.around(phase, getattr(owner, name))))
        yield


def configuration(shape: str, options: argparse.Namespace) -> RunConfig:
    """The cell of a shape: the tiny star's recipe, or the same on 224 pixels with an attention pooling head."""
    tiny, gpu = shape in TINY, options.device == "cuda"
    batch = options.batch or (128 if tiny else MICRO_BATCH[shape] if gpu else LARGE[shape])
    return RunConfig(
        name="throughput",
        shape=shape,
        model=ModelConfig(
            num_heads=4 if tiny else None,
            patch_size=8 if tiny else None,
            image_size=16 if tiny else 224,
            channels=1 if tiny else 3,
            pool="avg" if tiny else "map",
            init="fan_in",
        ),
        data=DataConfig(num_classes=256 if tiny else 1000),
        optim=OptimConfig(lr=1e-4, lr_rule="by_shape" if tiny else "constant", beta2=0.98, weight_decay=0.05),
        schedule=ScheduleConfig(kind="constant"),
        eval=EvalConfig(weights="ema"),
        trainer=TrainerConfig(
            accelerator="gpu" if gpu else "cpu",
            precision=options.precision or ("bf16-mixed" if gpu else "32-true"),
            num_threads=options.threads,
            global_batch_size=batch,
            log_every_n_steps=LOG_EVERY,
            checkpoint_every_s=1e9,  # a resume point is written after minutes, not within a turn
        ),
        parallel=ParallelConfig(micro_batch=options.micro_batch or batch),
    )


class Timm:
    """The loop of timm's training script on a model of the same shape."""

    def __init__(self, cfg: RunConfig, compiled: bool, device: torch.device, *, fused: bool) -> None:
        shape = shape_of(cfg)
        self.model: nn.Module = VisionTransformer(
            img_size=cfg.model.image_size,
            patch_size=shape.patch_size,
            in_chans=cfg.model.channels,
            num_classes=cfg.data.num_classes,
            global_pool=cfg.model.pool,  # type: ignore[arg-type]
            embed_dim=shape.width,
            depth=shape.depth,
            num_heads=shape.num_heads,
            mlp_ratio=(shape.mlp_dim + 0.5) / shape.width,
            class_token=False,
            fc_norm=False,
            act_layer="gelu_tanh",
        ).to(device)
        optim = cfg.optim
        extra = {"fused": True} if fused else {}
        self.optimizer = create_optimizer_v2(
            self.model, "adamw", lr=optim.lr, weight_decay=optim.weight_decay, betas=(optim.beta1, optim.beta2), **extra
        )
        self.ema = ModelEmaV3(self.model, decay=0.999)
        self.clip_norm, self.micro = optim.clip_norm, cfg.parallel.micro_batch
        if compiled:
            self.model = torch.compile(self.model)  # type: ignore[assignment]
        self.loss = nn.CrossEntropyLoss()
        self.autocast = functools.partial(
            torch.autocast, device.type, torch.bfloat16, enabled=cfg.trainer.precision == "bf16-mixed"
        )

    def step(self, images: Tensor, labels: Tensor) -> Tensor:
        parts = list(zip(images.split(self.micro or len(images)), labels.split(self.micro or len(images)), strict=True))
        for x, y in parts:
            with self.autocast():
                loss = self.loss(self.model(x), y)
                if len(parts) > 1:
                    loss = loss / len(parts)
            loss.backward()
        dispatch_clip_grad(self.model.parameters(), value=self.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss


class Update:
    """LitClassifier.update without a trainer."""

    def __init__(self, cfg: RunConfig, layout: Layout, device: torch.device) -> None:
        self.module = fit.build_module(cfg, Segment("trunk", 0, 10**9, 10**9, 0, ()), layout, Ranks())
        self.module.to(device)
        self.module.configure_model()
        made = self.module.configure_optimizers()
        inner = made.step

        def step(closure: None = None) -> None:
            self.module.on_before_optimizer_step(made)
            inner()

        made.step = step  # type: ignore[method-assign, assignment]
        self.optimizer = made
        self.autocast = functools.partial(
            torch.autocast, device.type, torch.bfloat16, enabled=cfg.trainer.precision == "bf16-mixed"
        )

    def step(self, images: Tensor, labels: Tensor) -> Tensor:
        with self.autocast(cache_enabled=False):  # as Lightning has it
            return self.module.update(images, labels, 1, self.optimizer)


class SameBatch(fit.TrainData):
    """One batch for ever: on a GPU the images of fractals would not come fast enough from one process."""

    def train_dataloader(self) -> Any:
        batch = _batch(self.cfg)
        return make_loader(_Same(batch), StepSampler(len(batch[0]), 0, self.total_steps), 0)


class _Same(torch.utils.data.Dataset[Any]):
    def __init__(self, batch: tuple[Tensor, Tensor]) -> None:
        self.batch = batch

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        return self.batch


def _batch(cfg: RunConfig) -> tuple[Tensor, Tensor]:
    num, model = cfg.trainer.global_batch_size, cfg.model
    draw = torch.Generator().manual_seed(0)
    images = torch.randn(num, model.channels, model.image_size, model.image_size, generator=draw)
    return images, torch.randint(cfg.data.num_classes, (num,), generator=draw)


def measure(shape: str, options: argparse.Namespace) -> dict[str, Any]:
    """All figures of one shape; raises what torch raises if it does not fit."""
    global clock
    clock = time.process_time if options.clock == "processor" else time.perf_counter
    torch.set_num_threads(options.threads)
    cfg, device = configuration(shape, options), torch.device(options.device)
    gpu = device.type == "cuda"
    wait = torch.cuda.synchronize if gpu else _nothing
    if not gpu:
        # Lightning has torch look for GPUs by opening NVIDIA's library, which torch's optimisers then do at every step.
        # timm's script does not load Lightning.
        os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "0"
    compiled = gpu if options.compile is None else options.compile
    micro = cfg.parallel.micro_batch or cfg.trainer.global_batch_size
    layout = Layout(micro, cfg.trainer.global_batch_size // micro, "none", compiled)
    images, labels = (tensor.to(device) for tensor in _batch(cfg))
    held = torch.cuda.memory_allocated() if gpu else 0
    update = Update(cfg, layout, device)
    for _ in range(2):
        update.step(images, labels)
    wait()
    if gpu:
        held = torch.cuda.memory_allocated() - held
    resident = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    timms = {"timm": Timm(cfg, compiled, device, fused=False), "timm_fused": Timm(cfg, compiled, device, fused=True)}
    loader = None
    if not gpu and shape in TINY:  # timm's whole loop takes the same stream and averages too
        sampler = StepSampler(len(images), 0, 10**9)
        loader = iter(make_loader(train_stream(cfg), sampler, 0))

    def timm_loop(step: int) -> None:
        assert loader is not None
        loss = timms["timm"].step(*next(loader))
        timms["timm"].ema.update(timms["timm"].model, step=step)
        if step % LOG_EVERY == 0:
            loss.item()

    size = 8192 if gpu else 1024 if shape in TINY else 2048
    dtype = torch.bfloat16 if cfg.trainer.precision == "bf16-mixed" else torch.float32
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    contestants: dict[str, Callable[[int], Any]] = {
        **{name: (lambda step, timm=timm: timm.step(images, labels)) for name, timm in timms.items()},
        "update": lambda step: update.step(images, labels),
        **({"timm_loop": timm_loop} if loader else {}),
        "peak": lambda step: torch.mm(a, b, out=out),
    }
    took: dict[str, list[float]] = defaultdict(list)
    for run in contestants.values():  # compiles
        for step in range(3):
            run(step)
    wait()
    began = clock()
    update.step(images, labels)
    wait()
    block = max(1, math.ceil(options.block_s / max(1e-6, clock() - began)))
    phases, steps = Phases(wait), 0
    deadline = time.perf_counter() + options.seconds
    mark = 0.0

    def between(*_: Any) -> None:
        """After every update of the run: when its turn is over, the others have theirs."""
        nonlocal steps, mark
        if running:
            return
        steps += 1
        if steps % block or steps < 2 * block:
            return
        wait()
        now = clock()
        phased = phases.on
        if phased:
            phases.end()
        if mark and not phased:
            took["run"].append((now - mark) / block)
            for name, run in contestants.items():
                running.append(name)
                began, num = clock(), 3 if name == "peak" else block
                for step in range(num):
                    run(step)
                wait()
                took[name].append((clock() - began) / num)
                running.pop()
            if time.perf_counter() > deadline and len(took["run"]) >= LEAST_TURNS:
                raise Enough
        if mark and not phased:
            phases.begin()
        mark = clock()

    running: list[str] = []
    hook = register_optimizer_step_post_hook(between)
    if gpu:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        update.step(images, labels)
        peak_bytes = held + torch.cuda.max_memory_allocated() - before
        steps = 0
    else:
        peak_bytes = resident
    with tempfile.TemporaryDirectory() as scratch, taken_apart(phases), contextlib.ExitStack() as stack:
        if gpu:
            stack.enter_context(patch.object(fit, "TrainData", SameBatch))
        directory = Path(scratch) / "run"
        claim = stack.enter_context(claims.hold(directory))
        work = fit.Work(
            cfg=cfg,
            plan=[Segment("trunk", 0, 10**9, 10**9, 0, (10**9,))],
            directory=directory,
            growing=records.GrowingFiles(directory, None, claim.check),
            loggers=[],
            clock_zero=time.monotonic(),
            ranks=Ranks(),
            layout=layout,
            check=claim.check,
        )
        try:
            fit.fit(work, 0, None, _no_evaluation, lambda: False)  # type: ignore[arg-type]
        except Enough:
            pass
        finally:
            hook.remove()
    return figures(cfg, took, phases.seconds, peak_bytes, block, compiled, size)


def _no_evaluation(*_: Any) -> None:
    """What an evaluation takes of a cell is measured with its real durations, by --cell."""


def _nothing() -> None:
    """A CPU is never behind."""


def figures(
    cfg: RunConfig,
    took: dict[str, list[float]],
    phases: dict[str, float],
    peak_bytes: int,
    block: int,
    compiled: bool,
    size: int,
) -> dict[str, Any]:
    """Medians and middle halves of what was measured."""
    shape, batch = shape_of(cfg), cfg.trainer.global_batch_size
    gflops = train_gflops(shape, **model_geometry(cfg)) * batch
    rate = [2 * size**3 / seconds for seconds in took["peak"]]

    def ratio(one: str, other: str) -> dict[str, float] | None:
        """How many times as fast the other is as the one."""
        if other not in took or one not in took:
            return None
        return _middle([a / b for a, b in zip(took[one], took[other], strict=True)])

    whole = sum(phases.values())
    sheet = _datasheet() if cfg.trainer.accelerator == "gpu" else None
    step = {name: 1000 * statistics.median(values) for name, values in took.items() if name != "peak"}
    return {
        "shape": cfg.shape,
        "width_depth_mlp": str(shape),
        "batch": batch,
        "micro_batch": cfg.parallel.micro_batch,
        "precision": cfg.trainer.precision,
        "compiled": compiled,
        "threads": cfg.trainer.num_threads,
        "turns": len(took["run"]),
        "steps_a_turn": block,
        "step_ms": step,
        "images_per_s": {name: 1000 * batch / ms for name, ms in step.items()},
        "timm_over_update": ratio("timm", "update"),
        "timm_fused_over_update": ratio("timm_fused", "update"),
        "timm_over_run": ratio("timm", "run"),
        "timm_loop_over_run": ratio("timm_loop", "run"),
        "run_over_update": ratio("run", "update"),
        "peak_flops": statistics.median(rate),
        "utilisation": _middle([1e9 * gflops / s / r for s, r in zip(took["update"], rate, strict=True)]),
        "utilisation_of_datasheet": None if sheet is None else 1e9 * gflops / (step["update"] / 1000) / sheet,
        "peak_memory_bytes": peak_bytes,
        "phases": {name: seconds / whole for name, seconds in sorted(phases.items())} if whole else {},
    }


def _middle(values: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else 3 * [values[0]]
    return {"median": middle, "low": low, "high": high}


def _datasheet() -> float | None:
    name = torch.cuda.get_device_name()
    return next((flops for key, flops in DATASHEET.items() if key in name), None)


def markdown(found: list[dict[str, Any]]) -> str:
    """Two tables: speeds, and phases."""

    def pair(value: dict[str, float] | None) -> str:
        return "" if value is None else f"{value['median']:.2f} ({value['low']:.2f}-{value['high']:.2f})"

    lines = [
        "| shape | batch | step, ms | images/s | GFLOP/s at peak | utilisation | update over timm | over timm, fused | "
        "run over timm's loop | memory, GB |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    phases = ["data", "forward", "backward", "optimiser", "glue", "average", "records", "rest"]
    lower = [
        "| shape | " + " | ".join(phases) + " | records + rest |",
        "|---|" + "---:|" * (len(phases) + 1),
    ]
    for row in found:
        if "why" in row:
            lines.append(f"| {row['shape']} | not run: {row['why']} |" + " |" * 8)
            continue
        sheet = row["utilisation_of_datasheet"]
        lines.append(
            f"| {row['shape']} | {row['batch']} | {row['step_ms']['update']:.2f} | {row['images_per_s']['update']:,.1f} | "
            f"{row['peak_flops'] / 1e9:,.0f} | {row['utilisation']['median']:.0%}"
            + (f" ({sheet:.0%} of the datasheet)" if sheet else "")
            + f" | {pair(row['timm_over_update'])} | {pair(row['timm_fused_over_update'])} | "
            f"{pair(row['timm_loop_over_run'])} | {row['peak_memory_bytes'] / 1e9:.2f} |"
        )
        shares = [row["phases"].get(name, 0.0) for name in phases]
        lower.append(
            f"| {row['shape']} | " + " | ".join(f"{share:.1%}" for share in [*shares, shares[-2] + shares[-1]]) + " |"
        )
    return "\n".join([*lines, "", "Phases of a run, as shares of its time:", "", *lower])


def _child(shape: str, options: argparse.Namespace, pipe: Any) -> None:
    try:
        pipe.send(measure(shape, options))
    except torch.OutOfMemoryError as error:
        pipe.send({"shape": shape, "why": str(error).splitlines()[0]})


def _too_large(shape: str, options: argparse.Namespace) -> str | None:
    """Why a shape cannot be measured here, by the memory estimate: four contestants have weights and optimiser state."""
    cfg = configuration(shape, options)
    model = memory.Model(shape_of(cfg), **model_geometry(cfg))
    weights = sum(memory.num_params(model.shape, **model_geometry(cfg)).values())
    need = weights * (3 * 16 + 3 * 4 + 16)
    if options.device == "cuda":
        return None
    have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    return f"four copies need {need / 1e9:.0f} GB, {have / 1e9:.0f} GB are free" if need > 0.8 * have else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shapes", help="such as S/16,32x4x128; default: all")
    parser.add_argument("--batch", type=int, help="images of a step")
    parser.add_argument("--micro-batch", type=int, help="images in one forward pass; default: the whole batch")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--precision", help="default: 32-true on a CPU, bf16-mixed on a GPU")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=None, help="default: on a GPU")
    parser.add_argument("--seconds", type=float, default=20, help="of turns, for each shape")
    parser.add_argument("--block-s", type=float, default=0.15, help="of one turn of a contestant")
    parser.add_argument(
        "--clock", choices=("wall", "processor"), default="wall", help="processor time, where other programs run too"
    )
    parser.add_argument(
        "--limit", type=float, default=500, help="seconds after which no further shape is begun on a GPU"
    )
    parser.add_argument("--json", type=Path, help="file for all figures")
    options = parser.parse_args()
    shapes = options.shapes.split(",") if options.shapes else [*LARGE, *TINY]
    context, found, began = multiprocessing.get_context("fork"), [], time.monotonic()
    for shape in shapes:
        why = _too_large(shape, options)
        if why is None and options.device == "cuda" and time.monotonic() - began > options.limit:
            why = f"{options.limit:.0f} s had passed"
        if why is None:
            here, there = context.Pipe(duplex=False)
            child = context.Process(target=_child, args=(shape, options, there))
            child.start()
            there.close()
            try:
                found.append(here.recv())
            except EOFError:
                why = "its process died"
            child.join()
        if why is not None:
            found.append({"shape": shape, "why": why})
        print(json.dumps(found[-1]), file=sys.stderr, flush=True)
        if options.json:
            machine = hardware("gpu" if options.device == "cuda" else "cpu")
            about = {
                "machine": machine,
                "date": time.strftime("%Y-%m-%d"),
                "load": os.getloadavg(),
                "command": sys.argv,
            }
            options.json.write_text(json.dumps({**about, "rows": found}, indent=1) + "\n")
    print(markdown(found))


if __name__ == "__main__":
    main()
