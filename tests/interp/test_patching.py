"""Activation patching: every cell against a whole forward pass, the pairs, and the command."""

import numpy as np
import pytest
import torch
from open_clip.transformer import QuickGELU, VisionTransformer
from reference import patching as naive

from interp.causal.patching import (
    DIRECTIONS,
    GROUPS,
    PARTS,
    margin_directions,
    patch_batch,
    shares,
)
from interp.hooked import HookedVisionTransformer
from superclip.errors import UserError

TOWERS = {
    "tok": {},
    "not square, LayerScale, QuickGELU": {
        "image_size": (24, 16), "ls_init_value": 0.7, "act_layer": QuickGELU, "no_ln_pre": True,
    },
    "avg": {"pool_type": "avg"},
    "avg, norm after pool, a rest at the edge": {
        "pool_type": "avg", "final_ln_after_pool": True, "image_size": (20, 27),
    },
}  # fmt: skip


def build(dtype=torch.float64, **changes):
    """A tower in which every parameter matters."""
    options = {
        "image_size": 24, "patch_size": 8, "width": 16, "layers": 2, "heads": 2,
        "mlp_ratio": 3.0, "output_dim": 12,
    }  # fmt: skip
    visual = VisionTransformer(**(options | changes))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in visual.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scale = 0.3 if parameter.ndim == 1 else 1.5 / parameter[0].numel() ** 0.5
            is_gain = "gamma" in name or ("ln_" in name and name.endswith("weight"))
            parameter.copy_(float(is_gain) + scale * noise)
    return visual.to(dtype).eval()


def some_pairs(visual, n=3):
    """Pictures that differ in one to three patches, and directions."""
    generator = torch.Generator().manual_seed(1)
    rows, columns = visual.grid_size
    clean = torch.randn(n, 3, *visual.image_size, generator=generator)
    objects = torch.zeros(n, rows * columns, dtype=torch.bool)
    for pair in range(n):
        objects[pair, torch.randperm(rows * columns, generator=generator)[: pair + 1]] = True
    grid = objects.unflatten(1, (rows, columns))
    changed = grid.repeat_interleave(8, 1).repeat_interleave(8, 2)
    noise = torch.randn(*clean.shape, generator=generator)
    corrupted = clean.clone()
    part = corrupted[:, :, : 8 * rows, : 8 * columns]
    part[:] = torch.where(changed[:, None], noise[:, :, : 8 * rows, : 8 * columns], part)
    directions = torch.randn(n, 12, generator=generator)
    dtype = visual.conv1.weight.dtype
    return clean.to(dtype), corrupted.to(dtype), objects, directions.to(dtype)


@pytest.mark.parametrize("changes", TOWERS.values(), ids=TOWERS)
def test_every_cell_is_a_whole_forward_pass(changes):
    visual = build(**changes)
    clean, corrupted, objects, directions = some_pairs(visual)
    tower = HookedVisionTransformer(visual)
    found = patch_batch(tower, clean, corrupted, objects, directions, every_patch=True)
    with torch.no_grad():
        for pair in range(len(clean)):
            given = clean[pair], corrupted[pair], objects[pair], directions[pair]
            expected, n = naive.cells(visual, *given), 0
            for direction, kind in enumerate(DIRECTIONS):
                for layer, head in np.ndindex(found.heads.shape[3:]):
                    for part, name in enumerate(PARTS):
                        value = found.heads[pair, direction, part, layer, head]
                        assert abs(value - expected[kind, "heads", name, layer, head]) < 1e-10
                        n += 1
                for entry in range(found.groups.shape[2]):
                    for group, name in enumerate(GROUPS):
                        value = found.groups[pair, direction, entry, group]
                        assert abs(value - expected[kind, "groups", entry, name]) < 1e-10
                        n += 1
                    for patch in range(objects.shape[1]):
                        value = found.patches[pair, direction, entry, patch]
                        assert abs(value - expected[kind, "patches", entry, patch]) < 1e-10
                        n += 1
            assert n == len(expected) and max(map(abs, expected.values())) > 1e-2
