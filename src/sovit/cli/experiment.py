"""What the runs beside a fit were trained with, and a Hydra experiment for the shape predicted from them.

The recipe is said as ``conf/`` says it: the option of each group that comes nearest to the runs' configuration, and the
keys in which they differ. Without runs it is the recipe of the published sweeps (SoViT, arXiv 2305.13035, Table 5).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sovit import config, derived, records
from sovit.shape import Shape

PUBLISHED = {
    "image_size": 224,
    "channels": 3,
    "pool": "map",
    "num_classes": 0,
    "patch_size": 14,
    "pos_embed": "learned",
    "block": "serial",
    "qk_norm": False,
    "qkv_bias": True,
    "norm": "layernorm",
}
NUM_HEADS = 16  # at every width of the published sweeps
_OF_MODEL = tuple(key for key in PUBLISHED if key not in ("num_classes", "patch_size"))
_GROUPS = ("model", "data", "optim", "schedule", "trainer")
_PUBLISHED = {"model": "vit", "optim": "adafactor", "schedule": "rsqrt", "trainer": "gpu"}
_PUBLISHED_EVAL = {"l2_reg": 1024.0, "weights": "cooled"}
# Settled by the shape, or of one run and not of the recipe.
_NOT_RECIPE = {
    "model": ("width", "depth", "mlp_dim", "num_heads", "head_dim", "patch_size"),
    "data": ("num_workers",),
    "trainer": ("max_steps", "log_every_n_steps", "checkpoint_every_s", "keep_checkpoint"),
}


@dataclass(frozen=True)
class Place:
    """What a shape's cost depends on besides its sizes, the usual number of heads, and the recipe of the runs."""

    geometry: dict[str, Any]
    num_heads: int
    recipe: dict[str, Any] | None
    source: str


def place(changed: Mapping[str, Any], folders: Mapping[str, Path], fits: Mapping[str, Mapping[str, Any]]) -> Place:
    """The place of a prediction from fits (kind -> fit.json) and the runs in the folders beside them.

    ``changed``: keys of the geometry that options set. Without runs it is the published one, or the joint law's own.
    Raises ValueError if the runs have several geometries.
    """
    found: dict[str, dict[str, Any]] = {}
    recipe, heads = None, set()
    for kind, folder in folders.items():
        for path in sorted(folder.glob(f"*/{records.RUN}")):
            run = records.read_run(path.parent) or {}
            settings = run.get("config") or {}
            if not settings.get("model") or run.get("status") != records.DONE:
                continue
            model = settings["model"]
            here = PUBLISHED | {key: model[key] for key in _OF_MODEL if key in model}
            here |= {"num_classes": settings.get("data", {}).get("num_classes", 0), "patch_size": run["patch_size"]}
            found.setdefault(json.dumps(here, sort_keys=True), here | {"where": folder})
            heads.add(run["num_heads"])
            recipe = settings if recipe is None or kind == "star" else recipe
    if "joint" in fits:
        own = dict(fits["joint"]["geometry"])
        heads.add(own.pop("num_heads"))
        here = own | {key: (next(iter(found.values()), PUBLISHED))[key] for key in PUBLISHED if key not in own}
        found.setdefault(json.dumps(here, sort_keys=True), here | {"where": folders["joint"]})
    geometries = list(found.values())
    if len(geometries) > 1:
        one, two = geometries[:2]
        differing = [key for key in PUBLISHED if one[key] != two[key]]
        raise ValueError(
            f"the runs in {one['where']} and {two['where']} differ in {', '.join(differing)}; give fits of one kind of run."
        )
    geometry, source = dict(PUBLISHED), "as published"
    if geometries:
        geometry, source = {key: geometries[0][key] for key in PUBLISHED}, "of the runs"
    elif fits:
        source = "as published, for there are no runs beside the fit"
    return Place(geometry | dict(changed), heads.pop() if len(heads) == 1 else NUM_HEADS, recipe, source)


def write(
    path: Path,
    comment: Sequence[str],
    shape: Shape,
    geometry: Mapping[str, Any],
    target_gflops: float,
    recipe: Mapping[str, Any] | None,
    *,
    force: bool = False,
) -> None:
    """Write ``conf/experiment/NAME.yaml`` and compose it; a file that does not compose is taken back.

    ``comment``: lines above the keys; ``recipe``: the configuration of a run, if there is one. Raises ValueError if the
    path is not there, exists (unless forced), or its experiment does not compose to the shape.
    """
    folder = config.CONF_DIR / "experiment"
    if path.suffix != ".yaml" or path.resolve().parent != folder.resolve():
        raise ValueError(f"--write {path} is not an experiment; write to conf/experiment/NAME.yaml.")
    if not re.fullmatch(r"[A-Za-z0-9_.+]+", path.stem):
        raise ValueError(
            f"--write {path.name}: the name becomes part of run ids; use letters, digits, '_', '.', '+' and no '-'."
        )
    if path.exists() and not force:
        raise ValueError(f"{path} exists; choose another name, or replace it with --force.")
    before = path.read_text() if path.exists() else None
    path.write_text(text(path.stem, comment, shape, geometry, target_gflops, recipe))
    try:
        composed = config.compose([f"experiment={path.stem}"])
        built = derived.model_geometry(composed)
        wrong = _differing({key: value for key, value in geometry.items() if key in built and value}, built)
        if derived.shape_of(composed) != shape or wrong:
            raise ValueError(f"it composes to {derived.shape_of(composed)} with {built}; check conf/.")
    except ValueError as error:
        if before is None:
            path.unlink()
        else:
            path.write_text(before)
        raise ValueError(f"{path} was not written, for its experiment does not compose: {error}") from None


def text(
    name: str,
    comment: Sequence[str],
    shape: Shape,
    geometry: Mapping[str, Any],
    target_gflops: float,
    recipe: Mapping[str, Any] | None,
) -> str:
    """The YAML of an experiment. ``geometry``: keys of PUBLISHED."""
    import yaml

    from sovit.analysis.report.words import visible
    from sovit.duration import Duration

    groups = config.config_groups()
    root = _load(config.CONF_DIR / "config.yaml")
    usual = {key: option for entry in root["defaults"] if isinstance(entry, dict) for key, option in entry.items()}
    overrides: list[Any] = []
    body: dict[str, Any] = {"name": name, "shape": str(shape)}
    for group in _GROUPS:
        options = {option: _load(config.CONF_DIR / group / f"{option}.yaml") for option in groups[group]}
        option, changed = _PUBLISHED.get(group, usual[group]), {}
        if recipe is not None and group in recipe:
            wanted = {key: value for key, value in recipe[group].items() if key not in _NOT_RECIPE.get(group, ())}
            ranked = sorted(options, key=lambda one: (len(_differing(wanted, options[one])), one != usual[group]))
            option, changed = ranked[0], _differing(wanted, options[ranked[0]])
        if option != usual[group]:
            overrides.append({f"override /{group}": option})
        if group == "model":
            keys = {key: geometry[key] for key in _OF_MODEL if key in geometry}
            keys |= {"num_heads": shape.num_heads, "head_dim": None, "patch_size": shape.patch_size}
            changed = _differing(changed | keys, options[option])
        if group == "data" and geometry.get("num_classes"):  # 0: no classifier was counted, but training has one
            changed |= _differing({"num_classes": geometry["num_classes"]}, options[option])
        if changed:
            body[group] = changed
    evaluation = _differing(recipe["eval"], root["eval"]) if recipe and "eval" in recipe else _PUBLISHED_EVAL
    if evaluation:
        body["eval"] = dict(evaluation)
    duration = Duration(float(f"{target_gflops:.6g}"), "gflops")
    body["durations"] = {"values": [str(duration)], "first": None, "last": None, "num": None}
    if "${" in json.dumps(body):
        raise ValueError(
            f"the recipe of the runs holds an interpolation ({body}); an experiment takes plain values only."
        )
    head = ["# @package _global_", *(f"# {visible(line)}".rstrip() for line in comment)]
    content = ({"defaults": overrides} if overrides else {}) | body
    return "\n".join(head) + "\n" + yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def _load(path: Path) -> dict[str, Any]:
    import yaml

    return yaml.safe_load(path.read_text())


def _differing(wanted: Mapping[str, Any], there: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of ``wanted`` that are not, or not the same, in ``there``."""
    return {key: value for key, value in wanted.items() if key not in there or there[key] != value}
