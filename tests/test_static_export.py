"""Bundles of static graphs: a tiny model end to end on the emulated HTP, and what is said where that is not there."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")
ort = pytest.importorskip("onnxruntime")
pytest.importorskip("onnx_ir")

from test_export import adapter

from edge_sdss import bundles, bundling, config
from edge_sdss.bundles import Graph, recipes
from edge_sdss.bundles.recipes import Extent
from edge_sdss.bundling import make, static
from edge_sdss.errors import BackendUnavailable
from edge_sdss.exporting import htp
from edge_sdss.lm import LanguageModel
from edge_sdss.runtime import Engine
from edge_sdss.types import Example, Turn


def small(name: str) -> recipes.Recipe:
    """The recipe with a cache that a tiny model fills, and all of its layers quantised."""
    found = recipes.load(name)
    past = Extent(min=96, opt=96, max=96)
    return found.model_copy(update={"shapes": found.shapes.model_copy(update={"past": past}), "float_layers": 0})


@pytest.fixture(scope="module")
def model(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with layers that matter."""
    from shutil import copytree

    from safetensors.torch import load_file, save_file

    folder = copytree(tiny, tmp_path_factory.mktemp("model") / "tiny")
    weights, draws = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(0)
    for name, weight in weights.items():
        if "layers" in name and weight.dim() == 2:
            weights[name] = 0.15 * torch.randn(weight.shape, generator=draws)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("name", ["qnn-htp", "qnn-htp-a16w8"])
def test_a_bundle_from_the_model_to_the_emulated_htp(name: str, model: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime_qnn", reason="onnxruntime-qnn, which emulates the HTP, is not installed")
    given = adapter(model, tmp_path / "given")
    out = tmp_path / "bundle"
    made = bundling.bundle(config.Model(name=str(model)), small(name), out, adapters={"a": given}, beyond_limits=True)
    found = bundles.verify(out)
    assert found.graph.static is not None
    assert any("emulated HTP, no device has run it" in note for note in made.notes)
    values = {(one.stage, one.metric): one.value for one in made.checks}
    assert values["float32 graph", "max |Δlogit|"] < 1e-3
    assert any("emulated HTP" in stage for stage, _ in values)
    assert values["adapter a", "|effect| / |expected|"] == pytest.approx(1, abs=0.1)
    assert not [path for path in out.rglob("*") if path.name.startswith(".")]
    again = static.StaticBundle(out, found, htp.session)  # what a device has: no float graph
    text = np.array([again.prefixes[""].ids[0], *range(20, 60)])
    lm = LanguageModel.load(config.Model(name=str(model), device="cpu"))
    with torch.no_grad():
        base = lm.model(torch.from_numpy(text[None])).logits[0].numpy()
    lm.attach(given)
    with torch.no_grad():
        tuned = lm.model(torch.from_numpy(text[None])).logits[0].numpy()
    rows, changed = again.logits(text.tolist(), None), again.logits(text.tolist(), "a")
    assert np.linalg.norm(rows - base) < 0.05 * np.linalg.norm(base)
    assert np.linalg.norm((changed - rows) - (tuned - base)) < 0.1 * np.linalg.norm(tuned - base)
    with pytest.raises(BackendUnavailable, match="fixed shapes, which the engine does not run yet"):
        Engine.open(out)


def test_without_the_package_nothing_is_begun(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime_qnn", None)
    with pytest.raises(BackendUnavailable, match=r"pip install 'edge_sdss\[qnn\]'"):
        bundling.bundle(config.Model(name=str(model)), recipes.load("qnn-htp"), tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def test_kept_dialogues_calibrate_first_and_packaged_ones_fill_up(model: Path) -> None:
    chat = LanguageModel.load(config.Model(name=str(model), device="cpu")).chat
    kept = [Example((Turn("user", f"Where is number {n}?"),), "It is in the red box, as always.") for n in range(3)]
    found = static.calibration(chat, kept)
    assert len(found) == 128
    assert [ids.tolist() for ids in found[:3]] == [list(chat.encode(one, 128).ids) for one in kept]
    assert len(static.calibration(chat, kept * 60)) == 128


@pytest.mark.parametrize(
    "change",
    [
        {"kv_cache": "growing"},
        {"block_size": 32, "precision": "float16"},
        {"shapes": {"static": False}},
        {"route": "portable"},
    ],
)
def test_a_recipe_of_static_graphs_agrees_with_itself(change: dict[str, Any]) -> None:
    stated = recipes.load("qnn-htp-a16w8").model_dump()
    nested = {**stated["shapes"], **change.pop("shapes")} if "shapes" in change else stated["shapes"]
    with pytest.raises(ValueError, match=r"route|block_size"):
        recipes.Recipe.model_validate({**stated, "shapes": nested, **change})


def test_float_layers_are_for_static_graphs() -> None:
    stated = recipes.load("onnxruntime-cpu").model_dump()
    with pytest.raises(ValueError, match="float_layers are for the route static"):
        recipes.Recipe.model_validate({**stated, "float_layers": 2})


def test_a_graph_that_is_not_static_is_noted() -> None:
    notes: list[str] = []
    graph = Graph(
        precision="float32", kv_cache="growing", layers=1, kv_heads=1, head_dim=4, vocabulary=8, width=4, context=8
    )
    make._note_departures(recipes.load("qnn-htp"), graph, notes)
    assert any("static shapes, which are not written yet" in note for note in notes)
