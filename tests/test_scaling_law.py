"""The inverse scaling law's arithmetic on invented values; what is refused; a toy run."""

import json

import numpy as np
import pytest
from conftest import command
from scipy.stats import ttest_rel

from superclip.errors import UserError
from superclip.scaling_law import LawConfig, family, judged, lines, plot, verdict
from superclip.study import Study


def invented(drops, seeds=6, noise=0.005, config=None):
    """A report whose sizes lose `drops` from all tokens to the fewest."""
    config = config or LawConfig(seeds=seeds)
    rng, points, arms = np.random.default_rng(0), family(config), {}
    for model, drop in zip(config.models, drops):
        own = [point for point in points if point.model == model]
        for place, point in enumerate(own):
            values = 0.5 - drop * place / (len(own) - 1) + noise * rng.standard_normal(seeds)
            arms[point.arm.name] = {"lr": 1e-3, "values": {"average": values.tolist()}}
    report = {"arms": arms, "seeds": seeds, "unlike": [], "searches": {}, "tuned_on": None}
    return judged(report, points, config)


def test_tokens_and_operations_of_the_family():
    points = family(LawConfig())
    assert [p.tokens for p in points] == [26, 19, 13] * 3
    assert [p.arm.against is None for p in points] == [True, False, False] * 3
    first = [p.operations for p in points if p.tokens == 26]
    assert first == sorted(first) and first[2] > 2 * first[0]


def test_a_drop_is_a_paired_difference_over_seeds():
    report = invented((0.2, 0.1, 0.05))
    for row, (model, drops) in zip(report["law"], report["drops"].items()):
        assert row["what"] == f"drop of {model}"
        assert row["value"] == pytest.approx(np.mean(drops))
        values = [report["arms"][f"{model}, {n} tokens"]["values"]["average"] for n in (26, 13)]
        assert row["p"] == pytest.approx(ttest_rel(*values).pvalue)
    small, large = report["drops"]["scenes-vit-s"], report["drops"]["scenes-vit"]
    last = report["law"][-1]
    band = ttest_rel(small, large).confidence_interval(0.95)
    assert (last["low"], last["high"]) == pytest.approx((band.low, band.high))
    order = sorted(row["p"] for row in report["law"])
    assert min(row["p_holm"] for row in report["law"]) == pytest.approx(4 * order[0])


@pytest.mark.parametrize(
    "drops,seeds,told",
    [
        ((0.2, 0.1, 0.05), 6, "shrinks with size here"),
        ((0.05, 0.1, 0.2), 6, "grows with size here, against the law"),
        ((0.1, 0.1, 0.1), 6, "no difference between the drops"),
        ((0.2, 0.1, 0.05), 3, "descriptive"),
        ((0.2, 0.1, 0.05), 1, "nothing can be said"),
    ],
)
def test_the_verdict(drops, seeds, told, tmp_path):
    report = invented(drops, seeds)
    assert told in verdict(report)
    text = "\n".join(lines(report))
    assert told in text and "rates were not tuned" in text and "scenes-vit-m" in text
    plot(report, tmp_path / "law.png")
    assert (tmp_path / "law.png").stat().st_size > 5_000


def test_the_null_is_rarely_rejected(monkeypatch):
    """400 invented families without any difference between sizes."""
    monkeypatch.setattr("gc.collect", lambda *_: 0)  # statsmodels does, half a second each time
    rng, config = np.random.default_rng(1), LawConfig()
    points, wrong = family(config), 0
    for _ in range(400):
        arms = {
            p.arm.name: {"lr": 1, "values": {"average": list(0.1 * rng.standard_normal(6))}}
            for p in points
        }
        report = judged({"arms": arms, "seeds": 6, "unlike": [], "searches": {}}, points, config)
        wrong += "no difference" not in verdict(report)
    assert wrong <= 20  # Holm over four rows makes it less than 5 %


@pytest.mark.parametrize(
    "values,told",
    [
        ({"models": ("scenes-vit", "scenes-vit-s")}, "from small to large"),
        ({"reductions": ("resize:48", "resize:64")}, "order them from many to few"),
        ({"reductions": ("resize:40",)}, "don't tile"),
        ({"reductions": ("some",)}, "write resize:SIZE"),
        ({"models": ("scenes-vit", "scenes-vit")}, "name each once"),
        ({"measure": "averag"}, "did you mean 'average'"),
        ({"tune_lengths": False}, "goes with --tune N"),
        ({"models": ("RN50",)}, "vision transformers are counted"),
    ],
)
def test_what_is_no_family(values, told):
    with pytest.raises(UserError, match=told):
        family(LawConfig(**values))


def test_all_tokens_are_all_tokens_whatever_recipes_and_files_say(tmp_path):
    (tmp_path / "few.toml").write_text('image_reduction = "random:0.5"\ncontext_length = 7\n')
    shared = ["--config", str(tmp_path / "few.toml"), "--loss", "clip"]
    points = family(LawConfig(), shared)
    assert [p.tokens for p in points] == [26, 19, 13] * 3
    plain = family(LawConfig())
    assert all(a.operations < b.operations for a, b in zip(points, plain))  # of shorter texts
    study = Study(LawConfig(), tmp_path, [p.arm for p in points], shared, ())
    found = [study.parsed(arm, 0, None, tmp_path).model.image_reduction for arm in study.arms[:3]]
    assert found == [None, "random:0.75", "random:0.5"]
    with pytest.raises(UserError, match="leave it out after --"):
        Study(LawConfig(), tmp_path, study.arms, ["--image_reduction", "x"], ["--image-reduction"])


def test_a_run_is_what_its_files_say(tmp_path):
    """A second stage that was changed is another run, though the command is the same."""
    (tmp_path / "two.toml").write_text("lr = 1e-4")
    arm = family(LawConfig())[0].arm
    study = Study(LawConfig(), tmp_path, [arm], ["--stage-two", str(tmp_path / "two.toml")], ())
    before = study.identity((arm, 0, None, tmp_path / "run"))
    (tmp_path / "two.toml").write_text("lr = 2e-4")
    assert study.identity((arm, 0, None, tmp_path / "run")) != before


def test_a_measure_that_was_not_taken():
    with pytest.raises(UserError, match="there are average"):
        invented((0.2, 0.1, 0.05), config=LawConfig(measure="mAP"))


@pytest.mark.slow
def test_the_command_with_a_second_stage(few_scenes, tmp_path):
    """Two sizes, two lengths, and a second stage at full length, which is what is measured."""
    (tmp_path / "two.toml").write_text("train_num_samples = 12\n")
    words = (
        "superclip.scaling_law --models scenes-vit-s,scenes-vit --reductions resize:32 --seeds 2"
    )
    words = [*words.split(), "--val-data", str(few_scenes), "--out", str(tmp_path / "law"), "--"]
    words += ["--loss", "clip", "--train-num-samples", "24", "--batch-size", "12", "--threads", "1"]
    words += ["--val-data", str(few_scenes), "--stage-two", str(tmp_path / "two.toml")]
    done = command(*words)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "law" / "law.json").read_text())
    assert "descriptive" in done.stdout and (tmp_path / "law" / "law.png").is_file()
    assert [len(v) for v in report["drops"].values()] == [2, 2]
    assert (tmp_path / "law/scenes-vit, 5 tokens/seed1/stage2/final_epoch.pt").is_file()
    again = command(*words)
    assert "training" not in again.stdout and again.returncode == 0
