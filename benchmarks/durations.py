"""Several durations from one run: cooldown branches and averaged weights, against separate runs.

    python benchmarks/durations.py [--shape 32x4x128] [--seeds 2] [--last 64]

Trains the shape at every duration (a) in a run of its own with a cooldown, (b) as cooldown branches off one trunk,
(c) as one trunk whose averaged weights are read, and prints the 10-shot errors side by side and the training compute
each way needs. (a) and (b) must agree bit for bit. About three minutes on two cores.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import tempfile
from pathlib import Path
from statistics import mean

from sovit import records, schedule
from sovit.config import RunConfig, compose
from sovit.derived import eval_steps
from sovit.duration import geometric
from sovit.lit import engine

WAYS = ("separate", "cooled", "ema")


def errors(cfg: RunConfig) -> dict[str, float]:
    """Duration -> 10-shot error on the held-out fractals, mean over draws; trains the cell."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        if engine.run(cfg) != engine.OK:
            raise SystemExit(said.getvalue())
    found: dict[str, list[float]] = {}
    for row in records.read_lines(records.run_dir(cfg) / records.EVALS):
        if row["dataset"] == "fractals" and row["shots"] == 10 and row["step"]:
            found.setdefault(row["duration"], []).append(row["error"])
    return {duration: mean(values) for duration, values in found.items()}


def steps(cfg: RunConfig) -> int:
    return schedule.steps_trained(schedule.segments(list(eval_steps(cfg)), cfg.eval.weights, cfg.schedule.cooldown))  # type: ignore[arg-type]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shape", default="32x4x128")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--last", type=float, default=64, help="longest duration, GFLOPs")
    options = parser.parse_args()
    durations = geometric(f"{options.last / 4} gflops", f"{options.last} gflops", 3)
    table: dict[str, dict[str, list[float]]] = {way: {duration: [] for duration in durations} for way in WAYS}
    trained = dict.fromkeys(WAYS, 0)

    with tempfile.TemporaryDirectory() as scratch:

        def cell(seed: int, way: str, values: list[str]) -> RunConfig:
            return compose(
                [f"shape={options.shape}", f"seed={seed}", f"runs_dir={Path(scratch) / way / str(len(values))}",
                 f"name={''.join(c for c in values[0] if c.isalnum())}", "logger=none", "durations.first=null",
                 "durations.last=null", "durations.num=null", f"durations.values=[{','.join(values)}]",
                 "eval.datasets=[fractals]", "eval.shots=[10]",
                 f"eval.weights={'ema' if way == 'ema' else 'cooled'}"]
            )  # fmt: skip

        for seed in range(options.seeds):
            for way in WAYS:
                parts = [[duration] for duration in durations] if way == "separate" else [durations]
                for values in parts:
                    cfg = cell(seed, way, values)
                    trained[way] += steps(cfg)
                    for duration, error in errors(cfg).items():
                        table[way][duration].append(error)

    print(f"{options.shape}, {options.seeds} seed(s), 10-shot error on held-out fractals (mean over seeds)")
    print(f"{'duration':>12} {'separate':>9} {'branches':>9} {'averaged':>9}")
    for duration in durations:
        print(f"{duration:>12} " + " ".join(f"{mean(table[way][duration]):9.4f}" for way in WAYS))
    print(f"{'compute':>12} " + " ".join(f"{trained[way] / trained['separate']:9.0%}" for way in WAYS))
    print(f"Branches save {1 - trained['cooled'] / trained['separate']:.0%} of the separate runs' training compute,")
    print(f"averaged weights {1 - trained['ema'] / trained['separate']:.0%}.")
    if table["cooled"] != table["separate"]:
        raise SystemExit("A branch differs from the run of its own: that is a bug.")


if __name__ == "__main__":
    main()
