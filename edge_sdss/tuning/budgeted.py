"""A round in a process of its own, within a budget of memory. The parent survives what becomes of the child.

    parent   model and examples ──▶ child   load, quantise, watch, pace, train
             ◀── loss, speed, peak, what was given up
    the child died for memory, or by a SIGKILL that nobody owns up to ──▶ a new one, with the next smaller fit,
                                                                         from the newest checkpoint

The budget is of the child: RSS, on a GPU that works in main memory with what it has reserved there; on a GPU with
memory of its own, what torch reserves on it. Loading goes tensor by tensor, so that it takes no more than training.
Knows nothing of what a step is.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_sdss import config, default_model
from edge_sdss.errors import BudgetExceeded, ConfigError, InputError, message
from edge_sdss.lm import LanguageModel, loading
from edge_sdss.page.formats import mib
from edge_sdss.processes import sizes
from edge_sdss.tree import Tree
from edge_sdss.tuning import adapter, libraries, outofmemory, pacing, planner, shapes, trainer
from edge_sdss.tuning.ceiling import shares_memory
from edge_sdss.tuning.fit import LEAST_CHUNK, Fit
from edge_sdss.tuning.limit import lower_limit
from edge_sdss.tuning.records import Round
from edge_sdss.tuning.supervisor import Died, supervise
from edge_sdss.tuning.watchdog import Watchdog, limit_cuda
from edge_sdss.types import Example, Progress, Role, Turn, no_progress

if TYPE_CHECKING:
    from edge_sdss.tuning.child import Channel

DEATHS = 12
"""After so many the round is given up; its checkpoint stays."""

LOADS = 3
"""So often, in a row, loading is tried where nobody says why the process was ended."""

GLIBC = {"MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "1048576"}
"""From which size on freed memory goes back at once. Else glibc raises it as it goes, and 1364 MiB instead of 1038 were
seen (135M, fp32); with 1 MiB, holes between smaller tensors took 7 % more at 256 tokens a time, for 13 % less time."""

OnEvent = Callable[[dict[str, Any]], None]


def train(
    model: config.Model,
    examples: Sequence[Example],
    settings: config.Tuning,
    out: Path,
    *,
    budget_bytes: int | None,
    fit: Fit | None = None,
    start: Path | None = None,
    card: Mapping[str, Any] = {},
    replace: bool = False,
    progress: Progress = no_progress,
    on_event: OnEvent = lambda event: None,
) -> Round:
    """Does what `trainer.train` does with the model, its weights held as `settings.weights` says, in a child.

    `fit` is what to begin with, None for what is fastest within `budget_bytes` for examples of these lengths, or for
    the plain one without a budget. What the round comes to is that of `trainer.train` with the same fits. Events,
    besides those of `trainer.Conditions`:
    {"ready": {"resident_bytes", "load_peak_rss_bytes"}}, {"note": words}, and at the end {"peak_rss_bytes"}, which
    is since it was ready. Ctrl-C is heeded after a checkpoint.
    Raises BudgetExceeded at once where the budget is below the least that would do, or later where the smallest
    fit is too large or the child died for it too often; supervisor.Died where it died of something else; and
    what `trainer.train` raises.
    """
    folder = loading.find(model.name, progress)
    if budget_bytes is not None:
        _refuse_below(_least_bytes(folder, model, settings), libraries.least_bytes(), budget_bytes)
        libraries.runtime_bytes()  # measured here, where there is room for a process more; the child looks it up
    course = _Course(fit, on_event)
    payload = {
        "model": model.model_dump(mode="json"),
        "examples": [[[[t.role, t.text] for t in e.messages], e.answer, e.dialogue_id] for e in examples],
        "settings": settings.model_dump(mode="json"),
        "out": str(out),
        "start": None if start is None else str(start),
        "card": dict(card),
        "replace": replace,
        "budget_bytes": budget_bytes,
    }
    segments = outofmemory.expandable_segments(default_model.cache())
    pinned = {name: value for name, value in (GLIBC | loading.PATIENT).items() if name not in os.environ}
    env = pinned | outofmemory.allocator_environment(segments, os.environ)
    while True:
        begin = {"fit": course.fit and asdict(course.fit), "stepped_down": course.stepped_down}
        try:
            supervise(
                "edge_sdss.tuning.budgeted:in_child",
                {**payload, **begin},
                progress=progress,
                on_event=course.hear,
                env=env,
            )
            return trainer.load(out)
        except Died as died:
            course.after(died, budget_bytes)


class _Course:
    """What the parent knows of the round, from what the child told it."""

    def __init__(self, fit: Fit | None, on_event: OnEvent):
        self.fit = fit  # None: not known before the child has begun
        self.stepped_down: list[dict[str, Any]] = []
        self._on_event = on_event
        self._ready = False
        self._deaths = self._loads = self._step = 0
        self._why = ""

    def hear(self, event: dict[str, Any]) -> None:
        if "began" in event:
            self._ready, self._loads = True, 0
            self.fit = Fit(**event["began"]["fit"])
        if "stepped_down" in event:
            self.stepped_down.append(event["stepped_down"])
            self.fit = Fit(**event["stepped_down"]["fit"])
        self._step = event.get("step", {}).get("step", self._step)
        self._why = event.get("note", self._why)
        self._on_event(event)

    def after(self, died: Died, budget_bytes: int | None) -> None:
        """Makes ready for the next child; raises where another would be of no use."""
        if not died.oom and died.signal != signal.SIGKILL:
            raise died
        was_ready, self._ready = self._ready, False
        why, self._why = self._why or str(died), ""
        self._deaths += 1
        self._loads += not was_ready
        if not was_ready and not died.oom and self._loads < LOADS:
            return  # no smaller fit loads a model with less
        before = self.fit if was_ready else None
        smaller = before and before.smaller()
        if before is None or smaller is None or self._deaths >= DEATHS:
            asked = "tune the model" + ("" if budget_bytes is None else f" in {mib(budget_bytes)}")
            when = f"with {before.words}" if before else "while the model was loaded"
            found = f"the process was ended {when}, {why.rstrip('.')}"
            do = "free or allow more memory and run it again, which goes on from the last checkpoint"
            raise BudgetExceeded(message(asked, found, do)) from died
        told = {"step": self._step + 1, "words": smaller.instead_of(before), "why": why, "fit": asdict(smaller)}
        self.hear({"stepped_down": told})


def in_child(payload: dict[str, Any], channel: Channel) -> None:
    """The child's part of `train`."""
    settings = config.Tuning.model_validate(payload["settings"])
    model = config.Model.model_validate(payload["model"])
    budget_bytes, start = payload["budget_bytes"], payload["start"]
    loading.torch_module()
    if budget_bytes is not None and not _own_memory(loading.device_of(model.device)):
        least = _least_bytes(loading.find(model.name, channel.progress), model, settings)
        _refuse_below(least, max(_memory("VmRSS"), libraries.least_bytes()), budget_bytes)
    lm = _loaded(model, settings, channel)
    examples = [_example(*each) for each in payload["examples"]]
    with _conditions(payload, settings, lm, examples, channel) as conditions:
        trainer.train(
            lm,
            examples,
            settings,
            Path(payload["out"]),
            start=None if start is None else Path(start),
            card=payload["card"],
            replace=payload["replace"],
            progress=channel.progress,
            conditions=conditions,
        )


def _example(messages: Sequence[tuple[Role, str]], answer: str, dialogue_id: str) -> Example:
    return Example(tuple(Turn(role, text) for role, text in messages), answer, dialogue_id)


def _loaded(model: config.Model, settings: config.Tuning, channel: Channel) -> LanguageModel:
    """The model with its weights held as they are to be."""
    lm = adapter.load(model, settings, channel.progress)
    outofmemory.free()
    channel.check()
    return lm


@contextmanager
def _conditions(
    payload: Mapping[str, Any],
    settings: config.Tuning,
    lm: LanguageModel,
    examples: Sequence[Example],
    channel: Channel,
) -> Iterator[trainer.Conditions]:
    """Inside, the process is held to its budget."""
    budget_bytes, load_peak, own = payload["budget_bytes"], _memory("VmHWM"), _own_memory(lm.device.type)
    with suppress(OSError):  # the peak counts from here on (proc(5): 5 resets it)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    channel.event({"ready": {"resident_bytes": _memory("VmRSS"), "load_peak_rss_bytes": load_peak}})
    if budget_bytes is not None and lm.device.type == "cuda":
        limit_cuda(budget_bytes if own else max(budget_bytes - _memory("VmRSS"), 1))

    def facts() -> dict[str, Any]:
        peak = max(_memory("VmHWM"), watch.peak_bytes if watch else 0)
        return {"budget_bytes": budget_bytes, "peak_rss_bytes": peak, "load_peak_rss_bytes": load_peak}

    def last_resort(why: str) -> None:
        channel.event({"note": why})
        os.kill(os.getpid(), signal.SIGKILL)

    def note(words: str) -> None:
        channel.event({"note": words})

    with ExitStack() as stack:
        watch = None
        if budget_bytes is not None and not own:
            watch = Watchdog(budget_bytes, reserve_bytes=settings.reserve, last_resort=last_resort)
            stack.enter_context(watch)
        pace = pacing.pace(settings.max_celsius, note)
        if isinstance(pace, pacing.Cool):
            stack.callback(pace.close)
        fit = (
            Fit(**payload["fit"])
            if payload["fit"]
            else _fastest(lm, examples, payload["model"], settings, budget_bytes)
        )
        yield trainer.Conditions(fit, payload["stepped_down"], watch, pace, channel.check, channel.event, facts)


def _own_memory(device: str) -> bool:
    """Whether the device is a GPU that has memory of its own, which the budget is of then."""
    import torch

    return device == "cuda" and not shares_memory(Tree(), torch.cuda)


def _memory(name: str) -> int:
    return sizes(Tree(), "proc/self/status").get(name, 0)


def planned(model: config.Model, settings: config.Tuning, budget_bytes: int, longest: int | None = None) -> Fit | None:
    """Returns the fastest fit that should keep to the budget; None for a model of a family that cannot be predicted.

    `longest` is the longest example, in tokens, where that is known.
    Raises BudgetExceeded, with the least that would do, where none does.
    """
    options: dict[str, Any] = {"loaded": model.dtype, "longest": longest}
    try:
        known = shapes.of(loading.find(model.name, no_progress) / "config.json")
        for runtime in (libraries.least_bytes, libraries.runtime_bytes):  # the first refuses at once
            found = planner.plan(known, budget_bytes, settings, runtime_bytes=runtime(), **options)
        return found.fit
    except (InputError, ConfigError):
        return None


def _fastest(
    lm: LanguageModel,
    examples: Sequence[Example],
    model: Mapping[str, Any],
    settings: config.Tuning,
    budget_bytes: int | None,
) -> Fit:
    """The fastest fit for these very examples: where they are short, more of them go through together."""
    if budget_bytes is None:
        return Fit.of(settings)
    longest = max(len(lm.encode(example, settings.max_tokens).ids) for example in examples)
    return planned(config.Model.model_validate(model), settings, budget_bytes, longest) or Fit.of(settings)


def _least_bytes(folder: Path, model: config.Model, settings: config.Tuning) -> int | None:
    """M* of the least that can be asked for, a lower bound for any fit; None where the family is not known."""
    fit = Fit(tokens=1, loss_chunk=LEAST_CHUNK, checkpointing=True, max_tokens=LEAST_CHUNK)
    try:
        known = shapes.of(folder / "config.json")
        setup = planner.setup_of(known, settings, fit, fit.max_tokens, settings.weights, model.dtype)
        return lower_limit(known, setup).total_bytes
    except InputError:  # not ours to complain of: training itself says what is wrong
        return None


def _refuse_below(least: int | None, runtime: int, budget_bytes: int) -> None:
    if least is not None and least + runtime > budget_bytes:
        found = f"model, adapter and the shortest step take {mib(least)}, "
        found += f"Python and torch {mib(runtime)}"
        do = f"allow at least {mib(least + runtime + (1 << 20))}, or hold the weights in fewer bits"
        raise BudgetExceeded(message(f"tune the model in {mib(budget_bytes)}", found, do))
