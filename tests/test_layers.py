"""The layers of the package: imports point downward only, or stay within a layer."""

import ast
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "mlx_distill"

# From the top; a module belongs to the longest of these names that it begins with.
LAYERS = {
    "verbs": "generate train_drafter distill evaluate benchmark calibrate convert cli flags "
    "drafting",
    "uses": "speculation distillation evaluation benchmarking calibration",
    "loops": "speculation.decoding speculation.cycle speculation.drafted_text speculation.caching "
    "speculation.ledger speculation.statistics speculation.phases speculation.stopwatch "
    "speculation.parked training",
    "models": "target drafters checkpoint model_folder hashes",
    "data": "data",
    "arrays": "core losses kernels",
    "ground": "errors interrupts regular limits locks parsing safetensors names console arrays "
    "files machine blas user_cache config compat untyped",
}
LEVELS = {name: level for level, names in enumerate(LAYERS.values()) for name in names.split()}


def level(module: str) -> int:
    """Return how deep a module lies; 0 is the top."""
    parts = module.split(".")[1:]
    names = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
    known = [LEVELS[name] for name in names if name in LEVELS]
    assert known, f"{module} belongs to no layer"
    return known[0]


@cache
def modules() -> dict[str, Path]:
    """Return the files of the package by module; packages that only describe themselves aside."""
    files = (file for file in PACKAGE.rglob("*.py") if file.name != "__init__.py")
    return {
        ".".join(("mlx_distill", *file.relative_to(PACKAGE).with_suffix("").parts)): file
        for file in files
    }


@cache
def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def imported(file: Path) -> set[str]:
    """Return the modules of the package that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{file} has a relative import"
            found |= {node.module, *(f"{node.module}.{name.name}" for name in node.names)}
    return found & set(modules())


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_point_downward(module: str) -> None:
    upward = [other for other in imported(modules()[module]) if level(other) < level(module)]
    assert not upward, f"{module} imports from above: {', '.join(sorted(upward))}"


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("__init__.py")), ids=str)
def test_packages_of_the_package_hold_no_code(file: Path) -> None:
    if file.parent != PACKAGE:
        assert len(tree_of(file).body) == 1, "a docstring, no more"


def test_private_names_of_mlx_lm_are_in_one_file() -> None:
    """Any attribute of mlx-lm that begins with an underscore may go with the next release."""
    for module, file in modules().items():
        for node in ast.walk(tree_of(file)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mlx_lm"):
                private = [name.name for name in node.names if name.name.startswith("_")]
                assert not private or module == "mlx_distill.compat", f"{module}: {private}"
