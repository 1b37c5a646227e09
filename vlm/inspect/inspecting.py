"""`vlm inspect`: from runs or a checkpoint to a page that is open until ctrl-C."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from vlm.config import load_yaml
from vlm.errors import UserError
from vlm.hub import LoadedModel, load
from vlm.inspect.evaluated import evaluated
from vlm.inspect.server import Inspection, InspectionServer, is_loopback
from vlm.run import CONFIG, RunConfig, task_of


def inspection_of(runs: Sequence[Path], overrides: Sequence[str] = (), trust_code: bool = False) -> Inspection:
    """What the page of one or two runs shows. Of a single checkpoint, or an export, there are questions of one's own
    alone; the model is that of the first run."""
    if len(runs) > 2:
        raise UserError(f"vlm inspect: one run or two. Got {len(runs)}")
    if (runs[0] / CONFIG).is_file():
        task: Any = task_of(load_yaml(runs[0] / CONFIG, RunConfig))
        has_predictions = any(runs[0].glob("predictions-*"))
        found = evaluated(runs, overrides) if has_predictions or len(runs) > 1 else None
        load_model: Callable[[], LoadedModel] = partial(load, runs[0], trust_code=trust_code)
    else:
        if len(runs) > 1:
            raise UserError(f"{runs[0]}: no run's folder, and only that holds predictions to compare")
        model = load(runs[0], trust_code=trust_code)
        task, found = task_of(model.config), None
        load_model = partial(_as_it_is, model)

    if overrides and found is None:
        raise UserError(f"{runs[0]}: --set is about predictions, of which there are none here")
    if not hasattr(task, "images_per_text"):
        raise UserError(f"{runs[0]}: was not fine-tuned on a task with answers, so there is nothing to ask it")
    return Inspection(found, load_model, task.images_per_text)


def _as_it_is(model: LoadedModel) -> LoadedModel:
    return model


def inspect(
    runs: Sequence[Path], overrides: Sequence[str], host: str = "127.0.0.1", port: int = 0, trust_code: bool = False
) -> None:
    """Serve the page until ctrl-C."""
    with InspectionServer(inspection_of(runs, overrides, trust_code), host, port) as server:
        console = Console(highlight=False, soft_wrap=True)
        console.print(f"{server.url}  (ctrl-C ends it)")
        if not is_loopback(host):
            console.print("Whoever reaches this machine can see the images and ask the model: there is no password")
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()
