"""What the world consists of: things on a board, phrases that name them, and endless scenes for each part."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from data_loaders.world.config import WorldConfig
from vlm.errors import UserError

SHAPES = ("circle", "square", "triangle", "cross")
COLORS = ("red", "green", "blue", "yellow", "white")
NUM_KINDS = len(SHAPES) * len(COLORS)

# Every scene layout belongs to exactly one part, by its hash, whatever the seed and the sizes of the parts.
# The order of this list is part of the world's definition.
PARTS = (
    *("pairs/train", "pairs/validation", "unimodal/train", "unimodal/validation", "texts/train", "texts/validation"),
    *("vqav2/train", "vqav2/validation", "vqav2/test", "gqa/train", "gqa/validation", "gqa/test"),
    *("nlvr2/train", "nlvr2/validation", "nlvr2/test"),
)

RELATIONS = {"left of": ("column", -1), "right of": ("column", 1), "above": ("row", -1), "below": ("row", 1)}
CONVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
T = TypeVar("T")

NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def stream(config: WorldConfig, name: str) -> np.random.Generator:
    """An independent stream of random numbers for this name."""
    return np.random.default_rng(np.random.SeedSequence(config.seed, spawn_key=tuple(name.encode())))


def pick(rng: np.random.Generator, items: Sequence[T]) -> T:
    """One item, uniformly."""
    return items[int(rng.integers(len(items)))]


def pick_weighted(rng: np.random.Generator, rates: Mapping[T, float]) -> T:
    """One of the keys, at rates proportional to the values."""
    items, weights = list(rates), np.array(list(rates.values()))
    return items[int(np.searchsorted(weights.cumsum(), rng.random() * weights.sum(), side="right"))]


@dataclass(frozen=True, slots=True)
class Thing:
    """An object in a cell of the board. Rows count from the top, columns from the left."""

    shape: str
    color: str
    row: int
    column: int

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"


@dataclass(frozen=True, slots=True)
class Phrase:
    """A noun phrase: "red circle", "circle" or "red object"."""

    shape: str | None = None
    color: str | None = None

    def matches(self, thing: Thing) -> bool:
        return self.shape in (None, thing.shape) and self.color in (None, thing.color)

    def implies(self, other: Phrase) -> bool:
        return other.shape in (None, self.shape) and other.color in (None, self.color)

    def __str__(self) -> str:
        return " ".join(word for word in (self.color, self.shape or "object") if word)

    @property
    def plural(self) -> str:
        return f"{self}es" if self.shape == "cross" else f"{self}s"

    def counted(self, count: int) -> str:
        """ "a red circle", "two red circles"."""
        return f"a {self}" if count == 1 else f"{NUMBERS[count]} {self.plural}"


def is_related(relation: str, thing: Thing, anchor: Thing) -> bool:
    """Whether `thing` lies strictly on that side of `anchor`, by columns or by rows alone, at any distance."""
    axis, sign = RELATIONS[relation]
    return bool(sign * (getattr(thing, axis) - getattr(anchor, axis)) > 0)


@dataclass(frozen=True, slots=True)
class Scene:
    """A board, as the set of its things. Two scenes are the same if their things are, however they are drawn."""

    things: tuple[Thing, ...]  # by row, then by column

    def all(self, phrase: Phrase) -> list[Thing]:
        return [thing for thing in self.things if phrase.matches(thing)]

    def count(self, phrase: Phrase) -> int:
        return len(self.all(phrase))

    def the(self, phrase: Phrase) -> Thing:
        """The only thing that the phrase matches."""
        (thing,) = self.all(phrase)
        return thing

    @property
    def names(self) -> tuple[str, ...]:
        """The distinct "color shape" names, in alphabetical order."""
        return tuple(sorted({thing.name for thing in self.things}))

    @property
    def classes(self) -> tuple[str, ...]:
        """The distinct colors and shapes, in alphabetical order. Which color goes with which shape is not told."""
        return tuple(sorted({word for name in self.names for word in name.split()}))


def _mixed(value: np.ndarray) -> np.ndarray:
    """A well-spread hash of uint64 (the finalizer of splitmix64)."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    spread: np.ndarray = value ^ (value >> np.uint64(31))
    return spread


def _part_of(kinds: np.ndarray) -> np.ndarray:
    """The part, as a place in `PARTS`, of each layout [n, cells].

    A cell is 0 where it is empty, else 1 + shape * len(COLORS) + color, by places in `SHAPES` and `COLORS`.
    """
    value = np.zeros(len(kinds), dtype=np.uint64)
    for cell in kinds.T:
        value = value * np.uint64(NUM_KINDS + 1) + cell.astype(np.uint64)
    part: np.ndarray = _mixed(value) % np.uint64(len(PARTS))
    return part


def part_of(scene: Scene, grid: int) -> str:
    """The one part that may show this scene."""
    kinds = np.zeros((1, grid * grid), dtype=np.uint8)
    for thing in scene.things:
        kind = SHAPES.index(thing.shape) * len(COLORS) + COLORS.index(thing.color)
        kinds[0, thing.row * grid + thing.column] = 1 + kind
    return PARTS[int(_part_of(kinds)[0])]


def scene_layouts(config: WorldConfig, part: str) -> Iterator[np.ndarray]:
    """Layouts [cells] of one part (see `_part_of`), endless and all different."""
    rng = stream(config, f"{part}/scenes")
    cells, batch = config.grid**2, 4096
    seen: set[bytes] = set()
    barren = 0
    while barren < 100:
        occupied = rng.random((batch, cells)).argsort(axis=1) < rng.integers(
            config.min_objects, config.max_objects + 1, (batch, 1)
        )
        has_palette = rng.random((batch, 1)) < config.palette_fraction
        attributes = []
        for size in (len(SHAPES), len(COLORS)):
            palette = rng.integers(size, size=(batch, 2))
            restricted = np.take_along_axis(palette, rng.integers(2, size=(batch, cells)), axis=1)
            attributes.append(np.where(has_palette, restricted, rng.integers(size, size=(batch, cells))))
        kinds = ((1 + attributes[0] * len(COLORS) + attributes[1]) * occupied).astype(np.uint8)
        num_seen = len(seen)
        for layout in kinds[_part_of(kinds) == PARTS.index(part)]:
            if (signature := layout.tobytes()) not in seen:
                seen.add(signature)
                yield layout
        barren = barren + 1 if len(seen) == num_seen else 0
    raise UserError(
        f"{part}: only {len(seen)} different scenes exist for grid={config.grid}, "
        f"min_objects={config.min_objects}, max_objects={config.max_objects}. Ask for fewer, or allow more objects"
    )


def to_scene(layout: np.ndarray, grid: int) -> Scene:
    """The scene of a layout (see `_part_of`)."""
    things = []
    for cell in np.flatnonzero(layout).tolist():
        shape, color = divmod(int(layout[cell]) - 1, len(COLORS))
        things.append(Thing(SHAPES[shape], COLORS[color], *divmod(cell, grid)))
    return Scene(tuple(things))


def scenes_of(config: WorldConfig, part: str) -> Iterator[Scene]:
    """Scenes of one part, endless and all different."""
    return (to_scene(layout, config.grid) for layout in scene_layouts(config, part))


class Pool:
    """Scenes of one part with the counts of what they show, to find those that a question needs."""

    def __init__(self, config: WorldConfig, part: str, size: int) -> None:
        self._source = scene_layouts(config, part)
        self.config = config
        self.scenes: list[Scene] = []
        self._kinds = np.zeros((0, len(SHAPES), len(COLORS)), dtype=np.int64)
        self._counts: dict[Phrase, np.ndarray] = {}
        self.uses = np.zeros(0, dtype=np.int64)
        self.grow(size)

    def grow(self, size: int) -> None:
        """Add `size` scenes."""
        layouts = np.stack([next(self._source) for _ in range(size)])
        self.scenes += [to_scene(layout, self.config.grid) for layout in layouts]
        kinds = np.stack([(layouts == kind).sum(1) for kind in range(1, NUM_KINDS + 1)], axis=1)
        self._kinds = np.concatenate([self._kinds, kinds.reshape(size, len(SHAPES), len(COLORS))])
        self._counts.clear()
        self.uses = np.concatenate([self.uses, np.zeros(size, dtype=np.int64)])

    def count(self, phrase: Phrase) -> np.ndarray:
        """How many things match the phrase, int [scenes]."""
        if phrase not in self._counts:
            shapes = slice(None) if phrase.shape is None else [SHAPES.index(phrase.shape)]
            colors = slice(None) if phrase.color is None else [COLORS.index(phrase.color)]
            self._counts[phrase] = self._kinds[:, shapes][:, :, colors].sum((1, 2))
        return self._counts[phrase]

    def has(self, phrase: Phrase) -> np.ndarray:
        shown: np.ndarray = self.count(phrase) > 0
        return shown

    def has_parts(self, phrase: Phrase) -> np.ndarray:
        """Where both the shape and the color are shown, by one thing or by two."""
        shown: np.ndarray = self.has(Phrase(shape=phrase.shape)) & self.has(Phrase(color=phrase.color))
        return shown


def random_phrase(rng: np.random.Generator, shape_fraction: float = 0.0, color_fraction: float = 0.0) -> Phrase:
    """A shape and a color; or, at these rates, a shape alone or a color alone."""
    chance = rng.random()
    shape, color = pick(rng, SHAPES), pick(rng, COLORS)
    if chance < shape_fraction:
        return Phrase(shape=shape)
    if chance < shape_fraction + color_fraction:
        return Phrase(color=color)
    return Phrase(shape, color)


def two_phrases(rng: np.random.Generator, *fractions: float) -> tuple[Phrase, Phrase]:
    """Two phrases (see `random_phrase`), neither of which implies the other as "red circle" implies "circle"."""
    first = second = random_phrase(rng, *fractions)
    while first.implies(second) or second.implies(first):
        second = random_phrase(rng, *fractions)
    return first, second
