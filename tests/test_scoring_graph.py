"""Selection's scores as a graph: against NumPy, alone and behind a model, and what a device gets of it."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")

from bundles import GRAPH, bundle

from edge_sdss.backends import kernels
from edge_sdss.backends import numpy as numpy_backend
from edge_sdss.bundles.recipes import Extent, Shapes
from edge_sdss.errors import ExportError
from edge_sdss.exporting import scoring, tensorrt

WIDTH = 52
SHAPES = Shapes(
    batch=Extent(min=1, opt=1, max=3), sequence=Extent(min=1, opt=1, max=16), past=Extent(min=0, opt=8, max=32)
)


def inputs(lengths=(3, 1, 0, 40), width=WIDTH, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "score_tokens": (rng.normal(size=(sum(lengths), width)) * 3).astype(np.float32),
        "score_offsets": np.cumsum([0, *lengths], dtype=np.int64),
        "domain_means": (rng.normal(size=(3, width)) / np.sqrt(width)).astype(np.float32),
        "domain": np.array([0, 2, 1, -1][: len(lengths)], dtype=np.int32),
    }


def wanted(given, variant):
    rows, offsets, domain = given["score_tokens"], given["score_offsets"], given["domain"]
    unit = numpy_backend.pool(rows, offsets, "mean")
    known = numpy_backend.dissimilarity(unit, given["domain_means"][np.maximum(domain, 0)])
    return numpy_backend.entropy(rows, offsets, variant), unit, np.where(domain < 0, 1.0, known)


def run(model, given):
    session = runtime.InferenceSession(scoring.reference(model).SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(list(scoring.OUTPUTS), given)


@pytest.mark.parametrize("variant", ["token", "centered"])
@pytest.mark.parametrize("lengths", [(3, 1, 0, 40), (1,), (2, 2), (0,)])
def test_the_graph_computes_what_the_reference_does(variant, lengths):
    given, model = inputs(lengths), scoring.graph(WIDTH, variant)
    onnx.checker.check_model(model)
    for found, expected in zip(run(model, given), wanted(given, variant), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_a_model_with_hidden_states_gets_the_scores_behind_it():
    text = f"""<ir_version: 8, opset_import: ["" : 18]>
    model (float[batch, n, 4] x, float[4, {WIDTH}] weight)
        => (float[batch, n, {WIDTH}] hidden_states, float[batch, n, 4] y)
    {{ hidden_states = MatMul (x, weight) y = Relu (x) }}"""
    model = onnx.parser.parse_model(text)
    joined = scoring.behind(model, WIDTH, "centered")
    onnx.checker.check_model(joined)
    rng = np.random.default_rng(3)
    x, weight = rng.normal(size=(2, 9, 4)).astype(np.float32), rng.normal(size=(4, WIDTH)).astype(np.float32)
    given = inputs((7, 9))  # the rows scored begin after the first two
    given["score_tokens"] = (x @ weight).reshape(-1, WIDTH)
    given["score_offsets"] = np.array([2, 9, 18], dtype=np.int64)
    expected = wanted(given, "centered")
    del given["score_tokens"]
    for found, value in zip(run(joined, {**given, "x": x, "weight": weight}), expected, strict=True):
        np.testing.assert_allclose(found, value, atol=1e-6)
    assert [o.name for o in joined.graph.output] == ["hidden_states", "y", *scoring.OUTPUTS]
    without = onnx.parser.parse_model(text.replace("hidden_states", "states"))
    with pytest.raises(ExportError, match="no output hidden_states"):
        scoring.behind(without, WIDTH)


@pytest.mark.parametrize("form", ["aot_plugins", "v3_plugins"])
def test_every_node_of_the_graph_is_a_plugin_of_both_forms(form):
    source = (kernels() / "tensorrt" / f"{form}.py").read_text(encoding="utf-8")
    defined = set(re.findall(r'register\("edge_sdss::(\w+)"\)|name, entry, inputs = "(\w+)"', source))
    names = {a or b for a, b in defined}
    models = [scoring.graph(8, variant) for variant in ("token", "centered")]
    used = {node.op_type for model in models for node in model.graph.node if node.domain == "edge_sdss"}
    assert used == names
    node = models[0].graph.node[0]
    attributes = {a.name: onnx.helper.get_attribute_value(a).decode() for a in node.attribute}
    assert attributes == {"plugin_namespace": "edge_sdss", "plugin_version": "1"}


def test_a_device_gets_the_scored_graph_and_both_forms_of_the_plugins(tmp_path: Path):
    text = f"""<ir_version: 8, opset_import: ["" : 18]>
    model (float[b, n, {GRAPH.width}] x) => (float[b, n, {GRAPH.width}] hidden_states) {{ hidden_states = Relu (x) }}"""
    source = onnx.parser.parse_model(text).SerializeToString()
    graph = GRAPH.model_copy(update={"sites": (), "hidden_states": True})
    made = bundle(tmp_path / "b", graph=graph, files={"model.onnx": source})
    built = tensorrt.write(made, tmp_path / "out", SHAPES, scores="token")
    assert {"scored.onnx", "plugins/aot_plugins.py", "plugins/v3_plugins.py", "plugins/plugins.ptx"} <= set(built.files)
    scored = onnx.load(built.folder / "scored.onnx")
    assert "token_entropy" in {node.op_type for node in scored.graph.node}
    ranges = json.loads((built.folder / "profiles.json").read_text())["scores"]
    assert ranges.keys() == set(scoring.INPUTS)
    assert ranges["score_offsets"] == [[2], [2], [4]]
    for program in ("build_engine.py", "plugins/aot_plugins.py", "plugins/v3_plugins.py"):
        ast.parse((built.folder / program).read_text(), feature_version=(3, 10))
    plain = tensorrt.write(made, tmp_path / "plain", SHAPES)
    assert not any("scored" in name or "plugins" in name for name in plain.files)
