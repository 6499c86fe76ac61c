"""Parameter groups by an explicit list, and both optimisers against their rules written out in numpy."""

import copy
import math

import lightning
import numpy as np
import pytest
import torch
from timm.layers import LayerNorm
from timm.models.vision_transformer import ParallelScalingBlock, VisionTransformer
from torch import nn

from sovit.optim import build_optimizer, param_groups

WIDTH, MLP_DIM, LR = 48, 96, 1e-2

KERNELS_FED_BY_WIDTH = {
    "blocks.0.attn.qkv.weight",
    "blocks.0.attn.proj.weight",
    "blocks.0.mlp.fc1.weight",
    "attn_pool.q.weight",
    "attn_pool.kv.weight",
    "attn_pool.proj.weight",
    "attn_pool.mlp.fc1.weight",
}
KERNELS_FED_BY_MLP = {"blocks.0.mlp.fc2.weight", "attn_pool.mlp.fc2.weight"}
PATCH_KERNEL = {"patch_embed.proj.weight"}
HEAD_KERNEL = {"head.weight"}
NOT_DECAYED = {
    "cls_token",
    "pos_embed",
    "patch_embed.proj.bias",
    "blocks.0.norm1.weight",
    "blocks.0.norm1.bias",
    "blocks.0.attn.qkv.bias",
    "blocks.0.attn.proj.bias",
    "blocks.0.norm2.weight",
    "blocks.0.norm2.bias",
    "blocks.0.mlp.fc1.bias",
    "blocks.0.mlp.fc2.bias",
    "norm.weight",
    "norm.bias",
    "attn_pool.latent",
    "attn_pool.q.bias",
    "attn_pool.kv.bias",
    "attn_pool.proj.bias",
    "attn_pool.norm.weight",
    "attn_pool.norm.bias",
    "attn_pool.mlp.fc1.bias",
    "attn_pool.mlp.fc2.bias",
    "head.bias",
}


def vit(pool="avg", **changes):
    torch.manual_seed(0)
    arguments = {
        "img_size": 16,
        "patch_size": 8,
        "in_chans": 1,
        "embed_dim": WIDTH,
        "depth": 1,
        "num_heads": 4,
        "mlp_ratio": MLP_DIM / WIDTH,
        "num_classes": 40,
        "global_pool": pool,
        "class_token": pool == "token",
        "fc_norm": False,
    }
    return VisionTransformer(**(arguments | changes))


def named_groups(model, **changes):
    """(lr, weight_decay) -> names."""
    names = {id(p): name for name, p in model.named_parameters()}
    arguments = {"lr": LR, "weight_decay": 0.05, "head_weight_decay": 5.0, "base_depth": 1}
    groups = param_groups(model, **(arguments | changes))
    listed = [names[id(p)] for group in groups for p in group["params"]]
    assert sorted(listed) == sorted(names.values()), "every parameter exactly once"
    found = {(g["lr"], g["weight_decay"]): {names[id(p)] for p in g["params"]} for g in groups}
    assert len(found) == len(groups), "groups are merged"
    return found


def present(names, model):
    return names & {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("pool", ["map", "avg", "token"])
def test_constant_rule_decays_kernels_and_nothing_else(pool):
    model = vit(pool)
    kernels = KERNELS_FED_BY_WIDTH | KERNELS_FED_BY_MLP | PATCH_KERNEL
    assert named_groups(model) == {
        (LR, 0.05): present(kernels, model),
        (LR, 5.0): HEAD_KERNEL,
        (LR, 0.0): present(NOT_DECAYED, model),
    }
    assert ("attn_pool.latent" in dict(model.named_parameters())) == (pool == "map")
    assert ("cls_token" in dict(model.named_parameters())) == (pool == "token")


@pytest.mark.parametrize("pool", ["map", "avg", "token"])
def test_shape_rule_scales_matrices_by_what_feeds_them(pool):
    """Width 48 at base 24 halves the rate, MLP dimension 96 at base 32 takes a third; patches and vectors keep it."""
    model = vit(pool)
    assert named_groups(model, lr_rule="by_shape", base_width=24, base_mlp_dim=32) == {
        (LR / 2, 0.05): present(KERNELS_FED_BY_WIDTH, model),
        (LR * 32 / 96, 0.05): present(KERNELS_FED_BY_MLP, model),
        (LR / 2, 5.0): HEAD_KERNEL,
        (LR, 0.05): PATCH_KERNEL,
        (LR, 0.0): present(NOT_DECAYED, model),
    }


def test_shape_rule_at_the_base_shape_is_the_constant_rule():
    model = vit("map")
    assert named_groups(model, lr_rule="by_shape", base_width=48, base_mlp_dim=96) == named_groups(model)


def test_shape_rule_divides_the_blocks_by_the_root_of_the_depth():
    """Depth 4 at base 1 halves the rate of the blocks' matrices; pooling head, classifier and vectors keep theirs."""
    model = vit("map", depth=4)
    groups = named_groups(model, lr_rule="by_shape", base_width=WIDTH, base_mlp_dim=MLP_DIM, base_depth=1)
    halved = {name for name in groups[LR / 2, 0.05]}
    assert halved == {name for name, p in model.named_parameters() if name.startswith("blocks.") and p.ndim == 2}
    assert {lr for lr, _ in groups} == {LR, LR / 2}
    assert "attn_pool.kv.weight" in groups[LR, 0.05] and groups[LR, 5.0] == HEAD_KERNEL
    shallow = named_groups(model, lr_rule="by_shape", base_width=WIDTH, base_mlp_dim=MLP_DIM, base_depth=9)
    assert {lr for lr, _ in shallow} == {LR}, "no higher rate for models shallower than the base"


def test_shape_rule_tells_the_mlp_by_name_when_it_is_as_wide_as_the_model():
    model = vit(mlp_ratio=1)
    groups = named_groups(model, lr_rule="by_shape", base_width=24, base_mlp_dim=96)
    assert groups[2 * LR, 0.05] == {"blocks.0.mlp.fc2.weight"}


def test_shape_rule_of_parallel_blocks():
    model = vit(block_fn=ParallelScalingBlock, norm_layer=LayerNorm)
    groups = named_groups(model, lr_rule="by_shape", base_width=24, base_mlp_dim=32)
    assert groups[LR / 2, 0.05] == {"blocks.0.in_proj.weight", "blocks.0.attn_out_proj.weight"}
    assert groups[LR * 32 / 96, 0.05] == {"blocks.0.mlp_out_proj.weight"}


def test_shape_rule_refuses_a_matrix_it_has_no_base_for():
    model = vit()
    model.blocks[0].extra = nn.Linear(17, WIDTH)
    with pytest.raises(ValueError, match=r"blocks\.0\.extra with 17 inputs"):
        param_groups(model, lr=LR, weight_decay=0.0, head_weight_decay=0.0, lr_rule="by_shape")


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="lr_rule='mup'"):
        param_groups(vit(), lr=LR, weight_decay=0.0, head_weight_decay=0.0, lr_rule="mup")
    with pytest.raises(ValueError, match="Optimizer 'sgd'"):
        build_optimizer(vit(), "sgd", lr=LR, weight_decay=0.0, head_weight_decay=0.0)


def test_frozen_parameters_are_left_out_and_a_headless_model_has_no_head_group():
    model = vit(num_classes=0)
    model.pos_embed.requires_grad_(False)
    groups = param_groups(model, lr=LR, weight_decay=0.05, head_weight_decay=5.0)
    listed = {id(p) for group in groups for p in group["params"]}
    assert listed == {id(p) for name, p in model.named_parameters() if name != "pos_embed"}
    assert {group["weight_decay"] for group in groups} == {0.05, 0.0}


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_decay_alone_shrinks_kernels_by_the_stated_factor(name):
    """Four steps without gradient under a schedule: (1 - scale lr decay) each, lr being the group's own."""
    model = vit("map")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = build_optimizer(
        model,
        name,
        lr=LR,
        weight_decay=0.5,
        head_weight_decay=5.0,
        lr_rule="by_shape",
        base_width=24,
        base_depth=1,
        base_mlp_dim=32,
    )
    scales = [0.25, 1.0, 0.5, 0.0]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: scales[min(step, 3)])
    for _ in scales:
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        scheduler.step()

    def factor(lr, decay):
        return math.prod(1 - scale * lr * decay for scale in scales)

    expected = dict.fromkeys(NOT_DECAYED, 1.0)
    expected |= dict.fromkeys(KERNELS_FED_BY_WIDTH, factor(LR / 2, 0.5))
    expected |= dict.fromkeys(KERNELS_FED_BY_MLP, factor(LR / 3, 0.5))
    expected |= dict.fromkeys(PATCH_KERNEL, factor(LR, 0.5)) | dict.fromkeys(HEAD_KERNEL, factor(LR / 2, 5.0))
    for key, value in model.named_parameters():
        torch.testing.assert_close(value.detach(), before[key] * expected[key], rtol=1e-6, atol=1e-7)


def stepped(name, parameters, gradients, *, lr=1.0, weight_decay=0.0, scales=None, **betas):
    """Parameters after each update of the built optimiser, all in one decayed group; and that optimiser."""
    module = nn.ParameterList([nn.Parameter(torch.tensor(p, dtype=torch.float32)) for p in parameters])
    optimizer = build_optimizer(vit(depth=0), name, lr=lr, weight_decay=0.0, head_weight_decay=0.0, **betas)
    optimizer.param_groups.clear()
    optimizer.add_param_group({"params": list(module), "lr": lr, "weight_decay": weight_decay})
    history = []
    for i, gradient in enumerate(gradients):
        optimizer.param_groups[0]["lr"] = lr * (scales[i] if scales else 1.0)
        for parameter, g in zip(module, gradient, strict=True):
            parameter.grad = torch.tensor(g, dtype=torch.float32)
        optimizer.step()
        history.append([p.detach().double().numpy().copy() for p in module])
    return history, optimizer


def adafactor_in_numpy(parameters, gradients, lr, decay, scales, cap):
    """The rule as published, in float64: second moment factored over the two largest axes if both reach 32."""
    parameters = [np.array(p, dtype=np.float64) for p in parameters]
    rows, columns, full, momentum = {}, {}, {}, {}
    history = []
    for i, gradient in enumerate(gradients):
        beta2 = min(cap, 1 - (i + 1) ** -0.8)
        for k, g in enumerate(gradient):
            g2 = g.astype(np.float64) ** 2 + 1e-30
            order = np.argsort(g.shape, kind="stable")
            if g.ndim >= 2 and g.shape[order[-2]] >= 32:
                d0, d1 = order[-1], order[-2]
                rows[k] = beta2 * rows.get(k, 0) + (1 - beta2) * g2.mean(d0, keepdims=True)
                columns[k] = beta2 * columns.get(k, 0) + (1 - beta2) * g2.mean(d1, keepdims=True)
                u = g / np.sqrt(rows[k] / rows[k].mean(d1, keepdims=True)) / np.sqrt(columns[k])
            else:
                full[k] = beta2 * full.get(k, 0) + (1 - beta2) * g2
                u = g / np.sqrt(full[k])
            momentum[k] = 0.9 * momentum.get(k, 0) + 0.1 * u
            parameters[k] = parameters[k] - scales[i] * (lr * momentum[k] + decay * parameters[k])
        history.append([p.copy() for p in parameters])
    return history


@pytest.mark.parametrize("cap", [0.999, 0.6])
def test_adafactor_is_the_published_rule(cap):
    """Twelve updates of every kind of tensor, gradients of changing size, schedule, absolute decay 0.03 lr. The cap 0.6
    binds from the 4th update (1 - 4^-0.8 = 0.67)."""
    rng = np.random.default_rng(0)
    shapes = [(40, 48), (48, 40), (40, 40), (31, 64), (7,), (48, 1, 8, 8), (1, 36, 48), (2, 3)]
    parameters = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
    sizes = np.exp(rng.normal(size=12))
    gradients = [[(size * rng.normal(size=shape)).astype(np.float32) for shape in shapes] for size in sizes]
    scales = [min(1.0, (i + 1) / 4) for i in range(12)]
    lr = 8e-2
    expected = adafactor_in_numpy(parameters, gradients, lr, 0.03 * lr, scales, cap)
    history, optimizer = stepped(
        "adafactor", parameters, gradients, lr=lr, weight_decay=0.03, scales=scales, beta1=0.9, beta2=cap
    )
    for ours, theirs in zip(history, expected, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=3e-6)
    factored = ["exp_avg_sq_r" in optimizer.state[p] for p in optimizer.param_groups[0]["params"]]
    assert factored == [True, True, True, False, False, False, True, False]
    assert all(optimizer.state[p]["exp_avg"].dtype == torch.float32 for p in optimizer.param_groups[0]["params"])


def test_adafactor_worked_by_hand_unfactored():
    """2x2, lr 1. First update: V = g^2, so u is the sign, M = 0.1 sign. Second: beta2 = 1 - 2^-0.8."""
    first, second = np.array([[1.0, -2.0], [0.5, 0.0]]), np.array([[2.0, -2.0], [-0.5, 0.0]])
    history, _ = stepped("adafactor", [np.zeros((2, 2))], [[first], [second]])
    np.testing.assert_allclose(history[0][0], [[-0.1, 0.1], [-0.1, 0.0]], atol=1e-7)
    w = 2**-0.8  # weight of the new square: 0.5743
    u = 2 / math.sqrt((1 - w) + 4 * w)  # 1.2120
    np.testing.assert_allclose(u, 1.2120, atol=5e-5)
    steps = np.array([[0.09 + 0.1 * u, -0.09 - 0.1], [0.09 - 0.1, 0.0]])
    np.testing.assert_allclose(history[1][0], history[0][0] - steps, atol=1e-6)


def test_adafactor_worked_by_hand_factored():
    """32x32 ones with one 3 in the corner: its row and column have mean square (9 + 31) / 32 = 1.25, the others 1, and
    the mean of those is 32.25 / 32. Unfactored, every element would be 1."""
    gradient = np.ones((32, 32))
    gradient[0, 0] = 3.0
    history, _ = stepped("adafactor", [np.zeros((32, 32))], [[gradient]])
    root = math.sqrt(32.25 / 32)
    step = -history[0][0] / 0.1
    assert step[0, 0] == pytest.approx(3 * root / 1.25, rel=1e-6)
    assert step[0, 5] == step[5, 0] == pytest.approx(root / math.sqrt(1.25), rel=1e-6)
    assert step[5, 5] == pytest.approx(root, rel=1e-6)


def test_adafactor_caps_its_second_decay_from_update_5624():
    """1 - i^-0.8 passes 0.999 between updates 5623 and 5624 (10^3.75 = 5623.4)."""
    _, optimizer = stepped("adafactor", [np.zeros(1)], [[np.ones(1)]])
    (parameter,) = optimizer.param_groups[0]["params"]
    state = optimizer.state[parameter]
    for update in (5620, 5623, 5624, 6000, 100_000):
        state["step"].fill_(update - 1)
        state["exp_avg_sq"].fill_(1.0)
        parameter.grad = torch.zeros(1)
        optimizer.step()
        beta2 = 1 - update**-0.8
        assert (beta2 > 0.999) == (update >= 5624)
        assert state["exp_avg_sq"].item() == pytest.approx(min(beta2, 0.999), abs=1e-7)
    assert abs((1 - 100_000**-0.8) - 0.999) > 1e-4  # the tolerance above can tell the cap from its absence


def test_adamw_is_its_rule_with_decay_relative_to_the_learning_rate():
    """p -= s lr (m / (sqrt(v) + eps) + wd p), bias corrected, with the given betas."""
    rng = np.random.default_rng(1)
    parameter, gradients = rng.normal(size=(3, 4)), rng.normal(size=(6, 3, 4))
    scales = [0.2, 0.6, 1.0, 1.0, 0.5, 0.1]
    history, _ = stepped(
        "adamw", [parameter], gradients[:, None], lr=0.05, weight_decay=0.3, scales=scales, beta1=0.8, beta2=0.95
    )
    p, m, v = parameter.copy(), 0.0, 0.0
    for i, g in enumerate(gradients):
        m, v = 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * g * g
        u = (m / (1 - 0.8 ** (i + 1))) / (np.sqrt(v / (1 - 0.95 ** (i + 1))) + 1e-8)
        p = p - scales[i] * 0.05 * (u + 0.3 * p)
        np.testing.assert_allclose(history[i][0], p, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_state_reloads_to_the_same_bits(name):
    """Two steps, save, load into a new optimiser, two more: equal to four in one go."""

    def build(model):
        return build_optimizer(model, name, lr=LR, weight_decay=0.05, head_weight_decay=5.0, lr_rule="by_shape")

    def train(model, optimizer, steps):
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()

    model = vit("map")
    optimizer = build(model)
    train(model, optimizer, range(2))
    resumed = copy.deepcopy(model)
    fresh = build(resumed)
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, range(2, 4))
    train(resumed, fresh, range(2, 4))
    for a, b in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


class Regression(lightning.LightningModule):
    def __init__(self, name):
        super().__init__()
        self.name, self.model, self.rates = name, vit(), []

    def training_step(self, batch, batch_idx):
        self.rates.append([group["lr"] for group in self.optimizers().param_groups])
        return self.model(batch[0]).square().mean()

    def configure_optimizers(self):
        optimizer = build_optimizer(
            self.model,
            self.name,
            lr=LR,
            weight_decay=0.05,
            head_weight_decay=5.0,
            lr_rule="by_shape",
            base_width=24,
            base_depth=1,
        )
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 4)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")  # Lightning's use of torch
@pytest.mark.filterwarnings("ignore:The `srun` command is available")  # where Slurm is installed
@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_lightning_clips_in_mixed_precision_and_scales_every_group(name):
    """Fused AdamW as torch makes it is refused here ("does not allow for gradient clipping")."""
    module = Regression(name)
    images = torch.utils.data.TensorDataset(torch.randn(8, 1, 16, 16))
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        precision="bf16-mixed",
        max_epochs=1,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    before = module.model.norm.weight.detach().clone()
    trainer.fit(module, torch.utils.data.DataLoader(images, batch_size=2))
    bases = [group["initial_lr"] for group in module.optimizers().param_groups]
    assert sorted(set(bases)) == pytest.approx([LR / 2, LR, LR * 128 / 96])
    for step, rates in enumerate(module.rates):
        assert rates == pytest.approx([base * step / 4 for base in bases])
    assert not torch.equal(before, module.model.norm.weight)
