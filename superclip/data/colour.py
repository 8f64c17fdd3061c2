"""Colour jitter and grey pictures in training (SimCLR, Chen et al. 2020, appendix A), as CLIPA's
larger towers train."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import UInt8
from numpy.random import Generator
from torchvision.transforms.v2 import functional as F

STEPS = F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue


@dataclass(frozen=True)
class Colours:
    """Changes the colours of one picture, as `rng` draws.

    Brightness, contrast and saturation are each multiplied by a number from [1 - strength,
    1 + strength], not below 0; hue is turned by a share of the circle from [-strength, strength];
    the four in random order. Then the picture may turn grey.

    Attributes:
        strength: of brightness, contrast, saturation, hue; None changes none of them.
        probability: of that change.
        grey: probability that all colour is lost.
    """

    strength: tuple[float, float, float, float] | None
    probability: float
    grey: float

    def __call__(self, pixels: UInt8[np.ndarray, "3 s s"], rng: Generator) -> np.ndarray:
        """The picture, changed; every draw is made whatever comes of it."""
        image = torch.from_numpy(pixels)
        jitters, greys = rng.random(2) < (self.probability, self.grey)
        order, unit = rng.permutation(4), rng.uniform(-1, 1, 4)
        if self.strength is not None and jitters:
            for k in order:
                middle = 0.0 if k == 3 else 1.0
                amount = middle + unit[k] * self.strength[k]
                if self.strength[k]:
                    image = STEPS[k](image, float(amount if k == 3 else max(amount, 0.0)))
        if greys:
            image = F.rgb_to_grayscale(image, num_output_channels=3)
        return image.numpy()
