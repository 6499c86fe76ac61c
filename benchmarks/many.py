"""Many small models on one device: images a second of K cells at a time, against one at a time.

    python benchmarks/many.py [--shapes 32x4x128,32x1x128] [--at-once 1,2,4] [--seconds 6] [--rounds 3] [--json FILE]
    python benchmarks/many.py --device cuda --at-once 1,2,4,8

Every cell is a process of its own that runs the engine as a sweep does, on one thread of a CPU or on the same GPU as the
others. The numbers of cells take turns; counted are the updates between the moment when the last cell has begun and the
one when the first has ended. Figures are medians over the rounds. A share of 100% a cell means that the cells do not slow
each other; on a CPU that cannot be had with more of them than cores.
"""

from __future__ import annotations

import argparse
import bisect
import contextlib
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from contestants import configuration
from sovit.config import RunConfig
from sovit.launch.devices import cores
from sovit.launch.pay.hardware import hardware
from sovit.schema import DurationsConfig, EvalConfig, LoggerConfig

WARM_UP = 20  # updates at the beginning of a cell that count for nothing


def cell(shape: str, seed: int, steps: int, runs_dir: str, options: argparse.Namespace) -> RunConfig:
    """A cell of the tiny star that is evaluated as little as can be."""
    cfg = configuration(shape, options)
    cfg.seed, cfg.runs_dir = seed, runs_dir
    cfg.durations = DurationsConfig(values=[f"{steps} steps"])
    cfg.eval = EvalConfig(datasets=["digits"], shots=[1], num_draws=1, weights="ema")
    cfg.logger = LoggerConfig(name="none")
    return cfg


def work(cfg: RunConfig, pipe: Any) -> None:
    """Run a cell and send the moments at which its updates ended."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    from sovit.lit import engine

    moments: list[float] = []
    register_optimizer_step_post_hook(lambda *_: moments.append(time.monotonic()))
    log = os.open(Path(cfg.runs_dir) / f"{cfg.seed}.txt", os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(log, stream)
    code = engine.run(cfg)
    pipe.send((code, moments))


def images_per_s(shape: str, at_once: int, steps: int, options: argparse.Namespace) -> float:
    """Aggregate rate of ``at_once`` cells while all of them train."""
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        pipes = []
        for seed in range(at_once):
            here, there = context.Pipe(duplex=False)
            process = context.Process(target=work, args=(cell(shape, seed, steps, scratch, options), there))
            process.start()
            stack.callback(process.join)
            there.close()
            pipes.append(here)
        answers = [pipe.recv() for pipe in pipes]
        if any(code for code, _ in answers):
            raise SystemExit((Path(scratch) / "0.txt").read_text())
    found = [moments[WARM_UP:] for _, moments in answers]
    begin, end = max(moments[0] for moments in found), min(moments[-1] for moments in found)
    if end <= begin:
        raise SystemExit("The cells were never all at work together; write a larger --seconds.")
    done = sum(bisect.bisect_right(moments, end) - bisect.bisect_right(moments, begin) for moments in found)
    return done * configuration(shape, options).trainer.global_batch_size / (end - begin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shapes", default="32x4x128,32x1x128,256x4x128")
    parser.add_argument("--at-once", help="numbers of cells; default: 1, the cores, twice the cores; 1,2,4,8 on a GPU")
    parser.add_argument("--seconds", type=float, default=6, help="of one cell alone")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="file for all figures")
    options = parser.parse_args()
    options.batch = options.micro_batch = options.precision = None
    options.threads = 1
    num = len(cores())
    given = options.at_once or ("1,2,4,8" if options.device == "cuda" else f"1,{num},{2 * num}")
    at_once = sorted({1, *(int(text) for text in given.split(","))})
    import sovit.launch.preload  # noqa: F401  # once, for all forks; it starts no GPU

    rows = []
    for shape in options.shapes.split(","):
        trial = images_per_s(shape, 1, 10 * WARM_UP, options)
        batch = configuration(shape, options).trainer.global_batch_size
        steps = WARM_UP + max(WARM_UP, round(options.seconds * trial / batch))
        found: dict[int, list[float]] = {number: [] for number in at_once}
        for _ in range(options.rounds):
            for number in at_once:
                found[number].append(images_per_s(shape, number, steps, options))
        for number in at_once:
            ratio = statistics.median(many / one for many, one in zip(found[number], found[1], strict=True))
            rows.append({"shape": shape, "at_once": number, "images_per_s": found[number], "over_one": ratio})
    print("| shape | cells at once | images/s | over one at a time | share a cell |")
    print("|---|---:|---:|---:|---:|")
    for row in rows:
        print(
            f"| {row['shape']} | {row['at_once']} | {statistics.median(row['images_per_s']):,.0f} | "
            f"{row['over_one']:.2f} | {row['over_one'] / row['at_once']:.0%} |"
        )
    if options.json:
        machine = hardware("gpu" if options.device == "cuda" else "cpu")
        about = {"machine": machine, "date": time.strftime("%Y-%m-%d"), "load": os.getloadavg()}
        options.json.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
