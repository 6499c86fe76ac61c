"""Does the data keep up? The loader against training of the fastest shipped model, or against timm's own loader.

    python benchmarks/loader.py            # the embedded images, on one thread
    python benchmarks/loader.py --files    # JPEG files, beside timm's loader on the same files

Whatever is compared is timed in turns, so that other load on the machine hits both, and medians are taken. Prints JSON
objects; exits with status 1 if the loader is less than 3 times as fast as training, or slower than timm's.

``--files`` writes JPEG files of two sizes (500 x 375 pixels as in ImageNet, and 2000 x 1500 as of a camera) and reads them
with both loaders to normalised float batches of 224 pixels: inception crop of 5 to 100% of the area, bilinear, flip.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timm.data import create_dataset, create_loader
from timm.models.vision_transformer import VisionTransformer
from torch.nn.functional import cross_entropy

from sovit.data.fractals import FractalWorld
from sovit.data.generate import encoded, picture
from sovit.data.images import ImageStream, finish
from sovit.data.sources import open_images
from sovit.data.stream import FractalDataset, StepSampler, make_loader
from sovit.data.views import TrainView

BATCH_SIZE = 128
LOADER_STEPS = 400
TRAINING_STEPS = 40
REPEATS = 7
LEAST_RATIO = 3.0

CROP = 224
FILE_BATCH = 64
SIZES = {"500 x 375": ((500, 375), 512), "2000 x 1500": ((2000, 1500), 128)}  # pixels, files
LEAST_OF_TIMM = 1.0


def loader_images_per_s(dataset: FractalDataset, start_step: int) -> float:
    """Rate of iterating the loader in this process, num_workers=0."""
    loader = make_loader(dataset, StepSampler(BATCH_SIZE, start_step, start_step + LOADER_STEPS), num_workers=0)
    start = time.perf_counter()
    for _ in loader:
        pass
    return LOADER_STEPS * BATCH_SIZE / (time.perf_counter() - start)


def training_images_per_s(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, images: torch.Tensor, labels: torch.Tensor
) -> float:
    """Rate of forward, backward and optimiser steps on one batch that is there already."""
    start = time.perf_counter()
    for _ in range(TRAINING_STEPS):
        optimizer.zero_grad()
        cross_entropy(model(images), labels).backward()
        optimizer.step()
    return TRAINING_STEPS * BATCH_SIZE / (time.perf_counter() - start)


def embedded() -> bool:
    """Whether the embedded images come fast enough."""
    start = time.perf_counter()
    FractalDataset(FractalWorld(num_classes=1))
    compiled = time.perf_counter()
    dataset = FractalDataset(FractalWorld())
    ready = time.perf_counter()
    model = VisionTransformer(
        img_size=16, patch_size=8, in_chans=1, num_classes=256, embed_dim=32, depth=1, num_heads=4, mlp_ratio=4,
        class_token=False, global_pool="avg",
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    images, labels = dataset.__getitems__(range(BATCH_SIZE))
    training_images_per_s(model, optimizer, images, labels)  # warm-up
    loading, training = [], []
    for repeat in range(REPEATS):
        loading.append(loader_images_per_s(dataset, repeat * LOADER_STEPS))
        training.append(training_images_per_s(model, optimizer, images, labels))
    ratio = statistics.median(loading) / statistics.median(training)
    figures = {
        "compile_s": round(compiled - start, 2),
        "tables_s": round(ready - compiled, 2),
        "loader_images_per_s": round(statistics.median(loading)),
        "training_images_per_s": round(statistics.median(training)),
        "ratio": round(ratio, 1),
    }
    print(json.dumps(figures))
    return ratio >= LEAST_RATIO


def write_files(folder: Path, size: tuple[int, int], count: int) -> float:
    """JPEG files of four classes, with as much detail as photographs; returns their mean size in KB."""
    world, rng, total = FractalWorld(num_heldout=4, size=64), np.random.default_rng(0), 0
    for k in range(count):
        image = picture(world, k, 64).resize(size, Image.Resampling.BICUBIC)
        pixels = np.asarray(image).astype(float) + rng.normal(0, 8, (size[1], size[0], 1))
        data = encoded(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)))
        path = folder / str(k % 4) / f"{k}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        total += len(data)
    return total / count / 1000


def timm_images_per_s(folder: Path, workers: int) -> float:
    """Rate of timm's loader, from its start to the last batch of an epoch."""
    loader = create_loader(
        create_dataset("", root=str(folder), is_training=True),
        (3, CROP, CROP),
        FILE_BATCH,
        is_training=True,
        scale=(0.05, 1.0),
        color_jitter=None,
        interpolation="bilinear",
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        num_workers=workers,
        persistent_workers=False,
        device=torch.device("cpu"),
    )
    start, count = time.perf_counter(), 0
    for images, _ in loader:
        count += len(images)
    return count / (time.perf_counter() - start)


def own_images_per_s(folder: Path, workers: int) -> float:
    """Rate of the project's loader over as many images."""
    images = open_images("imagefolder", str(folder))
    steps = len(images) // FILE_BATCH
    loader = make_loader(ImageStream(images, TrainView(CROP), seed=0), StepSampler(FILE_BATCH, 0, steps), workers)
    start, count = time.perf_counter(), 0
    for batch in loader:
        count += len(finish(batch, len(images.classes))[0])
    return count / (time.perf_counter() - start)


def files() -> bool:
    """Whether files come at least as fast as from timm's loader."""
    good = True
    for name, (size, count) in SIZES.items():
        with tempfile.TemporaryDirectory() as folder:
            kilobytes = write_files(Path(folder), size, count)
            for workers in (0, 2):
                pairs = [(own_images_per_s(Path(folder), workers), timm_images_per_s(Path(folder), workers))
                         for _ in range(REPEATS + 1)][1:]  # fmt: skip
                ratio = statistics.median(own / other for own, other in pairs)
                figures = {
                    "files": name,
                    "kilobytes": round(kilobytes),
                    "workers": workers,
                    "sovit_images_per_s": round(statistics.median(own for own, _ in pairs)),
                    "timm_images_per_s": round(statistics.median(other for _, other in pairs)),
                    "ratio": round(ratio, 2),
                    "ratios": [round(own / other, 2) for own, other in pairs],
                }
                print(json.dumps(figures), flush=True)
                good &= ratio >= LEAST_OF_TIMM
    return good


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--files", action="store_true", help="JPEG files, beside timm's loader")
    torch.set_num_threads(1)
    if parser.parse_args().files:
        if not files():
            sys.exit(f"The loader is slower than {LEAST_OF_TIMM:.0f} times timm's on the same files.")
    elif not embedded():
        sys.exit(f"The loader is less than {LEAST_RATIO:.0f} times as fast as training, the least wanted.")


if __name__ == "__main__":
    main()
