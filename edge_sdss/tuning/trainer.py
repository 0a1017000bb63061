"""A round of LoRA (Hu et al., arXiv 2106.09685): examples in, a PEFT folder out.

Owns the round's files: the adapter, which appears whole or not at all, and the checkpoints that a rerun
after a power cut continues from. Knows nothing of where examples come from or whether the result is any good.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_sdss import config
from edge_sdss.errors import InputError, message
from edge_sdss.files import sha256
from edge_sdss.lm import CARD
from edge_sdss.tuning import adapter
from edge_sdss.tuning.checkpoint import Checkpoints, publish
from edge_sdss.tuning.course import Conditions, Course
from edge_sdss.tuning.records import Round, Step
from edge_sdss.types import Example, Progress, no_progress

if TYPE_CHECKING:
    from edge_sdss.lm import LanguageModel

__all__ = ["Conditions", "Round", "Step", "load", "train"]

_STATE = 2
"""The form of what a checkpoint holds: one of another form is not gone on with. 2: fits count tokens (ADR 13)."""

_NO_EFFECT = {"interval", "checkpoint_every", "checkpointing", "loss_chunk", "memory", "reserve", "max_celsius"}
"""Settings that change an adapter's weights not at all, or by rounding."""


def train(
    lm: LanguageModel,
    examples: Sequence[Example],
    settings: config.Tuning,
    out: Path,
    *,
    start: Path | None = None,
    card: Mapping[str, Any] = {},
    replace: bool = False,
    progress: Progress = no_progress,
    conditions: Conditions | None = None,
) -> Round:
    """Trains an adapter on the answers of `examples` and writes it to the folder `out`.

    A new adapter (rank, alpha and dropout from the settings), or the one at `start` trained further (with
    its own). `out` holds `adapter_config.json`, `adapter_model.safetensors` and the card `edge_sdss.json`,
    with `card` in it. Equal arguments on the same machine give equal weights, bit for bit, also where the
    process was killed on the way and `train` called again; where `out` is this very round, it is returned.
    Where memory runs out, the step is done again with the next smaller fit, and a round never goes back up;
    this changes rounding only, except that sequences are cut in the end, which the card says. `lm` is left
    as it was found.
    Raises InputError without examples, or where `out` is something else and not to be replaced; ConfigError
    where the loss is not finite; BudgetExceeded where the smallest fit takes too much memory, after a
    checkpoint.
    """
    if not examples:
        raise InputError(message("tune the model", "no example", "annotate some dialogues first"))
    key = _key(lm, examples, settings, start)
    checkpoints = Checkpoints(out.with_name(f"{out.name}.checkpoint"), key)
    if replace and out.exists() and _card(out).get("key") != key:
        shutil.rmtree(out)
    if not out.exists():
        known = {
            **card,
            "key": key,
            "base": lm.name,
            "base_fingerprint": lm.fingerprint,
            "start": None if start is None else sha256(start / adapter.WEIGHTS),
            "examples": len(examples),
            "settings": settings.model_dump(),
        }
        partial = out.with_name(f".{out.name}.partial")
        course = Course(lm, examples, settings, checkpoints, conditions or Conditions(), progress)
        measured = course.run(start, partial)
        facts = {**known, **measured, "sha256": sha256(partial / adapter.WEIGHTS)}
        (partial / CARD).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        publish(partial, out)
    elif _card(out).get("key") != key:
        raise InputError(message(f"write an adapter to {out}", "something else is there", "name another folder"))
    checkpoints.remove()
    return load(out)


def _key(lm: LanguageModel, examples: Sequence[Example], settings: config.Tuning, start: Path | None) -> str:
    """The hash of all that the adapter's weights depend on; what changes rounding only is left out."""
    settings = config.Tuning.model_validate(settings.model_dump())  # 16 and 16.0 are one
    content = {
        "base": lm.fingerprint,
        "start": None if start is None else _start(start),
        "settings": settings.model_dump(exclude=_NO_EFFECT),
        "state": _STATE,
        "examples": [[[[t.role, t.text] for t in e.messages], e.answer] for e in examples],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _start(folder: Path) -> list[str]:
    try:
        return [sha256(folder / name) for name in (adapter.CONFIG, adapter.WEIGHTS)]
    except OSError as error:
        found = f"{error.strerror} for {error.filename}"
        raise InputError(message(f"continue from {folder}", found, "name the folder of an adapter")) from error


def _card(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / CARD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def load(out: Path) -> Round:
    """Reads back what `train` returned for the folder `out`."""
    card = _card(out)
    losses = tuple(Step(**step) for step in card["losses"])
    return Round(
        adapter=out,
        steps=len(losses),
        seconds=card["seconds"],
        tokens=card["tokens"],
        examples=card["examples"],
        trainable_parameters=card["trainable_parameters"],
        peak_tensor_bytes=card["peak_tensor_bytes"],
        adapter_bytes=(out / adapter.WEIGHTS).stat().st_size,
        losses=losses,
    )
