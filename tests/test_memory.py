"""The memory estimate against real tensors: of modules, optimisers, and what a forward pass leaves behind."""

import argparse
import gc
import json
import random
import subprocess
import sys

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sovit.cli import memory as command
from sovit.flops import BLOCKS, NORMS, POOLS, num_params
from sovit.memory import CHECKPOINTING, Model, block_tensors, choose_layout, estimate, other_tensors
from sovit.models.blocks import checkpoint_blocks
from sovit.models.vit import build_vit
from sovit.optim import build_optimizer
from sovit.shape import Shape, parse_shape

VIT22B = {"block": "parallel", "qk_norm": True, "qkv_bias": False, "norm": "rmsnorm"}
TINY = Model(Shape(32, 4, 128, 4, 8), 16, channels=1, pool="avg", num_classes=256)
B16 = Model(parse_shape("B/16"), 224, num_classes=1000)
LARGEST = Model(parse_shape("22B/14"), 224, **VIT22B)


def built(model: Model) -> torch.nn.Module:
    return build_vit(**vars(model))


def random_model(rng: random.Random) -> Model:
    heads, patch = rng.randint(1, 5), rng.randint(1, 9)
    return Model(
        Shape(heads * rng.randint(1, 20), rng.randint(1, 3), rng.randint(1, 200), heads, patch),
        patch * rng.randint(1, 4),
        channels=rng.randint(1, 4),
        pool=rng.choice(POOLS),
        num_classes=rng.choice([0, 1, 10, 37]),
        block=rng.choice(BLOCKS),
        qk_norm=rng.random() < 0.5,
        qkv_bias=rng.random() < 0.5,
        norm=rng.choice(list(NORMS)),
    )


def test_tensors_are_those_of_the_module_by_name_and_dimensions():
    rng = random.Random(0)
    for _ in range(200):
        model = random_model(rng)
        with torch.device("meta"):
            found = {name: tuple(p.shape) for name, p in built(model).named_parameters()}
        expected = {
            f"blocks.{i}.{name}": d for i in range(model.shape.depth) for name, d in block_tensors(model).items()
        }
        assert found == expected | other_tensors(model), model


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
@pytest.mark.parametrize("options", [{}, VIT22B], ids=["vit", "vit22b"])
@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-true"])
def test_weights_gradients_and_state_are_those_of_real_tensors_to_the_byte(optimizer, options, precision):
    model = Model(Shape(40, 2, 100, 4, 8), 16, num_classes=40, **options)
    dtype = {"32": torch.float32, "64": torch.float64, "bf16": torch.bfloat16}[precision.partition("-")[0]]
    module = built(model).to(dtype)
    stepper = build_optimizer(module, optimizer, lr=1e-3, weight_decay=0.1, head_weight_decay=0.1)
    for p in module.parameters():
        p.grad = torch.zeros_like(p)
    stepper.step()
    found = estimate(model, micro_batch=1, precision=precision, optimizer=optimizer)
    assert found.weights == found.averaged == sum(p.nbytes for p in module.parameters())
    assert found.gradients == sum(p.grad.nbytes for p in module.parameters())
    assert found.optimizer == sum(v.nbytes for state in stepper.state.values() for v in state.values())
    assert estimate(model, micro_batch=1, ema=False).averaged == 0


class Made(TorchDispatchMode):
    """Remembers every storage that an operation returns, without keeping it alive."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                self.storages[StorageWeakRef(value.untyped_storage())] = value.untyped_storage().nbytes()
        return result


def bytes_kept(module: torch.nn.Module, images: torch.Tensor, mixed: bool) -> tuple[int, torch.Tensor]:
    """Bytes of the storages that live on after a forward pass: what autograd, or checkpointing, keeps."""
    made = Made()
    with made, torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        result = module(images)
    gc.collect()
    parameters = {StorageWeakRef(p.untyped_storage()) for p in module.parameters()}
    alive = {key: size for key, size in made.storages.items() if not key.expired() and key not in parameters}
    return sum(alive.values()), result


KEPT = [
    (Shape(64, 3, 160, 4, 4), 16, {}),
    (Shape(96, 2, 96, 8, 8), 48, {"qk_norm": True, "norm": "layernorm_nobias"}),
    (Shape(64, 2, 256, 2, 4), 24, {"norm": "rmsnorm", "pool": "avg"}),
    (Shape(64, 3, 128, 4, 4), 16, {"norm": "rmsnorm", "qk_norm": True, "qkv_bias": False, "pool": "token"}),
    (Shape(48, 4, 192, 4, 4), 24, {"block": "parallel", "pool": "avg"}),
    (Shape(64, 3, 256, 4, 4), 16, VIT22B),
    (Shape(80, 2, 64, 5, 8), 48, VIT22B | {"norm": "layernorm"}),
]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize(("shape", "size", "options"), KEPT, ids=range(len(KEPT)))
def test_activations_are_what_a_forward_pass_leaves_behind_within_3_percent(
    shape, size, options, checkpointing, precision
):
    model = Model(shape, size, num_classes=10, **options)
    torch.manual_seed(0)
    module = built(model)
    checkpoint_blocks(module, checkpointing)
    images = torch.randn(8, 3, size, size)
    kept, _ = bytes_kept(module, images, precision == "bf16-mixed")
    found = estimate(model, micro_batch=8, precision=precision, checkpointing=checkpointing, gpu=False)
    expected = found.activations + found.copies - images.nbytes + 8 * 10 * (2 if precision == "bf16-mixed" else 4)
    if checkpointing != "none":  # autocast's matrices come and go with the blocks
        matrices = sum(p.numel() for name, p in module.blocks.named_parameters() if p.ndim > 1)
        expected -= 2 * matrices if precision == "bf16-mixed" else 0
    assert kept == pytest.approx(expected, rel=0.03)


class Peak(Made):
    """The most bytes alive at once, apart from those of ``params``."""

    def __init__(self, params: set[StorageWeakRef]) -> None:
        super().__init__()
        self.params, self.most = params, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = super().__torch_dispatch__(function, types, args, kwargs)
        self.storages = {key: size for key, size in self.storages.items() if not key.expired()}
        self.most = max(self.most, sum(size for key, size in self.storages.items() if key not in self.params))
        return result


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("options", [{}, {"qk_norm": True}, VIT22B], ids=["vit", "qk_norm", "vit22b"])
def test_the_peak_of_a_whole_step_is_never_above_the_estimate_nor_far_below(options, checkpointing, precision):
    model = Model(Shape(64, 4, 256, 4, 4), 16, num_classes=10, **options)
    module = built(model)
    checkpoint_blocks(module, checkpointing)
    images, labels = torch.randn(16, 3, 16, 16), torch.arange(16) % 10
    for p in module.parameters():
        p.grad = torch.zeros_like(p)
    with Peak({StorageWeakRef(p.untyped_storage()) for p in module.parameters()}) as peak:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
            loss = torch.nn.functional.cross_entropy(module(images), labels)
        loss.backward()
    found = estimate(model, micro_batch=16, precision=precision, checkpointing=checkpointing, gpu=False)
    expected = found.activations + found.working + found.logits + found.copies - images.nbytes
    assert 0.65 * expected < peak.most <= expected


@pytest.mark.parametrize("options", [{}, VIT22B], ids=["vit", "vit22b"])
def test_checkpointing_really_keeps_less_the_more_is_computed_again(options):
    model = Model(Shape(64, 4, 256, 4, 4), 24, pool="avg", **options)
    kept = {}
    for kind in CHECKPOINTING:
        module = built(model)
        checkpoint_blocks(module, kind)
        kept[kind], _ = bytes_kept(module, torch.randn(4, 3, 24, 24), mixed=False)
    assert kept["none"] > 1.4 * kept["selective"] > 1.4 * 2 * kept["full"]


def test_averages_and_shards_divide_as_they_should():
    """Over 64 shards everything sharded is a 64th, but for tensors of one row: the table of positions stays whole."""
    one = estimate(LARGEST, micro_batch=1, kind="fsdp", precision="bf16-mixed", optimizer="adamw")
    many = estimate(LARGEST, micro_batch=1, kind="fsdp", precision="bf16-mixed", optimizer="adamw", shards=64)
    for group in ("weights", "gradients", "optimizer", "averaged"):
        assert getattr(many, group) == pytest.approx(getattr(one, group) / 64, rel=0.01)
    for group in ("copies", "activations", "working", "logits"):
        assert getattr(many, group) == getattr(one, group)


SHARDED = """
import json, sys, torch, torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.distributed.fsdp import fully_shard
from sovit.models.vit import build_vit
from sovit.shape import parse_shape
dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=64)
with torch.device("meta"):
    model = build_vit(parse_shape("22B/14"), image_size=224, **json.loads(sys.argv[1]))
for block in model.blocks:
    fully_shard(block)
fully_shard(model)
local = [p.to_local() for p in model.parameters()]
print(json.dumps([sum(p.numel() for p in model.parameters()), sum(p.nbytes for p in local)]))
"""


def test_22b_weights_on_one_of_64_processes_are_those_of_fully_shard_to_the_byte():
    """On the meta device and a process group without processes: nothing of the 83 GiB is allocated."""
    pytest.importorskip("torch.testing._internal.distributed.fake_pg")
    words = [sys.executable, "-W", "ignore", "-c", SHARDED, json.dumps(VIT22B)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    total, local = json.loads(done.stdout)
    assert total == sum(num_params(**vars(LARGEST)).values())
    assert estimate(LARGEST, micro_batch=1, kind="fsdp", shards=64).weights == local


def sizes(model: Model, gibibytes: float, batch: int, **arguments) -> tuple[int, int, str]:
    found = choose_layout(model, device_bytes=gibibytes * 2**30, global_batch_size=batch, **arguments)
    return found.micro_batch, found.accumulation, found.checkpointing


def test_the_embedded_default_takes_its_whole_batch_at_once():
    assert sizes(TINY, 1, 128) == (128, 1, "none")


def test_a_layout_divides_the_share_of_a_process_and_is_the_largest_that_fits():
    for batch, world in [(4096, 1), (4096, 8), (1500, 4), (97, 1)]:
        share = batch // world
        found = choose_layout(B16, device_bytes=2**34, global_batch_size=batch, world=world)
        assert found.micro_batch * found.accumulation == share
        larger = [n for n in range(found.micro_batch + 1, share + 1) if share % n == 0]
        assert found.memory.total <= 0.85 * 2**34
        for n in larger:
            assert estimate(B16, micro_batch=n, checkpointing=found.checkpointing).total > 0.85 * 2**34


def test_less_memory_means_smaller_micro_batches_then_more_computed_again():
    found = [sizes(B16, 2.25 * 1.1**k, 4096) for k in range(45)]  # to 149 GiB
    order = [CHECKPOINTING.index(kind) for _, _, kind in found]
    assert order == sorted(order, reverse=True) and set(order) == {0, 1, 2}
    for kind in CHECKPOINTING:
        micro = [size for size, _, chosen in found if chosen == kind]
        assert micro == sorted(micro)
    assert all(size * B16.tokens >= 4096 or kind == "full" for size, _, kind in found)


def test_what_is_asked_for_is_taken_and_a_bound_is_kept():
    assert sizes(B16, 1, 4096, micro_batch=64, checkpointing="none") == (64, 64, "none")
    assert sizes(B16, 64, 4096, checkpointing="full")[2] == "full"
    free = sizes(B16, 64, 4096)[0]
    assert sizes(B16, 64, 4096, at_most=free - 1)[0] < free
    assert sizes(B16, 64, 96, at_most=7)[0] == 6
    assert sizes(B16, 64, 96, at_most=7, micro_batch=32) == (6, 16, "none"), "what ran out of memory is not tried again"
    assert sizes(B16, 64, 4096, micro_batch=16)[:2] == (16, 256)


def test_a_model_that_fits_on_no_device_is_refused_with_what_it_needs_and_the_mend():
    with pytest.raises(
        ValueError, match=r"^6144x48x24576 needs at least [\d.,]+ GiB on each device \(micro_batch=1, "
    ) as e:
        choose_layout(LARGEST, device_bytes=80 * 2**30, global_batch_size=64, precision="bf16-mixed")
    (mend,) = [word for word in str(e.value).split() if word.startswith("parallel.shard=")]
    shards = int(mend.rstrip(".").partition("=")[2])
    spread = {"device_bytes": 80 * 2**30, "global_batch_size": 64, "precision": "bf16-mixed", "kind": "fsdp"}
    assert choose_layout(LARGEST, **spread, world=shards, shards=shards).micro_batch >= 1
    with pytest.raises(ValueError, match="needs at least"):
        choose_layout(LARGEST, **spread, world=shards // 2, shards=shards // 2)
    with pytest.raises(ValueError, match="no number of devices"):
        choose_layout(LARGEST, **(spread | {"device_bytes": 2**30}), world=64, shards=64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"precision": "fp8"}, "precision='fp8' is unknown; use one of 32-true"),
        ({"optimizer": "sgd"}, "optimizer='sgd' is unknown"),
        ({"checkpointing": "auto"}, "checkpointing='auto' is unknown"),
        ({"micro_batch": 0}, "micro_batch=0 must be at least 1"),
        ({"shards": 2}, "shards=2 needs kind='fsdp', not 'single'"),
    ],
)
def test_impossible_estimates_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        estimate(TINY, **({"micro_batch": 1} | arguments))


def test_impossible_layouts_are_refused():
    with pytest.raises(ValueError, match="global_batch_size=10 does not divide among 3 processes"):
        choose_layout(TINY, device_bytes=1e9, global_batch_size=10, world=3)
    with pytest.raises(ValueError, match="micro_batch=4 does not divide the 10 images"):
        choose_layout(TINY, device_bytes=1e9, global_batch_size=10, micro_batch=4)


def printed(capsys, *arguments: str) -> str:
    parser = argparse.ArgumentParser()
    command.add(parser.add_subparsers())
    parsed = parser.parse_args(["memory", *arguments])
    assert parsed.command(parsed) == 0
    return capsys.readouterr().out


def test_the_table_of_22b_by_devices(capsys):
    """Nothing is allocated: a million times the memory of this test."""
    out = printed(capsys, "22B/14", "--devices", "1,8,64,256,1024", "--micro-batch", "4", "--checkpointing", "full")
    lines = {line.split("  ")[0]: line.split()[-5:] for line in out.splitlines() if line}
    assert "22,203,303,936 parameters" in out
    assert lines["GiB on each of"] == ["1", "8", "64", "256", "1024"]
    weights = [float(text) for text in lines["weights"]]
    assert weights[:3] == pytest.approx([4 * 22.2033e9 / 2**30 / n for n in (1, 8, 64)], rel=0.01)
    totals = [float(text) for text in lines["total"]]
    assert totals == sorted(totals, reverse=True)
    groups = [
        [float(text) for text in values] for name, values in lines.items() if name[0].islower() and name != "total"
    ]
    assert [sum(column) for column in zip(*groups, strict=True)] == pytest.approx(totals, abs=0.03)


def test_the_same_table_in_bytes(capsys):
    arguments = [
        "So400m/14",
        "--devices",
        "1,8",
        "--micro-batch",
        "16",
        "--precision",
        "32-true",
        "--optimizer",
        "adamw",
    ]
    content = json.loads(printed(capsys, *arguments, "--no-ema", "--json"))
    assert content["num_params"] == 427_680_704
    for count, kind in (("1", "single"), ("8", "fsdp")):
        expected = estimate(
            Model(parse_shape("So400m/14"), 224), micro_batch=16, ema=False, kind=kind, shards=int(count)
        )
        assert content["bytes_per_device"][count] == expected.as_dict() | {"total": expected.total}
