"""The benchmark's files are good ones, so that what it times is scoring."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "experiments" / "scoring_speed" / "scoring_speed.py"


def test_the_benchmark_scores_the_files_that_it_makes() -> None:
    command = [sys.executable, str(SCRIPT), "--share", "0.0005"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=SCRIPT.parents[2])
    assert [line.split("  ")[0] for line in done.stdout.splitlines()] == [
        "vqav2",
        "gqa, questions only",
        "gqa, every metric",
    ]
