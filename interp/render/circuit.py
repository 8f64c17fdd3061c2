"""The strongest edges between the parts of a tower, drawn layer by layer."""

from __future__ import annotations

import textwrap
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch

from interp.render.canvas import LIGHT, Theme, place, themed, write
from interp.render.words import count, plural

HEAVIEST = 4.5  # points
PORTS = {"q": -0.22, "k": 0.0, "v": 0.22}
MARKS = {"head": "o", "mlp": "s"}
LABELS = {"mlp": "MLP", "embed": "in", "output": "out"}


def draw(report: dict[str, Any], theme: Theme = LIGHT) -> Figure:
    """A column of heads a layer, its MLP below and behind them; nodes of the circuit are filled."""
    nodes, edges = report["graph"]["nodes"], report["graph"]["edges"]
    layers = 1 + max(node.get("layer", 0) for node in nodes)
    heads = sum(node["kind"] == "head" for node in nodes) // layers
    wide, high = max(1.15 * layers + 1.3, 4.5), 0.46 * heads + 0.9
    text = textwrap.fill(caption(report), round(17 * wide))
    used = {edge[end] for edge in edges for end in ("source", "target")}
    largest = max(abs(edge["score"]) for edge in edges) or 1.0
    at = {node["id"]: _where(node, layers, heads) for node in nodes}
    with themed(theme):
        figure = Figure(figsize=(wide + 0.3, high + 0.3 + 0.15 * text.count("\n")))
        axes = place(figure, 0.15, 0.05, wide, high)
        axes.set(xlim=(-0.95, layers + 0.35), ylim=(heads + 0.5, -0.9))
        axes.set_axis_off()
        for layer in range(layers):
            axes.text(layer, -0.65, f"L{layer}", ha="center", color=theme.muted)
        for edge in reversed(edges):
            (x, y), (end, port) = at[edge["source"]], at[edge["target"]]
            arrow = FancyArrowPatch(
                (x, y),
                (end - 0.1, port + PORTS.get(edge["part"], 0.0)),
                connectionstyle="arc3,rad=0.06",
                arrowstyle="-",
                linewidth=max(0.3, HEAVIEST * abs(edge["score"]) / largest),
                color=theme.towers if edge["score"] < 0 else theme.pixels,
            )
            axes.add_patch(arrow)
        for node in nodes:
            (x, y), ink = at[node["id"]], theme.ink if node["id"] in used else theme.muted
            face, letters = (ink, theme.paper) if node["circuit"] else (theme.paper, ink)
            axes.plot(x, y, MARKS.get(node["kind"], "D"), ms=15, mfc=face, mec=ink)
            label = LABELS.get(node["kind"]) or "H" + node["id"].partition("H")[2]
            axes.text(x, y, label, ha="center", va="center", size=5.5, color=letters, zorder=4)
        write(figure, 0.15, high + 0.1, text, size=7.5, linespacing=1.4)
    return figure


def _where(node: dict[str, Any], layers: int, heads: int) -> tuple[float, float]:
    if node["kind"] == "head":
        return node["layer"], int(node["id"].partition("H")[2])
    ends = {"embed": (-0.75, (heads - 1) / 2), "output": (layers + 0.15, (heads - 1) / 2)}
    return ends.get(node["kind"], (node.get("layer", 0) + 0.45, heads - 0.1))


def caption(report: dict[str, Any]) -> str:
    """What is drawn, from the numbers."""
    facts, edges = report["graph"]["graph"], report["graph"]["edges"]
    return (
        f"The {plural(len(edges), 'edge')} of {count(facts['edges'])} that are strongest on "
        f"n = {count(report['discovery']['all']['n'])} discovery pictures (EAP-IG). Width: up to "
        f"{max(abs(edge['score']) for edge in edges):.3g} of margin. Blue: corrupting the edge "
        "would lower the margin; orange: raise it. Into a head from top to bottom: q, k, v. "
        f"Filled: the circuit, {len(report['circuit'])} of {report['nodes']}."
    )
