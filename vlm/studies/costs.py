"""What a study costs: the floating-point operations of its runs, counted on the models themselves.

One training step of each distinct shape of run is taken on random inputs, and every matrix product, convolution and
attention in it is counted, forwards and backwards, by torch's own counter. Fused attention computes its scores again on
its way back, and they count again. The products are not computed, so that a step of a large model takes seconds. A run
costs this times the examples of its budget.

Texts count as `max_tokens` long, which is an upper bound. Not counted: elementwise operations, norms and the optimizer
(together below 1% of the operations, though not of the time), validation, evaluation, decoding of images, and that the
states of a frozen vision encoder may be kept (`trainer.frozen_states_gib`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from data_loaders import FolderData, WorldData
from vlm.run import RunConfig, count_parameters, task_of, without_weights
from vlm.studies.plan import Job, distinct

if TYPE_CHECKING:
    from torch import nn

    from vlm.models.language.tokenizer import Tokenizer
    from vlm.training.module import TrainingModule
    from vlm.types import Batch

NUM_MEASURED = 2  # examples: the fewest that have negatives in their batch
ANSWERS = {"vqav2": 3129, "gqa": 1842, "nlvr2": 2}  # answers of the published vocabularies; others count as VQAv2's
NUM_CLASSES = 1000
ADAMW_BYTES = 16  # of a parameter that learns: value, gradient and two moments, in 32 bits each
GIB = 2**30


@dataclass(frozen=True)
class Hardware:
    """A device and the share of its peak that training reaches. The share is an assumption."""

    name: str = "A100"
    peak: float = 312e12  # FLOP/s in bfloat16 without sparsity; NVIDIA's data sheet
    utilisation: float = 0.4

    @property
    def rate(self) -> float:
        """Operations per second that are counted on."""
        return self.peak * self.utilisation

    def __str__(self) -> str:
        return f"{self.name} at {self.rate / 1e12:.0f} TFLOP/s ({self.utilisation:.0%} of {self.peak / 1e12:.0f})"


@dataclass(frozen=True)
class Step:
    """One example of a training step."""

    flops: float
    learning: int  # parameters
    frozen: int  # parameters
    activation_bytes: float  # kept for the backward pass in 32 bits; about half of it in bf16-mixed

    @property
    def state_bytes(self) -> int:
        """Memory of parameters, gradients and AdamW's moments, on one device without sharding."""
        return ADAMW_BYTES * self.learning + 4 * self.frozen


@dataclass(frozen=True)
class Cost:
    """Runs of one stage that cost the same."""

    stage: str
    cell: str  # their labels: those that they share, and how many values the others have
    num_runs: int
    micro_batch_size: int
    examples: int | None  # of each run's budget; None: not known before the data is there
    step: Step

    @property
    def flops(self) -> float | None:
        """Of all these runs."""
        return None if self.examples is None else self.num_runs * self.examples * self.step.flops

    @property
    def memory_bytes(self) -> float:
        """Of one device under bf16-mixed: states, and half of a micro-batch's activations. Buffers come on top."""
        return self.step.state_bytes + self.micro_batch_size * self.step.activation_bytes / 2

    def hours(self, hardware: Hardware) -> float | None:
        """Of one device, for all these runs."""
        return None if self.flops is None else self.flops / hardware.rate / 3600


def study_cost(jobs: Sequence[Job]) -> list[Cost]:
    """Costs of a study's distinct runs, in their order. Each distinct shape is measured once."""
    measured: dict[str, Step] = {}
    groups: dict[tuple[str, str, int, int | None], list[Job]] = {}
    for job in distinct(jobs):
        size = job.config.trainer.micro_batch_size
        groups.setdefault((job.stage, shape_of(job.config), size, budget(job.config)), []).append(job)
    costs = []
    for (stage, shape, size, examples), alike in groups.items():
        if shape not in measured:
            measured[shape] = measure_step(alike[0].config)
        costs.append(Cost(stage, _cell(alike), len(alike), size, examples, measured[shape]))
    return costs


def _cell(jobs: Sequence[Job]) -> str:
    shown: dict[str, None] = {}
    for label in jobs[0].labels:
        values = list(dict.fromkeys(job.labels[label] for job in jobs))
        if label != "seed":
            shown["/".join(values) if len(values) <= 3 else f"{len(values)} of {label}"] = None
    return ", ".join(shown)


def markdown_table(costs: Sequence[Cost], hardware: Hardware) -> str:
    """The costs for people, the assumed rate with them."""
    lines = [
        "| stage | cell | runs | examples a run | GFLOP an example | PFLOP | hours | GiB (micro-batch) |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for cost in costs:
        examples = "?" if cost.examples is None else f"{cost.examples:,}"
        flops = "?" if cost.flops is None else f"{cost.flops / 1e15:,.0f}"
        hours = cost.hours(hardware)
        lines.append(
            f"| {cost.stage} | {cost.cell} | {cost.num_runs} | {examples} | {cost.step.flops / 1e9:.3g} | {flops} "
            f"| {'?' if hours is None else f'{hours:,.1f}'} | {cost.memory_bytes / GIB:.1f} ({cost.micro_batch_size}) |"
        )
    known = [cost.hours(hardware) or 0.0 for cost in costs]
    unknown = sum(cost.num_runs for cost in costs if cost.examples is None)
    runs = sum(cost.num_runs for cost in costs)
    lines.append(f"\n{sum(known):,.0f} hours of one {hardware}, which is an assumption, for {runs} runs.")
    if unknown:
        lines.append(f"{unknown} of them count as nothing: before the data is there, nobody knows how much they see.")
    lines.append("GiB of a device: parameters, gradients, AdamW and half of what 32 bits would keep for the way back.")
    return "\n".join(lines)


def budget(config: RunConfig) -> int | None:
    """How many examples a run sees in training; None where that needs data that is not there."""
    if _is_retrieval(config):
        return 0
    if config.trainer.samples is not None and config.supervision.fraction > 0:
        return config.trainer.num_steps(1) * config.trainer.batch_size
    available = num_examples(config)
    return None if available is None else config.trainer.num_steps(available) * config.trainer.batch_size


def _is_retrieval(config: RunConfig) -> bool:
    return getattr(task_of(config), "type", None) == "retrieval"


def num_examples(config: RunConfig) -> int | None:
    """How many training examples there are: of the data if it is there, else of `data.expected`."""
    if config.task is not None:
        found = _size(config, config.task.type)
        return None if found is None else max(1, round(getattr(config.task, "train_fraction", 1.0) * found))
    if config.data.part != "pairs":
        return _size(config, "unimodal" if config.data.part == "images" else "texts")
    if config.supervision.fraction == 0:
        return 0
    found = _size(config, "pairs")
    return None if found is None or config.supervision.keys is not None else round(config.supervision.fraction * found)


def _size(config: RunConfig, part: str) -> int | None:
    data = config.data
    if isinstance(data, WorldData):
        world = data.world
        sizes = {"pairs": world.num_pairs, "unimodal": world.num_unimodal_images, "texts": world.num_texts}
        sizes |= {"vqav2": world.num_vqav2_train, "gqa": world.num_gqa_train, "nlvr2": world.num_nlvr2_train}
        return sizes.get(part)
    root = getattr(data, "root", None)
    if part in ("pairs", "unimodal") and root is not None and not data.is_remote and (root / part / "train").is_dir():
        return len(data.open_index(root, f"{part}/train"))
    return data.expected.get(part) if isinstance(data, FolderData) else None


# --- One step, without its arithmetic --------------------------------------------------------------------------------


def shape_of(config: RunConfig) -> str:
    """What the operations of one example depend on."""
    model = config.model.model_dump(mode="json")
    for encoder in ("vision", "language"):
        for name in ("weights", "pretrained"):
            model[encoder].pop(name, None)
    task = task_of(config)
    turn = [getattr(task, name, None) for name in ("type", "images_per_text", "images_in_turn")]
    objectives = {name: objective.model_dump(mode="json") for name, objective in config.objectives.items()}
    shape: list[Any] = [model, objectives, config.data.part, turn]
    if config.distillation is not None:
        shape.append(config.distillation.model_dump(mode="json"))
    return json.dumps(shape, sort_keys=True, default=str)


def measure_step(config: RunConfig, text_tokens: int | None = None) -> Step:
    """One training step of the run's model on random inputs; its products are counted and not computed.

    `text_tokens`: how long its texts are; None: as long as they may be.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    if _is_retrieval(config):  # nothing is trained
        return Step(0.0, 0, count_parameters(config)["total"], 0.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module, batch = _module_and_batch(config, text_tokens or config.model.language.max_tokens)
        parameters = list(module.parameters())
        kept: dict[int, int] = {}
        own = {parameter.untyped_storage().data_ptr() for parameter in parameters}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        module.train()
        with _without_products(), FlopCounterMode(display=False) as counter:
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                loss = _loss(module, batch)
            if loss.requires_grad:
                loss.backward()
    learning = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    frozen = sum(parameter.numel() for parameter in parameters) - learning
    return Step(counter.get_total_flops() / NUM_MEASURED, learning, frozen, sum(kept.values()) / NUM_MEASURED)


@contextmanager
def _without_products() -> Iterator[None]:
    """What the counter knows is answered with zeros of the right shape; all else is computed."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_map_only
    from torch.utils.flop_counter import flop_registry

    class Skip(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func._overloadpacket not in flop_registry:
                return func(*args, **(kwargs or {}))
            shapes = tree_map_only(
                torch.Tensor, lambda tensor: torch.empty_like(tensor, device="meta"), (args, kwargs or {})
            )
            result = func(*shapes[0], **shapes[1])
            return tree_map_only(torch.Tensor, lambda tensor: torch.zeros_like(tensor, device="cpu"), result)

    with Skip():  # type: ignore[no-untyped-call]
        yield


def _module_and_batch(config: RunConfig, tokens: int) -> tuple[TrainingModule, Batch]:
    """The training module with zeros for weights, and a batch of random examples with texts of `tokens` tokens."""
    import torch

    from vlm.objectives import greatest_weight
    from vlm.training.finetuning import Finetuning
    from vlm.training.pretraining import Pretraining
    from vlm.types import Batch, Source

    count = NUM_MEASURED
    task: Any = task_of(config)
    with torch.device("meta"):
        model = without_weights(config.model).build()
    # A custom encoder need not say how many tokens it knows; then it is RoBERTa's number.
    tokenizer = _tokenizer(int(getattr(model.language, "vocabulary_size", 50_265)), tokens)
    with torch.device("meta"):
        if task is None:
            classes = tuple(f"class {number}" for number in range(NUM_CLASSES))
            objectives = {name: o.build(model, tokenizer, classes) for name, o in config.objectives.items()}
            weights = {name: greatest_weight(objective.weight) for name, objective in config.objectives.items()}
            options = model, objectives, weights, config.optimizer, 1, 0
            module: TrainingModule = Pretraining(*options, distillation=config.distillation)
        else:
            answers = [str(number) for number in range(ANSWERS.get(task.type, ANSWERS["vqav2"]))]
            optimizer, in_turn = config.optimizer, task.images_in_turn
            module = Finetuning(model, answers, task.images_per_text, task.multi_label, optimizer, 1, 0, in_turn)
    _fill_with_zeros(module)

    images_per_text = 1 if task is None else task.images_per_text
    random_negatives = [
        round(getattr(objective, "negative_fraction", 0.5) * count)
        for objective in config.objectives.values()
        if getattr(objective, "negatives", None) == "random"
    ]
    num_images = count * images_per_text + max(random_negatives, default=0)
    pixels = int(getattr(model.vision, "image_pixels"))  # noqa: B009
    special = torch.zeros(count, tokens, dtype=torch.bool)
    special[:, [0, -1]] = True
    targets: Any = None
    if config.data.part == "images":
        targets = torch.zeros(count, NUM_CLASSES)
    elif task is not None:
        multi = task.multi_label
        targets = torch.zeros(count, len(answers)) if multi else torch.zeros(count, dtype=torch.long)
    has_text = config.data.part != "images"
    human: Source = "human"
    sources = (human,) * count if config.data.part == "pairs" and task is None else ()
    batch = Batch(
        keys=tuple(str(number) for number in range(num_images if task is None else count)),
        image=None if config.data.part == "texts" else torch.zeros(num_images, 3, pixels, pixels, dtype=torch.uint8),
        text_ids=torch.randint(5, tokenizer.vocabulary_size, (count, tokens)) if has_text else None,
        text_mask=torch.ones(count, tokens, dtype=torch.bool) if has_text else None,
        special_mask=special if has_text else None,
        targets=targets,
        sources=sources,
        word_starts=torch.arange(tokens).expand(count, -1) if has_text else None,
        images_per_text=images_per_text,
    )
    return module, batch


def _loss(module: Any, batch: Batch) -> Any:
    from vlm.training.finetuning import Finetuning

    if isinstance(module, Finetuning):
        return module.loss_of(module.logits_of(batch), batch.targets)[0]  # type: ignore[arg-type]
    return module.losses_of(batch, training=True)["loss"]


def _fill_with_zeros(module: nn.Module) -> None:
    """Memory for a module of shapes alone. Random numbers would take longer than all the rest."""
    from itertools import chain

    import torch

    module.to_empty(device="cpu").to("cpu")  # the second tells Lightning where the module is
    with torch.no_grad():
        for tensor in chain(module.parameters(), module.buffers()):
            tensor.zero_()


def _tokenizer(size: int, max_tokens: int) -> Tokenizer:
    """Any tokenizer of this size: objectives ask for the size and for the mask's id."""
    import tokenizers

    from vlm.models.language.tokenizer import CLS, MASK, PAD, SEP, UNKNOWN, Tokenizer

    words = [PAD, CLS, SEP, MASK, UNKNOWN, *(f"[unused{number}]" for number in range(5, size))]
    vocabulary = {word: number for number, word in enumerate(words[:size])}
    return Tokenizer(tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=UNKNOWN)), max_tokens)
