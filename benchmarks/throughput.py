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
Where the memory leaves no room for all, timm's default and then the run are left out. Each shape has a process of its
own. Peak memory is that of the bare update: on a GPU of the tensors, on a CPU of the process, Python and its libraries
included.
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
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from contestants import LARGE, LOG_EVERY, TINY, SameBatch, Timm, Update, batch_of, configuration
from phases import Phases, measure_cell, measure_star, nothing, taken_apart
from sovit import claims, records
from sovit.config import RunConfig
from sovit.data.stream import StepSampler, make_loader
from sovit.derived import model_geometry, shape_of
from sovit.flops import num_params, train_gflops
from sovit.launch.pay.hardware import hardware
from sovit.lit import callbacks, fit
from sovit.lit.data import train_stream
from sovit.lit.layout import Layout
from sovit.lit.peak import datasheet
from sovit.lit.ranks import Ranks
from sovit.schedule import Segment

LEAST_TURNS = 5
OPTIONAL = ("timm", "run")  # contestants that large shapes do without, in this order
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}


class Enough(Exception):
    """All turns are taken."""


def measure(shape: str, options: argparse.Namespace, left_out: tuple[str, ...] = ()) -> dict[str, Any]:
    """All figures of one shape; raises what torch raises if it does not fit. ``left_out``: contestants, of OPTIONAL."""
    torch.set_num_threads(options.threads)
    cfg, device = configuration(shape, options), torch.device(options.device)
    gpu, clock = device.type == "cuda", CLOCKS[options.clock]
    wait: Callable[[], None] = torch.cuda.synchronize if gpu else nothing
    if not gpu:
        # Lightning has torch look for GPUs by opening NVIDIA's library, which torch's optimisers then do at every step.
        # timm's script does not load Lightning.
        os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "0"
    compiled = gpu if options.compile is None else options.compile
    micro = cfg.parallel.micro_batch or cfg.trainer.global_batch_size
    layout = Layout(micro, cfg.trainer.global_batch_size // micro, "none", compiled)
    images, labels = (tensor.to(device) for tensor in batch_of(cfg))
    held = torch.cuda.memory_allocated() if gpu else 0
    update = Update(cfg, layout, device)
    for _ in range(2):
        update.step(images, labels)
    wait()
    if gpu:
        held = torch.cuda.memory_allocated() - held
    resident = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tiny = shape in TINY and not gpu
    timms = {"timm_fused": Timm(cfg, compiled, device, fused=True)}
    if not gpu and "timm" not in left_out:  # on a GPU timm's default is as fast, and two of them would not fit
        timms["timm"] = Timm(cfg, compiled, device, fused=False, averaged=tiny)
    loader = None
    if tiny:  # timm's whole loop takes the same stream and averages too
        sampler = StepSampler(len(images), 0, 10**9)
        loader = iter(make_loader(train_stream(cfg), sampler, 0))

    def timm_loop(step: int) -> None:
        assert loader is not None
        loss = timms["timm"].step(*next(loader))
        timms["timm"].average(step)
        if step % LOG_EVERY == 0:
            loss.item()

    size = 8192 if gpu else 1024 if tiny else 2048
    dtype = torch.bfloat16 if cfg.trainer.precision == "bf16-mixed" else torch.float32
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    contestants: dict[str, Callable[[int], Any]] = {
        **{name: functools.partial(_step_of, timm, images, labels) for name, timm in timms.items()},
        "update": functools.partial(_step_of, update, images, labels),
        **({"timm_loop": timm_loop} if loader else {}),
        "peak": lambda step: torch.mm(a, b, out=out),
    }
    took: dict[str, list[float]] = defaultdict(list)
    for run in contestants.values():  # compiles
        for step in range(3):
            run(step)
    wait()
    trials = []
    for _ in range(5):
        began = clock()
        update.step(images, labels)
        wait()
        trials.append(clock() - began)
    block = max(1, math.ceil(options.block_s / max(1e-6, min(trials))))
    phases, steps = Phases(clock, wait), 0
    deadline = time.perf_counter() + options.seconds
    mark = paused = 0.0

    def turns() -> None:
        for name, run in contestants.items():
            running.append(name)
            began, num = clock(), 3 if name == "peak" else block
            for step in range(num):
                run(step)
            wait()
            took[name].append((clock() - began) / num)
            running.pop()

    def between(*_: Any) -> None:
        """After every update of the run: when its turn is over, the others have theirs."""
        nonlocal steps, mark, paused
        if running:
            return
        steps += 1
        if steps % block or steps < 2 * block:
            return
        wait()
        now, entered = clock(), time.monotonic()
        phased = phases.on
        if phased:
            phases.end()
        if mark and not phased:
            took["run"].append((now - mark) / block)
            turns()
            if time.perf_counter() > deadline and len(took["run"]) >= LEAST_TURNS:
                raise Enough
        if mark and not phased:
            phases.begin()
        paused += time.monotonic() - entered
        mark = clock()

    running: list[str] = []
    if "run" in left_out:
        while time.perf_counter() < deadline or len(took["update"]) < LEAST_TURNS:
            turns()
        return figures(cfg, took, phases.seconds, resident, block, compiled, size)
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
        ours = SimpleNamespace(
            monotonic=lambda: time.monotonic() - paused
        )  # else every turn has its note of the progress
        stack.enter_context(patch.object(callbacks, "time", ours))
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


def _step_of(contestant: Timm | Update, images: Tensor, labels: Tensor, step: int) -> Tensor:
    return contestant.step(images, labels)


def _no_evaluation(*_: Any) -> None:
    """What an evaluation takes of a cell is measured with its real durations, by --cell."""


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
    sheet = datasheet(torch.device("cuda"), torch.bfloat16) if cfg.trainer.accelerator == "gpu" else None
    step = {name: 1000 * statistics.median(values) for name, values in took.items() if name != "peak"}
    return {
        "shape": cfg.shape,
        "width_depth_mlp": str(shape),
        "batch": batch,
        "micro_batch": cfg.parallel.micro_batch,
        "precision": cfg.trainer.precision,
        "compiled": compiled,
        "threads": cfg.trainer.num_threads,
        "turns": len(took["update"]),
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
        if not row["phases"]:
            continue
        shares = [row["phases"].get(name, 0.0) for name in phases]
        lower.append(
            f"| {row['shape']} | " + " | ".join(f"{share:.1%}" for share in [*shares, shares[-2] + shares[-1]]) + " |"
        )
    return "\n".join([*lines, "", "Phases of a run, as shares of its time:", "", *lower])


def _child(shape: str, options: argparse.Namespace, left_out: tuple[str, ...], pipe: Any) -> None:
    try:
        pipe.send(measure(shape, options, left_out))
    except torch.OutOfMemoryError as error:
        pipe.send({"shape": shape, "why": str(error).splitlines()[0]})


def fitting(shape: str, options: argparse.Namespace) -> tuple[tuple[str, ...], str | None]:
    """(contestants that the memory leaves no room for, why a shape cannot be measured at all), by the memory estimate.

    Each contestant has weights, gradients and optimiser state of its own.
    """
    cfg = configuration(shape, options)
    weights = sum(num_params(shape_of(cfg), **model_geometry(cfg)).values())
    if options.device == "cuda":
        return (), None
    have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    for number in range(len(OPTIONAL) + 1):
        need = weights * (20 * (2 + len(OPTIONAL) - number) - 4)
        if need <= 0.8 * have:
            return OPTIONAL[:number], None
    return OPTIONAL, f"two copies need {need / 1e9:.0f} GB, {have / 1e9:.0f} GB are free"


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
    parser.add_argument("--cell", nargs="+", metavar="KEY=VALUE", help="take a whole cell of star_tiny apart instead")
    parser.add_argument("--star", nargs="+", metavar="SHAPE", help="take a star of these shapes apart, by short cells")
    parser.add_argument("--weights", choices=("ema", "cooled"), default="ema", help="of --star")
    options = parser.parse_args()
    if options.star:
        print(json.dumps(measure_star(options.star, options.weights, CLOCKS[options.clock]), indent=1))
        return
    if options.cell:
        print(json.dumps(measure_cell(options.cell, CLOCKS[options.clock]), indent=1))
        return
    shapes = options.shapes.split(",") if options.shapes else [*LARGE, *TINY]
    context, found, began = multiprocessing.get_context("fork"), [], time.monotonic()
    for shape in shapes:
        left_out, why = fitting(shape, options)
        if why is None and options.device == "cuda" and time.monotonic() - began > options.limit:
            why = f"{options.limit:.0f} s had passed"
        if why is None:
            here, there = context.Pipe(duplex=False)
            child = context.Process(target=_child, args=(shape, options, left_out, there))
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
