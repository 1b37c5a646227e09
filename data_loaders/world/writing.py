"""Writes a whole world to a folder."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from rich.progress import Progress

from data_loaders.progress import progress_bar
from data_loaders.shards import write_shards
from data_loaders.world import gqa, nlvr2, vqav2
from data_loaders.world.config import FORMAT, WorldConfig
from data_loaders.world.drawing import draw
from data_loaders.world.language import caption, machine_labels
from data_loaders.world.scenes import Scene, scenes_of, stream
from vlm.errors import UserError
from vlm.types import Record

MANIFEST = "world.json"
SPLITS = ("train", "validation", "test")
CAPTION_FRACTION = 0.6  # of the unpaired texts; the others are questions and statements


def write_world(config: WorldConfig, root: Path, progress: bool = True) -> None:
    """Write the world to `root`, which appears whole or not at all. Nothing but another world is replaced."""
    if root.exists() and not (root / MANIFEST).is_file() and not (root.is_dir() and not any(root.iterdir())):
        raise UserError(f"{root}: exists and is no world (no {MANIFEST}). Choose another folder")
    root.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root.parent))
    try:
        with progress_bar(progress) as bar:
            counts = _write_parts(config, partial, bar)
        header = {"format": FORMAT, "config": config.model_dump(), "counts": counts}
        (partial / MANIFEST).write_text(json.dumps(header, indent=1))
        partial.chmod(0o755)
        if root.exists():
            shutil.rmtree(root)
        os.replace(partial, root)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _write_parts(config: WorldConfig, root: Path, bar: Progress) -> dict[str, int]:
    """Write every part; how many examples each one holds."""
    counts: dict[str, int] = {}
    images: dict[str, list[tuple[str, list[Scene], Callable[[str, int], str]]]] = {}
    task = bar.add_task("questions", total=None)
    for split in SPLITS:
        vqav2_scenes, vqav2_asked = vqav2.vqav2_questions(config, split)
        vqav2.write_vqav2(config, split, vqav2_asked, root / "vqav2")
        gqa_scenes, gqa_asked = gqa.gqa_questions(config, split)
        gqa.write_gqa(config, split, gqa_scenes, gqa_asked, root / "gqa")
        nlvr2_scenes, judged = nlvr2.nlvr2_statements(config, split)
        nlvr2.write_nlvr2(split, judged, root / "nlvr2")
        images.setdefault("vqav2", []).append((split, vqav2_scenes, vqav2.image_key))
        images.setdefault("gqa", []).append((split, gqa_scenes, gqa.image_key))
        images.setdefault("nlvr2", []).append((split, nlvr2_scenes, nlvr2.image_key))
        counts |= {f"vqav2/{split}": len(vqav2_asked), f"gqa/{split}": len(gqa_asked), f"nlvr2/{split}": len(judged)}
    for name, parts in images.items():
        counts[f"{name}/images"] = sum(len(scenes) for _, scenes, _ in parts)

    held_out = config.num_validation_pairs
    counts |= {"pairs/train": config.num_pairs, "pairs/validation": held_out}
    counts |= {"unimodal/train": config.num_unimodal_images, "unimodal/validation": held_out}
    folders = [name for name in counts if name.startswith(("pairs", "unimodal")) or name.endswith("images")]
    bar.update(task, description="images", total=sum(counts[name] for name in folders))

    def shown(records: Iterator[Record]) -> Iterator[Record]:
        for record in records:
            bar.advance(task)
            yield record

    for part in ("pairs/train", "pairs/validation", "unimodal/train", "unimodal/validation"):
        make = paired_records if part.startswith("pairs") else unimodal_records
        write_shards(shown(make(config, part, counts[part])), root / part)
    for name, parts in images.items():
        records = (
            record
            for split, scenes, key in parts
            for record in _image_records(config, f"{name}/{split}", split, scenes, key)
        )
        write_shards(shown(records), root / name / "images")

    (root / "texts").mkdir()
    for split, number in (("train", config.num_texts), ("validation", held_out)):
        counts[f"texts/{split}"] = number
        lines = unpaired_texts(config, f"texts/{split}", number)
        (root / "texts" / f"{split}.txt").write_text("".join(f"{line}\n" for line in lines))
    return counts


def paired_records(config: WorldConfig, part: str, number: int) -> Iterator[Record]:
    """Images with one caption, machine labels and true classes."""
    scenes = list(islice(scenes_of(config, part), number))
    words, machine = stream(config, f"{part}/captions"), stream(config, f"{part}/labels")
    for place, (scene, image) in enumerate(zip(scenes, draw(scenes, config, pixels(config, part)), strict=True)):
        labels = machine_labels(scene, config, machine)
        yield Record(
            key=f"{part.replace('/', '-')}-{place:08d}",
            image=image,
            captions=(caption(scene, config.grid, words),),
            labels=tuple(name for name, _ in labels),
            scores=tuple(score for _, score in labels),
            classes=scene.classes,
        )


def unimodal_records(config: WorldConfig, part: str, number: int) -> Iterator[Record]:
    """Images with their true classes and no text."""
    scenes = list(islice(scenes_of(config, part), number))
    for place, (scene, image) in enumerate(zip(scenes, draw(scenes, config, pixels(config, part)), strict=True)):
        yield Record(key=f"{part.replace('/', '-')}-{place:08d}", image=image, classes=scene.classes)


def unpaired_texts(config: WorldConfig, part: str, number: int) -> Iterator[str]:
    """Captions of scenes that are never drawn, and questions and statements that are asked of no scene."""
    rng = stream(config, part)
    for scene in islice(scenes_of(config, part), number):
        chance = (rng.random() - CAPTION_FRACTION) / (1 - CAPTION_FRACTION)
        if chance < 0:
            yield caption(scene, config.grid, rng)
        elif chance < 0.3:
            yield vqav2.draw_query(rng, config).text
        elif chance < 0.6:
            yield gqa.draw_query(rng).text
        else:
            yield nlvr2.draw_statement(rng, config).text


def pixels(config: WorldConfig, part: str) -> np.random.Generator:
    """The stream that all nuisance of a part's pictures comes from."""
    return stream(config, f"{part}/pixels")


def _image_records(
    config: WorldConfig, part: str, split: str, scenes: list[Scene], key: Callable[[str, int], str]
) -> Iterator[Record]:
    for place, image in enumerate(draw(scenes, config, pixels(config, part))):
        yield Record(key=key(split, place), image=image)
