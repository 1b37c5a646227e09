"""The commands of the pages that show how to add something, as they stand there, on a small world and a tiny model."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import vlm
from vlm.cli import main
from vlm.config import load_yaml
from vlm.errors import UserError
from vlm.run import RunConfig
from vlm.supervision.sources import supervise
from vlm.types import Record

DOCS = Path(__file__).parents[2] / "vlm" / "docs"
SMALL_WORLD = [
    "data.world.num_pairs=64",
    "data.world.num_validation_pairs=16",
    "data.world.num_unimodal_images=16",
    "data.world.num_texts=200",
    "data.world.num_vqav2_train=32",
    "data.world.num_gqa_train=32",
    "data.world.num_nlvr2_train=32",
    "data.world.num_evaluation=32",
]
SMALL = ["trainer.accelerator=cpu", "trainer.progress=false", "trainer.batch_size=16", "model.fusion.width=64"]


def run_page(name: str, num_samples: int = 32) -> list[Path]:
    """Run the commands of a page, the trainings in short, in the current folder; the runs that came out."""
    page = (DOCS / "pages" / "extend" / f"{name}.md").read_text()
    for example in re.findall(r"literalinclude} \.\./\.\./(examples/\w+\.py)", page):
        shutil.copy(DOCS / example, ".")
    for block in re.findall(r"```bash\n(.*?)```", page, re.DOTALL):
        for line in block.splitlines():
            run(shlex.split(line), num_samples)
    return sorted(path.parent for path in Path("runs").glob("*/result.json"))


def run(words: list[str], num_samples: int) -> None:
    if words[0] == "python":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", words[1:])
            runpy.run_path(words[1], run_name="__main__")
        return
    if words[0] != "vlm":
        subprocess.run(words, check=True)
        return
    if words[1] in ("show", "train"):
        is_world = not any(word.startswith("data=") for word in words)
        words = [*words, *(SMALL_WORLD if is_world else []), *SMALL, f"trainer.samples={num_samples}"]
    if any(word.startswith("model.fusion=") for word in words):
        words.remove("model.fusion.width=64")
    assert main(words[1:]) == 0


@pytest.fixture(autouse=True)
def beside_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of the test's own, whose modules are found as those of the folder where `vlm` runs are."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    for file in (DOCS / "examples").glob("*.py"):
        monkeypatch.delitem(sys.modules, file.stem, raising=False)


def result(run_folder: Path) -> dict[str, object]:
    content: dict[str, object] = json.loads((run_folder / "result.json").read_text())
    return content


def test_the_encoders_of_the_page_train_in_place_of_our_own() -> None:
    assert len(run_page("encoder")) == 2


def test_the_fusion_of_the_page_trains_and_is_loaded_again_only_where_it_is_trusted() -> None:
    [folder] = run_page("fusion")
    with pytest.raises(UserError, match="runs outside code"):
        vlm.load(folder)
    assert vlm.load(folder, trust_code=True).model.fusion.width == 64


def test_the_objective_of_the_page_is_logged_beside_the_others() -> None:
    [folder] = run_page("objective")
    metrics = result(folder)["metrics"]
    assert isinstance(metrics, dict)
    assert {"validation/words/loss", "validation/words/recall", "validation/matching/loss"} <= set(metrics)


def test_the_source_of_the_page_is_what_a_run_sees_and_counts_as_pairs() -> None:
    [folder] = run_page("source")
    [source] = load_yaml(folder / "config.yaml", RunConfig).supervision.sources
    example = supervise(Record("key", captions=("a red circle above a square",)), [source])
    assert (example.text, example.source) == ("a red circle", "human")
    ledger = json.loads((folder / "ledger.json").read_text())
    assert ledger["distinct"]["fusion"]["pairs"] == 64


def test_the_dataset_and_the_task_of_the_pages_are_prepared_trained_and_scored() -> None:
    [pretrained] = run_page("dataset")
    assert 15 <= int(str(result(pretrained)["examples"])) <= 30  # half of the training examples
    run_page("task")
    scores = result(Path("runs/side"))["scores"]
    assert isinstance(scores, dict)
    assert {"accuracy", "accuracy/red", "accuracy/green", "accuracy/blue"} <= set(scores)
    assert list(Path("runs/side").glob("scores-*-shuffled_images.json"))
