"""Learning rate as a pure function of the step."""

import math


def cosine(step: int, base: float, warmup: int, total: int, least: float = 0.0) -> float:
    """Linear warm-up over `warmup` steps, then half a cosine to `least` at `total` (open_clip's
    schedule, for which it is 0).

    >>> [round(cosine(s, 1.0, 2, 6), 3) for s in range(6)]
    [0.5, 1.0, 1.0, 0.854, 0.5, 0.146]
    """
    if step < warmup:
        return base * (step + 1) / warmup
    falling = 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
    return least + (base - least) * falling
