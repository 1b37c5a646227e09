"""Language encoders of the transformers library: token ids to final hidden states."""

from __future__ import annotations

import importlib.util
import inspect
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers.utils import logging as library_logging

from vlm.errors import UserError

PACKAGE = "package:"  # weights="package:IMPORT_NAME" takes the model folder that an installed package ships

# Published sizes, so that random weights need no network. Sources: the models' own config.json on the hub;
# BERT's numbers are the defaults of BertConfig.
ROBERTA_BASE: dict[str, Any] = {
    "vocab_size": 50265,
    "max_position_embeddings": 514,
    "type_vocab_size": 1,
    "layer_norm_eps": 1e-5,
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 2,
}
PUBLISHED_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "roberta-base": ("roberta", ROBERTA_BASE),
    "FacebookAI/roberta-base": ("roberta", ROBERTA_BASE),
    "bert-base-uncased": ("bert", {}),
    "google-bert/bert-base-uncased": ("bert", {}),
}


READ_PADDING = ("fnet", "convbert")
"""Architectures without a mask for what they mix: Fourier transforms and convolutions over the padded text."""


FULL_PRECISION = ("deberta",)
"""Architectures that autocast breaks: DeBERTa's first version masks 16-bit scores with the lowest 32-bit number."""


class TransformersLanguage(nn.Module):
    """Last hidden states of a transformers encoder, without its pooler.

    `weights` is where the model lies: None for the hub (`name`), a folder in the library's format, or
    `package:IMPORT_NAME`. `pretrained=False` builds random weights of the same architecture.
    """

    def __init__(self, name: str, pretrained: bool, weights: Path | str | None = None) -> None:
        super().__init__()
        self.model: Any
        if pretrained:
            self.model = _load(name, weights)
        else:
            config = _config(name, weights)
            self.model = transformers.AutoModel.from_config(config, **_options(config))
        if isinstance(pooler := getattr(self.model, "pooler", None), nn.Module):  # no option leaves SqueezeBERT's out
            pooler.requires_grad_(False)
        self.model.train()  # as every module is when built; the library hands over loaded models in eval mode
        self.width = int(self.model.config.hidden_size)
        self.vocabulary_size = int(self.model.config.vocab_size)

    @property
    def blocks(self) -> list[nn.Module]:
        """The repeated blocks, the first one first. Every encoder of the library has them as its longest list."""
        lists = [list(module) for module in self.model.modules() if isinstance(module, nn.ModuleList)]
        if not lists:
            raise UserError(f"{type(self.model).__name__} has no list of blocks")
        return max(lists, key=len)

    def forward(self, text_ids: Int[Tensor, "n l"], text_mask: Bool[Tensor, "n l"]) -> Float[Tensor, "n l d"]:
        return self._output(text_ids, text_mask).last_hidden_state  # type: ignore[no-any-return]  # the library gives Any

    def layers(
        self, text_ids: Int[Tensor, "n l"], text_mask: Bool[Tensor, "n l"], count: int
    ) -> tuple[Float[Tensor, "n l d"], ...]:
        """States after each of the last `count` blocks, as the library has them; the last is what `forward` gives."""
        if count == 1:
            return (self.forward(text_ids, text_mask),)
        output = self._output(text_ids, text_mask, output_hidden_states=True)
        states = (*output.hidden_states[1:][-count:-1], output.last_hidden_state)  # the first are the embeddings
        if len(states) < count or len({state.shape for state in states}) > 1:
            raise UserError(f"{type(self.model).__name__} has not the states of {count} layers of one size to give")
        return states

    def _output(self, text_ids: Int[Tensor, "n l"], text_mask: Bool[Tensor, "n l"], **options: bool) -> Any:
        mask = text_mask.to(text_ids.dtype)
        if self.model.config.model_type in FULL_PRECISION:
            with torch.autocast(text_ids.device.type, enabled=False):
                return self.model(input_ids=text_ids, attention_mask=mask, **options)
        return self.model(input_ids=text_ids, attention_mask=mask, **options)


def vocabulary_of(name: str, weights: Path | str | None = None) -> tuple[int, int]:
    """How many tokens the model knows, and which one it takes for padding."""
    config = _config(name, weights)
    return int(config.vocab_size), int(config.pad_token_id or 0)


def load_tokenizer(name: str, weights: Path | str | None = None) -> tokenizers.Tokenizer:
    """The model's fast tokenizer, its truncation and padding switched off: who encodes decides them."""
    place = _place(name, weights)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(place, use_fast=True, **_locality(place))
    except Exception as error:  # the hub client and its transport each raise their own
        raise _unreachable("tokenizer", name, place, error) from None
    if not tokenizer.is_fast:
        raise UserError(f"{name!r} has no fast tokenizer; take a model whose repository holds tokenizer.json")
    backend: tokenizers.Tokenizer = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    return backend


def _load(name: str, weights: Path | str | None) -> Any:
    place = _place(name, weights)
    config = _config_at(name, place)
    verbosity = library_logging.get_verbosity()
    library_logging.set_verbosity_error()  # else a report on every head and pooler that is left out
    try:
        model, report = transformers.AutoModel.from_pretrained(
            place, config=config, output_loading_info=True, **_options(config), **_locality(place)
        )
    except Exception as error:
        raise _unreachable("weights", name, place, error) from None
    finally:
        library_logging.set_verbosity(verbosity)
    if report["missing_keys"]:  # the library would go on with random numbers
        lacking = sorted(report["missing_keys"])
        raise UserError(
            f"{place}: {len(lacking)} tensors of {type(model).__name__} are missing, {lacking[0]} the first"
        )
    return model


def _config(name: str, weights: Path | str | None) -> transformers.PretrainedConfig:
    """The architecture, from the folder or package if one is given, from our table, else from the hub."""
    if weights is None and name in PUBLISHED_CONFIGS:
        family, numbers = PUBLISHED_CONFIGS[name]
        return transformers.AutoConfig.for_model(family, **numbers)
    return _config_at(name, _place(name, weights))


def _config_at(name: str, place: str | Path) -> transformers.PretrainedConfig:
    try:
        config: transformers.PretrainedConfig = transformers.AutoConfig.from_pretrained(place, **_locality(place))
    except Exception as error:
        raise _unreachable("configuration", name, place, error) from None
    return config


def _options(config: transformers.PretrainedConfig) -> dict[str, Any]:
    """The library's choice of attention, and no pooler where there is one: its weights would never be trained.

    Where the architecture knows scaled-dot-product attention, that is it. DeBERTa and MPNet, whose scores depend on
    distances, have none but their own.
    """
    architecture: Any = transformers.AutoModel._model_mapping[type(config)]
    _refuse_what_is_no_encoder(config, architecture)
    attention = "sdpa" if architecture._supports_sdpa else "eager"
    has_pooler = "add_pooling_layer" in inspect.signature(architecture).parameters
    return {"attn_implementation": attention} | ({"add_pooling_layer": False} if has_pooler else {})


def _refuse_what_is_no_encoder(config: transformers.PretrainedConfig, architecture: Any) -> None:
    """Each text becomes one state a token, the first of which may know all of it, whatever it is padded with."""
    kind = config.model_type
    if (
        config.is_encoder_decoder
        or isinstance(architecture, tuple)
        or type(config) not in transformers.MODEL_FOR_MASKED_LM_MAPPING
    ):
        raise UserError(f"{kind} is no encoder that was trained by masked language modelling; take one that was")
    if kind in READ_PADDING:
        raise UserError(
            f"{kind} mixes padding into every state, so that a text would depend on its batch; take another"
        )


def _place(name: str, weights: Path | str | None) -> str | Path:
    """What the library loads from: a hub name or a local folder."""
    if weights is None:
        return name
    if str(weights).startswith(PACKAGE):
        return _package_folder(str(weights).removeprefix(PACKAGE))
    folder = Path(weights)
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: no config.json here; `save_pretrained` of the transformers library writes one")
    return folder


def _locality(place: str | Path) -> dict[str, bool]:
    """A folder is never looked for on the hub, and code that comes with a model is never run: no question is asked."""
    return {"trust_remote_code": False} | ({"local_files_only": True} if isinstance(place, Path) else {})


def _package_folder(package: str) -> Path:
    """The folder with the package's model. The package is found, not imported: its code does not run."""
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"package {package!r} is not installed: pip install {package.replace('_', '-')}")
    root = Path(spec.submodule_search_locations[0])
    folders = sorted(file.parent for file in root.rglob("model.safetensors") if (file.parent / "config.json").is_file())
    if len(folders) != 1:
        raise UserError(f"package {package!r} must ship one folder with config.json and model.safetensors")
    return folders[0]


def _unreachable(what: str, name: str, place: str | Path, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:300]
    if isinstance(place, Path):
        return UserError(f"{place}: the {what} cannot be read ({type(error).__name__}: {reason})")
    message = f"the {what} of {name!r} could not be fetched ({type(error).__name__}: {reason}). "
    remedy = "Without network: download the model's folder elsewhere and set model.language.weights=FOLDER"
    random = "" if what == "tokenizer" else ", or set model.language.pretrained=false for random weights"
    return UserError(message + remedy + random)
