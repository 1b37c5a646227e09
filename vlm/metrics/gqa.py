"""GQA's suite of metrics as the official script computes them.

Source: `eval.py` of the GQA download page (Hudson and Manning, arXiv 1902.09506, section 4.4). Every metric is over the
*balanced* questions, and answers are compared exactly.

    accuracy       share of right answers; `open` is over structural type query, `binary` over the rest
    consistency    over the rightly answered questions that entail others: the mean accuracy on those others, averaged
    validity       share of answers of a kind that the question allows (a color to a color question)
    plausibility   share of answers that occur in the world (no purple apple)
    distribution   chi-square between true and predicted answers of each global group, weighted by the group's size,
                   over 100; lower is better
    grounding      attention that lies on the regions which question and answer name, summed over the regions: it may
                   exceed 100
    accuracy_per_* accuracy by structural and semantic type, number of reasoning steps, and number of words

Kept from the script, although its comments say otherwise: the whole image is never added as a region of questions about
the scene (it tests the keys of a step, not its words); and a prediction counts in `distribution` only where its group
has that answer among the true ones. Its branch for attention over objects does not run; here it does what it says.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from vlm.metrics.tally import Sample, Tally

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

COMPARED = frozenset(("color", "material", "shape"))
"""What may answer a question of a detailed type with `Common` in its name (what do both have in common?)."""

NOT_REASONING = ("exist", "query: name", "choose name")
"""Steps that only read an answer off; they do not count."""


class Question(NamedTuple):
    """What scoring needs of one entry of the official questions. None or empty: the entry has no such field."""

    image: str
    answer: str
    structural: str
    semantic: str | None = None
    num_steps: int | None = None
    num_words: int | None = None
    group: str | None = None  # the global group, of which some questions have none
    entailed: tuple[str, ...] = ()  # ids of the questions whose answers follow from this one's
    compares: bool = False  # the detailed type has `Common` in its name
    objects: tuple[str, ...] = ()  # ids of the objects that the question and its full answer name


class Choices(NamedTuple):
    """The answers to one question that are valid, and those that are plausible."""

    valid: Collection[str]
    plausible: Collection[str]


Region = tuple[float, float, float, float]
"""x0, y0, x1, y1 as fractions of the image's width and height."""


def score(
    questions: Mapping[str, Question],
    predictions: Mapping[str, str | None],
    all_answers: Mapping[str, str] | None = None,
    choices: Mapping[str, Choices] | None = None,
    grounding: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """The metrics in percent (`distribution`: chi-square over 100), unrounded; those whose inputs are given.

    `questions` are the balanced ones. `all_answers` holds the true answers of all questions, for consistency;
    `grounding` the attention score of each question. A prediction is looked up for every question, and for those that
    it entails; None is one that was not given, and wrong.
    """
    return tally(questions, predictions, all_answers, choices, grounding).scores()


def tally(
    questions: Mapping[str, Question],
    predictions: Mapping[str, str | None],
    all_answers: Mapping[str, str] | None = None,
    choices: Mapping[str, Choices] | None = None,
    grounding: Mapping[str, float] | None = None,
) -> Tally:
    """Every question judged once. Clusters are images."""
    result = Tally(scale=100)
    given = {"consistency": all_answers, "validity": choices, "plausibility": choices, "grounding": grounding}
    for name in ("accuracy", "binary", "open", *(name for name, needed in given.items() if needed is not None)):
        result.samples[name,] = Sample()  # 0 if it stays empty, as in the script
    histogram = Histogram([], [], [], [])
    cells: dict[tuple[str, str], int] = {}
    for question in questions.values():
        if question.group is not None:
            cells.setdefault((question.group, question.answer), len(cells))
    for key, question in questions.items():
        prediction, cluster = predictions[key], result.cluster(question.image)
        right = prediction == question.answer
        value = float(right)
        result.add(("accuracy",), value, cluster)
        result.add(("open" if question.structural == "query" else "binary",), value, cluster)
        result.add(("accuracy_per_structural_type", question.structural), value, cluster)
        if question.semantic is not None:
            result.add(("accuracy_per_semantic_type", question.semantic), value, cluster)
        if question.num_steps is not None:
            result.add(("accuracy_per_steps", str(question.num_steps)), value, cluster)
        if question.num_words is not None:
            result.add(("accuracy_per_length", str(question.num_words)), value, cluster)
        if all_answers is not None and right:
            others = [other for other in question.entailed if other != key]
            if others:
                agreeing = sum(predictions[other] == all_answers[other] for other in others)
                result.add(("consistency",), agreeing / len(others), cluster)
        if choices is not None:
            allowed = Choices(COMPARED, COMPARED) if question.compares else choices[key]
            result.add(("validity",), float(prediction in allowed.valid), cluster)
            result.add(("plausibility",), float(prediction in allowed.plausible), cluster)
        if grounding is not None:
            result.add(("grounding",), grounding[key], cluster)
        if question.group is not None:
            histogram.gold.append(cells[question.group, question.answer])
            histogram.predicted.append(-1 if prediction is None else cells.get((question.group, prediction), -1))
            histogram.clusters.append(cluster)
    if cells:
        groups = {group: number for number, group in enumerate(dict.fromkeys(group for group, _ in cells))}
        histogram.groups.extend(groups[group] for group, _ in cells)
        result.statistics["distribution",] = histogram.distances
    else:
        result.not_computed["distribution"] = "no question has a global group"
    return result


@dataclass(slots=True)
class Histogram:
    """True and predicted answers, counted in cells of (global group, true answer). One entry a question."""

    gold: list[int]
    predicted: list[int]  # -1: an answer that is true of no question of the group
    clusters: list[int]
    groups: list[int]  # of each cell

    def distances(self, weights: NDArray[np.float64]) -> NDArray[np.float64]:
        """The distribution score under each row of cluster weights."""
        import numpy as np

        num_cells, groups, clusters = len(self.groups), np.asarray(self.groups), np.asarray(self.clusters)
        gold, predicted = np.asarray(self.gold), np.asarray(self.predicted)
        inside = predicted >= 0
        distances = np.empty(len(weights))
        for row, weight in enumerate(weights):
            each = weight[clusters]
            expected = np.bincount(gold, each, num_cells)
            observed = np.bincount(predicted[inside], each[inside], num_cells)
            some = expected > 0
            off = (observed[some] - expected[some]) ** 2 / expected[some]
            sizes = np.bincount(groups[some], expected[some])
            with np.errstate(invalid="ignore"):  # a resample without any grouped question is NaN
                distances[row] = np.dot(np.bincount(groups[some], off), sizes) / sizes.sum() / 100
        return distances


def num_steps(program: Sequence[Mapping[str, Any]]) -> int:
    """Steps of a functional program without those that only read the answer off."""
    texts = [f"{step['operation']}: {step['argument']}" for step in program]
    return sum(not any(reading in text for reading in NOT_REASONING) for text in texts)


def map_grounding(regions: Sequence[Region], attention: NDArray[np.float64]) -> float:
    """Attention on `regions`, each cell weighted by the share of it that lies inside, summed over regions.

    `attention[i, j]` belongs to the cell that is i-th from the left and j-th from the top, as the script has it.
    """
    import numpy as np

    edges = np.arange(len(attention) + 1) / len(attention)
    cells = np.stack([edges[:-1], edges[1:]])
    boxes = np.asarray(regions).reshape(-1, 4)
    across, down = _overlaps(boxes[:, (0, 2)], cells), _overlaps(boxes[:, (1, 3)], cells)
    return float(np.einsum("ri,ij,rj->", across, attention, down) * len(attention) ** 2)


def object_grounding(regions: Sequence[Region], attention: NDArray[np.float64]) -> float:
    """The same for attention over boxes: rows of x0, y0, x1, y1 and the attention that the box gets."""
    import numpy as np

    boxes = np.asarray(regions).reshape(-1, 4)
    across = _overlaps(boxes[:, (0, 2)], attention[:, (0, 2)].T)
    down = _overlaps(boxes[:, (1, 3)], attention[:, (1, 3)].T)
    areas = (attention[:, 2] - attention[:, 0]) * (attention[:, 3] - attention[:, 1])
    return float((across * down * (attention[:, 4] / areas)).sum())


def _overlaps(spans: NDArray[np.float64], cells: NDArray[np.float64]) -> NDArray[np.float64]:
    """Length that each span [regions, 2] shares with each cell [2, cells]."""
    import numpy as np

    shared = np.minimum(spans[:, 1:], cells[1]) - np.maximum(spans[:, :1], cells[0])
    clipped: NDArray[np.float64] = np.maximum(shared, 0)
    return clipped
