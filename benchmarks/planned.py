"""Did it take as long as the plan said? Measures this machine, plans a sweep, runs it and compares.

    python benchmarks/planned.py                       # a short star, a minute or two
    python benchmarks/planned.py --sweep star_tiny     # the tiny star, a quarter of an hour on two cores at rest

Prints predicted and real seconds of every cell (real: as its record says, from its start to its last evaluation) and of
the whole sweep (real: from the start of the runner to its end). The machine is measured anew unless --cached is given.
Nothing else should run meanwhile. Arguments after the options are overrides of every cell.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from sovit import records
from sovit.launch.local.runner import run_sweep
from sovit.launch.pay.throughput import expect
from sovit.launch.plan import plan
from sovit.launch.sweep import load_sweep, metric_of
from sovit.launch.tables import duration_text

SWEEPS = Path(__file__).parents[1] / "sweeps"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--sweep", default="star_smoke")
    parser.add_argument("--workers", type=int)
    parser.add_argument("--cached", action="store_true", help="use a measurement that is kept")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        sweep = load_sweep(SWEEPS / f"{options.sweep}.yaml", [*options.overrides, f"runs_dir={scratch}"])
        assumed = plan(sweep, workers=options.workers)
        began = time.monotonic()
        made = expect(assumed, "missing" if options.cached else "anew")
        measured_s = time.monotonic() - began
        print(f"The measurement took {duration_text(measured_s)}: {made.basis}.", *made.notes, sep="\n", flush=True)
        began = time.monotonic()
        code = run_sweep(made, metric=metric_of(sweep.metric["name"]))
        real_s = time.monotonic() - began
        if code:
            print("Not every cell ended well; nothing can be compared.", file=sys.stderr)
            return code
        print(f"\n{options.sweep}, {made.workers} at once; seconds\n")
        print(f"| {'cell':<40} | {'steps':>6} | assumed | predicted |    real | predicted / real |")
        print(f"|{'-' * 42}|{'-' * 7}:|--------:|----------:|--------:|-----------------:|")
        sums = [0.0, 0.0, 0.0]
        for before, cell in zip(assumed.cells, made.cells, strict=True):
            run = records.read_run(cell.run_dir)
            assert run is not None
            row = (before.seconds, cell.seconds, run["wall_s"])
            sums = [total + value for total, value in zip(sums, row, strict=True)]
            print(_row(cell.run_id, f"{cell.steps:,}", *row))
        print(_row("sum of the cells", "", *sums))
        print(_row("whole sweep, on the clock", "", assumed.wall_seconds, made.wall_seconds, real_s))
    return 0


def _row(name: str, steps: str, assumed: float, predicted: float, real: float) -> str:
    return (
        f"| {name:<40} | {steps:>6} | {assumed:>7.1f} | {predicted:>9.1f} | {real:>7.1f} | {predicted / real:>16.2f} |"
    )


if __name__ == "__main__":
    sys.exit(main())
