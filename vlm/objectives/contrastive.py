"""Image-text contrast between the projected states of the two encoders, before any fusion."""

from __future__ import annotations

import hashlib
import math
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from vlm.objectives.matching import rows_with_text, same_key
from vlm.objectives.objective import Objective
from vlm.types import Batch, Encoded, Items, Loss, View

if TYPE_CHECKING:
    from vlm.objectives import ContrastiveConfig

MAX_SCALE = 100.0  # CLIP's bound on the inverse temperature, arXiv 2103.00020, section 2.5


class Contrastive(Objective):
    """Cross-entropy (CLIP) or binary cross-entropy (SigLIP) over the similarities of all images and texts.

    Align before fuse (ALBEF, arXiv 2107.07651), but between means of all projected tokens rather than CLS tokens: the
    very states that the fusion attends to come to lie in one space. An image without a text is a negative of the other
    texts and nothing else, and an example that comes twice is no negative of itself.

    `loss=clip`: the mean of both directions (arXiv 2103.00020). `loss=siglip`: each pair by itself, summed over the
    images of a text (arXiv 2303.15343). Where every example has a text and none comes twice, loss and gradients are
    those of open_clip's ClipLoss and SigLipLoss; these can leave nothing out, which is why they are not called.

    `across_ranks`: the texts and images of all ranks in training, with their gradients; the mean of the ranks' losses,
    by their counts, is then the loss of one process with all of the batch. A validation compares within a rank.
    """

    distils = True

    def __init__(self, config: ContrastiveConfig) -> None:
        super().__init__()
        self.config = config
        self.log_scale = nn.Parameter(torch.tensor(-math.log(config.temperature)))
        if config.loss == "siglip":
            self.bias = nn.Parameter(torch.tensor(config.bias))

    def view(self, batch: Batch) -> View:
        assert batch.special_mask is not None
        words, rows = ~batch.special_mask, rows_with_text(batch)
        if self.config.across_ranks and self.training and num_ranks() > 1:
            targets = _among_all_ranks(batch, rows)
        else:
            same = same_key(batch)[:, : len(words)]
            again = same & ~torch.eye(len(same), dtype=torch.bool, device=same.device)
            own = place = torch.arange(len(words), device=same.device)
            targets = {"again": again, "own": own, "place": place}
            if rows is not None:
                targets |= {"own": rows, "place": place[: len(rows)], "rows": rows, "columns": rows}
        targets["words"] = words
        of_step = partial(self.similarity, words)
        return View("apart", batch.text_ids, batch.text_mask, targets=targets, similarity=of_step)

    def count(self, view: View) -> int:
        return len(view.targets.get("rows", view.targets["words"]))

    def loss(self, view: View, encoded: Encoded) -> Loss:
        targets = view.targets
        own, place, alpha = targets["own"], targets["place"], targets.get("alpha")
        of_text, of_image = self._logits(view, encoded)
        if not len(own):  # no text in the batch; a mean over nothing would poison the weights
            nothing = of_text.sum() if of_image is None else of_text.sum() + of_image.sum()
            return Loss(nothing, 0, {"accuracy": torch.zeros((), device=own.device)})
        correct = of_text.argmax(-1) == own
        if of_image is None:
            hard = F.one_hot(own, of_text.shape[1]).float()
            losses = binary_losses(of_text, hard)
            value = losses.mean()
            if alpha is not None:
                value = (1 - alpha) * value + alpha * binary_losses(of_text, targets["soft"]).mean()
        else:
            value = (F.cross_entropy(of_text, own) + F.cross_entropy(of_image, place)) / 2
            if alpha is not None:
                soft = soft_cross_entropy(of_text, targets["soft"])
                soft = (soft + soft_cross_entropy(of_image, targets["soft_image"])) / 2
                value = (1 - alpha) * value + alpha * soft

        def items() -> Items:
            rows = targets.get("rows", own)
            if of_image is None:
                return Items(rows, losses.detach(), correct)
            both = [(of_text.detach(), own), (of_image.detach(), place)]
            each = [F.cross_entropy(logits, target, reduction="none") for logits, target in both]
            return Items(rows, (each[0] + each[1]) / 2, correct)

        return Loss(value, len(own), {"accuracy": correct.float().mean()}, items)

    def teach(self, view: View, encoded: Encoded) -> dict[str, Tensor]:
        """What a teacher takes for alike: over the images of each text, and over the texts of each image."""
        of_text, of_image = self._logits(view, encoded)
        if of_image is None:
            return {"soft": of_text.sigmoid()}
        return {"soft": of_text.softmax(-1), "soft_image": of_image.softmax(-1)}

    def similarity(self, words: Bool[Tensor, "b l"], encoded: Encoded) -> Float[Tensor, "b b"]:
        """Logits of each text with each image of the batch, an example with itself too."""
        text, image = self._pooled(words, encoded)
        return self._scale() * text @ image.T

    def _logits(self, view: View, encoded: Encoded) -> tuple[Float[Tensor, "n c"], Float[Tensor, "n t"] | None]:
        """Of each text with the images, and of each text's image with the texts (CLIP); -inf where one comes again."""
        targets = view.targets
        again, rows, columns = targets["again"], targets.get("rows"), targets.get("columns")
        text, image = self._pooled(targets["words"], encoded)
        scale, is_alone = self._scale(), again.shape[1] == len(text)
        if self.config.loss == "siglip":
            similarity = scale * text @ (image if is_alone else gather(image)).T + self.bias
            similarity = similarity.masked_fill(again, -math.inf)
            return (similarity if rows is None else similarity[rows]), None
        if is_alone:
            similarity = scale * text @ image.T
            of_image = similarity.T
        else:
            all_text, all_image = gather(torch.stack([text, image], dim=1)).unbind(1)
            similarity, of_image = scale * text @ all_image.T, scale * image @ all_text.T
        similarity, of_image = similarity.masked_fill(again, -math.inf), of_image.masked_fill(again, -math.inf)
        if rows is not None:
            similarity, of_image = similarity[rows], of_image[rows][:, columns]
        return similarity, of_image

    def _pooled(self, words: Tensor, encoded: Encoded) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b d"]]:
        """Means of the projected words and patches, of length 1."""
        words = words.unsqueeze(-1)
        text = (cast(Tensor, encoded.text) * words).sum(1) / words.sum(1).clamp(min=1)
        image = cast(Tensor, encoded.image)[: len(text), 1:].mean(1)  # beyond them lie images drawn as negatives
        return F.normalize(text.float(), dim=-1), F.normalize(image.float(), dim=-1)

    def _scale(self) -> Tensor:
        return self.log_scale.exp().clamp(max=MAX_SCALE)


def binary_losses(logits: Float[Tensor, "n c"], targets: Float[Tensor, "n c"]) -> Float[Tensor, " n"]:
    """Binary cross-entropy of each row, summed over its columns; one with a logit of -inf is left out."""
    out = logits == -math.inf
    losses = F.binary_cross_entropy_with_logits(logits.masked_fill(out, 0), targets, reduction="none")
    return losses.masked_fill(out, 0).sum(-1)


def soft_cross_entropy(logits: Float[Tensor, "n c"], targets: Float[Tensor, "n c"]) -> Float[Tensor, ""]:
    """The mean over rows; what has no probability may have a logit of -inf."""
    return -(targets * logits.log_softmax(-1)).masked_fill(targets == 0, 0).sum(-1).mean()


# --- Across ranks ----------------------------------------------------------------------------------------------------


class _Gather(torch.autograd.Function):
    """The tensors of all ranks along the first dimension. A tensor's gradient is the sum of all ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        parts = [torch.empty_like(tensor) for _ in range(num_ranks())]
        distributed.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        summed = gradient.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(summed)
        return summed.chunk(num_ranks())[distributed.get_rank()]


def gather(tensor: Tensor) -> Tensor:
    """The tensors of all ranks, of one shape, in order of rank, with their gradients."""
    gathered: Tensor = _Gather.apply(tensor)
    return gathered


def num_ranks() -> int:
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def _among_all_ranks(batch: Batch, rows: Tensor | None) -> dict[str, Tensor]:
    """As in `view`, where the columns are the examples of all ranks: own, coming again, and those with a text."""
    assert batch.text_ids is not None
    device, count = batch.text_ids.device, len(batch.text_ids)
    digests = [hashlib.sha256(key.encode()).digest()[:8] for key in batch.keys[:count]]
    keys = torch.tensor([int.from_bytes(digest, "big", signed=True) for digest in digests], device=device)
    mine = torch.arange(count, device=device)
    rows = mine if rows is None else rows
    has_text = torch.zeros(count, dtype=torch.long, device=device).index_fill(0, rows, 1)
    all_keys, texts = gather(torch.stack([keys, has_text], dim=1)).unbind(1)
    own = mine + distributed.get_rank() * count
    again = keys[:, None] == all_keys[None]
    again[mine, own] = False
    place = (texts.cumsum(0) - 1)[own[rows]]
    return {"again": again, "own": own[rows], "place": place, "rows": rows, "columns": texts.nonzero()[:, 0]}
