"""Load a model for use: a run, a checkpoint, an exported folder or one of the hub, with all that it takes and gives."""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image
from torch import Tensor, nn

from data_loaders.decoding import refuse_too_large
from data_loaders.transforms import TORCH, ImageTransform
from vlm.config import CustomConfig, load_yaml
from vlm.errors import UserError
from vlm.exports import NAMES, Export, TransformConfig, open_export
from vlm.models import ModelConfig
from vlm.models.adaptation import SCALING, merge_adapters
from vlm.models.answering import answer_logits
from vlm.models.heads import AnswerHead, VocabularyHead
from vlm.models.language.tokenizer import MASK, Tokenizer
from vlm.models.vision_language import VisionLanguageModel
from vlm.objectives import MaskedLanguageConfig, MatchingConfig
from vlm.run import (
    CONFIG,
    EXPORT,
    TOKENIZER,
    RunConfig,
    image_transform,
    read_checkpoint,
    take_part,
    task_of,
    without_weights,
)
from vlm.types import Batch, Encoded, View
from vlm.weights import PartialLoad, TooLargeError, fill, is_filled, parameters_on_meta

if TYPE_CHECKING:
    from vlm.tasks.task import Task

T = TypeVar("T")
Picture = Image.Image | Path | str | bytes | Tensor
"""A picture, the path of one, its encoded bytes, or its pixels [3 h w]: bytes, or numbers in [0, 1]."""

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
MAX_IMAGE_BYTES = 2**28  # of a file: the cap on pixels, at four bytes each


class LoadedModel:
    """A trained model that takes pictures and texts as they are, in lists of any length.

    Every method takes `batch_size` pairs at a time through the model, and gives what it gives in the order of the
    list, on the model's device. One text, question or picture in place of a list stands for all.

    `model` is the plain module, `head` what answers, with `answers` in the order of its outputs (none unless the run
    was fine-tuned on a task with answers), `heads` those of the pretraining by their objective's type.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        transform: ImageTransform,
        tokenizer: Tokenizer,
        config: RunConfig,
        head: nn.Module | None = None,
        answers: Sequence[str] = (),
        heads: Mapping[str, nn.Module] | None = None,
    ) -> None:
        self.model, self.transform, self.tokenizer, self.config = model, transform, tokenizer, config
        self.head, self.answers = head, tuple(answers)
        self.heads = dict(heads or {})

    # --- Encoders ---

    @torch.inference_mode()
    def encode_image(self, images: Sequence[Picture] | Tensor, batch_size: int = 32) -> Float[Tensor, "n p d"]:
        """States of the vision encoder alone, CLS first."""
        parts = [self.model.encode_image(self.pixels(images[at])) for at in _parts(len(images), batch_size)]
        return torch.cat([self.model.last_layer(part) for part in parts])

    @torch.inference_mode()
    def encode_text(
        self, texts: Sequence[str], batch_size: int = 32
    ) -> tuple[Float[Tensor, "n l d"], Bool[Tensor, "n l"]]:
        """States of the language encoder alone, CLS first, and the mask that is True at real tokens."""
        ids, mask = self._tokens(texts)
        parts = [self.model.encode_text(ids[at], mask[at]) for at in _parts(len(ids), batch_size)]
        return torch.cat([self.model.last_layer(part) for part in parts]), mask

    @torch.inference_mode()
    def encode(self, images: Sequence[Picture] | Tensor, texts: Sequence[str] | str, batch_size: int = 32) -> Encoded:
        """Fused states and the pooled vector of each image with its text."""
        texts = _for_all(texts, len(images), "texts")
        ids, mask = self._tokens(texts)
        parts = [self._fused(images[at], ids[at], mask[at]) for at in _parts(len(texts), batch_size)]
        text, image, pooled = (
            torch.cat([cast(Tensor, getattr(part, name)) for part in parts]) for name in ("text", "image", "pooled")
        )
        return Encoded(text, image, pooled)

    @property
    def vision(self) -> Encoder:
        """The vision encoder alone."""
        return Encoder(self.model.vision, "vision", self.transform)

    @property
    def language(self) -> Encoder:
        """The language encoder alone."""
        return Encoder(self.model.language, "language", self.tokenizer)

    # --- What it was trained for ---

    @torch.inference_mode()
    def match(
        self, images: Sequence[Picture] | Tensor, texts: Sequence[str] | str, batch_size: int = 32
    ) -> Float[Tensor, " n"]:
        """The probability that each text belongs to its image, by the matching head of a pretraining."""
        head = self._head("matching")
        texts = _for_all(texts, len(images), "texts")
        probabilities = []
        for at in _parts(len(texts), batch_size):
            pooled = self._fused(images[at], *self._tokens(texts[at])).pooled
            probabilities.append(head(pooled).float().softmax(-1)[:, 1])
        return torch.cat(probabilities)

    @torch.inference_mode()
    def fill_mask(
        self, images: Sequence[Picture] | Tensor, texts: Sequence[str] | str, top: int = 5, batch_size: int = 32
    ) -> list[list[dict[str, float]]]:
        """For each text and each [MASK] in it, the `top` tokens with their probabilities, the most likely first.

        Tokens that read alike, as with and without the space before them, are one. By the head of a pretraining.
        """
        head = self._head("masked_language")
        texts = _for_all(texts, len(images), "texts")
        spelling = str(self.tokenizer.backend.id_to_token(self.tokenizer.mask_id))
        filled: list[list[dict[str, float]]] = []
        for at in _parts(len(texts), batch_size):
            ids, mask = self._tokens([text.replace(MASK, spelling) for text in texts[at]])
            masked = ids == self.tokenizer.mask_id
            for row, text in zip(masked.sum(1).tolist(), texts[at], strict=True):
                if row != max(text.count(MASK), text.count(spelling)) or row == 0:
                    raise ValueError(
                        f"every text needs a {MASK} within its first {self.tokenizer.max_tokens} tokens. Got {text!r}"
                    )
            states = cast(Tensor, self._fused(images[at], ids, mask).text)
            best = head(states[masked]).float().softmax(-1).topk(top)
            tokens = iter(zip(best.values.tolist(), best.indices.tolist(), strict=True))
            filled += [[self._read(*next(tokens)) for _ in range(row)] for row in masked.sum(1).tolist()]
        return filled

    @torch.inference_mode()
    def answer(
        self,
        images: Sequence[Picture] | Sequence[Sequence[Picture]] | Tensor,
        questions: Sequence[str] | str,
        top: int | None = None,
        batch_size: int = 32,
    ) -> list[dict[str, float]]:
        """For each question its answers with their probabilities, the most likely first: all, or the `top` ones.

        A task of two images a statement (NLVR2) takes a pair of images for each. Probabilities of VQAv2 are those of
        each answer alone and do not sum to 1.
        """
        if self.head is None:
            raise UserError(f"run {self.config.name!r} was not fine-tuned on a task with answers; load one that was")
        task = cast("Task", task_of(self.config))
        questions = _for_all(questions, len(images), "questions")
        ranked: list[dict[str, float]] = []
        for at in _parts(len(questions), batch_size):
            logits = self._answer_logits(task, images[at], questions[at]).float()
            probabilities = logits.sigmoid() if task.multi_label else logits.softmax(-1)
            best = probabilities.topk(min(top or len(self.answers), len(self.answers)))
            ranked += [
                {self.answers[number]: value for value, number in zip(values, numbers, strict=True)}
                for values, numbers in zip(best.values.tolist(), best.indices.tolist(), strict=True)
            ]
        return ranked

    # --- Inputs ---

    def pixels(self, images: Sequence[Picture] | Tensor) -> UInt8[Tensor, "b 3 h w"]:
        """Pictures as the model wants them, on its device."""
        return torch.stack([self._square(image) for image in images]).to(self.device)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def to(self, device: str | torch.device) -> LoadedModel:
        for module in (self.model, self.head, *self.heads.values()):
            if module is not None:
                module.to(device)
        return self

    def _square(self, image: Picture) -> UInt8[Tensor, "3 h w"]:
        if isinstance(image, Tensor):
            return _resized(image, self.transform)
        if isinstance(image, Image.Image):
            refuse_too_large(image.width, image.height, "image")
            return self.transform(image)
        if isinstance(image, bytes):
            return self.transform(image)
        return self.transform(read_image(Path(image)), str(image))

    def _tokens(self, texts: Sequence[str]) -> tuple[Int[Tensor, "n l"], Bool[Tensor, "n l"]]:
        if isinstance(texts, str):
            raise ValueError(f"a list of texts is wanted. Got one: {texts!r}")
        ids, mask, _ = self.tokenizer(texts)
        return ids.to(self.device), mask.to(self.device)

    def _fused(self, images: Any, ids: Tensor, mask: Tensor) -> Encoded:
        return self.model.encode(self.pixels(images), [View("pair", ids, mask)])[0]

    def _answer_logits(self, task: Task, images: Any, questions: Sequence[str]) -> Float[Tensor, "b k"]:
        groups = [[item] if task.images_per_text == 1 else list(item) for item in images]
        if any(len(group) != task.images_per_text for group in groups):
            raise ValueError(f"each question needs {task.images_per_text} images")
        ids, mask = self._tokens(questions)
        batch = Batch(
            keys=tuple(questions),
            image=self.pixels([group[place] for place in range(task.images_per_text) for group in groups]),
            text_ids=ids,
            text_mask=mask,
            images_per_text=task.images_per_text,
        )
        return answer_logits(self.model, cast(nn.Module, self.head), batch, task.images_in_turn)

    def _head(self, objective: str) -> nn.Module:
        if objective in self.heads:
            return self.heads[objective]
        if self.config.task is not None:
            remedy = "it was fine-tuned, which keeps no head of its pretraining; load the run that it started from"
        else:
            remedy = f"it was pretrained without the objective {objective} (with images)"
        raise UserError(f"run {self.config.name!r} has no head for that: {remedy}")

    def _read(self, values: Sequence[float], ids: Sequence[int]) -> dict[str, float]:
        read: dict[str, float] = {}
        for value, number in zip(values, ids, strict=True):
            token = self.tokenizer.backend.decode([number], skip_special_tokens=False).strip()
            read[token] = read.get(token, 0.0) + value
        return read


class Encoder:
    """One encoder of a loaded model, alone."""

    def __init__(self, module: nn.Module, name: str, takes: ImageTransform | Tokenizer) -> None:
        self.module, self.name, self.takes = module, name, takes

    @property
    def timm_model(self) -> Any:
        """The plain model of the timm library, without a classifier; it takes normalised pixels.

        With low-rank adapters it is a copy that has them merged into its weights.
        """
        from vlm.models.vision.timm import TimmVision

        if not isinstance(self.module, TimmVision):
            raise self._other("timm")
        return self._merged(self.module)

    @property
    def transformers_model(self) -> Any:
        """The plain model of the transformers library; `save_pretrained` writes it for anyone.

        With low-rank adapters it is a copy that has them merged into its weights.
        """
        from vlm.models.language.transformers import TransformersLanguage

        if not isinstance(self.module, TransformersLanguage):
            raise self._other("transformers")
        return self._merged(self.module)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the encoder for others, who then need nothing of this project.

        Of timm: a folder for `timm.create_model("local-dir:FOLDER", pretrained=True)`. Of transformers: one for
        `AutoModel.from_pretrained(FOLDER, add_pooling_layer=False)`, the tokenizer beside it. (A pooler, which many
        architectures have and none of ours trains, is an argument there and cannot be named in the folder.)
        """
        folder = Path(folder)
        if isinstance(self.takes, ImageTransform):
            from timm.models import save_for_hf

            size = (3, self.takes.image_pixels, self.takes.image_pixels)
            module: Any = self.module
            data = {"input_size": size, "mean": module.mean, "std": module.std, "interpolation": module.interpolation}
            folder.mkdir(parents=True, exist_ok=True)
            save_for_hf(self.timm_model, str(folder), safe_serialization=True, data_config=data)
            return
        import transformers

        self.transformers_model.save_pretrained(folder)
        fast = self.takes.plain()
        special = {f"{name}_token": fast.id_to_token(number) for name, number in self.takes.special_ids().items()}
        length = self.takes.max_tokens
        transformers.PreTrainedTokenizerFast(tokenizer_object=fast, model_max_length=length, **special).save_pretrained(
            folder
        )

    def _merged(self, module: Any) -> Any:
        if SCALING in module._buffers:
            module = merge_adapters(copy.deepcopy(module))
        return module.model

    def _other(self, library: str) -> UserError:
        kind = type(self.module).__name__
        return UserError(f"the {self.name} encoder is a {kind}, and no model of {library}. Its module is `.module`")


def read_image(file: Path) -> bytes:
    """The bytes of an image file, which must be a file of a size that an image can have."""
    try:
        if not file.is_file():
            raise UserError(f"{file}: no such image file")
        if file.stat().st_size > MAX_IMAGE_BYTES:
            raise UserError(f"{file}: over {MAX_IMAGE_BYTES:,} bytes, which no image here may have")
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None


def _resized(image: Tensor, transform: ImageTransform) -> UInt8[Tensor, "3 h w"]:
    """Pixels as bytes, of the size that the model wants."""
    if image.ndim != 3 or image.shape[0] != 3 or not (image.dtype == torch.uint8 or image.is_floating_point()):
        raise ValueError(
            f"pixels must be uint8, or numbers in [0, 1], of shape (3, h, w). Got {image.dtype} {tuple(image.shape)}"
        )
    refuse_too_large(image.shape[2], image.shape[1], "image")
    if image.is_floating_point():
        if image.amin() < 0 or image.amax() > 1 or image.isnan().any():
            raise ValueError("numbers of pixels must lie in [0, 1]: not 0 to 255, and not normalised")
        image = (255 * image).round().to(torch.uint8)
    side = [transform.image_pixels, transform.image_pixels]
    if list(image.shape[1:]) == side:
        return image
    return cast(Tensor, TORCH[transform.interpolation](image[None].cpu(), side, False, None, None)[0])


def _parts(count: int, size: int) -> Iterator[slice]:
    if size < 1:
        raise ValueError(f"batch_size must be at least 1. Got {size}")
    if not count:
        raise ValueError("an empty list. Give at least one")
    return iter([slice(start, start + size) for start in range(0, count, size)])


def _for_all(texts: Sequence[str] | str, count: int, what: str) -> list[str]:
    texts = [texts] * count if isinstance(texts, str) else list(texts)
    if len(texts) != count:
        raise ValueError(f"images and {what} must be as many. Got {count} and {len(texts)}")
    return texts


# --- From files to a model -------------------------------------------------------------------------------------------


def load(
    model: str | Path, trust_code: bool = False, revision: str | None = None, device: str | torch.device = "cpu"
) -> LoadedModel:
    """The model of a run's folder, a checkpoint inside one, an exported folder, or `OWNER/NAME` on the hub.

    Reads weights and plain values only. A config may also name code from outside (`type: custom`), which is imported
    and run only with `trust_code=True`. The weights are mapped from their file: a model is there at once, and its
    memory is the file's own. `revision` is a branch, tag or commit on the hub.
    """
    folder, name = place_of(model, revision)
    export = open_export(folder) if (folder / EXPORT).is_file() else None
    config = export.config if export else load_yaml(folder / CONFIG, RunConfig)
    if not trust_code and (target := _code_of(config)):
        raise UserError(f"{folder}: it runs outside code ({target}). If you trust it: load(..., trust_code=True)")
    checkpoint = read_checkpoint(folder, name)
    states: dict[str, Tensor] = checkpoint["state_dict"]
    wanted = export.model if export else without_weights(config.model)
    module = _built(wanted, states, folder)
    tokenizer = Tokenizer.from_file(folder / TOKENIZER, config.model.language.max_tokens)
    transform = image_transform(config, module, training=False)
    if export is not None:
        transform = _as_exported(transform, module, export)
    answers = tuple(checkpoint.get("answers", ()))
    head = _answer_head(config, module, answers, states, folder) if answers else None
    heads = _objective_heads(config, module, tokenizer, states, folder)
    for one in (module, head, *heads.values()):
        if one is not None:
            one.eval()
    return LoadedModel(module, transform, tokenizer, config, head, answers, heads).to(device)


def load_partially(
    module: nn.Module, model: str | Path, skip: Collection[str] = (), revision: str | None = None
) -> PartialLoad:
    """Take for a `VisionLanguageModel` what fits of a trained one (`load` says which), and say what.

    `skip`: components or tensors to leave as they are here, such as "fusion". A tensor of the same name and another
    shape is an error. The result lists what was taken, what is new here and what was left there; `.table()` shows it.
    """
    folder, name = place_of(model, revision)
    return take_part(module, read_checkpoint(folder, name)["state_dict"], folder, skip)


def pull(name: str, revision: str | None = None, endpoint: str | None = None) -> Path:
    """The folder of `OWNER/NAME` on the hub, fetched into the hub's cache. Only the files of an export are fetched.

    Without network it is what was fetched before.
    """
    from huggingface_hub import HfApi

    try:
        found = HfApi(endpoint=endpoint).snapshot_download(name, revision=revision, allow_patterns=list(NAMES))
    except Exception as error:  # the hub client, its transport and the system each raise their own
        at = f" at revision {revision!r}" if revision else ""
        raise UserError(
            f"{name!r} is no folder here, and could not be fetched from the hub{at} ({_reason(error)}). "
            "Without network: download the exported folder elsewhere and load that"
        ) from None
    folder = Path(found)
    if not (folder / EXPORT).is_file():
        raise UserError(f"{name}: on the hub, but no model that `vlm export` wrote ({EXPORT} is missing)")
    return folder


def push(
    folder: str | Path, name: str, private: bool = False, revision: str | None = None, endpoint: str | None = None
) -> str:
    """Upload an exported folder to the hub as `OWNER/NAME`, and return the address of the commit.

    `revision` is the branch that takes it. Who may write is the hub client's affair (`hf auth login`, or HF_TOKEN).
    """
    from huggingface_hub import HfApi

    if HUB_ID.fullmatch(name) is None:
        raise UserError(f"{name!r}: expected OWNER/NAME, a repository on the hub")
    folder = Path(folder)
    open_export(folder)
    client = HfApi(endpoint=endpoint)
    try:
        client.create_repo(name, private=private, exist_ok=True)
        if revision is not None:
            client.create_branch(name, branch=revision, exist_ok=True)
        commit = client.upload_folder(
            repo_id=name,
            folder_path=folder,
            revision=revision,
            allow_patterns=list(NAMES),
            commit_message="Upload of an exported model",
        )
    except Exception as error:  # the hub client, its transport and the system each raise their own
        raise UserError(
            f"{folder}: could not be uploaded as {name!r} ({_reason(error)}). "
            "Is there a network, and a token that may write there (`hf auth login`)?"
        ) from None
    return str(commit.commit_url)


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}"


def place_of(model: str | Path, revision: str | None) -> tuple[Path, str | None]:
    """The folder and the checkpoint in it; None for the one that the run hands on."""
    path = Path(model)
    if path.suffix == ".ckpt":
        if (path.parent / EXPORT).is_file():
            raise UserError(f"{path}: an exported folder holds no checkpoint. Load {path.parent}")
        path, name = path.parent, path.name
    elif path.suffix == ".safetensors" and path.is_file():
        raise UserError(f"{path}: the weights alone say no model. Load the folder that they lie in")
    else:
        name = None
        # What begins like a folder that is there is a misspelt path, which the hub need not hear of.
        if not path.exists() and HUB_ID.fullmatch(str(model)) and not path.parent.is_dir():
            return pull(str(model), revision), None
    if not (path / EXPORT).is_file() and not (path / CONFIG).is_file():
        raise UserError(f"{path}: no run and no exported model here ({CONFIG} is missing)")
    if revision is not None:
        raise UserError(f"{path}: a folder here has no revisions; leave out revision={revision!r}")
    return path, name


def _code_of(config: RunConfig) -> str | None:
    """The first class from outside that the model or its task would call."""
    parts = [getattr(config.model, name) for name in type(config.model).model_fields]
    return next((part.target for part in [*parts, config.task] if isinstance(part, CustomConfig)), None)


def _built(config: ModelConfig, states: Mapping[str, Tensor], folder: Path) -> VisionLanguageModel:
    """The model with these weights, in no more memory than theirs."""
    is_ours = not any(isinstance(getattr(config, name), CustomConfig) for name in type(config).model_fields)
    if is_ours:
        with parameters_on_meta(states):
            model = _sound(config, folder)
        fill(model, states, "model", folder, assign=True)
        if is_filled(model):
            return model
    model = _sound(config, folder)  # outside code may compute with its first weights
    fill(model, states, "model", folder)
    return model


def _sound(config: ModelConfig, folder: Path) -> VisionLanguageModel:
    try:
        return config.build()
    except TooLargeError as error:
        raise UserError(
            f"{folder}: its config asks for a model that is far larger than its weights ({error}). "
            "Do not use this folder"
        ) from None
    except (ValueError, RuntimeError, TypeError, KeyError) as error:  # sizes that do not go together, a stranger's file
        raise UserError(f"{folder}: its config builds no model ({str(error).splitlines()[0]})") from None


def _as_exported(transform: ImageTransform, model: VisionLanguageModel, export: Export) -> ImageTransform:
    """The transform of the export's own file, and the model's mean and std, whatever libraries say by now."""
    told: TransformConfig = export.transform
    if told.image_pixels != transform.image_pixels:
        raise UserError(
            f"{export.folder}: transform.json says {told.image_pixels} pixels, and the model takes "
            f"{transform.image_pixels}. One of the two is another model's"
        )
    for buffer, values in ((model.pixel_mean, told.mean), (model.pixel_std, told.std)):
        cast(Tensor, buffer).copy_(255 * torch.tensor(values).view(1, 3, 1, 1))
    return ImageTransform(told.image_pixels, told.interpolation, "none", told.decode)


def _answer_head(
    config: RunConfig, model: VisionLanguageModel, answers: Sequence[str], states: Mapping[str, Tensor], folder: Path
) -> nn.Module:
    task: Any = task_of(config)
    if task is None:
        raise UserError(f"{folder}: has answers, but its config has no task")
    with parameters_on_meta():
        head = AnswerHead(task.images_per_text * 2 * model.width, len(answers))
    fill(head, states, "head", folder, assign=True)
    return head


def _objective_heads(
    config: RunConfig,
    model: VisionLanguageModel,
    tokenizer: Tokenizer,
    states: Mapping[str, Tensor],
    folder: Path,
) -> dict[str, nn.Module]:
    """The heads of a pretraining that are of use later, by the type of their objective."""
    heads: dict[str, nn.Module] = {}
    for name, objective in config.objectives.items():
        with parameters_on_meta():
            if isinstance(objective, MatchingConfig):
                head: nn.Module = nn.Linear(2 * model.width, 2)
            elif isinstance(objective, MaskedLanguageConfig) and objective.with_image:
                head = VocabularyHead(model.width, tokenizer.vocabulary_size)
            else:
                continue
        fill(head, states, f"objectives.{name}.head", folder, assign=True)
        heads.setdefault(objective.type, head)
    return heads
