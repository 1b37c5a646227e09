"""How Sphinx builds the documentation: `make docs`, into .site, with warnings as errors and nothing from elsewhere.

A line of a page that is `<!-- README: Heading -->` stands for what the README says under that heading, and
`<!-- keys of a run -->` and the other names in `GENERATED` for what the code says of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from data_loaders.prepare.conceptual_captions import ConceptualCaptionsPreparerConfig, MachineLabelsPreparerConfig
from data_loaders.prepare.emoji_config import EmojiConfig
from data_loaders.prepare.folder import FolderPreparerConfig
from data_loaders.prepare.gqa import GQAPreparerConfig
from data_loaders.prepare.imagenet import ImageNetPreparerConfig
from data_loaders.prepare.nlvr2 import NLVR2PreparerConfig
from data_loaders.prepare.vqav2 import VQAv2PreparerConfig
from data_loaders.world.config import WorldConfig
from vlm.config import Config
from vlm.docs import schema
from vlm.labelling import LabellingConfig
from vlm.run import RunConfig
from vlm.studies.plan import StudyConfig

if TYPE_CHECKING:
    from sphinx.application import Sphinx

ROOT = Path(__file__).parents[2]

project = "Vision-language models with less supervision"
html_title = project
extensions = ["myst_parser"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_static"]
html_theme = "furo"
html_static_path = ["pages/_static"]
html_css_files = ["tables.css"]
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
html_show_copyright = False
show_warning_types = True
nitpicky = True
myst_heading_anchors = 4
pygments_style = "friendly"

OF_VERBS: dict[str, type[Config]] = {
    "vlm prepare conceptual_captions": ConceptualCaptionsPreparerConfig,
    "vlm prepare machine_labels": MachineLabelsPreparerConfig,
    "vlm prepare imagenet": ImageNetPreparerConfig,
    "vlm prepare folder": FolderPreparerConfig,
    "vlm prepare vqav2": VQAv2PreparerConfig,
    "vlm prepare gqa": GQAPreparerConfig,
    "vlm prepare nlvr2": NLVR2PreparerConfig,
    "vlm prepare world": WorldConfig,
    "vlm prepare emoji": EmojiConfig,
    "vlm label": LabellingConfig,
}
"""Verbs that take `key=value` of a schema of their own."""


def keys_of_verbs() -> str:
    return "\n".join(f"\n## `{verb}`\n\n{schema.page(model, level=2)}" for verb, model in OF_VERBS.items())


GENERATED: dict[str, Callable[[], str]] = {
    "keys of a run": lambda: schema.page(RunConfig),
    "keys of a study": lambda: schema.page(StudyConfig),
    "keys of verbs": keys_of_verbs,
    "packaged configs": schema.packaged_configs,
}


def setup(app: Sphinx) -> None:
    app.connect("source-read", lambda app, name, source: source.__setitem__(0, filled(source[0])))


def filled(page: str) -> str:
    """A page with what its comments stand for."""
    page = re.sub(r"^<!-- README: (.+) -->$", lambda match: readme_section(match[1]), page, flags=re.MULTILINE)
    names = "|".join(GENERATED)
    return re.sub(rf"^<!-- ({names}) -->$", lambda match: GENERATED[match[1]](), page, flags=re.MULTILINE)


def readme_section(heading: str) -> str:
    """What stands under a heading of the README, up to the next one of its level."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    if found is None:
        raise ValueError(f"README.md has no section {heading!r}, which a page of the documentation includes")
    if re.search(r"\]\((?!https?:)", found[1]):
        raise ValueError(f"README.md, {heading!r}: a relative link, which would lead nowhere from the documentation")
    return found[1].strip()
