"""Sweep files: the shipped ones say what they claim, W&B would run the same cells, mistakes are refused in a sentence."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml

from sovit.config import compose
from sovit.derived import shape_of
from sovit.launch.plan import plan
from sovit.launch.sweep import SweepError, load_sweep, metric_of

SWEEPS = Path(__file__).parents[1] / "sweeps"
FILES = sorted(SWEEPS.glob("*.yaml"))
HEAD = """\
program: sovit.train
command: ["${env}", "${interpreter}", "-m", "${program}", "${args_no_hyphens}"]
method: grid
metric: {name: eval/fractals_10shot/error, goal: minimize}
"""


def dimensions(name: str) -> list[tuple[int, int, int]]:
    """(width, depth, MLP dimension) of the cells of a shipped sweep, with seed 0, in order, by their overrides."""
    found = []
    for cell in load_sweep(SWEEPS / f"{name}.yaml", ["seed=0"]).cells:
        values = dict(override.split("=") for override in cell)
        if "shape" in values:
            width, depth, mlp_dim = values["shape"].split("x")
        else:
            width, depth, mlp_dim = (values[f"model.{key}"] for key in ("width", "depth", "mlp_dim"))
        found.append((int(width), int(depth), int(mlp_dim)))
    return found


def arms(name: str) -> tuple[tuple[int, int, int], dict[str, list[int]]]:
    """Center and arm values of a star; fails unless every point differs from the first in exactly one dimension."""
    center, *points = dimensions(name)
    found: dict[str, list[int]] = {"width": [], "depth": [], "mlp_dim": []}
    for point in points:
        differing = [i for i in range(3) if point[i] != center[i]]
        assert len(differing) == 1, point
        found[list(found)[differing[0]]].append(point[differing[0]])
    return center, found


def write(path: Path, body: str, head: str = HEAD) -> Path:
    file = path / "bad.yaml"
    file.write_text(head + body)
    return file


def test_every_shipped_file_is_tested_here() -> None:
    assert {file.stem for file in FILES} == {
        "star_smoke", "star_tiny", "star_quick", "star", "grid_tiny", "grid_quick", "grid", "diagonal_tiny", "diagonal",
        "lr_check", "star_mixer_tiny", "star_swin_tiny", "star_quick_sigmoid", "star_multitask",
    }  # fmt: skip


def test_the_star_of_two_metrics_is_evaluated_by_both() -> None:
    center, found = arms("star_multitask")
    assert center == (24, 3, 96) and all(len(values) == 5 for values in found.values())
    cfg = compose(load_sweep(SWEEPS / "star_multitask.yaml").cells[0])
    assert cfg.eval.multitask and cfg.eval.datasets == ["fractals"]


def test_the_star_is_the_published_one() -> None:
    """SoViT (arXiv 2305.13035), section 4: center and values of the three arms, 16 heads, patch 14."""
    center, found = arms("star")
    assert center == (1968, 40, 6144)
    assert found == {
        "width": [608, 768, 928, 1088, 1328, 1648],
        "depth": [8, 10, 12, 16, 20, 24],
        "mlp_dim": [1088, 1360, 1728, 2160, 2592, 3072],
    }


def test_the_grid_is_the_published_one() -> None:
    """SoViT, section 4: 64 models, the full product of four widths, depths and MLP dimensions."""
    found = dimensions("grid")
    product = {(w, d, m) for w in (416, 512, 608, 768) for d in (6, 8, 10, 12) for m in (768, 928, 1088, 1360)}
    assert len(found) == 64 and set(found) == product


@pytest.mark.parametrize("name", ["star", "grid"])
def test_the_published_sweeps_have_16_heads_and_patch_14(name: str) -> None:
    for cell in load_sweep(SWEEPS / f"{name}.yaml").cells[:2]:
        shape = shape_of(compose(cell))
        assert (shape.num_heads, shape.patch_size) == (16, 14)
        assert (shape.width, shape.depth, shape.mlp_dim) in dimensions(name)


@pytest.mark.parametrize("name", ["star_tiny", "star_smoke", "star_quick"])
def test_a_tiny_star_varies_one_dimension_at_a_time_on_both_sides_of_its_center(name: str) -> None:
    center, found = arms(name)
    for value, values in zip(center, found.values(), strict=True):
        assert min(values) < value < max(values) and len(set(values)) == len(values)
    assert all(width % 4 == 0 for width, _, _ in dimensions(name))  # four heads at every width


@pytest.mark.parametrize("name", ["grid_tiny", "grid_quick"])
def test_a_tiny_grid_is_a_full_product(name: str) -> None:
    found = dimensions(name)
    axes = [sorted({values[i] for values in found}) for i in range(3)]
    assert len(set(found)) == len(found) == len(axes[0]) * len(axes[1]) * len(axes[2])
    assert min(map(len, axes)) >= 3  # a winner inside the grid is possible in every dimension


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_wandb_makes_the_same_cells_of_a_shipped_file(file: Path) -> None:
    """W&B's own code turns each combination into our overrides, accepts the parameters and finds the program."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # raised by importing wandb
        from wandb.apis.public.sweeps import _validate_config_and_fill_distribution
        from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    document = yaml.safe_load(file.read_text())
    assert document["program"] == "sovit.train"
    _validate_config_and_fill_distribution(document)
    command = create_sweep_command(document["command"])
    assert command[-3:] == ["-m", "${program}", "${args_no_hyphens}"]  # filled in by the agent
    for cell in load_sweep(file).cells:
        values = {key: by_text(document["parameters"][key], value) for key, value in (o.split("=", 1) for o in cell)}
        args = create_sweep_command_args({"args": {key: {"value": value} for key, value in values.items()}})
        assert args["args_no_hyphens"] == cell


def by_text(spec: dict[str, Any], text: str) -> Any:
    """The value of a W&B parameter that is written like this."""
    return next(value for value in spec.get("values", [spec.get("value")]) if str(value) == text)


def test_all_shapes_of_a_seed_come_before_the_next_seed(tmp_path: Path) -> None:
    file = write(tmp_path, "parameters:\n  seed: {values: [0, 1]}\n  shape: {values: [8x1x8, 16x1x8]}\n")
    assert load_sweep(file).cells == [
        ["seed=0", "shape=8x1x8"],
        ["seed=0", "shape=16x1x8"],
        ["seed=1", "shape=8x1x8"],
        ["seed=1", "shape=16x1x8"],
    ]


def test_an_override_takes_the_place_of_an_axis_and_adds_a_key(tmp_path: Path) -> None:
    file = write(tmp_path, "parameters:\n  shape: {values: [8x1x8, 16x1x8]}\n  seed: {values: [0, 1, 2]}\n")
    sweep = load_sweep(file, ["seed=2", "name=again"])
    assert sweep.cells == [["shape=8x1x8", "seed=2", "name=again"], ["shape=16x1x8", "seed=2", "name=again"]]
    assert sweep.name == "again" and load_sweep(file).name == "bad"


def test_seed_zero_is_a_seed(tmp_path: Path) -> None:
    file = write(tmp_path, "parameters:\n  shape: {value: 8x1x8}\n  seed: {value: 0}\n")
    assert load_sweep(file).cells == [["shape=8x1x8", "seed=0"]]


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ("parameters: {seed: {value: 0}}\nparameter: {}\n", "unknown key 'parameter'; did you mean 'parameters'"),
        ("parameters: {model: {parameters: {width: {value: 8}}}}\n", "write dotted keys such as model.NAME"),
        ("parameters: {seed: {values: [0, 1, 0]}}\n", "seed lists 0 twice"),
        ("parameters: {shape: {values: [8x1x8, 8x1x8]}}\n", "shape lists 8x1x8 twice"),
        ("parameters: {model.width: {values: [8, null]}}\n", "has a null"),
        ("parameters: {tag: {value: 'null'}}\n", "Hydra does not read as that text"),
        ("parameters: {tag: {value: 'a,b'}}\n", "'a,b'"),
        ("parameters: {tag: {value: '[a]'}}\n", "name such a value in conf/"),
        ("parameters: {tag: {value: '${seed}'}}\n", "name such a value in conf/"),
        ("parameters: {eval.shots: {value: [1, 5]}}\n", "only single values can be swept"),
        ("parameters: {optim.lr: {value: .inf}}\n", "give a finite number"),
        ("parameters: {optim.lr: {min: 0.1, max: 1.0}}\n", "must have either value: or a list values:"),
        ("parameters: {seed: {values: []}}\n", "must have either value: or a list values:"),
        ("parameters: {seed: 0}\n", "seed must say value: or values:"),
        ("parameters: {}\n", "parameters is empty"),
        ("parameters: {+seed: {value: 0}}\n", "not a config key"),
        ("parameters:\n  seed: {value: 0}\n  seed: {value: 1}\n", "line 7, column 3: the key 'seed' is given twice"),
        ("parameters: {seed: {value: 0}\n", "line 6, column 1"),
        ("parameters:\n\tseed: 0\n", "line 6, column 1"),
    ],
)
def test_a_file_that_hydra_would_misread_is_refused_in_a_sentence(tmp_path: Path, body: str, sentence: str) -> None:
    with pytest.raises(SweepError) as caught:
        load_sweep(write(tmp_path, body))
    message = str(caught.value)
    assert sentence in message
    assert "bad.yaml" in message and "\n" not in message and message.endswith((".", "?"))


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("method: bayes", "write method: grid"),
        ("program: train.py", "write program: sovit.train"),
        ('command: ["${env}", "${interpreter}", "${program}", "${args}"]', '"${args_no_hyphens}"'),
        ("metric: {name: eval/fractals_10shot/error, goal: maximize}", "goal: minimize"),
        ("metric: {name: loss, goal: minimize}", "write eval/fractals_10shot/error"),
    ],
)
def test_what_would_make_wandb_and_sovit_differ_is_refused(tmp_path: Path, line: str, sentence: str) -> None:
    head = {**yaml.safe_load(HEAD), **yaml.safe_load(line)}
    with pytest.raises(SweepError, match=r"bad\.yaml|metric name") as caught:
        load_sweep(write(tmp_path, "parameters: {seed: {value: 0}}\n", yaml.safe_dump(head)))
    assert sentence in str(caught.value)


def test_a_file_that_is_not_there_or_no_mapping_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SweepError, match="no such file"):
        load_sweep(tmp_path / "none.yaml")
    with pytest.raises(SweepError, match="is a mapping"):
        load_sweep(write(tmp_path, "- seed\n", head=""))


@pytest.mark.parametrize("override", ["seed", "seed=0,1", "=1", "seed=[0]", "--multirun"])
def test_an_override_that_is_not_one_value_is_refused(override: str) -> None:
    with pytest.raises(SweepError, match="KEY=VALUE"):
        load_sweep(SWEEPS / "star_smoke.yaml", [override])


def test_the_metric_names_a_dataset_and_shots() -> None:
    assert metric_of("eval/fractals_10shot/error") == ("fractals", 10)


def test_a_key_given_twice_on_the_command_line_is_refused() -> None:
    with pytest.raises(SweepError, match="seed is given twice, as 0 and as 1; drop one"):
        load_sweep(SWEEPS / "star_smoke.yaml", ["seed=0", "seed=1"])
    assert load_sweep(SWEEPS / "star_smoke.yaml", ["seed=0", "seed=0"]).cells


@pytest.mark.parametrize("sign", ["+", "++", "~"])
def test_a_sign_before_a_key_is_refused_with_the_way_to_write_it(sign: str) -> None:
    with pytest.raises(ValueError, match="seed") as caught:
        load_sweep(SWEEPS / "star_smoke.yaml", [f"{sign}seed=0"])
    assert "\n" not in str(caught.value)


def test_the_logger_that_is_called_none_can_be_chosen(tmp_path: Path) -> None:
    file = write(tmp_path, "parameters: {seed: {value: 0}, logger: {value: none}}\n")
    assert load_sweep(file).cells == [["seed=0", "logger=none"]]
    assert compose(load_sweep(file).cells[0]).logger.name == "none"


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ("parameters: {seed: {value: 010}}\n", "010 is read as the number 8; write 8, or '010' for the text"),
        ("parameters: {[a]: {value: 1}}\n", "a key is not a word"),
        ("parameters: {seed: {value: 2020-99-99}}\n", "bad.yaml"),
    ],
)
def test_what_yaml_would_read_as_something_else_is_refused(tmp_path: Path, body: str, sentence: str) -> None:
    with pytest.raises(SweepError) as caught:
        load_sweep(write(tmp_path, body))
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_a_metric_that_no_cell_logs_is_refused(tmp_path: Path) -> None:
    """Also one of a folder's images is a metric: whether it is logged is known once the cells are composed."""
    for wrong, right in (
        ("fractal_10shot", r"did you mean 'fractals'\?"),
        ("fractals_7shot", r"eval.shots are 1, 5, 10, 25"),
    ):
        body = HEAD.replace("fractals_10shot", wrong) + "parameters: {seed: {value: 0}}\n"
        with pytest.raises(SweepError, match=right):
            plan(load_sweep(write(tmp_path, body, head="")))
    with pytest.raises(SweepError, match="not one that runs log"):
        load_sweep(
            write(tmp_path, HEAD.replace("fractals_10shot", "fractals") + "parameters: {seed: {value: 0}}\n", head="")
        )
