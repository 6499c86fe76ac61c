"""The sections that every report has, whatever was fitted: runs, what was left out, checklist, how to reproduce it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from sovit.analysis.report import summary
from sovit.analysis.report.checklist import checklist
from sovit.analysis.report.document import (
    Block,
    Bullets,
    Cell,
    Column,
    Commands,
    Paragraph,
    Section,
    bullets,
    pairs,
    section,
    table,
)
from sovit.analysis.report.words import counted, exponent, number, percent, value_of

_NAME = re.compile(r"(?!\.+$)[A-Za-z0-9_.+][A-Za-z0-9_.+-]{0,80}")
_WORD = re.compile(r"[A-Za-z0-9_.+/=:,@%-]{1,200}")  # of a stored command, nothing a shell would read otherwise
_COMMIT = re.compile(r"\+([0-9a-f]{7,40})(\+?)")
DOT, RING, DOWN, DIAMOND, LINE, BAND = "●", "○", "▼", "◇", "━", "▒"  # marks of the legends
_FOLD = 20  # rows from which a table waits behind a click


def against(fit: dict[str, Any], runs: Sequence[dict[str, Any]]) -> Bullets | None:
    """What speaks against the result: warnings first, then failed checks, what was chosen, and what cannot be seen."""
    notes = [Cell(text, tone="doubt") for text in fit.get("warnings") or []]
    notes += [Cell(_sentence(check), tone="doubt") for check in summary.findings(fit) if summary.fails(check)]
    trust = summary.trust(fit, runs)
    simulated = [Cell(text, tone="bad") for text in trust if text == summary.SIMULATED]
    plain = [Cell(text) for text in (*trust, *summary.blind_spots(fit)) if text != summary.SIMULATED]
    return bullets([*simulated, *notes, *plain], "What speaks against it, and what it rests on")


def _sentence(check: dict[str, Any]) -> str:
    said = check.get("sentence") or check.get("text") or check.get("verdict") or "no sentence was recorded"
    return f"{summary.subject(check)}: {said}"


def checks(fit: dict[str, Any]) -> Section:
    """What `sovit check` found, if it was run."""
    columns = (
        Column("check", "check"),
        Column("dimension", "of"),
        Column("verdict", "verdict"),
        Column("p", "p", True),
        Column("sentence", "what was found"),
    )
    rows = []
    for found in summary.findings(fit):
        p = found.get("p")
        untested = str(found.get("verdict", "")).startswith("untested")
        tone = "soft" if untested else "doubt" if summary.fails(found) else "good"
        rows.append(
            (
                str(found.get("check", "-")),
                summary.subject(found),
                Cell(str(found.get("verdict", "-")), tone=tone),
                Cell(_p(p), p if isinstance(p, float | int) else None),
                str(found.get("sentence") or found.get("text") or "-"),
            )
        )
    stored = fit.get("checks")
    document = stored if isinstance(stored, dict) else {}
    chance, remark = document.get("expected_by_chance"), None
    if isinstance(chance, float | int) and rows:
        remark = Paragraph(
            f"{document.get('num_tests', '?')} tests with a p-value, of which about {number(chance, 2)} would look doubtful "
            "by chance alone. A check that sees no sign is a comfort only as far as it has power."
        )
    return section("checks", "The doubts, tested", table("checks", columns, rows, stacks=True), remark)


def _p(p: Any) -> str:
    if not isinstance(p, float | int):
        return "-"
    return "below 0.001" if p < 0.001 else f"{p:.3f}"


def runs_section(fit: dict[str, Any], runs: Sequence[dict[str, Any]]) -> Section:
    columns = (
        Column("run_id", "run"),
        Column("shape", "shape"),
        Column("seed", "seed", True),
        Column("num_params", "parameters", True),
        Column("forward_gflops", "GFLOPs/image", True),
        Column("t_gflops", "t, GFLOPs", True),
        Column("error", f"last {value_of(fit)}", True),
        Column("images_per_s", "images/s", True),
        Column("wall", "wall time", True),
        Column("status", "status"),
    )
    rows = []
    for run in summary.run_rows(fit, runs):
        done = run["status"] == "done"
        status = run["status"] + (f": {run['reason']}" if run["reason"] else "")
        rows.append(
            (
                Cell(run["run_id"], code=True), run["shape"], run["seed"], run["params"], run["gflops"], run["t"],
                run["error"], run["images_per_s"], run["wall"], Cell(status, tone="" if done else "bad"),
            )
        )  # fmt: skip
    caption = (
        "GFLOPs/image: one forward pass, 2 FLOP per multiply-add. t: that times the images seen at the last evaluation; "
        "training costs three times as much."
    )
    folded = counted(len(rows), "run") if len(rows) > _FOLD else ""
    runs_table = table("runs", columns, rows, caption, folded=folded)
    return section("runs", "Runs", runs_table or Paragraph("No records of runs were given."))


def left_out(fit: dict[str, Any]) -> Section:
    """Every point and run that the fit did not use, each with its reason; and, folded, every point."""
    grouped = [
        f"{counted(count, 'point')} of {which}: {why}" if count else why for why, count, which in summary.left_out(fit)
    ]
    runs = [(Cell(run["run_id"], code=True), run["reason"]) for run in fit.get("excluded") or []]
    points = sorted(fit.get("points") or [], key=lambda point: (point["run_id"], point["t_gflops"]))
    columns = (
        Column("run_id", "run"),
        Column("t_gflops", "t, GFLOPs", True),
        Column("error", value_of(fit), True),
        Column("stderr", "± s.e.", True),
        Column("why_not", "why it was left out"),
    )

    def row(point: dict[str, Any]) -> tuple[Cell, ...]:
        used = bool(point["used"])
        return (
            Cell(point["run_id"], code=True),
            Cell(number(point["t_gflops"]), point["t_gflops"]),
            Cell(number(point["error"]), point["error"]),
            Cell(number(point.get("stderr"), 2), point.get("stderr")),
            Cell("used", tone="soft") if used else Cell(point.get("why_not") or "no reason was recorded"),
        )

    unused = [row(point) for point in points if not point["used"]]
    fold = f"{counted(len(unused), 'point')} left out, one by one" if len(unused) > 2 * _FOLD else ""
    return section(
        "left_out",
        "What was left out",
        bullets(grouped) or (None if runs else Paragraph("Nothing.") if points else None),
        table("excluded_runs", (Column("run_id", "run left out as a whole"), Column("reason", "why")), runs),
        table("excluded_points", columns, unused, folded=fold),
        table("points", columns, map(row, points), folded=f"all {counted(len(points), 'point')}"),
    )  # fmt: skip


def checklist_section(fit: dict[str, Any], runs: Sequence[dict[str, Any]]) -> Section:
    items = checklist(fit, runs)
    known = sum(item.is_recorded for item in items)
    rows, before = [], ""
    for item in items:
        group = "" if item.group == before else item.group
        before = item.group
        rows.append((Cell(group, item.group), item.name, Cell(item.answer, tone="" if item.is_recorded else "doubt")))
    columns = (Column("group", "about"), Column("item", "item"), Column("answer", "answer"))
    return section(
        "checklist",
        "The (Mis)Fitting checklist",
        Paragraph(
            "What a report on a scaling law must record (arXiv 2502.18969), filled in from the records and from nothing "
            f"else: {known} of {len(items)} items are answered."
        ),
        table("checklist", columns, rows, stacks=True),
    )


def reproduce(fit: dict[str, Any], runs: Sequence[dict[str, Any]]) -> Section:
    """The commands, what made the runs, and their configuration."""
    made = summary.provenance(runs)
    rows = []
    for name, values in made:
        several = " (not the same for all runs)" if len(values) > 1 else ""
        rows.append((Cell(name), Cell(", ".join(values) + several, tone="bad" if several else "", code=True)))
    config = summary.common_config(runs)
    rows += [(Cell(key, code=True), Cell(value)) for key, value in config["differing"]]
    common = [(Cell(key, code=True), Cell(value, code=True)) for key, value in config["common"]]
    lines, notes = commands(fit, runs)
    blocks: list[Block | None] = [Commands(tuple(lines)) if lines else None, *(Paragraph(note) for note in notes)]
    return section(
        "reproduce",
        "Reproducing it",
        *blocks,
        pairs("provenance", rows, "Keys of the configuration that differ between the runs stand below the versions."),
        pairs("config", common, folded=f"what all runs have in common ({counted(len(common), 'key')})"),
    )


def commands(fit: dict[str, Any], runs: Sequence[dict[str, Any]]) -> tuple[list[str], list[str]]:
    """(lines for a shell, remarks). Only checked names become part of a line; a sweep of another name is NAME."""
    sweeps = [str(name) for name in fit.get("sweeps") or [fit.get("sweep") or ""]]
    safe = [name if _NAME.fullmatch(name) else "NAME" for name in sweeps]
    metric = fit.get("metric") or {}
    dataset = metric.get("dataset") if _NAME.fullmatch(str(metric.get("dataset", ""))) else None
    shots = metric.get("shots")
    notes = [
        f"NAME stands for a name that is not fit for a shell: {name}" for name in sweeps if not _NAME.fullmatch(name)
    ]
    lines = []
    trained = [run for run in runs if run.get("config") and not run.get("simulated")]
    versions = sorted({str(run["code_version"]) for run in trained if run.get("code_version")})
    commits = [match for version in versions if (match := _COMMIT.search(version))]
    if len(versions) == 1 and commits:
        lines.append(f"git checkout {commits[0][1]}")
    elif len(versions) > 1:
        notes.append(f"The runs were made by {len(versions)} versions of the code, listed below.")
    if any(match[2] for match in commits):
        notes.append("The code had changes that no commit holds (+ at the end of its version).")
    if trained:
        lines.append("make setup")
        names = {str(run.get("sweep")) for run in trained}
        seeds = sorted({run["seed"] for run in trained if isinstance(run.get("seed"), int)})
        for name, word in zip(sweeps, safe, strict=True):
            if name in names:
                lines += [
                    f".venv/bin/sovit run sweeps/{word}.yaml" + (f" seed={k}" if seeds != [0] else "") for k in seeds
                ]
    told = shell_line(fit.get("command"))
    if told:
        lines.append(told)
    elif fit["kind"] in ("star", "grid", "diagonal"):
        options = (f" --dataset {dataset}" if dataset else "") + (f" --shots {shots}" if isinstance(shots, int) else "")
        lines.append(f".venv/bin/sovit fit runs/{safe[0]}{options}")
    elif fit["kind"] == "joint":
        lines.append(f".venv/bin/sovit fit {' '.join(f'runs/{name}' for name in safe)} --law flops")
    return lines, notes


def shell_line(told: Any) -> str | None:
    """A stored command as a line for a shell, if it holds nothing that a shell would read otherwise."""
    if isinstance(told, list) and told and all(_WORD.fullmatch(str(word)) for word in told):
        return " ".join(map(str, told))
    return None


def exponent_cell(value: float | None, bold: bool = False) -> Cell:
    return Cell(exponent(value), value, tone="strong big" if bold else "")


def percent_cell(value: float | None, sign: bool = False) -> Cell:
    return Cell(percent(value, sign=sign), value)


def level_legend(levels: Sequence[float]) -> tuple[tuple[str, str], ...]:
    """Class and label of the mark of every compute, by `drawing.ramp`."""
    from sovit.analysis.report.drawing import ramp

    marks = [(name, f"{DOT} {number(level)}") for level, name in ramp(levels).items()]
    return (("soft", "t in GFLOPs:"), *marks)


def minimum_cells(minimum: dict[str, Any]) -> tuple[Cell, ...]:
    return (
        Cell(number(minimum["t_gflops"]), minimum["t_gflops"]),
        Cell(f"{minimum['x']:,.4g}", minimum["x"]),
        Cell(number(minimum["error"]), minimum["error"]),
        Cell("yes", True) if minimum["interior"] else Cell("no, at an edge", False, "doubt"),
        Cell(number(minimum.get("parabola_x")), minimum.get("parabola_x")),
        Cell(number(minimum.get("law_x")), minimum.get("law_x")),
    )


def fitted(arms: dict[str, dict[str, Any]], fit: dict[str, Any]) -> Section:
    """Parameters, noise, other choices of points and remarks, for everything that has the parts of an arm."""
    laws = summary.law_rows(arms)
    blocks: list[Block | None] = []
    if laws:
        columns = (
            Column("dimension", "dimension"),
            *(Column(key, key, True) for key in laws[0]["values"]),
            Column("sigma", "noise of a point", True),
            Column("tau", "of a run", True),
            Column("cutoff", "cut-off", True),
            Column("converged", "starts that agree", True),
        )
        rows = [
            (
                row["name"],
                *(Cell(f"{value:.3g}", value) for value in row["values"].values()),
                row["sigma"],
                row["tau"],
                row["max_error"],
                row["converged"],
            )
            for row in laws
        ]
        caption = (
            "f(x, t) = alpha x^-a + (beta x^b + xi) t^-c + eps, s = c / (a + b); x as counted, t in GFLOPs. Read s, not the "
            "parameters: they are known far less well, and trade against each other."
        )
        blocks.append(table("laws", columns, rows, caption))
    others = summary.choices(arms, value_of(fit))
    if others["rows"]:
        columns = (Column("dimension", "s when fitted to"), *(Column(name, name, True) for name in others["header"]))
        choice_rows = [(name, *(exponent_cell(s) for s in values)) for name, values in others["rows"]]
        caption = (
            "What other choices of the points would have given: another largest value, or the headline's points without "
            "the earliest durations."
        )
        blocks.append(table("choices", columns, choice_rows, caption))
    for name, entry in arms.items():
        if entry.get("num_points") is None:
            continue
        row = summary.arm_row(entry)
        said = f"{name}: {counted(row['num_points'], 'point')} of {counted(row['num_runs'], 'run')}"
        if row["identified"]:
            said += f"; interval by {row['method']}; jackknife over runs {row['jackknife']}"
        blocks.append(Paragraph("; ".join([said, *row["flags"]]) + ".", tone="small"))
    seeds = summary.by_seed(fit)
    blocks.append(Paragraph(f"s from one seed alone: {seeds}.", tone="small") if seeds else None)
    return section("fitted", "How it was fitted", *blocks)


def endings(fit: dict[str, Any], runs: Sequence[dict[str, Any]]) -> list[Section]:
    """What stands at the end of every report: runs, what was left out, the checklist, the commands."""
    return [
        runs_section(fit, runs),
        left_out(fit),
        checklist_section(fit, runs),
        reproduce(fit, runs),
    ]
