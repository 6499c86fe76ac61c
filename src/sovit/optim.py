"""Parameter groups and optimisers.

One meaning of weight decay for both optimisers: an update of parameter p in a group with learning rate ``lr`` is
``p -= schedule * lr * (u + weight_decay * p)``, u the optimiser's direction. That is torch's AdamW, and it is the
published ``schedule * (lr * u + wd * p)`` of "Scaling Vision Transformers" (arXiv 2106.04560, App. B), whose absolute
wd is written relative to the learning rate: SoViT's 0.03 x 8e-4 (Table 5) is weight_decay 0.03 at lr 8e-4.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import nn

from sovit.adafactor import Adafactor

_KERNELS = ("in_proj_weight", "text_projection")  # of open_clip: parameters of modules that are no linear layers
LrRule = Literal["constant", "by_shape"]

# timm's names for the matrices fed by the MLP's hidden layer: serial blocks, parallel blocks.
_FED_BY_MLP = ("fc2", "mlp_out_proj")
_FED_BY_BOTH = "out_proj"  # parallel blocks with both outputs in one product


def param_groups(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    head_weight_decay: float,
    lr_rule: LrRule = "constant",
    base_width: int = 64,
    base_depth: int = 4,
    base_mlp_dim: int = 128,
) -> list[dict]:
    """Split the trainable parameters of a timm model of one of the families into few groups, one per (lr, weight_decay).

    Decayed are kernels only, that is the weights of linear and convolution layers (and the matrices that open_clip's text
    towers have instead): the classifier's with ``head_weight_decay`` (published: 100 times the body's), all others with
    ``weight_decay``. Biases, norms, positions, class token and the probe of the attention pooling are not.

    lr_rule ``by_shape`` multiplies the learning rate of a matrix by base / fan_in: base_width / width where the width
    feeds it (the classifier too), base_mlp_dim / mlp_dim where the MLP's hidden layer feeds it, and where both do, in the
    fused output of parallel blocks, by (base_width + base_mlp_dim) / (width + mlp_dim). A step of an optimiser
    of Adam's kind moves every weight by about lr whatever the gradient's size, so the change of an output grows with
    the number of inputs ("Tensor Programs V", arXiv 2203.03466). In models deeper than base_depth the matrices of the
    blocks are further multiplied by sqrt(base_depth / depth), as the changes of all blocks add up ("Tensor Programs VI",
    arXiv 2310.02244); shallower ones gain nothing from a higher rate. So one lr, tuned at the base shape, serves every
    shape of a sweep. The patch embedding, whose fan-in no sweep varies, and all
    vectors and embeddings keep lr. As decay is relative to a group's lr, a matrix's decay shrinks along with it.

    Other families by the same rule. In a Swin transformer all widths grow together, so a matrix fed by any stage's width is
    multiplied by base_width / width, and the depth is that of the main stage. The base of a Mixer has a token MLP of
    half its width, as all published ones; the matrix that its tokens feed, whose number no sweep varies, slows with
    the depth alone.

    Raises ValueError for an unknown rule, and under ``by_shape`` for a matrix that is fed by neither.
    """
    if lr_rule not in ("constant", "by_shape"):
        raise ValueError(f"lr_rule={lr_rule!r} is unknown; use constant or by_shape.")
    head = model.get_classifier()  # type: ignore[operator]
    groups: dict[tuple[float, float], dict] = {}
    seen: set[int] = set()
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            group_lr, decay = lr, 0.0
            if name in _KERNELS or (name == "weight" and isinstance(module, nn.Linear | nn.Conv2d)):
                decay = head_weight_decay if module is head else weight_decay
            if name == "weight" and isinstance(module, nn.Linear) and lr_rule == "by_shape":
                group_lr = _rate(lr, model, module_name, module, base_width, base_depth, base_mlp_dim)
            group = groups.setdefault((group_lr, decay), {"params": [], "lr": group_lr, "weight_decay": decay})
            group["params"].append(parameter)
    return list(groups.values())


def _rate(
    lr: float, model: nn.Module, name: str, module: nn.Linear, base_width: int, base_depth: int, base_mlp_dim: int
) -> float:
    """The learning rate of a matrix under ``by_shape``. Raises ValueError for one that is fed by nothing known."""
    stages: list[nn.Module] = list(getattr(model, "layers", ()))  # of a Swin transformer
    width: int = model.embed_dim  # type: ignore[assignment]
    main = stages[min(3, len(stages)) - 1] if stages else model
    depth = len(main.blocks)  # type: ignore[arg-type]
    leaf, in_block = name.rpartition(".")[2], name.startswith("blocks.") or ".blocks." in name
    if in_block and "mlp_tokens" in name:
        rate = lr if leaf == "fc1" else lr * (base_width // 2) / module.in_features
    elif leaf in _FED_BY_MLP:
        rate = lr * base_mlp_dim / (module.in_features * width // module.out_features)  # of the first stage
    elif leaf == _FED_BY_BOTH and in_block:
        rate = lr * (base_width + base_mlp_dim) / module.in_features
    elif module.in_features == width or stages:  # of a Swin transformer, all else is fed by a multiple of the width
        rate = lr * base_width / width
    else:
        raise ValueError(
            f"lr_rule by_shape does not know {name} with {module.in_features} inputs "
            f"in a model of width {width}; use lr_rule constant."
        )
    return rate * math.sqrt(min(1.0, base_depth / depth)) if in_block else rate


def build_optimizer(
    model: nn.Module,
    name: Literal["adamw", "adafactor"],
    *,
    lr: float,
    weight_decay: float,
    head_weight_decay: float,
    lr_rule: LrRule = "constant",
    base_width: int = 64,
    base_depth: int = 4,
    base_mlp_dim: int = 128,
    beta1: float = 0.9,
    beta2: float = 0.999,
) -> torch.optim.Optimizer:
    """AdamW or the Adafactor of "Scaling Vision Transformers" (arXiv 2106.04560, Sec. 3.4) on :func:`param_groups`.

    ``beta1`` and ``beta2`` are the decays of the first and the second moment. Adafactor's second decay is
    ``min(beta2, 1 - i^-0.8)`` at the i-th update, so ``beta2`` is its cap. It has no update clipping and no scaling by
    the parameter's size, and factors the second moment where the two largest dimensions reach 32. Its momentum is
    float32 here: the published bfloat16 saves half of it and rounds every update.

    Clip gradients outside. Keys' biases have no gradient but rounding (they shift all logits of a softmax alike), which
    Adafactor turns into full steps: they alone differ between two ways of computing one run, and change no output.
    Raises ValueError for an unknown name, and what :func:`param_groups` raises.
    """
    groups = param_groups(
        model,
        lr=lr,
        weight_decay=weight_decay,
        head_weight_decay=head_weight_decay,
        lr_rule=lr_rule,
        base_width=base_width,
        base_depth=base_depth,
        base_mlp_dim=base_mlp_dim,
    )
    if name == "adamw":
        adamw = torch.optim.AdamW(groups, lr=lr, betas=(beta1, beta2), fused=True)
        # Fused Adam offers to unscale float16 gradients itself, and Lightning therefore refuses to clip them in mixed
        # precision, bfloat16 included. Declining the offer has the gradients unscaled, then clipped, before the step.
        adamw._step_supports_amp_scaling = False
        return adamw
    if name == "adafactor":
        return Adafactor(groups, lr=lr, min_dim_size_to_factor=32, decay_rate=0.8, beta2_cap=beta2, momentum=beta1)
    raise ValueError(f"Optimizer {name!r} is unknown; use adamw or adafactor.")
