"""Does the data keep up? Images/s of the loader alone against training of the fastest shipped model, on one thread.

    python benchmarks/loader.py

Both are timed in turns, so that other load on the machine hits both, and the medians are compared. Prints one JSON
object; exits with status 1 if the loader is less than 3 times as fast as training.
"""

import json
import statistics
import sys
import time

import torch
from timm.models.vision_transformer import VisionTransformer
from torch.nn.functional import cross_entropy

from sovit.data.fractals import FractalWorld
from sovit.data.stream import FractalDataset, StepSampler, make_loader

BATCH_SIZE = 128
LOADER_STEPS = 400
TRAINING_STEPS = 40
REPEATS = 7
LEAST_RATIO = 3.0


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


def main() -> None:
    torch.set_num_threads(1)
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
    if ratio < LEAST_RATIO:
        sys.exit(f"The loader is only {ratio:.1f} times as fast as training; {LEAST_RATIO:.0f} is the least wanted.")


if __name__ == "__main__":
    main()
