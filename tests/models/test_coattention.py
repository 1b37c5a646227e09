"""The published form is BERT's layer with cross-attention, in both streams."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig
from transformers.models.bert.modeling_bert import BertLayer

from vlm.models.fusion.coattention import CoAttention, CoAttentionLayer

WIDTH, HEADS = 32, 4
TEXT_MASK = torch.tensor([[True] * 6, [True] * 3 + [False] * 3, [True] + [False] * 5])


def bert_layer(layer: CoAttentionLayer) -> BertLayer:
    """The library's layer with our layer's weights."""
    config = BertConfig(
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        intermediate_size=4 * WIDTH,
        layer_norm_eps=1e-5,  # RoBERTa's, and torch's default
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        is_decoder=True,  # the library's condition for cross-attention
        add_cross_attention=True,
        attn_implementation="eager",  # attends as the mask says, without a causal one of its own
    )
    theirs = BertLayer(config)
    pairs: list[tuple[nn.Module, nn.Module]] = [
        (layer.feed_forward.branch[0], theirs.intermediate.dense),  # type: ignore[index]  # a Sequential
        (layer.feed_forward.branch[3], theirs.output.dense),  # type: ignore[index]  # a Sequential
        (layer.feed_forward.norm, theirs.output.LayerNorm),
    ]
    states = theirs.state_dict()
    for ours, name in ((layer.self_attention, "attention"), (layer.cross_attention, "crossattention")):
        attention = getattr(theirs, name)
        branch = ours.branch
        pairs += [
            (branch.query, attention.self.query),  # type: ignore[list-item]  # modules by getattr
            (branch.output, attention.output.dense),  # type: ignore[list-item]  # modules by getattr
            (ours.norm, attention.output.LayerNorm),
        ]
        for part in ("weight", "bias"):
            key, value = getattr(branch.key_value, part).chunk(2)
            states[f"{name}.self.key.{part}"], states[f"{name}.self.value.{part}"] = key, value
    theirs.load_state_dict(states)
    for ours_part, their_part in pairs:
        their_part.load_state_dict(ours_part.state_dict())
    return theirs.eval()


def additive(mask: Tensor) -> Tensor:
    """0 at real tokens and minus a lot at padding, as the library wants it."""
    return torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)[:, None, None]


@pytest.mark.parametrize("depth", [1, 3])
def test_the_post_norm_form_equals_the_librarys_cross_attention_layers(depth: int) -> None:
    torch.manual_seed(0)
    fusion = CoAttention(WIDTH, depth, HEADS, pre_norm=False, dropout=0.0).eval()
    for parameter in fusion.parameters():  # norms and biases too are to differ from their first values
        nn.init.normal_(parameter, std=0.2)
    image, text = torch.randn(3, 5, WIDTH), torch.randn(3, 6, WIDTH)
    mask = additive(TEXT_MASK)
    their_image, their_text = image, text
    with torch.no_grad():
        our_image, our_text = fusion(image, text, TEXT_MASK)
        for image_layer, text_layer in zip(fusion.image_layers, fusion.text_layers, strict=True):
            assert isinstance(image_layer, CoAttentionLayer) and isinstance(text_layer, CoAttentionLayer)
            their_image, their_text = (
                bert_layer(image_layer)(their_image, None, their_text, mask),
                bert_layer(text_layer)(their_text, mask, their_image, None),
            )
    torch.testing.assert_close(our_image, their_image, atol=1e-5, rtol=0)
    torch.testing.assert_close(our_text[TEXT_MASK], their_text[TEXT_MASK], atol=1e-5, rtol=0)
