"""Pictures of predictions in TensorBoard."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vlm.config import fingerprint
from vlm.run import RunConfig, train


@pytest.mark.parametrize(("task", "width"), [("vqav2", 3 * 224), ("nlvr2", 3 * 448)])
def test_each_validation_draws_the_questions_that_are_asked_for(
    task: str, width: int, make_config: Callable[..., RunConfig]
) -> None:
    options = ("trainer.samples=32", "trainer.validate_every_steps=1", f"task={task}")
    config = make_config("finetune", *options, "trainer.validation_pictures=3")
    without = make_config("finetune", *options, "trainer.validation_pictures=0")
    assert fingerprint(config) == fingerprint(without)
    events = EventAccumulator(str(train(config)), size_guidance={"images": 0})
    events.Reload()
    drawn = events.Images("validation/predictions")
    assert [one.step for one in drawn] == [1, 2]
    assert Image.open(io.BytesIO(drawn[-1].encoded_image_string)).size == (width, 308)


def test_none_are_drawn_where_none_are_asked_for(make_config: Callable[..., RunConfig]) -> None:
    config = make_config("finetune", "trainer.samples=16", "trainer.validation_pictures=0")
    events = EventAccumulator(str(train(config)))
    events.Reload()
    assert "validation/predictions" not in events.Tags()["images"]
