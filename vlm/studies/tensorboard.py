"""A study in TensorBoard: its runs under readable names, HParams, the supervision curves with their bands, the report.

runs/TITLE            each run's own event files, as hard links: nothing is written twice; beside them its final scores
                      and what makes it differ, for the HParams page
curve/TASK LINE       a line of the supervision curve over basis points of the pairs, with the ends of its band
curve/figure ...      the figures (zero marked, fractions on a logarithmic axis, bands), one a task and one of all; the
                      report as text; the layout of the Custom Scalars page
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm.studies.collect import Score
from vlm.studies.curves import Panel, baselines, draw, lines
from vlm.studies.plan import FigureConfig, Job, distinct

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BASIS_POINTS = 10_000  # TensorBoard's x axis is an integer step: a basis point of the pairs
NOTE = (
    "In the scalars, a step is a basis point (1/100 of a percent) of the pairs: step 10,000 is all of them. A source "
    "without a curve is a level from 0 to 10,000. `low` and `high` are the 95% interval over seeds."
)
EVENTS = "events.out.tfevents."
Value = bool | int | float | str


def write_board(
    jobs: Sequence[Job],
    scores: Sequence[Score],
    shown: Sequence[Panel],
    figure: FigureConfig,
    drawn: Figure,
    report: str,
    folder: Path,
) -> None:
    """Write `folder` anew. `tensorboard --logdir` shows it, and `folder/curve` alone, without the runs.

    TensorBoard hides all runs where there are more than 40, and with them the curves, until somebody ticks them.
    """
    shutil.rmtree(folder, ignore_errors=True)
    _write_runs(jobs, scores, [panel.metric for panel in shown], folder)
    _write_curves(scores, shown, folder / "curve")
    _write_figures(scores, shown, figure, drawn, report, folder / "curve" / "figures and report")


# --- Runs ------------------------------------------------------------------------------------------------------------


def _write_runs(jobs: Sequence[Job], scores: Sequence[Score], headlines: Sequence[str], folder: Path) -> None:
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.hparams import metadata
    from tensorboard.plugins.hparams.api_pb2 import STATUS_SUCCESS
    from tensorboard.plugins.hparams.plugin_data_pb2 import SessionEndInfo, SessionStartInfo

    by_run: dict[str, list[Score]] = {}
    for score in scores:
        by_run.setdefault(Path(score.run).name, []).append(score)
    setups: list[dict[str, Value]] = []
    metrics: dict[str, None] = {f"score/{metric}": None for metric in headlines}
    for title, job in _titled(distinct(jobs)).items():
        run = folder / "runs" / title
        run.mkdir(parents=True)
        for events in sorted(job.folder.glob(f"{EVENTS}*")) if job.folder.is_dir() else ():
            _link(events, run / events.name)
        own = by_run.get(job.id)
        if not own:
            continue
        setup = _setup(job, own[0])
        setups.append(setup)
        values = {f"score/{score.metric}": score.score for score in own}
        metrics |= dict.fromkeys(values)
        final = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        start = SessionStartInfo(group_name=title)
        for name, value in setup.items():
            _set(start.hparams[name], value)
        begin = _hparams(metadata.SESSION_START_INFO_TAG, session_start_info=start)
        end = _hparams(metadata.SESSION_END_INFO_TAG, session_end_info=SessionEndInfo(status=STATUS_SUCCESS))
        _write_events(run, [begin, Summary(value=final), end])
    if setups:
        _write_events(folder, [_experiment(setups, list(metrics))])


def _titled(jobs: Sequence[Job]) -> dict[str, Job]:
    """A folder's name for each run: its title, and its identity where two have one title."""
    found: dict[str, Job] = {}
    for job in jobs:
        name = re.sub(r"[^\w .,=+%()≥≤<>:@-]", "_", job.title)[:120].strip(" .")
        found[name if name not in found else f"{name} {job.id}"] = job
    return found


def _link(source: Path, target: Path) -> None:
    """One file under two names, which also shows what is still being appended; a copy on another file system."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _setup(job: Job, score: Score) -> dict[str, Value]:
    """What a run is, by name: the axes of every study, as many as the page shows at first, and its own labels."""
    point = ", ".join(filter(None, (score.point, "question only" if score.question_only else "")))
    axes: dict[str, Value] = {
        "point": point or "all",
        "source": score.source,
        "fraction": score.fraction,
        "task": score.task,
        "seed": str(score.seed),  # a name, not an amount
    }
    axes |= {label: value for label, value in job.labels.items() if label not in axes}
    return axes


def _experiment(setups: Sequence[Mapping[str, Value]], metrics: Sequence[str]) -> Any:
    """The columns of the HParams page. One for all runs: TensorBoard reads the first that it finds."""
    from google.protobuf.struct_pb2 import ListValue
    from tensorboard.plugins.hparams import api_pb2, metadata

    infos = []
    for name in dict.fromkeys(name for setup in setups for name in setup):
        values = list(dict.fromkeys(setup[name] for setup in setups if name in setup))
        if all(isinstance(value, bool) for value in values):
            kind = api_pb2.DATA_TYPE_BOOL
        elif all(isinstance(value, int | float) for value in values):
            kind, values = api_pb2.DATA_TYPE_FLOAT64, sorted(values, key=float)
        else:
            kind, values = api_pb2.DATA_TYPE_STRING, [str(value) for value in values]
        domain = ListValue()
        domain.extend(values)
        infos.append(
            api_pb2.HParamInfo(name=name, display_name=name, type=kind, domain_discrete=domain, differs=len(values) > 1)
        )
    shown = [
        api_pb2.MetricInfo(name=api_pb2.MetricName(tag=tag), display_name=f"{tag.removeprefix('score/')} (%)")
        for tag in metrics
    ]
    return _hparams(metadata.EXPERIMENT_TAG, experiment=api_pb2.Experiment(hparam_infos=infos, metric_infos=shown))


def _set(target: Any, value: Value) -> None:
    """A protobuf value of the type that the HParams page sorts and filters by."""
    if isinstance(value, bool):
        target.bool_value = value
    elif isinstance(value, int | float):
        target.number_value = value
    else:
        target.string_value = value


def _hparams(tag: str, **content: Any) -> Any:
    """A summary of the HParams plugin; TensorBoard's own functions for it import TensorFlow."""
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.hparams import metadata
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    about = metadata.create_summary_metadata(HParamsPluginData(version=metadata.PLUGIN_DATA_VERSION, **content))
    return Summary(value=[Summary.Value(tag=tag, metadata=about, tensor=metadata.NULL_TENSOR)])


def _write_events(folder: Path, summaries: Sequence[Any]) -> None:
    """One event file, written at once: a SummaryWriter starts a thread, which a thousand runs would wait for."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter

    now = time.time()
    with (folder / f"{EVENTS}{int(now):010d}.study.{os.getpid()}").open("wb") as file:
        writer = RecordWriter(file)
        writer.write(Event(wall_time=now, file_version="brain.Event:2").SerializeToString())
        for summary in summaries:
            writer.write(Event(wall_time=now, step=0, summary=summary).SerializeToString())


# --- Curves and figures ----------------------------------------------------------------------------------------------


def _write_curves(scores: Sequence[Score], shown: Sequence[Panel], folder: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    def write(run: str, tag: str, points: Sequence[tuple[float, float, float | None]]) -> None:
        with SummaryWriter(str(folder / run.replace(os.sep, "_"))) as writer:
            for fraction, value, half_width in points:
                step = max(1, round(BASIS_POINTS * fraction)) if fraction else 0
                writer.add_scalar(f"supervision_curve/{tag}", value, step)
                if half_width is not None:
                    writer.add_scalar(f"supervision_band/{tag}/low", max(value - half_width, 0), step)
                    writer.add_scalar(f"supervision_band/{tag}/high", min(value + half_width, 100), step)

    for panel in shown:
        for line in lines(scores, panel):
            points = [(fraction, found.mean, found.half_width) for fraction, found in line.points]
            if line.is_flat:
                points = [(end, *points[0][1:]) for end in (0.0, 1.0)]
            write(f"{panel.title} {line.name}", panel.tag, points)
        for level in baselines(scores, panel):
            write(f"{panel.title} {level.name}", panel.tag, [(end, level.value, None) for end in (0.0, 1.0)])


def _write_figures(
    scores: Sequence[Score], shown: Sequence[Panel], figure: FigureConfig, drawn: Figure, report: str, folder: Path
) -> None:
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from torch.utils.tensorboard import SummaryWriter

    charts = {
        panel.title: [
            "Margin",
            [
                f"supervision_curve/{panel.tag}",
                f"supervision_band/{panel.tag}/low",
                f"supervision_band/{panel.tag}/high",
            ],
        ]
        for panel in shown
    }
    with SummaryWriter(str(folder)) as writer:
        figures = {"supervision_curve": drawn}
        if len(shown) > 1:
            figures |= {f"supervision_curve/{panel.tag}": draw(scores, [panel], figure) for panel in shown}
        else:
            figures = {f"supervision_curve/{panel.tag}": drawn for panel in shown}
        for tag, each in figures.items():
            canvas = FigureCanvasAgg(each)
            canvas.draw()
            writer.add_image(tag, np.asarray(canvas.buffer_rgba())[..., :3], dataformats="HWC")
        writer.add_text("report", f"{report}\n\n{NOTE}")
        writer.add_custom_scalars({"supervision curves, by basis points of the pairs": charts})
