"""Texts to padded token ids, by the `tokenizers` library: one class for whole words and for pretrained models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import tokenizers
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from vlm.errors import UserError

PAD, CLS, SEP, MASK, UNKNOWN = "[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]"
SPELLINGS = {  # how BERT, RoBERTa, CLIP and Gemma write the same tokens
    PAD: (PAD, "<pad>"),
    CLS: (CLS, "<s>"),
    SEP: (SEP, "</s>", "<end_of_text>", "<eos>"),
    MASK: (MASK, "<mask>"),
}


class Tokenizer:
    """A fast tokenizer with the special tokens of a masked language model.

    Every text becomes `CLS words SEP`, cut to `max_tokens` and padded to the longest of its batch.
    """

    def __init__(self, backend: tokenizers.Tokenizer, max_tokens: int) -> None:
        self.backend = backend
        self.max_tokens = max_tokens
        self.pad_id, self.cls_id, self.sep_id, self.mask_id = (
            self._special_id(token) for token in (PAD, CLS, SEP, MASK)
        )
        self.vocabulary_size = backend.get_vocab_size()
        backend.enable_truncation(max_tokens)
        backend.enable_padding(pad_id=self.pad_id, pad_token=backend.id_to_token(self.pad_id))

    @classmethod
    def from_words(
        cls, texts: Path, vocabulary_size: int, max_tokens: int, fill: bool = False, pad_id: int = 0
    ) -> Tokenizer:
        """Whole lower-case words, the most frequent first; words out of the vocabulary become `[UNK]`.

        `fill`: where there are fewer words, tokens that never occur make it `vocabulary_size`, as in BERT's vocabulary.
        `pad_id`: below 5, where a model treats one id as padding (RoBERTa: 1).
        """
        from tokenizers import models, normalizers, pre_tokenizers, processors, trainers

        if not texts.is_file():
            raise UserError(
                f"{texts}: no such file. The tiny language encoder takes its words from texts/train.txt of the data "
                "root: unpaired texts, one a line, which no preparer of images writes. Put texts there that belong to "
                "none of the images (their captions would be supervision that no ledger counts), or use a language "
                "encoder that brings its words along (model=base)"
            )
        backend = tokenizers.Tokenizer(models.WordLevel(unk_token=UNKNOWN))
        backend.normalizer = normalizers.BertNormalizer()
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        special = [CLS, SEP, MASK, UNKNOWN]
        special.insert(pad_id, PAD)
        trainer = trainers.WordLevelTrainer(vocab_size=vocabulary_size, special_tokens=special, show_progress=False)
        backend.train([str(texts)], trainer)
        if fill:
            words = backend.get_vocab()
            words |= {f"[unused{number}]": number for number in range(len(words), vocabulary_size)}
            backend.model = models.WordLevel(words, unk_token=UNKNOWN)
        backend.post_processor = processors.BertProcessing((SEP, special.index(SEP)), (CLS, special.index(CLS)))
        return cls(backend, max_tokens)

    @classmethod
    def from_file(cls, file: Path, max_tokens: int) -> Tokenizer:
        """Read `tokenizer.json` as `save` or the transformers library wrote it."""
        try:
            text = file.read_text()
        except OSError:
            raise UserError(f"{file}: no such tokenizer file. Is this the folder of a finished run?") from None
        try:
            return cls(tokenizers.Tokenizer.from_str(text), max_tokens)
        except Exception as error:  # the library raises nothing narrower
            raise UserError(f"{file}: not a tokenizer ({error})") from None

    def plain(self) -> tokenizers.Tokenizer:
        """A copy of the library's own tokenizer, which neither cuts nor pads."""
        backend = tokenizers.Tokenizer.from_str(self.backend.to_str())
        backend.no_truncation()
        backend.no_padding()
        return backend

    def special_ids(self) -> dict[str, int]:
        """The ids of the special tokens, by the names that the transformers library has for them."""
        return {"pad": self.pad_id, "cls": self.cls_id, "sep": self.sep_id, "mask": self.mask_id}

    def save(self, file: Path) -> None:
        file.write_text(self.backend.to_str(pretty=True))

    def __call__(self, texts: Sequence[str]) -> tuple[Int[Tensor, "n l"], Bool[Tensor, "n l"], Bool[Tensor, "n l"]]:
        """Ids, mask (True at real tokens) and special mask (True at CLS, SEP and padding) of a batch of texts."""
        return self._tensors(self.backend.encode_batch(list(texts)))

    def with_spans(
        self, texts: Sequence[str], spans: Sequence[Sequence[Sequence[tuple[int, int]]]]
    ) -> tuple[Int[Tensor, "n l"], Bool[Tensor, "n l"], Bool[Tensor, "n l"], Bool[Tensor, "n labels l"]]:
        """As for a call, and for each label of each text the tokens that share a character with one of its spans.

        A span is [start, end) in characters of the text. What lies behind the cut to `max_tokens` has no tokens.
        """
        encodings = self.backend.encode_batch(list(texts))
        ids, mask, special = self._tensors(encodings)
        tokens = torch.zeros(len(texts), max(map(len, spans), default=0), ids.shape[1], dtype=torch.bool)
        for row, of_text in enumerate(spans):
            if of_text:
                starts, ends = torch.tensor(encodings[row].offsets).T
                for label, of_label in enumerate(of_text):
                    for start, end in of_label:
                        tokens[row, label] |= (starts < end) & (ends > start)
        return ids, mask, special, tokens & ~special[:, None]

    def with_words(
        self, texts: Sequence[str]
    ) -> tuple[Int[Tensor, "n l"], Bool[Tensor, "n l"], Bool[Tensor, "n l"], Int[Tensor, "n l"]]:
        """As for a call, and for each token the place of the first token of its word; a special one is its own.

        Words are what the tokenizer splits a text into before it splits words into pieces.
        """
        encodings = self.backend.encode_batch(list(texts))
        starts = []
        for encoding in encodings:
            first: dict[int, int] = {}
            numbers = enumerate(encoding.word_ids)
            starts.append([place if word is None else first.setdefault(word, place) for place, word in numbers])
        return *self._tensors(encodings), torch.tensor(starts)

    def _tensors(
        self, encodings: Sequence[tokenizers.Encoding]
    ) -> tuple[Int[Tensor, "n l"], Bool[Tensor, "n l"], Bool[Tensor, "n l"]]:
        ids = torch.tensor([encoding.ids for encoding in encodings])
        mask = torch.tensor([encoding.attention_mask for encoding in encodings], dtype=torch.bool)
        special = torch.tensor([encoding.special_tokens_mask for encoding in encodings], dtype=torch.bool)
        return ids, mask, special

    def decode(self, ids: Sequence[int]) -> str:
        return self.backend.decode(list(ids))

    def _special_id(self, token: str) -> int:
        for spelling in SPELLINGS[token]:
            number = self.backend.token_to_id(spelling)
            if number is not None:
                return int(number)
        raise UserError(
            f"the tokenizer has no {' or '.join(SPELLINGS[token])} token; masked language modelling needs it"
        )
