"""The LightningDataModule of a run's training stream, and the few-shot targets a configuration names."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import lightning.pytorch as pl
from torch import Tensor
from torch.utils.data import DataLoader

from sovit import records
from sovit.config import ConfigError, RunConfig
from sovit.data.bad_files import BadFiles
from sovit.data.fractals import FractalWorld, fingerprint
from sovit.data.images import Batch, ImageStream, check_fewshot, fewshot_set, finish
from sovit.data.order import mix
from sovit.data.shards import shard_paths
from sovit.data.sources import SPLITS, Images, kind_of, open_images
from sovit.data.stream import FewShotSet, FractalDataset, StepSampler, digits_fewshot, fractal_fewshot, make_loader
from sovit.data.views import TestView, TrainView
from sovit.derived import fewshot_name
from sovit.families import TEXT
from sovit.lit.layout import on_gpu
from sovit.schema import EVAL_DATASETS

T = TypeVar("T")


def world_of(cfg: RunConfig) -> FractalWorld:
    return FractalWorld(
        seed=cfg.data.seed,
        num_classes=cfg.data.num_classes,
        num_heldout=cfg.data.num_heldout,
        size=cfg.model.image_size,
        rotation=cfg.data.rotation,
    )


class TrainData(pl.LightningDataModule):
    """Batch k of the run's own stream, from the trainer's current step to ``total_steps``.

    Process ``rank`` of ``world`` gets the rows rank * B / world .. (rank + 1) * B / world - 1 of each global batch. Images
    in files come from the loader as bytes, and become floats (and mixtures) on the device, after the transfer.
    Raises ConfigError for an uneven share, or one that tears the pairs of mixup apart.
    """

    def __init__(self, cfg: RunConfig, total_steps: int, *, rank: int = 0, world: int = 1) -> None:
        super().__init__()
        self.cfg, self.total_steps, self.rank, self.world = cfg, total_steps, rank, world
        batch = cfg.trainer.global_batch_size
        if batch % world or (cfg.data.mixup and batch // world % 2):
            share = "an even number of images, for mixup" if cfg.data.mixup else "equal shares"
            raise ConfigError(f"trainer.global_batch_size={batch} does not give {world} processes {share}.")

    def train_dataloader(self) -> DataLoader[Any]:
        assert self.trainer is not None
        cfg = self.cfg
        sampler = StepSampler(
            cfg.trainer.global_batch_size,
            self.trainer.global_step,
            self.total_steps,
            rank=self.rank,
            world=self.world,
        )
        return make_loader(self.stream(), sampler, cfg.data.num_workers, pin_memory=on_gpu(cfg))

    def stream(self) -> Any:
        """The data set: what it makes of the positions of a batch."""
        return train_stream(self.cfg)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> tuple[Tensor, Tensor]:
        """(images, labels) of a batch that has arrived on its device."""
        if not isinstance(batch, Batch):
            return batch
        for name, reason in batch.bad:
            bad_files(self.cfg, self.rank).note(name, reason)
        return finish(batch, self.cfg.data.num_classes)

    def setup(self, stage: str) -> None:
        """Says what earlier processes, or the listing of the files, found unusable."""
        self._say_unusable()

    def teardown(self, stage: str) -> None:
        """Says what could not be used, if a segment has added to it."""
        self._say_unusable()

    def _say_unusable(self) -> None:
        text, known = unusable(self.cfg, self.rank), bad_files(self.cfg, self.rank)
        if text and text != known.told and self.rank == 0:
            print(text, flush=True)
            known.told = text


def train_stream(cfg: RunConfig) -> FractalDataset | ImageStream:
    """Image i of the run's training stream, for every i."""
    data = cfg.data
    if data.name == "fractals":
        return FractalDataset(world_of(cfg), stream=cfg.seed, channels=cfg.model.channels)
    view = TrainView(
        cfg.model.image_size,
        cfg.model.channels,
        data.min_area,
        data.flip,
        data.randaugment_ops,
        data.randaugment_magnitude,
    )
    seed = int(mix(data.seed, cfg.seed))
    return ImageStream(train_images(cfg), view, seed, group=data.shuffle_shards, mixup=data.mixup)


def train_images(cfg: RunConfig) -> Images:
    """The files to train on. Raises ConfigError if they cannot be, or hold another number of classes."""
    data = cfg.data
    images = _listed(data.name, data.root or "", data.split, data.class_list, data.image_key, data.label_key)
    found = len(images.classes)
    if found != data.num_classes:
        what = f"{data.class_list} lists" if data.class_list else f"{images.where} holds"
        raise ConfigError(
            f"data.num_classes={data.num_classes}, but {what} {found} classes; write data.num_classes={found}."
        )
    return images


def data_fingerprint(cfg: RunConfig) -> str:
    """A short name that changes when the training data do: of files, with their names and sizes, and the classes.

    Lists all files that the configuration names, those of the few-shot sets too, so that what is wrong with them shows
    before anything is trained. Raises ConfigError.
    """
    sources = _sources(cfg)
    if cfg.model.family == TEXT:
        from sovit.lit.pairs import pairs_of  # which builds on this module

        return pairs_of(cfg).fingerprint
    for dataset in cfg.eval.datasets:
        if dataset not in EVAL_DATASETS:
            checked(check_fewshot, *fewshot_images(dataset), cfg.eval.shots)
    return fingerprint(world_of(cfg)) if cfg.data.name == "fractals" else sources[0].fingerprint


def fewshot_sets(cfg: RunConfig, rank: int = 0) -> list[FewShotSet]:
    """The targets of ``eval.datasets``, at the model's image size and number of channels. Raises ConfigError.

    ``rank``: the process that notes what it cannot read.
    """
    size, channels = cfg.model.image_size, cfg.model.channels
    threads = max(1, min(cfg.data.num_workers, os.cpu_count() or 1))

    def build(dataset: str) -> FewShotSet:
        if dataset == "fractals":
            return fractal_fewshot(world_of(cfg), channels)
        if dataset == "digits":
            return digits_fewshot(size, channels)
        bad = bad_files(cfg, rank)
        train, test = fewshot_images(dataset)
        view, name = TestView(size, channels), fewshot_name(dataset)
        return checked(fewshot_set, name, train, test, view, shots=cfg.eval.shots, threads=threads, note=bad.note)

    return [build(dataset) for dataset in cfg.eval.datasets]


def fewshot_images(dataset: str) -> tuple[Images, Images]:
    """What to draw support from and what to test on: the parts train, and test or val, of a folder. Raises ConfigError."""
    kind = checked(kind_of, dataset)
    parts = [name for name in SPLITS if has_part(kind, dataset, name)]
    support = next((name for name in parts if name.startswith("train")), None)
    tested = next((name for name in parts if not name.startswith("train")), None)
    if support is None or tested is None:
        found = f"only {', '.join(parts)}" if parts else "neither"
        raise ConfigError(
            f"eval.datasets: {dataset} needs a part called train and one called test or val; it has {found}."
        )
    return _listed(kind, dataset, support), _listed(kind, dataset, tested)


def has_part(kind: str, root: str, part: str) -> bool:
    folder = Path(root).expanduser()
    if kind == "webdataset":
        try:
            return bool(shard_paths(str(folder), part))
        except ValueError:
            return False
    if kind == "hf" and not (folder / "dataset_dict.json").exists():
        return any(folder.rglob(f"{part}-*.parquet")) or (folder / f"{part}.parquet").exists()
    return (folder / part).is_dir()


def unusable(cfg: RunConfig, rank: int = 0) -> str | None:
    """One sentence on the files of a run that could not be used so far, or None if there were none."""
    return bad_files(cfg, rank).summary(sum(len(images) + images.left_out.count for images in _sources(cfg)))


def bad_files(cfg: RunConfig, rank: int = 0) -> BadFiles:
    """The record of unusable files that this process keeps for a run; written where the run's own directory is."""
    directory = records.run_dir(cfg)
    known = _bad_files(directory, directory.is_dir(), rank)
    for images in _sources(cfg):
        known.note_left_out(images)
    return known


def _sources(cfg: RunConfig) -> list[Images]:
    """Every list of files that the configuration names."""
    if cfg.model.family == TEXT:
        from sovit.lit.pairs import sources_of  # which builds on this module

        return sources_of(cfg)
    sources = [] if cfg.data.name == "fractals" else [train_images(cfg)]
    for dataset in cfg.eval.datasets:
        sources += () if dataset in EVAL_DATASETS else fewshot_images(dataset)
    return list({id(images): images for images in sources}.values())


@functools.lru_cache(maxsize=8)
def _bad_files(directory: Path, there: bool, rank: int) -> BadFiles:
    return BadFiles(directory if there else None, rank)


def _listed(kind: str, root: str, *rest: str | None) -> Images:
    rest = (*rest, None, None, None, None)[:4]  # a listing is kept under all of its arguments
    return checked(open_images, kind, os.path.normpath(Path(root).expanduser()), *rest)


def checked(function: Callable[..., T], *arguments: Any, **options: Any) -> T:
    """What the function returns, its ValueError as one the user can mend."""
    try:
        return function(*arguments, **options)
    except ValueError as error:
        raise ConfigError(str(error)) from None
