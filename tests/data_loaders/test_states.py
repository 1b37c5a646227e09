"""States on disk are those that the encoder gives, whoever wrote them, and whatever became of the files."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from data_loaders import states
from data_loaders.shards import DamagedError
from data_loaders.states import StateStore
from vlm.types import Damage

KEYS = [f"key-{number}" for number in range(20)]
ROOM = 2**20


class Numbers:
    """Images that are known by their keys; `bad` ones are damaged."""

    def __init__(self, bad: Sequence[str] = ()) -> None:
        self.bad = bad

    def __call__(self, keys: Sequence[str]) -> Tensor:
        bad = {key: Damage("00000.tar", 0, "image", "is damaged") for key in keys if key in self.bad}
        if bad:
            raise DamagedError(dict(bad))
        return torch.tensor([[int(key.removeprefix("key-"))] for key in keys], dtype=torch.uint8)


class Encoder:
    """Counts what it encodes, and stops after so many batches."""

    def __init__(self, batches: int = 1000) -> None:
        self.batches, self.seen = batches, list[int]()

    def __call__(self, pixels: Tensor) -> Tensor:
        if not self.batches:
            raise KeyboardInterrupt
        self.batches -= 1
        self.seen += pixels[:, 0].tolist()
        return pixels.float()[:, None] * torch.ones(1, 3, 5)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StateStore:
    monkeypatch.setattr(states, "SEGMENT_BYTES", 4 * 3 * 5 * 4)  # four images a file
    return StateStore(tmp_path / "states", {"encoder": "numbers"})


def expected(keys: Sequence[str]) -> Tensor:
    return Encoder()(Numbers()(keys))


def test_what_is_there_is_not_encoded_again(store: StateStore) -> None:
    first = store.encode(Numbers(), KEYS[3:9], Encoder(), ROOM, 4)
    encoder = Encoder()
    second = store.encode(Numbers(), KEYS, encoder, ROOM, 4)
    assert set(encoder.seen) == set(range(20)) - set(range(3, 9))
    assert first is not None and second is not None
    asked = ["key-7", "key-3", "key-7"]
    assert torch.equal(first(asked), expected(asked)) and torch.equal(second(asked), expected(asked))
    assert torch.equal(pickle.loads(pickle.dumps(second))(KEYS), expected(KEYS))
    assert len(pickle.dumps(second)) < 5000  # another process maps the files itself
    other = Encoder()
    StateStore(store.root, {"encoder": "another"}).encode(Numbers(), KEYS[:4], other, ROOM, 4)
    assert other.seen == [0, 1, 2, 3]


def test_a_kill_loses_no_file_that_was_finished(store: StateStore) -> None:
    with pytest.raises(KeyboardInterrupt):
        store.encode(Numbers(), KEYS, Encoder(batches=3), ROOM, 4)
    (store.folder / ".partial-left").write_bytes(b"half")
    encoder = Encoder()
    found = store.encode(Numbers(), KEYS, encoder, ROOM, 4)
    assert found is not None and encoder.seen == list(range(12, 20))
    assert torch.equal(found(KEYS), expected(KEYS))
    assert not list(store.folder.glob(".partial*"))


@pytest.mark.parametrize("damage", ["cut", "a flipped bit", "no header", "nothing"])
def test_a_damaged_file_is_made_anew(store: StateStore, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    store.encode(Numbers(), KEYS, Encoder(), ROOM, 4)
    file = sorted(store.folder.glob("*.safetensors"))[1]
    content = bytearray(file.read_bytes())
    if damage == "a flipped bit":
        content[-7] ^= 4
    file.write_bytes({"cut": content[:-40], "a flipped bit": content, "no header": b"x" * 99, "nothing": b""}[damage])
    encoder = Encoder()
    found = store.encode(Numbers(), KEYS, encoder, ROOM, 4)
    assert found is not None and len(encoder.seen) == 4
    assert torch.equal(found(KEYS), expected(KEYS))
    assert f"{file.name}: damaged" in capsys.readouterr().err


def test_states_beyond_the_limit_are_not_begun(store: StateStore, capsys: pytest.CaptureFixture[str]) -> None:
    assert store.encode(Numbers(), KEYS, Encoder(), 20 * 3 * 5 * 4 - 1, 4) is None
    assert "trainer.frozen_states_disk_gib" in capsys.readouterr().err
    assert not list(store.folder.glob("*.safetensors"))


def test_a_folder_that_cannot_be_written_to_is_a_line_and_no_more(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "states").write_text("in the way")
    assert StateStore(tmp_path / "states", {}).encode(Numbers(), KEYS, Encoder(), ROOM, 4) is None
    assert "cannot be kept" in capsys.readouterr().err


def test_damaged_images_are_left_out_and_asked_for_again(store: StateStore) -> None:
    with pytest.raises(DamagedError):
        store.encode(Numbers(["key-5"]), KEYS, Encoder(), ROOM, 4)
    found = store.encode(Numbers(["key-5"]), KEYS, Encoder(), ROOM, 4, skip_damaged=True)
    assert found is not None and torch.equal(found(KEYS[6:]), expected(KEYS[6:]))
    with pytest.raises(DamagedError):
        found(["key-5"])
    mended = store.encode(Numbers(), KEYS, Encoder(), ROOM, 4)
    assert mended is not None and torch.equal(mended(KEYS), expected(KEYS))
