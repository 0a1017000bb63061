"""Manifests, the conversion of adapters, and the checks that find an adapter which does not do its work."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import FINGERPRINT, GRAPH, QKVO, SITES, VOCABULARY, Tiny, bundle, pairs, peft_folder
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_sdss import bundles
from edge_sdss.bundles import adapters, checks, peft, probe
from edge_sdss.errors import EdgeSdssError, ExportError, InputError, ParityError
from edge_sdss.files import sha256
from edge_sdss.lm import CARD

PROMPTS = [list(range(2, 14)), [5, 9, 1, 30, 30, 2, 17], list(range(31, 8, -1))]
RANKS = dict(zip(QKVO, (3, 2, 1, 4), strict=True))


def fold(a: np.ndarray, b: np.ndarray, scale: float = 1.0) -> peft.Pair:
    return peft.Pair(np.ascontiguousarray(a.T), np.ascontiguousarray((b * np.float32(scale)).T))


# --- manifest ---------------------------------------------------------------------------------------------------


def test_a_bundle_is_read_as_it_was_written_and_verifies(tmp_path: Path) -> None:
    folder = bundle(tmp_path / "b", active=None, notes=("one",))
    assert bundles.verify(folder) == bundles.load(folder)
    assert [one.path for one in bundles.load(folder).entries] == [
        "model.onnx",
        "tokenizer.json",
        "config/generation.json",
    ]


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda f: (f / "model.onnx").unlink(), "model.onnx is missing"),
        (lambda f: (f / "model.onnx").write_bytes(b"x"), "model.onnx has 1 bytes, not 40000"),
        (lambda f: (f / "config/generation.json").write_bytes(b"[]"), "generation.json has other bytes"),
        (lambda f: (f / "manifest.json").unlink(), "there is no manifest.json in it"),
        (lambda f: (f / "manifest.json").write_text("{"), "no valid JSON"),
    ],
)
def test_what_is_wrong_with_a_file_is_named(tmp_path: Path, spoil: Any, complaint: str) -> None:
    folder = bundle(tmp_path / "b")
    spoil(folder)
    with pytest.raises(InputError, match=complaint):
        bundles.verify(folder)


@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [
        (("files", 0, "path"), "../outside", "does not name the file model.onnx"),
        (("files", 2, "path"), "../outside", "../outside is no path inside"),
        (("files", 2, "path"), "/etc/hostname", "is no path inside"),
        (("files", 2, "path"), "model.onnx", "names the file model.onnx twice"),
        (("tokenizer_sha256",), "0" * 64, "tokenizer.json is another one"),
        (("active",), "nobody", "active adapter nobody is not among"),
        (("schema_version",), "2", "schema_version '2'"),
        (("surprise",), 1, "surprise: Extra inputs"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(tmp_path: Path, key: Any, value: Any, complaint: str) -> None:
    folder = bundle(tmp_path / "b")
    (tmp_path / "outside").write_text("{}")
    content = json.loads((folder / "manifest.json").read_text())
    place = content
    for part in key[:-1]:
        place = place[part]
    place[key[-1]] = value
    (folder / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=complaint):
        bundles.verify(folder)


def test_a_link_that_leads_out_of_the_bundle_is_refused(tmp_path: Path) -> None:
    folder = bundle(tmp_path / "b")
    (folder / "model.onnx").rename(tmp_path / "model.onnx")
    (folder / "model.onnx").symlink_to(tmp_path / "model.onnx")
    with pytest.raises(InputError, match=r"model\.onnx leads out"):
        bundles.verify(folder)


# --- PEFT folders -----------------------------------------------------------------------------------------------


def test_scale_patterns_and_rslora_are_folded_as_peft_does_it(tmp_path: Path) -> None:
    torch, nn_peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    from transformers.pytorch_utils import Conv1D

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.v_proj = torch.nn.Linear(6, 5), torch.nn.Linear(6, 3)
            self.c_attn = Conv1D(7, 6)

        def forward(self, x: Any) -> Any:
            return self.q_proj(x), self.v_proj(x), self.c_attn(x)

    class Model(torch.nn.Sequential):
        def prepare_inputs_for_generation(self) -> None: ...

    cases: list[dict[str, Any]] = [
        {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 6},
        {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 6, "use_rslora": True},
        {
            "target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 6,
            "rank_pattern": {"v_proj": 2, "0.q_proj": 3}, "alpha_pattern": {"v_.*": 5},
        },
        {"target_modules": ["c_attn"], "r": 2, "lora_alpha": 3, "fan_in_fan_out": True},
    ]  # fmt: skip
    for index, case in enumerate(cases):
        torch.manual_seed(index)
        model = nn_peft.get_peft_model(Model(Block(), Block()), nn_peft.LoraConfig(**case))
        for name, weight in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(weight)
        folder = tmp_path / str(index)
        model.save_pretrained(str(folder))
        found = peft.read(folder)
        layers = {n: m for n, m in model.base_model.model.named_modules() if hasattr(m, "get_delta_weight")}
        assert found.modules.keys() == layers.keys()
        for path, layer in layers.items():
            delta = layer.get_delta_weight("default").detach().numpy()
            pair = found.modules[path]
            np.testing.assert_allclose(pair.a @ pair.b, delta if "c_attn" in path else delta.T, rtol=1e-5, atol=1e-6)
            assert pair.rank == layer.r["default"]
        again = tmp_path / f"{index}-again"
        peft.write(again, found.modules, "tiny")
        reloaded = nn_peft.PeftModel.from_pretrained(Model(Block(), Block()), str(again))
        for path, layer in reloaded.base_model.model.named_modules():
            if hasattr(layer, "get_delta_weight"):
                expected = found.modules[path].a @ found.modules[path].b
                delta = layer.get_delta_weight("default").detach().numpy()
                np.testing.assert_allclose(delta if "c_attn" in path else delta.T, expected, rtol=1e-5, atol=1e-6)
                assert layer.scaling["default"] == 1


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "lora_only"}, "bias"),
        ({"lora_bias": True}, "lora_bias"),
        ({"peft_type": "IA3"}, "peft_type"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
    ],
)
def test_more_than_lora_is_refused_by_name(tmp_path: Path, settings: dict[str, Any], name: str) -> None:
    pytest.importorskip("safetensors")
    folder = peft_folder(tmp_path / "a", pairs({QKVO[0]: 4}), **settings)
    with pytest.raises(ExportError, match=f"its {name} is"):
        peft.read(folder)


def test_tensors_that_are_no_lora_matrix_are_refused_by_name(tmp_path: Path) -> None:
    numpy_files = pytest.importorskip("safetensors.numpy")
    folder = peft_folder(tmp_path / "a", pairs({QKVO[0]: 4}))
    tensors = numpy_files.load_file(folder / peft.WEIGHTS)
    extra = {"base_model.model.lm_head.weight": np.zeros((2, 2), np.float32)}
    numpy_files.save_file({**tensors, **extra}, folder / peft.WEIGHTS)
    with pytest.raises(ExportError, match=r"lm_head\.weight"):
        peft.read(folder)
    numpy_files.save_file({k: v for k, v in tensors.items() if "lora_A" in k}, folder / peft.WEIGHTS)
    with pytest.raises(InputError, match="B None"):
        peft.read(folder)


@pytest.mark.parametrize("damage", [b"", b"12345678", b"\xff" * 64, None])
def test_a_damaged_file_is_one_line(tmp_path: Path, damage: bytes | None) -> None:
    pytest.importorskip("safetensors")
    folder = peft_folder(tmp_path / "a", pairs({QKVO[0]: 4}))
    whole = (folder / peft.WEIGHTS).read_bytes()
    (folder / peft.WEIGHTS).write_bytes(whole[:-5] if damage is None else damage)
    with pytest.raises(InputError, match="cannot be read"):
        peft.read(folder)


def test_half_precision_is_read_without_torch(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    folder = peft_folder(tmp_path / "a", pairs({QKVO[0]: 4}), alpha=4)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        torch.manual_seed(1)
        a, b = torch.randn(4, 8).to(dtype), torch.randn(6, 4).to(dtype)
        key = f"base_model.model.{QKVO[0]}.lora_"
        save_file({f"{key}A.weight": a, f"{key}B.weight": b}, folder / peft.WEIGHTS)
        pair = peft.read(folder).modules[QKVO[0]]
        np.testing.assert_array_equal(pair.a, a.float().numpy().T)
        np.testing.assert_array_equal(pair.b, b.float().numpy().T)


# --- packing ----------------------------------------------------------------------------------------------------


@given(
    ranks=st.dictionaries(st.sampled_from(QKVO), st.integers(1, 5), min_size=1),
    seed=st.integers(0, 9),
    holes=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_packed_sites_compute_each_module_and_unpack(ranks: dict[str, int], seed: int, holes: bool) -> None:
    lora = peft.Lora({m: fold(a, b, 2.0) for m, (a, b) in pairs(ranks, seed=seed).items()}, 2.0)
    if holes:  # a row of zeros belongs to nobody, so only what is computed comes back
        for pair in lora.modules.values():
            pair.b[0] = 0
    arrays = adapters.pack(lora, GRAPH)
    x = np.random.default_rng(seed).standard_normal((3, 12)).astype(np.float32)
    back = adapters.unpack(arrays, GRAPH)
    for site in SITES:
        columns = slice(site.start, site.start + site.outputs)
        inputs = x[:, : site.inputs]
        pair = lora.modules.get(site.module)
        expected = inputs @ pair.a @ pair.b if pair else np.zeros((3, site.outputs))
        if site.lora_a in arrays:
            packed = (inputs @ arrays[site.lora_a] @ arrays[site.lora_b])[:, columns]
            np.testing.assert_allclose(packed, expected, rtol=1e-4, atol=1e-5)
        if pair and not holes:
            np.testing.assert_array_equal(back[site.module].a, pair.a)
            np.testing.assert_array_equal(back[site.module].b, pair.b)
        elif site.module in back:
            computed = inputs @ back[site.module].a @ back[site.module].b
            np.testing.assert_allclose(computed, expected, rtol=1e-4, atol=1e-5)
    if not holes:
        assert back.keys() == lora.modules.keys()


def test_an_adapter_that_does_not_fit_the_graph_is_refused() -> None:
    lora = peft.Lora({"layers.0.up_proj": fold(np.ones((2, 8)), np.ones((4, 2)))}, 1.0)
    with pytest.raises(ExportError, match=r"no site there, layers\.0\.up_proj"):
        adapters.pack(lora, GRAPH)
    lora = peft.Lora({QKVO[0]: fold(np.ones((2, 9), np.float32), np.ones((6, 2), np.float32))}, 1.0)
    with pytest.raises(ExportError, match=r"q_proj is \[9, 6\], there \[8, 6\]"):
        adapters.pack(lora, GRAPH)
    half = GRAPH.model_copy(update={"lora_dtype": "float16"})
    lora = peft.Lora({QKVO[0]: fold(np.ones((2, 8), np.float32), np.full((6, 2), 1e5, np.float32))}, 1.0)
    with pytest.raises(ExportError, match="overflows in float16"):
        adapters.pack(lora, half)


def test_rows_that_fill_two_modules_are_no_peft_adapter() -> None:
    arrays = {"qkv.A": np.ones((8, 1), np.float32), "qkv.B": np.ones((1, 12), np.float32)}
    with pytest.raises(InputError, match="several modules"):
        adapters.unpack(arrays, GRAPH)
    with pytest.raises(InputError, match=r"other\.A"):
        adapters.unpack({"other.A": np.ones((8, 1), np.float32)}, GRAPH)


# --- files ------------------------------------------------------------------------------------------------------


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("safetensors")
    return bundle(tmp_path / "bundle")


def test_there_and_back_is_exact(whole: Path, tmp_path: Path) -> None:
    manifest = bundles.load(whole)
    ranks = {"rank_pattern": {"q_proj": 3, "k_proj": 2, "v_proj": 1}}
    source = peft_folder(tmp_path / "a", pairs(RANKS), r=4, alpha=4.0 * 3, use_rslora=False, **ranks)
    entry = adapters.convert(source, manifest, whole, "mine")
    assert (entry.rank, entry.scale, entry.file.path) == (4, 3.0, "adapters/mine.onnx_adapter")
    assert entry.source_sha256 == sha256(source / peft.WEIGHTS)
    adapters.restore(whole / entry.file.path, manifest, tmp_path / "back")
    first, back = peft.read(source).modules, peft.read(tmp_path / "back").modules
    assert first.keys() == back.keys()
    for path, pair in first.items():
        np.testing.assert_array_equal(back[path].a, pair.a)
        np.testing.assert_array_equal(back[path].b, pair.b)
    again = adapters.convert(tmp_path / "back", manifest, whole, "again")
    assert again.file.sha256 == entry.file.sha256
    assert again.scale == 1


def test_an_adapter_of_another_base_is_refused(whole: Path, tmp_path: Path) -> None:
    manifest, weights = bundles.load(whole), pairs(RANKS)
    ranks = {"rank_pattern": {"q_proj": 3, "k_proj": 2, "v_proj": 1}}
    other = peft_folder(tmp_path / "other", weights, base="0" * 64, **ranks)
    for trust in (False, True):
        with pytest.raises(InputError, match="trained on the model 000000000000"):
            adapters.convert(other, manifest, whole, "mine", trust=trust)
    (other / CARD).unlink()
    with pytest.raises(InputError, match="on which model it was trained"):
        adapters.convert(other, manifest, whole, "mine")
    entry = adapters.convert(other, manifest, whole, "mine", trust=True)
    assert adapters.read(whole / entry.file.path, FINGERPRINT).keys() == {"qkv.A", "qkv.B", "o.A", "o.B"}
    with pytest.raises(InputError, match="another base"):
        adapters.read(whole / entry.file.path, "0" * 64)
    with pytest.raises(InputError, match="name an adapter"):
        adapters.convert(other, manifest, whole, "../x", trust=True)


def test_a_file_that_is_no_adapter_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    (tmp_path / "x.onnx_adapter").write_bytes(b"no flatbuffer")
    for name in ("x.onnx_adapter", "absent.onnx_adapter"):
        with pytest.raises(InputError, match="read adapter"):
            adapters.read(tmp_path / name)


# --- checks, on a graph ------------------------------------------------------------------------------------------


class Device:
    """The tiny graph in ONNX Runtime, its adapters passed in one of several ways."""

    def __init__(self, folder: Path, way: str = "feeds") -> None:
        import onnxruntime

        self.ort, self.folder, self.way = onnxruntime, folder, way
        self.session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
        self.inputs = {one.name for one in self.session.get_inputs()}
        self.inputs |= {one.name for one in self.session.get_overridable_initializers()}

    def logits(self, ids: Any, *names: str | None) -> np.ndarray:
        feed = {"input_ids": np.asarray(ids, np.int64)}
        files = [self.folder / f"adapters/{name}.onnx_adapter" for name in names if name]
        if self.way == "feeds" and files:
            feed.update(adapters.read(files[0]))
        options, kept = self.ort.RunOptions(), []
        if self.way != "feeds":
            for file in files:
                kept.append(self.ort.LoraAdapter())
                kept[-1].Load(str(file))
                options.add_active_adapter(kept[-1])
        if self.way != "binding":
            return self.session.run(["logits"], feed, options)[0]
        binding = self.session.io_binding()
        binding.bind_cpu_input("input_ids", feed["input_ids"])
        binding.bind_output("logits")
        self.session.run_with_iobinding(binding, options)
        return binding.copy_outputs_to_cpu()[0]


@pytest.fixture
def deployed(tmp_path: Path) -> Path:
    """A bundle with a graph, the adapters "a" and "b", and a probe of each."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    pytest.importorskip("safetensors")
    ranks = {"q_proj": 3, "k_proj": 2, "v_proj": 1}
    tiny, patterns = Tiny(), {"rank_pattern": ranks, "alpha_pattern": ranks}
    folder = bundle(tmp_path / "bundle", files={"model.onnx": tiny.onnx()})
    manifest, made = bundles.load(folder), []
    for seed, name in enumerate("ab"):
        weights = pairs(RANKS, seed=seed, size=0.5)
        source = peft_folder(tmp_path / name, weights, r=4, alpha=4, **patterns)
        entry = adapters.convert(source, manifest, folder, name)
        taken = probe.take(
            tiny.reference({name: weights}), name, PROMPTS,
            base_fingerprint=FINGERPRINT, source_sha256=entry.source_sha256,
        )  # fmt: skip
        probe.write(folder / f"probes/{name}.npz", taken)
        made.append(entry.model_copy(update={"probe": bundles.entry(folder, f"probes/{name}.npz")}))
    bundles.write(folder, manifest.model_copy(update={"adapters": tuple(made), "active": "a"}))
    bundles.verify(folder)
    return folder


def rewrite(folder: Path, change: Any, name: str = "a") -> None:
    """Writes the adapter's file anew after `change(arrays)`, and its hash with it, as a faulty converter would."""
    file = folder / f"adapters/{name}.onnx_adapter"
    adapters.write(file, change(adapters.read(file)), FINGERPRINT)


@pytest.mark.parametrize("way", ["feeds", "options"])
def test_adapters_that_work_pass(deployed: Path, way: str) -> None:
    device = Device(deployed, way)
    measured = checks.activation(deployed, device.logits, inputs=device.inputs)
    assert {check.stage for check in measured} == {"adapter a", "adapter b"}
    for check in measured:
        assert check.n > 100
        if "effect| /" in check.metric:
            assert check.value == pytest.approx(1, abs=1e-5)
        else:
            assert 0 <= check.value + 1e-12 < 1e-5


def test_a_renamed_input_is_named(deployed: Path) -> None:
    device = Device(deployed)
    with pytest.raises(ExportError, match=r"renamed input: 4 of its 4 names .* o\.A"):
        checks.activation(deployed, device.logits, inputs={"input_ids"})
    rewrite(deployed, lambda arrays: {f"model.{name}": value for name, value in arrays.items()})
    with pytest.raises(ExportError, match=r"renamed input: 4 of its 4 names .* model\.o\.A"):
        checks.activation(deployed, device.logits)


def test_a_site_that_is_never_fed_is_named(deployed: Path) -> None:
    rewrite(deployed, lambda arrays: {name: value for name, value in arrays.items() if name != "o.B"})
    with pytest.raises(ExportError, match=r"o\.B is never fed, though o\.A is"):
        checks.activation(deployed, Device(deployed).logits)


def test_a_pair_that_is_left_out_shows_in_the_effect(deployed: Path) -> None:
    rewrite(deployed, lambda arrays: {name: value for name, value in arrays.items() if not name.startswith("o")})
    with pytest.raises(ParityError, match="activate adapter a: "):
        checks.activation(deployed, Device(deployed).logits)


def test_zeroed_b_is_named(deployed: Path) -> None:
    rewrite(deployed, lambda arrays: {n: v * (n[-1] == "A") for n, v in arrays.items()})
    with pytest.raises(ExportError, match="zeroed B"):
        checks.activation(deployed, Device(deployed).logits)


def test_a_wrong_base_is_found_by_fingerprint_and_by_logits(deployed: Path) -> None:
    manifest = bundles.load(deployed)
    entry = manifest.adapters[0].model_copy(update={"base_fingerprint": "0" * 64})
    with pytest.raises(ExportError, match="wrong base: it was trained on 000000000000"):
        checks.files(deployed, entry, manifest)
    (deployed / "model.onnx").write_bytes(Tiny(seed=5).onnx())  # the fingerprint says that it is the right one
    with pytest.raises(ParityError, match="wrong base: without an adapter its logits are off by"):
        checks.activation(deployed, Device(deployed).logits)


@pytest.mark.parametrize(("scale", "text"), [(2.0, "2.0 times"), (0.5, "0.5 times"), (1.05, r"1\.05\d times")])
def test_a_wrong_scale_is_named_with_its_size(deployed: Path, scale: float, text: str) -> None:
    rewrite(deployed, lambda a: {n: v * np.float32(scale if n == "o.B" else 1) for n, v in a.items() if n[0] == "o"})
    tiny, weights = Tiny(), pairs(RANKS, seed=0, size=0.5)
    only = {QKVO[3]: weights[QKVO[3]]}  # one linear at the end: the effect is linear in the scale
    sha = bundles.load(deployed).adapters[0].source_sha256
    reference = tiny.reference({"a": only})
    probe.write(
        deployed / "probes/a.npz",
        probe.take(reference, "a", PROMPTS, base_fingerprint=FINGERPRINT, source_sha256=sha),
    )
    with pytest.raises(ParityError, match=f"wrong scale: the effect is {text} what it should be"):
        checks.activation(deployed, Device(deployed).logits, only={"a"})


def test_io_binding_that_ignores_the_adapter_is_found(deployed: Path) -> None:
    with pytest.raises(ParityError, match=r"inactive: .* bit by bit; bind its tensors as inputs: IO binding ignores"):
        checks.activation(deployed, Device(deployed, "binding").logits)


def test_exchanged_adapters_are_found(deployed: Path) -> None:
    device, other = Device(deployed), {"a": "b", "b": "a", None: None}
    with pytest.raises(ParityError, match="activate adapter a: the effect is not its own"):
        checks.activation(deployed, lambda ids, name: device.logits(ids, other[name]))


def test_the_second_of_two_adapters_is_missed(deployed: Path) -> None:
    device = Device(deployed, "options")
    with pytest.raises(ParityError, match="of a, b only a shows"):
        checks.mix(device.logits, lambda ids: device.logits(ids, "a", "b"), {"a": 1.0, "b": 1.0}, PROMPTS[0])
    both = [adapters.read(deployed / f"adapters/{name}.onnx_adapter") for name in "ab"]
    weights = {"a": 0.5, "b": 0.25}
    joined = {
        name: np.concatenate([both[0][name], both[1][name]], 1) if name[-1] == "A"
        else np.concatenate([weights["a"] * both[0][name], weights["b"] * both[1][name]], 0).astype(np.float32)
        for name in both[0]
    }  # fmt: skip
    feeds = {"input_ids": np.asarray(PROMPTS[0], np.int64), **joined}
    measured = checks.mix(device.logits, lambda _: device.session.run(["logits"], feeds)[0], weights, PROMPTS[0])
    assert [check.value for check in measured] == pytest.approx([1, 1], abs=0.4)


def test_an_adapter_without_a_probe_is_refused_unless_asked(deployed: Path) -> None:
    manifest = bundles.load(deployed)
    bare = tuple(entry.model_copy(update={"probe": None}) for entry in manifest.adapters)
    bundles.write(deployed, manifest.model_copy(update={"adapters": bare}))
    with pytest.raises(ExportError, match="without a probe"):
        checks.activation(deployed, Device(deployed).logits)
    assert len(checks.activation(deployed, Device(deployed).logits, unprobed=True)) == 2
    with pytest.raises(ParityError, match="inactive"):
        checks.activation(deployed, Device(deployed, "binding").logits, unprobed=True)


# --- checks, on answers made up -----------------------------------------------------------------------------------


def made_up(seed: int = 0) -> tuple[Any, probe.Probe]:
    tiny, weights = Tiny(seed), pairs(RANKS, seed=1, size=0.5)
    reference = tiny.reference({"a": weights})
    return reference, probe.take(reference, "a", PROMPTS, base_fingerprint="f", source_sha256="s")


def test_a_graph_that_gives_the_last_position_alone_is_compared_there() -> None:
    reference, taken = made_up()
    full = checks.compare(reference, "a", taken)
    last = checks.compare(lambda ids, name: reference(ids, name)[None, -1:], "a", taken)
    assert last.size == pytest.approx(1, abs=1e-6)
    assert last.cosine == pytest.approx(1, abs=1e-6)
    assert 0 < last.n < full.n


@given(noise=st.floats(0, 0.04), seed=st.integers(0, 5), shift=st.floats(-9, 9))
@settings(max_examples=25, deadline=None)
def test_rounding_of_the_base_and_a_shift_of_all_logits_pass(noise: float, seed: int, shift: float) -> None:
    reference, taken = made_up()

    def rounded(ids: Any, name: str | None) -> np.ndarray:
        base = reference(ids, None)
        wobble = np.random.default_rng(seed).standard_normal(base.shape) * noise * base.std()
        return reference(ids, name) + wobble + shift

    checks.effect(rounded, "a", taken, "int8")


@pytest.mark.parametrize("size", [0.3, 0.05, 0.001])
def test_an_adapter_of_little_effect_is_probed_and_judged_amplified(size: float, tmp_path: Path) -> None:
    tiny, weights = Tiny(), pairs(RANKS, seed=1, size=size)
    reference = tiny.reference({"a": weights})
    taken = probe.take(reference, "a", PROMPTS, base_fingerprint="f", source_sha256="s")
    assert taken.scale > 1
    probe.write(tmp_path / "p.npz", taken)
    assert probe.read(tmp_path / "p.npz").scale == taken.scale
    base, amplified = (probe.centred(reference(PROMPTS[0], asked)) for asked in (None, {"a": taken.scale}))
    assert 0.2 < np.linalg.norm(amplified - base) / np.linalg.norm(base) < 0.4
    draws = np.random.default_rng(0)

    def rounded(ids: Any, asked: Any, times: float = 1.0) -> np.ndarray:
        exact = reference(ids, {"a": asked["a"] * times} if isinstance(asked, dict) else asked)
        return exact + draws.standard_normal(exact.shape) * 0.02 * exact.std()  # anew at every call, as rounding is

    checks.effect(rounded, "a", taken, "int8")
    with pytest.raises(ParityError, match=r"wrong scale: the effect is (1\.9|2\.\d) times"):
        checks.effect(lambda ids, asked: rounded(ids, asked, 2.0), "a", taken, "int8")
    with pytest.raises(ParityError, match="inactive: the logits are those of the base, bit by bit"):
        checks.effect(lambda ids, asked: reference(ids, asked if isinstance(asked, dict) else None), "a", taken, "int8")


def test_a_probe_that_rounding_hides_is_not_judged_but_said_to_be_too_small() -> None:
    tiny, weights, draws = Tiny(), pairs(RANKS, seed=1, size=0.02), np.random.default_rng(0)
    reference = tiny.reference({"a": weights})
    clear = probe.take(reference, "a", PROMPTS, base_fingerprint="f", source_sha256="s")
    samples = (
        dataclasses.replace(s, adapted=s.base + (s.adapted - s.base) / np.float32(clear.scale)) for s in clear.samples
    )
    small = dataclasses.replace(clear, samples=tuple(samples), scale=1.0)

    def rounded(ids: Any, asked: Any) -> np.ndarray:
        exact = reference(ids, asked)
        return exact + draws.standard_normal(exact.shape) * 0.02 * exact.std()

    with pytest.raises(ParityError, match=r"not to be told: .* take its probe anew"):
        checks.effect(rounded, "a", small, "int8")


@pytest.mark.parametrize(
    ("precision", "times", "complaint"),
    [("int4", 2.0, "wrong scale: the effect is 2.0"), ("int8", 0.1, "inactive"), ("int4", -1, "not its own"),
     ("float32", 1.03, r"wrong scale: the effect is 1\.030"), ("int8", float("nan"), "inactive")],
)  # fmt: skip
def test_the_limits_follow_the_precision(precision: Any, times: float, complaint: str) -> None:
    reference, taken = made_up()

    def logits(ids: Any, name: str | None) -> np.ndarray:
        base = reference(ids, None)
        return base + times * (reference(ids, name) - base) if name else base

    with pytest.raises(ParityError, match=complaint):
        checks.effect(logits, "a", taken, precision)


def test_a_probe_of_an_adapter_that_does_nothing_says_so() -> None:
    reference, _ = made_up()
    taken = probe.take(lambda ids, _: reference(ids, None), "a", PROMPTS, base_fingerprint="f", source_sha256="s")
    with pytest.raises(ParityError, match="zeroed B: it changes nothing where it was trained"):
        checks.effect(reference, "a", taken, "float32")


def test_a_probe_is_read_as_written_and_bound_to_its_adapter(tmp_path: Path) -> None:
    _, taken = made_up()
    probe.write(tmp_path / "p.npz", taken)
    back = probe.read(tmp_path / "p.npz")
    assert (back.base_fingerprint, back.source_sha256, len(back.samples)) == ("f", "s", len(PROMPTS))
    for one, other in zip(taken.samples, back.samples, strict=True):
        for field in ("ids", "positions", "tokens", "base", "adapted"):
            np.testing.assert_array_equal(getattr(one, field), getattr(other, field))
        assert one.positions[-1] == len(one.ids) - 1
        assert one.tokens.max() == VOCABULARY - 1
    for damage in (b"", b"PK\x03\x04", (tmp_path / "p.npz").read_bytes()[:-40]):
        (tmp_path / "bad.npz").write_bytes(damage)
        with pytest.raises(InputError, match="read the probe"):
            probe.read(tmp_path / "bad.npz")


def test_a_stale_probe_is_refused(deployed: Path) -> None:
    _, taken = made_up()
    probe.write(deployed / "probes/a.npz", taken)
    with pytest.raises(EdgeSdssError, match="its probe is of another base, f and not"):
        checks.activation(deployed, Device(deployed).logits)
