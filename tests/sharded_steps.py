"""A worker of `test_adafactor`: steps of both optimisers on parameters that ``fully_shard`` spread over processes."""

from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from sovit.models.vit import build_vit
from sovit.optim import build_optimizer
from sovit.shape import Shape

SHAPE = Shape(33, 2, 65, 3, 4)  # matrices of both orientations that are factored, and that two or four do not divide
OPTIMISERS = ("adamw", "adafactor")
STEPS, SAVED_AT = 6, 3


def build(name: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = build_vit(SHAPE, image_size=8, num_classes=40, pool="map").double()
    return model, optimiser_of(model, name)


def optimiser_of(model: nn.Module, name: str) -> torch.optim.Optimizer:
    return build_optimizer(model, name, lr=1e-2, weight_decay=0.05, head_weight_decay=0.5, lr_rule="by_shape")


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    """Gradients are a function of the step, sharded where the parameter is."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for p in model.parameters():
            gradient = torch.randn(p.shape, generator=generator, dtype=torch.float64) * (step + 1)
            sharded = isinstance(p, DTensor)
            p.grad = distribute_tensor(gradient, p.device_mesh, p.placements) if sharded else gradient
        optimizer.step()


def whole(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Parameters and optimiser state by name, gathered."""
    found = {}
    for name, p in model.named_parameters():
        for key, value in {"": p.detach(), **optimizer.state[p]}.items():
            found[f"{name} {key}"] = (value.full_tensor() if isinstance(value, DTensor) else value).clone()
    return found


def work(rank: int, world: int, replicas: int, begin: int, folder: Path) -> None:
    """Steps ``begin`` to STEPS, from the checkpoint in the folder unless from 0; saves one on the way there."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store{world}-{begin}", rank=rank, world_size=world)
    if replicas > 1:
        mesh = init_device_mesh("cpu", (replicas, world // replicas), mesh_dim_names=("replicate", "shard"))
    else:
        mesh = init_device_mesh("cpu", (world,))
    for name in OPTIMISERS:
        model, _ = build(name)
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        optimizer = optimiser_of(model, name)
        checkpoint = folder / f"checkpoint-{name}"
        if begin:
            with torch.no_grad():
                for p in model.parameters():
                    p.fill_(torch.nan)
            weights, state = get_state_dict(model, optimizer)
            dcp.load({"weights": weights, "state": state}, checkpoint_id=checkpoint)
            set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
            loaded = whole(model, optimizer)
            if rank == 0:
                torch.save(loaded, folder / f"loaded-{name}-{world}.pt")
        else:
            train(model, optimizer, range(SAVED_AT))
            weights, state = get_state_dict(model, optimizer)
            dcp.save({"weights": weights, "state": state}, checkpoint_id=checkpoint)
            saved = whole(model, optimizer)
            if rank == 0:
                torch.save(saved, folder / f"saved-{name}.pt")
        train(model, optimizer, range(SAVED_AT, STEPS))
        end = whole(model, optimizer)
        local = sum(
            v.to_local().numel() for s in optimizer.state.values() for v in s.values() if isinstance(v, DTensor)
        )
        torch.save(local, folder / f"numel-{name}-{world}-{begin}-{rank}.pt")
        if rank == 0:
            torch.save(end, folder / f"end-{name}-{world}-{begin}.pt")
    dist.destroy_process_group()
