"""Models that give every label of a vocabulary a score for an image."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import timm
import torch
from jaxtyping import Float
from timm.data.config import resolve_model_data_config
from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset
from timm.data.transforms_factory import create_transform
from torch import Tensor, nn

from vlm.errors import UserError
from vlm.models.vision.timm import PACKAGE, load_package_weights, published_config, read_weights
from vlm.records import OfficialFile, lines

if TYPE_CHECKING:
    from PIL import Image

    from vlm.labelling import Activation

WNID = re.compile(r"n[0-9]{8} ")
TEXTS_AT_A_TIME = 256


class Labeller(Protocol):
    """What labelling needs of a model."""

    labels: tuple[str, ...]
    model: nn.Module
    transform: Callable[[Image.Image], Tensor]  # an RGB picture to the model's input, [3, h, w]

    def scores(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b k"]:
        """The score of each label, in [0, 1]."""
        ...


class TimmLabeller:
    """A timm classifier with its own preprocessing of images."""

    def __init__(
        self, name: str, weights: str | None, activation: Activation, vocabulary: tuple[str, ...] | None
    ) -> None:
        published_config(name)
        self.model: Any = _classifier(name, weights).eval()
        self.labels = vocabulary or _known_classes(self.model, name)
        if len(self.labels) != self.model.num_classes:
            raise UserError(
                f"--vocabulary: {name} has {self.model.num_classes} classes, and the vocabulary "
                f"{len(self.labels)} labels. Name the classes in the order of the model's outputs, one a line"
            )
        self.activation = activation
        self.transform = cast(
            "Callable[[Image.Image], Tensor]", create_transform(**resolve_model_data_config(self.model))
        )

    def scores(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b k"]:
        return _activated(self.model(pixels), self.activation)


class OpenClipLabeller:
    """A CLIP model: how well each label, in the sentences of the templates, goes with the image.

    A label's sentences are encoded once and their directions averaged, as in zero-shot classification
    (Radford et al., arXiv 2103.00020, section 3.1.4). Softmax scores are shares of the whole vocabulary.
    """

    def __init__(
        self,
        name: str,
        weights: Path | None,
        activation: Activation,
        templates: Sequence[str],
        vocabulary: tuple[str, ...] | None,
    ) -> None:
        if vocabulary is None:
            raise UserError(f"--vocabulary: open_clip:{name} can judge any label; give a file with one a line")
        unfit = next((template for template in templates if template.count("{}") != 1), None)
        if unfit is not None:
            raise UserError(f"labeller.templates: {unfit!r} must hold one {{}}, where the label goes")
        self.labels, self.activation = vocabulary, activation
        self.model, self.transform, tokenizer = _open_clip(name, weights)
        self.model.eval()
        with torch.inference_mode():
            self.texts = self._encoded([[t.format(label) for label in vocabulary] for t in templates], tokenizer)

    def scores(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b k"]:
        self.texts = self.texts.to(pixels.device)
        logits = self.model.logit_scale.exp() * self.model.encode_image(pixels, normalize=True) @ self.texts.T
        bias = getattr(self.model, "logit_bias", None)
        return _activated(logits if bias is None else logits + bias, self.activation)

    def _encoded(self, sentences: list[list[str]], tokenizer: Any) -> Float[Tensor, "k d"]:
        """The mean direction of each label's sentences."""
        templates = []
        for texts in sentences:
            parts = [texts[start : start + TEXTS_AT_A_TIME] for start in range(0, len(texts), TEXTS_AT_A_TIME)]
            templates.append(torch.cat([self.model.encode_text(tokenizer(part), normalize=True) for part in parts]))
        return nn.functional.normalize(torch.stack(templates).mean(0), dim=-1)


def read_vocabulary(path: Path) -> tuple[str, ...]:
    """The labels of a file, one a line, in order.

    Of a file of WordNet synsets, such as ImageNet's LOC_synset_mapping.txt, each line's first name counts; names that
    two of its classes share stay twice, for the lines are the classes of a classifier.
    """
    file = OfficialFile.given(path)
    read = list(lines(file))
    texts = [text for _, text in read]
    if not texts:
        raise file.error("holds no label")
    if all(WNID.match(text) for text in texts):
        return tuple(text[len("n00000000 ") :].split(",")[0].strip() for text in texts)
    seen: set[str] = set()
    for place, text in read:
        if text in seen:
            raise file.error(f"{place}: {text!r} stands twice")
        seen.add(text)
    return tuple(texts)


def _activated(logits: Float[Tensor, "b k"], activation: Activation) -> Float[Tensor, "b k"]:
    logits = logits.float()
    return logits.softmax(-1) if activation == "softmax" else logits.sigmoid()


def _classifier(name: str, weights: str | None) -> Any:
    """The timm model with its head."""
    if weights is None:
        try:
            return timm.create_model(name, pretrained=True)
        except Exception as error:  # the hub client, its transport and timm each raise their own
            raise UserError(
                f"the weights of {name!r} could not be fetched ({type(error).__name__}). "
                "Without network: download them elsewhere and give labeller.weights=FILE"
            ) from None
    model: Any = timm.create_model(name)
    if weights.startswith(PACKAGE):
        load_package_weights(model, weights.removeprefix(PACKAGE))
        return model
    try:
        model.load_state_dict(read_weights(Path(weights)))
    except RuntimeError as error:
        raise UserError(f"{weights}: not the weights of {name!r} ({str(error).splitlines()[-1].strip()})") from None
    return model


def _known_classes(model: Any, name: str) -> tuple[str, ...]:
    """The classes of a model that was trained on ImageNet, as timm names them."""
    subset = infer_imagenet_subset(model)
    if subset is None:
        raise UserError(
            f"--vocabulary: timm does not name the {model.num_classes} classes of {name}. Give a file with one a line, "
            "in the order of the model's outputs"
        )
    names = ImageNetInfo(subset)
    return tuple(str(names.index_to_description(number)).split(",")[0] for number in range(model.num_classes))


def _open_clip(name: str, weights: Path | None) -> tuple[Any, Callable[[Image.Image], Tensor], Any]:
    """The model, its preprocessing of images, and its tokenizer."""
    try:
        import open_clip
    except ImportError:
        raise UserError("open_clip is not installed: pip install 'vlm-less-supervision[clip]'") from None
    architecture, _, tag = name.partition("/")
    known = open_clip.list_models()
    if architecture not in known:
        from vlm.config import did_you_mean

        raise UserError(f"open_clip has no model {architecture!r}. {did_you_mean(architecture, known)}")
    if weights is None and tag not in open_clip.list_pretrained_tags_by_model(architecture):
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(architecture))
        raise UserError(
            f"open_clip:{name}: give ARCHITECTURE/PRETRAINED, with one of: {tags}; or labeller.weights=FILE"
        )
    if weights is not None and not weights.is_file():
        raise UserError(f"{weights}: no such weights file")
    try:
        model, _, transform = open_clip.create_model_and_transforms(
            architecture, pretrained=tag if weights is None else str(weights), weights_only=True
        )
    except Exception as error:  # the hub client, its transport, unpickling and open_clip each raise their own
        remedy = "Without network: download them elsewhere and give labeller.weights=FILE" if weights is None else ""
        problem = f"{weights}: cannot be read as its weights" if weights else "the weights could not be fetched"
        raise UserError(f"open_clip:{name}: {problem} ({type(error).__name__}). {remedy}".strip()) from None
    return model, transform, open_clip.get_tokenizer(architecture)
