"""The images of a batch by their keys: as pixels, as states of an encoder that never changes, or as what stands in
for them in a baseline that may not look."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from data_loaders.decoding import ImageError
from data_loaders.shards import DamagedError, ShardReader, ring_hash
from data_loaders.transforms import ImageTransform
from vlm.errors import UserError
from vlm.types import Damage


@runtime_checkable
class Images(Protocol):
    """What a batch needs of its images."""

    def __call__(self, keys: Sequence[str]) -> Tensor:
        """One row a key; keys may repeat."""
        ...


class DecodedImages:
    """Pixels from shards; each image of a batch is read and decoded once.

    One `DamagedError` names all damaged ones of a batch, before anything is drawn from torch's generator. An even grey
    stands in for those of `missing`, which the release lacked when it was prepared.
    """

    def __init__(self, reader: ShardReader, transform: ImageTransform, missing: Collection[str] = ()) -> None:
        self.reader, self.transform, self.missing = reader, transform, missing

    def __call__(self, keys: Sequence[str]) -> UInt8[Tensor, "b 3 h w"]:
        return self._batch([(key, None) for key in keys])

    def at(self, positions: Sequence[int], keys: Sequence[str]) -> UInt8[Tensor, "b 3 h w"]:
        """The images at these positions of the reader, which hold these keys: no key is searched for."""
        return self._batch(list(zip(keys, positions, strict=True)))

    def _batch(self, wanted: Sequence[tuple[str, int | None]]) -> UInt8[Tensor, "b 3 h w"]:
        pictures: dict[tuple[str, int | None], Tensor | Image.Image] = {}
        damages: dict[str | int, Damage] = {}
        for key, position in dict.fromkeys(wanted):
            try:
                pictures[key, position] = self._decoded(key, position)
            except DamagedError as error:
                damages[key] = next(iter(error.damages.values()))
        if damages:
            raise DamagedError(damages)
        pixels = {image: self.transform.augment(picture) for image, picture in pictures.items()}
        return torch.stack([pixels[image] for image in wanted])

    def _decoded(self, key: str, position: int | None) -> UInt8[Tensor, "3 h w"] | Image.Image:
        if position is None:
            try:
                position = self._position(key)
            except KeyError:
                if key in self.missing:
                    return grey(self.transform.image_pixels)
                raise UserError(f"{self.reader.index.folder}: image {key!r} is asked for, but it is not here") from None
        data = self.reader.image(position)
        try:
            return self.transform.decoded(data, key)
        except ImageError as error:
            raise DamagedError({position: self.reader.damage(position, "image", f"is damaged ({error})")}) from None

    def _position(self, key: str) -> int:
        """Where the image of this key lies. A broken hash can hide sound ones from the search; then all are seen."""
        try:
            return self.reader.position(key)
        except KeyError:
            if key in self.missing:
                raise
            found = np.flatnonzero(self.reader.index.hashes == ring_hash(key))
            if not len(found):
                raise
            return int(found[0])


class OneImage:
    """One image in place of every other, for the baselines that may not look. Nothing is read."""

    def __init__(self, pixels: UInt8[Tensor, "3 h w"]) -> None:
        self.pixels = pixels[None]

    def __call__(self, keys: Sequence[str]) -> UInt8[Tensor, "b 3 h w"]:
        return self.pixels.expand(len(keys), -1, -1, -1)


class GreyImages(OneImage):
    """An even grey in place of every image."""

    def __init__(self, image_pixels: int) -> None:
        super().__init__(grey(image_pixels))


class MeanImages(OneImage):
    """The mean of some images in place of every image: what a model knows of pictures before it looks."""

    def __init__(self, images: Images, keys: Iterable[str]) -> None:
        total, count = torch.zeros(()), 0
        for key in keys:
            total, count = total + images([key])[0].double(), count + 1
        if not count:
            raise UserError("the mean image needs at least one training image, and there is none")
        super().__init__((total / count).round().to(torch.uint8))


class ShuffledImages:
    """The image of another key in place of every image; the same one each time."""

    def __init__(self, images: Images, other: Mapping[str, str]) -> None:
        self.images, self.other = images, other

    def __call__(self, keys: Sequence[str]) -> Tensor:
        return self.images([self.other[key] for key in keys])


def derangement(groups: Iterable[tuple[str, ...]], seed: int) -> dict[str, str]:
    """For each image another one, drawn by `seed`; the images of a group stay together and in order.

    A group is what one question asks about: one image, or the two of a pair. Each group takes the place of exactly
    one other, so the images that are seen are the same as before.
    """
    distinct = sorted(set(groups))
    random.Random(seed).shuffle(distinct)
    if len(distinct) == 1:
        raise UserError("images cannot be shuffled where all questions are about the same one")
    others = [*distinct[1:], *distinct[:1]]  # one cycle through all, so that none keeps its own
    return {key: new for old, other in zip(distinct, others, strict=True) for key, new in zip(old, other, strict=True)}


def grey(image_pixels: int) -> UInt8[Tensor, "3 h w"]:
    """An even grey."""
    return torch.full((3, image_pixels, image_pixels), 127, dtype=torch.uint8)


def sound_batches(
    images: Images,
    keys: Sequence[str],
    batch_size: int,
    shown: Callable[[range], Iterable[int]],
    skip_damaged: bool,
    damages: dict[str | int, Damage],
) -> Iterator[tuple[list[str], Tensor]]:
    """Keys and pixels of so many images at a time. Damaged ones stop it, or are left out and noted in `damages`."""
    for start in shown(range(0, len(keys), batch_size)):
        mine = list(keys[start : start + batch_size])
        try:
            pixels = images(mine)
        except DamagedError as error:
            if not skip_damaged:
                raise
            damages |= error.damages
            mine = [key for key in mine if key not in error.damages]
            if not mine:
                continue
            pixels = images(mine)
        yield mine, pixels


class EncodedImages:
    """States of a frozen vision encoder, one row an image, in place of the pixels they came from.

    `damages`: images that had no pixels; to ask for one is a `DamagedError`, as it was before.
    """

    def __init__(
        self,
        states: Float[Tensor, "n *k p d"],
        rows: Mapping[str, int],
        damages: Mapping[str | int, Damage] | None = None,
    ) -> None:
        self.states, self.rows, self.damages = states, rows, dict(damages or {})

    @classmethod
    def encode(
        cls,
        images: Images,
        keys: Sequence[str],
        encoder: Callable[[Tensor], Tensor],
        max_bytes: int,
        batch_size: int = 64,
        shown: Callable[[Sequence[int]], Iterable[int]] = iter,
        skip_damaged: bool = False,
    ) -> EncodedImages | None:
        """All images through the encoder once, in the order of `keys`; None if their states need over `max_bytes`.

        The batches are the same whatever is asked for later, so a resumed run sees the same states to the last bit.
        """
        states: Tensor | None = None
        done, rows = 0, dict[str, int]()
        damages: dict[str | int, Damage] = {}
        for mine, pixels in sound_batches(images, keys, batch_size, shown, skip_damaged, damages):
            part = encoder(pixels).float().cpu()
            if states is None:
                if part[0].nbytes * len(keys) > max_bytes:
                    return None
                states = torch.empty(len(keys), *part.shape[1:])
            states[done : done + len(part)] = part
            rows |= {key: done + row for row, key in enumerate(mine)}
            done += len(part)
        return None if states is None else cls(states, rows, damages)

    def __call__(self, keys: Sequence[str]) -> Float[Tensor, "b *k p d"]:
        damages: dict[str | int, Damage] = {key: self.damages[key] for key in keys if key in self.damages}
        if damages:
            raise DamagedError(damages)
        return self.states[[self.rows[key] for key in keys]]
