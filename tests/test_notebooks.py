"""Notebooks hold no output and run from top to bottom."""

import shutil

import nbformat
import pytest
from nbclient import NotebookClient

from tests.conftest import ROOT
from tests.interp.sweeps import small_sweep

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_stripped(path):
    for cell in nbformat.read(path, 4).cells:
        assert not cell.get("outputs") and cell.get("execution_count") is None


def test_attention_maps_run_on_a_checkpoint_and_its_sweep(tiny_run, tmp_path, monkeypatch):
    shutil.copy(tiny_run / "final_epoch.pt", tmp_path)
    small_sweep().save(tmp_path / "sweep")
    monkeypatch.setenv("SUPERCLIP_CKPT", str(tmp_path / "final_epoch.pt"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(ROOT / "notebooks" / "01_attention_maps.ipynb", 4)
    resources = {"metadata": {"path": str(ROOT / "notebooks")}}
    NotebookClient(notebook, timeout=240, kernel_name="python3", resources=resources).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 4
    assert any("champion of 6 heads is L1H2" in output.get("text", "") for output in outputs)
