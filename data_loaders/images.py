"""The images of a batch by their keys: as pixels, as an even grey, or as states of an encoder that never changes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from data_loaders.shards import ShardReader
from data_loaders.transforms import ImageTransform
from vlm.errors import UserError


@runtime_checkable
class Images(Protocol):
    """What a batch needs of its images."""

    def __call__(self, keys: Sequence[str]) -> Tensor:
        """One row a key; keys may repeat."""
        ...


class DecodedImages:
    """Pixels from shards; each image of a batch is read and decoded once."""

    def __init__(self, reader: ShardReader, transform: ImageTransform) -> None:
        self.reader, self.transform = reader, transform

    def __call__(self, keys: Sequence[str]) -> UInt8[Tensor, "b 3 h w"]:
        pixels = {key: self._pixels(key) for key in dict.fromkeys(keys)}
        return torch.stack([pixels[key] for key in keys])

    def _pixels(self, key: str) -> UInt8[Tensor, "3 h w"]:
        try:
            position = self.reader.position(key)
        except KeyError:
            raise UserError(f"{self.reader.index.folder}: image {key!r} is asked for, but it is not here") from None
        return self.transform(self.reader.image(position), key)


class GreyImages:
    """An even grey in place of every image, for the baseline that may not look. Nothing is read."""

    def __init__(self, image_pixels: int) -> None:
        self.grey = torch.full((1, 3, image_pixels, image_pixels), 127, dtype=torch.uint8)

    def __call__(self, keys: Sequence[str]) -> UInt8[Tensor, "b 3 h w"]:
        return self.grey.expand(len(keys), -1, -1, -1)


class EncodedImages:
    """States of a frozen vision encoder, one row an image, in place of the pixels they came from."""

    def __init__(self, states: Float[Tensor, "n p d"], rows: Mapping[str, int]) -> None:
        self.states, self.rows = states, rows

    @classmethod
    def encode(
        cls,
        images: Images,
        keys: Sequence[str],
        encoder: Callable[[Tensor], Tensor],
        max_bytes: int,
        batch_size: int = 64,
        shown: Callable[[Sequence[int]], Iterable[int]] = iter,
    ) -> EncodedImages | None:
        """All images through the encoder once, in the order of `keys`; None if their states need over `max_bytes`.

        The batches are the same whatever is asked for later, so a resumed run sees the same states to the last bit.
        """
        states: Tensor | None = None
        for start in shown(range(0, len(keys), batch_size)):
            part = encoder(images(keys[start : start + batch_size])).float().cpu()
            if states is None:
                if part[0].nbytes * len(keys) > max_bytes:
                    return None
                states = torch.empty(len(keys), *part.shape[1:])
            states[start : start + len(part)] = part
        return None if states is None else cls(states, {key: row for row, key in enumerate(keys)})

    def __call__(self, keys: Sequence[str]) -> Float[Tensor, "b p d"]:
        return self.states[[self.rows[key] for key in keys]]
