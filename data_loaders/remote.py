"""A data root that lies elsewhere: behind any URL that fsspec knows, or behind a command that prints a file.

What a run reads often (indexes, texts) is fetched once into a folder of the cache. Shards are fetched whole when their
first example is asked for, or shortly before, into a cache of a bounded size; they are named by their checksum, so that
no old one can pass for a new one. Ranks and workers of a machine share it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import os
import re
import shlex
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_loaders.cache import cache_folder
from vlm.errors import MissingFileError, UserError

REMOTE = r"^(pipe:|([a-z][a-z0-9+.-]*::)*[a-z][a-z0-9+.-]*://)"
"""What a remote root begins with. `pipe:COMMAND {}` runs a command that prints the file whose name replaces `{}`."""

PIPES_ALLOWED = "VLM_ALLOW_PIPE"
"""A pipe is a command, and a config may come from anyone: only who sets this variable to 1 lets pipes run."""

WAITS_SECONDS = (1.0, 4.0)  # before the second try and the third
NUM_LOCKS = 64
FETCHES_AT_ONCE = 4  # of each process that reads ahead


@dataclass(frozen=True)
class RemoteFolder:
    """A folder of a remote root; shards that are fetched from it share `cache_bytes` of disk."""

    root: str
    name: str  # with a slash at the end, or empty
    cache_bytes: int

    def folder(self, name: str) -> RemoteFolder:
        return RemoteFolder(self.root, f"{self.name}{name}/", self.cache_bytes)

    def url(self, file: str) -> str:
        """Where a file of this folder is fetched from."""
        if self.root.startswith("pipe:"):
            return self.root.replace("{}", f"{self.name}{file}")
        return f"{self.root.rstrip('/')}/{self.name}{file}"

    def fetch(self, file: str, to: Path, optional: bool = False) -> None:
        """Copy a file of this folder. Another try follows where the connection may be at fault.

        A command cannot say that there is no such file: of an `optional` one, its failure is taken for that.
        Raises a `MissingFileError` where there is no such file, and a `UserError` that names the URL otherwise.
        """
        url = self.url(file)
        for wait in (*WAITS_SECONDS, None):
            try:
                self._copy(file, to)
                return
            except UserError:
                raise
            except FileNotFoundError:
                raise MissingFileError(f"{url}: not found. Look whether data.root names a prepared data root") from None
            except (ImportError, ValueError) as error:  # fsspec says which package a protocol needs
                raise UserError(f"{url}: cannot be fetched ({error})") from None
            except Exception as error:  # every filesystem has errors of its own
                if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise UserError(
                        f"{to.parent}: no space is left. Lower data.cache_gib, or move $VLM_CACHE"
                    ) from None
                if optional and self.root.startswith("pipe:"):
                    raise MissingFileError(f"{url}: not found ({error})") from None
                if wait is None:
                    text = f"{type(error).__name__}: {error}"
                    tries = len(WAITS_SECONDS) + 1
                    raise UserError(f"{url}: not fetched in {tries} tries ({text}). Resume the run later") from None
                time.sleep(wait)

    def _copy(self, file: str, to: Path) -> None:
        if not self.root.startswith("pipe:"):
            import fsspec

            filesystem, path = fsspec.core.url_to_fs(self.url(file))
            filesystem.get_file(path, str(to))
            return
        if os.environ.get(PIPES_ALLOWED) != "1":
            raise UserError(f"data.root: {self.root} runs a command. If you trust it, set {PIPES_ALLOWED}=1")
        if "{}" not in self.root:
            raise UserError(f"data.root: {self.root} must hold {{}}, for which the file's name is put")
        # No shell: what is put for `{}` is one argument, whatever characters it holds.
        command = [part.replace("{}", f"{self.name}{file}") for part in shlex.split(self.root.removeprefix("pipe:"))]
        with to.open("wb") as output:
            try:
                done = subprocess.run(
                    command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.PIPE, check=False
                )
            except OSError as error:
                raise UserError(f"data.root: {command[0]} cannot be run ({error.strerror})") from None
        if done.returncode:
            said = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
            raise OSError(f"exit status {done.returncode} {' '.join(said)}".strip())

    # --- Shards ------------------------------------------------------------------------------------------------------

    def open_shard(self, shard: Mapping[str, Any]) -> int:
        """A file descriptor of the shard, fetched if it is not in the cache."""
        while True:
            try:
                return os.open(self._cached(shard), os.O_RDONLY)
            except FileNotFoundError:  # another process made room just now
                continue
            except OSError as error:
                raise _unusable(cache_folder() / "shards", error) from None

    def read_ahead(self, shards: Sequence[Mapping[str, Any]]) -> None:
        """Begin to fetch these shards. What fails is tried again, and reported, when a shard is asked for."""
        for shard in shards:
            if shard["sha256"] not in _ASKED:
                _ASKED.add(shard["sha256"])
                _pool().submit(self._fetch_ahead, shard)

    def _fetch_ahead(self, shard: Mapping[str, Any]) -> None:
        try:
            with contextlib.suppress(UserError):
                self._cached(shard)
        finally:
            _ASKED.discard(shard["sha256"])

    def _cached(self, shard: Mapping[str, Any]) -> Path:
        checksum = str(shard["sha256"])
        if not re.fullmatch("[0-9a-f]{64}", checksum):
            raise UserError(f"{self.url('index.json')}: {checksum[:80]!r} is no SHA-256. Prepare the shards again")
        folder = cache_folder() / "shards"
        file, partial = folder / f"{checksum}.tar", folder / f".{checksum}.partial"
        if _touched(file):
            return file
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / f".lock-{int(checksum[:2], 16) % NUM_LOCKS}"):
            if not _touched(file):
                try:
                    self.fetch(str(shard["file"]), partial)
                    with partial.open("rb") as content:
                        found = hashlib.file_digest(content, "sha256").hexdigest()
                    if found != checksum:
                        raise UserError(
                            f"{self.url(str(shard['file']))}: {partial.stat().st_size:,} bytes whose checksum is not "
                            f"that of its index, which says {int(shard['bytes']):,}. Upload the prepared folder again"
                        )
                    os.replace(partial, file)
                finally:
                    partial.unlink(missing_ok=True)
                _make_room(folder, self.cache_bytes, keep=file)
        return file

    # --- Indexes and texts -------------------------------------------------------------------------------------------

    def mirror(self, shard_folders: Sequence[str], texts: Sequence[str]) -> Path:
        """A folder of the cache with the indexes of these shard folders, and those of these texts that there are."""
        mirror = cache_folder() / f"remote-{hashlib.sha256(self.root.encode()).hexdigest()[:12]}"
        try:
            mirror.mkdir(parents=True, exist_ok=True)
            with _locked(mirror / ".lock"):
                for name in shard_folders:
                    self.folder(name)._fetch_index(mirror / name)
                for name in texts:
                    with contextlib.suppress(MissingFileError):
                        self._fetch_whole(name, mirror / name, optional=bool(shard_folders))
        except OSError as error:
            raise _unusable(mirror, error) from None
        return mirror

    def _fetch_index(self, folder: Path) -> None:
        """The arrays first, so that an index.json that is there has its arrays; both only if there are new ones."""
        header = folder / "index.json"
        former = header.read_bytes() if header.is_file() else None
        self._fetch_whole("index.json", folder / "index.json.new")
        if (folder / "index.json.new").read_bytes() != former or not (folder / "index.safetensors").is_file():
            header.unlink(missing_ok=True)
            self._fetch_whole("index.safetensors", folder / "index.safetensors")
        os.replace(folder / "index.json.new", header)

    def _fetch_whole(self, file: str, to: Path, optional: bool = False) -> None:
        to.parent.mkdir(parents=True, exist_ok=True)
        partial = to.with_name(f".{to.name}.partial")
        try:
            self.fetch(file, partial, optional)
            os.replace(partial, to)
        finally:
            partial.unlink(missing_ok=True)


def _unusable(folder: Path, error: OSError) -> UserError:
    """Of the cache: what the connection raises is a `UserError` by then."""
    return UserError(f"{folder}: cannot be used as a cache ({error.strerror}). Look at $VLM_CACHE and its disk")


_ASKED: set[str] = set()  # checksums of the shards that this process is fetching ahead


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(FETCHES_AT_ONCE, "read-ahead")


def _touched(file: Path) -> bool:
    """Whether the file is there; it then counts as used just now."""
    try:
        os.utime(file)
    except FileNotFoundError:
        return False
    return True


def _make_room(folder: Path, limit: int, keep: Path) -> None:
    """Remove the shards that were used longest ago until the rest fits. Who has one open can still read it."""
    with _locked(folder / ".lock"):
        files = sorted(folder.glob("*.tar"), key=lambda file: file.stat().st_mtime, reverse=True)
        total = 0
        for file in [keep, *(file for file in files if file != keep)]:
            total += file.stat().st_size
            if total > limit and file != keep:
                file.unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    """No other process or thread is inside at the same time."""
    with file.open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
