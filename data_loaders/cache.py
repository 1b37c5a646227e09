"""Where prepared and fetched data is kept."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Where prepared and fetched data is kept: `$VLM_CACHE`, else `~/.cache/vlm`."""
    return Path(os.environ.get("VLM_CACHE") or Path.home() / ".cache" / "vlm")
