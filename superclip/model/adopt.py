"""From the names or folders of two towers to a model configuration and the first weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import timm
import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModel, AutoTokenizer

from superclip.config import ModelConfig
from superclip.errors import UserError, nearest
from superclip.model.factory import build_clip
from superclip.model.towers import plain_hf_config, set_input_size, without_pooler

T = TypeVar("T")
TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "*.bpe.model")
FAILURES = (OSError, ValueError, RuntimeError, LookupError, TypeError, AssertionError)
"""What timm and transformers raise for names, files and hubs that are not as they should be."""


def adopt_towers(
    options: ModelConfig, seed: int, init_scale: float = 1 / 0.07
) -> tuple[dict[str, Any], Any, dict[str, Any]]:
    """Look up both towers, build them, load their weights and see that they work.

    Returns:
        The model configuration (plain values, see `towers`), the model, and `mean` and `std` of the
        pictures that the image tower was made for.

    Raises:
        UserError: for a tower that is unknown, lacks files, needs an unreachable hub or foreign
            code, or does not take such pictures or texts.
    """
    name, source, file = _image_source(options)
    image = _of_timm(options, source, file)
    size = options.image_size or image.pretrained_cfg["input_size"][-1]
    text_cfg, read_weights = _text(options)
    vision_cfg = {"timm_model_name": name, "image_size": size}
    embed_dim = options.embed_dim or 256
    config = {"embed_dim": embed_dim, "vision_cfg": vision_cfg, "text_cfg": text_cfg}
    try:
        clip = build_clip(config, seed, init_scale)
        if options.image_weights != "random":
            image.reset_classifier(0)
            set_input_size(image, size)
            clip.visual.trunk.load_state_dict(image.state_dict())
    except (AssertionError, RuntimeError) as error:
        raise UserError(f"--image-size {size} does not fit {name} ({_first(error)})") from None
    if options.text_weights != "random":
        clip.text.transformer.load_state_dict(read_weights().state_dict())
    _see_that_it_works(clip, config, options)
    return config, clip, {name: image.pretrained_cfg[name] for name in ("mean", "std")}


def _image_source(options: ModelConfig) -> tuple[str, str, str | None]:
    """timm's name of the architecture, what timm opens, and a file of weights or None."""
    tower, weights = str(options.image_tower), options.image_weights
    name = source = tower.removeprefix("timm/")
    folder, file = Path(name).expanduser(), None
    if not timm.is_model(name) and folder.is_dir():
        facts = _json(folder / "config.json", f"--image-tower {tower}")
        name, source = str(facts.get("architecture")), f"local-dir:{folder}"
        if facts.get("model_args"):
            raise UserError(
                f"--image-tower {tower}: its model_args are not supported; name another"
            )
    elif _is_path(name):
        raise UserError(f"--image-tower {tower}: there is no folder {folder}")
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        raise UserError(
            f"--image-tower {tower}: timm knows no {name!r}; "
            f"{nearest(architecture, timm.list_models())}"
        )
    if tag and name not in (tagged := timm.list_models(f"{architecture}.*", pretrained=True)):
        raise UserError(f"--image-tower {tower}: unknown weights {tag!r}; {nearest(name, tagged)}")
    if weights not in (None, "published", "random"):
        file = str(Path(weights).expanduser())
        if not Path(file).is_file():
            raise UserError(f"--image-weights {weights} is no file (nor published, nor random)")
        source = name
    return name, source, file


def _of_timm(options: ModelConfig, source: str, file: str | None) -> Any:
    """The whole timm model, classifier and all, so that its weights must fit without a gap."""
    pretrained = options.image_weights != "random"
    overlay = {"file": file} if file else None
    try:
        with torch.random.fork_rng(devices=[]):
            return timm.create_model(source, pretrained=pretrained, pretrained_cfg_overlay=overlay)
    except (*FAILURES, SafetensorError) as error:
        if file:
            what = f"--image-weights {options.image_weights} does not fit {source}"
        else:
            what = f"--image-tower {options.image_tower} can't be opened"
        raise UserError(
            f"{what} ({_first(error)}); give --image-weights FILE, a folder timm/FOLDER, or "
            "--image-weights random"
        ) from None


def _text(options: ModelConfig) -> tuple[dict[str, Any], Callable[[], Any]]:
    """The text tower's part of the configuration, and what reads its weights."""
    tower = str(options.text_tower)
    source, length = tower.removeprefix("hf/"), options.context_length or 30
    folder = Path(source).expanduser()
    if folder.is_dir():
        source = str(folder)
        _json(folder / "config.json", f"--text-tower {tower}")
        if not any(any(folder.glob(pattern)) for pattern in TOKENIZER_FILES):
            raise UserError(f"--text-tower {tower}: the folder has no tokenizer (tokenizer.json)")
    elif _is_path(source):
        raise UserError(f"--text-tower {tower}: there is no folder {folder}")

    def opened(auto: Any, **more: Any) -> Any:
        known = {"local_files_only": folder.is_dir(), "trust_remote_code": False}
        try:
            return auto.from_pretrained(source, **known, **more)
        except (*FAILURES, SafetensorError) as error:
            if "trust_remote_code" in str(error):
                why = "it needs code of its own, which is never run; choose one transformers knows"
            else:
                why = f"{_first(error)}; a local copy goes as hf/FOLDER"
            raise UserError(f"--text-tower {tower} can't be opened: {why}") from None

    config, tokenizer = opened(AutoConfig), opened(AutoTokenizer)
    if config.is_encoder_decoder or not hasattr(config, "hidden_size"):
        raise UserError(
            f"--text-tower {tower}: {config.model_type} is no encoder of texts; choose one such as "
            "hf/distilbert-base-uncased"
        )
    if not tokenizer.is_fast:
        raise UserError(f"--text-tower {tower}: its tokenizer has no tokenizer.json; convert it")
    if tokenizer.pad_token_id is None:
        raise UserError(
            f"--text-tower {tower}: its tokenizer has no padding token; set tokenizer.pad_token "
            "and save_pretrained it to a folder"
        )
    if len(tokenizer) > config.vocab_size:
        raise UserError(
            f"--text-tower {tower}: its tokenizer knows {len(tokenizer)} tokens, the tower "
            f"{config.vocab_size}; they belong to different models"
        )

    def read_weights() -> Any:
        shown = transformers.utils.logging.is_progress_bar_enabled()
        transformers.utils.logging.disable_progress_bar()
        try:
            more = {"config": config, "dtype": torch.float32, "output_loading_info": True}
            model, told = opened(AutoModel, **more)
        finally:
            if shown:
                transformers.utils.logging.enable_progress_bar()
        missing = sorted(key for key in told["missing_keys"] if not key.startswith("pooler."))
        if missing:
            raise UserError(f"--text-tower {tower}: its weights lack {missing[0]!r}")
        return without_pooler(model)

    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    text_cfg = {
        "context_length": length,
        "vocab_size": config.vocab_size,
        "pooling": options.text_pooling or "cls",
        "hf_config": plain_hf_config(config),
        "tokenizer": {
            "json": tokenizer.backend_tokenizer.to_str(),
            "pad_id": tokenizer.pad_token_id,
            "special_ids": sorted(special),
        },
    }
    return text_cfg, read_weights


@torch.no_grad()
def _see_that_it_works(clip: Any, config: dict[str, Any], options: ModelConfig) -> None:
    """Raises UserError if a tower does not take pictures of this size or texts of this length, or
    what it makes of a text does not depend on the last word."""
    text_cfg, size = config["text_cfg"], config["vision_cfg"]["image_size"]
    length, pad = text_cfg["context_length"], text_cfg["tokenizer"]["pad_id"]
    word, other = [i for i in range(text_cfg["vocab_size"]) if i != pad][-2:]
    texts = torch.full((2, length), word)
    texts[1, -1] = other
    clip.eval()
    try:
        clip.encode_image(torch.zeros(1, 3, size, size))
    except (AssertionError, RuntimeError) as error:
        raise UserError(
            f"--image-tower {options.image_tower} does not take pictures of {size} pixels "
            f"({_first(error)}); give another --image-size"
        ) from None
    try:
        first, second = clip.encode_text(texts)
    except (IndexError, RuntimeError) as error:
        most = text_cfg["hf_config"].get("max_position_embeddings")
        raise UserError(
            f"--text-tower {options.text_tower} does not take {length} tokens ({_first(error)}); "
            f"its positions end at {most}, lower --context-length"
        ) from None
    if bool((first == second).all()):
        raise UserError(
            f"--text-tower {options.text_tower} reads forwards only, so its first state knows "
            "nothing of the text; use --text-pooling mean, or an encoder"
        )
    clip.train()


def _json(path: Path, flag: str) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{flag}: {path.name} can't be read ({_first(error)})") from None
    if not isinstance(found, dict):
        raise UserError(f"{flag}: {path.name} holds no configuration")
    return found


def _is_path(name: str) -> bool:
    return name.startswith(("/", ".", "~"))


def _first(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return " ".join(line.strip() for line in lines[:2])[:140]
