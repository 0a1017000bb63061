"""Keeps a layer's input alone, and computes the layer again in the backward. Knows nothing of what is in it.

Chen et al., arXiv 1604.06174. What sets it apart from `torch.utils.checkpoint`: the layer's result, which no
one needs the second time, is let go before its backward begins; and the linear at its end, whose value
nothing after it saves (a residual sum follows), is not computed again: a quarter of a Llama layer's products.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge, saved_tensors_hooks

from edge_sdss.tuning.layers.frozen import FrozenLinear
from edge_sdss.tuning.layers.lora import LoraLinear

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor


class Checkpointed:
    """Stands in for `layer.forward`: the first argument is [..., H] and the result, alone or in a tuple, too.

    Other arguments are kept as they are; no gradient goes to them.
    """

    def __init__(self, layer: nn.Module):
        self._forward: Callable[..., Any] = layer.forward
        self._parameters = [parameter for parameter in layer.parameters() if parameter.requires_grad]
        self._linears = [each for each in layer.modules() if isinstance(each, (FrozenLinear, LoraLinear))]
        self._spare: FrozenLinear | LoraLinear | None = None
        self._known = False
        self._in_tuple = False

    def __call__(self, hidden_states: Tensor, *others: Any, **named: Any) -> Any:
        """Returns what the layer returns."""
        if not torch.is_grad_enabled():
            return self._forward(hidden_states, *others, **named)
        run = functools.partial(self._run, others, named)
        y = _Checkpoint.apply(self, run, hidden_states, *self._parameters)  # type: ignore[no-untyped-call]
        return (y,) if self._in_tuple else y

    def _run(self, others: tuple[Any, ...], named: dict[str, Any], x: Tensor) -> Tensor:
        result = self._forward(x, *others, **named)
        self._in_tuple = isinstance(result, tuple)
        if self._in_tuple:
            (result,) = result
        found: Tensor = result
        return found

    def again(self, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Computes the graph of the layer again; its value is not to be used."""
        if not self._known:
            return self._learn(run, x)
        if self._spare is None:
            return run(x)
        self._spare.idle = True
        try:
            return run(x)
        finally:
            self._spare.idle = False

    def _learn(self, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Finds out whether the last linear's value is of use: whether anything is saved once it is known."""
        saved = 0
        after: list[tuple[FrozenLinear | LoraLinear, int]] = []

        def pack(tensor: Tensor) -> Tensor:
            nonlocal saved
            saved += 1
            return tensor

        def note(linear: Any, _inputs: Any, _output: Any) -> None:
            after.append((linear, saved))

        handles = [linear.register_forward_hook(note) for linear in self._linears]
        try:
            with saved_tensors_hooks(pack, lambda tensor: tensor):
                y = run(x)
        finally:
            for handle in handles:
                handle.remove()
        if after and after[-1][1] == saved:
            self._spare = after[-1][0]
        self._known = True
        return y


class _Checkpoint(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, layer: Checkpointed, run: Callable[[Tensor], Tensor], x: Tensor, *parameters: Tensor
    ) -> Tensor:
        ctx.layer, ctx.run, ctx.parameters = layer, run, parameters
        ctx.generators = _generators(x)
        ctx.save_for_backward(x)
        return run(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        wants = ctx.needs_input_grad[2]
        x = x.detach().requires_grad_(wants)
        with torch.enable_grad(), _restored(x, ctx.generators):
            edge = get_gradient_edge(ctx.layer.again(ctx.run, x))  # an edge keeps the graph and not the value
        wanted = [*([x] if wants else []), *ctx.parameters]
        found = torch.autograd.grad(edge, wanted, gradient, allow_unused=True)
        return None, None, *(found if wants else (None, *found))


def _generators(x: Tensor) -> tuple[Tensor, ...]:
    states = [torch.get_rng_state()]
    if x.is_cuda:
        states.append(torch.cuda.get_rng_state(x.device))
    return tuple(states)


@contextmanager
def _restored(x: Tensor, states: tuple[Tensor, ...]) -> Iterator[None]:
    """Inside, torch's generators are in these states; afterwards in those that they were in."""
    with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
        torch.set_rng_state(states[0])
        if x.is_cuda:
            torch.cuda.set_rng_state(states[1], x.device)
        yield
