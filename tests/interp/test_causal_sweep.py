"""The exact sweep: equal to one plain forward a unit, in bounded memory; and its bank on disk."""

import json
import weakref
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from open_clip.transformer import QuickGELU, VisionTransformer
from reference.causal import features_without, image_scores, patch_means, removed_norms
from safetensors.torch import load_file, save_file
from sklearn.metrics import average_precision_score
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from interp.causal.ablation import ablate, mean_z
from interp.causal.bank import AblationBank, BankKey
from interp.causal.cost import flop_share, sweep_macs
from interp.causal.effects import Questions, average_precision, effects
from interp.causal.sweep import ablate_batch, ablated_embeddings
from interp.causal.units import (
    Ablation,
    Unit,
    derangements,
    every,
    group,
    mean_activations,
)
from interp.heads import Head
from interp.hooked import HookedVisionTransformer, TowerConfig
from superclip.errors import UserError
from superclip.model.superclip import TokenHead

KINDS, TOKENS = ("zero", "mean", "resample"), ("all", "class")
TOWERS = {
    "tok": {},
    "QuickGELU": {"act_layer": QuickGELU, "no_ln_pre": True},
    "LayerScale": {"ls_init_value": 0.7, "image_size": (24, 16)},
    "avg": {"pool_type": "avg"},
    "avg, norm after pool": {"pool_type": "avg", "final_ln_after_pool": True},
    "tok, norm after pool": {"final_ln_after_pool": True},
    "two layers": {"layers": 2},
    "one layer": {"layers": 1},
    "one layer, avg": {"layers": 1, "pool_type": "avg"},
}


def build(dtype=torch.float64, **changes) -> VisionTransformer:
    """A tower in which every parameter matters."""
    options = {
        "image_size": 24, "patch_size": 8, "width": 16, "layers": 4, "heads": 2,
        "mlp_ratio": 3.0, "output_dim": 12,
    }  # fmt: skip
    visual = VisionTransformer(**(options | changes))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in visual.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scale = 0.3 if parameter.ndim == 1 else 1.5 / parameter[0].numel() ** 0.5
            is_gain = "gamma" in name or ("ln_" in name and name.endswith("weight"))
            parameter.copy_(float(is_gain) + scale * noise)
    return visual.to(dtype).eval()


def pictures(visual, n=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(n, 3, *visual.image_size, generator=generator)
    return images.to(visual.conv1.weight.dtype)


def hooked(dtype=torch.float64, **changes):
    return HookedVisionTransformer(build(dtype, **changes), check=False)


def all_units(cfg):
    """Of every sort, out of the tower's order."""
    last = cfg.n_layers - 1
    units = [unit for what in ("layer", "mlp", "attention", "head") for unit in every(cfg, what)]
    crossing = [
        group([Head(last, 1), Head(0, 0), Head(last // 2, 1)], "crossing"),
        Unit("mixed", (Head(last // 2, 0),), tuple({0, last})),
    ]
    return crossing + units[::-1]


def options(tower, images, kind, tokens):
    """An ablation, its donors, and what stands in, for the reference."""
    sites = [site for site in tower.hook_dict if site.endswith(("hook_z", "hook_mlp_out"))]
    if kind == "zero":
        return Ablation("zero", tokens), [], dict.fromkeys(sites, 0)
    with torch.no_grad():
        others = torch.roll(images, 1, 0)
        taken = dict(tower.run_with_cache(others, names_filter=sites)[1].items())
    if kind == "resample":
        return Ablation("resample", tokens), [others], taken
    means = mean_activations(tower, [others])
    return Ablation("mean", tokens, *means), [], {s: taken[s].mean(0, True) for s in sites}


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TOWERS)
def test_equals_a_plain_forward_for_every_unit(name, kind, tokens):
    tower = hooked(**TOWERS[name])
    images = pictures(tower.visual)
    ablation, donors, stand_in = options(tower, images, kind, tokens)
    units = all_units(tower.cfg)
    found = ablate_batch(tower, images, ablation, units, donors)
    assert found.features.shape == (1, len(units), 3, 12)
    with torch.no_grad():
        assert torch.equal(found.intact, tower(images))
        activations = tower.run_with_cache(images)[1]
        pooled = (
            slice(0, 1) if tower.cfg.pool_type == "tok" or tokens == "class" else slice(1, None)
        )
        for unit, features, removed in zip(units, found.features[0], found.removed, strict=True):
            plain = features_without(tower, images, unit.heads, unit.mlps, tokens, stand_in)
            assert (features - plain).abs().max() <= 1e-10 * plain.abs().max(), unit.name
            norms = removed_norms(tower, activations, unit.heads, unit.mlps, stand_in, pooled)
            torch.testing.assert_close(removed, norms)
    never_read = tower.cfg.pool_type == "avg" and tokens == "class"
    change = (found.features[0] - found.intact).abs().amax(dim=(1, 2))
    for unit, size in zip(units, change.tolist(), strict=True):
        assert (size < 1e-9) == (never_read and unit.layers == [tower.cfg.n_layers - 1]), unit.name


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("name", ["tok", "LayerScale", "avg, norm after pool", "one layer, avg"])
def test_patch_means_equal_a_plain_forward(name, tokens):
    """What SuperCLIP's token head reads, beside the features, which stay what they were."""
    tower = hooked(**TOWERS[name])
    images, units = pictures(tower.visual), all_units(tower.cfg)
    ablation, donors, stand_in = options(tower, images, "mean", tokens)
    plain = ablate_batch(tower, images, ablation, units, donors)
    found = ablate_batch(tower, images, ablation, units, donors, patches=True)
    torch.testing.assert_close(found.features[..., :12], plain.features, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.removed, plain.removed)
    with torch.no_grad():
        for unit, means in zip(units, found.features[0, ..., 12:], strict=True):
            expected = patch_means(tower, images, unit.heads, unit.mlps, tokens, stand_in)
            torch.testing.assert_close(means, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("kind", ["zero", "mean"])
@pytest.mark.parametrize("name", ["tok", "LayerScale", "avg"])
def test_float32_equals_the_ablate_block(name, kind, tokens):
    tower = hooked(torch.float32, **TOWERS[name])
    images = pictures(tower.visual)
    means = mean_z(tower, [images[:2]]) if kind == "mean" else None
    units = [*every(tower.cfg, "head"), group([Head(0, 1), Head(2, 0)])]
    found = ablate_batch(tower, images, Ablation(kind, tokens, means), units).features[0]
    with torch.no_grad():
        for unit, features in zip(units, found, strict=True):
            with ablate(tower, unit.heads, kind, means, tokens):
                plain = tower(images)
            assert (features - plain).abs().max() <= 5e-5 * plain.abs().max()


def test_half_precision_agrees_in_direction():
    tower = hooked(torch.bfloat16)
    images, units = pictures(tower.visual), every(tower.cfg, "head")
    found = ablate_batch(tower, images, Ablation("zero"), units)
    assert found.features.dtype == torch.bfloat16
    with torch.no_grad():
        for unit, features in zip(units, found.features[0], strict=True):
            with ablate(tower, unit.heads, "zero"):
                plain = tower(images)
            assert (torch.cosine_similarity(features.float(), plain.float()) > 0.99).all()


def test_draws_and_batches_join_in_order():
    tower = hooked()
    images, units = pictures(tower.visual, 5), every(tower.cfg, "head")
    donors = derangements(5, 3, seed=0)
    ablation = Ablation("resample", "class")
    whole = ablate_batch(tower, images, ablation, units, [images[rows] for rows in donors])
    joined = ablated_embeddings(
        tower, images.split(2), ablation, units, [images[rows].split(2) for rows in donors]
    )
    for got, expected in zip(joined, whole, strict=True):
        torch.testing.assert_close(got, expected)
    each = [ablate_batch(tower, images, ablation, units, [images[rows]]) for rows in donors]
    torch.testing.assert_close(whole.features, torch.cat([one.features for one in each]))
    torch.testing.assert_close(whole.removed, torch.stack([one.removed for one in each]).mean(0))


def test_nothing_is_left_on_the_users_model():
    visual = build().train()
    visual.transformer.resblocks[0].requires_grad_(False)
    tower, images = HookedVisionTransformer(visual), pictures(visual)
    state = {name: value.clone() for name, value in visual.state_dict().items()}
    modules = {name: dict(vars(module)) for name, module in visual.named_modules()}
    asked = {name: p.requires_grad for name, p in visual.named_parameters()}
    before = visual(images)
    ablation, donors, _ = options(tower, images, "resample", "class")
    found = ablate_batch(
        tower, images, ablation, all_units(tower.cfg), donors, watch=lambda _: None
    )
    assert not any(part.requires_grad for part in found)
    assert torch.equal(visual(images), before) and visual.training
    assert {name: p.requires_grad for name, p in visual.named_parameters()} == asked
    assert all(p.grad is None for p in visual.parameters())
    assert visual.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in visual.state_dict().items())
    for name, module in visual.named_modules():
        assert vars(module).keys() == modules[name].keys()
        assert not module._forward_hooks and not module._forward_pre_hooks
    assert not tower.list_hooks() and torch.is_grad_enabled()


class Peak(TorchDispatchMode):
    """Most bytes that tensors held at once, those that were there before aside."""

    def __init__(self, before):
        super().__init__()
        self.known = {t.untyped_storage().data_ptr() for t in before}
        self.held, self.live, self.peak = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.numel():
                self.hold(tensor)
        return out

    def hold(self, tensor):
        storage = tensor.untyped_storage()
        place, size = storage.data_ptr(), storage.nbytes()
        if place in self.known:
            return
        if place not in self.held:
            self.held[place] = 0
            self.live += size
            self.peak = max(self.peak, self.live)
        self.held[place] += 1
        weakref.finalize(tensor, self.drop, place, size)

    def drop(self, place, size):
        self.held[place] -= 1
        if not self.held[place]:
            del self.held[place]
            self.live -= size


@pytest.mark.parametrize("kind, tokens", [("zero", "all"), ("resample", "class")])
@pytest.mark.parametrize("changes", [{}, {"act_layer": QuickGELU, "pool_type": "avg"}])
def test_memory_is_bounded_and_changes_nothing(changes, kind, tokens):
    tower = hooked(torch.float32, width=32, layers=3, image_size=40, **changes)
    images, units = pictures(tower.visual, 4), all_units(tower.cfg)[:8]
    ablation, donors, _ = options(tower, images, kind, tokens)
    donors = donors * 2  # two draws
    found = ablate_batch(tower, images, ablation, units, donors)
    result = sum(part.nbytes for part in found)
    with pytest.raises(UserError, match="one image takes") as error:
        ablate_batch(tower, images, ablation, units, donors, max_memory=100)
    least = float(str(error.value).split("one image takes ")[1].split(" MiB")[0]) * 2**20
    for budget in (int(least * 1.01), int(least * 4.3)):
        known = [images, *donors, *tower.visual.parameters()]
        with Peak(known) as peak:
            bounded = ablate_batch(tower, images, ablation, units, donors, max_memory=budget)
        assert 0.5 * budget < peak.peak < budget + 3 * result  # parts and their whole
        torch.testing.assert_close(bounded.features, found.features, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("pool", ["tok", "avg"])
def test_operations_are_those_foretold(pool, tokens):
    tower = hooked(torch.float32, pool_type=pool)
    cfg, images = tower.cfg, pictures(tower.visual, 5)
    with torch.no_grad(), FlopCounterMode(display=False) as plain:
        tower(images)
    with FlopCounterMode(display=False) as sweep:
        ablate_batch(tower, images, Ablation("zero", tokens), every(cfg, "head"))
    beside = sweep.get_total_flops() - plain.get_total_flops()
    assert beside == 2 * 5 * sweep_macs(cfg, tokens)
    share = beside / (plain.get_total_flops() * cfg.n_layers * cfg.n_heads)
    assert flop_share(cfg, tokens) == pytest.approx(share, rel=1e-12)


def test_share_of_vit_b_32():
    sizes = {"n_layers": 12, "n_heads": 12, "d_model": 768, "d_head": 64, "d_mlp": 3072}
    cfg = TowerConfig(
        **sizes, embed_dim=512, image_size=(224, 224), patch_size=(32, 32), grid=(7, 7),
        activation="GELU", pool_type="tok", device=torch.device("cpu"), dtype=torch.float32,
    )  # fmt: skip
    assert flop_share(cfg) == pytest.approx(0.435, abs=5e-4)
    assert flop_share(cfg, "class") == pytest.approx(0.371, abs=5e-4)


@pytest.mark.parametrize("tokens", TOKENS)
def test_watchers_see_the_attention_under_ablation(tokens):
    tower = hooked()
    images, units = pictures(tower.visual), every(tower.cfg, "head")
    seen = []
    ablate_batch(
        tower, images, Ablation("zero", tokens), units, max_memory=10**5, watch=seen.append
    )
    assert sum(rows.rows[..., 0, 0].numel() for rows in seen) == 3 * 2 * (3 + 2 + 1)
    assert len(seen) > 6
    with torch.no_grad():
        for rows in seen:
            for number, of_unit in zip(rows.units, rows.rows, strict=True):
                assert units[number].layers[0] < rows.layer and rows.draw == 0
                with ablate(tower, units[number].heads, "zero", None, tokens):
                    cache = tower.run_with_cache(images[rows.images])[1]
                torch.testing.assert_close(of_unit, cache["pattern", rows.layer][:, :, 0])


def test_means_are_those_of_mean_z_and_of_the_mlps():
    tower = hooked()
    images = pictures(tower.visual, 5)
    z, mlp = mean_activations(tower, images.split(2))
    torch.testing.assert_close(z, mean_z(tower, [images]))
    with torch.no_grad():
        cache = tower.run_with_cache(images)[1]
    torch.testing.assert_close(mlp, torch.stack([cache["mlp_out", k].mean(0) for k in range(4)]))
    with pytest.raises(UserError, match="none"):
        mean_activations(tower, [])


def test_derangements_give_other_images_and_each_once():
    donors = derangements(7, 6, seed=3)
    for row in range(7):
        assert sorted(donors[:, row]) == [other for other in range(7) if other != row]
    assert (np.sort(donors, axis=1) == np.arange(7)).all()
    assert (derangements(7, 2, seed=3) == donors[:2]).all()
    assert (derangements(7, 6, seed=4) != donors).any()
    with pytest.raises(UserError, match="at least 8 images"):
        derangements(7, 7, seed=0)


@pytest.mark.parametrize(
    "units, changes, named",
    [
        ([], {}, "nothing to ablate"),
        ([Unit("L4H0", (Head(4, 0),))], {}, "no head L4H0"),
        ([Unit("L0H2", (Head(0, 2),))], {}, "no head L0H2"),
        ([Unit("L4.mlp", (), (4,))], {}, "no MLP in layer 4"),
        ([Unit("empty")], {}, "'empty' names no head"),
        ([Unit("a", (Head(0, 0),)), Unit("a", (Head(0, 1),))], {}, "two units are named 'a'"),
        (None, {"kind": "patch"}, "'patch' is unknown"),
        (None, {"tokens": "patch"}, "'patch' is unknown"),
        (None, {"kind": "mean"}, "needs mean_z"),
        (None, {"kind": "mean", "mean_z": torch.zeros(4, 10, 2, 8)}, "needs mean_mlp"),
        (None, {"mean_z": torch.zeros(4, 10, 2, 8)}, "takes no mean_z"),
        (None, {"kind": "mean", "mean_z": torch.zeros(4, 9, 2, 8)}, r"\[4, 9, 2, 8\]"),
        (None, {"kind": "resample"}, "needs donors"),
        (None, {"donors": 3}, "takes no donors"),
        (None, {"kind": "resample", "donors": 2}, "every image needs one"),
    ],
)
def test_bad_requests_are_named(units, changes, named):
    tower = hooked()
    images = pictures(tower.visual)
    changes = dict(changes)
    donors = [images[: changes.pop("donors")]] if "donors" in changes else []
    units = [*every(tower.cfg, "head"), *every(tower.cfg, "mlp")] if units is None else units
    with pytest.raises(UserError, match=named):
        ablate_batch(tower, images, Ablation(**changes), units, donors)


def test_hooks_and_no_images_are_refused():
    tower = hooked()
    images, units = pictures(tower.visual), every(tower.cfg, "head")
    with (
        pytest.raises(UserError, match="hooks are on the tower"),
        tower.hooks(fwd_hooks=[("hook_embed", lambda value, hook: None)]),
    ):
        ablate_batch(tower, images, Ablation(), units)
    with pytest.raises(UserError, match="no images"):
        ablated_embeddings(tower, [], Ablation(), units)


def bank_parts(n=7, kind="resample", **changes):
    """A tower, its images by rows, and the key of a bank of them."""
    tower = hooked(torch.float32)
    images = pictures(tower.visual, n)
    donors = derangements(n, 2, seed=0) if kind == "resample" else None
    units = [*every(tower.cfg, "layer")[::-1], *every(tower.cfg, "head")[:4]]
    options = {"checkpoint_sha256": "a" * 64, "image_ids": [f"image {k}" for k in range(n)]}
    key = BankKey(**(options | changes), ablation=Ablation(kind), units=units, donors=donors)
    return tower, images, key


class Reader:
    """Hands on images by rows; counts the batches, or stops after some."""

    def __init__(self, images, stop=None):
        self.images, self.left, self.batches = images, stop, []

    def __call__(self, chunks):
        for rows in chunks:
            if self.left == 0:
                raise KeyboardInterrupt
            self.left = None if self.left is None else self.left - 1
            self.batches.append(list(rows))
            yield self.images[list(rows)]


def direct(tower, images, key):
    return ablate_batch(
        tower, images, key.ablation, key.units, [images[rows] for rows in key.donors]
    )


def test_bank_holds_what_was_computed(tmp_path):
    tower, images, key = bank_parts()
    bank = AblationBank.open(tmp_path / "bank", key, chunk=3)
    assert bank.missing == [0, 1, 2]
    with pytest.raises(UserError, match="3 of 3 parts are missing"):
        bank.read()
    bank.compute(tower, Reader(images))
    found = direct(tower, images, key)
    for opened in (bank, AblationBank.open(tmp_path / "bank")):
        assert opened.units == [unit.name for unit in key.units]
        torch.testing.assert_close(opened.read(), found.intact, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(opened.removed, found.removed, rtol=1e-5, atol=1e-6)
        for draw in range(2):
            for number, unit in enumerate(opened.units):
                change = opened.read(unit, draw) - opened.read()
                expected = found.features[draw, number] - found.intact
                error = (change - expected).abs().max() / expected.abs().max()
                assert error < 2**-10  # of the effect, not of the feature
        for unit, draw in (("L9H9", 0), ("L0H0", 2)):
            with pytest.raises(UserError, match="no unit"):
                opened.read(unit, draw)
    assert {p.name for p in (tmp_path / "bank").iterdir()} == {
        "bank.json", *(f"part-0000{k}.safetensors" for k in range(3)),
    }  # fmt: skip


def test_bank_goes_on_where_it_stopped_to_the_same_bytes(tmp_path, capsys):
    tower, images, key = bank_parts()
    whole = AblationBank.open(tmp_path / "whole", key, chunk=3)
    whole.compute(tower, Reader(images))
    bank = AblationBank.open(tmp_path / "bank", key, chunk=3)
    with pytest.raises(KeyboardInterrupt):
        bank.compute(tower, Reader(images, stop=4))  # one part takes three batches
    bank = AblationBank.open(tmp_path / "bank", key, chunk=5)  # keeps the parts of three
    assert bank.missing == [1, 2]
    reader = Reader(images)
    bank.compute(tower, reader)
    assert [3, 4, 5] in reader.batches and [0, 1, 2] not in reader.batches
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "bank" / path.name).read_bytes()
    AblationBank.open(tmp_path / "bank", key).compute(tower, Reader(images, stop=0))
    assert not capsys.readouterr().err


def flipped(path):
    data = bytearray(path.read_bytes())
    data[-5] ^= 4
    path.write_bytes(data)


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def swapped(path):
    path.write_bytes(path.with_name("part-00000.safetensors").read_bytes())


def unsigned(path):
    save_file(load_file(path), path)


@pytest.mark.parametrize("damage", [flipped, cut, swapped, unsigned])
def test_a_damaged_part_is_computed_anew_and_said(tmp_path, capsys, damage):
    tower, images, key = bank_parts()
    AblationBank.open(tmp_path, key, chunk=3).compute(tower, Reader(images))
    path = tmp_path / "part-00001.safetensors"
    before = path.read_bytes()
    damage(path)
    bank = AblationBank.open(tmp_path, key)
    said = capsys.readouterr().err.splitlines()
    assert bank.missing == [1] and len(said) == 1
    assert said[0].startswith("warning: ") and path.name in said[0] and "again" in said[0]
    bank.compute(tower, Reader(images))
    assert path.read_bytes() == before and not AblationBank.open(tmp_path).missing


def test_a_bank_of_something_else_is_refused(tmp_path, capsys):
    tower, images, key = bank_parts()
    AblationBank.open(tmp_path, key, chunk=3).compute(tower, Reader(images))
    for changes, named in (
        ({"checkpoint_sha256": "b" * 64}, "checkpoint_sha256"),
        ({"image_ids": [f"image {k}" for k in range(6, -1, -1)]}, "image_ids_sha256"),
        ({"kind": "zero"}, "kind"),
    ):
        other = bank_parts(**changes)[2]
        with pytest.raises(UserError, match=rf"something else \({named} differs"):
            AblationBank.open(tmp_path, other)
    assert not AblationBank.open(tmp_path, key).missing
    bank = AblationBank.open(tmp_path, other, overwrite=True)
    assert bank.missing == [0] and len(list(tmp_path.iterdir())) == 1
    (tmp_path / "bank.json").write_text("{")
    for match, given in (("can't be read", {}), ("can't be read", {"key": other})):
        with pytest.raises(UserError, match=match):
            AblationBank.open(tmp_path, **given)
    assert AblationBank.open(tmp_path, other, overwrite=True).missing == [0]
    (tmp_path / "bank.json").write_text(json.dumps({"schema": 99}))
    with pytest.raises(UserError, match="another schema"):
        AblationBank.open(tmp_path)
    with pytest.raises(UserError, match="no ablation bank"):
        AblationBank.open(tmp_path / "nowhere")
    assert not capsys.readouterr().err


def test_keys_that_contradict_themselves_are_refused(tmp_path):
    make = partial(BankKey, "a" * 64, ["x", "y"])
    unit = [Unit("L0H0", (Head(0, 0),))]
    same, twice = np.array([[0, 1]]), np.array([[1, 1]])
    for key, named in (
        (make(Ablation("zero"), unit, donors=same), "takes no donors"),
        (make(Ablation("resample"), unit), "needs donors"),
        (make(Ablation("resample"), unit, donors=same), "another one"),
        (make(Ablation("resample"), unit, donors=twice), "each image once"),
        (make(Ablation("mean"), unit), "needs mean_over"),
        (make(Ablation("zero"), unit, ["z"]), "takes no mean_over"),
    ):
        with pytest.raises(UserError, match=named):
            AblationBank.open(tmp_path / "bank", key)
    assert not (tmp_path / "bank").exists()


def test_features_that_are_not_finite_are_not_kept(tmp_path):
    tower, images, key = bank_parts()
    with torch.no_grad():
        tower.visual.proj[0, 0] = torch.nan
    bank = AblationBank.open(tmp_path, key)
    with pytest.raises(UserError, match="not finite"):
        bank.compute(tower, Reader(images))
    assert [path.name for path in tmp_path.iterdir()] == ["bank.json"]


@pytest.mark.parametrize("source", ["patches", "pooled"])
def test_effects_equal_the_naive_ones(tmp_path, source):
    tower, images, key = bank_parts(12, patches=source == "patches")
    bank = AblationBank.open(tmp_path, key, chunk=5)
    bank.compute(tower, Reader(images))
    generator = torch.Generator().manual_seed(5)
    owner = torch.arange(29) % 12
    texts = bank.read()[owner] + 3 * torch.randn(29, 12, generator=generator)
    classes = torch.randn(6, 12, generator=generator)
    present = np.random.default_rng(0).random((12, 6)) < 0.4
    head = TokenHead(16 if source == "patches" else 12, 30, source)
    columns = torch.arange(2, 30)
    held = torch.rand(12, 28, generator=generator) < 0.5
    asked = Questions(texts, owner, classes, present, head, columns, held)
    found = effects(bank, asked, draws=50)
    names = ["margin", "frozen", "token AP"]
    names += [f"{way}@{k}" for way in ("i2t", "t2i") for k in (1, 5, 10)]
    assert sorted(found.intact) == sorted(found.ablated) == sorted(names)
    assert found.captions.tolist() == [3] * 5 + [2] * 7 and found.units == bank.units
    assert found.removed.shape == (len(bank.units), 12)

    def naive(unit=None, draw=0):
        with torch.no_grad():
            what = "patches" if source == "patches" else "features"
            logits = head(bank.read(unit, draw, what))[:, columns]
        return image_scores(bank.read(unit, draw), texts, owner, bank.read(), logits, held)

    expected = naive()
    for name in names:
        np.testing.assert_allclose(found.intact[name], expected[name], atol=1e-6)
        assert found.ablated[name].shape == (len(bank.units), 12)
    for number, unit in enumerate(bank.units):
        draws = [naive(unit, draw) for draw in range(2)]
        for name in names:
            mean = np.mean([scores[name] for scores in draws], axis=0)
            np.testing.assert_allclose(found.ablated[name][number], mean, atol=1e-6)
    for name in set(names) - {"i2t@10", "t2i@10"}:
        assert (found.ablated[name] != found.intact[name]).any()

    def mean_ap(unit=None, draw=0):
        scores = F.normalize(bank.read(unit, draw), dim=1) @ F.normalize(classes, dim=1).T
        shown = present.any(0)
        return average_precision_score(present[:, shown], scores[:, shown], average="macro")

    whole, changes = found.mean_ap
    assert whole == pytest.approx(mean_ap())
    for unit, change in zip(bank.units, changes, strict=True):
        mean = np.mean([mean_ap(unit, draw) for draw in range(2)])
        assert change.estimate == pytest.approx(mean - whole)
        assert change.low <= change.high and change.n == 12
    assert (bare := effects(bank, Questions(texts, owner))).mean_ap is None
    assert "token AP" not in bare.intact
    with pytest.raises(UserError, match="outside the 12 images"):
        effects(bank, Questions(texts, owner + 1))
    with pytest.raises(UserError, match="1 of 12 images have no caption"):
        effects(bank, Questions(texts[:11], owner[:11]))
    if source == "pooled":
        with pytest.raises(UserError, match="no patch means"):
            bank.read(what="patches")


def test_average_precision_by_hand():
    scores = torch.tensor([[3.0, 2.0, 1.0, 0.0], [1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    right = torch.tensor([[True, False, True, False], [True, False, False, True], [False] * 4])
    # 1/1 and 2/3; the tie costs a place: 1/2, and 2/4; nothing to find.
    assert average_precision(scores, right).tolist() == pytest.approx([5 / 6, 1 / 2, 0.0])
