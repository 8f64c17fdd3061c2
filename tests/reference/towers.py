"""A tower small enough to train and evaluate in no time, with what reads for it."""

import torch

from superclip.data.loader import tokenizer_for
from superclip.evaluation.encode import Encoder
from superclip.model.factory import build_clip, preprocess_for, tokenizer
from superclip.model.superclip import SuperCLIP

CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {
        "image_size": 80,
        "patch_size": 16,
        "width": 32,
        "layers": 2,
        "head_width": 16,
    },
    "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


def tiny_model(seed: int = 0) -> SuperCLIP:
    preprocess = preprocess_for(CONFIG, "crop")
    return SuperCLIP(build_clip(CONFIG, seed), preprocess.mean, preprocess.std).eval()


def tiny_encoder(**options) -> Encoder:
    tokenize = tokenizer_for(tokenizer(CONFIG))
    return Encoder(preprocess_for(CONFIG, "crop"), tokenize, torch.device("cpu"), **options)
