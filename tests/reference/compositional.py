"""Compositional accuracy one question at a time, as SugarCrepe's own script has it."""

import torch


@torch.no_grad()
def accuracy(model, preprocess_one, tokenize_one, questions) -> float:
    """Share of (picture, positive, negative) whose positive scores strictly higher."""
    right = 0
    for picture, positive, negative in questions:
        image = model.encode_image(preprocess_one(picture)[None])[0]
        texts = [model.encode_text(tokenize_one(t)[None])[0] for t in (positive, negative)]
        right += float(image @ texts[0]) > float(image @ texts[1])
    return right / len(questions)
