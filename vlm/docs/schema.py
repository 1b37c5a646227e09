"""The keys of a configuration as Markdown: types and defaults from the schema, meanings from the source beside it.

What a key means is said where it is declared: in the comment behind the field, in comment lines above it, or in the
docstring of its class. What is so plain that nobody wrote it there (a width, a depth) stands in `PLAIN`.
"""

from __future__ import annotations

import ast
import inspect
import io
import re
import tokenize
import types
import typing
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Union

import pydantic
from pydantic.fields import FieldInfo

from vlm.config import default_config_folder

Model = type[pydantic.BaseModel]

PLAIN = {
    "type": "Chooses this variant.",
    "name": "Its name in the library that it comes from.",
    "width": "Length of a token's state.",
    "depth": "Number of layers.",
    "num_heads": "Attention heads of a layer; they divide the width.",
    "dropout": "Fraction of activations that a step of training drops.",
    "pre_norm": "Layer norm before each sublayer; `false`: behind it, as in the first transformers.",
    "patch_size": "Pixels of a patch's side.",
    "image_pixels": "Pixels of a picture's side, as the encoder sees it.",
    "pretrained": "Start from the published weights.",
    "weights": "Where the weights come from, if not from the library.",
    "max_tokens": "Longer texts are cut.",
    "vocabulary_size": "Words that the tokenizer knows.",
    "weight": "Its share: of the draws among sources, or of the sum of the losses.",
    "options": "Keyword arguments of the class.",
    "seed": "Decides every random choice of the run.",
    "RunConfig.name": "Begins the name of the run's folder.",
    "LoraConfig.rank": "Of the product B A of each adapter.",
    "LoraConfig.layers": "Ends of the names of the linear layers that have adapters; none: all have.",
    "target": "`package.module:Class`, installed or beside the folder where `vlm` runs.",
    "FolderData.root": "The folder, the URL or the command.",
    "FolderData.decode": "JPEGs at the smallest scale that serves, or whole.",
    "CSVData.validation": "A table that validates, in place of a part of the first.",
    "CSVData.test": "A table that is scored at the end.",
    "max_skips_in_a_row": "After so many skipped steps the run ends.",
    "shape": "How the weight gets from `initial` to `final`.",
    "from_fraction": "Share of the steps until which the weight is `initial`.",
    "to_fraction": "Share of the steps from which on the weight is `final`.",
    "StudyConfig.seeds": "Each run starts from the upstream runs of its own seed.",
    "WorldConfig.max_objects": "Of a scene.",
    "WorldConfig.seed": "Of the scenes, not of the run.",
    "EmojiConfig.image_pixels": "Pixels of a drawing's side.",
    "QFormerConfig.num_queries": "Learned queries; the default is BLIP-2's, arXiv 2301.12597, section 3.1.",
    "PerceiverConfig.num_latents": "Learned latents; the default is Flamingo's, arXiv 2204.14198.",
    "TransformersLanguageConfig.max_tokens": "Longer texts are cut; the default is METER's, arXiv 2111.02387.",
    "LoraConfig.alpha": "Over the rank, the factor on what an adapter adds.",
    "TimmVisionConfig.name": "A model of timm.",
    "TransformersLanguageConfig.name": "A model of transformers, by its name on the hub.",
    "patch_dropout": "Fraction of each image's patches that no step of training sees, drawn anew in each.",
    "resampler_depth": "Layers of the resampler.",
    "reader": "The fusion that reads the latents.",
    "splits": "Which splits to prepare; `null`: those that are there.",
    "TimmLabellerConfig.name": "A model of timm.",
    "OpenClipLabellerConfig.name": "ARCHITECTURE/PRETRAINED, as open_clip lists them.",
    "OpenClipLabellerConfig.weights": "A file in place of the pretrained tag.",
    "templates": "The sentences that a label stands in, at `{}`; the states of these are averaged.",
    "fraction": "Of the examples, this fraction may be seen.",
    "column": "Where the scores stand.",
    "direction": "Which scores are the best.",
    "mask_fraction": "Share of the tokens that are to be predicted.",
    "with_image": "`false`: from unpaired texts, for the language encoder alone.",
    "negative_fraction": "Share of the pairs that do not match.",
    "evaluation_split": "Where the final scores come from.",
    "vocabulary_from": "The splits whose answers are counted.",
    "sets": "Sets of `retrieval/` that are scored.",
    "learning_rate": "At the end of the warm-up, before the multipliers.",
    "betas": "AdamW's.",
    "weight_decay": "AdamW's, of matrices alone.",
    "warmup_fraction": "Share of the steps in which the rate rises.",
    "decay": "What the rate does afterwards.",
    "clip_norm": "Gradients are scaled to at most this norm; `null`: never.",
    "Multipliers.encoders": "Of both encoders.",
    "Multipliers.heads": "Of the objectives' and tasks' own layers.",
    "evaluation_batch_size": "Examples of a batch that is only scored.",
    "checkpoint_every_steps": "How much a killed run repeats at most.",
    "accelerator": "Lightning's names: `auto`, `cpu`, `gpu`, ...",
    "devices": "Of each node.",
    "num_nodes": "Machines of the run.",
    "progress": "Show a bar.",
    "log_every_steps": "Steps between two points of the TensorBoard curves.",
    "SeenConfig.pairs": "Images with texts that people wrote for them.",
    "labelled_images": "Images with classes or tags.",
    "question": "What the study asks, for its report.",
    "overrides": "`key=value` of every run.",
    "PanelConfig.task": "The task that it shows.",
    "PanelConfig.metric": "One of the task's scores.",
    "PanelConfig.title": "`null`: the task's name.",
}
"""Meanings by name, or by class and name."""


@dataclass(frozen=True)
class Key:
    path: str
    kind: str
    default: str  # empty: required
    meaning: str
    is_identity: bool


@dataclass(frozen=True)
class Section:
    """The keys of one config class at one place of the tree."""

    path: str
    variant: str | None  # the value of `type` that chooses it
    level: int
    text: tuple[str, ...]  # paragraphs
    keys: tuple[Key, ...]


# --- From the schema to sections -------------------------------------------------------------------------------------


def sections(model: Model, path: str = "", level: int = 1) -> Iterator[Section]:
    """A section for the class, then those of the classes inside it."""
    yield _section(model, path, None, level, list(model.model_fields))
    yield from _inner(model, path, level, list(model.model_fields))


def _inner(model: Model, path: str, level: int, names: list[str]) -> Iterator[Section]:
    for name in names:
        for place, members in models_at(_joined(path, name), model.model_fields[name].annotation):
            if len(members) == 1:
                yield from sections(members[0], place, min(level + 1, 4))
            elif members:
                yield from _variants(members, place, min(level + 1, 4))


def _variants(members: list[Model], path: str, level: int) -> Iterator[Section]:
    """What all members declare in one class comes once; then what is of each alone."""
    shared = [
        name
        for name in members[0].model_fields
        if name != "type" and len({_declared_in(member, name) for member in members}) == 1
    ]
    tags = ", ".join(f"`{tag_of(member)}`" for member in members)
    owner = _declared_in(members[0], shared[0]) if shared else None
    yield (
        _section(owner, path, None, level, shared, f"`{path}.type` is one of {tags}.")
        if owner
        else Section(path, None, level, (f"`{path}.type` is one of {tags}.",), ())
    )
    if owner is not None:
        yield from _inner(owner, path, level, shared)
    for member in members:
        own = [name for name in member.model_fields if name not in shared]
        yield _section(member, path, tag_of(member), level + 1, own)
        yield from _inner(member, path, level + 1, own)


def _section(model: Model, path: str, variant: str | None, level: int, names: list[str], first: str = "") -> Section:
    text, _ = _docstring(model)
    keys = []
    for name in sorted(names, key=lambda name: name != "type"):
        field = model.model_fields[name]
        extra = field.json_schema_extra
        is_identity = not (isinstance(extra, dict) and extra.get("identity") is False)
        keys.append(Key(_joined(path, name), kind_of(field), default_of(field), meaning_of(model, name), is_identity))
    return Section(path, variant, level, tuple(filter(None, (first, *text))), tuple(keys))


def models_at(path: str, annotation: Any) -> Iterator[tuple[str, list[Model]]]:
    """The config classes of a field, and their place: `path`, `path[]` in a list, `path.NAME` in a mapping."""
    found = list(_direct(annotation))
    if found:
        yield path, found
    for container, inner in _containers(annotation):
        yield from models_at(f"{path}.NAME" if container is dict else f"{path}[]", inner)


def _direct(annotation: Any) -> Iterator[Model]:
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        yield from _direct(typing.get_args(annotation)[0])
    elif origin in (Union, types.UnionType):
        for member in typing.get_args(annotation):
            yield from _direct(member)
    elif isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel):
        yield annotation


def _containers(annotation: Any) -> Iterator[tuple[type, Any]]:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        yield from _containers(arguments[0])
    elif origin in (Union, types.UnionType):
        for member in arguments:
            yield from _containers(member)
    elif origin is dict:
        yield dict, arguments[1]
    elif origin in (list, tuple):
        yield list, arguments[0]


def tag_of(model: Model) -> str:
    """The value of `type` that chooses this class."""
    return str(typing.get_args(model.model_fields["type"].annotation)[0])


def _declared_in(model: Model, name: str) -> Model | None:
    """The class that declares a field as this one has it."""
    return next((c for c in model.__mro__ if name in inspect.get_annotations(c)), None)


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


# --- Types and defaults ----------------------------------------------------------------------------------------------


def kind_of(field: FieldInfo) -> str:
    """What a value is, with its range: "integer > 0"."""
    return _within(_kind(field.annotation), field.metadata)


def _within(kind: str, metadata: Iterable[Any]) -> str:
    bounds = ", ".join(_bounds(list(metadata)))
    return f"{kind} {bounds}" if bounds else kind


def _bounds(metadata: list[Any]) -> Iterator[str]:
    for sign, name in ((">", "gt"), ("≥", "ge"), ("<", "lt"), ("≤", "le")):
        limits = [getattr(one, name) for one in metadata if getattr(one, name, None) is not None]
        if limits:
            yield f"{sign} {limits[-1]}"
    yield from (f"a multiple of {one.multiple_of}" for one in metadata if getattr(one, "multiple_of", None))


_KINDS = {int: "integer", float: "number", bool: "true or false", str: "text", Path: "path", Any: "anything"}


def _kind(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation in _KINDS:
        return _KINDS[annotation]
    if annotation is type(None):
        return "`null`"
    if origin is Annotated:
        return _within(_kind(arguments[0]), arguments[1:])
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_kind(member) for member in arguments))
    if origin in (list, tuple):
        if Ellipsis not in arguments and len(arguments) > 1:
            return f"list of {len(arguments)}: {', '.join(dict.fromkeys(_kind(member) for member in arguments))}"
        return f"list of: {_kind(arguments[0])}"
    if origin is dict:
        return f"names with: {_kind(arguments[1])}"
    if isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel):
        return "keys"
    return getattr(annotation, "__name__", str(annotation)).lower()


def default_of(field: FieldInfo) -> str:
    """The default as it is written in YAML; empty where there is none."""
    if field.is_required():
        return ""
    value = field.get_default(call_default_factory=True, validated_data={})
    if isinstance(value, pydantic.BaseModel):
        return f"{{type: {tag_of(type(value))}}}" if "type" in type(value).model_fields else "below"
    if isinstance(value, tuple) and value and all(isinstance(one, pydantic.BaseModel) for one in value):
        return f"[{', '.join(default_of(FieldInfo(default=one)) for one in value)}]"
    return _yaml(value)


def _yaml(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, tuple | list):
        return f"[{', '.join(_yaml(one) for one in value)}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_yaml(one)}" for key, one in value.items()) + "}"
    if isinstance(value, str):
        return value if value and re.fullmatch(r"[^\s:,\[\]{}#]+", value) else f"'{value}'"
    return str(value)


# --- Meanings --------------------------------------------------------------------------------------------------------


def meaning_of(model: Model, name: str) -> str:
    """What the source says of a field, the class itself before what it inherits; empty where nothing is said."""
    field = model.model_fields[name]
    owners = [owner for owner in model.__mro__ if issubclass(owner, pydantic.BaseModel) and name in owner.model_fields]
    found = [
        *(PLAIN.get(f"{owner.__name__}.{name}", "") for owner in owners),
        PLAIN[name] if name in ("type", "target") else "",
        *(_comments(owner).get(name, "") for owner in owners),
        _sentence(field.description or ""),
        *(_docstring(owner)[1].get(name, "") for owner in owners),
        PLAIN.get(name, ""),
        *(_mention(owner, name) for owner in owners),
    ]
    meaning = next((text for text in found if text), "")
    inside = list(models_at("", field.annotation))
    if inside and (len(inside[0][1]) > 1 or not meaning):
        paragraphs = _docstring(inside[0][1][0])[0] if len(inside[0][1]) == 1 else ()
        meaning = _sentences(paragraphs[0])[0] if paragraphs else "Its keys stand below."
    return re.sub(r"\bNone\b", "`null`", meaning) if "`None`" not in meaning else meaning


@cache
def _comments(model: Model) -> dict[str, str]:
    """Field -> the comment on its lines, else the comment lines right above it."""
    try:
        lines, _ = inspect.getsourcelines(model)
    except (OSError, TypeError):
        return {}
    source = inspect.cleandoc("".join(lines)) if lines[0].startswith(" ") else "".join(lines)
    comments = {
        token.start[0]: (token.string.lstrip("# ").strip(), token.line.lstrip().startswith("#"))
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT and "type: ignore" not in token.string
    }
    found = {}
    [definition] = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
    for node in definition.body:
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
            continue
        behind = [comments[at][0] for at in range(node.lineno, (node.end_lineno or 0) + 1) if at in comments]
        above: list[str] = []
        line = node.lineno - 1
        while line in comments and comments[line][1]:
            above.insert(0, comments[line][0])
            line -= 1
        if behind or above:
            values = re.findall(r"'([^']*)'", ast.unparse(node.annotation))
            found[node.target.id] = _sentence(" ".join(behind or above), values)
    return found


@cache
def _docstring(model: Model) -> tuple[tuple[str, ...], dict[str, str]]:
    """The paragraphs of a class's own docstring, and apart what begins with the name of a field: "`order`: ..."."""
    text = inspect.cleandoc(model.__dict__.get("__doc__") or "")
    paragraphs, said = [], {}
    for paragraph in re.split(r"\n\s*\n", text):
        rest: list[str] = []
        current = None
        for sentence in _sentences(paragraph):
            begins = re.match(r"`(\w+)`(:| )", sentence)
            if begins and begins[1] in model.model_fields:
                current = begins[1]
                said[current] = sentence.removeprefix(f"`{current}`: ")
            elif current is not None:
                said[current] += f" {sentence}"
            else:
                rest.append(sentence)
        if rest:
            paragraphs.append(" ".join(rest))
    return tuple(paragraphs), {name: _sentence(text) for name, text in said.items()}


def _mention(model: Model, name: str) -> str:
    """The sentence of the docstring that speaks of a field."""
    for paragraph in _docstring(model)[0]:
        for sentence in _sentences(paragraph):
            if f"`{name}`" in sentence or f"`{name}=" in sentence:
                return sentence
    return ""


def _sentences(paragraph: str) -> list[str]:
    return re.split(r"(?<=[.!?])\s+(?=[A-Z`])", " ".join(paragraph.split())) if paragraph.strip() else []


def _sentence(text: str, values: Sequence[str] = ()) -> str:
    """The text with a capital and a full stop. One of `values` that it begins with, as in "skip: ...", is code."""
    text = text.strip()
    if not text:
        return ""
    first, colon, rest = text.partition(":")
    text = f"`{first}`:{rest}" if colon and first in values else text[0].upper() + text[1:]
    return text if text.endswith(".") else f"{text}."


# --- To Markdown -----------------------------------------------------------------------------------------------------


def page(model: Model, level: int = 1) -> str:
    """All sections of a schema as the body of a page, or of what stands under a heading of this level."""
    return "\n".join(line for section in sections(model, level=level) for line in _markdown(section))


def _markdown(section: Section) -> Iterator[str]:
    if section.path:
        name = f"{section.path}.type={section.variant}" if section.variant else section.path
        yield f"\n{'#' * section.level} `{name}`\n"
    for paragraph in section.text:
        yield f"{_escaped(paragraph)}\n"
    if not section.keys:
        return
    yield "| key | value | default | meaning |"
    yield "|---|---|---|---|"
    for key in section.keys:
        default = f"`{key.default}`" if key.default not in ("", "below") else key.default or "**required**"
        mark = "" if key.is_identity else " ‡"
        cells = (f"`{key.path}`{mark}", _escaped(key.kind), default, _escaped(key.meaning))
        yield f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |"
    yield ""


def _escaped(text: str) -> str:
    """Text whose code is marked by backticks, with nothing else that Markdown would read."""
    parts = text.split("`")
    for number in range(0, len(parts), 2):
        parts[number] = re.sub(r"([*_\[\]])", r"\\\1", parts[number]).replace("<", "&lt;")
    return "`".join(parts)


def packaged_configs() -> str:
    """Every file of `configs/`, by group, as the body of a page."""
    folder = default_config_folder()
    files = [*sorted(folder.glob("*.yaml")), *sorted(folder.glob("*/*.yaml"))]
    lines = []
    for file in files:
        name = file.relative_to(folder).with_suffix("").as_posix()
        group, _, option = name.rpartition("/")
        lines.append(f"\n## `{group}={option}`\n" if group else f"\n## `{option}`\n")
        lines.append(f"```yaml\n{file.read_text().strip()}\n```")
    return "\n".join(lines)
