"""`python -m interp.circuit`: the heads, and the edges between them, that carry the margin."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from interp.config import CircuitConfig
from superclip.errors import run_command

if TYPE_CHECKING:
    from torch import Tensor

    from interp.causal.units import Ablation, Unit
    from interp.swept import Swept

SCHEMA = 1
SAMPLE = 64
"""Discovery pictures on which estimates are held against exact ablations."""
SHOWN = 10

DESCRIPTION = """Find a minimal set of heads that keeps the contrastive margin (own captions less the
wrong one that is hardest for the intact model, cosine). Edge attribution (EAP-IG) on discovery
pictures ranks heads and edges; exact ablation chooses. Validation judges the circuit under zero,
mean and resample ablation, beside random sets. Writes circuit.json, .graphml and .png with the
strongest edges, and .npz with all, beside the sweep's results."""


def main(argv: list[str]) -> None:
    """Parse, search, judge, write, print."""
    from superclip.flags import parse

    config = parse(CircuitConfig, argv, "python -m interp.circuit", DESCRIPTION)
    import networkx

    from interp.render.canvas import png
    from interp.render.circuit import draw
    from interp.swept import claim, open_swept, write_report

    path = claim(config, "circuit.json")
    report, arrays = find_circuit(open_swept(config), config)
    np.savez_compressed(path.with_suffix(".npz"), **arrays)
    graph = networkx.node_link_graph(report["graph"])
    networkx.write_graphml_xml(graph, path.with_suffix(".graphml"))
    path.with_suffix(".png").write_bytes(png(draw(report)))
    write_report(path, report)
    print(render(report))
    print(f"\nwritten: {path}, circuit.graphml, circuit.png, circuit.npz")


class _Pictures:
    """Pictures of a split, another one for each to corrupt it by, and the directions of their
    margins; the margins of the intact features and of the corrupting picture's."""

    def __init__(self, swept: Swept, split: str, most: int | None, config: CircuitConfig) -> None:
        import torch

        from interp.causal.direct import caption_directions
        from interp.causal.units import derangements

        self.swept, self.rows = swept, swept.rows(split)[:most]
        with torch.no_grad():
            features = torch.cat([swept.tower(x) for x in swept.batches(self.rows, split)])
        at, (texts, owner) = (
            torch.arange(len(self.rows), device=swept.device),
            swept.captions(split),
        )
        own, _, self.along = caption_directions(features, texts, owner, at).split(1, dim=1)
        if config.wrong == "mean":
            count = (owner == at[:, None]).sum(dim=1)[:, None, None]
            self.along = own - (texts.sum(dim=0) - count * own) / (len(texts) - count)
        (self.donors,) = derangements(len(self.rows), 1, config.seed)
        self.intact, self.corrupted = (
            _margin(x, self.along).double().cpu().numpy() for x in (features, features[self.donors])
        )

    def batches(self, what: str) -> tuple[Iterator[Tensor], Iterator[Tensor]]:
        """Pictures and their donors."""
        size, donors = self.swept.batch_size, [self.rows[k] for k in self.donors]
        chunks = [donors[start : start + size] for start in range(0, len(donors), size)]
        return self.swept.batches(self.rows, what), self.swept.pictures(chunks)

    def keeping(
        self, nodes: Sequence[Unit], sets: Sequence[Sequence[Unit]], ablation: Ablation, what: str
    ) -> np.ndarray:
        """Margins `[set, image]` with all nodes outside each set ablated, in float64."""
        from interp.causal.sweep import ablated_embeddings
        from interp.circuits.search import together, without

        removed = [without(nodes, kept) for kept in sets]
        units = [together(out, str(k)) for k, out in enumerate(removed) if out]
        found: Iterator[np.ndarray] = iter(())
        if units:
            images, donors = self.batches(what)
            others = [donors] if ablation.kind == "resample" else []
            left = ablated_embeddings(self.swept.tower, images, ablation, units, others).features
            found = iter(_margin(left[0].to(self.along), self.along).double().cpu().numpy())
        return np.stack([next(found) if out else self.intact for out in removed])

    def edges(self, steps: int, what: str) -> Iterator[np.ndarray]:
        """Scores `[image, writer, reader]`, batch by batch."""
        from interp.circuits.edges import edge_scores

        along = self.along.split(self.swept.batch_size)
        for images, donors, own in zip(*self.batches(what), along, strict=True):
            metric = partial(_margin, directions=own)
            yield edge_scores(self.swept.tower, images, donors, metric, steps).cpu().numpy()


def _margin(features: Tensor, directions: Tensor) -> Tensor:
    from interp.causal.direct import cosines

    return cosines(features, directions)[..., 0]


def find_circuit(
    swept: Swept, config: CircuitConfig
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The report, and every edge's mean score on discovery."""
    from interp.causal.units import Ablation, every, mean_activations
    from interp.circuits.edges import Graph
    from interp.circuits.search import minimal_circuit
    from interp.stats.intervals import mean_interval

    cfg, sampled = swept.tower.cfg, (None, config.draws, config.seed)
    chooses = _Pictures(swept, "discovery", config.pictures, config)
    judges = _Pictures(swept, "validation", None, config)
    graph, total, path = Graph(cfg.n_layers, cfg.n_heads), 0.0, []
    for batch in chooses.edges(config.steps, "edges"):
        total = total + batch.sum(axis=0, dtype=np.float64)
        path += batch[:, 0].sum(axis=-1).tolist()
    scores, ends = np.asarray(total) / len(path), chooses.corrupted - chooses.intact
    means = mean_activations(swept.tower, swept.batches(chooses.rows, "means"))
    ablations = [Ablation(), Ablation("mean", "all", *means), Ablation("resample")]
    chosen = next(ablation for ablation in ablations if ablation.kind == config.kind)
    nodes = [*every(cfg, "head"), *(every(cfg, "mlp") if config.mlps else ())]
    keeping = partial(chooses.keeping, nodes, ablation=chosen, what="search")
    (empty,) = keeping([[]])
    whole = mean_interval(chooses.intact - empty, *sampled)

    def faithfulness(sets: list[Sequence[Unit]]) -> np.ndarray:
        return (keeping(sets) - empty).mean(axis=1) / whole.estimate

    circuit, reached, grid = None, None, []
    if whole.low > 0:
        sizes = np.abs(np.concatenate([x.ravel() for x in graph.by_node(scores)]))
        order = [nodes[k] for k in np.argsort(-sizes[: len(nodes)], kind="stable")]
        circuit = minimal_circuit(order, faithfulness, config.faithfulness)
        reached = float(faithfulness([circuit])[0])
        grid = [_judge(judges, nodes, circuit, ablation, config) for ablation in ablations]
    options = ("faithfulness", "wrong", "kind", "mlps", "steps", "seed", "draws")
    report = {
        "schema": SCHEMA,
        **swept.tie,
        "options": {name: getattr(config, name) for name in options},
        "margin": asdict(mean_interval(judges.intact, *sampled)),
        "nodes_searched": len(nodes),
        "circuit": circuit and [node.name for node in nodes if node in circuit],
        "discovery": {"all": asdict(whole), "faithfulness": reached},
        "validation": grid,
        "path_error": float(np.abs(path - ends).mean() / np.abs(ends).mean()),
        "agreement": _agreement(_Pictures(swept, "discovery", SAMPLE, config), config.steps),
        "graph": _listed(graph, scores, judges, {node.name for node in circuit or ()}, config),
    }
    arrays = {"scores": scores.astype(np.float32), "writers": graph.writers}
    arrays |= {"readers": graph.readers}
    return report, {name: np.asarray(values) for name, values in arrays.items()}


def _judge(
    judges: _Pictures,
    nodes: Sequence[Unit],
    circuit: Sequence[Unit],
    ablation: Ablation,
    config: CircuitConfig,
) -> dict[str, Any]:
    """Shares of the circuit and of all else, beside those of random sets; no share where the margin
    is not seen to fall without all nodes."""
    from interp.circuits.search import random_sets, share, without
    from interp.stats.intervals import mean_interval

    rivals = [random_sets(nodes, circuit, config.sets, config.seed, on) for on in (False, True)]
    kept = [circuit, *rivals[0], *rivals[1]]
    sets = [[], *kept, *(without(nodes, each) for each in kept)]
    empty, *rest = judges.keeping(nodes, sets, ablation, f"{ablation.kind} ablation")
    whole = mean_interval(judges.intact - empty, None, config.draws, config.seed)
    row: dict[str, Any] = {"kind": ablation.kind, "all": asdict(whole)}
    for name, (own, *others) in zip(("faithfulness", "completeness"), np.split(np.stack(rest), 2)):
        parts = np.split(np.reshape(others, (-1, len(own))), [len(rivals[0])])
        row[name] = {
            rival: asdict(share(own, part, judges.intact, empty, config.draws, config.seed))
            for rival, part in zip(("random", "layer-matched"), parts)
            if whole.low > 0
        }
    return row


def _agreement(sample: _Pictures, steps: int) -> dict[str, Any]:
    """EAP and EAP-IG, summed over each head's edges, against its exact resample ablation."""
    from interp.causal.attribution import agreement
    from interp.causal.units import Ablation, every
    from interp.circuits.edges import Graph
    from interp.circuits.search import without

    cfg = sample.swept.tower.cfg
    graph, heads = Graph(cfg.n_layers, cfg.n_heads), every(cfg, "head")
    sets = [without(heads, [head]) for head in heads]
    exact = sample.keeping(heads, sets, Ablation("resample"), "exact heads") - sample.intact
    exact = exact.T.reshape(-1, cfg.n_layers, cfg.n_heads)
    found: dict[str, Any] = {"n": len(exact)}
    for name, points in (("EAP", 0), ("EAP-IG", steps)):
        estimates = [graph.by_node(batch)[0] for batch in sample.edges(points, name)]
        found[name] = asdict(agreement(np.concatenate(estimates), exact).overall)
    return found


def _listed(
    graph: Any, scores: np.ndarray, judges: _Pictures, members: set[str], config: CircuitConfig
) -> dict[str, Any]:
    """All nodes, and the strongest edges with their simultaneous band on validation, as networkx
    writes a graph; a head's q, k and v are keys of the edges to it."""
    import networkx

    from interp.stats.intervals import simultaneous_band

    writers, readers = graph.writers, graph.readers
    top = np.argsort(-np.abs(scores), axis=None, kind="stable")[: int(graph.edges.sum())]
    top = top[: config.edges]
    batches = judges.edges(config.steps, "judged edges")
    judged = np.concatenate([batch.reshape(len(batch), -1)[:, top] for batch in batches])
    one = np.zeros(len(judged), np.int64)
    band = simultaneous_band(judged.astype(np.float64), one, 1, config.draws, config.seed)
    found = networkx.MultiDiGraph(edges=int(graph.edges.sum()), n=len(judged))
    for name, score in zip(writers, scores.sum(axis=1).tolist()):
        layer = {"layer": int(re.findall(r"\d+", name)[0])} if name != "embed" else {}
        kind = "mlp" if "mlp" in name else "head" if layer else name
        found.add_node(name, kind=kind, score=score, circuit=name in members, **layer)
    found.add_node("output", kind="output", circuit=False)
    for edge, *values in zip(
        top.tolist(), *(x.tolist() for x in (band.estimate, band.low, band.high))
    ):
        at, name = divmod(edge, len(readers))[0], readers[edge % len(readers)]
        head, _, part = name.partition(".")
        reader, key = (head, part) if part in ("q", "k", "v") else (name, "in")
        judged_by = dict(zip(("estimate", "low", "high"), values))
        found.add_edge(writers[at], reader, key=key, score=float(scores.flat[edge]), **judged_by)
    data = networkx.node_link_data(found)
    data["edges"].sort(key=lambda edge: -abs(edge["score"]))
    return data


def render(report: dict[str, Any]) -> str:
    """The report as text."""
    options, found, margin = report["options"], report["discovery"], report["margin"]
    nodes = "heads and MLPs" if options["mlps"] else "heads"
    cost = f"{options['kind']} ablation of all {nodes} costs {_show(found['all'])}"
    lines = [
        f"intact, n = {margin['n']} validation pictures: contrastive margin {_show(margin)}",
        f"discovery, n = {found['all']['n']}: {cost}; "
        + (
            f"{found['faithfulness']:.3f} of it is kept by {len(report['circuit'])} of "
            f"{report['nodes_searched']} {nodes}: {', '.join(report['circuit'])}"
            if report["circuit"]
            else "not above 0 by its interval, so there is nothing that a circuit could keep"
        ),
    ]
    for row in report["validation"]:
        lines += ["", f"{row['kind']} ablation of all {nodes} costs {_show(row['all'])}"]
        for name in ("faithfulness", "completeness"):
            lines += _against(name, row[name]) if row[name] else []
        if not row["faithfulness"]:
            lines.append("  not above 0 by its interval: no share is taken")
    graph, fits = report["graph"], report["agreement"]
    edges, n = graph["edges"], graph["graph"]["n"]
    lines += ["", f"strongest of {graph['graph']['edges']} edges: {'discovery':>12}  validation"]
    for edge in edges[:SHOWN]:
        reader = edge["target"] + ("" if edge["key"] == "in" else f".{edge['key']}")
        name = f"{edge['source']} -> {reader}"
        lines.append(f"  {name:<30}{edge['score']:>10.4f}  {_show(edge)}")
    lines.append(
        f"  (simultaneous 95 % band of {len(edges)}, n = {n}; below 0: supports the margin)"
    )
    for name in ("EAP", "EAP-IG"):
        fit = fits[name]
        numbers = (fit[key] for key in ("pearson", "spearman", "recall"))
        values = ["undefined" if x is None else f"{x:.2f}" for x in numbers]
        lines.append(
            f"{name} against exact resample ablation of {fit['heads']} heads, n = {fits['n']}: "
            f"Pearson {values[0]}, Spearman {values[1]}, top 5 found {values[2]} "
            f"(chance {fit['chance']:.2f})"
        )
    lines.append(f"error of the path's sum: {report['path_error']:.1%} ({options['steps']} steps)")
    return "\n".join(lines)


def _against(name: str, shares: dict[str, Any]) -> list[str]:
    """A share beside those of random sets; faithful is high, complete is low."""
    high = name == "faithfulness"
    what = "share kept by the circuit" if high else "by all else; the closer to 0 the better"
    lines = [f"  {name} {_show(shares['random']['interval'], 3)} ({what})"]
    for rival, of in shares.items():
        random = of["random"]
        beyond = of["rank"] == (1 if high else len(random) + 1)
        lines.append(
            f"    {len(random)} {rival} sets: {min(random):.3f} to {max(random):.3f}, rank "
            f"{of['rank']} of {len(random) + 1}; the "
            f"circuit is {'' if beyond else 'not '}{'above' if high else 'below'} their range"
            if random
            else f"    there is no other {rival} set"
        )
    return lines


def _show(of: dict[str, float], digits: int = 4) -> str:
    values = (of[name] for name in ("estimate", "low", "high"))
    return "{:.{d}f} [{:.{d}f}, {:.{d}f}]".format(*values, d=digits)


if __name__ == "__main__":
    run_command(main)
