"""What this machine is, as far as it decides how fast cells train, and where measurements of it are kept."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sovit import __version__
from sovit.launch.devices import cores


def hardware(accelerator: str) -> dict[str, Any]:
    """Processor, cores this process may use, GPUs (of an accelerator "gpu" only), and the versions that matter."""
    try:
        torch = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        torch = "none"
    return {
        "cpu": _cpu_name(),
        "cores": len(cores()),
        "gpus": _gpu_names() if accelerator == "gpu" else [],
        "torch": torch,
        "sovit": __version__,
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:  # not Linux
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return (names or [platform.processor() or platform.machine()])[0]


def _gpu_names() -> list[str]:
    """Names of the GPUs of this machine, those hidden by CUDA_VISIBLE_DEVICES too: which it is does not matter here."""
    if not shutil.which("nvidia-smi"):
        return []
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    return sorted({line.strip() for line in answer.stdout.splitlines() if line.strip()})


def cache_file(key: Mapping[str, Any]) -> Path:
    """Where the measurement for a key is kept, below ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(home) if os.path.isabs(home) else Path(os.path.expanduser("~")) / ".cache"  # as its standard says
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    return root / "sovit" / f"throughput-{digest}.json"


def read_cache(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file, None if there is no file. Raises ValueError with one clause if it cannot be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ValueError(
            f"The measurement kept in {path} cannot be read ({(error.strerror or str(error)).lower()})"
        ) from None
    except (ValueError, RecursionError):
        raise ValueError(f"The measurement kept in {path} is no JSON") from None
    if not isinstance(content, dict):
        raise ValueError(f"The measurement kept in {path} is not a JSON object")
    return content


def write_cache(path: Path, content: Mapping[str, Any]) -> None:
    """Replace the file in one step, whoever writes it at the same time. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    number, scratch = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(number, "w", encoding="utf-8") as file:
            file.write(json.dumps(content, indent=1) + "\n")
        os.replace(scratch, path)
    except BaseException:
        os.unlink(scratch)
        raise
