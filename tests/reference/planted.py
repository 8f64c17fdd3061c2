"""A tower whose answer is known: one head does everything, and pictures of what it looks for.

A picture is a grey texture with one *mark*, a patch of high red, and two decoys of low red. Every
coloured patch has a *content*: +1 (magenta mark, blue decoy) or -1 (yellow mark, green decoy). The
planted head alone looks, from the class token, at the mark (its keys read the cue, red against the
rest) and writes the mark's content where the output reads it. All other heads and MLPs read the
texture and write into coordinates of the output that no text has.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from open_clip.transformer import VisionTransformer

from interp.heads import Head
from superclip.data.batch import Boxes, Record
from superclip.data.loader import Preprocess

PLANTED = Head(1, 2)
GRID, PATCH, WIDTH, LAYERS, HEADS, EMBED = 5, 8, 24, 3, 4, 8
# Coordinates of the stream; TEXTURE is read by all other heads, ELSEWHERE is where they write.
BALLAST, CUE, CONTENT, OUT, CLASS = slice(0, 2), 2, 3, 4, 5
TEXTURE, ELSEWHERE = slice(6, 16), slice(16, 24)
# Two large and opposite constants fix the scale of every LayerNorm, which its gain undoes.
LARGE = 10.0
COLOURS = {  # red, green, blue by (is the mark, content)
    (True, 1): (255, 0, 255),
    (True, -1): (255, 255, 0),
    (False, 1): (0, 0, 255),
    (False, -1): (0, 255, 0),
}
PREPROCESS = Preprocess(GRID * PATCH, "crop", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def planted_visual() -> VisionTransformer:
    """The tower, in float64."""
    visual = VisionTransformer(
        GRID * PATCH, PATCH, WIDTH, LAYERS, HEADS, 1.0, output_dim=EMBED, no_ln_pre=True
    )
    generator = torch.Generator().manual_seed(0)

    def noise(*shape):
        """Summing to 0 over the coordinates that are written, so that no LayerNorm is moved."""
        found = torch.randn(*shape, generator=generator)
        return found - found.mean(dim=0)

    gain = LARGE * (2 / WIDTH) ** 0.5
    with torch.no_grad():
        for name, parameter in visual.named_parameters():
            parameter.fill_(gain if "ln_" in name and name.endswith("weight") else 0.0)
        ballast = torch.tensor([LARGE, -LARGE])
        visual.positional_embedding[:, BALLAST] = ballast
        visual.class_embedding[CLASS] = 1.0
        area = PATCH * PATCH
        visual.conv1.weight[CUE] = torch.tensor([1.0, -0.5, -0.5])[:, None, None] / area
        visual.conv1.weight[CONTENT] = torch.tensor([0.0, -0.5, 0.5])[:, None, None] / area
        # One pattern of brightness in all channels, so that colours are no texture.
        visual.conv1.weight[TEXTURE] = 0.15 * noise(10, 1, PATCH, PATCH)
        d_head = WIDTH // HEADS
        for layer, block in enumerate(visual.transformer.resblocks):
            q, k, v = block.attn.in_proj_weight.split(WIDTH)
            for head in range(HEADS):
                own, out = slice(head * d_head, (head + 1) * d_head), block.attn.out_proj.weight
                if Head(layer, head) == PLANTED:
                    q[own.start, CLASS] = k[own.start, CUE] = (12 * d_head**0.5) ** 0.5
                    v[own.start, CONTENT], out[OUT, own.start] = 1.0, 3.0
                else:
                    for part in (q, k, v):
                        part[own, TEXTURE] = 0.4 * noise(d_head, 10)
                    out[ELSEWHERE, own] = 0.3 * noise(8, d_head)
            block.mlp.c_fc.weight[:, TEXTURE] = 0.3 * noise(WIDTH, 10)
            block.mlp.c_proj.weight[ELSEWHERE] = 0.3 * noise(8, WIDTH)
        visual.proj[OUT, 0] = 1.0
        visual.proj[0, 1] = 0.6  # something that is there without a mark
        visual.proj[ELSEWHERE, 2:] = 0.3 * noise(8, EMBED - 2)
    return visual.double().eval()


def planted_texts() -> torch.Tensor:
    """Unit vectors `[2, embed]` of the texts for content +1 and -1."""
    return torch.eye(EMBED, dtype=torch.float64)[0] * torch.tensor([[1.0], [-1.0]])


def margin_of(content: torch.Tensor) -> torch.Tensor:
    """For each picture's mark the right text less the wrong one, `[n, embed]`."""
    texts = planted_texts()
    return content[:, None] * (texts[0] - texts[1])


@dataclass(frozen=True)
class PlantedPictures:
    """Pictures with the mark at random places.

    Attributes:
        pixels: uint8 `[n, 3, 40, 40]`. images: the same, normalised.
        place, decoys: patches `[n]` and `[n, 2]`. content, decoy_content: +1 or -1.
        texture: uint8 pictures without colours.
    """

    pixels: np.ndarray
    place: np.ndarray
    content: np.ndarray
    decoys: np.ndarray
    decoy_content: np.ndarray
    texture: np.ndarray

    @property
    def images(self) -> torch.Tensor:
        return normalised(self.pixels)

    @property
    def coverage(self) -> np.ndarray:
        return np.eye(GRID * GRID, dtype=np.float32)[self.place]

    @property
    def directions(self) -> torch.Tensor:
        return margin_of(torch.from_numpy(self.content).double())

    @property
    def records(self) -> list[Record]:
        """With the box of the mark."""
        return [
            Record(
                row=row, key=f"planted-{row}", width=GRID * PATCH, height=GRID * PATCH,
                picture=self.pixels[row].transpose(1, 2, 0), captions=("a mark",),
                caption_rows=(row,),
                boxes=Boxes(
                    np.array([[p % GRID * PATCH, p // GRID * PATCH, PATCH, PATCH]], np.float32),
                    ("mark",), np.zeros(1, bool),
                ),
            )
            for row, p in enumerate(self.place.tolist())
        ]  # fmt: skip

    @property
    def contents(self) -> np.ndarray:
        """Of mark and decoys, `[n, 3]`."""
        return np.column_stack([self.content, self.decoy_content])

    def painted(self, marked: np.ndarray, contents: np.ndarray) -> np.ndarray:
        """The same textures with other paint on the three places: `marked` and `contents`
        `[n, 3]` say what is at the mark's place and at those of the decoys."""
        places, pixels = np.column_stack([self.place, self.decoys]), self.texture.copy()
        for row, k in np.ndindex(places.shape):
            y, x = (PATCH * side for side in divmod(int(places[row, k]), GRID))
            colour = COLOURS[bool(marked[row, k]), int(contents[row, k])]
            pixels[row, :, y : y + PATCH, x : x + PATCH] = np.array(colour)[:, None, None]
        return pixels


def normalised(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels).double() / 127.5 - 1


def planted_pictures(n: int = 60, seed: int = 0) -> PlantedPictures:
    rng = np.random.default_rng(seed)
    grey = rng.integers(90, 166, (n, 1, GRID * PATCH, GRID * PATCH), dtype=np.uint8)
    texture = np.repeat(grey, 3, axis=1)
    places = rng.permuted(np.tile(np.arange(GRID * GRID), (n, 1)), axis=1)[:, :3]
    content = rng.permuted(np.where(np.arange(n) % 2, 1, -1))
    decoy_content = np.tile([1, -1], (n, 1))
    found = PlantedPictures(texture, places[:, 0], content, places[:, 1:], decoy_content, texture)
    marked = np.eye(3, dtype=bool)[[0] * n]
    return replace(found, pixels=found.painted(marked, found.contents))
