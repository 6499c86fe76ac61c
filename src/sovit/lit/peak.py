"""How fast this machine multiplies matrices: what the utilisation of a run is a share of.

GPUs that are known by name have the figure of their datasheet; anything else is measured by a matrix product on the threads
and in the precision of the run. A busy machine shows less than its peak, so the highest that any run has seen is kept. Not
here: FLOPs of a model (`sovit.flops`).
"""

from __future__ import annotations

import contextlib
import functools
import time
from dataclasses import dataclass

import torch

from sovit.launch.pay.hardware import cache_file, hardware, read_cache, write_cache

# Dense bf16 and fp16 FLOP/s by the names that drivers give; the first that fits counts.
DATASHEET = {
    "B200": 2250e12,
    "GH200": 989.4e12,
    "H200": 989.4e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989.4e12,
    "A100": 312e12,
    "L40S": 362e12,
}
DTYPES = {"bf16": torch.bfloat16, "16": torch.float16, "32": torch.float32, "64": torch.float64}
REPEATS, SECONDS = 3, 0.05


@dataclass(frozen=True)
class Peak:
    """FLOP/s of one device, and where the figure is from: ``datasheet`` or ``measured``."""

    flops: float
    basis: str


@functools.cache
def peak(device: torch.device, precision: str) -> Peak:
    """The peak of a device in a precision such as bf16-mixed, on torch's threads of now. Takes 0.1 s, once a process."""
    dtype = DTYPES[precision.partition("-")[0]]
    sheet = datasheet(device, dtype)
    if sheet is not None:
        return Peak(sheet, "datasheet")
    key = {
        "what": "peak",
        **hardware("cpu"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "dtype": str(dtype),
    }
    path = cache_file(key)
    before = 0.0
    with contextlib.suppress(ValueError, KeyError, TypeError):  # a note that cannot be used is replaced
        before = float((read_cache(path) or {"flops": 0.0})["flops"])
    flops = matmul_flops(device, dtype)
    if flops > before:
        with contextlib.suppress(OSError):  # nowhere to keep it
            write_cache(path, {"key": key, "flops": flops, "measured_at": time.time()})
    return Peak(max(flops, before), "measured")


def datasheet(device: torch.device, dtype: torch.dtype) -> float | None:
    """What a GPU's datasheet promises for dense products of half precision, None for anything else."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for known, flops in DATASHEET.items() if known in name), None)


def matmul_flops(device: torch.device, dtype: torch.dtype, size: int | None = None) -> float:
    """FLOP/s of the fastest of some products of two random square matrices; leaves torch's generators alone."""
    gpu = device.type == "cuda"
    size = size or (8192 if gpu else 768)
    draw = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(size, size, device=device, generator=draw).to(dtype) for _ in range(2))
    torch.mm(a, b)
    best, began = float("inf"), time.perf_counter()
    for number in range(1000):
        if gpu:
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        torch.mm(a, b)
        if gpu:
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
        if number + 1 >= REPEATS and time.perf_counter() - began > SECONDS:
            break
    del a, b
    if gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return 2 * size**3 / best
