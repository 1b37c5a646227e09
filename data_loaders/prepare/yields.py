"""What a preparation of image-text pairs found and lost: printed as tables, kept in files beside the shards."""

from __future__ import annotations

import gzip
import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from data_loaders.prepare.originals import Problem

NUM_NAMED = 10  # unused files that are printed; `unused.tsv.gz` names all
SHOWN = ("yield", "listed", "used", "missing", "unreadable", "captions", "labelled", "with classes")


@dataclass
class SplitCounts:
    """One split: `listed` = `used` + `left_out` + all that is lost."""

    listed: int = 0  # distinct examples that the release asks for
    used: int = 0
    left_out: int = 0  # for balance
    lost_by_reason: Counter[str] = field(default_factory=Counter)
    captions: int = 0  # of the used examples
    labelled: int = 0  # used examples with machine labels
    with_classes: int = 0
    further_copies: int = 0  # images of an example beside the one that is used

    @property
    def lost(self) -> int:
        return self.lost_by_reason.total()

    def add(self, other: SplitCounts) -> None:
        for name in ("listed", "used", "left_out", "captions", "labelled", "with_classes", "further_copies"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.lost_by_reason.update(other.lost_by_reason)

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"lost": self.lost, "lost_by_reason": dict(sorted(self.lost_by_reason.items()))}

    def columns(self) -> dict[str, str]:
        missing = self.lost_by_reason["missing"]
        numbers = (
            self.listed,
            self.used,
            missing,
            self.lost - missing,
            self.captions,
            self.labelled,
            self.with_classes,
        )
        share = f"{self.used / max(self.listed, 1):.1%}"
        return dict(zip(SHOWN, (share, *(f"{number:,}" for number in numbers)), strict=True))

    @classmethod
    def of(cls, values: dict[str, Any]) -> SplitCounts:
        known = {name: value for name, value in values.items() if name not in ("lost", "lost_by_reason")}
        return cls(**known, lost_by_reason=Counter(values["lost_by_reason"]))


@dataclass
class ImageTextReport:
    """The yield of one preparation."""

    preparer: str
    splits: dict[str, SplitCounts]
    problems: Counter[str]  # files and members that are not used, by reason
    named_problems: list[Problem]  # the first of them

    @property
    def listed(self) -> int:
        return sum(entry.listed for entry in self.splits.values())

    @property
    def lost(self) -> int:
        return sum(entry.lost for entry in self.splits.values())

    @property
    def lost_fraction(self) -> float:
        return self.lost / max(self.listed, 1)

    def as_json(self) -> dict[str, Any]:
        return {
            "preparer": self.preparer,
            "splits": {name: entry.as_json() for name, entry in self.splits.items()},
            "unused_files": dict(sorted(self.problems.items())),
        }

    def show(self, console: Console) -> None:
        table = Table(title=f"{self.preparer}: yield", title_justify="left")
        table.add_column("split")
        rows = {split: entry.columns() for split, entry in self.splits.items()}
        shown = [name for name in SHOWN if any(row[name] != "0" for row in rows.values())]
        for name in shown:
            table.add_column(name, justify="right")
        for split, row in rows.items():
            table.add_row(split, *(row[name] for name in shown))
        console.print(table)
        for split, entry in self.splits.items():
            others = {reason: count for reason, count in entry.lost_by_reason.items() if reason != "missing"}
            if others:
                console.print(f"{split}, unreadable: {_listed(others)}", soft_wrap=True)
            if entry.left_out:
                console.print(f"{split}: {entry.left_out:,} left out, so that all classes have as many")
            if entry.further_copies:
                console.print(f"{split}: {entry.further_copies:,} further copies of images were not used")
        if self.problems:
            console.print(f"files not used: {_listed(self.problems)}", soft_wrap=True, markup=False)
            for problem in self.named_problems[:NUM_NAMED]:
                place = f"{problem.file}: {problem.member}" if problem.member else problem.file
                console.print(f"  {place}: {problem.reason}", soft_wrap=True, markup=False, highlight=False)


def _listed(counts: Counter[str] | dict[str, int]) -> str:
    return ", ".join(f"{reason} {count:,}" for reason, count in sorted(counts.items()))


def line_of(*values: str) -> str:
    """One line of a table whose values hold no tab, line end or half a character."""
    plain = (" ".join(value.split()).encode("utf-8", "backslashreplace").decode() for value in values)
    return "\t".join(plain) + "\n"


def concatenate(parts: Iterable[Path], target: Path, header: str = "") -> str:
    """Write the parts one after the other, compressed; equal content gives equal bytes. Its SHA-256, uncompressed."""
    digest = hashlib.sha256(header.encode())
    with target.open("wb") as raw, gzip.GzipFile("", "wb", 6, raw, mtime=0) as packed:
        packed.write(header.encode())
        for part in parts:
            with part.open("rb") as content:
                while chunk := content.read(1 << 20):
                    digest.update(chunk)
                    packed.write(chunk)
    return digest.hexdigest()
