"""From a model name, JSON file or saved config to an open_clip model; nothing is registered,
nothing patched."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from importlib import resources
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.model import CLIP, CustomTextCLIP
from torch import nn

from superclip.config import ModelConfig
from superclip.data.loader import Preprocess
from superclip.errors import UserError, nearest
from superclip.model.towers import TextTokenizer, Towers, ends_of, is_towers


def own_configs() -> dict[str, Path]:
    """The model files of this package by name."""
    folder = Path(str(resources.files("superclip") / "model_configs"))
    return {path.stem: path for path in sorted(folder.glob("*.json"))}


def model_config(name: str) -> dict[str, Any]:
    """open_clip's model configuration for a name of ours, a JSON file, or a name of open_clip's.

    Raises:
        UserError: if there is no such model, or the file is no model configuration.
    """
    own = own_configs()
    path = own.get(name, Path(name))
    if name in own or path.suffix == ".json":
        try:
            config = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"--model {name}: {error}") from None
    else:
        config = open_clip.get_model_config(name)
        if config is None:
            raise UserError(
                f"--model {name!r} is unknown; {nearest(name, [*own, *open_clip.list_models()])}"
            )
    missing = {"embed_dim", "vision_cfg", "text_cfg"} - set(config)
    if missing:
        raise UserError(f"--model {name}: the configuration lacks {', '.join(sorted(missing))}")
    if "multimodal_cfg" in config:
        raise UserError(
            f"--model {name}: captioning models (CoCa) are not supported; choose a CLIP model"
        )
    return deepcopy(config)


def reduced(config: dict[str, Any], options: ModelConfig) -> dict[str, Any]:
    """The configuration for the pictures and texts that `options` ask for: `--image-reduction
    resize:SIZE` and `--context-length` (CLIPA trains on few tokens first).

    Raises:
        UserError: if the patches don't tile such a picture, or the tower has no positions to spare.
    """
    config, reduction = deepcopy(config), options.reduction
    if options.context_length is not None:
        config["text_cfg"]["context_length"] = options.context_length
    if reduction is not None and reduction.kind == "resize":
        size, patch = int(reduction.value), config["vision_cfg"].get("patch_size")
        if not isinstance(patch, int):
            raise UserError(f"--image-reduction {reduction}: {options.model} has no square patches")
        if size == config["vision_cfg"].get("image_size", 224):
            raise UserError(
                f"--image-reduction {reduction} is the size that {options.model} has; leave it out"
            )
        if size % patch:
            near = max(patch, size // patch * patch)
            raise UserError(
                f"--image-reduction {reduction}: patches of {patch} px don't tile it; use "
                f"resize:{near} or resize:{near + patch}"
            )
        config["vision_cfg"]["image_size"] = size
    return config


def build_clip(config: dict[str, Any], seed: int = 0, init_scale: float | None = None) -> Any:
    """A randomly initialised model (open_clip's, or `towers`); equal seeds give equal weights,
    whatever was drawn before.

    Raises:
        UserError: if open_clip refuses the configuration.
    """
    config = deepcopy(config)
    if is_towers(config):
        kind = Towers
    elif config.pop("custom_text", False) or "hf_model_name" in config["text_cfg"]:
        kind = CustomTextCLIP
    else:
        kind = CLIP
    if init_scale is not None:
        config["init_logit_scale"] = float(torch.tensor(init_scale, dtype=torch.float64).log())
    if config.get("init_logit_bias") is not None:
        raise UserError("models with a logit bias (SigLIP) are not supported by the losses here")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            clip: Any = kind(**config, output_dict=True)
        except (TypeError, AssertionError, RuntimeError) as error:
            raise UserError(f"open_clip refuses this model configuration: {error}") from None
    if not hasattr(clip.visual, "output_dim"):  # of timm's towers
        clip.visual.output_dim = config["embed_dim"]
    return clip


def load_pretrained(
    clip: Any, name: str, config: dict[str, Any], pretrained: str
) -> dict[str, Any]:
    """Load an open_clip tag or a local file of weights; returns the tag's preprocessing facts.

    Raises:
        UserError: for an unknown tag, a QuickGELU mismatch, an unreachable hub, or weights of
            another model.
    """
    tag = open_clip.get_pretrained_cfg(name, pretrained) or {}
    if tag and bool(tag.get("quick_gelu")) != bool(config.get("quick_gelu")):
        right = f"{name}-quickgelu" if tag.get("quick_gelu") else name.removesuffix("-quickgelu")
        raise UserError(
            f"--pretrained {pretrained} was trained with another activation than {name}; use "
            f"--model {right}"
        )
    if tag:
        try:
            path = open_clip.download_pretrained(tag)
        except (OSError, RuntimeError, ValueError) as error:
            first = str(error).strip().splitlines()[0]
            raise UserError(
                f"--pretrained {pretrained} could not be downloaded ({first}); give a local file"
            ) from None
    elif Path(pretrained).is_file():
        path = pretrained
    else:
        tags = open_clip.list_pretrained_tags_by_model(name)
        raise UserError(
            f"--pretrained {pretrained!r} is neither a file nor a tag of {name}; "
            f"{nearest(pretrained, tags)}"
        )
    from superclip.model.weights import read_tensors

    read_tensors(Path(path))
    try:
        open_clip.load_checkpoint(clip, path, weights_only=True)
    except (RuntimeError, AssertionError, AttributeError, TypeError) as error:
        first = str(error).strip().splitlines()  # open_clip asserts equal text widths, and so on
        raise UserError(
            f"--pretrained {pretrained} does not fit {name}: {' '.join(first[:2])[:300]}"
        ) from None
    return tag


RESIZE_MODES = {"crop": "shortest", "squash": "squash", "pad": "longest"}
"""How a picture becomes square, and open_clip's word for it."""


def preprocess_for(
    config: dict[str, Any], mode: str | None, tag: dict[str, Any] | None = None
) -> Preprocess:
    """Size from the tower, mean and std from the tag or OpenAI's.

    Args:
        mode: how a picture becomes square; None: as the tag says, else by a central crop.

    Raises:
        UserError: for a tower whose input is not square.
    """
    size = config["vision_cfg"].get("image_size", 224)
    if not isinstance(size, int):
        if size[0] != size[1]:
            raise UserError(
                f"towers with a {size[0]} x {size[1]} input are not supported; the input must be "
                "square"
            )
        size = size[0]
    tag = tag or {}
    mean = tuple(tag.get("mean") or open_clip.OPENAI_DATASET_MEAN)
    std = tuple(tag.get("std") or open_clip.OPENAI_DATASET_STD)
    own = {theirs: ours for ours, theirs in RESIZE_MODES.items()}
    mode = mode or own[tag.get("resize_mode") or "shortest"]
    return Preprocess(size, mode, mean, std)  # pyright: ignore[reportArgumentType]


def unlike_published(preprocess: Preprocess, tag: dict[str, Any] | None) -> str | None:
    """What a tag says of its pictures that `preprocess` does not do; None where nothing is."""
    tag = tag or {}
    wanted, resizing = tag.get("resize_mode") or "shortest", tag.get("interpolation") or "bicubic"
    if RESIZE_MODES[preprocess.mode] != wanted:
        mode = next(ours for ours, theirs in RESIZE_MODES.items() if theirs == wanted)
        return f"the weights saw pictures that were made square by --resize {mode}"
    if resizing != "bicubic":
        return f"the weights saw {resizing} resizing; here it is bicubic"
    return None


def tokenizer(config: dict[str, Any]) -> Any:
    """The tokenizer of a configuration (open_clip's BPE, or the one of its Hugging Face text
    tower; that of `towers` is held by the configuration itself)."""
    text = config["text_cfg"]
    length = text.get("context_length", 77)
    if is_towers(config):
        return TextTokenizer(length=length, **text["tokenizer"])
    if "hf_tokenizer_name" in text:
        return open_clip.tokenizer.HFTokenizer(
            text["hf_tokenizer_name"],
            context_length=length,
            tokenizer_mode=text.get("tokenizer_mode"),
            **text.get("tokenizer_kwargs", {}),
        )
    return open_clip.SimpleTokenizer(context_length=length, **text.get("tokenizer_kwargs", {}))


def vocabulary_size(config: dict[str, Any], tokenize: Any) -> int:
    """Ids of a configuration's text tower."""
    stated = config["text_cfg"].get("vocab_size")
    if stated is None and "hf_tokenizer_name" in config["text_cfg"]:
        return len(tokenize.tokenizer)
    return stated or 49408


def special_ids(tokenize: Any) -> tuple[int, ...]:
    """Padding, start and end ids: in every caption, so they say nothing about a picture."""
    if isinstance(tokenize, TextTokenizer):
        return tokenize.special_ids
    if hasattr(tokenize, "sot_token_id"):
        return (0, tokenize.sot_token_id, tokenize.eot_token_id)
    inner = tokenize.tokenizer
    return tuple(
        i for i in (inner.pad_token_id, inner.bos_token_id, inner.eos_token_id) if i is not None
    )


def text_parts(
    tokenize: Any,
) -> tuple[Callable[[str], list[int]], list[int], list[int], int, int] | None:
    """What a tokenizer makes a text of: ids of the text alone, ids that begin and end it, length,
    padding; None for tokenizers with a mode of their own."""
    if isinstance(tokenize, TextTokenizer):
        return *tokenize.parts(), tokenize.length, tokenize.pad_id
    if isinstance(tokenize, open_clip.SimpleTokenizer):
        assert tokenize.context_length is not None
        ends = [tokenize.sot_token_id], [tokenize.eot_token_id]
        return tokenize.encode, *ends, tokenize.context_length, 0
    if not isinstance(tokenize, open_clip.tokenizer.HFTokenizer) or tokenize.tokenizer_mode:
        return None
    inner = tokenize.tokenizer

    def encode(text: str) -> list[int]:
        return inner.encode(tokenize.clean_fn(text), add_special_tokens=False)

    start, end = ends_of(encode("a"), inner.encode("a"))
    if tokenize.strip_sep_token:  # its place stays, empty
        end = [0 if token == inner.sep_token_id else token for token in end]
    return encode, start, end, tokenize.context_length or 77, inner.pad_token_id or 0


def activation_name(visual: nn.Module) -> str:
    """Class of the first block's activation (QuickGELU and GELU towers are not interchangeable)."""
    for name, module in visual.named_modules():
        if name.endswith(("mlp.gelu", "mlp.act", "act1", "bn1.act", "conv_stem.act")):
            return type(module).__name__
    return "unknown"
