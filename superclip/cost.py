"""`python -m superclip.cost`: tokens, operations and GPU hours of a training run, before it is
begun."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from superclip.config import ModelConfig
from superclip.errors import UserError, nearest, run_command
from superclip.flags import all_stages, parse

DESCRIPTION = """What a run costs: tokens, operations and GPU hours.

  python -m superclip.cost --model ViT-H-14 --image-reduction resize:84 --context-length 8 \\
      --samples 12.8e9 --gpu h100 --gpus 8
  python -m superclip.cost --recipe clipa-h14-v2 --gpu a100 --gpus 64

Counted are both towers, forward and backward, from the configuration (a multiplication and an
addition are two; the loss and a token head are left out). Hours assume --utilization of the GPU's
peak; what a run really reaches, its log says."""

PUBLISHED = [
    ("H/14, LAION-2B: 12.8 G at 84 px, 512 M at 224, 128 M at 336", 8640, 13_613, "79.1"),
    ("L/14, DataComp-1B: the same schedule", 4520, 7_124, "80.3"),
    ("H/14, DataComp-1B: the same schedule", 8640, 13_613, "81.8"),
    ("G/14, DataComp-1B", 23_742, 39_056, "83.0"),
]
"""CLIPA-v2's own table (Li et al. 2023): run, A100 hours, dollars of a cloud, ImageNet top-1."""


@dataclass(frozen=True)
class CostConfig:
    """What `superclip.cost` counts."""

    model: str | None = None
    """An open_clip model name, one of superclip/model_configs, or a JSON file. Default:
    ViT-B-16."""
    recipe: str | None = None
    """A recipe in its place, with all its stages and samples."""
    image_reduction: str | None = None
    """As of superclip.train: resize:SIZE, random:KEEP, grid:KEEP, block:KEEP."""
    context_length: int | None = None
    """Tokens of a text. Default: the model's."""
    samples: float | None = None
    """Pairs seen, over all passes (12.8e9). Default: the recipe's, else 1e9.
    Of a recipe in stages, the first one's."""
    gpu: str = "h100"
    """a100, h100, h200, b200, l40s, v100, 4090, ... ('h100 pcie' in quotes)."""
    gpus: int = 8
    """How many."""
    utilization: float = 0.4
    """Share of the GPU's peak that the run reaches: .3 to .5 is usual for these towers."""
    grad_checkpointing: bool = False
    """Blocks run forward twice."""

    def __post_init__(self) -> None:
        if self.gpus < 1:
            raise UserError(f"--gpus {self.gpus} must be at least 1")
        if not 0 < self.utilization <= 1:
            raise UserError(f"--utilization {self.utilization} must lie in (0, 1]")
        if self.samples is not None and not 1 <= self.samples < math.inf:
            raise UserError(f"--samples {self.samples} must be at least 1")
        own = self.model or self.image_reduction or self.context_length or self.grad_checkpointing
        if self.recipe is not None and own:
            raise UserError("--recipe brings its own model, pictures and texts; leave those out")


@dataclass(frozen=True)
class Stage:
    """One run.

    Attributes:
        image_tokens, text_tokens: that the blocks see.
        full_tokens: of a whole picture of the model's own size.
        forward, training: operations a pair.
        full_training: the same with all tokens of that picture and this text.
        samples: pairs seen.
    """

    name: str
    image_tokens: int
    text_tokens: int
    full_tokens: int
    forward: float
    training: float
    full_training: float
    samples: float

    @property
    def total(self) -> float:
        """Operations of the run."""
        return self.training * self.samples

    def hours(self, tflops: float) -> float:
        """GPU hours at a rate of 10^12 operations a second."""
        return self.total / (tflops * 1e12) / 3600


def main(argv: list[str]) -> None:
    """Parse, count, print."""
    config = parse(CostConfig, argv, "python -m superclip.cost", DESCRIPTION)
    print("\n".join(lines(config, stages(config))))


def stages(config: CostConfig) -> list[Stage]:
    """Every run of a recipe, or the one that the flags describe.

    Raises:
        UserError: for towers that can't be counted, or a recipe that does not say its samples.
    """
    if config.recipe is None:
        name = config.model or "ViT-B-16"
        model = ModelConfig(
            name,
            image_reduction=config.image_reduction,
            context_length=config.context_length,
            grad_checkpointing=config.grad_checkpointing,
        )
        return [counted(name, model, config.samples or 1e9)]
    found: list[Stage] = []
    for run in all_stages(["--recipe", config.recipe]):
        seen = run.data.train_num_samples
        if seen is None and config.samples is None and config.recipe not in SIZES:
            raise UserError(f"--recipe {config.recipe} trains on all of its data; give --samples N")
        passes = (seen or SIZES.get(config.recipe, 0)) * run.epochs
        samples = config.samples if config.samples is not None and not found else passes
        found.append(counted(f"stage {len(found) + 1}", run.model, samples))
    return found


SIZES: dict[str, int] = {
    "clipa-b16-i50t16": 400_000_000,
    "clipa-l16-i17t16": 400_000_000,
    "clipa-l16-i37t8": 400_000_000,
}
"""Pictures of recipes that take all of their data."""


def counted(name: str, options: ModelConfig, samples: float) -> Stage:
    """Tokens and operations of one run.

    Raises:
        UserError: for towers that can't be counted.
    """
    from superclip.model.factory import model_config, reduced
    from superclip.ops.flops import text_flops, vision_flops

    if options.image_tower is not None:
        raise UserError("towers of other libraries are not counted; name a --model of open_clip")
    whole = reduced(model_config(options.model), replace(options, image_reduction=None))
    config, reduction = reduced(model_config(options.model), options), options.reduction
    kept = None
    try:
        if reduction is not None and reduction.kind != "resize":
            vision = config["vision_cfg"]
            kept = reduction.kept(vision["image_size"] // vision["patch_size"])
        image, full, text = vision_flops(config, kept), vision_flops(whole), text_flops(config)
    except UserError:
        raise
    except (ValueError, LookupError, TypeError):
        raise UserError(
            f"--model {options.model}: only open_clip's plain vision transformers are counted"
        ) from None
    again = image.blocks + text.blocks if options.grad_checkpointing else 0
    return Stage(
        name,
        image.tokens,
        text.tokens,
        full.tokens,
        image.forward + text.forward,
        image.training + text.training + again,
        full.training + text.training + (full.blocks + text.blocks if again else 0),
        samples,
    )


def lines(config: CostConfig, found: list[Stage]) -> list[str]:
    """The table of the run, and the published one."""
    from superclip.evaluation.tables import aligned

    peak = peak_of(config.gpu)
    rate = peak * config.utilization
    head = ["", "image tokens", "text tokens", "GFLOPs forward", "GFLOPs a pair, trained"]
    table = [[*head, "of all tokens'", "pairs", "EFLOPs", "GPU hours"]]
    for stage in found:
        table.append(
            [
                stage.name,
                f"{stage.image_tokens} of {stage.full_tokens}",
                str(stage.text_tokens),
                f"{stage.forward / 1e9:.2f}",
                f"{stage.training / 1e9:.2f}",
                f"{stage.training / stage.full_training:.0%}",
                f"{stage.samples:.4g}",
                f"{stage.total / 1e18:.4g}",
                _hours(stage.hours(rate)),
            ]
        )
    hours = sum(stage.hours(rate) for stage in found)
    told = [
        *aligned(table, "<" + ">" * (len(table[0]) - 1)),
        "",
        f"{_hours(hours)} GPU hours, {hours / config.gpus / 24:,.2g} days on {config.gpus} x "
        f"{config.gpu} ({peak:g} TFLOP/s dense 16-bit) at {config.utilization:.0%} "
        "of the peak; reading pictures, evaluation and the loss come on top",
    ]
    shortened = config.image_reduction or config.context_length
    if not (shortened or (config.recipe or "").startswith("clipa-")):
        return told
    told += ["", "published (CLIPA-v2, Li et al. 2023):"]
    rows = [["run", "A100 hours", "dollars", "ImageNet top-1"]]
    rows += [[name, f"{h:,}", f"{d:,}", top] for name, h, d, top in PUBLISHED]
    told += aligned(rows, "<>>>")
    schedule = stages(CostConfig(recipe="clipa-h14-v2"))
    least = sum(stage.hours(peak_of("a100")) for stage in schedule)
    told.append(
        f"H/14's schedule by this count, blocks run forward twice: {least:,.0f} A100 hours at the "
        f"whole peak; 8,640 hours are {least / 8640:.0%} of it"
    )
    return told


def _hours(hours: float) -> str:
    """
    >>> _hours(1234.5), _hours(0.1553)
    ('1,234', '0.16')
    """
    return f"{hours:,.0f}" if hours >= 10 else f"{hours:.2g}"


def peak_of(gpu: str) -> float:
    """Dense 16-bit operations a second, in 10^12.

    Raises:
        UserError: for a GPU that is not in the table.
    """
    from superclip.training.utilization import DENSE_16_BIT_TFLOPS

    known = {name.lower(): value for name, value in DENSE_16_BIT_TFLOPS.items()}
    if gpu.lower() not in known:
        raise UserError(f"--gpu {gpu!r} is unknown; {nearest(gpu.lower(), known)}")
    return known[gpu.lower()]


if __name__ == "__main__":
    run_command(main)
