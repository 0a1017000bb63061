"""A graph's tensors in topological order: what makes them, and what takes them.

Reads ONNX files. Knows nothing of values, but those of constants.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy.typing as npt

from edge_sdss.errors import BackendUnavailable, InputError, message

Array = npt.NDArray[Any]

_LAYER = re.compile(r"(?:layers?[._/]?|^L)(\d+)")


@dataclass(frozen=True)
class Node:
    """One operation, with the names of the tensors that it takes and gives; empty names are left out."""

    name: str
    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Topology:
    """A graph without its weights: nodes in an order in which they can run, its inputs, outputs and constants."""

    nodes: tuple[Node, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    constants: Mapping[str, Array] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, model: Path | Any) -> Topology:
        """Reads a file, or takes an onnx.ModelProto. Raises InputError where it cannot be read."""
        proto = load(model) if isinstance(model, Path) else model
        onnx = library()
        base = str(model.parent) if isinstance(model, Path) else ""
        tensors = {one.name: one for one in proto.graph.initializer}
        nodes = []
        for node in proto.graph.node:
            attributes = {one.name: onnx.helper.get_attribute_value(one) for one in node.attribute}
            if node.op_type == "Constant" and "value" in attributes:
                tensors[node.output[0]] = attributes["value"]
                continue
            name = node.name or node.output[0]
            given = tuple(one for one in node.input if one), tuple(one for one in node.output if one)
            nodes.append(Node(name, node.op_type, *given, attributes))
        given_inputs = tuple(one.name for one in proto.graph.input if one.name not in tensors)
        return cls(tuple(nodes), given_inputs, tuple(one.name for one in proto.graph.output), _Constants(tensors, base))

    @cached_property
    def producers(self) -> dict[str, Node]:
        """The node that makes a tensor."""
        return {name: node for node in self.nodes for name in node.outputs}

    @cached_property
    def consumers(self) -> dict[str, list[Node]]:
        """The nodes that take a tensor, in order."""
        found: dict[str, list[Node]] = {}
        for node in self.nodes:
            for name in dict.fromkeys(node.inputs):
                found.setdefault(name, []).append(node)
        return found

    @cached_property
    def tensors(self) -> tuple[str, ...]:
        """What nodes make, in order; a graph's inputs and constants are not among it."""
        return tuple(self.producers)

    def nearest(self, tensor: str, known: Collection[str]) -> tuple[str, ...]:
        """Returns the closest tensors before `tensor` that are in `known`, seen through those that are not."""
        return self._upstream(tensor, known)[0]

    def unknown(self, tensor: str, known: Collection[str]) -> tuple[str, ...]:
        """Returns what is made before `tensor` and behind the closest tensors in `known`, the nearest first."""
        return tuple(name for name in self._upstream(tensor, known)[1] if name in self.producers)

    def _upstream(self, tensor: str, known: Collection[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        found: dict[str, None] = {}
        passed: dict[str, None] = {}
        queue = deque(self.inputs_of(tensor))
        while queue:
            name = queue.popleft()
            if name in known:
                found[name] = None
            elif name not in passed:
                passed[name] = None
                queue += self.inputs_of(name)
        return tuple(found), tuple(passed)

    def inputs_of(self, tensor: str) -> tuple[str, ...]:
        """Returns what the node that makes `tensor` takes; nothing for a graph's input or constant."""
        node = self.producers.get(tensor)
        return node.inputs if node else ()

    def above(self, tensor: str, levels: int) -> tuple[Node, ...]:
        """Returns the node that makes `tensor`, those that make its inputs, and so on for so many levels."""
        found: dict[str, Node] = {}
        frontier = [tensor]
        for _ in range(levels):
            nodes = [self.producers[name] for name in frontier if name in self.producers]
            found.update({node.name: node for node in nodes})
            frontier = [name for node in nodes for name in node.inputs]
        return tuple(found.values())

    def below(self, tensor: str, levels: int) -> tuple[str, ...]:
        """Returns what is made of `tensor`, what is made of that, and so on for so many levels."""
        found: dict[str, None] = {}
        frontier = [tensor]
        for _ in range(levels):
            frontier = [out for name in frontier for node in self.consumers.get(name, ()) for out in node.outputs]
            found.update(dict.fromkeys(frontier))
        return tuple(found)

    def feeds_softmax(self, tensor: str) -> bool:
        """Whether nothing but a Softmax takes it, which sees only what is near a row's greatest value.

        Written out, it begins with a row's greatest and what lies below.
        """
        takers = self.consumers.get(tensor, [])
        if {node.op for node in takers} == {"ReduceMax", "Sub"}:
            greatest = {out for node in takers if node.op == "ReduceMax" for out in node.outputs}
            return all(node.inputs[0] == tensor and node.inputs[1] in greatest for node in takers if node.op == "Sub")
        return bool(takers) and all(node.op == "Softmax" for node in takers)


class _Constants(Mapping[str, Array]):
    """Constants by name, read when they are asked for: there may be gigabytes of them."""

    def __init__(self, tensors: Mapping[str, Any], base: str) -> None:
        self._tensors, self._base = tensors, base

    def __getitem__(self, name: str) -> Array:
        array: Array = library().numpy_helper.to_array(self._tensors[name], self._base)
        return array

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def layer(tensor: str) -> int | None:
    """Returns the number of the layer that a tensor's name tells, such as 3 of layers.3.attn.q; else None."""
    found = _LAYER.search(tensor)
    return int(found[1]) if found else None


def library() -> Any:
    """Returns onnx. Raises BackendUnavailable where it is not installed."""
    try:
        import onnx
    except ImportError as error:
        do = "run `pip install 'edge_sdss[export]'`"
        raise BackendUnavailable(message("read a graph", "the package onnx is not installed", do)) from error
    return onnx


def load(file: Path) -> Any:
    """Returns a graph's onnx.ModelProto; weights in other files stay there. Raises InputError."""
    try:
        return library().load(str(file), load_external_data=False)
    except BackendUnavailable:
        raise
    except Exception as error:  # protobuf's and the file's have no common class
        found = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(message(f"read the graph {file}", found, "export it again")) from error


def listed(names: Sequence[str]) -> str:
    """Returns names, the later ones counted where there are many."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
