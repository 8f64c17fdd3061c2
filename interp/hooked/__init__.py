"""TransformerLens hook points over an open_clip vision tower.

Importing this package imports TransformerLens, which takes seconds; commands do so in functions.
"""

from interp.hooked.cache import TowerCache
from interp.hooked.rows import AttentionRows
from interp.hooked.tower import HookedVisionTransformer, TowerConfig

__all__ = ["AttentionRows", "HookedVisionTransformer", "TowerCache", "TowerConfig"]
