"""Two checkpoints side by side: the work behind `interp.compare`, from sweeps to plain values."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from interp.config import CompareConfig
from interp.heads import Head
from superclip.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from interp.results import SweepResults
    from interp.swept import Swept
    from superclip.evaluation.measures import Measure, Result
    from superclip.model.weights import Checkpoint

SCHEMA = 2
EFFECT = 2.0
"""Points for which the power of a test is stated."""
SHUFFLES = 99
"""Random pairings behind the chance level of CKA."""
ROUNDING = 1e-6
"""What single precision can't tell apart is equal."""
NAMES = "first", "second"
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Tower:
    """A sweep, and the name that tables have for it."""

    name: str
    folder: Path
    results: SweepResults

    @property
    def facts(self) -> dict[str, Any]:
        return self.results.manifest["checkpoint"]

    @cached_property
    def identity(self) -> list[str]:
        """Hashes of the sweep and of the ablation beside it, if there is one."""
        found = [self.folder / name for name in ("results.json", "ablation.json")]
        return [hashlib.sha256(p.read_bytes()).hexdigest() for p in found if p.is_file()]

    @cached_property
    def judges(self) -> np.ndarray:
        return self.results.rows("validation")

    @cached_property
    def stratum(self) -> np.ndarray:
        return self.results.stratum[self.judges].astype(np.int64)

    def excess_of(self, maps: np.ndarray) -> np.ndarray:
        """What each validation picture adds to the excess of heads with these maps."""
        boxes = self.results.coverage[self.judges], self.results.valid[self.judges]
        return influence(maps[self.judges], *boxes, self.stratum)

    @cached_property
    def excess(self) -> np.ndarray:
        return self.excess_of(self.results.maps)

    @cached_property
    def best(self) -> Head:
        from interp.analysis import top_heads

        return top_heads(self.results, 1)[0]

    @property
    def columns(self) -> dict[str, np.ndarray]:
        """What needs no matching: excess of the best head of its own discovery, means of layers."""
        layers = {f"L{k} mean": own for k, own in enumerate(self.excess.mean(2).T)}
        return {"best head": self.excess[:, self.best.layer, self.best.index]} | layers


@dataclass(frozen=True)
class Side(Tower):
    """One model of a side; its weights are given up, as twelve models need not fit at once."""

    checkpoint: Checkpoint


def influence(
    maps: np.ndarray, coverage: np.ndarray, valid: np.ndarray, stratum: np.ndarray
) -> np.ndarray:
    """`influence_values` that spread as plain ones do: centring twice cost a degree of freedom."""
    from interp.grounding.metrics import PairScores
    from interp.stats.intervals import influence_values
    from interp.stats.splits import groups

    values = influence_values(PairScores(maps, coverage, valid), stratum)
    for rows in groups(stratum):
        own, size = values[rows], len(rows)
        values[rows] += (np.sqrt((size - 1) / (size - 2)) - 1) * (own - own.mean(axis=0))
    return values


def open_sides(config: CompareConfig) -> tuple[list[Side], list[Side], list[Tower]]:
    """Both sides, seeds in order, and the further towers, before anything is measured.

    Raises:
        UserError: if one is not swept, a side is not one recipe, the sides share a checkpoint, or
            sweeps are not of the same pictures and the same kind of tower.
    """
    from superclip.evaluation.tasks import seeds_of_one_recipe

    sides: list[list[Side]] = []
    for paths, name in zip(config.sides, NAMES):
        side = sorted((_open_side(p, name, config) for p in paths), key=lambda s: s.facts["seed"])
        seeds_of_one_recipe([s.checkpoint for s in side], f"the {name} side")
        if len(side) > 1:
            side = [replace(s, name=f"{name}, seed {s.facts['seed']}") for s in side]
        sides.append(side)
    if {s.facts["sha256"] for s in sides[0]} & {s.facts["sha256"] for s in sides[1]}:
        raise UserError("both sides hold the same checkpoint; nothing to compare")
    also = [_open_tower(path, config) for path in config.also]
    for other in (*sides[0][1:], *sides[1], *also):
        refuse_unlike(sides[0][0], other)
    return sides[0], sides[1], also


def _open_tower(path: Path, config: CompareConfig) -> Tower:
    """The sweep beside a checkpoint, or in a folder."""
    from interp.results import SweepResults
    from interp.subject import default_folder

    folder = path if path.is_dir() else default_folder(path, config.kind)
    if not path.is_dir() and not (folder / "results.json").is_file():
        raise UserError(f"{path} is not swept; {_sweeping(path, config)}")
    results = SweepResults.load(folder)
    facts = results.manifest["checkpoint"]
    told = facts.get("pretrained", facts["loss"]), facts["model"], facts["sha256"][:8]
    return Tower(" ".join(told), folder, results)


def _sweeping(path: Path, config: CompareConfig) -> str:
    return f"run python -m interp.sweep --ckpt {path} --kind {config.kind}"


def _open_side(path: Path, name: str, config: CompareConfig) -> Side:
    from superclip.model.weights import brings_config, load_checkpoint

    if not brings_config(path):
        raise UserError(
            f"{path} is no checkpoint of superclip.train; plain open_clip weights go with --also, "
            "by the folder of their sweep"
        )
    tower, checkpoint = _open_tower(path, config), load_checkpoint(path)
    checkpoint.model.to("meta")
    if checkpoint.sha256 != tower.facts["sha256"]:
        again = f"{_sweeping(path, config)} --overwrite"
        raise UserError(f"{tower.folder} is the sweep of another checkpoint; {again}")
    return Side(name, tower.folder, tower.results, checkpoint)


def refuse_unlike(one: Tower, other: Tower) -> None:
    """Raises UserError with the first thing in which two sweeps differ, and both its values."""
    ids = [{*s.results.image_ids.tolist()} for s in (one, other)]
    idle = {"activation"} | (set() if isinstance(other, Side) else {"layers", "heads"})
    told = [
        {"kind of attention": (held := s.results.manifest)["kind"]}
        | {k.replace("_", " "): v for k, v in held["tower"].items() if k not in idle}
        | {"split": held["split"], "number of pictures": len(own)}
        | {"picture that is its own": min(own - (ids[0] & ids[1]), default=None)}
        | {"set of boxes": held["images_sha256"], "set of data": held["data"]["sha256"]}
        for s, own in zip((one, other), ids)
    ]
    for what, mine in told[0].items():
        if (its := told[1].get(what)) != mine:
            raise UserError(
                f"{other.folder} has another {what} than {one.folder}: {its}, not {mine}; sweep "
                "both alike"
            )


def compare(
    first: Sequence[Side], second: Sequence[Side], also: Sequence[Tower], config: CompareConfig
) -> dict[str, Any]:
    """The report, as plain values; all differences are first minus second."""
    from interp.swept import open_swept
    from superclip.evaluation.tables import differences_of
    from superclip.evaluation.tasks import share_initial_weights

    single, results = len(first) == len(second) == 1, first[0].results
    paired = share_initial_weights([s.checkpoint for s in first], [s.checkpoint for s in second])
    seen: list[list[Seen]] = []
    for side in (first, second):
        given = (replace(config, ckpt=s.checkpoint.path, results=s.folder) for s in side)
        seen.append([see(open_swept(one), single) for one in given])
    arms = [list(map(_measured, side, own)) for side, own in zip((first, second), seen)]
    rows = differences_of(arms[0], arms[1], paired, EFFECT, config.draws)
    for row in rows[: len(first[0].columns)]:  # more excess is no better by itself
        row["verdict"] = row["verdict"].replace("better", "higher").replace("worse", "lower")
    held = results.manifest
    report: dict[str, Any] = {"schema": SCHEMA, "seed": config.seed, "draws": config.draws}
    report |= {name: held[name] for name in ("kind", "images_sha256")} | {"paired": paired}
    for name, side in zip((*NAMES, "also"), (first, second, also)):
        report[name] = [tower.facts for tower in side]
    report |= {
        "data": held["data"]["name"],
        "n": len(results.rows("validation")),
        "discovery": len(results.rows("discovery")),
        "differences": rows,
        "chance": {m.name: m.chance for m in seen[0][0].retrieval},
        "towers": towers([*first, *second, *also], config),
    }
    if single:
        report |= heads(first[0], second[0], seen[0][0], seen[1][0], config)
        report["cka"] = cka(seen[0][0], seen[1][0], config)
    return report


@dataclass(frozen=True, eq=False)
class Seen:
    """What a tower does on the validation pictures.

    Attributes:
        retrieval: R@1, both ways, among these pictures.
        streams: `[layer, 2, image, d_model]`, the residual stream after each layer: class token and
            mean of the patches. direct: `[image, layer, head]`, change of the frozen margin under
            direct mean ablation; None where not asked for.
        start: streams and maps of the run's own initial weights, where they can be rebuilt.
    """

    retrieval: list[Measure]
    streams: np.ndarray
    direct: np.ndarray | None = None
    start: tuple[np.ndarray, np.ndarray] | None = None


def see(swept: Swept, detail: bool) -> Seen:
    """Run a tower over the sweep's validation pictures; with `detail`, its start too."""
    import torch

    from interp.causal.units import Ablation, mean_activations
    from interp.hooked import HookedVisionTransformer
    from superclip.evaluation.retrieval import retrieval
    from superclip.model.factory import build_clip
    from superclip.model.weights import state_sha256

    texts, owner = swept.captions("validation")
    ablation = start = None
    if detail:
        discovery = swept.batches(swept.rows("discovery"), "means")
        ablation = Ablation("mean", "all", mean_activations(swept.tower, discovery)[0])
    if detail and (subject := swept.subject).own_init is not None:
        clip = build_clip(subject.model_config, subject.seed, subject.init_scale)
        if state_sha256(clip.state_dict()) == subject.own_init:
            tower = HookedVisionTransformer(clip.visual.to(swept.device).eval())
            start = _pass(replace(swept, tower=tower), texts, owner)[1:3]
    features, streams, _, direct = _pass(swept, texts, owner, ablation)
    pairs = torch.stack([owner, torch.arange(len(owner), device=owner.device)], 1)
    measures = [m for m in retrieval(features, texts, pairs) if m.name.endswith("R@1")]
    return Seen(measures, streams, direct, start)


def _pass(
    swept: Swept, texts: Tensor, owner: Tensor, ablation: Any = None
) -> tuple[Tensor, np.ndarray, np.ndarray, np.ndarray | None]:
    """Features, streams, maps, and direct effects under the ablation if there is one."""
    import torch

    from interp.causal.direct import caption_directions, direct_ablation
    from interp.collect import attention_maps

    tower, kind = swept.tower, swept.results.manifest["kind"]
    features, streams, maps, direct = [], [], [], []

    def keep(value: Tensor, hook: Any) -> None:
        patches = value[:, tower.cfg.prefix_tokens :].mean(1)
        streams[-1].append(torch.stack([value[:, 0], patches]).float().cpu())

    def frozen(output: Tensor) -> Tensor:
        rows = torch.arange(len(output), device=swept.device) + sum(map(len, features[:-1]))
        return caption_directions(output, texts, owner, rows)[:, 2:]

    def project(value: Tensor, hook: Any) -> None:
        features.append(torch.nn.functional.normalize(value, dim=-1))

    hooks = [((lambda name: name.endswith("hook_resid_post")), keep), ("hook_proj", project)]
    for images in swept.batches(swept.rows("validation"), "validation"):
        streams.append([])
        with torch.no_grad(), tower.hooks(fwd_hooks=hooks):
            maps.append(attention_maps(tower, images, kind)[0])
        if ablation is not None:
            direct.append(direct_ablation(tower, images, frozen, ablation)[..., 0].cpu())
    every = torch.cat([torch.stack(layers) for layers in streams], dim=2).numpy()
    whole = torch.cat(direct).numpy() if direct else None
    return torch.cat(features), every, np.concatenate(maps), whole


def _measured(side: Side, seen: Seen) -> list[Result]:
    """Of one model, what compares without matching heads."""
    from superclip.evaluation.measures import Mean, Measure, Result

    n, data = len(side.judges), {"name": side.results.manifest["data"]["name"]}
    columns = [Measure(k, Mean(v, np.arange(n), n), 0.0) for k, v in side.columns.items()]
    return [Result("excess", {**data}, columns), Result("retrieval", {**data}, seen.retrieval)]


def bands(
    values: np.ndarray, stratum: np.ndarray, config: CompareConfig, least: float = -np.inf
) -> Rows:
    """Means of the columns with their simultaneous band; with `least`, they lie from there to 1."""
    from interp.stats.intervals import simultaneous_band

    band = simultaneous_band(values, stratum, 1, config.draws, config.seed)
    most = np.inf if np.isinf(least) else 1.0
    ends = (x.clip(least, most).tolist() for x in (band.estimate, band.low, band.high))
    return [{"estimate": e, "low": low, "high": high, "n": band.n} for e, low, high in zip(*ends)]


def towers(sides: Sequence[Tower], config: CompareConfig) -> Rows:
    """A row a tower: how many heads have a band above 0, the best one and means of layers; and
    the best untrained tower of all sweeps. One simultaneous band over all these numbers."""
    rows, cells, untrained, stratum = [], [], [], sides[0].stratum
    for side in sides:
        every = bands(side.excess.reshape(len(stratum), -1), stratum, config)
        above = sum(row["low"] > 0 for row in every)
        rows.append({"tower": side.name, "head": str(side.best), "above": above, "of": len(every)})
        cells.append(list(side.columns.values()))
        for k, facts in enumerate(side.results.manifest["untrained"]):
            untrained.append((facts["discovery_excess"], len(untrained), facts["head"], side, k))
    if untrained:
        *_, head, side, k = max(untrained)
        rows.append({"tower": f"best of {len(untrained)} untrained", "head": head})
        cells.append([side.excess_of(side.results.untrained_maps[:, [k]])[:, 0]])
    found = bands(np.stack([values for own in cells for values in own], axis=1), stratum, config)
    for row, own in zip(rows, cells):
        row["best"], *row["layers"] = (found.pop(0) for _ in own)
    return rows


def contrast(
    first: np.ndarray, second: np.ndarray, stratum: np.ndarray, config: CompareConfig
) -> Rows:
    """Paired differences of `[image, head]` values: simultaneous band, and sign flips by image with
    max-T over the heads; `verdict` is empty unless both say the same."""
    from interp.stats.multiplicity import sign_flip_test

    difference = first - second
    difference *= np.abs(difference).max(axis=0) > ROUNDING
    rows = bands(difference, stratum, config)
    test = sign_flip_test(difference, True, config.draws, config.seed)
    for k, row in enumerate(rows):
        row |= {"first": float(first[:, k].mean()), "second": float(second[:, k].mean())}
        row |= {"p": float(test.p[k]), "p_adjusted": float(test.p_adjusted[k])}
        sure = row["p_adjusted"] <= 0.05 and not row["low"] <= 0 <= row["high"]
        row["verdict"] = ("higher" if row["low"] > 0 else "lower") if sure else ""
    return rows


def by_layer(
    function: Callable[..., np.ndarray], one: np.ndarray, two: np.ndarray
) -> list[np.ndarray]:
    return [function(one[:, k], two[:, k]) for k in range(one.shape[1])]


def match(a: Side, b: Side) -> tuple[np.ndarray, dict[str, Any]]:
    """For each head of `a` the index of its own in `b`, `[layer, head]`, by discovery pictures; and
    how it was found.

    Where the initial weights are shared, a head keeps its index if that still is the best match of
    more than half of the heads; else heads are paired within layers so that the sum of the
    correlations of their maps is largest.
    """
    from interp.stats.likeness import assignment, map_correlations

    chosen = [s.results.maps[s.results.rows("discovery")] for s in (a, b)]
    agreement = np.stack(by_layer(map_correlations, *chosen))
    index = np.tile(np.arange(agreement.shape[1]), (len(agreement), 1))
    same = int((agreement.argmax(axis=2) == index).sum())
    shared = len({s.checkpoint.facts["init_sha256"] for s in (a, b)}) == 1
    by_index = shared and 2 * same > index.size
    order = index if by_index else np.stack(list(map(assignment, agreement)))
    return order, {"by_index": by_index, "shared_start": shared, "same_index": same}


def heads(a: Side, b: Side, mine: Seen, its: Seen, config: CompareConfig) -> dict[str, Any]:
    """Head by head: discovery matches, validation judges."""
    from interp.stats.likeness import correlation_values, jensen_shannon, neighbours

    order, matching = match(a, b)
    at = np.arange(len(order))[:, None], order

    def flat(function: Callable[..., np.ndarray], one: np.ndarray, two: np.ndarray) -> np.ndarray:
        return np.concatenate(by_layer(function, one, two), axis=1)

    maps = a.results.maps[a.judges], b.results.maps[b.judges][:, *at]
    other, r, jsd = neighbours(a.stratum), correlation_values, jensen_shannon
    alike = {"r": flat(r, *maps), "r_other": flat(r, maps[0], maps[1][other])}
    between = flat(jsd, maps[0], maps[0][other]) + flat(jsd, maps[1], maps[1][other])
    apart = {"jsd": flat(jsd, *maps), "jsd_other": between / 2}
    if mine.start and its.start:
        apart["moved_first"] = flat(jsd, maps[0], mine.start[1])
        apart["moved_second"] = flat(jsd, maps[1], its.start[1][:, *at])
    found: dict[str, Rows] = {}
    for family, least in ((alike, -1.0), (apart, 0.0)):
        told = bands(np.concatenate(list(family.values()), axis=1), a.stratum, config, least)
        found |= {name: told[k * order.size :] for k, name in enumerate(family)}
    removed, missing = removal(a, b)
    assert mine.direct is not None and its.direct is not None
    tested = {
        "excess": (a.excess, b.excess),
        "mass": [s.results.metrics["in_box_mass"][s.judges] for s in (a, b)],
        "direct": (mine.direct, its.direct),
    } | ({"removal": removed} if removed else {})
    for name, (one, two) in tested.items():
        pair = [values.reshape(len(values), -1).astype(np.float64) for values in (one, two[:, *at])]
        found[name] = contrast(pair[0], pair[1], a.stratum, config)
    pairs = zip(found["r"], found["r_other"])
    matching["alike"] = sum(own["low"] > chance["high"] for own, chance in pairs)
    rows = [
        {"first": str(Head(*own)), "second": str(Head(own[0], int(order[own])))}
        | {name: values[k] for name, values in found.items()}
        for k, own in enumerate(np.ndindex(order.shape))
    ]
    return {"matching": matching, "heads": rows, "no_removal": missing}


def removal(a: Side, b: Side) -> tuple[tuple[np.ndarray, ...], str | None]:
    """Change of margin under mean ablation of every head, `[image, layer, head]`, of both; or the
    side whose checkpoint must be ablated first."""
    from interp.swept import tie
    from interp.timeline import load_effects

    found = []
    for name, side in zip(NAMES, (a, b)):
        path, shape = side.folder / "ablation.json", side.results.shape
        units = [f"mean {Head(*at)}" for at in np.ndindex(shape)]
        try:
            held = json.loads(path.read_text())
            fits = ({"tokens": "all"} | tie(side.results)).items() <= held.items()
        except (OSError, ValueError, AttributeError):  # none, or none that can be read
            fits = False
        effects = load_effects(side.folder) if fits else {}
        if not {*units} <= {*effects}:
            return (), name
        found.append(np.stack([effects[unit] for unit in units], axis=1).reshape(-1, *shape))
    return tuple(found), None


def cka(mine: Seen, its: Seen, config: CompareConfig) -> dict[str, Any]:
    """Debiased linear CKA layer by layer, of the two and of each with its own start, with one
    simultaneous band; and what pictures paired at random reach."""
    from interp.stats.likeness import cka_shuffled, cka_values, u_centred

    pairs = {"first and second": (mine.streams, its.streams)}
    if mine.start and its.start:
        pairs["first and its start"] = mine.streams, mine.start[0]
        pairs["second and its start"] = its.streams, its.start[0]
    values, rows, shuffled = [], [], []
    for name, streams in pairs.items():
        for layer, token in np.ndindex(mine.streams.shape[:2]):
            one, two = (u_centred(s[layer, token]) for s in streams)
            values.append(cka_values(one, two))
            rows.append({"pair": name, "layer": f"L{layer}", "stream": ("class", "patches")[token]})
            if name == "first and second":
                shuffled.append(cka_shuffled(one, two, SHUFFLES, config.seed))
    flat = np.stack(values, axis=1)
    for row, band in zip(rows, bands(flat, np.zeros(len(flat), np.int64), config, least=-1.0)):
        row |= band
    return {"rows": rows, "shuffled_95": float(np.quantile(np.max(shuffled, axis=0), 0.95))}
