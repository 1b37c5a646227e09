from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from made_up_study import STUDY, Finished, made_up
from rich.console import Console

from vlm.cli import main
from vlm.config import load_yaml
from vlm.errors import UserError
from vlm.metrics.items import make_items, write_items
from vlm.run import RESULT
from vlm.studies.collect import collect_with_jobs
from vlm.studies.compare import Cell, Family, PanelComparison, axis_value, check_axis, compare_panel
from vlm.studies.conclude import View, show
from vlm.studies.curves import Panel
from vlm.studies.plan import Job, StudyConfig, plan
from vlm.studies.questions import Resampled, resample
from vlm.studies.report import Report, _order, markdown
from vlm.studies.run import compare_study

NLVR2 = Panel("nlvr2", "accuracy", "NLVR2", True)
NOTHING = Resampled({}, {})


def compared(finished: Finished, **options: str) -> PanelComparison:
    collected = collect_with_jobs(finished.jobs, finished.folder)
    return compare_panel(NLVR2, collected, NOTHING, finished.folder, **options)


def rows(family: Family) -> dict[str, float]:
    return {row.cell.title: round(row.difference.mean, 1) for row in family.rows}


def test_each_point_stands_against_no_pairs_and_against_all(finished: Finished) -> None:
    none, full = compared(finished).families
    assert (none.reference.title, full.reference.title) == ("none", "100%")
    assert rows(none) == {"5%": 9.5, "100%": 20, "labels": 10}
    assert rows(full) == {"none": -20, "5%": -10.5, "labels": -10}
    assert all(row.difference.num_seeds == 3 and row.difference.items is None for row in none.rows)


def test_another_reference_can_be_named(finished: Finished) -> None:
    (family,) = compared(finished, against="labels").families
    assert rows(family) == {"none": -10, "5%": -0.5, "100%": 10}
    with pytest.raises(UserError, match=r"--against label: no such row\. Did you mean 'labels'"):
        compared(finished, against="label")


def test_groups_are_means_over_their_points_and_a_run_counts_once(finished: Finished) -> None:
    found = compared(finished, by="supervision.source")
    assert {cell.name: cell.points for cell in found.cells} == {
        "none": ("none",),
        "captions": ("5%", "100%"),
        "machine_labels": ("labels",),
    }
    captions = next(cell for cell in found.cells if cell.name == "captions")
    assert captions.by_seed[0] == pytest.approx((59.4574 + 70) / 2, abs=1e-4)
    assert found.worths == ()
    again = collect_with_jobs([*finished.jobs, *finished.jobs], finished.folder)
    twice = compare_panel(NLVR2, again, NOTHING, finished.folder, "supervision.source")
    assert [cell.by_seed for cell in twice.cells] == [cell.by_seed for cell in found.cells]


def test_an_axis_is_a_label_a_source_or_a_key_of_the_config(finished: Finished) -> None:
    job = next(job for job in finished.jobs if job.stage == "finetune" and job.labels["point"] == "5%")
    assert axis_value(job, "point") == "5%"
    assert axis_value(job, "supervision.source") == "captions"
    assert axis_value(job, "supervision.fraction") == "0.05"  # of the pretraining, not the fine-tuning's own default
    assert axis_value(job, "model.fusion.type") == "coattention"
    assert axis_value(job, "pretrain:trainer.batch_size") == str(job.upstream["start_from"].config.trainer.batch_size)
    with pytest.raises(UserError, match=r"no such label or key\. Did you mean 'supervision.fraction'"):
        axis_value(job, "supervision.fractoin")
    with pytest.raises(UserError, match=r"no such label or key\. Did you mean 'supervision\."):
        axis_value(job, "supervision")  # a section, not a value
    for axis in ("seed", "task"):
        with pytest.raises(UserError, match=f"--by {axis}: the "):
            check_axis(axis, finished.jobs)


def test_the_source_is_put_on_the_curve_or_refused_with_its_reason(finished: Finished) -> None:
    (worth,) = compared(finished).worths
    assert worth.name == "labels (machine labels)"
    assert worth.rate.reason.endswith("the study has 2")


# --- With scores of questions ----------------------------------------------------------------------------------------

TWO = STUDY[: STUDY.index("  blind:")]


@pytest.fixture(scope="module")
def with_items(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Runs that kept 400 questions of 100 images, noisier than the made-up scores, which are their means."""
    folder = tmp_path_factory.mktemp("with_items")
    (folder / "study.yaml").write_text(TWO)
    study = load_yaml(folder / "study.yaml", StudyConfig)
    jobs = plan(study, folder)
    random = np.random.default_rng(0)
    for job in jobs:
        job.folder.mkdir(parents=True)
        scores = made_up(job)
        if scores:
            values = (random.random(400) < scores["accuracy"] / 100).astype(float)
            scores["accuracy"] = 100 * values.mean()
            ids = [str(number) for number in range(400)]
            task = job.config.task
            assert task is not None
            items = make_items(ids, values.tolist(), [number // 4 for number in range(400)])
            write_items(job.folder / f"items-{task.type}-test.safetensors", items)
        examples = round(20_000 * (job.config.supervision.fraction if not scores else 1))
        (job.folder / RESULT).write_text(json.dumps({"scores": scores, "examples": examples}))
    return Finished(study, folder, jobs, [])


def finetuned(finished: Finished) -> list[Job]:
    return [job for job in finished.jobs if job.stage == "finetune"]


def test_intervals_over_questions_join_those_over_seeds(with_items: Finished) -> None:
    resampled, left_out = resample(finetuned(with_items), 400)
    assert left_out == [] and len(resampled.columns) == 24
    collected = collect_with_jobs(with_items.jobs, with_items.folder)
    found = compare_panel(NLVR2, collected, resampled, with_items.folder)
    for family in found.families:
        for row in family.rows:
            one = row.difference
            assert one.items is not None and one.seeds is not None and one.both is not None
            assert one.items[0] < one.mean < one.items[1]
            assert one.both[1] - one.both[0] > max(one.items[1] - one.items[0], one.seeds[1] - one.seeds[0])
    assert all(bounds is not None for bounds in found.over_items.values())


def test_runs_of_other_questions_are_never_paired(with_items: Finished) -> None:
    gqa, nlvr2 = (
        [job.folder for job in finetuned(with_items) if job.labels["task"] == task][:2] for task in ("gqa", "nlvr2")
    )
    resampled, _ = resample(finetuned(with_items), 50)
    sets = {run: "other" if run == nlvr2[1] else questions for run, questions in resampled.test_set.items()}
    apart = Resampled(resampled.columns, sets)
    assert apart.mean(gqa) is not None and apart.mean(nlvr2) is None
    assert apart.mean([gqa[0], Path("elsewhere")]) is None


def test_scores_of_questions_that_are_not_the_result_s_are_left_out(with_items: Finished) -> None:
    job = finetuned(with_items)[0]
    result = job.folder / RESULT
    kept = result.read_text()
    result.write_text(json.dumps({"scores": {"accuracy": 1.0}}))
    try:
        resampled, left_out = resample([job], 50)
    finally:
        result.write_text(kept)
    assert not resampled.columns
    assert left_out == ["1 run kept scores of questions that do not belong to its result"]


def test_old_runs_are_compared_over_seeds_alone_and_the_report_says_so(finished: Finished) -> None:
    resampled, left_out = resample([job for job in finished.jobs if job.stage == "finetune"])
    assert not resampled.columns and left_out[0].startswith("24 runs kept no scores of questions")
    panels = [compared(finished)]
    report = Report("Why?", "vlm compare mine", finished.scores, panels, 9, 9, "point", left_out, ["vision"], [])
    written = markdown(report)
    assert "All seeds start from one run of vision: what another one would give is in no interval." in written
    assert "so their intervals are over seeds alone" in written
    assert "| 5% | +9.5 | +9.5 to +9.5 |" in written
    assert "```\nvlm compare mine\n```" in written
    assert "arXiv 2211.00262" in written
    assert "NLVR2, 5%: -10.5 (-10.5 to -10.5; p < 0.001), 47% (47 to 47) of what all pairs bring" in written


# --- The command -----------------------------------------------------------------------------------------------------


def test_the_command_writes_a_report_that_names_itself(
    with_items: Finished, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = with_items.folder
    study = str(folder / "study.yaml")
    assert main(["compare", study, "--folder", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "NLVR2, against none" in printed and f"tensorboard --logdir {folder}/tensorboard" in printed
    report = (folder / "report.md").read_text()
    for heading in ("## Beside the reference paper", "### NLVR2, against 100%", "## What a weak source is worth"):
        assert heading in report
    assert f"vlm compare {study} --folder {folder}\n" in report
    assert (folder / "results.csv").is_file()
    view = View(f"vlm compare {study}", "nlvr2", by="supervision.source")
    show(with_items.study, with_items.jobs, folder, Console(), view)
    assert "captions: the mean of 5%, 100%" in capsys.readouterr().out
    other = (folder / "report-by-supervision.source-nlvr2.md").read_text()
    assert (
        "--by supervision.source --task nlvr2\n" in other
        and "GQA" not in other.split("## How to read")[0].split("## Scores")[1]
    )
    assert (folder / "report.md").read_text() == report


def test_a_wrong_choice_is_told_before_anything_is_read(finished: Finished, tmp_path: Path) -> None:
    for view, message in (
        (View("vlm compare mine", task="nlvr"), "--task nlvr: the study has no such task. Did you mean 'nlvr2'"),
        (View("vlm compare mine", by="seed"), "--by seed: the seeds are what means and intervals are over"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            show(finished.study, finished.jobs, tmp_path, Console(), view)
    with pytest.raises(UserError, match="nowhere: no such folder of runs"):
        compare_study("quickstart", tmp_path / "nowhere")
    assert list(tmp_path.iterdir()) == []


def test_a_view_of_its_own_has_a_report_of_its_own() -> None:
    view = View("vlm compare mine", "nlvr2", by="pretrain:model.fusion.type", against="labels ≥ 0.7")
    assert view.file == "report-by-pretrain-model.fusion.type-nlvr2-labels---0.7.md"
    assert view.whole_command.endswith(" --by pretrain:model.fusion.type --task nlvr2 --against 'labels ≥ 0.7'")


def test_that_nlvr2_loses_more_is_corrected_over_the_tasks_it_is_compared_with() -> None:
    def panel(title: str, losses: tuple[float, ...]) -> PanelComparison:
        cells = []
        for source, fraction, scores in (("none", 0.0, [50.0] * 3), ("captions", 1.0, [50 + loss for loss in losses])):
            by_seed = dict(enumerate(scores))
            runs: dict[int, tuple[Path, ...]] = {seed: () for seed in by_seed}
            cells.append(Cell(source, "", source, fraction, fraction, None, runs, by_seed, ()))
        return PanelComparison(Panel(title.lower(), "accuracy", title, True), tuple(cells), {}, (), ())

    losses = {"VQAv2": (2.0, 1.0, 8.0), "GQA": (1.0, 2.0, 3.0), "NLVR2": (20.0, 25.0, 22.0)}

    def told(*titles: str) -> list[float]:
        panels = [panel(title, losses[title]) for title in titles]
        lines = _order(Report("", "", (), panels, 0, 0, "point", (), (), ()))
        return [float(line.rpartition("p ")[2].rstrip(")")) for line in lines]

    (vqav2,), (gqa,) = told("VQAv2", "NLVR2"), told("GQA", "NLVR2")
    assert told("VQAv2", "GQA", "NLVR2") == pytest.approx([max(vqav2, 2 * gqa), 2 * gqa], abs=2e-3)
