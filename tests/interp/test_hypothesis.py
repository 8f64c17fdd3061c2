"""Claims written down beforehand: how files are read, how intervals decide, what is measured on
confirm pictures, and that a claim changed after its answer is told."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, refused
from PIL import Image
from scipy.stats import ttest_1samp, ttest_ind

from interp import measures as measures_module
from interp.causal.ablation import ablate, contrastive_margin
from interp.causal.units import mean_activations
from interp.claim import MEASURES, Wanted, read_hypothesis
from interp.config import HypothesisConfig, OfSweep
from interp.confirm import Grounding, layers_of, open_confirm
from interp.heads import Head
from interp.hypothesis import SEEDS, _refuse_unlike, compared, decide_one, main
from interp.measures import ANSWERS, NothingToTell, OfMeans, _reached, best_rate, depth
from interp.render.claim import _last_lines, figure
from interp.results import SweepResults
from interp.stats import seeds as seeds_module
from interp.stats.seeds import least_told, share_told
from interp.stats.splits import assign_split
from interp.sweep import main as sweep
from interp.swept import open_swept
from superclip.data.scenes import Scenes
from superclip.data.shard_writer import write_shards
from superclip.errors import UserError
from superclip.evaluation.measures import Mean, Measure
from superclip.evaluation.statistics import relabelled
from superclip.model.weights import load_checkpoint

SHIPPED = sorted((ROOT / "research" / "hypotheses").glob("*.toml"))
LATE = ROOT / "research" / "hypotheses" / "late_crystallisation.toml"
HOW = ("", "_patches", "_same_rate")
PLAIN = """schema = 1
claim = "c"
why = "w"
measure = "excess"
test = "above"
margin = 0.05
"""


def written(tmp_path, text=PLAIN, name="claim.toml"):
    path = tmp_path / name
    path.write_text(text)
    return path


def test_shipped_claims_can_be_read():
    claims = {path.stem: read_hypothesis(path) for path in SHIPPED}
    assert len(claims) == 11 and {c.wanted.measure for c in claims.values()} == {*MEASURES}
    two = {name for name, claim in claims.items() if len(claim.losses) == 2}
    assert two == {
        *(f"earlier_in_{what}{how}" for what in ("depth", "training") for how in HOW),
        "binding",
        "learning_rate_sensitivity",
    }
    assert all(claims[name].losses == ("superclip", "clip") for name in two)


@pytest.mark.parametrize(
    "test,margin,band,told",
    [
        ("above", 0.05, (0.06, 0.2), "supported"),
        ("above", 0.05, (-0.1, 0.04), "refuted"),
        ("above", 0.05, (0.01, 0.04), "refuted"),  # above 0, and too small to matter
        ("above", 0.05, (0.04, 0.06), "not decided"),
        ("below", -1.0, (-3, -1.1), "supported"),
        ("below", -1.0, (-0.9, 3), "refuted"),
        ("below", 0.0, (-1, 1), "not decided"),
        ("within", 0.1, (-0.09, 0.05), "supported"),
        ("within", 0.1, (0.11, 0.3), "refuted"),
        ("within", 0.1, (-0.3, -0.11), "refuted"),
        ("within", 0.1, (-0.2, 0.05), "not decided"),
    ],
)
def test_where_the_interval_lies_decides(test, margin, band, told, tmp_path):
    text = PLAIN.replace('"above"', f'"{test}"').replace("0.05", str(margin))
    assert read_hypothesis(written(tmp_path, text)).decide(*band) == told


@pytest.mark.parametrize(
    "old,new,told",
    [
        ("schema = 1", "schema = 2", "this version reads schema 1"),
        ("schema = 1", "", "schema must be given"),
        ("margin", "margn", "'margn' is no key; did you mean 'margin'"),
        ("margin", "share_ = 1\nmargin", "'share_' is no key; did you mean 'share'"),
        ('claim = "c"', 'claim = ""', "claim must be given"),
        ('why = "w"', "", "why must be given"),
        ('"excess"', '"exces"', "did you mean 'excess'"),
        ('"above"', '"over"', "test 'over' is none of above"),
        ("0.05", '"much"', "margin must be given, as float"),
        ("0.05", "nan", "must be finite"),
        ('"above"', '"within"', None),
        ("margin", 'heads = "middle"\nmargin', "heads 'middle' is none of all, first half"),
        ("margin", "share = 0.5\nmargin", "'share' is nothing that excess reads"),
        ("margin", "pictures = 3\nmargin", "must lie in 40"),
        ("margin", 'second = "clip"\nmargin', "first must be given, as str"),
        ("margin", 'minus = "all"\nmargin', "heads and minus are both 'all'"),
        ("schema = 1", "schema = true", "schema True"),
        ('"c"', '"c\\nSUPPORTED"', "claim must be given"),
        ("0.05", "9" * 400, "margin must be given"),
        ("why", "x = " + "[" * 5000 + "\nwhy", "is no hypothesis file"),
        ('"excess"', '"binding"\nkinds = [["a"]]', "kinds must name some"),
        ('"excess"', '"binding"\nkinds = ["a", "a"]', "kinds must name some"),
        ('"excess"', '"binding"\nkinds = []', "kinds must name some"),
        ("margin", 'first = "clp"\nmargin', "first 'clp' is none of"),
        ("margin", 'second = "clip"\nfirst = 3\nmargin', "first must be given, as str"),
        ("margin", "= 3\nmargin", "is no hypothesis file"),
        ('"excess"', '"sensitivity"', "rates must be three numbers at least"),
        ('"excess"', '"sensitivity"\nrates = [1e-4, 1e-4, 2e-4]', "rates must be three"),
        ('"excess"', '"sensitivity"\nrates = [1e-4, -1.0, 2e-4]', "rates must be three"),
        ("margin", "same_rate = true\nmargin", "'same_rate' is nothing that excess"),
    ],
)
def test_files_that_state_no_claim(old, new, told, tmp_path):
    path = written(tmp_path, PLAIN.replace(old, new))
    if told is None:
        assert read_hypothesis(path).rule == "excess within -0.05 .. 0.05 excess"
        return
    with pytest.raises(UserError, match=told):
        read_hypothesis(path)


def test_layers_have_names():
    assert layers_of("first half", 4).tolist() == [True, True, False, False]
    assert layers_of("second half", 4).tolist() == [False, False, True, True]
    assert layers_of("last", 4).tolist() == [False, False, False, True]
    assert layers_of("all but the last", 4).sum() == 3 and layers_of("all", 4).all()


def test_a_function_of_means_is_that_of_the_weighted_pictures():
    rng = np.random.default_rng(0)
    values, weights = rng.standard_normal((5, 3)), rng.multinomial(5, [0.2] * 5, 4).astype(float)
    found = OfMeans(values, lambda m: m[..., 0] * m[..., 2])(weights)
    for drawn, value in zip(weights.astype(int), found):
        means = np.repeat(values, drawn, axis=0).mean(0)
        assert value == pytest.approx(means[0] * means[2])


def one_grounding(layers, noise=0.01):
    class One:
        found = SimpleNamespace(path=Path("run/final_epoch.pt"))
        grounding = Grounding(np.array(layers)[:, None] + np.zeros((50, len(layers), 1)), [])

    One.grounding.values[:] += noise * np.random.default_rng(0).standard_normal((50, 1, 1))
    return One()


def test_depth_is_the_centre_of_what_layers_ground():
    found = depth([one_grounding([0.1, 0.3, -0.2, 0.2], 0.0)])  # pyright: ignore
    value = (0.1 * 0.25 + 0.3 * 0.5 - 0.2 * 0.75 + 0.2) / 0.4
    assert found.statistic.value == pytest.approx(value)
    assert found.told == "layers 0.100 0.300 -0.200 0.200"


@pytest.mark.parametrize("mean", [0.0, -0.1, 0.001])
def test_where_nothing_grounds_nothing_lies_early(mean):
    with pytest.raises(NothingToTell, match="run does not ground"):
        depth([one_grounding([mean] * 4)])  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    "curve,reached",
    [
        ((0.1, 0.2, 0.4), 200.0),  # half of .4 at the second checkpoint
        ((0.1, 0.3, 0.4), 150.0),  # half-way between .1 and .3
        ((0.4, 0.4, 0.4), 50.0),  # half-way from 0 at step 0 to .4 at step 100
        ((0.3, 0.1, 0.4), 200 + 100 / 3),  # what does not hold does not count
        ((0.1, 0.2, -0.1), 300.0),  # never
    ],
)
def test_onset_by_hand(curve, reached):
    found = _reached(np.array([0.0, 100, 200, 300]), 0.5)(np.array([curve]))
    assert found == pytest.approx([reached])


def answer(measure, asked):
    found = ANSWERS[measure]([asked])
    return found.statistic, found.told


def measures(values):
    """A model a row, a picture a column."""
    n = values.shape[1]
    return [Measure("m", Mean(row, np.arange(n), n), 0.0, percent=False) for row in values]


def test_one_side_has_seeds_and_pictures_in_its_interval(tmp_path):
    """As the mean of a two-way layout: with equal seeds the pictures' part alone is left."""
    claim, rng = read_hypothesis(written(tmp_path)), np.random.default_rng(0)
    pictures = rng.standard_normal(400)
    same = compared([measures(np.stack([pictures] * 6))], claim, 999, False)
    one = compared([measures(pictures[None])], claim, 999, False)
    assert same.value == pytest.approx(one.value) == pytest.approx(pictures.mean())
    assert same.high - same.low == pytest.approx(one.high - one.low, rel=0.1)
    seeds = compared([measures(pictures + rng.standard_normal((6, 1)))], claim, 999, False)
    assert seeds.high - seeds.low > 5 * (one.high - one.low)


def test_one_side_is_counted_from_its_chance_level(tmp_path):
    text = PLAIN.replace('"excess"', '"binding"')
    hits = np.repeat([1.0, 0.0], [70, 30])
    found = compared([measures(hits[None])], read_hypothesis(written(tmp_path, text)), 999, False)
    assert found.value == pytest.approx(0.2) and found.low > 0.05


def test_the_null_is_seldom_called_supported(tmp_path):
    """Two sides of six seeds without any difference, with spread over seeds and pictures."""
    claim = read_hypothesis(written(tmp_path, PLAIN.replace("0.05", "0.0")))
    rng, wrong = np.random.default_rng(1), 0
    for _ in range(100):
        shared = rng.standard_normal(60)
        sides = [
            measures(
                shared + 0.3 * rng.standard_normal((6, 1)) + 0.5 * rng.standard_normal((6, 60))
            )
            for _ in range(2)
        ]
        found = compared(sides, claim, 199, True)
        wrong += claim.decide(found.low, found.high) == "supported"
    assert wrong <= 8  # 2.5 % of 100 on one side: 2.5 expected, SD 1.6


@pytest.fixture(scope="module")
def swept_run(tiny_run, tmp_path_factory) -> Path:
    """The final checkpoint of a tiny run, swept; 400 confirm pictures or so are left."""
    folder = tmp_path_factory.mktemp("claims") / "run"
    shutil.copytree(tiny_run, folder)
    ckpt = folder / "final_epoch.pt"
    sweep(["--ckpt", str(ckpt), "--num", "300", "--untrained", "5", "--draws", "99"])
    return ckpt


def confirm_of(ckpt, **wanted):
    config = HypothesisConfig(LATE, (ckpt,), draws=99)
    return open_confirm(load_checkpoint(ckpt), Wanted("excess", **wanted), config)


def test_confirm_pictures_are_those_that_no_other_command_reads(swept_run, few_scenes):
    """Of scenes a split of their own; of other data those that the sweep's hash sets aside."""
    asked = confirm_of(swept_run, pictures=100)
    ids = [asked.source.keys[row] for row in asked.rows]
    assert len(ids) == 100 and all(key.startswith("confirm-0-") for key in ids)
    assert {*asked.grounding.ids} <= {*ids}


def test_confirm_pictures_of_other_data_are_a_fifth(swept_run, tmp_path):
    scenes = Scenes("val", 300)
    write_shards(((scenes.read(r), [r]) for r in range(300)), tmp_path, "val")
    found = load_checkpoint(swept_run)
    data = replace(found.config.data, val_data=f"{tmp_path}/val-000000.tar")
    other = replace(found, config=replace(found.config, data=data))
    config = HypothesisConfig(LATE, (swept_run,), draws=99)
    asked = open_confirm(other, Wanted("excess"), config)
    ids = [asked.source.keys[row] for row in asked.rows]
    assert ids == [key for key in asked.source.keys if assign_split(key) == "confirm"]
    assert 40 < len(ids) < 90
    with pytest.raises(UserError, match=rf"has {len(ids)} confirm pictures, not 100"):
        open_confirm(other, Wanted("excess", pictures=100), config)


def test_excess_is_of_the_heads_that_discovery_chose(swept_run):
    asked = confirm_of(swept_run, pictures=100, heads="last", minus="first half")
    results = SweepResults.load(swept_run.parent / "sweep")
    mean = results.metrics["excess"][results.rows("discovery")].mean(0)
    last, early = int(mean[3].argmax()), divmod(int(mean[:2].argmax()), 4)
    statistic, told = answer("excess", asked)
    values = asked.grounding.values.mean(0)
    assert told == f"L3H{last} - {Head(*early)}"
    assert statistic.value == pytest.approx(values[3, last] - values[early])
    against = confirm_of(swept_run, pictures=100, minus="untrained")
    statistic, told = answer("excess", against)
    assert "of seed" in told and statistic.value < mean.max() + 0.1


def test_causal_is_the_loss_by_hooks(swept_run):
    asked = confirm_of(swept_run, pictures=100)
    found, told = answer("causal", asked)
    swept = open_swept(OfSweep(swept_run))
    means = mean_activations(swept.tower, swept.batches(swept.rows("discovery"), "means"))[0]
    images = torch.cat(list(replace(swept, source=asked.source).pictures([asked.rows])))
    captions = [asked.source.read(row).captions for row in asked.rows]
    texts = swept.encoder.texts(swept.model, [text for own in captions for text in own])
    owner = torch.tensor([k for k, own in enumerate(captions) for _ in own])

    def margin(heads):
        with torch.no_grad():
            if not heads:
                return contrastive_margin(swept.tower(images), texts, owner).mean()
            with ablate(swept.tower, heads, "mean", means) as tower:
                return contrastive_margin(tower(images), texts, owner).mean()

    head = Head.parse(told.partition(",")[0])
    losses = {j: float(margin([]) - margin([Head(head.layer, j)])) for j in range(4)}
    mine = losses.pop(head.index)
    assert found.value == pytest.approx(mine - np.mean([*losses.values()]), abs=1e-6)
    assert re.search(r", number \d+ of 16 by loss; \d+ heads lie 1.96", told)


def test_binding_asks_confirm_pictures_the_kinds_named(swept_run):
    asked = confirm_of(swept_run, pictures=100, kinds=("colour swap",))
    statistic, told = answer("binding", asked)
    assert 0 < statistic.value < 1 and 5 < int(told.split()[0]) < len(asked.rows)
    assert told.endswith("questions: colour swap")  # other kinds, as many: another question
    with pytest.raises(UserError, match="'colr' is none of colour swap"):
        ANSWERS["binding"]([confirm_of(swept_run, kinds=("colr",))])


def decided(capsys, *words):
    main([str(word) for word in words])
    return capsys.readouterr().out


def test_a_claim_is_decided_once(swept_run, tmp_path, capsys):
    """The standing result is shown; whatever is asked again of these pictures is exploratory, and
    never replaces what was decided."""
    run = tmp_path / "run"
    shutil.copytree(swept_run.parent, run)
    ckpt, text = run / "final_epoch.pt", PLAIN.replace("margin", "pictures = 100\nmargin")
    claim = written(tmp_path, text.replace("0.05", "0.9"))
    words = claim, "--ckpt", ckpt, "--draws", 199
    told = decided(capsys, *words)
    assert "REFUTED (of this checkpoint; nothing is said of its recipe)" in told
    assert "claimed: excess above 0.9 excess (chance: 0)" in told and "EXPLORATORY" not in told
    assert "a true value of 0 would be refuted with chance 1.00" in told
    assert "claim 1 on these models' confirm pictures" in told
    out = run / "hypothesis-claim.json"
    held = out.read_bytes()
    assert decided(capsys, *words) == told and out.read_bytes() == held
    with pytest.raises(UserError, match="on other checkpoints, sweeps or draws; name another"):
        decided(capsys, claim, "--ckpt", ckpt, "--draws", 299)

    before = read_hypothesis(claim).sha256
    claim.write_text(text.replace("0.05", "-0.9"))
    with pytest.raises(UserError, match=f"was changed after .* decided it .sha256 {before[:12]}"):
        decided(capsys, *words)
    renamed = written(tmp_path, claim.read_text(), "renamed.toml")
    for evading in ((renamed,), (claim, "--out", tmp_path / "elsewhere.json")):
        with pytest.raises(UserError, match=f"refuted, file sha256 {before[:12]}.; whatever is"):
            decided(capsys, *evading, *words[1:])
    told = decided(capsys, *words, "--exploratory")
    assert "SUPPORTED" in told and "a true value of 0 would be supported" in told
    assert f"confirm pictures answered this before: refuted, {before[:12]}" in told
    assert out.read_bytes() == held and (run / "hypothesis-claim-exploratory.json").is_file()
    claim.write_text(text.replace("0.05", "0.9"))
    assert "REFUTED" in decided(capsys, *words)

    other = written(tmp_path, text.replace("pictures", 'heads = "last"\npictures'), "last.toml")
    assert "claim 3 on these models" in decided(capsys, other, *words[1:])  # another question
    for damage in ("{}", '{"schema": 1, "asked": 3}', "[]"):
        out.write_text(damage)
        with pytest.raises(UserError, match="is no result of this version"):
            decided(capsys, *words)
    (run / "confirm.jsonl").write_text('{"question": {}, "decision": "refuted"}')
    with pytest.raises(UserError, match="written by another version"):
        decided(capsys, renamed, *words[1:])
    (run / "confirm.jsonl").write_text("{")
    with pytest.raises(UserError, match="tells what was looked at before, so mend it"):
        decided(capsys, renamed, *words[1:])


def test_a_question_is_known_by_what_it_comes_to(swept_run, tmp_path, capsys):
    """Other words for the same head, another file of the same weights, a ledger that was not
    written, a result that was edited."""
    run = tmp_path / "run"
    shutil.copytree(swept_run.parent, run)
    text = PLAIN.replace("margin", "pictures = 100\nmargin")
    claim, ckpt = written(tmp_path, text), run / "final_epoch.pt"
    words = "--ckpt", ckpt, "--draws", 199
    (run / "hypothesis-claim.png").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"hypothesis-claim.png exists, of something else"):
        decided(capsys, claim, *words)
    (run / "hypothesis-claim.png").unlink()
    told = decided(capsys, claim, *words)
    layer, depth = int(told.split("(L")[1][0]), confirm_of(ckpt).swept.tower.cfg.n_layers
    half = "first half" if layer < depth // 2 else "second half"
    reworded = text.replace("pictures", f'heads = "{half}"\npictures').replace("0.05", "0.9")
    other = written(tmp_path, reworded, "other.toml")
    moved = written(tmp_path, text.replace("0.05", "0.9"), "moved.toml")
    for again in ((other, *words), (moved, "--ckpt", run / "epoch_1.pt", *words[2:])):
        with pytest.raises(UserError, match="whatever is asked again is exploratory"):
            decided(capsys, *again)
    ledger = (run / "confirm.jsonl").read_text()
    (run / "confirm.jsonl").unlink()
    assert decided(capsys, claim, *words) == told
    assert (run / "confirm.jsonl").read_text() == ledger
    result = run / "hypothesis-claim.json"
    result.write_text(result.read_text().replace('"margin": 0.05', '"margin": 0.01'))
    with pytest.raises(UserError, match="was changed since it was written"):
        decided(capsys, claim, *words)


def test_other_code_than_that_which_decided_is_told():
    report = {"asked": {"file_sha256": "f" * 64}, "exploratory": False, "before": [], "code": "a"}
    report |= {"commit": "c" * 40, "claim_number": 1}
    assert not any("other code" in line for line in _last_lines(report, "a"))
    assert f"decided by other code than this, of commit {'c' * 12}" in _last_lines(report, "b")


@pytest.mark.parametrize(
    "first,second,paired,p",
    [
        ([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], None, False, 2 / 64),
        ([1.0, 2.0, 3.0, 4.0, 5.0, -0.5], None, False, 4 / 64),
        ([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [0.0] * 6, True, 2 / 64),
        ([1.0, 2.0, 3.0], [-1.0, -2.0, -3.0], False, 2 / 20),
        ([1.0, -1.0], None, False, 1.0),
    ],
)
def test_seeds_relabelled_by_hand(first, second, paired, p):
    values = [first] if second is None else [first, second]
    assert relabelled(values, 0.0, paired) == pytest.approx(p)
    moved = [[v + 7 for v in first], *values[1:]]
    assert relabelled(moved, 7.0, paired) == pytest.approx(p)


@pytest.mark.parametrize("seeds,distances", [((6,), [3.5]), ((6,), [4.0, -4.5]), ((4, 5), [-3.0])])
def test_the_share_that_both_tests_tell_is_that_of_studies_done_one_by_one(
    seeds, distances, monkeypatch
):
    monkeypatch.setattr(seeds_module, "STUDIES", 80)
    drawn = np.random.default_rng(0).standard_normal((80, sum(seeds)))
    scale, told = np.sqrt(sum(1 / n for n in seeds)), 0
    for study in drawn:
        sides, sure = np.split(study, [seeds[0]])[: len(seeds)], True
        for distance in distances:
            first, rest = sides[0] + distance * scale, sides[1:]
            t = ttest_ind(first, *rest) if rest else ttest_1samp(first, 0)
            sure &= t.pvalue <= 0.05 and t.statistic * distance > 0
            sure &= relabelled([list(first), *map(list, rest)], 0.0, False) <= 0.05
        told += sure
    assert 0 < told < 80 and share_told(seeds, distances) == told / 80


def test_what_both_tests_tell_needs_seeds_and_more_than_t():
    assert least_told((5,)) is None and share_told((5,), [99.0]) == 0
    assert share_told((13,), [3.0]) is None and least_told((13,)) is None
    six = least_told((6,))
    assert six is not None and 4.2 < six < 4.6  # t alone: 3.5
    assert share_told((6,), [six]) == pytest.approx(0.8, abs=0.01)


@pytest.mark.parametrize(
    "test,value,edges",
    [
        ("above", 9.0, (0.5,)),
        ("within", 0.1, (-0.5, 0.5)),
        ("within", 0.7, (0.5,)),
        ("within", -0.7, (-0.5,)),
    ],
)
def test_edges_are_what_a_value_must_be_told_from(test, value, edges, tmp_path):
    text = PLAIN.replace('"above"', f'"{test}"').replace("0.05", "0.5")
    assert read_hypothesis(written(tmp_path, text)).edges(value) == edges


def test_two_sides_with_few_seeds_decide_nothing(swept_run, tmp_path, capsys):
    both = 'first = "superclip"\nsecond = "superclip"\npictures = 100\nmargin'
    claim = written(tmp_path, PLAIN.replace("margin", both))
    runs = [tmp_path / name for name in ("one", "other")]
    for run in runs:
        shutil.copytree(swept_run.parent, run)
    one, other = (run / "final_epoch.pt" for run in runs)
    words = claim, "--ckpt", one, "--against", other, "--draws", 199
    told = decided(capsys, *words)
    assert f"NOT DECIDED (1 seed(s) a side; {SEEDS} are the least that decide" in told
    assert "(chance: 0)" in told
    report = json.loads((runs[0] / "hypothesis-claim.json").read_text())
    assert Image.open(runs[0] / "hypothesis-claim.png").width > 800
    report["courses"] = [[["layer", [0, 1], [0.1, 0.3]], ["layer", [0, 1], [0.3, 0.5]]]] * 2
    course = figure(report).axes[-1]  # pyright: ignore[reportOptionalMemberAccess]
    means = [line.get_ydata() for line in course.lines if line.get_label() == "first"]
    assert np.allclose(means, [0.2, 0.4])
    report["courses"] = [[["learning rate", [1e-4, 2e-4, 8e-4], [0.1, 0.3, 0.2]]] * 2] * 2
    course = figure(report).axes[-1]  # pyright: ignore[reportOptionalMemberAccess]
    assert course.get_xscale() == "log" and course.get_ylabel() == "image-to-text R@1"
    assert [t.get_text() for t in course.get_xticklabels()] == ["0.0001", "0.0002", "0.0008"]
    assert report["value"] == 0 and report["paired"] and report["no_spread"]
    with pytest.raises(UserError, match="compares two sides: give --against"):
        decided(capsys, claim, "--ckpt", one)
    with pytest.raises(UserError, match="is of one side: leave --against"):
        decided(capsys, written(tmp_path, name="one.toml"), *words[1:])
    claim.write_text(claim.read_text().replace('second = "superclip"', 'second = "clip"'))
    with pytest.raises(UserError, match="--loss superclip; the claim is of clip"):
        decided(capsys, *words)
    # Two checkpoints of one seed are two rates only where rates are compared.
    with pytest.raises(UserError, match="have the same seed"):
        decide_one(HypothesisConfig(LATE, (one, other), draws=99), read_hypothesis(LATE))


def test_sides_that_differ_in_more_than_the_loss_are_refused(swept_run, tmp_path):
    claim = read_hypothesis(written(tmp_path))
    found = load_checkpoint(swept_run)
    data = replace(found.config.data, train_num_samples=7)
    other = replace(found, config=replace(found.config, data=data))
    with pytest.raises(UserError, match="the sides differ in train_num_samples: 256 -> 7"):
        _refuse_unlike(found, other, claim)
    _refuse_unlike(found, other, replace(claim, differs=("train_num_samples",)))
    optim = replace(found.config.optim, lr=3e-3)
    faster = replace(found, config=replace(found.config, optim=optim))
    _refuse_unlike(found, faster, claim)
    with pytest.raises(UserError, match=r"differ in lr: .* of losses alone at one rate"):
        _refuse_unlike(found, faster, replace(claim, same_rate=True))


def test_onset_interpolates_between_the_checkpoints_of_a_run(swept_run, tmp_path):
    folder = tmp_path / "course"
    shutil.copytree(swept_run.parent, folder)
    with pytest.raises(UserError, match="a course needs two at least"):
        ANSWERS["onset"]([confirm_of(folder / "final_epoch.pt", pictures=100)])
    shutil.copy(folder / "epoch_1.pt", folder / "step_4.pt")
    asked = confirm_of(folder / "final_epoch.pt", pictures=100)
    found = ANSWERS["onset"]([asked])
    mean = asked.grounding.values.mean()
    assert found.told == "checkpoints at 4 8" and mean > 0
    assert found.course == ("optimizer step", [4, 8], [pytest.approx(mean)] * 2)
    assert found.statistic.value == 2.0  # half of the way to a curve that is flat from step 4 on


def test_sensitivity_is_the_best_rate_less_the_mean_of_all(swept_run, monkeypatch):
    rate = load_checkpoint(swept_run).config.lr  # pyright: ignore[reportOptionalMemberAccess]
    models = [confirm_of(swept_run, pictures=100, rates=(rate,) * 3) for _ in range(3)]
    found = ANSWERS["sensitivity"](models)
    assert found.statistic.value == 0 and found.told == f"best of 3: {rate:g}"
    with pytest.raises(UserError, match=f"is of the learning rates {rate:g} {rate:g} {rate:g}; "):
        ANSWERS["sensitivity"](models[:2])
    hits = iter(np.array([[1.0, 1, 0, 1], [1, 0, 0, 0], [0, 0, 0, 1]]))
    monkeypatch.setattr(measures_module, "_hits", lambda *_: next(hits))
    found = ANSWERS["sensitivity"](models)
    assert found.statistic.value == pytest.approx(0.75 - 1.25 / 3)
    assert found.course == ("learning rate", [rate] * 3, [0.25, 0.25, 0.75])


def test_the_best_rate_is_that_of_discovery_over_seeds():
    scores = {8e-4: (0.0, 0.0), 1e-4: (0.1, 0.2), 2e-4: (0.5, 0.1), 4e-4: (0.25, 0.4)}
    assert best_rate(scores) == 4e-4
    scores.pop(8e-4)
    with pytest.raises(NothingToTell, match=r"ends the range .*0.0002: 30.0, 0.0004: 32.5"):
        best_rate(scores)


def test_bad_words():
    file = str(LATE)
    assert "name a hypothesis file" in refused("interp.hypothesis")
    assert "--ckpt: name a checkpoint" in refused("interp.hypothesis", file)
    assert "nowhere.pt does not exist" in refused("interp.hypothesis", file, "--ckpt", "nowhere.pt")
    assert "is no hypothesis file" in refused("interp.hypothesis", "x.toml", "--ckpt", file)
