"""The few plain types that flow through the project: Record -> Example -> Batch -> Encoded.

Dimension letters used in every signature: b batch, n texts or pairs of one step, p image tokens with the
CLS token first, l text tokens, d width, m masked positions, v vocabulary, k classes, h w pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:  # torch is imported only by those who compute
    from jaxtyping import Bool, Float, Int, UInt8
    from torch import Tensor

Source = Literal["human", "machine", "class_name", "generated", "none"]
"""Where a text comes from: people, a machine's labels, true classes, a captioner, or there is none.

It travels with each example into its batch, to the loss and the logs.
"""


@dataclass(frozen=True, slots=True)
class Record:
    """One example as it lies in a shard: an image and everything that is known about it."""

    key: str
    image: bytes = b""  # encoded JPEG or PNG
    captions: tuple[str, ...] = ()  # written by people
    labels: tuple[str, ...] = ()  # machine labels, best first
    scores: tuple[float, ...] = ()  # one a label, in [0, 1], descending
    classes: tuple[str, ...] = ()  # true class names, for encoders that are pretrained on images alone


@dataclass(frozen=True, slots=True)
class Example:
    """What one training step sees of a record, once supervision has decided."""

    key: str
    image: bytes
    text: str
    source: Source
    classes: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()  # what the text was joined from, where it is a list of labels


@dataclass(frozen=True, slots=True)
class Question:
    """A question, statement or caption about one or two images, with what its authors count as right.

    `answers` holds the annotators' answers (VQAv2: ten; GQA: one; NLVR2: "True" or "False"; none in a test split).
    """

    id: str
    text: str
    image_keys: tuple[str, ...]
    answers: tuple[str, ...] = ()
    group: str = ""  # answer type (VQAv2), structural type (GQA) or what consistency is counted over (NLVR2)
    kind: str = ""  # question type, where it is another thing than the group (VQAv2: "what color is the")
    counts: bool = True  # False: answered for other scores' sake, but in no accuracy (GQA's unbalanced questions)


@dataclass(frozen=True, slots=True)
class Damage:
    """An example that cannot be read, and where it lies."""

    shard: str  # a path or URL
    position: int  # on the hash ring of its shard folder
    member: str  # as the tar calls it; empty where that cannot be read either
    reason: str

    def __str__(self) -> str:
        return (
            f"{self.shard}: example {self.position}{f', member {self.member!r},' if self.member else ''} {self.reason}"
        )


@dataclass(slots=True)
class Batch:
    """Tensors of one micro-batch. Pixels stay bytes until they are on the device.

    Where the vision encoder is frozen, `image` may hold its states, computed once for the run, in place of pixels.
    """

    keys: tuple[str, ...]
    image: UInt8[Tensor, "b c h w"] | Float[Tensor, "b *k p d"] | None = None
    text_ids: Int[Tensor, "b l"] | None = None
    text_mask: Bool[Tensor, "b l"] | None = None  # True at real tokens
    special_mask: Bool[Tensor, "b l"] | None = None  # True at CLS, SEP and padding: never masked out for prediction
    label_tokens: Bool[Tensor, "b labels l"] | None = None  # True at the tokens of each label; only where asked for
    word_starts: Int[Tensor, "b l"] | None = None  # where each token's word begins; only where asked for
    targets: Float[Tensor, "b k"] | Int[Tensor, " b"] | None = None
    sources: tuple[Source, ...] = ()  # one a text
    damages: tuple[Damage, ...] = ()  # examples that others stand in for
    images_per_text: int = 1  # 2 for NLVR2, whose images lie as (first images, second images) along b
    later: tuple[Batch, ...] = field(default=(), repr=False, compare=False)  # of the same step: of its first one only


@dataclass(slots=True, eq=False)
class View:
    """What one objective wants encoded: images alone, texts alone, both apart in the fusion's width, or fused pairs.

    Views that hold the *same* `text_ids` tensor share one pass through the language encoder, and all views share one
    pass of the batch's images through the vision encoder. "apart" without `text_ids` is the images alone, in the
    fusion's width.
    """

    kind: Literal["image", "text", "apart", "pair"]
    text_ids: Int[Tensor, "b l"] | None = None
    text_mask: Bool[Tensor, "b l"] | None = None
    text_index: Int[Tensor, " n"] | None = None  # which text each pair takes; None: all, in order
    image_index: Int[Tensor, " n"] | None = None  # which image each pair takes; None: all, in order
    targets: dict[str, Tensor] = field(default_factory=dict)  # what the objective wants to find again at its loss
    similarity: Callable[[Encoded], Tensor] | None = None  # of "apart": logits of each text with each image
    chosen_from: View | None = None  # an "apart" view whose states decide the pairs of this one, and how:
    choose: Callable[[Encoded], tuple[Tensor, Tensor]] | None = None  # its text_index and image_index


@dataclass(slots=True)
class Encoded:
    """Final states of one view: of width d of the encoder alone, or of the fusion's for "apart" and "pair".

    A fusion may hand back other image states than it got, as many as it learned queries or latents for.
    """

    text: Float[Tensor, "n l d"] | None = None
    image: Float[Tensor, "n p d"] | None = None
    pooled: Float[Tensor, "n 2*d"] | None = None  # pairs only: [text CLS; image CLS], pooled


@dataclass(slots=True)
class Items:
    """What a loss is the mean of, item by item and without gradient: for figures by source."""

    row: Int[Tensor, " m"]  # which text of the batch an item belongs to
    loss: Float[Tensor, " m"]
    correct: Bool[Tensor, " m"]


@dataclass(slots=True)
class Loss:
    """A named loss (mean over `count` items) and the figures that are logged beside it."""

    value: Float[Tensor, ""]
    count: int
    figures: dict[str, Tensor] = field(default_factory=dict)
    items: Callable[[], Items] | None = None  # asked only at steps that log; nothing is encoded again for them
