"""Direct effects and head attributions of one image, one part and one token at a time."""

import torch

from reference.hooked import norm, tower_activations


def direct_parts(visual, image):
    """The output of an image `[3, h, w]` as vectors by name; a head is a list, one a token read."""
    seen = tower_activations(visual, image)
    final = seen["resid_post"][-1]
    patches = visual.conv1(image[None])[0].flatten(1).T
    embed = torch.cat([visual.class_embedding[None], patches])
    position = visual.positional_embedding
    parts = {"embed": embed, "pos_embed": position}
    if isinstance(visual.ln_pre, torch.nn.LayerNorm):
        scale = scale_of(embed + position, visual.ln_pre)
        parts = {name: centred(x) / scale * visual.ln_pre.weight for name, x in parts.items()}
        parts["ln_pre_bias"] = visual.ln_pre.bias.expand_as(embed)
    out = {name: write(visual, final, x) for name, x in parts.items()}
    x = norm(embed + position, visual.ln_pre)
    for layer, block in enumerate(visual.transformer.resblocks):
        attn, gain = block.attn, getattr(block.ls_1, "gamma", 1.0)
        width, d_head = x.shape[1], x.shape[1] // attn.num_heads
        out[f"L{layer} bias"] = write(visual, final, (attn.out_proj.bias * gain).expand_as(x))
        mid = x + attn.out_proj.bias * gain
        for head in range(attn.num_heads):
            own = slice(head * d_head, (head + 1) * d_head)
            weight = attn.in_proj_weight[2 * width :][own]
            v = norm(x, block.ln_1) @ weight.T + attn.in_proj_bias[2 * width :][own]
            moved = []
            for token in range(len(x)):
                pattern = seen["pattern"][layer][head][:, token : token + 1]
                moved.append(pattern * (attn.out_proj.weight[:, own] @ v[token]) * gain)
            out[f"L{layer}H{head}"] = [write(visual, final, u) for u in moved]
            mid = mid + sum(moved)
        mlp = block.mlp(norm(mid, block.ln_2)) * getattr(block.ls_2, "gamma", 1.0)
        out[f"L{layer} mlp"] = write(visual, final, mlp)
        x = mid + mlp
    bias = visual.ln_post.bias
    out["output_bias"] = bias if visual.proj is None else bias @ visual.proj
    return out


def write(visual, final, u):
    """What a summand `[T, D]` of the stream adds to the output, at the final stream's scale."""
    rows = slice(0, 1) if visual.pool_type == "tok" else slice(1, None)
    u, final = u[rows], final[rows]
    if visual.final_ln_after_pool:
        u, final = u.mean(dim=0, keepdim=True), final.mean(dim=0, keepdim=True)
    u = (centred(u) / scale_of(final, visual.ln_post) * visual.ln_post.weight).mean(dim=0)
    return u if visual.proj is None else u @ visual.proj


def centred(x):
    return x - x.mean(dim=-1, keepdim=True)


def scale_of(x, module):
    return torch.sqrt((centred(x) ** 2).mean(dim=-1, keepdim=True) + module.eps)


def attribution(visual, image, metric, replace, step=1e-4):
    """Derivative of `metric(features)` as a head's z moves towards its replacement.

    `replace[layer, head]` is `[token, d_head]`; central differences, one head at a time.
    """
    z = tower_activations(visual, image)["z"]
    out = {}
    for (layer, head), value in replace.items():
        ends = []
        for sign in (1, -1):
            moved = z[layer][:, head] + sign * step * (value - z[layer][:, head])
            ends.append(
                metric(tower_activations(visual, image, {(layer, head): moved})["features"])
            )
        out[layer, head] = (ends[0] - ends[1]) / (2 * step)
    return out


def effects(visual, image, metric, replace):
    """Change of `metric(features)` as each head's z is replaced, one head at a time."""
    intact = metric(tower_activations(visual, image)["features"])
    return {
        key: metric(tower_activations(visual, image, {key: value})["features"]) - intact
        for key, value in replace.items()
    }
