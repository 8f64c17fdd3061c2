"""Edges of a tower one at a time, by a forward pass that gives every reader its own copy."""

import math

import torch

from reference.hooked import norm


def forward(visual, x, added=None):
    """The features from the stream `[token, d_model]` after `ln_pre`, and what each writer wrote.

    `added[reader]` is added to that reader's own copy of the stream, before its norm.
    """
    added = {} if added is None else added
    wrote = {"embed": x}

    def read(name):
        return x + added[name] if name in added else x

    for layer, block in enumerate(visual.transformer.resblocks):
        attn, width = block.attn, x.shape[1]
        d_head, gain = width // attn.num_heads, getattr(block.ls_1, "gamma", 1.0)
        for head in range(attn.num_heads):
            q, k, v = (
                norm(read(f"L{layer}H{head}.{part}"), block.ln_1)
                @ attn.in_proj_weight[n * width + head * d_head :][:d_head].T
                + attn.in_proj_bias[n * width + head * d_head :][:d_head]
                for n, part in enumerate("qkv")
            )
            z = torch.softmax(q @ k.T / math.sqrt(d_head), dim=-1) @ v
            out = attn.out_proj.weight[:, head * d_head : (head + 1) * d_head]
            wrote[f"L{layer}H{head}"] = z @ out.T * gain
        x = x + attn.out_proj.bias * gain
        for head in range(attn.num_heads):
            x = x + wrote[f"L{layer}H{head}"]
        mlp = block.mlp(norm(read(f"L{layer}.mlp"), block.ln_2))
        wrote[f"L{layer}.mlp"] = mlp * getattr(block.ls_2, "gamma", 1.0)
        x = x + wrote[f"L{layer}.mlp"]
    x = read("output")
    if not visual.final_ln_after_pool:
        x = norm(x, visual.ln_post)
    x = x[0] if visual.pool_type == "tok" else x[1:].mean(dim=0)
    if visual.final_ln_after_pool:
        x = norm(x, visual.ln_post)
    return (x if visual.proj is None else x @ visual.proj), wrote


def place(name):
    """(layer, stage) of a writer or reader; an edge goes to a later place only."""
    if name in ("embed", "output"):
        return (-1, 0) if name == "embed" else (10**6, 0)
    layer = int(name[1:].partition("H")[0].partition(".")[0])
    return layer, int(name.endswith("mlp"))


def readers(visual):
    names = []
    for layer, block in enumerate(visual.transformer.resblocks):
        names += [f"L{layer}H{h}.{part}" for part in "qkv" for h in range(block.attn.num_heads)]
        names.append(f"L{layer}.mlp")
    return [*names, "output"]


def edge_scores(visual, clean, corrupt, metric, steps=0):
    """`{(writer, reader): score}`; the path by the midpoints of `steps` equal parts."""
    with torch.no_grad():
        wrote, other = forward(visual, clean)[1], forward(visual, corrupt)[1]
    points = [(n + 0.5) / steps for n in range(steps)] or [0.0]
    scores = {}
    for point in points:
        x = (clean + point * (corrupt - clean)).detach()
        zeros = {name: torch.zeros_like(x, requires_grad=True) for name in readers(visual)}
        metric(forward(visual, x, zeros)[0]).backward(inputs=list(zeros.values()))
        for writer in wrote:
            for reader in zeros:
                if place(writer) < place(reader):
                    change = ((other[writer] - wrote[writer]) * zeros[reader].grad).sum()
                    scores[writer, reader] = scores.get((writer, reader), 0) + change / len(points)
    return scores


def edge_effects(visual, clean, corrupt, metric):
    """Exact: the metric's change as one edge at a time carries what the corrupted pass wrote."""
    with torch.no_grad():
        features, wrote = forward(visual, clean)
        other = forward(visual, corrupt)[1]
        effects = {}
        for writer in wrote:
            for reader in readers(visual):
                if place(writer) < place(reader):
                    patched = forward(visual, clean, {reader: other[writer] - wrote[writer]})[0]
                    effects[writer, reader] = metric(patched) - metric(features)
    return effects
