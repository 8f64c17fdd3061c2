"""Tiny local copies of what a hub would send: a text tower with its tokenizer, an image tower."""

import json
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast

from superclip.data.scenes import caption_vocabulary

SIZES = {
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64},
    "gpt2": {"n_embd": 32, "n_layer": 1, "n_head": 2, "bos_token_id": 2, "eos_token_id": 3},
    "t5": {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2},
}
LIKE_BERT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}


def text_folder(folder: Path, family: str = "distilbert", pad: bool = True, **more) -> Path:
    """An encoder of random weights (seed 1) and a tokenizer that knows the words of the scenes."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *sorted(set(caption_vocabulary()))]
    inner = Tokenizer(WordLevel({word: k for k, word in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = Whitespace()
    inner.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    names |= {"pad_token": "[PAD]"} if pad else {}
    PreTrainedTokenizerFast(tokenizer_object=inner, **names).save_pretrained(folder)
    sizes = SIZES.get(family, LIKE_BERT) | {"vocab_size": len(words)} | more
    torch.manual_seed(1)
    AutoModel.from_config(AutoConfig.for_model(family, **sizes)).save_pretrained(folder)
    return folder


def image_folder(folder: Path, name: str = "test_resnet") -> Path:
    """A timm repository as it comes from the hub: configuration and weights (seed 2)."""
    folder.mkdir()
    torch.manual_seed(2)
    model = timm.create_model(name)
    facts = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "input_size": [3, 64, 64]}
    config = {"architecture": name, "num_classes": 1000, "pretrained_cfg": facts}
    facts |= {"num_classes": 1000, "classifier": model.pretrained_cfg["classifier"]}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), folder / "model.safetensors")
    return folder
