"""NLVR2-like statements about two images, in the official files.

Each sentence comes with four pairs of images, two true and two false, so that its words alone say nothing. Where the
statement allows it, each side shows the same kinds of scene in the true pairs as in the false ones, so that one image
alone says nothing either (`exactly one`, `one ... the other`, `in total`, `the same number`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_loaders.world.config import WorldConfig
from data_loaders.world.scenes import (
    NUMBERS,
    Phrase,
    Pool,
    Scene,
    pick,
    pick_weighted,
    random_phrase,
    stream,
    two_phrases,
)
from vlm.errors import UserError

SPLITS = {"train": "train", "validation": "dev", "test": "test1"}
PAIRS_PER_SENTENCE = 4

PLAIN_FRACTION = 0.9
PLAIN = {
    "both images contain a {}",
    "at least one image contains a {}",
    "the left image contains a {}",
    "the right image contains a {}",
}

Role = tuple[tuple[Phrase, int], ...]
"""What an image must show: each phrase exactly so many times, or at least once where the number is `SOME`."""
SOME = -1
TwoPairs = tuple[tuple[Role, Role], tuple[Role, Role]]


@dataclass(frozen=True, slots=True)
class Statement:
    """A sentence, and the roles of the two images in two true and in two false pairs."""

    text: str
    true: TwoPairs
    false: TwoPairs
    phrase: Phrase


@dataclass(frozen=True, slots=True)
class Judged:
    """A statement beside two images, places in the split's list of scenes."""

    statement: Statement
    left: int
    right: int
    label: bool


def _containing(phrase: Phrase, rng: np.random.Generator) -> Statement:
    """Which of the two images show the phrase: one family of sentences."""
    has: Role = ((phrase, SOME),)
    lacks: Role = ((phrase, 0),)
    left, right, both, neither = (has, lacks), (lacks, has), (has, has), (lacks, lacks)
    family: tuple[tuple[str, TwoPairs, TwoPairs], ...] = (
        ("both images contain a {}", (both, both), (left, right)),
        ("at least one image contains a {}", (left, right), (neither, neither)),
        ("exactly one image contains a {}", (left, right), (both, neither)),
        ("no image contains a {}", (neither, neither), (left, right)),
        ("the left image contains a {}", (left, both), (right, neither)),
        ("the right image contains a {}", (right, both), (left, neither)),
        ("only the left image contains a {}", (left, left), (both, neither)),
        ("only the right image contains a {}", (right, right), (both, neither)),
    )
    # Plain statements are more frequent than those that need a negation or both images compared.
    plain = rng.random() < PLAIN_FRACTION
    text, true, false = pick(rng, [form for form in family if (form[0] in PLAIN) == plain])
    return Statement(text.format(phrase), true, false, phrase)


def _one_and_the_other(first: Phrase, second: Phrase) -> Statement:
    x: Role = ((first, SOME), (second, 0))
    y: Role = ((first, 0), (second, SOME))
    text = f"one image contains a {first} and the other contains a {second}"
    return Statement(text, ((x, y), (y, x)), ((x, x), (y, y)), first)


def _more(phrase: Phrase, side: str, lowest: int) -> Statement:
    low, middle, high = (((phrase, lowest + step),) for step in range(3))
    other = "right" if side == "left" else "left"
    text = f"the {side} image contains more {phrase.plural} than the {other} image"
    more, fewer = ((middle, low), (high, middle)), ((low, middle), (middle, high))
    true, false = (more, fewer) if side == "left" else (fewer, more)
    return Statement(text, true, false, phrase)


def _total(phrase: Phrase, low: int, high: int) -> Statement:
    a, b = ((phrase, low),), ((phrase, high),)
    total = low + high
    verb, noun = ("is", str(phrase)) if total == 1 else ("are", phrase.plural)
    text = f"there {verb} exactly {NUMBERS[total]} {noun} in total"
    return Statement(text, ((a, b), (b, a)), ((a, a), (b, b)), phrase)


def _same_number(phrase: Phrase, low: int, high: int) -> Statement:
    a, b = ((phrase, low),), ((phrase, high),)
    text = f"both images contain the same number of {phrase.plural}"
    return Statement(text, ((a, a), (b, b)), ((a, b), (b, a)), phrase)


RATES = {
    "containing": 0.88,
    "one and the other": 0.04,
    "total of one": 0.02,
    "total": 0.01,
    "more": 0.03,
    "same number": 0.02,
}


def draw_statement(rng: np.random.Generator, config: WorldConfig) -> Statement:
    """A random statement, of the kinds and at the rates of `RATES`."""
    kind = pick_weighted(rng, RATES)
    coarse = random_phrase(rng, 0.5, 0.5)
    many = config.max_objects > 3
    if kind == "containing":
        return _containing(random_phrase(rng, 0.4, 0.4), rng)
    if kind == "one and the other":
        return _one_and_the_other(*two_phrases(rng))
    if kind == "total of one":
        return _total(random_phrase(rng), 0, 1)
    if kind == "total":
        return _total(coarse, *pick(rng, ((0, 2), (1, 2), (1, 3)) if many else ((0, 2), (1, 2))))
    if kind == "more":
        return _more(coarse, pick(rng, ("left", "right")), int(rng.integers(2 if many else 1)))
    phrase, low = (random_phrase(rng), 0) if rng.random() < 0.5 else (coarse, int(rng.integers(2)))
    return _same_number(phrase, low, low + 1)


def nlvr2_statements(config: WorldConfig, split: str) -> tuple[list[Scene], list[Judged]]:
    """The images of a split and its statements about them, four pairs a sentence in random order."""
    number = config.num_nlvr2_train if split == "train" else config.num_evaluation
    pool = Pool(config, f"nlvr2/{split}", 2 * number + 2000)
    rng = stream(config, f"nlvr2/{split}")
    used: list[int] = []
    judged: list[Judged] = []
    for _ in range(number // PAIRS_PER_SENTENCE):
        statement = draw_statement(rng, config)
        pairs = [(roles, True) for roles in statement.true] + [(roles, False) for roles in statement.false]
        for place in rng.permutation(PAIRS_PER_SENTENCE):
            roles, label = pairs[place]
            left, right = (_take(pool, role, rng) for role in roles)
            judged.append(Judged(statement, len(used), len(used) + 1, label))
            used += [left, right]
    return [pool.scenes[image] for image in used], judged


def _take(pool: Pool, role: Role, rng: np.random.Generator) -> int:
    """A fresh image for a role. One that lacks a red circle mostly shows something red and some circle."""
    for _ in range(20):
        allowed = pool.uses == 0
        hard = rng.random() < pool.config.near_miss_fraction
        lures = allowed.copy()
        for phrase, count in role:
            here = pool.count(phrase)
            allowed &= here > 0 if count == SOME else here == count
            lures &= pool.has_parts(phrase) if phrase.shape and phrase.color else True
        candidates = np.flatnonzero(allowed & lures if hard and (allowed & lures).any() else allowed)
        if len(candidates):
            image = int(candidates[rng.integers(len(candidates))])
            pool.uses[image] = 1
            return image
        pool.grow(2000)
    raise UserError(f"no scene shows {', '.join(f'{count} {phrase.plural}' for phrase, count in role)}")


def pair_name(split: str, number: int) -> str:
    """The identifier of the pair without its sentence; its images are this and "-img0", "-img1"."""
    sentence, pair = divmod(number, PAIRS_PER_SENTENCE)
    return f"{SPLITS[split]}-{sentence}-{pair}"


def image_key(split: str, image: int) -> str:
    return f"{pair_name(split, image // 2)}-img{image % 2}"


def write_nlvr2(split: str, judged: list[Judged], folder: Path) -> None:
    """The official file of a split: JSON lines."""
    lines = []
    for number, item in enumerate(judged):
        label = str(item.label)
        lines.append(
            {
                "validation": {"0": label},
                "sentence": item.statement.text,
                "left_url": f"world:{image_key(split, item.left)}",
                "writer": "0",
                "label": label,
                "right_url": f"world:{image_key(split, item.right)}",
                "synset": item.statement.phrase.shape or "object",
                "query": str(item.statement.phrase),
                "identifier": f"{pair_name(split, number)}-0",
                "extra_validations": {},
            }
        )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{SPLITS[split]}.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
