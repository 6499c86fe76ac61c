"""A worker of `test_contrastive`: the losses over processes, on one process's rows of a batch that all of them can make."""

import faulthandler
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from sovit.language.contrastive import sigmoid_loss, softmax_loss

BATCH, WIDTH = 24, 5
LOSSES = ("sigmoid", "softmax")
TYPES = {"float64": torch.float64, "float32": torch.float32}


def batch(kind: torch.dtype, log_scale: float = 2.0) -> list[Tensor]:
    """Images and texts [BATCH, WIDTH], log scale and bias [1]."""
    generator = torch.Generator().manual_seed(7)
    images, texts = torch.randn(2, BATCH, WIDTH, generator=generator, dtype=torch.float64)
    numbers = [torch.tensor([log_scale]), torch.tensor([-1.5])]
    return [one.to(kind).requires_grad_() for one in (F.normalize(images, dim=1), F.normalize(texts, dim=1), *numbers)]


def ours(name: str, images: Tensor, texts: Tensor, log_scale: Tensor, bias: Tensor) -> Tensor:
    if name == "sigmoid":
        return sigmoid_loss(images, texts, log_scale, bias)
    return softmax_loss(images, texts, log_scale)


def dense(name: str, images: Tensor, texts: Tensor, log_scale: Tensor, bias: Tensor) -> Tensor:
    """As the papers write them, of all pairs at once."""
    logits = log_scale.exp() * images @ texts.T
    if name == "sigmoid":
        signs = 2 * torch.eye(len(images), dtype=images.dtype) - 1
        return -F.logsigmoid(signs * (logits + bias)).sum() / len(images)
    pairs = torch.arange(len(images))
    return (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.T, pairs)) / 2


class Model(nn.Module):
    """The least of a text tower, with the numbers of the loss."""

    def __init__(self, kind: torch.dtype) -> None:
        super().__init__()
        _, _, log_scale, bias = batch(kind)
        self.log_scale, self.bias = nn.Parameter(log_scale.detach()), nn.Parameter(bias.detach())
        self.weight = nn.Parameter(torch.eye(WIDTH, dtype=kind) + 0.1)

    def forward(self, texts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return F.normalize(texts @ self.weight, dim=1), self.log_scale.clone(), self.bias.clone()


class Largest(TorchDispatchMode):
    """The most elements of a tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple | list) else (out,):
            if isinstance(one, Tensor):
                self.numel = max(self.numel, one.numel())
        return out


def said(*arguments: Tensor) -> str:
    try:
        sigmoid_loss(*arguments)
    except ValueError as error:
        return str(error)
    return ""


def work(rank: int, world: int, port: int, folder: Path) -> None:
    faulthandler.dump_traceback_later(100)  # twice on a busy machine it stood still, with a store in a file: where?
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    rows = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
    found: dict[str, Any] = {}
    for name in LOSSES:
        for label, kind in TYPES.items():
            images, texts, log_scale, bias = batch(kind)
            with Largest() as largest:
                loss = ours(name, images[rows], texts[rows], log_scale, bias)
            loss.backward()
            found[f"{name} {label}"] = {"loss": loss.detach(), "largest": largest.numel} | {
                key: None if one.grad is None else one.grad
                for key, one in zip(
                    ("images", "texts", "log_scale", "bias"), (images, texts, log_scale, bias), strict=True
                )
            }
        model: Any = Model(torch.float64)
        copies = DistributedDataParallel(model, find_unused_parameters=name == "softmax")
        embedded, log_scale, bias = copies(texts[rows].detach().double())
        ours(name, images[rows].detach().double(), embedded, log_scale, bias).backward()
        found[f"{name} ddp"] = {key: one.grad for key, one in model.named_parameters()}
        locked = batch(torch.float64)
        loss = ours(name, locked[0].detach()[rows], locked[1][rows], *locked[2:])
        loss.backward()
        found[f"{name} locked"] = {"loss": loss.detach(), "texts": locked[1].grad}
        with torch.no_grad():
            found[f"{name} no grad"] = ours(name, locked[0][rows], locked[1][rows], *locked[2:])
    images, texts, log_scale, bias = (one.detach() for one in batch(torch.float32))
    own = slice(0, 3 if rank == world - 1 else 4)
    found["uneven"] = said(images[own], texts[own], log_scale, bias)
    mixed = texts[:4].double() if rank == 0 else texts[:4]
    found["other type"] = said(images[:4], mixed, log_scale, bias)
    found["none"] = said(images[: 4 * rank], texts[: 4 * rank], log_scale, bias)
    torch.save(found, folder / f"{world}-{rank}.pt")
    dist.destroy_process_group()
    faulthandler.cancel_dump_traceback_later()
