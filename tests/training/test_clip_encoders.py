"""Runs whose encoders are CLIP's towers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from clip_models import register
from PIL import Image

import vlm
from vlm.bookkeeping import ledger_of
from vlm.config import compose
from vlm.run import RunConfig, count_parameters, train

MakeConfig = Callable[..., RunConfig]
SHORT = "trainer.samples=16"


def test_both_towers_of_a_clip_model_are_pretrained_and_fine_tuned(make_config: MakeConfig, tmp_path: Path) -> None:
    pytest.importorskip("open_clip")
    register(tmp_path)
    towers = (
        "model.vision={type: open_clip, name: tiny-clip, pretrained: false, image_pixels: 48}",
        "model.language={type: open_clip, name: tiny-clip, pretrained: false, max_tokens: 17}",
    )
    first = train(make_config("pretrain", SHORT, *towers, folder="first"))
    larger = (towers[0].replace("48", "64"), towers[1], f"start_from='{first}'")  # positions are resampled
    last = train(make_config("finetune", SHORT, "task=nlvr2", *larger, folder="last"))
    model = vlm.load(last)
    answers = model.answer([(Image.new("RGB", (64, 64)),) * 2], ["both are red"])
    assert set(answers[0]) == {"True", "False"}


def test_what_clips_towers_have_seen_is_counted_once() -> None:
    pytest.importorskip("open_clip")
    ledger = ledger_of(compose("pretrain", ["model=clip", "supervision.fraction=0"], RunConfig), None)
    for components in (["vision"], ["language"], ["vision", "language"]):
        assert ledger.count("pairs", components).known == 400_000_000
    assert set(ledger.others()) == {"vision", "language"}  # the figure warns of a point that claims no pairs


def test_a_clip_model_is_counted_without_its_weights() -> None:
    pytest.importorskip("open_clip")
    counts = count_parameters(compose("pretrain", ["model=clip"], RunConfig))
    # open_clip's ViT-B-32 has 87,849,216 and 63,428,096 parameters; its two projections of 512 columns go, three
    # tokens come
    assert counts["vision"] == 87_849_216 - 768 * 512
    assert counts["language"] == 63_428_096 - 512 * 512 + 3 * 512
