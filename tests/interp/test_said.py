"""Sentences about removals claim what p and band say, with the rank beside it."""

import pytest

from interp.ablate import render
from interp.causal.said import agreement_said, champion_said, harmless, sets_said

INTACT = ("margin", "i2t@1", "t2i@1")


def row(kind, estimate, p=0.001, half=0.001, rank=6, layer_of=4):
    def interval(value, wide):
        return {"estimate": value, "low": value - wide, "high": value + wide, "n": 304}

    return {
        "unit": "L1H2",
        "kind": kind,
        "margin": interval(estimate, half),
        "p_adjusted": p,
        "rank": rank,
        "of": 16,
        "layer_rank": 3,
        "layer_of": layer_of,
        "measures": {"i2t@1": interval(-0.03, 0.025)},
    }


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (row("mean", -0.0073), "removing it costs margin (rank 6 of 16 removed heads"),
        (row("mean", 0.0073), "removing it raises the margin (rank"),
        (row("mean", -0.0073, p=0.2), "removing it is not shown to change the margin (rank"),
        (row("mean", -0.0073, half=0.01), "p is below .05, but the band holds 0"),
    ],
)
def test_a_removal_is_said_as_p_and_band_have_it(given, said):
    [line] = champion_said([given, given | {"unit": "L0H0"}], "L1H2")
    assert said in line and "3 of 4 in its layer" in line and "matter" not in line
    assert "(band over all removed heads)" in line
    assert "R@1 -3.0 [-5.5, -0.5] points (interval of this row alone)" in line
    assert "layer" not in champion_said([given | {"layer_of": 1}], "L1H2")[0]


def test_kinds_are_summed_up_in_one_line():
    rows = [row("mean", -0.007, rank=6), row("zero", -0.01, rank=7)]
    assert agreement_said(rows[:1], "L1H2") is None
    assert agreement_said(rows, "L1H2") == (
        "mean and zero ablation agree: removing L1H2 costs margin; by loss of margin it ranks 6 to "
        "7 of 16 removed heads"
    )
    mixed = [*rows, row("resample", -0.01, p=0.3, rank=7)]
    assert agreement_said(mixed, "L1H2") == (
        "mean, zero and resample ablation do not agree on removing L1H2: it costs margin under "
        "mean, zero; it is not shown to change the margin under resample; by loss of margin it "
        "ranks 6 to 7 of 16 removed heads"
    )


def test_the_model_needs_the_champion_only_where_every_kind_says_so():
    costs, open_, raises = (
        row("mean", -0.007),
        row("zero", -0.007, p=0.2),
        row("resample", 0.007),
    )
    assert harmless([costs, costs | {"kind": "zero"}], "L1H2") is None
    said = harmless([costs, open_, raises, costs | {"unit": "L0H0"}], "L1H2")
    assert said == "not every (zero, resample) ablation of it is shown to cost margin"
    assert harmless([open_, raises], "L1H2") == "no ablation of it is shown to cost margin"


@pytest.mark.parametrize(("p", "said"), [(1e-9, "p <.0001;"), (0.00457, "p .0046;")])
def test_no_p_is_said_to_be_zero(p, said):
    assert said in champion_said([row("mean", -0.0073, p=p)], "L1H2")[0]


def test_a_later_head_changes_only_where_the_test_says_so():
    report = {
        "n": 304,
        "tokens": "all",
        "champion": "L1H2",
        "units": [],
        "sets": None,
        "estimates": {},
        "intact": {name: {"estimate": 0.5, "low": 0.4, "high": 0.6} for name in INTACT},
        "chance": {"i2t@1": 0.2, "t2i@1": 0.2},
    }
    pair = {"removed": "L1H2", "kind": "zero", "head": "L2H0", "pairs": 72}
    pair["in_box_mass"] = {"estimate": 0.01, "low": 0.001, "high": 0.02, "n": 304}
    sure, open_ = (
        render(report | {"downstream": [pair | {"p_adjusted": p}]}) for p in (0.0001, 0.3)
    )
    assert "in-box mass of L2H0 changes: +0.0100 [+0.0010, +0.0200]" in sure
    assert "one of the surest of 72), n = 304, p adjusted for all .0001" in sure
    assert "in-box mass of L2H0 is not shown to change: +0.0100" in open_


def test_sets_name_the_measure_of_each_rank():
    top = {"estimate": -0.1, "low": -0.2, "high": 0.0, "n": 304}
    of = {"top": top, "random": [-0.3, -0.05], "rank": 2, "of": 3}
    said = sets_said({"size": 2, "top": ["L0H0", "L1H2"], "margin": of, "i2t@1": of})
    assert (
        "margin -0.1000 [-0.2000, +0.0000], number 2 of 3 by loss of margin (random: -0.3000 to"
        in said
    )
    assert "R@1 -10.0 [-20.0, +0.0] points, number 2 of 3 by loss of R@1 (random: -30.0 to" in said
