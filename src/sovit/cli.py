"""The ``sovit`` command: shape, plan, run, status, fit. Heavy imports happen inside the commands that need them.

Exit codes: 0 done, 1 some cells are not done, 2 something the user can mend (one sentence on standard error),
130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sovit import __version__

DEFAULT_METRIC = ("fractals", 10)
CONVENTION = "2 FLOP per multiply-add, matrix products and patch convolution only; training costs 3 x forward."


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        return arguments.command(arguments)
    except ValueError as error:
        print(f"sovit {arguments.name}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # sovit plan FILE | head
        sys.stderr.close()
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sovit", description="Which width, depth and MLP dimension should my vision transformer have?"
    )
    parser.add_argument("--version", action="version", version=f"sovit {__version__}")
    commands = parser.add_subparsers(dest="name", required=True, metavar="COMMAND")

    shape = commands.add_parser("shape", help="parameters and FLOPs of a shape")
    shape.add_argument("shape", help="WIDTHxDEPTHxMLP such as 1152x27x4304, or NAME[/PATCH] such as So400m/14")
    shape.add_argument("--heads", type=int, help="attention heads; a named shape brings its own")
    shape.add_argument("--head-dim", type=int, help="instead of --heads: width / head dimension")
    shape.add_argument("--patch", type=int, help="patch size in pixels; a named shape brings its own, 14 otherwise")
    shape.add_argument("--image-size", type=int, default=224, help="pixels a side (default: %(default)s)")
    shape.add_argument("--channels", type=int, default=3, help="default: %(default)s")
    shape.add_argument("--pool", default="map", help="map, avg or token (default: %(default)s)")
    shape.add_argument("--classes", type=int, default=0, help="of a classifier; 0 for none (default)")
    shape.add_argument("--json", action="store_true", help="print JSON")
    shape.set_defaults(command=_shape)

    plan = commands.add_parser("plan", help="the cells of a sweep, their compute and the time to expect")
    run = commands.add_parser("run", help="run what is left of a sweep on this machine")
    for command in (plan, run):
        command.add_argument("file", type=Path, help="sweep file, such as sweeps/star_tiny.yaml")
        command.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="set in every cell, such as seed=0")
        command.add_argument("--workers", type=_positive, metavar="N", help="cells at once (default: by cores or GPUs)")
    plan.add_argument(
        "--tflops", type=float, metavar="PEAK", help="of one GPU (default: 312, of which 40%% are reached)"
    )
    plan.set_defaults(command=_plan)
    run.add_argument("--retry-failed", action="store_true", help="also run cells that failed or diverged before")
    run.set_defaults(command=_run)

    status = commands.add_parser("status", help="where the cells of a sweep stand")
    status.add_argument("sweep", type=Path, nargs="?", help="runs/NAME or a sweep file (default: everything in runs/)")
    status.set_defaults(command=_status)

    fit = commands.add_parser("fit", help="scaling exponents or the best shape from the runs of a sweep")
    fit.add_argument("runs", type=Path, help="directory of a sweep's runs, such as runs/star_tiny")
    fit.add_argument("--dataset", default=DEFAULT_METRIC[0], help="default: %(default)s")
    fit.add_argument("--shots", type=_positive, default=DEFAULT_METRIC[1], help="default: %(default)s")
    fit.add_argument("--out", type=Path, help="directory for fit.json and the report (default: the runs directory)")
    fit.set_defaults(command=_fit)
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _shape(arguments: argparse.Namespace) -> int:
    from sovit.flops import forward_flops, num_params
    from sovit.shape import NAMED, parse_shape

    name, slash, _ = arguments.shape.strip().partition("/")
    says_patch = slash or name in NAMED
    shape = parse_shape(
        arguments.shape,
        num_heads=arguments.heads,
        head_dim=arguments.head_dim,
        patch_size=14 if arguments.patch is None and not says_patch else arguments.patch,
    )
    geometry = {"channels": arguments.channels, "pool": arguments.pool, "num_classes": arguments.classes}
    params = num_params(shape, arguments.image_size, **geometry)
    flops = forward_flops(shape, arguments.image_size, **geometry)
    if arguments.json:
        content = {
            **shape.as_dict(),
            "image_size": arguments.image_size,
            **geometry,
            "num_params": sum(params.values()),
            "forward_gflops": sum(flops.values()) / 1e9,
            "params_by_group": params,
            "forward_flops_by_group": flops,
        }
        print(json.dumps(content, indent=1))
        return 0
    print(
        f"{shape}: {shape.num_heads} heads of dimension {shape.head_dim}, patch {shape.patch_size}, "
        f"{arguments.image_size} px, {arguments.channels} channels, pool {arguments.pool}\n"
    )
    print(f"{'':<24}{'parameters':>16}{'forward GFLOPs/image':>24}")
    for group in dict.fromkeys([*flops, *params]):
        if params.get(group) or flops.get(group):
            print(f"{group.replace('_', ' '):<24}{params.get(group, 0):>16,}{flops.get(group, 0) / 1e9:>24.6g}")
    print(f"{'total':<24}{sum(params.values()):>16,}{sum(flops.values()) / 1e9:>24.6g}\n")
    print(CONVENTION)
    return 0


def _plan(arguments: argparse.Namespace) -> int:
    from sovit.launch import display
    from sovit.launch.plan import PEAK_TFLOPS, plan
    from sovit.launch.sweep import load_sweep

    made = plan(
        load_sweep(arguments.file, arguments.overrides),
        workers=arguments.workers,
        peak_tflops=arguments.tflops or PEAK_TFLOPS,
    )
    display.print_table(display.plan_table(made))
    print(display.plan_summary(made))
    return 0


def _run(arguments: argparse.Namespace) -> int:
    from sovit.launch.local import run_sweep
    from sovit.launch.plan import plan
    from sovit.launch.sweep import load_sweep, metric_of

    sweep = load_sweep(arguments.file, arguments.overrides)
    made = plan(sweep, workers=arguments.workers)
    return run_sweep(made, retry_failed=arguments.retry_failed, metric=metric_of(sweep.metric["name"]))


def _status(arguments: argparse.Namespace) -> int:
    from sovit.launch import display
    from sovit.launch.state import summary

    metric = DEFAULT_METRIC
    if arguments.sweep is not None and arguments.sweep.is_file():
        from sovit.launch.plan import plan
        from sovit.launch.sweep import load_sweep, metric_of

        sweep = load_sweep(arguments.sweep)
        metric = metric_of(sweep.metric["name"])
        groups = {sweep.name: [cell.run_dir for cell in plan(sweep).cells]}
    else:
        groups = _run_directories(arguments.sweep)
    for name, directories in groups.items():
        table, states = display.status_table(directories, metric)
        display.print_table(table)
        print(f"{name}: {len(states)} cells, {summary(states)}.")
    return 0


def _run_directories(path: Path | None) -> dict[str, list[Path]]:
    """Sweep name -> run directories, of one sweep's directory or of everything in runs/."""
    from sovit.records import RUN

    sweeps = [path] if path is not None else sorted(Path("runs").glob("*"))
    found = {sweep.name: sorted(file.parent for file in sweep.glob(f"*/{RUN}")) for sweep in sweeps}
    found = {name: directories for name, directories in found.items() if directories}
    if not found:
        raise ValueError(f"{path or 'runs/'} holds no runs; give a sweep file, or a directory such as runs/star_tiny.")
    return found


def _fit(arguments: argparse.Namespace) -> int:
    from sovit.analysis import report

    directory, dataset, shots = arguments.runs, arguments.dataset, arguments.shots
    if not directory.is_dir():
        raise ValueError(f"{directory} is not a directory; give the directory that holds a sweep's runs.")
    out = arguments.out or directory
    inputs = _fit_inputs(directory, dataset, shots)
    runs = report.read_runs(directory)
    fit = _up_to_date(out, inputs)
    if fit is not None:
        print(report.text(fit, runs))
        print(f"\nNothing has changed since the last fit: {out / 'fit.json'}, {out / 'report.html'}")
        return 0

    from sovit import records
    from sovit.analysis.grid import fit_grid, sweep_kind
    from sovit.analysis.points import load_points
    from sovit.analysis.star import fit_star

    points, exclusions = load_points(directory, dataset, shots)
    if not points:
        raise ValueError(f"{directory} holds no finished run; see sovit status {directory}.")
    fit_sweep = fit_star if sweep_kind(points) == "star" else fit_grid
    found = fit_sweep(points, sweep=directory.resolve().name, dataset=dataset, shots=shots, exclusions=exclusions)
    fit = found.as_dict() | {"inputs": inputs}
    out.mkdir(parents=True, exist_ok=True)
    page = report.write_report(fit, runs, out)
    records.write_json(out / "fit.json", fit)  # last: it vouches for the page
    print(report.text(fit, runs))
    print(f"\n{out / 'fit.json'}, {page}")
    return 0


def _fit_inputs(directory: Path, dataset: str, shots: int) -> str:
    """Digest of everything a fit depends on: the records, the exclusions, the metric and the code."""
    import hashlib

    from sovit import records

    code = sorted(Path(__file__).parent.rglob("*.py"))
    digest = hashlib.sha256(f"{dataset} {shots} {[path.read_text() for path in code]}".encode())
    files = [*directory.glob(f"*/{records.RUN}"), *directory.glob(f"*/{records.EVALS}"), directory / "exclusions.csv"]
    for path in sorted(file for file in files if file.is_file()):
        digest.update(f"{path.parent.name}/{path.name}".encode() + path.read_bytes())
    return digest.hexdigest()


def _up_to_date(out: Path, inputs: str) -> dict[str, Any] | None:
    """The fit already written from the same inputs, if its page is there too."""
    try:
        fit = json.loads((out / "fit.json").read_text())
    except (OSError, ValueError):
        return None
    return fit if fit.get("inputs") == inputs and (out / "report.html").exists() else None


if __name__ == "__main__":
    sys.exit(main())
