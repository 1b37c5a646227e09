"""Many small shard folders become one, in little memory: tars are moved, index entries copied one folder at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from data_loaders.shards import FORMAT, Contents

# As safetensors itself orders them, so that the bytes are those of a folder that was written at once.
COLUMNS = (
    ("hashes", "I64", np.int64),
    ("image_offset", "I64", np.int64),
    ("json_offset", "I64", np.int64),
    ("image_size", "I32", np.int32),
    ("json_size", "I32", np.int32),
    ("shard", "I32", np.int32),
)


def join_shards(parts: Sequence[Path], folder: Path) -> dict[str, Any]:
    """Move the one tar of each part into `folder` and write its index; what `index.json` says.

    The parts follow each other on the hash ring; those without examples leave no tar, unless all are without. It may
    be killed and called again: a tar that is no longer in its part was moved before.
    """
    headers = [json.loads((part / "index.json").read_text(encoding="utf-8")) for part in parts]
    kept = [number for number, header in enumerate(headers) if header["examples"]] or [0]
    folder.mkdir(parents=True, exist_ok=True)
    shards = []
    for number, place in enumerate(kept):
        (shard,) = headers[place]["shards"]
        file = f"{number:05d}.tar"
        if (parts[place] / shard["file"]).exists():
            os.replace(parts[place] / shard["file"], folder / file)
        shards.append(shard | {"file": file})
    examples = sum(shard["examples"] for shard in shards)
    _write_arrays(folder / "index.safetensors", [parts[place] for place in kept], examples)
    contents = Contents()
    for place in kept:
        contents.join(headers[place])
    header = {"format": FORMAT, "examples": examples, "shards": shards} | contents.header()
    (folder / "index.json").write_text(json.dumps(header, indent=1))
    return header


def _write_arrays(file: Path, parts: Sequence[Path], examples: int) -> None:
    """A safetensors file: the length of its header, the header, the arrays one after the other."""
    header, end = {}, 0
    for name, kind, number in COLUMNS:
        begin, end = end, end + examples * np.dtype(number).itemsize
        header[name] = {"dtype": kind, "shape": [examples], "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as target:
        target.write(len(text).to_bytes(8, "little") + text)
        for name, _, number in COLUMNS:
            for column in _columns(parts, name):
                target.write(column.astype(number).tobytes())


def _columns(parts: Sequence[Path], name: str) -> Iterator[np.ndarray]:
    for number, part in enumerate(parts):
        with safe_open(part / "index.safetensors", "np") as arrays:
            column: np.ndarray = arrays.get_tensor(name)
            yield np.full_like(column, number) if name == "shard" else column
