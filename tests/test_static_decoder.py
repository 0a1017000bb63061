"""Graphs of fixed shapes and their quantisation, against transformers; on the emulated HTP where it is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

ort = pytest.importorskip("onnxruntime")
ir = pytest.importorskip("onnx_ir")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from test_exporting_fast import model

from edge_sdss.errors import ExportError
from edge_sdss.exporting import fast_config, htp, qdq, static_decoder
from edge_sdss.exporting.fast_weights import Weights
from edge_sdss.exporting.static_decoder import Part, Shape
from edge_sdss.exporting.static_feeds import Feeds

IDS = np.random.default_rng(3).integers(1, 96, 12)


def run(made: Any, folder: Path, name: str = "static") -> Any:
    file = folder / f"{name}.onnx"
    ir.save(made, file)
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def named(session: Any, feed: Any) -> dict[str, Any]:
    taken = {value.name for value in session.get_inputs()}
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, {k: v for k, v in feed.items() if k in taken}), strict=True))


@pytest.mark.parametrize("case", ["llama", "llama tied", "llama3 rotary", "qwen2", "qwen3"])
def test_prefill_and_decode_compute_what_transformers_does(case: str, tmp_path: Path) -> None:
    theirs = model(tmp_path, case)
    spec, weights = fast_config.read(tmp_path), Weights(tmp_path)
    with torch.no_grad():
        expected = theirs(torch.tensor(IDS[None])).logits[0].numpy()
    prefill = run(static_decoder.build(spec, weights, Shape(8, 6)), tmp_path, "prefill")
    decode = run(static_decoder.build(spec, weights, Shape(1, 14)), tmp_path, "decode")
    feeds = Feeds(spec, weights["model.embed_tokens.weight"])
    cache = feeds.cache(14)
    first = named(prefill, feeds.step(IDS[:5], 0, cache, Shape(8, 6)))  # 5 of 8 slots filled
    feeds.keep(first, cache, 0, 5)
    second = named(prefill, feeds.step(IDS[5:10], 5, cache, Shape(8, 6)))
    feeds.keep(second, cache, 5, 5)
    rows = [first["logits"][0, :5], second["logits"][0, :5]]
    for at in (10, 11):
        last = named(decode, feeds.step(IDS[at : at + 1], at, cache, Shape(1, 14)))
        feeds.keep(last, cache, at, 1)
        rows.append(last["logits"][0])
    np.testing.assert_allclose(np.concatenate(rows), expected, atol=2e-4)
