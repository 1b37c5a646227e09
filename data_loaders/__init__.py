"""Where the data comes from. Every kind ends in one folder layout, the data root:

pairs/{train,validation}      shards of images with captions, machine labels, class names
unimodal/{train,validation}   shards of images with class names only
texts/{train,validation}.txt  unpaired texts, one a line
vqav2/ gqa/ nlvr2/            official question files, and `images`: shards keyed by the images' names; where a release
                              lacked some, `missing_images.json` names them
retrieval/                    sets of held-out captions, and their images

Beside the shards of `pairs` and `unimodal` that `vlm prepare` made of a release lie a manifest, a report, the keys that
were used and the examples that were lost (`prepare/image_text.py`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt

from data_loaders.cache import cache_folder
from data_loaders.prepare.emoji import EmojiConfig
from data_loaders.world import FORMAT, WorldConfig
from vlm.config import Config, fingerprint, not_identity
from vlm.errors import UserError


class DataOptions(Config):
    """What all kinds of data share."""

    part: Literal["pairs", "images", "texts"] = "pairs"  # what pretraining reads
    augmentation: Literal["none", "randaugment"] = "none"
    num_workers: NonNegativeInt = not_identity(0, description="loader processes a rank")


class WorldData(DataOptions):
    """The embedded procedural world, made on first use."""

    type: Literal["world"] = "world"
    world: WorldConfig = WorldConfig()

    @property
    def root(self) -> Path:
        return cache_folder() / f"world-{FORMAT}-{fingerprint(self.world)}"

    def prepare(self, progress: bool = True) -> Path:
        """The data root, made if it is not there."""
        if not self.root.is_dir():
            from data_loaders.world import write_world

            write_world(self.world, self.root, progress)
        return self.root


class EmojiData(DataOptions):
    """Real pictures, captions and tags: emoji in three drawing styles, fetched on first use."""

    type: Literal["emoji"] = "emoji"
    emoji: EmojiConfig = EmojiConfig()

    @property
    def root(self) -> Path:
        return cache_folder() / f"emoji-{fingerprint(self.emoji)}"

    def prepare(self, progress: bool = True) -> Path:
        """The data root, fetched and rendered if it is not there."""
        if not self.root.is_dir():
            from data_loaders.prepare.emoji import write_emoji

            write_emoji(self.emoji, self.root, progress)
        return self.root


class FolderData(DataOptions):
    """A data root that was prepared before."""

    type: Literal["folder"] = "folder"
    root: Path

    def prepare(self, progress: bool = True) -> Path:
        if not self.root.is_dir():
            raise UserError(f"data.root: {self.root} is no folder. Prepare the data there first")
        return self.root


DataConfig = Annotated[WorldData | EmojiData | FolderData, Field(discriminator="type")]
