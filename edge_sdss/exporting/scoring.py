"""The scores of selection as nodes of an ONNX graph: token embeddings -> EOE, e(T), dissimilarity.

TensorRT runs the nodes of the domain `edge_sdss` by the plugins in kernels/tensorrt; `reference` defines each of them
by ONNX's own operators, so that ONNX Runtime can run the very same graph on a CPU. Behind an embedding model the
scores come out of the engine's run that makes the embeddings. Knows nothing of bundles, and of how engines are built.

    score_tokens    [N, d] float32   the rows of all dialogues; behind a model its hidden states
    score_offsets   [B + 1] int64    dialogue b holds the rows score_offsets[b]:score_offsets[b + 1]
    domain_means    [m, d] float32   the mean unit vector of each domain's entries
    domain          [B] int32        each dialogue's domain; -1: it has no entry yet
 -> eoe             [B] float32      in [0, 1]
    embedding       [B, d] float32   e(T), the unit mean token; 0 where empty
    dissimilarity   [B] float32      1 - e(T)·mean, clipped to [0, 1]; 1 where the domain is -1
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from edge_sdss.backends import kernels
from edge_sdss.errors import BackendUnavailable, ExportError, message

if TYPE_CHECKING:
    from onnx import ModelProto

Variant = Literal["token", "centered"]

DOMAIN = "edge_sdss"
INPUTS = ("score_offsets", "domain_means", "domain")
OUTPUTS = ("eoe", "embedding", "dissimilarity")
OPSET = 17
_HIDDEN = "hidden_states"
_ATTRIBUTES = 'plugin_namespace = "edge_sdss", plugin_version = "1"'

_ENTROPY = {
    "token": f"eoe = edge_sdss.token_entropy <{_ATTRIBUTES}> (score_tokens, score_offsets)",
    "centered": f"eoe = edge_sdss.centered_entropy <{_ATTRIBUTES}> (score_tokens, mean, score_offsets)",
}
# The least normal float32 keeps the zero vector of an empty dialogue 0.
_GRAPH = """<ir_version: 8, opset_import: ["" : {opset}, "edge_sdss" : 1]>
scores (float[rows, {width}] score_tokens, int64[bounds] score_offsets, float[domains, {width}] domain_means,
        int32[dialogues] domain)
    => (float[dialogues] eoe, float[dialogues, {width}] embedding, float[dialogues] dissimilarity) {{
    mean = edge_sdss.ragged_mean <{attributes}> (score_tokens, score_offsets)
    {entropy}
    squares = Mul (mean, mean)
    columns = Constant <value = int64[1] {{1}}> ()
    energy = ReduceSum <keepdims = 1> (squares, columns)
    length = Sqrt (energy)
    least = Constant <value = float {{1.1754944e-38}}> ()
    divisor = Max (length, least)
    embedding = Div (mean, divisor)
    dissimilarity = edge_sdss.dissimilarity <{attributes}> (embedding, domain_means, domain)
}}"""

# [B, N]: 1 where a row belongs to a dialogue.
_MEMBERS = """
    zero = Constant <value = int64[1] {0}> ()
    one = Constant <value = int64[1] {1}> ()
    scalar_zero = Constant <value = int64 {0}> ()
    scalar_one = Constant <value = int64 {1}> ()
    end = Constant <value = int64[1] {9223372036854775807}> ()
    minus_one = Constant <value = int64[1] {-1}> ()
    shape = Shape (x)
    n = Gather (shape, scalar_zero)
    index = Range (scalar_zero, n, scalar_one)
    starts = Slice (offsets, zero, minus_one)
    ends = Slice (offsets, one, end)
    start_column = Unsqueeze (starts, one)
    end_column = Unsqueeze (ends, one)
    before = Less (index, start_column)
    from_start = Not (before)
    until_end = Less (index, end_column)
    inside = And (from_start, until_end)
    members = Cast <to = 1> (inside)
    lengths = Sub (ends, starts)
    count = Cast <to = 1> (lengths)
"""
_LEAST_COUNT = "least_count = Constant <value = float {1.0}> ()"
# From w [N] float32: H = (ln Z - S / Z) / ln n in float64.
_FROM_WEIGHTS = """
    w = Cast <to = 11> (energies)
    members_64 = Cast <to = 11> (members)
    tiny = Constant <value = double {1e-300}> ()
    zero_64 = Constant <value = double {0.0}> ()
    one_64 = Constant <value = double {1.0}> ()
    two_64 = Constant <value = double {2.0}> ()
    some_w = Max (w, tiny)
    log_w = Log (some_w)
    w_log_w = Mul (w, log_w)
    z = MatMul (members_64, w)
    s = MatMul (members_64, w_log_w)
    some_z = Max (z, tiny)
    log_z = Log (some_z)
    ratio = Div (s, some_z)
    h = Sub (log_z, ratio)
    count_64 = Cast <to = 11> (count)
    states = Max (count_64, two_64)
    most = Log (states)
    share = Div (h, most)
    low = Max (share, zero_64)
    high = Min (low, one_64)
    single = Less (count_64, two_64)
    silent = Equal (z, zero_64)
    none = Or (single, silent)
    result = Where (none, zero_64, high)
    out = Cast <to = 1> (result)
"""
_FUNCTIONS = (
    f"""<opset_import: ["" : {OPSET}], domain: "edge_sdss">
ragged_mean <plugin_namespace, plugin_version> (x, offsets) => (out) {{ {_MEMBERS} {_LEAST_COUNT}
    sums = MatMul (members, x)
    divisor = Max (count, least_count)
    column = Unsqueeze (divisor, one)
    out = Div (sums, column)
}}""",
    f"""<opset_import: ["" : {OPSET}], domain: "edge_sdss">
token_entropy <plugin_namespace, plugin_version> (x, offsets) => (out) {{ {_MEMBERS}
    squares = Mul (x, x)
    energies = ReduceSum <keepdims = 0> (squares, one) {_FROM_WEIGHTS}
}}""",
    f"""<opset_import: ["" : {OPSET}], domain: "edge_sdss">
centered_entropy <plugin_namespace, plugin_version> (x, means, offsets) => (out) {{ {_MEMBERS}
    rows_by_dialogues = Transpose <perm = [1, 0]> (members)
    own_mean = MatMul (rows_by_dialogues, means)
    centred = Sub (x, own_mean)
    squares = Mul (centred, centred)
    energies = ReduceSum <keepdims = 0> (squares, one) {_FROM_WEIGHTS}
}}""",
    f"""<opset_import: ["" : {OPSET}], domain: "edge_sdss">
dissimilarity <plugin_namespace, plugin_version> (v, means, domain) => (out) {{
    scalar_zero = Constant <value = int32 {{0}}> ()
    one = Constant <value = int64[1] {{1}}> ()
    known = Max (domain, scalar_zero)
    own = Gather <axis = 0> (means, known)
    products = Mul (v, own)
    cosine = ReduceSum <keepdims = 0> (products, one)
    nothing = Constant <value = float {{0.0}}> ()
    everything = Constant <value = float {{1.0}}> ()
    distance = Sub (everything, cosine)
    low = Max (distance, nothing)
    high = Min (low, everything)
    new = Less (domain, scalar_zero)
    out = Where (new, everything, high)
}}""",
)


def graph(width: int, variant: Variant = "centered", opset: int = OPSET) -> ModelProto:
    """Returns the scores alone, for embeddings of size `width`. Raises BackendUnavailable without onnx."""
    onnx = _onnx()
    text = _GRAPH.format(width=width, opset=opset, entropy=_ENTROPY[variant], attributes=_ATTRIBUTES)
    model: ModelProto = onnx.parser.parse_model(text)
    for node in model.graph.node:
        node.name = f"edge_sdss/{node.output[0]}"  # what the engine's builder keeps in float32
    return model


def behind(model: ModelProto, width: int, variant: Variant = "centered") -> ModelProto:
    """Returns a model, weights and all, whose hidden_states [batch, n, width] are scored, all rows one after the other.

    Raises ExportError where it has no such output, BackendUnavailable without onnx.
    """
    onnx = _onnx()
    if _HIDDEN not in {value.name for value in model.graph.output}:
        do = "export it with hidden states"
        raise ExportError(message("put the scores behind a model", f"it has no output {_HIDDEN}", do))
    opset = next(entry.version for entry in model.opset_import if entry.domain == "")
    scores = graph(width, variant, opset)
    joined: ModelProto = onnx.ModelProto()
    joined.CopyFrom(model)
    flat = onnx.numpy_helper.from_array(np.array([-1, width], dtype=np.int64), "edge_sdss/flat")
    joined.graph.initializer.append(flat)
    reshape = onnx.helper.make_node("Reshape", [_HIDDEN, flat.name], ["score_tokens"], name="edge_sdss/score_tokens")
    joined.graph.node.extend([reshape, *scores.graph.node])
    joined.graph.input.extend(value for value in scores.graph.input if value.name in INPUTS)
    joined.graph.output.extend(scores.graph.output)
    joined.opset_import.append(onnx.helper.make_opsetid(DOMAIN, 1))
    return joined


def reference(model: ModelProto) -> ModelProto:
    """Returns the same graph with the plugins defined by ONNX's own operators: what they must compute."""
    onnx = _onnx()
    whole: ModelProto = onnx.ModelProto()
    whole.CopyFrom(model)
    whole.functions.extend(onnx.parser.parse_function(text) for text in _FUNCTIONS)
    return whole


def write(folder: Path, width: int, variant: Variant = "centered") -> None:
    """Writes, beside a folder's model.onnx, scored.onnx with the scores behind it, and plugins/ for TensorRT.

    External weights are shared by both graphs. Raises ExportError and BackendUnavailable as `behind` does.
    """
    onnx = _onnx()
    model = onnx.load(str(folder / "model.onnx"), load_external_data=False)
    onnx.save(behind(model, width, variant), str(folder / "scored.onnx"))
    plugins = folder / "plugins"
    plugins.mkdir()
    for source in sorted((kernels() / "tensorrt").glob("*.py")):
        shutil.copyfile(source, plugins / source.name)
    for suffix in ("ptx", "cubin"):  # CUDA 12.6's, which newer drivers take too
        shutil.copyfile(kernels() / "images" / "jetpack6" / f"plugins.{suffix}", plugins / f"plugins.{suffix}")


def ranges(width: int, batch: int, domains: int = 64) -> dict[str, tuple[tuple[int, ...], ...]]:
    """Returns the least, best and greatest shape of each input that the scores add, for up to `batch` dialogues."""
    return {
        "score_offsets": ((2,), (2,), (batch + 1,)),
        "domain_means": ((1, width), (min(8, domains), width), (domains, width)),
        "domain": ((1,), (1,), (batch,)),
    }


def _onnx() -> Any:
    try:
        import onnx
        import onnx.parser
    except ImportError as error:
        do = "pip install 'edge_sdss[export]'"
        raise BackendUnavailable(message("write the graph of the scores", "onnx is not installed", do)) from error
    return onnx
