"""The published form is BERT's layer over the tokens of both."""

from __future__ import annotations

import torch
from torch import nn
from transformers import BertConfig
from transformers.models.bert.modeling_bert import BertLayer

from vlm.models.fusion import MergedConfig
from vlm.models.fusion.merged import Merged
from vlm.models.transformer import EncoderBlock

WIDTH, HEADS = 32, 4
TEXT_MASK = torch.tensor([[True] * 6, [True] * 3 + [False] * 3])


def bert_layer(block: EncoderBlock) -> BertLayer:
    """The library's layer with our block's weights."""
    theirs = BertLayer(
        BertConfig(
            hidden_size=WIDTH,
            num_attention_heads=HEADS,
            intermediate_size=4 * WIDTH,
            layer_norm_eps=1e-5,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            attn_implementation="eager",
        )
    )
    attention, branch = theirs.attention, block.self_attention.branch
    states = theirs.state_dict()
    for part in ("weight", "bias"):
        key, value = getattr(branch.key_value, part).chunk(2)  # type: ignore[union-attr]
        states[f"attention.self.key.{part}"], states[f"attention.self.value.{part}"] = key, value
    theirs.load_state_dict(states)
    for ours, their in (
        (branch.query, attention.self.query),
        (branch.output, attention.output.dense),
        (block.self_attention.norm, attention.output.LayerNorm),
        (block.feed_forward.branch[0], theirs.intermediate.dense),  # type: ignore[index]
        (block.feed_forward.branch[3], theirs.output.dense),  # type: ignore[index]
        (block.feed_forward.norm, theirs.output.LayerNorm),
    ):
        their.load_state_dict(ours.state_dict())  # type: ignore[union-attr]
    return theirs.eval()


def test_the_post_norm_form_equals_the_librarys_layers_over_both() -> None:
    torch.manual_seed(0)
    fusion = Merged(WIDTH, 2, HEADS, pre_norm=False, dropout=0.0).eval()
    for parameter in fusion.parameters():  # norms and biases too are to differ from their first values
        nn.init.normal_(parameter, std=0.2)
    image, text = torch.randn(2, 5, WIDTH), torch.randn(2, 6, WIDTH)
    mask = torch.cat([TEXT_MASK, torch.ones(2, 5, dtype=torch.bool)], dim=1)
    additive = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)[:, None, None]
    theirs = torch.cat([text, image], dim=1)
    with torch.no_grad():
        our_image, our_text = fusion(image, text, TEXT_MASK)
        for block in fusion.layers:
            assert isinstance(block, EncoderBlock)
            theirs = bert_layer(block)(theirs, additive)
    torch.testing.assert_close(our_image, theirs[:, 6:], atol=1e-5, rtol=0)
    torch.testing.assert_close(our_text[TEXT_MASK], theirs[:, :6][TEXT_MASK], atol=1e-5, rtol=0)


def test_both_streams_learn_from_each_other() -> None:
    torch.manual_seed(0)
    fusion = MergedConfig(width=WIDTH, num_heads=HEADS, dropout=0).build()
    image, text = torch.randn(2, 5, WIDTH, requires_grad=True), torch.randn(2, 6, WIDTH, requires_grad=True)
    fused_image, _ = fusion(image, text, TEXT_MASK)
    fused_image[:, 0, 0].sum().backward()  # a sum over the width is 0 behind a layer norm
    assert text.grad is not None and bool((text.grad[TEXT_MASK].abs().sum(-1) > 0).all())
    assert not text.grad[~TEXT_MASK].any()  # padding says nothing
    _, fused_text = fusion(image, text, TEXT_MASK)
    image.grad = None
    fused_text[:, 0, 0].sum().backward()
    assert image.grad is not None and bool((image.grad.abs().sum(-1) > 0).all())
