"""Many configs at once come out as one at a time."""

from __future__ import annotations

import pytest

from vlm.config import Composer, ConfigError, Fingerprints, Setting, compose, fingerprint
from vlm.run import RunConfig


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["supervision.fraction=0.05", "seed=3"],
        ["model.vision.type=timm", "model.vision.name=resnet18"],
        ["model.vision={type: tiny, width: 32}", "model.vision.depth=1"],
        ["trainer={passes: 2}", "trainer.samples=64"],
        ["supervision=machine_labels", "supervision.subset_seed=${seed}", "seed=7"],
        ["supervision.sources=[{type: captions}, {type: none, weight: 0.5}]"],
        ["supervision.subset_seed=${trainer.batch_size}", "trainer.batch_size=96"],
        ["name='run-${seed}'", "~trainer.passes", "seed=4"],
        ["data=folder", "data.root=/data", "+declared.vision={pairs: 3}"],
    ],
)
def test_a_composer_gives_what_compose_gives(overrides: list[str]) -> None:
    composer = Composer(RunConfig)
    others = [composer.compose("pretrain", [f"seed={seed}", "model=tiny"]) for seed in (1, 2)]
    composed = composer.compose("pretrain", overrides)
    assert composed == compose("pretrain", overrides, RunConfig)
    assert fingerprint(composed) == fingerprint(compose("pretrain", overrides, RunConfig))
    assert others[0] == compose("pretrain", ["seed=1", "model=tiny"], RunConfig)
    assert others[0].model is others[1].model  # validated once


@pytest.mark.parametrize(
    "overrides",
    [
        ["supervision.fractoin=1"],
        ["supervision.fraction=5"],
        ["supervision.fraction='0.5'"],
        ["model.vision.type=tmm"],
        ["data=wrld"],
        ["~data.nothing"],
        ["seed=${sead}"],
        ["start_from=7"],
        ["trainer.batch_size=7", "trainer.accumulate=2"],
    ],
)
def test_a_composer_refuses_what_compose_refuses(overrides: list[str]) -> None:
    with pytest.raises(ConfigError) as one:
        Composer(RunConfig).compose("pretrain", overrides)
    with pytest.raises(ConfigError) as many:
        compose("pretrain", overrides, RunConfig)
    assert str(one.value) == str(many.value)


def test_settings_are_overrides_whose_values_need_no_quotes() -> None:
    path = "/it's a (strange) folder\\"
    expected = compose("pretrain", ["data=folder", "data.root=x", "seed=3"], RunConfig).model_dump(mode="json")
    expected["data"]["root"] = path
    settings = [Setting("data", "folder"), Setting("seed", 3), Setting("data.root", path)]
    for composed in (compose("pretrain", settings, RunConfig), Composer(RunConfig).compose("pretrain", settings)):
        assert composed.model_dump(mode="json") == expected
    assert compose("pretrain", [str(setting) for setting in settings], RunConfig) == composed


def test_fingerprints_of_many_are_those_of_each() -> None:
    composer, fingerprints = Composer(RunConfig), Fingerprints()
    configs = [composer.compose("pretrain", [f"supervision.fraction={f}", "seed=1"]) for f in (0, 0.5, 1)]
    assert [fingerprints.of(config) for config in configs] == [fingerprint(config) for config in configs]
    assert len({fingerprints.of(config) for config in configs}) == 3
