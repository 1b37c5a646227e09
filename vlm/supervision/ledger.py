"""The books on who has seen what: distinct pairs, labelled images and texts behind each component of a run.

A component has *seen* what its weights were trained on, in this run, in every run that it comes from, and before this
framework met it. A labeller, a captioner and a filter have handed on what they have seen. Of one data set the union
counts, of several the sum.

What a run may see counts as seen: a budget of less than one pass over its window leaves a part of it unseen. Validation
examples at most choose a checkpoint and are not counted.
"""

from __future__ import annotations

import base64
import json
import operator
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from pydantic import NonNegativeInt

from vlm.config import Config
from vlm.errors import UserError
from vlm.supervision.published import KINDS, Kind, published

if TYPE_CHECKING:  # imported where positions are counted: a config is shown in a tenth of a second less
    import numpy as np
    from numpy.typing import NDArray

LEDGER = "ledger.json"
FORMAT = 1
MAX_EXAMPLES = 2**28  # of one folder, in a ledger that may be anyone's: a byte each while it is read
MAX_RANGES = 32  # more are written as a compressed bit an example

Component = Literal["fusion", "vision", "language", "labeller", "generator", "filter"]
COMPONENTS: tuple[Component, ...] = get_args(Component)
LEARNERS: tuple[Component, ...] = ("fusion", "vision", "language")


class SeenConfig(Config):
    """What a model saw before this framework met it. None: unknown."""

    pairs: NonNegativeInt | None = None
    labelled_images: NonNegativeInt | None = None
    images: NonNegativeInt = 0  # without labels
    texts: NonNegativeInt = 0  # without images


class DeclaredConfig(Config):
    """For models that `published.py` does not know, or knows wrongly: what each has seen. It stands in the ledger."""

    vision: SeenConfig | None = None
    language: SeenConfig | None = None
    labeller: SeenConfig | None = None
    generator: SeenConfig | None = None
    filter: SeenConfig | None = None


@dataclass(frozen=True)
class Positions:
    """Some of the `of` examples of a shard folder, by their places in the ring's order: a bit each."""

    of: int
    bits: bytes

    @classmethod
    def at(cls, positions: NDArray[np.int64], of: int) -> Positions:
        import numpy as np

        mask = np.zeros(of, dtype=bool)
        mask[positions] = True
        return cls.where(mask)

    @classmethod
    def where(cls, mask: NDArray[np.bool_]) -> Positions:
        import numpy as np

        return cls(len(mask), np.packbits(mask).tobytes())

    @property
    def mask(self) -> NDArray[np.bool_]:
        import numpy as np

        return np.unpackbits(np.frombuffer(self.bits, dtype=np.uint8), count=self.of).astype(bool)

    def content(self) -> dict[str, Any]:
        """As JSON: ranges [first, end) where they are few, as those of a window, else the compressed bits."""
        import numpy as np

        ranges = np.flatnonzero(np.diff(np.concatenate([[False], self.mask, [False]]))).reshape(-1, 2)
        if len(ranges) <= MAX_RANGES:
            return {"of": self.of, "ranges": ranges.tolist()}
        return {"of": self.of, "bits": base64.b64encode(zlib.compress(self.bits)).decode()}

    @classmethod
    def read(cls, content: Mapping[str, Any]) -> Positions:
        import numpy as np

        of = int(content["of"])
        if not 0 <= of <= MAX_EXAMPLES:
            raise ValueError(f"{of} examples in one folder")
        if "bits" in content:
            size = -(-of // 8)
            bits = zlib.decompressobj().decompress(
                base64.b64decode(content["bits"]), size + 1
            )  # whatever it unpacks to
            if len(bits) != size:
                raise ValueError(f"{len(bits)} bytes of bits for {of} examples")
            return cls(of, bits)
        mask = np.zeros(of, dtype=bool)
        for first, end in content["ranges"]:
            mask[first:end] = True
        return cls.where(mask)


@dataclass(frozen=True)
class Entry:
    """One set of data that a component has seen."""

    kind: Kind
    data: str  # a fingerprint of shards or texts, or the name of a published set
    count: int | None  # distinct; None: unknown
    note: str = ""
    positions: Positions | None = None  # which of the shards' examples; None: `count` of them, the same ones each time


@dataclass(frozen=True)
class Count:
    """Distinct examples of one kind: `known` of them, and whatever the `unknown` notes stand for."""

    known: int
    unknown: tuple[str, ...] = ()

    def __str__(self) -> str:
        if not self.unknown:
            return f"{self.known:,}"
        return f"{self.known:,} + {'; '.join(self.unknown)}" if self.known else "; ".join(self.unknown)


def count(entries: Iterable[Entry], kind: Kind) -> Count:
    """The union within each data set, and the sum over them."""
    by_data: dict[str, list[Entry]] = {}
    for entry in entries:
        if entry.kind == kind:
            by_data.setdefault(entry.data, []).append(entry)
    known, unknown = 0, []
    for of_data in by_data.values():
        numbers = [entry.count for entry in of_data if entry.count is not None]
        unknown += [entry.note or "unknown" for entry in of_data if entry.count is None]
        if not numbers:
            continue
        of_data = [entry for entry in of_data if entry.count is not None]
        masks = [entry.positions.mask for entry in of_data if entry.positions is not None]
        if len(masks) == len(of_data) and len({len(mask) for mask in masks}) == 1:
            known += int(reduce(operator.or_, masks).sum())
        else:
            known += max(numbers)
    return Count(known, tuple(dict.fromkeys(unknown)))


@dataclass(frozen=True)
class Ledger:
    """What each component has seen."""

    seen: Mapping[Component, tuple[Entry, ...]] = field(default_factory=dict)

    def plus(self, components: Sequence[Component], entries: Iterable[Entry]) -> Ledger:
        """These components have seen these entries too."""
        added = tuple(entries)
        changed = {name: tuple(dict.fromkeys((*self.seen.get(name, ()), *added))) for name in components}
        return Ledger({**self.seen, **changed})

    def __or__(self, other: Ledger) -> Ledger:
        joined = self
        for name, entries in other.seen.items():
            joined = joined.plus([name], entries)
        return joined

    def count(self, kind: Kind, components: Sequence[Component] = COMPONENTS) -> Count:
        """Distinct examples of a kind that any of these components has seen."""
        return count((entry for name in components for entry in self.seen.get(name, ())), kind)

    @property
    def components(self) -> list[Component]:
        return [name for name in COMPONENTS if name in self.seen or name in LEARNERS]

    def others(self) -> dict[Component, Count]:
        """Components that have seen pairs beyond those that the fusion was supervised with, or perhaps have."""
        own = self.count("pairs", ["fusion"]).known
        found = {}
        for name in self.components:
            mine = self.count("pairs", [name])
            if mine.unknown or self.count("pairs", ["fusion", name]).known > own:
                found[name] = mine
        return found

    # --- Shown and kept ---

    def rows(self) -> list[list[str]]:
        """A header, a row a component, and their union; columns for the kinds that anybody has seen."""
        kinds = [kind for kind in KINDS if kind in ("pairs", "labelled_images") or str(self.count(kind)) != "0"]
        rows = [["component", *(kind.replace("_", " ") for kind in kinds)]]
        rows += [[name, *(str(self.count(kind, [name])) for kind in kinds)] for name in self.components]
        return [*rows, ["any of them", *(str(self.count(kind)) for kind in kinds)]]

    def markdown(self) -> str:
        header, *rows = self.rows()
        lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return f"Distinct examples that each component has ever seen\n\n{table}\n"

    def scalars(self) -> dict[str, int]:
        """`fusion/pairs` and so on, of what is known."""
        found = {}
        for name in self.components:
            for kind in KINDS:
                one = self.count(kind, [name])
                if one.known or not one.unknown:
                    found[f"{name}/{kind}"] = one.known
        return found

    def text(self, declared: Mapping[str, Any] | None = None) -> str:
        """What `ledger.json` holds: the counts for people, and the entries for whoever comes after.

        `declared`: the declarations that it was counted with.
        """
        distinct = {name: self._counts([name]) for name in self.components} | {"any": self._counts(COMPONENTS)}
        content = {
            "format": FORMAT,
            "distinct": distinct,
            "seen": {name: [_entry_content(entry) for entry in self.seen.get(name, ())] for name in self.components},
        }
        return json.dumps(content | ({"declared": declared} if declared else {}), indent=1)

    def _counts(self, components: Sequence[Component]) -> dict[str, Any]:
        counts = {kind: self.count(kind, components) for kind in KINDS}
        unknown = {kind: list(one.unknown) for kind, one in counts.items() if one.unknown}
        known = {kind: one.known if one.known or not one.unknown else None for kind, one in counts.items()}
        return known | ({"and": unknown} if unknown else {})


def read_ledger(file: Path) -> Ledger:
    """The ledger that a run wrote."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']} is not {FORMAT}")
        seen = content["seen"]
        return Ledger({name: tuple(map(_read_entry, seen[name])) for name in COMPONENTS if name in seen})
    except Exception as error:
        problem = f"not a ledger ({type(error).__name__}: {error})"
        raise UserError(f"{file}: {problem}. Delete it to have it counted anew") from None


def _entry_content(entry: Entry) -> dict[str, Any]:
    content: dict[str, Any] = {"kind": entry.kind, "data": entry.data, "count": entry.count}
    if entry.note:
        content["note"] = entry.note
    return content | (entry.positions.content() if entry.positions is not None else {})


def _read_entry(content: Mapping[str, Any]) -> Entry:
    if content["kind"] not in KINDS:
        raise ValueError(f"unknown kind {content['kind']!r}")
    positions = Positions.read(content) if "of" in content else None
    number = None if content["count"] is None else int(content["count"])
    return Entry(content["kind"], str(content["data"]), number, str(content.get("note", "")), positions)


# --- What models have seen before ------------------------------------------------------------------------------------


def declared_entries(name: Component, seen: SeenConfig, model: str = "") -> tuple[Entry, ...]:
    """What the user declares of this model. What they leave out of pairs and labelled images stays unknown."""
    return _given(f"declared for the {name} {model}".rstrip(), seen.model_dump(), f"declared.{name}")


def model_entries(name: Component, model: str) -> tuple[Entry, ...]:
    """What a published model has seen, by its name; else an entry that says that nobody knows."""
    sets = published(model)
    if sets is None:
        return unknown_entries(name, model)
    return tuple(Entry(one.kind, one.name, one.count, one.note) for one in sets)


def maker_entries(name: Component, made_by: Mapping[str, Any], made: str = "") -> tuple[Entry, ...]:
    """What the maker of side shards has seen: what `made_by` counts, else what its model's name tells."""
    model, seen = made_by.get("model"), made_by.get("seen")
    shown = model if isinstance(model, str) else f"the {name}"
    if isinstance(seen, Mapping) and all(_is_count(seen.get(kind)) for kind in KINDS):
        sets = published(shown) or ()
        by_kind = {
            one.kind: one.name for one in sets
        }  # a set that the model's own tower was trained on is the same one
        entries = _given(f"{shown} {made}".rstrip() if not sets else shown, seen, f"declared.{name}")
        return tuple(replace(one, data=by_kind.get(one.kind, one.data)) for one in entries)
    return model_entries(name, model) if isinstance(model, str) else unknown_entries(name, shown)


def unknown_entries(name: Component, model: str) -> tuple[Entry, ...]:
    """Nobody knows what this model has seen."""
    note = f"unknown ({model}; say declared.{name}.pairs and .labelled_images)"
    return tuple(Entry(kind, model, None, note) for kind in KINDS[:2])


def _given(data: str, seen: Mapping[str, Any], key: str) -> tuple[Entry, ...]:
    """Counts by kind; what is not given of the first two kinds is unknown."""
    found = []
    for kind in KINDS[:4]:
        number = seen.get(kind)
        if number is None and kind in KINDS[:2]:
            found.append(Entry(kind, data, None, f"unknown (say {key}.{kind})"))
        elif number:
            found.append(Entry(kind, data, int(number)))
    return tuple(found)


def _is_count(value: Any) -> bool:
    return value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= 0)
