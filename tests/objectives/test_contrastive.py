from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from vlm.objectives import ContrastiveConfig
from vlm.objectives.contrastive import Contrastive
from vlm.types import Batch, Encoded, View

COUNT, LENGTH, PATCHES, WIDTH = 4, 5, 6, 8
SPECIAL = torch.tensor([[number in (0, 4) for number in range(LENGTH)]] * COUNT)  # CLS and SEP
SPECIAL[1, 2:] = SPECIAL[2, 3:] = True  # and padding


def make_view(objective: Contrastive, special: torch.Tensor = SPECIAL) -> View:
    ids, mask = torch.zeros(COUNT, LENGTH, dtype=torch.long), torch.ones(COUNT, LENGTH, dtype=torch.bool)
    return objective.view(Batch(tuple("abcd"), None, ids, mask, special))


def make_encoded(num_extra: int = 0) -> Encoded:
    generator = torch.Generator().manual_seed(0)
    text = torch.randn(COUNT, LENGTH, WIDTH, generator=generator)
    image = torch.randn(COUNT, 1 + PATCHES, WIDTH, generator=generator)
    extra = torch.randn(num_extra, 1 + PATCHES, WIDTH, generator=generator)
    return Encoded(text=text, image=torch.cat([image, extra]))


def by_hand(encoded: Encoded, temperature: float) -> tuple[float, float]:
    """(loss, accuracy) in plain loops, from the words of each text and the patches of each image."""
    assert encoded.text is not None and encoded.image is not None
    text, image, special = encoded.text.double().numpy(), encoded.image.double().numpy(), SPECIAL.numpy()
    texts = [text[row][~special[row]].mean(0) for row in range(COUNT)]
    images = [image[row][1:].mean(0) for row in range(COUNT)]
    cosine = np.array([[t @ i / np.linalg.norm(t) / np.linalg.norm(i) for i in images] for t in texts])
    odds = np.exp(cosine / temperature)
    losses = [-math.log(odds[k, k] / odds[k].sum()) - math.log(odds[k, k] / odds[:, k].sum()) for k in range(COUNT)]
    return sum(losses) / COUNT / 2, float((cosine.argmax(1) == np.arange(COUNT)).mean())


@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_the_loss_equals_a_hand_computation(temperature: float) -> None:
    objective = Contrastive(ContrastiveConfig(temperature=temperature))
    encoded = make_encoded()
    loss = objective.loss(make_view(objective), encoded)
    value, accuracy = by_hand(encoded, temperature)
    assert float(loss.value.detach()) == pytest.approx(value, rel=1e-5)
    assert float(loss.figures["accuracy"]) == pytest.approx(accuracy)
    assert loss.count == COUNT


def test_an_example_that_comes_twice_is_no_negative_of_itself() -> None:
    """With a and c the same example, the loss is the mean over three kinds of row, none of which sees its double."""
    objective, encoded = Contrastive(ContrastiveConfig()), make_encoded()
    ids, mask = torch.zeros(COUNT, LENGTH, dtype=torch.long), torch.ones(COUNT, LENGTH, dtype=torch.bool)
    view = objective.view(Batch(("a", "b", "a", "d"), None, ids, mask, SPECIAL))
    assert view.targets["again"].nonzero().tolist() == [[0, 2], [2, 0]]
    assert encoded.image is not None
    encoded.image[2] = encoded.image[0]
    assert encoded.text is not None
    aligned = encoded.image[:, 1:].mean(1)
    encoded.text = aligned[:, None].expand(-1, LENGTH, -1)
    own = objective.loss(view, encoded).value
    distinct = objective.loss(make_view(objective), encoded).value
    assert float(distinct.detach()) > float(own.detach()) + 0.3  # a double costs each of the two rows log(2)


def test_images_beyond_the_texts_are_ignored() -> None:
    objective = Contrastive(ContrastiveConfig())
    view = make_view(objective)
    plain, extended = (objective.loss(view, make_encoded(num_extra)).value for num_extra in (0, 3))
    assert torch.equal(plain, extended)


def test_special_tokens_and_the_image_cls_are_ignored() -> None:
    objective = Contrastive(ContrastiveConfig())
    encoded, changed = make_encoded(), make_encoded()
    assert changed.text is not None and changed.image is not None
    changed.text[SPECIAL] += 5
    changed.image[:, 0] -= 5
    view = make_view(objective)
    assert torch.equal(objective.loss(view, encoded).value, objective.loss(view, changed).value)


def test_aligned_pairs_cost_little_and_swapped_ones_much() -> None:
    objective = Contrastive(ContrastiveConfig())
    directions = torch.eye(WIDTH)[:COUNT]
    text, image = (directions[:, None].expand(-1, length, -1).clone() for length in (LENGTH, 1 + PATCHES))
    view = make_view(objective)
    aligned = objective.loss(view, Encoded(text=text, image=image))
    swapped = objective.loss(view, Encoded(text=text, image=image.roll(1, 0)))
    assert float(aligned.value.detach()) < 0.01
    assert float(swapped.value.detach()) > 10
    assert (float(aligned.figures["accuracy"]), float(swapped.figures["accuracy"])) == (1.0, 0.0)


def test_the_temperature_is_learnt_within_its_bound() -> None:
    objective = Contrastive(ContrastiveConfig(temperature=0.07))
    view, encoded = make_view(objective), make_encoded()
    objective.loss(view, encoded).value.backward()
    assert objective.log_scale.grad is not None and float(objective.log_scale.grad.abs()) > 0
    with torch.no_grad():
        objective.log_scale.fill_(20.0)
    assert float(objective.loss(view, encoded).value.detach()) == pytest.approx(by_hand(encoded, 0.01)[0], rel=1e-4)


def test_a_text_without_words_gives_finite_gradients() -> None:
    objective = Contrastive(ContrastiveConfig())
    encoded = make_encoded()
    assert encoded.text is not None
    encoded.text.requires_grad_()
    special = SPECIAL.clone()
    special[1] = True
    loss = objective.loss(make_view(objective, special), encoded).value
    loss.backward()
    assert torch.isfinite(loss)
    assert encoded.text.grad is not None and torch.isfinite(encoded.text.grad).all()


def test_an_image_without_a_text_is_a_negative_and_nothing_else() -> None:
    objective, encoded = Contrastive(ContrastiveConfig()), make_encoded()
    assert encoded.text is not None and encoded.image is not None
    ids, mask = torch.zeros(COUNT, LENGTH, dtype=torch.long), torch.ones(COUNT, LENGTH, dtype=torch.bool)
    batch = Batch(tuple("abcd"), None, ids, mask, SPECIAL, sources=("human", "none", "human", "human"))
    loss = objective.loss(objective.view(batch), encoded)
    changed = Encoded(text=encoded.text.clone(), image=encoded.image)
    assert changed.text is not None
    changed.text[1] += 5  # what stands for the absent text
    assert torch.equal(objective.loss(objective.view(batch), changed).value, loss.value)
    other = Encoded(text=encoded.text, image=encoded.image.clone())
    assert other.image is not None
    other.image[1] += torch.randn(WIDTH)
    assert not torch.equal(objective.loss(objective.view(batch), other).value, loss.value)
    assert loss.count == 3 and loss.items is not None
    torch.testing.assert_close(loss.items().loss.mean(), loss.value.detach())
    batch.sources = ("none",) * 4
    nothing = objective.loss(objective.view(batch), encoded)
    assert (float(nothing.value.detach()), nothing.count) == (0.0, 0)
