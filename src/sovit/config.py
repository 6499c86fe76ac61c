"""The configuration: every schema dataclass, and the way from Hydra's YAML to checked plain values.

`compose` runs Hydra over ``conf/``; `resolve` checks names, types and missing values against the dataclasses below and
returns them filled in. Nobody else in the package sees OmegaConf. Importing this module loads no torch.
"""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sovit import duration
from sovit.flops import check_pos_embed, forward_gflops
from sovit.overrides import check_input, groups_of
from sovit.schedule import segments
from sovit.shape import NAMED, Shape, num_patches, parse_shape
from sovit.strict import ConfigError, build, keys_of, nearest, shown

REPOSITORY = Path(__file__).resolve().parents[2]
CONF_DIR = REPOSITORY / "conf"


# The annotations below are Optional[...] and Union[...] because OmegaConf reads them at run time.


@dataclass
class ModelConfig:
    """The vision transformer apart from its shape, and single dimensions to replace in the shape."""

    width: int | None = None  # replaces the width of `shape`; so do depth and mlp_dim
    depth: int | None = None
    mlp_dim: int | None = None
    num_heads: int | None = None  # give num_heads or head_dim; a named shape brings its own heads
    head_dim: int | None = None
    patch_size: int | None = None
    image_size: int = 224
    channels: int = 3
    pool: str = "map"  # map | avg | token
    pos_embed: str = "learned"  # learned | sincos2d
    init: str = "big_vision"  # big_vision | fan_in
    head_bias: float = 0.0
    drop_path_rate: float = 0.0


@dataclass
class DataConfig:
    """The embedded procedural images. Image i of a stream is a pure function of (seed, i)."""

    name: str = "fractals"
    seed: int = 0  # which categories exist; the run's seed picks the stream of images
    num_classes: int = 256
    num_heldout: int = 64
    rotation: float = 1.57  # radians at full jitter: the knob for how hard the task is
    num_workers: int = 0


@dataclass
class OptimConfig:
    """Optimiser and the learning-rate rule across shapes (see sovit.optim)."""

    name: str = "adamw"  # adamw | adafactor
    loss: str = "softmax"  # softmax | sigmoid
    lr: float = 1e-3
    lr_rule: str = "constant"  # constant | by_shape
    base_width: int = 64  # lr_rule=by_shape: the shape whose matrices train at exactly `lr`
    base_depth: int = 4
    base_mlp_dim: int = 128
    beta1: float = 0.9
    beta2: float = 0.999
    weight_decay: float = 0.0
    head_weight_decay: float = 0.0
    clip_norm: float | None = 1.0
    diverged_above: float | None = (
        10.0  # a loss above so many times the first step's ends a run; null: only nan and inf
    )


@dataclass
class ScheduleConfig:
    """Learning-rate schedule over steps (see sovit.schedule)."""

    kind: str = "rsqrt"  # rsqrt | constant | cosine
    warmup_steps: int = 0
    timescale: int = 10_000
    cooldown: float = 0.0  # of a branch: steps, or a fraction of its duration if below 1


@dataclass
class DurationsConfig:
    """When to evaluate: explicit values, or `num` geometrically spaced from `first` to `last`, in any unit."""

    values: list[str] | None = None
    first: str | None = None
    last: str | None = None
    num: int | None = None


@dataclass
class EvalConfig:
    """Few-shot evaluation (see sovit.fewshot)."""

    datasets: list[str] = field(default_factory=lambda: ["fractals", "digits"])
    shots: list[int] = field(default_factory=lambda: [1, 5, 10, 25])
    num_draws: int = 3
    l2_reg: float | str = 1024.0  # a ridge value, or "loo": leave-one-out on the support set
    weights: str = "ema"  # ema | cooled | trunk
    ema_horizon: float = 0.1  # averaging window as a share of the steps so far


@dataclass
class TrainerConfig:
    accelerator: str = "auto"  # auto | cpu | gpu
    precision: str = "32-true"
    num_threads: int = 1
    global_batch_size: int = 128
    max_steps: int | None = None  # stop early; longer durations are left out
    log_every_n_steps: int = 50
    checkpoint_every_s: float = 20.0
    keep_checkpoint: bool = False  # keep the last resume point of a finished run


@dataclass
class LoggerConfig:
    name: str = "wandb"  # wandb | none; the local files are written in either case
    project: str = "sovit"
    entity: str | None = None
    mode: str = "auto"  # auto (online when logged in, else offline) | online | offline
    init_timeout_s: int = 10


@dataclass
class RunConfig:
    """Everything one run depends on."""

    name: str = "run"  # the sweep's name; its records go to <runs_dir>/<name>
    shape: str = "32x4x128"  # WIDTHxDEPTHxMLP or NAME[/PATCH]
    seed: int = 0
    tag: str = ""  # told apart in the run id, for cells that differ in more than shape and seed
    runs_dir: str = "runs"
    center: str | None = None  # the shape a star varies around; tells its arms apart in W&B, changes no number
    retry_of: str = ""  # run id of the diverged run that this one repeats at a lower learning rate
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    durations: DurationsConfig = field(default_factory=DurationsConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)


CHOICES: dict[str, tuple[str, ...]] = {
    "model.pool": ("map", "avg", "token"),
    "model.pos_embed": ("learned", "sincos2d"),
    "model.init": ("big_vision", "fan_in"),
    "data.name": ("fractals",),
    "optim.name": ("adamw", "adafactor"),
    "optim.loss": ("softmax", "sigmoid"),
    "optim.lr_rule": ("constant", "by_shape"),
    "schedule.kind": ("rsqrt", "constant", "cosine"),
    "eval.weights": ("ema", "cooled", "trunk"),
    "trainer.accelerator": ("auto", "cpu", "gpu"),
    "trainer.precision": ("32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true", "64-true"),
    "logger.name": ("wandb", "none"),
    "logger.mode": ("auto", "online", "offline"),
}
POSITIVE = (
    "model.image_size",
    "model.channels",
    "data.num_classes",
    "data.num_heldout",
    "optim.lr",
    "optim.base_width",
    "optim.base_depth",
    "optim.base_mlp_dim",
    "schedule.timescale",
    "eval.num_draws",
    "eval.ema_horizon",
    "trainer.num_threads",
    "trainer.global_batch_size",
    "trainer.log_every_n_steps",
    "trainer.checkpoint_every_s",
    "logger.init_timeout_s",
)
NOT_NEGATIVE = (
    "data.seed",
    "data.num_workers",
    "optim.weight_decay",
    "optim.head_weight_decay",
    "schedule.warmup_steps",
    "schedule.cooldown",
)
RANGES: dict[str, tuple[float, float]] = {  # from, up to but without
    "seed": (0, 2**23),  # a stream of images each
    "data.rotation": (0, 4),
    "model.image_size": (1, 257),  # of the embedded images
    "model.drop_path_rate": (0, 1),
    "optim.beta1": (0, 1),
    "optim.beta2": (0, 1),
}
EVAL_DATASETS = ("fractals", "digits")


def schema_keys() -> list[str]:
    """Every dotted key of the schema, inner nodes included."""
    return list(keys_of(RunConfig))


def config_groups() -> dict[str, list[str]]:
    """Config groups of ``conf/`` and their options, for example {"experiment": ["star_tiny", ...]}."""
    return groups_of(CONF_DIR)


def check_overrides(overrides: Sequence[str], *, once: bool = True) -> None:
    """Raise ConfigError for an override, or a file it leads to, with a wrong key or option; names the nearest valid one.

    ``once``: refuse a key given two values, as on a command line; otherwise the last of them counts.
    """
    check_input(overrides, CONF_DIR, RunConfig, once=once)


def compose(overrides: Sequence[str] = ()) -> RunConfig:
    """Compose ``conf/config.yaml`` with Hydra overrides, the last of a key. Raises ConfigError with one sentence."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    check_overrides(overrides, once=False)
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(CONF_DIR), version_base=None):
            return resolve(hydra_compose("config", overrides=list(overrides)))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(one_sentence(error)) from None


def resolve(composed: Any) -> RunConfig:
    """Check a composed DictConfig against the schema and return plain dataclasses. Raises ConfigError."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        for key in sorted(OmegaConf.missing_keys(composed)):
            raise ConfigError(f"{key} has no value; give {key}=...")
        container = OmegaConf.to_container(composed, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(one_sentence(error)) from None
    return from_mapping(typing.cast(dict[str, Any], container))


def from_mapping(content: Mapping[str, Any]) -> RunConfig:
    """A checked configuration from plain values, such as the ``config`` of a run.json. Raises ConfigError."""
    cfg = build(RunConfig, content)
    check(cfg)
    return cfg


def one_sentence(error: Exception) -> str:
    """OmegaConf's and Hydra's multi-line messages as one sentence that names the key."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    key = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("full_key:")), "")
    text = " ".join(line for line in lines if not line.startswith(("full_key:", "object_type", "reference_type")))
    return (f"{key}: " if key and key not in text else "") + text.rstrip(".") + "."


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
    if cfg.center is not None and not (re.fullmatch(r"[1-9]\d*x[1-9]\d*x[1-9]\d*", cfg.center) or cfg.center in NAMED):
        raise ConfigError(f"center={cfg.center!a} is no shape; write WIDTHxDEPTHxMLP such as 32x4x128, or null.")
    if not re.fullmatch(r"[A-Za-z0-9_.+-]*", cfg.retry_of):
        raise ConfigError(f"retry_of={cfg.retry_of!a} is no run id; leave it empty.")
    for dataset in cfg.eval.datasets:
        if dataset not in EVAL_DATASETS:
            raise ConfigError(f"eval.datasets: {dataset!a} is not known{nearest(dataset, EVAL_DATASETS)}")
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
    if cfg.schedule.kind == "cosine" and len(steps) > 1:
        raise ConfigError("schedule.kind=cosine bends towards one duration; for several use rsqrt or constant.")


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def shape_of(cfg: RunConfig) -> Shape:
    """The shape a configuration asks for: `shape`, with single dimensions of `model` put in. Raises ValueError.

    A named shape brings its own heads unless model.num_heads is given, and its patch size when written NAME/PATCH.
    """
    model = cfg.model
    if model.num_heads is not None and model.head_dim is not None:
        raise ConfigError(f"model.num_heads={model.num_heads} and model.head_dim={model.head_dim}: give one of them.")
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


def model_geometry(cfg: RunConfig) -> dict[str, Any]:
    """The arguments beside the shape that parameters and FLOPs depend on, as sovit.flops takes them."""
    return {
        "image_size": cfg.model.image_size,
        "channels": cfg.model.channels,
        "pool": cfg.model.pool,
        "num_classes": cfg.data.num_classes,
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
            duration.parse_duration(label), forward_gflops=gflops, global_batch_size=cfg.trainer.global_batch_size
        ): label
        for label in labels
    }
    last = cfg.trainer.max_steps
    if last is not None and max(steps) > last:
        steps = {step: label for step, label in steps.items() if step <= last}
        steps.setdefault(last, f"{last} steps")
    return dict(sorted(steps.items()))
