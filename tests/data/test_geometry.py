"""Boxes, padding and pixels agree under every geometry; evaluation's pixels equal open_clip's."""

import io
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from superclip.data.geometry import (
    PAD_COLOUR,
    BadPicture,
    Geometry,
    picture_size,
    plan,
    random_crop,
    render,
)

REAL = Path(os.environ.get("SUPERCLIP_REAL_DATA", Path(__file__).parents[3] / "shared/data"))


def photographs(count: int) -> list[Path]:
    folder = REAL / "coco/val2017"
    if not folder.is_dir():
        pytest.skip(f"no photographs in {folder}")
    return sorted(folder.glob("*.jpg"))[:count]


def philox(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=seed))


def encoded(image: Image.Image, form: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def noise(width: int, height: int, seed: int = 0) -> np.ndarray:
    """Smooth colour noise, so that resampling is well conditioned."""
    small = philox(seed).integers(0, 256, (8, 8, 3), np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


@st.composite
def scenes_with_one_box(draw, smallest=40, largest=400):
    sides = st.integers(smallest, largest)
    width, height = draw(sides), draw(sides)
    x, y = draw(st.integers(0, width - 8)), draw(st.integers(0, height - 8))
    w, h = draw(st.integers(8, width - x)), draw(st.integers(8, height - y))
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[y : y + h, x : x + w] = 255
    return pixels, np.array([[x, y, w, h]], np.float32)


def assert_box_lies_where_it_was_mapped(picture, geometry: Geometry, xywh, fast: bool) -> None:
    (box,), (kept,) = geometry.map_boxes(xywh)
    x0, y0, x1, y1 = box
    assert x0 <= x1 and y0 <= y1 and 0 <= kept <= 1
    assume(min(x1 - x0, y1 - y0) >= 4)  # thinner ones fade below the threshold
    assert kept > 0
    left, top, right, bottom = geometry.valid
    lit = np.zeros((geometry.size, geometry.size), bool)
    lit[top:bottom, left:right] = render(picture, geometry, fast)[1, top:bottom, left:right] > 127
    rows, columns = np.flatnonzero(lit.any(1)), np.flatnonzero(lit.any(0))
    seen = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
    np.testing.assert_allclose(seen, box, atol=1.0)


@settings(max_examples=60, deadline=None)
@given(
    scenes_with_one_box(),
    st.sampled_from(["crop", "squash", "pad"]),
    st.sampled_from([32, 63, 96]),
    st.booleans(),
)
def test_drawn_box_lies_where_it_was_mapped(scene, mode, size, fast):
    pixels, xywh = scene
    height, width, _ = pixels.shape
    geometry = plan(width, height, size, mode)
    assert_box_lies_where_it_was_mapped(pixels, geometry, xywh, fast)


@settings(max_examples=60, deadline=None)
@given(scenes_with_one_box(), st.integers(0, 10_000), st.sampled_from([0.0, 1.0]), st.booleans())
def test_drawn_box_lies_where_it_was_mapped_in_random_crops(scene, seed, flip, fast):
    pixels, xywh = scene
    height, width, _ = pixels.shape
    crop = random_crop(philox(seed), scale=(0.2, 1.0), flip_probability=flip)
    geometry = plan(width, height, 64, "crop", crop)
    assert_box_lies_where_it_was_mapped(pixels, geometry, xywh, fast)


@settings(max_examples=30, deadline=None)
@given(scenes_with_one_box(200, 700), st.sampled_from(["crop", "squash", "pad"]))
def test_drawn_box_lies_where_it_was_mapped_when_the_decoder_reduces(scene, mode):
    pixels, xywh = scene
    height, width, _ = pixels.shape
    picture = encoded(Image.fromarray(pixels), "JPEG", quality=95)
    assert_box_lies_where_it_was_mapped(picture, plan(width, height, 48, mode), xywh, True)


@pytest.mark.parametrize("size", [224, 63])
@pytest.mark.parametrize("mode, theirs", [("crop", "shortest"), ("squash", "squash")])
def test_evaluation_pixels_are_open_clips_bit_for_bit(size, mode, theirs):
    """On real photographs at their own aspects; `fast` differs by under 3 of 255 levels."""
    from open_clip.transform import image_transform
    from torchvision.transforms import Compose

    reference = Compose(image_transform(size, is_train=False, resize_mode=theirs).transforms[:-1])
    differences = []
    for path in photographs(40):
        picture = path.read_bytes()
        geometry = plan(*picture_size(picture), size, mode)
        ours = render(picture, geometry)
        np.testing.assert_array_equal(ours, (reference(Image.open(path)) * 255).round().byte())
        differences.append(np.abs(render(picture, geometry, fast=True).astype(int) - ours).mean())
    assert np.mean(differences) < 3


def test_padded_sizes_round_as_open_clips():
    from open_clip.transform import ResizeKeepRatio

    sizes = [(224, 175), *((w, h) for w in range(60, 400, 7) for h in range(60, 400, 11))]
    for width, height in sizes:
        theirs = ResizeKeepRatio.get_params(Image.new("1", (width, height)), (80, 80), 1.0)
        x0, y0, x1, y1 = plan(width, height, 80, "pad").target
        assert [y1 - y0, x1 - x0] == theirs, (width, height)


def crops(size: int, scale: tuple[float, float]):
    """Exact bicubic, exact bilinear and fast pixels of photographs under random crops."""
    for seed, path in enumerate(photographs(60)):
        image, picture = Image.open(path).convert("RGB"), path.read_bytes()
        geometry = plan(*image.size, size, "crop", random_crop(philox(seed), scale))
        part = image.crop(tuple(map(int, geometry.source)))
        bicubic, bilinear = (
            np.asarray(part.resize((size, size), kind)).transpose(2, 0, 1).astype(int)
            for kind in (Image.Resampling.BICUBIC, Image.Resampling.BILINEAR)
        )
        yield bicubic, bilinear, render(picture, geometry, fast=True).astype(int)


@pytest.mark.parametrize("scale", [(0.9, 1.0), (0.3, 1.0)])
def test_fast_pixels_of_undivided_photographs_are_the_exact_ones(scale):
    """On 400 px photographs at 224 px no decoder reduces: only rounding and clipping are left."""
    differences = [np.abs(fast - bicubic) for bicubic, _, fast in crops(224, scale)]
    assert np.mean(differences) < 0.1
    assert np.mean([(d > 2).mean() for d in differences]) < 1e-3


@pytest.mark.parametrize("size", [112, 96, 48])
@pytest.mark.parametrize("scale", [(0.9, 1.0), (0.3, 1.0)])
def test_fast_pixels_differ_from_exact_ones_by_less_than_resampling_filters_do(size, scale):
    """Decoding at reduced scale changes a picture no more than bilinear instead of bicubic
    resampling does, on average over photographs."""
    reduced, filters = zip(
        *(
            (np.abs(fast - bicubic).mean(), np.abs(bilinear - bicubic).mean())
            for bicubic, bilinear, fast in crops(size, scale)
        )
    )
    assert 0.1 < np.mean(reduced) < np.mean(filters)


@given(
    st.integers(16, 200),
    st.integers(16, 200),
    st.integers(8, 64),
    st.integers(0, 99),
    st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_fast_pixels_of_smooth_pictures_are_the_exact_ones(width, height, size, seed, flip):
    pixels = noise(width, height, seed)
    crop = random_crop(philox(seed), (0.3, 1.0), flip_probability=float(flip))
    geometry = plan(width, height, size, "crop", crop)
    part = Image.fromarray(pixels).crop(tuple(map(int, geometry.source)))
    exact = np.asarray(part.resize((size, size), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    exact = exact[:, :, ::-1] if flip else exact
    assert np.abs(render(pixels, geometry, fast=True).astype(int) - exact).max() <= 4


@pytest.mark.parametrize("width, height", [(1000, 10), (10, 1000), (300, 301)])
def test_random_crop_falls_back_as_torchvision_does(width, height):
    from torchvision.transforms import RandomResizedCrop

    image, ratio = Image.new("RGB", (width, height)), (3 / 4, 4 / 3)
    top, left, h, w = RandomResizedCrop.get_params(image, [2.0, 2.0], list(ratio))
    crop = random_crop(philox(0), scale=(2.0, 2.0))
    assert plan(width, height, 400, "crop", crop).source == (left, top, left + w, top + h)


@given(st.integers(20, 2000), st.integers(20, 2000), st.integers(0, 10_000))
def test_random_crop_stays_inside_and_in_bounds(width, height, seed):
    crop = random_crop(philox(seed), scale=(0.3, 0.9))
    x0, y0, x1, y1 = plan(width, height, 2000, "crop", crop).source  # no decoder reduces this
    assert 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height
    assert (x1 - x0 - 1) / (y1 - y0 + 1) <= 4 / 3 and (x1 - x0 + 1) / (y1 - y0 - 1) >= 3 / 4


@given(st.integers(20, 6000), st.integers(20, 6000), st.integers(8, 300), st.integers(0, 10_000))
def test_random_crop_lies_on_the_decoders_grid(width, height, size, seed):
    """Its sides move there by less than one pixel of the input."""
    crop = random_crop(philox(seed), scale=(0.1, 1.0))
    free = np.array(plan(width, height, 10_000, "crop", crop).source)
    x0, y0, x1, y1 = there = np.array(plan(width, height, size, "crop", crop).source)
    spare = min(x1 - x0, y1 - y0) / size
    grid = max(factor for factor in (1, 2, 4, 8) if factor == 1 or factor <= spare)
    assert not (there % grid).any()
    assert (np.abs(there - free) < grid).all()
    assert x0 >= 0 and y0 >= 0 and x1 <= width and y1 <= height


def test_random_crop_is_decided_by_its_generator_alone():
    same = [random_crop(philox(7), flip_probability=0.5) for _ in range(2)]
    assert same[0] == same[1] != random_crop(philox(8), flip_probability=0.5)
    flips = [random_crop(philox(seed), flip_probability=0.25).flip for seed in range(400)]
    assert 60 < sum(flips) < 140
    assert not any(random_crop(philox(seed)).flip for seed in range(100))


def test_flip_mirrors_the_same_crop():
    pixels = noise(90, 70)
    straight, mirrored = (
        plan(90, 70, 32, "crop", random_crop(philox(3), flip_probability=p)) for p in (0.0, 1.0)
    )
    np.testing.assert_array_equal(render(pixels, mirrored), render(pixels, straight)[:, :, ::-1])


def test_padding_has_the_pad_colour_and_is_not_valid():
    geometry = plan(100, 50, 64, "pad")
    assert geometry.valid == (0, 16, 64, 48)
    pixels = render(np.zeros((50, 100, 3), np.uint8), geometry)
    assert (pixels[:, :16] == np.array(PAD_COLOUR)[:, None, None]).all()
    assert (pixels[:, 16:48] == 0).all() and (pixels[:, 48:, 0].T == PAD_COLOUR).all()


def test_share_of_a_box_that_survives_the_crop():
    geometry = plan(200, 100, 50, "crop")  # keeps x in 50..150
    boxes, kept = geometry.map_boxes(
        np.array([[0, 0, 100, 100], [60, 10, 20, 20], [160, 0, 40, 40], [70, 5, 0, 9]], np.float32)
    )
    np.testing.assert_allclose(kept, [0.5, 1, 0, 0])
    np.testing.assert_allclose(boxes[:2], [[0, 0, 25, 50], [5, 5, 15, 15]])
    assert boxes[2, 0] == boxes[2, 2] == 50


def test_no_boxes_map_to_no_boxes():
    boxes, kept = plan(20, 30, 16, "pad").map_boxes(np.zeros((0, 4), np.float32))
    assert boxes.shape == (0, 4) and kept.shape == (0,)


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation, fast):
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = encoded(Image.fromarray(noise(96, 64)), "JPEG", exif=exif, quality=95)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(picture))).convert("RGB")
    assert picture_size(picture) == upright.size
    geometry = plan(*upright.size, 24, "crop")
    expected = render(np.asarray(upright), geometry).astype(int)
    assert np.abs(render(picture, geometry, fast) - expected).max() <= (16 if fast else 0)


def test_a_turned_picture_is_read_whatever_its_other_tags_hold():
    """Orientation 6, and an XResolution that is text: no picture is lost by what it isn't asked."""

    def entry(tag, kind, count, value):
        return struct.pack("<HHI", tag, kind, count) + value

    tags = entry(0x0112, 3, 1, struct.pack("<HH", 6, 0)) + entry(0x011A, 2, 3, b"72\0\0")
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + tags + struct.pack("<I", 0)
    pixels = Image.fromarray(noise(96, 64))
    picture = encoded(pixels, "JPEG", exif=exif, quality=95)
    stored = Image.open(io.BytesIO(encoded(pixels, "JPEG", quality=95)))
    upright = np.asarray(stored.transpose(Image.Transpose.ROTATE_270))
    geometry = plan(*upright.shape[1::-1], 24, "crop")
    assert (render(picture, geometry) == render(upright, geometry)).all()


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_other_pixel_formats_become_rgb(mode):
    grey = Image.fromarray(noise(40, 40)).convert("L")
    image = (
        Image.fromarray(np.asarray(grey).astype(np.uint16) << 8)
        if mode == "I;16"
        else grey.convert(mode)
    )
    assert image.mode == mode
    picture = encoded(image, "TIFF" if mode == "CMYK" else "PNG")
    expected = np.broadcast_to(np.asarray(grey), (3, 40, 40)).astype(int)
    out = render(picture, plan(40, 40, 40, "crop"))
    assert np.abs(out - expected).max() <= 3


def test_bad_pictures_say_why():
    whole = encoded(Image.fromarray(noise(80, 60)), "JPEG")
    geometry = plan(80, 60, 32, "crop")
    with pytest.raises(BadPicture, match="cannot be decoded"):
        render(b"no picture", geometry)
    with pytest.raises(BadPicture, match="cannot be decoded") as caught:
        render(whole[: len(whole) // 2], geometry)
    assert isinstance(caught.value.__cause__, OSError)
    with pytest.raises(BadPicture, match="is 80x60 pixels, its record says 60x80"):
        render(whole, plan(60, 80, 32, "crop"))
    with pytest.raises(BadPicture, match="unreadable header"):
        picture_size(whole[:10])
