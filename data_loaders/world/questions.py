"""Questions whose words alone do not tell the answer, and the search for images that balance them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from data_loaders.world.scenes import Phrase, Pool, Scene
from vlm.errors import UserError

MAX_QUESTIONS_PER_IMAGE = 4
MAX_CANDIDATES = 400  # images tried for one round

YES_NO = ("yes", "no")


@dataclass(frozen=True, slots=True)
class Query:
    """A question that any scene answers, unless it makes no sense there.

    `answer` is only asked of scenes that show each of the `unique` phrases exactly once; it returns None where the
    question still makes no sense. `lures` tells the scenes that come near to the question. A query and its
    `rewordings` have the same answer everywhere.
    """

    text: str
    answers: tuple[str, ...]
    answer: Callable[[Scene], str | None]
    unique: tuple[Phrase, ...] = ()
    lures: Callable[[Pool], np.ndarray] | None = None
    rewordings: tuple[Query, ...] = ()


Q = TypeVar("Q", bound=Query)


@dataclass(frozen=True)
class Asked(Generic[Q]):
    """A query asked of one image of a pool, and its true answer there."""

    query: Q
    image: int
    answer: str


def yes(fact: bool) -> str:
    return "yes" if fact else "no"


def ask(
    pool: Pool, rng: np.random.Generator, draw_query: Callable[[np.random.Generator], Q], number: int
) -> list[Asked[Q]]:
    """`number` questions about images of the pool, in rounds.

    A round asks one query of one image for each of its answers, so that within the exact words of a question every
    answer is equally frequent (the last round may be cut short). A rewording is asked of the same images.
    """
    asked: list[Asked[Q]] = []
    texts: dict[int, set[str]] = {}
    failures = 0
    while len(asked) < number:
        query = draw_query(rng)
        found = _round(pool, rng, query, texts)
        if found is None:
            failures += 1
            if failures > 20 * number + 500:
                raise UserError(f"no images answer {query.text!r} with each of {query.answers}. Allow more objects")
            continue
        for answer, image in found.items():
            texts.setdefault(image, set()).add(query.text)
            pool.uses[image] += 1
            asked.append(Asked(query, image, answer))
        for rewording in query.rewordings:
            images = found.values()
            if any(rewording.text in texts[i] or pool.uses[i] >= MAX_QUESTIONS_PER_IMAGE for i in images):
                continue
            for answer, image in found.items():
                texts[image].add(rewording.text)
                pool.uses[image] += 1
                asked.append(Asked(rewording, image, answer))  # type: ignore[arg-type]  # a query of the same kind
    return asked[:number]


def _round(pool: Pool, rng: np.random.Generator, query: Query, texts: dict[int, set[str]]) -> dict[str, int] | None:
    """An image for each answer, or None. Images that are asked about already are preferred."""
    allowed = pool.uses < MAX_QUESTIONS_PER_IMAGE
    for phrase in query.unique:
        allowed &= pool.count(phrase) == 1
    if query.lures is not None and rng.random() < pool.config.near_miss_fraction:
        allowed &= query.lures(pool)
    candidates = np.flatnonzero(allowed)
    candidates = candidates[np.argsort(rng.random(len(candidates)) - (pool.uses[candidates] > 0))]
    found: dict[str, int] = {}
    for image in candidates[:MAX_CANDIDATES].tolist():
        answer = query.answer(pool.scenes[image])
        if answer in query.answers and answer not in found and query.text not in texts.get(image, ()):
            found[answer] = image
            if len(found) == len(query.answers):
                return {answer: found[answer] for answer in query.answers}
    return None
