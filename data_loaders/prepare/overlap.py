"""Which examples several people have in common who prepared the same release, each with the links that were alive."""

from __future__ import annotations

import gzip
import io
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from data_loaders.shards import KEY_PATTERN, ring_hash
from vlm.errors import UserError
from vlm.tasks.task import MANIFEST

PARTS = ("pairs", "unimodal")


@dataclass(frozen=True)
class KeyList:
    """A list of keys in the order of the hash ring, one a line, and the manifest beside it, if there is one."""

    name: str  # as the user gave it
    file: Path
    manifest: dict[str, Any]

    def keys(self) -> Iterator[tuple[int, str]]:
        """The place on the ring and the key of each example."""
        last = -1
        try:
            with _opened(self.file) as lines:
                for number, line in enumerate(lines, start=1):
                    key = line.rstrip("\n")
                    place = ring_hash(key) if KEY_PATTERN.fullmatch(key) else -1
                    if place <= last:
                        problem = "no key" if place < 0 else "not in the order of the hash ring"
                        raise UserError(f"{self.file}: line {number} is {problem}. Give a file that vlm prepare wrote")
                    last = place
                    yield place, key
        except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
            raise UserError(f"{self.file}: cannot be read ({error}). Copy or prepare it again") from None


def _opened(file: Path) -> io.TextIOWrapper:
    if file.suffix == ".gz":
        return gzip.open(file, "rt", encoding="ascii")
    return file.open(encoding="ascii")


def key_list(given: Path, split: str) -> KeyList:
    """The keys of a data root, of a prepared folder, or a list itself."""
    if given.is_file():
        folder, file = given.parent, given
    else:
        name = f"keys-{split}.txt.gz"
        places = [folder / name for folder in (given, *(given / part for part in PARTS)) if (folder / name).is_file()]
        if len(places) != 1:
            found = " and ".join(str(place.parent) for place in places)
            raise UserError(f"{given}: {f'holds {found}; name one' if places else f'holds no {name}'}")
        folder, file = places[0].parent, places[0]
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        manifest = {}
    return KeyList(str(given), file, manifest if isinstance(manifest, dict) else {})


@dataclass(frozen=True)
class Overlap:
    """`sizes` has one entry a list; `pairwise[i][j]` is what lists i and j have in common."""

    sizes: tuple[int, ...]
    common: int
    union: int
    pairwise: tuple[tuple[int, ...], ...]


def overlap(lists: Sequence[KeyList], to: Path | None = None) -> Overlap:
    """Count what the lists have in common, reading all at once in the order of the ring; `to`: write those keys."""
    streams = [keys.keys() for keys in lists]
    heads = [next(stream, None) for stream in streams]
    pairwise = [[0] * len(lists) for _ in lists]
    common = union = 0
    with ExitStack() as stack:
        making = None if to is None else to.with_name(f".{to.name}.{os.getpid()}")
        target = None if making is None else stack.enter_context(_written(making))
        while any(heads):
            place = min(head[0] for head in heads if head is not None)
            here = [number for number, head in enumerate(heads) if head is not None and head[0] == place]
            union += 1
            for one in here:
                for other in here:
                    pairwise[one][other] += 1
            if len(here) == len(lists):
                common += 1
                if target is not None:
                    target.write(heads[0][1] + "\n")  # type: ignore[index]  # all lists are at this key
            for number in here:
                heads[number] = next(streams[number], None)
    if making is not None and to is not None:
        os.replace(making, to)
    sizes = tuple(row[number] for number, row in enumerate(pairwise))
    return Overlap(sizes, common, union, tuple(tuple(row) for row in pairwise))


def _written(file: Path) -> io.TextIOWrapper:
    if ".gz" in file.suffixes:
        return gzip.open(file, "wt", encoding="ascii")
    return file.open("w", encoding="ascii")


def report_overlap(folders: Sequence[Path], split: str, to: Path | None, console: Console | None = None) -> Overlap:
    """Print how many examples each list has and what they have in common; `to`: write the common keys there."""
    console = console or Console()
    lists = [key_list(folder, split) for folder in folders]
    if to is not None and any(to.resolve() == keys.file.resolve() for keys in lists):
        raise UserError(f"{to}: --to would replace a list that is read. Choose another name")
    if to is not None and not to.parent.is_dir():
        raise UserError(f"{to.parent}: no such folder for {to.name}. Make it first")
    found = overlap(lists, to)
    table = Table("", "of", title=f"{split}: examples in common", title_justify="left")
    table.add_column("examples", justify="right")
    table.add_column("of them in all", justify="right")
    for number, _ in enumerate(lists, start=1):
        table.add_column(f"with {number}", justify="right")
    for number, keys in enumerate(lists):
        size = max(found.sizes[number], 1)
        shares = [f"{shared / size:.2%}" for shared in found.pairwise[number]]
        row = (str(number + 1), keys.name, f"{found.sizes[number]:,}", f"{found.common / size:.2%}", *shares)
        table.add_row(*row)
    console.print(table)
    console.print(
        f"{found.common:,} examples are in all {len(lists)}, of {found.union:,} in any ({_share(found)}). A common key "
        "is a common url or path: the bytes behind it may differ",
        soft_wrap=True,
    )
    for warning in differences(lists):
        console.print(f"warning: {warning}", soft_wrap=True, markup=False)
    if to is not None:
        console.print(f"the common keys: {to}", soft_wrap=True)
    return found


def _share(found: Overlap) -> str:
    return f"{found.common / max(found.union, 1):.2%}"


def differences(lists: Sequence[KeyList]) -> Iterator[str]:
    """What the manifests say that makes a comparison doubtful."""
    first = lists[0]
    for other in lists[1:]:
        if not first.manifest or not other.manifest:
            continue
        left, right = (keys.manifest.get("preparer") for keys in (first, other))
        if left != right:
            yield f"{first.name} was prepared from {left}, {other.name} from {right}"
            continue
        sums = [
            {os.path.basename(file): entry.get("sha256") for file, entry in keys.manifest.get("sources", {}).items()}
            for keys in (first, other)
        ]
        for file in sorted(sums[0].keys() & sums[1].keys()):
            if sums[0][file] and sums[1][file] and sums[0][file] != sums[1][file]:
                yield f"{first.name} and {other.name} were prepared from different files called {file}"
        configs = [keys.manifest.get("config", {}) for keys in (first, other)]
        for name in sorted(configs[0].keys() & configs[1].keys()):
            if configs[0][name] != configs[1][name]:
                yield f"{name} is {configs[0][name]} in {first.name}, and {configs[1][name]} in {other.name}"
