"""Shape or texture: what a linear classifier on frozen features goes by where the two contradict each other.

The question of model-vs-human (Geirhos et al., arXiv 1811.12231, 2106.07411) without its ImageNet classifier: eight
categories have a silhouette and a texture each (`cues`). A ridge classifier of the eight is fitted on plain silhouettes
and on textures in outlines that say nothing, in equal numbers, so that either cue alone is a category it was taught,
whatever the encoder. How well it knows each is measured on fresh images: a bias between two cues means little where one of
them is not known. (``taught=both`` shows it silhouettes filled with their own texture instead, which leave the choice of
the cue to the features.) Then every silhouette with every texture of another category: a decision is for the shape, for
the texture, or for neither. Shape bias is the share of the first in the first two.

Beside the model stands the same classifier on raw pixels. Error consistency (`consistency`) is that of the model with the
pixels, and with ``against``: another model, or decisions on these images in a CSV file. Right is the category of the shape.
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image

from sovit import records
from sovit.config import ConfigError
from sovit.downstream import cues
from sovit.downstream.consistency import error_consistency, read_decisions
from sovit.downstream.rates import rate, shown
from sovit.fewshot import fit_ridge
from sovit.lit.evaluation import extract
from sovit.lit.trained import Trained, load, read
from sovit.strict import nearest

TAUGHT = ("each", "both")
_TAUGHT_TEXT = {"each": "shapes and textures apart", "both": "shapes in their own texture"}
TRIALS = "trials.csv"
_KNOWN = 25  # fresh images of each category and cue
_AT_ONCE = 128
_SIDE = 32  # pixels to a side that the classifier on raw pixels sees
_Cues = tuple[int | None, int | None]  # silhouette and texture


@dataclass
class Config:
    name: str = "cue_conflict"
    taught: str = "each"  # each: silhouettes and textures apart | both: silhouettes in their own texture
    shots: int = 100  # images of each category to fit on; half of each cue
    per_pair: int = 20  # trials of each of the 56 pairs of a silhouette and another category's texture
    seed: int = 0  # which images
    against: str | None = None  # another run's folder or .safetensors, or a CSV file of decisions on the same trials
    images: str | None = None  # a folder to write the trials to, with a table of this model's decisions


def check(cfg: Config, trained: Trained) -> None:
    if cfg.taught not in TAUGHT:
        raise ConfigError(f"task.taught={cfg.taught!a} is not a choice{nearest(cfg.taught, TAUGHT)}")
    if cfg.shots < 2 or cfg.shots % 2:
        raise ConfigError(f"task.shots={cfg.shots} must be even and at least 2: half of them show each cue.")
    if not 1 <= cfg.per_pair <= 1000:
        raise ConfigError(f"task.per_pair={cfg.per_pair} is not in 1 .. 1000.")
    if cfg.seed < 0:
        raise ConfigError(f"task.seed={cfg.seed} must not be negative.")
    _check_size(trained)
    if cfg.against is not None:
        path = Path(cfg.against).expanduser()
        if path.suffix == ".csv":
            read_decisions(path, [trial.name for trial in cues.trials(cfg.per_pair)], cues.SHAPES)
        elif not path.exists():
            raise ConfigError(f"task.against={cfg.against} is not there; give a run's folder, a model or a CSV file.")
    if cfg.images is not None:
        folder = Path(cfg.images).expanduser()
        if folder.exists() and not (folder.is_dir() and ((folder / TRIALS).exists() or not any(folder.iterdir()))):
            raise ConfigError(f"task.images={cfg.images} holds something else; give a new folder.")


def depends(trained: Trained, cfg: Config) -> str | None:
    if cfg.against is None:
        return None
    path = Path(cfg.against).expanduser()
    if path.suffix == ".csv":
        return hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    weights, digest = read(path), hashlib.sha256()
    for name, tensor in sorted(weights.tensors.items()):
        digest.update(name.encode() + tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]


def run(trained: Trained, cfg: Config, work: Path) -> dict[str, Any]:
    """Shape bias of the model and of raw pixels with 95 % intervals and by category, and error consistency."""
    made = cues.trials(cfg.per_pair)
    decisions, known = _decisions(trained, cfg, made)
    right = np.array([trial.shape for trial in made])
    consistent = {"pixels": error_consistency(decisions["model"] == right, decisions["pixels"] == right)}
    for name, (rows, correct) in _others(cfg, made, trained).items():
        consistent[name] = error_consistency((decisions["model"] == right)[rows], correct)
    names = [cues.SHAPES[k] for k in decisions["model"]]
    if cfg.images is not None:
        _write(Path(cfg.images).expanduser(), made, _drawings(trained, cfg, cues.CONFLICT, made), names)
    return {
        "categories": [list(pair) for pair in zip(cues.SHAPES, cues.TEXTURES, strict=True)],
        "taught": cfg.taught,
        "image_size": trained.cfg.model.image_size,
        "num_trials": len(made),
        "chance": {"shape_bias": 0.5, "known": 1 / cues.NUM, "for_a_cue": 2 / cues.NUM},
        "interval": "95 %: Wilson over trials for shares, drawing trials anew for kappa; not the luck of the fitted images",
        "observers": {name: {**biases(decisions[name], made), "known": known[name]} for name in decisions},
        "consistency": consistent,
        "decisions": dict(zip([trial.name for trial in made], names, strict=True)),
    }


def text(result: dict[str, Any]) -> list[str]:
    chance = result["chance"]
    lines = [
        f"{result['num_trials']:,} conflicts at {result['image_size']} pixels; taught {_TAUGHT_TEXT[result['taught']]}",
        f"{'':<8} {'shape bias':<21} {'shape':>6} {'texture':>8} {'neither':>8}",
    ]
    for name, found in result["observers"].items():
        lines.append(
            f"{name:<8} {shown(found['shape_bias']):<21} {found['shape']:>6} {found['texture']:>8} {found['neither']:>8}"
        )
    neither = round((1 - chance["for_a_cue"]) * result["num_trials"])
    decided = (result["num_trials"] - neither) // 2
    lines.append(f"{'chance':<8} {chance['shape_bias']:<21.3f} {decided:>6} {decided:>8} {neither:>8}")
    lines.append(
        f"{'accuracy':<8} {'plain shapes':<21} {'textures':<21} {'taught shapes only':<21} taught textures only"
    )
    for name, found in result["observers"].items():
        columns = [shown(found["known"][key]) for key in ("shape", "texture", "shape_alone", "texture_alone")]
        lines.append(f"{name:<8} " + " ".join(f"{column:<21}" for column in columns).rstrip())
    lines.append(f"{'chance':<8} {chance['known']:.3f}")
    known = result["observers"]["model"]["known"]
    for cue in ("shape", "texture"):
        if known[cue]["value"] < 2 * chance["known"]:
            lines.append(f"The model's classifier hardly knows {cue} where it stands alone: the bias says little.")
    by = result["observers"]["model"]["by_shape"]
    lines.append("by shape: " + ", ".join(f"{name} {_short(found['value'])}" for name, found in by.items()))
    for name, found in result["consistency"].items():
        if found["kappa"] is None:
            lines.append(f"error consistency with {name}: undefined, one of the two is always right or always wrong")
            continue
        lines += [
            f"error consistency with {name}: kappa {found['kappa']:.3f} [{_short(found['lo'])}, {_short(found['hi'])}], "
            f"can be {found['least']:.2f} to {found['largest']:.2f}",
            f"  right or wrong together in {found['observed']:.3f} of {found['num']:,} trials, by chance "
            f"{found['expected']:.3f}; accuracy {found['accuracies'][0]:.3f} and {found['accuracies'][1]:.3f}",
        ]
    return lines


def biases(decided: NDArray[np.int64], made: list[cues.Trial]) -> dict[str, Any]:
    """Counts of decisions [trials] for the shape, the texture and neither, and the shape bias, of all and by shape."""
    shapes, textures = (np.array([getattr(trial, cue) for trial in made]) for cue in ("shape", "texture"))
    shape, texture = decided == shapes, decided == textures
    of = {name: shapes == k for k, name in enumerate(cues.SHAPES)}
    return {
        "shape_bias": _bias(shape, texture),
        "shape": int(shape.sum()),
        "texture": int(texture.sum()),
        "neither": int((~shape & ~texture).sum()),
        "by_shape": {name: _bias(shape[rows], texture[rows]) for name, rows in of.items()},
        "by_texture": {
            name: _bias(shape[rows], texture[rows])
            for name, rows in ((name, textures == k) for k, name in enumerate(cues.TEXTURES))
        },
    }


def _bias(shape: NDArray[np.bool_], texture: NDArray[np.bool_]) -> dict[str, Any]:
    return rate(int(shape.sum()), int(shape.sum() + texture.sum()))


def _decisions(
    trained: Trained, cfg: Config, made: list[cues.Trial]
) -> tuple[dict[str, NDArray[np.int64]], dict[str, dict[str, Any]]]:
    """Of a classifier on the model's features and of one on raw pixels: decisions, and how well each knows each cue; and
    under ``_alone`` how well a classifier does that is taught this cue only, which is what the features hold of it."""
    categories = range(cues.NUM)
    apart: list[_Cues] = [pair for k in categories for pair in ((k, None), (None, k))]
    together: list[_Cues] = [(k, k) for k in categories]
    taught = apart * (cfg.shots // 2) if cfg.taught == "each" else together * cfg.shots
    fresh = apart * _KNOWN
    fit = _features(trained, _drawings(trained, cfg, cues.TRAIN, taught))
    test = _features(trained, _drawings(trained, cfg, cues.KNOWN, fresh))
    asked = _features(trained, _drawings(trained, cfg, cues.CONFLICT, made))
    decisions: dict[str, NDArray[np.int64]] = {}
    known: dict[str, dict[str, Any]] = {}
    for name, features in fit.items():
        ridge = fit_ridge(features, _labels(taught), cues.NUM, "loo")
        decisions[name] = ridge.predict(asked[name])[0].numpy()
        correct = ridge.predict(test[name])[0].numpy() == _labels(fresh)
        known[name] = {}
        for cue, of_cue in (("shape", 0), ("texture", 1)):
            rows = [k for k, pair in enumerate(fresh) if pair[of_cue] is not None]
            known[name][cue] = rate(int(correct[rows].sum()), len(rows))
            shows = [k for k, pair in enumerate(taught) if pair[of_cue] is not None]
            alone = fit_ridge(features[shows], _labels(taught)[shows], cues.NUM, "loo").predict(test[name][rows])[0]
            known[name][f"{cue}_alone"] = rate(int((alone.numpy() == _labels(fresh)[rows]).sum()), len(rows))
    return decisions, known


def _features(trained: Trained, images: cues.Drawings) -> dict[str, torch.Tensor]:
    """Features (N, width) of the model, and the pixels (N, side^2), averaged to at most 32 x 32."""
    model, pixels, side = [], [], min(images.size, _SIDE)
    for start in range(0, len(images), _AT_ONCE):
        batch = images[start : start + _AT_ONCE]
        model.append(extract(trained.model, batch))
        pixels.append(F.adaptive_avg_pool2d(batch[:, :1], side).flatten(1))
    return {"model": torch.cat(model), "pixels": torch.cat(pixels)}


def _others(
    cfg: Config, made: list[cues.Trial], trained: Trained
) -> dict[str, tuple[NDArray[np.intp], NDArray[np.bool_]]]:
    """Name of another observer -> the trials it judged, and whether it was right in them."""
    if cfg.against is None:
        return {}
    path = Path(cfg.against).expanduser()
    if path.suffix == ".csv":
        place = {trial.name: k for k, trial in enumerate(made)}
        found = {}
        for who, judged in read_decisions(path, place, cues.SHAPES).items():
            rows = np.array([place[name] for name in judged])
            answers = zip(rows, judged.values(), strict=True)
            found[who] = rows, np.array([decision == cues.SHAPES[made[k].shape] for k, decision in answers])
        return found
    other = load(path, images=True)
    _check_size(other)
    other.model.to(next(trained.model.parameters()).device)
    decided = _decisions(other, cfg, made)[0]["model"]
    return {other.weights.run_id: (np.arange(len(made)), decided == [trial.shape for trial in made])}


def _drawings(trained: Trained, cfg: Config, part: int, wanted: Sequence[_Cues | cues.Trial]) -> cues.Drawings:
    pairs = [(one.shape, one.texture) if isinstance(one, cues.Trial) else one for one in wanted]
    return cues.Drawings(pairs, trained.cfg.model.image_size, trained.cfg.model.channels, cfg.seed, part)


def _labels(wanted: list[_Cues]) -> NDArray[np.int64]:
    return np.array([texture if shape is None else shape for shape, texture in wanted])


def _write(folder: Path, made: list[cues.Trial], images: cues.Drawings, names: list[str]) -> None:
    """The trials as PNG files, and last a table of them with the model's decisions."""
    folder.mkdir(parents=True, exist_ok=True)
    for k, trial in enumerate(made):
        pixels = images[k : k + 1][0, 0].add(1).mul(127.5).round().byte().numpy()
        Image.fromarray(pixels).save(folder / trial.name)
    scratch = records.scratch_of(folder / TRIALS)
    with scratch.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("image", "shape", "texture", "decision"))
        for trial, name in zip(made, names, strict=True):
            rows.writerow((trial.name, cues.SHAPES[trial.shape], cues.SHAPES[trial.texture], name))
    scratch.replace(folder / TRIALS)


def _check_size(trained: Trained) -> None:
    size = trained.cfg.model.image_size
    if size < cues.SMALLEST:
        raise ConfigError(f"The model sees {size} pixels; silhouettes need at least {cues.SMALLEST} to be told apart.")


def _short(value: float | None) -> str:
    return "none" if value is None else f"{value:.2f}"
