"""From questions and images to logits over answers, in training and in use."""

from __future__ import annotations

from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vlm.models.vision_language import VisionLanguageModel
from vlm.types import Batch, View


def answer_logits(
    model: VisionLanguageModel, head: nn.Module, batch: Batch, in_turn: bool = False
) -> Float[Tensor, "b k"]:
    """Logits over the answers from the pooled pairs of each text with its one or more images.

    All images go through the encoder in one pass and each text through its encoder once. `in_turn`: each image meets
    the text as the image before left it (`Task.images_in_turn`).
    """
    text_ids = cast(Tensor, batch.text_ids)
    if in_turn:
        in_order = model.pool_in_turn(cast(Tensor, batch.image), text_ids, cast(Tensor, batch.text_mask))
        return head(torch.cat(in_order, dim=-1))  # type: ignore[no-any-return]
    texts = torch.arange(len(text_ids), device=text_ids.device).repeat(batch.images_per_text)
    view = View("pair", text_ids, batch.text_mask, text_index=texts)
    pooled = cast(Tensor, model.encode(batch.image, [view])[0].pooled)
    return head(torch.cat(pooled.chunk(batch.images_per_text), dim=-1))  # type: ignore[no-any-return]  # a module's call gives Any
