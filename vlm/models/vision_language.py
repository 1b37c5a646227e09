"""The model: a vision and a language encoder, a projection each, a fusion module and a pooler."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn

from vlm.models.adaptation import Depth, depths_of
from vlm.models.heads import PairPooler, PairStates
from vlm.models.transformer import drop_tokens, initialise
from vlm.types import Encoded, View


class VisionLanguageModel(nn.Module):
    """Encodes images and texts apart, then together.

    Every objective and task goes through `encode`, which is where the work of a step is shared: each image through
    the vision encoder once, each distinct text once, and one call of the fusion for all the pairs that are wanted.
    """

    def __init__(
        self,
        vision: nn.Module,
        language: nn.Module,
        fusion: nn.Module,
        frozen: frozenset[str] = frozenset(),
        pooler: Literal["tanh", "none"] = "tanh",
        token_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        width = int(cast(int, fusion.width))
        self.width = width
        self.token_dropout = token_dropout
        self.num_encoder_layers = int(cast(int, getattr(fusion, "num_encoder_layers", 0)))
        if self.num_encoder_layers:
            _refuse_missing_layers({"vision": vision, "language": language}, self.num_encoder_layers)
        self.vision = vision
        self.language = language
        self.fusion = fusion
        self.vision_projection = nn.Linear(int(cast(int, vision.width)), width)
        self.language_projection = nn.Linear(int(cast(int, language.width)), width)
        self.pooler = PairPooler(width) if pooler == "tanh" else PairStates()
        self.vision_projection.apply(initialise)
        self.language_projection.apply(initialise)
        mean, std = (torch.tensor(getattr(vision, name)).view(1, 3, 1, 1) for name in ("mean", "std"))
        self.register_buffer("pixel_mean", 255 * mean, persistent=False)
        self.register_buffer("pixel_std", 255 * std, persistent=False)
        self.frozen = frozen  # of "vision", "language"
        # What of the encoders stays in evaluation mode; a list, so that nothing is registered twice.
        self.resting: list[nn.Module] = [getattr(self, name).requires_grad_(False) for name in sorted(frozen)]

    def train(self, mode: bool = True) -> VisionLanguageModel:
        """Frozen encoders, and frozen parts of them, stay in evaluation mode: no dropout, no moving statistics."""
        super().train(mode)
        for part in self.resting:
            part.eval()
        return self

    def depths(self) -> dict[str, Depth]:
        """Where each parameter of the encoders stands in its encoder."""
        encoders = {"vision": self.vision, "language": self.language}
        return {f"{n}.{own}": d for n, encoder in encoders.items() for own, d in depths_of(encoder, n).items()}

    def encode_image(self, image: UInt8[Tensor, "b 3 h w"] | Float[Tensor, "b *k p dv"]) -> Float[Tensor, "b *k p dv"]:
        """States of the vision encoder alone. Pixels are bytes and are normalised here, on the device.

        What is not bytes are states already, which a frozen encoder gave before. Where the fusion takes the states of
        the last k layers, they are these, the last one last; `last_layer` takes that one.
        """
        if image.is_floating_point():
            return image
        pixels = (image - cast(Tensor, self.pixel_mean)) / cast(Tensor, self.pixel_std)
        with torch.set_grad_enabled(torch.is_grad_enabled() and "vision" not in self.frozen):
            return self._states(self.vision, pixels)

    def encode_text(self, ids: Int[Tensor, "n l"], mask: Bool[Tensor, "n l"]) -> Float[Tensor, "n *k l dl"]:
        """States of the language encoder alone, of its last k layers where the fusion takes these."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and "language" not in self.frozen):
            return self._states(self.language, ids, mask)

    def project_image(self, states: Float[Tensor, "b *k p dv"]) -> Float[Tensor, "b *k q d"]:
        """The vision encoder's states in the fusion's width; in training without the tokens that are dropped."""
        if self.training and self.token_dropout:
            states = drop_tokens(states, self.token_dropout, num_kept=1)
        return self.vision_projection(states)  # type: ignore[no-any-return]  # a module's call gives Any

    def last_layer(self, states: Float[Tensor, "b *k p d"]) -> Float[Tensor, "b p d"]:
        """Those of the encoder's last layer, which is all there is unless the fusion takes more."""
        return states[:, -1] if self.num_encoder_layers else states

    def _states(self, encoder: nn.Module, *inputs: Tensor) -> Tensor:
        if self.num_encoder_layers:
            return torch.stack(cast(Any, encoder).layers(*inputs, self.num_encoder_layers), dim=1)
        return encoder(*inputs)  # type: ignore[no-any-return]  # a module's call gives Any

    def encode(
        self, image: UInt8[Tensor, "b 3 h w"] | Float[Tensor, "b *k p dv"] | None, views: Sequence[View]
    ) -> list[Encoded]:
        """The states of each view, in order, with nothing computed twice.

        Views whose pairs are chosen by the states of this step (`View.choose`) hold them afterwards.
        """
        image_states = None
        if any(view.kind != "text" for view in views):
            if image is None:
                raise ValueError("a view asks for images, but the batch has none")
            image_states = self.encode_image(image)
        others = [view.chosen_from for view in views if view.chosen_from is not None]
        text_states = self._encode_distinct_texts([*views, *others])
        joint = [view for view in [*views, *others] if view.kind in ("pair", "apart")]
        image, texts = None, {}
        if joint:
            image = self.project_image(cast(Tensor, image_states))
            own = {id(view.text_ids) for view in joint if view.text_ids is not None}
            texts = {number: self.language_projection(text_states[number]) for number in own}
        for view in views:
            if view.choose is not None and view.chosen_from is not None:
                with torch.no_grad():
                    view.text_index, view.image_index = view.choose(self._apart(view.chosen_from, image, texts))
        pairs = iter(self._fuse(image, texts, [view for view in views if view.kind == "pair"]))
        encoded = []
        for view in views:
            if view.kind == "image":
                encoded.append(Encoded(image=self.last_layer(cast(Tensor, image_states))))
            elif view.kind == "text":
                encoded.append(Encoded(text=self.last_layer(text_states[id(view.text_ids)])))
            elif view.kind == "apart":
                encoded.append(self._apart(view, image, texts))
            else:
                encoded.append(next(pairs))
        return encoded

    def pool_in_turn(
        self,
        image: UInt8[Tensor, "b 3 h w"] | Float[Tensor, "b *k p dv"],
        ids: Int[Tensor, "n l"],
        mask: Bool[Tensor, "n l"],
    ) -> list[Float[Tensor, "n pooled"]]:
        """Pooled pairs of each text with its first image, its second and so on, which lie in that order along b.

        From the second on, an image meets the text's states as the fusion with the image before left them, each image's
        layers being the same. The reference paper's code (arXiv 2211.00262) does so; `encode` fuses each pair alone.
        Bridges to the text's later layers are crossed again: what was fused takes the place of the first of them.
        """
        images = self.project_image(self.encode_image(image)).split(len(ids))
        text, pooled = self.language_projection(self.encode_text(ids, mask)), []
        for states in images:
            fused, fused_text = self.fusion(states, text, mask)
            pooled.append(self.pooler(fused_text, fused))
            text = torch.cat([fused_text[:, None], text[:, 1:]], dim=1) if self.num_encoder_layers else fused_text
        return pooled

    def fuse_all(
        self, image: Float[Tensor, "b *k p d"], text_states: Float[Tensor, "1 *k l dl"], mask: Bool[Tensor, "1 l"]
    ) -> Float[Tensor, "b pooled"]:
        """Pooled pairs of one text, from states of the language encoder, with every image, projected once before."""
        size = len(image)
        text = self.language_projection(text_states)
        text = text.expand(size, *text.shape[1:])
        fused_image, fused_text = self.fusion(image, text, mask.expand(size, -1))
        return self.pooler(fused_text, fused_image)  # type: ignore[no-any-return]  # a module's call gives Any

    def _apart(self, view: View, image: Tensor | None, texts: dict[int, Tensor]) -> Encoded:
        """Projected states of the last layers, and no text where the view has none."""
        text = texts.get(id(view.text_ids))
        return Encoded(None if text is None else self.last_layer(text), self.last_layer(cast(Tensor, image)))

    def _encode_distinct_texts(self, views: Sequence[View]) -> dict[int, Float[Tensor, "b *k l dl"]]:
        """Language states by the identity of each distinct `text_ids` tensor, from one call of the encoder."""
        distinct = {id(view.text_ids): view for view in views if view.text_ids is not None}
        if not distinct:
            return {}
        ids = torch.cat([cast(Tensor, view.text_ids) for view in distinct.values()])
        mask = torch.cat([cast(Tensor, view.text_mask) for view in distinct.values()])
        states = self.encode_text(ids, mask).split([len(cast(Tensor, view.text_ids)) for view in distinct.values()])
        return dict(zip(distinct, states, strict=True))

    def _fuse(self, image: Tensor | None, projected: dict[int, Tensor], views: Sequence[View]) -> list[Encoded]:
        """All pairs of all views through the fusion in one call, from projected states."""
        if not views:
            return []
        assert image is not None
        images, texts, masks = [], [], []
        for view in views:
            text, mask = projected[id(view.text_ids)], cast(Tensor, view.text_mask)
            images.append(image if view.image_index is None else image[view.image_index])
            texts.append(text if view.text_index is None else text[view.text_index])
            masks.append(mask if view.text_index is None else mask[view.text_index])
        fused_image, fused_text = self.fusion(torch.cat(images), torch.cat(texts), torch.cat(masks))
        pooled = self.pooler(fused_text, fused_image)
        sizes = [len(part) for part in masks]
        parts = zip(fused_text.split(sizes), fused_image.split(sizes), pooled.split(sizes), strict=True)
        return [Encoded(text, image, pool) for text, image, pool in parts]


def _refuse_missing_layers(encoders: dict[str, nn.Module], count: int) -> None:
    for name, encoder in encoders.items():
        if not hasattr(encoder, "layers"):
            raise ValueError(f"the fusion takes {count} layers of the {name} encoder, which hands out its last alone")
        there = len(cast(Any, encoder).blocks)
        if there < count:
            raise ValueError(f"the fusion takes {count} layers of the {name} encoder, which has {there}")
