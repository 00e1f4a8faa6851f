"""The notebooks of examples/, every cell executed as it stands there."""

import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted(path.name for path in (ROOT / "examples").glob("*.ipynb"))


@pytest.fixture
def checkout(tmp_path):
    """The package and the notebooks in a folder of their own, because the notebooks write beside themselves."""
    for name in ("spo_jax", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "examples").mkdir()
    for name in NOTEBOOKS:
        shutil.copy(ROOT / "examples" / name, tmp_path / "examples")
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_every_cell_runs(checkout, name):
    folder = checkout / "examples"
    notebook = nbformat.read(folder / name, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)  # outputs are not kept in git
    client = NotebookClient(notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(folder)}})
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    shown = [kind for output in outputs for kind in output.get("data", {})]
    assert "image/png" in shown
    assert not any(output["output_type"] == "error" for output in outputs)
