"""Language encoders: token ids and mask -> token states, CLS first. Each comes with its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from vlm.config import CustomConfig, RunReference
from vlm.models.adaptation import EncoderConfig

if TYPE_CHECKING:
    from torch import nn

    from vlm.models.language.tokenizer import Tokenizer


class TinyLanguageConfig(EncoderConfig):
    """Our own small text encoder (`tiny.py`), over whole words of the data's unpaired texts."""

    type: Literal["tiny"] = "tiny"
    width: PositiveInt = 128
    depth: PositiveInt = 2
    num_heads: PositiveInt = 4
    vocabulary_size: PositiveInt = 256
    max_tokens: PositiveInt = 32
    weights: RunReference | None = None  # a run folder whose language encoder and tokenizer are taken

    def build(self) -> nn.Module:
        from vlm.models.language.tiny import TinyLanguage

        return TinyLanguage(self.width, self.depth, self.num_heads, self.vocabulary_size, self.max_tokens)

    def build_tokenizer(self, texts: Path) -> Tokenizer:
        """The tokenizer of `weights`, else whole words counted over `texts` (a file, one text a line)."""
        from vlm.models.language.tokenizer import Tokenizer

        if self.weights is not None:
            return Tokenizer.from_file(self.weights / "tokenizer.json", self.max_tokens)
        return Tokenizer.from_words(texts, self.vocabulary_size, self.max_tokens)


class TransformersLanguageConfig(EncoderConfig):
    """Any transformers encoder (`transformers.py`). `weights`: a folder, a run folder, or `package:IMPORT_NAME`.

    `tokenizer`: the model's own, or `words` for an encoder that starts from nothing: the whole words of the data's
    unpaired texts, in a vocabulary of the model's size, so that no shape differs.
    """

    type: Literal["transformers"] = "transformers"
    name: str = "roberta-base"
    pretrained: bool = True
    weights: RunReference | None = None
    max_tokens: PositiveInt = 50  # METER's length, arXiv 2111.02387, appendix
    tokenizer: Literal["published", "words"] = "published"

    @model_validator(mode="after")
    def _ids_mean_what_they_meant(self) -> TransformersLanguageConfig:
        if self.tokenizer == "words" and self.pretrained:
            raise ValueError("tokenizer=words is for an encoder that starts from nothing. Give pretrained=false too")
        return self

    def build(self) -> nn.Module:
        from vlm.models.language.transformers import TransformersLanguage

        return TransformersLanguage(self.name, self.pretrained, self.weights)

    def build_tokenizer(self, texts: Path) -> Tokenizer:
        from vlm.models.language.tokenizer import Tokenizer
        from vlm.models.language.transformers import load_tokenizer, vocabulary_of

        if self.tokenizer == "words":
            size, pad_id = vocabulary_of(self.name, self.weights)
            return Tokenizer.from_words(texts, size, self.max_tokens, fill=True, pad_id=pad_id)
        return Tokenizer(load_tokenizer(self.name, self.weights), self.max_tokens)


class OpenClipLanguageConfig(EncoderConfig):
    """The text tower of a CLIP model of open_clip (`open_clip.py`): ARCHITECTURE/TAG.

    Without a tag, `weights` names a file (`.safetensors`, `.pt`) or a run folder, or `pretrained=false` builds random
    weights. `tokenizer`: as for `transformers`.
    """

    type: Literal["open_clip"] = "open_clip"
    name: str = "ViT-B-32/openai"
    pretrained: bool = True
    weights: RunReference | None = None
    max_tokens: PositiveInt = 50  # at most one more than the tower reads: 77 in CLIP, 64 in SigLIP
    tokenizer: Literal["published", "words"] = "published"

    @model_validator(mode="after")
    def _ids_mean_what_they_meant(self) -> OpenClipLanguageConfig:
        if self.tokenizer == "words" and self.pretrained:
            raise ValueError("tokenizer=words is for an encoder that starts from nothing. Give pretrained=false too")
        return self

    def build(self) -> nn.Module:
        from vlm.models.language.open_clip import OpenClipLanguage

        return OpenClipLanguage(self.name, self.pretrained, self.weights, self.max_tokens)

    def build_tokenizer(self, texts: Path) -> Tokenizer:
        from vlm.models.language.open_clip import load_tokenizer, vocabulary_size
        from vlm.models.language.tokenizer import Tokenizer

        if self.tokenizer == "words":
            return Tokenizer.from_words(texts, vocabulary_size(self.name), self.max_tokens, fill=True)
        return Tokenizer(load_tokenizer(self.name), self.max_tokens)


class CustomLanguageConfig(CustomConfig, EncoderConfig):
    """A class from outside. `build_tokenizer(texts, max_tokens)` is to be a static method of it."""

    max_tokens: PositiveInt = 50

    def build_tokenizer(self, texts: Path) -> Tokenizer:
        tokenizer: Tokenizer = self.load().build_tokenizer(texts, self.max_tokens)
        return tokenizer


LanguageConfig = Annotated[
    TinyLanguageConfig | TransformersLanguageConfig | OpenClipLanguageConfig | CustomLanguageConfig,
    Field(discriminator="type"),
]
