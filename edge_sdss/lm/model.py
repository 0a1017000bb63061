"""LanguageModel, the one class that other modules use. Knows nothing of streams, buffers or training."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edge_sdss import config, default_model
from edge_sdss.errors import InputError, message
from edge_sdss.lm import adapters, decoding, loading
from edge_sdss.lm.chat import Chat, Encoded
from edge_sdss.lm.decoding import Generation
from edge_sdss.lm.piecewise import Hold
from edge_sdss.types import Example, Progress, Turn, no_progress

if TYPE_CHECKING:
    import torch

_LOGITS = 1 << 26  # logits alive at once while losses are measured: 256 MiB in float32
_NO_LABEL = -100


class LanguageModel:
    """A causal language model with its tokenizer and at most one LoRA adapter.

    `model` is the torch module, a `peft.PeftModel` where an adapter is attached: in evaluation mode, its
    weights frozen. `chat` turns conversations into ids (see there for templates and special tokens).
    """

    def __init__(self, name: str, folder: Path, model: Any, tokenizer: Any) -> None:
        self.name = name
        self.model = model
        self.tokenizer = tokenizer
        stops = model.generation_config.eos_token_id if model.generation_config else None
        self.chat = Chat(tokenizer, stops if isinstance(stops, list) else [stops])
        self.adapter: Path | None = None
        self.parameters = sum(weight.numel() for weight in model.parameters())
        self._folder = folder
        self._accepts = frozenset(inspect.signature(model.forward).parameters)

    @classmethod
    def load(
        cls, settings: config.Model, *, hold: Hold | None = None, progress: Progress = no_progress
    ) -> LanguageModel:
        """Loads the default model, a local Hugging Face folder, or a hub id that is in the local cache.

        Opens no connection, runs no code of the folder, reads no pickled weights. `hold` is for weights in other
        forms than `settings.dtype`, see `loading.load`. Raises BackendUnavailable
        where torch, the device or the hub's copy is absent, InputError where the folder holds no causal
        model or no tokenizer.
        """
        torch = loading.torch_module()
        device = loading.device_of(settings.device)
        name = settings.name or default_model.NAME
        folder = loading.find(settings.name, progress)
        progress(f"loading {name}", 0, 1)
        model, tokenizer = loading.load(folder, getattr(torch, settings.dtype), hold)
        model = model.to(device).eval().requires_grad_(False)
        progress(f"loading {name}", 1, 1)
        return cls(name, folder, model, tokenizer)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the base model's configuration and weights on the disk, 64 hexadecimal digits."""
        return loading.fingerprint(self._folder)

    @property
    def base(self) -> Any:
        """The transformers module without PEFT's wrapper; an adapter's layers are still inside it."""
        return self.model if self.adapter is None else self.model.get_base_model()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = self.base.device
        return device

    @property
    def width(self) -> int:
        """The size d of a hidden state."""
        return int(self.base.config.get_text_config().hidden_size)

    @property
    def context(self) -> int:
        """The longest sequence, in tokens, that the model was made for."""
        return int(getattr(self.base.config.get_text_config(), "max_position_embeddings", None) or 1 << 20)

    def token_embeddings(self, text: str, max_tokens: int) -> torch.Tensor:
        """Returns E(T), the base model's last hidden states after the final norm: [n, d] float32.

        The text is cut after `max_tokens` tokens. A token that the tokenizer puts around it (BOS) is seen by
        the model and left out of the result. Raises InputError where the text has no token.
        """
        import torch

        encoded = self.tokenizer(
            self.chat.plain(text), truncation=True, max_length=max_tokens, return_special_tokens_mask=True
        )
        rows = [i for i, special in enumerate(encoded["special_tokens_mask"]) if not special]
        if not rows:
            raise InputError(message("embed a text", "it is empty", "give one with at least one word"))
        ids = torch.tensor([encoded["input_ids"]], device=self.device)
        with torch.no_grad(), self.without_adapter():
            states: torch.Tensor = self.base.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
        return states[rows].float()

    def encode(self, example: Example, max_tokens: int) -> Encoded:
        """Returns prompt, answer and end of turn as ids; see `Chat.encode` for what is cut."""
        return self.chat.encode(example, max_tokens)

    def nll(
        self,
        examples: Sequence[Example],
        *,
        max_tokens: int,
        batch_size: int,
        progress: Progress = no_progress,
    ) -> npt.NDArray[np.float64]:
        """Returns each example's loss, [len(examples)] float64: mean nats per token of the answer.

        The end-of-turn token counts as one of them. The loss is taken in float32 over the answers' positions
        only, and does not depend on `batch_size`; fewer rows go at once where the logits would be large.
        """
        encoded = [self.encode(example, max_tokens) for example in examples]
        order = sorted(range(len(encoded)), key=lambda i: len(encoded[i].ids), reverse=True)
        losses = np.zeros(len(encoded))
        done = 0
        while done < len(order):
            rows = self._fitting(encoded, order[done : done + batch_size])
            losses[rows] = self._losses([encoded[row] for row in rows])
            done += len(rows)
            progress("measuring loss", done, len(order))
        return losses

    def text_nll(self, text: str) -> float:
        """Returns the loss of plain text: mean nats per token over its tokens 2..n, cut at the context.

        Raises InputError where the text has fewer than two tokens.
        """
        ids = self.tokenizer(self.chat.plain(text))["input_ids"][: self.context]
        if len(ids) < 2:
            raise InputError(message("measure a text", f"it has {len(ids)} token(s)", "give a longer one"))
        return float(self._losses([Encoded(ids, 1)])[0])

    def generate(
        self,
        conversations: Sequence[Sequence[Turn]],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | Sequence[int] = 0,
        batch_size: int = 16,
        prefix: str = "",
        stop: tuple[str, ...] = (),
        progress: Progress = no_progress,
    ) -> list[Generation]:
        """Answers each conversation; greedily where `temperature` is 0.

        Sampling takes a conversation's random numbers from (seed, its index), or from its own of as many
        seeds, so an answer does not depend on what else is in its batch. `top_p` keeps the smallest set of
        most probable tokens with at least that mass (nucleus sampling, Holtzman et al., arXiv 1904.09751).
        An answer begins after `prefix`, which is put in the model's mouth, and ends before a text in
        `stop`; neither is part of it.
        """
        room = max(self.context - max_new_tokens, 1)
        opened = self.tokenizer(prefix, add_special_tokens=False)["input_ids"] if prefix else []
        prompts = [[*self.chat.prompt_ids(turns, room - len(opened)), *opened] for turns in conversations]
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
        answers: dict[int, Generation] = {}
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            choose: decoding.Chooser = decoding.greedy
            if temperature > 0:
                seeds = [[seed, row] if isinstance(seed, int) else seed[row] for row in rows]
                draws = [np.random.default_rng(own).random(max_new_tokens) for own in seeds]
                choose = decoding.sampler(np.stack(draws), temperature, top_p)
            written = self._decode([prompts[row] for row in rows], choose, stop, max_new_tokens)
            answers.update(zip(rows, (self._generation(ids, stop) for ids in written), strict=True))
            progress("generating", len(answers), len(order))
        return [answers[row] for row in range(len(prompts))]

    def follow(self, prompt: Sequence[int], choose: decoding.Chooser = decoding.greedy) -> Iterator[int]:
        """Yields the ids that follow a prompt, one at a time and without end: the caller stops.

        `choose` takes one from logits [1, V], greedily by default. The first id costs the prompt's prefill, each
        further one a decode step. Raises InputError for an empty prompt.
        """
        if not prompt:
            raise InputError(message("ask the model", "the prompt has no token", "give a prompt"))
        return decoding.follow(self._step, prompt, choose, self.device)

    def attach(self, adapter: Path | None) -> None:
        """Makes a PEFT folder the active adapter; None removes the one that is attached.

        The base weights are never merged, so they stay what they were. Raises InputError where the folder
        holds no adapter in safetensors or one of another base model; no adapter is attached then.
        """
        if self.adapter is not None:
            self.model, self.adapter = adapters.detach(self.model), None
        if adapter is not None:
            self.model = adapters.attach(self.model, adapter, self.fingerprint)
            self.adapter = adapter

    @contextlib.contextmanager
    def without_adapter(self) -> Iterator[None]:
        """Inside, the model computes what the base model computes."""
        if self.adapter is None:
            yield
            return
        trainable = [weight for weight in self.model.parameters() if weight.requires_grad]
        try:
            with self.model.disable_adapter():
                yield
        finally:  # PEFT unfreezes the adapter when it enables it again
            self.model.requires_grad_(False)
            for weight in trainable:
                weight.requires_grad_(True)

    def _forward(
        self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: Any, keep: torch.Tensor
    ) -> Any:
        """`keep`: the positions that have logits, int64.

        Named one by one, their states are copied; a slice of them, which a number asks for, would make the head's
        product one a row, each with a copy of the head.
        """
        options = {"position_ids": positions, "logits_to_keep": keep}
        taken = {name: value for name, value in options.items() if name in self._accepts}
        if cache is not None:
            taken["past_key_values"] = cache
        return self.model(input_ids=ids, attention_mask=mask, **taken)

    def _step(self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: Any) -> Any:
        import torch

        return self._forward(ids, mask, positions, cache, torch.tensor([ids.shape[1] - 1], device=self.device))

    def _decode(
        self,
        prompts: Sequence[Sequence[int]],
        choose: decoding.Chooser,
        stop: tuple[str, ...],
        max_new_tokens: int,
    ) -> list[list[int]]:
        import torch

        def ended(ids: Sequence[int]) -> bool:
            return self._stopped(ids, stop)

        with torch.no_grad():
            return decoding.decode(self._step, prompts, choose, ended, max_new_tokens, self.device)

    def _stopped(self, ids: Sequence[int], stop: tuple[str, ...]) -> bool:
        if ids[-1] in self.chat.stop_ids:
            return True
        return bool(stop) and any(text in self.chat.answer(ids) for text in stop)

    def _generation(self, ids: Sequence[int], stop: tuple[str, ...]) -> Generation:
        text = self.chat.answer(ids)
        ends = [at for at in map(text.find, stop) if at >= 0]
        return Generation(text[: min(ends)] if ends else text, self._stopped(ids, stop), len(ids))

    def _fitting(self, encoded: Sequence[Encoded], rows: list[int]) -> list[int]:
        """As many of the rows, one at least, as keep the logits within their budget."""
        positions = _LOGITS // self.base.config.get_text_config().vocab_size
        longest = 0
        for count, row in enumerate(rows, start=1):
            longest = max(longest, len(encoded[row].ids) - encoded[row].prompt_tokens)
            if count > 1 and count * longest > positions:
                return rows[: count - 1]
        return rows

    def _losses(self, batch: Sequence[Encoded]) -> npt.NDArray[np.float64]:
        import torch

        keep = max(len(item.ids) - item.prompt_tokens for item in batch)
        ids, mask = decoding.padded([item.ids for item in batch], self.device)
        labels = torch.full((len(batch), keep), _NO_LABEL, device=self.device)
        for label, item in zip(labels, batch, strict=True):
            answer = item.ids[item.prompt_tokens :]
            label[keep - len(answer) :] = torch.tensor(answer)
        with torch.no_grad():
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            predicts = torch.arange(ids.shape[1] - keep - 1, ids.shape[1] - 1, device=self.device)
            logits = self._forward(ids, mask, positions, None, predicts).logits
            if logits.shape[1] != keep:  # the model knows no logits_to_keep
                logits = logits[:, predicts]
            losses = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1).float(), labels.flatten(), reduction="none", ignore_index=_NO_LABEL
            ).view(labels.shape)
        counts = (labels != _NO_LABEL).sum(dim=1)
        return (losses.double().sum(dim=1) / counts).cpu().numpy()
