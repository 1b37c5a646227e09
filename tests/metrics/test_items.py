from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from vlm.errors import UserError
from vlm.metrics.bootstrap import intervals, mean_replicates, replicates
from vlm.metrics.items import make_items, read_items, write_items
from vlm.metrics.tally import Tally


def test_items_read_back_as_they_were_written(tmp_path: Path) -> None:
    items = make_items(["a", "b", "c"], [0.3, 1, 0], ["x", "y", "x"])
    write_items(tmp_path / "items.safetensors", items)
    read = read_items(tmp_path / "items.safetensors")
    assert read.values.tolist() == items.values.tolist()
    assert read.clusters.tolist() == [0, 1, 0]
    assert read.questions == items.questions
    assert read.percent == pytest.approx(130 / 3)
    assert list(tmp_path.iterdir()) == [tmp_path / "items.safetensors"]


def test_colleagues_may_read_what_is_written(tmp_path: Path) -> None:
    write_items(tmp_path / "items.safetensors", make_items(["a"], [1], ["x"]))
    (tmp_path / "new").touch()
    assert (tmp_path / "items.safetensors").stat().st_mode == (tmp_path / "new").stat().st_mode


def test_the_hash_of_the_questions_tells_their_order() -> None:
    def digest(*ids: str) -> str:
        return make_items(ids, [0.0] * len(ids), ids).questions

    assert digest("a", "b") != digest("b", "a")
    assert digest("a", "b") == digest("a", "b")


@pytest.mark.parametrize(
    ("values", "clusters"),
    [([0.5], [0, 1]), ([], []), ([float("nan")], [0]), ([0.5], [7]), ([0.5], [-1])],
)
def test_what_cannot_be_scores_of_questions_is_refused(
    values: list[float], clusters: list[int], tmp_path: Path
) -> None:
    file = tmp_path / "items.safetensors"
    arrays = {"values": np.asarray(values, np.float32), "clusters": np.asarray(clusters, np.int32)}
    save_file(arrays, file, {"questions": "digest"})
    with pytest.raises(UserError, match=r"items\.safetensors: .* Evaluate the run again"):
        read_items(file)


def test_no_pickle_and_no_damaged_file_is_read(tmp_path: Path) -> None:
    file = tmp_path / "items.safetensors"
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    for content in ((tmp_path / "objects.npy").read_bytes(), b"", b"\xff" * 64):
        file.write_bytes(content)
        with pytest.raises(UserError, match="holds no scores of questions"):
            read_items(file)


def test_replicates_of_many_runs_are_those_of_each_run_alone() -> None:
    random = np.random.default_rng(0)
    values, clusters = random.random((3, 40)).astype(np.float32), (np.arange(40) // 3).astype(np.int32)
    together = mean_replicates(values, clusters, 120, seed=5)
    for row, of_run in zip(values, together.T, strict=True):
        tally = Tally(scale=1)
        for value, cluster in zip(row, clusters, strict=True):
            tally.add(("accuracy",), float(value), tally.cluster(int(cluster)))
        alone = replicates(tally, 120, seed=5)["accuracy",]
        assert alone == pytest.approx(of_run)
        assert intervals(tally, 120, seed=5)["accuracy",] == pytest.approx(tuple(np.percentile(of_run, (2.5, 97.5))))
