"""What `vlm score` writes: a JSON file for scripts and tables for people."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vlm.errors import UserError
from vlm.metrics.bootstrap import Interval, intervals, paired_differences
from vlm.metrics.tally import Name, nested
from vlm.scoring.score import Scored, Scoring

UNIT = {"vqav2": "percent", "gqa": "percent", "nlvr2": "fractions"}


def report(scoring: Scoring, output: Path | None, num_resamples: int, seed: int) -> None:
    """Score one file, or two and their difference: to `output` as JSON, to the terminal as tables."""
    console = Console()
    head: dict[str, Any] = {"task": scoring.task, **scoring.settings}
    tail = {
        "bootstrap": {
            "cluster": scoring.cluster,
            "num_clusters": len(scoring.files[0].tally.clusters),
            "num_resamples": num_resamples,
            "seed": seed,
        }
    }
    found = [intervals(scored.tally, num_resamples, seed) for scored in scoring.files]
    contents = [_content(scoring, scored, bounds) for scored, bounds in zip(scoring.files, found, strict=True)]
    if len(scoring.files) == 1:
        _write(output, head | contents[0] | tail)
        _print_scores(console, scoring, found[0])
        return
    first, second = scoring.files
    differences = paired_differences(first.tally, second.tally, num_resamples, seed)
    comparison = {
        "difference": nested({name: difference for name, (difference, _) in differences.items()}),
        "intervals_95": nested({name: bounds for name, (_, bounds) in differences.items()}),
    }
    _write(output, head | {"first": contents[0], "second": contents[1]} | comparison | tail)
    _print_differences(console, scoring, differences)


def _content(scoring: Scoring, scored: Scored, bounds: Mapping[Name, Interval]) -> dict[str, Any]:
    tally = scored.tally
    return tally.scores() | {
        "intervals_95": nested(dict(bounds)),
        "counts": tally.counts(),
        "not_computed": tally.not_computed,
        "num_questions": scoring.num_questions,
        "missing_predictions": scored.num_missing,
        "file": str(scored.file),
    }


def _write(file: Path | None, content: Mapping[str, Any]) -> None:
    if file is None:
        return
    try:
        file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{file}: cannot be written ({error.strerror}). Give another file") from None


def _print_scores(console: Console, scoring: Scoring, bounds: Mapping[Name, Interval]) -> None:
    (scored,) = scoring.files
    table = _table(console, f"{scored.file}, {_what(scoring)}")
    for heading in ("score", "95% interval", "over"):
        table.add_column(heading, justify="right")
    for name in _ordered(bounds):
        sample = scored.tally.samples.get(name)
        over = f"{len(sample.values if sample else scored.tally.samples['accuracy',].values):,}"
        table.add_row(_label(name), _number(scoring, scored.tally.value(name)), _bounds(scoring, bounds[name]), over)
    console.print(table)
    _print_missing(console, scored)
    _print_not_computed(console, scored.tally.not_computed)


def _print_differences(console: Console, scoring: Scoring, differences: Mapping[Name, tuple[float, Interval]]) -> None:
    first, second = scoring.files
    table = _table(console, f"A = {first.file}, B = {second.file}, {_what(scoring)}")
    for heading in ("A", "B", "A - B", "95% interval"):
        table.add_column(heading, justify="right")
    for name in _ordered(differences):
        difference, bounds = differences[name]
        values = (first.tally.value(name), second.tally.value(name), difference)
        table.add_row(_label(name), *(_number(scoring, value) for value in values), _bounds(scoring, bounds))
    console.print(table)
    for scored in scoring.files:
        _print_missing(console, scored)
    _print_not_computed(console, first.tally.not_computed | second.tally.not_computed)


def _print_missing(console: Console, scored: Scored) -> None:
    if scored.num_missing:
        missing = f"{scored.num_missing:,} of {scored.num_needed:,} predictions are missing and count as wrong"
        console.print(Text(_printable(f"{scored.file}: {missing}")), style="bold", soft_wrap=True)


def _print_not_computed(console: Console, reasons: Mapping[str, str]) -> None:
    for name, reason in reasons.items():
        console.print(f"not computed: {name}: {reason}", style="dim", markup=False, highlight=False, soft_wrap=True)


def _table(console: Console, title: str) -> Table:
    console.print(Text(_printable(title)), soft_wrap=True)
    table = Table()
    table.add_column("")
    return table


def _what(scoring: Scoring) -> str:
    settings = "".join(f", {name} {value}" for name, value in scoring.settings.items())
    return f"{scoring.task}{settings}, {UNIT[scoring.task]}"


def _ordered(names: Mapping[Name, Any]) -> list[Name]:
    """Single scores first, then each table; numbers by size, names by alphabet."""
    tables = list(dict.fromkeys(name[:-1] for name in names))

    def order(name: Name) -> tuple[int, int, str]:
        if name[:-1] == ():
            return 0, list(names).index(name), ""
        last = name[-1]
        return tables.index(name[:-1]) + 1, int(last) if last.isdecimal() else 0, last

    return sorted(names, key=order)


def _label(name: Name) -> Text:
    return Text(_printable(": ".join(name)))


def _printable(text: str) -> str:
    """Without halves of surrogate pairs, which JSON may hold and no terminal can show."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _number(scoring: Scoring, value: float) -> str:
    return f"{value:.4f}" if UNIT[scoring.task] == "fractions" else f"{value:.2f}"


def _bounds(scoring: Scoring, bounds: Interval) -> str:
    return "-" if bounds is None else f"{_number(scoring, bounds[0])} to {_number(scoring, bounds[1])}"
