"""A source from outside: only the beginning of the caption that people wrote."""

from __future__ import annotations

from vlm.supervision.sources import key_random
from vlm.types import Record, Source


def first_words(record: Record, count: int) -> tuple[str, Source]:
    """The text beside the image of this record, and where it comes from: "human", "machine", "generated", ...

    It may depend on the record alone, so that no rank, worker or epoch sees another text. A tuple in place of the text
    is a list of labels. An empty text leaves the image out of every loss that learns from a text.
    """
    if not record.captions:
        return "", "none"
    caption = key_random(record.key, "first_words").choice(record.captions)
    return " ".join(caption.split()[:count]), "human"
