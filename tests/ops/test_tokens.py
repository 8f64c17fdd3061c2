import pytest
import torch
from reference import tokens as naive

from superclip.ops import tokens as ops

V = 23


@pytest.fixture
def captions():
    torch.manual_seed(0)
    return torch.randint(0, V, (7, 9))


def test_idf_equals_the_released_running_mean():
    torch.manual_seed(1)
    batches = [torch.randint(0, V, (5, 6)) for _ in range(4)]
    counts = sum(ops.document_counts(b, V) for b in batches)
    expected = naive.idf(batches, V)
    torch.testing.assert_close(ops.idf(counts, torch.tensor(20)), expected.float())


def test_a_token_in_every_caption_weighs_nothing():
    tokens = torch.tensor([[1, 5, 5], [1, 6, 0]])
    weights = ops.idf(ops.document_counts(tokens, 8), torch.tensor(2))
    assert weights[1] == 0 and (weights >= 0).all()


def test_soft_labels_sum_to_one_and_count_repeats_once():
    ids, labels = ops.soft_labels(torch.tensor([[3, 3, 4, 3]]), torch.ones(V))
    assert labels.sum() == 1 and labels[ids == 3].sum() == 0.5


def test_row_without_weight_contributes_zero():
    _, labels = ops.soft_labels(torch.tensor([[3, 4]]), torch.zeros(V))
    assert (labels == 0).all()


@pytest.mark.parametrize("chunk", [2**24, 2 * V])  # one chunk; chunks of two rows
def test_losses_equal_dense_reference_in_value_and_gradient(captions, chunk, monkeypatch):
    monkeypatch.setattr(ops, "ROW_CHUNK_ELEMENTS", chunk)
    torch.manual_seed(2)
    hidden = torch.randn(7, 5, requires_grad=True)
    weight, bias = torch.randn(V, 5, requires_grad=True), torch.randn(V, requires_grad=True)
    importance, columns = torch.rand(V), torch.arange(3, V)
    counted = (torch.arange(V) >= 3).float()
    inputs = (hidden, weight, bias)
    logits = (hidden @ weight.T + bias).double()

    soft = ops.soft_cross_entropy(*inputs, *ops.soft_labels(captions, importance))
    bce = ops.multi_hot_bce(*inputs, *ops.multi_hot(captions, counted), counted)
    expected = (
        naive.soft_cross_entropy(logits, captions, importance.double()),
        naive.bce(logits, captions, columns),
    )
    for got, want in zip((soft, bce), expected):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
        ours = torch.autograd.grad(got, inputs, retain_graph=True)
        theirs = torch.autograd.grad(want, inputs, retain_graph=True)
        for a, b in zip(ours, theirs):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
