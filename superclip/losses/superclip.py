"""SuperCLIP (Zhao et al., NeurIPS 2025): InfoNCE plus the caption's tokens predicted from the
picture."""

from __future__ import annotations

from typing import ClassVar, final

import torch
from torch import Tensor

from superclip.data.batch import Batch
from superclip.loss_options import SuperClipOptions
from superclip.losses.base import Loss, LossContext, Terms
from superclip.model.output import ClipOutput
from superclip.ops.similarity import info_nce
from superclip.ops.tokens import (
    document_counts,
    idf,
    multi_hot,
    multi_hot_bce,
    soft_cross_entropy,
    soft_labels,
)
from superclip.ops.world import World


@final
class SuperClipLoss(Loss):
    """Contrastive term plus `token_weight` times the token term.

    The document frequency is counted online over all ranks, the current batch included, as the
    released code does; `log((S + 1) / (df + 1))`. Special ids are no targets unless
    `keep_special_tokens`.

    Buffers: `counts` int64 `[vocabulary]`, captions that held each id; `samples` int64, captions
        seen.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"token_logits"})
    counts: Tensor
    samples: Tensor
    column: Tensor
    target: Tensor

    def __init__(self, options: SuperClipOptions, context: LossContext):
        super().__init__()
        self.options = options
        self.register_buffer("counts", torch.zeros(context.vocabulary, dtype=torch.long))
        self.register_buffer("samples", torch.zeros((), dtype=torch.long))
        ids = torch.arange(context.vocabulary) if context.vocab_ids is None else context.vocab_ids
        column = torch.full((context.vocabulary,), -1)
        column[ids] = torch.arange(len(ids))
        target = torch.ones(len(ids))
        if not options.keep_special_tokens:
            target[[int(column[i]) for i in context.special_ids if column[i] >= 0]] = 0
        self.register_buffer("column", column, persistent=False)
        self.register_buffer("target", target, persistent=False)

    def observe(self, batch: Batch, world: World) -> None:
        seen = document_counts(batch.tokens, len(self.counts))
        rows = torch.full((1,), len(batch), device=seen.device)
        total = world.sum(torch.cat([seen, rows]))
        self.counts += total[:-1]
        self.samples += total[-1]

    def pair_terms(self, image_features, text_features, scale, batch, world) -> Terms:
        return {"contrastive": info_nce(image_features, text_features, scale, world)}

    def row_terms(self, out: ClipOutput, batch: Batch) -> Terms:
        assert (
            out.token_hidden is not None
            and out.token_weight is not None
            and out.token_bias is not None
        )
        head = (out.token_hidden, out.token_weight, out.token_bias)
        known = self.column >= 0
        wanted = torch.where(known, self.target[self.column.clamp_min(0)], 0.0)
        if self.options.token_loss == "idf":
            ids, labels = soft_labels(batch.tokens, wanted * idf(self.counts, self.samples))
            term = soft_cross_entropy(*head, self.column[ids].clamp_min(0), labels)
        else:
            ids, labels = multi_hot(batch.tokens, wanted)
            term = multi_hot_bce(*head, self.column[ids].clamp_min(0), labels, self.target)
        return {"token": self.options.token_weight * term}
