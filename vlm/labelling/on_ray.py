"""Labelling spread over a Ray cluster: Ray Data hands shards to workers that keep the model in memory."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from vlm.errors import UserError
from vlm.labelling import LabellingConfig
from vlm.labelling.labelling import Job, Outcome, Worker
from vlm.ray_cluster import connect


def on_ray(
    job: Job, numbers: Sequence[int], address: str | None = None, workers: int | None = None
) -> Iterator[Outcome]:
    """The shards of these numbers as Ray labels them; a worker that dies is replaced and its shard done again.

    `address`: a running cluster ("auto" finds the one of this machine); None starts one here. Every node must see the
    shards and the vocabulary under the same paths. A worker takes one GPU where the cluster has some, else one core.
    """
    ray, started = connect(address)
    importlib.import_module("ray.data")
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # the bar of `label_shards` counts images
    try:
        resources = ray.cluster_resources()
        gpus = int(resources.get("GPU", 0))
        at_once = min(workers or gpus or int(resources.get("CPU", 1)), len(numbers))
        rows = ray.data.from_items([{"shard": number} for number in numbers], override_num_blocks=len(numbers))
        labelled = rows.map(
            RayWorker,
            fn_constructor_args=(str(job.shards.resolve()), job.config.model_dump_json()),
            compute=ray.data.ActorPoolStrategy(size=at_once),
            num_gpus=1 if gpus else 0,
            num_cpus=0 if gpus else 1,
        )
        for row in labelled.iter_rows():
            if row["problem"]:
                raise UserError(str(row["problem"]))
            yield int(row["shard"]), str(row["labels"])
    finally:
        if started:
            ray.shutdown()


class RayWorker:
    """One process of the cluster with the model in its memory. What the user can mend comes back as text."""

    def __init__(self, shards: str, config: str) -> None:
        torch.set_num_threads(1)  # as many workers as cores
        self.job = Job(Path(shards), LabellingConfig.model_validate_json(config))
        self.worker: Worker | None = None

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        number = int(row["shard"])
        try:
            self.worker = self.worker or self.job.worker()
            ((_, labels),) = self.worker.label([number])
        except UserError as error:
            return {"shard": number, "labels": "", "problem": str(error)}
        return {"shard": number, "labels": labels, "problem": ""}
