"""Whoever has the built wheel and an exported folder needs nothing else of this repository."""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from PIL import Image
from small_runs import borrowed_encoders, small_run

from vlm.exporting import export

REPOSITORY = Path(__file__).parents[2]
MORE = """
import timm, transformers
from pathlib import Path

print(Path(vlm.__file__).parent)
print(*model.answer(["scene.png"], "what color is the circle?", top=3)[0])
timm.create_model("local-dir:vision", pretrained=True)
transformers.AutoModel.from_pretrained("language", add_pooling_layer=False, local_files_only=True)
print(*(type(one).__module__.partition(".")[0] for one in plain))
"""


def readme_block() -> str:
    """The code under "Use a trained model" in the README."""
    section = (REPOSITORY / "README.md").read_text(encoding="utf-8").partition("\n## Use a trained model\n")[2]
    found = re.search(r"^```python\n(.*?)^```", section, re.DOTALL | re.MULTILINE)
    assert found is not None
    return found[1]


def test_the_readme_uses_a_model_in_ten_lines() -> None:
    lines = [line for line in readme_block().splitlines() if line]
    assert len(lines) <= 10
    for part in ("vlm.load(", ".answer(", ".encode(", "timm", "transformers"):
        assert any(part in line for line in lines), part


@pytest.mark.slow
def test_the_wheel_and_an_export_are_all_that_the_readme_needs(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    wheels, environment, desk = tmp_path / "wheels", tmp_path / "environment", tmp_path / "desk"
    build = ["wheel", str(REPOSITORY), "--no-deps", "--no-build-isolation", "--wheel-dir", str(wheels)]
    subprocess.run([*pip, *build], check=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    place = {"base": str(environment), "platbase": str(environment)}
    packages = Path(sysconfig.get_path("purelib", scheme="venv", vars=place))
    # The libraries, and not the project itself: no `.pth` file of a folder that is only named here is read.
    (packages / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (wheel,) = wheels.iterdir()
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--target", str(packages), str(wheel)], check=True)

    desk.mkdir()
    run = small_run("finetune", tmp_path / "run", "task=vqav2", "trainer.samples=16", *borrowed_encoders(tmp_path))
    export(run, desk / "my-model")
    Image.new("RGB", (60, 40), "red").save(desk / "scene.png")
    (desk / "use.py").write_text(readme_block() + MORE)
    python = Path(sysconfig.get_path("scripts", scheme="venv", vars=place)) / "python"
    done = subprocess.run([python, "use.py"], cwd=desk, capture_output=True, text=True, env={"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    used, answers, kinds = done.stdout.splitlines()
    assert Path(used) == packages / "vlm"
    assert {"yes", "no"} <= set(answers.split())
    assert kinds == "timm transformers"
