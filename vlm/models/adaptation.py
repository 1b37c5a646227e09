"""How much of a pretrained encoder learns: all, none, its last blocks, or low-rank adapters beside its weights.

One mechanism for every encoder. It asks for `blocks`, the repeated modules, the first one first; what an encoder
registers before them are its embeddings (or stem), what it registers after them is its end.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from vlm.config import Config, not_identity
from vlm.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

ADAPTER, SCALING = "default", "adapter_scaling"


class LoraConfig(Config):
    """Low-rank adapters: `W x + alpha / rank * B A x`, where A and B learn and W does not (arXiv 2106.09685).

    They stand beside the linear layers of the blocks: all of them, as arXiv 2305.14314 found necessary to match full
    fine-tuning, or those whose names end as one of `layers` does: `[qkv]` in timm, `[query, value]` in BERT. Not
    reached is a layer whose weight its block reads itself instead of calling it, as in torch's own multi-head
    attention; there the feed-forward layers have adapters alone.
    """

    rank: PositiveInt = 8
    alpha: PositiveFloat = 16.0
    dropout: float = Field(0.0, ge=0, lt=1)  # of what the adapters see
    layers: tuple[str, ...] = ()


class EncoderConfig(Config):
    """What every encoder can be asked for, whatever it is."""

    frozen: bool = False  # nothing learns, in evaluation mode
    frozen_blocks: NonNegativeInt = 0  # the embeddings and so many blocks learn nothing, in evaluation mode
    lora: LoraConfig | None = None  # the encoder's own weights learn nothing, adapters beside them do
    checkpointing: bool = not_identity(False)  # inner states are computed again on the way back: less memory, more time

    @model_validator(mode="after")
    def _one_way(self) -> EncoderConfig:
        if self.frozen and (self.frozen_blocks or self.lora):
            raise ValueError("frozen=true leaves nothing to learn. Give frozen, or frozen_blocks or lora")
        return self


class Depth(NamedTuple):
    """Where a parameter stands in its encoder: 0 the embeddings, then the blocks, `num_blocks + 1` what is behind."""

    encoder: str
    number: int
    num_blocks: int

    @property
    def below_top(self) -> int:
        """How many steps of the rate's decay it is away from what follows the encoder.

        The last block is one step away, and the norm behind it goes with it, as timm has it.
        """
        return self.num_blocks + 1 - min(self.number, self.num_blocks)

    def __str__(self) -> str:
        number = min(self.number, self.num_blocks)
        return f"{self.encoder}/{number:02d}_{'block' if number else 'embeddings'}"


def adapt(encoder: nn.Module, config: EncoderConfig, name: str) -> list[nn.Module]:
    """Let of the encoder learn what its config asks for; the model itself does so where it is frozen as a whole.

    Returns the modules that are to stay in evaluation mode.
    Parameters that learn nothing record nothing for the way back, as long as nothing below them learns either: the
    frozen part of a partly frozen encoder costs its forward pass alone.
    """
    count = config.frozen_blocks
    if config.frozen or not (count or config.lora or config.checkpointing):
        return []
    blocks = blocks_of(encoder, name)
    if count > len(blocks):
        raise UserError(f"model.{name}.frozen_blocks: the encoder has {len(blocks)} blocks. Got {count}")
    resting = _freeze_first(encoder, blocks, count, name) if count else []
    if config.checkpointing:
        for block in blocks[count:]:
            block.forward = functools.partial(_recomputed, block.forward)  # a copied block takes its copy along
    if config.lora is not None:
        add_adapters(encoder, blocks[count:], config.lora, name)
    return resting


def blocks_of(encoder: nn.Module, name: str) -> list[nn.Module]:
    """The repeated modules of an encoder, the first one first."""
    blocks: Any = getattr(encoder, "blocks", None)
    if not blocks:
        raise UserError(f"model.{name}: {type(encoder).__name__} has no `blocks`, which this way of training asks for")
    return list(blocks)


def depths_of(encoder: nn.Module, name: str) -> dict[str, Depth]:
    """The depth of every parameter of an encoder, by the parameter's name."""
    blocks = blocks_of(encoder, name)
    inside = {id(p): number for number, block in enumerate(blocks, 1) for p in block.parameters()}
    found, outside = dict[str, Depth](), 0
    for own, parameter in encoder.named_parameters():
        if id(parameter) in inside:
            number, outside = inside[id(parameter)], len(blocks) + 1
        else:  # relative positions may be registered behind the blocks that read them
            number = 0 if "embed" in own else outside
        found[own] = Depth(name, number, len(blocks))
    return found


def _freeze_first(encoder: nn.Module, blocks: list[nn.Module], count: int, name: str) -> list[nn.Module]:
    depths = depths_of(encoder, name)
    for own, parameter in encoder.named_parameters():
        if depths[own].number <= count:
            parameter.requires_grad_(False)
    above = {id(module) for module in encoder.modules() if any(inner is blocks[0] for inner in module.modules())}
    before = []
    for module in encoder.modules():
        if module is blocks[0]:
            break
        if id(module) not in above:
            before.append(module)
    return [*before, *blocks[:count]]


def _recomputed(forward: Callable[..., Any], *inputs: Any, **named: Any) -> Any:
    """A block's forward pass that keeps its inputs alone, and draws the same dropout when it is run again."""
    from torch import is_grad_enabled
    from torch.utils.checkpoint import checkpoint

    return (
        checkpoint(forward, *inputs, use_reentrant=False, **named) if is_grad_enabled() else forward(*inputs, **named)
    )


# --- Low-rank adapters ------------------------------------------------------------------------------------------------


def add_adapters(encoder: nn.Module, blocks: list[nn.Module], config: LoraConfig, name: str) -> None:
    """Put adapters beside the linear layers of `blocks`; nothing else of the encoder learns.

    The encoder also gets the buffer `adapter_scaling`, so that a checkpoint tells what its adapters are worth.
    """
    import torch

    try:
        import peft
    except ImportError:
        raise UserError(
            f"model.{name}.lora needs the extra `lora`: pip install 'vlm-less-supervision[lora]' (or peft)"
        ) from None
    linear = _linear_layers(encoder, blocks)
    chosen = [one for one in linear if not config.layers or one.endswith(config.layers)]
    if not chosen:
        there = sorted({one.rpartition(".")[2] for one in linear})
        raise UserError(
            f"model.{name}.lora.layers: no linear layer of the blocks fits {list(config.layers)}. "
            f"Their names end in: {', '.join(there) or 'nothing, there is none'}"
        )
    options: Any = {"r": config.rank, "lora_alpha": config.alpha, "lora_dropout": config.dropout}
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=chosen, **options), encoder, ADAPTER)
    for own, parameter in encoder.named_parameters():
        parameter.requires_grad_(".lora_" in own)
    encoder.register_buffer(SCALING, torch.tensor(config.alpha / config.rank))


def _linear_layers(encoder: nn.Module, blocks: list[nn.Module]) -> list[str]:
    """Names of the linear layers in these blocks that are called."""
    from torch import nn

    inside = {id(module) for block in blocks for module in block.modules()}
    names = []
    for own, module in encoder.named_modules():
        parent = encoder.get_submodule(own.rpartition(".")[0])
        if isinstance(module, nn.Linear) and id(module) in inside and not isinstance(parent, nn.MultiheadAttention):
            names.append(own)
    return names


def merge_adapters(module: nn.Module) -> nn.Module:
    """Add every adapter inside `module` to the weight that it stands beside, in place.

    Outputs stay the same; names, shapes and speed are then those of the encoder without adapters.
    """
    for own, layer in list(module.named_modules()):
        if hasattr(layer, "lora_A"):
            adapted: Any = layer
            adapted.merge()
            parent, _, leaf = own.rpartition(".")
            setattr(module.get_submodule(parent), leaf, adapted.get_base_layer())
    for inner in module.modules():
        if SCALING in inner._buffers:
            del inner._buffers[SCALING]
    return module


def fit_adapters(states: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`states` of a module under the names that `own`, the state of another one of the same shape, has.

    An encoder whose adapters are the same in both goes on with them. Otherwise what was adapted is merged into the
    weights, and adapters that only `own` has begin anew from it.
    """
    fitted = dict(states)
    ends = [name for name in (*states, *own) if name == SCALING or name.endswith(f".{SCALING}")]
    for prefix in dict.fromkeys(name.removesuffix(SCALING) for name in ends):
        theirs, ours = (_adapters(some, prefix) for some in (states, own))
        if theirs.keys() == ours.keys() and all(theirs[name].shape == ours[name].shape for name in theirs):
            scaling = f"{prefix}{SCALING}"
            if float(states[scaling]) == float(own[scaling]):
                continue
        inside = {name: fitted.pop(name) for name in list(fitted) if name.startswith(prefix)}
        layers = {name.partition(".lora_")[0] for name in ours if ".lora_" in name}
        for name, value in _merged(inside, prefix).items():
            layer, _, leaf = name.rpartition(".")
            fitted[f"{layer}.base_layer.{leaf}" if layer in layers else name] = value
        fitted |= ours
    return fitted


def _adapters(states: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    inside = {name: value for name, value in states.items() if name.startswith(prefix)}
    return {name: value for name, value in inside.items() if ".lora_" in name or name == f"{prefix}{SCALING}"}


def _merged(states: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The state of the encoder without adapters, which gives the same outputs."""
    scaling = states.get(f"{prefix}{SCALING}")
    merged = {}
    for name, value in states.items():
        if ".lora_" in name or name == f"{prefix}{SCALING}":
            continue
        layer, found, leaf = name.partition(".base_layer.")
        if scaling is not None and found and leaf == "weight":
            down, up = (states[f"{layer}.lora_{side}.{ADAPTER}.weight"] for side in "AB")
            value = value + scaling * (up @ down)
        merged[name.replace(".base_layer.", ".")] = value
    return merged
