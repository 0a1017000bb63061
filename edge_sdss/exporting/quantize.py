"""Weights in 4 or 8 bits: every stored matrix becomes a MatMulNBits, embedding and tied head share one tensor.

A block of weights of one output has one scale: w = scale (q - zero point). Adapters stay in float: theirs are
inputs, not stored. Knows nothing of how the graph was made; `MatMulNBits` and `GatherBlockQuantized` are
operators of ONNX Runtime (domain com.microsoft).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from edge_sdss.errors import ExportError, message
from edge_sdss.exporting import blocks as layout
from edge_sdss.exporting.graphs import HEAD, Linear, linears
from edge_sdss.types import Progress, no_progress

if TYPE_CHECKING:
    import onnx_ir as ir

ZeroPoints = Literal["none", "integer", "float"]

FloatArray = npt.NDArray[np.float32]
ByteArray = npt.NDArray[np.uint8]

_DOMAIN = "com.microsoft"
_BLOCK_SIZES = (16, 32, 64, 128, 256)
_ROWS = 4096  # quantised at a time, so that a large head needs little memory besides itself


@dataclass(frozen=True)
class Scheme:
    """How a matrix is stored.

    zero_points "none": symmetric about 0. "integer": one of as many bits as the weights, which fits skewed blocks
    better. "float": any value, exact for weights that come from a GGUF of type Q4_1 with blocks of 32, but ONNX
    Runtime's CPU then computes in float. accuracy_level 4 lets it round activations to 8 bits, 0 does not.
    """

    bits: Literal[4, 8] = 4
    block_size: int = 32
    zero_points: ZeroPoints = "none"
    accuracy_level: int = 4


@dataclass(frozen=True)
class Blocks:
    """A matrix [outputs, inputs] in blocks along its inputs, as MatMulNBits wants it.

    data [outputs, blocks, block_size · bits / 8] uint8, of 4 bits the lower half first; scales [outputs, blocks]
    float32; zero_points None, [outputs, ⌈blocks · bits / 8⌉] uint8 packed alike, or [outputs, blocks] float32.
    """

    data: ByteArray
    scales: FloatArray
    zero_points: npt.NDArray[Any] | None


def to_blocks(weight: FloatArray, scheme: Scheme) -> Blocks:
    """Quantises `weight` [outputs, inputs]; inputs that fill no block are followed by zeros."""
    parts = [_to_blocks(weight[start : start + _ROWS], scheme) for start in range(0, len(weight), _ROWS)]
    data, scales, zeros = zip(*((part.data, part.scales, part.zero_points) for part in parts), strict=True)
    none = scheme.zero_points == "none"
    return Blocks(np.concatenate(data), np.concatenate(scales), None if none else np.concatenate(zeros))


def from_blocks(blocks: Blocks, scheme: Scheme, inputs: int) -> FloatArray:
    """Returns the matrix [outputs, inputs] float32 that a runtime computes with."""
    outputs, count, _ = blocks.data.shape
    q = layout.unpacked(blocks.data, scheme.bits).astype(np.float32)
    zero: Any = float(1 << (scheme.bits - 1))
    if blocks.zero_points is not None:
        integer = scheme.zero_points == "integer"
        zero = layout.unpacked(blocks.zero_points, scheme.bits)[:, :count] if integer else blocks.zero_points
        zero = zero.astype(np.float32)[..., None]
    weight: FloatArray = ((q - zero) * blocks.scales[..., None]).reshape(outputs, -1)[:, :inputs]
    return weight


def quantize(
    model: ir.Model,
    body: Scheme,
    head: Scheme | None = None,
    *,
    embedding: bool = True,
    progress: Progress = no_progress,
) -> None:
    """Replaces the model's stored matrices in place: `body` for the layers, `head` (default `body`) for the head.

    With `embedding` the table that the head is tied to is stored once, quantised as the head is, and read by both;
    an untied one is quantised likewise on its own. Without, it stays in float, and a tied head with it. A scheme
    with float zero points cannot hold the embedding. Raises ExportError where a block size does not fit.
    """
    head = head or body
    for scheme in (body, head):
        if scheme.block_size not in _BLOCK_SIZES:
            do = f"choose one of {', '.join(map(str, _BLOCK_SIZES))}"
            raise ExportError(message("quantise", f"ONNX Runtime has no blocks of {scheme.block_size}", do))
    if embedding and head.zero_points == "float":
        found = "float zero points, and GatherBlockQuantized takes integers"
        raise ExportError(message("quantise the embedding", found, "give the head another scheme"))
    found_linears = linears(model.graph)
    tied = HEAD in found_linears and found_linears[HEAD].transposed
    for done, (module, linear) in enumerate(found_linears.items()):
        progress("quantise", done, len(found_linears))
        if module == HEAD and tied and not embedding:
            continue
        is_head = module == HEAD
        stored = _replace(model.graph, linear, head if is_head else body)
        if is_head and tied:
            _gather(model.graph, linear.weight, stored, head, linear.inputs)
    if embedding and not tied:
        _untied_embedding(model.graph, head)
    model.opset_imports[_DOMAIN] = 1
    _drop_unused(model)
    progress("quantise", len(found_linears), len(found_linears))


def _to_blocks(weight: FloatArray, scheme: Scheme) -> Blocks:
    x, top = layout.cut(weight, scheme.block_size), (1 << scheme.bits) - 1
    if scheme.zero_points == "none":
        scales, zeros = _symmetric(x, top)
    elif scheme.zero_points == "integer":
        scales, zeros = _skewed(np.minimum(x.min(-1), 0), np.maximum(x.max(-1), 0), top)
        zeros = np.round(zeros)
    else:
        scales, zeros = _skewed(x.min(-1), x.max(-1), top)
    q = np.clip(np.round(x / scales[..., None] + zeros[..., None]), 0, top)
    if scheme.zero_points != "float":
        scales = _refit(x, q - zeros[..., None], scales)
    data = layout.packed(q, scheme.bits)
    if scheme.zero_points == "none":
        return Blocks(data, scales, None)
    return Blocks(data, scales, zeros if scheme.zero_points == "float" else layout.packed(zeros, scheme.bits))


def _symmetric(x: FloatArray, top: int) -> tuple[FloatArray, FloatArray]:
    """The weight largest in size takes the code 0, which reaches one step further than the highest code."""
    middle = (top + 1) / 2
    largest = np.take_along_axis(x, np.abs(x).argmax(-1)[..., None], -1)[..., 0]
    return layout.nonzero(-largest / middle), np.full(largest.shape, middle, np.float32)


def _skewed(low: FloatArray, high: FloatArray, top: int) -> tuple[FloatArray, FloatArray]:
    """The lowest weight takes the code 0 and the highest the top one."""
    scales = layout.nonzero((high - low) / top)
    return scales, (-low / scales).astype(np.float32)


def _refit(x: FloatArray, q: npt.NDArray[Any], scales: FloatArray) -> FloatArray:
    """Returns the scales of least squared error for codes q: Σ qx / Σ q²."""
    squares = (q * q).sum(-1)
    return np.where(squares > 0, (q * x).sum(-1) / np.maximum(squares, 1), scales).astype(np.float32)


def _replace(graph: ir.Graph, linear: Linear, scheme: Scheme) -> list[ir.Value]:
    """Puts a MatMulNBits in the place of the linear; returns its stored values: data, scales and zero points."""
    import onnx_ir as ir

    assert linear.weight.const_value is not None
    weight = linear.weight.const_value.numpy().astype(np.float32)
    stored = _stored(graph, linear.module, to_blocks(weight if linear.transposed else weight.T, scheme), linear.dtype)
    attributes = {"K": linear.inputs, "N": linear.outputs, "bits": scheme.bits, "block_size": scheme.block_size}
    attributes["accuracy_level"] = scheme.accuracy_level
    node = ir.node(
        "MatMulNBits", [linear.node.inputs[0], *stored], attributes, domain=_DOMAIN, name=f"{linear.node.name}_Q"
    )
    _take_place(graph, linear.node, [node])
    return stored


def _gather(graph: ir.Graph, table: ir.Value, stored: list[ir.Value], scheme: Scheme, width: int) -> None:
    """Makes the Gather that looks rows up in `table` read the blocks `stored` instead."""
    import onnx_ir as ir

    gather = next((use.node for use in table.uses() if use.node.op_type == "Gather"), None)
    if gather is None:
        found = f"no Gather reads {table.name}"
        raise ExportError(message("quantise the embedding", found, "quantise with embedding=False"))
    if width % scheme.block_size:
        found = f"the width {width} is no multiple of the block size {scheme.block_size}"
        raise ExportError(message("quantise the embedding", found, "choose another block size"))
    data = stored[0]
    assert data.const_value is not None
    # two operators want two shapes of the same bytes
    flat = np.array([data.const_value.shape[0], -1], np.int64)
    size = _initializer(graph, f"{table.name}.flat", flat)
    rows = ir.node("Reshape", [data, size], name=f"{gather.name}/Reshape")
    rows.outputs[0].name = f"{table.name}.rows"
    attributes = {"bits": scheme.bits, "block_size": scheme.block_size, "gather_axis": 0, "quantize_axis": 1}
    inputs = [rows.outputs[0], gather.inputs[1], *stored[1:]]
    node = ir.node("GatherBlockQuantized", inputs, attributes, domain=_DOMAIN, name=f"{gather.name}_Q")
    _take_place(graph, gather, [rows, node])


def _untied_embedding(graph: ir.Graph, scheme: Scheme) -> None:
    for node in list(graph):
        table = node.inputs[0] if node.op_type == "Gather" else None
        if table is None or table.const_value is None or "embed_tokens" not in (node.name or ""):
            continue
        weight = table.const_value.numpy().astype(np.float32)
        stored = _stored(graph, f"{table.name}.table", to_blocks(weight, scheme), table.const_value.dtype)
        _gather(graph, table, stored, scheme, weight.shape[1])


def _stored(graph: ir.Graph, name: str, blocks: Blocks, dtype: ir.DataType) -> list[ir.Value]:
    arrays: list[tuple[str, npt.NDArray[Any] | None]] = [
        ("Q", blocks.data),
        ("scales", blocks.scales),
        ("zero_points", blocks.zero_points),
    ]
    return [
        _initializer(graph, f"{name}.weight_{part}", array if array.dtype == np.uint8 else array.astype(dtype.numpy()))
        for part, array in arrays
        if array is not None
    ]


def _initializer(graph: ir.Graph, name: str, array: npt.NDArray[Any]) -> ir.Value:
    import onnx_ir as ir

    tensor = ir.tensor(np.ascontiguousarray(array), name=name)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)
    graph.register_initializer(value)
    return value


def _take_place(graph: ir.Graph, old: ir.Node, new: list[ir.Node]) -> None:
    """Puts `new` where `old` was; the output of the last of them takes over name, type and uses."""
    import onnx_ir as ir

    before, after = old.outputs[0], new[-1].outputs[0]
    after.name, after.type, after.shape = before.name, before.type, before.shape
    graph.insert_after(old, new)
    ir.convenience.replace_all_uses_with(before, after, replace_graph_outputs=True)
    graph.remove(old, safe=True)


def _drop_unused(model: ir.Model) -> None:
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    RemoveUnusedNodesPass()(model)
