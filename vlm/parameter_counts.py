"""Parameter counts without the seconds that torch takes to import: each model is counted once and remembered."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import itertools
import json
from pathlib import Path
from typing import Any, TypeVar

from data_loaders.cache import cache_folder
from vlm.config import Config, CustomConfig, fingerprint
from vlm.run import RunConfig, count_parameters, write_atomically

F = TypeVar("F", bound=Config)

COUNTED_BY = ("torch", "timm", "transformers", "open_clip_torch")


def parameter_counts(config: RunConfig) -> dict[str, int]:
    """As `count_parameters` counts them. What may change under the same name, such as outside code, is counted anew."""
    model = config.model
    parts: list[Any] = [model.vision, model.language, model.fusion]
    names = [getattr(part, "name", None) for part in parts]
    if any(isinstance(part, CustomConfig) for part in parts) or any(name and Path(name).exists() for name in names):
        return count_parameters(config)
    file = cache_folder() / "parameters" / f"{fingerprint(model)}-{code_of_models()}.json"
    with contextlib.suppress(OSError, ValueError):
        told = json.loads(file.read_text())
        if isinstance(told, dict) and all(type(count) is int for count in told.values()):
            return told
    counts = count_parameters(config)
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(counts))
    return counts


def fusion_parameters(config: Any) -> int:
    """Parameters of a fusion alone."""
    import torch

    with torch.device("meta"):
        return sum(parameter.numel() for parameter in config.build().parameters())


def as_large_as(config: F, reference: Any) -> F:
    """The fusion `config` at the depth that brings its parameters nearest to the reference's."""
    wanted, near = fusion_parameters(reference), list[F]()
    for depth in itertools.count(1):
        try:
            near.append(type(config).model_validate(config.model_dump() | {"depth": depth}))
        except ValueError:
            if "depth" not in type(config).model_fields:
                raise
            continue  # a depth that this fusion does not know
        if fusion_parameters(near[-1]) >= wanted:
            break
    return min(near, key=lambda one: abs(fusion_parameters(one) - wanted))


def code_of_models() -> str:
    """8 hex digits that change with the libraries and with the code of the models."""
    marks = []
    for name in COUNTED_BY:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            marks.append(f"{name} {importlib.metadata.version(name)}")
    for source in sorted((Path(__file__).parent / "models").rglob("*.py")):
        stat = source.stat()
        marks.append(f"{source.name} {stat.st_size} {stat.st_mtime_ns}")
    return hashlib.sha256("\n".join(marks).encode()).hexdigest()[:8]
