"""Adafactor on whole tensors against timm's, and on tensors sharded over processes against whole ones."""

import copy
import multiprocessing

import pytest
import torch
from timm.optim import AdafactorBigVision

from sharded_steps import OPTIMISERS, SAVED_AT, STEPS, build, train, whole, work
from sovit.adafactor import Adafactor

SHAPES = [(40, 48), (48, 40), (40, 40), (31, 64), (7,), (48, 1, 8, 8), (1, 36, 48), (2, 3), (33, 36, 34), (33, 33, 33)]


def pair(dtype, cap):
    """The same parameters under timm's Adafactor and under ours."""
    theirs = [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in SHAPES]
    ours = copy.deepcopy(theirs)
    reference = AdafactorBigVision(
        [{"params": theirs[::2], "weight_decay": 0.3}, {"params": theirs[1::2]}],
        lr=0.01,
        min_dim_size_to_factor=32,
        beta2_cap=cap,
        momentum_dtype=torch.float32,
        eps=1e-30,
    )
    optimizer = Adafactor([{"params": ours[::2], "weight_decay": 0.3}, {"params": ours[1::2]}], lr=0.01, beta2_cap=cap)
    return theirs, reference, ours, optimizer


@pytest.mark.parametrize("cap", [0.999, 0.6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whole_tensors_are_updated_as_by_timm_to_the_last_bit(dtype, cap):
    torch.manual_seed(0)
    theirs, reference, ours, optimizer = pair(dtype, cap)
    for step in range(6):
        for p, q in zip(theirs, ours, strict=True):
            p.grad = torch.randn_like(p) * (step + 1)
            q.grad = p.grad.clone()
        theirs[4].grad = ours[4].grad = None if step == 2 else ours[4].grad
        for group in (*reference.param_groups, *optimizer.param_groups):
            group["lr"] = 0.01 * (step + 1)
        reference.step()
        optimizer.step()
    for p, q in zip(theirs, ours, strict=True):
        assert torch.equal(p, q), p.shape
        assert reference.state[p].keys() == optimizer.state[q].keys()
        for key, value in reference.state[p].items():
            assert torch.equal(value, optimizer.state[q][key]), (p.shape, key)


def test_a_resume_in_bfloat16_keeps_the_momentum_in_float32():
    """torch's own load_state_dict rounds all state to the parameter's dtype."""
    torch.manual_seed(0)
    _, _, ours, optimizer = pair(torch.bfloat16, 0.999)
    for q in ours:
        q.grad = torch.randn_like(q)
    optimizer.step()
    _, _, others, resumed = pair(torch.bfloat16, 0.999)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for p, q in zip(ours, others, strict=True):
        assert torch.equal(optimizer.state[p]["exp_avg"], resumed.state[q]["exp_avg"])
        assert resumed.state[q]["exp_avg"].dtype == torch.float32


def test_a_state_that_timm_saved_is_gone_on_with():
    """Resume points of earlier versions hold timm's groups and state."""
    torch.manual_seed(0)
    theirs, reference, ours, optimizer = pair(torch.float32, 0.6)
    for step in range(4):
        for p, q in zip(theirs, ours, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        if step == 2:
            optimizer.load_state_dict(copy.deepcopy(reference.state_dict()))
            with torch.no_grad():
                for p, q in zip(theirs, ours, strict=True):
                    q.copy_(p)
        reference.step()
        if step >= 2:
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(theirs, ours, strict=True))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two processes train and save; then one, two, and two by two go on from what they saved."""
    folder = tmp_path_factory.mktemp("sharded")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sovit.models.vit", "sovit.optim", "torch.distributed.fsdp", "torch._dynamo"])
    for world, replicas, begin in [(2, 1, 0), (1, 1, SAVED_AT), (2, 1, SAVED_AT), (4, 2, SAVED_AT)]:
        workers = [context.Process(target=work, args=(rank, world, replicas, begin, folder)) for rank in range(world)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(120)
            assert worker.exitcode == 0
    return folder


def load(path):
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("name", OPTIMISERS)
@pytest.mark.parametrize(("world", "begin"), [(2, 0), (1, SAVED_AT), (2, SAVED_AT), (4, SAVED_AT)])
def test_sharded_parameters_are_updated_as_whole_ones(folder, name, world, begin):
    """Over 2 processes; and over 1, 2, and 2 x 2 (two copies, each sharded over two), on from a checkpoint of 2."""
    model, optimizer = build(name)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, optimizer, range(STEPS))
    expected, found = whole(model, optimizer), load(folder / f"end-{name}-{world}-{begin}.pt")
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(
            found[key], value, rtol=1e-12, atol=1e-12, msg=lambda text, key=key: f"{key}: {text}"
        )
    assert all((p - start[name]).abs().max() > 1e-3 for name, p in model.named_parameters())


@pytest.mark.parametrize("name", OPTIMISERS)
def test_a_checkpoint_of_two_processes_loads_to_the_same_bits_on_one_two_and_four(folder, name):
    saved = load(folder / f"saved-{name}.pt")
    for world in (1, 2, 4):
        loaded = load(folder / f"loaded-{name}-{world}.pt")
        assert loaded.keys() == saved.keys()
        assert all(torch.equal(loaded[key], value) for key, value in saved.items()), world
    straight, resumed = (load(folder / f"end-{name}-2-{begin}.pt") for begin in (0, SAVED_AT))
    assert all(torch.equal(resumed[key], value) for key, value in straight.items())


@pytest.mark.parametrize("name", OPTIMISERS)
def test_every_process_holds_its_share_of_the_state(folder, name):
    """Momentum, the large part, is halved between two processes; only means over a sharded dimension are held twice."""
    model, optimizer = build(name)
    train(model, optimizer, range(1))
    total = sum(v.numel() for state in optimizer.state.values() for key, v in state.items() if key != "step")
    largest = max(load(folder / f"numel-{name}-2-0-{rank}.pt") for rank in range(2))
    assert largest < 0.53 * total
