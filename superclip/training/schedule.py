"""Learning rate as a pure function of the step."""

import math


def cosine(step: int, base: float, warmup: int, total: int) -> float:
    """Linear warm-up over `warmup` steps, then half a cosine to 0 at `total` (open_clip's
    schedule).

    >>> [round(cosine(s, 1.0, 2, 6), 3) for s in range(6)]
    [0.5, 1.0, 1.0, 0.854, 0.5, 0.146]
    """
    if step < warmup:
        return base * (step + 1) / warmup
    return base * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
