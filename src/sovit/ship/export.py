"""``sovit export``: a trained model as one file, or as a folder that timm, Hugging Face or onnxruntime loads.

What is written is loaded again by the library it is for, and its logits compared with the model's, before it gets its name.
Not here: what the formats are (`timm_model`, `huggingface`, `onnx_file`) and what a card says (`card`).
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sovit import records
from sovit.config import ConfigError
from sovit.lit import checkpoints, trained
from sovit.ship import card as cards
from sovit.ship import huggingface, landing, onnx_file, readme, timm_model, weights

SUFFIXES = (".safetensors", ".ckpt", ".onnx")
FORMATS = ("timm", "huggingface", "onnx")  # of a folder
CARD, README, CONFIG, PREPROCESSOR = "card.json", "README.md", "config.json", "preprocessor_config.json"
OWN = (
    CARD, README, CONFIG, PREPROCESSOR, weights.WEIGHTS, huggingface.CLASSIFIER, onnx_file.GRAPH, f"{onnx_file.GRAPH}.data"
)  # fmt: skip
_CHECKS = {"timm": timm_model.check, "huggingface": huggingface.check}
TOLERANCE = 1e-5  # of the largest logit, or of 1 if that is less; onnxruntime sums in another order
ONNX_TOLERANCE = 1e-4
_NUM_CHECKED = 3


@dataclass(frozen=True)
class About:
    """What the card says that the run does not: see `sovit.ship.card.make`."""

    licence: str | None = None
    fits: Sequence[Path] = ()
    prediction: Path | None = None
    class_list: Path | None = None


def export(
    source: Path,
    out: Path,
    *,
    average: bool | None = None,
    overwrite: bool = False,
    kind: str | None = None,
    about: About | None = None,
) -> str:
    """Write a run's newest sound resume point, or a given one, or an exported file, to ``out``; returns lines that say what.

    ``out`` ends in ``.ckpt``: all of the point, as one process would have written it: a run of one process goes on from it.
    ``.safetensors``: the weights by timm's names with the shape card in the metadata. ``.onnx``: a graph. Otherwise a folder
    of the ``kind`` timm (the default), huggingface or onnx, with ``card.json`` and ``README.md``. ``average`` True for the
    averaged weights, False for the trained ones, None for the averaged ones if there are any. Raises ConfigError, before
    anything is written.
    """
    kind = _kind(out, kind)
    landing.check(out, folder=kind in FORMATS, overwrite=overwrite, own=OWN)
    if kind == ".ckpt":
        return _checkpoint(source, out, about)
    if kind.endswith("onnx"):
        onnx_file.check()
    model = trained.load(source, average=average, images=True)
    if kind in _CHECKS:
        _CHECKS[kind](model.cfg)
    about = about or About()
    card = cards.make(
        model, licence=about.licence, fits=about.fits, prediction=about.prediction, class_list=about.class_list
    )
    with landing.landing(out) as place:
        if kind not in FORMATS:
            said = _file(model, card, place, kind)
        else:
            place.mkdir()
            said = _folder(model, card, place, kind)
    what = model.weights
    total = sum(tensor.numel() for tensor in what.tensors.values())
    head = f"{out}: the {what.kind} weights of {what.run_id} after {what.step:,} steps, {total:,} parameters."
    code = [line.replace(repr(place.name), repr(str(out))) for line in said.code]
    return "\n".join(
        [head, *said.notes, said.checked, *([""] if code else []), *(f"    {line}".rstrip() for line in code)]
    )


@dataclass(frozen=True)
class _Said:
    """What there is to say of something written: Python that loads it, remarks, and how it was checked."""

    code: list[str]
    notes: list[str]
    checked: str


def _kind(out: Path, kind: str | None) -> str:
    if kind is not None and kind not in FORMATS:
        raise ConfigError(f"--format {kind} is not known; use {', '.join(FORMATS)}.")
    if out.suffix in SUFFIXES:
        if kind is not None and out.suffix != f".{kind}":
            raise ConfigError(
                f"--format {kind} is a folder, and {out.name} names a file; leave out {out.suffix}, or the option."
            )
        return out.suffix
    if kind is None and out.suffix:
        raise ConfigError(
            f"{out} ends neither in .safetensors nor in .ckpt nor in .onnx; choose one of these for a file, or say with "
            "--format what kind of folder it is."
        )
    return kind or FORMATS[0]


def _checkpoint(source: Path, out: Path, about: About | None) -> str:
    if about not in (None, About()):
        raise ConfigError(f"{out.name} has no card; leave out --license, --fit, --prediction and --classes.")
    if source.suffix == ".safetensors":
        raise ConfigError(f"{source} holds weights only, of which no run can go on; export the .ckpt from the run.")
    point, content = trained.found(source)
    checkpoints.write(out, content, lambda: None)
    return f"{out}: the whole state of {point} after {content['global_step']:,} steps."


def _file(model: trained.Trained, card: dict[str, Any], path: Path, kind: str) -> _Said:
    if kind == ".onnx":
        onnx_file.write(model.model.float(), _images(model), path, card, beside=False)
        checked = _check("onnxruntime", lambda: onnx_file.load(path), model, ONNX_TOLERANCE)
        return _Said(onnx_file.lines(path.name), [], checked)
    weights.write(model, card, path)
    if card["family"] == "mixer":
        return _Said([], [], "sovit eval reads it.")
    checked = _check("timm", lambda: timm_model.load(model.cfg, path), model, TOLERANCE)
    return _Said(timm_model.lines(model.cfg, path.name, folder=False), [], checked)


def _folder(model: trained.Trained, card: dict[str, Any], place: Path, kind: str) -> _Said:
    cfg, names = model.cfg, card["classes"]["names"]
    library, task, notes = "timm", "image-classification", []
    if kind == "timm":
        records.write_json(place / CONFIG, timm_model.config(cfg, names))
        weights.write(model, card, place / weights.WEIGHTS)
        checked = _check("timm", lambda: timm_model.load(cfg, place / weights.WEIGHTS), model, TOLERANCE)
        code = timm_model.lines(cfg)
        notes = timm_model.notes(cfg)
    elif kind == "huggingface":
        library = "transformers"
        task = "image-feature-extraction" if cfg.model.pool == "map" else task
        dtype = next(model.model.parameters()).dtype
        records.write_json(place / CONFIG, huggingface.config(cfg, names, dtype))
        records.write_json(place / PREPROCESSOR, huggingface.preprocessor(cfg))
        renamed, classifier = huggingface.tensors(model.weights.tensors, cfg)
        weights.write_tensors(renamed, place / weights.WEIGHTS)
        if classifier:
            weights.write_tensors(classifier, place / huggingface.CLASSIFIER)
            notes = [
                f"SiglipVisionModel has no classifier: {huggingface.CLASSIFIER} holds it. A folder of --format timm has it "
                "inside, and transformers loads that too, as TimmWrapperForImageClassification."
            ]
        checked = _check("transformers", lambda: huggingface.load(cfg, place), model, TOLERANCE)
        code = huggingface.lines(cfg)
    else:
        library = "onnx"
        onnx_file.write(model.model.float(), _images(model), place / onnx_file.GRAPH, card, beside=True)
        checked = _check("onnxruntime", lambda: onnx_file.load(place / onnx_file.GRAPH), model, ONNX_TOLERANCE)
        code = onnx_file.lines()
    pixels = f"(B, {cfg.model.channels}, {cfg.model.image_size}, {cfg.model.image_size})"
    code = [f"folder = {place.name!r}  # where README.md lies", f"# pixels: float32 {pixels} in [-1, 1]", *code]
    page = readme.text(card, library=library, task=task, code=code, notes=notes, checked=checked)
    (place / README).write_text(page, encoding="utf-8")
    records.write_json(place / CARD, card)
    return _Said(code, notes, checked)


@torch.no_grad()
def _check(
    library: str, load: Callable[[], Callable[[Tensor], Tensor]], model: trained.Trained, tolerance: float
) -> str:
    """A sentence on the logits of what was written against the model's own. Raises ConfigError if they differ."""
    try:
        version = importlib.metadata.version(library)
        theirs = load()
    except ImportError:
        return f"Not loaded again here, for {library} is not installed."
    pixels = _images(model)
    wanted = model.model.float()(pixels)
    difference = float((theirs(pixels) - wanted).abs().max())
    if not difference <= tolerance * max(1.0, float(wanted.abs().max())):
        raise ConfigError(
            f"{library} {version} computes other logits from the export, by up to {difference:.2g}; nothing was written. "
            "Another version may do; the .safetensors file is right in any case."
        )
    how = f"differ by at most {difference:.1g}" if difference else "are equal"
    return f"Loaded again with {library} {version}: logits of {_NUM_CHECKED} images {how}."


def _images(model: trained.Trained) -> Tensor:
    """Noise in [-1, 1], always the same."""
    size, generator = model.cfg.model.image_size, torch.Generator().manual_seed(0)
    return torch.rand(_NUM_CHECKED, model.cfg.model.channels, size, size, generator=generator) * 2 - 1
