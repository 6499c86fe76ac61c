"""One row of the table, measured in this process: `sovit.bench.processes` gives every row a process of its own.

A call is one forward pass of a batch that is on the device already, without gradients, from the images to the logits (or
the pooled features of a model without a classifier), weights and images in one precision. On a GPU a call ends when the
GPU is done.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sovit.bench.energy import meter
from sovit.bench.models import DTYPES, build, build_timm, timm_arguments
from sovit.bench.settings import Setting, Subject
from sovit.bench.turns import latency, ratio, take_turns
from sovit.flops import forward_gflops
from sovit.lit.peak import peak
from sovit.models.vit import build_vit
from sovit.shape import Shape

OURS, TIMM = "sovit", "timm"
_OF_PEAK = {"fp32": "32-true", "bf16": "bf16-true"}


class NotMeasured(RuntimeError):
    """The row has no figures; the message is a clause that says why."""


def measure(subject: Subject, setting: Setting, *, seconds: float, against_timm: bool = True) -> dict[str, Any]:
    """The figures of a row, JSON-ready. Raises NotMeasured."""
    torch.set_num_threads(setting.threads)
    if setting.mode == "compiled":
        import torch._inductor.config as inductor

        inductor.compile_threads = 1  # here, not in processes of its own that would outlive this one
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it misses CUDA even if asked for a CPU
    try:
        with torch.inference_mode(), _within_memory():
            return _measure(subject, setting, seconds, against_timm)
    except torch.OutOfMemoryError:
        raise NotMeasured("out of memory") from None


def _measure(subject: Subject, setting: Setting, seconds: float, against_timm: bool) -> dict[str, Any]:
    device, gpu, dtype = torch.device(setting.device), setting.device == "cuda", DTYPES[setting.precision]
    model = subject.at(setting.image_size)
    if subject.source is not None:
        importlib.import_module("sovit.lit.trained")  # what it brings along is no part of the model's memory
    memory = _Memory(device, dtype)
    ours = _ready(build(subject, setting.image_size), device, dtype)
    draw = torch.Generator().manual_seed(0)
    size = (setting.batch_size, model.channels, setting.image_size, setting.image_size)
    images = torch.randn(size, generator=draw).to(device, dtype)
    call, compile_s = _callable(ours, images, setting, gpu)
    memory.begin()
    for _ in range(2):
        call()
    held = memory.held() if gpu or setting.mode == "eager" else None  # on a CPU the compiler's own memory is in it
    contestants = {OURS: call}
    arguments = timm_arguments(model) if against_timm else None
    if arguments is not None:
        with contextlib.suppress(torch.OutOfMemoryError):  # two models are more than one: the row stays without a rival
            contestants[TIMM], _ = _callable(_ready(build_timm(arguments), device, dtype), images, setting, gpu)
    found = meter(setting.device)
    joules: list[float] = []

    def around(name: str, turn: Callable[[], None]) -> None:
        if found is None or name != OURS:
            turn()
            return
        before = found.read()
        turn()
        joules.append(found.between(before, found.read()))

    clock = time.process_time if setting.clock == "processor" else time.perf_counter
    began, busy = time.perf_counter(), time.process_time()
    turns = take_turns(contestants, seconds, clock=clock, around=around)
    share = (time.process_time() - busy) / (time.perf_counter() - began) / setting.threads
    took = latency(turns[OURS])
    assert took["mean"] is not None and took["p50"] is not None and took["num_calls"] is not None
    geometry = {name: getattr(model, name) for name in ("channels", "pool", "num_classes")}
    gflops = forward_gflops(model.shape, model.image_size, **geometry)
    top = peak(torch.device("cuda", torch.cuda.current_device()) if gpu else device, _OF_PEAK[setting.precision])
    return {
        "latency_ms": took,
        "images_per_s": setting.batch_size / (took["mean"] / 1e3),
        "compile_s": compile_s,
        "utilisation": gflops * 1e9 * setting.batch_size / (took["p50"] / 1e3) / top.flops,
        "peak_gflops_per_s": top.flops / 1e9,
        "peak_basis": top.basis,
        "memory_bytes": held,
        "memory_basis": memory.basis if held is not None else None,
        "energy_j_per_image": sum(joules) / (took["num_calls"] * setting.batch_size) if found else None,
        "energy_basis": found.basis if found else None,
        "timm": {
            "arguments": arguments,
            "latency_ms": latency(turns[TIMM]),
            "ratio": ratio(turns, TIMM, OURS),
        }
        if TIMM in contestants
        else None,
        "cpu_share": None if gpu else share,
    }


def _ready(model: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    return model.eval().requires_grad_(False).to(device, dtype)


def _callable(
    model: nn.Module, images: torch.Tensor, setting: Setting, gpu: bool
) -> tuple[Callable[[], None], float | None]:
    """A call of the model that returns once it is done, warmed up; and the seconds that compiling took."""
    compiled = setting.mode == "compiled"
    run: Any = torch.compile(model, dynamic=False) if compiled else model

    def call() -> None:
        run(images)
        if gpu:
            torch.cuda.synchronize()

    began = time.perf_counter()
    try:
        call()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        if not compiled or _of_memory(error):
            raise
        raise NotMeasured(_why_not_compiled(error)) from None
    took = time.perf_counter() - began if compiled else None
    call()
    return call, took


def _why_not_compiled(error: BaseException) -> str:
    text = str(error)
    if "InvalidCxxCompiler" in text or "No working C++ compiler" in text:
        return "no C++ compiler: torch.compile needs one on a CPU; install g++, or set CXX"
    if "triton" in text.lower() and "install" in text.lower():
        return "no working Triton: torch.compile needs it on a GPU"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return f"torch.compile failed: {lines[0] if lines else type(error).__name__}"


@contextlib.contextmanager
def _within_memory() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or not _of_memory(error):
            raise
        raise torch.OutOfMemoryError(str(error)) from None


def _of_memory(error: Exception) -> bool:
    """Whether torch's allocator on the CPU, or the system's, refused; CUDA's has a class of its own."""
    return "can't allocate memory" in str(error) or "not enough memory" in str(error)


class _Memory:
    """The most that a model and its calls held: of CUDA's allocator, or of the process beyond what it held before."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.gpu = device.type == "cuda"
        self.basis = "CUDA's allocator" if self.gpu else "resident set of the process"
        if self.gpu:
            torch.cuda.init()
            self.before = torch.cuda.memory_allocated()
        else:
            least = build_vit(Shape(64, 1, 64, 1, 8), image_size=16)  # loads what any model wants of torch's libraries
            _ready(least, device, dtype)(torch.zeros(1, 3, 16, 16, dtype=dtype))
            self.before = _status("VmRSS")

    def begin(self) -> None:
        """From here on the most counts."""
        if self.gpu:
            torch.cuda.reset_peak_memory_stats()
        else:
            with contextlib.suppress(OSError):  # without Linux's way to forget it, the building counts too
                Path("/proc/self/clear_refs").write_text("5")

    def held(self) -> int | None:
        """Bytes, None where the system does not tell."""
        if self.gpu:
            return torch.cuda.max_memory_allocated() - self.before
        most = _status("VmHWM")
        return max(0, most - self.before) if most and self.before else None


def _status(name: str) -> int:
    """Bytes by Linux's account of this process; 0 where there is none."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return 1024 * int(line.split()[1])
    return 0
