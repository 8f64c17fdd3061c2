"""Notebooks hold no output, run from top to bottom, show what they say, leave nothing behind."""

import json
import os
import re
import subprocess
import sys

import nbformat
import pytest
from nbclient import NotebookClient

from tests.conftest import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
TRAIN = f"{sys.executable} -m superclip.train --train-num-samples 256 --batch-size 32"
SUPERCLIP = f"{TRAIN} --head-vocab seen --out ../logs/notebooks/superclip"
QUICK = {"NUM": 220, "DRAWS": 199}


def test_there_are_notebooks():
    assert [path.stem[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04", "05"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_stripped_and_settings_come_first(path):
    cells = nbformat.read(path, 4).cells
    for cell in cells:
        assert not cell.get("outputs") and cell.get("execution_count") is None
        assert cell.cell_type == "markdown" or not re.search(
            r"^(def|class|for .*:$|try)", cell.source
        )
    assert cells[0].cell_type == "markdown" and "os.environ.get" in cells[1].source
    assert sum(cell.cell_type == "markdown" for cell in cells) >= 5


class Ran:
    """A notebook executed in a folder of its own: its texts, its pictures, what it wrote."""

    def __init__(self, number, folder, monkeypatch, run, **settings):
        (path,) = (p for p in NOTEBOOKS if p.stem.startswith(number))
        notebook = nbformat.read(path, 4)
        notebook.cells[1].source += "".join(f"\n{k} = {v!r}" for k, v in settings.items())
        monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=":")
        for name in ("SUPERCLIP_CKPT", "SUPERCLIP_AGAINST", "SUPERCLIP_DATA", "SUPERCLIP_COURSE"):
            monkeypatch.delenv(name, raising=False)
        (folder / "notebooks").mkdir()
        self.text, data = run(notebook, folder / "notebooks")
        self.text += "\n".join(d.get("text/plain", "") for d in data)
        self.pictures = sum("image/png" in d for d in data)
        self.widgets = sum("application/vnd.jupyter.widget-view+json" in d for d in data)
        self.logs = folder / "logs" / "notebooks"
        assert not list((folder / "notebooks").iterdir())


def by_kernel(notebook, folder):
    """As Jupyter runs it: texts that were printed, and what was displayed."""
    resources = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=280, kernel_name="python3", resources=resources).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "\n".join(o.get("text", "") for o in outputs), [o.get("data", {}) for o in outputs]


def by_shell(notebook, folder):
    """Cell by cell in a shell of IPython, without the sockets of a kernel: for the quick suite."""
    cells = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    words = [sys.executable, str(ROOT / "tests" / "run_cells.py")]
    given = {"input": json.dumps(cells), "capture_output": True, "text": True, "timeout": 280}
    done = subprocess.run(words, cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"}, **given)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    shown = json.loads(done.stdout.splitlines()[-1])
    return "\n".join(shown["texts"]), shown["data"]


@pytest.mark.slow
def test_attention_maps(tmp_path, monkeypatch):
    ran = Ran("01", tmp_path, monkeypatch, by_shell, **QUICK, TRAIN=SUPERCLIP)
    assert ran.pictures == 5 and ran.widgets == 1  # a shell shows the slider's picture itself
    champion = json.loads((ran.logs / "superclip/sweep/findings.json").read_text())["champion"][
        "head"
    ]
    assert f"The champion {champion}, best of 16 heads on" in ran.text
    assert "torch.Size([1, 4, 26, 26])" in ran.text and "(4, 4, 25)" in ran.text


@pytest.mark.slow
def test_sweep_and_statistics(tmp_path, monkeypatch):
    ran = Ran("02", tmp_path, monkeypatch, by_shell, **QUICK, TRAIN=SUPERCLIP, UNTRAINED=1)
    findings = json.loads((ran.logs / "superclip/sweep/findings.json").read_text())
    passed = sum(row["discovery_p_adjusted"] <= 0.05 for row in findings["heads"])
    assert ran.pictures == 2
    assert f"{passed} of 16 heads are significant on discovery" in ran.text
    assert f"discovery: {passed} of 16 heads significant at .05 (max-T, 199" in ran.text


@pytest.mark.slow
def test_superclip_beside_clip(tmp_path, monkeypatch):
    ran = Ran("04", tmp_path, monkeypatch, by_shell, **QUICK, TRAIN=TRAIN, UNTRAINED=1)
    assert "heads matched by" in ran.text
    assert ran.pictures == 2 and ran.text.count(", best of 16 heads on") == 2
    assert "descriptive" in ran.text and "retrieval" in ran.text
    (report,) = (ran.logs / "arms/superclip").glob("compare_*.json")
    assert json.loads(report.read_text())["paired"]


def test_grounding_appears(tmp_path, monkeypatch):
    train = SUPERCLIP.replace("/superclip", "/course")
    ran = Ran("05", tmp_path, monkeypatch, by_shell, **QUICK, TRAIN=train, UNTRAINED=1, EVERY=4)
    assert ran.pictures == 1 and re.search(r"step 4 +step 8 +appears", ran.text)
    last = json.loads((ran.logs / "course/sweep-epoch_1/findings.json").read_text())
    assert f"champion {last['champion']['head']} " in ran.text


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "number, pictures, says",
    [
        ("01", 4, r"The champion L\dH\d, best of 16 heads on 505 discovery pictures"),
        ("02", 2, r"champion minus it|16 heads are significant on discovery"),
        ("03", 1, r"mean ablation of the champion L\dH\d \(n = 304\)"),
        ("04", 2, r"descriptive"),
        ("05", 1, r"step 100 +step 200 +step 300 +step 400 +step 500 +step 600 +appears"),
    ],
)
def test_as_it_stands(number, pictures, says, tmp_path, monkeypatch):
    ran = Ran(number, tmp_path, monkeypatch, by_kernel)
    assert ran.pictures == pictures and re.search(says, ran.text)
