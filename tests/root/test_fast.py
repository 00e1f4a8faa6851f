"""The fast part runs where PyTorch is not installed."""

import ast
from pathlib import Path

import pytest

from tests.conftest import FAST

MISSING = {"torch", "peft", "diffusers"}  # diffusers is there, but has no models without PyTorch


@pytest.mark.parametrize("name", [f"{room}/{module}" for room, modules in sorted(FAST.items()) for module in modules])
def test_a_fast_module_is_there_and_imports_no_pytorch(name):
    tree = ast.parse((Path(__file__).parents[1] / name).read_text(encoding="utf-8"))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not {name.split(".")[0] for name in names} & MISSING
    assert "tests.pictures" not in names
