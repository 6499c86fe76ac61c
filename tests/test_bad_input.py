"""``sovit fit`` on bad records: one sentence and exit code 2, or a listed exclusion, and never a traceback."""

import json
import math
import os
import shutil
import zlib
from pathlib import Path

import pytest

from sovit import records
from sovit.analysis.report import page as report
from sovit.cli import main

CENTER = (32, 4, 128)
WIDTHS = [(width, 4, 128) for width in (8, 16, 24, 48, 64, 96)]
DEPTHS = [(32, depth, 128) for depth in (1, 2, 8)]
COMPUTES = (64.0, 91.0, 128.0, 181.0, 256.0)
BAD = WIDTHS[0]  # the run that is spoiled


def error_of(run_id, shape, t):
    """A separable law whose best size lies inside every arm, and 0.3% of luck."""
    ratios = [x / c for x, c in zip(shape, CENTER, strict=True)]
    law = 0.1 + 0.05 * sum(r**-0.6 for r in ratios) + 0.04 * (t / 107) ** -0.4 * sum(r**0.5 for r in ratios)
    return law * (1 + 0.003 * math.sin(zlib.crc32(f"{run_id} {t}".encode())))


def name_of(shape, seed=0):
    return "star-w{:04d}-d{:02d}-m{:04d}-h04-p08-s{}".format(*shape, seed)


def write_run(sweep, shape, seed=0):
    directory = sweep / name_of(shape, seed)
    directory.mkdir(parents=True)
    sizes = dict(zip(("width", "depth", "mlp_dim"), shape, strict=True))
    config = {"name": "star", "optim": {"lr": 0.005}}
    record = {"schema": 1, "run_id": directory.name, "status": "done", "reason": None, "seed": seed, "config": config}
    records.write_json(directory / records.RUN, record | sizes)
    rows = [
        {"schema": 1, "run_id": directory.name, "sweep": "star", **sizes, "seed": seed, "step": step, "t_gflops": t,
         "duration": f"{t:g} gflops", "weights": "ema", "dataset": "fractals", "shots": 10, "draw": 0,
         "error": error_of(directory.name, shape, t), "stderr": 0.005}
        for step, t in enumerate(COMPUTES, start=1)
    ]  # fmt: skip
    records.append_lines(directory / records.EVALS, rows)
    return directory


@pytest.fixture
def star(tmp_path):
    """A directory with a star of two arms, and the run in it that is to be spoiled."""
    sweep = tmp_path / "star"
    for shape in (CENTER, *WIDTHS, *DEPTHS):
        write_run(sweep, shape)
    return sweep


@pytest.fixture
def fit(monkeypatch, capsys):
    """Run the command without drawing; returns (exit code, standard output, standard error)."""
    monkeypatch.setattr(report, "write_report", lambda fit, runs, out: out / "report.html")

    def run(*arguments):
        code = main(["fit", *map(str, arguments)])
        return code, *capsys.readouterr()

    return run


def refused(result):
    """The one sentence, on standard error."""
    code, out, err = result
    assert code == 2 and out == "" and err.startswith("sovit fit: ")
    assert err.count("\n") == 1 and err.rstrip().endswith(".")
    return err


def left_out(result):
    """What the command lists as left out, one string; the command succeeded."""
    code, out, err = result
    assert code == 0 and err == ""
    return " ".join(out.split("left out:")[1].split("\n\n")[0].split())


def edit(run, line, **changes):
    """Change keys of one line of evals.jsonl; ... removes a key."""
    path = run / records.EVALS
    rows = [json.loads(text) for text in path.read_text().splitlines()]
    row = {key: value for key, value in (rows[line] | changes).items() if value is not ...}
    path.write_text("".join(json.dumps(item) + "\n" for item in [*rows[:line], row, *rows[line + 1 :]]))


def edit_all(run, **changes):
    for line in range(len(COMPUTES)):
        edit(run, line, **changes)


def edit_record(run, **changes):
    records.write_json(run / records.RUN, (records.read_run(run) or {}) | changes)


def test_the_good_star_is_fitted(star, fit):
    """Without this, every refusal below could be about something else."""
    assert left_out(fit(star)) == f"5 points of {name_of(CENTER)}: center: held out"


def test_an_empty_folder_is_refused(tmp_path, fit):
    (tmp_path / "notes.txt").write_text("nothing yet")
    assert "holds no finished run" in refused(fit(tmp_path))
    assert "is not a directory" in refused(fit(tmp_path / "notes.txt"))
    assert "is not a directory" in refused(fit(tmp_path / "nowhere"))


def test_runs_that_never_finished_are_named_when_there_are_no_others(star, fit):
    for run in star.iterdir():
        edit_record(run, status="failed", reason="out of memory")
    sentence = refused(fit(star))
    assert "holds no finished run" in sentence and "(failed: out of memory)" in sentence


# Values that no training can have written, in evals.jsonl

WRONG = {
    "nan": ({"error": math.nan}, "has error nan, which is not in [0, 1]"),
    "no error": ({"error": None}, "has error None"),
    "text for a number": ({"error": "0.3"}, "has error '0.3'"),
    "true for a number": ({"error": True}, "has error True"),
    "negative error": ({"error": -0.2}, "has error -0.2"),
    "error above 1": ({"error": 23.6}, "has error 23.6"),
    "huge error": ({"error": 1e300}, "has error 1e+300"),
    "compute 0 after training": ({"t_gflops": 0}, "has t_gflops 0 after step 0"),
    "negative compute": ({"t_gflops": -5}, "has t_gflops -5"),
    "infinite compute": ({"t_gflops": math.inf}, "has t_gflops inf"),
    "huge compute": ({"t_gflops": 1e300}, "has t_gflops 1e+300"),
    "text for compute": ({"t_gflops": "much"}, "has t_gflops 'much'"),
    "no compute": ({"t_gflops": ...}, "has no t_gflops"),
    "negative width": ({"width": -8}, "has width -8"),
    "width 0": ({"width": 0}, "has width 0"),
    "half a width": ({"width": 8.5}, "has width 8.5"),
    "huge width": ({"width": 10**400}, "has width 1000"),
    "another width": ({"width": 12}, "has another shape or seed than line 1"),
    "another seed": ({"seed": 1}, "has another shape or seed than line 1"),
    "text for a step": ({"step": "three"}, "has step 'three'"),
    "nan standard error": ({"stderr": math.nan}, "has stderr nan"),
    "negative standard error": ({"stderr": -1}, "has stderr -1"),
    "no draw": ({"draw": ...}, "has no draw"),
    "number for a name": ({"duration": 64}, "has duration 64"),
    "unknown schema": ({"schema": 2}, "has schema 2, this version reads 1"),
    "no schema": ({"schema": ...}, "has schema None, this version reads 1"),
}


@pytest.mark.parametrize("case", WRONG)
def test_an_impossible_value_is_refused_with_its_line(star, fit, case):
    changes, words = WRONG[case]
    edit(star / name_of(BAD), 2, **changes)
    sentence = refused(fit(star))
    assert f"{name_of(BAD)}/evals.jsonl, line 3 {words}" in sentence


GARBAGE = {
    "cut off mid-line": (lambda text: text[:-40], "line 5 is not valid JSON"),
    "blank line": (lambda text: text + b"\n", "line 6 is not valid JSON"),
    "binary": (lambda text: bytes(range(128, 256)), "is not text"),
    "binary that is text": (lambda text: b"\x00\x01\x02\n", "line 1 is not valid JSON"),
    "a list": (lambda text: b"[1]\n", "line 1 is no JSON object"),
    "a number": (lambda text: b"5\n", "line 1 is no JSON object"),
    "a hundred thousand brackets": (lambda text: b"[" * 100_000 + b"\n", "line 1 is not valid JSON"),
    "a row twice": (lambda text: text + text.splitlines(keepends=True)[-1], "evaluates '256 gflops' twice"),
}


@pytest.mark.parametrize("case", GARBAGE)
def test_a_spoiled_file_of_a_finished_run_is_refused(star, fit, case):
    spoil, words = GARBAGE[case]
    path = star / name_of(BAD) / records.EVALS
    path.write_bytes(spoil(path.read_bytes()))
    sentence = refused(fit(star))
    assert f"{name_of(BAD)}/evals.jsonl" in sentence and words in sentence


RECORDS = {
    "cut off": ("cut", "run.json is not valid JSON"),
    "binary": (bytes(range(128, 256)), "run.json is not valid JSON"),
    "a list": (b"[1, 2]", "run.json holds no JSON object"),
    "another schema": ({"schema": 7}, "run.json has schema 7, this version reads 1"),
    "no configuration": ({"config": None}, "mixes runs that differ in"),
    "a configuration of another kind": ({"config": "lr=1"}, "has a config that is no mapping"),
}


@pytest.mark.parametrize("case", RECORDS)
def test_a_spoiled_record_is_refused(star, fit, case):
    content, words = RECORDS[case]
    run = star / name_of(BAD)
    if isinstance(content, dict):
        edit_record(run, **content)
    else:
        whole = (run / records.RUN).read_bytes()
        (run / records.RUN).write_bytes(whole[:-40] if content == "cut" else content)
    sentence = refused(fit(star))
    assert words in sentence and name_of(BAD) in sentence


def test_runs_with_spoiled_files_can_be_excluded(star, fit):
    """The way out that the sentences name must work: an excluded run is listed, whatever its files hold."""
    spoiled = [star / name_of(shape) for shape in (*WIDTHS[:2], *DEPTHS[:2])]
    (spoiled[0] / records.EVALS).write_bytes(bytes(range(128, 256)))
    (spoiled[1] / records.EVALS).write_bytes(b"[1]\n")
    (spoiled[2] / records.RUN).write_bytes(b"\xff\xfe[1, 2]")
    edit_record(spoiled[3], config="lr=1")
    lines = "".join(f"{run.name},spoiled\n" for run in spoiled)
    (star / "exclusions.csv").write_text(f"run_id,reason\n{lines}")
    listed = left_out(fit(star))
    assert all(f"{run.name}: exclusions.csv: spoiled" in listed for run in spoiled)


@pytest.mark.parametrize("name", [records.RUN, records.EVALS])
def test_a_directory_where_a_file_should_be_is_refused(star, fit, name):
    path = star / name_of(BAD) / name
    path.unlink()
    path.mkdir()
    sentence = refused(fit(star))
    assert f"{name_of(BAD)}/{name}" in sentence and "irectory" in sentence


def test_a_run_that_says_nothing_is_listed(star, fit):
    """No record, a record of something else, no evaluation, an unfinished run cut off mid-line: all at once."""
    runs = [star / name_of(shape) for shape in (*DEPTHS[:2], *WIDTHS[:2])]
    (runs[0] / records.RUN).unlink()
    (runs[1] / records.RUN).write_text('{"hello": "world"}')
    (runs[2] / records.EVALS).unlink()
    edit_record(runs[3], status="running")
    whole = (runs[3] / records.EVALS).read_text()
    (runs[3] / records.EVALS).write_text(whole[:-40])
    listed = left_out(fit(star))
    assert f"{runs[0].name}: no run.json" in listed
    assert f"{runs[1].name}: run.json says no status" in listed
    assert f"{runs[2].name}: no evaluation of fractals at 10 shots" in listed
    assert f"{runs[3].name}: running (the last line of evals.jsonl is cut off)" in listed


def test_errors_without_a_logarithm_and_near_one_are_listed(star, fit):
    edit(star / name_of(BAD), 2, error=0.0)
    edit(star / name_of(WIDTHS[1]), 2, error=1.0)
    listed = left_out(fit(star))
    assert f"1 points of {name_of(BAD)}: error 0 has no logarithm" in listed.replace("1 point of", "1 points of")
    assert name_of(WIDTHS[1]) in listed and "above 0.9" in listed


# Sweeps that are not one


def test_one_arm_asks_for_its_center_and_is_fitted_with_it(tmp_path, fit):
    """Which of its runs is the center no one can see; a center that was never run is one too, as in the paper's arms."""
    for shape in (CENTER, *WIDTHS):
        write_run(tmp_path / "arm", shape)
    sentence = refused(fit(tmp_path / "arm"))
    assert "differ in width only" in sentence and "--center ?x4x128" in sentence
    assert left_out(fit(tmp_path / "arm", "--center", "32x4x128")).startswith(f"5 points of {name_of(CENTER)}: center")
    code, out, _ = fit(tmp_path / "arm", "--center", "128x4x128")
    assert code == 0 and "center: held out" not in out and "no run at the center 128x4x128" in " ".join(out.split())
    found = json.loads((tmp_path / "arm" / "fit.json").read_text())
    assert found["arms"].keys() == {"width"} and found["arms"]["width"]["num_runs"] == 7


@pytest.mark.parametrize("text", ["wide", "32x4", "32x4x0", "-1x4x128", "32x4x128x2", "9999999999x4x128"])
def test_a_center_that_is_no_shape_is_refused(star, fit, text):
    assert f"--center {text!r} is no shape" in refused(fit(star, f"--center={text}"))


def test_a_center_that_the_runs_do_not_surround_is_refused(star, fit):
    assert "differs from the center 40x5x128" in refused(fit(star, "--center", "40x5x128"))


def test_a_missing_center_is_said(star, fit):
    shutil.rmtree(star / name_of(CENTER))
    code, out, _ = fit(star)
    assert code == 0 and "no run at the center 32x4x128" in " ".join(out.split())


def test_one_run_is_no_sweep(tmp_path, fit):
    write_run(tmp_path / "one", CENTER)
    assert "1 distinct shapes are no sweep" in refused(fit(tmp_path / "one"))


def test_runs_of_two_sweeps_are_refused(star, fit):
    """By their shapes, by the name in their rows, and by the name in their configuration."""
    stray = write_run(star, (48, 8, 256))
    assert "are neither a star" in refused(fit(star)) or "are no star" in refused(fit(star))
    shutil.rmtree(stray)
    edit_all(star / name_of(BAD), sweep="other")
    assert "mixes runs that differ in sweep" in refused(fit(star))
    edit_all(star / name_of(BAD), sweep="star")
    edit_record(star / name_of(BAD), config={"name": "other", "optim": {"lr": 0.005}})
    assert "mixes runs that differ in name" in refused(fit(star))


def test_runs_of_two_recipes_or_weights_are_refused(star, fit):
    run = star / name_of(BAD)
    edit_record(run, config={"name": "star", "optim": {"lr": 0.01}})
    assert "mixes runs that differ in optim.lr" in refused(fit(star))
    edit_record(run, config={"name": "star", "optim": {"lr": 0.005}})
    edit_all(run, weights="cooled")
    assert "mixes evaluated weights: cooled" in refused(fit(star))


def test_runs_of_another_metric_are_listed_and_a_metric_that_none_has_is_refused(star, fit):
    edit_all(star / name_of(BAD), dataset="digits")
    assert f"{name_of(BAD)}: no evaluation of fractals at 10 shots" in left_out(fit(star))
    assert "it has digits at 10, fractals at 10" in refused(fit(star, "--dataset", "flowers"))
    assert "holds no evaluation of fractals at 5 shots" in refused(fit(star, "--shots", "5"))


def test_a_copied_run_is_not_counted_twice(star, fit):
    shutil.copytree(star / name_of(BAD), star / f"{name_of(BAD)}_copy")
    assert f"both hold run {name_of(BAD)}" in refused(fit(star))


# Around the records


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("", "its first line must be run_id,reason"),
        ("run,why\n", "its first line must be run_id,reason"),
        ("run_id,reason\nstar-typo,bad\n", "'star-typo', which is no run of this sweep"),
        (f"run_id,reason\n{name_of(BAD)}\n", "gives no reason"),
        (f"run_id,reason\n{name_of(BAD)},a\n{name_of(BAD)},b\n", "twice"),
        (f"run_id,reason\n{name_of(BAD)},slow, and cold\n", "quote a reason that holds a comma"),
        ("\udc80\udc81", "is no text"),
    ],
)
def test_a_wrong_list_of_exclusions_is_refused(star, fit, lines, words):
    (star / "exclusions.csv").write_bytes(lines.encode(errors="surrogateescape"))
    sentence = refused(fit(star))
    assert "exclusions.csv" in sentence and words in sentence


def test_rows_that_an_import_left_out_are_listed(star, fit):
    note = {
        "imports": [
            {"source": "t.csv", "left_out": [{"where": "t.csv, line 9", "why": "has error 'x', which is no number"}]}
        ]
    }
    (star / "import.json").write_text(json.dumps(note))
    assert "t.csv, line 9: not imported: has error 'x', which is no number" in left_out(fit(star))
    (star / "import.json").write_text("[]")
    assert "is not what an import wrote" in refused(fit(star))


@pytest.mark.parametrize("content", ["[]", "{"])
def test_a_fit_written_by_something_else_is_written_anew(star, fit, content):
    (star / "fit.json").write_text(content)
    (star / "report.html").write_text("")
    assert fit(star)[0] == 0
    assert json.loads((star / "fit.json").read_text())["kind"] == "star"


def test_an_output_that_cannot_be_written_is_refused(star, fit, tmp_path):
    (tmp_path / "file").write_text("")
    assert "file" in refused(fit(star, "--out", tmp_path / "file"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_directory_without_permission_is_refused(star, fit):
    run = star / name_of(BAD)
    run.chmod(0)
    try:
        assert "ermission denied" in refused(fit(star))
    finally:
        run.chmod(0o700)


def test_hostile_names_reach_the_terminal_as_plain_characters(star, fit):
    os.rename(star / name_of(BAD), star / "star\x1b[31m<b>&")
    edit_record(star / "star\x1b[31m<b>&", status="failed", reason="\x1b[2Jgone\nand more")
    _, out, _ = fit(star)
    assert "\x1b" not in out and "gone" in out


def test_what_is_left_out_stands_in_the_page_too(star, capsys):
    """The whole command with its report: the page lists what the terminal lists."""
    edit(star / name_of(WIDTHS[1]), 2, error=0.0)
    edit_record(star / name_of(BAD), status="failed", reason="<b>out of memory</b>")
    assert main(["fit", str(star)]) == 0
    out = capsys.readouterr().out
    page = Path(star / "report.html").read_text()
    for text in (name_of(BAD), "error 0 has no logarithm"):
        assert text in out and text in page
    assert "<b>out of memory</b>" not in page and "&lt;b&gt;out of memory" in page
