"""The records that pass between the stages. Knows nothing of models, files or storage."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.floating[Any]]
Role = Literal["system", "user", "assistant"]

Progress = Callable[[str, int, int], None]
"""Called as progress(stage, done, total) while long work goes on."""


def no_progress(stage: str, done: int, total: int) -> None:
    """The default `Progress`: says nothing."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a conversation."""

    role: Role
    text: str


@dataclass(frozen=True)
class Dialogue:
    """One exchange T of the stream: the user's prompt and the assistant's response.

    `context` holds the turns before the prompt. `preferred` is the answer the user would have
    wanted, where the stream knows it; selection never looks at it. `conversation` names the
    conversation that the exchange comes from, so that a split never cuts one in two.
    """

    prompt: str
    response: str
    context: tuple[Turn, ...] = ()
    preferred: str | None = None
    conversation: str | None = None
    time: str | None = None
    source: str = ""

    @cached_property
    def id(self) -> str:
        """16 hexadecimal digits of the content: equal text, equal id, on every machine."""
        parts = [f"{turn.role}\x1f{turn.text}" for turn in self.context]
        content = "\x1e".join([*parts, self.prompt, self.response])
        return hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()

    @property
    def text(self) -> str:
        """What is scored: prompt and response."""
        return f"{self.prompt}\n{self.response}" if self.response else self.prompt

    @property
    def messages(self) -> tuple[Turn, ...]:
        """The turns that a model answers: the context, then the prompt."""
        return (*self.context, Turn("user", self.prompt))


@dataclass(frozen=True, slots=True)
class Example:
    """What a model is trained or measured on: the turns it sees and the answer it should give."""

    messages: tuple[Turn, ...]
    answer: str
    dialogue_id: str = ""


@dataclass(frozen=True, slots=True)
class Scores:
    """The three quality metrics of a dialogue, each in [0, 1], higher is better (paper, section 3.1)."""

    eoe: float
    dss: float
    idd: float


Answer = Literal["accept", "edit", "skip"]


@dataclass(frozen=True, slots=True)
class Annotation:
    """What the user said of a kept dialogue. `preferred` is set for an edit."""

    answer: Answer
    preferred: str | None = None


@dataclass(frozen=True)
class Exemplar:
    """A dialogue in the buffer. `vector` is the stored form of e(T), as the buffer's codec made it.

    `value` is what the policy asked for beyond the scores, see `surprise`; 0 where it asks for nothing.
    """

    dialogue: Dialogue
    vector: bytes
    domain: str
    eoe: float
    dss: float
    words: int
    seq: int
    annotation: Annotation | None = None
    value: float = 0.0


@dataclass(frozen=True)
class Decision:
    """What became of one offer, and why.

    `action` is "kept" or "dropped"; `slot` is the bin it went to; `evicted` maps the bins that were
    emptied for it to the ids of the dialogues that left. `remembered` holds the parts of the policy's memory of the
    stream that the offer changes.
    """

    seq: int
    dialogue_id: str
    action: Literal["kept", "dropped"]
    domain: str
    scores: Scores
    reason: str
    slot: int | None = None
    evicted: Mapping[int, str] = field(default_factory=dict)
    exemplar: Exemplar | None = None
    remembered: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Variant:
    """A synthesised paraphrase of an exemplar's pair. `dropped` holds the reason, None if it is kept."""

    dialogue_id: str
    prompt: str
    response: str
    rouge1: float
    dropped: str | None = None


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean with its 95 % interval over n paired items."""

    mean: float
    lo: float
    hi: float
    n: int
