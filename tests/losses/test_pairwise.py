"""CyCLIP, VICReg, OnlineCLR and SigLIP: against naive loops on one process and on two, three and
four ranks; what they do not depend on; cases by hand; in half precision."""

import math
import os

import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from conftest import SIZES, free_port
from reference import pairwise as naive

from superclip.data.batch import Batch
from superclip.errors import UserError
from superclip.loss_options import CyClipOptions, OnlineClrOptions, SigLipOptions, VicRegOptions
from superclip.losses import LossContext, build_loss
from superclip.ops.world import World

B, D, STEPS, SCALE = 12, 5, 3, 7.0
OPTIONS = {
    "cyclip": CyClipOptions(lambda_in_modal=0.5),
    "vicreg": VicRegOptions(sim_coeff=3.0, cov_coeff=2.0),
    "onlineclr": OnlineClrOptions(gamma=0.3, positive_tau_ratio=4.0),
    "siglip": SigLipOptions(init_bias=-2.0),
}


def data(name, step):
    torch.manual_seed(step)
    x, z = (torch.randn(B, D).double() for _ in range(2))
    return (x, z) if name == "vicreg" else (F.normalize(x, dim=1), F.normalize(z, dim=1))


def blank(size):
    ids = torch.arange(size)
    return Batch(torch.zeros(size, 1), torch.zeros(size, 1), ids, ids)


def walk(name, world):
    """Value and gradients of each step on this rank's rows; the state at the end."""
    loss = build_loss(name, OPTIONS[name], LossContext(1, ())).double()
    share, found = B // world.size, []
    rows = slice(world.rank * share, (world.rank + 1) * share)
    for step in range(STEPS):
        leaves = [*(f[rows] for f in data(name, step)), torch.tensor(SCALE).double()]
        leaves = [leaf.requires_grad_() for leaf in leaves] + list(loss.parameters())
        total = sum(loss.pair_terms(*leaves[:3], blank(share), world).values())
        grads = torch.autograd.grad(total, leaves, materialize_grads=True, allow_unused=True)
        found.append((total.detach(), *(g / world.size for g in grads)))
    return found, loss.state_dict()


def reference(name):
    """Value and gradients of each step."""
    options = OPTIONS[name]
    online = naive.OnlineClr(0.3, 4.0)
    for step in range(STEPS):
        x, z = (f.requires_grad_() for f in data(name, step))
        scale = torch.tensor(SCALE).double().requires_grad_()
        leaves = [x, z, scale]
        if name == "cyclip":
            value = carrier = naive.cyclip(*leaves, 0.5, 0.25)
        elif name == "vicreg":
            value = carrier = naive.vicreg(x, z, 3.0, 25.0, 2.0)
        elif name == "onlineclr":
            value, carrier = online.step(*leaves)
        else:
            leaves.append(torch.tensor(options.init_bias).double().requires_grad_())
            value = carrier = naive.siglip(*leaves)
        grads = torch.autograd.grad(carrier, leaves, materialize_grads=True, allow_unused=True)
        yield torch.as_tensor(value, dtype=torch.float64).detach(), grads


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def hold_against_reference(name, ranks):
    """`ranks`: what `walk` found on each."""
    for step, (value, grads) in enumerate(reference(name)):
        found = [rank[0][step] for rank in ranks]
        close(sum(f[0] for f in found) / len(found), value)
        for k in (0, 1):
            close(torch.cat([f[1 + k] for f in found]), grads[k])
        for k in range(2, len(grads)):
            close(sum(f[1 + k] for f in found), grads[k])
    for _, state in ranks:
        assert all(torch.equal(state[key], ranks[0][1][key]) for key in state)


def rank_main(rank, size, port, path):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    world = World.from_env("cpu")
    torch.save([walk(name, world) for name in OPTIONS], f"{path}/{rank}.pt")
    world.close()


@pytest.mark.parametrize("name", OPTIONS)
def test_equals_the_naive_reference(name):
    hold_against_reference(name, [walk(name, World())])


@pytest.mark.dist
@pytest.mark.parametrize("size", SIZES)
def test_ranks_equal_the_naive_reference(size, tmp_path):
    mp.spawn(rank_main, (size, free_port(), str(tmp_path)), nprocs=size)
    found = [torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in range(size)]
    for k, name in enumerate(OPTIONS):
        hold_against_reference(name, [rank[k] for rank in found])


def terms(name, x, z, scale, options=None):
    loss = build_loss(name, options or OPTIONS[name], LossContext(1, ()))
    scale = torch.tensor(scale, dtype=torch.promote_types(x.dtype, torch.float32))
    return loss.pair_terms(x, z, scale, blank(len(x)), World())


def test_cyclip_s_penalties_know_no_temperature():
    x, z = data("cyclip", 0)
    hot, cold = (terms("cyclip", x, z, scale) for scale in (1.0, 100.0))
    assert hot["contrastive"] != cold["contrastive"]
    for name in ("in_modal", "cross_modal"):
        assert hot[name] == cold[name]
    same = terms("cyclip", x, x, 1.0)
    assert same["in_modal"] == 0 and same["cross_modal"].item() == pytest.approx(0, abs=1e-30)
    s = x @ z.T
    want = 0.25 * torch.linalg.matrix_norm(s - s.T) ** 2 / B
    close(hot["cross_modal"], want)


def test_vicreg_by_hand():
    """Standard deviations sqrt(2) and 0; the means of the two modalities lie 1 apart."""
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0]]).double()
    found = terms("vicreg", x, x + 1, SCALE, VicRegOptions())
    assert found["invariance"] == 25 and found["covariance"] == 0
    assert found["variance"].item() == pytest.approx(25 * (1 - 0.01) / 2)


def test_onlineclr_without_memory_is_the_gradient_of_its_objective():
    """And a shift of all exponents by hundreds neither overflows nor vanishes."""
    options = OnlineClrOptions(gamma=1.0)
    for scale in (7.0, 1000.0):
        x, z = (f.requires_grad_() for f in data("onlineclr", 0))
        s, tau = x @ z.T, 1 / scale
        wrong = s[~torch.eye(B, dtype=torch.bool)].div(tau).logsumexp(0) - math.log(B * (B - 1))
        right = -s.diagonal() / (10 * tau)
        want = tau * wrong + 10 * tau * (right.logsumexp(0) - math.log(B))
        (found,) = terms("onlineclr", x, z, scale, options).values()
        close(found, want)
        for a, b in zip(torch.autograd.grad(found, (x, z)), torch.autograd.grad(want, (x, z))):
            close(a, b)


def test_siglip_at_the_paper_s_start():
    """Nearly all of the loss is the positives': 10 + 10 times what they miss of a cosine of 0."""
    x = torch.eye(B).double()
    (found,) = terms("siglip", x, x.roll(1, 0), 10.0, SigLipOptions()).values()
    wrong = (B - 2) * math.log1p(math.exp(-10)) + math.log(2)
    assert found.item() == pytest.approx(10 + math.log1p(math.exp(-10)) + wrong, rel=1e-12)


@pytest.mark.parametrize("name", OPTIONS)
def test_half_precision_features_cost_their_own_rounding_only(name):
    x, z = (f.bfloat16() for f in data(name, 0))
    rough = terms(name, x, z, SCALE)
    fine = terms(name, x.double(), z.double(), SCALE)
    for key in rough:
        assert rough[key].dtype == torch.float32
        assert rough[key].item() == pytest.approx(fine[key].item(), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("name", ["vicreg", "onlineclr"])
def test_a_single_pair_is_refused(name):
    x, z = (f[:1] for f in data(name, 0))
    with pytest.raises(UserError, match="raise --batch-size"):
        terms(name, x, z, SCALE)


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: CyClipOptions(0.0, 0.0), "use --loss clip"),
        (lambda: CyClipOptions(-1.0), "--lambda-in-modal -1.0 must not be negative"),
        (lambda: VicRegOptions(cov_coeff=math.nan), "--cov-coeff nan"),
        (lambda: OnlineClrOptions(gamma=0.0), "--gamma 0.0 must lie in"),
        (lambda: OnlineClrOptions(positive_tau_ratio=0.0), "--positive-tau-ratio"),
        (lambda: SigLipOptions(math.inf), "--init-bias inf"),
    ],
)
def test_what_can_t_be_is_refused(make, says):
    with pytest.raises(UserError, match=says):
        make()
