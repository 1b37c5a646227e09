"""Models of the open_clip library, of which each encoder takes one tower."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vlm.config import did_you_mean
from vlm.errors import UserError


def library() -> Any:
    """The module open_clip, which is an extra."""
    try:
        import open_clip
    except ImportError:
        raise UserError("open_clip is not installed: pip install 'vlm-less-supervision[clip]'") from None
    return open_clip


def split_name(name: str) -> tuple[str, str]:
    """`ARCHITECTURE/TAG` or `ARCHITECTURE`, both known to the library."""
    open_clip = library()
    architecture, _, tag = name.partition("/")
    known = open_clip.list_models()
    if architecture not in known:
        raise UserError(f"open_clip has no model {architecture!r}. {did_you_mean(architecture, known)}")
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if tag and tag not in tags:
        raise UserError(f"open_clip has no weights {tag!r} of {architecture}. {did_you_mean(tag, tags)}")
    return architecture, tag


def model_config(name: str) -> dict[str, Any]:
    """What the library knows of an architecture: its `vision_cfg`, `text_cfg` and so on."""
    config: dict[str, Any] = library().get_model_config(split_name(name)[0])
    return config


def published_images(name: str) -> dict[str, Any]:
    """`mean`, `std` and `interpolation` of the images that the tag's weights saw; OpenAI's where it does not say."""
    from open_clip.pretrained import get_pretrained_cfg

    open_clip = library()
    said = get_pretrained_cfg(*split_name(name))
    defaults = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD, "interpolation": "bicubic"}
    return {key: said.get(key) or default for key, default in defaults.items()}


def create(
    name: str, pretrained: bool, weights: Path | str | None, part: str, image_pixels: int | None = None
) -> tuple[Any, Any]:
    """The vision and the text tower, the latter always a module of its own. `part` is named in errors.

    The tag decides the activation even of random weights: OpenAI's and some others were trained with QuickGELU, which
    the library leaves to who calls it.
    """
    open_clip = library()
    from open_clip.pretrained import download_pretrained, get_pretrained_cfg

    architecture, tag = split_name(name)
    if pretrained and weights is None and not tag:
        tags = open_clip.list_pretrained_tags_by_model(architecture)
        raise UserError(
            f"model.{part}.name={name}: give ARCHITECTURE/TAG, with one of: {', '.join(tags) or 'none is published'}; "
            f"or model.{part}.weights=FILE, or model.{part}.pretrained=false for random weights"
        )
    if pretrained and weights is not None and not Path(weights).is_file():
        raise UserError(f"{weights}: no such weights file (.safetensors or .pt)")
    published = get_pretrained_cfg(architecture, tag)
    config = model_config(name)
    config["quick_gelu"] = config.get("quick_gelu", False) or bool(published.get("quick_gelu"))
    config["vision_cfg"] |= {"image_size": image_pixels} if image_pixels else {}
    config["text_cfg"] |= {"hf_model_pretrained": False} if "hf_model_name" in config["text_cfg"] else {}
    config.pop("custom_text", None)
    kind = open_clip.CoCa if "multimodal_cfg" in config else open_clip.CustomTextCLIP
    try:
        with _quiet():
            model = kind(**config)
            if pretrained:
                file = download_pretrained(published) if weights is None else str(weights)
                open_clip.load_checkpoint(model, file, strict=True, weights_only=True)
            if image_pixels and hasattr(model.visual, "set_input_size"):  # timm's towers are resampled afterwards
                model.visual.set_input_size(image_pixels)
    except Exception as error:  # the hub client, its transport, unpickling and open_clip each raise their own
        reason = " ".join(str(error).split())[:300]
        if weights is not None and pretrained:
            raise UserError(f"{weights}: not the weights of {name!r} ({type(error).__name__}: {reason})") from None
        remedy = (
            "Without network: download the weights elsewhere and set "
            f"model.{part}.weights=FILE, or set model.{part}.pretrained=false for random weights"
        )
        raise UserError(f"open_clip:{name} could not be made ({type(error).__name__}: {reason}). {remedy}") from None
    return model.visual, model.text


@contextmanager
def _quiet() -> Iterator[None]:
    """The library reports through the root logger, and so gives it a handler that doubles everybody's messages."""
    handlers = list(logging.root.handlers)
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
        logging.root.handlers[:] = handlers
