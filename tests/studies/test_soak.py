"""The soak test itself, in short."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_study_that_is_killed_in_every_way_ends_as_one_that_is_not(tmp_path: Path) -> None:
    script = ROOT / "experiments" / "soak" / "soak.py"
    to = tmp_path / "soak.json"
    command = [sys.executable, str(script), "--disturbances", "5", "--seed", "1", "--on", "local", "--to", str(to)]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-2000:]
    told = json.loads(to.read_text())
    assert sum(told["disturbances"].values()) == 5 and told["scores"] > 100
