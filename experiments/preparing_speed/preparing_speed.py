"""How long does `vlm prepare conceptual_captions` take for millions of rows, and what memory? See README.md.

For each number of rows a release is made as users have it: both tables, and tars of img2dataset with tiny images of
four rows in five. The command itself prepares it in processes of its own, which are watched through /proc until they
end. Then a fresh process opens the index and reads the first batch of a 5% window.

"Own memory" is what only a process holds (RssAnon), summed over all processes of the command at one time; "resident"
also counts what files and shared memory lend each of them (VmRSS), so that it counts shared pages several times.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import platform
import resource
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from multiprocessing import Pool
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

ROWS = (33_000, 330_000)
VALIDATION_SHARE = 200  # one row in so many is of the validation table, about as in the real release
IMAGES_PER_TAR = 10_000  # img2dataset's own default
NUM_PICTURES = 64  # different ones, which the rows repeat
FRACTION, BATCH_SIZE, PIXELS = 0.05, 64, 224
WORDS = (
    "a photo of",
    "person",
    "in the",
    "with",
    "red",
    "old",
    "dog",
    "street",
    "at night",
    "young",
    "woman",
    "holding",
)
SECONDS_BETWEEN_LOOKS = 0.5
MIB = 2**20


# --- The release -----------------------------------------------------------------------------------------------------


def url(row: int) -> str:
    return f"https://images.example.com/photos/{row % 977:03d}/{row:08d}-large-picture.jpg"


def caption(row: int) -> str:
    return " ".join(WORDS[(row * (place + 3) + place) % len(WORDS)] for place in range(10)) + f" {row} ."


def is_alive(row: int) -> bool:
    return row % 5 != 4


def write_release(folder: Path, rows: int) -> None:
    """Tables and tars; the tars over two processes."""
    first_of_train = max(rows // VALIDATION_SHARE, 5)
    for name, mine in (
        ("Validation_GCC-1.1.0-Validation.tsv", range(first_of_train)),
        ("Train_GCC-training.tsv", range(first_of_train, rows)),
    ):
        with (folder / name).open("w") as table:
            table.writelines(f"{caption(row)}\t{url(row)}\n" for row in mine)
    (folder / "images").mkdir()
    with Pool(2) as pool:
        pool.map(partial(write_tar, folder / "images", rows), range(-(-rows // IMAGES_PER_TAR)), chunksize=1)


def write_tar(folder: Path, rows: int, number: int) -> None:
    """What img2dataset writes of `IMAGES_PER_TAR` rows: image, text and json of those whose link is alive."""
    pictures = [picture(seed) for seed in range(NUM_PICTURES)]
    with (folder / f"{number:05d}.tar").open("wb") as tar:
        for row in range(number * IMAGES_PER_TAR, min((number + 1) * IMAGES_PER_TAR, rows)):
            if not is_alive(row):
                continue
            data, key = pictures[row % NUM_PICTURES], f"{row:09d}"
            about = {
                "caption": caption(row),
                "url": url(row),
                "key": key,
                "status": "success",
                "error_message": None,
                "width": 16,
                "height": 12,
                "original_width": 16,
                "original_height": 12,
                "exif": "{}",
                "sha256": hashlib.sha256(data).hexdigest(),
            }
            contents = (("jpg", data), ("json", json.dumps(about).encode()), ("txt", caption(row).encode()))
            for suffix, content in contents:
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(content)
                tar.write(member.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % tarfile.BLOCKSIZE))
        tar.write(bytes(2 * tarfile.BLOCKSIZE))


def picture(seed: int) -> bytes:
    data = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 16), dtype=np.uint8)
    Image.fromarray(pixels).save(data, "JPEG")
    return data.getvalue()


# --- The command -----------------------------------------------------------------------------------------------------


def prepare(source: Path, root: Path, workers: int) -> dict[str, Any]:
    """Run the command; seconds, of its stages too, and the memory of all its processes."""
    command = [sys.executable, "-m", "vlm.cli", "prepare", "conceptual_captions"]
    command += ["--from", str(source), "--to", str(root), "--workers", str(workers)]
    used_before = resource.getrusage(resource.RUSAGE_CHILDREN)
    begins = {"reading_lists": time.perf_counter()}
    peaks = {"own": 0.0, "resident": 0.0, "own_of_the_first_process": 0.0, "own_of_the_largest_other": 0.0}
    with (source.parent / "output.txt").open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        while process.poll() is None:
            for stage, sign in (("writing_shards", "shards/[0-9.]*"), ("publishing", "out")):
                if stage not in begins and any((root / ".pairs-preparing").glob(sign)):
                    begins[stage] = time.perf_counter()
            seen = [(pid, *found) for pid in family(process.pid) if (found := memory(pid))]
            others = [own for pid, own, _ in seen if pid != process.pid]
            now = {
                "own": sum(own for _, own, _ in seen),
                "resident": sum(resident for *_, resident in seen),
                "own_of_the_first_process": sum(own for pid, own, _ in seen if pid == process.pid),
                "own_of_the_largest_other": max(others, default=0.0),
            }
            peaks = {name: max(peak, now[name]) for name, peak in peaks.items()}
            time.sleep(SECONDS_BETWEEN_LOOKS)
    begins["end"] = time.perf_counter()
    if process.returncode:
        raise SystemExit((source.parent / "output.txt").read_text())
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    times = list(begins.values())
    stages = {name: round(end - start, 1) for name, start, end in zip(begins, times, times[1:], strict=False)}
    return {
        "seconds": round(times[-1] - times[0], 1),
        "seconds_of_stages": stages,
        "core_seconds": round(used.ru_utime + used.ru_stime - used_before.ru_utime - used_before.ru_stime, 1),
        "peak_mib": {name: round(peak, 1) for name, peak in peaks.items()},
    }


def family(root: int) -> list[int]:
    """A process and all that descend from it."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has ended
            continue
        children.setdefault(parent, []).append(int(folder.name))
    found = [root]
    for pid in found:
        found += children.get(pid, [])
    return found


def memory(pid: int) -> tuple[float, float] | None:
    """What only the process holds and all that is resident, in MiB."""
    try:
        lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        return int(lines["RssAnon"].split()[0]) / 1024, int(lines["VmRSS"].split()[0]) / 1024
    except (OSError, KeyError):  # it has ended
        return None


# --- The first batch -------------------------------------------------------------------------------------------------


def first_batch(folder: Path, words: Path) -> dict[str, Any]:
    """Seconds to the window and to the first batch of pairs, index and shards dropped from the page cache before."""
    from data_loaders.collate import PairBatches
    from data_loaders.images import DecodedImages
    from data_loaders.loader import train_loader
    from data_loaders.shards import ShardReader, open_index
    from data_loaders.transforms import ImageTransform
    from vlm.models.language.tokenizer import Tokenizer
    from vlm.supervision import CaptionsConfig
    from vlm.supervision.subset import window

    tokenizer = Tokenizer.from_words(words, 1000, 32)
    for file in folder.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    start = time.perf_counter()
    index = open_index(folder)
    chosen = window(index.hashes, FRACTION, 0)
    opened = time.perf_counter()
    reader = ShardReader(index)
    images = DecodedImages(reader, ImageTransform(PIXELS))
    source = PairBatches(reader, chosen, [CaptionsConfig()], images, tokenizer)
    batch = next(iter(train_loader(source, BATCH_SIZE, seed=0, num_batches=1, shuffle_shards=8)))
    end = time.perf_counter()
    assert len(batch.keys) == BATCH_SIZE
    return {
        "examples_of_the_window": len(chosen),
        "seconds_to_open": round(opened - start, 3),
        "seconds_to_the_first_batch": round(end - start, 3),
    }


# --- All of it -------------------------------------------------------------------------------------------------------


def measure(rows: int, workers: int, temporary: Path | None) -> dict[str, Any]:
    work = Path(tempfile.mkdtemp(prefix="preparing-speed-", dir=temporary))
    try:
        source, root = work / "release", work / "root"
        source.mkdir()
        write_release(source, rows)
        found = {"rows": rows, "release_mb": round(sum(sizes(source)) / 10**6)}
        found |= prepare(source, root, workers)
        found |= {"rows_a_second": round(rows / found["seconds"])}
        pairs = root / "pairs"
        counts = json.loads((pairs / "report.json").read_text())["splits"]
        expected = sum(map(is_alive, range(rows)))
        assert sum(split["used"] for split in counts.values()) == expected
        assert sum(split["listed"] for split in counts.values()) == rows
        found |= {"examples": expected, "prepared_mb": round(sum(sizes(pairs)) / 10**6)}
        (work / "words.txt").write_text("\n".join(caption(row) for row in range(100)))
        command = [sys.executable, __file__, "--first-batch", str(pairs / "train"), str(work / "words.txt")]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        return found | json.loads(done.stdout)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def sizes(folder: Path) -> Iterator[int]:
    return (file.stat().st_size for file in folder.rglob("*") if file.is_file())


def main(arguments: Sequence[str] | None = None) -> None:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description="Preparing millions of rows: seconds and memory.")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--temporary", type=Path, help="a folder on a disk with room: 6 kB a row")
    parser.add_argument("--results", type=Path, default=here / "results.json", help="default: %(default)s")
    parser.add_argument("--first-batch", type=Path, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.first_batch:
        print(json.dumps(first_batch(*options.first_batch)))
        return
    given = sys.argv[1:] if arguments is None else list(arguments)
    console, turns = Console(), []
    for rows in options.rows:
        turns.append(measure(rows, options.workers, options.temporary))
        console.print(turns[-1])
    table = Table("rows", "seconds", "rows/s", "own MiB", "first process", "seconds to open", "to the first batch")
    for turn in turns:
        peaks = turn["peak_mib"]
        figures = (turn["seconds"], turn["rows_a_second"], peaks["own"], peaks["own_of_the_first_process"])
        more = (turn["seconds_to_open"], turn["seconds_to_the_first_batch"])
        table.add_row(f"{turn['rows']:,}", *(f"{figure:,}" for figure in (*figures, *more)))
    console.print(table)
    result = {
        "command": shlex.join(["python", "experiments/preparing_speed/preparing_speed.py", *given]),
        "machine": {
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "load_average_at_the_end": round(os.getloadavg()[0], 1),
        },
        "turns": turns,
    }
    options.results.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
