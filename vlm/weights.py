"""Weights from files into modules. Nothing that lies in a file is run, and nothing is held twice."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vlm.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, mapped into memory: what is never used is never read."""
    from safetensors import safe_open

    if not file.is_file():
        raise UserError(f"{file}: no such file of weights")
    try:
        with safe_open(file, framework="pt", device="cpu") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  # it is no dict
    except Exception as error:  # the library raises its own, the system's and Python's
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{file}: not a whole safetensors file, and nothing in it was run ({reason}). Copy or export it again"
        ) from None


_FOR_USE = ContextVar("for_use", default=False)


def builds_for_use() -> bool:
    """Whether the model at hand is built by `parameters_on_meta`, to be filled and used, and not to be trained."""
    return _FOR_USE.get()


class TooLargeError(UserError):
    """More was about to be built than there are weights for."""


@contextmanager
def parameters_on_meta(states: Mapping[str, Tensor] | None = None) -> Iterator[None]:
    """Modules built by this thread get parameters without memory, and nothing is drawn for them. Buffers are real.

    A model is then built in a fifth of a second whatever its size, and `fill(..., assign=True)` gives it its weights.
    `states`: what it will be filled with. Building stops once there are far more parameters, or far larger ones: a
    config of a few bytes may ask for a model of any size, its weights must come with it. "Far", because an encoder may
    be built with parts that it does not keep.
    """
    register, thread = nn.Module.register_parameter, threading.get_ident()
    told = states or {}
    most, most_numbers = 4 * len(told) + 5_000, 4 * sum(tensor.numel() for tensor in told.values()) + 2**28
    count = numbers = 0

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal count, numbers
        if parameter is not None and threading.get_ident() == thread:
            count, numbers = count + 1, numbers + parameter.numel()
            if states is not None and (count > most or numbers > most_numbers):
                raise TooLargeError(
                    f"over {min(count, most):,} parameters of {min(numbers, most_numbers):,} numbers, for which the "
                    f"weights have {len(told):,} tensors of {sum(tensor.numel() for tensor in told.values()):,}"
                )
            if not parameter.is_meta:
                parameter = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign,assignment]
    token = _FOR_USE.set(True)
    try:
        with _Unfilled():
            yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
        _FOR_USE.reset(token)


class _Unfilled(TorchFunctionMode):
    """Leaves out what would fill a tensor without memory: torch's rules for that take seconds to import."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        fills = name.endswith("_") and not name.endswith("__") and name != "requires_grad_"
        if fills and args and isinstance(args[0], Tensor) and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))


def is_filled(module: nn.Module) -> bool:
    """Whether every tensor of the module has memory."""
    return not any(tensor.is_meta for tensor in chain(module.parameters(), module.buffers()))


def under(states: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries below a prefix, without it."""
    start = f"{prefix}." if prefix else ""
    return {name.removeprefix(start): tensor for name, tensor in states.items() if name.startswith(start)}


def fill(module: nn.Module, states: Mapping[str, Tensor], prefix: str, source: Path, assign: bool = False) -> None:
    """Fill `module` with the entries of `states` under `prefix`, which came from `source`. All names and shapes agree.

    `assign`: the module takes the tensors themselves, in place of a copy; only those of another precision are copied.
    """
    own, wanted = _at_this_size(module, under(states, prefix)), module.state_dict()
    lacking = [name for name in wanted if name not in own]
    foreign = [name for name in own if name not in wanted]
    problem = ""
    if lacking:
        problem = f"it lacks {prefix}.{lacking[0]}" + _and_others(lacking)
    elif foreign:
        problem = f"it has {prefix}.{foreign[0]}" + _and_others(foreign) + ", which has no place here"
    else:
        problem = next(filter(None, (_misfit(prefix, name, own[name], wanted[name]) for name in wanted)), "")
    if problem:
        raise UserError(
            f"{source}: its {prefix} does not fit this config's ({problem}). Give the config the same {prefix} "
            "as there, or take what fits: `vlm train ... start_without=[]`, or `vlm.hub.load_partially` in Python"
        )
    if assign:
        own = {name: tensor.to(wanted[name].dtype) for name, tensor in own.items()}
    module.load_state_dict(own, assign=assign)


def _at_this_size(module: nn.Module, states: Mapping[str, Tensor], skip: Collection[str] = ()) -> dict[str, Tensor]:
    """The states with what another image size changes brought to the module's own, by the encoders that know how."""
    fitted = dict(states)
    for name, inner in module.named_modules():
        if not hasattr(inner, "fit_states") or _is_below(name, skip):
            continue
        start = f"{name}." if name else ""
        try:
            fitted |= {start + own: tensor for own, tensor in inner.fit_states(under(states, name)).items()}
        except (RuntimeError, ValueError, LookupError, AssertionError):
            continue  # of another shape altogether, which is told with its name
    return fitted


def _misfit(prefix: str, name: str, found: Tensor, wanted: Tensor) -> str | None:
    full = f"{prefix}.{name}" if prefix else name
    if found.shape != wanted.shape:
        return f"{full} has shape {tuple(found.shape)} there and {tuple(wanted.shape)} here"
    if found.is_floating_point() != wanted.is_floating_point():
        return f"{full} holds {found.dtype} there and {wanted.dtype} here"
    return None


def _and_others(names: Collection[str]) -> str:
    return f" and {len(names) - 1} others" if len(names) > 1 else ""


@dataclass(frozen=True)
class PartialLoad:
    """What a partial load did, by the names of tensors and their sizes."""

    taken: Mapping[str, int]  # from the file
    new: Mapping[str, int]  # of the module alone: they stay as they were
    left: Mapping[str, int]  # of the file alone

    def table(self, title: str = "loaded in part") -> Table:
        """Numbers by component, and in how many tensors."""
        from rich.table import Table
        from rich.text import Text

        table = Table(title=Text(title), title_justify="left")
        parts = {"taken": self.taken, "new": self.new, "left": self.left}
        table.add_column("component", no_wrap=True)
        for name in parts:
            table.add_column(f"{name} (tensors)", justify="right", no_wrap=True)
        components = dict.fromkeys(_component(name) for part in parts.values() for name in part)
        for component in components:
            cells = [[size for name, size in part.items() if _component(name) == component] for part in parts.values()]
            table.add_row(component, *(f"{sum(cell):,} ({len(cell)})" if cell else "" for cell in cells))
        return table


def take_what_fits(
    module: nn.Module,
    states: Mapping[str, Tensor],
    source: Path | str,
    skip: Collection[str] = (),
    option: str = "skip",
) -> PartialLoad:
    """Fill the tensors of `module` that `states` has by the same name, except below the names in `skip`.

    A tensor of another shape is an error: it is never skipped in silence. `option` is where the caller set `skip`.
    """
    wanted, states = module.state_dict(), _at_this_size(module, states, skip)
    shared = {name: tensor for name, tensor in states.items() if name in wanted and not _is_below(name, skip)}
    unknown = [name for name in skip if not any(_is_below(tensor, [name]) for tensor in (*wanted, *states))]
    if unknown:
        raise UserError(
            f"{option}={unknown[0]!r}: neither the model nor {source} has a tensor of that name or below it"
        )
    for name, tensor in shared.items():
        problem = _misfit("", name, tensor, wanted[name])
        if problem is not None:
            raise UserError(
                f"{source}: {problem}. Build the model with the same sizes as there, or leave it as it is here with "
                f"{option}=[{_component(name)!r}]"
            )
    if not shared:
        raise UserError(f"{source}: no tensor of it has the name of one here. It is another model")
    module.load_state_dict(shared, strict=False)
    return PartialLoad(
        taken={name: tensor.numel() for name, tensor in shared.items()},
        new={name: tensor.numel() for name, tensor in wanted.items() if name not in shared},
        left={name: tensor.numel() for name, tensor in states.items() if name not in shared},
    )


def _is_below(name: str, prefixes: Collection[str]) -> bool:
    return any(f"{name}.".startswith(f"{prefix}.") for prefix in prefixes)


def _component(name: str) -> str:
    """What a tensor belongs to: `fusion`, or `objectives.matching`."""
    first, _, rest = name.partition(".")
    return f"{first}.{rest.partition('.')[0]}" if first == "objectives" else first


def untied(states: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same values without two names for one memory, which safetensors refuses; only such tensors are copied."""
    seen: set[int] = set()
    own = {}
    for name, tensor in states.items():
        own[name] = tensor.clone().contiguous() if tensor.data_ptr() in seen else tensor.contiguous()
        seen.add(tensor.data_ptr())
    return own
