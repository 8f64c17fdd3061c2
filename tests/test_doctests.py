"""Examples in docstrings are true."""

import doctest
import importlib
import pkgutil

import pytest

import interp
import superclip

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


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0
