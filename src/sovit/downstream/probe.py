"""Linear probe: a linear classifier trained by SGD on the pooled features of a frozen model (SoViT, Table 9).

All learning rates and weight decays of the grid train side by side on the same batches, one pass for each number of
epochs. The point with the highest accuracy on the held-out part of train is chosen, the lower loss of equals; the test
part is looked at once, by that point.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from sovit import records
from sovit.config import ConfigError
from sovit.data.order import mix
from sovit.downstream import heads, sets
from sovit.downstream.frozen import features_of
from sovit.downstream.metrics.proportion import share
from sovit.downstream.probe_views import AUGS, augmented, roomy
from sovit.lit.evaluation import extract
from sovit.lit.module import LOSSES
from sovit.lit.trained import Trained
from sovit.schedule import learning_rate_scale
from sovit.strict import nearest

Batch = Callable[[NDArray[np.int64], NDArray[np.uint64]], tuple[Tensor, Tensor]]  # rows, keys: features, targets


@dataclass
class Config:
    name: str = "probe"
    data: str = "digits"
    loss: str = "softmax"
    aug: str = "none"
    flip: bool = False
    mixup: float = 0.0
    standardise: bool = True
    batch_size: int = 128
    lr: list[float] = field(default_factory=lambda: [0.03, 0.1, 0.3, 1.0])
    epochs: list[int] = field(default_factory=lambda: [10, 30, 100])
    weight_decay: list[float] = field(default_factory=lambda: [0.0, 1e-4])
    momentum: float = 0.9
    warmup: float = 0.1
    head_bias: float = 0.0
    heldout: float = 0.1
    seed: int = 0


def check(cfg: Config, trained: Trained) -> None:
    sets.check(cfg.data, trained.cfg)
    for key, choices in (("loss", tuple(LOSSES)), ("aug", AUGS)):
        value = getattr(cfg, key)
        if value not in choices:
            raise ConfigError(f"task.{key}={value!a} is not a choice{nearest(value, choices)}")
    for key in ("lr", "epochs", "weight_decay"):
        values = getattr(cfg, key)
        if not values or len(set(values)) < len(values) or min(values) < (1 if key == "epochs" else 0):
            raise ConfigError(f"task.{key}={values} must hold at least one value, none twice and none below its least.")
    if cfg.aug == "none" and (cfg.mixup or cfg.flip):
        raise ConfigError(
            "task.mixup and task.flip change images, and task.aug=none takes features once; write aug=crop."
        )
    for key, low, high in (("heldout", 0, 1), ("warmup", 0, 1), ("momentum", 0, 1)):
        if not low <= getattr(cfg, key) < high or (key == "heldout" and not cfg.heldout):
            raise ConfigError(
                f"task.{key}={getattr(cfg, key)} must be a share, from 0 and below 1, and heldout above 0."
            )
    if cfg.batch_size < 1 or cfg.mixup < 0 or cfg.seed < 0:
        raise ConfigError("task.batch_size must be at least 1, and task.mixup and task.seed at least 0.")


def depends(trained: Trained, cfg: Config) -> str:
    return sets.fingerprint(cfg.data, trained.cfg)


def run(trained: Trained, cfg: Config, work: Path) -> dict[str, Any]:
    train, test = sets.parts(cfg.data, trained.cfg)
    num_classes, labels = len(train.classes), torch.from_numpy(train.labels)
    out = heads.held_out(train.labels, cfg.heldout, cfg.seed)
    if not out.any():
        raise ConfigError(f"{cfg.data} has one image a class to train on; none can be held out to choose by.")
    kept = np.flatnonzero(~out)
    features = features_of(trained, train.images, work, "train")
    device = next(trained.model.parameters()).device
    mean, std = torch.zeros(1), torch.ones(1)
    if cfg.standardise:
        mean, std = features[kept].mean(0), features[kept].std(0, correction=0) + 1e-5
    seen, seen_labels = (features[torch.from_numpy(out)] - mean) / std, labels[torch.from_numpy(out)]

    grid = list(itertools.product(cfg.lr, cfg.weight_decay))
    images = None if cfg.aug == "none" else roomy(cfg.data, train, trained.cfg, cfg.aug)
    points: list[dict[str, Any]] = []
    best: tuple[tuple[float, float], Tensor, Tensor] | None = None
    for epochs in cfg.epochs:

        def batch(rows: NDArray[np.int64], keys: NDArray[np.uint64]) -> tuple[Tensor, Tensor]:
            where = torch.from_numpy(rows)
            if images is None:
                targets = F.one_hot(labels[where], num_classes).float()
                return ((features[where] - mean) / std).to(device), targets.to(device)
            made, targets = augmented(
                images,
                rows,
                labels[where],
                num_classes,
                keys,
                cfg.aug,
                cfg.flip,
                cfg.mixup,
                trained.cfg.model.image_size,
            )
            return ((extract(trained.model, made) - mean) / std).to(device), targets.to(device)

        weight, bias = _train(cfg, grid, epochs, kept, features.shape[1], num_classes, batch, device, work)
        logits = torch.einsum("nd,gdc->gnc", seen, weight) + bias[:, None]
        for g, (lr, decay) in enumerate(grid):
            right = (logits[g].argmax(1) == seen_labels).float().mean().item()
            loss = F.cross_entropy(logits[g], seen_labels).item()
            loss = loss if math.isfinite(loss) else math.inf
            points.append(
                {
                    "lr": lr,
                    "weight_decay": decay,
                    "epochs": epochs,
                    "heldout_accuracy": right,
                    "heldout_loss": loss if math.isfinite(loss) else None,
                }
            )
            if math.isfinite(loss) and (best is None or (right, -loss) > best[0]):
                best, chosen = ((right, -loss), weight[g], bias[g]), points[-1]
    if best is None:
        raise ConfigError(f"Every point of the grid diverged; give smaller ones than task.lr={cfg.lr}.")
    _, weight, bias = best
    tested = (features_of(trained, test.images, work, "test") - mean) / std
    logits = tested @ weight + bias
    truth = torch.from_numpy(test.labels)
    found = {
        f"top{k}": {**share((logits.topk(k, 1).indices == truth[:, None]).any(1).numpy()), "chance": k / num_classes}
        for k in (1, 5)
        if k < num_classes
    }
    return {
        "dataset": test.name,
        "num_classes": num_classes,
        "num_train": len(kept),
        "num_heldout": int(out.sum()),
        "interval": "95 %, Wilson: test images",
        **found,
        "chosen": chosen,
        "at_edge": _edges(cfg, chosen),
        "grid": points,
    }


def text(result: dict[str, Any]) -> list[str]:
    chosen = result["chosen"]
    lines = [
        f"{result['dataset']}: {result['num_train']:,} images to train on, {result['num_heldout']:,} to choose by, "
        f"{result['top1']['n']:,} to test on"
    ]
    for key in ("top1", "top5"):
        if key in result:
            one = result[key]
            lines.append(
                f"{key}: accuracy {one['value']:.3f} ({one['lo']:.3f} .. {one['hi']:.3f}), chance {one['chance']:.3f}"
            )
    lines.append(
        f"chosen of {len(result['grid'])}: lr={chosen['lr']:g}, weight_decay={chosen['weight_decay']:g}, "
        f"epochs={chosen['epochs']} ({chosen['heldout_accuracy']:.3f} right of the held-out part)"
    )
    if result["at_edge"]:
        lines.append(f"at the end of its range, so widen it: {' and '.join(result['at_edge'])}")
    return lines


def _edges(cfg: Config, chosen: dict[str, Any]) -> list[str]:
    """Keys whose chosen value is the outermost of several, beyond which there may be better ones."""
    ends = {"lr": (min(cfg.lr), max(cfg.lr)), "epochs": (max(cfg.epochs),)}
    return [key for key, outermost in ends.items() if len(getattr(cfg, key)) > 1 and chosen[key] in outermost]


def _train(
    cfg: Config,
    grid: list[tuple[float, float]],
    epochs: int,
    kept: NDArray[np.int64],
    width: int,
    num_classes: int,
    batch: Batch,
    device: torch.device,
    work: Path,
) -> tuple[Tensor, Tensor]:
    """Weights (G, D, C) and biases (G, C) after so many epochs, one for each point of the grid of (lr, weight decay).

    The state is kept after each epoch. Order and augmentation are functions of (seed, epochs, epoch), so a process that
    goes on ends where one that was not killed does.
    """
    weights = [torch.zeros(width, num_classes, device=device, requires_grad=True) for _ in grid]
    biases = [torch.full((num_classes,), cfg.head_bias, device=device, requires_grad=True) for _ in grid]
    groups = [{"params": [w], "lr": lr, "weight_decay": wd} for w, (lr, wd) in zip(weights, grid, strict=True)]
    groups += [{"params": [b], "lr": lr, "weight_decay": 0.0} for b, (lr, _) in zip(biases, grid, strict=True)]
    optimizer = torch.optim.SGD(groups, lr=1.0, momentum=cfg.momentum)
    base = [group["lr"] for group in optimizer.param_groups]
    steps = epochs * -(-len(kept) // cfg.batch_size)
    step = done = 0
    path = work / f"sgd-{epochs}.pt"
    if path.exists():
        state = torch.load(path, weights_only=True, map_location=device)
        step, done = state["step"], state["epoch"]
        optimizer.load_state_dict(state["optimizer"])
        with torch.no_grad():
            for parameter, value in zip([*weights, *biases], state["parameters"], strict=True):
                parameter.copy_(value)
    loss_of = LOSSES[cfg.loss]
    for epoch in range(done, epochs):
        for rows, keys in _batches(kept, cfg.batch_size, int(mix(cfg.seed, epochs, epoch)) >> 1):
            features, targets = batch(rows, keys)
            factor = learning_rate_scale(
                step,
                kind="cosine",
                total_steps=steps,
                warmup_steps=round(cfg.warmup * steps),
                timescale=1,
                cooldown_steps=0,
            )
            for group, lr in zip(optimizer.param_groups, base, strict=True):
                group["lr"] = lr * factor
            optimizer.zero_grad()
            torch.stack(
                [loss_of(features @ w + b, targets) for w, b in zip(weights, biases, strict=True)]
            ).sum().backward()
            optimizer.step()
            step += 1
        if cfg.aug != "none" or epoch == epochs - 1:  # an epoch of features is quicker trained than kept
            state = {"step": step, "epoch": epoch + 1, "optimizer": optimizer.state_dict()}
            state["parameters"] = [parameter.detach() for parameter in [*weights, *biases]]
            scratch = records.scratch_of(path)
            torch.save(state, scratch)
            scratch.replace(path)
    return torch.stack(weights).detach().cpu(), torch.stack(biases).detach().cpu()


def _batches(kept: NDArray[np.int64], size: int, key: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.uint64]]]:
    """An epoch's batches of rows, the last one perhaps smaller, and a number for each image to draw its view by."""
    order = np.random.default_rng(key).permutation(kept)
    for begin in range(0, len(order), size):
        rows = order[begin : begin + size]
        yield rows, mix(key, rows)
