"""Quantised tensors: how one is quantised, where it is found in a QDQ graph, how to look at more of them.

Knows nothing of which values are right.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edge_sdss.exporting.explain.graph import Array, Node, Topology, library, load

_QUANTISE, _DEQUANTISE = "QuantizeLinear", "DequantizeLinear"
_LIMITS = {"uint8": (0, 255), "int8": (-128, 127), "uint16": (0, 65535), "int16": (-32768, 32767), "int4": (-8, 7),
           "uint4": (0, 15)}  # fmt: skip


@dataclass(frozen=True)
class Quantisation:
    """value = (q - zero_point) · scale, q of `dtype`; both [1], or [channels] along `axis`; with `block`, of the
    value's shape, but one for so many values along `axis`.

    `stored` are the scale and zero point with which the value was made into q, where they differ from those with which
    it is read: then the two do not undo each other.
    """

    scale: Array
    zero_point: Array
    dtype: str
    axis: int | None = None
    block: int | None = None
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
        if self.block and self.axis is not None:
            return np.repeat(array.astype(np.float64), self.block, self.axis)
        array = array.astype(np.float64).reshape(-1)
        if array.size == 1 or self.axis is None:
            return array[:1].reshape([1] * dimensions)
        return array.reshape([-1 if axis == self.axis % dimensions else 1 for axis in range(dimensions)])


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
        block = second.attributes.get("block_size") or None
        return Quantisation(scale, zero, str(zero.dtype), axis, block, read if differ else None)

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
    domains = {output: node.domain for node in model.graph.node for output in node.output}
    for name, tensor in names.items():
        made = topology.producers.get(tensor)
        if made is not None and made.op == _DEQUANTISE:
            own = {"axis": made.attributes["axis"]} if "axis" in made.attributes else {}
            own["domain"] = domains[tensor]  # int16 is ONNX Runtime's own type of it in older versions
            copy.graph.node.append(onnx.helper.make_node(_DEQUANTISE, list(made.inputs), [name], name=name, **own))
        else:
            copy.graph.node.append(onnx.helper.make_node("Identity", [tensor], [name], name=name))
        copy.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    return copy
