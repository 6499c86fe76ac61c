"""Do images with captions keep up? The pair stream against webdataset's own reader, and a file of COCO's size against json.

    python benchmarks/pairs.py            # the same shards read by both, in turns
    python benchmarks/pairs.py --json     # 600,000 captions of 118,287 images: time and memory of the listing

Prints JSON objects. The first exits with status 1 if the pair stream is slower than webdataset: normalised float batches
of 224 pixels (short side to 256, central square) with tokens of the shipped vocabulary, from JPEG files of 500 x 375 pixels
in shards with a caption each.
"""

import argparse
import io
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import webdataset
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from sovit.data.fractals import FractalWorld
from sovit.data.generate import encoded, picture
from sovit.data.stream import StepSampler, make_loader
from sovit.language import vocabulary
from sovit.language.files import open_pairs, open_texts
from sovit.language.pairs import PairStream, finish_pairs
from sovit.language.scenes import scenes

CROP, BATCH, LENGTH = 224, 64, 32
PAIRS, PER_SHARD = 256, 64
REPEATS = 5
LEAST_RATIO = 1.0
IMAGES, CAPTIONS = 118_287, 600_000  # of COCO's training part: 591,753 captions

WORDS = vocabulary.load()


def write_shards(folder: Path) -> None:
    """JPEG files with as much detail as photographs, the captions of the embedded scenes."""
    world, rng, said = FractalWorld(num_heldout=4, size=64), np.random.default_rng(0), scenes("train", num=PAIRS)
    for shard in range(PAIRS // PER_SHARD):
        with tarfile.open(folder / f"train-{shard:04d}.tar", "w") as tar:
            for k in range(shard * PER_SHARD, (shard + 1) * PER_SHARD):
                image = picture(world, k, 64).resize((500, 375), Image.Resampling.BICUBIC)
                pixels = np.asarray(image).astype(float) + rng.normal(0, 8, (375, 500, 1))
                data = encoded(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)))
                for name, content in ((f"{k:06d}.jpg", data), (f"{k:06d}.txt", said.captions(k)[0].encode())):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


def collated(samples: list[tuple[Tensor, str]]) -> tuple[Tensor, Tensor]:
    """What webdataset makes of a batch."""
    return torch.stack([image for image, _ in samples]), WORDS.batch([text for _, text in samples], LENGTH)[0]


def webdataset_pairs_per_s(folder: Path, workers: int) -> float:
    """Rate of webdataset's pipeline with a shuffle buffer, from its start to the last batch of an epoch."""
    view = v2.Compose([
        v2.Resize(256), v2.CenterCrop(CROP), v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True),
        v2.Normalize((0.5,) * 3, (0.5,) * 3),
    ])  # fmt: skip
    paths = sorted(str(path) for path in folder.glob("*.tar"))
    pipeline = (
        webdataset.WebDataset(paths, shardshuffle=len(paths)).shuffle(256).decode("pilrgb").to_tuple("jpg", "txt")
    )
    pipeline = pipeline.map_tuple(view, str).batched(BATCH, collation_fn=collated)
    start, count = time.perf_counter(), 0
    for images, _ in torch.utils.data.DataLoader(pipeline, batch_size=None, num_workers=workers):
        count += len(images)
    return count / (time.perf_counter() - start)


def own_pairs_per_s(folder: Path, workers: int) -> float:
    """Rate of the pair stream over as many pairs."""
    stream = PairStream(open_pairs("pairs", str(folder), size=CROP), WORDS, LENGTH, seed=0, group=4)
    start, count = time.perf_counter(), 0
    for batch in make_loader(stream, StepSampler(BATCH, 0, PAIRS // BATCH), workers):
        count += len(finish_pairs(batch)[0])
    return count / (time.perf_counter() - start)


def shards() -> bool:
    """Whether pairs come at least as fast as from webdataset."""
    good = True
    with tempfile.TemporaryDirectory() as folder:
        write_shards(Path(folder))
        for workers in (0, 2):
            rates = [(own_pairs_per_s(Path(folder), workers), webdataset_pairs_per_s(Path(folder), workers))
                     for _ in range(REPEATS + 1)][1:]  # fmt: skip
            ratio = statistics.median(own / other for own, other in rates)
            figures = {
                "workers": workers,
                "sovit_pairs_per_s": round(statistics.median(own for own, _ in rates)),
                "webdataset_pairs_per_s": round(statistics.median(other for _, other in rates)),
                "ratio": round(ratio, 2),
                "ratios": [round(own / other, 2) for own, other in rates],
            }
            print(json.dumps(figures), flush=True)
            good &= ratio >= LEAST_RATIO
    return good


def write_coco(folder: Path) -> Path:
    """A captions file with COCO's numbers, and images of one byte."""
    rng, words = random.Random(0), ("a", "man", "two", "dogs", "riding", "on", "the", "red", "surfboard", "of", "trees")
    (folder / "images").mkdir()
    images = [{"license": 3, "file_name": f"{k:012d}.jpg", "height": 480, "width": 640, "id": k} for k in range(IMAGES)]
    for image in images:
        (folder / "images" / str(image["file_name"])).write_bytes(b"x")
    said = [{"image_id": k % IMAGES, "id": k, "caption": " ".join(rng.choices(words, k=11))} for k in range(CAPTIONS)]
    path = folder / "captions.json"
    path.write_text(json.dumps({"images": images, "annotations": said}))
    return path


def listing(path: Path, how: str) -> dict[str, float]:
    """CPU seconds of reading the file, and MB held after it and at most, beyond what the imports hold."""

    def held() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

    before, start = held(), time.process_time()
    found = (
        json.loads(path.read_text())
        if how == "json"
        else open_texts(str(path.parent / "images"), captions=str(path), size=CROP)
    )
    seconds, after = time.process_time() - start, held()
    assert len(found)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"cpu_s": round(seconds, 2), "held_mb": round(after - before), "most_mb": round(most - before)}


def in_turns() -> None:
    """Both readers in processes of their own, one after the other."""
    with tempfile.TemporaryDirectory() as folder:
        path = write_coco(Path(folder))
        for _ in range(3):
            for how in ("json", "sovit"):
                command = [sys.executable, __file__, "--listing", how, str(path)]
                print(
                    how, subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip(), flush=True
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--json", action="store_true", help="a captions file of COCO's size")
    parser.add_argument("--listing", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.listing:
        print(json.dumps(listing(Path(given.listing[1]), given.listing[0])))
    elif given.json:
        in_turns()
    elif not shards():
        sys.exit(f"The pair stream is slower than {LEAST_RATIO:.0f} times webdataset on the same shards.")


if __name__ == "__main__":
    main()
