"""Passes over a decoder's ONNX graph: adapters as optional inputs, the hidden state as an output.

Modules are found by the names that torch gives to nodes: /model/layers.0/self_attn/q_proj/MatMul is the linear
model.layers.0.self_attn.q_proj. Knows nothing of how the graph was exported, is quantised or run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edge_sdss.bundles import Site
from edge_sdss.errors import ExportError, message

if TYPE_CHECKING:
    import onnx_ir as ir

HEAD = "lm_head"
EMBEDDING = "model.embed_tokens"
HIDDEN = "hidden_states"


@dataclass(frozen=True)
class Linear:
    """y = x W: the node, its module's path, and W [inputs, outputs], `transposed` where stored [outputs, inputs]."""

    node: ir.Node
    module: str
    weight: ir.Value
    inputs: int
    outputs: int
    transposed: bool

    @property
    def dtype(self) -> ir.DataType:
        """The type of W, x and y."""
        assert self.weight.const_value is not None  # see _linear
        return self.weight.const_value.dtype


def linears(graph: ir.Graph) -> dict[str, Linear]:
    """Returns every product with a stored matrix by its module's path, in the graph's order, the head among them.

    Raises ExportError where a module is computed twice, so that its name says not which product is meant.
    """
    found: dict[str, Linear] = {}
    for node in graph:
        if node.op_type != "MatMul" or node.domain:
            continue
        linear = _linear(node, node.inputs[1])
        if linear is None:
            continue
        if linear.module in found:
            asked = f"find the linears of {graph.name or 'the graph'}"
            raise ExportError(message(asked, f"{linear.module} occurs twice", "export with one decoder step"))
        found[linear.module] = linear
    return found


def add_adapters(graph: ir.Graph, expected: Mapping[str, tuple[int, int]]) -> tuple[Site, ...]:
    """Makes every linear but the head y = x W + (x A) B and returns the sites.

    `expected` has the (inputs, outputs) of each linear of the model, by module; `expected_linears` reads them.
    A [inputs, r] is the input <module>.lora_A.weight, B [r, outputs] is <module>.lora_B.weight, both float32, also
    where W is float16: ONNX Runtime's CPU turns float16 initialisers into float32 and then refuses what a caller gives
    in their place. Each is an initialiser of rank 0 as well, so that a caller may leave it out and y is then x W to
    the last bit. The rank is free for each site. Raises ExportError where a linear of the model is not in the graph.
    """
    present = {name: linear for name, linear in linears(graph).items() if name != HEAD}
    missing = [name for name, size in expected.items() if name not in present or _size(present[name]) != size]
    if missing:
        found = f"{len(missing)} of {len(expected)} linears are not where they were expected, such as {missing[0]}"
        raise ExportError(message("add adapters to the graph", found, "export the model again through Optimum"))
    sites = []
    for module, linear in present.items():
        if module not in expected:
            continue
        rank = f"{module}.rank"
        a = _optional(graph, f"{module}.lora_A.weight", (linear.inputs, rank))
        b = _optional(graph, f"{module}.lora_B.weight", (rank, linear.outputs))
        _add_product(graph, linear, a, b)
        sites.append(Site(module=module, inputs=linear.inputs, outputs=linear.outputs, lora_a=a.name, lora_b=b.name))
    return tuple(sites)


def add_hidden_states(graph: ir.Graph, width: int) -> None:
    """Adds the output hidden_states [batch, n, width] float32: what the head reads, after the final norm."""
    import onnx_ir as ir

    head = linears(graph).get(HEAD)
    if head is None:
        do = "export a causal language model, or without hidden states"
        raise ExportError(message("add the output hidden_states", f"the graph has no {HEAD}", do))
    node = ir.node("Cast", [head.node.inputs[0]], {"to": ir.DataType.FLOAT.value}, name=f"/{HIDDEN}/Cast")
    output = node.outputs[0]
    output.name, output.dtype = HIDDEN, ir.DataType.FLOAT
    output.shape = ir.Shape(["batch_size", "sequence_length", width])
    graph.append(node)
    graph.outputs.append(output)


def expected_linears(folder: Path) -> dict[str, tuple[int, int]]:
    """Returns (inputs, outputs) of every linear in the layers of a model's folder, from its safetensors' headers."""
    from safetensors import safe_open

    found: dict[str, tuple[int, int]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="np") as tensors:
            for name in sorted(tensors.keys()):
                size = tensors.get_slice(name).get_shape()
                if ".layers." in name and name.endswith(".weight") and len(size) == 2:
                    found[name.removesuffix(".weight")] = (size[1], size[0])
    if not found:
        do = "give the folder of a Hugging Face model"
        raise ExportError(message(f"read the linears of {folder}", "there are none in safetensors", do))
    return found


def save(model: ir.Model, out: Path, *, external_above: int = 100_000_000) -> Path:
    """Writes `out`/model.onnx, with the weights in one model.onnx.data where they exceed `external_above` bytes."""
    import onnx_ir as ir

    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)
    path = out / "model.onnx"
    try:
        out.mkdir(parents=True, exist_ok=True)
        if size > external_above:
            ir.save(model, path, external_data="model.onnx.data", size_threshold_bytes=1024)
        else:
            ir.external_data.load_to_model(model)
            ir.save(model, path)
    except OSError as error:
        found = error.strerror or "failed"
        raise ExportError(message(f"write {path}", found, "free space or choose another folder")) from error
    return path


def _linear(node: ir.Node, weight: ir.Value | None) -> Linear | None:
    """The linear of a MatMul whose second factor is stored, as it is or behind a Transpose."""
    if weight is None:
        return None
    producer = weight.producer()
    transposed = producer is not None and producer.op_type == "Transpose"
    if transposed and producer is not None:
        weight = producer.inputs[0]
    if weight is None or weight.const_value is None or weight.is_graph_input() or len(weight.const_value.shape) != 2:
        return None
    rows, columns = (int(size) for size in weight.const_value.shape.numpy())
    inputs, outputs = (columns, rows) if transposed else (rows, columns)
    module = ".".join((node.name or "").strip("/").split("/")[:-1])
    return Linear(node, module, weight, inputs, outputs, transposed)


def _size(linear: Linear) -> tuple[int, int]:
    return linear.inputs, linear.outputs


def _add_product(graph: ir.Graph, linear: Linear, a: ir.Value, b: ir.Value) -> None:
    """Puts y = x W + (x A) B in the place of y = x W."""
    import onnx_ir as ir

    where = (linear.node.name or linear.module).rsplit("/", 1)[0]
    nodes: list[ir.Node] = []

    def node(op: str, part: str, inputs: list[ir.Value | None], **attributes: int) -> ir.Value:
        nodes.append(ir.node(op, inputs, attributes, name=f"{where}/{part}/{op}"))
        output = nodes[-1].outputs[0]
        output.name, output.dtype = f"{where}/{part}/{op}_output_0", linear.dtype
        return output

    if linear.dtype != ir.DataType.FLOAT:
        a, b = (node("Cast", part, [x], to=linear.dtype.value) for part, x in (("lora_A", a), ("lora_B", b)))
    base = linear.node.outputs[0]
    low = node("MatMul", "lora_A", [linear.node.inputs[0], a])
    total = node("Add", "lora", [base, node("MatMul", "lora_B", [low, b])])
    ir.convenience.replace_all_uses_with(base, total)
    nodes[-1].replace_input_with(0, base)  # the line before put the sum in its own place
    graph.insert_after(linear.node, nodes)


def _optional(graph: ir.Graph, name: str, size: tuple[int | str, int | str]) -> ir.Value:
    """Adds a float32 input that may be left out: it is an initialiser too, with no element, as its rank is 0."""
    import onnx_ir as ir

    empty = np.zeros([0 if isinstance(length, str) else length for length in size], np.float32)
    tensor = ir.tensor(empty, name=name)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(size), const_value=tensor)
    graph.inputs.append(value)
    graph.register_initializer(value)
    return value
