"""Features of a folder of images, by the vision encoder of a trained model, into one file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor

from data_loaders.decoding import ImageError
from data_loaders.progress import progress_bar
from vlm.errors import UserError
from vlm.hub import LoadedModel, read_image
from vlm.sharing import share

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
ROW_GROUP = 1024  # images that are written at a time: 3 MB at a width of 768

Pool = Literal["cls", "mean"]
Write = Callable[[Sequence[str], NDArray[np.float32]], None]


def write_features(
    model: LoadedModel,
    images: Path,
    out: Path,
    pool: Pool = "cls",
    batch_size: int = 32,
    damaged: Literal["stop", "skip"] = "stop",
    progress: bool = True,
) -> int:
    """One row an image, by its path inside the folder, in order; returns how many there are.

    `pool`: the CLS state, or the mean over the patches. `out` ends in `.parquet` (columns `image` and `features`;
    memory does not grow with the number of images) or `.safetensors` (a tensor `features`; the paths are the JSON list
    `images` of its metadata). The file is there whole or not at all. A damaged image is an error that names it; with
    `damaged="skip"` it has no row, and is named at the end.
    """
    files = _image_files(images)
    names = [file.relative_to(images).as_posix() for file in files]
    writers: dict[str, Callable[[Path], AbstractContextManager[Write]]] = {
        ".parquet": _parquet,
        ".safetensors": _safetensors,
    }
    if out.suffix not in writers:
        raise UserError(f"{out}: must end in .parquet or .safetensors")
    if batch_size < 1:
        raise UserError(f"the batch size must be at least 1. Got {batch_size}")
    lost: list[ImageError] = []
    count, held_names, held_rows = 0, list[str](), list[NDArray[np.float32]]()

    def square(file: Path) -> Tensor | ImageError:
        try:
            return model.transform(read_image(file), str(file))
        except ImageError as error:
            return error

    with writers[out.suffix](out) as write, ThreadPoolExecutor() as threads, progress_bar(progress) as bar:
        task = bar.add_task("features", total=len(files))
        starts = range(0, len(files), batch_size)
        coming = [threads.submit(square, file) for file in files[:batch_size]]
        for start in starts:
            decoded = [one.result() for one in coming]
            # The next batch is decoded while this one is encoded, and no further one: memory stays as it is.
            coming = [threads.submit(square, file) for file in files[start + batch_size : start + 2 * batch_size]]
            failed = [one for one in decoded if isinstance(one, ImageError)]
            if failed and damaged == "stop":
                raise UserError(f"{failed[0]}. With --damaged skip it has no row, and the others have theirs")
            lost += failed
            whole = [
                (name, one)
                for name, one in zip(names[start : start + batch_size], decoded, strict=True)
                if isinstance(one, Tensor)
            ]
            if whole:
                held_names += [name for name, _ in whole]
                held_rows.append(_pooled(model, torch.stack([pixels for _, pixels in whole]), pool))
                count += len(whole)
            if len(held_names) >= ROW_GROUP or (start == starts[-1] and held_names):
                write(held_names, np.concatenate(held_rows))
                held_names, held_rows = [], []
            bar.advance(task, len(decoded))
        if not count:
            raise UserError(f"{images}: none of {len(files)} images can be decoded; {lost[0]}")
    for error in lost:
        Console(stderr=True).print(f"left out: {error}", markup=False, highlight=False)
    return count


def _image_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of images")
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
    if not files:
        raise UserError(f"{folder}: holds no image ({', '.join(SUFFIXES)})")
    return files


@torch.inference_mode()
def _pooled(model: LoadedModel, pixels: Tensor, pool: Pool) -> NDArray[np.float32]:
    states = model.model.last_layer(model.model.encode_image(pixels.to(model.device)))
    rows = states[:, 0] if pool == "cls" else states[:, 1:].mean(1)
    return rows.float().cpu().numpy()


@contextmanager
def _parquet(out: Path) -> Iterator[Write]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            f"{out}: Parquet needs pyarrow: pip install 'vlm-less-supervision[parquet]'. Or write .safetensors"
        ) from None
    with _whole_file(out) as partial:
        writer: Any = None

        def write(names: Sequence[str], rows: NDArray[np.float32]) -> None:
            nonlocal writer
            width = rows.shape[1]
            features = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(rows.reshape(-1)), width)
            table = pyarrow.table({"image": pyarrow.array(names, pyarrow.string()), "features": features})
            writer = writer or pyarrow.parquet.ParquetWriter(partial, table.schema)
            writer.write_table(table)

        try:
            yield write
        finally:
            if writer is not None:
                writer.close()


@contextmanager
def _safetensors(out: Path) -> Iterator[Write]:
    from safetensors.numpy import save_file

    names: list[str] = []
    rows: list[NDArray[np.float32]] = []

    def write(more: Sequence[str], features: NDArray[np.float32]) -> None:
        names.extend(more)
        rows.append(features)

    with _whole_file(out) as partial:
        yield write
        save_file({"features": np.concatenate(rows)}, partial, {"images": json.dumps(names)})
        share(partial)


@contextmanager
def _whole_file(out: Path) -> Iterator[Path]:
    """A file that takes its place once it is whole."""
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    if not out.parent.is_dir():
        raise UserError(f"{out.parent}: no such folder for {out.name}. Make it first")
    try:
        yield partial
        os.replace(partial, out)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror or error})") from None
    finally:
        partial.unlink(missing_ok=True)
