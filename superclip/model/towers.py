"""Two towers of other libraries, each with a linear head: timm sees, Hugging Face transformers
reads (the small-batch course project).

The model configuration alone rebuilds the model on any machine: it names timm's architecture and
holds the text tower's configuration and tokenizer as plain values. No folder, no hub, no code of
others is asked for again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from open_clip.timm_model import TimmModel
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from superclip.errors import UserError

NOT_OF_THE_MODEL = (
    "attn_implementation",
    "auto_map",
    "dtype",
    "quantization_config",
    "torch_dtype",
    "transformers_version",
)
"""Keys of a Hugging Face configuration that say how or where it was run, or name code to fetch."""


def is_towers(config: Mapping[str, Any]) -> bool:
    """Whether a model configuration is of this kind, and so none of open_clip's."""
    return "hf_config" in config["text_cfg"]


class Towers(nn.Module):
    """What an open_clip model offers to training and evaluation, with other towers.

    Args:
        embed_dim: dimensions of the joint space.
        vision_cfg: `timm_model_name`, `image_size`.
        text_cfg: `hf_config`, `pooling`, `tokenizer`, and for all readers of a configuration
            `vocab_size` and `context_length`.
        init_logit_scale: logarithm of the scale.

    Raises:
        UserError: if one of the libraries does not know such a tower.
    """

    def __init__(
        self,
        embed_dim: int,
        vision_cfg: dict[str, Any],
        text_cfg: dict[str, Any],
        init_logit_scale: float = math.log(1 / 0.07),
        output_dict: bool = True,
    ):
        super().__init__()
        self.visual = image_tower(
            vision_cfg["timm_model_name"], embed_dim, vision_cfg["image_size"]
        )
        self.text = TextTower(
            text_cfg["hf_config"], embed_dim, text_cfg["tokenizer"]["pad_id"], text_cfg["pooling"]
        )
        self.logit_scale = nn.Parameter(torch.tensor(init_logit_scale))

    def encode_image(self, pixels: Float[Tensor, "b 3 s s"]) -> Float[Tensor, "b d"]:
        return self.visual(pixels)

    def encode_text(self, tokens: Int[Tensor, "b l"]) -> Float[Tensor, "b d"]:
        return self.text(tokens)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.visual.set_grad_checkpointing(enable)
        self.text.set_grad_checkpointing(enable)


def image_tower(name: str, embed_dim: int, size: int) -> TimmModel:
    """open_clip's wrapper of a timm model, with random weights and a linear head without bias."""
    visual = TimmModel(name, embed_dim, size, pool="", proj="linear")
    trunk: Any = visual.trunk
    set_input_size(trunk, size)
    pooled = getattr(trunk, "head_hidden_size", None) or trunk.num_features
    if pooled != trunk.num_features:  # towers that widen after pooling (MobileNetV3)
        visual.head.proj = nn.Linear(pooled, embed_dim, bias=False)
    return visual


def set_input_size(trunk: Any, size: int) -> None:
    """Fit the position embeddings of a timm transformer to pictures of another size; towers
    without any take every size."""
    if hasattr(trunk, "set_input_size") and size != trunk.pretrained_cfg["input_size"][-1]:
        trunk.set_input_size((size, size))


class TextTower(nn.Module):
    """A Hugging Face encoder and a linear head without bias, with random weights.

    Args:
        config: the encoder's configuration as plain values.
        pad_id: the token that nothing attends to.
        pooling: cls (the first token's last state) or mean (over the text's last states).
    """

    def __init__(self, config: dict[str, Any], embed_dim: int, pad_id: int, pooling: str):
        super().__init__()
        assert pooling in ("cls", "mean"), pooling
        self.pad_id, self.pooling = pad_id, pooling
        made = hf_config(config)
        made.use_cache = False  # of decoders, for writing texts
        self.transformer = without_pooler(
            AutoModel.from_config(made, trust_remote_code=False, dtype=torch.float32)
        )
        self.proj = nn.Linear(made.hidden_size, embed_dim, bias=False)

    def forward(self, tokens: Int[Tensor, "b l"]) -> Float[Tensor, "b d"]:
        attended = tokens != self.pad_id
        attended[:, 0] = True  # even an empty text has a state to read
        states = self.transformer(input_ids=tokens, attention_mask=attended.long())[0]
        if self.pooling == "cls":
            return self.proj(states[:, 0])
        weights = attended[..., None].to(states.dtype)
        return self.proj((states * weights).sum(1) / weights.sum(1))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        if enable:
            self.transformer.activation_checkpointing_enable()
        else:
            self.transformer.activation_checkpointing_disable()


def hf_config(values: Mapping[str, Any]) -> Any:
    """A configuration object from plain values; nothing is looked up anywhere.

    Raises:
        UserError: if transformers has no such model.
    """
    kept = {k: v for k, v in values.items() if k not in NOT_OF_THE_MODEL and not k.startswith("_")}
    try:
        return AutoConfig.for_model(kept.pop("model_type"), **kept)
    except (ValueError, KeyError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(f"transformers can't build this text tower: {first[:200]}") from None


def plain_hf_config(config: Any) -> dict[str, Any]:
    """The inverse of `hf_config`."""
    values = json.loads(config.to_json_string(use_diff=False))
    return {k: v for k, v in values.items() if k not in NOT_OF_THE_MODEL and k[0] != "_"}


def without_pooler(model: Any) -> Any:
    """The encoder alone: a pooling layer that nothing reads would get no gradient."""
    if getattr(model, "pooler", None) is not None:
        model.pooler = None
    return model


class TextTokenizer:
    """Texts as token ids of one length, cut or padded, start and end tokens kept.

    Args:
        json: a whole tokenizer.json as text.
        length: tokens of every text.
        pad_id: of the padding token.
        special_ids: padding, start, end: in every text, so they say nothing about a picture.
    """

    def __init__(self, json: str, length: int, pad_id: int, special_ids: Sequence[int]):
        self.length, self.pad_id = length, pad_id
        self.inner = Tokenizer.from_str(json)
        self.inner.enable_truncation(length)
        self.inner.enable_padding(length=length, pad_id=pad_id)
        self.special_ids = tuple(special_ids)

    def __call__(self, texts: Sequence[str]) -> Int[Tensor, "n l"]:
        # One by one: a batch would start threads, which a reader process forked later can't have.
        return torch.tensor([self.inner.encode(text).ids for text in texts])

    def decode(self, ids: Sequence[int]) -> str:
        return self.inner.decode(ids, skip_special_tokens=False)

    def parts(self) -> tuple[Callable[[str], list[int]], list[int], list[int]]:
        """Ids of a text alone, uncut, and the ids that begin and end every text."""
        plain = Tokenizer.from_str(self.inner.to_str())
        plain.no_truncation()
        plain.no_padding()

        def encode(text: str) -> list[int]:
            return plain.encode(text, add_special_tokens=False).ids

        return encode, *ends_of(encode("a"), plain.encode("a").ids)


def ends_of(own: list[int], whole: list[int]) -> tuple[list[int], list[int]]:
    """What a tokenizer puts before and behind a text.

    >>> ends_of([5, 6], [1, 5, 6, 2])
    ([1], [2])
    """
    place = next(k for k in range(len(whole)) if whole[k : k + len(own)] == own)
    return whole[:place], whole[place + len(own) :]
