"""VQA accuracy."""

from __future__ import annotations

import re
from collections.abc import Sequence

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(NUMBER_WORDS)}
ARTICLES = ("a", "an", "the")


def normalise_answer(text: str) -> str:
    """An answer as the official script compares it: punctuation, number words and articles; no contractions."""
    text = text.replace("\n", " ").replace("\t", " ").strip()
    joined = re.search(r"\d,\d", text) is not None
    result = text
    for mark in PUNCTUATION:
        result = result.replace(mark, "" if joined or f"{mark} " in text or f" {mark}" in text else " ")
    result = re.sub(r"\.(?!\d)", "", result)
    words = (NUMBERS.get(word, word) for word in result.lower().split())
    return " ".join(word for word in words if word not in ARTICLES)


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Accuracy in [0, 1]: the mean over all leave-one-out sets of min(1, matches / 3).

    With ten answers, k matches give 0, .3, .6, .9 and from four on 1. Source: Antol et al., arXiv 1505.00468, and
    the evaluation script of visualqa.org. Strings are compared as given: whoever needs the normaliser of the
    official script (punctuation, articles, number words) applies it to both sides first.
    """
    if not answers:
        raise ValueError("VQA accuracy needs at least one human answer")
    matches = sum(answer == prediction for answer in answers)
    others = len(answers) - matches
    return (matches * min(1.0, (matches - 1) / 3) + others * min(1.0, matches / 3)) / len(answers)
