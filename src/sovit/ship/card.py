"""The shape card: what a model is, what it cost, why it has its shape, and how well it does, as one JSON document.

Everything comes from the run's own files, from fits and predictions that are named or lie beside the run, and from an
exported file's own card. What is not known is null, with the reason where there is one. Absolute paths are cut to their last
part. Not here: words for a reader (`sovit.ship.readme`), and choosing what of a fit counts (`sovit.ship.choice`).
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open

from sovit import records
from sovit.config import ConfigError, RunConfig
from sovit.data.sources import read_class_list
from sovit.data.views import CENTRAL
from sovit.derived import model_geometry, model_options
from sovit.fewshot import FewshotRow, summarise
from sovit.flops import forward_flops, num_params
from sovit.lit.data import train_images
from sovit.lit.trained import Trained
from sovit.ship import choice
from sovit.ship.weights import without_paths

SCHEMA = 1
KIND = "shape card"
UNKNOWN = "unknown"  # a licence that nobody gave; also what the Hub calls it
CONVENTION = (
    "t = forward FLOPs per image x images seen, in GFLOPs; 2 FLOP per multiply-add, matrix products and the patch "
    "convolution only; training costs 3 t"
)


def make(
    trained: Trained,
    *,
    licence: str | None = None,
    fits: Sequence[Path] = (),
    prediction: Path | None = None,
    class_list: Path | None = None,
) -> dict[str, Any]:
    """The card of a model. Raises ConfigError for an option that cannot be read or does not fit the model.

    ``fits`` and ``prediction``: files of `sovit fit` and `sovit predict --json`; a fit.json or prediction.json beside the
    run is taken as well. ``class_list``: a text file, one class a line.
    """
    source, cfg = trained.weights.source, trained.cfg
    known = _card_of(source) if source.suffix == ".safetensors" else None
    if known is None:
        try:
            measured = _fewshot(trained)
        except (KeyError, TypeError, ValueError):
            raise ConfigError(
                f"{source.parent / records.EVALS} holds a line that is no evaluation of this version."
            ) from None
        known = _provenance(trained) | {"evaluations": measured, "choice": None, "licence": UNKNOWN}
    if licence is not None and not licence.strip():
        raise ConfigError("--license is empty; give a name such as apache-2.0, or leave it out.")
    found = choice.made(trained.shape, source, fits, prediction)
    classes = known["classes"] if class_list is None else _classes(cfg, _given(class_list, cfg.data.num_classes), None)
    return {
        "schema": SCHEMA,
        "kind": KIND,
        "name": trained.weights.run_id,
        "licence": known["licence"] if licence is None else licence.strip(),
        **_model(trained),
        "compute": _compute(trained),
        "pixels": _pixels(cfg),
        "classes": classes,
        "training": known["training"],
        "code": known["code"],
        "choice": found if found["fits"] or found["prediction"] or known["choice"] is None else known["choice"],
        "evaluations": {**known["evaluations"], "downstream": _downstream(trained, known["evaluations"])},
    }


def _card_of(path: Path) -> dict[str, Any] | None:
    """The card that an exported file carries, or None. Raises ConfigError for one of another version."""
    with safe_open(path, framework="pt") as file:
        text = (file.metadata() or {}).get("card")
    if text is None:
        return None
    try:
        card = json.loads(text)
        if card["kind"] == KIND and card["schema"] == SCHEMA and {"training", "evaluations", "classes"} <= card.keys():
            return dict(card)
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise ConfigError(f"{path} carries a shape card that this version does not know; export the model from its run.")


def _model(trained: Trained) -> dict[str, Any]:
    cfg, shape = trained.cfg, trained.shape
    geometry, options = model_geometry(cfg), model_options(cfg)
    params, flops = num_params(shape, **geometry, **options), forward_flops(shape, **geometry)
    return {
        "family": cfg.model.family,
        "shape": shape.as_dict(),
        "geometry": geometry,
        "options": options,
        "num_params": sum(params.values()),
        "params_by_group": params,
        "forward_gflops": sum(flops.values()) / 1e9,
        "forward_flops_by_group": flops,
    }


def _compute(trained: Trained) -> dict[str, Any]:
    """What the exported weights cost."""
    cfg, step = trained.cfg, trained.weights.step
    images = step * cfg.trainer.global_batch_size
    t_gflops = images * sum(forward_flops(trained.shape, **model_geometry(cfg)).values()) / 1e9
    return {
        "weights": trained.weights.kind,
        "step": step,
        "images_seen": images,
        "t_gflops": t_gflops,
        "train_gflops": 3 * t_gflops,
        "convention": CONVENTION,
    }


def _pixels(cfg: RunConfig) -> dict[str, Any]:
    """From bytes to what the model takes; the crop is that of an evaluation on image files."""
    size, channels = cfg.model.image_size, cfg.model.channels
    return {
        "channels": channels,
        "image_size": size,
        "range": [-1, 1],
        "mean": [0.5] * channels,
        "std": [0.5] * channels,
        "resize_short_side": round(size / CENTRAL),
        "center_crop": size,
        "interpolation": "bilinear",
    }


def _provenance(trained: Trained) -> dict[str, Any]:
    """What the run's record says of data and code; of an exported file without a card, what its configuration does."""
    cfg, source = trained.cfg, trained.weights.source
    record = (records.read_run(source.parent) if source.suffix != ".safetensors" else None) or {}
    version = record.get("code_version")
    commit = str(version or "").partition("+")[2]
    config = without_paths(trained.weights.config)
    return {
        "training": {
            "data": config.get("data", {}).get("root") or cfg.data.name,
            "kind": cfg.data.name,
            "fingerprint": record.get("data_fingerprint"),
            "seed": cfg.seed,
            "status": record.get("status"),
            "config_hash": record.get("config_hash"),
            "config": config,
        },
        "code": {
            "version": version,
            "commit": commit.rstrip("+") or None,
            "uncommitted": commit.endswith("+") if commit else None,
            "lock_sha256": record.get("lock_sha256"),
            "torch": record.get("torch_version"),
        },
        "classes": _found_classes(cfg, record),
    }


def _found_classes(cfg: RunConfig, record: Mapping[str, Any]) -> dict[str, Any]:
    """The names of the classes if the training images are at hand and still those of the run."""
    if cfg.data.name == "fractals":
        return _classes(cfg, None, "generated categories have no names")
    try:
        images = train_images(cfg)
    except ConfigError:
        return _classes(cfg, None, "the training images are not at hand; --classes FILE gives the names")
    if images.fingerprint != record.get("data_fingerprint"):
        return _classes(
            cfg, None, "the training images are not those of the run any more; --classes FILE gives the names"
        )
    return _classes(cfg, list(images.classes), None)


def _classes(cfg: RunConfig, names: list[str] | None, why: str | None) -> dict[str, Any]:
    return {"num": cfg.data.num_classes, "names": names, "why": why}


def _given(path: Path, num_classes: int) -> list[str]:
    try:
        names = list(read_class_list(str(path)))
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if len(names) != num_classes:
        raise ConfigError(f"{path} names {len(names)} classes; the model has {num_classes}.")
    return names


def _fewshot(trained: Trained) -> dict[str, Any]:
    """Few-shot errors of the last evaluation up to the exported step, and whether they are of the exported weights."""
    source, weights = trained.weights.source, trained.weights
    empty: dict[str, Any] = {"fewshot": [], "step": None, "weights": None, "note": "no few-shot evaluation is known"}
    if source.suffix == ".safetensors":
        return empty
    rows = [row for row in records.read_lines(source.parent / records.EVALS) if row["step"] <= weights.step]
    if not rows:
        return empty
    step = max(row["step"] for row in rows)
    rows = [row for row in rows if row["step"] == step]
    of = sorted({row["weights"] for row in rows})
    kind = "average" if of == ["ema"] else "trained"
    baselines = (records.read_run(source.parent) or {}).get("baselines") or {}
    by_dataset = defaultdict(list)
    for row in rows:
        by_dataset[row["dataset"]].append(FewshotRow(*(row[field.name] for field in dataclasses.fields(FewshotRow))))
    found = []
    for dataset, of_dataset in by_dataset.items():
        beaten = baselines.get(dataset) or {}
        for one in sorted(summarise(of_dataset), key=lambda one: one.shots):
            pixels = (beaten.get("pixels") or {}).get(str(one.shots))
            found.append({"dataset": dataset, **vars(one), "chance": beaten.get("chance"), "pixels": pixels})
    differs = [
        *([f"after {step:,} steps, not {weights.step:,}"] if step != weights.step else []),
        *([f"of the {kind} weights, not the {weights.kind} ones"] if kind != weights.kind else []),
    ]
    note = f"measured {' and '.join(differs)}, which are exported" if differs else None
    return {"fewshot": found, "step": step, "weights": kind, "note": note}


def _downstream(trained: Trained, known: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Results that `sovit eval` has left of these weights, and those in the card of an exported file."""
    from sovit.downstream.tasks import place

    source, weights = trained.weights.source, trained.weights
    found = list(known.get("downstream", []))
    for path in sorted(place(source).glob("*.json")):
        content = records.read_object(path) or {}
        if not {"task", "config", "result"} <= content.keys():
            raise ConfigError(f"{path} is no result of sovit eval; move it elsewhere.")
        if (content.get("step"), content.get("weights")) != (weights.step, weights.kind):
            continue  # of other weights of the same run
        _check_numbers(content, path)
        keys = ("task", "config", "weights", "step", "result")
        result = {"file": path.name} | {key: content.get(key) for key in keys} | {"lines": _lines(content)}
        found = [one for one in found if one["file"] != path.name] + [without_paths(result)]
    return found


def _lines(content: Mapping[str, Any]) -> list[str]:
    """What the task says of its result, as on the terminal; nothing if it cannot."""
    import importlib

    from sovit.downstream.tasks import TASKS
    from sovit.ship.weights import cut, paths

    if content["task"] not in TASKS:
        return []
    try:
        lines = importlib.import_module(f"sovit.downstream.{content['task']}").text(content["result"])
    except (ImportError, KeyError, TypeError, ValueError):  # a result of another version
        return []
    for path in sorted(paths(content), key=len, reverse=True):
        lines = [line.replace(path, cut(path)) for line in lines]
    return lines


def _check_numbers(tree: Any, path: Path) -> None:
    if isinstance(tree, Mapping | list):
        for value in tree.values() if isinstance(tree, Mapping) else tree:
            _check_numbers(value, path)
    elif isinstance(tree, float) and not math.isfinite(tree):
        raise ConfigError(f"{path} holds {tree}, which is no number; run the evaluation again with --again.")
