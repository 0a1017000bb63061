"""The steps of a round one after the other, and what is done where memory runs out: the same step again with less.

Knows nothing of the round's files but its checkpoints, and nothing of processes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_sdss import config
from edge_sdss.errors import BudgetExceeded, message
from edge_sdss.page.formats import mib
from edge_sdss.tuning import adapter
from edge_sdss.tuning.checkpoint import Checkpoints, State, fresh
from edge_sdss.tuning.child import Stopped
from edge_sdss.tuning.fit import Fit
from edge_sdss.tuning.outofmemory import free, is_out_of_memory
from edge_sdss.tuning.pacing import Pace, Unhurried
from edge_sdss.tuning.records import Step
from edge_sdss.tuning.stopping import Stopping, split
from edge_sdss.types import Example, Progress

if TYPE_CHECKING:
    from edge_sdss.lm import Encoded, LanguageModel
    from edge_sdss.tuning.steps import Optimisation
    from edge_sdss.tuning.watchdog import Watchdog

_PATIENCE_S = 5.0  # for others on the machine to give memory back


@dataclass(frozen=True)
class Conditions:
    """Under which a round is trained: what it keeps to, and whom it tells.

    `fit` is what to begin with, None for the plain one; `stepped_down` what was given up already. `check` raises
    Stopped where the round is to end. `on_event` hears {"began": ...} with the fit that the sequences really need,
    {"step": ...} after each step, {"held_out": ...} after an epoch with patience, {"stepped_down": ...} where memory
    ran out. `facts` are asked at the end, for the card.
    """

    fit: Fit | None = None
    stepped_down: Sequence[Mapping[str, Any]] = ()
    watch: Watchdog | None = None
    pace: Pace = field(default_factory=Unhurried)
    check: Callable[[], None] = lambda: None
    on_event: Callable[[dict[str, Any]], None] = lambda event: None
    facts: Callable[[], Mapping[str, Any]] = dict


class _Torn(Exception):
    """The weights are half new."""


class Course:
    """The way from the first step to the last, with whatever falls out on it."""

    def __init__(
        self,
        lm: LanguageModel,
        examples: Sequence[Example],
        settings: config.Tuning,
        checkpoints: Checkpoints,
        conditions: Conditions,
        progress: Progress,
    ):
        self._lm, self._settings = lm, settings
        self._examples, self._held_out = split(examples, settings)
        self._stopping = self._begun(())
        self._checkpoints, self._conditions, self._progress = checkpoints, conditions, progress
        self._fit = conditions.fit or Fit.of(settings)
        self._stepped_down = list(conditions.stepped_down)
        self._written: int | None = None  # the step of the newest checkpoint

    def run(self, start: Path | None, folder: Path) -> dict[str, Any]:
        """Writes the adapter into the folder, made anew, and returns what was measured.

        Raises BudgetExceeded where the smallest fit takes too much memory, after a checkpoint; ConfigError where
        the loss is not finite.
        """
        import torch

        with torch.random.fork_rng():
            while True:
                torch.manual_seed(self._settings.seed)
                with suppress(_Torn), adapter.trainable(self._lm, self._settings, start) as adapted:
                    measured = self._steps(adapted)
                    adapter.write(adapted, fresh(folder), self._lm.name)
                    return measured

    def _steps(self, adapted: adapter.Trainable) -> dict[str, Any]:
        from edge_sdss.tuning.steps import Optimisation

        encoded = self._encoded(self._settings.max_tokens, self._examples)
        held_out = self._encoded(self._settings.max_tokens, self._held_out)
        longest = max(len(each.ids) for each in [*encoded, *held_out])
        self._fit = self._fit.of_sequences(longest, self._settings.batch_size)
        run = Optimisation(adapted, encoded, self._settings, self._check)
        self._resume(run)
        if self._fit.max_tokens < longest:
            run.shorten(self._encoded(self._fit.max_tokens, self._examples))
        self._conditions.on_event({"began": {"step": len(run.done), "fit": asdict(self._fit)}})
        self._progress("tune", len(run.done), run.steps)
        try:
            while True:
                self._measure_if_due(run)
                if len(run.done) == run.steps or self._stopping.over:
                    break
                self._conditions.pace.before_step()
                self._insist(run, lambda: run.advance(self._fit))
                self._tell(run)
                if len(run.done) % self._settings.checkpoint_every == 0 and len(run.done) < run.steps:
                    self._keep(run)
        except (Stopped, KeyboardInterrupt):
            self._keep(run)
            raise
        if self._stopping.best is not None:
            run.put_weights(self._checkpoints.best(self._stopping.best))
        return self._measured(run)

    def _measure_if_due(self, run: Optimisation) -> None:
        """At the end of an epoch, the loss of what is held out; the weights are kept where it is the lowest so far."""
        step = len(run.done)
        if not self._stopping.due(step, run.steps_each):
            return
        losses: list[float] = []
        held_out = self._held_out
        self._insist(run, lambda: losses.append(run.measure(self._encoded(self._fit.max_tokens, held_out), self._fit)))
        self._stopping.measured.append({"step": step, "loss": losses[0]})
        if self._stopping.best == step:
            self._checkpoints.put_best(step, run.weights)
        told = {"step": step, "loss": losses[0], "best": self._stopping.best, "over": self._stopping.over}
        self._conditions.on_event({"held_out": told})

    def _insist(self, run: Optimisation, work: Callable[[], None]) -> None:
        """Does work in as many attempts as it takes."""
        while (caught := _attempt(work)) is not None:
            why = (str(caught).splitlines() or [type(caught).__name__])[0][:200]
            run.discard()
            free(caught)
            caught = None
            self._step_down(run, why)

    def _step_down(self, run: Optimisation, why: str) -> None:
        smaller, watch = self._fit.smaller(), self._conditions.watch
        if smaller is None or (watch is not None and not _recovers(watch)):
            self._keep(run)
            asked = "tune the model" if watch is None else f"tune the model in {mib(watch.budget_bytes)}"
            found = f"out of memory at step {len(run.done) + 1} with {self._fit.words}, {why}"
            do = "free or allow more memory and run it again, or lower tuning.rank, top_layers or weights"
            raise BudgetExceeded(message(asked, found, do))
        told = {"step": len(run.done) + 1, "words": smaller.instead_of(self._fit), "why": why, "fit": asdict(smaller)}
        if smaller.max_tokens != self._fit.max_tokens:
            run.shorten(self._encoded(smaller.max_tokens, self._examples))
        self._fit = smaller
        self._stepped_down.append(told)
        self._conditions.on_event({"stepped_down": told})
        if run.torn:
            raise _Torn

    def _check(self) -> None:
        self._conditions.check()
        if self._conditions.watch is not None:
            self._conditions.watch.check()

    def _encoded(self, max_tokens: int, examples: Sequence[Example]) -> list[Encoded]:
        return [self._lm.encode(example, max_tokens) for example in examples]

    def _tell(self, run: Optimisation) -> None:
        last, watch = run.done[-1], self._conditions.watch
        told = {
            "step": last.step,
            "steps": run.steps,
            "loss": last.loss,
            "tokens_per_s": last.tokens / last.seconds,
            "eta_s": sum(step.seconds for step in run.done) / last.step * (run.steps - last.step),
            "peak_bytes": None if watch is None else watch.peak_bytes,
            "budget_bytes": None if watch is None else watch.budget_bytes,
        }
        self._conditions.on_event({"step": told})
        self._progress("tune", last.step, run.steps)

    def _measured(self, run: Optimisation) -> dict[str, Any]:
        return {
            "tokens": sum(step.tokens for step in run.done),
            "seconds": sum(step.seconds for step in run.done),
            "trainable_parameters": run.trainable_parameters,
            "peak_tensor_bytes": run.peak_tensor_bytes,
            "fit": asdict(self._fit),
            "stepped_down": self._stepped_down,
            "held_out": self._stopping.measured,
            "best_step": self._stopping.best,
            **self._conditions.facts(),
            "losses": [asdict(step) for step in run.done],
        }

    def _keep(self, run: Optimisation) -> None:
        """Writes a checkpoint, unless it is there or the weights are half new."""
        done = len(run.done)
        if run.torn or done in (0, self._written):
            return
        record = {
            "done": [asdict(step) for step in run.done],
            "peak_tensor_bytes": run.peak_tensor_bytes,
            "fit": asdict(self._fit),
            "stepped_down": self._stepped_down,
            "held_out": self._stopping.measured,
        }
        try:
            self._checkpoints.write(State(done, run.tensors(), record))
            self._written = done
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self._conditions.on_event({"note": f"no checkpoint after step {done}: {error}"})

    def _begun(self, measured: Sequence[Mapping[str, Any]]) -> Stopping:
        return Stopping(self._settings.patience if self._held_out else None, measured)

    def _resume(self, run: Optimisation) -> None:
        self._stopping = self._begun(())
        state = self._checkpoints.newest()
        if state is not None:
            record = state.record
            run.restore(state.tensors, [Step(**step) for step in record["done"]], record["peak_tensor_bytes"])
            self._fit = self._fit.within(Fit(**record["fit"]))
            earlier = record["stepped_down"]
            self._stepped_down = [*earlier, *(each for each in self._stepped_down if each not in earlier)]
            self._stopping = self._begun(record["held_out"])
            self._written = state.step


def _attempt(work: Callable[[], None]) -> Exception | None:
    """Does work. Returns an error that means out of memory, to be dealt with where no frame holds tensors."""
    try:
        work()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return error
    return None


def _recovers(watch: Watchdog) -> bool:
    """Whether, all being freed, the budget is kept again; waits where it is others who took the memory."""
    until = time.monotonic() + _PATIENCE_S
    while not watch.clear():
        used = watch.look().used
        if time.monotonic() > until or (used is not None and used > watch.budget_bytes):
            return False
        time.sleep(0.1)
    return True
