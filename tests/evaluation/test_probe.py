"""The linear probe against a naive solver, and the cache that stands before it."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from reference import classification as naive
from reference.labelled import write_folders
from reference.towers import tiny_encoder, tiny_model

from superclip.data.labelled import LabelledSource, open_labelled
from superclip.data.scenes import Scenes
from superclip.errors import UserError
from superclip.evaluation import probe as probing
from superclip.evaluation.cache import cached
from superclip.evaluation.probe import Seen, probe, regressions
from superclip.ops.world import World


def blobs(rng, n: int, c: int, apart: float, d: int = 5):
    """Points around `c` centres, and which one each belongs to."""
    labels = np.arange(n) % c
    centres = np.random.default_rng(9).normal(size=(c, d)) * apart
    return centres[labels] + rng.normal(size=(n, d)), labels


@pytest.mark.parametrize("strength", [0.01, 1.0, 30.0])
def test_the_solver_finds_the_optimum_of_the_naive_one(strength):
    rng = np.random.default_rng(0)
    x, labels = blobs(rng, 60, 3, 0.7)
    ((scores, failed),) = regressions(x[:50], labels[:50], x[50:], [strength], 3, 1000, 1e-6)
    logs = scores - np.log(np.exp(scores).sum(1, keepdims=True))
    expected = naive.softmax_regression(x[:50], labels[:50], x[50:], strength, 3)
    np.testing.assert_allclose(logs, expected, atol=1e-3)
    assert failed == 0


def test_one_question_at_a_time_and_classes_without_examples():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(40, 4))
    right = np.stack([x[:, 0] > 0.3, x[:, 1] + x[:, 2] > 0, np.zeros(40) > 0, np.ones(40) > 0], 1)
    ((scores, _),) = regressions(x[:30], right[:30], x[30:], [1.0], 4, 1000, 1e-6)
    for c in (0, 1):
        expected = naive.sigmoid_regression(x[:30], right[:30, c], x[30:], 1.0)
        np.testing.assert_allclose(scores[:, c], expected, atol=1e-3)
    assert np.isneginf(scores[:, 2:]).all()
    # Of three classes one has no example: the other two are told apart, it never wins.
    labels = np.where(x[:, 0] > 0, 2, 0)
    ((scores, _),) = regressions(x[:30], labels[:30], x[30:], [10.0], 3, 1000, 1e-6)
    assert (scores.argmax(1) == labels[30:]).mean() >= 0.9 and np.isneginf(scores[:, 1]).all()


def test_the_scale_of_features_changes_nothing():
    rng = np.random.default_rng(2)
    x, labels = blobs(rng, 80, 4, 0.8)
    folds = probing._folds([str(k) for k in range(60)], labels[:60])
    one = probing._probed(x[:60], labels[:60], x[60:], folds)
    two = probing._probed(x[:60] * 1e-3 + 7, labels[:60], x[60:] * 1e-3 + 7, folds)
    np.testing.assert_allclose(one[0], two[0], rtol=1e-3, atol=1e-3)
    assert one[1] == two[1]


def test_folds_share_every_class_alike_whatever_the_order():
    rng = np.random.default_rng(3)
    keys, labels = [f"k{k}" for k in range(83)], rng.integers(0, 4, 83)
    folds = probing._folds(keys, labels)
    for c in range(4):
        counts = np.bincount(folds[labels == c], minlength=probing.FOLDS)
        assert counts.max() - counts.min() <= 1
    order = rng.permutation(83)
    again = probing._folds([keys[k] for k in order], labels[order])
    np.testing.assert_array_equal(again, folds[order])


def as_seen(x, labels) -> Seen:
    return Seen({"pooled": x}, labels, [str(k) for k in range(len(x))], {})


def probed(monkeypatch, train: Seen, test: Seen, c: int):
    """`probe` on given features."""
    classes = [f"class{k}" for k in range(c)]
    sources = [
        LabelledSource(name, Scenes(name, len(seen.keys)), seen.labels, classes)
        for name, seen in (("train", train), ("test", test))
    ]
    found = {"train": train, "test": test}
    monkeypatch.setattr(probing, "_look", lambda *args: found[args[-1].name])
    return probe(tiny_model(), tiny_encoder(), *sources)


def values(result) -> dict[str, float]:
    return {m.name: m.statistic.value for m in result.measures}


def test_what_a_line_can_tell_is_told_and_noise_is_not(monkeypatch):
    rng = np.random.default_rng(4)
    train, test = (as_seen(*blobs(rng, n, 6, 6.0)) for n in (120, 60))
    result = probed(monkeypatch, train, test, 6)
    assert values(result) == {"pooled top-1": 1, "pooled top-5": 1, "pooled mean per class": 1}
    assert [m.chance for m in result.measures] == [1 / 6, 5 / 6, 1 / 6]
    shuffled = as_seen(train.features["pooled"], rng.permutation(train.labels))
    assert values(probed(monkeypatch, shuffled, test, 6))["pooled top-1"] < 0.4


def test_several_labels(monkeypatch):
    rng = np.random.default_rng(5)
    x = rng.normal(size=(150, 4))
    right = np.stack([x[:, 0] > 1, x[:, 1] > 0.5, np.zeros(150) > 0, x[:, 3] > -9], 1)
    result = probed(monkeypatch, as_seen(x[:100], right[:100]), as_seen(x[100:], right[100:]), 4)
    assert values(result)["pooled mAP"] > 0.9
    assert result.notes["no_verdict"] == ["class2", "class3"] and result.data["classes"] == 2
    json.dumps([result.data, result.notes])


def test_a_class_that_nobody_can_learn_or_judge(monkeypatch):
    rng = np.random.default_rng(6)
    (x, labels), (y, truth) = blobs(rng, 60, 3, 4.0), blobs(rng, 30, 3, 4.0)
    with pytest.raises(UserError, match="class class2 has test pictures, but none to learn from"):
        probed(monkeypatch, as_seen(x[labels < 2], labels[labels < 2]), as_seen(y, truth), 3)
    result = probed(monkeypatch, as_seen(x, labels), as_seen(y[truth < 2], truth[truth < 2]), 4)
    assert result.notes["pooled"]["empty_classes"] == ["class2"], "learned, never asked for"
    assert result.notes["no_verdict"] == ["class3"], "neither learned nor asked for"
    with pytest.raises(UserError, match="too few to learn and judge"):
        probed(
            monkeypatch, as_seen(x[labels < 1], labels[labels < 1]), as_seen(y[:1], truth[:1]), 1
        )


def test_fits_that_do_not_converge_are_counted_and_at_last_refused(monkeypatch):
    rng = np.random.default_rng(7)
    train, test = (as_seen(*blobs(rng, n, 3, 1.0)) for n in (60, 30))
    assert not any(t["unconverged"] for t in tried(probed(monkeypatch, train, test, 3)))
    monkeypatch.setattr(probing, "ITERATIONS", 3)
    assert any(t["unconverged"] for t in tried(probed(monkeypatch, train, test, 3)))
    monkeypatch.setattr(probing, "ITERATIONS", 1)
    monkeypatch.setattr(probing, "STRENGTHS", (1e4,))
    with pytest.raises(UserError, match="did not converge in 10 iterations at C = 10000"):
        probed(monkeypatch, train, test, 3)


def tried(result) -> list[dict[str, float]]:
    return result.notes["cross_validation"]["pooled"]


class Counting(Scenes):
    """Scenes that count how often one is read."""

    reads = 0

    def read(self, row: int):
        Counting.reads += 1
        return super().read(row)


@pytest.fixture
def scenes(monkeypatch) -> LabelledSource:
    monkeypatch.setattr(probing, "STRENGTHS", (0.1, 1.0))
    data = open_labelled("scenes:val", num=150)
    return dataclasses.replace(data, source=Counting("val", 150))


def run(scenes, tmp_path, checkpoint="a", **options):
    """Measures of a probe, and how many pictures were read for it."""
    before = Counting.reads
    found = probe(tiny_model(), tiny_encoder(**options), scenes, None, checkpoint, tmp_path)
    return values(found), Counting.reads - before


def test_the_second_run_reads_the_cache_and_another_checkpoint_does_not(scenes, tmp_path):
    n = len(scenes.rows)
    first, again = run(scenes, tmp_path), run(scenes, tmp_path)
    assert (first[1], again[1]) == (n, 0) and first[0] == again[0]
    assert set(first[0]) == {
        f"{kind} {what}"
        for kind in ("pooled", "patches")
        for what in ("top-1", "top-5", "mean per class")
    }
    assert run(scenes, tmp_path, "b")[1] == n
    assert run(scenes, tmp_path, precision="amp_bf16")[1] == n
    assert run(dataclasses.replace(scenes, stamp="later"), tmp_path)[1] == n
    assert run(scenes, tmp_path)[1] == 0 and len(list(tmp_path.iterdir())) == 4


def test_a_split_is_a_function_of_keys(scenes, tmp_path):
    result = probe(tiny_model(), tiny_encoder(), scenes)
    pictures = result.data["pictures"]
    assert isinstance(pictures, dict) and sum(pictures.values()) == len(scenes.rows)
    assert 0.6 < pictures["train"] / len(scenes.rows) < 0.8
    assert "sha256" in str(result.data["protocol"])


def test_parts_must_differ_and_have_the_same_classes(tmp_path):
    one = open_labelled(str(write_folders(tmp_path / "a", cat=3, dog=3)))
    with pytest.raises(UserError, match="--probe-test is the same data as --probe"):
        probe(tiny_model(), tiny_encoder(), one, one)
    other = open_labelled(str(write_folders(tmp_path / "b", cat=3, dog=3, newt=3)))
    with pytest.raises(UserError, match=r"other classes than --probe \(first: newt\)"):
        probe(tiny_model(), tiny_encoder(), one, other)


# The cache by itself


def keep(folder, facts, value: float = 1.0, world: World | None = None):
    """What the cache gives, and how often it had to be computed."""
    calls = []

    def compute():
        calls.append(1)
        whole = torch.full((4, 6), value)
        return {"x": whole[:, :3], "y": whole[:, 3:].half()}, {"missing": {"k": "cut"}}

    tensors, plain = cached(folder, facts, compute, world)
    assert tensors["x"].shape == (4, 3) and plain == {"missing": {"k": "cut"}}
    return float(tensors["x"][0, 0]), len(calls)


def test_the_cache_keeps_what_belongs_to_the_same_facts(tmp_path, capsys):
    assert keep(tmp_path / "new", {"a": 1, "b": [2]}) == (1.0, 1)
    assert keep(tmp_path / "new", {"b": [2], "a": 1}, 5.0) == (1.0, 0)
    assert keep(tmp_path / "new", {"a": 1, "b": [3]}, 5.0) == (5.0, 1)
    names = {path.suffix for path in (tmp_path / "new").iterdir()}
    assert names == {".safetensors"} and capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "harm, said",
    [
        (lambda p: p.write_bytes(p.read_bytes()[:40]), "is damaged"),
        (lambda p: p.write_bytes(b""), "is damaged"),
        (lambda p: p.write_bytes(p.read_bytes()[:-2] + b"\x00\x01"), "not match its checksum"),
        (lambda p: p.write_bytes(p.read_bytes().replace(b"cut", b"put")), "not match its checksum"),
        (
            lambda p: (keep(p.parent / "o", {"a": 2}), next((p.parent / "o").iterdir()).replace(p)),
            "belongs to something else",
        ),
    ],
)
def test_a_damaged_or_foreign_file_is_computed_again_and_said(tmp_path, capsys, harm, said):
    keep(tmp_path, {"a": 1})
    (path,) = tmp_path.iterdir()
    harm(path)
    assert keep(tmp_path, {"a": 1}, 3.0) == (3.0, 1)
    assert said in capsys.readouterr().err
    assert keep(tmp_path, {"a": 1}) == (3.0, 0)


def test_a_folder_that_cannot_be_written_keeps_nothing_and_says_so(tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    assert keep(tmp_path / "file" / "cache", {}) == (1.0, 1)
    assert "can't be written" in capsys.readouterr().err


class Alone(World):
    """A rank whose peers did not find the file."""

    def gather_objects(self, value):
        return [value, False]


def test_all_ranks_compute_or_none(tmp_path):
    keep(tmp_path, {})
    assert keep(tmp_path, {}, 2.0, Alone(rank=1, size=2)) == (2.0, 1)
    assert keep(tmp_path, {}) == (1.0, 0), "only the main rank writes"
