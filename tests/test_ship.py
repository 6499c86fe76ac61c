"""An exported model computes, in the library it is for, what it computes here; what cannot be exported is said."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from made_run import STEP, make_run
from sovit import claims
from sovit.config import ConfigError, compose
from sovit.data.views import TestView, to_float
from sovit.lit import trained
from sovit.ship import export as shipping
from sovit.ship import onnx_file, timm_model
from sovit.ship.export import export

TINY = ("name=t", "logger=none", "model.patch_size=8", "model.image_size=16", "data.num_classes=6")
# timm's int(width * mlp_ratio) is one short of 488 at width 56 where the ratio is 488 / 56.
MODELS = {
    "avg": ("shape=16x2x37", "model.num_heads=2", "model.pool=avg"),
    "avg, fixed positions": ("shape=16x2x37", "model.num_heads=2", "model.pool=avg", "model.pos_embed=sincos2d"),
    "map": ("shape=56x1x488", "model.num_heads=7", "model.pool=map", "model.channels=3"),
    "token": ("shape=16x2x37", "model.num_heads=2", "model.pool=token", "model.drop_path_rate=0.5"),
    "token, fewer biases": (
        "shape=16x2x37", "model.num_heads=4", "model.pool=token", "model.qkv_bias=false", "model.norm=layernorm_nobias",
        "model.pos_embed=sincos2d",
    ),
    "map, fewer biases": (
        "shape=16x2x37", "model.num_heads=4", "model.pool=map", "model.qkv_bias=false", "model.norm=layernorm_nobias"
    ),
    "rms, qk": ("shape=16x2x37", "model.num_heads=2", "model.pool=avg", "model.norm=rmsnorm", "model.qk_norm=true"),
    "parallel": ("shape=16x2x37", "model.num_heads=2", "model.pool=avg", "model.block=parallel"),
    "22b": (
        "shape=16x2x37", "model.num_heads=2", "model.pool=map", "model.block=parallel", "model.qk_norm=true",
        "model.qkv_bias=false", "model.norm=rmsnorm",
    ),
    "swin": (
        "model.family=swin", "shape=16x2x37", "model.num_heads=2", "model.patch_size=4", "model.stages=2", "model.window=2"
    ),
}  # fmt: skip
MIXER = ("model.family=mixer", "shape=56x1x5x488", "model.num_heads=null")
SAID_BY_HUGGING_FACE = [name for name in MODELS if name not in ("rms, qk", "parallel", "22b", "swin")]
PLAIN = ["map", "rms, qk", "swin"]  # of those that are all in config.json


def pixels_of(model: torch.nn.Module) -> torch.Tensor:
    channels = next(module.in_channels for module in model.modules() if isinstance(module, torch.nn.Conv2d))
    return torch.rand(4, channels, 16, 16) * 2 - 1


def printed(said: str) -> str:
    """The Python in what an export says."""
    return "\n".join(line.removeprefix("    ") for line in said.split("\n\n", 1)[1].splitlines())


def executed(code: str, pixels: torch.Tensor) -> dict[str, object]:
    space: dict[str, object] = {"pixels": pixels}
    with torch.no_grad():
        exec(code, space)
    return space


@pytest.fixture
def run(tmp_path: Path) -> tuple[Path, torch.nn.Module]:
    return make_run(tmp_path / "runs", *TINY, *MODELS["avg"])


@pytest.mark.parametrize("name", MODELS)
def test_the_lines_that_are_printed_give_the_same_logits_in_timm(name: str, tmp_path: Path) -> None:
    source, model = make_run(tmp_path / "runs", *TINY, *MODELS[name])
    pixels = pixels_of(model)
    code = printed(export(source, tmp_path / "it's a model"[: 99 if name == "avg" else 4], kind="timm"))
    assert code.count("timm.create_model") == 2
    by_config, _, by_arguments = code.partition("# the same without config.json:")
    space = executed(by_config, pixels)
    torch.testing.assert_close(space["logits"], model(pixels), rtol=0, atol=1e-5)
    assert not space["model"].training  # type: ignore[attr-defined]
    torch.testing.assert_close(executed(code, pixels)["model"](pixels), model(pixels), rtol=0, atol=1e-5)  # type: ignore[operator]
    assert by_arguments.strip()


def test_the_lines_of_a_single_file_give_the_same_logits_in_timm(
    run: tuple[Path, torch.nn.Module], tmp_path: Path
) -> None:
    source, model = run
    pixels = pixels_of(model)
    space = executed(printed(export(source, tmp_path / "w.safetensors")), pixels)
    torch.testing.assert_close(space["logits"], model(pixels), rtol=0, atol=1e-5)
    (tmp_path / "plain").touch()
    assert (tmp_path / "w.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode  # others may read it too
    again = trained.load(tmp_path / "w.safetensors").model
    torch.testing.assert_close(again(pixels), model(pixels), rtol=0, atol=0)


@pytest.mark.parametrize("size", [16, 32, 40, 224])
def test_timm_prepares_photographs_as_an_evaluation_does(size: int) -> None:
    """At 32 pixels the side before the crop is 37, which timm's own arithmetic with 0.875 makes 36."""
    from timm.data import create_transform, resolve_data_config

    cfg = compose([*TINY, "model.channels=3", f"model.image_size={size}"])
    described = timm_model.config(cfg, None)["pretrained_cfg"]
    transform = create_transform(**resolve_data_config({}, pretrained_cfg=described))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (97, 300, 3), dtype=np.uint8))
    assert (transform(image) - to_float(_seen(image, size))).abs().max() < 3 / 127.5  # type: ignore[operator]


def _seen(image: Image.Image, size: int) -> torch.Tensor:
    import io

    file = io.BytesIO()
    image.save(file, "png")
    return TestView(size)(file.getvalue())


@pytest.mark.parametrize("name", SAID_BY_HUGGING_FACE)
def test_transformers_computes_the_same_logits(name: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from transformers import AutoConfig, AutoImageProcessor

    source, model = make_run(tmp_path / "runs", *TINY, *MODELS[name])
    pixels, classes = pixels_of(model), tmp_path / "classes.txt"
    classes.write_text("a\nb\nc\nd\ne\nf\n")
    about = shipping.About(class_list=classes)
    said = export(source, tmp_path / "hf", kind="huggingface", about=about)
    assert "Loaded again with transformers" in said
    space = executed(printed(said), pixels)
    torch.testing.assert_close(space["logits"], model(pixels), rtol=0, atol=1e-5)
    assert AutoConfig.from_pretrained(tmp_path / "hf").id2label[5] == "f"
    # Where the margin of a crop is odd, transformers begins it one pixel further to the left; 270 leaves an even one.
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (97, 270, 3), dtype=np.uint8))
    channels = pixels.shape[1]
    image = image if channels == 3 else image.convert("L")
    given = AutoImageProcessor.from_pretrained(tmp_path / "hf")(image, return_tensors="pt")["pixel_values"]
    wanted = to_float(_seen(image, 16)[:channels])
    assert given.shape == (1, *wanted.shape) and (given[0] - wanted).abs().max() < 3 / 127.5


@pytest.mark.parametrize("name", PLAIN)
def test_transformers_loads_a_folder_for_timm(name: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from transformers import AutoModelForImageClassification

    source, model = make_run(tmp_path / "runs", *TINY, *MODELS[name])
    assert "transformers loads the folder too" in export(source, tmp_path / "timm", kind="timm")
    pixels = pixels_of(model)
    with torch.no_grad():
        logits = AutoModelForImageClassification.from_pretrained(tmp_path / "timm").eval()(pixel_values=pixels).logits
    torch.testing.assert_close(logits, model(pixels), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", SAID_BY_HUGGING_FACE)
def test_no_tensor_is_lost_on_the_way_to_hugging_face(name: str, tmp_path: Path) -> None:
    """Without transformers: every number of the model is in the files, but for zeros where a bias or a position is new."""
    from safetensors.torch import load_file

    source, model = make_run(tmp_path / "runs", *TINY, *MODELS[name])
    export(source, tmp_path / "hf", kind="huggingface")
    found = [tensor for file in (tmp_path / "hf").glob("*.safetensors") for tensor in load_file(file).values()]
    there = torch.cat([tensor.flatten() for tensor in found]).sort().values
    ours = torch.cat([tensor.flatten() for tensor in model.state_dict().values()]).sort().values
    torch.testing.assert_close(there[there != 0], ours[ours != 0], rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["22b", *(pytest.param(name, marks=pytest.mark.full) for name in ("map", "swin"))])
def test_onnxruntime_computes_the_same_logits_for_any_number_of_images(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    source, model = make_run(tmp_path / "runs", *TINY, *MODELS[name])
    said = export(source, tmp_path / "graph", kind="onnx")
    assert "Loaded again with onnxruntime" in said
    for num in (1, 5):
        pixels = pixels_of(model)[:1].repeat(num, 1, 1, 1) * torch.rand(num, 1, 1, 1)
        space = executed(printed(said), pixels)
        np.testing.assert_allclose(space["logits"], model(pixels), rtol=0, atol=1e-5)  # type: ignore[call-overload]
        np.testing.assert_allclose(  # type: ignore[call-overload]
            space["features"], model.forward_head(model.forward_features(pixels), pre_logits=True), rtol=0, atol=1e-5
        )


def test_an_exported_file_can_be_exported_on_and_keeps_its_card(
    run: tuple[Path, torch.nn.Module], tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    source, _ = run
    export(source, tmp_path / "w.safetensors", about=shipping.About(licence="mit"))
    export(source, tmp_path / "direct", about=shipping.About(licence="mit"))
    export(tmp_path / "w.safetensors", tmp_path / "indirect")
    cards = [json.loads((tmp_path / name / "card.json").read_text()) for name in ("direct", "indirect")]
    assert cards[0] == cards[1] and cards[0]["licence"] == "mit"
    tensors = [load_file(tmp_path / name / "model.safetensors") for name in ("direct", "indirect")]
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0] | tensors[1])


def test_what_a_library_computes_otherwise_is_not_written(
    run: tuple[Path, torch.nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check that every export makes sees as little as another GELU."""
    right = timm_model.arguments
    monkeypatch.setattr(timm_model, "arguments", lambda cfg: right(cfg) | {"act_layer": "gelu"})
    with pytest.raises(ConfigError, match=r"timm \S+ computes other logits"):
        export(run[0], tmp_path / "m")
    assert {path.name for path in tmp_path.iterdir()} == {"runs"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((*MODELS["avg"], "model.block=parallel"), "model.block=parallel .* --format timm or"),
        ((*MODELS["avg"], "model.qk_norm=true"), "model.qk_norm=true .* --format timm, which transformers loads too"),
        ((*MODELS["avg"], "model.norm=rmsnorm"), "model.norm=rmsnorm .* --format timm, which transformers loads too"),
        (MODELS["swin"], "model.family=swin .* --format timm, which transformers loads too"),
        (MIXER, "model.family=mixer .* use --format onnx, which can"),
    ],
)
def test_what_hugging_face_cannot_say_is_named_with_a_format_that_can(
    options: tuple[str, ...], words: str, tmp_path: Path
) -> None:
    source, _ = make_run(tmp_path / "runs", *TINY, *options)
    with pytest.raises(ConfigError, match=words):
        export(source, tmp_path / "hf", kind="huggingface")
    assert not (tmp_path / "hf").exists()


def test_a_mixer_which_timm_has_in_its_own_sizes_only_is_a_file_that_is_read_here(tmp_path: Path) -> None:
    source, model = make_run(tmp_path / "runs", *TINY, *MIXER)
    with pytest.raises(ConfigError, match="in its own sizes only; use --format onnx"):
        export(source, tmp_path / "m")
    export(source, tmp_path / "m.safetensors")
    pixels = pixels_of(model)
    torch.testing.assert_close(trained.load(tmp_path / "m.safetensors").model(pixels), model(pixels), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("out", "kind", "said"),
    [
        ("no/m", None, "no is no folder; make it first."),
        ("m.pt", None, "ends neither in .safetensors nor in .ckpt"),
        ("m.safetensors", "huggingface", "leave out .safetensors"),
        ("there", None, "--overwrite"),
        ("there.safetensors", None, "--overwrite"),
        ("m", "zip", "--format zip is not known"),
    ],
)
def test_a_place_that_cannot_be_is_said_before_anything_is_read(
    out: str, kind: str | None, said: str, tmp_path: Path
) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there.safetensors").touch()
    with pytest.raises(ConfigError, match=re.escape(said)):
        export(tmp_path / "nothing", tmp_path / out, kind=kind)


@pytest.mark.parametrize("name", ["runs/t", "notes", "link"])
def test_overwriting_takes_nothing_that_is_not_an_export(
    name: str, run: tuple[Path, torch.nn.Module], tmp_path: Path
) -> None:
    """Not a run, not a folder with something of the user's beside an export, and not through a link."""
    export(run[0], tmp_path / "notes")
    (tmp_path / "notes" / "my notes.txt").write_text("dear")
    (tmp_path / "link").symlink_to(run[0])
    before = sorted(path for path in tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match="which is not of an export"):
        export(run[0], tmp_path / name, kind="timm", overwrite=True)
    assert sorted(path for path in tmp_path.rglob("*")) == before


def test_overwriting_an_export_leaves_nothing_of_the_old_one(run: tuple[Path, torch.nn.Module], tmp_path: Path) -> None:
    export(run[0], tmp_path / "m", kind="huggingface")
    assert (tmp_path / "m" / "preprocessor_config.json").exists()
    export(run[0], tmp_path / "m", kind="timm", overwrite=True)
    names = {"card.json", "README.md", "config.json", "model.safetensors"}
    assert {path.name for path in (tmp_path / "m").iterdir()} == names
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "m"}


@pytest.mark.parametrize("out", ["m", "m.safetensors"])
def test_a_killed_export_leaves_no_name_and_the_next_one_cleans_up(
    out: str, run: tuple[Path, torch.nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shipping, "_check", die)
        with pytest.raises(KeyboardInterrupt):
            export(run[0], tmp_path / out)
    assert {path.name for path in tmp_path.iterdir()} == {"runs"}
    half = tmp_path / f".{out}.export" / "new" / out  # of a process that was given no time to clean up
    half.mkdir(parents=True)
    (half / "model.safetensors").write_text("half")
    export(run[0], tmp_path / out)
    assert {path.name for path in tmp_path.iterdir()} == {"runs", out}


def test_two_exports_to_one_place_do_not_mix(run: tuple[Path, torch.nn.Module], tmp_path: Path) -> None:
    with claims.hold(tmp_path / ".m.export"), pytest.raises(ConfigError, match="choose another name"):
        export(run[0], tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_the_weights_that_are_asked_for_are_exported(run: tuple[Path, torch.nn.Module], tmp_path: Path) -> None:
    source, averaged = run
    pixels = pixels_of(averaged)
    for average, name in ((None, "best"), (True, "average"), (False, "trained")):
        said = export(source, tmp_path / f"{name}.safetensors", average=average)
        same = torch.equal(trained.load(tmp_path / f"{name}.safetensors").model(pixels), averaged(pixels))
        assert same == (average is not False) and f"after {STEP:,} steps" in said


def test_a_checkpoint_of_a_run_has_no_card_and_weights_make_none(
    run: tuple[Path, torch.nn.Module], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="has no card; leave out --license"):
        export(run[0], tmp_path / "m.ckpt", about=shipping.About(licence="mit"))
    export(run[0], tmp_path / "w.safetensors")
    with pytest.raises(ConfigError, match="holds weights only"):
        export(tmp_path / "w.safetensors", tmp_path / "m.ckpt")
    (run[0] / "run.json").unlink()
    with pytest.raises(ConfigError, match=r"has no run\.json beside it"):
        export(run[0], tmp_path / "m")


def test_without_onnx_the_command_to_install_it_is_said(
    run: tuple[Path, torch.nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_file.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=re.escape('pip install "sovit[onnx]"')):
        export(run[0], tmp_path / "m.onnx")


def test_a_graph_too_large_for_one_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_file, "LARGEST", 100)
    with pytest.raises(ConfigError, match="give a folder with --format onnx"):
        onnx_file.write(torch.nn.Linear(9, 9), torch.zeros(1, 9), tmp_path / "m.onnx", {}, beside=False)


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    torch.manual_seed(0)
    yield
