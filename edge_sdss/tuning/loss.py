"""Cross-entropy whose logits exist for one chunk of tokens at a time. Knows nothing of models or batches.

The output head is frozen, so the gradient of the loss with respect to the hidden states is known as soon
as a chunk's logits are: it is computed in the forward, chunk by chunk, and kept instead of the logits.
Memory: one chunk of logits (chunk x V) and one gradient (T x H), never T x V.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
        wants_gradient = ctx.needs_input_grad[0]
        gradient = torch.empty_like(hidden) if wants_gradient else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            logits = (hidden[part] @ weight.T).float()
            index = targets[part, None]
            # All in place: torch's own logsumexp makes a copy of the chunk.
            logits.sub_(logits.amax(-1, keepdim=True))
            right = logits.gather(1, index)
            sums = logits.exp_().sum(-1, keepdim=True)
            total += (sums.log() - right).sum()
            if gradient is not None:
                # d loss / d logits = softmax - onehot, written over the logits.
                probabilities = logits.div_(sums)
                probabilities.scatter_add_(1, index, torch.full_like(sums, -1.0))
                torch.mm(probabilities.to(weight.dtype), weight, out=gradient[part])
                del probabilities  # the same memory as the logits: both names must go before the next chunk's
            del logits
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[0].to(gradient.dtype), None, None, None


def cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, *, chunk: int) -> Tensor:
    """Returns the sum over tokens of -ln softmax(hidden @ weight.T)[target], in nats.

    `hidden` is [T, H], `weight` the frozen head [V, H] of the same dtype, `targets` [T] int64. The result
    is a float32 scalar, differentiable in `hidden` only. `chunk` tokens have logits at a time; it changes
    the memory that is used, and the result only by rounding.
    """
    loss: Tensor = _ChunkedCrossEntropy.apply(hidden, weight, targets, chunk)  # type: ignore[no-untyped-call]
    return loss
