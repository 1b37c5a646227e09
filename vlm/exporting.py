"""From a run to the folder that `vlm export` writes (`exports.py` says what is in it)."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_loaders import WorldData
from vlm.bookkeeping import ledger_of_run, prepared_root
from vlm.config import Config, dump_yaml, fingerprint
from vlm.errors import UserError
from vlm.exports import (
    ANSWERS,
    ARCHITECTURES,
    CARD,
    SCORES,
    TRANSFORM,
    WEIGHTS,
    FileEntry,
    Manifest,
    TransformConfig,
    open_export,
    written_by,
)
from vlm.hub import LoadedModel, load, place_of
from vlm.model_card import model_card
from vlm.run import CONFIG, EXPORT, RESULT, TOKENIZER, RunConfig, read_checkpoint
from vlm.sharing import share
from vlm.supervision.ledger import LEDGER
from vlm.weights import untied


def export(run: str | Path, folder: str | Path, trust_code: bool = False, revision: str | None = None) -> Path:
    """Write a run, or what else `vlm.load` takes, as one folder that describes itself and holds nothing to execute.

    The folder is there whole or not at all. An earlier export in its place is replaced, anything else is an error.
    """
    from safetensors.torch import save_file

    model = load(run, trust_code, revision)
    source, name = place_of(run, revision)
    with _whole_folder(Path(folder)) as partial:
        states = untied(read_checkpoint(source, name)["state_dict"])
        save_file(states, partial / WEIGHTS, metadata={"format": "pt"})
        share(partial / WEIGHTS)
        config = portable(model.config)
        _write(partial / CONFIG, dump_yaml(config))
        _write(partial / TOKENIZER, model.tokenizer.backend.to_str(pretty=True))
        _write(partial / TRANSFORM, _transform_of(model).model_dump_json(indent=1))
        if model.answers:
            _write(partial / ANSWERS, json.dumps(model.answers, ensure_ascii=False, indent=0))
        for encoder, file in ARCHITECTURES.items():
            architecture = getattr(getattr(getattr(model.model, encoder), "model", None), "config", None)
            if hasattr(architecture, "to_json_string"):  # of transformers
                (partial / file).parent.mkdir()
                _write(partial / file, _plain_architecture(architecture))
        scores, ledger = scores_of(source), ledger_of_run(source)
        _write(partial / SCORES, json.dumps(scores, indent=1))
        _write(partial / LEDGER, ledger.text())
        size = sum(tensor.numel() for tensor in states.values())
        card = model_card(model.config, scores, ledger, len(model.answers), size, _data_licences(model.config))
        _write(partial / CARD, card)
        files = sorted(path for path in partial.rglob("*") if path.is_file() and path.name != CARD)
        manifest = Manifest(
            written_by=written_by(),
            name=config.name,
            fingerprint=fingerprint(model.config),
            files={path.relative_to(partial).as_posix(): _entry(path) for path in files},
        )
        _write(partial / EXPORT, manifest.model_dump_json(indent=1))
        open_export(partial)
    return Path(folder)


def export_encoders(model: LoadedModel, folder: Path) -> list[Path]:
    """Each encoder alone, in the folders `timm` and `transformers` inside `folder`, for these libraries."""
    written = []
    for encoder, name in ((model.vision, "timm"), (model.language, "transformers")):
        with _whole_folder(folder / name, is_ours=lambda path: (path / "config.json").is_file()) as partial:
            encoder.save_pretrained(partial)
        written.append(folder / name)
    return written


def scores_of(source: Path) -> dict[str, Any]:
    """What a run scored: at its end, and in each evaluation of its own that was made since."""
    if (source / SCORES).is_file():  # an export
        told: dict[str, Any] = json.loads((source / SCORES).read_text(encoding="utf-8"))
        return told
    result = json.loads((source / RESULT).read_text()) if (source / RESULT).is_file() else {}
    kept = ("scores", "metrics", "steps", "samples", "examples", "seconds")
    scores: dict[str, Any] = {name: result[name] for name in kept if result.get(name) is not None}
    for file in sorted(source.glob("scores-*.json")):
        told = json.loads(file.read_text())
        scores.setdefault("evaluations", {})[file.stem.removeprefix("scores-")] = told.get("scores", {})
    return scores


def _data_licences(config: RunConfig) -> dict[str, str]:
    """What the manifests of the data root say, if it is still there."""
    if isinstance(config.data, WorldData):
        return {"procedural world": "drawn by this software"}
    root = prepared_root(config)
    if root is None:
        return {}
    part = config.task.type if config.task is not None else {"images": "unimodal"}.get(config.data.part, "pairs")
    found: dict[str, str] = {}
    for file in (root / part / "manifest.json", root / "emoji.json"):
        if file.is_file():
            told = json.loads(file.read_text(encoding="utf-8"))
            found |= {
                str(name): str(text) for name, text in (told.get("licences") or told.get("licenses") or {}).items()
            }
    return found


def portable(config: RunConfig) -> RunConfig:
    """The config without the folders of one machine: of absolute paths the last part."""
    moved: RunConfig = _portable(config.model_copy(update={"folder": None}))
    return moved


def _portable(value: Any) -> Any:
    if isinstance(value, Config):
        changed = {name: _portable(getattr(value, name)) for name in type(value).model_fields}
        return value.model_copy(update={name: new for name, new in changed.items() if new is not getattr(value, name)})
    if isinstance(value, Path):
        return Path(value.name) if value.is_absolute() else value
    if isinstance(value, dict):
        return {key: _portable(inner) for key, inner in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(map(_portable, value))
    return value


def _transform_of(model: LoadedModel) -> TransformConfig:
    transform = model.transform
    mean, std = (getattr(model.model, name).flatten().double() / 255 for name in ("pixel_mean", "pixel_std"))
    return TransformConfig(
        image_pixels=transform.image_pixels,
        interpolation="bilinear" if transform.interpolation == "bilinear" else "bicubic",
        decode=transform.decode,
        mean=tuple(round(value, 6) for value in mean.tolist()),
        std=tuple(round(value, 6) for value in std.tolist()),
    )


def _plain_architecture(config: Any) -> str:
    """A transformers config without what names a place, or code."""
    content = config.to_dict()
    for key in ("_name_or_path", "auto_map", "quantization_config"):
        content.pop(key, None)
    return json.dumps(content, indent=1, default=str)


def _write(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")


def _entry(file: Path) -> FileEntry:
    with file.open("rb") as opened:
        return FileEntry(bytes=file.stat().st_size, sha256=hashlib.file_digest(opened, "sha256").hexdigest())


@contextmanager
def _whole_folder(
    folder: Path, is_ours: Callable[[Path], bool] = lambda path: (path / EXPORT).is_file()
) -> Iterator[Path]:
    """A folder to write into that takes its place once it is whole. One that another export left is replaced."""
    is_empty = folder.is_dir() and not any(folder.iterdir())
    if folder.exists() and not is_empty and not (folder.is_dir() and is_ours(folder)):
        raise UserError(f"{folder}: holds something else. Choose another folder, or remove it")
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    old = folder.with_name(f".{folder.name}.old-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        yield partial
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror or error})") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
