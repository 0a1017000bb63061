"""The first tensor that is wrong, with all that a cause may ask of it. Knows no causes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from edge_sdss.exporting.explain import measure
from edge_sdss.exporting.explain.graph import Array, Node, Topology
from edge_sdss.exporting.explain.stages import Feeds, Stage


@dataclass(frozen=True)
class Cause:
    """What is wrong, what shows it, what to do."""

    name: str
    evidence: tuple[str, ...]
    remedy: str


@dataclass(frozen=True)
class Suspect:
    """The first tensor that is wrong, at two stages, with all that can be asked.

    `values` are both stages' of it and of what is near it, by name; `errors` those of everything that was compared.
    """

    tensor: str
    topology: Topology
    reference: Stage
    candidate: Stage
    feeds: Sequence[Feeds]
    values: Mapping[str, tuple[Array, Array]]
    errors: Mapping[str, float]
    limit: float
    adapters: tuple[str, ...] = ()

    @property
    def node(self) -> Node:
        """What makes the tensor."""
        return self.topology.producers[self.tensor]

    @property
    def pair(self) -> tuple[Array, Array]:
        """The tensor at the reference and at the candidate, float64, of one shape where they have one size."""
        a, b = self.values[self.tensor]
        b = b.reshape(a.shape) if a.size == b.size else b
        return a.astype(np.float64), b.astype(np.float64)

    @property
    def logits(self) -> bool:
        """Whether a Softmax alone takes the tensor."""
        return self.topology.feeds_softmax(self.tensor)

    def error(self, reference: Array, candidate: Array) -> float:
        """Returns how far two values of the tensor are apart, as it is measured everywhere."""
        return measure.difference(reference, candidate, logits=self.logits).error

    def given(self, name: str) -> Array | None:
        """Returns what a graph's input or constant holds, None for what is computed."""
        if name in self.topology.constants:
            return self.topology.constants[name]
        parts = [feed[name] for feed in self.feeds if name in feed]
        return np.concatenate([np.atleast_1d(part) for part in parts]) if parts else None
