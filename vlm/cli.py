"""The `vlm` command. Every knob is a `key=value` override; the work of a verb is imported when the verb runs."""

from __future__ import annotations

import argparse
import gc
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm.errors import UserError

if TYPE_CHECKING:
    from vlm.run import RunConfig


MAX_READ_TO_SHOW = 100_000  # records of a mixture that `vlm show` reads to count its sources: some seconds


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; the exit status: 0, 2 for what the user can mend, 130 for ctrl-C."""
    sys.path.append(os.getcwd())  # `type: custom` finds classes beside the user; last, so that they shadow nothing
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse takes no more positionals once an option came between: `vlm train pretrain --config-dir mine seed=3`.
    if any(text.startswith("-") for text in rest) or (rest and "overrides" not in options):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if "overrides" in options:
        options.overrides += rest
    try:
        options.verb(options)
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {_printable(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `vlm show pretrain | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _printable(text: str) -> str:
    """What a stranger's file can make an error quote, without what a terminal would obey or could not show."""
    escaped = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return escaped.encode("utf-8", "backslashreplace").decode()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vlm", description="How much image-text supervision does a model need?")
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    def verb(name: str, work: Callable[[argparse.Namespace], None], help_line: str) -> argparse.ArgumentParser:
        added = verbs.add_parser(name, help=help_line, description=help_line)
        added.set_defaults(verb=work)
        return added

    show = verb("show", _show, "Print a config as it would run, the number of parameters and the fingerprint.")
    show.add_argument("config", metavar="CONFIG", help="the name of a config, such as pretrain")

    train = verb("train", _train, "Train a config, or resume a run.")
    train.add_argument("config", metavar="CONFIG|RUN_FOLDER", help="the name of a config, or the folder of a run")

    evaluate = verb("evaluate", _evaluate, "Write a run's predictions and scores.")
    evaluate.add_argument("run", type=Path, metavar="RUN_FOLDER")
    evaluate.add_argument(
        "--baseline",
        choices=("question_only", "shuffled_images", "most_frequent"),
        help="score what the checkpoint knows from the mean image, or from another question's image; or score the most "
        "frequent training answer to each question type",
    )

    predict = verb("predict", _predict, "Answer an official question file, and write the official results file.")
    predict.add_argument("checkpoint", metavar="CHECKPOINT", help="a run's folder, or a checkpoint in one")
    predict.add_argument(
        "--task", choices=("vqav2", "gqa", "nlvr2", "csv"), help="of the questions (default: the model's)"
    )
    predict.add_argument(
        "--questions",
        type=Path,
        required=True,
        metavar="FILE",
        help="as the authors publish it, or a table of your own (csv)",
    )
    predict.add_argument("--images", type=Path, required=True, metavar="DIR", help="subfolders and zips will do")
    predict.add_argument("--out", type=Path, required=True, metavar="FILE", help="what `vlm score` reads")
    predict.add_argument(
        "--allow-missing", action="store_true", help="a grey image stands in for one that is not there"
    )
    predict.add_argument("--batch-size", type=int, default=64, metavar="N", help="questions at a time (default 64)")

    answer = verb("answer", _answer, "Answer a question about an image.")
    answer.add_argument("checkpoint", metavar="CHECKPOINT", help="a run's folder, or a checkpoint in one")
    answer.add_argument("images", type=Path, nargs="+", metavar="IMAGE", help="one, or the two of a statement (NLVR2)")
    answer.add_argument("question", metavar="QUESTION", help="in quotes")
    answer.add_argument("--top", type=int, default=5, metavar="N", help="how many answers (default 5)")

    inspect = verb("inspect", _inspect, "Open a local web page to look at predictions and to ask a model.")
    inspect.add_argument("runs", type=Path, nargs="+", metavar="RUN|CHECKPOINT", help="one, or two runs to compare")
    inspect.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="default: this machine alone")
    inspect.add_argument("--port", type=int, default=0, metavar="N", help="default: a free one")
    inspect.add_argument(
        "--set", action="append", default=[], metavar="key=value", help="such as another split; repeat"
    )
    inspect.add_argument("--trust-code", action="store_true", help="run outside code that the config names")

    for each in (predict, answer):
        each.add_argument("--device", metavar="NAME", help="such as cpu or cuda:1 (default: a GPU where there is one)")
        each.add_argument("--trust-code", action="store_true", help="run outside code that the config names")

    study = verb("study", _study, "Run a grid of runs, and draw its curve.")
    study.add_argument("study", metavar="NAME", help="a study under experiments/, or the path of a study.yaml")
    study.add_argument("--folder", type=Path, metavar="DIR", help="where the runs and the curve go")
    study.add_argument("--jobs", type=int, metavar="N", help="how many runs go at a time")
    study.add_argument(
        "--on",
        choices=("local", "ray", "slurm", "submitit"),
        default="local",
        help="processes of this machine, a Ray cluster, SLURM's queue, or what SLURM would run as processes here",
    )
    study.add_argument("--address", metavar="HOST:PORT", help="of a running Ray cluster (default: one is started here)")
    study.add_argument(
        "--sbatch", action="append", default=[], metavar="OPTION=VALUE", help="of SLURM, such as partition=gpu; repeat"
    )
    study.add_argument(
        "--dry-run", action="store_true", help="run each kind of run in short, on small data, and keep nothing"
    )
    study.add_argument("--retry-failed", action="store_true", help="try again what failed in an earlier call")

    plan = verb("plan", _plan, "Show the runs of a study, which are finished, and what the rest will take.")
    plan.add_argument("study", metavar="NAME", help="a study under experiments/, or the path of a study.yaml")
    plan.add_argument("--folder", type=Path, metavar="DIR", help="where its runs are")
    plan.add_argument("--jobs", type=int, metavar="N", help="how many runs would go at a time")
    plan.add_argument(
        "--probe", action="store_true", help="measure the cost of what has no finished run, in short runs"
    )
    plan.add_argument("--list", action="store_true", help="list every run")
    plan.add_argument("--flops", action="store_true", help="what all runs cost, from operations counted on the models")
    plan.add_argument(
        "--rate",
        type=float,
        metavar="FLOPS",
        help="with --flops: operations a second (default: 40%% of an A100's peak)",
    )

    compare = verb("compare", _compare, "Compare a study's finished runs: differences, exchange rates, a report.")
    compare.add_argument("study", metavar="NAME", help="a study under experiments/, or the path of a study.yaml")
    compare.add_argument("--folder", type=Path, metavar="DIR", help="where the runs are")
    compare.add_argument(
        "--by", metavar="AXIS", help="group by a label of the study or a key of the config, such as supervision.source"
    )
    compare.add_argument("--task", metavar="TASK", help="this task alone")
    compare.add_argument(
        "--against", metavar="POINT", help="what the others are compared with (default: no and all pairs)"
    )

    for each in (show, train, study, plan, compare):
        each.add_argument(
            "--config-dir", type=Path, metavar="DIR", help="a folder of configs, searched before the packaged ones"
        )

    _add_score(verb("score", _score, "Score prediction files of anyone as the authors of the benchmark do."))

    prepare = verb("prepare", _prepare, "Write a data root: a procedural one, or one from a release as downloaded.")
    tasks, pairs = ("vqav2", "gqa", "nlvr2"), ("conceptual_captions", "machine_labels", "imagenet", "folder")
    prepare.add_argument("data", choices=("world", "emoji", *tasks, *pairs))
    prepare.add_argument("--from", dest="source", type=Path, metavar="DIR", help="a release: its files and zips")
    prepare.add_argument("--to", type=Path, metavar="DIR", required=True, help="the data root; replaced if it is there")
    prepare.add_argument(
        "--max-missing",
        type=float,
        metavar="FRACTION",
        help="of the images that may be lost (default: 0; conceptual_captions and machine_labels: 1)",
    )
    prepare.add_argument(
        "--workers", type=int, metavar="N", help=f"processes of {', '.join(pairs)} (default: one a core)"
    )

    overlap = verb("overlap", _overlap, "Say which examples several prepared data roots have in common.")
    overlap.add_argument("roots", type=Path, nargs="+", metavar="ROOT", help="a data root, or its keys-*.txt.gz")
    overlap.add_argument("--split", choices=("train", "validation"), default="train")
    overlap.add_argument("--to", type=Path, metavar="FILE", help="write the common keys here, one a line")

    label = verb("label", _label, "Give the images of a shard folder machine labels with scores, as side shards.")
    label.add_argument("shards", type=Path, metavar="SHARDS", help="a shard folder, such as DATA_ROOT/pairs/train")
    label.add_argument(
        "--with", dest="labeller", required=True, metavar="TYPE:NAME", help="timm:NAME or open_clip:ARCHITECTURE/TAG"
    )
    label.add_argument(
        "--vocabulary", type=Path, metavar="FILE", help="the labels, one a line; a timm model may bring its own"
    )
    label.add_argument("--to", type=Path, metavar="DIR", help="the side shards (default: SHARDS-labels-NAME)")
    label.add_argument("--on", choices=("local", "ray"), default="local", help="one machine, or a Ray cluster")
    label.add_argument("--address", metavar="HOST:PORT", help="of a running Ray cluster (default: one is started here)")
    label.add_argument("--workers", type=int, metavar="N", help="of the cluster (default: its GPUs, else its cores)")

    export = verb("export", _export, "Write a trained model as one folder that describes itself, for anyone to load.")
    export.add_argument("run", metavar="RUN", help="a run's folder, a checkpoint inside one, or an exported folder")
    export.add_argument("folder", type=Path, metavar="DIR", help="an earlier export there is replaced")
    export.add_argument(
        "--encoders", action="store_true", help="write the two encoders alone, for timm and for transformers"
    )
    export.add_argument("--push", metavar="OWNER/NAME", help="upload the folder to the hub as well")
    export.add_argument("--private", action="store_true", help="with --push: a repository that others do not see")

    features = verb("features", _features, "Encode a folder of images with a trained model's vision encoder.")
    features.add_argument("model", metavar="MODEL", help="a run, a checkpoint, an exported folder, or OWNER/NAME")
    features.add_argument("images", type=Path, metavar="IMAGES", help="a folder of images, in any subfolders")
    features.add_argument("--out", type=Path, metavar="FILE", required=True, help="a .parquet or .safetensors file")
    features.add_argument("--pool", choices=("cls", "mean"), default="cls", help="of the states (default: cls)")
    features.add_argument("--damaged", choices=("stop", "skip"), default="stop", help="at an image that is damaged")
    features.add_argument("--batch-size", type=int, default=32, metavar="N", help="images at a time (default 32)")
    features.add_argument("--device", default="cpu", help="such as cuda (default: cpu)")

    for each in (show, train, evaluate, study, plan, compare, prepare, label):
        each.add_argument("overrides", nargs="*", metavar="key=value", help="overrides, such as seed=3 or data=world")
    return parser


def _add_score(score: argparse.ArgumentParser) -> None:
    def compare(parser: argparse.ArgumentParser, place: str) -> None:
        help_line = "the paired difference of two prediction files, in place of PREDICTIONS"
        # A name for each place: the parser of the task would overwrite what the parser of the verb has read.
        options: dict[str, Any] = {"nargs": 2, "type": Path, "metavar": ("A", "B"), "default": [], "help": help_line}
        parser.add_argument("--compare", action="append", dest=f"compare_{place}", **options)

    compare(score, "before")
    tasks = score.add_subparsers(required=True, metavar="TASK", dest="task")

    def task(name: str, predictions: str, help_line: str) -> argparse.ArgumentParser:
        added = tasks.add_parser(name, help=help_line, description=help_line)
        added.add_argument("predictions", type=Path, nargs="?", metavar=predictions)
        compare(added, "behind")
        added.add_argument("--json", type=Path, metavar="OUT", help="write the unrounded scores here")
        added.add_argument("--allow-missing", action="store_true", help="score missing predictions as wrong")
        added.add_argument("--resamples", type=int, default=1000, metavar="N", help="of the bootstrap (default 1000)")
        added.add_argument("--seed", type=int, default=0, help="of the bootstrap (default 0)")
        return added

    def files(parser: argparse.ArgumentParser, required: bool, **options: str) -> None:
        for name, help_line in options.items():
            flag = f"--{name.replace('_', '-')}"
            parser.add_argument(flag, type=Path, metavar="FILE", required=required, help=help_line)

    vqav2 = task("vqav2", "RESULTS.json", "VQA accuracy, by answer type and question type.")
    files(vqav2, True, annotations="the official annotations of the split", questions="the official questions")
    vqav2.add_argument(
        "--rule", choices=("2021", "2016"), default="2021", help="the official script of which year (default 2021)"
    )
    gqa = task("gqa", "PREDICTIONS.json", "GQA's suite: accuracy, consistency, validity, grounding and the others.")
    files(gqa, True, questions="the balanced questions of the split; a folder of chunks will do, for any of these")
    files(
        gqa,
        False,
        all_questions="all questions of the split, all predicted: for consistency",
        choices="for validity and plausibility",
        scenes="scene graphs: for grounding",
        attentions="of the model: for grounding",
    )
    gqa.add_argument(
        "--attention-form", choices=("maps", "boxes"), help="of the attentions, where their size does not tell"
    )
    nlvr2 = task("nlvr2", "PREDICTIONS.csv", "NLVR2 accuracy and consistency.")
    files(nlvr2, True, data="the official JSON lines of the split, such as dev.json")
    files(nlvr2, False, balanced="its balanced subset", unbalanced="its unbalanced subset")


def _compose(options: argparse.Namespace) -> RunConfig:
    from vlm.config import compose
    from vlm.run import RunConfig

    return compose(options.config, options.overrides, RunConfig, options.config_dir)


def _show(options: argparse.Namespace) -> None:
    gc.disable()  # a short process, most of it imports, whose objects all stay
    config = _compose(options)

    from vlm.bookkeeping import ledger_of, prepared_root
    from vlm.config import dump_yaml, fingerprint
    from vlm.parameter_counts import parameter_counts

    text, counts = dump_yaml(config), parameter_counts(config)
    try:
        header, *rows = ledger_of(config, prepared_root(config), max_read=MAX_READ_TO_SHOW).rows()
    except UserError as error:  # what the run would stop at is no reason not to show it
        header, rows = ["component", "seen"], [["any", f"not counted: {error}"]]
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.syntax import Syntax
        from rich.table import Table

        console = Console()
        console.print(Syntax(text, "yaml", background_color="default", word_wrap=True))
        table = Table("component", title="parameters", title_justify="left")
        table.add_column("number", justify="right")
        for component, count in counts.items():
            table.add_row(component, f"{count:,}")
        console.print(table)
        seen = Table(*header, title="distinct examples ever seen", title_justify="left")
        for row in rows:
            seen.add_row(*row)
        console.print(seen)
        console.print(f"fingerprint [bold]{fingerprint(config)}[/bold]")
    else:  # comments, so that the output stays a YAML file
        print(text, end="")
        for component, count in counts.items():
            print(f"# parameters {component}: {count:,}")
        for name, *cells in rows:
            print(f"# ever seen by {name}: {', '.join(f'{k} {c}' for k, c in zip(header[1:], cells, strict=True))}")
        print(f"# fingerprint: {fingerprint(config)}")


def _train(options: argparse.Namespace) -> None:
    from vlm.config import available_configs

    # The name of a config wins over a folder of the same name; `./pretrain` is the folder.
    if Path(options.config).is_dir() and options.config not in available_configs(options.config_dir):
        if options.overrides:
            raise UserError(f"{options.config}: a run resumes as it began, without {' '.join(options.overrides)}")
        from vlm.run import resume

        _report(resume(Path(options.config)))
        return
    config = _compose(options)
    from vlm.run import train

    _report(train(config))


def _report(run: Path) -> None:
    """The scores of a finished run, and where it lies."""
    import json

    from vlm.run import RESULT

    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        for name, value in json.loads((run / RESULT).read_text())["scores"].items():
            print(f"{name:24} {value:8.2f}")
        print(run)


def _evaluate(options: argparse.Namespace) -> None:
    from vlm.evaluation import evaluate_run

    scores = evaluate_run(options.run, options.overrides, options.baseline)
    for name, score in scores.items():
        print(f"{name}: {score:.2f}")
    if not scores:
        print("no scores: this split comes without answers; the predictions are written")


def _predict(options: argparse.Namespace) -> None:
    if options.batch_size < 1:
        raise UserError(f"--batch-size must be at least 1. Got {options.batch_size}")
    from vlm.predicting import predict

    files = options.questions, options.images, options.out
    chosen = options.allow_missing, options.batch_size, options.device, options.trust_code
    predict(options.checkpoint, options.task, *files, *chosen)


def _answer(options: argparse.Namespace) -> None:
    if options.top < 1:
        raise UserError(f"--top must be at least 1. Got {options.top}")
    from vlm.predicting import answers_to

    answers, sums_to_one = answers_to(
        options.checkpoint, options.images, options.question, options.device, options.trust_code
    )
    best = list(answers.items())[: options.top]
    if not sys.stdout.isatty():  # a line each, for other programs
        for answer, probability in best:
            print(f"{probability:.4f}\t{_printable(answer)}")
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("answer")
    table.add_column("probability", justify="right")
    for answer, probability in best:
        table.add_row(Text(_printable(answer)), f"{probability:.1%}")
    console = Console()
    console.print(table)
    if not sums_to_one:
        console.print("each answer has a probability of its own: they do not sum to 1", style="dim", soft_wrap=True)


def _inspect(options: argparse.Namespace) -> None:
    from vlm.inspect.inspecting import inspect

    inspect(options.runs, options.set, options.host, options.port, options.trust_code)


def _study(options: argparse.Namespace) -> None:
    if options.address is not None and options.on != "ray":
        raise UserError("--address belongs to --on ray")
    if options.sbatch and options.on != "slurm":
        raise UserError("--sbatch belongs to --on slurm")
    unreadable = [text for text in options.sbatch if "=" not in text.strip("=")]
    if unreadable:
        raise UserError(f"--sbatch {unreadable[0]}: expected OPTION=VALUE, such as partition=gpu")
    if options.jobs is not None and options.jobs < 1:
        raise UserError(f"--jobs: must be at least 1, got {options.jobs}")
    if options.dry_run:
        if options.on != "local" or options.folder is not None or options.retry_failed:
            raise UserError(
                "--dry-run: goes on this machine and keeps nothing; leave out --on, --folder, --retry-failed"
            )
        from vlm.studies.outlook import dry_run
        from vlm.studies.run import load_study

        dry_run(load_study(options.study, None)[0], options.overrides, options.config_dir, options.jobs)
        return
    from vlm.studies.run import Place, run_study

    sbatch = dict(text.lstrip("-").split("=", 1) for text in options.sbatch)
    place = Place(options.on, options.jobs, options.address, sbatch)
    run_study(options.study, options.folder, place, options.overrides, options.config_dir, options.retry_failed)


def _plan(options: argparse.Namespace) -> None:
    from vlm.studies.outlook import show_plan
    from vlm.studies.run import load_study

    if options.rate is not None and not (options.flops and 0 < options.rate < float("inf")):
        raise UserError(f"--rate {options.rate}: goes with --flops, and must be above 0")
    study, folder = load_study(options.study, options.folder)
    if options.flops:
        from vlm.studies.costs import Hardware, markdown_table, study_cost
        from vlm.studies.plan import plan

        hardware = Hardware() if options.rate is None else Hardware("device", options.rate, 1.0)
        print(markdown_table(study_cost(plan(study, folder, options.overrides, options.config_dir)), hardware))
        return
    show_plan(study, folder, options.overrides, options.config_dir, options.jobs, options.probe, options.list)


def _compare(options: argparse.Namespace) -> None:
    from vlm.studies.run import compare_study

    chosen = options.by, options.task, options.against
    compare_study(options.study, options.folder, *chosen, options.overrides, options.config_dir)


def _score(options: argparse.Namespace) -> None:
    pairs: list[list[Path]] = [*options.compare_before, *options.compare_behind]
    if len(pairs) > 1:
        raise UserError(f"vlm score {options.task}: --compare is given {len(pairs)} times. Give two files, once")
    compared = pairs[0] if pairs else []
    if (options.predictions is None) == (not compared):
        raise UserError(f"vlm score {options.task}: give one prediction file, or two with --compare")
    if options.resamples < 1 or options.seed < 0:
        raise UserError("--resamples must be at least 1 and --seed at least 0")
    if options.json is not None and not options.json.parent.is_dir():
        raise UserError(f"{options.json.parent}: no such folder for {options.json.name}. Make it first")
    named = {name: path for name, path in vars(options).items() if isinstance(path, Path) and name != "json"}
    given = [*named.values(), *compared]
    taken = {path.resolve() for path in given}
    if options.json is not None and not taken.isdisjoint((options.json.resolve(), options.json.resolve().parent)):
        raise UserError(f"{options.json}: --json would replace a file that is read, or lie among them. Choose another")
    lacking = next((path for path in given if not path.exists()), None)
    if lacking is not None:
        raise UserError(f"{lacking}: no such file or folder")
    from vlm.scoring.report import report
    from vlm.scoring.score import score_gqa, score_nlvr2, score_vqav2

    predictions = compared or [options.predictions]
    missing = options.allow_missing
    gc.disable()  # millions of strings and no cycle: looking for one takes a sixth of the time
    try:
        if options.task == "vqav2":
            scoring = score_vqav2(predictions, options.annotations, options.questions, options.rule, missing)
        elif options.task == "gqa":
            truth = (options.questions, options.all_questions, options.choices, options.scenes, options.attentions)
            scoring = score_gqa(predictions, *truth, missing, options.attention_form)
        else:
            scoring = score_nlvr2(predictions, options.data, options.balanced, options.unbalanced, missing)
        report(scoring, options.json, options.resamples, options.seed)
    finally:
        gc.enable()


def _export(options: argparse.Namespace) -> None:
    if options.private and options.push is None:
        raise UserError("--private belongs to --push")
    if options.encoders and options.push is not None:
        raise UserError("--encoders: writes folders of other libraries; push them with those")
    from vlm.exporting import export, export_encoders
    from vlm.hub import load, push

    if options.encoders:
        for folder in export_encoders(load(options.run), options.folder):
            print(folder)
        return
    print(export(options.run, options.folder))
    if options.push is not None:
        print(push(options.folder, options.push, options.private))


def _features(options: argparse.Namespace) -> None:
    if options.out.suffix not in (".parquet", ".safetensors"):
        raise UserError(f"--out {options.out}: must end in .parquet or .safetensors")
    from vlm.features import write_features
    from vlm.hub import load

    model = load(options.model, device=options.device)
    count = write_features(model, options.images, options.out, options.pool, options.batch_size, options.damaged)
    print(f"{count:,} images: {options.out}")


def _label(options: argparse.Namespace) -> None:
    from functools import partial

    from rich.console import Console

    from vlm.config import apply_overrides
    from vlm.labelling import LabellingConfig

    kind, _, name = options.labeller.partition(":")
    if kind not in ("timm", "open_clip", "custom") or not name:
        raise UserError(f"--with {options.labeller}: expected timm:NAME, open_clip:NAME or custom:MODULE:CLASS")
    if options.on == "local" and (options.address is not None or options.workers is not None):
        raise UserError("--address and --workers belong to --on ray")
    if options.workers is not None and options.workers < 1:
        raise UserError(f"--workers must be at least 1. Got {options.workers}")
    labeller = {"type": kind, "target" if kind == "custom" else "name": name}
    config = LabellingConfig.model_validate({"labeller": labeller, "vocabulary": options.vocabulary})
    config = apply_overrides(config, options.overrides)
    slug = re.sub(r"[^A-Za-z0-9_-]+", "-", name)
    to = options.to or options.shards.with_name(f"{options.shards.name}-labels-{slug}")

    from vlm.labelling.labelling import Job, label_shards, locally
    from vlm.labelling.on_ray import on_ray

    launch = locally if options.on == "local" else partial(on_ray, address=options.address, workers=options.workers)
    label_shards(Job(options.shards, config), to, launch, Console())


def _prepare(options: argparse.Namespace) -> None:
    from vlm.config import compose

    if options.data in ("world", "emoji"):
        if options.source is not None or options.max_missing is not None or options.workers is not None:
            raise UserError(
                f"prepare {options.data}: takes neither --from nor --max-missing nor --workers; it needs no release"
            )
        if options.data == "world":
            from data_loaders.world.config import WorldConfig
            from data_loaders.world.writing import write_world

            write_world(compose(None, options.overrides, WorldConfig), options.to, progress=True)
        else:
            from data_loaders.prepare.emoji import write_emoji
            from data_loaders.prepare.emoji_config import EmojiConfig

            write_emoji(compose(None, options.overrides, EmojiConfig), options.to, progress=True)
        return
    if options.source is None:
        raise UserError(f"prepare {options.data}: --from DIR must name the folder with the files as downloaded")
    if options.data in ("vqav2", "gqa", "nlvr2"):
        _prepare_task(options)
    else:
        _prepare_pairs(options)


def _prepare_task(options: argparse.Namespace) -> None:
    from data_loaders.prepare.preparation import Options
    from vlm.config import compose

    if options.workers is not None:
        raise UserError(f"prepare {options.data}: takes no --workers; it reads images on threads")
    wanted = Options(options.source, options.to, options.max_missing or 0.0)
    if options.data == "vqav2":
        from data_loaders.prepare.vqav2 import VQAv2PreparerConfig, prepare_vqav2

        prepare_vqav2(compose(None, options.overrides, VQAv2PreparerConfig), wanted)
    elif options.data == "gqa":
        from data_loaders.prepare.gqa import GQAPreparerConfig, prepare_gqa

        prepare_gqa(compose(None, options.overrides, GQAPreparerConfig), wanted)
    else:
        from data_loaders.prepare.nlvr2 import NLVR2PreparerConfig, prepare_nlvr2

        prepare_nlvr2(compose(None, options.overrides, NLVR2PreparerConfig), wanted)


def _prepare_pairs(options: argparse.Namespace) -> None:
    from data_loaders.prepare.image_text import Options
    from vlm.config import compose

    if options.workers is not None and options.workers < 1:
        raise UserError(f"--workers must be at least 1. Got {options.workers}")
    usual = 1.0 if options.data in ("conceptual_captions", "machine_labels") else 0.0  # most links are dead by now
    allowed = usual if options.max_missing is None else options.max_missing
    wanted = Options(options.source, options.to, allowed, options.workers or 0)
    if options.data == "conceptual_captions":
        from data_loaders.prepare.conceptual_captions import (
            ConceptualCaptionsPreparerConfig,
            prepare_conceptual_captions,
        )

        prepare_conceptual_captions(compose(None, options.overrides, ConceptualCaptionsPreparerConfig), wanted)
    elif options.data == "machine_labels":
        from data_loaders.prepare.conceptual_captions import MachineLabelsPreparerConfig, prepare_machine_labels

        prepare_machine_labels(compose(None, options.overrides, MachineLabelsPreparerConfig), wanted)
    elif options.data == "imagenet":
        from data_loaders.prepare.imagenet import ImageNetPreparerConfig, prepare_imagenet

        prepare_imagenet(compose(None, options.overrides, ImageNetPreparerConfig), wanted)
    else:
        from data_loaders.prepare.folder import FolderPreparerConfig, prepare_folder

        prepare_folder(compose(None, options.overrides, FolderPreparerConfig), wanted)


def _overlap(options: argparse.Namespace) -> None:
    from data_loaders.prepare.overlap import report_overlap

    if len(options.roots) < 2:
        raise UserError("vlm overlap: give at least two data roots, or lists of keys")
    report_overlap(options.roots, options.split, options.to)


if __name__ == "__main__":
    raise SystemExit(main())
