"""RMSNorm (Zhang and Sennrich, arXiv 1910.07467) whose backward needs its input and a number per row.

Knows no model's classes: `like` finds out by trial whether a module is such a norm. transformers' own norms
save a normalised copy too, and in half precision copies in float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from torch import Tensor

_EPSILONS = ("variance_epsilon", "eps", "epsilon")


class RmsNorm(nn.Module):
    """x / rms(x) * weight, or * (1 + weight) where `centred`; `weight` [H] is frozen.

    Statistics are in float32. The product with the weight is in the type of `x`; where centred, in float32,
    rounded afterwards: as Llama and Gemma do it.
    """

    def __init__(self, weight: nn.Parameter, eps: float, *, centred: bool):
        super().__init__()
        self.weight = weight
        self.eps = eps
        self.centred = centred

    def forward(self, x: Tensor) -> Tensor:
        """Returns [..., H] for `x` [..., H]."""
        y: Tensor = _RmsNorm.apply(x, self.weight, self.eps, self.centred)  # type: ignore[no-untyped-call]
        return y


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, centred: bool) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        inverse = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, inverse, weight)
        ctx.centred = centred
        y: Tensor = x * inverse  # float32
        if centred:
            return y.mul_(1 + weight.to(wide)).to(x.dtype)
        y = y.to(x.dtype)
        return y.mul_(weight) if weight.dtype == x.dtype else y * weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        x, inverse, weight = ctx.saved_tensors
        to_x = gradient * (1 + weight.to(inverse.dtype)) if ctx.centred else (gradient * weight).to(inverse.dtype)
        # With n = x / rms: d loss / d x = (to_n - n * mean(to_n * n)) / rms.
        mean = (to_x * x).mean(-1, keepdim=True).mul_(inverse.square())
        return to_x.sub_(x * mean).mul_(inverse).to(x.dtype), None, None, None


@torch.no_grad()
def like(module: nn.Module) -> RmsNorm | None:
    """Returns an RmsNorm over the weight of `module` that computes what it computes; None where there is none."""
    names = [name for name, _ in module.named_parameters()]
    weight = getattr(module, "weight", None)
    eps = next((getattr(module, name) for name in _EPSILONS if isinstance(getattr(module, name, None), float)), None)
    if names != ["weight"] or not isinstance(weight, nn.Parameter) or weight.dim() != 1 or eps is None:
        return None
    # Rows as small as sqrt(eps), and none of mean zero: another eps, or a subtracted mean, would show.
    rows = torch.randn(4, len(weight), generator=torch.Generator().manual_seed(0)) + 0.5
    rows = (rows * torch.tensor([[eps**0.5], [0.1], [1.0], [30.0]])).to(weight)
    try:
        wanted = module(rows)
    except (RuntimeError, TypeError, ValueError):
        return None
    tolerance = 4 * torch.finfo(rows.dtype).eps
    for centred in (False, True):
        found = RmsNorm(weight, eps, centred=centred)
        if _equal(found(rows), wanted, tolerance):
            return found.train(module.training)
    return None


def _equal(found: Tensor, wanted: Any, tolerance: float) -> bool:
    if not isinstance(wanted, torch.Tensor) or (found.shape, found.dtype) != (wanted.shape, wanted.dtype):
        return False
    return torch.allclose(found, wanted, rtol=tolerance, atol=tolerance)
