"""Text towers of the open_clip library: token states, what CLIP pools first."""

from __future__ import annotations

import string
from collections import deque
from pathlib import Path
from typing import Any

import tokenizers
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from vlm.errors import UserError
from vlm.models.language.tokenizer import CLS, MASK, PAD, SPELLINGS
from vlm.models.open_clip import create, library, model_config

ADDED = (CLS, PAD, MASK)
"""Tokens that CLIP's vocabularies lack. The embedding has room for them behind its own rows."""

PADDING = {32_000: 1, 250_000: 1}
"""SigLIP's vocabularies that pad with their end of text; by size (open_clip's `SigLipTokenizer`). Others pad with 0."""


class OpenClipLanguage(nn.Module):
    """One tower's token states after its last norm and before CLIP's projection, the pooled state in front.

    Every text begins with a `[CLS]` of our own, which the tower never sees: its place in the output takes the state
    that CLIP pools. That is the end of text in CLIP itself, whose causal attention lets no earlier token know the
    whole text, the last place in SigLIP, the appended class token in CoCa, and the pooler's choice in towers of the
    transformers library. All other states stay where their tokens are.

    Attention is as it was trained. So in CLIP a masked token is foretold from what stands before it, until the fusion
    brings the rest. SigLIP and CoCa read texts that are padded to their full context, and let padding be read; here too
    they always run at that length. `[MASK]` starts as the mean of all embeddings.
    """

    def __init__(
        self, name: str, pretrained: bool, weights: Path | str | None = None, max_tokens: int | None = None
    ) -> None:
        super().__init__()
        _, text = create(name, pretrained, weights, "language")
        self.text: Any = text
        self.is_transformers = hasattr(text, "pooler")
        context = int(text.context_length) - (2 if self.is_transformers else 0)  # RoBERTa counts places from its pad id
        if max_tokens is not None and max_tokens > context + 1:
            raise UserError(f"model.language.max_tokens: {name} reads {context} tokens and our [CLS]. Got {max_tokens}")
        if self.is_transformers:
            text.proj = nn.Identity()
            words = text.transformer.get_input_embeddings()
            text.transformer.set_input_embeddings(_with_room(words))
            self.width = int(words.embedding_dim)
        else:
            text.text_projection = None
            words = text.token_embedding
            text.token_embedding = _with_room(words)
            self.width = int(text.width)
            self.reads_padding = text.cls_emb is not None or text.attn_mask is None
            self.padding = PADDING.get(int(words.num_embeddings), int(text.pad_id))
        self.vocabulary_size = int(words.num_embeddings) + len(ADDED)

    @property
    def blocks(self) -> list[nn.Module]:
        """The repeated blocks, the first one first."""
        if not self.is_transformers:
            return list(self.text.transformer.resblocks)
        lists = [list(module) for module in self.text.transformer.modules() if isinstance(module, nn.ModuleList)]
        return max(lists, key=len)

    def forward(self, text_ids: Int[Tensor, "n l"], text_mask: Bool[Tensor, "n l"]) -> Float[Tensor, "n l d"]:
        return self.layers(text_ids, text_mask, 1)[0]

    def layers(
        self, text_ids: Int[Tensor, "n l"], text_mask: Bool[Tensor, "n l"], count: int
    ) -> tuple[Float[Tensor, "n l d"], ...]:
        """States after each of the last `count` blocks, through the final norm; the last is what `forward` gives."""
        ids, mask = text_ids[:, 1:], text_mask[:, 1:]
        if self.is_transformers:
            return self._transformers_layers(ids, mask, count)
        length = ids.shape[1]
        pooled = self._pooled_place(mask)
        if self.reads_padding:
            full = ids.new_full((len(ids), self.text.context_length), self.padding)
            full[:, :length] = torch.where(mask, ids, self.padding)
            ids = full
        x, attention = self.text._embeds(ids)
        if attention is not None and attention.ndim == 2:
            attention = attention[: x.shape[1], : x.shape[1]]
        states: deque[Tensor] = deque(maxlen=count)
        for block in self.text.transformer.resblocks:
            x = block(x, attn_mask=attention)
            states.append(x)
        rows = torch.arange(len(ids), device=ids.device)
        normed = [self.text.ln_final(x) for x in states]
        return tuple(torch.cat([x[rows, pooled].unsqueeze(1), x[:, :length]], dim=1) for x in normed)

    def _pooled_place(self, mask: Bool[Tensor, "n l"]) -> Int[Tensor, " n"]:
        """Where each text's pooled state is among the tower's tokens."""
        if self.text.cls_emb is not None or self.text.pool_type == "last":
            return mask.new_full((len(mask),), -1, dtype=torch.long)
        if self.text.pool_type == "first":
            return mask.new_zeros(len(mask), dtype=torch.long)
        return mask.sum(1) - 1  # the end of text

    def _transformers_layers(
        self, ids: Int[Tensor, "n l"], mask: Bool[Tensor, "n l"], count: int
    ) -> tuple[Float[Tensor, "n l+1 d"], ...]:
        from transformers.modeling_outputs import BaseModelOutput

        attention = mask.to(ids.dtype)
        output = self.text.transformer(input_ids=ids, attention_mask=attention, output_hidden_states=count > 1)
        earlier = [BaseModelOutput(last_hidden_state=x) for x in (output.hidden_states[-count:-1] if count > 1 else ())]
        pooled = [self.text.pooler(one, attention).unsqueeze(1) for one in (*earlier, output)]
        pairs = zip(pooled, (*earlier, output), strict=True)
        return tuple(torch.cat([first, one.last_hidden_state], dim=1) for first, one in pairs)


def _with_room(words: nn.Embedding) -> nn.Embedding:
    """The same embedding with a row for each added token, the mean of all others."""
    rows, width = words.weight.shape
    larger = nn.Embedding(rows + len(ADDED), width, words.padding_idx, device="meta")
    mean = words.weight.detach().mean(0, keepdim=True).expand(len(ADDED), width)
    larger.weight = nn.Parameter(torch.cat([words.weight.detach(), mean]))
    return larger


def vocabulary_size(name: str) -> int:
    """How many rows the encoder's embedding has, of towers of open_clip's own."""
    text = model_config(name)["text_cfg"]
    if "hf_model_name" in text:
        from vlm.models.language.transformers import vocabulary_of

        return vocabulary_of(text["hf_model_name"])[0] + len(ADDED)
    return int(text.get("vocab_size", 49408)) + len(ADDED)  # 49408: the default of open_clip's CLIPTextCfg


def load_tokenizer(name: str) -> tokenizers.Tokenizer:
    """The tower's tokenizer with `[CLS]` in front, and with tokens for what masked language modelling needs.

    As open_clip's, but for the repair of broken encodings and HTML entities, which its texts go through before.
    """
    text = model_config(name)["text_cfg"]
    options = text.get("tokenizer_kwargs", {})
    if options.get("strip_sep_token") or text.get("tokenizer_mode"):
        raise UserError(f"open_clip:{name}: its texts are cut as no fast tokenizer does. Take its vision tower alone")
    hub_name = text.get("hf_tokenizer_name")
    backend = _hub_tokenizer(name, hub_name, options.get("clean", "whitespace")) if hub_name else _byte_pairs()
    backend = _with_front(backend)
    size = vocabulary_size(name)
    if backend.get_vocab_size() > size:
        raise UserError(f"open_clip:{name}: {backend.get_vocab_size()} tokens for an embedding of {size} rows")
    return backend


def _with_front(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """The tokenizer with what it lacks of `ADDED`, and with our first token before its own."""
    from tokenizers import processors

    lacking = [token for token in ADDED if all(backend.token_to_id(one) is None for one in SPELLINGS[token])]
    before, after = _around(backend)
    backend.add_special_tokens(lacking)
    first = next(spelling for spelling in SPELLINGS[CLS] if backend.token_to_id(spelling) is not None)
    special = [(token, backend.token_to_id(token)) for token in dict.fromkeys((first, *before, *after))]
    backend.post_processor = processors.TemplateProcessing(
        single=[first, *before, "$A", *after], special_tokens=special
    )
    return backend


def _around(backend: tokenizers.Tokenizer) -> tuple[list[str], list[str]]:
    """The special tokens that a tokenizer writes before and behind a text."""
    encoding = backend.encode("a")
    words = [place for place, special in enumerate(encoding.special_tokens_mask) if not special]
    return encoding.tokens[: words[0]], encoding.tokens[words[-1] + 1 :]


def _byte_pairs() -> tokenizers.Tokenizer:
    """OpenAI's tokenizer, from the vocabulary that open_clip ships."""
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors

    theirs = library().tokenizer.SimpleTokenizer()
    model = models.BPE(theirs.encoder, list(theirs.bpe_ranks), end_of_word_suffix="</w>")
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.Sequence(
        [
            normalizers.NFC(),
            normalizers.Replace(Regex("[\u02bc\u2018-\u201b]"), "'"),  # typographic quotes, as ftfy straightens them
            normalizers.Replace(Regex("[\u201c-\u201f]"), '"'),
            normalizers.Lowercase(),
        ]
    )
    words = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("</w>", " ")])
    start, end = "<start_of_text>", "<end_of_text>"
    backend.add_special_tokens([start, end])
    backend.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}", special_tokens=[(start, theirs.sot_token_id), (end, theirs.eot_token_id)]
    )
    return backend


def _hub_tokenizer(name: str, hub_name: str, clean: str) -> tokenizers.Tokenizer:
    """A tokenizer of the transformers library, behind what open_clip does to texts before."""
    from tokenizers import Regex, normalizers

    from vlm.models.language import transformers

    try:
        backend = transformers.load_tokenizer(hub_name)
    except UserError as error:
        raise UserError(
            f"open_clip:{name} reads texts with the tokenizer {hub_name!r}: {error}. For random weights there is "
            "model.language.tokenizer=words"
        ) from None
    before: list[Any] = []
    if clean == "canonicalize":
        before += [normalizers.Replace("_", " "), normalizers.Replace(Regex(f"[{_escaped(string.punctuation)}]"), "")]
    if clean in ("canonicalize", "lower"):
        before.append(normalizers.Lowercase())
    before += [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    backend.normalizer = normalizers.Sequence([*before, *([backend.normalizer] if backend.normalizer else [])])
    return backend


def _escaped(characters: str) -> str:
    """For a class of a regular expression."""
    return "".join(f"\\{character}" for character in characters)
