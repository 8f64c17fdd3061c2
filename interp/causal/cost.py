"""What the exact sweep multiplies, beside the plain loop that runs the tower once a unit."""

from interp.causal.units import ablated_tokens, overlap, read_tokens
from interp.hooked import TowerConfig


def flop_share(cfg: TowerConfig, tokens: str = "all") -> float:
    """Multiplications of a sweep over all heads, as a share of one whole forward for each head.

    Counted are the matrix products, per image, and the projection of the patches that class-only
    ablation shares. The intact pass, which either way is one forward more, is left out.
    """
    return sweep_macs(cfg, tokens) / (cfg.n_layers * cfg.n_heads * forward_macs(cfg))


def forward_macs(cfg: TowerConfig) -> int:
    """Multiplications of a forward pass of one image."""
    height, width = cfg.patch_size
    embed = (cfg.n_ctx - cfg.prefix_tokens) * 3 * height * width * cfg.d_model
    blocks = cfg.n_layers * _block_macs(cfg, cfg.n_ctx, cfg.n_ctx)
    return embed + blocks + cfg.d_model * cfg.embed_dim


def sweep_macs(cfg: TowerConfig, tokens: str = "all") -> int:
    """Multiplications of a sweep over all heads, of one image, beside its intact pass."""
    everywhere, last = range(cfg.n_ctx), cfg.n_layers - 1
    at, read = ablated_tokens(cfg, tokens), read_tokens(cfg)
    patches = cfg.n_ctx - len(at)
    total = 0
    for first in range(cfg.n_layers):
        measured = len(overlap(at, read) or at)
        total += cfg.n_heads * measured * cfg.d_head * cfg.d_model
        changed = len(overlap(at, read if first == last else everywhere))
        if not changed:
            continue
        unit = changed * cfg.d_model * (cfg.d_head + 2 * cfg.d_mlp) + cfg.d_model * cfg.embed_dim
        for layer in range(first + 1, cfg.n_layers):
            queries = len(read) if layer == last else cfg.n_ctx
            unit += _block_macs(cfg, queries, cfg.n_ctx)
            if layer == first + 1 and patches:  # of the class token only; the patches' are shared
                unit -= (queries + 2 * cfg.n_ctx - 3 * len(at)) * cfg.d_model**2
        total += cfg.n_heads * unit
        if patches and first < last:
            total += 3 * patches * cfg.d_model**2
    return total


def _block_macs(cfg: TowerConfig, queries: int, keys: int) -> int:
    """A block that computes some tokens' output from all tokens' keys and values."""
    d = cfg.d_model
    attention = (2 * queries + 2 * keys) * d**2 + 2 * queries * keys * d  # q, out; k, v; scores, AV
    return attention + 2 * queries * d * cfg.d_mlp
