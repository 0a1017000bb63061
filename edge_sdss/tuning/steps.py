"""The optimisation itself: which examples make a step, its learning rate, its loss, its update.

Everything a step does is a function of the settings, its number and its fit, so a run resumes at any step; and
the fit, as long as it cuts no sequence, changes rounding only. Knows nothing of files, nor of what to do when
memory runs out.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping, Sequence

import torch

from edge_sdss import config
from edge_sdss.errors import ConfigError, message
from edge_sdss.lm import Encoded
from edge_sdss.tuning.adam import adam
from edge_sdss.tuning.adapter import Trainable
from edge_sdss.tuning.fit import Fit
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
    """A round in progress.

    `check` is called before each micro-batch, at each adapted linear and at each gradient; what it raises comes
    out of `advance`. After any error there, `torn` says whether it fell into the update, so that the weights may
    be half new: then only `restore` helps. Else they are those after the steps `done`, and `discard` makes the
    step ready to be done again.
    """

    def __init__(
        self,
        adapted: Trainable,
        encoded: Sequence[Encoded],
        settings: config.Tuning,
        check: Callable[[], None] | None = None,
    ):
        self._settings = settings
        self._adapted = adapted
        self._weight = adapted.head
        self._encoded = encoded
        self._frozen = adapted.frozen
        self._check = check
        lengths = [len(example.ids) for example in encoded]
        epochs = range(settings.epochs)
        self._plan = [rows for e in epochs for rows in batches(lengths, settings.batch_size, settings.seed, e)]
        self._measured = _largest(self._plan, lengths)
        self._parameters = adapted.parameters
        self._adam = adam(self._parameters, settings.optimizer)
        if check is not None:
            self._interrupt_with(check)
        self.peak_tensor_bytes = 0
        self.done: list[Step] = []
        self.torn = False

    @property
    def steps(self) -> int:
        """Steps of the whole round."""
        return len(self._plan)

    @property
    def steps_each(self) -> int:
        """Steps of an epoch."""
        return len(self._plan) // self._settings.epochs

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """The adapter's weights, by name."""
        return dict(self._parameters)

    def put_weights(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Sets the adapter's weights to what `weights` was, with the optimizer left as it is."""
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(tensors[name])

    @property
    def trainable_parameters(self) -> int:
        """Numbers that are learnt."""
        return sum(parameter.numel() for parameter in self._parameters.values())

    def advance(self, fit: Fit | None = None) -> None:
        """Does the next step, by default with the fit of the settings.

        Its batch goes through the model in micro-batches, and every answer token of the batch weighs the same.
        Sequences are as they were given here, or to `shorten`; `fit.max_tokens` is not looked at.
        Raises ConfigError where the loss or its gradient is not finite.
        """
        number, fit = len(self.done), fit or Fit.of(self._settings)
        self._adapted.checkpointing(fit.checkpointing)
        if number != self._measured:
            self._step(number, fit)
            return
        alive = [*self._frozen, *self._parameters.values(), *self._adam.tensors().values()]
        with PeakTensorBytes(alive, self._weight.device) as memory:
            self._step(number, fit)
        self.peak_tensor_bytes = memory.peak

    @torch.no_grad()
    def measure(self, encoded: Sequence[Encoded], fit: Fit) -> float:
        """Returns the loss of other examples: mean nats per answer token over all of them, without dropout."""
        rows = sorted(encoded, key=lambda row: len(row.ids))
        self._adapted.model.eval()
        try:
            total = torch.zeros((), dtype=torch.float64)
            for part in _parts(rows, fit):
                if self._check is not None:
                    self._check()
                total += self._loss(part, fit.loss_chunk).double().cpu()
        finally:
            self._adapted.model.train()
        return float(total / sum(len(row.ids) - row.prompt_tokens for row in rows))

    def discard(self) -> None:
        """Drops the gradients of a step that was not finished, and what autograd keeps of it."""
        self._clear()
        # After an error, the nodes that were ready wait in the engine's queue, with all below them, for the next
        # backward to drop them.
        torch.zeros((), device=self._weight.device, requires_grad=True).backward()

    def shorten(self, encoded: Sequence[Encoded]) -> None:
        """From now on takes these instead, the same examples with fewer tokens; which make a step, stays."""
        self._encoded = encoded

    def tensors(self) -> dict[str, torch.Tensor]:
        """Returns the adapter's weights and the optimizer's moments, by name."""
        return {f"weight.{name}": tensor for name, tensor in self.weights.items()} | self._adam.tensors()

    def restore(self, tensors: Mapping[str, torch.Tensor], done: Sequence[Step], peak_tensor_bytes: int) -> None:
        """Goes to the state that `tensors` gave after the steps `done`."""
        self.done = list(done)
        self.peak_tensor_bytes = peak_tensor_bytes
        self._adam.restore(tensors, len(done))
        self.put_weights({name: tensors[f"weight.{name}"] for name in self._parameters})
        self.torn = False

    def _clear(self) -> None:
        for parameter in self._parameters.values():
            parameter.grad = None

    def _interrupt_with(self, check: Callable[[], None]) -> None:
        """A step may take a minute; its hooks go with the round's own layers."""
        for layer in self._adapted.layers.values():
            layer.register_forward_pre_hook(lambda _layer, _inputs: check())
        for parameter in self._parameters.values():
            parameter.register_post_accumulate_grad_hook(lambda _parameter: check())

    def _step(self, number: int, fit: Fit) -> None:
        began = time.perf_counter()
        # Dropout, the same on a resumed run: masks follow each other from micro-batch to micro-batch.
        torch.manual_seed(self._settings.seed * 1_000_003 + number)
        rows = [self._encoded[index] for index in self._plan[number]]
        rate = learning_rate(number, self.steps, self._settings)
        loss = self._accumulate(rows, fit)
        norm = torch.nn.utils.clip_grad_norm_(self._parameters.values(), self._settings.clip)
        if not torch.isfinite(loss + norm):
            found = f"the loss of step {number + 1} is {loss.item():.4g}, its gradient's norm {norm.item():.4g}"
            raise ConfigError(message("tune the model", found, "lower tuning.learning_rate"))
        value, tokens = loss.item(), sum(len(row.ids) for row in rows)
        self.torn = True
        self._adam.update(rate)
        self._clear()
        self.done.append(Step(number + 1, value, rate, tokens, time.perf_counter() - began))
        self.torn = False

    def _accumulate(self, rows: Sequence[Encoded], fit: Fit) -> torch.Tensor:
        """Adds up gradients, and returns the loss: mean nats per answer token over the batch."""
        answers = sum(len(row.ids) - row.prompt_tokens for row in rows)
        loss = torch.zeros((), device=self._weight.device)
        for part in _parts(rows, fit):
            if self._check is not None:
                self._check()
            share = self._loss(part, fit.loss_chunk) / answers
            share.backward()
            loss += share.detach()
            del share
        return loss

    def _loss(self, rows: Sequence[Encoded], chunk: int) -> torch.Tensor:
        """The sum over the answers' tokens, in nats."""
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
            self._adapted.backbone(input_ids=ids, attention_mask=ones, use_cache=False)
            .last_hidden_state.flatten(0, 1)
            .index_select(0, predicts)
        )
        return cross_entropy(answers, self._weight, targets, chunk=chunk)


def _parts(rows: Sequence[Encoded], fit: Fit) -> list[Sequence[Encoded]]:
    """What goes through the model at a time. The rows are sorted by length, so there is little padding."""
    return [rows[part.start : part.stop] for part in fit.parts([len(row.ids) for row in rows])]


def _largest(plan: Sequence[Sequence[int]], lengths: Sequence[int]) -> int:
    """The step with most tokens, padding counted, save the first: in it, checkpoints learn what they can spare."""
    sizes = [len(rows) * max(lengths[index] for index in rows) for rows in plan]
    return max(range(1, len(plan)), key=sizes.__getitem__) if len(plan) > 1 else 0
