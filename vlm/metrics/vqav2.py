"""VQAv2 accuracy as the official script computes it, with both of its rules.

Source: `vqaEval.py` of GT-Vision-Lab/VQA, which visualqa.org and EvalAI use. A prediction scores the mean, over the
sets that leave one of the ten human answers out, of min(1, matches / 3) (Antol et al., arXiv 1505.00468). What counts
as a match is the rule:

    2021   newlines and tabs become spaces and ends are stripped, on both sides. Where the answers then differ from each
           other, both sides are normalised; where all agree, strings are compared as they are. The authors' reason:
           unanimous answers are often text that was read from the picture.
    2016   the prediction is always stripped and normalised. Of the answers, only punctuation is processed, and only
           where they differ. So "The cat" against ten times "the cat" is wrong, and so is "two" against ten "two".
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple

from vlm.metrics.tally import Tally

Rule = Literal["2021", "2016"]


class Annotation(NamedTuple):
    """What scoring needs of one entry of the official annotations."""

    image: int
    answers: tuple[str, ...]
    question_type: str | None = None
    answer_type: str | None = None


def score(
    annotations: Mapping[int, Annotation], predictions: Mapping[int, str | None], rule: Rule = "2021"
) -> dict[str, Any]:
    """`overall`, `per_answer_type` and `per_question_type` in percent, unrounded.

    A prediction is looked up for every annotation; None is an answer that was not given, and wrong.
    """
    return tally(annotations, predictions, rule).scores()


def tally(annotations: Mapping[int, Annotation], predictions: Mapping[int, str | None], rule: Rule = "2021") -> Tally:
    """Every question judged once. Clusters are images."""
    result = Tally(scale=100)
    for number, annotation in annotations.items():
        prediction = predictions[number]
        accuracy = 0.0 if prediction is None else official_accuracy(prediction, annotation.answers, rule)
        cluster = result.cluster(annotation.image)
        result.add(("overall",), accuracy, cluster)
        if annotation.answer_type is not None:
            result.add(("per_answer_type", annotation.answer_type), accuracy, cluster)
        if annotation.question_type is not None:
            result.add(("per_question_type", annotation.question_type), accuracy, cluster)
    return result


def official_accuracy(prediction: str, answers: Sequence[str], rule: Rule = "2021") -> float:
    """Accuracy in [0, 1] of one prediction as the official script gives it."""
    prediction = stripped(prediction)
    if rule == "2021":
        answers = [stripped(answer) for answer in answers]
        if len(set(answers)) > 1:
            answers, prediction = [normalised(answer) for answer in answers], normalised(prediction)
    else:
        prediction = normalised(prediction)
        if len(set(answers)) > 1:
            answers = [without_punctuation(answer) for answer in answers]
    return vqa_accuracy(prediction, answers)


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Accuracy in [0, 1]: the mean over all leave-one-out sets of min(1, matches / 3).

    With ten answers, k matches give 0, .3, .6, .9 and from four on 1. Strings are compared as given;
    `official_accuracy` applies a rule first.
    """
    if not answers:
        raise ValueError("VQA accuracy needs at least one human answer")
    matches = answers.count(prediction)
    others = len(answers) - matches
    return (matches * min(1.0, (matches - 1) / 3) + others * min(1.0, matches / 3)) / len(answers)


# --- The normaliser --------------------------------------------------------------------------------------------------

COUNTING = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBER_WORDS = {"none": "0"} | {word: str(number) for number, word in enumerate(COUNTING)}
ARTICLES = frozenset(("a", "an", "the"))
MARKS = ';/[]"{}()=+\\_-><@`,?!'  # no apostrophe, colon, ampersand, per cent, dollar or hash

# The script's other period pattern, `(?!<=\d)`, was meant to spare "1.": it is a mistyped lookbehind that always holds.
PERIOD = re.compile(r"\.(?!\d)")
PERIODS_REMOVED = 32  # the script passes the flag re.UNICODE where `sub` takes a count
COMMA_IN_NUMBER = re.compile(r"\d,\d")

CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's I'd've I'm I've isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've
    needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll
    somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd
    there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll
    what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
    would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""


def _contractions() -> dict[str, str]:
    """A word that lacks one of its apostrophes -> the word. Those with a capital never meet a lower-cased word."""
    return {
        word[:place] + word[place + 1 :]: word
        for word in CONTRACTED.split()
        for place, character in enumerate(word)
        if character == "'"
    } | {"somebody'd": "somebodyd"}  # the wrong way round, as in the script


CONTRACTIONS = _contractions()


def normalise_answer(text: str) -> str:
    """An answer as the rule of 2021 compares it: stripped, then normalised."""
    return normalised(stripped(text))


@lru_cache(maxsize=1 << 17)
def stripped(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


@lru_cache(maxsize=1 << 17)
def normalised(text: str) -> str:
    """Punctuation first, then case, number words, articles and contractions, word by word."""
    words = [NUMBER_WORDS.get(word, word) for word in without_punctuation(text).lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


@lru_cache(maxsize=1 << 17)
def without_punctuation(text: str) -> str:
    """A mark vanishes where it stands beside a space, or where any number is written with a comma; else it is a space.

    That is decided on the whole text, once for each kind of mark: "x-y -z" becomes "xy z". Periods vanish unless a
    digit follows.
    """
    has_number_comma = COMMA_IN_NUMBER.search(text) is not None
    processed = text
    for mark in MARKS:
        if mark in processed:
            vanishes = has_number_comma or f"{mark} " in text or f" {mark}" in text
            processed = processed.replace(mark, "" if vanishes else " ")
    return PERIOD.sub("", processed, count=PERIODS_REMOVED)
