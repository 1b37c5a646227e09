"""Shards behind a URL or a command give the batches of those in a folder, and no more is fetched than is needed."""

from __future__ import annotations

import functools
import http.server
import io
import json
import re
import shlex
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import torch
from PIL import Image

from data_loaders import FolderData
from data_loaders.collate import ImageBatches
from data_loaders.images import DecodedImages
from data_loaders.loader import train_loader
from data_loaders.shards import ShardReader, write_shards
from data_loaders.transforms import ImageTransform
from vlm.cli import main
from vlm.config import Fingerprints, compose
from vlm.errors import UserError
from vlm.run import RunConfig, train
from vlm.supervision.subset import Window, window
from vlm.types import Batch, Record

COUNT, IN_SHARD = 120, 10


def png(number: int) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (4, 4), (number, 7, 9)).save(data, "PNG")
    return data.getvalue()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root of twelve shards to train on, and one to validate on."""
    root = tmp_path_factory.mktemp("remote")
    for split in ("train", "validation"):
        records = (Record(f"{split}-{n}", png(n), captions=(f"picture {n}",), classes=("c",)) for n in range(COUNT))
        write_shards(records, root / "unimodal" / split, IN_SHARD)
        shutil.copytree(root / "unimodal" / split, root / "pairs" / split)
        (root / "texts").mkdir(exist_ok=True)
        (root / "texts" / f"{split}.txt").write_text("\n".join(f"picture {n}" for n in range(COUNT)))
    return root


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("VLM_ALLOW_PIPE", "1")
    monkeypatch.setattr("data_loaders.remote.WAITS_SECONDS", (0.01, 0.01))
    return tmp_path / "cache" / "shards"


class Handler(http.server.SimpleHTTPRequestHandler):
    asked: list[str]
    failures: list[int]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        if self.failures and self.path.endswith(".tar"):
            self.send_error(self.failures.pop())
        else:
            super().do_GET()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(root: Path) -> Iterator[tuple[str, type[Handler]]]:
    """The root behind a web server of this machine, and what it was asked for."""
    handler = type("Counting", (Handler,), {"asked": [], "failures": []})
    made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=str(root)))
    thread = threading.Thread(target=made.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{made.server_port}", handler
    made.shutdown()
    thread.join()
    made.server_close()


def batches_of(location: str | Path, fraction: float = 1.0, **options: object) -> list[Batch]:
    data = FolderData.model_validate({"root": location, "part": "images", **options})
    reader = ShardReader(data.open_index(data.prepare(), "unimodal/train"))
    chosen = window(reader.index.hashes, fraction, 0)
    source = ImageBatches(reader, chosen, ("c",), DecodedImages(reader, ImageTransform(4)))
    return list(train_loader(source, 6, 0, len(source) // 6, shuffle_shards=data.shuffle_shards))


def tars_of(handler: type[Handler]) -> list[str]:
    return [path for path in handler.asked if path.endswith(".tar")]


def assert_same(first: list[Batch], second: list[Batch]) -> None:
    for one, other in zip(first, second, strict=True):
        assert one.keys == other.keys and torch.equal(one.image, other.image)


@pytest.mark.parametrize("kind", ["memory", "file", "pipe"])
def test_a_remote_root_gives_the_batches_of_a_folder(root: Path, kind: str) -> None:
    if kind == "memory":
        memory = fsspec.filesystem("memory")
        memory.put(str(root), "/bucket/data", recursive=True)
    location = {"memory": "memory://bucket/data", "file": root.as_uri(), "pipe": f"pipe:cat '{root}/{{}}'"}[kind]
    assert_same(batches_of(location), batches_of(root))
    assert_same(batches_of(location, shuffle_shards=2), batches_of(root, shuffle_shards=2))


def test_a_window_fetches_its_own_shards_once(root: Path, server: tuple[str, type[Handler]], cache: Path) -> None:
    url, handler = server
    expected = batches_of(root, 0.25)
    for _ in range(2):
        assert_same(batches_of(url, 0.25), expected)
        tars = tars_of(handler)
        assert len(tars) == len(set(tars)) <= 4  # 30 examples of 10 a shard, of 12 shards
    assert {file.suffix for file in cache.iterdir() if not file.name.startswith(".")} == {".tar"}
    assert sum(path.endswith("train/index.safetensors") for path in handler.asked) == 1


def test_shards_are_fetched_before_they_are_needed(
    root: Path, server: tuple[str, type[Handler]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_loaders.loader.READ_AHEAD", 24)
    url, handler = server
    data = FolderData(root=url, part="images")
    reader = ShardReader(data.open_index(data.prepare(), "unimodal/train"))
    source = ImageBatches(reader, Window(0, COUNT, COUNT), ("c",), DecodedImages(reader, ImageTransform(4)))
    loader = train_loader(source, 6, 0, num_batches=20, shuffle_shards=2)
    met: list[set[int]] = []
    for batch in loader:
        met.append({int(reader.index.shard[reader.position(key)]) for key in batch.keys})
        if len(met) == 12:
            break
    deadline = time.monotonic() + 10
    while len(tars_of(handler)) <= len(set().union(*met)):
        assert time.monotonic() < deadline, "nothing was fetched ahead"
        time.sleep(0.01)
    assert_same(batches_of(url, shuffle_shards=2), batches_of(root, shuffle_shards=2))


def test_the_cache_stays_within_its_bound(root: Path, cache: Path) -> None:
    shard = (root / "unimodal" / "train" / "00000.tar").stat().st_size
    location = root.as_uri()
    assert_same(batches_of(location, cache_gib=2.5 * shard / 2**30), batches_of(root))
    assert 1 <= len(list(cache.glob("*.tar"))) <= 2


def test_a_fetch_that_fails_is_tried_again(root: Path, server: tuple[str, type[Handler]]) -> None:
    url, handler = server
    handler.failures += [500, 503]
    assert_same(batches_of(url), batches_of(root))


def test_a_fetch_that_keeps_failing_names_the_url(server: tuple[str, type[Handler]]) -> None:
    url, handler = server
    handler.failures += [500] * 100
    with pytest.raises(UserError, match=rf"{url}/unimodal/train/0000\d\.tar: not fetched in 3 tries .*Resume the run"):
        batches_of(url)


def test_what_is_not_there_or_not_known_is_one_line(root: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere/unimodal/train/index\.json: not found"):
        batches_of(root.as_uri() + "/nowhere")
    with pytest.raises(UserError, match=r"unknown://host/unimodal/train/index\.json: cannot be fetched .*unknown"):
        batches_of("unknown://host")
    with pytest.raises(UserError, match=r"not fetched in 3 tries \(OSError: exit status 1 cat: .*No such file"):
        batches_of("pipe:cat /nowhere/{}")


def test_a_shard_that_is_not_what_the_index_says_is_refused(root: Path, tmp_path: Path) -> None:
    there = tmp_path / "there"
    shutil.copytree(root / "unimodal", there / "unimodal")
    file = there / "unimodal" / "train" / "00003.tar"
    file.write_bytes(file.read_bytes()[:-512])
    with pytest.raises(UserError, match=r"00003\.tar: .* bytes whose checksum is not that of its index"):
        batches_of(there.as_uri())
    header = json.loads((there / "unimodal" / "train" / "index.json").read_text())
    for shard in header["shards"]:
        shard["sha256"] = "../../x"
    (there / "unimodal" / "train" / "index.json").write_text(json.dumps(header))
    with pytest.raises(UserError, match=r"'\.\./\.\./x' is no SHA-256"):
        batches_of(there.as_uri())


def test_new_shards_under_the_same_url_are_read(root: Path, tmp_path: Path) -> None:
    there = tmp_path / "there"
    shutil.copytree(root / "unimodal", there / "unimodal")
    batches_of(there.as_uri())
    write_shards((Record(f"new-{n}", png(n), classes=("c",)) for n in range(60)), there / "unimodal" / "train", 20)
    assert_same(batches_of(there.as_uri()), batches_of(there))


def test_a_pipe_runs_only_where_its_user_lets_it(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLM_ALLOW_PIPE")
    with pytest.raises(UserError, match=r"pipe:touch .* runs a command\. If you trust it, set VLM_ALLOW_PIPE=1"):
        batches_of(f"pipe:touch {tmp_path}/ran {{}}")
    assert not (tmp_path / "ran").exists()
    monkeypatch.setenv("VLM_ALLOW_PIPE", "1")
    with pytest.raises(UserError, match=r"must hold \{\}"):
        batches_of("pipe:cat x")
    with pytest.raises(UserError, match="not fetched"):  # no shell stands between: `;` is part of a name
        batches_of(f"pipe:cat {{}}; touch {tmp_path}/ran")
    assert not (tmp_path / "ran").exists()


def test_a_pipe_is_given_as_the_readme_says(capsys: pytest.CaptureFixture[str]) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    (given,) = re.findall(r"`('?data\.root=[^`]*pipe:[^`]*)`", readme)
    assert main(["show", "pretrain", "data=folder", *shlex.split(given)]) == 0
    assert "root: pipe:ssh host cat /data/vl/{}" in capsys.readouterr().out


def test_a_root_without_texts_is_asked_for_them_once(root: Path, tmp_path: Path) -> None:
    there, asked = tmp_path / "there", tmp_path / "asked"
    shutil.copytree(root / "unimodal", there / "unimodal")
    script = tmp_path / "give"
    script.write_text(f'#!/bin/sh\necho "$1" >> {asked}\nexec cat "{there}/$1"\n')
    script.chmod(0o755)
    assert_same(batches_of(f"pipe:{script} {{}}"), batches_of(there))
    assert asked.read_text().splitlines().count("texts/train.txt") == 1


def test_a_task_wants_its_questions_in_a_folder() -> None:
    with pytest.raises(UserError, match=r"a URL serves pretraining alone\. Copy the data of the task into a folder"):
        compose("finetune", ["task=vqav2", "data=folder", "data.root=s3://bucket/data"], RunConfig)


def test_a_url_and_a_folder_are_told_apart() -> None:
    for text, remote in (("s3://b/x", True), ("pipe:cat {}", True), ("simplecache::https://h/x", True), ("/a", False)):
        data = compose("pretrain", ["data=folder", f"data.root='{text}'"], RunConfig).data
        assert data.is_remote is remote
        assert str(getattr(data, "root")) == text  # noqa: B009  # only this kind of data has one to give


def test_pretraining_from_a_url_ends_as_from_a_folder(root: Path, tmp_path: Path) -> None:
    small = ["model=tiny", "model.vision.width=32", "model.vision.depth=1", "model.language.width=32"]
    small += ["model.language.depth=1", "model.fusion.width=32", "model.fusion.depth=1", "trainer.accelerator=cpu"]
    small += ["trainer.progress=false", "trainer.batch_size=20", "trainer.samples=20", "data=folder"]
    states = []
    for name, location in (("folder", root), ("url", root.as_uri())):
        config = compose("pretrain", [*small, f"data.root={location}"], RunConfig)
        run = train(config.model_copy(update={"folder": tmp_path / name}))
        states.append(torch.load(run / "last.ckpt", weights_only=True)["state_dict"])
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_folders_runs_are_renamed_by_how_they_decode_even_at_its_default() -> None:
    """Runs from before `data.decode` was there decoded JPEGs whole; those of the world hold none."""
    folder = compose("pretrain", ["data=folder", "data.root=/data"], RunConfig).data
    assert Fingerprints()._identity(folder) == {"type": "folder", "root": "/data", "decode": "reduced"}
    assert Fingerprints()._identity(compose("pretrain", [], RunConfig).data) == {"type": "world"}
