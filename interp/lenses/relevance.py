"""Relevance maps: which patches a picture's feature, or its cosine with a text, draws on.

Every method reads hook sites and leaves no trace on the tower: gradients are taken with respect to
hooked values by `torch.autograd.grad`, whether or not parameters require them. A relevance between
tokens becomes a map by its read rows: those of the tokens that the tower pools, the class token's
or the mean over the patches'.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from interp.hooked import HookedVisionTransformer
from interp.hooked.blocks import wide
from superclip.errors import UserError, nearest

Tower = HookedVisionTransformer
Images = Float[Tensor, "image 3 height width"]
Texts = Float[Tensor, "image embed"]
Maps = Float[Tensor, "image patch"]
Square = Float[Tensor, "image query key"]
Pool = Literal["tower", "tokens"]
Form = Literal["maskclip", "sclip"]
Method = Callable[[Tower, Images, Texts], Maps]

PATTERN_BUDGET = 2**24
"""Attention values held at once, 64 MiB in float32: three pictures of a B/16."""


@torch.no_grad()
def raw_attention(tower: Tower, images: Images) -> Square:
    """The last layer's attention, mean over heads; rows sum to 1."""
    site = f"blocks.{tower.cfg.n_layers - 1}.attn.hook_pattern"
    return tower.run_with_cache(images, names_filter=site)[1][site].mean(dim=1)


@torch.no_grad()
def rollout(tower: Tower, images: Images) -> Square:
    """Product over layers of (attention's mean over heads + I) / 2; rows sum to 1.

    Abnar and Zuidema, "Quantifying Attention Flow in Transformers" (2020): I is the residual path.
    """
    eye = _eye(tower, images)
    rolled = [eye]

    def onwards(pattern: Tensor, hook: Any) -> None:
        rolled.append((pattern.to(eye).mean(dim=1) + eye) / 2 @ rolled.pop())

    tower.run_with_hooks(images, fwd_hooks=[(lambda name: name.endswith("hook_pattern"), onwards)])
    return rolled[0]


def chefer(tower: Tower, images: Images, texts: Texts, start_layer: int = -1) -> Square:
    """How much each key matters to each query for the cosine y of feature and text: R - I.

    R = I; from `start_layer` on R += mean over heads of (dy/dA * A)+ times R (Chefer et al.,
    "Generic Attention-model Explainability", 2021, eq. 5 and 6). Over several layers R depends on
    the scale of y, which is the cosine and not the logit.

    Args:
        start_layer: negative from the end; the default is the authors' for CLIP.
    """
    layers, patterns = _layers(tower, start_layer), []
    record = _recorder(patterns)
    with _graph(tower, images, layers[0]) as stream:
        with tower.hooks(fwd_hooks=[(f"blocks.{k}.attn.hook_pattern", record) for k in layers]):
            score = _cosine(tower(stream, start_at_layer=layers[0]), texts).sum()
        gradients = torch.autograd.grad(score, patterns)
    eye = _eye(tower, images)
    found = torch.zeros_like(eye)
    for pattern, gradient in zip(patterns, gradients, strict=True):
        step = (pattern.detach().to(eye) * gradient.to(eye)).clamp_min(0).mean(dim=1)
        found = found + step @ (found + eye)
    return found


def legrad(
    tower: Tower, images: Images, texts: Texts, start_layer: int = -2, pool: Pool = "tower"
) -> Maps:
    """Sum over layers of (ds_l/dA_l)+, mean over heads and queries (Bousselham et al., 2024).

    s_l is the cosine of the text with the output of a tower that ended after layer l. No minimum is
    taken off the map.

    Args:
        start_layer: negative from the end; the default is the last two.
        pool: as the `tower` does (their paper), or the mean of all `tokens` (their code).
    """
    layers, n_layers = _layers(tower, start_layer), tower.cfg.n_layers
    patterns, streams = [], []
    hooks: dict[str, Callable[..., Any]] = {
        # Cut, s_l reaches A_l alone, and one backward pass serves all layers.
        "hook_resid_pre": lambda stream, hook: stream.detach(),
        "attn.hook_pattern": _recorder(patterns),
        "hook_resid_post": _recorder(streams),
    }
    sites = [(f"blocks.{k}.{site}", hook) for k in layers for site, hook in hooks.items()]
    with _graph(tower, images, layers[0]) as stream:
        with tower.hooks(fwd_hooks=sites):
            tower(stream, start_at_layer=layers[0], stop_at_layer=n_layers)
        if pool == "tower":
            ends = [tower(stream, start_at_layer=n_layers) for stream in streams]
        else:
            ends = [_projected(tower, stream.mean(dim=1)) for stream in streams]
        scores = torch.stack([_cosine(features, texts) for features in ends])
        gradients = torch.autograd.grad(scores.sum(), patterns)
    maps = [g.to(wide(g.dtype)).clamp_min(0).mean(dim=(1, 2)) for g in gradients]
    return torch.stack(maps).sum(dim=0)[:, tower.cfg.prefix_tokens :]


def gradcam(tower: Tower, images: Images, texts: Texts) -> Maps:
    """(sum over d of x_pd times the patches' mean of dy/dx_d)+, x being what enters the last block.

    Selvaraju et al., "Grad-CAM" (2017), eq. 1 and 2. Behind that block, the feature of a tower that
    pools the class token has no gradient at any patch.
    """
    last, first = tower.cfg.n_layers - 1, tower.cfg.prefix_tokens
    with _graph(tower, images, last) as stream:
        score = _cosine(tower(stream.requires_grad_(), start_at_layer=last), texts).sum()
        (gradient,) = torch.autograd.grad(score, [stream])
    x, gradient = (part.detach().to(wide(part.dtype))[:, first:] for part in (stream, gradient))
    return (x * gradient.mean(dim=1, keepdim=True)).sum(dim=-1).clamp_min(0)


@torch.no_grad()
def dense(tower: Tower, images: Images, form: Form) -> Float[Tensor, "image patch embed"]:
    """Patches in the joint space, not normalised, by another attention in the last block.

    maskclip: v, `out_proj`, `ln_post`, `proj`; no token looks at another, and residual path and MLP
    of the block are left out (Zhou et al., "Extract Free Dense Labels from CLIP", 2022). sclip:
    softmax(q q') + softmax(k k'), and the rest as it is (Wang et al., "SCLIP", 2024).
    """
    block, kept = f"blocks.{tower.cfg.n_layers - 1}", {}

    def keep(value: Tensor, hook: Any) -> None:
        kept[hook.name.rpartition("hook_")[2]] = value

    def swap(pattern: Tensor, hook: Any) -> Tensor:
        if form == "maskclip":
            return _eye(tower, images).to(pattern)[:, None].expand_as(pattern)
        parts = (kept[name].transpose(1, 2) for name in "qk")
        q, k = (((x * x.shape[-1] ** -0.5) @ x.mT).softmax(dim=-1) for x in parts)
        return q + k

    sites = [f"{block}.{site}" for site in ("attn.hook_q", "attn.hook_k", "hook_attn_out")]
    swapped = (f"{block}.attn.hook_pattern", swap)
    with tower.hooks(fwd_hooks=[*((site, keep) for site in sites), swapped]):
        stream = tower(images, stop_at_layer=tower.cfg.n_layers)
    stream = kept["attn_out"] if form == "maskclip" else stream
    return _projected(tower, stream[:, tower.cfg.prefix_tokens :])


def _dense_map(tower: Tower, images: Images, texts: Texts, form: Form) -> Maps:
    """Cosine of each patch with the text, above that of the picture's least patch."""
    cosine = _cosine(dense(tower, images, form), texts[:, None])
    return cosine - cosine.amin(dim=-1, keepdim=True)


def _read_rows(of: Callable[..., Square], reads_text: bool = True, **options: Any) -> Method:
    def read(tower: Tower, images: Images, texts: Texts) -> Maps:
        square = of(tower, images, *([texts] if reads_text else []), **options)
        first, patches = tower.cfg.prefix_tokens, square[..., tower.cfg.prefix_tokens :]
        return patches[:, 0] if tower.cfg.pool_type == "tok" else patches[:, first:].mean(dim=1)

    return read


METHODS: dict[str, Method] = {
    "attention": _read_rows(raw_attention, reads_text=False),
    "rollout": _read_rows(rollout, reads_text=False),
    "chefer": _read_rows(chefer),
    "chefer-all": _read_rows(chefer, start_layer=0),
    "legrad": legrad,
    "legrad-all": partial(legrad, start_layer=0),
    "legrad-mean": partial(legrad, pool="tokens"),
    "legrad-mean-all": partial(legrad, start_layer=0, pool="tokens"),
    "gradcam": gradcam,
    "maskclip": partial(_dense_map, form="maskclip"),
    "sclip": partial(_dense_map, form="sclip"),
}
READ_NO_TEXT = ("attention", "rollout")
HOLD_CLASS_TOKEN = ("legrad-mean", "legrad-mean-all")


def methods_of(tower: Tower, wanted: str = "all") -> list[str]:
    """A comma list's methods, raw attention first; `all` are those that make sense of this tower.

    Raises:
        UserError: One does not exist, or does not fit this tower.
    """
    misfits = () if tower.cfg.pool_type == "tok" else HOLD_CLASS_TOKEN
    if wanted == "all":
        return [name for name in METHODS if name not in misfits]
    names = [name.strip() for name in wanted.split(",")]
    for name in names:
        if name not in METHODS:
            raise UserError(f"--methods {name!r} is unknown; {nearest(name, METHODS)}")
        if name in misfits:
            raise UserError(
                f"--methods {name}: it averages the class token with the patches, and this "
                "tower reads the patches alone; take legrad or legrad-all, which pool as it does"
            )
    return [name for name in METHODS if name in ("attention", *names)]


def relevance(tower: Tower, name: str, images: Images, texts: Float[Tensor, "text embed"]) -> Maps:
    """Maps of a method of `METHODS`, made to be scored as attention is: none below 0, sums of 1.

    A map without any mass becomes uniform. Pictures go through a few at a time (`PATTERN_BUDGET`).

    Args:
        texts: one an image, of any length but 0; those of `READ_NO_TEXT` do not look at them.

    Raises:
        UserError: As `methods_of`; there is not one text an image, or a map is not finite.
    """
    methods_of(tower, name)  # that it is one
    cfg = tower.cfg
    if tuple(texts.shape) != (len(images), cfg.embed_dim):
        raise UserError(f"texts are {list(texts.shape)}, not {[len(images), cfg.embed_dim]}")
    size = max(1, PATTERN_BUDGET // (cfg.n_layers * cfg.n_heads * cfg.n_ctx**2))
    chunks = zip(images.split(size), texts.split(size), strict=True)
    maps = torch.cat([METHODS[name](tower, *chunk).to(wide(cfg.dtype)) for chunk in chunks])
    if not bool(maps.isfinite().all()):
        raise UserError(f"{name} is not finite: pictures, texts or weights hold NaN or infinity")
    total = maps.sum(dim=-1, keepdim=True)
    return torch.where(total > 0, maps / torch.where(total > 0, total, 1), 1 / maps.shape[-1])


def _layers(tower: Tower, start_layer: int) -> range:
    """Layers from one on; all of them where fewer are asked for from the end."""
    every = range(tower.cfg.n_layers)
    if start_layer >= len(every):
        raise UserError(f"start_layer {start_layer}: the tower has layers 0 to {every[-1]}")
    return every[start_layer:]


def _eye(tower: Tower, images: Images) -> Square:
    n, dtype = tower.cfg.n_ctx, wide(tower.cfg.dtype)
    return torch.eye(n, dtype=dtype, device=images.device).expand(len(images), n, n)


def _recorder(values: list[Tensor]) -> Callable[..., None]:
    """A hook that keeps values; the graph begins there if no parameter requires gradients."""
    return lambda value, hook: values.append(value.requires_grad_())


@contextmanager
def _graph(
    tower: Tower, images: Images, layer: int
) -> Iterator[Float[Tensor, "image token d_model"]]:
    """The stream that enters a layer; within, gradients are on and the precision is full, whatever
    the caller's context."""
    off = torch.autocast(images.device.type, enabled=False)
    with torch.inference_mode(False), torch.enable_grad(), off:
        with torch.no_grad():
            stream = tower(images, stop_at_layer=layer)
        yield stream


def _projected(
    tower: Tower, stream: Float[Tensor, "*rows d_model"]
) -> Float[Tensor, "*rows embed"]:
    """Tokens through `ln_post` and `proj`, as the pooled one goes."""
    stream, proj = tower.ln_final(stream), tower.visual.proj
    return stream if proj is None else stream @ proj


def _cosine(
    features: Float[Tensor, "*rows embed"], texts: Float[Tensor, "*of_rows embed"]
) -> Float[Tensor, "*rows"]:
    return F.cosine_similarity(features, texts.to(features), dim=-1)
