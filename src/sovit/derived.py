"""What follows from a configuration: the shape, what a model is built with, when it is evaluated, names of results.

Importing this module loads no torch.
"""

from __future__ import annotations

from typing import Any

from sovit import duration
from sovit.families import FAMILIES, TEXT, VIT
from sovit.flops import forward_gflops
from sovit.schema import EVAL_TEXTS, RECALL_AT, WAYS, RunConfig
from sovit.shape import NAMED, AnyShape, Shape, num_patches, parse_shape
from sovit.strict import ConfigError


def num_hidden(cfg: RunConfig) -> int:
    """How many patches of an image optim.loss=masked hides: the nearest whole number, a half rounded up."""
    return int(cfg.optim.mask_ratio * num_patches(cfg.model.image_size, shape_of(cfg).patch_size) + 0.5)


def num_outputs(cfg: RunConfig) -> int:
    """What the model's last layer tells: a number for each class or, optim.loss=masked, for each pixel of a patch."""
    if cfg.optim.loss == "masked":
        return cfg.model.channels * shape_of(cfg).patch_size ** 2
    return cfg.data.num_classes


def fewshot_name(dataset: str) -> str:
    """What the results on an entry of eval.datasets are called: the last part of its path."""
    return dataset.rstrip("/").rpartition("/")[2]


def text_results(cfg: RunConfig) -> list[str]:
    """What the results of a text tower's evaluation are called: a name for zero-shot classes, one for each recall."""
    found = []
    for dataset in cfg.eval.datasets:
        name = fewshot_name(dataset)
        stem = name.removesuffix(".json")
        found += [name] if stem == name else []
        if dataset in EVAL_TEXTS or stem != name:
            found += [recall_name(stem, way, k) for way in WAYS for k in RECALL_AT]
    return found


def recall_name(dataset: str, way: str, k: int) -> str:
    """What the recall at k of one way of retrieval is called."""
    return f"{dataset}_{way}_at{k}"


def shape_of(cfg: RunConfig) -> AnyShape:
    """The shape a configuration asks for: `shape`, with single dimensions of `model` put in. Raises ValueError.

    A named shape brings its own heads unless model.num_heads is given, and its patch size when written NAME/PATCH.
    """
    model = cfg.model
    if model.num_heads is not None and model.head_dim is not None:
        raise ConfigError(f"model.num_heads={model.num_heads} and model.head_dim={model.head_dim}: give one of them.")
    if model.family != VIT:
        family = FAMILIES[model.family]
        keys = {key for key in (*family.dimensions, *family.arguments, "patch_size") if key != "head_dim"}
        said = {key: getattr(model, key) for key in keys}
        if model.family == TEXT:
            del said["patch_size"]
            said["length"] = cfg.text.length
        return family.make(cfg.shape, head_dim=model.head_dim, **said)
    text = str(cfg.shape).strip()
    name, slash, _ = text.partition("/")
    patch = None if slash else model.patch_size
    if name in NAMED:
        base = parse_shape(text, num_heads=model.num_heads, patch_size=patch)
        heads = None if model.width is not None and model.head_dim is not None else base.num_heads
    else:
        base = parse_shape(text, num_heads=1, patch_size=patch)
        heads = model.num_heads
    given = (model.width, model.depth, model.mlp_dim)
    width, depth, mlp_dim = (
        own if new is None else new for new, own in zip(given, (base.width, base.depth, base.mlp_dim), strict=True)
    )
    return parse_shape(
        f"{width}x{depth}x{mlp_dim}",
        num_heads=heads,
        head_dim=None if heads is not None else model.head_dim,
        patch_size=base.patch_size,
    )


def vit_shape_of(cfg: RunConfig, what: str) -> Shape:
    """The shape of a ViT. Raises ConfigError for another family, for which there is no ``what``."""
    shape = shape_of(cfg)
    if not isinstance(shape, Shape):
        raise ConfigError(f"model.family={cfg.model.family}: there is no {what} for it yet, only for ViTs.")
    return shape


def model_geometry(cfg: RunConfig) -> dict[str, Any]:
    """The arguments beside the shape that parameters and FLOPs depend on, as sovit.flops takes them."""
    return {
        "image_size": cfg.model.image_size,
        "channels": cfg.model.channels,
        "pool": cfg.text.pool if cfg.model.family == TEXT else cfg.model.pool,
        "num_classes": cfg.data.num_classes,
    }


def model_options(cfg: RunConfig) -> dict[str, Any]:
    """The arguments beyond `model_geometry` that parameters depend on, but not FLOPs, as sovit.flops takes them."""
    if cfg.model.family != VIT:
        return {}
    return {
        "pos_embed": cfg.model.pos_embed,
        "block": cfg.model.block,
        "qk_norm": cfg.model.qk_norm,
        "qkv_bias": cfg.model.qkv_bias,
        "norm": cfg.model.norm,
    }


def eval_steps(cfg: RunConfig) -> dict[int, str]:
    """Training step -> nominal duration of every evaluation, ascending. Raises ConfigError.

    Durations that round to one step are merged (the last label wins). With trainer.max_steps, later ones are left out
    and the run is evaluated at its last step.
    """
    spec = cfg.durations
    spaced = (spec.first, spec.last, spec.num)
    if spec.values is not None and any(value is not None for value in spaced):
        raise ConfigError("durations: give values, or first, last and num, but not both.")
    if spec.values:
        labels = list(spec.values)
    elif spec.first is not None and spec.last is not None and spec.num is not None:
        labels = duration.geometric(spec.first, spec.last, spec.num)
    else:
        raise ConfigError("durations: give values, or all of first, last and num.")
    gflops = forward_gflops(shape_of(cfg), **model_geometry(cfg))
    steps = {
        duration.to_steps(
            duration.parse_duration(label),
            forward_gflops=gflops,
            global_batch_size=cfg.trainer.global_batch_size,
            examples_per_epoch=cfg.data.num_examples,
        ): label
        for label in labels
    }
    last = cfg.trainer.max_steps
    if last is not None and max(steps) > last:
        steps = {step: label for step, label in steps.items() if step <= last}
        steps.setdefault(last, f"{last} steps")
    return dict(sorted(steps.items()))
