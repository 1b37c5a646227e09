"""VQAv2-like questions about one image, in the official files."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_loaders.world.config import WorldConfig
from data_loaders.world.questions import YES_NO, Asked, Q, Query, ask, yes
from data_loaders.world.scenes import COLORS, SHAPES, Phrase, Pool, Scene, pick, pick_weighted, random_phrase, stream

SPLITS = {"train": "train2014", "validation": "val2014", "test": "test2015"}
HEADER = {
    "info": {
        "description": "Questions about a procedural world, in the layout of VQA v2.0.",
        "url": "",
        "version": "2.0",
        "year": 2017,
        "contributor": "",
        "date_created": "2017-04-26 17:07:13",
    },
    "task_type": "Open-Ended",
    "data_type": "mscoco",
    "license": {"url": "", "name": "Same as the software that made it"},
}


@dataclass(frozen=True, slots=True)
class FreeFormQuery(Query):
    """`question_type`: the leading words, as VQA groups its questions; `answer_type`: yes/no, number or other."""

    question_type: str = ""
    answer_type: str = "other"


def is_there(phrase: Phrase) -> FreeFormQuery:
    return FreeFormQuery(
        f"is there a {phrase}?",
        YES_NO,
        lambda scene: yes(scene.count(phrase) > 0),
        lures=lambda pool: pool.has_parts(phrase),
        question_type="is there a",
        answer_type="yes/no",
    )


def what_color(shape: str) -> FreeFormQuery:
    phrase = Phrase(shape=shape)
    text = f"what color is the {phrase}?"
    return FreeFormQuery(text, COLORS, lambda s: s.the(phrase).color, (phrase,), question_type="what color is the")


def what_shape(color: str) -> FreeFormQuery:
    phrase = Phrase(color=color)
    text = f"what shape is the {phrase}?"
    return FreeFormQuery(text, SHAPES, lambda s: s.the(phrase).shape, (phrase,), question_type="what")


def how_many(phrase: Phrase, most: int) -> FreeFormQuery:
    return FreeFormQuery(
        f"how many {phrase.plural} are there?",
        tuple(str(count) for count in range(most + 1)),
        lambda scene: str(scene.count(phrase)),
        lures=lambda pool: pool.has_parts(phrase),
        question_type="how many",
        answer_type="number",
    )


# Rates are per round, and a round is as many questions as there are answers.
RATES = {"is there": 0.62, "what color": 0.1, "what shape": 0.1, "how many of an attribute": 0.1, "how many": 0.08}


def draw_query(rng: np.random.Generator, config: WorldConfig) -> FreeFormQuery:
    """A random question, of the kinds and at the rates of `RATES`."""
    kind = pick_weighted(rng, RATES)
    if kind == "is there":
        return is_there(random_phrase(rng, 0.05, 0.05))
    if kind == "what color":
        return what_color(pick(rng, SHAPES))
    if kind == "what shape":
        return what_shape(pick(rng, COLORS))
    if kind == "how many of an attribute":
        return how_many(random_phrase(rng, 0.5, 0.5), most=min(3, config.max_objects))
    return how_many(random_phrase(rng), most=min(2, config.max_objects))


def vqav2_questions(config: WorldConfig, split: str) -> tuple[list[Scene], list[Asked[FreeFormQuery]]]:
    """The images of a split and its questions about them, by image."""
    number = config.num_vqav2_train if split == "train" else config.num_evaluation
    pool = Pool(config, f"vqav2/{split}", max(2000, number // 2))
    asked = ask(pool, stream(config, f"vqav2/{split}"), lambda rng: draw_query(rng, config), number)
    return keep_used(pool, asked)


def keep_used(pool: Pool, asked: list[Asked[Q]]) -> tuple[list[Scene], list[Asked[Q]]]:
    """The scenes that are asked about, and the questions sorted by them and numbered accordingly."""
    used = sorted({item.image for item in asked})
    place = {image: number for number, image in enumerate(used)}
    renumbered = [Asked(item.query, place[item.image], item.answer) for item in asked]
    return [pool.scenes[image] for image in used], sorted(renumbered, key=lambda item: item.image)


def image_id(split: str, image: int) -> int:
    return 1_000_000 * (1 + list(SPLITS).index(split)) + image


def image_key(split: str, image: int) -> str:
    return f"COCO_{SPLITS[split]}_{image_id(split, image):012d}"


def write_vqav2(config: WorldConfig, split: str, asked: list[Asked[FreeFormQuery]], folder: Path) -> None:
    """The official questions file and annotations file of a split."""
    rng = stream(config, f"vqav2/{split}/annotators")
    questions: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    numbers: Counter[int] = Counter()
    for item in asked:
        image = image_id(split, item.image)
        identity = {"image_id": image, "question_id": image * 1000 + numbers[image]}
        numbers[image] += 1
        answers = annotators(item, config.annotator_noise, rng)
        votes = Counter(answer["answer"] for answer in answers)
        best = max(votes, key=lambda answer: (votes[answer], answer == item.answer))
        questions.append(identity | {"question": item.query.text})
        annotations.append(
            {
                "question_type": item.query.question_type,
                "multiple_choice_answer": best,
                "answers": answers,
                "answer_type": item.query.answer_type,
            }
            | identity
        )
    header = HEADER | {"data_subtype": SPLITS[split]}
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"mscoco_{SPLITS[split]}"
    (folder / f"v2_OpenEnded_{stem}_questions.json").write_text(json.dumps(header | {"questions": questions}))
    (folder / f"v2_{stem}_annotations.json").write_text(json.dumps(header | {"annotations": annotations}))


def annotators(item: Asked[FreeFormQuery], noise: float, rng: np.random.Generator) -> list[dict[str, Any]]:
    """Ten answers. Each is, at rate `noise`, another answer of the same question; errors are less often confident."""
    wrong = [answer for answer in item.query.answers if answer != item.answer]
    result = []
    for number in range(1, 11):
        errs = rng.random() < noise
        sure = rng.random() < (0.3 if errs else 0.9)
        answer = pick(rng, wrong) if errs else item.answer
        result.append({"answer": answer, "answer_confidence": "yes" if sure else "maybe", "answer_id": number})
    return result
