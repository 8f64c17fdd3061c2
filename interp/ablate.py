"""`python -m interp.ablate`: what the model loses when a head is removed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from interp.config import AblateConfig
from interp.heads import Head
from superclip.errors import UserError, run_command

if TYPE_CHECKING:
    from interp.results import SweepResults
    from interp.swept import Swept

SCHEMA = 1
GROUP = 4
"""Heads removed together in the set comparison."""

DESCRIPTION = """Remove heads and measure the loss on the sweep's validation pictures: contrastive
margin (own caption minus hardest wrong one, cosine) and image-to-text R@1, paired by picture. Zero
ablation, and mean ablation with the mean of the discovery pictures. Attention in a box is no
evidence of use; this is. Writes ablation.json beside the sweep's results."""

Roles = dict[Head, str]


def main(argv: list[str]) -> None:
    """Parse, ablate, print, write."""
    from superclip.flags import parse

    config = parse(AblateConfig, argv, "python -m interp.ablate", DESCRIPTION)
    from interp.swept import claim, open_swept, write_report

    path = claim(config, "ablation.json")
    report = ablate_heads(open_swept(config), config)
    write_report(path, report)
    print(render(report))
    print(f"\nwritten: {path}")


def choose_heads(spec: str, results: SweepResults, seed: int) -> Roles:
    """Heads named by `--heads`, each with why it is there; the first reason counts.

    Raises:
        UserError: if a part can't be read or names a head that the tower does not have.
    """
    from interp.analysis import top_heads

    layers, heads = results.shape
    every = [Head(layer, index) for layer in range(layers) for index in range(heads)]
    roles: Roles = {}
    wanted_random = 0
    for part in (p.strip() for p in spec.split(",")):
        name, _, count = part.partition(":")
        if name in ("random", "top"):
            if not count.isdigit() or int(count) < 1:
                raise UserError(f"--heads {part}: write {name}:K with K at least 1")
            if name == "random":
                wanted_random += int(count)
            else:
                for head in top_heads(results, int(count)):
                    roles.setdefault(head, "top")
        elif part == "champion":
            roles.setdefault(top_heads(results, 1)[0], "champion")
        elif part == "all":
            for head in every:
                roles.setdefault(head, "listed")
        else:
            head = Head.parse(part)
            if head not in every:
                raise UserError(f"--heads {part}: the tower has {layers} layers of {heads} heads")
            roles.setdefault(head, "listed")
    rest = [head for head in every if head not in roles]
    rng = np.random.Generator(np.random.Philox(key=[seed, 0xAB1]))
    for k in rng.permutation(len(rest))[:wanted_random]:
        roles[rest[int(k)]] = "random"
    return roles


def ablate_heads(swept: Swept, config: AblateConfig) -> dict[str, Any]:
    """Effects of removing each head, and of the four best together against random fours."""
    from interp.analysis import top_heads
    from interp.causal.ablation import embeddings_under_ablation, mean_z

    results, tower, judged = swept.results, swept.tower, swept.rows("validation")
    roles = choose_heads(config.heads, results, config.seed)
    means = mean_z(tower, swept.batches(swept.rows("discovery"), "means"))
    text, owner = swept.captions("validation")
    top = top_heads(results, GROUP)
    sets, labels = _random_sets(results, top, config)
    bank: dict[tuple[str, str], Any] = {}
    for kind in ("zero", "mean"):
        groups = [[], *([head] for head in roles)] + (sets if kind == "mean" else [])
        names = ["base", *map(str, roles)] + (labels if kind == "mean" else [])
        given = means if kind == "mean" else None
        batches = swept.batches(judged, f"{kind} ablation")
        found = embeddings_under_ablation(tower, batches, groups, kind, given, config.tokens)
        bank |= {(kind, name): features for name, features in zip(names, found)}
    norms = _removed_norms(tower, swept.batches(judged, "norms"), means, roles)
    texts = text.cpu(), owner.cpu()
    return _report(results, roles, bank, *texts, norms, (top, sets, labels), config)


def _random_sets(results: SweepResults, top: Sequence[Head], config: AblateConfig):
    """The best heads of discovery together, and as many sets of as many of the others."""
    layers, heads = results.shape
    rest = [h for h in (Head(*divmod(k, heads)) for k in range(layers * heads)) if h not in top]
    if config.sets == 0 or len(rest) < GROUP:
        return [], []
    rng = np.random.Generator(np.random.Philox(key=[config.seed, 0xAB2]))
    drawn = [[rest[int(k)] for k in rng.permutation(len(rest))[:GROUP]] for _ in range(config.sets)]
    return [list(top), *drawn], ["top set", *(f"set {k}" for k in range(config.sets))]


def _removed_norms(
    tower: Any, batches: Any, means: Any, roles: Roles
) -> dict[str, dict[Head, float]]:
    """Mean norm of what a removal takes from the class token's stream, by kind and head."""
    import torch

    totals = {kind: dict.fromkeys(roles, 0.0) for kind in ("zero", "mean")}
    n = 0
    with torch.no_grad():
        for images in batches:
            _, cache = tower.run_with_cache(
                images, names_filter=lambda name: name.endswith("hook_z")
            )
            n += len(images)
            for head in roles:
                z = cache["z", head.layer][:, 0, head.index]
                weight = tower.blocks[head.layer].attn.W_O[head.index]
                mean = means[head.layer, 0, head.index].to(z)
                totals["zero"][head] += float((z @ weight).norm(dim=-1).sum())
                totals["mean"][head] += float(((z - mean) @ weight).norm(dim=-1).sum())
    return {kind: {head: total / n for head, total in of.items()} for kind, of in totals.items()}


def _report(results, roles, bank, text, owner, norms, sets, config: AblateConfig) -> dict[str, Any]:
    from interp.causal.ablation import contrastive_margin, recall_hits
    from interp.stats.intervals import mean_interval
    from interp.stats.multiplicity import sign_flip_test

    def measures(features: Any) -> tuple[np.ndarray, np.ndarray]:
        margin = contrastive_margin(features, text, owner).double().numpy()
        return margin, recall_hits(features, text, owner, 1).double().numpy()

    def interval(values: np.ndarray) -> dict[str, float]:
        return asdict(mean_interval(values, None, config.draws, config.seed))

    base = measures(bank["zero", "base"])
    rows, ranks = [], {}
    for kind in ("zero", "mean"):
        effects = [measures(bank[kind, str(head)]) for head in roles]
        margins = np.stack([m - base[0] for m, _ in effects], axis=1)
        test = sign_flip_test(margins, two_sided=True, draws=config.draws, seed=config.seed)
        for k, (head, role) in enumerate(roles.items()):
            rows.append(
                {
                    "head": str(head),
                    "role": role,
                    "kind": kind,
                    "removed_norm": norms[kind][head],
                    "margin": interval(margins[:, k]),
                    "margin_p": float(test.p[k]),
                    "margin_p_adjusted": float(test.p_adjusted[k]),
                    "recall_at_1": interval(effects[k][1] - base[1]),
                }
            )
        place = list(roles.values()).index("champion") if "champion" in roles.values() else None
        if place is not None:
            means = margins.mean(axis=0)
            others = [k for k, role in enumerate(roles.values()) if role == "random"]
            rank = 1 + sum(means[k] <= means[place] for k in others)
            ranks[kind] = {"rank": int(rank), "of": len(others) + 1}
    return {
        "schema": SCHEMA,
        "checkpoint_sha256": results.manifest["checkpoint"]["sha256"],
        "images_sha256": results.manifest["images_sha256"],
        "n": len(base[0]),
        "tokens": config.tokens,
        "base": {"margin": interval(base[0]), "recall_at_1": interval(base[1])},
        "heads": rows,
        "champion_rank": ranks or None,
        "sets": _sets(sets, bank, measures, base, interval),
    }


def _sets(sets, bank, measures, base, interval) -> dict[str, Any] | None:
    """The best heads together against random sets of as many, by R@1 under mean ablation."""
    top, groups, labels = sets
    if not groups:
        return None
    changes = [measures(bank["mean", label])[1] - base[1] for label in labels]
    means = [float(change.mean()) for change in changes]
    return {
        "size": GROUP,
        "kind": "mean",
        "top": [str(head) for head in top],
        "top_effect": interval(changes[0]),
        "random_effects": means[1:],
        "rank": 1 + sum(m <= means[0] for m in means[1:]),
        "of": len(means),
    }


def render(report: dict[str, Any]) -> str:
    """The report as text."""

    def show(interval: dict[str, float], scale: float = 1, digits: int = 4) -> str:
        values = (interval[k] * scale for k in ("estimate", "low", "high"))
        return "{:.{d}f} [{:.{d}f}, {:.{d}f}]".format(*values, d=digits)

    base = report["base"]
    lines = [
        f"intact, n = {report['n']} validation pictures: contrastive margin "
        f"{show(base['margin'])}, "
        f"image-to-text R@1 among them {show(base['recall_at_1'], 100, 1)}",
        "",
        f"{'head':<8}{'role':<10}{'kind':<6}{'margin, ablated - intact':<30}{'p':>8}{'p adj.':>8}  "
        f"{'R@1, points':<24}{'norm':>7}",
    ]
    for row in sorted(report["heads"], key=lambda r: (r["kind"], r["margin"]["estimate"])):
        lines.append(
            f"{row['head']:<8}{row['role']:<10}{row['kind']:<6}{show(row['margin']):<30}"
            f"{row['margin_p']:>8.4f}{row['margin_p_adjusted']:>8.4f}  "
            f"{show(row['recall_at_1'], 100, 1):<24}{row['removed_norm']:>7.3f}"
        )
    for kind, place in (report["champion_rank"] or {}).items():
        lines.append(
            f"{kind} ablation: the champion's loss of margin is number {place['rank']} of "
            f"{place['of']} "
            "(itself and the random heads)"
        )
    if report["sets"] is not None:
        sets = report["sets"]
        effects = [100 * e for e in sets["random_effects"]]
        lines.append(
            f"the {sets['size']} best of discovery together ({', '.join(sets['top'])}), mean "
            "ablation: R@1 "
            f"{show(sets['top_effect'], 100, 1)} points; {len(effects)} random sets of "
            f"{sets['size']}: mean "
            f"{np.mean(effects):.1f}, from {min(effects):.1f} to {max(effects):.1f}; rank "
            f"{sets['rank']} of {sets['of']}"
        )
    lines.append(
        "intervals: bootstrap over pictures, paired; p: sign flips, adjusted by max-T within a kind"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(main)
