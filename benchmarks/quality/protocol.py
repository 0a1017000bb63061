"""What the study holds fixed, what a cell is, and which cells there are, the most telling first.

A cell is one run of the paper's experiment: a stream goes past a buffer, what is kept trains an adapter, held-out
dialogues are measured. Everything but the cell's own fields is the `Protocol`, the same for every policy.
Knows nothing of how a cell is run or its result stored.
"""

from __future__ import annotations

import hashlib
import json
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product

from edge_sdss import config

DEVELOPMENT = ("alpaca", "empathetic", "chatdoctor", "esconv", "memorybank")
CONFIRMATION = ("dolly", "mts_dialog")
"""Named before any result was seen (ADR 18): no policy is designed on them, no cell of them runs without --confirm."""

STANDS_FOR = {"chatdoctor": "MedDialog", "mts_dialog": "MedDialog", "esconv": "Prosocial-Dialog"}
"""Stand-ins for sets of the paper that could not be had."""

NONE, FULL = "none", "full"
"""Not policies: the base model, and training on the whole stream."""
BASELINE = "reservoir"
PAPER = ("sdss", "random", BASELINE, "fifo", "kcenter", "first", NONE)
ABLATIONS = ("eoe", "dss", "idd", "eoe-dss", "eoe-idd", "dss-idd")
STRONGER = (
    "prototypical", "facility-location", "herding", "dedup-reservoir", "domain-balanced", "longest", "perplexity",
    "ifd",
)  # fmt: skip
MAIN_ORDERS = ("shuffled", "sticky-0.9")
ORDERS = ("shuffled", "sticky-0.9", "sticky-0.99", "blocked", "natural", "noisy")

_MAIN_SETS = DEVELOPMENT[:4]


def _settings() -> config.Config:
    """Short dialogues and answers, a model in bfloat16: what makes a cell take a minute."""
    return config.Config(
        reading=config.Reading(context_turns=2),
        model=config.Model(dtype="bfloat16", max_tokens=192),
        tuning=config.Tuning(max_tokens=192, checkpoint_every=1_000_000),
        evaluation=config.Evaluation(max_items=120, rouge_items=32, max_new_tokens=40, batch_size=60),
    )


_MATTER = {
    "reading": "context_turns",
    "model": "name dtype max_tokens",
    "selection": "eoe pooling text lexicons",
    "buffer": "max_entry_bytes vectors",
    "synthesis": "min_rouge1 max_rouge1 vary temperature top_p max_new_tokens seed",
    "tuning": "rank alpha rslora dora dropout targets top_layers weights adapter_dtype optimizer learning_rate "
    "batch_size max_tokens warmup clip patience",
    "evaluation": "max_items rouge_items max_new_tokens seed",
}
"""The settings that a result depends on: a new one that by default does nothing must not make all results old."""


@dataclass(frozen=True)
class Protocol:
    """What no cell changes. `max_words` bounds prompt and answer each; `passes` are examples x epochs with `max_bytes`.

    With a budget in bytes policies keep different numbers of dialogues; they are then seen so often that each policy
    has about `passes` examples trained on.
    """

    offers: int = 800
    held_out: int = 120
    general_items: int = 24
    min_words: int = 3
    max_words: int = 60
    epochs: int = 2
    passes: int = 64
    settings: config.Config = field(default_factory=_settings)

    @property
    def digest(self) -> str:
        """12 hexadecimal digits: cells of equal digest compare."""
        named = {f"{section}.{n}" for section, names in _MATTER.items() for n in names.split()}
        settings = config.Config.model_validate(self.settings.model_dump())  # 16 and 16.0 are one
        values = {name: operator.attrgetter(name)(settings) for name in sorted(named)}
        own = {name: value for name, value in vars(self).items() if name != "settings"}
        return digest([own, {name: str(value) for name, value in values.items()}])[:12]


QUICK = Protocol(
    offers=200,
    held_out=60,
    settings=Protocol().settings.override(
        {"evaluation": {"max_items": 60, "rouge_items": 16, "batch_size": 30, "max_new_tokens": 32}}
    ),
)


@dataclass(frozen=True)
class Cell:
    """One run. `max_bytes`: a budget in bytes instead of bins. `interval`: offers between rounds; None: one at the end.

    `seed` is of the stream's order, the policy's draws, the first LoRA weights and the order of examples.
    """

    set: str
    policy: str
    order: str = "shuffled"
    seed: int = 0
    bins: int = 32
    max_bytes: int | None = None
    variants: int = 0
    interval: int | None = None

    @property
    def name(self) -> str:
        """What tells it from all others of a protocol."""
        budget = f"{self.bins} bins" if self.max_bytes is None else f"{self.max_bytes} bytes"
        rounds = f", a round each {self.interval}" if self.interval else ""
        return f"{self.set}, {self.policy}, {self.order}, seed {self.seed}, {budget}, {self.variants} variants{rounds}"


def digest(value: object) -> str:
    """SHA-256 of a value that JSON can hold, 64 hexadecimal digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _runs(
    sets: Sequence[str],
    policies: Sequence[str],
    orders: Sequence[str] = MAIN_ORDERS,
    seeds: Sequence[int] = (0, 1, 2),
    **changes: int,
) -> Iterator[Cell]:
    """A set with all its runs comes before the next set. The base model has one cell a set, the whole stream two."""
    for name in sets:
        for order, seed, policy in product(orders, seeds, policies):
            if policy == NONE and (order, seed) != (orders[0], seeds[0]):
                continue
            yield Cell(name, policy, order, seed, **changes)


def _full(sets: Sequence[str]) -> Iterator[Cell]:
    return (Cell(name, FULL) for name in sets)


def grids() -> dict[str, list[Cell]]:
    """The parts of the study by name, in the order in which they should run."""
    one, two = _MAIN_SETS[:1], _MAIN_SETS[:2]
    few = ("sdss", BASELINE, "random")
    return {
        "main": list(_runs(_MAIN_SETS, PAPER)),
        "ablation": list(_runs(one, ABLATIONS)),
        "synthesis": list(_runs(two, few, orders=("shuffled",), variants=3)),
        "sizes": [
            cell for bins in (8, 128) for cell in _runs(one, (*few, "fifo", "kcenter"), orders=("shuffled",), bins=bins)
        ],
        "full": list(_full(_MAIN_SETS)),
        "stronger": list(_runs(_MAIN_SETS, STRONGER)),
        "curve": list(_runs(one, few, orders=("shuffled",), interval=200)),
        "bytes": list(_runs(two, ("sdss", BASELINE, "longest"), orders=("shuffled",), max_bytes=32 * 1024)),
        "orders": [
            *_runs(one, few, orders=("sticky-0.99", "blocked", "noisy")),
            *_runs(("memorybank",), PAPER, orders=("natural",)),
        ],
        "sizes-wide": [
            cell for bins in (16, 64, 256, 512) for cell in _runs(one, few, orders=("shuffled",), bins=bins)
        ],
    }


def quick(name: str) -> list[Cell]:
    """One set, three policies, one seed, and the base model."""
    return [Cell(name, policy) for policy in (NONE, BASELINE, "random", "sdss")]


def confirmation(policies: Sequence[str]) -> list[Cell]:
    """The cells that confirm a policy, on the sets that had no part in its design, with twice the seeds of the grid:
    half as many sets would else leave an interval 1.4 times as wide."""
    return list(_runs(CONFIRMATION, (*policies, "sdss", BASELINE, NONE), seeds=range(6)))
