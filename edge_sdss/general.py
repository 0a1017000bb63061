"""The fixed general set, on which forgetting is measured. It ships with the package and is never trained on."""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files

from edge_sdss.types import Example, Turn


@cache
def examples() -> tuple[Example, ...]:
    """Question and answer pairs on what any assistant should know."""
    lines = (files("edge_sdss") / "_data" / "general.jsonl").read_text(encoding="utf-8").splitlines()
    pairs = [json.loads(line) for line in lines]
    return tuple(Example((Turn("user", pair["prompt"]),), pair["preferred"]) for pair in pairs)
