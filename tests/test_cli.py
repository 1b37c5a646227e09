from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from vlm.cli import main


def test_a_mistake_is_one_line_on_stderr_and_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in [
        (["show", "pretrain", "supervision.fractoin=0.5"], "supervision.fractoin: unknown key. Did you mean"),
        (["show", "pretrain", "supervision.fraction=1.5"], "supervision.fraction: must be at most 1, got 1.5"),
        (["train", "pretran"], "unknown config 'pretran'. Did you mean 'pretrain'?"),
        (["train", "pretrain", "--config-dir", "nowhere"], "nowhere: no such folder of configs"),
        (["prepare", "world", "--to", "nowhere", "grdi=4"], "grdi: unknown key. Did you mean grid?"),
    ]:
        assert main(arguments) == 2
        captured = capsys.readouterr()
        assert captured.err.startswith(f"error: {message}")
        assert captured.err.count("\n") == 1
        assert captured.out == ""


def test_show_prints_yaml_with_parameters_and_fingerprint(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "pretrain", "supervision.fraction=0.05", "seed=3"]) == 0
    first = capsys.readouterr().out
    tree = yaml.safe_load(first)
    assert tree["supervision"]["fraction"] == 0.05
    assert tree["seed"] == 3
    assert "# parameters total: " in first
    assert "# fingerprint: " in first
    assert main(["show", "pretrain", "seed=3", "supervision.fraction=0.05"]) == 0
    assert capsys.readouterr().out == first


def test_overrides_may_follow_an_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.yaml").write_text("defaults: [pretrain, _self_]\nname: mine\n")
    assert main(["show", "mine", "--config-dir", str(tmp_path), "seed=7"]) == 0
    tree = yaml.safe_load(capsys.readouterr().out)
    assert (tree["name"], tree["seed"]) == ("mine", 7)


def test_an_unknown_option_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["show", "pretrain", "--sed=3"])
    assert "unrecognized arguments: --sed=3" in capsys.readouterr().err


def test_a_run_resumes_as_it_began(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(tmp_path), "seed=3"]) == 2
    assert "a run resumes as it began" in capsys.readouterr().err
    assert main(["train", str(tmp_path)]) == 2
    assert "no run here" in capsys.readouterr().err
