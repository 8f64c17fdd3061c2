"""Tensors that took long to compute, kept on disk for those who ask for exactly the same."""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from superclip.ops.world import World

Kept = tuple[dict[str, Tensor], dict[str, Any]]
"""Tensors, and plain values that belong to them."""


def cached(
    folder: Path, facts: Mapping[str, Any], compute: Callable[[], Kept], world: World | None = None
) -> Kept:
    """What `compute` gives for these facts: from the folder if it is there, else computed and kept.

    A file is named by the sha256 of its facts, and is believed only if it repeats those facts and
    its content has the sha256 that it states. Any other is computed again, and so is one that can't
    be read; a folder that can't be written keeps nothing. All of this is said on stderr.

    Args:
        facts: everything that decides the result, as plain values.
        compute: tensors and plain values; called on every rank, or on none.
    """
    world = world or World()
    text = json.dumps(facts, sort_keys=True)
    path = folder / f"{hashlib.sha256(text.encode()).hexdigest()}.safetensors"
    held = _load(path, text)
    if all(world.gather_objects(held is not None)):
        assert held is not None
        return held
    kept = compute()
    if world.is_main:
        _save(path, text, *kept)
    return kept


def _load(path: Path, facts: str) -> Kept | None:
    """What a file holds, if it is whole and of these facts."""
    try:
        with safe_open(path, "pt") as file:
            said = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        return None
    except (SafetensorError, OSError) as error:
        _say(f"{path} is damaged ({error}): computed again")
        return None
    plain = said.get("plain", "")
    if said.get("facts") != facts:
        _say(f"{path} belongs to something else: computed again")
        return None
    if said.get("content") != _content(tensors, plain):
        _say(f"{path} does not match its checksum: computed again")
        return None
    return tensors, json.loads(plain)


def _save(path: Path, facts: str, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
    plain = json.dumps(values)
    said = {"facts": facts, "plain": plain, "content": _content(tensors, plain)}
    own = {k: t.cpu().clone(memory_format=torch.contiguous_format) for k, t in tensors.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".features-") as scratch:
            part = Path(scratch) / path.name
            save_file(own, part, said)
            part.replace(path)
    except (SafetensorError, OSError) as error:
        _say(f"{path} can't be written ({error}): not kept")


def _content(tensors: Mapping[str, Tensor], plain: str) -> str:
    digest = hashlib.sha256(plain.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def _say(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)
