"""A round of LoRA (Hu et al., arXiv 2106.09685): examples in, a PEFT folder out.

Owns the round's files: the adapter, which appears whole or not at all, and the checkpoints that a rerun
after a power cut continues from. Knows nothing of where examples come from or whether the result is any good.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_sdss import config
from edge_sdss.errors import ConfigError, InputError, message
from edge_sdss.files import sha256
from edge_sdss.lm import CARD
from edge_sdss.tuning import adapter
from edge_sdss.tuning.checkpoint import Checkpoints, State, fresh, publish
from edge_sdss.tuning.records import Round, Step
from edge_sdss.types import Example, Progress, no_progress

if TYPE_CHECKING:
    from edge_sdss.lm import Encoded, LanguageModel
    from edge_sdss.tuning.steps import Optimisation

__all__ = ["Round", "Step", "train"]


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
) -> Round:
    """Trains an adapter on the answers of `examples` and writes it to the folder `out`.

    A new adapter (rank, alpha and dropout from the settings), or the one at `start` trained further (with
    its own). `out` holds `adapter_config.json`, `adapter_model.safetensors` and the card `edge_sdss.json`,
    with `card` in it. Equal arguments on the same machine give equal weights, bit for bit, also where the
    process was killed on the way and `train` called again; where `out` is this very round, it is returned.
    `lm` is left as it was found.
    Raises InputError without examples, or where `out` is something else and not to be replaced; ConfigError
    where the loss is not finite.
    """
    if not examples:
        raise InputError(message("tune the model", "no example", "annotate some dialogues first"))
    key = _key(lm, examples, settings, start)
    if settings.weights != "as loaded":
        found = "only the trainer's own process may replace the model's weights, and it is not there yet"
        raise ConfigError(message(f"set tuning.weights to {settings.weights}", found, "leave it as loaded"))
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
        encoded = [lm.encode(example, settings.max_tokens) for example in examples]
        _run(lm, encoded, settings, out, start, known, checkpoints, progress)
    elif _card(out).get("key") != key:
        raise InputError(message(f"write an adapter to {out}", "something else is there", "name another folder"))
    checkpoints.remove()
    return load(out)


def _run(
    lm: LanguageModel,
    encoded: Sequence[Encoded],
    settings: config.Tuning,
    out: Path,
    start: Path | None,
    card: Mapping[str, Any],
    checkpoints: Checkpoints,
    progress: Progress,
) -> None:
    import torch

    from edge_sdss.tuning.steps import Optimisation

    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        with adapter.trainable(lm, settings, start) as adapted:
            run = Optimisation(adapted, encoded, settings)
            _resume(run, checkpoints)
            progress("tune", len(run.done), run.steps)
            while len(run.done) < run.steps:
                run.advance()
                progress("tune", len(run.done), run.steps)
                if len(run.done) % settings.checkpoint_every == 0 and len(run.done) < run.steps:
                    checkpoints.write(_state(run))
            partial = fresh(out.with_name(f".{out.name}.partial"))
            adapter.write(adapted, partial, lm.name)
    facts = {**card, **_measured(run), "sha256": sha256(partial / adapter.WEIGHTS)}
    (partial / CARD).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    publish(partial, out)


def _measured(run: Optimisation) -> dict[str, Any]:
    return {
        "tokens": sum(step.tokens for step in run.done),
        "seconds": sum(step.seconds for step in run.done),
        "trainable_parameters": run.trainable_parameters,
        "peak_tensor_bytes": run.peak_tensor_bytes,
        "losses": [asdict(step) for step in run.done],
    }


def _state(run: Optimisation) -> State:
    record = {"done": [asdict(step) for step in run.done], "peak_tensor_bytes": run.peak_tensor_bytes}
    return State(len(run.done), run.tensors(), record)


def _resume(run: Optimisation, checkpoints: Checkpoints) -> None:
    state = checkpoints.newest()
    if state is not None:
        done = [Step(**step) for step in state.record["done"]]
        run.restore(state.tensors, done, state.record["peak_tensor_bytes"])


def _key(lm: LanguageModel, examples: Sequence[Example], settings: config.Tuning, start: Path | None) -> str:
    """The hash of all that the adapter's weights depend on."""
    content = {
        "base": lm.fingerprint,
        "start": None if start is None else _start(start),
        "settings": settings.model_dump(exclude={"interval", "checkpoint_every"}),
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
