"""The stream of images with captions is a function of the position, whoever reads it and whatever cannot be read."""

import pickle
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from sovit.data.images import Unreadable
from sovit.data.order import mix
from sovit.data.stream import StepSampler, make_loader
from sovit.data.views import TestView
from sovit.language import vocabulary
from sovit.language.files import FileTexts, open_pairs, open_texts
from sovit.language.generate_files import generate
from sovit.language.pairs import Pairs, PairStream, finish_pairs
from sovit.language.scenes import scenes
from sovit.language.texts import Questions, TextLists

SIZE, NUM, LENGTH = 16, 12, 24
WORDS = vocabulary.load()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pairs each, in a folder and in three shards; the shards have two broken images and six odd texts more."""
    out = tmp_path_factory.mktemp("pairs")
    generate(out / "json", "json", num=NUM, test_num=1, size=SIZE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sovit.data.generate.PER_SHARD", 9)
        generate(out / "pairs", "pairs", num=NUM, test_num=1, size=SIZE, damage=True)
    return out


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    open_pairs.cache_clear()
    yield


def folder(made: Path) -> FileTexts:
    part = made / "json" / "train"
    return open_pairs("coco", str(part / "images"), captions=str(part / "captions.json"), size=SIZE)


def shards(made: Path) -> FileTexts:
    return open_pairs("pairs", str(made / "pairs"), split="train", text_key="json.caption", size=SIZE)


def stream_of(kind: str, made: Path, seed: int = 3) -> PairStream:
    source = (
        {"folder": folder, "shards": shards}[kind](made) if kind != "scenes" else scenes("train", num=NUM, channels=3)
    )
    return PairStream(source, WORDS, LENGTH, seed, group=2 if kind == "shards" else 1)


def loaded(stream: PairStream, batch: int, start: int, stop: int, workers: int = 0, **share: int) -> list[Pairs]:
    return list(make_loader(stream, StepSampler(batch, start, stop, **share), workers))


def assert_same(found: Pairs, expected: Pairs) -> None:
    for a, b in zip(found[:4], expected[:4], strict=True):
        assert torch.equal(a, b)
    assert found[4:] == expected[4:]


def joined(parts: list[Pairs]) -> Pairs:
    tensors = [torch.cat([part[k] for part in parts]) for k in range(4)]
    return Pairs(*tensors, sum(part.cut for part in parts), [bad for part in parts for bad in part.bad])


@pytest.mark.parametrize("kind", ["folder", "shards", "scenes"])
def test_a_batch_does_not_depend_on_workers_processes_or_where_a_run_resumed(kind: str, made: Path) -> None:
    stream = stream_of(kind, made)
    whole = loaded(stream, 8, 0, 6)
    for one, other in zip(loaded(stream, 8, 3, 6, workers=2), whole[3:], strict=True):
        assert_same(one, other)
    shares = [loaded(stream, 8, 0, 6, rank=rank, world=4) for rank in range(4)]
    for step, batch in enumerate(whole):
        assert_same(joined([share[step] for share in shares]), batch)
    copied = pickle.loads(pickle.dumps(stream))  # what a spawned worker gets
    assert_same(copied.__getitems__(range(8, 16)), whole[1])
    other = stream_of(kind, made, seed=4).__getitems__(range(8))
    assert not torch.equal(other.rows, whole[0].rows)


@pytest.mark.parametrize("kind", ["folder", "shards", "scenes"])
def test_a_pair_is_an_image_with_one_of_its_own_captions(kind: str, made: Path) -> None:
    """Oracle: the source, asked row by row. Tokens back to text are that caption; pixels are the evaluation's view."""
    stream = stream_of(kind, made)
    batch = stream.__getitems__(range(5 * NUM))
    images, tokens = finish_pairs(batch)
    assert images.dtype == torch.float32 and tokens.shape == (5 * NUM, LENGTH)
    assert torch.equal(images, stream.source.images(batch.rows.tolist()))
    for row, choice, ids in zip(batch.rows.tolist(), batch.choices.tolist(), tokens, strict=True):
        expected = stream.source.captions(row)[choice]
        assert torch.equal(ids[None], WORDS.batch([expected], LENGTH)[0])
    drawn = mix(3, 3, np.arange(5 * NUM)).tolist()
    counts = [len(stream.source.captions(row)) for row in batch.rows.tolist()]
    assert batch.choices.tolist() == [number % count for number, count in zip(drawn, counts, strict=True)]
    assert batch.cut == sum(
        len(WORDS.ids(stream.source.captions(row)[choice])) >= LENGTH
        for row, choice in zip(batch.rows.tolist(), batch.choices.tolist(), strict=True)
    )


def test_an_epoch_shows_every_image_once_and_in_time_every_caption(made: Path) -> None:
    stream = stream_of("folder", made)
    batch = stream.__getitems__(range(60 * NUM))
    for epoch in batch.rows.view(60, NUM):
        assert sorted(epoch.tolist()) == list(range(NUM))
    assert len({tuple(epoch.tolist()) for epoch in batch.rows.view(60, NUM)}) > 50
    seen = Counter(zip(batch.rows.tolist(), batch.choices.tolist(), strict=True))
    assert set(seen) == {(row, k) for row in range(NUM) for k in range(5)} and max(seen.values()) < 30


def test_there_is_no_augmentation(made: Path) -> None:
    stream = stream_of("folder", made)
    batch = stream.__getitems__(range(3 * NUM))
    view = TestView(SIZE, 3)
    for image, row in zip(batch.images, batch.rows.tolist(), strict=True):
        assert torch.equal(image, view(stream.source.pictures.read(row)))  # type: ignore[attr-defined]


def test_a_pair_that_cannot_be_read_is_replaced_by_the_next_with_its_own_caption(made: Path) -> None:
    stream = stream_of("shards", made)
    source = stream.source
    assert isinstance(source, FileTexts)
    names = [source.pictures.name(row) for row in range(len(source))]
    broken = {row for row, name in enumerate(names) if "broken" in name}
    batch = stream.__getitems__(range(len(source)))
    planned = stream.stream.order(np.arange(len(source)))
    assert sorted(planned.tolist()) == list(range(len(source))) and len(broken) == 2
    expected = []
    for row in planned.tolist():
        while row in broken:
            row = (row + 1) % len(source)
        expected.append(row)
    assert batch.rows.tolist() == expected
    assert {name for name, _ in batch.bad} == {f"{source.where}/{names[row]}" for row in broken}
    for row, choice, ids in zip(batch.rows.tolist(), batch.choices.tolist(), batch.tokens, strict=True):
        assert torch.equal(ids[None], WORDS.batch([source.captions(row)[choice]], LENGTH)[0])


def test_images_with_questions_only_are_not_trained_on(made: Path, tmp_path: Path) -> None:
    part = tmp_path / "part"
    shutil.copytree(made / "json" / "train", part)
    text = (part / "captions.json").read_text().replace('"image_id": 3,', '"image_id": 99,')
    (part / "captions.json").write_text(text)
    files = {name: str(part / f"{name}.json") for name in ("captions", "questions", "annotations")}
    found = open_texts(str(part / "images"), **files, size=SIZE)
    assert len(found) == NUM and len(found.captioned()) == NUM - 1
    stream = PairStream(found, WORDS, LENGTH, 0)
    (lacking,) = set(range(NUM)) - set(found.captioned().tolist())
    rows = stream.__getitems__(range(NUM - 1)).rows.tolist()
    assert sorted(rows) == sorted(set(range(NUM)) - {lacking})
    assert found.pictures.name(lacking) == "COCO_train_000000000003.jpg"
    said = TextLists([[], ["one"], [], *[[str(k)] for k in range(3, NUM)]])  # gaps before and between the others
    nothing = Questions((), (), (), (), ())
    gaps = FileTexts("gaps", found.pictures, said, nothing, TestView(SIZE, 3), "gaps")
    batch = PairStream(gaps, WORDS, LENGTH, 0).__getitems__(range(NUM - 2))
    assert sorted(batch.rows.tolist()) == [1, *range(3, NUM)] and torch.equal(
        finish_pairs(batch)[0], gaps.images(batch.rows.tolist())
    )
    del files["captions"]
    with pytest.raises(ValueError, match="has questions but no captions"):
        PairStream(open_texts(str(part / "images"), **files, size=SIZE), WORDS, LENGTH, 0)


def test_shards_stay_together_as_their_group_says(made: Path) -> None:
    source = shards(made)
    sizes = source.pictures.blocks
    shard_of = np.repeat(np.arange(len(sizes)), sizes)
    alone = PairStream(source, WORDS, LENGTH, 1).stream.order(np.arange(len(source)))
    assert len(sizes) == 4 and (np.diff(shard_of[alone]) != 0).sum() == 3  # shard after shard
    mixed = PairStream(source, WORDS, LENGTH, 1, group=4).stream.order(np.arange(len(source)))
    assert (np.diff(shard_of[mixed]) != 0).sum() > 6


def test_odd_texts_are_cut_to_length_and_counted(made: Path) -> None:
    stream = stream_of("shards", made)
    batch = stream.__getitems__(range(len(stream.source)))
    longest = max(range(len(batch.rows)), key=lambda k: len(stream.source.captions(int(batch.rows[k]))[0]))
    assert batch.tokens[longest, -1] == WORDS.eos and batch.cut >= 1
    assert batch.tokens.max() < WORDS.size


@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_a_source_that_goes_away_ends_in_a_sentence(kind: str, made: Path, tmp_path: Path) -> None:
    from sovit.data import shards as tars

    place = tmp_path / "moved"
    shutil.copytree(made, place)
    stream = stream_of(kind, place)
    assert not stream.__getitems__(range(4)).failure
    tars._opened.cache_clear()
    shutil.rmtree(place)
    batch = loaded(stream, 4, 0, 1)[0]
    with pytest.raises(Unreadable, match=r"None of \d+ images in a row"):
        finish_pairs(batch)
    tars._opened.cache_clear()


def test_a_caption_that_can_no_longer_be_read_ends_in_a_sentence(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_: object) -> bytes:
        raise OSError("gone")

    stream = stream_of("shards", made)
    monkeypatch.setattr(stream.source._captions._texts, "read", gone)  # type: ignore[attr-defined]
    with pytest.raises(Unreadable, match=r"A caption cannot be read \(gone\)"):
        finish_pairs(stream.__getitems__(range(2)))
