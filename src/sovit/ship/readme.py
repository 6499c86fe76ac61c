"""A shape card for a reader: ``README.md`` with the front matter that the Hub reads.

Text from users and data is shown with its hidden characters visible and every mark of Markdown, HTML or a link escaped; the
front matter is YAML as PyYAML writes it. Nothing is computed here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from sovit.analysis.report.page import escape_markdown
from sovit.analysis.report.words import exponent, listed, number, visible
from sovit.ship.card import UNKNOWN

LICENCES = (  # what the Hub knows by name; any other is "other" with a name of its own
    "apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0",
    "cc-by-nc-sa-4.0", "gpl-3.0", "agpl-3.0", "lgpl-3.0", "mpl-2.0", "openrail", "unlicense", UNKNOWN,
)  # fmt: skip
SHOWN = 20  # class names; card.json has them all


def text(
    card: Mapping[str, Any], *, library: str, task: str, code: Sequence[str], notes: Sequence[str], checked: str
) -> str:
    """The whole file. ``code``: Python that loads the model; ``notes`` and ``checked`` are sentences about this format."""
    parts = [
        f"---\n{_front(card, library, task)}---",
        f"# {safe(card['name'])}",
        _first_sentence(card),
        "## Load it",
        _fenced(code, "python"),
        "\n".join(f"- {escape_markdown(visible(line))}" for line in [*notes, checked]),
        _pixels(card),
        "## Shape",
        _shape(card),
        "## Compute",
        _compute(card),
        "## Why this shape",
        *_choice(card["choice"]),
        "## How good it is",
        *_evaluations(card),
        "## Where it comes from",
        _origin(card),
        "`card.json` holds all of this, and more digits, for programs.",
    ]
    return "\n\n".join(parts) + "\n"


def safe(value: Any) -> str:
    """Any value as one line of plain Markdown text."""
    return escape_markdown(visible(str(value)))


def _front(card: Mapping[str, Any], library: str, task: str) -> str:
    licence = visible(card["licence"])
    front: dict[str, Any] = {"license": licence.lower() if licence.lower() in LICENCES else "other"}
    if front["license"] == "other":
        front["license_name"] = licence
    front |= {"library_name": library, "pipeline_tag": task, "tags": ["sovit", "vision-transformer", task]}
    return yaml.safe_dump(front, sort_keys=False, allow_unicode=True, width=10_000)


def _first_sentence(card: Mapping[str, Any]) -> str:
    shape, compute = card["shape"], card["compute"]
    sizes = "x".join(str(shape[key]) for key in ("width", "depth", "token_dim", "mlp_dim") if key in shape)
    title = {"vit": "vision transformer", "mixer": "MLP-Mixer", "swin": "Swin transformer"}[card["family"]]
    licence = f"{safe(card['licence'])}."
    if card["licence"] == UNKNOWN:
        licence = "unknown; nobody has said under which terms it may be used."
    return (
        f"A {title} of shape {sizes} with {card['num_params']:,} parameters, trained on {compute['images_seen']:,} images "
        f"of {safe(card['training']['data'])} by sovit. Licence: {licence}"
    )


def _pixels(card: Mapping[str, Any]) -> str:
    pixels, classes = card["pixels"], card["classes"]
    size = pixels["image_size"]
    lines = [
        f"Pixels: {_channels(pixels['channels'])}, {size} x {size}, in [-1, 1], which is (byte / 255 - 0.5) / 0.5. "
        f"Photographs: short side to {pixels['resize_short_side']} (bilinear, antialiased), then the central "
        f"{size} x {size}.",
        "",
        f"Classes: {classes['num']:,}" + (f"; {classes['why']}." if classes["why"] else "."),
    ]
    names = classes["names"] or []
    if names:
        more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
        lines[-1] = f"Classes: {len(names):,}: {', '.join(safe(name) for name in names[:SHOWN])}{more}."
    return "\n".join(lines)


def _channels(num: int) -> str:
    return {1: "grey, one channel", 3: "RGB"}.get(num, f"{num} channels")


def _shape(card: Mapping[str, Any]) -> str:
    rows = [
        (name.replace("_", " "), f"{value:,}") for name, value in card["shape"].items() if not isinstance(value, str)
    ]
    rows += [(name.replace("_", " "), _plain(value)) for name, value in {**card["geometry"], **card["options"]}.items()]
    rows += [("parameters", f"{card['num_params']:,}"), ("forward GFLOPs per image", f"{card['forward_gflops']:.6g}")]
    return _table(("", ""), rows)


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:,}" if isinstance(value, int) else safe(value)


def _compute(card: Mapping[str, Any]) -> str:
    compute = card["compute"]
    return (
        f"t = {compute['t_gflops']:,.6g} GFLOPs: {card['forward_gflops']:.6g} GFLOPs x {compute['images_seen']:,} images, "
        f"in {compute['step']:,} steps; the {compute['weights']} weights. Training took 3 t = "
        f"{compute['train_gflops']:,.6g} GFLOPs. Convention: {compute['convention']}."
    )


def _choice(choice: Mapping[str, Any] | None) -> list[str]:
    prediction, fits = (choice or {}).get("prediction"), (choice or {}).get("fits") or []
    parts = [*([_prediction(prediction)] if prediction else []), *(part for fit in fits for part in _fit(fit))]
    parts = parts or ["No fit and no prediction were given, so this card does not say why the model has this shape."]
    unread = (choice or {}).get("unread") or []
    return [*parts, *([f"Beside the run, but not used: {safe(' '.join(unread))}"] if unread else [])]


def _prediction(found: Mapping[str, Any]) -> str:
    """The rule, the region and the extrapolation of a prediction, and which of its candidates this is."""
    candidate, region = found["candidate"], found["region"]
    which = f"candidate {candidate['place']} of {found['candidates']}" if candidate else "none of the candidates"
    target = f"{found['t_gflops']:,.4g} GFLOPs" if found["t_gflops"] else "its budget"
    lines = [f"A prediction for {target} (rule: {safe(found['rule'])}); this shape is {which}.", ""]
    rows = []
    for name, one in found["exponents"].items():
        box = region["box"][name] if region else {}
        interval = (
            _interval(one) if one["lo"] != one["hi"] else f"{exponent(one['estimate'])}, given without an interval"
        )
        best = f"{found['optimum'][name]:,.1f}"
        rows.append((safe(name), interval, best, _span(box) if region else "-", safe(one["source"])))
    level = f"{region['level']:.0%} region, all at once" if region else "region"
    lines.append(_table(("", "exponent [interval]", "best, unrounded", level, "from"), rows))
    far = found["extrapolation"]
    if far:
        lines += ["", f"Its budget is {far['factor']:,.3g} times the largest compute measured in {safe(far['fit'])}."]
    if candidate and candidate["regret"] is not None:
        lines += [
            "",
            f"Share of the compute wasted by rounding: {100 * candidate['regret']:.2g}%, {safe(found['regret_by'])}.",
        ]
    notes = [*(found["notes"] or []), *(f"held out: {row}" for row in found["held_out"] or [])]
    return "\n".join([*lines, *([""] if notes else []), *(f"- {safe(note)}" for note in notes)])


def _fit(found: Mapping[str, Any]) -> list[str]:
    """The exponents or the origin that a fit measured."""
    sweeps = listed([safe(sweep) for sweep in found["sweeps"]])
    metric = f"{found['metric'].get('shots')}-shot error on {safe(found['metric'].get('dataset'))}"
    level = f"; intervals at {found['level']:.0%}" if found["level"] else ""
    own = (
        "" if found["named"] else "This run belongs to the sweep of the following fit, which did not choose its shape. "
    )
    parts = [f"{own}The {found['kind']} fit of {sweeps} ({metric}){level}:"]
    if "exponents" in found:
        rows = [
            (safe(name), _interval(one) if one["identified"] else f"not identified: {safe(one.get('why') or '')}")
            for name, one in found["exponents"].items()
        ]
        parts.append(_table(("", "the best size grows as t^"), rows))
    elif "step" in found:
        parts.append(f"The step along the diagonal: {_interval(found['step']) if found['step'] else 'not identified'}.")
    elif found["origin"]:
        origin = found["origin"]
        sizes = "x".join(f"{origin[name]:g}" for name in ("width", "depth", "mlp_dim"))
        share = f", elected by {origin['share']:.0%} of the draws" if origin.get("share") is not None else ""
        parts.append(f"Origin: {sizes}, best at {origin['t0_gflops']:,.4g} GFLOPs{share}.")
    else:
        parts.append(f"No origin was identified: {safe(found['why'] or 'no reason was recorded')}.")
    if found["warnings"]:
        parts.append("\n".join(f"- {safe(line)}" for line in found["warnings"]))
    return parts


def _evaluations(card: Mapping[str, Any]) -> list[str]:
    found = card["evaluations"]
    parts = []
    if found["fewshot"]:
        rows = [
            (
                safe(row["dataset"]), str(row["shots"]), f"{row['error']:.4f} ± {row['stderr']:.4f}",
                number(row["chance"]), number(row["pixels"]), str(row["num_draws"]),
            )
            for row in found["fewshot"]
        ]  # fmt: skip
        head = ("data set", "shots", "error ± standard error", "chance", "ridge on pixels", "draws of the support")
        parts += [f"Few-shot error (1 - accuracy) of the {found['weights']} weights after {found['step']:,} steps:"]
        parts += [_table(head, rows)]
    if found["note"]:
        parts.append(f"{found['note'][0].upper()}{found['note'][1:]}.")
    for one in found["downstream"]:
        how = [f"{key}={value}" for key, value in one["config"].items() if key != "name" and value is not None]
        parts.append(f"`sovit eval` task {safe(one['task'])} ({safe(', '.join(how))}):")
        parts.append(_fenced(one["lines"] or _scalars(one["result"]), "text"))
    return parts


def _scalars(tree: Any, at: str = "") -> list[str]:
    """Every number and word of a result with its place, for a task that does not say its result in words."""
    if isinstance(tree, Mapping):
        return [line for key, value in tree.items() for line in _scalars(value, f"{at}.{key}" if at else str(key))]
    if isinstance(tree, list):
        return [f"{at}: {len(tree)} entries"]
    return [f"{at}: {f'{tree:.6g}' if isinstance(tree, float) else tree}"]


def _origin(card: Mapping[str, Any]) -> str:
    training, code = card["training"], card["code"]
    commit = safe(code["commit"]) if code["commit"] else "unknown"
    dirty = " with uncommitted changes" if code["uncommitted"] else ""
    rows = [
        ("data", f"{safe(training['data'])} ({safe(training['kind'])})"),
        ("data fingerprint", safe(training["fingerprint"] or "unknown")),
        ("run", f"{safe(card['name'])}, seed {training['seed']}, {safe(training['status'] or 'status unknown')}"),
        ("configuration hash", safe(training["config_hash"] or "unknown")),
        ("commit of sovit", f"{commit}{dirty}"),
        ("torch", safe(code["torch"] or "unknown")),
        ("lock file, SHA-256", safe(code["lock_sha256"] or "unknown")),
    ]
    return _table(("", ""), rows)


def _interval(found: Mapping[str, Any]) -> str:
    """0.38 [0.26, 0.55]; a side that the data leave open says so."""
    return f"{exponent(found['estimate'])} [{_end(found['lo'])}, {_end(found['hi'])}]"


def _end(value: float | None) -> str:
    return exponent(value) if value else "open"


def _span(box: Mapping[str, Any]) -> str:
    ends = [f"{box[end]:,.1f}" if box[end] else "open" for end in ("lo", "hi")]
    return " to ".join(ends)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _fenced(lines: Sequence[str], kind: str) -> str:
    """A block of code whose fence is longer than any run of backticks in it."""
    body = "\n".join(visible(line) for line in lines)
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", body)), default=0))
    return f"{fence}{kind}\n{body}\n{fence}"
