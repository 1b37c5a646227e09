"""Pictures of predictions in TensorBoard."""

from __future__ import annotations

import io

from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_runs import TableRun, TinyRun

from vlm.config import compose, fingerprint
from vlm.run import RunConfig


def events(run: TinyRun) -> EventAccumulator:
    read = EventAccumulator(str(run.folder), size_guidance={"images": 0})
    read.Reload()
    return read


def test_each_validation_draws_the_questions_that_are_asked_for(statement_run: TinyRun) -> None:
    drawn = events(statement_run).Images("validation/predictions")
    assert [one.step for one in drawn] == [1, 2]
    sheet = Image.open(io.BytesIO(drawn[-1].encoded_image_string))
    assert sheet.size == (3 * 2 * 224, 308)  # three questions about two images
    first, second = sheet.crop((0, 0, 224, 224)), sheet.crop((224, 0, 448, 224))
    assert first.tobytes() != second.tobytes() and first.getextrema() != ((255, 255),) * 3


def test_none_are_drawn_where_none_are_asked_for(table_run: TableRun) -> None:
    assert "validation/predictions" not in events(table_run).Tags()["images"]


def test_pictures_are_no_part_of_what_a_run_is() -> None:
    configs = [compose("finetune", [f"trainer.validation_pictures={count}"], RunConfig) for count in (0, 3)]
    assert fingerprint(configs[0]) == fingerprint(configs[1])
