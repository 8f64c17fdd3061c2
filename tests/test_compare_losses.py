"""superclip.compare: which rates are tried, what is refused, what the table says; the whole command
once, at toy size."""

import json
import math

import numpy as np
import pytest
from conftest import command, refused

from superclip import study
from superclip.compare import GridConfig, grid, lines, plot
from superclip.errors import UserError
from superclip.evaluation.measures import Mean, Measure, Result
from superclip.study import Arm, Study


def result(task, name, values):
    hits = Mean(np.asarray(values, float), np.arange(len(values)), len(values))
    return Result(task, {"name": "toy"}, [Measure(name, hits, 0.1, hits=True)], {})


def seed_of(rng, *shares):
    """Retrieval and zero-shot results of one model with these shares of hits in 200 pictures."""
    names = ("image-to-text R@1", "text-to-image R@1", "top-1")
    drawn = [(rng.random(200) < share).astype(float) for share in shares]
    both = result("retrieval", names[0], drawn[0])
    both.measures.extend(result("retrieval", names[1], drawn[1]).measures)
    return [both, result("zeroshot", names[2], drawn[2])]


ARM = Arm("clip", ("--loss", "clip"))


class Landscape(Study):
    """A study whose runs cost nothing: the recall is a function of the learning rate."""

    def __init__(self, best, *words):
        config = GridConfig(losses=("clip",), **dict(words))
        super().__init__(config, config.out, [ARM], [], [])
        self.best, self.trained = best, []

    def train(self, runs):
        self.trained += [lr for _, _, lr, _ in runs]

    def measured(self, out, config):
        lr = float(out.name.removeprefix("lr-"))
        score = 1 / (1 + abs(math.log2(lr / self.best)))
        return [result("retrieval", "image-to-text R@1", [score] * 4)]


@pytest.mark.parametrize(
    "best,tried",
    [
        (5e-4, [2.5e-4, 5e-4, 1e-3]),
        (2e-3, [2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3]),
        (1.25e-4, [6.25e-5, 1.25e-4, 2.5e-4, 5e-4, 1e-3]),
    ],
)
def test_a_search_goes_on_until_the_best_is_no_end(best, tried, capsys):
    grid = Landscape(best, ("tune", 3))
    assert grid.rate(ARM) == pytest.approx(best)
    assert sorted(grid.trained) == pytest.approx(tried)
    assert f"chosen {best:g}" in capsys.readouterr().out


def test_a_search_that_finds_no_end_says_so(capsys):
    grid = Landscape(1.0, ("tune", 3))
    assert len(grid.trained) == 0 and grid.rate(ARM) == pytest.approx(1.6e-2)
    assert len(grid.trained) == 7 and "at the end of the range" in capsys.readouterr().out


def test_holm_is_over_all_arms_and_the_average_over_seeds(tmp_path):
    rng = np.random.default_rng(0)
    clip = Arm("clip", ())
    alike, better = (Arm(name, (), against="clip") for name in ("siglip", "cyclip"))
    found = {
        clip: [seed_of(rng, 0.5, 0.5, 0.5) for _ in range(6)],
        alike: [seed_of(rng, 0.5, 0.5, 0.5) for _ in range(6)],
        better: [seed_of(rng, 0.8, 0.8, 0.8) for _ in range(6)],
    }
    rows = study.tested(found, 500)
    assert [row["measure"] for row in rows] == ["TR@1", "IR@1", "top-1", "average"] * 2
    order = sorted(rows, key=lambda row: row["p"])
    assert order[0]["p_holm"] == pytest.approx(min(1, 8 * order[0]["p"]))
    told = {(row["arm"], row["measure"]): row["verdict"] for row in rows}
    assert all("better" in told["cyclip", m] for m in ("TR@1", "IR@1", "top-1", "average"))
    assert not any("better" in told["siglip", m] for m in ("TR@1", "IR@1", "top-1", "average"))
    values = {str(arm): {"lr": 1e-3, "values": {"TR@1": [0.1, 0.2]}} for arm in found}
    report = {"arms": values, "against": "clip", "seeds": 2, "tuned_on": None, "data": {}}
    report["differences"] = []
    text = "\n".join(lines(report))
    assert "15.0 (7.1)" in text and "rates were not tuned" in text
    plot(report, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5_000


@pytest.mark.parametrize(
    "values,shared,told",
    [
        ({"losses": ("clip", "no")}, [], "'no' is unknown"),
        ({"losses": ("clip",), "against": "siglip"}, [], "not among --losses"),
        ({"losses": ("clip",)}, ["--lr", "1e-3"], "--lr is the comparison's own"),
        ({"losses": ("clip",)}, ["--rho", "1"], "--rho belongs to --loss"),
        ({"losses": ("clip",), "set": ("siglip.init_bias=-5",)}, [], "for one of --losses"),
        ({"losses": ("clip", "siglip"), "set": ("siglip.epochs=50",)}, [], "no option of siglip"),
        ({"losses": ("clip",), "tune": 3}, ["--train-data", "coco:x"], "needs --tune-data"),
        ({"losses": ("clip",), "tune": 3, "tune_data": "scenes:val"}, [], "pictures that judge"),
        ({"losses": ("clip",), "data": "coco:nowhere"}, [], "no folder nowhere"),
        ({"losses": ("clip",), "val_data": "coco:nowhere"}, [], "no folder nowhere"),
        ({"losses": ("clip",), "optimizers": ("adamq",)}, [], "'adamq' is unknown"),
        ({"losses": ("clip,clip",)}, [], "name each once"),
        ({"losses": ("clip",), "launcher": " "}, [], "--launcher is empty"),
    ],
)
def test_what_a_run_would_refuse_is_refused_first(values, shared, told):
    with pytest.raises(UserError, match=told):
        grid(GridConfig(**values), shared)


def test_runs_of_other_data_are_no_comparison(tmp_path):
    config = GridConfig(losses=("clip",))
    runs = grid(config, [])
    facts = {"data_sha256": "a", "versions": {"torch": "2.8"}, "device": "cpu"}
    runs.facts = {tmp_path / "a": facts, tmp_path / "b": facts | {"device": "cuda"}}
    assert runs.unlike() == ["runs differ in device: cpu and cuda"]
    runs.facts[tmp_path / "b"] = facts | {"data_sha256": "b"}
    with pytest.raises(UserError, match=r"b was trained on other data than .*a:"):
        runs.unlike()


@pytest.mark.slow
def test_the_command_goes_on_where_it_stopped(few_scenes, tmp_path):
    size = f"--train-num-samples 24 --batch-size 12 --val-data {few_scenes} --threads 1"
    words = "superclip.compare --losses clip,siglip --seeds 2 --tune 1 --set siglip.init_bias=-5"
    words = [*words.split(), "--val-data", str(few_scenes), "--out", str(tmp_path / "grid"), "--"]
    done = command(*words, *size.split())
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "grid" / "compare.json").read_text())
    assert report["arms"]["siglip"]["config"]["options"]["init_bias"] == -5
    assert len(report["arms"]["clip"]["values"]["TR@1"]) == 2
    assert all("descriptive" in row["verdict"] for row in report["differences"])
    again = command(*words, *size.split())
    assert "training" not in again.stdout and again.stdout.splitlines()[-1].startswith("written")
    other = size.replace("12", "8")
    assert "another" in refused(*words, *other.split())
