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

from sovit.analysis.report.figures import law_of, max_error
from sovit.analysis.report.linear import pull
from sovit.analysis.report.words import (
    MIXER_ARMS,
    arms_of_star,
    count,
    counted,
    exponent,
    growth,
    interval,
    listed,
    number,
    percent,
    shape,
    span,
    time,
    value_of,
)
from sovit.metric import words

CUTOFF_FACTOR = 1.5  # an exponent that moves by more than this with the cut-off rests on the choice
JACKKNIFE_FACTOR = 2.0  # a jackknife interval so much wider in log s contradicts the model of the noise
CENTER_MISS = 0.1  # relative; a law that misses the held-out center by more describes its arm badly
WIDE = 5.0  # hi / lo of an interval beyond which the exponent is hardly known
EMBEDDED = {
    "star": "The task and its difficulty were chosen so that a U-shape shows; these exponents demonstrate the method "
    "and are no reproduction of the published ones.",
    "grid": "The task and its difficulty were chosen so that small shapes have an optimum; the shape found demonstrates "
    "the method and says nothing about other images.",
}
PASSED = ("no sign", "untested", "holds")  # how a verdict begins that speaks against nothing
SIMULATED = "These runs were simulated: their errors were drawn from a law that is known, and no model was trained."


def metric_name(fit: dict[str, Any]) -> str:
    metric = fit.get("metric") or {}
    return words(str(metric.get("dataset", "?")), metric.get("shots", "?"))


def level(fit: dict[str, Any]) -> str:
    return f"{100 * (fit.get('level') or 0.95):.0f}%"


def headline(fit: dict[str, Any]) -> list[dict[str, Any]]:
    """One row an arm, in words: the exponent, what it rests on and a verdict, or why there is no exponent."""
    rows = []
    for arm, name in arms_of_star(fit).items():
        entry = fit["arms"].get(arm)
        if not entry:
            rows.append({"arm": arm, "name": name, "identified": False, "why": "the sweep has no runs of this arm"})
            continue
        failed = sum(fails(check) for check in findings(fit) if subject(check) in (arm, name))
        rows.append({"arm": arm, "name": name} | arm_row(entry, failed))
    return rows


def arm_row(entry: dict[str, Any], num_failed: int = 0) -> dict[str, Any]:
    """An arm's exponent in words, and what it rests on; ``num_failed``: of the checks stored with the fit."""
    minima = entry.get("minima") or []
    row = {
        "identified": bool(entry["identified"] and entry["s"]),
        "why": (entry.get("why") or "no reason was recorded").removeprefix("not identified: "),
        "num_runs": entry.get("num_runs"),
        "num_points": entry.get("num_points"),
        "parabola": _parabola(entry.get("parabola")),
        "cutoffs": span(entry.get("cutoff_range")),
        "inside": f"{sum(m['interior'] for m in minima)} of {len(minima)}",
        "flags": entry.get("flags") or [],
        "entry": entry,
    }
    if row["identified"]:
        row |= {
            "s": exponent(entry["s"]["estimate"]),
            "interval": interval(entry["s"]),
            "growth": growth(entry["s"]["estimate"]),
            "method": entry["s"].get("method", ""),
            "jackknife": interval(entry.get("jackknife")),
            "verdict": verdict(entry, num_failed),
        }
    return row


def verdict(entry: dict[str, Any], num_failed: int = 0) -> str:
    """One clause on an identified exponent: what, if anything, speaks against taking it at its word.

    Warnings of the arm and failed checks are counted, for they stand in full elsewhere.
    """
    doubts = []
    s, ends = entry["s"], entry.get("cutoff_range")
    if s["lo"] and s["hi"] and s["hi"] / s["lo"] > WIDE:
        doubts.append(f"interval spans {s['hi'] / s['lo']:.0f}x")
    if ends and ends[0] and ends[1] and ends[1] / ends[0] > CUTOFF_FACTOR:
        doubts.append(f"moves {ends[1] / ends[0]:.1f}x with the cut-off")
    parabola = entry.get("parabola")
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
    doubts += [flag for flag in entry.get("flags") or [] if flag.endswith("bound") or flag.startswith("optimum")]
    doubts += [counted(len(entry["warnings"]), "warning")] if entry.get("warnings") else []
    doubts += [f"{counted(num_failed, 'check')} in doubt"] if num_failed else []
    return "; ".join(doubts) or "holds"


def findings(fit: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of `sovit check` stored with a fit: a list, or the whole document with its "rows"."""
    found = fit.get("checks") or []
    rows = found.get("rows") or [] if isinstance(found, dict) else found
    return [row for row in rows if isinstance(row, dict)]


def subject(check: dict[str, Any]) -> str:
    """What a check is about: a dimension, or everything."""
    return str(check.get("dimension") or check.get("subject") or "all")


def fails(check: dict[str, Any]) -> bool:
    """A check whose verdict does not begin as one that speaks against nothing; without a verdict, p below 0.05."""
    if check.get("verdict"):
        return not str(check["verdict"]).startswith(PASSED)
    return isinstance(check.get("p"), float | int) and check["p"] < 0.05


def answer(fit: dict[str, Any]) -> list[tuple[str, str]]:
    """(tone, sentence) of a star's result: which exponents hold, which do not, and whether their order is settled."""
    rows = headline(fit)
    known = [row for row in rows if row["identified"]]
    good = [row for row in known if row["verdict"] == "holds"]
    weak = [row for row in known if row["verdict"] != "holds"]
    sentences = []

    def named(some: Sequence[dict[str, Any]]) -> str:
        return listed([f"{row['name']} {row['s']} {row['interval']}" for row in some])

    if good:
        sentences.append(("good", f"Nothing measured speaks against {named(good)}."))
    if weak:
        sentences.append(("doubt", f"Doubtful: {named(weak)}; the verdict says why."))
    missing = [row for row in rows if not row["identified"]]
    if missing:
        names = listed([row["name"] for row in missing])
        sentences.append(("bad", f"Not identified: {names}."))
    if len(known) > 1:
        sentences.append(("", _order(known)))
    return sentences


def _order(rows: Sequence[dict[str, Any]]) -> str:
    """Which dimensions grow faster than which, as far as the intervals do not overlap."""

    def ends(row: dict[str, Any]) -> tuple[float, float]:
        s = row["entry"]["s"]
        return s["lo"] or 0.0, math.inf if s["hi"] is None else s["hi"]

    apart = [
        f"{fast['name']} grows faster than {slow['name']}"
        for fast in rows
        for slow in rows
        if ends(fast)[0] > ends(slow)[1]
    ]
    if not apart:
        return "The intervals overlap, so which dimension grows fastest is not settled."
    total = len(rows) * (len(rows) - 1) // 2
    return f"{listed(apart)[0].upper()}{listed(apart)[1:]}; " + (
        "that settles their order."
        if len(apart) == total
        else "the other intervals overlap, so their order is not settled."
    )


def blind_spots(fit: dict[str, Any]) -> list[str]:
    """What no statistic on these runs can see; for a star with the size it would have.

    The last figures are from simulation (arms of the published sizes, point noise 0.5%, 300 sweeps a case): 1% more
    error on an end run moves s by -0.035, -0.127, -0.238 (width, depth, MLP dimension), by the influence function; a
    tuning error of 1.5% at both ends of depth's arm biases its s by -0.197, noticed by no diagnostic in more than 7% of
    the sweeps; a floor that adds in quadrature, sqrt((alpha x^-a)^2 + 0.03^2), by -0.057, noticed in at most 8%.
    """
    if fit["kind"] == "grid":
        return []
    said = (
        "What no statistic on these runs can see: a learning rate that suits some sizes better than others, and a floor of "
        "the error that is not additive."
    )
    if fit["kind"] != "star":
        return [said]
    moves = []
    for arm, name in arms_of_star(fit).items():
        entry = (fit.get("arms") or {}).get(arm)
        found = pull(arm, entry, fit["points"]) if entry and entry["identified"] and entry["s"] else {}
        if found:
            low, high = min(found), max(found)
            moves.append(f"{name} {found[low]:+.3f} (at {low}) and {found[high]:+.3f} (at {high})")
    if moves:
        said += f" 1% more error on the run at an end of an arm of this star would move s by: {', '.join(moves)}."
    return [
        said,
        "How large such errors can get, by simulation on arms of the published sizes: 1% more error at an end moves s by "
        "-0.04 (width), -0.13 (depth), -0.24 (MLP dimension). Training 1.5% worse at both ends biases depth's s by -0.20, a "
        "floor that adds in quadrature by -0.06, and no diagnostic notices either in more than 8% of the sweeps.",
    ]


def trust(fit: dict[str, Any], runs: Sequence[dict[str, Any]]) -> list[str]:
    """Sentences on how far to trust the numbers, from what the sweep was."""
    notes = []
    kind = fit["kind"]
    if fit.get("simulated") or any(run.get("simulated") for run in runs):
        notes.append(SIMULATED)
    if len({point["seed"] for point in fit.get("points", [])}) == 1:
        notes.append(
            "One seed: the ± of a lead is that of the test images and leaves out the luck of a run."
            if kind == "grid"
            else "One seed: the spread between runs is estimated from how the shapes scatter about the law."
        )
    if kind == "star" and any(row["identified"] for row in headline(fit)):
        notes.append(
            "The choice of cut-off (errors above it are not fitted) is not in the intervals; its range stands beside them."
            if value_of(fit) == "error"
            else "The cut-off is what a decoder reaches that sees no image. The choice is not in the intervals; the range "
            "over lower ones stands beside them."
        )
    if fit.get("shared"):
        notes.append(_shared(fit["shared"], arms_of_star(fit)))
    simulated = SIMULATED in notes
    if not simulated and any((run.get("config") or {}).get("data", {}).get("name") == "fractals" for run in runs):
        notes.append(EMBEDDED["grid" if kind == "grid" else "star"])
    return notes


def _shared(found: dict[str, Any], names: dict[str, str]) -> str:
    """The exponents of all arms fitted together, and whether the data allow it."""
    each = ", ".join(f"{names[arm]} {exponent(one['estimate'])} {interval(one)}" for arm, one in found["s"].items())
    verdict = "which the data reject" if found["p"] <= 0.05 else "which the data allow"
    return f"With {listed(found['shared'])} in common, {verdict} (p = {number(found['p'], 2)}): {each}."


def baselines(fit: dict[str, Any], runs: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Errors that training has to beat, by name, as far as the records hold them (the mean over runs)."""
    metric = fit.get("metric") or {}
    dataset, shots = metric.get("dataset"), metric.get("shots")
    recorded = [(run.get("baselines") or {}).get(dataset) for run in runs]
    image_to_text = value_of(fit) != "error"
    found = {
        "decoder without images" if image_to_text else "chance": [
            entry["chance"] for entry in recorded if entry and "chance" in entry
        ],
        "random initialisation": [
            row["error"]
            for run in runs
            for row in run.get("init") or []
            if row["dataset"] == dataset and row["shots"] == shots
        ],
        "decoder on pixels" if image_to_text else "ridge on pixels": [
            entry["pixels"][str(shots)] for entry in recorded if entry and str(shots) in (entry.get("pixels") or {})
        ],
    }
    return {name: sum(errors) / len(errors) for name, errors in found.items() if errors}


def baselines_in_words(fit: dict[str, Any], runs: Sequence[dict[str, Any]]) -> str:
    return ", ".join(f"{name} {number(error)}" for name, error in baselines(fit, runs).items())


def by_seed(fit: dict[str, Any]) -> str:
    """The exponents that each seed gives on its own, or "" for one seed."""
    words = [
        f"seed {seed}: "
        + ", ".join(f"{arms_of_star(fit)[arm]} {exponent(s['estimate'] if s else None)}" for arm, s in found.items())
        for seed, found in (fit.get("by_seed") or {}).items()
    ]
    return "; ".join(words) if len(words) > 1 else ""


def center_checks(fit: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a compute: the measured error of the held-out center and each arm's prediction with its relative miss."""
    rows: dict[float, dict[str, Any]] = {}
    for arm in arms_of_star(fit):
        for check in (fit.get("arms", {}).get(arm) or {}).get("center_check") or []:
            t = check["t_gflops"]
            row = rows.setdefault(t, {"t": number(t), "used_range": check["used_range"], "predicted": {}})
            stderr = check.get("measured_stderr")
            row["measured"] = number(check["measured"]) + (f" ± {number(stderr, 1)}" if stderr else "")
            miss = percent(check["predicted"] / check["measured"] - 1) if check["measured"] else "-"
            row["predicted"][arm] = f"{number(check['predicted'])} ({miss})"
    return [rows[t] for t in sorted(rows)]


def law_rows(arms: dict[str, Any]) -> list[dict[str, Any]]:
    """The fitted parameters of every arm (title -> entry) that has a law, and the two-level noise in percent."""
    rows = []
    for name, entry in arms.items():
        law = law_of(entry) if entry else None
        if entry and law:
            rows.append(
                {
                    "name": name,
                    "values": law.as_dict(),
                    "sigma": percent(entry.get("sigma"), sign=False),
                    "tau": percent(entry.get("tau"), sign=False),
                    "max_error": number(max_error(entry), 2),
                    "converged": percent(entry.get("converged"), sign=False),
                }
            )
    return rows


def choices(arms: dict[str, Any], value: str = "error") -> dict[str, Any]:
    """The exponent under other choices of points: "header" names them, "rows" holds (arm, exponents in that order).

    ``value``: what the fitted numbers are called.
    """
    found: dict[str, dict[str, float | None]] = {}
    for name, entry in arms.items():
        if entry:
            found[name] = {
                **{f"{value} ≤ {cut['max_error']:.4g}": cut["s"] for cut in entry.get("cutoffs") or []},
                **{f"from duration {late['num_dropped'] + 1}": late["s"] for late in entry.get("late") or []},
            }
    header = list(dict.fromkeys(choice for exponents in found.values() for choice in exponents))
    rows = [(name, [exponents.get(choice) for choice in header]) for name, exponents in found.items() if exponents]
    return {"header": header, "rows": rows}


def run_rows(fit: dict[str, Any], runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a run, by shape and seed; the last error is that of its longest evaluation among the fit's points."""
    last: dict[str, dict[str, Any]] = {}
    for point in sorted(fit.get("points", []), key=lambda point: point["t_gflops"]):
        last[point["run_id"]] = point
    rows = []
    for run in sorted(runs, key=lambda run: [*(run.get(arm) or 0 for arm in MIXER_ARMS), run.get("seed") or 0]):
        point = last.get(run["run_id"])
        rows.append(
            {
                "run_id": run["run_id"],
                "shape": shape(run),
                "seed": str(run.get("seed", "-")),
                "params": count(run.get("num_params")),
                "gflops": number(run.get("forward_gflops")),
                "status": str(run.get("status", "-")),
                "reason": run.get("reason") or "",
                "error": number(point["error"]) if point else "-",
                "t": number(point["t_gflops"]) if point else "-",
                "images_per_s": number(run.get("images_per_s"), 4),
                "wall": time(run.get("wall_s")),
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
            why = re.sub(r"^(error|log-perplexity) [\d.e-]+ is", r"\1", re.sub(r" from [\d.e-]+ to [\d.e-]+$", "", why))
            groups.setdefault(why, []).append(point["run_id"])
    rows = []
    for why, runs in sorted(groups.items(), key=lambda item: -len(item[1])):
        names = sorted(set(runs))
        rows.append((why, len(runs), names[0] if len(names) == 1 else f"{len(names)} runs"))
    return rows


def provenance(runs: Sequence[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """What made the runs; more than one value of anything here means that the runs may not be comparable."""
    names = {
        "code": "code_version",
        "lock (SHA-256)": "lock_sha256",
        "data": "data_fingerprint",
        "torch": "torch_version",
    }
    found = [(name, sorted({str(run[key]) for run in runs if run.get(key)})) for name, key in names.items()]
    return [(name, values) for name, values in found if values]


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
    return [(prefix, tree if isinstance(tree, str) else json.dumps(tree, ensure_ascii=False))]


def _parabola(parabola: dict[str, Any] | None) -> str:
    if not parabola:
        return "-"
    lo, hi = parabola.get("lo"), parabola.get("hi")
    return exponent(parabola["slope"]) + (
        f" [{exponent(lo)}, {exponent(hi)}]" if lo is not None and hi is not None else ""
    )


def _within(value: float | None, lo: float | None, hi: float | None) -> bool:
    return value is None or (lo or -math.inf) <= value <= (math.inf if hi is None else hi)
