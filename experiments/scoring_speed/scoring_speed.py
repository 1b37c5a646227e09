"""How long `vlm score` takes on files of the official sizes: see README.md."""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

# Sizes of the validation splits: visualqa.org/download.html; GQA's download page and val_sceneGraphs.json.
VQAV2_QUESTIONS, VQAV2_IMAGES, VQAV2_TYPES = 214_354, 40_504, 65
GQA_QUESTIONS, GQA_IMAGES = 132_062, 10_234

WORDS = [
    f"{first}{second}" for first in ("red", "blue", "old", "wood", "cat") for second in ("", "ish", " one", "-like")
]
ANSWERS = [*WORDS, "yes", "no", "2", "1,000", "the left", "couldnt say", "t-shirt", "Yes.", "none", "N/A", "caf\u00e9"]


def write_vqav2(folder: Path, num_questions: int) -> list[str]:
    """Questions, annotations and results; the arguments of `vlm score`."""
    choose = random.Random(0)
    questions, annotations, results = [], [], []
    for number in range(num_questions):
        identity = {"image_id": number % VQAV2_IMAGES, "question_id": number * 1000 + 1}
        first, others = choose.choice(ANSWERS), choose.choices(ANSWERS, k=3)
        given = [first] * 10 if number % 3 == 0 else [first] * 4 + others * 2
        answers = [
            {"answer_id": place, "answer": answer, "answer_confidence": "yes"}
            for place, answer in enumerate(given, start=1)
        ]
        kinds = {
            "question_type": f"type {number % VQAV2_TYPES}",
            "answer_type": ("yes/no", "number", "other")[number % 3],
        }
        questions.append(identity | {"question": "What is the thing to the left of the other thing?"})
        annotations.append(identity | kinds | {"answers": answers, "multiple_choice_answer": first})
        # One in fifty is a sentence of its own, as generative models write them.
        own = f"the {number}, probably." if number % 50 == 0 else choose.choice((first, *others))
        results.append({"question_id": identity["question_id"], "answer": own})
    return [
        _dump(folder / "results.json", results),
        "--annotations", _dump(folder / "annotations.json", {"info": {}, "annotations": annotations}),
        "--questions", _dump(folder / "questions.json", {"info": {}, "questions": questions}),
    ]  # fmt: skip


def write_gqa(folder: Path, num_questions: int) -> tuple[list[str], list[str]]:
    """Predictions, questions, choices, scene graphs and attentions; arguments for the questions alone, and for all."""
    choose = random.Random(0)
    questions: dict[str, Any] = {}
    predictions, attentions, choices = [], [], {}
    for number in range(num_questions):
        key, answer = f"{number:08d}", choose.choice(WORDS)
        questions[key] = _gqa_question(number, num_questions, answer, choose)
        predictions.append({"questionId": key, "prediction": choose.choice((answer, choose.choice(WORDS)))})
        choices[key] = {"valid": WORDS, "plausible": sorted(choose.sample(WORDS, 5))}
        weights = [[round(choose.random(), 6) for _ in range(7)] for _ in range(7)]
        attentions.append({"questionId": key, "attention": weights})
    box = {"name": "thing", "x": 10, "y": 20, "w": 100, "h": 150, "attributes": [], "relations": []}
    scenes = {
        f"image{image}": {"width": 640, "height": 480, "objects": {str(name): box for name in range(16)}}
        for image in range(GQA_IMAGES)
    }
    plain = [
        _dump(folder / "predictions.json", predictions),
        "--questions", _dump(folder / "questions.json", questions),
    ]  # fmt: skip
    everything = [
        "--all-questions", plain[-1],
        "--choices", _dump(folder / "choices.json", choices),
        "--scenes", _dump(folder / "scenes.json", scenes),
        "--attentions", _dump(folder / "attentions.json", attentions),
    ]  # fmt: skip
    return plain, plain + everything


def _gqa_question(number: int, num_questions: int, answer: str, choose: random.Random) -> dict[str, Any]:
    """An entry as long as the real ones, about 1.5 kB."""
    entailed = [f"{(number + step) % num_questions:08d}" for step in range(choose.randrange(5))]
    program = [
        {"operation": operation, "dependencies": [step - 1] if step else [], "argument": "thing (1234567)"}
        for step, operation in enumerate(("select", "relate", "filter color", "query"))
    ]
    return {
        "semantic": program,
        "entailed": entailed,
        "equivalent": [f"{number:08d}"],
        "question": "What is the color of the thing that is to the left of the other thing?",
        "imageId": f"image{number % GQA_IMAGES}",
        "isBalanced": True,
        "groups": {"global": f"group {number % 200}" if number % 4 else None, "local": "14-thing_left of,s"},
        "answer": answer,
        "semanticStr": "select: thing (1)->relate: _,left of,s (2) [0]->filter color: red [1]->query: name [2]",
        "annotations": {"answer": {"0": "1"}, "question": {"4:6": "2", "11": "3"}, "fullAnswer": {"1": "1", "6": "0"}},
        "types": {
            "detailed": f"kind{number % 100}",
            "semantic": ("rel", "attr", "obj", "cat", "global")[number % 5],
            "structural": ("query", "verify", "choose", "logical", "compare")[number % 5],
        },
        "fullAnswer": "The thing is to the left of the other thing.",
    }


def _dump(file: Path, content: Any) -> str:
    file.write_text(json.dumps(content))
    return str(file)


def measure(arguments: Sequence[str]) -> tuple[float, float, float]:
    """Wall seconds, core seconds and peak memory in MB of one `vlm score`, from the start of its process."""
    code = (
        "import sys, time\nfrom vlm.cli import main\nstatus = main(sys.argv[1:])\n"
        # Not getrusage: what it says of a new process includes the memory of the one that started it.
        "kilobytes = open('/proc/self/status').read().split('VmHWM:')[1].split()[0]\n"
        "print(kilobytes, time.process_time(), file=sys.stderr)\nsys.exit(status)"
    )
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code, "score", *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    seconds = time.perf_counter() - begin
    if done.returncode:
        raise SystemExit(done.stderr)
    kilobytes, core_seconds = done.stderr.split()[-2:]
    return seconds, float(core_seconds), int(kilobytes) / 1024


def rows(share: float) -> Iterator[tuple[str, float, float, float]]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        vqav2 = write_vqav2(folder, int(VQAV2_QUESTIONS * share))
        yield "vqav2", *measure(["vqav2", *vqav2, "--json", str(folder / "scores.json")])
        plain, everything = write_gqa(folder, int(GQA_QUESTIONS * share))
        yield "gqa, questions only", *measure(["gqa", *plain, "--json", str(folder / "scores.json")])
        yield "gqa, every metric", *measure(["gqa", *everything, "--json", str(folder / "scores.json")])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--share", type=float, default=1.0, help="of the official sizes (default 1)")
    share = parser.parse_args(arguments).share
    for name, seconds, core_seconds, megabytes in rows(share):
        print(f"{name:20} {seconds:6.1f} s, {core_seconds:6.1f} s of a core, {megabytes:6.0f} MB", flush=True)


if __name__ == "__main__":
    main()
