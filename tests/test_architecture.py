"""The import table of the architecture: a package may import only those listed beside it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "src" / "halfbyte"

LAYERS = [
    "errors",
    "storage",
    "memory",
    "formats",
    "kernels",
    "layers",
    "models",
    "text",
    "adapters",
    "generation",
    "data",
    "optim",
    "training",
    "composition",
    "evaluation",
    "serving",
    "cli",
]
"""Top to bottom: each imports only what stands above it."""

EXCEPTIONS = {
    "__main__": {"cli", "errors"},
    "__init__": set(LAYERS),  # lazy, by name; the eager imports are for type checkers
}

MAX_LINES = 500
MAX_DEPTH = 2


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def owner(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def allowed(name: str) -> set[str]:
    if name in EXCEPTIONS:
        return EXCEPTIONS[name]
    return set(LAYERS[: LAYERS.index(name) + 1])


def imported_modules(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            assert node.module is not None
            yield node.module
            if node.module == "halfbyte":
                yield from (f"halfbyte.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    permitted = allowed(owner(path))
    for module in imported_modules(path):
        parts = module.split(".")
        if parts[0] == "halfbyte" and len(parts) > 1 and parts[1] != "__version__":
            assert parts[1] in permitted, f"{owner(path)} may not import {module}"


def test_oracles_are_not_imported_by_the_product() -> None:
    oracles = {"transformers", "peft", "bitsandbytes", "accelerate", "sacrebleu", "pickle"}
    for path in sources():
        for module in imported_modules(path):
            assert module.split(".")[0] not in oracles, f"{path} imports {module}"


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_stay_small_and_shallow(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MAX_LINES
    assert len(path.relative_to(PACKAGE).parts) <= MAX_DEPTH
