"""Keys and values of the tokens seen so far, bound as a graph's past and present. Knows nothing of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from edge_sdss.bundles import Graph
from edge_sdss.runtime.providers import library

_STEP = 256  # positions by which a shared buffer's capacity is rounded up


def _names(kind: str, graph: Graph) -> list[str]:
    return [f"{kind}.{layer}.{part}" for layer in range(graph.layers) for part in ("key", "value")]


class Growing:
    """present is past with the new tokens behind it: each run gives new tensors [rows, kv_heads, total, head_dim]."""

    def __init__(self, graph: Graph, rows: int, device: str) -> None:
        self._graph, self._device = graph, device
        self._past, self._present = _names("past_key_values", graph), _names("present", graph)
        self.put([np.zeros((rows, graph.kv_heads, 0, graph.head_dim), graph.kv_dtype)] * len(self._past))

    def bind(self, binding: Any, total: int) -> None:
        """Binds past, and room for present, before a run after which `total` positions are filled."""
        for past, present, value in zip(self._past, self._present, self._values, strict=True):
            binding.bind_ortvalue_input(past, value)
            binding.bind_output(present, self._device)

    def take(self, binding: Any) -> None:
        """Takes present as the next past; the outputs bound first must be this cache's."""
        self._values = binding.get_outputs()[: len(self._past)]

    def cut(self, length: int) -> None:
        """Keeps the first `length` positions."""
        self.put([value.numpy()[:, :, :length] for value in self._values])

    def select(self, rows: Sequence[int]) -> None:
        """Keeps these rows."""
        self.put([value.numpy()[list(rows)] for value in self._values])

    def filled(self, length: int) -> list[npt.NDArray[Any]]:
        """Returns copies of the first `length` positions, each [rows, kv_heads, length, head_dim]."""
        return [value.numpy()[:, :, :length].copy() for value in self._values]

    def put(self, arrays: Sequence[npt.NDArray[Any]]) -> None:
        """Takes these as the past."""
        self._values = [self._value(array) for array in arrays]

    def _value(self, array: npt.NDArray[Any]) -> Any:
        return library().OrtValue.ortvalue_from_numpy(np.array(array, order="C"), self._device)


class Shared:
    """past and present are one buffer [rows, kv_heads, capacity, head_dim], bound once; it grows to the context.

    How much of a row is filled, the attention mask says; what lies behind is not read.
    """

    def __init__(self, graph: Graph, rows: int, capacity: int, device: str) -> None:
        self._graph, self._device = graph, device
        self._past, self._present = _names("past_key_values", graph), _names("present", graph)
        self.capacity = self._rounded(capacity)
        self._bound = False
        self.put([self._zeros(rows) for _ in self._past])

    def bind(self, binding: Any, total: int) -> None:
        """Binds the buffer where it is not bound, enlarged where `total` positions do not fit."""
        if total > self.capacity:
            self._enlarge(total)
        if self._bound:
            return
        for past, present, value in zip(self._past, self._present, self._values, strict=True):
            binding.bind_ortvalue_input(past, value)
            binding.bind_ortvalue_output(present, value)
        self._bound = True

    def take(self, binding: Any) -> None:
        """Nothing: the run has written into the buffer."""

    def cut(self, length: int) -> None:
        """Nothing: a shorter mask hides the rest."""

    def select(self, rows: Sequence[int]) -> None:
        """Keeps these rows."""
        self.put([value.numpy()[list(rows)] for value in self._values])

    def filled(self, length: int) -> list[npt.NDArray[Any]]:
        """Returns copies of the first `length` positions, each [rows, kv_heads, length, head_dim]."""
        return [value.numpy()[:, :, :length].copy() for value in self._values]

    def put(self, arrays: Sequence[npt.NDArray[Any]]) -> None:
        """Takes these as the buffer."""
        make = library().OrtValue.ortvalue_from_numpy
        self._values = [make(np.ascontiguousarray(array), self._device) for array in arrays]
        self._bound = False

    def _enlarge(self, total: int) -> None:
        before = self.capacity
        self.capacity = self._rounded(max(total, 2 * before))
        larger = []
        for value in self._values:
            old = value.numpy()
            new = self._zeros(len(old))
            new[:, :, :before] = old
            larger.append(new)
        self.put(larger)

    def _zeros(self, rows: int) -> npt.NDArray[Any]:
        return np.zeros((rows, self._graph.kv_heads, self.capacity, self._graph.head_dim), self._graph.kv_dtype)

    def _rounded(self, positions: int) -> int:
        return min(-(-max(positions, 1) // _STEP) * _STEP, self._graph.context)


Cache: TypeAlias = Growing | Shared


def cache(graph: Graph, rows: int, capacity: int, device: str) -> Cache:
    """Returns an empty cache of the graph's kind."""
    return Growing(graph, rows, device) if graph.kv_cache == "growing" else Shared(graph, rows, capacity, device)


def join(
    parts: Sequence[Sequence[npt.NDArray[Any]]], lengths: Sequence[int], graph: Graph, capacity: int, device: str
) -> Cache:
    """Returns one cache of many rows. parts: of each row what `filled` gave for its length.

    Shorter rows have their padding at the left of a growing cache, at the right in a shared buffer.
    """
    joint = cache(graph, len(parts), capacity, device)
    growing, longest = isinstance(joint, Growing), max(lengths)
    room = longest if isinstance(joint, Growing) else joint.capacity
    arrays = []
    for tensors in zip(*parts, strict=True):
        array = np.zeros((len(parts), graph.kv_heads, room, graph.head_dim), graph.kv_dtype)
        for row, (tensor, length) in enumerate(zip(tensors, lengths, strict=True)):
            start = longest - length if growing else 0
            array[row, :, start : start + length] = tensor[0]
        arrays.append(array)
    joint.put(arrays)
    return joint
