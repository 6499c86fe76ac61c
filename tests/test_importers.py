"""Imports: numbers arrive as they were, units are converted only when asked for, and nothing is dropped or overwritten."""

import csv
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest

from sovit import cli, records
from sovit.analysis.imports import imported as laid_down
from sovit.analysis.imports.importers import parse_map, read_csv, read_jsonl, read_wandb
from sovit.analysis.points import Dimensions, Point, load_points
from sovit.analysis.star import fit_star
from sovit.cli import importers
from sovit.flops import forward_gflops
from sovit.shape import Shape

CENTER = Dimensions(32, 4, 128)
SHAPES = [
    CENTER,
    *(CENTER._replace(width=w) for w in (8, 16, 24, 48, 64)),
    *(CENTER._replace(depth=d) for d in (1, 2, 8)),
]
COMPUTES = (45.0, 64.0, 91.0, 128.0, 181.0, 256.0)
MAP = "width=width,depth=depth,mlp_dim=mlp_dim,t=t,error=error"
HEADER = ["width", "depth", "mlp_dim", "t", "error"]


def error_of(shape, t):
    """A separable law whose best size lies inside every arm."""
    ratios = [x / c for x, c in zip(shape, CENTER, strict=True)]
    return 0.1 + 0.05 * sum(r**-0.6 for r in ratios) + 0.04 * (t / 107) ** -0.4 * sum(r**0.5 for r in ratios)


def star_rows():
    """One dict an evaluation: 9 shapes at 6 computes."""
    return [
        {"width": s.width, "depth": s.depth, "mlp_dim": s.mlp_dim, "t": t, "error": error_of(s, t)}
        for s in SHAPES
        for t in COMPUTES
    ]


def write_csv(path, rows, header=None):
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header or list(rows[0]))
        writer.writerows([row.values() if isinstance(row, dict) else row for row in rows])
    return path


@pytest.fixture
def sovit(monkeypatch, tmp_path, capsys):
    """Run a command in an empty directory; returns (exit code, standard output, standard error)."""
    commands = cli.COMMANDS if importers in cli.COMMANDS else (*cli.COMMANDS, importers)
    monkeypatch.setattr(cli, "COMMANDS", commands)
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        code = cli.main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return run


def take(sovit, path, *options, name="theirs", kind="csv", mapping=MAP, dataset="imagenet", shots=10):
    given = ("--dataset", dataset, "--shots", shots, *options)
    return sovit("import", kind, path, "--name", name, "--map", mapping, *given)


def refused(result):
    """The one sentence of a command that failed."""
    code, out, err = result
    assert code == 2 and out == "" and err.count("\n") == 1 and err.startswith("sovit import: ")
    return err


def test_an_imported_star_is_fitted_like_the_points_it_came_from(sovit, tmp_path):
    code, out, _ = take(sovit, write_csv(tmp_path / "star.csv", star_rows()))
    assert code == 0 and "9 runs, 54 evaluations" in out
    assert out.rstrip().splitlines()[-1] == "sovit fit runs/theirs --dataset imagenet --shots 10"
    points, exclusions = load_points(Path("runs/theirs"), "imagenet", 10)
    assert exclusions == []
    expected = [
        Point(point.run_id, *s, 0, t, f"{t:g} gflops", error_of(s, t), 0.0, 1)
        for point, s, t in zip(
            sorted(points, key=lambda p: (SHAPES.index((p.width, p.depth, p.mlp_dim)), p.t_gflops)),
            (s for s in SHAPES for _ in COMPUTES), COMPUTES * len(SHAPES), strict=True,
        )
    ]  # fmt: skip
    assert sorted(points, key=str) == sorted(expected, key=str)
    direct, imported = (fit_star(group).as_dict()["arms"] for group in (expected, points))
    assert imported["width"]["s"] == direct["width"]["s"] and direct["width"]["s"] is not None


def test_the_records_are_those_of_a_run_and_say_that_they_were_imported(sovit, tmp_path):
    path = write_csv(tmp_path / "star.csv", star_rows())
    take(sovit, path, "--patch", 8, "--image-size", 16, "--heads", 4, "--channels", 1, "--pool", "avg")
    run_id = "theirs-w0016-d04-m0128-h04-p08-s0"
    assert records.parse_run_id(run_id)[1] == Shape(16, 4, 128, 4, 8)
    record = records.read_run(Path("runs/theirs") / run_id)
    assert record["run_id"] == run_id and record["status"] == records.DONE and record["schema"] == records.SCHEMA
    assert record["imported"]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert record["imported"]["source"] == "star.csv" and record["imported"]["map"]["t"] == "t"
    assert record["config"]["model"]["pool"] == "avg"
    cost = forward_gflops(Shape(16, 4, 128, 4, 8), 16, channels=1, pool="avg")
    assert record["forward_gflops"] == pytest.approx(cost)
    rows = records.read_lines(Path("runs/theirs") / run_id / records.EVALS)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert {row["weights"] for row in rows} == {"imported"}


def only_point(name="theirs", dataset="imagenet", shots=10):
    return load_points(Path("runs") / name, dataset, shots)[0][0]


@pytest.mark.parametrize(
    ("column", "value", "options", "error"),
    [
        ("error", "0.236", (), 0.236),
        ("error", "23.6", ("--percent",), 0.236),
        ("accuracy", "0.764", (), 0.236),
        ("accuracy", "76.4", ("--percent",), 0.236),
    ],
)
def test_accuracy_and_percent_become_errors_when_it_is_said(sovit, tmp_path, column, value, options, error):
    path = write_csv(tmp_path / "one.csv", [[16, 4, 128, 100, value, "0.5"]], [*HEADER[:4], column, "se"])
    mapping = f"width=width,depth=depth,mlp_dim=mlp_dim,t=t,{column}={column}"
    assert take(sovit, path, *options, mapping=mapping)[0] == 0
    assert only_point().error == pytest.approx(error, abs=1e-12)
    if options:
        take(sovit, path, *options, mapping=f"{mapping},stderr=se", name="again")
        assert only_point("again").stderr == pytest.approx(0.005)


@pytest.mark.parametrize("options", [(), ("--percent",)])
def test_percent_is_never_guessed(sovit, tmp_path, options):
    """76.4 without --percent is refused; 0.4 percent with it is taken at its word, and doubted."""
    value = 0.4 if options else 76.4
    result = take(sovit, write_csv(tmp_path / "one.csv", [[16, 4, 128, 100, value]], HEADER), *options)
    if options:
        assert only_point().error == pytest.approx(0.004) and "are they percent?" in result[1]
    else:
        sentence = refused(result)
        assert "one.csv, line 2" in sentence and "not in [0, 1]" in sentence and "--percent" in sentence


@pytest.mark.parametrize(
    ("options", "factor"),
    [((), 1), (("--macs",), 2), (("--t-unit", "tflops"), 1e3), (("--t-unit", "flops", "--macs"), 2e-9)],
)
def test_compute_is_converted_only_as_told(sovit, tmp_path, options, factor):
    take(sovit, write_csv(tmp_path / "one.csv", [[16, 4, 128, 4e9, 0.3]], HEADER), *options)
    assert only_point().t_gflops == pytest.approx(4e9 * factor)


def test_images_become_compute_by_the_closed_form(sovit, tmp_path):
    """SoViT-400m/14 at 224 pixels costs 221 GFLOPs by its paper, on 40B images 9T GFLOPs."""
    path = write_csv(tmp_path / "one.csv", [[1152, 27, 4304, 40e9, 0.16]], [*HEADER[:3], "seen", "error"])
    mapping = "width=width,depth=depth,mlp_dim=mlp_dim,images=seen,error=error"
    sentence = refused(take(sovit, path, mapping=mapping))
    assert "--patch and --image-size" in sentence
    code, out, _ = take(sovit, path, "--patch", 14, "--image-size", 224, mapping=mapping)
    assert code == 0 and "closed form at 224 px, patch 14, 3 channels, pool map" in out  # what was assumed is said
    assert only_point().t_gflops == pytest.approx(221 * 40e9, rel=0.005)


def test_multiply_adds_given_as_flops_are_noticed(sovit, tmp_path):
    """timm prints 110.26 GMACs for So400m; taken for GFLOPs, t would be half of what it is."""
    header = [*HEADER[:3], "images", "gmacs", "error"]
    path = write_csv(tmp_path / "one.csv", [[1152, 27, 4304, 1e9, 110.26, 0.2]], header)
    mapping = "width=width,depth=depth,mlp_dim=mlp_dim,images=images,forward_gflops=gmacs,error=error"
    geometry = ("--patch", 14, "--image-size", 224)
    assert "say --macs" in take(sovit, path, *geometry, mapping=mapping)[1]
    _, out, _ = take(sovit, path, *geometry, "--macs", mapping=mapping, name="doubled")
    assert "say --macs" not in out and only_point("doubled").t_gflops == pytest.approx(220.5e9, rel=0.002)


def test_draws_are_averaged_and_zero_compute_is_the_random_initialisation(sovit, tmp_path):
    rows = [[16, 4, 128, 0, 0.95, 0], [16, 4, 128, 64, 0.30, 0], [16, 4, 128, 64, 0.34, 1], [16, 4, 128, 90, 0.2, 0]]
    path = write_csv(tmp_path / "draws.csv", rows, [*HEADER, "draw"])
    assert take(sovit, path, mapping=f"{MAP},draw=draw")[0] == 0
    points, _ = load_points(Path("runs/theirs"), "imagenet", 10)
    assert [(point.error, point.num_draws) for point in points] == [(pytest.approx(0.32), 2), (0.2, 1)]
    rows = records.read_lines(next(Path("runs/theirs").glob("*/evals.jsonl")))
    assert (rows[0]["step"], rows[0]["duration"]) == (0, "init")


def test_durations_are_named_by_what_the_runs_share(sovit, tmp_path):
    """By compute, else by images, else counted: a slice of equal names must be one of equal compute or of equal images."""
    mapping = "width=width,depth=depth,mlp_dim=mlp_dim,images=n,forward_gflops=cost,error=error"
    header = [*HEADER[:3], "n", "cost", "error"]

    def names(images):
        rows = [[s.width, 4, 128, n, s.width, 0.3 - n / 1e5] for s in SHAPES[1:4] for n in images(s.width)]
        path = write_csv(tmp_path / "durations.csv", rows, header)
        name = f"n{len(list(tmp_path.glob('runs/*')))}"
        _, out, _ = take(sovit, path, mapping=mapping, name=name)
        return {point.duration for point in load_points(Path("runs") / name, "imagenet", 10)[0]}, out

    assert names(lambda w: (6400 / w, 12900 / w))[0] == {"6.4K gflops", "12.9K gflops"}
    assert names(lambda w: (100, 200, 400))[0] == {"100 images", "200 images", "400 images"}
    found, out = names(lambda w: (100 * w**0.5, 210 * w**0.5))
    assert found == {"evaluation 1", "evaluation 2"} and "will be interpolated" in out


BAD = {
    "nan": ([16, 4, 128, 64, "nan"], "has error 'nan', which is no number"),
    "empty": ([16, 4, 128, 64, ""], "has error '', which is no number"),
    "text": (["wide", 4, 128, 64, 0.3], "has width 'wide', which is no number"),
    "above 1": ([16, 4, 128, 64, 1.3], "has error 1.3, which is not in [0, 1]; if the column is in percent"),
    "negative error": ([16, 4, 128, 64, -0.1], "has error -0.1, which is not in [0, 1]"),
    "fraction": ([16.5, 4, 128, 64, 0.3], "has width 16.5, which is no whole number"),
    "huge": (["1e400", 4, 128, 64, 0.3], "has width '1e400', which is no number"),
    "large": ([10**12, 4, 128, 64, 0.3], "which is no whole number from 1 to 10,000,000"),
    "negative t": ([16, 4, 128, -64, 0.3], "has t -64, which is no amount of training"),
    "infinite t": ([16, 4, 128, "inf", 0.3], "has t 'inf', which is no number"),
    "short": ([16, 4, 128], "has 3 fields, the header 5"),
    "repeated": ([32, 4, 128, 45.0, 0.4], "repeats bad.csv, line 2, the same run at the same duration"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_row_is_one_sentence_with_its_line_or_listed(sovit, tmp_path, case):
    row, why = BAD[case]
    rows = [list(r.values()) for r in star_rows()]
    path = write_csv(tmp_path / "bad.csv", [*rows, row], HEADER)
    sentence = refused(take(sovit, path))
    assert f"bad.csv, line {len(rows) + 2} " in sentence and why in sentence and "--skip-bad" in sentence
    assert not Path("runs").exists()  # nothing was written before all was checked
    code, out, _ = take(sovit, path, "--skip-bad")
    assert code == 0 and "left out, 1 row" in out and why in out
    (left_out,) = json.loads(Path("runs/theirs/import.json").read_text())["imports"][0]["left_out"]
    assert left_out == {"where": f"bad.csv, line {len(rows) + 2}", "why": left_out["why"]} and why in left_out["why"]
    assert len(load_points(Path("runs/theirs"), "imagenet", 10)[0]) == len(rows)


def test_several_bad_rows_are_counted_and_all_listed(sovit, tmp_path):
    rows = [list(r.values()) for r in star_rows()]
    path = write_csv(tmp_path / "bad.csv", [*rows, *([16, 4, 128, 64, 2] for _ in range(30))], HEADER)
    assert "(and 29 more rows cannot be used)" in refused(take(sovit, path))
    _, out, _ = take(sovit, path, "--skip-bad")
    assert "left out, 30 rows" in out and "and 20 more, in runs/theirs/import.json" in out
    assert len(json.loads(Path("runs/theirs/import.json").read_text())["imports"][0]["left_out"]) == 30


@pytest.mark.parametrize(
    ("mapping", "sentence"),
    [
        ("widht=width,depth=depth,mlp_dim=mlp_dim,t=t,error=error", "'widht' is not a key; did you mean 'width'?"),
        ("width=width,depth=depth,t=t,error=error", "does not say where mlp_dim stand"),
        ("width=width,depth=depth,mlp_dim=mlp_dim,error=error", "needs t=COLUMN or images=COLUMN"),
        (f"{MAP},images=n", "and not both"),
        (f"{MAP},accuracy=a", "and not both"),
        (f"{MAP},error=other", "gives error twice"),
        ("width", "'width' is not KEY=COLUMN"),
        (
            "width=Width,depth=depth,mlp_dim=mlp_dim,t=t,error=error",
            "no column 'Width' for width; did you mean 'width'?",
        ),
        (f"{MAP},seed=sead", "has no column 'sead' for seed; it has width, depth, mlp_dim, t, error"),
        (f"{MAP},forward_gflops=t", "gives t and forward_gflops"),
    ],
)
def test_a_wrong_mapping_is_named(sovit, tmp_path, mapping, sentence):
    assert sentence in refused(take(sovit, write_csv(tmp_path / "star.csv", star_rows()), mapping=mapping))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is empty"),
        (b"\n\n", "is empty"),
        (b"\x89PNG\r\n\x1a\n\xff\xfe\x00", "is not UTF-8 text"),
        (b"width,depth\0\n1,2\n", "is not a text file"),
        (b"width,width,depth,mlp_dim,t,error\n", "two columns 'width'"),
        (b"width,depth,mlp_dim,t,error\n", "holds no usable row"),
        (b'width,depth,mlp_dim,t,error\n16,4,128,64,"0.3\n', "is not a CSV file"),
        (b"width;depth;mlp_dim;t;error\n16;4;128;64;0.3\n", "it has width;depth;mlp_dim;t;error"),
    ],
)
def test_a_file_that_is_no_table_is_one_sentence(sovit, tmp_path, content, sentence):
    path = tmp_path / "table.csv"
    path.write_bytes(content)
    assert sentence in refused(take(sovit, path))


def test_a_missing_file_and_a_directory_are_one_sentence(sovit, tmp_path):
    assert "cannot be read: No such file" in refused(take(sovit, tmp_path / "nowhere.csv"))
    assert "cannot be read: Is a directory" in refused(take(sovit, tmp_path))


def test_json_lines_reach_into_objects_and_name_the_broken_line(sovit, tmp_path):
    path = tmp_path / "log.jsonl"
    lines = [json.dumps({"cfg": {"vit": {"width": 16, "d": 4}}, "cfg.vit.m": 128, "t": 64, "eval/err": 0.3})]
    mapping = "width=cfg.vit.width,depth=cfg.vit.d,mlp_dim=cfg.vit.m,t=t,error=eval/err"
    path.write_text("\n".join([*lines, '{"cfg": {"vit": {"wid']))
    assert "log.jsonl, line 2 is no JSON object" in refused(take(sovit, path, kind="jsonl", mapping=mapping))
    path.write_text("\n".join([*lines, json.dumps({"cfg": 3, "t": 64})]))
    assert "log.jsonl, line 2 has no cfg.vit.width" in refused(take(sovit, path, kind="jsonl", mapping=mapping))
    assert take(sovit, path, "--skip-bad", kind="jsonl", mapping=mapping)[0] == 0
    assert (only_point().width, only_point().error) == (16, 0.3)
    path.write_text("[1, 2]\n")
    assert "holds no JSON object" in refused(take(sovit, path, kind="jsonl", mapping=mapping))


def everything_in(directory):
    return {path: path.read_bytes() for path in sorted(Path(directory).rglob("*")) if path.is_file()}


def test_a_second_import_changes_nothing_and_a_longer_table_adds(sovit, tmp_path):
    rows = star_rows()
    path = write_csv(tmp_path / "star.csv", rows[:-6])
    take(sovit, path)
    before = everything_in("runs")
    assert "0 directories new" in take(sovit, path)[1]
    assert everything_in("runs") == before
    assert "1 directory new" in take(sovit, write_csv(path, rows))[1]
    after = everything_in("runs")
    assert {p: c for p, c in after.items() if p in before and p.name != "import.json"} == {
        p: c for p, c in before.items() if p.name != "import.json"
    }
    assert len(json.loads(Path("runs/theirs/import.json").read_text())["imports"]) == 2


def test_other_runs_are_never_overwritten(sovit, tmp_path):
    """Neither one imported with other numbers nor one that was trained here; and then nothing at all is written."""
    rows = star_rows()
    take(sovit, write_csv(tmp_path / "star.csv", rows[-6:]))
    rows[-1]["error"] = 0.5
    before = everything_in("runs")
    assert "holds another run" in refused(take(sovit, write_csv(tmp_path / "star.csv", rows)))
    assert everything_in("runs") == before
    trained = Path("runs/mine/mine-w0032-d04-m0128-s0")
    trained.mkdir(parents=True)
    (trained / "last.ckpt").write_text("weights")
    assert "holds another run" in refused(take(sovit, tmp_path / "star.csv", name="mine"))
    assert [p.name for p in Path("runs/mine").rglob("*")] == [trained.name, "last.ckpt"]


def test_an_import_that_is_killed_leaves_whole_runs_and_can_be_repeated(sovit, tmp_path, monkeypatch):
    path = write_csv(tmp_path / "star.csv", star_rows())
    replaced, replace = [], os.replace

    def die_at_the_fourth(source, target):
        replaced.append(target)
        if len(replaced) == 7:  # every run replaces run.json and its directory
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", die_at_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        take(sovit, path)
    monkeypatch.setattr(os, "replace", replace)
    points, exclusions = load_points(Path("runs/theirs"), "imagenet", 10)
    assert len(points) == 18 and exclusions == []
    assert take(sovit, path)[0] == 0
    assert len(load_points(Path("runs/theirs"), "imagenet", 10)[0]) == 54


def test_run_names_become_safe_file_names_and_stay_apart(sovit, tmp_path):
    names = ["../../escape", "a b", "a_b", "a/b", "x" * 300, "café"]
    rows = [[16, 4, 128, t, 0.3, name] for name in names for t in (64, 90)]
    path = write_csv(tmp_path / "runs.csv", rows, [*HEADER, "name"])
    assert take(sovit, path, mapping=f"{MAP},run=name")[0] == 0
    directories = [p for p in Path("runs/theirs").iterdir() if p.is_dir()]
    assert len(directories) == len(names)
    assert {p.name for p in tmp_path.iterdir()} == {"runs.csv", "runs"}
    assert all(
        records.parse_run_id(f"{p.name.rsplit('-s', 1)[0].replace('m0128', 'm0128-h04-p08')}-s0") for p in directories
    )


def test_a_run_of_two_shapes_is_refused(sovit, tmp_path):
    rows = [[16, 4, 128, 64, 0.3, "a"], [24, 4, 128, 90, 0.3, "a"]]
    path = write_csv(tmp_path / "runs.csv", rows, [*HEADER, "name"])
    sentence = refused(take(sovit, path, mapping=f"{MAP},run=name"))
    assert "line 3 gives the shape 24x4x128 to a run that has 16x4x128 in runs.csv, line 2" in sentence


def test_runs_of_two_recipes_are_not_fitted_together(sovit, tmp_path):
    rows = [[*row.values(), 1e-3 if row["width"] != 16 else 2e-3] for row in star_rows()]
    path = write_csv(tmp_path / "star.csv", rows, [*HEADER, "lr"])
    assert take(sovit, path, mapping=f"{MAP},recipe.lr=lr")[0] == 0
    with pytest.raises(ValueError, match=r"mixes runs that differ in recipe\.lr"):
        load_points(Path("runs/theirs"), "imagenet", 10)


@pytest.mark.parametrize("name", ["a-b", "../up", "", "a b"])
def test_a_name_that_is_no_file_name_is_refused(sovit, tmp_path, name):
    assert "becomes part of file names" in refused(take(sovit, write_csv(tmp_path / "s.csv", star_rows()), name=name))
    assert not Path("runs").exists()


def test_units_without_their_column_are_refused(sovit, tmp_path):
    path = write_csv(tmp_path / "one.csv", [[16, 4, 128, 1e6, 0.3]], [*HEADER[:3], "images", "error"])
    mapping = "width=width,depth=depth,mlp_dim=mlp_dim,images=images,error=error"
    geometry = ("--patch", 8, "--image-size", 16)
    assert "neither is mapped" in refused(take(sovit, path, *geometry, "--macs", mapping=mapping))
    assert "is the unit of t" in refused(take(sovit, path, *geometry, "--t-unit", "flops", mapping=mapping))


# A stand-in for wandb.Api with the part of its interface that is used.


class FakeRun:
    def __init__(self, id, config, history, state="finished", summary=None):
        self.id, self.name, self.config, self.state = id, f"name of {id}", config, state
        self.summary, self.history = summary or {}, history

    def scan_history(self, keys=None, page_size=1000, min_step=0, max_step=None):
        return iter([row for row in self.history if all(key in row for key in keys)])


class FakeSweep:
    def __init__(self, runs):
        self.runs = runs


class FakeApi:
    def __init__(self, runs, error=None):
        self.found, self.error = runs, error

    def runs(self, path, filters=None):
        if self.error:
            raise self.error
        assert path == "me/vits"
        return iter(self.found)

    def sweep(self, path):
        assert path == "me/vits/abc123"
        return FakeSweep(self.found[:2])


WANDB_MAP = "width=config.model.width,depth=config.model.depth,mlp_dim=config.mlp,t=t_gflops,error=eval/in_10shot/error"


def fake_runs():
    def history(width):
        trained = [{"t_gflops": t, "eval/in_10shot/error": error_of(CENTER._replace(width=width), t)} for t in COMPUTES]
        return [{"_step": 1, "train/loss": 3.0}, *trained, {"_step": 9, "train/loss": 1.0}]

    runs = [
        FakeRun(f"id{width}", {"model": {"width": width, "depth": 4}, "mlp": 128, "lr": 0.1}, history(width))
        for width in (16, 24, 32)
    ]
    return [*runs, FakeRun("id48", {"model": {"width": 48, "depth": 4}, "mlp": 128}, [], state="crashed")]


def test_wandb_runs_become_records_and_unfinished_ones_exclusions(sovit, monkeypatch):
    monkeypatch.setattr(importers, "_wandb_api", lambda: FakeApi(fake_runs()))
    code, out, _ = take(sovit, "me/vits", kind="wandb", mapping=WANDB_MAP)
    assert code == 0 and "3 runs, 18 evaluations" in out
    points, exclusions = load_points(Path("runs/theirs"), "imagenet", 10)
    assert {point.run_id for point in points} == {f"theirs-w{w:04d}-d04-m0128-id{w}-s0" for w in (16, 24, 32)}
    assert [point.error for point in points[:6]] == [error_of(CENTER._replace(width=16), t) for t in COMPUTES]
    assert [(row.run_id, row.reason) for row in exclusions] == [
        ("theirs-w0048-d04-m0128-id48-s0", "failed: W&B says crashed")
    ]
    record = records.read_run(Path("runs/theirs/theirs-w0016-d04-m0128-id16-s0"))
    assert record["imported"]["kind"] == "wandb" and record["imported"]["source"] == "me/vits"
    before = everything_in("runs")
    assert "0 directories new" in take(sovit, "me/vits", kind="wandb", mapping=WANDB_MAP)[1]
    assert everything_in("runs") == before


def test_a_wandb_sweep_and_summaries_are_read(sovit, monkeypatch):
    runs = [
        FakeRun(f"id{w}", {"w": w}, [], summary={"best": {"err": 0.2 + w / 1e3}, "t": 64.0, "d": 4, "m": 128})
        for w in (16, 24)
    ]
    monkeypatch.setattr(importers, "_wandb_api", lambda: FakeApi(runs))
    mapping = "width=config.w,depth=summary.d,mlp_dim=summary.m,t=summary.t,error=summary.best.err,run=run.name"
    assert take(sovit, "me/vits/abc123", kind="wandb", mapping=mapping)[0] == 0
    points, _ = load_points(Path("runs/theirs"), "imagenet", 10)
    assert sorted((point.width, point.error) for point in points) == [
        (16, pytest.approx(0.216)),
        (24, pytest.approx(0.224)),
    ]


def test_a_wandb_run_without_the_metric_is_named(sovit, monkeypatch):
    runs = fake_runs()
    runs[1].history = [{"t_gflops": 64.0}, {"eval/in_10shot/error": 0.3}]  # logged at different steps
    monkeypatch.setattr(importers, "_wandb_api", lambda: FakeApi(runs))
    sentence = refused(take(sovit, "me/vits", kind="wandb", mapping=WANDB_MAP))
    assert "W&B run id24 has no entry with all of t_gflops, eval/in_10shot/error" in sentence
    code, out, _ = take(sovit, "me/vits", "--skip-bad", kind="wandb", mapping=WANDB_MAP)
    assert code == 0 and "W&B run id24 has no entry" in out


def test_whatever_wandb_raises_is_one_sentence(sovit, monkeypatch):
    class CommError(Exception):
        pass

    for error in (CommError("404: not found\nand a page\nof advice"), TimeoutError(), KeyError("model")):
        monkeypatch.setattr(importers, "_wandb_api", lambda error=error: FakeApi([], error))
        assert "W&B did not give the runs of me/vits" in refused(
            take(sovit, "me/vits", kind="wandb", mapping=WANDB_MAP)
        )

    def no_key():
        raise CommError("No API key configured. Use `wandb login` to log in.")

    monkeypatch.setattr(importers, "_wandb_api", no_key)
    assert "No API key" in refused(take(sovit, "me/vits", kind="wandb", mapping=WANDB_MAP))
    monkeypatch.setattr(importers, "_wandb_api", lambda: FakeApi([]))
    assert "has no runs at me/vits" in refused(take(sovit, "me/vits", kind="wandb", mapping=WANDB_MAP))
    assert "is not ENTITY/PROJECT" in refused(take(sovit, "vits", kind="wandb", mapping=WANDB_MAP))


def test_the_fake_has_the_interface_of_the_real_api():
    """The names and arguments used exist in wandb; read from its source, because importing it takes seconds."""
    import ast
    import importlib.util

    root = Path(importlib.util.find_spec("wandb").submodule_search_locations[0]) / "apis" / "public"

    def members(file, cls):
        tree = ast.parse((root / file).read_text())
        body = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == cls).body
        return {n.name: [a.arg for a in n.args.args] for n in body if isinstance(n, ast.FunctionDef)}

    api, run, sweep = members("api.py", "Api"), members("runs.py", "Run"), members("sweeps.py", "Sweep")
    assert "path" in api["runs"] and "path" in api["sweep"] and "keys" in run["scan_history"]
    assert {"config", "summary", "state", "id", "name"} <= set(run) | {"id", "name"}
    assert "runs" in sweep or "runs" in (root / "sweeps.py").read_text()


def test_a_directory_that_cannot_be_written_is_one_sentence(sovit, tmp_path):
    (tmp_path / "file").write_text("")
    path = write_csv(tmp_path / "star.csv", star_rows())
    assert "cannot be written" in refused(take(sovit, path, "--runs-dir", tmp_path / "file"))


def test_hostile_text_reaches_the_terminal_as_plain_characters(sovit, tmp_path):
    path = write_csv(tmp_path / "star.csv", [[16, 4, 128, 64, 0.3], [16, 4, 128, 90, "\x1b[31mred"]], HEADER)
    result = take(sovit, path)
    assert "\x1b" not in refused(result)
    assert "\x1b" not in take(sovit, path, "--skip-bad")[1]


def test_readers_and_mapping_work_without_the_command(tmp_path):
    """The functions themselves, as a notebook would call them."""
    table = read_csv(write_csv(tmp_path / "star.csv", star_rows()))
    from sovit.analysis.imports.imported_rows import Options

    made = laid_down.build(table, parse_map([MAP]), "theirs", Options("imagenet", 10))
    directory, num_new = laid_down.write(made, tmp_path / "runs")
    assert num_new == len(SHAPES) and directory == tmp_path / "runs" / "theirs"
    lines = tmp_path / "star.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in star_rows()))
    again = laid_down.build(read_jsonl(lines), parse_map([MAP]), "theirs", Options("imagenet", 10))
    assert laid_down.write(again, tmp_path / "runs")[1] == 0  # the same numbers from another file are the same runs
    from_wandb = read_wandb(lambda: FakeApi(fake_runs()), "me/vits", parse_map([WANDB_MAP]))
    assert len(from_wandb.rows) == 18 and len(from_wandb.unfinished) == 1
    assert np.isfinite([row.values["t_gflops"] for row in from_wandb.rows]).all()
