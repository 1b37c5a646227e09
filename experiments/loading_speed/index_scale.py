"""How long does it take to open an index of millions of examples and its 5% window, and what memory does a loader need?

For each number of examples a shard folder is made as `vlm prepare` would write it: the whole index, and those tars
that a 5% window touches, with tiny images. The other tars are not written, which also shows that none is opened. Then
a fresh process opens it, with the index's files dropped from the page cache as far as the system lets us, and reads
batches, alone and with two spawned workers.

"Own memory" is what only a process holds (RssAnon of /proc): pages of a mapped index are shared by all processes, and
the system takes them back when it needs to. "Of files" is the rest of what is resident: those pages, and libraries.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table
from safetensors.numpy import save_file

from data_loaders.shards import FORMAT
from vlm.supervision.subset import window

COUNTS = (33_000, 330_000, 3_300_000)
FRACTION, EXAMPLES_PER_SHARD, BLOCK = 0.05, 4096, 512
MIB = 2**20


def write_folder(folder: Path, count: int) -> None:
    """The index of `count` examples, and the tars of its 5% window. Every example takes four blocks of its tar."""
    data = io.BytesIO()
    Image.new("RGB", (8, 8), "teal").save(data, "JPEG")
    image = data.getvalue()
    assert len(image) > BLOCK
    size = BLOCK * (2 + -(-len(image) // BLOCK) + 1)  # two headers, the image, the JSON
    digests = (hashlib.sha256(f"pair-{number:07d}".encode()).digest()[:8] for number in range(count))
    hashes = np.frombuffer(b"".join(digests), ">u8") >> np.uint64(1)
    ring = np.argsort(hashes)
    hashes = hashes[ring].astype(np.int64)
    place = np.arange(count) % EXAMPLES_PER_SHARD
    json_size = len(metadata(0))
    save_file(
        {
            "hashes": hashes,
            "shard": (np.arange(count) // EXAMPLES_PER_SHARD).astype(np.int32),
            "image_offset": place * size + BLOCK,
            "image_size": np.full(count, len(image), np.int32),
            "json_offset": (place + 1) * size - BLOCK,
            "json_size": np.full(count, json_size, np.int32),
        },
        folder / "index.safetensors",
    )
    touched = set((np.asarray(window(hashes, FRACTION, 0)) // EXAMPLES_PER_SHARD).tolist())
    shards = []
    for number, first in enumerate(range(0, count, EXAMPLES_PER_SHARD)):
        end = min(first + EXAMPLES_PER_SHARD, count)
        file = folder / f"{number:05d}.tar"
        if number in touched:
            with tarfile.open(file, "w", format=tarfile.USTAR_FORMAT) as tar:
                for name in ring[first:end].tolist():
                    for suffix, content in (("jpg", image), ("json", metadata(name))):
                        member = tarfile.TarInfo(f"pair-{name:07d}.{suffix}")
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))
        shards.append(
            {
                "file": file.name,
                "examples": end - first,
                "bytes": file.stat().st_size if number in touched else size * EXAMPLES_PER_SHARD + 2 * BLOCK,
                "first_hash": int(hashes[first]),
                "last_hash": int(hashes[end - 1]),
                "sha256": hashlib.sha256(file.name.encode()).hexdigest(),
            }
        )
    (folder / "index.json").write_text(json.dumps({"format": FORMAT, "examples": count, "shards": shards}, indent=1))


def metadata(number: int) -> bytes:
    return json.dumps({"key": f"pair-{number:07d}", "captions": ["a small picture of one even color"]}).encode()


# --- The process that is measured ------------------------------------------------------------------------------------


def memory(process: int | str = "self") -> dict[str, float]:
    """Resident memory in MiB: what only this process holds, and what files and shared memory lend it."""
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
    own, files, shared = (int(lines[name].split()[0]) * 1024 / MIB for name in ("RssAnon", "RssFile", "RssShmem"))
    return {"own": round(own, 1), "of_files": round(files + shared, 1)}


def measure(folder: Path) -> dict[str, Any]:
    """Seconds to the window, then memory after 50 batches of 64, alone and with two workers."""
    from data_loaders.collate import ImageBatches
    from data_loaders.images import DecodedImages
    from data_loaders.loader import train_loader
    from data_loaders.shards import ShardReader, open_index
    from data_loaders.transforms import ImageTransform

    for file in (folder / "index.json", folder / "index.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    before = memory()
    start = time.perf_counter()
    index = open_index(folder)
    chosen = window(index.hashes, FRACTION, 0)
    seconds = time.perf_counter() - start
    start = time.perf_counter()
    open_index(folder)
    warm_seconds = time.perf_counter() - start
    reader = ShardReader(index)
    source = ImageBatches(reader, chosen, [], DecodedImages(reader, ImageTransform(8)))
    for batch in train_loader(source, 64, seed=0, num_batches=50, shuffle_shards=8):
        assert len(batch.keys) == 64
    alone = memory()
    loader = train_loader(source, 64, seed=0, num_batches=50, num_workers=2, shuffle_shards=8)
    batches = iter(loader)
    workers = []
    for number, _ in enumerate(batches):
        if number == 40:
            workers = [memory(worker.pid) for worker in loader._iterator._workers]  # type: ignore[union-attr]  # only with workers
    return {
        "examples_of_the_window": len(chosen),
        "seconds_to_open": round(seconds, 3),
        "seconds_to_open_again": round(warm_seconds, 3),
        "before": before,
        "alone": alone,
        "each_worker": max(workers, key=lambda worker: worker["own"]),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description="Opening an index of millions of examples: seconds and memory.")
    parser.add_argument("--counts", type=int, nargs="+", default=COUNTS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--results", type=Path, default=here / "index_scale.json", help="default: %(default)s")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.measure is not None:
        print(json.dumps(measure(options.measure)))
        return
    given = sys.argv[1:] if arguments is None else list(arguments)
    turns: dict[int, list[dict[str, Any]]] = {count: [] for count in options.counts}
    work = Path(tempfile.mkdtemp(prefix="index-scale-"))
    try:
        for count in options.counts:
            (work / str(count)).mkdir()
            write_folder(work / str(count), count)
        for _ in range(options.repeats):
            for count in options.counts:
                command = [sys.executable, __file__, "--measure", str(work / str(count))]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                turns[count].append(json.loads(done.stdout))
    finally:
        shutil.rmtree(work, ignore_errors=True)
    table = Table("examples", "seconds to open", "again", "own MiB: before", "alone", "each worker", "of files: alone")
    for count, mine in turns.items():
        seconds = [turn["seconds_to_open"] for turn in mine]
        table.add_row(
            f"{count:,}",
            f"{median(seconds):.3f} ({min(seconds):.3f} to {max(seconds):.3f})",
            f"{median(turn['seconds_to_open_again'] for turn in mine):.3f}",
            *(f"{median(turn[name]['own'] for turn in mine):.0f}" for name in ("before", "alone", "each_worker")),
            f"{median(turn['alone']['of_files'] for turn in mine):.0f}",
        )
    Console().print(table)
    result = {
        "command": shlex.join(["python", "experiments/loading_speed/index_scale.py", *given]),
        "machine": {"cores": os.cpu_count(), "python": platform.python_version()},
        "turns": turns,
    }
    options.results.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
