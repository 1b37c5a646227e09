"""Where the data comes from. Every kind ends in one folder layout, the data root:

pairs/{train,validation}      shards of images with captions, machine labels, class names
unimodal/{train,validation}   shards of images with class names only
texts/{train,validation}.txt  unpaired texts, one a line
vqav2/ gqa/ nlvr2/            official question files, and `images`: shards keyed by the images' names; where a release
                              lacked some, `missing_images.json` names them
csv/                          a user's own questions, written from a table (`prepare/csv_table.py`)
retrieval/                    sets of held-out captions, and their images

Beside the shards of `pairs` and `unimodal` that `vlm prepare` made of a release lie a manifest, a report, the keys that
were used and the examples that were lost (`prepare/image_text.py`).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from data_loaders.cache import cache_folder
from data_loaders.prepare.emoji_config import EmojiConfig
from data_loaders.remote import REMOTE, RemoteFolder
from data_loaders.world.config import FORMAT, WorldConfig
from vlm.config import Config, always_identity, fingerprint, not_identity
from vlm.errors import UserError

if TYPE_CHECKING:
    from data_loaders.prepare.csv_table import CSVRoot
    from data_loaders.shards import Index


class DataOptions(Config):
    """What all kinds of data share."""

    part: Literal["pairs", "images", "texts"] = "pairs"  # what pretraining reads
    augmentation: Literal["none", "randaugment", "released"] = "none"  # released: as the reference paper's code has it
    interpolation: Literal["bicubic", "bilinear"] | None = None  # None: the vision encoder's own
    fit: Literal["squeeze", "crop"] = "squeeze"  # the whole picture in a square, or the central square of it
    decode: Literal["reduced", "exact"] = "reduced"  # JPEGs at the smallest scale that serves, or whole
    shuffle_shards: PositiveInt | None = None  # a pass shuffles within so many shards at a time; None: within all
    damaged: Literal["stop", "skip"] = "stop"  # skip: another example of the window stands in, and the run says so
    num_workers: NonNegativeInt = not_identity(0, description="loader processes a rank")

    @property
    def is_remote(self) -> bool:
        return False

    def open_index(self, root: Path, name: str) -> Index:
        """The index of a shard folder of the data root that `prepare` gave."""
        from data_loaders.shards import open_index

        return open_index(root / name)


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
            from data_loaders.world.writing import write_world

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
    """A data root that was prepared before, in a folder or behind a URL.

    A URL is any that fsspec knows (`s3://`, `https://`, `file://`), or `pipe:COMMAND {}`: a command that prints the
    file whose name replaces `{}`, given as `'data.root="pipe:COMMAND {}"'`.
    It serves pretraining; the questions of tasks are read from folders.

    `expected`: how many training examples each folder of the root will hold, such as {pairs: 2840000, vqav2: 443757}.
    Costs are estimated with it while the data is not there; no run reads it.
    """

    type: Literal["folder"] = "folder"
    root: Annotated[str, Field(pattern=REMOTE)] | Path = Field(union_mode="left_to_right")
    decode: Literal["reduced", "exact"] = always_identity("reduced")  # runs from before it was a choice were exact
    shuffle_shards: PositiveInt | None = 8
    expected: dict[str, PositiveInt] = not_identity({})
    cache_gib: PositiveFloat = not_identity(64.0)  # disk for shards that were fetched, shared by all runs of a machine

    @property
    def is_remote(self) -> bool:
        return isinstance(self.root, str)

    def prepare(self, progress: bool = True) -> Path:
        """The folder, or one of the cache with what a remote root's pretraining reads beside shards."""
        if isinstance(self.root, str):
            names = {"pairs": "pairs", "images": "unimodal", "texts": None}[self.part]
            splits = ("train", "validation")
            folders = [f"{names}/{split}" for split in splits] if names else []
            return self._remote.mirror(folders, [f"texts/{split}.txt" for split in splits])
        if not self.root.is_dir():
            raise UserError(f"data.root: {self.root} is no folder. Prepare the data there first")
        return self.root

    def open_index(self, root: Path, name: str) -> Index:
        from data_loaders.shards import open_index

        return open_index(root / name, self._remote.folder(name) if self.is_remote else None)

    @property
    def _remote(self) -> RemoteFolder:
        return RemoteFolder(str(self.root), "", int(self.cache_gib * 2**30))


class CSVData(DataOptions):
    """A user's own table of questions or statements about the images of a folder, made into a data root on first use.

    Its columns: `vlm/tasks/csv.py`. Another table or other images make another root.
    """

    type: Literal["csv"] = "csv"
    path: Path  # the training rows; some of them validate unless `validation` is given
    images: Path  # the folder below which the table's images lie
    validation: Path | None = None
    test: Path | None = None
    validation_fraction: float = Field(0.1, gt=0, lt=1)  # of the images, by a hash of their names

    @property
    def root(self) -> Path:
        return cache_folder() / f"csv-{self._table().name()}"

    def prepare(self, progress: bool = True) -> Path:
        """The data root, made if it is not there."""
        table = self._table()
        root = cache_folder() / f"csv-{table.name()}"
        if not root.is_dir():
            table.write(root, progress)
        return root

    def _table(self) -> CSVRoot:
        from data_loaders.prepare.csv_table import CSVRoot

        return CSVRoot(self.path, self.images, self.validation, self.test, self.validation_fraction)


DataConfig = Annotated[WorldData | EmojiData | FolderData | CSVData, Field(discriminator="type")]
