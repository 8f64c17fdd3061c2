"""Features are the same bits on any number of ranks; unreadable pictures are listed."""

import os

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from reference.towers import tiny_encoder, tiny_model

from superclip.data.scenes import Scenes, write_coco
from superclip.errors import UserError
from superclip.evaluation.encode import Interrupted
from superclip.ops.world import World

PICTURES, BROKEN = 37, 11


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Scenes as picture files, one of them cut short."""
    out = tmp_path_factory.mktemp("scenes") / "coco"
    write_coco(Scenes("val", PICTURES), out, PICTURES)
    path = out / "images" / f"{BROKEN:06d}.png"
    path.write_bytes(path.read_bytes()[:300])
    return out


def encoded(folder, world: World):
    from superclip.data.coco import CocoFolder

    model, encoder = tiny_model(), tiny_encoder(batch_size=8, world=world)
    found = encoder.pictures(model, CocoFolder(folder, "all"), patches=True)
    captions = [text for record in found.records for text in record.captions] * 9
    return found, encoder.texts(model, captions)


def rank_main(rank: int, size: int, port: int, folder, out: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    world = World.from_env("cpu")
    found, texts = encoded(folder, world)
    keys = [record.key for record in found.records]
    asked = iter(range(100))
    stopping = tiny_encoder(
        batch_size=8, world=world, interrupted=lambda: rank == size - 1 and next(asked) == 0
    )
    with pytest.raises(Interrupted):
        stopping.pictures(tiny_model(), Scenes("val", PICTURES))
    content = [found.features, found.patches, texts, keys, list(found.missing)]
    torch.save(content, f"{out}/{rank}.pt")
    world.close()


@pytest.mark.dist
@pytest.mark.parametrize("size", [2, 3])
def test_any_number_of_ranks_gives_the_same_bits(size, folder, tmp_path):
    port = 20_000 + (os.getpid() + 7) % 20_000 + size
    mp.spawn(rank_main, (size, port, folder, str(tmp_path)), nprocs=size)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found, texts = encoded(folder, World())
    torch.set_num_threads(threads)
    for rank in range(size):
        features, patches, theirs, keys, missing = torch.load(
            tmp_path / f"{rank}.pt", weights_only=True
        )
        assert torch.equal(features, found.features) and torch.equal(theirs, texts)
        assert found.patches is not None and torch.equal(patches, found.patches)
        assert keys == [record.key for record in found.records] and missing == [str(BROKEN)]


def test_unreadable_pictures_are_left_out_and_named(folder):
    found, _ = encoded(folder, World())
    assert list(found.missing) == [str(BROKEN)] and found.missing[str(BROKEN)]
    assert len(found.features) == len(found.records) == PICTURES - 1
    assert all(record.picture == b"" for record in found.records)
    norms = found.features.norm(dim=1).numpy()
    np.testing.assert_allclose(norms, 1, rtol=1e-5)


def test_pooled_features_do_not_depend_on_asking_for_patches():
    model, encoder, scenes = tiny_model(), tiny_encoder(), Scenes("val", 5)
    both = encoder.pictures(model, scenes, patches=True)
    alone = encoder.pictures(model, scenes)
    assert torch.equal(both.features, alone.features) and alone.patches is None
    assert both.patches is not None and both.patches.shape == (5, model.patch_width)


def test_equal_texts_get_equal_bits():
    texts = [f"a red {k % 7}" for k in range(300)]
    vectors = tiny_encoder().texts(tiny_model(), texts)
    assert torch.equal(vectors[:7], vectors[7 * 41 : 7 * 42])


def test_features_that_are_not_finite_are_refused():
    model = tiny_model()
    with torch.no_grad():
        model.clip.visual.proj.fill_(float("nan"))
    with pytest.raises(UserError, match="not finite"):
        tiny_encoder().pictures(model, Scenes("val", 3))
