"""The benchmark of preparing measures the real command, and the recorded figures stand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "experiments" / "preparing_speed"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_the_benchmark_prepares_the_rows_whose_links_are_alive(tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    command = [sys.executable, str(FOLDER / "preparing_speed.py"), "--rows", "400", "--workers", "1"]
    done = subprocess.run([*command, "--temporary", str(tmp_path), "--results", str(results)], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    (turn,) = json.loads(results.read_text())["turns"]
    assert (turn["rows"], turn["examples"]) == (400, 320)
    assert turn["peak_mib"]["own"] > 10 and turn["seconds_to_the_first_batch"] > turn["seconds_to_open"] >= 0
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]  # what it made is gone


def test_memory_of_the_recorded_run_does_not_grow_with_the_rows() -> None:
    turns = json.loads((FOLDER / "results.json").read_text())["turns"]
    few, many = turns[0], turns[-1]
    assert many["rows"] >= 30 * few["rows"]
    assert many["peak_mib"]["own"] < 1.25 * few["peak_mib"]["own"]
