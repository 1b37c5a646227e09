"""GQA-like compositional questions about one image, in the official files.

"left of", "right of", "above" and "below" compare columns or rows alone, at any distance; two things in one column are
neither left nor right of each other, and no question asks about them. "the object left of the blue square" is asked
where exactly one object of the whole board lies left of the only blue square.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from data_loaders.world.config import WorldConfig
from data_loaders.world.questions import YES_NO, Asked, Query, ask, yes
from data_loaders.world.scenes import (
    COLORS,
    CONVERSE,
    RELATIONS,
    SHAPES,
    Phrase,
    Pool,
    Scene,
    Thing,
    is_related,
    pick,
    pick_weighted,
    random_phrase,
    stream,
    two_phrases,
)
from data_loaders.world.vqav2 import keep_used

SPLITS = {"train": "train", "validation": "val", "test": "testdev"}

Step = tuple[str, tuple[int, ...], str | Phrase]
"""Operation, the steps it depends on, argument. A phrase is written with the number of the object it matches."""


@dataclass(frozen=True, slots=True)
class CompositionalQuery(Query):
    """`types`: (structural, semantic, detailed) as GQA names them. `statement` makes a full answer of an answer."""

    types: tuple[str, str, str] = ("", "", "")
    about: str = ""  # groups questions that share it and their detailed type
    steps: tuple[Step, ...] = ()
    statement: Callable[[str], str] = str


def _select(phrase: Phrase, first: int = 0) -> tuple[Step, ...]:
    """The steps that find a phrase, numbered from `first`."""
    head: Step = ("select", (), phrase)
    if phrase.color is None:
        return (head,)
    return (head, ("filter color", (first,), phrase.color))


def _pairwise(first: Phrase, second: Phrase) -> tuple[tuple[Step, ...], tuple[int, int]]:
    """The steps that find two phrases, and the two steps that hold them."""
    head = _select(first)
    steps = head + _select(second, len(head))
    return steps, (len(head) - 1, len(steps) - 1)


def _affirm(answer: str, true: str, false: str) -> str:
    return f"Yes, {true}." if answer == "yes" else f"No, {false}."


def verify_relation(first: Phrase, relation: str, second: Phrase) -> CompositionalQuery:
    def answer(scene: Scene) -> str | None:
        thing, anchor = scene.the(first), scene.the(second)
        if not (is_related(relation, thing, anchor) or is_related(relation, anchor, thing)):
            return None
        return yes(is_related(relation, thing, anchor))

    steps, (at, to) = _pairwise(first, second)
    return CompositionalQuery(
        f"is the {first} {relation} the {second}?",
        YES_NO,
        answer,
        (first, second),
        types=("verify", "rel", "relVerify"),
        about=f"{first}_{relation}",
        steps=(*steps, ("verify rel", (at, to), relation)),
        statement=lambda given: _affirm(
            given, f"the {first} is {relation} the {second}", f"the {first} is {CONVERSE[relation]} the {second}"
        ),
    )


def choose_relation(first: Phrase, relation: str, second: Phrase) -> CompositionalQuery:
    other = CONVERSE[relation]
    short, other_short = relation.split()[0], other.split()[0]

    def answer(scene: Scene) -> str | None:
        thing, anchor = scene.the(first), scene.the(second)
        if is_related(relation, thing, anchor):
            return short
        return other_short if is_related(other, thing, anchor) else None

    words = f"{short} or {other}"
    steps, (at, to) = _pairwise(first, second)
    return CompositionalQuery(
        f"is the {first} {words} the {second}?",
        (short, other_short),
        answer,
        (first, second),
        types=("choose", "rel", "relChooser"),
        about=f"{first}_{words}",
        steps=(*steps, ("choose rel", (at, to), f"{short}|{other_short}")),
        statement=lambda given: f"The {first} is {relation if given == short else other} the {second}.",
    )


def query_related(asked: str, relation: str, anchor: Phrase) -> CompositionalQuery:
    """`asked`: "color" or "shape"."""

    def answer(scene: Scene) -> str | None:
        center = scene.the(anchor)
        others: list[Thing] = [thing for thing in scene.things if is_related(relation, thing, center)]
        return getattr(others[0], asked) if len(others) == 1 else None

    select = _select(anchor)
    relate: Step = ("relate", (len(select) - 1,), f"object,{relation},s")
    return CompositionalQuery(
        f"what {asked} is the object {relation} the {anchor}?",
        COLORS if asked == "color" else SHAPES,
        answer,
        (anchor,),
        types=("query", "rel", "relS"),
        about=f"{anchor}_{relation},s",
        steps=(*select, relate, ("query", (len(select),), asked)),
        statement=lambda given: f"The object {relation} the {anchor} is {given if asked == 'color' else f'a {given}'}.",
    )


def exist(phrase: Phrase) -> CompositionalQuery:
    steps = _select(phrase)
    return CompositionalQuery(
        f"are there any {phrase.plural}?",
        YES_NO,
        lambda scene: yes(scene.count(phrase) > 0),
        lures=lambda pool: pool.has_parts(phrase),
        types=("verify", "obj", "exist"),
        about=str(phrase),
        steps=(*steps, ("exist", (len(steps) - 1,), "?")),
        statement=lambda given: _affirm(given, f"there are {phrase.plural}", f"there are no {phrase.plural}"),
    )


def query_attribute(named: Phrase) -> CompositionalQuery:
    """ "what is the color of the circle?", "what is the shape of the red object?" """
    attribute, article = ("shape", "a ") if named.shape is None else ("color", "")
    steps = _select(named)
    return CompositionalQuery(
        f"what is the {attribute} of the {named}?",
        SHAPES if named.shape is None else COLORS,
        lambda scene: getattr(scene.the(named), attribute),
        (named,),
        types=("query", "attr", "directOf"),
        about=f"{named}_{attribute}",
        steps=(*steps, ("query", (len(steps) - 1,), attribute)),
        statement=lambda given: f"The {named} is {article}{given}.",
    )


def choose_attribute(named: Phrase, first: str, second: str) -> CompositionalQuery:
    """ "is the circle red or blue?", "is the red object a circle or a square?" """
    attribute, article = ("shape", "a ") if named.shape is None else ("color", "")
    steps = _select(named)
    return CompositionalQuery(
        f"is the {named} {article}{first} or {article}{second}?",
        (first, second),
        lambda scene: getattr(scene.the(named), attribute),
        (named,),
        types=("choose", "attr", "chooseAttr"),
        about=f"{named}_{attribute}",
        steps=(*steps, (f"choose {attribute}", (len(steps) - 1,), f"{first}|{second}")),
        statement=lambda given: f"The {named} is {article}{given}.",
    )


def verify_attribute(named: Phrase, value: str) -> CompositionalQuery:
    """ "is the circle red?", "is the red object a circle?" """
    attribute, article = ("shape", "a ") if named.shape is None else ("color", "")
    steps = _select(named)
    return CompositionalQuery(
        f"is the {named} {article}{value}?",
        YES_NO,
        lambda scene: yes(getattr(scene.the(named), attribute) == value),
        (named,),
        types=("verify", "attr", "verifyAttr"),
        about=f"{named}_{value}",
        steps=(*steps, (f"verify {attribute}", (len(steps) - 1,), value)),
        statement=lambda given: _affirm(
            given, f"the {named} is {article}{value}", f"the {named} is not {article}{value}"
        ),
    )


def exist_both(first: Phrase, word: str, second: Phrase) -> CompositionalQuery:
    """ "is there a red circle and a white cross?"; `word`: "and" or "or". Near misses show one, resp. parts of both."""
    join = all if word == "and" else any
    both, (at, to) = _pairwise(first, second)
    checks: tuple[Step, ...] = (("exist", (at,), "?"), ("exist", (to,), "?"))
    return CompositionalQuery(
        f"is there a {first} {word} a {second}?",
        YES_NO,
        lambda scene: yes(join([scene.count(first) > 0, scene.count(second) > 0])),
        lures=lambda pool: (
            (pool.has(first) | pool.has(second)) if word == "and" else (pool.has_parts(first) | pool.has_parts(second))
        ),
        types=("logical", "obj", "existAnd" if word == "and" else "existOr"),
        about=f"{first}_{second}",
        steps=(*both, *checks, (word, (len(both), len(both) + 1), "")),
        statement=lambda given: _affirm(
            given,
            f"there is a {first} {word} a {second}",
            f"there is not both a {first} and a {second}" if word == "and" else f"there is no {first} and no {second}",
        ),
    )


def same_attribute(first: Phrase, second: Phrase) -> CompositionalQuery:
    """ "do the circle and the square have the same color?" """
    attribute = "shape" if first.shape is None else "color"
    steps, (at, to) = _pairwise(first, second)
    return CompositionalQuery(
        f"do the {first} and the {second} have the same {attribute}?",
        YES_NO,
        lambda scene: yes(getattr(scene.the(first), attribute) == getattr(scene.the(second), attribute)),
        (first, second),
        types=("compare", "attr", "twoSame"),
        about=f"{attribute}",
        steps=(*steps, (f"same {attribute}", (at, to), "")),
        statement=lambda given: _affirm(
            given,
            f"the {first} and the {second} have the same {attribute}",
            f"the {first} and the {second} do not have the same {attribute}",
        ),
    )


def compare_counts(first: Phrase, word: str, second: Phrase) -> CompositionalQuery:
    """ "are there more circles than squares?"; `word`: "more" or "fewer". Equal counts are a "no"."""
    sign = 1 if word == "more" else -1
    steps, (at, to) = _pairwise(first, second)
    return CompositionalQuery(
        f"are there {word} {first.plural} than {second.plural}?",
        YES_NO,
        lambda scene: yes(sign * (scene.count(first) - scene.count(second)) > 0),
        lures=lambda pool: pool.has(first) & pool.has(second),
        types=("compare", "obj", f"compare {word}"),
        about=f"{first}_{second}",
        steps=(*steps, (f"compare {word}", (at, to), "")),
        statement=lambda given: _affirm(
            given,
            f"there are {word} {first.plural} than {second.plural}",
            f"there are not {word} {first.plural} than {second.plural}",
        ),
    )


def draw_query(rng: np.random.Generator) -> CompositionalQuery:
    """A random question, of the kinds and at the rates of `RATES`."""
    return pick_weighted(rng, RATES)(rng)


def _named(rng: np.random.Generator) -> tuple[Phrase, tuple[str, ...]]:
    """A shape or a color, and the values of the attribute that it leaves open."""
    if rng.random() < 0.5:
        return Phrase(shape=pick(rng, SHAPES)), COLORS
    return Phrase(color=pick(rng, COLORS)), SHAPES


def _two_alike(rng: np.random.Generator) -> tuple[Phrase, Phrase]:
    """Two shapes or two colors."""
    return two_phrases(rng, 1.0) if rng.random() < 0.5 else two_phrases(rng, 0.0, 1.0)


def _draw_exist(rng: np.random.Generator) -> CompositionalQuery:
    return exist(random_phrase(rng, 0.2, 0.2))


def _draw_query_attribute(rng: np.random.Generator) -> CompositionalQuery:
    return query_attribute(_named(rng)[0])


def _draw_verify_attribute(rng: np.random.Generator) -> CompositionalQuery:
    named, values = _named(rng)
    return verify_attribute(named, pick(rng, values))


def _draw_choose_attribute(rng: np.random.Generator) -> CompositionalQuery:
    named, values = _named(rng)
    one, other = (values[place] for place in rng.permutation(len(values))[:2])
    return _reword(rng, choose_attribute(named, one, other), choose_attribute(named, other, one))


def _draw_exist_both(rng: np.random.Generator) -> CompositionalQuery:
    word = "and" if rng.random() < 0.6 else "or"
    first, second = two_phrases(rng)
    return _reword(rng, exist_both(first, word, second), exist_both(second, word, first))


def _draw_same_attribute(rng: np.random.Generator) -> CompositionalQuery:
    first, second = _two_alike(rng)
    return _reword(rng, same_attribute(first, second), same_attribute(second, first))


def _draw_compare_counts(rng: np.random.Generator) -> CompositionalQuery:
    word, opposite = ("more", "fewer") if rng.random() < 0.5 else ("fewer", "more")
    first, second = _two_alike(rng)
    return _reword(rng, compare_counts(first, word, second), compare_counts(second, opposite, first))


def _draw_verify_relation(rng: np.random.Generator) -> CompositionalQuery:
    relation, (first, second) = pick(rng, tuple(RELATIONS)), two_phrases(rng, 0.4, 0.3)
    query = verify_relation(first, relation, second)
    return _reword(rng, query, verify_relation(second, CONVERSE[relation], first))


def _draw_choose_relation(rng: np.random.Generator) -> CompositionalQuery:
    first, second = two_phrases(rng, 0.4, 0.3)
    return choose_relation(first, pick(rng, tuple(RELATIONS)), second)


def _draw_query_related(rng: np.random.Generator) -> CompositionalQuery:
    return query_related(pick(rng, ("color", "shape")), pick(rng, tuple(RELATIONS)), random_phrase(rng, 0.4, 0.3))


# Rates are per round, and a round is as many questions as there are answers. Relations and comparisons are rare: they
# take more training than a CPU's budget, so that many of them would only hide what the other questions tell.
RATES: dict[Callable[[np.random.Generator], CompositionalQuery], float] = {
    _draw_exist: 0.2,
    _draw_query_attribute: 0.12,
    _draw_verify_attribute: 0.2,
    _draw_choose_attribute: 0.15,
    _draw_exist_both: 0.15,
    _draw_same_attribute: 0.05,
    _draw_compare_counts: 0.04,
    _draw_verify_relation: 0.05,
    _draw_choose_relation: 0.02,
    _draw_query_related: 0.02,
}


def _reword(rng: np.random.Generator, query: CompositionalQuery, reworded: CompositionalQuery) -> CompositionalQuery:
    """Some queries are asked twice of the same image in other words, which GQA's consistency is counted over."""
    return replace(query, rewordings=(reworded,)) if rng.random() < 0.25 else query


def gqa_questions(config: WorldConfig, split: str) -> tuple[list[Scene], list[Asked[CompositionalQuery]]]:
    """The images of a split and its questions about them, by image."""
    number = config.num_gqa_train if split == "train" else config.num_evaluation
    pool = Pool(config, f"gqa/{split}", max(2000, number // 2))
    return keep_used(pool, ask(pool, stream(config, f"gqa/{split}"), draw_query, number))


def image_key(split: str, image: int) -> str:
    return f"n{1 + list(SPLITS).index(split)}{image:06d}"


def write_gqa(
    config: WorldConfig, split: str, scenes: list[Scene], asked: list[Asked[CompositionalQuery]], folder: Path
) -> None:
    """The official balanced questions file of a split."""
    names = [f"{1 + list(SPLITS).index(split)}{number:07d}" for number in range(len(asked))]
    identity = {(item.image, item.query.text): name for item, name in zip(asked, names, strict=True)}
    equivalent: dict[str, set[str]] = defaultdict(set)
    for item, name in zip(asked, names, strict=True):
        texts = [reworded.text for reworded in item.query.rewordings]
        found = {identity[item.image, text] for text in texts if (item.image, text) in identity}
        for other in found:
            equivalent[name].add(other)
            equivalent[other].add(name)
    questions: dict[str, Any] = {}
    for item, name in zip(asked, names, strict=True):
        query, scene = item.query, scenes[item.image]
        steps = [
            {"operation": operation, "dependencies": list(needs), "argument": _argument(argument, scene, config.grid)}
            for operation, needs, argument in query.steps
        ]
        full_answer = query.statement(item.answer)
        structural, semantic, detailed = query.types
        questions[name] = {
            "semantic": steps,
            "entailed": sorted(equivalent[name]),
            "equivalent": [name, *sorted(equivalent[name])],
            "question": query.text,
            "imageId": image_key(split, item.image),
            "isBalanced": True,
            "groups": {
                "global": "color" if item.answer in COLORS else "shape" if item.answer in SHAPES else None,
                "local": f"{len(query.text.split()):02d}-{query.about}",
            },
            "answer": item.answer,
            "semanticStr": "->".join(_step_text(step) for step in steps),
            "annotations": {
                "answer": {},
                "question": _mentions(query, scene, query.text, config.grid),
                "fullAnswer": _mentions(query, scene, full_answer, config.grid),
            },
            "types": {"detailed": detailed, "semantic": semantic, "structural": structural},
            "fullAnswer": full_answer,
        }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{SPLITS[split]}_balanced_questions.json").write_text(json.dumps(questions))


def _object_id(thing: Thing, grid: int) -> str:
    return str(thing.row * grid + thing.column)


def _argument(argument: str | Phrase, scene: Scene, grid: int) -> str:
    """A phrase with the cells of the objects it matches, "-" for none."""
    if isinstance(argument, str):
        return argument
    objects = ",".join(_object_id(thing, grid) for thing in scene.all(argument))
    return f"{argument.shape or 'object'} ({objects or '-'}) "


def _step_text(step: dict[str, Any]) -> str:
    needs = f" {step['dependencies']}" if step["dependencies"] else ""
    return f"{step['operation']}: {step['argument']}{needs}"


def _mentions(query: CompositionalQuery, scene: Scene, text: str, grid: int) -> dict[str, str]:
    """Which words ("3", or "3:5" for words 3 and 4) name which object, for objects named with "the"."""
    words = [word.strip(".,?").lower() for word in text.split()]
    found = {}
    for phrase in query.unique:
        name = ["the", *str(phrase).split()]
        for start in range(len(words) - len(name) + 1):
            if words[start : start + len(name)] == name:
                first, last = start + 1, start + len(name)
                span = str(first) if last - first == 1 else f"{first}:{last}"
                found[span] = _object_id(scene.the(phrase), grid)
    return found
