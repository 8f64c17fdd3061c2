"""`python -m interp.circuit`: the heads, and the edges between them, that carry the margin."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from interp.config import CircuitConfig
from superclip.errors import replacing, run_command

if TYPE_CHECKING:
    from torch import Tensor

    from interp.causal.units import Ablation, Unit
    from interp.circuits.edges import Graph
    from interp.swept import Swept

SCHEMA = 1
SHOWN = 10

DESCRIPTION = """Find a minimal set of heads that keeps the contrastive margin (cosine with own
captions less that with wrong ones), by exact ablation on discovery pictures, and the strongest
edges between parts of the tower, by attribution (EAP-IG). Validation judges the circuit under zero,
mean and resample ablation, beside random sets. Writes circuit.json, .graphml and .png with the
strongest edges, and .npz with all of them, beside the sweep's results."""


def main(argv: list[str]) -> None:
    """Parse, search, judge, write, print."""
    from superclip.flags import parse

    config = parse(CircuitConfig, argv, "python -m interp.circuit", DESCRIPTION)
    report, path = circuit_one(config)
    print(render(report))
    print(f"\nwritten: {path}, circuit.graphml, circuit.png, circuit.npz")


def circuit_one(config: CircuitConfig) -> tuple[dict[str, Any], Path]:
    """Search, judge, draw and write one checkpoint's report."""
    import networkx

    from interp.render.canvas import png
    from interp.render.circuit import draw
    from interp.swept import asked, claim, open_swept, write_arrays, write_report

    path = claim(config, "circuit.json")
    others = [claim(config, f"circuit.{kind}") for kind in ("npz", "graphml", "png")]
    report, arrays = find_circuit(open_swept(config), config)
    report["asked"] = asked(config)
    write_arrays(others[0], arrays)
    graph = networkx.node_link_graph(report["graph"])
    with replacing(others[1]) as partial:
        networkx.write_graphml_xml(graph, partial)
    with replacing(others[2]) as partial:
        partial.write_bytes(png(draw(report)))
    write_report(path, report)
    return report, path


class _Pictures:
    """Pictures of a split, another one for each to corrupt it by, and the directions of their
    margins; along them, those of the intact features and of the corrupting pictures'."""

    def __init__(self, swept: Swept, split: str, most: int | None, config: CircuitConfig) -> None:
        import torch

        from interp.causal.direct import caption_directions
        from interp.causal.units import derangements

        self.swept, self.rows = swept, swept.rows(split)[:most]
        with torch.no_grad():
            features = torch.cat([swept.tower(x) for x in swept.batches(self.rows, split)])
        (texts, owner), at = swept.captions(split), torch.arange(len(features)).to(swept.device)
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

    def without(self, removed: Sequence[Sequence[Unit]], ablation: Ablation) -> np.ndarray:
        """Margins `[set, image]` with each set of nodes ablated, in float64."""
        from interp.causal.sweep import ablated_embeddings
        from interp.circuits.search import together

        units = [together(nodes, str(k)) for k, nodes in enumerate(removed) if nodes]
        found: Iterator[np.ndarray] = iter(())
        if units:
            images, donors = self.batches(f"{ablation.kind} ablation")
            others = [donors] if ablation.kind == "resample" else []
            left = ablated_embeddings(self.swept.tower, images, ablation, units, others).features
            found = iter(_margin(left[0].to(self.along), self.along).double().cpu().numpy())
        return np.stack([next(found) if nodes else self.intact for nodes in removed])

    def edges(self, steps: int) -> Iterator[np.ndarray]:
        """Scores `[image, writer, reader]`, batch by batch."""
        from interp.circuits.edges import edge_scores

        along = self.along.split(self.swept.batch_size)
        for images, donors, own in zip(*self.batches("edges"), along, strict=True):
            metric = partial(_margin, directions=own)
            yield edge_scores(self.swept.tower, images, donors, metric, steps).cpu().numpy()

    def scored(self, steps: int) -> tuple[np.ndarray, np.ndarray]:
        """Mean scores, and each image's sums over every writer's edges."""
        total, sums = 0.0, []
        for batch in self.edges(steps):
            total = total + batch.sum(axis=0, dtype=np.float64)
            sums.append(batch.sum(axis=-1))
        return np.asarray(total) / len(self.rows), np.concatenate(sums)


def _margin(features: Tensor, directions: Tensor) -> Tensor:
    from interp.causal.direct import cosines

    return cosines(features, directions)[..., 0]


def find_circuit(
    swept: Swept, config: CircuitConfig
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The report, and every edge's mean score on discovery."""
    from interp.causal.attribution import agreement
    from interp.causal.units import Ablation, every, mean_activations
    from interp.circuits.edges import Graph
    from interp.circuits.search import minimal_circuit, without
    from interp.stats.intervals import mean_interval

    cfg, sampled = swept.tower.cfg, (None, config.draws, config.seed)
    chooses = _Pictures(swept, "discovery", config.pictures, config)
    judges = _Pictures(swept, "validation", None, config)
    graph, heads = Graph(cfg.n_layers, cfg.n_heads), every(cfg, "head")
    (_, first_order), (scores, sums) = chooses.scored(0), chooses.scored(config.steps)
    estimates = {"EAP": graph.by_node(first_order)[0], "EAP-IG": graph.by_node(sums)[0]}
    exact = chooses.without([[head] for head in heads], Ablation("resample")) - chooses.intact
    exact = exact.T.reshape(-1, cfg.n_layers, cfg.n_heads)
    fits = {name: asdict(agreement(found, exact).overall) for name, found in estimates.items()}
    means = mean_activations(swept.tower, swept.batches(chooses.rows, "means"))
    ablations = [Ablation(), Ablation("mean", "all", *means), Ablation("resample")]
    chosen = next(ablation for ablation in ablations if ablation.kind == config.kind)
    nodes = [*heads, *(every(cfg, "mlp") if config.mlps else ())]
    (empty,) = chooses.without([nodes], chosen)
    whole = mean_interval(chooses.intact - empty, *sampled)

    def faithfulness(sets: Sequence[Sequence[Unit]]) -> Any:
        kept = chooses.without([without(nodes, each) for each in sets], chosen)
        return (kept - empty).mean(axis=1) / whole.estimate

    circuit, reached, grid = [], None, []
    if whole.low > 0:
        sizes = np.abs(np.concatenate([x.ravel() for x in graph.by_node(sums.mean(axis=0))]))
        order = [nodes[k] for k in np.argsort(-sizes[: len(nodes)], kind="stable")]
        circuit = minimal_circuit(order, faithfulness, config.faithfulness)
        reached = float(faithfulness([circuit])[0])
        grid = [_judge(judges, nodes, circuit, ablation, config) for ablation in ablations]
    ends = chooses.corrupted - chooses.intact
    options = ("faithfulness", "wrong", "kind", "mlps", "steps", "seed", "draws")
    report = {
        "schema": SCHEMA,
        **swept.tie,
        "options": {name: getattr(config, name) for name in options},
        "margin": asdict(mean_interval(judges.intact, *sampled)),
        "nodes": len(nodes),
        "circuit": [node.name for node in nodes if node in circuit],
        "discovery": {"all": asdict(whole), "faithfulness": reached},
        "validation": grid,
        "agreement": fits,
        "path_error": float(np.abs(sums[:, 0] - ends).mean() / np.abs(ends).mean()),
        "graph": _listed(graph, scores, judges, {node.name for node in circuit}, config),
    }
    names = {"writers": np.array(graph.writers), "readers": np.array(graph.readers)}
    return report, {"scores": scores.astype(np.float32), **names}


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

    sampled = config.draws, config.seed
    rivals = [random_sets(nodes, circuit, config.sets, config.seed, on) for on in (False, True)]
    sets = [circuit, *rivals[0], *rivals[1]]
    margins = judges.without([*(without(nodes, kept) for kept in sets), *sets, nodes], ablation)
    full, empty = judges.intact, margins[-1]
    whole = mean_interval(full - empty, None, *sampled)
    row: dict[str, Any] = {"kind": ablation.kind, "all": asdict(whole)}
    for name, found in zip(("faithfulness", "completeness"), np.split(margins[:-1], 2)):
        parts = zip(("random", "layer-matched"), np.split(found[1:], [len(rivals[0])]))
        shares = {of: asdict(share(found[0], part, full, empty, *sampled)) for of, part in parts}
        row[name] = shares if whole.low > 0 else None
    return row


def _listed(
    graph: Graph, scores: np.ndarray, judges: _Pictures, circuit: set[str], config: CircuitConfig
) -> dict[str, Any]:
    """Nodes, and the strongest edges with their simultaneous band on validation, as networkx writes
    a graph; q, k and v of a head are parts of one node."""
    import networkx

    from interp.stats.intervals import simultaneous_band

    count, (writers, readers) = int(graph.edges.sum()), (graph.writers, graph.readers)
    top = np.argsort(-np.abs(scores), axis=None, kind="stable")[: min(count, config.edges)]
    judged = np.concatenate([x.reshape(len(x), -1)[:, top] for x in judges.edges(config.steps)])
    one = np.zeros(len(judged), np.int64)
    band = simultaneous_band(judged.astype(np.float64), one, 1, config.draws, config.seed)
    found = networkx.MultiDiGraph(edges=count, n=len(judged))
    for name, score in zip(writers, scores.sum(axis=1).tolist()):
        layer = re.match(r"L(\d+)", name)
        kind = "mlp" if "mlp" in name else "head" if layer else name
        found.add_node(name, kind=kind, score=score, circuit=name in circuit)
        if layer:
            found.nodes[name]["layer"] = int(layer[1])
    found.add_node("output", kind="output", circuit=False)
    for k, edge in enumerate(top.tolist()):
        writer, name = writers[edge // len(readers)], readers[edge % len(readers)]
        reader, part = name.split(".") if name[-1] in "qkv" else (name, "")
        values = {of: float(getattr(band, of)[k]) for of in ("estimate", "low", "high")}
        values["score"] = float(scores.flat[edge])
        found.add_edge(writer, reader, key=f"{writer} -> {name}", part=part, **values)
    data = networkx.node_link_data(found)
    data["edges"].sort(key=lambda edge: -abs(edge["score"]))
    return data


def render(report: dict[str, Any]) -> str:
    """The report as text."""
    options, chosen, facts = report["options"], report["discovery"], report["graph"]["graph"]
    nodes, found = "heads and MLPs" if options["mlps"] else "heads", report["circuit"]
    kept = "not above 0 by its interval: there is nothing that a circuit could keep"
    if found:
        kept = f"of it {len(found)} of {report['nodes']} {nodes} keep {chosen['faithfulness']:.3f}"
    over = {"mean": "all wrong captions", "hardest": "the hardest wrong caption"}[options["wrong"]]
    margin = report["margin"]
    lines = [
        f"margin over {over}: {_show(margin)}, n = {margin['n']} validation pictures",
        f"{options['kind']} ablation of all {nodes} costs {_show(chosen['all'])}, "
        f"n = {chosen['all']['n']} discovery pictures; {kept}",
        f"circuit: {', '.join(found) or 'none'}",
    ]
    for row in report["validation"]:
        lines.append(f"\n{row['kind']} ablation of all {nodes} costs {_show(row['all'])}")
        for name in ("faithfulness", "completeness"):
            lines += _beside(name, row[name]) if row[name] else []
        if not row["faithfulness"]:
            lines.append("  not above 0 by its interval: no share is taken")
    edges = report["graph"]["edges"]
    lines.append(f"\nstrongest of {facts['edges']} edges (below 0: supports the margin)")
    for edge in edges[:SHOWN]:
        line = f"  {edge['key']:<22}{edge['score']:>9.4f} on discovery, "
        lines.append(line + f"{_show(edge)} on validation")
    lines.append(f"  (simultaneous band of {len(edges)} edges, n = {facts['n']})")
    for name, fit in report["agreement"].items():
        numbers = (fit[of] for of in ("pearson", "spearman", "recall"))
        values = ["none" if x is None else f"{x:.2f}" for x in numbers]
        lines.append(
            f"{name} against exact resample ablation, head by head, n = {chosen['all']['n']}: "
            f"Pearson {values[0]}, Spearman {values[1]}, of the top 5 found {values[2]} "
            f"(chance {fit['chance']:.2f})"
        )
    lines.append(f"error of the path's sum, {options['steps']} steps: {report['path_error']:.1%}")
    return "\n".join(lines)


def _beside(name: str, shares: dict[str, Any]) -> list[str]:
    """A share beside those of random sets; a circuit is faithful if its own is high, complete if
    that of all else is low."""
    faithful, lines = name == "faithfulness", [f"  {name} {_show(shares['random']['interval'])}"]
    for rival in ("random", "layer-matched"):
        of, random = shares[rival], shares[rival]["random"]
        if not random:
            lines.append(f"    there is no other {rival} set")
            continue
        apart = of["over"] if faithful else of["under"]
        beyond = apart["low"] > 0 if faithful else apart["high"] < 0
        lines.append(
            f"    {len(random)} {rival} sets: {min(random):.4f} to {max(random):.4f}, rank "
            f"{of['rank']} of {len(random) + 1} (1 is the largest); {'not ' * (not beyond)}"
            f"{'above' if faithful else 'below'} their range: {_show(apart)} from its end"
        )
    return lines


def _show(of: dict[str, float]) -> str:
    return f"{of['estimate']:.4f} [{of['low']:.4f}, {of['high']:.4f}]"


if __name__ == "__main__":
    run_command(main)
