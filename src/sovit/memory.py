"""How much memory training takes on each device, in closed form, and the layout of a step that fits into it.

Counted are the tensors of a training step as torch makes them without compilation: weights, gradients, optimiser state,
averaged weights, the copies that sharding and mixed precision make, what the forward pass keeps for the backward pass,
and the largest temporaries. Not counted: the CUDA context, fragmentation, workspaces of libraries; for those
`choose_layout` leaves a share of the device free. torch.compile keeps less than this.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from sovit.flops import NORMS, num_params
from sovit.shape import Shape

# Bytes of a weight, and of an element in matrix products.
PRECISIONS = {
    "32-true": (4, 4),
    "64-true": (8, 8),
    "bf16-mixed": (4, 2),
    "16-mixed": (4, 2),
    "bf16-true": (2, 2),
    "16-true": (2, 2),
}
OPTIMIZERS = ("adamw", "adafactor")
KINDS = ("single", "ddp", "fsdp")
CHECKPOINTING = ("none", "selective", "full")  # from the fastest to the smallest
FRACTION = 0.85  # of a device's free memory
ENOUGH_TOKENS = 4096  # in one forward pass; with fewer a GPU idles, and computing activations again is the lesser loss
_FACTORED_FROM = 32  # Adafactor's smallest dimension, see sovit.optim.build_optimizer

Dims = tuple[int, ...]


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest device, by group."""

    weights: int
    gradients: int
    optimizer: int
    averaged: int  # the moving average of the weights
    copies: int  # weights gathered or cast for computing, buffers for exchanging gradients
    activations: int  # kept for the backward pass
    working: int  # temporaries of one block's backward pass, and its activations if they are computed again
    logits: int
    features: int  # of the few-shot evaluation

    @property
    def total(self) -> int:
        return sum(self.as_dict().values())

    def as_dict(self) -> dict[str, int]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True)
class Layout:
    """``micro_batch`` images in one forward pass of a process; ``accumulation`` of them make its part of a step."""

    micro_batch: int
    accumulation: int
    checkpointing: str
    memory: Memory


@dataclass(frozen=True)
class Model:
    """The arguments of `sovit.flops.num_params`, all that the memory of a model depends on."""

    shape: Shape
    image_size: int
    channels: int = 3
    pool: str = "map"
    num_classes: int = 0
    pos_embed: str = "learned"
    block: str = "serial"
    qk_norm: bool = False
    qkv_bias: bool = True
    norm: str = "layernorm"

    def __post_init__(self) -> None:
        num_params(**vars(self))  # refuses what cannot be

    @property
    def tokens(self) -> int:
        return (self.image_size // self.shape.patch_size) ** 2 + (self.pool == "token")


def estimate(
    model: Model,
    *,
    micro_batch: int,
    precision: str = "32-true",
    optimizer: str = "adamw",
    ema: bool = True,
    kind: str = "single",
    shards: int = 1,
    checkpointing: str = "none",
    fewshot_images: int = 0,
    gpu: bool = True,
) -> Memory:
    """Memory on the fullest device while training with ``micro_batch`` images in a forward pass.

    ``ema``: a moving average of the weights is kept. ``kind``: ``single``, ``ddp`` (a copy on each device) or ``fsdp``
    (``shards`` devices share a copy, block by block). ``checkpointing``: see `sovit.models.blocks.checkpoint_blocks`.
    ``fewshot_images``: as many feature vectors are held in an evaluation. ``gpu`` False: as on a CPU. Raises ValueError
    for what is not in the tables above, and for shards without ``fsdp``.
    """
    for name, value, known in (
        ("precision", precision, PRECISIONS),
        ("optimizer", optimizer, OPTIMIZERS),
        ("kind", kind, KINDS),
        ("checkpointing", checkpointing, CHECKPOINTING),
    ):
        if value not in known:
            raise ValueError(f"{name}={value!r} is unknown; use one of {', '.join(known)}.")
    for name, count in (("micro_batch", micro_batch), ("shards", shards)):
        if count < 1:
            raise ValueError(f"{name}={count} must be at least 1.")
    if shards > 1 and kind != "fsdp":
        raise ValueError(f"shards={shards} needs kind='fsdp', not {kind!r}.")
    stored, computed = PRECISIONS[precision]
    tensors = [*block_tensors(model).values()] * model.shape.depth + [*other_tensors(model).values()]
    held = sum(_held(dims, shards) for dims in tensors)
    kept = _kept(model, stored, computed, sharded=kind == "fsdp", gpu=gpu)
    in_blocks = model.tokens * model.shape.depth * kept[checkpointing]
    return Memory(
        weights=held * stored,
        gradients=held * stored,
        optimizer=sum(_optimizer_bytes(dims, optimizer, stored, shards) for dims in tensors),
        averaged=held * stored if ema else 0,
        copies=_copies(model, kind, stored, computed),
        activations=micro_batch * (in_blocks + _kept_outside(model, stored, computed, gpu)),
        working=micro_batch * model.tokens * (_temporary(model, stored, computed) + kept["none"] - kept[checkpointing])
        + max(map(math.prod, tensors)) * (stored + computed),  # a gradient before it is added, and before it is cast
        logits=micro_batch * model.num_classes * (computed + 20),  # targets, log-probabilities, losses, gradients
        features=fewshot_images * model.shape.width * 4,
    )


def choose_layout(
    model: Model,
    *,
    device_bytes: float,
    global_batch_size: int,
    world: int = 1,
    micro_batch: int | None = None,
    at_most: int | None = None,
    checkpointing: str = "auto",
    fraction: float = FRACTION,
    **training: Any,
) -> Layout:
    """The layout of a step of ``global_batch_size`` images over ``world`` processes with ``device_bytes`` free on each.

    The largest micro-batch that divides a process's share and fits into ``fraction`` of the device, without checkpointing
    unless that leaves fewer than ENOUGH_TOKENS tokens; then selective, then full. ``micro_batch`` and ``checkpointing``
    other than None and ``auto`` are taken as given, both of them without a look at the memory. ``at_most`` bounds the
    micro-batch, after one has proved too large. ``training`` are further arguments of `estimate`.

    Raises ValueError if the batch does not divide, or nothing fits: it names the least memory needed, and the mend.
    """
    if global_batch_size % world:
        raise ValueError(f"global_batch_size={global_batch_size} does not divide among {world} processes.")
    share = global_batch_size // world
    if micro_batch is not None and (micro_batch < 1 or share % micro_batch):
        raise ValueError(f"micro_batch={micro_batch} does not divide the {share} images of each process.")
    kinds = CHECKPOINTING if checkpointing == "auto" else (checkpointing,)
    largest = min(micro_batch or share, at_most or share)
    sizes = [n for n in range(largest, 0, -1) if share % n == 0]
    sizes = sizes[:1] if micro_batch else sizes

    def layout(size: int, kind: str) -> Layout:
        return Layout(size, share // size, kind, estimate(model, micro_batch=size, checkpointing=kind, **training))

    if len(sizes) == len(kinds) == 1 and micro_batch:
        return layout(sizes[0], kinds[0])
    room = fraction * device_bytes
    fitting = []
    for kind in kinds:
        found = next((one for one in (layout(n, kind) for n in sizes) if one.memory.total <= room), None)
        if found and (found.micro_batch == sizes[0] or found.micro_batch * model.tokens >= ENOUGH_TOKENS):
            return found
        fitting += [found] if found else []
    if fitting:
        return max(fitting, key=lambda one: one.micro_batch)  # of equals the first, which computes least again
    least = layout(sizes[-1], kinds[-1])
    raise ValueError(_too_large(model, least, device_bytes, fraction, training))


def block_tensors(model: Model) -> dict[str, Dims]:
    """Dimensions of the parameters of one block, by timm's names."""
    width, mlp_dim, head_dim = model.shape.width, model.shape.mlp_dim, model.shape.head_dim
    if model.block == "parallel":
        found = {
            **_norm("in_norm", width, model),
            **_linear("in_proj", width, mlp_dim + 3 * width, bias=model.qkv_bias),
            **({} if model.qkv_bias else {"mlp_bias": (mlp_dim,)}),
            **_linear("out_proj", width + mlp_dim, width),
        }
        prefix = ""
    else:
        found = {
            **_norm("norm1", width, model),
            **_linear("attn.qkv", width, 3 * width, bias=model.qkv_bias),
            **_linear("attn.proj", width, width),
            **_norm("norm2", width, model),
            **_linear("mlp.fc1", width, mlp_dim),
            **_linear("mlp.fc2", mlp_dim, width),
        }
        prefix = "attn."
    if model.qk_norm:
        found |= _norm(f"{prefix}q_norm", head_dim, model) | _norm(f"{prefix}k_norm", head_dim, model)
    return found


def other_tensors(model: Model) -> dict[str, Dims]:
    """Dimensions of the parameters outside the blocks, by timm's names."""
    width, mlp_dim, patch = model.shape.width, model.shape.mlp_dim, model.shape.patch_size
    found: dict[str, Dims] = {
        "patch_embed.proj.weight": (width, model.channels, patch, patch),
        "patch_embed.proj.bias": (width,),
        **_norm("norm", width, model),
    }
    if model.pos_embed == "learned":
        found["pos_embed"] = (1, (model.image_size // patch) ** 2, width)
    if model.pool == "token":
        found["cls_token"] = (1, 1, width)
    if model.pool == "map":
        found |= {
            "attn_pool.latent": (1, 1, width),
            **_linear("attn_pool.q", width, width),
            **_linear("attn_pool.kv", width, 2 * width),
            **_linear("attn_pool.proj", width, width),
            **_norm("attn_pool.norm", width, model),
            **_linear("attn_pool.mlp.fc1", width, mlp_dim),
            **_linear("attn_pool.mlp.fc2", mlp_dim, width),
        }
    return found | (_linear("head", width, model.num_classes) if model.num_classes else {})


def _linear(name: str, inputs: int, outputs: int, *, bias: bool = True) -> dict[str, Dims]:
    return {f"{name}.weight": (outputs, inputs), **({f"{name}.bias": (outputs,)} if bias else {})}


def _norm(name: str, size: int, model: Model) -> dict[str, Dims]:
    return {f"{name}.{part}": (size,) for part in ("weight", "bias")[: NORMS[model.norm]]}


def _held(dims: Dims, shards: int) -> int:
    """Elements on the fullest device: ``fully_shard`` cuts the first dimension into equal parts, the last ones shorter."""
    return -(-dims[0] // shards) * math.prod(dims[1:])


def _optimizer_bytes(dims: Dims, optimizer: str, stored: int, shards: int) -> int:
    count = 4  # of updates
    if optimizer == "adamw":
        return count + 2 * stored * _held(dims, shards)
    momentum = max(4, stored) * _held(dims, shards)
    order = sorted(range(len(dims)), key=lambda dim: (dims[dim], dim))
    if len(dims) < 2 or dims[order[-2]] < _FACTORED_FROM:
        return count + momentum + stored * _held(dims, shards)
    means = [tuple(1 if dim == averaged else size for dim, size in enumerate(dims)) for averaged in order[-2:]]
    return count + momentum + stored * sum(_held(mean, shards) for mean in means)


def _copies(model: Model, kind: str, stored: int, computed: int) -> int:
    """Under ``fsdp`` the weights and gradients outside the blocks, and of the blocks one that computes and one on its way
    in, both twice (as received, and laid out), one's gradients, and these being summed; otherwise autocast's matrices.
    """
    inside, outside = block_tensors(model), other_tensors(model)
    block, rest = (sum(map(math.prod, tensors.values())) for tensors in (inside, outside))
    if kind == "fsdp":
        return rest * 2 * stored + block * (5 * computed + max(4, computed))
    return computed * sum(map(math.prod, _matrices(model))) if computed != stored else 0


def _matrices(model: Model) -> Iterator[Dims]:
    for tensors, times in ((block_tensors(model), model.shape.depth), (other_tensors(model), 1)):
        for name, dims in tensors.items():
            if name.endswith(".weight") and len(dims) > 1:
                yield from [dims] * times


def _kept(model: Model, stored: int, computed: int, *, sharded: bool, gpu: bool) -> dict[str, int]:
    """Bytes a token that one block keeps for the backward pass, by the kind of checkpointing.

    The residual stream has the weights' precision, what lies between norms and sums that of matrix products. A norm keeps
    its input and its statistics; a product its input; attention q, k, v, its result and a number for each head; GELU its
    input. Of a product that is cut into slices the whole is kept.
    """
    c, width, mlp_dim, heads = computed, model.shape.width, model.shape.mlp_dim, model.shape.num_heads
    precise = max(4, computed)  # of statistics
    parallel, rms = model.block == "parallel", model.norm == "rmsnorm"
    statistics = precise * (1 if rms else 2)
    scaled = stored * width if rms and not gpu else 0  # on a CPU, RMSNorm is several operations
    attention = c * width + heads * precise
    norms = (1 if parallel else 2) * (stored * width + statistics + scaled + c * width)
    if model.qk_norm:
        widened = stored * width if stored != computed and (gpu or rms) else 0  # autocast norms in float32
        norms += 2 * (c * width + heads * statistics + scaled + widened)
    if parallel:
        selective = c * (3 * width + mlp_dim) + attention
        none = norms + selective + c * (width + mlp_dim)
        if not model.qkv_bias:  # GELU's input is no slice of the product but a sum, in the precision of the bias
            none += (computed if sharded else stored) * mlp_dim
    else:
        selective = c * (4 * width + mlp_dim) + attention
        none = norms + 3 * c * width + attention + 2 * c * mlp_dim
        if (
            model.qk_norm
        ):  # attention lays its result out as the normed q: head by head, and the next product needs a copy
            none += c * width
    return {"none": none, "selective": stored * width + selective, "full": stored * width}


def _kept_outside(model: Model, stored: int, computed: int, gpu: bool) -> int:
    """Bytes an image that is kept outside the blocks: the image, the last norm's input, the head's keys and values."""
    width, precise = model.shape.width, max(4, computed)
    a_token = stored * width * (2 if model.norm == "rmsnorm" and not gpu else 1) + 2 * precise
    kept = model.channels * model.image_size**2 * (stored + (computed if computed != stored else 0))
    if model.pool == "token" and stored == computed:  # the classifier's input is a slice of the normed tokens
        a_token += stored * width
    if model.pool == "map":
        a_token += 3 * computed * width
        kept += computed * (6 * width + 2 * model.shape.mlp_dim)
    return kept + model.tokens * a_token + computed * width


def _temporary(model: Model, stored: int, computed: int) -> int:
    """Bytes a token of the gradients alive at once in the backward pass of a block, beyond what is freed by then."""
    width, mlp_dim = model.shape.width, model.shape.mlp_dim
    hidden = 2 * stored * mlp_dim if model.block == "parallel" else computed * mlp_dim
    return hidden + (3 * computed + 2 * stored) * width


def _too_large(model: Model, least: Layout, device_bytes: float, fraction: float, training: dict[str, Any]) -> str:
    """Why nothing fits, and what would."""
    memory = least.memory
    state = memory.weights + memory.gradients + memory.optimizer + memory.averaged
    text = (
        f"{model.shape} needs at least {gib(memory.total)} on each device (micro_batch={least.micro_batch}, "
        f"checkpointing={least.checkpointing}; {gib(state)} of it weights, gradients, optimiser state and average), and "
        f"{gib(fraction * device_bytes)} of {gib(device_bytes)} may be used; "
    )
    for power in range(1, 14):
        shards = 2**power
        spread = training | {"kind": "fsdp", "shards": shards}
        needed = estimate(model, micro_batch=1, checkpointing="full", **spread)
        if needed.total <= fraction * device_bytes:
            return text + f"spread it with parallel=fsdp over {shards} devices or more, parallel.shard={shards}."
    return text + "no number of devices of this size holds it: take larger ones."


def gib(count: float) -> str:
    """Bytes in GiB, or MiB below one."""
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"
