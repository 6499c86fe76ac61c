"""Contrastive losses of images and their texts, over as many processes as there are, without the full matrix.

Each process holds b images and their b texts; B = b x processes. The texts travel a ring, so that a process sees the
texts of each other one once: it computes blocks of b x b logits, and holds at most three sets of b embeddings. Nothing of
size B x B or B x D is ever made. The gradient of the texts travels with them and arrives where they came from.

``sigmoid``: arXiv 2303.15343, -1/B sum_i sum_j log sigmoid(z_ij (t x_i y_j + b)), z = 1 for a pair and -1 else.
``softmax``: arXiv 2103.00020 and 2111.07991, the mean of the cross-entropies of an image's text among all texts and of a
text's image among all images, of logits t x_i y_j. t = exp(log_scale).

Not here: embeddings, their normalisation, and how much of a batch a device holds: the loss of a batch is not the mean of
the losses of its parts, as each part would have fewer negatives.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# t = 10 and b = -10: arXiv 2303.15343, section 3.2 and SoViT's LiT (arXiv 2305.13035, table 7). Of the softmax loss, LiT's
# published configuration (google-research/big_vision, configs/proj/image_text/lit_coco.py) has t = 10; CLIP had 1 / 0.07.
LOG_SCALE = math.log(10)
BIAS = -10.0
LOSSES = ("sigmoid", "softmax")

# images, texts, log_scale, bias, whether gradients are wanted -> loss, gradients of the four
_Compute = Callable[[Tensor, Tensor, Tensor, Tensor, tuple[bool, ...]], tuple[Tensor, list[Tensor | None]]]


def sigmoid_loss(images: Tensor, texts: Tensor, log_scale: Tensor, bias: Tensor) -> Tensor:
    """This process's share of the sigmoid loss of all pairs; the mean over the processes is the loss.

    ``images`` and ``texts``: [b, D] L2-normalised rows, row i of one belongs to row i of the other. ``log_scale`` and
    ``bias``: one number each. The mean over the processes of the gradients that parameters get is the gradient of the
    loss, as DDP and FSDP take it. Images that need no gradient cost none. Computed in float32 at least, whatever autocast
    says. Every process scales what is returned alike. Raises ValueError, in every process, unless all bring as many rows
    of one kind.
    """
    return _loss(_sigmoid, images, texts, log_scale, bias)


def softmax_loss(images: Tensor, texts: Tensor, log_scale: Tensor) -> Tensor:
    """This process's share of the softmax loss of all pairs; all else as for :func:`sigmoid_loss`."""
    return _loss(_softmax, images, texts, log_scale, torch.zeros_like(log_scale))


def _loss(compute: _Compute, images: Tensor, texts: Tensor, log_scale: Tensor, bias: Tensor) -> Tensor:
    wanted = tuple(torch.is_grad_enabled() and one.requires_grad for one in (images, texts, log_scale, bias))
    wrong = _wrong(images, texts, log_scale, bias)
    if _world() > 1:
        wrong = _wrong_somewhere(images, texts, wanted, wrong)
    if wrong:
        raise ValueError(wrong)
    loss: Tensor = _WithGradients.apply(compute, wanted, images, texts, log_scale, bias)
    return loss


class _WithGradients(torch.autograd.Function):
    """A loss whose gradients are computed with it: the ring is gone round while the blocks of logits are there."""

    @staticmethod
    def forward(ctx: Any, compute: _Compute, wanted: tuple[bool, ...], *inputs: Tensor) -> Tensor:
        kind = torch.promote_types(torch.promote_types(inputs[0].dtype, inputs[1].dtype), torch.float32)
        with torch.autocast(inputs[0].device.type, enabled=False):
            images, texts, log_scale, bias = (one.detach().to(kind) for one in inputs)
            loss, gradients = compute(images, texts.contiguous(), log_scale.reshape(()), bias.reshape(()), wanted)
        ctx.save_for_backward(
            *(None if g is None else g.reshape(x.shape).to(x.dtype) for g, x in zip(gradients, inputs, strict=True))
        )
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> Any:
        return (None, None, *(None if g is None else (g * upstream).to(g.dtype) for g in ctx.saved_tensors))


def _sigmoid(
    images: Tensor, texts: Tensor, log_scale: Tensor, bias: Tensor, wanted: tuple[bool, ...]
) -> tuple[Tensor, list[Tensor | None]]:
    scale, num = log_scale.exp(), len(images)
    sums = _Sums(images, wanted)
    loss = torch.zeros_like(scale)

    def visit(others: Tensor, carried: list[Tensor], own: bool) -> None:
        products = scale * (images @ others.T)
        signed = -(products + bias)  # z = -1: these are no pairs
        if own:
            signed.diagonal().neg_()
        loss.sub_(F.logsigmoid(signed).sum() / num)
        if any(wanted):
            slopes = signed.neg_().sigmoid_().div_(num)  # of the loss by the logits
            if own:
                slopes.diagonal().neg_()
            sums.add(slopes, products, others, carried)

    home = _around(texts, sums.carried(texts), visit)
    return loss, sums.gradients(scale, home)


def _softmax(
    images: Tensor, texts: Tensor, log_scale: Tensor, bias: Tensor, wanted: tuple[bool, ...]
) -> tuple[Tensor, list[Tensor | None]]:
    scale, num = log_scale.exp(), len(images)
    rows = torch.full_like(images[:, 0], -torch.inf)  # log of the sum of exponentials over all texts seen so far
    pairs = torch.empty_like(rows)

    def measure(others: Tensor, carried: list[Tensor], own: bool) -> None:
        logits = scale * (images @ others.T)
        if own:
            pairs.copy_(logits.diagonal())
        rows.copy_(torch.logaddexp(rows, logits.logsumexp(1)))
        carried[0].copy_(torch.logaddexp(carried[0], logits.logsumexp(0)))

    [columns] = _around(texts, [torch.full_like(rows, -torch.inf)], measure)
    loss = ((rows - pairs) + (columns - pairs)).mean() / 2
    sums = _Sums(images, wanted)
    if not any(wanted):
        return loss, sums.gradients(scale, [])

    def visit(others: Tensor, carried: list[Tensor], own: bool) -> None:
        products = scale * (images @ others.T)
        slopes = (products - rows[:, None]).exp_().add_((products - carried[-1]).exp_()).div_(2 * num)
        if own:
            slopes.diagonal().sub_(1 / num)
        sums.add(slopes, products, others, carried)

    home = _around(texts, [*sums.carried(texts), columns.contiguous()], visit)
    return loss, [*sums.gradients(scale, home)[:3], None]


class _Sums:
    """Gradients, summed over the blocks: those of this process's images and of the two numbers, and of texts passing by."""

    def __init__(self, images: Tensor, wanted: tuple[bool, ...]) -> None:
        self.local, self.wanted = images, wanted
        self.images = torch.zeros_like(images) if wanted[0] else None
        self.log_scale, self.bias = images.new_zeros(()), images.new_zeros(())

    def carried(self, texts: Tensor) -> list[Tensor]:
        """What travels with the texts for their gradient."""
        return [torch.zeros_like(texts)] if self.wanted[1] else []

    def add(self, slopes: Tensor, products: Tensor, others: Tensor, carried: list[Tensor]) -> None:
        """A block: ``slopes`` of the loss by its logits, ``products`` the logits without bias, which it overwrites."""
        if self.images is not None:
            self.images.addmm_(slopes, others)
        if self.wanted[1]:
            carried[0].addmm_(slopes.T, self.local)
        self.bias += slopes.sum()
        self.log_scale += products.mul_(slopes).sum()

    def gradients(self, scale: Tensor, home: list[Tensor]) -> list[Tensor | None]:
        images = None if self.images is None else self.images * scale
        found = (images, home[0] * scale if self.wanted[1] and home else None, self.log_scale, self.bias)
        return [one if wanted else None for one, wanted in zip(found, self.wanted, strict=True)]


def _around(texts: Tensor, carried: list[Tensor], visit: Callable[[Tensor, list[Tensor], bool], None]) -> list[Tensor]:
    """Have the texts of all processes pass by; what they carry is changed by ``visit`` and comes home with them.

    ``visit(texts, carried, own)`` is called once for each process's texts, ``own`` being this process's. The next texts
    are under way while it computes.
    """
    world = _world()
    for turn in range(world):
        coming = _pass_on([texts]) if turn < world - 1 else None
        visit(texts, carried, turn == 0)
        if coming is not None:
            [texts] = coming()
        if world > 1:
            carried = _pass_on(carried)()
    return carried


def _pass_on(tensors: list[Tensor]) -> Callable[[], list[Tensor]]:
    """Send tensors to the next process; the result waits for those of the one before."""
    if not tensors:
        return list
    rank, world = dist.get_rank(), dist.get_world_size()
    received = [torch.empty_like(one) for one in tensors]
    works = dist.batch_isend_irecv(
        [dist.P2POp(dist.isend, one, (rank + 1) % world) for one in tensors]
        + [dist.P2POp(dist.irecv, one, (rank - 1) % world) for one in received]
    )

    def wait() -> list[Tensor]:
        for work in works:
            work.wait()
        return received

    return wait


def _world() -> int:
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    asked = os.environ.get("WORLD_SIZE", "1")
    if asked not in ("", "1"):
        raise ValueError(
            f"WORLD_SIZE={asked} processes are to share the loss, but none is connected: it would see one process's pairs "
            "only; call torch.distributed.init_process_group first, or unset WORLD_SIZE."
        )
    return 1


def _wrong(images: Tensor, texts: Tensor, log_scale: Tensor, bias: Tensor) -> str:
    """What is wrong with this process's pairs; empty if nothing is."""
    if images.ndim != 2 or images.shape != texts.shape or not images.numel():
        return (
            f"Images {list(images.shape)} and texts {list(texts.shape)} are no pairs: give as many rows of one width, "
            "and one at least."
        )
    if images.device != texts.device:
        return f"Images lie on {images.device} and texts on {texts.device}; bring them to one device."
    for name, value in (("log_scale", log_scale), ("bias", bias)):
        if value.numel() != 1:
            return f"{name} has shape {list(value.shape)}; it is one number."
    return ""


def _wrong_somewhere(images: Tensor, texts: Tensor, wanted: tuple[bool, ...], wrong: str) -> str:
    """The same for all processes, who would else wait for each other for ever, or misread each other's rows."""
    kinds = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    kind = [kinds.index(one.dtype) if one.dtype in kinds else len(kinds) for one in (images, texts)]
    # Exchanged between CPUs where they can, so that no step waits for a GPU.
    device = torch.device("cpu") if "cpu" in dist.get_backend_config() else images.device
    shape = images.shape if not wrong else (0, 0)
    mine = torch.tensor([bool(wrong), *shape, *kind, wanted[1], any(wanted)], dtype=torch.int64, device=device)
    of_all = [torch.empty_like(mine) for _ in range(_world())]
    dist.all_gather(of_all, mine)
    first, *others = (one.tolist() for one in of_all)
    broken = [rank for rank, (bad, *_) in enumerate([first, *others]) if bad]
    if broken:
        return wrong or f"Process {broken[0]} brings no pairs of images and texts; it says why."
    for rank, other in enumerate(others, start=1):
        if other[1] != first[1]:
            return (
                f"Process 0 brings {first[1]} pairs and process {rank} brings {other[1]}; the loss over processes needs "
                "batches of one size: leave out the last, shorter one."
            )
        if other != first:
            return (
                f"The embeddings of process 0 and of process {rank} differ in width, type, or in whether they need "
                "gradients; let every process compute the same."
            )
    return ""
