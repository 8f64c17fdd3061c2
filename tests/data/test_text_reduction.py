"""Rules by which training captions lose tokens, against their plain statement; tags in shards."""

import itertools
import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import ClassVar

import numpy as np
import open_clip
import pytest
from conftest import command, refused
from reference.hf_towers import text_folder
from scipy.stats import chisquare

from superclip.data import text_reduction
from superclip.data.batch import Record
from superclip.data.scenes import Scenes
from superclip.data.shard_writer import write_shards
from superclip.data.shards import Shards
from superclip.data.text_reduction import TextReduction, best_words, find_tagger
from superclip.errors import UserError
from superclip.model.factory import text_parts
from superclip.model.towers import TextTokenizer

BPE = open_clip.SimpleTokenizer(context_length=8)
ENDS = [BPE.sot_token_id], [BPE.eot_token_id]
LEDGE = "An orange cat that is sitting on a ledge"
TAGS = "DT JJ NN WDT VBZ VBG IN DT NN"
HAND = [
    (LEDGE, TAGS),
    ("Two young women , laughing , cross a very busy street", "CD JJ NNS , VBG , VBP DT RB JJ NN"),
    ("the dog 's red ball is n't on the wet grass", "DT NN POS JJ NN VBZ RB IN DT JJ NN"),
    ("Running fast", "VBG RB"),
    ("A man", "DT NN"),
    ("Children in bright yellow coats jump near Paris", "NNS IN JJ JJ NNS VBP IN NNP"),
    ("the the the the the the the the", "DT DT DT DT DT DT DT DT"),
    ("beautiful old wooden tall dark empty houses stand silent", "JJ JJ JJ JJ JJ JJ NNS VBP JJ"),
]  # fmt: skip


def record_of(caption, tags=None):
    tagged = None if tags is None else (tuple(zip(caption.split(), tags.split())),)
    return Record(0, "k", 4, 4, b"", (caption,), (0,), tags=tagged)


def naive_syntax(words, tags, room):
    """Section 9.2 word by word: repeatedly take the best that is left, the earliest of equals."""

    def rank(tag):
        return next((k for k, kind in enumerate(("NN", "JJ", "VB")) if tag.startswith(kind)), 3)

    left, taken = list(range(len(words))), []
    while left and len(taken) < room:
        best = min(rank(tags[k]) for k in left)
        first = next(k for k in left if rank(tags[k]) == best)
        left.remove(first)
        taken.append(first)
    return [words[k] for k in sorted(taken)]


def naive_ids(text, length):
    """open_clip's own truncation."""
    return open_clip.SimpleTokenizer(context_length=length)([text])[0].numpy()


def drawn(kind, ids, length, count=10_000):
    shorten = TextReduction(kind, lambda text: ids, *ENDS, length)
    rng = np.random.default_rng(0)
    return [shorten(record_of("x"), 0, rng) for _ in range(count)]


def test_the_example_of_the_paper_by_the_rule():
    tagged = tuple(zip(LEDGE.split(), TAGS.split()))
    assert best_words(tagged, 6) == ["An", "orange", "cat", "is", "sitting", "ledge"]
    shorten = TextReduction("syntax", BPE.encode, *ENDS, 8)
    found = shorten(record_of(LEDGE, TAGS), 0, np.random.default_rng(0))
    assert (found == naive_ids("an orange cat is sitting ledge", 8)).all()


@pytest.mark.parametrize("length", [5, *(pytest.param(n, marks=pytest.mark.slow) for n in (8, 16))])
def test_syntax_on_200_captions(length):
    """Hand-tagged sentences, and scenes by their grammar, against the rule word by word."""
    scenes = [Scenes("train", 300).read(row) for row in range(300)]
    captions = dict.fromkeys((r.captions[0], " ".join(t for _, t in r.tags[0])) for r in scenes)
    cases = [*HAND, *captions][:200]
    assert len(cases) == 200
    shorten = TextReduction("syntax", BPE.encode, *ENDS, length)
    for caption, tags in cases:
        wanted = " ".join(naive_syntax(caption.split(), tags.split(), length - 2))
        found = shorten(record_of(caption, tags), 0, np.random.default_rng(0))
        assert (found == naive_ids(wanted, length)).all(), caption


@pytest.mark.parametrize("kind", ["random", "shuffle", "block"])
def test_short_captions_stay_and_long_ones_fill_the_length(kind):
    for text in ("a red cup", "one two three four five six", "one two three four five six seven"):
        shorten = TextReduction(kind, BPE.encode, *ENDS, 8)
        found = shorten(record_of(text), 0, np.random.default_rng(1))
        ids = BPE.encode(text)
        assert found[0] == BPE.sot_token_id and found.dtype == np.int64 and found.shape == (8,)
        if len(ids) <= 6:
            assert (found == naive_ids(text, 8)).all()
        else:
            assert found[7] == BPE.eot_token_id and {*found[1:7]} < {*ids} and len({*found}) == 8


def test_every_set_order_and_window_is_as_likely_as_another():
    ids = [11, 12, 13, 14, 15]
    cut = [tuple(row[1:4]) for row in drawn("random", ids, 5)]
    sets = list(itertools.combinations(ids, 3))
    assert {*cut} == {*sets} and chisquare([cut.count(s) for s in sets]).pvalue > 1e-3
    cut = [tuple(row[1:4]) for row in drawn("shuffle", ids, 5)]
    orders = list(itertools.permutations(ids, 3))
    assert {*cut} == {*orders} and chisquare([cut.count(s) for s in orders]).pvalue > 1e-3
    cut = [tuple(row[1:4]) for row in drawn("block", ids, 5)]
    windows = [(11, 12, 13), (12, 13, 14), (13, 14, 15)]
    assert {*cut} == {*windows} and chisquare([cut.count(w) for w in windows]).pvalue > 1e-3


def test_tags_come_back_from_shards(tmp_path):
    scenes = Scenes("train", 3)
    plain = replace(scenes.read(2), tags=None)
    write_shards([(scenes.read(0), [0]), (scenes.read(1), [1]), (plain, [2])], tmp_path, "train")
    read = Shards(str(tmp_path / "train-000000.tar"))
    assert [read.read(row).tags for row in range(3)] == [
        scenes.read(0).tags,
        scenes.read(1).tags,
        None,
    ]


@pytest.fixture
def no_taggers(monkeypatch):
    for name in ("nltk", "spacy"):
        monkeypatch.setitem(sys.modules, name, None)


def test_without_a_tagger_the_way_out_is_named(no_taggers):
    shorten = TextReduction("syntax", BPE.encode, *ENDS, 8)
    with pytest.raises(UserError, match=r"nltk.downloader .* or pack the captions' tags"):
        shorten.all_ids(record_of("a cat"), 0)
    assert shorten.all_ids(record_of("a cat", "DT NN"), 0) == BPE.encode("a cat")
    assert shorten.tagged_by == "tags of the data"
    with pytest.raises(UserError, match=r"^--tags finds no tagger .*\(or a spaCy model\)$"):
        find_tagger("--tags")


def test_nltk_is_used_where_its_data_are_and_spacy_else(no_taggers, monkeypatch):
    def tag(words):
        if words[0] == "no":
            raise LookupError("no data")
        return [(word, "NN") for word in words]

    nltk: ModuleType = SimpleNamespace(pos_tag=tag, word_tokenize=str.split, __version__="3")
    monkeypatch.setitem(sys.modules, "nltk", nltk)
    name, tagger = find_tagger("--tags")
    assert name == "nltk 3" and tagger("big dog") == (("big", "NN"), ("dog", "NN"))

    nltk.word_tokenize = lambda text: ["no"]
    token = type("Token", (), {"tag_": "VB", "is_space": False, "__str__": lambda self: "run"})

    class Model:
        meta: ClassVar = {"version": "1.0"}

        def __call__(self, text):
            return [token()] * len(text.split())

    spacy = SimpleNamespace(
        util=SimpleNamespace(get_installed_models=lambda: ["de_x", "en_core_web_sm"]),
        load=lambda name, disable: Model() if name[:2] == "en" else None,
        __version__="3.8",
    )
    monkeypatch.setitem(sys.modules, "spacy", spacy)
    name, tagger = find_tagger("--tags")
    assert name == "spacy 3.8, en_core_web_sm 1.0"
    assert tagger("run run") == (("run", "VB"), ("run", "VB"))
    spacy.util.get_installed_models = lambda: ["de_x"]
    assert text_reduction._spacy() is None


@pytest.mark.parametrize("kind", ["towers", "open_clip"])
def test_parts_of_hugging_face_tokenizers_make_the_tokenizers_own_texts(kind, tmp_path):
    """What is short enough comes out as the tokenizer itself writes it; what is too long is cut
    where it cuts."""
    folder = text_folder(tmp_path / "text")
    if kind == "towers":
        held = (folder / "tokenizer.json").read_text()
        tokenizer = TextTokenizer(held, 8, pad_id=0, special_ids=(0, 2, 3))
    else:
        tokenizer = open_clip.tokenizer.HFTokenizer(str(folder), context_length=8)
    parts = text_parts(tokenizer)
    assert parts is not None
    for kind_of_cut, text in (("block", "a red heart"), ("block", ""), ("syntax", "a red " * 9)):
        tagger = lambda t: tuple((word, "NN") for word in t.split())  # noqa: E731
        shorten = TextReduction(kind_of_cut, *parts, tagger=tagger)
        found = shorten(record_of(text), 0, np.random.default_rng(0))
        assert found.tolist() == tokenizer([text])[0].tolist()


def test_training_shortens_and_evaluation_truncates(few_scenes, tmp_path):
    """The command, with a caption length at which most scenes' captions are too long; the head's
    vocabulary holds what training may meet."""
    words = "superclip.train --train-num-samples 24 --batch-size 12 --context-length 5 --threads 1"
    words = [*words.split(), "--text-reduction", "syntax", "--head-vocab", "seen"]
    done = command(*words, "--val-data", str(few_scenes), "--out", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    towers = refused(
        *words[:-1], "full", "--train-data", "coco:nowhere", "--out", str(tmp_path / "x")
    )
    assert "nowhere" in towers
