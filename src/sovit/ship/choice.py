"""Why a model has its shape: what fits and a prediction say, with their intervals, shortened to what a card can hold.

Given files must be readable; those found beside the run are used if they are. Nothing is computed here but which candidate
of the prediction the model is.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from sovit.analysis.forecast.exponents import read_fit
from sovit.config import ConfigError
from sovit.ship.weights import without_paths

DIMENSIONS = ("width", "depth", "mlp_dim", "token_dim")
FIT, PREDICTION = "fit.json", "prediction.json"
PROOF = "_proof"  # the name of a sweep of `sovit optimize` less this is the folder of its prediction
_OF_PREDICTION = (
    "rule", "t_gflops", "budget", "origin", "exponents", "step", "optimum", "extrapolation", "held_out", "regret_by", "notes"
)  # fmt: skip


def made(shape: Any, source: Path, fits: Sequence[Path], prediction: Path | None) -> dict[str, Any]:
    """{"prediction": ..., "fits": [...], "unread": [sentences]} of the named files, or of those beside the run.

    Raises ConfigError for a named one that is none; of those found, the reason goes to "unread".
    """
    beside = [] if source.suffix == ".safetensors" else [source.parent, source.parent.parent]
    unread: list[str] = []
    found = [_read(_fit, path, "sovit fit") | {"named": True} for path in fits]
    for folder in beside if not fits else []:
        found += [one | {"named": False} for one in _if_there(_fit, folder / FIT, "sovit fit", unread)]

    def foretell(path: Path) -> dict[str, Any]:
        return _prediction(path, shape)

    maker = "sovit predict --json"
    if prediction is not None:
        foretold = [_read(foretell, prediction, maker)]
    else:
        folders = [*beside, *(_optimised(sweep) for sweep in beside[1:] if sweep.name.endswith(PROOF))]
        foretold = [one for folder in folders for one in _if_there(foretell, folder / PREDICTION, maker, unread)]
    return without_paths({"prediction": foretold[0] if foretold else None, "fits": found}) | {"unread": unread}


def _optimised(sweep: Path) -> Path:
    """Where `sovit optimize` keeps what it predicted, of the sweep in which it trains that shape."""
    return sweep.with_name(sweep.name.removesuffix(PROOF))


def _read(read: Callable[[Path], dict[str, Any]], path: Path, maker: str) -> dict[str, Any]:
    try:
        return read(path)
    except (KeyError, TypeError, AttributeError):
        raise ConfigError(f"{path} lacks what {maker} writes; make it again.") from None


def _if_there(
    read: Callable[[Path], dict[str, Any]], path: Path, maker: str, unread: list[str]
) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    try:
        return [_read(read, path, maker)]
    except ConfigError as error:
        unread.append(str(error).replace(str(path), path.name))
        return []


def _fit(path: Path) -> dict[str, Any]:
    """The exponents, or the origin, of a fit.json, with what speaks against them."""
    file = path / FIT if path.is_dir() else path
    kind = "star"
    with suppress(OSError, ValueError, AttributeError):  # said below
        kind = json.loads(file.read_text()).get("kind", kind)
    try:
        _, fit = read_fit(path, kind if kind in ("star", "grid", "diagonal", "joint") else "star")
    except ValueError as error:
        raise ConfigError(str(error)) from None
    sweeps = fit.get("sweeps") or [fit["sweep"]]
    about = {"kind": kind, "sweeps": sweeps, "metric": fit["metric"], "level": fit.get("level")}
    about |= {"warnings": fit.get("warnings", [])}
    if kind == "star":
        exponents = {
            name: {
                **(arm["s"] or {}),
                "identified": arm["identified"],
                "why": arm.get("why"),
                "cutoffs": arm["cutoff_range"],
            }
            for name, arm in fit["arms"].items()
        }
        return about | {"exponents": exponents}
    if kind == "joint":
        return about | {"exponents": {name: one | {"identified": True} for name, one in fit["exponents"].items()}}
    if kind == "diagonal":
        return about | {"direction": fit["direction"], "step": fit["step"], "why": fit["why"]}
    return about | {"origin": fit["origin"], "why": fit["why"]}


def _prediction(path: Path, shape: Any) -> dict[str, Any]:
    """What `sovit predict --json` wrote, and which of its candidates the shape is (None: none of them)."""
    file = path / PREDICTION if path.is_dir() else path
    try:
        found = json.loads(file.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{file} does not exist; sovit predict --json > {file} writes one.") from None
    except (OSError, ValueError):
        raise ConfigError(f"{file} is not valid JSON; sovit predict --json > {file} writes it.") from None
    if (
        not isinstance(found, dict)
        or found.get("kind") != "prediction"
        or not isinstance(found.get("candidates"), list)
    ):
        raise ConfigError(f"{file} is no prediction; sovit predict --json > {file} writes one.")
    region = found.get("region")
    return {
        **{key: found.get(key) for key in _OF_PREDICTION},
        "region": {key: region[key] for key in ("level", "box", "open")} if region else None,
        "candidate": _place(found["candidates"], shape.as_dict()),
        "candidates": len(found["candidates"]),
    }


def _place(candidates: Sequence[Mapping[str, Any]], sizes: Mapping[str, int]) -> dict[str, Any] | None:
    for place, one in enumerate(candidates, start=1):
        if all(one.get(name) == size for name, size in sizes.items() if name in DIMENSIONS):
            return {"place": place, "label": one.get("label"), "regret": one.get("regret")}
    return None
