"""Sentences about removals claim what p and band say, with the rank beside it."""

import pytest

from interp.causal.said import agreement_said, champion_said, sets_said


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


def test_sets_name_the_measure_of_each_rank():
    top = {"estimate": -0.1, "low": -0.2, "high": 0.0, "n": 304}
    of = {"top": top, "random": [-0.3, -0.05], "rank": 2, "of": 3}
    said = sets_said({"size": 2, "top": ["L0H0", "L1H2"], "margin": of, "i2t@1": of})
    assert (
        "margin -0.1000 [-0.2000, +0.0000], number 2 of 3 by loss of margin (random: -0.3000 to"
        in said
    )
    assert "R@1 -10.0 [-20.0, +0.0] points, number 2 of 3 by loss of R@1 (random: -30.0 to" in said
