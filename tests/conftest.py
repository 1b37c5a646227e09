from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from jaxtyping import install_import_hook

if TYPE_CHECKING:
    from tiny_runs import TableRun, TinyRun

# Before torch is imported: the test processes share the cores, and more threads than cores are slower than one.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"  # no network
os.environ["MPLBACKEND"] = "Agg"  # no display

# Before our modules are imported: the types and shapes in their signatures are checked at every call of a test.
install_import_hook(["vlm", "data_loaders"], "signatures.check")


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Data that is made on first use goes to a folder of this test process, never to the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def table_run(tmp_path_factory: pytest.TempPathFactory) -> TableRun:
    """A run on a user's own table, for all tests of a process; they change nothing of it."""
    from tiny_runs import table_run

    return table_run(tmp_path_factory.mktemp("table"))


@pytest.fixture(scope="session")
def statement_run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """A run on NLVR2, for all tests of a process; they change nothing of it."""
    from tiny_runs import statement_run

    return statement_run(tmp_path_factory.mktemp("statements") / "run")
