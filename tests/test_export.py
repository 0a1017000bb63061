"""bundle: a tiny model by every route, whole or not at all, and what the engine then answers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnx_ir")

from edge_sdss import bundles, bundling, config
from edge_sdss.bundles import adapters, checks, probe, recipes
from edge_sdss.bundling import make, probing
from edge_sdss.bundling.agreement import Stages, texts
from edge_sdss.errors import BackendUnavailable, ExportError, InputError, ParityError
from edge_sdss.exporting.ways import GraphModel
from edge_sdss.lm import CARD, LanguageModel
from edge_sdss.runtime import Engine
from edge_sdss.types import Turn

CPU = recipes.load("onnxruntime-cpu")
TALK = (Turn("user", "What should I cook for dinner tonight?"),)


def recipe(**changes: Any) -> recipes.Recipe:
    return recipes.Recipe.model_validate(CPU.model_copy(update=changes).model_dump())


FAST32 = recipe(name="fast-float32", precision="float32", block_size=None)
PORTABLE = recipe(name="portable-int8", route="portable", precision="int8", kv_cache="growing")


def adapter(tiny: Path, folder: Path, *, seed: int = 1, std: float = 0.05, targets: Any = "all-linear") -> Path:
    """A PEFT folder of random weights with the card that our trainer writes."""
    lm = LanguageModel.load(config.Model(name=str(tiny), device="cpu"))
    torch.manual_seed(seed)
    tuned = peft.get_peft_model(lm.model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    for name, weight in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=std)
    tuned.save_pretrained(folder)
    (folder / CARD).write_text(json.dumps({"base_fingerprint": lm.fingerprint}), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def model(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with attention and MLP that matter: as it comes, its logits are those of the embedding."""
    from shutil import copytree

    from safetensors.torch import load_file, save_file

    folder = copytree(tiny, tmp_path_factory.mktemp("model") / "tiny")
    weights = load_file(folder / "model.safetensors")
    loud = {name: w * (6.0 if w.ndim == 2 else 1.0) for name, w in weights.items()}
    save_file(loud, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def mine(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return adapter(model, tmp_path_factory.mktemp("adapter") / "mine")


@pytest.fixture(scope="module")
def made(model: Path, mine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "bundle"
    bundling.bundle(config.Model(name=str(model)), FAST32, out, adapters={"mine": mine})
    return out


def follows(lm: LanguageModel, adapter: Path | None, prompt: list[int], n: int = 12) -> list[int]:
    lm.attach(adapter)
    found = [id_ for id_, _ in zip(lm.follow(prompt), range(n), strict=False)]
    lm.attach(None)
    return found


def answers_as_torch(bundle: Path, model: Path, mine: Path) -> None:
    engine, lm = Engine.open(bundle, threads=1), LanguageModel.load(config.Model(name=str(model), device="cpu"))
    assert engine.fingerprint == lm.fingerprint
    assert engine.chat.stop_ids == lm.chat.stop_ids
    prompt = engine.chat.prompt_ids(TALK, 64)
    assert prompt == lm.chat.prompt_ids(TALK, 64)
    answers = []
    for name, folder in ((None, None), ("mine", mine)):
        expected = follows(lm, folder, prompt)
        assert [id_ for id_, _ in zip(engine.follow(prompt, name), range(12), strict=False)] == expected
        answers.append(expected)
    assert answers[0] != answers[1]


def test_the_fast_route_answers_as_torch_and_peft(made: Path, model: Path, mine: Path) -> None:
    manifest = bundles.verify(made)
    assert (manifest.active, manifest.recipe, manifest.graph.kv_cache) == ("mine", "fast-float32", "shared")
    assert manifest.graph.hidden_states
    assert not manifest.notes
    stages = {(check.stage, check.against) for check in manifest.checks}
    assert {("float32 graph", "torch"), ("engine on cpu", "float32 graph"), ("adapter mine", "PEFT")} == stages
    assert {"onnxruntime", "torch", "edge_sdss"} <= manifest.made_with.keys()
    assert not [path for path in made.parent.iterdir() if path != made]
    answers_as_torch(made, model, mine)


@pytest.mark.parametrize("name", [None, "mine"])
def test_onnxruntime_genai_opens_the_bundle_and_its_adapter(name: str | None, made: Path) -> None:
    genai = pytest.importorskip("onnxruntime_genai")
    engine, opened = Engine.open(made, threads=1), genai.Model(str(made))
    prompt = engine.chat.prompt_ids(TALK, 64)
    settings = genai.GeneratorParams(opened)
    settings.set_search_options(max_length=len(prompt) + 12, min_length=len(prompt) + 12)
    generator = genai.Generator(opened, settings)
    if name is not None:
        adapters_ = genai.Adapters(opened)
        adapters_.load(str(made / f"adapters/{name}.onnx_adapter"), name)
        generator.set_active_adapter(adapters_, name)
    generator.append_tokens(prompt)
    while not generator.is_done():
        generator.generate_next_token()
    answer = generator.get_sequence(0).tolist()[len(prompt) :]
    assert answer == [id_ for id_, _ in zip(engine.follow(prompt, name), range(12), strict=False)]


def test_the_portable_route_answers_as_torch_and_peft(model: Path, mine: Path, tmp_path: Path) -> None:
    pytest.importorskip("optimum.exporters.onnx")
    plain = recipe(name="p", route="portable", precision="float32", block_size=None, kv_cache="growing")
    bundling.bundle(config.Model(name=str(model)), plain, tmp_path / "out", adapters={"mine": mine})
    answers_as_torch(tmp_path / "out", model, mine)


def test_the_portable_route_compares_before_it_quantises(model: Path, mine: Path, tmp_path: Path) -> None:
    pytest.importorskip("optimum.exporters.onnx")
    found = bundling.bundle(config.Model(name=str(model)), PORTABLE, tmp_path / "out", adapters={"mine": mine})
    measured = {(check.stage, check.against, check.metric): check for check in found.checks}
    assert measured["float32 graph", "torch", "max |Δlogit|"].value < 1e-3
    assert 0 < measured["int8 graph", "float32 graph", "mean KL"].value < 0.02
    assert ("adapter mine", "PEFT", "|effect| / |expected|") in measured
    assert not list((tmp_path / "out").glob(".*"))


@pytest.mark.parametrize("route", ["fast", "portable"])
def test_a_merged_adapter_is_in_the_weights(route: Any, model: Path, mine: Path, tmp_path: Path) -> None:
    pytest.importorskip("optimum.exporters.onnx")
    changes = {"name": route, "route": route, "precision": "float32", "block_size": None}
    plain = recipe(**changes, kv_cache="shared" if route == "fast" else "growing")
    found = bundling.bundle(
        config.Model(name=str(model)), plain, tmp_path / "out", adapters={"mine": mine}, merged=True
    )
    assert not found.adapters
    assert not found.graph.sites
    assert not found.graph.hidden_states
    assert found.settings["merged"] == ["mine"]
    engine, lm = Engine.open(tmp_path / "out"), LanguageModel.load(config.Model(name=str(model), device="cpu"))
    prompt = engine.chat.prompt_ids(TALK, 64)
    assert [i for i, _ in zip(engine.follow(prompt), range(12), strict=False)] == follows(lm, mine, prompt)


@pytest.mark.parametrize("count", [0, 2])
def test_merging_takes_one_adapter(count: int, model: Path, mine: Path, tmp_path: Path) -> None:
    given = {f"a{i}": mine for i in range(count)}
    with pytest.raises(InputError, match=f"{count} adapters are given"):
        bundling.bundle(config.Model(name=str(model)), FAST32, tmp_path / "out", adapters=given, merged=True)


# --- adapters of little effect on real graphs ---


@pytest.mark.parametrize("precision", ["float32", "int8", "int4"])
@pytest.mark.parametrize("std", [0.0005, 0.01])
def test_correct_adapters_of_little_effect_pass(precision: Any, std: float, model: Path, tmp_path: Path) -> None:
    small = adapter(model, tmp_path / "small", std=std)
    chosen = recipe(name="x", precision=precision, block_size=None if precision == "float32" else 32)
    found = bundling.bundle(config.Model(name=str(model)), chosen, tmp_path / "out", adapters={"small": small})
    assert probe.read(small / probe.PROBE).scale > 1
    assert {"adapter small"} <= {check.stage for check in found.checks}


@pytest.mark.parametrize("precision", ["float32", "int8", "int4"])
@pytest.mark.parametrize("std", [0.0005, 0.05])
def test_faults_are_refused_by_name(precision: Any, std: float, model: Path, tmp_path: Path) -> None:
    first, second = (adapter(model, tmp_path / f"{seed}", seed=seed, std=std) for seed in (1, 2))
    chosen = recipe(name="x", precision=precision, block_size=None if precision == "float32" else 32)
    out, given = tmp_path / "out", {"a": first, "b": second}
    bundling.bundle(config.Model(name=str(model)), chosen, out, adapters=given, active="a")
    whole = (out / "adapters/a.onnx_adapter").read_bytes()
    manifest = bundles.load(out)

    def fault(change: Any) -> str:
        arrays = adapters.read(out / "adapters/a.onnx_adapter")
        adapters.write(out / "adapters/a.onnx_adapter", change(arrays), manifest.base_fingerprint)
        one = manifest.adapters[0].model_copy(update={"file": bundles.entry(out, "adapters/a.onnx_adapter")})
        bundles.write(out, manifest.model_copy(update={"adapters": (one, manifest.adapters[1])}))
        with pytest.raises((ExportError, ParityError)) as caught:
            bundling.served(out, only=["a"])
        (out / "adapters/a.onnx_adapter").write_bytes(whole)
        bundles.write(out, manifest)
        return str(caught.value)

    second_of_pair = {site.lora_b for site in manifest.graph.sites}
    scaled = lambda f: lambda arrays: {k: v * np.float32(f if k in second_of_pair else 1) for k, v in arrays.items()}  # noqa: E731
    assert "renamed input" in fault(lambda arrays: {f"model.{k}": v for k, v in arrays.items()})
    assert "zeroed B" in fault(scaled(0))
    assert "wrong scale" in fault(scaled(2))
    assert "inactive" in fault(scaled(0.01))
    assert "not its own" in fault(lambda _: adapters.read(out / "adapters/b.onnx_adapter"))
    engine = Engine.open(out)
    with pytest.raises(ParityError, match="inactive: the logits are those of the base, bit by bit"):
        checks.activation(out, lambda ids, _: engine.logits(ids, None), only=["a"])


# --- refused, and nothing left behind ---


def test_an_adapter_of_another_base_is_refused(model: Path, tmp_path: Path) -> None:
    from tiny import tiny_model

    other = adapter(tiny_model(tmp_path / "other", seed=7), tmp_path / "theirs")
    with pytest.raises(InputError, match="it was trained on the model"):
        bundling.bundle(config.Model(name=str(model)), FAST32, tmp_path / "out", adapters={"theirs": other})
    (other / CARD).unlink()
    with pytest.raises(InputError, match="trust"):
        bundling.bundle(config.Model(name=str(model)), FAST32, tmp_path / "out", adapters={"theirs": other})
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*"))


def test_what_is_there_stays_unless_it_is_a_bundle_to_replace(made: Path, model: Path, tmp_path: Path) -> None:
    settings = config.Model(name=str(model))
    before = (made / "manifest.json").read_bytes()
    with pytest.raises(InputError, match="something is there"):
        bundling.bundle(settings, FAST32, made)
    assert (made / "manifest.json").read_bytes() == before
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "letter.txt").write_text("dear")
    with pytest.raises(InputError, match="something else than a bundle"):
        bundling.bundle(settings, FAST32, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "letter.txt").read_text() == "dear"
    (tmp_path / "out" / "letter.txt").unlink()
    bundling.bundle(settings, FAST32, tmp_path / "out")
    bundling.bundle(settings, FAST32, tmp_path / "out", overwrite=True)
    assert bundles.verify(tmp_path / "out").adapters == ()
    assert not list(tmp_path.glob(".*"))


def test_a_graph_that_computes_something_else_is_not_bundled(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = make.fast.build

    def broken(folder: Path, out: Path, **options: Any) -> Any:
        from shutil import copytree

        from safetensors.torch import load_file, save_file

        copy = copytree(folder, tmp_path / "broken")
        weights = load_file(copy / "model.safetensors")
        save_file({k: w * 1.5 for k, w in weights.items()}, copy / "model.safetensors", {"format": "pt"})
        return real(copy, out, **options)

    monkeypatch.setattr(make.fast, "build", broken)
    with pytest.raises(ParityError, match="check float32 graph against torch"):
        bundling.bundle(config.Model(name=str(model)), FAST32, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("missing", ["onnx_ir", "onnxruntime"])
def test_a_missing_library_is_told_what_to_install(
    missing: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = make.importlib.util.find_spec
    monkeypatch.setattr(make.importlib.util, "find_spec", lambda name: None if name == missing else real(name))
    with pytest.raises(
        BackendUnavailable, match=rf"{missing} is not installed; run `pip install 'edge_sdss\[export\]'`"
    ):
        bundling.bundle(config.Model(name=str(model)), CPU, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_torch_a_base_is_exported_and_says_what_was_not_compared(
    model: Path, mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probing, "has_torch", lambda: False)
    settings = config.Model(name=str(model))
    found = bundling.bundle(settings, CPU, tmp_path / "out")
    assert found.notes[0] == "not compared with torch: it is not installed here"
    assert {("int4 graph", "float32 graph"), ("engine on cpu", "int4 graph")} == {
        (check.stage, check.against) for check in found.checks
    }
    bare = tmp_path / "bare"
    from shutil import copytree

    copytree(mine, bare)
    (bare / probe.PROBE).unlink(missing_ok=True)
    with pytest.raises(ExportError, match="without a probe"):
        bundling.bundle(settings, CPU, tmp_path / "other", adapters={"bare": bare})


PROGRAM = """
import os, signal, sys
from pathlib import Path
from edge_sdss import bundling, config
from edge_sdss.bundles import recipes
bundling.probing.has_torch = lambda: False  # which takes seconds to load
seen = []
def progress(stage, done, total):
    key = (stage, done)
    if key not in seen:
        seen.append(key)
    if len(seen) > int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
recipe = recipes.load("onnxruntime-cpu")
bundling.bundle(config.Model(name=sys.argv[1]), recipe, Path(sys.argv[2]), overwrite=True, progress=progress)
print(len(seen))
"""


def test_a_kill_at_any_moment_leaves_the_old_bundle_or_none(made: Path, model: Path, tmp_path: Path) -> None:
    from shutil import copytree

    def run(out: Path, after: int) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(Path(bundling.__file__).parents[2])}
        arguments = [sys.executable, "-c", textwrap.dedent(PROGRAM), str(model), str(out), str(after)]
        return subprocess.run(arguments, capture_output=True, text=True, env=environment)

    out = tmp_path / "out"
    assert run(out, 3).returncode == -signal.SIGKILL
    assert not out.exists()
    assert list(tmp_path.glob(".out*"))
    copytree(made, out)
    assert run(out, 15).returncode == -signal.SIGKILL
    assert bundles.verify(out).recipe == "fast-float32"
    bundling.bundle(config.Model(name=str(model)), CPU, out, overwrite=True)
    assert bundles.verify(out).recipe == "onnxruntime-cpu"
    assert not list(tmp_path.glob(".out*"))


def test_an_export_that_ended_between_two_renames_leaves_the_old_bundle(
    made: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from shutil import copytree

    out, settings, real = copytree(made, tmp_path / "out"), config.Model(name=str(model)), os.rename

    def full(source: Any, target: Any) -> None:
        if str(source).endswith(".out.partial"):
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(ExportError, match="No space left on device"):
        bundling.bundle(settings, FAST32, out, overwrite=True)
    monkeypatch.undo()
    assert bundles.verify(out).active == "mine"
    real(out, tmp_path / ".out.old.partial")  # as a kill leaves it
    with pytest.raises(InputError, match="something is there"):
        bundling.bundle(settings, FAST32, out)
    assert bundles.verify(out).active == "mine"


# --- the parts ---


def test_the_fingerprint_of_a_folder_is_the_models(model: Path) -> None:
    from edge_sdss.lm import loading

    assert loading.fingerprint(model) == LanguageModel.load(config.Model(name=str(model), device="cpu")).fingerprint


def test_a_probe_is_bound_to_its_adapter_and_base(model: Path, tmp_path: Path) -> None:
    lm, mine = LanguageModel.load(config.Model(name=str(model), device="cpu")), adapter(model, tmp_path / "mine")
    assert not bundling.probed(mine, lm.fingerprint)
    bundling.record(lm, mine)
    assert lm.adapter is None
    assert bundling.probed(mine, lm.fingerprint)
    assert not bundling.probed(mine, "0" * 64)
    weights = mine / "adapter_model.safetensors"
    weights.write_bytes(adapter(model, tmp_path / "new", seed=9).joinpath(weights.name).read_bytes())
    assert not bundling.probed(mine, lm.fingerprint)


def test_what_a_recipe_promises_and_the_graph_breaks_is_refused_or_noted(model: Path) -> None:
    stages = Stages(texts(make._chat(model)), lambda *a: None)
    rng = np.random.default_rng(0)
    rows = {ids.tobytes(): rng.standard_normal((len(ids), 400)).astype(np.float32) for ids in stages.texts}
    stages.known["float32 graph"] = lambda ids: rows[ids.tobytes()]
    limits = make.parity.Limits()
    stages.compare("int4 graph", "float32 graph", lambda ids: rows[ids.tobytes()] * np.float32(3), limits)
    with pytest.raises(
        ParityError, match=r"mean KL .* allows 0\.1; .*NLL change .* 200\.0 MB.* 105 MB; .*--beyond-limits"
    ):
        stages.judge(CPU, 200_000_000, False)
    assert stages.notes == []
    stages.judge(CPU, 200_000_000, True)
    assert [note.split(":")[1].split()[0] for note in stages.notes[:2]] == ["mean", "NLL"]
    assert "200.0 MB, recipe onnxruntime-cpu allows 105 MB" in stages.notes[2]
    assert "the graph has float32" in _departures("jetson-orin-jp6", made_graph())
    assert "not written yet" in _departures("qnn-htp", made_graph())


def test_a_bundle_beyond_its_recipes_limits_is_not_there(model: Path, tmp_path: Path) -> None:
    strict = recipe(precision="int8", limits=recipes.Limits(kl_nats=1e-9))
    with pytest.raises(ParityError, match="mean KL"):
        bundling.bundle(config.Model(name=str(model)), strict, tmp_path / "b")
    assert list(tmp_path.iterdir()) == []
    made = bundling.bundle(config.Model(name=str(model)), strict, tmp_path / "b", beyond_limits=True)
    assert any("allows 1e-09" in note for note in made.notes)


def test_a_gpus_bundle_is_in_float16_and_its_adapter_does_what_pefts_does(
    model: Path, mine: Path, tmp_path: Path
) -> None:
    """On the CPU, which has these operators in float16 too."""
    jetson = recipes.load("jetson-orin-jp6").model_copy(update={"precision": "int8"})
    made = bundling.bundle(config.Model(name=str(model)), jetson, tmp_path / "b", adapters={"mine": mine})
    assert (made.graph.kv_dtype, made.graph.lora_dtype) == ("float16", "float16")
    assert not any("asks for" in note for note in made.notes)
    assert [check for check in made.checks if check.stage.startswith("adapter")]
    engine, graph = Engine.open(tmp_path / "b", threads=1), GraphModel(tmp_path / "b", made.graph)
    prompt = engine.chat.prompt_ids(TALK, 64)
    for name in (None, "mine"):
        tensors = None if name is None else engine.adapters[name].tensors
        answer = [id_ for id_, _ in zip(engine.follow(prompt, name), range(12), strict=False)]
        assert answer == graph.greedy(np.array(prompt), 12, tensors)


def made_graph() -> bundles.Graph:
    sizes = {"layers": 1, "kv_heads": 1, "head_dim": 4, "vocabulary": 8, "width": 4, "context": 8}
    return bundles.Graph(precision="int4", kv_cache="shared", **sizes)


def _departures(name: str, graph: bundles.Graph) -> str:
    notes: list[str] = []
    make._note_departures(recipes.load(name), graph, notes)
    assert notes[0].startswith(f"{name} is not yet run on a device: ")
    return "; ".join(notes)
