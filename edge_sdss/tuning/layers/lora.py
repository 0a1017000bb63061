"""LoRA (Hu et al., arXiv 2106.09685) over a frozen weight, with no more saved for the backward than its input.

Knows nothing of models or files. x @ A.T is computed again in the backward, and so is the dropout's mask.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from edge_sdss.tuning.layers import Lora
from edge_sdss.tuning.layers.frozen import FrozenWeight, frozen_matmul

if TYPE_CHECKING:
    from torch import Tensor


class LoraLinear(nn.Module):
    """A linear layer whose weight [out, in] is frozen and whose update is learnt, in `dtype`.

    B starts as zeros and A as in PEFT: equal states of torch's generator give its initial weights. The update
    is computed in the type of the activations. `idle`: see FrozenLinear.
    """

    idle = False

    def __init__(self, weight: FrozenWeight, bias: Tensor | None, lora: Lora, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.weight = weight
        self.bias = bias
        self._lora = lora
        outputs, inputs = weight.shape
        down, up = nn.Linear(inputs, lora.rank, bias=False), nn.Linear(lora.rank, outputs, bias=False)
        nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5))
        nn.init.zeros_(up.weight)
        device = next(tensor.device for tensor in (*weight.parameters(), *weight.buffers()))
        self.a = nn.Parameter(down.weight.detach().to(device, dtype))
        self.b = nn.Parameter(up.weight.detach().to(device, dtype))
        self.magnitude = nn.Parameter(self._norms(torch.float32).to(dtype)) if lora.dora else None

    def forward(self, x: Tensor) -> Tensor:
        """Returns [..., out] for `x` [..., in], in the type of `x`."""
        dropout = self._lora.dropout if self.training else 0.0
        # From the generator of the CPU, which checkpoints bring back: the mask is the same when recomputed.
        seed = int(torch.randint(2**62, ())) if dropout else 0
        if self.magnitude is not None:
            return self._dora(x, dropout, seed)
        update = (self._lora.scaling, dropout, seed)
        arguments = (x, self.a, self.b, self.weight, self.bias, update, self.idle)
        y: Tensor = _LoraMatmul.apply(*arguments)  # type: ignore[no-untyped-call]
        return y

    def _dora(self, x: Tensor, dropout: float, seed: int) -> Tensor:
        base = frozen_matmul(x, self.weight, None)
        dropped = _drop(x, dropout, seed)
        update = linear(linear(dropped, self.a.to(x.dtype)), self.b.to(x.dtype)) * self._lora.scaling
        assert self.magnitude is not None
        scale = (self.magnitude / self._norms(x.dtype)).to(x.dtype)
        if not dropout:
            y = scale * (base + update)
        else:  # DoRA's difference from the base layer is what the dropout is for, the base weight's part of it too
            y = base + (scale - 1) * frozen_matmul(dropped, self.weight, None) + scale * update
        return y if self.bias is None else y + self.bias

    @torch.no_grad()
    def _norms(self, dtype: torch.dtype) -> Tensor:
        """Of the rows of weight + update, [out]; the paper (section 4.3) holds them constant in the backward."""
        weight, a, b = self.weight.dense(dtype), self.a.to(dtype), self.b.to(dtype)
        parts = zip(weight.split(256), b.split(256), strict=True)
        norms = [
            torch.linalg.vector_norm(torch.addmm(w, rows, a, alpha=self._lora.scaling), dim=1) for w, rows in parts
        ]
        return torch.cat(norms)


class _LoraMatmul(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        a: Tensor,
        b: Tensor,
        weight: FrozenWeight,
        bias: Tensor | None,
        update: tuple[float, float, int],
        idle: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, a, b)
        ctx.weight, ctx.update = weight, update
        if idle:
            return x.new_empty(*x.shape[:-1], len(b))
        scaling, dropout, seed = update
        y = weight.matmul(x, bias)
        low = _flat(_drop(x, dropout, seed)) @ a.to(x.dtype).T
        y.view(-1, len(b)).addmm_(low, b.to(x.dtype).T, alpha=scaling)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b = ctx.saved_tensors
        scaling, dropout, seed = ctx.update
        down, up, upper = a.to(x.dtype), b.to(x.dtype), _flat(gradient)
        low = (upper @ up).mul_(scaling)  # d loss / d (x @ A.T)
        to_x = to_a = to_b = None
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            inputs = _flat(_drop(x, dropout, seed))
            to_a = (low.T @ inputs).to(a.dtype)
            to_b = (upper.T @ (inputs @ down.T).mul_(scaling)).to(b.dtype)
            del inputs
        if ctx.needs_input_grad[0]:
            to_x = ctx.weight.transposed_matmul(gradient)
            if dropout:
                to_x += _drop((low @ down).view_as(x), dropout, seed)
            else:
                to_x.view(-1, x.shape[-1]).addmm_(low, down)
        return to_x, to_a, to_b, None, None, None, None


def _drop(x: Tensor, dropout: float, seed: int) -> Tensor:
    """Zeros a share of the elements, the same for the same seed, and scales the rest; linear in `x`."""
    if not dropout:
        return x
    generator = torch.Generator(x.device).manual_seed(seed)
    mask = torch.empty(x.shape, dtype=x.dtype, device=x.device).bernoulli_(1 - dropout, generator=generator)
    return x * mask.div_(1 - dropout)


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])
