"""What is done to the blocks of a built model for memory and speed: activation checkpointing, torch.compile.

Both change each block in place and leave the names of its state alone. The order is `checkpoint_blocks`, then
`compile_blocks`, then ``fully_shard`` block by block: a compiled block sees what is recomputed in it, and sharded weights
are gathered around it. Not here: sharding, and the choice of a kind (`sovit.memory`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any, Literal, cast

import torch
import torch._dynamo as dynamo
from timm.layers import DropPath, RmsNorm
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from sovit.memory import CHECKPOINTING

Checkpointing = Literal["none", "selective", "full"]

_aten = torch.ops.aten
_PRODUCTS = frozenset({_aten.mm.default, _aten.addmm.default})
_ATTENTION = frozenset(
    {
        _aten._scaled_dot_product_flash_attention.default,
        _aten._scaled_dot_product_flash_attention_for_cpu.default,
        _aten._scaled_dot_product_efficient_attention.default,
        _aten._scaled_dot_product_cudnn_attention.default,
    }
)


def checkpoint_blocks(model: nn.Module, kind: Checkpointing) -> None:
    """Have the backward pass compute again what the blocks of a timm VisionTransformer would otherwise keep.

    ``full`` keeps the input of each block. ``selective`` keeps the results of matrix products and of attention too, so
    that only norms, activations and sums are computed again; the last product of a block only adds to the residual
    stream, and nobody needs its result. ``none`` changes nothing. Gradients are the same to the last bit on a CPU.

    Raises ValueError for an unknown kind or a model whose blocks were changed before.
    """
    if kind not in CHECKPOINTING:
        raise ValueError(f"checkpointing={kind!r} is unknown; use one of {', '.join(CHECKPOINTING)}.")
    if kind == "none":
        return
    for block in _blocks(model):
        if isinstance(block, _Checkpointed):
            raise ValueError("The blocks of this model have activation checkpointing already.")
        products = sum(isinstance(module, nn.Linear) for module in block.modules())
        random = any(isinstance(module, DropPath | nn.Dropout) and _draws(module) for module in block.modules())
        block.__class__ = _checkpointed(cast(Hashable, type(block)), kind, products, random)


def compile_blocks(model: nn.Module, **options: Any) -> None:
    """Compile each block of a timm VisionTransformer in place by ``torch.compile``, at its first call.

    ``options`` are torch.compile's. All blocks share one graph, except that each rate of stochastic depth has its own.
    """
    blocks = _blocks(model)
    # Dynamo gives up compiling a function after eight variants; a block needs one a rate, in training and evaluation.
    dynamo.config.recompile_limit = max(dynamo.config.recompile_limit, 4 * len(blocks))
    for block in blocks:
        block.compile(**options)


def norms_in_float32(block: nn.Module) -> None:
    """Have the norms of a block compute in float32 whatever their weights are gathered as, in place.

    Under autocast a GPU does so by itself; a CPU refuses float32 inputs with bfloat16 weights.
    """
    module: Any
    for module in block.modules():
        if isinstance(module, nn.LayerNorm | nn.RMSNorm | RmsNorm):
            module.__class__ = _in_float32(cast(Hashable, type(module)))


@functools.cache
def _in_float32(norm: Any) -> Any:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        weight = None if self.weight is None else self.weight.float()
        shape = tuple(self.normalized_shape)
        with torch.autocast(x.device.type, enabled=False):
            if isinstance(self, nn.LayerNorm):
                bias = None if self.bias is None else self.bias.float()
                return nn.functional.layer_norm(x.float(), shape, weight, bias, self.eps)
            return nn.functional.rms_norm(x.float(), shape, weight, self.eps)

    return type(f"Float32{norm.__name__}", (norm,), {"forward": forward})


def _blocks(model: nn.Module) -> list[nn.Module]:
    return list(model.blocks)  # type: ignore[arg-type]


def _draws(module: nn.Module) -> bool:
    return bool(getattr(module, "drop_prob", 0.0) or getattr(module, "p", 0.0))


class _Checkpointed(nn.Module):
    """Marks a block whose forward pass is wrapped."""


@functools.cache
def _checkpointed(kind_of_block: type[nn.Module], kind: Checkpointing, products: int, random: bool) -> type[nn.Module]:
    """A subclass of a block's class, as ``fully_shard`` makes one too: all blocks share it, so torch compiles one graph.

    A wrapped ``forward`` on each instance would be another object for each block, and ``copy.deepcopy`` of a model would
    go on calling the blocks of the original.
    """
    contexts: dict[str, Any] = {}
    if kind == "selective":
        contexts["context_fn"] = functools.partial(_contexts, products)
    original = kind_of_block.forward

    def forward(self: nn.Module, *arguments: Any, **named: Any) -> Any:
        return checkpoint(
            original, self, *arguments, use_reentrant=False, preserve_rng_state=random, **contexts, **named
        )

    return type(f"Checkpointed{kind_of_block.__name__}", (kind_of_block, _Checkpointed), {"forward": forward})


def _contexts(products: int) -> Any:
    return create_selective_checkpoint_contexts(_policy(products))


def _policy(products: int) -> Callable[..., CheckpointPolicy]:
    """Keep attention, and all but the last of a block's matrix products, counted apart in forward and recomputation."""
    counts = {False: 0, True: 0}

    def keep(context: Any, op: Any, *arguments: Any, **named: Any) -> CheckpointPolicy:
        if op in _PRODUCTS:
            counts[context.is_recompute] += 1
            kept = counts[context.is_recompute] < products
        else:
            kept = op in _ATTENTION
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    return keep
