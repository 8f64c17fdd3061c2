"""A vision tower, its ablations and its scores, one image, head and token at a time."""

import math

import numpy as np
import torch
import torch.nn.functional as F


def tower_activations(visual, image, replace=None):
    """Activations of one image `[3, h, w]`; `replace[layer, head]` `[token, d_head]` stands for z.

    Returns `features`, and lists over layers of `pattern` `[H, T, T]`, `z` `[T, H, d]` and
    `resid_post` `[T, D]`.
    """
    weights = dict(visual.named_parameters())
    pixels, (rows, columns) = visual.patch_size, visual.grid_size
    tokens = [weights["class_embedding"]]
    for row in range(rows):
        for column in range(columns):
            top, left = row * pixels[0], column * pixels[1]
            patch = image[:, top : top + pixels[0], left : left + pixels[1]]
            tokens.append((weights["conv1.weight"] * patch).sum(dim=(1, 2, 3)))
    x = torch.stack(tokens) + weights["positional_embedding"]
    x = norm(x, visual.ln_pre)
    out = {"pattern": [], "z": [], "resid_post": []}
    for layer, block in enumerate(visual.transformer.resblocks):
        attn, heads = block.attn, block.attn.num_heads
        d_head = x.shape[1] // heads
        y = norm(x, block.ln_1)
        added = attn.out_proj.bias.clone()
        patterns, zs = [], []
        for head in range(heads):
            q, k, v = (
                y @ attn.in_proj_weight[start : start + d_head].T
                + attn.in_proj_bias[start : start + d_head]
                for start in (part * x.shape[1] + head * d_head for part in range(3))
            )
            pattern = torch.softmax(q @ k.T / math.sqrt(d_head), dim=-1)
            z = pattern @ v
            if replace is not None and (layer, head) in replace:
                z = replace[layer, head].to(z)
            added = added + z @ attn.out_proj.weight[:, head * d_head : (head + 1) * d_head].T
            patterns.append(pattern)
            zs.append(z)
        x = x + added * getattr(block.ls_1, "gamma", 1.0)
        x = x + block.mlp(norm(x, block.ln_2)) * getattr(block.ls_2, "gamma", 1.0)
        out["pattern"].append(torch.stack(patterns))
        out["z"].append(torch.stack(zs, dim=1))
        out["resid_post"].append(x)
    if not visual.final_ln_after_pool:
        x = norm(x, visual.ln_post)
    pooled = x[0] if visual.pool_type == "tok" else x[1:].mean(dim=0)
    if visual.final_ln_after_pool:
        pooled = norm(pooled, visual.ln_post)
    out["features"] = pooled if visual.proj is None else pooled @ visual.proj
    return out


def norm(x, module):
    if not isinstance(module, torch.nn.LayerNorm):
        return x
    centred = x - x.mean(dim=-1, keepdim=True)
    variance = (centred**2).mean(dim=-1, keepdim=True)
    return centred / torch.sqrt(variance + module.eps) * module.weight + module.bias


def sink_share(row, norms, received):
    """One head's share of attention to patches `row` `[P]` that falls on sinks, in numpy."""
    median = np.median(norms)
    deviation = np.median(np.abs(norms - median))
    on_sinks = sum(
        a
        for a, n, r in zip(row, norms, received, strict=True)
        if n > median + 6 * deviation or r > 5 / len(row)
    )
    return on_sinks / sum(row)


def margins(images, texts, owner):
    """Mean cosine with own captions minus the largest with another's, image by image."""
    out = []
    for i, image in enumerate(images):
        cosine = [float(F.cosine_similarity(image, text, dim=0)) for text in texts]
        own = [c for c, o in zip(cosine, owner, strict=True) if o == i]
        out.append(
            sum(own) / len(own) - max(c for c, o in zip(cosine, owner, strict=True) if o != i)
        )
    return out


def hits(images, texts, owner, k):
    """Whether an own caption is among the first k, wrong captions sorted before equal own ones."""
    out = []
    for i, image in enumerate(images):
        cosine = [float(F.cosine_similarity(image, text, dim=0)) for text in texts]
        order = sorted(range(len(texts)), key=lambda j: (-cosine[j], owner[j] == i))
        out.append(any(owner[j] == i for j in order[:k]))
    return out
