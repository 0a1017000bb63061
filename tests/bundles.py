"""Small bundles and PEFT folders, made without torch, for tests."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edge_sdss import bundles
from edge_sdss.bundles import Graph, Manifest, Site, peft
from edge_sdss.lm import CARD

WIDTH, VOCABULARY = 8, 32
FINGERPRINT = "f1" * 32
# q, k and v share an input; o has one of its own.
SITES = (
    Site(module="layers.0.q_proj", inputs=WIDTH, outputs=6, lora_a="qkv.A", lora_b="qkv.B"),
    Site(module="layers.0.k_proj", inputs=WIDTH, outputs=4, lora_a="qkv.A", lora_b="qkv.B", start=6),
    Site(module="layers.0.v_proj", inputs=WIDTH, outputs=2, lora_a="qkv.A", lora_b="qkv.B", start=10),
    Site(module="layers.0.o_proj", inputs=12, outputs=VOCABULARY, lora_a="o.A", lora_b="o.B"),
)
GRAPH = Graph(
    precision="float32",
    kv_cache="growing",
    layers=1,
    kv_heads=1,
    head_dim=4,
    vocabulary=VOCABULARY,
    width=WIDTH,
    context=64,
    sites=SITES,
)
QKVO = tuple(site.module for site in SITES)
Pairs = Mapping[str, tuple[np.ndarray, np.ndarray]]


def bundle(folder: Path, *, seed: int = 0, files: Mapping[str, bytes] | None = None, **changes: Any) -> Path:
    """Writes a bundle whose graph is random bytes, unless `files` has one."""
    rng = np.random.default_rng(seed)
    content = {"model.onnx": rng.bytes(40_000), "tokenizer.json": b'{"a": 1}', "config/generation.json": b"{}"}
    content.update(files or {})
    for path, data in content.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    entries = tuple(bundles.entry(folder, path) for path in content)
    manifest = Manifest(
        base="tiny",
        base_fingerprint=changes.pop("base_fingerprint", FINGERPRINT),
        tokenizer_sha256=entries[list(content).index("tokenizer.json")].sha256,
        recipe="onnxruntime-cpu",
        graph=changes.pop("graph", GRAPH),
        files=entries,
        **changes,
    )
    bundles.write(folder, manifest)
    return folder


def pairs(ranks: Mapping[str, int], *, seed: int = 0, size: float = 1.0) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """A [r, inputs] and B [outputs, r] of each module, as PEFT keeps them."""
    rng, sites = np.random.default_rng(seed), {site.module: site for site in SITES}
    shapes = {module: ((r, sites[module].inputs), (sites[module].outputs, r)) for module, r in ranks.items()}
    return {
        module: tuple((size * rng.standard_normal(shape)).astype(np.float32) for shape in both)  # type: ignore[misc]
        for module, both in shapes.items()
    }


def peft_folder(
    folder: Path, weights: Pairs, *, r: int = 4, alpha: float = 8.0, base: str | None = FINGERPRINT, **settings: Any
) -> Path:
    """Writes a PEFT folder; `base` None leaves the card out."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    tensors = {}
    for module, (a, b) in weights.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = np.ascontiguousarray(a)
        tensors[f"base_model.model.{module}.lora_B.weight"] = np.ascontiguousarray(b)
    save_file(tensors, folder / peft.WEIGHTS)
    config = {"peft_type": "LORA", "r": r, "lora_alpha": alpha, "bias": "none", "target_modules": list(weights)}
    (folder / peft.CONFIG).write_text(json.dumps({**config, **settings}), encoding="utf-8")
    if base is not None:
        (folder / CARD).write_text(json.dumps({"base_fingerprint": base}), encoding="utf-8")
    return folder


class Tiny:
    """logits = concat(x Wq + …) Wo with x = E[ids], and LoRA on all four: the formula, and the same as a graph."""

    def __init__(self, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        shapes = ((VOCABULARY, WIDTH), (WIDTH, 12), (12, VOCABULARY))
        self.embedding, self.qkv, self.o = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)

    def reference(self, adapters: Mapping[str, Pairs], scale: float = 1.0) -> Callable[..., np.ndarray]:
        def logits(ids: Any, asked: str | Mapping[str, float] | None) -> np.ndarray:
            qkv, o = self.qkv.astype(np.float64), self.o.astype(np.float64)
            (name, factor), *_ = asked.items() if isinstance(asked, Mapping) else [(asked, 1.0)]
            for module, (a, b) in (adapters[name] if name else {}).items():
                site = next(site for site in SITES if site.module == module)
                weight = o if site.lora_a == "o.A" else qkv
                weight[:, site.start : site.start + site.outputs] += scale * factor * (b @ a).T
            return self.embedding[np.asarray(ids)].astype(np.float64) @ qkv @ o

        return logits

    def onnx(self) -> bytes:
        from onnx import TensorProto, helper, numpy_helper

        def empty(name: str, shape: tuple[int, int]) -> Any:
            return numpy_helper.from_array(np.zeros(shape, np.float32), name)

        weights = {"E": self.embedding, "qkv.W": self.qkv, "o.W": self.o}
        known = [numpy_helper.from_array(array, name) for name, array in weights.items()]
        lora = {"qkv.A": (WIDTH, 0), "qkv.B": (0, 12), "o.A": (12, 0), "o.B": (0, VOCABULARY)}
        nodes = [helper.make_node("Gather", ["E", "input_ids"], ["x"])]
        for name, source, target in (("qkv", "x", "h"), ("o", "h", "logits")):
            nodes += [
                helper.make_node("MatMul", [source, f"{name}.W"], [f"{name}.y"]),
                helper.make_node("MatMul", [source, f"{name}.A"], [f"{name}.xa"]),
                helper.make_node("MatMul", [f"{name}.xa", f"{name}.B"], [f"{name}.xab"]),
                helper.make_node("Add", [f"{name}.y", f"{name}.xab"], [target]),
            ]
        inputs = [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["n"])]
        for name, shape in lora.items():
            inputs.append(
                helper.make_tensor_value_info(name, TensorProto.FLOAT, [size or f"{name[:-2]}.r" for size in shape])
            )
        outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", VOCABULARY])]
        initial = known + [empty(name, shape) for name, shape in lora.items()]
        graph = helper.make_graph(nodes, "tiny", inputs, outputs, initial)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
        return bytes(model.SerializeToString())
