"""The smallest set of nodes that keeps a metric, and how it compares with sets drawn at random.

With all nodes outside a set S ablated, a picture's metric is m(S). As a ratio of means over
pictures, the share (m(S) - m(none)) / (m(all) - m(none)) is S's faithfulness; that of all the other
nodes tells its completeness: the closer to 0, the less was left out (Wang et al.,
"Interpretability in the Wild", 2023; Marks et al., "Sparse Feature Circuits", 2024). Both depend on
the kind of ablation (Miller et al., "Transformer Circuit Metrics Are Not Robust", 2024), and large
random sets are faithful too: show several kinds, and random sets beside.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from jaxtyping import Float

from interp.causal.units import Unit
from interp.stats.draws import DRAWS
from interp.stats.intervals import Interval, ratio_interval

Nodes = Sequence[Unit]
PerImage = Float[np.ndarray, " image"]

TRIES = 50


def together(nodes: Nodes, name: str) -> Unit:
    """Nodes as one unit of an ablation."""
    heads = tuple(sorted(head for node in nodes for head in node.heads))
    return Unit(name, heads, tuple(sorted(layer for node in nodes for layer in node.mlps)))


def without(nodes: Nodes, removed: Collection[Unit]) -> list[Unit]:
    return [node for node in nodes if node not in removed]


def minimal_circuit(
    order: Nodes, faithfulness: Callable[[Sequence[Nodes]], Sequence[float]], target: float
) -> list[Unit]:
    """A set that reaches the target, and falls below it whichever one of its nodes is left out.

    Greedy, from all nodes on: those that could be spared one by one go together, the one that is
    missed least first, as many as leave the target reached; and again, until none can be spared.
    An estimate of their importance only decides between equals.

    Args:
        order: All nodes, most important first.
        faithfulness: The exact one of each of some sets; no nodes have 0.
        target: Above 0, and reached by all nodes.
    """
    circuit = list(order)
    while True:
        one_less = [without(circuit, [node]) for node in reversed(circuit)]
        left = np.asarray(faithfulness(one_less))
        ranked = np.argsort(-left, kind="stable")[: int((left >= target).sum())]
        spare = [circuit[-1 - k] for k in ranked]
        if not spare:
            return circuit
        fewer = [without(circuit, spare[:count]) for count in range(1, len(spare) + 1)]
        enough = [f >= target for f in faithfulness(fewer)]
        circuit = fewer[max(1, [*enough, False].index(False)) - 1]  # the first is known to do


def random_sets(
    nodes: Nodes, circuit: Nodes, count: int, seed: int, by_layer: bool
) -> list[list[Unit]]:
    """Different sets of as many heads and as many MLPs as the circuit, none of them the circuit.

    Args:
        by_layer: Of as many in each layer, too.

    Returns:
        Fewer than `count` where no more are found; none where there is no choice.
    """
    groups: dict[tuple[bool, int], list[Unit]] = {}
    for node in nodes:
        groups.setdefault((not node.heads, node.layers[0] * by_layer), []).append(node)
    rng = np.random.Generator(np.random.Philox(key=[seed, 0xC1C0 + by_layer]))
    found: dict[frozenset[Unit], None] = {}
    for _ in range(TRIES * count):
        drawn = set()
        for group in groups.values():
            taken = rng.permutation(len(group))[: len(set(group) & set(circuit))]
            drawn |= {group[k] for k in taken}
        if drawn != set(circuit) and len(found) < count:
            found[frozenset(drawn)] = None
    return [[node for node in nodes if node in drawn] for drawn in found]


@dataclass(frozen=True)
class Share:
    """What a set of nodes keeps of the metric, beside random sets under the same ablation.

    Attributes:
        interval: of the share, over pictures.
        random: shares of the random sets.
        rank: 1 where none of them is as large, `len(random) + 1` where all are.
        over: the share less the largest of theirs, paired by picture; None where there are none.
        under: the share less the smallest of theirs.
    """

    interval: Interval
    random: list[float]
    rank: int
    over: Interval | None
    under: Interval | None


def share(
    kept: PerImage,
    others: Float[np.ndarray, "set image"],
    full: PerImage,
    empty: PerImage,
    draws: int = DRAWS,
    seed: int = 0,
) -> Share:
    """Compare the metric with a set kept to that with each random set, with all, and with none."""
    ratio = partial(ratio_interval, denominator=full - empty, draws=draws, seed=seed)
    sums = (np.vstack([kept, others]) - empty).mean(axis=1)  # alike, so that equals tie
    own, *random = (sums / (full - empty).mean()).tolist()
    ends = (np.argmax(random), np.argmin(random)) if random else ()
    over, under = [ratio(kept - others[end]) for end in ends] or (None, None)
    rank = 1 + sum(share >= own for share in random)
    return Share(ratio(kept - empty), random, rank, over, under)
