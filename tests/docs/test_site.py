from __future__ import annotations

import re
import shlex
import subprocess
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pydantic
import pytest

from vlm.config import compose
from vlm.docs import schema
from vlm.docs.conf import OF_VERBS, filled, readme_section
from vlm.run import RunConfig
from vlm.studies.plan import StudyConfig

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "vlm" / "docs"
PAGES = sorted((DOCS / "pages").rglob("*.md"))


def keys_of(annotation: Any, path: str = "") -> Iterator[str]:
    """The dotted path of every field below a type, found without what the pages are made with."""
    arguments = typing.get_args(annotation)
    if isinstance(annotation, types.GenericAlias) and typing.get_origin(annotation) is dict:
        yield from keys_of(arguments[1], f"{path}.NAME")
    elif isinstance(annotation, types.GenericAlias):
        for argument in arguments:
            yield from keys_of(argument, f"{path}[]")
    elif arguments:
        for argument in arguments:
            yield from keys_of(argument, path)
    elif isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel):
        for name, field in annotation.model_fields.items():
            inner = f"{path}.{name}" if path else name
            yield inner
            yield from keys_of(field.annotation, inner)


@pytest.mark.parametrize(("model", "page"), [(RunConfig, "configuration"), (StudyConfig, "study")])
def test_every_key_of_the_schema_is_on_its_page(model: type[pydantic.BaseModel], page: str) -> None:
    text = filled((DOCS / "pages" / f"{page}.md").read_text())
    on_page = set(re.findall(r"^\| `([^`]+)`", text, re.MULTILINE))
    keys = set(keys_of(model))
    assert keys - on_page == set()
    assert on_page - keys == set()
    assert len(keys) > 20


def test_every_key_of_every_verb_is_on_the_page_of_verbs() -> None:
    text = filled((DOCS / "pages" / "verbs.md").read_text())
    parts = re.split(r"^## `([^`]+)`$", text, flags=re.MULTILINE)[1:]
    of_verbs = dict(zip(parts[::2], parts[1::2], strict=True))
    for verb, model in OF_VERBS.items():
        assert set(keys_of(model)) == set(re.findall(r"^\| `([^`]+)`", of_verbs[verb], re.MULTILINE)), verb


@pytest.mark.parametrize("model", [RunConfig, StudyConfig, *OF_VERBS.values()])
def test_every_key_has_a_meaning(model: type[pydantic.BaseModel]) -> None:
    """Where this fails: write a comment behind the field, or name it in the docstring of its class."""
    silent = [key.path for section in schema.sections(model) for key in section.keys if not key.meaning]
    assert silent == []


def test_meanings_and_defaults_are_those_of_the_source() -> None:
    keys = {key.path: key for section in schema.sections(RunConfig) for key in section.keys}
    accumulate = keys["trainer.accumulate"]
    assert (accumulate.kind, accumulate.default) == ("integer > 0", "1")
    assert accumulate.meaning == "Micro-batches of a step on each rank."
    assert keys["trainer.batch_size"].meaning.startswith("`batch_size` counts examples of one optimizer step")
    assert keys["optimizer.betas"].default == "[0.9, 0.98]"
    assert keys["data.root"].default == ""
    assert not keys["trainer.progress"].is_identity
    assert keys["trainer.batch_size"].is_identity


def test_no_meaning_is_kept_for_a_field_that_is_gone() -> None:
    fields = set()
    for model in set().union(*(all_models(one) for one in (RunConfig, StudyConfig, *OF_VERBS.values()))):
        fields |= {name for name in model.model_fields}
        fields |= {f"{base.__name__}.{name}" for base in model.__mro__ for name in model.model_fields}
    assert set(schema.PLAIN) - fields == set()


def all_models(model: type[pydantic.BaseModel]) -> set[type[pydantic.BaseModel]]:
    found = {model}
    for field in model.model_fields.values():
        for _, members in schema.models_at("", field.annotation):
            for member in members:
                found |= all_models(member)
    return found


def test_a_section_of_the_readme_that_is_gone_stops_the_build() -> None:
    with pytest.raises(ValueError, match="has no section 'Nothing'"):
        readme_section("Nothing")


def commands() -> list[tuple[str, list[str]]]:
    found = []
    for file in PAGES:
        text = filled(file.read_text()).replace("\\\n", " ")
        for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
            for line in block.splitlines():
                if re.match(r"(vlm|torchrun .* vlm\.cli) (show|train) (?!runs/|RUN)", line):
                    found.append((file.stem, shlex.split(line, comments=True)))
    return found


@pytest.mark.parametrize(("page", "words"), commands(), ids=lambda value: value if isinstance(value, str) else None)
def test_every_training_on_the_pages_is_a_config_that_validates(page: str, words: list[str]) -> None:
    verb = next(number for number, word in enumerate(words) if word in ("show", "train"))
    name, *overrides = words[verb + 1 :]
    assert compose(name, overrides, RunConfig).run_folder.name


def test_the_site_builds_without_a_warning_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    command = re.search(r"^docs:.*\n\t.*?python (-m sphinx .*) \.site$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert command is not None
    built = subprocess.run(
        [sys.executable, *shlex.split(command[1]), str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert (built.returncode, built.stderr) == (0, "")
    pages = {file: file.read_text() for file in tmp_path.rglob("*.html")}
    assert len(pages) > len(PAGES)
    loaded = r"<(?:script|img|iframe|link)\b[^>]*?(?:src|href)=\"((?:https?:)?//[^\"]+)"
    assert {file.name: re.findall(loaded, text) for file, text in pages.items() if re.search(loaded, text)} == {}
    styles = "".join(file.read_text() for file in tmp_path.rglob("*.css"))
    assert re.findall(r"url\([\"']?(?:https?:)?//|@import", styles) == []
