"""``sovit memory``."""

from __future__ import annotations

import argparse
import json

from sovit.cli.options import positive
from sovit.cli.shape import add_model, model_of

GROUPS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimiser state",
    "averaged": "averaged weights",
    "copies": "gathered or cast weights",
    "activations": "activations",
    "working": "backward pass of one block",
    "logits": "logits",
    "features": "few-shot features",
}
NOTE = (
    "Estimated in closed form, for eager torch on GPUs; torch.compile keeps less. Not in it: the CUDA context, "
    "fragmentation, workspaces."
)


def add(commands: argparse._SubParsersAction) -> None:
    memory = commands.add_parser("memory", help="memory of a training step on each device, by number of devices")
    add_model(memory)
    memory.add_argument(
        "--devices",
        type=_counts,
        default=(1, 8, 64),
        metavar="N,N,...",
        help="devices that share a copy of the weights by parallel=fsdp; 1 for a whole copy (default: 1,8,64)",
    )
    memory.add_argument("--micro-batch", type=positive, default=1, metavar="N", help="images at once (default: 1)")
    memory.add_argument("--precision", default="bf16-mixed", help="as trainer.precision (default: %(default)s)")
    memory.add_argument("--optimizer", default="adafactor", help="adamw or adafactor (default: %(default)s)")
    memory.add_argument("--checkpointing", default="none", help="none, selective or full (default: %(default)s)")
    memory.add_argument("--no-ema", action="store_true", help="no moving average of the weights (eval.weights)")
    memory.add_argument("--json", action="store_true", help="print JSON, in bytes")
    memory.set_defaults(command=_memory)


def _counts(text: str) -> tuple[int, ...]:
    return tuple(positive(part.strip()) for part in text.split(","))


def _memory(arguments: argparse.Namespace) -> int:
    from sovit.flops import num_params
    from sovit.memory import estimate

    model = model_of(arguments)
    training = {
        "micro_batch": arguments.micro_batch,
        "precision": arguments.precision,
        "optimizer": arguments.optimizer,
        "ema": not arguments.no_ema,
        "checkpointing": arguments.checkpointing,
    }
    found = {
        count: estimate(model, **training, kind="fsdp" if count > 1 else "single", shards=count)
        for count in arguments.devices
    }
    params = sum(num_params(**vars(model)).values())
    if arguments.json:
        content = {
            **vars(model),
            "shape": model.shape.as_dict(),
            "num_params": params,
            **training,
            "bytes_per_device": {str(n): {**memory.as_dict(), "total": memory.total} for n, memory in found.items()},
        }
        print(json.dumps(content, indent=1))
        return 0
    print(
        f"{model.shape}, {params:,} parameters, {model.tokens} tokens an image, {arguments.micro_batch} "
        f"image{'s' if arguments.micro_batch > 1 else ''} at once, {arguments.precision}, {arguments.optimizer}, "
        f"checkpointing {arguments.checkpointing}\n"
    )
    print(f"{'GiB on each of':<28}" + "".join(f"{count:>11}" for count in found))
    for group, words in GROUPS.items():
        values = [getattr(memory, group) for memory in found.values()]
        if max(values) >= 0.005 * 2**30:
            print(f"{words:<28}" + "".join(f"{value / 2**30:>11.2f}" for value in values))
    print(f"{'total':<28}" + "".join(f"{memory.total / 2**30:>11.2f}" for memory in found.values()) + "\n")
    print(NOTE)
    return 0
