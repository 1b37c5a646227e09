"""What happens where an example of a window is damaged: the run stops, or another example of the window stands in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from data_loaders.images import DecodedImages, Images
from data_loaders.loader import step_seed
from data_loaders.shards import DamagedError, ShardReader
from vlm.errors import UserError
from vlm.supervision.subset import Positions
from vlm.types import Damage, Record

OnDamage = Literal["stop", "skip"]

MAX_STAND_INS = 100  # if as many drawn in a row are damaged, nearly all are


class WindowReader:
    """Records and images of a window of a shard folder, by their place in the window.

    With `damaged="skip"` a damaged example is replaced by the first sound one of a sequence that `seed` and its place
    alone decide, so that a batch is the same on any rank, worker or restart. What a process has once found damaged it
    does not read again; this changes no batch.
    """

    def __init__(
        self, reader: ShardReader, positions: Positions, images: Images, damaged: OnDamage = "stop", seed: int = 0
    ) -> None:
        self.reader, self.positions, self.images = reader, positions, images
        self.damaged, self.seed = damaged, seed
        self._damages: dict[int, Damage] = {}  # by position on the ring

    def __len__(self) -> int:
        return len(self.positions)

    def read(self, places: Sequence[int]) -> tuple[list[Record], Tensor, tuple[Damage, ...]]:
        """The records and images at these places, or at those that stand in for them, and what was replaced."""
        while True:
            chains = [self._chain(place) for place in places]
            records = [record for _, record, _ in chains]
            try:
                pixels = self._pixels([position for position, _, _ in chains], [record.key for record in records])
            except DamagedError as error:
                self._remember(error)
                continue
            return records, pixels, tuple(dict.fromkeys(damage for *_, damages in chains for damage in damages))

    def keys(self) -> list[str]:
        """The keys of all examples but those whose texts are damaged."""
        found = []
        for place in range(len(self)):
            try:
                found.append(self.reader.text(int(self.positions[place])).key)
            except DamagedError as error:
                self._remember(error)
        return found

    def read_ahead(self, places: Sequence[int]) -> None:
        """Begin to fetch the shards of these places, where they are remote."""
        if self.reader.index.remote is not None:
            self.reader.read_ahead([int(self.positions[place]) for place in places])

    def _pixels(self, positions: Sequence[int], keys: Sequence[str]) -> Tensor:
        if isinstance(self.images, DecodedImages) and self.images.reader is self.reader:
            return self.images.at(positions, keys)
        return self.images(keys)

    def _chain(self, place: int) -> tuple[int, Record, list[Damage]]:
        """Position and content of the first record from `place` on not known as damaged, and the damages before it."""
        damages: list[Damage] = []
        for number in range(MAX_STAND_INS + 1):
            at = place if number == 0 else step_seed(self.seed, place, f"stand-in {number}") % len(self)
            position = int(self.positions[at])
            if position not in self._damages:
                try:
                    return position, self.reader.text(position), damages
                except DamagedError as error:
                    self._remember(error)
            damages.append(self._damages[position])
        raise UserError(f"{self.reader.index.folder}: {MAX_STAND_INS} damaged examples in a row. Prepare it again")

    def _remember(self, error: DamagedError) -> None:
        if self.damaged == "stop":
            raise UserError(f"{error}, or give data.damaged=skip") from None
        self._damages |= {damage.position: damage for damage in error.damages.values()}
