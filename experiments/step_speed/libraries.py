"""What a user could pretrain and fine-tune instead: BridgeTower and ViLT of the transformers library, random weights.

Each takes a step by the library's own classes, one forward pass for each objective and each image, as its examples do.
BridgeTower has the project's depths and widths: as many blocks in either encoder and as many fusion layers in either
stream. ViLT has one stack for both modalities; at equal depth it has as many blocks as a token of this project's model
passes, encoder and fusion together.

LXMERT is not here: the library's classes begin with the features of about 36 boxes that a detector found before, and
have no image encoder to time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from vlm.types import View


@dataclass(frozen=True, slots=True)
class Sizes:
    """What the models have in common."""

    vocabulary: int
    text_tokens: int
    pad_id: int
    image_pixels: int
    patch_pixels: int
    width: int
    num_heads: int
    encoder_layers: int
    fusion_layers: int


class BridgeTower(nn.Module):
    """Its heads for masked language modelling and matching over one body, and a classifier for pairs of images.

    The library has no head for NLVR2: this one is ViLT's, over BridgeTower's pooled output for each image.
    """

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        text = {
            "vocab_size": sizes.vocabulary,
            "hidden_size": sizes.width,
            "intermediate_size": 4 * sizes.width,
            "num_hidden_layers": sizes.encoder_layers,
            "num_attention_heads": sizes.num_heads,
            "pad_token_id": sizes.pad_id,
        }
        vision = {
            "hidden_size": sizes.width,
            "num_hidden_layers": sizes.encoder_layers,
            "patch_size": sizes.patch_pixels,
            "image_size": sizes.image_pixels,
        }
        config = transformers.BridgeTowerConfig(
            hidden_size=sizes.width,
            num_attention_heads=sizes.num_heads,
            num_hidden_layers=sizes.fusion_layers,
            text_config=text,
            vision_config=vision,
        )
        self.masked: Any = transformers.BridgeTowerForMaskedLM(config)
        self.matching: Any = transformers.BridgeTowerForImageAndTextRetrieval(config)
        self.matching.bridgetower = self.masked.bridgetower
        self.answer = _classifier(4 * sizes.width)

    def pretraining_loss(self, pixels: Tensor, masked: View, matching: View) -> Tensor:
        logits = self.masked(**_text(masked), pixel_values=pixels).logits
        scores = self.matching(**_text(matching), pixel_values=pixels[matching.image_index]).logits
        return _masked_loss(logits, masked) + F.cross_entropy(scores, matching.targets["matched"].long())

    def answering_loss(self, pixels: Tensor, text: View, targets: Tensor) -> Tensor:
        body = self.masked.bridgetower
        pooled = [body(**_text(text), pixel_values=images).pooler_output for images in pixels.split(len(targets))]
        return F.cross_entropy(self.answer(torch.cat(pooled, dim=-1)), targets)


class Vilt(nn.Module):
    """Its heads for masked language modelling, matching and NLVR2 over one body of `num_layers` blocks.

    `deeper`: another one whose weights it takes, those of its first blocks.
    """

    def __init__(self, sizes: Sizes, num_layers: int, deeper: Vilt | None = None) -> None:
        super().__init__()
        config = transformers.ViltConfig(
            vocab_size=sizes.vocabulary,
            max_position_embeddings=sizes.text_tokens,
            hidden_size=sizes.width,
            num_hidden_layers=num_layers,
            num_attention_heads=sizes.num_heads,
            intermediate_size=4 * sizes.width,
            image_size=sizes.image_pixels,
            patch_size=sizes.patch_pixels,
            modality_type_vocab_size=3,
            num_images=2,
            num_labels=2,
            pad_token_id=sizes.pad_id,
        )
        self.masked: Any = transformers.ViltForMaskedLM(config)
        self.matching: Any = transformers.ViltForImageAndTextRetrieval(config)
        self.answer: Any = transformers.ViltForImagesAndTextClassification(config)
        if deeper is not None:
            body, source = self.masked.vilt, deeper.masked.vilt
            for name in ("embeddings", "layernorm", "pooler"):
                setattr(body, name, getattr(source, name))
            body.encoder.layer = source.encoder.layer[:num_layers]
            self.masked.mlm_score = deeper.masked.mlm_score
            self.matching.rank_output = deeper.matching.rank_output
            self.answer.classifier = deeper.answer.classifier
        self.matching.vilt = self.answer.vilt = self.masked.vilt

    def pretraining_loss(self, pixels: Tensor, masked: View, matching: View) -> Tensor:
        logits = self.masked(**_text(masked), pixel_values=pixels).logits
        scores = self.matching(**_text(matching), pixel_values=pixels[matching.image_index]).logits  # one a pair
        matched = matching.targets["matched"].float()
        return _masked_loss(logits, masked) + F.binary_cross_entropy_with_logits(scores.flatten().float(), matched)

    def answering_loss(self, pixels: Tensor, text: View, targets: Tensor) -> Tensor:
        pairs = torch.stack(pixels.split(len(targets)), dim=1)
        loss: Tensor = self.answer(**_text(text), pixel_values=pairs, labels=targets).loss
        return loss


def _text(view: View) -> dict[str, Tensor]:
    assert view.text_ids is not None and view.text_mask is not None
    return {"input_ids": view.text_ids, "attention_mask": view.text_mask.long()}


def _masked_loss(logits: Tensor, view: View) -> Tensor:
    """As the library's classes have it: over all positions, of which those without a target are ignored."""
    labels = torch.full(logits.shape[:2], -100, device=logits.device)
    labels[view.targets["predicted"]] = view.targets["ids"]
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100)


def _classifier(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width), nn.GELU(), nn.Linear(width, 2))
