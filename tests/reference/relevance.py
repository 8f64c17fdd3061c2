"""Relevance maps of one image and one text, by loops over layers, heads, queries and keys."""

import math

import torch

from reference.hooked import norm


def tower(visual, image, last=None):
    """One image `[3, h, w]` through the tower; `last(q, k)` `[t, d]` each replaces the softmax of
    the last block.

    Returns `features` and lists over layers: `pattern`, one `[t, t]` a head, each part of the
    graph, `pre` and `post` `[t, D]`; and `values`, the last block's v through `out_proj`.
    """
    weights = dict(visual.named_parameters())
    (high, wide), (rows, columns) = visual.patch_size, visual.grid_size
    tokens = [weights["class_embedding"]]
    for row in range(rows):
        for column in range(columns):
            cut = image[:, row * high : (row + 1) * high, column * wide : (column + 1) * wide]
            tokens.append((weights["conv1.weight"] * cut).sum(dim=(1, 2, 3)))
    x = norm(torch.stack(tokens) + weights["positional_embedding"], visual.ln_pre)
    out = {"pattern": [], "pre": [], "post": []}
    blocks = visual.transformer.resblocks
    for block in blocks:
        out["pre"].append(x)
        attn, width = block.attn, x.shape[1]
        d = width // attn.num_heads
        y = norm(x, block.ln_1)
        patterns, z, values = [], [], []
        for head in range(attn.num_heads):
            q, k, v = (
                y @ attn.in_proj_weight[at : at + d].T + attn.in_proj_bias[at : at + d]
                for at in (part * width + head * d for part in range(3))
            )
            pattern = (q @ k.T / math.sqrt(d)).softmax(dim=-1)
            if last is not None and block is blocks[-1]:
                pattern = last(q, k)
            patterns.append(pattern)
            values.append(v)
            z.append(pattern @ v)
        gain = getattr(block.ls_1, "gamma", 1.0)
        out["pattern"].append(patterns)
        out["values"] = attn.out_proj(torch.cat(values, dim=1)) * gain
        x = x + attn.out_proj(torch.cat(z, dim=1)) * gain
        x = x + block.mlp(norm(x, block.ln_2)) * getattr(block.ls_2, "gamma", 1.0)
        out["post"].append(x)
    out["features"] = pooled(visual, x)
    return out


def project(visual, x):
    return x if visual.proj is None else x @ visual.proj


def pooled(visual, x):
    if visual.pool_type == "tok":
        return project(visual, norm(x[0], visual.ln_post))
    if visual.final_ln_after_pool:
        return project(visual, norm(x[1:].mean(dim=0), visual.ln_post))
    return project(visual, torch.stack([norm(t, visual.ln_post) for t in x[1:]]).mean(dim=0))


def cosine(a, b):
    return (a @ b) / (a @ a).sqrt() / (b @ b).sqrt()


def read(visual, square):
    """The class token's row, or the mean of the patches' rows, without the class token's column."""
    if visual.pool_type == "tok":
        return square[0, 1:]
    return torch.stack([row[1:] for row in square[1:]]).mean(dim=0)


def attention(visual, image, text):
    heads = tower(visual, image)["pattern"][-1]
    return read(visual, sum(heads) / len(heads))


def rollout(visual, image, text):
    rolled = None
    for heads in tower(visual, image)["pattern"]:
        mixed = 0.5 * sum(heads) / len(heads) + 0.5 * torch.eye(len(heads[0]))
        mixed = torch.stack([row / row.sum() for row in mixed])
        rolled = mixed if rolled is None else mixed @ rolled
    return read(visual, rolled)


def chefer(visual, image, text, start):
    found = tower(visual, image)
    y = cosine(found["features"], text)
    n = len(found["post"][0])
    relevance = torch.eye(n, dtype=torch.float64)
    for heads in found["pattern"][start:]:
        grads = torch.autograd.grad(y, heads, retain_graph=True)
        step = torch.zeros(n, n, dtype=torch.float64)
        for i in range(n):
            for j in range(n):
                for pattern, grad in zip(heads, grads, strict=True):
                    step[i, j] += max(float((pattern[i, j] * grad[i, j]).detach()), 0) / len(heads)
        relevance = relevance + step @ relevance
    if visual.pool_type != "tok":
        relevance = relevance - torch.eye(n)
    return read(visual, relevance)


def legrad(visual, image, text, start, tokens=False):
    found = tower(visual, image)
    n = len(found["post"][0])
    total = torch.zeros(n, dtype=torch.float64)
    for heads, post in list(zip(found["pattern"], found["post"], strict=True))[start:]:
        if tokens:
            s = cosine(project(visual, norm(post.mean(dim=0), visual.ln_post)), text)
        else:
            s = cosine(pooled(visual, post), text)
        for grad in torch.autograd.grad(s, heads, retain_graph=True):
            for query in range(n):
                for key in range(n):
                    total[key] += max(float(grad[query, key]), 0) / len(heads) / n
    return total[1:]


def gradcam(visual, image, text):
    found = tower(visual, image)
    x = found["pre"][-1]
    (grad,) = torch.autograd.grad(cosine(found["features"], text), [x])
    alpha = sum(grad[1:]) / (len(grad) - 1)
    return torch.stack([(row @ alpha).clamp_min(0) for row in x[1:]])


def lifted(visual, rows, text):
    cosines = torch.stack([cosine(project(visual, norm(r, visual.ln_post)), text) for r in rows])
    return cosines - cosines.min()


def maskclip(visual, image, text):
    return lifted(visual, tower(visual, image)["values"][1:], text)


def sclip(visual, image, text):
    def last(q, k):
        d = q.shape[1]
        return torch.softmax(q @ q.T / d**0.5, dim=1) + torch.softmax(k @ k.T / d**0.5, dim=1)

    return lifted(visual, tower(visual, image, last)["post"][-1][1:], text)


METHODS = {
    "attention": attention,
    "rollout": rollout,
    "chefer": lambda v, i, t: chefer(v, i, t, -1),
    "chefer-all": lambda v, i, t: chefer(v, i, t, 0),
    "legrad": lambda v, i, t: legrad(v, i, t, -2),
    "legrad-all": lambda v, i, t: legrad(v, i, t, 0),
    "legrad-mean": lambda v, i, t: legrad(v, i, t, -2, tokens=True),
    "legrad-mean-all": lambda v, i, t: legrad(v, i, t, 0, tokens=True),
    "gradcam": gradcam,
    "maskclip": maskclip,
    "sclip": sclip,
}


def specificity(maps, masks, valid, auroc):
    """Own-mask AUROC minus the mean over the picture's other masks, mean over its categories.

    `maps` and `masks` are one a category of one picture; `auroc(map, mask, valid)` a float.
    """
    own, gaps = [], []
    for a, of_a in enumerate(maps):
        others = [auroc(of_a, mask, valid) for b, mask in enumerate(masks) if b != a]
        own.append(auroc(of_a, masks[a], valid))
        gaps.append(own[-1] - sum(others) / len(others))
    return sum(own) / len(own), sum(gaps) / len(gaps)
