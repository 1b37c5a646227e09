"""Attention, feed-forward and initialisation shared by the tiny encoders and the fusion modules."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F


class Attention(nn.Module):
    """Multi-head scaled-dot-product attention from `x` to `context` (self-attention where they are the same).

    `causal`: each place reads those up to its own; then there is no mask, and padding comes last.
    """

    def __init__(self, width: int, num_heads: int, dropout: float = 0.0, causal: bool = False) -> None:
        super().__init__()
        if width % num_heads:
            raise ValueError(f"width must be a multiple of num_heads. Got {width} and {num_heads}")
        self.num_heads = num_heads
        self.dropout = dropout
        self.causal = causal
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.output = nn.Linear(width, width)

    def forward(
        self,
        x: Float[Tensor, "b q d"],
        context: Float[Tensor, "b c d"],
        context_mask: Bool[Tensor, "b c"] | None = None,
    ) -> Float[Tensor, "b q d"]:
        query = self._heads(self.query(x))
        key, value = (self._heads(part) for part in self.key_value(context).chunk(2, dim=-1))
        mask = None if context_mask is None else context_mask[:, None, None, :]
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=self.causal
        )
        output: Tensor = self.output(attended.transpose(1, 2).flatten(2))
        return output

    def _heads(self, x: Float[Tensor, "b s d"]) -> Float[Tensor, "b heads s e"]:
        heads: Tensor = x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        return heads


class FeedForward(nn.Sequential):
    """Linear, GELU, Linear, four times as wide inside."""

    def __init__(self, width: int, dropout: float = 0.0) -> None:
        super().__init__(nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(dropout), nn.Linear(4 * width, width))


class Residual(nn.Module):
    """One residual branch with its layer norm: `x + f(norm(x))` pre-norm, `norm(x + f(x))` post-norm."""

    def __init__(self, width: int, branch: nn.Module, pre_norm: bool, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.branch = branch
        self.pre_norm = pre_norm
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Float[Tensor, "b q d"],
        context: Float[Tensor, "b c d"] | None = None,
        context_mask: Bool[Tensor, "b c"] | None = None,
    ) -> Float[Tensor, "b q d"]:
        """Without `context`, attention branches attend to `x` itself (self-attention)."""
        inner = self.norm(x) if self.pre_norm else x
        if isinstance(self.branch, Attention):
            branch = self.branch(inner, inner if context is None else context, context_mask)
        else:
            branch = self.branch(inner)
        summed: Tensor = x + self.dropout(branch)
        if not self.pre_norm:
            summed = self.norm(summed)
        return summed


class EncoderBlock(nn.Module):
    """Self-attention and feed-forward: the block of the tiny encoders."""

    def __init__(self, width: int, num_heads: int, pre_norm: bool = True, dropout: float = 0.0) -> None:
        super().__init__()
        self.self_attention = Residual(width, Attention(width, num_heads, dropout), pre_norm, dropout)
        self.feed_forward = Residual(width, FeedForward(width, dropout), pre_norm, dropout)

    def forward(self, x: Float[Tensor, "b q d"], mask: Bool[Tensor, "b q"] | None = None) -> Float[Tensor, "b q d"]:
        return self.feed_forward(self.self_attention(x, None, mask))  # type: ignore[no-any-return]  # a module's call gives Any


def drop_tokens(states: Float[Tensor, "b *k p d"], fraction: float, num_kept: int = 0) -> Float[Tensor, "b *k q d"]:
    """Without a random `fraction` of the tokens of each row, the same ones in all layers k.

    The first `num_kept` always stay, and at least one of the others.
    """
    others = states.shape[-2] - num_kept
    draw = torch.rand(len(states), others, device=states.device).argsort(1)[:, : max(1, round((1 - fraction) * others))]
    first = torch.arange(num_kept, device=states.device).expand(len(states), -1)
    chosen = torch.cat([first, draw + num_kept], dim=1)
    index = chosen.view(len(states), *[1] * (states.ndim - 3), -1, 1).expand(*states.shape[:-2], -1, states.shape[-1])
    return states.gather(-2, index)


def initialise(module: nn.Module) -> None:
    """Truncated-normal weights and zero biases (`module.apply(initialise)`).

    Linear weights have BERT's deviation of 0.02 at 768 inputs and grow as 1 / sqrt(inputs): at a width of 128, a plain
    0.02 leaves attention almost even, and a small model spends most of its budget on leaving that plateau.
    """
    if isinstance(module, nn.Embedding):
        nn.init.trunc_normal_(module.weight, std=0.02, a=-0.04, b=0.04)
    if isinstance(module, nn.Linear):
        std = 0.02 * math.sqrt(768 / module.in_features)
        nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
