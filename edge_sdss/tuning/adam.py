"""Adam (Kingma and Ba, arXiv 1412.6980) over an adapter's weights, its moments in full or in 8 bits.

Moments in 8 bits (Dettmers et al., arXiv 2110.02861) share a scale in blocks of 256, and their codes are spaced
like floating numbers: seven decades, with more steps in the higher ones. They take 2.03 bytes a weight instead of
8, and are float32 for one tensor at a time. Of the second moment the root is held, and never rounded to zero: where
gradients in a block are more than three decades apart, the paper's way divides by nearly nothing. Knows nothing
of where gradients come from.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

import torch
from torch.nn.functional import pad

from edge_sdss import config
from edge_sdss.tuning.limit import ADAM_BLOCK

if TYPE_CHECKING:
    from torch import Tensor, nn

_BETAS, _EPSILON = (0.9, 0.999), 1e-8
_DECADES = 7


class Adam(Protocol):
    """An optimizer over named parameters."""

    def update(self, rate: float) -> None:
        """Does a step with the gradients that are there."""

    def tensors(self) -> dict[str, Tensor]:
        """Returns the moments, by name, as they are held."""

    def restore(self, tensors: Mapping[str, Tensor], steps: int) -> None:
        """Goes to the moments that `tensors` gave after so many steps."""


def adam(parameters: Mapping[str, nn.Parameter], kind: config.Optimizer) -> Adam:
    """Returns the optimizer, with moments of zero: it takes no less memory before its first step."""
    return Full(parameters) if kind == "adamw" else Blockwise(parameters)


class Full:
    """torch's own, fused; the moments in the type of the weights."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]):
        self._parameters = parameters
        self._optimizer = torch.optim.AdamW(
            parameters.values(), lr=0.0, betas=_BETAS, eps=_EPSILON, weight_decay=0.0, fused=True
        )
        for parameter in parameters.values():
            self._set(parameter, torch.zeros_like(parameter), torch.zeros_like(parameter), 0)

    def update(self, rate: float) -> None:
        """See Adam."""
        self._optimizer.param_groups[0]["lr"] = rate
        self._optimizer.step()

    def tensors(self) -> dict[str, Tensor]:
        """See Adam."""
        found = {}
        for name, parameter in self._parameters.items():
            state = self._optimizer.state[parameter]
            found[f"first.{name}"], found[f"second.{name}"] = state["exp_avg"], state["exp_avg_sq"]
        return found

    def restore(self, tensors: Mapping[str, Tensor], steps: int) -> None:
        """See Adam."""
        for name, parameter in self._parameters.items():
            first, second = (tensors[f"{which}.{name}"].to(parameter.device) for which in ("first", "second"))
            self._set(parameter, first, second, steps)

    def _set(self, parameter: nn.Parameter, first: Tensor, second: Tensor, steps: int) -> None:
        count = torch.tensor(float(steps), device=parameter.device)
        self._optimizer.state[parameter] = {"step": count, "exp_avg": first, "exp_avg_sq": second}


class Blockwise:
    """Both moments in 8 bits: codes [n] uint8 and scales [blocks] float32 each."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]):
        self._parameters = parameters
        self._steps = 0
        self._state = {name: (_Moment(p, signed=True), _Moment(p, signed=False)) for name, p in parameters.items()}

    @torch.no_grad()
    def update(self, rate: float) -> None:
        """See Adam."""
        self._steps += 1
        first_rate, second_rate = (1 - beta**self._steps for beta in _BETAS)
        for name, parameter in self._parameters.items():
            if parameter.grad is None:
                continue
            gradient, moments = parameter.grad.float(), self._state[name]
            first = moments[0].value().lerp_(gradient, 1 - _BETAS[0])
            second = moments[1].value().square_().mul_(_BETAS[1])
            root = second.addcmul_(gradient, gradient, value=1 - _BETAS[1]).sqrt_()
            moments[0].hold(first)
            moments[1].hold(root)
            change = first.div_(root.div_(second_rate**0.5).add_(_EPSILON))
            parameter.copy_(parameter.float().add_(change, alpha=-rate / first_rate))

    def tensors(self) -> dict[str, Tensor]:
        """See Adam."""
        found = {}
        for name, (first, second) in self._state.items():
            for which, moment in (("first", first), ("second", second)):
                found[f"{which}.{name}"], found[f"{which}_scales.{name}"] = moment.codes, moment.scales
        return found

    def restore(self, tensors: Mapping[str, Tensor], steps: int) -> None:
        """See Adam."""
        self._steps = steps
        for name, (first, second) in self._state.items():
            for which, moment in (("first", first), ("second", second)):
                moment.codes.copy_(tensors[f"{which}.{name}"])
                moment.scales.copy_(tensors[f"{which}_scales.{name}"])


class _Moment:
    """A tensor in 8 bits."""

    def __init__(self, like: Tensor, *, signed: bool):
        self._shape, self._signed = like.shape, signed
        blocks = -(-like.numel() // ADAM_BLOCK)
        zero = int((levels(signed) == 0).nonzero())
        self.codes = torch.full((like.numel(),), zero, dtype=torch.uint8, device=like.device)
        self.scales = torch.zeros(blocks, device=like.device)

    def value(self) -> Tensor:
        """Returns it in float32."""
        table = levels(self._signed).to(self.codes.device)
        return _scaled(table.index_select(0, self.codes.int()), self.scales).view(self._shape)

    def hold(self, value: Tensor) -> None:
        """Takes the nearest codes."""
        table = levels(self._signed).to(value.device)
        blocks = pad(value.reshape(-1), (0, -value.numel() % ADAM_BLOCK)).view(-1, ADAM_BLOCK)
        self.scales.copy_(blocks.abs().amax(1))
        ratio = blocks / torch.where(self.scales > 0, self.scales, 1)[:, None]
        codes = torch.bucketize(ratio.view(-1)[: value.numel()], (table[1:] + table[:-1]) / 2, out_int32=True)
        if not self._signed:
            codes.clamp_(min=1)
        self.codes.copy_(codes)


def _scaled(values: Tensor, scales: Tensor) -> Tensor:
    whole = values.numel() // ADAM_BLOCK * ADAM_BLOCK
    values[:whole].view(-1, ADAM_BLOCK).mul_(scales[: whole // ADAM_BLOCK, None])
    values[whole:].mul_(scales[-1])
    return values


@functools.cache
def levels(signed: bool) -> Tensor:
    """Returns the 256 values of the codes, ascending in [-1, 1] or [0, 1]: zero, one, and seven decades between.

    The decade that ends at 10^(i - 6), i = 0 .. 6, has 2^i values for each sign, or twice as many where there is
    none: the middles of as many equal parts of [0.1, 1] times its end.
    """
    found = [0.0, 1.0]
    for i in range(_DECADES):
        parts = 2**i if signed else 2 ** (i + 1)
        for part in range(parts):
            value = (0.1 + 0.9 * (part + 0.5) / parts) * 10.0 ** (i - _DECADES + 1)
            found += [value, -value] if signed else [value]
    return torch.tensor(sorted(found))
