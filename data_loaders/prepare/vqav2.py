"""VQAv2 from its release: questions, annotations and COCO images.

Expected anywhere under the release's folder, unpacked or in zips: `v2_OpenEnded_mscoco_{split}_questions.json` of
train2014, val2014, test2015 and test-dev2015, `v2_mscoco_{split}_annotations.json` of the first two, and the images
`COCO_{train2014,val2014,test2015}_*.jpg`.
"""

from __future__ import annotations

from typing import Literal

from data_loaders.prepare.preparation import Options, preparation
from vlm.config import Config
from vlm.errors import UserError
from vlm.tasks.vqav2 import VQAv2Task, annotations_name, questions_name, read_questions

LICENCES = {
    "questions and annotations": "CC-BY-4.0",
    "images": "COCO: each under its own Flickr licence (cocodataset.org/#termsofuse)",
}


class VQAv2PreparerConfig(Config):
    """Which splits to prepare; None: those that are there."""

    type: Literal["vqav2"] = "vqav2"
    splits: tuple[Literal["train", "validation", "test", "test_dev"], ...] | None = None


def prepare_vqav2(config: VQAv2PreparerConfig, options: Options) -> None:
    """Write `<root>/vqav2`: the official files as they are, the images as shards, report and manifest."""
    with preparation("vqav2", options, LICENCES) as work:
        release = work.release
        files = {split: questions_name(name) for split, name in VQAv2Task.splits.items()}
        for split in work.splits(config.splits, files, release.find):
            questions = work.copy(release.find(files[split]), files[split])
            annotations, name = None, annotations_name(VQAv2Task.splits[split])
            if found := release.find(name):
                annotations = work.copy(found, name)
            elif split in ("train", "validation"):
                raise UserError(f"{release.folder}: {name}, which split {split} needs, is not here")
            asked = read_questions(questions, annotations)
            if split != "test_dev":  # a part of test
                asked = work.apart(questions, asked)
            work.ask(split, asked, training=split == "train")
