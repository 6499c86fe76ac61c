"""The schema of the configuration: every key with its type, its default, and what single values may be.

Plain dataclasses and tables; `sovit.config` composes, fills in and checks. Importing this module loads nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field

# The annotations below are Optional[...] and Union[...] because OmegaConf reads them at run time.


@dataclass
class ModelConfig:
    """The model apart from its shape, and single dimensions to replace in the shape. What a family does not have is null."""

    family: str = "vit"  # vit | mixer | swin | text (see sovit.families)
    width: int | None = None  # replaces the width of `shape`; so do depth and mlp_dim
    depth: int | None = None
    mlp_dim: int | None = None
    token_dim: int | None = None  # mixer: hidden size of the token MLP; replaces that of `shape`
    num_heads: int | None = None  # give num_heads or head_dim; a named shape brings its own heads
    head_dim: int | None = None
    stages: int | None = None  # swin: patches are merged 2 x 2 between two of them
    window: int | None = None  # swin: tokens a side of a window of attention
    patch_size: int | None = None
    image_size: int = 224
    channels: int = 3
    pool: str = "map"  # map | avg | token
    pos_embed: str = "learned"  # learned | sincos2d
    block: str = "serial"  # serial | parallel: attention and MLP side by side, with fused projections (ViT-22B)
    qk_norm: bool = False  # queries and keys are normed within each head, which bounds the attention logits
    qkv_bias: bool = True
    norm: str = "layernorm"  # layernorm | layernorm_nobias | rmsnorm: neither bias nor centering
    init: str = "big_vision"  # big_vision | fan_in
    head_bias: float = 0.0
    drop_path_rate: float = 0.0


@dataclass
class DataConfig:
    """The training images. Image i of a stream is a pure function of (seed, i), embedded or read from files."""

    name: str = "fractals"  # fractals | imagefolder | webdataset | hf; images with texts: scenes | pairs | coco
    seed: int = 0  # fractals: which categories exist; the run's seed picks the stream of images
    num_classes: int = 256
    num_heldout: int = 64
    rotation: float = 1.57  # radians at full jitter: the knob for how hard the task is
    num_workers: int = 0  # processes that read and decode, at most one a core
    # Of images in files only:
    root: str | None = None  # a folder; webdataset: or a pattern such as DIR/train-{0000..0099}.tar
    split: str | None = None  # the part of root to train on: a folder or the first letters of shards; hf: train if null
    class_list: str | None = None  # a text file, one class a line in the order of the labels; null: the names sorted
    image_key: str | None = None  # webdataset: endings such as jpg;png; hf: the column; null: the usual ones
    label_key: str | None = None  # webdataset: cls or json.ENTRY; hf: the column; null: cls, label
    shuffle_shards: int = 16  # webdataset: shards whose images are shuffled together
    min_area: float = 0.05  # of a training crop, as a share of the image; 1: no crop but to a square
    flip: bool = True
    randaugment_ops: int = 0  # operations an image; 0: no RandAugment
    randaugment_magnitude: int = 10  # of 30
    mixup: float = 0.0  # both parameters of the Beta distribution; 0: no mixup
    # Of images with texts only (model.family=text):
    captions: str | None = None  # coco: the JSON file; the images lie in root
    text_key: str | None = None  # pairs: the entry of a shard, txt or json.ENTRY; null: txt
    num_examples: int | None = None  # scenes: how many are drawn; files: what an epoch is, if durations are in epochs


@dataclass
class TextConfig:
    """A text tower and the locked image tower it is trained against (model.family=text; LiT, arXiv 2111.07991)."""

    encoder: str | None = None  # a run's folder that keeps a resume point, or an exported .safetensors
    tower: str | None = None  # a folder or file of open_clip or transformers to begin with; null: from scratch
    locked: bool = False  # with tower: train only what brings its features to the encoder's width, scale and bias
    vocabulary: str | None = None  # a tokenizer.json; null: the shipped one
    length: int = 16  # tokens of a text, its end included
    pool: str = "last"  # last | avg | map: what of the tokens is the feature of a text
    init_temperature: float = 10.0  # what similarities are multiplied by to begin with; it is trained
    init_bias: float = -10.0  # optim.loss=sigmoid: what is added to them
    templates: str | None = None  # of zero-shot classes: a text file, a prompt with {} a line; null: the shipped ones


@dataclass
class OptimConfig:
    """Optimiser and the learning-rate rule across shapes (see sovit.optim)."""

    name: str = "adamw"  # adamw | adafactor
    loss: str = "softmax"  # softmax | sigmoid, of the labels or pairs; masked | distilled (see sovit.objectives)
    mask_ratio: float = 0.5  # loss=masked: share of the patches that are hidden
    teacher: str | None = None  # loss=distilled: a run's folder that keeps a resume point, or an exported .safetensors
    temperature: float = 1.0  # loss=distilled: of the teacher's softmax and the student's
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

    datasets: list[str] = field(
        default_factory=lambda: ["fractals", "digits"]
    )  # or folders with a train and a test part
    shots: list[int] = field(default_factory=lambda: [1, 5, 10, 25])
    num_draws: int = 3
    l2_reg: float | str = 1024.0  # a ridge value, or "loo": leave-one-out on the support set
    weights: str = "ema"  # ema | cooled | trunk
    ema_horizon: float = 0.1  # averaging window as a share of the steps so far
    # The group `metric`: image to text beside few-shot (see sovit.lit.multitask).
    multitask: bool = False  # every evaluation also trains a small decoder on frozen tokens: its log-perplexity
    train_scenes: int = 2048  # embedded images with texts that a decoder is trained on; the same for every cell
    test_scenes: int = 512
    decoder_draws: int = 2  # decoders, a seed each
    decoder_width: int = 64
    decoder_depth: int = 2
    decoder_steps: int = 200
    decoder_batch_size: int = 128
    decoder_lr: float = 3e-3


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
class ParallelConfig:
    """How a run is spread over devices. Changes no number but for the order of sums, so a run may go on under another."""

    kind: str = "single"  # single | ddp | fsdp
    devices: int | None = None  # processes on each node, one device each; null: the launcher's, or all GPUs of the node
    nodes: int = 1
    shard: int | None = None  # fsdp: processes that share one copy of the weights; null: all those of a node
    micro_batch: int | None = None  # images per process and forward pass; null: what the memory estimate allows
    checkpointing: str = "auto"  # auto | none | selective | full: activations computed again in the backward pass
    compile: bool | None = None  # torch.compile of each block; null: on a GPU


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
    text: TextConfig = field(default_factory=TextConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    durations: DurationsConfig = field(default_factory=DurationsConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)


CHOICES: dict[str, tuple[str, ...]] = {
    "model.family": ("vit", "mixer", "swin", "text"),
    "model.pool": ("map", "avg", "token"),
    "model.pos_embed": ("learned", "sincos2d"),
    "model.block": ("serial", "parallel"),
    "model.norm": ("layernorm", "layernorm_nobias", "rmsnorm"),
    "model.init": ("big_vision", "fan_in"),
    "text.pool": ("last", "avg", "map"),
    "data.name": ("fractals", "imagefolder", "webdataset", "hf", "scenes", "pairs", "coco"),
    "optim.name": ("adamw", "adafactor"),
    "optim.loss": ("softmax", "sigmoid", "masked", "distilled"),
    "optim.lr_rule": ("constant", "by_shape"),
    "schedule.kind": ("rsqrt", "constant", "cosine"),
    "eval.weights": ("ema", "cooled", "trunk"),
    "trainer.accelerator": ("auto", "cpu", "gpu"),
    "trainer.precision": ("32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true", "64-true"),
    "parallel.kind": ("single", "ddp", "fsdp"),
    "parallel.checkpointing": ("auto", "none", "selective", "full"),
    "logger.name": ("wandb", "none"),
    "logger.mode": ("auto", "online", "offline"),
}
POSITIVE = (
    "model.image_size",
    "model.channels",
    "data.num_classes",
    "data.num_heldout",
    "data.shuffle_shards",
    "data.min_area",
    "text.length",
    "text.init_temperature",
    "optim.lr",
    "optim.temperature",
    "optim.base_width",
    "optim.base_depth",
    "optim.base_mlp_dim",
    "schedule.timescale",
    "eval.num_draws",
    "eval.ema_horizon",
    "eval.train_scenes",
    "eval.test_scenes",
    "eval.decoder_draws",
    "eval.decoder_width",
    "eval.decoder_depth",
    "eval.decoder_steps",
    "eval.decoder_batch_size",
    "eval.decoder_lr",
    "trainer.num_threads",
    "trainer.global_batch_size",
    "trainer.log_every_n_steps",
    "trainer.checkpoint_every_s",
    "parallel.nodes",
    "logger.init_timeout_s",
)
NOT_NEGATIVE = (
    "data.seed",
    "data.num_workers",
    "data.randaugment_ops",
    "data.mixup",
    "optim.weight_decay",
    "optim.head_weight_decay",
    "schedule.warmup_steps",
    "schedule.cooldown",
)
RANGES: dict[str, tuple[float, float]] = {  # from, up to but without
    "seed": (0, 2**23),  # a stream of images each
    "data.rotation": (0, 4),
    "data.randaugment_magnitude": (0, 31),
    "model.drop_path_rate": (0, 1),
    "optim.mask_ratio": (0, 1),
    "optim.beta1": (0, 1),
    "optim.beta2": (0, 1),
}
EVAL_DATASETS = ("fractals", "digits")  # the embedded ones; anything with a slash is a folder
PAIRS = ("scenes", "pairs", "coco")  # data that give texts with the images
RECALL_AT = (1, 5, 10)  # of retrieval, in both of WAYS
WAYS = ("image_to_text", "text_to_image")
EVAL_TEXTS = ("scenes",)  # what a text tower is evaluated on beside folders and .json files of captions
KEYS_OF_PAIRS = {  # of data: which kinds of pairs read them
    "captions": ("coco",),
    "text_key": ("pairs",),
    "num_examples": PAIRS,
}
LARGEST_EMBEDDED = 256  # pixels a side of the embedded images
KEYS_OF_FILES = (  # of data; they mean nothing to the embedded images
    "root",
    "split",
    "class_list",
    "image_key",
    "label_key",
    "shuffle_shards",
    "min_area",
    "flip",
    "randaugment_ops",
    "randaugment_magnitude",
    "mixup",
)
KEYS_OF_LOSS = {
    "mask_ratio": "masked",
    "teacher": "distilled",
    "temperature": "distilled",
}  # of optim: which loss reads it
DECODER_HEADS = 4  # of metric=multitask
KEYS_OF_DECODER = (  # of eval; read with eval.multitask only
    "train_scenes",
    "test_scenes",
    "decoder_draws",
    "decoder_width",
    "decoder_depth",
    "decoder_steps",
    "decoder_batch_size",
    "decoder_lr",
)
