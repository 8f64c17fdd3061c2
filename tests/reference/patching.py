"""Activation patching of one pair, one cell at a time: every cell is a whole forward pass."""

import math

import torch
import torch.nn.functional as F

from reference.hooked import norm


def run(visual, image, stream=None, head=None):
    """One image `[3, h, w]` through the tower; what it computes on the way, and the features.

    `stream[entry]` is a list of (token, vector) put into the stream before layer `entry` (behind
    the last for the largest); `head[layer, index]` maps that head's (pattern, v) to its z.
    """
    stream, head = stream or {}, head or {}
    patches = visual.conv1(image[None])[0].flatten(1).T
    x = norm(
        torch.cat([visual.class_embedding[None], patches]) + visual.positional_embedding,
        visual.ln_pre,
    )
    seen = {"stream": [], "pattern": {}, "v": {}}
    blocks = visual.transformer.resblocks
    for layer in range(len(blocks) + 1):
        for token, vector in stream.get(layer, []):
            x = torch.cat([x[:token], vector[None], x[token + 1 :]])
        seen["stream"].append(x)
        if layer == len(blocks):
            break
        block = blocks[layer]
        attn, width = block.attn, x.shape[1]
        d_head, y, written = width // attn.num_heads, norm(x, block.ln_1), attn.out_proj.bias
        for index in range(attn.num_heads):
            rows = slice(index * d_head, (index + 1) * d_head)
            q, k, v = (
                y @ attn.in_proj_weight[part * width :][rows].T
                + attn.in_proj_bias[part * width :][rows]
                for part in range(3)
            )
            pattern = torch.softmax(q @ k.T / math.sqrt(d_head), dim=-1)
            seen["pattern"][layer, index], seen["v"][layer, index] = pattern, v
            z = head[layer, index](pattern, v) if (layer, index) in head else pattern @ v
            written = written + z @ attn.out_proj.weight[:, rows].T
        x = x + written * getattr(block.ls_1, "gamma", 1.0)
        x = x + block.mlp(norm(x, block.ln_2)) * getattr(block.ls_2, "gamma", 1.0)
    if not visual.final_ln_after_pool:
        x = norm(x, visual.ln_post)
    pooled = x[0] if visual.pool_type == "tok" else x[1:].mean(dim=0)
    if visual.final_ln_after_pool:
        pooled = norm(pooled, visual.ln_post)
    seen["features"] = pooled if visual.proj is None else pooled @ visual.proj
    return seen


def cells(visual, clean, corrupted, objects, direction):
    """Every cell of one pair: (direction, "heads", part, layer, head), (direction, "groups",
    entry, group) and (direction, "patches", entry, patch) -> how far the metric moves towards the
    other picture's."""

    def metric(seen):
        return float(F.normalize(seen["features"], dim=0) @ direction)

    both = {"clean": run(visual, clean), "corrupted": run(visual, corrupted)}
    pictures, out = {"clean": clean, "corrupted": corrupted}, {}
    for kind, here, there in (("denoise", "corrupted", "clean"), ("noise", "clean", "corrupted")):
        other, start = both[there], metric(both[here])
        sign = 1 if kind == "denoise" else -1

        def moved(sign=sign, here=here, start=start, **change):
            return sign * (metric(run(visual, pictures[here], **change)) - start)

        for layer, index in other["v"]:
            pattern, v = other["pattern"][layer, index], other["v"][layer, index]
            for part, z in (
                ("z", lambda _p, _v, pattern=pattern, v=v: pattern @ v),
                ("pattern", lambda _p, own, pattern=pattern: pattern @ own),
                ("value", lambda own, _v, v=v: own @ v),
            ):
                out[kind, "heads", part, layer, index] = moved(head={(layer, index): z})
        for entry, stream in enumerate(other["stream"]):
            inside = [1 + p for p, flag in enumerate(objects) if flag]
            outside = [1 + p for p, flag in enumerate(objects) if not flag]
            for group, tokens in (("class", [0]), ("object", inside), ("other", outside)):
                change = {entry: [(t, stream[t]) for t in tokens]}
                out[kind, "groups", entry, group] = moved(stream=change)
            for p in range(len(objects)):
                change = {entry: [(1 + p, stream[1 + p])]}
                out[kind, "patches", entry, p] = moved(stream=change)
    return out
