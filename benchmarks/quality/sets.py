"""The data sets of the study: read by the product, cut to short dialogues, split without near-duplicates.

Knows nothing of orders, policies or models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from quality.protocol import Protocol

from edge_sdss import demo, evaluation, readers
from edge_sdss.errors import InputError, message
from edge_sdss.experiment import held_out_examples
from edge_sdss.types import Dialogue, Example

FILES = {
    "alpaca": "alpaca/alpaca_5000.json",
    "dolly": "dolly/dolly_3k.json",
    "empathetic": "empathetic_dialogues/ed_val_pairs.jsonl",
    "chatdoctor": "chatdoctor/chatdoctor5k.json",
    "esconv": "esconv/devWithStrategy_short.tsv",
    "mts_dialog": "mts_dialog/MTS-Dialog-TrainingSet.csv",
    "memorybank": "memorybank/memory_bank_en.json",
}
DEMO = "demo"
"""The packaged stream, for a quick run without any data."""


@dataclass(frozen=True)
class Material:
    """A set, cut and split. `stream` is in the file's order; `removed`: held-out near-duplicates of the stream."""

    name: str
    stream: Sequence[Dialogue]
    held_out: Sequence[Example]
    read: int
    rejected: int
    removed: int


def load(name: str, data: Path | None, protocol: Protocol) -> Material:
    """Reads a set. Raises InputError where it is unknown, `data` has no such file, or too little is short enough."""
    if name == DEMO:
        made = demo.stream()
        return Material(name, made.offered[: protocol.offers], made.held_out, len(made.offered), 0, 0)
    file = _file(name, data)
    reading = readers.read(file, settings=protocol.settings.reading)
    dialogues = list(reading)
    short = [d for d in dialogues if _short(d, protocol)]
    wanted = protocol.offers + protocol.held_out
    drawn = _drawn(short, wanted)
    share = protocol.settings.evaluation.model_copy(update={"holdout": protocol.held_out / wanted})
    stream, held, removed = evaluation.split(drawn, share)
    return Material(
        name,
        stream[: protocol.offers],
        held_out_examples(held)[: protocol.held_out],
        len(dialogues),
        reading.rejected,
        removed,
    )


def _file(name: str, data: Path | None) -> Path:
    asked = f"run the study on {name}"
    if name not in FILES:
        raise InputError(message(asked, "no such set", f"choose from {', '.join((*FILES, DEMO))}"))
    if data is None:
        raise InputError(
            message(asked, "no folder of data sets", f"give --data DIR, with DIR/{FILES[name]}, or --set demo")
        )
    if not (data / FILES[name]).is_file():
        raise InputError(message(asked, f"{data / FILES[name]} is not there", "give the folder of the data sets"))
    return data / FILES[name]


def _short(dialogue: Dialogue, protocol: Protocol) -> bool:
    prompt, answer = len(dialogue.prompt.split()), len(dialogue.response.split())
    return prompt <= protocol.max_words and protocol.min_words <= answer <= protocol.max_words


def _drawn(dialogues: Sequence[Dialogue], wanted: int) -> list[Dialogue]:
    """About so many dialogues, whole conversations, chosen by hash; in the order given, equal ones once."""
    unique = list({d.id: d for d in dialogues}.values())
    groups: dict[str, list[Dialogue]] = {}
    for dialogue in unique:
        groups.setdefault(dialogue.conversation or dialogue.id, []).append(dialogue)
    chosen: set[str] = set()
    for group in sorted(groups, key=lambda name: blake2b(name.encode("utf-8", "surrogatepass")).digest()):
        if len(chosen) >= wanted:
            break
        chosen.update(d.id for d in groups[group])
    return [d for d in unique if d.id in chosen]
