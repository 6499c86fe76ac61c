"""Contrastive losses: the formulas of the papers, and the same over processes without the matrix of all pairs."""

import math
import multiprocessing
import random

import pytest
import torch
from torch import Tensor

from contrastive_ranks import BATCH, LOSSES, TYPES, WIDTH, Largest, Model, batch, dense, ours, work
from sovit.language.contrastive import BIAS, LOG_SCALE, sigmoid_loss, softmax_loss
from sovit.launch.processes import free_port

WORLDS = (2, 4)
NAMES = ("images", "texts", "log_scale", "bias")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each process of 2 and of 4 found."""
    folder = tmp_path_factory.mktemp("ranks")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sovit.language.contrastive", "torch.nn.parallel"])
    for world in WORLDS:
        port = free_port()
        workers = [context.Process(target=work, args=(rank, world, port, folder)) for rank in range(world)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(120)
            worker.kill()
            assert worker.exitcode == 0
    return {
        world: [torch.load(folder / f"{world}-{rank}.pt", weights_only=True) for rank in range(world)]
        for world in WORLDS
    }


def gradients(loss: Tensor, inputs: list[Tensor]) -> dict[str, Tensor | None]:
    return dict(zip(NAMES, torch.autograd.grad(loss, inputs, allow_unused=True), strict=True))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize(("label", "close"), [("float64", 1e-12), ("float32", 1e-6)])
def test_the_mean_over_processes_is_the_dense_loss_with_its_gradients(name, world, label, close, found):
    """Each process sees its own rows; a text that forgot what others say of it would have too small a gradient."""
    inputs = batch(TYPES[label])
    wanted = dense(name, *inputs)
    parts = [one[f"{name} {label}"] for one in found[world]]
    assert float(sum(part["loss"] for part in parts) / world) == pytest.approx(wanted.item(), rel=close)
    for key, gradient in gradients(wanted, inputs).items():
        if gradient is not None:
            mean = sum(part[key] for part in parts) / world
            torch.testing.assert_close(mean, gradient, rtol=close, atol=close)
    assert {part["images"].shape[0] for part in parts} == {BATCH}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("world", WORLDS)
def test_ddp_averages_to_the_dense_gradient(name, world, found):
    images, texts, _, _ = (one.detach() for one in batch(torch.float64))
    model = Model(torch.float64)
    dense(name, images.float().double(), *model(texts.float().double())).backward()  # as the processes had them
    for part in found[world]:
        for key, parameter in model.named_parameters():
            if parameter.grad is not None:
                torch.testing.assert_close(part[f"{name} ddp"][key], parameter.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("world", WORLDS)
def test_locked_images_change_neither_loss_nor_texts_gradient_and_evaluation_needs_none(name, world, found):
    for part in found[world]:
        whole, locked = part[f"{name} float64"], part[f"{name} locked"]
        assert locked["loss"] == whole["loss"] == part[f"{name} no grad"]
        assert torch.equal(locked["texts"], whole["texts"])


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("world", (1, *WORLDS))
def test_nothing_larger_than_a_block_is_made(name, world, found):
    """Of B = 24 pairs on 4 processes, 6 x 6 logits and 6 x 5 embeddings; B x b or B x D would be 144 or 120."""
    block = (BATCH // world) ** 2
    most = max(block, BATCH // world * WIDTH)
    if world == 1:
        with Largest() as largest:
            ours(name, *batch(torch.float32))
        assert largest.numel == most
    else:
        assert {part[f"{name} float32"]["largest"] for part in found[world]} == {most}


@pytest.mark.parametrize("world", WORLDS)
def test_processes_that_do_not_match_are_told_so_instead_of_waiting_for_ever(world, found):
    for rank, part in enumerate(found[world]):
        assert ("are no pairs" if rank == 0 else "Process 0 brings no pairs") in part["none"]
        assert f"Process 0 brings 4 pairs and process {world - 1} brings 3" in part["uneven"]
        assert "process 0 and of process 1 differ" in part["other type"]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(("label", "close"), [("float64", 1e-12), ("float32", 1e-6)])
def test_one_process_has_the_dense_loss_with_its_gradients(name, label, close):
    mine, theirs = batch(TYPES[label]), batch(TYPES[label])
    found, wanted = ours(name, *mine), dense(name, *theirs)
    assert found.item() == pytest.approx(wanted.item(), rel=close)
    for key, gradient in gradients(wanted, theirs).items():
        if gradient is not None:
            torch.testing.assert_close(gradients(ours(name, *mine), mine)[key], gradient, rtol=close, atol=close)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_finite_differences(name):
    inputs = [one[:4].detach().requires_grad_() for one in batch(torch.float64)]
    used = inputs if name == "sigmoid" else inputs[:3]
    assert torch.autograd.gradcheck(lambda *given: ours(name, *given, *inputs[len(given) :]), used)


def test_two_pairs_worked_by_hand():
    """Unit vectors along the axes, the second text between them: products 1, c and 0, c with c = 1 / sqrt(2)."""
    c = math.sqrt(0.5)
    images, texts = torch.eye(2, dtype=torch.float64), torch.tensor([[1.0, 0.0], [c, c]], dtype=torch.float64)
    scale, bias = torch.tensor([[math.log(3.0)], [-1.0]], dtype=torch.float64)

    def softplus(x: float) -> float:
        return math.log(1 + math.exp(x))

    right, wrong = [3 * 1 - 1, 3 * c - 1], [3 * c - 1, 3 * 0 - 1]
    sigmoid = (sum(softplus(-x) for x in right) + sum(softplus(x) for x in wrong)) / 2
    assert sigmoid_loss(images, texts, scale, bias).item() == pytest.approx(sigmoid, rel=1e-14)
    by_row = softplus(3 * c - 3) + softplus(0 - 3 * c)  # -log softmax of (3, 3c) at the first, of (0, 3c) at the second
    by_column = softplus(0 - 3) + softplus(3 * c - 3 * c)
    assert softmax_loss(images, texts, scale).item() == pytest.approx((by_row + by_column) / 4, rel=1e-14)


@pytest.mark.parametrize("name", LOSSES)
def test_open_clip_has_the_same_losses(name):
    open_clip = pytest.importorskip("open_clip.loss")
    mine, theirs = batch(torch.float64), batch(torch.float64)
    images, texts, log_scale, bias = theirs
    if name == "sigmoid":
        wanted = open_clip.SigLipLoss()(images, texts, log_scale.exp(), bias)
    else:
        wanted = open_clip.ClipLoss()(images, texts, log_scale.exp())
    found = ours(name, *mine)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-12)
    for key, gradient in gradients(wanted, theirs).items():
        if gradient is not None:
            torch.testing.assert_close(gradients(ours(name, *mine), mine)[key], gradient, rtol=1e-12, atol=1e-12)


def test_the_first_loss_at_the_published_numbers_is_that_of_doubt_about_every_pair():
    """Of embeddings at right angles each wrong pair adds log(1 + e^-10) and the right one log(1 + e^10); softmax: log B."""
    images, texts = torch.eye(16, dtype=torch.float64).chunk(2)
    log_scale, bias = torch.tensor([[LOG_SCALE], [BIAS]], dtype=torch.float64)
    assert log_scale.exp().item() == pytest.approx(10, rel=1e-15)
    wanted = math.log1p(math.exp(10)) + 7 * math.log1p(math.exp(-10))
    assert sigmoid_loss(images, texts, log_scale, bias).item() == pytest.approx(wanted, rel=1e-12)
    assert softmax_loss(images, texts, log_scale).item() == pytest.approx(math.log(8), rel=1e-12)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_a_scale_of_ten_thousand_overflows_nothing(name, kind):
    inputs = [one.detach().to(kind).requires_grad_() for one in batch(torch.float32, math.log(1e4))]
    loss = ours(name, *inputs)
    wanted = dense(name, *(one.detach().double() for one in inputs))
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    for gradient in gradients(loss, inputs).values():
        assert gradient is None or (gradient.dtype == kind and gradient.isfinite().all())


@pytest.mark.parametrize("name", LOSSES)
def test_autocast_does_not_round_the_logits(name):
    """Products in bfloat16 would be wrong in the third digit."""
    inputs = batch(torch.float32)
    wanted = ours(name, *inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours(name, *inputs), wanted)


@pytest.mark.parametrize("name", LOSSES)
def test_a_scaled_loss_has_scaled_gradients(name):
    """As parts of a batch and gradient scalers make of it."""
    inputs = batch(torch.float64)
    once, twice = gradients(ours(name, *inputs), inputs), gradients(2 * ours(name, *inputs), inputs)
    for key, gradient in once.items():
        assert gradient is None or torch.equal(2 * gradient, twice[key])


def test_order_of_the_pairs_does_not_matter():
    inputs = [one.detach() for one in batch(torch.float64)]
    order = torch.tensor(random.Random(0).sample(range(BATCH), BATCH))
    for name in LOSSES:
        shuffled = ours(name, inputs[0][order], inputs[1][order], *inputs[2:])
        assert shuffled.item() == pytest.approx(ours(name, *inputs).item(), rel=1e-13)


def test_bad_input_is_one_sentence(monkeypatch):
    images, texts, log_scale, bias = (one.detach() for one in batch(torch.float32))
    for arguments, words in (
        ((images[:3], texts[:4], log_scale, bias), r"Images \[3, 5\] and texts \[4, 5\] are no pairs"),
        ((images[:0], texts[:0], log_scale, bias), "are no pairs"),
        ((images[0], texts[0], log_scale, bias), "are no pairs"),
        ((images, texts, log_scale.repeat(2), bias), r"log_scale has shape \[2\]"),
        ((images, texts.to("meta"), log_scale, bias), "cpu and texts on meta"),
    ):
        with pytest.raises(ValueError, match=words):
            sigmoid_loss(*arguments)
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ValueError, match=r"WORLD_SIZE=4 .* none is connected"):
        softmax_loss(images, texts, log_scale)
