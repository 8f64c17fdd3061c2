"""`python -m interp.lens`: from which layer on a word can be read off the stream, and where."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from interp.config import LensConfig
from interp.lenses import FORMS
from superclip.errors import UserError, nearest, run_command

if TYPE_CHECKING:
    from interp.lenses.logit import Forms, Lens, Source
    from interp.stats.intervals import Band
    from interp.swept import Swept

SCHEMA = 2
FEWEST = 5
"""Pictures with a word, and without it, that a judgement needs."""
MOST = 12
"""Categories looked at unless told: those that most pictures' captions hold."""
IN_FULL = 4
"""Words whose every layer is printed; of more, the figure and lens.json tell."""
SIDES = ("estimate", "low", "high")
Arrays = dict[str, np.ndarray]

DESCRIPTION = """Read the residual stream before the first layer and after each as if it were the
last: through SuperCLIP's token head or, for models without one, against texts. For each word: the
AUC that tells validation pictures whose captions hold it from the others, layer by layer; from
which layer on it stays above chance; its rank; and how well the word's patches find the boxes of
its category. Raw, mean-corrected and tuned lens, with R^2. Writes lens.json and lens.png beside
the sweep's results."""


def main(argv: list[str]) -> None:
    """Parse, read, print, write."""
    from superclip.flags import parse

    config = parse(LensConfig, argv, "python -m interp.lens", DESCRIPTION)
    report, path = lens_one(config)
    print(render(report))
    print(f"\nwritten: {path}, lens.png")


def lens_one(config: LensConfig) -> tuple[dict[str, Any], Path]:
    """Read, draw and write one checkpoint's report."""
    from interp.render.canvas import png
    from interp.render.lens import lens_figure
    from interp.swept import asked, claim, open_swept, write_report

    path, picture = claim(config, "lens.json"), claim(config, "lens.png")
    report = read_layers(open_swept(config), config) | {"asked": asked(config)}
    write_report(path, report)
    picture.write_bytes(png(lens_figure(report)))
    return report, path


def plain(text: str) -> str:
    """Words alone, in small letters, with one space between.

    >>> plain("A Traffic-light, red")
    'a traffic light red'
    """
    return " ".join(re.findall(r"\w+", text.casefold()))


def choose_words(spec: str | None, told: Sequence[str], categories: Sequence[str]) -> list[str]:
    """Words asked for, else the sweep's categories that captions hold, most frequent first.

    Args:
        told: captions of each picture, plain and between spaces.

    Raises:
        UserError: if none is named, or one is in no caption of the sweep.
    """
    names = list(dict.fromkeys(filter(None, map(plain, (spec or "").split(",")))))
    if spec is not None and not names:
        raise UserError(f"--concepts {spec!r} names no word; write them like table,woman")
    count = {name: sum(f" {name} " in text for text in told) for name in names or categories}
    if spec is None:
        spoken = sorted(filter(count.get, categories), key=lambda name: -count[name])[:MOST]
        if not spoken:
            raise UserError(
                "no caption holds the name of an annotated category; name words with --concepts"
            )
        return spoken
    for name in names:
        if not count[name]:
            known = {word for text in told for word in text.split()}
            raise UserError(f"--concepts {name}: it is in no caption; {nearest(name, known)}")
    return names


def read_layers(swept: Swept, config: LensConfig) -> dict[str, Any]:
    """The report, as plain values.

    Raises:
        UserError: if a word can't be read by the lens, or none can be judged.
    """
    import torch

    from interp.lenses.logit import fit, read

    splits = ("discovery", "validation")
    spoken = {split: [record.captions for record in swept.records(split)] for split in splits}
    told = {s: ["".join(f" {plain(t)} " for t in own) for own in spoken[s]] for s in splits}
    categories = list(map(plain, swept.results.manifest["categories"]))
    names = choose_words(config.concepts, told["discovery"] + told["validation"], categories)
    holds = {n: np.array([f" {n} " in text for text in told["validation"]]) for n in names}
    sides = {n: {"with": int(h.sum()), "without": int((~h).sum())} for n, h in holds.items()}
    left_out = {name: of for name, of in sides.items() if min(of.values()) < FEWEST}
    holds = {name: held for name, held in holds.items() if name not in left_out}
    if not holds:
        raise UserError(
            f"no word can be judged. {_too_few(left_out)}; name others with --concepts, or sweep "
            "more pictures"
        )
    lens, source, facts = open_lens(swept, config.lens, list(holds), spoken["discovery"])
    batches = swept.batches(swept.rows("discovery"), "discovery")
    forms = fit(lens, torch.cat([read(swept.tower, images, source)[0] for images in batches]))
    boxes = _boxes(swept, categories, list(holds))
    found = _validate(swept, forms, source, boxes)
    facts |= {
        "model": swept.results.manifest["checkpoint"]["model"],
        "layers": ["embed", *(f"L{layer}" for layer in range(swept.tower.cfg.n_layers))],
        "discovery": len(spoken["discovery"]),
        "n": len(spoken["validation"]),
        "rank_chance": (facts["candidates"] + 1) / 2,
        "left_out": left_out,
    }
    measured = _statistics(found, boxes, holds, facts, (config.draws, config.seed))
    return {"schema": SCHEMA, "forms": list(FORMS), **swept.tie, **facts, **measured}


def open_lens(
    swept: Swept, wanted: str, names: Sequence[str], spoken: Sequence[Sequence[str]]
) -> tuple[Lens, Source, dict[str, Any]]:
    """The lens of these words, what it reads, and facts for the report.

    Args:
        wanted: `auto`, `tokens` or `texts`.
        spoken: captions of the discovery pictures; tokens that none of them holds are masked.

    Raises:
        UserError: if there is no token head, or it has no column for a piece of a word.
    """
    import torch
    import torch.nn.functional as F

    from interp.lenses.logit import Lens
    from superclip.model.factory import special_ids, tokenizer

    head, encoder = swept.model.token_head, swept.encoder
    if wanted == "tokens" and head is None:
        raise UserError("--lens tokens: this checkpoint has no token head; use --lens texts")
    if head is None or wanted == "texts":
        among = list(dict.fromkeys([*names, *map(plain, swept.results.manifest["categories"])]))
        texts = swept.class_vectors(among)
        prompts = swept.prompts(among)
        facts: dict[str, Any] = {"lens": "texts", "reads": "pooled", "prompts": prompts}
        facts["candidates"] = len(among)
        places = tuple((k,) for k in range(len(names)))
        facts["pieces"] = {name: [name] for name in names}
        return Lens(partial(F.normalize, dim=-1), texts, None, places, False), "pooled", facts
    bpe = tokenizer(swept.subject.model_config)
    special = set(special_ids(bpe))
    known = head.vocab_ids
    ids = known.tolist() if isinstance(known, torch.Tensor) else range(head.vocabulary)
    column = {token: k for k, token in enumerate(ids)}
    own = [[i for i in encoder.tokenize(name).tolist() if i not in special] for name in names]
    decode = getattr(bpe, "decode", None) or bpe.tokenizer.decode
    for name, pieces in zip(names, own):
        if unknown := [decode([i]).strip() for i in pieces if i not in column]:
            raise UserError(
                f"--concepts {name}: the token head has no column for its piece {unknown[0]!r}; "
                "name another word, or use --lens texts"
            )
    said = {i for texts in spoken for text in texts for i in encoder.tokenize(text).tolist()}
    said = (said | {i for pieces in own for i in pieces}) - special
    place = {token: k for k, token in enumerate(token for token in ids if token in said)}
    columns = torch.tensor([column[token] for token in place], device=swept.device)
    masked = len(special & column.keys())
    facts = {
        "lens": "tokens",
        "reads": head.source,
        "candidates": len(place),
        "masked": {"special": masked, "unsaid": len(column) - masked - len(place)},
        "pieces": {n: [decode([i]).strip() for i in pieces] for n, pieces in zip(names, own)},
    }
    weight, bias = (p.detach()[columns] for p in (head.linear.weight, head.linear.bias))
    places = tuple(tuple(place[i] for i in pieces) for pieces in own)
    return Lens(head.norm, weight, bias, places, True), head.source, facts


def _boxes(swept: Swept, categories: Sequence[str], names: Sequence[str]) -> Arrays:
    """Rows (validation picture, word that is a category), both counted from 0: coverage by its
    boxes and by those of the other categories, and what is not ignored."""
    results, judged = swept.results, swept.results.rows("validation")
    place = np.full(len(results.split), -1)
    place[judged] = np.arange(len(judged))
    image, kind = place[results.category_image], results.category_id
    word = np.array([names.index(c) if c in names else -1 for c in categories])[kind]
    rows = np.flatnonzero((image >= 0) & (word >= 0))
    cover, valid = results.category_coverage.astype(np.float64), results.valid[judged]
    other = [cover[(image == image[k]) & (kind != kind[k])].max(0, initial=0) for k in rows]
    own = {"own": cover[rows], "others": np.reshape(other, cover[rows].shape)}
    return {"image": image[rows], "word": word[rows], "valid": valid[image[rows]] + 0.0, **own}


def _validate(swept: Swept, forms: Forms, source: Source, boxes: Arrays) -> Arrays:
    """Scores, ranks and errors of the validation pictures, and maps of the words with boxes, in
    one forward pass of each picture."""
    import torch

    from interp.lenses.logit import read, word_ranks

    image, word, parts, start, total = boxes["image"], boxes["word"], [], 0, np.zeros(())
    with torch.no_grad():
        for images in swept.batches(swept.rows("validation"), "validation"):
            pictures, patches = read(swept.tower, images, source)
            maps = forms.scores(patches).double().cpu().numpy()
            found = {
                "scores": forms.scores(pictures),
                "ranks": forms.scores(pictures, word_ranks),
                "errors": forms.errors(pictures),
                "total": (pictures[:, -1] - forms.mean[-1]).square().sum(dim=-1),
            }
            here = np.flatnonzero((image >= start) & (image < start + len(images)))
            own = maps[image[here] - start, ..., word[here]]
            parts.append({k: v.double().cpu().numpy() for k, v in found.items()} | {"maps": own})
            start, total = start + len(images), total + maps.sum(axis=0)
    judged = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return judged | {"prior": (np.moveaxis(total, -1, 0)[word] - judged["maps"]) / (start - 1)}


def _statistics(
    found: Arrays, boxes: Arrays, holds: Arrays, facts: dict[str, Any], chance: tuple[int, int]
) -> dict[str, Any]:
    """Every curve with its band, every onset with its interval."""
    from interp.lenses import emergence
    from interp.stats.intervals import simultaneous_band

    def alike(values: np.ndarray) -> np.ndarray:
        return np.zeros(len(values), np.int64)

    def unit(values: np.ndarray, few: int) -> Band:
        return emergence.unit_band(values, alike(values), few, *chance)

    def free(values: np.ndarray) -> Band:
        return simultaneous_band(values, alike(values), 1, *chance)

    def auc(values: np.ndarray, stratum: np.ndarray, few: int) -> dict[str, Any]:
        band = emergence.unit_band(values, stratum, few, *chance)
        onsets, named = [], [*facts["layers"], None]
        for k, low in enumerate(band.low):
            first = vars(emergence.onset(values[:, k], low, stratum, *chance))
            onsets.append({side: named[int(first[side])] for side in SIDES})
        return {"auc": _curves(band), "onset": dict(zip(FORMS, onsets, strict=True))}

    def rank(values: np.ndarray) -> dict[str, Any]:
        span = max(facts["candidates"] - 1, 1)
        band = unit((values - 1) / span, len(values))
        return _curves(replace(band, **{side: 1 + span * getattr(band, side) for side in SIDES}))

    concepts, every = [], []
    for k, (name, held) in enumerate(holds.items()):
        ranks, sides = found["ranks"][..., k, :], (int(held.sum()), int((~held).sum()))
        every.append(emergence.auc_values(found["scores"][..., k], held))
        row = {"concept": name, "with": sides[0], "without": sides[1]}
        row |= auc(every[-1], held.astype(np.int64), min(sides))
        row |= {f"rank_{by}": rank(ranks[held, ..., i]) for i, by in enumerate(("mean", "min"))}
        concepts.append(row | {"rank_without": rank(ranks[~held, ..., 0])})
    mean, least = np.mean(every, axis=0), min(min(r["with"], r["without"]) for r in concepts)
    image, word, patches = boxes["image"], boxes["word"], {}
    given = (
        *(found[k] for k in ("maps", "prior")),
        *(boxes[k] for k in ("own", "others", "valid")),
    )
    measures = emergence.patch_measures(*given) if len(word) else {}
    for name, values in measures.items():
        defined = np.isfinite(values).all(axis=(1, 2))
        used = defined & (np.bincount(word[defined], minlength=len(holds))[word] >= FEWEST)
        if used.any():
            by_image = emergence.category_values(values[used], image[used], word[used])
            rarest = int(np.unique(word[used], return_counts=True)[1].min())
            band = free(by_image) if name == "gain" else unit(by_image, rarest)
            patches[name] = _curves(band) | {"categories": len(np.unique(word[used]))}
    return {
        "r2": _curves(free(emergence.r2_values(found["errors"], found["total"]))),
        "mean": auc(mean, alike(mean), least),
        "concepts": concepts,
        "patches": patches,
    }


def _curves(band: Band) -> dict[str, Any]:
    """Form by form, and within it side by side, the values layer by layer."""
    sides = zip(*(getattr(band, side).tolist() for side in SIDES))
    curves = [dict(zip(SIDES, values)) for values in sides]
    return {**dict(zip(FORMS, curves, strict=True)), "n": band.n, "critical": band.critical}


def render(report: dict[str, Any]) -> str:
    """The report as text."""
    layers, rows = report["layers"], report["concepts"]

    def span(curve: dict[str, Any], layer: int) -> str:
        values = (round(curve[side][layer], 3) + 0.0 for side in SIDES)  # no negative zero
        return "{:.3f} [{:.3f}, {:.3f}]".format(*values)

    def table(title: str, of: dict[str, Any]) -> list[str]:
        lines = [[name, *(span(of[form], k) for form in FORMS)] for k, name in enumerate(layers)]
        return [title, *_columns([["", *FORMS], *lines]), ""]

    def onsets(row: dict[str, Any]) -> list[str]:
        found = (row["onset"][form] for form in FORMS)
        return ["{} [{}, {}]".format(*(f[side] or "never" for side in SIDES)) for f in found]

    many = len(report.get("prompts", ()))
    says = {
        "tokens": "log-probability by the token head, which reads the {reads}: mean over the "
        "word's pieces, among {candidates} tokens ({masked[special]} special ones and "
        "{masked[unsaid]} that no discovery caption holds are masked)",
        "texts": "cosine of the projected reading with texts ({prompts[0]!r}, {many} in all)",
    }
    lines = [
        f"{report['model']}, lens {report['lens']}: "
        + says[report["lens"]].format(**report, many=many),
        f"fitted on {report['discovery']} discovery pictures, judged on {report['n']} of "
        "validation",
        *([_too_few(report["left_out"])] if report["left_out"] else []),
        "",
        *table("R^2: how well a layer's reading foretells the last", report["r2"]),
        *table(f"AUC, mean over words ({len(rows)}; chance .5)", report["mean"]["auc"]),
    ]
    for row in rows if len(rows) <= IN_FULL else ():
        lines += table(f"AUC of {row['concept']} (chance .5)", row["auc"])
    head = ["onset: AUC above chance from here on", "with", "without", *FORMS]
    body = [[r["concept"], str(r["with"]), str(r["without"]), *onsets(r)] for r in rows]
    lines += [*_columns([head, *body, ["mean", "", "", *onsets(report["mean"])]]), ""]
    kinds = {"rank_mean": "rank with it", "rank_without": "without it"}
    if any(len(pieces) > 1 for pieces in report["pieces"].values()):
        kinds["rank_min"] = "best piece with it"
    shown = [(form, kind) for form in FORMS[:2] for kind in kinds]
    head = [f"after {layers[-1]}", *(f"{form}: {kinds[kind]}" for form, kind in shown)]
    body = [[r["concept"], *(span(r[kind][form], -1) for form, kind in shown)] for r in rows]
    lines += [*_columns([head, *body]), f"  chance {report['rank_chance']}", ""]
    for name, of in report["patches"].items():
        chance = "0" if name == "gain" else ".5"
        title = f"patches: {name}, mean over categories ({of['categories']}; n = {of['n']}; chance "
        lines += table(f"{title}{chance})", of)
    if not report["patches"]:
        lines += [f"patches: no word is a category with boxes in {FEWEST} pictures", ""]
    lines.append(
        "95 % bands over forms and layers at once, one word at a time. Gain: above the mean map of "
        "other pictures.\nSpecificity: against the boxes of other categories. A picture may show "
        "what its captions leave out."
    )
    return "\n".join(lines)


def _too_few(left_out: dict[str, dict[str, int]]) -> str:
    of = ", ".join(f"{name} {n['with']} / {n['without']}" for name, n in left_out.items())
    return (
        f"{FEWEST} validation pictures with the word in a caption and {FEWEST} without are needed; "
        f"left out: {of or 'all, captions name no category'}"
    )


def _columns(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


if __name__ == "__main__":
    run_command(main)
