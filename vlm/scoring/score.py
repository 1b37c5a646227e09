"""From the files of one task to tallies: what `vlm score` does, as functions."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from vlm.errors import UserError
from vlm.metrics import gqa, nlvr2, vqav2
from vlm.metrics.tally import Tally
from vlm.scoring.gqa import AttentionForm, read_all_answers, read_choices, read_grounding, read_questions
from vlm.scoring.nlvr2 import read_labels
from vlm.scoring.predictions import complete, read_gqa_predictions, read_nlvr2_predictions, read_vqav2_results
from vlm.scoring.vqav2 import read_annotations

T = TypeVar("T")


@dataclass(frozen=True)
class Scored:
    """One prediction file, judged."""

    file: Path
    tally: Tally
    num_needed: int  # predictions that the split asks for
    num_missing: int  # those that were not given and count as wrong


@dataclass(frozen=True)
class Scoring:
    """One task's prediction files, judged against the same questions."""

    task: str
    cluster: str  # what the bootstrap draws
    num_questions: int
    files: tuple[Scored, ...]
    settings: dict[str, str] = field(default_factory=dict)


def score_vqav2(
    predictions: Sequence[Path],
    annotations: Path,
    questions: Path,
    rule: vqav2.Rule = "2021",
    allow_missing: bool = False,
) -> Scoring:
    """VQAv2 results files against the annotations of their split."""
    annotated, lacking = read_annotations(annotations, questions)
    scored = []
    for file in predictions:
        given, num_missing = complete(file, read_vqav2_results(file), annotated, annotated, annotations, allow_missing)
        tally = vqav2.tally(annotated, given, rule)
        tally.not_computed |= lacking
        scored.append(Scored(file, tally, len(annotated), num_missing))
    return Scoring("vqav2", "image", len(annotated), tuple(scored), {"rule": rule})


def score_gqa(
    predictions: Sequence[Path],
    questions: Path,
    all_questions: Path | None = None,
    choices: Path | None = None,
    scenes: Path | None = None,
    attentions: Path | None = None,
    allow_missing: bool = False,
    attention_form: AttentionForm | None = None,
) -> Scoring:
    """GQA prediction files against the questions of their split.

    With `all_questions`, every question there must be predicted, as the official script has it.
    """
    options = {"--all-questions": all_questions, "--choices": choices, "--scenes": scenes, "--attentions": attentions}
    needs = {
        "consistency": ("--all-questions",),
        "validity": ("--choices",),
        "plausibility": ("--choices",),
        "grounding": ("--attentions", "--scenes"),
    }
    not_computed = {
        name: f"needs {' and '.join(missing)}"
        for name, wanted in needs.items()
        if (missing := [option for option in wanted if options[option] is None])
    }
    if len(predictions) > 1 and attentions is not None:
        raise UserError(f"{attentions}: attention belongs to one model. Leave --attentions out of --compare")
    always = {"accuracy_per_semantic_type", "accuracy_per_steps", "distribution"}
    balanced, unbalanced, lacking = read_questions(questions, always | needs.keys() - not_computed.keys())
    not_computed |= lacking
    all_answers = read_all_answers(all_questions, balanced) if all_questions else None
    allowed = read_choices(choices, balanced) if choices else None
    grounding = read_grounding(attentions, scenes, balanced, attention_form) if attentions and scenes else None
    needed: Collection[str] = balanced if all_answers is None else all_answers
    known: Collection[str] = needed if not unbalanced else unbalanced.union(needed)
    scored = []
    for file in predictions:
        given, num_missing = complete(
            file, read_gqa_predictions(file), needed, known, all_questions or questions, allow_missing
        )
        tally = gqa.tally(
            balanced,
            given,
            _unless("consistency" in lacking, all_answers),
            _unless("validity" in lacking, allowed),
            _unless("grounding" in lacking, grounding),
        )
        tally.not_computed |= not_computed
        scored.append(Scored(file, tally, len(needed), num_missing))
    return Scoring("gqa", "image", len(balanced), tuple(scored))


def score_nlvr2(
    predictions: Sequence[Path],
    data: Path,
    balanced: Path | None = None,
    unbalanced: Path | None = None,
    allow_missing: bool = False,
) -> Scoring:
    """NLVR2 prediction files against the JSON lines of their split."""
    labels = read_labels(data)
    files: Mapping[str, Path | None] = {"balanced": balanced, "unbalanced": unbalanced}
    subsets = {name: read_labels(file, among=labels) for name, file in files.items() if file is not None}
    scored = []
    for file in predictions:
        given, num_missing = complete(file, read_nlvr2_predictions(file), labels, labels, data, allow_missing)
        tally = nlvr2.tally(labels, given, subsets)
        tally.not_computed |= {name: f"needs --{name}" for name in files if name not in subsets}
        scored.append(Scored(file, tally, len(labels), num_missing))
    return Scoring("nlvr2", "statement group", len(labels), tuple(scored))


def _unless(lacking: bool, value: T) -> T | None:
    return None if lacking else value
