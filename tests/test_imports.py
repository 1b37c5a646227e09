"""Imports point one way. Read from the files, so that an import inside a function counts as well."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# A module belongs to the entry that names it most closely, and may import what stands before it or beside it.
LAYERS = (
    ("vlm.types", "vlm.errors", "vlm.config", "vlm.records", "vlm.locks", "vlm.sharing", "vlm.ray_cluster"),
    (
        "vlm.models",
        "vlm.objectives",
        "vlm.supervision",
        "vlm.tasks",
        "vlm.metrics",
        "vlm.training.optimizer",
        "vlm.weights",
    ),
    ("data_loaders",),
    ("vlm.run",),
    (
        "vlm.training",
        "vlm.bookkeeping",
        "vlm.parameter_counts",
        "vlm.evaluation",
        "vlm.studies",
        "vlm.scoring",
        "vlm.labelling",
        "vlm.exports",
        "vlm.exporting",
        "vlm.model_card",
        "vlm.hub",
        "vlm.features",
        "vlm.predicting",
        "vlm.inspect",
    ),
    ("vlm", "vlm.cli", "vlm.docs"),
)
ENTRIES = {entry: number for number, layer in enumerate(LAYERS) for entry in layer}


@dataclass(frozen=True)
class Import:
    importer: str
    imported: str
    deferred: bool  # inside a function

    def __str__(self) -> str:
        return f"{self.importer} imports {self.imported}"


def modules() -> dict[str, Path]:
    files = [file for package in ("vlm", "data_loaders") for file in sorted((ROOT / package).rglob("*.py"))]
    return {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in files}


def imports_of(module: str, file: Path, known: set[str]) -> Iterator[Import]:
    """What a module imports when it runs; what only the type checker sees is left out."""

    def visit(node: ast.AST, deferred: bool) -> Iterator[Import]:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            yield from (Import(module, alias.name, deferred) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: relative import; write the whole name"
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                yield Import(module, submodule if submodule in known else str(node.module), deferred)
        inside = deferred or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inside)

    yield from visit(ast.parse(file.read_text(encoding="utf-8")), False)


def all_imports() -> list[Import]:
    found = modules()
    return [one for module, file in found.items() for one in imports_of(module, file, set(found))]


def entry_of(module: str) -> str | None:
    """The entry of `LAYERS` that names a module most closely; `vlm` stands only for itself."""
    near = [name for name in ENTRIES if module == name or (name != "vlm" and module.startswith(f"{name}."))]
    return max(near, key=len, default=None)


def ours() -> list[tuple[Import, str, str]]:
    """Imports of our own modules, with the entries of both ends."""
    found = []
    for one in all_imports():
        importer, imported = entry_of(one.importer), entry_of(one.imported)
        if importer is not None and imported is not None and importer != imported:
            found.append((one, importer, imported))
    return found


def test_every_module_has_its_place() -> None:
    assert [module for module in modules() if entry_of(module) is None] == []


def test_no_import_points_upwards() -> None:
    # `vlm.run` is the composition root: its value is below training, its functions put everything together.
    wrong = [
        str(one)
        for one, importer, imported in ours()
        if ENTRIES[imported] > ENTRIES[importer] and not (importer == "vlm.run" and one.deferred)
    ]
    assert wrong == []


def test_no_two_packages_of_a_layer_import_each_other() -> None:
    beside = {(importer, imported) for _, importer, imported in ours() if ENTRIES[importer] == ENTRIES[imported]}
    assert [pair for pair in sorted(beside) if pair[::-1] in beside] == []


@pytest.mark.parametrize(
    ("importer", "forbidden"),
    [
        ("vlm.training", ("vlm.models.vision", "vlm.models.language")),  # the trainer knows no modality
        ("vlm.models", ("vlm.objectives", "vlm.supervision", "vlm.tasks")),
        ("data_loaders", ("vlm.models.vision_language", "vlm.models.fusion", "vlm.objectives")),
        ("vlm.metrics", ("torch",)),
        ("vlm.scoring", ("torch", "vlm.tasks", "data_loaders")),  # anyone's files, scored in seconds
        ("vlm.records", ("torch",)),
        ("vlm.types", ("torch", "jaxtyping")),
        ("vlm.config", ("torch",)),
    ],
)
def test_what_a_part_must_not_know(importer: str, forbidden: tuple[str, ...]) -> None:
    wrong = [
        str(one)
        for one in all_imports()
        if f"{one.importer}.".startswith(f"{importer}.")
        and any(f"{one.imported}.".startswith(f"{name}.") for name in forbidden)
    ]
    assert wrong == []


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom vlm.cli import main\ntry:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "assert not {'torch', 'lightning', 'hydra', 'pydantic'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
