import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from reference import tokens as naive

from superclip.data.batch import Batch
from superclip.loss_options import LOSS_OPTIONS, ClipOptions, SuperClipOptions
from superclip.losses import LOSSES, LossContext, build_loss
from superclip.model.output import ClipOutput
from superclip.ops.world import World

V, SPECIAL = 31, (0, 29, 30)


def batch_of(tokens):
    ids = torch.arange(len(tokens))
    return Batch(torch.zeros(len(tokens), 3, 2, 2, dtype=torch.uint8), tokens, ids, ids)


@pytest.fixture
def batch():
    torch.manual_seed(0)
    tokens = torch.randint(1, 29, (6, 8))
    tokens[:, 0], tokens[:, 5], tokens[:, 6:] = 29, 30, 0
    return batch_of(tokens)


@pytest.fixture
def out():
    torch.manual_seed(1)
    x, z = (F.normalize(torch.randn(6, 4), dim=1) for _ in range(2))
    hidden, weight, bias = torch.randn(6, 5), torch.randn(V, 5), torch.randn(V)
    return ClipOutput(x, z, torch.tensor(10.0), hidden, weight, bias)


def token_term(options, batch, out, vocab_ids=None):
    loss = build_loss("superclip", options, LossContext(V, SPECIAL, vocab_ids))
    loss.observe(batch, World())
    return loss.row_terms(out, batch)["token"].double()


def test_tables_and_documentation_agree():
    assert LOSSES.keys() == LOSS_OPTIONS.keys()
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    for name in LOSSES:
        assert re.search(rf"`{name}`", readme), f"README does not name the loss {name}"


def test_superclip_without_its_term_is_clip(batch, out):
    pair = (out.image_features, out.text_features, out.scale, batch, World())
    context = LossContext(V, SPECIAL)
    ours = build_loss("superclip", SuperClipOptions(), context).pair_terms(*pair)
    assert ours == build_loss("clip", ClipOptions(), context).pair_terms(*pair)


@pytest.mark.parametrize("keep", [False, True])
def test_token_terms_equal_the_dense_reference(batch, out, keep):
    logits = (out.token_hidden @ out.token_weight.T + out.token_bias).double()
    weights = naive.idf([batch.tokens], V)
    columns = [c for c in range(V) if keep or c not in SPECIAL]
    allowed = torch.zeros(V).index_fill_(0, torch.tensor(columns), 1)
    got = token_term(SuperClipOptions(keep_special_tokens=keep, token_weight=2.0), batch, out)
    want = 2 * naive.soft_cross_entropy(logits, batch.tokens, weights * allowed)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    options = SuperClipOptions(token_loss="bce", keep_special_tokens=keep)
    want = naive.bce(logits, batch.tokens, torch.tensor(columns))
    torch.testing.assert_close(token_term(options, batch, out), want, rtol=1e-5, atol=1e-6)


def test_seen_vocabulary_equals_the_full_one_restricted(batch, out):
    """With logits of the unseen ids at minus infinity the two forms are the same function."""
    seen = batch.tokens.unique()
    unseen = torch.ones(V, dtype=torch.bool).index_fill_(0, seen, False)
    full = replace(out, token_bias=out.token_bias.masked_fill(unseen, -1e9))
    small = replace(out, token_weight=out.token_weight[seen], token_bias=out.token_bias[seen])
    options = SuperClipOptions()
    torch.testing.assert_close(
        token_term(options, batch, small, seen), token_term(options, batch, full)
    )


def test_bce_with_zero_weights_is_log_two(batch, out):
    blank = replace(out, token_weight=torch.zeros(V, 5), token_bias=torch.zeros(V))
    got = token_term(SuperClipOptions(token_loss="bce"), batch, blank)
    assert got.item() == pytest.approx(0.6931472, rel=1e-5)


def test_counts_are_saved(batch):
    loss = build_loss("superclip", SuperClipOptions(), LossContext(V, SPECIAL))
    loss.observe(batch, World())
    again = build_loss("superclip", SuperClipOptions(), LossContext(V, SPECIAL))
    again.load_state_dict(loss.state_dict())
    assert again.samples == 6 and torch.equal(again.counts, loss.counts)
    assert loss.counts[29] == 6 and loss.counts.sum() == sum(len(t.unique()) for t in batch.tokens)
