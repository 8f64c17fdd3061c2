"""Open a trained vision tower and ask what its heads look at: `from interp import load, sweep`."""

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from interp.api import ablate, circuit, compare, course, lens, load, patch, relevance, sweep

__all__ = ["ablate", "circuit", "compare", "course", "lens", "load", "patch", "relevance", "sweep"]


def __getattr__(name: str) -> Any:
    """A function of `interp.api`, opened at first use, so that `--help` of a command is quick."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from interp import api

    return getattr(api, name)


class _Package(ModuleType):
    """Commands and functions share names: `interp.sweep` is the function, also once the module of
    the command is loaded (`from interp.sweep import ...`), which the import system would put in its
    place."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in __all__ and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
