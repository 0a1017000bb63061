"""The fast graph for CPU and CUDA, written node by node from a model's config.json and weights.

No tracing and no torch: it works with every version of transformers, in seconds. Attention is GroupQueryAttention
with rotary embedding inside and one buffer as past and present cache; q, k and v are one product; the
embedding and a tied head are stored once. Knows no tokenizer, no bundle and no session.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from edge_sdss.bundles.manifest import Graph, Precision
from edge_sdss.exporting import fast_config
from edge_sdss.exporting.fast_decoder import Decoder, Options
from edge_sdss.exporting.fast_nodes import MICROSOFT, Net
from edge_sdss.exporting.fast_weights import Weights
from edge_sdss.types import Progress, no_progress

_OPSET, _IR_VERSION = 21, 10
_PLAIN = "plain.onnx"


def build(
    folder: Path,
    out: Path,
    *,
    precision: Precision = "int4",
    adapters: bool = True,
    hidden_states: bool = False,
    last_logits_only: bool = True,
    block_size: int = 32,
    half: bool = False,
    progress: Progress = no_progress,
) -> Graph:
    """Writes out/model.onnx and out/model.onnx.data from the Hugging Face model in `folder`.

    int4 and int8 have the head in 8 bits and take over without loss what a 4-bit (8-bit) file held. Activations, KV
    cache and adapters are float32, or with `half`, and in precision float16, float16, which GPUs want. Prompts of a
    batch are padded on the right. Raises ExportError for a family or file that is not supported.
    """
    options = Options(precision, block_size, adapters, hidden_states, last_logits_only, half=half)
    return build_with(options, folder, out, progress)


def build_with(options: Options, folder: Path, out: Path, progress: Progress = no_progress) -> Graph:
    """`build`, with every choice open."""
    import onnx_ir as ir

    spec = fast_config.read(folder)
    net = Net(np.float16 if options.half or options.precision == "float16" else np.float32)
    decoder = Decoder(spec, Weights(folder), options, net, progress)
    outputs = decoder.write()
    graph = ir.Graph(
        net.inputs, outputs, nodes=net.nodes, initializers=list(net.constants.values()), name="decoder",
        opset_imports={"": _OPSET, MICROSOFT: 1},
    )  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    model = ir.Model(graph, ir_version=_IR_VERSION, producer_name="edge_sdss")
    ir.save(model, out / "model.onnx", external_data="model.onnx.data")
    if net.sites:
        _write_plain(out, {name for site in net.sites for name in (site.lora_a, site.lora_b)})
    float_name = "float16" if net.dtype is np.float16 else "float32"
    return Graph(
        precision=options.precision, block_size=options.block_size if options.precision.startswith("int") else None,
        kv_cache="shared", kv_dtype=float_name, lora_dtype=float_name, position_ids=False,
        hidden_states=options.hidden_states, last_logits_only=options.last_logits_only, layers=spec.layers,
        kv_heads=spec.kv_heads, head_dim=spec.head_dim, vocabulary=spec.vocabulary, width=spec.width,
        context=spec.context, sites=tuple(net.sites), plain=_PLAIN if net.sites else None,
    )  # fmt: skip


def _write_plain(out: Path, lora: set[str]) -> None:
    """Writes the graph once more over the same data file, without adapters: even of rank 0 their nodes take time."""
    import onnx_ir as ir

    graph = ir.load(out / "model.onnx").graph
    gone = []
    for node in graph:
        kind = (node.name or "").rpartition(".")[2]
        if kind == "adapted":
            base = node.inputs[2 if node.op_type == "Gemm" else 0]
            assert base is not None
            ir.convenience.replace_all_uses_with(node.outputs[0], base)
        if kind in ("adapted", "lora_inner", "lora_outer"):
            gone.append(node)
    graph.remove(gone, safe=True)
    for name in lora:
        graph.inputs.remove(graph.initializers.pop(name))
    ir.save(ir.Model(graph, ir_version=_IR_VERSION, producer_name="edge_sdss"), out / _PLAIN)
