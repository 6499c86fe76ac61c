"""How a model is spread over processes: one process, copies (DDP), or shards (FSDP2), as Lightning strategies.

The order is fixed: activation checkpointing, then torch.compile, both block by block (`sovit.models.blocks`), then
fully_shard of each block and of the model, then the weights. Weights are drawn whole, by the first process, from the
run's seed, and sent to where their parts lie, so that a run begins with the same bits on any number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from sovit.lit import checkpoints, sharded
from sovit.lit.ranks import Ranks
from sovit.models.blocks import checkpoint_blocks, compile_blocks, norms_in_float32

METHODS = ("forward_features", "forward_head", "forward_contrast")  # of models, beside forward, that gather weights


def make_strategy(kind: str, ranks: Ranks, check: Callable[[], None]) -> Strategy | str:
    """Lightning's strategy for ``parallel.kind``; ``check`` is called before a resume point takes its place."""
    if kind == "ddp":
        return DDPStrategy(broadcast_buffers=False, gradient_as_bucket_view=True)
    if kind == "fsdp":
        return Sharded(ranks, check)
    return "auto"


def shard_size(ranks: Ranks, asked: int | None) -> int:
    """Processes that share one copy of the weights: those of a node unless asked otherwise."""
    return asked or ranks.local_world


def spread(
    *, kind: str, checkpointing: str, compiled: bool, precision: str, shard: int | None, ranks: Ranks
) -> Callable[[nn.Module, torch.device], None]:
    """What is to be done with a model on a process's device, in place, once the processes are connected.

    For fsdp it lies on the meta device, but in the first process, where it holds the weights to begin with.
    """

    def prepare(model: nn.Module, device: torch.device) -> None:
        checkpoint_blocks(model, checkpointing)  # type: ignore[arg-type]
        if compiled:
            compile_blocks(model)
        if kind == "fsdp":
            _shard(model, device, precision, shard_size(ranks, shard), ranks)

    return prepare


def _shard(model: nn.Module, device: torch.device, precision: str, size: int, ranks: Ranks) -> None:
    whole = {name: tensor.clone() for name, tensor in model.state_dict().items()} if ranks.first else {}
    mesh = init_device_mesh(device.type, (ranks.world // size, size), mesh_dim_names=("copies", "shards"))
    # Blocks are gathered and computed in bfloat16, gradients summed in float32. What lies outside of the blocks stays
    # float32 and so keeps the residual stream float32, as in one process under autocast.
    low = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    same = MixedPrecisionPolicy(
        reduce_dtype=torch.float32 if precision == "bf16-true" else None, cast_forward_inputs=False
    )
    model.to("meta")
    for block in model.blocks:  # type: ignore[union-attr]
        if precision == "bf16-mixed":
            norms_in_float32(block)
        fully_shard(block, mesh=mesh, mp_policy=low if precision == "bf16-mixed" else same)
    # Gathered weights must not outlive an evaluation, which is done with others: the average (Ema.in_place).
    fully_shard(model, mesh=mesh, mp_policy=same, reshard_after_forward=True)
    model.to_empty(device=device)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, whole, options=options)
    for method in METHODS:
        if hasattr(model, method):
            register_fsdp_forward_method(model, method)


class Sharded(ModelParallelStrategy):
    """FSDP2 with resume points in parts (`sovit.lit.sharded`), and able to go on from those of one process."""

    def __init__(self, ranks: Ranks, check: Callable[[], None]) -> None:
        super().__init__(data_parallel_size=ranks.world, tensor_parallel_size=1)
        self.ranks, self.check = ranks, check

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return {}  # save_checkpoint takes the tensors from where they are

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        return {}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        model, optimizer = self._model_and_optimizer()
        average = checkpoint["callbacks"].pop("Ema", {})
        tensors = {
            **{f"{sharded.MODEL}{name}": tensor for name, tensor in model.state_dict().items()},
            **sharded.optimizer_tensors(model, optimizer),
            **{f"{sharded.AVERAGE}{name}": tensor for name, tensor in average.items()},
        }
        rest = {key: value for key, value in checkpoint.items() if key not in ("state_dict", "optimizer_states")}
        rest["param_groups"] = sharded.param_groups(model, optimizer)
        rest["optimizer_values"] = sharded.optimizer_values(model, optimizer)
        sharded.write(Path(filepath), tensors, rest, self.ranks, self.check)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        path = Path(checkpoint_path)
        model, optimizer = self._model_and_optimizer()
        _begin_state(optimizer)
        live = {
            **{f"{sharded.MODEL}{name}": tensor for name, tensor in model.state_dict().items()},
            **sharded.optimizer_tensors(model, optimizer),
        }
        if path.is_dir():
            rest = checkpoints.read(path)
            values = rest["optimizer_values"]
            held = sharded.read_index(path)["tensors"]
            average = {
                name: torch.empty_like(parameter)
                for name, parameter in model.named_parameters()
                if f"{sharded.AVERAGE}{name}" in held
            }
            live |= {f"{sharded.AVERAGE}{name}": tensor for name, tensor in average.items()}
            sharded.read_into(path, live)
            if average:
                rest["callbacks"]["Ema"] = average
        else:
            rest = checkpoints.read(path, mmap=True)
            found, values = checkpoints.by_name(rest, sharded.param_groups(model, optimizer))
            _fill(live, found)
        for name, parameter in model.named_parameters():
            optimizer.state[parameter].update(values.get(name, {}))
        return {**rest, "state_dict": {}, "optimizer_states": []}

    def _model_and_optimizer(self) -> tuple[nn.Module, torch.optim.Optimizer]:
        assert self.lightning_module is not None
        model = self.lightning_module.model
        assert isinstance(model, nn.Module)
        return model, self.optimizers[0]


@torch.no_grad()
def _fill(live: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    for name, tensor in live.items():
        sharded.local(tensor).copy_(sharded.part_of(found[name], tensor))


@torch.no_grad()
def _begin_state(optimizer: torch.optim.Optimizer) -> None:
    """Give an optimiser that has not taken a step the tensors of its state, by a step of length zero."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
