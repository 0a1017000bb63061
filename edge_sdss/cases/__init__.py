"""What `edge-sdss profile` measures: one file a case, found by its name.

A case's file has a docstring whose first sentence says what a repetition does, `ITEM` (what is counted), and
`open(subject)`, a context manager that prepares and yields the callable which does one repetition. It may
have `PRIMARY` (the metric to compare by, else `time`), `test(subject)` (its label, else its name), and
`RUNS` and `REPETITIONS` where it is too long for the plan's. Knows nothing of clocks or sensors.
"""

from __future__ import annotations

import importlib
import pkgutil
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_sdss.config import Config
from edge_sdss.errors import InputError, message
from edge_sdss.profiling.harness import Workload
from edge_sdss.types import Dialogue, Progress, no_progress

if TYPE_CHECKING:
    from edge_sdss.lm import LanguageModel

ORDER = ("load", "embed", "select", "offer", "prefill", "decode", "synth", "train-step", "round")


class Subject:
    """What the cases work on: the model, dialogues, and a folder for what they write. Close it."""

    def __init__(
        self,
        settings: Config,
        *,
        lm: LanguageModel | None = None,
        clock: Callable[[], float] = time.perf_counter,
        progress: Progress = no_progress,
    ) -> None:
        self.settings = settings
        self.progress = progress
        self._lm = lm
        self.clock = clock
        self.folder = Path(tempfile.mkdtemp(prefix="edge_sdss-profile-"))

    @property
    def lm(self) -> LanguageModel:
        """The base model, loaded when first needed."""
        return self._lm or self.load()

    def load(self) -> LanguageModel:
        """Loads the model anew; the one before is given free first."""
        from edge_sdss.lm import LanguageModel

        self._lm = None
        loaded = self._lm = LanguageModel.load(self.settings.model, progress=self.progress)
        return loaded

    @cached_property
    def dialogues(self) -> list[Dialogue]:
        """The packaged stream of one user."""
        from edge_sdss import demo

        return list(demo.stream().offered)

    def scratch(self) -> Path:
        """A new empty folder."""
        return Path(tempfile.mkdtemp(dir=self.folder))

    def prompt(self, tokens: int) -> list[int]:
        """A prompt of exactly so many tokens, of the dialogues' text. Raises InputError beyond the context."""
        if tokens >= self.lm.context:
            found = f"the model's context has {self.lm.context}"
            raise InputError(message(f"make a prompt of {tokens} tokens", found, "set profile.prompt_tokens lower"))
        ids: list[int] = []
        for dialogue in self.dialogues:
            ids += self.lm.tokenizer(f"{dialogue.text}\n", add_special_tokens=False)["input_ids"]
            if len(ids) >= tokens:
                return ids[:tokens]
        return (ids * -(-tokens // len(ids)))[:tokens]

    def close(self) -> None:
        """Removes what the cases wrote."""
        shutil.rmtree(self.folder, ignore_errors=True)


def names() -> tuple[str, ...]:
    """Every case there is, in the order of the work that they are part of."""
    found = {file.name.replace("_", "-") for file in pkgutil.iter_modules(__path__)}
    return (*(name for name in ORDER if name in found), *sorted(found - set(ORDER)))


def module(name: str) -> Any:
    """Returns a case's module. Raises InputError for an unknown name."""
    if name not in names():
        raise InputError(message(f"profile {name!r}", "no such case", f"choose among {', '.join(names())}"))
    return importlib.import_module(f"edge_sdss.cases.{name.replace('-', '_')}")


def about(name: str) -> str:
    """What a repetition of a case does, in one sentence."""
    return str(module(name).__doc__).split("\n\n")[0].replace("\n", " ").strip()


def workloads(chosen: Sequence[str], subject: Subject) -> list[Workload]:
    """The cases as the harness takes them. Raises InputError for an unknown name."""
    return [_workload(name, subject) for name in dict.fromkeys(chosen)]


def _workload(name: str, subject: Subject) -> Workload:
    case = module(name)
    test = getattr(case, "test", None)
    settings = getattr(case, "settings", None)
    return Workload(
        name=name,
        test=test(subject) if test else name,
        about=about(name),
        item=case.ITEM,
        open=partial(case.open, subject),
        primary=getattr(case, "PRIMARY", "time"),
        settings=settings(subject) if settings else {},
        runs=getattr(case, "RUNS", None),
        repetitions=getattr(case, "REPETITIONS", None),
    )
