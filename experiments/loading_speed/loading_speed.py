"""How many images a second does one loader process give? Turn about, against the loaders that people use.

reduced       This project's own loader (`ImageBatches`, `train_loader`) as it is by default.
exact         The same with `data.decode=exact`: every JPEG decoded whole by Pillow and resized by Pillow.
image_folder  `torchvision.datasets.ImageFolder`: Pillow decodes, `v2.Resize`, `v2.PILToTensor`.
webdataset    The recipe of its documentation: `WebDataset(...).shuffle(1000).decode("pil").to_tuple(...)`, the same
              transform, batches made by the pipeline. It reads the tars that this project wrote.
litdata       `StreamingDataset` over optimized chunks that hold the same JPEG bytes; it decodes with torchvision, and
              `v2.Resize` works on the tensor. Left out where it is not installed.

All give shuffled batches of the same thing: uint8 [b, 3, 224, 224], a plain bicubic resize to the square, and the class
number of each. The README has command and result.
"""

from __future__ import annotations

import argparse
import functools
import io
import json
import multiprocessing
import os
import platform
import random
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from data_loaders.collate import ImageBatches
from data_loaders.images import DecodedImages
from data_loaders.loader import train_loader
from data_loaders.shards import ShardReader, open_index, write_shards
from data_loaders.transforms import MARGIN, Decode, ImageTransform
from vlm.supervision.subset import window
from vlm.types import Record

SIZES = {"500x375": (500, 375), "1600x1200": (1600, 1200)}
PIXELS, BATCH_SIZE, NUM_CLASSES = 224, 32, 10
JPEG_QUALITY = 90

Loader = Callable[[], Iterable[Any]]
"""One shuffled pass over all images, as batches."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One pass of one loader over all images of a size."""

    size: str
    round: int
    loader: str
    images: int
    seconds: float
    cpu_seconds: float  # of all threads of the process: other work on the machine does not count


# --- What is read ----------------------------------------------------------------------------------------------------


def make_jpegs(photos: Path, size: tuple[int, int], count: int) -> list[bytes]:
    """Photos cropped at random to the wanted shape, and encoded.

    Only photos that are about as large as wanted are taken, since what is enlarged holds too few details for its size.
    """
    rng = random.Random(0)
    files = sorted(file for file in photos.rglob("*") if file.suffix in (".jpg", ".jpeg", ".png"))
    pictures = [Image.open(file).convert("RGB") for file in files]
    large = [picture for picture in pictures if max(picture.size) >= 0.9 * size[0]]
    if not large:
        raise SystemExit(f"{photos}: no photo here is as large as {size[0]} pixels")
    jpegs = []
    for number in range(count):
        picture = large[number % len(large)]
        if (picture.width < picture.height) != (size[0] < size[1]):
            picture = picture.transpose(Image.Transpose.ROTATE_90)
        scale = min(picture.width / size[0], picture.height / size[1])
        scale *= rng.uniform(0.85, 1.0) if scale > 1 / 0.85 else 1.0
        width, height = size[0] * scale, size[1] * scale
        left, top = rng.uniform(0, picture.width - width), rng.uniform(0, picture.height - height)
        crop = picture.resize(size, Image.Resampling.LANCZOS, box=(left, top, left + width, top + height))
        if rng.random() < 0.5:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        data = io.BytesIO()
        crop.save(data, "JPEG", quality=JPEG_QUALITY)
        jpegs.append(data.getvalue())
    return jpegs


def class_of(number: int) -> str:
    return f"class-{number % NUM_CLASSES}"


# --- The loaders -----------------------------------------------------------------------------------------------------


def ours(jpegs: Sequence[bytes], folder: Path, decode: Decode) -> Loader:
    """This project's loader over its shards."""
    if not folder.is_dir():
        records = [Record(f"image-{n:06d}", jpeg, classes=(class_of(n),)) for n, jpeg in enumerate(jpegs)]
        write_shards(records, folder, examples_per_shard=64)
    reader = ShardReader(open_index(folder))
    images = DecodedImages(reader, ImageTransform(PIXELS, decode=decode))
    classes = sorted({class_of(number) for number in range(NUM_CLASSES)})
    source = ImageBatches(reader, window(reader.index.hashes, 1.0, 0), classes, images)
    return lambda: train_loader(source, BATCH_SIZE, seed=0, num_batches=len(jpegs) // BATCH_SIZE, shuffle_shards=8)


def pillow_transform() -> Callable[[Image.Image], torch.Tensor]:
    from torchvision.transforms import InterpolationMode, v2

    size = [PIXELS, PIXELS]
    transform: Any = v2.Compose([v2.Resize(size, InterpolationMode.BICUBIC), v2.PILToTensor()])
    return transform  # type: ignore[no-any-return]  # torchvision has no types


def image_folder(jpegs: Sequence[bytes], folder: Path) -> Loader:
    from torchvision.datasets import ImageFolder

    for number, jpeg in enumerate(jpegs):
        file = folder / class_of(number) / f"{number:06d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(jpeg)
    dataset = ImageFolder(str(folder), pillow_transform())
    return lambda: torch.utils.data.DataLoader(dataset, BATCH_SIZE, shuffle=True, drop_last=True)


def webdataset(jpegs: Sequence[bytes], folder: Path) -> Loader:
    import webdataset as wds

    folder.mkdir(parents=True)
    files = []
    for first in range(0, len(jpegs), 64):
        files.append(str(folder / f"{first // 64:05d}.tar"))
        with wds.TarWriter(files[-1], encoder=False) as tar:
            for number in range(first, min(first + 64, len(jpegs))):
                label = str(number % NUM_CLASSES).encode()
                tar.write({"__key__": f"{number:06d}", "jpg": jpegs[number], "cls": label})
    transform = pillow_transform()

    def loader() -> Iterable[Any]:
        dataset = wds.WebDataset(files, shardshuffle=len(files)).shuffle(1000).decode("pil")
        dataset = dataset.to_tuple("jpg", "cls").map_tuple(transform, int).batched(BATCH_SIZE)
        return wds.WebLoader(dataset, batch_size=None)  # type: ignore[no-any-return]  # webdataset has no types

    return loader


def litdata(jpegs: Sequence[bytes], folder: Path) -> Loader:
    import litdata as ld
    from litdata.streaming import Cache
    from torchvision.transforms import InterpolationMode, v2

    folder.mkdir(parents=True)
    source = folder.with_name("litdata_source")
    source.mkdir()
    writer = Cache(str(folder), chunk_bytes="64MB")
    for number, jpeg in enumerate(jpegs):
        file = source / f"{number:06d}.jpg"
        file.write_bytes(jpeg)
        writer[number] = {"image": Image.open(file), "class": number % NUM_CLASSES}
    writer.done()
    writer.merge()
    resize = v2.Resize([PIXELS, PIXELS], InterpolationMode.BICUBIC, antialias=True)

    class Resized(ld.StreamingDataset):  # type: ignore[misc]  # litdata has no types
        def __getitem__(self, index: Any) -> tuple[torch.Tensor, int]:
            item = super().__getitem__(index)
            return resize(item["image"]), item["class"]

    dataset = Resized(str(folder), shuffle=True)
    return lambda: ld.StreamingDataLoader(dataset, batch_size=BATCH_SIZE)  # type: ignore[no-any-return]  # litdata has no types


MAKERS: dict[str, Callable[[Sequence[bytes], Path], Loader]] = {
    "reduced": functools.partial(ours, decode="reduced"),
    "exact": functools.partial(ours, decode="exact"),
    "image_folder": image_folder,
    "webdataset": webdataset,
    "litdata": litdata,
}


# --- The measurement -------------------------------------------------------------------------------------------------


def pixels_of(batch: Any) -> torch.Tensor:
    pixels: torch.Tensor = batch.image if hasattr(batch, "image") else batch[0]
    return pixels


def serve(name: str, jpegs: Sequence[bytes], folder: Path, pipe: Connection) -> None:
    """What a loader's process does: a pass whenever it is asked for one, and says how long it took."""
    torch.set_num_threads(1)  # as in a loader's worker process
    try:
        loader = MAKERS[name](jpegs, folder)
    except ImportError as error:
        pipe.send(str(error))
        return
    pipe.send(None)
    while pipe.recv():
        wall, cpu, count = time.perf_counter(), time.process_time(), 0
        for batch in loader():
            pixels = pixels_of(batch)
            assert pixels.dtype == torch.uint8 and pixels.shape[1:] == (3, PIXELS, PIXELS), (name, pixels.shape)
            count += len(pixels)
        pipe.send((count, time.perf_counter() - wall, time.process_time() - cpu))


def take_turns(size: str, jpegs: Sequence[bytes], folder: Path, rounds: int) -> Iterator[Turn]:
    """Each loader has a process of its own, as loader workers do, so that none works in the heap of another.

    One runs at a time. The order is reversed every other round, so that a drift of the machine favours none. Round 0
    warms up.
    """
    context, pipes = multiprocessing.get_context("spawn"), {}
    processes = []
    for name in MAKERS:
        pipe, other = context.Pipe()
        process = context.Process(target=serve, args=(name, jpegs, folder / name, other))
        process.start()
        processes.append(process)
        problem = pipe.recv()
        if problem is None:
            pipes[name] = pipe
        else:
            print(f"{name} is left out: {problem}", file=sys.stderr)
    for number in range(rounds + 1):
        for name in list(pipes)[:: 1 if number % 2 else -1]:
            pipes[name].send(True)
            count, seconds, cpu_seconds = pipes[name].recv()
            if number:
                yield Turn(size, number, name, count, seconds, cpu_seconds)
    for pipe in pipes.values():
        pipe.send(False)
    for process in processes:
        process.join()


def summarise(turns: Sequence[Turn]) -> dict[str, dict[str, dict[str, float]]]:
    """Images a second and CPU milliseconds an image, and how many times faster `reduced` is, round by round."""
    summary: dict[str, dict[str, dict[str, float]]] = {}
    for size in dict.fromkeys(turn.size for turn in turns):
        mine = [turn for turn in turns if turn.size == size]
        reduced = {turn.round: turn for turn in mine if turn.loader == "reduced"}
        for name in dict.fromkeys(turn.loader for turn in mine):
            own = [turn for turn in mine if turn.loader == name]
            rates = [turn.images / turn.seconds for turn in own]
            costs = [1000 * turn.cpu_seconds / turn.images for turn in own]
            base = [1000 * reduced[turn.round].cpu_seconds / reduced[turn.round].images for turn in own]
            ratios = [cost / other for cost, other in zip(costs, base, strict=True)]
            walls = [reduced[t.round].images / reduced[t.round].seconds / (t.images / t.seconds) for t in own]
            summary.setdefault(size, {})[name] = {
                "images_a_second_median": round(median(rates), 1),
                "images_a_second_min": round(min(rates), 1),
                "images_a_second_max": round(max(rates), 1),
                "cpu_ms_an_image_median": round(median(costs), 3),
                "cpu_ms_an_image_min": round(min(costs), 3),
                "cpu_ms_an_image_max": round(max(costs), 3),
                "reduced_is_faster_wall_median": round(median(walls), 3),
                "reduced_is_faster_wall_min": round(min(walls), 3),
                "reduced_is_faster_wall_max": round(max(walls), 3),
                "reduced_is_faster_cpu_median": round(median(ratios), 3),
                "reduced_is_faster_cpu_min": round(min(ratios), 3),
                "reduced_is_faster_cpu_max": round(max(ratios), 3),
            }
    return summary


def as_table(summary: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Table:
    table = Table("size", "loader", "images/s (range)", "CPU ms/image (range)", "reduced is faster: wall", "CPU")
    for size, loaders in summary.items():
        for name, of in loaders.items():
            table.add_row(
                size,
                name,
                f"{of['images_a_second_median']:.0f} ({of['images_a_second_min']:.0f}"
                f" to {of['images_a_second_max']:.0f})",
                f"{of['cpu_ms_an_image_median']:.2f} ({of['cpu_ms_an_image_min']:.2f}"
                f" to {of['cpu_ms_an_image_max']:.2f})",
                f"{of['reduced_is_faster_wall_median']:.2f}",
                f"{of['reduced_is_faster_cpu_median']:.2f}",
            )
    return table


def differences(jpegs: Sequence[bytes]) -> dict[str, float]:
    """How far the reduced pixels are from the exact ones, in levels of 0 to 255."""
    reduced, exact = (ImageTransform(PIXELS, decode=decode) for decode in ("reduced", "exact"))  # type: ignore[arg-type]  # a tuple forgets literals
    gaps = [(reduced(jpeg).int() - exact(jpeg).int()).abs().numpy() for jpeg in jpegs]
    return {
        "mean": round(float(np.mean([gap.mean() for gap in gaps])), 3),
        "mean_of_the_worst_image": round(float(max(gap.mean() for gap in gaps)), 3),
        "percentile_99": round(float(np.percentile(np.stack(gaps), 99)), 1),
        "max": int(max(gap.max() for gap in gaps)),
    }


def photo_differences(photos: Path) -> dict[str, dict[str, float]]:
    """The same on the photos as they are, apart for those that are decoded at reduced scale and those that are not."""
    found: dict[str, list[bytes]] = {"reduced_scale": [], "full_scale": []}
    for file in sorted(photos.rglob("*")):
        data = file.read_bytes() if file.is_file() else b""
        if data[:2] == b"\xff\xd8":
            small = min(Image.open(io.BytesIO(data)).size) < 2 * MARGIN * PIXELS
            found["full_scale" if small else "reduced_scale"].append(data)
    return {name: {"photos": len(jpegs)} | differences(jpegs) for name, jpegs in found.items() if jpegs}


def main(arguments: Sequence[str] | None = None) -> None:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description="Images a second of one loader process, against other loaders.")
    parser.add_argument("--photos", type=Path, required=True, help="a folder of photos, some 1600 pixels wide")
    parser.add_argument("--images", type=int, default=256, help="of each size")
    parser.add_argument("--rounds", type=int, default=5, help="after one that warms up")
    parser.add_argument("--results", type=Path, default=here / "results.json", help="default: %(default)s")
    options = parser.parse_args(arguments)
    given = sys.argv[1:] if arguments is None else list(arguments)
    console, turns, data = Console(), [], {}
    folder = Path(tempfile.mkdtemp(prefix="loading-speed-"))
    try:
        for size, shape in SIZES.items():
            jpegs = make_jpegs(options.photos, shape, options.images)
            data[size] = {
                "images": len(jpegs),
                "bytes_a_pixel": round(sum(map(len, jpegs)) / len(jpegs) / shape[0] / shape[1], 3),
                "reduced_minus_exact": differences(jpegs[:64]),
            }
            for turn in take_turns(size, jpegs, folder / size, options.rounds):
                rate = turn.images / turn.seconds
                console.print(f"{size} round {turn.round}: {turn.loader:12} {rate:8.1f} images/s", style="dim")
                turns.append(turn)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    summary = summarise(turns)
    console.print(as_table(summary))
    result = {
        "command": shlex.join(["python", "experiments/loading_speed/loading_speed.py", *given]),
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "load_average_at_the_end": round(os.getloadavg()[0], 1),
        },
        "data": data,
        "photos_reduced_minus_exact": photo_differences(options.photos),
        "summary": summary,
        "turns": [asdict(turn) for turn in turns],
    }
    options.results.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
