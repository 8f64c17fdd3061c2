"""Which tokens of a training caption are kept where it is too long (CLIPA, Li et al. 2023).

Evaluation always cuts the end off.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from jaxtyping import Int
from numpy.random import Generator

from superclip.data.batch import Record, Tagged
from superclip.errors import UserError

Kind = Literal["random", "shuffle", "block", "syntax"]
Tagger = Callable[[str], Tagged]
PRIORITY = {"NN": 1, "JJ": 2, "VB": 3}
"""Nouns, adjectives, verbs (all Penn Treebank tags that begin so); everything else comes last."""


class TextReduction:
    """A caption as `length` ids: those that begin a text, as many of its own as there is room for,
    those that end it, padding.

    random: any of its tokens, every set as likely as another, in their order. shuffle: the same
    set in random order. block: a window, every place as likely as another. syntax: the words of
    best `PRIORITY`, earlier ones first where equal, in their order and joined by blanks; then cut
    (a word may be several tokens). Its words are the tagger's, so a short caption's punctuation is
    spaced anew too.

    Args:
        kind: the rule.
        encode: text -> all ids of its own.
        start, end: ids around every text.
        length: ids of every text.
        pad: id that fills up.
        tagger: for captions that bring no tags of their own.
    """

    def __init__(
        self,
        kind: Kind,
        encode: Callable[[str], Sequence[int]],
        start: Sequence[int],
        end: Sequence[int],
        length: int,
        pad: int = 0,
        tagger: Tagger | None = None,
    ):
        self.kind: Kind = kind
        self.start, self.end, self.length, self.pad = [*start], [*end], length, pad
        self.room = length - len(start) - len(end)
        self._encode, self._tagger = lru_cache(1 << 16)(encode), tagger
        self.tagged_by = "tags of the data" if tagger is None else "the tagger given"

    def find_tagger(self) -> None:
        """For captions without tags.

        Raises:
            UserError: if none is installed.
        """
        name, found = find_tagger("--text-reduction syntax")
        self._tagger = lru_cache(1 << 16)(found)
        self.tagged_by = f"{name}, where the data have no tags"

    def __call__(self, record: Record, which: int, rng: Generator) -> Int[np.ndarray, " l"]:
        """Ids of caption number `which`.

        Raises:
            UserError: if syntax needs a tagger and there is none.
        """
        ids, room = np.asarray(self.all_ids(record, which), np.int64), self.room
        if len(ids) > room:
            ids = ids[self._kept(len(ids), room, rng)]
        whole = [*self.start, *ids, *self.end]
        return np.array(whole + [self.pad] * (self.length - len(whole)), np.int64)

    def _kept(self, count: int, room: int, rng: Generator) -> slice | np.ndarray:
        if self.kind == "syntax":
            return slice(room)
        if self.kind == "block":
            first = int(rng.integers(count - room + 1))
            return slice(first, first + room)
        chosen = rng.choice(count, room, replace=False)
        return np.sort(chosen) if self.kind == "random" else chosen

    def all_ids(self, record: Record, which: int) -> Sequence[int]:
        """Every id that the caption may keep."""
        caption = record.captions[which]
        if self.kind != "syntax":
            return self._encode(caption)
        if record.tags is not None:
            tagged = record.tags[which]
        else:
            if self._tagger is None:
                self.find_tagger()
            assert self._tagger is not None
            tagged = self._tagger(caption)
        return self._encode(" ".join(best_words(tagged, self.room)))


def best_words(tagged: Tagged, count: int) -> list[str]:
    """At most `count` words, by `PRIORITY` and then by place, in their order.

    >>> best_words((("a", "DT"), ("big", "JJ"), ("dog", "NN"), ("runs", "VBZ")), 2)
    ['big', 'dog']
    """
    order = sorted(range(len(tagged)), key=lambda k: PRIORITY.get(tagged[k][1][:2], 4))
    return [tagged[k][0] for k in sorted(order[:count])]


def find_tagger(flag: str) -> tuple[str, Tagger]:
    """NLTK's tagger, if its data are there, else an English model of spaCy; and its name.

    Raises:
        UserError: if neither is installed; says how to get one.
    """
    for found in (_nltk, _spacy):
        if (tagger := found()) is not None:
            return tagger
    packed = (
        "; or pack the captions' tags where there is one (python -m superclip.pack coco --tags)"
    )
    raise UserError(
        f"{flag} finds no tagger of words: pip install nltk && python -m nltk.downloader punkt_tab "
        "averaged_perceptron_tagger_eng (or a spaCy model)" + packed * (flag != "--tags")
    )


def _nltk() -> tuple[str, Tagger] | None:
    try:
        import nltk  # pyright: ignore[reportMissingImports]

        def tag(text: str) -> Tagged:
            return tuple((w, t) for w, t in nltk.pos_tag(nltk.word_tokenize(text)))

        tag("a cat")
    except (ImportError, LookupError):  # the package, or its data
        return None
    return f"nltk {nltk.__version__}", tag


def _spacy() -> tuple[str, Tagger] | None:
    try:
        import spacy  # pyright: ignore[reportMissingImports]

        names = sorted(n for n in spacy.util.get_installed_models() if n.startswith("en_"))
        model: Any = spacy.load(names[0], disable=["parser", "ner", "lemmatizer"])
    except (ImportError, IndexError, OSError):
        return None
    tag = lambda text: tuple((str(t), t.tag_) for t in model(text) if not t.is_space)  # noqa: E731
    return f"spacy {spacy.__version__}, {names[0]} {model.meta['version']}", tag
