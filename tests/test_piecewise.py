"""Models that are loaded tensor by tensor, each held as it is to be from the first."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

from safetensors.torch import load_file, save_file
from tiny import tiny_model

from edge_sdss import config
from edge_sdss.errors import InputError
from edge_sdss.lm import LanguageModel
from edge_sdss.tuning import adapter

IDS = torch.arange(3, 40)[None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("tiny"))


def model(folder: Path, **changes: Any) -> config.Model:
    return config.Model(name=str(folder), device="cpu", **changes)


def logits(lm: LanguageModel) -> Any:
    with torch.no_grad():
        return lm.model(input_ids=IDS).logits


def renamed(folder: Path, out: Path, change: Any) -> Path:
    """A copy of a model whose tensors have other names or are not all there."""
    shutil.copytree(folder, out)
    tensors = change(load_file(out / "model.safetensors"))
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


@pytest.mark.parametrize("kind", ["as loaded", "float32", "bfloat16", "int8", "nf4"])
@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_as_if_it_had_been_loaded_whole(folder: Path, kind: Any, compute: Any) -> None:
    settings = config.Tuning(weights=kind, compute_dtype=compute)
    found = adapter.load(model(folder), settings)
    wanted = LanguageModel.load(model(folder))
    adapter.quantise(wanted, settings)
    assert torch.equal(logits(found), logits(wanted))
    assert found.fingerprint == wanted.fingerprint
    assert found.chat.stop_ids == wanted.chat.stop_ids
    assert not any(p.requires_grad for p in found.model.parameters())
    assert not any(module.training for module in found.model.modules())
    one, other = (sorted((n, t.dtype, t.shape) for n, t in lm.model.state_dict().items()) for lm in (found, wanted))
    assert one == other
    assert found.model.lm_head.weight is found.model.model.embed_tokens.weight


def test_no_tensor_is_there_before_its_turn(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what was read, nothing is alive in its first form when the next tensor is read."""
    import weakref

    from edge_sdss.lm import piecewise

    alive: list[Any] = []
    counts: list[int] = []
    plain = piecewise._read

    def read(file: Path, name: str) -> Any:
        counts.append(sum(each() is not None for each in alive))
        found = plain(file, name)
        alive.append(weakref.ref(found))
        return found

    monkeypatch.setattr(piecewise, "_read", read)
    adapter.load(model(folder), config.Tuning(weights="nf4", compute_dtype="bfloat16"))
    assert len(counts) > 10
    assert max(counts) <= 1


def test_shards_are_found(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[:5], "model-00002-of-00002.safetensors": names[5:]}
    for file, chosen in parts.items():
        save_file({name: tensors[name] for name in chosen}, tmp_path / "m" / file, metadata={"format": "pt"})
    (tmp_path / "m" / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {name: file for file, chosen in parts.items() for name in chosen}}
    (tmp_path / "m" / "model.safetensors.index.json").write_text(json.dumps(index))
    found = adapter.load(model(tmp_path / "m"), config.Tuning())
    assert torch.equal(logits(found), logits(LanguageModel.load(model(folder))))


def test_other_names_go_through_the_models_own_loader(folder: Path, tmp_path: Path) -> None:
    """A checkpoint of the backbone alone has no `model.` before its names."""
    shorter = renamed(folder, tmp_path / "m", lambda t: {name.removeprefix("model."): x for name, x in t.items()})
    found = adapter.load(model(shorter), config.Tuning(weights="int8", compute_dtype="float32"))
    wanted = adapter.load(model(folder), config.Tuning(weights="int8", compute_dtype="float32"))
    assert torch.equal(logits(found), logits(wanted))


def test_what_is_not_whole_is_not_put_together(folder: Path, tmp_path: Path) -> None:
    cut = renamed(folder, tmp_path / "m", lambda t: {n: x for n, x in t.items() if "layers.1.mlp.up" not in n})
    with pytest.raises(InputError, match=r"model.layers.1.mlp.up_proj.weight is not in it"):
        adapter.load(model(cut), config.Tuning())
    with pytest.raises(InputError, match=r"model.layers.1.mlp.up_proj.weight is not in it"):
        LanguageModel.load(model(cut))
