"""The configuration of `task=multitask`: its keys, which values they take, and the recipe that they make."""

from __future__ import annotations

from dataclasses import dataclass, field

from sovit.config import ConfigError
from sovit.downstream.adapted import POSITIONS
from sovit.language.examples import TASKS
from sovit.language.mixture import Examples
from sovit.language.training import OPTIMIZERS, Recipe
from sovit.strict import nearest

DATA = ("scenes", "files")
PRECISIONS = ("32-true", "bf16-mixed")
QUESTION = 8  # tokens that are left for a question, at least


@dataclass
class Files:
    """One part of the user's own: `sovit.language.files.open_texts`."""

    images: str | None = None
    captions: str | None = None
    questions: str | None = None
    annotations: str | None = None
    ocr_vqa: str | None = None
    split: str | None = None
    gqa: str | None = None


@dataclass
class Config:
    name: str = "multitask"
    data: str = "scenes"  # the embedded scenes | files: those of train and test
    train: Files = field(default_factory=Files)
    test: Files = field(default_factory=Files)
    vocabulary: str | None = None  # a tokenizer.json; null: the one that is shipped
    decoder: str | None = None  # a .safetensors of an earlier result: scored without training
    num_train: int = 4096  # embedded scenes
    num_test: int = 1024
    image_size: int | None = None  # null: the model's own
    positions: str = "bilinear"  # at another image_size: bilinear (big_vision's rule) | bicubic (timm's default)
    width: int = 64  # of the decoder, the same for every encoder
    depth: int = 2
    mlp_dim: int = 128
    num_heads: int = 4
    length: int = 64  # tokens of a prompt and its answer; a decoder from a file has its own
    dropout: float = 0.0
    caption: float = 0.1  # shares of the tasks in the mixture
    vqa: float = 0.3
    ocr_vqa: float = 0.3
    gqa: float = 0.3
    optimizer: str = "adamw"  # adamw | adafactor
    lr: float = 6e-3
    weight_decay: float = 1e-4  # relative to lr
    steps: int | None = 4000  # of the decoder, and again of the blind one
    epochs: float | None = None  # instead of steps: times that all captions and questions are seen
    global_batch_size: int = 32
    warmup: float = 0.1  # share of the steps
    clip_norm: float | None = 1.0
    label_smoothing: float = 0.0
    max_tokens: int = 40  # of what is said
    beams: int = 1  # 1: greedy
    length_penalty: float = 0.0
    seed: int = 0  # of first weights, order and dropout; of embedded scenes the scenes too
    precision: str = "32-true"  # 32-true | bf16-mixed
    checkpoint_every_s: float = 60.0


def check_values(cfg: Config) -> None:
    """Raise ConfigError for what cannot be whatever the encoder and the data."""
    for key, choices in (
        ("data", DATA),
        ("positions", POSITIONS),
        ("optimizer", OPTIMIZERS),
        ("precision", PRECISIONS),
    ):
        if getattr(cfg, key) not in choices:
            raise ConfigError(f"task.{key}={getattr(cfg, key)!a} is not a choice{nearest(getattr(cfg, key), choices)}")
    sizes = (
        "num_train",
        "num_test",
        "width",
        "depth",
        "mlp_dim",
        "num_heads",
        "global_batch_size",
        "max_tokens",
        "beams",
    )
    for key in sizes:
        if getattr(cfg, key) < 1:
            raise ConfigError(f"task.{key}={getattr(cfg, key)} must be at least 1.")
    for key in ("weight_decay", "length_penalty", "seed", "checkpoint_every_s", *TASKS):
        if getattr(cfg, key) < 0:
            raise ConfigError(f"task.{key}={getattr(cfg, key)} must not be negative.")
    for key in ("dropout", "warmup", "label_smoothing"):
        if not 0 <= getattr(cfg, key) < 1:
            raise ConfigError(f"task.{key}={getattr(cfg, key)} must be at least 0 and below 1.")
    if (cfg.steps is None) == (cfg.epochs is None):
        raise ConfigError(
            f"task.steps={cfg.steps} and task.epochs={cfg.epochs}: give one of the two, the other is null."
        )
    if (cfg.steps or cfg.epochs or 0) <= 0:
        raise ConfigError(f"task.{'epochs' if cfg.steps is None else 'steps'} must be positive.")
    if not cfg.lr > 0 or (cfg.clip_norm is not None and not cfg.clip_norm > 0):
        raise ConfigError(f"task.lr={cfg.lr} and task.clip_norm={cfg.clip_norm} must be positive.")
    if cfg.width % cfg.num_heads:
        raise ConfigError(f"task.width={cfg.width} is not divisible into task.num_heads={cfg.num_heads}.")
    if cfg.decoder is None and cfg.length < cfg.max_tokens + QUESTION:
        raise ConfigError(
            f"task.length={cfg.length} leaves too little for a question beside task.max_tokens={cfg.max_tokens}; give "
            f"{cfg.max_tokens + QUESTION} or more."
        )


def recipe_of(cfg: Config, examples: Examples) -> Recipe:
    steps = cfg.steps
    if steps is None:
        assert cfg.epochs is not None
        steps = max(1, round(cfg.epochs * sum(map(len, examples.of.values())) / cfg.global_batch_size))
    return Recipe(
        width=cfg.width,
        depth=cfg.depth,
        mlp_dim=cfg.mlp_dim,
        num_heads=cfg.num_heads,
        length=cfg.length,
        dropout=cfg.dropout,
        optimizer=cfg.optimizer,
        lr=cfg.lr,
        weight_decay=cfg.weight_decay,
        steps=steps,
        batch_size=cfg.global_batch_size,
        warmup=cfg.warmup,
        clip_norm=cfg.clip_norm,
        label_smoothing=cfg.label_smoothing,
        seed=cfg.seed,
        bfloat16=cfg.precision == "bf16-mixed",
        shares={task: getattr(cfg, task) for task in TASKS},
    )
