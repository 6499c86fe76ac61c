"""A run spread over processes is the run of one process: same losses, gradients, updates, resume points."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from rank_cells import run_ranks
from sovit import records
from sovit.lit import checkpoints, sharded

CELL = [
    *("shape=16x2x32", "name=t", "logger=none", "durations.first=null", "durations.last=null", "durations.num=null"),
    *("data.num_classes=8", "data.num_heldout=4", "eval.datasets=[fractals]", "eval.shots=[1]", "eval.num_draws=1"),
    *("trainer.global_batch_size=16", "trainer.log_every_n_steps=1", "trainer.keep_checkpoint=true"),
    *("trainer.precision=64-true", "optim.clip_norm=0.5", "schedule.warmup_steps=1"),
]
DURATIONS = "durations.values=[3 steps,6 steps]"
FSDP, DDP = ["parallel=fsdp"], ["parallel=ddp"]


class Cells:
    """Runs cells below a folder, each in a folder of its own."""

    def __init__(self, home: Path) -> None:
        self.home = home

    def run(self, name: str, *more: str, world: int = 1, **options: Any) -> list[int]:
        overrides = [*CELL, DURATIONS, f"runs_dir={self.home / name}", *more]
        return run_ranks(overrides, world, self.home / f"{name}.log", **options)

    def done(self, name: str, *more: str, world: int = 1) -> Path:
        """The directory of a cell that has been run to its end."""
        codes = self.run(name, *more, world=world)
        assert codes == [0] * world, self.log(name)
        return self.directory(name)

    def copied(self, name: str, of: str) -> Path:
        """The directory of a cell that stands where another one stands."""
        shutil.copytree(self.home / of, self.home / name)
        return self.directory(name)

    def directory(self, name: str) -> Path:
        [path] = (self.home / name / "t").glob("t-*")
        return path

    def log(self, name: str) -> str:
        return (self.home / f"{name}.log").read_text()


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Cells:
    return Cells(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def alone(cells: Cells) -> Path:
    """The run of one process that all others are held against."""
    return cells.done("alone")


def state(directory: Path) -> dict[str, torch.Tensor]:
    """Weights, averaged weights and the optimiser's moments at the last resume point, whole."""
    path = directory / checkpoints.resume_points(directory)[-1].name
    content = checkpoints.whole(path) if path.is_dir() else checkpoints.read(path)
    found = dict(content["state_dict"])
    found |= {f"average.{name}": tensor for name, tensor in content["callbacks"].get("Ema", {}).items()}
    for number, values in content["optimizer_states"][0]["state"].items():
        found |= {f"optimizer.{number}.{key}": v for key, v in values.items() if isinstance(v, torch.Tensor)}
    return found


def losses(directory: Path) -> dict[str, list[float]]:
    rows = records.read_lines(directory / records.METRICS)
    return {key: [row[key] for row in rows] for key in ("step", "train/loss", "train/grad_norm")}


def assert_same_run(found: Path, wanted: Path) -> None:
    for key, values in losses(wanted).items():
        assert losses(found)[key] == pytest.approx(values, rel=1e-12), key
    mine, theirs = state(found), state(wanted)
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert mine[name].shape == tensor.shape
        # A key's bias moves all logits of a softmax alike: its gradient is rounding, which AdamW divides by its 1e-8.
        keys = name.endswith("qkv.bias") and not name.startswith("optimizer")
        torch.testing.assert_close(mine[name], tensor, rtol=1e-12, atol=1e-10 if keys else 1e-12, msg=name)
    keys = ("step", "duration", "dataset", "shots", "draw", "error")
    rows = [[{key: row[key] for key in keys} for row in records.read_lines(d / records.EVALS)] for d in (found, wanted)]
    assert rows[0] == rows[1]


SPREADS = {
    "micro-batches": (1, ["parallel.micro_batch=4"]),
    "ddp of 2": (2, DDP),
    "ddp of 4 with micro-batches": (4, [*DDP, "parallel.micro_batch=2"]),
    "fsdp of 2": (2, FSDP),
    "fsdp of 4": (4, FSDP),
    "hybrid: 2 copies of 2 shards, micro-batches": (4, [*FSDP, "parallel.shard=2", "parallel.micro_batch=1"]),
    "fsdp of 2, blocks computed again": (2, [*FSDP, "parallel.checkpointing=full"]),
    "fsdp of 2, norms computed again": (2, [*FSDP, "parallel.checkpointing=selective"]),
}


@pytest.mark.parametrize("label", SPREADS)
def test_loss_gradient_norm_update_and_weights_are_those_of_one_process(label: str, cells: Cells, alone: Path) -> None:
    """In float64, to 1e-12. Clipping is active: a norm over one process's part would clip otherwise."""
    assert max(losses(alone)["train/grad_norm"]) > 0.5
    world, more = SPREADS[label]
    assert_same_run(cells.done(label.split(",")[0].replace(" ", "-").replace(":", ""), *more, world=world), alone)


COMPILED = ["parallel.compile=true", "trainer.precision=32-true"]  # torch cannot compile attention in float64 on a CPU


@pytest.mark.full
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.parametrize(
    ("world", "more"),
    [
        pytest.param(1, [], id="alone"),
        pytest.param(2, DDP, id="ddp"),
        pytest.param(2, FSDP, id="fsdp"),
        pytest.param(2, [*FSDP, "parallel.checkpointing=full"], id="fsdp, blocks computed again"),
    ],
)
def test_a_compiled_run_is_the_run_that_is_not(world: int, more: list[str], cells: Cells, request) -> None:
    """In float32, to 1e-4 after six steps; its weights are called the same, so that either goes on from the other."""
    plain = cells.done("float32", COMPILED[1])
    found = cells.done(request.node.callspec.id.replace(", ", "-").replace(" ", "-"), *COMPILED, *more, world=world)
    for key, values in losses(plain).items():
        assert losses(found)[key] == pytest.approx(values, rel=1e-4), key
    mine, theirs = state(found), state(plain)
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert mine[name].shape == tensor.shape
        if not name.endswith("qkv.bias") and not name.startswith("optimizer"):  # a key's bias: see above
            torch.testing.assert_close(mine[name], tensor, rtol=1e-4, atol=1e-4, msg=name)


def test_compiled_float64_on_a_cpu_is_refused_in_a_sentence(cells: Cells) -> None:
    assert cells.run("refused", "parallel.compile=true") != [0]
    [said] = [line for line in cells.log("refused").splitlines() if line.startswith("sovit.strict.ConfigError: ")]
    assert said.endswith("fails in torch's compiled attention on a CPU; write parallel.compile=false.")


def test_resume_points_of_a_sharded_run_hold_shards(cells: Cells, alone: Path) -> None:
    """Else one process would have to hold a model that is sharded because no process can."""
    directory = cells.done("sharded", *FSDP, world=2)
    point = directory / checkpoints.resume_points(directory)[-1].name
    sizes = [(point / f"rank{rank:05d}.safetensors").stat().st_size for rank in range(2)]
    assert min(sizes) > 0.4 * sum(sizes)
    modes = {path.stat().st_mode & 0o777 for path in point.iterdir()}
    assert modes == {(point / sharded.INDEX).stat().st_mode & 0o777}, "who may read one of its files may read them all"


LEGS = {  # where a run begins, and where it goes on
    "fsdp of 2, then alone": ((2, FSDP), (1, [])),
    "fsdp of 2, then fsdp of 4": ((2, FSDP), (4, FSDP)),
    "fsdp of 4 as hybrid, then ddp of 2": ((4, [*FSDP, "parallel.shard=2"]), (2, DDP)),
    "alone, then fsdp of 2": ((1, []), (2, FSDP)),
    "ddp of 2, then fsdp of 4 with micro-batches": ((2, DDP), (4, [*FSDP, "parallel.micro_batch=2"])),
}


@pytest.mark.parametrize("label", LEGS)
def test_a_run_goes_on_exactly_under_another_number_of_processes(label: str, cells: Cells, alone: Path) -> None:
    """Stopped in the middle, by a signal to one process only: all of them stop after the same step."""
    name = label.replace(" ", "-").replace(",", "")
    (before, first), (after, second) = LEGS[label]
    assert cells.run(name, *first, world=before, stop_after=4) == [75] * before, cells.log(name)
    [point] = [p for p in checkpoints.resume_points(cells.directory(name)) if p.step not in (3, 6)]
    assert point.step == (4 if before == 1 else 5)  # what another process wishes is known a step later
    assert (cells.directory(name) / point.name).is_dir() == (first[:1] == FSDP)
    assert_same_run(cells.done(name, *second, world=after), alone)
    assert f"Going on from step {point.step}" in cells.log(name)


def test_a_branch_leaves_the_trunk_that_shards_hold(cells: Cells) -> None:
    """Cooldown branches begin from the end of a trunk segment, not from the newest point."""
    cooled = ["eval.weights=cooled", "schedule.cooldown=0.5"]
    wanted = cells.done("cooled-alone", *cooled)
    assert_same_run(cells.done("cooled-sharded", *cooled, *FSDP, world=2), wanted)


def test_adafactor_of_shards_is_adafactor(cells: Cells) -> None:
    """Its factored moments are means over rows and columns of whole matrices. Biases of keys are left out: they have no
    gradient but rounding, which Adafactor makes full steps of."""
    adafactor = ["optim=adafactor"]
    wide = ["model.num_heads=4", "shape=32x1x64"]  # matrices large enough to be factored
    wanted = cells.done("adafactor-alone", *adafactor, *wide)
    found = cells.done("adafactor-sharded", *adafactor, *wide, *FSDP, world=2)
    for key, values in losses(wanted).items():
        assert losses(found)[key] == pytest.approx(values, rel=1e-11), key
    mine, theirs = state(found), state(wanted)
    for name, tensor in theirs.items():
        if name.startswith("model.") and not name.endswith("qkv.bias"):
            torch.testing.assert_close(mine[name], tensor, rtol=1e-10, atol=1e-10, msg=name)


def test_shards_in_bfloat16_keep_float32_masters_and_stay_close(cells: Cells) -> None:
    """Weights are gathered in bfloat16 and gradients summed in float32; what is kept and updated is float32."""
    mixed = ["trainer.precision=bf16-mixed"]
    wanted = cells.done("mixed-alone", *mixed)
    found = cells.done("mixed-sharded", *mixed, *FSDP, world=2)
    mine, theirs = state(found), state(wanted)
    assert {tensor.dtype for tensor in mine.values()} == {torch.float32}
    assert losses(found)["train/loss"] == pytest.approx(losses(wanted)["train/loss"], rel=5e-3)
    far = max(float((mine[n] - t).abs().max()) for n, t in theirs.items() if n.startswith("model."))
    assert 0 < far < 0.06  # six updates of at most 0.01 each in either direction are the most there could be


def test_too_little_memory_halves_the_micro_batch_and_the_run_is_the_same(cells: Cells, alone: Path) -> None:
    codes = cells.run("memory", fail={"above": 3})
    assert codes == [0]
    assert_same_run(cells.directory("memory"), alone)
    record = records.read_run(cells.directory("memory"))
    assert record is not None and record["layout"]["micro_batch"] == 2 and record["layout"]["accumulation"] == 8
    log = cells.log("memory")
    for line in ("of 16; going on with 8", "of 8; going on with 4", "of 4; going on with 2"):
        assert f"out of device memory with a micro-batch {line}" in log


def test_processes_that_run_out_of_memory_are_to_be_started_again(cells: Cells, alone: Path) -> None:
    codes = cells.run("memory2", *FSDP, world=2, fail={"above": 4})
    assert 77 in codes and not {0, 75} & set(codes)  # the other process may find the connection closed
    assert cells.run("memory2", *FSDP, world=2, fail={"above": 4}) == [0, 0]
    assert_same_run(cells.directory("memory2"), alone)


def test_one_image_that_does_not_fit_is_a_failure_with_a_way_out(cells: Cells) -> None:
    assert cells.run("nothing", "parallel.micro_batch=1", fail={"above": 0}) == [1]
    record = records.read_run(cells.directory("nothing"))
    assert record is not None and record["status"] == "failed"
    assert "one image at a time" in record["reason"] and "parallel=fsdp" in record["reason"]


@pytest.fixture(scope="module")
def stopped(cells: Cells) -> str:
    """The name of a sharded cell that was stopped amid a segment, with an older resume point."""
    assert cells.run("stopped", *FSDP, world=2, stop_after=4) == [75, 75]
    return "stopped"


DAMAGE = {
    "a flipped bit": lambda point: _flip(point / "rank00001.safetensors"),
    "a missing shard": lambda point: (point / "rank00001.safetensors").unlink(),
    "a cut shard": lambda point: _cut(point / "rank00000.safetensors"),
    "no index": lambda point: (point / sharded.INDEX).unlink(),
    "a broken index": lambda point: _cut(point / sharded.INDEX),
    "a schema that is none": lambda point: _edit(point, lambda index: index.update(schema="one")),
    "a file outside": lambda point: _edit(
        point, lambda index: index["files"].update({"../../x": {"bytes": 0, "crc32": 0}})
    ),
}


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def _edit(point: Path, change: Any) -> None:
    index = json.loads((point / sharded.INDEX).read_text())
    change(index)
    (point / sharded.INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize("label", DAMAGE)
def test_a_damaged_folder_is_named_and_the_run_goes_back_to_the_one_before(
    label: str, cells: Cells, stopped: str, alone: Path
) -> None:
    name = label.replace(" ", "-")
    directory = cells.copied(name, stopped)
    older, newest = checkpoints.resume_points(directory)
    DAMAGE[label](directory / newest.name)
    (directory / f".{newest.name}.tmp").mkdir()  # of a process killed while it wrote
    assert_same_run(cells.done(name, *FSDP, world=2), alone)
    assert f"{newest.name} is unusable" in cells.log(name) and f"Going back to {older.name}" in cells.log(name)
    assert not list(directory.glob(".*.tmp"))


def test_a_resume_point_of_a_later_version_is_refused_and_nothing_is_removed(cells: Cells, stopped: str) -> None:
    directory = cells.copied("later", stopped)
    for point in checkpoints.resume_points(directory):
        _edit(directory / point.name, lambda index: index.update(schema=99))
    before = {path: path.read_bytes() for path in directory.rglob("[!.]*") if path.is_file()}
    assert 0 not in cells.run("later", *FSDP, world=2)
    assert "has schema 99, and this version reads schema 1; use the version that wrote it" in cells.log("later")
    assert before.items() <= {path: path.read_bytes() for path in directory.rglob("[!.]*") if path.is_file()}.items()


def test_a_pickle_in_a_folder_is_not_run(cells: Cells, stopped: str, tmp_path: Path) -> None:
    """A resume point from a stranger: its rest.pt may hold plain values only."""
    import os
    import pickle
    import zipfile

    directory = cells.copied("pickle", stopped)
    newest = directory / checkpoints.resume_points(directory)[-1].name

    class Bomb:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "exploded"),)

    with zipfile.ZipFile(newest / sharded.REST, "w") as archive:
        archive.writestr("rest/data.pkl", pickle.dumps(Bomb(), protocol=2))
        archive.writestr("rest/version", "3\n")
    _edit(newest, lambda index: index["files"].update({sharded.REST: sharded._sum(newest / sharded.REST)}))
    assert cells.run("pickle", *FSDP, world=2) == [0, 0]
    assert f"rest.pt {sharded.NOT_PLAIN}" in cells.log("pickle") and not (tmp_path / "exploded").exists()
    assert "weights_only" not in cells.log("pickle"), "torch's own words advise to read it all the same"


@pytest.mark.parametrize("kind", ["sharded", "alone"])
def test_an_export_is_what_one_process_would_have_written(kind: str, cells: Cells, alone: Path, tmp_path: Path) -> None:
    """Of shards and of one file, the same weights, which a fresh model takes without a word."""
    from safetensors import safe_open
    from safetensors.torch import load_file

    from sovit.config import compose
    from sovit.lit.fit import build_model
    from sovit.ship.export import export

    source = alone if kind == "alone" else cells.done("sharded", *FSDP, world=2)
    wanted = state(alone)
    for weights, prefix in ((True, "average."), (False, "model.")):
        export(source, tmp_path / f"{weights}.safetensors", average=weights)
        found = load_file(tmp_path / f"{weights}.safetensors")
        model = build_model(compose(["shape=16x2x32", "data.num_classes=8"])).double()
        assert not any(model.load_state_dict(found))
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, wanted[f"{prefix}{name}"], rtol=1e-12, atol=1e-12)
    with safe_open(tmp_path / "True.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["step"] == "6" and json.loads(metadata["shape"])["mlp_dim"] == 32
    export(source, tmp_path / "one.ckpt")
    content = torch.load(tmp_path / "one.ckpt", weights_only=True)
    assert content["global_step"] == 6 and {"state_dict", "optimizer_states", "loops"} <= content.keys()


def test_a_run_goes_on_from_an_exported_checkpoint(cells: Cells, alone: Path) -> None:
    from sovit.ship.export import export

    assert cells.run("exported", *FSDP, world=2, stop_after=4) == [75, 75]
    directory = cells.directory("exported")
    newest = directory / checkpoints.resume_points(directory)[-1].name
    export(newest, directory / "one.ckpt")
    for point in checkpoints.resume_points(directory):
        checkpoints.remove(directory / point.name)
    (directory / "one.ckpt").rename(newest)
    assert_same_run(cells.done("exported"), alone)
    assert "Going on from step 5" in cells.log("exported")


@pytest.mark.parametrize(
    ("source", "out", "words"),
    [
        ("RUN", "x.pt", "ends neither in .safetensors nor in .ckpt"),
        ("RUN", "no/x.ckpt", "is no folder"),
        ("none", "x.ckpt", "is not there"),
        ("EMPTY", "x.ckpt", "keep_checkpoint=true"),
        ("TEXT", "x.ckpt", "cannot be read"),
        ("RUN", "there.ckpt", "--overwrite"),
    ],
)
def test_what_cannot_be_exported_is_said_in_one_sentence(
    source: str, out: str, words: str, alone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from sovit.cli import main

    (tmp_path / "empty").mkdir()
    (tmp_path / "text.ckpt").write_text("no archive")
    (tmp_path / "there.ckpt").write_text("mine")
    path = {"RUN": alone, "EMPTY": tmp_path / "empty", "TEXT": tmp_path / "text.ckpt"}.get(source, tmp_path / source)
    assert main(["export", str(path), str(tmp_path / out)]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1
    assert (tmp_path / "there.ckpt").read_text() == "mine"
