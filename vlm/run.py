"""One run: a frozen value, and the function that turns it into objects, steps and numbers."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import shutil
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from data_loaders import DataConfig, WorldData
from vlm.config import Config, CustomConfig, RunReference, dump_yaml, fingerprint, load_yaml, not_identity
from vlm.errors import UserError
from vlm.locks import only_process
from vlm.models import ModelConfig
from vlm.models.adaptation import EncoderConfig
from vlm.objectives import (
    ContrastiveConfig,
    DistillationConfig,
    ImageClassesConfig,
    MaskedLanguageConfig,
    MatchingConfig,
    ObjectiveConfig,
)
from vlm.supervision import SupervisionConfig
from vlm.supervision.ledger import DeclaredConfig
from vlm.tasks import TaskConfig
from vlm.training.optimizer import OptimizerConfig

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from torch import Tensor, nn

    from data_loaders.images import DecodedImages, Images
    from data_loaders.loader import BatchSource
    from data_loaders.transforms import ImageTransform
    from vlm.models.language.tokenizer import Tokenizer
    from vlm.models.vision_language import VisionLanguageModel
    from vlm.supervision.sources import LabelMatching
    from vlm.tasks.retrieval import RetrievalTask
    from vlm.tasks.task import Task
    from vlm.training.module import TrainingModule
    from vlm.weights import PartialLoad

CONFIG, INPUTS, RESULT, TOKENIZER = "config.yaml", "inputs.json", "result.json", "tokenizer.json"
START = "start.txt"  # what was taken of the run that this one starts from in part
LAST, BEST = "last.ckpt", "best.ckpt"
PROGRESS = "progress.json"  # of the training, for whoever watches
EXPORT = "export.json"  # marks what `vlm export` wrote


class TrainerConfig(Config):
    """How long, how large and on what. `batch_size` counts examples of one optimizer step over all ranks."""

    alternatives: ClassVar[tuple[str, ...]] = ("passes", "samples")

    batch_size: PositiveInt = 256
    accumulate: PositiveInt = 1  # micro-batches of a step on each rank
    loss_weighting: Literal["items", "micro_batches"] | None = None  # None becomes items where a step has several
    passes: PositiveFloat | None = None  # budget: passes over the supervised subset, or
    samples: PositiveInt | None = None  # budget: examples seen, whatever the subset's size
    precision: Literal["auto", "32-true", "16-mixed", "bf16-mixed", "bf16-true"] = "auto"  # bf16-mixed on a GPU
    select: Literal["best", "last"] = "best"  # the checkpoint that is scored and handed on
    validate_every_steps: PositiveInt | None = None  # None: at the end only
    validation_examples: NonNegativeInt | None = None  # None: all
    validation_pictures: NonNegativeInt = not_identity(4)  # questions drawn into TensorBoard each time; 0: none
    evaluation_batch_size: PositiveInt = not_identity(256, gt=0)
    checkpoint_every_steps: PositiveInt = not_identity(500, gt=0)
    accelerator: str = not_identity("auto")
    devices: PositiveInt = 1
    num_nodes: PositiveInt = 1
    frozen_states_gib: NonNegativeFloat = not_identity(2.0)  # memory for the states of a frozen vision encoder
    frozen_states_disk_gib: NonNegativeFloat = not_identity(0.0)  # for those of all runs, in the cache folder; 0: none
    strategy: str = not_identity("auto")  # Lightning's names: ddp, fsdp, ddp_find_unused_parameters_true, ...
    progress: bool = not_identity(True)
    log_every_steps: PositiveInt = not_identity(20, gt=0)
    ema_decay: float | None = Field(None, gt=0, lt=1)  # what is validated and handed on: a moving average of weights
    average_last: PositiveInt | None = None  # or the mean of the weights at the last so many of
    average_every_steps: PositiveInt = 100  # every so many steps, the final step being one
    on_bad_loss: Literal["stop", "skip"] = "stop"  # what a step does whose loss is no number, or a spike
    spike_factor: float | None = Field(None, gt=1)  # times the median of 100 steps; None: no loss is a spike
    max_skips_in_a_row: PositiveInt = 10
    compile: bool = not_identity(False)  # the repeated blocks; as the device, it changes numbers by rounding alone
    peak_flops: PositiveFloat | None = not_identity(None)  # of a device, for its utilisation; None: as the GPU is known
    keep_every_steps: PositiveInt | None = not_identity(None)  # keeps checkpoints for `continue_from`; None: none

    @property
    def world_size(self) -> int:
        return self.devices * self.num_nodes

    @property
    def averages(self) -> bool:
        """Whether the weights that are handed on are an average over steps."""
        return self.ema_decay is not None or self.average_last is not None

    @property
    def micro_batch_size(self) -> int:
        return self.batch_size // (self.world_size * self.accumulate)

    @model_validator(mode="before")
    @classmethod
    def _weigh_by_items(cls, given: Any) -> Any:
        """A value of its own, so that runs of several micro-batches have another fingerprint than before it was there.

        `micro_batches` is how they were weighed then, and how the reference paper's code weighs them: the loss of a
        masked token depends on how many others its micro-batch has.
        """
        counts = [given.get(name, 1) for name in ("accumulate", "devices", "num_nodes")] if type(given) is dict else []
        if any(count != 1 for count in counts) and given.get("loss_weighting") is None:
            return given | {"loss_weighting": "items"}
        return given

    @model_validator(mode="after")
    def _divides(self) -> TrainerConfig:
        if self.passes is not None and self.samples is not None:
            raise ValueError("give passes or samples, not both")
        if self.ema_decay is not None and self.average_last is not None:
            raise ValueError("give ema_decay or average_last, not both")
        if self.averages and "fsdp" in self.strategy:
            raise ValueError("strategy=fsdp shards the weights, which cannot be averaged. Give ema_decay=null")
        if self.batch_size % (self.world_size * self.accumulate):
            raise ValueError(
                f"batch_size must be a multiple of devices * num_nodes * accumulate. "
                f"Got {self.batch_size} and {self.world_size * self.accumulate}"
            )
        return self

    def num_steps(self, num_examples: int) -> int:
        """Optimizer steps of the budget over a subset of this size."""
        if num_examples == 0:
            return 0
        samples = self.samples if self.passes is None else self.passes * num_examples
        if samples is None:
            raise UserError("trainer: no budget. Give trainer.passes or trainer.samples")
        return math.ceil(samples / self.batch_size)


class RunConfig(Config):
    """Everything that decides a run's numbers. With a `task` it is a fine-tuning, otherwise a pretraining."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9_-]+$")
    folder: Path | None = not_identity(None)  # None: `runs/<name>-<fingerprint>`
    seed: NonNegativeInt = 0
    start_from: RunReference | None = None  # a run folder whose model this run continues
    start_without: tuple[str, ...] | None = None  # parts of it to leave, as [fusion], and to take what fits; None: all
    continue_from: RunReference | None = not_identity(None)  # a run of another budget that began as this one does
    data: DataConfig = WorldData()
    model: ModelConfig = ModelConfig()
    supervision: SupervisionConfig = SupervisionConfig()
    objectives: dict[str, ObjectiveConfig] = Field({})
    distillation: DistillationConfig | None = None  # of a pretraining: soft targets from a slow copy of the model
    task: TaskConfig | None = None
    optimizer: OptimizerConfig = OptimizerConfig()
    trainer: TrainerConfig = TrainerConfig()
    declared: DeclaredConfig = not_identity(DeclaredConfig())  # what models have seen that the ledger does not know

    @model_validator(mode="after")
    def _one_purpose(self) -> RunConfig:
        if bool(self.objectives) == (self.task is not None):
            raise ValueError("give objectives (pretraining) or a task (fine-tuning), and not both")
        if self.start_without is not None and self.start_from is None:
            raise ValueError("start_without says what not to take of another run. Give start_from=RUN too")
        if self.optimizer.clip_norm is not None and "fsdp" in self.trainer.strategy:
            raise ValueError("trainer.strategy=fsdp cannot clip by norm. Give optimizer.clip_norm=null")
        if self.task is not None and self.data.is_remote:
            raise ValueError("data.root: a URL serves pretraining alone. Copy the data of the task into a folder")
        if self.continue_from is not None and (self.trainer.select == "best" or self.trainer.average_last is not None):
            raise ValueError(
                "continue_from: what belongs to a whole run does not carry over. Give trainer.select=last "
                "and trainer.average_last=null"
            )
        for name, objective in self.objectives.items():
            wanted = _part_of(objective)
            if wanted is not None and wanted != self.data.part:
                raise ValueError(f"objectives.{name} ({objective.type}) needs data.part={wanted}. Got {self.data.part}")
            if isinstance(objective, MatchingConfig) and objective.text == "masked" and not _masks_pairs(self):
                raise ValueError(f"objectives.{name}: text=masked needs a masked_language objective beside it")
            if isinstance(objective, MatchingConfig) and objective.negatives == "hard" and not _has_contrast(self):
                raise ValueError(f"objectives.{name}: negatives=hard needs a contrastive objective beside it")
        if self.distillation is not None:
            if not any(isinstance(o, MaskedLanguageConfig | ContrastiveConfig) for o in self.objectives.values()):
                raise ValueError("distillation: needs a masked_language or contrastive objective, which learn from it")
            if "fsdp" in self.trainer.strategy:
                raise ValueError("distillation: trainer.strategy=fsdp shards the copy's weights. Use ddp")
        return self

    @property
    def own_encoders(self) -> tuple[Literal["vision", "language"], ...]:
        """The encoders that begin with weights of their own, and not with those of the run in `start_from`."""
        encoders: tuple[Literal["vision", "language"], ...] = ("vision", "language")
        return encoders if self.start_from is None else tuple(e for e in encoders if e in (self.start_without or ()))

    @property
    def run_folder(self) -> Path:
        return self.folder or Path("runs") / f"{self.name}-{fingerprint(self)}"


def _masks_pairs(config: RunConfig) -> bool:
    return any(isinstance(o, MaskedLanguageConfig) and o.with_image for o in config.objectives.values())


def _has_contrast(config: RunConfig) -> bool:
    """Whether something says how alike an image and a text are; what is from outside may do so too."""
    return any(isinstance(o, ContrastiveConfig | CustomConfig) for o in config.objectives.values())


def _part_of(objective: ObjectiveConfig) -> str | None:
    """The part of the data that an objective learns from; None where only it knows."""
    if isinstance(objective, CustomConfig):
        return None
    if isinstance(objective, ImageClassesConfig):
        return "images"
    return "texts" if isinstance(objective, MaskedLanguageConfig) and not objective.with_image else "pairs"


# --- From the value to objects ---------------------------------------------------------------------------------------


def count_parameters(config: RunConfig) -> dict[str, int]:
    """Parameters of each component, heads of objectives and tasks left out. From shapes alone: no weights are read."""
    import torch

    with torch.device("meta"):
        model = _built(without_weights(config.model))
    children = {name: sum(p.numel() for p in child.parameters()) for name, child in model.named_children()}
    return children | {"total": sum(children.values())}


def _built(config: ModelConfig) -> VisionLanguageModel:
    try:
        return config.build()
    except ValueError as error:  # sizes that do not go together
        raise UserError(f"model: {error}") from None


def without_weights(config: ModelConfig) -> ModelConfig:
    """The same shapes with random weights, for whoever fills them from elsewhere."""
    changed = {}
    for name in ("vision", "language"):
        encoder = getattr(config, name)
        plain: dict[str, Any] = {"pretrained": False} if hasattr(encoder, "pretrained") else {}
        if weights_of_run(encoder) is not None:
            plain["weights"] = None
        changed[name] = encoder.model_copy(update=plain)
    return config.model_copy(update=changed)


def weights_of_run(encoder: Any) -> Path | None:
    """The run folder that an encoder's weights come from: always one for our own, which nobody else publishes."""
    weights: Path | None = getattr(encoder, "weights", None)
    if weights is not None and (encoder.type == "tiny" or (weights / CONFIG).is_file()):
        return weights
    return None


def build_tokenizer(config: RunConfig, root: Path) -> Tokenizer:
    """The tokenizer of the run that this one has its language encoder from, else the encoder's own."""
    from vlm.models.language.tokenizer import Tokenizer

    if config.start_from is not None and "language" not in config.own_encoders:
        return Tokenizer.from_file(config.start_from / TOKENIZER, config.model.language.max_tokens)
    return config.model.language.build_tokenizer(root / "texts" / "train.txt")


def build_model(config: RunConfig) -> VisionLanguageModel:
    """The model with the weights that it begins with: of its encoders, or of the run that `start_from` names."""
    return begin_model(config)[0]


def begin_model(config: RunConfig) -> tuple[VisionLanguageModel, PartialLoad | None]:
    """The model with the weights that it begins with, and what of another run's they are where it starts in part.

    Started in part, an encoder named in `start_without` begins with the weights that its own config names; what else is
    new begins at random.
    """
    import torch

    from data_loaders.loader import step_seed

    torch.manual_seed(step_seed(config.seed, 0, "initialise"))
    plain = without_weights(config.model)
    own = config.own_encoders
    weights = {name: weights_of_run(getattr(config.model, name)) for name in own}
    runs = {name: run for name, run in weights.items() if run is not None}
    changed = {name: getattr(plain, name) for name in ("vision", "language") if name in runs or name not in own}
    model = _built(config.model.model_copy(update=changed))
    for name, run in runs.items():
        load_component(getattr(model, name), run, f"model.{name}")
    if config.start_from is None:
        return model, None
    if config.start_without is None:
        load_component(model, config.start_from, "model")
        return model, None
    states = read_checkpoint(config.start_from)["state_dict"]
    found = take_part(model, states, config.start_from, config.start_without, "start_without")
    for name in ("vision", "language"):
        if name not in own and not any(tensor.startswith(f"{name}.") for tensor in found.taken):
            raise UserError(
                f"{config.start_from}: nothing of its {name} encoder fits this one, which would begin at random. "
                f"Name it in start_without=[{name}], and it begins with its own weights"
            )
    return model, found


def read_checkpoint(run: Path, name: str | None = None) -> dict[str, Any]:
    """A run's checkpoint, by default the one it hands on: weights and plain values only, never unpickled code.

    An exported run (`vlm export`) holds one set of weights, which is given whatever the name.
    """
    import torch

    if (run / EXPORT).is_file():
        from vlm.exports import open_export

        exported = open_export(run)
        return {"state_dict": exported.states(), "answers": list(exported.answers())}
    if name is None:
        result = json.loads((run / RESULT).read_text()) if (run / RESULT).is_file() else {}
        name = Path(result.get("checkpoint") or LAST).name  # an evaluation alone has none; nothing outside the folder
    file = run / name
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)  # type: ignore[no-any-return]  # it gives Any
    except FileNotFoundError:
        raise UserError(f"{file}: no such checkpoint. Has the run {run.name} been trained?") from None
    except Exception as error:
        raise UserError(f"{file}: not a checkpoint that can be read safely ({str(error).splitlines()[0]})") from None


def load_component(module: nn.Module, run: Path, prefix: str) -> None:
    """Fill `module` with the weights under `prefix` of another run. Names and shapes must agree, but for adapters."""
    from vlm.models.adaptation import fit_adapters
    from vlm.weights import fill, under

    states = fit_adapters(under(read_checkpoint(run)["state_dict"], prefix), module.state_dict())
    fill(module, {f"{prefix}.{name}": value for name, value in states.items()}, prefix, run)


def take_part(
    model: nn.Module, states: Mapping[str, Tensor], source: Path, skip: Collection[str], option: str = "skip"
) -> PartialLoad:
    """Fill `model` with what fits of a checkpoint's states, but for what `skip` names; `option` is what set it."""
    from vlm.models.adaptation import fit_adapters
    from vlm.weights import take_what_fits, under

    own = model.state_dict()
    fitted = fit_adapters(under(states, "model"), own)
    there = {name: tensor for name, tensor in fitted.items() if tensor is not own.get(name)}  # new adapters are not
    heads = {name: tensor for name, tensor in states.items() if not name.startswith("model.")}
    return take_what_fits(model, there | heads, source, skip, option)


def image_transform(config: RunConfig, model: VisionLanguageModel, training: bool) -> ImageTransform:
    from data_loaders.transforms import ImageTransform

    vision: Any = model.vision
    data = config.data
    augmentation = data.augmentation if training else "none"
    interpolation = data.interpolation or vision.interpolation
    return ImageTransform(vision.image_pixels, interpolation, augmentation, data.decode, data.fit)


def build_pretraining(
    config: RunConfig, root: Path, model: VisionLanguageModel, tokenizer: Tokenizer
) -> tuple[TrainingModule, BatchSource, BatchSource]:
    """The module of a pretraining, with its training and validation examples."""
    from vlm.training.pretraining import Pretraining

    train, validation, classes = pretraining_data(config, root, model, tokenizer)
    objectives = {name: o.build(model, tokenizer, classes) for name, o in config.objectives.items()}
    num_steps = config.trainer.num_steps(len(train))
    weights = {name: objective.weight for name, objective in config.objectives.items()}
    is_mixture = config.data.part == "pairs" and len(config.supervision.drawn) > 1
    options = config.optimizer, num_steps, config.seed, is_mixture, config.distillation
    module = Pretraining(model, objectives, weights, *options)
    return module, train, validation


def pretraining_data(
    config: RunConfig, root: Path, model: VisionLanguageModel, tokenizer: Tokenizer
) -> tuple[BatchSource, BatchSource, tuple[str, ...]]:
    """Training and validation examples of `data.part`, and the classes where it has them."""
    from data_loaders.beside import open_beside, select
    from data_loaders.collate import ImageBatches, PairBatches, TextBatches
    from data_loaders.images import DecodedImages
    from data_loaders.shards import ShardReader
    from vlm.supervision.subset import Window

    supervision = config.supervision
    if config.data.part == "texts":
        lines = [unpaired_texts(root, split).decode().splitlines() for split in ("train", "validation")]
        held_out = _first(config, lines[1])
        words = _masks_whole_words(config)
        return TextBatches(lines[0], tokenizer, words), TextBatches(held_out, tokenizer, words), ()
    folder = "pairs" if config.data.part == "pairs" else "unimodal"
    splits = ("train", "validation")
    train, validation = (ShardReader(config.data.open_index(root, f"{folder}/{split}")) for split in splits)
    chosen = select(supervision, train)
    held_out = _first(config, Window(0, len(validation), len(validation)))
    images = [
        DecodedImages(reader, image_transform(config, model, training=reader is train))
        for reader in (train, validation)
    ]
    if config.data.part == "images":
        skip = config.data.damaged == "skip"
        classes = tuple(sorted(train.classes(skip) | validation.classes(skip)))
        return (
            ImageBatches(train, chosen, classes, images[0], config.data.damaged, config.seed),
            ImageBatches(validation, held_out, classes, images[1], config.data.damaged, config.seed),
            classes,
        )
    negatives = max((_negative_fraction(objective) for objective in config.objectives.values()), default=0.0)
    sources, matching = supervision.sources, _label_matching(config)
    beside = open_beside(supervision.drawn, "train", train, chosen)
    beside_held_out = open_beside(supervision.drawn, "validation", validation, held_out)
    options = matching, config.data.damaged, config.seed, _masks_whole_words(config)
    return (
        PairBatches(train, chosen, sources, images[0], tokenizer, negatives, beside, *options),
        PairBatches(validation, held_out, sources, images[1], tokenizer, negatives, beside_held_out, *options),
        (),
    )


def unpaired_texts(root: Path, split: str) -> bytes:
    """The file of a data root that `data.part=texts` learns from: UTF-8, one text a line."""
    file = root / "texts" / f"{split}.txt"
    try:
        content = file.read_bytes()
        content.decode()
    except FileNotFoundError:
        raise UserError(
            f"{file}: no such file. data.part=texts learns from texts/train.txt and texts/validation.txt of the data "
            "root: unpaired texts, one a line, which no preparer of images writes"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read as UTF-8 ({error})") from None
    return content


def _label_matching(config: RunConfig) -> LabelMatching | None:
    """How the batches are to find the tokens of a label; None where no objective masks whole labels."""
    objectives = [o for o in config.objectives.values() if isinstance(o, MaskedLanguageConfig)]
    wanted = {objective.label_masking for objective in objectives if objective.masking == "whole_label"}
    if len(wanted) > 1:
        raise UserError("objectives: label_masking is sound for one and released for another. Give one for all")
    return None if not wanted else "position" if wanted == {"sound"} else "substring"


def _masks_whole_words(config: RunConfig) -> bool:
    return any(isinstance(o, MaskedLanguageConfig) and o.masking == "whole_word" for o in config.objectives.values())


def _negative_fraction(objective: ObjectiveConfig) -> float:
    """The share of a batch that wants an extra image from the loader."""
    if isinstance(objective, MatchingConfig) and objective.negatives == "random":
        return objective.negative_fraction
    return 0.0


def _first(config: RunConfig, items: Any) -> Any:
    return items[: config.trainer.validation_examples]


def task_of(config: RunConfig) -> Task | RetrievalTask | None:
    """The run's task; one from outside (`type: custom`) is built from the class that it names."""
    from vlm.tasks.retrieval import RetrievalTask
    from vlm.tasks.task import Task

    if not isinstance(config.task, CustomConfig):
        return config.task
    task = config.task.build()
    if not isinstance(task, Task | RetrievalTask):
        raise UserError(f"task.target: {config.task.target} is no vlm.tasks.task.Task. Got {type(task).__name__}")
    return task


def build_finetuning(
    config: RunConfig, root: Path, model: VisionLanguageModel, tokenizer: Tokenizer
) -> tuple[TrainingModule, BatchSource, BatchSource]:
    """The module of a fine-tuning, with its training and validation questions."""
    from vlm.tasks.task import Task
    from vlm.training.finetuning import Finetuning

    task = task_of(config)
    assert isinstance(task, Task)
    answers = task.vocabulary(root)
    answer_ids = {answer: number for number, answer in enumerate(answers)}
    questions = [question for question in task.train_questions(root) if task.target(question, answer_ids)]
    transform = image_transform(config, model, training=True)
    train = question_batches(task, root, questions, answers, transform, tokenizer)
    held_out = _first(config, task.read(root, "validation"))
    transform = image_transform(config, model, training=False)
    validation = question_batches(task, root, held_out, answers, transform, tokenizer)
    num_steps = config.trainer.num_steps(len(train))
    options, seed, in_turn = config.optimizer, config.seed, task.images_in_turn
    module = Finetuning(model, answers, task.images_per_text, task.multi_label, options, num_steps, seed, in_turn)
    return module, train, validation


def question_batches(
    task: Any,
    root: Path,
    questions: list[Any],
    answers: tuple[str, ...],
    transform: Any,
    tokenizer: Tokenizer,
    images: Images | None = None,
) -> BatchSource:
    """Questions joined to `images`, by default the task's, and to soft targets over `answers`."""
    from data_loaders.collate import QuestionBatches

    if images is None:
        images = task_images(task, root, transform)
    answer_ids = {answer: number for number, answer in enumerate(answers)}
    return QuestionBatches(
        questions,
        images,
        tokenizer,
        partial(_target, task, answer_ids),
        len(answers),
        task.multi_label,
    )


def _target(task: Any, answer_ids: dict[str, int], question: Any) -> dict[int, float]:
    """What a question's answers are worth. A function of the module, so that it can be handed to loader processes."""
    target: dict[int, float] = task.target(question, answer_ids)
    return target


def task_images(task: Any, root: Path, transform: ImageTransform) -> Images:
    """The images that a task's model sees."""
    from data_loaders.images import DecodedImages, GreyImages
    from data_loaders.shards import ShardReader, open_index
    from vlm.tasks.task import read_missing_images

    if task.question_only:
        return GreyImages(transform.image_pixels)
    folder = root / task.type
    return DecodedImages(ShardReader(open_index(folder / "images")), transform, read_missing_images(folder))


def encode_frozen_images(config: RunConfig, model: VisionLanguageModel, source: Any, num_steps: int) -> None:
    """Give `source` the states of its images in place of their pixels, where the vision encoder never changes.

    Only where images are seen twice or more and all states fit `trainer.frozen_states_gib`: a step then neither
    decodes nor encodes an image. Every rank encodes all of them for itself. With `trainer.frozen_states_disk_gib` they
    are kept on disk instead, in 32 bits as they are computed, for all ranks and later runs.

    Texts are encoded at every step: their masks differ from step to step, and of a fine-tuning's step the language
    encoder is a small part.
    """
    import torch
    from rich.progress import track

    from data_loaders.images import DecodedImages, EncodedImages, GreyImages

    options = config.trainer
    if "vision" not in model.frozen or config.data.augmentation != "none" or not hasattr(source, "image_keys"):
        return
    keys = source.image_keys()
    images_per_text = getattr(task_of(config), "images_per_text", 1)
    is_known = isinstance(source.images, DecodedImages) and not isinstance(config.model.vision, CustomConfig)
    on_disk = options.frozen_states_disk_gib > 0 and is_known
    num_seen = num_steps * options.batch_size * images_per_text
    if num_steps == 0 or num_seen < len(keys) * (1 if on_disk else 2):
        return
    on_gpu = torch.cuda.is_available() and options.accelerator != "cpu"
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if on_gpu else torch.device("cpu")
    model.to(device).train()

    def encoder(pixels: Tensor) -> Tensor:
        return model.encode_image(pixels.to(device))

    named: dict[str, Any] = {
        "shown": partial(track, description="encoding images", disable=not options.progress),
        "skip_damaged": config.data.damaged == "skip",
    }
    with torch.no_grad():
        if on_disk:
            from data_loaders.cache import cache_folder
            from data_loaders.states import StateStore

            store = StateStore(cache_folder() / "states", _states_identity(config, model, source.images, device.type))
            limit = int(options.frozen_states_disk_gib * 2**30)
            stored = store.encode(source.images, keys, encoder, limit, **named)
            if stored is not None:
                source.images = stored
                return
            if num_seen < 2 * len(keys):
                return
        limit = int(options.frozen_states_gib * 2**30)
        wanted = keys[:1] if isinstance(source.images, GreyImages) else keys
        encoded = EncodedImages.encode(source.images, wanted, encoder, limit, **named)
    if encoded is not None:
        if isinstance(source.images, GreyImages):
            encoded.rows = dict.fromkeys(keys, 0)
        source.images = encoded


def _states_identity(config: RunConfig, model: VisionLanguageModel, images: DecodedImages, device: str) -> Any:
    """All that the states of a frozen encoder depend on, beside the keys of the images."""
    import importlib.metadata

    import torch

    from vlm.parameter_counts import code_of_models

    weights = hashlib.sha256()
    for name, tensor in model.vision.state_dict().items():
        weights.update(name.encode())
        weights.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    come_from = {"weights", "pretrained"}
    learn = set(EncoderConfig.model_fields)
    transform = images.transform
    return {
        "encoder": config.model.vision.model_dump(mode="json", exclude=come_from | learn),
        "weights": weights.hexdigest(),
        "data": images.reader.index.fingerprint,
        "missing": hashlib.sha256("\n".join(sorted(images.missing)).encode()).hexdigest(),
        "transform": [transform.image_pixels, transform.interpolation, transform.decode],
        "code": code_of_models(),
        "decoders": {name: importlib.metadata.version(name) for name in ("torchvision", "pillow", "simplejpeg")},
        "device": device,
        "layers": model.num_encoder_layers,
    }


# --- From objects to steps and numbers -------------------------------------------------------------------------------


def train(config: RunConfig) -> Path:
    """Run to the end, from the start or from the last checkpoint, and return the run's folder.

    A finished run is left as it is, but for a ledger that lacks what is declared by now. The folder holds the resolved
    config, the tokenizer, the ledger, checkpoints, TensorBoard events, predictions of a task, and at the very end
    `result.json`.
    """
    from vlm.bookkeeping import complete_ledger

    folder = config.run_folder
    _refuse_another_run(config, folder)
    if (folder / RESULT).is_file():
        if config.data.type == "csv":  # a table that changed since must not pass for the one that was learnt
            _refuse_other_inputs(folder, _inputs(config, config.data.prepare(config.trainer.progress)))
        complete_ledger(config)
        return folder
    start = time.perf_counter()
    root = config.data.prepare(progress=config.trainer.progress)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"folder: {folder} cannot be made ({error.strerror})") from None
    if not _is_first_process():  # of a run whose first process holds the lock
        return _train(config, root, start)
    with only_process(folder, "run"):
        return folder if (folder / RESULT).is_file() else _train(config, root, start)


def _train(config: RunConfig, root: Path, start: float) -> Path:
    from vlm.bookkeeping import write_ledger

    folder = config.run_folder
    _write_once(folder / CONFIG, dump_yaml(config))
    _refuse_other_inputs(folder, _inputs(config, root))
    tokenizer = build_tokenizer(config, root)
    tokenizer.save(folder / TOKENIZER)
    model, taken = begin_model(config)
    if taken is not None and _is_first_process() and not (folder / START).is_file():
        _tell_start(taken, config, folder / START)
    if getattr(task_of(config), "type", None) == "retrieval":
        module: TrainingModule | None = None
        fit: dict[str, Any] = {"steps": 0, "checkpoint": None}
        write_ledger(config, root)
    else:
        build = build_pretraining if config.task is None else build_finetuning
        module, train_source, validation_source = build(config, root, model, tokenizer)
        write_ledger(config, root, len(train_source) if config.task is not None else None)
        fit = _fit(config, module, train_source, validation_source)
    scores = _evaluate(config, root, model, tokenizer, module)
    result = fit | {
        "name": config.name,
        "fingerprint": fingerprint(config),
        "scores": scores,
        "seconds": round(time.perf_counter() - start, 2),
    }
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        write_atomically(folder / RESULT, json.dumps(result, indent=1))
    return folder


def _is_first_process() -> bool:
    return not any(int(os.environ.get(rank, 0)) for rank in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"))


def _tell_start(taken: PartialLoad, config: RunConfig, file: Path) -> None:
    """What was taken, what is new and what was left: as a table to the terminal, and with each new and left name."""
    from rich.console import Console

    table = taken.table(f"from {config.start_from}")
    Console(stderr=True).print(table)
    text = io.StringIO()
    Console(file=text, width=100).print(table)
    names = [f"{part}: {name}" for part in ("new", "left") for name in getattr(taken, part)]
    write_atomically(file, "\n".join([text.getvalue(), *names, ""]))


def _refuse_another_run(config: RunConfig, folder: Path) -> None:
    """A folder holds one run: another config must not be taken for it, nor continue from its checkpoint."""
    if not (folder / CONFIG).is_file():
        return
    there, here = fingerprint(load_yaml(folder / CONFIG, RunConfig)), fingerprint(config)
    if there != here:
        raise UserError(f"folder: {folder} holds the run {there}, and this one is {here}. Choose another folder")


def _inputs(config: RunConfig, root: Path) -> dict[str, str]:
    """What a run learns from beside its config: a fingerprint of each shard folder or text file that it may read."""
    from data_loaders.beside import beside_paths, content_fingerprint

    if config.task is not None:
        names = [f"{config.task.type}/images"]
    elif config.data.part == "texts":
        return {"texts/train.txt": hashlib.sha256(unpaired_texts(root, "train")).hexdigest()[:12]}
    else:
        folder = "pairs" if config.data.part == "pairs" else "unimodal"
        names = [f"{folder}/train", f"{folder}/validation"]
    found = {name: config.data.open_index(root, name).fingerprint for name in names if (root / name).is_dir()}
    if config.data.type == "csv":  # which a user edits now and then
        files = sorted((root / "csv").glob("*.jsonl"))
        found |= {f"csv/{file.name}": hashlib.sha256(file.read_bytes()).hexdigest()[:12] for file in files}
    if config.task is None and config.data.part == "pairs":
        found |= {path.as_posix(): content_fingerprint(path) for path in beside_paths(config.supervision)}
    return found


def _refuse_other_inputs(folder: Path, inputs: dict[str, str]) -> None:
    """A run that is resumed on other data would end as neither of the two."""
    _write_once(folder / INPUTS, json.dumps(inputs, indent=1))
    began = json.loads((folder / INPUTS).read_text())
    if began != inputs:
        name = next(iter(name for name in {**began, **inputs} if began.get(name) != inputs.get(name)))
        raise UserError(f"{folder}: this run began on other data ({name}). Start it anew in another folder")


def resume(folder: Path) -> Path:
    """Continue the run of this folder to its end."""
    if (folder / EXPORT).is_file():
        raise UserError(f"{folder}: an exported run, which cannot be resumed. Start from it: start_from={folder}")
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder}: no run here ({CONFIG} is missing)")
    config = load_yaml(folder / CONFIG, RunConfig)
    return train(config.model_copy(update={"folder": folder}))


def _fit(
    config: RunConfig, module: TrainingModule, train_source: BatchSource, validation_source: BatchSource
) -> dict[str, Any]:
    """Train with Lightning; returns steps, examples seen and the checkpoint to hand on."""
    from data_loaders.loader import evaluation_loader, train_loader
    from vlm.training.compiling import compile_blocks
    from vlm.training.trainer import TellProgress, build_trainer

    options, folder = config.trainer, config.run_folder
    last = folder / LAST
    trainer = build_trainer(config, module.num_steps, partial(_flops_of_example, config))
    if options.validation_pictures and hasattr(validation_source, "questions"):
        from vlm.training.pictures import PredictionPictures

        answers = cast("tuple[str, ...]", module.answers)
        pictures = PredictionPictures(validation_source.questions, answers, options.validation_pictures)
        trainer.callbacks.append(pictures)  # type: ignore[attr-defined]  # Lightning's connector sets it
    encode_frozen_images(config, module.model, train_source, module.num_steps)
    if options.compile:
        compile_blocks(module.model)
    if config.continue_from is not None and module.num_steps and not last.is_file():
        _begin_as(config, config.continue_from, module.num_steps, len(train_source))
    if module.num_steps == 0:  # a fraction of 0: the model as it was initialised is the result
        trainer.strategy.connect(module)
        trainer.save_checkpoint(last)
        return {"steps": 0, "samples": 0, "examples": 0, "checkpoint": LAST}
    first_step = int(read_checkpoint(folder, LAST)["global_step"]) if last.is_file() else 0
    rank, world_size = trainer.global_rank, options.world_size
    loader = train_loader(
        train_source,
        options.micro_batch_size,
        config.seed,
        num_batches=module.num_steps * options.accumulate,
        first_batch=first_step * options.accumulate,
        rank=rank,
        world_size=world_size,
        num_workers=config.data.num_workers,
        shuffle_shards=config.data.shuffle_shards,
        batches_of_step=options.accumulate,
    )
    module.by_items = options.loss_weighting == "items"
    held_out = evaluation_loader(
        validation_source, options.evaluation_batch_size, rank, world_size, config.data.num_workers, even=True
    )
    try:
        trainer.fit(module, loader, held_out, ckpt_path=last if last.is_file() else None, weights_only=True)
    except SystemExit:  # Lightning's answer to ctrl-C
        raise KeyboardInterrupt from None
    metrics = {name: round(float(value), 6) for name, value in trainer.callback_metrics.items() if value.isfinite()}
    best = folder / BEST
    told = trainer.callbacks  # type: ignore[attr-defined]  # Lightning's connector sets it
    return {
        "steps": module.num_steps,
        "samples": module.num_steps * options.batch_size,
        "examples": len(train_source),
        "checkpoint": BEST if options.select == "best" and best.is_file() else LAST,
        "metrics": metrics,
        "examples_per_second": next((one.examples_per_second for one in told if isinstance(one, TellProgress)), None),
    }


def _flops_of_example(config: RunConfig, text_tokens: int) -> float:
    from vlm.studies.costs import measure_step

    return measure_step(config, text_tokens or None).flops


def _begin_as(config: RunConfig, trunk: Path, num_steps: int, num_examples: int) -> None:
    """Take the last checkpoint that `trunk` kept and that this run would have come to as well, optimizer and all.

    The run then ends with the numbers of one that was never interrupted.
    """
    if not (trunk / CONFIG).is_file():
        raise UserError(f"continue_from: {trunk} is no run ({CONFIG} is missing)")
    theirs = load_yaml(trunk / CONFIG, RunConfig)
    ours, others = _without_budget(config), _without_budget(theirs)
    if fingerprint(ours) != fingerprint(others):
        sections = [(name, getattr(ours, name), getattr(others, name)) for name in RunConfig.model_fields]
        differing = [
            name for name, a, b in sections if (fingerprint(a) != fingerprint(b) if isinstance(a, Config) else a != b)
        ]
        raise UserError(f"continue_from: {trunk} differs in more than schedule and budget: in {', '.join(differing)}")
    if (trunk / INPUTS).read_text() != (config.run_folder / INPUTS).read_text():
        raise UserError(f"continue_from: {trunk} learns from other data than this run ({INPUTS} of both)")
    rate = config.optimizer.rate_factor(num_steps)
    their_rate = theirs.optimizer.rate_factor(theirs.trainer.num_steps(num_examples))
    # A checkpoint holds the rate of the step that follows it too.
    shared = next((step for step in range(num_steps) if rate(step) != their_rate(step)), num_steps) - 1
    kept = {int(file.stem.removeprefix("step-")): file for file in trunk.glob("step-*.ckpt")}
    if not (usable := [step for step in kept if step <= shared]):
        found = f"the first one is of step {min(kept):,}" if kept else "there is none"
        raise UserError(
            f"continue_from: both schedules agree up to step {max(shared, 0):,}, and {trunk} kept no checkpoint until "
            f"then ({found}). Give the trunk trainer.keep_every_steps, and both the same optimizer.warmup_steps"
        )
    partial = config.run_folder / f"{LAST}.{os.getpid()}"  # each rank makes the same file
    shutil.copyfile(kept[max(usable)], partial)
    os.replace(partial, config.run_folder / LAST)


def _without_budget(config: RunConfig) -> RunConfig:
    """What a run shares with those of other schedules and budgets, and of other looks at how it goes."""
    schedule = ("decay", "cooldown_fraction", "warmup_fraction", "warmup_steps")
    budget = ("passes", "samples", "validate_every_steps", "validation_examples", "select")
    changed: dict[str, Any] = {"name": "run", "folder": None, "continue_from": None, "declared": DeclaredConfig()}
    for section, names in (("optimizer", schedule), ("trainer", budget)):
        value = getattr(config, section)
        defaults = {name: type(value).model_fields[name].default for name in names}
        changed[section] = value.model_copy(update=defaults)
    return config.model_copy(update=changed)


def _evaluate(
    config: RunConfig, root: Path, model: VisionLanguageModel, tokenizer: Tokenizer, module: TrainingModule | None
) -> dict[str, float]:
    """Scores of the task on its evaluation split; none for a pretraining."""
    if config.task is None:
        return {}
    from vlm import evaluation

    if module is None:
        return evaluation.evaluate_retrieval(config, root, model, tokenizer)
    return evaluation.evaluate_answers(config, root, module, tokenizer)


def write_atomically(file: Path, text: str) -> None:
    """Write a file that is there whole or not at all."""
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    partial.write_text(text)
    os.replace(partial, file)


def _write_once(file: Path, text: str) -> None:
    if not file.is_file():
        write_atomically(file, text)
