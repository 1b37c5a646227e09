"""Downstream tasks, each with its official files, targets and scores. The variants are listed here and nowhere else."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from vlm.config import CustomConfig
from vlm.tasks.csv import CSVTask
from vlm.tasks.gqa import GQATask
from vlm.tasks.nlvr2 import NLVR2Task
from vlm.tasks.retrieval import RetrievalTask
from vlm.tasks.vqav2 import VQAv2Task

TaskConfig = Annotated[
    VQAv2Task | GQATask | NLVR2Task | CSVTask | RetrievalTask | CustomConfig, Field(discriminator="type")
]
