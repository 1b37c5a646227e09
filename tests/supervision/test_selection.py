"""Which pairs are seen at a fixed number of them."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_loaders.beside import select
from data_loaders.shards import ShardReader, open_index, ring_hash, write_shards
from vlm.errors import UserError
from vlm.supervision import BestByScoreConfig, SupervisionConfig
from vlm.supervision.selection import best_by_score
from vlm.types import Record

COUNT = 40
FRACTIONS = (0.0, 0.05, 0.3, 0.75, 1.0)
KEYS = [f"key-{number}" for number in range(COUNT)]


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> ShardReader:
    folder = tmp_path_factory.mktemp("data") / "train"
    records = [Record(key, b"picture", labels=("a", "b"), scores=(score_of(key), 0.0)) for key in KEYS]
    return ShardReader(write_shards(records, folder, examples_per_shard=16))


def score_of(key: str) -> float:
    """Ten values for forty keys, so that there are ties."""
    return (int(key.removeprefix("key-")) * 7 % 10) / 10


def write_scores(file: Path, keys: Sequence[str] = KEYS) -> Path:
    shuffled = random.Random(0).sample(list(keys), len(keys))
    if file.suffix == ".jsonl":
        file.write_text("".join(json.dumps({"key": key, "score": score_of(key)}) + "\n" for key in shuffled))
    elif file.suffix == ".csv":
        file.write_text("comment,score,key\n" + "".join(f'"a, b",{score_of(key)},{key}\n' for key in shuffled))
    elif file.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.table({"key": shuffled, "score": [score_of(key) for key in shuffled]}), file)
    else:
        write_shards([Record(key, labels=("x",), scores=(score_of(key),)) for key in shuffled], file)
    return file


def chosen(reader: ShardReader, fraction: float, keys: Path | None = None, **selection: Any) -> set[str]:
    given = {"selection": BestByScoreConfig(**selection)} if selection else {}
    positions = select(SupervisionConfig(fraction=fraction, keys=keys, **given), reader)
    assert (np.diff(positions) > 0).all() or not selection
    found = [reader.text(int(position)).key for position in positions]
    assert len(found) == len(set(found))
    return set(found)


@pytest.mark.parametrize("name", ["scores.jsonl", "scores.csv", "scores.parquet", "side"])
def test_every_form_of_scores_chooses_the_same(reader: ShardReader, tmp_path: Path, name: str) -> None:
    file = write_scores(tmp_path / name)
    for fraction in FRACTIONS:
        ranked = sorted(KEYS, key=lambda key: (-score_of(key), ring_hash(key)))
        assert chosen(reader, fraction, file=file) == set(ranked[: round(fraction * COUNT)])


def test_without_a_file_the_best_label_of_the_record_counts(reader: ShardReader, tmp_path: Path) -> None:
    file = write_scores(tmp_path / "scores.jsonl")
    assert chosen(reader, 0.3, file=None) == chosen(reader, 0.3, file=file)


def test_the_lowest_are_the_others(reader: ShardReader, tmp_path: Path) -> None:
    file = write_scores(tmp_path / "scores.jsonl")
    lowest = chosen(reader, 0.2, file=file, direction="lowest")
    assert {score_of(key) for key in lowest} == {0.0, 0.1}
    assert len(lowest) == 8
    assert not lowest & chosen(reader, 0.2, file=file)


@pytest.mark.parametrize("direction", ["highest", "lowest"])
def test_selections_are_nested_and_exact_in_count(reader: ShardReader, tmp_path: Path, direction: str) -> None:
    file = write_scores(tmp_path / "scores.csv")
    sets = [chosen(reader, fraction, file=file, direction=direction) for fraction in FRACTIONS]
    assert [len(one) for one in sets] == [round(fraction * COUNT) for fraction in FRACTIONS]
    assert all(small <= large for small, large in itertools.pairwise(sets))


def test_an_example_without_a_score_is_an_error_that_names_the_first_and_the_count(
    reader: ShardReader, tmp_path: Path
) -> None:
    file = write_scores(tmp_path / "scores.jsonl", KEYS[:30])
    first = min(KEYS[30:], key=ring_hash)
    with pytest.raises(UserError, match=rf"says nothing of 10 of 40 examples .* '{first}' the first.*missing=exclude"):
        chosen(reader, 0.5, file=file)
    assert chosen(reader, 0.5, file=file, missing="exclude") <= set(KEYS[:30])
    assert len(chosen(reader, 0.5, file=file, missing="exclude")) == 20  # the budget stays what it was
    with pytest.raises(UserError, match=r"30 examples have a score, but supervision\.fraction=0\.9 of 40 wants 36"):
        chosen(reader, 0.9, file=file, missing="exclude")


def test_scores_of_other_examples_are_no_matter(reader: ShardReader, tmp_path: Path) -> None:
    file = write_scores(tmp_path / "scores.jsonl", [*KEYS, *(f"key-{n}" for n in range(100, 150))])
    assert chosen(reader, 0.3, file=file) == chosen(reader, 0.3, file=None)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "s.jsonl",
            '{"key": "key-1", "score": 1}\n{"key": "key-1", "score": 2}\n',
            "records 1 and 2",
        ),
        ("s.jsonl", '{"key": "key-1", "score": "high"}\n', r"record 1 \(key-1\): expected a number under 'score'"),
        ("s.jsonl", '{"key": "key-1", "score": NaN}\n', "expected a number"),
        ("s.jsonl", '{"key": "key-1", "score": 1}\n{"key": "key-2", "sc', "record 2: cannot be read .* cut off"),
        ("s.jsonl", '["key-1", 3]\n', "record 1: has no text under 'key'"),
        ("s.csv", "name,score\nkey-1,1\n", "must name the columns"),
        ("s.csv", "key,score\nkey-1,1\nkey-2\n", "record 2: has 1 columns, and the header 2"),
        ("s.csv", "key,clip\nkey-1,1\n", r"expected a number under 'score'. Got None"),
        ("s.csv", 'key,score\n"key-1,1\n', "record 1: cannot be read"),
        ("s.xml", "<score/>", r"or a file that ends in .jsonl"),
    ],
)
def test_a_file_of_scores_that_cannot_be_used_is_one_clear_error(
    reader: ShardReader, tmp_path: Path, name: str, content: str, message: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        chosen(reader, 0.5, file=tmp_path / name)
    with pytest.raises(UserError, match="No such file"):
        chosen(reader, 0.5, file=tmp_path / "absent.jsonl")


# --- Keys ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["list.txt", "list.csv", "list.jsonl", "shards"])
def test_only_the_allowed_keys_are_seen_and_the_fraction_is_of_them(
    reader: ShardReader, tmp_path: Path, kind: str
) -> None:
    allowed, path = KEYS[5:25], tmp_path / kind
    if kind == "list.txt":
        path.write_text("".join(f"{key}\n" for key in allowed))
    else:
        write_scores(path, allowed)
    sets = [chosen(reader, fraction, keys=path) for fraction in FRACTIONS]
    assert [len(one) for one in sets] == [round(20 * fraction) for fraction in FRACTIONS]
    assert all(small <= large for small, large in itertools.pairwise(sets))
    assert sets[-1] == set(allowed)
    best = chosen(reader, 0.5, keys=path, file=write_scores(tmp_path / "scores.jsonl"))
    assert best == set(sorted(allowed, key=lambda key: (-score_of(key), ring_hash(key)))[:10])


def test_users_with_other_survivors_see_the_same_of_what_they_share(tmp_path: Path) -> None:
    keys = tmp_path / "common.txt"
    keys.write_text("\n".join(KEYS[10:30]))
    seen = []
    for name, own in (("one", KEYS[:30]), ("other", KEYS[10:])):
        write_shards([Record(key, b"picture") for key in own], tmp_path / name)
        seen.append(chosen(ShardReader(open_index(tmp_path / name)), 0.25, keys=keys))
    assert seen[0] == seen[1] and len(seen[0]) == 5


def test_a_key_that_the_data_lacks_is_an_error(reader: ShardReader, tmp_path: Path) -> None:
    (tmp_path / "keys.txt").write_text("key-1\nstranger\nkey-2\nother\n")
    with pytest.raises(UserError, match=r"2 of 4 keys are not in .*'stranger' the first"):
        chosen(reader, 0.5, keys=tmp_path / "keys.txt")


def test_more_than_there_are_scores_is_refused() -> None:
    with pytest.raises(ValueError, match=r"count must be in \[0, 1\]"):
        best_by_score(np.arange(2), np.array([0.5, np.nan]), 2, "highest")
