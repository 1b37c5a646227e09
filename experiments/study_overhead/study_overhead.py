"""What a study costs beside its training: planning, the runner's part of each job, and the start of a process.

    python experiments/study_overhead/study_overhead.py

On an idle machine; writes results.json beside this file.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml
from rich.console import Console

from vlm.config import load_yaml
from vlm.run import RESULT
from vlm.studies.driver import drive
from vlm.studies.launchers import local
from vlm.studies.plan import StudyConfig, plan

ROOT = Path(__file__).parents[2]
TINY = [
    "data.world={num_pairs:64,num_validation_pairs:16,num_unimodal_images:32,num_texts:200,"
    "num_vqav2_train:64,num_gqa_train:64,num_nlvr2_train:32,num_evaluation:32}",
    "trainer.batch_size=16",
    "trainer.samples=16",
    "trainer.accelerator=cpu",
    "trainer.progress=false",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=10_000, help="of the plan (default 10,000)")
    parser.add_argument("--rounds", type=int, default=5, help="of everything else (default 5)")
    parser.add_argument("--to", type=Path, default=Path(__file__).with_name("results.json"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        os.environ["VLM_CACHE"] = str(Path(name) / "cache")
        results = {
            "machine": f"{local.num_cores()} cores, Python {platform.python_version()}",
            "load_before": round(os.getloadavg()[0], 2),
            "cells": options.cells,
            "plan_seconds": spread(lambda: plan_cells(Path(name), options.cells), options.rounds),
            "job_seconds": spread(lambda: empty_jobs(Path(name)), options.rounds),
            "help_seconds": spread(lambda: command("--help"), options.rounds + 1),
            "show_seconds": spread(lambda: command("show", "pretrain"), options.rounds + 1),
            "first_step_seconds": spread(lambda: first_step(Path(name)), options.rounds + 1),
        }
    print(json.dumps(results, indent=1))
    options.to.write_text(json.dumps(results, indent=1) + "\n")


def spread(measure: object, rounds: int) -> dict[str, float]:
    """Median and range of some rounds, after one that fills caches and is not counted."""
    assert callable(measure)
    measure()
    seconds = [float(measure()) for _ in range(max(rounds - 1, 1))]
    return {name: round(of(seconds), 3) for name, of in (("median", statistics.median), ("least", min), ("most", max))}


def plan_cells(folder: Path, cells: int) -> float:
    """Points, seeds and three tasks: a quarter of the runs are pretrainings."""
    seeds = 25
    points = {f"{number}": {"supervision.fraction": number / cells} for number in range(cells // (4 * seeds))}
    study = {
        "question": "How long does a plan take?",
        "overrides": ["data=world", "model=tiny", "supervision.subset_seed=${seed}"],
        "seeds": list(range(seeds)),
        "stages": {
            "pretrain": {"config": "pretrain", "points": points},
            "finetune": {
                "config": "finetune",
                "upstream": {"start_from": "pretrain"},
                "grid": {"task": ["vqav2", "gqa", "nlvr2"]},
            },
        },
    }
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump(study, sort_keys=False))
    begin = time.perf_counter()
    jobs = plan(load_yaml(file, StudyConfig), folder / "out")
    seconds = time.perf_counter() - begin
    assert len(jobs) == cells, f"{len(jobs)} jobs"
    return seconds


def finish(folder: Path) -> None:
    (folder / RESULT).write_text("{}")


def empty_jobs(folder: Path, number: int = 40) -> float:
    """Seconds that the runner spends on a job that does nothing, its process included; one at a time."""
    with tempfile.TemporaryDirectory(dir=folder) as runs:
        seeds = list(range(number))
        study = StudyConfig.model_validate(
            {
                "question": "?",
                "seeds": seeds,
                "stages": {"pretrain": {"config": "pretrain", "overrides": ["model=tiny"]}},
            }
        )
        jobs = plan(study, Path(runs))
        console = Console(file=io.StringIO())
        drive(jobs[:1], local.LocalLauncher(jobs, 1, finish), console=console)  # starts the server
        begin = time.perf_counter()
        outcome = drive(jobs, local.LocalLauncher(jobs, 1, finish), console=console)
        assert len(outcome.finished) == number
        return (time.perf_counter() - begin) / (number - 1)


def command(*arguments: str) -> float:
    begin = time.perf_counter()
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-m", "vlm.cli", *arguments], check=True, capture_output=True, env=environment)
    return time.perf_counter() - begin


def first_step(folder: Path) -> float:
    """From the command to the end of its first optimizer step, a tiny model on a world that is there already."""
    with tempfile.TemporaryDirectory(dir=folder) as run:
        script = (
            "import sys, time, lightning\n"
            "from lightning.pytorch.callbacks import Callback\n"
            "import vlm.training.trainer as trainer\n"
            "from vlm.cli import main\n"
            "def told(self, *_): print('first step', time.time(), flush=True)\n"
            "trainer.TellProgress.on_train_batch_end = told\n"
            "main(sys.argv[1:])\n"
        )
        begin = time.time()
        ended = subprocess.run(
            [sys.executable, "-c", script, "train", "pretrain", "model=tiny", *TINY, f"folder={run}/run"],
            check=True,
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        line = next(line for line in ended.stdout.splitlines() if line.startswith("first step"))
        return float(line.split()[2]) - begin


if __name__ == "__main__":
    main()
