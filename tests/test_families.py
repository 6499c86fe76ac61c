"""Other families than ViT: counted as torch counts them, built as asked for, swept and fitted with their own dimensions."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from small_cells import content, overrides, pretend_stop, small
from sovit import cli, records
from sovit.analysis.grid import sweep_kind
from sovit.analysis.law import Law
from sovit.analysis.points import MixerDimensions, MixerPoint, load_points, recipe
from sovit.analysis.report import page
from sovit.analysis.star import find_center, fit_star
from sovit.config import ConfigError, compose
from sovit.derived import shape_of
from sovit.families import FAMILIES, family_of, shape_of_record
from sovit.families.mixer import NAMED_MIXERS, MixerShape
from sovit.families.swin import NAMED_SWINS, SwinShape
from sovit.flops import forward_flops, num_params
from sovit.launch.plan import plan
from sovit.launch.sweep import load_sweep
from sovit.launch.wandb.run import arm
from sovit.models.families import BUILDERS
from sovit.models.vit import features
from sovit.optim import param_groups
from sovit.shape import Shape

SWEEPS = Path(__file__).parents[1] / "sweeps"
# shape, image size, channels, classes; hidden sizes that timm's ratio would miss by one, odd ones, one to four stages
BUILT = [
    (MixerShape(24, 2, 16, 64, 4), 16, 1, 256),
    (MixerShape(448, 1, 976, 976, 8), 16, 3, 0),
    (MixerShape(7, 3, 5, 3, 2), 8, 2, 10),
    (MixerShape(10, 1, 1, 1, 16), 16, 3, 2),
    (SwinShape(8, 2, 32, 2, 2, 2, 4), 16, 1, 256),
    (SwinShape(24, 3, 37, 2, 3, 4, 2), 32, 3, 0),
    (SwinShape(12, 5, 50, 3, 1, 4, 2), 16, 3, 7),
    (SwinShape(8, 1, 20, 4, 4, 2, 2), 32, 1, 5),
    (SwinShape(6, 4, 9, 1, 2, 3, 1), 6, 1, 0),  # windows of three: the last row of relative positions counts
]
# Table 1 of arXiv 2105.01601: millions of parameters of the model without its classifier
MIXERS = [("S", 18), ("B", 59), ("L", 207), ("H", 431)]
# Table 1(a) of arXiv 2103.14030, ImageNet-1K at 224 pixels: millions of parameters, billions of multiply-adds
SWINS = [("T", 29, 4.5), ("S", 50, 8.7), ("B", 88, 15.4), ("L", 197, 34.5)]


def built(shape, image_size, channels, classes, **more):
    place = {"image_size": image_size, "channels": channels, "num_classes": classes}
    if isinstance(shape, SwinShape):
        more.setdefault("fused_attention", False)  # the counter does not see fused attention on a CPU
    return BUILDERS[family_of(shape).name](shape, pool="avg", **place, **more)


@pytest.mark.parametrize(("shape", "size", "channels", "classes"), BUILT, ids=str)
def test_closed_forms_are_what_torch_counts_on_the_module(shape, size, channels, classes):
    torch.manual_seed(0)
    model = built(shape, size, channels, classes).eval()
    place = {"channels": channels, "pool": "avg", "num_classes": classes}
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(torch.randn(2, channels, size, size))
    flops = forward_flops(shape, size, **place)
    assert 2 * sum(flops.values()) == counter.get_total_flops()
    params = num_params(shape, size, **place)
    assert sum(params.values()) == sum(parameter.numel() for parameter in model.parameters())


def test_groups_are_those_of_the_modules():
    """A term counted in another group would leave the totals as they are."""
    shape, size = SwinShape(24, 3, 37, 2, 3, 4, 2), 32
    named = dict(built(shape, size, 3, 0).named_parameters())
    groups = num_params(shape, size, channels=3, pool="avg")

    def total(*parts):
        return sum(value.numel() for name, value in named.items() if any(part in name for part in parts))

    assert groups["patch_merging"] == total("downsample")
    assert groups["positions"] == total("relative_position_bias_table")
    assert groups["attention_projections"] == total("attn.qkv", "attn.proj")
    assert groups["mlp"] == total(".mlp.")


@pytest.mark.parametrize(("name", "millions"), MIXERS)
def test_published_mixers_have_their_published_parameters(name, millions):
    assert round(sum(num_params(NAMED_MIXERS[name].shape, 224).values()) / 1e6) == millions


@pytest.mark.parametrize(("name", "millions", "gmacs"), SWINS)
def test_published_swins_have_their_published_parameters_and_cost(name, millions, gmacs):
    """The paper counts multiply-adds, half as much as here, and leaves attention's own products out of nothing."""
    shape = NAMED_SWINS[name].shape
    assert sum(num_params(shape, 224, num_classes=1000).values()) / 1e6 == pytest.approx(millions, rel=0.03)
    flops = sum(forward_flops(shape, 224, pool="avg", num_classes=1000).values())
    assert flops / 2e9 == pytest.approx(gmacs, rel=0.005)


def test_the_depth_of_a_swin_is_that_of_its_main_stage():
    assert NAMED_SWINS["S"].shape.depths == (2, 2, 18, 2)
    assert SwinShape(8, 5, 32, 2, 2, 2, 4).depths == (2, 5)
    assert SwinShape(8, 5, 32, 2, 1, 2, 4).depths == (5,)


@pytest.mark.parametrize(("shape", "size", "channels", "classes"), [BUILT[0], BUILT[4]], ids=str)
def test_a_model_built_without_memory_and_filled_computes_what_the_other_computes(shape, size, channels, classes):
    """So a trained one is loaded: what timm keeps out of the state must be there all the same."""
    torch.manual_seed(0)
    model = built(shape, size, channels, classes, fused_attention=True) if isinstance(shape, SwinShape) else None
    model = model or built(shape, size, channels, classes)
    with torch.device("meta"):
        empty = built(shape, size, channels, classes)
    empty.load_state_dict(model.state_dict(), assign=True)
    images = torch.randn(3, channels, size, size)
    with torch.no_grad():
        found, wanted = features(empty.eval(), images), features(model.eval(), images)
    assert wanted.shape == (3, shape.width * (2 if isinstance(shape, SwinShape) else 1))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("init", ["fan_in", "big_vision"])
@pytest.mark.parametrize(("shape", "size", "channels", "classes"), [BUILT[0], BUILT[4]], ids=str)
def test_weights_follow_the_generator_alone_and_the_first_prediction_is_the_bias(init, shape, size, channels, classes):
    models = []
    for _ in range(2):
        torch.manual_seed(3)
        models.append(built(shape, size, channels, classes, init=init, head_bias=-2.0))
    first, second = (model.state_dict() for model in models)
    assert all(torch.equal(first[name], second[name]) for name in first)
    with torch.no_grad():
        assert torch.equal(models[0](torch.randn(1, channels, size, size)), torch.full((1, classes), -2.0))


def test_fan_in_slows_what_writes_to_the_residual_stream():
    torch.manual_seed(0)
    model = built(MixerShape(64, 8, 48, 256, 2), 16, 1, 0)
    for leaf, fan_in, slowed in (("mlp_tokens.fc2", 48, 4), ("mlp_channels.fc2", 256, 4), ("mlp_channels.fc1", 64, 1)):
        spread = torch.stack([model.get_submodule(f"blocks.{k}.{leaf}").weight.std() for k in range(8)]).mean()
        assert spread.item() == pytest.approx(fan_in**-0.5 / slowed, rel=0.05), leaf


def test_the_learning_rate_rule_knows_every_matrix():
    def factors(model, **bases):
        groups = param_groups(model, lr=1.0, weight_decay=0.0, head_weight_decay=0.0, lr_rule="by_shape", **bases)
        rates = {id(p): group["lr"] for group in groups for p in group["params"]}
        return {name: rates[id(p)] for name, p in model.named_parameters()}

    mixer = factors(built(MixerShape(64, 8, 48, 256, 4), 16, 1, 9), base_width=32, base_depth=2, base_mlp_dim=128)
    deep = math.sqrt(2 / 8)
    assert mixer["blocks.0.mlp_tokens.fc1.weight"] == pytest.approx(deep)  # fed by tokens, which no sweep varies
    assert mixer["blocks.0.mlp_tokens.fc2.weight"] == pytest.approx(16 / 48 * deep)
    assert mixer["blocks.0.mlp_channels.fc1.weight"] == pytest.approx(32 / 64 * deep)
    assert mixer["blocks.0.mlp_channels.fc2.weight"] == pytest.approx(128 / 256 * deep)
    assert mixer["head.weight"] == 0.5 and mixer["stem.proj.weight"] == 1.0

    swin = factors(built(SwinShape(16, 8, 48, 2, 2, 2, 4), 16, 1, 9), base_width=8, base_depth=2, base_mlp_dim=24)
    for stage in (0, 1):  # every stage is slowed as the first: all grow together
        assert swin[f"layers.{stage}.blocks.0.attn.qkv.weight"] == pytest.approx(0.5 * deep)
        assert swin[f"layers.{stage}.blocks.0.mlp.fc2.weight"] == pytest.approx(0.5 * deep)
    assert swin["layers.1.downsample.reduction.weight"] == swin["head.fc.weight"] == 0.5


# Text forms, run ids, configuration

MIXER = ("model=mixer_tiny", "shape=24x2x16x64", "name=m")
SWIN = ("model=swin_tiny", "shape=8x2x32", "name=s")


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (("name=v",), "v-w0032-d04-m0128-h04-p08-s0"),
        ((*MIXER, "tag=a.b", "seed=7"), "m-w0024-d02-t0016-m0064-p04-a.b-s7"),
        ((*MIXER, "model.token_dim=300"), "m-w0024-d02-t0300-m0064-p04-s0"),
        ((*SWIN, "tag=p04"), "s-w0008-d02-m0032-h02-n2-k02-p04-p04-s0"),
        ((*SWIN, "model.window=4", "model.stages=1"), "s-w0008-d02-m0032-h02-n1-k04-p04-s0"),
    ],
)
def test_run_ids_of_every_family_parse_back(given, wanted):
    cfg = compose(given)
    assert records.run_id(cfg) == wanted
    assert records.parse_run_id(wanted) == (cfg.name, shape_of(cfg), cfg.tag, cfg.seed)
    assert shape_of_record(json.loads(json.dumps(shape_of(cfg).as_dict()))) == shape_of(cfg)


def test_a_vit_says_nothing_of_its_family_where_it_said_nothing_before():
    assert shape_of(compose(["name=v"])) == Shape(32, 4, 128, 4, 8)
    assert "family" not in Shape(32, 4, 128, 4, 8).as_dict()
    assert records.config_hash(compose(["experiment=star_tiny"])) == "88c29b4e5829eb1a"


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["model.family=mixr"], "did you mean 'mixer'"),
        (["model.token_dim=16"], "model.token_dim=16 has no effect on model.family=vit; it is for mixer"),
        (["model.stages=2"], "model.stages=2 has no effect on model.family=vit; it is for swin"),
        ([*SWIN, "model.token_dim=16"], "model.token_dim=16 has no effect on model.family=swin"),
        ([*MIXER, "model.window=2"], "model.window=2 has no effect on model.family=mixer"),
        (
            [*MIXER, "model.num_heads=4"],
            "model.num_heads=4 has no effect on model.family=mixer; it is for vit and swin",
        ),
        ([*MIXER, "model.qk_norm=true"], "model.qk_norm=True has no effect on model.family=mixer; it is for vit"),
        ([*MIXER, "model.pool=map"], "pool='map' is for ViTs"),
        ([*MIXER, "shape=24x2x64"], "'24x2x64' is not a shape of family mixer: write WIDTHxDEPTHxTOKENxMLP"),
        (["shape=24x2x16x64"], "is not a shape"),
        ([*MIXER, "center=24x2x64"], "center='24x2x64' is no shape; write WIDTHxDEPTHxTOKENxMLP such as"),
        ([*SWIN, "model.stages=null"], "does not say stages"),
        ([*SWIN, "model.stages=4"], "4 x 4 tokens cannot be merged 3 times"),
        ([*SWIN, "model.window=3"], "window=3 does not divide the 4 x 4 tokens of stage 1"),
        ([*SWIN, "shape=9x2x32"], "width=9 is not divisible by num_heads=2"),
        ([*MIXER, "model.image_size=18"], "image_size=18 is not divisible by patch_size=4"),
        ([*MIXER, "parallel=fsdp"], "parallel.kind=fsdp is for model.family=vit"),
        ([*MIXER, "parallel.checkpointing=full"], "parallel.checkpointing=full is for model.family=vit"),
        ([*SWIN, "parallel.compile=true"], "parallel.compile=true is for model.family=vit"),
        ([*MIXER, "model.tokendim=3"], "did you mean"),
    ],
)
def test_what_a_family_does_not_have_is_refused_in_a_sentence(given, sentence):
    with pytest.raises(ConfigError) as error:
        compose(given)
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_named_shapes_bring_what_a_text_leaves_out():
    place = (
        "model=swin_tiny",
        "model.num_heads=null",
        "model.stages=null",
        "model.window=null",
        "model.image_size=224",
    )
    cfg = compose([*place, "model.patch_size=null", "shape=B"])
    assert shape_of(cfg) == SwinShape(128, 18, 512, 4, 4, 7, 4)
    cfg = compose(["model=mixer_tiny", "model.image_size=224", "shape=L/32", "model.token_dim=100"])
    assert shape_of(cfg) == MixerShape(1024, 24, 100, 4096, 32)


def test_sovit_shape_counts_every_family(capsys):
    assert cli.main(["shape", "--family", "mixer", "B/16", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["token_dim"], said["num_params"]) == (384, sum(num_params(NAMED_MIXERS["B"].shape, 224).values()))
    assert cli.main(["shape", "--family", "swin", "T"]) == 0
    assert "patch merging" in capsys.readouterr().out
    for wrong in (
        ["32x4x128", "--stages", "2"],
        ["B", "--family", "mixer", "--heads", "2"],
        ["T", "--family", "mixer"],
    ):
        assert cli.main(["shape", *wrong]) == 2
        assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("name", ["star_mixer_tiny", "star_swin_tiny"])
def test_the_shipped_stars_are_stars_with_an_arm_for_each_dimension(name):
    made = plan(load_sweep(SWEEPS / f"{name}.yaml"))
    shapes = [cell.shape for cell in made.cells]
    assert sweep_kind(shapes) == "star"
    center = find_center(shapes)
    assert str(center) == made.cells[0].config.center
    arms = {arm(shape, str(center)) for shape in shapes}
    assert arms == {"center", *FAMILIES[made.cells[0].config.model.family].dimensions}
    assert all(cell.seconds > 0 for cell in made.cells)


# Training


def test_a_mixer_that_was_stopped_goes_on_to_the_same_records(tmp_path, monkeypatch):
    from sovit.lit import engine, trained
    from sovit.lit.evaluation import extract

    given = ("model=mixer_tiny", "shape=8x1x4x16", "trainer.keep_checkpoint=true", "eval.datasets=[fractals]")
    whole, parts = small(tmp_path / "whole", *given), small(tmp_path / "parts", *given)
    assert engine.run_cell(overrides(tmp_path / "whole", *given)) == engine.OK
    with monkeypatch.context() as patch:
        pretend_stop(patch, 11)
        assert engine.run_cell(overrides(tmp_path / "parts", *given)) == engine.STOPPED
    assert engine.run_cell(overrides(tmp_path / "parts", *given)) == engine.OK
    assert content(parts) == content(whole)
    record = records.read_run(records.run_dir(whole)) or {}
    assert shape_of_record(record) == shape_of(whole) and record["token_dim"] == 4
    points, _ = load_points(tmp_path / "whole" / "run", "fractals", 5)
    assert {type(point) for point in points} == {MixerPoint} and {point.token_dim for point in points} == {4}
    loaded = trained.load(records.run_dir(whole))
    assert extract(loaded.model, torch.zeros(2, 1, 16, 16)).shape == (2, 8)


# Fits

LAWS = {
    "width": Law(alpha=3.0, a=1.2, beta=0.02, b=0.8, xi=0.5, c=0.5, eps=0.02),
    "depth": Law(alpha=0.4, a=0.9, beta=0.3, b=0.7, xi=0.5, c=0.5, eps=0.02),
    "token_dim": Law(alpha=0.8, a=0.8, beta=0.08, b=0.6, xi=0.5, c=0.6, eps=0.02),
    "mlp_dim": Law(alpha=2.0, a=0.9, beta=0.03, b=0.7, xi=0.5, c=0.5, eps=0.02),
}
CENTER = MixerDimensions(24, 2, 16, 64)
SIZES = {
    "width": (6, 8, 12, 16, 40, 64, 96),
    "depth": (1, 3, 4, 6, 8, 12),
    "token_dim": (2, 4, 8, 32, 64, 128),
    "mlp_dim": (8, 16, 32, 128, 256, 512),
}


def mixer_star():
    rng = np.random.default_rng(0)
    points = []
    for t in np.geomspace(16, 512, 6):
        for name, sizes in SIZES.items():
            for size in sizes:
                shape = CENTER._replace(**{name: size})
                error = float(LAWS[name].error(size, t)) * float(np.exp(1e-4 * rng.standard_normal()))
                points.append(mixer_point(shape, t, error))
        points.append(mixer_point(CENTER, t, 0.3))
    return points


def mixer_point(shape, t, error):
    run_id = f"m-w{shape.width:04d}-d{shape.depth:02d}-t{shape.token_dim:04d}-m{shape.mlp_dim:04d}-p04-s0"
    place = {"seed": 0, "t_gflops": float(t), "duration": f"{t:.0f}", "stderr": 0.005, "num_draws": 3}
    return MixerPoint(run_id=run_id, error=error, **shape._asdict(), **place)


def test_a_star_of_four_dimensions_gives_four_known_exponents(tmp_path):
    points = mixer_star()
    assert sweep_kind(points) == "star" and find_center(points) == CENTER
    fit = fit_star(points, sweep="m", dataset="fractals", shots=10)
    assert list(fit.arms) == list(CENTER._fields)
    for name, law in LAWS.items():
        assert fit.arms[name].s.estimate == pytest.approx(law.c / (law.a + law.b), rel=0.05), name
    written = fit.as_dict()
    assert written["family"] == "mixer" and written["center"]["token_dim"] == 16
    assert {row["arm"] for row in written["points"]} == {None, *CENTER._fields}
    said = page.text(json.loads(json.dumps(written)), [])
    assert "center 24x2x16x64" in said and "\ntoken_dim " in said
    html = page.write_report(written, [], tmp_path).read_text()
    assert "token MLP dimension" in html and "MLP-Mixer" in html


def test_a_star_of_vits_is_written_as_it_was():
    """A key more in fit.json would make every existing one differ."""
    from test_star import tiny_fit

    assert "family" not in tiny_fit().as_dict() and list(tiny_fit().as_dict()["center"]) == [
        "width",
        "depth",
        "mlp_dim",
    ]


def test_points_of_a_mixer_off_the_star_are_named_with_all_dimensions():
    stray = CENTER._replace(token_dim=8, width=12)
    with pytest.raises(ValueError, match=r"12x2x8x64 differs from the .* in width and token_dim"):
        find_center([*mixer_star(), mixer_point(stray, 16, 0.5)])


def write_run(folder: Path, points, config, **fields):
    """A finished run as it is on disk, of the points of one shape."""
    directory = folder / points[0].run_id
    directory.mkdir(parents=True)
    shape = {**{key: getattr(points[0], key) for key in CENTER._fields}, "patch_size": 4, "seed": 0, **fields}
    rows = [
        {"schema": 1, "run_id": point.run_id, "sweep": "m", **shape, "step": k + 1, "draw": 0, "shots": 10}
        | {"dataset": "fractals", "weights": "ema", "duration": point.duration}
        | {"t_gflops": point.t_gflops, "error": point.error, "stderr": point.stderr}
        for k, point in enumerate(points)
    ]
    records.append_lines(directory / records.EVALS, rows)
    record = {"schema": 1, "run_id": points[0].run_id, "status": "done", "config": config, **shape}
    records.write_json(directory / records.RUN, record)


@pytest.fixture
def mixer_runs(tmp_path):
    config = dataclasses.asdict(compose([*MIXER]))
    by_run = {}
    for point in mixer_star():
        by_run.setdefault(point.run_id, []).append(point)
    for points in by_run.values():
        write_run(tmp_path / "m", points, config, family="mixer")
    return tmp_path / "m"


def test_commands_fit_a_mixer_or_say_that_they_cannot(mixer_runs, capsys):
    assert cli.main(["fit", str(mixer_runs), "--no-checks"]) == 0
    capsys.readouterr()
    for command, sentence in (
        (
            ["predict", "--fit", str(mixer_runs), "--compute", "1000", "--origin", "8x1x8", "--t0", "1"],
            "of family mixer: there is no prediction for it",
        ),
        (
            ["fit", str(mixer_runs), "--law", "flops"],
            "is of family mixer: there is no law that knows what a shape costs",
        ),
        (["fit", str(mixer_runs), "--center", "24x2x64"], "write WIDTHxDEPTHxTOKENxMLP"),
        (["simulate", str(SWEEPS / "star_mixer_tiny.yaml")], "there is no simulation for it yet"),
    ):
        assert cli.main(command) == 2
        said = capsys.readouterr().err
        assert sentence in said and said.count("\n") == 1, said
    assert cli.main(["next", str(mixer_runs), "--noise", "sigma=0.05,tau=0.05", "--enough", "1e-9"]) == 0
    assert "token_dim 256, seed 0" in capsys.readouterr().out  # the arm widened by another size


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"family": "mixr"}, "has family 'mixr', which is not known"),
        ({"family": "mixer", "token_dim": None}, "has no token_dim, as a mixer must"),
    ],
)
def test_a_record_of_no_family_is_refused(tmp_path, fields, sentence):
    write_run(tmp_path / "m", [mixer_point(CENTER, 16, 0.5)], {}, **fields)
    with pytest.raises(ValueError, match=sentence):
        load_points(tmp_path / "m", "fractals", 10)


def test_a_run_from_before_a_key_existed_is_of_the_same_recipe():
    """Otherwise a sweep that was begun by an older version could not be finished and fitted by this one."""
    config = dataclasses.asdict(compose(["name=v"]))
    old = json.loads(json.dumps(config))
    for key in ("family", "token_dim", "stages", "window", "block", "qk_norm", "qkv_bias", "norm"):
        del old["model"][key]
    assert recipe(old) == recipe(config)
    assert recipe(old) != recipe(dataclasses.asdict(compose([*MIXER])))
