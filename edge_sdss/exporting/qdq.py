"""A float graph with some of its products quantised, as QuantizeLinear and DequantizeLinear say it (QDQ).

Quantised are the products with stored matrices: weights as int8 or int4 with a scale for each output or each block of
one, what goes in and comes out as symmetric int16. All else stays in float: norms, residual sums, attention and
adapters, so that an adapter's effect meets no range that was calibrated without it. Weights are what decoding waits
for. Knows no provider.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from edge_sdss.exporting.rounding import rounded

if TYPE_CHECKING:
    import onnx_ir as ir

_TOP = 32767  # of symmetric int16


@dataclass(frozen=True, slots=True)
class Scheme:
    """`bits` of the layers' weights and of the head's; None: it stays in float, as do the first `float_layers`, whose
    errors would grow through all others. `headroom`: how many times the range seen in calibration fits. `block`: inputs
    of an output that share a scale, None: all of them."""

    bits: Literal[4, 8] = 8
    head_bits: Literal[4, 8] | None = 8
    float_layers: int = 0
    headroom: float = 1.25
    block: int | None = None

    def of_layer(self, number: int) -> int | None:
        """Bits of a layer's weights; None: they stay in float."""
        return self.bits if number >= self.float_layers else None

    def taken(self, bits: int | None) -> float:
        """Bits that a weight takes on an HTP, its share of a block's scale among them."""
        if bits is None:
            return 16
        return bits + 32 / self.block if self.block else bits


@dataclass
class Statistics:
    """What calibration saw: `largest` |x| of each tensor; `grams`, Σ x xᵀ [inputs, inputs], of each product's input."""

    largest: dict[str, float]
    grams: dict[str, npt.NDArray[np.float64]]

    def add(self, name: str, values: npt.NDArray[Any], *, gram: bool) -> None:
        """Takes values [.., n] of a tensor into account."""
        self.largest[name] = max(self.largest.get(name, 0.0), float(np.abs(values).max(initial=0.0)))
        if gram:
            rows = values.reshape(-1, values.shape[-1])
            self.grams[name] = self.grams.get(name, 0.0) + (rows.T @ rows).astype(np.float64)


def products(model: ir.Model) -> list[ir.Node]:
    """Returns the MatMuls with a stored matrix, in the graph's order."""
    return [
        node for node in model.graph
        if node.op_type == "MatMul" and node.inputs[1] is not None and node.inputs[1].is_initializer()
        and not node.inputs[1].is_graph_input()
    ]  # fmt: skip


def wanted(model: ir.Model) -> dict[str, bool]:
    """Returns what calibration must look at: tensor -> whether its gram is wanted, for the products' ins and outs."""
    found: dict[str, bool] = {}
    for node in products(model):
        found[_name(node.inputs[0])] = True
        found.setdefault(_name(node.outputs[0]), False)
    return found


def expose(model: ir.Model, names: Iterable[str]) -> None:
    """Makes these tensors outputs of the graph as well, in place, in float32."""
    import onnx_ir as ir

    known = {output.name for output in model.graph.outputs}
    values = {value.name: value for node in model.graph for value in node.outputs}
    for name in names:
        if name not in known and name in values:
            values[name].dtype = ir.DataType.FLOAT
            model.graph.outputs.append(values[name])


def quantise(model: ir.Model, statistics: Statistics, scheme: Scheme, codes: dict[str, Any] | None = None) -> None:
    """Puts Q and DQ around the products, in place.

    A tensor X keeps its name; behind it come X_QuantizeLinear_Output and X_DequantizeLinear_Output, and of an output of
    the graph DequantizeLinear's has the name itself. A weight W is stored as W_quantized. `codes` keeps rounded weights
    by name for a second graph of the same model. Raises KeyError for a tensor that calibration did not see.
    """
    writer = _Quantiser(model, statistics, scheme, {} if codes is None else codes)
    for node in products(model):
        bits = _bits(_name(node.inputs[1]), scheme)
        if bits is not None:
            writer.product(node, bits)
    writer.finish()


def _bits(weight: str, scheme: Scheme) -> int | None:
    """Those of a weight by its name, such as layers.3.attn.q.weight; None: it stays in float."""
    first, layer, *_ = weight.split(".")
    if first != "layers":
        return scheme.head_bits
    return scheme.of_layer(int(layer))


class _Quantiser:
    def __init__(self, model: ir.Model, statistics: Statistics, scheme: Scheme, codes: dict[str, Any]) -> None:
        self.model, self.statistics, self.scheme, self.codes = model, statistics, scheme, codes
        self.made: dict[str, ir.Value] = {}

    def product(self, node: ir.Node, bits: int) -> None:
        """Quantises what goes into a MatMul, its weight and what comes out."""
        entering, weight, output = node.inputs[0], node.inputs[1], node.outputs[0]
        assert entering is not None
        assert weight is not None
        node.replace_input_with(0, self._activation(entering, node))
        node.replace_input_with(1, self._weight(weight, _name(entering), bits, node))
        self._output(output, node)

    def finish(self) -> None:
        """Drops the float weights."""
        for name, value in list(self.model.graph.initializers.items()):
            if not value.uses() and not value.is_graph_input():
                del self.model.graph.initializers[name]

    def _activation(self, value: ir.Value, before: ir.Node) -> ir.Value:
        name = _name(value)
        if name not in self.made:
            self.made[name] = self._pair(value, name, lambda nodes: self.model.graph.insert_before(before, nodes))
        return self.made[name]

    def _output(self, value: ir.Value, node: ir.Node) -> None:
        name, users, is_output = _name(value), list(value.uses()), value.is_graph_output()
        value.name = f"{name}_QuantizeLinear_Input" if is_output else name
        result = self._pair(value, name, lambda nodes: self.model.graph.insert_after(node, nodes))
        for use in users:
            use.node.replace_input_with(use.idx, result)
        if is_output:
            result.name, result.type, result.shape = name, value.type, value.shape
            outputs = self.model.graph.outputs
            outputs[next(at for at, one in enumerate(outputs) if one is value)] = result

    def _pair(self, value: ir.Value, name: str, place: Callable[[list[ir.Node]], None]) -> ir.Value:
        import onnx_ir as ir

        scale = max(self.statistics.largest[name] * self.scheme.headroom, 1e-6) / _TOP
        scales = self._constant(f"{name}_scale", np.array(scale, np.float32))
        zero = self._constant("zero_int16", np.array(0, np.int16))
        q = ir.node("QuantizeLinear", [value, scales, zero], name=f"{name}_QuantizeLinear")
        q.outputs[0].name = f"{name}_QuantizeLinear_Output"
        dq = ir.node("DequantizeLinear", [q.outputs[0], scales, zero], name=f"{name}_DequantizeLinear")
        dq.outputs[0].name = f"{name}_DequantizeLinear_Output"
        place([q, dq])
        return dq.outputs[0]

    def _weight(self, weight: ir.Value, entering: str, bits: int, before: ir.Node) -> ir.Value:
        import onnx_ir as ir

        name = _name(weight)
        if name not in self.codes:
            assert weight.const_value is not None
            gram = self.statistics.grams.get(entering)
            self.codes[name] = rounded(
                np.ascontiguousarray(weight.const_value.numpy().T), bits, gram, self.scheme.block
            )
        found = self.codes[name]
        codes = np.ascontiguousarray(found.codes.T)
        if bits == 4:
            import ml_dtypes

            codes = codes.astype(ml_dtypes.int4)
        block = self.scheme.block
        scales = found.scales[:, 0] if block is None else np.ascontiguousarray(found.scales.T)
        zeros = np.zeros(scales.shape, codes.dtype)
        inputs = [
            self._constant(f"{name}_{part}", array)
            for part, array in (("quantized", codes), ("scale", scales), ("zero_point", zeros))
        ]
        along = {"axis": 1} if block is None else {"axis": 0, "block_size": block}
        dq = ir.node("DequantizeLinear", inputs, along, name=f"{name}_DequantizeLinear")
        dq.outputs[0].name = f"{name}_DequantizeLinear_Output"
        self.model.graph.insert_before(before, dq)
        return dq.outputs[0]

    def _constant(self, name: str, array: npt.NDArray[Any]) -> ir.Value:
        import onnx_ir as ir

        if name not in self.model.graph.initializers:
            value = ir.val(name, const_value=ir.tensor(array, name=name))
            self.model.graph.register_initializer(value)
        return self.model.graph.initializers[name]


def _name(value: ir.Value | None) -> str:
    assert value is not None
    assert value.name
    return value.name
