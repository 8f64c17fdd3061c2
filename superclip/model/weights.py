"""Checkpoint files: read without executing anything, checked, and turned back into a model.

`final_epoch.pt` holds weights and facts only: `state_dict` (exactly open_clip's keys),
`token_head`, `model_config`, `preprocess`, `config`, `epoch`, `schema`. `epoch_K.pt` and
`step_N.pt` hold the same and what training needs to go on.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import sys
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from open_clip.model import resize_pos_embed, resize_text_pos_embed
from torch import Tensor

from superclip.config import TrainConfig, train_config
from superclip.data.loader import Preprocess
from superclip.errors import UserError, check_checkpoint
from superclip.model.factory import (
    activation_name,
    build_clip,
    load_pretrained,
    model_config,
    preprocess_for,
    unlike_published,
)
from superclip.model.superclip import SuperCLIP, TokenHead

SCHEMA = 1
NUMBERED = re.compile(r"(epoch|step)_(\d+)\.pt")


def read_tensors(path: Path, check: bool = True) -> Any:
    """`torch.load` with `weights_only=True`; nothing in the file is executed.

    Args:
        check: compare the file with its checksums first.

    Raises:
        UserError: if the file is missing, cut, or holds anything but tensors and plain values.
    """
    check_checkpoint(path)
    if check and (damage := damage_of(path)) is not None:
        raise UserError(f"{path} is not a readable checkpoint: {damage}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"{path} holds pickled objects beside tensors; it is refused, nothing in it was run"
        ) from None
    except (RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{path} is not a readable checkpoint: {damage_of(path) or first[:160]}"
        ) from None


def damage_of(path: Path) -> str | None:
    """What is wrong with a checkpoint's container; None if every part matches its checksum.

    torch writes zip archives with a CRC-32 for each part but does not look at it when reading.
    Files in the format before (no zip) have none.
    """
    with path.open("rb") as file:
        if file.read(2) == b"\x80\x02":
            return None
    try:
        with zipfile.ZipFile(path) as archive:
            part = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError, zlib.error) as error:
        return f"it is cut short, damaged, or no checkpoint ({error})"
    return None if part is None else f"its part {part} does not match its checksum"


@dataclass(frozen=True)
class Checkpoint:
    """A trained model and what is known about it.

    Attributes:
        path: the file; of a published tag, its name.
        model: in evaluation mode, on the CPU.
        config: the run's configuration; None for plain open_clip weights.
        facts: `data_sha256`, `init_sha256`, `activation`, ... as plain values.
    """

    path: Path
    sha256: str
    model: SuperCLIP
    model_config: dict[str, Any]
    preprocess: Preprocess
    config: TrainConfig[Any] | None
    epoch: int
    facts: dict[str, Any]

    @cached_property
    def weights_sha256(self) -> str:
        """Of the CLIP's weights, whatever file holds them; taken when first asked for."""
        return state_sha256(self.model.clip.state_dict())


def load_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint of this project.

    Raises:
        UserError: if it is no such checkpoint, of another schema, or its tensors do not fit its
            model.
    """
    content = read_tensors(path)
    if not isinstance(content, dict) or "model_config" not in content:
        raise UserError(
            f"{path} is not a superclip checkpoint; plain open_clip weights need --model NAME"
        )
    if content.get("schema") != SCHEMA:
        raise UserError(
            f"{path} has checkpoint schema {content.get('schema')}; this version reads schema "
            f"{SCHEMA}"
        )
    missing = {"state_dict", "token_head", "preprocess", "config", "epoch", "facts"} - set(content)
    if missing:
        raise UserError(f"{path} lacks {', '.join(sorted(missing))}; it is no whole checkpoint")
    try:  # tensors and plain values, but of whatever shape somebody gave them
        config = train_config(content["config"], str(path))
        clip = build_clip(content["model_config"])
        preprocess = Preprocess.from_dict(content["preprocess"])
        head = token_head_from(content["token_head"])
        model = SuperCLIP(clip, preprocess.mean, preprocess.std, head)
        load_into(clip, content["state_dict"], path)
        sides = np.atleast_1d(cast(Any, clip).visual.image_size).tolist()
        assert set(sides) == {preprocess.size}, f"pictures of {preprocess.size} for {sides}"
        facts = dict(content["facts"])
        assert isinstance(facts["activation"], str) and isinstance(facts["data_name"], str)
        assert len(preprocess.mean) == len(preprocess.std) == 3, "preprocess of three channels"
        assert isinstance(content["epoch"], int), f"epoch {content['epoch']!r}"
    except UserError as error:
        told = str(error)
        raise UserError(told if str(path) in told else f"{path}: {told}") from None
    except (AssertionError, AttributeError, LookupError, TypeError, RuntimeError) as error:
        what = f"{type(error).__name__}: {error}".splitlines()[0][:160]
        raise UserError(f"{path} is no checkpoint that training wrote ({what})") from None
    return Checkpoint(
        path,
        file_sha256(path),
        model.eval(),
        content["model_config"],
        preprocess,
        config,
        content["epoch"],
        facts,
    )


def begin_with(
    clip: Any, path: Path, config: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Load a run's last weights into a model of another resolution or context length.

    Position embeddings alone change: the vision tower's by bicubic interpolation with antialias in
    2-D, the class token's place as it is; the text tower's linearly (open_clip's functions, as
    CLIPA's code has it). A table of the same size is taken as it is.

    Args:
        config: the model's configuration, for the message if it is another model's.

    Returns:
        `mean` and `std` of the pictures that the run saw, and the state of its token head.

    Raises:
        UserError: if the file is no checkpoint, or of another architecture.
    """
    path = begun_from(path)
    content = read_tensors(path)
    ours = isinstance(content, dict) and content.get("schema") == SCHEMA
    if not ours or not {*content} >= BROUGHT:
        raise UserError(f"--init-from {path} is no checkpoint of this version (schema {SCHEMA})")
    state, held = dict(content["state_dict"]), content["model_config"]
    if odd := other_architecture(config, held):
        raise UserError(
            f"--init-from {path} is of another architecture ({odd}); name its --model "
            f"{content['config']['model']['model']}"
        )
    try:
        resize_pos_embed(state, clip)
        resize_text_pos_embed(state, clip)
    except (AssertionError, AttributeError, RuntimeError) as error:
        raise UserError(f"--init-from {path}: positions can't be resized ({error})") from None
    load_into(clip, state, path)
    known = {name: content["preprocess"][name] for name in ("mean", "std")}
    return known, content["token_head"]


def other_architecture(one: dict[str, Any], other: dict[str, Any]) -> str:
    """In what two configurations differ beside resolution and length; empty where they don't."""
    for part in ("vision_cfg", "text_cfg", "model"):
        both = [{k: v for k, v in c.items() if k in AS_A_WHOLE} for c in (one, other)]
        if part != "model":
            both = [{k: v for k, v in c[part].items() if k not in SIZES} for c in (one, other)]
        keys = both[0].keys() | both[1].keys()
        if odd := sorted(k for k in keys if both[0].get(k) != both[1].get(k)):
            return f"{part}: {', '.join(odd)}"
    return ""


def begun_from(path: Path) -> Path:
    """The checkpoint that `--init-from` means: a file, or the last of a run's folder.

    Raises:
        UserError: if there is none.
    """
    if path.is_dir() and path != Path():
        numbered = [p for p in [path / "final_epoch.pt"] if p.is_file()] or resumable(path)
        if numbered:
            return numbered[-1]
    if not path.is_file():
        raise UserError(f"--init-from {path} is no checkpoint and no run's folder")
    return path


AS_A_WHOLE = "embed_dim", "quick_gelu", "custom_text", "multimodal_cfg"
"""Of a model's configuration, what concerns both towers."""
SIZES = "image_size", "context_length", "tokenizer"
"""What a later stage may change."""
BROUGHT = {"state_dict", "model_config", "preprocess", "config", "token_head"}


def open_checkpoint(path: Path, model: str | None = None) -> Checkpoint:
    """A checkpoint of this project; with `model`, plain open_clip weights where it is none.

    Raises:
        UserError: as `load_checkpoint` and `load_plain`.
    """
    if model is None or (path.suffix != ".safetensors" and brings_config(path)):
        return load_checkpoint(path)
    return load_plain(model, None, path)


def brings_config(path: Path) -> bool:
    """Whether a file says itself of what architecture and preprocessing it is.

    Raises:
        UserError: as `read_tensors`.
    """
    content = read_tensors(path, check=False)
    return isinstance(content, dict) and "model_config" in content


def load_plain(model: str, pretrained: str | None = None, path: Path | None = None) -> Checkpoint:
    """Plain open_clip weights: a published tag, or a local file.

    Raises:
        UserError: unless exactly one of the two is given, or for what `load_pretrained` refuses.
    """
    if (pretrained is None) == (path is None):
        raise UserError("--model needs either --pretrained TAG or --ckpt FILE of open_clip weights")
    config = model_config(model)
    clip = build_clip(config)
    tag = load_pretrained(clip, model, config, pretrained or str(path))
    refuse_nonfinite(clip.state_dict(), path or f"{model} {pretrained}")
    preprocess = preprocess_for(config, None, tag)
    if odd := unlike_published(preprocess, tag):
        print(f"warning: {odd}", file=sys.stderr)
    return Checkpoint(
        path or Path(f"{model}-{pretrained}"),
        state_sha256(clip.state_dict()),
        SuperCLIP(clip, preprocess.mean, preprocess.std).eval(),
        config,
        preprocess,
        None,
        0,
        {"model": model, "activation": activation_name(clip.visual)},
    )


def load_into(module: torch.nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """`load_state_dict`, strict, with one line for tensors of another architecture."""
    texts = ("token_embedding", "text_projection", "transformer.", "text.")
    sees = any(name.startswith("visual.") for name in state)
    if sees and not any(name.startswith(texts) for name in state):
        raise UserError(f"{path} has no text tower; give a checkpoint of a whole CLIP model")
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        lines = str(error).strip().splitlines()
        raise UserError(
            f"{path}: the weights are of another architecture: {' '.join(lines[:2])[:240]}"
        ) from None
    refuse_nonfinite(state, path)


def refuse_nonfinite(state: Mapping[str, Tensor], path: Path | str) -> None:
    """Raises UserError naming the first weight that is NaN or infinite."""
    for name, tensor in state.items():
        if not bool(tensor.isfinite().all()):
            raise UserError(
                f"{path}: {name} is not finite; the model has diverged, give an earlier checkpoint"
            )


def token_head_state(head: TokenHead | None) -> dict[str, Any] | None:
    """Plain values and tensors of a token head."""
    if head is None:
        return None
    return {"source": head.source, "vocabulary": head.vocabulary, "state_dict": head.state_dict()}


def token_head_from(state: dict[str, Any] | None) -> TokenHead | None:
    """The inverse of `token_head_state`."""
    if state is None:
        return None
    tensors = state["state_dict"]
    head = TokenHead(
        tensors["linear.weight"].shape[1],
        state["vocabulary"],
        state["source"],
        tensors.get("vocab_ids"),
    )
    head.load_state_dict(tensors)
    return head


def file_sha256(path: Path) -> str:
    """Of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def state_sha256(state: dict[str, Tensor]) -> str:
    """One hash over names, shapes and values of a state dict."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(
            tensor.flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        )
    return digest.hexdigest()


def newest_checkpoint(folder: Path) -> Path:
    """The final checkpoint of a run folder, else the newest by number; of `logs/`, the newest of
    its runs.

    Raises:
        UserError: if there is none.
    """
    if (folder / "final_epoch.pt").is_file():
        return folder / "final_epoch.pt"
    numbered = resumable(folder)
    if numbered:
        return numbered[-1]
    runs = list(folder.rglob("final_epoch.pt")) if folder.is_dir() else []
    if runs:
        return max(runs, key=lambda f: f.stat().st_mtime)
    raise UserError(
        f"no checkpoint under {folder}/; train one first (python -m superclip.train) or give "
        "--ckpt FILE"
    )


def resumable(folder: Path) -> list[Path]:
    """`epoch_K.pt` and `step_N.pt` of a run, fewest optimizer steps first (`epoch_10` after
    `epoch_9`)."""
    found = [p for p in folder.glob("*.pt") if NUMBERED.fullmatch(p.name)]
    return sorted(found, key=lambda path: (steps_of(path), path))


def steps_of(path: Path) -> int:
    """Optimizer steps behind an `epoch_K.pt` or `step_N.pt`: by its name and its run's epochs, or,
    where `run.json` does not say, by what the file holds."""
    match = NUMBERED.fullmatch(path.name)
    assert match, f"{path.name} has no number"
    if match[1] == "step":
        return int(match[2])
    try:
        run = json.loads((path.parent / "run.json").read_text())
        return int(match[2]) * int(run["steps_per_epoch"])
    except (OSError, ValueError, LookupError, TypeError):
        content = read_tensors(path, check=False)
    try:
        return int(content["training"]["step"])
    except (LookupError, TypeError):
        raise UserError(f"{path} holds no count of steps, and no run.json tells them") from None
