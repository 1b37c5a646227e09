"""How long loading an exported model takes beside reading its weights, and answering beside the bare modules.

Each measurement of loading runs in a process of its own, after the libraries are imported.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def make_export(folder: Path) -> Path:
    """ViT-B/16, RoBERTa-base and METER's fusion with random weights and a head of 3,129 answers, exported."""
    import torch

    from vlm.config import compose, dump_yaml
    from vlm.exporting import export
    from vlm.models.heads import AnswerHead
    from vlm.models.language.tokenizer import Tokenizer
    from vlm.run import CONFIG, LAST, TOKENIZER, RunConfig

    overrides = ["model=base", "model.vision.pretrained=false", "model.language.pretrained=false"]
    config = compose("finetune", overrides, RunConfig)
    run = folder / "run"
    run.mkdir()
    (run / CONFIG).write_text(dump_yaml(config))
    texts = folder / "texts.txt"
    texts.write_text("what color is the circle\n")
    Tokenizer.from_words(texts, 50265, 50, fill=True, pad_id=1).save(run / TOKENIZER)
    model = config.model.build()
    head = AnswerHead(2 * model.width, 3129)
    states = {f"model.{name}": value for name, value in model.state_dict().items()}
    states |= {f"head.{name}": value for name, value in head.state_dict().items()}
    torch.save({"state_dict": states, "answers": [f"answer {n}" for n in range(3129)]}, run / LAST)
    exported = export(run, folder / "exported")
    (run / LAST).unlink()
    return exported


def resident_mib() -> float:
    """Memory that the process holds now, mapped files that were touched among it."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def read_weights(file: Path) -> float:
    """Seconds to read the file into one buffer that was there before."""
    buffer = bytearray(file.stat().st_size)
    start = time.perf_counter()
    with file.open("rb", buffering=0) as opened:
        view = memoryview(buffer)
        while count := opened.readinto(view):
            view = view[count:]
    return time.perf_counter() - start


def measure_loading(folder: Path) -> dict[str, float]:
    """Loading, and loading with every weight then read once, beside reading the file."""
    import timm  # noqa: F401  # imported beforehand: libraries are imported once, whatever is loaded
    import torch
    from transformers import RobertaModel  # noqa: F401

    import vlm
    from vlm.models.language.transformers import TransformersLanguage  # noqa: F401
    from vlm.models.vision.timm import TimmVision  # noqa: F401

    torch.set_num_threads(1)
    vlm.load  # noqa: B018  # imports what loads
    reading = [read_weights(folder / "model.safetensors") for _ in range(3)]
    before = resident_mib()
    start = time.perf_counter()
    model = vlm.load(folder)
    loaded = time.perf_counter() - start
    sum(parameter.sum().item() for parameter in model.model.parameters())
    touched = time.perf_counter() - start
    size = (folder / "model.safetensors").stat().st_size / 2**20
    again = time.perf_counter()
    vlm.load(folder)
    return {
        "weights_mib": size,
        "reading_seconds": statistics.median(reading),
        "loading_seconds": loaded,
        "loading_again_seconds": time.perf_counter() - again,
        "loading_and_summing_seconds": touched,
        "resident_growth_mib": resident_mib() - before,
    }


def measure_peak(folder: Path) -> dict[str, float]:
    """The peak of a process that only loads and touches every weight, less what it held before."""
    import timm  # noqa: F401
    from transformers import RobertaModel  # noqa: F401

    import vlm

    vlm.load  # noqa: B018
    before = resident_mib()
    model = vlm.load(folder)
    for parameter in model.model.parameters():
        parameter.sum()
    # Not `ru_maxrss`, which a process inherits from the one that started it.
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return {"peak_growth_mib": int(line.split()[1]) / 1024 - before}


def measure_answering(folder: Path, batch: int, rounds: int) -> dict[str, float]:
    """`answer` on pixels beside the plain modules on tensors that are ready, in turn."""
    import torch

    import vlm
    from vlm.models.answering import answer_logits
    from vlm.types import Batch

    torch.set_num_threads(1)
    model = vlm.load(folder)
    pixels = torch.randint(256, (batch, 3, 224, 224), dtype=torch.uint8)
    questions = ["what color is the circle"] * batch
    ids, mask, _ = model.tokenizer(questions)
    ready = Batch(keys=tuple(questions), image=pixels, text_ids=ids, text_mask=mask)
    assert model.head is not None

    def bare() -> None:
        with torch.inference_mode():
            answer_logits(model.model, model.head, ready).sigmoid()  # type: ignore[arg-type]

    def ours() -> None:
        model.answer(pixels, questions, batch_size=batch)

    seconds: dict[str, list[float]] = {"bare": [], "answer": []}
    for number in range(rounds + 1):
        for name, work in (("bare", bare), ("answer", ours))[:: 1 if number % 2 else -1]:
            start = time.perf_counter()
            work()
            if number:
                seconds[name].append(time.perf_counter() - start)
    ratios = [ours / bare for ours, bare in zip(seconds["answer"], seconds["bare"], strict=True)]
    return {
        "batch": batch,
        "bare_seconds": statistics.median(seconds["bare"]),
        "answer_seconds": statistics.median(seconds["answer"]),
        "ratio": statistics.median(ratios),
        "ratio_least": min(ratios),
        "ratio_most": max(ratios),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("results.json"))
    parser.add_argument("--one", choices=("loading", "peak", "answering"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one is not None:
        work: dict[str, Any] = {"loading": measure_loading, "peak": measure_peak}
        found = (
            measure_answering(options.folder, options.batch, options.rounds)
            if options.one == "answering"
            else work[options.one](options.folder)
        )
        print(json.dumps(found))
        return
    with tempfile.TemporaryDirectory() as folder:
        exported = make_export(Path(folder))

        def run(one: str) -> Any:
            command = [sys.executable, __file__, "--one", one, "--folder", str(exported)]
            command += ["--rounds", str(options.rounds), "--batch", str(options.batch)]
            return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

        results = {
            "loading": [run("loading") for _ in range(options.rounds)],
            "peak": run("peak"),
            "answering": run("answering"),
        }
    options.results.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
