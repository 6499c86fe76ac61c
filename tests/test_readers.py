"""Folders, shards and saved data sets are listed as their own libraries list them, and what is wrong with them is said."""

import gzip
import io
import json
import os
import shutil
import tarfile
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch

from sovit import records
from sovit.config import compose
from sovit.data import shards
from sovit.data.bad_files import FILE, BadFiles
from sovit.data.generate import BROKEN, NO_SUCH_CLASS, ODD, class_name, generate, main
from sovit.data.sources import Images, LeftOut, Names, kind_of, open_images
from sovit.lit.data import TrainData, data_fingerprint, fewshot_images, fewshot_sets, train_images, unusable
from sovit.strict import ConfigError

KINDS = ("imagefolder", "webdataset", "hf")
CLASSES, IMAGES, TEST_IMAGES = 3, 8, 5


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One damaged data set of each kind."""
    folder = tmp_path_factory.mktemp("made")
    for kind in KINDS:
        generate(folder / kind, kind, classes=CLASSES, images=IMAGES, test_images=TEST_IMAGES, size=24, damage=True)
    return {kind: folder / kind for kind in KINDS}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    open_images.cache_clear()


def listed(images: Images) -> list[tuple[bytes, int]]:
    return [(images.read(k), int(label)) for k, label in enumerate(images.labels)]


def write(path: Path, content: bytes = b"x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def configured(kind: str, root: Path, *overrides: str) -> list[str]:
    own = [
        f"data={kind}",
        f"data.root={root}",
        "model.channels=3",
        "trainer.global_batch_size=8",
        "eval.datasets=[digits]",
    ]
    return [*own, f"data.num_classes={CLASSES}", *([] if kind == "hf" else ["data.split=train"]), *overrides]


# ----------------------------------------------------------------------------------------------------------- listing


def test_a_folder_is_listed_as_timm_lists_it(tmp_path: Path) -> None:
    """Classes in natural order, also for numbers; capitals; folders within folders."""
    from timm.data.readers import create_reader

    names = ["9/a.jpg", "10/b.PNG", "10/c.jpeg", "deep/2/d.jpg", "9/e with space.jpg"]
    for k, name in enumerate(names):
        write(tmp_path / name, bytes([k]))
    images, reader = open_images("imagefolder", str(tmp_path)), create_reader("", root=str(tmp_path))
    expected = []
    for k in range(len(reader)):
        file, label = reader[k]
        with file:
            expected.append((file.read(), label))
    assert listed(images) == expected and len(images) == len(names)
    assert list(images.classes) == [name for name, _ in sorted(reader.class_to_idx.items(), key=lambda item: item[1])]
    assert images.classes == ("2", "9", "10")
    assert [images.name(k) for k in range(len(images))] == reader.filenames()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset leaves its shards open
def test_shards_are_listed_as_webdataset_reads_them(made: dict[str, Path]) -> None:
    import webdataset

    images = open_images("webdataset", str(made["webdataset"]), "train")
    paths = shards.shard_paths(str(made["webdataset"]), "train")
    stream = webdataset.WebDataset(paths, shardshuffle=False)
    kinds = ("jpg", "png", "gif")
    every = [(sample[next(kind for kind in kinds if kind in sample)], sample.get("cls")) for sample in stream]
    assert listed(images) == [(data, int(cls)) for data, cls in every if cls and int(cls) < CLASSES]
    assert images.classes == tuple(class_name(k) for k in range(CLASSES))  # of the classes.txt beside the shards
    assert images.blocks.sum() == len(images) and len(images.blocks) == len(paths)


def test_a_saved_data_set_is_listed_as_its_library_reads_it(made: dict[str, Path]) -> None:
    import datasets

    images = open_images("hf", str(made["hf"]))
    rows = datasets.load_from_disk(str(made["hf"]))["train"].cast_column("image", datasets.Image(decode=False))
    assert listed(images) == [(row["image"]["bytes"], row["label"]) for row in rows if row["label"] is not None]
    assert images.classes == tuple(rows.features["label"].names)


def test_parquet_files_are_a_data_set_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    table = {"picture": [{"bytes": bytes([k]), "path": None} for k in range(4)], "what": ["cat", "dog", None, "cat"]}
    rows = datasets.Dataset.from_dict(table)
    rows.to_parquet(tmp_path / "set" / "train.parquet")
    assert kind_of(str(tmp_path / "set")) == "hf"
    images = open_images("hf", str(tmp_path / "set"), None, None, "picture", "what")
    assert images.classes == ("cat", "dog") and listed(images) == [(b"\0", 0), (b"\1", 1), (b"\3", 0)]
    assert images.left_out.named == [("row 2", "it has no label")]


def test_a_class_list_gives_the_order_and_leaves_the_others_out(tmp_path: Path) -> None:
    for name in ("a/1.jpg", "b/2.jpg", "c/3.jpg"):
        write(tmp_path / "set" / name)
    file = write(tmp_path / "classes.txt", b"c\na\nnone of it\n")
    images = open_images("imagefolder", str(tmp_path / "set"), None, str(file))
    assert images.classes == ("c", "a", "none of it") and images.labels.tolist() == [1, 0]
    assert images.left_out.named == [
        ("class 'none of it'", "the class list has it, and no image is of it"),
        ("b/2.jpg", "its class 'b' is not one of the 3"),
    ]


def test_labels_in_json_and_names_in_cls(tmp_path: Path) -> None:
    about = [json.dumps({"class": name}).encode() for name in ("ant", "bee")] + [b"{torn"]
    members = {
        f"{k}.{end}": data for k, text in enumerate(about) for end, data in (("webp", bytes([k])), ("json", text))
    }
    write_tar(tmp_path / "a.tar", members)
    images = open_images("webdataset", str(tmp_path), None, None, None, "json.class")
    assert images.classes == ("ant", "bee") and listed(images) == [(b"\0", 0), (b"\1", 1)]
    assert images.left_out.named == [("a.tar/2.webp", "it has no label")]


def test_what_is_no_image_with_a_label_is_left_out_by_name(made: dict[str, Path], tmp_path: Path) -> None:
    folder = open_images("imagefolder", str(made["imagefolder"]), "train").left_out
    assert dict(folder.named) == {
        f"{class_name(0)}/{NO_SUCH_CLASS}.txt": "its name has no ending of an image",
        "unlabelled.jpg": "it has no label",
    }
    shard = open_images("webdataset", str(made["webdataset"]), "train").left_out
    assert dict(shard.named) == {
        "train-000000.tar/unlabelled.jpg": "it has no label",
        f"train-000000.tar/{NO_SUCH_CLASS}.jpg": f"its class '{CLASSES + 1000}' is not one of the {CLASSES}",
    }
    saved = open_images("hf", str(made["hf"])).left_out
    assert [reason for _, reason in saved.named] == ["it has no label"] and saved.count == 1
    write_tar(tmp_path / "set" / "a.tar", {"0.jpg": b"0", "0.cls": b"0", "1.cls": b"1", "2.jpg": b"2", "2.cls": b"1"})
    assert open_images("webdataset", str(tmp_path / "set")).left_out.named == [("a.tar/1", "it has no image")]


def test_names_survive_any_bytes() -> None:
    odd = ["plain.jpg", "", "ünï/kø.png", os.fsdecode(b"\xff\xfe.jpg")]
    assert [Names(odd)[k] for k in range(4)] == odd


def test_long_lists_of_strays_are_counted_but_not_all_kept() -> None:
    left_out = LeftOut()
    for k in range(5000):
        left_out.add(str(k), "why")
    assert left_out.count == 5000 and len(left_out.named) == 1000


# ------------------------------------------------------------------------------------------------------------- index


def test_a_shard_is_walked_once_and_again_when_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tar(tmp_path / "set" / "a.tar", {"0.jpg": b"0", "0.cls": b"0", "1.jpg": b"1", "1.cls": b"1"})
    walked: list[str] = []
    honest = shards.read_headers
    monkeypatch.setattr(shards, "read_headers", lambda path, *rest: walked.append(path) or honest(path, *rest))

    def labels() -> list[int]:
        open_images.cache_clear()
        return open_images("webdataset", str(tmp_path / "set")).labels.tolist()

    assert [labels(), labels(), labels()] == [[0, 1]] * 3 and len(walked) == 1
    write_tar(path, {"0.jpg": b"0", "0.cls": b"1", "1.jpg": b"1", "1.cls": b"0"})
    os.utime(path, ns=(1, 1))
    assert labels() == [1, 0] and len(walked) == 2
    for file in shards.cache_folder().iterdir():
        file.write_bytes(b"torn")
    assert labels() == [1, 0] and len(walked) == 3


def test_a_cache_that_cannot_be_written_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tar(tmp_path / "set" / "a.tar", {"0.jpg": b"0", "0.cls": b"0", "1.jpg": b"1", "1.cls": b"1"})
    monkeypatch.setenv("XDG_CACHE_HOME", str(write(tmp_path / "file")))
    assert len(open_images("webdataset", str(tmp_path / "set"))) == 2


def test_reading_a_shard_moves_no_position_that_forked_workers_share(made: dict[str, Path]) -> None:
    images = open_images("webdataset", str(made["webdataset"]), "train")
    first = images.read(0)
    assert images.read(5) != first == images.read(0)
    path = shards.shard_paths(str(made["webdataset"]), "train")[0]
    assert os.lseek(shards._opened(path).handle, 0, os.SEEK_CUR) == 0


def test_threads_read_the_image_they_asked_for_however_many_shards_are_open(tmp_path: Path, monkeypatch) -> None:
    """A descriptor that one thread closed was another file's a moment later: the bytes of another image, in silence."""
    monkeypatch.setattr(shards, "_opened", lru_cache(maxsize=2)(shards._Descriptor))
    for k in range(12):
        write_tar(tmp_path / f"train-{k:04d}.tar", {"0.jpg": bytes([k]) * 5000, "0.cls": b"0"})
    source = shards.list_shards(str(tmp_path), "train", None, None, None)
    asked = np.random.default_rng(0).integers(0, 12, 20_000).tolist()
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(source.read, asked))
        names = list(pool.map(source.name, asked[:2000]))
    assert all(data == bytes([k]) * 5000 for k, data in zip(asked, found, strict=True))
    assert names == [f"train-{k:04d}.tar/0.jpg" for k in asked[:2000]]


def test_shards_of_both_parts_are_not_taken_together(tmp_path: Path) -> None:
    for part in ("train", "test"):
        write_tar(tmp_path / f"{part}-000000.tar", {"0.jpg": b"x", "0.cls": b"0"})
    with pytest.raises(ValueError, match=r"holds shards of test and train; write data\.split=train\."):
        shards.shard_paths(str(tmp_path), None)
    assert len(shards.shard_paths(str(tmp_path), "test")) == len(shards.shard_paths(str(tmp_path / "*"), None)) / 2 == 1
    with pytest.raises(ValueError, match="nowhere is no folder"):
        shards.shard_paths(str(tmp_path / "nowhere"), "train")


def test_a_name_of_the_class_list_without_images_is_said_where_others_are_left_over(
    made: dict[str, Path], tmp_path: Path
) -> None:
    """One of the two is misspelt; a list that is only longer than the folder is none of our business."""
    said = ("class 'klass001'", "the class list has it, and no image is of it")
    for name, names in (("misspelt", ["class000", "klass001", "class002"]), ("longer", [*map(class_name, range(9))])):
        path = write(tmp_path / name, "\n".join(names).encode())
        source = open_images("imagefolder", str(made["imagefolder"]), "train", str(path))
        assert [row for row in source.left_out.named if "class list" in row[1]] == (
            [said] if name == "misspelt" else []
        )


def test_a_pattern_names_shards(tmp_path: Path) -> None:
    for k in range(12):
        write(tmp_path / f"train-{k:04d}.tar")
    write(tmp_path / "test-0000.tar")
    assert [p[-8:-4] for p in shards.shard_paths(f"{tmp_path}/train-{{0003..0005}}.tar", None)] == [
        "0003",
        "0004",
        "0005",
    ]
    assert (
        len(shards.shard_paths(f"{tmp_path}/train-*.tar", None))
        == 12
        == len(shards.shard_paths(str(tmp_path), "train"))
    )
    for pattern in (f"{tmp_path}/train-{{0010..0012}}.tar", f"{tmp_path}/val-*.tar", f"{tmp_path}/{{a.tar"):
        with pytest.raises(ValueError, match=r"is not there|brace too many"):
            shards.shard_paths(pattern, None)


# --------------------------------------------------------------------------------------------------------- bad input


def cut(path: Path) -> None:
    """In the middle of the last image."""
    with tarfile.open(path) as tar:
        place = tar.getmembers()[-1].offset_data
    os.truncate(path, place + 1000)


def cut_header(path: Path) -> None:
    with tarfile.open(path) as tar:
        place = tar.getmembers()[-2].offset
    os.truncate(path, place + 100)


def overwrite(path: Path) -> None:
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        header = tar.getmembers()[3].offset
    data[header : header + 100] = b"\x99" * 100
    path.write_bytes(bytes(data))


def compress(path: Path) -> None:
    (path.parent / (path.name + ".gz")).write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()


@pytest.mark.parametrize(
    ("damage", "names"),
    [
        (cut, "unexpected end of data"),
        (cut_header, "damaged at byte"),
        (overwrite, "damaged at byte"),
        (compress, "no random access"),
        (lambda path: path.write_bytes(b""), "empty"),
        (lambda path: path.write_bytes(b"no tar at all" * 99), "a.tar cannot be read"),
    ],
)
def test_a_shard_that_cannot_be_read_is_refused(damage, names: str, tmp_path: Path) -> None:
    """tarfile takes a damaged header in the middle for the end: half a shard would be lost without a word."""
    path = write_tar(tmp_path / "a.tar", {f"{k}.{end}": b"0" * 3000 for k in range(5) for end in ("cls", "jpg")})
    damage(path)
    with pytest.raises(ValueError, match=names) as error:
        open_images("webdataset", str(tmp_path))
    assert "a.tar" in str(error.value) and "leave it out" in str(error.value)


@pytest.mark.parametrize(
    ("kind", "files", "names"),
    [
        ("imagefolder", [], "holds no images"),
        ("imagefolder", ["a/notes.txt"], "holds no images"),
        (
            "imagefolder",
            ["1.jpg", "2.jpg"],
            r"no images that can be used: 2 entries were left out, such as 1.jpg \(it has no",
        ),
        ("imagefolder", ["a/1.jpg", "a/2.jpg"], "one class, 'a'"),
        ("imagefolder", ["train/a/1.jpg", "val/a/1.jpg"], "data.split=train"),
        ("webdataset", ["a/1.jpg"], "holds no .tar files"),
        ("hf", ["a/1.jpg"], "neither a saved data set nor .parquet"),
        ("hf", ["state.json"], "cannot be read as a data set"),
    ],
)
def test_a_folder_without_what_it_takes_is_refused(kind: str, files: list[str], names: str, tmp_path: Path) -> None:
    for file in files:
        write(tmp_path / file)
    with pytest.raises(ValueError, match=names) as error:
        open_images(kind, str(tmp_path))
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("kind", KINDS)
def test_a_root_that_is_not_there_is_refused(kind: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere"):
        open_images(kind, str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("kind", "override", "names"),
    [
        ("imagefolder", "data.num_classes=7", f"holds {CLASSES} classes; write data.num_classes={CLASSES}"),
        ("webdataset", "data.num_classes=2", f"holds {CLASSES} classes; write data.num_classes={CLASSES}"),
        ("imagefolder", "data.split=validation", "validation is no folder"),
        ("webdataset", "data.split=validation", "validation"),
        ("hf", "data.split=validation", "no part 'validation' but train, test"),
        ("hf", "data.image_key=pixels", "no column 'pixels' but image, label; write data.image_key"),
        ("hf", "data.class_list=/none.txt", "/none.txt cannot be read"),
    ],
)
def test_what_is_found_must_be_what_is_configured(kind: str, override: str, names: str, made: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match=names):
        data_fingerprint(compose([*configured(kind, made[kind]), override]))


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        (["data.mixup=0.2"], "data.mixup=0.2 has no effect on data=fractals"),
        (["data=imagefolder", "data.num_classes=4"], "data.root has no value"),
        (["data=imagefolder", "data.root=x"], "data.num_classes has no value"),
        (["data=imagefolder", "data.root=x", "data.num_classes=1"], "a classifier needs two"),
        (["data=hf", "data.root=x", "data.num_classes=9", "model.channels=4"], "model.channels=4"),
        (["data=hf", "data.root=x", "data.num_classes=9", "model.channels=3", "data.min_area=2"], "at most 1"),
        (["data=hf", "data.root=x", "data.num_classes=9", "data.mixup=1", "trainer.global_batch_size=9"], "is odd"),
        (["data=hf", "data.root=x", "data.num_classes=9", "model.image_size=512"], "model.image_size=512 is above 256"),
        (["model.image_size=264"], "model.image_size=264 is above 256"),
        (["eval.datasets=[digit]"], "did you mean 'digits'"),
        (["eval.datasets=[/a/pets,/b/pets]"], "/a/pets and /b/pets would both be called pets"),
        (["eval.datasets=['/a/my pets']"], "my pets"),
        (["eval.datasets=[digits,/x/digits]"], "both be called digits"),
    ],
)
def test_what_cannot_be_is_refused_before_any_file_is_read(overrides: list[str], names: str) -> None:
    with pytest.raises(ConfigError, match=names):
        compose(overrides)


@pytest.mark.parametrize(
    ("content", "names"), [(b"a\nb\na\n", "'a' twice"), (b"a\n\nb", "empty line"), (b"\xff", "UTF-8")]
)
def test_a_class_list_that_is_none_is_refused(
    content: bytes, names: str, made: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=names):
        open_images("imagefolder", str(made["imagefolder"]), "train", str(write(tmp_path / "list", content)))


def test_images_of_two_hundred_pixels_and_more_are_for_files_only() -> None:
    shape = ["shape=32x1x64", "model.image_size=512", "eval.datasets=[digits]"]
    assert compose([*shape, "data=hf", "data.root=x", "data.num_classes=9"]).model.image_size == 512


# ---------------------------------------------------------------------------------------------------------- identity


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], "412264f7f3a9d38a"),
        (["experiment=star_tiny"], "88c29b4e5829eb1a"),
        (["experiment=star_tiny", "shape=16x4x128", "seed=1"], "e0f2d2414117aabb"),
        (["experiment=star", "shape=So400m/14"], "94c97e2fcab495e1"),
        (["data.num_classes=7", "data.rotation=1.0"], "7d02547d7856ce93"),
    ],
)
def test_runs_recorded_before_there_were_files_are_still_found(overrides: list[str], expected: str) -> None:
    """The hashes are those of the version without readers: a new key at its default must not make a new run."""
    assert records.config_hash(compose(overrides)) == expected


def test_the_hash_sees_the_images_but_not_who_decodes_them(made: dict[str, Path]) -> None:
    own = configured("imagefolder", made["imagefolder"])
    hashes = [
        records.config_hash(compose([*own, *more]))
        for more in ([], ["data.num_workers=3"], ["data.mixup=0.1"], ["data.flip=false"], ["data.root=elsewhere"])
    ]
    assert hashes[0] == hashes[1] and len(set(hashes)) == 4


def test_the_fingerprint_sees_names_sizes_and_classes_but_not_the_place(made: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(made["imagefolder"], tmp_path / "copy")

    def found(root: Path, *overrides: str) -> str:
        open_images.cache_clear()
        return data_fingerprint(compose([*configured("imagefolder", root), *overrides]))

    first = found(made["imagefolder"])
    assert found(tmp_path / "copy") == first
    file = next((tmp_path / "copy/train" / class_name(1)).iterdir())
    file.write_bytes(file.read_bytes() + b"\0")
    second = found(tmp_path / "copy")
    file.rename(file.with_name("renamed.jpg"))
    assert len({first, second, found(tmp_path / "copy")}) == 3


# ---------------------------------------------------------------------------------------------------------- few-shot


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_with_a_train_and_a_test_part_is_a_few_shot_set(kind: str, made: dict[str, Path]) -> None:
    cfg = compose([*configured(kind, made[kind]), f"eval.datasets=[{made[kind]}]", "eval.shots=[1,5]"])
    (fewshot,) = fewshot_sets(cfg)
    assert fewshot.name == kind and fewshot.num_classes == CLASSES
    assert np.bincount(fewshot.test_labels).tolist() == [TEST_IMAGES] * CLASSES
    assert np.bincount(fewshot.train_labels)[1:].tolist() == [IMAGES] * (CLASSES - 1)
    for images, labels in ((fewshot.train_images, fewshot.train_labels), (fewshot.test_images, fewshot.test_labels)):
        assert isinstance(images, torch.Tensor) and images.dtype == torch.float32
        assert images.shape == (len(labels), 3, cfg.model.image_size, cfg.model.image_size)
        assert images.min() >= -1 and images.max() <= 1 and images.std() > 0.1


def test_a_folder_spelt_in_two_ways_is_one_folder(made: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its unusable files would be counted and named twice."""
    monkeypatch.chdir(made["imagefolder"].parent)
    cfg = compose([*configured("imagefolder", Path("imagefolder")), "eval.datasets=[./imagefolder]"])
    assert fewshot_images(cfg.eval.datasets[0])[0] is train_images(cfg)


def test_the_parts_of_a_few_shot_set_are_named_when_missing(tmp_path: Path) -> None:
    write(tmp_path / "pets/train/cat/1.jpg")
    with pytest.raises(ConfigError, match=r"one called test or val; it has only train"):
        fewshot_images(str(tmp_path / "pets"))
    with pytest.raises(ConfigError, match=r"eval\.datasets: .*dogs is no folder"):
        fewshot_images(str(tmp_path / "dogs"))


def test_too_few_images_for_the_shots_are_refused(made: dict[str, Path]) -> None:
    cfg = compose([*configured("hf", made["hf"]), f"eval.datasets=[{made['hf']}]", "eval.shots=[1,5,25]"])
    with pytest.raises(ConfigError, match=rf"25 images .* has {IMAGES} of 'class001'; write eval.shots=\[1,5\]"):
        data_fingerprint(cfg)


# ---------------------------------------------------------------------------------------------------- unusable files


def test_a_file_is_named_once_over_all_processes_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = BadFiles(tmp_path)
    first.note("a.jpg", "the file is empty")
    first.note("a.jpg", "the file is empty")
    BadFiles(tmp_path, rank=1).note("b.jpg", "why")
    with (tmp_path / FILE).open("a") as file:
        file.write('{"name": "torn')  # a kill in the middle of a line
    again = BadFiles(tmp_path)
    again.note("a.jpg", "the file is empty")
    again.note("b.jpg", "why")
    assert set(again.reasons) == {"a.jpg", "b.jpg"}
    assert (tmp_path / FILE).read_text().count("a.jpg") == 1 and "b.jpg" not in (tmp_path / FILE).read_text()
    assert capsys.readouterr().err.splitlines() == [
        "a.jpg cannot be used: the file is empty.",
        "b.jpg cannot be used: why.",
    ]
    assert again.summary(1234) == ("2 of 1,234 files could not be used: a.jpg (the file is empty), b.jpg (why).")
    assert BadFiles(None).summary(9) is None


def test_a_thousand_bad_files_do_not_fill_the_screen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = BadFiles(tmp_path)
    for k in range(12_000):
        found.note(f"{k}.jpg", "why")
    assert len(capsys.readouterr().err.splitlines()) == 5
    assert len((tmp_path / FILE).read_text().splitlines()) == 10_000
    assert str(found.summary(20_000)).startswith(
        "at least 10,000 of 20,000 files could not be used: 0.jpg (why), 1.jpg"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_every_defect_is_survived_counted_and_named(kind: str, made: dict[str, Path], tmp_path: Path) -> None:
    """Two epochs of a damaged set: the odd files are read, each broken one is named once, in the run's own folder."""
    more = ["model.image_size=16", f"runs_dir={tmp_path}", "eval.datasets=[digits]"]
    cfg = compose([*configured(kind, made[kind]), *more])
    records.run_dir(cfg).mkdir(parents=True)
    images = train_images(cfg)
    steps = -(-2 * len(images) // cfg.trainer.global_batch_size)
    data = TrainData(cfg, steps)
    data.trainer = type("Trainer", (), {"global_step": 0})()
    for batch in data.train_dataloader():
        floats, labels = data.on_after_batch_transfer(batch, 0)
        assert floats.shape == (8, 3, 16, 16) and floats.isfinite().all() and labels.max() < CLASSES
    rows = [json.loads(line) for line in (records.run_dir(cfg) / FILE).read_text().splitlines()]
    named = [Path(row["name"].removesuffix(")")).name.removeprefix("row ") for row in rows]
    unreadable = {row["name"] for row in rows if "label" not in row["reason"] and "class" not in row["reason"]}
    expected = {"imagefolder": 2, "webdataset": 2, "hf": 1}[kind]  # left out as they were listed
    assert len(named) == len(set(named)) == len(BROKEN) + expected
    for name in BROKEN:
        assert sum(name in row["name"] for row in rows) == 1, name
    assert not any(name in found for name in ODD for found in unreadable)
    said = unusable(cfg)
    assert said and said.startswith(f"{len(rows)} of {len(images) + images.left_out.count} files could not be used: ")


# --------------------------------------------------------------------------------------------------------- generator


def test_the_generator_refuses_a_folder_in_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "mine")
    assert main([str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"sovit.data.generate: {tmp_path} is not empty; give a new folder.\n"
    assert main([str(tmp_path / "new"), "--classes", "1"]) == 2


def test_the_generator_writes_the_same_files_again(tmp_path: Path) -> None:
    for name in ("one", "two"):
        assert (
            main([str(tmp_path / name), "--classes", "2", "--images", "3", "--test-images", "1", "--size", "16"]) == 0
        )
    one, two = (
        {p.relative_to(tmp_path / n): p.read_bytes() for p in (tmp_path / n).rglob("*.jpg")} for n in ("one", "two")
    )
    assert one == two and len(one) == 8 and len(set(one.values())) == 8
