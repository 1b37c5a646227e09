"""From a model and a task's official files to predictions and scores."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, TypeVar, cast

import torch
from jaxtyping import Float
from rich.console import Console
from rich.progress import track
from torch import Tensor

from data_loaders.images import DecodedImages, Images, MeanImages, ShuffledImages, derangement
from data_loaders.loader import evaluation_loader
from data_loaders.shards import ShardReader, open_index, ring_hash
from vlm.config import apply_overrides, fingerprint, load_yaml
from vlm.errors import MissingFileError, UserError
from vlm.metrics.items import write_items
from vlm.metrics.submission import merge_predictions
from vlm.models.language.tokenizer import Tokenizer
from vlm.models.vision_language import VisionLanguageModel
from vlm.run import (
    BEST,
    CONFIG,
    LAST,
    TOKENIZER,
    RunConfig,
    build_model,
    image_transform,
    load_component,
    question_batches,
    read_checkpoint,
    task_images,
    task_of,
    without_weights,
    write_atomically,
)
from vlm.tasks.retrieval import Rank, RetrievalTask, retrieval_scores
from vlm.tasks.task import Task, read_missing_images
from vlm.training.finetuning import Finetuning
from vlm.training.module import TrainingModule
from vlm.types import Question

T = TypeVar("T")
Baseline = Literal["question_only", "shuffled_images", "most_frequent"]
"""What is taken away: every image is the mean image, or that of another question; or the model itself."""

MEAN_OF = 1000  # training images: the standard error of their mean is about 2 of 255 grey levels


def evaluate_answers(
    config: RunConfig, root: Path, module: TrainingModule, tokenizer: Tokenizer, baseline: Baseline | None = None
) -> dict[str, float]:
    """Answer every question of the evaluation split, write the official predictions file, and score it.

    The score of each question goes to a file of its own, for comparing runs question by question.
    The selected checkpoint answers. Beside the scores stands `question_prior`: what the most frequent training
    answers to the same questions would score, without a picture. A split whose answers its authors keep has no
    scores. Under DDP the ranks share the questions. With a `baseline` everything is the same but what it takes away.
    """
    task = cast(Task, task_of(config))
    questions = task.evaluation_questions(root)
    if baseline == "most_frequent":
        predictions = task.question_prior(task.train_questions(root), questions, by_text=False)
    else:
        predictions = _answer(config, root, module, tokenizer, questions, baseline)
    if _rank()[0] == 0:
        file = config.run_folder / f"predictions-{_name_of(task, baseline)}.json"
        task.write_predictions(file, questions, predictions)
    if not any(question.answers for question in questions):
        return {}
    scores = task.score(questions, predictions)
    items = task.items(questions, predictions)
    if items is not None and _rank()[0] == 0:
        write_items(config.run_folder / f"items-{_name_of(task, baseline)}.safetensors", items)
    try:
        train = task.train_questions(root)
    except MissingFileError:  # a root for evaluation alone, without the training questions
        return scores
    return scores | {"question_prior": task.score(questions, task.question_prior(train, questions))[task.headline]}


def _answer(
    config: RunConfig,
    root: Path,
    module: TrainingModule,
    tokenizer: Tokenizer,
    questions: list[Question],
    baseline: Baseline | None,
) -> dict[str, str]:
    """The selected checkpoint's answers, gathered from all ranks."""
    task = cast(Task, task_of(config))
    assert isinstance(module, Finetuning)
    _load_selected(module, config)
    transform = image_transform(config, module.model, training=False)
    images = task_images(task, root, transform)
    if baseline == "question_only":
        images = MeanImages(images, _some_training_images(task, root))
    elif baseline == "shuffled_images":
        images = ShuffledImages(images, derangement((q.image_keys for q in questions), config.seed))
    source = question_batches(task, root, questions, module.answers, transform, tokenizer, images)
    rank, world_size = _rank()
    if rank == 0 and baseline != "question_only" and not task.question_only:
        _tell_of_missing_images(task, root, questions)
    loader = evaluation_loader(source, config.trainer.evaluation_batch_size, rank, world_size, config.data.num_workers)
    device = _device(config)
    module.to(device).eval()
    predictions: dict[str, str] = {}
    with torch.inference_mode():
        for batch in _bar(loader, f"answering {task.type} {task.evaluation_split}", config.trainer.progress):
            batch = module.transfer_batch_to_device(batch, device, 0)
            best = module.logits_of(batch).argmax(-1).tolist()
            predictions |= {key: module.answers[number] for key, number in zip(batch.keys, best, strict=True)}
    return _gather(predictions)


def _some_training_images(task: Task, root: Path) -> list[str]:
    """Up to `MEAN_OF` training images, chosen by the hash of their keys."""
    keys = {key for question in task.train_questions(root) for key in question.image_keys}
    return sorted(keys, key=ring_hash)[:MEAN_OF]


def _tell_of_missing_images(task: Task, root: Path, questions: Sequence[Question]) -> None:
    missing = read_missing_images(root / task.type)
    without = sum(not missing.isdisjoint(question.image_keys) for question in questions)
    if without:
        Console(stderr=True).print(
            f"{task.type} {task.evaluation_split}: {without:,} of {len(questions):,} questions are about images that "
            "the release lacked. They are answered with a grey image, and count"
        )


def _name_of(task: Task | RetrievalTask, baseline: Baseline | None) -> str:
    """What a predictions or scores file is about: "vqav2-test", "vqav2-test-shuffled_images"."""
    split = [task.evaluation_name] if isinstance(task, Task) else []
    return "-".join([task.type, *split, *([baseline] if baseline else [])])


def evaluate_retrieval(
    config: RunConfig,
    root: Path,
    model: VisionLanguageModel,
    tokenizer: Tokenizer,
    baseline: Baseline | None = None,
) -> dict[str, float]:
    """Rank all images for each text and all texts for each image by the matching head of `start_from`."""
    task = cast(RetrievalTask, task_of(config))
    if baseline == "most_frequent":
        raise UserError(
            "task=retrieval: has no answers, so none is the most frequent; compare with its scores of chance"
        )
    if config.start_from is None:
        raise UserError("task=retrieval: start_from must name a pretraining run with a matching objective")
    head = torch.nn.Linear(2 * model.width, 2)
    objectives = load_yaml(config.start_from / CONFIG, RunConfig).objectives
    named = next((name for name, objective in objectives.items() if objective.type == "matching"), None)
    if named is None:
        raise UserError(f"{config.start_from}: this run has no matching objective, whose head retrieval ranks by")
    load_component(head, config.start_from, f"objectives.{named}.head")
    device = _device(config)
    model.to(device).eval()
    head.to(device)
    transform = image_transform(config, model, training=False)
    scores: dict[str, float] = {}
    for name in task.sets:
        questions = task.read(root, name)
        images: Images = DecodedImages(ShardReader(open_index(root / "retrieval" / f"{name}_images")), transform)
        if baseline == "question_only":
            reader = ShardReader(open_index(root / "pairs" / "train"))
            some = [reader.text(position).key for position in range(min(len(reader), MEAN_OF))]
            images = MeanImages(DecodedImages(reader, transform), some)
        elif baseline == "shuffled_images":
            images = ShuffledImages(images, derangement((q.image_keys for q in questions), config.seed))
        pixels = images([q.image_keys[0] for q in questions])
        matches = match_matrix(model, head, pixels, [q.text for q in questions], tokenizer, config)
        ranks = {"text_to_image": ranks_of(matches), "image_to_text": ranks_of(matches.T)}
        scores |= {f"{name}/{metric}": value for metric, value in retrieval_scores(ranks).items()}
        scores[f"{name}/chance"] = 100 / len(questions)
        scores |= {f"{name}/recall_at_{k}/chance": min(100 * k / len(questions), 100.0) for k in (5, 10)}
    scores[task.headline] = scores[f"{task.sets[0]}/{task.headline}"]
    return scores


def ranks_of(matches: Float[Tensor, "queries items"]) -> list[Rank]:
    """For each query how many items stand above its own, and how many level with it. NaN is level with everything."""
    own = matches.diagonal()[:, None]
    above, not_below = (matches > own).sum(1), (~(matches < own)).sum(1)
    return list(zip(above.tolist(), (not_below - above - 1).tolist(), strict=True))


def match_matrix(
    model: VisionLanguageModel,
    head: torch.nn.Module,
    images: Tensor,
    texts: Sequence[str],
    tokenizer: Tokenizer,
    config: RunConfig,
) -> Float[Tensor, "texts images"]:
    """Log-odds that each text matches each image. Every image and text is encoded once; the fusion sees all pairs."""
    size, device = config.trainer.evaluation_batch_size, next(model.parameters()).device
    rows = []
    with torch.inference_mode():
        projected = [model.project_image(model.encode_image(part.to(device))) for part in images.split(size)]
        for start in _bar(range(0, len(texts)), "matching", config.trainer.progress):
            ids, mask, _ = tokenizer(texts[start : start + 1])
            text_states = model.encode_text(ids.to(device), mask.to(device))
            logits = torch.cat([head(model.fuse_all(part, text_states, mask.to(device))) for part in projected])
            rows.append((logits[:, 1] - logits[:, 0]).float().cpu())
    return torch.stack(rows)


def evaluate_run(folder: Path, overrides: Sequence[str] = (), baseline: Baseline | None = None) -> dict[str, float]:
    """Score a fine-tuned run again from its checkpoint, on the split that its config or `overrides` name.

    The folder is all it takes: the runs it started from may be gone, and the answers are those it was trained with.
    Scores go to `scores-TASK-SPLIT[-BASELINE].json` in the run's folder; its `result.json` stays as it is.
    """
    config = apply_overrides(load_yaml(folder / CONFIG, RunConfig), overrides).model_copy(update={"folder": folder})
    task = task_of(config)
    if task is None:
        raise UserError(f"{folder}: is a pretraining, which has no task to be scored on")
    root = config.data.prepare()
    tokenizer = Tokenizer.from_file(folder / TOKENIZER, config.model.language.max_tokens)
    if isinstance(task, RetrievalTask):
        scores = evaluate_retrieval(config, root, build_model(config), tokenizer, baseline)
    else:
        assert isinstance(task, Task)
        answers = read_checkpoint(folder)["answers"]
        model = without_weights(config.model).build()
        options, seed, in_turn = config.optimizer, config.seed, task.images_in_turn
        module = Finetuning(model, answers, task.images_per_text, task.multi_label, options, 0, seed, in_turn)
        scores = evaluate_answers(config, root, module, tokenizer, baseline)
    content = {"fingerprint": fingerprint(config), "baseline": baseline, "scores": scores}
    write_atomically(folder / f"scores-{_name_of(task, baseline)}.json", json.dumps(content, indent=1))
    return scores


def _load_selected(module: TrainingModule, config: RunConfig) -> None:
    """The weights of the best checkpoint, if the run keeps one, else of the last."""
    chosen = BEST if config.trainer.select == "best" and (config.run_folder / BEST).is_file() else LAST
    module.load_state_dict(read_checkpoint(config.run_folder, chosen)["state_dict"])


def _device(config: RunConfig) -> torch.device:
    on_gpu = torch.cuda.is_available() and config.trainer.accelerator != "cpu"
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def _rank() -> tuple[int, int]:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def _gather(predictions: dict[str, str]) -> dict[str, str]:
    """The predictions of all ranks, once each of them has answered its share."""
    if _rank()[1] == 1:
        return predictions
    parts: list[dict[str, str] | None] = [None] * _rank()[1]
    torch.distributed.all_gather_object(parts, predictions)
    return merge_predictions(parts)


def _bar(items: Iterable[T], description: str, shown: bool) -> Iterator[T]:
    return iter(track(items, description, disable=not shown))
