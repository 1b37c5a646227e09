"""Files that colleagues may read."""

from __future__ import annotations

import os
from pathlib import Path


def share(file: Path) -> None:
    """Give a file the permissions of any new one. safetensors writes files that only their owner may read, and runs and
    data roots lie on shared disks."""
    umask = os.umask(0)  # it can be read only by setting it
    os.umask(umask)
    file.chmod(0o666 & ~umask)
