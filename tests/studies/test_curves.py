from __future__ import annotations

import dataclasses
from pathlib import Path

import matplotlib.image
import pytest
from made_up_study import Finished, with_books

from vlm.studies import curves
from vlm.studies.plan import FigureConfig, PanelConfig


@pytest.fixture(scope="module")
def nlvr2() -> curves.Panel:
    return curves.Panel("nlvr2", "accuracy", "NLVR2", True)


def test_the_default_panels_are_the_headlines_of_the_tasks(finished: Finished) -> None:
    found = curves.panels(FigureConfig(), finished.jobs)
    assert [(panel.title, panel.metric) for panel in found] == [
        ("GQA", "accuracy"),
        ("NLVR2", "accuracy"),
        ("Retrieval", "recall_at_1"),
    ]
    asked = FigureConfig(panels=(PanelConfig(task="nlvr2", metric="consistency"),))
    assert [(panel.title, panel.tag) for panel in curves.panels(asked, finished.jobs)] == [
        ("NLVR2: consistency", "nlvr2/consistency")
    ]


def test_the_curve_of_captions_begins_without_pairs_and_labels_are_a_level(
    finished: Finished, nlvr2: curves.Panel
) -> None:
    captions, labels = curves.lines(finished.scores, nlvr2)
    assert [fraction for fraction, _ in captions.points] == [0, 0.05, 1]
    assert [round(value.mean, 1) for _, value in captions.points] == [51, 60.5, 71]
    assert not captions.is_flat
    assert (labels.name, labels.is_flat, [value.mean for _, value in labels.points]) == ("machine labels", True, [61])


def test_points_of_one_amount_are_never_averaged(finished: Finished, nlvr2: curves.Panel) -> None:
    again = [
        dataclasses.replace(score, point=f"{score.point} longer", score=score.score + 5)
        for score in finished.scores
        if score.point in ("5%", "labels")
    ]
    found = {line.name: line for line in curves.lines([*finished.scores, *again], nlvr2)}
    assert list(found) == [
        "image-text pairs",
        "image-text pairs, 5% longer",
        "machine labels",
        "machine labels, labels longer",
    ]
    assert found["machine labels, labels longer"].points[0][1].mean == 66
    assert len(found["machine labels"].points[0][1].values) == 3


def test_blind_runs_are_a_baseline_and_no_point_of_the_curve(finished: Finished, nlvr2: curves.Panel) -> None:
    assert not any(score.question_only for score in nlvr2.of(finished.scores))
    levels = {baseline.name: baseline.value for baseline in curves.baselines(finished.scores, nlvr2)}
    assert levels == {"question only, trained": 52, "most frequent answer": 50}


def test_the_table_has_a_row_a_point_and_a_row_a_baseline(finished: Finished, nlvr2: curves.Panel) -> None:
    gqa = curves.Panel("gqa", "accuracy", "GQA", True)
    assert curves.table_rows(finished.scores, [gqa, nlvr2]) == [
        ["pretraining", "GQA", "NLVR2"],
        ["none", "61.0 ± 2.5", "51.0 ± 2.5"],
        ["5%", "61.0 ± 2.5", "60.5 ± 2.5"],
        ["100%", "61.0 ± 2.5", "71.0 ± 2.5"],
        ["labels", "61.0 ± 2.5", "61.0 ± 2.5"],
        ["question only, trained", "", "52.0"],
        ["most frequent answer", "40.0", "50.0"],
    ]
    written = curves.markdown_table(finished.scores, [gqa, nlvr2], "Why?")
    assert written.startswith("Why?\n\n| pretraining | GQA | NLVR2 |\n| --- | ---: | ---: |\n| none | 61.0 ± 2.5 |")
    assert "over 3 seeds" in written


def test_the_figure_draws_what_the_panels_say(finished: Finished, tmp_path: Path) -> None:
    shown = curves.panels(FigureConfig(), finished.jobs)
    drawn = curves.draw(finished.scores, shown, FigureConfig())
    curves.save(drawn, tmp_path / "curve.png")
    pixels = matplotlib.image.imread(tmp_path / "curve.png")
    assert pixels.shape[1] > 1000 and pixels[..., :3].std() > 0.01
    # No run gave "recall_at_1" itself, so retrieval has no panel.
    assert [axes.get_title(loc="left") for axes in drawn.axes] == ["GQA", "NLVR2"]
    axes = drawn.axes[1]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "5", "100"]
    assert axes.get_xlabel() == "image-text pairs used (% of 20,000)"
    assert drawn.axes[0].get_ylabel() == "accuracy (%)"
    names = [text.get_text() for text in drawn.legends[0].get_texts()]
    assert names == ["image-text pairs", "machine labels", "question only, trained", "most frequent answer"]


def test_zero_stands_left_of_every_fraction_and_sources_right_of_all(finished: Finished, nlvr2: curves.Panel) -> None:
    scale = curves._Scale.of(curves.lines(finished.scores, nlvr2))
    places = [scale.place(fraction) for fraction in scale.fractions]
    assert scale.fractions == (0, 0.05, 1)
    assert places == sorted(places) and places[1] - places[0] > 0.3
    assert scale.flat_place("machine labels") > places[-1]


def test_no_axis_shows_more_than_100_percent_and_a_cut_interval_is_marked(
    finished: Finished, nlvr2: curves.Panel
) -> None:
    high = [dataclasses.replace(score, score=min(100.0, score.score + 29)) for score in finished.scores]
    (axes,) = (drawn := curves.draw(high, [nlvr2], FigureConfig())).axes
    assert axes.get_ylim()[1] == 100
    ends = [path.vertices[:, 1].max() for bars in axes.collections for path in bars.get_paths()]
    assert max(ends) == 100
    assert [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "^" and line.get_ydata()[0] == 100] == [
        2
    ]
    assert "open triangle" in drawn.legends[0].get_title().get_text()
    low = curves.draw(finished.scores, [nlvr2], FigureConfig())
    assert "open triangle" not in low.legends[0].get_title().get_text()


def test_pairs_seen_elsewhere_are_on_the_axis_in_the_table_and_a_warning(
    finished: Finished, nlvr2: curves.Panel, tmp_path: Path
) -> None:
    scores = with_books(finished.scores, "vision 400,000,000", 400_020_000)
    warning = "Warning: no image-text pairs are claimed for none, labels, "
    warning += "but others have seen pairs: vision 400,000,000"
    assert curves.warnings(scores) == [warning]
    drawn = curves.draw(scores, [nlvr2], FigureConfig())
    assert " ".join(drawn.get_suptitle().split()) == warning
    assert drawn.axes[0].get_xlabel().splitlines()[0] == "image-text pairs used (% of 20,000)"
    assert "seen elsewhere: vision 400,000,000" in drawn.axes[0].get_xlabel()
    assert curves.table_rows(scores, [nlvr2])[:2] == [
        ["pretraining", "pairs ever seen", "NLVR2"],
        ["none", "400,020,000", "51.0 ± 2.5"],
    ]
    assert curves.table_rows(scores, [nlvr2])[-1] == ["most frequent answer", "", "50.0"]
    assert warning in curves.markdown_table(scores, [nlvr2], "Why?")
    curves.rich_table(scores, [nlvr2])
    curves.save(drawn, tmp_path / "curve.png")


def test_the_legend_says_which_pairs_are_behind_a_line(finished: Finished, nlvr2: curves.Panel) -> None:
    mixture = {"source": "captions+machine_labels", "supervised_pairs": 1234}
    scores = [dataclasses.replace(s, **(mixture if s.point == "labels" else {})) for s in finished.scores]
    assert [line.legend for line in curves.lines(scores, nlvr2)] == [
        "image-text pairs",
        "captions + machine labels (1,234 pairs)",
    ]
    (legend,) = curves.draw(scores, [nlvr2], FigureConfig()).legends
    assert "captions + machine labels (1,234 pairs)" in [text.get_text() for text in legend.get_texts()]
    labels = [dataclasses.replace(s, others="labeller 400,000,000" if s.point == "labels" else "") for s in scores]
    assert [line.legend for line in curves.lines(labels, nlvr2)] == [
        "image-text pairs",
        "captions + machine labels (pairs seen: labeller 400,000,000)",
    ]


def test_what_nobody_knows_is_said_to_be_unknown(finished: Finished, nlvr2: curves.Panel) -> None:
    scores = with_books(finished.scores, "labeller unknown")
    assert curves.table_rows(scores, [nlvr2])[1][1] == "unknown"
    assert curves.warnings(scores)[0].endswith("others may have seen pairs: labeller unknown")


def test_books_without_other_pairs_change_nothing(finished: Finished, nlvr2: curves.Panel) -> None:
    scores = with_books(finished.scores, "", 20_000)
    assert curves.warnings(scores) == []
    assert curves.table_rows(scores, [nlvr2]) == curves.table_rows(finished.scores, [nlvr2])
    assert curves.table_note(scores) == curves.table_note(finished.scores)
    assert curves.draw(scores, [nlvr2], FigureConfig()).get_suptitle() == ""
