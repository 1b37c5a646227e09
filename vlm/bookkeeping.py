"""From a run's config to its ledger: what each component will have seen at the end, and before the beginning."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_loaders import FolderData
from vlm.config import CustomConfig, load_yaml
from vlm.objectives import ImageClassesConfig
from vlm.run import CONFIG, RESULT, RunConfig, unpaired_texts, weights_of_run, write_atomically
from vlm.supervision import (
    BestByScoreConfig,
    CaptionsConfig,
    ClassNamesConfig,
    GeneratedCaptionsConfig,
    MachineLabelsConfig,
    NoneConfig,
    SourceConfig,
)
from vlm.supervision.ledger import (
    COMPONENTS,
    LEARNERS,
    LEDGER,
    Component,
    Entry,
    Ledger,
    Positions,
    SeenConfig,
    declared_entries,
    maker_entries,
    model_entries,
    read_ledger,
    unknown_entries,
)
from vlm.supervision.published import Kind
from vlm.supervision.sources import beside_path

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from data_loaders.shards import Index, ShardReader

UNPREPARED = "unknown before the data is prepared"
# Records of a window that are read to count them, where an index tells too little: a million take about a minute.
MAX_READ = 1_000_000


def ledger_of(
    config: RunConfig, root: Path | None, num_questions: int | None = None, max_read: int = MAX_READ
) -> Ledger:
    """What each component of the run will have seen at its end, with all runs and models that it comes from.

    `root`: the data root; None where there is none yet, and then what this run sees is unknown. `num_questions`: of a
    fine-tuning. Where the index does not tell what every example shows, as of a mixture of sources, every record of the
    window is read; of more than `max_read`, or of a remote root, the count is left open.
    """
    ledger, trained = _inherited(config), _trained(config)
    if config.task is not None:
        name = config.task.target if isinstance(config.task, CustomConfig) else config.task.type
        return ledger.plus(trained, [Entry("questions", name, num_questions)] if num_questions else [])
    if config.data.part == "texts":
        return ledger.plus([name for name in trained if name == "language"], [_texts(root)])
    if config.data.part == "images":
        return ledger.plus([name for name in trained if name == "vision"], _images(config, root))
    if config.supervision.fraction == 0:
        return ledger
    entries = _pairs(config, root, max_read)
    return ledger.plus(trained, entries) | _advisers(config, root) if entries else ledger


def write_ledger(config: RunConfig, root: Path, num_questions: int | None = None) -> None:
    """The run's ledger into its folder and its TensorBoard, once, and again where other declarations are made."""
    from torch.utils.tensorboard import SummaryWriter

    file = config.run_folder / LEDGER
    declared = config.declared.model_dump(exclude_none=True)
    if int(os.environ.get("LOCAL_RANK", 0)) != 0:
        return
    if file.is_file():
        read_ledger(file)
        if json.loads(file.read_text(encoding="utf-8")).get("declared", {}) == declared:
            return
    ledger = ledger_of(config, root, num_questions)
    with SummaryWriter(str(config.run_folder)) as writer:
        writer.add_text("ledger", ledger.markdown())
        for name, number in ledger.scalars().items():
            writer.add_scalar(f"ledger/{name}", number)
    write_atomically(file, ledger.text(declared))


def complete_ledger(config: RunConfig) -> None:
    """Of a finished run: a ledger where none is, or where it was counted with other declarations."""
    root = prepared_root(config)
    if root is not None:
        result = json.loads((config.run_folder / RESULT).read_text())
        write_ledger(config, root, result.get("examples") if config.task is not None else None)


def ledger_of_run(run: Path) -> Ledger:
    """The ledger of another run; of one that was trained before there were ledgers, counted from its config."""
    if (run / LEDGER).is_file():
        return read_ledger(run / LEDGER)
    if not (run / CONFIG).is_file():
        return Ledger({name: unknown_entries(name, run.name) for name in LEARNERS})
    config = load_yaml(run / CONFIG, RunConfig)
    examples = json.loads((run / RESULT).read_text()).get("examples") if (run / RESULT).is_file() else None
    return ledger_of(config, prepared_root(config), examples)


def prepared_root(config: RunConfig) -> Path | None:
    """The data root, if it is there already."""
    root = config.data.root
    return root if isinstance(root, Path) and root.is_dir() else None


def _trained(config: RunConfig) -> list[Component]:
    """The components whose weights this run changes."""
    trained: list[Component] = ["fusion"]
    encoders: tuple[Component, ...] = ("vision", "language")
    for name in encoders if config.optimizer.multipliers.encoders > 0 else ():
        if not getattr(getattr(config.model, name), "frozen", False):
            trained.append(name)
    return trained


def _inherited(config: RunConfig) -> Ledger:
    """What the components have seen before this run: from the run it starts from, or with their encoders' weights."""
    own = Ledger({name: _encoder(name, config) for name in config.own_encoders})
    if config.start_from is None:
        return own
    start = _declared_over(config, ledger_of_run(config.start_from))
    if config.start_without is None:
        return start
    between = {"fusion", "vision_projection", "language_projection"}
    if config.model.pooler != "none":
        between.add("pooler")  # else it has no weights
    left: set[Component] = {*config.own_encoders}
    if between <= {*config.start_without}:
        left.add("fusion")
    return Ledger({name: entries for name, entries in start.seen.items() if name not in left}) | own


def _declared_over(config: RunConfig, ledger: Ledger) -> Ledger:
    """Declarations in place of what was unknown of pairs and labelled images."""
    seen = dict(ledger.seen)
    for name in COMPONENTS:
        said = getattr(config.declared, name, None)
        entries = seen.get(name, ())
        unknown = [one for one in entries if one.count is None and one.kind in ("pairs", "labelled_images")]
        if said is not None and unknown:
            kept = tuple(one for one in entries if one not in unknown)
            seen[name] = (*kept, *declared_entries(name, said, unknown[0].data))
    return Ledger(seen)


def _encoder(name: Component, config: RunConfig) -> tuple[Entry, ...]:
    encoder, declared = getattr(config.model, name), getattr(config.declared, name)
    run, weights = weights_of_run(encoder), getattr(encoder, "weights", None)
    pretrained = getattr(encoder, "pretrained", True)
    model = f"{encoder.type}:{getattr(encoder, 'name', None) or getattr(encoder, 'target', '')}"
    if declared is not None:
        return declared_entries(name, declared, _identity(weights) if weights is not None else model)
    if run is not None:
        return ledger_of_run(run).seen.get(name, ())
    if encoder.type == "tiny" or not pretrained:
        return ()
    if weights is not None:
        is_package = str(weights).startswith("package:")
        return model_entries(name, str(weights)) if is_package else unknown_entries(name, str(weights))
    return model_entries(name, model)


def _identity(path: Any) -> str:
    """A file or folder by its name, and by its content where it is there."""
    from data_loaders.beside import content_fingerprint

    there = Path(path).is_file() or (Path(path) / "index.json").is_file()
    return f"{path} {content_fingerprint(Path(path))}" if there else str(path)


def _texts(root: Path | None) -> Entry:
    if root is None:
        return Entry("texts", "data", None, UNPREPARED)
    text = unpaired_texts(root, "train")
    return Entry("texts", hashlib.sha256(text).hexdigest()[:12], len(text.decode().splitlines()))


def _images(config: RunConfig, root: Path | None) -> list[Entry]:
    has_labels = any(isinstance(objective, ImageClassesConfig) for objective in config.objectives.values())
    kind: Kind = "labelled_images" if has_labels else "images"
    if root is None:
        return [Entry(kind, "data", None, UNPREPARED)]
    reader, chosen = _chosen(config, root, "unimodal/train")
    return _entries(reader, {kind: chosen})


def _pairs(config: RunConfig, root: Path | None, max_read: int) -> list[Entry]:
    """The supervised examples by what their texts are, told by the index or counted by reading."""
    sources = config.supervision.drawn
    named = [_kind_of(source) for source in sources]
    kinds: list[Kind] = list(dict.fromkeys(kind for kind in named if kind is not None))
    if root is None:
        return [Entry(kind, "data", None, UNPREPARED) for kind in kinds or ["pairs"]]
    reader, chosen = _chosen(config, root, "pairs/train")
    told = {_kind_of_all(source, reader.index) for source in sources}
    is_fetched = config.data.is_remote  # nobody fetches all shards to count; captions are taken for complete there
    if is_fetched and set(named) == {"pairs"}:
        told = {"pairs"}
    kind = told.pop() if len(told) == 1 else None
    if kind is not None:
        return _entries(reader, {kind: chosen})
    if len(chosen) > (0 if is_fetched else max_read):
        note = f"at most {len(chosen):,}"
        return [Entry(kind, reader.index.fingerprint, None, note) for kind in kinds or ["pairs"]]
    return _entries(reader, _by_reading(config, reader, chosen))


def _chosen(config: RunConfig, root: Path, folder: str) -> tuple[ShardReader, NDArray[np.int64]]:
    import numpy as np

    from data_loaders.beside import select
    from data_loaders.shards import ShardReader

    reader = ShardReader(config.data.open_index(root, folder))
    return reader, np.asarray(select(config.supervision, reader))


def _entries(reader: ShardReader, positions: dict[Kind, NDArray[np.int64]]) -> list[Entry]:
    return [
        Entry(kind, reader.index.fingerprint, len(at), "", Positions.at(at, len(reader)))
        for kind, at in positions.items()
        if len(at)
    ]


def _kind_of(source: SourceConfig) -> Kind | None:
    """What a source makes of an image; None where only its texts tell."""
    if isinstance(source, CustomConfig):
        return None
    if isinstance(source, CaptionsConfig):
        return "pairs"
    return "images" if isinstance(source, NoneConfig) else "labelled_images"


def _kind_of_all(source: SourceConfig, index: Index) -> Kind | None:
    """What a source makes of every example, damaged ones too; None where the index at hand does not tell."""
    from data_loaders.beside import of_split
    from data_loaders.shards import open_index

    kind, path = _kind_of(source), beside_path(source)
    if kind is None or kind == "images":
        return kind
    if path is not None:
        place = of_split(path, "train")
        if not place.is_dir() or getattr(source, "missing", None) != "error":
            return None
        index = open_index(place)
    if isinstance(source, MachineLabelsConfig):
        return kind if "labels" in index.complete and source.min_score == 0 else None
    return kind if ("classes" if isinstance(source, ClassNamesConfig) else "captions") in index.complete else None


def _by_reading(config: RunConfig, reader: ShardReader, chosen: NDArray[np.int64]) -> dict[Kind, NDArray[np.int64]]:
    """Positions by the kind of supervision that each example has, as its step will see it. Damaged ones have none."""
    import numpy as np

    from data_loaders.beside import open_beside
    from data_loaders.shards import DamagedError
    from vlm.supervision.sources import supervise

    sources = config.supervision.sources
    beside = open_beside(config.supervision.drawn, "train", reader, chosen)
    kinds: dict[str, Kind] = {"human": "pairs", "none": "images"}
    order: tuple[Kind, ...] = ("pairs", "labelled_images", "images")

    def kind_of(position: int) -> int:
        try:
            source = supervise(reader.text(position), sources, beside).source
        except DamagedError:  # where the run may go on without it
            return len(order)
        return order.index(kinds.get(source, "labelled_images"))

    found = np.fromiter((kind_of(int(at)) for at in chosen), np.uint8, len(chosen))
    return {kind: chosen[found == number] for number, kind in enumerate(order)}


def _advisers(config: RunConfig, root: Path | None) -> Ledger:
    """What labeller, captioner and filter have seen, as far as this run listens to them."""
    ledger, declared = Ledger(), config.declared
    for source in config.supervision.drawn:
        if isinstance(source, MachineLabelsConfig):
            seen = _adviser("labeller", config, root, source.labels_from, declared.labeller)
            ledger = ledger.plus(["labeller"], seen)
        elif isinstance(source, GeneratedCaptionsConfig):
            ledger = ledger.plus(["generator"], _adviser("generator", config, root, source.file, declared.generator))
    selection = config.supervision.selection
    if isinstance(selection, BestByScoreConfig) and config.supervision.fraction < 1:  # of all, there is no choice
        said = declared.filter or (declared.labeller if selection.file is None else None)
        ledger = ledger.plus(["filter"], _adviser("filter", config, root, selection.file, said))
    return ledger


def _adviser(
    name: Component, config: RunConfig, root: Path | None, path: Path | None, declared: SeenConfig | None
) -> tuple[Entry, ...]:
    """What the maker of labels, captions or scores has seen. `path`: beside the data; None: the data's own labels."""
    from data_loaders.beside import of_split
    from data_loaders.shards import open_index

    if declared is not None:
        return declared_entries(name, declared, _identity(path) if path is not None else "")
    if path is None and not isinstance(config.data, FolderData):
        return ()  # no model made them: a program with errors of its own, or people's tags
    folder: Any = of_split(path, "train") if path is not None else root and root / "pairs" / "train"
    made_by = open_index(folder).made_by if folder and (folder / "index.json").is_file() else {}
    return (
        maker_entries(name, made_by, _identity(folder))
        if made_by
        else unknown_entries(name, f"who made {path or 'the labels'}")
    )
