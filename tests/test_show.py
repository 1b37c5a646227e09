"""What `vlm show` shows: every config that ships is valid with every option, and parameters are counted truly."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from vlm.cli import main
from vlm.config import available_configs, compose, default_config_folder, dump_yaml, fingerprint, load_yaml
from vlm.parameter_counts import parameter_counts
from vlm.run import RunConfig, count_parameters

CONFIGS = default_config_folder()
ROOT = Path(__file__).parent.parent


def groups_of(name: str) -> list[str]:
    """The groups that a config's defaults list chooses from."""
    defaults = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["defaults"]
    return [group.removeprefix("override ") for entry in defaults if isinstance(entry, dict) for group in entry]


def options_of(group: str, name: str) -> list[str]:
    """What a config may choose: data that bring their task along are for fine-tunings."""
    options = sorted(file.stem for file in (CONFIGS / group).glob("*.yaml"))
    is_finetuning = "task" in groups_of(name) or name == "paper_finetune"
    return [option for option in options if is_finetuning or (group, option) != ("data", "csv")]


def settings(group: str, option: str) -> list[str]:
    """What an option leaves to its user (`???`)."""
    text = (CONFIGS / group / f"{option}.yaml").read_text()
    tree = yaml.safe_load(text) or {}
    if text.startswith("# @package _global_"):
        tree = tree[group]
    return [f"{group}.{key}=somewhere" for key, value in tree.items() if value == "???"]


CHOICES = [
    (name, group, option)
    for name in available_configs()
    for group in groups_of(name)
    for option in options_of(group, name)
]


def test_every_group_is_of_some_config() -> None:
    folders = {folder.name for folder in CONFIGS.iterdir() if folder.is_dir()}
    assert {group for _, group, _ in CHOICES} == folders


@pytest.mark.parametrize(("name", "group", "option"), CHOICES, ids=["-".join(choice) for choice in CHOICES])
def test_every_config_composes_with_every_option_of_its_groups(
    name: str, group: str, option: str, tmp_path: Path
) -> None:
    config = compose(name, [f"{group}={option}", *settings(group, option)], RunConfig)
    (tmp_path / "config.yaml").write_text(dump_yaml(config))
    assert load_yaml(tmp_path / "config.yaml", RunConfig) == config


@pytest.mark.parametrize("name", available_configs())
def test_options_of_a_group_are_different_runs(name: str) -> None:
    for group in groups_of(name):
        configs = [compose(name, [f"{group}={o}", *settings(group, o)], RunConfig) for o in options_of(group, name)]
        assert all(fingerprint(one) != fingerprint(other) for one, other in itertools.combinations(configs, 2)), group


def test_the_published_encoders_have_their_published_sizes() -> None:
    counts = count_parameters(compose("pretrain", ["model=base"], RunConfig))
    vision, language, width = 85.8e6, 124.1e6, 768  # ViT-B/16 without its head; RoBERTa-base without its pooler
    assert counts["vision"] == pytest.approx(vision, rel=0.001)
    assert counts["language"] == pytest.approx(language, rel=0.001)
    attention, feed_forward = 4 * width**2, 8 * width**2
    fusion = 2 * 2 * (2 * attention + feed_forward)  # two layers in each of two streams
    joints = 4 * width**2  # a projection of each encoder, and the pooler's two
    assert counts["total"] == pytest.approx(vision + language + fusion + joints, rel=0.01)
    assert counts["total"] == sum(count for name, count in counts.items() if name != "total")


def test_parameters_are_those_of_the_model_that_is_built() -> None:
    config = compose("pretrain", ["model=tiny"], RunConfig)
    model = config.model.build()
    assert count_parameters(config)["total"] == sum(parameter.numel() for parameter in model.parameters())


def test_show_says_what_each_component_has_ever_seen(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "pretrain", "model=base", "supervision.fraction=0"]) == 0
    shown = capsys.readouterr().out
    assert "# ever seen by vision: pairs 0, labelled images 14,197,122, texts 0" in shown
    assert "# ever seen by language: pairs 0, labelled images 0, texts 160 GB of text" in shown
    assert main(["show", "pretrain", "supervision.keys=nowhere.txt"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["supervision"]["keys"] == "nowhere.txt"


def test_parameters_are_counted_once_and_anew_where_they_may_have_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLM_CACHE", str(tmp_path))
    config = compose("pretrain", ["model=tiny"], RunConfig)
    expected = count_parameters(config)
    assert parameter_counts(config) == expected
    (file,) = (tmp_path / "parameters").iterdir()
    file.write_text('{"total": 7}')
    assert parameter_counts(config) == {"total": 7}
    deeper = compose("pretrain", ["model=tiny", "model.fusion.depth=7"], RunConfig)
    assert parameter_counts(deeper) == count_parameters(deeper)
    file.write_text("not JSON")
    assert parameter_counts(config) == expected


def test_show_imports_no_torch_once_a_model_was_counted(tmp_path: Path) -> None:
    script = "import sys\nfrom vlm.cli import main\nmain(['show', 'pretrain'])\nprint('torch' in sys.modules)"
    environment = os.environ | {"VLM_CACHE": str(tmp_path)}
    command = [sys.executable, "-c", script]
    first, second = (
        subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT).stdout.splitlines()
        for _ in range(2)
    )
    assert first[:-1] == second[:-1] and (first[-1], second[-1]) == ("True", "False")
