"""A fusion from outside: each side scales and shifts the tokens of the other (FiLM, arXiv 1709.07871)."""

from __future__ import annotations

from torch import Tensor, nn


class Modulation(nn.Module):
    def __init__(self, width: int = 64, depth: int = 2) -> None:
        super().__init__()
        self.width = width  # both encoders are projected to it before
        self.from_text = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(depth))
        self.from_image = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(depth))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * depth))

    def forward(self, image: Tensor, text: Tensor, text_mask: Tensor) -> tuple[Tensor, Tensor]:
        """[b p d] image and [b l d] text states, CLS first, and True at real tokens -> both, fused.

        The text keeps its length; of the image as many tokens may come back as you like. Heads read token 0 of each.
        """
        real = text_mask.unsqueeze(-1)
        for depth, (of_text, of_image) in enumerate(zip(self.from_text, self.from_image, strict=True)):
            # Means over real tokens alone: padding must change no output.
            words = (text * real).sum(1, keepdim=True) / real.sum(1, keepdim=True)
            scale, shift = of_text(words).chunk(2, dim=-1)
            image = self.norms[2 * depth](image + nn.functional.gelu(image * scale + shift))
            scale, shift = of_image(image.mean(1, keepdim=True)).chunk(2, dim=-1)
            text = self.norms[2 * depth + 1](text + nn.functional.gelu(text * scale + shift))
        return image, text
