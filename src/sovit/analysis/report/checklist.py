"""What a report on a scaling law must record, filled in from the records (the (Mis)Fitting checklist, arXiv 2502.18969).

Every item is answered from fit.json and the runs' records or says that it was not recorded. Records may be older than
this version or come from elsewhere, so what the package does today fills no gap; only the embedded images, whose name
says how they are made, are known without being recorded.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sovit.analysis.report.summary import baselines_in_words, left_out
from sovit.analysis.report.words import arms_of_star, counted, interval, number, percent, value_of

NOT_RECORDED = "not recorded"


@dataclass(frozen=True)
class Item:
    """One line of the checklist; ``answer`` is `NOT_RECORDED` where the records cannot say."""

    group: str
    name: str
    answer: str

    @property
    def is_recorded(self) -> bool:
        return self.answer != NOT_RECORDED


def checklist(fit: dict[str, Any], runs: Sequence[dict[str, Any]]) -> tuple[Item, ...]:
    """The whole list for a fit's dict and its runs' records (`report.read_runs`)."""
    groups = {
        "Fit": _fit(fit),
        "Points": _points(fit, runs),
        "Training": _training(runs),
        "Metric": _metric(fit, runs),
        "Uncertainty": _uncertainty(fit),
        "Forecast": _forecast(fit),
    }
    return tuple(
        Item(group, name, answer or NOT_RECORDED) for group, items in groups.items() for name, answer in items.items()
    )


def arms_of(fit: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Title -> entry of everything in a fit that has the parts of an arm: the arms of a star, the line of a diagonal."""
    if fit["kind"] == "diagonal":
        return {"G": fit["arm"]} if fit.get("arm") else {}
    return {name: fit["arms"][arm] for arm, name in arms_of_star(fit).items() if (fit.get("arms") or {}).get(arm)}


def _fit(fit: dict[str, Any]) -> dict[str, str | None]:
    if fit["kind"] == "grid":
        none = "does not apply: no law is fitted, the best shape is read off the grid"
        names = ("law", "transforms", "bounds", "shared parameters", "loss and reduction", "weights", "optimiser")
        return dict.fromkeys((*names, "tolerances", "starts", "converged", "spread of the best objectives"), none)
    said = fit.get("fit") or {}
    loss = [said[key] for key in ("loss", "reduction") if said.get(key)]
    arms = arms_of(fit)
    flags = [f"{name}: {', '.join(entry['flags'])}" for name, entry in arms.items() if entry.get("flags")]
    if fit.get("flags"):
        flags.append(", ".join(fit["flags"]))
    return {
        "law": said.get("law") or _law(fit),
        "transforms": said.get("transform"),
        "bounds": _words(said.get("bounds")),
        "on a bound": "; ".join(flags) or ("none" if arms or "flags" in fit else None),
        "shared parameters": said.get("shared_parameters") or ("all, one law" if fit["kind"] == "joint" else None),
        "loss and reduction": f"{loss[0]}; {loss[1]}" if len(loss) == 2 else (loss[0] if loss else None),
        "weights": said.get("weights"),
        "optimiser": said.get("optimiser"),
        "tolerances": said.get("tolerance"),
        "starts": said.get("starts"),
        "converged": _each(arms, "converged", lambda value: f"{percent(value, sign=False)} of the starts agree"),
        "spread of the best objectives": _each(arms, "spread", lambda value: f"{value:.2g}"),
        "largest error fitted": _words(said.get("headline_cutoff")),
    }


def _law(fit: dict[str, Any]) -> str | None:
    """The law where a fit names its kind only."""
    if fit["kind"] == "joint":
        return "f(x, n) = sum over k of alpha_k x_k^-a_k, + beta n^-c + eps, n = t / F(x) images seen"
    if fit["kind"] == "diagonal" and fit.get("law"):
        return "f(G, t) = alpha G^-a + (beta G^b + xi) t^-c + eps, step = c / (a + b)"
    return None


def _points(fit: dict[str, Any], runs: Sequence[dict[str, Any]]) -> dict[str, str | None]:
    points = fit.get("points") or []
    used = [point for point in points if point["used"]]
    names = arms_of_star(fit)
    shapes = {tuple(point[arm] for arm in names) for point in points}
    sizes = [f"{name} {', '.join(map(str, sorted({point[arm] for point in points})))}" for arm, name in names.items()]
    seeds = sorted({str(point["seed"]) for point in points})
    weights = sorted({word for run in runs for row in run.get("metrics") or [] for word in row["weights"]})
    reasons = [f"{counted(count, 'point')}: {why}" for why, count, _ in left_out(fit)]
    reasons += [f"{counted(len(fit['excluded']), 'run')} as a whole"] if fit.get("excluded") else []
    if not points:
        return dict.fromkeys(("run ids", "shapes", "compute t", "seeds", "cooled or not", "left out"))
    times = [point["t_gflops"] for point in points]
    compute = (fit.get("fit") or {}).get("compute")
    return {
        "run ids": f"{counted(len(used), 'point')} of {counted(len({p['run_id'] for p in used}), 'run')}, each listed below",
        "shapes": f"{len(shapes)}; {'; '.join(sizes)}",
        "compute t": f"{number(min(times))} to {number(max(times))} GFLOPs; {compute or 'forward FLOPs x images seen'}",
        "seeds": ", ".join(seeds),
        "cooled or not": _cooled(weights, runs),
        "left out": f"{'; '.join(reasons)}; each with its reason below" if reasons else "nothing",
    }


def _cooled(weights: Sequence[str], runs: Sequence[dict[str, Any]]) -> str | None:
    horizon = _agreed(runs, "eval.ema_horizon")
    cooldown = _agreed(runs, "schedule.cooldown")
    words = {
        "cooled": f"cooled: each duration ends in a cooldown of its own ({cooldown or 'length not recorded'})",
        "ema": f"not cooled: weights averaged over a window of the steps so far ({horizon or 'length not recorded'})",
        "trunk": "not cooled: the weights as they stood",
    }
    return "; ".join(words.get(kind, kind) for kind in weights) or None


def _training(runs: Sequence[dict[str, Any]]) -> dict[str, str | None]:
    def joined(*keys: str) -> str | None:
        found = [(key.split(".")[-1], _agreed(runs, key)) for key in keys]
        return ", ".join(f"{name} {value}" for name, value in found if value is not None) or None

    fractals = _agreed(runs, "data.name") == "fractals"
    seen = [row["examples_seen"] for run in runs for row in run.get("metrics") or [] if row.get("examples_seen")]
    return {
        "schedule": joined("schedule.kind", "schedule.warmup_steps", "schedule.timescale", "schedule.cooldown"),
        "learning rate across shapes": joined(
            "optim.lr", "optim.lr_rule", "optim.base_width", "optim.base_depth", "optim.base_mlp_dim"
        ),
        "training optimiser": joined("optim.name", "optim.beta1", "optim.beta2", "optim.clip_norm", "optim.loss"),
        "batch": joined("trainer.global_batch_size"),
        "weight decay": joined("optim.weight_decay", "optim.head_weight_decay"),
        "augmentation": f"part of how an image is drawn: {joined('data.rotation')}" if fractals else None,
        "passes over the data": "less than one: every training image is drawn anew" if fractals else None,
        "images seen": f"{number(min(seen))} to {number(max(seen))} a run" if seen else None,
        "data fingerprint": _same(run.get("data_fingerprint") for run in runs),
        "code": _same(run.get("code_version") for run in runs),
        "lock (SHA-256)": _same(run.get("lock_sha256") for run in runs),
        "precision": joined("trainer.precision", "trainer.accelerator"),
    }


def _metric(fit: dict[str, Any], runs: Sequence[dict[str, Any]]) -> dict[str, str | None]:
    if value_of(fit) == "log-perplexity":
        return _of_decoder(fit, runs)
    metric = fit.get("metric") or {}
    rows = [
        row
        for run in runs
        for row in run.get("metrics") or []
        if row["dataset"] == metric.get("dataset") and row["shots"] == metric.get("shots")
    ]
    draws = sorted({row["draws"] for row in rows})
    ridges = [value for row in rows for value in row["l2_reg"]]
    tests = sorted({row["num_test"] for row in rows if row["num_test"]})
    errors = [point["error"] for point in fit.get("points") or []]
    floor = None
    if tests and errors:
        low = min(errors)
        binomial = number((low * (1 - low) / tests[0]) ** 0.5, 2)
        floor = f"{', '.join(f'{n:,}' for n in tests)}; binomial ± {binomial} at {number(low)}"
    heldout = _agreed(runs, "data.num_heldout")
    own = metric.get("dataset") == "fractals" == _agreed(runs, "data.name")
    how = _agreed(runs, "eval.l2_reg")
    how = "chosen by leave-one-out on the support set" if how == "loo" else how
    pool = _agreed(runs, "model.pool")
    sizes = sorted({row["image_size"] for row in rows if row["image_size"]})
    return {
        "data set": str(metric["dataset"]) if metric.get("dataset") else None,
        "split": f"{heldout} categories that training never sees" if own and heldout else None,
        "shots": str(metric["shots"]) if metric.get("shots") is not None else None,
        "draws of the support": ", ".join(map(str, draws)) or None,
        "l2": f"{how}, {number(min(ridges))} to {number(max(ridges))}" if how and ridges else how,
        "layer": f"features after the pool ({pool}), before the classifier" if pool else None,
        "resolution": f"{', '.join(map(str, sizes))} pixels a side" if sizes else None,
        "test images": floor,
        "to beat": baselines_in_words(fit, runs) or None,
    }


def _of_decoder(fit: dict[str, Any], runs: Sequence[dict[str, Any]]) -> dict[str, str | None]:
    """The metric, where it is the log-perplexity of a decoder on frozen tokens."""

    def said(key: str, words: str) -> str | None:
        found = _agreed(runs, f"eval.{key}")
        return f"{found} {words}" if found else None

    size = [said("decoder_depth", "blocks"), said("decoder_width", "wide")]
    steps = [said("decoder_steps", "steps"), said("decoder_batch_size", "texts each"), said("decoder_lr", "peak rate")]
    decoder = ", ".join(part for part in (*size, *steps) if part)
    return {
        "data set": str((fit.get("metric") or {}).get("dataset")),
        "unit": "nats per token of the answers, the unweighted mean over the tasks",
        "decoder": decoder or None,
        "decoders a value": said("decoder_draws", "of different seeds"),
        "trained on": said("train_scenes", "embedded scenes with captions and questions"),
        "tested on": said("test_scenes", "others; the standard error counts images"),
        "layer": "tokens after the last norm, not pooled, frozen",
        "resolution": _sizes(runs),
        "to beat": baselines_in_words(fit, runs) or None,
    }


def _sizes(runs: Sequence[dict[str, Any]]) -> str | None:
    found = _agreed(runs, "model.image_size")
    return f"{found} pixels a side" if found else None


def _uncertainty(fit: dict[str, Any]) -> dict[str, str | None]:
    said, arms = fit.get("fit") or {}, arms_of(fit)
    if fit["kind"] == "grid":
        noise = fit.get("noise") or {}
        levels = (("tau", "run"), ("sigma", "point")) if noise else ()
        spreads = [f"{percent(noise[key], sign=False)} a {what}" for key, what in levels]
        return {
            "resampling unit": "run" if noise else None,
            "noise as estimated": f"{', '.join(spreads)}, from {noise['basis']}" if noise else None,
            "how sure the best shape is": "share of the draws in which it is the best" if noise else None,
            "lead of the best shape": "its difference to the runner-up with a standard error, at every compute",
        }
    methods = sorted({entry["s"]["method"] for entry in arms.values() if entry.get("s") and entry["s"].get("method")})
    methods += sorted({one["method"] for one in (fit.get("exponents") or {}).values() if one.get("method")})
    fitted = [
        f"{name}: {percent(entry['sigma'], sign=False)} a point, {percent(entry['tau'], sign=False)} a run"
        for name, entry in arms.items()
        if entry.get("sigma") is not None and entry.get("tau") is not None
    ]
    if fit["kind"] == "joint" and fit.get("sigma") is not None:
        fitted.append(f"{percent(fit['sigma'], sign=False)} a point, {percent(fit['tau'], sign=False)} a run")
    jackknives = [f"{name} {interval(e['jackknife'])}" for name, e in arms.items() if e.get("jackknife")]
    left_out_once = "none: no bootstrap; the jackknife leaves out each run once"
    return {
        "resampling unit": said.get("resampling_unit") or ("run" if fit.get("jackknife") or jackknives else None),
        "replicates": left_out_once if jackknives or fit.get("jackknife") else None,
        "interval": said.get("interval") or "; ".join(methods) or None,
        "noise": said.get("noise"),
        "noise as fitted": "; ".join(fitted) or None,
        "jackknife over runs": ", ".join(jackknives) or None,
    }


def _forecast(fit: dict[str, Any]) -> dict[str, str | None]:
    forecast = fit.get("forecast")
    held = _held_out(fit)
    if not isinstance(forecast, dict) or not forecast:
        none = "does not apply: this fit makes no forecast"
        return {"budget": none, "extrapolation factor": none, "held-out error": held, "regret of rounding": none}
    far = forecast.get("extrapolation") or {}
    first = (forecast.get("candidates") or [{}])[0]
    words = [f"{number(forecast['t_gflops'], 4)} GFLOPs"] if forecast.get("t_gflops") else []
    words += [str(forecast["budget"])] if forecast.get("budget") else []
    regret = f"{percent(first['regret'], sign=False)} of the compute" if first.get("regret") is not None else None
    return {
        "budget": ", ".join(words) or None,
        "extrapolation factor": f"{number(far['factor'])} times the data" if far.get("factor") else None,
        "held-out error": held,
        "regret of rounding": f"{regret}, {forecast['regret_by']}" if regret and forecast.get("regret_by") else regret,
    }


def _held_out(fit: dict[str, Any]) -> str | None:
    held = fit.get("held_out")
    if isinstance(held, dict) and held.get("rms") is not None:
        up_to = number(held["fitted_up_to"])
        return f"{percent(held['rms'], sign=False)} rms on the largest budgets, fitted up to {up_to} GFLOPs"
    if isinstance(held, list) and held:
        rows = [f"{percent(row['rms'], sign=False)} rms at {number(row['t_gflops'])} GFLOPs" for row in held]
        return ", ".join(rows)
    misses = [
        f"{name} {percent(max((abs(c['predicted'] / c['measured'] - 1) for c in checks), default=0.0), sign=False)}"
        for name, entry in arms_of(fit).items()
        if (checks := [c for c in entry.get("center_check") or [] if c["used_range"] and c["measured"]])
    ]
    return f"of the center, at most: {', '.join(misses)}" if misses else None


def _each(arms: dict[str, dict[str, Any]], key: str, words: Any) -> str | None:
    found = [f"{name} {words(entry[key])}" for name, entry in arms.items() if entry.get(key) is not None]
    return ", ".join(found) or None


def _agreed(runs: Sequence[dict[str, Any]], key: str) -> str | None:
    """The value of a dotted key of the configuration that all runs share, or all values; None if not recorded."""
    found = []
    for run in runs:
        node: Any = run.get("config") or {}
        for part in key.split("."):
            node = node.get(part) if isinstance(node, dict) else None
        if node is not None:
            found.append(_words(node))
    return _same(found)


def _same(values: Iterable[Any]) -> str | None:
    found = sorted({str(value) for value in values if value not in (None, "")})
    return (f"differs: {', '.join(found)}" if len(found) > 1 else found[0]) if found else None


def _words(value: Any) -> str | None:
    if value is None:
        return None
    if isinstance(value, dict):
        return "; ".join(f"{key} {_words(item)}" for key, item in value.items())
    if isinstance(value, list | tuple) and len(value) == 2:
        return f"{value[0]} and above" if value[1] is None else f"{value[0]} to {value[1]}"
    return str(value)
