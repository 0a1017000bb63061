"""exporting.explain: every planted fault is found where it is and called by its name; a sound graph has none."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

import decoders
from decoders import LORA, PAST, TOKENS, Decoder
from onnx import TensorProto, helper, numpy_helper

from edge_sdss.errors import BackendUnavailable, ExportError, InputError
from edge_sdss.exporting.explain import Explanation, Finding, Stage, Topology, explain, of_model, placement, report
from edge_sdss.exporting.explain.measure import difference
from edge_sdss.exporting.explain.quantised import Quantised, with_outputs

TEXTS = [decoders.feeds(seed, scale=0.1) for seed in range(24)]
SEEN = TEXTS[:2]  # so that no value is beyond the calibrated ranges


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The sound graph and its QDQ form."""
    folder = tmp_path_factory.mktemp("graphs")
    sound = Decoder().save(folder / "sound.onnx")
    return {"float": sound, "qdq": decoders.quantise(sound, folder / "qdq.onnx", TEXTS)}


def against(first: Path, second: Path, texts: list[dict[str, Any]] = SEEN, **how: Any) -> Explanation:
    """Explains the second graph by the first, on the CPU."""
    stages = of_model("before", first), of_model("after", second, **how)
    return explain(stages, Topology.of(first), texts, adapters=LORA)


def the_finding(found: Explanation) -> Finding:
    """What is wrong first."""
    assert found.first is not None, "nothing was found"
    assert found.first.finding is not None
    return found.first.finding


def told(found: Explanation) -> tuple[str, str | None]:
    """The first wrong tensor, and the cause's name."""
    finding = the_finding(found)
    assert finding.leaps
    return finding.line.tensor, finding.cause.name if finding.cause else None


def evidence(found: Explanation) -> str:
    cause = the_finding(found).cause
    assert cause is not None
    return " ".join(cause.evidence)


# a sound graph


def test_nothing_is_named_in_a_sound_graph(graphs: dict[str, Path]) -> None:
    stages = (
        of_model("float", graphs["float"]),
        of_model("float again", graphs["float"]),
        of_model("qdq", graphs["qdq"]),
    )
    found = explain(stages, Topology.of(graphs["float"]), SEEN, adapters=LORA)
    assert found.first is None
    assert [pair.limit for pair in found.pairs] == [1e-3, 0.1]
    assert all(line.difference.error == 0 for line in found.pairs[0].lines)
    assert len(found.pairs[1].lines) == len(Topology.of(graphs["float"]).tensors)
    assert report.verdict(found) == "Nothing goes wrong from float to qdq."


def test_a_tensor_is_looked_at_as_the_next_nodes_get_it(graphs: dict[str, Path]) -> None:
    name = "layers.0.attn.k"
    quantised = Quantised(graphs["qdq"])
    how = quantised.quantisation(name)
    assert how is not None
    (exact,) = of_model("float", graphs["float"]).run(SEEN[0], [name]).values()
    (got,) = of_model("qdq", graphs["qdq"]).run(SEEN[0], [name]).values()
    assert np.array_equal(np.rint(got / how.scale) * how.scale.astype(np.float32), got)  # on the grid
    assert difference(exact, got).error < 0.05
    weight = quantised.weight(f"{name}.weight")
    assert weight is not None
    assert np.abs(weight - decoders.weights()[f"{name}.weight"]).max() < np.abs(weight).max() / 120


def test_to_look_at_a_tensor_leaves_the_nodes_around_it_as_they_are(graphs: dict[str, Path]) -> None:
    quantised = Quantised(graphs["qdq"])
    found = quantised.find("layers.0.attn.k")
    assert found is not None
    looked = with_outputs(quantised.model, {"seen": found}, quantised.topology)
    assert list(looked.graph.node[:-1]) == list(quantised.model.graph.node)
    assert [one.name for one in looked.graph.output][-1] == "seen"
    assert found not in looked.graph.node[-1].input  # a DequantizeLinear of its own, on the stored integers


# the faults of the issue


@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("least", [-3.4e38, -1e6])
@pytest.mark.parametrize("steps", [False, True])
def test_a_mask_that_is_not_clamped(tmp_path: Path, constant: bool, least: float, steps: bool) -> None:
    graph = Decoder(constant_mask=least if constant else None, steps=steps).save(tmp_path / "f.onnx")
    texts = [decoders.feeds(seed, masked=least) for seed in range(8)]
    if constant:
        texts = [{name: array for name, array in text.items() if name != "mask"} for text in texts]
    found = against(graph, decoders.quantise(graph, tmp_path / "q.onnx", texts), texts[:2])
    assert told(found) == ("layers.0.attn.masked", "mask not clamped")
    assert f"mask holds {least:.4g}" in evidence(found)


def test_logits_are_what_a_softmax_alone_takes_written_out_or_not(tmp_path: Path) -> None:
    for steps in (False, True):
        topology = Topology.of(Decoder(steps=steps).save(tmp_path / "f.onnx"))
        assert [name for name in topology.tensors if topology.feeds_softmax(name)] == [
            f"layers.{layer}.attn.masked" for layer in range(decoders.LAYERS)
        ]


@pytest.mark.parametrize("tensor", ["layers.0.attn.k", "layers.1.mlp.down"])
@pytest.mark.parametrize("factor", [2.0, 0.5])
def test_a_weight_whose_scale_is_off_by_two(
    graphs: dict[str, Path], tmp_path: Path, tensor: str, factor: float
) -> None:
    change = decoders.scaled(f"{tensor}.weight_scale", factor)
    found = against(graphs["float"], decoders.edit(graphs["qdq"], tmp_path / "q.onnx", change))
    assert told(found) == (tensor, "scale off by 2")
    assert f"the constant {tensor}.weight, dequantised, is {factor:g} times" in evidence(found)
    assert f"the value is {factor:g}" in evidence(found)  # where it is not held at the end of its range


def test_one_channel_whose_scale_is_off_by_two(graphs: dict[str, Path], tmp_path: Path) -> None:
    def change(model: Any) -> None:
        (scale,) = [one for one in model.graph.initializer if one.name == "layers.0.mlp.up.weight_scale"]
        values = numpy_helper.to_array(scale).copy()
        values[3] *= 0.5
        scale.CopyFrom(numpy_helper.from_array(values, scale.name))

    stages = (
        of_model("before", graphs["qdq"]),
        of_model("after", decoders.edit(graphs["qdq"], tmp_path / "q.onnx", change)),
    )
    topology = Topology.of(graphs["float"])
    found = explain(stages, topology, SEEN, limits={"after": 0.02})
    assert told(found) == ("layers.0.mlp.up", "scale off by 2")
    assert "0.5 times the right one in 1 of 32 channels" in evidence(found)


def test_a_tensor_that_is_read_with_twice_its_scale(graphs: dict[str, Path], tmp_path: Path) -> None:
    def change(model: Any) -> None:
        (scale,) = [one for one in model.graph.initializer if one.name == "layers.1.attn.v_scale"]
        model.graph.initializer.append(numpy_helper.from_array(numpy_helper.to_array(scale) * 2, "twice"))
        reads = [n for n in model.graph.node if n.op_type == "DequantizeLinear" and n.input[1] == scale.name]
        reads[0].input[1] = "twice"  # the others are those of what is only reshaped, which share it

    found = against(graphs["float"], decoders.edit(graphs["qdq"], tmp_path / "q.onnx", change))
    assert told(found) == ("layers.1.attn.v", "scale off by 2")
    assert "and read with" in evidence(found)


@pytest.mark.parametrize("offset", [1, -1, 7])
def test_positions_that_do_not_begin_where_the_past_ends(graphs: dict[str, Path], offset: int) -> None:
    true = of_model("before", graphs["float"])
    cos, sin = decoders.rotary(np.arange(PAST, PAST + TOKENS) + offset)
    off = dataclasses.replace(
        true, name="after", run=lambda feeds, names: true.run({**feeds, "cos": cos, "sin": sin}, names)
    )
    found = explain((true, off), Topology.of(graphs["float"]), SEEN, adapters=LORA)
    tensor, cause = told(found)
    assert (tensor.startswith("layers.0.attn.q_heads_"), cause) == (True, "wrong KV position")
    assert f"the rotation of a position {offset:+d} away" in evidence(found)


def test_a_cache_whose_slots_are_in_another_order(graphs: dict[str, Path], tmp_path: Path) -> None:
    faulty = Decoder(faults=frozenset({"slots"})).save(tmp_path / "faulty.onnx")
    found = against(graphs["float"], faulty)
    assert told(found) == ("layers.0.attn.keys", "wrong KV position")
    assert f"0 holds what belongs at {PAST}" in evidence(found)


def test_a_lora_input_that_nothing_takes(graphs: dict[str, Path], tmp_path: Path) -> None:
    faulty = Decoder(faults=frozenset({"lora"})).save(tmp_path / "faulty.onnx")
    assert told(against(graphs["float"], faulty)) == ("layers.0.attn.q", "missing LoRA input")
    # without an adapter both graphs are one
    bare = [{name: array * (name not in LORA) for name, array in text.items()} for text in SEEN]
    assert against(graphs["float"], faulty, bare).first is None


def test_a_range_that_is_too_narrow(graphs: dict[str, Path], tmp_path: Path) -> None:
    change = decoders.scaled("layers.1.mlp.up_scale", 0.25)
    found = against(graphs["float"], decoders.edit(graphs["qdq"], tmp_path / "q.onnx", change))
    assert told(found) == ("layers.1.mlp.up", "saturated range")


def test_a_range_that_outliers_stretch(graphs: dict[str, Path], tmp_path: Path) -> None:
    change = decoders.scaled("layers.1.mlp.up_scale", 30000.0)
    found = against(graphs["float"], decoders.edit(graphs["qdq"], tmp_path / "q.onnx", change))
    assert told(found) == ("layers.1.mlp.up", "range stretched by outliers")


def changed(stage: Stage, tensor: str, change: Callable[[Any], Any], **more: Any) -> Stage:
    """A stage that gives one tensor, and what is not compared with it, otherwise."""

    def run(feeds: Any, names: Any) -> Any:
        values = stage.run(feeds, names)
        return values | ({tensor: change(values[tensor])} if tensor in values else {})

    return dataclasses.replace(stage, name="after", run=run, **more)


def test_values_beyond_float16(graphs: dict[str, Path]) -> None:
    stage = of_model("before", graphs["float"])
    large = changed(stage, "layers.0.mlp.act", lambda array: array * 1e6)

    def half(array: Any) -> Any:
        with np.errstate(over="ignore"):
            return (array * np.float32(1e6)).astype(np.float16).astype(np.float32)

    overflowed = changed(stage, "layers.0.mlp.act", half, arithmetic="float16")
    found = explain((large, overflowed), Topology.of(graphs["float"]), SEEN)
    assert told(found) == ("layers.0.mlp.act", "overflow of float16")


@pytest.mark.parametrize("right", [True, False])
def test_a_reciprocal_as_the_npu_lowers_it(tmp_path: Path, right: bool) -> None:
    """The fault as it was seen: the 1 in 1/x is held at the end of x's range. HTP's own is tested below."""
    graph = Decoder(norm="reciprocal").save(tmp_path / "f.onnx")
    stage = of_model("before", decoders.quantise(graph, tmp_path / "q.onnx", TEXTS))
    root = stage.quantisation("layers.0.attn.norm.root")
    assert root is not None
    factor = root.range[1] if not right else 1
    lowered = changed(stage, "layers.0.attn.norm.reciprocal", lambda array: array * factor, emulated=True)
    found = explain((stage, lowered), Topology.of(graph), SEEN)
    if right:
        assert found.first is None
    else:
        assert told(found) == ("layers.0.attn.norm.reciprocal", "quantised Reciprocal in the norm")
        assert f"its range ends at {root.range[1]:.4g}" in evidence(found)


# what is not known is not named


def test_a_fault_without_a_trace_has_no_name(graphs: dict[str, Path]) -> None:
    stage = of_model("before", graphs["float"])
    noise = np.random.default_rng(0).normal(size=(1, TOKENS, decoders.WIDTH)).astype(np.float32)
    noisy = changed(stage, "layers.1.mlp.down", lambda array: array + noise)
    found = explain((stage, noisy), Topology.of(graphs["float"]), SEEN[:1], adapters=LORA)
    assert told(found) == ("layers.1.mlp.down", None)
    assert "None of the causes that are known can be shown" in report.verdict(found)


def test_an_error_that_grows_bit_by_bit_has_no_place(graphs: dict[str, Path]) -> None:
    found = explain(
        (of_model("before", graphs["float"]), of_model("after", graphs["qdq"])),
        Topology.of(graphs["float"]),
        SEEN,
        limits={"after": 0.035},
    )
    assert not the_finding(found).leaps
    assert "bit by bit" in report.verdict(found)


# parts


@pytest.mark.parametrize("at_once", [1, 5, 40])
def test_looking_in_parts_finds_the_same(graphs: dict[str, Path], tmp_path: Path, at_once: int) -> None:
    change = decoders.scaled("layers.0.mlp.gate.weight_scale", 2.0)
    faulty = decoders.edit(graphs["qdq"], tmp_path / "q.onnx", change)
    asked: list[int] = []
    stage = of_model("after", faulty)

    def run(feeds: Any, names: Any) -> Any:
        asked.append(len(set(names) - set(topology.outputs)))
        return stage.run(feeds, names)

    topology = Topology.of(graphs["float"])
    parts = dataclasses.replace(stage, run=run, at_once=at_once)
    found = explain((of_model("before", graphs["float"]), parts), topology, SEEN, adapters=LORA)
    assert told(found) == ("layers.0.mlp.gate", "scale off by 2")
    assert the_finding(found).persists is True
    assert len(found.pairs[0].lines) < len(topology.tensors)
    assert max(asked[1:-2]) <= at_once


def test_a_fault_that_goes_when_it_is_looked_at_is_said_so(graphs: dict[str, Path], tmp_path: Path) -> None:
    stage = of_model("before", graphs["float"])

    def fused(feeds: Any, names: Any) -> Any:
        values = stage.run(feeds, names)
        wrong = "layers.0.out" not in names or len(names) > 20
        return {
            name: array * 3 if wrong and name.startswith(("layers.0.out", "layers.1")) else array
            for name, array in values.items()
        }

    found = explain(
        (stage, dataclasses.replace(stage, name="after", run=fused, at_once=200)), Topology.of(graphs["float"]), SEEN
    )
    assert the_finding(found).persists is False
    assert "come out right while this tensor is looked at" in report.markdown("Why", found)


# measures and reports


def test_what_a_softmax_does_not_see_does_not_count() -> None:
    logits = np.array([[1.0, 2.0, -3.4e38]], np.float32)
    assert difference(logits, np.array([[6, 7, -90]], np.float32), logits=True).error < 1e-6
    assert difference(logits, np.array([[6, 7, -90]], np.float32)).error > 0.9
    assert difference(logits, logits * 0, logits=True).error > 0.5


def test_a_few_large_rows_do_not_hide_the_others() -> None:
    values = np.random.default_rng(0).normal(size=(10, 8))
    values[0] *= 1e4
    wrong = values.copy()
    wrong[5:] *= -1
    assert difference(values, wrong).error > 1.9


def test_the_report_says_it_in_words_and_in_one_document(graphs: dict[str, Path], tmp_path: Path) -> None:
    change = decoders.scaled("layers.0.attn.k.weight_scale", 2.0)
    found = against(graphs["float"], decoders.edit(graphs["qdq"], tmp_path / "q.onnx", change), emulated=True)
    text = report.markdown("Why", found)
    assert (
        "From before to after the first tensor that goes wrong is `layers.0.attn.k` (MatMul)" in text.split("\n\n")[1]
    )
    assert "no device has run this graph" in text
    assert all(f"| {layer} |" in text for layer in (0, 1))
    read = json.loads(json.dumps(report.document(found), allow_nan=False))
    assert read["stages"][0]["finding"]["cause"] == "scale off by 2"
    assert read["stages"][0]["finding"]["quantisation"]["dtype"] == "int16"


def test_one_stage_or_no_feeds_are_refused(graphs: dict[str, Path]) -> None:
    stage = of_model("alone", graphs["float"])
    with pytest.raises(InputError, match="1 stages"):
        explain((stage,), Topology.of(graphs["float"]), SEEN)
    with pytest.raises(InputError, match="0 feeds"):
        explain((stage, stage), Topology.of(graphs["float"]), [])


# torch


def test_torch_gives_the_tensors_that_its_modules_make(graphs: dict[str, Path]) -> None:
    torch = pytest.importorskip("torch")
    from edge_sdss.exporting.explain import of_torch

    known = decoders.weights()
    model = torch.nn.ModuleDict({one: torch.nn.Linear(16, 16, bias=False) for one in "kv"})
    for one, linear in model.items():
        linear.weight.data = torch.from_numpy(known[f"layers.0.attn.{one}.weight"].T.copy())
    model["v"].weight.data *= 2

    def call(feeds: Any) -> dict[str, Any]:
        x = torch.from_numpy(feeds["x"])
        normed = (
            x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * torch.from_numpy(known["layers.0.attn.norm.weight"])
        )
        model["k"](normed), model["v"](normed)
        return {"layers.0.attn.norm": normed}

    names = {f"layers.0.attn.{one}": one for one in "kv"}
    stage = of_torch("torch", names | {"layers.0.attn.norm": ""}, call, model)
    found = explain((stage, of_model("ONNX", graphs["float"])), Topology.of(graphs["float"]), SEEN)
    assert [line.tensor for line in found.pairs[0].lines] == [
        "layers.0.attn.norm",
        "layers.0.attn.k",
        "layers.0.attn.v",
    ]
    assert told(found) == ("layers.0.attn.v", "scale off by 2")


# the emulated NPU


@pytest.fixture(scope="module")
def htp() -> Callable[..., Any]:
    """Opens a graph on the HTP emulation of onnxruntime-qnn."""
    ort = pytest.importorskip("onnxruntime")
    qnn = pytest.importorskip("onnxruntime_qnn", reason="onnxruntime-qnn is not installed, which has the HTP emulation")
    if not any("QNN" in device.ep_name for device in ort.get_ep_devices()):
        ort.register_execution_provider_library("QNN", qnn.get_library_path())
    devices = [device for device in ort.get_ep_devices() if "QNN" in device.ep_name][:1]
    how = {"backend_path": qnn.get_qnn_htp_path(), "soc_model": "57", "htp_arch": "75"}

    def open(file: Path, entries: dict[str, str] | None = None, severity: int = 3) -> Any:
        options = ort.SessionOptions()
        options.log_severity_level = severity
        for key, value in (entries or {"session.disable_cpu_ep_fallback": "1"}).items():
            options.add_session_config_entry(key, value)
        options.add_provider_for_devices(devices, how | {"offload_graph_io_quantization": "0"})
        return ort.InferenceSession(str(file), options)

    open.name = devices[0].ep_name  # type: ignore[attr-defined]
    return open


@pytest.mark.parametrize("at_once", [None, 16])
@pytest.mark.parametrize("norm", ["div", "reciprocal"])
def test_the_npu_gets_the_reciprocal_wrong_and_the_quotient_right(
    htp: Any, tmp_path: Path, norm: str, at_once: int | None
) -> None:
    graph = Decoder(norm=norm).save(tmp_path / "f.onnx")
    qdq = decoders.quantise(graph, tmp_path / "q.onnx", TEXTS)
    npu = of_model("HTP", qdq, open=htp, arithmetic="float16", at_once=at_once, emulated=True)
    found = explain((of_model("float", graph), of_model("QDQ", qdq), npu), Topology.of(graph), SEEN, adapters=LORA)
    if norm == "div":
        assert found.first is None
    else:
        assert told(found) == ("layers.0.attn.norm.reciprocal", "quantised Reciprocal in the norm")
        assert [pair.finding is None for pair in found.pairs] == [True, False]
        assert "held there" in evidence(found)


def test_each_node_is_placed_and_says_why_it_fell_back(htp: Any, tmp_path: Path, graphs: dict[str, Path]) -> None:
    whole = placement.placement(graphs["qdq"], htp.name, htp)
    assert len(whole.nodes) > 300
    assert not whole.fell_back
    placement.check(whole)

    nodes = [helper.make_node("Relu", ["x"], ["r"], name="kept"), helper.make_node("Erf", ["r"], ["y"], name="lost")]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4, 8]) for name in "xy"]
    model = helper.make_model(
        helper.make_graph(nodes, "g", ends[:1], ends[1:]), opset_imports=[helper.make_opsetid("", 18)], ir_version=10
    )
    (tmp_path / "erf.onnx").write_bytes(model.SerializeToString())
    found = placement.placement(tmp_path / "erf.onnx", htp.name, htp)
    assert [(one.node, one.provider == htp.name) for one in found.nodes] == [("kept", True), ("lost", False)]
    assert found.fell_back[0].reason == "Operators of type `Erf` are not supported by QNN EP"
    with pytest.raises(ExportError, match=r"Erf lost runs on CPUExecutionProvider \(Operators of type"):
        placement.check(found)
    placement.check(found, allowed=["Erf"])
    assert "`lost` | Erf | CPUExecutionProvider | Operators of type" in report.markdown(
        "t", against(graphs["float"], graphs["qdq"]), found
    )


def test_reasons_are_read_from_the_log_as_qnn_writes_it() -> None:
    log = (
        "2026 [V:onnxruntime:, qnn_execution_provider.cc:1713 LogNodeSupport] Validation FAILED for 1 nodes in "
        "OrtNodeUnit (CumSum) :\n\tOperator type: CumSum Node name: a Node index: 1\n"
        "\tREASON : QNN only supports value 0\n\n"
        "2026 [V:x] Validation FAILED for 2 nodes in OrtNodeUnit (MatMul) :\n\tOperator type: DequantizeLinear "
        "Node name: b Node index: 2\n\tOperator type: MatMul Node name: c Node index: 3\n\tREASON : too wide.\n"
    )
    assert placement._reasons(log) == {"a": "QNN only supports value 0", "b": "too wide", "c": "too wide"}


def test_an_onnxruntime_that_tells_no_placement_is_refused(graphs: dict[str, Path]) -> None:
    with pytest.raises(BackendUnavailable, match="does not tell"):
        placement.placement(graphs["float"], "QNN", lambda file, entries, severity: object())
