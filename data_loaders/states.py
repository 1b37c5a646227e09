"""States of a frozen vision encoder on disk, shared by all runs that show the same images to the same encoder."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from jaxtyping import Float
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from data_loaders.images import Images, sound_batches
from data_loaders.shards import DamagedError
from vlm.sharing import share
from vlm.types import Damage

STATES = "states"
SEGMENT_BYTES = 2**26  # what a kill can lose, and what is read at once to check it
PARTIAL = ".partial-"


class StoredImages:
    """States in place of the images they came from, mapped from the files of a store: pages come as they are read.

    `damages`: images that had no pixels; to ask for one is a `DamagedError`, as it was before.
    """

    def __init__(self, places: Mapping[str, tuple[Path, int]], damages: Mapping[str | int, Damage]) -> None:
        self.places, self.damages = places, dict(damages)
        self._open: dict[Path, Tensor] = {}

    def __call__(self, keys: Sequence[str]) -> Float[Tensor, "b *k p d"]:
        damages: dict[str | int, Damage] = {key: self.damages[key] for key in keys if key in self.damages}
        if damages:
            raise DamagedError(damages)
        return torch.stack([self._states(file)[row] for file, row in (self.places[key] for key in keys)])

    def _states(self, file: Path) -> Tensor:
        if file not in self._open:
            with safe_open(file, framework="pt") as opened:
                self._open[file] = opened.get_tensor(STATES)
        return self._open[file]

    def __getstate__(self) -> dict[str, Any]:
        """Another process maps the files itself."""
        return self.__dict__ | {"_open": {}}


class StateStore:
    """A folder of safetensors files, each with the float32 states [m p d] or [m k p d] of some images and their keys.

    `identity` is all that the states depend on beside the keys: encoder, weights, data, transform, libraries. It names
    the folder. Files appear whole or not at all and are never changed, so that any number of runs can share them: what
    a run lacks it adds, be its images some, more or others. One process adds at a time, and the rest wait for it.
    """

    def __init__(self, root: Path, identity: Mapping[str, Any]) -> None:
        text = json.dumps(identity, sort_keys=True)
        self.root, self.text = root, text
        self.folder = root / hashlib.sha256(text.encode()).hexdigest()[:16]

    def encode(
        self,
        images: Images,
        keys: Sequence[str],
        encoder: Callable[[Tensor], Tensor],
        max_bytes: int,
        batch_size: int = 64,
        shown: Callable[[Sequence[int]], Iterable[int]] = iter,
        skip_damaged: bool = False,
    ) -> StoredImages | None:
        """States of all these images, encoded where the store lacks them.

        None, and a line that says why, where the cache folder would hold more than `max_bytes` or the disk is full.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "identity.json").write_text(self.text)
            with _alone(self.folder):
                places = self._places(set(keys))
                lacking = [key for key in keys if key not in places]
                damages: dict[str | int, Damage] = {}
                for found in _encoded(images, lacking, encoder, batch_size, shown, skip_damaged, damages):
                    if isinstance(found, int):  # bytes of one image, before anything is written
                        if not self._fits(found * len(lacking), max_bytes):
                            return None
                    else:
                        self._add(*found)
                places = self._places(set(keys), check=False)
        except OSError as error:
            _tell(f"{self.folder}: states of images cannot be kept ({error.strerror}). The run goes on without")
            return None
        return StoredImages(places, damages)

    def _places(self, wanted: set[str], check: bool = True) -> dict[str, tuple[Path, int]]:
        """File and row of each wanted image that is there. Files that are damaged are removed, to be made anew."""
        places: dict[str, tuple[Path, int]] = {}
        for file in sorted(self.folder.glob("*.safetensors")):
            try:
                with safe_open(file, framework="pt") as opened:
                    told = opened.metadata()
                    keys = json.loads(told["keys"])
                    mine = [(row, key) for row, key in enumerate(keys) if key in wanted and key not in places]
                    if mine and check and _checksum(opened.get_tensor(STATES)) != told["crc32"]:
                        raise ValueError("its checksum is another")
            except OSError as error:
                if error.errno is not None:  # the system's; safetensors has none
                    raise
                self._remove(file, error)
            except Exception as error:  # safetensors, JSON and the lines above each raise their own
                self._remove(file, error)
            else:
                places |= {key: (file, row) for row, key in mine}
        return places

    def _remove(self, file: Path, error: Exception) -> None:
        _tell(f"{file}: damaged ({error}). Its images are encoded again")
        file.unlink()

    def _add(self, keys: list[str], states: Tensor) -> None:
        name = hashlib.sha256("\n".join(keys).encode()).hexdigest()[:16]
        partial, file = self.folder / f"{PARTIAL}{name}", self.folder / f"{name}.safetensors"
        try:
            save_file({STATES: states}, partial, {"keys": json.dumps(keys), "crc32": _checksum(states)})
        except OSError:
            raise
        except Exception as error:  # safetensors' own, for a full disk too
            raise OSError(None, str(error)) from None
        share(partial)
        partial.replace(file)

    def _fits(self, more: int, max_bytes: int) -> bool:
        there = sum(file.stat().st_size for file in self.root.rglob("*.safetensors"))
        free = shutil.disk_usage(self.folder).free
        if there + more <= max_bytes and more <= free:
            return True
        limit = (
            f"trainer.frozen_states_disk_gib={max_bytes / 2**30:g}" if more <= free else f"{_gib(free)} that are free"
        )
        _tell(
            f"{self.root}: holds {_gib(there)}, and the states of this run's images need {_gib(more)} more, beyond "
            f"{limit}. The run goes on without. Delete folders there that no run needs, or raise the limit"
        )
        return False


def _encoded(
    images: Images,
    keys: Sequence[str],
    encoder: Callable[[Tensor], Tensor],
    batch_size: int,
    shown: Callable[[Sequence[int]], Iterable[int]],
    skip_damaged: bool,
    damages: dict[str | int, Damage],
) -> Iterator[int | tuple[list[str], Tensor]]:
    """First how many bytes the states of an image take, then keys and states of a file's worth of images at a time.

    A last batch that is short is filled up: rows of batches of one size are more alike than those of two sizes.
    """
    names, parts, per_file = list[str](), list[Tensor](), 0
    for mine, pixels in sound_batches(images, keys, batch_size, shown, skip_damaged, damages):
        filled = torch.cat([pixels, pixels[:1].expand(batch_size - len(mine), *pixels.shape[1:])])
        part = encoder(filled)[: len(mine)].float().cpu()
        if not per_file:
            yield part[0].nbytes
            per_file = math.ceil(SEGMENT_BYTES / part[0].nbytes)
        names += mine
        parts.append(part)
        if len(names) >= per_file:
            yield names, torch.cat(parts)
            names, parts = [], []
    if names:
        yield names, torch.cat(parts)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time, the others waiting; on file systems without locks the same states may be kept twice."""
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire()
    except (NotImplementedError, OSError):
        pass
    else:  # what a killed process had begun
        for partial in folder.glob(f"{PARTIAL}*"):
            partial.unlink()
    try:
        yield
    finally:
        lock.release()


def _checksum(states: Tensor) -> str:
    return f"{zlib.crc32(states.contiguous().numpy().data.cast('B')):08x}"


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


def _tell(line: str) -> None:
    Console(stderr=True, soft_wrap=True).print(line, markup=False, highlight=False)
