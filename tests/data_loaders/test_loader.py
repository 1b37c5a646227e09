"""Batch k of a run is the same on any rank, worker or restart, and a stranger's picture is met with one clear error."""

from __future__ import annotations

import io
import itertools
import pickle
import struct
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from data_loaders.collate import ImageBatches, PairBatches, QuestionBatches, TextBatches
from data_loaders.decoding import decode_image
from data_loaders.images import (
    DecodedImages,
    EncodedImages,
    GreyImages,
    MeanImages,
    ShuffledImages,
    derangement,
)
from data_loaders.loader import BatchSource, TrainOrder, evaluation_loader, step_seed, train_loader
from data_loaders.shards import ShardReader, write_shards
from data_loaders.transforms import Decode, ImageTransform
from vlm.errors import UserError
from vlm.models.language.tokenizer import Tokenizer
from vlm.supervision import CaptionsConfig, ClassNamesConfig
from vlm.types import Batch, Question, Record

COUNT, SIZE = 10, 4
COLORS = ("red", "green", "blue", "yellow", "white", "black", "gray", "pink", "brown", "purple")


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    data = io.BytesIO()
    image.save(data, kind)
    return data.getvalue()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    file: Path = tmp_path_factory.mktemp("texts") / "train.txt"
    file.write_text("\n".join(f"a {color} picture" for color in COLORS))
    return Tokenizer.from_words(file, vocabulary_size=64, max_tokens=8)


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> ShardReader:
    records = [
        Record(color, encoded(Image.new("RGB", (8, 8), color)), captions=(f"a {color} picture",), classes=(color[0],))
        for color in COLORS
    ]
    return ShardReader(write_shards(records, tmp_path_factory.mktemp("data") / "shards"))


@pytest.fixture
def pairs(reader: ShardReader, tokenizer: Tokenizer) -> PairBatches:
    """Pairs whose batches draw extra images from torch's generator."""
    images = DecodedImages(reader, ImageTransform(4))
    return PairBatches(reader, np.arange(COUNT), [CaptionsConfig()], images, tokenizer, negative_fraction=0.5)


@pytest.fixture
def texts(tokenizer: Tokenizer) -> TextBatches:
    return TextBatches([f"a {color} picture" for color in COLORS], tokenizer)


def keys_of(batches: Sequence[Batch]) -> list[str]:
    return [key for batch in batches for key in batch.keys]


def assert_same(first: Sequence[Batch], second: Sequence[Batch]) -> None:
    assert len(first) == len(second)
    for left, right in zip(first, second, strict=True):
        for field in fields(Batch):
            one, other = getattr(left, field.name), getattr(right, field.name)
            assert torch.equal(one, other) if isinstance(one, Tensor) else one == other, field.name


# --- Order -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "size"), [(10, 4), (10, 5), (3, 8), (1, 2), (7, 1)])
def test_each_example_appears_exactly_once_a_pass(count: int, size: int) -> None:
    order = TrainOrder(count, size, seed=0)
    numbers = [position for micro_batch in range(5 * count) for position in order.positions(micro_batch)]
    passes = [numbers[start : start + count] for start in range(0, len(numbers) - count + 1, count)]
    assert all(sorted(one) == list(range(count)) for one in passes)
    if count >= 7:
        assert len({tuple(one) for one in passes}) > 1  # shuffled anew


def test_the_order_is_a_function_of_seed_and_number() -> None:
    order = TrainOrder(COUNT, SIZE, seed=3)
    forwards = [order.positions(number) for number in range(12)]
    backwards = [TrainOrder(COUNT, SIZE, seed=3).positions(number) for number in reversed(range(12))]
    assert forwards == backwards[::-1]
    assert forwards != [TrainOrder(COUNT, SIZE, seed=4).positions(number) for number in range(12)]


def test_seeds_of_steps_differ_by_number_purpose_and_run() -> None:
    seeds = [step_seed(*of) for of in itertools.product((0, 1), range(50), ("step", "validation"))]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


# --- Training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [0, 1, 3, 5, 6])
def test_a_resumed_loader_gives_the_batches_of_an_uninterrupted_one(pairs: PairBatches, first: int) -> None:
    whole = list(train_loader(pairs, SIZE, 1, num_batches=6))
    resumed = train_loader(pairs, SIZE, 1, num_batches=6, first_batch=first)
    torch.manual_seed(99)
    assert_same(list(resumed), whole[first:])
    assert len(resumed) == 6  # of the run, as the trainer counts them


def test_reading_leaves_torchs_generator_alone(pairs: PairBatches) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    batches = iter(train_loader(pairs, SIZE, 1, num_batches=3))
    torch.manual_seed(5)
    assert len(list(batches)) == 3
    assert torch.equal(torch.rand(3), expected)


def test_no_workers_or_two_give_the_same_batches(pairs: PairBatches) -> None:
    alone, two = (list(train_loader(pairs, SIZE, 1, num_batches=5, num_workers=number)) for number in (0, 2))
    assert_same(alone, two)


@pytest.mark.parametrize("world_size", [2, 3])
def test_several_ranks_cover_the_micro_batches_of_one(pairs: PairBatches, world_size: int) -> None:
    alone = list(train_loader(pairs, SIZE, 1, num_batches=2 * world_size))
    ranks = [
        list(train_loader(pairs, SIZE, 1, num_batches=2, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    assert_same([batch for step in zip(*ranks, strict=True) for batch in step], alone)


def test_several_ranks_resume_where_they_were(pairs: PairBatches) -> None:
    for rank in (0, 1):
        whole, resumed = (
            list(train_loader(pairs, SIZE, 1, num_batches=4, first_batch=first, rank=rank, world_size=2))
            for first in (0, 3)
        )
        assert_same(resumed, whole[3:])


# --- Evaluation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 11])
def test_evaluation_covers_each_example_exactly_once_over_the_ranks(texts: TextBatches, world_size: int) -> None:
    ranks = [list(evaluation_loader(texts, SIZE, rank, world_size)) for rank in range(world_size)]
    assert sorted(keys_of(list(itertools.chain(*ranks)))) == sorted(f"text-{number}" for number in range(COUNT))
    assert all(len(batch.keys) <= SIZE for rank in ranks for batch in rank)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 11])
def test_even_evaluation_gives_every_rank_as_many_batches(texts: TextBatches, world_size: int) -> None:
    ranks = [list(evaluation_loader(texts, SIZE, rank, world_size, even=True)) for rank in range(world_size)]
    assert len({tuple(len(batch.keys) for batch in rank) for rank in ranks}) == 1
    counts = Counter(keys_of(list(itertools.chain(*ranks))))
    assert len(counts) == COUNT
    assert sum(counts.values()) - COUNT < world_size  # as few repeats as can be
    assert max(counts.values()) <= 2


def test_evaluation_gives_the_same_batches_from_a_worker(reader: ShardReader, tokenizer: Tokenizer) -> None:
    """Of questions too, whose targets a task makes."""
    asked = [Question(str(n), f"a {color} picture", (color,), (color,)) for n, color in enumerate(COLORS)]
    images = DecodedImages(reader, ImageTransform(4))
    source = QuestionBatches(asked, images, tokenizer, one_answer, len(COLORS), False)
    alone, one = (list(evaluation_loader(source, SIZE, num_workers=number)) for number in (0, 1))
    assert_same(alone, one)


def one_answer(question: Question) -> dict[int, float]:
    return {COLORS.index(question.answers[0]): 1.0}


def test_evaluation_keeps_the_order_of_the_source(texts: TextBatches) -> None:
    assert keys_of(list(evaluation_loader(texts, 3))) == [f"text-{number}" for number in range(COUNT)]


# --- Batches ---------------------------------------------------------------------------------------------------------


def test_sources_make_batches(pairs: PairBatches, texts: TextBatches) -> None:
    assert isinstance(pairs, BatchSource) and isinstance(texts, BatchSource)


def test_a_batch_of_pairs_holds_its_texts_then_extra_images(pairs: PairBatches, tokenizer: Tokenizer) -> None:
    batch = pairs.batch([3, 1, 1, 0])
    assert batch.image is not None and batch.text_ids is not None and batch.special_mask is not None
    assert len(batch.keys) == len(batch.image) == 4 + 2
    assert len(batch.text_ids) == len(batch.sources) == 4
    assert batch.sources == ("human",) * 4
    for key, ids, pixels in zip(batch.keys, batch.text_ids, batch.image, strict=False):
        assert tokenizer.decode(ids.tolist()) == f"a {key} picture"
        assert torch.equal(pixels, ImageTransform(4)(encoded(Image.new("RGB", (8, 8), key))))
    assert torch.equal(batch.special_mask, torch.isin(batch.text_ids, torch.tensor([0, 1, 2])))


def test_an_image_without_a_text_stays_in_its_batch(reader: ShardReader, tokenizer: Tokenizer) -> None:
    """Its text is empty: CLS and SEP alone."""
    without = Record("plain", encoded(Image.new("RGB", (8, 8))))
    mixed = ShardReader(write_shards([without, reader[0]], reader.index.folder.parent / "mixed"))
    images = DecodedImages(mixed, ImageTransform(4))
    batch = PairBatches(mixed, np.arange(2), [ClassNamesConfig()], images, tokenizer).batch([0, 1])
    of = dict(zip(batch.keys, batch.sources, strict=True))
    assert of == {"plain": "none", reader[0].key: "class_name"}
    assert batch.text_mask is not None
    assert int(batch.text_mask[batch.keys.index("plain")].sum()) == 2


def test_images_have_all_their_classes_as_targets(reader: ShardReader) -> None:
    classes = tuple(sorted({color[0] for color in COLORS}))
    images = DecodedImages(reader, ImageTransform(4))
    batch = ImageBatches(reader, np.arange(COUNT), classes, images).batch(range(COUNT))
    assert batch.targets is not None
    assert [classes[int(row.argmax())] for row in batch.targets] == [key[0] for key in batch.keys]
    assert torch.equal(batch.targets.sum(1), torch.ones(COUNT))
    with pytest.raises(UserError, match="has the unknown class"):
        ImageBatches(reader, np.arange(COUNT), classes[1:], images).batch(range(COUNT))


def questions_over(reader: ShardReader, tokenizer: Tokenizer, keys: tuple[str, ...], grey: bool = False) -> Batch:
    asked = [Question("1", "a red picture", keys, ("red",)), Question("2", "a blue picture", keys[::-1], ())]
    ids = {"red": 0, "blue": 1}
    images = GreyImages(4) if grey else DecodedImages(reader, ImageTransform(4))
    source = QuestionBatches(asked, images, tokenizer, lambda q: {ids[a]: 1.0 for a in q.answers}, 2, False)
    return source.batch([0, 1])


def test_a_question_without_a_known_answer_is_left_out_of_the_loss(reader: ShardReader, tokenizer: Tokenizer) -> None:
    targets = questions_over(reader, tokenizer, ("red",)).targets
    assert targets is not None
    assert targets.tolist() == [0, -100]


def test_two_images_of_a_question_lie_first_ones_first(reader: ShardReader, tokenizer: Tokenizer) -> None:
    batch = questions_over(reader, tokenizer, ("red", "blue"))
    assert batch.images_per_text == 2
    assert batch.image is not None
    means = batch.image.float().mean((2, 3)).argmax(1).tolist()  # 0 red, 2 blue
    assert means == [0, 2, 2, 0]


def test_the_baseline_that_may_not_look_sees_an_even_grey(reader: ShardReader, tokenizer: Tokenizer) -> None:
    image = questions_over(reader, tokenizer, ("red",), grey=True).image
    assert image is not None
    assert image.unique().tolist() == [127]


def test_the_mean_image_stands_for_every_image(reader: ShardReader) -> None:
    images = DecodedImages(reader, ImageTransform(4))
    mean = MeanImages(images, ["red", "blue"])(["green", "red", "unknown"])
    assert mean.shape == (3, 3, 4, 4)
    expected = images(["red", "blue"]).float().mean((0, 2, 3))
    assert torch.allclose(mean.float().mean((2, 3)), expected.expand(3, -1), atol=0.6)  # rounded once
    with pytest.raises(UserError, match="at least one training image"):
        MeanImages(images, [])


def test_every_image_gives_its_place_to_another() -> None:
    """A permutation without a fixed point, drawn by the seed, that keeps the two images of a pair together."""
    singles = [(f"image-{number}",) for number in range(50)]
    other = derangement([*singles, *singles[:7]], seed=0)
    assert sorted(other) == sorted(other.values()) == sorted(key for (key,) in singles)
    assert all(key != new for key, new in other.items())
    assert derangement(reversed(singles), seed=0) == other != derangement(singles, seed=1)
    pairs = [(f"{number}-img0", f"{number}-img1") for number in range(9)]
    for left, right in pairs:
        new = [derangement(pairs, seed=3)[key] for key in (left, right)]
        assert tuple(new) in pairs and tuple(new) != (left, right)
    assert derangement([("a",), ("b",)], seed=5) == {"a": "b", "b": "a"}
    with pytest.raises(UserError, match="all questions are about the same one"):
        derangement([("a",)] * 3, seed=0)


def test_shuffled_images_are_those_of_the_other_keys(reader: ShardReader) -> None:
    images = DecodedImages(reader, ImageTransform(4))
    shuffled = ShuffledImages(images, {"red": "blue", "blue": "red"})
    assert torch.equal(shuffled(["red", "red", "blue"]), images(["blue", "blue", "red"]))


def test_a_question_about_a_missing_image_names_it(reader: ShardReader, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="image 'nowhere' is asked for, but it is not here"):
        questions_over(reader, tokenizer, ("nowhere",))


def test_states_stand_in_for_pixels_under_the_same_keys(pairs: PairBatches) -> None:
    """Each image goes through the encoder once, whatever is asked for later."""
    seen: list[int] = []

    def encoder(pixels: Tensor) -> Tensor:
        seen.append(len(pixels))
        return pixels.float().mean((2, 3))[:, None]

    keys = pairs.image_keys()
    assert sorted(keys) == sorted(COLORS)
    states = EncodedImages.encode(pairs.images, keys, encoder, max_bytes=COUNT * 3 * 4, batch_size=4)
    assert states is not None and seen == [4, 4, 2]
    asked = ["blue", "red", "blue"]
    assert torch.equal(states(asked), pairs.images(asked).float().mean((2, 3))[:, None])
    assert EncodedImages.encode(pairs.images, keys, encoder, max_bytes=COUNT * 3 * 4 - 1, batch_size=4) is None


# --- Pictures --------------------------------------------------------------------------------------------------------


def with_transparent_left_half(mode: str) -> Image.Image:
    image = Image.new("RGBA", (4, 2), (255, 0, 0, 255))
    image.paste((0, 0, 255, 0), (0, 0, 2, 2))
    if mode == "P":
        palette = Image.new("P", (4, 2), 1)
        palette.putpalette([0, 0, 255, 255, 0, 0])
        palette.paste(0, (0, 0, 2, 2))
        palette.info["transparency"] = 0
        return palette
    return image.convert(mode)


@pytest.mark.parametrize(
    ("mode", "kind"), [("RGBA", "PNG"), ("LA", "PNG"), ("P", "PNG"), ("P", "GIF"), ("RGBA", "WEBP")]
)
def test_transparent_parts_become_white(mode: str, kind: str) -> None:
    data = io.BytesIO()
    options = {"lossless": True} if kind == "WEBP" else {}
    with_transparent_left_half(mode).save(data, kind, **options)
    image = decode_image(data.getvalue(), "picture")
    assert image.mode == "RGB"
    assert image.getpixel((0, 0)) == (255, 255, 255)
    assert image.getpixel((3, 1)) == ((255, 0, 0) if mode != "LA" else (76, 76, 76))


@pytest.mark.parametrize("mode", ["L", "1", "CMYK", "RGB"])
def test_every_usual_mode_becomes_rgb(mode: str) -> None:
    kind = "JPEG" if mode == "CMYK" else "PNG"
    image = decode_image(encoded(Image.new("RGB", (4, 2), "white").convert(mode), kind), "picture")
    assert (image.mode, image.size) == ("RGB", (4, 2))
    assert image.getpixel((1, 1)) == (255, 255, 255)


def png_claiming(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header promises many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


PHOTO = encoded(Image.effect_noise((64, 64), 50), "JPEG")
REFUSED = {
    "empty": b"",
    "text": b"no picture at all",
    "html": b"<html><body>404</body></html>",
    "cut short": PHOTO[: len(PHOTO) // 2],
    "broken": PHOTO[:200] + b"\xff\xd9" * 20,
    "another format": encoded(Image.new("RGB", (4, 4)), "TIFF"),
    "8001 x 8001": png_claiming(8001, 8001),
    "10000 x 10000": png_claiming(10000, 10000),
    "20000 x 20000": png_claiming(20000, 20000),
}


@pytest.mark.parametrize("data", REFUSED.values(), ids=REFUSED.keys())
def test_a_picture_that_cannot_be_used_is_one_line_that_names_it(data: bytes) -> None:
    with pytest.raises(UserError, match=r"^some-key: ") as caught:
        decode_image(data, "some-key")
    assert "\n" not in str(caught.value)


def test_a_claim_of_too_many_pixels_says_how_many_may_be() -> None:
    with pytest.raises(UserError, match=r"^big: 9000 x 9000 pixels is over the limit of 64,000,000$"):
        ImageTransform(4)(png_claiming(9000, 9000), "big")


def test_a_transform_gives_square_bytes() -> None:
    pixels = ImageTransform(6)(encoded(Image.new("RGB", (40, 10), (10, 20, 30))))
    assert (pixels.shape, pixels.dtype) == ((3, 6, 6), torch.uint8)
    assert pixels.flatten(1).unique(dim=1).tolist() == [[10], [20], [30]]


def test_bytes_and_pictures_are_transformed_alike() -> None:
    image = Image.effect_noise((40, 30), 50)
    transform = ImageTransform(8)
    assert torch.equal(transform(encoded(image)), transform(image))


def test_augmentation_draws_from_torchs_generator() -> None:
    image, transform = Image.effect_noise((16, 16), 80).convert("RGB"), ImageTransform(16, augmentation="randaugment")
    results = []
    for seed in (1, 1, 2, 3, 4):
        torch.manual_seed(seed)
        results.append(transform(image))
    assert torch.equal(results[0], results[1])
    assert any(not torch.equal(results[0], result) for result in results[2:])
    assert all((result.shape, result.dtype) == ((3, 16, 16), torch.uint8) for result in results)


# --- Decoding at reduced scale ---------------------------------------------------------------------------------------


def photo(width: int, height: int, **options: object) -> bytes:
    """A JPEG with soft and sharp places, as photos have them."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)).resize((width, height))
    sharp = Image.fromarray(rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)).resize((width, height))
    data = io.BytesIO()
    Image.blend(coarse, sharp, 0.2).save(data, "JPEG", quality=90, **options)
    return data.getvalue()


def gaps(data: bytes, pixels: int, interpolation: str = "bicubic") -> Tensor:
    """How many levels the reduced pixels lie from the exact ones."""
    reduced, exact = (ImageTransform(pixels, interpolation, decode=decode) for decode in DECODES)
    return (reduced(data).float() - exact(data).float()).abs()


DECODES: tuple[Decode, ...] = ("reduced", "exact")


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("shape", [(400, 300), (333, 517), (801, 799), (100, 640)])
def test_reduced_decoding_is_close_to_exact_decoding(shape: tuple[int, int], interpolation: str) -> None:
    """Sides that no scale divides too: pixels are not shifted."""
    difference = gaps(photo(*shape), 64, interpolation)
    assert difference.mean() < 1.5 and difference.max() < 20
    assert difference[:, :, -4:].mean() < 2 and difference[:, -4:].mean() < 2


def test_a_jpeg_that_no_scale_fits_is_decoded_whole() -> None:
    difference = gaps(photo(100, 80), 64)
    assert difference.mean() < 0.1 and difference.max() <= 1


def test_exact_decoding_is_pillows_and_so_is_all_that_is_no_jpeg() -> None:
    data = photo(400, 300)
    picture = Image.open(io.BytesIO(data))
    exact = ImageTransform(64, decode="exact")(data)
    assert torch.equal(exact, ImageTransform(64)(picture))  # a picture that is decoded already
    for kind in ("PNG", "WEBP"):
        other = encoded(picture, kind)
        assert torch.equal(*(ImageTransform(64, decode=decode)(other) for decode in DECODES))


@pytest.mark.parametrize("options", [{"subsampling": 0}, {"subsampling": 2}, {"progressive": True}, {"optimize": True}])
def test_jpegs_of_every_kind_are_decoded_at_reduced_scale(options: dict[str, object]) -> None:
    difference = gaps(photo(640, 480, **options), 64)
    assert 0 < difference.mean() < 1.5


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_colors_that_are_not_rgb_come_out_alike(mode: str) -> None:
    data = encoded(Image.open(io.BytesIO(photo(640, 480))).convert(mode), "JPEG")
    assert gaps(data, 64).mean() < 1.5


def test_orientation_is_left_as_it_is_stored() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    assert gaps(photo(640, 480, exif=exif), 64).mean() < 1.5


def test_both_ways_refuse_and_accept_the_same_jpegs() -> None:
    """Bytes that the fast decoder only warns of are for Pillow to judge."""
    whole = photo(640, 480)
    stray = whole[:2] + b"\0\0\0" + whole[2:]
    for data in (whole[:-9], whole + b"trailing", stray, whole[: len(whole) // 2], whole[:300], b"\xff\xd8\xff"):
        outcomes = []
        for decode in DECODES:
            try:
                outcomes.append(ImageTransform(64, decode=decode)(data, "some-key").float().mean())
            except UserError as error:
                outcomes.append(str(error))
        assert type(outcomes[0]) is type(outcomes[1])
        if isinstance(outcomes[0], str):
            assert outcomes[0] == outcomes[1]


def test_a_jpeg_that_claims_too_many_pixels_is_refused_before_it_is_decoded() -> None:
    data = bytearray(photo(16, 16))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", 14_000, 12_000)
    with pytest.raises(UserError, match=r"^big: 12000 x 14000 pixels is over the limit of 64,000,000$"):
        ImageTransform(4)(bytes(data), "big")


def test_a_transform_can_be_handed_to_a_worker() -> None:
    data = photo(400, 300)
    transform = ImageTransform(64)
    expected = transform(data)
    assert torch.equal(pickle.loads(pickle.dumps(transform))(data), expected)
