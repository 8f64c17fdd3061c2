"""Examples in docstrings are true."""

import doctest
import importlib
import pkgutil

import pytest

import interp
import superclip
from tests.conftest import command

MODULES = [
    module.name
    for package in (superclip, interp)
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
]


def test_there_are_examples():
    found = [e for m in MODULES for e in _examples(importlib.import_module(m))]
    assert len(found) >= 5


def _examples(module):
    return [test for test in doctest.DocTestFinder().find(module) if test.examples]


@pytest.mark.parametrize("name", sorted(set(MODULES) - {"interp.api"}))
def test_examples(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_examples_of_the_python_api(tmp_path):
    words = "--train-num-samples 2560 --batch-size 32 --head-vocab seen --save-every 40 --lr 1e-3"
    done = command("superclip.train", *words.split(), "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    names = {"ckpt": tmp_path / "final_epoch.pt"}
    module = importlib.import_module("interp.api")
    module.sweep(names["ckpt"], num=220, draws=199, untrained=1)
    found = doctest.testmod(module, extraglobs=names, optionflags=doctest.ELLIPSIS)
    assert found.failed == 0 and found.attempted >= 12
