"""Two checkpoints side by side: the work behind `interp.compare`, from sweeps to plain values."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
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

SCHEMA = 1
EFFECT = 2.0
"""Points for which the power of a test is stated."""
SHUFFLES = 199
"""Random pairings behind the chance level of CKA."""
STREAMS = "class token", "patches"
Rows = list[dict[str, Any]]


@dataclass(frozen=True, eq=False)
class Side:
    """A checkpoint (its weights given up) and its sweep."""

    header: Checkpoint
    folder: Path
    results: SweepResults

    @property
    def facts(self) -> dict[str, Any]:
        return {"file": self.header.path.name} | self.results.manifest["checkpoint"]

    def influence(self) -> np.ndarray:
        return influence(self.results)


def open_sides(config: CompareConfig) -> tuple[list[Side], list[Side]]:
    """Both sides, seeds in order, before anything is measured.

    Raises:
        UserError: if a checkpoint is not swept, a side is not one recipe, the sides share a
            checkpoint, or the sweeps are not of the same pictures and the same kind of tower.
    """
    from superclip.evaluation.tasks import seeds_of_one_recipe
    from superclip.model.weights import brings_config, load_checkpoint

    found: list[list[Side]] = []
    for paths, name in zip(config.sides, ("the first side", "--against")):
        side = []
        for path in paths:
            if not brings_config(path):
                raise UserError(
                    f"{path} is no checkpoint of superclip.train; plain open_clip weights go with "
                    "--also, by the folder of their sweep"
                )
            header = load_checkpoint(path)
            header.model.to("meta")  # twelve models need not fit at once
            folder, results = open_sweep(path, config)
            if header.sha256 != results.manifest["checkpoint"]["sha256"]:
                raise UserError(
                    f"{folder} is the sweep of another checkpoint than {path}; sweep it anew: "
                    f"python -m interp.sweep --ckpt {path} --overwrite"
                )
            side.append(Side(header, folder, results))
        seeds_of_one_recipe([s.header for s in side], name)
        found.append(sorted(side, key=lambda s: s.facts["seed"]))
    shas = [{s.header.sha256 for s in side} for side in found]
    if shas[0] & shas[1]:
        raise UserError("both sides hold the same checkpoint; nothing to compare")
    first = found[0][0]
    for other in found[0][1:] + found[1]:
        refuse_unlike(first.results, other.results, str(other.folder))
    return found[0], found[1]


def open_sweep(path: Path, config: CompareConfig) -> tuple[Path, SweepResults]:
    """The sweep beside a checkpoint, or in a folder.

    Raises:
        UserError: naming the command that is missing.
    """
    from interp.results import SweepResults
    from interp.subject import default_folder

    folder = path if path.is_dir() else default_folder(path, config.kind)
    if not path.is_dir() and not (folder / "results.json").is_file():
        kind = "" if config.kind == "class" else f" --kind {config.kind}"
        raise UserError(f"{path} is not swept; run python -m interp.sweep --ckpt {path}{kind}")
    return folder, SweepResults.load(folder)


def refuse_unlike(mine: SweepResults, its: SweepResults, name: str, towers: bool = True) -> None:
    """Raises UserError with the first thing in which two sweeps differ, and both its values.

    Args:
        name: of the second. towers: whether layers and heads must be as many.
    """

    def told(results: SweepResults) -> dict[str, Any]:
        tower, data = results.manifest["tower"], results.manifest["data"]
        names = ("geometry", "image_size", "grid", *(("layers", "heads") if towers else ()))
        return (
            {"kind of attention": results.manifest["kind"]}
            | {name.replace("_", " "): tower[name] for name in names}
            | {"split": json.dumps(results.manifest["split"], sort_keys=True)}
            | {"number of pictures": len(results.image_ids)}
            | {"first picture": min({*results.image_ids} - {*both}, default=None)}
            | {"set of boxes": results.manifest["images_sha256"]}
            | {"set of data": f"{data['name']} {data['sha256']}"}
            | {"set of strata": results.stratum.tolist()}
        )

    both = {*mine.image_ids} & {*its.image_ids}
    for (what, ours), theirs in zip(told(mine).items(), told(its).values()):
        if ours != theirs:
            raise UserError(
                f"{name} has another {what} than the first sweep: {str(theirs)[:80]}, not "
                f"{str(ours)[:80]}; sweep both alike"
            )


def compare(
    sides: tuple[Sequence[Side], Sequence[Side]],
    also: Sequence[tuple[str, SweepResults]],
    config: CompareConfig,
) -> dict[str, Any]:
    """The report, as plain values; all differences are first minus second."""
    from interp.swept import open_swept
    from superclip.evaluation.tables import differences_of
    from superclip.evaluation.tasks import share_initial_weights

    first, second = sides
    single = len(first) == len(second) == 1
    paired = share_initial_weights([s.header for s in first], [s.header for s in second])
    seen: list[list[Seen]] = []
    for side in sides:
        seen.append([])
        for one in side:
            swept = open_swept(config.sweep_of(one.header.path, one.folder))
            seen[-1].append(see(swept, single))
    measured = [[grounding(a, b) for a, b in zip(*arm)] for arm in zip(sides, seen)]
    rows = differences_of(measured[0], measured[1], paired, EFFECT, config.draws)
    for row in rows:
        if row["task"] == "grounding":  # whether more of it is better is another question
            row["verdict"] = row["verdict"].replace("better", "higher").replace("worse", "lower")
    results = first[0].results
    report: dict[str, Any] = {
        "schema": SCHEMA,
        "first": [s.facts for s in first],
        "second": [s.facts for s in second],
        "paired": paired,
        "kind": results.manifest["kind"],
        "images_sha256": results.manifest["images_sha256"],
        "n": len(results.rows("validation")),
        "discovery": len(results.rows("discovery")),
        "data": results.manifest["data"]["name"],
        "draws": config.draws,
        "seed": config.seed,
        "differences": rows,
        "towers": towers([*_named(first, "first"), *_named(second, "second"), *also], config),
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
        streams: `[layer, 2, image, d_model]`, the residual stream after each layer, class token
            and mean of the patches; `direct` `[image, layer, head]`: change of the frozen margin
            under direct mean ablation. Both None where not asked for.
        before: streams and maps of the run's own initial weights, where they can be rebuilt.
    """

    retrieval: list[Measure]
    streams: np.ndarray | None = None
    direct: np.ndarray | None = None
    before: tuple[np.ndarray, np.ndarray] | None = None


def see(swept: Swept, detail: bool) -> Seen:
    """Run a tower over the sweep's validation pictures; with `detail` all of `Seen`."""
    import torch

    from interp.hooked import HookedVisionTransformer
    from superclip.evaluation.retrieval import retrieval
    from superclip.model.factory import build_clip
    from superclip.model.weights import state_sha256

    texts, owner = swept.captions("validation")
    features, streams, _ = _pass(swept)
    pairs = torch.stack([owner, torch.arange(len(owner), device=owner.device)], 1)
    measures = [m for m in retrieval(features, texts, pairs) if m.name.endswith("R@1")]
    if not detail:
        return Seen(measures)
    before, subject = None, swept.subject
    clip = build_clip(subject.model_config, subject.seed, subject.init_scale)
    if state_sha256(clip.state_dict()) == subject.own_init:
        tower = HookedVisionTransformer(clip.visual.to(swept.device).eval())
        before = _pass(replace(swept, tower=tower))[1:]
    return Seen(measures, streams, _direct(swept, texts, owner), before)


def _pass(swept: Swept) -> tuple[Tensor, np.ndarray, np.ndarray]:
    """Features, streams and maps of the validation pictures."""
    import torch

    from interp.collect import attention_maps

    tower, kind = swept.tower, swept.results.manifest["kind"]
    features, streams, maps = [], [], []

    def keep(value: Tensor, hook: Any) -> None:
        patches = value[:, tower.cfg.prefix_tokens :].mean(1)
        streams[-1].append(torch.stack([value[:, 0], patches]).float().cpu().numpy())

    with torch.no_grad():
        for images in swept.batches(swept.rows("validation"), "validation"):
            streams.append([])
            hooks = [(lambda name: name.endswith("hook_resid_post"), keep)]
            features.append(tower.run_with_hooks(images, fwd_hooks=hooks))
            maps.append(attention_maps(tower, images, kind)[0])
    unit = torch.nn.functional.normalize(torch.cat(features), dim=-1)
    return unit, np.concatenate([np.stack(s) for s in streams], axis=2), np.concatenate(maps)


def _direct(swept: Swept, texts: Tensor, owner: Tensor) -> np.ndarray:
    """As `interp.ablate` has it beside mean ablation, of every head, image by image."""
    import torch

    from interp.causal.direct import caption_directions, direct_ablation
    from interp.causal.units import Ablation, mean_activations

    discovery = swept.batches(swept.rows("discovery"), "means")
    ablation = Ablation("mean", "all", mean_activations(swept.tower, discovery)[0])
    found: list[Tensor] = []
    for images in swept.batches(swept.rows("validation"), "direct effects"):
        start = sum(map(len, found))
        chosen = torch.arange(start, start + len(images), device=swept.device)

        def frozen(features: Tensor, chosen: Tensor = chosen) -> Tensor:
            return caption_directions(features, texts, owner, chosen)[:, 2:]

        found.append(direct_ablation(swept.tower, images, frozen, ablation)[..., 0].cpu())
    return torch.cat(found).double().numpy()


def influence(results: SweepResults) -> np.ndarray:
    """What each validation picture adds to the excess of every head."""
    from interp.grounding.metrics import PairScores
    from interp.stats.intervals import influence_values

    rows = results.rows("validation")
    pairs = PairScores(results.maps[rows], results.coverage[rows], results.valid[rows])
    return influence_values(pairs, results.stratum[rows].astype(np.int64))


def grounding(side: Side, seen: Seen) -> list[Result]:
    """What a model shows as a whole: excess of the head that its own discovery chose, mean excess
    of each layer's heads, and R@1."""
    from interp.analysis import top_heads
    from superclip.evaluation.measures import Mean, Measure, Result

    values, head = side.influence(), top_heads(side.results, 1)[0]
    shown = {"best head's excess": values[:, head.layer, head.index]}
    shown |= {f"L{k} mean excess": own for k, own in enumerate(values.mean(2).T)}
    n, manifest = len(values), side.results.manifest
    of = [Measure(name, Mean(own, np.arange(n), n), 0.0) for name, own in shown.items()]
    data: dict[str, object] = {"name": manifest["data"]["name"], "pictures": n}
    data["images_sha256"] = manifest["images_sha256"]
    return [Result("grounding", data, of), Result("retrieval", data, seen.retrieval)]


def _named(side: Sequence[Side], name: str) -> list[tuple[str, SweepResults]]:
    several = len(side) > 1
    return [(f"{name}, seed {s.facts['seed']}" if several else name, s.results) for s in side]


def towers(named: Sequence[tuple[str, SweepResults]], config: CompareConfig) -> Rows:
    """A row a tower: excess of the best head of its own discovery, and means of layers; then, of
    each sweep, the best of its untrained towers. One simultaneous band over all numbers."""
    from interp.analysis import top_heads
    from interp.stats.intervals import simultaneous_band

    rows, values, untrained = [], [], []
    results = named[0][1]
    stratum = results.stratum[results.rows("validation")].astype(np.int64)
    for name, results in named:
        own, head = influence(results), top_heads(results, 1)[0]
        above = simultaneous_band(own, stratum, 2, config.draws, config.seed).low > 0
        rows.append({"tower": name, "head": str(head), "above": int(above.sum()), "of": above.size})
        values.append([own[:, head.layer, head.index], *own.mean(2).T])
        for k, facts in enumerate(results.manifest["untrained"]):
            single = replace(results, maps=results.untrained_maps[:, k, None, None])
            untrained.append((facts, influence(single)[:, 0, 0]))
    if untrained:
        facts, best = max(untrained, key=lambda found: found[0]["discovery_excess"])
        rows.append({"tower": f"best of {len(untrained)} untrained", "head": facts["head"]})
        values.append([best])
    flat = np.stack([column for own in values for column in own], 1)
    cells = bands(flat, stratum, 2, config)
    for row, own in zip(rows, values):
        row["best"], *row["layers"] = [cells.pop(0) for _ in own]
    return rows


def bands(values: np.ndarray, stratum: np.ndarray, lost: int, config: CompareConfig) -> Rows:
    """Means of the columns with their simultaneous band."""
    from interp.stats.intervals import simultaneous_band

    band = simultaneous_band(values, stratum, lost, config.draws, config.seed)
    ends = zip(band.estimate.tolist(), band.low.tolist(), band.high.tolist())
    return [{"estimate": e, "low": low, "high": high, "n": band.n} for e, low, high in ends]


def contrast(
    first: np.ndarray, second: np.ndarray, stratum: np.ndarray, lost: int, config: CompareConfig
) -> Rows:
    """Paired differences of `[image, head]` values: simultaneous band, and sign flips by image with
    max-T over the heads; `verdict` is empty unless both say the same."""
    from interp.stats.multiplicity import sign_flip_test

    rows = bands(first - second, stratum, lost, config)
    test = sign_flip_test(first - second, True, config.draws, config.seed)
    for k, row in enumerate(rows):
        row |= {"first": float(first[:, k].mean()), "second": float(second[:, k].mean())}
        row |= {"p": float(test.p[k]), "p_adjusted": float(test.p_adjusted[k])}
        sure = row["p_adjusted"] <= 0.05 and not row["low"] <= 0 <= row["high"]
        row["verdict"] = ("higher" if row["low"] > 0 else "lower") if sure else ""
    return rows


def heads(a: Side, b: Side, mine: Seen, its: Seen, config: CompareConfig) -> dict[str, Any]:
    """Head by head. Discovery matches, validation judges.

    Where the initial weights are shared, a head keeps its index if it still is the best match for
    more than half of the heads; else the pairing within each layer is that of the largest sum of
    map correlations.
    """
    from interp.stats.likeness import assignment, map_correlations, neighbours

    chooses, judges = a.results.rows("discovery"), a.results.rows("validation")
    likeness = map_correlations(a.results.maps[chooses], b.results.maps[chooses])
    layers, count, _ = likeness.shape
    index = np.tile(np.arange(count), (layers, 1))
    same = int((likeness.argmax(axis=2) == index).sum())
    starts = [s.header.facts.get("init_sha256") for s in (a, b)]
    shared = starts[0] is not None and starts[0] == starts[1]
    by_index = shared and 2 * same > index.size
    order = index if by_index else assignment(likeness)
    at = np.arange(layers)[:, None], order

    def flat(values: np.ndarray) -> np.ndarray:
        return values.reshape(len(values), -1).astype(np.float64)

    stratum = a.results.stratum[judges].astype(np.int64)
    other, everyone = neighbours(stratum), np.zeros(len(judges), np.int64)
    maps = a.results.maps[judges], b.results.maps[judges][:, *at]
    agree, chance = map_correlations(*maps), map_correlations(maps[0], maps[1][other])
    masses = (s.results.metrics["in_box_mass"][judges] for s in (a, b))
    apart = flat(_divergence(*maps))
    between = flat(sum(_divergence(m, m[other]) for m in maps) / 2)
    assert mine.direct is not None and its.direct is not None
    columns = {
        "excess": (a.influence(), b.influence(), stratum, 2),
        "mass": (*masses, stratum, 1),
        "direct": (mine.direct, its.direct, everyone, 1),
    }
    removed, note = _removal(a, b)
    if removed is not None:
        columns["removal"] = (*removed, everyone, 1)
    found = {
        name: contrast(flat(one), flat(two[:, *at]), label, lost, config)
        for name, (one, two, label, lost) in columns.items()
    }
    found["divergence"] = bands(apart, stratum, 1, config)
    found["divergence_less_other_picture"] = contrast(apart, between, stratum, 1, config)
    rows = []
    for k, (layer, head) in enumerate(np.ndindex(layers, count)):
        row: dict[str, Any] = {
            "first": str(Head(layer, head)),
            "second": str(Head(layer, int(order[layer, head]))),
            "best_match": str(Head(layer, int(likeness[layer, head].argmax()))),
            "correlation": float(agree[layer, head, head]),
            "correlation_other_picture": float(chance[layer, head, head]),
        }
        rows.append(row | {name: values[k] for name, values in found.items()})
    for name, own, seen in (("first", maps[0], mine), ("second", maps[1], its)):
        if seen.before is not None:
            start = seen.before[1] if name == "first" else seen.before[1][:, *at]
            for row, moved in zip(rows, flat(_divergence(own, start)).mean(0)):
                row.setdefault("moved", {})[name] = float(moved)
    matching = {"by_index": by_index, "shared_initial_weights": shared, "same_index_best": same}
    matching |= {"of": index.size, "by_chance": layers, "on": len(chooses)}
    return {"matching": matching, "heads": rows, "removal_missing": note}


def _divergence(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Layer by layer: in float64 the maps of a large tower fill the memory."""
    from interp.stats.likeness import jensen_shannon

    layers = zip(first.swapaxes(0, 1), second.swapaxes(0, 1))
    return np.stack([jensen_shannon(one, two) for one, two in layers], axis=1)


def _removal(a: Side, b: Side) -> tuple[list[np.ndarray] | None, str | None]:
    """Change of margin under mean ablation of every head, `[image, layer, head]`, of both; or what
    must be run first."""
    from interp.swept import tie
    from interp.timeline import load_effects

    found = []
    for side in (a, b):
        path, (layers, heads) = side.folder / "ablation.json", side.results.shape
        names = [f"mean {Head(*at)}" for at in np.ndindex(layers, heads)]
        held = json.loads(path.read_text()) if path.is_file() else {}
        wanted = tie(side.results) | {"tokens": "all"}
        effects = load_effects(side.folder) if held else {}
        if any(held.get(k) != v for k, v in wanted.items()) or not {*names} <= {*effects}:
            again = " --overwrite" if held else ""
            return None, f"python -m interp.ablate --ckpt {side.header.path}{again}"
        found.append(np.stack([effects[n] for n in names], 1).reshape(-1, layers, heads))
    return found, None


def cka(mine: Seen, its: Seen, config: CompareConfig) -> dict[str, Any]:
    """Debiased linear CKA of the streams layer by layer, and with each one's own start."""
    from interp.stats.intervals import LEVEL
    from interp.stats.likeness import cka_shuffled, cka_values, u_centred

    assert mine.streams is not None and its.streams is not None
    starts = {"first and its start": (mine, mine.before), "second and its start": (its, its.before)}
    pairs = {"first and second": (mine.streams, its.streams)}
    pairs |= {k: (s.streams, b[0]) for k, (s, b) in starts.items() if b is not None}
    values, places, shuffled = [], [], []
    for name, streams in pairs.items():
        for layer, token in np.ndindex(mine.streams.shape[:2]):
            grams = [u_centred(s[layer, token]) for s in streams]
            values.append(cka_values(grams[0], grams[1]))
            places.append((name, layer, STREAMS[token]))
            if name == "first and second":
                shuffled.append(cka_shuffled(grams[0], grams[1], SHUFFLES, config.seed))
    flat = np.stack(values, 1)
    rows = bands(flat, np.zeros(len(flat), np.int64), 1, config)
    for row, (name, layer, token) in zip(rows, places):
        row |= {"pair": name, "layer": f"L{layer}", "stream": token, "high": min(row["high"], 1.0)}
    chance = float(np.quantile(np.max(shuffled, axis=0), LEVEL))
    return {"rows": rows, "shuffled_95": chance, "shuffles": SHUFFLES}
