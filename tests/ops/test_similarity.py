import torch
import torch.nn.functional as F
from reference.contrastive import info_nce as naive

from superclip.ops.similarity import info_nce
from superclip.ops.world import World


def test_info_nce_equals_reference_in_value_and_gradient():
    torch.manual_seed(0)
    x, z = (F.normalize(torch.randn(6, 4).double(), dim=1).requires_grad_() for _ in range(2))
    scale = torch.tensor(9.0, dtype=torch.float64, requires_grad=True)
    ours, theirs = info_nce(x, z, scale, World()), naive(x, z, scale)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    for a, b in zip(
        torch.autograd.grad(ours, (x, z, scale)), torch.autograd.grad(theirs, (x, z, scale))
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


def test_half_precision_features_are_compared_in_fp32():
    x = F.normalize(torch.randn(4, 8), dim=1).bfloat16()
    assert info_nce(x, x, torch.tensor(100.0), World()).dtype == torch.float32
