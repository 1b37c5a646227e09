"""The procedural world, checked from its files: scenes are read back from the pictures, and every caption, question
and statement is judged by a parser of its words that shares no code with the generator."""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_loaders.shards import ShardReader, open_index
from data_loaders.world import drawing
from data_loaders.world.config import WorldConfig
from data_loaders.world.gqa import gqa_questions
from data_loaders.world.language import MAX_WORDS, caption, machine_labels
from data_loaders.world.nlvr2 import nlvr2_statements
from data_loaders.world.scenes import COLORS, PARTS, SHAPES, Scene, Thing, part_of, scenes_of
from data_loaders.world.vqav2 import vqav2_questions
from data_loaders.world.writing import paired_records, write_world
from vlm.errors import UserError
from vlm.types import Record

FIXTURES = Path(__file__).resolve().parents[3] / "shared" / "data" / "fixtures"
TINY = WorldConfig(
    num_pairs=60,
    num_validation_pairs=12,
    num_unimodal_images=60,
    num_texts=80,
    num_vqav2_train=160,
    num_gqa_train=160,
    num_nlvr2_train=80,
    num_evaluation=60,
    annotator_noise=0.0,
)
needs_fixtures = pytest.mark.skipif(not FIXTURES.is_dir(), reason=f"official example files are not at {FIXTURES}")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("worlds") / "world"
    write_world(TINY, root, progress=False)
    return root


# --- Reading pictures ---------------------------------------------------------------------------------------------


def seen(image: bytes) -> Scene:
    """The scene in a picture: by cell, the nearest color of its brightest pixel and the nearest sprite."""
    pixels = np.asarray(Image.open(io.BytesIO(image)), dtype=np.float32)
    cell = TINY.cell_pixels
    sprites = drawing.sprites(cell).reshape(len(SHAPES), -1, cell * cell)
    things = []
    for row, column in np.ndindex(TINY.grid, TINY.grid):
        patch = pixels[row * cell : (row + 1) * cell, column * cell : (column + 1) * cell].reshape(-1, 3)
        paint = patch[patch.max(1).argmax()]
        if paint.max() < 120:
            continue
        color = min(COLORS, key=lambda name: float(np.abs(unit(paint) - unit(np.array(drawing.RGB[name]))).sum()))
        light = patch.max(1)
        coverage = (light - light.min()) / (light.max() - light.min())
        distance = ((sprites - coverage) ** 2).sum(2).min(1)
        things.append(Thing(SHAPES[int(distance.argmin())], color, row, column))
    return Scene(tuple(things))


def unit(color: np.ndarray) -> np.ndarray:
    return color / np.linalg.norm(color)


def records(folder: Path) -> list[Record]:
    return list(ShardReader(open_index(folder)))


def pictures(folder: Path) -> dict[str, Scene]:
    return {record.key: seen(record.image) for record in records(folder)}


# --- Reading words ------------------------------------------------------------------------------------------------

NOUN = rf"((?:(?:{'|'.join(COLORS)}) )?(?:(?:{'|'.join(SHAPES)}|object)(?:e?s)?))"
SIDE = r"(left of|right of|above|below)"
NUMBER_WORDS = {"a": 1, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5}
SIDES: dict[str, Callable[[Thing, Thing], bool]] = {
    "left of": lambda a, b: a.column < b.column,
    "right of": lambda a, b: a.column > b.column,
    "above": lambda a, b: a.row < b.row,
    "below": lambda a, b: a.row > b.row,
}


def named(noun: str, scene: Scene) -> list[Thing]:
    words = noun.split()
    shape = next((s for s in SHAPES if words[-1].startswith(s)), None)
    color = words[0] if words[0] in COLORS else None
    return [t for t in scene.things if shape in (None, t.shape) and color in (None, t.color)]


def only(things: list[Thing]) -> Thing:
    assert len(things) == 1, "a question with 'the' needs exactly one such thing"
    return things[0]


def caption_holds(text: str, scene: Scene) -> bool:
    text = re.sub(r"^(there is|there are|the image contains|a picture of) ", "", text)
    return all(clause_holds(clause, scene) for clause in text.split(" and "))


def clause_holds(clause: str, scene: Scene) -> bool:
    if match := re.fullmatch(rf"a {NOUN} (?:is )?{SIDE} a {NOUN}", clause):
        return any(SIDES[match[2]](a, b) for a in named(match[1], scene) for b in named(match[3], scene))
    if match := re.fullmatch(rf"a {NOUN} in the (top|bottom)? ?(left|right|center)?", clause):
        row = {"top": 0, "bottom": 2}.get(match[2], 1)
        column = {"left": 0, "right": 2}.get(match[3], 1)
        return any((thing.row, thing.column) == (row, column) for thing in named(match[1], scene))
    match = re.fullmatch(rf"(\w+) {NOUN}", clause)
    assert match, clause
    return len(named(match[2], scene)) == NUMBER_WORDS[match[1]]


def answer_of(text: str, scene: Scene) -> str:
    """The answer to a question of VQAv2's or GQA's kind."""

    def is_(pattern: str) -> re.Match[str] | None:
        return re.fullmatch(pattern.replace("NOUN", NOUN).replace("SIDE", SIDE), text)

    def yes(fact: bool) -> str:
        return "yes" if fact else "no"

    if m := is_(r"is there a NOUN\?"):
        return yes(bool(named(m[1], scene)))
    if m := is_(r"is there a NOUN (and|or) a NOUN\?"):
        there = bool(named(m[1], scene)), bool(named(m[3], scene))
        return yes(all(there) if m[2] == "and" else any(there))
    if m := is_(r"how many NOUN are there\?"):
        return str(len(named(m[1], scene)))
    if m := is_(r"are there any NOUN\?"):
        return yes(bool(named(m[1], scene)))
    if m := is_(r"what is the (color|shape) of the NOUN\?"):
        return str(getattr(only(named(m[2], scene)), m[1]))
    if m := is_(r"what (color|shape) is the NOUN\?"):
        return str(getattr(only(named(m[2], scene)), m[1]))
    if m := is_(r"what (color|shape) is the object SIDE the NOUN\?"):
        anchor = only(named(m[3], scene))
        return str(getattr(only([t for t in scene.things if SIDES[m[2]](t, anchor)]), m[1]))
    if m := is_(r"is the NOUN SIDE the NOUN\?"):
        thing, anchor = only(named(m[1], scene)), only(named(m[3], scene))
        assert SIDES[m[2]](thing, anchor) or SIDES[m[2]](anchor, thing), "a tie must not be asked about"
        return yes(SIDES[m[2]](thing, anchor))
    if m := is_(r"is the NOUN (left|right|above|below) or SIDE the NOUN\?"):
        thing, anchor = only(named(m[1], scene)), only(named(m[4], scene))
        sides = {word.split()[0]: holds(thing, anchor) for word, holds in SIDES.items()}
        (true,) = [word for word in (m[2], m[3].split()[0]) if sides[word]]
        return true
    if m := is_(r"is the NOUN (?:a )?(\w+) or (?:a )?(\w+)\?"):
        (true,) = {m[2], m[3]} & {only(named(m[1], scene)).shape, only(named(m[1], scene)).color}
        return true
    if m := is_(r"is the NOUN (?:a )?(\w+)\?"):
        return yes(m[2] in (only(named(m[1], scene)).shape, only(named(m[1], scene)).color))
    if m := is_(r"do the NOUN and the NOUN have the same (color|shape)\?"):
        return yes(getattr(only(named(m[1], scene)), m[3]) == getattr(only(named(m[2], scene)), m[3]))
    m = is_(r"are there (more|fewer) NOUN than NOUN\?")
    assert m, text
    sign = 1 if m[1] == "more" else -1
    return yes(sign * len(named(m[2], scene)) > sign * len(named(m[3], scene)))


def statement_holds(text: str, left: Scene, right: Scene) -> bool:
    def counts(noun: str) -> tuple[int, int]:
        return len(named(noun, left)), len(named(noun, right))

    if m := re.fullmatch(rf"one image contains a {NOUN} and the other contains a {NOUN}", text):
        (a, b), (c, d) = counts(m[1]), counts(m[2])
        return bool((a and d) or (b and c))
    if m := re.fullmatch(rf"the (left|right) image contains more {NOUN} than the (left|right) image", text):
        a, b = counts(m[2])
        return a > b if m[1] == "left" else b > a
    if m := re.fullmatch(rf"there (?:is|are) exactly (\w+) {NOUN} in total", text):
        return sum(counts(m[2])) == NUMBER_WORDS[m[1]]
    if m := re.fullmatch(rf"both images contain the same number of {NOUN}", text):
        return len(set(counts(m[1]))) == 1
    m = re.fullmatch(rf"(.*) images? contains? a {NOUN}", text)
    assert m, text
    a, b = (count > 0 for count in counts(m[2]))
    return {
        "exactly one": a != b,
        "both": a and b,
        "at least one": a or b,
        "no": not a and not b,
        "the left": a,
        "the right": b,
        "only the left": a and not b,
        "only the right": b and not a,
    }[m[1]]


# --- The written files --------------------------------------------------------------------------------------------


def vqav2_rows(root: Path) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(image key, question, annotation) of every split."""
    for split in ("train2014", "val2014", "test2015"):
        questions = json.loads((root / f"vqav2/v2_OpenEnded_mscoco_{split}_questions.json").read_text())["questions"]
        annotations = json.loads((root / f"vqav2/v2_mscoco_{split}_annotations.json").read_text())["annotations"]
        for question, annotation in zip(questions, annotations, strict=True):
            assert question["question_id"] == annotation["question_id"]
            yield f"COCO_{split}_{question['image_id']:012d}", question["question"], annotation


def gqa_rows(root: Path) -> Iterator[dict[str, Any]]:
    for split in ("train", "val", "testdev"):
        yield from json.loads((root / f"gqa/{split}_balanced_questions.json").read_text()).values()


def nlvr2_rows(root: Path) -> Iterator[dict[str, Any]]:
    for split in ("train", "dev", "test1"):
        yield from map(json.loads, (root / f"nlvr2/{split}.json").read_text().splitlines())


def digests(root: Path) -> dict[str, str]:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_same_seed_gives_identical_bytes(world: Path, tmp_path: Path) -> None:
    write_world(TINY, tmp_path / "again", progress=False)
    assert digests(tmp_path / "again") == digests(world)
    assert list(tmp_path.iterdir()) == [tmp_path / "again"], "nothing temporary is left"


def test_other_numbers_of_pairs_and_texts_leave_every_other_part_the_same(world: Path, tmp_path: Path) -> None:
    write_world(TINY.model_copy(update={"num_pairs": 70, "num_texts": 20}), tmp_path / "other", progress=False)
    before, after = digests(world), digests(tmp_path / "other")
    changed = {name for name in before if before[name] != after[name]}
    assert {str(Path(name).parent) for name in changed} == {".", "pairs/train", "texts"}
    assert "texts/validation.txt" not in changed


def test_no_scene_appears_in_two_parts(world: Path) -> None:
    parts: dict[str, set[Scene]] = defaultdict(set)
    for part in ("pairs/train", "pairs/validation", "unimodal/train", "unimodal/validation"):
        parts[part] = set(pictures(world / part).values())
    splits = {"train": "train", "val": "validation", "dev": "validation", "test": "test"}
    for task in ("vqav2", "gqa", "nlvr2"):
        for key, scene in pictures(world / task / "images").items():
            split = {"n1": "train", "n2": "validation", "n3": "test"}.get(key[:2])
            split = split or next(name for start, name in splits.items() if re.match(rf"(COCO_)?{start}", key))
            parts[f"{task}/{split}"].add(scene)
    for part in ("texts/train", "texts/validation"):
        parts[part] = {scene for scene, _ in zip(scenes_of(TINY, part), range(500), strict=False)}
    assert set(parts) == set(PARTS)
    assert all(part_of(scene, TINY.grid) == part for part, scenes in parts.items() for scene in scenes)


def test_pictures_show_the_classes_of_their_records(world: Path) -> None:
    for folder in ("pairs/train", "unimodal/train"):
        for record in records(world / folder):
            assert set(seen(record.image).classes) == set(record.classes)


def test_every_caption_is_true_of_its_picture(world: Path) -> None:
    for record in records(world / "pairs/train"):
        (text,) = record.captions
        assert caption_holds(text, seen(record.image)), text


def test_captions_are_true_and_short_in_many_scenes() -> None:
    rng = np.random.default_rng(0)
    for scene, _ in zip(scenes_of(TINY, "pairs/train"), range(3000), strict=False):
        text = caption(scene, TINY.grid, rng)
        assert caption_holds(text, scene), (text, scene)
        assert len(text.split()) <= MAX_WORDS


def test_every_vqav2_answer_is_true_of_its_picture(world: Path) -> None:
    scenes = pictures(world / "vqav2/images")
    for key, question, annotation in vqav2_rows(world):
        assert annotation["multiple_choice_answer"] == answer_of(question, scenes[key]), question
        assert len(annotation["answers"]) == 10


def test_every_gqa_answer_is_true_of_its_picture(world: Path) -> None:
    scenes = pictures(world / "gqa/images")
    for row in gqa_rows(world):
        assert row["answer"] == answer_of(row["question"], scenes[row["imageId"]]), row["question"]


def test_every_nlvr2_label_is_true_of_its_pictures(world: Path) -> None:
    scenes = pictures(world / "nlvr2/images")
    for row in nlvr2_rows(world):
        pair = row["identifier"].rsplit("-", 1)[0]
        holds = statement_holds(row["sentence"], scenes[f"{pair}-img0"], scenes[f"{pair}-img1"])
        assert row["label"] == str(holds), row


def test_each_nlvr2_sentence_has_two_true_and_two_false_pairs(world: Path) -> None:
    groups: dict[str, list[str]] = defaultdict(list)
    for row in nlvr2_rows(world):
        split, sentence, _, last = row["identifier"].split("-")
        groups[f"{split}-{sentence}-{last} {row['sentence']}"].append(row["label"])
    assert {tuple(sorted(labels)) for labels in groups.values()} == {("False", "False", "True", "True")}


def test_equivalent_gqa_questions_have_the_same_answer_on_the_same_picture() -> None:
    config = TINY.model_copy(update={"num_gqa_train": 400})
    _, asked = gqa_questions(config, "train")
    answers = {(item.image, item.query.text): item.answer for item in asked}
    pairs = [(item.answer, answers.get((item.image, other.text))) for item in asked for other in item.query.rewordings]
    assert sum(other is not None for _, other in pairs) > 10
    assert all(answer == other for answer, other in pairs if other is not None)


# --- What words alone tell ----------------------------------------------------------------------------------------


def majority_share(rows: Iterable[tuple[str, str]]) -> float:
    """Accuracy of the most frequent answer to each exact question, on the same questions."""
    votes: dict[str, Counter[str]] = defaultdict(Counter)
    for question, answer in rows:
        votes[question][answer] += 1
    return sum(max(count.values()) for count in votes.values()) / sum(sum(count.values()) for count in votes.values())


def test_the_words_of_a_vqav2_question_tell_no_more_than_chance() -> None:
    _, asked = vqav2_questions(TINY.model_copy(update={"num_vqav2_train": 1000}), "train")
    chance = sum(1 / len(item.query.answers) for item in asked) / len(asked)
    assert majority_share((item.query.text, item.answer) for item in asked) <= chance + 0.01
    binary = [(item.query.text, item.answer) for item in asked if item.query.answers == ("yes", "no")]
    assert majority_share(binary) <= 0.51


def test_the_words_of_a_gqa_question_tell_no_more_than_chance() -> None:
    _, asked = gqa_questions(TINY.model_copy(update={"num_gqa_train": 1000}), "train")
    chance = sum(1 / len(item.query.answers) for item in asked) / len(asked)
    assert majority_share((item.query.text, item.answer) for item in asked) <= chance + 0.01
    assert {item.query.types[0] for item in asked} == {"verify", "query", "choose", "logical", "compare"}


def test_one_picture_of_an_exactly_one_statement_tells_nothing() -> None:
    scenes, judged = nlvr2_statements(TINY.model_copy(update={"num_nlvr2_train": 800}), "train")
    shows: dict[tuple[int, bool], list[bool]] = defaultdict(list)
    for item in judged:
        if item.statement.text.startswith("exactly one"):
            for side, image in enumerate((item.left, item.right)):
                shows[side, item.label].append(scenes[image].count(item.statement.phrase) > 0)
    assert {float(np.mean(values)) for values in shows.values()} == {0.5}


# --- Machine labels and annotators --------------------------------------------------------------------------------


def test_machine_labels_are_wrong_at_the_stated_rate_and_with_lower_scores() -> None:
    config = WorldConfig(label_noise=0.2)
    rng = np.random.default_rng(0)
    named_right = num_names = images_with_wrong = num_images = 0
    right, wrong = [], []
    for scene, _ in zip(scenes_of(config, "pairs/train"), range(2000), strict=False):
        labels = machine_labels(scene, config, rng)
        scores = [score for _, score in labels]
        assert scores == sorted(scores, reverse=True)
        assert all(0 < score < 1 for score in scores)
        assert len({name for name, _ in labels}) == len(labels)
        names = {thing.name for thing in scene.things}
        right += [score for name, score in labels if name in names]
        wrong += [score for name, score in labels if name not in names]
        named_right += sum(name in names for name, _ in labels)
        num_names += len(names)
        num_images += 1
        images_with_wrong += any(name not in names for name, _ in labels)
    assert named_right / num_names == pytest.approx(0.8, abs=0.02)
    assert len(wrong) == pytest.approx(0.1 * num_names + 0.2 * num_images, rel=0.1)
    assert np.mean(right) > np.mean(wrong) + 0.2


def test_no_label_noise_means_exactly_the_true_names() -> None:
    config = WorldConfig(label_noise=0.0)
    for record in paired_records(config, "pairs/train", 50):
        assert set(record.labels) == set(seen(record.image).names)


def test_annotators_err_at_the_stated_rate(tmp_path: Path) -> None:
    write_world(TINY.model_copy(update={"annotator_noise": 0.2}), tmp_path / "noisy", progress=False)
    rows = list(vqav2_rows(tmp_path / "noisy"))
    errors = [given["answer"] != a["multiple_choice_answer"] for _, _, a in rows for given in a["answers"]]
    assert float(np.mean(errors)) == pytest.approx(0.2, abs=0.04)


# --- Official layouts ---------------------------------------------------------------------------------------------


@needs_fixtures
def test_vqav2_files_have_the_official_fields(world: Path) -> None:
    for start, kind in (("v2_OpenEnded", "questions"), ("v2", "annotations")):
        ours = json.loads((world / f"vqav2/{start}_mscoco_val2014_{kind}.json").read_text())
        official = json.loads((FIXTURES / f"vqav2/{kind}.json").read_text())
        assert set(ours) == set(official)
        assert set(ours["info"]) == set(official["info"])
        assert set(ours["license"]) == set(official["license"])
        if kind == "questions":
            assert set(ours[kind][0]) == set(official[kind][0])
        else:  # the example lacks some fields that the files themselves have
            others = {"question_type", "multiple_choice_answer", "image_id", "answer_type"}
            assert set(ours[kind][0]) == set(official[kind][0]) | others
            assert set(ours[kind][0]["answers"][0]) == set(official[kind][0]["answers"][0])


@needs_fixtures
def test_gqa_files_have_the_official_fields(world: Path) -> None:
    (official,) = json.loads((FIXTURES / "gqa/questions.json").read_text()).values()
    for ours in gqa_rows(world):
        assert set(ours) == set(official)
        assert set(ours["semantic"][0]) == set(official["semantic"][0])
        for field in ("groups", "annotations", "types"):
            assert set(ours[field]) == set(official[field])


@needs_fixtures
def test_nlvr2_files_have_the_official_fields(world: Path) -> None:
    official = json.loads((FIXTURES / "nlvr2/tiny-dev.json").read_text().splitlines()[0])
    for ours in nlvr2_rows(world):
        assert set(ours) == set(official)


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # webdataset leaves them open
def test_webdataset_reads_the_shards(world: Path) -> None:
    import webdataset

    samples = list(webdataset.WebDataset(str(world / "pairs/train/00000.tar"), shardshuffle=False, empty_check=False))
    assert len(samples) == TINY.num_pairs
    assert all(sample["png"].startswith(b"\x89PNG") and b"captions" in sample["json"] for sample in samples)


def test_a_world_without_enough_scenes_says_so(tmp_path: Path) -> None:
    config = TINY.model_copy(update={"grid": 2, "min_objects": 2, "max_objects": 2, "num_pairs": 5000})
    with pytest.raises(UserError, match="different scenes exist"):
        write_world(config, tmp_path / "small", progress=False)
    assert not list(tmp_path.iterdir())


def test_only_another_world_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="exists and is no world"):
        write_world(TINY, tmp_path, progress=False)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
