"""The folder that `vlm export` writes: its names, its version, and how it is read without trusting whoever made it.

    export.json              the format's version, and each file's size and SHA-256 (the card alone may be edited)
    config.yaml              the resolved config of the run; of absolute paths the last part
    model.safetensors        all weights, heads among them, under the names that a checkpoint gives them
    tokenizer.json           of the tokenizers library
    transform.json           how an image becomes pixels
    answers.json             the answers in the order of the head's outputs; of a fine-tuned run alone
    language/config.json     the encoder's architecture as transformers writes it, where it is one of that library's
    scores.json ledger.json  what the run scored, and what its parts have seen
    README.md                the model card

A later version reads every earlier one: `tests/exports` keeps a folder of each.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal

import yaml
from pydantic import Field, PositiveFloat, PositiveInt, ValidationError

from vlm.config import Config, ConfigError, load_yaml
from vlm.errors import UserError
from vlm.models import ModelConfig
from vlm.run import CONFIG, EXPORT, TOKENIZER, RunConfig, without_weights
from vlm.supervision.ledger import LEDGER

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 1
WEIGHTS, TRANSFORM, ANSWERS, SCORES, CARD = (
    "model.safetensors",
    "transform.json",
    "answers.json",
    "scores.json",
    "README.md",
)
ARCHITECTURES = {name: f"{name}/config.json" for name in ("vision", "language")}
NEEDED = (CONFIG, WEIGHTS, TOKENIZER, TRANSFORM)
NAMES = (EXPORT, *NEEDED, ANSWERS, SCORES, LEDGER, CARD, *ARCHITECTURES.values())
"""Every file that an exported folder may hold. Nothing else is read, pushed or pulled."""

MAX_TEXT_BYTES = 64 * 2**20  # of a file that is no weights: a tokenizer of 256,000 words has 33 MB
FOREIGN_CODE = ("auto_map", "trust_remote_code", "_attn_implementation", "attn_implementation", "quantization_config")
"""What in a transformers config would have code fetched or run."""


class TransformConfig(Config):
    """How an image becomes pixels; mean and std are of values in [0, 1]."""

    image_pixels: PositiveInt
    interpolation: Literal["bicubic", "bilinear"]
    decode: Literal["reduced", "exact"]
    mean: tuple[float, float, float]
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat]


class FileEntry(Config):
    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Manifest(Config):
    """What `export.json` holds."""

    format: PositiveInt = FORMAT
    written_by: str  # the distribution and its version
    name: str
    fingerprint: str
    files: dict[str, FileEntry]


@dataclass(frozen=True)
class Export:
    """An exported folder whose files are known to lie inside it and to have the sizes that they were written with."""

    folder: Path
    manifest: Manifest

    @cached_property
    def config(self) -> RunConfig:
        """The run's config as it was resolved."""
        _refuse_aliases(self.folder, CONFIG)
        try:
            return load_yaml(self.folder / CONFIG, RunConfig)
        except ConfigError as error:
            raise UserError(
                f"{error}. The folder was written by {self.manifest.written_by}, this is {written_by()}; "
                "where that one is newer, upgrade: pip install -U vlm-less-supervision"
            ) from None

    @property
    def model(self) -> ModelConfig:
        """The model to build: shapes alone, with architectures from this folder and nothing from elsewhere."""
        model = without_weights(self.config.model)
        changed = {}
        for name, file in ARCHITECTURES.items():
            encoder = getattr(model, name)
            if "weights" not in type(encoder).model_fields:
                continue
            is_here = file in self.manifest.files
            if is_here:
                self._refuse_foreign_code(file)
            elif encoder.type == "transformers":
                raise UserError(f"{self.folder}: {file} is missing, which says how the {name} encoder is built")
            changed[name] = encoder.model_copy(update={"weights": (self.folder / file).parent if is_here else None})
        return model.model_copy(update=changed)

    @property
    def transform(self) -> TransformConfig:
        """How images become pixels."""
        transform: TransformConfig = _validated(TransformConfig, self.folder, TRANSFORM)
        return transform

    def answers(self) -> tuple[str, ...]:
        """The answers of the head; none where the run has no such head."""
        if ANSWERS not in self.manifest.files:
            return ()
        answers = _read_json(self.folder, ANSWERS)
        if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
            raise UserError(f"{self.folder / ANSWERS}: must be a list of texts")
        return tuple(answers)

    def states(self) -> dict[str, Tensor]:
        """The weights by name, mapped into memory."""
        from vlm.weights import read_tensors

        return read_tensors(self.folder / WEIGHTS)

    def _refuse_foreign_code(self, name: str) -> None:
        content = _read_json(self.folder, name)
        found = next((key for key in FOREIGN_CODE if _has(content, key)), None)
        if found is not None:
            raise UserError(
                f"{self.folder / name}: {found!r} would have code from elsewhere run. Do not use this folder"
            )


def open_export(folder: Path) -> Export:
    """The exported folder, or one line on what is wrong with it. Its weights are not yet looked at."""
    file = folder / EXPORT
    content = _read_json(folder, EXPORT)
    version = content.get("format") if isinstance(content, dict) else None
    if type(version) is not int or version < 1:
        raise UserError(f"{file}: says no format version. Is this a folder that `vlm export` wrote?")
    if version > FORMAT:
        by = str(content.get("written_by", "a later version"))[:80]
        raise UserError(
            f"{file}: format {version}, written by {by}; {written_by()} reads up to {FORMAT}. "
            "Upgrade: pip install -U vlm-less-supervision"
        )
    manifest: Manifest = _validated(Manifest, folder, EXPORT)
    for name, entry in manifest.files.items():
        path = inside(folder, name)
        if name not in NAMES:
            raise UserError(f"{file}: {name!r} is no file of an export. Do not use this folder")
        if not path.is_file():
            raise UserError(f"{path}: no such file, though {EXPORT} lists it. Copy the whole folder again")
        size = path.stat().st_size
        if size != entry.bytes:
            raise UserError(f"{path}: has {size:,} bytes, and had {entry.bytes:,} when it was exported. Copy it again")
    lacking = next((name for name in NEEDED if name not in manifest.files), None)
    if lacking is not None:
        raise UserError(f"{file}: lists no {lacking}, without which there is no model")
    return Export(folder, manifest)


def inside(folder: Path, name: str) -> Path:
    """The path of a file of the folder. A name or link that leads out of it is refused.

    The hub's cache keeps each file once and links to it: there "inside" is the repository's own folder.
    """
    pure = PurePosixPath(name)
    root = folder.resolve()
    if root.parent.name == "snapshots":
        root = root.parents[1]
    path = folder / name
    if pure.is_absolute() or ".." in pure.parts or "\\" in name or not path.resolve().is_relative_to(root):
        raise UserError(f"{folder}: {name!r} leads out of the folder. Do not use it")
    return path


def written_by() -> str:
    """The distribution and its version."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return f"vlm-less-supervision {version('vlm-less-supervision')}"
    except PackageNotFoundError:
        return "vlm-less-supervision, not installed"


def _read_json(folder: Path, name: str) -> Any:
    try:
        return json.loads(_read_text(folder, name))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{folder / name}: not valid JSON ({error}). Copy it again") from None


def _read_text(folder: Path, name: str) -> str:
    path = inside(folder, name)
    try:
        if path.stat().st_size > MAX_TEXT_BYTES:
            raise UserError(f"{path}: over {MAX_TEXT_BYTES:,} bytes, which no such file has")
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def _refuse_aliases(folder: Path, name: str) -> None:
    """A few lines of YAML aliases can stand for gigabytes; what we write has none."""
    try:
        has_alias = any(isinstance(one, yaml.AliasToken) for one in yaml.scan(_read_text(folder, name)))
    except yaml.YAMLError as error:
        raise UserError(f"{folder / name}: not valid YAML ({str(error).splitlines()[0]})") from None
    if has_alias:
        raise UserError(f"{folder / name}: holds a YAML alias (*name), which no export has. Do not use this folder")


def _validated(schema: type[Config], folder: Path, name: str) -> Any:
    try:
        return schema.model_validate_json(_read_text(folder, name), strict=True)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = ".".join(map(str, problem["loc"])) or "the file"
        raise UserError(f"{folder / name}: {where}: {problem['msg']}") from None


def _has(content: Any, key: str) -> bool:
    """Whether `key` stands anywhere in a JSON value with anything under it."""
    if isinstance(content, Mapping):
        return bool(content.get(key)) or any(_has(value, key) for value in content.values())
    return isinstance(content, list) and any(_has(value, key) for value in content)
