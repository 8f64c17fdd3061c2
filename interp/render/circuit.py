"""The strongest edges between the parts of a tower, drawn layer by layer."""

from __future__ import annotations

import textwrap
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch

from interp.render.canvas import LIGHT, Theme, place, themed, write
from interp.render.words import count, plural

HEAVIEST = 4.5  # points
PORTS = {"q": -0.17, "k": 0.0, "v": 0.17}


def draw(report: dict[str, Any], theme: Theme = LIGHT) -> Figure:
    """A column of heads a layer, its MLP after it; nodes of the circuit are filled."""
    nodes, edges = report["graph"]["nodes"], report["graph"]["edges"]
    layers = 1 + max(node.get("layer", 0) for node in nodes)
    heads = sum(node["kind"] == "head" for node in nodes) // layers
    wide, high = 1.1 * layers + 1.3, 0.42 * heads + 0.45
    text = textwrap.fill(caption(report), round(13.5 * wide))
    drawn = {edge[end] for edge in edges for end in ("source", "target")}
    largest = max(abs(edge["score"]) for edge in edges) or 1.0
    with themed(theme):
        figure = Figure(figsize=(wide + 0.3, high + 0.7 + 0.16 * text.count("\n")))
        axes = place(figure, 0.15, 0.1, wide, high)
        axes.set(xlim=(-1.0, layers + 0.4), ylim=(heads - 0.4, -1.2))
        axes.set_axis_off()
        at = {node["id"]: _where(node, layers, heads) for node in nodes}
        for edge in reversed(edges):
            (x, y), (to_x, to_y) = at[edge["source"]], at[edge["target"]]
            axes.add_patch(
                FancyArrowPatch(
                    (x + 0.06, y),
                    (to_x - 0.06, to_y + PORTS.get(edge["key"], 0.0)),
                    connectionstyle="arc3,rad=0.06",
                    arrowstyle="-",
                    linewidth=max(0.3, HEAVIEST * abs(edge["score"]) / largest),
                    color=theme.towers if edge["score"] < 0 else theme.pixels,
                    alpha=0.8,
                )
            )
        for node in nodes:
            (x, y), ink = at[node["id"]], theme.ink if node["id"] in drawn else theme.rule
            face = theme.ink if node["circuit"] else theme.paper
            axes.plot(
                x, y, {"head": "o", "mlp": "s"}.get(node["kind"], "D"), ms=6, mfc=face, mec=ink
            )
            name = node["id"] if node["kind"] == "head" else node["kind"]
            axes.text(x, y - 0.24, name, ha="center", size=6, color=ink, zorder=4)
        write(figure, 0.15, high + 0.2, text, size=7.5, linespacing=1.4)
    return figure


def _where(node: dict[str, Any], layers: int, heads: int) -> tuple[float, float]:
    if node["kind"] == "head":
        return node["layer"], int(node["id"].partition("H")[2])
    across = {"embed": -0.7, "output": layers + 0.1}.get(node["kind"], node.get("layer", 0) + 0.5)
    return across, (heads - 1) / 2


def caption(report: dict[str, Any]) -> str:
    """What is drawn, from the numbers."""
    facts, edges = report["graph"]["graph"], report["graph"]["edges"]
    size = len(report["circuit"] or ())
    return (
        f"The {plural(len(edges), 'edge')} of {count(facts['edges'])} that are strongest on "
        f"n = {count(report['discovery']['all']['n'])} discovery pictures (EAP-IG). Width: up to "
        f"{max(abs(edge['score']) for edge in edges):.3g} of margin. Blue: corrupting the edge "
        "would lower the margin; orange: raise it. At a head, top to bottom: q, k, v. Filled: "
        f"circuit, {size} of {report['nodes_searched']}."
    )
