"""A graph's tensors in topological order: what makes them, how they are quantised, how to look at more of them.

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

import numpy as np
import numpy.typing as npt

from edge_sdss.errors import BackendUnavailable, InputError, message

Array = npt.NDArray[Any]

_LAYER = re.compile(r"(?:layers?[._/]?|^L)(\d+)")
_QUANTISE, _DEQUANTISE = "QuantizeLinear", "DequantizeLinear"
_LIMITS = {"uint8": (0, 255), "int8": (-128, 127), "uint16": (0, 65535), "int16": (-32768, 32767), "int4": (-8, 7),
           "uint4": (0, 15)}  # fmt: skip


@dataclass(frozen=True)
class Quantisation:
    """value = (q - zero_point) · scale, q of `dtype`; both [1], or [channels] along `axis`.

    `stored` are the scale and zero point with which the value was made into q, where they differ from those with which
    it is read: then the two do not undo each other.
    """

    scale: Array
    zero_point: Array
    dtype: str
    axis: int | None = None
    stored: tuple[Array, Array] | None = None

    @property
    def range(self) -> tuple[float, float]:
        """The least and the greatest value that can be told, over all channels."""
        low, high = _LIMITS.get(self.dtype, (-32768, 32767))
        zero, scale = self.zero_point.astype(np.float64), self.scale.astype(np.float64)
        return float(((low - zero) * scale).min()), float(((high - zero) * scale).max())

    def apply(self, values: Array) -> Array:
        """Returns what is left of `values` after this quantisation, float64."""
        low, high = _LIMITS.get(self.dtype, (-32768, 32767))
        scale, zero = self._along(self.scale, values.ndim), self._along(self.zero_point, values.ndim)
        steps = np.clip(np.rint(np.nan_to_num(values.astype(np.float64), posinf=1e300, neginf=-1e300) / scale) + zero,
                        low, high)  # fmt: skip
        result: Array = (steps - zero) * scale
        return result

    def saturated(self, values: Array) -> Array:
        """Returns which of `values` lie at an end of the range or beyond, bool; half a step of tolerance."""
        low, high = _LIMITS.get(self.dtype, (-32768, 32767))
        scale, zero = self._along(self.scale, values.ndim), self._along(self.zero_point, values.ndim)
        steps = values.astype(np.float64) / scale + zero
        result: Array = (steps <= low + 0.5) | (steps >= high - 0.5)
        return result

    def _along(self, array: Array, dimensions: int) -> Array:
        array = array.astype(np.float64).reshape(-1)
        if array.size == 1 or self.axis is None:
            return array[:1].reshape([1] * dimensions)
        return array.reshape([-1 if axis == self.axis % dimensions else 1 for axis in range(dimensions)])


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
        """Whether nothing but a Softmax takes it, which sees only what is near a row's greatest value."""
        takers = self.consumers.get(tensor, [])
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


class Quantised:
    """A QDQ graph beside the float one that it was made of: where each float tensor is found in it, and how quantised.

    onnxruntime's quantiser keeps the names of tensors, but for a graph's outputs, which it renames before they are
    quantised. A tensor's value is what the DequantizeLinear behind it gives: that is what the next nodes get.
    """

    def __init__(self, model: Path | Any) -> None:
        self.model = load(model) if isinstance(model, Path) else model
        self.topology = Topology.of(model)

    def find(self, tensor: str) -> str | None:
        """Returns the name under which the value of `tensor` is found, None where it is not there."""
        pair = self.pair(tensor)
        if pair:
            return pair[1].outputs[0]
        here = tensor in self.topology.producers or tensor in self.topology.inputs
        return tensor if here else None

    def pair(self, tensor: str) -> tuple[Node | None, Node] | None:
        """Returns the QuantizeLinear and DequantizeLinear of a tensor; for a weight, which is stored quantised, the
        second alone. None where it is not quantised."""
        made = self.topology.producers.get(tensor)
        if made is not None and made.op == _DEQUANTISE:  # an output of the graph keeps its name behind both
            return self.topology.producers.get(made.inputs[0]), made
        for node in self.topology.consumers.get(tensor, ()):
            if node.op == _QUANTISE:
                readers = self.topology.consumers.get(node.outputs[0], ())
                found = [other for other in readers if other.op == _DEQUANTISE]
                if found:  # one for each node that takes it; one that does not fit is what is looked for
                    return node, min(found, key=lambda other: other.inputs[1:] == node.inputs[1:])
        for name in (f"{tensor}_quantized", f"{tensor}_QuantizeLinear_Output"):
            for node in self.topology.consumers.get(name, ()):
                if node.op == _DEQUANTISE:
                    return self.topology.producers.get(name), node
        return None

    def quantisation(self, tensor: str) -> Quantisation | None:
        """Returns how a tensor is quantised, None where it is not."""
        pair = self.pair(tensor)
        if pair is None:
            return None
        first, second = pair
        scale, zero = self._parameters(second)
        read = None if first is None else self._parameters(first)
        differ = read is not None and not (np.array_equal(read[0], scale) and np.array_equal(read[1], zero))
        axis = second.attributes.get("axis", 1) if scale.size > 1 else None
        return Quantisation(scale, zero, str(zero.dtype), axis, read if differ else None)

    def weight(self, tensor: str) -> Array | None:
        """Returns a constant as this graph has it, dequantised, float64; None where it has none of this name."""
        pair = self.pair(tensor)
        if pair is None or pair[0] is not None:
            constant = self.topology.constants.get(tensor)
            return None if constant is None else constant.astype(np.float64)
        stored = self.topology.constants.get(pair[1].inputs[0])
        quantisation = self.quantisation(tensor)
        if stored is None or quantisation is None:
            return None
        scale, zero = (quantisation._along(one, stored.ndim) for one in (quantisation.scale, quantisation.zero_point))
        result: Array = (stored.astype(np.float64) - zero) * scale
        return result

    def _parameters(self, node: Node) -> tuple[Array, Array]:
        scale = np.atleast_1d(self.topology.constants[node.inputs[1]])
        if len(node.inputs) > 2:
            return scale, np.atleast_1d(self.topology.constants[node.inputs[2]])
        return scale, np.zeros(1, np.uint8)


def with_outputs(model: Any, names: Mapping[str, str], topology: Topology) -> Any:
    """Returns a copy of a graph that gives the tensors `names` (what to call them -> tensor) besides its outputs.

    A tensor behind a DequantizeLinear is given by one of its own, so that the nodes around it stay as they are: a
    provider that takes them as one would not with a value between them that is asked for.
    """
    onnx = library()
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for name, tensor in names.items():
        made = topology.producers.get(tensor)
        if made is not None and made.op == _DEQUANTISE:
            axis = {"axis": made.attributes["axis"]} if "axis" in made.attributes else {}
            copy.graph.node.append(onnx.helper.make_node(_DEQUANTISE, list(made.inputs), [name], name=name, **axis))
        else:
            copy.graph.node.append(onnx.helper.make_node("Identity", [tensor], [name], name=name))
        copy.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    return copy


def listed(names: Sequence[str]) -> str:
    """Returns names, the later ones counted where there are many."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
