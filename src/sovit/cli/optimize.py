"""``sovit optimize``: star, grid, fits, prediction, rivals at equal compute, report; each stage is skipped when done.

Every stage is a ``sovit`` command that is printed and could be typed, so what is done stays done after a kill, and a stage
can be repeated, looked at or run elsewhere by itself.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sovit.cli.options import above_0, positive

if TYPE_CHECKING:
    from sovit.analysis.proof.rivals import Rival
    from sovit.launch.sweep import Sweep
    from sovit.shape import Shape

STAR, GRID = Path("sweeps/star_quick.yaml"), Path("sweeps/grid_quick.yaml")
FACTOR, SEEDS = 10.0, 3
_PUBLISHED = "width=0.22,depth=0.45,mlp=0.6"  # SoViT, arXiv 2305.13035, Section 4.1
_CHOOSING = 0  # the seed that elects the best neighbour; the proof's own seeds follow


def add(commands: argparse._SubParsersAction) -> None:
    optimize = commands.add_parser(
        "optimize",
        help="the whole way: sweeps, prediction, the predicted shape against its rivals, one report",
        description="Runs a star and a grid, fits them, predicts the shape for --factor times the star's largest compute, "
        "trains it and its rivals at that compute, and reports. Run again, it goes on where it stopped.",
    )
    optimize.add_argument("--star", type=Path, default=STAR, metavar="FILE", help="sweep file (default: %(default)s)")
    optimize.add_argument("--grid", type=Path, default=GRID, metavar="FILE", help="sweep file (default: %(default)s)")
    budget = optimize.add_mutually_exclusive_group()
    budget.add_argument(
        "--factor", type=above_0, metavar="X", help=f"times the star's largest run (default: {FACTOR:g})"
    )
    budget.add_argument("--compute", type=above_0, metavar="GFLOPS", help="instead: forward FLOPs per image x images")
    optimize.add_argument(
        "--law", choices=("flops", "paper"), default="flops", help="which rule predicts (default: %(default)s)"
    )
    optimize.add_argument(
        "--seeds", type=positive, default=SEEDS, metavar="N", help="of each shape (default: %(default)s)"
    )
    optimize.add_argument(  # dest: arguments.name is the command's
        "--name", dest="proof", metavar="NAME", default="optimize",
        help="of the proof's sweeps and folder (default: %(default)s)",
    )  # fmt: skip
    optimize.add_argument("--workers", type=positive, metavar="N", help="cells at once (default: by cores or GPUs)")
    optimize.add_argument("--launcher", default="local", metavar="NAME", help="as of sovit run")
    optimize.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="set in every cell, such as logger=none")
    optimize.set_defaults(command=_optimize)


@dataclass(frozen=True)
class _Place:
    """Where things lie: the sweeps' run folders, and the proof's own folder."""

    runs: Path
    star: Path
    grid: Path
    name: str

    @property
    def joint(self) -> Path:
        return self.runs / f"{self.star.name}+{self.grid.name}"

    @property
    def own(self) -> Path:
        return self.runs / self.name


@dataclass(frozen=True)
class _Heads:
    """The star's rule: so many heads at every width, or, if ``dim``, heads of one dimension."""

    num: int
    dim: int | None

    @property
    def options(self) -> list[str]:
        return ["--head-dim", str(self.dim)] if self.dim else ["--heads", str(self.num)]

    def are_of(self, shape: Shape) -> bool:
        return shape.head_dim == self.dim if self.dim else shape.num_heads == self.num


def _optimize(arguments: argparse.Namespace) -> int:
    from sovit.config import compose
    from sovit.derived import vit_shape_of
    from sovit.launch import proof
    from sovit.launch.sweep import load_sweep, metric_of

    star, grid = (load_sweep(file, arguments.overrides) for file in (arguments.star, arguments.grid))
    proof.refuse(star, grid, arguments.overrides, arguments.proof)
    here, there = (compose(sweep.cells[0]) for sweep in (star, grid))
    runs = Path(here.runs_dir)
    heads = _Heads(vit_shape_of(here, "a proof").num_heads, here.model.head_dim)
    place = _Place(runs, runs / here.name, runs / there.name, arguments.proof)
    dataset, shots = metric_of(star.metric["name"])
    metric = ["--dataset", dataset, "--shots", str(shots)]
    for title, sweep, folder in (("1 of 5  the star", star, place.star), ("2 of 5  the grid", grid, place.grid)):
        _stage(title)
        _run(arguments, sweep.path)
        _quietly(["fit", str(folder), *metric])
    _stage("3 of 5  the prediction")
    if arguments.law == "flops":
        _quietly(["fit", str(place.star), str(place.grid), "--law", "flops", *metric])
    compute = _compute(arguments, place)
    prediction = _predict(arguments, place, heads, compute)
    geometry, predicted, published = prediction["geometry"], _shape(prediction), _published(place, heads, compute)
    beside = f"published exponents: {published}" if published else "no origin to start the published exponents from"
    print(f"predicted for {compute:,g} GFLOPs: {predicted}   ({beside})", flush=True)

    _stage("4 of 5  the local grid: one seed, to choose the neighbour that the prediction must beat")
    neighbour = _best_neighbour(arguments, place, star, heads, predicted, compute, (dataset, shots))
    _stage(f"5 of 5  the proof: {arguments.seeds} seeds of each rival at equal compute")
    rivals = _rivals(predicted, published, neighbour, geometry, heads)
    folders = _prove(arguments, place, star, heads, rivals, compute)

    from sovit.analysis.proof import evidence
    from sovit.analysis.report import proof as report

    found = evidence.gather(
        rivals,
        place.own,
        folders=folders,
        local=place.runs / f"{place.name}_local",
        metric=(dataset, shots),
        compute=compute,
        prediction=prediction,
        joint=place.joint if arguments.law == "flops" else None,
        star=place.star,
        num_seeds=arguments.seeds,
    )
    page = report.write(found, place.own)
    print(f"\n{report.text(found)}\n\n{page}")
    return 0 if found["complete"] else 1


def _rivals(
    predicted: Shape, published: Shape | None, neighbour: Shape | None, geometry: Mapping[str, Any], heads: _Heads
) -> list[Rival]:
    from sovit.analysis.proof import rivals

    found = [
        rivals.Rival(rivals.PREDICTED, predicted, "the shape that the sweeps predict"),
        rivals.same_parameters(predicted, geometry, heads.dim),
        rivals.conventional(predicted, geometry),
    ]
    if published is not None:
        found.insert(
            1, rivals.Rival(rivals.PUBLISHED, published, "SoViT's exponents .22, .45, .60 from the same origin")
        )
    if neighbour is not None:
        why = f"{rivals.moved(neighbour, predicted)}: the best of the local grid on another seed"
        found.append(rivals.Rival(rivals.NEIGHBOUR, neighbour, why))
    return found


def _best_neighbour(
    arguments: argparse.Namespace,
    place: _Place,
    star: Sweep,
    heads: _Heads,
    predicted: Shape,
    compute: float,
    metric: tuple[str, int],
) -> Shape | None:
    """The neighbour of least error on the choosing seed; None if none has finished."""
    from sovit.analysis.points import load_points
    from sovit.analysis.proof.rivals import neighbours
    from sovit.launch import proof

    shapes = [predicted, *neighbours(predicted, heads.dim)]
    name, file = f"{place.name}_local", place.own / "local.yaml"
    proof.write(
        file, star, name=name, shapes=[str(shape) for shape in shapes], seeds=[_CHOOSING], compute=compute,
        about="The local grid around a predicted shape, made by sovit optimize.",
    )  # fmt: skip
    _run(arguments, file)
    points, _ = load_points(place.runs / name, *metric)
    last = {(p.width, p.depth, p.mlp_dim): p.error for p in sorted(points, key=lambda point: point.t_gflops)}
    measured = {shape: last.get((shape.width, shape.depth, shape.mlp_dim)) for shape in shapes if shape != predicted}
    known = {shape: error for shape, error in measured.items() if error is not None}
    return min(known, key=known.__getitem__) if known else None


def _prove(
    arguments: argparse.Namespace, place: _Place, star: Sweep, heads: _Heads, rivals: Sequence[Rival], compute: float
) -> dict[Path, list[Shape]]:
    """Train every rival; returns the folders of the runs, each with its shapes: those with the star's heads, and others."""
    from sovit.launch import proof

    groups: dict[str, list[Shape]] = {"proof": [], "habit": []}
    for rival in rivals:
        groups["proof" if heads.are_of(rival.shape) else "habit"].append(rival.shape)
    for group, shapes in groups.items():
        if not shapes:
            continue
        file = place.own / f"{group}.yaml"
        proof.write(
            file, star, name=f"{place.name}_{group}", shapes=list(dict.fromkeys(map(str, shapes))),
            seeds=[_CHOOSING + 1 + k for k in range(arguments.seeds)], compute=compute, keep=True,
            num_heads=shapes[0].num_heads if group == "habit" else None,
            about="A predicted shape and its rivals at equal compute, made by sovit optimize.",
        )  # fmt: skip
        _run(arguments, file)
    return {place.runs / f"{place.name}_{group}": shapes for group, shapes in groups.items()}


def _compute(arguments: argparse.Namespace, place: _Place) -> float:
    """The budget in GFLOPs."""
    from sovit.analysis.forecast.exponents import largest_compute, read_fit

    if arguments.compute:
        return arguments.compute
    return float(f"{(arguments.factor or FACTOR) * largest_compute(read_fit(place.star, 'star')[1]):.3g}")


def _predict(arguments: argparse.Namespace, place: _Place, heads: _Heads, compute: float) -> dict[str, Any]:
    """The prediction, as ``sovit predict --json`` says it, kept as prediction.json.

    Raises ValueError if the proof was begun for another predicted shape or budget.
    """
    from sovit import records

    if arguments.law == "flops":
        command = ["predict", "--law", "flops", "--joint", str(place.joint), "--compute", f"{compute:g}"]
    else:
        command = ["predict", "--fit", str(place.star), "--grid", str(place.grid), "--compute", f"{compute:g}"]
    command += heads.options
    found = json.loads(_quietly([*command, "--json"]))
    file = place.own / "prediction.json"
    before = records.read_object(file)
    was, here = (f"{_shape(one)} at {one['t_gflops']:,g} GFLOPs" if one else "" for one in (before, found))
    if was and was != here and (place.own / "local.yaml").exists():
        raise ValueError(f"{file}: the proof was begun for {was}, and this would be {here}; give this one --name NEW.")
    place.own.mkdir(parents=True, exist_ok=True)
    records.write_json(file, found | {"command": ["sovit", *command]})
    return found


def _published(place: _Place, heads: _Heads, compute: float) -> Shape | None:
    """The published exponents' shape from the grid's origin; None if the grid has none."""
    from sovit.analysis.forecast.exponents import read_fit

    if not read_fit(place.grid, "grid")[1]["origin"]:
        return None
    command = ["predict", "--exponents", _PUBLISHED, "--grid", str(place.grid), "--compute", f"{compute:g}"]
    return _shape(json.loads(_quietly([*command, *heads.options, "--json"])))


def _shape(prediction: Mapping[str, Any]) -> Shape:
    """The first candidate: the rule's own rounding, with the heads of the runs."""
    from sovit.shape import Shape

    first = prediction["candidates"][0]
    heads = first["heads"][0][0]
    return Shape(first["width"], first["depth"], first["mlp_dim"], heads, prediction["geometry"]["patch_size"])


def _stage(title: str) -> None:
    print(f"\n== {title}", flush=True)


def _run(arguments: argparse.Namespace, file: Path) -> None:
    """``sovit run FILE``; cells that failed or diverged are for the analysis to name, a stop ends everything."""
    options = ["--workers", str(arguments.workers)] if arguments.workers else []
    options += ["--launcher", arguments.launcher] if arguments.launcher != "local" else []
    command = ["run", str(file), *options, *arguments.overrides]
    print(f"$ sovit {shlex.join(command)}", flush=True)
    code = _sovit(command)
    if code not in (0, 1):
        raise SystemExit(code)


def _quietly(command: Sequence[str]) -> str:
    """The output of a ``sovit`` command, not shown."""
    print(f"$ sovit {shlex.join(command)}", flush=True)
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        code = _sovit(command)
    if code:
        print(output.getvalue(), end="")
        raise SystemExit(code)
    return output.getvalue()


def _sovit(command: Sequence[str]) -> int:
    from sovit.cli import main

    return main(command)
