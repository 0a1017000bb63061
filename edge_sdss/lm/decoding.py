"""The loop that writes answers: a left-padded batch, a key-value cache, greedy or nucleus sampling.

Knows ids and logits; what a conversation is, it does not know. A row that is finished leaves the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

Forward = Callable[["torch.Tensor", "torch.Tensor", "torch.Tensor", Any], Any]
Chooser = Callable[["torch.Tensor", Sequence[int], int], list[int]]

_NUCLEUS = 256


@dataclass(frozen=True)
class Generation:
    """An answer. `finished`: the model stopped by itself; else it was cut off after `tokens` tokens."""

    text: str
    finished: bool
    tokens: int


def decode(
    forward: Forward,
    prompts: Sequence[Sequence[int]],
    choose: Chooser,
    ended: Callable[[Sequence[int]], bool],
    max_new_tokens: int,
    device: torch.device,
) -> list[list[int]]:
    """Returns the new ids of each prompt, the one that ended it included.

    `forward(input_ids, attention_mask, position_ids, past_key_values)` gives the model's output, logits
    [rows, 1, V]; `choose(logits [rows, V], rows, step)` the next ids; `ended(new ids)` says when to stop.
    """
    import torch

    ids, mask = padded(prompts, device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    written: list[list[int]] = [[] for _ in prompts]
    live = list(range(len(prompts)))
    cache = None
    for step in range(max_new_tokens):
        output = forward(ids, mask, positions, cache)
        cache = output.past_key_values
        tokens = choose(output.logits[:, -1].float(), live, step)
        for row, token in zip(live, tokens, strict=True):
            written[row].append(token)
        keep = [k for k, row in enumerate(live) if not ended(written[row])]
        if not keep:
            break
        if len(keep) < len(live):
            kept = torch.tensor(keep, device=device)
            cache.batch_select_indices(kept)
            mask, positions = mask[kept], positions[kept]
            live = [live[k] for k in keep]
        ids = torch.tensor([[tokens[k]] for k in keep], device=device)
        mask = torch.cat([mask, mask.new_ones(len(keep), 1)], dim=1)
        positions = positions[:, -1:] + 1
    return written


def follow(forward: Forward, prompt: Sequence[int], choose: Chooser, device: torch.device) -> Iterator[int]:
    """Yields the next id that `choose` takes, again and again; the first one costs the prompt's prefill."""
    import torch

    ids, mask = padded([prompt], device)
    positions = mask.cumsum(-1) - 1
    cache = None
    for step in count():
        with torch.no_grad():
            output = forward(ids, mask, positions, cache)
        cache = output.past_key_values
        token = choose(output.logits[:, -1].float(), [0], step)[0]
        yield token
        ids = torch.tensor([[token]], device=device)
        mask = torch.cat([mask, mask.new_ones(1, 1)], dim=1)
        positions = positions[:, -1:] + 1


def padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns ids and attention mask, int64 [rows, longest], each row at the right end."""
    import torch

    longest = max(len(row) for row in rows)
    ids = torch.tensor([[0] * (longest - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def greedy(logits: torch.Tensor, rows: Sequence[int], step: int) -> list[int]:
    """The most probable token of each row."""
    return logits.argmax(dim=-1).tolist()


def sampler(draws: npt.NDArray[np.float64], temperature: float, top_p: float) -> Chooser:
    """Returns a chooser that samples row r at step s by draws[r, s], uniform in [0, 1).

    The draw is looked up in the cumulated probabilities of the nucleus, in order of token id, so a
    choice depends on its own row alone.
    """
    import torch

    def choose(logits: torch.Tensor, rows: Sequence[int], step: int) -> list[int]:
        probabilities = torch.softmax(logits / temperature, dim=-1)
        tokens = torch.arange(logits.shape[-1], device=logits.device).expand_as(logits)
        if top_p < 1:
            probabilities, tokens = _nucleus(probabilities, top_p)
        cumulated = probabilities.double().cumsum(dim=-1)
        draw = torch.as_tensor(draws[list(rows), step], device=logits.device)[:, None]
        at = torch.searchsorted(cumulated, draw * cumulated[:, -1:], right=True)
        return tokens.gather(1, at.clamp(max=tokens.shape[1] - 1))[:, 0].tolist()

    return choose


def _nucleus(probabilities: torch.Tensor, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns probabilities (0 outside the nucleus) and token ids, both [rows, k], in order of id."""
    size = min(_NUCLEUS, probabilities.shape[-1])
    top, tokens = probabilities.topk(size, dim=-1)
    if bool((top.sum(dim=-1) < top_p).any()):
        top, tokens = probabilities.sort(dim=-1, descending=True)
    before = top.cumsum(dim=-1) - top
    tokens, order = tokens.sort(dim=-1)
    return top.where(before < top_p, 0).gather(1, order), tokens
