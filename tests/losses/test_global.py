"""The losses with normalisers of every sample: against the naive reference on one process and on
two, three and four ranks; the identities that the papers imply; what their tables keep."""

import math
import os
from dataclasses import dataclass, field, replace
from itertools import pairwise

import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from conftest import SIZES, free_port
from reference.contrastive import info_nce
from reference.global_contrastive import Naive

from superclip.data.batch import Batch
from superclip.errors import UserError
from superclip.loss_options import (
    LOSS_OPTIONS,
    FastClipV0Options,
    FastClipV1Options,
    FastClipV2Options,
    FastClipV3Options,
    ISogClrOptions,
    SogClrOptions,
)
from superclip.losses import LossContext, build_loss
from superclip.losses.sample_table import SampleTable
from superclip.ops.world import World

B, D, STEPS, IMAGES, CAPTIONS = 12, 5, 5, 9, 20
CONTEXT = LossContext(
    1, (), None, IMAGES, CAPTIONS, steps_per_epoch=1, epochs=8, lr_tau=0.01, optimizer_eps=1e-3
)
FALLING = [FastClipV1Options(gamma=0.2).gamma_at(e, 8) for e in range(STEPS)]
RANGE = {"tau_range": (0.05, 0.5)}


@dataclass
class Case:
    """A loss, the reference's arguments for it, and whether its temperature is learnt."""

    name: str
    options: object
    kind: str
    gammas: list
    naive: dict = field(default_factory=dict)

    def reference(self):
        own = {"rho": getattr(self.options, "rho", 0.0), "eps": self.options.normalizer_eps}
        if hasattr(self.options, "tau_range"):
            own |= {"tau_range": self.options.tau_range, "lr_tau": 0.01, "adam_eps": 1e-3}
        return Naive(self.kind, self.gammas, **own | self.naive)


CONSTANT = [0.6] * STEPS
CASES = [
    Case("sogclr", SogClrOptions(gamma=0.6, normalizer_eps=0.01), "sogclr", CONSTANT),
    Case(
        "sogclr", SogClrOptions(gamma=0.6, include_positive=True), "sogclr", CONSTANT,
        {"include": True},
    ),
    Case("isogclr", ISogClrOptions(gamma=0.6, rho=2.0, **RANGE), "isogclr", CONSTANT),
    Case("fastclip-v0", FastClipV0Options(normalizer_eps=0.01), "v0", FALLING),
    Case(
        "fastclip-v0", FastClipV0Options(published_tau_gradient=True), "v0", FALLING,
        {"twice": True},
    ),
    Case("fastclip-v1", FastClipV1Options(), "v1", FALLING),
    Case("fastclip-v2", FastClipV2Options(rho=2.0, **RANGE), "v2", FALLING),
    Case("fastclip-v3", FastClipV3Options(), "v3", FALLING),
    Case(
        "fastclip-v3", FastClipV3Options(published_tau_gradient=True), "v3", FALLING,
        {"twice": True},
    ),
]  # fmt: skip
PATHS = [(case, way) for case in CASES for way in ("reduction", "gather")]


def data(step):
    """Features and ids; some pictures and captions come twice in a batch."""
    torch.manual_seed(step)
    x, z = (F.normalize(torch.randn(B, D).double(), dim=1) for _ in range(2))
    images, captions = torch.randint(0, IMAGES, (B,)), torch.randperm(CAPTIONS)[:B]
    captions[3] = captions[7]
    return x, z, images, captions


def walk(case, way, world):
    """Value and gradients of each step on this rank's rows, and the tables at the end."""
    loss = build_loss(case.name, replace(case.options, communication=way), CONTEXT).double()
    share, found = B // world.size, []
    rows = slice(world.rank * share, (world.rank + 1) * share)
    for step in range(STEPS):
        x, z, images, captions = (t[rows] for t in data(step))
        batch = Batch(torch.zeros(share, 1), torch.zeros(share, 1), images, captions)
        scale = torch.tensor(7.0).double()
        leaves = [leaf.requires_grad_() for leaf in (x, z, scale)]
        loss.observe(batch, world)
        total = sum(loss.pair_terms(*leaves, batch, world).values())
        grads = torch.autograd.grad(total, leaves, materialize_grads=True, allow_unused=True)
        found.append((total.detach(), *(g / world.size for g in grads)))
    return found, loss.state_dict()


def rank_main(rank, size, port, path):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    world = World.from_env("cpu")
    torch.save([walk(case, way, world) for case, way in PATHS], f"{path}/{rank}.pt")
    world.close()


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def hold_against_reference(case, ranks):
    """`ranks`: what `walk` found on each."""
    naive = case.reference()
    for step in range(STEPS):
        x, z, images, captions = data(step)
        ids = images.tolist(), captions.tolist()
        value, grads = naive.step(x, z, torch.tensor(7.0).double(), ids)
        found = [rank[0][step] for rank in ranks]
        close(sum(f[0] for f in found) / len(found), torch.tensor(value, dtype=torch.float64))
        for k in (1, 2):
            close(torch.cat([f[k] for f in found]), grads[k - 1])
        close(sum(f[3] for f in found), grads[2])
    for side, name in enumerate(("images", "captions")):
        table = ranks[0][1][f"tables.{name}.rows"]
        assert all(torch.equal(rank[1][f"tables.{name}.rows"], table) for rank in ranks)
        for key, row in naive.memory[side].items():
            assert table[key, 0].item() == pytest.approx(math.log(row["u"]), rel=1e-9)
            if "tau" in row:
                assert table[key, 1].item() == pytest.approx(row["tau"], rel=1e-9)
        unseen = sorted(set(range(len(table))) - set(naive.memory[side]))
        assert (table[unseen, 0] == -math.inf).all()


@pytest.mark.parametrize(
    "case,way", PATHS, ids=[f"{c.name}-{k}-{w}" for k, (c, w) in enumerate(PATHS)]
)
def test_equals_the_naive_reference(case, way):
    hold_against_reference(case, [walk(case, way, World())])


@pytest.mark.dist
@pytest.mark.parametrize("size", SIZES)
def test_ranks_equal_the_naive_reference(size, tmp_path):
    mp.spawn(rank_main, (size, free_port(), str(tmp_path)), nprocs=size)
    found = [torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in range(size)]
    for k, (case, _) in enumerate(PATHS):
        hold_against_reference(case, [rank[k] for rank in found])


def batch_of(images, captions):
    return Batch(torch.zeros(len(images), 1), torch.zeros(len(images), 1), images, captions)


def one_step(name, options, x, z, scale, context=CONTEXT):
    """Terms' sum and its gradients at x, z, scale of a fresh loss."""
    ids = torch.arange(len(x))
    batch, world = batch_of(ids, ids), World()
    leaves = [t.clone().requires_grad_() for t in (x, z, torch.as_tensor(scale).to(x.dtype))]
    loss = build_loss(name, options, replace(context, images=len(x), captions=len(x))).to(x.dtype)
    loss.observe(batch, world)
    total = sum(loss.pair_terms(*leaves, batch, world).values())
    return total.detach(), *torch.autograd.grad(total, leaves, materialize_grads=True)


def test_sogclr_that_counts_the_positive_and_forgets_is_clip_times_two_tau():
    x, z, *_ = data(0)
    options = SogClrOptions(gamma=1.0, include_positive=True, normalizer_eps=1e-300)
    _, *found = one_step("sogclr", options, x, z, 7.0)
    leaves = [t.clone().requires_grad_() for t in (x, z)]
    wanted = torch.autograd.grad(info_nce(*leaves, torch.tensor(7.0).double()), leaves)
    for a, b in zip(found, wanted):
        close(a, 2 / 7 * b)


def test_sogclr_that_forgets_descends_the_mean_of_log_g():
    x, z, *_ = data(0)
    value, *found = one_step("sogclr", SogClrOptions(gamma=1.0, normalizer_eps=1e-300), x, z, 7.0)
    leaves = [t.clone().requires_grad_() for t in (x, z)]
    a = leaves[0] @ leaves[1].T
    eye = torch.eye(B, dtype=torch.bool)
    goal = 0
    for cosines in (a, a.T):
        margins = (cosines - cosines.diagonal()[:, None]).masked_fill(eye, -math.inf)
        goal = goal + ((7 * margins).logsumexp(1) - math.log(B - 1)).mean() / 7
    close(value, goal.detach())
    for a, b in zip(found, torch.autograd.grad(goal, leaves)):
        close(a, b)


def test_v2_whose_temperatures_stand_still_is_v1_times_tau():
    x, z, *_ = data(0)
    v2 = one_step(
        "fastclip-v2", FastClipV2Options(rho=0.0), x, z, 7.0, replace(CONTEXT, lr_tau=0.0)
    )
    v1 = one_step("fastclip-v1", FastClipV1Options(), x, z, 7.0)
    for a, b in zip(v2[:3], v1[:3]):
        close(a, b / 7)


@pytest.mark.parametrize("twice", [False, True])
def test_the_scale_gradient_of_v3_is_the_closed_form(twice):
    """dL/dl = -tau (rho + mean(lambda) / 2) + k / 2 mean_i sum_j q_ij a_ij."""
    x, z, *_ = data(0)
    options = FastClipV3Options(rho=2.0, normalizer_eps=1e-300, published_tau_gradient=twice)
    *_, got = one_step("fastclip-v3", options, x, z, 7.0)
    cosines, form, tau = x @ z.T, torch.zeros(()).double(), 1 / 7
    for s in (cosines, cosines.T):
        margins = s - s.diagonal()[:, None]
        e = (margins / tau).masked_fill(torch.eye(B, dtype=torch.bool), -math.inf)
        logs = e.logsumexp(1) - math.log(B - 1)
        q = (e - logs[:, None]).exp() / (B - 1)
        form += -tau * logs.mean() / 2 + (1 + twice) / 2 * (q * margins).sum(1).mean()
    close(got * 7, form - tau * 2.0)  # by the scale to by its logarithm


@pytest.mark.parametrize("case", CASES, ids=[f"{c.name}-{k}" for k, c in enumerate(CASES)])
def test_a_negative_that_beats_its_positive_by_two_at_tau_of_5_thousandths(case):
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
    z = torch.tensor([[-1.0, 0.0], [1.0, 0.0], [0.0, -1.0]])
    options = case.options
    if hasattr(options, "tau_range"):
        options = replace(options, tau_range=(0.005, 1.0))
    for part in one_step(case.name, options, x, z, 200.0):
        assert part.isfinite().all()


def test_at_fixed_features_the_normaliser_comes_near_geometrically():
    x, z, *_ = data(0)
    ids, world = torch.arange(B), World()
    context = replace(CONTEXT, images=B, captions=B)
    loss = build_loss("sogclr", SogClrOptions(gamma=0.4), context).double()
    kept = []
    for step in range(4):
        at = (x, z) if step else (z, x.roll(1, 0))
        loss.pair_terms(*at, torch.tensor(7.0).double(), batch_of(ids, ids), world)
        kept.append(loss.tables.images.rows[:, 0].exp())
    goal = kept[1] - 0.6 * kept[0]
    for before, after in pairwise(kept[1:]):
        close(after - goal / 0.4, 0.6 * (before - goal / 0.4))


def test_half_precision_features_are_scored_in_single():
    """The error is that of rounding the features, not of sums and exponentials."""
    x, z, *_ = data(0)
    half = [t.to(torch.bfloat16) for t in (x, z)]
    options = FastClipV3Options()
    got = one_step("fastclip-v3", options, *(t.float() for t in half), 100.0)
    exact = one_step("fastclip-v3", options, *(t.double() for t in half), 100.0)
    torch.testing.assert_close(got[0].double(), exact[0], rtol=1e-5, atol=1e-6)
    loss = build_loss("fastclip-v3", options, replace(CONTEXT, images=B, captions=B))
    term = loss.pair_terms(*half, torch.tensor(100.0), batch_of(*[torch.arange(B)] * 2), World())
    assert torch.equal(sum(term.values()), got[0])


def test_a_sample_that_comes_twice_gets_the_mean_in_any_order():
    torch.manual_seed(0)
    ids, new = torch.tensor([3, 1, 3, 0, 3]), torch.randn(5, 2)
    one, other = (SampleTable(5, {"a": 0.0, "b": 7.0}) for _ in range(2))
    one.update(ids, new)
    order = torch.tensor([4, 3, 2, 1, 0])
    other.update(ids[order], new[order])
    assert torch.equal(one.rows, other.rows)
    torch.testing.assert_close(one.rows[3], new[[0, 2, 4]].mean(0))
    assert one.rows[2].tolist() == [0.0, 7.0] and one.gather(ids)["b"].shape == (5,)


def one_batch(name, options, spoil):
    """State of a loss after three sound steps, with a spoilt one between them or not."""
    context = replace(CONTEXT, images=B, captions=B, width=D, steps_per_epoch=100)
    loss, world = build_loss(name, options, context), World()
    for step in range(3):
        x, z, *_ = data(step)
        batch = batch_of(torch.arange(B), torch.arange(B))
        for bad in (True, False) if step == spoil else (False,):
            image = x.float().clone()
            image[3] = math.nan if bad else image[3]
            loss.observe(batch, world)
            loss.pair_terms(image, z.float(), torch.tensor(7.0), batch, world)
    return {k: v for k, v in loss.state_dict().items() if isinstance(v, torch.Tensor)}


@pytest.mark.parametrize(
    "name", ["sogclr", "isogclr", "fastclip-v2", "fastclip-v3", "neuclip", "onlineclr"]
)
@pytest.mark.parametrize("at", [0, 1])
def test_a_batch_that_is_not_finite_leaves_no_trace(name, at):
    """Its update is left out (--on-nonfinite skip); so is what it would leave in the tables."""
    options = LOSS_OPTIONS[name]()
    if name == "neuclip":
        options = replace(options, npn_num_protos=20)
    sound, spoilt = (one_batch(name, options, spoil) for spoil in (None, at))
    for key, kept in sound.items():
        torch.testing.assert_close(spoilt[key], kept, msg=key)


@pytest.mark.parametrize("ids", [[0, 5], [-1, 2]])
def test_a_sample_without_a_row_is_named(ids):
    with pytest.raises(UserError, match=r"sample (5|-1) is not among the 5"):
        SampleTable(5, {"a": 0.0}).gather(torch.tensor(ids))


def test_a_table_of_other_data_is_refused():
    saved = SampleTable(5, {"a": 0.0}).state_dict()
    with pytest.raises(UserError, match=r"1 number.s. of 5 samples, this run 1 of 6"):
        SampleTable(6, {"a": 0.0}).load_state_dict(saved)


def test_a_table_on_the_host_stays_there():
    table = torch.nn.Sequential(SampleTable(4, {"a": 0.0}, "host"), SampleTable(4, {"a": 0.0}))
    table.to("meta").double()
    host, device = table
    assert host.rows.device.type == "cpu" and device.rows.device.type == "meta"
    assert host.rows.dtype == device.rows.dtype == torch.float64
