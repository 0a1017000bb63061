"""E(T) of a dialogue by the model that a session has, and the name of what E(T) then is.

The same words have other embeddings by another computation (torch in float32, a graph of 4 bits) and in other
surroundings: alone, or in a chat, behind the template and the turns before them. A bundle's engine embeds in the
chat, because that is what it computes anyhow while it answers (ADR 0010). Knows nothing of scores.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any, TypeAlias

from edge_sdss.config import Config
from edge_sdss.lm import LanguageModel
from edge_sdss.runtime import Embeddings, Engine, Stream
from edge_sdss.types import Dialogue, FloatArray

Model: TypeAlias = LanguageModel | Engine

BEFORE = "text alone, torch float32"
"""The source of homes that do not say one."""


def source(model: Model, settings: Config) -> str:
    """Names what `of` returns: embeddings of equal name compare, others do not."""
    if not isinstance(model, Engine):
        return f"text alone, torch {settings.model.dtype}"
    hashes = "".join(sorted(f"{entry.path} {entry.sha256}\n" for entry in model.manifest.files))
    return f"in the chat, graph {hashlib.sha256(hashes.encode()).hexdigest()[:16]}"


def of(model: Model, dialogue: Dialogue, settings: Config) -> Any:
    """Returns E(T) by a forward pass of the base model, [n, d] float32, NumPy or torch as the model is.

    Raises InputError where there is nothing to embed, or the bundle's graph gives no hidden states.
    """
    limit = settings.model.max_tokens
    if isinstance(model, Engine):
        answer = dialogue.response if settings.selection.text == "dialogue" else ""
        return rows(model.embed(dialogue.messages, answer, limit), settings)
    text = dialogue.prompt if settings.selection.text == "prompt" else dialogue.text
    return model.token_embeddings(text, limit)


def of_answer(engine: Engine, stream: Stream, settings: Config) -> FloatArray | None:
    """Returns E(T) of what a stream has answered, without a forward pass where the base model alone answered.

    With an adapter active its hidden states are of the adapted model, so the base model prefills the same ids, of a
    conversation that goes on only the new ones. None where the stream was to keep no embeddings.
    """
    found = stream.embeddings
    if found is not None and found.adapter:
        found = replace(found, states=engine.hidden_states(found.ids, follows=True), adapter={})
    return None if found is None else rows(found, settings)


def rows(found: Embeddings, settings: Config) -> FloatArray:
    """Returns the rows that are scored: of the last turn's text and the answer, or of the text alone."""
    scored = found.states[found.asked] if settings.selection.text == "prompt" else found.dialogue()
    return scored[: settings.model.max_tokens]
