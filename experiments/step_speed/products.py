"""The matrix products of a step, recorded as it runs and then timed alone: the limit for a step of this arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

FACTORS = {"mm": slice(0, 2), "addmm": slice(1, 3), "bmm": slice(0, 2), "baddbmm": slice(1, 3)}
"""Which arguments of these operators are multiplied; what is added to the product is left out."""


@dataclass(frozen=True, slots=True)
class Operand:
    """A tensor without its values."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


class MatrixProducts(TorchDispatchMode):
    """While active, notes every matrix product and convolution that runs, those of backward passes included.

    `replay()` gives a function that does them all again, in their order and with their layouts, on random numbers and
    into memory that is there already. Fused attention is noted as the matrix products that define it (two forward,
    four backward), without its softmax.
    """

    def __init__(self) -> None:
        super().__init__()
        self.products: list[tuple[Operand, Operand]] = []  # in the order in which they ran
        self.convolutions: list[tuple[Any, tuple[Any, ...]]] = []  # an operator and its arguments

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if name in FACTORS:
            self.products.append(tuple(_operand(factor) for factor in args[FACTORS[name]]))  # type: ignore[arg-type]
        elif name.startswith("_scaled_dot_product"):
            self._attention(args, backward="backward" in name)
        elif "convolution" in name:
            self.convolutions.append((func, tuple(_operand(a) if isinstance(a, Tensor) else a for a in args)))
        return func(*args, **(kwargs or {}))

    def _attention(self, args: Sequence[Any], backward: bool) -> None:
        query, key = args[1:3] if backward else args[:2]
        rows, q, c, e = query.shape[0] * query.shape[1], query.shape[2], key.shape[2], query.shape[3]
        scores = (rows, q, e), (rows, e, c)  # also the gradient of the probabilities
        into_queries = (rows, q, c), (rows, c, e)  # attended values forward, the queries' gradient backward
        into_keys = (rows, c, q), (rows, q, e)  # the gradients of keys and of values
        for left, right in (scores, into_queries, into_keys, into_keys) if backward else (scores, into_queries):
            self.products.append((_contiguous(left, query.dtype), _contiguous(right, query.dtype)))

    def replay(self, device: torch.device) -> Callable[[], None]:
        memory: dict[Any, Tensor] = {}

        def tensor(operand: Operand, role: str) -> Tensor:
            if (operand, role) not in memory:
                size = 1 + sum((n - 1) * step for n, step in zip(operand.shape, operand.stride, strict=True))
                values = torch.randn(size, device=device).to(operand.dtype)
                memory[operand, role] = values.as_strided(operand.shape, operand.stride)
            return memory[operand, role]

        products = []
        for left, right in self.products:
            product = _contiguous((*left.shape[:-1], right.shape[-1]), left.dtype)
            products.append((tensor(left, "left"), tensor(right, "right"), tensor(product, "product")))
        convolutions = [
            (func, [tensor(a, f"argument {at}") if isinstance(a, Operand) else a for at, a in enumerate(args)])
            for func, args in self.convolutions
        ]

        def run() -> None:
            with torch.no_grad():
                for left, right, product in products:
                    (torch.mm if left.ndim == 2 else torch.bmm)(left, right, out=product)
                for func, arguments in convolutions:
                    func(*arguments)

        return run


def _operand(tensor: Tensor) -> Operand:
    return Operand(tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype)


def _contiguous(shape: tuple[int, ...], dtype: torch.dtype) -> Operand:
    strides = [1]
    for count in shape[:0:-1]:
        strides.insert(0, strides[0] * count)
    return Operand(shape, tuple(strides), dtype)
