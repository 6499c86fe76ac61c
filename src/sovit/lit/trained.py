"""A trained model from what a run left, or from a file that `sovit export` wrote. What it is used for stands elsewhere."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from timm.models.mlp_mixer import MlpMixer
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer

from sovit import records
from sovit.config import ConfigError, RunConfig, from_mapping
from sovit.derived import shape_of
from sovit.families import TEXT
from sovit.lit import checkpoints, sharded
from sovit.lit.fit import build_model
from sovit.lit.locked import Locked, locked_of
from sovit.shape import AnyShape


@dataclass(frozen=True)
class Weights:
    """The model's tensors by timm's names, ``kind`` of them (``average`` or ``trained``) after ``step`` steps; ``config``
    is the run's, as in run.json."""

    source: Path
    tensors: dict[str, torch.Tensor]
    kind: str
    step: int
    config: dict[str, Any]
    run_id: str
    beside: dict[str, Any] = field(default_factory=dict)  # of a text tower: what its record says it was trained against


@dataclass(frozen=True)
class Trained:
    """A model in evaluation mode on the CPU with the weights that were asked for, and where they come from.

    ``locked``: of a text tower, the image tower and the vocabulary it was trained with.
    """

    model: VisionTransformer | MlpMixer | SwinTransformer
    cfg: RunConfig
    weights: Weights
    locked: Locked | None = None

    @property
    def shape(self) -> AnyShape:
        return shape_of(self.cfg)


def load(source: Path, *, average: bool | None = None, images: bool = False) -> Trained:
    """The model of a run's folder (its newest sound resume point), of a resume point, or of an exported .safetensors.

    ``average``: True for the averaged weights, False for those trained, None for the averaged ones if there are any.
    ``images``: refuse a text tower. Raises ConfigError, also for a text tower whose image tower or vocabulary is another
    now.
    """
    weights = read(source, average=average)
    cfg = from_mapping(weights.config)
    if images and cfg.model.family == TEXT:
        raise ConfigError(
            f"{source} is a text tower (model.family=text), and this is for models of images; sovit eval has task=zeroshot "
            "and task=retrieval for it."
        )
    locked = locked_of(cfg)
    if locked is not None:
        locked.check(weights.beside, weights.run_id)
    with torch.device("meta"):
        model = build_model(cfg, locked)
    # Fixed positions are a buffer that is in the state, so nothing is left on the meta device.
    try:
        model.load_state_dict(weights.tensors, assign=True)
    except RuntimeError as error:
        wrong = str(error).splitlines()[-1].strip()
        raise ConfigError(f"{source} does not hold the model that its configuration describes: {wrong}") from None
    return Trained(model.eval().requires_grad_(False), cfg, weights, locked)  # type: ignore[arg-type]


def read(source: Path, *, average: bool | None = None) -> Weights:
    """The weights alone, without building the model; arguments and errors as those of :func:`load`."""
    if source.suffix == ".safetensors" and source.is_file():
        return _exported(source, average)
    point, content = found(source)
    record = records.read_run(point.parent)
    if not record:
        raise ConfigError(f"{point} has no {records.RUN} beside it, which says what model it is; keep them together.")
    tensors, kind = tensors_of(content, point, average)
    beside: dict[str, Any] = {key: record[key] for key in ("encoder", "vocabulary") if key in record}
    config = records.with_younger(record["config"])
    return Weights(point, tensors, kind, content["global_step"], config, record["run_id"], beside)


def tensors_of(content: dict[str, Any], point: Path, average: bool | None) -> tuple[dict[str, torch.Tensor], str]:
    """The model's tensors in the content of a resume point, and which they are. Raises ConfigError."""
    averages = content["callbacks"].get("Ema", {})
    if average and not averages:
        raise ConfigError(
            f"{point} holds no averaged weights (eval.weights=ema makes them); ask for --weights trained."
        )
    tensors = {name.removeprefix(sharded.MODEL): tensor for name, tensor in content["state_dict"].items()}
    if averages and average is not False:
        return tensors | averages, "average"
    return tensors, "trained"


def found(source: Path) -> tuple[Path, dict[str, Any]]:
    """The resume point that is meant, and its content. Raises ConfigError."""
    if not source.exists():
        raise ConfigError(f"{source} is not there; give a run's folder or one of its resume points.")
    run = source.is_dir() and not (source / sharded.INDEX).exists() and source.suffix != ".ckpt"
    points = [source / point.name for point in reversed(checkpoints.resume_points(source))] if run else [source]
    if not points:
        if exported := sorted(source.glob("*.safetensors")):
            raise ConfigError(f"{source} is no run's folder; for what sovit export wrote there give {exported[0]}.")
        if any(source.glob(f"*/{records.RUN}")):
            raise ConfigError(f"{source} is the folder of a sweep; give that of one of its runs.")
        raise ConfigError(
            f"{source} holds no resume point; those of a finished run are kept with trainer.keep_checkpoint=true."
        )
    reasons = []
    for point in points:
        try:
            content = checkpoints.whole(point) if point.is_dir() else checkpoints.read(point)
            if checkpoints.KEY not in content:
                raise checkpoints.Unusable("it is no checkpoint of a run")
            return point, content
        except (checkpoints.Unusable, sharded.Damaged) as error:
            reasons.append(f"{point.name}: {error}")
    raise ConfigError(f"{source} cannot be read: {'; '.join(reasons)}.")


def _exported(path: Path, average: bool | None) -> Weights:
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ConfigError(f"{path} is no sound .safetensors file: {error}.") from None
    try:
        config, kind, step = json.loads(about["config"]), about["weights"], int(about["step"])
    except (KeyError, ValueError):
        raise ConfigError(
            f"{path} does not say what model it holds; write it with sovit export RUN {path.name}."
        ) from None
    if average is not None and average != (kind == "average"):
        raise ConfigError(f"{path} holds the {kind} weights only; export the others from the run.")
    return Weights(path, tensors, kind, step, records.with_younger(config), about.get("run_id", path.stem))
