"""Contrast over several ranks is that of one process with the whole batch, and open_clip's where that can say it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from vlm.objectives import ContrastiveConfig
from vlm.objectives.contrastive import Contrastive
from vlm.types import Batch, Encoded, Source

RANKS, COUNT, LENGTH, PATCHES, WIDTH = 2, 4, 5, 6, 8
LOSSES: dict[str, dict[str, Any]] = {"clip": {}, "siglip": {"temperature": 0.1}}
UNEVEN: tuple[Source, ...] = ("human", "none", "human", "human", "none", "human", "none", "machine")


def whole_batch() -> tuple[Tensor, Tensor]:
    """Projected (text, image) states of all ranks."""
    generator = torch.Generator().manual_seed(0)
    text = torch.randn(RANKS * COUNT, LENGTH, WIDTH, generator=generator)
    return text, torch.randn(RANKS * COUNT, 1 + PATCHES, WIDTH, generator=generator)


def gradients(loss: str, across_ranks: bool, rows: slice, keys: str, sources: tuple[Source, ...]) -> dict[str, Tensor]:
    """The loss of some rows times their number, the number, and the gradients of that product."""
    text, image = (states[rows].clone().requires_grad_() for states in whole_batch())
    objective = Contrastive(ContrastiveConfig(loss=loss, across_ranks=across_ranks, **LOSSES[loss]))  # type: ignore[arg-type]
    special = torch.zeros(len(text), LENGTH, dtype=torch.bool)
    ids, mask = torch.zeros(len(text), LENGTH, dtype=torch.long), ~special
    batch = Batch(tuple(keys[rows]), None, ids, mask, special, sources=sources[rows])
    found = objective.loss(objective.view(batch), Encoded(text=text, image=image))
    (found.value * found.count).backward()
    named = {name: parameter.grad for name, parameter in objective.named_parameters()}
    assert text.grad is not None and image.grad is not None
    values = {"text": text.grad, "image": image.grad, "loss": (found.value * found.count).detach()}
    return (
        values | {name: grad for name, grad in named.items() if grad is not None} | {"count": torch.tensor(found.count)}
    )


WORKER = """
import sys, torch
from torch import distributed
from test_across_ranks import CASES, COUNT, LOSSES, gradients
rank, folder = int(sys.argv[1]), sys.argv[2]
distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
mine = slice(rank * COUNT, (rank + 1) * COUNT)
found = {f"{loss}/{case}": gradients(loss, True, mine, *CASES[case]) for loss in LOSSES for case in CASES}

import open_clip.loss
from test_across_ranks import theirs
for loss in LOSSES:
    found[f"{loss}/open_clip"] = theirs(loss, mine, rank, 2)
torch.save(found, f"{folder}/{rank}.pt")
distributed.barrier()
distributed.destroy_process_group()
"""
CASES: dict[str, tuple[str, tuple[Source, ...]]] = {
    "whole": ("abcdefgh", ("human",) * 8),
    "doubles": ("abcdbfga", ("human",) * 8),  # on one rank, and on both
    "uneven": ("abcdefgh", UNEVEN),
    "alone": ("abcdefgh", ("none",) * 4 + ("human",) * 4),  # a rank without any text
}


def theirs(loss: str, rows: slice, rank: int = 0, world_size: int = 1) -> dict[str, Tensor]:
    """The same by open_clip. Its gather is one that torch has come to warn of."""
    import warnings

    from open_clip.loss import ClipLoss, SigLipLoss

    text, image = (states[rows].clone().requires_grad_() for states in whole_batch())
    features = [F.normalize(states.mean(1), dim=-1) for states in (image[:, 1:], text)]
    own = Contrastive(ContrastiveConfig(loss=loss, **LOSSES[loss]))  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if loss == "clip":
            options: dict[str, Any] = {"local_loss": True, "gather_with_grad": True} if world_size > 1 else {}
            value = ClipLoss(rank=rank, world_size=world_size, **options)(*features, own.log_scale.exp())
        else:
            value = SigLipLoss(rank=rank, world_size=world_size)(*features, own.log_scale.exp(), own.bias)
        (value * len(text)).backward()
    named = {name: parameter.grad for name, parameter in own.named_parameters()}
    assert text.grad is not None and image.grad is not None
    values = {"text": text.grad, "image": image.grad, "loss": (value * len(text)).detach()}
    return values | {name: grad for name, grad in named.items() if grad is not None}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Tensor]]]:
    """What each of two processes found."""
    folder, here = tmp_path_factory.mktemp("ranks"), Path(__file__).parent
    root = here.parent.parent
    command = f"import sys; sys.path[:0] = [{str(root)!r}, {str(here)!r}]\n{WORKER}"
    started = [
        subprocess.Popen([sys.executable, "-c", command, str(rank), str(folder)], stderr=subprocess.PIPE, text=True)
        for rank in range(RANKS)
    ]
    for process in started:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


def together(found: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Sums over the ranks, and the states' gradients side by side."""
    return {
        name: torch.cat([one[name] for one in found]) if name in ("text", "image") else sum(one[name] for one in found)  # type: ignore[misc]
        for name in found[0]
    }


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_give_loss_and_gradients_of_one_with_the_whole_batch(
    ranks: list[dict[str, dict[str, Tensor]]], loss: str, case: str
) -> None:
    expected = gradients(loss, False, slice(None), *CASES[case])
    found = together([one[f"{loss}/{case}"] for one in ranks])
    assert int(found["count"]) == int(expected["count"])
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_loss_and_gradients_are_those_of_open_clip(ranks: list[dict[str, dict[str, Tensor]]], loss: str) -> None:
    """On one process and on two, whose losses of siglip are shared out by images there and by texts here."""
    pairs = [(gradients(loss, False, slice(None), *CASES["whole"]), theirs(loss, slice(None)))]
    both = [together([one[f"{loss}/{name}"] for one in ranks]) for name in ("whole", "open_clip")]
    pairs.append((both[0], both[1]))
    for own, other in pairs:
        for name, value in other.items():
            torch.testing.assert_close(own[name], value, atol=1e-5, rtol=1e-5)


def test_a_validation_compares_within_its_rank(ranks: list[dict[str, dict[str, Tensor]]]) -> None:
    objective = Contrastive(ContrastiveConfig(across_ranks=True)).eval()
    special = torch.zeros(COUNT, LENGTH, dtype=torch.bool)
    view = objective.view(Batch(tuple("abcd"), None, special.long(), ~special, special))
    assert view.targets["again"].shape == (COUNT, COUNT)
