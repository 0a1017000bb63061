"""The portable route: standard operators, a growing KV cache; any provider of ONNX Runtime runs it."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from edge_sdss.bundles import Graph, Site
from edge_sdss.bundles.manifest import Precision
from edge_sdss.errors import ExportError, message
from edge_sdss.exporting import graphs, onnx
from edge_sdss.exporting.quantize import Scheme, ZeroPoints, quantize
from edge_sdss.types import Progress, no_progress

if TYPE_CHECKING:
    import onnx_ir as ir


def portable(
    folder: Path,
    out: Path,
    *,
    precision: Precision = "float32",
    adapters: bool = True,
    hidden_states: bool = False,
    block_size: int = 32,
    zero_points: ZeroPoints = "none",
    accuracy_level: int = 4,
    before_quantising: Callable[[Path, Graph], object] | None = None,
    progress: Progress = no_progress,
) -> Graph:
    """Exports the model of `folder` into `out` and returns what a runtime must know of the graph.

    `out` gets model.onnx, model.onnx.data where the weights exceed 100 MB, the tokenizer's and the configuration's
    files. int4 means 4 bits in the layers and 8 in the embedding and head, stored once where the model ties
    them; int8 means 8 bits throughout; both in blocks of `block_size`. `zero_points` and `accuracy_level`:
    see `quantize.Scheme`. With `adapters` every linear of the layers has its two inputs; `hidden_states` adds
    that output. `before_quantising` is shown the float32 graph, in a folder that is gone afterwards. What is already
    in `out` is overwritten.

    Raises BackendUnavailable and ExportError as `onnx.export` does, and ExportError for a disk that is full.
    """
    import onnx_ir as ir

    facts = onnx.shape(folder)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out, prefix=".export-") as name:
            plain = Path(name)
            dtype: Literal["float32", "float16"] = "float16" if precision == "float16" else "float32"
            path = onnx.export(folder, plain, dtype=dtype, progress=progress)
            gc.collect()  # the torch model is in cycles
            model = ir.load(path)
            sites = graphs.add_adapters(model.graph, graphs.expected_linears(folder)) if adapters else ()
            if hidden_states:
                graphs.add_hidden_states(model.graph, facts.width)
            if precision in ("int8", "int4"):
                if before_quantising is not None:
                    graphs.save(model, plain / "float")
                    before_quantising(plain / "float", _described(facts, model, "float32", hidden_states, sites))
                head = Scheme(8, block_size, "none", accuracy_level)
                body = head if precision == "int8" else Scheme(4, block_size, zero_points, accuracy_level)
                quantize(model, body, head, progress=progress)
            graphs.save(model, out)
            onnx.copy_companions(plain, out)
    except OSError as error:
        found = error.strerror or "failed"
        raise ExportError(message(f"export into {out}", found, "free space or choose another folder")) from error
    return _described(facts, model, precision, hidden_states, sites, block_size)


def _described(
    facts: onnx.Shape,
    model: ir.Model,
    precision: Precision,
    hidden_states: bool,
    sites: tuple[Site, ...],
    block_size: int | None = None,
) -> Graph:
    names = {value.name for value in model.graph.inputs}
    return Graph(
        precision=precision,
        block_size=block_size if precision in ("int8", "int4") else None,
        kv_cache="growing",
        kv_dtype="float16" if precision == "float16" else "float32",
        lora_dtype="float32",
        position_ids="position_ids" in names,
        hidden_states=hidden_states,
        layers=facts.layers,
        kv_heads=facts.kv_heads,
        head_dim=facts.head_dim,
        vocabulary=facts.vocabulary,
        width=facts.width,
        context=facts.context,
        sites=sites,
    )
