"""Zero-shot classification: pictures against classes that are described in words."""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from superclip.data.labelled import LabelledSource, text_lines
from superclip.errors import UserError, nearest
from superclip.evaluation.classification import judge
from superclip.evaluation.encode import Encoder
from superclip.evaluation.measures import Result
from superclip.model.superclip import SuperCLIP

SLOT = "{}"
WORDNET = re.compile(r"n\d{8}")
BUILT_IN = {"openai": "OPENAI_IMAGENET_TEMPLATES", "simple": "SIMPLE_IMAGENET_TEMPLATES"}
"""open_clip's lists by our name: 80 and 7 templates."""


def class_names(data: LabelledSource, file: Path | None = None) -> list[str]:
    """What each class is called in a prompt.

    From a file: a JSON object {class: name}; lines `CLASS<TAB>NAME`, or `CLASS NAME` where CLASS
    has a digit (of `n01440764 tench, Tinca tinca` the first synonym is taken); or one name a line
    in the order of the classes. Files that name classes may name more than there are.

    Without one: the names that the data brings, else open_clip's of ImageNet-1k for WordNet ids and
    the class itself, with blanks for underscores, for others.

    Raises:
        UserError: if the file does not fit the classes, or a WordNet id is not of ImageNet-1k.
    """
    if file is not None:
        return _names_of_file(data.classes, file)
    if data.names is not None:
        if "" in data.names:
            raise UserError(f"{data.name}: a class has no name; give --classnames FILE")
        return data.names
    if all(key.isdigit() for key in data.classes):
        raise UserError(
            f"the classes of {data.name} are numbers ({data.classes[0]}, ...), which no "
            "text tower knows; name them with --classnames FILE"
        )
    known = _imagenet() if any(map(WORDNET.fullmatch, data.classes)) else {}
    odd = [key for key in data.classes if WORDNET.fullmatch(key) and key not in known]
    if odd:
        raise UserError(
            f"class {odd[0]} is a WordNet id, but none of ImageNet-1k's; name the classes with "
            "--classnames FILE"
        )
    return [known.get(key) or key.replace("_", " ").strip() for key in data.classes]


def _imagenet() -> dict[str, str]:
    """WordNet id -> open_clip's name, of ImageNet-1k's classes."""
    import open_clip
    from timm.data.imagenet_info import ImageNetInfo

    ids = ImageNetInfo("imagenet-1k").label_names()
    return dict(zip(map(str, ids), open_clip.IMAGENET_CLASSNAMES, strict=True))


def _names_of_file(classes: Sequence[str], file: Path) -> list[str]:
    lines = text_lines(file, "--classnames")
    if lines[0].startswith(("{", "[")):
        try:
            named = json.loads("\n".join(lines))
        except ValueError as error:
            raise UserError(f"--classnames {file} is no JSON ({error}); mend it") from None
        if not isinstance(named, dict) or not all(isinstance(n, str) for n in named.values()):
            raise UserError(f"--classnames {file} must be an object {{class: name}}")
    else:
        pairs = [_pair(line) for line in lines]
        named = dict(pair for pair in pairs if pair)
        # Ids at the front name classes for certain, even where none of them is one of ours.
        ids = any("\t" in line or WORDNET.match(line) for line in lines)
        if not ids and not set(named) & set(classes):
            if len(lines) != len(classes):
                raise UserError(
                    f"--classnames {file} has {len(lines)} lines for {len(classes)} classes "
                    f"({classes[0]}, ...); write one name a line in their order, or CLASS<TAB>NAME"
                )
            named = dict(zip(classes, lines))
            for key, line in named.items():
                if other := [c for c in classes if c != key and line.startswith(f"{c} ")]:
                    raise UserError(
                        f"--classnames {file}: {line!r} begins with {other[0]!r}, but in their "
                        f"order it would name {key!r}; write CLASS<TAB>NAME"
                    )
        elif None in pairs:
            odd = lines[pairs.index(None)]
            raise UserError(
                f"--classnames {file}: {odd!r} is not CLASS<TAB>NAME as other lines; "
                "write it so on every line"
            )
    if empty := [key for key in classes if key in named and not named[key].strip()]:
        raise UserError(f"--classnames {file}: the name of {empty[0]!r} is empty")
    if missing := [key for key in classes if key not in named]:
        count = f"{len(missing)} of {len(classes)} classes"
        raise UserError(
            f"--classnames {file} does not name {count} (first: {missing[0]}); "
            f"{nearest(missing[0], named)}"
        )
    return [named[key].strip() for key in classes]


def _pair(line: str) -> tuple[str, str] | None:
    """Class and name of a line, if it has both."""
    key, tab, name = line.partition("\t")
    if not tab:
        key, _, name = line.partition(" ")
        if not any(map(str.isdigit, key)):
            return None
    if WORDNET.fullmatch(key):
        name = name.partition(",")[0]
    return (key.strip(), name.strip()) if name.strip() else None


def templates(spec: str | None, data: LabelledSource) -> list[str]:
    """Prompts with the slot `{}`: openai (80), simple (7), or a file with one a line.

    Without a spec those that the data brings, else openai.

    Raises:
        UserError: if there is no such file, or one of its lines lacks the slot.
    """
    if spec in BUILT_IN or (spec is None and data.templates is None):
        import open_clip

        made = getattr(open_clip, BUILT_IN[spec or "openai"])
        return [template(SLOT) for template in made]
    if spec is not None and not Path(spec).exists():
        raise UserError(f"--templates {spec!r} is no file; {nearest(spec, BUILT_IN)}")
    where = f"--templates {spec}" if spec else f"{data.name}'s own templates"
    lines = data.templates if spec is None else text_lines(Path(spec), "--templates")
    assert lines is not None
    found = [line.replace("{c}", SLOT) for line in lines if line]
    if lacking := [line for line in found if SLOT not in line]:
        raise UserError(
            f"{where}: {lacking[0]!r} has no slot for the class; write it as {{}} or {{c}}"
        )
    return found


def classifier(
    model: SuperCLIP, encoder: Encoder, names: Sequence[str], templates: Sequence[str]
) -> Float[Tensor, "c d"]:
    """One unit vector a class: the mean of its prompts' unit vectors, made one again.

    As open_clip's `build_zero_shot_classifier`; equal names get equal bits.
    """
    texts = [template.replace(SLOT, name) for name in names for template in templates]
    vectors = encoder.texts(model, texts).unflatten(0, (len(names), len(templates)))
    return F.normalize(vectors.mean(1), dim=-1)


def zeroshot(
    model: SuperCLIP,
    encoder: Encoder,
    data: LabelledSource,
    names: Sequence[str],
    templates: Sequence[str],
) -> Result:
    """Classify pictures by the class whose prompts lie nearest.

    The numbers are CLIP_benchmark's acc1, acc5, mean_per_class_recall and mean_average_precision,
    but for exact ties, which here count against the model, and empty classes of several-label data,
    which CLIP_benchmark counts as an average precision of 0.

    Returns:
        The measures and notes of `judge`; the note `same_name` lists classes that no text can tell
        apart (ImageNet has two such pairs in open_clip's names): they tie, so neither is ever
        first.
    """
    assert len(names) == len(data.classes), "a name for every class"
    seen = encoder.pictures(model, data.source, data.rows)
    # One column a distinct name: a product's columns need not be equal bits where its inputs are.
    distinct = {name: k for k, name in enumerate(dict.fromkeys(names))}
    scores = seen.features @ classifier(model, encoder, list(distinct), templates).T
    scores = scores[:, [distinct[name] for name in names]].cpu().numpy()
    labels = data.labels[[record.row for record in seen.records]]
    measures, notes = judge(scores, labels, data.classes, names)
    keys = defaultdict(list)
    for key, name in zip(data.classes, names):
        keys[name].append(key)
    prompts = json.dumps([list(names), list(templates)])
    facts = {
        "name": data.name,
        "sha256": data.digest,
        "protocol": "several labels a picture" if data.several else "one label a picture",
        "pictures": len(seen.records),
        "missing": seen.missing,
        "classes": len(names),
        "templates": len(templates),
        "prompts_sha256": hashlib.sha256(prompts.encode()).hexdigest(),
    }
    same = {name: alike for name, alike in keys.items() if len(alike) > 1}
    return Result("zeroshot", facts, measures, notes | {"same_name": same})
