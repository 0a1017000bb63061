"""Export through Optimum, the passes over the graph, quantisation and parity, on tiny models of every family."""

from __future__ import annotations

import errno
import importlib.metadata
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnx_ir")
pytest.importorskip("optimum.exporters.onnx")

import onnx
import onnx_ir as ir
import onnxruntime
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import tiny_model

from edge_sdss.backends import numpy as numpy_backend
from edge_sdss.bundles import Graph, adapters, checks, peft, probe
from edge_sdss.errors import BackendUnavailable, ExportError, ParityError
from edge_sdss.exporting import graphs, parity, portable, scoring
from edge_sdss.exporting import quantize as q
from edge_sdss.exporting.merge import merged
from edge_sdss.exporting.ways import GraphModel, of_peft, of_torch

Adapter = dict[str, np.ndarray]
IDS = np.random.default_rng(0).integers(3, 290, 24)
TEXTS = [IDS, IDS[::-1].copy()[:17]]

SIZE = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
WINDOWED = {"head_dim": 16, "sliding_window": 8}  # shorter than the texts
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"tie_word_embeddings": False}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 24}),
    "gemma": ("Gemma", {"head_dim": 16}),
    "gemma2": ("Gemma2", WINDOWED),
    "gemma3_text": ("Gemma3", WINDOWED),
    "phi3": ("Phi3", {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def export(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Graph]]:
    """Exports the tiny model, once for each set of arguments."""
    made: dict[str, tuple[Path, Graph]] = {}

    def call(**arguments: Any) -> tuple[Path, Graph]:
        key = json.dumps(arguments, sort_keys=True)
        if key not in made:
            out = tmp_path_factory.mktemp("out")
            made[key] = out, portable(folder, out, **{"hidden_states": True, **arguments})
        return made[key]

    return call


def load(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def with_adapter(model: Any, *, rank: int = 4, seed: int = 1, targets: str | list[str] = "all-linear") -> PeftModel:
    """A PEFT model whose B is not zero, and whose ranks differ between its sites."""
    torch.manual_seed(seed)
    pattern = {r"layers\.1\..*o_proj": 2 * rank} if targets == "all-linear" else {}
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, rank_pattern=pattern)
    wrapped = get_peft_model(model, config)
    for name, weight in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    return wrapped.eval()


def tensors(model: PeftModel, scale: float = 1.0) -> Adapter:
    """The adapter as the graph takes it: A [in, r], B [r, out] with alpha / r in it."""
    found: Adapter = {}
    for name, module in model.base_model.model.named_modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            found[f"{name}.lora_A.weight"] = a.detach().numpy().T.copy()
            found[f"{name}.lora_B.weight"] = (b.detach().numpy() * module.scaling["default"] * scale).T.copy()
    return found


def reference(model: PeftModel) -> probe.Probe:
    return probe.take(
        of_peft(model), "mine", [ids.tolist() for ids in TEXTS], base_fingerprint="0" * 64, source_sha256="1" * 64
    )


@pytest.fixture
def tuned(folder: Path) -> PeftModel:
    return with_adapter(load(folder))


def stored(out: Path) -> dict[str, Any]:
    model = ir.load(out / "model.onnx")
    return {name: value.const_value for name, value in model.graph.initializers.items() if value.const_value.size}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_graph_of_each_family_is_the_model_with_and_without_an_adapter(family: str, tmp_path: Path) -> None:
    name, more = FAMILIES[family]
    config_class = {"gemma3_text": "Gemma3Text"}.get(family, name) + "Config"
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**SIZE, **more)
    source = tmp_path / "model"
    getattr(transformers, f"{name}ForCausalLM")(config).save_pretrained(source)
    model = load(source)
    graph = portable(source, tmp_path / "out", hidden_states=True)
    ours = GraphModel(tmp_path / "out", graph)

    limits = parity.Limits(difference=1e-4, agreement=1.0)
    found = parity.compare("float32", "torch", of_torch(model), ours.base, TEXTS, limits)
    assert {check.metric for check in found} >= {"max |Δlogit|", "NLL", "mean KL"}
    generated = model.generate(torch.from_numpy(IDS[None]), max_new_tokens=16, do_sample=False, eos_token_id=None)
    assert ours.greedy(IDS, 16) == generated[0, len(IDS) :].tolist()

    linear = {path for path, part in model.model.layers.named_modules() if isinstance(part, torch.nn.Linear)}
    assert {site.module for site in graph.sites} == {f"model.layers.{path}" for path in linear}
    tuned = with_adapter(model)
    adapter = tensors(tuned)
    assert {site.lora_a for site in graph.sites} | {site.lora_b for site in graph.sites} == adapter.keys()
    for ids in TEXTS:
        expected = of_torch(tuned)(ids)
        np.testing.assert_allclose(ours.logits(ids, adapter), expected, atol=1e-4)
    assert np.abs(ours.logits(ids, adapter) - ours.logits(ids)).max() > 0.01


def test_the_hidden_state_is_the_one_after_the_final_norm(folder: Path, export: Any) -> None:
    out, graph = export()
    with torch.no_grad():
        expected = load(folder).model(torch.from_numpy(IDS[None])).last_hidden_state[0].numpy()
    np.testing.assert_allclose(GraphModel(out, graph).hidden_states(IDS), expected, atol=1e-5)
    assert graph.hidden_states
    assert graph.width == expected.shape[1]


def test_selections_scores_come_out_of_the_same_run(export: Any, tmp_path: Path) -> None:
    out, graph = export()
    model = scoring.behind(onnx.load(out / "model.onnx"), graph.width, "centered")
    onnx.save(scoring.reference(model), tmp_path / "model.onnx")
    with_scores = GraphModel(tmp_path, graph)
    rows, offsets = GraphModel(out, graph).hidden_states(IDS), np.array([1, len(IDS)], dtype=np.int64)
    means = np.random.default_rng(0).normal(size=(2, graph.width)).astype(np.float32) / graph.width**0.5
    feed = with_scores._feed(IDS, with_scores._empty(), None, len(IDS))
    feed.update(score_offsets=offsets, domain_means=means, domain=np.array([1], dtype=np.int32))
    eoe, embedding, distance = with_scores.session.run(list(scoring.OUTPUTS), feed)
    unit = numpy_backend.pool(rows, offsets, "mean")
    np.testing.assert_allclose(eoe, numpy_backend.entropy(rows, offsets, "centered"), atol=1e-6)
    np.testing.assert_allclose(embedding, unit, atol=1e-6)
    np.testing.assert_allclose(distance, numpy_backend.dissimilarity(unit, means[1:]), atol=1e-6)


def test_what_a_runtime_must_know_fits_the_graph(folder: Path, export: Any) -> None:
    out, graph = export()
    inputs = {value.name: value for value in ir.load(out / "model.onnx").graph.inputs}
    past = inputs[f"past_key_values.{graph.layers - 1}.value"].shape
    assert (past[1], past[3]) == (graph.kv_heads, graph.head_dim)
    assert f"past_key_values.{graph.layers}.value" not in inputs
    assert graph.position_ids == ("position_ids" in inputs)
    assert (graph.vocabulary, graph.context) == (len(transformers.AutoTokenizer.from_pretrained(folder)), 512)
    assert {"tokenizer.json", "config.json", "chat_template.jinja"} <= {file.name for file in out.iterdir()}
    assert not list(out.glob(".export-*"))


def test_without_an_adapter_the_graph_is_bit_equal_to_one_without_the_inputs(export: Any) -> None:
    with_sites, plain = export(), export(adapters=False)
    assert plain[1].sites == ()
    for ids in TEXTS:
        np.testing.assert_array_equal(GraphModel(*with_sites).logits(ids), GraphModel(*plain).logits(ids))


def test_some_of_the_sites_and_each_its_own_rank(folder: Path, export: Any) -> None:
    tuned = with_adapter(load(folder), targets=["q_proj", "v_proj"])
    adapter = tensors(tuned)
    assert len(adapter) == 8
    np.testing.assert_allclose(GraphModel(*export()).logits(IDS, adapter), of_torch(tuned)(IDS), atol=1e-4)


def test_a_large_graph_has_its_weights_in_one_file_beside_it(folder: Path, export: Any, tmp_path: Path) -> None:
    out, graph = export()
    model = ir.load(out / "model.onnx")
    graphs.save(model, tmp_path, external_above=1000)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    assert (tmp_path / "model.onnx.data").stat().st_size >= 64 * 396 * 4 + 4 * sum(
        site.inputs * site.outputs for site in graph.sites
    )
    np.testing.assert_array_equal(GraphModel(tmp_path, graph).logits(IDS), GraphModel(out, graph).logits(IDS))


def test_a_full_disk_is_named(export: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    model = ir.load(export()[0] / "model.onnx")
    monkeypatch.setattr(ir, "save", full)
    with pytest.raises(ExportError, match="No space left on device; free space"):
        graphs.save(model, tmp_path)


@pytest.mark.parametrize("precision", ["float32", "float16", "int8", "int4"])
def test_the_tied_head_is_stored_once(precision: str, export: Any) -> None:
    out, graph = export(precision=precision)
    size = graph.vocabulary * graph.width
    tables = [tensor for tensor in stored(out).values() if tensor.size == size]
    width = {"float32": 4, "float16": 2}.get(precision, 1)
    assert [tensor.nbytes for tensor in tables] == [size * width]


def test_weights_take_the_bytes_that_their_bits_make(export: Any) -> None:
    layers = sum(site.inputs * site.outputs for site in export()[1].sites)
    for precision, bits in (("int8", 8), ("int4", 4)):
        out, graph = export(precision=precision)
        assert graph.block_size == 32
        parts = {name: tensor.nbytes for name, tensor in stored(out).items() if "layers" in name}
        assert sum(size for name, size in parts.items() if name.endswith("weight_Q")) == layers * bits // 8
        assert sum(size for name, size in parts.items() if name.endswith("weight_scales")) == layers // 32 * 4


def test_precision_costs_what_it_should(folder: Path, export: Any) -> None:
    torch_model = of_torch(load(folder))
    divergence = {}
    for precision in ("float32", "float16", "int8", "int4"):
        way = GraphModel(*export(precision=precision)).base
        # the tiny model is random and has no margin between tokens, so agreement means nothing
        limits = parity.Limits(nll=0.01, kl={"float32": 1e-9, "float16": 1e-6, "int8": 1e-4, "int4": 1e-2}[precision])
        found = parity.compare(precision, "torch", torch_model, way, TEXTS, limits)
        divergence[precision] = next(check.value for check in found if check.metric == "mean KL")
    assert divergence["float32"] < divergence["float16"] < divergence["int8"] < divergence["int4"]


@pytest.mark.parametrize("zero_points", ["none", "integer", "float"])
def test_the_quantised_graph_computes_with_the_weights_that_it_says(
    zero_points: Any, folder: Path, export: Any
) -> None:
    """Packing, order of the blocks, zero points: torch with the dequantised weights is the reference."""
    out, graph = export(precision="int4", zero_points=zero_points, accuracy_level=0)
    body, head = q.Scheme(4, 32, zero_points, 0), q.Scheme(8, 32, "none", 0)
    model = load(folder)
    with torch.no_grad():
        for name, part in model.named_modules():
            if isinstance(part, torch.nn.Linear):
                scheme = head if name == "lm_head" else body
                blocks = q.to_blocks(part.weight.numpy(), scheme)
                part.weight.copy_(torch.from_numpy(q.from_blocks(blocks, scheme, part.in_features)))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    np.testing.assert_allclose(GraphModel(out, graph).logits(IDS), of_torch(model)(IDS), atol=2e-5)


def test_an_untied_embedding_is_quantised_on_its_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZE, tie_word_embeddings=False)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    graph = portable(tmp_path / "model", tmp_path / "out", precision="int8")
    tables = [tensor for tensor in stored(tmp_path / "out").values() if tensor.size == 300 * 64]
    assert [tensor.dtype for tensor in tables] == [ir.DataType.UINT8] * 2
    limits = parity.Limits(kl=1e-4)
    torch_model = of_torch(load(tmp_path / "model"))
    parity.compare("int8", "torch", torch_model, GraphModel(tmp_path / "out", graph).base, TEXTS, limits)


def test_a_tied_table_can_stay_in_float(export: Any, tmp_path: Path) -> None:
    out, graph = export()
    model = ir.load(out / "model.onnx")
    q.quantize(model, q.Scheme(8), embedding=False)
    graphs.save(model, tmp_path)
    tables = [tensor for tensor in stored(tmp_path).values() if tensor.size == graph.vocabulary * graph.width]
    assert [tensor.dtype for tensor in tables] == [ir.DataType.FLOAT]
    limits = parity.Limits(kl=1e-4)
    parity.compare("int8", "float32", GraphModel(out, graph).base, GraphModel(tmp_path, graph).base, TEXTS, limits)


@pytest.mark.parametrize(
    ("scheme", "found"),
    [
        (q.Scheme(8, 24), "no blocks of 24"),
        (q.Scheme(8, 128), "the width 64 is no multiple of the block size 128"),
        (q.Scheme(4, 32, "float"), "GatherBlockQuantized takes integers"),
    ],
)
def test_a_scheme_that_does_not_fit_is_refused(scheme: q.Scheme, found: str, export: Any) -> None:
    with pytest.raises(ExportError, match=found):
        q.quantize(ir.load(export()[0] / "model.onnx"), scheme)


@pytest.mark.parametrize("precision", ["float32", "float16", "int8", "int4"])
def test_adapters_stay_in_float_on_every_base(precision: Any, tuned: PeftModel, export: Any) -> None:
    ours = GraphModel(*export(precision=precision)).with_adapters({"mine": tensors(tuned)})
    checks.effect(ours, "mine", reference(tuned), precision)


def test_a_peft_folder_becomes_the_inputs_of_the_graph(tuned: PeftModel, export: Any, tmp_path: Path) -> None:
    tuned.save_pretrained(tmp_path)
    packed = adapters.pack(peft.read(tmp_path), export()[1])
    expected = tensors(tuned)
    assert packed.keys() == expected.keys()
    for name, array in packed.items():
        np.testing.assert_allclose(array, expected[name], rtol=1e-6)


def test_the_merged_route_answers_as_the_adapter_does(folder: Path, tmp_path: Path) -> None:
    tuned = with_adapter(load(folder))
    tuned.save_pretrained(tmp_path / "adapter")
    source = merged(folder, tmp_path / "adapter", tmp_path / "merged")
    graph = portable(source, tmp_path / "out", adapters=False)
    np.testing.assert_allclose(GraphModel(tmp_path / "out", graph).logits(IDS), of_torch(tuned)(IDS), atol=1e-4)


def test_a_graph_without_a_linear_of_the_model_is_refused(folder: Path, export: Any) -> None:
    model = ir.load(export(adapters=False)[0] / "model.onnx")
    expected = graphs.expected_linears(folder)
    with pytest.raises(ExportError, match=r"1 of 15 linears are not where .* model\.layers\.9\.mlp"):
        graphs.add_adapters(model.graph, {**expected, "model.layers.9.mlp": (64, 64)})
    wrong = {**expected, "model.layers.0.mlp.up_proj": (64, 999)}
    with pytest.raises(ExportError, match=r"such as model\.layers\.0\.mlp\.up_proj"):
        graphs.add_adapters(model.graph, wrong)


# --- what is refused before any work ---


@pytest.mark.parametrize("version", ["4.58.0", "5.0.0", "5.2.0.dev0"])
def test_a_transformers_too_new_is_told_what_to_install(
    version: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version if name == "transformers" else real(name))
    with pytest.raises(BackendUnavailable, match=rf"transformers {version} is installed.*'transformers<4\.58"):
        portable(folder, tmp_path / "out")


def test_a_missing_optimum_is_told_what_to_install(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == "optimum-onnx":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(BackendUnavailable, match=r"optimum-onnx is not installed; run `pip install 'edge_sdss\["):
        portable(folder, tmp_path / "out")


@pytest.mark.parametrize(
    ("config", "found"), [("{}", "None"), ('{"model_type": "gpt2"}', "'gpt2'"), ("", "config.json")]
)
def test_what_is_no_model_of_the_families_is_refused(config: str, found: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ExportError, match=found):
        portable(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_that_do_not_load_are_an_export_error(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ExportError, match="Optimum fails with"):
        portable(tmp_path, tmp_path / "out")


# --- traps of ONNX Runtime, each of which the checks of a bundle must name ---


def adapter_file(adapter: Adapter, path: Path) -> Any:
    values = {k: onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(v)) for k, v in adapter.items()}
    form = onnxruntime.AdapterFormat()
    form.set_adapter_version(1)
    form.set_model_version(1)
    form.set_parameters(values)
    form.export_adapter(str(path))
    loaded = onnxruntime.LoraAdapter()
    loaded.Load(str(path))
    return loaded


def run_options(*loaded: Any) -> Any:
    options = onnxruntime.RunOptions()
    for adapter in loaded:
        options.add_active_adapter(adapter)
    return options


def plain_feed(ours: GraphModel, ids: np.ndarray) -> Adapter:
    return ours._feed(ids, ours._empty(), None, len(ids))


def fault(tuned: PeftModel, ours: GraphModel, adapted: Callable[[np.ndarray], np.ndarray]) -> str:
    def logits(ids: Sequence[int], name: str | None) -> np.ndarray:
        return (ours.logits if name is None else adapted)(np.array(ids))

    with pytest.raises(ParityError) as caught:
        checks.effect(logits, "mine", reference(tuned), "float32")
    return str(caught.value)


def test_an_adapter_in_run_options_works_but_io_binding_ignores_it(
    tuned: PeftModel, export: Any, tmp_path: Path
) -> None:
    ours = GraphModel(*export())
    loaded = adapter_file(tensors(tuned), tmp_path / "a.onnx_adapter")
    options = run_options(loaded)
    plain = ours.session.run(["logits"], plain_feed(ours, IDS), options)[0][0]
    np.testing.assert_allclose(plain, of_torch(tuned)(IDS), atol=1e-4)

    def bound(ids: np.ndarray) -> np.ndarray:
        binding = ours.session.io_binding()
        for name, array in plain_feed(ours, ids).items():
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
        binding.bind_output("logits", "cpu")
        ours.session.run_with_iobinding(binding, options)
        return binding.get_outputs()[0].numpy()[0]

    assert "inactive" in fault(tuned, ours, bound)


def test_of_two_active_adapters_the_first_wins(tuned: PeftModel, folder: Path, export: Any, tmp_path: Path) -> None:
    ours = GraphModel(*export())
    other = with_adapter(load(folder), seed=2)
    pair = [adapter_file(tensors(m), tmp_path / f"{i}.onnx_adapter") for i, m in enumerate((other, tuned))]

    def both(ids: np.ndarray) -> np.ndarray:
        return ours.session.run(["logits"], plain_feed(ours, ids), run_options(*pair))[0][0]

    np.testing.assert_allclose(both(IDS), of_torch(other)(IDS), atol=1e-4)
    assert "the effect is not its own" in fault(tuned, ours, both)


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_a_wrong_scale_is_named(scale: float, tuned: PeftModel, export: Any) -> None:
    ours = GraphModel(*export())
    adapter = tensors(tuned, scale)
    assert "wrong scale" in fault(tuned, ours, lambda ids: ours.logits(ids, adapter))


def test_another_base_is_named(tuned: PeftModel, tmp_path: Path) -> None:
    source = tiny_model(tmp_path / "other", seed=5)
    theirs = GraphModel(tmp_path / "out", portable(source, tmp_path / "out"))
    adapter = tensors(tuned)
    assert "wrong base" in fault(tuned, theirs, lambda ids: theirs.logits(ids, adapter))
