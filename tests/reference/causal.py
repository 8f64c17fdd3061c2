"""Ablations by one plain forward a unit, and their effects one image and caption at a time."""

import torch
import torch.nn.functional as F

from reference.hooked import hits, margins


def features_without(tower, images, heads, mlps, tokens, stand_in):
    """The whole tower once, with hooks that replace; `stand_in[site]` is `[image or 1, token, ...]`
    or 0."""
    at = slice(None) if tokens == "all" else slice(0, 1)
    sites = {f"blocks.{layer}.hook_mlp_out": [] for layer in mlps}
    for head in heads:
        sites.setdefault(f"blocks.{head.layer}.attn.hook_z", []).append(head.index)

    def replace(value, hook):
        value, other = value.clone(), stand_in[hook.name]
        if hook.name.endswith("mlp_out"):
            value[:, at] = other if isinstance(other, int) else other[:, at]
        for index in sites[hook.name]:
            value[:, at, index] = other if isinstance(other, int) else other[:, at, index]
        return value

    with torch.no_grad():
        return tower.run_with_hooks(images, fwd_hooks=[(site, replace) for site in sites])


def removed_norms(tower, activations, heads, mlps, stand_in, rows):
    """Norm of what leaves the stream at the token rows, root mean square over them."""
    lost = 0
    for head in heads:
        site = f"blocks.{head.layer}.attn.hook_z"
        z, block = (
            activations[site] - stand_in[site],
            tower.visual.transformer.resblocks[head.layer],
        )
        width = z.shape[-1]
        weight = block.attn.out_proj.weight[:, head.index * width : (head.index + 1) * width]
        lost = lost + (z[:, rows, head.index] @ weight.T) * getattr(block.ls_1, "gamma", 1.0)
    for layer in mlps:
        site = f"blocks.{layer}.hook_mlp_out"
        lost = lost + (activations[site] - stand_in[site])[:, rows]
    return (lost**2).sum(-1).mean(-1).sqrt()


def image_scores(images, texts, owner, intact, logits, held):
    """Every measure of every image, by loops; a tie is a miss."""
    owner, n = owner.tolist(), len(images)
    scores = {"margin": margins(images, texts, owner), "frozen": [], "token AP": []}
    for i, image in enumerate(images):
        cosine = F.cosine_similarity(image[None], texts, dim=1).tolist()
        then = F.cosine_similarity(intact[i][None], texts, dim=1).tolist()
        own = [c for c, o in zip(cosine, owner, strict=True) if o == i]
        hardest = max((j for j, o in enumerate(owner) if o != i), key=lambda j: then[j])
        scores["frozen"].append(sum(own) / len(own) - cosine[hardest])
    for k in (1, 5, 10):
        scores[f"i2t@{k}"] = hits(images, texts, owner, k)
        found = [[] for _ in range(n)]
        for text, own in zip(texts, owner, strict=True):
            cosine = F.cosine_similarity(images, text[None], dim=1).tolist()
            ahead = sum(c >= cosine[own] for i, c in enumerate(cosine) if i != own)
            found[own].append(ahead < k)
        scores[f"t2i@{k}"] = [sum(f) / len(f) for f in found]
    scores["token AP"] = [precision(row, right) for row, right in zip(logits, held, strict=True)]
    return {name: [float(value) for value in values] for name, values in scores.items()}


def precision(scores, right):
    """Average precision, one right column after another; wrong ones that tie stand before it."""
    scores, right = scores.tolist(), right.tolist()
    found = []
    for j in (j for j, is_right in enumerate(right) if is_right):
        ahead = [k for k, s in enumerate(scores) if s > scores[j] or (s == scores[j] and k != j)]
        before = sum(not right[k] for k in ahead)
        among = sum(right[k] for k in ahead if scores[k] > scores[j])
        found.append((among + 1) / (among + 1 + before))
    return sum(found) / len(found) if found else 0.0


def patch_means(tower, images, heads, mlps, tokens, stand_in):
    """Mean of the final patch tokens without these parts, by hooks on a plain forward."""
    kept = []

    def keep(value, hook):
        kept.append(value)

    last = f"blocks.{tower.cfg.n_layers - 1}.hook_resid_post"
    with tower.hooks(fwd_hooks=[(last, keep)]):
        features_without(tower, images, heads, mlps, tokens, stand_in)
    with torch.no_grad():
        return tower.visual.ln_post(kept[0])[:, 1:].mean(1)
