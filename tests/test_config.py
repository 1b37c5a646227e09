from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import pytest
from pydantic import Field

from vlm.config import (
    Config,
    ConfigError,
    CustomConfig,
    RunReference,
    apply_overrides,
    available_configs,
    compose,
    did_you_mean,
    dump_yaml,
    fingerprint,
    load_yaml,
    not_identity,
)


class TimmConfig(Config):
    type: Literal["timm"] = "timm"
    name: str = "vit"
    dropout: float = Field(0.1, ge=0, le=1)


class TinyConfig(Config):
    type: Literal["tiny"] = "tiny"
    width: int = Field(32, gt=0)


Vision = Annotated[TimmConfig | TinyConfig | CustomConfig, Field(discriminator="type")]


class HumanConfig(Config):
    type: Literal["human"] = "human"


class MachineConfig(Config):
    type: Literal["machine"] = "machine"
    threshold: float = 0.5


Source = Annotated[HumanConfig | MachineConfig, Field(discriminator="type")]


class SupervisionConfig(Config):
    fraction: float = Field(1.0, ge=0, le=1)
    sources: tuple[Source, ...] = (HumanConfig(),)
    subset_seed: int = 0


class DataConfig(Config):
    folder: Path = not_identity(Path("data"))
    size: int = 10


class TrainerConfig(Config):
    max_steps: int = 1
    lr: float = 1e-4
    precision: Literal["32", "bf16-mixed"] = "32"
    devices: int = not_identity(1, ge=1)


class ModelConfig(Config):
    vision: Vision = TimmConfig(name="resnet50")
    language: Vision = TinyConfig()


class RunConfig(Config):
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    supervision: SupervisionConfig = SupervisionConfig()
    trainer: TrainerConfig = TrainerConfig(max_steps=100)
    start: RunReference | None = None
    seed: int = 0


FILES = {
    "pretrain.yaml": "defaults:\n  - data: world\n  - _self_\ntrainer:\n  lr: 1e-3\n",
    "data/world.yaml": "size: 20\n",
    "data/gqa.yaml": "size: 30\nfolder: ${oc.env:GQA_FOLDER,gqa}\n",
    "supervision/labels.yaml": "sources:\n  - type: machine\n    threshold: 0.25\n",
}


@pytest.fixture
def configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands for the packaged one."""
    monkeypatch.setattr("vlm.config.default_config_folder", lambda: tmp_path)
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def composed(configs: Path, *overrides: str) -> RunConfig:
    return compose("pretrain", overrides, RunConfig)


def refusal(configs: Path, *overrides: str, name: str = "pretrain") -> str:
    with pytest.raises(ConfigError) as caught:
        compose(name, overrides, RunConfig)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_files_hold_only_departures_from_the_python_defaults(configs: Path) -> None:
    config = composed(configs)
    assert config.data.size == 20
    assert config.trainer == TrainerConfig(max_steps=100, lr=1e-3)
    assert config.supervision == SupervisionConfig()


@pytest.mark.parametrize("prefix", ["", "+", "++"])
def test_an_override_sets_a_key_that_no_file_has(configs: Path, prefix: str) -> None:
    assert composed(configs, f"{prefix}supervision.fraction=0.05").supervision.fraction == 0.05


def test_without_a_file_the_python_defaults_are_overridden() -> None:
    assert compose(None, ["supervision.fraction=0.5"], RunConfig) == RunConfig(
        supervision=SupervisionConfig(fraction=0.5)
    )


def test_one_entry_of_a_list_can_be_overridden(configs: Path) -> None:
    config = composed(configs, "supervision=labels", "supervision.sources.0.threshold=0.75")
    assert config.supervision.sources == (MachineConfig(threshold=0.75),)


def test_a_group_is_chosen_by_name(configs: Path) -> None:
    assert composed(configs, "data=gqa").data == DataConfig(size=30, folder=Path("gqa"))


def test_a_group_that_the_defaults_list_does_not_name_can_be_chosen(configs: Path) -> None:
    for override in ("supervision=labels", "+supervision=labels"):
        config = composed(configs, override, "data=gqa", "supervision.fraction=0.5")
        assert config.supervision.sources == (MachineConfig(threshold=0.25),)
        assert config.supervision.fraction == 0.5
        assert config.data.size == 30


def test_an_override_wins_over_a_file_whatever_the_order(configs: Path) -> None:
    assert composed(configs, "data.size=7", "data=gqa").data.size == 7


def test_deleting_a_key_goes_back_to_the_python_default(configs: Path) -> None:
    assert composed(configs, "~trainer.lr").trainer.lr == 1e-4
    assert "nothing to delete" in refusal(configs, "~trainer.max_steps")


def test_choosing_a_variant_drops_the_fields_of_the_former_one(configs: Path) -> None:
    (configs / "pretrain.yaml").write_text("model:\n  vision:\n    type: timm\n    name: vit\n")
    for overrides in (["model.vision.width=8", "model.vision.type=tiny"], ["model.vision={type: tiny, width: 8}"]):
        assert composed(configs, *overrides).model.vision == TinyConfig(width=8)


def test_a_part_of_a_section_keeps_the_rest_of_its_default_value(configs: Path) -> None:
    config = composed(configs, "trainer.devices=2", "model.vision.dropout=0.3")
    assert config.trainer.max_steps == 100
    assert config.model.vision == TimmConfig(name="resnet50", dropout=0.3)
    assert composed(configs, "model.vision.type=timm").model.vision == TimmConfig(name="resnet50")


def test_a_folder_of_ones_own_is_searched_before_the_packaged_one(
    configs: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    own = tmp_path_factory.mktemp("own")
    (own / "data").mkdir()
    (own / "data" / "world.yaml").write_text("size: 99\n")
    (own / "mine.yaml").write_text("defaults:\n  - pretrain\n  - _self_\nseed: 5\n")
    config = compose("mine", ["supervision=labels"], RunConfig, own)
    assert (config.data.size, config.seed, config.trainer.lr) == (99, 5, 1e-3)
    assert config.supervision.sources == (MachineConfig(threshold=0.25),)
    assert compose("pretrain", ["data=gqa"], RunConfig, own).data.size == 30
    assert available_configs(own) == ["mine", "pretrain"]


def test_a_resolved_config_reads_back_to_an_equal_value(configs: Path, tmp_path: Path) -> None:
    config = composed(configs, "trainer.lr=1e-7", "start=runs/a-b", "data=gqa", "supervision=labels")
    file = tmp_path / "resolved.yaml"
    file.write_text(dump_yaml(config))
    assert load_yaml(file, RunConfig) == config


def test_overrides_apply_to_a_complete_value_as_well() -> None:
    config = RunConfig(seed=3, model=ModelConfig(vision=TinyConfig(width=8)))
    changed = apply_overrides(config, ["model.vision.type=timm", "data.size=4"])
    assert changed == RunConfig(seed=3, model=ModelConfig(vision=TimmConfig(name="resnet50")), data=DataConfig(size=4))
    with pytest.raises(ConfigError, match=r"^data.sise: unknown key\. Did you mean data\.size\?"):
        apply_overrides(config, ["data.sise=4"])


def test_a_config_is_frozen() -> None:
    with pytest.raises(pydantic.ValidationError):
        RunConfig().seed = 3  # type: ignore[misc]  # what is tested


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "supervision.fractoin=0.5",
            "supervision.fractoin: unknown key. Did you mean supervision.fraction? "
            "Available: fraction, sources, subset_seed",
        ),
        ("+trainer.max_step=5", "trainer.max_step: unknown key. Did you mean trainer.max_steps? Available: max_steps,"),
        ("fraction=0.5", "fraction: unknown key. Did you mean supervision.fraction? Available: model,"),
        ("trianer.lr=1", "trianer: unknown key. Did you mean trainer?"),
        ("supervision.fraction=1.5", "supervision.fraction: must be at most 1, got 1.5"),
        ("supervision.fraction=-1", "supervision.fraction: must be at least 0, got -1"),
        ("model.language.width=0", "model.language.width: must be greater than 0, got 0"),
        (
            "model.vision.type=timmm",
            "model.vision.type: unknown variant 'timmm'. Did you mean 'timm'? Available: timm, tiny, custom",
        ),
        ("model.vision.nam=x", "model.vision.nam: unknown key. Did you mean model.vision.name? Available: type, name"),
        ("trainer.max_steps=abc", "trainer.max_steps: expected an integer, got 'abc'"),
        ("trainer.max_steps=3.7", "trainer.max_steps: expected an integer, got 3.7"),
        ("trainer.max_steps='3'", "trainer.max_steps: expected an integer, got '3'"),
        ("trainer.max_steps=true", "trainer.max_steps: expected an integer, got true"),
        ("trainer.max_steps=null", "trainer.max_steps: expected an integer, got null"),
        ("trainer.lr=fast", "trainer.lr: expected a number, got 'fast'"),
        ("trainer=3", "trainer: expected keys with values, got 3"),
        ("model.vision=timm", "model.vision: expected keys with values, got 'timm'"),
        ("model.vision.name=3", "model.vision.name: expected text, got 3"),
        (
            "trainer.precision=bf16",
            "trainer.precision: unknown value 'bf16'. Did you mean 'bf16-mixed'? Available: 32,",
        ),
        ("supervision.sources=human", "supervision.sources: expected a list, got 'human'"),
        (
            "supervision.sources=[{type: machine, thresold: 1}]",
            "supervision.sources.0.thresold: unknown key. Did you mean supervision.sources.0.threshold? "
            "Available: type, threshold",
        ),
        ("supervision.sources=[{}]", "supervision.sources.0.type: required, but not given. Available: human, machine"),
        (
            "supervision.sources=[{type: human}, {type: machin}]",
            "supervision.sources.1.type: unknown variant 'machin'. Did you mean 'machine'? Available: human, machine",
        ),
        ("model.vision={type: custom}", "model.vision.target: required, but not given"),
        ("data=gqaa", "data: unknown option 'gqaa'. Did you mean 'gqa'? Available: gqa, world"),
        ("trainer.max_steps=1,2", "override 'trainer.max_steps=1,2': several values."),
        ("data=gqa,world", "override 'data=gqa,world': several values."),
        ("seed", "override 'seed': expected key=value"),
        ("seed=[1", "override 'seed=[1': expected key=value"),
        ("dta/x=world", "override 'dta/x=world': unknown config group 'dta/x'."),
        ("hydra.verbose=true", "override 'hydra.verbose=true': Hydra's own settings have no effect here"),
        ("seed=${nowhere}", "seed: Interpolation key 'nowhere' not found"),
        ("seed=???", "seed: required, but not given"),
    ],
)
def test_a_mistaken_override_is_one_line_with_path_and_near_name(configs: Path, override: str, message: str) -> None:
    found = refusal(configs, override)
    assert found.startswith(message)
    assert "(in " not in found


def test_an_unknown_config_is_answered_with_the_near_name(configs: Path) -> None:
    message = refusal(configs, name="pretran")
    assert message.startswith("unknown config 'pretran'. Did you mean 'pretrain'? Available: ")


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        (
            "pretrain.yaml",
            "trainer:\n  max_step: 5\n",
            "trainer.max_step: unknown key. Did you mean trainer.max_steps?",
        ),
        ("pretrain.yaml", "trainer:\n  max_steps: many\n", "trainer.max_steps: expected an integer, got 'many'"),
        ("data/gqa.yaml", "sise: 5\n", "data.sise: unknown key. Did you mean data.size?"),
        ("data/gqa.yaml", "# @package _global_\nsed: 5\n", "sed: unknown key. Did you mean seed?"),
    ],
)
def test_a_mistake_in_a_file_names_the_file(configs: Path, file: str, text: str, message: str) -> None:
    defaults = "defaults:\n  - data: gqa\n  - _self_\n"
    (configs / "pretrain.yaml").write_text(defaults)
    (configs / file).write_text(defaults + text if file == "pretrain.yaml" else text)
    found = refusal(configs)
    assert found.startswith(message)
    assert found.endswith(f"(in {configs / file})")


@pytest.mark.parametrize("file", ["pretrain.yaml", "data/world.yaml"])
@pytest.mark.parametrize("text", ["a: [1\n", "a: 1\na: 2\n", "\tb: 1\n"])
def test_broken_yaml_names_the_file_and_the_line(configs: Path, file: str, text: str) -> None:
    (configs / file).write_text(text)
    assert refusal(configs).startswith(f"{configs / file}, line ")


def test_a_defaults_list_with_an_unknown_option_is_answered_with_the_near_name(configs: Path) -> None:
    (configs / "pretrain.yaml").write_text("defaults:\n  - data: wrld\n")
    assert "Did you mean 'world'? Available: gqa, world" in refusal(configs)


def test_a_resolved_file_is_held_to_the_same_rules(tmp_path: Path) -> None:
    file = tmp_path / "resolved.yaml"
    for text, message in [
        ("seeed: 1\n", rf"seeed: unknown key\. Did you mean seed\? .*in {file}"),
        ("seed: [1\n", f"{file}, line 2: not valid YAML"),
        ("- 1\n", "config: expected keys with values"),
        ("seed: !!python/object/apply:os.getcwd []\n", f"{file}, line 1: not valid YAML"),
    ]:
        file.write_text(text)
        with pytest.raises(ConfigError, match=message):
            load_yaml(file, RunConfig)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_yaml(tmp_path / "absent.yaml", RunConfig)


def test_a_validators_own_words_reach_the_user(configs: Path) -> None:
    class Checked(Config):
        low: int = 0
        high: int = 1

        @pydantic.model_validator(mode="after")
        def _ordered(self) -> Checked:
            if self.low > self.high:
                raise ValueError(f"low ({self.low}) must not exceed high ({self.high})")
            return self

    class Holder(Config):
        inner: Checked = Checked()

    (configs / "plain.yaml").write_text("")
    with pytest.raises(ConfigError, match=r"^inner: low \(3\) must not exceed high \(1\)$"):
        compose("plain", ["inner.low=3"], Holder)


def test_two_values_share_a_fingerprint_exactly_if_they_share_the_numbers() -> None:
    base = fingerprint(RunConfig())
    assert len(base) == 12
    assert base == fingerprint(RunConfig(data=DataConfig(folder=Path("elsewhere"))))
    assert base == fingerprint(RunConfig(trainer=TrainerConfig(max_steps=100, devices=8)))
    others = [
        RunConfig(seed=1),
        RunConfig(trainer=TrainerConfig()),
        RunConfig(model=ModelConfig(vision=TimmConfig())),
        RunConfig(model=ModelConfig(vision=TinyConfig())),
        RunConfig(supervision=SupervisionConfig(sources=(HumanConfig(), MachineConfig()))),
        RunConfig(supervision=SupervisionConfig(sources=(MachineConfig(),))),
        RunConfig(start=Path("runs/pretrain-0123456789ab")),
    ]
    assert len({base, *map(fingerprint, others)}) == 1 + len(others)


def test_the_fingerprint_follows_a_run_by_its_name_not_by_its_place() -> None:
    one, two = "a-0123456789ab", "a-0123456789ac"
    here, there, other = (
        RunConfig(start=Path(folder)) for folder in (f"runs/{one}", f"/mnt/runs/{one}", f"runs/{two}")
    )
    assert fingerprint(here) == fingerprint(there) != fingerprint(other)


def test_a_path_without_a_fingerprint_counts_whole() -> None:
    files = (RunConfig(start=Path(folder)) for folder in ("first/model.safetensors", "second/model.safetensors"))
    assert len({fingerprint(config) for config in files}) == 2


def test_a_field_added_with_a_default_changes_no_fingerprint() -> None:
    class Section(Config):
        x: int = 0

    class Before(Config):
        section: Section = Section(x=1)
        value: int = 2

    class SectionLater(Section):
        y: int = 5

    class After(Config):
        section: SectionLater = SectionLater(x=1)
        value: int = 2
        extra: SectionLater = SectionLater()

    assert fingerprint(Before()) == fingerprint(After())
    assert fingerprint(Before(section=Section(x=3))) == fingerprint(After(section=SectionLater(x=3)))
    assert fingerprint(After()) != fingerprint(After(extra=SectionLater(y=6)))


def test_a_custom_class_is_imported_or_refused_in_one_line() -> None:
    assert CustomConfig(target="pathlib:Path").load() is Path
    assert CustomConfig(target="fractions:Fraction", options={"denominator": 2}).build(1) * 2 == 1
    with pytest.raises(ConfigError, match=r"'pathlib:Pathh': pathlib has no 'Pathh'\. Did you mean 'Path'"):
        CustomConfig(target="pathlib:Pathh").load()
    with pytest.raises(ConfigError, match="cannot import no_such_package"):
        CustomConfig(target="no_such_package.module:Class").load()


def test_did_you_mean_suggests_only_what_is_near() -> None:
    assert did_you_mean("timmm", ["timm", "tiny"]) == "Did you mean 'timm'? Available: timm, tiny"
    assert did_you_mean("zzz", ["timm", "tiny"]) == "Available: timm, tiny"
    assert did_you_mean("zzz", []) == ""


def test_importing_the_config_module_imports_neither_torch_nor_hydra() -> None:
    code = "import sys, vlm.config; print([name for name in ('torch', 'hydra', 'omegaconf') if name in sys.modules])"
    result: Any = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
