"""Vision towers of the open_clip library: token states after the last norm and before CLIP's projection."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor, nn

from vlm.errors import UserError
from vlm.models.open_clip import create, model_config, published_images
from vlm.models.vision.timm import TimmFeatures


class OpenClipVision(nn.Module):
    """One tower's tokens `[CLS, patches]`: what CLIP would project and compare stands first, wherever it is a token.

    - The library's own ViT: class token and patches after the last norm. Where CLIP projects the mean of the patches
      (CLIPA), that mean is CLS. CoCa's states are those that its pooler reads, behind the pooler's norm for them.
    - timm models (SigLIP, ConvNeXt, EVA): as `TimmFeatures`; the pooled state is CLS where attention pools.
    - The library's ResNets: the last feature map, their mean first, because their pooled state is projected already.

    With another `image_pixels` than the model's own, position embeddings are resampled.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __init__(
        self, name: str, pretrained: bool, image_pixels: int | None = None, weights: Path | str | None = None
    ) -> None:
        super().__init__()
        sizes = model_config(name)["vision_cfg"]
        published = published_images(name)
        self.image_pixels = image_pixels or int(sizes["image_size"])
        self.mean, self.std = tuple(published["mean"]), tuple(published["std"])
        self.interpolation = str(published["interpolation"])
        is_resnet = isinstance(sizes.get("layers"), list)  # convolutions run at any size, their pooler does not
        visual, _ = create(name, pretrained, weights, "vision", None if is_resnet else image_pixels)
        self.tower: Any
        if is_resnet:
            self.tower = ResNetTower(visual)
        elif hasattr(visual, "trunk"):
            visual.trunk.reset_classifier(0)
            self.tower = TimmFeatures(visual.trunk, self.image_pixels, self.mean, self.std, self.interpolation)
        else:
            self.tower = TransformerTower(visual)
        self.width = int(self.tower.width)

    @property
    def blocks(self) -> list[nn.Module]:
        """The repeated blocks, the first one first: those of a transformer, the stages of anything else."""
        blocks: list[nn.Module] = self.tower.blocks
        return blocks

    def forward(self, image: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b p d"]:
        return self.tower(image)  # type: ignore[no-any-return]  # a module's call gives Any

    def layers(self, image: Float[Tensor, "b 3 h w"], count: int) -> tuple[Float[Tensor, "b p d"], ...]:
        """States after each of the last `count` blocks, through the final norm; the last is what `forward` gives."""
        states: tuple[Tensor, ...] = self.tower.layers(image, count)
        return states


class TransformerTower(nn.Module):
    """The library's `VisionTransformer` without its projection."""

    def __init__(self, visual: Any) -> None:
        super().__init__()
        visual.proj = None
        if visual.attn_pool is not None:
            if visual.attn_pool_contrastive is not None:
                raise UserError("open_clip's towers with two attentional poolers are not supported: none is published")
            visual.ln_post, visual.attn_pool = visual.attn_pool.ln_k, None
        self.visual = visual
        self.width = int(visual.transformer.width)

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self.visual.transformer.resblocks)

    def forward(self, image: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b p d"]:
        return self.layers(image, 1)[0]

    def layers(self, image: Float[Tensor, "b 3 h w"], count: int) -> tuple[Float[Tensor, "b p d"], ...]:
        states: deque[Tensor] = deque(maxlen=count)
        x = self.visual._embeds(image)
        for block in self.visual.transformer.resblocks:
            x = block(x)
            states.append(x)
        return tuple(self._normed(state) for state in states)

    def fit_states(self, states: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The position embeddings of a run at another image size, resampled to this one's."""
        name, ours = "visual.positional_embedding", self.visual.positional_embedding
        if name not in states or states[name].shape == ours.shape:
            return {}
        grid = list(self.visual.grid_size)
        return {name: resample_abs_pos_embed(states[name][None], grid, num_prefix_tokens=1)[0]}

    def _normed(self, x: Float[Tensor, "b p d"]) -> Float[Tensor, "b p d"]:
        """After the last norm, which stands before or behind the mean, where that is CLS."""
        if self.visual.final_ln_after_pool:
            return self.visual.ln_post(self._with_pooled(x))  # type: ignore[no-any-return]
        return self._with_pooled(self.visual.ln_post(x))

    def _with_pooled(self, x: Float[Tensor, "b p d"]) -> Float[Tensor, "b p d"]:
        if self.visual.pool_type != "avg":
            return x
        return torch.cat([x[:, 1:].mean(1, keepdim=True), x[:, 1:]], dim=1)


class ResNetTower(nn.Module):
    """The library's `ModifiedResNet` without its attention pool, which projects."""

    def __init__(self, visual: Any) -> None:
        super().__init__()
        self.width = int(visual.layer4[-1].bn3.num_features)
        visual.attnpool = None
        self.visual = visual

    @property
    def blocks(self) -> list[nn.Module]:
        return [cast(nn.Module, getattr(self.visual, f"layer{number}")) for number in range(1, 5)]

    def forward(self, image: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b p d"]:
        x = self.visual.stem(image)
        for stage in self.blocks:
            x = stage(x)
        x = x.flatten(2).transpose(1, 2)
        return torch.cat([x.mean(1, keepdim=True), x], dim=1)

    def layers(self, image: Float[Tensor, "b 3 h w"], count: int) -> tuple[Float[Tensor, "b p d"], ...]:
        if count != 1:
            raise UserError("the stages of CLIP's ResNets differ in width; only the last gives layers")
        return (self(image),)
