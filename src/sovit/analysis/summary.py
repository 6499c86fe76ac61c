"""What a fit says, in words: the rows of the report's tables, from fit.json and the runs' records alone.

Everything here returns plain strings that are still to be escaped: run ids, reasons and values of the configuration
are untrusted text.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import Any

from sovit.analysis.figures import ARMS, count, exponent, law_of, max_error, number

CUTOFF_FACTOR = 1.5  # an exponent that moves by more than this with the cut-off rests on the choice
JACKKNIFE_FACTOR = 2.0  # a jackknife interval so much wider in log s contradicts the model of the noise
CENTER_MISS = 0.1  # relative; a law that misses the held-out center by more describes its arm badly
EMBEDDED = {
    "star": "The task and its difficulty were chosen so that a U-shape shows; these exponents demonstrate the method "
    "and are no reproduction of the published ones.",
    "grid": "The task and its difficulty were chosen so that small shapes have an optimum; the shape found demonstrates "
    "the method and says nothing about other images.",
}


def metric_name(fit: dict[str, Any]) -> str:
    metric = fit.get("metric") or {}
    return f"{metric.get('shots', '?')}-shot error on {metric.get('dataset', '?')}"


def shape_name(sizes: dict[str, Any] | None) -> str:
    return "x".join(str(sizes.get(arm, "?")) for arm in ARMS) if sizes else "-"


def level(fit: dict[str, Any]) -> str:
    return f"{100 * fit.get('level', 0.95):.0f}%"


def headline(fit: dict[str, Any]) -> list[dict[str, Any]]:
    """One row an arm, in words: the exponent, what it rests on and a verdict, or why there is no exponent."""
    rows = []
    for arm, name in ARMS.items():
        entry = fit["arms"].get(arm)
        if not entry:
            rows.append({"arm": arm, "name": name, "identified": False, "why": "the sweep has no runs of this arm"})
            continue
        minima = entry.get("minima") or []
        row = {
            "arm": arm,
            "name": name,
            "identified": bool(entry["identified"] and entry["s"]),
            "why": (entry.get("why") or "no reason was recorded").removeprefix("not identified: "),
            "num_runs": entry.get("num_runs"),
            "num_points": entry.get("num_points"),
            "parabola": _parabola(entry.get("parabola")),
            "cutoffs": _range(entry.get("cutoff_range")),
            "inside": f"{sum(m['interior'] for m in minima)} of {len(minima)}",
            "flags": entry.get("flags", []),
        }
        if row["identified"]:
            row |= {
                "s": exponent(entry["s"]["estimate"]),
                "interval": _interval(entry["s"]),
                "method": entry["s"].get("method", ""),
                "jackknife": _interval(entry.get("jackknife")),
                "verdict": verdict(entry),
            }
        rows.append(row)
    return rows


def verdict(entry: dict[str, Any]) -> str:
    """One clause on an identified exponent: what, if anything, speaks against taking it at its word."""
    doubts = []
    span = entry.get("cutoff_range")
    if span and span[0] and span[1] and span[1] / span[0] > CUTOFF_FACTOR:
        doubts.append(f"moves {span[1] / span[0]:.1f}x with the cut-off")
    parabola, s = entry.get("parabola"), entry["s"]
    if parabola and not _within(parabola["slope"], s["lo"], s["hi"]):
        doubts.append("parabola disagrees")
    jackknife = entry.get("jackknife")
    if not (s["lo"] and s["hi"]):
        doubts.append("open on one side")
    elif jackknife and jackknife["lo"] and jackknife["hi"]:
        ratio = math.log(jackknife["hi"] / jackknife["lo"]) / math.log(s["hi"] / s["lo"])
        if ratio > JACKKNIFE_FACTOR:
            doubts.append(f"jackknife {ratio:.0f}x as wide")
    checks = [check for check in entry.get("center_check") or [] if check["used_range"] and check["measured"]]
    misses = [abs(check["predicted"] / check["measured"] - 1) for check in checks]
    if misses and max(misses) > CENTER_MISS:
        doubts.append(f"misses the center by {100 * max(misses):.0f}%")
    return "; ".join(doubts) or "holds"


def trust(fit: dict[str, Any], runs: Sequence[dict[str, Any]]) -> list[str]:
    """Sentences on how far to trust the numbers, from what the sweep was."""
    notes = []
    star = fit["kind"] == "star"
    if len({point["seed"] for point in fit.get("points", [])}) == 1:
        notes.append(
            "One seed: the spread between runs is estimated from how the shapes scatter about the law."
            if star
            else "One seed: the ± of a lead is that of the test images and leaves out the luck of a run."
        )
    if star and any(row["identified"] for row in headline(fit)):
        notes.append(
            "The choice of cut-off (errors above it are not fitted) is not in the intervals; its range stands beside them."
        )
    if any((run.get("config") or {}).get("data", {}).get("name") == "fractals" for run in runs):
        notes.append(EMBEDDED[fit["kind"]])
    return notes


def baselines(fit: dict[str, Any], runs: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Errors that training has to beat, by name, as far as the records hold them (the mean over runs)."""
    metric = fit.get("metric") or {}
    dataset, shots = metric.get("dataset"), metric.get("shots")
    recorded = [(run.get("baselines") or {}).get(dataset) for run in runs]
    found = {
        "chance": [entry["chance"] for entry in recorded if entry and "chance" in entry],
        "random initialisation": [
            row["error"]
            for run in runs
            for row in run.get("init") or []
            if row["dataset"] == dataset and row["shots"] == shots
        ],
        "ridge on pixels": [
            entry["pixels"][str(shots)] for entry in recorded if entry and str(shots) in entry["pixels"]
        ],
    }
    return {name: sum(errors) / len(errors) for name, errors in found.items() if errors}


def baselines_in_words(fit: dict[str, Any], runs: Sequence[dict[str, Any]]) -> str:
    return ", ".join(f"{name} {number(error)}" for name, error in baselines(fit, runs).items())


def by_seed(fit: dict[str, Any]) -> str:
    """The exponents that each seed gives on its own, or "" for one seed."""
    words = [
        f"seed {seed}: "
        + ", ".join(f"{ARMS[arm]} {exponent(s['estimate'] if s else None)}" for arm, s in found.items())
        for seed, found in (fit.get("by_seed") or {}).items()
    ]
    return "; ".join(words) if len(words) > 1 else ""


def center_checks(fit: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a compute: the measured error of the held-out center and each arm's prediction with its relative miss."""
    rows: dict[float, dict[str, Any]] = {}
    for arm in ARMS:
        for check in (fit.get("arms", {}).get(arm) or {}).get("center_check") or []:
            t = check["t_gflops"]
            row = rows.setdefault(t, {"t": number(t), "used_range": check["used_range"], "predicted": {}})
            stderr = check.get("measured_stderr")
            row["measured"] = number(check["measured"]) + (f" ± {number(stderr, 1)}" if stderr else "")
            miss = _percent(check["predicted"] / check["measured"] - 1) if check["measured"] else "-"
            row["predicted"][arm] = f"{number(check['predicted'])} ({miss})"
    return [rows[t] for t in sorted(rows)]


def law_rows(fit: dict[str, Any]) -> list[dict[str, Any]]:
    """The fitted parameters of every arm that has a law, with the spreads of the two-level noise in percent."""
    rows = []
    for arm, name in ARMS.items():
        entry = fit.get("arms", {}).get(arm)
        law = law_of(entry) if entry else None
        if entry and law:
            rows.append(
                {
                    "name": name,
                    "values": {key: f"{value:.3g}" for key, value in law.as_dict().items()},
                    "sigma": _percent(entry.get("sigma"), sign=False),
                    "tau": _percent(entry.get("tau"), sign=False),
                    "max_error": number(max_error(entry), 2),
                    "converged": _percent(entry.get("converged"), sign=False),
                }
            )
    return rows


def choices(fit: dict[str, Any]) -> dict[str, Any]:
    """The exponent under other choices of points: "header" names them, "rows" holds (arm, exponents in that order)."""
    found: dict[str, dict[str, float | None]] = {}
    for arm, name in ARMS.items():
        entry = fit.get("arms", {}).get(arm)
        if entry:
            found[name] = {
                **{f"error ≤ {cut['max_error']:g}": cut["s"] for cut in entry["cutoffs"]},
                **{f"from duration {late['num_dropped'] + 1}": late["s"] for late in entry["late"]},
            }
    header = list(dict.fromkeys(choice for exponents in found.values() for choice in exponents))
    return {
        "header": header,
        "rows": [
            (name, [exponent(exponents.get(choice)) for choice in header])
            for name, exponents in found.items()
            if exponents
        ],
    }


def run_rows(fit: dict[str, Any], runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a run, by shape and seed; the last error is that of its longest evaluation among the fit's points."""
    last: dict[str, dict[str, Any]] = {}
    for point in sorted(fit.get("points", []), key=lambda point: point["t_gflops"]):
        last[point["run_id"]] = point
    rows = []
    for run in sorted(runs, key=lambda run: [*(run.get(arm) or 0 for arm in ARMS), run.get("seed") or 0]):
        point = last.get(run["run_id"])
        rows.append(
            {
                "run_id": run["run_id"],
                "shape": shape_name(run),
                "seed": run.get("seed", "-"),
                "params": count(run.get("num_params")),
                "gflops": number(run.get("forward_gflops")),
                "status": run.get("status", "-"),
                "reason": run.get("reason") or "",
                "error": number(point["error"]) if point else "-",
                "t": number(point["t_gflops"]) if point else "-",
                "images_per_s": number(run.get("images_per_s"), 4),
                "wall": _time(run.get("wall_s")),
            }
        )
    return rows


def left_out(fit: dict[str, Any]) -> list[tuple[str, int, str]]:
    """(why, how many points, of which runs) for the points the fit did not use, the commonest reason first.

    Reasons that differ in the point's own error only are one reason.
    """
    groups: dict[str, list[str]] = {}
    for point in fit.get("points", []):
        if not point["used"]:
            why = point.get("why_not") or "no reason was recorded"
            why = re.sub(r"^error [\d.e-]+ is", "error", re.sub(r" from [\d.e-]+ to [\d.e-]+$", "", why))
            groups.setdefault(why, []).append(point["run_id"])
    rows = []
    for why, runs in sorted(groups.items(), key=lambda item: -len(item[1])):
        names = sorted(set(runs))
        rows.append((why, len(runs), names[0] if len(names) == 1 else f"{len(names)} runs"))
    return rows


def winners(fit: dict[str, Any]) -> list[dict[str, str]]:
    """One row a compute of a grid: the best shape, its lead over the runner-up, and where it touches the grid's edge."""
    return [
        {
            "t": number(winner["t_gflops"]),
            "best": shape_name(winner["best"]),
            "error": number(winner["error"]),
            "runner_up": shape_name(winner["runner_up"]),
            "lead": f"{number(winner['difference'], 2)} ± {number(winner['difference_se'], 1)}",
            "edge": ", ".join(ARMS[arm] for arm, inside in winner["interior"].items() if not inside) or "none",
            "shapes": f"{winner['num_shapes']}{'' if winner['complete'] else ', incomplete'}",
        }
        for winner in fit["winners"]
    ]


def origin(fit: dict[str, Any]) -> str:
    """Where scaling starts according to a grid, or why the grid does not say."""
    found = fit["origin"]
    if not found:
        return f"No origin: {fit['why']}."
    return (
        f"Origin: {shape_name(found)}, the best shape from t0 = {number(found['t0_gflops'])} to "
        f"{number(found['t_hi_gflops'])} GFLOPs ({found['num_slices']} computes)."
    )


def provenance(runs: Sequence[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """What made the runs; more than one value of anything here means that the runs may not be comparable."""
    names = {
        "code": "code_version",
        "lock (SHA-256)": "lock_sha256",
        "data": "data_fingerprint",
        "torch": "torch_version",
    }
    return [(name, sorted({str(run.get(key)) for run in runs})) for name, key in names.items() if runs]


def common_config(runs: Sequence[dict[str, Any]]) -> dict[str, list[tuple[str, str]]]:
    """The flattened configurations: "common" to all runs with its value, "differing" with the values there are."""
    flat = [dict(flatten(run["config"])) for run in runs if run.get("config")]
    common, differing = [], []
    for key in dict.fromkeys(key for config in flat for key in config):
        values = dict.fromkeys(config.get(key, "-") for config in flat)
        if len(values) == 1:
            common.append((key, next(iter(values))))
        else:
            differing.append((key, ", ".join(values)))
    return {"common": common, "differing": differing}


def flatten(tree: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Nested dicts as (dotted key, value in words) pairs."""
    if isinstance(tree, dict) and (tree or not prefix):
        return [
            pair for key, value in tree.items() for pair in flatten(value, f"{prefix}.{key}" if prefix else str(key))
        ]
    return [(prefix, tree if isinstance(tree, str) else json.dumps(tree))]


def _interval(interval: dict[str, Any] | None) -> str:
    if not interval:
        return "-"
    lo, hi = interval.get("lo"), interval.get("hi")
    if not lo and hi is None:
        return "unbounded"
    return (
        f"above {exponent(lo)}"
        if hi is None
        else f"below {exponent(hi)}"
        if not lo
        else f"[{exponent(lo)}, {exponent(hi)}]"
    )


def _range(span: Sequence[float | None] | None) -> str:
    return f"{exponent(span[0])} to {exponent(span[1])}" if span else "-"


def _parabola(parabola: dict[str, Any] | None) -> str:
    if not parabola:
        return "-"
    lo, hi = parabola.get("lo"), parabola.get("hi")
    return exponent(parabola["slope"]) + (
        f" [{exponent(lo)}, {exponent(hi)}]" if lo is not None and hi is not None else ""
    )


def _within(value: float | None, lo: float | None, hi: float | None) -> bool:
    return value is None or (lo or -math.inf) <= value <= (math.inf if hi is None else hi)


def _percent(share: float | None, sign: bool = True) -> str:
    if share is None:
        return "-"
    percent = round(100 * share, 1) + 0.0  # no -0.0
    return f"{percent:+.1f}%" if sign else f"{percent:.1f}%"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    hours, rest = divmod(round(seconds), 3600)
    return (
        f"{hours} h {rest // 60:02d} min"
        if hours
        else f"{rest // 60} min {rest % 60:02d} s"
        if rest >= 60
        else f"{rest} s"
    )
