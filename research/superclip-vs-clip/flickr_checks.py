"""Compositional checks from Flickr30k Entities captions: flickr_checks.py FLICKR SPLIT OUT.json

Of every picture's captions, by the phrases that Entities marks:
- swap phrases: the first two visual phrases of different entities exchange places;
- swap colours: two different colour words exchange places;
- replace phrase: a phrase becomes one of the same type from another picture, none of whose words
  (beyond articles and the like) occurs in any caption of this picture.
At most one question a kind and picture. Negatives of the first kind can still be true (two phrases
may be symmetric), and none is checked by a person.
"""

import itertools
import json
import re
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

COLOUR = re.compile(
    r"\b(?:black|white|red|blue|green|yellow|brown|orange|pink|purple|gray|grey|tan|blond)\b"
)
COMMON = {*"a an the in of on with and his her their its some two three one it to at".split()}  # noqa: SIM905


def visual(annotation):
    return [p for p in annotation["phrases"] if p["entity"] and "notvisual" not in p["types"]]


def words(text):
    return set(re.findall(r"[a-z]+", text.lower())) - COMMON


def put(text, *pieces):
    """The text with pieces (start, end, new) put in, from the end."""
    for start, end, new in sorted(pieces, reverse=True):
        text = text[:start] + new + text[end:]
    return text


def swapped(a, b, text):
    (s, e), (t, f) = a, b
    return put(text, (s, e, text[t:f]), (t, f, text[s:e]))


def checks(root: Path, split: str):
    document = json.loads((root / "annotations" / f"captions_{split}.json").read_text())
    captions = defaultdict(list)
    for annotation in document["annotations"]:
        captions[annotation["image_id"]].append(annotation)
    bank = defaultdict(list)  # phrases by type, with their pictures
    for key, group in captions.items():
        for phrase in (p for annotation in group for p in visual(annotation)):
            bank[phrase["types"][0]].append((key, phrase["phrase"].lower()))
    for image in document["images"]:
        key, group = image["id"], captions[image["id"]]
        rng = np.random.Generator(np.random.Philox(key=[0, key]))
        said = words(" ".join(annotation["caption"] for annotation in group))
        found = {}
        for annotation in group:
            text, phrases = annotation["caption"].lower(), visual(annotation)
            pair = next(
                (
                    (p, q)
                    for p, q in itertools.pairwise(phrases)
                    if p["entity"] != q["entity"]
                    and p["end"] <= q["start"]
                    and words(p["phrase"]) != words(q["phrase"])
                ),
                None,
            )
            if pair:
                spans = [(p["start"], p["end"]) for p in pair]
                found.setdefault("swap phrases", (text, swapped(*spans, text)))
            colours = list(COLOUR.finditer(text))
            if len({m[0] for m in colours}) > 1:
                first = colours[0]
                other = next(m for m in colours if m[0] != first[0])
                negative = swapped(first.span(), other.span(), text)
                found.setdefault("swap colours", (text, negative))
            for phrase in phrases[:1]:
                others = bank[phrase["types"][0]]
                for k in rng.integers(len(others), size=20):
                    theirs, new = others[k]
                    if theirs != key and words(new) and not words(new) & said:
                        negative = put(text, (phrase["start"], phrase["end"], new))
                        found.setdefault("replace phrase", (text, negative))
                        break
        for category, (positive, negative) in found.items():
            yield {
                "image": image["file_name"],
                "positive": positive,
                "negative": negative,
                "category": category,
            }


if __name__ == "__main__":
    root, split, out = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    Path(out).write_text(json.dumps(list(checks(root, split)), indent=0))
