import json

import numpy as np
import pytest
import torch
from reference import retrieval as naive
from reference.evaluation import repeated
from reference.towers import tiny_encoder, tiny_model

from superclip.data.coco import CocoFolder
from superclip.data.scenes import Scenes, write_coco
from superclip.errors import UserError
from superclip.evaluation.measures import Mean, Median
from superclip.evaluation.retrieval import (
    DIRECTIONS,
    NAMES,
    PROTOCOLS,
    find_protocol,
    random_order,
    retrieval,
    retrieve,
)
from superclip.evaluation.statistics import compare, intervals

OPEN = [name for name, protocol in PROTOCOLS.items() if protocol.pictures is None]


def values(measures):
    assert tuple(m.name for m in measures) == NAMES
    return {m.name: m.statistic.value for m in measures}


def expected(image, text, pairs):
    """Every metric of both directions, by the whole matrix, in the order of `NAMES`."""
    found = []
    for rows in naive.answers((image @ text.T).tolist(), pairs.tolist()):
        _, rank, precision, _ = map(np.array, zip(*rows))
        found += [(rank < k).mean() for k in (1, 5, 10)]
        found += [np.median(rank) + 1, rank.mean() + 1, precision.mean()]
    return dict(zip(NAMES, found))


def problem(n, m, seed=0, share=0.8, width=6):
    """Lattice features; captions go to the pictures in order, and a few of both to nothing."""
    rng = np.random.default_rng(seed)
    owner = np.sort(rng.integers(0, n, m))
    kept = rng.random(m) < share
    image, text = rng.integers(-2, 3, (n, width)), rng.integers(-1, 2, (m, width))
    text += image[owner]
    pairs = np.stack([owner, np.arange(m)], 1)[kept]
    return tuple(map(torch.from_numpy, (image.astype("f4"), text.astype("f4"), pairs)))


def paired(*owner):
    return torch.tensor([owner, range(len(owner))]).T


def test_every_metric_equals_sorting_the_whole_matrix():
    for seed in range(4):
        image, text, pairs = problem(50, 130, seed)
        measures = retrieval(image, text, pairs)
        assert values(measures) == pytest.approx(expected(image, text, pairs))
        for m in measures:
            assert m.percent == m.higher_is_better == (not m.name.endswith("rank"))
            assert m.hits == ("R@" in m.name)
            assert m.candidates == (130 if m.name.startswith("image") else 50)
            assert m.statistic.pictures == 50


def test_by_hand():
    # Two pictures, three captions; the similarities are written down in the captions.
    text = torch.tensor([[0.9, 0.2], [0.5, 0.8], [0.1, 0.8]])
    found = values(retrieval(torch.eye(2), text, paired(0, 0, 1)))
    # Picture 0: right ones at 1 and 2. Picture 1: a wrong one ties with the right one: place 2.
    assert found["image-to-text R@1"] == 0.5 and found["image-to-text R@5"] == 1
    assert found["image-to-text median rank"] == found["image-to-text mean rank"] == 1.5
    assert found["image-to-text mAP@10"] == (1 + 1 / 2) / 2
    # Captions: .9 against .2 is right, .5 against .8 is not, .8 against .1 is right.
    assert found["text-to-image R@1"] == 2 / 3 and found["text-to-image median rank"] == 1
    assert found["text-to-image mean rank"] == pytest.approx(4 / 3)
    assert found["text-to-image mAP@10"] == pytest.approx((1 + 1 / 2 + 1) / 3)


def test_duplicates_count_against_the_model():
    # The same text on two pictures, listed twice: neither picture can tell which one is its own.
    image, text = torch.eye(2), torch.ones(2, 2)
    assert values(retrieval(image, text, paired(0, 1)))["image-to-text R@1"] == 0
    assert values(retrieval(image, text, paired(0, 1)))["text-to-image R@1"] == 0
    # One caption that belongs to both is right for both, and finds the first by either.
    shared = retrieval(image, torch.ones(1, 2), torch.tensor([[0, 0], [1, 0]]))
    assert all(v == 1 for v in values(shared).values())
    assert [m.statistic.queries for m in shared] == [2] * 6 + [1] * 6


def test_a_picture_without_caption_is_no_query_but_a_candidate():
    image = torch.tensor([[1.0, 0], [0, 1], [2, 2]])  # picture 2 is nearer to every caption
    measures = retrieval(image, torch.eye(2), paired(0, 1))
    found = values(measures)
    assert found["image-to-text R@1"] == 1 and found["text-to-image mean rank"] == 2
    assert [m.statistic.queries for m in measures] == [2] * 12
    assert [m.statistic.pictures for m in measures] == [3] * 12
    assert measures[0].candidates == 2 and measures[6].candidates == 3
    assert measures[6].chance == pytest.approx(1 / 3)


def test_a_caption_without_picture_is_a_candidate_in_every_fold():
    text = torch.tensor([[9.0, 9], [1, 0], [0, 1]])
    pairs = torch.tensor([[0, 1], [1, 2]])
    for pool in (None, 1):
        found = retrieval(torch.eye(2), text, pairs, pool=pool)
        assert values(found)["image-to-text mean rank"] == 2
        assert values(found)["text-to-image mean rank"] == 1


def test_first_caption_takes_one_caption_a_picture_both_ways():
    image, text, pairs = problem(40, 120)
    first = {int(i): int(j) for i, j in reversed(pairs.tolist())}
    free = set(range(120)) - set(pairs[:, 1].tolist())
    kept = sorted([*first.values(), *free])
    chosen = torch.tensor([[i, kept.index(j)] for i, j in sorted(first.items())])
    found = retrieval(image, text, pairs, "first-caption")
    assert values(found) == pytest.approx(expected(image, text[kept], chosen))


def test_folds_are_consecutive_and_a_partial_one_is_left_out():
    image, text, pairs = problem(47, 141, share=1.0)
    found = retrieval(image, text, pairs, pool=10)
    folds, chances = [], []
    queries: dict[str, list[int]] = {direction: [] for direction in DIRECTIONS}
    for start in range(0, 40, 10):
        mine = pairs[(pairs[:, 0] >= start) & (pairs[:, 0] < start + 10)]
        low, high = int(mine[0, 1]), int(mine[-1, 1]) + 1
        part = image[start : start + 10], text[low:high], mine - torch.tensor([start, low])
        folds.append(expected(*part))
        queries["image-to-text"].append(len(set(mine[:, 0].tolist())))
        queries["text-to-image"].append(len(mine))
        right = np.bincount(mine[:, 0] - start)
        chances.append(random_order(right[right > 0], len(mine))["R@5"])
    assert [m.statistic.pictures for m in found] == [40] * 12
    assert found[0].candidates is None and found[6].candidates == 10
    for m in found:
        # Every query counts once; a median is the mean of the folds' own.
        count = None if "median" in m.name else queries[m.name.split()[0]]
        mean = np.average([fold[m.name] for fold in folds], weights=count)
        assert m.statistic.value == pytest.approx(mean), m.name
    assert found[1].chance == pytest.approx(np.average(chances, weights=queries["image-to-text"]))
    assert found[7].chance == pytest.approx(5 / 10)


def test_a_caption_of_pictures_in_two_folds_is_asked_in_both():
    pairs = torch.tensor([[0, 0], [1, 1], [2, 2], [3, 2], [0, 2]])
    found = retrieval(torch.eye(4), torch.eye(4)[:3], pairs, pool=2)
    assert [m.statistic.queries for m in found] == [4] * 6 + [4] * 6
    assert found[6].statistic.picture.tolist() == [0, 1, 0, 2]  # its first picture of each fold


@pytest.mark.parametrize("protocol", ["coco-5k", "coco-1k", "flickr"])
def test_published_protocols(protocol):
    chosen = PROTOCOLS[protocol]
    # Six captions a picture, of which five count: the sixth would always be found.
    n, rng = chosen.pictures, torch.Generator().manual_seed(0)
    image = torch.randn(n, 8, generator=rng)
    text = image.repeat_interleave(6, 0) + torch.randn(6 * n, 8, generator=rng)
    text[5::6] = image * 9
    pairs = paired(*np.arange(n).repeat(6).tolist())
    five = torch.arange(6 * n) % 6 < 5
    found = values(retrieval(image, text, pairs, protocol))
    owner = paired(*np.arange(n).repeat(5).tolist())
    plain = retrieval(image, text[five], owner, pool=chosen.pool)
    assert found == values(plain) and found["image-to-text R@1"] < 1
    if protocol == "coco-1k":
        folds = [
            values(retrieval(image[k : k + 1000], text[five][5 * k : 5 * k + 5000], owner[:5000]))
            for k in range(0, 5000, 1000)
        ]
        for name in NAMES:
            assert found[name] == pytest.approx(np.mean([fold[name] for fold in folds]))
        assert plain[0].candidates == 5000 and plain[6].candidates == 1000


@pytest.mark.parametrize(
    ("protocol", "pictures", "pool", "said"),
    [
        ("coco-5k", 4999, None, "coco-5k needs 5000 pictures.*4999.*--protocol all-captions"),
        ("coco-1k", 40_504, None, "coco-1k needs 5000 pictures.*40504"),
        ("flickr", 8000, None, "flickr needs 1000 pictures"),
        ("coco-1k", 5000, 500, "ranks 1000 pictures at a time; --pool 500"),
        ("flickr", 1000, 500, "ranks 1000 pictures at a time; --pool 500"),
        ("all-captions", 20, 21, "--pool 21: there are 20"),
        ("coco5k", 5000, None, "did you mean 'coco-5k'"),
    ],
)
def test_data_that_do_not_fit_a_protocol_are_refused(protocol, pictures, pool, said):
    with pytest.raises(UserError, match=said):
        find_protocol(protocol, pictures, pool)


@pytest.mark.parametrize("protocol", OPEN)
def test_features_with_nan_and_folds_without_captions_are_refused(protocol):
    image = torch.eye(4)
    with pytest.raises(UserError, match="no picture from 2 to 3 has a caption"):
        retrieval(image, torch.eye(4)[:2], paired(0, 1), protocol, pool=2)
    image[2, 1] = torch.nan
    with pytest.raises(UserError, match="image features are not finite"):
        retrieval(image, torch.eye(4), paired(0, 1, 2, 3), protocol)


def test_the_bootstrap_draws_pictures_with_their_captions():
    image, text, pairs = problem(30, 80)
    rng = np.random.default_rng(0)
    weights = rng.multinomial(30, np.full(30, 1 / 30), size=20).astype(float)
    for m in retrieval(image, text, pairs):
        statistic = m.statistic
        assert isinstance(statistic, Mean | Median)
        take = np.mean if isinstance(statistic, Mean) else np.median
        drawn = [take(repeated(statistic.values, statistic.picture, w)) for w in weights]
        np.testing.assert_allclose(statistic(weights), drawn)
    # Folds: a draw that leaves the second one empty has the median of the first alone.
    halves = retrieval(image, text, pairs, pool=15)[3].statistic
    first = np.repeat([[1.0, 0.0]], 15, axis=1)
    alone = retrieval(image[:15], text, pairs[pairs[:, 0] < 15], pool=15)[3].statistic
    assert halves.pictures == 30 and halves.queries == len(set(pairs[:, 0].tolist()))
    assert halves(first)[0] == alone.value


@pytest.mark.parametrize("pool", [None, 15])
def test_models_compare_on_every_measure(pool):
    image, text, pairs = problem(30, 80)
    noise = torch.randn(text.shape, generator=torch.Generator().manual_seed(0))
    first, second = (retrieval(image, text + k * noise, pairs, pool=pool) for k in (0, 3))
    for interval, a, b in zip(intervals(first, 200), first, second):
        assert interval.low <= interval.value <= interval.high
        found = compare([a], [b], True, 0.02, 200)
        assert (found.test == "McNemar by picture") == a.hits
    assert compare([first[7]], [second[7]], True, 0.02, 200).value > 0.1


def orders(right, candidates, draws, rng):
    """Every metric of `draws` evaluations in which each query orders its candidates at random."""
    found = []
    for _ in range(draws):
        places = [np.sort(rng.permutation(candidates)[:o]) + 1 for o in right]
        rank = np.array([p[0] for p in places])
        precision = np.mean([naive.average_precision(p) for p in places])
        recall = [(rank <= k).mean() for k in (1, 5, 10)]
        found.append([*recall, np.median(rank), rank.mean(), precision])
    return np.array(found)


@pytest.mark.parametrize(
    ("right", "candidates", "slack"),
    [
        ([1] * 8, 7, 0),
        ([5] * 9, 40, 0),
        ([12] * 7, 30, 0),
        ([3], 3, 0),
        # Unequal numbers: the median is that of the average query, right to a few per cent here.
        ([1, 2, 5, 5, 5, 7, 1, 5], 40, 0.03),
    ],
)
def test_chance_is_what_random_orders_score(right, candidates, slack):
    drawn = orders(right, candidates, 3000, np.random.default_rng(0))
    chance = random_order(np.array(right), candidates)
    error = 4 * drawn.std(0) / 3000**0.5 + 1e-12
    error[3] += slack * drawn[:, 3].mean()
    assert (np.abs(drawn.mean(0) - list(chance.values())) < error).all()


def test_chance_beside_every_value():
    rng = torch.Generator().manual_seed(0)
    image, text = torch.randn(60, 5, generator=rng), torch.randn(300, 5, generator=rng)
    drawn = [
        retrieval(image, text, paired(*torch.randint(60, (300,), generator=rng).tolist()))
        for _ in range(60)
    ]
    for rows in zip(*drawn):
        mean = np.mean([m.statistic.value for m in rows])
        assert mean == pytest.approx(np.mean([m.chance for m in rows]), rel=0.15), rows[0].name


def test_of_a_model_and_a_source(tmp_path):
    out = tmp_path / "coco"
    write_coco(Scenes("val", 12), out, 12)
    broken = out / "images" / "000003.png"
    broken.write_bytes(broken.read_bytes()[:300])
    told = json.loads((out / "captions.json").read_text())
    told["annotations"] += [
        {"id": 100 + k, "image_id": k % 7, "caption": f"{k} red stars"} for k in range(20)
    ]
    (out / "captions.json").write_text(json.dumps(told))
    model, encoder, source = tiny_model(), tiny_encoder(), CocoFolder(out, "all")
    found = retrieve(model, encoder, source, pool=5)
    assert json.loads(json.dumps(found.data)) == found.data
    assert found.data["sha256"] == source.digest and found.data["pool"] == 5
    assert found.data["pictures"] == 11 and len(found.data["missing"]) == 1
    assert found.data["captions"] == 28  # one each and 20 more, without the broken picture's four
    assert [m.statistic.pictures for m in found.measures] == [10] * 12
    seen = encoder.pictures(model, source)
    captions = [record.captions for record in seen.records]
    text = encoder.texts(model, [t for texts in captions for t in texts])
    owner = np.repeat(np.arange(11), list(map(len, captions)))
    plain = retrieval(seen.features, text, paired(*owner.tolist()), pool=5)
    assert values(found.measures) == values(plain)
    first = retrieve(model, encoder, source, "first-caption")
    plain = retrieval(seen.features, text, paired(*owner.tolist()), "first-caption")
    assert values(first.measures) == values(plain) and first.data["captions"] == 11
    part = retrieve(model, encoder, source, rows=range(3))
    assert part.data["pictures"] == part.measures[0].statistic.pictures == 3
    with pytest.raises(UserError, match="flickr needs 1000 pictures"):
        retrieve(model, encoder, source, "flickr")
    with pytest.raises(UserError, match="--pool 12: there are 11 readable"):
        retrieve(model, encoder, source, pool=12)
