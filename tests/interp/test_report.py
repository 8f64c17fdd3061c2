"""The page says what the findings say, needs no network, and refuses what does not belong."""

import base64
import hashlib
import html
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from interp.analysis import analyse
from interp.heads import Head
from interp.render import gallery, words
from interp.render.explorer import explorer
from interp.render.page import render_page
from interp.report import build, checkpoint_of, folder_of, main, newest_sweep, pages, read_sibling
from interp.stats.intervals import Interval
from superclip.errors import UserError
from tests.conftest import refused
from tests.interp.sweeps import small_sweep


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder with a sweep, its evaluation and its ablation."""
    run = tmp_path_factory.mktemp("run")
    results = small_sweep()
    results.save(run / "sweep")
    sha256 = results.manifest["checkpoint"]["sha256"]
    row = {
        "measure": "image-to-text R@1",
        "percent": True,
        "value": 0.1234,
        "low": 0.1,
        "high": 0.2,
        "chance": 0.002,
        "queries": 2000,
        "pictures": 2000,
        "candidates": 500,
    }
    (run / "eval_val.json").write_text(
        json.dumps(
            {
                "schema": 2,
                "checkpoint": {"sha256": sha256},
                "bootstrap_draws": 2000,
                "results": [
                    {
                        "task": "retrieval",
                        "data": {"name": "scenes", "protocol": "all-captions"},
                        "rows": [row],
                    }
                ],
            }
        )
    )
    (run / "sweep" / "ablation.json").write_text(json.dumps(ablation(results)))
    return run


def ablation(results, **changes):
    def interval(estimate):
        return {"estimate": estimate, "low": estimate - 0.01, "high": estimate + 0.01, "n": 50}

    head = {
        "unit": "L1H2",
        "family": "head",
        "role": "champion",
        "kind": "mean",
        "removed_norm": 1.0,
        "margin": interval(-0.0567),
        "p_adjusted": 0.002,
        "rank": 1,
        "of": 2,
        "layer_rank": 1,
        "layer_of": 1,
        "measures": {"i2t@1": interval(-0.02)},
    }
    manifest = results.manifest
    return {
        "schema": 2,
        "n": 50,
        "checkpoint_sha256": manifest["checkpoint"]["sha256"],
        "images_sha256": manifest["images_sha256"],
        "estimates": {},
        "intact": {"margin": interval(0.3), "i2t@1": interval(0.5)},
        "units": [head],
        "champion": "L1H2",
        "sets": None,
    } | changes


class Page(HTMLParser):
    """What a page refers to, its tables and its words."""

    def __init__(self, text):
        super().__init__()
        self.references, self.tables, self.images, self.words = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.references += [v for k, v in attrs if k in ("src", "srcset", "href", "data", "action")]
        if tag == "table":
            self.tables.append({"caption": 0, "unscoped": 0})
        if tag == "caption":
            self.tables[-1]["caption"] += 1
        if tag == "th" and attributes.get("scope") not in ("col", "row"):
            self.tables[-1]["unscoped"] += 1
        if tag == "img":
            self.images.append(attributes)

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture(scope="module")
def sheets(run):
    return build([run / "sweep"])


@pytest.fixture(scope="module")
def text(run, sheets):
    return pages([run / "sweep"], run / "report.html", sheets)[run / "report.html"].decode()


@pytest.fixture(scope="module")
def plain(text):
    return re.sub(r"\s+", " ", "".join(Page(text).words))


def test_every_number_is_the_findings(plain, run):
    findings = analyse(small_sweep())
    verdict = findings.verdict
    for sentence in words.answer(small_sweep(), findings):
        assert re.sub(r"\s+", " ", sentence) in plain
    for k, head in enumerate(verdict.top):
        cells = f"{head}{words.number(verdict.discovery.mean[head.layer, head.index], 4)}"
        cells += f"{words.span(verdict.validation[k], 4)}{words.p_value(verdict.p[k])}"
        assert f"{cells}{words.p_value(verdict.p_holm[k])}" in plain
    for row in findings.heads:
        band = (
            f"[{words.number(row['validation_low'], 4)}, {words.number(row['validation_high'], 4)}]"
        )
        assert f"{words.number(row['validation_excess'], 4)} {band}" in plain
    for row in findings.baselines:
        assert row.name in plain and words.span(row.difference, 4) in plain
    assert "12.3 [10.0, 20.0]" in plain and "−0.0567 [−0.0667, −0.0467]" in plain
    assert "removing it costs margin (rank 1 of 2 removed heads by loss of margin)" in plain


def test_nothing_is_fetched(text):
    page = Page(text)
    assert page.references
    assert all(ref.startswith(("data:", "#")) for ref in page.references)
    assert not re.search(r"https?:|@import|url\(", text)
    assert "default-src 'none'" in text


def test_tables_and_pictures_can_be_read_without_eyes(text):
    page = Page(text)
    assert len(page.tables) == 8
    assert all(table == {"caption": 1, "unscoped": 0} for table in page.tables)
    assert len(page.images) == 4 and all(image["alt"] for image in page.images)
    assert text.count('role="region" tabindex="0"') == 8


def test_names_are_escaped(text):
    assert html.escape("tiny <vit>") in text and "<vit>" not in text


def test_two_reports_are_equal_and_small(run, sheets):
    folders, out = [run / "sweep"], run / "report.html"
    first, second = pages(folders, out, sheets), pages(folders, out, build(folders))
    assert first == second and len(first[out]) < 10_000_000
    assert [path.name for path in first] == [
        "heatmap.png",
        "gallery.png",
        "champion_vs_challenger.gif",
        "report.html",
    ]


def test_pictures_that_would_make_the_page_too_large_are_left_out_of_the_explorer():
    results = small_sweep()
    findings = analyse(results)
    whole, cut = (explorer(results, findings, None, size) for size in (100_000, 3_000))
    assert whole["kept"] == cut["kept"] == len(whole["pictures"]) > len(cut["pictures"]) > 0
    heads, patches = len(findings.heads), results.maps.shape[-1]
    top = np.median(results.maps[:3, 1, 2].astype(float).max(axis=1))  # as in the gallery
    assert whole["tops"][1][2] == pytest.approx(top) == gallery.scale(results, [Head(1, 2)]).vmax
    shown = np.frombuffer(base64.b64decode(whole["maps"]), np.uint8).reshape(results.maps[:3].shape)
    expected = 255 * np.minimum(results.maps[:3, 1, 2].astype(float) / top, 1)
    np.testing.assert_array_equal(shown[:, 1, 2], np.rint(expected))
    assert len(base64.b64decode(cut["maps"])) == len(cut["pictures"]) * heads * patches


def test_limits_follow_what_is_present(sheets):
    [sheet] = sheets
    everything = " ".join(sheet.limits)
    assert "no ablation stands" not in everything and "retrieves" not in everything
    assert "2 untrained towers of the 5" in everything and "uncommitted" in everything
    bare = " ".join(
        replace(sheet, evaluation=None, beside=sheet.beside | {"ablation": None}).limits
    )
    assert "no ablation stands" in bare and "How well the model retrieves" in bare


def test_the_auroc_has_its_own_n(sheets):
    [sheet] = sheets
    findings = sheet.findings
    fewer = replace(findings, auroc=replace(findings.auroc, n=findings.mass.n - 1))
    n = f"n = {findings.mass.n - 1}"
    assert n not in " ".join(words.answer(sheet.results, findings))
    assert f"(chance 0.5, {n} that it is defined of)" in " ".join(
        words.answer(sheet.results, fewer)
    )
    told, plain = (
        render_page([replace(sheet, findings=f), sheet], [], []) for f in (fewer, findings)
    )
    assert f"({n})" in told and n not in plain


def test_a_blind_tower_is_reported_as_null():
    results = small_sweep(seed=3, planted=0.0)
    findings = analyse(results)
    assert findings.verdict.p[0] > words.ALPHA
    said = " ".join(words.answer(results, findings))
    assert "No evidence" in said and "covaries" not in said and "training made it so" not in said
    assert any("does not reject" in s for s in words.limits(results, findings, None, None))


def test_the_first_sentence_claims_no_more_than_all_tests_together():
    results = small_sweep()
    findings = analyse(results)
    said = words.answer(results, findings)[0]
    assert said.startswith("The champion's attention covaries") and "each untrained tower" in said
    assert "is significant there" in said and "above that of 2 of 2 untrained towers" in said
    discovery = findings.verdict.discovery
    lost = replace(discovery, p_adjusted=np.full_like(discovery.p_adjusted, 0.75))
    missed = replace(findings, verdict=replace(findings.verdict, discovery=lost))
    said = words.answer(results, missed)[0]
    assert said.startswith("Not established") and "covaries" not in said
    assert "is not significant there (max-T over all heads p = 0.75)" in said
    assert any("stands out" in limit for limit in words.limits(results, missed, None, None))
    flat = Interval(0.0, -0.1, 0.1, 28)
    rows = [replace(row, difference=flat) for row in findings.baselines]
    said = words.answer(results, replace(findings, baselines=tuple(rows)))[0]
    assert "training is not shown to be why" in said and "none of 2 untrained towers" in said
    fixed = tuple(row for row in findings.baselines if row.kind == "fixed")
    said = words._champion(results, replace(findings, baselines=fixed))
    assert "was not asked" in said and "no untrained tower was swept" in said


def test_two_sweeps_share_a_page(run, tmp_path):
    small_sweep(seed=1).save(tmp_path / "other")
    folders, out = [run / "sweep", tmp_path / "other"], tmp_path / "both.html"
    sheets = build(folders)
    page = pages(folders, out, sheets)[out].decode()
    assert "Descriptive: no test compares the rows" in page
    assert [sheet.findings.champion for sheet in sheets] == [analyse(small_sweep()).champion] * 2
    assert page.count("What was not established") == 2
    with pytest.raises(UserError, match="given twice"):
        build([run / "sweep", run / "sweep"])


def test_commands_rebuild_the_page(text, run):
    commands = html.unescape(text[text.index("<pre>") : text.index("</pre>")])
    assert "python -m interp.sweep --ckpt CKPT --num 90 --untrained 2 --draws 199 --gallery 3" in (
        commands
    )
    assert f"python -m interp.report {run / 'sweep'} --out {run / 'report.html'}" in commands
    assert "python -m interp.ablate" in commands


def test_the_checkpoint_is_known_by_its_hash(tmp_path):
    (tmp_path / "final_epoch.pt").write_bytes(b"weights")
    assert checkpoint_of(tmp_path / "sweep", "0" * 64) is None
    sha256 = hashlib.sha256(b"weights").hexdigest()
    assert checkpoint_of(tmp_path / "sweep", sha256) == tmp_path / "final_epoch.pt"
    assert checkpoint_of(tmp_path / "sweep-patches", sha256) == tmp_path / "final_epoch.pt"
    assert checkpoint_of(tmp_path / "sweep-epoch_1", sha256) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images_sha256": "f" * 64}, r"is of other pictures than this sweep \(another --num"),
        ({"checkpoint_sha256": "f" * 64}, "is of another checkpoint than this sweep"),
        ({"schema": 1}, "is of another schema"),
    ],
)
def test_foreign_ablation_is_refused(tmp_path, change, message):
    results = small_sweep()
    (tmp_path / "ablation.json").write_text(json.dumps(ablation(results, **change)))
    with pytest.raises(UserError, match=message) as told:
        read_sibling(tmp_path, results, "ablation")
    assert "ffff" not in str(told.value) and "interp.ablate --overwrite" in str(told.value)


def test_evaluation_of_another_checkpoint_is_left_out(tmp_path):
    small_sweep(seed=2).save(tmp_path / "sweep")
    (tmp_path / "eval_val.json").write_text(json.dumps({"checkpoint": {"sha256": "other"}}))
    [sheet] = build([tmp_path / "sweep"])
    assert sheet.evaluation is None and any("retrieves" in limit for limit in sheet.limits)


def test_command_writes_once(run, tmp_path, capsys):
    out = tmp_path / "deep" / "page.html"
    main([str(run / "sweep"), "--out", str(out)])
    names = sorted(path.name for path in out.parent.iterdir())
    assert names == ["champion_vs_challenger.gif", "gallery.png", "heatmap.png", "page.html"]
    assert "champion" in capsys.readouterr().out
    with pytest.raises(UserError, match="--overwrite"):
        main([str(run / "sweep"), "--out", str(out)])


def test_newest_sweep_is_found(tmp_path):
    with pytest.raises(UserError, match="first or give its folder"):
        newest_sweep(tmp_path)
    small_sweep().save(tmp_path / "a" / "sweep")
    assert newest_sweep(tmp_path) == tmp_path / "a" / "sweep"


def test_files_of_a_sweep_stand_for_its_folder(tmp_path):
    folder = tmp_path / "run" / "sweep"
    checkpoint = tmp_path / "run" / "final_epoch.pt"
    checkpoint.parent.mkdir()
    checkpoint.write_bytes(b"weights")
    with pytest.raises(UserError, match=r"is a checkpoint; run python -m interp.sweep --ckpt"):
        folder_of(checkpoint)
    small_sweep().save(folder)
    assert folder_of(folder) == folder_of(folder / "results.json") == folder
    with pytest.raises(UserError, match=f"is a checkpoint; give the folder of its sweep, {folder}"):
        main([str(checkpoint)])
    with pytest.raises(UserError, match="give the folder of a sweep"):
        folder_of(Path(__file__))
    with pytest.raises(UserError, match=r"there is no .*nope; give the folder of a sweep"):
        folder_of(tmp_path / "nope")
    with pytest.raises(UserError, match="--challenger: 'x' is not a head"):
        main([str(folder / "results.json"), "--challenger", "x"])


def test_bad_folders_end_in_one_line(tmp_path):
    assert "holds no results.json" in refused("interp.report", str(tmp_path))
    small_sweep().save(tmp_path)
    (tmp_path / "results.npz").write_bytes(b"PK damaged")
    assert "can't be read" in refused("interp.report", str(tmp_path))
    assert not (tmp_path / "report.html").exists()
