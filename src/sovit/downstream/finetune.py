"""Full fine-tuning of a trained model on labelled images: SoViT's recipe (arXiv 2305.13035, table 8).

SGD, a linear warm-up and a cosine, clipped gradients, sigmoid cross-entropy, rates that decay towards the first layer
(timm's `param_groups_layer_decay`), RandAugment, mixup, and positions interpolated to another resolution. Each of
``lr`` is tried; the images held out of the training part choose, and the test part is looked at once, with the model
that was chosen. One process on one device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

from sovit.config import ConfigError
from sovit.data.bad_files import BadFiles
from sovit.data.images import Batch, ImageStream, finish
from sovit.data.stream import StepSampler, make_loader
from sovit.data.views import TrainView
from sovit.downstream import sets
from sovit.downstream.adapted import POSITIONS, adapted, check_size
from sovit.downstream.rates import rate, shown
from sovit.downstream.sets import Labelled
from sovit.downstream.training import Recipe, ResumeFile, train
from sovit.downstream.training_images import Parts, parts
from sovit.lit.evaluation import EVAL_BATCH, EVAL_BYTES
from sovit.lit.module import LOSSES
from sovit.lit.trained import Trained
from sovit.strict import nearest

PRECISIONS = ("32-true", "bf16-mixed")
STARTS = ("trained", "random")
LOOKS = 8  # times that a training is measured on the held-out images


@dataclass
class Config:
    name: str = "finetune"
    data: str = "digits"  # digits | fractals | a folder with a train and a test part
    image_size: int | None = None  # null: the model's own
    start: str = "trained"  # trained | random: the same recipe without pretraining, to compare with
    positions: str = "bilinear"  # at another image_size: bilinear (big_vision's rule) | bicubic (timm's default)
    lr: list[float] = field(default_factory=lambda: [0.03])  # the rates to try
    steps: int = 50_000
    global_batch_size: int = 512
    warmup_steps: int = 500
    clip_norm: float | None = 1.0
    loss: str = "sigmoid"  # sigmoid | softmax
    head_bias: float = -6.9  # the classifier's kernel starts at zero
    layer_decay: float = 0.85  # of the rate, from one layer to the one before it; 1: none
    heldout: float = 0.02  # share of the training part that chooses among the rates
    min_area: float = 0.05  # of a training crop, as a share of the image
    flip: bool = True
    randaugment_ops: int = 0
    randaugment_magnitude: int = 10  # of 30
    mixup: float = 0.0
    seed: int = 0  # order, crops and mixtures; with start=random the weights too
    precision: str = "32-true"  # 32-true | bf16-mixed
    micro_batch: int | None = None  # images in one forward pass; null: the whole batch
    num_workers: int = 0
    checkpoint_every_s: float = 60.0


def check(cfg: Config, trained: Trained) -> None:
    if cfg.data == "???":
        raise ConfigError("task.data has no value; give task.data=FOLDER with a train and a test part.")
    for key, choices in (
        ("start", STARTS),
        ("positions", POSITIONS),
        ("loss", tuple(LOSSES)),
        ("precision", PRECISIONS),
    ):
        if getattr(cfg, key) not in choices:
            raise ConfigError(f"task.{key}={getattr(cfg, key)!a} is not a choice{nearest(getattr(cfg, key), choices)}")
    if not cfg.lr or min(cfg.lr) <= 0 or len(set(cfg.lr)) < len(cfg.lr):
        raise ConfigError(f"task.lr={cfg.lr} must be different positive learning rates.")
    if len(cfg.lr) > 1 and not cfg.heldout:
        raise ConfigError(f"task.heldout=0 leaves nothing to choose among task.lr={cfg.lr} by; give one rate.")
    least = {"steps": 1, "global_batch_size": 1, "warmup_steps": 0, "randaugment_ops": 0, "mixup": 0, "seed": 0}
    for key, low in (least | {"num_workers": 0, "checkpoint_every_s": 0}).items():
        if getattr(cfg, key) < low:
            raise ConfigError(f"task.{key}={getattr(cfg, key)} must be at least {low}.")
    if cfg.warmup_steps >= cfg.steps:
        raise ConfigError(f"task.warmup_steps={cfg.warmup_steps} leaves nothing of task.steps={cfg.steps}.")
    if cfg.clip_norm is not None and cfg.clip_norm <= 0:
        raise ConfigError(f"task.clip_norm={cfg.clip_norm} must be positive, or null.")
    if cfg.micro_batch is not None and cfg.micro_batch < 1:
        raise ConfigError(f"task.micro_batch={cfg.micro_batch} must be at least 1, or null.")
    if not 0 < cfg.layer_decay <= 1:
        raise ConfigError(f"task.layer_decay={cfg.layer_decay} must be above 0 and at most 1.")
    if not 0 <= cfg.heldout < 1:
        raise ConfigError(f"task.heldout={cfg.heldout} must be at least 0 and below 1.")
    if not 0 < cfg.min_area <= 1:
        raise ConfigError(f"task.min_area={cfg.min_area} must be above 0 and at most 1.")
    if not 0 <= cfg.randaugment_magnitude <= 30:
        raise ConfigError(f"task.randaugment_magnitude={cfg.randaugment_magnitude} is not in 0 .. 30.")
    if cfg.mixup and cfg.global_batch_size % 2:
        raise ConfigError(f"task.mixup mixes pairs; task.global_batch_size={cfg.global_batch_size} is odd.")
    size = _size(cfg, trained)
    check_size(trained, size)
    sets.check(cfg.data, _at(trained, size))


def depends(trained: Trained, cfg: Config) -> str:
    return sets.fingerprint(cfg.data, _at(trained, _size(cfg, trained)))


def run(trained: Trained, cfg: Config, work: Path) -> dict[str, Any]:
    """Held-out error of every rate, and the test error of the one chosen, with its 95 % interval and chance."""
    size = _size(cfg, trained)
    found = parts(cfg.data, _at(trained, size), cfg.heldout)
    bad = BadFiles(work if work.is_dir() else None)
    resume = ResumeFile(work / "resume.ckpt", cfg.checkpoint_every_s)
    trials: list[dict[str, Any]] = list(resume.content.get("trials", []))
    model = _model(trained, cfg, size, len(found.test.classes))
    for lr in cfg.lr[len(trials) :]:
        model = _model(trained, cfg, size, len(found.test.classes))
        rows = _trial(model, cfg, lr, found, resume, bad)
        count = errors(model, found.heldout, cfg.precision) if rows[-1]["loss"] is not None else len(found.heldout)
        trial = {
            "lr": lr,
            "diverged": rows[-1]["loss"] is None,
            "heldout": rate(count, len(found.heldout)),
            "curve": rows,
        }
        trials = [*trials, trial]
        best = {"best": model.state_dict()} if _best(trials) == len(trials) - 1 else {}
        resume.write(trials=trials, training=None, **best)
    chosen = trials[_best(trials)]
    if chosen["diverged"]:
        raise ConfigError(f"Fine-tuning diverged with task.lr={cfg.lr}; give lower rates.")
    model.load_state_dict(resume.content["best"])
    counts = np.bincount(found.test.labels, minlength=len(found.test.classes))
    return {
        "dataset": found.test.name,
        "start": cfg.start,
        "image_size": size,
        "num_classes": len(counts),
        "num_train": len(found.train),
        "epochs": cfg.steps * cfg.global_batch_size / len(found.train),
        "lr": chosen["lr"],
        "error": rate(errors(model, found.test, cfg.precision), len(found.test)),
        "interval": "95 %, Wilson: the test images alone, not the luck of a training",
        "chance": 1 - 1 / len(counts),
        "largest_class": 1 - float(counts.max() / counts.sum()),
        "trials": trials,
        "unusable": dict(list(bad.reasons.items())[:100]),
    }


def text(result: dict[str, Any]) -> list[str]:
    lines = [
        f"{result['dataset']} at {result['image_size']} pixels, from {result['start']} weights: {result['num_train']:,} "
        f"images of {result['num_classes']} classes, seen {result['epochs']:.3g} times",
        f"{'lr':>10}  error on the images held out",
    ]
    for trial in result["trials"]:
        mark = "  diverged" if trial["diverged"] else "  chosen" if trial["lr"] == result["lr"] else ""
        lines.append(f"{trial['lr']:>10g}  {shown(trial['heldout'])}{mark}")
    lines.append(
        f"test error {shown(result['error'])} of {result['error']['num']:,} images; chance {result['chance']:.3f}, "
        f"largest class {result['largest_class']:.3f}"
    )
    if result["unusable"]:
        name, reason = next(iter(result["unusable"].items()))
        lines.append(f"{len(result['unusable'])} files could not be used, such as {name} ({reason})")
    return lines


def layer_groups(model: nn.Module, layer_decay: float) -> list[dict[str, Any]]:
    """Groups of parameters with ``lr_scale`` = layer_decay^(layers after theirs): 1 for the classifier and what pools, one
    factor for the last block with the norm after it, one more for each block before, and one more for patch embedding and
    positions."""
    groups = param_groups_layer_decay(model, weight_decay=0.0, layer_decay=layer_decay)
    return [{"params": group["params"], "lr_scale": group["lr_scale"]} for group in groups]


@torch.no_grad()
def errors(model: nn.Module, labelled: Labelled, precision: str = "32-true") -> int:
    """How many images the model puts into a wrong class."""
    model.eval()
    device, images, wrong = next(model.parameters()).device, labelled.images, 0
    if not len(labelled):
        return 0
    size = min(EVAL_BATCH, max(16, EVAL_BYTES // (4 * images[0:1].numel())))
    for start in range(0, len(labelled), size):
        with _precision(device, precision):
            predicted = model(images[start : start + size].to(device)).argmax(-1).cpu().numpy()
        wrong += int((predicted != labelled.labels[start : start + size]).sum())
    return wrong


def _trial(
    model: nn.Module, cfg: Config, lr: float, found: Parts, resume: ResumeFile, bad: BadFiles
) -> list[dict[str, Any]]:
    device = next(model.parameters()).device
    num_classes, channels = len(found.test.classes), found.test.images[0:1].shape[1]
    view = TrainView(
        found.test.images[0:1].shape[-1],
        channels,
        cfg.min_area,
        cfg.flip,
        cfg.randaugment_ops,
        cfg.randaugment_magnitude,
    )
    stream = ImageStream(found.train, view, cfg.seed, group=16, mixup=cfg.mixup)
    loss_of = LOSSES[cfg.loss]

    def batches(step: int) -> Iterator[tuple[Tensor, Tensor]]:
        sampler = StepSampler(cfg.global_batch_size, step, cfg.steps)
        for batch in make_loader(stream, sampler, cfg.num_workers, pin_memory=device.type == "cuda"):
            for name, reason in batch.bad:
                bad.note(name, reason)
            yield finish(Batch(*(part.to(device) for part in batch[:3]), *batch[3:]), num_classes)

    def losses(batch: tuple[Tensor, Tensor]) -> Iterable[Tensor]:
        images, labels = batch
        model.train()
        size = cfg.micro_batch or len(images)
        for x, y in zip(images.split(size), labels.split(size), strict=True):
            with _precision(device, cfg.precision):
                logits = model(x)
            yield loss_of(logits.float(), y) * (len(x) / len(images))

    def look() -> dict[str, Any]:
        return {"heldout_error": rate(errors(model, found.heldout, cfg.precision), len(found.heldout))["value"]}

    recipe = Recipe(lr, cfg.steps, cfg.warmup_steps, cfg.clip_norm)
    look_at = {round(cfg.steps * k / LOOKS) for k in range(1, LOOKS + 1)}
    groups = layer_groups(model, cfg.layer_decay)
    return train(model, groups, recipe, batches, losses, resume, "training", look_at=look_at, look=look)


def _best(trials: list[dict[str, Any]]) -> int:
    """The first of those with the fewest errors on the held-out images, one that diverged last."""
    return min(range(len(trials)), key=lambda k: (trials[k]["diverged"], trials[k]["heldout"]["value"] or 0, k))


def _model(trained: Trained, cfg: Config, size: int, num_classes: int) -> nn.Module:
    model = adapted(
        trained,
        image_size=size,
        num_classes=num_classes,
        head_bias=cfg.head_bias,
        positions=cfg.positions,
        seed=cfg.seed if cfg.start == "random" else None,
    )
    return model.to(next(trained.model.parameters()).device)


def _precision(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext() if precision == "32-true" else torch.autocast(device.type, torch.bfloat16)


def _size(cfg: Config, trained: Trained) -> int:
    return trained.cfg.model.image_size if cfg.image_size is None else cfg.image_size


def _at(trained: Trained, size: int) -> Any:
    return replace(trained.cfg, model=replace(trained.cfg.model, image_size=size))
