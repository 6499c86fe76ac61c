"""What planned cells are expected to tell: the noise and the law that are assumed, and the table of ``sovit plan --noise``.

Shared by ``sovit plan``, ``design`` and ``next``; loads numpy and scipy only when it is asked something.
"""

from __future__ import annotations

import argparse
import json
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sovit.analysis.planning.information import Expected, Spread
    from sovit.launch.plan import Plan

NOISE_HELP = (
    "relative noise: sigma of an evaluation, tau between runs, such as sigma=0.005,tau=0.005; "
    "or from=runs/NAME for that of runs already made"
)
LAW_HELP = "fit.json of an earlier star: its laws, and its noise unless --noise says another"
_NOISE_KEYS = ("sigma", "tau", "slope", "from")


def gflops(text: str) -> float:
    """A positive number of GFLOPs."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number of GFLOPs")
    return value


def read_fit(path: Path) -> dict[str, Any]:
    """A star's fit.json. Raises ValueError."""
    try:
        fit = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"{path}: {(error.strerror or 'cannot be read').lower()}; run sovit fit first.") from None
    except ValueError:
        raise ValueError(f"{path} is not JSON; give the fit.json that sovit fit wrote.") from None
    from sovit.analysis.star import SCHEMA

    if not isinstance(fit, dict) or fit.get("kind") != "star":
        raise ValueError(f"{path} is no fit of a star; give the fit.json that sovit fit wrote for one.")
    if fit.get("schema") != SCHEMA:
        raise ValueError(f"{path} has schema {fit.get('schema')!r}, this version reads {SCHEMA}; run sovit fit again.")
    return fit


def parse_noise(text: str) -> dict[str, str]:
    """``sigma=0.005,tau=0.005`` as a dict. Raises ValueError for another key, or one given twice."""
    found: dict[str, str] = {}
    for item in text.split(","):
        key, equals, value = (part.strip() for part in item.partition("="))
        if key not in _NOISE_KEYS or not equals or not value or key in found:
            raise ValueError(
                f"--noise {text!r} has {item!r}; write each of sigma, tau, slope (shares of the error) and "
                "from=runs/NAME at most once, such as sigma=0.005,tau=0.005."
            )
        found[key] = value
    return found


def spreads(
    text: str | None, fit: Mapping[str, Any] | None, names: Iterable[str], metric: tuple[str, int]
) -> dict[str, Spread]:
    """The noise of each arm: as written, else of the runs named by ``from``, else of the fit. Raises ValueError."""
    from sovit.analysis.planning.information import Spread, fitted_spreads

    said = parse_noise(text) if text else {}
    numbers = {}
    for key in ("sigma", "tau", "slope"):
        if key in said:
            try:
                numbers[key] = float(said[key])
            except ValueError:
                raise ValueError(f"--noise {key}={said[key]} is no number; write a share such as 0.005.") from None
    found: dict[str, Spread] = {}
    if "from" in said:
        found = _measured(Path(said["from"]), fit, metric)
    elif fit is not None:
        found = fitted_spreads(fit)
    chosen: dict[str, Spread] = {}
    for name in names:
        known = found.get(name)
        if known is None and not {"sigma", "tau"} <= set(numbers):
            raise ValueError(
                f"the noise of the {name} arm is not known; write --noise sigma=0.005,tau=0.005 (tau, the spread between "
                "runs, matters most), or from=runs/NAME with runs already made."
            )
        if known is None or {"sigma", "tau"} <= set(numbers):
            chosen[name] = Spread(**numbers, basis="as given")
        else:
            basis = f"{known.basis}; {' and '.join(numbers)} as given" if numbers else known.basis
            chosen[name] = Spread(**({"sigma": known.sigma, "tau": known.tau} | numbers), basis=basis)
    return chosen


def _measured(directory: Path, fit: Mapping[str, Any] | None, metric: tuple[str, int]) -> dict[str, Spread]:
    """The noise of finished runs: from repeated seeds, else from the fit given or in their directory."""
    from sovit.analysis.planning.information import fitted_spreads, seed_spread
    from sovit.analysis.points import dimensions, load_points
    from sovit.analysis.star import HEADLINE

    points, _ = load_points(directory, *metric)
    found = seed_spread([point for point in points if point.error <= HEADLINE])
    if found:
        return dict.fromkeys(dimensions(points[0])._fields, found)
    if fit is None and not (directory / "fit.json").exists():
        raise ValueError(
            f"{directory} has no shape with two seeds and no fit.json to tell the noise; run sovit fit {directory}, "
            "or a second seed."
        )
    return fitted_spreads(fit or read_fit(directory / "fit.json"))


def noise_text(chosen: Mapping[str, Spread]) -> str:
    def one(spread: Spread) -> str:
        slope = f", slope {spread.slope:.2%}" if spread.slope else ""
        return f"sigma {spread.sigma:.2%}, tau {spread.tau:.2%}{slope}"

    first = next(iter(chosen.values()))
    if all(spread == first for spread in chosen.values()):
        return f"Noise: {one(first)}, {first.basis}."
    return f"Noise: {'; '.join(f'{name} {one(spread)}' for name, spread in chosen.items())}; {first.basis}."


def wrap(sentences: Iterable[str]) -> str:
    """Sentences one below the other, broken at 110 characters."""
    return "\n".join(
        textwrap.fill(text, 110, subsequent_indent="  " if text.startswith("- ") else "", break_on_hyphens=False)
        for text in sentences
    )


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows as text, the first column to the left, the others to the right."""
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    lines = [
        "  ".join(f"{cell:<{width}}" if k == 0 else f"{cell:>{width}}" for k, (cell, width) in enumerate(pairs))
        for pairs in (list(zip(row, widths, strict=True)) for row in rows)
    ]
    return "\n".join(line.rstrip() for line in lines)


def exponent_cells(expected: Expected) -> list[str]:
    """s, its standard error and its expected 95% interval."""
    if not math.isfinite(expected.log_se):
        return [f"{expected.s:.2f}", "-", "not determined"]
    interval = f"[{expected.lo:.2f}, {expected.hi:.2f}]" if expected.lo > 0 else "none"
    return [f"{expected.s:.2f}", f"{expected.s * expected.log_se:.2g}", interval]


def amount(value: float) -> str:
    """Three digits, or all of a number in the thousands: 0.123, 1,304,210, 2.6e+12."""
    return f"{value:,.0f}" if 1000 <= value < 1e8 else f"{value:.3g}"


def factor_text(error: float) -> str:
    """The factor either way that a standard error of a logarithm means."""
    return "open" if error > 3 else f"x/ {math.exp(error):.3g}" if error >= 0.01 else f"x/ {math.exp(error):.4f}"


def share_text(share: float) -> str:
    return f"{share:.2%}" if share < 0.01 else f"{share:.1%}"


def target_cells(expected: Expected) -> list[str]:
    """x*(T), the factor within which it is known (one standard error), and the compute lost to that."""
    return [amount(expected.best), factor_text(expected.log_se_best), share_text(expected.wasted)]


def target_text(target: float, longest: float) -> str:
    return (
        f"T = {amount(target)} GFLOPs, {target / longest:.3g} times the longest duration. Known within: one standard "
        "error, as a factor. Compute lost: the share of T that this error wastes on average."
    )


def plan_text(made: Plan, metric: tuple[str, int], noise: str | None, law: Path | None, target: float | None) -> str:
    """What the runs of a plan are expected to tell about every exponent. Raises ValueError if they are no star."""
    import numpy as np

    from sovit.analysis.planning.information import arm, assumed_law, expect, fitted_laws, weaknesses
    from sovit.analysis.points import dimensions
    from sovit.analysis.star import find_center

    fit = read_fit(law) if law else None
    center = find_center(cell.shape for cell in made.cells)
    rows: dict[str, list[tuple[float, float, int]]] = {}
    cost: dict[str, float] = {}
    for number, cell in enumerate(made.cells):
        different = dimensions(cell.shape).differs(center)
        if different:
            size, batch = float(getattr(cell.shape, different[0])), cell.images / cell.steps
            group = rows.setdefault(different[0], [])
            group += [(size, step * batch * cell.forward_gflops, number) for step in cell.evaluations]
            cost[different[0]] = cost.get(different[0], 0.0) + cell.train_gflops
    if not rows:
        raise ValueError("--noise speaks of a star's exponents, and these cells have one shape; plan the whole star.")
    names = [name for name in center._fields if name in rows]
    chosen = spreads(noise, fit, names, metric)
    laws = fitted_laws(fit, names) if fit else {}
    header = ["", "runs", "sizes", "train GFLOPs", "s", "s.e.", "expected 95%"]
    table = [header + (["optimum at T", "known within", "compute lost"] if target else [])]
    warnings: dict[str, list[str]] = {}
    for name in names:
        x, t, run = np.array(rows[name]).T
        middle = math.sqrt(x.min() * x.max()), math.sqrt(t.min() * t.max())
        points = arm(name, laws.get(name) or assumed_law(name, *middle), chosen[name], x, t, run)
        expected = expect(points, target)
        sizes = f"{len(set(x))}, {x.min():g} to {x.max():g}, x{x.max() / x.min():.3g}"
        cells = [name, str(len(set(run))), sizes, amount(cost[name]), *exponent_cells(expected)]
        table.append(cells + (target_cells(expected) if target else []))
        for text in weaknesses(points, expected, list(x)):
            warnings.setdefault(text, []).append(name)
    assumed = (
        f"Law: as fitted in {law}."
        if fit
        else "Law: none is known yet, so one with the published s is assumed (errors near 0.3, c = 0.35), with its optimum "
        "in the middle of each arm at the middle of its durations; --law FIT takes that of an earlier star."
    )
    said = [noise_text(chosen), assumed]
    if target:
        said.append(target_text(target, max(t for group in rows.values() for _, t, _ in group)))
    said += [f"- {', '.join(names)}: {text}." for text, names in warnings.items()]
    return "\n".join(["What these cells are expected to tell, before any is run:", "", columns(table), "", wrap(said)])
