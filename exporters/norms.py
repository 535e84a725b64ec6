"""RMSNorm as one graph node instead of six.

Which modules are RMSNorms is decided by what they compute, not by what they are called: a module with a one-dimensional
weight and an epsilon whose output equals ``x / sqrt(mean(x²) + ε) · w`` (or ``· (1 + w)``, Gemma's form) is traced as
ONNX Runtime's ``SimplifiedLayerNormalization``. Anything else is traced as it is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


@contextmanager
def fused_norms(model: torch.nn.Module) -> Iterator[int]:
    """While open, every RMSNorm of ``model`` emits one node; yields how many there are."""
    replaced: list[torch.nn.Module] = []
    try:
        for module in model.modules():
            if (parts := _parts_of(module)) is not None:
                module.forward = _node(module, *parts)
                replaced.append(module)
        yield len(replaced)
    finally:
        for module in replaced:
            del module.forward  # the instance's; the class's shows again


def _parts_of(module: torch.nn.Module) -> tuple[float, float] | None:
    """(epsilon, offset) if ``module`` computes an RMSNorm scaled by ``offset + weight``, else None."""
    weight = getattr(module, "weight", None)
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(weight, torch.Tensor) or weight.dim() != 1 or not isinstance(epsilon, float):
        return None
    if getattr(module, "bias", None) is not None:
        return None
    x = torch.randn(2, 3, weight.shape[0], generator=torch.Generator().manual_seed(0))
    try:
        with torch.no_grad():
            computed = module(x)
    except (TypeError, RuntimeError):  # takes something other than one tensor of this width
        return None
    if not isinstance(computed, torch.Tensor) or computed.shape != x.shape:
        return None
    normalised = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon)
    for offset in (0.0, 1.0):
        expected = normalised * (offset + weight)
        if torch.allclose(computed, expected, rtol=1e-5, atol=1e-6):
            return epsilon, offset
    return None


def _node(module: torch.nn.Module, epsilon: float, offset: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def forward(x: torch.Tensor) -> torch.Tensor:
        weight: torch.Tensor = module.weight  # type: ignore[assignment]
        scale = weight if offset == 0.0 else offset + weight
        # The operator belongs to ONNX Runtime but lives in the default domain.
        return torch.onnx.ops.symbolic(
            "SimplifiedLayerNormalization", (x, scale), {"axis": -1, "epsilon": epsilon}, dtype=x.dtype, shape=x.shape
        )

    return forward
