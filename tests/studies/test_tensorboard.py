from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest
from made_up_study import Finished
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata

from vlm.studies import curves
from vlm.studies.plan import FigureConfig
from vlm.studies.tensorboard import EVENTS, _titled, write_board

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def board(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("board") / "tensorboard"
    job = next(job for job in finished.jobs if job.title == "finetune 5% nlvr2 seed=1")
    events = job.folder / f"{EVENTS}1.made_up"
    events.write_bytes(b"")
    shown = [curves.Panel(task, "accuracy", task.upper(), True) for task in ("gqa", "nlvr2")]
    drawn = curves.draw(finished.scores, shown, FigureConfig())
    try:
        for _ in range(2):  # writing again replaces
            write_board(finished.jobs, finished.scores, shown, FigureConfig(), drawn, "| a table |", folder)
        linked = folder / "runs" / "finetune 5% nlvr2 seed=1" / events.name
        assert os.path.samefile(linked, events) and not linked.is_symlink()
    finally:
        events.unlink()
    return folder


def read(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder)).Reload()


def test_each_run_has_a_readable_name_and_its_final_scores(board: Path, finished: Finished) -> None:
    names = {folder.name for folder in (board / "runs").iterdir()}
    assert {"pretrain labels seed=2", "finetune none gqa seed=0", "blind none seed=1"} <= names
    assert len(names) == len({job.id for job in finished.jobs})
    scores = read(board / "runs" / "finetune 5% nlvr2 seed=1")
    assert scores.Scalars("score/accuracy")[0].value == pytest.approx(60.4574, abs=1e-3)


def test_the_hparams_page_has_a_session_a_run_and_a_column_an_axis(board: Path) -> None:
    def plugin(folder: Path) -> dict[str, bytes]:
        return dict(read(folder).PluginTagToContent("hparams"))

    experiment = metadata.parse_experiment_plugin_data(plugin(board)[metadata.EXPERIMENT_TAG])
    columns = {info.name: list(info.domain_discrete) for info in experiment.hparam_infos}
    assert columns["source"] == ["none", "captions", "machine_labels"]
    assert columns["fraction"] == [0, 0.05, 1]
    assert set(columns) >= {"point", "source", "fraction", "task", "seed"}
    assert experiment.metric_infos[0].name.tag == "score/accuracy"
    session = plugin(board / "runs" / "finetune 5% nlvr2 seed=1")
    start = metadata.parse_session_start_info_plugin_data(session[metadata.SESSION_START_INFO_TAG])
    values = {name: value.string_value or value.number_value for name, value in start.hparams.items()}
    assert values == {"point": "5%", "source": "captions", "fraction": 0.05, "task": "nlvr2", "seed": "1"}
    blind = plugin(board / "runs" / "blind none seed=1")
    start = metadata.parse_session_start_info_plugin_data(blind[metadata.SESSION_START_INFO_TAG])
    assert start.hparams["point"].string_value == "none, question only"


def test_tensorboard_reads_the_curves_and_their_bands_back(board: Path) -> None:
    def points(run: str, tag: str = "supervision_curve/nlvr2") -> list[tuple[int, float]]:
        return [(event.step, round(event.value, 2)) for event in read(board / "curve" / run).Scalars(tag)]

    assert points("NLVR2 image-text pairs") == [(0, 51), (500, 60.46), (10_000, 71)]
    assert points("NLVR2 image-text pairs", "supervision_band/nlvr2/low")[0] == (0, 48.52)
    assert points("NLVR2 image-text pairs", "supervision_band/nlvr2/high")[2] == (10_000, 73.48)
    assert points("NLVR2 machine labels") == [(0, 61), (10_000, 61)]
    assert points("NLVR2 question only, trained") == [(0, 52), (10_000, 52)]


def test_there_is_a_figure_a_task_and_one_of_all_and_the_report(board: Path) -> None:
    beside = read(board / "curve" / "figures and report")
    assert set(beside.Tags()["images"]) == {"supervision_curve", "supervision_curve/gqa", "supervision_curve/nlvr2"}
    text = beside.Tensors("report/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| a table |" in text and "basis point" in text
    layout = beside.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    assert b"supervision_band/nlvr2/low" in layout


def test_titles_never_leave_the_folder_and_never_collide(finished: Finished) -> None:
    first, second, third = finished.jobs[:3]
    hostile = [dataclasses.replace(job, labels={"point": "../../a"}) for job in (first, second, third)]
    names = list(_titled(hostile))
    assert len(set(names)) == 3
    assert all("/" not in name and name not in ("", ".", "..") for name in names)
