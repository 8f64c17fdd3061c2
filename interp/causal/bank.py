"""Ablated image embeddings, computed once and kept on disk; every effect is computed from them.

A bank is a folder: `bank.json` says what it is of, `part-00000.safetensors` and so on hold a chunk
of images each. A feature is kept as its difference from the intact one, in float16 and in units of
the intact norm, so that the rounding (2**-11) is relative to what the removal does, not to the
feature. Parts are written whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from interp.causal.sweep import MAX_MEMORY, AblatedBatch, ablate_batch
from interp.causal.units import Ablation, Images, Unit
from interp.hooked import HookedVisionTransformer
from superclip.errors import UserError, replace_text, replacing

SCHEMA = 2

Pictures = Callable[[Sequence[Sequence[int]]], Iterable[Images]]
"""For lists of image rows the normalised images, one batch a list."""


@dataclass(frozen=True, eq=False)
class BankKey:
    """What a bank is of; all of it must agree when a bank is opened again.

    Attributes:
        checkpoint_sha256: of the weights.
        image_ids: public ids, in the order of rows.
        mean_over: for `mean`, ids of the images that the means are of. Their values, which depend
            on the machine in the last digits, are not compared.
        patches: whether the means of the final patch tokens are kept too.
        donors: for `resample`, as `derangements` gives them.
    """

    checkpoint_sha256: str
    image_ids: Sequence[str]
    ablation: Ablation
    units: Sequence[Unit]
    mean_over: Sequence[str] | None = None
    donors: Int[np.ndarray, "draw image"] | None = None
    patches: bool = False

    @property
    def facts(self) -> dict[str, Any]:
        """The key as plain values; lists of ids and rows by their hash."""
        donors = None if self.donors is None else "\n".join(map(str, self.donors.tolist()))
        mean_over = None if self.mean_over is None else "\n".join(self.mean_over)
        return {
            "schema": SCHEMA,
            "checkpoint_sha256": self.checkpoint_sha256,
            "images": len(self.image_ids),
            "image_ids_sha256": _sha256("\n".join(self.image_ids)),
            "kind": self.ablation.kind,
            "tokens": self.ablation.tokens,
            "mean_over_sha256": _sha256(mean_over),
            "draws": 1 if self.donors is None else len(self.donors),
            "donors_sha256": _sha256(donors),
            "patches": self.patches,
            # Pairs, not a mapping: their order is that of the axis.
            "units": [[unit.name, [*map(str, unit.heads), *unit.mlps]] for unit in self.units],
        }

    def check(self) -> None:
        """Raises UserError where ids or donors do not go with the ablation."""
        kind, rows = self.ablation.kind, np.arange(len(self.image_ids))
        for given, name, of in (
            (self.mean_over, "mean_over", "mean"),
            (self.donors, "donors", "resample"),
        ):
            if (given is not None) != (kind == of):
                raise UserError(f"{kind} ablation {'needs' if kind == of else 'takes no'} {name}")
        for donors in () if self.donors is None else self.donors:
            if not np.array_equal(np.sort(donors), rows) or (donors == rows).any():
                raise UserError(
                    "a draw of donors must give every image another one, and each image once, as "
                    "derangements() does"
                )


class AblationBank:
    """Features of every image without each unit, on disk; made by `AblationBank.open`.

    Attributes:
        folder: Where it lies.
        facts: What it is of (`BankKey.facts`), and the images of a part, `chunk`.
        missing: Numbers of the parts that are yet to be computed.
    """

    def __init__(self, folder: Path, facts: dict[str, Any], key: BankKey | None) -> None:
        self.folder, self.facts, self._key = folder, facts, key
        self.missing = [n for n in range(len(self._chunks)) if not self._is_whole(n)]

    @staticmethod
    def open(
        folder: Path, key: BankKey | None = None, *, chunk: int = 32, overwrite: bool = False
    ) -> AblationBank:
        """The bank in a folder, new or begun; parts that are damaged are said and count as missing.

        Args:
            key: What the bank must be of; None opens whatever is there, for reading.
            chunk: Images of a part, and of a batch; a bank that was begun keeps its own.
            overwrite: Delete a bank of something else that stands there, or a damaged one.

        Raises:
            UserError: The folder holds a bank of something else (the first difference is named), or
                none and there is no key; or donors or ids do not go with the ablation.
        """
        if key is None:
            return AblationBank(folder, _manifest(folder), None)
        key.check()
        facts, path = {"chunk": chunk} | key.facts, folder / "bank.json"
        if path.exists():
            try:
                held = _manifest(folder)
                if unlike := [name for name in key.facts if held.get(name) != facts[name]]:
                    raise UserError(
                        f"{folder} holds a bank of something else ({unlike[0]} differs); name "
                        "another folder, or overwrite it"
                    )
                return AblationBank(folder, held, key)
            except UserError:
                if not overwrite:
                    raise
            path.unlink()  # before the parts, which are nobody's without it
            for part in folder.glob("part-*.safetensors"):
                part.unlink()
        folder.mkdir(parents=True, exist_ok=True)
        replace_text(path, json.dumps(facts, indent=1, sort_keys=True) + "\n")
        return AblationBank(folder, facts, key)

    @property
    def units(self) -> list[str]:
        """Names, in the order of the axis."""
        return [name for name, _ in self.facts["units"]]

    @property
    def _chunks(self) -> list[range]:
        n, size = self.facts["images"], self.facts["chunk"]
        return [range(start, min(start + size, n)) for start in range(0, n, size)]

    def compute(
        self,
        tower: HookedVisionTransformer,
        pictures: Pictures,
        max_memory: int = MAX_MEMORY,
        wrote: Callable[[], object] = bool,
    ) -> None:
        """Compute and write the missing parts; one that is written survives an interruption.

        Args:
            tower: Of the checkpoint that the bank is of.
            pictures: Gives the images of the parts, and of their donors; as it likes, ahead of
                time.
            wrote: Called after each part.

        Raises:
            UserError: As `ablate_batch`, or a feature is not finite.
        """
        key = self._key
        assert key is not None, "opened for reading"
        if not self.missing:
            return
        rows = [list(self._chunks[number]) for number in self.missing]
        donors = () if key.donors is None else key.donors
        others = [pictures([draw[part].tolist() for part in rows]) for draw in donors]
        for images, *given in zip(pictures(rows), *others, strict=True):
            number = self.missing[0]
            assert len(images) == len(self._chunks[number]), "pictures gave another batch"
            found = ablate_batch(
                tower, images, key.ablation, key.units, given, max_memory, patches=key.patches
            )
            self._write(number, found, tower.cfg.embed_dim)
            del self.missing[0]
            wrote()

    def read(
        self, unit: str | None = None, draw: int = 0, what: str = "features"
    ) -> Float[Tensor, "image value"]:
        """Features of all images without the unit, or intact (None); float32, not normalised.

        Args:
            what: `features`, or `patches` for the means of the patch tokens.

        Raises:
            UserError: The bank is not complete, or has no such unit or draw, or no patches.
        """
        self._check_complete()
        if what == "patches" and not self.facts["patches"]:
            raise UserError(f"{self.folder} holds no patch means; compute it anew with them")
        if unit is None:
            return torch.cat([file.get_tensor(what) for file in self._files()])
        if unit not in self.units or not 0 <= draw < self.facts["draws"]:
            raise UserError(f"{self.folder} holds no unit {unit!r} in a draw {draw}")
        number, features = self.units.index(unit), []
        for file in self._files():
            intact = file.get_tensor(what)
            change = file.get_slice(f"{what} change")[draw : draw + 1, number : number + 1][0, 0]
            features.append(intact + _norm(intact) * change.float())
        return torch.cat(features)

    @property
    def removed(self) -> Float[Tensor, "unit image"]:
        """`AblatedBatch.removed` of all images."""
        self._check_complete()
        return torch.cat([file.get_tensor("removed") for file in self._files()], dim=1)

    def _check_complete(self) -> None:
        if self.missing:
            raise UserError(
                f"{self.folder}: {len(self.missing)} of {len(self._chunks)} parts are missing; "
                "compute them first"
            )

    def _files(self) -> Iterable[Any]:
        for number in range(len(self._chunks)):
            with safe_open(self._path(number), "pt") as file:
                yield file

    def _path(self, number: int) -> Path:
        return self.folder / f"part-{number:05d}.safetensors"

    def _metadata(self, number: int, tensors: dict[str, Tensor]) -> dict[str, str]:
        """Ties a part to its bank, its place and its content; one entry, as safetensors orders
        several at random."""
        digest = hashlib.sha256()
        for name in sorted(tensors):
            tensor = tensors[name]
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.numpy().tobytes())
        facts = hashlib.sha256(json.dumps(self.facts, sort_keys=True).encode()).hexdigest()
        return {"part": f"{number} of {facts}, {digest.hexdigest()}"}

    def _is_whole(self, number: int) -> bool:
        path = self._path(number)
        if not path.exists():
            return False
        try:
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                said = file.metadata()
        except (SafetensorError, OSError) as error:
            _say(f"{path} is damaged ({error}): computed again")
            return False
        if said != self._metadata(number, tensors):
            _say(f"{path} is not what it should be: computed again")
            return False
        return True

    def _write(self, number: int, found: AblatedBatch, embed: int) -> None:
        tensors = {"removed": found.removed.float()}
        for what, part in (("features", slice(embed)), ("patches", slice(embed, None))):
            intact = found.intact[:, part].float()
            if intact.shape[1]:
                change = found.features[..., part].float() - intact
                tensors |= {what: intact, f"{what} change": (change / _norm(intact)).half()}
        if not all(tensor.isfinite().all() for tensor in tensors.values()):
            raise UserError(
                f"{self._path(number)}: features are not finite; the model has diverged"
            )
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        path = self._path(number)
        with replacing(path) as part:
            save_file(tensors, part, self._metadata(number, tensors))


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        facts = json.loads((folder / "bank.json").read_text())
    except FileNotFoundError:
        raise UserError(f"{folder} holds no ablation bank (bank.json)") from None
    except ValueError as error:
        raise UserError(
            f"{folder / 'bank.json'} can't be read ({error}); delete the folder"
        ) from None
    if not isinstance(facts, dict) or facts.get("schema") != SCHEMA:
        raise UserError(f"{folder} holds a bank of another schema; this version reads {SCHEMA}")
    sizes = [facts.get("chunk"), facts.get("images")]
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        raise UserError(f"{folder / 'bank.json'} has no sizes; delete the folder")
    return facts


def _norm(features: Float[Tensor, "*rows embed"]) -> Float[Tensor, "*rows 1"]:
    return torch.linalg.vector_norm(features, dim=-1, keepdim=True)


def _sha256(text: str | None) -> str | None:
    return None if text is None else hashlib.sha256(text.encode()).hexdigest()


def _say(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)
