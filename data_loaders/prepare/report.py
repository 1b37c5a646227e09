"""What a preparation found and what it lacked: printed as tables, kept as `report.json`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

NUM_NAMED = 10  # missing images that are printed; `report.json` names them all


@dataclass
class SplitYield:
    """One split's questions and the images that they ask for."""

    training: bool
    questions: int = 0
    images: int = 0
    missing: int = 0
    unreadable: int = 0
    questions_without_image: int = 0  # left out of training; answered with a grey image in an evaluation

    @property
    def lost(self) -> int:
        return self.missing + self.unreadable

    @property
    def lost_fraction(self) -> float:
        return self.lost / max(self.images, 1)


@dataclass
class YieldReport:
    """The yield of one task's release."""

    task: str
    files: dict[str, str] = field(default_factory=dict)  # official name -> where it was found, or "absent"
    splits: dict[str, SplitYield] = field(default_factory=dict)
    images: int = 0  # distinct ones that any split asks for
    opened: bool = False  # whether those that are there have been opened, so that the unreadable ones are known
    missing: list[str] = field(default_factory=list)
    unreadable: dict[str, str] = field(default_factory=dict)  # key -> reason
    duplicates: int = 0  # further files of an image that was found; the first that decodes is used
    differing_duplicates: list[str] = field(default_factory=list)  # of another size than the first

    @property
    def lost(self) -> set[str]:
        return {*self.missing, *self.unreadable}

    def count(self, asked: Mapping[str, Counter[tuple[str, ...]]]) -> None:
        """Fill in the splits, from the questions that ask for each image or pair of images."""
        missing = set(self.missing)
        for split, questions in asked.items():
            entry = self.splits[split]
            keys = {key for images in questions for key in images}
            entry.images = len(keys)
            entry.missing = len(keys & missing)
            entry.unreadable = len(keys & self.unreadable.keys())
            lost = keys & self.lost
            entry.questions_without_image = sum(
                number for images, number in questions.items() if not lost.isdisjoint(images)
            )

    def as_json(self) -> dict[str, Any]:
        reasons = {"missing": len(self.missing)} | dict(sorted(Counter(self.unreadable.values()).items()))
        found = {"asked_for": self.images, "opened": self.opened, "lost_by_reason": reasons}
        if self.opened:
            found["found"] = self.images - len(self.lost)
        return {
            "task": self.task,
            "files": self.files,
            "splits": {name: asdict(entry) for name, entry in self.splits.items()},
            "images": found | {"duplicates": self.duplicates, "differing_duplicates": self.differing_duplicates},
            "missing": self.missing,
            "unreadable": self.unreadable,
        }

    def show(self, console: Console) -> None:
        table = Table(title=f"{self.task}: yield", title_justify="left")
        table.add_column("split")
        for name in ("questions", "images", "found", "missing", "unreadable", "questions without image"):
            table.add_column(name, justify="right")
        for name, entry in self.splits.items():
            found = entry.images - entry.lost
            fate = " (left out)" if entry.training else " (answered with grey)"
            numbers = (entry.questions, entry.images, found, entry.missing)
            unreadable = f"{entry.unreadable:,}" if self.opened else "not opened"
            without = f"{entry.questions_without_image:,}{fate if entry.questions_without_image else ''}"
            table.add_row(name, *(f"{number:,}" for number in numbers), unreadable, without)
        console.print(table)
        absent = [name for name, source in self.files.items() if source == "absent"]
        if absent:
            console.print(f"absent: {', '.join(absent)}")
        if self.duplicates:
            differing = f", {len(self.differing_duplicates):,} of them of another size" * bool(
                self.differing_duplicates
            )
            console.print(f"{self.duplicates:,} further copies of images were not used{differing}")
        self._show_lost(console)

    def _show_lost(self, console: Console) -> None:
        if not self.lost:
            return
        table = Table("reason", "images", "the first of them")
        groups = {"missing": self.missing}
        for key, reason in self.unreadable.items():
            groups.setdefault(reason, []).append(key)
        for reason, keys in groups.items():
            if keys:
                more = f" and {len(keys) - NUM_NAMED:,} more" * (len(keys) > NUM_NAMED)
                table.add_row(reason, f"{len(keys):,}", ", ".join(sorted(keys)[:NUM_NAMED]) + more)
        console.print(table)
