"""Edges against one naive pass each, sums that must hold, planted circuits, and the command."""

import copy
import json
import re
from itertools import pairwise

import networkx
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import refused
from PIL import Image
from reference.circuit import edge_effects, forward
from reference.circuit import edge_scores as naive_scores
from test_hooked import TOWERS, build, pictures
from torch import nn

from interp.causal.attribution import attribution
from interp.causal.sweep import ablate_batch
from interp.causal.units import Ablation, derangements, every, mean_activations
from interp.circuit import main, render
from interp.circuits.edges import Graph, edge_scores
from interp.circuits.search import minimal_circuit, random_sets, share, together, without
from interp.config import CircuitConfig
from interp.hooked import HookedVisionTransformer
from interp.render.circuit import caption
from superclip.errors import UserError


def texts(n):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 20, dtype=torch.float64, generator=generator)


def margin(features):
    """Cosine with a text of each image's own."""
    return F.cosine_similarity(features, texts(len(features)), dim=-1)


def linear(features):
    return (features * texts(len(features))).sum(dim=-1)


def opened(**changes):
    tower = HookedVisionTransformer(build(**changes))
    return tower, pictures(tower.visual, n=2), pictures(tower.visual, n=2, seed=9)


def graph_of(tower):
    return Graph(tower.cfg.n_layers, tower.cfg.n_heads)


def naive(tower, images, donors, metric, function=naive_scores, **options):
    """`[image, writer, reader]` of a naive function; 0 where it gives no edge."""
    graph = graph_of(tower)
    out = torch.zeros(len(images), *graph.edges.shape, dtype=torch.float64)
    with torch.no_grad():
        streams = [tower(x, stop_at_layer=0) for x in (images, donors)]
    for i, (clean, corrupt) in enumerate(zip(*streams)):
        own = texts(len(images))[i]
        score = {
            margin: lambda f, own=own: F.cosine_similarity(f, own, dim=0),
            linear: lambda f, own=own: f @ own,
        }[metric]
        found = function(tower.visual, clean, corrupt, score, **options)
        assert len(found) == graph.edges.sum()
        for (writer, reader), value in found.items():
            out[i, graph.writers.index(writer), graph.readers.index(reader)] = value
    return out


def test_the_naive_forward_is_the_towers():
    for name in ("plain", "LayerScale", "norm after pool"):
        tower, images, _ = opened(**TOWERS[name])
        with torch.no_grad():
            stream = tower(images, stop_at_layer=0)
            for image, x in zip(images, stream):
                torch.testing.assert_close(forward(tower.visual, x)[0], tower(image[None])[0])


def test_edges_are_counted():
    for layers, heads in ((12, 12), (3, 4), (2, 1)):
        graph = Graph(layers, heads)
        assert graph.edges.shape == (len(graph.writers), len(graph.readers))
        at = [1 + layer * (heads + 1) for layer in range(layers + 1)]
        formula = sum(3 * heads * n + n + heads for n in at[:-1]) + at[-1]
        assert graph.edges.sum() == formula
    assert Graph(12, 12).edges.sum() == 32_491
    by_hand = Graph(1, 2)
    assert by_hand.writers == ["embed", "L0H0", "L0H1", "L0.mlp"]
    assert by_hand.readers == [
        *(f"L0H{h}.{part}" for part in "qkv" for h in (0, 1)),
        "L0.mlp",
        "output",
    ]
    assert by_hand.edges.sum(axis=0).tolist() == [1] * 6 + [3, 4]


@pytest.mark.parametrize("name", ["plain", "quickgelu", "LayerScale", "avg", "norm after pool"])
def test_scores_equal_the_naive_ones(name):
    tower, images, donors = opened(**TOWERS[name])
    found = edge_scores(tower, images, donors, margin)
    torch.testing.assert_close(found, naive(tower, images, donors, margin), rtol=1e-9, atol=1e-12)
    assert not found.requires_grad and found.abs().max() > 0.05


def test_the_path_is_the_naive_one():
    """A hundred midpoints against as many Gauss points as make either exact to 1e-5."""
    tower, images, donors = opened(layers=2)
    with torch.no_grad():
        for block in tower.visual.transformer.resblocks:
            block.attn.in_proj_weight[:64] *= 0.3
    found = edge_scores(tower, images[:1], donors[:1], margin, steps=16)
    expected = naive(tower, images[:1], donors[:1], margin, steps=100)
    assert (found - expected).abs().max() < 1e-4 < 0.01 * expected.abs().max()
    first = edge_scores(tower, images[:1], donors[:1], margin)
    assert (first - expected).abs().max() > 1e-2


@pytest.mark.parametrize("name", TOWERS)
def test_a_writers_edges_sum_to_its_attribution(name):
    tower, images, donors = opened(**TOWERS[name])
    sums = edge_scores(tower, images, donors, margin).sum(dim=-1).numpy()
    node = attribution(tower, images, margin, Ablation("resample"), [donors], mlps=True)
    for found, expected in zip(graph_of(tower).by_node(sums), (node.heads, node.mlps)):
        assert np.abs(found - expected.numpy()).max() < 1e-8 < 0.001 * np.abs(found).max()


@pytest.mark.parametrize("name", ["plain", "avg"])
def test_the_inputs_edges_sum_to_the_corruption(name):
    tower, images, donors = opened(**TOWERS[name])
    with torch.no_grad():
        for block in tower.visual.transformer.resblocks:
            block.attn.in_proj_weight[:64] *= 0.3  # a softmax flat enough for few points
        change = margin(tower(donors)) - margin(tower(images))
    errors = []
    for steps in (0, 2, 8, 32):
        found = edge_scores(tower, images, donors, margin, steps)[:, 0].sum(dim=-1)
        errors.append(float((found - change).abs().max()))
    assert all(later < earlier for earlier, later in pairwise(errors))
    assert errors[-1] < 1e-6 < 1e-3 * change.abs().min()


def test_where_all_is_linear_an_edge_is_exact():
    """No activation, patterns that do not move, norms that only centre, a linear score."""
    visual = build(layers=2, act_layer=nn.Identity, ls_init_value=0.7)
    with torch.no_grad():
        for block in visual.transformer.resblocks:
            block.attn.in_proj_weight[:64] = 0
            for norm in (block.ln_1, block.ln_2):
                norm.eps, norm.weight.data = 1e14, 1e7 * norm.weight
        visual.ln_post.eps, visual.ln_post.weight.data = 1e14, 1e7 * visual.ln_post.weight
    tower = HookedVisionTransformer(visual)
    images, donors = pictures(visual, n=2), pictures(visual, n=2, seed=9)
    exact = naive(tower, images, donors, linear, function=edge_effects)
    with torch.no_grad():
        change = linear(tower(donors)) - linear(tower(images))
    for steps in (0, 3):
        found = edge_scores(tower, images, donors, linear, steps)
        torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(found[:, :, -1].sum(dim=-1), change)  # the output's edges
        graph = graph_of(tower)
        moves = graph.edges & [not name.endswith((".q", ".k")) for name in graph.readers]
        moves[0, -2:] = False  # there the class token alone is read, embedded alike in all pictures
        assert torch.equal(found.abs() > 1e-9, torch.from_numpy(moves).expand_as(found))


def test_nothing_is_left_on_the_users_model():
    visual = build().train()
    frozen = visual.transformer.resblocks[1].mlp.c_fc.weight.requires_grad_(False)
    tower, images = HookedVisionTransformer(visual), pictures(visual, n=2).requires_grad_()
    donors, before = pictures(visual, n=2, seed=9), copy.deepcopy(visual.state_dict())
    plain = tower(images).detach()
    with torch.inference_mode():
        inside = edge_scores(tower, pictures(visual, n=2), donors, margin, 2)
    found = edge_scores(tower, images, donors, margin, 2)
    assert torch.equal(found, inside) and found.grad_fn is None
    assert not tower.list_hooks() and visual.training and images.grad is None
    for name, parameter in visual.named_parameters():
        assert parameter.grad is None and parameter.requires_grad == (parameter is not frozen)
        assert torch.equal(parameter, before[name])
    assert torch.equal(tower(images), plain)


def test_bad_edges_are_refused():
    tower, images, donors = opened()
    for given, metric, steps, said in (
        (donors[:1], margin, 0, "every image needs a donor"),
        (donors, margin, -1, "-1 steps"),
        (donors, lambda f: margin(f).sum(), 0, "one differentiable score an image"),
        (donors, lambda f: margin(f.detach()), 0, "one differentiable score an image"),
    ):
        with pytest.raises(UserError, match=said):
            edge_scores(tower, images, given, metric, steps)
    assert not tower.list_hooks()


def planted(writes):
    """Two layers of two heads without MLPs, of which those in `writes` alone write anything."""
    visual = build(layers=2, heads=2)
    with torch.no_grad():
        for layer, block in enumerate(visual.transformer.resblocks):
            block.mlp.c_proj.weight.zero_()
            for head in (0, 1):
                if (layer, head) not in writes:
                    block.attn.out_proj.weight[:, 16 * head : 16 * (head + 1)] = 0
    return HookedVisionTransformer(visual)


@pytest.mark.parametrize("kind", ["zero", "mean", "resample"])
@pytest.mark.parametrize("writes", [{(0, 1)}, {(1, 0)}, {(0, 0), (1, 1)}])
def test_a_planted_circuit_is_found_and_nothing_else(writes, kind):
    tower = planted(writes)
    images, nodes = pictures(tower.visual, n=12), every(tower.cfg, "head")
    (order,) = derangements(12, 1, 0)
    ablation = Ablation(kind)
    if kind == "mean":
        ablation = Ablation(kind, "all", *mean_activations(tower, [images]))
    donors = [images[order]] if kind == "resample" else []

    def features(removed):
        return ablate_batch(tower, images, ablation, [together(removed, "x")], donors).features[
            0, 0
        ]

    with torch.no_grad():
        whole = tower(images)
    along = F.normalize(whole, dim=-1) - F.normalize(features(nodes), dim=-1)

    def score(of):
        return (F.normalize(of, dim=-1) * along).sum(dim=-1)

    full, empty = (score(x).numpy() for x in (whole, features(nodes)))
    assert (full > empty).all()

    def kept(sets):
        removed = [without(nodes, each) for each in sets]
        return np.stack([score(features(r)).numpy() if r else full for r in removed])

    def faithfulness(sets):
        return (kept(sets) - empty).mean(axis=1) / (full - empty).mean()

    scores = edge_scores(tower, images, images[order], score).mean(dim=0).numpy()
    heads, mlps = graph_of(tower).by_node(scores.sum(axis=-1))
    inert = [(n.heads[0].layer, n.heads[0].index) not in writes for n in nodes]
    assert not heads.ravel()[inert].any() and not mlps.any() and heads.any()
    importance = np.argsort(-np.abs(heads.ravel()), kind="stable")
    circuit = minimal_circuit([nodes[k] for k in importance], faithfulness, 0.99)
    assert {(n.heads[0].layer, n.heads[0].index) for n in circuit} == writes
    rivals = random_sets(nodes, circuit, 20, 0, by_layer=False)
    found = share(kept([circuit])[0], kept(rivals), full, empty, 199)
    assert found.interval.estimate == pytest.approx(1) == pytest.approx(found.interval.low)
    assert max(found.random) < 0.99 and found.rank == 1
    assert found.over is not None and found.over.low > 0
    rest = share(kept([without(nodes, circuit)])[0], kept(rivals)[:0], full, empty, 199)
    assert rest.interval.estimate == pytest.approx(0, abs=1e-9) and rest.random == []


def test_the_circuit_is_minimal_and_greedy():
    """Worths with synergy, negative and nothing: no node can go, whatever the order was."""
    tower = HookedVisionTransformer(build())
    nodes = every(tower.cfg, "head")
    rng = np.random.default_rng(0)
    for _ in range(20):
        worth, pairs = rng.normal(0.3, 1, 12), rng.normal(0, 0.3, (12, 12))
        sizes = []

        def value(kept, worth=worth, pairs=pairs):
            at = [nodes.index(node) for node in kept]
            return worth[at].sum() + pairs[np.ix_(at, at)].sum()

        def faithfulness(sets, value=value, sizes=sizes):
            sizes.append(len(sets))
            return [value(kept) / value(nodes) for kept in sets]

        if value(nodes) < 1:
            continue
        circuit = minimal_circuit([nodes[k] for k in rng.permutation(12)], faithfulness, 0.9)
        assert value(circuit) >= 0.9 * value(nodes) and set(circuit) <= set(nodes)
        assert all(value(without(circuit, [node])) < 0.9 * value(nodes) for node in circuit)
        assert sum(sizes) < 12 * 13 / 2  # cheaper than one by one


def test_equal_nodes_go_by_the_order():
    nodes = every(HookedVisionTransformer(build()).cfg, "head")
    order = [nodes[k] for k in (3, 1, 2, 0, *range(4, 12))]
    assert minimal_circuit(order, lambda sets: [len(s) / 12 for s in sets], 0.25) == order[:3]
    assert minimal_circuit(order, lambda sets: [len(s) / 12 for s in sets], 1.0) == order


def test_random_sets_are_of_the_circuits_size():
    cfg = HookedVisionTransformer(build()).cfg
    heads, mlps = every(cfg, "head"), every(cfg, "mlp")
    nodes, circuit = [*heads, *mlps], [heads[0], heads[1], heads[5], mlps[2]]

    def layers(kept):
        return sorted((bool(n.mlps), n.layers[0]) for n in kept)

    for by_layer in (False, True):
        found = random_sets(nodes, circuit, 20, 3, by_layer)
        assert len(found) == 20 == len({frozenset(kept) for kept in found})
        assert set(circuit) not in [set(kept) for kept in found]
        assert all([bool(n.mlps) for n in kept].count(True) == 1 for kept in found)
        assert all(len(kept) == 4 for kept in found)
        assert all(layers(kept) == layers(circuit) for kept in found) == by_layer
        assert found == random_sets(nodes, circuit, 20, 3, by_layer)
    assert random_sets(nodes, nodes, 20, 0, False) == []
    assert len(random_sets(heads, heads[:4], 20, 0, by_layer=True)) == 0
    assert len(random_sets(heads, heads[1:], 20, 0, by_layer=False)) == 11  # 12 sets, one its own


def test_a_share_by_hand():
    full, empty = np.array([3.0, 5.0]), np.array([1.0, 1.0])
    kept, others = np.array([3.0, 2.0]), np.array([[1.0, 1.0], [3.0, 2.0], [5.0, 4.0]])
    found = share(kept, others, full, empty, 99)
    assert found.interval.estimate == pytest.approx((2 + 1) / (2 + 4)) and found.interval.n == 2
    assert found.random == pytest.approx([0, 0.5, 7 / 6]) and found.rank == 3  # a tie counts
    assert (found.over.estimate, found.under.estimate) == pytest.approx((-2 / 3, 0.5))
    rng = np.random.default_rng(0)
    for _ in range(50):
        own = rng.normal(size=37)
        tied = share(own, np.stack([own] * 3), own + 2.0, own - rng.random(37), 99)
        assert tied.rank == 4  # whatever the order in which values are summed
    alone = share(kept, others[:0], full, empty, 99)
    assert (alone.random, alone.rank, alone.over, alone.under) == ([], 1, None, None)


@pytest.fixture(scope="module")
def swept(tiny_run):
    from interp.sweep import main as sweep

    words = "--num 120 --untrained 0 --draws 99 --gallery 0 --threads 1 --out"
    ckpt, out = tiny_run / "final_epoch.pt", tiny_run / "circuit_sweep"
    sweep(["--ckpt", str(ckpt), *words.split(), str(out)])
    return ["--ckpt", str(ckpt), "--results", str(out)], out


def test_the_command_writes_what_it_prints(swept, capsys):
    words, out = swept
    more = "--sets 3 --steps 2 --edges 7 --pictures 24 --draws 99 --threads 1 --faithfulness 0.8"
    main([*words, *more.split()])
    printed = capsys.readouterr().out
    report = json.loads((out / "circuit.json").read_text())
    assert printed.startswith(render(report)) and "np.float" not in printed
    assert report["discovery"]["all"]["n"] == 24 and report["margin"]["n"] > 20
    saved = np.load(out / "circuit.npz")
    assert saved["scores"].shape == (len(saved["writers"]), len(saved["readers"])) == (21, 53)
    assert saved["scores"].dtype == np.float32
    graph = networkx.read_graphml(out / "circuit.graphml", force_multigraph=True)
    assert graph.number_of_edges() == 7 == len(report["graph"]["edges"])
    assert (
        len(set(re.findall(r'<edge [^>]*id="([^"]+)"', (out / "circuit.graphml").read_text()))) == 7
    )
    strongest = report["graph"]["edges"][0]
    assert abs(strongest["score"]) == pytest.approx(np.abs(saved["scores"]).max())
    assert strongest["low"] <= strongest["estimate"] <= strongest["high"]
    assert {name: fit["heads"] for name, fit in report["agreement"].items()} == {
        "EAP": 16,
        "EAP-IG": 16,
    }
    assert Image.open(out / "circuit.png").width > 600
    assert f"{len(report['circuit'])} of 16" in caption(report)
    if report["circuit"]:
        assert [row["kind"] for row in report["validation"]] == ["zero", "mean", "resample"]
        assert report["discovery"]["faithfulness"] >= 0.8
    else:
        assert "nothing that a circuit could keep" in printed
    with pytest.raises(UserError, match="--overwrite"):
        main(words)


def test_without_a_margin_to_keep_there_is_no_ratio(swept, capsys):
    """A barely trained model's margin over the hardest caption: nothing is claimed."""
    words, out = swept
    more = "--sets 2 --steps 1 --pictures 20 --draws 99 --wrong hardest --mlps --overwrite"
    main([*words, *more.split()])
    printed, report = capsys.readouterr().out, json.loads((out / "circuit.json").read_text())
    assert report["nodes"] == 20 and report["options"]["mlps"]
    above = report["discovery"]["all"]["low"] > 0
    assert bool(report["circuit"]) == above
    assert ("not above 0 by its interval: there is nothing" in printed) != above


def test_the_report_says_where_a_circuit_is_nothing_special():
    interval = {"estimate": 0.5, "low": 0.4, "high": 0.6, "n": 9}
    fit = {"pearson": None, "spearman": 0.5, "recall": 1.0, "chance": 0.3, "heads": 4}
    ordinary = {"interval": interval, "random": [0.1, 0.7], "rank": 2}
    ordinary |= {"over": interval | {"low": -0.1}, "under": interval}
    special = ordinary | {"over": interval, "under": interval | {"high": -0.1}}
    edge = {"source": "L0H0", "target": "L1H1", "key": "L0H0 -> L1H1.q", "score": -0.1} | interval
    rows = [
        {
            "kind": "zero",
            "all": interval,
            "faithfulness": {"random": special, "layer-matched": ordinary},
            "completeness": {"random": special, "layer-matched": ordinary},
        },
        {"kind": "mean", "all": interval, "faithfulness": None, "completeness": None},
    ]
    report = {
        "options": {"mlps": False, "wrong": "mean", "kind": "zero", "steps": 3},
        "discovery": {"all": interval, "faithfulness": 0.9},
        "margin": interval,
        "circuit": ["L0H0"],
        "nodes": 4,
        "validation": rows,
        "agreement": {"EAP": fit},
        "path_error": 0.01,
        "graph": {"graph": {"edges": 20, "n": 9}, "nodes": [], "edges": [edge]},
    }
    said = render(report)
    assert len(re.findall("; above their range", said)) == 1
    assert len(re.findall("; not above their range", said)) == 1
    assert len(re.findall("; below their range", said)) == 1
    assert len(re.findall("; not below their range", said)) == 1
    assert "no share is taken" in said and "L0H0 -> L1H1.q" in said and "Pearson none" in said
    nothing = report | {"circuit": [], "validation": []}
    assert "nothing that a circuit could keep" in render(nothing)


@pytest.mark.parametrize(
    "option, value",
    [
        ("faithfulness", 0.0),
        ("faithfulness", 1.01),
        ("edges", 0),
        ("sets", 0),
        ("steps", 0),
        ("pictures", 19),
    ],
)
def test_bad_options_are_named(option, value):
    with pytest.raises(UserError, match=f"--{option} {value}"):
        CircuitConfig(**{option: value})


def test_an_unknown_ablation_is_one_line():
    assert "--kind" in refused("interp.circuit", "--kind", "noise")
