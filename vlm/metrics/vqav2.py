"""VQA accuracy."""

from __future__ import annotations

from collections.abc import Sequence


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
