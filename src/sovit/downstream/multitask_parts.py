"""What `task=multitask` trains and tests on: the embedded scenes or the user's files, and their texts as token ids."""

from __future__ import annotations

from dataclasses import asdict
from functools import lru_cache

from sovit.config import ConfigError
from sovit.downstream.multitask_config import Config
from sovit.language import vocabulary as vocabularies
from sovit.language.examples import TASKS, TextImages
from sovit.language.files import open_texts
from sovit.language.mixture import Examples, examples_of, in_common
from sovit.language.scenes import scenes
from sovit.language.vocabulary import Vocabulary
from sovit.launch.devices import cores
from sovit.lit.trained import Trained


def examples_in(cfg: Config, train: TextImages, test: TextImages, length: int) -> list[Examples]:
    """Of both parts, for a decoder that reads ``length`` tokens. Raises ConfigError."""
    vocabulary = vocabulary_of(cfg.vocabulary)
    tasks = [task for task in TASKS if getattr(cfg, task) > 0]
    try:
        return in_common(*(examples_of(source, vocabulary, length, tasks) for source in (train, test)))
    except ValueError as error:
        raise ConfigError(str(error)) from None


def sources(cfg: Config, trained: Trained) -> tuple[TextImages, TextImages]:
    """The train and the test part. Raises ConfigError."""
    size, channels = size_of(cfg, trained), trained.cfg.model.channels
    found: list[TextImages] = []
    for part in ("train", "test"):
        given = asdict(getattr(cfg, part))
        try:
            if cfg.data == "scenes":
                odd = next((key for key, value in given.items() if value is not None), None)
                if odd is not None:
                    raise ConfigError(f"task.{part}.{odd} goes with task.data=files; give that too, or leave it out.")
                num = cfg.num_train if part == "train" else cfg.num_test
                found.append(_scenes(part, num, size, channels, cfg.seed))
            elif given["images"] is None:
                raise ConfigError(f"task.{part}.images has no value; give the folder of the {part} part's images.")
            else:
                found.append(_files(size, channels, tuple(given.items())))
        except ConfigError:
            raise
        except ValueError as error:
            raise ConfigError(f"task.{part}: {error}") from None
    return found[0], found[1]


@lru_cache(maxsize=2)
def _scenes(part: str, num: int, size: int, channels: int, seed: int) -> TextImages:
    return scenes(part, num=num, size=size, channels=channels, seed=seed)


@lru_cache(maxsize=2)
def _files(size: int, channels: int, given: tuple[tuple[str, str], ...]) -> TextImages:
    return open_texts(**dict(given), size=size, channels=channels, threads=len(cores()))


@lru_cache(maxsize=1)
def vocabulary_of(path: str | None) -> Vocabulary:
    try:
        return vocabularies.load(path)
    except ValueError as error:
        raise ConfigError(f"task.vocabulary: {error}") from None


def size_of(cfg: Config, trained: Trained) -> int:
    return trained.cfg.model.image_size if cfg.image_size is None else cfg.image_size
