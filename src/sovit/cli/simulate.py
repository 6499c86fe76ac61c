"""``sovit simulate``: the runs of a sweep file, drawn from a known law instead of trained, as ordinary records."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sovit.cli.options import positive
from sovit.metric import ERROR, kind_of, words

if TYPE_CHECKING:
    from sovit.analysis.forecast.joint import Geometry
    from sovit.analysis.simulation.simulate import Cell, Disturbance, Drawn, End
    from sovit.analysis.simulation.truth import Truth
    from sovit.config import RunConfig
    from sovit.launch import plan

RUNS_DIR = "runs/simulated"  # apart from runs/, where the next cells of a real sweep are looked for


def add(commands: argparse._SubParsersAction) -> None:
    simulate = commands.add_parser(
        "simulate",
        help="draw the runs of a sweep from a known law, to see what a fit can find",
        description="Draw an error for every cell and duration of a sweep file from a known law, and write ordinary "
        "records: sovit fit and sovit status read them like those of trained runs.",
    )
    simulate.add_argument("file", type=Path, help="sweep file, such as sweeps/star_tiny.yaml")
    simulate.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="set in every cell, such as seed=1")
    simulate.add_argument(
        "--law",
        default="separable",
        help="separable, flops, a YAML file with the parameters of either, or the run.json of a simulated run to draw "
        "from its law (default: %(default)s, with exponents like the published ones)",
    )
    simulate.add_argument("--seed", type=int, default=0, metavar="N", help="of the noise (default: %(default)s)")
    simulate.add_argument("--runs-dir", metavar="DIR", help=f"default: {RUNS_DIR}")
    noise = simulate.add_argument_group("noise", "Spreads and sizes are relative: 0.01 is 1% of the error.")
    noise.add_argument("--sigma", type=float, default=0.01, help="of every evaluation (default: %(default)s)")
    noise.add_argument("--tau", type=float, default=0.01, help="of every run, at all durations (default: %(default)s)")
    noise.add_argument("--tau-slope", type=float, default=0.0, help="of every run's slope in log compute (default: 0)")
    noise.add_argument("--test-images", type=positive, metavar="N", help="binomial errors of N images (default: none)")
    noise.add_argument("--outlier-points", metavar="SHARE:SIZE", help="0.05:0.1 raises 5%% of the errors by a tenth")
    noise.add_argument("--outlier-runs", metavar="N:SIZE", help="1:0.02 raises all errors of one run by 2%%")
    noise.add_argument(
        "--fail", type=float, default=0.0, metavar="SHARE", help="of the runs fail or diverge (default: 0)"
    )
    simulate.set_defaults(command=_simulate)


def _simulate(arguments: argparse.Namespace) -> int:
    if arguments.seed < 0:
        raise ValueError(f"--seed {arguments.seed} is negative; give a whole number of at least 0.")

    from sovit.analysis.simulation import simulate
    from sovit.analysis.simulation.truth import as_dict
    from sovit.launch.plan import plan
    from sovit.launch.sweep import load_sweep, metric_of

    noise = simulate.Disturbance(
        sigma=arguments.sigma,
        tau=arguments.tau,
        tau_slope=arguments.tau_slope,
        test_images=arguments.test_images,
        outlier_points=_pair("--outlier-points", arguments.outlier_points, float, "SHARE:SIZE such as 0.05:0.1"),
        outlier_runs=_pair("--outlier-runs", arguments.outlier_runs, int, "N:SIZE such as 1:0.02"),
        fail=arguments.fail,
    )
    sweep = load_sweep(arguments.file, [*arguments.overrides, *_runs_dir(arguments)])
    metric = metric_of(sweep.metric["name"])
    if kind_of(*metric) != ERROR:
        raise ValueError(
            f"{arguments.file} follows the {words(*metric)}, and only errors are simulated; give it a few-shot metric."
        )
    made = plan(sweep)
    configs = [cell.config for cell in made.cells]
    geometry, num_draws = _shared(configs)
    cells = [_cell(cell, cfg.trainer.global_batch_size) for cell, cfg in zip(made.cells, configs, strict=True)]
    truth = _read_truth(arguments.law, cells, geometry)
    origin = {"law": as_dict(truth), "noise": dataclasses.asdict(noise), "seed": arguments.seed}
    _refuse(made, origin["law"])
    drawn = simulate.draw_errors(truth, cells, noise, _generator(arguments.seed, cells), num_draws=num_draws)
    text = _text(made, cells, truth, noise, drawn)  # raises for a truth without an optimum, before anything is written
    _write(made, configs, cells, drawn, noise, origin, metric)
    print(text)
    return 0


def _pair(option: str, text: str | None, first: type, example: str) -> tuple[Any, float] | None:
    """The two numbers of an option, whose values `Disturbance` checks."""
    if text is None:
        return None
    left, _, right = text.partition(":")
    try:
        return first(left), float(right)
    except ValueError:
        raise ValueError(f"{option} {text!r} is not {example}.") from None


def _runs_dir(arguments: argparse.Namespace) -> list[str]:
    given = [override for override in arguments.overrides if override.startswith("runs_dir=")]
    if given and arguments.runs_dir is not None:
        raise ValueError(f"{given[0]} and --runs-dir {arguments.runs_dir}: give one of the two.")
    return [] if given else [f"runs_dir={arguments.runs_dir or RUNS_DIR}"]


def _shared(configs: Sequence[RunConfig]) -> tuple[Geometry, int]:
    """What all cells must have in common: the geometry that costs depend on, and the draws of an evaluation."""
    from sovit.analysis.forecast.joint import Geometry
    from sovit.derived import model_geometry, vit_shape_of

    geometries = {(vit_shape_of(cfg, "simulation").patch_size, *model_geometry(cfg).items()) for cfg in configs}
    draws = {cfg.eval.num_draws for cfg in configs}
    if len(geometries) > 1 or len(draws) > 1:
        raise ValueError(
            "the cells differ in more than shape, seed and recipe; simulate cells of one model and one eval."
        )
    first = configs[0]
    shape = vit_shape_of(first, "simulation")
    return Geometry(patch_size=shape.patch_size, num_heads=shape.num_heads, **model_geometry(first)), draws.pop()


def _cell(cell: plan.Cell, batch_size: int) -> Cell:
    from sovit.analysis.points import vit_dimensions
    from sovit.analysis.simulation.simulate import Cell

    compute = tuple((name, step * batch_size * cell.forward_gflops) for step, name in cell.evaluations.items())
    return Cell(cell.run_id, vit_dimensions(cell.shape), cell.seed, cell.forward_gflops, compute)


def _read_truth(law: str, cells: Sequence[Cell], geometry: Geometry) -> Truth:
    """A built-in law by its name, or the one of a file: of its own, or inside a simulated run.json."""
    from sovit.analysis.simulation.simulate import truth_for
    from sovit.analysis.simulation.truth import from_dict

    if not Path(law).is_file():
        if law in ("separable", "flops"):
            return truth_for(law, cells, geometry)
        raise ValueError(f"--law {law!r} is neither separable nor flops, nor a file.")

    import yaml

    try:
        text = Path(law).read_text()
        document, tree = yaml.safe_load(text), yaml.compose(text, yaml.SafeLoader)  # JSON is YAML
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{law} cannot be read as YAML: {' '.join(str(error).split())}.") from None
    try:
        _check_unique(tree)
        if isinstance(document, dict) and "run_id" in document:
            if "simulated" not in document:
                raise ValueError("this run was trained, and its law is not known; give that of a simulated run.")
            document = document["simulated"]["law"]
        return from_dict(document, geometry)
    except ValueError as error:
        raise ValueError(f"{law}: {error}") from None


def _check_unique(node: Any) -> None:
    """Raise ValueError if a mapping has a key twice, of which YAML keeps the last without a word."""
    if not isinstance(getattr(node, "value", None), list):
        return
    pairs = [item for item in node.value if isinstance(item, tuple)]
    keys = [key.value for key, _ in pairs]
    for key in keys:
        if keys.count(key) > 1:
            raise ValueError(f"{key!r} is given twice; drop one.")
    for _, value in pairs:
        _check_unique(value)


def _refuse(made: plan.Plan, law: dict[str, Any]) -> None:
    """Raise ValueError if the sweep's directory holds a run that was trained, or one of another law that would stay."""
    from sovit import records

    written = {cell.run_dir for cell in made.cells}
    directory = made.runs_dir / made.name
    for run_dir in sorted(path for path in directory.glob("*") if path.is_dir()):
        run = records.read_run(run_dir)
        if (run is None and any(run_dir.iterdir())) or (run is not None and "simulated" not in run):
            raise ValueError(
                f"{run_dir} holds a run that was not simulated; choose another --runs-dir, or another name with name=NEW."
            )
        if run is not None and run_dir not in written and run["simulated"]["law"] != law:
            raise ValueError(
                f"{run_dir} was simulated from another law; give its own, --law {run_dir / records.RUN}, or delete it."
            )


def _generator(seed: int, cells: Sequence[Cell]) -> Any:
    """Random numbers that depend on the seed and on which runs are drawn, so that a second training seed has its own."""
    import hashlib

    import numpy as np

    names = "\n".join(cell.run_id for cell in cells)
    return np.random.default_rng([seed, int(hashlib.sha256(names.encode()).hexdigest(), 16)])


def _write(
    made: plan.Plan,
    configs: Sequence[RunConfig],
    cells: Sequence[Cell],
    drawn: Drawn,
    noise: Disturbance,
    origin: dict[str, Any],
    metric: tuple[str, int],
) -> None:
    """Write the records of every cell, of those that do not finish as far as they got."""
    import json

    from sovit import records
    from sovit.analysis.simulation.simulate import standard_errors

    spreads = standard_errors(drawn.errors, noise)
    provenance = {"code_version": records.code_version(), "lock_sha256": records.lock_hash()}
    for position, (planned, cfg, cell) in enumerate(zip(made.cells, configs, cells, strict=True)):
        record = _record(planned, cfg, provenance, {**origin, "outlier": cell.run_id in drawn.outlier_runs})
        planned.run_dir.mkdir(parents=True, exist_ok=True)
        records.write_json(planned.run_dir / records.RUN, record)  # first: it marks what follows as simulated
        here, end = drawn.run == position, drawn.ends.get(position)
        rows = _rows(planned, cfg, metric, drawn.errors[here], spreads[here], end)
        (planned.run_dir / records.EVALS).write_text("".join(json.dumps(row) + "\n" for row in rows))
        if end is None:
            record |= {"status": records.DONE, "baselines": {}, "steps_trained": planned.steps, "images_per_s": None}
        else:
            record |= {"status": end.status, "reason": end.reason}
        records.write_json(planned.run_dir / records.RUN, record)


def _record(
    planned: plan.Cell, cfg: RunConfig, provenance: dict[str, Any], simulated: dict[str, Any]
) -> dict[str, Any]:
    """run.json of a run that has not ended, with the keys of a trained one (`sovit.lit.engine`) and "simulated"."""
    import hashlib
    import json

    from sovit import records

    identity = json.dumps([planned.config_hash, simulated], sort_keys=True)
    return {
        "schema": records.SCHEMA,
        "run_id": planned.run_id,
        "sweep": cfg.name,
        "status": records.RUNNING,
        "reason": None,
        **planned.shape.as_dict(),
        "seed": cfg.seed,
        "num_params": planned.num_params,
        "forward_gflops": planned.forward_gflops,
        "config_hash": hashlib.sha256(identity.encode()).hexdigest()[:16],  # another: sovit run must not call it done
        **provenance,
        "data_fingerprint": "simulated",
        "torch_version": None,
        "wall_s": 0.0,
        "config": dataclasses.asdict(cfg),
        "simulated": simulated,
    }


def _rows(
    planned: plan.Cell, cfg: RunConfig, metric: tuple[str, int], errors: Any, spreads: Any, end: End | None
) -> list[dict[str, Any]]:
    """Lines of evals.jsonl; ``errors``, ``spreads``: (evaluations, draws) arrays."""
    from sovit import records

    reached = list(planned.evaluations.items())[: None if end is None else end.num_evaluations]
    rows = []
    for (step, duration), error, stderr in zip(reached, errors.tolist(), spreads.tolist(), strict=False):
        examples = step * cfg.trainer.global_batch_size
        fields = {
            "schema": records.SCHEMA,
            "run_id": planned.run_id,
            "sweep": cfg.name,
            **planned.shape.as_dict(),
            "image_size": cfg.model.image_size,
            "seed": cfg.seed,
            "step": step,
            "examples_seen": examples,
            "forward_gflops": planned.forward_gflops,
            "t_gflops": examples * planned.forward_gflops,
            "duration": duration,
            "weights": cfg.eval.weights,
            "dataset": metric[0],
            "shots": metric[1],
        }
        l2_reg = None if cfg.eval.l2_reg == "loo" else cfg.eval.l2_reg  # nothing was left out to choose it
        rows += [
            {**fields, "draw": draw, "l2_reg": l2_reg, "error": error[draw], "stderr": stderr[draw]}
            for draw in range(len(error))
        ]
    return rows


def _text(made: plan.Plan, cells: Sequence[Cell], truth: Truth, noise: Disturbance, drawn: Drawn) -> str:
    """What was drawn, and the exponents a fit should find."""
    directory, mean = made.runs_dir / made.name, drawn.errors.mean(1)
    notes = [f"does not finish: {cells[cell].run_id} ({end.status})" for cell, end in sorted(drawn.ends.items())]
    size = noise.outlier_runs[1] if noise.outlier_runs else 0.0
    notes += [f"outlier: {run_id}, all its errors x {1 + size:g}" for run_id in drawn.outlier_runs]
    if drawn.num_clipped:
        notes.append(f"{drawn.num_clipped} errors above 1 were set to 1")
    return "\n".join(
        [
            f"{made.name}: {len(cells)} {'run' if len(cells) == 1 else 'runs'} simulated in {directory}, "
            f"{len(mean)} errors from {mean.min():.3f} to {mean.max():.3f}",
            "",
            *_truth_lines(cells, truth),
            "",
            f"noise: {_noise_text(noise)}",
            *notes,
            "",
            f"sovit fit {directory}",
        ]
    )


def _truth_lines(cells: Sequence[Cell], truth: Truth) -> list[str]:
    from sovit.analysis.points import DIMENSIONS
    from sovit.analysis.simulation.simulate import evaluations
    from sovit.analysis.simulation.truth import Separable, center_of, middle_compute

    shapes, compute, _, _ = evaluations(cells)
    t, center = middle_compute(compute), center_of(shapes)
    alone, best = truth.arm_growth(t, center), truth.arm_optimum(t, center)
    if isinstance(truth, Separable):
        lines = [
            "truth: f(x, t) = sum_k alpha_k x_k^-a_k + t^-c (sum_k beta_k x_k^b_k + xi) + eps",
            f"each best size grows as t^s, s = c / (a + b), c = {truth.c:g}",
        ]
        header = ["", "s", f"best at {t:.3g} GFLOPs"]
        columns = [[f"{s:.2f}" for s in alone], [_size(x) for x in best]]
    else:
        lines = [
            "truth: f(x, t) = sum_k alpha_k x_k^-a_k + beta n^-c + eps, n = t / F(x) images",
            f"the best sizes grow about as t^s near {t:.3g} GFLOPs, c = {truth.c:g}; alone: the other two at the center",
        ]
        header = ["", "s alone", "best alone", "s together", "best together"]
        together, joint = truth.growth(t), truth.optimum(t)
        columns = [[f"{s:.2f}" for s in alone], [_size(x) for x in best]]
        columns += [[f"{s:.2f}" for s in together], [_size(x) for x in joint]]
    table = [(*header, "sizes of the sweep")]
    warnings = []
    for k, name in enumerate(DIMENSIONS):
        low, high = int(shapes[:, k].min()), int(shapes[:, k].max())
        sizes = f"{low:,}, not varied" if low == high else f"{low:,} to {high:,}"
        table.append((name, *(column[k] for column in columns), sizes))
        if low < high and not low <= best[k] <= high:
            warnings.append(f"The best {name} lies outside the sweep: a fit can hardly find its exponent.")
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines.append("")
    for row in table:
        lines.append("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
    return lines + warnings


def _size(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _noise_text(noise: Disturbance) -> str:
    parts = [f"{noise.sigma:.3g} an evaluation", f"{noise.tau:.3g} a run"]
    if noise.tau_slope:
        parts.append(f"{noise.tau_slope:.3g} a run's slope")
    if noise.test_images is not None:
        parts.append(f"{noise.test_images:,} test images")
    if noise.outlier_points is not None:
        parts.append(f"{noise.outlier_points[0]:.3g} of the points x {1 + noise.outlier_points[1]:g}")
    return ", ".join(parts)
