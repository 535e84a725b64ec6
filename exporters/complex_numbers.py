"""Rotary written with complex numbers, which ONNX does not have, traced as pairs of real ones.

While open, PyTorch's functions that lead into complex numbers and out of them make and take ``ComplexPair``, which
knows what rotary embeddings do in between: index, broadcast, scale and multiply.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class ComplexPair:
    def __init__(self, real: torch.Tensor, imaginary: torch.Tensor) -> None:
        self.real = real
        self.imag = imaginary
        self.device = real.device

    def __mul__(self, other: ComplexPair | torch.Tensor | float) -> ComplexPair:
        if isinstance(other, ComplexPair):
            return ComplexPair(
                self.real * other.real - self.imag * other.imag, self.real * other.imag + self.imag * other.real
            )
        return ComplexPair(self.real * other, self.imag * other)

    __rmul__ = __mul__

    def __getitem__(self, index: Any) -> ComplexPair:
        return ComplexPair(self.real[index], self.imag[index])

    def unsqueeze(self, dim: int) -> ComplexPair:
        return ComplexPair(self.real.unsqueeze(dim), self.imag.unsqueeze(dim))

    def to(self, *args: Any, **kwargs: Any) -> ComplexPair:
        return self


def _polar(size: torch.Tensor, angle: torch.Tensor) -> ComplexPair:
    return ComplexPair(size * angle.cos(), size * angle.sin())


def _view_as_complex(pairs: torch.Tensor) -> ComplexPair:
    return ComplexPair(pairs[..., 0], pairs[..., 1])


def _view_as_real(numbers: ComplexPair) -> torch.Tensor:
    return torch.stack((numbers.real, numbers.imag), dim=-1)


REAL = {"polar": _polar, "view_as_complex": _view_as_complex, "view_as_real": _view_as_real}


@contextmanager
def real_pairs() -> Iterator[None]:
    before = {name: getattr(torch, name) for name in REAL}
    try:
        for name, function in REAL.items():
            setattr(torch, name, function)
        yield
    finally:
        for name, function in before.items():
            setattr(torch, name, function)
