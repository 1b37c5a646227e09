"""A run may take a part of another one's model: it says which, and the books still count it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vlm.bookkeeping import ledger_of
from vlm.config import ConfigError, fingerprint
from vlm.errors import UserError
from vlm.run import START, RunConfig, begin_model, build_tokenizer, read_checkpoint, train
from vlm.supervision.ledger import read_ledger

MakeConfig = Callable[..., RunConfig]
SHORT = ("trainer.samples=32", "supervision.fraction=0.5")
JOINED = "fusion,vision_projection,language_projection,pooler"


def weights(folder: Path) -> dict[str, Tensor]:
    states: dict[str, Tensor] = read_checkpoint(folder)["state_dict"]
    return {name.removeprefix("model."): value for name, value in states.items() if name.startswith("model.")}


def pairs(config: RunConfig, component: str) -> int:
    return ledger_of(config, None).count("pairs", [component]).known  # type: ignore[list-item]


def test_a_run_takes_a_part_tells_it_once_and_counts_it(
    make_config: MakeConfig, capfd: pytest.CaptureFixture[str]
) -> None:
    first = train(make_config("pretrain", *SHORT, folder="first"))
    there = weights(first)
    options = ("task=nlvr2", "trainer.samples=32", f"start_from={first}")

    wider = make_config("finetune", *options, "model.fusion.width=48", f"start_without=[{JOINED}]", folder="wider")
    model, found = begin_model(wider)
    assert found is not None
    assert {name.partition(".")[0] for name in found.taken} == {"vision", "language"}
    assert {name.partition(".")[0] for name in found.new} == {*JOINED.split(",")}
    assert {name.partition(".")[0] for name in found.left} == {*JOINED.split(","), "objectives"}
    assert all(torch.equal(model.state_dict()[name], there[name]) for name in found.taken)
    assert (pairs(wider, "vision"), pairs(wider, "language"), pairs(wider, "fusion")) == (32, 32, 0)

    capfd.readouterr()
    folder = train(wider)
    told = (folder / START).read_text()
    assert "component" in told and "\nnew: fusion." in told and "\nleft: objectives." in told
    assert capfd.readouterr().err.count("component") == 1
    (folder / "result.json").unlink()
    train(wider)  # resumed at its end
    assert capfd.readouterr().err.count("component") == 0
    assert read_ledger(folder / "ledger.json").count("pairs").known == 32

    with pytest.raises(UserError, match=r"fusion\..* has shape .* here.*start_without=\['fusion'\]"):
        begin_model(make_config("finetune", *options, "model.fusion.width=48", "start_without=[]"))
    with pytest.raises(UserError, match="start_without='fussion': neither the model nor"):
        begin_model(make_config("finetune", *options, "start_without=[fussion]"))

    fused_anew = make_config("finetune", *options, "start_without=[fusion]")
    assert pairs(fused_anew, "fusion") == 32  # the pooler and the projections have learnt from pairs

    own = make_config("finetune", *options, "start_without=[vision]", "model.vision.depth=1")
    model, found = begin_model(own)
    assert found is not None and {name.partition(".")[0] for name in found.new} == {"vision"}
    assert (pairs(own, "vision"), pairs(own, "language"), pairs(own, "fusion")) == (0, 32, 32)
    from_weights = make_config("finetune", *options, "start_without=[vision]", f"model.vision.weights={first}")
    assert torch.equal(begin_model(from_weights)[0].vision.state_dict()["norm.weight"], there["vision.norm.weight"])
    assert pairs(from_weights, "vision") == 32

    larger = make_config("finetune", *options, "start_without=[]", "model.vision.image_pixels=96")
    model, found = begin_model(larger)
    assert found is not None and not found.new
    assert model.vision.position.shape[1] == 4 * there["vision.position"].shape[1]

    anew = make_config("finetune", *options, "start_without=[language]")
    root = anew.data.prepare(progress=False)
    assert (root / "texts" / "train.txt").is_file()
    assert build_tokenizer(anew, root).vocabulary_size == build_tokenizer(wider, root).vocabulary_size


def test_taking_what_fits_of_the_same_model_is_starting_from_it(make_config: MakeConfig) -> None:
    first = train(make_config("pretrain", *SHORT, "model.vision.lora={rank: 2}", folder="first"))
    whole, part = (
        begin_model(make_config("pretrain", *SHORT, "model.vision.lora={rank: 3}", f"start_from={first}", *more))
        for more in ((), ("start_without=[]",))
    )
    merged = [name for name in whole[0].state_dict() if ".lora_" not in name]
    assert all(torch.equal(whole[0].state_dict()[name], part[0].state_dict()[name]) for name in merged)
    assert part[1] is not None and part[1].new and all("lora_" in n or "adapter_" in n for n in part[1].new)


def test_what_not_to_take_needs_a_run_to_take_from(make_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match="Give start_from=RUN too"):
        make_config("pretrain", "start_without=[fusion]")
    alone, started = make_config("pretrain"), make_config("pretrain", "start_from=a", "start_without=[]")
    assert len({fingerprint(alone), fingerprint(started), fingerprint(make_config("pretrain", "start_from=a"))}) == 3
