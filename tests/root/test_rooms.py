"""A module imports only from its own room and from rooms above it, as ``docs/architecture.md`` has them."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "spo_jax"
ROOMS = (
    *("errors", "rng", "types", "files", "images"),
    *("distributed", "kernels", "models", "diffusion", "preference", "formats", "data", "sampling", "evaluation"),
    *("labelling", "runs", "spm", "spo", "dpo", "methods", "planning", "cli", "emoji"),
    *("main", "generate", "evaluate", "label", "pair_accuracy", "export", "prepare", "fetch", "plan"),
)
MODULES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE / "configs")


def room_of(module):
    """The place in ``ROOMS`` of ``spo_jax.formats.hub``, or of the package itself."""
    parts = module.split(".")
    return ROOMS.index(parts[1]) if len(parts) > 1 else -1


def imported(path):
    """Modules of the package that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "spo_jax":
            yield from (f"spo_jax.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("spo_jax."):
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("spo_jax"))


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_a_module_imports_from_above(path):
    own = room_of(".".join(("spo_jax", *path.with_suffix("").parts)).removesuffix(".__init__"))
    below = [module for module in imported(PACKAGE / path) if room_of(module) > own]
    assert not below
