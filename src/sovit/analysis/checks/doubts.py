"""What could be wrong with a sweep's answer: every check of `sovit check`, as one JSON-ready dict and as text.

The paper (SoViT, arXiv 2305.13035) leaves open whether each arm is quasiconvex, what the choice of the star's center
does, whether exponents are the same for other metrics and data sets, how well the law extrapolates, and whether another
law would do as well. Each check here has a p-value or an interval with the run as the unit of noise, and says how large
an effect it would have seen: silence of a test without power is no comfort. How often each one alarms for nothing, and
how often it sees an effect, is measured in ``benchmarks/power.md``.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from sovit.analysis import diagnostics
from sovit.analysis.checks.heldout import HeldOut, held_out, held_out_rows
from sovit.analysis.checks.heterogeneity import Forest, across_metrics
from sovit.analysis.checks.quasiconvexity import Bump, grid_bumps, star_bumps
from sovit.analysis.checks.rivals import EQ2, Rival, compare
from sovit.analysis.checks.stability import Change, Influence, influence, nearest_sizes, two_stars, without_center
from sovit.analysis.intervals import RunFit, fit_with_runs
from sovit.analysis.points import DIMENSIONS, AnyDimensions, Dimensions, HasShape, Point, dimensions, plain
from sovit.analysis.scale import ERROR, Scale
from sovit.analysis.star import find_center
from sovit.metric import LOG_PERPLEXITY, MULTITASK, Metric, kind_of, label

SCHEMA = 1
ALPHA = 0.05
QUIET, DOUBT, UNTESTED = "no sign", "doubt", "untested"
COLUMNS = 110


@dataclass(frozen=True)
class Finding:
    """A row of the table. ``verdict``: no sign of the trouble, doubt (p at most 5%), or untested; ``statistic`` in words;
    ``p`` None where an interval or nothing stands in its place; ``text``: one sentence."""

    check: str
    subject: str
    verdict: str
    statistic: str
    p: float | None
    text: str


def star_arms(points: Sequence[Point], center: HasShape | None = None, scale: Scale = ERROR) -> dict[str, list[Point]]:
    """The points of each arm that a star's headline fit uses: the center held out, nothing above the cut-off.

    Raises ValueError if the points are no star.
    """
    middle = dimensions(center) if center is not None else find_center(points)
    reasons = diagnostics.unusable(points, scale)
    arms: dict[str, list[Point]] = {name: [] for name in middle._fields}
    for point in points:
        different = dimensions(point).differs(middle)
        if len(different) > 1:
            raise ValueError(f"{dimensions(point)} is not on an arm around {middle}; check the points of one star.")
        if different and (point.run_id, point.duration) not in reasons and point.error <= scale.headline:
            arms[different[0]].append(point)
    return {name: group for name, group in arms.items() if group}


def check_star(
    points: Sequence[Point],
    center: HasShape | None = None,
    *,
    metric: Metric = ("", 0),
    by_metric: Mapping[Metric, Sequence[Point]] | None = None,
    others: Mapping[str, Sequence[Point]] | None = None,
    scales: Mapping[Metric, Scale] | None = None,
    draws: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Every check of a star, JSON-ready: {"schema", "kind", "rows", "num_tests", "num_doubts", ...details by arm}.

    ``metric``: data set and shots of ``points``; ``by_metric``: the same runs by other metrics (that of ``points`` may be
    among them); ``others``: points of other stars, by name; ``scales``: of metrics that are no errors.
    ``draws``: sweeps simulated for a p-value. Raises ValueError if the points are no star.
    """
    middle = dimensions(center) if center is not None else find_center(points)
    scales = scales or {}
    scale = scales.get(metric, ERROR)
    arms = star_arms(points, middle, scale)
    fits = {name: _fit(name, group) for name, group in arms.items()}
    fewer = max(1, draws * 2 // 5)
    rows: list[Finding] = []
    details: dict[str, Any] = {}

    def add(check: str, found: Mapping[str, Any], row: Callable[[str, Any], list[Finding]]) -> None:
        details[check] = found
        for name, one in found.items():
            rows.extend([_untested(check, name, one)] if isinstance(one, str) else row(name, one))

    def each(one: Callable[[str, list[Point], RunFit], Any]) -> dict[str, Any]:
        return {name: fit if isinstance(fit, str) else one(name, arms[name], fit) for name, fit in fits.items()}

    add("quasiconvex", star_bumps(arms, draws=draws, seed=seed), _quasiconvex)
    add("center", each(partial(_without_center, middle=middle, draws=draws, seed=seed)), _center)
    for other, theirs in (others or {}).items():
        their_arms = star_arms(theirs, _center_of(theirs, middle), scale)
        add(f"star {other}", each(partial(_other_star, arms=their_arms)), partial(_star, other))
    for what, labels in _metric_groups(metric, by_metric or {}).items():
        chosen = {label: ((by_metric or {})[key], scales.get(key, ERROR)) for label, key in labels.items()}
        add(what, each(partial(_across, by_metric=chosen, draws=draws, seed=seed)), partial(_metrics, what))
    add("held out", each(lambda name, group, _: held_out(group, name, draws=fewer, seed=seed)), _held_out)
    details["held out, by share"] = each(
        lambda name, group, _: held_out_rows(group, name, draws=max(1, fewer // 2), seed=seed)
    )
    add("influence", each(partial(influence, draws=fewer, seed=seed)), _influence)
    add("laws", each(compare), _rivals)
    return _result("star", rows, details)


def check_grid(points: Sequence[Point], *, scale: Scale = ERROR, draws: int = 400, seed: int = 0) -> dict[str, Any]:
    """The check a grid allows, quasiconvexity of pairs of dimensions; as `check_star`."""
    reasons = diagnostics.unusable(points, scale)
    used = [
        point for point in points if (point.run_id, point.duration) not in reasons and point.error <= scale.headline
    ]
    bumps = grid_bumps(used, draws=draws, seed=seed)
    rows: list[Finding] = []
    for name, found in bumps.items():
        rows += [_untested("quasiconvex", name, found)] if isinstance(found, str) else _quasiconvex(name, found)
    return _result("grid", rows, {"quasiconvex": bumps})


def _result(sweep_kind: str, rows: Sequence[Finding], details: Mapping[str, Any]) -> dict[str, Any]:
    tested = [row for row in rows if row.p is not None]
    return plain(
        {
            "schema": SCHEMA,
            "kind": "checks",
            "of": sweep_kind,
            "rows": rows,
            "num_tests": len(tested),
            "num_doubts": sum(row.verdict == DOUBT for row in rows),
            "expected_by_chance": ALPHA * len(tested),
            "smallest_p_of_all": min(
                1.0, len(tested) * min((row.p for row in tested if row.p is not None), default=1.0)
            ),
            "details": details,
        }
    )


def _fit(name: str, points: Sequence[Point]) -> RunFit | str:
    return diagnostics.too_few(name, points) or fit_with_runs(*diagnostics.vectors(name, points))


def _without_center(
    name: str, group: Sequence[Point], fit: RunFit, *, middle: HasShape, draws: int, seed: int
) -> Change | str:
    found = without_center(name, group, middle, fit, draws=draws, seed=seed)
    sizes = " and ".join(map(str, nearest_sizes(name, group, middle)))
    return f"without {name} {sizes}, next to the center: {found}" if isinstance(found, str) else found


def _across(
    name: str,
    group: Sequence[Point],
    _: RunFit,
    *,
    by_metric: Mapping[str, tuple[Sequence[Point], Scale]],
    draws: int,
    seed: int,
) -> Forest | str:
    same = {label: _same(group, points, scale) for label, (points, scale) in by_metric.items()}
    return across_metrics(name, same, draws=draws, seed=seed)


def _center_of(points: Sequence[Point], ours: AnyDimensions) -> AnyDimensions:
    """A star's own center; ours where its shapes, such as a single arm, are a star around that too."""
    try:
        return find_center(points)
    except ValueError:
        if any(len(dimensions(point).differs(ours)) > 1 for point in points):
            raise
        return ours


def _other_star(name: str, _: Sequence[Point], fit: RunFit, *, arms: Mapping[str, Sequence[Point]]) -> Change | str:
    if name not in arms:
        return f"the other star has no {name} arm"
    theirs = _fit(name, arms[name])
    return theirs if isinstance(theirs, str) else two_stars(fit, theirs)


def _metric_groups(metric: Metric, known: Mapping[Metric, Any]) -> dict[str, dict[str, Metric]]:
    """What is compared -> label -> metric: the shots of the headline's data set, and data sets at its shots; beside an
    error the multitask decoder's log-perplexity, and of that its tasks."""
    dataset, shots = metric
    if kind_of(*metric) == LOG_PERPLEXITY:
        tasks = {key[0].partition(".")[2]: key for key in sorted(known) if kind_of(*key) == LOG_PERPLEXITY}
        return {"tasks": {task: key for task, key in tasks.items() if task}} if len(tasks) > 2 else {}
    errors = [key for key in sorted(known) if kind_of(*key) != LOG_PERPLEXITY]
    groups = {
        "shots": {f"{key[1]}-shot": key for key in errors if key[0] == dataset},
        "data sets": {key[0]: key for key in errors if key[1] == shots},
        "domains": {label(*key): key for key in (metric, (MULTITASK, 0)) if key in known},
    }
    return {what: labels for what, labels in groups.items() if len(labels) > 1}


def _same(group: Sequence[Point], points: Sequence[Point], scale: Scale = ERROR) -> list[Point]:
    """The runs and durations of a group by another metric, as far as that can be fitted."""
    keys, reasons = {(point.run_id, point.duration) for point in group}, diagnostics.unusable(points, scale)
    return [point for point in points if (point.run_id, point.duration) in keys - set(reasons)]


# Each check's row. The words say what was seen and what would have been.


def _untested(check: str, subject: str, why: str) -> Finding:
    return Finding(check, subject, UNTESTED, "", None, f"{why[:1].upper()}{why[1:]}.")


def _verdict(p: float) -> str:
    return DOUBT if p <= ALPHA else QUIET


def _quasiconvex(name: str, found: Bump) -> list[Finding]:
    place = _where(name, found.detectable_at)
    power = (
        f"a bump of {_percent(found.detectable)} at {place} would be seen four times in five, elsewhere it takes more"
        if found.detectable < 0.5
        else "so few runs would hardly show any bump"
    )
    if found.at is None or found.t is None:
        quiet = "no shape lies above others around it" if " x " in name else "no size lies above others on both sides"
        text = f"At equal compute {quiet}; {power}."
        return [Finding("quasiconvex", name, QUIET, "no bump", found.p, text)]
    where = _where(name, found.at)
    statistic = f"bump {_percent(found.height)} at {where}, t {found.t:.1f}"
    if found.p <= ALPHA:
        text = f"{where} lies {_percent(found.height)} above others around it, more than the luck of runs explains."
    else:
        text = f"The highest bump is what the luck of runs makes; {power}."
    return [Finding("quasiconvex", name, _verdict(found.p), statistic, found.p, text)]


def _where(name: str, at: tuple[int, ...]) -> str:
    return f"{name} {at[0]}" if len(at) == 1 else "x".join(str(size) for size in _shape(name, at))


def _shape(name: str, at: tuple[int, ...]) -> Dimensions:
    pair = name.split(" x ")
    third = [dimension for dimension in DIMENSIONS if dimension not in pair]
    return Dimensions(**dict(zip([*pair, *third], at, strict=True)))


def _center(name: str, found: Change) -> list[Finding]:
    sizes = " and ".join(map(str, found.left_out))
    changed = f"Without {name} {sizes}, next to the center, s is {found.other:.2g} instead of {found.s:.2g}"
    statistic = f"s {found.s:.2f} -> {found.other:.2f}"
    return [Finding("center", name, _verdict(found.p), statistic, found.p, f"{changed}: {_explained(found)}.")]


def _star(other: str, name: str, found: Change) -> list[Finding]:
    statistic = f"s {found.s:.2f} and {found.other:.2f}"
    text = f"The log exponents differ by {abs(found.log_ratio):.2g} ± {found.log_se:.2g}: {_explained(found)}."
    return [Finding(f"star {other}", name, _verdict(found.p), statistic, found.p, text)]


def _explained(found: Change) -> str:
    if found.p <= ALPHA:
        return "more than noise explains"
    return f"no more than noise explains; a factor of {found.detectable:.2g} would be seen four times in five"


def _metrics(what: str, name: str, found: Forest) -> list[Finding]:
    estimates = [row["estimate"] for row in found.rows]
    seen = (
        "differ by more than noise explains"
        if found.p <= ALPHA
        else f"agree within the noise they share; one off by a factor of {found.detectable:.2g} would be seen four times in "
        "five"
    )
    text = (
        f"Exponents of {len(estimates)} {what} run from {min(estimates):.2g} to {max(estimates):.2g} and {seen} "
        f"(covariance by a joint jackknife over {found.num_runs} runs)."
    )
    if found.left_out:
        text += " Left out: " + "; ".join(f"{label}, {why}" for label, why in found.left_out) + "."
    statistic = f"Q {found.q:.1f}, expected {found.expected:.1f}; I2 {found.i2:.0%}"
    return [Finding(what, name, _verdict(found.p), statistic, found.p, text)]


def _held_out(name: str, found: HeldOut) -> list[Finding]:
    statistic = f"{found.signed:+.1%}, z {found.z:+.1f}; {found.covered} of {found.num_cells} covered"
    text = (
        f"Fitted up to {found.fitted_up_to:.3g} GFLOPs, the law is {found.signed:+.1%} off on average at "
        f"{_budgets(found)} (x{found.factor:.2g}); {_percent(found.detectable)} would be seen four times in five."
    )
    rows = [Finding("held out", name, _verdict(found.p), statistic, found.p, text)]
    if found.optimum is not None and found.optimum_after is not None and found.regret is not None:
        interval = "open" if found.optimum_lo is None or found.optimum_hi is None else _interval(found)
        parabola = f", by a parabola there {found.optimum_slice:.3g}" if found.optimum_slice else ""
        text = (
            f"The best {name} at {found.t_gflops:.3g} GFLOPs was predicted as {found.optimum:.3g} {interval} and is "
            f"{found.optimum_after:.3g} with all points{parabola}; the prediction costs {found.regret:.2%} in error."
        )
        verdict = UNTESTED if found.optimum_p is None else _verdict(found.optimum_p)
        best = f"best {found.optimum:.3g} -> {found.optimum_after:.3g}"
        rows.append(Finding("held-out best", name, verdict, best, found.optimum_p, text))
    return rows


def _budgets(found: HeldOut) -> str:
    return f"{found.t_gflops:.3g} GFLOPs" if found.num_held == 1 else f"the {found.num_held} largest budgets"


def _interval(found: HeldOut) -> str:
    return f"[{found.optimum_lo:.3g}, {found.optimum_hi:.3g}]"


def _influence(name: str, found: Influence) -> list[Finding]:
    text = f"Without {found.run_id}, s would be {found.s_without:.2g} instead of {found.s:.2g}, the most of any run; "
    text += (
        f"its errors lie {abs(found.t):.2g} standard errors {'above' if found.t > 0 else 'below'} what the others predict."
        if found.p <= ALPHA
        else "its errors are where the others predict them, so it weighs much by its place alone."
        if abs(found.dfbeta) > 1
        else "its errors are where the others predict them."
    )
    statistic = f"s {found.s:.2f} -> {found.s_without:.2f}, {found.dfbeta:+.1f} se"
    return [Finding("influence", name, _verdict(found.p), statistic, found.p, text)]


def _rivals(name: str, found: Sequence[Rival]) -> list[Finding]:
    rows = []
    for what, pick in (("budgets", lambda rival: rival.budgets), ("sizes", lambda rival: rival.sizes)):
        scores = {rival.name: pick(rival) for rival in found}
        ours = scores.pop(EQ2)
        best = min(scores, key=lambda rival: scores[rival].off)
        better = [rival for rival, score in scores.items() if score.verdict == "better"]
        worse = [rival for rival, score in scores.items() if score.verdict == "worse"]
        text = "Predicting larger budgets: " if what == "budgets" else "Predicting a size left out: "
        if better:
            text += f"{_list(better)} {'is' if len(better) == 1 else 'are'} better than {EQ2} beyond the noise"
        else:
            text += f"no other law is better than {EQ2} beyond the noise"
        text += f"; worse: {_list(worse)}." if worse else "; none is worse either."
        score = scores[best]
        between = "open" if score.hi - score.lo > 1 else f"[{score.lo:+.1%}, {score.hi:+.1%}]"
        statistic = f"{EQ2} off {ours.off:.1%}; {best} {score.off:.1%}, difference {between}"
        rows.append(Finding(f"laws: {what}", name, DOUBT if better else QUIET, statistic, None, text))
    return rows


def _list(names: Sequence[str]) -> str:
    return ", ".join(names)


def _percent(share: float) -> str:
    return f"{share:.1%}" if share < 0.1 else f"{share:.0%}"


def text(result: Mapping[str, Any]) -> str:
    """The table for a terminal: a line for each row, its sentence below."""
    rows = result["rows"]
    head = ("check", "arm" if result["of"] == "star" else "pair", "verdict", "p", "statistic")
    cells = [(r["check"], r["subject"], r["verdict"], _p(r["p"]), r["statistic"]) for r in rows]
    widths = [max(len(row[column]) for row in (head, *cells)) for column in range(4)]
    lines = []
    for number, cell in enumerate((head, *cells)):
        line = "  ".join(part.ljust(width) for part, width in zip(cell, (*widths, 0), strict=True))
        lines.append(_printable(line).rstrip())
        if number:
            sentence = _printable(rows[number - 1]["text"])
            lines += textwrap.wrap(sentence, COLUMNS, initial_indent="    ", subsequent_indent="    ")
    lines += ["", *textwrap.wrap(_summary(result), COLUMNS)]
    return "\n".join(lines)


def _summary(result: Mapping[str, Any]) -> str:
    if not result["num_tests"]:
        return "Nothing could be tested."
    doubts = [f"{row['check']} ({row['subject']})" for row in result["rows"] if row["verdict"] == DOUBT]
    return _printable(
        f"In doubt: {', '.join(doubts) or 'nothing'}. Of {result['num_tests']} tests at 5%, about "
        f"{result['expected_by_chance']:.1f} would speak up by chance alone; corrected for their number (Bonferroni) the "
        f"smallest p is {_p(result['smallest_p_of_all'])}. No test here sees a learning rate that suits one end of an arm "
        "better than the other."
    )


def _p(p: float | None) -> str:
    return "" if p is None else "<.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def _printable(line: str) -> str:
    """A line without characters that could drive a terminal (records are untrusted)."""
    return "".join(character if character.isprintable() else "?" for character in line)
