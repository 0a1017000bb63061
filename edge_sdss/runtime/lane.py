"""Rows that are computed together: one KV cache, one IO binding, one mix of adapters.

Knows ids and logits; what a conversation is or how a token is chosen, it does not know.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_sdss.bundles import Graph, Manifest
from edge_sdss.errors import InputError, message
from edge_sdss.runtime import kv
from edge_sdss.runtime.adapters import Mix
from edge_sdss.runtime.providers import library

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]

_LOGITS_BYTES = 128 << 20  # of one run's logits: a longer prompt goes through the graph in pieces
_PIECE = 2048


@dataclass(frozen=True)
class Loaded:
    """A session with what its graph takes and gives."""

    session: Any
    graph: Graph
    device: str
    types: dict[str, str]  # of its outputs
    adapters: bool  # whether it takes them

    @classmethod
    def of(cls, session: Any, manifest: Manifest, device: str, *, adapters: bool = True) -> Loaded:
        """Raises InputError where the graph lacks what the manifest names: such an input would be never bound."""
        graph = manifest.graph
        types = {value.name: value.type[len("tensor(") : -1] for value in session.get_outputs()}
        types = {name: "float32" if kind == "float" else kind for name, kind in types.items()}
        inputs = {value.name for value in (*session.get_inputs(), *session.get_overridable_initializers())}
        wanted = {name for site in graph.sites if adapters for name in (site.lora_a, site.lora_b)} - inputs
        wanted |= {"logits", *(["hidden_states"] if graph.hidden_states else [])} - types.keys()
        if wanted:
            found = f"its graph has no {min(wanted)}, which the manifest names"
            raise InputError(message(f"open a bundle of {manifest.base}", found, "export it anew"))
        return cls(session, graph, device, types, adapters)


class Lane:
    """`rows` sequences with their KV cache. `lengths`: tokens fed to each, [rows] int64."""

    def __init__(self, loaded: Loaded, mix: Mix, cache: kv.Cache, lengths: Sequence[int]) -> None:
        self.mix = mix
        self.lengths = np.array(lengths, np.int64)
        self.hidden: Floats | None = None  # [rows, n, width] of the last run
        self._loaded, self._cache = loaded, cache
        self._padding = np.zeros(len(lengths), np.int64)  # at the left, only where the cache grows
        if isinstance(cache, kv.Growing):
            self._padding += self.lengths.max() - self.lengths
        self._ones = np.ones((1, loaded.graph.context), np.int64)
        self._outputs: dict[str, npt.NDArray[Any]] = {}
        self._binding = loaded.session.io_binding()
        for name, value in mix.values.items():
            self._binding.bind_ortvalue_input(name, value)

    @classmethod
    def empty(cls, loaded: Loaded, mix: Mix, capacity: int) -> Lane:
        """Returns a lane of one row that was fed nothing; `capacity` tokens are expected."""
        return cls(loaded, mix, kv.cache(loaded.graph, 1, capacity, loaded.device), [0])

    @classmethod
    def joined(cls, lane: Lane, parts: Sequence[Sequence[Any]], capacity: int) -> Lane:
        """Returns a lane like this one, whose rows go on from the `past` of lanes of one row."""
        lengths, loaded = [part[0].shape[2] for part in parts], lane._loaded
        return cls(loaded, lane.mix, kv.join(parts, lengths, loaded.graph, capacity, loaded.device), lengths)

    @property
    def piece(self) -> int:
        """Prompt tokens of one run, so that its logits keep within a budget of memory."""
        if self.last_logits_only:
            return _PIECE
        return max(1, min(_PIECE, _LOGITS_BYTES // (4 * self._loaded.graph.vocabulary)))

    @property
    def adapters(self) -> bool:
        """Whether its session takes adapters."""
        return self._loaded.adapters

    @property
    def last_logits_only(self) -> bool:
        """Whether a run gives the logits of its last position only."""
        return self._loaded.graph.last_logits_only

    @property
    def past(self) -> list[npt.NDArray[Any]]:
        """Copies of the keys and values of a lane of one row, each [1, kv_heads, length, head_dim]."""
        return self._cache.filled(int(self.lengths[0]))

    def feed(self, ids: Ids) -> Floats:
        """Runs ids [rows, n] behind what was fed; returns logits [rows, n, V], or [rows, 1, V] of the last one.

        The array is written anew by the next call. Raises InputError beyond the context, and whatever ONNX Runtime
        raises; the lane is then of no use.
        """
        longest, context = int(self.lengths.max()) + ids.shape[1], self._loaded.graph.context
        if longest > context:  # a shared buffer would be written past its end
            found = f"they would be {longest} tokens, with a context of {context}"
            raise InputError(message("feed the model", found, "shorten the prompt"))
        positions = self.lengths[:, None] + np.arange(ids.shape[1])
        logits = self._run(ids, self._mask(ids.shape[1]), positions)
        self.lengths = self.lengths + ids.shape[1]
        return logits

    def cut(self, length: int) -> None:
        """Forgets what a lane of one row was fed after its first `length` tokens."""
        if length < int(self.lengths[0]):
            self._cache.cut(length)
            self.lengths = np.array([length])

    def select(self, rows: Sequence[int]) -> None:
        """Keeps these rows."""
        self._cache.select(rows)
        self.lengths, self._padding = self.lengths[list(rows)], self._padding[list(rows)]

    def _mask(self, new: int) -> Ids:
        """[rows, total] int64, 1 for a token: after the padding of a growing cache, from the front of a shared one."""
        ends = self._padding + self.lengths + new
        if len(ends) == 1 and not self._padding[0]:
            return self._ones[:, : int(ends[0])]
        at = np.arange(int(ends.max()))
        return ((at >= self._padding[:, None]) & (at < ends[:, None])).astype(np.int64)

    def _run(self, ids: Ids, mask: Ids, positions: Ids) -> Floats:
        binding = self._binding
        self._cache.bind(binding, mask.shape[1])
        binding.bind_cpu_input("input_ids", np.ascontiguousarray(ids))
        binding.bind_cpu_input("attention_mask", np.ascontiguousarray(mask))
        if self._loaded.graph.position_ids:
            binding.bind_cpu_input("position_ids", np.ascontiguousarray(positions))
        self._bind_outputs(*ids.shape)
        self._loaded.session.run_with_iobinding(binding)
        self._cache.take(binding)
        if self._loaded.graph.hidden_states:
            self.hidden = self._outputs["hidden_states"].astype(np.float32, copy=False)
        return self._outputs["logits"].astype(np.float32, copy=False)

    def _bind_outputs(self, rows: int, new: int) -> None:
        """Binds arrays of ours, so that a decode step allocates nothing; those of the last shape are kept."""
        graph = self._loaded.graph
        shapes = {"logits": (rows, 1 if graph.last_logits_only else new, graph.vocabulary)}
        if graph.hidden_states:
            shapes["hidden_states"] = (rows, new, graph.width)
        for name, shape in shapes.items():
            if name not in self._outputs or self._outputs[name].shape != shape:
                self._outputs[name] = np.empty(shape, self._loaded.types[name])
                value = library().OrtValue.ortvalue_from_numpy(self._outputs[name])
                self._binding.bind_ortvalue_output(name, value)
