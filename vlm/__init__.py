"""How much image-text supervision does a vision-language model need, and what can replace it?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlm.hub import load

__all__ = ["load"]


def __getattr__(name: str) -> Any:
    """`vlm.load`, imported when it is asked for: it brings torch."""
    if name == "load":
        from vlm.hub import load

        return load
    raise AttributeError(f"module 'vlm' has no attribute {name!r}")
