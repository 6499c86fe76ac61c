"""The architecture of docs/design.md, asserted: imports point down, and the analysis side loads no torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "sovit"

# Floors from the ground up; a module may import from its own floor and from those below.
FLOORS = [
    [
        "sovit",
        "sovit.strict",
        "sovit.overrides",
        "sovit.shape",
        "sovit.flops",
        "sovit.text_flops",
        "sovit.memory",
        "sovit.duration",
        "sovit.schedule",
        "sovit.metric",
    ],
    ["sovit.schema", "sovit.derived", "sovit.requirements", "sovit.config", "sovit.records", "sovit.claims"],
    ["sovit.analysis"],
    ["sovit.launch"],
    [
        "sovit.data",
        "sovit.models",
        "sovit.language",
        "sovit.fewshot",
        "sovit.optim",
        "sovit.adafactor",
        "sovit.objectives",
    ],
    ["sovit.lit"],
    ["sovit.downstream", "sovit.bench", "sovit.ship"],
    ["sovit.launch.preload", "sovit.train", "sovit.cli"],
]
NO_TORCH = [
    "sovit.memory",
    "sovit.analysis",
    "sovit.launch",
    "sovit.config",
    "sovit.derived",
    "sovit.requirements",
    "sovit.records",
    "sovit.cli",
    "sovit.train",
]
HEAVY_MODULES = ["sovit.launch.preload", "sovit.analysis.kernel"]  # imported by the fork server, by the first fit
HEAVY = ("torch", "timm", "lightning", "wandb", "sklearn", "numba", "tokenizers", "transformers", "open_clip")


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(SOURCE.rglob("*.py")):
        parts = ("sovit", *path.relative_to(SOURCE).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def floor(module: str) -> int:
    """The floor of the longest entry of FLOORS that the module lies in."""
    matches = [(len(p), n) for n, names in enumerate(FLOORS) for p in names if f"{module}.".startswith(f"{p}.")]
    return max(matches)[1]


def imports(path: Path) -> set[str]:
    """Modules of sovit imported anywhere in a file, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert not node.level, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    known = modules()
    return {name for name in names if name in known and name != "sovit"}


@pytest.mark.parametrize("module", modules())
def test_imports_point_down(module: str) -> None:
    for imported in imports(modules()[module]):
        assert floor(imported) <= floor(module), f"{module} imports {imported} from a floor above it"


@pytest.mark.parametrize("top", NO_TORCH)
def test_the_analysis_side_loads_no_torch(top: str) -> None:
    inside = [name for name in modules() if f"{name}.".startswith(f"{top}.") and name not in HEAVY_MODULES]
    code = f"import sys\nfor name in {inside}: __import__(name)\nprint([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_a_forbidden_import_would_be_seen(tmp_path: Path) -> None:
    file = tmp_path / "law.py"
    file.write_text("def f():\n    from sovit.lit import engine\n")
    assert imports(file) == {"sovit.lit", "sovit.lit.engine"}
    assert floor("sovit.lit.engine") > floor("sovit.analysis.law")
