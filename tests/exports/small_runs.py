"""Runs of a few steps, and what a stranger could do to an export."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from vlm.config import compose
from vlm.run import RunConfig, train

SMALL = [
    "data.world.num_pairs=64",
    "data.world.num_validation_pairs=16",
    "data.world.num_unimodal_images=32",
    "data.world.num_texts=200",
    "data.world.num_vqav2_train=64",
    "data.world.num_gqa_train=64",
    "data.world.num_nlvr2_train=32",
    "data.world.num_evaluation=32",
    "model.vision.width=16",
    "model.vision.depth=1",
    "model.language.width=16",
    "model.language.depth=1",
    "model.language.vocabulary_size=64",
    "model.fusion.width=16",
    "model.fusion.depth=1",
    "trainer.accelerator=cpu",
    "trainer.progress=false",
    "trainer.batch_size=16",
]


def small_run(name: str, folder: Path, *overrides: str) -> Path:
    """A run of a few steps."""
    config = compose(name, [*SMALL, "trainer.samples=32", *overrides], RunConfig)
    return train(config.model_copy(update={"folder": folder}))


def borrowed_encoders(folder: Path) -> list[str]:
    """Overrides for small encoders of timm and transformers, the architecture of the latter written into `folder`."""
    from transformers import BertConfig

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    BertConfig(vocab_size=128, **sizes).save_pretrained(folder / "bert")
    return [
        "model.vision={type: timm, name: test_vit, pretrained: false, image_pixels: 64}",
        f"model.language={{type: transformers, name: bert, weights: {folder / 'bert'}, pretrained: false, "
        "tokenizer: words}",
    ]


def rewrite_manifest(folder: Path) -> None:
    """As a stranger would who changes files on purpose."""
    manifest = json.loads((folder / "export.json").read_text())
    names = [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]
    manifest["files"] = {
        name: {
            "bytes": (folder / name).stat().st_size,
            "sha256": hashlib.sha256((folder / name).read_bytes()).hexdigest(),
        }
        for name in names
        if name not in ("export.json", "README.md")
    }
    (folder / "export.json").write_text(json.dumps(manifest))
