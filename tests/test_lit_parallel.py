"""A text tower's run spread over processes is that of one: the loss sees the whole batch wherever its rows lie."""

from pathlib import Path

import pytest

from rank_cells import run_ranks
from test_parallel import assert_same_run, losses
from text_cells import image_tower, text_overrides

EXACT = (
    *(
        "trainer.precision=64-true",
        "trainer.keep_checkpoint=true",
        "trainer.log_every_n_steps=1",
        "optim.clip_norm=0.5",
    ),
    "durations.values=[2 steps,4 steps]",
)
SPREADS = {
    "ddp of 2 with micro-batches": (2, ["parallel=ddp", "parallel.micro_batch=2"]),
    "fsdp of 2": (2, ["parallel=fsdp"]),
}
MORE = {
    "ddp of 4": (4, ["parallel=ddp"]),
    "fsdp of 4": (4, ["parallel=fsdp"]),
    "fsdp of 2 with micro-batches, computed again": (
        2,
        ["parallel=fsdp", "parallel.micro_batch=2", "parallel.checkpointing=full"],
    ),
    "softmax, ddp of 2 with micro-batches": (2, ["optim.loss=softmax", "parallel=ddp", "parallel.micro_batch=4"]),
    "avg, fsdp of 2": (2, ["text.pool=avg", "parallel=fsdp"]),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("towers")


@pytest.fixture(scope="module")
def encoder(home: Path) -> Path:
    return image_tower(home)


def done(home: Path, encoder: Path, name: str, *more: str, world: int = 1) -> Path:
    name = name.replace(" ", "-").replace(",", "")
    codes = run_ranks(text_overrides(home / name, encoder, *EXACT, *more), world, home / f"{name}.log")
    assert codes == [0] * world, (home / f"{name}.log").read_text()
    [path] = (home / name / "run").glob("run-*")
    return path


@pytest.fixture(scope="module")
def alone(home: Path, encoder: Path) -> Path:
    return done(home, encoder, "alone")


@pytest.mark.parametrize("label", [*SPREADS, *(pytest.param(label, marks=pytest.mark.full) for label in MORE)])
def test_a_tower_trained_by_several_processes_is_that_of_one(
    label: str, home: Path, encoder: Path, alone: Path
) -> None:
    """In float64, to 1e-12. A loss that took each process's, or each micro-batch's, pairs by themselves would have fewer
    negatives; clipping is active, so a norm of parts would show too."""
    assert max(losses(alone)["train/grad_norm"]) > 0.5
    world, more = (SPREADS | MORE)[label]
    other = [text for text in more if not text.startswith("parallel")]
    wanted = done(home, encoder, f"alone {' '.join(other)}".replace("=", "-"), *other) if other else alone
    assert_same_run(done(home, encoder, label, *more, world=world), wanted)
