"""Chooses how a step is cut so that it fits a budget of memory: of all that fit, what should be fastest.

More memory only adds to what can be chosen from, so it is never slower by the same reckoning. Knows nothing
of how a step is done, nor, but for `calibrate`, of this machine.

The time of a step is reckoned in multiply-adds. Frozen weights are passed twice, forward and backward, and
with checkpoints all but a layer's last product once more. Each pass has a constant cost, as if it had so many
more tokens; a weight of few bits is decoded in each pass. The constants are rough, of a CPU: they rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter
from types import MappingProxyType
from typing import TYPE_CHECKING

from edge_sdss import config
from edge_sdss.errors import BudgetExceeded, ConfigError, InputError, message
from edge_sdss.tuning.fit import LEAST_CHUNK, Fit
from edge_sdss.tuning.limit import ADAM_8BIT_BYTES, WEIGHT_BITS, Setup, lower_limit
from edge_sdss.tuning.predict import Parts, predict
from edge_sdss.tuning.shapes import Architecture

if TYPE_CHECKING:
    import torch

_PASS_TOKENS = 32  # what a pass costs before its first token, in tokens
_CHUNK_TOKENS = 16  # the same for a chunk of logits
_DECODE = MappingProxyType({"int8": 8.0, "nf4": 25.0})  # multiply-adds that cost as much as to decode a weight
_TOKEN_BYTES = 720  # of a tokenizer, for each token: 33 MiB were seen for 49,152
_WORKSPACE_BYTES = 32 << 20  # of matrix products and the allocator; 26 MiB were seen on x86-64 with one thread


@dataclass(frozen=True)
class Calibration:
    """What one step on this very machine showed: `ratio` of the measured to the predicted bytes besides what is
    always there, and the seconds that a token took."""

    ratio: float
    seconds_per_token: float


@dataclass(frozen=True)
class Candidate:
    """One way to do a step. `tensor_bytes` is its peak, calibrated; `cost` is relative time per token.

    `untracked_bytes` is what operations and the tokenizer take, which no tensor shows.
    """

    fit: Fit
    weights: config.Weights
    setup: Setup
    parts: Parts
    tensor_bytes: int
    untracked_bytes: int
    cost: float

    @property
    def needed_bytes(self) -> int:
        """All but the runtime."""
        return self.tensor_bytes + self.untracked_bytes


@dataclass(frozen=True)
class Plan:
    """What was chosen and what else there was. All in bytes.

    `process_bytes` adds the runtime and what kernels take to the tensors. `limit_bytes` is M* of the same step.
    `faster` is what takes least memory among all that are faster, None where nothing is; `least` takes least of all.
    `loading_bytes` is there for a moment before training, where weights come in a type to be quantised.
    """

    chosen: Candidate
    faster: Candidate | None
    least: Candidate
    limit_bytes: int
    runtime_bytes: int
    budget_bytes: int
    loading_bytes: int

    @property
    def fit(self) -> Fit:
        """How to do a step."""
        return self.chosen.fit

    @property
    def process_bytes(self) -> int:
        """Of the whole process, at the peak of a step."""
        return self.chosen.needed_bytes + self.runtime_bytes

    @property
    def speed_up(self) -> float | None:
        """By how much `faster` should be faster: 1.2 is a fifth."""
        return None if self.faster is None else self.chosen.cost / self.faster.cost


def plan(
    architecture: Architecture,
    budget_bytes: int,
    settings: config.Tuning,
    *,
    runtime_bytes: int,
    weights: Sequence[config.Weights] | None = None,
    loaded: str = "float32",
    longest: int | None = None,
    calibration: Calibration | None = None,
) -> Plan:
    """Returns the fastest way to train within `budget_bytes`, of which the runtime takes `runtime_bytes`.

    `weights` are the types that the frozen weights may have, None for the settings' own; `loaded` is the type
    that the model comes in. `longest` is the longest example, in tokens, where that is known; no step has more
    than the settings' `max_tokens`. Nothing that the settings fix is changed.
    Raises BudgetExceeded with the least that would do; InputError and ConfigError for a model or settings that
    cannot be trained or predicted.
    """
    _check(architecture, settings)
    tokens = min(settings.max_tokens, longest or settings.max_tokens)
    kinds = tuple(weights or (settings.weights,))
    every = list(_candidates(architecture, settings, kinds, loaded, tokens, calibration))
    least = _least(every)
    fitting = [each for each in every if each.needed_bytes + runtime_bytes <= budget_bytes]
    if not fitting:
        nf4 = _least(_candidates(architecture, settings, ("nf4",), loaded, tokens, calibration))
        raise BudgetExceeded(_refusal(least, nf4, settings, runtime_bytes, budget_bytes))
    chosen = min(fitting, key=lambda each: (each.cost, each.needed_bytes))
    faster = [each for each in every if each.cost < chosen.cost]
    return Plan(
        chosen=chosen,
        faster=min(faster, key=lambda each: each.needed_bytes, default=None),
        least=least,
        limit_bytes=lower_limit(architecture, chosen.setup).total_bytes,
        runtime_bytes=runtime_bytes,
        budget_bytes=budget_bytes,
        loading_bytes=architecture.parameters * _size(loaded),
    )


def setup_of(
    architecture: Architecture, settings: config.Tuning, fit: Fit, tokens: int, weights: str, loaded: str
) -> Setup:
    """Returns the sizes of a step of sequences of `tokens` tokens, as `limit` and `predict` want them."""
    kind = loaded if weights == "as loaded" else weights
    compute = settings.compute_dtype if kind in _DECODE else kind
    adapter = _size(settings.adapter_dtype)
    return Setup(
        batch=max(fit.tokens // tokens, 1),
        sequence=tokens,
        weight_bits=WEIGHT_BITS.get(kind, 8.0 * _size(kind)),
        embedding_bytes=_size(compute),
        activation_bytes=_size(compute),
        rank=settings.rank,
        adapter_bytes=adapter,
        optimizer_bytes=2 * adapter if settings.optimizer == "adamw" else ADAM_8BIT_BYTES,
        loss_chunk=fit.loss_chunk,
        modules=None if settings.targets == "all-linear" else settings.targets,
        top_layers=settings.top_layers,
        accumulates=fit.tokens < settings.batch_size * tokens,
    )


def calibrate(step: Callable[[], object], alive: Iterable[torch.Tensor], predicted: Parts, tokens: int) -> Calibration:
    """Does `step` twice, of `tokens` tokens, which is predicted to take `predicted`; once for its time.

    `alive` are the tensors that exist before it. The first step of a run has no moments yet, so do one before.
    """
    from edge_sdss.tuning.memory import PeakTensorBytes

    with PeakTensorBytes(alive) as memory:
        step()
    began = perf_counter()
    step()
    seconds = perf_counter() - began
    there = predicted.resident_bytes
    ratio = max(memory.peak - there, 0) / max(predicted.peak_bytes - there, 1)
    return Calibration(ratio, seconds / tokens)


def _candidates(
    architecture: Architecture,
    settings: config.Tuning,
    kinds: Sequence[config.Weights],
    loaded: str,
    tokens: int,
    calibration: Calibration | None,
) -> Iterator[Candidate]:
    modes = {"auto": (False, True), "on": (True,), "off": (False,)}[settings.checkpointing]
    ratio = 1.0 if calibration is None else calibration.ratio
    chunks = _halves(settings.loss_chunk, min(LEAST_CHUNK, settings.loss_chunk))
    for kind in dict.fromkeys(kinds):
        for sequences in _halves(settings.batch_size, 1):
            for chunk in chunks:
                for checkpointing in modes:
                    fit = Fit(sequences * tokens, chunk, checkpointing, settings.max_tokens)
                    setup = setup_of(architecture, settings, fit, tokens, kind, loaded)
                    parts = predict(architecture, setup, checkpointing=checkpointing, dropout=settings.dropout > 0)
                    needed = parts.resident_bytes + round(ratio * (parts.peak_bytes - parts.resident_bytes))
                    cost = _cost(architecture, setup, checkpointing, loaded if kind == "as loaded" else kind)
                    yield Candidate(
                        fit, kind, setup, parts, needed, _WORKSPACE_BYTES + _TOKEN_BYTES * architecture.vocabulary, cost
                    )


def _least(candidates: Iterable[Candidate]) -> Candidate:
    return min(candidates, key=lambda each: (each.needed_bytes, each.cost))


def _halves(most: int, least: int) -> list[int]:
    found = [most]
    while found[-1] > least:
        found.append(max(found[-1] // 2, least))
    return found


def _cost(architecture: Architecture, setup: Setup, checkpointing: bool, kind: str) -> float:
    """Multiply-adds of a token."""
    weights, trained = architecture.linear_parameters, setup.top_layers or architecture.layers
    again = 1 - architecture.hidden * architecture.mlp * architecture.layers / weights  # its last product is spared
    passes = 1 + (1 + (again if checkpointing else 0)) * trained / architecture.layers
    layers = passes * weights * (1 + (_PASS_TOKENS + _DECODE.get(kind, 0.0)) / setup.tokens)
    chunk = min(setup.loss_chunk, setup.tokens)
    return layers + 2 * architecture.vocabulary * architecture.hidden * (1 + _CHUNK_TOKENS / chunk)


def _size(dtype: str) -> int:
    return 4 if dtype == "float32" else 2


def _check(architecture: Architecture, settings: config.Tuning) -> None:
    if architecture.logit_cap is not None:
        found = f"a {architecture.family} caps its logits, which the loss here does not"
        raise InputError(message("plan a round of tuning", found, "choose a Llama-like model"))
    if settings.dora:
        found = "what DoRA takes is not predicted"
        raise ConfigError(message("plan a round of tuning", found, "turn tuning.dora off, or tune without a budget"))


def _refusal(least: Candidate, nf4: Candidate, settings: config.Tuning, runtime: int, budget: int) -> str:
    needed = f"the least that would do is {_mib(least.needed_bytes + runtime)}"
    found = f"{needed}, {_mib(least.tensor_bytes)} of them tensors, the rest Python, libraries and kernels"
    ways = ["give so much"]
    if settings.checkpointing == "off":
        ways.append("let layers be recomputed (tuning.checkpointing)")
    if nf4.needed_bytes < least.needed_bytes:
        ways.append(f"set tuning.weights to nf4, which does with {_mib(nf4.needed_bytes + runtime)}")
    ways.append("train fewer tokens (tuning.max_tokens) or layers (tuning.top_layers)")
    return message(f"train within {_mib(budget)}", found, f"{', '.join(ways[:-1])}, or {ways[-1]}")


def _mib(size: int) -> str:
    """Rounded up: so much does."""
    return f"{-(-size >> 20):,} MiB"
