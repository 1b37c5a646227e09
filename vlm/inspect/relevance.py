"""Which patches of an image, and which words of a question, an answer leans on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vlm.errors import UserError
from vlm.hub import LoadedModel, Picture
from vlm.models.answering import answer_logits
from vlm.run import task_of
from vlm.types import Batch


@dataclass(frozen=True)
class Relevance:
    """How much the answer's logit leans on each patch and token, to first order. Above 0: towards the answer.

    `patches`: one map an image, rows from the top; None where the encoder's tokens are no grid. `overall`: what goes
    through the image's CLS token (and registers), which has no place in the picture; one an image. `tokens`: the text's
    tokens with their relevance. All are on one scale: that of the logit.
    """

    answer: str
    patches: tuple[Float[Tensor, "rows columns"] | None, ...]
    overall: tuple[float, ...]
    tokens: tuple[tuple[str, float], ...]


def relevance(model: LoadedModel, images: Sequence[Picture], question: str, answer: str | None = None) -> Relevance:
    """Gradient times input at the fusion's door: the states of the image and text tokens as the fusion is given them.

    For any encoder and any fusion, since it asks for nothing but gradients (Simonyan et al., arXiv 1312.6034; Ancona et
    al., arXiv 1711.06104). `answer`: of the model's answers; None: the most likely one.

    What it is not: the states of a transformer's patches know of their neighbours, so a map shows which tokens the
    fusion read, and only roughly which pixels. It is a slope at one point: where the answer is saturated it is small,
    and it says nothing of how the answer would change if a whole object were gone.
    """
    task: Any = task_of(model.config)
    if model.head is None:
        raise UserError(f"run {model.config.name!r} was not fine-tuned on a task with answers; load one that was")
    if answer is not None and answer not in model.answers:
        raise UserError(f"{answer!r} is none of the model's {len(model.answers):,} answers")
    if len(images) != task.images_per_text:
        raise ValueError(f"the question needs {task.images_per_text} image(s). Got {len(images)}")
    ids, mask, _ = model.tokenizer([question])
    batch = Batch(
        keys=(question,),
        image=model.pixels(images),
        text_ids=ids.to(model.device),
        text_mask=mask.to(model.device),
        images_per_text=task.images_per_text,
    )
    seen: dict[str, list[Tensor]] = {"vision": [], "language": []}

    def watch(name: str, module: nn.Module) -> Any:
        def keep(_: nn.Module, __: Any, states: Tensor) -> Tensor:
            # A leaf of its own: what lies before the fusion needs no gradient, be it frozen or not.
            seen[name].append(states.detach().requires_grad_())
            return seen[name][-1]

        return module.register_forward_hook(keep)

    hooks = [watch(name, getattr(model.model, f"{name}_projection")) for name in seen]
    try:
        with torch.enable_grad():
            logits = answer_logits(model.model, model.head, batch, task.images_in_turn)[0].float()
            number = int(logits.argmax()) if answer is None else model.answers.index(answer)
            inputs = [states for parts in seen.values() for states in parts]
            gradients = torch.autograd.grad(logits[number], inputs, allow_unused=True)
    finally:
        for hook in hooks:
            hook.remove()
    products = {
        id(s): (s * g if g is not None else torch.zeros_like(s)) for s, g in zip(inputs, gradients, strict=True)
    }
    # Where the fusion takes several layers of an encoder, each token's are summed: [b layers p d] -> [b p].
    vision, language = (torch.stack([_by_token(products[id(states)]) for states in seen[name]]).sum(0) for name in seen)
    maps = [_as_grid(row, model.model.vision) for row in vision.detach().cpu()]
    tokens = [
        (str(model.tokenizer.backend.id_to_token(one)), float(value))
        for one, value, real in zip(
            ids[0].tolist(), language.detach().cpu().reshape(-1, ids.shape[1]).sum(0), mask[0].tolist(), strict=True
        )
        if real
    ]
    return Relevance(
        model.answers[number], tuple(grid for grid, _ in maps), tuple(rest for _, rest in maps), tuple(tokens)
    )


def _by_token(product: Tensor) -> Float[Tensor, "b p"]:
    summed = product.sum(-1)
    return summed if summed.ndim == 2 else summed.flatten(1, -2).sum(1)


def _as_grid(row: Float[Tensor, " p"], vision: nn.Module) -> tuple[Float[Tensor, "rows columns"] | None, float]:
    """The patches as a square, and the sum of the tokens before them."""
    before = int(getattr(getattr(vision, "tower", vision), "num_prefix_tokens", 1))  # of others: CLS alone
    side = math.isqrt(max(len(row) - before, 0))
    if side and side * side == len(row) - before:
        return row[before:].reshape(side, side), float(row[:before].sum())
    return None, float(row.sum())
