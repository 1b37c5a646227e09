"""The card of an exported model: what it is, how it was trained and scored, and under which licences its parts are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from vlm.config import CustomConfig, fingerprint
from vlm.run import RunConfig
from vlm.supervision.ledger import Ledger

UNKNOWN = "unknown"

# Of weights, as the model cards of their repositories on the hub state them. For timm its own table says.
LICENCES = {
    "roberta-base": "mit",
    "FacebookAI/roberta-base": "mit",
    "bert-base-uncased": "apache-2.0",
    "google-bert/bert-base-uncased": "apache-2.0",
    "sentence-transformers/all-MiniLM-L6-v2": "apache-2.0",
    "all-MiniLM-L6-v2": "apache-2.0",
}
PIPELINES = {"vqav2": "visual-question-answering", "gqa": "visual-question-answering"}

USE = """```python
import vlm

model = vlm.load("FOLDER or OWNER/NAME")
{use}
```"""
ANSWERS = 'model.answer(["scene.png"], ["what color is the circle?"], top=3)'
ANSWERS_OF_TWO = 'model.answer([("left.png", "right.png")], ["there are two dogs in total"])'
MATCHES = 'model.match(["scene.png"], ["a red circle"])'
ENCODES = 'model.encode(["scene.png"], ["a red circle"]).pooled'


def model_card(
    config: RunConfig,
    scores: Mapping[str, Any],
    ledger: Ledger,
    num_answers: int,
    num_parameters: int,
    data_licences: Mapping[str, str],
) -> str:
    """Markdown, with the header that the hub reads."""
    task = None if config.task is None else config.task.type
    header: dict[str, Any] = {
        "library_name": "vlm-less-supervision",
        "license": UNKNOWN,
        "tags": ["vision-language", "less-bimodal-supervision"],
    }
    if task in PIPELINES:
        header["pipeline_tag"] = PIPELINES[task]
    parts = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---",
        f"# {config.name}-{fingerprint(config)}",
        _what_it_is(config, num_answers, num_parameters),
        "## Use\n\n" + USE.format(use=_use(config, num_answers)),
        "## How it was trained\n\n" + _training(config, scores),
        "## What it has seen\n\n" + ledger.markdown().replace("<", "&lt;"),
        "## How it scored\n\n" + _scores(scores),
        "## Licences\n\n" + _licences(config, data_licences),
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _what_it_is(config: RunConfig, num_answers: int, num_parameters: int) -> str:
    model = config.model
    rows = [
        ("vision encoder", _named(model.vision)),
        ("language encoder", _named(model.language)),
        ("fusion", _named(model.fusion)),
        ("parameters", f"{num_parameters:,}, heads included"),
    ]
    if num_answers:
        rows.append(("answers", f"{num_answers:,}"))
    if config.task is None:
        what = f"pretrained with {', '.join(config.objectives)}"
    else:
        what = f"fine-tuned on {_named(config.task)}"
    return f"A vision-language model, {what}.\n\n{_table(('part', ''), rows)}"


def _use(config: RunConfig, num_answers: int) -> str:
    if num_answers:
        return ANSWERS_OF_TWO if getattr(config.task, "images_per_text", 1) == 2 else ANSWERS
    return MATCHES if any(one.type == "matching" for one in config.objectives.values()) else ENCODES


def _training(config: RunConfig, scores: Mapping[str, Any]) -> str:
    rows = [("fingerprint", fingerprint(config)), ("seed", config.seed)]
    rows += [(name, f"{scores[name]:,}") for name in ("steps", "samples", "examples") if name in scores]
    rows.append(("batch", config.trainer.batch_size))
    rows.append(("learning rate", config.optimizer.learning_rate))
    rows.append(("data", config.data.type))
    if config.start_from is not None:
        rows.append(("started from", config.start_from.name))
    if config.start_without:
        rows.append(("without its", ", ".join(config.start_without)))
    if config.task is None:
        rows += [(f"objective {name}", f"{one.type}, weight {one.weight}") for name, one in config.objectives.items()]
        if config.data.part == "pairs":
            rows.append(("fraction of the pairs", config.supervision.fraction))
            rows += [("texts from", source.type) for source in config.supervision.drawn]
    return f"{_table(('setting', 'value'), rows)}\n\n`config.yaml` has every setting."


def _scores(scores: Mapping[str, Any]) -> str:
    rows = [(name, f"{value:.2f}") for name, value in scores.get("scores", {}).items()]
    for evaluation, values in scores.get("evaluations", {}).items():
        rows += [(f"{evaluation}: {name}", f"{value:.2f}") for name, value in values.items()]
    if rows:
        return f"In percent, by the rules of the benchmark's authors.\n\n{_table(('score', 'percent'), rows)}"
    figures = [(name, value) for name, value in scores.get("metrics", {}).items() if name.startswith("validation/")]
    if not figures:
        return "Not scored."
    return f"A pretraining has no score of a task. At its last validation:\n\n{_table(('figure', 'value'), figures)}"


def _licences(config: RunConfig, data_licences: Mapping[str, str]) -> str:
    model = config.model
    rows = [
        (f"{name} encoder: {_named(getattr(model, name))}", _licence_of(getattr(model, name)))
        for name in ("vision", "language")
    ]
    data = data_licences or {config.data.type: UNKNOWN}
    rows += [(f"data: {name}", licence) for name, licence in data.items()]
    return (
        "What is known of the parts that this model was made of. Of the model itself nobody has said anything: whoever "
        f"publishes it says so here and in the header.\n\n{_table(('part', 'licence'), rows)}"
    )


def _licence_of(encoder: Any) -> str:
    """What is known of the weights that an encoder began with."""
    if encoder.type == "tiny" or not getattr(encoder, "pretrained", True):
        return "began with random weights"
    if isinstance(encoder, CustomConfig) or getattr(encoder, "weights", None) is not None:
        return UNKNOWN  # a file, run or package of anyone
    if encoder.type == "timm":
        import timm

        told = timm.get_pretrained_cfg(encoder.name)
        return str(getattr(told, "license", None) or UNKNOWN)
    return LICENCES.get(getattr(encoder, "name", ""), UNKNOWN) if encoder.type == "transformers" else UNKNOWN


def _named(part: Any) -> str:
    name = getattr(part, "target", None) or getattr(part, "name", None)
    return f"{part.type} {name}" if name else str(part.type)


def _table(header: tuple[str, str], rows: list[tuple[str, Any]]) -> str:
    lines = [header, ("---", "---"), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(value: Any) -> str:
    """A value on one line that neither ends the cell nor begins HTML."""
    return " ".join(str(value).split()).replace("|", "\\|").replace("<", "&lt;")
