"""What the model loses without its parts: the work behind `interp.ablate`, from a sweep to plain
values."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from interp.config import AblateConfig
from interp.heads import Head
from superclip.errors import UserError, nearest
from superclip.progress import progress

if TYPE_CHECKING:
    from torch import Tensor

    from interp.causal.attribution import Attribution
    from interp.causal.bank import AblationBank
    from interp.causal.effects import Effects, Questions
    from interp.causal.findings import Judge
    from interp.causal.units import Ablation, Unit
    from interp.hooked import TowerConfig
    from interp.results import SweepResults
    from interp.swept import Swept

SCHEMA = 2
GROUP = 4
"""Heads removed together in the set comparison."""
SAMPLE = 64
"""Validation pictures that attribution is set against the exact effects on."""
ALL: dict[str, Literal["head", "mlp", "attention", "layer"]] = {
    "heads": "head",
    "mlps": "mlp",
    "attentions": "attention",
    "layers": "layer",
}
WORDS, FEW = 3, 10
"""Categories told of a head; pictures with and without one that are needed to tell."""
MAP_DRAWS = 1000
"""Bootstrap draws of a mean average precision, at most: each ranks all pictures anew."""
Roles = dict[str, str]


def ablate_units(
    swept: Swept, config: AblateConfig
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Effects of removing each unit by each kind, with what direct effects and attribution say;
    and the change of margin of every image, by `KIND UNIT`.

    Raises:
        UserError: if a unit does not exist, or the pictures are too few for the draws.
    """
    from interp.analysis import top_heads
    from interp.causal.findings import Judge, champion_said, intact, judged

    if config.downstream and swept.results.manifest["kind"] != "class":
        raise UserError("--downstream reads the class token's attention; it goes with its sweep")
    units, roles = choose_units(config, swept)
    answers, judge = questions(swept), Judge(config.draws, config.seed)
    rows, base, said, changes = [], {}, {}, {}
    sets = _random_sets(swept.results, config)
    champion = str(top_heads(swept.results, 1)[0])
    for kind in config.kinds:
        ablation = _ablation(swept, kind, units, config)
        removed = units + (sets if kind == "mean" else [])
        bank = fill_bank(swept, ablation, removed, answers.head is not None, config)
        found = _effects(bank, answers, config)
        rows += judged(_without(found, len(units)), units, roles, kind, judge)
        base = intact(found, judge)
        margins = found.change("margin").astype(np.float32)
        changes |= {f"{kind} {unit.name}": own for unit, own in zip(units, margins)}
        if kind == "mean" and sets:
            said["sets"] = _sets(found, len(units), sets, judge)
        if kind != "resample":
            said[kind] = _estimates(swept, ablation, units, found, answers, judge)
    own = np.bincount(answers.owner.cpu().numpy())
    report = swept.tie | {
        "schema": SCHEMA,
        "chance": {"i2t@1": float(own.mean() / own.sum()), "t2i@1": 1 / len(own)},
        "asked": asked(config),
        "n": len(swept.rows("validation")),
        "tokens": config.tokens,
        "draws": config.draws,
        "map_draws": min(config.draws, MAP_DRAWS),
        "resamples": config.resamples_drawn if "resample" in config.kinds else None,
        "intact": base,
        "units": rows,
        "champion": champion,
        "sentences": champion_said(rows, champion),
        "sets": said.pop("sets", None),
        "estimates": said,
    }
    report["words"] = _words(swept, answers, judge)
    if config.downstream:
        report["downstream"] = _downstream(swept, units, config, judge)
    return report, changes


def asked(config: AblateConfig) -> dict[str, Any]:
    """The options that decide the numbers."""
    names = ("units", "tokens", "seed", "draws", "downstream")
    return {name: getattr(config, name) for name in names} | {
        "kinds": sorted(config.kinds),
        "resamples": config.resamples_drawn,
        "sets": config.sets_drawn,
    }


def choose_units(config: AblateConfig, swept: Swept) -> tuple[list[Unit], Roles]:
    """Units named by `--units`, and why a head is there; the first reason counts.

    Raises:
        UserError: if a part can't be read or names a head that the tower does not have.
    """
    from interp.analysis import top_heads
    from interp.causal.units import every, group

    results, cfg = swept.results, swept.tower.cfg
    heads = [unit.heads[0] for unit in every(cfg, "head")]
    found: dict[str, Unit] = {}
    roles: Roles = {}
    wanted_random = 0

    def add(head: Head, role: str) -> None:
        if head not in heads:
            raise _no_head(head, cfg)
        found.setdefault(str(head), group([head]))
        roles.setdefault(str(head), role)

    for part in (p.strip() for p in config.units.split(",")):
        name, _, count = part.partition(":")
        if name in ("random", "top", "attributed"):
            if not count.isdecimal() or not 1 <= int(count) <= len(heads):
                raise UserError(f"--units {part}: write {name}:K with K from 1 to {len(heads)}")
            if name == "random":
                wanted_random += int(count)
            elif name == "top":
                for head in top_heads(results, int(count)):
                    add(head, "top")
            else:
                for head in _attributed(swept, config)[: int(count)]:
                    add(head, "attributed")
        elif part == "champion":
            add(top_heads(results, 1)[0], "champion")
        elif part in ALL:
            for unit in every(cfg, ALL[part]):
                found.setdefault(unit.name, unit)
        elif "+" in part:
            several = [_head(one, part) for one in part.split("+")]
            if len(set(several)) < len(several):
                raise UserError(f"--units {part} names a head twice; name each once")
            if absent := [head for head in several if head not in heads]:
                raise _no_head(absent[0], cfg)
            together = group(several)
            found.setdefault(together.name, together)
        elif re.match("[lL][0-9]", part):
            add(_head(part, part), "listed")
        else:
            ways = [*ALL, "champion", "L11H5", "L3H1+L2H0", "top:K", "random:K", "attributed:K"]
            raise UserError(f"--units {part!r} is no unit; {nearest(part, ways)}")
    rest = [head for head in heads if str(head) not in found]
    if wanted_random > len(rest):
        raise UserError(
            f"--units random: {wanted_random} other heads are asked for, {len(rest)} are not named "
            "already"
        )
    rng = np.random.Generator(np.random.Philox(key=[config.seed, 0xAB1]))
    for k in rng.permutation(len(rest))[:wanted_random]:
        add(rest[int(k)], "random")
    roles[str(top_heads(results, 1)[0])] = "champion"
    return list(found.values()), roles


def _head(text: str, part: str) -> Head:
    try:
        return Head.parse(text)
    except UserError as error:
        raise UserError(f"--units {part}: {error}") from None


def _no_head(head: Head, cfg: TowerConfig) -> UserError:
    return UserError(
        f"--units {head}: the tower has {cfg.n_layers} layers of {cfg.n_heads} heads, from L0H0 on"
    )


def questions(swept: Swept) -> Questions:
    """What the embeddings of the validation pictures are asked.

    The token head is asked for the tokens that a caption of a discovery picture holds, without the
    special ones.
    """
    import torch

    from interp.causal.effects import Questions

    texts, owner = swept.captions("validation")
    names, present = swept.results.manifest["categories"], swept.present("validation")
    found = Questions(texts, owner, swept.class_vectors(names), present)
    head = swept.model.token_head
    if head is None:
        return found
    known, held = (_token_ids(swept, split) for split in ("discovery", "validation"))
    ids = sorted(set().union(*known))
    seen: Tensor | None = head.vocab_ids  # pyright: ignore[reportAssignmentType]
    every = range(head.vocabulary) if seen is None else seen.tolist()
    column = {token: k for k, token in enumerate(every)}
    ids = [token for token in ids if token in column]
    columns = torch.tensor([column[token] for token in ids], device=swept.device)
    shows = torch.tensor([[token in own for token in ids] for own in held], device=swept.device)
    return replace(found, head=head, columns=columns, held=shows)


def _token_ids(swept: Swept, split: str) -> list[set[int]]:
    """Of each picture's captions, without special ones."""
    from superclip.model.factory import special_ids, tokenizer

    special = set(special_ids(tokenizer(swept.subject.model_config)))
    tokenize = swept.encoder.tokenize
    return [
        {int(t) for c in record.captions for t in tokenize(c)} - special
        for record in swept.records(split)
    ]


def _ablation(swept: Swept, kind: str, units: Sequence[Unit], config: AblateConfig) -> Ablation:
    from interp.causal.units import Ablation, mean_activations

    if kind != "mean":
        return Ablation(kind, config.tokens)
    batches = swept.batches(swept.rows("discovery"), "means")
    mean_z, mean_mlp = mean_activations(swept.tower, batches)
    return Ablation(kind, config.tokens, mean_z, mean_mlp)


def fill_bank(
    swept: Swept, ablation: Ablation, units: Sequence[Unit], patches: bool, config: AblateConfig
) -> AblationBank:
    """Embeddings of the validation pictures without each unit, computed where they are missing."""
    from interp.causal.bank import AblationBank, BankKey
    from interp.causal.units import derangements

    ids, kind = swept.ids("validation"), ablation.kind
    several = kind == "resample"
    head = swept.model.token_head
    key = BankKey(
        swept.subject.facts["sha256"],
        ids,
        ablation,
        units,
        swept.ids("discovery") if kind == "mean" else None,
        derangements(len(ids), config.resamples_drawn, config.seed) if several else None,
        patches and head is not None and head.source == "patches",
    )
    # A bank of other units or tokens may have taken hours: each has a folder of its own.
    tag = hashlib.sha256(json.dumps(key.facts, sort_keys=True).encode()).hexdigest()[:8]
    folder = swept.folder / f"bank-{kind}-{tag}"
    bank = AblationBank.open(folder, key, chunk=config.batch_size, overwrite=config.overwrite)
    rows, left = swept.rows("validation"), len(bank.missing)

    def pictures(chunks: Sequence[Sequence[int]]):
        named = [[rows[k] for k in chunk] for chunk in chunks]
        return swept.pictures(named)

    with progress(desc=f"{kind} ablation of {len(units)}", total=left, unit="batch") as bar:
        bank.compute(swept.tower, pictures, int(config.max_memory * 2**30), bar.update)
    return bank


def _effects(bank: AblationBank, asked: Questions, config: AblateConfig) -> Effects:
    from interp.causal.effects import effects

    return effects(bank, asked, min(config.draws, MAP_DRAWS), config.seed)


def _without(found: Effects, count: int) -> Effects:
    """The first units alone: the random sets are no units of the table."""
    return replace(
        found,
        units=found.units[:count],
        ablated={name: values[:count] for name, values in found.ablated.items()},
        removed=found.removed[:count],
        mean_ap=None if found.mean_ap is None else (found.mean_ap[0], found.mean_ap[1][:count]),
    )


def _random_sets(results: SweepResults, config: AblateConfig) -> list[Unit]:
    """The best heads of discovery together, and as many sets of as many of the others."""
    from interp.analysis import top_heads
    from interp.causal.units import group

    layers, heads = results.shape
    top = top_heads(results, GROUP)
    rest = [h for h in (Head(*divmod(k, heads)) for k in range(layers * heads)) if h not in top]
    if config.sets_drawn == 0 or len(rest) < GROUP:
        return []
    rng = np.random.Generator(np.random.Philox(key=[config.seed, 0xAB2]))
    drawn = [
        [rest[int(k)] for k in rng.permutation(len(rest))[:GROUP]] for _ in range(config.sets_drawn)
    ]
    return [group(top, "top set"), *(group(own, f"set {k}") for k, own in enumerate(drawn))]


def _sets(found: Effects, start: int, sets: Sequence[Unit], judge: Judge) -> dict[str, Any]:
    """The best heads together against random sets of as many, by R@1 and by the margin."""
    said: dict[str, Any] = {"size": GROUP, "top": [str(head) for head in sets[0].heads]}
    for name in ("margin", "i2t@1"):
        changes = found.change(name)[start:]
        means = changes.mean(axis=1)
        said[name] = {
            "top": judge.interval(changes[0]),
            "random": means[1:].tolist(),
            "rank": int((means <= means[0]).sum()),
            "of": len(means),
        }
    return said


def _estimates(
    swept: Swept,
    ablation: Ablation,
    units: Sequence[Unit],
    found: Effects,
    asked: Questions,
    judge: Judge,
) -> dict[str, Any]:
    """Direct effects of the heads that were removed, on the frozen margin, which is linear; and how
    attribution agrees with the exact effects on the margin."""
    import torch

    from interp.causal.direct import caption_directions, direct_ablation
    from interp.causal.findings import direct_rows

    singles = [k for k, unit in enumerate(units) if len(unit.heads) == 1 and not unit.mlps]
    heads = [units[k].heads[0] for k in singles]
    if not heads:
        return {}
    heads_only = replace(ablation, mean_mlp=None)
    rows, direct, start = swept.rows("validation"), [], 0
    for images in swept.batches(rows, "direct effects"):
        chosen = torch.arange(start, start + len(images), device=swept.device)

        def frozen(features: Tensor, chosen: Tensor = chosen) -> Tensor:
            return caption_directions(features, asked.texts, asked.owner, chosen)[:, 2:]

        direct.append(direct_ablation(swept.tower, images, frozen, heads_only)[..., 0].cpu())
        start += len(images)
    total = found.change("frozen")[singles].T
    shown = direct_rows(np.concatenate(direct).astype(np.float64), total, heads, judge)
    exact = found.change("margin")[singles].T
    return {"heads": shown, "attribution": _agreement(swept, heads_only, heads, exact, asked)}


def _agreement(
    swept: Swept, ablation: Ablation, heads: Sequence[Head], total: np.ndarray, asked: Questions
) -> dict[str, Any]:
    """Attribution, plain and integrated, against the exact effects on a sample of pictures: of all
    heads layer by layer, else of those that were removed, as if of one layer."""
    from interp.causal.attribution import agreement

    layers, per_layer = swept.results.shape
    shape = (layers, per_layer) if len(heads) == layers * per_layer else (1, len(heads))
    order = sorted(range(len(heads)), key=heads.__getitem__)
    exact = total[:SAMPLE, order].reshape(-1, *shape)
    rows, found = swept.rows("validation")[:SAMPLE], {}
    for name, estimate in attributions(swept, ablation, rows, asked).items():
        own = np.stack([estimate[:, h.layer, h.index] for h in sorted(heads)], axis=1)
        found[name] = asdict(agreement(own.reshape(-1, *shape), exact))
    return found


def attributions(
    swept: Swept, ablation: Ablation, rows: Sequence[int], asked: Questions
) -> dict[str, np.ndarray]:
    """Estimated effects on the margin, `[image, layer, head]`, by `plain` and `integrated`
    attribution; `rows` are the first of the split that the questions are about."""
    import torch

    from interp.causal.attribution import attribution, integrated_attribution

    texts = torch.nn.functional.normalize(asked.texts, dim=-1)
    found: dict[str, list[np.ndarray]] = {"plain": [], "integrated": []}
    start = 0
    for images in swept.batches(rows, "attribution"):
        chosen = torch.arange(start, start + len(images), device=swept.device)
        own = asked.owner == chosen[:, None]

        def margin(features: Tensor, own: Tensor = own) -> Tensor:
            cosines = torch.nn.functional.normalize(features, dim=-1) @ texts.T
            wrong = cosines.masked_fill(own, -torch.inf).amax(1)
            return (cosines * own).sum(1) / own.sum(1) - wrong

        estimates: tuple[Attribution, Attribution] = (
            attribution(swept.tower, images, margin, ablation),
            integrated_attribution(swept.tower, images, margin, ablation),
        )
        for name, estimate in zip(found, estimates):
            found[name].append(estimate.heads.detach().double().cpu().numpy())
        start += len(images)
    return {name: np.concatenate(parts) for name, parts in found.items()}


def _words(swept: Swept, asked: Questions, judge: Judge) -> dict[str, list[dict[str, Any]]]:
    """What each head writes: by head the `WORDS` categories towards whose texts its direct effect
    is the most larger in pictures that show them than in others. Discovery chooses them,
    validation gives `difference` of cosine, with an interval of that row alone."""
    import torch

    from interp.causal.direct import direct_effects
    from interp.stats.intervals import interval_of

    names, classes = swept.results.manifest["categories"], asked.classes
    found, shown = {}, {split: swept.present(split) for split in ("discovery", "validation")}
    told = [
        k
        for k in range(len(names))
        if all(FEW <= s[:, k].sum() <= len(s) - FEW for s in shown.values())
    ]
    if classes is None or not told:
        return {}
    for split in shown:
        batches = swept.batches(swept.rows(split), f"words, {split}")
        with torch.no_grad():
            parts = [direct_effects(swept.tower, x, classes[told]).heads.cpu() for x in batches]
        found[split] = torch.cat(parts).double().numpy()  # image, layer, head, class
    with_it = {split: of[:, told].astype(float) for split, of in shown.items()}

    def gap(effects: np.ndarray, held: np.ndarray) -> np.ndarray:
        sums, rest = np.einsum("ilhc,ic->lhc", effects, held), held.sum(0)
        return sums / rest - (effects.sum(0) - sums) / (len(held) - rest)

    order = np.argsort(-gap(found["discovery"], with_it["discovery"]), axis=-1, kind="stable")
    words: dict[str, list[dict[str, Any]]] = {}
    for layer, head in np.ndindex(order.shape[:2]):
        rows = []
        for k in order[layer, head, :WORDS]:
            x, s = found["validation"][:, layer, head, k], with_it["validation"][:, k]
            columns = np.stack([x * s, s, x * (1 - s), 1 - s], axis=1)
            difference = interval_of(
                lambda m: m[..., 0] / m[..., 1] - m[..., 2] / m[..., 3],
                columns,
                s.astype(np.int64),  # drawn within those with and those without: neither runs out
                min(judge.draws, MAP_DRAWS),
                judge.seed,
            )
            rows.append({"word": names[told[k]], "difference": asdict(difference)})
        words[str(Head(layer, head))] = rows
    return words


def _attributed(swept: Swept, config: AblateConfig) -> list[Head]:
    """All heads, the largest integrated attribution under zero ablation on discovery first."""
    from interp.causal.effects import Questions
    from interp.causal.units import Ablation

    asked = Questions(*swept.captions("discovery"))
    rows = swept.rows("discovery")[:SAMPLE]
    found = attributions(swept, Ablation("zero", config.tokens), rows, asked)["integrated"]
    order = np.argsort(-np.abs(found.mean(axis=0)), axis=None, kind="stable")
    return [Head(*divmod(int(k), found.shape[2])) for k in order]


def _downstream(
    swept: Swept, units: Sequence[Unit], config: AblateConfig, judge: Judge
) -> list[dict[str, Any]]:
    """Change of later heads' in-box mass under zero ablation of each unit; the 20 surest by
    two-sided sign flips with max-T over all pairs."""
    from interp.causal.sweep import Rows, ablate_batch
    from interp.causal.units import Ablation
    from interp.collect import attention_maps
    from interp.grounding.metrics import in_box_mass
    from interp.stats.multiplicity import sign_flip_test

    results, cfg = swept.results, swept.tower.cfg
    chosen, at = results.rows("validation"), 0
    coverage, valid = results.coverage[chosen], results.valid[chosen]
    change = np.zeros((len(chosen), len(units), cfg.n_layers, cfg.n_heads))
    for images in swept.batches(swept.rows("validation"), "downstream"):
        own = slice(at, at + len(images))
        maps, _, _ = attention_maps(swept.tower, images, "class")
        before = in_box_mass(maps, coverage[own], valid[own])

        def watch(seen: Rows, at: int = at, before: np.ndarray = before) -> None:
            mine = range(len(before))[seen.images]
            rows = [at + k for k in mine]
            for unit, attention in zip(seen.units, seen.rows[..., cfg.prefix_tokens :]):
                after = in_box_mass(attention.cpu().numpy(), coverage[rows], valid[rows])
                change[rows, unit, seen.layer] = after - before[list(mine), seen.layer]

        memory = int(config.max_memory * 2**30)
        ablate_batch(swept.tower, images, Ablation("zero", config.tokens), units, (), memory, watch)
        at += len(images)
    later = np.zeros(change.shape[1:], bool)
    for k, unit in enumerate(units):
        later[k, unit.layers[0] + 1 :] = True
    pairs = np.argwhere(later)
    if not len(pairs):
        return []
    values = change[:, later]
    test = sign_flip_test(values, two_sided=True, draws=judge.draws, seed=judge.seed)
    order = np.argsort(-np.abs(test.t), kind="stable")[:20]
    return [
        {
            "removed": units[pairs[k][0]].name,
            "head": str(Head(*(int(i) for i in pairs[k][1:]))),
            "in_box_mass": judge.interval(values[:, k]),
            "p_adjusted": float(test.p_adjusted[k]),
            "pairs": len(pairs),
            "kind": "zero",
        }
        for k in order
    ]
