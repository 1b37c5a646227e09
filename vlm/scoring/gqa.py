"""The official questions, choices and scene graphs of GQA, and attention files in the form that its script reads."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from sys import intern
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from vlm.errors import UserError
from vlm.metrics.gqa import Choices, Question, Region, map_grounding, num_steps, object_grounding
from vlm.records import OfficialFile, Row, records, shown
from vlm.scoring.fields import Presence

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


AttentionForm = Literal["maps", "boxes"]


class Questions(NamedTuple):
    """What a questions file holds for scoring."""

    balanced: dict[str, Question]
    unbalanced: frozenset[str]  # ids that may be predicted, but count in no score
    lacking: dict[str, str]  # scores that cannot be computed, and the field that the file lacks


OPTIONAL = {
    "types.semantic": ("accuracy_per_semantic_type",),
    "semantic": ("accuracy_per_steps",),
    "groups": ("distribution",),
    "entailed": ("consistency",),
    "types.detailed": ("validity", "plausibility"),
    "annotations": ("grounding",),
}
"""Fields without which some scores cannot be computed, but the others can."""


def read_questions(path: Path, wanted: Collection[str]) -> Questions:
    """The balanced questions of a file, or of a folder of its chunks, and the ids of the others.

    Fields that only other scores than the `wanted` need are not read.
    """
    balanced: dict[str, Question] = {}
    unbalanced: list[str] = []
    presence = Presence(path)
    fields = frozenset(field for field, names in OPTIONAL.items() if not set(names).isdisjoint(wanted))
    for key, row in _chunks(path):
        if row.content.get("isBalanced", True) is True:
            balanced[key] = _question(row, presence, fields)
        elif row.content["isBalanced"] is False:
            unbalanced.append(key)
        else:
            raise row.wrong("isBalanced", "true or false")
    if not balanced:
        raise UserError(f"{path}: holds no balanced question. Give the balanced questions, or all")
    lacking = {
        name: f"the questions carry no {field!r}"
        for field in fields
        if presence.lacks(field)
        for name in OPTIONAL[field]
    }
    return Questions(balanced, frozenset(unbalanced), lacking)


def read_all_answers(path: Path, questions: Mapping[str, Question]) -> dict[str, str]:
    """The true answer to every question of the all-questions file or folder; it must know those that are entailed."""
    answers = {key: intern(row.raw_text("answer")) for key, row in _chunks(path)}
    for key, question in questions.items():
        for other in (key, *question.entailed):
            if other not in answers:
                why = "" if other == key else f", which question {shown(key)} entails"
                raise UserError(
                    f"{path}: no question {shown(other)}{why}. Give all questions of the split that is scored"
                )
    return answers


def read_choices(path: Path, questions: Mapping[str, Question]) -> dict[str, Choices]:
    """The valid and the plausible answers to each balanced question. Equal lists are kept once."""
    kept: dict[tuple[str, ...], frozenset[str]] = {}

    def as_set(texts: Any) -> frozenset[str]:
        texts = tuple(map(intern, texts))
        return kept.setdefault(texts, frozenset(texts))

    choices: dict[str, Choices] = {}
    for key, row in _chunks(path):
        if key in questions:
            valid, plausible = (row.list_of(name, str, "texts") for name in ("valid", "plausible"))
            choices[key] = Choices(as_set(valid), as_set(plausible))
    _require(path, questions, choices, "choices for")
    return choices


def read_grounding(
    attentions: Path, scenes: Path, questions: Mapping[str, Question], form: AttentionForm | None = None
) -> dict[str, float]:
    """The grounding score of each balanced question, a fraction.

    An attention is a square map (a list of columns, from the left, of cells from the top), of one size throughout the
    file, or a list of boxes [x0, y0, x1, y1, attention] in fractions of the image. `form` says which; None: what their
    sizes tell, which 5 by 5 numbers do not.
    """
    maps = {key: value for key, value in _read_attentions(attentions).items() if key in questions}
    _require(attentions, questions, maps, "attention for")
    regions = _read_regions(scenes, questions)
    sizes = {value.shape for value in maps.values()}
    square = len(sizes) == 1 and len(set(next(iter(sizes)))) == 1
    if form is None and sizes == {(5, 5)}:
        raise UserError(
            f"{attentions}: 5 by 5 numbers are a map of 5 by 5 cells, or five boxes. "
            "Say which with --attention-form maps or boxes"
        )
    if square and form != "boxes":
        return {key: map_grounding(regions[key], maps[key]) for key in questions}
    if form == "maps":
        raise UserError(f"{attentions}: expected square maps of one size. Got {_listed(sizes)}")
    for key, value in maps.items():
        if value.shape[1:] != (5,):
            raise UserError(
                f"{attentions}: question {shown(key)}: attention is {len(value)} by {value.shape[1]}. Expected square "
                "maps of one size, or boxes [x0, y0, x1, y1, attention]"
            )
        if not ((value[:, 2] > value[:, 0]) & (value[:, 3] > value[:, 1])).all():
            raise UserError(f"{attentions}: question {shown(key)}: a box without area. Expected x0 < x1 and y0 < y1")
    return {key: object_grounding(regions[key], maps[key]) for key in questions}


def _listed(sizes: Iterable[tuple[int, ...]]) -> str:
    return ", ".join(" by ".join(map(str, size)) for size in sorted(sizes)[:3])


def _chunks(path: Path, noun: str = "question") -> Iterator[tuple[str, Row]]:
    """Ids and entries of a file of {id: entry}, or of all such files of a folder, as large releases come in chunks."""
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not files:
        raise UserError(f"{path}: holds no .json file. Give the file or the folder of chunks")
    seen: set[str] = set()
    for file in map(OfficialFile.given, files):
        for key, content in records(file, "object"):
            row = Row(file, f"{noun} {shown(key)}", content)
            if len(files) > 1:
                if key in seen:
                    raise row.error("stands in an earlier chunk too", "Keep each chunk once")
                seen.add(key)
            yield key, row


def _question(row: Row, presence: Presence, fields: Collection[str]) -> Question:
    types = row.inside("types")

    def has(field: str) -> bool:
        holder = types if field.startswith("types.") else row
        return field in fields and presence.of(field, row.place, holder.content, field.removeprefix("types."))

    steps: int | None = None
    if has("semantic"):
        program = row.list_of("semantic", dict, "steps")
        if not all("operation" in step and "argument" in step for step in program):
            raise row.wrong("semantic", "a list of steps with operation and argument")
        steps = num_steps(program)
    group: str | None = None
    if has("groups"):
        groups = row.inside("groups")
        if "global" not in groups.content or groups.content["global"] is not None:
            group = intern(groups.raw_text("global"))
    objects: list[str] = []
    if has("annotations"):
        annotations = row.inside("annotations")
        for name in ("question", "fullAnswer"):
            named = annotations.inside(name)
            objects += [intern(named.raw_text(span)) for span in named.content]
    return Question(
        image=intern(row.raw_text("imageId")),
        answer=intern(row.raw_text("answer")),
        structural=intern(types.raw_text("structural")),
        semantic=intern(types.raw_text("semantic")) if has("types.semantic") else None,
        num_steps=steps,
        num_words=len(row.raw_text("question").split()),
        group=group,
        entailed=tuple(row.list_of("entailed", str, "texts")) if has("entailed") else (),
        compares=has("types.detailed") and "Common" in types.raw_text("detailed"),
        objects=tuple(objects),
    )


def _read_attentions(path: Path) -> dict[str, NDArray[np.float64]]:
    import numpy as np

    attentions: dict[str, NDArray[np.float64]] = {}
    file = OfficialFile.given(path)
    for place, content in records(file, "list"):
        row = Row(file, place, content)
        key = row.raw_text("questionId")
        if key in attentions:
            raise row.error(f"a second attention for question {shown(key)}", "Keep one for each question")
        rows = row.list_of("attention", list, "lists of numbers")
        try:
            values = np.asarray(rows)
        except ValueError:  # rows of different lengths
            values = np.empty(0)
        if values.ndim != 2 or not values.size or values.dtype.kind not in "if" or not np.isfinite(values).all():
            raise row.wrong("attention", "a list of equally long lists of numbers")
        attentions[key] = values.astype(float)
    return attentions


def _read_regions(scenes: Path, questions: Mapping[str, Question]) -> dict[str, list[Region]]:
    """The boxes of the objects that each question and its answer name."""
    by_image: dict[str, list[str]] = {}
    for key, question in questions.items():
        by_image.setdefault(question.image, []).append(key)
    regions: dict[str, list[Region]] = {}
    for image, row in _chunks(scenes, "image"):
        asked = by_image.get(image, [])
        boxes = {name: _region(row, name) for name in {name for key in asked for name in questions[key].objects}}
        regions.update({key: [boxes[name] for name in questions[key].objects] for key in asked})
    _require(scenes, questions, regions, "scene graph for the image of")
    return regions


def _region(scene: Row, name: str) -> Region:
    box = scene.inside("objects").inside(name)
    width, height = scene.number("width"), scene.number("height")
    if width <= 0 or height <= 0:
        raise scene.error(f"an image of {width} by {height} pixels")
    x, y, w, h = map(box.number, "xywh")
    return x / width, y / height, (x + w) / width, (y + h) / height


def _require(path: Path, questions: Mapping[str, Question], found: Mapping[str, Any], what: str) -> None:
    missing = next((key for key in questions if key not in found), None)
    if missing is not None:
        raise UserError(f"{path}: no {what} question {shown(missing)}. Give the file of the split that is scored")
