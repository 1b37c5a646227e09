"""The published forms are BridgeTower's and BLIP-2's layers, with copied weights."""

from __future__ import annotations

import torch
from torch import nn
from transformers import BridgeTowerTextConfig, InstructBlipQFormerConfig
from transformers.models.bridgetower.modeling_bridgetower import BridgeTowerBertCrossLayer, BridgeTowerLinkTower
from transformers.models.instructblip.modeling_instructblip import InstructBlipQFormerLayer

from vlm.models.fusion.bridges import Bridges
from vlm.models.fusion.qformer import QFormer

WIDTH, HEADS = 32, 4
TEXT_MASK = torch.tensor([[True] * 6, [True] * 3 + [False] * 3, [True] + [False] * 5])
SIZES = {
    "hidden_size": WIDTH,
    "num_attention_heads": HEADS,
    "intermediate_size": 4 * WIDTH,
    "layer_norm_eps": 1e-5,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def additive(mask: torch.Tensor) -> torch.Tensor:
    return torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)[:, None, None]


def randomised(fusion: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in fusion.parameters():  # norms and biases too are to differ from their first values
        nn.init.normal_(parameter, std=0.2)
    return fusion.eval()


def copy_attention(ours: nn.Module, theirs: nn.Module, inner: nn.Module) -> None:
    """Into the library's attention: `inner` has its three projections, `theirs.output` the rest."""
    branch = ours.branch
    inner.query.load_state_dict(branch.query.state_dict())
    for part in ("weight", "bias"):
        key, value = getattr(branch.key_value, part).detach().chunk(2)
        getattr(inner.key, part).data.copy_(key)
        getattr(inner.value, part).data.copy_(value)
    theirs.output.dense.load_state_dict(branch.output.state_dict())
    theirs.output.LayerNorm.load_state_dict(ours.norm.state_dict())


def copy_feed_forward(ours: nn.Module, intermediate: nn.Module, output: nn.Module) -> None:
    intermediate.dense.load_state_dict(ours.branch[0].state_dict())
    output.dense.load_state_dict(ours.branch[3].state_dict())
    output.LayerNorm.load_state_dict(ours.norm.state_dict())


def test_bridges_equal_the_librarys_link_towers_and_cross_layers() -> None:
    fusion = randomised(Bridges(WIDTH, 3, HEADS, pre_norm=False, dropout=0.0))
    config = BridgeTowerTextConfig(**SIZES, add_cross_attention=True, link_tower_type="add")
    config._attn_implementation = "eager"

    def cross(layer: nn.Module) -> nn.Module:
        theirs = BridgeTowerBertCrossLayer(config)
        copy_attention(layer.self_attention, theirs.attention, theirs.attention.self)
        copy_attention(layer.cross_attention, theirs.crossattention, theirs.crossattention.self)
        copy_feed_forward(layer.feed_forward, theirs.intermediate, theirs.output)
        return theirs.eval()

    def link(norm: nn.Module) -> nn.Module:
        theirs = BridgeTowerLinkTower(config)
        theirs.LayerNorm.load_state_dict(norm.state_dict())
        return theirs

    images, texts = torch.randn(3, 3, 5, WIDTH), torch.randn(3, 3, 6, WIDTH)
    mask = additive(TEXT_MASK)
    with torch.no_grad():
        our_image, our_text = fusion(images, texts, TEXT_MASK)
        image, text = fusion.image_bridges[0](images[:, 0]), fusion.text_bridges[0](texts[:, 0])
        for number in range(3):
            if number:
                image = link(fusion.image_bridges[number])(images[:, number], image, None)
                text = link(fusion.text_bridges[number])(texts[:, number], text, mask)
            image, text = (
                cross(fusion.image_layers[number])(image, text, None, mask)[0],
                cross(fusion.text_layers[number])(text, image, mask, None)[0],
            )
    torch.testing.assert_close(our_image, image, atol=1e-5, rtol=0)
    torch.testing.assert_close(our_text[TEXT_MASK], text[TEXT_MASK], atol=1e-5, rtol=0)


def test_the_qformer_equals_the_librarys_layers() -> None:
    fusion = randomised(QFormer(WIDTH, 3, HEADS, pre_norm=False, dropout=0.0, num_queries=4, read_image_every=2))
    config = InstructBlipQFormerConfig(**SIZES, encoder_hidden_size=WIDTH, cross_attention_frequency=2)
    config._attn_implementation = "eager"
    image, text = torch.randn(3, 5, WIDTH), torch.randn(3, 6, WIDTH)
    mask = torch.cat([torch.ones(3, 4, dtype=torch.bool), TEXT_MASK], dim=1)
    with torch.no_grad():
        queries, fused_text = fusion(image, text, TEXT_MASK)
        states = torch.cat([fusion.queries.expand(3, -1, -1), text], dim=1)
        for number, layer in enumerate(fusion.layers):
            theirs = InstructBlipQFormerLayer(config, number).eval()
            copy_attention(layer.self_attention, theirs.attention, theirs.attention.attention)
            assert theirs.has_cross_attention == (layer.cross_attention is not None)
            if layer.cross_attention is not None:
                copy_attention(layer.cross_attention, theirs.crossattention, theirs.crossattention.attention)
            copy_feed_forward(layer.query_feed_forward, theirs.intermediate_query, theirs.output_query)
            copy_feed_forward(layer.text_feed_forward, theirs.intermediate, theirs.output)
            states = theirs(states, additive(mask), fusion.image_norm(image), None, query_length=4)
    torch.testing.assert_close(queries, states[:, :4], atol=1e-5, rtol=0)
    torch.testing.assert_close(fused_text[TEXT_MASK], states[:, 4:][TEXT_MASK], atol=1e-5, rtol=0)
