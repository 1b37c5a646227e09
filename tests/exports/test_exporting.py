"""What `vlm export` writes is whole, describes itself, runs nothing, and gives the run's own numbers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from small_runs import borrowed_encoders, rewrite_manifest, small_run

import vlm
from vlm.cli import main
from vlm.config import fingerprint, load_yaml
from vlm.errors import UserError
from vlm.exporting import export
from vlm.exports import NAMES
from vlm.run import RunConfig, train

SCENES = [Image.new("RGB", (80, 60), color) for color in ("red", "blue", "green")]
QUESTIONS = ["what color is the circle?", "is there a square?", "how many circles are there?"]


def copied(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to / "copy"))


def test_an_export_answers_as_its_run_does(finetuned_run: Path, finetuned_export: Path) -> None:
    assert vlm.load(finetuned_export).answer(SCENES, QUESTIONS) == vlm.load(finetuned_run).answer(SCENES, QUESTIONS)


def test_an_export_holds_known_files_and_no_path_of_its_machine(finetuned_run: Path, finetuned_export: Path) -> None:
    files = [file for file in finetuned_export.rglob("*") if file.is_file()]
    assert {file.relative_to(finetuned_export).as_posix() for file in files} <= set(NAMES)
    for file in files:
        assert str(finetuned_run.parent).encode() not in file.read_bytes(), file
    manifest = json.loads((finetuned_export / "export.json").read_text())
    assert manifest["format"] == 1
    assert manifest["fingerprint"] == fingerprint(load_yaml(finetuned_run / "config.yaml", RunConfig))
    assert [entry.name for entry in finetuned_export.parent.iterdir() if entry.name.startswith(".")] == []


def test_the_card_says_what_it_is_how_it_scored_and_what_it_has_seen(finetuned_export: Path) -> None:
    card = (finetuned_export / "README.md").read_text()
    scores = json.loads((finetuned_export / "scores.json").read_text())["scores"]
    header = yaml.safe_load(card.split("---")[1])
    assert header["license"] == "unknown" and header["pipeline_tag"] == "visual-question-answering"
    assert f"| accuracy | {scores['accuracy']:.2f} |" in card
    assert "| fusion | 64 |" in card  # the pairs of the pretraining
    assert "began with random weights" in card and "drawn by this software" in card


def test_an_export_of_an_export_is_the_same_model(pretrained_export: Path, tmp_path: Path) -> None:
    again = export(pretrained_export, tmp_path / "again")
    first, second = (load_file(folder / "model.safetensors") for folder in (pretrained_export, again))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_starts_from_an_export_as_from_the_run_itself(
    pretrained_run: Path, pretrained_export: Path, tmp_path: Path
) -> None:
    config = load_yaml(pretrained_run / "config.yaml", RunConfig)
    data = {"samples": 16, "passes": None}
    made = []
    for start in (pretrained_run, pretrained_export):
        trainer = config.trainer.model_copy(update=data)
        update = {"start_from": start, "folder": tmp_path / start.name, "trainer": trainer}
        made.append(vlm.load(train(config.model_copy(update=update))).model.state_dict())
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])
    ledgers = [json.loads((tmp_path / name / "ledger.json").read_text()) for name in ("run", "exported")]
    assert ledgers[0] == ledgers[1]


def test_an_export_replaces_an_earlier_one_and_nothing_else(pretrained_run: Path, tmp_path: Path) -> None:
    folder = export(pretrained_run, tmp_path / "model")
    before = (folder / "export.json").stat().st_ino
    assert (export(pretrained_run, folder) / "export.json").stat().st_ino != before
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("mine")
    with pytest.raises(UserError, match="holds something else"):
        export(pretrained_run, tmp_path / "thesis")
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "mine"


def test_an_export_that_fails_leaves_nothing(pretrained_run: Path, tmp_path: Path) -> None:
    broken = copied(pretrained_run, tmp_path)
    (broken / "ledger.json").write_text("{")
    with pytest.raises(UserError, match="not a ledger"):
        export(broken, tmp_path / "model")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy"]


def test_the_command_exports_a_model_or_its_encoders(
    pretrained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(pretrained_run), str(tmp_path / "model")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "model")
    assert main(["export", str(pretrained_run), str(tmp_path / "encoders"), "--encoders"]) == 2
    assert "the vision encoder is a TinyVision, and no model of timm" in capsys.readouterr().err
    assert main(["train", str(tmp_path / "model")]) == 2
    assert "an exported run, which cannot be resumed" in capsys.readouterr().err


# --- Folders that somebody else made -----------------------------------------------------------------------------


def test_a_pickle_named_safetensors_is_refused_and_not_run(finetuned_export: Path, tmp_path: Path) -> None:
    folder = copied(finetuned_export, tmp_path)
    weights = folder / "model.safetensors"
    size = weights.stat().st_size
    torch.save({"state_dict": {}}, weights)
    rewrite_manifest(folder)
    with pytest.raises(UserError, match=r"model\.safetensors: not a whole safetensors file, and nothing in it was run"):
        vlm.load(folder)
    weights.write_bytes(b"\0" * size)
    with pytest.raises(UserError, match=r"model\.safetensors: (not a whole safetensors|has [\d,]+ bytes)"):
        vlm.load(folder)


def test_a_checkpoint_that_would_run_code_is_refused(pretrained_run: Path, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.mkdir, (tmp_path / "made",)  # type: ignore[return-value]

    folder = copied(pretrained_run, tmp_path)
    torch.save({"state_dict": Evil()}, folder / "last.ckpt")
    with pytest.raises(UserError, match=r"last\.ckpt: not a checkpoint that can be read safely"):
        vlm.load(folder / "last.ckpt")
    assert not (tmp_path / "made").exists()


def test_weights_of_other_shapes_are_refused_by_name(finetuned_export: Path, tmp_path: Path) -> None:
    folder = copied(finetuned_export, tmp_path)
    states = load_file(folder / "model.safetensors")
    name = "model.fusion.text_norm.weight"
    save_file(states | {name: torch.zeros(8)}, folder / "model.safetensors")
    rewrite_manifest(folder)
    with pytest.raises(UserError, match=rf"{name} has shape \(8,\) there and \(16,\) here.*load_partially"):
        vlm.load(folder)
    position = "model.vision.position"
    for odd in (torch.zeros(8), torch.zeros(1, 7, 16), torch.zeros(1, 9, 5), torch.zeros(0)):
        save_file(states | {position: odd}, folder / "model.safetensors")
        rewrite_manifest(folder)
        with pytest.raises(UserError, match=rf"{position} has shape .* there and \(1, \d+, 16\) here"):
            vlm.load(folder)
    save_file({key: value for key, value in states.items() if key != name}, folder / "model.safetensors")
    rewrite_manifest(folder)
    with pytest.raises(UserError, match=f"it lacks {name}"):
        vlm.load(folder)


def test_a_truncated_file_is_named(finetuned_export: Path, tmp_path: Path) -> None:
    folder = copied(finetuned_export, tmp_path)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model\.safetensors: has [\d,]+ bytes, and had [\d,]+ when it was exported"):
        vlm.load(folder)
    rewrite_manifest(folder)
    with pytest.raises(UserError, match=r"model\.safetensors: not a whole safetensors file"):
        vlm.load(folder)


@pytest.mark.parametrize("change", ["format", "key"])
def test_an_export_from_the_future_says_to_upgrade(finetuned_export: Path, tmp_path: Path, change: str) -> None:
    folder = copied(finetuned_export, tmp_path)
    manifest = json.loads((folder / "export.json").read_text()) | {"written_by": "vlm-less-supervision 9.0"}
    if change == "format":
        manifest["format"] = 2
    (folder / "export.json").write_text(json.dumps(manifest))
    if change == "key":
        tree = yaml.safe_load((folder / "config.yaml").read_text())
        tree["model"]["fusion"]["telepathy"] = True
        (folder / "config.yaml").write_text(yaml.safe_dump(tree))
        rewrite_manifest(folder)
    expected = "format 2, written by" if change == "format" else r"model\.fusion\.telepathy: unknown key"
    with pytest.raises(UserError, match=rf"{expected}.*vlm-less-supervision 9\.0.*pip install -U"):
        vlm.load(folder)


@pytest.mark.parametrize("name", ["../outside.json", "/etc/hostname", "language/../../outside.json"])
def test_a_name_that_leads_out_of_the_folder_is_refused(finetuned_export: Path, tmp_path: Path, name: str) -> None:
    folder = copied(finetuned_export, tmp_path)
    manifest = json.loads((folder / "export.json").read_text())
    manifest["files"][name] = manifest["files"]["config.yaml"]
    (folder / "export.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="leads out of the folder"):
        vlm.load(folder)


@pytest.mark.parametrize("name", ["answers.json", "model.safetensors", "export.json"])
def test_a_link_that_leads_out_of_the_folder_is_refused(finetuned_export: Path, tmp_path: Path, name: str) -> None:
    folder = copied(finetuned_export, tmp_path)
    (folder / name).rename(tmp_path / "outside")
    (folder / name).symlink_to(tmp_path / "outside")
    with pytest.raises(UserError, match=f"'{name}' leads out of the folder"):
        vlm.load(folder)


def test_an_export_with_files_of_its_own_is_refused(finetuned_export: Path, tmp_path: Path) -> None:
    folder = copied(finetuned_export, tmp_path)
    (folder / "modeling.py").write_text("raise SystemExit")
    vlm.load(folder)  # what the manifest does not list is never looked at
    rewrite_manifest(folder)
    with pytest.raises(UserError, match=r"'modeling\.py' is no file of an export"):
        vlm.load(folder)


def test_code_that_an_exported_config_names_is_not_run(finetuned_export: Path, tmp_path: Path) -> None:
    folder = copied(finetuned_export, tmp_path)
    tree = yaml.safe_load((folder / "config.yaml").read_text())
    tree["model"]["fusion"] = {"type": "custom", "target": "os:mkdir", "options": {"path": str(tmp_path / "made")}}
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    rewrite_manifest(folder)
    with pytest.raises(UserError, match=r"runs outside code \(os:mkdir\).*trust_code=True"):
        vlm.load(folder)
    assert not (tmp_path / "made").exists()


def test_a_config_that_unfolds_to_gigabytes_is_refused(finetuned_export: Path, tmp_path: Path) -> None:
    folder = copied(finetuned_export, tmp_path)
    laughs = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
    (folder / "config.yaml").write_text(laughs)
    rewrite_manifest(folder)
    with pytest.raises(UserError, match="holds a YAML alias"):
        vlm.load(folder)


@pytest.mark.parametrize(
    ("key", "value"), [("depth", 100_000), ("width", 2**30), ("width", 2**50), ("image_pixels", 2**20)]
)
def test_a_config_of_a_far_larger_model_than_its_weights_is_refused_at_once(
    finetuned_export: Path, tmp_path: Path, key: str, value: int
) -> None:
    folder = copied(finetuned_export, tmp_path)
    tree = yaml.safe_load((folder / "config.yaml").read_text())
    tree["model"]["vision"][key] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    rewrite_manifest(folder)
    start = time.process_time()
    with pytest.raises(
        UserError, match=r"copy: its config (asks for a model that is far larger|builds no model)"
    ) as one:
        vlm.load(folder)
    assert time.process_time() - start < 10
    assert "\n" not in str(one.value)


def test_a_language_config_of_a_far_larger_model_is_refused_at_once(tmp_path: Path) -> None:
    folder = export(small_run("pretrain", tmp_path / "run", *borrowed_encoders(tmp_path)), tmp_path / "exported")
    file = folder / "language" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_hidden_layers": 100_000}))
    rewrite_manifest(folder)
    start = time.process_time()
    with pytest.raises(UserError, match="asks for a model that is far larger than its weights"):
        vlm.load(folder)
    assert time.process_time() - start < 20


def test_what_is_no_model_is_one_line(tmp_path: Path, finetuned_export: Path) -> None:
    for path, message in (
        (tmp_path, "no run and no exported model here"),
        (tmp_path / "nothing", "no run and no exported model here"),
        (finetuned_export / "model.safetensors", "Load the folder that they lie in"),
        (finetuned_export / "last.ckpt", "an exported folder holds no checkpoint"),
    ):
        with pytest.raises(UserError, match=message):
            vlm.load(path)


def test_loading_imports_no_trainer(finetuned_export: Path) -> None:
    code = f"import sys, vlm\nvlm.load({str(finetuned_export)!r})\nassert 'lightning' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


@pytest.mark.parametrize("version", [1])
def test_an_export_of_an_earlier_format_gives_the_same_numbers_for_ever(version: int) -> None:
    folder = Path(__file__).parent / f"format-{version}"
    expected = json.loads((folder / "expected.json").read_text())
    scenes = [Image.new("RGB", (60, 40), color) for color in ("red", "blue")]
    pretrained, finetuned = (vlm.load(folder / name) for name in ("pretrained", "finetuned"))
    assert pretrained.match(scenes, "a red circle").tolist() == pytest.approx(expected["match"], abs=1e-5)
    filled = pretrained.fill_mask(scenes, "a [MASK] circle", top=3)
    assert [mask for one in filled for mask in one] == [
        pytest.approx(m, abs=1e-5) for o in expected["fill_mask"] for m in o
    ]
    answers = finetuned.answer(scenes, "what color is the circle?", top=3)
    assert answers == [pytest.approx(one, abs=1e-5) for one in expected["answer"]]
