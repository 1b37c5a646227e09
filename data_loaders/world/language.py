"""What people and machines say of a scene: captions, and machine labels with their errors."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from data_loaders.world.config import WorldConfig
from data_loaders.world.scenes import (
    COLORS,
    NUMBERS,
    RELATIONS,
    SHAPES,
    Phrase,
    Scene,
    Thing,
    is_related,
    pick,
    pick_weighted,
)

MAX_WORDS = 24

# Rates of the kinds of caption. Most name much of the scene: where captions name one thing of five, they tell so little
# about the rest that matching takes longer than a CPU's budget.
RATES = {"relation": 0.4, "listing": 0.225, "partial listing": 0.225, "attribute": 0.1, "places": 0.05}


def caption(scene: Scene, grid: int, rng: np.random.Generator) -> str:
    """A true sentence about the scene, of at most `MAX_WORDS` words.

    Its numbers are exact, and so is the article: "a red circle" says that there is one red circle, unless a relation
    or a place follows, which then holds of at least one.
    """
    kind = pick_weighted(rng, RATES)
    said = _relation(scene, rng) if kind == "relation" else None
    if said is not None:
        text = said
    elif kind in ("relation", "listing", "partial listing"):  # not every scene has two things to relate
        groups = _groups(scene, rng)
        num_named = int(rng.integers(len(groups))) + 1 if kind == "partial listing" else len(groups)
        text = _listing(groups[:num_named], scene)
    elif kind == "attribute":
        text = _attribute_listing(scene, rng)
    else:
        text = _places(scene, grid, rng)
    introductions = ["", "", "the image contains "]
    if " is " not in text:
        plural = text.split()[0] in NUMBERS
        introductions += ["there are " if plural else "there is ", "a picture of "]
    fitting = [words for words in introductions if len((words + text).split()) <= MAX_WORDS]
    return pick(rng, fitting if " is " not in text else [""]) + text


def _groups(scene: Scene, rng: np.random.Generator) -> list[Phrase]:
    """The distinct colored shapes of the scene in random order."""
    phrases = list(dict.fromkeys(Phrase(thing.shape, thing.color) for thing in scene.things))
    return [phrases[place] for place in rng.permutation(len(phrases))]


def _listing(phrases: Sequence[Phrase], scene: Scene) -> str:
    """ "two red circles and a blue square": counted groups, five at most."""
    return " and ".join(phrase.counted(scene.count(phrase)) for phrase in phrases[:5])


def _attribute_listing(scene: Scene, rng: np.random.Generator) -> str:
    """ "two circles and a blue square": a group by its shape or its color alone, and some of the others."""
    thing = pick(rng, scene.things)
    coarse = Phrase(shape=thing.shape) if rng.random() < 0.5 else Phrase(color=thing.color)
    others = [p for p in _groups(scene, rng) if coarse.shape != p.shape and coarse.color != p.color]
    return _listing([coarse, *others[: int(rng.integers(4))]], scene)


def _relation(scene: Scene, rng: np.random.Generator) -> str | None:
    """ "a red circle left of a blue square and a white cross", where two differently named things allow it."""
    order = rng.permutation(len(scene.things))
    for first, second in pairwise(order):
        thing, anchor = scene.things[first], scene.things[second]
        relations = [relation for relation in RELATIONS if is_related(relation, thing, anchor)]
        if thing.name == anchor.name or not relations:
            continue
        others = [phrase for phrase in _groups(scene, rng) if str(phrase) not in (thing.name, anchor.name)]
        if rng.random() < 0.1:
            return f"a {thing.name} is {pick(rng, relations)} a {anchor.name}"
        text = f"a {thing.name} {pick(rng, relations)} a {anchor.name}"
        return " and ".join([text, *([_listing(others[:3], scene)] if others else [])])
    return None


def _places(scene: Scene, grid: int, rng: np.random.Generator) -> str:
    """ "a red circle in the top left and a white cross in the center"."""
    things = [scene.things[place] for place in rng.permutation(len(scene.things))[: int(rng.integers(1, 3))]]
    return " and ".join(f"a {thing.name} in the {place_name(thing, grid)}" for thing in things)


def place_name(thing: Thing, grid: int) -> str:
    """The outermost rows and columns have names ("top left", "right"); what lies between them is the "center"."""
    row = "top" if thing.row == 0 else "bottom" if thing.row == grid - 1 else ""
    column = "left" if thing.column == 0 else "right" if thing.column == grid - 1 else ""
    return f"{row} {column}".strip() or "center"


def machine_labels(scene: Scene, config: WorldConfig, rng: np.random.Generator) -> list[tuple[str, float]]:
    """Names of the distinct things with scores in (0, 1), best first. No counts, no relations, and some errors.

    Each true name is wrong at rate `label_noise`: missed, or one attribute confused, equally often. At the same rate
    an image gets one name that nothing gave rise to.
    """
    names = scene.names
    labels: dict[str, float] = {}
    for name in names:
        if rng.random() >= config.label_noise:
            labels[name] = float(rng.beta(8, 2))
        elif rng.random() < 0.5:
            color, shape = name.split()
            alike = [f"{color} {other}" for other in SHAPES] + [f"{other} {shape}" for other in COLORS]
            labels[pick(rng, [label for label in alike if label not in names])] = float(rng.beta(4, 4))
    if rng.random() < config.label_noise:
        absent = [f"{color} {shape}" for color in COLORS for shape in SHAPES if f"{color} {shape}" not in names]
        labels.setdefault(pick(rng, absent), float(rng.beta(4, 4)))
    scored = [(name, round(min(max(score, 0.001), 0.999), 3)) for name, score in labels.items()]
    return sorted(scored, key=lambda pair: (-pair[1], pair[0]))
