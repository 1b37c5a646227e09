"""An image on its way into a shard: kept byte for byte, or re-encoded to a chosen short side; checked in any case."""

from __future__ import annotations

import io
from dataclasses import dataclass

from PIL import Image

from data_loaders.decoding import as_rgb, check_image, decoding, open_image


@dataclass(frozen=True)
class Pictures:
    """How images are kept. `short_side` None: byte for byte; otherwise JPEG of this short side, never enlarged."""

    short_side: int | None = None
    quality: int = 90

    def __call__(self, data: bytes, name: str) -> bytes:
        """The bytes to keep; `ImageError` where they do not decode. Equal bytes in, equal bytes out.

        An image whose short side is no longer than wanted keeps its bytes. Pixels stay as they are stored: like the
        loader, this leaves the camera's orientation mark aside.
        """
        if self.short_side is None:
            check_image(data, name)
            return data
        with decoding(name):
            image = open_image(data, name)
            short = min(image.size)
            if short <= self.short_side:
                check_image(data, name)
                return data
            width, height = (max(1, round(side * self.short_side / short)) for side in image.size)
            if image.format == "JPEG":  # decoded at the smallest scale that is twice as large as wanted, or larger
                image.draft(None, (2 * width, 2 * height))
            small = as_rgb(image).resize((width, height), Image.Resampling.BICUBIC)
            encoded = io.BytesIO()
            small.save(encoded, "JPEG", quality=self.quality)
            return encoded.getvalue()
