"""NLVR2 accuracy and consistency as the official script computes them.

Source: `nlvr2/eval/metrics.py` of lil-lab/nlvr. An identifier is split-set-pair-sentence; a statement was shown with up
to four pairs, and consistency is the share of statements that are judged right with every pair. Statements are told
apart by the identifier without its third part, never by their text: different sets share sentences.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from vlm.metrics.tally import Name, Tally

IDENTIFIER = re.compile(r"[A-Za-z0-9_]{1,40}-[0-9]{1,20}-[0-9]{1,20}-[0-9]{1,20}")
"""split-set-pair-sentence, such as dev-850-2-0."""


def score(
    labels: Mapping[str, str],
    predictions: Mapping[str, str | None],
    subsets: Mapping[str, Collection[str]] | None = None,
) -> dict[str, Any]:
    """`accuracy` and `consistency` as fractions in [0, 1], the scale of the official script; both again by subset.

    Case does not matter. A prediction is looked up for every label; None is one that was not given, and wrong.
    `subsets`: a name and its identifiers, such as those of the balanced and unbalanced files.
    """
    return tally(labels, predictions, subsets).scores()


def tally(
    labels: Mapping[str, str],
    predictions: Mapping[str, str | None],
    subsets: Mapping[str, Collection[str]] | None = None,
) -> Tally:
    """Every pair judged once. Clusters are the groups of consistency."""
    result = Tally(scale=1)
    right: dict[str, bool] = {}
    for identifier, label in labels.items():
        prediction = predictions[identifier]
        right[identifier] = prediction is not None and prediction.lower() == label.lower()
    _add(result, (), labels, right)
    for name, identifiers in (subsets or {}).items():
        _add(result, (name,), identifiers, right)
    return result


def _add(result: Tally, place: Name, identifiers: Collection[str], right: Mapping[str, bool]) -> None:
    consistent: dict[str, bool] = {}
    for identifier in identifiers:
        group = group_of(identifier)
        consistent[group] = consistent.get(group, True) and right[identifier]
        result.add((*place, "accuracy"), float(right[identifier]), result.cluster(group))
    for group, whole in consistent.items():
        result.add((*place, "consistency"), float(whole), result.cluster(group))


def group_of(identifier: str) -> str:
    """dev-850-2-0 -> dev-850-0: what the pairs of one statement have in common."""
    split, image_set, _, sentence = identifier.split("-")
    return f"{split}-{image_set}-{sentence}"
