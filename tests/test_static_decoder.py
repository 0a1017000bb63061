"""Graphs of fixed shapes and their quantisation, against transformers; on the emulated HTP where it is installed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
ir = pytest.importorskip("onnx_ir")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from test_exporting_fast import model

from edge_sdss.errors import BackendUnavailable, ExportError, InputError
from edge_sdss.exporting import fast_config, htp, npu, qdq, static_decoder, static_ways, ways
from edge_sdss.exporting.cpu import on_cpu
from edge_sdss.exporting.explain import stages
from edge_sdss.exporting.explain.quantised import Quantised
from edge_sdss.exporting.fast_weights import Weights
from edge_sdss.exporting.rounding import rounded
from edge_sdss.exporting.static_decoder import Part, Shape, sites
from edge_sdss.exporting.static_feeds import Feeds
from edge_sdss.exporting.static_ways import Graphs, StaticModel

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


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    model(folder, "llama tied")
    return folder


def opened(made: npu.Model, out: Path, shape: Shape, name: str = "g", quantised: bool = True) -> Graphs:
    return Graphs(shape, tuple(on_cpu(file, 1) for file in made.write(out, name, shape, quantised=quantised)))


def adapter(spec: Any, rank: int) -> dict[str, Any]:
    draws, found = np.random.default_rng(rank), {}
    for site in static_decoder.sites(spec):
        found[site.lora_a] = draws.normal(0, 0.3, (site.inputs, rank)).astype(np.float32)
        found[site.lora_b] = draws.normal(0, 0.3, (rank, site.outputs)).astype(np.float32)
    return found


@pytest.mark.parametrize("bytes_", [70_000, 100_000, 1_000_000])
def test_a_split_model_computes_what_the_whole_does(llama: Path, tmp_path: Path, bytes_: int) -> None:
    shape = Shape(12, 4)
    whole = opened(npu.Model(llama), tmp_path, shape, "whole")
    split = npu.Model(llama, limit_bytes=bytes_)
    assert len(whole.sessions) == 1
    assert (len(split.parts) > 1) == (bytes_ < 1_000_000)
    feeds = split.feeds
    rows = [StaticModel(feeds, graphs, None).logits(IDS) for graphs in (whole, opened(split, tmp_path, shape, "split"))]
    np.testing.assert_allclose(rows[1], rows[0], atol=1e-5)


def test_parts_cover_each_layer_once_and_the_head_last(llama: Path) -> None:
    spec = fast_config.read(llama)
    for limit in range(62_000, 300_000, 7_000):
        found = static_decoder.parts(spec, [16] * spec.layers, 16, limit)
        layers = [layer for part in found for layer in range(part.first, part.last)]
        assert layers == list(range(spec.layers))
        assert [part.head for part in found] == [False] * (len(found) - 1) + [True]
    assert static_decoder.parts(spec, [16] * spec.layers, 16, 10**9) == (Part(0, spec.layers, True),)
    with pytest.raises(ExportError, match="one layer has"):
        static_decoder.parts(spec, [16] * spec.layers, 16, 10_000)


def test_no_part_has_more_than_its_limit_where_layers_differ_in_bits(llama: Path, tmp_path: Path) -> None:
    made, limit = calibrated(llama, tmp_path, qdq.Scheme(4, 4, float_layers=1, block=16), 0), 62_000
    made.limit_bytes = limit
    assert len(made.parts) > 1
    for file in made.write(tmp_path, "split", Shape(4, 0)):
        graph = onnx.load(file).graph
        held = 0
        for one in graph.initializer:
            if one.data_type == onnx.TensorProto.INT4 and one.name.endswith("_quantized"):
                held += math.prod(one.dims) * 4
            elif one.data_type == onnx.TensorProto.FLOAT and len(one.dims) == 2:
                held += math.prod(one.dims) * (32 if one.name.endswith("_scale") else 16)
        assert 0 < held // 8 <= limit


@pytest.mark.parametrize("rank", [1, 3, 4])
def test_an_adapter_of_any_lower_rank_is_what_its_product_in_the_weights_is(
    llama: Path, tmp_path: Path, rank: int
) -> None:
    spec, given = fast_config.read(llama), adapter(fast_config.read(llama), rank)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(llama, attn_implementation="eager").float().eval()
    parameters = dict(theirs.named_parameters())
    with torch.no_grad():
        for site in static_decoder.sites(spec):
            product = given[site.lora_a] @ given[site.lora_b]
            parameters[f"{site.module}.weight"] += torch.from_numpy(product.T)
        expected = theirs(torch.tensor(IDS[None])).logits[0].numpy()
    made = npu.Model(llama)
    ours = StaticModel(made.feeds, opened(made, tmp_path, Shape(12, 4, 4)), None)
    np.testing.assert_allclose(ours.logits(IDS, given), expected, atol=5e-4)
    plain = StaticModel(made.feeds, opened(made, tmp_path, Shape(12, 4), "plain"), None)
    np.testing.assert_allclose(ours.logits(IDS), plain.logits(IDS), atol=1e-6)


def test_an_adapter_of_higher_rank_is_refused(llama: Path) -> None:
    spec = fast_config.read(llama)
    with pytest.raises(ExportError, match=r"its rank at model\.layers\.0.self_attn.q_proj is 5, the graph takes 4"):
        Feeds(spec, np.zeros((96, 64), np.float32)).adapter(adapter(spec, 5), 4)


def test_families_and_shapes_that_do_not_fit_are_refused(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="past and tokens are 200 together, and the model sees 128"):
        static_decoder.check(fast_config.read(llama), Shape(40, 160))
    model(tmp_path, "gemma")
    with pytest.raises(ExportError, match="its family is 'gemma'"):
        static_decoder.check(fast_config.read(tmp_path), Shape(4, 4))


def test_the_mask_is_finite_and_a_row_without_a_token_sees_itself_alone(llama: Path) -> None:
    feeds = Feeds(fast_config.read(llama), np.zeros((96, 64), np.float32))
    mask = feeds.step(np.array([1, 2]), 3, feeds.cache(8), Shape(4, 5))["mask"][0, 0][:4]
    expected = [[1, 1, 1, 0, 0, 1, 0, 0, 0], [1, 1, 1, 0, 0, 1, 1, 0, 0],
                [1, 1, 1, 0, 0, 1, 1, 1, 0], [1, 1, 1, 0, 0, 1, 1, 0, 1]]  # fmt: skip
    assert np.array_equal(mask == 0, np.array(expected, bool))
    assert mask.min() == static_decoder.MASKED


def test_a_prefix_and_what_follows_are_the_whole(llama: Path, tmp_path: Path) -> None:
    made = npu.Model(llama)
    whole = StaticModel(made.feeds, opened(made, tmp_path, Shape(5, 10)), opened(made, tmp_path, Shape(1, 20), "d"))
    first = static_ways.prefix(opened(made, tmp_path, Shape(2, 0), "first"), made.feeds, IDS[:2])
    np.testing.assert_allclose(whole.logits(IDS, prefix=first), whole.logits(IDS), atol=1e-4)
    assert whole.follow(IDS, 6, prefix=first) == whole.follow(IDS, 6)
    with pytest.raises(InputError, match="it begins with"):
        whole.logits(IDS[1:], prefix=first)


def test_what_enters_the_head_gives_the_logits(llama: Path, tmp_path: Path) -> None:
    made = npu.Model(llama)
    outputs = opened(made, tmp_path, Shape(12, 0)).run(made.feeds.step(IDS, 0, {}, Shape(12, 0)))
    assert made.feeds.head is not None
    np.testing.assert_allclose(outputs["norm"][0] @ made.feeds.head.T, outputs["logits"][0], atol=1e-4)


def test_the_best_logits_are_computed_again_and_the_others_are_left() -> None:
    draws = np.random.default_rng(3)
    head, hidden = draws.normal(size=(300, 64)).astype(np.float32), draws.normal(size=(40, 64)).astype(np.float32)
    exact = hidden @ head.T
    rough = (np.round(exact / 2) * 2).astype(np.float32)  # as with steps of 2: ties everywhere
    given = rough.copy()
    found = static_ways.rescored(rough, hidden, head.astype(np.float16))
    changed = found != rough
    assert np.array_equal(rough, given)
    assert (changed.sum(axis=1) <= static_ways.RESCORED).all()
    np.testing.assert_allclose(found[changed], exact[changed], atol=0.02)
    assert (rough.argmax(-1) == exact.argmax(-1)).mean() < 0.8 < (found.argmax(-1) == exact.argmax(-1)).mean()
    few = static_ways.rescored(rough[:, :3], hidden, head[:3])
    np.testing.assert_allclose(few, exact[:, :3], atol=1e-4)


class Rough:
    """A session whose logits are in steps of 1/64, as float16 has them between 16 and 32."""

    def __init__(self, session: Any) -> None:
        self.session, self.get_inputs, self.get_outputs = session, session.get_inputs, session.get_outputs

    def run(self, names: list[str], feed: Any) -> list[Any]:
        made = self.session.run(names, feed)
        return [
            np.round(array * 64) / 64 if name == "logits" else array for name, array in zip(names, made, strict=True)
        ]


def test_the_answer_is_not_of_rough_logits_where_the_processor_has_the_head(llama: Path, tmp_path: Path) -> None:
    made = npu.Model(llama)
    exact = opened(made, tmp_path, Shape(12, 0))
    rough = Graphs(exact.shape, (Rough(exact.sessions[0]),))
    rows, theirs = (StaticModel(made.feeds, graphs, None).logits(IDS) for graphs in (rough, exact))
    raw = rough.run(made.feeds.step(IDS, 0, {}, rough.shape))["logits"][0]
    best = theirs.max(axis=-1)
    assert np.abs(raw.max(axis=-1) - best).max() > 0.004
    np.testing.assert_allclose(rows.max(axis=-1), best, atol=1e-5)
    assert np.array_equal(rows.argmax(-1), theirs.argmax(-1))


def test_a_model_with_a_head_of_its_own_has_the_logits_of_its_graph(tmp_path: Path) -> None:
    model(tmp_path, "llama")
    made = npu.Model(tmp_path)
    assert made.feeds.head is None
    graphs = opened(made, tmp_path, Shape(12, 0))
    raw = graphs.run(made.feeds.step(IDS, 0, {}, Shape(12, 0)))["logits"][0]
    assert np.array_equal(StaticModel(made.feeds, graphs, None).logits(IDS), raw)


@pytest.mark.parametrize("bits", [4, 8])
def test_rounding_to_the_nearest_code_and_for_the_outputs(bits: int) -> None:
    draws = np.random.default_rng(bits)
    weight = draws.normal(0, 1, (24, 48)).astype(np.float32)
    weight[3] = 0
    mix = draws.normal(0, 1, (48, 48))
    x = draws.normal(0, 1, (4000, 12)) @ mix[:12] + 0.05 * draws.normal(0, 1, (4000, 48))  # inputs that depend
    near, best = rounded(weight, bits), rounded(weight, bits, x.T @ x)
    top = 2 ** (bits - 1) - 1
    for found in (near, best):
        assert np.abs(found.codes.astype(int)).max() <= top
        assert not found.codes[3].any()
        assert (found.scales > 0).all()
    if bits == 8:  # no range is cut: half a step
        assert (np.abs(near.values() - weight) <= near.scales / 2 + 1e-6).all()
    errors = [float(np.square((found.values() - weight) @ x.T).sum()) for found in (near, best)]
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize("bits", [4, 8])
def test_a_block_of_small_weights_is_not_rounded_by_the_scale_of_large_ones(bits: int) -> None:
    draws = np.random.default_rng(bits)
    weight = draws.normal(0, 1, (24, 48)).astype(np.float32)
    weight[:, 16:32] *= 0.01
    whole, found = rounded(weight, bits), rounded(weight, bits, block=16)
    assert found.scales.shape == (24, 3)
    apart = [np.linalg.norm((one.values() - weight)[:, 16:32]) for one in (whole, found)]
    assert apart[1] < 0.2 * apart[0]
    loud = np.diag(np.where(np.arange(48) // 16 == 1, 1e4, 1.0)) + 0.1  # the small weights have the large inputs
    off = [rounded(weight, bits, loud, block).values() - weight for block in (None, 16)]
    errors = [float(np.einsum("oi,ij,oj->", one, loud, one)) for one in off]
    assert errors[1] < 0.2 * errors[0]
    for at in range(3):  # a block knows of no other
        alone = rounded(np.ascontiguousarray(weight[:, 16 * at : 16 * at + 16]), bits)
        part = rounded(weight, bits, block=16)
        assert np.array_equal(part.codes[:, 16 * at : 16 * at + 16], alone.codes)
        assert np.array_equal(part.scales[:, at], alone.scales[:, 0])
    with pytest.raises(ExportError, match="take a block_size that divides"):
        rounded(weight, bits, block=32)


def calibrated(llama: Path, work: Path, scheme: qdq.Scheme, rank: int = 0) -> npu.Model:
    made = npu.Model(llama, scheme)
    texts = [np.random.default_rng(n).integers(1, 96, 12) for n in range(12)]
    made.calibrate(texts, Shape(12, 0, rank), work)
    return made


def test_calibration_sees_all_tokens_but_the_first(llama: Path, tmp_path: Path) -> None:
    made = npu.Model(llama, qdq.Scheme())
    made.calibrate([IDS], Shape(6, 6), tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(llama, attn_implementation="eager").float().eval()
    with torch.no_grad():
        states = theirs(torch.tensor(IDS[None]), output_hidden_states=True)
        entering = theirs.model.layers[0].input_layernorm(states.hidden_states[0])[0, 1:].numpy()
        logits = states.logits[0, 1:].numpy()
    np.testing.assert_allclose(made.statistics.largest["layers.0.attn.norm"], np.abs(entering).max(), rtol=1e-4)
    np.testing.assert_allclose(made.statistics.largest["logits"], np.abs(logits).max(), rtol=1e-3)
    np.testing.assert_allclose(made.statistics.grams["layers.0.attn.norm"], entering.T @ entering, rtol=1e-3, atol=1e-3)
    assert list(tmp_path.iterdir()) == []


def test_every_second_text_calibrates_with_an_adapter(llama: Path, tmp_path: Path) -> None:
    alone, twice, plain = (npu.Model(llama, qdq.Scheme()) for _ in range(3))
    alone.calibrate([IDS], Shape(6, 6, 2), tmp_path)
    twice.calibrate([IDS, IDS], Shape(6, 6, 2), tmp_path)
    plain.calibrate([IDS, IDS], Shape(6, 6), tmp_path)
    grams = [{name: np.diag(gram) for name, gram in made.statistics.grams.items()} for made in (alone, twice, plain)]
    np.testing.assert_allclose(grams[2]["norm"], 2 * grams[0]["norm"], rtol=1e-4)
    drawn = grams[1]["norm"] - grams[0]["norm"]
    assert np.linalg.norm(drawn - grams[0]["norm"]) > 0.02 * np.linalg.norm(drawn)
    np.testing.assert_allclose(grams[1]["layers.0.attn.norm"], 2 * grams[0]["layers.0.attn.norm"], rtol=1e-4)


def test_a_drawn_adapter_changes_by_its_effect(llama: Path) -> None:
    spec = npu.Model(llama).spec
    arrays, entries = static_decoder.drawn(spec, 4, 1, 0.3), np.random.default_rng(0)
    changes = []
    for site in static_decoder.sites(spec):
        rows = entries.normal(0, 1, (200, site.inputs)) @ arrays[site.lora_a] @ arrays[site.lora_b]
        changes.append(rows.std())
    assert np.mean(changes) == pytest.approx(0.3, rel=0.1)
    other = static_decoder.drawn(spec, 4, 2, 0.3)
    assert not any(np.array_equal(arrays[name], other[name]) for name in arrays)


def test_the_first_layers_stay_in_float_where_the_scheme_says_so(llama: Path, tmp_path: Path) -> None:
    made = calibrated(llama, tmp_path, qdq.Scheme(8, 8, float_layers=1))
    made.write(tmp_path, "mixed", Shape(4, 4))
    stored = {value.name for value in ir.load(tmp_path / "mixed.onnx").graph.initializers.values()}
    quantised = {name.removesuffix("_quantized") for name in stored if name.endswith("_quantized")}
    layers = made.spec.layers
    assert len(quantised) == 7 * (layers - 1) + 1
    assert "layers.0.attn.q.weight" in stored
    assert "layers.1.attn.q.weight" in quantised
    assert "head.weight" in quantised


@pytest.mark.parametrize("block", [None, 32])
def test_a_quantised_graph_keeps_names_and_answers_nearly_the_same(
    llama: Path, tmp_path: Path, block: int | None
) -> None:
    made, shape = calibrated(llama, tmp_path, qdq.Scheme(8, 8, block=block)), Shape(12, 4)
    plain, quantised = (opened(made, tmp_path, shape, f"q{on}", on) for on in (False, True))
    names = [[value.name for value in graphs.sessions[0].get_outputs()] for graphs in (plain, quantised)]
    assert names[0] == names[1]
    rows = [StaticModel(made.feeds, graphs, None).logits(IDS) for graphs in (plain, quantised)]
    error = np.linalg.norm(rows[1] - rows[0]) / np.linalg.norm(rows[0])
    assert 1e-5 < error < 0.05
    graph = ir.load(tmp_path / "qTrue.onnx").graph
    tensors = {value.name: value.const_value.numpy() for value in graph.initializers.values()}
    assert tensors["layers.1.mlp.down.weight_quantized"].dtype == np.int8
    assert tensors["layers.1.mlp.down.weight_scale"].shape == ((64,) if block is None else (3, 64))
    found = made.codes["layers.1.mlp.down.weight"].values().T
    np.testing.assert_allclose(Quantised(tmp_path / "qTrue.onnx").weight("layers.1.mlp.down.weight"), found, rtol=1e-6)
    largest = made.statistics.largest["layers.1.mlp.inner"]
    np.testing.assert_allclose(tensors["layers.1.mlp.inner_scale"], 1.25 * largest / 32767, rtol=1e-6)
    products = [node for node in graph if node.op_type == "MatMul" and "attn.scores" not in node.name]
    kinds = {node.inputs[1].producer().op_type for node in products if "context" not in node.name}
    assert kinds == {"DequantizeLinear"}


def test_both_graphs_have_the_same_codes(llama: Path, tmp_path: Path) -> None:
    made = calibrated(llama, tmp_path, qdq.Scheme(4, None), rank=2)
    made.write(tmp_path, "prefill", Shape(4, 4, 2))
    made.write(tmp_path, "decode", Shape(1, 7, 2))
    stored = [
        {k: v.const_value.numpy() for k, v in ir.load(tmp_path / f"{name}.onnx").graph.initializers.items()}
        for name in ("prefill", "decode")
    ]
    weights = [name for name in stored[0] if name.endswith("weight_quantized")]
    assert len(weights) == 21
    assert all(np.array_equal(stored[0][name], stored[1][name]) for name in weights)
    assert stored[0]["head.weight"].dtype == np.float32
    assert all(np.abs(stored[0][name].astype(int)).max() <= 7 for name in weights)


def test_without_the_package_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "onnxruntime_qnn", None)
    with pytest.raises(BackendUnavailable, match=r"onnxruntime_qnn is not installed; run `pip install 'edge_sdss\[qnn"):
        htp.session(tmp_path / "g.onnx")


# what comes out of blocks keeps on the HTP what the range would cut: here nothing is beyond it
@pytest.mark.parametrize(
    "scheme",
    [qdq.Scheme(8, 8), qdq.Scheme(8, 8, headroom=4, block=32), qdq.Scheme(4, 8, headroom=4, block=32)],
)
def test_on_the_emulated_htp(llama: Path, tmp_path: Path, scheme: qdq.Scheme) -> None:
    pytest.importorskip("onnxruntime_qnn", reason="onnxruntime-qnn, which emulates the HTP, is not installed")
    made, shape = calibrated(llama, tmp_path, scheme, 4), Shape(8, 8, 4)
    given = adapter(made.spec, 3)
    first = static_ways.prefix(opened(made, tmp_path, Shape(1, 0, 4), "first", False), made.feeds, IDS[:1], given)
    for name, quantised in (("float", False), ("qdq", True)):
        here = StaticModel(made.feeds, opened(made, tmp_path, shape, name, quantised), None)
        session = htp.session(tmp_path / f"{name}.onnx", context=tmp_path / f"{name}-context.onnx")
        there = StaticModel(made.feeds, Graphs(shape, (session,)), None)
        rows = here.logits(IDS, given, first), there.logits(IDS, given, first)
        assert np.linalg.norm(rows[1] - rows[0]) < 0.01 * np.linalg.norm(rows[0])
        again = StaticModel(made.feeds, Graphs(shape, (htp.session(tmp_path / f"{name}-context.onnx"),)), None)
        assert np.array_equal(again.logits(IDS, given, first), rows[1])


def test_attention_and_activations_are_as_exact_as_float16(llama: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime_qnn", reason="onnxruntime-qnn, which emulates the HTP, is not installed")
    spec, weights = fast_config.read(llama), Weights(llama)
    made, feeds = static_decoder.build(spec, weights, Shape(64, 0)), Feeds(spec, weights["model.embed_tokens.weight"])
    at = "layers.1"
    qdq.expose(made, [f"{at}.{one}" for one in ("attn.masked", "attn.weights", "mlp.gate", "mlp.act")])
    ir.save(made, tmp_path / "g.onnx")
    ids = np.random.default_rng(1).integers(1, 96, 64)
    found = named(htp.session(tmp_path / "g.onnx"), feeds.step(ids, 0, feeds.cache(64), Shape(64, 0)))
    masked, gate = (found[f"{at}.{one}"].astype(np.float64) for one in ("attn.masked", "mlp.gate"))
    exp = np.exp(masked - masked.max(-1, keepdims=True))
    expected = {"attn.weights": exp / exp.sum(-1, keepdims=True), "mlp.act": gate / (1 + np.exp(-gate))}
    for name, right in expected.items():  # the HTP's Softmax is off by 0.15 %, its Sigmoid by 0.05 %
        assert np.linalg.norm(found[f"{at}.{name}"] - right) < 4e-4 * np.linalg.norm(right), name


def test_a_node_that_the_htp_lacks_is_an_error_unless_it_may_fall_back(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime_qnn", reason="onnxruntime-qnn, which emulates the HTP, is not installed")
    import onnx

    text = '<ir_version: 10, opset_import: ["" : 18]> g (float[4, 4] x) => (float d, float[4, 4] y) {\n'
    onnx.save(onnx.parser.parse_model(text + "d = Det(x)\ny = Sigmoid(x)\n}"), tmp_path / "g.onnx")
    with pytest.raises(ExportError, match=r"compile .*g\.onnx for the HTP"):
        htp.session(tmp_path / "g.onnx")
    assert htp.session(tmp_path / "g.onnx", fallback=True)


def test_decoding_has_as_many_slots_as_prefilling() -> None:
    prefill = Shape(32, 512, 8)
    assert prefill.decode.tokens == 1
    assert prefill.decode.past + 1 == prefill.past + prefill.tokens
    assert prefill.decode.rank == prefill.rank


def test_a_factor_is_in_the_second_matrix_alone(llama: Path) -> None:
    one, *_ = sites(fast_config.read(llama))
    arrays = {one.lora_a: np.ones((one.inputs, 2), np.float32), one.lora_b: np.ones((2, one.outputs), np.float32)}
    known = {"mine": arrays, "other": {}}
    for asked, name, factor in ((None, None, 1.0), ("mine", "mine", 1.0), ({"mine": 0.25}, "mine", 0.25)):
        found, scale, given = ways.asked_for(asked, known, [one])
        assert (found, scale) == (name, factor)
        assert set(given) == (set(arrays) if name else set())
        for key, array in given.items():
            assert array == pytest.approx(factor if key == one.lora_b else 1.0)


def test_a_graph_is_opened_as_written_where_it_is_looked_into(tmp_path: Path, llama: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    (file,) = npu.Model(llama).write(tmp_path, "float", Shape(2, 0))
    levels = {on_cpu(file, 1, as_written=how).get_session_options().graph_optimization_level for how in (True, False)}
    assert levels == {
        onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL, onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
    }  # fmt: skip
    looked_into = stages.on_cpu(file).get_session_options().graph_optimization_level
    assert looked_into == onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
