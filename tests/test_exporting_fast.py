"""The fast graph against transformers and PEFT, and weights that came from 4 or 8 bits."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ort = pytest.importorskip("onnxruntime")
pytest.importorskip("onnx_ir")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tiny import tiny_model

from edge_sdss.bundles.manifest import Graph
from edge_sdss.errors import ExportError
from edge_sdss.exporting import fast, fast_config, fast_weights, genai_config
from edge_sdss.exporting.fast import Options, build, build_with

SIZES = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "pad_token_id": 0,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama tied": ("Llama", {"tie_word_embeddings": True, "rms_norm_eps": 1e-5, "mlp_bias": True}),
    "llama3 rotary": ("Llama", {"rope_scaling": LLAMA3, "attention_bias": True}),
    "linear rotary": ("Llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    "mistral": ("Mistral", {"sliding_window": 5}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {}),
    "gemma": ("Gemma", {}),
    "gemma2": ("Gemma2", {"sliding_window": 5, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 2.0}),
    "gemma3": ("Gemma3", {"sliding_window": 5, "sliding_window_pattern": 2, "query_pre_attn_scalar": 24}),
    "phi3": ("Phi3", {"sliding_window": 6}),
}
IDS = np.random.default_rng(3).integers(1, 96, (2, 12))


def model(folder: Path, case: str, **changes: Any) -> Any:
    """A tiny model of a family in `folder`; norms and biases are random too, since their defaults hide mistakes."""
    name, special = FAMILIES[case]
    suffix = "Text" if name == "Gemma3" else ""
    config = getattr(transformers, f"{name}{suffix}Config")(**{**SIZES, **special, **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        made = getattr(transformers, f"{name}ForCausalLM")(config).float().eval()
        for key, value in made.named_parameters():
            if "norm" in key or key.endswith("bias"):
                torch.nn.init.normal_(value, mean=0.3, std=0.3)
            elif "layers" in key:
                torch.nn.init.normal_(value, std=0.15)
    made.config._attn_implementation = "eager"
    made.save_pretrained(folder)
    return made


def session(folder: Path) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])


def step(run: Any, graph: Graph, ids: Any, mask: Any, past: Any = None, **more: Any) -> tuple[Any, list[Any]]:
    """Logits and the cache after ids [batch, n] are read behind `past`."""
    empty = np.zeros((len(ids), graph.kv_heads, 0, graph.head_dim), graph.kv_dtype)
    names = [f"{i}.{kind}" for i in range(graph.layers) for kind in ("key", "value")]
    cache = past or [empty] * len(names)
    feeds = {f"past_key_values.{name}": value for name, value in zip(names, cache, strict=True)}
    feeds |= {"input_ids": ids, "attention_mask": mask, **more}
    logits, *present = run.run(["logits", *(f"present.{name}" for name in names)], feeds)
    return logits, present


def reference(made: Any, ids: Any) -> Any:
    with torch.no_grad():
        return made(torch.from_numpy(ids)).logits.numpy()


def exact(folder: Path, out: Path, **changes: Any) -> Graph:
    options = {"precision": "float32", "last_logits_only": False, **changes}
    return build_with(Options(**options), folder, out)


@pytest.mark.parametrize("case", FAMILIES)
def test_equals_transformers_at_once_and_in_steps(tmp_path: Path, case: str) -> None:
    made = model(tmp_path / "hf", case)
    graph = exact(tmp_path / "hf", tmp_path / "out")
    expected = reference(made, IDS)
    run, ones = session(tmp_path / "out"), np.ones_like(IDS)
    logits, _ = step(run, graph, IDS, ones)
    assert np.abs(logits - expected).max() <= 1e-4
    first, past = step(run, graph, IDS[:, :7], ones[:, :7])
    assert np.abs(first - expected[:, :7]).max() <= 1e-4
    for n in range(8, 13):
        logits, past = step(run, graph, IDS[:, n - 1 : n], ones[:, :n], past)
        assert np.abs(logits[:, 0] - expected[:, n - 1]).max() <= 1e-4


def test_rows_padded_on_the_right_equal_rows_alone(tmp_path: Path) -> None:
    made = model(tmp_path / "hf", "llama")
    graph = build(tmp_path / "hf", tmp_path / "out", precision="float32")
    run, mask = session(tmp_path / "out"), np.ones_like(IDS)
    mask[1, 7:] = 0
    logits, past = step(run, graph, IDS, mask)
    assert logits.shape == (2, 1, 96)
    short = IDS[1:, :7]
    assert np.abs(logits[0, 0] - reference(made, IDS)[0, -1]).max() <= 1e-4
    assert np.abs(logits[1, 0] - reference(made, short)[0, -1]).max() <= 1e-4
    new = np.array([[5], [9]])
    grown = np.concatenate([mask, np.zeros((2, 1), int)], 1)
    grown[0, 12] = grown[1, 7] = 1  # the row that was shorter goes on where it ended
    logits, _ = step(run, graph, new, grown, past)
    assert np.abs(logits[0, 0] - reference(made, np.append(IDS[:1], new[:1], 1))[0, -1]).max() <= 1e-4
    assert np.abs(logits[1, 0] - reference(made, np.append(short, new[1:], 1))[0, -1]).max() <= 1e-4


def test_hidden_states_are_those_of_the_last_norm(tmp_path: Path) -> None:
    made = model(tmp_path / "hf", "gemma2")
    graph = build(tmp_path / "hf", tmp_path / "out", precision="float32", hidden_states=True)
    run = session(tmp_path / "out")
    with torch.no_grad():
        expected = made.model(torch.from_numpy(IDS)).last_hidden_state.numpy()
    feeds = {name.name: np.zeros((2, 2, 0, 16), np.float32) for name in run.get_inputs() if "past" in name.name}
    (hidden,) = run.run(["hidden_states"], {**feeds, "input_ids": IDS, "attention_mask": np.ones_like(IDS)})
    assert graph.hidden_states
    assert np.abs(hidden - expected).max() <= 1e-4


def adapted(made: Any, targets: str | list[str]) -> tuple[Any, dict[str, tuple[Any, Any]]]:
    """A model with random LoRA layers of rank 3, and per module A [inputs, r] and scaled B [r, outputs]."""
    peft = pytest.importorskip("peft")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(8)
        lora = peft.get_peft_model(made, peft.LoraConfig(r=3, lora_alpha=6, target_modules=targets)).eval()
        for name, value in lora.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(value, std=0.1)
    layers = {}
    for name, module in lora.named_modules():
        if "default" in getattr(module, "lora_A", {}):
            a, b = (getattr(module, which)["default"].weight.detach().numpy().T for which in ("lora_A", "lora_B"))
            layers[name.removeprefix("base_model.model.")] = a, b * module.scaling["default"]
    return lora, layers


def packed(graph: Graph, layers: dict[str, tuple[Any, Any]]) -> dict[str, Any]:
    """The inputs of an adapter: where modules share a site, A side by side and B on the diagonal."""
    by_input: dict[str, list[Any]] = {}
    for site in graph.sites:
        by_input.setdefault(site.lora_a, []).append(site)
    feeds = {}
    for sites in by_input.values():
        ranks = [layers[site.module][0].shape[1] for site in sites]
        b = np.zeros((sum(ranks), sum(site.outputs for site in sites)), np.float32)
        row = 0
        for site, rank in zip(sites, ranks, strict=True):
            b[row : row + rank, site.start : site.start + site.outputs] = layers[site.module][1]
            row += rank
        feeds[sites[0].lora_a] = np.concatenate([layers[site.module][0] for site in sites], 1)
        feeds[sites[0].lora_b] = b
    return feeds


@pytest.mark.parametrize("case", ["llama", "qwen2", "gemma2", "phi3"])
def test_adapters_equal_peft_and_rank_0_changes_nothing(tmp_path: Path, case: str) -> None:
    made = model(tmp_path / "hf", case)
    graph = exact(tmp_path / "hf", tmp_path / "out")
    plain = exact(tmp_path / "hf", tmp_path / "plain", adapters=False)
    assert not plain.sites
    assert plain.plain is None
    assert len({site.module for site in graph.sites}) == 3 * (4 if case == "phi3" else 7)
    run, ones = session(tmp_path / "out"), np.ones_like(IDS)
    off, _ = step(run, graph, IDS, ones)
    assert np.array_equal(off, step(session(tmp_path / "plain"), plain, IDS, ones)[0])
    assert graph.plain is not None
    beside = ort.InferenceSession(str(tmp_path / "out" / graph.plain), providers=["CPUExecutionProvider"])
    assert not beside.get_overridable_initializers()
    assert np.array_equal(off, step(beside, graph, IDS, ones)[0])
    lora, layers = adapted(made, "all-linear")
    expected = reference(lora, IDS)
    assert np.abs(off - expected).max() > 0.02
    on, _ = step(run, graph, IDS, ones, **packed(graph, layers))
    assert np.abs(on - expected).max() <= 1e-4


def sixteen_levels(rng: Any, shape: tuple[int, int], zero: float = 1.0) -> Any:
    """A weight that was 4-bit once: scale * code + minimum, scale and minimum float16, blocks of 32."""
    blocks = shape[0], shape[1] // 32
    scales = rng.uniform(0.005, 0.02, blocks).astype(np.float16).astype(np.float32)
    minima = (-scales * rng.uniform(5, 10, blocks) * zero).astype(np.float16).astype(np.float32)
    codes = rng.integers(0, 16, (*blocks, 32))
    codes[..., :2] = 0, 15
    return (scales[..., None] * codes.astype(np.float32) + minima[..., None]).reshape(shape), codes, scales, minima


def test_a_weight_of_16_levels_is_found_again_bit_by_bit() -> None:
    rng = np.random.default_rng(1)
    weight, codes, scales, minima = sixteen_levels(rng, (40, 96))
    found = fast_weights.four_bits(weight, 32)
    assert found.recovered
    assert np.array_equal(found.codes, codes)
    assert np.array_equal(found.scales, scales)
    assert np.array_equal(found.minima, minima)
    weight[3, 70] += 0.3 * scales[3, 2]  # one value off the grid
    other = fast_weights.four_bits(weight, 32)
    assert not other.recovered
    assert np.abs(other.values() - weight).max() < scales.max()


def test_blocks_with_few_levels_and_constant_blocks_are_found_too() -> None:
    rng = np.random.default_rng(2)
    weight, _, scales, _ = sixteen_levels(rng, (8, 96))
    weight[0, :32] = 0.25
    weight[1, :32] = 0
    weight[2, :32] = np.where(np.arange(32) % 2, -1.1, 2.0) * scales[2, 0]
    found = fast_weights.four_bits(weight, 32)
    assert found.recovered
    packed_ = fast_weights.pack_four(found, 96, block_means=True)
    assert np.abs(dense(packed_, 96) - weight).max() < 0.1 * scales.max()
    assert np.array_equal(dense(packed_, 96)[:2, :32], weight[:2, :32])


def test_a_weight_of_255_levels_is_found_again() -> None:
    rng = np.random.default_rng(4)
    scales = rng.uniform(0.001, 0.1, (20, 2)).astype(np.float16).astype(np.float32)
    codes = rng.integers(-127, 128, (20, 2, 32))
    codes[..., 0] = 127
    weight = (scales[..., None] * codes.astype(np.float32)).reshape(20, 64)
    found = fast_weights.eight_bits(weight, 32)
    assert found.recovered
    assert np.array_equal(found.codes, codes + 128)
    assert not fast_weights.eight_bits(weight + 1e-5, 32).recovered


def dense(packed_: fast_weights.Packed, columns: int) -> Any:
    """The weight [rows, columns] that MatMulNBits and the block means together stand for, by its definition."""
    codes = packed_.codes
    if packed_.bits == 4:
        codes = np.stack([codes & 15, codes >> 4], -1).reshape(*codes.shape[:2], -1)
    blocks = codes.shape[1]
    if packed_.zero_points is None:
        zeros = np.full(codes.shape[:2], 2 ** (packed_.bits - 1))
    else:
        points = packed_.zero_points
        zeros = np.stack([points & 15, points >> 4], -1).reshape(len(codes), -1)[:, :blocks]
    values = (codes.astype(np.float32) - zeros[..., None]) * packed_.scales[..., None]
    values = values.reshape(len(values), -1)
    size, weight = packed_.block_size, values[:, :columns]
    if not packed_.block_means:
        return weight
    return weight + np.repeat(values[:, columns : packed_.columns] / size, size, 1)


def test_block_means_take_the_shift_of_a_whole_zero_point_away() -> None:
    weight, *_ = sixteen_levels(np.random.default_rng(6), (64, 576))
    blocks = fast_weights.four_bits(weight, 32)
    error = {
        means: np.sqrt(np.mean((dense(fast_weights.pack_four(blocks, 576, block_means=means), 576) - weight) ** 2))
        for means in (False, True)
    }
    assert error[True] < error[False] / 8


@pytest.mark.parametrize("precision", ["int4", "int8"])
def test_quantised_graphs_equal_their_weights_in_floats(
    tmp_path: Path, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against transformers with the weights written back; activations in floats, so nothing else may differ."""
    from edge_sdss.exporting import fast_nodes

    monkeypatch.setattr(fast_nodes, "_INT8_ACTIVATIONS", 0)
    made = model(tmp_path / "hf", "qwen2", hidden_size=128)
    graph = exact(tmp_path / "hf", tmp_path / "out", precision=precision)
    with torch.no_grad():
        for name, value in made.named_parameters():
            if value.dim() != 2:
                continue
            weight = value.numpy()
            if precision == "int8" or "layers" not in name:
                value.copy_(torch.from_numpy(fast_weights.eight_bits(weight, 32).values()))
            else:
                blocks = fast_weights.four_bits(weight, 32)
                packed_ = fast_weights.pack_four(blocks, weight.shape[1], block_means=True)
                value.copy_(torch.from_numpy(dense(packed_, weight.shape[1])))
    logits, _ = step(session(tmp_path / "out"), graph, IDS, np.ones_like(IDS))
    assert np.abs(logits - reference(made, IDS)).max() <= 1e-3


def test_int8_activations_stay_near(tmp_path: Path) -> None:
    made = model(tmp_path / "hf", "llama", hidden_size=128)
    graph = exact(tmp_path / "hf", tmp_path / "out", precision="int8")
    logits, _ = step(session(tmp_path / "out"), graph, IDS, np.ones_like(IDS))
    expected = reference(made, IDS)
    assert np.abs(logits - expected).max() < 0.1 * np.abs(expected).max()


def test_float16_graph_is_declared_so(tmp_path: Path) -> None:
    made = model(tmp_path / "hf", "llama tied")
    graph = exact(tmp_path / "hf", tmp_path / "out", precision="float16")
    assert (graph.kv_dtype, graph.lora_dtype) == ("float16", "float16")
    logits, _ = step(session(tmp_path / "out"), graph, IDS, np.ones_like(IDS))
    assert logits.dtype == np.float32
    assert np.abs(logits - reference(made, IDS)).max() < 0.05


def test_one_buffer_serves_as_past_and_present(tmp_path: Path) -> None:
    made = model(tmp_path / "hf", "qwen3")
    graph = build(tmp_path / "hf", tmp_path / "out", precision="float32")
    run = session(tmp_path / "out")
    binding, ids = run.io_binding(), IDS[:1]
    shape = (1, graph.kv_heads, 32, graph.head_dim)
    caches = {}
    for layer in range(graph.layers):
        for kind in ("key", "value"):
            caches[layer, kind] = cache = ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32))
            binding.bind_ortvalue_input(f"past_key_values.{layer}.{kind}", cache)
            binding.bind_ortvalue_output(f"present.{layer}.{kind}", cache)
    binding.bind_output("logits")
    for begin, end in ((0, 5), (5, 6), (6, 9), (9, 10)):
        binding.bind_cpu_input("input_ids", np.ascontiguousarray(ids[:, begin:end]))
        binding.bind_cpu_input("attention_mask", np.ones((1, end), np.int64))
        run.run_with_iobinding(binding)
        logits = binding.get_outputs()[-1].numpy()
        assert np.abs(logits[0, -1] - reference(made, ids[:, :end])[0, -1]).max() <= 1e-4


def test_what_is_not_supported_is_refused(tmp_path: Path) -> None:
    scaling = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}
    model(tmp_path / "yarn", "llama", rope_scaling=scaling)
    with pytest.raises(ExportError, match="rotary scaling is 'yarn'"):
        build(tmp_path / "yarn", tmp_path / "out")
    (tmp_path / "gpt").mkdir()
    (tmp_path / "gpt" / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ExportError, match="family is 'gpt2'"):
        fast_config.read(tmp_path / "gpt")
    tiny_model(tmp_path / "bare")
    (tmp_path / "bare" / "model.safetensors").unlink()
    with pytest.raises(ExportError, match=r"no \.safetensors"):
        fast.build(tmp_path / "bare", tmp_path / "out")


def greedy(made: Any, ids: list[int], n: int) -> list[int]:
    for _ in range(n):
        ids = [*ids, int(reference(made, np.array([ids]))[0, -1].argmax())]
    return ids


def test_onnxruntime_genai_answers_as_transformers_does(tmp_path: Path) -> None:
    genai = pytest.importorskip("onnxruntime_genai")
    folder, out = tiny_model(tmp_path / "hf", seed=2), tmp_path / "out"
    made = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    graph = build(folder, out, precision="float32")
    genai_config.write(folder, out, graph)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / name, out)
    opened = genai.Model(str(out))
    prompt = genai.Tokenizer(opened).encode("The cat sat on the mat").tolist()
    assert prompt == transformers.AutoTokenizer.from_pretrained(folder)("The cat sat on the mat").input_ids
    settings = genai.GeneratorParams(opened)
    settings.set_search_options(max_length=len(prompt) + 12, min_length=len(prompt) + 12)
    generator = genai.Generator(opened, settings)
    generator.append_tokens(prompt)
    while not generator.is_done():
        generator.generate_next_token()
    assert generator.get_sequence(0).tolist() == greedy(made, prompt, 12)
