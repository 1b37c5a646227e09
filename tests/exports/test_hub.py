"""A loaded model in use: in batches of any size, from pictures in any form, alone or with the hub."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from small_runs import SMALL, borrowed_encoders, rewrite_manifest, small_run

import vlm
from data_loaders.decoding import ImageError
from vlm.cli import main
from vlm.config import compose
from vlm.errors import UserError
from vlm.exporting import export, export_encoders
from vlm.hub import LoadedModel, load_partially
from vlm.run import RunConfig, build_model

COLORS = ("red", "green", "blue", "yellow", "white")
SCENES = [Image.new("RGB", (60, 40), color) for color in COLORS]
TEXTS = ["a red circle", "a circle above a blue square", "a square", "two circles", "a green square"]


@pytest.fixture(scope="module")
def pretrained(pretrained_export: Path) -> LoadedModel:
    return vlm.load(pretrained_export)


def png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_batches_change_nothing(pretrained: LoadedModel, batch_size: int) -> None:
    whole, parts = pretrained.encode(SCENES, TEXTS), pretrained.encode(SCENES, TEXTS, batch_size=batch_size)
    torch.testing.assert_close(whole.pooled, parts.pooled)
    torch.testing.assert_close(pretrained.match(SCENES, TEXTS), pretrained.match(SCENES, TEXTS, batch_size=batch_size))
    torch.testing.assert_close(pretrained.encode_image(SCENES), pretrained.encode_image(SCENES, batch_size=batch_size))
    for left, right in zip(pretrained.encode_text(TEXTS), pretrained.encode_text(TEXTS, batch_size), strict=True):
        torch.testing.assert_close(left, right)


def test_pictures_paths_bytes_and_tensors_are_the_same(pretrained: LoadedModel, tmp_path: Path) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8))
    (tmp_path / "scene.png").write_bytes(png(picture))
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    forms = [picture, tmp_path / "scene.png", str(tmp_path / "scene.png"), png(picture), pixels, pixels / 255]
    states = pretrained.encode_image(forms)
    assert all(torch.equal(states[0], one) for one in states)
    assert torch.equal(pretrained.encode_image(torch.stack([pixels, pixels]))[1], states[0])


def test_pixels_that_mean_something_else_are_refused(pretrained: LoadedModel) -> None:
    for pixels, message in (
        (torch.zeros(48, 48, 3), r"shape \(3, h, w\). Got .* \(48, 48, 3\)"),
        (torch.full((3, 48, 48), 2.0), r"must lie in \[0, 1\]"),
        (torch.zeros(3, 48, 48, dtype=torch.int64), "must be uint8"),
    ):
        with pytest.raises(ValueError, match=message):
            pretrained.encode_image([pixels])


def test_an_image_of_168_megapixels_is_refused_in_every_form(pretrained: LoadedModel, tmp_path: Path) -> None:
    huge = png(Image.new("1", (16_000, 10_500)))
    (tmp_path / "huge.png").write_bytes(huge)
    forms = [tmp_path / "huge.png", huge, torch.zeros(1, dtype=torch.uint8).expand(3, 10_500, 16_000)]
    with pytest.warns(Image.DecompressionBombWarning):
        forms.append(Image.open(io.BytesIO(huge)))
    for form in forms:
        with pytest.raises(ImageError, match=r"16000 x 10500 pixels is over the limit of 64,000,000"):
            pretrained.encode_image([form])


def test_one_text_stands_for_all_images(pretrained: LoadedModel) -> None:
    one, many = pretrained.match(SCENES, "a circle"), pretrained.match(SCENES, ["a circle"] * 5)
    assert torch.equal(one, many) and bool(((one > 0) & (one < 1)).all())


def test_matching_is_what_the_objective_learnt(pretrained: LoadedModel, pretrained_run: Path) -> None:
    from vlm.run import read_checkpoint

    states = read_checkpoint(pretrained_run)["state_dict"]
    pooled = pretrained.encode(SCENES, TEXTS).pooled
    assert pooled is not None
    logits = pooled @ states["objectives.matching.head.weight"].T + states["objectives.matching.head.bias"]
    torch.testing.assert_close(pretrained.match(SCENES, TEXTS), logits.softmax(-1)[:, 1])


def test_masks_are_filled_in_order_with_probabilities(pretrained: LoadedModel) -> None:
    texts = ["a [MASK] circle", "a [MASK] circle above a [MASK] square"]
    filled = pretrained.fill_mask(SCENES[:2], texts, top=3)
    assert [len(one) for one in filled] == [1, 2]
    alone = pretrained.fill_mask(SCENES[1:2], texts[1:], top=3)[0]
    for there, here in zip(filled[1], alone, strict=True):
        assert list(there) == list(here) and there == pytest.approx(here)
        assert list(there.values()) == sorted(there.values(), reverse=True) and sum(there.values()) < 1
    everything = pretrained.fill_mask(SCENES[:1], texts[:1], top=pretrained.tokenizer.vocabulary_size)[0][0]
    assert sum(everything.values()) == pytest.approx(1, abs=1e-4)
    with pytest.raises(ValueError, match=r"needs a \[MASK\]"):
        pretrained.fill_mask(SCENES[:1], ["a red circle"])
    with pytest.raises(ValueError, match="within its first 32 tokens"):
        pretrained.fill_mask(SCENES[:1], ["a " * 40 + "[MASK]"])


def test_what_a_run_was_not_trained_for_is_one_line(pretrained: LoadedModel, finetuned_export: Path) -> None:
    with pytest.raises(UserError, match="was not fine-tuned on a task with answers"):
        pretrained.answer(SCENES, TEXTS)
    finetuned = vlm.load(finetuned_export)
    with pytest.raises(UserError, match="load the run that it started from"):
        finetuned.match(SCENES, TEXTS)
    answers = finetuned.answer(SCENES, "what color is it?", top=2, batch_size=2)
    assert [len(one) for one in answers] == [2] * 5
    assert answers[4] == pytest.approx(dict(list(finetuned.answer(SCENES[4:], ["what color is it?"])[0].items())[:2]))


def test_another_device_is_asked_for_at_loading(pretrained_export: Path) -> None:
    assert vlm.load(pretrained_export, device="meta").device.type == "meta"


# --- Encoders of others ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def borrowed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export of a run with small encoders of timm and transformers."""
    folder = tmp_path_factory.mktemp("borrowed")
    run = small_run("pretrain", folder / "run", *borrowed_encoders(folder), "trainer.samples=16")
    exported = export(run, folder / "exported")
    (folder / "bert" / "config.json").unlink()  # the export needs it no more
    return exported


def test_an_export_brings_the_architecture_of_its_encoders(borrowed: Path) -> None:
    assert (borrowed / "language" / "config.json").is_file()
    assert vlm.load(borrowed).match(SCENES, TEXTS).shape == (5,)


def test_loading_for_use_leaves_out_what_training_alone_needs(borrowed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a pass back through the encoder takes longer than loading its weights")

    monkeypatch.setattr(torch.autograd, "grad", refuse)
    vlm.load(borrowed)


def test_the_encoders_come_back_as_models_of_their_libraries(borrowed: Path, tmp_path: Path) -> None:
    import timm
    import transformers

    model = vlm.load(borrowed)
    vision, language = export_encoders(model, tmp_path)
    plain = timm.create_model(f"local-dir:{vision}", pretrained=True).eval()
    image = (model.pixels(SCENES) - model.model.pixel_mean) / model.model.pixel_std
    with torch.inference_mode():
        torch.testing.assert_close(plain.forward_features(image), model.encode_image(SCENES))
        torch.testing.assert_close(plain.forward_features(image), model.vision.timm_model.forward_features(image))
    same = timm.create_model("test_vit", img_size=64, num_classes=0, checkpoint_path=str(vision / "model.safetensors"))
    assert all(torch.equal(value, same.state_dict()[name]) for name, value in plain.state_dict().items())
    read, tokenizer = (
        kind.from_pretrained(language, local_files_only=True)
        for kind in (transformers.AutoModel, transformers.AutoTokenizer)
    )
    tokens = tokenizer(TEXTS, padding=True, return_tensors="pt")
    states, mask = model.encode_text(TEXTS)
    assert torch.equal(tokens["attention_mask"].bool(), mask)
    with torch.inference_mode():
        found = read.eval()(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).last_hidden_state
    torch.testing.assert_close(found[mask], states[mask])


def test_an_exported_language_encoder_loads_with_nothing_missing(borrowed: Path, tmp_path: Path) -> None:
    import transformers

    vlm.load(borrowed).language.save_pretrained(tmp_path / "language")
    options = {"add_pooling_layer": False, "local_files_only": True, "output_loading_info": True}
    _, report = transformers.AutoModel.from_pretrained(tmp_path / "language", **options)
    assert not any(report.values())


def test_encoders_with_adapters_come_back_merged(tmp_path: Path) -> None:
    import timm
    import transformers

    options = [f"+model.{encoder}.lora={{rank: 2}}" for encoder in ("vision", "language")]
    run = small_run("pretrain", tmp_path / "run", *borrowed_encoders(tmp_path), *options, "optimizer.learning_rate=0.1")
    model = vlm.load(export(run, tmp_path / "exported"))
    assert any(value.abs().max() > 0.01 for name, value in model.model.state_dict().items() if ".lora_B" in name)
    vision, language = export_encoders(model, tmp_path / "encoders")
    images = (model.pixels(SCENES) - model.model.pixel_mean) / model.model.pixel_std
    ids, mask, _ = model.tokenizer(TEXTS)
    states, text_states = model.encode_image(SCENES), model.encode_text(TEXTS)[0]
    close = {"rtol": 0, "atol": 1e-5}
    with torch.inference_mode():
        for plain in (model.vision.timm_model, timm.create_model(f"local-dir:{vision}", pretrained=True).eval()):
            assert not any("lora" in name or "base_layer" in name for name in plain.state_dict())
            torch.testing.assert_close(plain.forward_features(images), states, **close)
        read = transformers.AutoModel.from_pretrained(language, add_pooling_layer=False, local_files_only=True)
        for plain in (model.language.transformers_model, read.eval()):
            assert not any("lora" in name or "base_layer" in name for name in plain.state_dict())
            found = plain(input_ids=ids, attention_mask=mask.long()).last_hidden_state
            torch.testing.assert_close(found[mask], text_states[mask], **close)
        torch.testing.assert_close(model.encode_image(SCENES), states)  # the model keeps its adapters
    assert any(".lora_B" in name for name in model.model.state_dict())


def test_a_language_config_that_names_code_is_refused(borrowed: Path, tmp_path: Path) -> None:
    import shutil

    folder = Path(shutil.copytree(borrowed, tmp_path / "copy"))
    file = folder / "language" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"auto_map": {"AutoModel": "evil/repo--modeling.Evil"}}))
    rewrite_manifest(folder)
    with pytest.raises(UserError, match=r"'auto_map' would have code from elsewhere run"):
        vlm.load(folder)


# --- Loading in part ---------------------------------------------------------------------------------------------


def test_partial_loading_says_what_was_taken_what_is_new_and_what_was_left(pretrained_export: Path) -> None:
    from rich.console import Console

    same = [*SMALL, "seed=5"]
    there = vlm.load(pretrained_export).model.state_dict()
    model = build_model(compose("pretrain", [*same, "model.pooler=none"], RunConfig))
    found = load_partially(model, pretrained_export)
    assert set(found.taken) == set(model.state_dict()) and not found.new
    assert {name.split(".")[0] for name in found.left} == {"pooler", "objectives"}
    assert all(torch.equal(value, there[name]) for name, value in model.state_dict().items())

    deeper = build_model(compose("pretrain", [*same, "model.fusion.depth=2"], RunConfig))
    assert all(name.startswith("fusion.") for name in load_partially(deeper, pretrained_export).new)

    wider = build_model(compose("pretrain", [*same, "model.fusion.width=32"], RunConfig))
    before = wider.fusion.text_norm.weight.clone()
    with pytest.raises(UserError, match=r"has shape \(.*\) there and \(.*\) here.*skip=\['fusion'\]"):
        load_partially(wider, pretrained_export)
    skipped = ["fusion", "pooler", "vision_projection", "language_projection"]
    found = load_partially(wider, pretrained_export, skip=skipped)
    assert torch.equal(wider.fusion.text_norm.weight, before)
    assert {name.split(".")[0] for name in found.taken} == {"vision", "language"}
    console = Console(width=120, record=True, quiet=True)
    console.print(found.table())
    with pytest.raises(UserError, match="skip='fussion': neither the model nor"):
        load_partially(wider, pretrained_export, skip=["fussion"])


# --- Features ----------------------------------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    for number, scene in enumerate(SCENES):
        scene.save(folder / ("more" if number > 2 else ".") / f"{number}.png")
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.mark.parametrize("suffix", ["parquet", "safetensors"])
def test_features_are_the_states_of_each_image(
    pretrained: LoadedModel, pretrained_export: Path, pictures: Path, tmp_path: Path, suffix: str
) -> None:
    out = tmp_path / f"features.{suffix}"
    command = ["features", str(pretrained_export), str(pictures), "--out", str(out), "--batch-size", "2"]
    assert main(command) == 0
    names = ["0.png", "1.png", "2.png", "more/3.png", "more/4.png"]
    expected = pretrained.encode_image(SCENES)[:, 0]
    if suffix == "parquet":
        import pyarrow.parquet

        table = pyarrow.parquet.read_table(out)
        found, features = table["image"].to_pylist(), torch.tensor(table["features"].to_pylist())
    else:
        with safe_open(out, "pt") as opened:
            found, features = json.loads(opened.metadata()["images"]), opened.get_tensor("features")
    assert found == names
    torch.testing.assert_close(features, expected)


def test_a_damaged_image_is_named_and_leaves_no_file(
    pretrained_export: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (pictures / "more" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    out = tmp_path / "features.parquet"
    command = ["features", str(pretrained_export), str(pictures), "--out", str(out)]
    assert main(command) == 2
    assert "more/broken.png: the image cannot be decoded" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["pictures"]
    assert main([*command, "--damaged", "skip"]) == 0
    captured = capsys.readouterr()
    assert "left out" in captured.err and "broken.png" in captured.err.replace("\n", "")
    assert "5 images" in captured.out
