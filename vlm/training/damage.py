"""Keeps account of damaged examples that others stood in for, so that skipping is never silent."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from rich.console import Console

from vlm.types import Batch, Damage

FILE = "damaged.jsonl"


class DamagedExamples(Callback):
    """Lists each damaged example once in `damaged.jsonl` of the run's folder: shard, member, reason.

    `train/damaged` counts how often one was replaced since the run began, over all ranks. Every rank writes a file of
    its own while it trains; at the end they are one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.num_replaced = folder, 0
        self._listed: dict[tuple[str, int], Damage] = {}
        self._rank = 0

    def state_dict(self) -> dict[str, Any]:
        return {"num_replaced": self.num_replaced}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.num_replaced = int(state_dict["num_replaced"])

    def on_fit_start(self, trainer: lightning.Trainer, *_: Any) -> None:
        self._rank = trainer.global_rank
        self._listed = {(damage.shard, damage.position): damage for damage in _read(self._file(self._rank))}

    def on_train_batch_start(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        replaced = torch.tensor(len(batch.damages), device=module.device)
        self.num_replaced += int(trainer.strategy.reduce(replaced, reduce_op="sum"))
        module.log("train/damaged", float(self.num_replaced), batch_size=len(batch.keys))
        self._list(batch)

    def on_validation_batch_start(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, batch: Batch, *_: Any
    ) -> None:
        self._list(batch)

    def on_train_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        trainer.strategy.barrier()
        if self._rank != 0:
            return
        others = [self._file(rank) for rank in range(1, trainer.world_size)]
        for damage in (damage for file in others for damage in _read(file)):
            self._add(damage)
        for file in others:
            file.unlink(missing_ok=True)
        if self._listed:
            Console(stderr=True).print(
                f"{len(self._listed):,} examples are damaged. Others stood in for them {self.num_replaced:,} times in "
                f"training; {self.folder / FILE} lists them",
                highlight=False,
                soft_wrap=True,
            )

    def _list(self, batch: Batch) -> None:
        for damage in batch.damages:
            self._add(damage)

    def _add(self, damage: Damage) -> None:
        if (damage.shard, damage.position) not in self._listed:
            self._listed[damage.shard, damage.position] = damage
            with self._file(self._rank).open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(damage)) + "\n")

    def _file(self, rank: int) -> Path:
        return self.folder / (FILE if rank == 0 else f"{FILE}.rank{rank}")


def _read(file: Path) -> list[Damage]:
    """The lines of a list; a last one that a kill cut off is left out, and written again when it is met again."""
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.is_file() else []
    whole = [line for line in lines if line.endswith("\n")]
    if len(whole) < len(lines):
        file.write_text("".join(whole), encoding="utf-8")
    return [Damage(**json.loads(line)) for line in whole]
