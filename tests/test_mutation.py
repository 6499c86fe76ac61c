"""A misspelt key burns a night: every key of every shipped configuration, one letter off, is refused with the right one.

Four kinds of slip: a letter left out, two that changed places, another letter, a doubled one; one of each for every key,
on the command line (bare, with +, ++ and ~), in a copy of ``conf/`` and in copies of the sweep files.
"""

import dataclasses
import random
import re
import shutil
import string
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from sovit import cli, config, train
from sovit.config import CONF_DIR, ConfigError, compose, config_groups, from_mapping, schema_keys
from sovit.launch.local import runner as local
from sovit.launch.pay import throughput
from sovit.launch.sweep import TOP_LEVEL_KEYS
from sovit.schema import CHOICES, EVAL_DATASETS

SWEEPS = sorted((Path(__file__).parents[1] / "sweeps").glob("*.yaml"))
SMOKE = str(next(file for file in SWEEPS if file.stem == "star_smoke"))
ALPHABET = string.ascii_lowercase + string.digits + "_"


@pytest.fixture(autouse=True)
def no_training(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slip that passes must fail the test, not train a cell."""
    engine = types.ModuleType("sovit.lit.engine")
    monkeypatch.setattr(engine, "run", lambda cfg: 99, raising=False)
    monkeypatch.setitem(sys.modules, "sovit.lit.engine", engine)
    monkeypatch.setattr(local, "run_sweep", lambda *_, **__: 99)
    monkeypatch.setattr(throughput, "expect", lambda *_, **__: pytest.fail("a slip passed and was planned"))
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))


def mutants(word: str, known: set[str]) -> list[str]:
    """A slip of each kind at a random place, none of them a known word."""
    rng = random.Random(word)
    places = [k for k, letter in enumerate(word) if letter.isalnum() or letter == "_"]
    found = []
    for kind in range(4):
        for _ in range(200):
            k = rng.choice(places)
            slip = [
                word[:k] + word[k + 1 :],
                word[:k] + word[k : k + 2][::-1] + word[k + 2 :],
                word[:k] + rng.choice(ALPHABET) + word[k + 1 :],
                word[: k + 1] + word[k:],
            ][kind]
            if slip not in {*known, *found, word, ""} and slip.strip() == slip:
                found.append(slip)
                break
    return found


def refused(code: int, capsys: pytest.CaptureFixture[str], meant: str) -> str:
    """The one sentence of a refusal, which names the word that was meant."""
    out, err = capsys.readouterr()
    assert code == 2 and out == "", f"{meant} misspelt ended with {code}: {out} {err}"
    assert err.count("\n") == 1 and err.rstrip().endswith((".", "?")), err
    assert meant in err, f"{meant} is not named: {err}"
    assert "Traceback" not in err and "hydra.cc" not in err
    return err


def test_the_slips_are_one_letter_away_and_four_a_word() -> None:
    found = mutants("optim.lr", set(schema_keys()))
    assert len(found) == len(set(found)) == 4
    assert sorted(len(slip) - len("optim.lr") for slip in found) == [-1, 0, 0, 1]


def test_no_misspelt_key_passes_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    keys = {*schema_keys(), *config_groups()}
    count = 0
    for key in sorted(keys):
        for slip in mutants(key, keys):
            for sign in ("", "+", "++", "~"):
                said = refused(train.main([f"{sign}{slip}=1"]), capsys, f"'{key}'")
                assert f"'{slip}'" in said
                count += 1
    print(f"{count} misspelt keys refused on the command line")
    assert count > 1000


def test_no_misspelt_key_passes_on_the_command_line_of_a_sweep(capsys: pytest.CaptureFixture[str]) -> None:
    keys = {*schema_keys(), *config_groups()}
    count = 0
    for number, key in enumerate(sorted(keys)):
        for command, slip in zip(("plan", "run"), mutants(key, keys)[number % 3 :], strict=False):
            sign = ("", "+", "++")[number % 3]
            refused(cli.main([command, SMOKE, f"{sign}{slip}=1"]), capsys, f"'{key}'")
            count += 1
    print(f"{count} misspelt keys refused by sovit plan and sovit run")
    assert count > 2 * len(keys) - len(keys)


def test_no_misspelt_option_passes_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    count = 0
    for group, options in config_groups().items():
        for option in options:
            for slip in mutants(option, set(options)):
                refused(train.main([f"{group}={slip}"]), capsys, f"'{option}'")
                count += 1
    print(f"{count} misspelt options refused")
    assert count >= 4 * 18


def test_no_misspelt_choice_passes() -> None:
    plain = dataclasses.asdict(compose())
    count = 0
    for key, choices in CHOICES.items():
        node, _, leaf = key.partition(".")
        for choice in choices:
            for slip in mutants(choice, set(choices)):
                with pytest.raises(ConfigError, match=f"'{choice}'"):
                    from_mapping({**plain, node: {**plain[node], leaf: slip}})
                count += 1
    for dataset in EVAL_DATASETS:
        for slip in mutants(dataset, set(EVAL_DATASETS)):
            with pytest.raises(ConfigError, match=f"'{dataset}'"):
                from_mapping({**plain, "eval": {**plain["eval"], "datasets": [slip]}})
            count += 1
    print(f"{count} misspelt choices refused")
    assert count >= 4 * sum(map(len, CHOICES.values())) - 4


def keys_in(node: yaml.Node, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], yaml.ScalarNode]]:
    """Every key of a YAML document, and every entry of its defaults list, with the keys above it."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield path, key
            if "defaults" in path:
                yield from (((*path, "="), value) for _ in range(value.value != "null"))
            yield from keys_in(value, (*path, key.value))
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            if isinstance(item, yaml.ScalarNode) and path == ("defaults",):
                yield path, item
            yield from keys_in(item, path)


def misspelt(file: Path, known: set[str]) -> Iterator[tuple[str, str, str]]:
    """(keys above, what was meant, the file's text with one slip) for every key of a file."""
    text = file.read_text()
    for path, node in keys_in(yaml.compose(text, Loader=yaml.SafeLoader)):
        word = node.value.strip()
        for slip in mutants(word, known):
            yield ".".join(path), word, text[: node.start_mark.index] + slip + text[node.end_mark.index :]


@pytest.fixture
def copied_conf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of conf/ that takes its place."""
    shutil.copytree(CONF_DIR, tmp_path / "conf")
    monkeypatch.setattr(config, "CONF_DIR", tmp_path / "conf")
    return tmp_path / "conf"


# What a file leaves to be said beside it.
TEXTS = ["text.encoder=x", "eval.datasets=[scenes]"]
NEEDS = {
    "text_tiny": ["data=scenes", *TEXTS],
    "scenes": ["model=text_tiny", *TEXTS],
    "pairs": ["model=text_tiny", "data.root=x", *TEXTS],
    "coco": ["model=text_tiny", "data.root=x", "data.captions=x", *TEXTS],
    "lit_tiny": ["text.encoder=x"],
    "lit_published": ["text.encoder=x", "text.vocabulary=x", "data.root=x", "eval.datasets=[x/]"],
    "vit": ["model.image_size=224"],
    "mixer_tiny": ["shape=16x2x8x32"],
    "vit22b": ["model.image_size=224", "shape=256x1x256"],
    **{name: ["data.root=pictures", "data.num_classes=8"] for name in ("imagefolder", "webdataset", "hf")},
}
CONF_FILES = sorted(
    path.relative_to(CONF_DIR)
    for path in CONF_DIR.rglob("*.yaml")
    if path.parts[len(CONF_DIR.parts)] not in ("launcher", "task")  # no part of a run's configuration
)


@pytest.mark.parametrize("name", CONF_FILES, ids=lambda name: name.with_suffix("").as_posix())
def test_no_misspelt_key_passes_in_a_file_of_conf(
    name: Path, copied_conf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = copied_conf / name
    group = name.parts[0] if len(name.parts) == 2 else ""
    known = {key.rpartition(".")[2] for key in schema_keys()} | {
        option for options in config_groups().values() for option in options
    }
    text, count = file.read_text(), 0
    for above, meant, wrong in misspelt(file, known):
        file.write_text(wrong)
        said = refused(train.main([f"{group}={name.stem}"] if group else []), capsys, meant)
        assert str(file) in said or above == "defaults", said
        count += 1
    file.write_text(text)
    assert compose([f"{group}={name.stem}", *NEEDS.get(name.stem, [])] if group else [])
    print(f"{count} misspelt keys refused in conf/{name}")
    assert count >= 4 * len(list(keys_in(yaml.compose(text, Loader=yaml.SafeLoader)))) - 2


def test_no_misspelt_key_passes_in_a_file_of_a_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sovit.downstream import tasks

    shutil.copytree(CONF_DIR, tmp_path / "conf")
    monkeypatch.setattr(tasks, "CONF_DIR", tmp_path / "conf")
    count = 0
    for recipe in tasks.recipes():
        file = tmp_path / "conf" / "task" / f"{recipe}.yaml"
        text, known = file.read_text(), {*tasks.TASKS, *yaml.safe_load(file.read_text())}
        for _, meant, wrong in misspelt(file, known):
            file.write_text(wrong)
            with pytest.raises(ConfigError, match=re.escape(meant)) as refusal:
                tasks.compose([f"task={recipe}"])
            assert str(file) in str(refusal.value)
            count += 1
        file.write_text(text)
        assert tasks.compose([f"task={recipe}"])
    assert count >= 4 * 10 * 5


def test_no_misspelt_file_or_folder_of_conf_passes(copied_conf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A renamed group or option leaves what names it without a target."""
    for path in [*copied_conf.glob("*/"), copied_conf / "optim" / "adamw.yaml", copied_conf / "logger" / "wandb.yaml"]:
        if path.name in ("experiment", "launcher", "task"):  # config.yaml names no option of these
            continue
        for slip in mutants(path.stem, set(config_groups())):
            path.rename(path.with_stem(slip) if path.suffix else path.with_name(slip))
            refused(train.main([]), capsys, path.stem)
            (path.with_stem(slip) if path.suffix else path.with_name(slip)).rename(path)
    assert compose()


def test_an_experiment_that_forgets_its_package_is_refused(
    copied_conf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without that comment Hydra puts every key below `experiment`, where none is read."""
    for slip in ("# @packge _global_", "# @package _globl_", "#"):
        file = copied_conf / "experiment" / "star_tiny.yaml"
        file.write_text(file.read_text().replace("# @package _global_", slip))
        refused(train.main(["experiment=star_tiny"]), capsys, "# @package _global_")


@pytest.mark.parametrize("file", SWEEPS, ids=lambda file: file.stem)
def test_no_misspelt_key_passes_in_a_sweep_file(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy, count = tmp_path / "copy.yaml", 0
    known = {*TOP_LEVEL_KEYS, *schema_keys(), *config_groups()}
    for _, meant, wrong in misspelt(file, known):
        copy.write_text(wrong)
        said = refused(cli.main(["plan", str(copy), "--no-measure"]), capsys, meant)
        assert str(copy) in said
        count += 1
    text = file.read_text()
    for word in (
        "grid}" if "grid}" in text else "method: grid",
        "minimize",
        "eval/fractals",
        f"{{value: {file.stem}}}",
    ):
        meant = word.removeprefix("method: ").removeprefix("{value: ").removeprefix("eval/").removesuffix("}")
        for slip in mutants(meant, {meant}):
            assert word in text
            copy.write_text(text.replace(word, word.replace(meant, slip), 1))
            refused(cli.main(["plan", str(copy), "--no-measure"]), capsys, meant)
            count += 1
    print(f"{count} misspelt words refused in {file.name}")
    assert count >= 60


def test_real_processes_refuse_too(tmp_path: Path) -> None:
    commands = [
        ["-m", "sovit.train", "--cfg", "job", "optm.lr=1"],
        ["-m", "sovit.train", "--help", "++sed=1"],
        ["-m", "sovit.cli", "run", SMOKE, "trainer.max_step=3"],
    ]
    running = [
        subprocess.Popen([sys.executable, *command], cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
        for command in commands
    ]
    for process, meant in zip(running, ("optim.lr", "seed", "trainer.max_steps"), strict=True):
        out, err = process.communicate()
        assert process.returncode == 2 and out == b"" and err.count(b"\n") == 1, (out, err)
        assert f"did you mean '{meant}'?".encode() in err
    assert not list(tmp_path.iterdir())
