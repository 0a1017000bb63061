"""What PEFT computes with an adapter, written where it is trained; whether the engine computes the same, asked later.

Knows nothing of how a graph is made.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edge_sdss import bundles
from edge_sdss.bundles import Check, checks, peft, probe
from edge_sdss.errors import InputError, ParityError, message
from edge_sdss.files import sha256
from edge_sdss.types import Progress, Turn, no_progress

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edge_sdss.lm import LanguageModel

PROMPTS = (
    "What should I cook for dinner tonight? I have rice, two eggs and an onion left.",
    "My doctor says that I should walk more, but it rains every day here in autumn. What can I do instead?",
    "Please write two sentences to my sister, who starts her new job on Monday.",
)
_TOKENS = 64


def has_torch() -> bool:
    """Whether what loads a model to compare with is installed."""
    return all(importlib.util.find_spec(name) for name in ("torch", "transformers", "peft"))


def record(lm: LanguageModel, adapter: Path) -> None:
    """Writes into a PEFT folder what PEFT computes with it: a few forward passes, some kilobytes.

    Raises InputError where the adapter is not of this model, or the folder cannot be written.
    """
    from edge_sdss.exporting.ways import of_peft

    prompts = [lm.chat.prompt_ids([Turn("user", text)], _TOKENS) for text in PROMPTS]
    before = lm.adapter
    lm.attach(adapter)
    try:
        made_of = {"base_fingerprint": lm.fingerprint, "source_sha256": sha256(adapter / peft.WEIGHTS)}
        taken = probe.take(of_peft(lm.model), adapter.name, prompts, **made_of)
    finally:
        lm.attach(before)
    probe.write(adapter / probe.PROBE, taken)


def probed(adapter: Path, fingerprint: str) -> bool:
    """Whether a PEFT folder holds a probe of its own weights on the model of this fingerprint."""
    try:
        found = probe.read(adapter / probe.PROBE)
        return (found.base_fingerprint, found.source_sha256) == (fingerprint, sha256(adapter / peft.WEIGHTS))
    except (InputError, OSError):
        return False


def served(
    bundle: Path,
    *,
    provider: str = "auto",
    only: Collection[str] | None = None,
    unprobed: bool = False,
    progress: Progress = no_progress,
) -> tuple[Check, ...]:
    """Opens a bundle as a device does, checks its adapters, or `only` some, and returns what was measured.

    Raises ParityError where it answers with what is no number, and what `bundles.checks.activation` and
    `Engine.open` raise.
    """
    from edge_sdss.runtime import Engine

    manifest = bundles.load(bundle)
    for entry in manifest.adapters:  # before the engine refuses them, with fewer words
        checks.files(bundle, entry, manifest)
    engine = Engine.open(bundle, provider=provider)
    prompt = engine.chat.prompt_ids([Turn("user", PROMPTS[0])], _TOKENS)
    if not np.isfinite(engine.logits(prompt, None)).all():
        found = f"on {engine.provider} its logits are no numbers"
        raise ParityError(message(f"serve the bundle {bundle}", found, "choose another provider or recipe"))
    calls = itertools.count(1)

    def logits(ids: Sequence[int], asked: probe.Asked) -> NDArray[np.floating]:
        progress(f"checking adapters on {engine.provider}", next(calls), 0)
        return engine.logits(ids, asked)

    return checks.activation(bundle, logits, inputs=engine.inputs, only=only, unprobed=unprobed)
