"""Checkpointed and compiled blocks: the same numbers, the same names, fewer bytes (those are counted in test_memory)."""

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from sovit.models.blocks import checkpoint_blocks, compile_blocks
from sovit.models.vit import build_vit
from sovit.shape import Shape

SHAPE = Shape(48, 4, 96, 4, 4)
VIT22B = {"block": "parallel", "qk_norm": True, "qkv_bias": False, "norm": "rmsnorm"}
OPTIONS = pytest.mark.parametrize("options", [{}, VIT22B], ids=["serial", "parallel"])
# torch's own look at a tensor that it traces
TRACED = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


def build(options, drop_path_rate=0.0):
    torch.manual_seed(0)
    model = build_vit(SHAPE, image_size=16, num_classes=5, drop_path_rate=drop_path_rate, **options)
    torch.nn.init.normal_(model.head.weight)  # zero, and no gradient would reach the blocks
    return model


def gradients(model, size=6):
    torch.manual_seed(1)  # stochastic depth
    loss = model(torch.randn(size, 3, 16, 16)).square().mean()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()} | {"loss": loss.detach()}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert value.abs().sum() > 0, name
        assert torch.equal(found[name], value), name


@OPTIONS
@pytest.mark.parametrize("kind", ["none", "selective", "full"])
@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_checkpointing_changes_no_bit_and_no_name(options, kind, rate):
    """Stochastic depth too: what is computed again draws the same numbers."""
    expected = gradients(build(options, rate))
    model = build(options, rate)
    names = list(model.state_dict())
    checkpoint_blocks(model, kind)
    assert list(model.state_dict()) == names
    assert_equal(gradients(model), expected)


@OPTIONS
@pytest.mark.parametrize("kind", ["selective", "full"])
def test_a_copy_of_a_checkpointed_model_is_a_model_of_its_own(options, kind):
    """A forward pass wrapped on the instance would go on calling the blocks of the original."""
    model = build(options)
    checkpoint_blocks(model, kind)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in twin.blocks.parameters():
            p.zero_()
    images = torch.randn(2, 3, 16, 16)
    assert not torch.equal(model(images), twin(images))
    twin.load_state_dict(model.state_dict())
    assert torch.equal(model(images), twin(images))


@TRACED
@OPTIONS
@pytest.mark.parametrize("kind", ["none", "selective", "full"])
def test_all_blocks_compile_to_one_graph_under_any_checkpointing(options, kind):
    expected = gradients(build(options))
    model = build(options)
    names = list(model.state_dict())
    checkpoint_blocks(model, kind)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compile_blocks(model, backend=counter, fullgraph=True)
    found = gradients(model)
    assert counter.frame_count == 1
    assert list(model.state_dict()) == names
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)


@TRACED
def test_stochastic_depth_does_not_make_the_compiler_give_up():
    """One graph a rate: beyond eight, dynamo would leave the rest of the blocks uncompiled, or raise here."""
    torch.manual_seed(0)
    model = build_vit(Shape(8, 12, 8, 1, 8), image_size=8, pool="avg", drop_path_rate=0.5)
    torch._dynamo.reset()
    compile_blocks(model, backend="eager", fullgraph=True)
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    model.eval()
    model(torch.randn(2, 3, 8, 8))


def test_what_cannot_be_checkpointed_is_refused():
    model = build({})
    with pytest.raises(ValueError, match="checkpointing='auto' is unknown; use one of none, selective, full"):
        checkpoint_blocks(model, "auto")
    checkpoint_blocks(model, "full")
    with pytest.raises(ValueError, match="have activation checkpointing already"):
        checkpoint_blocks(model, "selective")
