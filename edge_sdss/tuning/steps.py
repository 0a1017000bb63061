"""The optimisation itself: which examples make a step, its learning rate, its loss, its update.

Everything a step does is a function of the settings and its number, so a run resumes at any step.
Knows nothing of files.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Mapping, Sequence

import torch

from edge_sdss import config
from edge_sdss.errors import ConfigError, message
from edge_sdss.lm import Encoded
from edge_sdss.tuning.adapter import Trainable
from edge_sdss.tuning.loss import cross_entropy
from edge_sdss.tuning.memory import PeakTensorBytes
from edge_sdss.tuning.records import Step

_WINDOW = 8


def batches(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Returns the indices of the examples of each batch of an epoch, in order.

    Shuffled examples are sorted by length within windows of eight batches, so that little is padding; the
    batches are shuffled again. A function of its arguments alone, the same on every machine.
    """
    generator = random.Random(f"{seed}:{epoch}")
    order = list(range(len(lengths)))
    generator.shuffle(order)
    width = _WINDOW * batch_size
    for start in range(0, len(order), width):
        order[start : start + width] = sorted(order[start : start + width], key=lengths.__getitem__)
    cut = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    generator.shuffle(cut)
    return cut


def learning_rate(step: int, steps: int, settings: config.Tuning) -> float:
    """Returns the rate of step 0 .. steps - 1: linear warm-up, then a cosine towards zero."""
    warm = min(math.ceil(settings.warmup * steps), steps - 1)
    if step < warm:
        return settings.learning_rate * (step + 1) / (warm + 1)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))


class Optimisation:
    """A round in progress."""

    def __init__(self, adapted: Trainable, encoded: Sequence[Encoded], settings: config.Tuning):
        self._settings = settings
        self._weight = adapted.head
        self._encoded = encoded
        self._backbone = adapted.backbone
        self._frozen = adapted.frozen
        lengths = [len(example.ids) for example in encoded]
        epochs = range(settings.epochs)
        self._plan = [rows for e in epochs for rows in batches(lengths, settings.batch_size, settings.seed, e)]
        self._measured = _largest(self._plan, lengths)
        self._parameters = adapted.parameters
        self._optimizer = torch.optim.AdamW(self._parameters.values(), lr=0.0, weight_decay=0.0, fused=True)
        self.peak_tensor_bytes = 0
        self.done: list[Step] = []

    @property
    def steps(self) -> int:
        """Steps of the whole round."""
        return len(self._plan)

    @property
    def trainable_parameters(self) -> int:
        """Numbers that are learnt."""
        return sum(parameter.numel() for parameter in self._parameters.values())

    def advance(self) -> None:
        """Does the next step. Raises ConfigError where the loss or its gradient is not finite."""
        number = len(self.done)
        if number != self._measured:
            self._step(number)
            return
        state = [tensor for each in self._optimizer.state.values() for tensor in each.values()]
        alive = [*self._frozen, *self._parameters.values(), *state]
        with PeakTensorBytes(alive, self._weight.device) as memory:
            self._step(number)
        self.peak_tensor_bytes = memory.peak

    def tensors(self) -> dict[str, torch.Tensor]:
        """Returns the adapter's weights and the optimizer's moments, by name."""
        found: dict[str, torch.Tensor] = {}
        for name, parameter in self._parameters.items():
            state = self._optimizer.state[parameter]
            found[f"weight.{name}"] = parameter
            found[f"first.{name}"], found[f"second.{name}"] = state["exp_avg"], state["exp_avg_sq"]
        return found

    def restore(self, tensors: Mapping[str, torch.Tensor], done: Sequence[Step], peak_tensor_bytes: int) -> None:
        """Goes to the state that `tensors` gave after the steps `done`."""
        self.done = list(done)
        self.peak_tensor_bytes = peak_tensor_bytes
        for name, parameter in self._parameters.items():
            moments = [tensors[f"{which}.{name}"].to(parameter.device) for which in ("first", "second")]
            self._optimizer.state[parameter] = {
                "step": torch.tensor(float(len(done)), device=parameter.device),
                "exp_avg": moments[0],
                "exp_avg_sq": moments[1],
            }
            with torch.no_grad():
                parameter.copy_(tensors[f"weight.{name}"])

    def _step(self, number: int) -> None:
        began = time.perf_counter()
        torch.manual_seed(self._settings.seed * 1_000_003 + number)  # dropout, the same on a resumed run
        rows = [self._encoded[index] for index in self._plan[number]]
        rate = learning_rate(number, self.steps, self._settings)
        self._optimizer.param_groups[0]["lr"] = rate
        loss = self._loss(rows)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self._parameters.values(), self._settings.clip)
        if not torch.isfinite(loss + norm):
            found = f"the loss of step {number + 1} is {loss.item():.4g}, its gradient's norm {norm.item():.4g}"
            raise ConfigError(message("tune the model", found, "lower tuning.learning_rate"))
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        tokens = sum(len(row.ids) for row in rows)
        self.done.append(Step(number + 1, loss.item(), rate, tokens, time.perf_counter() - began))

    def _loss(self, rows: Sequence[Encoded]) -> torch.Tensor:
        """Mean nats per answer token over the batch: every token weighs the same."""
        device = self._weight.device
        width = max(len(row.ids) for row in rows)
        ids = torch.tensor([row.ids + [0] * (width - len(row.ids)) for row in rows], device=device)
        # The position before an answer token predicts it.
        spans = [range(row.prompt_tokens - 1, len(row.ids) - 1) for row in rows]
        predicts = torch.tensor([i * width + j for i, span in enumerate(spans) for j in span], device=device)
        targets = torch.tensor([token for row in rows for token in row.ids[row.prompt_tokens :]], device=device)
        # Nothing is masked: padding is on the right and attention causal, so no answer sees it. Saying so
        # with ones, not None, spares transformers building a mask.
        ones = torch.ones_like(ids)
        # No name for the states of all tokens: they go as soon as the answers' are picked.
        answers = (
            self._backbone(input_ids=ids, attention_mask=ones, use_cache=False)
            .last_hidden_state.flatten(0, 1)
            .index_select(0, predicts)
        )
        return cross_entropy(answers, self._weight, targets, chunk=self._settings.loss_chunk) / len(targets)


def _largest(plan: Sequence[Sequence[int]], lengths: Sequence[int]) -> int:
    """The step with most tokens, padding counted, save the first: Adam has no state before it."""
    sizes = [len(rows) * max(lengths[index] for index in rows) for rows in plan]
    return max(range(1, len(plan)), key=sizes.__getitem__) if len(plan) > 1 else 0
