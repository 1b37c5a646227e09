"""Kills a small study in every way at random moments, and checks that the same command still ends it.

    python experiments/soak/soak.py --disturbances 20 --seed 0

One study runs undisturbed. Then the same one runs again and again, on this machine and on a Ray cluster in turn, in a
folder of a small file system of its own, until it was disturbed often enough: its runner is killed, or a process that
runs a job (under Ray: a worker), or the file system is filled for a while. After that

- the same command must finish it,
- its results must be those of the undisturbed study,
- and no run that had finished may have run again.

Without the right to mount a file system the disk is not filled, and the summary says so.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

STUDY = Path(__file__).with_name("study.yaml")
ROOT = STUDY.parents[2]
SIZE = "96m"  # of the file system; the study takes about half
TRIES = 6  # calls of the same command, at the most, after the last disturbance
POLL_SECONDS = 0.05
PAUSES = 1.0, 12.0  # seconds from one disturbance to the next; a study takes a few to begin
ROUND = 5  # disturbances of one study
TIMING = ("seconds", "examples_per_second")


@dataclass
class Watch:
    """What was seen of the runs that have finished: the same must be there at the end."""

    runs: Path
    seen: dict[str, tuple[int, int]] = field(default_factory=dict)  # inode and time of the result, by run

    def look(self) -> list[str]:
        """The runs that have finished a second time."""
        again = []
        for result in self.runs.glob("*/result.json"):
            with contextlib.suppress(FileNotFoundError):
                now = result.stat()
                if self.seen.setdefault(result.parent.name, (now.st_ino, now.st_mtime_ns)) != (
                    now.st_ino,
                    now.st_mtime_ns,
                ):
                    again.append(result.parent.name)
        return again


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--disturbances", type=int, default=20, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--on", nargs="+", choices=("local", "ray", "submitit"), default=["local", "ray"])
    parser.add_argument("--to", type=Path, metavar="FILE", help="write the counts here, as JSON")
    options = parser.parse_args()
    chance = random.Random(options.seed)
    done: Counter[str] = Counter()
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="vlm-soak-") as name:
        place = Path(name)
        os.environ["VLM_CACHE"] = str(place / "cache")
        calm = place / "calm"
        study = start(calm, "local")
        if study.wait() != 0:
            raise SystemExit("the undisturbed study did not end well:\n" + (place / "calm.txt").read_text()[-3000:])
        expected = outcome(calm)
        print(f"undisturbed: {len(expected)} scores in {time.monotonic() - begin:.0f} s")
        with small_file_system(place / "small") as can_fill:
            number = 0
            while sum(done.values()) < options.disturbances:
                on = options.on[number % len(options.on)]
                folder = place / "small" / f"round{number}"
                most = min(ROUND, options.disturbances - sum(done.values()))
                done += disturbed(folder, on, chance, most, can_fill)
                if (found := outcome(folder)) != expected:
                    changed = sorted(set(found) ^ set(expected))
                    raise SystemExit(f"round {number}: other results than undisturbed, such as {changed[:4]}")
                print(f"round {number} on {on}: as undisturbed; so far {dict(done)}", flush=True)
                subprocess.run(["rm", "-rf", str(folder)], check=True)
                number += 1
    summary = {
        "disturbances": dict(sorted(done.items())),
        "rounds": number,
        "on": options.on,
        "seed": options.seed,
        "scores": len(expected),
        "seconds": round(time.monotonic() - begin),
        "disk_was_filled": can_fill,
    }
    print(json.dumps(summary, indent=1))
    if options.to is not None:
        options.to.write_text(json.dumps(summary, indent=1) + "\n")


def start(folder: Path, on: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "vlm.cli", "study", str(STUDY), "--folder", str(folder), "--on", on, "--jobs", "2"]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    # Beside the small file system, so that what is printed has room.
    log = folder.parent.parent / "log.txt" if folder.name.startswith("round") else folder.with_suffix(".txt")
    with log.open("ab") as file:
        return subprocess.Popen(command, stdout=file, stderr=file, env=environment)


def disturbed(folder: Path, on: str, chance: random.Random, most: int, can_fill: bool) -> Counter[str]:
    """Run the study, disturb it up to `most` times, and let the same command finish it."""
    watch = Watch(folder / "runs")
    done: Counter[str] = Counter()
    kinds = ["runner", "worker" if on == "ray" else "job", *(["disk"] if can_fill else [])]
    calls, study = 1, start(folder, on)
    tries, kind = 0, None
    while True:
        pause = time.monotonic() + (chance.uniform(*PAUSES) if kind is None else 0.5)
        while time.monotonic() < pause and study.poll() is None:
            check(watch)
            time.sleep(POLL_SECONDS)
        if study.poll() is not None:
            if study.returncode == 0:
                check(watch)
                print(f"  {calls} calls, {sum(done.values())} disturbances: {', '.join(done.elements())}", flush=True)
                return done
            if sum(done.values()) >= most:
                tries += 1
                if tries > TRIES:
                    raise SystemExit(f"{folder.name}: not finished by {TRIES} calls of the same command. See its log")
            calls, study = calls + 1, start(folder, on)
            continue
        if sum(done.values()) >= most:
            continue
        kind = kind or chance.choice(kinds)
        if kind == "runner":
            study.kill()
            study.wait()
        elif kind == "disk":
            fill(folder.parent, chance.uniform(0.2, 2.0))
        else:
            working = processes_at_work(folder)
            if not working:
                continue  # it is killed as soon as there is one
            with contextlib.suppress(ProcessLookupError):
                os.kill(chance.choice(working), signal.SIGKILL)
        done[kind] += 1
        kind = None


def check(watch: Watch) -> None:
    if again := watch.look():
        raise SystemExit(f"finished runs ran again: {', '.join(again)}")


def processes_at_work(folder: Path) -> list[int]:
    """Processes whose output goes to the log of one of the study's runs."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            output = os.readlink(process / "fd" / "1")
            if output.startswith(str(folder / "runs")) and output.endswith("log.txt"):
                found.append(int(process.name))
    return sorted(found)


def fill(folder: Path, seconds: float) -> None:
    """Leave no room on the file system of this folder for a while."""
    filler = folder / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(2**16))
    time.sleep(seconds)
    filler.unlink()


@contextlib.contextmanager
def small_file_system(folder: Path) -> Iterator[bool]:
    """A folder on a file system of its own, and whether it is one."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)]
    mounted = subprocess.run(mount, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            for _ in range(50):  # what was killed may hold a file for a moment
                if subprocess.run(["umount", str(folder)], capture_output=True).returncode == 0:
                    break
                time.sleep(0.2)


def outcome(folder: Path) -> dict[tuple[str, ...], str]:
    """All columns of the study's table but those that tell of time, and the weights that each run hands on."""
    with (folder / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    found = {
        (str(number), column): row[column] for number, row in enumerate(rows) for column in row if column not in TIMING
    }
    for result in (folder / "runs").glob("*/result.json"):
        told = json.loads(result.read_text())
        found[result.parent.name, "metrics"] = json.dumps(told.get("metrics"), sort_keys=True)
    return found


if __name__ == "__main__":
    main()
