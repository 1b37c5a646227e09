from __future__ import annotations

import pytest
from made_up_study import Finished, finish_study


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return finish_study(tmp_path_factory.mktemp("study"))
