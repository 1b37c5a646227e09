"""Machine labels are what the model says of each image, whatever machine, batch or interruption they went through."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from rich.console import Console
from timm.data.config import resolve_model_data_config
from timm.data.transforms_factory import create_transform

from data_loaders.shards import ShardReader, open_index, write_shards
from vlm.cli import main
from vlm.errors import UserError
from vlm.labelling import LabellingConfig
from vlm.labelling.labellers import OpenClipLabeller, TimmLabeller, read_vocabulary
from vlm.labelling.labelling import Job, Outcome, label_shards, locally
from vlm.types import Record

sys.path.insert(0, str(Path(__file__).parent))  # made_up_labeller, as a user's own module lies beside the user
CUSTOM = {"type": "custom", "target": "made_up_labeller:Brightness"}
MODEL = "test_vit.r160_in1k"  # timm's own model for tests, 0.4M parameters


def png(level: int) -> bytes:
    data = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), level, dtype=np.uint8)).save(data, "PNG")
    return data.getvalue()


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """21 greys from black to white in 6 shards."""
    records = [Record(f"grey-{n}", png(min(255, 13 * n)), captions=(f"grey no. {n}",)) for n in range(21)]
    write_shards(records, tmp_path / "pairs", examples_per_shard=4)
    return tmp_path / "pairs"


def job(shards: Path, labeller: dict[str, Any] = CUSTOM, **settings: Any) -> Job:
    return Job(shards, LabellingConfig.model_validate({"labeller": labeller, "batch_size": 3} | settings))


def run(wanted: Job, to: Path, launch: Any = locally) -> Path:
    return label_shards(wanted, to, launch, Console(file=io.StringIO()), progress=False)


def labels_in(folder: Path) -> dict[str, Record]:
    return {record.key: record for record in ShardReader(open_index(folder))}


def files_in(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_each_image_has_its_own_labels_best_first(shards: Path, tmp_path: Path) -> None:
    labelled = labels_in(run(job(shards), tmp_path / "labels"))
    assert set(labelled) == {f"grey-{n}" for n in range(21)}
    best = {n: labelled[f"grey-{n}"].labels[0] for n in range(21)}
    assert (best[0], best[10], best[20]) == ("dark", "middling", "bright")
    for record in labelled.values():
        assert list(record.scores) == sorted(record.scores, reverse=True)
        assert not record.image and not record.captions
    few = labels_in(run(job(shards, max_labels=1, min_score=0.9), tmp_path / "few"))
    assert few["grey-0"].labels == ("dark",) and few["grey-5"].labels == ()


@pytest.mark.parametrize("change", [{"batch_size": 1}, {"batch_size": 64}, {"num_workers": 1}])
def test_labels_do_not_depend_on_how_images_are_batched(shards: Path, tmp_path: Path, change: dict[str, int]) -> None:
    expected = labels_in(run(job(shards), tmp_path / "labels"))
    assert labels_in(run(job(shards, **change), tmp_path / "others")) == expected


def test_an_interrupted_labelling_continues_to_the_same_files(shards: Path, tmp_path: Path) -> None:
    done: list[int] = []

    def launch(wanted: Job, numbers: Sequence[int]) -> Iterator[Outcome]:
        for outcome in locally(wanted, numbers):
            if len(done) == 3:
                done.append(-1)
                raise KeyboardInterrupt
            done.append(outcome[0])
            yield outcome

    with pytest.raises(KeyboardInterrupt):
        run(job(shards), tmp_path / "labels", launch)
    assert not (tmp_path / "labels").exists()
    run(job(shards), tmp_path / "labels", launch)
    assert sorted(done) == [-1, 0, 1, 2, 3, 4, 5]  # each shard once
    assert files_in(tmp_path / "labels") == files_in(run(job(shards), tmp_path / "undisturbed"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["labels", "pairs", "undisturbed"]


def test_what_was_begun_in_another_way_is_neither_continued_nor_removed(shards: Path, tmp_path: Path) -> None:
    def stops(wanted: Job, numbers: Sequence[int]) -> Iterator[Outcome]:
        yield next(locally(wanted, numbers))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(job(shards, max_labels=1), tmp_path / "labels", stops)
    with pytest.raises(UserError, match=r"\.labels-partial: was begun with other images, weights, labels or settings"):
        run(job(shards), tmp_path / "labels")
    run(job(shards, max_labels=1, batch_size=5), tmp_path / "labels")  # which changes no label
    assert files_in(tmp_path / "labels") == files_in(run(job(shards, max_labels=1), tmp_path / "undisturbed"))


def test_finished_labels_are_made_once_and_never_replaced(shards: Path, tmp_path: Path) -> None:
    def never(wanted: Job, numbers: Sequence[int]) -> Iterator[Outcome]:
        raise AssertionError("labelled again")

    run(job(shards), tmp_path / "labels")
    run(job(shards), tmp_path / "labels", never)
    with pytest.raises(UserError, match="labels: is there, and was made in another way"):
        run(job(shards, min_score=0.5), tmp_path / "labels", never)
    made_by = open_index(tmp_path / "labels").made_by
    assert made_by["model"] == "custom:made_up_labeller:Brightness"
    assert made_by["of"] == open_index(shards).fingerprint


def test_a_damaged_image_stops_or_is_named_and_left_without_labels(tmp_path: Path) -> None:
    records = [Record(f"grey-{n}", png(10 * n)) for n in range(5)] + [Record("torn", png(7)[:40])]
    write_shards(records, tmp_path / "pairs")
    with pytest.raises(UserError, match=r"00000\.tar: torn: the image cannot be decoded .*damaged=skip"):
        run(job(tmp_path / "pairs"), tmp_path / "labels")
    told = io.StringIO()
    console = Console(file=told, width=300)
    label_shards(job(tmp_path / "pairs", damaged="skip"), tmp_path / "labels", locally, console, progress=False)
    labelled = labels_in(tmp_path / "labels")
    assert len(labelled) == 6 and labelled["torn"].labels == () and all(labelled[f"grey-{n}"].labels for n in range(5))
    assert "1 images that cannot be read" in told.getvalue() and "00000.tar: torn" in told.getvalue()


def test_a_truncated_shard_stops_or_costs_what_it_lacks(shards: Path, tmp_path: Path) -> None:
    file = shards / "00003.tar"
    file.write_bytes(file.read_bytes()[:3000])  # one example of four is whole, of another the picture is gone
    with pytest.raises(UserError, match=r"00003\.tar: .*damaged=skip"):
        run(job(shards), tmp_path / "labels")
    told = io.StringIO()
    label_shards(job(shards, damaged="skip"), tmp_path / "labels", locally, Console(file=told, width=300), False)
    labelled = labels_in(tmp_path / "labels")
    assert len(labelled) == 19 and sum(not record.labels for record in labelled.values()) == 1
    assert "3 images that cannot be read" in told.getvalue() and told.getvalue().count("00003.tar") == 3


# --- The models ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A timm classifier of 6 classes, two of which share a name in the tests."""
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("weights") / "model.pth"
    model = timm.create_model(MODEL.split(".")[0])
    torch.nn.init.normal_(model.get_classifier().weight)
    torch.save(model.state_dict(), file)
    return file


def test_a_timm_labeller_scores_as_the_model_itself(weights: Path) -> None:
    vocabulary = tuple(f"class {number}" for number in range(1000))
    labeller = TimmLabeller(MODEL, str(weights), "softmax", vocabulary)
    model = timm.create_model(MODEL.split(".")[0]).eval()
    model.load_state_dict(torch.load(weights, weights_only=True))
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 70, 3), dtype=np.uint8))
    transform: Any = create_transform(**resolve_model_data_config(timm.create_model(MODEL)))
    with torch.inference_mode():
        found = labeller.scores(labeller.transform(picture)[None])
        assert torch.equal(found, model(transform(picture)[None]).softmax(-1))
    assert TimmLabeller(MODEL, str(weights), "softmax", None).labels[134] == "crane"  # timm knows ImageNet's names
    with pytest.raises(UserError, match="has 1000 classes, and the vocabulary 2 labels"):
        TimmLabeller(MODEL, str(weights), "softmax", ("cat", "dog"))


def test_other_weights_in_the_same_file_are_another_model(shards: Path, tmp_path: Path, weights: Path) -> None:
    vocabulary = tmp_path / "words.txt"
    vocabulary.write_text("".join(f"class {number}\n" for number in range(1000)))
    file = tmp_path / "weights.pth"
    states = torch.load(weights, weights_only=True)
    torch.save(states, file)
    wanted = job(shards, {"type": "timm", "name": MODEL, "weights": str(file)}, vocabulary=vocabulary)
    run(wanted, tmp_path / "labels")
    made_by = open_index(tmp_path / "labels").made_by
    assert made_by["model"].startswith("file:") and made_by["model"].endswith(f"(timm:{MODEL})")
    torch.save({name: value * 2 for name, value in states.items()}, file)
    with pytest.raises(UserError, match="labels: is there, and was made in another way"):
        run(wanted, tmp_path / "labels")


def test_classes_of_one_name_are_one_label(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text(
        "n00000001 dark, gloomy\nn00000002 grey\nn00000003 grey, gray\nn00000004 white\n"
    )
    apart = labels_in(run(job(shards, max_labels=4, min_score=0), tmp_path / "apart"))
    wanted = job(shards, max_labels=4, min_score=0, vocabulary=tmp_path / "words.txt")
    labelled = labels_in(run(wanted, tmp_path / "labels"))
    assert {len(record.labels) for record in labelled.values()} == {3}
    assert all(sum(record.scores) == pytest.approx(1, abs=1e-3) for record in labelled.values())
    assert labelled["grey-10"].labels[0] == "grey" and apart["grey-10"].labels[0] == "middling"


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A tiny CLIP that open_clip knows by its config, and a file of random weights."""
    open_clip = pytest.importorskip("open_clip")
    folder = tmp_path_factory.mktemp("clip")
    vision = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16}
    text = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1}
    (folder / "tiny-clip.json").write_text(json.dumps({"embed_dim": 32, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(folder / "tiny-clip.json")
    torch.manual_seed(0)
    torch.save(open_clip.create_model("tiny-clip").state_dict(), folder / "weights.pt")
    return "tiny-clip", folder / "weights.pt"


def test_a_clip_labeller_compares_the_image_with_each_sentence(clip: tuple[str, Path]) -> None:
    import open_clip

    name, file = clip
    templates = ("a photo of a {}.", "a drawing of a {}.")
    labeller = OpenClipLabeller(name, file, "softmax", templates, ("cat", "dog", "red circle"))
    model, _, transform = open_clip.create_model_and_transforms(name, pretrained=str(file))
    tokenizer = open_clip.get_tokenizer(name)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 70, 3), dtype=np.uint8))
    model.eval()
    with torch.inference_mode():
        image = model.encode_image(transform(picture)[None], normalize=True)
        logits = []
        for label in ("cat", "dog", "red circle"):
            texts = model.encode_text(tokenizer([template.format(label) for template in templates]), normalize=True)
            direction = torch.nn.functional.normalize(texts.mean(0), dim=0)
            logits.append((model.logit_scale.exp() * image @ direction).item())
        found = labeller.scores(labeller.transform(picture)[None])
        torch.testing.assert_close(found[0], torch.tensor(logits).softmax(0), rtol=1e-4, atol=1e-5)
        sigmoid = OpenClipLabeller(name, file, "sigmoid", templates, ("cat", "dog", "red circle"))
        torch.testing.assert_close(
            sigmoid.scores(labeller.transform(picture)[None])[0], torch.tensor(logits).sigmoid(), rtol=1e-4, atol=1e-5
        )


def test_the_command_labels_with_clip_and_says_where(
    shards: Path, tmp_path: Path, clip: tuple[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "words.txt").write_text("cat\ndog\n")
    name, file = clip
    arguments = ["label", str(shards), "--with", f"open_clip:{name}/mine", "--vocabulary", str(tmp_path / "words.txt")]
    assert main([*arguments, f"labeller.weights={file}", "min_score=0"]) == 0
    folder = tmp_path / "pairs-labels-tiny-clip-mine"
    assert folder.name in capsys.readouterr().out.replace("\n", "")
    assert all(set(record.labels) == {"cat", "dog"} for record in labels_in(folder).values())


# --- What is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--with", "resnet50"], "--with resnet50: expected timm:NAME, open_clip:NAME or custom:MODULE:CLASS"),
        (["--with", "timm:resnet5O"], "timm has no model 'resnet5O'. Did you mean 'resnet50'"),
        (["--with", "timm:test_vit.r160_in1k"], "Without network: download them elsewhere and give labeller.weights"),
        (["--with", "timm:resnet18", "labeller.weights=nowhere.pth"], "nowhere.pth: no such weights file"),
        (["--with", "open_clip:ViT-B-32/openai"], "--vocabulary: open_clip:ViT-B-32/openai can judge any label"),
        (["--with", "open_clip:ViT-B-33/openai", "--vocabulary", "words.txt"], "Did you mean 'ViT-B-32"),
        (["--with", "open_clip:ViT-B-32/nothing", "--vocabulary", "words.txt"], "with one of: openai, "),
        (["--with", "open_clip:ViT-B-32/openai", "--vocabulary", "words.txt"], "Without network: download them"),
        (["--with", "timm:resnet18", "--vocabulary", "twice.txt"], "twice.txt: line 3: 'cat' stands twice"),
        (["--with", "timm:resnet18", "--vocabulary", "empty.txt"], "empty.txt: holds no label"),
        (["--with", "timm:resnet18", "--vocabulary", "nowhere.txt"], "nowhere.txt: no such file"),
        (["--with", "timm:resnet18", "max_label=3"], "max_label: unknown key. Did you mean max_labels?"),
        (["--with", "timm:resnet18", "--address", "auto"], "--address and --workers belong to --on ray"),
    ],
)
def test_the_command_explains_what_is_wrong(
    shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    problem: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, text in (("words", "cat\ndog\n"), ("twice", "cat\ndog\ncat\n"), ("empty", "\n")):
        (tmp_path / f"{name}.txt").write_text(text)
    assert main(["label", str(shards), *arguments]) == 2
    error = capsys.readouterr().err
    assert problem in error and error.count("\n") == 1


def test_the_real_imagenet_names_are_a_vocabulary() -> None:
    file = Path(__file__).resolve().parents[3] / "shared" / "data" / "imagenet" / "LOC_synset_mapping.txt"
    if not file.is_file():
        pytest.skip(f"ImageNet's names are not at {file}")
    names = read_vocabulary(file)
    assert len(names) == 1000 and names[0] == "tench" and names.count("crane") == 2


# --- On a cluster ----------------------------------------------------------------------------------------------------


def on_a_cluster(shards: Path, to: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, with a cluster of this machine."""
    path = os.pathsep.join([str(Path(__file__).parents[2]), str(Path(__file__).parent)])
    arguments = ["label", str(shards), "--with", f"custom:{CUSTOM['target']}", "--on", "ray", "--workers", "2"]
    return subprocess.run(
        [sys.executable, "-m", "vlm.cli", *arguments, "--to", str(to), "batch_size=3", *overrides],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_ray_gives_the_same_files_though_a_worker_is_killed(shards: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    run(job(shards), tmp_path / "local")
    done = on_a_cluster(shards, tmp_path / "ray")
    assert done.returncode == 0, done.stderr
    assert files_in(tmp_path / "ray") == files_in(tmp_path / "local")
    done = on_a_cluster(shards, tmp_path / "killed", f"labeller.options.dies_once={tmp_path / 'died'}")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "died").exists()
    assert labels_in(tmp_path / "killed") == labels_in(tmp_path / "local")


@pytest.mark.slow
def test_ray_passes_on_what_is_wrong_with_an_image(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    write_shards([Record("torn", png(7)[:40])], tmp_path / "pairs")
    done = on_a_cluster(tmp_path / "pairs", tmp_path / "labels")
    assert done.returncode == 2
    assert re.search(r"error: .*00000\.tar: torn: the image cannot be decoded", done.stderr), done.stderr
