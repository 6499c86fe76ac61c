"""What a configuration must be beyond its types: choices, signs, shapes, and keys that would have no effect.

Reads no file of the user's. Importing this module loads no torch.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from sovit.derived import eval_steps, fewshot_name, num_hidden, shape_of, text_results
from sovit.families import ARGUMENTS, EXAMPLES, FAMILIES, TEXT, VIT
from sovit.flops import check_pos_embed
from sovit.metric import is_multitask
from sovit.schedule import segments
from sovit.schema import (
    CHOICES,
    DECODER_HEADS,
    EVAL_DATASETS,
    EVAL_TEXTS,
    KEYS_OF_DECODER,
    KEYS_OF_FILES,
    KEYS_OF_LOSS,
    KEYS_OF_PAIRS,
    LARGEST_EMBEDDED,
    NOT_NEGATIVE,
    PAIRS,
    POSITIVE,
    RANGES,
    DataConfig,
    EvalConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    TextConfig,
)
from sovit.shape import num_patches
from sovit.strict import ConfigError, nearest, shown


def check(cfg: RunConfig) -> None:
    """Raise ConfigError for values the types cannot exclude: choices, signs, impossible shapes and durations."""
    values = _flat(dataclasses.asdict(cfg))
    for key, choices in CHOICES.items():
        if values[key] not in choices:
            raise ConfigError(f"{key}={shown(values[key])} is not a choice{nearest(values[key], choices)}")
    for key in POSITIVE:
        if not values[key] > 0:
            raise ConfigError(f"{key}={values[key]} must be positive.")
    for key in NOT_NEGATIVE:
        if not values[key] >= 0:
            raise ConfigError(f"{key}={values[key]} must not be negative.")
    for key, (low, high) in RANGES.items():
        if not low <= values[key] < high:
            raise ConfigError(f"{key}={values[key]} must be at least {low} and below {high}.")
    for key in ("eval.datasets", "eval.shots"):
        if not values[key] or len(set(values[key])) < len(values[key]):
            raise ConfigError(f"{key}={values[key]} must name at least one, and none twice.")
    for key, pattern in (("name", r"[A-Za-z0-9_+][A-Za-z0-9_.+]*"), ("tag", r"[A-Za-z0-9_.+]*")):
        if not re.fullmatch(pattern, values[key]) or len(values[key]) > 80:
            raise ConfigError(
                f"{key}={values[key]!a} becomes part of a file name; use at most 80 letters, digits, '_', '.' and '+'"
                + (", no '.' first." if values[key].startswith(".") and key == "name" else ".")
            )
    if not cfg.runs_dir.strip():
        raise ConfigError("runs_dir is empty; give the folder that the records of all sweeps go to, such as runs.")
    family = FAMILIES[cfg.model.family]
    example = "x".join(r"[1-9]\d*" for _ in family.dimensions)
    if cfg.center is not None and not (re.fullmatch(example, cfg.center) or cfg.center in family.named):
        such = "x".join(map(str, EXAMPLES[family.name]))
        raise ConfigError(f"center={cfg.center!a} is no shape; write {family.form} such as {such}, or null.")
    check_family(cfg)
    if not re.fullmatch(r"[A-Za-z0-9_.+-]*", cfg.retry_of):
        raise ConfigError(f"retry_of={cfg.retry_of!a} is no run id; leave it empty.")
    check_text(cfg)
    check_data(cfg)
    check_objective(cfg)
    check_metric(cfg)
    if min(cfg.eval.shots) < 1:
        raise ConfigError(f"eval.shots={cfg.eval.shots} needs whole numbers of at least 1.")
    if isinstance(cfg.eval.l2_reg, str) and cfg.eval.l2_reg != "loo":
        raise ConfigError(f"eval.l2_reg={cfg.eval.l2_reg!a} is neither a number nor 'loo'.")
    if not isinstance(cfg.eval.l2_reg, str) and not cfg.eval.l2_reg > 0:
        raise ConfigError(f"eval.l2_reg={cfg.eval.l2_reg} must be positive.")
    if cfg.trainer.max_steps is not None and cfg.trainer.max_steps < 1:
        raise ConfigError(f"trainer.max_steps={cfg.trainer.max_steps} must be at least 1, or null.")
    if cfg.optim.clip_norm is not None and not cfg.optim.clip_norm > 0:
        raise ConfigError(f"optim.clip_norm={cfg.optim.clip_norm} must be positive, or null to switch clipping off.")
    if cfg.optim.diverged_above is not None and not cfg.optim.diverged_above > 1:
        raise ConfigError(
            f"optim.diverged_above={cfg.optim.diverged_above} must be above 1, or null to look for nan and inf only."
        )
    try:
        shape = shape_of(cfg)
        num_patches(cfg.model.image_size, shape.patch_size)
        check_pos_embed(cfg.model.pos_embed, shape.width)
        steps = list(eval_steps(cfg))
        segments(steps, cfg.eval.weights, cfg.schedule.cooldown)  # type: ignore[arg-type]
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from None
    check_parallel(cfg.parallel, cfg.trainer.global_batch_size, cfg.trainer.precision)
    if cfg.schedule.kind == "cosine" and len(steps) > 1:
        raise ConfigError("schedule.kind=cosine bends towards one duration; for several use rsqrt or constant.")


def check_family(cfg: RunConfig) -> None:
    """Raise ConfigError for a key of ``model`` that its family does not read, and for what is for ViTs only."""
    model, family, default = cfg.model, FAMILIES[cfg.model.family], ModelConfig()
    for key in ARGUMENTS:
        value = getattr(model, key)
        if key not in family.arguments and value != getattr(default, key):
            readers = " and ".join(other.name for other in FAMILIES.values() if key in other.arguments)
            raise ConfigError(
                f"model.{key}={value} has no effect on model.family={family.name}; it is for {readers}, "
                f"so write {'null' if getattr(default, key) is None else getattr(default, key)}."
            )
    if family.name in (VIT, TEXT):
        return
    if cfg.parallel.kind == "fsdp":
        raise ConfigError(
            f"parallel.kind=fsdp is for model.family=vit; with {family.name} write parallel=single or parallel=ddp."
        )
    if cfg.parallel.checkpointing in ("selective", "full"):
        raise ConfigError(
            f"parallel.checkpointing={cfg.parallel.checkpointing} is for model.family=vit; write auto or none."
        )
    if cfg.parallel.compile:
        raise ConfigError("parallel.compile=true is for model.family=vit; write null or false.")


def check_text(cfg: RunConfig) -> None:
    """Raise ConfigError for keys of ``text`` or ``model`` without an effect, or a tower without its encoder."""
    text, model, default = cfg.text, cfg.model, TextConfig()
    if model.family != TEXT:
        for key, value in vars(text).items():
            if value != getattr(default, key):
                raise ConfigError(
                    f"text.{key}={value} has no effect on model.family={model.family}; write model=text_tiny."
                )
        if cfg.data.name in PAIRS:
            raise ConfigError(
                f"data={cfg.data.name} gives texts with its images, for model.family=text; choose other data."
            )
        return
    for key in ("patch_size", "pool", "pos_embed", "head_bias", "drop_path_rate"):
        usual = getattr(ModelConfig(), key)
        if getattr(model, key) != usual:
            raise ConfigError(
                f"model.{key}={getattr(model, key)} has no effect on model.family=text; "
                f"write {'null' if usual is None else usual}."
            )
    for key in ("shots", "num_draws"):
        usual = getattr(EvalConfig(), key)
        if getattr(cfg.eval, key) != usual:
            raise ConfigError(
                f"eval.{key}={getattr(cfg.eval, key)} has no effect on model.family=text, which is judged without a fit; "
                f"write {usual}."
            )
    names = text_results(cfg)
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ConfigError(f"eval.datasets={cfg.eval.datasets}: two results would be called {twice}; rename a file.")
    if cfg.data.name not in PAIRS:
        raise ConfigError(
            f"data={cfg.data.name} has no texts; with model.family=text write data=scenes, pairs or coco."
        )
    if not (text.encoder or "").strip():
        raise ConfigError(
            "text.encoder has no value; model.family=text needs a run's folder that keeps its last resume point "
            "(trainer.keep_checkpoint=true), or a .safetensors that sovit export wrote."
        )
    if cfg.optim.loss not in ("softmax", "sigmoid"):
        raise ConfigError(
            f"optim.loss={cfg.optim.loss} is for images; with model.family=text write softmax or sigmoid."
        )
    if cfg.optim.loss == "softmax" and text.init_bias != default.init_bias:
        raise ConfigError(
            f"text.init_bias={text.init_bias} has no effect on optim.loss=softmax; write {default.init_bias}."
        )
    if cfg.eval.multitask:
        raise ConfigError("metric=multitask judges the tokens of images; with model.family=text write metric=fewshot.")
    if text.tower is not None and text.pool != default.pool:
        raise ConfigError(
            f"text.pool={text.pool} has no effect on text.tower, which has its own way; write {default.pool}."
        )
    if text.tower is not None and not text.locked and cfg.optim.lr_rule == "by_shape":
        raise ConfigError(
            "optim.lr_rule=by_shape knows the matrices of sovit's own towers, not those of text.tower; "
            "write optim.lr_rule=constant."
        )
    if text.locked and text.tower is None:
        raise ConfigError("text.locked=true would keep a tower as it was drawn; give text.tower, or write false.")
    if text.length < 2:
        raise ConfigError(f"text.length={text.length} leaves no token beside the end of a text; write at least 2.")


def check_data(cfg: RunConfig) -> None:
    """Raise ConfigError for images that cannot be, as far as the configuration alone tells. Reads no file."""
    data, size = cfg.data, cfg.model.image_size
    embedded = data.name in ("fractals", "scenes")
    default = DataConfig()
    for key in KEYS_OF_FILES:
        if data.name == "fractals" and getattr(data, key) != getattr(default, key):
            raise ConfigError(
                f"data.{key}={getattr(data, key)} has no effect on data=fractals; write data=imagefolder, data=webdataset "
                "or data=hf."
            )
        if data.name in PAIRS and key not in _OF_PAIRS[data.name] and getattr(data, key) != getattr(default, key):
            raise ConfigError(
                f"data.{key}={getattr(data, key)} has no effect on data={data.name}, whose images come as an evaluation "
                f"sees them; write {_plain(getattr(default, key))}."
            )
    for key, readers in KEYS_OF_PAIRS.items():
        if data.name not in readers and getattr(data, key) is not None:
            raise ConfigError(
                f"data.{key}={getattr(data, key)} has no effect on data={data.name}; it is for {' and '.join(readers)}, so "
                "write null."
            )
    if data.name == "scenes" and data.num_examples is None:
        raise ConfigError("data.num_examples has no value; data=scenes needs to know how many scenes to draw.")
    if data.num_examples is not None and data.num_examples < 1:
        raise ConfigError(f"data.num_examples={data.num_examples} must be at least 1.")
    if data.name == "coco" and not (data.captions or "").strip():
        raise ConfigError("data.captions has no value; data=coco needs the JSON file of its captions.")
    if not embedded and not (data.root or "").strip():
        raise ConfigError(f"data.root has no value; data={data.name} needs the folder of its images.")
    if not embedded and data.name not in PAIRS and data.num_classes < 2:
        raise ConfigError(f"data.num_classes={data.num_classes} leaves nothing to tell apart; a classifier needs two.")
    if not embedded and cfg.model.channels not in (1, 3):
        raise ConfigError(f"model.channels={cfg.model.channels} is not for images in files; write 3, or 1 for grey.")
    if data.min_area > 1:
        raise ConfigError(f"data.min_area={data.min_area} is a share of the image; write at most 1.")
    if data.mixup and cfg.trainer.global_batch_size % 2:
        raise ConfigError(f"data.mixup mixes pairs; trainer.global_batch_size={cfg.trainer.global_batch_size} is odd.")
    if size > LARGEST_EMBEDDED and (embedded or {"fractals", "scenes"} & set(cfg.eval.datasets)):
        raise ConfigError(
            f"model.image_size={size} is above {LARGEST_EMBEDDED}, the largest size of the embedded images; write a "
            "smaller one, or use images of your own for data and eval.datasets."
        )
    names: dict[str, str] = {}
    known = EVAL_TEXTS if cfg.model.family == TEXT else EVAL_DATASETS
    for dataset in cfg.eval.datasets:
        if dataset not in known and "/" not in dataset:
            raise ConfigError(
                f"eval.datasets: {dataset!a} is not known{nearest(dataset, known).rstrip('.?')}? "
                "Or write the path of a folder, with a slash."
            )
        name = fewshot_name(dataset)
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,79}", name):
            raise ConfigError(
                f"eval.datasets: the last part of {dataset!a} becomes the name of its results; use letters, digits, '_', "
                "'.', '+' and '-'."
            )
        if name in names:
            raise ConfigError(
                f"eval.datasets: {names[name]} and {dataset} would both be called {name}; rename a folder."
            )
        names[name] = dataset


_OF_PAIRS = {  # keys of files that the kinds of pairs read
    "scenes": (),
    "pairs": ("root", "split", "image_key", "shuffle_shards"),
    "coco": ("root",),
}


def _plain(value: Any) -> str:
    return {None: "null", True: "true", False: "false"}.get(value, str(value))


def check_objective(cfg: RunConfig) -> None:
    """Raise ConfigError for an objective that has no meaning here. Reads no file: what a teacher is shows at the start."""
    optim, default = cfg.optim, OptimConfig()
    for key, loss in KEYS_OF_LOSS.items():
        value = getattr(optim, key)
        if value != getattr(default, key) and optim.loss != loss:
            raise ConfigError(f"optim.{key}={value} has no effect on optim.loss={optim.loss}; write optim.loss={loss}.")
    if optim.loss == "distilled" and not (optim.teacher or "").strip():
        raise ConfigError(
            "optim.teacher has no value; optim.loss=distilled needs a run's folder that keeps its last resume point "
            "(trainer.keep_checkpoint=true), or a .safetensors that sovit export wrote."
        )
    if optim.loss != "masked":
        return
    if cfg.model.family != VIT:
        raise ConfigError(
            f"optim.loss=masked is for model.family=vit; model.family={cfg.model.family} has no patch tokens."
        )
    if cfg.model.pool != "avg":
        raise ConfigError(
            f"optim.loss=masked trains patch tokens, and model.pool={cfg.model.pool} would be left as it was drawn; "
            "write model.pool=avg."
        )
    if cfg.data.mixup:
        raise ConfigError(f"data.mixup={cfg.data.mixup} mixes labels, which optim.loss=masked does not read; write 0.")
    try:
        found = num_patches(cfg.model.image_size, shape_of(cfg).patch_size)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if not 1 <= num_hidden(cfg) < found:
        raise ConfigError(
            f"optim.mask_ratio={optim.mask_ratio} of {found} patches hides none or all of them; "
            "choose it so that some are hidden and some are seen."
        )


def check_metric(cfg: RunConfig) -> None:
    """Raise ConfigError for an image-to-text metric that cannot be, and for its keys where it is not asked for."""
    default = EvalConfig()
    for key in KEYS_OF_DECODER if not cfg.eval.multitask else ():
        value = getattr(cfg.eval, key)
        if value != getattr(default, key):
            raise ConfigError(f"eval.{key}={value} has no effect without a decoder; write metric=multitask.")
    for dataset in cfg.eval.datasets if cfg.eval.multitask or cfg.model.family == TEXT else ():
        if is_multitask(fewshot_name(dataset)):
            raise ConfigError(
                f"eval.datasets: {dataset!a} would be called as the results of metric=multitask are; rename the folder."
            )
    if not cfg.eval.multitask:
        return
    if cfg.eval.decoder_width % DECODER_HEADS:
        raise ConfigError(
            f"eval.decoder_width={cfg.eval.decoder_width} is not divisible by the {DECODER_HEADS} heads of a decoder."
        )
    if cfg.model.image_size > LARGEST_EMBEDDED:
        raise ConfigError(
            f"model.image_size={cfg.model.image_size} is above {LARGEST_EMBEDDED}, the largest size of the embedded scenes "
            "that metric=multitask shows; write a smaller one, or metric=fewshot."
        )


def check_parallel(parallel: ParallelConfig, global_batch_size: int, precision: str) -> None:
    """Raise ConfigError for a spread over devices that cannot be. ``devices`` null is settled where the run starts."""
    for key in ("devices", "shard", "micro_batch"):
        value = getattr(parallel, key)
        if value is not None and value < 1:
            raise ConfigError(f"parallel.{key}={value} must be at least 1, or null.")
    world = (parallel.devices or 1) * parallel.nodes
    if parallel.kind == "single" and world > 1:
        raise ConfigError(
            f"parallel.kind=single is one process, but parallel.devices x parallel.nodes = {world}; "
            "write parallel=ddp or parallel=fsdp."
        )
    if global_batch_size % world:
        raise ConfigError(
            f"trainer.global_batch_size={global_batch_size} does not divide among {world} processes; "
            "choose parallel.devices and parallel.nodes so that it does."
        )
    if parallel.devices and parallel.micro_batch and (global_batch_size // world) % parallel.micro_batch:
        raise ConfigError(
            f"parallel.micro_batch={parallel.micro_batch} does not divide the {global_batch_size // world} images that "
            f"each of {world} processes gets of trainer.global_batch_size={global_batch_size}."
        )
    if parallel.shard is not None and parallel.kind != "fsdp":
        raise ConfigError(
            f"parallel.shard={parallel.shard} has no effect on parallel.kind={parallel.kind}; write null."
        )
    if parallel.shard is not None and parallel.devices and world % parallel.shard:
        raise ConfigError(f"parallel.shard={parallel.shard} does not divide the {world} processes.")
    if parallel.kind == "fsdp" and precision in ("16-mixed", "16-true"):
        raise ConfigError(
            f"trainer.precision={precision} is not for parallel=fsdp; write trainer.precision=bf16-mixed."
        )


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
