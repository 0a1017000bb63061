"""The demo's stream: one user's weeks with an assistant, and questions that only it could answer right."""

from __future__ import annotations

import json
from importlib.resources import as_file, files

from edge_sdss import experiment, readers
from edge_sdss.types import Example, Turn


def stream(quick: bool = False) -> experiment.Stream:
    """Reads the packaged dialogues; `quick` takes every third of them and a third of the questions."""
    step = 3 if quick else 1
    with as_file(files("edge_sdss") / "_data" / "demo") as folder:
        offered = list(readers.read(folder / "stream.jsonl", format="pairs"))
        lines = (folder / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    asked = [json.loads(line) for line in lines]
    held_out = [Example((Turn("user", item["prompt"]),), item["preferred"]) for item in asked]
    return experiment.Stream(offered[::step], held_out[::step], "demo", "pairs")
