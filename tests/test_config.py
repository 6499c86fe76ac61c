"""Typos never pass in silence, wrong values get one sentence, and every shipped experiment composes."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sovit import config
from sovit.config import ConfigError, compose, config_groups, schema_keys
from sovit.derived import eval_steps, shape_of
from sovit.shape import Shape


@pytest.mark.parametrize(
    ("override", "names"),
    [
        ("trainer.max_step=3", "'trainer.max_steps'"),
        ("+trainer.max_step=3", "'trainer.max_steps'"),
        ("max_steps=3", "'trainer.max_steps'"),
        ("trainer.foo=2", "trainer.precision"),
        ("+foo.bar=2", "'foo.bar'"),
        ("experiment=star_tny", "'star_tiny'"),
        ("optim=adam", "'adamw'"),
        ("eval.weights=emo", "'ema'"),
        ("data.name=fractal", "'fractals'"),
        ("eval.datasets=[digit]", "'digits'"),
        ("trainer.max_steps=abc", "trainer.max_steps"),
        ("optim.lr=[1,2]", "optim.lr"),
        ("optim.lr=-1", "optim.lr=-1"),
        ("schedule.cooldown=-1", "schedule.cooldown=-1"),
        ("trainer.max_steps=0", "trainer.max_steps=0"),
        ("trainer.max_steps=???", "trainer.max_steps"),
        ("eval.l2_reg=best", "'best'"),
        ("eval.shots=[]", "eval.shots"),
        ("shape=12", "'12'"),
        ("shape=So401m", "'So400m'"),
        ("shape=33x4x128", "width=33"),
        ("model.width=0", "width=0"),
        ("shape=So400m/14", "image_size=16"),
        ("name=a-b", "'a-b'"),
        ("tag=../x", "'../x'"),
        ("durations.first=null", "durations"),
        ("durations.first=3 parsecs", "parsecs"),
        ("schedule.kind=cosine", "cosine"),
        ("~trainer.max_steps", "trainer.max_steps"),
        ("~optim", "~optim"),
        ("optim.beta2=1.5", "optim.beta2=1.5"),
        ("data.rotation=5", "data.rotation=5"),
        ("model.image_size=288", "model.image_size=288"),
        ("model.drop_path_rate=2", "model.drop_path_rate=2"),
        ("trainer.precision=bf16-mixd", "'bf16-mixed'"),
        ("eval.shots=[10,10]", "eval.shots=[10, 10]"),
        ("eval.datasets=[]", "eval.datasets=[]"),
        ("seed=8388608", "seed=8388608"),
        ("model.head_dim=4", "model.num_heads=4"),
        # a node or a group that is set to something else
        ("optim=3", "choose from adafactor, adamw"),
        ("optim=null", "choose from adafactor, adamw"),
        ("optim={lr: 1}", "choose from adafactor, adamw"),
        ("optim=[adamw]", "'adamw'"),
        ("optim=adamw,adafactor", "is not an option of conf/optim"),
        ("+optim=adamw", "write optim=adamw"),
        ("optim@model=adamw", "'optim@model' is not a key"),
        ("optim.lr.x=1", "optim.lr holds a value and no keys"),
        ("optim.lr={x: 1}", "optim.lr"),
        ("eval=3", "eval.datasets"),
        ("durations={}", "durations.values"),
        ("experiment=[star,grid]", "is a list; choose one option of conf/experiment"),
        ("experiment=null", "choose from"),
        ("hydra.run.dir=x", "leave it out"),
        ("hydra/job_logging=default", "leave it out"),
        # values of another type, or that only look like one
        ("seed=1e3", "write 1000"),
        ("seed=007", "write 7"),
        ("seed=1_000", "write seed=1000"),
        ("seed=-0", "write seed=0"),
        ("seed='5'", "without quotes"),
        ("seed=true", "seed=True"),
        ("seed=null", "give seed="),
        ("seed=", "seed="),
        ("seed", "seed=VALUE"),
        ("seed=0,1", "sweep file"),
        ("seed=range(3)", "sweep file"),
        (f"seed={'9' * 400}", "too large"),
        (f"seed={'9' * 5000}", "cannot be read"),
        ("optim.lr=nan", "optim.lr=nan"),
        ("optim.lr=inf", "optim.lr=inf"),
        ("optim.lr=1e400", "optim.lr=inf"),
        ("optim.lr=true", "optim.lr=True"),
        ("optim.lr='0.1'", "write 0.1"),
        ("eval.shots=5", "write eval.shots=[5]"),
        ("eval.shots=[true]", "eval.shots[0]"),
        ("eval.datasets=digits", "write eval.datasets=[digits]"),
        ("eval.l2_reg=true", "eval.l2_reg"),
        ("durations.values=[]", "not both"),
        ("trainer.keep_checkpoint=yes", "neither true nor false"),
        ("trainer.keep_checkpoint=1", "neither true nor false"),
        ("tag=1.10", "put another letter before it"),
        ("tag=true", "put another letter before it"),
        # names and paths
        ("name=..", "name='..'"),
        ("name=.hidden", "no '.' first"),
        (f"tag={'x' * 81}", "at most 80"),
        ("runs_dir=", "runs_dir"),
        ('runs_dir="a\nb"', "cannot be printed"),
        ("center=here", "center='here'"),
        ("retry_of=../x", "retry_of='../x'"),
        # letters that only look right, and values from somewhere else
        ("\N{CYRILLIC SMALL LETTER DZE}eed=3", "'seed'"),
        ("optim=\N{CYRILLIC SMALL LETTER A}damw", "'adamw'"),
        ("optim.name='\N{CYRILLIC SMALL LETTER A}damw'", "'adamw'"),
        ("seed=${oc.env:SEED}", "depends on the machine"),
        ("seed=${sed}", "sed"),
    ],
)
def test_a_bad_override_gets_one_sentence_that_names_the_mend(override: str, names: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose([override])
    message = str(caught.value)
    assert names in message
    assert "\n" not in message and message.endswith((".", "?"))


def test_what_only_shows_when_a_run_is_built_is_refused_before() -> None:
    """A cell that composes is a cell that starts: positions that do not fit the width, a cooldown longer than the run."""
    with pytest.raises(ConfigError, match="width"):
        compose(["model.pos_embed=sincos2d", "shape=6x1x8", "model.num_heads=2"])
    with pytest.raises(ConfigError, match="longer than the duration of 50 steps"):
        compose(["experiment=star", "trainer.max_steps=50"])


def test_a_whole_number_is_a_ridge_value() -> None:
    assert compose(["eval.l2_reg=1024"]).eval.l2_reg == 1024.0


def test_seed_zero_is_a_seed() -> None:
    assert compose(["seed=0"]).seed == 0 and compose(["seed=7"]).seed == 7


@pytest.mark.parametrize("experiment", config_groups()["experiment"])
def test_every_experiment_composes_and_is_named_like_its_file(experiment: str) -> None:
    needed = {
        "lit_tiny": ["text.encoder=x"],
        "lit_published": ["text.encoder=x", "text.vocabulary=x", "data.root=x", "eval.datasets=[x/]"],
    }.get(experiment, [])
    assert compose([f"experiment={experiment}", *needed]).name == experiment


@pytest.mark.parametrize("group", [g for g in config_groups() if g != "experiment"])
def test_every_group_option_composes(group: str) -> None:
    for option in config_groups()[group]:
        files = (
            ["data.root=x", "data.num_classes=9", "model.channels=3"]
            if group == "data" and option != "fractals"
            else []
        )
        if option in ("text_tiny", "scenes", "pairs", "coco"):  # they need each other
            given = {"model": "text_tiny", "data": "scenes", group: option}
            files = [f"{key}={value}" for key, value in given.items()] + ["text.encoder=x", "eval.datasets=[scenes]"]
            files += {"pairs": ["data.root=x"], "coco": ["data.root=x", "data.captions=x"]}.get(option, [])
        needed = {
            "vit": ["model.image_size=224"],
            "vit22b": ["shape=22B/14"],
            "mixer_tiny": ["shape=32x4x16x128"],
        }.get(option, [])
        compose([f"{group}={option}", *needed, *files])


def test_a_file_of_a_group_states_every_key_of_its_node() -> None:
    """A key missing from a group file would silently keep the value of the group chosen before it."""
    from omegaconf import OmegaConf

    from sovit.config import CONF_DIR

    for group in ("model", "data", "optim", "schedule", "trainer", "logger"):
        wanted = {key.partition(".")[2] for key in schema_keys() if key.startswith(f"{group}.")}
        for file in (CONF_DIR / group).glob("*.yaml"):
            assert set(OmegaConf.load(file)) == wanted, file


def test_shape_forms() -> None:
    assert shape_of(compose(["shape=48x2x96"])) == Shape(48, 2, 96, 4, 8)
    assert shape_of(compose(["shape=48x2x96", "model.width=64"])) == Shape(64, 2, 96, 4, 8)
    by_head = ["model.num_heads=null", "model.head_dim=8"]
    assert shape_of(compose(["shape=48x2x96", "model.width=64", *by_head])) == Shape(64, 2, 96, 8, 8)
    assert shape_of(compose(["shape=48x2x96/4"])) == Shape(48, 2, 96, 4, 4)
    assert shape_of(compose(["model=vit", "shape=So400m/14"])) == Shape(1152, 27, 4304, 16, 14)
    assert shape_of(compose(["model=vit", "shape=B/16", "model.num_heads=null"])) == Shape(768, 12, 3072, 12, 16)
    assert shape_of(compose(["experiment=grid", "model.width=416", "model.depth=6", "model.mlp_dim=768"])) == Shape(
        416, 6, 768, 16, 14
    )


def test_durations_are_the_same_compute_for_every_shape() -> None:
    for text in ("16x1x16", "64x8x256"):
        cfg = compose([f"shape={text}", "durations.first=1 gflops", "durations.last=4 gflops", "durations.num=3"])
        assert list(eval_steps(cfg).values()) == ["1 gflops", "2 gflops", "4 gflops"]


def test_max_steps_cuts_the_durations_and_evaluates_at_the_end() -> None:
    cfg = compose(["durations.values=[10 steps, 20 steps, 40 steps]", "durations.first=null", "durations.last=null",
                   "durations.num=null", "trainer.max_steps=25"])  # fmt: skip
    assert eval_steps(cfg) == {10: "10 steps", 20: "20 steps", 25: "25 steps"}


@pytest.mark.parametrize("flags", [["--help"], ["--cfg", "job"]])
def test_help_and_cfg_do_not_import_torch(flags: list[str]) -> None:
    code = (
        "import sys, runpy, atexit\n"
        "atexit.register(lambda: print('TORCH' if 'torch' in sys.modules else 'LIGHT'))\n"
        f"sys.argv = ['sovit.train', 'experiment=star_tiny', *{flags}]\n"
        "runpy.run_module('sovit.train', run_name='__main__', alter_sys=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("LIGHT")
    assert "star_tiny" in done.stdout


def test_multirun_is_refused_with_the_way_to_do_it() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sovit.train", "-m", "seed=0,1"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "sovit run FILE" in done.stderr


def test_the_command_line_refuses_with_exit_code_2_and_no_traceback() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sovit.train", "trainer.max_step=3"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "did you mean 'trainer.max_steps'?" in done.stderr and "Traceback" not in done.stderr


def test_a_key_given_two_values_is_refused_on_the_command_line_only(capsys: pytest.CaptureFixture[str]) -> None:
    """Hydra takes the last; a caller that adds to a cell's overrides may, a person who types both has made a mistake."""
    from sovit import train

    assert train.main(["seed=1", "optim.lr=0.1", "seed=2"]) == 2
    assert "seed is given twice, as 1 and as 2; drop one." in capsys.readouterr().err
    assert compose(["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--cfg", "job", "optm.lr=1"], "did you mean 'optim.lr'?"),
        (["--help", "sed=1"], "did you mean 'seed'?"),
        (["--cfg", "jb"], "write --cfg job"),
        (["--confg", "job"], "did you mean '--cfg'?"),
        (["--config-name", "other"], "--config-name is not an option"),
        (["--config-dir=other"], "--config-dir is not an option"),
        (["--experimental-rerun", "x"], "--experimental-rerun is not an option"),
        (["-m", "seed=0,1"], "use `sovit run FILE`"),
    ],
)
def test_flags_never_hide_a_mistake_or_load_another_configuration(
    flags: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from sovit import train

    assert train.main(flags) == 2
    out, err = capsys.readouterr()
    assert out == "" and sentence in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("file", "old", "new", "sentence"),
    [
        ("config.yaml", "seed: 0", "seed: 0\nseed: 1", "the key 'seed' is given twice"),
        ("optim/adamw.yaml", "lr: 5.0e-3", "lr: 5.0e-3\nlr: 1", "the key 'lr' is given twice"),
        ("optim/adamw.yaml", "beta2: 0.98\n", "", "does not state beta2"),
        ("config.yaml", "seed: 0", "seed: 010", "010 is read as the number 8"),
        ("config.yaml", 'tag: ""', "tag: 1:30", "1:30 is read as the number 90"),
        ("config.yaml", 'tag: ""', "tag: no", "tag=False is not text"),
        ("config.yaml", "seed: 0", "seed: 0\n  x: 1", "config.yaml, line"),
        ("config.yaml", "seed: 0", "seed: ${oc.env:SEED}", "seed=${oc.env:SEED} depends on the machine"),
        ("config.yaml", "durations:  ", "durations: 3\nx:  ", "durations must hold keys of its own"),
        ("config.yaml", "  - _self_", "  - star_tiny", "defaults has 'star_tiny'"),
        ("config.yaml", "model: tiny", "model: [tiny, vit]", "model=['tiny', 'vit'] is not an option"),
        ("optim/adamw.yaml", "name: adamw", "# @package model\nname: adamw", "leave that line out"),
    ],
)
def test_a_fault_in_a_file_of_conf_is_a_sentence_with_its_path(
    file: str, old: str, new: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(config.CONF_DIR, tmp_path / "conf")
    monkeypatch.setattr(config, "CONF_DIR", tmp_path / "conf")
    path = tmp_path / "conf" / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(ConfigError) as caught:
        compose()
    assert sentence in str(caught.value) and "\n" not in str(caught.value)
    assert str(path) in str(caught.value) or "tag=False" in sentence


def test_an_experiment_may_be_based_on_another_and_both_are_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(config.CONF_DIR, tmp_path / "conf")
    monkeypatch.setattr(config, "CONF_DIR", tmp_path / "conf")
    folder = tmp_path / "conf" / "experiment"
    (folder / "mine.yaml").write_text("# @package _global_\ndefaults:\n  - star_tiny\n  - _self_\nseed: 7\n")
    cfg = compose(["experiment=mine"])
    assert (cfg.name, cfg.seed, cfg.durations.values and len(cfg.durations.values)) == ("star_tiny", 7, 6)
    (folder / "star_tiny.yaml").write_text((folder / "star_tiny.yaml").read_text().replace("name:", "nmae:"))
    with pytest.raises(ConfigError, match=r"star_tiny\.yaml: 'nmae' .* 'name'"):
        compose(["experiment=mine"])


def test_the_folder_of_the_runs_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """It changes no number, and on a cluster every user has a scratch folder of his own."""
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    assert compose(["runs_dir=${oc.env:SCRATCH}/runs"]).runs_dir == "/scratch/me/runs"
